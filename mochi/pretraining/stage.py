"""The pretraining stage: from a data set to an encoder, its metrics and its provenance."""

import logging
import shutil
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import get_total_norm

from mochi.config import Contrastive, FromFile, PretrainRun, Training
from mochi.data.format import open_dataset
from mochi.data.views.loading import Loading, Views, steps_per_epoch
from mochi.encoders import build_untrained
from mochi.encoders.backbone import Backbone
from mochi.encoders.files import EncoderInfo, load_encoder, save_encoder, write_tensors
from mochi.pixels import IMAGENET_MEAN, IMAGENET_STD
from mochi.pretraining.loop import TrainState, train
from mochi.pretraining.objectives import Objective, make_objective
from mochi.pretraining.optimizers import make_optimizer
from mochi.provenance.fingerprint import file_digest
from mochi.provenance.record import Stopwatch, write_record
from mochi.provenance.wanted import Result
from mochi.runtime.distributed import pick_device, process_group, rank, world_size
from mochi.runtime.job_status import report
from mochi.runtime.monitoring import check_finite, training_status
from mochi.runtime.precision import make_deterministic, use_bfloat16
from mochi.runtime.progress import Progress
from mochi.runtime.shares import warn_without_workers
from mochi.runtime.tensorboard import write_events, write_picture, write_step
from mochi.storage import checkpoint
from mochi.storage.atomic import publishing, require_space, write_rows

logger = logging.getLogger(__name__)

_POINTS = 10
"""Points per epoch in TensorBoard."""
_EXAMPLES = 8
"""Images whose views TensorBoard shows."""


def run(
    run: PretrainRun, result: Result, work: Path, *, workers: int = 0, events: Path | None = None
) -> None:
    """Train the encoder, or take it from a file, and publish it with its metrics and provenance.

    Args:
        run: what to train.
        result: receives encoder.safetensors, head.safetensors (no tensors without a contrastive loss),
            metrics.csv, matching.csv and provenance.json; its input `data` is the manifest of the prepared
            data set, its input `encoder` the file of a row with `objective: file`.
        work: folder of the resume checkpoint; removed at the end.
        workers: processes that load images.
        events: folder for TensorBoard events; None: none.

    Raises:
        DataError: no data, or a batch larger than the data set.
        EncoderError: the file of a row with `objective: file` cannot be read, or is a different encoder.
        CheckpointError: the checkpoint in `work` is of a different run or data, or the disk is full.
        NonFiniteError: the loss or the parameters are NaN or Inf.
    """
    watch = Stopwatch()
    device = pick_device()
    make_deterministic(_is_deterministic(run))
    with process_group(device):
        if not isinstance(run.recipe, Training):
            state, head = TrainState(code=[result.code_digest]), None
            encoder = (
                load_encoder(result.inputs["encoder"], run.encoder, torch.device("cpu"))
                if isinstance(run.recipe, FromFile)
                else build_untrained(run.encoder, run.seed)
            )
            require_space({result.folder: _size(encoder)})
        else:
            dataset = open_dataset(result.inputs["data"].parent)
            objective = make_objective(run, dataset)
            if dataset.split("train").pixels is None:
                warn_without_workers(device.type, workers)
            if isinstance(run.recipe, Contrastive) and (
                text := queue_warning(run.recipe, objective.num_images)
            ):
                logger.warning("%s", text)
            objective.module.to(device).to(memory_format=torch.channels_last)
            session = _Session(run, run.recipe, objective, result, work, watch, events)
            session.train(device, workers)
            state, encoder = session.state, objective.backbone
            head = objective.head
        if rank() == 0:
            _publish(run, encoder, head, state, result, watch)
            checkpoint.discard(_saved(work))


def queue_warning(recipe: Contrastive, num_images: int) -> str | None:
    """A warning about a queue larger than half of the data set; None for a smaller or a masked one.

    Queries then meet older keys of their own image, which are false negatives (KaimingHe in
    facebookresearch/moco issue 24).
    """
    if recipe.queue_size <= num_images // 2 or "same_image" in recipe.masks:
        return None
    number, queries = own_older_keys(recipe.queue_size, num_images, recipe.batch_size)
    return (
        f"queue_size = {recipe.queue_size} is {recipe.queue_size / num_images:.2f} times the {num_images} "
        f"training images: {queries:.0%} of the queries meet older keys of their own image among their "
        f"negatives, {number:.2f} on average ({number / recipe.queue_size:.2%} of the queue); at most "
        f"{num_images // 2} is advisable"
    )


