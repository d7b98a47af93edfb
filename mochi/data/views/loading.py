"""Batches of views, in an order that is a pure function of (seed, epoch).

Sets stored as pixels stand on the device as one uint8 tensor and are cropped there. Of the others each
image is decoded once by a worker, which also cuts all its crops (uint8); everything photometric is done
in batch, on an accelerator or, without one, by the workers. Neither the number of workers nor a resume
changes a single value.
"""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mochi.config import Augmentation
from mochi.data.format import DataError, StoredSplit
from mochi.data.ingest.decode import open_image
from mochi.data.views import augment, crops
from mochi.data.views import counter_rng as draws

_LOG = logging.getLogger(__name__)
_SHARED = Path("/dev/shm")  # noqa: S108 - its free space is asked for

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Views:
    """Two views of one batch of this rank."""

    query: Tensor
    """(B, 3, S, S) float32, ImageNet-normalised, channels last, on the device."""
    key: Tensor
    """(B, 3, S, S), the other view of the same images."""
    labels: Tensor
    """(B,) int64 on the device, -1 unlabelled."""
    indices: Tensor
    """(B,) int64 on the CPU: rows of the split."""


@dataclass(frozen=True)
class Images:
    """One view of one batch of this rank; fields as in `Views`."""

    images: Tensor
    labels: Tensor
    indices: Tensor


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Whole batches in an epoch; the short last one is dropped. `batch_size` counts all ranks.

    Raises:
        DataError: not one whole batch.
    """
    if batch_size > num_images:
        raise DataError(
            f"batch_size: found {batch_size}; the set has {num_images} images; lower batch_size"
        )
    return num_images // batch_size


def two_views(
    split: StoredSplit,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    device: torch.device,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Views]:
    """Query and key of every image, labelled or not, from step `first_step` of the epoch on.

    Raises:
        DataError: the batch is larger than the set, or does not divide by the ranks.
    """
    rows = np.arange(len(split))
    batches = _shuffled(
        rows,
        batch_size,
        seed=seed,
        epoch=epoch,
        first_step=first_step,
        rank=rank,
        world_size=world_size,
    )
    cut = _RandomCrops(augmentation.image_size, augmentation.min_scale, seed, epoch, views=2)
    finish = partial(_photometric, augmentation=augmentation, seed=seed, epoch=epoch)
    for chosen, (query, key) in _finished(split, batches, cut, finish, device, workers):
        yield Views(query, key, *_labels(split, chosen, device))


def one_view(
    split: StoredSplit,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    device: torch.device,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Images]:
    """One augmented view of the labelled images, for supervised training. Raises as `two_views`."""
    batches = _shuffled(
        split.labelled,
        batch_size,
        seed=seed,
        epoch=epoch,
        first_step=first_step,
        rank=rank,
        world_size=world_size,
    )
    cut = _RandomCrops(augmentation.image_size, augmentation.min_scale, seed, epoch, views=1)
    finish = partial(_photometric, augmentation=augmentation, seed=seed, epoch=epoch)
    for chosen, (images,) in _finished(split, batches, cut, finish, device, workers):
        yield Images(images, *_labels(split, chosen, device))


def random_crops(
    split: StoredSplit,
    *,
    image_size: int,
    min_scale: float,
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    device: torch.device,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Images]:
    """Random-resized crops and flips of the labelled images, for a linear probe. Raises as `two_views`."""
    batches = _shuffled(
        split.labelled,
        batch_size,
        seed=seed,
        epoch=epoch,
        first_step=first_step,
        rank=rank,
        world_size=world_size,
    )
    cut = _RandomCrops(image_size, min_scale, seed, epoch, views=1)
    for chosen, (images,) in _finished(split, batches, cut, _plain, device, workers):
        yield Images(images, *_labels(split, chosen, device))


def centre_crops(
    split: StoredSplit,
    *,
    resize: int,
    image_size: int,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Images]:
    """The labelled images, each exactly once over all ranks, in order: short side `resize`, centre crop."""
    rows = split.labelled
    batches = (
        np.array_split(rows[first : first + batch_size], world_size)[rank]
        for first in range(0, len(rows), batch_size)
    )
    cut = _CentreCrop(resize, image_size)
    filled = (batch for batch in batches if len(batch))
    for chosen, (images,) in _finished(split, filled, cut, _plain, device, workers):
        yield Images(images, *_labels(split, chosen, device))


def _shuffled(
    rows: Rows, batch_size: int, *, seed: int, epoch: int, first_step: int, rank: int, world_size: int
) -> Iterator[Rows]:
    """This rank's slice of every global batch of the epoch; every rank has the same number of steps."""
    steps = steps_per_epoch(len(rows), batch_size)
    if batch_size % world_size:
        raise DataError(
            f"batch_size: found {batch_size} over {world_size} ranks; it must divide by them; "
            f"choose {batch_size // world_size * world_size or world_size}"
        )
    order = rows[draws.permutation(len(rows), "order", seed, epoch)]
    share = batch_size // world_size
    for step in range(first_step, steps):
        first = step * batch_size + rank * share
        yield order[first : first + share]


