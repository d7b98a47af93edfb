"""Classification from few labels: logistic regression on the frozen features of a small part of train.

Protocol, after the low-shot evaluation of Assran et al. 2022 (arXiv:2204.07141; facebookresearch/msn
logistic_eval.py): features of uncropped images, scaled to unit length; multinomial logistic regression
that minimises, over weights W and an unregularised bias, the sum of cross-entropies + l2 / 2 * ||W||^2;
the mean accuracy over several subsets. The optimum is unique up to a shift of all biases, so learning
rate, order and initialisation do not matter. Subsets are stratified, and the same for every encoder, so
differences between rows do not come from the subsets. Deviations: msn has no bias, and subtracts from each
image's features their mean.

Memory: the features of train and val, once (`features_on`), and on the device, in float64, those of one
subset.
"""

import logging
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from mochi.config import Column, Count, PositiveReal, Real, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mochi.evaluation.features import Frozen

logger = logging.getLogger(__name__)

_FEW_CLASSES, _CHUNK = 5, 4096


class FewLabel(Task):
    """Logistic regression on few labelled images."""

    percent: Annotated[Real, Field(gt=0, le=100)] | None = None
    """Percentage of each class's labelled training images, rounded, at least one."""
    images_per_class: Count | None = None
    """Instead of `percent`; a class with fewer images contributes all."""
    samples: Count = 5
    """Number of random subsets; `top1` is the mean over them."""
    l2: PositiveReal = 0.01
    """Weight of the penalty relative to the sum of the losses; scikit-learn's 1 / C."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.percent is None) == (self.images_per_class is None):
            found = f"percent = {self.percent}, images_per_class = {self.images_per_class}"
            raise ValueError(f"found {found}; give one of the two")
        return self

    def columns(self) -> dict[str, Column]:
        """See `Task.columns`; top-5 only with more than five classes."""
        return {"top1": Column("top-1"), "top5": Column("top-5")}

    def evaluate(self, frozen: "Frozen") -> dict[str, Any]:
        """Fit every subset and classify the validation images.

        Returns:
            metrics.json: means over the subsets in percent, the standard deviation of top-1, each subset's
            accuracy, and the numbers of images.

        Raises:
            DataError: a split has no labelled image.
        """
        from statistics import mean, stdev

        from torch.nn import functional as F

        train, labels = frozen.features("train")
        val, val_labels = frozen.features("val")
        for features in (train, val):
            F.normalize(features, dim=-1, out=features)
        singles, sizes = [], []
        for sample in range(self.samples):
            rows = self.subset(labels.cpu(), frozen.generator("few labels", sample)).to(labels.device)
            values, targets = train[rows].to(frozen.device), labels[rows].to(frozen.device)
            weight, bias = fit(values.double(), targets, frozen.num_classes, self.l2)
            singles.append(_accuracies(val, val_labels, weight.float(), bias.float()))
            sizes.append(len(rows))
            logger.info("%s %s seed %d: subset %d of %d, %d images, top-1 %.1f", frozen.run.name,
                        frozen.run.method, frozen.run.seed, sample + 1, self.samples, len(rows),
                        singles[-1]["top1"])  # fmt: skip
        top1 = [single["top1"] for single in singles]
        metrics: dict[str, Any] = {"top1": round(mean(top1), 4)}
        if frozen.num_classes > _FEW_CLASSES:
            metrics["top5"] = round(mean(single["top5"] for single in singles), 4)
        if len(top1) > 1:
            metrics["top1_std"] = round(stdev(top1), 4)
        return metrics | {"samples_top1": top1, "num_train": sizes[0], "num_val": len(val_labels)}

    def subset(self, labels: "Tensor", generator: "torch.Generator") -> "Tensor":
        """Rows of a random stratified subset of (M,) labels, in ascending order."""
        import torch

        order = torch.randperm(len(labels), generator=generator)
        chosen = []
        classes, counts = (part.tolist() for part in labels.unique(return_counts=True))
        for label, count in zip(classes, counts, strict=True):
            wanted = self.images_per_class or max(round(count * (self.percent or 0) / 100), 1)
            chosen.append(order[labels[order] == label][:wanted])
        return torch.cat(chosen).sort().values


def fit(features: "Tensor", labels: "Tensor", num_classes: int, l2: float) -> "tuple[Tensor, Tensor]":
    """Weights (C, D) and biases (C,) that minimise sum of cross-entropies + l2 / 2 * ||weights||^2.

    By L-BFGS, until the largest derivative is below 1e-6 of the number of images.

    Args:
        features: (B, D) float64.
        labels: (B,) classes.
        num_classes: C; a class without images is ignored, with bias -inf.
        l2: weight of the penalty.
    """
    import torch
    from torch.nn import functional as F

    present, targets = labels.unique(return_inverse=True)
    weight = features.new_zeros(len(present), features.shape[1], requires_grad=True)
    bias = features.new_zeros(len(present), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-6, tolerance_change=0, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> "Tensor":
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, targets)
        loss += l2 / 2 / len(labels) * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    weights = features.new_zeros(num_classes, features.shape[1])
    biases = features.new_full((num_classes,), -torch.inf)
    weights[present], biases[present] = weight.detach(), bias.detach()
    return weights, biases


def _accuracies(values: "Tensor", labels: "Tensor", weight: "Tensor", bias: "Tensor") -> dict[str, float]:
    """Top-1 and top-5 in percent."""
    correct = {"top1": 0, "top5": 0}
    for rows, targets in zip(values.split(_CHUNK), labels.split(_CHUNK), strict=True):
        logits = rows.to(weight.device) @ weight.T + bias
        best = logits.topk(min(5, len(bias)), dim=1).indices == targets.to(weight.device)[:, None]
        correct["top1"] += int(best[:, 0].sum())
        correct["top5"] += int(best.any(1).sum())
    return {name: 100 * count / len(labels) for name, count in correct.items()}
