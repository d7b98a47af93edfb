"""Annotated images as batches. What a batch holds is a function of (seed, its number) alone.

So a resumed training continues with exactly the batches it would have had, and no generator's state
needs to be kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mochi.data.ingest.decode import UnreadableError, open_image, to_rgb
from mochi.data.views.augment import IMAGENET_MEAN, IMAGENET_STD
from mochi.detection.annotations import AnnotatedImage, AnnotationError, Annotations
from mochi.detection.check_images import misfit
from mochi.detection.coco import decode_masks
from mochi.runtime.seeding import numpy_generator

# On the scale of bytes; MoCo's configurations give detectron2 the same.
_MEAN = torch.tensor([255 * mean for mean in IMAGENET_MEAN])[:, None, None]
_STD = torch.tensor([255 * std for std in IMAGENET_STD])[:, None, None]

# Below this many pixels a side no anchor or region can match a box.
_SMALLEST_SIDE = 1e-2

_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Item:
    """One image, resized, with its objects in the resized image's coordinates."""

    index: int
    flipped: bool
    image: Tensor  # (3, h, w) uint8
    boxes: Tensor  # (n, 4)
    labels: Tensor  # (n,)
    masks: Tensor | None  # (n, h, w) uint8
    vanished: int
    """Objects whose boxes the resizing left without an area; they are not among the n."""


@dataclass(frozen=True)
class Batch:
    """Images side by side, padded with zeros after normalisation."""

    images: Tensor  # (B, 3, H, W) float32
    sizes: list[tuple[int, int]]
    items: Sequence[Item]

    def targets(self, device: torch.device) -> list[dict[str, Tensor]]:
        """Ground truth on `device`, masks padded like the images."""
        height, width = self.images.shape[-2:]
        targets = []
        for item in self.items:
            target = {"boxes": item.boxes.to(device), "labels": item.labels.to(device)}
            if item.masks is not None:
                padding = (0, width - item.masks.shape[-1], 0, height - item.masks.shape[-2])
                target["masks"] = F.pad(item.masks, padding).to(device)
            targets.append(target)
        return targets


