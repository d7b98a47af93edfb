"""Figures show all numbers with their labels."""

import itertools
import json
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mochi.config import Experiment, parse_experiment
from mochi.provenance.wanted import reported
from mochi.report import stage
from mochi.report.analyses import Chart, Series
from mochi.report.figures import _marks, draw
from tests.detection.sets import small_set
from tests.report.conftest import Report
from tests.report.made_up import fine_tunings, is_detection, make_up, top1_of
from tests.tiny import MOCHI, TINY


def means(axes: Axes) -> list[list[float]]:
    """(x, y) of all points with error bars."""
    lines = [
        container.lines[0] for container in axes.containers if isinstance(container, ErrorbarContainer)
    ]
    return [[float(line.get_xdata()[0]), float(line.get_ydata()[0])] for line in lines]  # type: ignore[index]


def curve(line: Line2D) -> dict[float, float]:
    return dict(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))  # type: ignore[arg-type]


def test_accuracy(report: Report) -> None:
    """The mean of each row as a point, with its standard deviation as an error bar and as text."""
    linear, knn = report.figures["accuracy"].axes
    assert [linear.get_xlabel(), knn.get_xlabel()] == ["linear top-1 (%)", "knn top-1 (%)"]
    assert [text.get_text() for text in linear.get_yticklabels()] == ["random-init", MOCHI]
    for axes in (linear, knn):
        assert means(axes) == [[10.0, 0.0], [51.5, 1.0]]
        assert [text.get_text() for text in axes.texts] == ["10.0", "51.5 ± 2.1"]


def test_loss(report: Report) -> None:
    """The mean over seeds, a band of the standard deviation, and the chance level."""
    (axes,) = report.figures["loss"].axes
    mean, chance = axes.lines
    assert curve(mean) == {0.0: 4.5, 1.0: 3.5}
    assert (curve(chance), chance.get_linestyle()) == ({0.0: 4.6, 1.0: 4.6}, ":")
    (band,) = axes.collections
    bounds = band.get_datalim(axes.transData)
    assert (bounds.y0, bounds.y1) == pytest.approx((3.5 - 0.5**0.5, 4.5 + 0.5**0.5))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "loss (nats)")
    (legend,) = report.figures["loss"].legends
    assert [text.get_text() for text in legend.get_texts()] == [MOCHI, f"{MOCHI}, chance"]
    assert legend.get_title().get_text() == "band: standard deviation over up to 2 seeds"


def test_proxy_task(report: Report) -> None:
    """With and without synthetic negatives."""
    (axes,) = report.figures["proxy-task"].axes
    alone, with_synthetics = axes.lines
    assert (curve(alone), alone.get_linestyle()) == ({0.0: 20.0, 1.0: 20.0}, "-")
    assert (curve(with_synthetics), with_synthetics.get_linestyle()) == ({0.0: 10.0, 1.0: 10.0}, "--")
    assert axes.get_ylabel() == "accuracy (%)"


def test_matching(report: Report) -> None:
    (axes,) = report.figures["matching"].axes
    assert [curve(line) for line in axes.lines] == [
        pytest.approx({float(rank): 0.1 / rank for rank in range(1, 10)})
    ] * 2
    assert axes.get_title() == MOCHI
    assert [line.get_label() for line in axes.lines] == ["epoch 0", "epoch 1"]
    assert len({line.get_linestyle() for line in axes.lines}) == 2, "different in grey"
    assert axes.get_yscale() == "log"


def test_false_negatives_and_parents(report: Report) -> None:
    (hardest,) = report.figures["false-negatives"].axes
    assert [curve(line) for line in hardest.lines] == [pytest.approx({0.0: 6.0, 1.0: 6.0})]
    (parents,) = report.figures["false-parents"].axes
    assert [(line.get_linestyle(), curve(line)) for line in parents.lines] == [
        ("-", pytest.approx({0.0: 11.0, 1.0: 11.0})),
        ("--", pytest.approx({0.0: 1.0, 1.0: 1.0})),
    ]


def test_alignment_and_uniformity(report: Report) -> None:
    pooled, embedded = report.figures["alignment-uniformity"].axes
    assert [pooled.get_title(), embedded.get_title()] == ["pooled features", "embedded features"]
    assert means(pooled) == [[-1.0, 0.5], [-1.5, 1.0]]
    assert means(embedded) == [[-0.75, 0.5]], "random-init has no head"


