"""The input of one job: a self-contained type for each kind of stage."""

from typing import Any, ClassVar, Literal

from pydantic import SerializeAsAny

from mochi.config.datasets import Dataset
from mochi.config.detection import DetectionSet
from mochi.config.evaluation import Task
from mochi.config.sections import Count, CountOrZero, Name, Section
from mochi.config.training import Augmentation, Contrastive, Encoder, FromFile, Objective, Untrained


class Run(Section):
    """One method and seed of an experiment, with what one stage depends on."""

    experiment: Name
    method: Name
    seed: CountOrZero
    """Seed of the pretraining."""
    encoder: Encoder

    _ignored: ClassVar[dict[str, Any]] = {}
    """Keys that do not affect numbers, for pydantic's `exclude`."""

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON.

        Names and defaults are left out, so a new optional key invalidates nothing. The data set enters
        through its manifest, an input of the stage.
        """
        ignored = {"experiment": True, "method": True, **self._ignored}
        return self.model_dump(mode="json", exclude=ignored, exclude_defaults=True)


class PretrainRun(Run):
    """Train one encoder."""

    dataset: Dataset
    augmentation: Augmentation
    recipe: Objective

    _ignored: ClassVar[dict[str, Any]] = {"dataset": True, "recipe": {"checkpoint_minutes", "path"}}

    @property
    def is_trained(self) -> bool:
        """False for `random-init` and for an encoder from a file, which need no data."""
        return not isinstance(self.recipe, Untrained | FromFile)

    def code(self) -> tuple[str, ...]:
        """The modules that determine the numbers of only this row."""
        return self.recipe.code() if isinstance(self.recipe, Contrastive) else ()

    def settings(self) -> dict[str, Any]:
        """See `Run.settings`; without training, the encoder does not depend on the views."""
        settings = super().settings()
        if not self.is_trained:
            del settings["augmentation"]
        return settings


class ProbeRun(Run):
    """Evaluate one frozen encoder on a task."""

    name: Name
    """Name of the entry in the experiment."""
    dataset: Dataset
    image_size: Count
    resize: Count
    """Short side in pixels, before the centre crop of `image_size` pixels."""
    batch_size: Count
    features_on: Literal["auto", "device", "host"]
    protocol: SerializeAsAny[Task]
    """The task and its settings; stored results name them by this key."""

    _ignored: ClassVar[dict[str, Any]] = {
        "name": True,
        "dataset": True,
        "batch_size": True,
        "features_on": True,
        "protocol": {"dataset", "image_size", "resize"},
    }

    @property
    def feature_key(self) -> tuple[str, int, int]:
        """Data set, image size and resize. Evaluations of one encoder with equal keys share features."""
        return self.dataset.name, self.image_size, self.resize

    def settings(self) -> dict[str, Any]:
        """See `Run.settings`; a task is omitted if it is the default, the name of the entry."""
        settings = super().settings()
        if self.protocol.task == self.name:
            del settings["protocol"]["task"]
        return settings


class AnalysisRun(Run):
    """Analyse one frozen encoder on the validation images."""

    dataset: Dataset
    image_size: Count
    resize: Count
    batch_size: Count
    head: Literal["linear", "mlp"] | None = None
    """Its projection head; None without a contrastive loss."""
    embedding_dim: CountOrZero = 0

    _ignored: ClassVar[dict[str, Any]] = {"dataset": True, "batch_size": True}


class DetectionRun(Run):
    """Fine-tune one encoder as a detector."""

    set_name: Name
    detection: DetectionSet
    searches: bool = False
    """Only choose the learning rate; the fine-tunings are separate runs."""

    _ignored: ClassVar[dict[str, Any]] = {
        "set_name": True,
        "detection": {
            "data": {"path"},
            "training": {"workers", "checkpoint_minutes", "together"},
            "methods": True,
            "pretrain_seeds": True,
        },
    }
