"""Write an experiment file for a folder of images and this machine, with reasons for settings."""

import math
import os
import re
import shlex
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from mochi.config import detection_run, parse_experiment, pretrain_run
from mochi.config.datasets import Folder
from mochi.data.describe_folder import Description, describe, sides
from mochi.data.format import StoredDataset, open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.data.recommend import (
    FEW_STEPS,
    FEWEST,
    FEWEST_TO_TRAIN,
    SIZES,
    STEM,
    Facts,
    advise,
    stem,
    view_size,
)
from mochi.errors import DataError, UserError
from mochi.plan import DRAWING, Machine, Seconds, makespan, seconds_per_iteration, seconds_per_step
from mochi.storage.atomic import write_text
from mochi.text import read_json

_WIDTH = 104  # of a line of the file
_OVERHEAD = 0.85  # fraction of the hours for computing; the rest is for starting processes and writing
_JOB_SECONDS = 8.0  # imports of one job
_ENOUGH_EPOCHS = 30  # a larger view is worth it only if this many epochs fit
_MEASURED_IMAGES = 256


@dataclass(frozen=True)
class _Shape:
    """What determines the time: the views and the encoder."""

    size: int
    architecture: str
    width: int


@dataclass(frozen=True)
class _Fit:
    """The times of a shape on this machine."""

    shape: _Shape
    epoch: float
    """Seconds of an epoch of all rows, for one seed."""
    fixed: float
    """Seconds of everything that does not depend on the epochs."""
    epochs: int
    """Epochs that fit, for one seed; may be negative."""


def new_experiment(folder: Path, out: Path, *, hours: float | None, force: bool) -> list[str]:
    """Write an experiment file for a folder; return lines to print.

    Args:
        folder: images with or without classes, a VOC or a COCO tree.
        out: the file; its name is the experiment's.
        hours: choose encoder, image size, epochs and seeds so that the experiment takes about this long on
            this machine.
        force: replace an existing file.

    Raises:
        UserError: the file exists, or its name is not valid for an experiment.
        DataError: the folder cannot be used, or has too few images.
    """
    if out.exists() and not force:
        raise UserError(
            f"{out}: already exists; choose another file with --out, or replace it with --force"
        )
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", out.stem).strip("-._")
    if not name or out.suffix not in {".yaml", ".yml"}:
        raise UserError(f"--out: found {out}; expected a name such as config/mine.yaml")
    if hours is not None and not (math.isfinite(hours) and hours > 0):
        raise UserError(f"--hours: found {hours}; expected a number above 0")
    description = describe(folder)
    if len(description.files) < FEWEST_TO_TRAIN:
        raise DataError(
            f"{_plain(folder)}: images to train on: {len(description.files)}; expected at least "
            f"{FEWEST_TO_TRAIN}, better thousands: contrastive learning needs negatives; add images"
        )
    draft = _Draft(folder, name, description)
    budget_lines = [] if hours is None else draft.fit(hours)
    text = draft.text()
    parse_experiment(yaml.safe_load(text), str(out))
    write_text(out, text)
    return [*draft.summary(), *budget_lines, f"wrote {out}; next: mochi check {shlex.quote(str(out))}"]


