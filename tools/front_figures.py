"""Figures and tables made of the committed measurements on real features.

`python tools/front_figures.py` writes nbs/images/hero.png, the figure of the README; the site
draws one such figure for each method.
"""

import hashlib
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from vlmadapt.core.files import write_atomic
from vlmadapt.reporting.figures import look, page_style, palette_png

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "outputs/measured/features.parquet"
HERO = ROOT / "nbs/images/hero.png"
NAMES = {
    "clip_vitb32_imagenet": "ImageNet",
    "clip_vitb32_stanford_cars": "Stanford Cars",
    "clip_vitb32_whurs19": "WHU-RS19",
    "clip_rn50_whurs19": "WHU-RS19 (RN50)",
    "clip_vitl14_whurs19": "WHU-RS19 (ViT-L/14)",
}  # bundle -> its name in a sentence
PANELS = {
    "clip_vitb32_imagenet": "ImageNet",
    "clip_vitb32_stanford_cars": "Stanford Cars",
    "clip_vitb32_whurs19": "WHU-RS19 (aerial)",
}  # bundles of one backbone, ViT-B/32
VARIANTS = {"HeGraphAdapter": "T-P"}  # the features have no negative texts
SEEDS = 3
EMPHASISED = ("AnchoredKernel", "ProKeR", "GDA", "TipAdapter", "ZeroShot")
GREY = {"color": "#c4c4c4", "lw": 0.6, "zorder": 1}


@cache
def measured(name: str = "features") -> pd.DataFrame:
    "Return means over the seeds: dataset, method, shots, mean, seeds, parameters, seconds."
    table = pd.read_parquet(ROOT / f"outputs/measured/{name}.parquet")
    if name == "towers":  # all classes of the dataset that was adapted to
        table = table[(table["part"] == "short") & (table["variant"] == "")]
        table = table.assign(rule="given")
    else:
        table = table[(table["text"] == "text") | (table["source"] == "vlmadapt")]
        table = table[table["variant"] == table["method"].map(VARIANTS).fillna("")]
    groups = table[table["value"].notna()].groupby(["dataset", "method", "shots"])
    return groups.agg(
        mean=("value", "mean"),
        seeds=("seed", "nunique"),
        parameters=("trainable_parameters", "median"),
        seconds=("fit_processor_seconds", "median"),
        rule=("rule", "first"),
    ).reset_index()


def level(dataset: str, shots: int, kind: str) -> float | None:
    "Return the accuracy of zero-shot in a cell, or None."
    for name in ("towers",) if kind in ("prompts", "towers") else ("features", "amu_tuning"):
        table = measured(name)
        own = table[(table["dataset"] == dataset) & (table["shots"] == shots)]
        own = own[own["method"] == "ZeroShot"]
        if len(own):
            return float(own["mean"].iloc[0])
    return None


def whole(table: pd.DataFrame) -> pd.DataFrame:
    "Return the cells that were measured with all seeds."
    return table[table["seeds"] >= SEEDS]


def fingerprint() -> str:
    "Return a hash of the numbers that the figure shows."
    shown = whole(measured())
    shown = shown[shown["dataset"].isin(PANELS)][["dataset", "method", "shots", "mean"]]
    return hashlib.sha256(shown.round(6).to_csv(index=False).encode()).hexdigest()


def _panel(ax, curves, emphasised):
    "Draw one set of features: grey lines of all methods, and those that are emphasised."
    shots = sorted(curves["shots"].unique())
    floor = curves.loc[curves["method"] == "ZeroShot", "mean"].min() - 4
    for method, own in curves.groupby("method"):
        points = own.set_index("shots")["mean"].reindex(shots)
        style = {**look(method), "lw": 1.6, "ms": 4} if method in emphasised else GREY
        if method == "ZeroShot":
            style = {**style, "ls": "--", "marker": ""}
        ax.plot(range(len(shots)), points.interpolate(limit_area="inside"), **style)
    ax.set_ylim(bottom=floor)
    ax.set_xticks(range(len(shots)), [str(s) for s in shots])
    ax.set_xlim(-0.2, len(shots) - 0.8)
    ax.grid(axis="x", visible=False)
    sns.despine(ax=ax)


def accuracy_figure(emphasised: tuple[str, ...]) -> plt.Figure:
    "Draw accuracy over images per class, with a panel for each set of features."
    table = measured()
    cells = table[(table["seeds"] >= SEEDS) | table["method"].isin(emphasised)]
    with page_style():
        fig, axes = plt.subplots(1, len(PANELS), figsize=(7.2, 2.5), layout="constrained")
        for (bundle, title), ax in zip(PANELS.items(), axes, strict=True):
            _panel(ax, cells[cells["dataset"] == bundle], emphasised)
            ax.set_title(title)
        handles = {}
        for ax in axes:
            for line in ax.get_lines():
                if not line.get_label().startswith("_"):
                    handles[line.get_label()] = line
        order = [look(method)["label"] for method in emphasised]
        chosen = [handles[label] for label in order if label in handles]
        fig.legend(handles=chosen, loc="outside upper center", ncols=5, frameon=False)
        fig.supxlabel("labelled images per class", fontsize=8)
        fig.supylabel("test accuracy (%)", fontsize=8)
    return fig


def png(emphasised: tuple[str, ...], dpi: int = 110) -> bytes:
    "Return the figure as a PNG file."
    with page_style():
        fig = accuracy_figure(emphasised)
        data = palette_png(fig, 64, dpi)
    plt.close(fig)
    return data


def main() -> None:
    "Write the figure of the README, and the hash of its numbers beside it."
    with write_atomic(HERO) as temporary:
        Path(temporary).write_bytes(png(EMPHASISED, 150))
    HERO.with_suffix(".sha256").write_text(fingerprint() + "\n", encoding="utf-8")
    print(f"{HERO.relative_to(ROOT)}: {HERO.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
