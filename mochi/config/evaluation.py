"""Evaluation of encoders."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from mochi.config.detection import DetectionSet
from mochi.config.sections import Count, Name, PositiveReal, Real, Section

EVALUATIONS = ("linear", "knn")
"""Evaluations of frozen features; each has a section in `Evaluation`."""


class LinearProbe(Section):
    """Linear classification on the frozen encoder."""

    protocol: Name
    """Name of the protocol, printed in every table."""
    epochs: Count
    batch_size: Count
    lr: PositiveReal
    lr_candidates: list[PositiveReal] = []
    """Trained on the same features as `lr`; the best on held-out training images is reported in addition
    to `lr`, never instead."""
    momentum: Annotated[Real, Field(ge=0, lt=1)]
    weight_decay: Annotated[Real, Field(ge=0)]
    lr_drops: list[Count]
    """Epochs at whose start the learning rate is multiplied by lr_drop_factor."""
    lr_drop_factor: Annotated[Real, Field(gt=0, lt=1)]
    min_scale: Annotated[Real, Field(gt=0, le=1)] | None
    """Random-resized-crop training of the probe; null: one pass over uncropped images, cached."""
    held_out: Annotated[Real, Field(gt=0, lt=1)] = 0.1
    """Share of train on which the candidates are compared."""
    standardize: bool = False
    """Scale each feature to unit variance on train, so that one lr fits every encoder."""

    @model_validator(mode="after")
    def _drops_in_range(self) -> Self:
        late = [epoch for epoch in self.lr_drops if epoch >= self.epochs]
        if late:
            raise ValueError(f"lr_drops: found {late}; the probe trains for {self.epochs} epochs only")
        return self


class NearestNeighbours(Section):
    """Weighted k-nearest-neighbour classification (Wu et al. 2018, arXiv:1805.01978)."""

    k: Count
    temperature: PositiveReal


class Evaluation(Section):
    """Evaluation of encoders."""

    image_size: Count
    """Side of the centre crop, pixels."""
    resize: Count
    """Short side before the centre crop, pixels."""
    batch_size: Count = 256
    linear: LinearProbe | None = None
    knn: NearestNeighbours | None = None
    detection: dict[Name, DetectionSet] = {}
    """Detection sets by name; a set's results are in `detection-<name>`."""

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.resize < self.image_size:
            raise ValueError(
                f"resize: found {self.resize}; must be at least image_size = {self.image_size}"
            )
        return self

    @model_validator(mode="after")
    def _scenes_of_a_folder_agree(self) -> Self:
        first: dict[Path, str] = {}
        for name, chosen in self.detection.items():
            other = first.setdefault(Path(chosen.data.path), name)
            data, others = chosen.data, self.detection[other].data
            if (data.scenes or others.scenes) and (data.scenes, data.classes) != (
                others.scenes,
                others.classes,
            ):
                raise ValueError(
                    f"detection.{name}.data.path: found {data.path!r}, as in detection.{other}, with other "
                    "`scenes` or `classes`; a folder holds one set of scenes: make them equal, or give "
                    "each a separate path"
                )
        return self
