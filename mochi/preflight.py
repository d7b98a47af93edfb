"""Find everything that a later stage would refuse, before anything is computed."""

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mochi import layout
from mochi.config import (
    Contrastive,
    Dataset,
    DetectionData,
    DetectionSet,
    Experiment,
    FromFile,
    PretrainRun,
    ProbeRun,
    Supervised,
    Training,
    all_runs,
    first_runs,
    probe_run,
    probes,
)
from mochi.config.datasets import Download, Folder, ImageNet
from mochi.data.format import StoredDataset, open_dataset
from mochi.data.ingest import classes, duplicates
from mochi.data.ingest.files import BROKEN
from mochi.data.ingest.prepare import collect
from mochi.data.ingest.raw import FileSplit, RawDataset, as_text, class_counts
from mochi.data.ingest.sources.folder import current_listing
from mochi.data.ingest.validate import Validator
from mochi.data.inspect import repeated
from mochi.data.photographs import PHOTOGRAPHS
from mochi.data.views.loading import steps_per_epoch
from mochi.encoders.files import EncoderError, load_encoder
from mochi.errors import DataError, UserError
from mochi.extras import not_installed
from mochi.layout import Paths
from mochi.plan import Machine, disk_needed, encoder_bytes
from mochi.pretraining.stage import queue_warning
from mochi.provenance.wanted import prepared
from mochi.runtime.distributed import check_gpus, driver, pick_device
from mochi.runtime.gpus import visible
from mochi.runtime.progress import counter
from mochi.storage.atomic import disk_space, nearest_existing

_MOST_DECODED = 20_000  # images; of a larger set a sample is decoded
_SMALL_SHARED_MEMORY = 1 << 30
_USUAL_SIZE = 224  # of views, for any image size


class Finding(NamedTuple):
    """One message; an error would stop a later stage."""

    level: Literal["error", "warning", "note"]
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.text}"


def check(experiment: Experiment, *, verify: bool = False) -> list[Finding]:
    """Check an experiment whose file is valid.

    Args:
        experiment: what is to be computed.
        verify: read the prepared files and compare their sha256 with the manifest's; decode all images
            instead of a sample.
    """
    return [
        *_machine(experiment),
        *_encoder_files(experiment),
        *_detection(experiment),
        *_data(experiment, verify=verify),
    ]


def _machine(experiment: Experiment) -> Iterator[Finding]:
    device = pick_device()
    yield Finding("note", f"computing on {device}, {os.cpu_count()} CPU cores")
    yield from _gpus()
    shared = Path("/dev/shm")  # noqa: S108 (read, not written)
    if shared.exists() and (size := shutil.disk_usage(shared).total) < _SMALL_SHARED_MEMORY:
        yield Finding(
            "warning",
            f"{shared} has {size / 1e6:.0f} MB; loading workers of large images need more; "
            "run the container with --ipc=host or --shm-size=8g",
        )
    for package in _packages(experiment):
        if find_spec(package) is None:
            yield Finding("error", not_installed(package))
    for folder in (Paths(experiment.name).results, Path("work"), layout.dataset(experiment.dataset.name)):
        existing = nearest_existing(folder)
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            text = f"{folder}: cannot be written: expected a folder that this user may write"
            yield Finding("error", text)
    for space in disk_space(disk_needed(experiment, Machine.here().at_once)):
        if (shortage := space.shortage()) is not None:
            yield Finding("error", f"{shortage} (encoders, detections and resume checkpoints)")
    if device.type == "cuda":
        yield from _gpu_memory(experiment, encoder_bytes(experiment.encoder))


