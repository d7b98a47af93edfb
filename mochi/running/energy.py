"""Energy that this process's GPUs used, where the driver counts it."""

import ctypes
from collections.abc import Sequence

import torch

_LIBRARY = "libnvidia-ml.so.1"


def gpu_joules(library: str = _LIBRARY, uuids: Sequence[str] | None = None) -> float | None:
    """Joules that the GPUs used since the driver was loaded; differences of two calls are a stage's.

    A GPU counts all that runs on it, so a GPU shared with others counts theirs too.

    Args:
        library: NVIDIA's management library.
        uuids: the GPUs, `GPU-...`; by default those that this process sees.

    Returns:
        None without a GPU, a driver, or a GPU that counts (Volta and later do).
    """
    names = _visible_uuids() if uuids is None else uuids
    if not names:
        return None
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return None
    if driver.nvmlInit_v2() != 0:
        return None
    try:
        counts = [_millijoules(driver, name) for name in names]
    finally:
        driver.nvmlShutdown()
    known = [count for count in counts if count is not None]
    return sum(known) / 1000 if len(known) == len(names) else None


def _millijoules(driver: ctypes.CDLL, uuid: str) -> int | None:
    handle, energy = ctypes.c_void_p(), ctypes.c_ulonglong()
    if driver.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
        return None
    if driver.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(energy)) != 0:
        return None
    return energy.value


def _visible_uuids() -> list[str]:
    devices = range(torch.cuda.device_count())
    return [f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in devices]
