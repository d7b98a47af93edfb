"""MoCHi: hard negative mixing for contrastive learning, from raw images to the paper's tables."""

__version__ = "0.2.0"

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mochi.contrast.key_queue import KeyQueue
    from mochi.contrast.loss import contrastive_loss
    from mochi.contrast.module import ContrastiveLoss, MoCHiLoss
    from mochi.encoders.pretrained import load_encoder

__all__ = ["ContrastiveLoss", "KeyQueue", "MoCHiLoss", "__version__", "contrastive_loss", "load_encoder"]

_MODULES = {
    "ContrastiveLoss": "mochi.contrast.module",
    "KeyQueue": "mochi.contrast.key_queue",
    "MoCHiLoss": "mochi.contrast.module",
    "contrastive_loss": "mochi.contrast.loss",
    "load_encoder": "mochi.encoders.pretrained",
}

if not TYPE_CHECKING:  # otherwise a type checker would accept every misspelt name

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used, so that the command line starts without torch."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
