"""Views, encoders and training."""

import difflib
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, create_model, field_validator, model_validator

from mochi.config.negatives import PLAIN, Masks, NegativesOfARule, make_mask
from mochi.config.sections import Count, CountOrZero, PositiveReal, Real, Section
from mochi.contrast.rules import Mask, modules


class Augmentation(Section):
    """Two random views of an image. `v1` and `v2` are MoCo's (facebookresearch/moco main_moco.py)."""

    version: Literal["v1", "v2"]
    """v1: MoCo-v1's crop, colour jitter, greyscale and flip. v2: MoCo-v2's, with blur and less jitter."""
    image_size: Count
    """Side of a view, pixels."""
    min_scale: Annotated[Real, Field(gt=0, le=1)]
    """Smallest fraction of the image's area that a random crop may cover."""
    blur: bool = True
    """Version 2 blurs half of the views; at 32 px this blur removes all detail."""

    @model_validator(mode="after")
    def _v1_has_no_blur(self) -> Self:
        if self.version == "v1" and "blur" in self.model_fields_set and self.blur:
            raise ValueError("blur belongs to version v2; leave it out with v1")
        return self


RESNETS = (
    "resnet10",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnext50_32x4d",
    "wide_resnet50_2",
)
"""Architectures by torchvision's names; resnet10, with one basic block per stage, is not in torchvision."""


class Encoder(Section):
    """A ResNet, or a model of timm."""

    architecture: Annotated[
        str, Field(json_schema_extra={"anyOf": [{"enum": list(RESNETS)}, {"pattern": "^timm:"}]})
    ]
    """A ResNet, such as resnet50, or timm:NAME, which cannot be used in a detector."""
    stem: Literal["imagenet", "half", "full"] | None = None
    """imagenet: 7x7 stride 2 and max-pool; half: 3x3 stride 2; full: 3x3 stride 1 (CIFAR)."""
    width: Count | None = None
    """Channels of the first stage (64 in the paper's ResNet-50)."""

    @property
    def is_resnet(self) -> bool:
        """Whether it is one of `RESNETS`, with a stem and a width."""
        return self.architecture in RESNETS

    def __str__(self) -> str:
        if not self.is_resnet:
            return self.architecture
        return f"{self.architecture} with stem {self.stem} and width {self.width}"

    @field_validator("architecture")
    @classmethod
    def _known(cls, name: str) -> str:
        if name in RESNETS or re.fullmatch(r"timm:[\w.-]+", name):
            return name
        close = difflib.get_close_matches(name, RESNETS, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"found {name!r}; {guess}allowed: {', '.join(RESNETS)}, or timm:NAME")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.is_resnet:
            if self.stem is not None or self.width is not None:
                raise ValueError(
                    f"stem, width: found {self.stem}, {self.width}; {self.architecture} fixes them; "
                    "leave both out"
                )
        elif self.stem is None or self.width is None:
            missing = "stem" if self.stem is None else "width"
            raise ValueError(f"{missing}: missing; {self.architecture} needs a stem and a width")
        elif self.architecture.startswith("resnext") and self.width % 16:
            raise ValueError(
                f"width: found {self.width}; {self.architecture} needs a multiple of 16, or its 32 groups "
                "have no whole number of channels"
            )
        return self


class Untrained(Section):
    """`random-init`: the baseline without training."""

    objective: Literal["none"]
    """none: the encoder keeps its initial weights."""


class FromFile(Section):
    """An encoder that is not trained here: a file written by `mochi import` or another experiment."""

    objective: Literal["file"]
    """file: the encoder is read from `path`."""
    path: Annotated[str, Field(min_length=1)]
    """Path of the safetensors file. Its sha256 is tracked, not its location."""


