"""Made-up results of the tiny experiment, their report, and the drawn figures."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from matplotlib.figure import Figure

from mochi.config import Experiment
from mochi.provenance.wanted import reported
from mochi.report import stage
from tests.report.made_up import make_up, top1_of
from tests.tiny import MOCHI


class Report(NamedTuple):
    """A report that several tests read and none changes."""

    folder: Path
    """Where it was written; its results are in `results/tiny` below."""
    table: Path
    """What the stage returned."""
    figures: dict[str, Figure]


@pytest.fixture(scope="session")
def made_up(tiny: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of three runs: top-1 of 10, 50 and 53. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("made up")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_up(tiny, top1_of({("random-init", 0): 10.0, (MOCHI, 0): 50.0, (MOCHI, 1): 53.0}))
    return folder


@pytest.fixture(scope="session")
def _report(tiny: Experiment, made_up: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = shutil.copytree(made_up, tmp_path_factory.mktemp("report"), dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, drawing() as figures:
        patch.chdir(folder)
        return Report(folder, stage.run(tiny, reported(tiny)), figures)


@pytest.fixture
def report(_report: Report, monkeypatch: pytest.MonkeyPatch) -> Report:
    """The report of these results, in the folder that is now the current one. For reading."""
    monkeypatch.chdir(_report.folder)
    return _report


@pytest.fixture
def results(made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own, now the current one, with these results and without a report."""
    shutil.copytree(made_up, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def reported_results(_report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with the report, for tests that change it."""
    shutil.copytree(_report.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def saved_figures() -> Iterator[dict[str, Figure]]:
    """Name -> figure, for all figures that are saved from here on."""
    with drawing() as figures:
        yield figures


@contextmanager
def drawing() -> Iterator[dict[str, Figure]]:
    """Name -> figure, for all figures that are saved inside the context."""
    figures: dict[str, Figure] = {}
    savefig = Figure.savefig

    def watched(self: Figure, path: Path, **options: Any) -> None:
        if isinstance(path, Path):  # other pictures are embedded in the page
            figures[path.stem] = self
        savefig(self, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", watched)
        yield figures
