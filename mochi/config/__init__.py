"""What an experiment says, checked before anything is computed.

An *experiment* file (`config/*.yaml`) describes one table of results. `resolve` turns
(experiment, method, seed) into a *run*: complete in itself, holding only what that run depends on, and
written as `run.yaml`. Every stage of the pipeline reads the run and nothing else.

Scientific numbers have no defaults here: they stand in the experiment file, each with its source.
"""

from mochi.config.datasets import (
    Cifar,
    Coco,
    Dataset,
    Download,
    Folder,
    ImageNet,
    Imagenette,
    PhotoPatches,
    Stl10,
    Voc,
)
from mochi.config.detection import (
    DetectionData,
    DetectionModel,
    DetectionSet,
    DetectionTraining,
    PhotoScenes,
)
from mochi.config.evaluation import EVALUATIONS, Evaluation, LinearProbe, NearestNeighbours
from mochi.config.experiment import (
    RUN_VERSION,
    Experiment,
    Run,
    detection_runs,
    digest,
    load_experiment,
    load_run,
    method_seeds,
    only_for,
    parse_dataset,
    parse_experiment,
    resolve,
    settings,
    write_run,
)
from mochi.config.reading import ConfigError
from mochi.config.sections import Section
from mochi.config.training import (
    Augmentation,
    Contrastive,
    Encoder,
    Mixing,
    Objective,
    Supervised,
    Training,
    Untrained,
)

__all__ = [
    "EVALUATIONS",
    "RUN_VERSION",
    "Augmentation",
    "Cifar",
    "Coco",
    "ConfigError",
    "Contrastive",
    "Dataset",
    "DetectionData",
    "DetectionModel",
    "DetectionSet",
    "DetectionTraining",
    "Download",
    "Encoder",
    "Evaluation",
    "Experiment",
    "Folder",
    "ImageNet",
    "Imagenette",
    "LinearProbe",
    "Mixing",
    "NearestNeighbours",
    "Objective",
    "PhotoPatches",
    "PhotoScenes",
    "Run",
    "Section",
    "Stl10",
    "Supervised",
    "Training",
    "Untrained",
    "Voc",
    "detection_runs",
    "digest",
    "load_experiment",
    "load_run",
    "method_seeds",
    "only_for",
    "parse_dataset",
    "parse_experiment",
    "resolve",
    "settings",
    "write_run",
]
