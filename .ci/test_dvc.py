"""Longer stories with DVC: a change through both tools, an older commit and back, a second experiment."""

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import yaml

from tests.conftest import finished  # noqa: F401 (a fixture)
from tests.project import CONFIG, Project

MOCHI = "results/tiny/mochi-16-24-8"


@pytest.fixture(scope="module")
def recorded(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:  # noqa: F811
    folder = tmp_path_factory.mktemp("record")
    project = finished.copy(folder / "origin")
    project.record(folder / "store")
    return project


@pytest.fixture
def clone(recorded: Project, tmp_path: Path) -> Project:
    return recorded.clone(tmp_path / "cløne of it")


def test_repro_brings_both_tools_up_to_date_and_history_can_be_walked(clone: Project) -> None:
    clone.edit(CONFIG, "k: 5", "k: 4")
    done = clone.run("dvc", "repro")
    assert done.returncode == 0, done.stderr
    ran = set(re.findall(r"Running stage '(\w+)[@\w/.-]*'", done.stdout))
    assert ran == {"runs", "knn", "tables", "figures", "provenance"}
    assert clone.changed_stages() == {}
    assert clone.jobs() == {}
    diff = json.loads(clone.run("dvc", "params", "diff", "--json").stdout)
    assert diff[CONFIG]["evaluation.knn.k"] == {"old": 5, "new": 4, "diff": -1}
    shown = json.loads(clone.run("dvc", "metrics", "diff", "--all", "--json").stdout)
    assert f"{MOCHI}/seed0/knn/metrics.json" in json.dumps(shown)

    clone.run("git", "commit", "--quiet", "--all", "--message", "Fewer neighbours")
    for commit in ("HEAD~1", "main"):
        assert clone.run("git", "checkout", "--quiet", commit).returncode == 0
        done = clone.run("dvc", "checkout")
        assert done.returncode == 0, done.stderr
        assert clone.jobs() == {}
        assert clone.changed_stages() == {}


def test_a_stage_costs_repro_less_than_five_seconds(clone: Project) -> None:
    """Measured on stages that compute nothing, for Snakemake finds their results complete; in processor
    seconds, for which other work on the host is no excuse."""
    stages = [f"knn@{run}" for run in ("random-init/seed0", "mochi-16-24-8/seed0", "mochi-16-24-8/seed1")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = clone.run("dvc", "repro", "--force", "--single-item", *stages)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / len(stages)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Running stage") == len(stages)
    print(f"{seconds:.2f} s a stage")
    assert seconds < 5


def test_another_experiment_stands_beside_its_results(clone: Project) -> None:
    """It shares the data set with the default experiment, whose stage keeps it."""
    other = "config/other.yaml"
    shutil.copy(clone.folder / CONFIG, clone.folder / other)
    text = (clone.folder / other).read_text().replace("name: tiny", "name: other")
    # Untrained, hence quick.
    (clone.folder / other).write_text(re.sub(r"  mochi-16-24-8: .*\n", "", text))
    done = clone.snakemake("--configfile", other)
    assert done.returncode == 0, done.stderr[-3000:]
    done = clone.run("python", "-m", "mochi", "record", "--config", other)
    assert done.returncode == 0, done.stderr
    assert clone.changed_stages() == {}
    done = clone.run("dvc", "repro", "--all-pipelines")
    assert done.returncode == 0, done.stderr
    assert "Running stage" not in done.stdout
    stages = yaml.safe_load((clone.folder / "results/other/dvc.yaml").read_text())["stages"]
    assert "prepare" not in stages
    assert stages["knn"]["wdir"] == "../.."
