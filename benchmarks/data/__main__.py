"""`python -m benchmarks.data`. Spawned processes do not import a `__main__.py`, so they start fast."""

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.data import loaders, memory, preparation, views
from benchmarks.data.pictures import make_pictures, prepared
from benchmarks.harness import Rounds, conditions

_MULTIPLE = 256  # full batches for all alternatives, and enough images for `memory`


def main(
    rounds: Rounds = 5,
    num_images: Annotated[
        int, typer.Option(min=_MULTIPLE, help=f"Number of JPEGs, a multiple of {_MULTIPLE}.")
    ] = 1024,
    scratch: Annotated[Path | None, typer.Option(help="Existing folder for temporary files.")] = None,
) -> None:
    """Compare views, loaders and preparation with torchvision's and lightly's, and memory over time."""
    if num_images % _MULTIPLE:
        raise typer.BadParameter(f"found {num_images} images; expected a multiple of {_MULTIPLE}")
    cores = os.cpu_count() or 1
    print(conditions())
    if importlib.util.find_spec("lightly") is None:
        print("lightly is not installed: its transform is left out")
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        make_pictures(folder, num_images)
        sections: tuple[Callable[[], list[str]], ...] = (
            lambda: views.small(rounds),
            lambda: views.large(folder, rounds),
            lambda: loaders.epochs("small", folder, rounds, cores),
            lambda: loaders.epochs("photos", folder, rounds, cores),
            lambda: preparation.run(folder, rounds, cores),
            lambda: memory.run(prepared(folder, "photos"), folder),
        )
        for section in sections:
            print("", *section(), sep="\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
