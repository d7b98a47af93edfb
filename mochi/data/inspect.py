"""Summarise a folder of images and recommend settings."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mochi.data.describe_folder import list_folder
from mochi.data.format import oversized
from mochi.data.ingest import classes, duplicates
from mochi.data.ingest.raw import FileSplit, Progress, as_text, class_counts
from mochi.data.ingest.validate import Validator
from mochi.data.recommend import FEWEST, Facts, advise
from mochi.runtime.progress import printable

_SHOWN = 5  # examples of each kind; the JSON report has all


def inspect(folder: Path, *, jobs: int, progress: Progress | None = None) -> dict[str, Any]:
    """Decode every image below `folder` and report, in JSON's types.

    Args:
        folder: classes with or without splits, or images without labels, as `mochi init` reads them.
        jobs: processes that decode.
        progress: called with the number of files done and the total.

    Raises:
        DataError: no such folder, or no image in it.
    """
    options, raw = list_folder(folder)
    splits = {name: split for name, split in raw.splits.items() if isinstance(split, FileSplit)}
    total = sum(len(split.paths) for split in splits.values())
    summary = _Summary()
    with Validator(jobs) as validator:
        for name, split in splits.items():
            summary.add(validator, name, split, total, progress)
    counts = {name: class_counts(summary.labels_of(name), raw.classes) for name in splits}
    sides = np.array(summary.sides or [(0, 0)]).min(axis=1)
    facts = Facts(
        num_train=int(sum(name == "train" for name, _, _ in summary.rows)),
        short_side=int(np.median(sides)),
        train_classes=counts.get("train", {}) if raw.classes else {},
        has_val="val" in splits,
    )
    return {
        "folder": as_text(str(folder)),
        "dataset": {key: value for key, value in options.items() if key != "path"},
        "files": total,
        "splits": {
            name: {
                "images": len(summary.labels_of(name)),
                "unlabelled": int((summary.labels_of(name) < 0).sum()),
                "classes": counts[name],
            }
            for name in splits
        },
        "formats": dict(summary.formats.most_common()),
        "reencoded": summary.reencoded,
        "sides": _sides(summary.sides),
        "balance": _balance(facts.train_classes),
        "ignored": raw.ignored,
        "class_faults": [*classes.faults(counts), *classes.oddities(counts)],
        "oversized": [note for name in splits if (note := summary.oversized(name))],
        "unreadable": summary.unreadable,
        "duplicates": summary.duplicates(raw.classes),
        "too_few": facts.num_train < FEWEST,
        "advice": [vars(advice) for advice in advise(facts)] if facts.num_train else [],
    }


class _Summary:
    """The findings of the pass over the files."""

    def __init__(self) -> None:
        self.formats: Counter[str] = Counter()
        self.sides: list[tuple[int, int]] = []
        self.rows: list[tuple[str, int, str]] = []  # split, label, path of each readable image
        self.hashes = bytearray()
        self.unreadable: list[dict[str, Any]] = []
        self.reencoded = 0
        self._done = 0

    def add(
        self, validator: Validator, name: str, split: FileSplit, total: int, progress: Progress | None
    ) -> None:
        """Check every file of a split."""
        for file in validator.validate(split, keep_reencoded=False):
            result, path = file.result, as_text(split.paths[file.row])
            self._done += 1
            if progress is not None:
                progress(self._done, total)
            if result.reason:
                self.unreadable.append({"path": path, "bytes": file.size, "reason": result.reason})
                continue
            self.formats[f"{result.format} {result.mode}"] += 1
            self.sides.append((result.height, result.width))
            self.rows.append((name, int(split.labels[file.row]), path))
            self.hashes += file.sha256
            self.reencoded += result.reencoded is not None

    def oversized(self, name: str) -> str:
        """A message about images of a split far larger than any view."""
        own = [
            (side, path)
            for side, (split, _, path) in zip(self.sides, self.rows, strict=True)
            if split == name
        ]
        if not own:
            return ""
        sides = np.array([side for side, _ in own], np.int32)
        return oversized(name, sides[:, 0], sides[:, 1], lambda row: own[row][1])

    def labels_of(self, name: str) -> Any:
        """(n,) labels of a split's readable images."""
        return np.array([label for split, label, _ in self.rows if split == name], dtype=np.int64)

    def duplicates(self, classes: list[str]) -> dict[str, Any]:
        """Counts, and the paths and classes of each group."""
        hashes = {"all": np.frombuffer(bytes(self.hashes), np.uint8).reshape(-1, 32)}
        labels = {"all": np.array([label for _, label, _ in self.rows], dtype=np.int64)}
        groups = [
            [duplicates.Duplicate(self.rows[each.row][0], each.row, each.label) for each in group]
            for group in duplicates.groups(hashes, labels)
        ]
        rows = [
            [
                {"path": self.rows[each.row][2], "class": classes[each.label] if each.label >= 0 else None}
                for each in group
            ]
            for group in groups
        ]
        return {**duplicates.summary(groups), "rows": rows}


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
        lines.append(f"  {name}: {_count(split['images'], 'image')}, {labelled} labelled")
    if report["dataset"]:
        lines.append(f"  read with {_yaml('dataset', report['dataset'])}, as `mochi init` writes it")
    lines += _section("formats", [f"{count} {kind}" for kind, count in report["formats"].items()])
    if report["reencoded"]:
        lines.append(
            f"  {report['reencoded']} will be re-encoded as PNG, without loss; others keep their bytes"
        )
    if sides := report["sides"]:
        size = "all of one size" if sides["one_size"] else "of many sizes"
        lines.append(
            f"sizes: {size}; short side {sides['short_min']} to {sides['short_max']} px, median "
            f"{sides['short_median']}; longest side {sides['longest']} px; aspect ratio up to "
            f"{sides['ratio_max']}"
        )
    if balance := report["balance"]:
        (small, few), (large, many) = (next(iter(balance[key].items())) for key in ("smallest", "largest"))
        lines.append(
            f"classes: {balance['classes']}; from {few} ({small}) to {many} ({large}) images, "
            f"{balance['largest_over_smallest']} times as many"
        )
        lines += _section("  empty classes", balance["empty"])
    lines += _section("ignored", [f"{count} {reason}" for reason, count in report["ignored"].items()])
    lines += [f"warning: {text}" for text in (*report["class_faults"], *report["oversized"])]
    bad = [f"{row['path']} ({row['bytes']} bytes): {row['reason']}" for row in report["unreadable"]]
    lines += _section(
        f"{_count(len(bad), 'unreadable file')}; preparation skips up to `max_unreadable` (1%) of all",
        bad,
    )
    lines += _duplicates(report["duplicates"])
    lines += [f"warning: {text}" for text in repeated(report["duplicates"])]
    if report["too_few"]:
        count = report["splits"].get("train", {"images": 0})["images"]
        lines.append(f"warning: {count} training images are too few to pretrain on; expected thousands")
    lines = [printable(line) for line in lines]  # names of files and classes may hold anything
    lines += _section(
        "recommended settings to start with",
        [f"{_yaml(advice['key'], advice['value'])}\n      {advice['why']}" for advice in report["advice"]],
        limit=None,
    )
    return "\n".join(lines)


