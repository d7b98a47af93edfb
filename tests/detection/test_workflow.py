"""Detection as a user runs it: its commands, and the jobs that Snakemake plans."""

import copy
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mochi import encoders
from mochi.config import Experiment
from mochi.encoders.files import save_encoder
from mochi.layout import Paths
from tests.commands import refused, run
from tests.detection.sets import tiny_with_detection
from tests.project import ROOT, snakemake
from tests.tiny import FILE, MOCHI


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_with_detection(methods=["random-init"])))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_detection(folder: Path, encoder_file: Path, tiny: Experiment) -> None:
    for _ in range(2):  # the second replaces scenes that are stale, including provenance.json
        done = run("scenes", "data/few-scenes", "--config", "tiny.yaml")
        assert done.returncode == 0, done.stderr
        assert "data/few-scenes train: 6 images" in done.stdout
        Path("data/few-scenes/provenance.json").write_text("{}")
    assert "makes scenes in: none" in refused("scenes", "x", "--config", str(FILE))
    options = ("--method", "random-init", "--seed", "0", "--config", "tiny.yaml")
    options += ("--encoder", str(encoder_file), "--out", "out")
    # The encoder of these tests is narrower than tiny's.
    assert "is not a resnet10 with stem half and width 8" in refused("detect", "few", *options)
    assert "set: found 'other'; tiny has: few, few-frozen" in refused("detect", "other", *options)
    apart = yaml.safe_load(Path("tiny.yaml").read_text())
    apart["evaluation"]["detection"]["few-frozen"]["training"]["together"] = False
    Path("apart.yaml").write_text(yaml.safe_dump(apart))
    others = (*options[:4], "--config", "apart.yaml")
    computed = "few-frozen is computed by: few-frozen/fine-tuning0, few-frozen/fine-tuning1"
    assert computed in refused("detect", "few-frozen/fine-tuning7", *others)
    assert "name one of these, or give --out" in refused("detect", "few-frozen", *others)
    save_encoder(encoder_file, encoders.build(tiny.encoder))
    done = run("detect", "few", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("out/metrics.json").read_text())["num_fine_tunings"] == 1
    assert not [path for path in Path("work").rglob("*") if path.is_file()]


def test_an_interrupted_change_keeps_the_finished_result(
    folder: Path, encoder_file: Path, tiny: Experiment
) -> None:
    """Change `iterations`, start, kill, change it back: the scores exist and nothing is computed."""
    save_encoder(encoder_file, encoders.build(tiny.encoder))
    assert run("scenes", "data/few-scenes", "--config", "tiny.yaml").returncode == 0
    options = ("few", "--method", "random-init", "--seed", "0", "--config", "tiny.yaml")
    options += ("--encoder", str(encoder_file), "--out", "out")
    assert run("detect", *options).returncode == 0
    before = Path("out/metrics.json").read_bytes()
    text = Path("tiny.yaml").read_text()
    changed = yaml.safe_load(text)
    changed["evaluation"]["detection"]["few"]["training"]["iterations"] = 100_000
    Path("tiny.yaml").write_text(yaml.safe_dump(changed))
    started = subprocess.Popen(
        [sys.executable, "-m", "mochi", "detect", *options], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        deadline = time.monotonic() + 240
        while not list(Path("work").glob("tiny/random-init/seed0/detection-few/*")):
            assert started.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)
    finally:
        started.kill()
        started.wait()
    assert Path("out/metrics.json").read_bytes() == before
    Path("tiny.yaml").write_text(text)
    assert "up to date" in run("detect", *options).stderr
    assert Path("out/metrics.json").read_bytes() == before


def test_the_jobs_that_snakemake_plans(folder: Path) -> None:
    """One set for random-init only; one for all three runs, with two fine-tunings each that are separate
    jobs; and a set whose fine-tunings share a job. Their scenes are made once.
    """
    experiment = tiny_with_detection(methods=["random-init"])
    sets = experiment["evaluation"]["detection"]
    sets["shared"] = copy.deepcopy(sets["few-frozen"])
    for name in ("few", "few-frozen"):
        del sets[name]["training"]["together"]
    for name in ("few-frozen", "shared"):
        sets[name]["training"] |= {"lr": [0.01, 0.02], "search_iterations": 2, "validation": 0.5}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(experiment))
    (folder / "workflow").symlink_to(ROOT / "workflow")
    options = ("--snakefile", str(ROOT / "Snakefile"), "--configfile", "tiny.yaml", "--cores", "2")
    done = snakemake(folder, *options, "--dry-run")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    output = done.stdout + done.stderr
    jobs = dict(re.findall(r"^(\w+)\s+(\d+)$", output, re.MULTILINE))
    assert jobs["scenes"] == "1"
    assert jobs["search"] == "3"
    assert jobs["detect"] == str(1 + 3 * 2 + 3)
    assert jobs["pretrain"] == "3"
    paths = Paths("tiny")
    apart = paths.evaluation(MOCHI, 1, "detection-few-frozen")
    for job in ("lr-search", "fine-tuning0", "fine-tuning1"):
        assert str(apart / job / "metrics.json") in output
    assert str(paths.evaluation(MOCHI, 1, "detection-shared") / "metrics.json") in output
    assert str(paths.evaluation(MOCHI, 0, "detection-few/fine-tuning0") / "metrics.json") not in output