def own_older_keys(queue_size: int, num_images: int, batch_size: int) -> tuple[float, float]:
    """The mean number of older keys of a query's own image in the queue; the fraction of queries with any.

    With K keys in the queue, N images and batches of B: at step t of an epoch the queue contains t B keys
    of this epoch, none of them of the query's image because the images of an epoch are distinct, and
    max(0, K - t B) keys of earlier epochs. The last w keys of an earlier epoch contain one of the query's
    image with probability w / N, because the orders of epochs are independent.
    """
    steps = max(1, num_images // batch_size)
    numbers, shares = [], []
    for step in range(steps):
        left, none = max(0, queue_size - step * batch_size), 1.0
        numbers.append(left / num_images)
        while left > 0:
            none *= 1 - min(left, steps * batch_size) / num_images
            left -= steps * batch_size
        shares.append(1 - none)
    return fmean(numbers), fmean(shares)


def _is_deterministic(run: PretrainRun) -> bool:
    return not isinstance(run.recipe, Training) or run.recipe.deterministic


def _size(module: nn.Module) -> int:
    """Bytes of its parameters and buffers."""
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def _saved(work: Path) -> Path:
    return work / "checkpoint.safetensors"


class _Session:
    """One process of a training run: it resumes, reports and saves (an `Observer`)."""

    def __init__(
        self,
        run: PretrainRun,
        recipe: Training,
        objective: Objective,
        result: Result,
        work: Path,
        watch: Stopwatch,
        events: Path | None,
    ) -> None:
        self._recipe, self._objective, self._watch, self._events = recipe, objective, watch, events
        self._label = f"{run.method} seed {run.seed}"
        self._saved, self._result_folder = _saved(work), result.folder
        self._identity = {
            "experiment": run.experiment,
            "method": run.method,
            **result.settings,
            "manifest.json": file_digest(result.inputs["data"]),
        }
        self._num_steps = steps_per_epoch(objective.num_images, recipe.batch_size)
        self._optimizer = make_optimizer(objective.module, recipe)
        self.state = self._resume(result.code_digest)
        self._last_save = time.monotonic()
        self._loss_note = "loss not checked yet"
        self._shown = (self.state.step, self.state.sums)

    def train(self, device: torch.device, workers: int) -> None:
        """Train all remaining epochs."""
        loading = Loading(self._recipe.batch_size, device, workers, rank(), world_size())
        done = self.state.epoch * self._num_steps + self.state.step
        require_space(self._needed())
        if self._events is not None and rank() == 0 and not done:
            write_picture(self._events, "views", self._example(device))
        with Progress(self._label, self._recipe.epochs * self._num_steps, done) as self._progress:
            train(self._objective, self._recipe, self._optimizer, self.state, loading, self)

    def _needed(self) -> dict[Path, int]:
        """Additional bytes that checkpoints and results need: three checkpoints during a save."""
        module = self._objective.module
        weights = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
        moments = len(self._optimizer.defaults.get("betas", (0,)))  # AdamW keeps two for each weight
        size = moments * weights + _size(module)
        return {
            self._saved.parent: checkpoint.additional_bytes(self._saved, size),
            self._result_folder: _size(self._objective.backbone),
        }

    def _example(self, device: torch.device) -> NDArray[np.uint8]:
        """(H, W, 3): the views of some images as the encoder sees them, a row for each view."""
        loading = Loading(min(_EXAMPLES, self._objective.num_images), device)
        batch = next(self._objective.batches(loading, 0, 0))
        views = (batch.query, batch.key) if isinstance(batch, Views) else (batch.images,)
        mean, std = (torch.tensor(each)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
        rows = [torch.cat([*(view.float().cpu() * std + mean)], dim=2) for view in views]
        picture = torch.cat(rows, dim=1).clamp(0, 1).mul(255).round().byte()
        return picture.permute(1, 2, 0).numpy()

    def step_done(self, state: TrainState) -> None:
        """Show progress."""
        self._progress.advance(f"epoch {state.epoch}, {self._loss_note}")

    def check(self, state: TrainState, step: int, lr: float) -> None:
        """Stop at NaN or Inf, otherwise save when a checkpoint is due."""
        norm = get_total_norm(self._objective.module.parameters()).item()
        check_finite(state.sums[0], step=step, lr=lr, last_good=self._saved, norm=norm)
        self._loss_note = f"loss {state.sums[0] / state.step:.3f}"
        self._show_point(state, step, lr)
        # The state after the last step is complete only when the row of its epoch is appended.
        if state.step < self._num_steps:
            self._save_if_due()

    def _show_point(self, state: TrainState, step: int, lr: float) -> None:
        """Some points per epoch for TensorBoard: means over the steps since the last point."""
        last, before = self._shown if self._shown[0] < state.step else (0, [])
        if state.step - last < self._num_steps / _POINTS:
            return
        if rank() == 0:
            sums = before or [0.0] * len(state.sums)
            means = [(now - then) / (state.step - last) for now, then in zip(state.sums, sums, strict=True)]
            values = dict(zip(self._objective.metric_names, means, strict=True))
            write_step(self._events, step, {"lr": lr, **values})
        self._shown = (state.step, state.sums)

    def epoch_done(self, state: TrainState) -> None:
        """Log the epoch; save when a checkpoint is due, and at the end."""
        row = state.rows[-1]
        if isinstance(self._recipe, Contrastive):
            full = [now for before, now in pairwise(state.rows) if before["queue_fill"] >= 1]
            row["status"] = training_status(
                **{name: row[name] for name in ("loss", "chance", "feature_std", "queue_fill")},
                dim=self._recipe.embedding_dim,
                accuracies={epoch["epoch"]: epoch["accuracy"] for epoch in full},
            )
        logger.info(
            "%s epoch %d: loss %.3f (chance %.3f), accuracy %.3f, %.0f images/s%s",
            self._label, row["epoch"], row["loss"], row["chance"], row["accuracy"],
            row["images_per_second"], f", {row['status']}" if "status" in row else "",
        )  # fmt: skip
        report(now=True, health=row.get("status", ""), accuracy=row["accuracy"])
        if state.epoch == self._recipe.epochs:
            self._save()
        else:
            self._save_if_due()
        if rank() == 0:
            write_events(self._events, row)

    def _save_if_due(self) -> None:
        if time.monotonic() - self._last_save > 60 * self._recipe.checkpoint_minutes:
            self._save()

    def _save(self) -> None:
        if rank() == 0:
            tensors = checkpoint.pack(self._objective.module, self._optimizer)
            state = asdict(self.state) | {"wall_seconds": self.state.wall_seconds + self._watch.seconds()}
            checkpoint.save(self._saved, tensors, state, self._identity)
        self._last_save = time.monotonic()

    def _resume(self, code: str) -> TrainState:
        """The state of the checkpoint, with tensors restored, or the initial state."""
        loaded = checkpoint.load(self._saved, self._identity)
        if loaded is None:
            return TrainState(code=[code])
        tensors, saved = loaded
        checkpoint.unpack(tensors, self._objective.module, self._optimizer)
        state = TrainState(**saved)
        logger.info(
            "%s resumes at epoch %d, step %d of %d", self._label, state.epoch, state.step, self._num_steps
        )
        if code not in state.code:
            logger.warning("the code changed since the checkpoint was written; recorded in provenance.json")
            state.code.append(code)
        return state


def _info(run: PretrainRun, result: Result) -> EncoderInfo:
    """The metadata of the encoder file."""
    return EncoderInfo.of(
        run.encoder,
        image_size=run.augmentation.image_size if run.is_trained else None,
        method=run.method,
        experiment=run.experiment,
        seed=run.seed,
        settings_digest=result.settings_digest,
        code_digest=result.code_digest,
    )


def _publish(
    run: PretrainRun,
    encoder: Backbone,
    head: nn.Module | None,
    state: TrainState,
    result: Result,
    watch: Stopwatch,
) -> None:
    """Write the results; all are moved into their folder at the end."""
    bfloat16 = isinstance(run.recipe, Training) and use_bfloat16(pick_device(), run.recipe.precision)
    with publishing(result.folder) as new:
        if isinstance(run.recipe, FromFile):
            shutil.copyfile(result.inputs["encoder"], new / "encoder.safetensors")
        else:
            save_encoder(new / "encoder.safetensors", encoder, _info(run, result))
        write_tensors(new / "head.safetensors", head.state_dict() if head else {}, None)
        write_rows(new / "metrics.csv", ["epoch"], state.rows)
        write_rows(new / "matching.csv", ["epoch", "rank", "probability"], state.matching)
        write_record(
            new,
            result,
            watch,
            precision="bfloat16" if bfloat16 else "float32",
            world_size=world_size(),
            deterministic=_is_deterministic(run),
            code_digests=state.code,
            wall_seconds=round(state.wall_seconds + watch.seconds(), 3),
        )
