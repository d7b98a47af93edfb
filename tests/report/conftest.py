"""Made-up results of the tiny experiment, and the drawn figures."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from mochi.config import Experiment
from tests.report.made_up import make_up, top1_of
from tests.tiny import MOCHI


@pytest.fixture
def results(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, now the current one, with the results of three runs: top-1 of 10, 50 and 53."""
    monkeypatch.chdir(tmp_path)
    make_up(tiny, top1_of({("random-init", 0): 10.0, (MOCHI, 0): 50.0, (MOCHI, 1): 53.0}))
    return tmp_path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Name -> figure, for all figures that are saved from here on."""
    figures: dict[str, Figure] = {}
    savefig = Figure.savefig

    def watched(self: Figure, path: Path, **options: Any) -> None:
        if isinstance(path, Path):  # other pictures are embedded in the page
            figures[path.stem] = self
        savefig(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    return figures
