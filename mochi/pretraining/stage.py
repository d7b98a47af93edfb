"""The pretraining stage: from a data set to `encoder.safetensors`.

One loop trains MoCo, MoCHi and the supervised ceiling; what a step computes stands in
`MoCo.training_step` (contrast/moco.py). Everything random is a function of (seed, step) or
(seed, epoch, image), so the state to save is tensors and a position, and a run killed at any moment ends
with the bytes of one that was not.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import get_total_norm

from mochi.config import Contrastive, Run, Training, Untrained, settings
from mochi.data.format import open_dataset
from mochi.data.views.loading import steps_per_epoch
from mochi.encoders.resnet import ResNet
from mochi.pretraining.objectives import Learner, make_learner, queue_warning
from mochi.provenance.fingerprint import code_digest, file_digest
from mochi.provenance.record import Stopwatch, record
from mochi.runtime.distributed import (
    average_gradients,
    mean_over_ranks,
    pick_device,
    process_group,
    rank,
    world_size,
)
from mochi.runtime.precision import autocast, make_deterministic, use_bfloat16
from mochi.runtime.progress import Progress, check_finite, write_events
from mochi.storage import checkpoint
from mochi.storage.atomic import replacing, write_json

logger = logging.getLogger(__name__)

STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 20}
"""Steps from one look at the loss to the next: it waits for the device, so a GPU is asked less often.

Only what was looked at is saved, so that a checkpoint is always one to go on from.
"""


@dataclass
class Position:
    """Where a training stands; with the tensors, all there is to resume from."""

    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    sums: list[float] = field(default_factory=list)
    """Sums of the metrics over those steps, a mean over ranks."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One for each finished epoch: metrics.csv."""
    matching: list[dict[str, float]] = field(default_factory=list)
    """Rows of matching.csv."""
    code: list[str] = field(default_factory=list)
    """Digests of the code that worked on it; more than one if it changed between two resumes."""
    wall_seconds: float = 0.0
    """Time of the sessions before this one, up to their last checkpoint."""

    def spent(self, watch: Stopwatch) -> dict[str, float]:
        """Time of all sessions, for the checkpoint and the provenance."""
        return {"wall_seconds": round(self.wall_seconds + watch.seconds(), 3)}


def run(
    run: Run, data: Path, out: Path, work: Path, *, workers: int = 0, events: Path | None = None
) -> None:
    """Train the run's encoder and write it with its metrics and provenance.

    Args:
        run: what to train.
        data: folder of the prepared data set.
        out: receives encoder.safetensors, metrics.csv, matching.csv, provenance.json.
        work: holds the resume checkpoint; removed at the end.
        workers: processes that load images.
        events: folder for TensorBoard events; None: none.

    Raises:
        DataError: no data, or a batch larger than the data set.
        CheckpointError: the checkpoint in `work` is of another run or other data, or the disk is full.
        NonFiniteError: a loss or the parameters are no finite numbers.
    """
    watch = Stopwatch()
    assert run.pretrain is not None
    device = pick_device()
    make_deterministic()
    saved = work / "pretrain.safetensors"
    with process_group(device):
        position = Position(code=[code_digest(__name__)])
        if isinstance(run.pretrain, Untrained):
            torch.manual_seed(run.seed)
            encoder = ResNet(run.encoder)
        else:
            learner = make_learner(run, open_dataset(data))
            if isinstance(run.pretrain, Contrastive) and (
                text := queue_warning(run.pretrain, learner.num_images)
            ):
                logger.warning("warning: %s", text)
            learner.module.to(device).to(memory_format=torch.channels_last)
            manifest = file_digest(data / "manifest.json")
            training = _Training(run, run.pretrain, learner, device, saved, manifest, watch)
            loading = {"batch_size": run.pretrain.batch_size, "seed": run.seed, "device": device}
            loading |= {"workers": workers, "rank": rank(), "world_size": world_size()}
            training.train(loading, events)
            position, encoder = training.position, learner.backbone
        if rank() == 0:
            _write_products(run, encoder, position, data, out, watch)
            checkpoint.discard(saved)


