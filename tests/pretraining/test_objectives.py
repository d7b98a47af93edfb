"""What objectives measure and how they start; `test_loop.py` compares the steps."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mochi.config import Supervised, parse_experiment, pretrain_run
from mochi.data.format import open_dataset
from mochi.data.views.loading import Loading
from mochi.pretraining import objectives
from mochi.pretraining.objectives import ContrastiveObjective, SupervisedObjective, make_objective
from tests.tiny import MOCHI, changed, with_recipe


def test_shares_of_all_ranks_count_labelled_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 labelled queries here with a share of 1/3, 1 on the other rank with 1: together 2 of 4.

    `false_parents_any` was measured here only, and `false_parents_all` nowhere.
    """
    other = torch.tensor([[1, 0, 0], [1, 0, 0]], dtype=torch.float64)

    def mean(tensor: Tensor) -> Tensor:
        return (tensor + other) / 2

    monkeypatch.setattr(objectives, "world_size", lambda: 2)
    monkeypatch.setattr(objectives, "mean_over_ranks", mean)
    labels = torch.tensor([0, 5, -1, 2, -1])
    shares = objectives._of_all_ranks({"false_negatives": 1 / 3, "false_parents_any": 2 / 3}, labels)
    assert shares == pytest.approx({"false_negatives": 0.5, "false_parents_any": 2 / 3})


def test_masks_know_the_images_and_labels_of_the_queue(tiny_data: Path) -> None:
    run = pretrain_run(with_recipe(masks=["same_image"]), MOCHI, 0)
    objective = make_objective(run, open_dataset(tiny_data))
    assert isinstance(objective, ContrastiveObjective)
    batch = next(objective.batches(Loading(32, torch.device("cpu")), 0, 0))
    objective.loss(batch, 0, 0)
    objective.after_update(last_of_epoch=False)
    queue = objective._moco.queue
    assert torch.equal(queue.images[:32], batch.indices)
    assert torch.equal(queue.labels[:32], batch.labels)
    objective.loss(batch, 0, 1)
    step = objective._step
    assert step is not None
    assert step.excluded is not None
    expected = torch.zeros(32, len(queue.keys), dtype=torch.bool)
    expected[range(32), range(32)] = True
    assert torch.equal(step.excluded, expected)


def supervised(data: Path, seed: int = 0) -> SupervisedObjective:
    content = changed("methods/supervised", {"objective": "supervised", "seeds": [seed]})
    run = pretrain_run(parse_experiment(content, "tiny"), "supervised", seed)
    assert isinstance(run.recipe, Supervised)
    return SupervisedObjective(run, run.recipe, open_dataset(data).split("train"), 16)


def test_the_supervised_loss_and_accuracy_are_those_of_the_logits(tiny_data: Path) -> None:
    objective = supervised(tiny_data)
    batch = next(objective.batches(Loading(48, torch.device("cpu")), 0, 0))
    objective.module.eval()  # so that a second pass gives the same logits
    logits = objective.module(batch.images).detach().double()
    labels = batch.labels.where(torch.arange(48) >= 12, logits.argmax(1))  # 12 are right, or more
    loss, metrics = objective.loss(replace(batch, labels=labels), 0, 0)
    expected, right = 0.0, 0
    for row, label in zip(logits, labels.tolist(), strict=True):
        expected -= float(row[label] - row.exp().sum().log()) / 48
        right += int(row.argmax()) == label
    assert 12 <= right < 48
    assert [loss.item(), *metrics.tolist()] == pytest.approx([expected, expected, right / 48], rel=1e-6)


def test_a_supervised_start_depends_on_its_seed_alone(tiny_data: Path) -> None:
    before = torch.get_rng_state()
    one, again, other = (list(supervised(tiny_data, seed).module.parameters()) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, one, again))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[-2], other[-2])


def test_supervised_batches_have_labelled_images_of_their_epoch_and_step(partly_labelled: Path) -> None:
    objective, loading = supervised(partly_labelled), Loading(16, torch.device("cpu"))
    split = open_dataset(partly_labelled).split("train")
    assert objective.num_images == len(split.labelled) < len(split)
    steps = objective.num_images // 16
    whole = [next(batches) for batches in [objective.batches(loading, 0, 0)] for _ in range(2 * steps)]
    assert all((batch.labels >= 0).all() for batch in whole)
    later = next(objective.batches(loading, 1, 0))
    assert torch.equal(later.indices, whole[steps].indices)
    assert torch.equal(later.images, whole[steps].images)
    middle = next(objective.batches(loading, 0, steps - 1))
    assert torch.equal(middle.images, whole[steps - 1].images)
    assert not np.array_equal(whole[0].indices, later.indices)
