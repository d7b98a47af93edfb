"""The fit compared with scikit-learn's, subsets counted, and the stage compared with its protocol."""

from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from mochi.config import ConfigError, parse_experiment
from mochi.evaluation.tasks import few_label
from mochi.runtime.seeding import generator
from tests.evaluation.runs import clusters, evaluate, frozen_features
from tests.tiny import changed

SETTINGS = {"task": "few_label", "images_per_class": 3, "samples": 2, "l2": 0.5}


@pytest.mark.parametrize("l2", [0.01, 1.0])
def test_the_fit_equals_scikit_learns(l2: float) -> None:
    draws = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(40, 6, generator=draws, dtype=torch.float64))
    labels = torch.randint(4, (40,), generator=draws) * 2  # classes 1, 3 and 5 have no image
    weight, bias = few_label.fit(features, labels, 7, l2)
    other = LogisticRegression(C=1 / l2, tol=1e-8, max_iter=10_000).fit(features.numpy(), labels.numpy())
    present = torch.tensor([0, 2, 4, 6])
    torch.testing.assert_close(weight[present], torch.from_numpy(other.coef_), rtol=1e-3, atol=1e-4)
    shift = torch.from_numpy(other.intercept_) - bias[present]
    torch.testing.assert_close(shift, shift.mean().expand(4), rtol=0, atol=1e-3)
    assert (bias[[1, 3, 5]] == -torch.inf).all(), "a class without images is never predicted"


def test_the_fit_is_the_optimum() -> None:
    """Features whose scales differ tenfold: no derivative of the mean loss is above 1e-6."""
    draws = torch.Generator().manual_seed(0)
    raw = torch.randn(40, 8, generator=draws, dtype=torch.float64) * torch.logspace(0, -1, 8)
    features, labels = F.normalize(raw, dim=-1), torch.randint(3, (40,), generator=draws)
    weight, bias = (each.requires_grad_() for each in few_label.fit(features, labels, 3, l2=0.01))
    loss = F.cross_entropy(features @ weight.T + bias, labels) + 0.01 / 2 / 40 * weight.square().sum()
    for derivative in torch.autograd.grad(loss, (weight, bias)):
        assert derivative.abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"percent": 10}, [5, 1, 2]),
        ({"percent": 1}, [1, 1, 1]),
        ({"percent": 100}, [50, 4, 20]),
        ({"images_per_class": 5}, [5, 4, 5]),
    ],
)
def test_subsets_are_stratified_and_random(size: dict[str, int], expected: list[int]) -> None:
    labels = torch.arange(3).repeat_interleave(torch.tensor([50, 4, 20]))
    task = few_label.FewLabel(task="few_label", **size)
    rows = task.subset(labels, generator("few labels", 0))
    assert labels[rows].bincount().tolist() == expected
    assert rows.unique().equal(rows)
    assert task.subset(labels, generator("few labels", 0)).equal(rows)
    if size.get("percent") != 100:
        assert not task.subset(labels, generator("few labels", 1)).equal(rows)


@pytest.mark.parametrize(("count", "percent", "expected"), [(15, 10, 2), (2000, 10, 200)])
def test_a_share_of_a_class_is_rounded(count: int, percent: float, expected: int) -> None:
    task = few_label.FewLabel(task="few_label", percent=percent)
    labels = torch.zeros(count, dtype=torch.long)
    assert len(task.subset(labels, generator("few labels", 0))) == expected


