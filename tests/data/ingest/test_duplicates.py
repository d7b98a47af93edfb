"""Groups of equal hashes compared with a dictionary, on random data with many repeats."""

import numpy as np
import pytest

from mochi.data.ingest import duplicates


@pytest.mark.parametrize("seed", range(5))
def test_groups_equal_those_of_a_dictionary(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool = rng.integers(0, 256, (30, 32), dtype=np.uint8)
    hashes = {
        name: pool[rng.integers(0, 30, count)] for name, count in (("train", 40), ("val", 11), ("test", 0))
    }
    labels = {name: rng.integers(-1, 3, len(rows)) for name, rows in hashes.items()}
    expected: dict[bytes, list[duplicates.Duplicate]] = {}
    for name, rows in hashes.items():
        for row, content in enumerate(rows):
            expected.setdefault(content.tobytes(), []).append(
                duplicates.Duplicate(name, row, int(labels[name][row]))
            )
    groups = [group for group in expected.values() if len(group) > 1]
    found = list(duplicates.groups(hashes, labels))
    assert found == groups
    assert duplicates.summary(found) == {
        "groups": len(groups),
        "across_splits": len([g for g in groups if len({row.split for row in g}) == 2]),
        "with_two_labels": len([g for g in groups if len({row.label for row in g} - {-1}) > 1]),
    }


def test_an_empty_split_has_no_duplicates() -> None:
    assert list(duplicates.groups({}, {})) == []
    one = {"train": np.zeros((1, 32), np.uint8)}
    assert list(duplicates.groups(one, {"train": np.array([0])})) == []
