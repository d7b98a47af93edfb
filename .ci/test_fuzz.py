"""Every reader of annotations, lists, tables and manifests on thousands of mutated files."""

from pathlib import Path

import pytest

from tests.fuzz import fuzz
from tests.mutations import KINDS

MUTATIONS = 2000


@pytest.mark.parametrize("kind", KINDS)
def test_readers_accept_or_refuse_changed_files(kind: str, tmp_path: Path) -> None:
    fuzz(kind, tmp_path, MUTATIONS)
