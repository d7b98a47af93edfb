"""All results of an experiment, and whether those on disk are current.

A result is *current* if its provenance.json has the current settings, the current code (or code that the
user accepted), and the checksums of its inputs and of its own files. Nothing here writes files or imports
torch, so a stage with a current result returns at once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mochi import layout
from mochi.config import (
    ConfigError,
    Contrastive,
    Dataset,
    DetectionRun,
    Experiment,
    FromFile,
    Supervised,
    Training,
    all_runs,
    analysis_run,
    baseline_of,
    datasets,
    detection_run,
    detection_runs,
    mixing_grid,
    pretrain_run,
    probe_run,
    probes,
    with_oracle,
)
from mochi.layout import Paths
from mochi.provenance.fingerprint import code_digest, digest, file_digest
from mochi.stages import (
    ANALYSIS,
    DETECTION,
    FINE_TUNING,
    LR_SEARCH,
    STAGES,
    UNTRAINED,
    numbers_of_task,
    stage_of,
)

RECORD = "provenance.json"


@dataclass(frozen=True)
class Result:
    """One folder of results and what determines its content."""

    stage: str
    label: str
    """For messages, such as `moco-v2 seed 0 linear`."""
    folder: Path
    outputs: tuple[str, ...]
    """Files in `folder`, except provenance.json."""
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path]
    """Name -> input file."""
    modules: tuple[str, ...]
    """Code that decides the numbers, as `code_digest` takes it."""

    @property
    def record(self) -> Path:
        """Its provenance.json."""
        return self.folder / RECORD

    @property
    def settings_digest(self) -> str:
        """Digest of the settings."""
        return digest(self.settings)

    @property
    def code_digest(self) -> str:
        """Digest of the current code."""
        return code_digest(*self.modules)

    def why_stale(self) -> str | None:
        """Why it must be computed; None if it is current."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            settings, outputs = record["settings"], dict(record["outputs"])
            inputs = {name: entry["sha256"] for name, entry in record["inputs"].items()}
            codes = {record["code_digest"], *record.get("accepted_code", [])}
        except FileNotFoundError:
            return "missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return f"{self.record} cannot be read ({type(error).__name__}: {error})"
        if digest(settings) != self.settings_digest:
            return f"settings: {'; '.join(differences(settings, self.settings))}"
        return (
            self._changed_inputs(inputs)
            or self._changed_outputs(outputs)
            or (None if self.code_digest in codes else CODE_CHANGED)
        )

    def _changed_inputs(self, recorded: Mapping[str, str]) -> str | None:
        for name in sorted(recorded.keys() | self.inputs.keys()):
            path = self.inputs.get(name)
            if path is None or name not in recorded:
                return f"input: {name} is {'no longer' if path is None else 'now'} an input"
            if not path.exists():
                return f"input: {path} is missing"
            if file_digest(path) != recorded[name]:
                return f"input: {path} changed"
        return None

    def _changed_outputs(self, recorded: Mapping[str, str]) -> str | None:
        for name in self.outputs:
            path = self.folder / name
            if not path.exists():
                return f"missing: {path}"
            if file_digest(path) != recorded.get(name):
                return f"{path} is not the file that was computed (edited, or of another run)"
        return None


_SHOWN_ITEMS = 8
"""Longer lists are compared item by item in a message."""

