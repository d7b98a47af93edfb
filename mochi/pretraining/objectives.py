"""Training objectives: a module and its loss, contrastive or supervised."""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mochi.config import Contrastive, PretrainRun, Supervised
from mochi.contrast.diagnosis import false_negatives, matching_probabilities, rule_measurements
from mochi.contrast.loss import chance_level
from mochi.contrast.moco import MoCo, Step
from mochi.contrast.rules.moco import MoCo as MoCoRule
from mochi.data.format import StoredDataset, StoredSplit
from mochi.data.views.loading import Images, Loading, Views, one_view, two_views
from mochi.encoders import build
from mochi.encoders.backbone import Backbone
from mochi.encoders.shared_batch_norm import SharedBatchNorm2d
from mochi.runtime.cuda_graphs import use_cuda_graph
from mochi.runtime.distributed import gather, mean_over_ranks, world_size
from mochi.runtime.transfer import to_device


class Objective(Protocol):
    """A module to train and its loss, as `loop.train` uses them."""

    module: nn.Module
    metric_names: tuple[str, ...]
    num_images: int

    @property
    def backbone(self) -> Backbone:
        """The encoder to publish, without its head."""

    @property
    def head(self) -> nn.Module | None:
        """The projection head, if the objective is contrastive."""

    def batches(self, loading: Loading, epoch: int, first_step: int) -> Iterator[Any]:
        """This rank's batches from an epoch's `first_step` to the end of training, as one stream."""

    def loss(self, batch: Any, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and the step's metrics in the order of `metric_names`."""

    def after_update(self, *, last_of_epoch: bool) -> None:
        """Called after the optimizer step."""

    def describe_epoch(self, epoch: int) -> dict[str, Any]:
        """Additional columns of the epoch's row."""

    def matching(self, epoch: int) -> list[float]:
        """Matching probabilities to record at the end of this epoch; none in most epochs."""


def make_objective(run: PretrainRun, dataset: StoredDataset) -> Objective:
    """The objective of a trained row."""
    if isinstance(run.recipe, Contrastive):
        return ContrastiveObjective(run, run.recipe, dataset.split("train"))
    assert isinstance(run.recipe, Supervised)
    return SupervisedObjective(run, run.recipe, dataset.split("train"), len(dataset.classes))


class ContrastiveObjective:
    """MoCo, with any rule of negatives."""

    metric_names: tuple[str, ...] = ("loss", "accuracy", "accuracy_with_synthetics", "feature_std")

    def __init__(self, run: PretrainRun, recipe: Contrastive, split: StoredSplit) -> None:
        self._recipe, self._split, self._augmentation = recipe, split, run.augmentation
        self.module: nn.Module
        self._moco = self.module = MoCo(run.encoder, recipe, run.seed)
        self.num_images = len(split)
        self._seed = run.seed
        self._step: Step | None = None
        self._labels = self._images = torch.empty(0)
        self._diagnosis: dict[str, float] = {}
        self._matching: list[float] = []

    @property
    def backbone(self) -> Backbone:
        """The query encoder without its head."""
        return self._moco.backbone

    @property
    def head(self) -> nn.Module | None:
        """The query encoder's projection head."""
        return self._moco.query_encoder.get_submodule("head")

    def batches(self, loading: Loading, epoch: int, first_step: int) -> Iterator[Views]:
        """Two views of every image."""
        return two_views(
            self._split,
            self._augmentation,
            loading,
            seed=self._seed,
            epoch=epoch,
            first_step=first_step,
            epochs=self._recipe.epochs - epoch,
        )

    def loss(self, batch: Views, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """InfoNCE; accuracy is that of the proxy task: the key outranks every negative."""
        if self._step is None:
            use_cuda_graph(self._moco.query_encoder, batch.query)
            use_cuda_graph(self._moco.momentum_encoder, batch.key)
        self._labels, self._images = batch.labels, to_device(batch.indices, batch.labels.device)
        self._step = self._moco.training_step(
            batch.query,
            batch.key,
            batch.labels,
            step,
            synthesize=self._moco.rule.is_active(epoch),
            images=self._images,
        )
        loss, positive, hardest_negative, hardest_synthetic = self._step.loss
        metrics = (
            loss.detach(),
            (positive > hardest_negative).float().mean(),
            (positive > torch.maximum(hardest_negative, hardest_synthetic)).float().mean(),
            gather(self._step.query).std(0).mean(),
        )
        return loss, torch.stack(metrics)

    def after_update(self, *, last_of_epoch: bool) -> None:
        """Enqueue after the step, so that no key is a negative of its own query."""
        assert self._step is not None
        if last_of_epoch:
            # Before enqueueing: the measurements are of the queue that the loss used.
            temperature = self._recipe.temperature
            self._diagnosis = _of_all_ranks(false_negatives(self._step, self._labels), self._labels)
            for name, value in rule_measurements(self._step, temperature).items():
                self._diagnosis[name] = mean_over_ranks(value).item()
            self._matching = mean_over_ranks(matching_probabilities(self._step, temperature)).tolist()
        self._moco.enqueue(self._step.key, self._labels, self._images)

    def describe_epoch(self, epoch: int) -> dict[str, Any]:
        """Chance level (the loss of uniform guessing, nats), queue fill and measurements."""
        rule = self._moco.rule if self._moco.rule.is_active(epoch) else MoCoRule()
        return {
            "chance": chance_level(rule, self._recipe.queue_size, self._recipe.temperature),
            "queue_fill": self._moco.queue.fill(),
            **self._diagnosis,
        }

    def matching(self, epoch: int) -> list[float]:
        """Figure 2a's curve at the epochs listed in the recipe."""
        return self._matching if epoch in self._recipe.matching_epochs else []


def _of_all_ranks(shares: dict[str, float], labels: Tensor) -> dict[str, float]:
    """Fractions among this rank's labelled queries -> among those of all ranks."""
    if world_size() == 1:
        return shares
    names = ("false_negatives", "false_parents_any", "false_parents_all")
    known = int((labels >= 0).sum())
    counted = [known * (name in shares) for name in names]
    false = [known * shares.get(name, 0.0) for name in names]
    sums = mean_over_ranks(torch.tensor([counted, false], dtype=torch.float64, device=labels.device))
    return {name: part / whole for name, whole, part in zip(names, *sums.tolist(), strict=True) if whole}


class SupervisedObjective:
    """Cross-entropy on labels, with the same views: the supervised upper bound."""

    metric_names: tuple[str, ...] = ("loss", "accuracy")

    def __init__(self, run: PretrainRun, recipe: Supervised, split: StoredSplit, num_classes: int) -> None:
        self._epochs = recipe.epochs
        self._split, self._augmentation, self._num_classes = split, run.augmentation, num_classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            # Statistics of the whole batch, whatever the number of processes.
            self._backbone = build(run.encoder, SharedBatchNorm2d)
            classifier = nn.Linear(self._backbone.num_features, num_classes)
        self.module: nn.Module = nn.Sequential(self._backbone, classifier)
        self._graph_requested = False
        self.num_images = int((split.labels >= 0).sum())
        self._seed = run.seed

    @property
    def backbone(self) -> Backbone:
        """The classifier without its last layer."""
        return self._backbone

    @property
    def head(self) -> nn.Module | None:
        """None: there is no projection head."""
        return None

    def batches(self, loading: Loading, epoch: int, first_step: int) -> Iterator[Images]:
        """One view of every labelled image."""
        return one_view(
            self._split,
            self._augmentation,
            loading,
            seed=self._seed,
            epoch=epoch,
            first_step=first_step,
            epochs=self._epochs - epoch,
        )

    def loss(self, batch: Images, epoch: int, step: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Cross-entropy in float32."""
        if not self._graph_requested:
            use_cuda_graph(self.module, batch.images)
            self._graph_requested = True
        logits = self.module(batch.images).float()
        loss = F.cross_entropy(logits, batch.labels)
        accuracy = (logits.argmax(1) == batch.labels).float().mean()
        return loss, torch.stack((loss.detach(), accuracy))

    def after_update(self, *, last_of_epoch: bool) -> None:
        """Nothing to do."""

    def describe_epoch(self, epoch: int) -> dict[str, Any]:  # noqa: ARG002
        """Chance level (the loss of uniform guessing, nats)."""
        return {"chance": math.log(self._num_classes)}

    def matching(self, epoch: int) -> list[float]:  # noqa: ARG002
        """None: there are no negatives."""
        return []
