"The deviation of one seed: tables and figures show none, and say so."

import numpy as np
import pandas as pd

from vlmadapt.grid.results import deviation
from vlmadapt.grid.store import ResultStore
from vlmadapt.reporting.claims import check_claim
from vlmadapt.reporting.figures import shot_panels
from vlmadapt.reporting.plots import gain_bars
from vlmadapt.reporting.reproduction import beside, show_beside
from vlmadapt.reporting.summaries import averages, cells
from vlmadapt.reporting.tables import dataset_table, save_frame


def made_up(methods, dataset="mini-digits", shots=(16,)):
    "Results as `read_results` returns them: method -> seeds; the accuracy is 60 and the seed."
    lines = []
    for method, seeds in methods.items():
        for seed in seeds:
            for shot in shots:
                own = {"method": method, "seed": seed, "shots": shot, "value": 60.0 + seed}
                lines.append({**own, "above_zero_shot": float(seed)})
    where = {"dataset": dataset, "evaluated_on": dataset, "class_split": "all", "point": None}
    how = {"views": 10, "trials": 0, "selection": "defaults", "n": 1000, "grid": "g"}
    shared = {"metric": "accuracy", "backbone": "RN50", "prompts": "template"}
    return pd.DataFrame(lines).assign(**where, **how, **shared)


ONE = made_up(dict(ZeroShot=[1], TipAdapter=[1]))
MIXED = made_up(dict(ZeroShot=[1, 3], TipAdapter=[1]))


def printed(results):
    table = dataset_table(results, shots=16)
    return [
        repr(table),
        table.markdown(),
        table.latex(),
        table._repr_html_(),
        table.styler().to_html(),
    ]


def test_deviation_by_hand():
    assert deviation([1.0, 3.0, np.nan]) == 1.0
    assert deviation([2.0, 2.0]) == 0.0
    assert all(np.isnan(deviation(values)) for values in ([], [5.0], [5.0, np.nan]))


def test_tables_of_one_seed_print_no_deviation():
    for text in printed(ONE):
        assert "±" not in text and r"\pm" not in text and "nan" not in text
        assert "seed 1, one seed without a standard deviation" in text
    assert cells(ONE)["sd"].isna().all()
    assert averages(ONE)["sd"].isna().all()


def test_mixed_tables_mark_single_seeds():
    table = dataset_table(MIXED, shots=16)
    assert table.text()["mini-digits"].tolist() == ["62.0 ± 1.0", "61.0†"]
    assert "over seeds 1, 3 (none for one seed)." in table.notes
    assert table.caption.endswith("† fewer seeds.")


def test_several_equal_seeds_keep_their_zero():
    results = made_up(dict(TipAdapter=[1, 2])).assign(value=70.0)
    assert dataset_table(results, shots=16).text().loc["TipAdapter", "mini-digits"] == "70.0 ± 0.0"


def test_figures_of_one_seed_have_no_bars_and_bands():
    bars = gain_bars(ONE)
    assert not any(np.isfinite(line.get_ydata()).any() for line in bars.axes[0].lines[:-1])
    for ax in shot_panels(made_up(dict(TipAdapter=[1]), shots=(1, 16))).axes:
        for band in ax.collections:
            assert all(
                not len(path.vertices) or np.isnan(path.vertices).all() for path in band.get_paths()
            )


def test_published_comparison_of_one_seed():
    results = made_up(dict(TipAdapterF=[1]), dataset="dtd").assign(prompts="template")
    compared = beside(results).query("mark != 'not run'")
    one = compared.drop_duplicates("method").head(1)
    assert np.isnan(one["sd"]).all() and np.isfinite(one["half_width"]).all()
    html = show_beside(one).to_html()
    assert "61.0 (" in html and "±" not in html and "one seed without a standard deviation" in html


def test_claims_about_one_seed():
    answer = check_claim(
        "TipAdapter, RN50, 16 shots, average 61", made_up(dict(TipAdapter=[1]), dataset="dtd")
    )
    assert (answer.verdict, answer.why) == ("cannot be told", "one seed only")
    assert np.isfinite([answer.low, answer.high]).all()
    uneven = pd.concat(
        [made_up(dict(TipAdapter=[1, 2]), "dtd"), made_up(dict(TipAdapter=[1]), "eurosat")]
    )
    answer = check_claim("TipAdapter, RN50, 16 shots, average 61", uneven)
    assert "nan" not in str(answer) and answer.verdict == "cannot be told"


def test_table_of_a_run_and_of_a_report(tmp_path):
    store = ResultStore(tmp_path, dict(dataset="mini-digits"), ["ZeroShot", "TipAdapter"])
    for entry, seed, value in zip(
        store.entries[:1] * 2 + store.entries[1:], (1, 3, 1), (51, 53, 60), strict=True
    ):
        store.save(entry, seed, dict(metric="accuracy", value=value))
    table = store.table()
    assert table.loc["ZeroShot", "sd"] == 1.0
    assert np.isnan(table.loc["TipAdapter", "sd"])
    save_frame(table, tmp_path / "report", floatfmt=".1f")
    assert "nan" not in (tmp_path / "report" / "table.md").read_text()
