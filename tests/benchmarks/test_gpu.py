"""The GPU benchmark at its small sizes: every table has its rows. Its numbers are not tested."""

from typing import Any

import pytest
import torch

from benchmarks import gpu
from mochi.detection.model import Detector
from mochi.runtime.precision import make_deterministic
from tests.simulated_gpu import simulated_gpu


def test_every_table_has_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu.run(torch.device("cpu"), gpu.SMALL, rounds=1, workers=0)
    rows = {title: [row["name"] for row in table["rows"]] for title, table in found.items()}
    step = rows["ResNet-50 step, 32 px"]
    assert step[0] == "moco-v2"
    assert step[-1] == "supervised step"
    assert step[1].startswith("mochi-")
    assert list(rows)[1:] == [
        "ResNet-18 step, 32 px",
        "Loss and gradient",
        "Loading from JPEG",
        "Linear probe step",
        "Detection step",
    ]
    assert all(row["seconds"][0] > 0 for table in found.values() for row in table["rows"])
    assert "of its upper bound" in capsys.readouterr().out


def test_detection_does_not_use_the_deterministic_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the stage: a deterministic RoIAlign needs terabytes at the sizes of the benchmark."""
    seen, forward = set(), Detector.forward

    def watched(*arguments: Any) -> Any:
        seen.add(torch.are_deterministic_algorithms_enabled())
        return forward(*arguments)

    monkeypatch.setattr(Detector, "forward", watched)
    with simulated_gpu():
        make_deterministic()
        gpu._detection(gpu.SMALL, torch.device("cuda", 0), rounds=1)
    assert seen == {False}
