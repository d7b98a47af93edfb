"""Figures show the numbers, all of them, with their names."""

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mochi.config import Experiment, parse_experiment
from mochi.provenance.wanted import reported
from mochi.report import stage
from tests.detection.sets import small_set
from tests.report.made_up import fine_tunings, is_detection, make_up, top1_of
from tests.tiny import MOCHI, TINY


def points(axes: Axes) -> list[list[float]]:
    """(x, y) of all scattered points."""
    return [list(map(float, point)) for dots in axes.collections for point in dots.get_offsets()]  # type: ignore[union-attr]


def curve(line: Line2D) -> dict[float, float]:
    return dict(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))  # type: ignore[arg-type]


def legend(axes: Axes) -> list[str]:
    found = axes.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def test_accuracy(tiny: Experiment, results: Path, drawn: dict[str, Figure]) -> None:
    """Each seed a point, the mean a stroke with its standard deviation in words."""
    stage.run(tiny, reported(tiny))
    linear, knn = drawn["accuracy"].axes
    assert [linear.get_xlabel(), knn.get_xlabel()] == ["linear top-1 (%)", "knn top-1 (%)"]
    assert [text.get_text() for text in linear.get_yticklabels()] == ["random-init", MOCHI]
    for axes in (linear, knn):
        assert points(axes) == [[10.0, 0.0], [50.0, 1.0], [53.0, 1.0]]
        assert [line.get_xdata()[0] for line in axes.lines] == [10.0, 51.5]  # type: ignore[index]
        assert [text.get_text() for text in axes.texts] == ["10.0", "51.5 ± 2.1"]


def test_training(tiny: Experiment, results: Path, drawn: dict[str, Figure]) -> None:
    """The mean over seeds, the band of all seeds, the chance level; the proxy task with and without
    synthetic negatives."""
    stage.run(tiny, reported(tiny))
    loss, accuracy = drawn["training"].axes
    mean, chance = loss.lines
    assert curve(mean) == {0.0: 4.5, 1.0: 3.5}
    assert (curve(chance), chance.get_linestyle()) == ({0.0: 4.6, 1.0: 4.6}, ":")
    (band,) = loss.collections
    bounds = band.get_datalim(loss.transData)
    assert (bounds.y0, bounds.y1) == (3.0, 5.0)
    assert legend(loss) == [MOCHI]
    alone, with_synthetics = accuracy.lines
    assert curve(alone) == {0.0: 20.0, 1.0: 20.0}
    assert (curve(with_synthetics), with_synthetics.get_linestyle()) == ({0.0: 10.0, 1.0: 10.0}, "--")
    assert loss.get_ylabel().startswith("loss (nats)")
    assert accuracy.get_ylabel().startswith("proxy task accuracy (%)")


def test_negatives(tiny: Experiment, results: Path, drawn: dict[str, Figure]) -> None:
    stage.run(tiny, reported(tiny))
    matching, false = drawn["negatives"].axes
    assert [curve(line) for line in matching.lines] == [
        pytest.approx({float(rank): 0.1 / rank for rank in range(1, 10)})
    ] * 2
    assert legend(matching) == [MOCHI], "each method once, whatever the number of epochs"
    first, last = (line.get_alpha() for line in matching.lines)
    assert first is not None
    assert last is not None
    assert first < last, "later epochs are darker"
    assert [(line.get_linestyle(), curve(line)) for line in false.lines] == [
        ("-", pytest.approx({0.0: 6.0, 1.0: 6.0})),
        ("--", pytest.approx({0.0: 11.0, 1.0: 11.0})),
        (":", pytest.approx({0.0: 1.0, 1.0: 1.0})),
    ]
    assert len(legend(false)) == 3


def test_a_figure_that_would_be_empty_is_not_made(
    tmp_path: Path, drawn: dict[str, Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    untrained = TINY | {"methods": {"random-init": {"objective": "none"}}}
    for name, content, expected in (
        ("one", untrained, {"accuracy"}),
        ("two", untrained | {"evaluation": {"image_size": 16, "resize": 16}}, set()),
    ):
        experiment = parse_experiment(content | {"name": name}, "x.yaml")
        make_up(experiment, top1_of({("random-init", 0): 10.0}))
        drawn.clear()
        stage.run(experiment, reported(experiment))
        assert set(drawn) == expected
        pictures = {path.stem for path in Path("results", name).glob("*.svg")}
        assert pictures == expected


def test_rows_without_a_detection_set_stay_empty(
    tiny: Experiment, tmp_path: Path, drawn: dict[str, Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set for one row only: the other keeps its place, without a number. Each fine-tuning is a point."""
    monkeypatch.chdir(tmp_path)
    few = small_set(Path("few/VOC")).model_copy(update={"methods": ["random-init"]})
    sets = {"few": few, "many": small_set(Path("many/VOC"))}
    evaluation = tiny.evaluation.model_copy(update={"linear": None, "knn": None, "detection": sets})
    experiment = tiny.model_copy(update={"evaluation": evaluation})
    make_up(experiment, lambda method, seed, task: fine_tunings(40.0 + seed, 42.0 + seed))
    stage.run(experiment, reported(experiment))
    few_axes, many_axes = drawn["accuracy"].axes
    assert few_axes.get_xlabel() == "detection-few AP50 (%)"
    assert many_axes.get_xlabel() == "detection-many AP50 (%)"
    assert [text.get_text() for text in few_axes.get_yticklabels()] == ["random-init", MOCHI]
    assert points(few_axes) == [[40.0, 0.0], [42.0, 0.0]]
    assert [text.get_text() for text in few_axes.texts] == ["41.0 ± 1.4"]
    assert points(many_axes)[2:] == [[40.0, 1.0], [42.0, 1.0], [41.0, 1.0], [43.0, 1.0]]


def test_a_probe_comes_before_detection(
    tiny: Experiment, tmp_path: Path, drawn: dict[str, Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Percent of top-1 and of AP50 share no axis; detection has tables and pictures of its own."""
    monkeypatch.chdir(tmp_path)
    evaluation = tiny.evaluation.model_copy(update={"detection": {"few": small_set(Path("few/VOC"))}})
    experiment = tiny.model_copy(update={"evaluation": evaluation})
    make_up(
        experiment,
        lambda method, seed, task: fine_tunings(40.0) if is_detection(task) else {"top1": 1.0 + seed},
    )
    stage.run(experiment, reported(experiment))
    assert [axes.get_xlabel() for axes in drawn["accuracy"].axes] == ["linear top-1 (%)", "knn top-1 (%)"]
