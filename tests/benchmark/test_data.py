"""The data benchmark with next to nothing in it: the parts run, the arithmetic of a row is right, and a set
repeated a thousandfold reads like the set itself. What it measures is no business of a test.
"""

from pathlib import Path

import numpy as np

from mochi.benchmark import data, data_memory
from mochi.benchmark.rows import lines, row


def test_a_row_is_the_median_of_the_ratios_of_pairs() -> None:
    found = row("part", [10.0, 30.0, 20.0], [5.0, 10.0, 20.0], "views/s")
    assert (found["ours"], found["beside"]) == (20, 10)
    assert (found["ratio"], found["spread"], found["runs"]) == (2, [1, 3], 3)
    assert "2.00 (1.00 to 3.00)" in lines([found])[-1]
    empty = row("nothing", [], [], "MB", note="not installed")
    assert empty["ratio"] is None
    assert "not installed" in lines([empty])[-1]


def test_parts_run_and_sets_repeat(tmp_path: Path) -> None:
    data._make_pictures(tmp_path, 64)
    assert [found["runs"] for found in data._large_views(tmp_path, 1)] == [1, 1]
    assert all(found["ratio"] > 0 for found in data._small_views(1))
    split = data.prepared(tmp_path, "photos")
    many = data_memory.repeated(split, 10, tmp_path / "many")
    assert len(many) == 640
    assert many.encoded(64 * 7 + 5).equals(split.encoded(5))
    assert (many.heights == np.tile(split.heights, 10)).all()
    assert many.path(64 * 7 + 5) == f"7/{split.path(5)}"
