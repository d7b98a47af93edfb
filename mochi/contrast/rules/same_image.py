"""Older keys of the query's own image are left out.

A queue that is long for its data set still holds keys that the same images gave in an earlier epoch: false
negatives, and among the hardest.

Source: facebookresearch/moco issue 24 describes them; davidsvy/hard-negative-mixing masks keys of one file.
Deviation: MoCo and MoCHi keep them, and so do the rows here that do not name this mask.
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
    """Leave out keys of the query's image."""

    needs: ClassVar[tuple[str, ...]] = ("images",)

    def excluded(self, labels: Tensor, images: Tensor, queue: KeyQueue) -> Tensor:
        """Same image, and known."""
        del labels
        return (images[:, None] == queue.images) & (images >= 0)[:, None]
