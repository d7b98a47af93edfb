"""The experiment as DVC stages against the workflow: the same files, the same edges, the same reruns.

Both tools look at one finished experiment, in clones that get it by `git clone` and `dvc pull` alone.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from mochi.config import load_experiment
from tests.project import CONFIG, ROOT, Project

MOCHI = "results/tiny/mochi-16-24-8"


@pytest.fixture(scope="module")
def recorded(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("record")
    project = finished.copy(folder / "origin")
    project.record(folder / "store")
    return project


@pytest.fixture
def clone(recorded: Project, tmp_path: Path) -> Project:
    return recorded.clone(tmp_path / "cløne of it")


def test_a_fresh_clone_has_nothing_to_compute(clone: Project) -> None:
    assert clone.jobs() == {}
    assert clone.changed_stages() == {}
    assert clone.run("git", "status", "--porcelain").stdout == ""


# Resolved by DVC itself: stage -> what it reads and writes.
RESOLVE = """
import json, sys
from dvc.repo import Repo
stages = {
    stage.addressing: {
        "reads": [dep.def_path for dep in stage.deps],
        "writes": [out.def_path for out in stage.outs],
    }
    for stage in Repo().index.stages
}
sys.stdout.write(json.dumps(stages))
"""
WRITE = """
from mochi import record
from mochi.config import load_experiment
record.write(record.place(experiment := load_experiment(record.DEFAULT_CONFIG), record.DEFAULT_CONFIG),
             record.pipeline(experiment, record.DEFAULT_CONFIG))
