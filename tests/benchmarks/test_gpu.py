"""The GPU benchmark at its small sizes: every table has its rows. Its numbers are not tested."""

import pytest
import torch

from benchmarks import gpu


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
