"""What a change re-runs: in the folder of the results, in a clone after `mochi adopt`, and what adopt says."""

import json
import os
import shutil

import pytest

from tests.project import CONFIG, MOCHI, Project


def clone_of(project: Project) -> None:
    """Make a copy look like a clone: no metadata of Snakemake, all files with the same time."""
    shutil.rmtree(project.folder / ".snakemake")
    for path in project.folder.rglob("*"):
        if path.is_file():
            os.utime(path, (10**9, 10**9))


NUMERIC = {"pretrain": 2, "evaluate": 4, "analyze": 2, "report": 1}
"""Jobs of the trained rows and everything after them; the untrained row is not affected."""

CHANGES = {
    "title": (CONFIG, "title: ", "title: Another, ", {"report": 1}),
    "probe": (CONFIG, "lr_drops: [3]", "lr_drops: [4]", {"evaluate": 3, "report": 1}),
    "neighbours": (CONFIG, "k: 5", "k: 4", {"evaluate": 3, "report": 1}),
    "method": (CONFIG, "num_query_synthetics: 8, warmup_epochs: 1", "num_query_synthetics: 8, warmup_epochs: 0", NUMERIC),
    "fewer rows": (CONFIG, "seeds: [0, 1]}", "seeds: [0]}", {"report": 1}),
    "data": (CONFIG, "train_per_photo: ", "train_per_photo: 1", {"prepare": 1, **NUMERIC, "evaluate": 6, "analyze": 3}),
    "formula": ("mochi/contrast/negatives.py", "MAX_QUERY_SHARE = 0.5", "MAX_QUERY_SHARE = 0.4", NUMERIC),
    "rule": ("mochi/contrast/rules/mochi.py", "some_excluded=some_excluded", "some_excluded=True", NUMERIC),
    "vote": ("mochi/evaluation/tasks/knn.py", "/ temperature).exp()", "/ temperature).exp() + 0", {"evaluate": 3, "report": 1}),
    "initialisation": ("mochi/encoders/resnet.py", '"fan_out"', '"fan_in"', {"pretrain": 3, "evaluate": 6, "analyze": 3, "report": 1}),
    "table": ("mochi/report/tables.py", "value:+.1f", "value:+.2f", {"report": 1}),
}  # fmt: skip
"""Name -> file, text, new text, and the jobs that this makes necessary."""

WITHOUT_JOBS = {
    "comment": (CONFIG, "title:", "# a comment\ntitle:"),
    "docstring": ("mochi/contrast/loss.py", "The contrastive loss over", "A new docstring of the loss over"),
    "rule of no row": ("mochi/contrast/rules/debiased.py", "(num * positive_exp)", "(num + positive_exp)"),
    "error message": ("mochi/data/views/loading.py", "lower batch_size", "use a smaller batch_size"),
    "log message": ("mochi/pretraining/stage.py", "resumes at epoch", "continues at epoch"),
    "progress line": ("mochi/runtime/progress.py", "{clock(left)} left", "{clock(left)} to go"),
    "lock": ("mochi/runtime/locks.py", "0.2", "0.3"),
    "optional key": ("mochi/config/training.py", "    masks: Masks = []\n", "    masks: Masks = []\n    new: float = 1.0\n"),
}  # fmt: skip
"""These make none necessary; tested together."""


@pytest.fixture
def reworded(copy: Project) -> Project:
    """A copy with all changes that make no job necessary."""
    for change in WITHOUT_JOBS.values():
        copy.edit(*change)
    return copy


def test_changes_that_affect_no_number_re_run_nothing(reworded: Project) -> None:
    assert reworded.jobs() == {}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_reruns_what_depends_on_it(project: Project, change: str) -> None:
    file, old, new, expected = CHANGES[change]
    path = project.folder / file
    before = path.read_text()
    project.edit(file, old, new)
    try:
        assert project.jobs() == expected
    finally:
        path.write_text(before)


@pytest.mark.parametrize("change", ["data", "neighbours", "formula"])
def test_in_a_clone_the_same_reruns_after_adopt(reworded: Project, change: str) -> None:
    file, old, new, expected = CHANGES[change]
    reworded.edit(file, old, new)
    clone_of(reworded)
    reworded.mochi("adopt")
    assert reworded.jobs() == expected


