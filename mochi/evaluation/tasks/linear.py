"""Linear classification on a frozen encoder (MoCo section 4.1, MoCHi section 4).

All learning rates are trained at once on the same features: the probe is cheap compared with the encoder.
Each is trained twice: on all of train, which is reported, and without a held-out part, on which the
candidates are compared. The protocol's own learning rate is reported whatever the comparison says.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mochi.config import LinearProbe
from mochi.data.views.loading import Loading, random_crops
from mochi.evaluation.features import Frozen, extract, extract_splits
from mochi.runtime.monitoring import NonFiniteError
from mochi.runtime.progress import Progress
from mochi.runtime.seeding import generator


def evaluate(frozen: Frozen) -> dict[str, Any]:
    """Train the probe and evaluate it on the validation images.

    Returns:
        metrics.json: `top1` and `top5` of the last epoch, in percent, and the comparison of rates.

    Raises:
        DataError: a split has no labelled image.
        NonFiniteError: the protocol's learning rate is too large for these features.
    """
    run, protocol = frozen.run, frozen.run.protocol
    assert isinstance(protocol, LinearProbe)
    train, train_labels, val, val_labels = extract_splits(frozen)
    mean, scale = _statistics(train, protocol)
    held_out = held_out_rows(len(train), protocol.held_out, run.seed).to(frozen.device)
    probes = Probes(protocol, train.shape[1], len(frozen.dataset.classes), run.seed, frozen.device)
    batches = _Batches(frozen, protocol, train, train_labels, held_out)
    with Progress(f"linear {run.method} seed {run.seed}", protocol.epochs) as progress:
        for epoch in range(protocol.epochs):
            for features, labels, is_held_out in batches.of(epoch):
                probes.step((features - mean) / scale, labels, is_held_out, epoch)
            progress.advance()
    scores = probes.scores((val - mean) / scale, val_labels)
    comparison = probes.held_out_accuracy((train[held_out] - mean) / scale, train_labels[held_out])
    return _metrics(protocol, probes.rates, scores, comparison, len(train), len(val))


class Probes:
    """Linear classifiers for R learning rates, on all of train (0..R-1) and without the held-out part."""

    def __init__(
        self, protocol: LinearProbe, num_features: int, num_classes: int, seed: int, device: torch.device
    ) -> None:
        self._protocol = protocol
        self.rates = list(dict.fromkeys([protocol.lr, *protocol.lr_candidates]))
        # N(0, 0.01), zero bias, the same start for all (facebookresearch/moco main_lincls.py).
        weight = 0.01 * torch.randn(
            num_features + 1, num_classes, generator=generator("probe weights", seed)
        )
        weight[-1] = 0
        self._weight = weight.to(device).repeat(2 * len(self.rates), 1, 1)  # (2R, D + 1, classes)
        self._velocity = torch.zeros_like(self._weight)
        self._lr = torch.tensor(self.rates * 2, device=device)[:, None, None]

    def step(self, features: Tensor, labels: Tensor, held_out: Tensor, epoch: int) -> None:
        """One SGD step of every classifier on (B, D) features; held-out rows reach the first half only."""
        protocol, half = self._protocol, len(self.rates)
        inputs = _with_bias(features)  # (B, D + 1)
        error = (inputs @ self._weight).softmax(-1)  # (2R, B, classes)
        error[:, torch.arange(len(labels)), labels] -= 1  # gradient of the summed cross-entropy
        error[:half] /= len(labels)
        error[half:] *= (~held_out)[:, None] / (~held_out).sum().clamp(min=1)
        gradient = inputs.T @ error + protocol.weight_decay * self._weight
        self._velocity.mul_(protocol.momentum).add_(gradient)
        drops = sum(epoch >= start for start in protocol.lr_drops)
        self._weight -= self._lr * protocol.lr_drop_factor**drops * self._velocity

    def scores(self, features: Tensor, labels: Tensor) -> list[dict[str, float]]:
        """Top-1 and top-5 in percent of the classifiers trained on all of train, NaN for a diverged one."""
        logits = _with_bias(features) @ self._weight[: len(self.rates)]  # (R, V, classes)
        top = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
        finite = logits.isfinite().all(-1).all(-1)
        return [
            {
                "top1": _percent(top[i, :, 0]) if finite[i] else math.nan,
                "top5": _percent(top[i].any(-1)) if finite[i] else math.nan,
            }
            for i in range(len(self.rates))
        ]

    def held_out_accuracy(self, features: Tensor, labels: Tensor) -> list[float]:
        """Percent on held-out rows, by the classifiers trained without them; -1 for a diverged one."""
        logits = _with_bias(features) @ self._weight[len(self.rates) :]
        right = logits.argmax(-1) == labels
        finite = logits.isfinite().all(-1).all(-1)
        return [_percent(right[i]) if finite[i] else -1.0 for i in range(len(self.rates))]


class _Batches:
    """Features, labels and held-out marks of an epoch's batches: random crops, or cached features."""

    def __init__(
        self, frozen: Frozen, protocol: LinearProbe, features: Tensor, labels: Tensor, held_out: Tensor
    ) -> None:
        self._frozen, self._protocol = frozen, protocol
        self._split = frozen.dataset.split("train")
        self._features, self._labels, self._held_out = features, labels, held_out
        # Position among the labelled rows of each row of the split, to find its mark.
        labelled = torch.from_numpy(self._split.labels >= 0)
        self._position = (labelled.cumsum(0) - 1).to(labels.device)

    def of(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(B, D) features, (B,) labels, (B,) whether held out."""
        protocol, seed = self._protocol, self._frozen.run.seed
        if protocol.min_scale is None:
            order = torch.randperm(len(self._labels), generator=generator("probe order", seed, epoch))
            for rows in order.to(self._labels.device).split(protocol.batch_size):
                yield self._features[rows], self._labels[rows], self._held_out[rows]
            return
        crops = random_crops(
            self._split,
            Loading(protocol.batch_size, self._labels.device, self._frozen.workers),
            image_size=self._frozen.run.image_size,
            min_scale=protocol.min_scale,
            seed=seed,
            epoch=epoch,
        )
        for batch in crops:
            features, labels = extract(self._frozen.encoder, [batch], len(batch.labels))
            yield features, labels, self._held_out[self._position[batch.indices.to(labels.device)]]


def held_out_rows(num_rows: int, share: float, seed: int) -> Tensor:
    """(M,) bool: a random `share` of the labelled training rows."""
    order = torch.randperm(num_rows, generator=generator("held-out rows", seed))
    marks = torch.zeros(num_rows, dtype=torch.bool)
    marks[order[: max(round(share * num_rows), 1)]] = True
    return marks


def _statistics(features: Tensor, protocol: LinearProbe) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature on train, or 0 and 1."""
    if not protocol.standardize:
        return torch.zeros_like(features[0]), torch.ones_like(features[0])
    return features.mean(0), features.std(0).clamp(min=1e-6)


def _with_bias(features: Tensor) -> Tensor:
    return F.pad(features, (0, 1), value=1.0)


def _percent(right: Tensor) -> float:
    return round(100 * right.double().mean().item(), 4)


def _metrics(
    protocol: LinearProbe,
    rates: list[float],
    scores: list[dict[str, float]],
    comparison: list[float],
    num_train: int,
    num_val: int,
) -> dict[str, Any]:
    """The protocol's own result, and that of the candidate that won on the held-out part."""
    own, best = scores[0], max(range(len(rates)), key=lambda i: comparison[i])
    if math.isnan(own["top1"]):
        raise NonFiniteError(
            f"the linear probe diverged at the protocol's learning rate {protocol.lr:g}; expected finite "
            "logits. Lower evaluation.linear.lr, or set standardize: true so that one rate fits all"
        )
    return {
        "top1": own["top1"],
        "top5": own["top5"],
        "protocol": protocol.protocol,
        "lr": protocol.lr,
        "best_lr": rates[best],
        "best_lr_top1": scores[best]["top1"],
        "held_out_top1": {f"{rate:g}": accuracy for rate, accuracy in zip(rates, comparison, strict=True)},
        "num_train": num_train,
        "num_val": num_val,
    }
