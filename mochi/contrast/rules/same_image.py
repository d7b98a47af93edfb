"""Exclude older keys of the query's own image.

A queue that is large for its data set contains keys of the same images from earlier epochs: false
negatives, and among the hardest.

Source: facebookresearch/moco issue 24 describes them; davidsvy/hard-negative-mixing masks keys of one file.
Deviation: MoCo and MoCHi keep them, as do rows that do not select this mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mochi.contrast.rules import Mask

if TYPE_CHECKING:
    from torch import Tensor

    from mochi.contrast.key_queue import KeyQueue


@dataclass(frozen=True, kw_only=True)
class SameImage(Mask):
    """Exclude keys of the query's image."""

    needs: ClassVar[tuple[str, ...]] = ("images",)

    def excluded(self, labels: Tensor, images: Tensor, queue: KeyQueue) -> Tensor:
        """Negatives of the same, known image."""
        del labels
        return (images[:, None] == queue.images) & (images >= 0)[:, None]
