"""Annotated images as batches.

A batch is a function of (seed, its number) only, so a resumed run continues with exactly the same batches,
and no generator state needs to be saved.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mochi.data.ingest.decode import UnreadableError, open_image, to_rgb
from mochi.detection.annotations import AnnotatedImage, AnnotationError, Annotations
from mochi.detection.check_images import misfit
from mochi.detection.coco import decode_masks
from mochi.pixels import IMAGENET_MEAN, IMAGENET_STD
from mochi.runtime.limits import make_room_for_workers
from mochi.runtime.seeding import numpy_generator
from mochi.runtime.shared_memory import fitting_workers
from mochi.runtime.transfer import arrays_to, to_device
from mochi.runtime.watchdog import LOOK_SECONDS, Pulse, end_worker_that_cannot_send, watched

Target = dict[str, Tensor]

# For pixels in 0 to 255; as in MoCo's configurations for detectron2.
_MEAN = 255 * np.array(IMAGENET_MEAN, np.float32)
_STD = 255 * np.array(IMAGENET_STD, np.float32)

# Below this side in pixels no anchor or region can match a box.
_SMALLEST_SIDE = 1e-2

_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Item:
    """One image, resized, with its objects in the resized image's coordinates."""

    index: int
    flipped: bool
    image: Tensor  # (h, w, 3) uint8
    boxes: Tensor  # (n, 4)
    labels: Tensor  # (n,)
    masks: Tensor | None
    """(n, H, W) uint8, of the original image's size, because resizing would move their edges."""
    vanished: int
    """Objects whose boxes have no area after resizing; they are not among the n."""


@dataclass(frozen=True)
class Batch:
    """A batch of images as bytes, padded with zeros to the largest height and width.

    Source: detectron2's C4 backbone, which needs no multiple of its stride.
    """

    pixels: Tensor  # (B, H, W, 3) uint8
    sizes: list[tuple[int, int]]
    """(height, width) of each image without its padding."""
    indices: list[int]
    flipped: list[bool]
    objects: list[Target]
    """For each image boxes, labels and, with masks, masks, as in `Item`."""
    vanished: int

    def images(self, device: torch.device, positions: Sequence[int] | None = None) -> Tensor:
        """(B, 3, H, W) float32 on `device`, normalised; padding is zero after that.

        `positions`: of these images of the batch only.
        """
        chosen = range(len(self.sizes)) if positions is None else positions
        pixels = self.pixels if positions is None else self.pixels[list(positions)]
        mean, std = arrays_to(device, _MEAN, _STD)
        images = (to_device(pixels, device) - mean) / std
        for image, position in zip(images, chosen, strict=True):
            height, width = self.sizes[position]
            image[height:] = 0
            image[:, width:] = 0
        return images.permute(0, 3, 1, 2)  # channels last in memory

    def targets(self, device: torch.device) -> list[Target]:
        """Ground truth on `device`."""
        return [{name: to_device(tensor, device) for name, tensor in each.items()} for each in self.objects]

    def pin_memory(self) -> "Batch":
        """In pinned memory, from which a GPU copies without waiting; called by DataLoader."""
        objects = [{name: tensor.pin_memory() for name, tensor in each.items()} for each in self.objects]
        return replace(self, pixels=self.pixels.pin_memory(), objects=objects)


def resized_size(height: int, width: int, short_side: int, longest: int) -> tuple[int, int]:
    """The size of an image with short side `short_side`, unless its long side exceeds `longest`.

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
        """Image `index`, resized and optionally mirrored.

        Raises:
            AnnotationError: the image cannot be decoded or is not of the annotated size.
        """
        annotated = self.annotations.images[index]
        pixels = self._pixels(index, annotated)
        height, width = resized_size(annotated.height, annotated.width, short_side, longest)
        if (height, width) != pixels.shape[:2]:
            small = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(small)
        image = torch.from_numpy(pixels.copy())  # (h, w, 3)
        ratio = torch.tensor([width / annotated.width, height / annotated.height]).repeat(2)
        boxes = torch.from_numpy(annotated.boxes) * ratio
        masks = None
        if annotated.masks is not None:
            masks = torch.from_numpy(decode_masks(annotated.masks, annotated.height, annotated.width))
        if flipped:
            image = image.flip(1)
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
            masks = None if masks is None else masks.flip(-1)
        kept = ((boxes[:, 2:] - boxes[:, :2]) >= _SMALLEST_SIDE).all(dim=1)
        labels = torch.from_numpy(annotated.labels)[kept]
        masks = None if masks is None else masks[kept]
        return Item(index, flipped, image, boxes[kept], labels, masks, int((~kept).sum()))

    def largest(self, short_side: int, longest: int) -> int:
        """Bytes of the largest item, masks included."""
        sizes = [0]
        for image in self.annotations.images:
            height, width = resized_size(image.height, image.width, short_side, longest)
            sizes.append(3 * height * width + len(image.masks or ()) * image.height * image.width)
        return max(sizes)

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
        AnnotationError: not readable; the message has path and reason.
    """
    try:
        return np.asarray(to_rgb(open_image(path.read_bytes())))
    except (OSError, UnreadableError) as error:
        raise AnnotationError(f"{path}: cannot be read as an image: {error}") from None


