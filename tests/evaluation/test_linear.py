"""All classifiers at once compared with each one alone; the stage with its protocol written out;
learning rates are compared on held-out rows; and only needed images are encoded.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mochi.config import Experiment, probe_run
from mochi.data.format import open_dataset
from mochi.encoders.resnet import ResNet
from mochi.evaluation.features import Frozen
from mochi.evaluation.tasks.linear import LinearProbe
from mochi.evaluation.tasks.linear import training as linear
from mochi.runtime.monitoring import NonFiniteError
from mochi.runtime.seeding import generator
from tests.evaluation.runs import clusters, evaluate, frozen_features
from tests.tiny import with_protocol

PROTOCOL = LinearProbe(
    task="linear", protocol="test", epochs=4, batch_size=8, lr=0.5, lr_candidates=[0.05], momentum=0.9,
    weight_decay=0.01, lr_drops=[2], lr_drop_factor=0.1, min_scale=None,
)  # fmt: skip


@pytest.mark.parametrize("which", [linear.ALL, linear.WITHOUT_HELD_OUT])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("num_held_out", [3, 7])
def test_each_classifier_equals_one_trained_alone(num_held_out: int, index: int, which: int) -> None:
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(8, 5, generator=draws)
    labels = torch.randint(3, (8,), generator=draws)
    held_out = torch.arange(8) < num_held_out
    probes = linear.Probes(PROTOCOL, 5, 3, seed=1)
    rows = slice(3 * which, 3 * which + 3)
    plain = torch.nn.Linear(5, 3)
    plain.load_state_dict({name: value[rows] for name, value in probes.layers[index].state_dict().items()})
    rate = [0.5, 0.05][index]
    optimizer = torch.optim.SGD(plain.parameters(), lr=rate, momentum=0.9, weight_decay=0.01)
    seen = torch.ones(8, dtype=torch.bool) if which == linear.ALL else ~held_out
    for epoch in range(4):
        probes.start_epoch(epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.1 if epoch >= 2 else 1.0)
        for _ in range(2):
            probes.step(features, labels, held_out)
            optimizer.zero_grad()
            F.cross_entropy(plain(features[seen]), labels[seen]).backward()
            optimizer.step()
        for name, value in probes.layers[index].state_dict().items():
            torch.testing.assert_close(value[rows], plain.state_dict()[name], rtol=1e-5, atol=1e-6)


def one_probe(
    train: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor, rate: float, protocol: LinearProbe
) -> torch.Tensor:
    """Weights (D + 1, 16), bias last, of one classifier trained on `rows` only, in the order of seed 0."""
    features, labels = F.pad(train[0], (0, 1), value=1.0), train[1]
    start = 0.01 * torch.randn(16, train[0].shape[1], generator=generator("probe weights", 0))
    weight = F.pad(start.T, (0, 0, 0, 1)).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=rate, momentum=protocol.momentum)
    for epoch in range(protocol.epochs):
        if epoch in protocol.lr_drops:
            optimizer.param_groups[0]["lr"] *= protocol.lr_drop_factor
        order = torch.randperm(len(labels), generator=generator("probe order", 0, epoch))
        for batch in order.split(protocol.batch_size):
            seen = batch[torch.isin(batch, rows)]
            optimizer.zero_grad()
            F.cross_entropy(features[seen] @ weight, labels[seen]).backward()
            optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(
    "changes",
    [
        # All learning is in the first epoch; without the drop there would be nine more like it.
        {"epochs": 10, "lr": 0.003, "lr_candidates": [0.1], "lr_drops": [1], "lr_drop_factor": 1e-3},
        # Half of train is memorised: a classifier knows the images that it was trained on, and no others.
        {"epochs": 40, "lr": 0.1, "lr_candidates": [0.03], "lr_drops": [], "held_out": 0.5},
    ],
    ids=["drops", "held out"],
)
def test_the_stage_equals_the_protocol_written_out(
    tiny_data: Path,
    encoder_file: Path,
    by_hand: dict[str, tuple[torch.Tensor, torch.Tensor]],
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    experiment = with_protocol("linear", **changes)
    protocol = probe_run(experiment, "random-init", 0, "linear").protocol
    assert isinstance(protocol, LinearProbe)
    metrics = evaluate(experiment, "linear", encoder_file, tiny_data, tmp_path)
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
    # Features computed one by one and in batches differ in their last bits, which can change a prediction.
    assert metrics["top1"] == pytest.approx(accuracy(whole[protocol.lr], val, val_labels), abs=101 / 64)
    if protocol.lr_drops:
        on = one_probe(
            (train, labels), torch.arange(160), protocol.lr, protocol.model_copy(update={"lr_drops": []})
        )
        assert accuracy(on, val, val_labels) > metrics["top1"] + 500 / 64
    # Chosen on the held-out rows; with `held_out`, the images of val would prefer the other rate.
    assert metrics["best_lr"] == max(rates, key=lambda rate: metrics["held_out_top1"][f"{rate:g}"])
    best = accuracy(whole[metrics["best_lr"]], val, val_labels)
    assert metrics["best_lr_top1"] == pytest.approx(best, abs=101 / 64)
    for rate in rates:
        part = one_probe((train, labels), torch.nonzero(~held_out)[:, 0], rate, protocol)
        compared = accuracy(part, train[held_out], labels[held_out])
        image = 100 / int(held_out.sum())
        assert metrics["held_out_top1"][f"{rate:g}"] == pytest.approx(compared, abs=1.01 * image)
        if protocol.held_out == 0.5:
            assert accuracy(whole[rate], train[held_out], labels[held_out]) > compared + 5 * image


def test_a_random_crop_of_a_held_out_row_is_held_out(
    encoder_file: Path, partly_labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every batch of every epoch, wherever rows without a label are."""
    cut: list[torch.Tensor] = []
    marks: list[torch.Tensor] = []
    crops, step = Frozen.random_crops, linear.Probes.step

    def watched_crops(*arguments: Any, **options: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for features, rows in crops(*arguments, **options):
            cut.append(rows)
            yield features, rows

    def watched_step(self: linear.Probes, features: Any, labels: Any, held_out: Any) -> None:
        marks.append(held_out)
        step(self, features, labels, held_out)

    monkeypatch.setattr(Frozen, "random_crops", watched_crops)
    monkeypatch.setattr(linear.Probes, "step", watched_step)
    experiment = with_protocol("linear", min_scale=0.2, held_out=0.5, batch_size=8)
    evaluate(experiment, "linear", encoder_file, partly_labelled, tmp_path)
    labelled = open_dataset(partly_labelled).split("train").labelled
    held_out = labelled[linear.held_out_rows(24, 0.5, seed=0).numpy()]
    assert len(held_out) == 12
    assert len(marks) == len(cut) == 5 * 3
    for rows, found in zip(cut, marks, strict=True):
        assert torch.equal(found, torch.isin(rows, torch.from_numpy(held_out)))


def test_scores_are_top1_and_top5_in_percent() -> None:
    probes = linear.Probes(PROTOCOL, 2, 7, seed=0)
    ranks = torch.arange(7.0)
    for layer in probes.layers:  # every image: class 6 first, then 5, 4, 3, 2; the other way round
        layer.load_state_dict({"weight": torch.zeros(14, 2), "bias": torch.cat([ranks, -ranks])})
    batches = [(torch.zeros(3, 2), torch.tensor([6, 5, 2])), (torch.zeros(1, 2), torch.tensor([1]))]
    assert probes.scores(batches, linear.ALL) == [{"top1": 25.0, "top5": 75.0}] * 2
    assert probes.scores(batches, linear.WITHOUT_HELD_OUT) == [{"top1": 0.0, "top5": 50.0}] * 2


def test_a_classifier_that_diverged_has_no_score() -> None:
    probes = linear.Probes(PROTOCOL, 2, 7, seed=0)
    with torch.no_grad():
        probes.layers[1].bias[3] = math.inf
    scores = probes.scores([(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))], linear.ALL)
    assert math.isfinite(scores[0]["top1"])
    assert math.isnan(scores[1]["top1"])
    assert math.isnan(scores[1]["top5"])


