"""Rows with the same content: within a split, across splits, under two labels."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Duplicate:
    """One of several rows with the same content."""

    split: str
    row: int
    label: int


def groups(
    hashes: dict[str, NDArray[np.uint8]], labels: dict[str, NDArray[np.int64]]
) -> Iterator[list[Duplicate]]:
    """Groups of two or more rows whose (N, 32) hashes are equal, over all splits, in a fixed order."""
    names = list(hashes)
    everything = np.concatenate([hashes[name] for name in names]) if names else np.empty((0, 32), np.uint8)
    starts = np.cumsum([0, *(len(hashes[name]) for name in names)])
    keys = np.ascontiguousarray(everything).view("V32").ravel()
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    found = [np.sort(order[first : last + 1]) for first, last in edges.reshape(-1, 2)]
    for rows in sorted(found, key=lambda rows: int(rows[0])):
        group = []
        for position in rows.tolist():
            part = int(np.searchsorted(starts, position, side="right")) - 1
            row = position - int(starts[part])
            group.append(Duplicate(names[part], row, int(labels[names[part]][row])))
        yield group


def summary(found: list[list[Duplicate]]) -> dict[str, int]:
    """Counts for the manifest."""
    return {
        "groups": len(found),
        "across_splits": sum(len({row.split for row in group}) > 1 for group in found),
        "with_two_labels": sum(len({row.label for row in group if row.label >= 0}) > 1 for group in found),
    }
