"""Pickles that would run code, in every file format, and files that try to exhaust memory."""

import contextlib
import copyreg
import io
import itertools
import mmap
import os
import pickle
import pickletools
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mochi.encoders import inert_pickle
from mochi.encoders.checkpoint_files import open_checkpoint
from mochi.encoders.files import EncoderError
from mochi.encoders.inert_pickle import PickleError, Placeholder


def read(content: bytes) -> Any:
    with mmap.mmap(-1, len(content)) as file:
        file[:] = content
        return inert_pickle.read(file)


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Victim:
    """A class that pickles name; it must never be used."""


def payloads(mark: Path) -> dict[str, object]:
    """If it ran, each would create `mark` or change this process."""
    touch, write = f"touch {mark}", f"open({str(mark)!r}, 'w')"
    return {
        "os.system": Calls(os.system, touch),
        "eval": Calls(eval, write),
        "exec": Calls(exec, write),
        "import": Calls(__import__, "this"),
        "copyreg": Calls(copyreg._reconstructor, Calls, object, None),  # type: ignore[attr-defined]
        "setattr": Calls(setattr, Victim, "touched", True),
        "open": Calls(open, str(mark), "w"),
        "nested": [{"a": ({"b": Calls(os.system, touch)},)}],
        "in a pickle": pickle.dumps(Calls(os.system, touch)),
        "as a key": {("key", 1): Calls(os.system, touch)},
        "in an array": np.array([Calls(os.system, touch)], dtype=object),
        "torch.load": Calls(torch.load, str(mark)),
        "with a state": Stateful(),
    }


