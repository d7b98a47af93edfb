"""An experiment as DVC stages: which files belong together, what they depend on, where they are kept.

Snakemake computes; DVC hashes, stores and compares. Each stage's command is therefore `snakemake TARGET`,
and what a stage depends on is what the rule depends on: the keys of its settings, the digest of its code,
the files it reads. A test compares the two graphs edge by edge.
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mochi.config import (
    EVALUATIONS,
    Experiment,
    Training,
    detection_runs,
    load_experiment,
    method_seeds,
    resolve,
)
from mochi.errors import UserError
from mochi.running.atomic import write_text

DEFAULT_CONFIG = Path("config/config.yaml")

# Small results are kept by git, where they can be read and compared; the rest by DVC's cache.
# `persist`: DVC deletes outputs before a command otherwise, and Snakemake would make all of them again.
_IN_GIT = {"cache": False, "persist": True}
_IN_CACHE = {"persist": True}
_FIGURES = ("accuracy", "training", "negatives")

_HEADER = """\
# Written by `python -m mochi record`; a test compares it with the workflow. docs/dvc.md explains it.
"""


def pipeline(experiment: Experiment, config: Path) -> dict[str, Any]:
    """The content of the experiment's dvc.yaml.

    Args:
        experiment: what to describe.
        config: its file, relative to the folder of the Snakefile.
    """
    stages = _Stages(experiment, config)
    described = {
        "code": stages.code(),
        **({} if _kept_elsewhere(experiment, config) else {"prepare": stages.prepare()}),
        "runs": stages.settings(),
        "pretrain": stages.pretrain(),
        **{task: stages.evaluate(task) for task in stages.tasks},
        **stages.scenes(),
        **{f"detection-{name}": stages.detect(name) for name in experiment.evaluation.detection},
        "tables": stages.tables(),
        "figures": stages.figures(),
    }
    if config == DEFAULT_CONFIG:
        described["provenance"] = _provenance(*stages.last_results())
        root = "."
    else:
        root = "/".join([".."] * len(place(experiment, config).parent.parts))
        described = {name: {"wdir": root, **stage} for name, stage in described.items()}
    return {
        "vars": [{"runs": stages.runs}],
        "stages": described,
        "plots": stages.plots("" if root == "." else f"{root}/"),
    }


def place(experiment: Experiment, config: Path) -> Path:
    """Where the experiment's dvc.yaml stands: the default one at the top, others beside their results."""
    return Path("dvc.yaml") if config == DEFAULT_CONFIG else Path("results", experiment.name, "dvc.yaml")


def _kept_elsewhere(experiment: Experiment, config: Path) -> bool:
    """Whether another experiment's dvc.yaml has the data set already: DVC lets a file have one stage."""
    own = place(experiment, config)
    others = [
        path for path in (Path("dvc.yaml"), *sorted(Path("results").glob("*/dvc.yaml"))) if path != own
    ]
    for path in filter(Path.exists, others):
        prepare = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"].get("prepare", {"outs": []})
        if any(f"data/{experiment.dataset.name}" in out for out in prepare["outs"]):
            return True
    return False


def record(config: Path) -> Path:
    """Write the experiment's dvc.yaml and let DVC store its results, if Snakemake finds them complete.

    Returns:
        The dvc.yaml; its dvc.lock stands beside it. Both belong into git.

    Raises:
        UserError: a result is missing or out of date, or DVC refuses.
    """
    experiment = load_experiment(config)
    chosen = [] if config == DEFAULT_CONFIG else ["--configfile", str(config)]
    shown = _call("snakemake", "--dry-run", *chosen)
    if "Nothing to be done" not in shown:
        raise UserError(
            f"{experiment.name}: found results missing or out of date; expected a finished experiment; "
            f"run `snakemake --cores all {' '.join(chosen)}`. Snakemake says:\n{shown[-2000:]}"
        )
    path = place(experiment, config)
    write(path, pipeline(experiment, config))
    _call("dvc", "commit", "--force", str(path))
    if config != DEFAULT_CONFIG:
        _record_memory()
    return path


