"""What is in a folder of images, before anything is started: for people who bring their own."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mochi.config import Folder
from mochi.data.ingest import duplicates
from mochi.data.ingest.raw import FileSplit, Progress, as_text, class_counts
from mochi.data.ingest.sources import folder as source
from mochi.data.ingest.validate import Scanner, scanning
from mochi.data.recommend import Facts, advise

_SHOWN = 5  # examples of each kind; the JSON has them all


def inspect(folder: Path, *, jobs: int, cache: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Read every image below `folder` and report, in JSON's types.

    Args:
        folder: as `source: folder` expects it.
        jobs: processes that decode.
        cache: keeps verdicts on contents, so that the preparation after it decodes nothing again.

    Raises:
        DataError: no such folder, or not one image in it.
    """
    origin = source.collect(Folder(source="folder", name="report", path=str(folder)), cache)
    splits = {name: split for name, split in origin.splits.items() if isinstance(split, FileSplit)}
    total = sum(len(split.paths) for split in splits.values())
    found = _Found()
    with scanning(jobs, cache) as scanner:
        for name, split in splits.items():
            found.read(scanner, name, split, total, progress)
    counts = {name: class_counts(found.labels_of(name), origin.classes) for name in splits}
    sides = np.array(found.sides or [(0, 0)]).min(axis=1)
    facts = Facts(
        num_train=int(sum(name == "train" for name, _, _ in found.rows)),
        short_side=int(np.median(sides)),
        train_classes=counts.get("train", {}) if origin.classes else {},
        has_val="val" in splits,
    )
    return {
        "folder": as_text(str(folder)),
        "files": total,
        "splits": {
            name: {
                "images": len(found.labels_of(name)),
                "unlabelled": int((found.labels_of(name) < 0).sum()),
                "classes": counts[name],
            }
            for name in splits
        },
        "formats": dict(found.formats.most_common()),
        "written_anew": found.written_anew,
        "sides": _sides(found.sides),
        "balance": _balance(facts.train_classes),
        "ignored": origin.ignored,
        "unreadable": found.unreadable,
        "duplicates": found.duplicates(origin.classes),
        "advice": [vars(advice) for advice in advise(facts)] if facts.num_train else [],
    }


class _Found:
    """What the pass over the files has seen."""

    def __init__(self) -> None:
        self.formats: Counter[str] = Counter()
        self.sides: list[tuple[int, int]] = []
        self.rows: list[tuple[str, int, str]] = []  # split, label, path of each readable image
        self.hashes = bytearray()
        self.unreadable: list[dict[str, Any]] = []
        self.written_anew = 0
        self.done = 0

    def read(
        self, scanner: Scanner, name: str, split: FileSplit, total: int, progress: Progress | None
    ) -> None:
        """Judge every file of a split."""
        for result in scanner.scan(split, keep_encoded=False):
            verdict, path = result.verdict, as_text(split.paths[result.row])
            self.done += 1
            if progress is not None:
                progress(self.done, total)
            if verdict.reason:
                self.unreadable.append({"path": path, "bytes": result.size, "reason": verdict.reason})
                continue
            self.formats[f"{verdict.format} {verdict.mode}"] += 1
            self.sides.append((verdict.height, verdict.width))
            self.rows.append((name, int(split.labels[result.row]), path))
            self.hashes += result.sha256
            self.written_anew += verdict.encoded is not None

    def labels_of(self, name: str) -> Any:
        """(n,) labels of a split's readable images."""
        return np.array([label for split, label, _ in self.rows if split == name], dtype=np.int64)

    def duplicates(self, classes: list[str]) -> dict[str, Any]:
        """Counts, and the paths and classes of each group."""
        hashes = {"all": np.frombuffer(bytes(self.hashes), np.uint8).reshape(-1, 32)}
        labels = {"all": np.array([label for _, label, _ in self.rows], dtype=np.int64)}
        named = [
            [duplicates.Row(self.rows[row.row][0], row.row, row.label) for row in group]
            for group in duplicates.groups(hashes, labels)
        ]
        shown = [
            [
                {"path": self.rows[row.row][2], "class": classes[row.label] if row.label >= 0 else None}
                for row in group
            ]
            for group in named
        ]
        return {**duplicates.summary(named), "rows": shown}


