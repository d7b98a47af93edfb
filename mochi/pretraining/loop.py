"""The training loop of every objective: MoCo, MoCHi, other rules of negatives, the supervised upper bound.

Everything random is a function of (seed, step) or (seed, epoch, image), so the saved state is tensors and
a position: a run killed at any moment ends with the same bytes as an uninterrupted one.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch

from mochi.config import Training
from mochi.data.views.loading import Loading, steps_per_epoch
from mochi.pretraining.objectives import Objective
from mochi.pretraining.optimizers import learning_rate
from mochi.runtime.distributed import AveragedGradients, average_statistics, mean_over_ranks
from mochi.runtime.monitoring import CHECK_INTERVAL
from mochi.runtime.precision import autocast
from mochi.runtime.transfer import to_device


@dataclass
class TrainState:
    """The position of a training run; with the tensors, the complete resume state."""

    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    sums: list[float] = field(default_factory=list)
    """Sums of the metrics over those steps, averaged over ranks."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One for each finished epoch: metrics.csv."""
    matching: list[dict[str, float]] = field(default_factory=list)
    """Rows of matching.csv."""
    code: list[str] = field(default_factory=list)
    """Digests of the code that ran; more than one if it changed between two resumes."""
    wall_seconds: float = 0.0
    """Time of earlier sessions, up to their last checkpoint."""


class Observer(Protocol):
    """Observes a training run: progress, checkpoints, logs. It does not change numbers."""

    def step_done(self, state: TrainState) -> None:
        """After every step."""

    def check(self, state: TrainState, step: int, lr: float) -> None:
        """After some steps, when `state.sums` is up to date.

        Raises:
            NonFiniteError: the loss or the parameters are NaN or Inf.
        """

    def epoch_done(self, state: TrainState) -> None:
        """After every epoch, when its row has been appended."""


def train(
    objective: Objective,
    recipe: Training,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    loading: Loading,
    observer: Observer,
) -> None:
    """Train from `state` to the last epoch.

    Args:
        objective: the module to train and its loss.
        recipe: epochs, learning rate, precision.
        optimizer: over the module's parameters.
        state: where to start; updated in place.
        loading: device, batch size, workers and ranks.
        observer: notified of steps, checks and epochs.
    """
    device = loading.device
    num_steps = steps_per_epoch(objective.num_images, recipe.batch_size)
    objective.module.train()
    gradients = AveragedGradients(objective.module.parameters())
    # One stream over all epochs, so that the loading workers continue across epochs.
    batches = objective.batches(loading, state.epoch, state.step)
    while state.epoch < recipe.epochs:
        zeros = [0.0] * len(objective.metric_names)
        sums = to_device(torch.tensor(state.sums or zeros, dtype=torch.float64), device)
        clock = _Clock(recipe.batch_size)
        for batch in clock.timed(islice(batches, num_steps - state.step)):
            step = state.epoch * num_steps + state.step
            lr = learning_rate(recipe, state.epoch, (state.step + 1) / num_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with autocast(device, recipe.precision):
                loss, metrics = objective.loss(batch, state.epoch, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            gradients.wait()
            optimizer.step()
            state.step += 1
            is_last = state.step == num_steps
            objective.after_update(last_of_epoch=is_last)
            sums += metrics
            if state.step % CHECK_INTERVAL[device.type] == 0 or is_last:
                # Ranks continue from the same sums and statistics, because only rank 0 saves them.
                sums = mean_over_ranks(sums)
                average_statistics(objective.module)
                state.sums = sums.tolist()
                observer.check(state, step, lr)
            observer.step_done(state)
        _close_epoch(objective, state, num_steps, optimizer.param_groups[0]["lr"], clock.speed())
        observer.epoch_done(state)


def _close_epoch(
    objective: Objective, state: TrainState, num_steps: int, lr: float, speed: dict[str, float]
) -> None:
    """Append the epoch's rows and move to the beginning of the next epoch."""
    means = [total / num_steps for total in state.sums]
    metrics = dict(zip(objective.metric_names, means, strict=True))
    described = objective.describe_epoch(state.epoch)
    state.rows.append({"epoch": state.epoch, "lr": lr, **metrics, **described, **speed})
    state.matching += [
        {"epoch": state.epoch, "rank": rank, "probability": probability}
        for rank, probability in enumerate(objective.matching(state.epoch), start=1)
    ]
    state.epoch, state.step, state.sums = state.epoch + 1, 0, []


class _Clock:
    """Speed of an epoch and the fraction of it spent waiting for data."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size, self._batches, self._waited = batch_size, 0, 0.0
        self._start = time.monotonic()

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, counted, with the waiting time measured."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - asked
            if batch is None:
                return
            self._batches += 1
            yield batch

    def speed(self) -> dict[str, float]:
        """Columns of metrics.csv, for the part of the epoch that this process computed."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        return {
            "images_per_second": round(self._batches * self._batch_size / elapsed, 1),
            "data_wait": round(self._waited / elapsed, 4),
        }
