"""GPU energy against a stand-in for NVIDIA's library, compiled here: what it counts, and its silence."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mochi.running.energy import gpu_joules

# A100 counts 1500 J, K80 cannot count; any other name is unknown.
SOURCE = """
#include <string.h>
typedef struct { int counts; } device;
static device a100 = {1}, k80 = {0};
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, device **found) {
  if (!strcmp(uuid, "GPU-a100")) { *found = &a100; return 0; }
  if (!strcmp(uuid, "GPU-k80")) { *found = &k80; return 0; }
  return 6;
}
int nvmlDeviceGetTotalEnergyConsumption(device *found, unsigned long long *millijoules) {
  if (!found->counts) return 3;
  *millijoules = 1500000ULL;
  return 0;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here, and without one no stand-in for the driver's library")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(SOURCE)
    built = folder / "libnvml.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(built), str(folder / "nvml.c")], check=True)
    return str(built)


@pytest.mark.parametrize(
    ("uuids", "joules"),
    [
        (["GPU-a100"], 1500.0),
        (["GPU-a100", "GPU-a100"], 3000.0),
        (["GPU-a100", "GPU-k80"], None),  # half of the truth is none
        (["GPU-other"], None),
        ([], None),
    ],
)
def test_energy(library: str, uuids: list[str], joules: float | None) -> None:
    assert gpu_joules(library, uuids) == joules


def test_without_a_driver_nothing_is_claimed(tmp_path: Path) -> None:
    assert gpu_joules(str(tmp_path / "none.so"), ["GPU-a100"]) is None