def test_the_stage_equals_the_protocol_written_out(
    tiny_data: Path,
    encoder_file: Path,
    by_hand: dict[str, tuple[torch.Tensor, torch.Tensor]],
    tmp_path: Path,
) -> None:
    experiment = parse_experiment(changed("evaluation/few", SETTINGS), "tiny")
    metrics = evaluate(experiment, "few", encoder_file, tiny_data, tmp_path)
    (train, labels), (val, val_labels) = by_hand["train"], by_hand["val"]
    expected = []
    for sample in range(2):
        order = torch.randperm(160, generator=generator("few labels", sample))
        rows = torch.cat([order[labels[order] == label][:3] for label in range(16)])
        model = LogisticRegression(C=2.0, tol=1e-6, max_iter=10_000)
        model.fit(F.normalize(train[rows]).double().numpy(), labels[rows].numpy())
        expected.append(100 * float(model.score(F.normalize(val).double().numpy(), val_labels.numpy())))
    image = 100 / 64  # features computed one by one and in batches differ in their last bits
    assert metrics["samples_top1"] == pytest.approx(expected, abs=1.01 * image)
    assert metrics["top1"] == pytest.approx(sum(metrics["samples_top1"]) / 2, abs=1e-3)
    first, second = metrics["samples_top1"]
    assert metrics["top1_std"] == pytest.approx(abs(first - second) / 2**0.5, abs=1e-3)
    assert metrics["top1"] > 12.5, "far above chance, 6.25%"
    assert metrics["top1"] <= metrics["top5"] <= 100
    assert (metrics["num_train"], metrics["num_val"]) == (48, 64)


def test_one_image_of_one_class_is_enough(
    encoder_file: Path, partly_labelled: Path, tmp_path: Path
) -> None:
    few = {"task": "few_label", "images_per_class": 1, "samples": 1}
    experiment = parse_experiment(changed("evaluation/few", few), "tiny")
    metrics = evaluate(experiment, "few", encoder_file, partly_labelled, tmp_path)
    assert metrics["num_train"] == 2
    assert "top5" not in metrics, "there are two classes"
    assert "top1_std" not in metrics, "one subset has no standard deviation"


@pytest.mark.parametrize(
    ("few", "message"),
    [
        ({}, "found percent = None, images_per_class = None; give one of the two"),
        ({"percent": 1, "images_per_class": 2}, "found percent = 1.0, images_per_class = 2; give one of"),
        ({"percent": 0}, "evaluation.few.percent: found 0; allowed: "),
        ({"percent": 101}, "evaluation.few.percent: found 101; allowed: "),
        (
            {"percent": 1, "sample": 2},
            "evaluation.few.sample: unknown key 'sample'; did you mean 'samples'?",
        ),
    ],
)
def test_invalid_subset_sizes_are_refused(few: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_experiment(changed("evaluation/few", {"task": "few_label", **few}), "x.yaml")
    assert message in str(error.value)


def test_accuracies_are_top1_and_top5_in_percent() -> None:
    """Of seven classes, every image is ranked 6, 5, 4, 3, 2, 1, 0."""
    weight, bias = torch.zeros(7, 2), torch.arange(7.0)
    found = few_label._accuracies(torch.zeros(4, 2), torch.tensor([6, 5, 2, 1]), weight, bias)
    assert found == {"top1": 25.0, "top5": 75.0}
    many = few_label._accuracies(torch.zeros(5000, 2), torch.arange(5000) % 7, weight, bias)
    assert many == {"top1": 100 * 714 / 5000, "top5": 100 * 3570 / 5000}


@pytest.mark.parametrize("num_classes", [5, 6])
def test_top5_is_reported_with_more_than_five_classes(num_classes: int) -> None:
    splits = {"train": clusters(num_classes, 4), "val": clusters(num_classes, 10, seed=1)}
    task = few_label.FewLabel(task="few_label", images_per_class=2, samples=2)
    metrics = task.evaluate(frozen_features(num_classes, **splits))
    assert ("top5" in metrics) == (num_classes == 6)
    assert (metrics["num_train"], metrics["num_val"]) == (2 * num_classes, 10 * num_classes)
    assert metrics["top1"] == pytest.approx(sum(metrics["samples_top1"]) / 2, abs=1e-4)


def test_the_length_of_features_does_not_matter() -> None:
    splits = {"train": clusters(4, 6), "val": clusters(4, 20, seed=1)}
    scaled = {
        name: (values * torch.rand(len(values), 1), labels) for name, (values, labels) in splits.items()
    }
    task = few_label.FewLabel(task="few_label", images_per_class=3, samples=3)
    one, other = (task.evaluate(frozen_features(4, **each)) for each in (splits, scaled))
    assert one == other
    assert 25 < one["top1"] < 100
