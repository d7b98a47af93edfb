"""Text, JSON and XML in any encoding are read, or one message names file, place, found and expected."""

import json
import os
from pathlib import Path

import pytest

from mochi.errors import DataError
from mochi.text import Fields, as_number, nfc, read_json, read_lines, read_text, read_xml


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"]
)
def test_the_encoding_is_detected_from_the_bytes(file: Path, encoding: str) -> None:
    """Editors of Windows write a byte order mark; `>` of PowerShell writes UTF-16."""
    mark = "\ufeff" if encoding == "utf-32-le" else ""
    file.write_bytes(f"{mark}train0\r\n\n  中文 é \r\n".encode(encoding))
    assert read_lines(file, "a list") == ["train0", "中文 é"]


@pytest.mark.parametrize("encoding", ["GBK", "ISO-8859-1", "Shift_JIS", "big5"])
def test_the_declared_encoding_of_xml_is_used(file: Path, encoding: str) -> None:
    word = "é" if encoding == "ISO-8859-1" else "中文"
    file.write_bytes(f'<?xml version="1.0" encoding="{encoding}"?>\n<a>{word}</a>'.encode(encoding))
    assert read_xml(file, "a note").text == word


def test_utf_8_with_a_wrong_declaration_is_read(file: Path) -> None:
    file.write_text('<?xml version="1.0" encoding="GBK"?><a>中文</a>', encoding="utf-8")
    assert read_xml(file, "a note").text == "中文"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"one\n\xd6\xd0\xce\xc4\n", r"file: line 2: found the bytes d6 d0 ce c4, which are not UTF-8"),
        (b"\xff\xfea", r"says encoding utf-16-le, which is not that of its bytes"),
        (b"<?xml encoding='klingon'?>\xff", r"says encoding klingon, which is unknown here"),
    ],
)
def test_an_unknown_encoding_is_named(file: Path, data: bytes, message: str) -> None:
    file.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_text(file, "a list")


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: no such file; expected a list"):
        read_text(tmp_path / "gone", "a list")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_text(tmp_path, "a list")
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path / "a\0b", "a list")


def test_a_pipe_is_named_not_waited_for(file: Path) -> None:
    os.mkfifo(file)
    with pytest.raises(DataError, match=r"file: is a pipe, .*; expected a list in a regular file"):
        read_text(file, "a list")


def test_latin_1_that_is_declared_as_utf_8_is_named(file: Path) -> None:
    file.write_bytes("<?xml version='1.0' encoding='utf-8'?><a>é</a>".encode("latin-1"))
    with pytest.raises(
        DataError, match=r"bytes e9 3c 2f 61, which are not UTF-8, though the file declares UTF-8"
    ):
        read_xml(file, "a note")


@pytest.mark.parametrize(
    "text",
    [
        '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]><a>&c;</a>',
        '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><a>&b;</a>',
    ],
)
def test_entities_are_refused(file: Path, text: str) -> None:
    """A few lines of them can fill the memory or read another file."""
    file.write_text(text)
    with pytest.raises(DataError, match="declares the entity 'b'"):
        read_xml(file, "a note")


@pytest.mark.parametrize("text", ["", "<a>", "<a></b>", "no xml", "<a/><a/>", "<a>&b;</a>", "<a>\x01</a>"])
def test_invalid_xml_is_named(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(DataError, match=r"file: is not valid XML: .*; expected a note"):
        read_xml(file, "a note")


@pytest.mark.parametrize("text", ["", "{", "[1,]", "{'a': 1}", "[" * 100_000, "9" * 5000])
def test_invalid_json_is_named(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(DataError, match=r"file: is not valid JSON: .*; expected a set"):
        read_json(file, "a set")


def test_a_key_that_is_written_twice_is_named(file: Path) -> None:
    """JSON's readers silently keep the last one."""
    file.write_text('{"images": [{"id": 1, "bbox": [1], "bbox": [2]}]}')
    with pytest.raises(DataError, match=r"an object has the key 'bbox' twice; expected a set"):
        read_json(file, "a set")


def test_numbers_written_as_text_are_read() -> None:
    assert [as_number(value) for value in (1, 1.5, "12", " 1.5e3 ", "-.5")] == [1, 1.5, 12, 1500, -0.5]
    for value in (
        True,
        None,
        "",
        "1,5",
        "1_000",
        "nan",
        "inf",
        float("nan"),
        10**400,
        "0x10",
        [],
        {},
        "一",
    ):
        assert as_number(value) is None


def fields(**values: object) -> Fields:
    return Fields.of(json.loads(json.dumps(values)), "a.json: images[0]")


def test_every_field_says_what_was_found_and_expected() -> None:
    for read, message in (
        (lambda: fields().text("name"), "a.json: images[0]: found no name; expected a text"),
        (lambda: fields(name=None).text("name"), "name: found null; expected a text"),
        (lambda: fields(name=[1, 2]).text("name"), "name: found a list of 2; expected a text"),
        (lambda: fields(name="\ud800").text("name"), "expected a text that is valid Unicode"),
        (lambda: fields(w="abc").integer("w", at_least=1), "w: found 'abc'; expected a whole number of"),
        (
            lambda: fields(w=1.5).integer("w", at_least=1),
            "w: found 1.5; expected a whole number of at least 1",
        ),
        (lambda: fields(w=0).integer("w", at_least=1), "w: found 0; expected a whole number of at least 1"),
        (
            lambda: fields(w=1e40).integer("w", at_least=1),
            "w: found 1e+40; expected a whole number of at most",
        ),
        (lambda: fields(a=True).number("a"), "a: found true; expected a number"),
        (lambda: fields(c=2).flag("c"), "c: found 2; expected 0 or 1"),
        (lambda: fields(c=None).flag("c"), "c: found null; expected 0 or 1"),
        (
            lambda: fields(i={}).identity("i"),
            "i: found an object with 0 keys; expected a whole number or a",
        ),
        (lambda: fields(l={}).items("l"), "expected a list"),
        (
            lambda: fields(l=[1]).objects("l"),
            "a.json: images[0]: l[0]: found 1; expected an object with keys",
        ),
    ):
        with pytest.raises(DataError) as error:
            read()
        assert message in str(error.value)


def test_long_values_are_not_dumped() -> None:
    with pytest.raises(DataError) as error:
        fields(w="x" * 10_000).number("w")
    assert len(str(error.value)) < 200


def test_an_id_as_text_equals_the_number() -> None:
    assert [fields(i=value).identity("i") for value in (7, "7", 7.0, "007", "a")] == [7, 7, 7, "007", "a"]


def test_composed_and_decomposed_names_are_equal() -> None:
    assert nfc("cafe\u0301") == "café"
