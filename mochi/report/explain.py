"""Trace one number of the table from its seeds back to the data, and check each digest."""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mochi.config import Experiment
from mochi.errors import UserError
from mochi.layout import Paths
from mochi.provenance.fingerprint import file_digest
from mochi.provenance.wanted import Result, evaluated, evaluations, pretrained, searches
from mochi.report.collect import MissingResultError, read_json, read_table
from mochi.report.tables import mean_and_std
from mochi.stages import column_of


def explain(experiment: Experiment, method: str, task: str) -> list[str]:
    """Lines that trace a cell of the table: command, commit, settings, code, data, versions, machine.

    Every recorded digest is compared with the current one. A difference is printed, not raised, so that old
    results can be traced too.

    Raises:
        UserError: no such row or task in the experiment.
        MissingResultError: there is no report yet.
    """
    known = list(dict.fromkeys(column_of(name) for _, _, name in evaluations(experiment)))
    for name, found, allowed in (("method", method, list(experiment.methods)), ("task", task, known)):
        if found not in allowed:
            raise UserError(f"{name}: found {found!r}; {experiment.name} has: {', '.join(allowed)}")
    folder = Paths(experiment.name).results
    records = read_json(folder / "records.json")
    table = _scores(folder / "scores.csv")
    table = table[(table["method"] == method) & (table["task"] == task)]
    lines = [
        f"{method}, {task} {metric}: {_mean(rows)}" for metric, rows in table.groupby("metric", sort=False)
    ]
    jobs = [
        (seed, job)
        for row, seed, job in [*searches(experiment), *evaluations(experiment)]
        if (row, column_of(job)) == (method, task)
    ]
    for seed in dict.fromkeys(seed for seed, _ in jobs):
        own = table[table["seed"] == seed].groupby("metric", sort=False)["value"]
        lines.append(f"seed {seed}: " + ", ".join(f"{metric} {_all(values)}" for metric, values in own))
        evaluators = [evaluated(experiment, method, seed, job) for each, job in jobs if each == seed]
        for result in (*evaluators, pretrained(experiment, method, seed)):
            record = records.get(result.folder.as_posix())
            if record is None:
                raise MissingResultError(
                    f"{folder / 'records.json'}: has no {result.label}; run `mochi report` again"
                )
            lines += [f"  {line}" for line in _link(result, record)]
    return lines


def _scores(path: Path) -> pd.DataFrame:
    texts = ("method", "task", "metric", "fine_tuning")
    table = read_table(path, texts)
    for name in (*texts, "seed", "value"):
        if name not in table:
            raise MissingResultError(f"{path}: found no column {name}; compute it again: `mochi report`")
    return table


def _all(values: Iterable[float]) -> str:
    return " and ".join(f"{value:.2f}" for value in values)


def _mean(rows: pd.DataFrame) -> str:
    """The number in the table, with one more digit."""
    cell = mean_and_std(rows)
    if cell["n"] == 1:
        return f"{cell['mean']:.2f}, one {cell['over'].removesuffix('s')}"
    return f"{cell['mean']:.2f} ± {cell['std']:.2f} over {cell['n']} {cell['over']}"


def _link(result: Result, record: Mapping[str, Any]) -> list[str]:
    """One stage of one run."""
    machine = record["hardware"]
    code = "unchanged" if record["code_digest"] == result.code_digest else "CHANGED"
    if result.code_digest in record.get("accepted_code", []):
        code += ", accepted by the user"
    if len(earlier := record.get("code_digests", [])) > 1:
        code += f"; resumed after a code change: {', '.join(earlier[:-1])}"
    settings = "unchanged" if record["settings_digest"] == result.settings_digest else "CHANGED"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    threads = machine.get("threads", 1)
    devices = ", ".join(machine.get("gpus", [])) or (
        f"{machine['cpu']}, {threads} {'thread' if threads == 1 else 'threads'}"
    )
    return [
        f"{record['result']}: {shlex.join(record['command'])}",
        f"  settings {record['settings_digest']} ({settings})",
        f"  code {record['code_digest']} ({code}), commit {_commit(record['git'])}",
        *(f"  read {_name(name, entry)}{_file(entry)}" for name, entry in record["inputs"].items()),
        f"  on {devices}; {versions}",
        f"  took {record['wall_seconds']:.1f} s",
    ]


def _commit(git: Mapping[str, Any] | None) -> str:
    if git is None:
        return "none (no repository)"
    return f"{git['commit'][:12]}{' with uncommitted changes' if git['dirty'] else ''}"


def _name(name: str, entry: Mapping[str, str]) -> str:
    """What the file is; nothing if that is its path."""
    return "" if name == entry["path"] else f"{name}: "


def _file(entry: Mapping[str, str]) -> str:
    path = Path(entry["path"])
    if not path.exists():
        state = "not found"
    else:
        state = "unchanged" if file_digest(path) == entry["sha256"] else "CHANGED"
    return f"{path} sha256 {entry['sha256'][:16]} ({state})"