def _yaml(key: str, value: object) -> str:
    """One line that an experiment file accepts."""
    flow = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return f"{key}: {flow.splitlines()[0]}"  # without the document's end, `...`


def repeated(counts: Mapping[str, int]) -> list[str]:
    """What images that are there twice do to scores.

    Args:
        counts: of `ingest.duplicates.summary`, also in the manifest.
    """
    texts = []
    if shared := counts["across_splits"]:
        texts.append(
            f"{_count(shared, 'image')} in more than one split: scores on these are too high; keep each in "
            "one split"
        )
    if contradicting := counts["with_two_labels"]:
        texts.append(
            f"{_count(contradicting, 'image')} with two labels, at most one of which is right; keep each "
            "in one class"
        )
    return texts


def _duplicates(duplicates: dict[str, Any]) -> list[str]:
    groups = [
        " = ".join(f"{row['path']} [{row['class']}]" if row["class"] else row["path"] for row in group)
        for group in duplicates["rows"]
    ]
    title = (
        f"identical images: {_count(duplicates['groups'], 'group')}, {duplicates['across_splits']} across "
        f"splits, {duplicates['with_two_labels']} with two labels"
    )
    return _section(title, groups)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _section(title: str, items: list[str], limit: int | None = _SHOWN) -> list[str]:
    """A title and the first few items; nothing without items."""
    if not items:
        return []
    shown = [f"  {item}" for item in items[:limit]]
    rest = len(items) - len(shown)
    return [f"{title}:", *shown, *([f"  ... and {rest} more"] if rest else [])]
