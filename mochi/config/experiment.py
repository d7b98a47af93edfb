"""Read and check experiment files, and derive their runs."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from mochi.config.datasets import Dataset
from mochi.config.evaluation import Column, Evaluation
from mochi.config.negatives import FORMER_KEYS, former_key
from mochi.config.reading import ConfigError, read_value, read_yaml, unknown_key, validate
from mochi.config.runs import AnalysisRun, DetectionRun, PretrainRun, ProbeRun
from mochi.config.sections import CountOrZero, Name, Section, distinct_seeds
from mochi.config.training import (
    Augmentation,
    Contrastive,
    Encoder,
    FromFile,
    SharedRecipe,
    Supervised,
    Untrained,
)


class Experiment(Section):
    """One table of results."""

    name: Name
    """Name of the experiment; its results are in `results/NAME/`."""
    title: str
    """Heading of the report."""
    dataset: Dataset
    """Images for pretraining and, if they have labels, for evaluation."""
    seeds: Annotated[list[CountOrZero], Field(min_length=1)]
    """One encoder of each row is trained for each seed; tables give the mean and the standard deviation."""
    encoder: Encoder
    """The network that every row trains."""
    augmentation: Augmentation
    """The random views used in training."""
    pretrain: dict[str, Any]
    """The recipe that every row shares, and overrides key by key."""
    methods: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    """Row name -> what differs. Besides recipe keys: `seeds`, `augmentation`."""
    evaluation: Evaluation
    """What is measured on every encoder."""
    baseline: Name | None = None
    """The row that the others are compared with. Default: `moco-v2`, if there is such a row."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        return distinct_seeds(seeds)


DETECTION_COLUMNS = {
    name: Column(name) for name in ("AP50", "AP", "AP75", "mask_AP50", "mask_AP", "mask_AP75")
}
_METHOD_ONLY = {"seeds", "augmentation"}
_OBJECTIVES: dict[str, type[Section]] = {"none": Untrained, "file": FromFile, "supervised": Supervised}
"""All others are contrastive."""
_MIXING = re.compile(r"mochi-(\d+)-(\d+)-(\d+)")
_MIXING_OR_VARIANT = re.compile(rf"{_MIXING.pattern}(-.*)?")


def load_experiment(path: Path) -> Experiment:
    """Read an experiment file and check every method, seed, data set and detection set in it.

    Raises:
        ConfigError: with one line per mistake: file, key path, what was found, what is allowed.
    """
    return parse_experiment(read_yaml(path), str(path))


def parse_experiment(data: Mapping[str, Any], origin: str) -> Experiment:
    """Check a mapping that came from `origin`; see `load_experiment`."""
    experiment: Experiment = validate(Experiment, data, origin)
    _check_shared_recipe(experiment, origin)
    mistakes: dict[str, str] = {}
    for method in experiment.methods:
        with _collected(mistakes, but=f"methods.{method}"):
            _check_method(experiment, method, origin)
    with _collected(mistakes):
        _check_dataset_names(experiment, origin)
    with _collected(mistakes):
        _check_baseline(experiment, origin)
    if mistakes:
        raise ConfigError("\n".join(mistakes.values()))
    for name in experiment.evaluation.detection:
        _check_detection_set(experiment, name, origin)
    return experiment


def parse_dataset(source: str, name: str, path: str | None, options: list[str]) -> Dataset:
    """A data set from the command line instead of an experiment file.

    Args:
        source: its origin.
        name: of the folder it is prepared in.
        path: location of the images, for sources that need it.
        options: further keys of the source, each as `key=value`.

    Raises:
        ConfigError: unknown source or key, or a value that is not allowed.
    """
    data: dict[str, Any] = {"source": source, "name": name} | ({"path": path} if path else {})
    for option in options:
        key, separator, value = option.partition("=")
        if not separator:
            raise ConfigError(f"--option: found {option!r}; expected key=value")
        data[key] = read_value(value, f"--option: {key}")
    dataset: Dataset = validate(Dataset, data, "--source")
    return dataset


