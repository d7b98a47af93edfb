"""Read tensors from checkpoints of other projects without running code.

Formats: torch.save's zip, its older formats until 2020 (consecutive pickles, or a tar), plain pickles of
numpy arrays (detectron2), safetensors.

Source: torch/serialization.py `_load` and `_legacy_load`.
"""

import mmap
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mochi.encoders import inert_pickle
from mochi.encoders.files import EncoderError, require_content
from mochi.encoders.inert_pickle import Name, PickleError, Placeholder, Storage, StoredTensor

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "Untyped": torch.uint8,
}
_MAX_DEPTH = 64
_EXPECTED = "expected a checkpoint of torch.save, a .pkl of detectron2, or safetensors"

Load = Callable[[], Tensor]


class Checkpoint(NamedTuple):
    """The content of a file."""

    form: str
    """Name of the format, for messages."""
    tensors: dict[str, "Entry"]
    """Path in the file, joined by dots -> tensor."""
    values: dict[str, object]
    """Text and numbers at the top level, such as detectron2's `__author__`."""


class Entry(NamedTuple):
    """A tensor that is read on demand."""

    shape: tuple[int, ...]
    load: Load


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """The tensors of a checkpoint, loadable while it is open.

    Raises:
        EncoderError: not a file, or of an unknown format, which the message describes.
    """
    if not path.exists():
        raise EncoderError(f"{path}: no such file; {_EXPECTED}")
    require_content(path, _EXPECTED)
    try:
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as file:
            yield _opened(path, file)
    except (PickleError, zipfile.BadZipFile, tarfile.TarError, struct.error, SafetensorError) as error:
        raise EncoderError(
            f"{path}: is corrupt or truncated ({error}); {_EXPECTED}; download or copy it again"
        ) from None


def _opened(path: Path, file: mmap.mmap) -> Checkpoint:
    start = file[:512]
    if start.startswith(b"PK\x03\x04"):
        return _zip(path)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _safetensors(path)
    if start[257:262] == b"ustar":
        return _tar(path)
    if start[:1] == b"\x80":
        return _pickles(file)
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise EncoderError(f"{path}: is compressed; unpack it first")
    if start.startswith(b"\x89HDF"):
        raise EncoderError(f"{path}: is HDF5 (Keras); {_EXPECTED}")
    if start.lstrip()[:1] == b"<":
        raise EncoderError(f"{path}: is a web page, not a checkpoint; download the file itself")
    try:
        return _pickles(file)  # of protocol 0, which begins like text
    except PickleError:
        kind = "text" if re.fullmatch(rb"[\t\n\r\x20-\x7e\x80-\xff]*", start) else "of an unknown format"
        raise EncoderError(f"{path}: is {kind}; {_EXPECTED}") from None


def _safetensors(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}

    def load(name: str) -> Load:
        def read() -> Tensor:
            with safe_open(path, framework="pt") as again:
                tensor: Tensor = again.get_tensor(name)
            return tensor

        return read

    return Checkpoint("safetensors", {name: Entry(shapes[name], load(name)) for name in names}, {})


def _zip(path: Path) -> Checkpoint:
    archive = zipfile.ZipFile(path)
    members = {member.filename: member for member in archive.infolist()}
    found = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
    if len(found) != 1:
        raise EncoderError(f"{path}: is a zip archive without a data.pkl; {_EXPECTED}")
    root = found[0].removesuffix("data.pkl")

    def content(name: str) -> bytes:
        if name not in members:
            raise PickleError(f"{name} is missing in the archive")
        if members[name].compress_type != zipfile.ZIP_STORED:
            raise PickleError(f"{name} is compressed in the archive, which torch.save never does")
        return archive.read(name)

    if f"{root}byteorder" in members and content(f"{root}byteorder") != b"little":
        raise PickleError("its data are big-endian")
    with _mapped(content(found[0])) as file:
        tree = inert_pickle.read(file, _storage)
    return _checkpoint("torch zip", tree, lambda key: content(f"{root}data/{key}"))


@contextmanager
def _mapped(content: bytes) -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, max(len(content), 1)) as file:
        file[: len(content)] = content
        yield file


def _pickles(file: mmap.mmap) -> Checkpoint:
    """A plain pickle, or torch's: magic number, version, system, object, storage keys, storages."""
    file.seek(0)
    tree = inert_pickle.read(file, _storage)
    if tree != _LEGACY_MAGIC:
        return _checkpoint("pickle", tree, _no_storage)
    storages: dict[str, Storage] = {}

    def remembered(found: object) -> object:
        storage = _storage(found)
        if isinstance(storage, Storage):
            storages[storage.key] = storage
        return storage

    inert_pickle.read(file)
    inert_pickle.read(file)
    tree = inert_pickle.read(file, remembered)
    keys = inert_pickle.read(file)
    places: dict[str, tuple[int, int]] = {}
    for key in keys if isinstance(keys, list) else []:
        (numel,) = struct.unpack("<q", file.read(8))
        size = numel * storages[str(key)].dtype.itemsize if str(key) in storages else -1
        if numel < 0 or size < 0 or file.tell() + size > len(file):
            raise PickleError(f"storage {key} is truncated")
        places[str(key)] = (file.tell(), size)
        file.seek(size, 1)
    return _checkpoint("torch before 1.6", tree, lambda key: _part(file, places, key))


