"""The class oracle: negatives of the query's own class are left out, by label.

An upper bound and not a method: labels are what such training does without. A query without a label, and a
key of unknown class, exclude nothing.

Source: Kalantidis et al. 2020, section 4 (class oracle).
Deviation: none; with MoCHi they are left out of every mix too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mochi.contrast.rules import Mask

if TYPE_CHECKING:
    from torch import Tensor

    from mochi.contrast.key_queue import KeyQueue


@dataclass(frozen=True, kw_only=True)
class ClassOracle(Mask):
    """Leave out negatives of the query's class."""

    needs: ClassVar[tuple[str, ...]] = ("labels",)

    def excluded(self, labels: Tensor, images: Tensor, queue: KeyQueue) -> Tensor:
        """Same label, and known."""
        del images
        return (labels[:, None] == queue.labels) & (labels >= 0)[:, None]
