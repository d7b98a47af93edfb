"""The least that any preparation must do; imports little, so that its processes start as fast as ours."""

from PIL import Image


def decode_files(paths: list[str]) -> None:
    """Decode each file and drop it."""
    for path in paths:
        with Image.open(path) as image:
            image.load()
