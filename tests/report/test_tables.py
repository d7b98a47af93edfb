"""Means, standard deviations and published values compared with numbers worked out by hand."""

from pathlib import Path

import pandas as pd
import pytest

from mochi.config import ConfigError, Experiment, baseline_of, load_experiment, parse_experiment
from mochi.provenance.wanted import reported
from mochi.report import stage
from mochi.report.tables import _escaped, layouts, markdown, read_published, signed, summarize
from tests.report.made_up import make_up, published_in
from tests.tiny import MOCHI, TINY

ROOT = Path(__file__).parents[2]


def test_summary(tiny: Experiment, results: Path) -> None:
    stage.run(tiny, reported(tiny), published_in(results))
    folder = results / "results/tiny"
    table = pd.read_csv(folder / "summary.csv").set_index(["method", "task", "metric"])
    row = table.loc[(MOCHI, "linear", "top1")]
    assert (row["mean"], row["n"], row["published"], row["published_std"]) == (51.5, 2, 79.0, 0.4)
    assert row["std"] == pytest.approx(4.5**0.5, abs=1e-4)  # sample standard deviation of 50 and 53
    assert row["source"] == "table 1"
    single = table.loc[("random-init", "linear", "top1")]
    assert single["n"] == 1
    assert pd.isna(single["std"])
    assert pd.isna(single["published"]), "numbers of other experiments are not shown"
    text = (folder / "summary.md").read_text()
    assert text.startswith(f"# {tiny.title}\n")
    assert "| method | linear top-1 | knn top-1 | over |" in text
    assert f"| {MOCHI} | 51.5 ± 2.1 (79.0, -27.5) | 51.5 ± 2.1 | 2 seeds |" in text
    assert "| random-init | 10.0 | 10.0 | 1 seed |" in text
    assert "Difference to" not in text, "no baseline"


def compared(tmp_path: Path, **values: dict[int, float]) -> Path:
    """The report of moco-v2 and other rows with these values of top-1; a `_` in a name stands for `-`."""
    rows = {name.replace("_", "-"): own for name, own in values.items()}
    recipe = TINY["methods"][MOCHI]
    methods = {
        name: {**(recipe if name.startswith("mochi") else {}), "seeds": list(own)}
        for name, own in rows.items()
    }
    evaluation = {key: TINY["evaluation"][key] for key in ("image_size", "resize", "knn")}
    experiment = parse_experiment(TINY | {"methods": methods, "evaluation": evaluation}, "x.yaml")
    make_up(experiment, lambda method, seed, task: {"top1": rows[method][seed]}, with_records=False)
    stage.run(experiment, reported(experiment))
    return tmp_path / "results/tiny"


def test_differences_are_paired_and_only_significant_ones_are_bold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = compared(
        tmp_path,
        moco_v2={0: 40.0, 1: 50.0, 2: 60.0},
        mochi_16_24_8={
            0: 41.0,
            1: 51.2,
            2: 60.8,
        },  # higher by 1, 1.2, 0.8: significant although scores vary
        mochi_16_24_8_b={0: 49.0, 1: 50.0, 2: 60.0},  # higher by 9, 0, 0: not significant
        moco_v1={7: 90.0, 0: 41.0},  # one common seed
    )
    table = pd.read_csv(folder / "summary.csv").set_index("method")
    better, undecided, single = table.loc[MOCHI], table.loc[f"{MOCHI}-b"], table.loc["moco-v1"]
    # s = 0.2, t(2) = 4.3027, 0.2 * 4.3027 / sqrt(3) = 0.4968
    found = (better["difference"], better["low"], better["high"], better["pairs"], better["significant"])
    assert found == (1.0, pytest.approx(0.5032, abs=1e-4), pytest.approx(1.4968, abs=1e-4), 3, True)
    assert (undecided["difference"], undecided["significant"]) == (3.0, False)
    assert (single["difference"], single["pairs"]) == (1.0, 1)
    assert pd.isna(single["low"])
    assert pd.isna(table.loc["moco-v2", "difference"])

    text = (folder / "summary.md").read_text()
    assert f"| {MOCHI} | **51.0 ± 9.9** | 3 seeds |" in text
    assert f"| {MOCHI}-b | 53.0 ± 6.1 | 3 seeds |" in text
    assert "| moco-v1 | 65.5 ± 34.6 | 2 seeds |" in text
    assert f"| {MOCHI} | **+1.0 [+0.5, +1.5]** |" in text
    assert f"| {MOCHI}-b | +3.0 [-9.9, +15.9] |" in text
    assert "| moco-v1 | +1.0 (one seed) |" in text
    latex = (folder / "summary.tex").read_text()
    assert rf"{MOCHI} & \textbf{{51.0 $\pm$ 9.9}} (+1.0) \\" in latex
    assert r"moco-v2 & 50.0 $\pm$ 10.0 \\" in latex
    page = (folder / "report.html").read_text()
    assert page.count("<strong>51.0 ± 9.9</strong>") == 1
    assert "+3.0 [-9.9, +15.9]" in page