def test_removing_provenance_json_computes_the_result_again(copy: Project) -> None:
    """As the message of an up-to-date job says; the same happens in a clone without the results of runs."""
    (copy.folder / f"results/tiny/evaluations/{MOCHI}/seed0/knn/provenance.json").unlink()
    assert copy.jobs() == {"evaluate": 1, "report": 1}
    shutil.rmtree(copy.folder / "results/tiny/encoders")
    shutil.rmtree(copy.folder / "results/tiny/evaluations")
    assert copy.jobs() == {"pretrain": 3, "evaluate": 6, "analyze": 3, "report": 1}


def test_adopt_lists_what_will_be_computed_and_why(copy: Project) -> None:
    clone_of(copy)
    copy.edit(CONFIG, "k: 5", "k: 4")
    evaluations = copy.folder / "results/tiny/evaluations" / MOCHI
    (evaluations / "seed0/linear/metrics.json").write_text('{"top1": 99.0}')
    (evaluations / "seed1/linear/provenance.json").write_text("{")
    shutil.rmtree(copy.folder / "results/tiny/encoders/random-init")
    # Other package versions are shown and re-run nothing.
    record = copy.folder / f"results/tiny/encoders/{MOCHI}/seed0/provenance.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "versions": {**content["versions"], "torch": "1.4.0"}}))
    output = copy.mochi("adopt")
    for line in (
        f"to compute: {MOCHI} seed 0 knn: settings: protocol.k 5 -> 4",
        f"to compute: {MOCHI} seed 0 linear: results/tiny/evaluations/{MOCHI}/seed0/linear/metrics.json is not",
        f"to compute: {MOCHI} seed 1 linear: results/tiny/evaluations/{MOCHI}/seed1/linear/provenance.json cannot",
        "to compute: random-init seed 0 pretrain: missing",
        "to compute: random-init seed 0 linear: input: results/tiny/encoders/random-init/seed0/encoder",
        "tiny: 5 results are current, 9 will be computed",
        f"note: {MOCHI} seed 0 pretrain: computed with torch 1.4.0 (here ",
    ):  # fmt: skip
        assert line in output
    assert copy.jobs() == {"pretrain": 1, "evaluate": 6, "analyze": 1, "report": 1}


def test_adopt_accept_code_keeps_results_of_changed_code(copy: Project) -> None:
    copy.edit("mochi/contrast/negatives.py", "MAX_QUERY_SHARE = 0.5", "MAX_QUERY_SHARE = 0.4")
    output = copy.mochi("adopt", "--accept-code")
    assert f"accepted: {MOCHI} seed 0 pretrain: computed by other code" in output
    assert copy.jobs() == {"report": 1}
    assert copy.snakemake().returncode == 0
    assert copy.jobs() == {}
    assert "accepted by the user" in copy.mochi("explain", MOCHI, "knn")
    copy.edit("mochi/contrast/negatives.py", "MAX_QUERY_SHARE = 0.4", "MAX_QUERY_SHARE = 0.3")
    assert copy.jobs() == NUMERIC, "the user accepted other code"


def test_read_only_results_give_a_clear_error(copy: Project) -> None:
    folder = copy.folder / "results/tiny"
    copy.edit(CONFIG, "title: ", "title: Another, ")
    folder.chmod(0o500)
    # Root can write everywhere unless this capability is dropped.
    unprivileged = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    try:
        done = copy.run(*unprivileged, "python", "-m", "mochi", "report")
    finally:
        folder.chmod(0o700)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert "results/tiny" in done.stderr.split("error: ")[1]


def test_results_that_git_checked_out_are_not_mistaken_for_newer_ones(copy: Project) -> None:
    """Snakemake remembers the files of one setting, and those of another are there, as after `git checkout`."""
    copy.edit(CONFIG, "k: 5", "k: 4")
    copy.succeed("snakemake", "--cores", "1", "--touch", "--forceall")
    assert copy.jobs() == {}, "Snakemake alone does not notice"
    copy.mochi("adopt")
    assert copy.jobs() == {"evaluate": 3, "report": 1}
    metrics = f"results/tiny/evaluations/{MOCHI}/seed0/knn/metrics.json"
    assert copy.snakemake(metrics).returncode == 0
    assert json.loads((copy.folder / metrics).read_text())["k"] == 4
    assert copy.jobs() == {"evaluate": 2, "report": 1}
