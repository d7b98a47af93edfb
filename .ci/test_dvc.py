"""Longer scenarios with DVC: train again and go back, another experiment, `dvc exp`, damage, no git."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.project import CONFIG, Project

MOCHI = "mochi-16-24-8"
ENCODER = f"results/tiny/encoders/{MOCHI}/seed0/encoder.safetensors"
COMPUTED = "results/tiny/e*/**/*"
"""Encoders and evaluations."""

COMPUTED_AGAIN = re.compile(r"^(\S.*): computed again", re.MULTILINE)
RUNNING = re.compile(r"Running stage '(.+)'")


@pytest.fixture(scope="module")
def recorded(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("dvc")
    # No accent: `dvc exp run --temp` fails on one in .git/config, which names the origin.
    project = finished.copy(folder / "an origin")
    project.record(folder / "a store")
    return project


@pytest.fixture
def clone(recorded: Project, tmp_path: Path) -> Project:
    return recorded.clone(tmp_path / "a clone")


def has_nothing_to_do(project: Project) -> bool:
    """Neither tool has anything to do."""
    return project.jobs() == {} and project.changed_stages() == {}


def test_train_again_go_back_and_check_out_older_commits(clone: Project) -> None:
    before = clone.digests(COMPUTED)
    clone.edit(CONFIG, "  lr: 0.06", "  lr: 0.05")
    output = clone.succeed("dvc", "repro")
    assert RUNNING.findall(output) == ["encoders@tiny", "evaluations@tiny", "report@tiny"]
    assert len(COMPUTED_AGAIN.findall(output)) == 2 + 6 + 1
    assert has_nothing_to_do(clone)
    diff = json.loads(clone.run("dvc", "params", "diff", "--json").stdout)
    assert diff[CONFIG]["pretrain.lr"] == {"old": 0.06, "new": 0.05, "diff": pytest.approx(-0.01)}
    diff = json.loads(clone.run("dvc", "metrics", "diff", "--json").stdout)
    assert all(name.startswith(f"{MOCHI}.") for name in diff["results/tiny/summary.json"])
    after = clone.digests(COMPUTED)
    assert after[ENCODER] != before[ENCODER]
    clone.succeed("git", "commit", "--quiet", "--all", "--message", "A lower learning rate")

    # The edit is reverted by hand: DVC has not stored which settings belong to which encoder.
    clone.edit(CONFIG, "  lr: 0.05", "  lr: 0.06")
    output = clone.succeed("dvc", "repro")
    assert output.count("restored from DVC's cache: ") == 2 + 6
    assert COMPUTED_AGAIN.findall(output) == ["report"]
    assert "epoch 0" not in output
    assert clone.digests(COMPUTED) == before
    assert has_nothing_to_do(clone)
    assert json.loads(clone.run("dvc", "metrics", "diff", "HEAD~1", "--json").stdout) == {}

    clone.succeed("git", "reset", "--quiet", "--hard")
    for commit, results in (("HEAD", after), ("HEAD~1", before), ("main", after)):
        clone.succeed("git", "checkout", "--quiet", commit)
        clone.succeed("dvc", "checkout")
        assert "tiny: 14 results are current, 0 will be computed" in clone.mochi("adopt")
        assert clone.digests(COMPUTED) == results
        assert has_nothing_to_do(clone)


def test_a_changed_setting_without_snakemakes_metadata(clone: Project) -> None:
    """Nobody has run `mochi adopt`: Snakemake alone would find nothing to do."""
    clone.edit(CONFIG, "k: 5", "k: 4")
    output = clone.succeed("dvc", "repro")
    assert RUNNING.findall(output) == ["evaluations@tiny", "report@tiny"]
    assert set(COMPUTED_AGAIN.findall(output)) == {
        "random-init seed 0 knn", f"{MOCHI} seed 0 knn", f"{MOCHI} seed 1 knn", "report"
    }  # fmt: skip
    assert clone.changed_stages() == {}
    assert clone.jobs() == {}
    diff = json.loads(clone.run("dvc", "params", "diff", "--json").stdout)
    assert diff == {CONFIG: {"evaluation.knn.k": {"old": 5, "new": 4, "diff": -1}}}
    diff = json.loads(clone.run("dvc", "metrics", "diff", "--json").stdout)
    changed = set(diff["results/tiny/summary.json"])
    assert changed
    assert changed <= {"random-init.knn.top1", f"{MOCHI}.knn.top1"}


def test_results_that_snakemake_computed_are_stored(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "computed")
    before = project.digests(COMPUTED)
    project.succeed("git", "init", "--quiet")
    output = project.succeed("dvc", "repro")
    assert len(RUNNING.findall(output)) == 4
    assert output.count("Nothing to be done") == 4
    assert project.digests(COMPUTED) == before
    assert has_nothing_to_do(project)


def test_a_row_removed_from_the_experiment_is_removed_from_the_tables(clone: Project) -> None:
    """No encoder and no evaluation changes."""
    text = (clone.folder / CONFIG).read_text()
    (clone.folder / CONFIG).write_text(re.sub(r"  random-init: .*\n", "", text))
    output = clone.succeed("dvc", "repro")
    assert COMPUTED_AGAIN.findall(output) == ["report"]
    assert "random-init" not in (clone.folder / "results/tiny/summary.md").read_text()
    assert has_nothing_to_do(clone)


def test_another_experiment_shares_the_data(clone: Project) -> None:
    clone.mochi("adopt")
    stages = yaml.safe_load((clone.folder / "dvc.yaml").read_text())
    experiments = stages["vars"][1]["experiments"]
    experiments["other"] = {**experiments["tiny"], "config": "config/other.yaml"}
    (clone.folder / "dvc.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
    text = (clone.folder / CONFIG).read_text().replace("name: tiny", "name: other")
    # Untrained, so it is quick.
    (clone.folder / "config/other.yaml").write_text(re.sub(r"  mochi-16-24-8: .*\n", "", text))
    output = clone.succeed("dvc", "repro")
    assert RUNNING.findall(output) == ["encoders@other", "evaluations@other", "report@other"]
    assert "rule prepare" not in output
    assert has_nothing_to_do(clone)
    assert clone.jobs("--configfile", "config/other.yaml") == {}
    shown = json.loads(clone.run("dvc", "metrics", "show", "--json").stdout)[""]["data"]
    assert set(shown) == {"results/tiny/summary.json", "results/other/summary.json"}


def test_experiments_of_dvc(clone: Project) -> None:
    """In the workspace, and in a copy that DVC makes and that takes known results from the cache."""
    before = clone.digests(COMPUTED)
    known = yaml.safe_load((clone.folder / CONFIG).read_text())
    clone.succeed("dvc", "exp", "run", "--set-param", f"{CONFIG}:evaluation.knn.k=3")
    assert has_nothing_to_do(clone)
    known["evaluation"]["knn"]["k"] = 3
    assert yaml.safe_load((clone.folder / CONFIG).read_text()) == known
    changed = clone.digests(COMPUTED)
    knn = f"results/tiny/evaluations/{MOCHI}/seed0/knn/metrics.json"
    assert json.loads((clone.folder / knn).read_text())["k"] == 3

    clone.succeed("git", "reset", "--quiet", "--hard")
    clone.succeed("dvc", "checkout")
    clone.mochi("adopt")
    assert clone.digests(COMPUTED) == before
    output = clone.succeed("dvc", "exp", "run", "--temp", "--set-param", f"{CONFIG}:evaluation.knn.k=3")
    assert output.count("restored from DVC's cache: ") == 3
    assert COMPUTED_AGAIN.findall(output) == ["report"]
    assert clone.digests(COMPUTED) == before
    assert has_nothing_to_do(clone)
    name = re.findall(r"Ran experiment\(s\): (.+)", output)[0]
    clone.succeed("dvc", "exp", "apply", name)
    assert "tiny: 14 results are current, 0 will be computed" in clone.mochi("adopt")
    assert clone.digests(COMPUTED) == changed
    assert has_nothing_to_do(clone)


def test_a_corrupt_object_is_detected_and_pulled_again(clone: Project) -> None:
    encoder = clone.folder / ENCODER
    before = encoder.read_bytes()
    cache = clone.folder / ".dvc/cache/files/md5"
    stored = next(path for path in cache.rglob("*") if path.is_file() and path.read_bytes() == before)
    stored.chmod(0o644)
    stored.write_bytes(b"damaged" + before)
    encoder.unlink()
    clone.run("dvc", "checkout")
    output = clone.mochi("adopt", "--restore")
    assert f"to compute: {MOCHI} seed 0 pretrain: " in output
    encoder.unlink(missing_ok=True)
    clone.succeed("dvc", "pull")
    assert encoder.read_bytes() == before
    assert "tiny: 14 results are current, 0 will be computed" in clone.mochi("adopt")
    assert has_nothing_to_do(clone)


def test_without_git(recorded: Project, tmp_path: Path) -> None:
    """In a tarball of the project Snakemake works, and DVC too with `core.no_scm`."""
    project = recorded.copy(tmp_path / "tarball")
    shutil.rmtree(project.folder / ".git")
    shutil.rmtree(project.folder / "results/tiny/evaluations/random-init")
    project.succeed("dvc", "config", "core.no_scm", "true")
    project.succeed("dvc", "checkout", "evaluations@tiny")
    assert "tiny: 14 results are current, 0 will be computed" in project.mochi("adopt")
    assert has_nothing_to_do(project)