class Stateful:
    def __setstate__(self, state: object) -> None:
        Victim.touched = True  # type: ignore[attr-defined]

    def __getstate__(self) -> object:
        return {"a": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch mark'\ntR.",
        b"(S'touch mark'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch mark'\no.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0atouch mark\x85R.",
        b"\x80\x04cos\nsystem\n\x8c\x0atouch mark\x85\x81.",
        b"\x80\x04cos\nsystem\n\x8c\x0atouch mark\x85}\x92.",
        b"cos\nenviron\n}S'MOCHI_MARK'\nS'1'\nsb.",
        b"cos\nenviron\nS'MOCHI_MARK'\nS'1'\ns.",
        b"cbuiltins\nsetattr\n(cbuiltins\nint\nS'x'\nI1\ntR.",
        b"c__main__\n__builtins__\nS'x'\nI1\ns.",
        b"\x82\x01.",
    ],
)
def test_no_opcode_runs_code(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read(content)
    assert not Path("mark").exists()
    assert "MOCHI_MARK" not in os.environ


def as_zip(content: object, file: Path) -> None:
    torch.save(content, file)


def as_legacy(content: object, file: Path) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def as_pickle(content: object, file: Path) -> None:
    file.write_bytes(pickle.dumps(content))


def as_old_pickle(content: object, file: Path) -> None:
    file.write_bytes(pickle.dumps(content, 0))


def as_tar(content: object, file: Path) -> None:
    """The format of torch before 0.2: one storage of three floats, and one tensor of it."""
    kind, stored = torch.FloatStorage, object()
    storages = pickle.dumps(1, 2) + pickle.dumps((5, "cpu", kind), 2) + struct.pack("<q3f", 3, 1, 2, 3)
    tensors = pickle.dumps(1, 2) + pickle.dumps((9, 5, kind), 2) + struct.pack("<ii3q", 1, 0, 3, 1, 0)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> str | None:
            return "9" if obj is stored else None

    written = io.BytesIO()
    Pickler(written, 2).dump({"tensor": stored, "more": content})
    parts = {"storages": storages + pickle.dumps([], 2), "tensors": tensors, "pickle": written.getvalue()}
    with tarfile.open(file, "w") as archive:
        for name, data in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


FORMS = [as_zip, as_legacy, as_pickle, as_old_pickle, as_tar]


@pytest.mark.parametrize("write", FORMS)
@pytest.mark.parametrize("name", payloads(Path()))
def test_no_code_in_a_file_is_run(
    name: str, write: Callable[[object, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, file = tmp_path / "mark", tmp_path / "x.pth"
    content = {"evil": payloads(mark)[name]}
    if write is not as_tar:
        content["tensor"] = np.ones(3, np.float32) if "pickle" in write.__name__ else torch.ones(3)
    write(content, file)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something else reads the pickle")

    for module, reader in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, reader, refuse)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.tensors["tensor"].load().shape == (3,)
    assert not mark.exists()
    assert not hasattr(Victim, "touched")


def test_a_tensor_in_a_tar_is_read(tmp_path: Path) -> None:
    as_tar({}, tmp_path / "x.pth")
    with open_checkpoint(tmp_path / "x.pth") as checkpoint:
        assert checkpoint.tensors["tensor"].load().tolist() == [1, 2, 3]


class Holder:
    def __init__(self) -> None:
        self.weight = np.arange(3.0)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_containers_numbers_and_arrays_are_read(protocol: int) -> None:
    shared = [1, -2, 2**70, 1.5, "text", b"bytes", None, True]
    value = {"a": shared, "b": (shared, (1, 2), (1, 2, 3, 4)), 3: {"c": np.arange(6.0).reshape(2, 3)}}
    found = read(pickle.dumps(value, protocol))
    np.testing.assert_array_equal(found[3].pop("c"), value[3].pop("c"))  # type: ignore[attr-defined]
    assert found == value
    assert found["a"] is found["b"][0]
    fortran = np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3))
    np.testing.assert_array_equal(read(pickle.dumps(fortran, protocol)), fortran)
    assert sorted(read(pickle.dumps({1, 2}, protocol))) == [1, 2]


def test_an_unknown_object_becomes_a_placeholder_with_its_content() -> None:
    found = read(pickle.dumps(Holder()))
    assert isinstance(found, Placeholder)
    assert found.kind.endswith("Holder")
    assert found.state["weight"].tolist() == [0, 1, 2]  # type: ignore[index]


def test_every_opcode_of_this_python_is_handled() -> None:
    """A new version of Python may add some."""
    values = {"INT", "LONG", "STRING", "UNICODE", "FLOAT", "BININT", "BINFLOAT", "BINSTRING", "BINBYTES"}
    source = Path(inert_pickle.__file__).read_text()
    for opcode in pickletools.opcodes:
        assert f'"{opcode.name}"' in source or any(
            opcode.name.removeprefix("SHORT_").startswith(value)
            for value in {*values, "BINUNICODE", "BYTEARRAY"}
        ), opcode.name


def test_a_small_file_cannot_allocate_much_memory() -> None:
    text = pickle.dumps("x" * 100_000, 2)[:-1] + b"q\x00"
    again = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    with pytest.raises(PickleError, match="copies of more than the file contains"):
        read(text + again * 100_000 + b".")
    begin = time.monotonic()
    deep = read(b"(" * 50_000 + b"t" * 50_000 + b".")
    assert isinstance(deep, tuple)
    as_key = read(b"}" + b"(" * 50_000 + b"t" * 50_000 + b"Ns.")
    assert len(as_key) == 1
    assert time.monotonic() - begin < 20


def test_shared_references_are_visited_once(tmp_path: Path) -> None:
    value: list[Any] = [np.ones(2)]
    for _ in range(60):
        value = [value, value]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
    with open_checkpoint(tmp_path / "x.pkl") as checkpoint:
        assert len(checkpoint.tensors) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02",
        b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes beyond the end
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02h\x05.",  # a memo entry that does not exist
        b"\x80\x02(.",
        b"\x80\x020.",
        b"\x80\x02\x86.",
        b"\x80\x02]N\x93.",
        b"\x80\x05\x97.",
        b"\x80\x02\xff.",
        b"I" + b"9" * 5000 + b"\n.",
    ],
)
def test_damaged_pickles_are_refused(content: bytes) -> None:
    with pytest.raises(PickleError):
        read(content)


