"""Estimate the work and time of an experiment on this machine from a few timed steps of each kind."""

import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mochi import layout
from mochi.config import (
    AnalysisRun,
    Contrastive,
    DetectionRun,
    Encoder,
    Experiment,
    PretrainRun,
    ProbeRun,
    Training,
    all_runs,
    analysis_run,
    detection_run,
    detection_runs,
    first_runs,
    method_seeds,
    probe_run,
    probes,
)
from mochi.data.format import StoredDataset, open_dataset
from mochi.data.ingest.sources.folder import current_listing
from mochi.data.views.loading import Loading, centre_crops, steps_per_epoch
from mochi.encoders import build_untrained
from mochi.encoders.files import save_encoder
from mochi.errors import DataError, UserError
from mochi.evaluation.features import encode
from mochi.extras import not_installed
from mochi.layout import Paths
from mochi.pretraining.loop import TrainState, train
from mochi.pretraining.objectives import make_objective
from mochi.pretraining.optimizers import make_optimizer
from mochi.provenance.wanted import prepared
from mochi.runtime import gpus
from mochi.runtime.cpu_memory import keep_freed_memory
from mochi.runtime.distributed import pick_device
from mochi.runtime.precision import make_deterministic
from mochi.runtime.shares import runs_at_once, threads_per_run, workers_of
from mochi.storage.atomic import disk_space, readable_size

MEASURING_SECONDS = 60.0
_STEPS = 12
_PICTURE_BYTES = 2 << 20
"""Of the detections of an encoder on a set."""
_SIDE_BY_SIDE = 1.25
"""Concurrent runs share caches and memory: the upper end of the range allows for this factor."""


class Seconds(NamedTuple):
    """A time with its range."""

    low: float
    high: float

    def times(self, count: float) -> "Seconds":
        """The time of `count` repetitions."""
        return Seconds(self.low * count, self.high * count)

    def plus(self, other: "Seconds") -> "Seconds":
        """The sum of two times."""
        return Seconds(self.low + other.low, self.high + other.high)

    def __str__(self) -> str:
        unit, name = (3600, "h") if self.high >= 3600 else (60, "min") if self.high >= 60 else (1, "s")
        low, high = (_two_digits(value / unit) for value in self)
        return f"{low} {name}" if low == high else f"{low} to {high} {name}"


