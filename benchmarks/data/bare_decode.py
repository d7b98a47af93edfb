"""The minimum that any preparation must do. Imports little, so that its processes start fast."""

from PIL import Image


def decode_files(paths: list[str]) -> None:
    """Decode each file and discard the pixels."""
    for path in paths:
        with Image.open(path) as image:
            image.load()
