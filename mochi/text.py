"""Read text, JSON and XML of any encoding, and report every mistake in the same form.

For any bytes in a file, readers return a value or raise a DataError: file, place, what was found,
what was expected. To write files, see `mochi.storage.atomic`.
"""

import codecs
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET
from xml.parsers import expat

from mochi.errors import DataError

_BOMS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_DECLARED = re.compile(rb"""^\s*<\?xml[^>]*?\bencoding\s*=\s*["']([A-Za-z0-9._:-]{1,40})["']""")
_DECLARATION = re.compile(r"^\s*<\?xml[^>]*\?>")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_LARGEST_XML = 64 << 20


def read_text(path: Path, expected: str) -> str:
    """A file as text.

    The encoding is that of its byte order mark; or UTF-8, or UTF-16 without a mark; or what an XML
    declaration says, which is often wrong where the bytes are valid UTF-8.

    Args:
        path: the file.
        expected: what it should be, for the message if it is missing.

    Raises:
        DataError: missing, unreadable, or of an unknown encoding.
    """
    text = _decode(_read(path, expected), path)
    if "\0" in text:
        raise DataError(f"{path}: found zero bytes in it; expected {expected}, which is text")
    return text


def read_lines(path: Path, expected: str) -> list[str]:
    """The non-empty lines of a file, stripped. Raises as `read_text`."""
    lines = re.split(r"\r\n|\r|\n", read_text(path, expected))
    return [line.strip() for line in lines if line.strip()]


def read_json(path: Path, expected: str) -> Any:
    """The value of a JSON file.

    Raises:
        DataError: as `read_text`, or not JSON, or an object has a key twice, of which JSON's readers
            silently keep the last.
    """
    text = read_text(path, expected)
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise DataError(f"{path}: is not valid JSON: nested too deeply; expected {expected}") from None
    except ValueError as error:
        raise DataError(f"{path}: is not valid JSON: {error}; expected {expected}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key {shown(twice)} twice")
    return values


def read_xml(path: Path, expected: str) -> ET.Element:
    """The root of an XML file. Entities are not expanded and nothing outside the file is read.

    Raises:
        DataError: as `read_text`, or not XML, or it declares entities.
    """
    data = _read(path, expected)
    if len(data) > _LARGEST_XML:
        raise DataError(f"{path}: found {len(data)} bytes, too many for {expected}")
    text = _DECLARATION.sub("", _decode(data, path))  # the declared encoding is no longer true
    builder, parser = ET.TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data

    def refuse(name: str, *_: object) -> None:
        raise DataError(f"{path}: declares the entity {name!r}; expected {expected} without entities")

    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(text, True)
        root: ET.Element = builder.close()
    except (expat.ExpatError, AssertionError) as error:
        raise DataError(f"{path}: is not valid XML: {error}; expected {expected}") from None
    return root


def _read(path: Path, expected: str) -> bytes:
    try:
        if not path.is_fifo() or path.is_relative_to("/dev"):  # the latter: `<(...)` of a shell, stdin
            return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected {expected}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; expected {expected}") from None
    except ValueError as error:  # a name that no file can have
        raise DataError(f"{str(path)!r}: cannot be read: {error}; expected {expected}") from None
    raise DataError(f"{path}: is a pipe, which may never end; expected {expected} in a regular file")


def _decode(data: bytes, path: Path) -> str:
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return _strictly(data[len(mark) :], encoding, path)
    if 0 in data[:2] and len(data) > 1:
        return _strictly(data, "utf-16-le" if data[1] == 0 else "utf-16-be", path)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        declared = _DECLARED.match(data)
        if declared is not None and declared[1].lower() not in {b"utf-8", b"utf8"}:
            return _strictly(data, declared[1].decode(), path)
        for signature, kind in _PACKED.items():
            if data.startswith(signature):
                raise DataError(f"{path}: found {kind} data; expected text: unpack it") from None
        line = data[: error.start].count(b"\n") + 1
        found = data[error.start : error.start + 4].hex(" ")
        note = "though the file declares UTF-8" if declared else "and the file declares no encoding"
    raise DataError(
        f"{path}: line {line}: found the bytes {found}, which are not UTF-8, {note} (GBK? Latin-1?); save "
        "it as UTF-8"
    )


