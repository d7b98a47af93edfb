"""The vote in chunks compared with one in loops, and the stage with that vote on the tiny experiment's
images.
"""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mochi.config import Column, ConfigError, Experiment, columns, probe_run
from mochi.evaluation.tasks import knn
from tests.evaluation.runs import evaluate
from tests.tiny import with_protocol


def vote(train: torch.Tensor, labels: list[int], row: torch.Tensor, k: int, temperature: float) -> int:
    """Wu et al. 2018: each of the k nearest neighbours votes for its class with weight exp(cosine /
    temperature).
    """
    cosines = [float(row @ other / (row.norm() * other.norm())) for other in train]
    nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:k]
    votes: dict[int, float] = {}
    for i in nearest:
        votes[labels[i]] = votes.get(labels[i], 0) + math.exp(cosines[i] / temperature)
    return max(votes, key=lambda label: votes[label])


SIZES = st.tuples(st.integers(1, 30), st.integers(1, 12))
CHUNKS = st.tuples(st.integers(1, 5), st.integers(1, 35))


@given(SIZES, CHUNKS, st.integers(0, 100))
def test_equals_a_vote_in_loops(sizes: tuple[int, int], chunks: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    train, val = (torch.randn(size, 4, generator=generator) for size in sizes)
    labels = torch.randint(3, (sizes[0],), generator=generator)
    k = min(5, sizes[0])
    expected = [vote(train.double(), labels.tolist(), row.double(), k, 0.07) for row in val]
    predicted = knn.classify(train, labels, val, num_classes=3, pairs=[(k, 0.07)], chunks=chunks)
    assert predicted.tolist() == [expected]


def test_several_settings_equal_each_setting_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    train, val = (torch.randn(size, 4, generator=generator) for size in (50, 30))
    labels = torch.randint(3, (50,), generator=generator)
    pairs = [(5, 0.07), (1, 1.0), (20, 0.5), (50, 10.0)]
    together = knn.classify(train, labels, val, num_classes=3, pairs=pairs)
    alone = [knn.classify(train, labels, val, num_classes=3, pairs=[pair])[0] for pair in pairs]
    assert torch.equal(together, torch.stack(alone))
    assert len(together.unique(dim=0)) == 4


def test_a_grid_of_k_and_temperature(
    tiny_data: Path, encoder_file: Path, tmp_path: Path, tiny: Experiment
) -> None:
    """Each pair of k and temperature has a metric and a column; the first pair is the main one."""
    grid = with_protocol("knn", k=[20, 3], temperature=[0.1, 1.0])
    metrics = evaluate(grid, "knn", encoder_file, tiny_data, tmp_path / "grid")
    keys = {"top1": (20, 0.1), "top1_k20_t1": (20, 1.0), "top1_k3_t0.1": (3, 0.1), "top1_k3_t1": (3, 1.0)}
    assert {key: column.name for key, column in columns(grid, "knn").items()} == {
        key: f"top-1 (k={k}, t={temperature:g})" for key, (k, temperature) in keys.items()
    }
    assert (metrics["k"], metrics["temperature"]) == (20, 0.1)
    for key, (k, temperature) in keys.items():
        single = with_protocol("knn", k=k, temperature=temperature)
        assert columns(single, "knn") == {"top1": Column("top-1")}
        alone = evaluate(single, "knn", encoder_file, tiny_data, tmp_path / key)
        assert metrics[key] == alone["top1"]
    with pytest.raises(ConfigError, match=r"evaluation.knn.k: found \[5, 5\]; the values must be distinct"):
        with_protocol("knn", k=[5, 5])


@given(SIZES, CHUNKS, st.integers(1, 30), st.integers(0, 100))
def test_ties_are_broken_by_row_order(
    sizes: tuple[int, int], chunks: tuple[int, int], k: int, seed: int
) -> None:
    """Exact products, most of them tied, some negative and some -0; the size of chunks does not matter."""
    generator = torch.Generator().manual_seed(seed)
    train, val = (torch.randint(-1, 2, (size, 4), generator=generator).float() for size in sizes)
    k = min(k, sizes[0])
    order = (val @ train.T + 0.0).sort(dim=1, descending=True, stable=True)
    similarity, neighbours = knn._nearest(val, train, k, chunks[1])
    assert torch.equal(similarity, order.values[:, :k])
    assert torch.equal(neighbours, order.indices[:, :k])


@pytest.mark.parametrize("similarity", [[1.0, -1.0, 0.5, -0.5, 1e-30, -1e-30, 0.0], [float("inf"), 3e38]])
def test_integer_keys_sort_like_their_similarities(similarity: list[float]) -> None:
    values = torch.tensor([similarity])
    keys = knn._sort_keys(values.clone(), 5)
    assert torch.equal(keys.argsort(), values.argsort())
    read, rows = knn._unpack(keys)
    assert torch.equal(read, values)
    assert rows.tolist() == [list(range(5, 5 + len(similarity)))]


def test_the_stage_classifies_val_by_train_at_the_runs_temperature(
    tiny_data: Path,
    encoder_file: Path,
    by_hand: dict[str, tuple[torch.Tensor, torch.Tensor]],
    tmp_path: Path,
) -> None:
    experiment = with_protocol("knn", k=60, temperature=0.002)
    metrics = evaluate(experiment, "knn", encoder_file, tiny_data, tmp_path)
    (train, train_labels), (val, val_labels) = by_hand["train"], by_hand["val"]

    def top1(temperature: float) -> float:
        votes = [vote(train, train_labels.tolist(), row, 60, temperature) for row in val]
        return 100 * float((torch.tensor(votes) == val_labels).float().mean())

    image = 100 / len(
        val
    )  # features computed one by one and in batches differ in their last bits, which can change a vote
    assert metrics["top1"] == pytest.approx(top1(0.002), abs=1.01 * image)
    assert abs(top1(1.0) - top1(0.002)) > 3 * image
    assert metrics["top1"] in {round(100 * number / 64, 4) for number in range(65)}
    assert (metrics["num_train"], metrics["num_val"], metrics["temperature"]) == (160, 64, 0.002)


def test_a_small_temperature_does_not_overflow() -> None:
    train = torch.eye(3)
    predicted = knn.classify(train, torch.arange(3), train, num_classes=3, pairs=[(3, 1e-3)])
    assert predicted.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("k", [500, [3, 500]])
def test_k_is_clamped_with_a_warning(
    tiny_data: Path,
    encoder_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    k: int | list[int],
) -> None:
    metrics = evaluate(with_protocol("knn", k=k), "knn", encoder_file, tiny_data, tmp_path)
    assert metrics["k"] == (160 if k == 500 else 3)
    assert "k = 500 is larger than the 160 labelled training images" in caplog.text


def test_all_training_images_may_vote(
    tiny_data: Path, encoder_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = evaluate(with_protocol("knn", k=160), "knn", encoder_file, tiny_data, tmp_path)
    assert metrics["k"] == 160
    assert "larger than" not in caplog.text


def test_a_list_of_one_number_is_that_number() -> None:
    """So both spellings have the settings, and the digest, of one result."""

    def settings(**values: object) -> dict[str, object]:
        run = probe_run(with_protocol("knn", **values), "random-init", 0, "knn")
        protocol = run.settings()["protocol"]
        return {name: protocol[name] for name in ("k", "temperature")}

    assert settings(k=[20], temperature=[0.1]) == {"k": 20, "temperature": 0.1}
    assert settings(k=20, temperature=0.1) == {"k": 20, "temperature": 0.1}
    assert settings(k=[20, 3], temperature=[0.1, 1.0]) == {"k": [20, 3], "temperature": [0.1, 1.0]}
