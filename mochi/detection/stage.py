"""The detection stage: an encoder fine-tuned several times on one set, judged, and drawn."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mochi.config import ConfigError, DetectionData, DetectionSet, Run, digest, settings
from mochi.detection import coco, figures, voc
from mochi.detection.annotations import Annotations, for_training, merge, split_off
from mochi.detection.average_precision import Detections, coco_metrics, voc_curves, voc_metrics
from mochi.detection.batches import Images
from mochi.detection.check_images import check_images
from mochi.detection.inference import detect
from mochi.detection.model import Detector
from mochi.detection.training import FineTuning, FrozenBackbone, Recipe
from mochi.provenance.fingerprint import file_digest
from mochi.provenance.record import Stopwatch, record
from mochi.runtime import distributed
from mochi.runtime.precision import autocast
from mochi.runtime.progress import NonFiniteError, write_events
from mochi.storage import checkpoint
from mochi.storage.atomic import write_json

logger = logging.getLogger(__name__)

# Results of finished fine-tunings that the mean and the spread are taken of.
_HEADLINE = ("AP", "AP50", "AP75")


def run(
    run: Run, set_name: str, encoder_file: Path, out: Path, work: Path, events: Path | None = None
) -> None:
    """Fine-tune the run's encoder on a detection set and write metrics, provenance and pictures.

    Args:
        run: names the encoder's architecture and the set.
        set_name: key of `evaluation.detection`.
        encoder_file: encoder.safetensors of this run.
        out: receives metrics.json, provenance.json, detections.png, precision_recall.{csv,png}.
        work: holds resume checkpoints and finished fine-tunings; emptied at the end.
        events: folder for TensorBoard events; None: none.

    Raises:
        ConfigError: no such set, or the processes cannot share a batch.
        AnnotationError: annotations or images that cannot be used.
        InitialisationError: the encoder does not fit.
        CheckpointError: a checkpoint in `work` is of another run.
        NonFiniteError: the loss or a weight is not a number.
    """
    watch = Stopwatch()
    assert run.evaluation is not None
    if set_name not in run.evaluation.detection:
        known = ", ".join(run.evaluation.detection) or "none"
        raise ConfigError(f"detection set: found {set_name!r}; this run has {known}")
    chosen = run.evaluation.detection[set_name]
    device = distributed.pick_device()
    with distributed.process_group(device):
        train, test = read_splits(chosen.data, masks=chosen.model.masks)
        check_images([train, test], Path(chosen.data.path), jobs=torch.get_num_threads())
        recipe = Recipe(chosen, run.encoder, encoder_file, len(train.classes), device)
        learnt = Images(for_training(train, chosen.data.empty_images))
        frozen = FrozenBackbone(recipe, learnt) if chosen.training.reading == "frozen" else None
        digests = {"train": annotations_digest(train), "test": annotations_digest(test)}
        stage = _Stage(run, set_name, recipe, frozen, work, events, digests)
        rate, tries = stage.choose_rate(train)
        results = {}
        for seed in chosen.training.seeds:
            results[seed] = stage.fine_tuned(learnt, Images(test), rate, seed, out)
        if distributed.rank() == 0:
            first = results[chosen.training.seeds[0]]
            metrics = summarise(list(results.values()), chosen, rate, tries)
            write_json(out / "metrics.json", metrics)
            provenance = record(
                f"detection-{set_name}", run, __name__, {"encoder": encoder_file}, watch,
                checksums=first["checksums"],
                annotations={"train": learnt.annotations.report(), "test": test.report()},
                annotations_sha256=stage.digests,
                world_size=distributed.world_size(),
            )  # fmt: skip
            write_json(out / "provenance.json", provenance)
            stage.clear()


def read_splits(data: DetectionData, *, masks: bool) -> tuple[Annotations, Annotations]:
    """Training and test annotations, of one or several folders each.

    Raises:
        AnnotationError: see the readers.
    """
    parts = []
    for names in (data.train, data.test):
        if data.format == "coco":
            read = [coco.read(Path(data.path), name, data.broken_objects, masks) for name in names]
        else:
            assert data.classes is not None
            read = []
            for name in names:
                folder, _, image_set = name.rpartition("/")
                read.append(
                    voc.read(Path(data.path) / folder, image_set, data.classes, data.broken_objects)
                )
        parts.append(merge(read))
        logger.info("%s: %s", " + ".join(names), json.dumps(parts[-1].report()))
    if parts[0].classes != parts[1].classes:
        raise ConfigError(f"{data.path}: train has classes {parts[0].classes}, test has {parts[1].classes}")
    return parts[0], parts[1]


def annotations_digest(annotations: Annotations) -> str:
    """sha256 of what was read of a split, its images' pixels aside, wherever and however it was written."""
    total = hashlib.sha256(json.dumps(annotations.classes).encode())
    for image in annotations.images:
        masks = [[mask["size"], str(mask["counts"])] for mask in image.masks or ()]
        said = [image.image_id, image.path.name, image.height, image.width, len(image.labels), masks]
        total.update(json.dumps(said).encode())
        for array in (image.boxes, image.labels, image.ignored, image.trained, image.areas):
            total.update(b"" if array is None else array.tobytes())
    return total.hexdigest()


