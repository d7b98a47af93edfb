"""The detection stage: fine-tune an encoder several times on one set, evaluate, and draw detections."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mochi.config import DetectionData, DetectionRun, DetectionSet
from mochi.detection import figures
from mochi.detection.annotations import AnnotationError, Annotations, for_training, split_off
from mochi.detection.average_precision import Detections, coco_metrics, voc_curves, voc_metrics
from mochi.detection.batches import Images
from mochi.detection.check_images import check_images
from mochi.detection.inference import detect
from mochi.detection.model import Detector
from mochi.detection.sets import oddities, read_splits
from mochi.detection.training import FineTuning, FrozenBackbone, Recipe
from mochi.errors import UserError
from mochi.provenance.fingerprint import digest, file_digest
from mochi.provenance.record import Stopwatch, write_record
from mochi.provenance.wanted import Result
from mochi.runtime import distributed
from mochi.runtime.monitoring import NonFiniteError
from mochi.runtime.precision import autocast
from mochi.runtime.seeding import numpy_generator
from mochi.runtime.tensorboard import write_events
from mochi.storage import checkpoint
from mochi.storage.atomic import publishing, require_space, write_json

logger = logging.getLogger(__name__)

# Metrics whose standard deviation over the fine-tunings is reported.
_HEADLINE = ("AP", "AP50", "AP75")

# Disk space: of pictures and tables; of a detection as JSON, without and with its mask.
_PICTURE_BYTES, _BOX_BYTES, _MASK_BYTES = 2 << 20, 128, 512


def run(
    run: DetectionRun, result: Result, work: Path, *, workers: int = 0, events: Path | None = None
) -> None:
    """Fine-tune an encoder on a detection set and publish metrics, pictures and provenance.

    Args:
        run: the encoder's architecture and the detection set; or only a search for the learning rate.
        result: receives metrics.json, detections.png, precision_recall.{csv,png} and provenance.json, or of
            a search metrics.json and provenance.json. Its input `encoder` is the encoder file, and `lr`, if
            it has that, metrics.json of a search.
        work: holds resume checkpoints and finished fine-tunings; emptied at the end.
        workers: processes of this rank that read images.
        events: folder for TensorBoard events; None: none.

    Raises:
        ConfigError: the processes cannot share a batch.
        AnnotationError: annotations or images cannot be used, or there is nothing to train on or measure.
        EncoderError: the encoder file does not fit.
        CheckpointError: a checkpoint in `work` is of another run.
        NonFiniteError: NaN or Inf in a loss or in the weights.
        StorageError: `work` or the result's folder cannot be written, or has too little space.
    """
    watch = Stopwatch()
    settings, encoder_file = run.detection, result.inputs["encoder"]
    device = distributed.pick_device()
    with distributed.process_group(device):
        train, test = read_splits(settings.data, masks=settings.model.masks)
        train_images = Images(for_training(train, settings.data.empty_images))
        check_images([train, test], jobs=torch.get_num_threads())
        recipe = Recipe(settings, run.encoder, encoder_file, len(train.classes), device, workers)
        require_space({result.folder: _PICTURE_BYTES, work: _work_bytes(recipe, test, work)})
        frozen = FrozenBackbone(recipe, train_images) if settings.training.mode == "frozen" else None
        digests = {"train": annotations_digest(train), "test": annotations_digest(test)}
        identity = {
            "experiment": run.experiment,
            "method": run.method,
            "set": run.set_name,
            "encoder_sha256": file_digest(encoder_file),
            "annotations_sha256": digests,
            **result.settings,
        }
        label = f"{run.method} seed {run.seed}, {run.set_name}"
        tunings = _FineTunings(label, recipe, frozen, identity, work, events)
        search_file = result.inputs.get("lr")
        search = (
            tunings.search_lr(train)
            if search_file is None
            else read_search(search_file, settings.training.lr)
        )
        extra: dict[str, Any] = {
            "annotations": {"train": train_images.annotations.report(), "test": test.report()},
            "annotations_sha256": digests,
            "world_size": distributed.world_size(),
        }
        if run.searches:
            metrics = search
        else:
            tuned = [
                tunings.result(train_images, Images(test), search["lr"], seed)
                for seed in settings.training.seeds
            ]
            metrics = {**summarise(tuned, settings, search), "notes": oddities(train, test)}
            extra["checksums"] = tuned[0]["checksums"]
        if distributed.rank() == 0:
            with publishing(result.folder) as new:
                if not run.searches:
                    for picture in tunings.pictures.iterdir():
                        shutil.copy(picture, new)
                write_json(new / "metrics.json", metrics)
                write_record(new, result, watch, **extra)
            tunings.clear()


def _work_bytes(recipe: Recipe, test: Annotations, work: Path) -> int:
    """Additional disk space: three checkpoints during a save, pictures, and what processes exchange."""
    model, existing = recipe.settings.model, sum(path.stat().st_size for path in work.glob("*.safetensors"))
    detections = len(test.images) * model.max_detections if distributed.world_size() > 1 else 0
    exchanged = detections * (_MASK_BYTES if model.masks else _BOX_BYTES)
    return 3 * recipe.checkpoint_bytes() - existing + _PICTURE_BYTES + exchanged


def read_search(path: Path, candidates: list[float]) -> dict[str, Any]:
    """The result of a search for the learning rate.

    Raises:
        UserError: it is not such a result, or has other candidates.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        search = {name: content[name] for name in ("lr", "lr_candidates_AP50")}
    except (ValueError, KeyError, TypeError):
        search = {"lr": None}
    if search["lr"] not in candidates:
        raise UserError(
            f"{path}: found no learning rate of {', '.join(f'{lr:g}' for lr in candidates)}; remove "
            "it, and search again"
        )
    return search


