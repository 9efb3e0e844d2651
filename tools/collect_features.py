"""Write the results of three grids to outputs/measured, for reports and README.

`python tools/collect_features.py [folder of outputs]`. The files of params/features.yml and
params/amu_tuning.yml hold no predictions; cells that an earlier run measured and that are not
measured again stay. Of params/mini.yml the table of the README is kept.
"""

import sys
from pathlib import Path

import pandas as pd

from vlmadapt.grid.results import read_results
from vlmadapt.reporting.summaries import averages, cells, compact

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


def collect_mini(outputs, shots=16):
    "Write means and standard deviations over the seeds, on average (best first) and by dataset."
    results = read_results(outputs / "mini")
    results = results[results["shots"] == shots]
    each = cells(results).rename(columns={"evaluated_on": "dataset"})
    seeds = each.groupby("label")["seeds"].min()
    average = averages(results).assign(dataset="Average").sort_values("mean", ascending=False)
    average["seeds"] = average["label"].map(seeds)
    both = pd.concat([average, each], ignore_index=True).drop(columns="method")
    both = both.rename(columns={"label": "method"})[["method", "dataset", "mean", "sd", "seeds"]]
    both.round(2).to_csv(ROOT / "outputs/measured/mini.csv", index=False)


if __name__ == "__main__":
    outputs = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "outputs"
    for grid in ("features", "amu_tuning"):
        if (outputs / grid).exists():
            collect(grid, outputs)
    if (outputs / "mini").exists():
        collect_mini(outputs)
