"""Rules of negatives: how much each negative of a query counts. Each is a file, selected by its name.

A file contains one subclass of `Rule` or of `Mask`: a frozen dataclass, whose fields are the settings and
whose methods are the mathematics. Experiments select it by the name of its file; no registration is needed.

Commands that read experiment files must start without torch: the files here import it only for types, or
inside their methods.

Shapes: B queries, K queue rows, C embedding, S synthetics of one kind.
"""

from __future__ import annotations

import numbers
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mochi.contrast.key_queue import KeyQueue
    from mochi.contrast.negatives import Synthetics


class Candidates(NamedTuple):
    """What synthetic negatives are mixed from."""

    query: Tensor  # (B, C) unit queries
    similarity: Tensor  # (B, K) to the queue, -inf where a mask excludes
    queue: Tensor  # (K, C) unit keys
    some_excluded: bool  # whether there is a mask
    generator: torch.Generator | None  # the only source of randomness; None: torch's global one


class Similarities(NamedTuple):
    """The inputs of a fused rule."""

    positive: Tensor  # (B,) q.k
    negatives: list[Tensor]  # (B, K) to the queue, then (B, S) to each kind of synthetic; -inf: excluded
    hardest: Tensor  # (B,) the largest of the negatives
    num_negatives: Tensor | int  # (B,) how many of them no mask excludes


class Weights(NamedTuple):
    """The result of a fused rule: the loss, and its derivatives with respect to the similarities.

    The derivatives are multiplied by the temperature and by `divisor`; `contrastive_loss` divides by both.
    """

    loss: Tensor  # (B,) nats
    positive: Tensor  # (B,) that of q.k; those of the negatives replace their similarities in place
    divisor: Tensor  # (B,) such as the denominator of the softmax


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How much each negative counts. A subclass needs only `loss`."""

    warmup_epochs: int = 0
    """Initial epochs that train with MoCo's loss instead."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            check_type(setting.name, getattr(self, setting.name), setting.type)
        at_least(0, warmup_epochs=self.warmup_epochs)

    def loss(self, positive: Tensor, similarity: Tensor, temperature: float) -> Tensor:
        """The loss of each query, in torch; autograd differentiates it.

        Called with a few queries at a time: the loss of one must not depend on the others.

        Args:
            positive: (B,) q.k.
            similarity: (B, K + S) q.n, then q.h of the synthetics; -inf where a mask excludes.
            temperature: tau.

        Returns:
            (B,) nats.
        """
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def fused(self, similarities: Similarities, temperature: float) -> Weights:
        """Optional: `loss` and its derivatives, which replace the similarities of negatives in place.

        Needs no second (B, K) buffer and no autograd. Tests compare it with `loss`.
        """
        raise NotImplementedError(f"{type(self).__name__}.fused")

    @property
    def is_fused(self) -> bool:
        """Whether `fused` matches `loss`: it does not in a subclass that replaces only `loss`."""
        owner = next(each for each in type(self).__mro__ if {"loss", "fused"} & vars(each).keys())
        return owner is not Rule and "fused" in vars(owner)

    @property
    def num_synthetics(self) -> int:
        """How many synthetic negatives it adds for each query."""
        return 0

    @property
    def makes_vectors(self) -> bool:
        """Whether synthetics are vectors, so that few queries at a time save memory on a GPU too."""
        return False

    def synthetics(self, candidates: Candidates) -> list[Synthetics]:
        """The synthetic negatives to add, one entry for each kind; called with a few queries at a time."""
        del candidates
        return []

    def is_active(self, epoch: int) -> bool:
        """Whether the warm-up is over."""
        return epoch >= self.warmup_epochs

    def check(self, queue_size: int) -> None:
        """Compare the settings with the queue.

        Raises:
            ValueError: they do not fit; its text is `setting: found ...; expected ...`.
        """

    def measure(self, positive: Tensor, similarity: Tensor, temperature: float) -> Mapping[str, Tensor]:
        """Additional columns of metrics.csv, measured on one batch per epoch.

        Args:
            positive: (B,) q.k.
            similarity: (B, K) q.n, -inf where a mask excludes.
            temperature: tau.

        Returns:
            Name of the column -> () or (B,), whose mean is written.
        """
        del positive, similarity, temperature
        return {}


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Negatives to exclude from the loss and from every mix. Masks combine with any rule."""

    needs: ClassVar[tuple[str, ...]]
    """What it needs to know about the images: `labels`, `images`."""

    def excluded(self, labels: Tensor, images: Tensor, queue: KeyQueue) -> Tensor:
        """Which negatives are excluded.

        Args:
            labels: (B,) classes of the queries, -1 where unknown.
            images: (B,) indices of their images, -1 where unknown.
            queue: the negatives with their labels and images.

        Returns:
            (B, K) bool.
        """
        raise NotImplementedError(f"{type(self).__name__}.excluded")


def names() -> list[str]:
    """Every rule and mask, by the name of its file."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> type[Rule | Mask]:
    """The class in the file of that name.

    Raises:
        ValueError: the file does not contain exactly one rule or mask.
    """
    module = import_module(f"{__name__}.{name}")
    own = [each for each in vars(module).values() if getattr(each, "__module__", "") == module.__name__]
    found = [each for each in own if isinstance(each, type) and issubclass(each, Rule | Mask)]
    if len(found) != 1:
        listed = ", ".join(each.__name__ for each in found) or "none"
        raise ValueError(f"{module.__file__}: found {listed}; expected one subclass of Rule or of Mask")
    return found[0]


def names_of(kind: type[Rule | Mask]) -> list[str]:
    """The names of all rules, or of all masks."""
    return [name for name in names() if issubclass(find(name), kind)]


def modules(*parts: Rule | Mask) -> tuple[str, ...]:
    """The files that define these, including the classes they inherit from."""
    files = {kind.__module__ for part in parts for kind in type(part).__mro__}
    return tuple(sorted(name for name in files if name.startswith(f"{__name__}.")))


def exclude(masks: Sequence[Mask], labels: Tensor, images: Tensor, queue: KeyQueue) -> Tensor | None:
    """(B, K) bool, the negatives that any of the masks excludes; None without masks."""
    excluded = None
    for mask in masks:
        own = mask.excluded(labels, images, queue)
        excluded = own if excluded is None else excluded | own
    return excluded


_KINDS: dict[object, tuple[type, str]] = {
    "int": (numbers.Integral, "a whole number"),
    "float": (numbers.Real, "a number"),
    "bool": (bool, "True or False"),
}


def check_type(name: str, value: object, annotation: type | str) -> None:
    """Raise ValueError if a setting annotated as int, float or bool is not one; a float may be whole."""
    kind = getattr(annotation, "__name__", annotation)  # a string, if annotations are postponed
    if kind not in _KINDS:
        return
    accepted, expected = _KINDS[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind != "bool"):
        raise ValueError(f"{name}: found {value!r} ({type(value).__name__}); expected {expected}")


def at_least(least: int, **settings: int) -> None:
    """Raise ValueError if a setting is below `least`."""
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"{name}: found {value}; expected at least {least}")


def check_pool(num_hardest: int, least: int, queue_size: int) -> None:
    """Raise ValueError if there are fewer hardest negatives than `least`, or more than the queue size."""
    if not least <= num_hardest <= queue_size:
        raise ValueError(
            f"num_hardest: found {num_hardest}; expected {least} to {queue_size} (queue_size): they are "
            f"keys of the queue{', and a pair is mixed from two of them' if least > 1 else ''}"
        )
