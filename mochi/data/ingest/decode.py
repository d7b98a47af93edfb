"""Decode any image file to upright 8-bit RGB, or give the reason why it cannot be decoded.

Files are identified by content, not by extension, and only the decoders of FORMATS are run. Orientation
tags are applied, transparency becomes white, 16 bits are scaled to 8, animations give their first frame,
CMYK, YCCK and palettes are converted. A JPEG or PNG that already is upright 8-bit RGB or grey keeps its
bytes; all others are re-encoded as PNG, without loss. An image larger than a given side is resized, a
JPEG as JPEG. Embedded colour profiles are not applied.
"""

import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from mochi.data.ingest.sniff import ADVICE, raw_kind, sniff

logger = logging.getLogger(__name__)

RULES = 3
"""Version of the rules above, for the manifest."""

FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")
"""Pillow's names of the formats that are decoded. Others, such as PostScript, are never tried."""

JPEG_QUALITY = 95
"""Quality of a resized JPEG."""

MAX_PIXELS = 178_956_970
"""Pillow's own limit for a decompression bomb (twice MAX_IMAGE_PIXELS)."""

MAX_BYTES = 1 << 30
"""MAX_PIXELS in three channels of 16 bits, not compressed. A longer file is not read."""

# The JPEG reader gives MPO; AVIF came with Pillow 11.3.
_DECODERS = tuple(
    name for name in FORMATS if name != "MPO" and (name != "AVIF" or find_spec("PIL.AvifImagePlugin"))
)

_ORIENTATION = 0x0112  # EXIF tag; 1 is upright, 2 to 8 flip or rotate, 5 to 8 swap width and height


@dataclass(frozen=True)
class CheckResult:
    """The result for a file."""

    reason: str
    """Why it is unreadable; empty for a usable image, whose other fields are then valid."""
    width: int
    height: int
    """Pixels, upright."""
    format: str
    mode: str
    """Pillow's names, of the original file."""
    reencoded: bytes | None
    """A PNG or JPEG to store instead of the file's bytes; None if those can be stored."""
    shrunk: bool = False
    """Whether it is stored with fewer pixels than the file has."""


class UnreadableError(ValueError):
    """Not a usable image; the text is the reason for quarantine.csv."""


def check(data: bytes, max_side: int | None = None) -> CheckResult:
    """Decode one file completely and decide what to store; no side longer than `max_side`.

    A JPEG that keeps its bytes is decoded to an eighth of its width and height: that reads all
    its data and finds the same errors in two thirds of the time. A larger one is decoded to about its
    stored size.
    """
    try:
        image = open_image(data)
        kind, mode, size = str(image.format), image.mode, image.size
        smaller = None if max_side is None or max(size) <= max_side else _scaled(size, max_side)
        # Not for PNGs: their metadata may follow the pixels.
        plain_jpeg = kind == "JPEG" and _is_plain(image, data)
        if smaller is not None:
            image.draft(None, (2 * smaller[0], 2 * smaller[1]))  # only JPEG has one
        elif plain_jpeg:
            image.draft(None, (1, 1))
        _load(image)
        if smaller is None and (plain_jpeg or _is_plain(image, data)):
            return CheckResult("", *size, kind, mode, None)
        picture = to_rgb(image)
    except UnreadableError as error:
        return CheckResult(str(error), 0, 0, "", "", None)
    buffer = io.BytesIO()
    if smaller is not None:
        assert max_side is not None
        picture = picture.resize(_scaled(picture.size, max_side), Image.Resampling.LANCZOS)
    if smaller is not None and kind in {"JPEG", "MPO"}:
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        picture.save(buffer, "PNG", compress_level=1)
    return CheckResult("", *picture.size, kind, mode, buffer.getvalue(), smaller is not None)


