"""Every step of a run compared with the same step written from the papers, without the package's loop."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mochi.config import Contrastive, PretrainRun, pretrain_run
from mochi.contrast.moco import MoCo
from mochi.contrast.negatives import hardest, mix_pairs, mix_with_query
from mochi.contrast.rules.mochi import MoCHi
from mochi.data.format import open_dataset
from mochi.data.views.loading import Loading, Views, two_views
from mochi.pretraining import stage
from mochi.runtime.seeding import generator
from mochi.storage import checkpoint
from tests.pretraining.runs import train
from tests.reference import mochi_loss, synthetic_vectors
from tests.tiny import MOCHI, with_recipe

METRICS = ("loss", "accuracy", "accuracy_with_synthetics", "feature_std")
STEPS = 5
"""Steps in an epoch: 160 images in batches of 32."""


class Snapshots:
    """Keeps a checkpoint after every step instead of replacing it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tensors: list[dict[str, Tensor]] = []
        self.states: list[dict[str, Any]] = []
        self._save = checkpoint.save
        monkeypatch.setattr(stage.checkpoint, "save", self.save)

    def save(
        self, path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], identity: Any
    ) -> None:
        self.tensors.append({name: tensor.clone() for name, tensor in tensors.items()})
        self.states.append(dict(state))
        self._save(path, tensors, state, identity)

    def metrics(self, step: int) -> list[float]:
        """The metrics of one step, from the sums over the epoch."""
        state, first = self.states[step], step % STEPS == 0
        total = state["sums"] or [STEPS * state["rows"][-1][name] for name in METRICS]
        before = [0.0] * len(METRICS) if first else self.states[step - 1]["sums"]
        return [float(a - b) for a, b in zip(total, before, strict=True)]


def plain_step(
    run: PretrainRun, moco: MoCo, velocities: list[Tensor], batch: Views, step: int
) -> tuple[list[float], list[Tensor]]:
    """One step of MoCo with MoCHi's synthetics and SGD, in place; returns `METRICS` and the new
    velocities.
    """
    recipe = run.recipe
    assert isinstance(recipe, Contrastive)
    mixing = recipe.negatives.make()
    assert isinstance(mixing, MoCHi)
    epoch = step // STEPS
    lr = recipe.lr * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
    weights = list(moco.query_encoder.parameters())
    query = F.normalize(moco.query_encoder(batch.query), dim=-1)
    with torch.no_grad():
        for ours, theirs in zip(moco.momentum_encoder.parameters(), weights, strict=True):
            ours.copy_(recipe.key_momentum * ours + (1 - recipe.key_momentum) * theirs)
        order = torch.randperm(len(query), generator=generator("shuffle keys", run.seed, step))
        key = torch.empty_like(query)
        key[order] = F.normalize(moco.momentum_encoder(batch.key[order]), dim=-1)
    queue, vectors = moco.queue.keys.clone(), []
    if epoch >= mixing.warmup_epochs:
        similarity = query.detach() @ queue.T
        mixes = generator("mix negatives", run.seed, step, 0)
        pool = hardest(similarity, mixing.num_hardest)
        pairs = mix_pairs(queue, pool, mixing.num_pair_synthetics, mixes)
        own = mix_with_query(similarity, pool, mixing.num_query_synthetics, mixes)
        vectors = [synthetic_vectors(query.detach(), queue, each) for each in (pairs, own)]
    loss = mochi_loss(query, key, queue, recipe.temperature, vectors)
    right, right_with_synthetics, q = 0, 0, query.detach()
    for index, own_key in enumerate(key):
        real = max(float(q[index] @ negative) for negative in queue)
        synthetic = max((float(q[index] @ h) for each in vectors for h in each[index]), default=-1.0)
        right += float(q[index] @ own_key) > real
        right_with_synthetics += float(q[index] @ own_key) > max(real, synthetic)
    spread = sum(float(column.std()) for column in q.T) / q.shape[1]
    metrics = [loss.item(), right / len(query), right_with_synthetics / len(query), spread]
    gradients = torch.autograd.grad(loss, weights)
    with torch.no_grad():
        velocities = [
            recipe.momentum * velocity + gradient + recipe.weight_decay * weight
            for velocity, gradient, weight in zip(velocities, gradients, weights, strict=True)
        ]
        for weight, velocity in zip(weights, velocities, strict=True):
            weight.sub_(lr * velocity)
        oldest = step * len(key) % len(queue)
        moco.queue.keys[torch.arange(oldest, oldest + len(key)) % len(queue)] = key
    return metrics, velocities


def test_every_step_equals_the_papers(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch without mixing and one with it: metrics, both encoders, velocities and queue.

    Each step starts from the state of the run before it: over several steps, a rounding difference in one
    activation near zero grows without bound.
    """
    experiment = with_recipe(precision="float32", weight_decay=0.05, checkpoint_minutes=1e-9)
    found = Snapshots(monkeypatch)
    train(experiment, tiny_data, tmp_path)
    assert len(found.tensors) == 2 * STEPS

    run = pretrain_run(experiment, MOCHI, 0)
    assert isinstance(run.recipe, Contrastive)
    moco = MoCo(run.encoder, run.recipe, run.seed)
    moco.to(memory_format=torch.channels_last)
    velocities = [torch.zeros_like(weight) for weight in moco.query_encoder.parameters()]
    split, loading = open_dataset(tiny_data).split("train"), Loading(32, torch.device("cpu"))
    step = 0
    for epoch in range(2):
        for batch in two_views(split, run.augmentation, loading, seed=run.seed, epoch=epoch):
            metrics, velocities = plain_step(run, moco, velocities, batch, step)
            assert found.metrics(step) == pytest.approx(metrics, rel=1e-5, abs=1e-6), step
            after = found.tensors[step]
            expected = {f"module.{name}": value for name, value in moco.named_parameters()}
            expected |= {
                f"optimizer.{index}.momentum_buffer": value for index, value in enumerate(velocities)
            }
            expected["module.queue.keys"] = moco.queue.keys
            for name, value in expected.items():
                torch.testing.assert_close(
                    after[name], value, rtol=1e-4, atol=1e-5, msg=f"step {step}: {name}"
                )
            moco.load_state_dict(
                {
                    name.removeprefix("module."): value
                    for name, value in after.items()
                    if name.startswith("module.")
                }
            )
            velocities = [after[f"optimizer.{index}.momentum_buffer"] for index in range(len(velocities))]
            step += 1
