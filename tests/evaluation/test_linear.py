"""The probe's own gradient and update against autograd and torch's SGD; the stage against the same protocol
written out one classifier at a time; that it changes nothing but itself; and that candidates are compared
on rows they did not see."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mochi.config import Experiment, LinearProbe, resolve
from mochi.data.format import open_dataset
from mochi.evaluation import linear
from mochi.evaluation.features import encoder_digest, load_encoder
from mochi.pretraining import stage as pretrain
from mochi.runtime.progress import NonFiniteError

PROTOCOL = LinearProbe(
    protocol="test", epochs=4, batch_size=8, lr=0.5, lr_candidates=[0.05], momentum=0.9,
    weight_decay=0.01, lr_drops=[2], lr_drop_factor=0.1, min_scale=None,
)  # fmt: skip


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_equals_autograd_and_torchs_sgd(index: int) -> None:
    """Classifiers 0, 1: both rates on all rows; 2, 3: both rates without the held-out rows."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 5, generator=generator)
    labels = torch.randint(3, (8,), generator=generator)
    held_out = torch.tensor([True, False] * 4)
    probes = linear.Probes(PROTOCOL, 5, 3, seed=1, device=torch.device("cpu"))
    weight = probes._weight[index].clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=probes.rates[index % 2], momentum=0.9, weight_decay=0.01)
    seen = torch.ones(8, dtype=torch.bool) if index < 2 else ~held_out
    for epoch in range(4):
        probes.step(features, labels, held_out, epoch)
        for group in optimizer.param_groups:
            group["lr"] = probes.rates[index % 2] * (0.1 if epoch >= 2 else 1.0)
        optimizer.zero_grad()
        logits = F.pad(features[seen], (0, 1), value=1.0) @ weight
        F.cross_entropy(logits, labels[seen]).backward()
        optimizer.step()
        torch.testing.assert_close(probes._weight[index], weight.detach(), rtol=1e-5, atol=1e-6)


