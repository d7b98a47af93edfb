"""Queries and their nearest images, or their hardest negatives, as one picture."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mochi.analysis.neighbours import evenly_spaced
from mochi.config.datasets import Folder
from mochi.data.describe_folder import describe
from mochi.data.ingest.decode import UnreadableError, image_size, open_image, to_rgb
from mochi.data.ingest.raw import FileSplit, as_text
from mochi.data.ingest.sources.folder import list_images
from mochi.errors import DataError
from mochi.inference.encoder import LoadedEncoder
from mochi.inference.folder import FolderFeatures, encode_files
from mochi.storage.atomic import replacing

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_SIDE, _GAP, _CAPTION = 112, 8, 26  # pixels
_FRAME = 3
_SAME, _OTHER, _PLAIN = "#0072B2", "#D55E00", "#555555"  # blue and orange, as in the report
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Neighbor:
    """One image of a row of the sheet."""

    path: str
    similarity: float
    """Cosine."""


def classes_of(folder: Path) -> dict[str, str]:
    """Path -> class of the labelled images of a folder; empty where there are no labels."""
    try:
        description = describe(folder)
        if description.kind != "classes":
            return {}
        raw = list_images(Folder(source="folder", name="x", **description.dataset))
    except DataError:
        return {}
    return {
        path: raw.classes[label]
        for split in raw.splits.values()
        if isinstance(split, FileSplit)
        for path, label in zip(split.paths, split.labels.tolist(), strict=True)
        if label >= 0
    }


def nearest(
    queries: Sequence[tuple[str, NDArray[np.float32]]],
    features: FolderFeatures,
    k: int,
    classes: Mapping[str, str] | None = None,
) -> list[list[Neighbor]]:
    """For each query its k most similar images, the most similar first; never the query's own file.

    Args:
        queries: path and (D,) vector of each.
        features: the candidate images.
        k: neighbours, or fewer if there are not enough images.
        classes: path -> class: only images of another class than the query's, its hardest negatives. For
            a query without a class these are all other images.

    Ties go to the first path.
    """
    bank = _unit(features.vectors)
    paths = np.array(features.paths, dtype=object)
    known = classes or {}
    labels = np.array([known.get(path, "") for path in features.paths], dtype=object)
    rows = []
    for first in range(0, len(queries), _ROWS_AT_ONCE):
        part = queries[first : first + _ROWS_AT_ONCE]
        similarity = _unit(np.stack([vector for _, vector in part])) @ bank.T
        for (path, _), values in zip(part, similarity, strict=True):
            excluded = paths == path
            if own := known.get(path, ""):
                excluded |= (labels == own) | (labels == "")
            allowed = np.flatnonzero(~excluded)
            order = allowed[np.argsort(-values[allowed], kind="stable")[:k]]
            rows.append([Neighbor(features.paths[row], float(values[row])) for row in order])
    return rows


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)


def require_images(queries: Sequence[Path], folder: Path, out: Path) -> None:
    """Read the headers of queries before a folder is encoded, and keep every image that is read.

    Raises:
        DataError: one is not an image, or `out` is one of them or of the folder.
    """
    if out.exists() and (
        out.resolve().is_relative_to(folder.resolve())
        or any(file.exists() and file.samefile(out) for file in queries)
    ):
        raise DataError(f"--out: found {as_text(str(out))}, an image that is read; give another name")
    for file in queries:
        try:
            image_size(file)
        except UnreadableError as error:
            raise DataError(f"--query: {as_text(str(file))}: {error}; give an image") from None


def sheet(
    encoder: LoadedEncoder,
    folder: Path,
    features: FolderFeatures,
    queries: Sequence[Path],
    out: Path,
    *,
    k: int,
    num_queries: int,
    hardest: bool,
) -> None:
    """Draw queries and their neighbours among the images of a folder.

    Args:
        encoder: for queries that are not in the folder.
        folder: of the images.
        features: their features.
        queries: files; none: some of the folder's.
        out: the picture.
        k: neighbours of each query.
        num_queries: number of queries taken from the folder.
        hardest: only images of other classes, if the folder has classes.

    Raises:
        DataError: a query is not a usable image.
    """
    classes = classes_of(folder)
    row_of = {path: row for row, path in enumerate(features.paths)}
    chosen = evenly_spaced(len(features.paths), num_queries).tolist()
    files = list(queries) or [folder / features.paths[row] for row in chosen]
    inside = [_name_in(folder, file) for file in files]
    outside = [file for file, name in zip(files, inside, strict=True) if name not in row_of]
    encoded = encode_files(encoder, outside, batch_size=64, threads=1)
    if encoded.unreadable:
        row, reason = encoded.unreadable[0]
        raise DataError(f"--query: {as_text(str(outside[row]))}: {reason}; give an image")
    others = iter(encoded.vectors)
    vectors = [
        (name, features.vectors[row_of[name]] if name in row_of else next(others)) for name in inside
    ]
    rows = nearest(vectors, features, k, classes if hardest else None)
    draw(out, folder, files, rows, classes)


def _name_in(folder: Path, file: Path) -> str:
    """The file's path in the folder, however both are given; empty if it is elsewhere."""
    file, folder = (Path(os.path.abspath(each)) for each in (file, folder))  # noqa: PTH100 (keeps links)
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else ""


