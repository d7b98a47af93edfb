"""photo-scenes: pieces of photographs pasted onto other photographs, a detection set without a download.

The class of an object is the photograph that its piece comes from. Boxes and masks are exact, because the
pasted region is the mask. Pieces and backgrounds come from cells of the same split only, so that no
pixel of a training scene is in a test scene.
"""

import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mochi.config import ConfigError, DetectionData, PhotoScenes
from mochi.data.photographs import LICENCE, PHOTOGRAPHS, Cell, cells, load
from mochi.detection import coco, voc
from mochi.detection.annotations import AnnotatedImage, Annotations
from mochi.storage.atomic import explaining, require_space, write_json

logger = logging.getLogger(__name__)

# Sides of a piece as fractions of the scene's side.
_SMALLEST, _LARGEST = 0.3, 0.6
_MAX_OBJECTS = 4
_DIFFICULT_SHARE, _CROWD_SHARE = 0.06, 0.12
# How much of the background shines through a difficult piece.
_FADED = 0.5

# Disk space of a scene, as PNG and as JPEG, and of its annotations.
_PIXEL_BYTES, _ANNOTATION_BYTES = 4, 4096

# Every file of a folder of scenes. scenes.json alone would not tell our folders from others': Snakemake
# deletes it before it makes the scenes again.
_MADE = re.compile(
    r"scenes\.json|provenance\.json|annotations/instances_(train|test)\.json|(train|test)/(train|test)_\d{5,}\.png"
    r"|VOC/(ImageSets/Main/(train|test)\.txt|(Annotations|JPEGImages)/(train|test)_\d{5,}\.(xml|jpg))"
)

Pixels = NDArray[np.uint8]


@dataclass
class _Scene:
    """A scene while it is being pasted."""

    pixels: Pixels  # (S, S, 3)
    taken: NDArray[np.bool_]  # (S, S)
    labels: list[int] = field(default_factory=list)
    masks: list[NDArray[np.bool_]] = field(default_factory=list)
    segmentations: list[Any] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)


def run(data: DetectionData, root: Path) -> dict[str, Any]:
    """Write the scenes below `root` as VOC (`VOC/...`, JPEG) and as COCO (`annotations/...`, PNG).

    The folder is created atomically. `scenes.json` describes it.

    Args:
        data: with `scenes` and `classes`.
        root: the folder to create; existing scenes are replaced.

    Returns:
        The content of scenes.json.

    Raises:
        ConfigError: no `scenes` section, a class that is not a photograph, or other files in `root`.
        StorageError: the disk is full or the folder read-only; existing scenes are intact.
    """
    if data.scenes is None or data.classes is None:
        raise ConfigError(f"{root}: this detection set has no `scenes` section, so nothing is made for it")
    if (foreign := _foreign(root)) is not None:
        raise ConfigError(
            f"{root}: found {foreign}, which is not part of generated scenes; generating them replaces the "
            "whole folder, so give `data.path` a separate folder, or remove the `scenes` section"
        )
    number = data.scenes.num_train + data.scenes.num_test
    require_space({root: number * (_PIXEL_BYTES * data.scenes.image_size**2 + _ANNOTATION_BYTES)})
    with explaining(root), _temporary_folder(root) as temporary:
        new = temporary / root.name
        counts = {
            split: _write_split(new, split, number, data.classes, data.scenes)
            for split, number in (("train", data.scenes.num_train), ("test", data.scenes.num_test))
        }
        manifest = {
            "source": "photographs in the packages scikit-image and scikit-learn",
            "licence": LICENCE,
            "photographs": {photo.name: photo.sha256 for photo in PHOTOGRAPHS},
            "settings": data.scenes.model_dump(),
            "splits": counts,
        }
        write_json(new / "scenes.json", manifest)
        if root.exists():
            root.rename(temporary / "old")
        new.rename(root)
    return manifest


@contextmanager
def _temporary_folder(root: Path) -> Iterator[Path]:
    """A folder next to `root`, removed at the end."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as name:
        yield Path(name)


def _foreign(root: Path) -> Path | None:
    """Something in the folder that `run` did not write: a user's data."""
    if root.is_symlink() or root.is_file():
        return root
    for path in root.rglob("*"):
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder and not _MADE.fullmatch(path.relative_to(root).as_posix()):
            return path
    return None