def _strictly(data: bytes, encoding: str, path: Path) -> str:
    try:
        return data.decode(encoding)
    except (LookupError, ValueError) as error:
        reason = "unknown here" if isinstance(error, LookupError) else "not that of its bytes"
        raise DataError(f"{path}: says encoding {encoding}, which is {reason}; save it as UTF-8") from None


def nfc(name: str) -> str:
    """A name in Unicode's composed form: é may be one character in one file and two in another."""
    return unicodedata.normalize("NFC", name)


def shown(value: object) -> str:
    """A value of a file for a message: short, as JSON."""
    match value:
        case None | bool():
            return json.dumps(value)
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"an object with {len(value)} keys"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_number(value: object) -> float | None:
    """A finite number, or the text of one; None for other values."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            return None
        return number if math.isfinite(number) else None
    return None


_LONGEST_NAME = 255
"""Longest name of a file, in bytes, that every file system accepts."""

_LARGEST = 2**53
"""Largest whole number that is read; JSON does not represent larger ones exactly."""


@dataclass(frozen=True)
class Fields:
    """The keys of one object of a file, each read with a check.

    A DataError of these methods names the place, the key, what was found and what was expected.
    """

    where: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, value: object, where: str) -> "Fields":
        """The keys of a value that must be an object."""
        if not isinstance(value, dict):
            raise DataError(f"{where}: found {shown(value)}; expected an object with keys")
        return cls(where, value)

    def error(self, key: str, expected: str) -> DataError:
        """The mistake in a key."""
        if key not in self.values:
            return DataError(f"{self.where}: found no {key}; expected {expected}")
        return DataError(f"{self.where}: {key}: found {shown(self.values[key])}; expected {expected}")

    def text(self, key: str) -> str:
        """A non-empty text that may be a name, unchanged."""
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise self.error(key, "a text")
        try:
            parts = value.encode().split(b"/")
        except UnicodeEncodeError:
            raise self.error(key, "a text that is valid Unicode") from None
        if max(map(len, parts)) > _LONGEST_NAME:
            raise self.error(key, f"at most {_LONGEST_NAME} bytes between slashes, as in names of files")
        return value

    def number(self, key: str, *, at_least: float = -math.inf) -> float:
        """A finite number; as text too."""
        number = as_number(self.values.get(key))
        if number is None or number < at_least:
            raise self.error(
                key, "a number" + (f" of at least {at_least:g}" if at_least > -math.inf else "")
            )
        return number

    def integer(self, key: str, *, at_least: int) -> int:
        """A whole number, also as text or with a zero fraction."""
        number = as_number(self.values.get(key))
        if number is None or number != int(number) or number < at_least:
            raise self.error(key, f"a whole number of at least {at_least}")
        if number > _LARGEST:
            raise self.error(key, f"a whole number of at most {_LARGEST}")
        return int(number)

    def identity(self, key: str) -> int | str:
        """An id: a whole number or a text. The text of a number is that number."""
        value = self.values.get(key)
        if isinstance(value, str) and re.fullmatch(r"0|-?[1-9]\d{0,17}", value.strip(), re.ASCII):
            return int(value)
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self.text(key)
        raise self.error(key, "a whole number or a text")

    def flag(self, key: str) -> bool:
        """0, 1, true or false; 0 if it is missing."""
        if key not in self.values:
            return False
        value = self.values[key]
        number = float(value) if isinstance(value, bool) else as_number(value)
        if number not in {0.0, 1.0}:
            raise self.error(key, "0 or 1")
        return number == 1

    def items(self, key: str) -> list[Any]:
        """A list."""
        value = self.values.get(key)
        if not isinstance(value, list):
            raise self.error(key, "a list")
        return value

    def objects(self, key: str) -> "list[Fields]":
        """A list of objects; each knows its place in the list."""
        return [
            Fields.of(value, f"{self.where}: {key}[{index}]") for index, value in enumerate(self.items(key))
        ]
