"""The chain behind a number of the finished tiny experiment against the files it speaks of."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mochi.config import Experiment, parse_experiment
from mochi.errors import UserError
from mochi.provenance.fingerprint import file_digest
from mochi.report.explain import explain
from tests.project import CONFIG, ROOT, Project

MOCHI = "mochi-16-24-8"


def test_every_link_is_named_and_checked(
    tiny: Experiment,
    finished: Project,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    project = finished.copy(tmp_path_factory.mktemp("explain") / "project")
    monkeypatch.chdir(project.folder)
    results = project.folder / "results"
    lines = explain(tiny, results, MOCHI, "linear")
    text = "\n".join(lines)
    values = [
        json.loads((results / "tiny" / MOCHI / f"seed{seed}/linear/metrics.json").read_text())["top1"]
        for seed in (0, 1)
    ]
    assert lines[0].startswith(f"{MOCHI}, linear top1: {sum(values) / 2:.2f} ± ")
    assert all(f"seed {seed}: top1 {value:.2f}" in text for seed, value in enumerate(values))
    for seed in (0, 1):
        encoder = results / "tiny" / MOCHI / f"seed{seed}/pretrain/encoder.safetensors"
        assert f"encoder.safetensors sha256 {file_digest(encoder)[:16]} (as here)" in text
    # Two stages of two seeds read the data, two an encoder; each knows its code.
    assert len(re.findall(r"read \w+: .* \(as here\)", text)) == 6
    assert len(re.findall(r"code [0-9a-f]{16} \(as here\)", text)) == 4
    assert len(re.findall(r"settings [0-9a-f]{16}, seed [01]", text)) == 4
    assert len(re.findall(r"torch \d", text)) == 4

    encoder.write_bytes(b"another encoder")
    (project.folder / "data" / tiny.dataset.name / "manifest.json").unlink()
    text = "\n".join(explain(tiny, results, MOCHI, "linear"))
    assert text.count("(DIFFERS from the file here)") == 1
    assert text.count("(not here)") == 4


@pytest.mark.parametrize(
    ("method", "task", "message"),
    [
        ("mochi", "knn", "method: found 'mochi'; tiny has: random-init"),
        (MOCHI, "top1", "tiny has: linear, knn"),
    ],
)
def test_unknown_cells(tiny: Experiment, finished: Project, method: str, task: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        explain(tiny, finished.folder / "results", method, task)


def test_a_detection_set_shows_each_fine_tuning(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / CONFIG).read_text())
    content["methods"], content["seeds"] = {"moco-v2": {}}, [0]
    experiment = parse_experiment(content, CONFIG)
    name = next(iter(experiment.evaluation.detection))
    record = {
        "command": ["python", "-m", "mochi", "detect"], "settings_digest": "5" * 16, "seed": 0,
        "code_digest": "c" * 16, "git": {"commit": "a" * 40, "dirty": False}, "inputs": {},
        "versions": {"torch": "2"}, "hardware": {"gpus": ["H100"]}, "wall_seconds": 3.0,
        "energy_joules": 7200.0,
    }  # fmt: skip
    for stage in (
        "pretrain",
        "linear",
        "knn",
        *(f"detection-{each}" for each in experiment.evaluation.detection),
    ):
        folder = tmp_path / experiment.name / "moco-v2/seed0" / stage
        folder.mkdir(parents=True)
        singles = {"0": {"AP50": 40.0}, "1": {"AP50": 42.0}}
        (folder / "metrics.json").write_text(
            json.dumps({"top1": 1.0, "AP50": 41.0, "fine_tunings": singles})
        )
        (folder / "provenance.json").write_text(json.dumps(record))
    lines = explain(experiment, tmp_path, "moco-v2", f"detection-{name}")
    assert lines[0] == f"moco-v2, detection-{name} AP50: 41.00 ± 1.41 over 2"
    assert lines[1] == "seed 0: AP50 40.00 and 42.00"
    assert "commit aaaaaaaaaaaa" in lines[4]
    assert "DIFFERS from here" in lines[4]
    assert "took 3.0 s, 2.0 Wh of GPU" in lines[6]
