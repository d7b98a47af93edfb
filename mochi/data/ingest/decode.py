"""From any image file to one kind of picture: upright, 8-bit RGB; or the reason why not.

The content decides, never the extension. Orientation tags are applied, transparency is laid over
white, 16 bits are scaled to 8, the first frame stands for an animation, CMYK, YCCK and palettes are
converted. A JPEG or PNG that already is upright 8-bit RGB or grey keeps its bytes; only the others
are written anew, as PNG, which loses nothing. Embedded colour profiles are not applied.
"""

import io
import logging
import warnings
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

_LOG = logging.getLogger(__name__)

RULES = 2
"""Raised when any of the rules above changes: cached verdicts of other rules are not used."""

MAX_PIXELS = 178_956_970
"""Pillow's own limit for a decompression bomb (twice MAX_IMAGE_PIXELS)."""

MAX_BYTES = 1 << 30
"""As many pixels, three channels of 16 bits, not compressed. A longer file is not even read."""

_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Checked:
    """A file's verdict. `reason` is empty for a picture; `encoded` is None where its own bytes serve."""

    reason: str
    width: int
    height: int
    format: str
    mode: str
    encoded: bytes | None


class UnreadableError(ValueError):
    """Not a picture we can use; the text is the reason for quarantine.csv."""


def check(data: bytes) -> Checked:
    """Decode one file whole and say what is to be stored of it.

    Of a JPEG whose bytes will serve only the picture's making is cut short: all its data are decoded, but
    into pixels an eighth as wide, which finds the same faults in two thirds of the time.
    """
    try:
        image = open_image(data)
        kind, mode, size = str(image.format), image.mode, image.size
        # Of a PNG this could not be asked yet: its metadata may come last.
        plain_jpeg = kind == "JPEG" and _is_plain(image, data)
        if plain_jpeg:
            image.draft(None, (1, 1))
        _load(image)
        if plain_jpeg or _is_plain(image, data):
            return Checked("", *size, kind, mode, None)
        picture = to_rgb(image)
    except UnreadableError as error:
        return Checked(str(error), 0, 0, "", "", None)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return Checked("", *picture.size, kind, mode, buffer.getvalue())


def open_image(data: bytes | pa.Buffer) -> Image.Image:
    """Read the header of an image.

    Raises:
        UnreadableError: empty, not an image, or larger than any honest picture.
    """
    if len(data) == 0:
        raise UnreadableError("empty file (0 bytes)")
    try:
        with warnings.catch_warnings(action="ignore"):  # large pictures and odd metadata are judged below
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise UnreadableError(f"decompression bomb: more than {MAX_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise UnreadableError(_sniff(data)) from None
    except Exception as error:
        # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error ... on foreign bytes.
        raise UnreadableError(f"{_sniff(data)}: {_short(error)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableError(f"decompression bomb: claims {image.width} x {image.height} pixels")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode whole and convert: upright, 8-bit RGB.

    Raises:
        UnreadableError: truncated or corrupt.
    """
    _load(image)
    try:
        with warnings.catch_warnings(action="ignore"):
            upright = ImageOps.exif_transpose(image) if _is_turned(image) else image
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


def _load(image: Image.Image) -> None:
    """Decode whole; the first attempt counts, for Pillow hands out a torn picture on the second."""
    try:
        with warnings.catch_warnings(action="ignore"):
            image.load()
    except Exception as error:
        # Whatever the many readers raise on broken data, and MemoryError, becomes the file's reason.
        raise UnreadableError(f"{image.format} does not decode: {_short(error)}") from None


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Do the file's own bytes give the wanted picture through a plain `convert("RGB")`?"""
    if image.format not in {"JPEG", "PNG"} or _is_turned(image):
        return False
    if image.format == "PNG" and (image.has_transparency_data or _png_depth(data) > 8):
        return False
    return image.mode in {"L", "RGB"} and getattr(image, "n_frames", 1) == 1


def _is_turned(image: Image.Image) -> bool:
    """Does a valid orientation tag ask for a turn? A metadata block that cannot be read asks nothing."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return int(image.getexif().get(_ORIENTATION, 1)) in range(2, 9)
    except Exception:
        # Pillow raises whatever its EXIF, XMP and TIFF readers meet; the pixels are fine without them.
        _LOG.debug("unreadable metadata in a %s image: taken as upright", image.format, exc_info=True)
        return False


def _png_depth(data: bytes) -> int:
    """Bits a channel: byte 24 of a PNG file, in its header chunk."""
    return data[24]


def _from_deep(image: Image.Image) -> Image.Image:
    """16-bit and 32-bit grey to 8 bits by scaling, where Pillow's `convert` would clip at 255.

    Integers are read as 16-bit and floats as [0, 1] when they stay inside it, else both by their own
    range. What is not finite in floats, the usual mark of missing data, is black; a PNG's transparent
    value is white.

    Raises:
        UnreadableError: not one finite value.
    """
    values = np.asarray(image, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise UnreadableError(f"{image.format} holds no finite value")
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
    """What the content looks like, for people who trust the extension."""
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
