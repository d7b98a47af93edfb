"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018, arXiv:1805.01978).

Memory: the features, once (`features_on`), and less than 128 MiB on the device.

Shapes: V validation images, M training images, D features.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from mochi.config import Column, Count, PositiveReal, Task

if TYPE_CHECKING:
    from torch import Tensor

    from mochi.evaluation.features import Frozen

logger = logging.getLogger(__name__)

_QUERIES, _BANK = 256, 4096
"""Rows of val and of train compared at once."""


def _distinct(values: list[float]) -> list[float]:
    if len(set(values)) != len(values):
        raise ValueError(f"found {values}; the values must be distinct")
    return values


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


_SINGLE_AS_SCALAR = PlainSerializer(lambda values: values if len(values) > 1 else values[0])
_Counts = Annotated[
    list[Count],
    Field(min_length=1),
    BeforeValidator(_as_list, json_schema_input_type=Count | list[Count]),
    AfterValidator(_distinct),
    _SINGLE_AS_SCALAR,
]
_Temperatures = Annotated[
    list[PositiveReal],
    Field(min_length=1),
    BeforeValidator(_as_list, json_schema_input_type=PositiveReal | list[PositiveReal]),
    AfterValidator(_distinct),
    _SINGLE_AS_SCALAR,
]


class NearestNeighbours(Task):
    """Weighted k-nearest-neighbour classification."""

    k: _Counts
    """One number, or several: every k is combined with every temperature, and the first two are the main
    pair, whose accuracy is `top1`."""
    temperature: _Temperatures
    """A neighbour's vote weighs exp(cosine / temperature). One number, or several as for `k`."""

    def pairs(self) -> list[tuple[int, float]]:
        """(k, temperature), the main pair first."""
        return list(itertools.product(self.k, self.temperature))

    def columns(self) -> dict[str, Column]:
        """See `Task.columns`."""
        if len(self.pairs()) == 1:
            return {"top1": Column("top-1")}
        return {
            key: Column(f"top-1 (k={k}, t={temperature:g})")
            for key, (k, temperature) in zip(self._metric_names(), self.pairs(), strict=True)
        }

    def evaluate(self, frozen: "Frozen") -> dict[str, Any]:
        """Classify the validation images by their neighbours in train.

        Returns:
            metrics.json: accuracies in percent, k, temperature and the numbers of images; and `predicted`.

        Raises:
            DataError: a split has no labelled image.
        """
        train, train_labels = frozen.features("train")
        val, val_labels = frozen.features("val")
        num_train = len(train)
        if max(self.k) > num_train:
            logger.warning(
                "k = %d is larger than the %d labelled training images; using %d",
                max(self.k), num_train, num_train,
            )  # fmt: skip
        pairs = [(min(k, num_train), temperature) for k, temperature in self.pairs()]
        predicted = classify(
            train, train_labels, val, num_classes=frozen.num_classes, pairs=pairs, device=frozen.device
        )
        percent = 100 * (predicted == val_labels.to(predicted.device)).double().mean(dim=1)
        accuracies = {
            name: round(value, 4)
            for name, value in zip(self._metric_names(), percent.tolist(), strict=True)
        }
        return {
            **accuracies,
            "k": pairs[0][0],
            "temperature": pairs[0][1],
            "num_train": num_train,
            "num_val": len(val),
            "predicted": predicted[0],
        }

    def _metric_names(self) -> list[str]:
        """Names of the accuracies in metrics.json."""
        return ["top1", *(f"top1_k{k}_t{temperature:g}" for k, temperature in self.pairs()[1:])]


def classify(
    train: "Tensor",
    train_labels: "Tensor",
    val: "Tensor",
    *,
    num_classes: int,
    pairs: Sequence[tuple[int, float]],
    device: Any = None,
    chunks: tuple[int, int] = (_QUERIES, _BANK),
) -> "Tensor":
    """Classify each row by a vote of its k most similar training rows, weight exp(cosine / temperature).

    Ties between training rows and between classes go to the first. So the result does not depend on the
    chunks, unless they change the rounding of a cosine.

    Args:
        train: (M, D) float32 features of any length; normalised in place.
        train_labels: (M,) classes.
        val: (V, D) features; normalised in place.
        num_classes: number of classes.
        pairs: (k, temperature) of each vote; k at most M.
        device: where to compute; default: where the features are.
        chunks: rows of val and of train compared at once.

    Returns:
        (P, V) predicted classes of each pair.
    """
    import torch
    from torch.nn import functional as F

    device = train.device if device is None else device
    for features in (train, val):
        F.normalize(features, dim=-1, out=features)
    train_labels = train_labels.to(device)
    predicted = []
    for queries in val.split(chunks[0]):
        similarity, neighbours = _nearest(queries.to(device), train, max(k for k, _ in pairs), chunks[1])
        classes = train_labels[neighbours]
        by_pair = []
        for k, temperature in pairs:
            # The largest weight is 1, so that a small temperature cannot overflow.
            weights = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()
            votes = weights.new_zeros(len(queries), num_classes)
            by_pair.append(votes.scatter_add_(1, classes[:, :k], weights).argmax(1))
        predicted.append(torch.stack(by_pair))
    return torch.cat(predicted, dim=1)


def _nearest(queries: "Tensor", bank: "Tensor", k: int, chunk: int) -> "tuple[Tensor, Tensor]":
    """(Q, k) largest products with the rows of `bank` (the training features), and their indices.

    Ties go to the first rows.
    """
    import torch

    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first in range(0, len(bank), chunk):
        keys = _sort_keys(queries @ bank[first : first + chunk].to(queries.device).T, first)
        keys = torch.cat([best, keys], dim=1)
        best = keys.topk(min(k, keys.shape[1]), dim=1).values
    return _unpack(best)


_ROWS = 2**32 - 1


def _sort_keys(similarity: "Tensor", first: int) -> "Tensor":
    """Integers in the order of (similarity, -row), because topk does not specify how it breaks ties.

    The upper half is the float's bits, which sort like the floats once the bits below the sign of
    negative ones are flipped; the lower half counts rows downwards.
    """
    import torch

    bits = similarity.add_(0.0).view(torch.int32)  # -0 becomes 0
    upper = bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF)).long()
    rows = torch.arange(first, first + similarity.shape[1], device=similarity.device)
    return upper.mul_(2**32).add_(_ROWS - rows)


def _unpack(keys: "Tensor") -> "tuple[Tensor, Tensor]":
    """Similarities and rows of keys."""
    import torch

    upper = (keys >> 32).int()
    return (upper ^ ((upper >> 31) & 0x7FFFFFFF)).view(torch.float32), _ROWS - (keys & _ROWS)
