"""The linear probe: many linear classifiers, trained at once by SGD.

All learning rates are trained at once on the same features: the probe is cheap compared with the encoder.
Each is trained twice: on all of train, which is reported, and without a held-out part, on which the
candidates are compared. The protocol's own learning rate is always reported.

`standardize` uses the mean and standard deviation of each feature over the images that are encoded
uncropped anyway: all of train if the probe trains on cached features, the held-out part if it trains on
random crops. They are constants of the probe, computed without labels, and the same for every rate.

An epoch includes its last, partial batch, as the DataLoader of facebookresearch/moco main_lincls.py does.
Several ranks share the encoding of images; each trains the same classifiers on whole batches.

Memory: the features of the uncropped images, once (`features_on`), and, independent of the data set: the
encoder with one batch, 24 x (D + 1) x C bytes of classifiers for each learning rate, and less than
128 MiB.

Shapes: B images, M training images, D features, C classes, R learning rates.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mochi.evaluation.features import Frozen
from mochi.evaluation.tasks.linear import LinearProbe
from mochi.runtime.monitoring import NonFiniteError
from mochi.runtime.progress import Progress
from mochi.runtime.seeding import generator
from mochi.runtime.transfer import to_device
from mochi.storage import checkpoint

ALL, WITHOUT_HELD_OUT = 0, 1
"""The two classifiers of a learning rate, by their training images."""

_CHUNK = 1024
"""Rows whose logits are computed at once."""


_FEW_CLASSES = 5
"""With this many classes or fewer, top-5 is not informative."""


def evaluate(frozen: Frozen, protocol: LinearProbe) -> dict[str, Any]:
    """Train the probe and evaluate it on the validation images.

    Returns:
        metrics.json: `top1` and `top5` of the last epoch, in percent, and the comparison of rates; and
        `predicted`, at the protocol's learning rate.

    Raises:
        DataError: a split has no labelled image.
        CheckpointError: the resume checkpoint is of another result, or the disk is full.
        NonFiniteError: the protocol's learning rate is too large for these features.
    """
    train = _CachedFeatures(frozen, protocol) if protocol.min_scale is None else _Crops(frozen, protocol)
    val, val_labels = frozen.features("val")
    train.scaling.apply_(val)
    probes = Probes(protocol, val.shape[1], frozen.num_classes, frozen.run.seed).to(frozen.device)
    _train(frozen, protocol, probes, train)
    scores = probes.scores(_chunks(val, val_labels, frozen.device), ALL)
    comparison = probes.scores(train.held_out_batches(), WITHOUT_HELD_OUT)
    metrics = _metrics(
        frozen.run.name, protocol, probes.rates, scores, comparison, len(train.held_out), len(val)
    )
    if frozen.num_classes <= _FEW_CLASSES:
        del metrics["top5"]
    return metrics | {"predicted": probes.predictions(_chunks(val, val_labels, frozen.device))}


def _train(
    frozen: Frozen, protocol: LinearProbe, probes: "Probes", train: "_CachedFeatures | _Crops"
) -> None:
    """All remaining epochs; each is a function of its index and the weights."""
    done = 0
    if (resumed := frozen.resume_point.load()) is not None:
        tensors, done = resumed
        checkpoint.unpack(tensors, probes, probes.optimizer)
    label = f"{frozen.run.name} {frozen.run.method} seed {frozen.run.seed}"
    with Progress(label, protocol.epochs, done) as progress:
        for epoch in range(done, protocol.epochs):
            probes.start_epoch(epoch)
            for features, labels, is_held_out in train.batches(epoch):
                probes.step(features, labels, is_held_out)
            frozen.resume_point.save_if_due(lambda: checkpoint.pack(probes, probes.optimizer), epoch + 1)
            progress.advance()


class Probes(nn.Module):
    """For each learning rate a layer with two linear classifiers, `ALL` and `WITHOUT_HELD_OUT`."""

    def __init__(self, protocol: LinearProbe, num_features: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self._protocol = protocol
        self.rates = list(dict.fromkeys([protocol.lr, *protocol.lr_candidates]))
        # N(0, 0.01), zero bias, the same initialisation for all (facebookresearch/moco main_lincls.py).
        weight = 0.01 * torch.randn(num_classes, num_features, generator=generator("probe weights", seed))
        self.layers = nn.ModuleList(nn.Linear(num_features, 2 * num_classes) for _ in self.rates)
        for layer in self.layers:
            layer.load_state_dict({"weight": weight.repeat(2, 1), "bias": torch.zeros(2 * num_classes)})
        self.optimizer = torch.optim.SGD(
            [{"params": layer.parameters()} for layer in self.layers],
            lr=protocol.lr,
            momentum=protocol.momentum,
            weight_decay=protocol.weight_decay,
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) features -> (R, B, 2, C) logits."""
        logits: Tensor = torch.stack([layer(features) for layer in self.layers])
        return logits.view(*logits.shape[:-1], 2, -1)

    def start_epoch(self, epoch: int) -> None:
        """Set the learning rates of an epoch."""
        drops = sum(epoch >= start for start in self._protocol.lr_drops)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._protocol.lr_drop_factor**drops

    def step(self, features: Tensor, labels: Tensor, held_out: Tensor) -> None:
        """One SGD step of every classifier on (B, D) features, (B,) labels, (B,) bool `held_out`."""
        logits = self(features)
        targets = labels[:, None].expand(logits.shape[:-1])
        losses = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
        kept = ~held_out / (~held_out).sum().clamp(min=1)
        weights = torch.stack([torch.full_like(kept, 1 / len(labels)), kept], dim=1)  # (B, 2)
        self.optimizer.zero_grad()
        (losses.view(targets.shape) * weights).sum().backward()
        self.optimizer.step()

    @torch.no_grad()
    def scores(self, batches: Iterable[tuple[Tensor, Tensor]], which: int) -> list[dict[str, float]]:
        """For each rate top-1 and top-5 in percent on (features, labels), NaN for a diverged classifier."""
        correct, finite, count = torch.zeros(2, len(self.rates)), torch.ones(len(self.rates)).bool(), 0
        for features, labels in batches:
            logits = self(features)[:, :, which]  # (R, B, C)
            best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
            correct += torch.stack([best[..., 0].sum(1), best.any(-1).sum(1)]).cpu()
            finite &= logits.isfinite().flatten(1).all(1).cpu()
            count += len(labels)
        percent = (100 * correct.double() / count).where(finite, math.nan)
        return [{"top1": round(a, 4), "top5": round(b, 4)} for a, b in percent.T.tolist()]

    @torch.no_grad()
    def predictions(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """(V,) classes of all images, by the first rate's classifier, trained on all of train."""
        return torch.cat([self(features)[0, :, ALL].argmax(1) for features, _ in batches])


class _Scaling(NamedTuple):
    """Standardisation: each feature minus `mean`, divided by `scale`."""

    mean: Tensor  # (D,)
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor, protocol: LinearProbe) -> "_Scaling":
        """The scaling to zero mean and unit variance of (M, D) features; none without `standardize`.

        A constant feature is only shifted.
        """
        if not protocol.standardize:
            return cls(torch.zeros_like(features[0]), torch.ones_like(features[0]))
        std, mean = torch.std_mean(features, dim=0, correction=0)
        return cls(mean, std.where(std > 1e-6, 1.0))

    def apply_(self, features: Tensor) -> Tensor:
        """In place: at ImageNet's size a second copy would need too much memory."""
        return features.sub_(self.mean.to(features.device)).div_(self.scale.to(features.device))


