"""Show the state of an experiment: what is running, its progress, what failed and why. Writes nothing.

The information comes from files that the stages write: results with their provenance, the status of a job
in its work folder, and its log.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mochi.config import Experiment, all_runs, columns
from mochi.data.ingest.sources.folder import current_listing
from mochi.layout import Paths, dataset
from mochi.provenance import wanted
from mochi.provenance.wanted import Result
from mochi.runtime.job_status import JobStatus, read
from mochi.runtime.progress import clock
from mochi.stages import ANALYSIS

_SHOWN = 5  # stale results, each with its reason


@dataclass(frozen=True)
class _Job:
    """One result, and the job that computes it or was interrupted."""

    result: Result
    state: str
    """done, running, interrupted, failed, stale, not started."""
    detail: str
    """Why it is stale, or the error."""
    status: JobStatus | None
    log: Path | None
    columns: tuple[str, ...] = ()
    """The numbers of an evaluation in the tables; the first is the main one."""


def status(experiment: Experiment) -> Iterator[str]:
    """Lines for a terminal: the counts, a row for each run, what failed, what is stale."""
    jobs, rows = _jobs(experiment)
    counts = Counter(job.state for job in jobs)
    order = ("done", "running", "interrupted", "failed", "stale", "not started")
    yield f"{experiment.name}: " + ", ".join(f"{counts[state]} {state}" for state in order if counts[state])
    running = [job for job in jobs if job.state == "running"]
    if running:
        longest = max((job.status.seconds_left or 0 for job in running if job.status), default=0)
        yield f"the running jobs finish in about {clock(longest)}"
    yield ""
    yield from _table([("run", "stage", "progress", "speed", "left", "accuracy", "health, scores"), *rows])
    for job in jobs:
        if job.state in {"failed", "interrupted"}:
            yield ""
            yield f"{job.result.label} {job.state}: {job.detail or 'killed'}"
            if job.log is not None and (last := _last_line(job.log)):
                yield f"  {job.log}: {last}"
    stale = [job for job in jobs if job.state == "stale"]
    if stale:
        yield ""
        yield from (f"stale: {job.result.label}: {job.detail}" for job in stale[:_SHOWN])
        if len(stale) > _SHOWN:
            yield f"... and {len(stale) - _SHOWN} more; `mochi adopt` lists them"
    if counts["failed"] or counts["interrupted"]:
        yield ""
        yield "the same snakemake command continues: finished jobs are kept, interrupted ones resume"


def _jobs(experiment: Experiment) -> tuple[list[_Job], list[tuple[str, ...]]]:
    """All results in order, and a row of the table for each run."""
    paths = Paths(experiment.name)
    of_run: dict[tuple[str, int], list[_Job]] = {run: [] for run in all_runs(experiment)}
    tasks = [*wanted.searches(experiment), *wanted.evaluations(experiment)]
    for method, seed in all_runs(experiment):
        results = {
            "pretrain": wanted.pretrained(experiment, method, seed),
            ANALYSIS: wanted.analyzed(experiment, method, seed),
            **{
                task: wanted.evaluated(experiment, method, seed, task)
                for m, s, task in tasks
                if (m, s) == (method, seed)
            },
        }
        for task, result in results.items():
            job_status = read(paths.work(method, seed, task))
            job = _job(result, job_status, paths.log(method, seed, f"{task}.log"))
            of_run[method, seed].append(replace(job, columns=tuple(columns(experiment, task))))
    configs = wanted.datasets(experiment)
    listings = {name: current_listing(config, dataset(name)) for name, config in configs.items()}
    per_run = {job.result.label for jobs in of_run.values() for job in jobs}
    others = [
        _job(result, None, None)
        for result in wanted.results(experiment, listings)
        if result.label not in per_run
    ]
    rows = [_row(method, seed, jobs) for (method, seed), jobs in of_run.items()]
    return [*(job for jobs in of_run.values() for job in jobs), *others], rows


def _job(result: Result, job_status: JobStatus | None, log: Path | None) -> _Job:
    if job_status is not None and job_status.alive():
        return _Job(result, "running", "", job_status, log)
    reason = result.why_stale()
    if reason is None:
        return _Job(result, "done", "", None, log)
    if job_status is not None:  # killed while its status says running
        state = "failed" if job_status.state == "failed" else "interrupted"
        return _Job(result, state, job_status.error, job_status, log)
    return _Job(result, "not started" if reason == "missing" else "stale", reason, None, log)


def _row(method: str, seed: int, jobs: Sequence[_Job]) -> tuple[str, ...]:
    """The state of a run: its running job, else its interrupted job, else the number of finished jobs."""
    label = f"{method} seed {seed}"
    active = next(
        (job for state in ("running", "failed", "interrupted") for job in jobs if job.state == state), None
    )
    accuracy, health = _trained(jobs[0].result)
    if active is not None and active.status is not None:
        now = active.status
        done = f"{now.done}/{now.total} ({now.done / now.total:.0%})" if now.total else "starting"
        speed = f"{now.rate:.3g}/s" if now.rate and active.state == "running" else ""
        left = clock(now.seconds_left) if now.seconds_left is not None and speed else ""
        reached = accuracy if now.accuracy is None else f"{now.accuracy:.1%}"
        stage = active.result.label.removeprefix(f"{label} ")
        stage = stage if active.state == "running" else f"{stage} ({active.state})"
        return (label, stage, done, speed, left, reached, now.health or health or now.note)
    complete = sum(job.state == "done" for job in jobs)
    stage = "done" if complete == len(jobs) else "not started" if not complete else "waiting"
    scores = ", ".join(filter(None, (_score(job) for job in jobs[1:])))
    return (label, stage, f"{complete}/{len(jobs)} jobs", "", "", accuracy, scores or health)


def _trained(result: Result) -> tuple[str, str]:
    """(proxy-task accuracy, health) after the last epoch of a finished training run."""
    try:
        with (result.folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return f"{float(rows[-1]['accuracy']):.1%}", rows[-1].get("status") or ""
    except (OSError, LookupError, ValueError, TypeError):
        return "", ""


def _score(job: _Job) -> str:
    """The main number of a finished evaluation, such as `linear 78.6`."""
    if job.state != "done":
        return ""
    try:
        metrics = json.loads((job.result.folder / "metrics.json").read_text(encoding="utf-8"))
        values = [metrics[name] for name in job.columns if metrics.get(name) is not None]
        return f"{job.result.folder.name} {float(values[0]):.1f}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""


def _last_line(log: Path) -> str:
    """The last line with an error, else the last line."""
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - 65536, 0))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    lines = [line.rstrip() for line in lines if line.strip()]
    errors = [line for line in lines if "error: " in line]
    return (errors or lines or [""])[-1]


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Left-aligned columns; empty ones are omitted."""
    shown = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in shown}
    for row in rows:
        yield "  ".join(row[column].ljust(widths[column]) for column in shown).rstrip()