def one_probe(
    train: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor, rate: float, protocol: LinearProbe
) -> torch.Tensor:
    """Weights (D + 1, 16) of one classifier trained on `rows` alone, in the stage's order of seed 0."""
    features, labels = F.pad(train[0], (0, 1), value=1.0), train[1]
    weight = 0.01 * torch.randn(features.shape[1], 16, generator=torch.Generator().manual_seed(0))
    weight[-1] = 0
    weight.requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=rate, momentum=protocol.momentum)
    for epoch in range(protocol.epochs):
        if epoch in protocol.lr_drops:
            optimizer.param_groups[0]["lr"] *= protocol.lr_drop_factor
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(protocol.batch_size):
            seen = batch[torch.isin(batch, rows)]
            optimizer.zero_grad()
            F.cross_entropy(features[seen] @ weight, labels[seen]).backward()
            optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(
    "changes",
    [
        # All of the learning is in the first epoch; without the drop there would be nine more of it.
        {"epochs": 10, "lr": 0.003, "lr_candidates": [0.1], "lr_drops": [1], "lr_drop_factor": 1e-3},
        # Half of train learnt by heart: what a classifier saw it knows, what it did not see it does not.
        {"epochs": 40, "lr": 1.0, "lr_candidates": [0.3], "lr_drops": [], "held_out": 0.5},
    ],
    ids=["drops", "held out"],
)
def test_the_stage_equals_the_protocol_written_out(
    tiny: Experiment,
    tiny_data: Path,
    encoder_file: Path,
    by_hand: dict[str, tuple[torch.Tensor, torch.Tensor]],
    tmp_path: Path,
    changes: dict[str, object],
) -> None:
    run = resolve(tiny, "random-init", 0)
    assert run.evaluation.linear is not None
    protocol = run.evaluation.linear.model_copy(update=changes)
    evaluation = run.evaluation.model_copy(update={"linear": protocol})
    linear.run(run.model_copy(update={"evaluation": evaluation}), tiny_data, encoder_file, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["num_train"], metrics["num_val"]) == (160, 64)

    (train, labels), (val, val_labels) = by_hand["train"], by_hand["val"]
    mean, scale = train.mean(0), train.std(0).clamp(min=1e-6)
    train, val = (train - mean) / scale, (val - mean) / scale
    held_out = linear.held_out_rows(160, protocol.held_out, 0)

    def accuracy(weight: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> float:
        right = (F.pad(features, (0, 1), value=1.0) @ weight).argmax(1) == labels
        return 100 * float(right.float().mean())

    rates = [protocol.lr, *protocol.lr_candidates]
    whole = {rate: one_probe((train, labels), torch.arange(160), rate, protocol) for rate in rates}
    # Features one by one and in batches differ in their last bits: an image on the border may tip.
    assert metrics["top1"] == pytest.approx(accuracy(whole[protocol.lr], val, val_labels), abs=101 / 64)
    if protocol.lr_drops:
        on = one_probe(
            (train, labels), torch.arange(160), protocol.lr, protocol.model_copy(update={"lr_drops": []})
        )
        assert accuracy(on, val, val_labels) > metrics["top1"] + 500 / 64
    best = accuracy(whole[metrics["best_lr"]], val, val_labels)
    assert metrics["best_lr_top1"] == pytest.approx(best, abs=101 / 64)
    for rate in rates:
        part = one_probe((train, labels), torch.nonzero(~held_out)[:, 0], rate, protocol)
        judged = accuracy(part, train[held_out], labels[held_out])
        image = 100 / int(held_out.sum())
        assert metrics["held_out_top1"][f"{rate:g}"] == pytest.approx(judged, abs=1.01 * image)
        if protocol.held_out == 0.5:
            assert accuracy(whole[rate], train[held_out], labels[held_out]) > judged + 5 * image


def test_cropped_rows_keep_their_held_out_marks(
    tiny: Experiment,
    tiny_data: Path,
    encoder_file: Path,
    by_hand: dict[str, tuple[torch.Tensor, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mark of a random crop is that of the row it was cut from."""
    run = resolve(tiny, "random-init", 0)
    assert run.evaluation.linear is not None
    protocol = run.evaluation.linear.model_copy(update={"min_scale": 0.2, "held_out": 0.5})
    encoder = load_encoder(encoder_file, run.encoder, torch.device("cpu"))
    monkeypatch.setattr(linear, "extract", lambda _, crops: (crops[0].indices, crops[0].labels))
    batches = linear._Batches(run, protocol, open_dataset(tiny_data), encoder, *by_hand["train"], workers=0)
    marks = linear.held_out_rows(160, 0.5, run.seed)
    seen = [(rows, held_out) for rows, _, held_out in batches.of(0)]
    assert sum(len(rows) for rows, _ in seen) == 160
    for rows, held_out in seen:
        assert torch.equal(held_out, marks[rows])


def test_scores_are_top1_and_top5_in_percent() -> None:
    probes = linear.Probes(PROTOCOL, 2, 7, seed=0, device=torch.device("cpu"))
    probes._weight.zero_()
    probes._weight[:, -1] = torch.arange(7.0)  # every image: class 6 first, then 5, 4, 3, 2
    scores = probes.scores(torch.zeros(4, 2), torch.tensor([6, 5, 2, 1]))
    assert scores[0] == {"top1": 25.0, "top5": 75.0}


@pytest.mark.parametrize("min_scale", [None, 0.2])
def test_the_stage_leaves_the_encoder_as_it_was(
    tiny: Experiment, tiny_data: Path, tmp_path: Path, min_scale: float | None
) -> None:
    run = resolve(tiny, "random-init", 0)
    protocol = run.evaluation.linear
    assert protocol is not None
    evaluation = run.evaluation.model_copy(
        update={"linear": protocol.model_copy(update={"min_scale": min_scale})}
    )
    run = run.model_copy(update={"evaluation": evaluation})
    pretrain.run(run, tiny_data, tmp_path, tmp_path)
    file = tmp_path / "encoder.safetensors"
    before = file.read_bytes(), encoder_digest(load_encoder(file, run.encoder, torch.device("cpu")))
    linear.run(run, tiny_data, file, tmp_path / "linear")
    after = file.read_bytes(), encoder_digest(load_encoder(file, run.encoder, torch.device("cpu")))
    assert before == after
    metrics = json.loads((tmp_path / "linear" / "metrics.json").read_text())
    # 16 photographs, 4 patches each: far above the 6.25 % of a guess even for an untrained encoder.
    assert metrics["top1"] > 12.5
    assert metrics["top1"] <= metrics["top5"] <= 100
    assert metrics["protocol"] == "features-sgd"
    assert set(metrics["held_out_top1"]) == {"0.1", "1"}
    assert metrics["best_lr"] in {0.1, 1.0}


def test_a_moving_encoder_is_caught(tiny: Experiment, tiny_data: Path, tmp_path: Path) -> None:
    """In training mode the running statistics move, and the digest sees it."""
    run = resolve(tiny, "random-init", 0)
    pretrain.run(run, tiny_data, tmp_path, tmp_path)
    encoder = load_encoder(tmp_path / "encoder.safetensors", run.encoder, torch.device("cpu"))
    before = encoder_digest(encoder)
    encoder(torch.randn(4, 3, 16, 16))
    assert encoder_digest(encoder) == before
    encoder.train()(torch.randn(4, 3, 16, 16))
    assert encoder_digest(encoder) != before


def test_a_diverged_protocol_stops_and_a_diverged_candidate_loses() -> None:
    scores = [{"top1": 50.0, "top5": 90.0}, {"top1": math.nan, "top5": math.nan}]
    metrics = linear._metrics(PROTOCOL, [0.5, 0.05], scores, [40.0, -1.0], 8, 4)
    assert metrics["best_lr"] == 0.5
    with pytest.raises(NonFiniteError, match=r"diverged at the protocol's learning rate 0\.5"):
        linear._metrics(PROTOCOL, [0.5, 0.05], scores[::-1], [-1.0, 40.0], 8, 4)


def test_held_out_rows_are_a_random_share() -> None:
    marks = linear.held_out_rows(100, 0.1, seed=0)
    assert marks.sum() == 10
    assert not torch.equal(marks, linear.held_out_rows(100, 0.1, seed=1))