CODE_CHANGED = "its code changed"
"""The reason that `mochi adopt --accept-code` may overrule."""


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """`key old -> new` for every leaf that differs between two JSON values; for lists, their items."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for name in sorted(old.keys() | new.keys())
            for line in differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        ]
    if old == new:
        return []
    if isinstance(old, list) and isinstance(new, list) and len(old) + len(new) > _SHOWN_ITEMS:
        parts = (_items("added", new, old), _items("removed", old, new))
        return [f"{key}: {', '.join(filter(None, parts)) or 'in another order'}"]
    return [f"{key} {_shown(old)} -> {_shown(new)}"]


def _items(action: str, items: list[Any], others: list[Any]) -> str:
    """`added A, B and 3 more`: items that the other list lacks; empty if there are none."""
    only = [_shown(item) for item in items if item not in others]
    more = f" and {len(only) - 3} more" if len(only) > 3 else ""
    return f"{action} {', '.join(only[:3])}{more}" if only else ""


def _shown(value: Any) -> str:
    return "(default)" if value is None else json.dumps(value)


def prepared(dataset: Dataset, folder: Path, listing: str = "") -> Result:
    """A prepared data set.

    Args:
        dataset: its section of the experiment.
        folder: where it is prepared.
        listing: digest of the names of the user's own images, to notice added or removed ones.
    """
    stage = STAGES["prepare"]
    return Result(
        stage="prepare",
        label=f"data set {dataset.name}",
        folder=folder,
        outputs=stage.outputs,
        settings={"dataset": dataset.model_dump(mode="json", exclude_defaults=True), "listing": listing},
        inputs={},
        modules=stage.numbers,
    )


def scenes(experiment: Experiment) -> dict[Path, Result]:
    """Folder -> detection set made from photographs; several sets may share a folder."""
    stage = STAGES["scenes"]
    return {
        Path(chosen.data.path): Result(
            stage="scenes",
            label=f"scenes {chosen.data.path}",
            folder=Path(chosen.data.path),
            outputs=stage.outputs,
            settings=chosen.data.model_dump(
                mode="json", include={"scenes", "classes"}, exclude_defaults=True
            ),
            inputs={},
            modules=stage.numbers,
        )
        for chosen in experiment.evaluation.detection.values()
        if chosen.data.scenes
    }


def pretrained(experiment: Experiment, method: str, seed: int) -> Result:
    """The encoder of one run."""
    run = pretrain_run(experiment, method, seed)
    stage = STAGES["pretrain"]
    inputs = {}
    if run.is_trained:
        inputs["data"] = layout.dataset(experiment.dataset.name) / "manifest.json"
    if isinstance(run.recipe, FromFile):
        inputs["encoder"] = Path(run.recipe.path)
    return Result(
        stage="pretrain",
        label=f"{method} seed {seed} pretrain",
        folder=Paths(experiment.name).pretrain(method, seed),
        outputs=stage.outputs,
        settings=run.settings(),
        inputs=inputs,
        modules=(*stage.numbers, *run.code()) if run.is_trained else UNTRAINED,
    )


def evaluated(experiment: Experiment, method: str, seed: int, task: str) -> Result:
    """One evaluation of one encoder."""
    paths = Paths(experiment.name)
    inputs = {"encoder": paths.encoder(method, seed)}
    settings: dict[str, Any]
    name, modules = stage_of(task), STAGES[stage_of(task)].numbers
    if task.startswith(DETECTION):
        run = fine_tuning_run(experiment, method, seed, task.removeprefix(DETECTION))
        settings = run.settings()
        inputs |= {file: Path(file) for file in run.detection.data.annotation_files()}
        if FINE_TUNING in task and len(run.detection.training.lr) > 1:
            search = f"{DETECTION}{run.set_name}{LR_SEARCH}"
            inputs["lr"] = paths.evaluation(method, seed, search) / "metrics.json"
    else:
        probe = probe_run(experiment, method, seed, task)
        settings, modules = probe.settings(), numbers_of_task(probe.protocol.task)
        inputs["data"] = layout.dataset(probe.dataset.name) / "manifest.json"
    return Result(
        stage=name,
        label=f"{method} seed {seed} {task}",
        folder=paths.evaluation(method, seed, task),
        outputs=STAGES[name].outputs,
        settings=settings,
        inputs=inputs,
        modules=modules,
    )


def same_features(experiment: Experiment, method: str, seed: int, task: str) -> list[Result]:
    """The other evaluations of an encoder on the same images at the same size."""
    runs = {name: probe_run(experiment, method, seed, name) for name in probes(experiment)}
    others = [
        name for name, run in runs.items() if name != task and run.feature_key == runs[task].feature_key
    ]
    return [evaluated(experiment, method, seed, name) for name in others]


def detection_jobs(experiment: Experiment, name: str) -> list[str]:
    """The jobs of a detection set for one encoder: `<set>`, or a search and separate fine-tunings."""
    training = experiment.evaluation.detection[name].training
    if training.together:
        return [name]
    search = [f"{name}{LR_SEARCH}"] if len(training.lr) > 1 else []
    return [*search, *(f"{name}{FINE_TUNING}{seed}" for seed in training.seeds)]


def fine_tuning_run(experiment: Experiment, method: str, seed: int, job: str) -> DetectionRun:
    """The run of a job: one of `detection_jobs`, or all of a set as one result.

    Raises:
        ConfigError: no such method, seed, set or job.
    """
    name = job.partition("/")[0]
    run = detection_run(experiment, method, seed, name)
    if job == name:
        return run
    if job not in (jobs := detection_jobs(experiment, name)):
        raise ConfigError(f"set: found {job!r}; {name} is computed by: {', '.join(jobs)}")
    searches = job.endswith(LR_SEARCH)
    seeds = run.detection.training.seeds[:1] if searches else [int(job.rpartition(FINE_TUNING)[2])]
    training = run.detection.training.model_copy(update={"seeds": seeds})
    chosen = run.detection.model_copy(update={"training": training})
    return run.model_copy(update={"detection": chosen, "searches": searches})


def analyzed(experiment: Experiment, method: str, seed: int) -> Result:
    """The analysis of one encoder."""
    paths = Paths(experiment.name)
    encoder = paths.encoder(method, seed)
    return Result(
        stage="analyze",
        label=f"{method} seed {seed} {ANALYSIS}",
        folder=paths.evaluation(method, seed, ANALYSIS),
        outputs=STAGES["analyze"].outputs,
        settings=analysis_run(experiment, method, seed).settings(),
        inputs={
            "encoder": encoder,
            "head": encoder.with_name("head.safetensors"),
            "data": layout.dataset(experiment.dataset.name) / "manifest.json",
        },
        modules=STAGES["analyze"].numbers,
    )


def evaluations(experiment: Experiment) -> list[tuple[str, int, str]]:
    """(method, seed, task) of every evaluation, in the order of the table."""
    frozen = [(method, seed, task) for task in probes(experiment) for method, seed in all_runs(experiment)]
    return frozen + [
        (method, seed, f"{DETECTION}{job}")
        for name in experiment.evaluation.detection
        for method, seed in detection_runs(experiment, name)
        for job in detection_jobs(experiment, name)
        if not job.endswith(LR_SEARCH)
    ]


def searches(experiment: Experiment) -> list[tuple[str, int, str]]:
    """(method, seed, task) of every search for a learning rate, on which evaluations depend."""
    return [
        (method, seed, f"{DETECTION}{job}")
        for name in experiment.evaluation.detection
        for method, seed in detection_runs(experiment, name)
        for job in detection_jobs(experiment, name)
        if job.endswith(LR_SEARCH)
    ]


def figures(experiment: Experiment) -> list[str]:
    """Names of the figures with content, which depend only on the experiment file.

    Those of false negatives need labels, which exist if an evaluation or a row uses labels.
    """
    recipes = [pretrain_run(experiment, *run).recipe for run in all_runs(experiment)]
    contrastive = [recipe for recipe in recipes if isinstance(recipe, Contrastive)]
    frozen, detection = probes(experiment), experiment.evaluation.detection
    labelled = bool(frozen) or any(isinstance(recipe, Supervised) for recipe in recipes)
    grid = mixing_grid(experiment)
    shown = {
        "accuracy": bool(frozen or detection),
        "loss": any(isinstance(recipe, Training) for recipe in recipes),
        "proxy-task": bool(contrastive),
        "matching": any(recipe.matching_epochs for recipe in contrastive),
        "false-negatives": bool(contrastive) and labelled,
        "false-parents": bool(grid) and labelled,
        "alignment-uniformity": labelled,
        "class-oracle": bool(frozen and with_oracle(experiment)),
        "gain": bool(frozen) and len(grid) > 1 and baseline_of(experiment) is not None,
    }
    return [name for name, is_shown in shown.items() if is_shown] + [
        f"precision-recall-{name}" for name in detection
    ]


def reported(experiment: Experiment) -> Result:
    """Scores, tables, figures and the report page."""
    stage = STAGES["report"]
    paths = Paths(experiment.name)
    encoders = [paths.pretrain(*run) for run in all_runs(experiment)]
    others = [evaluated(experiment, *one) for one in evaluations(experiment)]
    others += [analyzed(experiment, *run) for run in all_runs(experiment)]
    files = [folder / name for folder in encoders for name in ("metrics.csv", "matching.csv", RECORD)]
    files += [
        other.folder / name
        for other in others
        for name in (*other.outputs, RECORD)
        if name != "precision_recall.png"  # drawn again, all rows in one figure
    ]
    files += [evaluated(experiment, *one).record for one in searches(experiment)]
    return Result(
        stage="report",
        label="report",
        folder=paths.results,
        outputs=(
            *stage.outputs,
            *(f"figures/{name}.{kind}" for name in figures(experiment) for kind in ("json", "png", "svg")),
        ),
        settings={
            "title": experiment.title,
            "baseline": baseline_of(experiment),
            "runs": [list(run) for run in all_runs(experiment)],
            "evaluations": [list(one) for one in evaluations(experiment)],
        },
        inputs={str(path): path for path in [*files, layout.PUBLISHED, layout.DEVIATIONS]},
        modules=stage.numbers,
    )


def results(experiment: Experiment, listings: Mapping[str, str] | None = None) -> list[Result]:
    """Every result, after those it depends on.

    Args:
        experiment: the experiment.
        listings: name of a data set -> its `listing`, see `prepared`.
    """
    return [
        *(
            prepared(dataset, layout.dataset(name), (listings or {}).get(name, ""))
            for name, dataset in datasets(experiment).items()
        ),
        *scenes(experiment).values(),
        *(pretrained(experiment, *run) for run in all_runs(experiment)),
        *(evaluated(experiment, *one) for one in searches(experiment)),
        *(evaluated(experiment, *one) for one in evaluations(experiment)),
        *(analyzed(experiment, *run) for run in all_runs(experiment)),
        reported(experiment),
    ]
