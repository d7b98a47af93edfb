"""The contrastive loss with its queue as one module, for a training loop of one's own.

`from mochi import MoCHiLoss`; docs/library.md shows it in use.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mochi.contrast.key_queue import KeyQueue
from mochi.contrast.loss import contrastive_loss
from mochi.contrast.negatives import Rule, Synthetics, hardest, mix_pairs, mix_with_query
from mochi.errors import UserError
from mochi.runtime.distributed import gather, rank, world_size
from mochi.runtime.seeding import generator


class MoCHiLoss(nn.Module):
    """InfoNCE of queries and keys against a queue, with MoCHi's synthetic hard negatives.

    With both numbers of synthetics at 0 it is MoCo's loss. The module has no parameters. Its state is the
    queue and, for `seed`, the number of training steps.

    Source: Kalantidis et al. 2020, eq. 1, sections 3.2 and 3.3; He et al. 2020, section 3.2.

    Args:
        queue_size: K, negatives; the queue starts with random unit vectors, the same on every rank.
        dim: C, of the embedding.
        temperature: tau.
        num_hardest: N, the hardest negatives of each query, from which synthetics are mixed.
        num_pair_synthetics: s, mixed from pairs of them.
        num_query_synthetics: s', mixed from them and the query.
        through_query: let the gradient into the query inside a query mix.
        seed: makes the draws a function of (seed, step, rank), and the first rows of the queue one of the
            seed; None: draws come from torch's global generator of the queries' device.

    Raises:
        UserError: a number is outside its range (a ValueError).
    """

    queue: KeyQueue

    def __init__(
        self,
        queue_size: int,
        dim: int,
        temperature: float,
        num_hardest: int,
        num_pair_synthetics: int,
        num_query_synthetics: int,
        *,
        through_query: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        _check_settings(
            queue_size, dim, temperature, num_hardest, num_pair_synthetics, num_query_synthetics
        )
        self.temperature = temperature
        self.num_hardest = num_hardest
        self.num_pair_synthetics = num_pair_synthetics
        self.num_query_synthetics = num_query_synthetics
        self.through_query = through_query
        self.seed = seed
        self.steps = 0
        # Not from torch's global generator, whose state may differ between ranks.
        first_rows = generator("first rows of the queue", seed or 0)
        with torch.device("cpu"):
            queue = KeyQueue(queue_size, dim, first_rows)
        self.queue = queue.to(torch.get_default_device())

    # Compiled code draws other random numbers than eager code, so torch.compile stops at the loss.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, query: Tensor, key: Tensor, enqueue: bool = True, synthesize: bool = True) -> Tensor:
        """The loss against the queue as it is; in training mode the keys then enter the queue.

        Computed in float32 even under autocast (float64 for float64 inputs). Only `query` gets a gradient.

        Args:
            query: (B, C) embeddings of one view, of any length.
            key: (B, C) embeddings of the other view, from the momentum encoder.
            enqueue: False leaves the queue alone: call `enqueue` after the step's last loss.
            synthesize: whether the warm-up without synthesis is over.

        Returns:
            () mean over this rank's queries, nats. NaN in the inputs gives NaN.

        Raises:
            UserError: inputs that do not fit each other or the queue (a ValueError).
        """
        self._check(query=query, key=key)
        enqueue = enqueue and self.training
        if enqueue:
            self._check_fits_queue(key)
        dtype = torch.promote_types(query.dtype, torch.float32)
        unit_query, unit_key = _unit(query, dtype), _unit(key.detach(), dtype)
        queue = self.queue.keys.to(dtype)
        rule = self._rule(queue) if synthesize else None
        loss = contrastive_loss(unit_query, unit_key, queue, self.temperature, rule).loss
        if enqueue:
            self._replace_oldest(unit_key)
        if self.training:
            self.steps += 1
        return loss

    @torch.no_grad()
    def enqueue(self, key: Tensor) -> None:
        """Replace the oldest keys by these, gathered from all ranks in rank order.

        Args:
            key: (B, C) embeddings, of any length; as many on every rank.

        Raises:
            UserError: keys that do not fit the queue (a ValueError).
        """
        self._check(key=key)
        self._check_fits_queue(key)
        self._replace_oldest(_unit(key, torch.promote_types(key.dtype, torch.float32)))

    def get_extra_state(self) -> Tensor:
        """The number of training steps, of which `seed` makes the draws."""
        return torch.tensor(self.steps, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from what `get_extra_state` returned."""
        self.steps = int(state)

    def extra_repr(self) -> str:
        """The settings, as the constructor takes them."""
        queue_size, dim = self.queue.keys.shape
        return (
            f"queue_size={queue_size}, dim={dim}, temperature={self.temperature}, "
            f"num_hardest={self.num_hardest}, num_pair_synthetics={self.num_pair_synthetics}, "
            f"num_query_synthetics={self.num_query_synthetics}, through_query={self.through_query}, "
            f"seed={self.seed}"
        )

    def _replace_oldest(self, unit_key: Tensor) -> None:
        keys = gather(unit_key)
        self.queue.enqueue(keys, self.queue.labels.new_full((len(keys),), -1))

    def _rule(self, queue: Tensor) -> Rule | None:
        """MoCHi's rule of negatives for this step, None for MoCo."""
        if not self.num_pair_synthetics and not self.num_query_synthetics:
            return None
        draws = self._draws(queue.device)

        def rule(similarity: Tensor) -> list[Synthetics]:
            pool = hardest(similarity, self.num_hardest)
            synthetics = []
            if self.num_pair_synthetics:
                synthetics.append(mix_pairs(queue, pool, self.num_pair_synthetics, draws))
            if self.num_query_synthetics:
                num, through = self.num_query_synthetics, self.through_query
                synthetics.append(mix_with_query(similarity, pool, num, draws, through_query=through))
            return synthetics

        return rule

    def _draws(self, device: torch.device) -> torch.Generator:
        """The random numbers of this step's mixes, as in pretraining where there is a seed."""
        if self.seed is not None:
            return generator("mix negatives", self.seed, self.steps, rank(), device=device)
        if device.type == "cpu":
            return torch.default_generator
        generators: tuple[torch.Generator, ...] = torch.get_device_module(device).default_generators
        return generators[device.index]

    def _check(self, **inputs: Tensor) -> None:
        """Compare `query` and `key` with the queue and with each other.

        Raises:
            UserError: they do not fit.
        """
        dim, device = self.queue.keys.shape[1], self.queue.keys.device
        for name, tensor in inputs.items():
            if not tensor.is_floating_point():
                raise UserError(
                    f"{name}: found {tensor.dtype}; expected embeddings of a floating-point type; "
                    "pass what the encoder and its head return"
                )
            if tensor.ndim != 2 or tensor.shape[1] != dim or not len(tensor):
                raise UserError(
                    f"{name}: found shape {tuple(tensor.shape)}; expected (batch, {dim}) with a batch of "
                    "at least 1; pass the embeddings of a batch, or set `dim` to their size"
                )
            if tensor.device != device:
                raise UserError(
                    f"{name}: found on {tensor.device}; the queue is on {device}; "
                    "move the loss to the device of the model, as in `loss.to(device)`"
                )
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        if len(set(shapes.values())) > 1:
            raise UserError(
                f"query and key: found shapes {shapes['query']} and {shapes['key']}; expected one shape; "
                "row i of both must come from the same image"
            )

    def _check_fits_queue(self, key: Tensor) -> None:
        """Compare the batch of all ranks with the queue.

        Raises:
            UserError: keys would be lost.
        """
        batch, size = len(key) * world_size(), len(self.queue.keys)
        if batch > size:
            raise UserError(
                f"queue_size: found {size}, and {batch} keys a step ({len(key)} on each of {world_size()} "
                f"ranks); expected a queue of at least a batch; raise `queue_size` or use smaller batches"
            )


def _unit(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C) -> (B, C) of length 1."""
    return F.normalize(embeddings.to(dtype), dim=-1)


def _check_settings(
    queue_size: int,
    dim: int,
    temperature: float,
    num_hardest: int,
    num_pair_synthetics: int,
    num_query_synthetics: int,
) -> None:
    """Raises UserError where a number is outside its range."""
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature: found {temperature}; expected a number above 0, such as 0.2")
    for name, value, least in (
        ("queue_size", queue_size, 1),
        ("dim", dim, 1),
        ("num_pair_synthetics", num_pair_synthetics, 0),
        ("num_query_synthetics", num_query_synthetics, 0),
    ):
        if value < least:
            raise UserError(f"{name}: found {value}; expected at least {least}")
    if not num_pair_synthetics and not num_query_synthetics:
        return
    least = 2 if num_pair_synthetics else 1
    if not least <= num_hardest <= queue_size:
        raise UserError(
            f"num_hardest: found {num_hardest}; expected {least} to {queue_size} (queue_size); synthetics "
            "are mixed from the hardest keys in the queue, and a pair from two of them"
        )
