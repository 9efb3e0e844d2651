"""Write the results of params/features.yml, without predictions, to outputs/measured."""

from pathlib import Path

from vlmadapt.reporting.summaries import compact

ROOT = Path(__file__).resolve().parents[1]
IMAGES = "github.com/bunnieslala/IMAS (images)"
TEXT = "github.com/rotem154154/clip_lt (text), baogiadoan/Bella (text ensemble)"
SOURCES = {
    "clip_vitb32_imagenet": f"{IMAGES}, {TEXT}",
    "clip_vitb32_stanford_cars": f"{IMAGES}, mikgrycz/ViT-merging (text)",
}  # bundle -> where its features come from
OTHERS = "elkhouryk/RS-TransCLIP"  # of WHU-RS19


if __name__ == "__main__":
    found = compact(ROOT / "outputs/features")
    sources = [SOURCES.get(name, OTHERS) for name in found["dataset"]]
    target = ROOT / "outputs/measured/features.parquet"
    found.assign(source=sources).to_parquet(target, index=False, compression="zstd")
    print(f"{target.name}: {len(found)} results, {target.stat().st_size / 1e3:.0f} kB")
