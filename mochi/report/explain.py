"""The chain behind one number of the table: from its seeds back to the data, each link checked."""

import shlex
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mochi.config import Experiment
from mochi.errors import UserError
from mochi.provenance.fingerprint import STAGE_MODULES, code_digest, file_digest
from mochi.report.collect import read_json, runs, scores, tasks


def explain(experiment: Experiment, results: Path, method: str, task: str) -> list[str]:
    """Lines that trace a cell of the table: command, commit, settings, code, data, versions, machine.

    Each recorded digest is compared with what lies here now; a difference is said, not raised, for old
    results are worth reading too.

    Raises:
        UserError: no such row or task in the experiment.
        MissingResultError: a result is not there.
    """
    known = [*tasks(experiment), *(f"detection-{name}" for name in experiment.evaluation.detection)]
    for name, found, allowed in (("method", method, list(experiment.methods)), ("task", task, known)):
        if found not in allowed:
            raise UserError(f"{name}: found {found!r}; {experiment.name} has: {', '.join(allowed)}")
    table = scores(experiment, results)
    table = table[(table["method"] == method) & (table["task"] == task)]
    lines = [
        f"{method}, {task} {metric}: {_mean(values.tolist())}"
        for metric, values in table.groupby("metric", sort=False)["value"]
    ]
    for name, seed, folder in runs(experiment, results):
        own = table[table["seed"] == seed]
        if name == method and len(own):
            shown = (
                f"{metric} {_all(values)}" for metric, values in own.groupby("metric", sort=False)["value"]
            )
            lines.append(f"seed {seed}: " + ", ".join(shown))
            for stage in (task, "pretrain"):
                lines += [
                    f"  {line}" for line in _link(stage, read_json(folder / stage / "provenance.json"))
                ]
    return lines


def _all(values: Iterable[float]) -> str:
    return " and ".join(f"{value:.2f}" for value in values)


def _mean(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}, a single one"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} over {len(values)}"


def _link(stage: str, record: dict[str, Any]) -> list[str]:
    """One stage of one run."""
    git, machine = record["git"], record["hardware"]
    module = STAGE_MODULES["detection" if stage.startswith("detection-") else stage]
    code = "as here" if record["code_digest"] == code_digest(module) else "DIFFERS from here"
    if len(made_by := record.get("code_digests", [])) > 1:
        code += f"; a resumed training, begun by other code: {', '.join(made_by[:-1])}"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    devices = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['threads']} threads"
    joules = record.get("energy_joules")
    return [
        f"{stage}: {shlex.join(record['command'])}",
        f"  settings {record['settings_digest']}, seed {record['seed']}",
        f"  code {record['code_digest']} ({code}), commit {_commit(git)}",
        *(f"  read {name}: {_file(entry)}" for name, entry in record["inputs"].items()),
        f"  on {devices}; {versions}",
        f"  took {record['wall_seconds']:.1f} s" + (f", {joules / 3600:.1f} Wh of GPU" if joules else ""),
    ]


def _commit(git: dict[str, Any] | None) -> str:
    if git is None:
        return "none (no repository)"
    return f"{git['commit'][:12]}{' with uncommitted changes' if git['dirty'] else ''}"


def _file(entry: dict[str, str]) -> str:
    path = Path(entry["path"])
    if not path.exists():
        state = "not here"
    else:
        state = "as here" if file_digest(path) == entry["sha256"] else "DIFFERS from the file here"
    return f"{path} sha256 {entry['sha256'][:16]} ({state})"
