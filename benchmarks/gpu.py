"""Time each part of the pipeline on one GPU, in under eight minutes and without a data set.

`python -m benchmarks.gpu` prints tables and writes them to a JSON file named after the GPU. `--small` runs
small sizes on a CPU to test the script; its numbers mean nothing.
"""

import json
import os
import re
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks import negatives, step
from benchmarks.data.pictures import make_pictures, prepared
from benchmarks.harness import Measurement, Rounds, compare, conditions, table
from mochi import encoders
from mochi.config import Experiment, load_experiment
from mochi.data.format import StoredDataset, open_dataset
from mochi.data.views.loading import Loading, two_views
from mochi.detection.model import build as build_detector
from mochi.evaluation.tasks.linear import LinearProbe
from mochi.evaluation.tasks.linear.training import Probes
from mochi.runtime.cuda_graphs import use_cuda_graph
from mochi.runtime.distributed import pick_device
from mochi.runtime.precision import autocast, make_deterministic


@dataclass(frozen=True)
class Sizes:
    """Sizes of all inputs and models."""

    num_images: int = 1024
    num_epochs: int = 16
    """How often the images are loaded."""
    image_size: int = 224
    """Side of a view in pixels."""
    batch: int = 256
    bn_groups: int = 8
    queue: int = 65536
    mixing: tuple[int, int, int] = (1024, 512, 256)
    """N, s, s'."""
    width: int = 64
    num_features: int = 2048
    num_classes: int = 1000
    detection_images: int = 16
    """Images in a batch of the detector."""
    detection_size: tuple[int, int] = (800, 1216)
    """Height and width in pixels."""
    proposals: tuple[int, int] = (12000, 2000)
    """Per image, before and after non-maximum suppression."""


SMALL = Sizes(
    num_images=32,
    num_epochs=2,
    image_size=32,
    batch=16,
    bn_groups=2,
    queue=64,
    mixing=(16, 8, 4),
    width=8,
    num_features=32,
    num_classes=10,
    detection_images=2,
    detection_size=(64, 96),
    proposals=(50, 10),
)


def main(
    rounds: Rounds = 10,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file.")] = Path("benchmarks/results"),
    workers: Annotated[int | None, typer.Option(help="Loading processes. Default: cores - 1.")] = None,
    small: Annotated[
        bool, typer.Option("--small", help="Small sizes, to test the script on a CPU.")
    ] = False,
) -> None:
    """Measure training steps, the loss, loading, probe and detection on one GPU."""
    device = pick_device()
    if device.type != "cuda" and not small:
        raise typer.BadParameter("found no GPU; expected one, or --small to try the script on a CPU")
    make_deterministic()
    before = conditions(device)
    print(before)
    found = run(
        device,
        SMALL if small else Sizes(),
        rounds=rounds,
        workers=max((os.cpu_count() or 1) - 1, 0) if workers is None else workers,
    )
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{re.sub(r'[^a-z0-9]+', '-', card.lower())}.json"
    path.write_text(json.dumps({"conditions": before, "tables": found}, indent=1) + "\n")
    print(f"\n{path}")


def run(device: torch.device, sizes: Sizes, *, rounds: int, workers: int) -> dict[str, Any]:
    """Measure everything and print each table when it is done; returns title -> table."""
    found: dict[str, Any] = {}

    def show(title: str, rows: list[Measurement], items: int, unit: str) -> None:
        print("", title, *table(rows, items=items, unit=unit), sep="\n", flush=True)
        found[title] = {"items": items, "unit": unit, "rows": [row._asdict() for row in rows]}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pictures(folder, sizes.num_images)
        jpegs, pixels = _dataset(folder, "photos"), _dataset(folder, "small")
        rows = _training(_resnet50(sizes), jpegs, device, rounds)
        show(f"ResNet-50 step, {sizes.image_size} px", rows, sizes.batch, "images")
        print(_compared_with_bound(rows))
        rows = _training(_cifar(sizes), pixels, device, rounds)
        show("ResNet-18 step, 32 px", rows, sizes.batch, "images")
        rows = negatives.run(_loss_sizes(sizes), rounds=rounds, device=device)
        show("Loss and gradient", rows, sizes.batch, "queries")
        count = sizes.num_images // sizes.batch * sizes.batch * sizes.num_epochs
        show("Loading from JPEG", [_loading(jpegs, sizes, device, rounds, workers)], count, "images")
    show("Linear probe step", [_probe(sizes, device, rounds)], sizes.batch, "images")
    show("Detection step", [_detection(sizes, device, rounds)], sizes.detection_images, "images")
    return found


def _compared_with_bound(rows: list[Measurement]) -> str:
    """MoCo-v2's rate as a fraction of its upper bound, 3/4 of the rate of a supervised step.

    MoCo-v2 has one more forward pass, of the momentum encoder, and a backward pass takes as long as two.
    """
    supervised = rows[-1]
    fraction = statistics.median(supervised.ratios) / (3 / 4)
    return f"MoCo-v2 reaches {fraction:.0%} of its upper bound: three quarters of the supervised rate"


def _loss_sizes(sizes: Sizes) -> negatives.Sizes:
    num_hardest, num_pairs, num_query = sizes.mixing
    return negatives.Sizes(
        batch=sizes.batch,
        queue=sizes.queue,
        num_hardest=num_hardest,
        num_pair_synthetics=num_pairs,
        num_query_synthetics=num_query,
    )