def _gpus() -> Iterator[Finding]:
    """Whether torch can use every visible GPU, and whether its kernels run on each card."""
    if not (names := visible()):
        return
    # CUDA shows a process a single MIG instance; a run takes one.
    usable = 1 if any(name.startswith("MIG-") for name in names) else len(names)
    try:
        check_gpus(usable)
    except UserError as error:
        yield Finding("error", str(error))
        return
    compiled = [int(name.removeprefix("sm_")) for name in torch.cuda.get_arch_list() if name[3:].isdigit()]
    for number in range(usable):
        card, (major, minor) = torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number)
        yield Finding(
            "note", f"GPU {number}: {card}, driver {driver()}, torch for CUDA {torch.version.cuda}"
        )
        # A kernel runs on cards of its own major version, from its minor version on.
        if not any(each // 10 == major and each % 10 <= minor for each in compiled):
            yield Finding(
                "error",
                f"GPU {number}, {card}: found compute capability {major}.{minor}; this torch has kernels "
                f"for {', '.join(f'{each // 10}.{each % 10}' for each in compiled)}; install a torch built "
                "for an older CUDA (docs/cluster.md), or hide the card with CUDA_VISIBLE_DEVICES",
            )


def _packages(experiment: Experiment) -> Iterator[str]:
    """Optional packages that some stage imports."""
    yield from ("matplotlib", "pandas", "scipy", "sklearn")
    sets = experiment.evaluation.detection.values()
    if sets:
        yield "faster_coco_eval"
    if experiment.dataset.source == "photo-patches" or any(each.data.scenes for each in sets):
        yield "skimage"


def _gpu_memory(experiment: Experiment, bytes_a_run: int) -> Iterator[Finding]:
    """Check that two encoders, gradients, momentum and queue fit; activations need more."""
    queues = [
        int(run.recipe.queue_size) for run in first_runs(experiment) if isinstance(run.recipe, Contrastive)
    ]
    needed = 4 * bytes_a_run + 4 * 128 * max(queues, default=0)
    total = torch.cuda.get_device_properties(pick_device()).total_memory
    if needed > total:
        yield Finding(
            "error",
            f"the GPU has {total / 1e9:.1f} GB; encoders, optimizer and queue take {needed / 1e9:.1f} GB "
            "without activations; choose a smaller encoder or queue",
        )


def _encoder_files(experiment: Experiment) -> Iterator[Finding]:
    """Check that imported encoders exist and fit."""
    for run in first_runs(experiment):
        if isinstance(run.recipe, FromFile):
            try:
                load_encoder(Path(run.recipe.path), run.encoder, torch.device("cpu"))
            except EncoderError as error:
                yield Finding("error", f"methods.{run.method}.path: {error}")


# ---------------------------------------------------------------- detection


def _detection(experiment: Experiment) -> Iterator[Finding]:
    """Check files, annotations and images of every existing set; the others must be generated here."""
    for name, chosen in experiment.evaluation.detection.items():
        where = f"evaluation.detection.{name}"
        if chosen.data.scenes is not None:
            yield from _scenes(where, chosen.data)
            continue
        missing = [file for file in chosen.data.annotation_files() if not Path(file).exists()]
        for file in missing:
            yield Finding("error", f"{where}: {file}: not found; put the set there")
        if not missing and find_spec("faster_coco_eval") is not None:
            yield from _set(where, chosen)


def _scenes(where: str, data: DetectionData) -> Iterator[Finding]:
    """Check the photographs that scenes are made from."""
    known = [photo.name for photo in PHOTOGRAPHS]
    classes = data.classes or []
    if unknown := [name for name in classes if name not in known]:
        text = f"{where}.data.classes: found {unknown}; expected photographs: {', '.join(known)}"
        yield Finding("error", text)
    elif len(classes) >= len(known):
        text = f"{where}.data.classes: found all {len(known)} photographs; leave one for backgrounds"
        yield Finding("error", text)


def _set(where: str, chosen: DetectionSet) -> Iterator[Finding]:
    """What the detection stage would refuse about an existing set, and warnings about it."""
    from mochi.detection import sets  # noqa: PLC0415 (detection is an extra)

    contents = sets.contents_of(chosen.data, masks=chosen.model.masks, jobs=os.cpu_count() or 1)
    yield from (Finding("error", f"{where}: {text}") for text in contents.errors)
    yield from (Finding("warning", f"{where}: {text}") for text in contents.warnings)
    if not contents.errors and len(chosen.training.lr) > 1 and contents.counts["train"]["images"] < 2:
        text = f"{where}.training.lr: found several; a search needs 2 images of train or more"
        yield Finding("error", text)


# ---------------------------------------------------------------- images


class _Contents(NamedTuple):
    """Numbers of images, in the prepared data or in the folder to be prepared."""

    images: dict[str, int]
    labelled: dict[str, dict[str, int]]
    """Split -> class -> number of images."""

    def count(self, split: str) -> int:
        """Number of labelled images of a split."""
        return sum(self.labelled.get(split, {}).values())


def _data(experiment: Experiment, *, verify: bool) -> Iterator[Finding]:
    """Check every data set, and what rows and evaluations need from it."""
    contents: dict[str, _Contents | None] = {}
    tasks = [probe_run(experiment, *all_runs(experiment)[0], task) for task in probes(experiment)]
    sections = [("dataset", experiment.dataset)]
    sections += [(f"evaluation.{run.name}.dataset", run.dataset) for run in tasks]
    for where, config in sections:
        if config.name not in contents:
            contents[config.name], findings = _contents(where, config, verify=verify)
            yield from findings
    train = contents[experiment.dataset.name]
    if train is not None:
        yield from _image_size(experiment)
        if train.images.get("train"):
            for run in first_runs(experiment):
                yield from _recipe(run, train)
        else:
            yield Finding("error", "dataset: found 0 images in train; expected some to pretrain on")
    for task in tasks:
        if (evaluated := contents[task.dataset.name]) is not None:
            yield from _labels(task, evaluated)
    yield from _evaluation_size(experiment)


def _contents(where: str, config: Dataset, *, verify: bool) -> tuple[_Contents | None, list[Finding]]:
    """Counts of the prepared data if it is the requested set, otherwise of the source; None: unknown.

    `where` is the section of the experiment, for messages.
    """
    folder = layout.dataset(config.name)
    findings: list[Finding] = []
    try:
        dataset = open_dataset(folder)
        stale = prepared(config, folder, current_listing(config, folder)).why_stale()
    except DataError as error:
        path = getattr(config, "path", None)
        if path is not None and not Path(path).exists():
            text = f"{where}.path: {path}: not found, and nothing is prepared in {folder}"
            return None, [Finding("error", text)]
        if (folder / "manifest.json").exists():
            findings.append(Finding("warning", str(error)))
        else:
            findings.append(Finding("note", f"{folder}: not prepared yet; the workflow prepares it first"))
    else:
        if stale in {None, "missing"}:
            contents = _of_manifest(dataset)
            return contents, [*_prepared(dataset, verify=verify), *_classes(contents)]
        text = f"{folder}: not the data set of this experiment ({stale}); the workflow prepares it again"
        findings.append(Finding("warning", text))
    try:
        counts, more = _of_source(where, config, verify=verify)
    except UserError as error:
        return None, [*findings, Finding("error", f"{where}: {error}")]
    if counts is None:
        text = f"{config.name}: images are counted once they are prepared; check again then"
        return None, [*findings, Finding("note", text)]
    return counts, [*findings, *more, *_classes(counts)]


def _classes(contents: _Contents) -> Iterator[Finding]:
    """Check that the classes of train and val agree."""
    yield from (Finding("error", text) for text in classes.faults(contents.labelled))
    yield from (Finding("warning", text) for text in classes.oddities(contents.labelled))


def _of_manifest(dataset: StoredDataset) -> _Contents:
    splits = dataset.manifest["splits"]
    return _Contents(
        {name: int(entry["count"]) for name, entry in splits.items()},
        {name: {label: n for label, n in entry["classes"].items() if n} for name, entry in splits.items()},
    )


def _of_source(where: str, config: Dataset, *, verify: bool) -> tuple[_Contents | None, list[Finding]]:
    """Counts of images in a folder; None for downloaded or generated ones.

    Raises:
        DataError: as preparation would.
    """
    if isinstance(config, Download):
        if config.archive is not None and not Path(config.archive).is_file():
            raise DataError(f"archive: {config.archive}: no such file; download it again")
        return None, []
    if not isinstance(config, Folder | ImageNet):
        return None, []
    raw = collect(config, Path("data/.cache"))
    labels = {name: np.array(split.labels) for name, split in raw.splits.items()}
    findings: list[Finding] = []
    if isinstance(config, Folder):
        findings = [*_ignored(where, raw), *_unreadable(where, raw, labels, verify=verify)]
    counts = {name: class_counts(each, raw.classes) for name, each in labels.items()}
    filled = {name: {label: n for label, n in each.items() if n} for name, each in counts.items()}
    return _Contents({name: len(each) for name, each in labels.items()}, filled), findings


def _ignored(where: str, raw: RawDataset) -> Iterator[Finding]:
    """What is in the folder and not used."""
    ignored = {reason: count for reason, count in raw.ignored.items() if count}
    if broken := ignored.pop(BROKEN, 0):
        text = f"{where}: {broken} files are broken links or not regular (git-annex, DVC: fetch them)"
        yield Finding("warning", text)
    if ignored:
        counts = ", ".join(f"{count} {reason}" for reason, count in ignored.items())
        yield Finding("note", f"{where}: ignored: {counts}")


def _unreadable(
    where: str, raw: RawDataset, labels: dict[str, NDArray[np.int64]], *, verify: bool
) -> list[Finding]:
    """Decode the images, or a sample; remove labels of those that preparation would quarantine."""
    splits = {name: split for name, split in raw.splits.items() if isinstance(split, FileSplit)}
    hashes: dict[str, NDArray[np.uint8]] = {}
    decoded: dict[str, NDArray[np.int64]] = {}
    total = sum(len(split.ranges) for split in splits.values())
    every = 1 if verify else -(-total // _MOST_DECODED)
    bad: list[str] = []
    done, report = 0, counter("check images")
    with Validator(os.cpu_count() or 1) as validator:
        for name, split in splits.items():
            rows = np.arange(0, len(split.ranges), every)
            part = FileSplit(
                [split.ranges[row] for row in rows], [split.paths[row] for row in rows], split.labels[rows]
            )
            readable = np.ones(len(split.ranges), bool)
            digests = bytearray()
            for file in validator.validate(part, keep_reencoded=False):
                done += 1
                report(done, -(-total // every))
                if file.result.reason:
                    readable[rows[file.row]] = False
                    bad.append(f"{as_text(part.paths[file.row])} ({file.size} bytes): {file.result.reason}")
                else:
                    digests += file.sha256
            hashes[name] = np.frombuffer(bytes(digests), np.uint8).reshape(-1, 32)
            decoded[name] = labels[name][rows][readable[rows]]
            labels[name] = labels[name][readable]
    twice = repeated(duplicates.summary(list(duplicates.groups(hashes, decoded))))
    findings = [Finding("warning", f"{where}: {text} (`mochi inspect` lists them)") for text in twice]
    if every > 1:
        text = f"1 of {every} images was decoded; --verify decodes all of them"
        findings.append(Finding("note", text))
    if bad:
        text = f"{where}: {len(bad)} of {done} images are unreadable; the first: {bad[0]}"
        if len(bad) > raw.max_unreadable * done:
            text += f"; {where}.max_unreadable is {raw.max_unreadable}: remove them, or raise it"
            findings.append(Finding("error", text))
        else:
            findings.append(Finding("warning", f"{text}; they will be skipped"))
    return findings


def _prepared(dataset: StoredDataset, *, verify: bool) -> Iterator[Finding]:
    """Find missing, truncated or (with `verify`) corrupt files, and images that are larger than needed."""
    for split in dataset.manifest["splits"]:
        try:
            warning = dataset.split(split).oversized()
        except DataError as error:
            yield Finding("error", str(error))
            return
        if warning:
            yield Finding("warning", warning)
    for text in repeated(dataset.manifest["duplicates"]):
        listed = dataset.folder / "duplicates.csv"
        yield Finding("warning", f"{dataset.folder}: {text}; {listed} lists them")
    for path in dataset.damaged() if verify else ():
        text = f"{path}: missing or corrupt: its sha256 is not the manifest's; prepare the data again"
        yield Finding("error", text)


def _image_size(experiment: Experiment) -> Iterator[Finding]:
    """Warn if views are much smaller than the prepared images."""
    try:
        train = open_dataset(layout.dataset(experiment.dataset.name)).split("train")
    except DataError:
        return
    size = experiment.augmentation.image_size
    short = int(np.median(np.minimum(train.heights, train.widths))) if len(train) else 0
    if short >= 2 * size and size < _USUAL_SIZE:
        yield Finding(
            "warning",
            f"augmentation.image_size: found {size}; images of train have a median short side of "
            f"{short} px; `mochi inspect` recommends a size",
        )


def _recipe(run: PretrainRun, contents: _Contents) -> Iterator[Finding]:
    """Check batch, queue and labels of one row."""
    recipe = run.recipe
    if not isinstance(recipe, Training):
        return
    num_images = contents.images["train"]
    if isinstance(recipe, Supervised):
        num_images = contents.count("train")
        if not num_images:
            text = f"{run.method}: found 0 labelled images in train; provide some, or remove the row"
            yield Finding("error", text)
            return
    try:
        steps = steps_per_epoch(num_images, recipe.batch_size)
    except DataError as error:
        yield Finding("error", f"{run.method}: {error}")
        steps = 0
    if not isinstance(recipe, Contrastive):
        return
    if warning := queue_warning(recipe, num_images):
        yield Finding("warning", f"{run.method}: {warning}")
    keys = recipe.epochs * steps * recipe.batch_size
    if 0 < keys < recipe.queue_size:
        yield Finding(
            "warning",
            f"{run.method}: queue_size = {recipe.queue_size} is never full: {recipe.epochs} epochs have "
            f"{keys} keys; lower queue_size or raise epochs",
        )


def _labels(run: ProbeRun, contents: _Contents) -> Iterator[Finding]:
    """Check labels and numbers of images for a task."""
    where = f"evaluation.{run.name}"
    missing = [split for split in ("train", "val") if not contents.count(split)]
    for split in missing:
        yield Finding(
            "error",
            f"{where}: found 0 labelled images in {split}; "
            f"provide some{_VAL if split == 'val' else ''}, or remove {run.name} from the experiment",
        )
    if missing:
        return
    for split in ("train", "val"):
        if len(contents.labelled[split]) == 1:
            yield Finding("warning", f"{where}: found one class in {split}; there is nothing to classify")
    labelled = contents.count("train")
    batch = getattr(run.protocol, "batch_size", 0)
    if batch > labelled:
        yield Finding(
            "warning",
            f"{where}.batch_size: found {batch}; train has {labelled} labelled images: one step an epoch; "
            "lower batch_size",
        )
    if percent := getattr(run.protocol, "percent", None):
        used = sum(max(round(n * percent / 100), 1) for n in contents.labelled["train"].values())
        if used > 1.5 * percent / 100 * labelled:
            yield Finding(
                "warning",
                f"{where}.percent: found {percent:g}; one image of each class is the least, so "
                f"{used} of {labelled} are used, {100 * used / labelled:.3g}%; raise percent, "
                "or give images_per_class",
            )
    most = max(getattr(run.protocol, "k", [0]))
    if most > labelled:
        text = f"{where}.k: found {most}; train has {labelled} labelled images, which all vote; lower k"
        yield Finding("warning", text)


def _evaluation_size(experiment: Experiment) -> Iterator[Finding]:
    """Warn if the evaluation's image size is not the training's."""
    size, found = experiment.augmentation.image_size, experiment.evaluation.image_size
    if probes(experiment) and (found * 2 <= size or found >= 2 * size):
        yield Finding(
            "warning",
            f"evaluation.image_size: found {found}; encoders are trained at "
            f"augmentation.image_size = {size}; evaluate at the size of the training",
        )


_VAL = " (`dataset.val_share` takes a share of train, if the source is a folder)"
