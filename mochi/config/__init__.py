"""Experiment files, checked before anything is computed.

An *experiment* file (`config/*.yaml`) describes one table of results. `pretrain_run`, `probe_run` and
`detection_run` turn (experiment, method, seed) into a *run*, which contains what one stage depends on.

Scientific numbers have no defaults here: each is written in the experiment file with its source.
"""

from mochi.config.datasets import Dataset
from mochi.config.detection import (
    DetectionData,
    DetectionModel,
    DetectionSet,
    DetectionTraining,
    PhotoScenes,
)
from mochi.config.evaluation import Column, Evaluation, Task, task_names
from mochi.config.experiment import (
    ORACLE,
    Experiment,
    all_runs,
    analysis_run,
    baseline_of,
    columns,
    datasets,
    detection_run,
    detection_runs,
    first_runs,
    load_experiment,
    method_seeds,
    mixing_grid,
    parse_dataset,
    parse_experiment,
    pretrain_run,
    probe_run,
    probes,
    with_oracle,
)
from mochi.config.negatives import Negatives
from mochi.config.reading import ConfigError
from mochi.config.runs import AnalysisRun, DetectionRun, PretrainRun, ProbeRun, Run
from mochi.config.sections import Count, Name, PositiveReal, Real, Section
from mochi.config.training import (
    Augmentation,
    Contrastive,
    Encoder,
    FromFile,
    Objective,
    Supervised,
    Training,
    Untrained,
)
