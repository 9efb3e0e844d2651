"""Write the results of params/features.yml and params/amu_tuning.yml to outputs/measured.

`python tools/collect_features.py [folder of outputs]`. The files hold no predictions. Cells that an
earlier run measured and that are not measured again stay.
"""

import sys
from pathlib import Path

import pandas as pd

from vlmadapt.reporting.summaries import compact

ROOT = Path(__file__).resolve().parents[1]
IMAGES = "github.com/bunnieslala/IMAS (images)"
TEXT = "github.com/rotem154154/clip_lt (text), baogiadoan/Bella (text ensemble)"
SOURCES = {
    "clip_vitb32_imagenet": f"{IMAGES}, {TEXT}",
    "clip_vitb32_stanford_cars": f"{IMAGES}, mikgrycz/ViT-merging (text)",
}  # bundle -> where its features come from
OTHERS = "elkhouryk/RS-TransCLIP"  # of WHU-RS19
CELL = ["dataset", "text", "shots", "label", "seed"]


def collect(name, outputs):
    "Write the results of one grid."
    found = compact(outputs / name)
    sources = [
        "vlmadapt" if dataset.startswith("mini-") else SOURCES.get(dataset, OTHERS)
        for dataset in found["dataset"]
    ]
    found = found.assign(source=sources)
    target = ROOT / f"outputs/measured/{name}.parquet"
    if target.exists():
        both = pd.concat([found, pd.read_parquet(target)], ignore_index=True)
        found = both.drop_duplicates(CELL)
    found = found.sort_values(CELL, ignore_index=True)
    found.to_parquet(target, index=False, compression="zstd")
    print(f"{target.name}: {len(found)} results, {target.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    outputs = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "outputs"
    for grid in ("features", "amu_tuning"):
        if (outputs / grid).exists():
            collect(grid, outputs)
