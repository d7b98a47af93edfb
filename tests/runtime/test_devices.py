"""A requested GPU is used, or the run stops; on a host without a GPU."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mochi.errors import UserError
from mochi.runtime import launch
from mochi.runtime.distributed import pick_device
from tests.commands import refused
from tests.processes import run_ranks
from tests.tiny import FILE

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a host without a usable GPU")


@NO_GPU
def test_a_gpu_that_torch_cannot_use_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.REQUESTED_GPUS, "2")
    with pytest.raises(UserError) as error:
        pick_device()
    for words in ("2 were requested", "can use 0", f"CUDA {torch.version.cuda}", "driver is", "nvidia-smi"):
        assert words in str(error.value)


@NO_GPU
@pytest.mark.parametrize("visible", [None, "", "-1"])
def test_a_gpu_on_a_host_without_any_is_an_error(
    visible: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launch.REQUESTED_GPUS, "0")
    monkeypatch.setenv("PATH", str(tmp_path))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError) as error:
        launch.on_gpus(1)
    shown = {None: "not set", "": "empty"}.get(visible, visible)
    for words in ("can use 0", "driver is", "check `nvidia-smi`", f"CUDA_VISIBLE_DEVICES is {shown};"):
        assert words in str(error.value)


@NO_GPU
def test_the_cpu_is_used_when_it_or_no_gpu_is_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.REQUESTED_GPUS, "0")
    assert pick_device().type == "cpu"
    monkeypatch.setenv(launch.REQUESTED_GPUS, "2")
    monkeypatch.setenv("MOCHI_DEVICE", "cpu")
    assert pick_device().type == "cpu"


def pretrain_on_one_gpu(folder: Path) -> None:
    os.chdir(folder)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "0"}
    tempfile.tempdir = str(folder)  # of the locks of GPUs
    options = ("--config", str(FILE), "--method", "random-init", "--seed", "0", "--gpus", "1")
    assert "error: GPUs: 1 were requested" in refused("pretrain", *options)


@NO_GPU
def test_the_command_line_stops_before_any_compute(tmp_path: Path) -> None:
    run_ranks(pretrain_on_one_gpu, 1, tmp_path, join=False)
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").rglob("*.safetensors"))


CLAIM = """
import os, sys, time
from mochi.runtime import launch
launch.on_gpus(1)
sys.stdout.write(os.environ["CUDA_VISIBLE_DEVICES"])
sys.stdout.flush()
time.sleep(3)
"""


@pytest.mark.parametrize(("visible", "shared"), [("0,1", True), ("1", False)])
def test_runs_inside_one_slurm_allocation_take_different_gpus(
    tmp_path: Path, visible: str, shared: bool
) -> None:
    """A job with exactly the GPUs that it requests takes them; several runs in one allocation share its
    GPUs.
    """
    environment = {
        **os.environ, "SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": visible, "TMPDIR": str(tmp_path)
    }  # fmt: skip
    command = [sys.executable, "-c", CLAIM]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    taken = sorted(process.communicate(timeout=60)[0] for process in started)
    assert taken == (["0", "1"] if shared else ["1", "1"])
