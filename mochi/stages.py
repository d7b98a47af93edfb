"""The table of stages: what computes each result, what it writes, and which code decides its numbers.

Imported by the command line, the workflow and the tests; it imports no other module of mochi.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One kind of result. Its folder also contains provenance.json, which is written last."""

    outputs: tuple[str, ...]
    """Files in the folder of the result that others read."""
    numbers: tuple[str, ...]
    """Modules and packages whose code decides the numbers; a change there makes the results stale.

    Code for logs, progress, locks, parsing and writing files is excluded: a reworded message re-runs
    nothing. A test compares this list with what the stage imports.
    """


_ENCODERS = tuple(f"mochi.encoders.{name}" for name in ("__init__", "backbone", "resnet", "timm_encoder"))
_VIEWS = ("mochi.data.format", "mochi.data.ingest.decode", "mochi.data.views", "mochi.pixels")
_RUNTIME = ("mochi.runtime.distributed", "mochi.runtime.precision", "mochi.runtime.transfer")
_PHOTOGRAPHS = ("mochi.data.photographs", "mochi.data.ingest.decode", "mochi.data.views.counter_rng")

_CONTRAST = tuple(
    f"mochi.contrast.{name}"
    for name in ("diagnosis", "key_queue", "loss", "moco", "negatives", "rules.__init__", "rules.moco")
)
"""`PretrainRun.code` adds a row's rule of negatives and masks, so that a new rule does not affect other
rows."""
_DETECTION = tuple(
    f"mochi.detection.{name}"
    for name in (
        "annotations",
        "average_precision",
        "batches",
        "coco",
        "inference",
        "load_backbone",
        "model",
        "normalization",
        "sets",
        "stage",
        "training",
        "voc",
    )
)

_FINE_TUNING = (
    *_DETECTION,
    "mochi.data.ingest.decode",
    "mochi.encoders.shared_batch_norm",
    "mochi.pixels",
    "mochi.runtime.seeding",
    *_ENCODERS,
    *_RUNTIME,
)

STAGES = {
    "prepare": Stage(
        outputs=("manifest.json",),
        numbers=("mochi.data.format", "mochi.data.ingest", *_PHOTOGRAPHS),
    ),
    "scenes": Stage(
        outputs=("scenes.json",),
        numbers=(
            "mochi.detection.annotations",
            "mochi.detection.coco",
            "mochi.detection.scenes",
            "mochi.detection.voc",
            *_PHOTOGRAPHS,
        ),
    ),
    "pretrain": Stage(
        outputs=("encoder.safetensors", "head.safetensors", "metrics.csv", "matching.csv"),
        numbers=(
            *_CONTRAST,
            "mochi.encoders.batch_norm",
            "mochi.encoders.heads",
            "mochi.encoders.shared_batch_norm",
            "mochi.pretraining.loop",
            "mochi.pretraining.objectives",
            "mochi.pretraining.optimizers",
            "mochi.runtime.cuda_graphs",
            "mochi.runtime.seeding",
            *_ENCODERS,
            *_VIEWS,
            *_RUNTIME,
        ),
    ),
    # And the module or package of the task: `numbers_of_task`.
    "evaluate": Stage(
        outputs=("metrics.json", "confusion.csv"),
        numbers=(
            "mochi.evaluation.confusion",
            "mochi.evaluation.features",
            "mochi.runtime.seeding",
            *_ENCODERS,
            *_VIEWS,
            *_RUNTIME,
        ),
    ),
    "analyze": Stage(
        outputs=("analysis.json", "neighbours.jpg", "map.jpg"),
        numbers=(
            "mochi.analysis",
            "mochi.encoders.heads",
            "mochi.evaluation.features",
            "mochi.runtime.seeding",
            *_ENCODERS,
            *_VIEWS,
            *_RUNTIME,
        ),
    ),
    "search": Stage(outputs=("metrics.json",), numbers=_FINE_TUNING),
    "detect": Stage(
        outputs=("metrics.json", "detections.png", "precision_recall.csv", "precision_recall.png"),
        numbers=_FINE_TUNING,
    ),
    "report": Stage(
        outputs=(
            "scores.csv",
            "curves.csv",
            "matching.csv",
            "records.json",
            "summary.csv",
            "summary.md",
            "summary.json",
            "summary.tex",
            "report.html",
        ),
        numbers=("mochi.report",),
    ),
}

UNTRAINED = _ENCODERS
"""What determines the weights of an encoder that is only initialised, without training."""

ANALYSIS = "analysis"
"""Folder of an encoder's analysis, next to its evaluations."""

DETECTION = "detection-"
"""Prefix of the evaluations that fine-tune a detector; the name of the detection set follows."""
FINE_TUNING = "/fine-tuning"
"""Follows a detection set's name and precedes the seed, if each fine-tuning is a job."""
LR_SEARCH = "/lr-search"
"""Follows a detection set's name: the job that chooses the learning rate for those."""


def stage_of(evaluation: str) -> str:
    """The stage that computes an evaluation: `evaluate`, `detect`, or `search` (learning rates)."""
    if not evaluation.startswith(DETECTION):
        return "evaluate"
    return "search" if evaluation.endswith(LR_SEARCH) else "detect"


def column_of(evaluation: str) -> str:
    """The evaluation that tables name: `detection-<set>` for each of its fine-tunings."""
    return evaluation.partition("/")[0]


def numbers_of_task(task: str) -> tuple[str, ...]:
    """Modules and packages whose code decides the numbers of a task on frozen features."""
    return (f"mochi.evaluation.tasks.{task}", *STAGES["evaluate"].numbers)
