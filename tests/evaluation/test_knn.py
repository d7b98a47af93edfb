"""The chunked vote against one written out in loops, and the stage against that vote on the tiny
experiment's images."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mochi.config import Experiment, NearestNeighbours, resolve
from mochi.evaluation import knn
from mochi.evaluation.features import EncoderError
from mochi.pretraining import stage as pretrain


def vote(train: torch.Tensor, labels: list[int], row: torch.Tensor, k: int, temperature: float) -> int:
    """Wu et al. 2018: each of the k nearest votes for its class with weight exp(cosine / temperature)."""
    cosines = [float(row @ other / (row.norm() * other.norm())) for other in train]
    nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:k]
    votes: dict[int, float] = {}
    for i in nearest:
        votes[labels[i]] = votes.get(labels[i], 0) + math.exp(cosines[i] / temperature)
    return max(votes, key=lambda label: votes[label])


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 5), st.integers(0, 100))
def test_equals_a_vote_in_loops(num_train: int, num_val: int, chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    train = torch.randn(num_train, 4, generator=generator, dtype=torch.float64)
    val = torch.randn(num_val, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (num_train,), generator=generator)
    k = min(5, num_train)
    predicted = knn.classify(train, labels, val, num_classes=3, k=k, temperature=0.07, chunk=chunk)
    assert predicted.tolist() == [vote(train, labels.tolist(), row, k, 0.07) for row in val]


def test_the_stage_judges_val_by_train_at_the_runs_temperature(
    tiny: Experiment,
    tiny_data: Path,
    encoder_file: Path,
    by_hand: dict[str, tuple[torch.Tensor, torch.Tensor]],
    tmp_path: Path,
) -> None:
    run = resolve(tiny, "random-init", 0)
    evaluation = run.evaluation.model_copy(update={"knn": NearestNeighbours(k=60, temperature=0.002)})
    run = run.model_copy(update={"evaluation": evaluation})
    knn.run(run, tiny_data, encoder_file, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (train, train_labels), (val, val_labels) = by_hand["train"], by_hand["val"]

    def top1(temperature: float) -> float:
        votes = [vote(train, train_labels.tolist(), row, 60, temperature) for row in val]
        return 100 * float((torch.tensor(votes) == val_labels).float().mean())

    image = 100 / len(val)  # features one by one and in batches differ in their last bits: a vote may tip
    assert metrics["top1"] == pytest.approx(top1(0.002), abs=1.01 * image)
    assert abs(top1(1.0) - top1(0.002)) > 3 * image
    assert (metrics["num_train"], metrics["num_val"], metrics["temperature"]) == (160, 64, 0.002)


def test_a_small_temperature_does_not_overflow() -> None:
    train = torch.eye(3)
    predicted = knn.classify(train, torch.arange(3), train, num_classes=3, k=3, temperature=1e-3)
    assert predicted.tolist() == [0, 1, 2]


def test_k_is_clamped_with_a_warning(
    tiny: Experiment, tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = resolve(tiny, "random-init", 0)
    evaluation = run.evaluation.model_copy(update={"knn": NearestNeighbours(k=500, temperature=0.07)})
    pretrain.run(run, tiny_data, tmp_path, tmp_path)
    knn.run(
        run.model_copy(update={"evaluation": evaluation}),
        tiny_data,
        tmp_path / "encoder.safetensors",
        tmp_path / "knn",
    )
    metrics = json.loads((tmp_path / "knn" / "metrics.json").read_text())
    assert metrics["k"] == 160
    assert "k = 500 is larger than the 160 labelled training images" in caplog.text


def test_encoders_that_do_not_fit_are_refused(tiny: Experiment, tiny_data: Path, tmp_path: Path) -> None:
    run = resolve(tiny, "random-init", 0)
    with pytest.raises(EncoderError, match="no such encoder"):
        knn.run(run, tiny_data, tmp_path / "encoder.safetensors", tmp_path / "knn")
    pretrain.run(run, tiny_data, tmp_path, tmp_path)
    wider = run.model_copy(update={"encoder": run.encoder.model_copy(update={"width": 16})})
    with pytest.raises(EncoderError, match=r"bn1.bias: expected \[16\], found \[8\]"):
        knn.run(wider, tiny_data, tmp_path / "encoder.safetensors", tmp_path / "knn")