def method_seeds(experiment: Experiment, method: str, origin: str = "experiment") -> list[int]:
    """The method's own seeds, or the experiment's.

    Raises:
        ConfigError: no such method, or its seeds are not distinct integers.
    """
    if method not in experiment.methods:
        raise ConfigError(f"{origin}: methods: {unknown_key(method, list(experiment.methods))}")
    seeds = experiment.methods[method].get("seeds", experiment.seeds)
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)):
        raise ConfigError(
            f"{origin}: methods.{method}.seeds: found {seeds!r}; allowed: a list of integers >= 0"
        )
    try:
        return distinct_seeds(seeds)
    except ValueError as error:
        raise ConfigError(f"{origin}: methods.{method}.seeds: {error}") from None


def all_runs(experiment: Experiment) -> list[tuple[str, int]]:
    """(method, seed) of every encoder, in the order of the file."""
    return [(method, seed) for method in experiment.methods for seed in method_seeds(experiment, method)]


def baseline_of(experiment: Experiment) -> str | None:
    """The row that the others are compared with: `baseline`, else `moco-v2` if there is such a row."""
    if experiment.baseline is None and "moco-v2" in experiment.methods:
        return "moco-v2"
    return experiment.baseline


ORACLE = "-oracle"
"""Suffix of a row that is another row with the class oracle."""


def with_oracle(experiment: Experiment) -> list[str]:
    """Rows that also exist with the class oracle."""
    return [method for method in experiment.methods if f"{method}{ORACLE}" in experiment.methods]


def mixing_grid(experiment: Experiment) -> dict[str, tuple[int, int, int]]:
    """MoCHi row -> (N, s, s'), from its name; variants, which have longer names, are omitted."""
    matches = {method: _MIXING.fullmatch(method) for method in experiment.methods}
    return {
        method: (int(match[1]), int(match[2]), int(match[3]))
        for method, match in matches.items()
        if match is not None
    }


def probes(experiment: Experiment) -> list[str]:
    """The names of the probes, which are the evaluations on frozen features, in the order of the file."""
    return list(experiment.evaluation.tasks)


def datasets(experiment: Experiment) -> dict[str, Dataset]:
    """Name -> prepared data set: the experiment's, then those of evaluations."""
    tasks = experiment.evaluation.tasks.values()
    own = [task.dataset for task in tasks if task.dataset is not None]
    return {dataset.name: dataset for dataset in (experiment.dataset, *own)}


def columns(experiment: Experiment, evaluation: str) -> dict[str, Column]:
    """The numbers of an evaluation's metrics.json that tables show, in order; the first is the main one."""
    task = experiment.evaluation.tasks.get(evaluation)
    return DETECTION_COLUMNS if task is None else task.columns()


def detection_runs(experiment: Experiment, name: str) -> list[tuple[str, int]]:
    """(method, seed) of the runs that a detection set is computed for, in the order of the file."""
    chosen = experiment.evaluation.detection[name]
    return [
        (method, seed)
        for method, seed in all_runs(experiment)
        if chosen.methods is None or method in chosen.methods
        if chosen.pretrain_seeds is None or seed in chosen.pretrain_seeds
    ]


def first_runs(experiment: Experiment) -> list[PretrainRun]:
    """The first run of each method; the others differ from it by their seeds alone."""
    return [
        pretrain_run(experiment, method, method_seeds(experiment, method)[0])
        for method in experiment.methods
    ]


def pretrain_run(experiment: Experiment, method: str, seed: int, origin: str = "experiment") -> PretrainRun:
    """The training of one encoder: the shared recipe merged with the method's keys.

    Raises:
        ConfigError: no such method or seed, or the merged recipe is not valid.
    """
    _require_seed(experiment, method, seed, origin)
    _check_method_keys(experiment, method, origin)
    views = experiment.methods[method].get("augmentation", {})
    run: PretrainRun = validate(
        PretrainRun,
        {
            "experiment": experiment.name,
            "method": method,
            "seed": seed,
            "encoder": experiment.encoder,
            "dataset": experiment.dataset,
            "augmentation": {**experiment.augmentation.model_dump(exclude_unset=True), **views},
            "recipe": _merged_recipe(experiment, method),
        },
        origin,
        rename={"recipe": f"methods.{method}", "augmentation": f"methods.{method}.augmentation"},
    )
    _check_name(run, origin)
    return run


