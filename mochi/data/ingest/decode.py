"""From any image file to one kind of picture: upright, 8-bit RGB; or the reason why not.

The content decides, never the extension. Orientation tags are applied, transparency becomes white,
16 bits are scaled to 8, animations give their first frame, CMYK, YCCK and palettes are converted. A JPEG
or PNG that already is upright 8-bit RGB or grey keeps its bytes; all others are re-encoded as PNG,
without loss. Embedded colour profiles are not applied.
"""

import io
import logging
import warnings
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

logger = logging.getLogger(__name__)

RULES = 2
"""Version of the rules above, for the manifest."""

MAX_PIXELS = 178_956_970
"""Pillow's own limit for a decompression bomb (twice MAX_IMAGE_PIXELS)."""

MAX_BYTES = 1 << 30
"""MAX_PIXELS in three channels of 16 bits, not compressed. A longer file is not even read."""

_ORIENTATION = 0x0112  # EXIF tag; 1 is upright, 2 to 8 flip or turn, 5 to 8 exchange width and height


@dataclass(frozen=True)
class CheckResult:
    """What was found in a file."""

    reason: str
    """Why it is unreadable; empty for a usable image, whose other fields are then valid."""
    width: int
    height: int
    """Pixels, upright."""
    format: str
    mode: str
    """Pillow's names, of the file as it is."""
    reencoded: bytes | None
    """A PNG to store instead of the file's own bytes; None where those can be stored."""


class UnreadableError(ValueError):
    """Not a usable image; the text is the reason for quarantine.csv."""


def check(data: bytes) -> CheckResult:
    """Decode one file completely and decide what to store.

    A JPEG that keeps its bytes is decoded to an eighth of its width and height: that reads all its data and
    finds the same faults in two thirds of the time.
    """
    try:
        image = open_image(data)
        kind, mode, size = str(image.format), image.mode, image.size
        # Not for PNGs: their metadata may follow the pixels.
        plain_jpeg = kind == "JPEG" and _is_plain(image, data)
        if plain_jpeg:
            image.draft(None, (1, 1))
        _load(image)
        if plain_jpeg or _is_plain(image, data):
            return CheckResult("", *size, kind, mode, None)
        picture = to_rgb(image)
    except UnreadableError as error:
        return CheckResult(str(error), 0, 0, "", "", None)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return CheckResult("", *picture.size, kind, mode, buffer.getvalue())


def open_image(data: bytes | pa.Buffer) -> Image.Image:
    """Read the header of an image.

    Raises:
        UnreadableError: empty, not an image, or more than MAX_PIXELS.
    """
    if len(data) == 0:
        raise UnreadableError("empty file (0 bytes)")
    try:
        with warnings.catch_warnings(action="ignore"):  # size and metadata are checked below
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise UnreadableError(f"decompression bomb: more than {MAX_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise UnreadableError(_sniff(data)) from None
    except Exception as error:
        # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error ... on other files.
        raise UnreadableError(f"{_sniff(data)}: {_short(error)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableError(f"decompression bomb: claims {image.width} x {image.height} pixels")
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
    """Do the file's own bytes give the wanted picture through a plain `convert("RGB")`?"""
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


def _from_deep(image: Image.Image) -> Image.Image:
    """16-bit and 32-bit grey to 8 bits by scaling, where Pillow's `convert` would clip at 255.

    Integers are read as 16-bit and floats as [0, 1] if they are in that range, else both are scaled by
    their own range. NaN and Inf, which usually mark missing data, become black; a PNG's transparent value
    becomes white.

    Raises:
        UnreadableError: no finite value.
    """
    values = np.asarray(image, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise UnreadableError(f"{image.format} has no finite value")
    low, high = float(finite.min()), float(finite.max())
    usual = 1.0 if image.mode == "F" else 65535.0
    if low >= 0 and high <= usual:
        low, high = 0.0, usual
    scaled = (values - low) / max(high - low, 1e-12) * 255
    scaled[~np.isfinite(values)] = 0
    if "transparency" in image.info:
        scaled[values == image.info["transparency"]] = 255
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")


def _sniff(data: bytes) -> str:
    """What the content is, for users who trust the extension."""
    head = data[:512].lstrip()
    if data[:2] == b"\x1f\x8b":
        return "gzip data, not an image"
    if data[:4] == b"PK\x03\x04":
        return "zip data, not an image"
    if head[:1] == b"<":
        return "HTML or XML text, not an image"
    if all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head):
        return "text, not an image"
    return "not an image Pillow can read"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
