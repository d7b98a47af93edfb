"""One fine-tuning, from an encoder to a detector; the same steps on one process or many, resumed or not.

On a CPU a resumed run ends with the same bytes as an uninterrupted one. On a GPU the backward pass of
RoIAlign sums in no fixed order; torch's deterministic mode would use a version in Python that needs too
much memory for 512 regions per image, so detection does not use that mode.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mochi.config import ConfigError, DetectionSet, DetectionTraining, Encoder
from mochi.detection.batches import Batch, Images, TrainingItems, stream
from mochi.detection.load_backbone import load_backbone
from mochi.detection.model import Detector, build
from mochi.detection.normalization import recompute_statistics
from mochi.runtime import distributed
from mochi.runtime.monitoring import CHECK_INTERVAL, check_finite
from mochi.runtime.precision import autocast
from mochi.runtime.progress import Progress
from mochi.runtime.seeding import seed_of
from mochi.storage import checkpoint

logger = logging.getLogger(__name__)

_WARMUP_START = 1e-3  # detectron2's WARMUP_FACTOR
_FEATURE_BYTES = 2 << 30


@dataclass(frozen=True)
class Recipe:
    """The settings shared by all fine-tunings of one encoder on one set."""

    settings: DetectionSet
    encoder: Encoder
    weights: Path
    num_classes: int
    device: torch.device
    workers: int = 0
    """Processes of this rank that read images."""

    def checkpoint_bytes(self) -> int:
        """Size of a resume checkpoint: all tensors of a detector, and the momentum of those trained."""
        with torch.device("meta"):
            detector = build(self.encoder, self.num_classes, self.settings.model)
        if self.settings.training.mode == "frozen":
            detector.backbone.requires_grad_(requires_grad=False)
        trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]
        return sum(tensor.nbytes for tensor in [*detector.state_dict().values(), *trained])

    def detector(self) -> tuple[Detector, dict[str, dict[str, str]]]:
        """A new detector with the loaded encoder, and the checksums of both."""
        detector = build(self.encoder, self.num_classes, self.settings.model)
        checksums = load_backbone(detector, self.weights, self.encoder)
        return detector.to(self.device).to(memory_format=torch.channels_last), checksums


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rate, scaled from `lr_batch_size` to `batch_size` images a step.

    The rate per image and the number of images are those of the experiment file.
    """

    steps: int
    warmup: int
    drops: tuple[int, ...]
    cosine: bool
    lr: float

    @staticmethod
    def of(training: DetectionTraining, lr: float, iterations: int) -> "Schedule":
        """The schedule of `training`, scaled to `iterations` (fewer in the lr search)."""
        scale = training.lr_batch_size / training.batch_size
        squeeze = scale * iterations / training.iterations
        return Schedule(
            steps=max(round(training.iterations * squeeze), 1),
            warmup=round(training.warmup_iterations * squeeze),
            drops=tuple(round(drop * squeeze) for drop in training.lr_drops),
            cosine=training.schedule == "cosine",
            lr=lr / scale,
        )

    def lr_at(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        rate = self.lr
        if step < self.warmup:
            part = step / self.warmup
            rate *= _WARMUP_START * (1 - part) + part
        if self.cosine:
            return rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return rate * 0.1 ** sum(step >= drop for drop in self.drops)


_ImageKey = tuple[str | int, str, bool, tuple[int, int]]
"""An image as it is shown: id, path, mirrored or not, and size."""


class FrozenBackbone:
    """conv1 to res4 with the encoder's weights, shared by all fine-tunings of mode `frozen`.

    Batch-norm statistics are recomputed on the training images, for every encoder: a random encoder has
    only the initial 0 and 1, which would determine its score instead of its features.

    Features of an image are cached if they do not depend on the other images of a batch: if all images have
    one size, there is no padding.
    """

    def __init__(self, recipe: Recipe, images: Images) -> None:
        detector, _ = recipe.detector()
        self.module = detector.backbone.requires_grad_(requires_grad=False)
        self._device = recipe.device
        training = recipe.settings.training
        dataset = _training_items(training, images, seed=0)
        rank, world = distributed.rank(), distributed.world_size()
        numbers = range(rank, training.precise_bn_batches * world, world)
        loaded = stream(dataset, numbers, recipe.workers, self._device, dataset.batch_bytes)
        batches = (batch.images(self._device) for batch in loaded)
        with autocast(self._device, training.precision):
            recompute_statistics(self.module.train(), batches, self.module)
        self.module.eval()
        self._cached: dict[_ImageKey, Tensor] = {}
        self._bytes = 0

    @torch.no_grad()
    def features(self, images: Images, batch: Batch) -> Tensor:
        """(B, C, h, w) of a batch of `images`."""
        annotated = images.annotations.images
        padded = any(size != tuple(batch.pixels.shape[1:3]) for size in batch.sizes)
        if padded or not images.of_one_size or self._bytes > _FEATURE_BYTES:
            result: Tensor = self.module(batch.images(self._device))
            return result
        keys = [
            (annotated[index].image_id, str(annotated[index].path), flipped, size)
            for index, flipped, size in zip(batch.indices, batch.flipped, batch.sizes, strict=True)
        ]
        missing = [position for position, key in enumerate(keys) if key not in self._cached]
        if missing:
            computed = self.module(batch.images(self._device, missing))
            for position, feature in zip(missing, computed, strict=True):
                self._cached[keys[position]] = feature
                self._bytes += feature.numel() * feature.element_size()
        return torch.stack([self._cached[key] for key in keys])


class FineTuning:
    """The training of one detector.

    Args:
        recipe: model, data and schedule.
        images: the training images.
        lr: for `lr_batch_size` images a step.
        iterations: of as many images a step; fewer than the recipe's in the lr search.
        seed: of the new layers, the batches, and the sampling of anchors and regions.
        saved: the resume checkpoint.
        identity: of this run, for the checkpoint.
        frozen: the backbone of mode `frozen`.

    Raises:
        EncoderError: the encoder file does not fit.
        CheckpointError: the checkpoint is of another run.
        ConfigError: the processes cannot share the batch evenly.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: Images,
        lr: float,
        iterations: int,
        seed: int,
        saved: Path,
        identity: Mapping[str, Any],
        frozen: FrozenBackbone | None = None,
    ) -> None:
        self._recipe, self._images, self._seed, self._saved = recipe, images, seed, saved
        self._frozen = frozen
        training = recipe.settings.training
        self._schedule = Schedule.of(training, lr, iterations)
        self._identity = {**identity, "lr": lr, "iterations": iterations, "fine_tuning_seed": seed}
        self._accumulate = accumulation(training, distributed.world_size())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.detector, self.checksums = recipe.detector()
        if frozen is not None:
            self.detector.backbone = frozen.module
        self._dataset = _training_items(training, images, seed)
        self._optimizer = _optimizer(self.detector, training)
        self._gradients = distributed.AveragedGradients(self.detector.parameters(), self._accumulate)
        self.step, self.vanished = 0, 0
        resumed = checkpoint.load(saved, self._identity)
        if resumed is not None:
            tensors, state = resumed
            checkpoint.unpack(tensors, self.detector, self._optimizer)
            self.step, self.vanished = state["step"], state["vanished"]
            logger.info(
                "fine-tuning seed %d resumes at step %d of %d", seed, self.step, self._schedule.steps
            )

    def train(self, label: str, log: Callable[[dict[str, Any]], None] | None = None) -> Detector:
        """Run all remaining steps and recompute batch-norm statistics; the detector is ready to evaluate.

        Raises:
            NonFiniteError: NaN or Inf in the loss, or in the weights after a step.
        """
        training, steps = self._recipe.settings.training, self._schedule.steps
        interval = CHECK_INTERVAL[self._recipe.device.type]
        self._set_modes()
        batches = self._remaining()
        last_save, checked, sums = time.monotonic(), self.step, dict[str, Tensor]()
        with Progress(label, steps, self.step) as progress:
            while self.step < steps:
                for name, loss in self._advance(batches).items():
                    sums[name] = sums[name] + loss if name in sums else loss
                note = ""
                if self.step % interval == 0 or self.step == steps:
                    losses = self._check(sums, self.step - checked)
                    checked, sums = self.step, {}
                    note = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
                    if log is not None:
                        log({"step": self.step, "lr": self._schedule.lr_at(self.step - 1), **losses})
                    if time.monotonic() - last_save > 60 * training.checkpoint_minutes:
                        self.save()
                        last_save = time.monotonic()
                progress.advance(note)
        self._recompute_statistics(batches)
        return self.detector

    def save(self) -> None:
        """Write the resume checkpoint."""
        if distributed.rank() == 0:
            state = {"step": self.step, "vanished": self.vanished}
            checkpoint.save(
                self._saved, checkpoint.pack(self.detector, self._optimizer), state, self._identity
            )

    def _advance(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimizer step over `accumulate` micro-batches of every process; returns the mean losses.

        They stay on the device, because reading them would synchronise with it.
        """
        lr = self._schedule.lr_at(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        seed_step(self._seed, self.step)
        self._optimizer.zero_grad(set_to_none=True)
        means: dict[str, Tensor] = {}
        for _ in range(self._accumulate):
            losses = self._losses(next(batches))
            total = sum(losses.values(), torch.zeros((), device=self._recipe.device))
            (total / self._accumulate).backward()
            for name, loss in {"loss": total, **losses}.items():
                part = loss.detach() / self._accumulate
                means[name] = means[name] + part if name in means else part
        self._gradients.wait()
        self._optimizer.step()
        self.step += 1
        return means

    def _check(self, sums: dict[str, Tensor], steps: int) -> dict[str, float]:
        """The mean losses of the last `steps` steps and of all processes, which thus stop together.

        Raises:
            NonFiniteError: NaN or Inf in a loss, or in the weights after the last step.
        """
        means = distributed.mean_over_ranks(torch.stack(list(sums.values())) / steps).tolist()
        losses = dict(zip(sums, means, strict=True))
        # A loss is computed before its step; the weights after the last step are saved and evaluated.
        check_finite(
            losses["loss"],
            step=self.step - 1,
            lr=self._schedule.lr_at(self.step - 1),
            last_good=self._saved,
            norm=_largest(self.detector),
        )
        return losses

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        self.vanished += batch.vanished
        device = self._recipe.device
        targets = batch.targets(device)
        with autocast(device, self._recipe.settings.training.precision):
            if self._frozen is None:
                losses = self.detector(batch.images(device), batch.sizes, targets)
            else:
                features = self._frozen.features(self._images, batch)
                losses = self.detector.from_features(features, batch.sizes, targets)
        return dict(losses)

    def _remaining(self) -> Iterator[Batch]:
        """The batches of the remaining steps, then those for the statistics."""
        first, last = (step * self._accumulate for step in (self.step, self._schedule.steps))
        numbers = self._numbers(first, last + self._recipe.settings.training.precise_bn_batches)
        return stream(
            self._dataset, numbers, self._recipe.workers, self._recipe.device, self._dataset.batch_bytes
        )

    def _numbers(self, first: int, last: int) -> range:
        """Micro-batches first .. last - 1 of this process, assigned round-robin."""
        world = distributed.world_size()
        return range(first * world + distributed.rank(), last * world + distributed.rank(), world)

    def _set_modes(self) -> None:
        self.detector.train()
        if self._frozen is not None:
            self.detector.backbone.eval()

    def _recompute_statistics(self, batches: Iterator[Batch]) -> None:
        """Precise batch-norm statistics over the rest of `batches`."""
        self._set_modes()
        seed_step(self._seed, self._schedule.steps)
        recompute_statistics(self.detector, batches, self._losses)


def _largest(module: nn.Module) -> float:
    """The largest absolute value in parameters and buffers; NaN if there is one."""
    tensors = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    return float(nn.utils.get_total_norm(tensors, math.inf))


def _training_items(training: DetectionTraining, images: Images, seed: int) -> TrainingItems:
    return TrainingItems(
        images, training.micro_batch, training.train_sizes, training.max_size, training.flip, seed
    )


def accumulation(training: DetectionTraining, world_size: int) -> int:
    """Micro-batches that a process accumulates, so that a step is always `batch_size` images.

    Raises:
        ConfigError: `batch_size` is not a multiple of micro_batch x processes.
    """
    together = training.micro_batch * world_size
    if training.batch_size % together:
        fits = [n for n in range(1, training.batch_size + 1) if training.batch_size % (n * world_size) == 0]
        raise ConfigError(
            f"detection batch_size {training.batch_size} cannot be shared by {world_size} processes with "
            f"micro_batch {training.micro_batch}; "
            + (f"micro_batch can be {', '.join(map(str, fits))}" if fits else "use fewer processes")
        )
    return training.batch_size // together


def seed_step(seed: int, step: int) -> None:
    """Seed torch's default generator, which samples anchors and regions, for one step of this process."""
    torch.manual_seed(seed_of("anchors and regions", seed, step, distributed.rank()))


def _optimizer(detector: Detector, training: DetectionTraining) -> torch.optim.SGD:
    """SGD; batch-norm parameters without weight decay (detectron2's WEIGHT_DECAY_NORM = 0)."""
    norms = {
        parameter
        for module in detector.modules()
        if isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters()
    }
    trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    return torch.optim.SGD(
        [
            {"params": [p for p in trained if p not in norms], "weight_decay": training.weight_decay},
            {"params": [p for p in trained if p in norms], "weight_decay": 0.0},
        ],
        lr=0.0,
        momentum=training.momentum,
        foreach=True,
    )