def annotations_digest(annotations: Annotations) -> str:
    """sha256 of a split's annotations, independent of folder and format; pixels are not included."""
    total = hashlib.sha256(json.dumps(annotations.classes).encode())
    for image in annotations.images:
        masks = [[mask["size"], str(mask["counts"])] for mask in image.masks or ()]
        described = [image.image_id, image.path.name, image.height, image.width, len(image.labels), masks]
        total.update(json.dumps(described).encode())
        for array in (image.boxes, image.labels, image.ignored, image.trained, image.areas):
            total.update(b"" if array is None else array.tobytes())
    return total.hexdigest()


def evaluate(annotations: Annotations, detections: Detections, data: DetectionData) -> dict[str, Any]:
    """Metrics in percent: of VOC sets by VOC's two interpolations and COCO's, of COCO sets by COCO's."""
    if data.format == "coco":
        return dict(coco_metrics(annotations, detections))
    assert data.interpolation is not None
    metrics = voc_metrics(voc_curves(annotations, detections), annotations.classes, data.interpolation)
    return metrics | {
        f"coco_{name}": value for name, value in coco_metrics(annotations, detections).items()
    }


@dataclass(frozen=True)
class _FineTunings:
    """All fine-tunings of one encoder on one set. Finished ones are kept in `work` until `clear`."""

    label: str
    """For log lines."""
    recipe: Recipe
    frozen: FrozenBackbone | None
    identity: Mapping[str, Any]
    """What the numbers depend on: results and checkpoints in `work` with another identity are not used."""
    work: Path
    events: Path | None

    @property
    def pictures(self) -> Path:
        """Folder of the first fine-tuning's pictures."""
        return self.work / f"pictures-{digest(self.identity)}"

    def search_lr(self, train: Annotations) -> dict[str, Any]:
        """`lr`, the best learning rate by AP50 on a part of train, and `lr_candidates_AP50`.

        A candidate that diverges has None. A single one is used as it is, without a search.

        Raises:
            AnnotationError: that part has no object.
        """
        training, data = self.recipe.settings.training, self.recipe.settings.data
        if len(training.lr) == 1:
            return {"lr": training.lr[0], "lr_candidates_AP50": {}}
        assert training.validation is not None
        assert training.search_iterations is not None
        rest, validation = split_off(train, training.validation, numpy_generator("lr search"))
        if all(image.ignored.all() for image in validation.images):
            raise AnnotationError(
                f"found no object in the {len(validation.images)} training images that compare learning "
                "rates; raise `validation`, or give one lr"
            )
        train_images, validation_images = Images(for_training(rest, data.empty_images)), Images(validation)
        scores: dict[str, float | None] = {}
        for lr in training.lr:
            name = f"lr{lr:g}"
            stored = self._load(name)
            if stored is None:
                stored = {"AP50": None}
                try:
                    detector, _ = self._train(
                        train_images, lr, training.search_iterations, training.seeds[0], name
                    )
                    detections = self._detect(detector, validation_images)
                    stored = {"AP50": evaluate(validation, detections, data)["AP50"]}
                except NonFiniteError as error:
                    logger.warning("learning rate %g diverges: %s", lr, error)
                self._store(name, stored)
            scores[f"{lr:g}"] = stored["AP50"]
        best = max(training.lr, key=lambda lr: scores[f"{lr:g}"] or 0.0)
        logger.info(
            "learning rate %g chosen on %d validation images: %s", best, len(validation.images), scores
        )
        return {"lr": best, "lr_candidates_AP50": scores}

    def result(self, train: Images, test: Images, lr: float, seed: int) -> dict[str, Any]:
        """Metrics of one fine-tuning and the encoder's checksums; the first seed also writes pictures."""
        name = f"seed{seed}"
        stored = self._load(name)
        if stored is not None:
            return stored
        training = self.recipe.settings.training
        detector, tuning = self._train(train, lr, training.iterations, seed, name)
        detections = self._detect(detector, test)
        result = {
            "metrics": evaluate(test.annotations, detections, self.recipe.settings.data),
            "checksums": tuning.checksums,
            "boxes_vanished_in_resizing": tuning.vanished,
        }
        if seed == training.seeds[0] and distributed.rank() == 0:
            curves = voc_curves(test.annotations, detections, np.array([0.5]))[0]
            self.pictures.mkdir(parents=True, exist_ok=True)
            figures.write_curves(self.pictures, curves, test.annotations.classes)
            figures.draw_detections(self.pictures / "detections.png", test, detections)
        self._store(name, result)
        logger.info("%s %s: %s", self.label, name, json.dumps(result["metrics"]))
        return result

    def clear(self) -> None:
        """Remove the stored fine-tunings: the results are written."""
        shutil.rmtree(self.pictures, ignore_errors=True)  # a search has none
        for path in self.work.glob("*.json"):
            path.unlink()

    def _train(
        self, images: Images, lr: float, iterations: int, seed: int, name: str
    ) -> tuple[Detector, FineTuning]:
        saved = self.work / f"{name}.safetensors"
        tuning = FineTuning(self.recipe, images, lr, iterations, seed, saved, self.identity, self.frozen)

        def write(row: dict[str, Any]) -> None:
            if self.events is not None and distributed.rank() == 0:
                write_events(self.events / name, {"epoch": row["step"], **row})

        detector = tuning.train(f"{self.label} {name}", write)
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
            self.recipe.workers,
        )

    def _load(self, name: str) -> dict[str, Any] | None:
        """What `_store` wrote for this identity, or None."""
        path = self._path(name)
        if not path.exists():
            return None
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return stored

    def _store(self, name: str, result: Mapping[str, Any]) -> None:
        if distributed.rank() == 0:
            write_json(self._path(name), result)
        distributed.barrier()

    def _path(self, name: str) -> Path:
        return self.work / f"{name}-{digest(self.identity)}.json"


def summarise(
    results: list[dict[str, Any]], detection: DetectionSet, search: Mapping[str, Any]
) -> dict[str, Any]:
    """metrics.json: means over the fine-tunings, their standard deviations, and every single value.

    If there were no objects, a number is None.
    """
    training = detection.training
    singles = [result["metrics"] for result in results]
    names = [name for name, value in singles[0].items() if not isinstance(value, dict)]
    measured = [name for name in names if singles[0][name] is not None]
    means = {name: float(np.mean([single[name] for single in singles])) for name in measured}
    deviations = {
        f"{name}_std": float(np.std([single[name] for single in singles], ddof=1))
        for name in measured
        if len(singles) > 1 and name.removeprefix("mask_") in _HEADLINE
    }
    return {
        **dict.fromkeys(names),
        **means,
        **deviations,
        "num_fine_tunings": len(singles),
        "mode": training.mode,
        "interpolation": detection.data.interpolation or "101-point",
        "lr": search["lr"],
        "lr_candidates_AP50": search["lr_candidates_AP50"],
        "iterations": training.iterations,
        "batch_size": training.batch_size,
        "checksums": results[0]["checksums"],
        "fine_tunings": {str(seed): single for seed, single in zip(training.seeds, singles, strict=True)},
    }
