"""An epoch of a few images by each alternative: it runs and trains. Its numbers are not tested."""

import importlib.util
from pathlib import Path

import pytest

from benchmarks import training
from benchmarks.data.pictures import make_pictures


def test_every_alternative_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_BATCH", 32)
    monkeypatch.setattr(training, "_QUEUE", 64)
    make_pictures(tmp_path, 32)
    expected = ["encoders alone, plain batch norm (upper bound)", "ours"]
    if importlib.util.find_spec("lightly") is not None:
        expected.append("lightly")
    assert [row.name for row in training.run(tmp_path, rounds=1, cores=1)] == expected
