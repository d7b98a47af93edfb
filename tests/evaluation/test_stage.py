"""What all evaluations share: the encoder stays unchanged, the number format, provenance."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from mochi.config import Experiment, probe_run
from mochi.config.datasets import Folder
from mochi.data.format import open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.encoders import build_untrained
from mochi.encoders.files import EncoderError, load_encoder, save_encoder
from mochi.encoders.resnet import ResNet
from mochi.errors import DataError
from mochi.evaluation.features import Frozen
from mochi.evaluation.resume import ResumePoint
from mochi.evaluation.tasks.knn import NearestNeighbours
from mochi.evaluation.tasks.linear import LinearProbe, training
from mochi.provenance.record import Stopwatch
from mochi.provenance.wanted import RECORD
from mochi.storage import checkpoint
from mochi.storage.atomic import StorageError
from tests import full_disk
from tests.evaluation.runs import evaluate, result_in, write_images
from tests.tiny import with_protocol

TASKS = ["linear", "knn"]


@pytest.mark.parametrize("task", TASKS)
def test_the_result_is_current_until_the_encoder_changes(
    task: str, tiny: Experiment, tiny_data: Path, tmp_path: Path
) -> None:
    encoder = tmp_path / "encoder.safetensors"
    save_encoder(encoder, build_untrained(tiny.encoder, seed=0))
    evaluate(tiny, task, encoder, tiny_data, tmp_path / "out")
    result = result_in(tmp_path / "out", tiny, task, encoder, tiny_data)
    assert result.why_stale() is None
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert (record["stage"], record["result"]) == ("evaluate", f"random-init seed 0 {task}")
    save_encoder(encoder, build_untrained(tiny.encoder, seed=1))
    assert result.why_stale() == f"input: {encoder} changed"


@pytest.mark.parametrize(
    ("task", "protocol"), [("linear", {}), ("linear", {"min_scale": 0.2}), ("knn", {})]
)
def test_the_same_encoder_gives_the_same_numbers(
    task: str, protocol: dict[str, object], encoder_file: Path, tiny_data: Path, tmp_path: Path
) -> None:
    experiment = with_protocol(task, **protocol)
    torch.manual_seed(1)
    once = evaluate(experiment, task, encoder_file, tiny_data, tmp_path / "once")
    torch.manual_seed(2)
    assert evaluate(experiment, task, encoder_file, tiny_data, tmp_path / "again") == once
    confusion = pd.read_csv(tmp_path / "once" / "confusion.csv")
    right = confusion[confusion["class"] == confusion["predicted"]]["images"].sum()
    assert 100 * right / confusion["images"].sum() == pytest.approx(once["top1"], abs=1e-3)


@pytest.mark.parametrize(
    ("where", "free", "expected"),
    [("auto", 8000, "cuda"), ("auto", 7998, "cpu"), ("device", 0, "cuda"), ("host", 8000, "cpu")],
)
def test_features_are_on_the_device_if_they_fill_half_of_its_free_memory_at_most(
    where: str, free: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 x 10 float32 are 4,000 bytes."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80_000))
    frozen: Any = SimpleNamespace(run=SimpleNamespace(features_on=where), device=torch.device("cuda"))
    assert Frozen._storage_device(frozen, 100, 10).type == expected


def test_features_of_batches_equal_those_of_single_images(
    tiny: Experiment,
    tiny_data: Path,
    encoder_file: Path,
    by_hand: dict[str, tuple[torch.Tensor, torch.Tensor]],
    tmp_path: Path,
) -> None:
    """160 images in batches of 48: three, and a short one."""
    run = probe_run(tiny, "random-init", 0, "knn").model_copy(update={"batch_size": 48})
    encoder = load_encoder(encoder_file, tiny.encoder, torch.device("cpu"))
    resume_point = ResumePoint(
        tmp_path, result_in(tmp_path, tiny, "knn", encoder_file, tiny_data), Stopwatch()
    )
    frozen = Frozen(run, encoder, open_dataset(tiny_data), torch.device("cpu"), 0, resume_point, None)
    for name, (values, labels) in by_hand.items():
        features = frozen.features(name)
        torch.testing.assert_close(features.values, values)
        assert torch.equal(features.labels, labels)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_number_format_is_the_devices_and_is_recorded(
    task: str,
    bfloat16: bool,
    tiny: Experiment,
    tiny_data: Path,
    encoder_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
    used = set()
    forward = ResNet.forward

    def watched(self: ResNet, images: torch.Tensor) -> torch.Tensor:
        used.add(torch.is_autocast_enabled("cpu"))
        return forward(self, images)

    monkeypatch.setattr(ResNet, "forward", watched)
    evaluate(tiny, task, encoder_file, tiny_data, tmp_path)
    assert used == {bfloat16}
    recorded = json.loads((tmp_path / RECORD).read_text())["precision"]
    assert recorded == ("bfloat16" if bfloat16 else "float32")


@pytest.mark.parametrize(
    ("task", "protocol"), [("linear", {}), ("linear", {"min_scale": 0.2}), ("knn", {})]
)
def test_the_encoder_is_in_eval_mode_without_gradients(
    task: str,
    protocol: dict[str, object],
    encoder_file: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward, seen = ResNet.forward, []

    def watched(self: ResNet, images: torch.Tensor) -> torch.Tensor:
        features = forward(self, images)
        seen.append(self.training or features.requires_grad)
        return features

    monkeypatch.setattr(ResNet, "forward", watched)
    before = encoder_file.read_bytes()
    evaluate(with_protocol(task, **protocol), task, encoder_file, tiny_data, tmp_path)
    assert seen
    assert not any(seen)
    assert encoder_file.read_bytes() == before


def test_an_evaluation_that_changes_the_encoder_has_no_result(
    tiny: Experiment, tiny_data: Path, encoder_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training mode the running statistics change, without any gradient."""

    def careless(settings: NearestNeighbours, frozen: Frozen) -> dict[str, float]:
        frozen.encoder.train()(torch.randn(4, 3, 16, 16))
        return {"top1": 99.0}

    monkeypatch.setattr(NearestNeighbours, "evaluate", careless)
    with pytest.raises(AssertionError, match="the evaluation changed the encoder"):
        evaluate(tiny, "knn", encoder_file, tiny_data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_evaluation_keeps_the_previous_result(
    tiny: Experiment, tiny_data: Path, encoder_file: Path, tmp_path: Path
) -> None:
    evaluate(tiny, "knn", encoder_file, tiny_data, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(EncoderError):
        evaluate(tiny, "knn", tmp_path / "nothing.safetensors", tiny_data, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_encoders_that_do_not_match_are_refused(
    tiny: Experiment, tiny_data: Path, encoder_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(EncoderError, match="no such encoder"):
        evaluate(tiny, "knn", tmp_path / "encoder.safetensors", tiny_data, tmp_path / "out")
    wider = tiny.model_copy(update={"encoder": tiny.encoder.model_copy(update={"width": 16})})
    with pytest.raises(EncoderError, match=r"not a resnet10 .* width 16: its metadata says .* width 8"):
        evaluate(wider, "knn", encoder_file, tiny_data, tmp_path / "out")


@pytest.mark.parametrize("task", TASKS)
def test_unlabelled_images_are_ignored(
    task: str, tiny: Experiment, encoder_file: Path, partly_labelled: Path, tmp_path: Path
) -> None:
    metrics = evaluate(tiny, task, encoder_file, partly_labelled, tmp_path)
    assert (metrics["num_train"], metrics["num_val"]) == (24, 8)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/unlabelled", "val/a"], "found 0 labelled images in train; a probe needs labels"),
        (["train/a", "val/unlabelled"], "found 0 labelled images in val; a probe needs labels"),
        (["train/a"], "found no split 'val'; expected one of: train"),
    ],
)
def test_data_without_labels_is_refused(
    task: str, folders: list[str], message: str, tiny: Experiment, encoder_file: Path, tmp_path: Path
) -> None:
    write_images(tmp_path / "images", dict.fromkeys(folders, 3))
    prepare(Folder(source="folder", name="x", path=str(tmp_path / "images")), tmp_path / "data", jobs=1)
    with pytest.raises(DataError, match=message):
        evaluate(tiny, task, encoder_file, tmp_path / "data", tmp_path / "out")


def test_too_little_disk_space_is_told_before_images_are_encoded(
    tiny: Experiment, encoder_file: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Frozen, "features", None)
    full_disk.free(1 << 20, monkeypatch)
    with pytest.raises(StorageError, match=r"out/work, .*out: found 1.0 MB of free disk space; expected"):
        evaluate(tiny, "linear", encoder_file, tiny_data, tmp_path / "out")


def test_the_size_of_the_checkpoint_of_a_probe_is_known_before(tiny: Experiment) -> None:
    protocol = probe_run(tiny, "random-init", 0, "linear").protocol
    assert isinstance(protocol, LinearProbe)
    probe = training.Probes(protocol, 12, 5, seed=0)
    probe.step(torch.ones(3, 12), torch.zeros(3, dtype=torch.int64), torch.tensor([True, False, False]))
    tensors = checkpoint.pack(probe, probe.optimizer)
    assert protocol.checkpoint_bytes(12, 5) == sum(tensor.nbytes for tensor in tensors.values())