def resized(height: int, width: int, short_side: int, longest: int) -> tuple[int, int]:
    """The size of an image whose short side becomes `short_side`, unless its long side passes `longest`.

    Source: detectron2 data/transforms/augmentation_impl.py ResizeShortestEdge.
    """
    scale = short_side / min(height, width)
    scale = min(scale, longest / max(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


class Images:
    """Decoded images of a split; small splits stay in memory."""

    def __init__(self, annotations: Annotations, keep: bool = True) -> None:
        self.annotations = annotations
        self.of_one_size = len({(image.height, image.width) for image in annotations.images}) == 1
        size = sum(3 * image.height * image.width for image in annotations.images)
        self._cache: dict[int, NDArray[np.uint8]] | None = {} if keep and size <= _CACHE_BYTES else None

    def item(self, index: int, short_side: int, longest: int, flipped: bool) -> Item:
        """Image `index`, resized and perhaps mirrored.

        Raises:
            AnnotationError: the image cannot be decoded or is not of the annotated size.
        """
        annotated = self.annotations.images[index]
        pixels = self._pixels(index, annotated)
        height, width = resized(annotated.height, annotated.width, short_side, longest)
        if (height, width) != pixels.shape[:2]:
            small = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(small)
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)  # (3, h, w)
        ratio = torch.tensor([width / annotated.width, height / annotated.height]).repeat(2)
        boxes = torch.from_numpy(annotated.boxes) * ratio
        masks = None
        if annotated.masks is not None:
            full = torch.from_numpy(decode_masks(annotated.masks, annotated.height, annotated.width))
            masks = F.interpolate(full[None], (height, width), mode="nearest")[0] if len(full) else full
            masks = masks.reshape(-1, height, width)
        if flipped:
            image = image.flip(-1)
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
            masks = None if masks is None else masks.flip(-1)
        kept = ((boxes[:, 2:] - boxes[:, :2]) >= _SMALLEST_SIDE).all(dim=1)
        labels = torch.from_numpy(annotated.labels)[kept]
        masks = None if masks is None else masks[kept]
        return Item(index, flipped, image, boxes[kept], labels, masks, int((~kept).sum()))

    def _pixels(self, index: int, annotated: AnnotatedImage) -> NDArray[np.uint8]:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        pixels = read_rgb(annotated.path)
        if reason := misfit(annotated, *pixels.shape[:2]):
            raise AnnotationError(reason)
        if self._cache is not None:
            self._cache[index] = pixels
        return pixels


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) of an image file, upright, grey and palettes converted.

    Raises:
        AnnotationError: not readable; path and reason are named.
    """
    try:
        return np.asarray(to_rgb(open_image(path.read_bytes())))
    except (OSError, UnreadableError) as error:
        raise AnnotationError(f"{path}: cannot be read as an image: {error}") from None


def collate(items: Sequence[Item], stride: int) -> Batch:
    """Normalise, pad to a common multiple of the stride."""
    height, width = (
        -(-max(item.image.shape[axis] for item in items) // stride) * stride for axis in (1, 2)
    )
    images = torch.zeros(len(items), 3, height, width)
    sizes = []
    for slot, item in zip(images, items, strict=True):
        h, w = item.image.shape[1:]
        slot[:, :h, :w] = (item.image - _MEAN) / _STD
        sizes.append((h, w))
    return Batch(images.contiguous(memory_format=torch.channels_last), sizes, items)


class TrainingItems(Dataset[list[Item]]):
    """Micro-batch number -> its items: shuffled, wide and tall apart, resized and mirrored at random.

    Every image is seen once an epoch; an epoch's last micro-batch is filled up from its beginning. Wide
    and tall images are kept apart, as in detectron2, so that little of a batch is padding.
    """

    def __init__(
        self, images: Images, micro_batch: int, sizes: Sequence[int], longest: int, flip: bool, seed: int
    ) -> None:
        self._images, self._micro_batch, self._seed = images, micro_batch, seed
        self._sizes, self._longest, self._flip = sizes, longest, flip
        self._wide = np.array([image.width > image.height for image in images.annotations.images])
        self.per_epoch = -(-len(self._wide) // micro_batch)
        self._epoch: tuple[int, NDArray[np.int64]] = (-1, np.zeros((0, 0), np.int64))

    def indices(self, number: int) -> NDArray[np.int64]:
        """(micro_batch,) images of micro-batch `number`, counted through all epochs."""
        epoch, place = divmod(number, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffle(epoch))
        chosen: NDArray[np.int64] = self._epoch[1][place]
        return chosen

    def _shuffle(self, epoch: int) -> NDArray[np.int64]:
        """(per_epoch, micro_batch)."""
        rng = numpy_generator("detection epoch", self._seed, epoch)
        order = rng.permutation(len(self._wide))
        size = self._micro_batch
        groups, rest = [], []
        for side in (order[self._wide[order]], order[~self._wide[order]]):
            whole = len(side) // size * size
            groups.append(side[:whole].reshape(-1, size))
            rest.append(side[whole:])
        mixed = np.concatenate(rest)
        mixed = np.concatenate([mixed, np.resize(order, -len(mixed) % size)])
        rows = np.concatenate([*groups, mixed.reshape(-1, size)])
        return rows[rng.permutation(len(rows))]

    def __getitem__(self, number: int) -> list[Item]:
        rng = numpy_generator("detection batch", self._seed, number)
        return [
            self._images.item(
                int(index),
                int(rng.choice(self._sizes)),
                self._longest,
                bool(self._flip and rng.random() < 0.5),
            )
            for index in self.indices(number)
        ]


def stream(dataset: TrainingItems, numbers: Sequence[int], workers: int) -> Iterator[list[Item]]:
    """The micro-batches of `numbers` in order, read ahead by `workers` processes."""
    if workers == 0:
        return (dataset[number] for number in numbers)
    loader: Any = DataLoader(
        dataset, batch_size=None, sampler=numbers, num_workers=workers, collate_fn=_unchanged
    )
    return iter(loader)


def _unchanged(items: list[Item]) -> list[Item]:
    return items
