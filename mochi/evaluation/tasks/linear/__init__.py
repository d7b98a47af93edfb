"""Linear classification on a frozen encoder (MoCo section 4.1, MoCHi section 4)."""

from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from mochi.config import Column, Count, Name, PositiveReal, Real, Task

if TYPE_CHECKING:
    from mochi.evaluation.features import Frozen


class LinearProbe(Task):
    """Linear classification on the frozen encoder."""

    protocol: Name
    """A name for these settings, recorded in metrics.json; it changes no number."""
    epochs: Count
    """Passes over the training images."""
    batch_size: Count
    """Images of a step."""
    lr: PositiveReal
    """Learning rate until the first drop."""
    lr_candidates: list[PositiveReal] = []
    """Trained on the same features as `lr`; the best on held-out training images is reported in addition
    to `lr`, never instead."""
    momentum: Annotated[Real, Field(ge=0, lt=1)]
    """Momentum of SGD."""
    weight_decay: Annotated[Real, Field(ge=0)]
    """Weight of the L2 penalty."""
    lr_drops: list[Count]
    """Epochs at whose start the learning rate is multiplied by lr_drop_factor."""
    lr_drop_factor: Annotated[Real, Field(gt=0, lt=1)]
    """Multiplies the learning rate at each of `lr_drops`."""
    min_scale: Annotated[Real, Field(gt=0, le=1)] | None
    """Smallest area of random crops in training; null: features of uncropped images, computed once."""
    held_out: Annotated[Real, Field(gt=0, lt=1)] = 0.1
    """Fraction of train on which the candidates are compared."""
    standardize: bool = False
    """Scale each feature to unit variance on train, so that one lr fits every encoder."""

    @model_validator(mode="after")
    def _drops_in_range(self) -> Self:
        late = [epoch for epoch in self.lr_drops if epoch >= self.epochs]
        if late:
            raise ValueError(f"lr_drops: found {late}; the probe trains for only {self.epochs} epochs")
        return self

    @property
    def encodings_of_train(self) -> int:
        """See `Task`; random crops are drawn and encoded again in every epoch."""
        return 1 if self.min_scale is None else self.epochs

    def checkpoint_bytes(self, num_features: int, num_classes: int) -> int:
        """See `Task`: weights and momentum of two classifiers for each learning rate, in float32."""
        rates = len({self.lr, *self.lr_candidates})
        return 4 * 2 * 2 * rates * num_classes * (num_features + 1)

    def columns(self) -> dict[str, Column]:
        """See `Task.columns`; top-5 only with more than five classes."""
        return {
            "top1": Column("top-1"),
            "top5": Column("top-5"),
            "best_lr_top1": Column("top-1 (best lr)"),
        }

    def evaluate(self, frozen: "Frozen") -> dict[str, Any]:
        """See `training.evaluate`."""
        from mochi.evaluation.tasks.linear import training

        return training.evaluate(frozen, self)