def _dataset(folder: Path, name: str) -> StoredDataset:
    prepared(folder, name)
    return open_dataset(folder / "data" / name)


def _resnet50(sizes: Sizes) -> Experiment:
    """MoCo-v2 and MoCHi with the settings of the paper's ImageNet experiment."""
    return _resized_experiment("config/imagenet1k.yaml", sizes, sizes.image_size)


def _cifar(sizes: Sizes) -> Experiment:
    return _resized_experiment("config/cifar10.yaml", sizes, 32)


def _resized_experiment(config: str, sizes: Sizes, image_size: int) -> Experiment:
    experiment = load_experiment(Path(config))
    mixing = {"rule": "mochi", **_loss_sizes(sizes).mixing()}
    shared = {"batch_size": sizes.batch, "queue_size": sizes.queue, "bn_groups": sizes.bn_groups}
    return experiment.model_copy(
        update={
            "pretrain": experiment.pretrain | shared,
            "methods": {"moco-v2": {}, "mochi-{}-{}-{}".format(*sizes.mixing): {"negatives": mixing}},
            "encoder": experiment.encoder.model_copy(update={"width": sizes.width}),
            "augmentation": experiment.augmentation.model_copy(update={"image_size": image_size}),
        }
    )


def _training(
    experiment: Experiment, dataset: StoredDataset, device: torch.device, rounds: int
) -> list[Measurement]:
    """Steps of both methods on a batch already in memory, their parts, and a supervised step."""
    more = {"supervised step": partial(_supervised, experiment, device)}
    return step.run(experiment, dataset, rounds=rounds, device=device, same_batch=True, more=more)


def _supervised(experiment: Experiment, device: torch.device) -> Callable[[], object]:
    """Forward and backward of one encoder with plain batch normalisation, without an optimizer."""
    backbone = encoders.build(experiment.encoder)
    module = nn.Sequential(backbone, nn.Linear(backbone.num_features, 1000)).to(device)
    module.to(memory_format=torch.channels_last)
    side, batch = experiment.augmentation.image_size, experiment.pretrain["batch_size"]
    images = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    with autocast(device, "auto"):
        use_cuda_graph(module, images)

    def work() -> None:
        with autocast(device, "auto"):
            logits = module(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()

    return work


def _loading(
    dataset: StoredDataset, sizes: Sizes, device: torch.device, rounds: int, workers: int
) -> Measurement:
    """Two views of every image, several times by the same workers, whose start is included."""
    split = dataset.split("train")
    augmentation = _resnet50(sizes).augmentation
    loading = Loading(sizes.batch, device, workers)

    def work() -> None:
        for _ in two_views(split, augmentation, loading, seed=0, epoch=0, epochs=sizes.num_epochs):
            pass

    return compare({f"{workers} workers": work}, rounds=rounds, device=device)[0]


def _probe(sizes: Sizes, device: torch.device, rounds: int) -> Measurement:
    """A step of the linear probe's classifiers on features already in memory."""
    experiment = load_experiment(Path("config/imagenet1k.yaml"))
    protocol = experiment.evaluation.tasks["linear"]
    assert isinstance(protocol, LinearProbe)
    probes = Probes(protocol, sizes.num_features, sizes.num_classes, 0).to(device)
    features = torch.randn(sizes.batch, sizes.num_features, device=device)
    labels = torch.zeros(sizes.batch, dtype=torch.long, device=device)
    held_out = torch.arange(sizes.batch, device=device) % 10 == 0
    probes.start_epoch(0)
    return compare(
        {"probe": lambda: probes.step(features, labels, held_out)}, rounds=rounds, device=device
    )[0]


def _detection(sizes: Sizes, device: torch.device, rounds: int) -> Measurement:
    """Forward and backward of Faster R-CNN C4, eight boxes per image.

    As in the stage, without deterministic kernels: those of RoIAlign need too much memory.
    """
    torch.use_deterministic_algorithms(mode=False)
    experiment = load_experiment(Path("config/imagenet1k.yaml"))
    settings = experiment.evaluation.detection["voc0712"].model.model_copy(
        update={
            "proposals_train": list(sizes.proposals),
            "rpn_batch": 256,
            "roi_batch": min(512, sizes.proposals[1]),
        }
    )
    encoder = experiment.encoder.model_copy(update={"width": sizes.width})
    detector = build_detector(encoder, 20, settings).to(device).to(memory_format=torch.channels_last)
    detector.train()
    height, width = sizes.detection_size
    count = sizes.detection_images
    images = torch.randn(count, 3, height, width, device=device).to(memory_format=torch.channels_last)
    corner = torch.rand(8, 2, device=device) * torch.tensor([width / 2, height / 2], device=device)
    boxes = torch.cat([corner, corner + 0.4 * min(height, width)], 1)
    targets = [
        {"boxes": boxes, "labels": torch.ones(8, dtype=torch.long, device=device)} for _ in range(count)
    ]

    def work() -> None:
        with autocast(device, "auto"):
            losses: dict[str, Tensor] = detector(images, [(height, width)] * count, targets)
        torch.stack(list(losses.values())).sum().backward()

    return compare({"detection": work}, rounds=rounds, device=device)[0]


if __name__ == "__main__":
    typer.run(main)
