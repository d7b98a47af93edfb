"""DVC and Snakemake on the finished tiny experiment: what is tracked, what a clone has, what re-runs.

`.ci/test_dvc.py` has the scenarios that train encoders.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mochi.stages import STAGES
from tests.project import CONFIG, ENCODER, MOCHI, ROOT, Project

COMPUTED = "results/tiny/e*/**/*"
"""Encoders and evaluations."""


@pytest.fixture(scope="module")
def recorded(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The finished experiment in git and DVC, pushed."""
    folder = tmp_path_factory.mktemp("dvc")
    project = finished.copy(folder / "origin é")
    project.record(folder / "a store")
    return project


@pytest.fixture(scope="module")
def pulled(recorded: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """What another user has after `git clone` and `dvc pull`. Copy it before you change anything."""
    return recorded.clone(tmp_path_factory.mktemp("pulled") / "a clone")


@pytest.fixture
def clone(pulled: Project, tmp_path: Path) -> Project:
    return pulled.copy(tmp_path / "a clone")


@pytest.fixture
def embedded(tmp_path: Path) -> Project:
    """The project as committed, without results."""
    project = Project.new(tmp_path / "embedded")
    for name in ("dvc.yaml", ".gitignore", CONFIG):
        shutil.copy(ROOT / name, project.folder / name)
    project.succeed("git", "init", "--quiet")
    return project


def resolved(project: Project) -> dict[str, Any]:
    """Stage -> its dependencies, and its outputs with (cached, persistent), as DVC resolves them."""
    with project.repository() as dvc:
        return {
            stage.addressing: {
                "reads": [dep.def_path for dep in stage.deps],
                "writes": {out.def_path: [out.use_cache, out.persist] for out in stage.outs},
            }
            for stage in dvc.index.stages
        }


def is_inside(path: str, folders: list[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def test_every_output_is_stored_by_dvc_or_by_git(embedded: Project) -> None:
    """By exactly one of them, the one that the stages declare."""
    table = embedded.run("snakemake", "--cores", "1", "--summary").stdout
    outputs = [line.split("\t")[0] for line in table.splitlines()[1:]]
    assert len(outputs) > 80
    writes = {path: how for stage in resolved(embedded).values() for path, how in stage["writes"].items()}
    assert all(persists for _, persists in writes.values())
    cached = [path for path, (is_cached, _) in writes.items() if is_cached]
    results = "results/embedded"
    assert cached == [
        "data/photo-patches", "data/photo-scenes", f"{results}/encoders", f"{results}/evaluations"
    ]  # fmt: skip
    in_git = embedded.run("git", "check-ignore", "--non-matching", "--verbose", *outputs).stdout
    assert {line.split("\t")[1] for line in in_git.splitlines() if line.startswith("::\t")} == {
        path for path in outputs if not is_inside(path, cached)
    }
    assert {path for path, (is_cached, _) in writes.items() if not is_cached} <= set(outputs)
    shown = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]
    assert set(shown) <= set(outputs)


def test_the_stages_read_what_the_rules_read(embedded: Project) -> None:
    stages = resolved(embedded)
    encoders, evaluations, report = (
        stages[f"{name}@embedded"]["reads"] for name in ("encoders", "evaluations", "report")
    )
    assert "data/photo-patches/manifest.json" in encoders
    assert {"data/photo-patches/manifest.json", "results/embedded/encoders"} <= set(evaluations)
    results = {"results/embedded/encoders", "results/embedded/evaluations"}
    assert results | {CONFIG, "workflow/published.csv"} <= set(report)
    readers = {
        "prepare": "data@photo-patches",
        "scenes": "data@photo-scenes",
        "pretrain": "encoders@embedded",
    }
    for name, stage in STAGES.items():
        task = "report@embedded" if name == "report" else "evaluations@embedded"
        for module in stage.numbers:
            path = module.replace(".", "/")
            assert is_inside(path, stages[readers.get(name, task)]["reads"]), f"{name} reads {module}"


def test_the_pipeline_and_its_lock_are_short(embedded: Project) -> None:
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 80
    for stage in resolved(embedded).values():
        for path in stage["writes"]:
            target = embedded.folder / path
            if Path(path).suffix:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text("{}")
            else:
                target.mkdir(parents=True)
                (target / "manifest.json").write_text("{}")
    embedded.succeed("dvc", "commit", "--force", "--quiet")
    assert len((embedded.folder / "dvc.lock").read_text().splitlines()) <= 400


def test_a_clone_has_nothing_to_compute(clone: Project) -> None:
    assert "tiny: 14 results are current, 0 will be computed" in clone.mochi("adopt")
    assert clone.jobs() == {}
    assert clone.changed_stages() == {}
    output = clone.succeed("dvc", "repro")
    assert output.count("didn't change, skipping") == 4
    assert "Running stage" not in output
    assert clone.run("git", "status", "--porcelain").stdout == ""


def test_lost_results_are_restored_from_the_cache(clone: Project) -> None:
    before = clone.digests(COMPUTED)
    shutil.rmtree(clone.folder / "results/tiny/encoders")
    assert list(clone.changed_stages()) == ["encoders@tiny", "evaluations@tiny", "report@tiny"]
    clone.succeed("dvc", "checkout")
    assert clone.digests(COMPUTED) == before
    # One by one, as other stages have changed.
    shutil.rmtree(clone.folder / f"results/tiny/encoders/{MOCHI}/seed1")
    (clone.folder / f"results/tiny/evaluations/{MOCHI}/seed0/knn/metrics.json").write_text("{}")
    output = clone.mochi("adopt", "--restore")
    assert set(re.findall("restored from DVC's cache: (.+)", output)) == {
        f"{MOCHI} seed 1 pretrain", f"{MOCHI} seed 0 knn"
    }  # fmt: skip
    assert clone.digests(COMPUTED) == before
    assert clone.jobs() == {}
    assert clone.changed_stages() == {}


def test_metrics_and_plots(clone: Project, tmp_path: Path) -> None:
    shown = json.loads(clone.run("dvc", "metrics", "show", "--json").stdout)
    metrics = shown[""]["data"]["results/tiny/summary.json"]["data"]
    assert set(metrics) == {"random-init", MOCHI}
    for row in metrics.values():
        assert set(row) == {"linear", "knn"}
        assert all(0 <= value <= 100 for task in row.values() for value in task.values())
    clone.edit("results/tiny/curves.csv", f"{MOCHI},0,1,", f"{MOCHI},0,9,")
    for command in (["show"], ["diff", "HEAD"]):
        page = tmp_path / command[0]
        clone.succeed("dvc", "plots", *command, "--out", str(page))
        text = (page / "index.html").read_text()
        assert '"color": {"field": "method"' in text
        assert '"epoch": "9", ' in text
        pictures = [path.name for path in (page / "static").iterdir()]
        revisions = ["workspace"] if command == ["show"] else ["HEAD", "workspace"]
        assert sorted(pictures) == sorted(
            f"{revision}_results_tiny_figures_{name}.png"
            for revision in revisions
            for name in ("accuracy", "loss", "proxy-task")
        )


def test_a_clone_without_pull_says_what_is_missing(recorded: Project, tmp_path: Path) -> None:
    """And `mochi explain` still works."""
    clone = recorded.clone(tmp_path / "git only", pull=False)
    output = clone.mochi("adopt")
    for line in (
        "to compute: data set photo-patches-tiny: missing",
        f"to compute: {MOCHI} seed 1 pretrain: missing",
        "to compute: random-init seed 0 knn: missing",
        "tiny: 0 results are current, 14 will be computed",
    ):
        assert line in output
    assert clone.jobs() == {"prepare": 1, "pretrain": 3, "evaluate": 6, "analyze": 3, "report": 1}
    output = clone.mochi("explain", MOCHI, "knn")
    assert "knn top1: " in output
    assert f"{ENCODER} sha256 " in output
    assert "(not found)" in output
    assert clone.run("git", "status", "--porcelain").stdout == ""
    clone.succeed("dvc", "pull")
    assert "tiny: 14 results are current, 0 will be computed" in clone.mochi("adopt")
    assert clone.jobs() == {}


ROW = "warmup_epochs: 1}, seeds: [0, 1]}"
CHANGES = {
    "comment": (CONFIG, "title:", "# a comment\ntitle:", {"report"}),
    "title": (CONFIG, "title: ", "title: Another, ", {"report"}),
    "neighbours": (CONFIG, "k: 5", "k: 4", {"evaluations", "report"}),
    "recipe": (CONFIG, "lr: 0.06", "lr: 0.05", {"encoders", "report"}),
    "fewer seeds": (CONFIG, ROW, ROW.replace(", 1]", "]"), {"encoders", "report"}),
    "data": (CONFIG, "train_per_photo: ", "train_per_photo: 1", {"data", "report"}),
    "formula": ("mochi/contrast/negatives.py", "0.5", "0.4", {"encoders", "evaluations"}),
    "table": ("mochi/report/tables.py", "value:+.1f", "value:+.2f", {"encoders", "evaluations", "report"}),
    "published": ("workflow/published.csv", "experiment,", "experiment ,", {"report"}),
}


def test_the_stages_that_a_change_makes_stale(clone: Project) -> None:
    """tests/test_reruns.py tests the jobs. DVC notices later stages once the earlier ones have run."""
    for change, (file, old, new, expected) in CHANGES.items():
        path = clone.folder / file
        before = path.read_text()
        clone.edit(file, old, new)
        with clone.repository() as dvc:
            assert {name.split("@")[0] for name in dvc.status()} == expected, change
        path.write_text(before)


def test_another_experiment_is_one_more_line(clone: Project) -> None:
    """It shares the prepared data; .ci/test_dvc.py runs it."""
    stages = yaml.safe_load((clone.folder / "dvc.yaml").read_text())
    experiments = stages["vars"][1]["experiments"]
    experiments["other"] = {**experiments["tiny"], "config": "config/other.yaml"}
    (clone.folder / "dvc.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
    text = (clone.folder / CONFIG).read_text().replace("name: tiny", "name: other")
    (clone.folder / "config/other.yaml").write_text(text)
    assert set(clone.changed_stages()) == {"encoders@other", "evaluations@other", "report@other"}
    assert set(resolved(clone)["encoders@other"]["writes"]) == {"results/other/encoders"}