def _scaled(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """A size with the same ratio whose longer side is `longest`."""
    scale = longest / max(size)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of a file's upright image, from its header only.

    Raises:
        UnreadableError: as `open_image`, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UnreadableError("empty file (0 bytes)")
            file.seek(0)
            return upright_size(_opened(file, lambda: _head(file)))
    except (OSError, ValueError) as error:
        if isinstance(error, UnreadableError):
            raise
        raise UnreadableError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None


def open_image(data: bytes | pa.Buffer) -> Image.Image:
    """Read the header of an image.

    Raises:
        UnreadableError: empty, not an image of FORMATS, a camera's raw file, or more than MAX_PIXELS.
    """
    if len(data) == 0:
        raise UnreadableError("empty file (0 bytes)")
    return _opened(io.BytesIO(data), lambda: bytes(data[:_HEAD]))


_HEAD = 4096  # bytes that tell what a file is


def _head(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(_HEAD)


def _opened(file: BinaryIO, head: Callable[[], bytes]) -> Image.Image:
    try:
        with warnings.catch_warnings(action="ignore"):  # size and metadata are checked below
            image = Image.open(file, formats=_DECODERS)
    except Image.DecompressionBombError:
        raise UnreadableError(f"decompression bomb: more than {MAX_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise UnreadableError(sniff(head())) from None
    except Exception as error:
        # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error ... on other files.
        raise UnreadableError(f"{sniff(head())}: {_short(error)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableError(f"decompression bomb: claims {image.width} x {image.height} pixels")
    if image.format == "TIFF" and (kind := raw_kind(image, head())):
        raise UnreadableError(
            f"{kind}: only a preview of {image.width} x {image.height} pixels can be read; {ADVICE}"
        )
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode completely and convert: upright, 8-bit RGB.

    Raises:
        UnreadableError: truncated or corrupt.
    """
    _load(image)
    try:
        with warnings.catch_warnings(action="ignore"):
            upright = ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
            if upright.mode in {"I", "F"} or upright.mode.startswith("I;16"):
                return _from_deep(upright)
            if upright.has_transparency_data:
                layered = upright.convert("RGBA")
                white = Image.new("RGBA", layered.size, "white")
                return Image.alpha_composite(white, layered).convert("RGB")
            return upright.convert("RGB")
    except UnreadableError:
        raise
    except Exception as error:
        raise UnreadableError(f"{image.format} does not convert: {_short(error)}") from None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the image once its orientation tag is applied; JPEG needs no decoding for it."""
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def _load(image: Image.Image) -> None:
    """Decode completely. Only the first attempt counts: a second may return a partly decoded image."""
    try:
        with warnings.catch_warnings(action="ignore"):
            image.load()
    except Exception as error:
        # Pillow's readers raise many types on broken data; MemoryError is caught too.
        raise UnreadableError(f"{image.format} does not decode: {_short(error)}") from None


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether the file's bytes give the required image through a plain `convert("RGB")`."""
    if image.format not in {"JPEG", "PNG"} or _orientation(image) != 1:
        return False
    if image.format == "PNG" and (image.has_transparency_data or _png_depth(data) > 8):
        return False
    return image.mode in {"L", "RGB"} and getattr(image, "n_frames", 1) == 1


def _orientation(image: Image.Image) -> int:
    """EXIF or XMP orientation, 1 to 8. An invalid tag or unreadable metadata counts as 1, upright."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tag = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # Pillow's EXIF, XMP and TIFF readers raise many types; the pixels are fine without metadata.
        logger.debug("unreadable metadata in a %s image: taken as upright", image.format, exc_info=True)
        return 1
    return tag if 1 <= tag <= 8 else 1


def _png_depth(data: bytes) -> int:
    """Bits per channel: byte 24 of a PNG file, in its header chunk."""
    return data[24]


_ROWS = 256


def _from_deep(image: Image.Image) -> Image.Image:
    """Scale 16-bit and 32-bit grey to 8 bits; Pillow's `convert` would clip at 255.

    Integers are treated as 16-bit and floats as [0, 1] if they are in that range; otherwise they are scaled
    by their range. NaN and Inf, which usually mark missing data, become black; a PNG's transparent value
    becomes white.

    Raises:
        UnreadableError: no finite value.
    """
    values = np.asarray(image)
    blocks = [values[first : first + _ROWS] for first in range(0, len(values), _ROWS)]  # float64 is 8 bytes
    limits = [
        (block[good].min(), block[good].max()) for block in blocks if (good := np.isfinite(block)).any()
    ]
    if not limits:
        raise UnreadableError(f"{image.format} has no finite value")
    low, high = float(min(low for low, _ in limits)), float(max(high for _, high in limits))
    usual = 1.0 if image.mode == "F" else 65535.0
    if low >= 0 and high <= usual:
        low, high = 0.0, usual
    scaled = np.empty(values.shape, np.uint8)
    for block, out in zip(blocks, np.split(scaled, range(_ROWS, len(values), _ROWS)), strict=True):
        levels = (block.astype(np.float64) - low) / max(high - low, 1e-12) * 255
        levels[~np.isfinite(block)] = 0
        if "transparency" in image.info:
            levels[block == image.info["transparency"]] = 255
        out[:] = np.rint(levels)
    return Image.fromarray(scaled).convert("RGB")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
