"""The queue of keys (MoCo section 3.2): the newest K keys, oldest replaced first."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeyQueue(nn.Module):
    """A ring of `size` unit keys that takes batches of any size, exactly first-in first-out.

    Rows that no batch has replaced yet are random unit vectors, as in MoCo. Everything is a persistent
    buffer, so a checkpoint of the module is a checkpoint of the queue.

    Source: facebookresearch/moco moco/builder.py (`queue`, `_dequeue_and_enqueue`).
    Deviation: a key is a row, not a column; the size need not be a multiple of the batch. The class and the
    image of each key are kept for masks and for measuring false negatives, never for the loss of MoCHi.
    """

    keys: Tensor
    labels: Tensor
    images: Tensor
    position: Tensor
    num_enqueued: Tensor

    def __init__(self, size: int, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.register_buffer(
            "keys", F.normalize(torch.randn(size, dim, generator=generator), dim=-1)
        )  # (K, C)
        self.register_buffer("labels", torch.full((size,), -1))  # (K,); -1: unknown
        self.register_buffer("images", torch.full((size,), -1))  # (K,); -1: unknown
        self.register_buffer("position", torch.zeros((), dtype=torch.long))  # next row to replace
        self.register_buffer("num_enqueued", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None = None, images: Tensor | None = None) -> None:
        """Replace the oldest rows.

        Args:
            keys: (B, C) unit keys, the same on every rank. If there are more than K, only the last K are
                stored.
            labels: (B,) their classes, -1 where unknown; None: all unknown.
            images: (B,) indices of their images, likewise.
        """
        size, batch = len(self.keys), len(keys)
        rows = (self.position + torch.arange(batch, device=keys.device)) % size
        self.keys[rows[-size:]] = keys[-size:].to(self.keys.dtype)
        for column, values in ((self.labels, labels), (self.images, images)):
            column[rows[-size:]] = -1 if values is None else values[-size:]
        self.position.copy_((self.position + batch) % size)
        self.num_enqueued.add_(batch)

    def fill(self) -> float:
        """The fraction of rows that are real keys, 0 to 1."""
        return min(self.num_enqueued.item() / len(self.keys), 1.0)
