"""The class oracle: exclude negatives of the query's class, by label.

An upper bound, not a method: it uses labels, which self-supervised training does not have. For a query
without a label nothing is excluded; a key without a label is never excluded.

Source: Kalantidis et al. 2020, section 4 (class oracle).
Deviation: none; with MoCHi they are also excluded from every mix.
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
    """Exclude negatives of the query's class."""

    needs: ClassVar[tuple[str, ...]] = ("labels",)

    def excluded(self, labels: Tensor, images: Tensor, queue: KeyQueue) -> Tensor:
        """Negatives with the same, known label."""
        del images
        return (labels[:, None] == queue.labels) & (labels >= 0)[:, None]