def _sides(sides: list[tuple[int, int]]) -> dict[str, Any]:
    if not sides:
        return {}
    sizes = np.array(sides)
    short = sizes.min(axis=1)
    ratio = sizes.max(axis=1) / short
    return {
        "one_size": bool((sizes == sizes[0]).all()),
        "short_min": int(short.min()),
        "short_median": int(np.median(short)),
        "short_max": int(short.max()),
        "longest": int(sizes.max()),
        "ratio_max": round(float(ratio.max()), 2),
    }


def _balance(counts: dict[str, int]) -> dict[str, Any]:
    filled = {name: count for name, count in counts.items() if count}
    if not filled:
        return {}
    smallest, largest = min(filled, key=filled.__getitem__), max(filled, key=filled.__getitem__)
    return {
        "classes": len(counts),
        "empty": [name for name, count in counts.items() if not count],
        "smallest": {smallest: filled[smallest]},
        "largest": {largest: filled[largest]},
        "largest_over_smallest": round(filled[largest] / filled[smallest], 2),
    }


def render(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = [f"{report['folder']}: {report['files']} files that may be images"]
    for name, split in report["splits"].items():
        labelled = split["images"] - split["unlabelled"]
        lines.append(f"  {name}: {split['images']} images, {labelled} labelled")
    lines += _section("formats", [f"{count} {kind}" for kind, count in report["formats"].items()])
    if report["written_anew"]:
        anew = report["written_anew"]
        lines.append(f"  {anew} will be written anew as PNG, without loss; the others keep their bytes")
    if sides := report["sides"]:
        size = "all of one size" if sides["one_size"] else "of many sizes"
        lines.append(
            f"sizes: {size}; short side {sides['short_min']} to {sides['short_max']} px, median "
            f"{sides['short_median']}; longest side {sides['longest']} px; sides differ by up to "
            f"{sides['ratio_max']} times"
        )
    if balance := report["balance"]:
        (small, few), (large, many) = (next(iter(balance[key].items())) for key in ("smallest", "largest"))
        lines.append(
            f"classes: {balance['classes']}; from {few} ({small}) to {many} ({large}) images, "
            f"{balance['largest_over_smallest']} times as many"
        )
        lines += _section("  empty classes", balance["empty"])
    lines += _section("ignored", [f"{count} {reason}" for reason, count in report["ignored"].items()])
    bad = [f"{row['path']} ({row['bytes']} bytes): {row['reason']}" for row in report["unreadable"]]
    lines += _section(f"unreadable, will be set aside: {len(bad)}", bad)
    lines += _duplicates(report["duplicates"])
    lines += _section(
        "settings that fit (a start, not a law)",
        [f"{advice['key']}: {advice['value']}\n      {advice['why']}" for advice in report["advice"]],
        limit=None,
    )
    return "\n".join(lines)


def _duplicates(found: dict[str, Any]) -> list[str]:
    groups = [
        " = ".join(f"{row['path']} [{row['class']}]" if row["class"] else row["path"] for row in group)
        for group in found["rows"]
    ]
    title = (
        f"identical images: {found['groups']} groups, {found['across_splits']} across splits, "
        f"{found['with_two_labels']} with two labels"
    )
    return _section(title, groups)


def _section(title: str, items: list[str], limit: int | None = _SHOWN) -> list[str]:
    """A title and its items, the first few; nothing at all without items."""
    if not items:
        return []
    shown = [f"  {item}" for item in items[:limit]]
    rest = len(items) - len(shown)
    return [f"{title}:", *shown, *([f"  ... and {rest} more"] if rest else [])]
