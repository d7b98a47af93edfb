"""A few mutations of every kind of file; `.ci/test_fuzz.py` tries thousands."""

from pathlib import Path

import pytest

from tests.fuzz import fuzz
from tests.mutations import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_readers_accept_or_refuse_changed_files(kind: str, tmp_path: Path) -> None:
    fuzz(kind, tmp_path / "é x", 60)
