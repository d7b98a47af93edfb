"""The evaluation stage: a task on the features of a frozen encoder, its metrics and its provenance."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mochi.config import ProbeRun
from mochi.data.format import open_dataset
from mochi.encoders.files import digest, load_encoder
from mochi.evaluation.confusion import confusion, write_confusion
from mochi.evaluation.feature_files import FeatureFiles
from mochi.evaluation.features import Frozen, precision_on
from mochi.evaluation.notes import notes
from mochi.evaluation.resume import ResumePoint
from mochi.layout import Paths
from mochi.provenance.fingerprint import code_digest
from mochi.provenance.record import Stopwatch, write_record
from mochi.provenance.wanted import Result
from mochi.runtime import distributed
from mochi.runtime.precision import make_deterministic
from mochi.runtime.shares import warn_without_workers
from mochi.stages import STAGES
from mochi.storage.atomic import publishing, require_space, write_json

logger = logging.getLogger(__name__)


def run(
    run: ProbeRun, result: Result, work: Path, *, workers: int = 0, others: Sequence[Result] = ()
) -> None:
    """Evaluate a frozen encoder and publish metrics.json, confusion.csv and provenance.json.

    Args:
        run: the task and its protocol.
        result: receives the results; its inputs are `encoder` and `data`, the manifest of the data set.
        work: folder of the resume checkpoint, which is removed at the end.
        workers: processes of this rank that load images.
        others: evaluations that need the same features, which are stored for those not computed yet.

    Raises:
        DataError, EncoderError: the data or the encoder do not fit.
        CheckpointError: the checkpoint in `work` is of another result, or the disk is full.
        NonFiniteError: the protocol's learning rate is too large for these features.
        StorageError: `work` or the result's folder cannot be written, or has too little space.
    """
    watch = Stopwatch()
    device = distributed.pick_device()
    make_deterministic()
    with distributed.process_group(device):
        # The backbone stays in evaluation mode: with batch statistics it would not be the same encoder, and
        # its running statistics would change. MoCo's main_lincls.py does the same.
        encoder = load_encoder(result.inputs["encoder"], run.encoder, device)
        before = digest(encoder.state_dict())
        dataset = open_dataset(result.inputs["data"].parent)
        resume_point = ResumePoint(work, result, watch)
        files = _files(run, result, device, others)
        frozen = Frozen(run, encoder, dataset, device, workers, resume_point, files)
        # A missing split fails here, before hours are spent on the other.
        train, val = (split.labels[split.labelled] for split in map(frozen.split, ("train", "val")))
        if dataset.split("train").pixels is None:
            warn_without_workers(device.type, workers)
        saved = run.protocol.checkpoint_bytes(encoder.num_features, frozen.num_classes)
        tables = _confusion_bytes(dataset.classes, val)
        require_space({work: resume_point.additional_bytes(saved), result.folder: tables})
        metrics = run.protocol.evaluate(frozen)
        assert digest(encoder.state_dict()) == before, "the evaluation changed the encoder"
        distributed.barrier()  # for ranks that read the checkpoint
        if distributed.rank() != 0:
            return
        predicted = metrics.pop("predicted", None)
        metrics["notes"] = notes(metrics, train, val, dataset.classes)
        for note in metrics["notes"]:
            logger.warning("%s: %s", result.label, note)
        if files is not None:
            files.discard_unless_needed()  # before the result exists: a kill must not leave them behind
        with publishing(result.folder) as new:
            pairs = [] if predicted is None else confusion(torch.from_numpy(val), predicted.cpu())
            write_confusion(new / "confusion.csv", pairs, dataset.classes)
            write_json(new / "metrics.json", metrics)
            write_record(
                new,
                result,
                watch,
                precision=precision_on(device),
                code_digests=resume_point.code_digests,
                wall_seconds=resume_point.wall_seconds(),
                world_size=distributed.world_size(),
            )
        resume_point.discard()
        if files is not None:
            files.discard_unless_needed()  # again: the last two evaluations may have ended at the same time


def _confusion_bytes(classes: Sequence[str], labels: NDArray[np.int64]) -> int:
    """At most: one line for each image, or for each pair of classes."""
    return min(len(labels), len(classes) ** 2) * (2 * max(map(len, classes)) + 8)


def _files(
    run: ProbeRun, result: Result, device: torch.device, others: Sequence[Result]
) -> FeatureFiles | None:
    """Where features are stored for other evaluations; None if there are none."""
    if not others:
        return None
    name = f".features-{run.dataset.name}-{run.resize}-{run.image_size}"  # no task has such a name
    how = [
        code_digest(*STAGES["evaluate"].numbers),
        [torch.__version__, device.type, precision_on(device)],
        [run.encoder.model_dump(mode="json"), run.resize, run.image_size],
        [run.batch_size, distributed.world_size()],
    ]
    folder = Paths(run.experiment).work(run.method, run.seed, name)
    return FeatureFiles(folder, result, how, list(others))