def test_a_row_has_the_same_colour_and_marker_in_every_figure(report: Report) -> None:
    found = {
        (line.get_color(), line.get_marker())
        for name in ("loss", "proxy-task", "false-negatives")
        for line in report.figures[name].axes[0].lines
        if line.get_linestyle() != ":"
    }
    assert len(found) == 1


def test_gain_and_class_oracle(
    tmp_path: Path, saved_figures: dict[str, Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grid of (N, s, s') minus the baseline, paired over seeds; and the class oracle."""
    monkeypatch.chdir(tmp_path)
    recipe = dict(TINY["methods"][MOCHI], seeds=[0, 1])
    mixing = dict(recipe["negatives"], num_query_synthetics=0)
    content = TINY | {
        "methods": {
            "moco-v2": {"seeds": [0, 1]},
            "moco-v2-oracle": {"masks": ["class_oracle"]},
            MOCHI: recipe,
            "mochi-16-24-0": dict(recipe, negatives=mixing),
        }
    }
    experiment = parse_experiment(content, "x.yaml")
    values = {
        "moco-v2": (40.0, 42.0),
        "moco-v2-oracle": (50.0,),
        MOCHI: (41.0, 45.0),
        "mochi-16-24-0": (40.0, 40.0),
    }
    make_up(
        experiment, lambda method, seed, task: {"top1": values[method][seed], "k": 5}, with_records=False
    )
    stage.run(experiment, reported(experiment))
    (gain,) = saved_figures["gain"].axes
    assert gain.get_title() == "N = 16"
    assert [text.get_text() for text in gain.get_yticklabels()] == ["24, 0", "24, 8"]
    assert sorted(means(gain)) == [[-1.0, 0.0], [2.0, 1.0]]
    assert sorted(text.get_text() for text in gain.texts) == [
        "-1.0 ± 12.7",
        "2.0 ± 12.7",
    ]  # t(1) = 12.7, s = sqrt 2
    assert gain.get_xlabel() == "gain over moco-v2 (points)"
    (oracle,) = saved_figures["class-oracle"].axes
    assert [text.get_text() for text in oracle.get_yticklabels()] == ["moco-v2", "moco-v2-oracle"]
    assert means(oracle) == [[41.0, 0.0], [50.0, 1.0]]
    content = json.loads(Path("results/tiny/figures/gain.json").read_text())
    assert [series["method"] for series in content["series"]] == [MOCHI, "mochi-16-24-0"]


def test_panels_with_a_reference_share_the_axis_that_it_is_on() -> None:
    series = [
        Series(f"N = {n}", [gain], [0.0], style="", panel=f"N = {n}")
        for n, gain in ((64, -0.6), (256, 5.0))
    ]
    chart = Chart("gain", "", "", "gain", "s, s'", series, categories=["64, 64"], reference=0.0)
    first, second = draw(chart, ["N = 64", "N = 256"]).axes
    assert first.get_xlim() == second.get_xlim()
    for axes in (first, second):
        assert [0.0, 0.0] in [list(line.get_xdata()) for line in axes.lines]
        low, high = axes.get_xlim()
        assert low < -0.6 < 5 < high


def labels(figure: Figure) -> list[list[tuple[str, float, float]]]:
    """Of each x axis, the labels in view: text, left and right end in pixels."""
    FigureCanvasAgg(figure).draw()
    found = []
    for axes in figure.axes:
        low, high = sorted(axes.get_xlim())
        ticks = [*axes.xaxis.get_major_ticks(), *axes.xaxis.get_minor_ticks()]
        shown = [each.label1 for each in ticks if each.label1.get_text() and low <= each.get_loc() <= high]
        boxes = [(each.get_text(), each.get_window_extent()) for each in shown]
        found.append(sorted(((text, box.x0, box.x1) for text, box in boxes), key=lambda label: label[1]))
    return found


@pytest.mark.parametrize("num", [1, 2, 4, 200])
def test_epochs_are_whole(num: int) -> None:
    epochs = [float(epoch) for epoch in range(num)]
    chart = Chart("loss", "", "", "epoch", "loss (nats)", [Series("a", epochs, epochs)])
    (shown,) = labels(draw(chart, ["a"]))
    texts = [text for text, _, _ in shown]
    assert texts == [str(int(text)) for text in texts]
    assert texts[0] == "0"
    assert len(texts) >= min(num, 3)


@pytest.mark.parametrize("panels", [1, 3])
@pytest.mark.parametrize(
    ("x", "log"),
    [
        ([-2.6925, -2.6921], False),
        ([-0.1234, 0.8], False),
        ([99.98, 100.0], False),
        ([1.0, 9.0], True),
        ([1.0, 64.0], True),
    ],
)
def test_labels_of_an_axis_do_not_touch(x: list[float], log: bool, panels: int) -> None:
    series = [
        Series("a", x, [0.5, 0.1], style="-" if log else "", panel=f"panel {panel}")
        for panel in range(panels)
    ]
    for shown in labels(draw(Chart("c", "", "", "x", "y", series, log=log), ["a"])):
        assert len(shown) >= 2
        for (_, _, end), (_, start, _) in itertools.pairwise(shown):
            assert start - end > 4, shown


def test_many_points_have_few_markers() -> None:
    for num, log in ((1, False), (10, False), (200, False), (1024, True)):
        for index in range(9):
            marks = _marks(num, index, log=log)
            assert 1 <= len(marks) <= 8
            assert set(marks) <= set(range(num))


def test_empty_figures_are_not_written(
    tmp_path: Path, saved_figures: dict[str, Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    untrained = TINY | {"methods": {"random-init": {"objective": "none"}}}
    for name, content, expected in (
        ("one", untrained, {"accuracy", "alignment-uniformity"}),
        ("two", untrained | {"evaluation": {"image_size": 16, "resize": 16}}, set()),
    ):
        experiment = parse_experiment(content | {"name": name}, "x.yaml")
        make_up(experiment, top1_of({("random-init", 0): 10.0}))
        saved_figures.clear()
        stage.run(experiment, reported(experiment))
        assert set(saved_figures) == expected
        pictures = {path.stem for path in Path("results", name, "figures").glob("*.svg")}
        assert pictures == expected


def test_rows_without_a_detection_set_stay_empty(
    tiny: Experiment, tmp_path: Path, saved_figures: dict[str, Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a set of a single row, the other row has a label but no point. Each fine-tuning is a point."""
    monkeypatch.chdir(tmp_path)
    few = small_set(Path("few/VOC")).model_copy(update={"methods": ["random-init"]})
    sets = {"few": few, "many": small_set(Path("many/VOC"))}
    evaluation = tiny.evaluation.model_copy(update={"linear": None, "knn": None, "detection": sets})
    experiment = tiny.model_copy(update={"evaluation": evaluation})
    make_up(experiment, lambda method, seed, task: fine_tunings(40.0 + seed, 42.0 + seed))
    stage.run(experiment, reported(experiment))
    few_axes, many_axes = saved_figures["accuracy"].axes
    assert few_axes.get_xlabel() == "detection-few AP50 (%)"
    assert many_axes.get_xlabel() == "detection-many AP50 (%)"
    assert [text.get_text() for text in few_axes.get_yticklabels()] == ["random-init", MOCHI]
    assert means(few_axes) == [[41.0, 0.0]]
    assert [text.get_text() for text in few_axes.texts] == ["41.0 ± 1.4"]
    assert means(many_axes) == [[41.0, 0.0], [41.5, 1.0]]
    (precision,) = saved_figures["precision-recall-few"].axes
    assert [curve(line) for line in precision.lines] == [{0.0: 0.75, 1.0: 0.25}], "the mean over classes"


def test_the_accuracy_figure_shows_probes_rather_than_detection(
    tiny: Experiment, tmp_path: Path, saved_figures: dict[str, Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Top-1 and AP50 have no common axis; detection has its own tables and pictures."""
    monkeypatch.chdir(tmp_path)
    evaluation = tiny.evaluation.model_copy(update={"detection": {"few": small_set(Path("few/VOC"))}})
    experiment = tiny.model_copy(update={"evaluation": evaluation})
    make_up(
        experiment,
        lambda method, seed, task: fine_tunings(40.0) if is_detection(task) else {"top1": 1.0 + seed},
    )
    stage.run(experiment, reported(experiment))
    assert [axes.get_xlabel() for axes in saved_figures["accuracy"].axes] == [
        "linear top-1 (%)",
        "knn top-1 (%)",
    ]