def _write_split(
    root: Path, split: str, number: int, classes: Sequence[str], config: PhotoScenes
) -> dict[str, Any]:
    sampler = _PatchSampler(classes, config.seed, "train" if split == "train" else "val")
    folders = {"voc": root / "VOC" / "JPEGImages", "coco": root / split}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    scenes = [
        make_scene(sampler, config.image_size, np.random.default_rng([config.seed, split == "test", index]))
        for index in range(number)
    ]
    names = [f"{split}_{index:05d}" for index in range(number)]
    for name, scene in zip(names, scenes, strict=True):
        picture = Image.fromarray(scene.pixels)
        picture.save(folders["voc"] / f"{name}.jpg", quality=95, subsampling=0)
        picture.save(folders["coco"] / f"{name}.png", compress_level=1)
    for kind, suffix in (("voc", "jpg"), ("coco", "png")):
        images = tuple(
            _annotate(folders[kind] / f"{name}.{suffix}", scene, kind)
            for name, scene in zip(names, scenes, strict=True)
        )
        annotations = Annotations(tuple(classes), images)
        if kind == "voc":
            voc.write(root / "VOC", split, annotations, [scene.truncated for scene in scenes])
        else:
            coco.write(root, split, annotations, [scene.segmentations for scene in scenes])
    return annotations.report()


def _annotate(path: Path, scene: _Scene, kind: str) -> AnnotatedImage:
    size = len(scene.pixels)
    crowd = np.array(scene.crowd, bool)
    ignored = crowd if kind == "coco" else crowd | np.array(scene.difficult, bool)
    return AnnotatedImage(
        path.stem,
        path,
        size,
        size,
        np.array([_box(mask) for mask in scene.masks], np.float32).reshape(-1, 4),
        np.array(scene.labels, np.int64),
        ignored,
        ~crowd,
        areas=np.array([mask.sum() for mask in scene.masks], np.float64),
    )


class _PatchSampler:
    """The parts of the photographs that one split may use."""

    def __init__(self, classes: Sequence[str], seed: int, split: str) -> None:
        names = [photo.name for photo in PHOTOGRAPHS]
        unknown = [name for name in classes if name not in names]
        if unknown or len(classes) >= len(names):
            raise ConfigError(
                f"classes: found {unknown or list(classes)}; scenes have objects from some of the "
                f"photographs, {', '.join(names)}, and at least one for backgrounds"
            )
        self._parts: Mapping[str, list[Pixels]] = {
            photo.name: _parts(load(photo), seed, index, split) for index, photo in enumerate(PHOTOGRAPHS)
        }
        self.classes = list(classes)
        self._backgrounds = [name for name in names if name not in classes]

    def background(self, size: int, rng: np.random.Generator) -> Pixels:
        """(size, size, 3) from one cell; a cell smaller than that is enlarged."""
        return self._crop(str(rng.choice(self._backgrounds)), size, size, rng)

    def piece(self, label: int, height: int, width: int, rng: np.random.Generator) -> Pixels:
        """(height, width, 3) of a class."""
        return self._crop(self.classes[label - 1], height, width, rng)

    def _crop(self, name: str, height: int, width: int, rng: np.random.Generator) -> Pixels:
        parts = self._parts[name]
        part = parts[rng.integers(len(parts))]
        scale = min(part.shape[0] / height, part.shape[1] / width, 1.0)
        h, w = max(int(height * scale), 1), max(int(width * scale), 1)
        top = rng.integers(part.shape[0] - h + 1)
        left = rng.integers(part.shape[1] - w + 1)
        crop = part[top : top + h, left : left + w]
        if scale < 1:
            crop = np.asarray(Image.fromarray(crop).resize((width, height), Image.Resampling.BICUBIC))
        return crop


def _parts(picture: Pixels, seed: int, photo: int, split: str) -> list[Pixels]:
    height, width = picture.shape[:2]
    return [
        picture[cell.top : cell.top + cell.height, cell.left : cell.left + cell.width]
        for cell in cells(height, width, seed=seed, photo=photo, split=split)
        if _shows_something(picture, cell)
    ]


