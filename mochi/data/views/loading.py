"""Batches of views, in an order that is a pure function of (seed, epoch).

Data sets stored as pixels are kept on the device as one uint8 tensor and cropped there. In other sets a
worker decodes each image once and cuts all its crops (uint8); photometric operations run in batch, on an
accelerator or, without one, in the workers. Neither the number of workers nor a resume changes any value.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mochi.config import Augmentation
from mochi.data.format import StoredSplit
from mochi.data.views import augment, counter_rng
from mochi.data.views.stored_crops import CentreCrop, Crop, RandomCrops, Rows
from mochi.errors import DataError
from mochi.runtime.limits import make_room_for_workers
from mochi.runtime.shared_memory import fitting_workers
from mochi.runtime.transfer import prefetch, to_device
from mochi.runtime.watchdog import LOOK_SECONDS, Pulse, end_worker_that_cannot_send, watched


@dataclass(frozen=True)
class Loading:
    """How batches are loaded. Only the batch size affects values."""

    batch_size: int
    """Images of a batch over all ranks."""
    device: torch.device
    workers: int = 0
    """Processes of this rank that load images."""
    rank: int = 0
    world_size: int = 1


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
        DataError: fewer images than one batch.
    """
    if batch_size > num_images:
        raise DataError(
            f"batch_size: found {batch_size}; the set has {num_images} images; lower batch_size"
        )
    return num_images // batch_size


def two_views(
    split: StoredSplit,
    augmentation: Augmentation,
    loading: Loading,
    *,
    seed: int,
    epoch: int,
    first_step: int = 0,
    epochs: int = 1,
) -> Iterator[Views]:
    """Query and key of every image, labelled or not.

    Args:
        split: the images.
        augmentation: of the views.
        loading: how batches are loaded.
        seed: of the order, the crops and the augmentations.
        epoch: the first epoch.
        first_step: of that epoch.
        epochs: number of epochs; workers persist over all of them.

    Raises:
        DataError: the batch is larger than the set, or is not divisible by the ranks.
    """
    parts = _shuffled(np.arange(len(split)), loading, seed, range(epoch, epoch + epochs), first_step)
    crop = RandomCrops(augmentation.image_size, augmentation.min_scale, seed, views=2)
    finish = partial(_photometric, augmentation=augmentation, seed=seed)
    for (query, key), labels, indices in _batches(split, loading, parts, crop, finish):
        yield Views(query, key, labels, indices)


def one_view(
    split: StoredSplit,
    augmentation: Augmentation,
    loading: Loading,
    *,
    seed: int,
    epoch: int,
    first_step: int = 0,
    epochs: int = 1,
) -> Iterator[Images]:
    """One augmented view of the labelled images, for supervised training; see `two_views`."""
    parts = _shuffled(split.labelled, loading, seed, range(epoch, epoch + epochs), first_step)
    crop = RandomCrops(augmentation.image_size, augmentation.min_scale, seed, views=1)
    finish = partial(_photometric, augmentation=augmentation, seed=seed)
    for (images,), labels, indices in _batches(split, loading, parts, crop, finish):
        yield Images(images, labels, indices)


def random_crops(
    split: StoredSplit,
    loading: Loading,
    *,
    image_size: int,
    min_scale: float,
    seed: int,
    epoch: int,
) -> Iterator[Images]:
    """Random-resized crops and flips of the labelled images, for a linear probe; with the short last batch.

    Source: facebookresearch/moco main_lincls.py, whose DataLoader keeps the last batch.
    """
    parts = _in_order(_permuted(split.labelled, seed, epoch), loading, epoch)
    crop = RandomCrops(image_size, min_scale, seed, views=1)
    for (images,), labels, indices in _batches(split, loading, parts, crop, _plain):
        yield Images(images, labels, indices)


def centre_crops(
    split: StoredSplit, loading: Loading, *, resize: int, image_size: int, rows: Rows | None = None
) -> Iterator[Images]:
    """Images, each exactly once over all ranks, in order: short side `resize`, centre crop.

    `rows` of the split; None: those with a label.
    """
    parts = _in_order(split.labelled if rows is None else rows, loading)
    crop = CentreCrop(resize, image_size)
    for (images,), labels, indices in _batches(split, loading, parts, crop, _plain):
        yield Images(images, labels, indices)


# ---------------------------------------------------------------- order


_Part = tuple[int, Rows]
"""What one rank loads for one step: an epoch, and rows of the split (B,)."""


def _shuffled(rows: Rows, loading: Loading, seed: int, epochs: range, first_step: int) -> Iterator[_Part]:
    """This rank's slice of every global batch of the epochs; every rank has the same number of steps."""
    batch_size, world_size = loading.batch_size, loading.world_size
    steps = steps_per_epoch(len(rows), batch_size)
    if batch_size % world_size:
        raise DataError(
            f"batch_size: found {batch_size} over {world_size} ranks; it must divide by them; "
            f"choose {batch_size // world_size * world_size or world_size}"
        )
    share = batch_size // world_size
    for epoch in epochs:
        order = _permuted(rows, seed, epoch)
        for step in range(first_step if epoch == epochs[0] else 0, steps):
            first = step * batch_size + loading.rank * share
            yield epoch, order[first : first + share]


def _permuted(rows: Rows, seed: int, epoch: int) -> Rows:
    """The epoch's random order."""
    return rows[counter_rng.permutation(len(rows), "order", seed, epoch)]


def _in_order(rows: Rows, loading: Loading, epoch: int = 0) -> Iterator[_Part]:
    """This rank's part of every global batch, including the short last one; never empty."""
    for first in range(0, len(rows), loading.batch_size):
        batch = rows[first : first + loading.batch_size]
        part = np.array_split(batch, loading.world_size)[loading.rank]
        if len(part):
            yield epoch, part


