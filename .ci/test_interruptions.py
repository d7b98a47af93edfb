"""Jobs that are interrupted or killed: finished results are kept, nothing finished is computed again."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mochi.config import load_experiment
from mochi.provenance.fingerprint import digest, file_digest
from mochi.provenance.wanted import pretrained
from tests.project import CONFIG, ENCODER, MOCHI, Project, environment

METRICS = f"results/tiny/evaluations/{MOCHI}/seed0/linear/metrics.json"


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


def test_an_interrupted_job_keeps_the_finished_result(copy: Project) -> None:
    """Change `epochs`, start, Ctrl-C, start, SIGKILL, change it back: nothing is lost or computed again."""
    before = {file: (copy.folder / file).read_bytes() for file in (ENCODER, METRICS)}
    for file, setting, changed, pattern in (
        (ENCODER, "  epochs: 2", "  epochs: 2000", "pretrain/*/checkpoint.safetensors"),
        (METRICS, "epochs: 5", "epochs: 500000", "linear/*"),
    ):
        copy.edit(CONFIG, setting, changed)
        for by in (signal.SIGINT, signal.SIGKILL) if file == ENCODER else (signal.SIGKILL,):
            earlier = written(copy, pattern)
            started = start(copy, file)
            wait_for(lambda pattern=pattern, earlier=earlier: written(copy, pattern) != earlier)
            end(started, by)
        copy.edit(CONFIG, changed, setting)
    assert {file: (copy.folder / file).read_bytes() for file in before} == before
    done = copy.snakemake()
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    # Jobs that Snakemake starts anyway return at once.
    assert output.count(": up to date") >= 2
    assert "epoch 0" not in output
    assert {file: (copy.folder / file).read_bytes() for file in before} == before
    assert copy.jobs() == {}


def written(project: Project, pattern: str) -> list[int]:
    """Modification times of files that match a pattern in the work folder of one run."""
    return [path.stat().st_mtime_ns for path in (project.folder / f"work/tiny/{MOCHI}/seed0").glob(pattern)]


@pytest.mark.parametrize("command", [("pretrain", "--method", MOCHI, "--seed", "0"), ("adopt",)])
def test_a_job_killed_after_its_last_write_leaves_no_checkpoint(
    copy: Project, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """Its result exists: the next run only removes what is left. After `adopt` there is no next run."""
    monkeypatch.chdir(copy.folder)
    result = pretrained(load_experiment(Path(CONFIG)), MOCHI, 0)
    inputs = {name: file_digest(path) for name, path in result.inputs.items()}
    job = Path(f"work/tiny/{MOCHI}/seed0/pretrain")
    leave(job / digest([result.settings, inputs]) / "previous-checkpoint.safetensors")
    leave(job / "status.json")
    of_other_settings = leave(job / "abcdef0123456789" / "checkpoint.safetensors")
    copy.mochi(*command)
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