def draw(
    out: Path,
    folder: Path,
    queries: Sequence[Path],
    rows: Sequence[Sequence[Neighbor]],
    classes: Mapping[str, str],
) -> None:
    """The sheet: a row for each query, the query first. Frames: blue the query's class, orange another.

    Args:
        out: a picture of any type that Pillow writes.
        folder: of the neighbours.
        queries: the files of the queries.
        rows: their neighbours.
        classes: path -> class, for the frames; may be empty.
    """
    widest = 1 + max(len(row) for row in rows)
    step = _SIDE + _GAP
    sheet = Image.new("RGB", (widest * step + _GAP, len(rows) * (step + _CAPTION) + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), caption_font()
    for line, (query, row) in enumerate(zip(queries, rows, strict=True)):
        top = _GAP + line * (step + _CAPTION)
        own = classes.get(_name_in(folder, query), "")
        cells = [(query, _PLAIN, "query", own or query.name)]
        for each in row:
            label = classes.get(each.path, "")
            frame = _PLAIN if not (own and label) else _SAME if own == label else _OTHER
            cells.append(
                (folder / each.path, frame, f"{each.similarity:.3f}", label or Path(each.path).name)
            )
        for column, (image, frame, *captions) in enumerate(cells):
            left = _GAP + column * step
            sheet.paste(_thumbnail(image), (left, top))
            box = (left - 1, top - 1, left + _SIDE, top + _SIDE)
            pen.rectangle(box, outline=frame, width=_FRAME)
            for number, caption in enumerate(captions):
                text = legible(caption, font)
                while font.getlength(text) > _SIDE:
                    text = text[:-1]
                pen.text((left, top + _SIDE + 1 + 12 * number), text, fill="black", font=font)
    with replacing(out) as temporary, temporary.open("wb") as file:
        sheet.save(file, Image.registered_extensions()[out.suffix.lower()])


def caption_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu, which has most alphabets, from matplotlib if it is installed; else Pillow's own font."""
    package = find_spec("matplotlib")
    if package is not None and package.origin is not None:
        file = Path(package.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), 9, layout_engine=ImageFont.Layout.BASIC)
    return ImageFont.load_default(10)


def legible(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text with the characters that the font lacks escaped as in Python, such as \\u732b."""
    missing = bytes(font.getmask("\uffff"))
    return "".join(
        char
        if char.isprintable() and bytes(font.getmask(char)) != missing
        else char.encode("unicode_escape").decode()
        for char in text
    )


def _thumbnail(file: Path) -> Image.Image:
    """The whole image in a square."""
    image = to_rgb(open_image(file.read_bytes()))
    return ImageOps.pad(image, (_SIDE, _SIDE), color="#eeeeee")