def probe_run(experiment: Experiment, method: str, seed: int, task: str) -> ProbeRun:
    """The evaluation of one frozen encoder.

    Raises:
        ConfigError: no such method, seed or task.
    """
    _require_seed(experiment, method, seed)
    evaluation = experiment.evaluation
    if task not in evaluation.tasks:
        known = ", ".join(evaluation.tasks) or "none"
        raise ConfigError(f"task: found {task!r}; {experiment.name} has: {known}")
    chosen = evaluation.tasks[task]
    return ProbeRun(
        experiment=experiment.name,
        method=method,
        seed=seed,
        name=task,
        encoder=experiment.encoder,
        dataset=chosen.dataset or experiment.dataset,
        image_size=chosen.image_size or evaluation.image_size,
        resize=chosen.resize or evaluation.resize,
        batch_size=evaluation.batch_size,
        features_on=evaluation.features_on,
        protocol=chosen,
    )


def analysis_run(experiment: Experiment, method: str, seed: int) -> AnalysisRun:
    """The analysis of one frozen encoder.

    Raises:
        ConfigError: no such method or seed.
    """
    recipe = pretrain_run(experiment, method, seed).recipe
    evaluation = experiment.evaluation
    return AnalysisRun(
        experiment=experiment.name,
        method=method,
        seed=seed,
        encoder=experiment.encoder,
        dataset=experiment.dataset,
        image_size=evaluation.image_size,
        resize=evaluation.resize,
        batch_size=evaluation.batch_size,
        head=recipe.head if isinstance(recipe, Contrastive) else None,
        embedding_dim=recipe.embedding_dim if isinstance(recipe, Contrastive) else 0,
    )


def detection_run(experiment: Experiment, method: str, seed: int, name: str) -> DetectionRun:
    """The fine-tuning of one encoder on a detection set.

    Raises:
        ConfigError: no such method, seed or set.
    """
    _require_seed(experiment, method, seed)
    sets = experiment.evaluation.detection
    if name not in sets:
        raise ConfigError(f"set: found {name!r}; {experiment.name} has: {', '.join(sets) or 'none'}")
    return DetectionRun(
        experiment=experiment.name,
        method=method,
        seed=seed,
        set_name=name,
        encoder=experiment.encoder,
        detection=sets[name],
    )


def _require_seed(experiment: Experiment, method: str, seed: int, origin: str = "experiment") -> None:
    if seed not in (known := method_seeds(experiment, method, origin)):
        raise ConfigError(f"seed: found {seed}; {method} has: {', '.join(map(str, known))}")


def _recipe_keys(experiment: Experiment, method: str) -> dict[str, Any]:
    """The keys of the recipe that the method sets itself."""
    return {key: value for key, value in experiment.methods[method].items() if key not in _METHOD_ONLY}


def _merged_recipe(experiment: Experiment, method: str) -> dict[str, Any]:
    """The shared recipe and the method's keys, without shared keys that its objective does not have."""
    own = _recipe_keys(experiment, method)
    objective = own.get("objective", "contrastive")
    fields = _OBJECTIVES.get(str(objective), Contrastive).model_fields
    merged = {**experiment.pretrain, **own, "objective": objective}
    return {key: value for key, value in merged.items() if key in fields or key in own}


@contextmanager
def _collected(mistakes: dict[str, str], but: str = "") -> Iterator[None]:
    """Add a mistake to `mistakes`, unless one is the same but for a part of the text, such as the row."""
    try:
        yield
    except ConfigError as error:
        mistakes.setdefault(str(error).replace(but, ""), str(error))


def _check_method(experiment: Experiment, method: str, origin: str) -> None:
    """Every run of the method must be valid."""
    for seed in method_seeds(experiment, method, origin):
        pretrain_run(experiment, method, seed, origin)


