"""Compare existing results with an experiment and tell Snakemake which are current."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mochi.config import Experiment, datasets
from mochi.data.ingest.sources.folder import current_listing
from mochi.errors import UserError
from mochi.layout import dataset
from mochi.provenance import dvc_cache
from mochi.provenance.record import other_versions
from mochi.provenance.wanted import CODE_CHANGED, Result, results
from mochi.storage.atomic import write_json

ADOPTING = "MOCHI_ADOPT"
"""Environment variable that makes the workflow take its params from provenance.json."""


def adopt(
    experiment: Experiment, config: Path, *, accept_code: bool = False, restore: bool = False
) -> list[str]:
    """Compare every result with the experiment, and mark current ones by `snakemake --touch`.

    Args:
        experiment: the experiment.
        config: its file.
        accept_code: also keep results of which only the code changed, and record it in provenance.json.
        restore: replace stale encoders and evaluations by current ones from DVC's cache, if it has them.

    Returns:
        Lines to print: what will be computed and why, what other versions computed, and a summary.

    Raises:
        UserError: Snakemake is not installed or fails, a file that no stage computes is missing, or results
            cannot be written.
    """
    if importlib.util.find_spec("snakemake") is None:
        raise UserError('snakemake: not installed; run `pip install "mochi-pipeline[workflow]"`')
    listings = {name: current_listing(each, dataset(name)) for name, each in datasets(experiment).items()}
    all_results = results(experiment, listings)
    _require_sources(all_results)
    cached = dvc_cache.versions() if restore else {}
    lines, stale = [], set[Path]()
    for result in all_results:
        reason = result.why_stale()
        if reason is not None and dvc_cache.restore(result, cached):
            reason = None
            lines.append(f"restored from DVC's cache: {result.label}")
        if reason == CODE_CHANGED and accept_code:
            _accept_code(result)
            reason = None
            lines.append(f"accepted: {result.label}: computed by other code")
        first = next((path for path in result.inputs.values() if path.parent in stale), None)
        if reason is None and first is not None:
            reason = f"its input {first} is computed first"
        if reason is not None:
            stale.add(result.folder)
            lines.append(f"to compute: {result.label}: {reason}")
        elif others := other_versions(result):
            lines.append(f"note: {result.label}: computed with {', '.join(others)}")
    _touch(config)
    current = len(all_results) - len(stale)
    return [*lines, f"{experiment.name}: {current} results are current, {len(stale)} will be computed"]


def _require_sources(all_results: Sequence[Result]) -> None:
    """Snakemake stops without saying why if a file is missing that no rule writes."""
    folders = {result.folder for result in all_results}
    for result in all_results:
        for path in result.inputs.values():
            if not path.exists() and folders.isdisjoint(path.parents):
                raise UserError(
                    f"{path}: not found; {result.label} needs it; put it there, then adopt again"
                )


def _accept_code(result: Result) -> None:
    record = json.loads(result.record.read_text(encoding="utf-8"))
    record["accepted_code"] = [*record.get("accepted_code", []), result.code_digest]
    write_json(result.record, record)


def _touch(config: Path) -> None:
    command = ["snakemake", "--touch", "--forceall", "--cores", "1"]
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", *command, "--configfile", str(config)],
        env={**os.environ, ADOPTING: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(
            "snakemake --touch failed; if its message is unclear, check that this user may write to "
            "results/:\n"
            f"{(done.stdout + done.stderr)[-2000:]}"
        )