def judge(annotations: Annotations, detections: Detections, data: DetectionData) -> dict[str, Any]:
    """Percent. VOC sets: both VOC rules and COCO's beside them; COCO sets: COCO's, masks too."""
    if data.format == "coco":
        return dict(coco_metrics(annotations, detections))
    assert data.rule is not None
    metrics = voc_metrics(voc_curves(annotations, detections), annotations.classes, data.rule)
    return metrics | {
        f"coco_{name}": value for name, value in coco_metrics(annotations, detections).items()
    }


@dataclass
class _Stage:
    """One encoder on one set: what all its fine-tunings share, and where they leave their traces."""

    run: Run
    set_name: str
    recipe: Recipe
    frozen: FrozenBackbone | None
    work: Path
    events: Path | None
    digests: Mapping[str, str]
    """Of the annotations: what was finished on others must not enter one mean with what is to come."""

    def __post_init__(self) -> None:
        self._identity = {
            "experiment": self.run.experiment,
            "method": self.run.method,
            "set": self.set_name,
            "encoder_sha256": file_digest(self.recipe.weights),
            "annotations_sha256": self.digests,
            **settings(self.run, f"detection-{self.set_name}"),
        }

    def choose_rate(self, train: Annotations) -> tuple[float, dict[str, float | None]]:
        """The learning rate with the best AP50 on a part of train; a rate that diverges has none."""
        training = self.recipe.settings.training
        if len(training.lr) == 1:
            return training.lr[0], {}
        assert training.validation is not None
        assert training.choose_iterations is not None
        rest, part = split_off(train, training.validation, seed=0)
        learnt = Images(for_training(rest, self.recipe.settings.data.empty_images))
        judged = Images(part)
        tries: dict[str, float | None] = {}
        for rate in training.lr:
            name = f"lr{rate:g}"
            found = self._finished(name)
            if found is None:
                found = {"AP50": None}
                try:
                    detector, _ = self._train(
                        learnt, rate, training.choose_iterations, training.seeds[0], name
                    )
                    detections = self._detect(detector, judged)
                    found = {"AP50": judge(part, detections, self.recipe.settings.data)["AP50"]}
                except NonFiniteError as error:
                    logger.warning("learning rate %g diverges: %s", rate, error)
                self._finish(name, found)
            tries[f"{rate:g}"] = found["AP50"]
        best = max(training.lr, key=lambda rate: tries[f"{rate:g}"] or 0.0)
        logger.info("learning rate %g chosen on %d validation images: %s", best, len(part.images), tries)
        return best, tries

    def fine_tuned(self, train: Images, test: Images, rate: float, seed: int, out: Path) -> dict[str, Any]:
        """Metrics of one fine-tuning and the encoder's checksums; pictures too for the first seed."""
        name = f"seed{seed}"
        found = self._finished(name)
        if found is not None:
            return found
        training = self.recipe.settings.training
        detector, tuning = self._train(train, rate, training.iterations, seed, name)
        detections = self._detect(detector, test)
        result = {
            "metrics": judge(test.annotations, detections, self.recipe.settings.data),
            "checksums": tuning.proof,
            "boxes_vanished_in_resizing": tuning.vanished,
        }
        if seed == training.seeds[0] and distributed.rank() == 0:
            curves = voc_curves(test.annotations, detections, np.array([0.5]))[0]
            figures.write_curves(out, curves, test.annotations.classes)
            figures.draw_detections(out / "detections.png", test, detections)
        self._finish(name, result)
        logger.info("%s: %s", self._label(name), json.dumps(result["metrics"]))
        return result

    def clear(self) -> None:
        """Remove all traces: the results are written."""
        for path in self.work.glob("*.json"):
            path.unlink()
        if self.work.is_dir() and not any(self.work.iterdir()):
            self.work.rmdir()

    def _train(
        self, images: Images, rate: float, iterations: int, seed: int, name: str
    ) -> tuple[Detector, FineTuning]:
        saved = self.work / f"{name}.safetensors"
        tuning = FineTuning(self.recipe, images, rate, iterations, seed, saved, self._identity, self.frozen)
        rows = None
        if self.events is not None and distributed.rank() == 0:
            folder = self.events / name
            rows = lambda row: write_events(folder, {"epoch": row["step"], **row})  # noqa: E731
        detector = tuning.train(self._label(name), rows)
        if distributed.rank() == 0:
            checkpoint.discard(saved)
        return detector, tuning

    def _detect(self, detector: Detector, images: Images) -> Detections:
        training = self.recipe.settings.training
        frozen = self.frozen
        return detect(
            detector,
            images,
            training.test_size,
            training.max_size,
            training.micro_batch,
            lambda: autocast(self.recipe.device, training.precision),
            self.work,
            None if frozen is None else lambda batch: frozen.features(images, batch),
        )

    def _label(self, name: str) -> str:
        return f"{self.run.method} seed {self.run.seed}, {self.set_name} {name}"

    def _finished(self, name: str) -> dict[str, Any] | None:
        """What `_finish` left, if it is of this very run."""
        path = self.work / f"{name}-{digest(self._identity)}.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _finish(self, name: str, result: Mapping[str, Any]) -> None:
        if distributed.rank() == 0:
            write_json(self.work / f"{name}-{digest(self._identity)}.json", result)
        distributed.wait()


def summarise(
    results: list[dict[str, Any]], chosen: DetectionSet, rate: float, tries: Mapping[str, float | None]
) -> dict[str, Any]:
    """metrics.json: means over the fine-tunings, their spread, and every single value."""
    training = chosen.training
    singles = [result["metrics"] for result in results]
    names = [name for name, value in singles[0].items() if isinstance(value, float)]
    means = {name: float(np.mean([single[name] for single in singles])) for name in names}
    spread = {
        f"{name}_std": float(np.std([single[name] for single in singles], ddof=1))
        for name in names
        if len(singles) > 1 and name.removeprefix("mask_") in _HEADLINE
    }
    return {
        **means,
        **spread,
        "num_fine_tunings": len(singles),
        "reading": training.reading,
        "rule": chosen.data.rule or "coco",
        "lr": rate,
        "lr_tries_AP50": dict(tries),
        "iterations": training.iterations,
        "batch_size": training.batch_size,
        "checksums": results[0]["checksums"],
        "fine_tunings": {str(seed): single for seed, single in zip(training.seeds, singles, strict=True)},
    }