def test_another_baseline_can_be_set(tiny: Experiment) -> None:
    assert baseline_of(tiny) is None
    assert baseline_of(parse_experiment(TINY | {"baseline": "random-init"}, "x.yaml")) == "random-init"
    with pytest.raises(ConfigError, match=r"x\.yaml: baseline: .*moco"):
        parse_experiment(TINY | {"baseline": "moco"}, "x.yaml")


def test_detection_of_several_encoders(tmp_path: Path) -> None:
    """Each encoder counts by its mean; the two variance components are separate."""
    rows = [
        ("moco-v2", 0, 1.0, 3.0), ("moco-v2", 1, 5.0, 7.0), ("mochi", 0, 2.0, 4.0), ("mochi", 1, 6.0, 8.0),
        ("random-init", 0, 0.0, 1.0),
    ]  # fmt: skip
    scores = pd.DataFrame(
        [
            (method, seed, "detection-few", "AP", str(repeat), value)
            for method, seed, *values in rows
            for repeat, value in enumerate(values)
        ],
        columns=["method", "seed", "task", "metric", "fine_tuning", "value"],
    )
    table = summarize(scores, read_published(published_in(tmp_path), "none"), "moco-v2").set_index("method")
    own, single = table.loc["mochi"], table.loc["random-init"]
    assert (own["mean"], own["n"], own["over"]) == (5.0, 2, "encoders")
    assert own["std"] == pytest.approx(8**0.5, abs=1e-4)
    assert own["std_fine_tuning"] == pytest.approx(2**0.5, abs=1e-4)
    assert own["std_encoder"] == pytest.approx(7**0.5, abs=1e-4)  # 8 minus half of 2
    assert (own["difference"], own["pairs"], own["significant"]) == (1.0, 2, True)
    # With one encoder, each fine-tuning is a pair.
    assert (single["over"], single["n"], single["difference"], single["pairs"]) == (
        "fine-tunings",
        2,
        -1.5,
        2,
    )


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("imagenet100", ["MoCHi table 1", "Classification on frozen features"]),
        ("imagenet1k", ["MoCHi table 2", "MoCHi table 3", "Classification on frozen features"]),
    ],
)
def test_the_papers_tables_without_results(name: str, titles: list[str]) -> None:
    """Cells are empty, next to the published values."""
    experiment = load_experiment(ROOT / f"config/{name}.yaml")
    none = pd.DataFrame(columns=["method", "seed", "task", "metric", "fine_tuning", "value"])
    published = read_published(ROOT / "workflow/published.csv", name)
    grids = layouts(experiment, summarize(none, published, "moco-v2"))
    assert [grid.title for grid in grids] == titles[:-1]
    scores = pd.DataFrame(
        [("moco-v2", 0, "linear", "top1", "", 78.5), ("moco-v2", 0, "knn", "top1", "", 60.0)],
        columns=none.columns,
    )
    grids = layouts(experiment, summarize(scores, published, "moco-v2"))
    assert [grid.title for grid in grids] == titles
    first = grids[0]
    assert [method for method, _, _ in first.rows] == [
        method for method in experiment.methods if method in set(published["method"])
    ]
    if name == "imagenet1k":
        assert first.columns == [
            "linear top-1",
            *(f"detection-voc0712 {each}" for each in ("AP50", "AP", "AP75")),
        ]
        assert grids[1].columns == ["AP", "AP50", "AP75", "mask_AP", "mask_AP50", "mask_AP75"]
        row = "| moco-v2 | 78.5 (67.9, +10.6) | (82.5) | (56.8) | (63.3) | 1 seed |"
        assert row in markdown(experiment, grids)
    else:
        assert "| moco-v2 | 78.5 (78.0, +0.5) | 1 seed |" in markdown(experiment, grids)
        assert "| mochi-1024-1024-128 | (79.0) |  |" in markdown(experiment, grids)


def test_latex_escapes() -> None:
    assert _escaped("50% of a_b & {c} \\") == r"50\% of a\_b \& \{c\} \textbackslash{}"


def test_every_published_number_belongs_to_a_row_of_a_shipped_experiment() -> None:
    published = pd.read_csv(ROOT / "workflow/published.csv")
    assert published["source"].notna().all()
    for name, rows in published.groupby("experiment"):
        methods = load_experiment(ROOT / "config" / f"{name}.yaml").methods
        assert set(rows["method"]) <= set(methods)


def test_a_limit_that_rounds_to_zero_keeps_its_sign() -> None:
    assert [signed(value) for value in (0.04, -0.04, 0.0, 1.25)] == ["+0.0", "-0.0", "0.0", "+1.2"]
