"""Features of every image in a folder. Threads decode while the encoder computes."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mochi.data.ingest.decode import MAX_BYTES, UnreadableError, open_image, to_rgb
from mochi.data.ingest.files import walk
from mochi.data.ingest.raw import as_text, no_folder
from mochi.errors import DataError
from mochi.inference.encoder import LoadedEncoder

_AHEAD = 3  # batches being decoded


@dataclass(frozen=True)
class FolderFeatures:
    """Every readable image once, in the order of the paths."""

    paths: list[str]
    """Relative to the folder."""
    vectors: NDArray[np.float32]
    """(N, D), not normalised."""
    quarantined: list[tuple[str, str]]
    """Path and reason of every file that is not a usable image."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Reason -> number of files skipped on purpose (hidden files, other types)."""


def encode_folder(
    encoder: LoadedEncoder,
    folder: Path,
    *,
    batch_size: int,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> FolderFeatures:
    """Encode all images below a folder, for any structure.

    Raises:
        DataError: no such folder, or no readable image in it.
    """
    if not folder.is_dir():
        raise DataError(f"{no_folder(folder)}; give the folder of the images")
    ignored = Counter[str]()
    paths = walk(folder, ignored)
    if not paths:
        raise DataError(
            f"{as_text(str(folder))}: found 0 images; expected image files anywhere below; ignored: "
            f"{dict(ignored) or 'nothing'}"
        )
    encoded = encode_files(
        encoder,
        [folder / path for path in paths],
        batch_size=batch_size,
        threads=threads,
        progress=progress,
    )
    bad = {row for row, _ in encoded.unreadable}
    if len(bad) == len(paths):
        row, reason = encoded.unreadable[0]
        raise DataError(
            f"{as_text(str(folder))}: none of {len(paths)} files is a usable image; the first: "
            f"{as_text(paths[row])}: {reason}"
        )
    return FolderFeatures(
        [path for row, path in enumerate(paths) if row not in bad],
        encoded.vectors,
        [(paths[row], reason) for row, reason in encoded.unreadable],
        ignored,
    )


@dataclass(frozen=True)
class EncodedFiles:
    """Vectors of the readable files, in order, and the others' rows with the reasons."""

    vectors: NDArray[np.float32]
    unreadable: list[tuple[int, str]]


def encode_files(
    encoder: LoadedEncoder,
    files: Sequence[Path],
    *,
    batch_size: int,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> EncodedFiles:
    """Encode image files.

    Args:
        encoder: with its preprocessing.
        files: of any image type that the project reads.
        batch_size: images encoded at once.
        threads: decoding threads, at least one.
        progress: called with the number of files done and the total.
    """
    vectors = np.empty((0, 0), np.float32)
    unreadable: list[tuple[int, str]] = []
    done = kept = 0
    for batch in _decoded(encoder, files, batch_size, threads):
        crops = [each for each in batch if isinstance(each, Tensor)]
        unreadable += [(done + row, each) for row, each in enumerate(batch) if isinstance(each, str)]
        if crops:
            new_vectors = encoder.encode(torch.stack(crops)).numpy()
            if not kept:  # one allocation: a million vectors fill gigabytes
                vectors = np.empty((len(files), new_vectors.shape[1]), np.float32)
            vectors[kept : kept + len(new_vectors)] = new_vectors
            kept += len(new_vectors)
        for _ in batch:
            done += 1
            if progress is not None:
                progress(done, len(files))
    return EncodedFiles(vectors[:kept], unreadable)


def _decoded(
    encoder: LoadedEncoder, files: Sequence[Path], batch_size: int, threads: int
) -> Iterator[list[Tensor | str]]:
    """For each batch its crops, (3, S, S) uint8, or the reason for a file without; decoded ahead."""
    waiting: deque[list[Future[Tensor | str]]] = deque()
    # Pillow and torch release the GIL during decoding, so threads suffice; they share memory.
    with ThreadPoolExecutor(threads) as pool:
        try:
            for first in range(0, len(files), batch_size):
                batch = files[first : first + batch_size]
                waiting.append([pool.submit(_crop, encoder, file) for file in batch])
                if len(waiting) > _AHEAD:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)


def _crop(encoder: LoadedEncoder, file: Path) -> Tensor | str:
    """The central crop of an image file, or why it is not usable."""
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            return f"{size} bytes, too large for an image"
        image = to_rgb(open_image(file.read_bytes()))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (UnreadableError, MemoryError) as error:
        return str(error) or "not enough memory"
    return encoder.preprocessing.cut(torch.from_numpy(np.array(image)).permute(2, 0, 1))
