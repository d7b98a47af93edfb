"""Start one process, torchrun on several GPUs, or srun on several nodes from one command."""

import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence

from mochi.errors import UserError
from mochi.runtime import gpus

REQUESTED_GPUS = "MOCHI_REQUESTED_GPUS"
"""Environment variable: the requested GPUs of this host, so that a missing one is an error."""


def on_gpus(count: int, nodes: int = 1) -> None:
    """Claim `count` GPUs for this process; with several, become torchrun with the same command.

    Call it before CUDA is first used. Inside torchrun it does nothing. If the scheduler has given
    the job as many GPUs as requested, they are used; otherwise, also if several runs share a Slurm
    allocation, the process waits for them and claims them by locks. 0 hides all GPUs.

    Args:
        count: total number of GPUs.
        nodes: hosts to spread them over, evenly; more than one needs Slurm.

    Raises:
        UserError: the host has fewer GPUs, or they cannot be divided over the nodes, or are MIG instances.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    command = torchrun(count, nodes, sys.argv[1:], os.environ)
    local = count // nodes
    os.environ[REQUESTED_GPUS] = str(local)
    if count == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        names = gpus.visible()
        if not names:
            from mochi.runtime.distributed import check_gpus  # noqa: PLC0415 (torch, which takes seconds)

            check_gpus(local)
        elif local > 1:
            names = _whole(names)
        # On several nodes Slurm has given each its GPUs; their names differ from node to node.
        if nodes == 1 and names and ("SLURM_JOB_ID" not in os.environ or len(names) > local):
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus.claim(local, names))
    if command:
        os.execvp(command[0], command)  # noqa: S606


def _whole(names: Sequence[str]) -> list[str]:
    """The names of whole GPUs. Ranks cannot share MIG instances: CUDA shows a process a single one.

    Raises:
        UserError: all are MIG instances.
    """
    whole = [name for name in names if not name.startswith("MIG-")]
    if not whole:
        raise UserError(
            f"--gpus: found {len(names)} MIG instances; expected whole GPUs, because CUDA shows a process "
            "a single instance; use --gpus 1, or switch MIG off"
        )
    return whole


def torchrun(count: int, nodes: int, arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The command that runs `python -m mochi ARGUMENTS` on `count` GPUs; empty if one process is enough.

    Raises:
        UserError: see `on_gpus`.
    """
    if count < 0 or nodes < 1:
        raise UserError(f"gpus, nodes: found {count}, {nodes}; expected gpus >= 0 and nodes >= 1")
    if count == 0 or count == nodes == 1:
        return []
    if count % nodes:
        raise UserError(
            f"gpus: found {count}; {nodes} nodes cannot share them evenly; use a multiple of {nodes}"
        )
    # `--` before the module: otherwise torchrun may read an option of ours as the beginning of its own.
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count // nodes}"]
    if nodes == 1:
        # Picks a free port, so that concurrent runs do not collide; needs no resolvable host name.
        return [*launcher, "--standalone", "--local-addr=localhost", "-m", "--", "mochi", *arguments]
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        raise UserError(f"nodes: found {nodes} outside a Slurm job; several nodes need the Slurm profile")
    # Several runs may share the allocation, so each uses a separate port and rendezvous id.
    per_node = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    name, endpoint = f"{job}-{secrets.token_hex(4)}", f"{socket.gethostname()}:{_free_port()}"
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-id={name}", f"--rdzv-endpoint={endpoint}"]
    return ["srun", *per_node, *launcher, f"--nnodes={nodes}", *rendezvous, "-m", "--", "mochi", *arguments]


def _free_port() -> int:
    """A free port of this host; the kernel gives the next caller a different one."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
