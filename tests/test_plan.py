"""The arithmetic of a plan compared with cases worked out by hand."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mochi import plan as planning
from mochi.analysis import stage as analysis
from mochi.config import Experiment, ProbeRun, parse_experiment
from mochi.detection.training import FineTuning
from mochi.plan import Seconds, disk_needed, encoder_bytes, makespan
from mochi.runtime.precision import make_deterministic
from tests.detection.conftest import voc_image, voc_set  # noqa: F401 - fixtures
from tests.detection.sets import detection, small_set
from tests.simulated_gpu import simulated_gpu
from tests.tiny import TINY, changed


def test_a_range_is_shown_in_a_suitable_unit() -> None:
    assert str(Seconds(3600, 7200)) == "1 to 2 h"
    assert str(Seconds(61, 61)) == "1 min"
    assert str(Seconds(0.5, 40)) == "0.5 to 40 s"
    assert str(Seconds(36000, 72000)) == "10 to 20 h"


def test_parallel_jobs_take_their_mean_load_or_the_longest_job() -> None:
    one = [Seconds(10, 20)] * 4
    assert makespan(one, 1) == (40, 80)
    assert makespan(one, 2) == (20, 40 * 1.25)
    assert makespan([Seconds(30, 30), Seconds(1, 1)], 2).low == 30
    assert makespan([], 2) == (0, 0)


@pytest.mark.parametrize("lengths", [(3, 5, 7, 2), (1, 1, 9), (4, 4)])
def test_no_schedule_is_shorter_than_the_lower_bound(lengths: tuple[int, ...]) -> None:
    best = min(
        max(
            sum(length for length, worker in zip(lengths, workers, strict=True) if worker == p)
            for p in range(2)
        )
        for workers in itertools.product(range(2), repeat=len(lengths))
    )
    assert makespan([Seconds(length, length) for length in lengths], 2).low <= best


def test_each_data_set_and_image_size_is_measured(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of 32 px take longer than those of 16 px, and another data set has images of its own."""
    for name in (tiny_data.name, "other"):
        shutil.copytree(tiny_data, tmp_path / "data" / name)
    monkeypatch.chdir(tmp_path)
    knn = TINY["evaluation"]["knn"] | {"task": "knn"}
    other = {**TINY["dataset"], "name": "other"}
    large = {**knn, "image_size": 32, "resize": 32}
    missing = {**knn, "dataset": {**other, "name": "missing"}}
    more = {"large": large, "large-2": large, "moved": {**knn, "dataset": other}, "missing": missing}
    experiment = parse_experiment(changed("evaluation", {**TINY["evaluation"], **more}), "tiny")
    measured = []

    def seconds(run: ProbeRun, *_: object) -> Seconds:
        measured.append((run.dataset.name, run.image_size))
        return Seconds(run.image_size, run.image_size)

    monkeypatch.setattr(planning, "_seconds_per_image", seconds)
    monkeypatch.setattr(planning, "prepared", lambda *_: SimpleNamespace(why_stale=lambda: None))
    monkeypatch.setattr(planning, "seconds_per_step", lambda *_: Seconds(1, 1))
    lines = dict(line.split(": ", 1) for line in planning.plan(experiment, measure=True) if ": " in line)
    assert measured == [(tiny_data.name, 16), (tiny_data.name, 32), ("other", 16)]
    assert lines["linear"] == f"3 evaluations of 224 encoded images each, {Seconds(16, 16).times(224)} each"
    assert lines["knn"] == "3 evaluations on features that another evaluation computes, 0 s each"
    assert lines["large"] == f"3 evaluations of 224 encoded images each, {Seconds(32, 32).times(224)} each"
    assert lines["large-2"].startswith("3 evaluations on features")
    assert lines["moved"] == lines["linear"]
    assert lines["missing"].startswith(
        "3 evaluations; their hours are not included: data set missing is not"
    )


def test_analyses_are_counted(
    tiny: Experiment, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 encoders: 64 validation images are encoded and drawn, or those of train if there is no val."""
    shutil.copytree(tiny_data, tmp_path / "data" / tiny_data.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "_seconds_per_image", lambda *_: Seconds(1000, 2000))
    monkeypatch.setattr(planning, "prepared", lambda *_: SimpleNamespace(why_stale=lambda: None))
    monkeypatch.setattr(planning, "seconds_per_step", lambda *_: Seconds(0, 0))
    without = parse_experiment(changed("evaluation", {"image_size": 16, "resize": 16}), "tiny")
    lines = list(planning.plan(without, measure=True))
    one = Seconds(64 * 1000 + 1, 64 * 2000 + 4)
    assert f"analysis: 3 encoders, 64 encoded images each, {one} each" in lines
    # Three analyses and two trainings.
    assert f"total, one job at a time: {one.times(3).plus(planning._START.times(5))}" in lines
    assert "analysis: 3 encoders, 64 encoded images each" in list(planning.plan(tiny, measure=False))
    monkeypatch.setattr(analysis, "MAX_IMAGES", 50)
    assert "analysis: 3 encoders, 50 encoded images each" in list(planning.plan(tiny, measure=False))
    manifest = tmp_path / "data" / tiny_data.name / "manifest.json"
    content = json.loads(manifest.read_text())
    content["splits"]["val"]["count"] = 0
    manifest.write_text(json.dumps(content))
    monkeypatch.setattr(analysis, "MAX_IMAGES", 10_000)
    assert "analysis: 3 encoders, 160 encoded images each" in list(planning.plan(tiny, measure=False))


def test_a_detection_iteration_is_one_step_on_a_gpu(
    voc_set: Path,  # noqa: F811
    tiny: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The log of a fine-tuning has a row for every 20th step on a GPU, because reading a loss waits."""
    chosen = small_set(voc_set, training={"iterations": 100, "lr_drops": []})
    run, _ = detection(tiny, chosen, tmp_path / "unused", tmp_path / "out")
    looks, kinds = itertools.count(), set()
    monkeypatch.setattr(planning, "time", SimpleNamespace(monotonic=lambda: float(next(looks))))
    losses = FineTuning._losses

    def watched(*arguments: Any) -> Any:
        kinds.add(torch.are_deterministic_algorithms_enabled())
        return losses(*arguments)

    monkeypatch.setattr(FineTuning, "_losses", watched)
    threads: list[int] = []

    def no_workers(number: int) -> int:
        threads.append(number)
        return 0

    monkeypatch.setattr(planning, "workers_of", no_workers)
    with simulated_gpu():
        make_deterministic()
        machine = planning.Machine(torch.device("cuda", 0), threads=5, at_once=1)
        measured, num_test = planning.seconds_per_iteration(run, machine, 3.0)
    assert measured.low == 1
    assert num_test == 5
    assert threads == [5]
    assert kinds == {False}  # a deterministic RoIAlign needs too much memory


def test_disk_is_for_encoders_that_are_missing_and_checkpoints_of_runs_at_once(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    size, queue = encoder_bytes(tiny.encoder), 4 * 100 * 16
    results, work = Path("results/tiny"), Path("work/tiny")
    assert disk_needed(tiny, 2) == {results: 3 * size, work: 2 * 3 * (3 * size + queue)}
    done = results / "encoders/mochi-16-24-8/seed1/encoder.safetensors"
    done.parent.mkdir(parents=True)
    done.touch()
    assert disk_needed(tiny, 1) == {results: 2 * size, work: 3 * (3 * size + queue)}
