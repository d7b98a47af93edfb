"""Features of a frozen encoder, and the proof that it stayed frozen."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mochi import config
from mochi.data.format import DataError, StoredDataset
from mochi.data.views.loading import Images, centre_crops
from mochi.encoders.resnet import ResNet
from mochi.errors import UserError
from mochi.runtime.precision import autocast, use_bfloat16

# A run resolved for an evaluation does not say in which format its encoder was trained.
_PRECISION = "auto"


class EncoderError(UserError):
    """An encoder file that does not fit the run."""


def load_encoder(path: Path, encoder: config.Encoder, device: torch.device) -> ResNet:
    """The encoder in `path`, in evaluation mode, every tensor accounted for.

    Raises:
        EncoderError: the file is absent or unreadable, or its tensors are not the run's architecture's.
    """
    if not path.exists():
        raise EncoderError(f"{path}: no such encoder; run the pretrain stage of this run first")
    model = ResNet(encoder)
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise EncoderError(
            f"{path}: cannot be read as safetensors: {error}; expected an encoder that `pretrain` wrote"
        ) from None
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        rows = [
            f"  {name}: expected {_shape(expected.get(name))}, found {_shape(found.get(name))}"
            for name in wrong[:10]
        ]
        raise EncoderError(
            f"{path} is not a {encoder.architecture} with stem {encoder.stem} and width {encoder.width}; "
            f"{len(wrong)} tensors differ:\n" + "\n".join(rows)
        )
    model.load_state_dict(weights)
    model.requires_grad_(requires_grad=False)
    return model.to(device).to(memory_format=torch.channels_last).eval()


def _shape(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else str(list(shape))


def encoder_digest(encoder: ResNet) -> str:
    """sha256 over every parameter and buffer, batch-norm statistics included."""
    total = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        total.update(name.encode())
        total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class Features(NamedTuple):
    """Features of the labelled images of train and val, each image once and uncropped."""

    train: Tensor  # (M, D) float32
    train_labels: Tensor  # (M,)
    val: Tensor  # (V, D)
    val_labels: Tensor  # (V,)


def extract_splits(
    evaluation: config.Evaluation, dataset: StoredDataset, encoder: ResNet, workers: int
) -> Features:
    """Features of train and val under the evaluation's transform, on the encoder's device.

    Raises:
        DataError: one of them is missing, or has no labelled image.
    """
    device = next(encoder.parameters()).device
    parts: list[Tensor] = []
    for name in ("train", "val"):
        split = dataset.split(name)
        if not len(split.labelled):
            raise DataError(
                f"{dataset.folder}: found 0 labelled images in {name}; a probe needs some; bring them, or "
                "remove linear and knn from the experiment"
            )
        crops = centre_crops(
            split,
            resize=evaluation.resize,
            image_size=evaluation.image_size,
            batch_size=evaluation.batch_size,
            device=device,
            workers=workers,
        )
        parts += extract(encoder, crops)
    return Features(*parts)


@torch.inference_mode()
def extract(encoder: ResNet, batches: Iterable[Images]) -> tuple[Tensor, Tensor]:
    """Features (M, D) float32 and labels (M,) of every image of `batches`, on the encoder's device."""
    features, labels = [], []
    for batch in batches:
        with autocast(batch.images.device, _PRECISION):
            features.append(encoder(batch.images).float())
        labels.append(batch.labels)
    return torch.cat(features).clone(), torch.cat(labels).clone()


def precision_on(device: torch.device) -> str:
    """The number format in which `extract` runs an encoder there, for provenance."""
    return "bfloat16" if use_bfloat16(device, _PRECISION) else "float32"