def _photometric(
    images: Tensor, rows: Rows, view: int, *, augmentation: Augmentation, seed: int, epoch: int
) -> Tensor:
    """The crops of one view, augmented and normalised."""
    parameters = augment.draw(augmentation, rows, seed=seed, epoch=epoch, view=view)
    return augment.photometric(images, parameters, augmentation.version, _output_for(images))


def _plain(images: Tensor, rows: Rows, view: int) -> Tensor:
    """Crops that are only normalised."""
    del rows, view
    return augment.normalize(images, _output_for(images))


def _output_for(images: Tensor) -> Tensor | None:
    """On a worker, shared memory: the main process then needs no copy (as in torch's default_collate)."""
    if get_worker_info() is None:
        return None
    storage = torch.UntypedStorage._new_shared(images.numel() * torch.float32.itemsize)
    flat = torch.empty(0).set_(storage)
    return flat.view(images.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


def _labels(split: StoredSplit, rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(split.labels[rows]).to(device), torch.from_numpy(rows)


# ---------------------------------------------------------------- crops


class _RandomCrops:
    """`views` random-resized crops and flips of each image."""

    def __init__(self, size: int, min_scale: float, seed: int, epoch: int, views: int) -> None:
        self.size, self.views = size, views
        self._draw = partial(crops.draw, min_scale=min_scale, seed=seed, epoch=epoch)

    def of_pixels(self, pixels: Tensor, rows: Rows) -> list[Tensor]:
        """(B, H, W, 3) uint8 -> for each view (B, 3, S, S) float32 in [0, 1]."""
        count, height, width, _ = pixels.shape
        sides = np.full(count, height), np.full(count, width)
        placed = (self._draw(rows, *sides, view=view) for view in range(self.views))
        return [crops.crop_resize(pixels, windows, flip, self.size) for windows, flip in placed]

    def of_split(self, split: StoredSplit, rows: Rows) -> Tensor:
        """Rows of an encoded split, each decoded once -> (views, B, 3, S, S) uint8."""
        sides = split.heights[rows].astype(np.int64), split.widths[rows].astype(np.int64)
        placed = [self._draw(rows, *sides, view=view) for view in range(self.views)]
        output = torch.empty(self.views, len(rows), 3, self.size, self.size, dtype=torch.uint8)
        for number, row in enumerate(rows.tolist()):
            image = decode_rgb(split, row)
            for view, (windows, flips) in enumerate(placed):
                output[view, number] = crops.crop_image(image, windows[number], flips[number], self.size)
        return output


class _CentreCrop:
    """Short side to `resize`, then the central square of `size`."""

    views = 1

    def __init__(self, resize: int, size: int) -> None:
        self.resize, self.size = resize, size

    def of_pixels(self, pixels: Tensor, rows: Rows) -> list[Tensor]:
        """(B, H, W, 3) uint8 -> one view (B, 3, S, S) float32 in [0, 1]."""
        assert len(rows) == len(pixels)
        return [crops.centre_resize(pixels, self.resize, self.size)]

    def of_split(self, split: StoredSplit, rows: Rows) -> Tensor:
        """Rows of an encoded split -> (1, B, 3, S, S) uint8."""
        images = (decode_rgb(split, row) for row in rows.tolist())
        return torch.stack([crops.centre_image(image, self.resize, self.size) for image in images])[None]


_Cut = _RandomCrops | _CentreCrop


def decode_rgb(split: StoredSplit, row: int) -> Tensor:
    """A stored JPEG or PNG as (3, H, W) uint8, by the decoder that has checked it.

    Raises:
        DataError: it no longer decodes, so its shard was damaged since; image and folder are named.
    """
    try:
        image = open_image(split.encoded(row))
        # `convert` would copy an image that is RGB already.
        upright = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow's JPEG and PNG readers raise
        raise DataError(
            f"{split.folder}: {split.path(row)} (row {row} of {split.name}) no longer decodes: {error}; "
            "a shard was damaged: see which with `python -m mochi check --verify`, and prepare again"
        ) from None
    return torch.from_numpy(upright).permute(2, 0, 1)


_Finish = Callable[[Tensor, Rows, int], Tensor]
"""(crops (B, 3, S, S), rows, number of the view) -> the view: colour, blur, normalisation."""


def _finished(
    split: StoredSplit,
    batches: Iterator[Rows],
    cut: _Cut,
    finish: _Finish,
    device: torch.device,
    workers: int,
) -> Iterator[tuple[Rows, list[Tensor]]]:
    """Each batch's rows with its views (B, 3, S, S), float32 and normalised, on the device.

    Pixels are cropped on the device. Encoded images are cropped by the workers and finished on the device;
    where that is a CPU the workers finish them too, for they are its cores.
    """
    pixels = pixels_on(split, device)
    if pixels is not None:
        for rows in batches:
            crops_of_views = cut.of_pixels(pixels[torch.from_numpy(rows).to(device)], rows)
            yield rows, [finish(images, rows, view) for view, images in enumerate(crops_of_views)]
        return
    on_workers = device.type == "cpu"
    first = next(batches, None)
    if first is None:
        return
    batch_bytes = cut.views * len(first) * 3 * cut.size**2 * (4 if on_workers else 1)
    workers, ahead = _fitting(workers, batch_bytes)
    loader: DataLoader[tuple[Tensor, list[Tensor]] | DataError] = DataLoader(
        _Decoded(split, cut, finish if on_workers else None),
        sampler=chain([first], batches),
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=ahead,
    )
    for loaded in loader:
        if isinstance(loaded, DataError):
            raise loaded
        index, views = loaded
        rows = index.numpy()
        moved = [images.to(device, non_blocking=True) for images in views]
        yield rows, moved if on_workers else [finish(m, rows, view) for view, m in enumerate(moved)]


_AHEAD = 4


def _fitting(workers: int, batch_bytes: int) -> tuple[int, int | None]:
    """(workers, batches each prepares ahead): as many as shared memory has room for beside two in use.

    A container has 64 MiB of it unless it is told otherwise, and a worker that wants more dies.
    """
    if workers == 0:
        return 0, None
    room = max(_free_shared_memory() // batch_bytes - 2, 0)
    fitting = min(workers, room)
    ahead = min(_AHEAD, room // fitting) if fitting else None
    if (fitting, ahead) != (workers, _AHEAD):
        _warn_once(
            f"{_SHARED} has room for {fitting} of {workers} loading workers, each {ahead or 0} of {_AHEAD} "
            "batches ahead; give it more (--ipc=host or --shm-size=16g for a container)"
        )
    return fitting, ahead


def _free_shared_memory() -> int:
    """Bytes for this process; the ranks of a host share them."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return shutil.disk_usage(_SHARED).free // ranks if _SHARED.exists() else sys.maxsize


@cache
def _warn_once(text: str) -> None:
    _LOG.warning("%s", text)


class _Decoded(Dataset[tuple[Tensor, list[Tensor]] | DataError]):
    """On a worker: rows -> the rows and each view's crops, uint8 or finished; one decode an image.

    An error for the user is handed over, for DataLoader would bury what is raised under a traceback.
    """

    def __init__(self, split: StoredSplit, cut: _Cut, finish: _Finish | None) -> None:
        self.split, self.cut, self.finish = split, cut, finish

    def __getitem__(self, rows: Rows) -> tuple[Tensor, list[Tensor]] | DataError:
        try:
            views = list(self.cut.of_split(self.split, rows))
        except DataError as error:
            return error
        if self.finish is not None:
            views = [self.finish(images, rows, view) for view, images in enumerate(views)]
        return torch.from_numpy(rows), views


def pixels_on(split: StoredSplit, device: torch.device) -> Tensor | None:
    """A split's pixels (N, H, W, 3) uint8 on the device, brought there once; None if stored encoded."""
    if split.pixels is None:
        return None
    held = _HELD.get(split)
    if held is None or held.device != device:
        # Mapped copy-on-write: torch wants writable memory, and on a CPU the file's own pages serve.
        path = split.folder / f"{split.name}-images.npy"
        held = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False)).to(device)
        _HELD[split] = held
    return held


_HELD: WeakKeyDictionary[StoredSplit, Tensor] = WeakKeyDictionary()
