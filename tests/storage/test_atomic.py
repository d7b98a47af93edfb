"""Files written whole, against a writer that was killed and one that is still at work."""

import os
import subprocess
import sys
from pathlib import Path

from mochi.storage.atomic import write_text


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = tmp_path / "a [b].csv"
    abandoned = tmp_path / f".{path.name}.{dead.pid}.tmp"
    living = tmp_path / f".{path.name}.{os.getppid()}.tmp"
    other = tmp_path / f".another.csv.{dead.pid}.tmp"
    for file in (abandoned, living, other):
        file.write_text("half")
    write_text(path, "whole")
    assert {file.name for file in tmp_path.iterdir()} == {path.name, living.name, other.name}
    assert path.read_text() == "whole"
