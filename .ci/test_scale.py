"""A finished experiment of 100 runs: how long both tools take to find that there is nothing to do."""

import json
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mochi.config import load_experiment
from mochi.provenance.record import Stopwatch, write_record
from mochi.provenance.wanted import RECORD, Result, results
from tests.project import CONFIG, Project

NUM_RUNS = 100


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Results with made-up bytes and true provenance, known to both tools."""
    project = Project.new(tmp_path_factory.mktemp("scale") / "project")
    content = yaml.safe_load((project.folder / CONFIG).read_text())
    content["methods"] = {"random-init": {"objective": "none"}}
    content["seeds"] = list(range(NUM_RUNS))
    (project.folder / CONFIG).write_text(yaml.safe_dump(content, sort_keys=False))
    project.succeed("snakemake", "--cores", "2", "data")
    for result in results(load_experiment(project.folder / CONFIG))[1:]:
        make_up(result, project.folder)
    output = project.mochi("adopt")
    assert f"tiny: {4 * NUM_RUNS + 2} results are current, 0 will be computed" in output
    project.record(project.folder.parent / "store")
    return project


def make_up(result: Result, root: Path) -> None:
    """Write files with some content, and the provenance that a stage would write."""
    folder = root / result.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in result.outputs:
        text = json.dumps({"top1": 1.0}) if name.endswith("json") else f"{result.label},{name}\n"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    inputs = {name: root / path for name, path in result.inputs.items()}
    write_record(folder, replace(result, inputs=inputs), Stopwatch())
    text = (folder / RECORD).read_text().replace(f"{root}/", "")
    (folder / RECORD).write_text(text)


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (["snakemake", "--dry-run"], "Nothing to be done"),
        (["dvc", "status"], "Data and pipelines are up to date."),
    ],
)
def test_nothing_to_do_is_found_in_six_seconds(project: Project, command: list[str], answer: str) -> None:
    """In CPU seconds, which other load on the host changes little; wall seconds are printed too."""
    clock, spent = [], []
    for _ in range(3):
        before, begin = _processor_seconds(), time.monotonic()
        done = project.run(*command)
        clock.append(time.monotonic() - begin)
        spent.append(_processor_seconds() - before)
        assert answer in done.stdout + done.stderr
    for what, seconds in (("processor", spent), ("clock", clock)):
        print(f"{' '.join(command)}, {NUM_RUNS} runs, {what}: {[round(each, 1) for each in seconds]} s")
    assert min(spent) < 6


def _processor_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