def collate(items: Sequence[Item]) -> Batch:
    """Collate images."""
    sizes = [(item.image.shape[0], item.image.shape[1]) for item in items]
    pixels = torch.zeros(
        len(items), *(max(sides) for sides in zip(*sizes, strict=True)), 3, dtype=torch.uint8
    )
    for slot, item, (height, width) in zip(pixels, items, sizes, strict=True):
        slot[:height, :width] = item.image
    return Batch(
        pixels,
        sizes,
        [item.index for item in items],
        [item.flipped for item in items],
        [
            {"boxes": item.boxes, "labels": item.labels}
            | ({} if item.masks is None else {"masks": item.masks})
            for item in items
        ],
        sum(item.vanished for item in items),
    )


class TrainingItems:
    """Micro-batch number -> its items: shuffled, wide and tall separate, resized and mirrored at random.

    Every image is seen once per epoch; the last micro-batch of an epoch is filled from its beginning. Wide
    and tall images are separate, as in detectron2, so that batches have little padding.
    """

    def __init__(
        self, images: Images, micro_batch: int, sizes: Sequence[int], longest: int, flip: bool, seed: int
    ) -> None:
        self._images, self._micro_batch, self._seed = images, micro_batch, seed
        self._sizes, self._longest, self._flip = sizes, longest, flip
        self.batch_bytes = micro_batch * images.largest(max(sizes), longest)
        self._wide = np.array([image.width > image.height for image in images.annotations.images])
        self.per_epoch = -(-len(self._wide) // micro_batch)
        self._epoch: tuple[int, NDArray[np.int64]] = (-1, np.zeros((0, 0), np.int64))

    def indices(self, number: int) -> NDArray[np.int64]:
        """(micro_batch,) images of micro-batch `number`, counted through all epochs."""
        epoch, position = divmod(number, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffle(epoch))
        chosen: NDArray[np.int64] = self._epoch[1][position]
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


@dataclass(frozen=True)
class PlainItems:
    """Indices of images in a split -> its items, with one short side and not mirrored."""

    images: Images
    short_side: int
    longest: int

    def __getitem__(self, indices: Sequence[int]) -> list[Item]:
        return [self.images.item(index, self.short_side, self.longest, flipped=False) for index in indices]


class _Collated(Dataset[Batch | AnnotationError]):
    """On a worker. An error is returned: DataLoader would hide a raised one under a worker's traceback."""

    def __init__(self, items: Any, pulse: Pulse) -> None:
        self._items, self._pulse = items, pulse

    def __getitem__(self, key: Any) -> Batch | AnnotationError:
        self._pulse.beat()
        try:
            return collate(self._items[key])
        except AnnotationError as error:
            return error


def stream(
    items: Any, keys: Sequence[Any], workers: int, device: torch.device, batch_bytes: int
) -> Iterator[Batch]:
    """The batch of `items[key]` for each of `keys`, in order, read ahead by `workers` processes.

    Args:
        items: TrainingItems with numbers of micro-batches as keys, or PlainItems with indices of images.
        keys: what to load.
        workers: processes; fewer if shared memory is too small for batches of `batch_bytes`.
        device: of the batches; for a GPU they are pinned.
        batch_bytes: of the largest batch.

    Raises:
        AnnotationError: an image cannot be used.
        UserError: the workers hang.
    """
    workers, prefetch_factor = fitting_workers(workers, batch_bytes)
    if workers:
        make_room_for_workers()
    pulse = Pulse()
    loader: DataLoader[Batch | AnnotationError] = DataLoader(
        _Collated(items, pulse),
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        prefetch_factor=prefetch_factor,
        timeout=LOOK_SECONDS if workers else 0,
        worker_init_fn=end_worker_that_cannot_send,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the default one samples anchors and regions
    )
    for batch in watched(loader, pulse):
        if isinstance(batch, AnnotationError):
            raise batch
        yield batch