class Training(Section):
    """Settings of every trained encoder."""

    epochs: Count
    """Passes over the training images."""
    batch_size: Count
    """Images of a step, over all GPUs."""
    lr: PositiveReal
    """Largest learning rate, for the whole batch: it is not scaled with `batch_size`."""
    momentum: Annotated[Real, Field(ge=0, lt=1)]
    """Momentum of SGD and LARS; beta1 of AdamW, whose beta2 is 0.999."""
    weight_decay: Annotated[Real, Field(ge=0)]
    """Weight of the L2 penalty (SGD, LARS) or the decoupled decay (AdamW)."""
    schedule: Literal["cosine", "step"]
    """cosine: per epoch, to zero without a minimum. step: times 0.1 at 60% and 80% (MoCo-v1)."""
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    """sgd: the paper's. lars: for large batches; biases and batch norm without scaling and decay."""
    warmup_epochs: CountOrZero = 0
    """Initial epochs in which the learning rate rises linearly with every step."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 if the device supports it in hardware."""
    deterministic: bool = True
    """The same bytes from the same seed. false: on a GPU cuDNN's fastest kernels, whose last digits differ
    from run to run; on a CPU nothing changes."""
    checkpoint_minutes: PositiveReal = 5.0
    """Minutes between resume checkpoints; one is also written at the end of training."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: found {self.warmup_epochs}; must be smaller than epochs = {self.epochs}"
            )
        return self


class Supervised(Training):
    """Cross-entropy on the labels: the supervised upper bound."""

    objective: Literal["supervised"]
    """supervised: cross-entropy on the labels."""


class Contrastive(Training):
    """MoCo (He et al. 2020) and, with other rules of negatives, MoCHi and related methods."""

    objective: Literal["contrastive"]
    """contrastive: MoCo, with the rule in `negatives`."""
    head: Literal["linear", "mlp"]
    """MoCo-v1 has a linear projection head, MoCo-v2 an MLP."""
    embedding_dim: Count
    """Number of coordinates of an embedding, after the projection head (128 in the paper)."""
    queue_size: Count
    """K, the number of negatives: keys of the most recent batches."""
    temperature: PositiveReal
    """tau, which divides every similarity in the loss."""
    key_momentum: Annotated[Real, Field(ge=0, le=1)]
    """Share of its weights that the momentum encoder keeps in each step (0.999 in the paper)."""
    bn_groups: Count
    """Groups of the global batch with separate batch-norm statistics (MoCo: one per GPU)."""
    negatives: NegativesOfARule = PLAIN
    """How much each negative counts: a rule with its settings; default: MoCo's."""
    masks: Masks = []
    """Negatives to exclude: class_oracle (of the query's class, by label: an upper bound, not a method),
    same_image (older keys of the query's own image)."""
    matching_epochs: list[CountOrZero] = []
    """Epochs whose mean matching probabilities of the hardest 1024 are recorded (figure 2)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        rule = self.negatives.make()
        try:
            rule.check(self.queue_size)
        except ValueError as error:
            raise ValueError(f"negatives.{error}") from None
        if not rule.is_active(self.epochs - 1):
            raise ValueError(
                f"negatives.warmup_epochs: found {rule.warmup_epochs}; must be smaller than "
                f"epochs = {self.epochs}, or only MoCo is ever trained"
            )
        if self.bn_groups * 2 > self.batch_size:
            raise ValueError(
                f"bn_groups: found {self.bn_groups}; batch_size = {self.batch_size} leaves fewer than "
                f"2 images per group; at most {max(self.batch_size // 2, 1)}"
            )
        late = [epoch for epoch in self.matching_epochs if epoch >= self.epochs]
        if late:
            raise ValueError(f"matching_epochs: found {late}; epochs count from 0 to {self.epochs - 1}")
        return self

    def make_masks(self) -> list[Mask]:
        """The masks with their mathematics."""
        return [make_mask(name) for name in self.masks]

    def code(self) -> tuple[str, ...]:
        """The modules of the rule and the masks."""
        return modules(self.negatives.make(), *self.make_masks())


_SHARED: dict[str, Any] = {
    name: (field.rebuild_annotation(), None)
    for name, field in Contrastive.model_fields.items()
    if name != "objective"
}
SharedRecipe = create_model("SharedRecipe", __base__=Section, **_SHARED)
"""Keys of `Contrastive`, validated individually; cross-field rules apply only to a complete recipe."""

Objective = Annotated[Untrained | FromFile | Supervised | Contrastive, Field(discriminator="objective")]