def _record_memory() -> None:
    """Snakemake's memory of all experiments is one folder; the default experiment's dvc.yaml keeps it."""
    default = place(load_experiment(DEFAULT_CONFIG), DEFAULT_CONFIG)
    if not default.exists():
        write(default, {"stages": {"provenance": _provenance()}})
    _call("dvc", "commit", "--force", "provenance")


def _provenance(*after: str) -> dict[str, Any]:
    """Last of all: what Snakemake knows of how each file was made. A clone without it would start again."""
    return {
        "cmd": "snakemake --dry-run --quiet",
        **({"deps": list(after)} if after else {}),
        "outs": [{".snakemake/metadata": _IN_CACHE}],
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a dvc.yaml whole, with a word on where it comes from."""
    write_text(path, _HEADER + yaml.dump(content, Dumper=_Plain, sort_keys=False, width=1000))


class _Plain(yaml.SafeDumper):
    """Without anchors, which repeated values get otherwise."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _call(tool: str, *arguments: str) -> str:
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", tool, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{tool} {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


class _Stages:
    """One method for each rule of the workflow."""

    def __init__(self, experiment: Experiment, config: Path) -> None:
        self._config = config.as_posix()
        self._data = f"data/{experiment.dataset.name}"
        self._home = f"results/{experiment.name}"
        self._options = "" if config == DEFAULT_CONFIG else f" --configfile {self._config}"
        self.runs = [
            f"{method}/seed{seed}"
            for method in experiment.methods
            for seed in method_seeds(experiment, method)
        ]
        self._trained = [
            f"{method}/seed{seed}"
            for method in experiment.methods
            for seed in method_seeds(experiment, method)
            if isinstance(resolve(experiment, method, seed).pretrain, Training)
        ]
        self._detection = experiment.evaluation.detection
        self._detected = {
            name: [f"{method}/seed{seed}" for method, seed in detection_runs(experiment, name)]
            for name in self._detection
        }
        self.tasks = [task for task in EVALUATIONS if getattr(experiment.evaluation, task)]

    def code(self) -> dict[str, Any]:
        target = f"{self._home}/code.yaml"
        return {"cmd": self._make(target), "deps": ["mochi"], "outs": [{target: _IN_GIT}]}

    def prepare(self) -> dict[str, Any]:
        return {
            "cmd": self._make(f"{self._data}/manifest.json"),
            "params": [{self._config: ["dataset"]}, self._digest("prepare")],
            "outs": [{self._data: _IN_CACHE}],
        }

    def settings(self) -> dict[str, Any]:
        """The settings of every run and stage, from the experiment file: its values, not its comments."""
        files = [file for stage in ("pretrain", *self.tasks) for file in self._each(f"{stage}/run.yaml")]
        files += self._each_detection("run.yaml")
        return {
            "cmd": self._make("runs"),
            "params": [{self._config: None}],
            "outs": [{file: _IN_GIT} for file in files],
        }

    def pretrain(self) -> dict[str, Any]:
        folder = f"{self._home}/${{item.run}}/pretrain"
        small = ("metrics.csv", "matching.csv", "provenance.json")
        return {
            "matrix": {"run": "${runs}"},
            "cmd": self._make(f"{folder}/encoder.safetensors"),
            "deps": [f"{self._data}/manifest.json"],
            "params": [{f"{folder}/run.yaml": None}, self._digest("pretrain")],
            "outs": [
                {f"{folder}/encoder.safetensors": _IN_CACHE},
                *({f"{folder}/{name}": _IN_GIT} for name in small),
            ],
        }

    def evaluate(self, task: str) -> dict[str, Any]:
        run = f"{self._home}/${{item.run}}"
        return {
            "matrix": {"run": "${runs}"},
            "cmd": self._make(f"{run}/{task}/metrics.json"),
            "deps": [f"{self._data}/manifest.json", f"{run}/pretrain/encoder.safetensors"],
            "params": [{f"{run}/{task}/run.yaml": None}, self._digest(task)],
            "outs": [{f"{run}/{task}/provenance.json": _IN_GIT}],
            "metrics": [{f"{run}/{task}/metrics.json": _IN_GIT}],
        }

    def scenes(self) -> dict[str, Any]:
        """A stage for each folder of made scenes; sets may share one."""
        made = {chosen.data.path: name for name, chosen in self._detection.items() if chosen.data.scenes}
        return {
            f"scenes-{Path(folder).name}": {
                "cmd": self._make(f"{folder}/scenes.json"),
                "params": [
                    {
                        self._config: [
                            f"evaluation.detection.{name}.data.scenes",
                            f"evaluation.detection.{name}.data.classes",
                        ]
                    },
                    self._digest("scenes"),
                ],
                "outs": [{folder: _IN_CACHE}],
            }
            for folder, name in made.items()
        }

    def detect(self, name: str) -> dict[str, Any]:
        run = f"{self._home}/${{item.run}}"
        folder = f"{run}/detection-{name}"
        small = ("detections.png", "precision_recall.csv", "precision_recall.png", "provenance.json")
        return {
            "matrix": {"run": self._detected[name]},
            "cmd": self._make(f"{folder}/metrics.json"),
            "deps": [
                *self._detection[name].data.annotation_files(),
                f"{run}/pretrain/encoder.safetensors",
            ],
            "params": [{f"{folder}/run.yaml": None}, self._digest("detection")],
            "outs": [{f"{folder}/{file}": _IN_GIT} for file in small],
            "metrics": [{f"{folder}/metrics.json": _IN_GIT}],
        }

    def tables(self) -> dict[str, Any]:
        files = [f"{self._home}/tables/{name}" for name in ("summary.csv", "summary.md", "made_from.json")]
        return {
            "cmd": self._make(files[0]),
            "deps": ["workflow/published.csv", *self._metrics()],
            "params": [{self._config: ["title"]}, self._digest("tables")],
            "outs": [{file: _IN_GIT} for file in files],
        }

    def figures(self) -> dict[str, Any]:
        files = [f"{self._home}/figures/{name}.{kind}" for name in _FIGURES for kind in ("png", "svg")]
        files.append(f"{self._home}/figures/made_from.json")
        curves = self._each("pretrain/metrics.csv") + self._each("pretrain/matching.csv")
        return {
            "cmd": self._make(files[0]),
            "deps": [*self._metrics(), *curves],
            "params": [self._digest("figures")],
            "outs": [{file: _IN_GIT} for file in files],
        }

    def last_results(self) -> list[str]:
        """One file of each stage that nothing depends on."""
        return [f"{self._home}/tables/summary.csv", f"{self._home}/figures/accuracy.png"]

    def plots(self, root: str) -> list[dict[str, Any]]:
        """For `dvc plots show` and `dvc plots diff`: the loss of every training, and the figures.

        Args:
            root: from dvc.yaml to the Snakefile's folder; paths of plots know no `wdir`.
        """
        curves = {f"{root}{self._home}/{run}/pretrain/metrics.csv": "loss" for run in self._trained}
        loss = {"x": "epoch", "y": curves, "title": "Training loss", "y_label": "loss"}
        pictures = [f"{root}{self._home}/figures/{name}.png" for name in _FIGURES]
        return [*([{"loss": loss}] if curves else []), *({path: None} for path in pictures)]

    def _metrics(self) -> list[str]:
        frozen = [path for task in self.tasks for path in self._each(f"{task}/metrics.json")]
        return frozen + self._each_detection("metrics.json")

    def _each_detection(self, file: str) -> list[str]:
        return [
            f"{self._home}/{run}/detection-{name}/{file}"
            for name, runs in self._detected.items()
            for run in runs
        ]

    def _make(self, *targets: str) -> str:
        return f"snakemake {' '.join(targets)}{self._options}"

    def _each(self, file: str) -> list[str]:
        return [f"{self._home}/{run}/{file}" for run in self.runs]

    def _digest(self, stage: str) -> dict[str, list[str]]:
        return {f"{self._home}/code.yaml": [stage]}
