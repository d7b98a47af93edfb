"""A finished experiment of 100 runs: what it takes both tools to see that there is nothing to do."""

import json
import resource
import time
from pathlib import Path

import pytest
import yaml
from mochi.running.outdated import made_from

from mochi.config import digest, load_experiment, only_for, resolve, settings, write_run
from mochi.provenance.fingerprint import stage_digests
from mochi.report.collect import curve_files, metrics_files
from tests.project import CONFIG, Project

NUM_RUNS = 100
STAGES = {
    "pretrain": ("encoder.safetensors", "metrics.csv", "matching.csv", "provenance.json"),
    "linear": ("metrics.json", "provenance.json"),
    "knn": ("metrics.json", "provenance.json"),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Results of pretended bytes under real settings, which both tools have recorded."""
    project = Project.new(tmp_path_factory.mktemp("scale") / "project")
    content = yaml.safe_load((project.folder / CONFIG).read_text())
    content["methods"] = {"random-init": {"objective": "none"}}
    content["seeds"] = list(range(NUM_RUNS))
    (project.folder / CONFIG).write_text(yaml.safe_dump(content, sort_keys=False))
    experiment, code = load_experiment(project.folder / CONFIG), stage_digests()
    for seed in range(NUM_RUNS):
        run = resolve(experiment, "random-init", seed)
        for stage, files in STAGES.items():
            folder = project.folder / f"results/tiny/random-init/seed{seed}/{stage}"
            folder.mkdir(parents=True)
            (folder / "run.yaml").write_text(write_run(only_for(run, stage)))
            made = {"settings_digest": digest(settings(run, stage)), "code_digest": code[stage]}
            for name in files:
                values: dict[str, object] = {**made} if name == "provenance.json" else {"top1": 1.0}
                text = json.dumps(values) if name.endswith("json") else f"{seed},{stage}\n"
                (folder / name).write_text(text)
    targets = ["data/photo-patches-tiny/manifest.json", "results/tiny/code.yaml"]
    done = project.snakemake(*targets)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = project.folder / "results/tiny/tables"
    figures = project.folder / "results/tiny/figures"
    results = project.folder / "results"
    measured = metrics_files(experiment, results)
    for folder, read in (
        (tables, [*measured, project.folder / "workflow/published.csv"]),
        (figures, [*measured, *curve_files(experiment, results)]),
    ):
        folder.mkdir()
        summary = made_from(experiment.title, code[folder.name], read)
        digests = summary["files"].items()
        summary["files"] = {str(Path(path).relative_to(project.folder)): sha256 for path, sha256 in digests}
        (folder / "made_from.json").write_text(json.dumps(summary))
    for path in (tables / "summary.csv", tables / "summary.md"):
        path.write_text("method,mean\n")
    for name in ("accuracy", "training", "negatives"):
        for kind in ("png", "svg"):
            (figures / f"{name}.{kind}").write_bytes(b"picture")
    done = project.snakemake("--touch", "--forceall")
    assert done.returncode == 0, done.stderr[-3000:]
    project.record(project.folder.parent / "store")
    return project


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (["snakemake", "--dry-run"], "Nothing to be done"),
        (["dvc", "status"], "Data and pipelines are up to date."),
    ],
)
def test_nothing_to_do_is_seen_in_six_seconds(project: Project, command: list[str], answer: str) -> None:
    """In processor seconds, for which other work on the host is no excuse; the clock is printed beside."""
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
