"""The contrastive loss and its queue as one module, for your own training loop.

`from mochi import ContrastiveLoss, MoCHiLoss`; docs/library.md shows them in use.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mochi.contrast import rules
from mochi.contrast.key_queue import KeyQueue
from mochi.contrast.loss import contrastive_loss
from mochi.contrast.rules import Mask, Rule, at_least, check_type, exclude
from mochi.contrast.rules.moco import MoCo as MoCoRule
from mochi.errors import UserError, guess
from mochi.runtime.distributed import gather, rank, world_size
from mochi.runtime.seeding import generator

_Part = TypeVar("_Part", Rule, Mask)


class ContrastiveLoss(nn.Module):
    """The loss of queries and keys against a queue, by any rule of negatives.

    The module has no parameters. Its state is the queue and, for `seed`, the number of training steps.

    Source: He et al. 2020, section 3.2; each rule names its own.

    Args:
        queue_size: K, negatives; the queue starts with random unit vectors, the same on every rank.
        dim: C, of the embedding.
        temperature: tau.
        rule: how much each negative counts: a name (`moco`, `mochi`, `debiased`, `hard_weighting`,
            `decoupled`, `synco`, or a file of your own in mochi/contrast/rules/), or a `Rule`.
        masks: negatives to exclude, names or `Mask` objects: `class_oracle` needs labels in each call,
            `same_image` images.
        seed: makes the random numbers a function of (seed, step, rank), and the initial queue a function
            of the seed; None: they come from torch's global generator of the queries' device.
        **settings: of the rule, if it is given by name.

    Raises:
        UserError: no such rule, or a setting of another type or outside its range (a ValueError).
    """

    queue: KeyQueue

    def __init__(
        self,
        queue_size: int,
        dim: int,
        temperature: float,
        rule: str | Rule = "moco",
        *,
        masks: Sequence[str | Mask] = (),
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if settings and isinstance(rule, Rule):
            raise UserError(
                f"{', '.join(settings)}: found with a Rule object; set it in the object, or give the "
                "rule's name"
            )
        if isinstance(masks, str) or not isinstance(masks, Sequence):
            raise UserError(f"masks: found {masks!r}; expected a list of names, as in ['same_image']")
        try:
            check_type("queue_size", queue_size, int)
            check_type("dim", dim, int)
            check_type("temperature", temperature, float)
            check_type("seed", 0 if seed is None else seed, int)
            at_least(1, queue_size=queue_size, dim=dim)
            if not 0 < temperature < math.inf:
                raise UserError(f"temperature: found {temperature}; expected a number above 0, such as 0.2")
            self.rule = rule if isinstance(rule, Rule) else _build("rule", rule, Rule, settings)
            self.rule.check(queue_size)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.masks = [mask if isinstance(mask, Mask) else _build("masks", mask, Mask, {}) for mask in masks]
        self.temperature = temperature
        self.seed = seed
        self.steps = 0
        # Not from torch's global generator, whose state may differ between ranks.
        first_rows = generator("first rows of the queue", seed or 0)
        with torch.device("cpu"):
            queue = KeyQueue(queue_size, dim, first_rows)
        self.queue = queue.to(torch.get_default_device())

    # Compiled code draws other random numbers than eager code, so torch.compile breaks its graph here.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        enqueue: bool = True,
        synthesize: bool = True,
        *,
        labels: Tensor | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss against the current queue; in training mode, enqueue the keys afterwards.

        Computed in float32 even under autocast (float64 for float64 inputs). Only `query` gets a gradient.

        Args:
            query: (B, C) embeddings of one view, not yet normalised.
            key: (B, C) embeddings of the other view, from the momentum encoder, likewise.
            enqueue: False leaves the queue unchanged: call `enqueue` after the last loss of the step.
            synthesize: False: MoCo's loss, as in a rule's warm-up (`rule.is_active(epoch)`).
            labels: (B,) classes of the images, -1 where unknown, for `class_oracle`.
            images: (B,) indices of the images, -1 where unknown, for `same_image`.

        Returns:
            () mean over this rank's queries, nats. NaN in the inputs gives NaN. Its backward pass raises a
            UserError with `create_graph=True`: there is no second derivative.

        Raises:
            UserError: the inputs do not fit each other or the queue (a ValueError).
        """
        self._check(query=query, key=key)
        identities = self._identities(key, labels, images)
        enqueue = enqueue and self.training
        if enqueue:
            self._check_fits_queue(key)
        dtype = torch.promote_types(query.dtype, torch.float32)
        unit_query, unit_key = _unit(query, dtype), _unit(key.detach(), dtype)
        queue = self.queue.keys.to(dtype)
        rule = self.rule if synthesize else MoCoRule()
        excluded = exclude(self.masks, *identities, self.queue)
        rng = self._rng(queue.device)
        loss = contrastive_loss(unit_query, unit_key, queue, self.temperature, rule, excluded, rng).loss
        if enqueue:
            self._replace_oldest(unit_key, *identities)
        if self.training:
            self.steps += 1
        if loss.requires_grad:
            loss.register_hook(_refuse_second_derivative)
        return loss

    @torch.no_grad()
    def enqueue(self, key: Tensor, labels: Tensor | None = None, images: Tensor | None = None) -> None:
        """Replace the oldest keys with these, gathered from all ranks in rank order.

        Args:
            key: (B, C) embeddings, not yet normalised; the same number on every rank.
            labels: (B,) their classes, -1 where unknown.
            images: (B,) indices of their images, -1 where unknown.

        Raises:
            UserError: the keys do not fit the queue (a ValueError).
        """
        self._check(key=key)
        self._check_fits_queue(key)
        identities = self._identities(key, labels, images)
        self._replace_oldest(_unit(key, torch.promote_types(key.dtype, torch.float32)), *identities)

    def get_extra_state(self) -> Tensor:
        """Return the number of training steps, which the random numbers depend on if there is a `seed`."""
        return torch.tensor(self.steps, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        self.steps = int(state)

    def extra_repr(self) -> str:
        """The settings."""
        queue_size, dim = self.queue.keys.shape
        masks = f"masks={self.masks}, " if self.masks else ""
        return (
            f"queue_size={queue_size}, dim={dim}, temperature={self.temperature}, rule={self.rule}, "
            f"{masks}seed={self.seed}"
        )

    def _replace_oldest(self, unit_key: Tensor, labels: Tensor, images: Tensor) -> None:
        self.queue.enqueue(gather(unit_key), *gather(torch.stack((labels, images), 1)).unbind(1))

    def _rng(self, device: torch.device) -> torch.Generator | None:
        """The generator of this step's synthetics, the same as in pretraining if there is a seed."""
        if self.seed is None:
            return None
        return generator("mix negatives", self.seed, self.steps, rank(), device=device)

    def _identities(
        self, key: Tensor, labels: Tensor | None, images: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B,) labels and (B,) images on the queue's device, -1 where unknown.

        Raises:
            UserError: they do not fit the keys, or a mask needs what is not given.
        """
        found = []
        for name, values in (("labels", labels), ("images", images)):
            if values is None:
                if any(name in mask.needs for mask in self.masks):
                    raise UserError(f"{name}: missing; a mask in {self.masks} needs them: pass `{name}=`")
                found.append(self.queue.labels.new_full((len(key),), -1))
                continue
            if (
                not isinstance(values, Tensor)
                or values.shape != key.shape[:1]
                or values.is_floating_point()
                or values.dtype == torch.bool
            ):
                raise UserError(
                    f"{name}: found {_type_and_shape(values)}; expected integers of shape ({len(key)},) "
                    "as a tensor, one for each key, -1 where unknown"
                )
            found.append(values.to(self.queue.labels))
        return found[0], found[1]

    def _check(self, **inputs: Tensor) -> None:
        """Check that `query` and `key` fit the queue and each other.

        Raises:
            UserError: they do not fit.
        """
        dim, device = self.queue.keys.shape[1], self.queue.keys.device
        for name, tensor in inputs.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise UserError(
                    f"{name}: found {found}; expected embeddings of a floating-point type; "
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
        """Check that the batch of all ranks fits into the queue.

        Raises:
            UserError: keys would be lost.
        """
        batch, size = len(key) * world_size(), len(self.queue.keys)
        if batch > size:
            ranks = f" ({len(key)} on each of {world_size()} ranks)" if world_size() > 1 else ""
            raise UserError(
                f"queue_size: found {size}, but a step has {batch} keys{ranks}; expected a queue of at "
                "least one batch; raise `queue_size` or use smaller batches"
            )


def _type_and_shape(values: object) -> str:
    """What was found, for a message."""
    if isinstance(values, Tensor):
        return f"{values.dtype} of shape {tuple(values.shape)}"
    return type(values).__name__


def _refuse_second_derivative(_gradient: Tensor) -> None:
    """Raise an error: autograd would treat the gradient, computed in the forward pass, as a constant."""
    if torch.is_grad_enabled():
        raise UserError(
            "create_graph: found True; expected False: this loss has a first derivative only; compute "
            "gradient penalties from another loss"
        )


def _unit(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C) -> (B, C) of length 1."""
    return F.normalize(embeddings.to(dtype), dim=-1)


def _build(key: str, name: str, kind: type[_Part], settings: Mapping[str, Any]) -> _Part:
    """The rule or mask with a name.

    Raises:
        UserError: it does not exist, or a setting is unknown or missing.
    """
    if not isinstance(name, str):
        raise UserError(
            f"{key}: found {name!r}; expected a name, one of {', '.join(rules.names_of(kind))}, or a "
            f"{kind.__name__} object"
        )
    found = rules.find(name) if name in rules.names() else None
    if found is None or not issubclass(found, kind):
        raise UserError(f"{key}: {guess(name, rules.names_of(kind))}")
    fields = {field.name: field for field in dataclasses.fields(found)}
    for setting in settings:
        if setting not in fields:
            raise UserError(f"{setting}: no setting of {name}; {guess(setting, fields)}")
    missing = [
        each
        for each, field in fields.items()
        if field.default is dataclasses.MISSING and each not in settings
    ]
    if missing:
        raise UserError(f"{', '.join(missing)}: missing; the rule {name} needs a value")
    return found(**settings)


class MoCHiLoss(ContrastiveLoss):
    """InfoNCE of queries and keys against a queue, with MoCHi's synthetic hard negatives.

    With both numbers of synthetics at 0 it is MoCo's loss. See `ContrastiveLoss`.

    Source: Kalantidis et al. 2020, eq. 1, sections 3.2 and 3.3; He et al. 2020, section 3.2.

    Args:
        queue_size: K, negatives.
        dim: C, of the embedding.
        temperature: tau.
        num_hardest: N, the hardest negatives of each query, from which synthetics are mixed.
        num_pair_synthetics: s, mixed from pairs of these.
        num_query_synthetics: s', mixed from one of these and the query.
        through_query: let the gradient flow through the query inside a query mix.
        masks: see `ContrastiveLoss`.
        seed: see `ContrastiveLoss`.

    Raises:
        UserError: a number is of another type or outside its range (a ValueError).
    """

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
        masks: Sequence[str | Mask] = (),
        seed: int | None = None,
    ) -> None:
        settings: dict[str, Any] = {}
        if (num_pair_synthetics, num_query_synthetics) != (0, 0):
            settings = {
                "num_hardest": num_hardest,
                "num_pair_synthetics": num_pair_synthetics,
                "num_query_synthetics": num_query_synthetics,
                "through_query": through_query,
            }
        rule = "mochi" if settings else "moco"
        super().__init__(queue_size, dim, temperature, rule, masks=masks, seed=seed, **settings)
