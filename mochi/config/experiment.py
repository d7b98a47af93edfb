"""Experiments and runs, read, checked and resolved."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, field_validator

from mochi.config.datasets import Dataset
from mochi.config.evaluation import EVALUATIONS, Evaluation
from mochi.config.reading import ConfigError, read_value, read_yaml, unknown_key, validate
from mochi.config.sections import CountOrZero, Name, Section, distinct_seeds
from mochi.config.training import (
    Augmentation,
    Contrastive,
    Encoder,
    Objective,
    SharedRecipe,
    Supervised,
    Untrained,
)

RUN_VERSION = 2


class Experiment(Section):
    """One table of results."""

    name: Name
    title: str
    dataset: Dataset
    seeds: Annotated[list[CountOrZero], Field(min_length=1)]
    encoder: Encoder
    augmentation: Augmentation
    pretrain: dict[str, Any]
    """The shared recipe: fields of `SharedRecipe`. A method overrides them key by key."""
    methods: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    """Row name -> what differs. Beside recipe keys: `seeds`, `augmentation`."""
    evaluation: Evaluation

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        return distinct_seeds(seeds)


class Run(Section):
    """(experiment, method, seed), resolved: whole, or `only_for` one stage and empty elsewhere."""

    version: int
    experiment: Name
    method: Name
    seed: CountOrZero
    dataset: Dataset
    encoder: Encoder
    augmentation: Augmentation | None
    pretrain: Objective | None
    evaluation: Evaluation | None


_METHOD_ONLY = {"seeds", "augmentation"}
_MOCHI_NAME = re.compile(r"^mochi-(\d+)-(\d+)-(\d+)(?:-.*)?$")


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment file, every method resolved once.

    Raises:
        ConfigError: with one line for each mistake: file, key path, what was found, what is allowed.
    """
    return parse_experiment(read_yaml(path), str(path))


def parse_experiment(data: Mapping[str, Any], origin: str) -> Experiment:
    """Check a mapping that came from `origin`; see `load_experiment`."""
    experiment: Experiment = validate(Experiment, data, origin)
    _check_shared_recipe(experiment, origin)
    for method in experiment.methods:
        for seed in method_seeds(experiment, method, origin):
            resolve(experiment, method, seed, origin)
    for name, chosen in experiment.evaluation.detection.items():
        where = f"{origin}: evaluation.detection.{name}"
        for method in chosen.methods or []:
            if method not in experiment.methods:
                raise ConfigError(f"{where}.methods: {unknown_key(method, list(experiment.methods))}")
        if not detection_runs(experiment, name):
            raise ConfigError(f"{where}.pretrain_seeds: found {chosen.pretrain_seeds}; no method has them")
    return experiment


def parse_dataset(source: str, name: str, path: str | None, options: list[str]) -> Dataset:
    """A data set from the command line instead of an experiment file.

    Args:
        source: its origin.
        name: of the folder it is prepared in.
        path: where the images lie, for sources that read them from somewhere.
        options: more keys of the source, each as `key=value`.

    Raises:
        ConfigError: unknown source or key, or a value that is not allowed.
    """
    data: dict[str, Any] = {"source": source, "name": name} | ({"path": path} if path else {})
    for option in options:
        key, separator, value = option.partition("=")
        if not separator:
            raise ConfigError(f"--option: found {option!r}; expected key=value")
        data[key] = read_value(value)
    dataset: Dataset = validate(Dataset, data, "--source")
    return dataset


def method_seeds(experiment: Experiment, method: str, origin: str = "experiment") -> list[int]:
    """The method's own seeds, or the experiment's."""
    seeds = experiment.methods[method].get("seeds", experiment.seeds)
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)):
        raise ConfigError(f"{origin}: methods.{method}.seeds: found {seeds!r}; allowed: some integers >= 0")
    try:
        return distinct_seeds(seeds)
    except ValueError as error:
        raise ConfigError(f"{origin}: methods.{method}.seeds: {error}") from None


def detection_runs(experiment: Experiment, name: str) -> list[tuple[str, int]]:
    """(method, seed) of the runs that a detection set is computed for, in the order of the file."""
    chosen = experiment.evaluation.detection[name]
    return [
        (method, seed)
        for method in experiment.methods
        for seed in method_seeds(experiment, method)
        if chosen.methods is None or method in chosen.methods
        if chosen.pretrain_seeds is None or seed in chosen.pretrain_seeds
    ]


def resolve(experiment: Experiment, method: str, seed: int, origin: str = "experiment") -> Run:
    """The run of one method and seed: shared recipe and method merged, foreign keys left behind."""
    if method not in experiment.methods:
        raise ConfigError(f"{origin}: methods: {unknown_key(method, list(experiment.methods))}")
    own = {key: value for key, value in experiment.methods[method].items() if key not in _METHOD_ONLY}
    objective = own.get("objective", "contrastive")
    models: dict[str, type[Section]] = {"none": Untrained, "supervised": Supervised}
    model = models.get(str(objective), Contrastive)
    for key in own:
        if key not in Contrastive.model_fields:
            allowed = sorted({*Contrastive.model_fields, *_METHOD_ONLY})
            raise ConfigError(f"{origin}: methods.{method}.{key}: {unknown_key(key, allowed)}")
    merged = {**experiment.pretrain, **own, "objective": objective}
    recipe = {key: value for key, value in merged.items() if key in model.model_fields or key in own}
    views = experiment.methods[method].get("augmentation", {})
    if not isinstance(views, Mapping):
        raise ConfigError(
            f"{origin}: methods.{method}.augmentation: found {views!r}; expected the keys of "
            "`augmentation` that differ, for example {version: v1}"
        )
    augmentation = {**experiment.augmentation.model_dump(exclude_unset=True), **views}
    run: Run = validate(
        Run,
        {
            "version": RUN_VERSION,
            "experiment": experiment.name,
            "method": method,
            "seed": seed,
            "dataset": experiment.dataset.model_dump(),
            "encoder": experiment.encoder.model_dump(),
            "augmentation": augmentation,
            "pretrain": recipe,
            "evaluation": experiment.evaluation.model_dump(),
        },
        origin,
        rename={"pretrain": f"methods.{method}", "augmentation": f"methods.{method}.augmentation"},
    )
    _check_name(run, origin)
    return run


