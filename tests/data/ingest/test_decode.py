"""Unusual generated files, each with the picture it must become; and 51 real ones, if they are there,
compared with what Pillow shows.
"""

import csv
import io
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mochi.data.ingest import decode

Picture = Callable[..., Image.Image]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def stored(data: bytes) -> np.ndarray:
    """The pixels that the loader reads: a plain conversion of the stored bytes."""
    result = decode.check(data)
    assert result.reason == ""
    image = decode.open_image(result.reencoded or data).convert("RGB")
    assert image.size == (result.width, result.height)
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 40, "subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_clean_jpeg_keeps_its_bytes(picture: Picture, mode: str, options: dict[str, object]) -> None:
    data = encoded(picture().convert(mode), "JPEG", **options)
    assert decode.check(data) == decode.CheckResult("", 32, 24, "JPEG", mode, None)


def test_a_clean_png_keeps_its_bytes(picture: Picture) -> None:
    assert decode.check(encoded(picture(), "PNG")).reencoded is None


def test_the_exif_orientation_is_applied(picture: Picture) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(picture(), "JPEG", exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert (stored(data) == np.asarray(expected)).all()
        assert (decode.check(data).reencoded is None) == (orientation == 1)


@pytest.mark.parametrize("tag", [0, 9, 77])
def test_an_invalid_orientation_means_upright(picture: Picture, tag: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    assert decode.check(encoded(picture(), "JPEG", exif=exif)).reencoded is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("tag", [*range(10), 77])
def test_the_upright_size_is_that_of_the_stored_picture(picture: Picture, kind: str, tag: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    data = encoded(picture(), kind, exif=exif)
    height, width, _ = stored(data).shape
    assert decode.upright_size(decode.open_image(data)) == (width, height)


def test_a_palette_becomes_its_colours() -> None:
    """Read as indices, red and green would be 0 and 1."""
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    assert stored(encoded(image, "PNG")).tolist() == [[[255, 0, 0], [0, 255, 0]]]
    transparent = encoded(image, "PNG", transparency=0)
    assert stored(transparent).tolist() == [[[255, 255, 255], [0, 255, 0]]]


def test_transparency_is_composited_on_white() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(10, 20, 30, 0), (10, 20, 30, 255), (0, 0, 0, 128)])
    white, opaque, half = stored(encoded(image, "PNG"))[0].tolist()
    assert white == [255, 255, 255]
    assert opaque == [10, 20, 30]
    assert half == [127, 127, 127]
    grey = Image.new("LA", (1, 1), (50, 0))
    assert stored(encoded(grey, "PNG")).tolist() == [[[255, 255, 255]]]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    """Pillow's own conversion clips at 255: everything above 1/257 of the range becomes white."""
    values = np.array([[0, 257, 128 * 257, 200 * 257, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        grey = stored(encoded(Image.fromarray(values), kind))
        assert grey[0].tolist() == [[v, v, v] for v in (0, 1, 128, 200, 255)]


def test_float_images_are_scaled(picture: Picture) -> None:
    unit = np.linspace(0, 1, 6, dtype=np.float32).reshape(1, 6)
    for values in (unit, unit * 1000 - 300):
        assert stored(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [
            0,
            51,
            102,
            153,
            204,
            255,
        ]


def test_nan_pixels_are_black_and_an_image_of_nan_is_refused() -> None:
    """NaN marks missing data in depth and satellite images; it once made the whole image black."""
    values = np.array([[0, np.nan, 500, 1000, np.inf, -np.inf]], dtype=np.float32)
    assert stored(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 0, 128, 255, 0, 0]
    result = decode.check(encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"))
    assert result.reason == "TIFF has no finite value"


def test_integers_beyond_sixteen_bits_are_scaled_by_their_range() -> None:
    values = np.array([[0, 200_000, 1_000_000]], dtype=np.int32)
    assert stored(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 51, 255]


def test_the_transparent_value_of_sixteen_bits_is_white() -> None:
    values = np.array([[0, 128 * 257, 200 * 257]], dtype=np.uint16)
    data = encoded(Image.fromarray(values), "PNG", transparency=128 * 257)
    assert Image.open(io.BytesIO(data)).has_transparency_data
    assert stored(data)[0, :, 0].tolist() == [0, 255, 200]


def test_cmyk_is_converted_like_pillow(picture: Picture) -> None:
    data = encoded(picture().convert("CMYK"), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(stored(data) - expected).max() == 0
    assert np.abs(stored(data) - np.asarray(picture())).mean() < 8


def test_the_first_frame_of_an_animation_is_used(picture: Picture) -> None:
    frames = [picture(seed) for seed in (1, 2, 3)]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(stored(data) - np.asarray(frames[0])).mean() < 12


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file (0 bytes)"),
        (b"<!DOCTYPE html><html>404</html>", "HTML or XML text, not an image"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a pointer of Git LFS, not the image; run `git lfs pull`",
        ),
        (b"outs:\n- md5: 0\n", "text, not an image"),
        (b"\x1f\x8b\x08\x00" + bytes(40), "gzip data, not an image"),
        (b"PK\x03\x04" + bytes(40), "zip data, not an image"),
        (bytes(range(128, 256)), "not an image Pillow can read"),
    ],
)
def test_a_file_that_is_not_an_image_is_named_by_its_type(data: bytes, reason: str) -> None:
    assert decode.check(data).reason == reason


def iso_media(*brands: bytes) -> bytes:
    content = b"ftyp" + brands[0] + bytes(4) + b"".join(brands)
    return (4 + len(content)).to_bytes(4, "big") + content + bytes(100)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (iso_media(b"heic", b"mif1"), "HEIC"),
        (iso_media(b"mif1", b"heic"), "HEIC"),
        (iso_media(b"crx ", b"isom"), "camera raw (Canon CR3)"),
        (b"\xff\x0a" + bytes(100), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), "JPEG XL"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run", "PostScript"),
        (b"\xc5\xd0\xd3\xc6" + bytes(100), "PostScript"),
        (b"%PDF-1.7\n", "PDF"),
        (b"8BPS\0\x01" + bytes(100), "Photoshop's PSD"),
        (b"IIRO" + bytes(100), "camera raw (Olympus ORF)"),
        (b"IIU\0" + bytes(100), "camera raw (Panasonic RW2)"),
        (b"II\xbc\x01" + bytes(100), "JPEG XR"),
        (b"BPG\xfb" + bytes(100), "BPG"),
        (b"\x5c\x01\0\0" + bytes(340) + b"n+1\0", "NIfTI"),
        (encoded(Image.new("RGB", (32, 24)), "PCX"), "PCX"),
        (encoded(Image.new("RGB", (32, 24)), "SGI"), "SGI"),
        (encoded(Image.new("RGB", (32, 24)), "TGA"), "Truevision TGA"),
        (b"FUJIFILMCCD-RAW 0201" + bytes(100), "camera raw (Fujifilm RAF)"),
        (bytes(128) + b"DICM" + bytes(100), "DICOM"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    ],
)
def test_an_unsupported_format_is_named_with_what_to_do(data: bytes, name: str) -> None:
    assert decode.check(data).reason == f"{name}, which is not decoded here: convert it to JPEG or PNG"


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TGA", "PCX", "ICO", "SGI", "XBM", "DDS"])
def test_decoders_that_are_not_listed_are_never_run(picture: Picture, kind: str) -> None:
    """Pillow passes PostScript to another program."""
    image = picture().convert("1") if kind == "XBM" else picture()
    assert decode.check(encoded(image, kind)).reason


@pytest.mark.parametrize("kind", [kind for kind in decode.FORMATS if kind != "MPO"])
def test_every_listed_format_is_decoded(picture: Picture, kind: str) -> None:
    result = decode.check(encoded(picture(), kind))
    assert (result.reason, result.format, result.width, result.height) == ("", kind, 32, 24)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({50706: b"\1\4\0\0"}, "camera raw (DNG)"),
        ({254: 1, 271: "NIKON CORPORATION"}, "camera raw (NIKON CORPORATION)"),
        ({254: 1}, "TIFF whose first picture is a thumbnail"),
    ],
)
def test_the_thumbnail_of_a_raw_file_is_not_used(
    picture: Picture, tmp_path: Path, tags: dict[int, object], reason: str
) -> None:
    """NEF, DNG and CR2 files once became a data set of thumbnails of 160 x 120."""
    data = encoded(picture(), "TIFF", tiffinfo=tags)
    expected = f"{reason}: only a preview of 32 x 24 pixels can be read; convert it to JPEG or PNG"
    assert decode.check(data).reason == expected
    path = tmp_path / "photo.dng"
    path.write_bytes(data)
    with pytest.raises(decode.UnreadableError, match="only a preview"):
        decode.image_size(path)


def test_a_canon_raw_file_is_recognised_by_its_header() -> None:
    """Pillow would read its preview of 16 x 12 pixels."""
    values = {256: 16, 257: 12, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: 12, 279: 192}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    preview = struct.pack("<2sHI8sH", b"II", 42, 16, b"CR\2\0" + bytes(4), len(values)) + entries
    data = preview.ljust(200, b"\0") + bytes(192)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (16, 12)
    assert decode.check(data).reason.startswith("camera raw (Canon CR2): only a preview of 16 x 12 pixels")
    assert "camera raw (Canon CR2), which" in decode.check(preview[:60]).reason


def test_an_ordinary_tiff_from_a_camera_is_accepted(picture: Picture) -> None:
    assert decode.check(encoded(picture(), "TIFF", tiffinfo={271: "Canon", 254: 0})).reason == ""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_larger_image_is_resized_to_the_largest_side(kind: str, orientation: int) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((300, 200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif, **({"quality": 95} if kind in {"JPEG", "WEBP"} else {}))
    result = decode.check(data, 90)
    size = (90, 60) if orientation == 1 else (60, 90)
    assert (result.width, result.height, result.shrunk) == (*size, True)
    assert result.reencoded is not None
    assert decode.open_image(result.reencoded).format == ("JPEG" if kind == "JPEG" else "PNG")
    with Image.open(io.BytesIO(data)) as whole:
        upright = ImageOps.exif_transpose(whole).convert("RGB")
    expected = np.asarray(upright.resize(size, Image.Resampling.LANCZOS)).astype(int)
    found = np.asarray(decode.open_image(result.reencoded).convert("RGB")).astype(int)
    assert np.abs(found - expected).mean() < 2
    assert decode.check(data, 300) == decode.check(data)


def test_a_huge_jpeg_is_decoded_at_reduced_size() -> None:
    """324 MB of pixels; the decoder can scale a JPEG while it reads it."""
    data = encoded(Image.new("L", (12_000, 9_000), 128), "JPEG", quality=20)
    image = decode.open_image(data)
    image.draft(None, (2048, 1536))
    assert max(image.size) <= 3000
    result = decode.check(data, 1024)
    assert (result.width, result.height, result.shrunk) == (1024, 768, True)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_file_is_refused(picture: Picture, kind: str, share: float) -> None:
    data = encoded(picture(height=200, width=300), kind)
    assert f"{kind} does not decode" in decode.check(data[: int(len(data) * share)]).reason


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0, "restart_marker_rows": 1}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_quick_check_of_a_jpeg_agrees_with_a_full_decode(
    picture: Picture, mode: str, options: dict[str, object]
) -> None:
    """Files cut, overwritten and shortened at random; about a third cannot be decoded."""
    rng = np.random.default_rng(0)
    whole = np.frombuffer(encoded(picture(0, 75, 100).convert(mode), "JPEG", **options), np.uint8)
    broken = 0
    for number in range(150):
        first, last = sorted(rng.integers(100, len(whole), 2).tolist())
        damaged = whole.copy()
        damaged[rng.integers(first, last + 1, 5)] = rng.integers(0, 256, 5)
        kinds = [whole[:last], damaged, np.delete(whole, slice(first, last))]
        data = kinds[number % 3].tobytes()
        try:
            decode.to_rgb(decode.open_image(data))
            reason = ""
        except decode.UnreadableError as error:
            reason = str(error)
            broken += 1
        assert decode.check(data).reason == reason
    assert 30 < broken < 120


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    """A PNG header of 40,000 x 40,000 pixels; nothing of that size may be allocated."""
    data = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    assert decode.check(bytes(data)).reason.startswith("decompression bomb")


def test_a_large_photograph_gives_no_warning() -> None:
    """12,000 x 9,000 is above the size at which Pillow warns of a decompression bomb."""
    data = encoded(Image.new("L", (12_000, 9_000), 128), "JPEG", quality=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode.check(data) == decode.CheckResult("", 12_000, 9_000, "JPEG", "L", None)
        assert decode.open_image(data).size == (12_000, 9_000)


def test_real_unusual_files_are_stored_or_refused(real_data: Callable[[str], Path]) -> None:
    """MANIFEST.csv has what Pillow 13 makes of each file. One differs on purpose: broken-after-data.png
    lacks its last forty rows. Pillow raises on the first attempt and returns a partial picture on the
    second; torchvision's decoder crashes on it.
    """
    root = real_data("awkward-images.tar") / "awkward-images"
    with (root / "MANIFEST.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 51
    unreadable = set()
    for row in rows:
        data = (root / "files" / row["file"]).read_bytes()
        result = decode.check(data)
        if result.reason:
            unreadable.add(row["file"])
            continue
        assert result.format == row["format"], row["file"]
        expected = decode.open_image(data)
        deep = expected.mode.startswith("I")
        with warnings.catch_warnings(action="ignore"):
            expected.load()
            upright = (
                ImageOps.exif_transpose(expected) if row["orientation"] not in {"", "error"} else expected
            )
            if deep:
                values = np.asarray(upright, dtype=float)
                # Pillow composites nothing here; the transparent value is from MANIFEST.csv.
                values[values == upright.info.get("transparency")] = 65535
                upright = Image.fromarray(np.rint(values / 257).astype(np.uint8))
            elif upright.has_transparency_data:
                upright = Image.alpha_composite(
                    Image.new("RGBA", upright.size, "white"), upright.convert("RGBA")
                )
            shown = np.asarray(upright.convert("RGB")).astype(int)
        assert np.abs(stored(data) - shown).max() == 0, row["file"]
    expected_unreadable = {row["file"] for row in rows if row["decodes"] == "no"}
    assert unreadable == expected_unreadable | {"broken-after-data.png"}


def test_real_orientations_agree(real_data: Callable[[str], Path]) -> None:
    """The same scene with tags 1, 3, 6 and 8: the stored pictures look the same."""
    root = real_data("awkward-images.tar") / "awkward-images" / "files"
    reference = stored((root / "exif-orientation-1.jpg").read_bytes())
    for tag in (3, 6, 8):
        turned = stored((root / f"exif-orientation-{tag}.jpg").read_bytes())
        # Each was compressed separately; upside down the two differ by more than 30 levels.
        assert np.abs(turned - reference).mean() < 5
        assert np.abs(turned[::-1, ::-1] - reference).mean() > 30
