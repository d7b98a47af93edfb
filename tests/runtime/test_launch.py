"""The command for a request of GPUs, compared with the documentation of torchrun and srun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mochi.errors import UserError
from mochi.runtime import launch

ARGUMENTS = ["pretrain", "--run", "run.yaml"]


@pytest.mark.parametrize(("count", "nodes"), [(0, 1), (1, 1), (0, 4)])
def test_one_process_does_not_use_torchrun(count: int, nodes: int) -> None:
    assert launch.torchrun(count, nodes, ARGUMENTS, {}) == []


def test_several_gpus_of_a_host_use_torchrun() -> None:
    command = launch.torchrun(4, 1, ARGUMENTS, {})
    assert command[1:] == [
        "-m", "torch.distributed.run", "--nproc-per-node=4", "--standalone",
        "--local-addr=localhost", "-m", "--", "mochi", *ARGUMENTS,
    ]  # fmt: skip


def test_several_nodes_connect_to_the_first_one() -> None:
    command = launch.torchrun(8, 2, ARGUMENTS, {"SLURM_JOB_ID": "71"})
    assert command[:4] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert "--nproc-per-node=4" in command
    assert "--nnodes=2" in command
    assert any(part.startswith("--rdzv-id=71-") for part in command)
    assert command[-3:] == ARGUMENTS


def test_runs_of_one_allocation_use_different_ports() -> None:
    several = [launch.torchrun(8, 2, ARGUMENTS, {"SLURM_JOB_ID": "71"}) for _ in range(20)]
    for option, least in (("--rdzv-id=", 20), ("--rdzv-endpoint=", 2)):
        found = {part for command in several for part in command if part.startswith(option)}
        assert len(found) >= least, option


@pytest.mark.parametrize(
    ("count", "nodes", "environment", "message"),
    [
        (3, 2, {"SLURM_JOB_ID": "1"}, "2 nodes cannot share them evenly"),
        (2, 2, {}, "outside a Slurm job"),
        (-1, 1, {}, "expected gpus >= 0"),
        (1, 0, {}, "nodes >= 1"),
    ],
)
def test_impossible_requests_are_refused(
    count: int, nodes: int, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        launch.torchrun(count, nodes, ARGUMENTS, environment)


@pytest.mark.parametrize(
    ("names", "count", "expected"),
    [
        (["MIG-a", "MIG-b"], 1, "MIG-a"),
        (["MIG-a", "GPU-b", "GPU-c"], 2, "GPU-b,GPU-c"),
        (["MIG-a", "MIG-b"], 2, "--gpus: found 2 MIG instances; expected whole GPUs"),
        (["MIG-a", "GPU-b"], 2, "GPUs: found 1 on this host (GPU-b); 2 are requested"),
    ],
)
def test_a_run_on_several_gpus_takes_no_mig_instances(
    names: list[str], count: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "unchanged")
    monkeypatch.setenv(launch.REQUESTED_GPUS, "0")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(launch.gpus, "visible", lambda: names)
    monkeypatch.setattr(launch.os, "execvp", lambda *_: None)
    if ":" in expected:
        with pytest.raises(UserError, match=re.escape(expected)):
            launch.on_gpus(count)
    else:
        launch.on_gpus(count)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_gpus_of_one_node_are_not_claimed_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun passes CUDA_VISIBLE_DEVICES on, and a UUID of this node is unknown on the others."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv(launch.REQUESTED_GPUS, "0")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(launch.gpus, "visible", lambda: ["GPU-a", "GPU-b", "GPU-c", "GPU-d"])
    started: list[str] = []
    monkeypatch.setattr(launch.os, "execvp", lambda name, _: started.append(name))
    launch.on_gpus(4, nodes=2)
    assert started == ["srun"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert os.environ[launch.REQUESTED_GPUS] == "2"


SHOW = """
import os, sys
from mochi.runtime import launch
launch.on_gpus(int(sys.argv[1]))
sys.stdout.write(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
"""


@pytest.mark.parametrize(
    ("count", "extra", "expected"),
    [
        ("0", {"CUDA_VISIBLE_DEVICES": "5"}, ""),
        ("1", {"CUDA_VISIBLE_DEVICES": "5"}, "5"),
        # One run in an allocation that several share; torchrun has already chosen the GPU.
        ("1", {"CUDA_VISIBLE_DEVICES": "5,6", "SLURM_JOB_ID": "1"}, "5"),
        ("2", {"CUDA_VISIBLE_DEVICES": "5,6", "TORCHELASTIC_RUN_ID": "x"}, "5,6"),
    ],
)
def test_the_environment_of_a_process(
    tmp_path: Path, count: str, extra: dict[str, str], expected: str
) -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "CUDA"))}
    environment = {**kept, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path.cwd()), **extra}
    done = subprocess.run(
        [sys.executable, "-c", SHOW, count], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout == expected


def test_several_gpus_become_torchrun_ranks_with_the_same_command(tmp_path: Path) -> None:
    """The package is replaced by a script that prints its rank and arguments; torchrun is real."""
    package = tmp_path / "mochi"
    package.mkdir()
    here = Path("mochi").resolve()
    (package / "__init__.py").write_text(f"__path__.append({str(here)!r})\n")
    (package / "__main__.py").write_text(
        "import os, sys\n"
        "from mochi.runtime import launch\n"
        "launch.on_gpus(2)\n"
        "from pathlib import Path\n"
        "out = Path(sys.argv[2]) / os.environ['RANK']\n"
        "out.write_text(os.environ['WORLD_SIZE'] + os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    environment = {**kept, "CUDA_VISIBLE_DEVICES": "7,8", "TMPDIR": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-m", "mochi", "--run", str(tmp_path)],
        env=environment, cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["27,8", "27,8"]