class _Draft:
    """A draft of an experiment."""

    def __init__(self, folder: Path, name: str, description: Description) -> None:
        self._folder, self._name, self._description = folder, name, description
        self._sides = sides(description.files)
        self._machine = Machine.here()
        self._on_gpu = self._machine.device.type == "cuda"
        short = int(np.median(self._sides.min(axis=1)))
        largest = 224 if self._on_gpu else 96
        self._shape = self._shapes(min(view_size(short), largest))[0]
        self._short = short
        self._epochs: int | None = None
        self._seeds = [0, 1, 2]
        self._iterations: int | None = None
        self._fitted = False
        self._boxes = None if not description.detection else _read_boxes(description)

    def summary(self) -> list[str]:
        """Lines that describe the folder."""
        description = self._description
        num_val = sum(description.val_classes.values())
        kinds = {
            "classes": f"{_classes(len(description.train_classes))}, {num_val} for val",
            "photos": "no labels: no probe, no supervised row",
            "voc": "a VOC tree", "coco": "a COCO tree",
        }  # fmt: skip
        num_train, kind = len(description.files), kinds[description.kind]
        lines = [f"{_plain(self._folder)}: {num_train} images to train on, {kind}"]
        if self._boxes:
            lines.append(f"boxes: {len(self._boxes.short)} of {_classes(len(self._boxes.classes))}")
        if description.train_classes and description.unlabelled_val:
            lines.append(
                f"warning: {description.unlabelled_val} images of val are in no class folder and are not "
                "evaluated; sort them into val/<class>/"
            )
        if num_train < FEWEST:
            lines.append(f"warning: {num_train} images are too few to learn from")
        return lines

    def text(self) -> str:
        """The text of the file."""
        content, comments = self._content()
        return _render(content, comments, self._header())

    def fit(self, hours: float) -> list[str]:
        """Choose views, encoder and epochs for `hours` here; return lines with measurements."""
        seconds = 3600 * hours
        self._seeds, self._fitted = [0], True
        lines: list[str] = []
        detection_seconds = self._fit_detection(seconds * _OVERHEAD / 3, lines) if self._boxes else 0.0
        tried: list[_Fit] = []
        with tempfile.TemporaryDirectory() as folder:
            dataset = self._measured(Path(folder))
            for shape in self._shapes(self._shape.size):
                self._shape = shape
                rows, images = self._seconds_per_epoch(dataset)
                epoch = makespan(rows, self._machine.at_once).low
                fixed = self._fixed_seconds(images) + detection_seconds
                tried.append(_Fit(shape, epoch, fixed, int((_OVERHEAD * seconds - fixed) / epoch)))
                lines.append(
                    f"{shape.size} px, {shape.architecture} of width {shape.width}: "
                    f"{images:.0f} images/s per run; {max(tried[-1].epochs, 0)} epochs fit"
                )
                if tried[-1].epochs >= _ENOUGH_EPOCHS:
                    break
        best = _best(tried)
        self._shape, self._epochs = best.shape, None
        longest = int(self._advice()["pretrain.epochs"].value)
        if best.epochs >= 3 * _ENOUGH_EPOCHS:
            self._seeds = [0, 1, 2]
        self._epochs = min(max(best.epochs // len(self._seeds), 1), longest)
        total = best.fixed + len(self._seeds) * self._epochs * best.epoch
        about = Seconds(total, 1.5 * total)
        too_short = f"{hours:g} h are too short: " if best.epochs < 1 else ""
        lines.append(f"{too_short}epochs: {self._epochs}, seeds: {len(self._seeds)}, about {about}")
        return lines

    def _shapes(self, size: int) -> list[_Shape]:
        """Views and encoders, from the one that suits the images to the cheapest."""
        if self._on_gpu:
            deep = [_Shape(size, "resnet50", 64)] if len(self._description.files) > 100_000 else []
            return [*deep, _Shape(size, "resnet18", 64)]
        # Below 64 px the stem does not downsample, so smaller images are not cheaper.
        smaller = [each for each in SIZES if min(size, 64) <= each <= size]
        return [_Shape(each, "resnet10", 32) for each in reversed(smaller)]

    def _measured(self, folder: Path) -> StoredDataset:
        """A sample of the images, prepared as in the pipeline."""
        files = self._description.files
        labelled = any(self._description.train_classes)
        for number, index in enumerate(
            np.linspace(0, len(files) - 1, min(_MEASURED_IMAGES, len(files))).astype(int)
        ):
            target = folder / "images" / "train" / (f"{number % 2}" if labelled else "") / f"{number}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.path.abspath(files[index]))  # noqa: PTH100 (keeps links)
        config = Folder(source="folder", name="measured", path=str(folder / "images"), max_unreadable=0.99)
        prepare(config, folder / "measured", jobs=1)
        return open_dataset(folder / "measured")

    def _seconds_per_epoch(self, dataset: StoredDataset) -> tuple[list[Seconds], float]:
        """Seconds of an epoch of every trained row, and images/s of the first."""
        content, _ = self._content()
        count = len(self._description.files)
        batch = min(content["pretrain"]["batch_size"], len(dataset.split("train")))
        small = {
            **content["pretrain"],
            "batch_size": batch,
            "bn_groups": min(content["pretrain"]["bn_groups"], batch // 2 or 1),
        }
        experiment = parse_experiment({**content, "pretrain": small}, "measured")
        row = "moco-v2"
        step = seconds_per_step(pretrain_run(experiment, row, 0), dataset, self._machine.threads, 3.0)
        rows = [name for name in content["methods"] if name not in {"random-init", "supervised"}]
        # A supervised epoch has one view and no key encoder: about half the time, for half as many epochs.
        epoch = step.times(count / batch)
        quarter = [epoch.times(0.25)] if "supervised" in content["methods"] else []
        return [*([epoch] * len(rows)), *quarter], batch / step.low

    def _fixed_seconds(self, images_a_second: float) -> float:
        """Seconds of preparation, evaluations, analyses and job starts, concurrent as in the workflow."""
        description = self._description
        methods = 4 if description.train_classes else 3
        tasks = 2 if self._has_probes() else 0
        encoded = sum(description.train_classes.values()) + sum(description.val_classes.values())
        # Encoding takes about a fourth of a training step, per image.
        evaluations = methods * tasks * (encoded / (4 * images_a_second) + _JOB_SECONDS)
        starts = (methods + 3) * _JOB_SECONDS
        analyses = methods * (DRAWING.high + _JOB_SECONDS)
        return (evaluations + analyses + starts) / self._machine.at_once + len(description.files) / 500

    def _fit_detection(self, seconds: float, lines: list[str]) -> float:
        """Iterations of the fine-tunings that take so long; returns the seconds they take."""
        content, _ = self._content()
        experiment = parse_experiment(content, "measured")
        name = next(iter(content["evaluation"]["detection"]))
        run = detection_run(experiment, "moco-v2", self._seeds[0], name)
        step, num_test = seconds_per_iteration(run, self._machine, 6.0)
        training = content["evaluation"]["detection"][name]["training"]
        jobs = len(content["methods"])
        evaluated = num_test / (2 * training["batch_size"])
        fitting = int(seconds * self._machine.at_once / (jobs * step.low) - evaluated)
        self._iterations = min(max(fitting, 10), training["iterations"])
        lines.append(f"detection: {step.low:.2f} s per iteration; {self._iterations} iterations")
        return float(jobs * step.low * (self._iterations + evaluated) / self._machine.at_once)

    # ------------------------------------------------------------ the content

    def _has_probes(self) -> bool:
        """Whether train and val have labels of at least two classes."""
        return len(self._description.val_classes.keys() & self._description.train_classes.keys()) >= 2

    def _advice(self) -> dict[str, Any]:
        description = self._description
        facts = Facts(
            num_train=len(description.files),
            short_side=self._short,
            train_classes=description.train_classes if self._has_probes() else {},
            has_val=self._has_probes(),
            largest=self._shape.size,
        )
        return {each.key: each for each in advise(facts, FEWEST_TO_TRAIN)}

    def _content(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The experiment, and key path -> reason."""
        description, advice = self._description, self._advice()
        comments = {key: each.why for key, each in advice.items()}
        value = {key: each.value for key, each in advice.items()}
        size, batch = self._shape.size, min(int(value["pretrain.batch_size"]), len(description.files) // 2)
        queue = int(value["pretrain.queue_size"])
        epochs = self._epochs or int(value["pretrain.epochs"])
        steps = epochs * (len(description.files) // batch)
        few_steps = steps < FEW_STEPS
        lr = float(value["pretrain.lr"]) * (4 if few_steps else 1)
        if few_steps:
            comments["pretrain.lr"] = (
                "four times MoCo's 0.03 for a batch of 256, because there are few steps"
            )
        if self._epochs is not None:
            comments["pretrain.epochs"] = f"{steps:,} steps, chosen for the hours of --hours"
        content: dict[str, Any] = {
            "name": self._name,
            "title": f"{_plain(self._folder.resolve().name) or 'Images'}, {size} px",
            "dataset": {"source": "folder", "name": self._name, **description.dataset},
            "seeds": self._seeds,
            "encoder": {
                "architecture": self._shape.architecture,
                "stem": stem(size),
                "width": self._shape.width,
            },
            "augmentation": {"version": "v2", "image_size": size, "min_scale": 0.2, "blur": size >= 64},
            "pretrain": {
                "epochs": epochs,
                "batch_size": batch,
                "lr": float(f"{lr:.3g}"),
                "momentum": 0.9,
                "weight_decay": 1e-4,
                "schedule": "cosine",
                "head": "mlp",
                "embedding_dim": 128,
                "queue_size": queue,
                "temperature": 0.2,
                "key_momentum": value["pretrain.key_momentum"],
                "bn_groups": min(max(batch // 32, 2), 8) if batch >= 4 else 1,
                "matching_epochs": sorted({0, epochs // 2, epochs - 1}),
            },
            "methods": self._methods(queue, epochs),
            "evaluation": self._evaluation(value),
        }
        comments |= {
            "dataset.class_folders": "the folders are the classes; remove it if they are not",
            "dataset.val_share": "there is no folder val: this share of each class is held out",
            "dataset.only_listed": "test images of detection are not used for pretraining",
            "seeds": "a standard deviation needs several; one takes a third"
            if len(self._seeds) > 1
            else "add 1, 2 for a standard deviation",
            "encoder.architecture": ""
            if self._on_gpu
            else "one basic block per stage, for a CPU; on a GPU resnet18",
            "encoder.stem": STEM,
            "encoder.width": "64 in the paper" if self._shape.width != 64 else "",
            "augmentation.image_size": f"the median short side is {self._short} px"
            + ("" if view_size(self._short) == size else "; smaller saves time"),
            "augmentation.min_scale": "moco main_moco.py",
            "pretrain.momentum": "moco main_moco.py",
            "pretrain.weight_decay": "moco main_moco.py",
            "pretrain.schedule": "moco README, MoCo-v2",
            "pretrain.head": "moco README, MoCo-v2",
            "pretrain.embedding_dim": "moco builder.py",
            "pretrain.temperature": "moco README, MoCo-v2",
            "pretrain.bn_groups": "groups of the batch with separate statistics, instead of GPUs",
            "pretrain.matching_epochs": "figure 2a of the paper",
            "evaluation.detection": "transfer to detection; docs/detection.md explains the keys",
        }
        return content, comments

    def _methods(self, queue: int, epochs: int) -> dict[str, Any]:
        """The untrained baseline, the upper bound if there are labels, MoCo-v2, and MoCHi."""
        hardest = max(min(queue // 16, 1024), 4)
        hardest = 2 ** int(math.log2(hardest))
        rows: dict[str, Any] = {"random-init": {"objective": "none"}}
        if len(self._description.train_classes) > 1:
            rows["supervised"] = {
                "objective": "supervised",
                "lr": 0.1,
                "epochs": max(epochs // 2, 1),
                "seeds": self._seeds[:1],
            }
        rows["moco-v2"] = {}
        # The paper's two kinds: many pairs and few query mixes, and 1024-512-256.
        mixes = [(hardest, hardest // 2, hardest // 4)]
        if not self._fitted:
            mixes.append((hardest, hardest, max(hardest // 8, 1)))
        for mix in mixes:
            rows[f"mochi-{mix[0]}-{mix[1]}-{mix[2]}"] = _mochi(mix, epochs // 10)
        return rows

    def _evaluation(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """The evaluations that the folder has labels or boxes for."""
        size = self._shape.size
        content: dict[str, Any] = {
            "image_size": size,
            "resize": min(round(size * 8 / 7), max(size, self._short)),
        }
        if self._has_probes():
            content |= _probes(self._description.train_classes, int(value["evaluation.knn.k"]))
        if self._boxes:
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", self._folder.resolve().name).strip("-._") or "boxes"
            content["detection"] = {
                name: _detection(
                    self._description.detection, self._boxes, self._iterations, on_gpu=self._on_gpu
                )
            }
        return content

    def _header(self) -> str:
        return "\n".join(
            [
                f"Written by `mochi init` for {_plain(self._folder)}.",
                "  mochi check FILE; snakemake --cores all --configfile FILE; mochi status FILE",
                "A row of the table is a line of `methods`; see docs/data.md and docs/detection.md.",
            ]
        )


def _mochi(mix: tuple[int, int, int], warmup: int) -> dict[str, Any]:
    """A MoCHi row: (N, s, s') and epochs without synthesis."""
    names = ("num_hardest", "num_pair_synthetics", "num_query_synthetics")
    numbers = dict(zip(names, mix, strict=True))
    return {"negatives": {"rule": "mochi", **numbers, "warmup_epochs": warmup}}


def _probes(train_classes: Mapping[str, int], k: int) -> dict[str, Any]:
    """Linear classification and nearest neighbours."""
    labelled = sum(train_classes.values())
    batch = 2 ** int(math.log2(min(max(labelled // 4, 1), 256)))
    return {
        "linear": {
            "protocol": "features-sgd",
            "epochs": 60,
            "batch_size": batch,
            "lr": 0.1,
            "lr_candidates": [0.03, 0.3, 1.0],
            "momentum": 0.9,
            "weight_decay": 0.0,
            "lr_drops": [30, 45],
            "lr_drop_factor": 0.1,
            "min_scale": None,
            "standardize": True,
        },
        "knn": {"k": k, "temperature": 0.07},
    }


# ---------------------------------------------------------------- detection


@dataclass(frozen=True)
class _Boxes:
    """The properties of a set that a detector's settings depend on."""

    classes: tuple[str, ...]
    images: NDArray[np.int64]  # (n, 2) height and width
    short: NDArray[np.float64]  # (m,) square root of each box's area over its image's short side
    ratio: NDArray[np.float64]  # (m,) height over width
    most: int
    """Boxes of one image."""
    masks: bool


def _read_boxes(description: Description) -> _Boxes:
    """Read the training boxes.

    Raises:
        UserError: the annotations cannot be used, or there are no boxes.
    """
    from mochi.detection import annotations as boxes  # noqa: PLC0415 (an extra)

    parts, classes, masks = _annotations(description.detection)
    merged = boxes.merge(parts)
    if not any(len(image.boxes) for image in merged.images):
        data = description.detection
        dropped = f" ({len(merged.dropped)} are dropped: {merged.dropped[0]})" if merged.dropped else ""
        raise DataError(
            f"{data['path']}: found no box in {', '.join(data['train'])}{dropped}; a "
            "detector has nothing to learn; for a set without boxes give only the folder of the images"
        )
    short, ratio, most = [], [], 1
    for image in merged.images:
        sizes = image.boxes[:, 2:] - image.boxes[:, :2]  # (n, 2) width and height
        short.append(np.sqrt(sizes.prod(axis=1)) / min(image.height, image.width))
        ratio.append(sizes[:, 1] / sizes[:, 0])
        most = max(most, len(sizes))
    return _Boxes(
        classes,
        np.array([(image.height, image.width) for image in merged.images], dtype=np.int64),
        np.concatenate(short).astype(np.float64),
        np.concatenate(ratio).astype(np.float64),
        most,
        masks,
    )


def _annotations(data: Mapping[str, Any]) -> tuple[list[Any], tuple[str, ...], bool]:
    """The training splits, the classes of all splits, and whether all have masks."""
    root = Path(data["path"])
    splits = [*data["train"], *data["test"]]
    if data["format"] == "coco":
        from mochi.detection import coco  # noqa: PLC0415 (an extra)

        read = {split: coco.read(root, split, "drop", masks=False) for split in splits}
        masks = all(_has_masks(root, split) for split in splits)
        return [read[split] for split in data["train"]], read[splits[0]].classes, masks
    from mochi.detection import voc  # noqa: PLC0415

    halves = [split.rpartition("/") for split in splits]
    sets = [(root / folder, name) for folder, _, name in halves]
    # All names, in alphabetical order, as VOC's own list is.
    classes = tuple(sorted({name for place in sets for name in voc.class_names(*place)}))
    return voc.read_sets(sets, classes, "drop")[: len(data["train"])], classes, False


def _has_masks(root: Path, split: str) -> bool:
    """Whether every object of a split has a segmentation."""
    content = read_json(root / "annotations" / f"instances_{split}.json", "COCO's instances format")
    return all(item.get("segmentation") for item in content["annotations"])


def _detection(
    data: Mapping[str, Any], boxes: _Boxes, iterations: int | None, *, on_gpu: bool
) -> dict[str, Any]:
    """A detection set, with sizes, anchors and iterations derived from its boxes."""
    size = _test_size(boxes, on_gpu=on_gpu)
    batch = min(8, max(len(boxes.images) // 2, 1))
    iterations = iterations or int(
        np.clip(10 * len(boxes.images) // batch, 100, 18_000 if on_gpu else 2_000)
    )
    return {
        "pretrain_seeds": [0],
        "data": {
            **data,
            **(
                {"classes": list(boxes.classes), "interpolation": "all-point"}
                if data["format"] == "voc"
                else {}
            ),
            "broken_objects": "drop",
            "empty_images": "keep" if data["format"] == "voc" else "drop",
        },
        "model": {
            "masks": boxes.masks,
            "anchor_sizes": _anchors(boxes.short * size),
            "anchor_ratios": [1.0] if _is_square(boxes.ratio) else [0.5, 1.0, 2.0],
            "rpn_batch": 64,
            "proposals_train": [600, 150],
            "proposals_test": [600, 100],
            "roi_size": 14 if boxes.masks else 7,
            "roi_batch": 32,
            "roi_positive": 0.5,
            "score_threshold": 0.05,
            "max_detections": int(np.clip(2 * boxes.most, 20, 100)),
        },
        "training": {
            "mode": "finetune",
            "seeds": [0],
            "lr": [0.04],
            "lr_batch_size": batch,
            "batch_size": batch,
            "micro_batch": batch,
            "iterations": iterations,
            "warmup_iterations": iterations // 10,
            "schedule": "cosine",
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "train_sizes": sorted({_rounded(size * scale, 16) for scale in (0.8, 1.0)} | {size}),
            "test_size": size,
            "max_size": 2 * size,
            "flip": True,
            "precise_bn_batches": min(20, iterations),
        },
    }


def _test_size(boxes: _Boxes, *, on_gpu: bool) -> int:
    """Short side of test images: the images' own, or the smallest at which small boxes cover a cell."""
    own = int(np.median(boxes.images.min(axis=1)))
    small = float(np.quantile(boxes.short, 0.1))
    needed = 16 / max(small, 1e-3)
    lowest, highest = (min(own, 480), 800) if on_gpu else (min(own, 160), 320)
    return max(_rounded(float(np.clip(needed, lowest, min(own, highest))), 16), 32)


def _anchors(sizes: NDArray[np.float64]) -> list[int]:
    """Distinct sides of anchors in pixels: quantiles of the boxes'."""
    chosen: list[int] = []
    for size in np.quantile(sizes, (0.1, 0.37, 0.63, 0.9)):
        rounded = max(round(float(size)), 4)
        if not chosen or rounded >= 1.3 * chosen[-1]:
            chosen.append(rounded)
    return chosen


def _is_square(ratio: NDArray[np.float64]) -> bool:
    low, high = np.quantile(ratio, (0.1, 0.9))
    return bool(low > 0.65 and high < 1.55)


def _rounded(value: float, multiple: int) -> int:
    return max(int(value / multiple + 0.5), 1) * multiple


# ---------------------------------------------------------------- YAML with comments


def _best(tried: Sequence[_Fit]) -> _Fit:
    """The first with enough epochs, else the one with the most, else the cheapest."""
    if tried[-1].epochs >= _ENOUGH_EPOCHS:
        return tried[-1]
    return max(tried, key=lambda fit: (max(fit.epochs, 0), -fit.fixed - fit.epoch))


def _classes(number: int) -> str:
    return "1 class" if number == 1 else f"{number} classes"


def _plain(text: object) -> str:
    """One line of printable text, for comments and titles."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def _render(content: Mapping[str, Any], comments: Mapping[str, str], header: str) -> str:
    """Keys in order, each with its reason if it has one, and an empty line between sections."""
    lines = [f"# {line}" if line else "#" for line in header.splitlines()]
    for key, value in content.items():
        if isinstance(value, dict) or key == "seeds":
            lines.append("")
        lines += _entry(key, value, key, comments, 0)
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any, path: str, comments: Mapping[str, str], depth: int) -> list[str]:
    """The lines of one key."""
    indent, comment = "  " * depth, comments.get(path, "")
    if isinstance(value, dict) and value and not _fits_on_a_line(key, value, path, depth):
        below = [
            line
            for name, each in value.items()
            for line in _entry(name, each, f"{path}.{name}", comments, depth + 1)
        ]
        return [*_above(comment, indent), f"{indent}{_flow(key)}:", *below]
    line = f"{indent}{_flow(key)}: {_flow(value)}"
    if comment and len(line) + 3 + len(comment) <= _WIDTH:
        return [f"{line} # {comment}"]
    return [*_above(comment, indent), line]


def _fits_on_a_line(key: str, value: Any, path: str, depth: int) -> bool:
    """Rows of the table, and what is short and below the first level."""
    return (path.startswith("methods.") and depth == 1) or (depth > 0 and len(key) + len(_flow(value)) < 60)


def _above(comment: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(comment, _WIDTH - len(indent) - 2)]


class _Dumper(yaml.SafeDumper):
    """Write unprintable text with escapes, so that it stays on one line."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent)


def _flow(value: Any) -> str:
    """A value on one line, as the reader of experiment files understands it."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("...\n").strip()
