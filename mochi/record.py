"""An experiment as DVC stages: which files belong together, what they depend on, where they are kept.

Snakemake computes; DVC hashes, stores and compares. Each stage's command is therefore `snakemake TARGET`,
and what a stage depends on is what the rule depends on: the keys of its settings, the digest of its code,
the files it reads. A test compares the two graphs edge by edge.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from mochi.config import Experiment, load_experiment, method_seeds
from mochi.errors import UserError
from mochi.running.atomic import write_text

DEFAULT_CONFIG = Path("config/config.yaml")

# Small results are kept by git, where they can be read and compared; the rest by DVC's cache.
# `persist`: DVC deletes outputs before a command otherwise, and Snakemake would make all of them again.
_IN_GIT = {"cache": False, "persist": True}
_IN_CACHE = {"persist": True}

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
        "prepare": stages.prepare(),
        "resolve": stages.resolve(),
        "pretrain": stages.pretrain(),
        **{task: stages.evaluate(task) for task in stages.tasks},
        "tables": stages.tables(),
        "figures": stages.figures(),
    }
    if config == DEFAULT_CONFIG:
        described["provenance"] = stages.provenance()
    else:
        root = "/".join([".."] * len(place(experiment, config).parent.parts))
        described = {name: {"wdir": root, **stage} for name, stage in described.items()}
    return {"vars": [{"runs": stages.runs}], "stages": described, "plots": stages.plots()}


def place(experiment: Experiment, config: Path) -> Path:
    """Where the experiment's dvc.yaml stands: the default one at the top, others beside their results."""
    return Path("dvc.yaml") if config == DEFAULT_CONFIG else Path("results", experiment.name, "dvc.yaml")


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
    text = yaml.safe_dump(pipeline(experiment, config), sort_keys=False, width=1000)
    write_text(path, _HEADER + text)
    _call("dvc", "commit", "--force", str(path))
    if config != DEFAULT_CONFIG:
        # Snakemake's memory of all experiments is one folder, stored by the default experiment's stage.
        _call("dvc", "commit", "--force", "provenance")
    return path


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
        self.tasks = [task for task in ("linear", "knn") if getattr(experiment.evaluation, task)]

    def code(self) -> dict[str, Any]:
        target = f"{self._home}/code.yaml"
        return {"cmd": self._make(target), "deps": ["mochi"], "outs": [{target: _IN_GIT}]}

    def prepare(self) -> dict[str, Any]:
        return {
            "cmd": self._make(f"{self._data}/manifest.json"),
            "params": [{self._config: ["dataset"]}, self._digest("prepare")],
            "outs": [{self._data: _IN_CACHE}],
        }

    def resolve(self) -> dict[str, Any]:
        files = self._each("run.yaml")
        keys = ["name", "dataset", "seeds", "encoder", "augmentation", "pretrain", "methods", "evaluation"]
        return {
            "cmd": self._make(*files),
            "params": [{self._config: keys}],
            "outs": [{file: _IN_GIT} for file in files],
        }

    def pretrain(self) -> dict[str, Any]:
        folder = f"{self._home}/${{item.run}}/pretrain"
        small = ("metrics.csv", "matching.csv", "provenance.json")
        return {
            "matrix": {"run": "${runs}"},
            "cmd": self._make(f"{folder}/encoder.safetensors"),
            "deps": [f"{self._data}/manifest.json"],
            "params": [
                self._settings("seed", "dataset", "encoder", "augmentation", "pretrain"),
                self._digest("pretrain"),
            ],
            "outs": [
                {f"{folder}/encoder.safetensors": _IN_CACHE},
                *({f"{folder}/{name}": _IN_GIT} for name in small),
            ],
        }

    def evaluate(self, task: str) -> dict[str, Any]:
        folder = f"{self._home}/${{item.run}}"
        shared = ("image_size", "resize", "batch_size", task)
        return {
            "matrix": {"run": "${runs}"},
            "cmd": self._make(f"{folder}/{task}/metrics.json"),
            "deps": [f"{self._data}/manifest.json", f"{folder}/pretrain/encoder.safetensors"],
            "params": [
                self._settings("seed", "dataset", "encoder", *(f"evaluation.{key}" for key in shared)),
                self._digest(task),
            ],
            "outs": [{f"{folder}/{task}/provenance.json": _IN_GIT}],
            "metrics": [{f"{folder}/{task}/metrics.json": _IN_GIT}],
        }

    def tables(self) -> dict[str, Any]:
        files = [f"{self._home}/tables/summary.{kind}" for kind in ("csv", "md")]
        metrics = [path for task in self.tasks for path in self._each(f"{task}/metrics.json")]
        return {
            "cmd": self._make(files[0]),
            "deps": ["workflow/published.csv", *metrics],
            "params": [{self._config: ["title"]}, self._digest("tables")],
            "outs": [{file: _IN_GIT} for file in files],
        }

    def figures(self) -> dict[str, Any]:
        names = ("accuracy", "training", "negatives")
        files = [f"{self._home}/figures/{name}.{kind}" for name in names for kind in ("png", "svg")]
        metrics = [path for task in self.tasks for path in self._each(f"{task}/metrics.json")]
        curves = self._each("pretrain/metrics.csv") + self._each("pretrain/matching.csv")
        return {
            "cmd": self._make(files[0]),
            "deps": [*metrics, *curves],
            "params": [self._digest("figures")],
            "outs": [{file: _IN_GIT} for file in files],
        }

    def provenance(self) -> dict[str, Any]:
        """Last: Snakemake's memory of what made each file, without which a clone would make all again."""
        return {
            "cmd": "snakemake --dry-run --quiet",
            "deps": [f"{self._home}/tables/summary.csv", f"{self._home}/figures/accuracy.png"],
            "outs": [{".snakemake/metadata": _IN_CACHE}],
        }

    def plots(self) -> list[dict[str, Any]]:
        """For `dvc plots show` and `dvc plots diff`: the table, and each training's loss."""
        bars = {"x": "mean", "y": "method", "template": "bar_horizontal", "title": "Accuracy, %"}
        return [{f"{self._home}/tables/summary.csv": bars}]

    def _make(self, *targets: str) -> str:
        return f"snakemake {' '.join(targets)}{self._options}"

    def _each(self, file: str) -> list[str]:
        return [f"{self._home}/{run}/{file}" for run in self.runs]

    def _settings(self, *keys: str) -> dict[str, list[str]]:
        return {f"{self._home}/${{item.run}}/run.yaml": list(keys)}

    def _digest(self, stage: str) -> dict[str, list[str]]:
        return {f"{self._home}/code.yaml": [stage]}