def _shows_something(picture: Pixels, cell: Cell) -> bool:
    """A uniform cell (night sky, the mask around a retina) has no recognisable class."""
    part = picture[cell.top : cell.top + cell.height, cell.left : cell.left + cell.width]
    return bool(part.mean(axis=2).std() >= 4.0)


def make_scene(sampler: _PatchSampler, size: int, rng: np.random.Generator) -> _Scene:
    """One scene: a background and 1 to 4 pieces that do not overlap, sometimes a crowd of small ones."""
    scene = _Scene(sampler.background(size, rng).copy(), np.zeros((size, size), bool))
    wanted = int(rng.integers(1, _MAX_OBJECTS + 1))
    for _ in range(20 * wanted):
        if len(scene.labels) == wanted:
            break
        label = int(rng.integers(1, len(sampler.classes) + 1))
        polygon, mask, cut = _shape(size, rng, _SMALLEST, _LARGEST)
        if mask.sum() < 0.006 * size * size or (mask & scene.taken).any():
            continue
        faded = rng.random() < _DIFFICULT_SHARE
        _paste(scene, sampler, label, mask, rng, _FADED if faded else 1.0)
        _record(scene, label, mask, [polygon], difficult=faded, truncated=cut)
    if rng.random() < _CROWD_SHARE:
        _add_crowd(scene, sampler, size, rng)
    return scene


def _add_crowd(scene: _Scene, sampler: _PatchSampler, size: int, rng: np.random.Generator) -> None:
    """Several small pieces of one class, annotated as one region: a crowd, uncompressed run lengths."""
    label = int(rng.integers(1, len(sampler.classes) + 1))
    together = np.zeros_like(scene.taken)
    for _ in range(6):
        _, mask, _ = _shape(size, rng, _SMALLEST / 2, _SMALLEST)
        if not (mask & scene.taken).any() and mask.any():
            _paste(scene, sampler, label, mask, rng, 1.0)
            together |= mask
    if together.any():
        _record(
            scene, label, together, _uncompressed(together), difficult=False, truncated=False, crowd=True
        )


def _shape(
    size: int, rng: np.random.Generator, smallest: float, largest: float
) -> tuple[list[float], NDArray[np.bool_], bool]:
    """A random star-shaped polygon [x, y, ...], its COCO mask, and whether it is truncated."""
    side = size * rng.uniform(smallest, largest)
    stretch = rng.uniform(2 / 3, 3 / 2) ** 0.5
    y, x = rng.uniform(0.08, 0.92, 2) * size
    corners = int(rng.integers(6, 11))
    angles = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) / corners
    reach = rng.uniform(0.8, 1.0, corners) * side / 2
    xs = x + stretch * reach * np.cos(angles)
    ys = y + reach / stretch * np.sin(angles)
    cut = bool(min(xs.min(), ys.min()) < 0 or max(xs.max(), ys.max()) > size)
    polygon = np.stack([xs, ys], axis=1).clip(0, size).round(2).reshape(-1).tolist()
    mask = coco.decode_masks([coco.run_lengths([polygon], size, size)], size, size)[0].astype(bool)
    return polygon, mask, cut


def _paste(
    scene: _Scene,
    sampler: _PatchSampler,
    label: int,
    mask: NDArray[np.bool_],
    rng: np.random.Generator,
    strength: float,
) -> None:
    x0, y0, x1, y1 = _box(mask)
    inside = mask[y0:y1, x0:x1]
    region = scene.pixels[y0:y1, x0:x1]
    piece = sampler.piece(label, y1 - y0, x1 - x0, rng)
    region[inside] = (strength * piece[inside] + (1 - strength) * region[inside]).astype(np.uint8)


def _record(
    scene: _Scene,
    label: int,
    mask: NDArray[np.bool_],
    segmentation: Any,
    *,
    difficult: bool,
    truncated: bool,
    crowd: bool = False,
) -> None:
    scene.taken |= mask
    scene.labels.append(label)
    scene.masks.append(mask)
    scene.segmentations.append(segmentation)
    scene.difficult.append(difficult)
    scene.truncated.append(truncated)
    scene.crowd.append(crowd)


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _uncompressed(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Run lengths as COCO writes crowds: column by column, starting with the number of zeros."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": counts}
