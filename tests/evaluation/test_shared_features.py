"""Features are computed once for all evaluations of an encoder; their files are removed after the last
one.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mochi.config import Experiment, parse_experiment, probe_run
from mochi.encoders.resnet import ResNet
from mochi.evaluation import stage
from mochi.evaluation.feature_files import FeatureFile
from mochi.provenance.wanted import Result, same_features
from mochi.runtime.locks import locked
from tests.evaluation.runs import evaluate, result_in
from tests.processes import context
from tests.tiny import TINY, changed

TASKS = {
    "linear": TINY["evaluation"]["linear"],
    "knn": {"k": 5, "temperature": 0.07},
    "knn-1": {"task": "knn", "k": 1, "temperature": 1.0},
    "few": {"task": "few_label", "images_per_class": 2, "samples": 1},
}
SIZE = {"image_size": 16, "resize": 16}
FILES = Path("work/tiny/random-init/seed0/.features-photo-patches-tiny-16-16")


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.chdir(tmp_path)
    return parse_experiment(changed("evaluation", SIZE | TASKS), "tiny")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all batches that reach an encoder."""
    sizes: list[int] = []
    forward = ResNet.forward

    def counted(self: ResNet, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(ResNet, "forward", counted)
    return sizes


def result_of(task: str, experiment: Experiment, encoder: Path, data: Path) -> Result:
    return result_in(Path("results", task), experiment, task, encoder, data)


def run(task: str, experiment: Experiment, encoder: Path, data: Path) -> bytes:
    """Evaluate as the command does; returns the bytes of metrics.json."""
    torch.set_num_threads(1)
    wanted = same_features(experiment, "random-init", 0, task)
    others = [result_of(other.folder.name, experiment, encoder, data) for other in wanted]
    result = result_of(task, experiment, encoder, data)
    stage.run(probe_run(experiment, "random-init", 0, task), result, Path("work", task), others=others)
    return (result.folder / "metrics.json").read_bytes()


def test_images_are_encoded_once_and_metrics_equal_separate_runs(
    experiment: Experiment, encoder_file: Path, tiny_data: Path, encoded: list[int]
) -> None:
    alone = {}
    for task in TASKS:
        evaluate(experiment, task, encoder_file, tiny_data, Path("alone", task))
        alone[task] = Path("alone", task, "metrics.json").read_bytes()
    assert sum(encoded) == len(TASKS) * (160 + 64)
    encoded.clear()
    for index, task in enumerate(TASKS):
        assert run(task, experiment, encoder_file, tiny_data) == alone[task]
        assert FILES.exists() is (index < len(TASKS) - 1)
    assert sum(encoded) == 160 + 64
    run("knn", experiment, encoder_file, tiny_data)
    assert not FILES.exists(), "no other evaluation needs them"


def test_other_images_and_sizes_share_nothing(experiment: Experiment) -> None:
    other = TINY["dataset"] | {"name": "other"}
    tasks = TASKS | {"sized": TASKS["knn"] | {"task": "knn", "resize": 17}}
    tasks |= {"moved": TASKS["knn"] | {"task": "knn", "dataset": other}}
    extended = parse_experiment(changed("evaluation", SIZE | tasks), "tiny")
    assert {each.folder.name for each in same_features(extended, "random-init", 0, "knn")} == {
        "linear", "knn-1", "few"
    }  # fmt: skip
    assert same_features(extended, "random-init", 0, "sized") == []
    assert same_features(extended, "random-init", 0, "moved") == []


def test_another_encoder_has_separate_features(
    experiment: Experiment, encoder_file: Path, tiny_data: Path, tmp_path: Path, encoded: list[int]
) -> None:
    run("knn", experiment, encoder_file, tiny_data)
    before = set(FILES.iterdir())
    changed_file = tmp_path / "changed.safetensors"
    changed_file.write_bytes(encoder_file.read_bytes()[:-4] + b"\x00\x00\x00\x00")
    encoded.clear()
    run("knn-1", experiment, changed_file, tiny_data)
    assert sum(encoded) == 160 + 64
    assert len(set(FILES.iterdir())) == 2, "those of the other encoder are removed"
    assert not set(FILES.iterdir()) & before


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", None])
def test_damaged_files_are_not_used(content: bytes | None, tmp_path: Path) -> None:
    file = FeatureFile(tmp_path / "key-train.npy", is_kept=True)
    values = torch.arange(6.0).view(3, 2)
    file.write(values)
    stored = file.read((3, 2))
    assert stored is not None
    assert torch.equal(stored, values)
    stored.zero_()
    again = file.read((3, 2))
    assert again is not None
    assert torch.equal(again, values), "tasks change their features, not the file"
    if content is None:
        assert file.read((4, 2)) is None
    else:
        file.path.write_bytes(content)
        assert file.read((3, 2)) is None


def test_with_a_full_disk_features_are_computed_again(
    experiment: Experiment, encoder_file: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mochi.evaluation.feature_files.np.save", full)
        found = run("knn", experiment, encoder_file, tiny_data)
    assert "No space left on device" in caplog.text
    assert not list(FILES.iterdir())
    assert run("knn", experiment, encoder_file, tiny_data) == found


def test_evaluations_at_the_same_time_wait_for_each_other(
    experiment: Experiment, encoder_file: Path, tiny_data: Path
) -> None:
    """Two processes need the features while a third one holds their lock."""
    forks = context()
    FILES.mkdir(parents=True)
    with locked(FILES):
        processes = [
            forks.Process(target=run, args=(task, experiment, encoder_file, tiny_data))
            for task in ("knn", "few")
        ]
        for process in processes:
            process.start()
        processes[0].join(3)
        assert all(process.is_alive() for process in processes)
        assert not list(FILES.iterdir())
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(FILES.iterdir())) == 2, "one file for each split, for the remaining evaluations"
    done = [result_of(task, experiment, encoder_file, tiny_data).why_stale() for task in ("knn", "few")]
    assert done == [None, None]


def test_features_of_a_killed_evaluation_are_used_or_ignored(
    experiment: Experiment, encoder_file: Path, tiny_data: Path
) -> None:
    """SIGKILL while features are computed, written or read."""
    forks = context()
    tasks = ["knn", "knn-1", "few", "linear"]
    for task in tasks:
        evaluate(experiment, task, encoder_file, tiny_data, Path("alone", task))
    moments = random.Random(0)
    for task in tasks:
        for _ in range(2):
            process = forks.Process(target=run, args=(task, experiment, encoder_file, tiny_data))
            process.start()
            process.join(moments.uniform(0.05, 0.6))
            process.kill()
            process.join()
        assert (
            run(task, experiment, encoder_file, tiny_data)
            == Path("alone", task, "metrics.json").read_bytes()
        )
    assert not FILES.exists()
    assert not list(Path("work").rglob(".*.lock"))


def test_a_stale_result_computes_features_again(
    experiment: Experiment, encoder_file: Path, tiny_data: Path
) -> None:
    result = result_of("knn", experiment, encoder_file, tiny_data)
    evaluate(experiment, "knn", encoder_file, tiny_data, result.folder)
    others = [result, replace(result, settings={"k": 7})]
    few = result_of("few", experiment, encoder_file, tiny_data)
    probe = probe_run(experiment, "random-init", 0, "few")
    stage.run(probe, few, Path("work/few"), others=others)
    assert FILES.exists()
    stage.run(probe, few, Path("work/few"), others=others[:1])
    assert not FILES.exists()
