"""A real Slurm on this host, for tests: two nodes of two CPUs and two simulated GPUs each.

Needs root and Debian's slurm-wlm and munge. The configuration is written to `/etc/slurm`, as jobs read no
other place, and removed at the end: a configuration without a running controller delays every Snakemake by
10 s. Leftovers of a killed run are removed by the next one; a second run at the same time waits.
"""

import fcntl
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NODES = ("node1", "node2")

_ETC = Path("/etc/slurm")
_LOCK = Path("/run/lock/mochi-tests-slurm")
_DAEMONS = "slurm.*d"  # slurmctld, slurmd, slurmstepd, slurmscriptd
_MARK = "# Written by MoCHi's tests; they remove it."
_CONFIG = """\
{mark}
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
# Any device file can stand for a GPU: Slurm assigns numbers and never opens it.
_GPUS = "NodeName=node1,node2 Name=gpu File=/dev/null\nNodeName=node1,node2 Name=gpu File=/dev/zero\n"


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Start munge, the controller and the nodes; at the end, cancel all jobs and stop them.

    Raises:     RuntimeError: the host has its own Slurm, or the nodes do not start.
    """
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel however this process ends
        config = _ETC / "slurm.conf"
        if config.exists():
            if not config.read_text().startswith(_MARK):
                raise RuntimeError(f"this host has a Slurm of its own ({config}); it is left alone")
            _clear()
        _write_config(folder)
        try:
            _start_munge()
            subprocess.run(["slurmctld"], check=True)
            for name in NODES:
                subprocess.run(["slurmd", "-N", name], check=True)
            _wait_until_idle()
            yield
        finally:
            _clear()


def _write_config(folder: Path) -> None:
    (folder / "state").mkdir(parents=True)
    _ETC.mkdir(exist_ok=True)
    host = socket.gethostname()
    ports = range(17001, 17001 + len(NODES))
    nodes = [_NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports, strict=True)]
    (_ETC / "slurm.conf").write_text(
        _CONFIG.format(mark=_MARK, host=host, folder=folder, nodes="\n".join(nodes))
    )
    (_ETC / "gres.conf").write_text(_GPUS)
    (_ETC / "cgroup.conf").write_text("CgroupAutomount=no\n")


def _clear() -> None:
    """Stop all jobs and daemons and remove our files. The configuration, which identifies them, is
    removed last.
    """
    cancel = ["scancel", "--full", "--signal=KILL", "--user=root"]
    with suppress(subprocess.TimeoutExpired):  # does not answer if only the controller was killed
        subprocess.run(cancel, check=False, timeout=15)
    for signal, seconds in (("TERM", 20), ("KILL", 5)):
        subprocess.run(["pkill", f"-{signal}", "-x", _DAEMONS], check=False)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and _any_daemon():
            time.sleep(0.2)
    for name in ("cgroup.conf", "gres.conf", "slurm.conf"):
        (_ETC / name).unlink(missing_ok=True)


def _any_daemon() -> bool:
    return subprocess.run(["pgrep", "-x", _DAEMONS], stdout=subprocess.DEVNULL, check=False).returncode == 0


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
