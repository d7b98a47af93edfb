"""What was found out about file contents, kept by sha256, so that nothing is decoded twice for a check.

A store is a folder of Arrow files. `open_store` merges what earlier runs left, interrupted ones too;
rows are sorted by hash and memory-mapped, so that any number of processes look up without memory of
their own. Several runs may share a store: one merges at a time, and a file that another run has merged
away meanwhile costs no more than its look-ups. Verdicts of other rules or of another Pillow lie in
another folder and are not used.
"""

import fcntl
import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
from numpy.typing import NDArray

from mochi.data.format import read_arrow
from mochi.data.ingest.decode import RULES, Checked
from mochi.storage.atomic import replacing

_LOG = logging.getLogger(__name__)
_SCHEMA = pa.schema(
    [
        ("sha256", pa.binary(32)),
        ("reason", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("mode", pa.string()),
        ("anew", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Verdicts:
    """Read-only look-up of verdicts; cheap to send to a worker."""

    path: Path | None

    def get(self, sha256: bytes) -> Checked | None:
        """The verdict on a content, or None where it was never seen.

        Of a picture to be written anew the bytes are not kept: its `encoded` is empty.
        """
        opened = None if self.path is None else _open(self.path)
        if opened is None:
            return None
        batch, prefixes = opened
        prefix = np.uint64(int.from_bytes(sha256[:8], "big"))
        row = int(np.searchsorted(prefixes, prefix))
        while row < len(prefixes) and prefixes[row] == prefix:
            if batch["sha256"][row].as_py() == sha256:
                values = {name: batch[name][row].as_py() for name in _SCHEMA.names[1:]}
                return Checked(encoded=b"" if values.pop("anew") else None, **values)
            row += 1
        return None


@lru_cache(maxsize=1)
def _open(path: Path) -> tuple[pa.RecordBatch, NDArray[np.uint64]] | None:
    """Once a process: the mapped file, and the first eight bytes of each hash as numbers; None if gone."""
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except FileNotFoundError:
        return None
    return batch, _hashes(batch["sha256"])[:, 0].astype(np.uint64)


def folder(cache: Path) -> Path:
    """Where the verdicts of these rules and this Pillow lie."""
    return cache / f"verdicts-{RULES}-pillow-{PIL.__version__}"


def open_store(cache: Path) -> Verdicts:
    """All verdicts under `cache`, merged into one file. A damaged file is set aside with a warning."""
    if not folder(cache).is_dir():
        return Verdicts(None)
    parts = []
    with _locked(folder(cache)):
        for path in sorted(folder(cache).glob("*.arrow")):
            try:
                parts.append((path, read_arrow(path)))
            except (pa.ArrowInvalid, OSError) as error:
                aside = path.replace(path.with_suffix(".damaged"))
                _LOG.warning("%s: unreadable (%s); its images are checked again", aside, error)
        if len(parts) < 2:
            return Verdicts(parts[0][0] if parts else None)
        merged = _write(cache, pa.concat_tables(table for _, table in parts))
        for path, _ in parts:
            if path != merged:
                path.unlink()
        return Verdicts(merged)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the kernel lets go however it ends."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def add(cache: Path, rows: Iterable[tuple[bytes, Checked]]) -> None:
    """Keep new verdicts, as one more file."""
    values = (
        (sha256, c.reason, c.width, c.height, c.format, c.mode, c.encoded is not None) for sha256, c in rows
    )
    columns = list(zip(*values, strict=True))
    if columns:
        arrays = [pa.array(values, kind.type) for values, kind in zip(columns, _SCHEMA, strict=True)]
        _write(cache, pa.table(arrays, schema=_SCHEMA))


def _write(cache: Path, table: pa.Table) -> Path:
    """Sorted by hash, each hash once, in a file named by its contents."""
    table = table.combine_chunks().sort_by("sha256")
    hashes = _hashes(table["sha256"].combine_chunks())
    fresh = np.ones(len(hashes), dtype=bool)
    fresh[1:] = (hashes[1:] != hashes[:-1]).any(axis=1)
    batch = table.filter(pa.array(fresh)).combine_chunks().to_batches()[0]
    name = hashlib.sha256(batch["sha256"].buffers()[1]).hexdigest()[:16]
    path = folder(cache) / f"{name}.arrow"
    with (
        replacing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, _SCHEMA) as writer,
    ):
        writer.write_batch(batch)
    return path


def _hashes(column: pa.Array) -> NDArray[np.uint64]:
    """(N, 4) big-endian words of the hashes, so that their order is that of the bytes; a view."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    words = np.frombuffer(column.buffers()[1], ">u8").reshape(-1, 4)
    return words[column.offset : column.offset + len(column)]
