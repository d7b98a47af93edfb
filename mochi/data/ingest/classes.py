"""Check that the classes of train and val agree, before and after preparation.

Names are already in Unicode's composed form: é as one character or as two is the same name.
"""

import unicodedata
from collections.abc import Mapping
from itertools import pairwise

from mochi.data.ingest.files import SPLITS

Counts = Mapping[str, Mapping[str, int]]
"""Split -> class name -> number of images."""


def faults(counts: Counts) -> list[str]:
    """The error that makes every score of a classifier 0: no class has images in both splits."""
    train, val = (_filled(counts, split) for split in ("train", "val"))
    if not train or not val or train & val:
        return []
    text = f"no class has images in both train ({_some(train)}) and val ({_some(val)})"
    for split, names in (("train", train), ("val", val)):
        if len(names) == 1 and next(iter(names)).lower() in SPLITS:
            text += (
                f"; the only class of {split} is called {next(iter(names))!r}: a folder too many was "
                "unpacked, move its folders up"
            )
            return [text]
    similar = alike(train | val)
    return [f"{text}; {similar[0]}" if similar else f"{text}; the folders below each split are the classes"]


def oddities(counts: Counts) -> list[str]:
    """Probable mistakes: names that hardly differ, test classes without training images."""
    train, val = (_filled(counts, split) for split in ("train", "val"))
    found = alike({name for split in counts.values() for name in split})
    if train and (missing := val - train):
        found.append(f"{len(missing)} classes of val have no image in train: {_some(missing)}")
    return found


def _filled(counts: Counts, split: str) -> set[str]:
    return {name for name, count in counts.get(split, {}).items() if count}


def alike(names: set[str]) -> list[str]:
    """Pairs of names that look the same: case, spaces, wide forms and characters without width aside."""
    by_form = sorted((_plain(name), name) for name in names)
    return [
        f"classes {first!r} and {second!r} differ only in case, spaces or Unicode form: rename one"
        for (form, first), (other, second) in pairwise(by_form)
        if form == other
    ]


def _plain(name: str) -> str:
    wide = unicodedata.normalize("NFKC", name)
    seen = "".join(character for character in wide if unicodedata.category(character) != "Cf")
    return " ".join(seen.casefold().split())


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
