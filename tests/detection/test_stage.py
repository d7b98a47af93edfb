"""The whole stage on a few images: what it writes, that a killed run ends with the same numbers, and
that the learning rate is not chosen on test images.
"""

import dataclasses
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mochi import encoders
from mochi.config import DetectionRun, DetectionSet, Experiment
from mochi.detection import scenes, stage
from mochi.detection.annotations import AnnotatedImage, AnnotationError, Annotations, split_off
from mochi.detection.sets import read_splits
from mochi.detection.training import FineTuning
from mochi.encoders.files import save_encoder
from mochi.errors import UserError
from mochi.provenance.wanted import RECORD, Result
from mochi.runtime.monitoring import NonFiniteError
from mochi.runtime.seeding import numpy_generator
from mochi.storage import atomic
from mochi.storage.atomic import StorageError
from mochi.storage.checkpoint import CheckpointError
from tests import full_disk
from tests.detection.sets import detection, small_set
from tests.processes import run_ranks


@pytest.fixture
def weights(tiny: Experiment, tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_encoder(path, encoders.build(tiny.encoder, seed=0))
    return path


StageArguments = tuple[DetectionRun, Result]


@pytest.fixture
def stage_arguments(
    tiny: Experiment, voc_set: Path, weights: Path, tmp_path: Path
) -> Callable[..., StageArguments]:
    """Arguments of the stage for a set on `voc_set` with a changed `training` section."""

    def stage_arguments(folder: str = "out", **training: Any) -> StageArguments:
        """Arguments of the stage for a set on `voc_set` with a changed `training` section."""
        return detection(tiny, small_set(voc_set, training=training), weights, tmp_path / folder)

    return stage_arguments


def metrics(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "metrics.json").read_text())
    return content