"""


@pytest.mark.parametrize("config", ["tests/tiny.yaml", "config/config.yaml"])
def test_both_graphs_have_the_same_files_and_edges(config: str, tmp_path: Path) -> None:
    project = Project.new(tmp_path / "project")
    shutil.copy(ROOT / config, project.folder / CONFIG)
    name = load_experiment(ROOT / config).name
    project.run("git", "init", "--quiet")
    assert project.run("python", "-c", WRITE).returncode == 0
    stages = json.loads(project.run("python", "-c", RESOLVE).stdout)
    shown = project.snakemake("--dry-run", "--forceall").stdout
    jobs = [
        tuple(
            [
                path
                for line in re.findall(rf"^    {key}: (.+)$", job, re.MULTILINE)
                for path in line.split(", ")
            ]
            for key in ("input", "output")
        )
        for job in re.split(r"\n(?=\[|rule |localrule )", shown)
        if re.match(r"(local)?rule (?!all)", job)
    ]
    edges = {(source, target) for sources, targets in jobs for source in sources for target in targets}
    outputs = {target for _, targets in jobs for target in targets}
    assert len(outputs) > 40

    provenance = stages.pop("provenance")
    assert provenance["writes"] == [".snakemake/metadata"]
    writer = {path: stage for stage in stages.values() for path in stage["writes"]}
    # A data set is a folder to DVC, and to Snakemake the file that is written last.
    folders = {str(Path(target).parent): target for target in outputs if target.startswith("data/")}
    assert {folders.get(path, path) for path in writer} == outputs

    def reads_of(target: str) -> set[str]:
        stage = writer.get(target) or writer[str(Path(target).parent)]
        return set(stage["reads"])

    # Where a rule has no other input, the published numbers lend it a date.
    edges = {
        (source, target)
        for source, target in edges
        if source != "workflow/published.csv" or "/tables/" in target
    }
    for source, target in edges:
        assert source in reads_of(target), f"DVC lacks the edge {source} -> {target}"
    for target in outputs:
        sources = {source for source, goal in edges if goal == target}
        # Snakemake sees code and settings as params of each rule.
        extra = reads_of(target) - sources - {"mochi", f"results/{name}/code.yaml", CONFIG}
        assert not extra, f"DVC has edges of its own to {target}: {extra}"


@pytest.mark.parametrize(
    ("file", "old", "new", "jobs", "stages"),
    [
        (CONFIG, "title:", "# a comment\ntitle:", {}, set()),
        (
            CONFIG, "k: 5", "k: 4",
            {"resolve": 3, "evaluate": 3, "tables": 1, "figures": 1}, {"runs"},
        ),
        ("mochi/contrast/loss.py", "\n\n\n", "\n\n\n# a comment\n", {}, {"code"}),
        (
            "mochi/evaluation/knn.py", "/ temperature).exp()", "/ temperature).exp() + 0",
            {"code": 1, "evaluate": 3, "tables": 1, "figures": 1}, {"code"},
        ),
    ],
    ids=["comment", "setting", "comment in code", "formula"],
)  # fmt: skip
def test_a_change_is_seen_by_both_tools(
    clone: Project, file: str, old: str, new: str, jobs: dict[str, int], stages: set[str]
) -> None:
    path = clone.folder / file
    path.write_text(path.read_text().replace(old, new, 1))
    assert clone.jobs() == jobs
    assert set(clone.changed_stages()) == stages
    if stages:
        # DVC learns what is downstream when the first stage has run: the settings, the code's digests.
        done = clone.run("dvc", "repro", *stages)
        assert done.returncode == 0, done.stderr
        runs = ("random-init/seed0", "mochi-16-24-8/seed0", "mochi-16-24-8/seed1")
        expected = {*(f"knn@{run}" for run in runs), "provenance"} if jobs else set()
        assert set(clone.changed_stages()) == expected


def test_newer_files_of_the_same_bytes_are_no_reason(clone: Project) -> None:
    for path in clone.folder.rglob("*"):
        if ".git" not in path.parts and ".dvc" not in path.parts and path.is_file():
            path.touch()
    assert clone.jobs() == {}
    assert clone.changed_stages() == {}


def test_a_deleted_encoder_comes_back_from_the_cache(clone: Project) -> None:
    encoder = clone.folder / MOCHI / "seed0/pretrain/encoder.safetensors"
    before = encoder.read_bytes()
    encoder.unlink()
    assert clone.jobs() == {}, "the tables are complete without it"
    assert set(clone.changed_stages()) == {
        "pretrain@mochi-16-24-8/seed0", "linear@mochi-16-24-8/seed0", "knn@mochi-16-24-8/seed0"
    }  # fmt: skip
    assert clone.run("dvc", "checkout").returncode == 0
    assert encoder.read_bytes() == before
    assert clone.jobs() == {}


def test_a_corrupted_cache_object_is_pulled_again(clone: Project) -> None:
    """`dvc checkout` hands a damaged object out; both tools then name it, and a pull mends it."""
    encoder = clone.folder / MOCHI / "seed0/pretrain/encoder.safetensors"
    before = encoder.read_bytes()
    stage = "pretrain@mochi-16-24-8/seed0"
    outs = yaml.safe_load((clone.folder / "dvc.lock").read_text())["stages"][stage]["outs"]
    digest = next(out["md5"] for out in outs if out["path"].endswith("encoder.safetensors"))
    cached = clone.folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    cached.chmod(0o644)
    cached.write_bytes(b"damaged" + before)
    encoder.unlink()
    assert clone.run("dvc", "checkout").returncode == 0
    assert encoder.read_bytes() != before
    assert str(encoder.relative_to(clone.folder)) in json.dumps(clone.changed_stages()[stage])
    assert clone.jobs()["evaluate"] == 2
    encoder.unlink()
    assert clone.run("dvc", "pull").returncode == 0
    assert encoder.read_bytes() == before
    assert clone.jobs() == {}
    assert clone.changed_stages() == {}


def test_an_unfinished_experiment_is_not_recorded(clone: Project) -> None:
    clone.edit(CONFIG, "k: 5", "k: 4")
    done = clone.run("python", "-m", "mochi", "record")
    assert done.returncode == 1
    assert "tiny: found results missing or out of date" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_tarball_without_git_computes_all_the_same(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "tarball")
    assert project.jobs() == {}
    (project.folder / MOCHI / "seed0/knn/metrics.json").unlink()
    done = project.snakemake()
    assert done.returncode == 0, done.stderr
    provenance = json.loads((project.folder / MOCHI / "seed0/knn/provenance.json").read_text())
    assert provenance["git"] is None