@pytest.mark.parametrize("min_scale", [None, 0.2])
def test_an_untrained_encoder_is_far_above_chance(
    min_scale: float | None, encoder_file: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """16 photographs, 4 patches each: chance is 6.25%."""
    experiment = with_protocol("linear", min_scale=min_scale)
    metrics = evaluate(experiment, "linear", encoder_file, tiny_data, tmp_path)
    assert metrics["top1"] > 12.5
    assert metrics["top1"] <= metrics["top5"] <= 100
    assert metrics["protocol"] == "features-sgd"
    assert set(metrics["held_out_top1"]) == {"0.1", "1"}
    assert metrics["best_lr"] in {0.1, 1.0}


def test_a_probe_that_diverges_stops(
    tiny: Experiment, encoder_file: Path, tiny_data: Path, tmp_path: Path
) -> None:
    experiment = with_protocol("linear", lr=1e38, lr_candidates=[0.1])
    with pytest.raises(NonFiniteError, match=r"diverged at the protocol's learning rate 1e\+38"):
        evaluate(experiment, "linear", encoder_file, tiny_data, tmp_path)


def test_a_learning_rate_that_diverges_is_not_chosen(
    encoder_file: Path, tiny_data: Path, tmp_path: Path
) -> None:
    experiment = with_protocol("linear", lr=0.1, lr_candidates=[1e38])
    metrics = evaluate(experiment, "linear", encoder_file, tiny_data, tmp_path)
    assert metrics["best_lr"] == 0.1
    assert metrics["held_out_top1"]["1e+38"] == -1
    assert metrics["best_lr_top1"] == metrics["top1"] > 0
    assert math.isfinite(metrics["top1"])


@pytest.mark.parametrize(("min_scale", "passes", "uncropped"), [(None, 0, 24), (0.2, 3, 6)])
def test_only_needed_images_are_encoded(
    min_scale: float | None,
    passes: int,
    uncropped: int,
    encoder_file: Path,
    partly_labelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With random crops, uncropped images are needed of val and the held-out part only. Every crop is
    encoded, also of the last batch.
    """
    count, forward = 0, ResNet.forward

    def counted(self: ResNet, images: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += len(images)
        return forward(self, images)

    monkeypatch.setattr(ResNet, "forward", counted)
    protocol = {"min_scale": min_scale, "held_out": 0.25, "batch_size": 10, "epochs": 3, "lr_drops": []}
    evaluate(with_protocol("linear", **protocol), "linear", encoder_file, partly_labelled, tmp_path)
    assert count == passes * 24 + uncropped + 8


def test_standardized_features_have_zero_mean_and_unit_variance() -> None:
    features = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) * 5 + 7
    features[:, 2] = 4.0  # of a unit that is always 0
    later = features.clone()
    later[0, 2] = 5.0
    scaling = linear._Scaling.of(features, PROTOCOL.model_copy(update={"standardize": True}))
    scaled = scaling.apply_(features)
    assert scaled is features
    torch.testing.assert_close(features.mean(0), torch.zeros(3))
    torch.testing.assert_close(features.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]))
    assert scaling.apply_(later)[0, 2] == 1, "a unit that is not 0 later is not scaled up"
    plain = linear._Scaling.of(features, PROTOCOL)
    assert torch.equal(plain.apply_(features.clone()), features)


def test_held_out_rows_are_a_random_share() -> None:
    marks = linear.held_out_rows(100, 0.1, seed=0)
    assert marks.sum() == 10
    assert not torch.equal(marks, linear.held_out_rows(100, 0.1, seed=1))


def test_at_least_one_row_is_held_out_and_the_share_is_rounded() -> None:
    assert [int(linear.held_out_rows(rows, 0.1, seed=0).sum()) for rows in (1, 3, 14, 16, 26)] == [
        1, 1, 1, 2, 3
    ]  # fmt: skip


def test_all_classifiers_start_at_the_same_small_weights() -> None:
    """N(0, 0.01) and no bias, as in facebookresearch/moco main_lincls.py."""
    probes = linear.Probes(PROTOCOL, 50, 4, seed=3)
    expected = 0.01 * torch.randn(4, 50, generator=generator("probe weights", 3))
    assert probes.rates == [0.5, 0.05]
    for layer in probes.layers:
        assert torch.equal(layer.weight, torch.cat([expected, expected]))
        assert not layer.bias.any()


def test_a_checkpoint_needs_the_predicted_bytes() -> None:
    """Weights and momentum."""
    probes = linear.Probes(PROTOCOL, 5, 3, seed=1)
    probes.step(torch.randn(4, 5), torch.arange(4) % 3, torch.zeros(4, dtype=torch.bool))
    momentum = [state["momentum_buffer"] for state in probes.optimizer.state.values()]
    tensors = [*probes.parameters(), *momentum]
    assert sum(each.nbytes for each in tensors) == PROTOCOL.checkpoint_bytes(5, 3)


def test_train_is_encoded_once_or_in_every_epoch_of_crops() -> None:
    assert PROTOCOL.encodings_of_train == 1
    assert PROTOCOL.model_copy(update={"min_scale": 0.2}).encodings_of_train == PROTOCOL.epochs == 4


def test_a_learning_rate_that_drops_after_the_end_is_refused() -> None:
    settings = PROTOCOL.model_dump() | {"lr_drops": [2, 4, 9]}
    with pytest.raises(ValueError, match=r"lr_drops: found \[4, 9\]; the probe trains for only 4 epochs"):
        LinearProbe.model_validate(settings)


def test_a_batch_of_held_out_images_trains_only_the_classifiers_that_see_them() -> None:
    probes = linear.Probes(PROTOCOL.model_copy(update={"momentum": 0.0, "weight_decay": 0.0}), 5, 3, seed=1)
    before = [layer.weight.detach().clone() for layer in probes.layers]
    probes.start_epoch(0)
    probes.step(torch.randn(4, 5), torch.arange(4) % 3, torch.ones(4, dtype=torch.bool))
    for layer, weight in zip(probes.layers, before, strict=True):
        assert not torch.equal(layer.weight[:3], weight[:3])
        assert torch.equal(layer.weight[3:], weight[3:])


def test_the_best_rate_is_chosen_by_held_out_images_and_ties_by_order() -> None:
    scores = [{"top1": top1, "top5": top1 + 9} for top1 in (70.0, 65.0, 80.0)]
    held_out = [{"top1": top1, "top5": 0.0} for top1 in (50.0, 60.0, 60.0)]
    metrics = linear._metrics("linear", PROTOCOL, [0.5, 0.05, 5.0], scores, held_out, 90, 10)
    assert metrics == {
        "top1": 70.0, "top5": 79.0, "protocol": "test", "lr": 0.5, "best_lr": 0.05, "best_lr_top1": 65.0,
        "held_out_top1": {"0.5": 50.0, "0.05": 60.0, "5": 60.0}, "num_train": 90, "num_val": 10,
    }  # fmt: skip
    scores[1]["top1"] = math.nan  # diverged on all of train, not without the held-out images
    metrics = linear._metrics("linear", PROTOCOL, [0.5, 0.05, 5.0], scores, held_out, 90, 10)
    assert (metrics["best_lr"], metrics["best_lr_top1"]) == (5.0, 80.0)
    assert metrics["held_out_top1"] == {"0.5": 50.0, "0.05": -1.0, "5": 60.0}


@pytest.mark.parametrize("num_classes", [5, 6])
def test_top5_is_reported_with_more_than_five_classes(num_classes: int) -> None:
    splits = {"train": clusters(num_classes, 10), "val": clusters(num_classes, 4, seed=1)}
    metrics = linear.evaluate(frozen_features(num_classes, **splits), PROTOCOL)
    assert ("top5" in metrics) == (num_classes == 6)
    assert (metrics["num_train"], metrics["num_val"]) == (10 * num_classes, 4 * num_classes)
    right = metrics["predicted"] == splits["val"][1]
    assert metrics["top1"] == pytest.approx(100 * float(right.double().mean()), abs=1e-4)
