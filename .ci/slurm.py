"""A real Slurm on this host, for tests: two nodes of two processors and two pretended GPUs each.

Needs root and Debian's slurm-wlm and munge. `/etc/slurm` is written, for other places do not reach the
jobs, and emptied at the end: a configuration without a controller delays every Snakemake by 10 s.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NODES = ("node1", "node2")

_CONFIG = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
KillWait=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
{nodes}
PartitionName=gpu Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""
_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=8000 Gres=gpu:2"
)
# Any device file passes for a GPU: Slurm hands out numbers and never opens it.
_GPUS = "NodeName=node1,node2 Name=gpu File=/dev/null\nNodeName=node1,node2 Name=gpu File=/dev/zero\n"


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Start munge, the controller and the nodes; stop them and cancel all jobs at the end."""
    host = socket.gethostname()
    (folder / "state").mkdir(parents=True)
    etc = Path("/etc/slurm")
    etc.mkdir(exist_ok=True)
    if (etc / "slurm.conf").exists():
        raise RuntimeError("this host has a Slurm of its own (/etc/slurm/slurm.conf); it is left alone")
    ports = range(17001, 17001 + len(NODES))
    nodes = [_NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports, strict=True)]
    (etc / "slurm.conf").write_text(_CONFIG.format(host=host, folder=folder, nodes="\n".join(nodes)))
    (etc / "gres.conf").write_text(_GPUS)
    (etc / "cgroup.conf").write_text("CgroupAutomount=no\n")
    _start_munge()
    try:
        subprocess.run(["slurmctld"], check=True)
        for name in NODES:
            subprocess.run(["slurmd", "-N", name], check=True)
        _wait_until_idle()
        yield
    finally:
        subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], check=False)
        for name in ("slurmctld", *NODES):
            _stop(folder / f"{name}.pid")
        for name in ("slurm.conf", "gres.conf", "cgroup.conf"):
            (etc / name).unlink()


def _start_munge() -> None:
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        return
    for name in ("/run/munge", "/var/log/munge", "/var/lib/munge", "/etc/munge"):
        Path(name).mkdir(exist_ok=True)
        shutil.chown(name, "munge", "munge")
    shutil.chown("/etc/munge/munge.key", "munge", "munge")
    subprocess.run(["runuser", "-u", "munge", "--", "/usr/sbin/munged"], check=True)


def _wait_until_idle() -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        shown = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=False)
        if shown.stdout.split() == ["idle"]:
            return
        time.sleep(0.5)
    raise RuntimeError(f"Slurm's nodes did not come up: {shown.stdout}{shown.stderr}")


def _stop(pid_file: Path) -> None:
    if pid_file.exists():
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