# ---------------------------------------------------------------- crops to views


def _photometric(
    images: Tensor, epoch: int, rows: Rows, view: int, *, augmentation: Augmentation, seed: int
) -> Tensor:
    """The crops of one view, augmented and normalised."""
    parameters = augment.draw(augmentation, rows, seed=seed, epoch=epoch, view=view)
    return augment.photometric(images, parameters, augmentation.version, _output_for(images))


def _plain(images: Tensor, epoch: int, rows: Rows, view: int) -> Tensor:
    """Crops that are only normalised."""
    del epoch, rows, view
    return augment.normalize(images, _output_for(images))


def _output_for(images: Tensor) -> Tensor | None:
    """On a worker, shared memory: the main process then needs no copy (as in torch's default_collate)."""
    if get_worker_info() is None:
        return None
    storage = torch.UntypedStorage._new_shared(images.numel() * torch.float32.itemsize)
    flat = torch.empty(0).set_(storage)
    return flat.view(images.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


_Finish = Callable[[Tensor, int, Rows, int], Tensor]
"""(crops (B, 3, S, S), epoch, rows, number of the view) -> the view: colour, blur, normalisation."""


def _batches(
    split: StoredSplit, loading: Loading, parts: Iterator[_Part], crop: Crop, finish: _Finish
) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    """For each part: its views (B, 3, S, S), float32 and normalised, and its labels, both on the
    device; and its rows as a tensor on the CPU.
    """
    pixels = pixels_on(split, loading.device)
    loaded = (
        _decoded(split, loading, parts, crop, finish)
        if pixels is None
        else _cropped_on_device(pixels, parts, crop, finish)
    )
    yield from prefetch(_with_labels(split, loading.device, loaded), loading.device)


def _with_labels(
    split: StoredSplit, device: torch.device, loaded: Iterator[tuple[Rows, list[Tensor]]]
) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    for rows, views in loaded:
        yield views, to_device(torch.from_numpy(split.labels[rows]), device), torch.from_numpy(rows)


def _cropped_on_device(
    pixels: Tensor, parts: Iterator[_Part], crop: Crop, finish: _Finish
) -> Iterator[tuple[Rows, list[Tensor]]]:
    """Each batch's rows and views, of a split whose pixels are on the device."""
    for epoch, rows in parts:
        views = crop.of_pixels(
            pixels.index_select(0, to_device(torch.from_numpy(rows), pixels.device)), epoch, rows
        )
        yield rows, [finish(images, epoch, rows, view) for view, images in enumerate(views)]


def _decoded(
    split: StoredSplit, loading: Loading, parts: Iterator[_Part], crop: Crop, finish: _Finish
) -> Iterator[tuple[Rows, list[Tensor]]]:
    """Each batch's rows and views, of a split of encoded images, which workers decode and crop.

    Views are finished on the device, or in the workers if the device is a CPU.
    """
    device = loading.device
    on_workers = device.type == "cpu"
    first = next(parts, None)
    if first is None:
        return
    batch_bytes = crop.views * len(first[1]) * 3 * crop.size**2 * (4 if on_workers else 1)
    workers, prefetch_factor = fitting_workers(loading.workers, batch_bytes)
    if workers:
        make_room_for_workers()
    pulse = Pulse()
    loader: DataLoader[_Loaded | DataError] = DataLoader(
        _Decoded(split, crop, finish if on_workers else None, pulse),
        sampler=chain([first], parts),
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=prefetch_factor,
        timeout=LOOK_SECONDS if workers else 0,
        worker_init_fn=end_worker_that_cannot_send,
    )
    for loaded in watched(loader, pulse):
        if isinstance(loaded, DataError):
            raise loaded
        epoch, index, views = loaded
        rows = index.numpy()
        views = [images.to(device, non_blocking=True) for images in views]
        if not on_workers:
            views = [finish(images, epoch, rows, view) for view, images in enumerate(views)]
        yield rows, views


_Loaded = tuple[int, Tensor, list[Tensor]]
"""Epoch, rows (B,), and for each view its images (B, 3, S, S)."""


class _Decoded(Dataset[_Loaded | DataError]):
    """On a worker: the crops of a part, uint8 or finished; each image is decoded once.

    A DataError is returned: DataLoader would hide a raised one under a worker's traceback.
    """

    def __init__(self, split: StoredSplit, crop: Crop, finish: _Finish | None, pulse: Pulse) -> None:
        self.split, self.crop, self.finish, self.pulse = split, crop, finish, pulse

    def __getitem__(self, part: _Part) -> _Loaded | DataError:
        epoch, rows = part
        try:
            views = list(self.crop.of_split(self.split, epoch, rows, self.pulse.beat))
        except DataError as error:
            return error
        if self.finish is not None:
            views = [self.finish(images, epoch, rows, view) for view, images in enumerate(views)]
        return epoch, torch.from_numpy(rows), views


def pixels_on(split: StoredSplit, device: torch.device) -> Tensor | None:
    """A split's pixels (N, H, W, 3) uint8 on the device, copied there once; None if stored encoded."""
    if split.pixels is None:
        return None
    pixels = _ON_DEVICE.get(split)
    if pixels is None or pixels.device != device:
        # Mapped copy-on-write: torch needs writable memory, and a CPU uses the file's pages.
        path = split.folder / f"{split.name}-images.npy"
        pixels = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False)).to(device)
        _ON_DEVICE[split] = pixels
    return pixels


_ON_DEVICE: WeakKeyDictionary[StoredSplit, Tensor] = WeakKeyDictionary()