def _part(file: mmap.mmap, places: dict[str, tuple[int, int]], key: str) -> bytes:
    if key not in places:
        raise PickleError(f"the data of storage {key} are missing")
    start, size = places[key]
    return file[start : start + size]


def _tar(path: Path) -> Checkpoint:
    """torch.save before 0.2 (2017)."""
    with tarfile.open(path, "r:") as archive:
        parts = {}
        for name in ("storages", "tensors", "pickle"):
            member = archive.extractfile(name) if name in archive.getnames() else None
            if member is None:
                raise EncoderError(f"{path}: is a tar archive without {name}; unpack it; {_EXPECTED}")
            parts[name] = member.read()
    known: dict[str, object] = {}
    places: dict[str, tuple[int, int]] = {}
    with _mapped(parts["storages"]) as file:
        for _ in range(inert_pickle.read(file)):
            key, _, kind = inert_pickle.read(file)
            (numel,) = struct.unpack("<q", file.read(8))
            storage = _storage(("storage", kind, key, "cpu", numel, None))
            assert isinstance(storage, Storage)
            size = numel * storage.dtype.itemsize
            if size < 0 or file.tell() + size > len(file):
                raise PickleError(f"storage {key} is truncated")
            known[str(key)], places[str(key)] = storage, (file.tell(), size)
            file.seek(size, 1)
    with _mapped(parts["tensors"]) as file:
        for _ in range(inert_pickle.read(file)):
            key, storage_key, _ = inert_pickle.read(file)
            rank, _ = struct.unpack("<ii", file.read(8))
            if not 0 <= rank <= _MAX_DEPTH:
                raise PickleError(f"a tensor of {rank} dimensions")
            numbers = struct.unpack(f"<{2 * rank + 1}q", file.read(16 * rank + 8))
            owner = known.get(str(storage_key))
            if not isinstance(owner, Storage):
                raise PickleError(f"storage {storage_key} is missing")
            known[str(key)] = StoredTensor(owner, numbers[-1], numbers[:rank], numbers[rank:-1])
    with _mapped(parts["pickle"]) as file:
        tree = inert_pickle.read(file, lambda found: known.get(str(found), Placeholder("persistent id")))
    content = parts["storages"]
    return _checkpoint(
        "torch tar", tree, lambda key: content[places[key][0] : places[key][0] + places[key][1]]
    )


def _no_storage(key: str) -> bytes:
    raise PickleError(f"the data of storage {key} are not in the file")


def _storage(found: object) -> object:
    """Resolve a persistent id of torch.save."""
    if not isinstance(found, tuple) or len(found) < 5 or found[0] not in ("storage", b"storage"):
        return Placeholder("persistent id", found)
    _, kind, key, _, numel, *view = found
    name = kind.text.rpartition(".")[2] if isinstance(kind, Name) else ""
    dtype = _DTYPES.get(name.removesuffix("Storage"))
    if dtype is None or type(numel) is not int or numel < 0 or any(view):
        raise PickleError(f"a storage of {kind}")
    return Storage(str(key), dtype, numel)


def _checkpoint(form: str, tree: object, content: Callable[[str], bytes]) -> Checkpoint:
    loaded: dict[Storage, Tensor] = {}

    def tensor(stored: StoredTensor) -> Tensor:
        storage = stored.storage
        if storage not in loaded:
            numbers = bytearray(content(storage.key))
            if len(numbers) < storage.numel * storage.dtype.itemsize:
                raise PickleError(f"storage {storage.key} holds {len(numbers)} bytes")
            loaded[storage] = torch.frombuffer(numbers or bytearray(8), dtype=storage.dtype)
        return loaded[storage].as_strided(stored.size, stored.stride, stored.offset).clone()

    def entry(value: StoredTensor | np.ndarray[Any, Any]) -> Entry:
        if isinstance(value, StoredTensor):
            return Entry(value.size, lambda: tensor(value))
        return Entry(value.shape, lambda: torch.from_numpy(value.astype(value.dtype.newbyteorder("="))))

    return Checkpoint(
        form,
        {name: entry(value) for name, value in _flat(tree)},
        {str(key): value for key, value in tree.items() if isinstance(value, str | int | float)}
        if isinstance(tree, dict)
        else {},
    )


def _flat(tree: object) -> Iterator[tuple[str, StoredTensor | np.ndarray[Any, Any]]]:
    """Path and value of every tensor; in a pickled model, the names of its `state_dict()`."""
    waiting: list[tuple[tuple[str, ...], object]] = [((), tree)]
    seen: set[int] = set()
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, StoredTensor | np.ndarray):
            yield ".".join(path), value
        if id(value) in seen or len(path) > _MAX_DEPTH:
            continue
        children: dict[object, object] = {}
        match value:
            case dict():
                children = value
            case list() | tuple():
                children = dict(enumerate(value))
            case Placeholder():
                state = value.state if isinstance(value.state, dict) else {}
                children = {**value.items, **state}
        if children:
            seen.add(id(value))
        for key, child in reversed(children.items()):
            hidden = isinstance(value, Placeholder) and key in ("_modules", "_parameters", "_buffers")
            waiting.append((path if hidden else (*path, str(key)), child))
