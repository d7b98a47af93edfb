"""Number formats and determinism, the same for every stage."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def use_bfloat16(device: torch.device, precision: str) -> bool:
    """Whether to compute in bfloat16: as requested; `auto` does if the hardware supports it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bfloat16, or no autocast. Losses disable it: logits and softmax are float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16(device, precision))


def make_deterministic(deterministic: bool = True) -> None:
    """The same bytes from the same seed: on a GPU this chooses deterministic kernels.

    Otherwise cuDNN times its kernels and uses the fastest: results differ in their last digits from run to
    run. In both cases float32 is IEEE float32; cuDNN's default would compute convolutions in TF32.
    """
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        # Nothing reads uninitialised memory here, and filling it writes every activation twice.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def any_order() -> Iterator[None]:
    """Allow kernels that write in any order, for writes to distinct rows. Deterministic ones sort first."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(mode=False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=True, warn_only=warn_only)
