"""Identify a file that is not decoded, and say what to do with it.

Signatures: the formats' specifications, and `file`'s magic database.
"""

import re

from PIL import Image

ADVICE = "convert it to JPEG or PNG"

_SIGNATURES = (
    (0, b"\x1f\x8b", "gzip data, not an image"),
    (0, b"PK\x03\x04", "zip data, not an image"),
    (0, b"7z\xbc\xaf", "7z data, not an image"),
    (0, b"Rar!", "rar data, not an image"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "Photoshop's PSD"),
    (0, b"gimp xcf", "GIMP's XCF"),
    (0, b"IIRO", "camera raw (Olympus ORF)"),
    (0, b"IIRS", "camera raw (Olympus ORF)"),
    (0, b"MMOR", "camera raw (Olympus ORF)"),
    (0, b"IIU\0", "camera raw (Panasonic RW2)"),
    (0, b"FUJIFILMCCD-RAW", "camera raw (Fujifilm RAF)"),
    (0, b"FOVb", "camera raw (Sigma X3F)"),
    (0, b"\0MRM", "camera raw (Minolta MRW)"),
    (8, b"CR\x02\0", "camera raw (Canon CR2)"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"DDS ", "DirectDraw DDS"),
    (0, b"qoif", "QOI"),
    (0, b"\x0a\x05\x01", "PCX"),
    (0, b"\x01\xda", "SGI"),
    (0, b"II\xbc", "JPEG XR"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"FLIF", "FLIF"),
    (0, b"AT&TFORM", "DjVu"),
    (344, b"n+1\0", "NIfTI"),
    (344, b"ni1\0", "NIfTI"),
    (40, b" EMF", "Windows metafile"),
    (0, b"\0\0\x01\0", "Windows icon"),
    (0, b"icns", "macOS icon"),
    (0, b"\xd7\xcd\xc6\x9a", "Windows metafile"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x89HDF", "HDF5"),
    (0, b"\x93NUMPY", "NumPy array"),
    (128, b"DICM", "DICOM"),
    (8, b"AVI ", "video, not an image"),
    (0, b"\x1aE\xdf\xa3", "video, not an image"),
    (4, b"moov", "video, not an image"),
)
_BRANDS = (  # of ISO media files: bytes 4 to 8 are "ftyp", then come the brands
    ({b"avif", b"avis"}, "AVIF"),
    ({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}, "HEIC"),
    ({b"crx "}, "camera raw (Canon CR3)"),
)
# Has no signature in front: a colour map or none, the kind of image, ..., bits per pixel.
_TGA = re.compile(rb".[\0\x01][\x01-\x03\x09-\x0b].{13}[\x08\x0f\x10\x18\x20]", re.S)
_TIFF_DNG_VERSION, _TIFF_SUBFILE_TYPE, _TIFF_PHOTOMETRIC = 50706, 254, 262
_TIFF_SENSOR = {32803, 34892}  # photometric: colour filter array, linear raw


def sniff(head: bytes) -> str:  # noqa: PLR0911 (a list of cases)
    """Identify a file that no decoder accepts; `head` is its first bytes."""
    for offset, signature, name in _SIGNATURES:
        if head.startswith(signature, offset):
            return name if "not an image" in name else f"{name}, which is not decoded here: {ADVICE}"
    if head[4:8] == b"ftyp":
        length = int.from_bytes(head[:4], "big")
        brands = {head[at : at + 4] for at in range(8, min(max(length, 16), len(head)), 4)}
        for known, name in _BRANDS:
            if brands & known:
                return (
                    f"{name}, which is not decoded here: {ADVICE}"
                    if "," not in name
                    else f"{name}: {ADVICE}"
                )
        return "video, not an image"
    if _TGA.match(head):
        return f"Truevision TGA, which is not decoded here: {ADVICE}"
    text = head[:512].lstrip()
    if b"<svg" in head[:1024]:
        return f"SVG, which is not decoded here: {ADVICE}"
    if text.startswith(b"version https://git-lfs."):
        return "a pointer of Git LFS, not the image; run `git lfs pull`"
    if text[:1] == b"<":
        return "HTML or XML text, not an image"
    if all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in text):
        return "text, not an image"
    return "not an image Pillow can read"


def raw_kind(image: Image.Image, head: bytes) -> str | None:
    """Why a TIFF's first image is not the photograph: a camera raw file, or a reduced copy.

    NEF, DNG, ARW, SRW and others begin with a thumbnail, CR2 with a preview.
    """
    tags = getattr(image, "tag_v2", {})
    maker = str(tags.get(271, "")).split("\0")[0].strip()
    if head[8:10] == b"CR":
        return "camera raw (Canon CR2)"
    if _TIFF_DNG_VERSION in tags:
        return "camera raw (DNG)"
    if tags.get(_TIFF_PHOTOMETRIC) in _TIFF_SENSOR:
        return f"camera raw ({maker or 'unknown camera'})"
    reduced = tags.get(_TIFF_SUBFILE_TYPE, 0)
    if isinstance(reduced, int) and reduced & 1:
        return f"camera raw ({maker})" if maker else "TIFF whose first picture is a thumbnail"
    return None
