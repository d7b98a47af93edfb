"""The tiny experiment with Snakemake, as a user runs it: what is computed, what is kept, what re-runs."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image

from mochi.config import load_experiment
from mochi.provenance.fingerprint import digest, file_digest
from mochi.provenance.wanted import pretrained
from tests.commands import run
from tests.project import CONFIG, Project, environment

MOCHI = "mochi-16-24-8"
ENCODER = f"results/tiny/encoders/{MOCHI}/seed0/encoder.safetensors"
QUERIES = ("--dry-run", "--lint", "--dag", "--list")


@pytest.fixture(scope="module")
def project(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return finished.copy(tmp_path_factory.mktemp("workflow") / "mochi é")


@pytest.fixture
def copy(project: Project, tmp_path: Path) -> Project:
    return project.copy(tmp_path / "copy")


def clone_of(project: Project) -> None:
    """Make a copy look like a clone: no metadata of Snakemake, all files with the same time."""
    shutil.rmtree(project.folder / ".snakemake")
    for path in project.folder.rglob("*"):
        if path.is_file():
            os.utime(path, (10**9, 10**9))


def test_all_results_exist(project: Project) -> None:
    results = project.folder / "results/tiny"
    for each in ("random-init/seed0", f"{MOCHI}/seed0", f"{MOCHI}/seed1"):
        for file in (
            "encoder.safetensors",
            "head.safetensors",
            "metrics.csv",
            "matching.csv",
            "provenance.json",
        ):
            assert (results / "encoders" / each / file).stat().st_size > 0
        for task in ("linear", "knn"):
            assert (results / "evaluations" / each / task / "metrics.json").stat().st_size > 0
    table = pd.read_csv(results / "summary.csv")
    assert {"difference", "low", "high", "published", "source"} <= set(table.columns)
    row = table[(table["method"] == MOCHI) & (table["task"] == "knn")].iloc[0]
    values = [
        json.loads((results / f"evaluations/{MOCHI}/seed{seed}/knn/metrics.json").read_text())["top1"]
        for seed in (0, 1)
    ]
    assert row["n"] == 2
    assert row["mean"] == pytest.approx(round(sum(values) / 2, 4))
    assert row["std"] == pytest.approx(pd.Series(values).std(), abs=1e-4)
    assert f"| {MOCHI} |" in (results / "summary.md").read_text()
    for name in ("accuracy", "loss", "proxy-task"):
        assert (results / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert MOCHI in (results / "report.html").read_text()
    assert not list((project.folder / "work").rglob("*")), "resume checkpoints are left behind"
    logs = project.folder / f"logs/tiny/{MOCHI}/seed0"
    assert list((logs / "tensorboard-pretrain").glob("events.*"))
    assert "epoch 1: loss" in (logs / "pretrain.log").read_text()
    assert not list(logs.glob("*.part"))


def test_a_second_run_has_nothing_to_do(project: Project) -> None:
    for path in [*project.folder.glob("data/*/*"), *project.folder.rglob("encoder.safetensors")]:
        path.touch()
    assert project.jobs() == {}, "newer files with the same content re-run nothing"


def test_queries_change_no_file(copy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if results are stale."""
    monkeypatch.chdir(copy.folder)
    monkeypatch.delenv("MOCHI_CONFIG", raising=False)
    copy.edit(CONFIG, "k: 5", "k: 4")
    copy.edit("mochi/contrast/negatives.py", "MAX_QUERY_SHARE = 0.5", "MAX_QUERY_SHARE = 0.4")
    before = copy.listing()
    outputs = {query: copy.succeed("snakemake", "--cores", "1", query) for query in QUERIES}
    for query in (["check"], ["explain", MOCHI, "knn"]):
        assert run(*query).returncode == 0
    after = copy.listing()
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    # Snakemake writes a log of each call and a cache of the files on disk; nothing else may change.
    assert {
        name for name in changed if not name.startswith((".snakemake/log/", ".snakemake/iocache/"))
    } == set()
    assert "your workflow is in a good condition" in outputs["--lint"]


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