def _check_method_keys(experiment: Experiment, method: str, origin: str) -> None:
    """A method has only keys of a recipe, and `augmentation` is a mapping."""
    own = _recipe_keys(experiment, method)
    model = _OBJECTIVES.get(str(own.get("objective")), Contrastive)
    known = {*Contrastive.model_fields, *model.model_fields}
    for key, value in own.items():
        if key in FORMER_KEYS:
            raise ConfigError(f"{origin}: methods.{method}.{key}: {former_key(key, value)}")
        if key not in known:
            allowed = sorted({*known, *_METHOD_ONLY})
            raise ConfigError(f"{origin}: methods.{method}.{key}: {unknown_key(key, allowed)}")
    views = experiment.methods[method].get("augmentation", {})
    if not isinstance(views, Mapping):
        raise ConfigError(
            f"{origin}: methods.{method}.augmentation: found {views!r}; expected the keys of "
            "`augmentation` that differ, for example {version: v1}"
        )


def _check_dataset_names(experiment: Experiment, origin: str) -> None:
    """A name is a folder, so different data sets have different names."""
    known = {experiment.dataset.name: experiment.dataset}
    for name, task in experiment.evaluation.tasks.items():
        if task.dataset is not None and known.setdefault(task.dataset.name, task.dataset) != task.dataset:
            raise ConfigError(
                f"{origin}: evaluation.{name}.dataset.name: found {task.dataset.name!r}, the name of "
                "another data set; a name is a folder in data/: make them equal, or choose another name"
            )


def _check_baseline(experiment: Experiment, origin: str) -> None:
    if experiment.baseline is not None and experiment.baseline not in experiment.methods:
        known = list(experiment.methods)
        raise ConfigError(f"{origin}: baseline: {unknown_key(experiment.baseline, known)}")


def _check_detection_set(experiment: Experiment, name: str, origin: str) -> None:
    """A detection set needs a ResNet, and methods and seeds that exist."""
    chosen = experiment.evaluation.detection[name]
    where = f"{origin}: evaluation.detection.{name}"
    if not experiment.encoder.is_resnet:
        raise ConfigError(
            f"{where}: found with encoder.architecture {experiment.encoder.architecture}; a detector "
            "needs the stages of a ResNet; remove the set or choose a ResNet"
        )
    for method in chosen.methods or []:
        if method not in experiment.methods:
            raise ConfigError(f"{where}.methods: {unknown_key(method, list(experiment.methods))}")
    if not detection_runs(experiment, name):
        raise ConfigError(f"{where}.pretrain_seeds: found {chosen.pretrain_seeds}; no method has them")


def _check_shared_recipe(experiment: Experiment, origin: str) -> None:
    """Validate every key, whether or not a method uses it."""
    shared = experiment.pretrain
    if "objective" in shared:
        raise ConfigError(
            f"{origin}: pretrain.objective: found {shared['objective']!r}; a row is contrastive "
            "unless it sets an objective; move it to a row: `supervised: {objective: supervised}`"
        )
    for key in FORMER_KEYS.keys() & shared.keys():
        raise ConfigError(f"{origin}: pretrain.{key}: {former_key(key, shared[key])}")
    validate(SharedRecipe, shared, origin, rename={key: f"pretrain.{key}" for key in shared})


def _check_name(run: PretrainRun, origin: str) -> None:
    """The numbers in a name mochi-N-s-s' must match the row's settings."""
    match = _MIXING_OR_VARIANT.fullmatch(run.method)
    if run.method.startswith("mochi") and not match:
        raise ConfigError(
            f"{origin}: methods.{run.method}: found a name that starts with mochi; expected "
            "mochi-N-s-s', for example mochi-1024-512-256"
        )
    if not match:
        return
    expected = {
        "rule": "mochi",
        "num_hardest": int(match[1]),
        "num_pair_synthetics": int(match[2]),
        "num_query_synthetics": int(match[3]),
    }
    negatives = run.recipe.negatives.model_dump() if isinstance(run.recipe, Contrastive) else {}
    found = {key: negatives.get(key) for key in expected}
    if found != expected:
        raise ConfigError(
            f"{origin}: methods.{run.method}.negatives: found {_as_yaml(found)}; the name of the row "
            f"means {_as_yaml(expected)}; change one of the two"
        )


def _as_yaml(values: Mapping[str, Any]) -> str:
    """As in the file, without missing values."""
    entries = ", ".join(f"{key}: {value}" for key, value in values.items() if value is not None)
    return f"{{{entries}}}"
