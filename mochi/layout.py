"""Paths of data, results, checkpoints and logs, relative to the project's folder.

`{method}` and `{seed}` may be wildcards of the workflow: the paths are built only from text.
"""

from dataclasses import dataclass
from pathlib import Path

PUBLISHED = Path("workflow/published.csv")
"""The papers' numbers."""

DEVIATIONS = Path("workflow/deviations.md")
"""Where the method and the protocols differ from the paper: a Markdown list."""


def dataset(name: str) -> Path:
    """Folder of a prepared data set."""
    return Path("data", name)


@dataclass(frozen=True)
class Paths:
    """The folders of one experiment."""

    experiment: str

    @property
    def results(self) -> Path:
        """Scores, tables, figures and records: stored in git."""
        return Path("results", self.experiment)

    @property
    def encoders(self) -> Path:
        """Results of pretraining: stored by DVC."""
        return self.results / "encoders"

    @property
    def evaluations(self) -> Path:
        """Results of evaluations: stored by DVC."""
        return self.results / "evaluations"

    def pretrain(self, method: str, seed: int | str) -> Path:
        """Results of pretraining one run."""
        return self.encoders / _run(method, seed)

    def encoder(self, method: str, seed: int | str) -> Path:
        """The encoder of one run."""
        return self.pretrain(method, seed) / "encoder.safetensors"

    def evaluation(self, method: str, seed: int | str, task: str) -> Path:
        """Results of one evaluation of one run."""
        return self.evaluations / _run(method, seed) / task

    def work(self, method: str, seed: int | str, task: str) -> Path:
        """Resume checkpoints; with a subfolder for each version of the settings."""
        return Path("work", self.experiment) / _run(method, seed) / task

    def log(self, method: str, seed: int | str, task: str) -> Path:
        """Path of one job's log; `task` may have a suffix, such as `.tsv`."""
        return Path("logs", self.experiment) / _run(method, seed) / task


def _run(method: str, seed: int | str) -> Path:
    return Path(method, f"seed{seed}")