def test_what_the_stage_writes(stage_arguments: Callable[..., StageArguments], tmp_path: Path) -> None:
    stage.run(*stage_arguments(seeds=[0, 4]), tmp_path / "work")
    written = metrics(tmp_path / "out")
    singles = written["fine_tunings"]
    assert isinstance(singles, dict)
    assert list(singles) == ["0", "4"]
    for name in ("AP", "AP50", "AP75", "all_point_AP50", "coco_AP50"):
        values = [single[name] for single in singles.values()]
        assert written[name] == pytest.approx(np.mean(values))
    assert written["AP50_std"] == pytest.approx(np.std([s["AP50"] for s in singles.values()], ddof=1))
    assert (written["mode"], written["interpolation"], written["lr"]) == ("finetune", "11-point", 0.02)
    assert written["num_fine_tunings"] == 2
    checksums = written["checksums"]
    assert isinstance(checksums, dict)
    assert checksums["conv1"]["encoder"] == checksums["conv1"]["detector"]
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["stage"] == "detect"
    assert provenance["annotations"]["train"]["classes"] == {"square": 5, "bar": 5}
    for name in ("detections.png", "precision_recall.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    lines = (tmp_path / "out" / "precision_recall.csv").read_text().splitlines()
    assert lines[0] == "class,recall,precision"
    assert len(lines) == 1 + 101  # of squares; test has no bar
    assert list((tmp_path / "work").iterdir()) == []


def test_separate_jobs_equal_one_job(
    tiny: Experiment, voc_set: Path, weights: Path, tmp_path: Path
) -> None:
    """A search and two fine-tunings as separate jobs, compared with one job that does everything."""
    training = {"seeds": [3, 0], "lr": [0.001, 0.02], "search_iterations": 2, "validation": 0.34,
                "together": False}  # fmt: skip
    chosen = small_set(voc_set, training=training)
    stage.run(*detection(tiny, chosen, weights, tmp_path / "out"), tmp_path / "work")
    together = metrics(tmp_path / "out")
    for part in ("lr-search", "fine-tuning3", "fine-tuning0"):
        asked = detection(tiny, chosen, weights, tmp_path / part, f"few/{part}")
        assert ("lr" in asked[1].inputs) == part.startswith("fine")
        stage.run(*asked, tmp_path / "work")
    assert metrics(tmp_path / "lr-search") == {key: together[key] for key in ("lr", "lr_candidates_AP50")}
    assert sorted(path.name for path in (tmp_path / "lr-search").iterdir()) == [
        "metrics.json", "provenance.json",
    ]  # fmt: skip
    singles = together["fine_tunings"]
    assert isinstance(singles, dict)
    for seed in ("3", "0"):
        own = metrics(tmp_path / f"fine-tuning{seed}")
        assert own["fine_tunings"] == {seed: singles[seed]}
        assert (own["num_fine_tunings"], own["lr"]) == (1, together["lr"])
        assert (tmp_path / f"fine-tuning{seed}" / "detections.png").exists()
    (tmp_path / "lr-search" / "metrics.json").write_text('{"lr": 0.5, "lr_candidates_AP50": {}}')
    with pytest.raises(UserError, match=r"lr-search.metrics\.json: found no .* of 0\.001, 0\.02"):
        stage.run(*detection(tiny, chosen, weights, tmp_path / "x", "few/fine-tuning3"), tmp_path / "work")
    first = [(tmp_path / each / "detections.png").read_bytes() for each in ("out", "fine-tuning3")]
    assert first[0] == first[1]
    assert list((tmp_path / "work").iterdir()) == []


def test_a_class_without_objects_has_a_note(
    tiny: Experiment, voc_set: Path, weights: Path, tmp_path: Path
) -> None:
    """Its AP is neither 0 nor NaN."""
    # Only squares in test and only bars in train.
    for number in range(6):
        file = voc_set / "Annotations" / f"a{number}.xml"
        file.write_text(file.read_text().replace("<name>square<", "<name>bar<"))
    stage.run(*detection(tiny, small_set(voc_set), weights, tmp_path / "out"), tmp_path / "work")
    written = metrics(tmp_path / "out")
    assert written["notes"] == [
        "1 classes have no object in train and cannot be learnt: square",
        "1 classes have no object in test and have no average precision: bar",
    ]
    assert isinstance(written["AP50"], float)
    assert written["fine_tunings"]["0"]["AP50_by_class"]["bar"] is None  # type: ignore[index]
    assert "NaN" not in (tmp_path / "out" / "metrics.json").read_text()
    lines = (tmp_path / "out" / "precision_recall.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in lines[1:]} == {"square"}
    # A test split without objects is refused before anything is trained.
    (voc_set / "ImageSets/Main/void.txt").write_text("b0\n")
    chosen = small_set(voc_set, data={"test": ["VOC/void"]})
    with pytest.raises(UserError, match="found no object in 1 test images"):
        stage.run(*detection(tiny, chosen, weights, tmp_path / "void"), tmp_path / "work")
    assert not (tmp_path / "void").exists()


def test_a_search_on_images_without_objects_is_refused(
    tiny: Experiment, voc_set: Path, weights: Path, tmp_path: Path
) -> None:
    training = {"lr": [0.001, 0.02], "search_iterations": 2, "validation": 0.34}
    chosen = small_set(voc_set, training=training)
    train, _ = read_splits(chosen.data, masks=False)
    _, validation = split_off(train, 0.34, numpy_generator("lr search"))
    for image in validation.images:
        file = voc_set / "Annotations" / f"{image.image_id}.xml"
        file.write_text(re.sub("<object>.*</object>", "", file.read_text()))
    with pytest.raises(AnnotationError, match="found no object in the 2 training images that compare"):
        stage.run(*detection(tiny, chosen, weights, tmp_path / "out"), tmp_path / "work")


def test_a_killed_run_ends_with_the_same_numbers(
    stage_arguments: Callable[..., StageArguments], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"seeds": [0, 1], "checkpoint_minutes": 1e-9}
    stage.run(*stage_arguments("straight", **training), tmp_path / "work")
    advance, steps = FineTuning._advance, iter(range(100))

    def killed(self: FineTuning, batches: Any) -> dict[str, torch.Tensor]:
        if next(steps) == 6:  # in the middle of the second fine-tuning
            raise KeyboardInterrupt
        return advance(self, batches)

    monkeypatch.setattr(FineTuning, "_advance", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.run(*stage_arguments("resumed", **training), tmp_path / "work")
    assert not (tmp_path / "resumed").exists()
    taken = []
    monkeypatch.setattr(
        FineTuning, "_advance", lambda self, batches: (taken.append(self.step), advance(self, batches))[1]
    )
    stage.run(*stage_arguments("resumed", **training), tmp_path / "work")
    assert taken == [2, 3]
    for name in ("metrics.json", "detections.png", "precision_recall.csv"):
        resumed, straight = (tmp_path / folder / name for folder in ("resumed", "straight"))
        assert resumed.read_bytes() == straight.read_bytes(), name


def test_checkpoints_of_another_encoder_are_not_used(
    stage_arguments: Callable[..., StageArguments],
    tiny: Experiment,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = stage_arguments(seeds=[0], checkpoint_minutes=1e-9)
    advance = FineTuning._advance

    def killed(self: FineTuning, batches: Any) -> dict[str, torch.Tensor]:
        if self.step == 2:
            raise KeyboardInterrupt
        return advance(self, batches)

    monkeypatch.setattr(FineTuning, "_advance", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.run(*asked, tmp_path / "work")
    save_encoder(weights, encoders.build(tiny.encoder, seed=1))
    with pytest.raises(CheckpointError, match="encoder_sha256"):
        stage.run(*asked, tmp_path / "work")


def test_too_little_disk_space_is_told_before_training(
    stage_arguments: Callable[..., StageArguments], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "FineTuning", None)
    full_disk.free(2 << 20, monkeypatch)
    with pytest.raises(StorageError, match=r"out, .*work: found 2.1 MB of free disk space; expected"):
        stage.run(*stage_arguments(), tmp_path / "work")


@pytest.mark.parametrize("name", ["detections.png", "seed0-", RECORD])
def test_a_disk_that_fills_leaves_the_earlier_result(
    stage_arguments: Callable[..., StageArguments],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.json").write_text("earlier")
    real = atomic._complete

    def fill(path: Path) -> None:
        if name in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path)

    monkeypatch.setattr(atomic, "_complete", fill)
    with pytest.raises(StorageError, match=r"cannot be written: No space left on device; free disk space"):
        stage.run(*stage_arguments(), tmp_path / "work")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"metrics.json": "earlier"}
    monkeypatch.undo()
    stage.run(*stage_arguments(), tmp_path / "work")
    assert metrics(out)["num_fine_tunings"] == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_fine_tunings_on_other_annotations_are_not_used(
    stage_arguments: Callable[..., StageArguments],
    voc_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    split: str,
) -> None:
    """A box is corrected between two fine-tunings: the first is computed again, an unfinished one is
    refused.
    """
    asked = stage_arguments(seeds=[0, 1], checkpoint_minutes=1e-9)
    advance, taken, kill = FineTuning._advance, [], [True]

    def watched(self: FineTuning, batches: Any) -> dict[str, torch.Tensor]:
        if (self._seed, self.step) == (1, 2) and kill.pop():
            raise KeyboardInterrupt
        taken.append((self._seed, self.step))
        return advance(self, batches)

    monkeypatch.setattr(FineTuning, "_advance", watched)
    with pytest.raises(KeyboardInterrupt):
        stage.run(*asked, tmp_path / "work")
    file = voc_set / "Annotations" / ("a1.xml" if split == "train" else "b1.xml")
    file.write_text(file.read_text().replace("<xmin>", "<xmin>1", 1))
    taken.clear()
    with pytest.raises(CheckpointError, match=f"annotations_sha256.{split}"):
        stage.run(*asked, tmp_path / "work")
    assert taken == [(0, step) for step in range(4)]


def test_the_digest_of_annotations_covers_all_that_is_read() -> None:
    image = AnnotatedImage(
        1, Path("here/a.jpg"), 40, 48, np.array([[1, 2, 3, 4]], np.float32), np.array([1]),
        np.array([False]), np.array([True]), ({"size": [40, 48], "counts": b"abc"},), np.array([4.0]),
    )  # fmt: skip
    changes: list[dict[str, Any]] = [
        {}, {"image_id": 2}, {"path": Path("here/b.jpg")}, {"height": 41}, {"width": 49},
        {"boxes": image.boxes + 0.5}, {"labels": np.array([2])}, {"ignored": np.array([True])},
        {"trained": np.array([False])}, {"masks": ({"size": [40, 48], "counts": b"abd"},)},
        {"masks": None}, {"areas": np.array([5.0])}, {"areas": None},
    ]  # fmt: skip
    splits = [Annotations(("a", "b"), (dataclasses.replace(image, **change),)) for change in changes]
    splits += [Annotations(("a", "c"), (image,)), Annotations(("a", "b"), (image, image))]
    digests = [stage.annotations_digest(split) for split in splits]
    assert len(set(digests)) == len(digests)
    elsewhere = dataclasses.replace(image, path=Path("there/a.jpg"))
    assert stage.annotations_digest(Annotations(("a", "b"), (elsewhere,))) == digests[0]


def test_the_lr_search_uses_a_part_of_train(
    tiny: Experiment, voc_set: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each candidate is evaluated on two of six training images; test images only once, at the end."""
    chosen = small_set(
        voc_set,
        training={"lr": [0.001, 0.02, 1e12], "search_iterations": 3, "validation": 0.34, "seeds": [3]},
    )
    scores = iter([10.0, 30.0, 20.0])
    evaluated = []

    def evaluate(annotations: object, detections: object, data: object) -> dict[str, float]:
        evaluated.append([image.image_id for image in annotations.images])  # type: ignore[attr-defined]
        return {"AP": 1.0, "AP50": next(scores)}

    monkeypatch.setattr(stage, "evaluate", evaluate)
    stage.run(*detection(tiny, chosen, weights, tmp_path / "out"), tmp_path / "work")
    written = metrics(tmp_path / "out")
    assert written["lr"] == 0.02
    # The last candidate diverges and has no score.
    assert written["lr_candidates_AP50"] == {"0.001": 10.0, "0.02": 30.0, "1e+12": None}
    assert written["AP50"] == 20.0
    parts, test = evaluated[:-1], evaluated[-1]
    assert len(parts) == 2
    assert parts[0] == parts[1]
    assert len(parts[0]) == 2
    assert all(name.startswith("a") for name in parts[0])
    assert all(name.startswith("b") for name in test)


def test_a_single_rate_that_diverges_stops_the_stage(
    stage_arguments: Callable[..., StageArguments], tmp_path: Path
) -> None:
    with pytest.raises(NonFiniteError):
        stage.run(*stage_arguments(lr=[1e12], iterations=9), tmp_path / "work")
    assert not (tmp_path / "out").exists()


def test_validation_and_training_images_are_disjoint_and_complete(voc_set: Path) -> None:
    annotations, _ = read_splits(small_set(voc_set).data, masks=False)
    rest, part = split_off(annotations, 0.34, np.random.default_rng(0))
    names = [{image.image_id for image in each.images} for each in (rest, part)]
    assert len(names[0]) == 4
    assert names[0] | names[1] == {f"a{index}" for index in range(6)}


def masked_set(root: Path) -> DetectionSet:
    data = {
        "format": "coco", "path": str(root), "train": ["train"], "test": ["test"], "interpolation": None,
        "classes": ["brick", "coffee"],
        "scenes": {"image_size": 64, "num_train": 6, "num_test": 3, "seed": 0},
    }  # fmt: skip
    training = {"train_sizes": [64], "test_size": 64, "mode": "frozen"}
    return small_set(root, data=data, model={"masks": True}, training=training)


def test_masks_on_coco_scenes(tiny: Experiment, weights: Path, tmp_path: Path) -> None:
    chosen = masked_set(tmp_path / "photo-scenes")
    scenes.run(chosen.data, tmp_path / "photo-scenes")
    stage.run(*detection(tiny, chosen, weights, tmp_path / "out"), tmp_path / "work")
    written = metrics(tmp_path / "out")
    assert {"AP", "AP50", "AP75", "mask_AP", "mask_AP50", "mask_AP75"} <= written.keys()
    assert written["interpolation"] == "101-point"


def test_mask_rcnn_on_real_coco(
    tiny: Experiment, weights: Path, tmp_path: Path, real_data: Callable[[str], Path]
) -> None:
    """Polygons of several parts, crowds, 80 classes: from files to box and mask AP."""
    data = {"format": "coco", "path": str(real_data("coco-tiny.tar") / "coco-tiny"), "train": ["train2017"],
            "test": ["val2017"], "interpolation": None, "classes": None,
            "empty_images": "drop"}  # fmt: skip
    chosen = small_set(
        tmp_path, data=data, model={"masks": True}, training={"train_sizes": [64], "test_size": 64}
    )
    stage.run(*detection(tiny, chosen, weights, tmp_path / "out"), tmp_path / "work")
    assert {"AP", "mask_AP"} <= metrics(tmp_path / "out").keys()
    counts = json.loads((tmp_path / "out" / "provenance.json").read_text())["annotations"]
    assert counts["test"]["crowds"] == 16
    assert counts["train"]["objects"] == 1444 - 14


def _stage_rank(asked: StageArguments, work: Path) -> None:
    stage.run(*asked, work)


def test_two_processes_write_one_result(
    stage_arguments: Callable[..., StageArguments], tmp_path: Path
) -> None:
    """The stage enters `process_group` itself, as under torchrun."""
    asked = stage_arguments(micro_batch=1, iterations=2, lr_drops=[])
    run_ranks(_stage_rank, 2, asked, tmp_path / "work", join=False)
    assert metrics(tmp_path / "out")["num_fine_tunings"] == 1
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["world_size"] == 2
    assert list((tmp_path / "work").iterdir()) == []
