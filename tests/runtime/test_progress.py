"""Progress in a log or a terminal, and silence of the other ranks."""

import logging
import subprocess
import sys

import pytest

from mochi.runtime.progress import Progress, configure_logging, counter


def test_showing_progress_needs_no_torch() -> None:
    """Preparation shows progress, and importing torch would take longer than preparing a small data set."""
    code = "import sys, mochi.runtime.progress; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_progress_in_a_log_is_plain_lines_with_an_eta(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", total=3, every_seconds=0) as progress:
        for note in ("loss 2.0", "", "loss 1.0"):
            progress.advance(note)
    output = capsys.readouterr().err
    assert "\r" not in output
    lines = output.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("train: 1/3, 0:00:0")
    assert lines[1].endswith(" left")
    assert lines[-1] == "train: 3/3, 0:00:00 left, loss 1.0"


def test_a_log_has_a_line_every_few_seconds_and_the_last_one(capsys: pytest.CaptureFixture[str]) -> None:
    report = counter("check")
    for done in range(1, 1001):
        report(done, 1000)
    assert capsys.readouterr().err.splitlines() == ["check: 1000/1000, 0:00:00 left"]


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), ("0", 1), ("1", 0)])
def test_only_the_first_rank_shows_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: str | None, lines: int
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with Progress("train", total=1) as progress:
        progress.advance()
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_control_characters_are_not_logged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    configure_logging()
    logging.getLogger("mochi").warning("a\x1b[2J.jpg: empty\nanother line")
    assert capsys.readouterr().err == "a\\x1b[2J.jpg: empty\nanother line\n"


@pytest.mark.parametrize(("rank", "expected"), [("0", ["plain", "warned"]), ("3", ["warned"])])
def test_other_ranks_log_warnings_only(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rank: str,
    expected: list[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    configure_logging()
    logging.getLogger("mochi.some").info("plain")
    logging.getLogger("mochi.some").warning("warned")
    printed = capsys.readouterr()
    assert printed.err.splitlines() == expected
    assert printed.out == ""