class _Training:
    """A learner on its way from its position to its last epoch."""

    def __init__(
        self,
        run: Run,
        recipe: Training,
        learner: Learner,
        device: torch.device,
        saved: Path,
        manifest: str,
        watch: Stopwatch,
    ) -> None:
        self._recipe, self._learner, self._device, self._saved = recipe, learner, device, saved
        self._watch = watch
        self._label = f"{run.method} seed {run.seed}"
        self._identity = {
            "experiment": run.experiment,
            "method": run.method,
            **settings(run, "pretrain"),
            "manifest.json": manifest,
        }
        self._num_steps = steps_per_epoch(learner.num_images, recipe.batch_size)
        self._optimizer = torch.optim.SGD(
            [parameter for parameter in learner.module.parameters() if parameter.requires_grad],
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            foreach=True,
        )
        self.position = self._resume()
        self._last_save = time.monotonic()

    def train(self, loading: dict[str, Any], events: Path | None) -> None:
        """Every epoch that is left."""
        position, num_steps = self.position, self._num_steps
        self._learner.module.train()
        done = position.epoch * num_steps + position.step
        with Progress(self._label, self._recipe.epochs * num_steps, done) as progress:
            while position.epoch < self._recipe.epochs:
                lr = learning_rate(self._recipe, position.epoch)
                for group in self._optimizer.param_groups:
                    group["lr"] = lr
                clock = _Clock(self._recipe.batch_size)
                batches = self._learner.batches(position.epoch, position.step, **loading)
                sums = self._steps(clock.timed(batches), lr, progress)
                self._close_epoch(sums, lr, clock.speed())
                self._save()
                if rank() == 0:
                    write_events(events, position.rows[-1])

    def _steps(self, batches: Iterator[Any], lr: float, progress: Progress) -> Tensor:
        """The steps that are left of this epoch; returns the sums of the epoch's metrics."""
        position = self.position
        names = self._learner.metric_names
        sums = torch.tensor(position.sums or [0.0] * len(names), dtype=torch.float64, device=self._device)
        note = f"epoch {position.epoch}"
        for batch in batches:
            step = position.epoch * self._num_steps + position.step
            with autocast(self._device, self._recipe.precision):
                loss, metrics = self._learner.loss(batch, position.epoch, step)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(self._learner.module.parameters())
            self._optimizer.step()
            position.step += 1
            last = position.step == self._num_steps
            self._learner.after_update(last_of_epoch=last)
            sums += metrics
            if position.step % STEPS_BETWEEN_LOOKS[self._device.type] == 0 or last:
                sums = self._look(sums, step, lr)
                note = f"epoch {position.epoch}, loss {sums[0].item() / position.step:.3f}"
            progress.advance(note)
        return sums

    def _look(self, sums: Tensor, step: int, lr: float) -> Tensor:
        """Stop if all is not well, else save if it is time; returns the mean of the sums over the ranks.

        Every rank goes on from that mean: they stop together, and resume from what rank 0 saved.
        """
        position = self.position
        sums = mean_over_ranks(sums)
        norm = get_total_norm(self._learner.module.parameters()).item()
        check_finite(sums[0].item(), step=step, lr=lr, last_good=self._saved, norm=norm)
        due = time.monotonic() - self._last_save > 60 * self._recipe.checkpoint_minutes
        if due and position.step < self._num_steps:
            position.sums = sums.tolist()
            self._save()
        return sums

    def _close_epoch(self, sums: Tensor, lr: float, speed: dict[str, float]) -> None:
        """Append the epoch's row and move to the beginning of the next epoch."""
        position = self.position
        means = (sums / self._num_steps).tolist()
        metrics = dict(zip(self._learner.metric_names, means, strict=True))
        described = self._learner.describe_epoch(position.epoch, metrics)
        row = {"epoch": position.epoch, "lr": lr, **metrics, **described, **speed}
        position.rows.append(row)
        for place, probability in enumerate(self._learner.matching(position.epoch)):
            position.matching.append({"epoch": position.epoch, "place": place, "probability": probability})
        logger.info(
            "%s epoch %d: loss %.3f (chance %.3f), accuracy %.3f, %.0f images/s, %s",
            self._label,
            position.epoch,
            row["loss"],
            row["chance"],
            row["accuracy"],
            row["images_per_second"],
            row["verdict"],
        )
        position.epoch, position.step, position.sums = position.epoch + 1, 0, []

    def _save(self) -> None:
        if rank() == 0:
            tensors = checkpoint.pack(self._learner.module, self._optimizer)
            state = asdict(self.position) | self.position.spent(self._watch)
            checkpoint.save(self._saved, tensors, state, self._identity)
        self._last_save = time.monotonic()

    def _resume(self) -> Position:
        """The checkpoint's position with its tensors put back, or the beginning."""
        code = code_digest(__name__)
        found = checkpoint.load(self._saved, self._identity)
        if found is None:
            return Position(code=[code])
        tensors, state = found
        checkpoint.unpack(tensors, self._learner.module, self._optimizer)
        position = Position(**state)
        logger.info(
            "%s resumes at epoch %d, step %d of %d",
            self._label, position.epoch, position.step, self._num_steps,
        )  # fmt: skip
        if code not in position.code:
            logger.warning("the code changed since the checkpoint was written; provenance.json says so")
            position.code.append(code)
        return position


class _Clock:
    """Speed of an epoch and the share of it spent waiting for data."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size, self._batches, self._waited = batch_size, 0, 0.0
        self._start = time.monotonic()

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, counted and their waiting measured."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - asked
            if batch is None:
                return
            self._batches += 1
            yield batch

    def speed(self) -> dict[str, float]:
        """Columns of metrics.csv; of the part of the epoch that this process did."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        return {
            "images_per_second": round(self._batches * self._batch_size / elapsed, 1),
            "data_wait": round(self._waited / elapsed, 4),
        }


def learning_rate(recipe: Training, epoch: int) -> float:
    """The epoch's learning rate (facebookresearch/moco main_moco.py, `adjust_learning_rate`)."""
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * epoch / recipe.epochs))
    drops = sum(epoch >= share * recipe.epochs for share in (0.6, 0.8))
    return recipe.lr * 0.1**drops


def _write_products(
    run: Run, encoder: ResNet, position: Position, data: Path, out: Path, watch: Stopwatch
) -> None:
    weights = {name: tensor.cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    with replacing(out / "encoder.safetensors") as temporary:
        # One key alone: the order of several is not the same from one process to the next.
        save_file(weights, temporary, {"format": "pt"})
    with replacing(out / "metrics.csv") as temporary:
        pd.DataFrame(position.rows, columns=None if position.rows else ["epoch"]).to_csv(
            temporary, index=False
        )
    with replacing(out / "matching.csv") as temporary:
        columns = ["epoch", "place", "probability"]
        pd.DataFrame(position.matching, columns=columns).to_csv(temporary, index=False)
    recipe = run.pretrain
    bfloat16 = isinstance(recipe, Training) and use_bfloat16(pick_device(), recipe.precision)
    provenance = record(
        "pretrain",
        run,
        __name__,
        {"data": data / "manifest.json"},
        watch,
        precision="bfloat16" if bfloat16 else "float32",
        world_size=world_size(),
        code_digests=position.code,
        **position.spent(watch),
    )
    write_json(out / "provenance.json", provenance)