def start(project: Project, file: str) -> subprocess.Popen[bytes]:
    """`snakemake FILE` in a process group of its own."""
    # What a shell starts in the background ignores Ctrl-C, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        ["snakemake", "--cores", "2", file], cwd=project.folder, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def end(started: subprocess.Popen[bytes], by: signal.Signals) -> None:
    os.killpg(started.pid, by)
    started.wait(timeout=60)


def expect_no_computation(project: Project, file: str, before: bytes) -> None:
    done = project.snakemake()
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    # Jobs that Snakemake starts anyway return at once.
    assert output.count(": up to date") >= 2
    assert "epoch 0" not in output
    assert (project.folder / file).read_bytes() == before
    assert project.jobs() == {}


def test_an_interrupted_pretraining_keeps_the_finished_encoder(copy: Project) -> None:
    """Change `epochs`, start, Ctrl-C, start, SIGKILL, change it back: the encoder exists, nothing is computed."""
    result = copy.folder / ENCODER
    before = result.read_bytes()
    checkpoints = copy.folder / f"work/tiny/{MOCHI}/seed0/pretrain"

    def written() -> list[int]:
        return [path.stat().st_mtime_ns for path in checkpoints.glob("*/checkpoint.safetensors")]

    copy.edit(CONFIG, "  epochs: 2", "  epochs: 2000")
    for by in (signal.SIGINT, signal.SIGKILL):
        earlier = written()
        started = start(copy, ENCODER)
        wait_for(lambda earlier=earlier: written() != earlier)
        end(started, by)
        assert result.read_bytes() == before
    copy.edit(CONFIG, "  epochs: 2000", "  epochs: 2")
    expect_no_computation(copy, ENCODER, before)


def test_an_interrupted_probe_keeps_the_finished_result(copy: Project) -> None:
    file = f"results/tiny/evaluations/{MOCHI}/seed0/linear/metrics.json"
    before = (copy.folder / file).read_bytes()
    copy.edit(CONFIG, "epochs: 5", "epochs: 500000")
    started = start(copy, file)
    wait_for(lambda: any((copy.folder / f"work/tiny/{MOCHI}/seed0/linear").glob("*")))
    end(started, signal.SIGKILL)
    assert (copy.folder / file).read_bytes() == before
    copy.edit(CONFIG, "epochs: 500000", "epochs: 5")
    expect_no_computation(copy, file, before)


