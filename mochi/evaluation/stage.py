"""The evaluation stage: a task on the features of a frozen encoder, its metrics and its provenance."""

import importlib
from pathlib import Path

from mochi.config import ProbeRun
from mochi.data.format import open_dataset
from mochi.encoders.files import digest, load_encoder
from mochi.evaluation.confusion import write_confusion
from mochi.evaluation.features import Frozen, labelled_split, precision_on
from mochi.evaluation.resume import ResumePoint
from mochi.provenance.record import Stopwatch, write_record
from mochi.provenance.wanted import Result
from mochi.runtime.distributed import pick_device
from mochi.runtime.precision import make_deterministic
from mochi.storage.atomic import publishing, write_json


def run(run: ProbeRun, result: Result, work: Path, *, workers: int = 0) -> None:
    """Evaluate a frozen encoder and publish metrics.json, confusion.csv and provenance.json.

    Args:
        run: the task and its protocol.
        result: receives the results; its inputs are `encoder` and `data`, the manifest of the data set.
        work: folder of the resume checkpoint, which is removed at the end.
        workers: processes that load images.

    Raises:
        DataError, EncoderError: the data or the encoder do not fit.
        CheckpointError: the checkpoint in `work` is of another result, or the disk is full.
        NonFiniteError: the protocol's learning rate is too large for these features.
    """
    watch = Stopwatch()
    device = pick_device()
    make_deterministic()
    # The backbone stays in evaluation mode: with batch statistics it would not be the same encoder, and
    # its running statistics would move. MoCo's main_lincls.py does the same.
    encoder = load_encoder(result.inputs["encoder"], run.encoder, device)
    before = digest(encoder.state_dict())
    dataset = open_dataset(result.inputs["data"].parent)
    for name in ("train", "val"):
        labelled_split(dataset, name)  # what is missing shows before hours are spent on the other
    task = importlib.import_module(f"mochi.evaluation.tasks.{run.task}")
    resume_point = ResumePoint(work, result, watch)
    metrics = task.evaluate(Frozen(run, encoder, dataset, device, workers, resume_point))
    assert digest(encoder.state_dict()) == before, "the evaluation changed the encoder"
    with publishing(result.folder) as new:
        write_confusion(new / "confusion.csv", metrics.pop("confusion", []), dataset.classes)
        write_json(new / "metrics.json", metrics)
        write_record(
            new,
            result,
            watch,
            precision=precision_on(device),
            code_digests=resume_point.code_digests,
            wall_seconds=resume_point.wall_seconds(),
        )
    resume_point.discard()