def _check_shared_recipe(experiment: Experiment, origin: str) -> None:
    """Every key, whether or not a method goes by it."""
    shared = experiment.pretrain
    if "objective" in shared:
        raise ConfigError(
            f"{origin}: pretrain.objective: found {shared['objective']!r}; rows are contrastive unless "
            "they say otherwise themselves; move it to a row, as in supervised: {objective: supervised}"
        )
    validate(SharedRecipe, shared, origin, rename={key: f"pretrain.{key}" for key in shared})


def _check_name(run: Run, origin: str) -> None:
    """A row called mochi-N-s-s' must be what it says."""
    match = _MOCHI_NAME.match(run.method)
    if run.method.startswith("mochi") and not match:
        raise ConfigError(
            f"{origin}: methods.{run.method}: found that name; a MoCHi row is called "
            "mochi-N-s-s', for example mochi-1024-512-256"
        )
    if not match:
        return
    promised = tuple(int(number) for number in match.groups())
    mixing = run.pretrain.mixing if isinstance(run.pretrain, Contrastive) else None
    carried = mixing and (
        mixing.num_hardest,
        mixing.num_pair_synthetics,
        mixing.num_query_synthetics,
    )
    if carried != promised:
        raise ConfigError(
            f"{origin}: methods.{run.method}.mixing: found (N, s, s') = {carried}; the row's name "
            f"promises {promised}; make them agree"
        )


def write_run(run: Run) -> str:
    """The text of run.yaml."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_run(path: Path, stage: str) -> Run:
    """Read a run.yaml for a stage.

    Raises:
        ConfigError: not readable, from another version, no run, or without what the stage needs.
    """
    data = read_yaml(path)
    version = data.get("version")
    if version != RUN_VERSION:
        raise ConfigError(
            f"{path}: version: found {version!r}; this program reads run files of version "
            f"{RUN_VERSION}; write it again with `python -m mochi resolve`"
        )
    run: Run = validate(Run, data, str(path))
    needed: Section | None
    if stage.startswith("detection-") and run.evaluation:
        needed = run.evaluation.detection.get(stage.removeprefix("detection-"))
    else:
        needed = run.pretrain if stage == "pretrain" else getattr(run.evaluation, stage, None)
    if needed is None:
        raise ConfigError(
            f"{path}: says nothing about the stage {stage}; expected a run resolved for it: write it again "
            f"with `python -m mochi resolve --stage {stage}`, or add {stage} to the experiment"
        )
    return run


def only_for(run: Run, stage: str) -> Run:
    """The part of a run that the results of a stage depend on; the rest is empty.

    Pretraining ignores the evaluation. An evaluation ignores the others and the recipe, whose effect
    reaches it through the encoder's bytes. So editing one thing re-runs what depends on it and no more.

    Raises:
        ConfigError: the experiment has no such stage.
    """
    detected = [] if run.evaluation is None else run.evaluation.detection
    stages = ["pretrain", *EVALUATIONS, *(f"detection-{name}" for name in detected)]
    if stage not in stages:
        raise ConfigError(f"--stage: found {stage!r}; this experiment has: {', '.join(stages)}")
    if stage == "pretrain":
        return run.model_copy(update={"evaluation": None})
    evaluation = run.evaluation
    assert evaluation is not None
    detection = {
        name: chosen for name, chosen in evaluation.detection.items() if stage == f"detection-{name}"
    }
    others = {name: None for name in EVALUATIONS if name != stage}
    kept = evaluation.model_copy(update={**others, "detection": detection})
    return run.model_copy(update={"augmentation": None, "pretrain": None, "evaluation": kept})


def settings(run: Run, stage: str) -> dict[str, Any]:
    """What `only_for` keeps, as JSON, without names and without what changes no result.

    Of the data set what it is, not where it lies: moved results and data are the same.
    """
    kept = only_for(run, stage).model_dump(mode="json", exclude={"version", "experiment", "method"})
    for place in ("path", "archive", "mirrors"):
        kept["dataset"].pop(place, None)
    if kept["pretrain"]:
        kept["pretrain"].pop("checkpoint_minutes", None)
    if stage.startswith("detection-"):
        (chosen,) = kept["evaluation"]["detection"].values()
        for label in ("methods", "pretrain_seeds"):
            chosen.pop(label)
        for label in ("workers", "checkpoint_minutes"):
            chosen["training"].pop(label)
        return {"seed": kept["seed"], "encoder": kept["encoder"], "detection": chosen}
    return kept


def digest(value: object) -> str:
    """Short sha256 of a JSON-like value, for params and provenance."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
