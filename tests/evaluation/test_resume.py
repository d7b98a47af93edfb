"""A killed probe ends with the same bytes as an uninterrupted one, and resumes only its own checkpoint."""

import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mochi.config import Experiment, probe_run
from mochi.evaluation import features, resume, stage
from mochi.evaluation.tasks.linear import training as linear
from mochi.provenance.wanted import RECORD
from mochi.storage import checkpoint
from mochi.storage.checkpoint import CheckpointError
from tests.evaluation.runs import evaluate, result_in
from tests.processes import context
from tests.tiny import with_protocol

CROPS = {"min_scale": 0.2, "batch_size": 48}  # 160 images: the last batch has 16
CACHED = {"min_scale": None, "batch_size": 48}


def probe(experiment: Experiment, encoder: Path, data: Path, folder: Path) -> tuple[bytes, bytes]:
    """Evaluate with a checkpoint after every epoch; returns the bytes of metrics.json and of the
    classifiers.
    """
    torch.set_num_threads(1)  # also in a separate process
    scores = linear.Probes.scores

    def kept(self: linear.Probes, *arguments: Any) -> list[dict[str, float]]:
        save_file(checkpoint.pack(self, self.optimizer), folder / "probes.safetensors")
        return scores(self, *arguments)

    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "MINUTES", 0.0)
        patch.setattr(features, "_PRECISION", "float32")  # as in conftest.py, in every process
        patch.setattr(linear.Probes, "scores", kept)
        evaluate(experiment, "linear", encoder, data, folder)
    return (folder / "metrics.json").read_bytes(), (folder / "probes.safetensors").read_bytes()


def epochs_done(folder: Path) -> int:
    """Epochs in the checkpoint; -1 if there is none."""
    saved = folder / "work" / "checkpoint.safetensors"
    if not saved.exists():
        return -1
    # safe_open opens the path twice, and the file is replaced continually.
    with saved.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(json.loads(header["__metadata__"]["state"])["done"])


@pytest.mark.parametrize("protocol", [CACHED, CROPS], ids=["cached", "crops"])
def test_a_probe_killed_at_random_moments_ends_with_the_same_bytes(
    protocol: dict[str, Any], encoder_file: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """SIGKILL, then the same command. Weights and momentum are compared, not only accuracies."""
    forks = context()
    experiment = with_protocol("linear", epochs=30, lr_drops=[10, 20], weight_decay=1e-3, **protocol)
    expected = probe(experiment, encoder_file, tiny_data, tmp_path / "whole")
    moments = random.Random(0)
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        process = forks.Process(target=probe, args=(experiment, encoder_file, tiny_data, folder))
        process.start()
        target = moments.randrange(-1, 26)
        while epochs_done(folder) < target:
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the kill came after the end"
        assert probe(experiment, encoder_file, tiny_data, folder) == expected, target
        assert not list((folder / "work").iterdir()), "no checkpoint is left"


def interrupted_at(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the next probe when this epoch begins."""
    start_epoch = linear.Probes.start_epoch

    def stopping(self: linear.Probes, now: int) -> None:
        if now == epoch:
            raise KeyboardInterrupt
        start_epoch(self, now)

    monkeypatch.setattr(linear.Probes, "start_epoch", stopping)


def count_epochs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the epochs that are computed from now on."""
    seen: list[int] = []
    start_epoch: Callable[[linear.Probes, int], None] = linear.Probes.start_epoch
    monkeypatch.setattr(
        linear.Probes, "start_epoch", lambda self, now: (seen.append(now), start_epoch(self, now))
    )
    return seen


def test_a_resumed_probe_computes_only_what_is_left(
    tiny: Experiment, encoder_file: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupted_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            probe(tiny, encoder_file, tiny_data, tmp_path)
    assert epochs_done(tmp_path) == 3
    seen = count_epochs(monkeypatch)
    probe(tiny, encoder_file, tiny_data, tmp_path)
    assert seen == [3, 4]


def test_a_checkpoint_is_written_when_due(
    tiny: Experiment, encoder_file: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short probe writes none: on a network file system each takes a second."""
    interrupted_at(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny, "linear", encoder_file, tiny_data, tmp_path)
    assert epochs_done(tmp_path) == -1


def test_another_protocol_does_not_use_the_checkpoint(
    tiny: Experiment, encoder_file: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupted_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            probe(tiny, encoder_file, tiny_data, tmp_path)
    with pytest.raises(CheckpointError, match=r"settings.protocol.lr=0.1; this is the run with .*lr=0.2"):
        probe(with_protocol("linear", lr=0.2), encoder_file, tiny_data, tmp_path)


def test_provenance_has_the_code_and_time_of_all_attempts(
    tiny: Experiment, encoder_file: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for pretraining: every code digest is listed, and times are added."""
    with monkeypatch.context() as patch:
        interrupted_at(3, patch)
        patch.setattr(resume.ResumePoint, "wall_seconds", lambda self: 5000.0)
        with pytest.raises(KeyboardInterrupt):
            probe(tiny, encoder_file, tiny_data, tmp_path)
    result = result_in(tmp_path, tiny, "linear", encoder_file, tiny_data)
    edited = replace(result, modules=("mochi.evaluation.tasks.knn",))
    stage.run(probe_run(tiny, "random-init", 0, "linear"), edited, tmp_path / "work")
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["code_digests"] == [result.code_digest, edited.code_digest]
    assert 5000 < record["wall_seconds"] < 5600