def test_truncated_and_changed_files_are_read_or_refused() -> None:
    """Whatever the damage, never another exception."""
    whole = pickle.dumps({"a": np.arange(4.0), "b": [Holder(), (1, 2)], "c": torch.float32}, 4)
    for offset, byte in itertools.product(range(len(whole)), (None, 0, 0x28, 0x52, 0x62, 0x93, 0xFF)):
        content = whole[:offset] if byte is None else whole[:offset] + bytes([byte]) + whole[offset + 1 :]
        if content:
            with contextlib.suppress(PickleError):
                read(content)


def edited(file: Path, change: Callable[[str, bytes], bytes], compress: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file) as archive:
        members = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compress) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("change", "compress", "message"),
    [
        (lambda name, data: data[:4] if "/data/" in name else data, zipfile.ZIP_STORED, "holds 4 bytes"),
        (lambda name, data: data, zipfile.ZIP_DEFLATED, "is compressed in the archive"),
        (lambda name, data: b"big" if "byteorder" in name else data, zipfile.ZIP_STORED, "big-endian"),
        (lambda name, data: b"K\x63".join(data.rsplit(b"K\x03", 1)), zipfile.ZIP_STORED, "tensor of size"),
    ],
    ids=["short", "compressed", "big-endian", "larger than its storage"],
)
def test_inconsistent_archives_are_refused(
    change: Callable[[str, bytes], bytes], compress: int, message: str, tmp_path: Path
) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pth")
    edited(tmp_path / "x.pth", change, compress)
    with pytest.raises(EncoderError, match=message), open_checkpoint(tmp_path / "x.pth") as checkpoint:
        checkpoint.tensors["a"].load()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.pth", b"", r"is empty \(0 bytes\)"),
        ("x.pth", b"some text\n" * 9, "is text"),
        ("x.pth", b"<!DOCTYPE html><html>", "is a web page"),
        ("x.pth", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        ("x.pth", b"\x1f\x8b\x08" + bytes(20), "is compressed"),
        ("x.h5", b"\x89HDF\r\n\x1a\n", "is HDF5"),
        ("x.pth", b"\x00\x01\x02" * 9, "is of an unknown format"),
        ("x.pth", b"PK\x03\x04" + bytes(40), r"corrupt or truncated \(File is not a zip file\); .*again$"),
        ("x.safetensors", b"\xff" * 60, r"corrupt or truncated \(Error while deserializing header"),
        ("x.safetensors", b"\x05\x00\x00\x00\x00\x00\x00\x00{{{{{", r"corrupt or truncated \(Error while"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_named(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EncoderError, match=message), open_checkpoint(tmp_path / name):
        pass
    with pytest.raises(EncoderError, match="is a folder"), open_checkpoint(tmp_path):
        pass
    with pytest.raises(EncoderError, match="no such file"), open_checkpoint(tmp_path / "nowhere"):
        pass


@pytest.mark.parametrize("write", [as_zip, as_legacy])
def test_a_truncated_file_is_refused(write: Callable[[object, Path], None], tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    write({"a": torch.ones(3000)}, file)
    whole = file.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        file.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(EncoderError, match="corrupt or truncated"), open_checkpoint(file) as checkpoint:
            checkpoint.tensors["a"].load()


def test_views_of_one_storage_and_strides_are_kept(tmp_path: Path) -> None:
    whole = torch.arange(24.0)
    content = {"a": whole[3:9], "b": whole.view(4, 6).T, "c": whole.view(2, 3, 4, 1), "e": whole[:0]}
    for write in (as_zip, as_legacy):
        write(content, tmp_path / "x.pth")
        with open_checkpoint(tmp_path / "x.pth") as checkpoint:
            for name, expected in content.items():
                assert torch.equal(checkpoint.tensors[name].load(), expected)