def test_a_job_killed_after_its_last_write_leaves_no_checkpoint(
    copy: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result exists, its checkpoints were not removed yet: the next run computes nothing and removes them."""
    monkeypatch.chdir(copy.folder)
    result = pretrained(load_experiment(Path(CONFIG)), MOCHI, 0)
    inputs = {name: file_digest(path) for name, path in result.inputs.items()}
    job = Path(f"work/tiny/{MOCHI}/seed0/pretrain")
    leave(job / digest([result.settings, inputs]) / "previous-checkpoint.safetensors")
    leave(job / "status.json")
    of_other_settings = leave(job / "abcdef0123456789" / "checkpoint.safetensors")
    copy.mochi("pretrain", "--method", MOCHI, "--seed", "0")
    assert [path for path in job.rglob("*") if path.is_file()] == [of_other_settings]


def leave(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


def test_the_log_of_a_resumed_job_is_appended_to(copy: Project) -> None:
    copy.edit(CONFIG, "  epochs: 2", "  epochs: 20")
    started = start(copy, ENCODER)
    log = copy.folder / f"logs/tiny/{MOCHI}/seed0/pretrain.log"
    wait_for(lambda: log.exists() and "epoch 3: loss" in log.read_text())
    end(started, signal.SIGKILL)
    done = copy.snakemake(ENCODER)
    assert done.returncode == 0, done.stderr
    text = log.read_text()
    assert "resumes at epoch" in text
    assert text.count("epoch 0: loss") == 1, "the log of the first attempt is kept"
    assert "epoch 19: loss" in text


def wait_for(condition, seconds: float = 120) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.02)


def test_a_stage_that_is_up_to_date_imports_no_torch(project: Project) -> None:
    code = (
        "import sys\nfrom mochi import cli\n"
        "try: cli.main()\n"
        "except SystemExit as stop: sys.exit(stop.code or 'torch' in sys.modules)"
    )
    arguments = ["pretrain", "--method", MOCHI, "--seed", "0", "--gpus", "0"]
    done = project.run("python", "-c", code, *arguments)
    assert "up to date" in done.stderr
    assert done.returncode == 0, done.stderr


def test_an_experiment_file_may_be_renamed_and_share_its_data(copy: Project) -> None:
    (copy.folder / CONFIG).rename(copy.folder / "config/renamed.yaml")
    shutil.copy(copy.folder / "config/renamed.yaml", copy.folder / "config/other.yaml")
    copy.edit("config/other.yaml", "name: tiny", "name: other")
    assert copy.jobs("--configfile", "config/renamed.yaml") == {}
    assert "prepare" not in copy.jobs("--configfile", "config/other.yaml")


def test_added_images_make_the_data_set_stale(copy: Project) -> None:
    photos = copy.folder / "photos"
    for split, count in (("train", 24), ("val", 4)):
        for label in ("a", "b"):
            (photos / split / label).mkdir(parents=True)
            for number in range(count):
                picture = Image.new("RGB", (20, 20 + number % 3), (5 * number, 0, 0))
                picture.save(photos / split / label / f"{number}.png")
    experiment = yaml.safe_load((copy.folder / CONFIG).read_text())
    experiment["dataset"] = {"source": "folder", "name": "mine", "path": "photos"}
    (copy.folder / CONFIG).write_text(yaml.safe_dump(experiment, sort_keys=False))
    manifest = "data/mine/manifest.json"
    assert copy.snakemake(manifest).returncode == 0
    assert copy.jobs(manifest) == {}
    shutil.copy(photos / "train/a/0.png", photos / "train/b/more.png")
    assert copy.jobs(manifest) == {"prepare": 1}
    assert copy.snakemake(manifest).returncode == 0
    assert copy.jobs(manifest) == {}
    photos.rename(copy.folder / "elsewhere")
    assert copy.jobs(manifest) == {}


def test_a_mistake_gives_one_line_before_anything_runs(copy: Project) -> None:
    copy.edit(CONFIG, "queue_size:", "queue_sise:")
    done = copy.snakemake()
    assert done.returncode != 0
    assert "pretrain.queue_sise: unknown key 'queue_sise'; did you mean 'queue_size'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_job_shows_its_error_and_how_to_continue(copy: Project) -> None:
    copy.edit(CONFIG, "  lr: 0.06", "  lr: 1.0e+30")
    done = copy.snakemake(ENCODER)
    assert done.returncode != 0
    last = done.stderr.rstrip().splitlines()
    assert any("pretrain.log: error: " in line and "lr" not in line[:20] for line in last)
    assert any("run the same command to continue" in line for line in last)


def test_settings_on_the_command_line_are_refused(project: Project) -> None:
    done = project.snakemake("--config", "seeds=[7]")
    assert done.returncode != 0
    assert "copy the experiment file, change the setting and the name there" in done.stderr


@pytest.mark.parametrize(("arguments", "limit"), [((), 1), (("--resources", "gpu=2"), 2)])
def test_jobs_are_limited_to_the_visible_gpus(
    copy: Project, arguments: tuple[str, ...], limit: int
) -> None:
    """On a host that reports one GPU. `--touch` starts jobs without computing anything."""
    one_gpu = ("env", "CUDA_VISIBLE_DEVICES=0")
    output = copy.succeed(*one_gpu, "snakemake", "--cores", "16", "--touch", "--forceall", *arguments)
    assert f'gpu=Resource("gpu", {limit})' in output
