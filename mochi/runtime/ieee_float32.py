"""float32 on a GPU."""

import torch


def use_ieee_float32() -> None:
    """Compute float32 as IEEE float32 on a GPU, in every stage.

    cuDNN computes convolutions in TF32 by default, and some images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE,
    which makes cuBLAS do so too. `make_deterministic` repeats the first for those who call a stage from
    Python.
    """
    if torch.cuda.is_available():
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = "ieee"