class _CachedFeatures:
    """The training split as features of uncropped images, all computed once."""

    def __init__(self, frozen: Frozen, protocol: LinearProbe) -> None:
        self._protocol, self._seed, self._device = protocol, frozen.run.seed, frozen.device
        self._features, self._labels = frozen.features("train")
        self.scaling = _Scaling.of(self._features, protocol)
        self.scaling.apply_(self._features)
        self.held_out = held_out_rows(len(self._labels), protocol.held_out, self._seed)
        self.held_out = self.held_out.to(self._labels.device)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """An epoch: (B, D) features, (B,) labels, (B,) whether held out."""
        order = torch.randperm(len(self._labels), generator=generator("probe order", self._seed, epoch))
        for rows in order.to(self._labels.device).split(self._protocol.batch_size):
            yield (
                self._moved(self._features[rows]),
                self._moved(self._labels[rows]),
                self._moved(self.held_out[rows]),
            )

    def _moved(self, tensor: Tensor) -> Tensor:
        """Move from the device of the features to that of the classifiers."""
        return tensor if tensor.device == self._device else to_device(tensor, self._device)

    def held_out_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(B, D) features, (B,) labels of the held-out images."""
        for rows in self.held_out.nonzero().flatten().split(_CHUNK):
            yield self._moved(self._features[rows]), self._moved(self._labels[rows])


class _Crops:
    """The training split as features of random crops, new in every epoch.

    Held-out images are also encoded uncropped, to compare the learning rates on them.
    """

    def __init__(self, frozen: Frozen, protocol: LinearProbe) -> None:
        self._frozen, self._protocol = frozen, protocol
        self._split = frozen.split("train")
        self.held_out = held_out_rows(len(self._split.labelled), protocol.held_out, frozen.run.seed)
        rows = self._split.labelled[self.held_out.numpy()]
        self._features, self._labels = frozen.features_of(self._split, rows)
        self.scaling = _Scaling.of(self._features, protocol)
        self.scaling.apply_(self._features)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As those of `_CachedFeatures`."""
        protocol, device = self._protocol, self._frozen.device
        assert protocol.min_scale is not None
        batches = self._frozen.random_crops(
            self._split, batch_size=protocol.batch_size, min_scale=protocol.min_scale, epoch=epoch
        )
        for features, rows in batches:
            labels = torch.from_numpy(self._split.labels[rows.numpy()])
            held_out = self.held_out[np.searchsorted(self._split.labelled, rows.numpy())]
            yield self.scaling.apply_(features), to_device(labels, device), to_device(held_out, device)

    def held_out_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As those of `_CachedFeatures`."""
        return _chunks(self._features, self._labels, self._frozen.device)


def held_out_rows(num_rows: int, share: float, seed: int) -> Tensor:
    """(M,) bool: a random `share` of the labelled training rows."""
    order = torch.randperm(num_rows, generator=generator("held-out rows", seed))
    is_held_out = torch.zeros(num_rows, dtype=torch.bool)
    is_held_out[order[: max(round(share * num_rows), 1)]] = True
    return is_held_out


def _chunks(features: Tensor, labels: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for rows, targets in zip(features.split(_CHUNK), labels.split(_CHUNK), strict=True):
        yield rows.to(device), targets.to(device)


def _metrics(
    name: str,
    protocol: LinearProbe,
    rates: list[float],
    scores: list[dict[str, float]],
    comparison: list[dict[str, float]],
    num_train: int,
    num_val: int,
) -> dict[str, Any]:
    """The protocol's own result, and that of the candidate that won on the held-out part.

    A candidate that diverged, with or without the held-out part, scores -1 and loses.
    """
    if math.isnan(scores[0]["top1"]):
        raise NonFiniteError(
            f"the linear probe diverged at the protocol's learning rate {protocol.lr:g}; expected finite "
            f"logits. Lower evaluation.{name}.lr, or set standardize: true so that one rate fits all"
        )
    held_out = [
        -1.0 if math.isnan(candidate["top1"] + final["top1"]) else candidate["top1"]
        for candidate, final in zip(comparison, scores, strict=True)
    ]
    best = max(range(len(rates)), key=lambda i: held_out[i])  # the first of ties
    return {
        "top1": scores[0]["top1"],
        "top5": scores[0]["top5"],
        "protocol": protocol.protocol,
        "lr": protocol.lr,
        "best_lr": rates[best],
        "best_lr_top1": scores[best]["top1"],
        "held_out_top1": {f"{rate:g}": accuracy for rate, accuracy in zip(rates, held_out, strict=True)},
        "num_train": num_train,
        "num_val": num_val,
    }
