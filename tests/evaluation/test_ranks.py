"""Two processes compared with one: they split the images and give the same metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mochi.provenance.wanted import RECORD
from tests.evaluation.ranks import evaluate_all
from tests.tiny import TINY

ROOT = Path(__file__).parents[2]
LINEAR = TINY["evaluation"]["linear"]
# Batches that cannot be halved, and a last one with a single image, so that one rank has none.
EVALUATION = {
    "image_size": 16,
    "resize": 16,
    "batch_size": 33,
    "linear": LINEAR,
    "crops": LINEAR | {"task": "linear", "min_scale": 0.2, "batch_size": 53, "epochs": 2, "lr_drops": []},
    "knn": {"k": [5, 20], "temperature": 0.07},
    "few": {"task": "few_label", "images_per_class": 2, "samples": 2},
}


def test_two_processes_give_the_metrics_of_one(
    encoder_file: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY | {"evaluation": EVALUATION}))
    arguments = [Path("tiny.yaml").resolve(), encoder_file, tiny_data]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["timeout", "-s", "KILL", "240", *command, "-m", "--", "tests.evaluation.ranks",
         *map(str, arguments), str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    evaluate_all(*arguments, tmp_path / "one")
    for task in EVALUATION.keys() - {"image_size", "resize", "batch_size"}:
        one, two = (
            json.loads((tmp_path / number / task / "metrics.json").read_text()) for number in ("one", "two")
        )
        assert two == one, task
        assert json.loads((tmp_path / "two" / task / RECORD).read_text())["world_size"] == 2
        left, right = (
            (tmp_path / number / task / "confusion.csv").read_text() for number in ("one", "two")
        )
        assert left == right
    # `crops` encodes its held-out images; the other evaluations share features.
    assert (done.stderr.count("features of train:"), done.stderr.count("features of val:")) == (2, 1)
    assert not list(Path("work").rglob("*.npy"))