def _two_digits(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


@dataclass
class Machine:
    """The resources of a run on this machine."""

    device: torch.device
    threads: int
    at_once: int

    @classmethod
    def here(cls) -> "Machine":
        """This machine, with the workflow's resources per run."""
        device = pick_device()
        count = len(gpus.visible()) if device.type == "cuda" else 0
        return cls(device, threads_per_run(count), runs_at_once(count))

    def __str__(self) -> str:
        return (
            f"{self.device}; {_count(self.at_once, 'run')} at a time, each with "
            f"{_count(self.threads, 'thread')} and {workers_of(self.threads)} loading workers"
        )


class _Budget:
    """The remaining time for measurements, divided equally."""

    def __init__(self, seconds: float, items: int) -> None:
        self._end, self._left = time.monotonic() + seconds, items

    def share(self) -> float:
        """Seconds for the next item."""
        seconds = max(self._end - time.monotonic(), 0.0) / max(self._left, 1)
        self._left -= 1
        return seconds


_START = Seconds(2.0, 8.0)
"""Time that a job needs to start: imports and reading earlier results."""
DRAWING = Seconds(1.0, 4.0)
"""Time of an analysis after its images are encoded: the map and the pictures, of a fixed size."""


class _Encoding:
    """Time to load and encode an image, measured once for each data set and size."""

    def __init__(self, machine: Machine, budget: _Budget) -> None:
        self._machine, self._budget = machine, budget
        self._known = dict[tuple[str, int, int], Seconds]()

    def seconds(self, run: ProbeRun | AnalysisRun, images: StoredDataset) -> Seconds:
        """Of one image."""
        key = _encoded_as(run)
        if key not in self._known:
            self._known[key] = _seconds_per_image(run, images, self._machine, self._budget.share())
        return self._known[key]


def _encoded_as(run: ProbeRun | AnalysisRun) -> tuple[str, int, int]:
    return run.dataset.name, run.resize, run.image_size


def plan(experiment: Experiment, *, measure: bool, seconds: float = MEASURING_SECONDS) -> Iterator[str]:
    """Yield the lines of the plan: runs, steps, hours, memory, disk.

    Args:
        experiment: what is to be computed.
        measure: time some steps of every row, of encoding and of every detection set.
        seconds: for all measurements together, approximately.

    Raises:
        DataError: the data set is not prepared, or is not the one of this experiment; the number of steps
            depends on it.
    """
    folder = layout.dataset(experiment.dataset.name)
    dataset = open_dataset(folder)
    stale = prepared(experiment.dataset, folder, current_listing(experiment.dataset, folder)).why_stale()
    if stale is not None:
        raise DataError(
            f"{folder}: not the data set of this experiment ({stale}); prepare it: "
            "`mochi prepare --config FILE`"
        )
    machine = Machine.here()
    torch.set_num_threads(machine.threads)
    keep_freed_memory()
    num_trained = sum(isinstance(run.recipe, Training) for run in first_runs(experiment))
    sets = list(experiment.evaluation.detection)
    first = all_runs(experiment)[0]
    encoding_runs: list[ProbeRun | AnalysisRun] = [
        analysis_run(experiment, *first),
        *(probe_run(experiment, *first, task) for task in probes(experiment)),
    ]
    encodings = {_encoded_as(run) for run in encoding_runs}
    budget = _Budget(seconds, num_trained + len(encodings) + len(sets))
    encoding = _Encoding(machine, budget)
    if measure:
        yield f"measured on {machine}"
    jobs: list[Seconds] = []
    yield from _training(experiment, dataset, machine, budget, jobs, measure=measure)
    if probes(experiment):
        yield from _probes(experiment, dataset, encoding, jobs, measure=measure)
    yield _analyses(experiment, dataset, encoding, jobs, measure=measure)
    for name in sets:
        yield from _detection(experiment, name, machine, budget, jobs, measure=measure)
    yield from _totals(experiment, machine, jobs, measure=measure)


def _training(
    experiment: Experiment,
    dataset: StoredDataset,
    machine: Machine,
    budget: _Budget,
    jobs: list[Seconds],
    *,
    measure: bool,
) -> Iterator[str]:
    """One line for each row."""
    for run in first_runs(experiment):
        num_seeds = len(method_seeds(experiment, run.method))
        if not isinstance(run.recipe, Training):
            yield f"{run.method}: {_count(num_seeds, 'run')}, nothing to train"
            continue
        steps = run.recipe.epochs * steps_per_epoch(
            make_objective(run, dataset).num_images, run.recipe.batch_size
        )
        text = f"{run.method}: {_count(num_seeds, 'run')} of {steps} steps"
        if measure:
            step = seconds_per_step(run, dataset, machine.threads, budget.share())
            jobs += [step.times(steps).plus(_START)] * num_seeds
            text += f", {step.low:.3f} to {step.high:.3f} s per step, {step.times(steps)} per run"
        yield text


def _probes(
    experiment: Experiment,
    dataset: StoredDataset,
    encoding: _Encoding,
    jobs: list[Seconds],
    *,
    measure: bool,
) -> Iterator[str]:
    """One line for each evaluation on frozen features."""
    runs = all_runs(experiment)
    shared = set[tuple[str, int, int]]()
    for task in probes(experiment):
        run = probe_run(experiment, *runs[0], task)
        images = dataset if run.dataset == experiment.dataset else _prepared(run)
        if images is None:
            yield (
                f"{task}: {_count(len(runs), 'evaluation')}; their hours are not included: data set "
                f"{run.dataset.name} is not prepared yet; `mochi prepare {run.dataset.name} --config FILE`"
            )
            continue
        encoded = _encoded_images(run, images)
        if run.protocol.encodings_of_train == 1:
            encoded = 0 if run.feature_key in shared else encoded
            shared.add(run.feature_key)
        does = (
            f"of {encoded} encoded images each"
            if encoded
            else "on features that another evaluation computes"
        )
        text = f"{task}: {_count(len(runs), 'evaluation')} {does}"
        if measure:
            each = encoding.seconds(run, images).times(encoded)
            jobs += [each.plus(_START)] * len(runs)
            text += f", {each} each"
        yield text


def _prepared(run: ProbeRun) -> StoredDataset | None:
    """The data set of an evaluation, if it is not the experiment's."""
    try:
        return open_dataset(layout.dataset(run.dataset.name))
    except DataError:
        return None


def _encoded_images(run: ProbeRun, dataset: StoredDataset) -> int:
    """Number of encoded images: with random crops, all of train in every epoch."""
    splits = dataset.manifest["splits"]
    labelled = {name: int(entry["count"] - entry["unlabelled"]) for name, entry in splits.items()}
    return run.protocol.encodings_of_train * labelled.get("train", 0) + labelled.get("val", 0)


def _analyses(
    experiment: Experiment,
    dataset: StoredDataset,
    encoding: _Encoding,
    jobs: list[Seconds],
    *,
    measure: bool,
) -> str:
    """The line for the analyses, one of each encoder."""
    runs = all_runs(experiment)
    if find_spec("sklearn") is None:
        return (
            f"analysis: {_count(len(runs), 'encoder')}; their hours are not included: "
            f"{not_installed('sklearn')}"
        )
    from mochi.analysis.stage import MAX_IMAGES  # noqa: PLC0415 (an extra)

    splits = dataset.manifest["splits"]
    analysed = min(MAX_IMAGES, splits.get("val", {"count": 0})["count"] or splits["train"]["count"])
    text = f"analysis: {_count(len(runs), 'encoder')}, {analysed} encoded images each"
    if measure:
        run = analysis_run(experiment, *runs[0])
        each = encoding.seconds(run, dataset).times(analysed).plus(DRAWING)
        jobs += [each.plus(_START)] * len(runs)
        text += f", {each} each"
    return text


def _detection(
    experiment: Experiment,
    name: str,
    machine: Machine,
    budget: _Budget,
    jobs: list[Seconds],
    *,
    measure: bool,
) -> Iterator[str]:
    """One line for a detection set: its fine-tunings, and the search for a learning rate."""
    runs = detection_runs(experiment, name)
    run = detection_run(experiment, *runs[0], name)
    training = run.detection.training
    iterations = len(training.seeds) * training.iterations
    if len(training.lr) > 1:
        iterations += len(training.lr) * (training.search_iterations or 0)
    steps = round(iterations * training.lr_batch_size / training.batch_size)
    text = f"detection {name}: {_count(len(runs), 'encoder')}, {steps} iterations each"
    if measure:
        share = budget.share()
        try:
            step, num_test = seconds_per_iteration(run, machine, share)
        except UserError as error:
            yield f"{text}; its hours are not included: {str(error).splitlines()[0]}"
            return
        # Prediction takes about half the time of training on as many images.
        evaluated = len(training.seeds) * num_test / (2 * training.batch_size)
        each = step.times(steps + evaluated)
        jobs += [each.plus(_START)] * len(runs)
        text += f", {step.low:.2f} to {step.high:.2f} s per iteration, {each} each with its evaluation"
    yield text


def _totals(
    experiment: Experiment,
    machine: Machine,
    jobs: Sequence[Seconds],
    *,
    measure: bool,
) -> Iterator[str]:
    needed = disk_needed(experiment, machine.at_once)
    what = ("encoders, pictures of detections", "resume checkpoints, while it runs")
    for (folder, size), files in zip(needed.items(), what, strict=True):
        yield f"disk: about {readable_size(size)} more in {folder}/ ({files})"
    for space in disk_space(needed):
        folders = ", ".join(f"{folder}/" for folder in space.folders)
        yield f"disk: {readable_size(space.free)} are free in {folders}"
    if not measure:
        return
    if machine.device.type == "cuda":
        peak = f"{readable_size(torch.cuda.max_memory_reserved())} of GPU memory per run"
    else:
        peak = (
            f"{readable_size(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)} per run, "
            f"{_count(machine.at_once, 'run')} at a time"
        )
    yield f"peak memory: {peak}"
    total = Seconds(sum(job.low for job in jobs), sum(job.high for job in jobs))
    yield f"total, one job at a time: {total}"
    yield f"total, {_count(machine.at_once, 'job')} at a time: {makespan(jobs, machine.at_once)}"


def disk_needed(experiment: Experiment, at_once: int) -> dict[Path, int]:
    """Bytes that an experiment will add: encoders and pictures of detections, and resume checkpoints.

    A checkpoint of pretraining has two encoders, the momentum of one, and the queue; that of a detector is
    of about this size. While one is saved, there are three.
    """
    paths, encoder = Paths(experiment.name), encoder_bytes(experiment.encoder)
    missing = sum(not paths.encoder(*run).exists() for run in all_runs(experiment))
    sets = experiment.evaluation.detection
    detections = sum(len(detection_runs(experiment, name)) for name in sets)
    recipes = [run.recipe for run in first_runs(experiment)]
    queue = max((_queue_bytes(recipe) for recipe in recipes if isinstance(recipe, Contrastive)), default=0)
    trains = bool(sets) or any(isinstance(recipe, Training) for recipe in recipes)
    return {
        paths.results: missing * encoder + detections * _PICTURE_BYTES,
        Path("work", experiment.name): at_once * 3 * (3 * encoder + queue) * trains,
    }


def _queue_bytes(recipe: Contrastive) -> int:
    return 4 * recipe.queue_size * recipe.embedding_dim


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def makespan(jobs: Sequence[Seconds], at_once: int) -> Seconds:
    """Time of concurrent jobs: at least the mean load, and at least the longest job."""
    if not jobs:
        return Seconds(0.0, 0.0)
    low = max(*(job.low for job in jobs), sum(job.low for job in jobs) / at_once)
    high = max(*(job.high for job in jobs), sum(job.high for job in jobs) / at_once)
    return Seconds(low, high * (_SIDE_BY_SIDE if at_once > 1 else 1.0))


class _EnoughError(Exception):
    """The time for the measurement is over."""


class _Timer:
    """Times the steps of a training run and ends it. As an observer, it times those of pretraining."""

    def __init__(self, seconds: float) -> None:
        self.times: list[float] = []
        self._last = time.monotonic()
        self._end = self._last + seconds

    def lap(self) -> None:
        """Record the time of a step; stop after enough steps or seconds, but not before the second step."""
        _wait_for_gpu()
        now = time.monotonic()
        self.times.append(now - self._last)
        self._last = now
        if len(self.times) > _STEPS or (len(self.times) > 1 and now > self._end):
            raise _EnoughError

    def step_done(self, state: TrainState) -> None:
        """Record its time."""
        del state
        self.lap()

    def check(self, state: TrainState, step: int, lr: float) -> None:
        """Do nothing: no check is needed for a few steps."""

    def epoch_done(self, state: TrainState) -> None:
        """Nothing."""


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_per_step(run: PretrainRun, dataset: StoredDataset, threads: int, seconds: float) -> Seconds:
    """Time of a training step including loading, in the training loop.

    Args:
        run: a row that is trained.
        dataset: its data.
        threads: of the run, as in the workflow.
        seconds: for the measurement, approximately; at least two steps are run.
    """
    recipe = run.recipe
    assert isinstance(recipe, Training)
    device = pick_device()
    make_deterministic(recipe.deterministic)
    objective = make_objective(run, dataset)
    objective.module.to(device).to(memory_format=torch.channels_last)
    steps = steps_per_epoch(objective.num_images, recipe.batch_size)
    # The last epochs, after any warm-up.
    state = TrainState(epoch=max(recipe.epochs - 1 - _STEPS // steps, 0))
    timer = _Timer(seconds)
    loading = Loading(recipe.batch_size, device, workers_of(threads))
    with suppress(_EnoughError):
        train(objective, recipe, make_optimizer(objective.module, recipe), state, loading, timer)
    return _range(timer.times)


def _range(times: Sequence[float]) -> Seconds:
    """Low and high of repeated times; the first holds what is done once."""
    rest = sorted(times[1:]) or [times[0]]
    middle = rest[len(rest) // 2]
    return Seconds(rest[0], max(rest[-1] if len(rest) < 4 else rest[-2], 1.1 * middle))


def _seconds_per_image(
    run: ProbeRun | AnalysisRun, dataset: StoredDataset, machine: Machine, seconds: float
) -> Seconds:
    """Time to load and encode an image."""
    make_deterministic()
    encoder = (
        build_untrained(run.encoder, 0).to(machine.device).to(memory_format=torch.channels_last).eval()
    )
    split = dataset.split("train")
    loading = Loading(run.batch_size, machine.device, workers_of(machine.threads))
    rows = np.arange(len(split))  # an analysis needs no labels
    batches = centre_crops(split, loading, resize=run.resize, image_size=run.image_size, rows=rows)
    times, start, end = [], time.monotonic(), time.monotonic() + seconds
    for batch in batches:
        encode(encoder, batch.images)
        _wait_for_gpu()
        now = time.monotonic()
        times.append((now - start) / len(batch.images))
        start = now
        if now > end or len(times) > _STEPS:
            break
    return _range(times)


def seconds_per_iteration(run: DetectionRun, machine: Machine, seconds: float) -> tuple[Seconds, int]:
    """Time of a fine-tuning iteration from an untrained encoder, and the number of test images.

    Raises:
        UserError: the set cannot be used, or does not exist yet.
    """
    from mochi.detection.annotations import for_training  # noqa: PLC0415 (an extra)
    from mochi.detection.batches import Images  # noqa: PLC0415
    from mochi.detection.sets import read_splits  # noqa: PLC0415
    from mochi.detection.training import FineTuning, FrozenBackbone, Recipe  # noqa: PLC0415

    class Timed(FineTuning):
        """Times every step: its own log has a row for every 20th on a GPU."""

        def _advance(self, batches: Any) -> dict[str, Any]:
            losses = super()._advance(batches)
            timer.lap()
            return losses

    # Detection does not choose deterministic kernels; an earlier measurement may have.
    torch.use_deterministic_algorithms(mode=False)
    chosen = run.detection
    train_part, test = read_splits(chosen.data, masks=chosen.model.masks)
    images = Images(for_training(train_part, chosen.data.empty_images))
    # Statistics are computed once per fine-tuning: not part of an iteration.
    few = {"precise_bn_batches": min(chosen.training.precise_bn_batches, 1)}
    settings = chosen.model_copy(update={"training": chosen.training.model_copy(update=few)})
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "encoder.safetensors")
        save_encoder(weights, build_untrained(run.encoder, 0))
        workers = workers_of(machine.threads)
        recipe = Recipe(settings, run.encoder, weights, len(train_part.classes), machine.device, workers)
        frozen = FrozenBackbone(recipe, images) if settings.training.mode == "frozen" else None
        tuning = Timed(
            recipe, images, settings.training.lr[0], settings.training.iterations, 0,
            Path(folder, "checkpoint"), {}, frozen,
        )  # fmt: skip
        timer = _Timer(seconds)
        with suppress(_EnoughError):
            tuning.train("plan")
    return _range(timer.times), len(test.images)


def encoder_bytes(encoder: Encoder) -> int:
    """Bytes of an encoder file."""
    tensors = build_untrained(encoder, 0).state_dict().values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
