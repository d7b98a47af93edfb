"""Files are written completely or not at all: by writers that fail, are killed at any moment, or still
run.
"""

import inspect
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mochi.errors import UserError
from mochi.storage.atomic import publishing, replacing, require_space, require_writable, write_text

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def dead() -> int:
    """The process id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def killed(code: str, folder: Path) -> None:
    """Run code that ends with SIGKILL of its own process; `folder` and the imports are available."""
    header = (
        "import os, signal, sys; from pathlib import Path\n"
        "from mochi.storage.atomic import publishing, replacing\n"
        "folder = Path(sys.argv[1])\n"
        "def kill(): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", header + code, str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


def test_temporary_files_of_a_dead_writer_are_removed_and_no_others(tmp_path: Path, dead: int) -> None:
    path = tmp_path / "a [b].csv"
    abandoned = tmp_path / f".{path.name}.{HOST}.{dead}.tmp"
    kept = [
        tmp_path / f".{path.name}.{HOST}.{os.getppid()}.tmp",  # its writer is alive
        tmp_path / f".{path.name}.another-host.{dead}.tmp",
        tmp_path / f".{path.name}.bak.tmp",
        tmp_path / f".{path.name}.{HOST}.{dead}x.tmp",
        tmp_path / f".another.csv.{HOST}.{dead}.tmp",
    ]
    for file in (abandoned, *kept):
        file.write_text("half")
    write_text(path, "whole")
    assert names(tmp_path) == {path.name, *(file.name for file in kept)}
    assert path.read_text() == "whole"


def test_replacing_leaves_nothing_behind_on_an_error(tmp_path: Path) -> None:
    target = tmp_path / "table.csv"
    target.write_text("old")

    def interrupted() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert names(tmp_path) == {"table.csv"}


def test_a_writer_killed_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "table.csv"
    target.write_text("old")
    killed(
        "with replacing(folder / 'table.csv') as temporary:\n    temporary.write_text('half'); kill()",
        tmp_path,
    )
    assert target.read_text() == "old"
    assert len(names(tmp_path)) == 2
    write_text(target, "new")
    assert names(tmp_path) == {"table.csv"}


def test_files_have_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    """safetensors creates files that nobody else can read."""
    with replacing(tmp_path / "x.safetensors") as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
    with publishing(tmp_path / "out") as new:
        save_file({"a": torch.zeros(2)}, new / "y.safetensors")
    for path in (tmp_path / "x.safetensors", tmp_path / "out" / "y.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert os.umask(umask) == umask


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with a finished result and a file that does not belong to it."""
    folder = tmp_path / "results"
    (folder / "seeds").mkdir(parents=True)
    for name in ("encoder", "metrics", "seeds/loss", "provenance.json", "notes"):
        (folder / name).write_text("old")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).as_posix().startswith(".")
    }


def fill(new: Path) -> None:
    """Write a new result into the temporary folder."""
    for name in ("encoder", "metrics", "provenance.json"):
        (new / name).write_text("new")
    (new / "seeds").mkdir()
    (new / "seeds" / "loss").write_text("new")


FILL = inspect.getsource(fill) + "with publishing(folder) as new:\n    fill(new)\n"


def test_published_files_replace_those_of_the_same_name(results: Path) -> None:
    with publishing(results) as new:
        assert new.stat().st_dev == results.stat().st_dev
        assert new.name.startswith(".")
        fill(new)
        assert set(contents(results).values()) == {"old"}
    expected = dict.fromkeys(("encoder", "metrics", "seeds/loss", "provenance.json"), "new")
    assert contents(results) == {**expected, "notes": "old"}
    assert not [name for name in names(results) if name.startswith(".")]


def test_an_error_changes_no_file(results: Path) -> None:
    def failing() -> None:
        with publishing(results) as new:
            (new / "encoder").write_text("half")
            raise KeyboardInterrupt

    before = names(results)
    with pytest.raises(KeyboardInterrupt):
        failing()
    assert set(contents(results).values()) == {"old"}
    assert names(results) == before


def test_a_kill_while_writing_changes_no_file_and_the_next_writer_cleans_up(results: Path) -> None:
    before = names(results)
    killed(FILL + "    kill()\n", results)
    assert set(contents(results).values()) == {"old"}
    assert len(names(results) - before) == 1
    with publishing(results) as new:
        (new / "encoder").write_text("new")
    assert names(results) == before


@pytest.mark.parametrize("moved", [0, 1, 2, 3, 4, 5])
def test_provenance_is_replaced_last_and_completes_the_result(results: Path, moved: int) -> None:
    """A kill after each rename: with the new provenance.json there is nothing else to do.

    The job is not run again then, so nobody would remove what the kill left.
    """
    before = names(results)
    killed(
        "rename = Path.replace; count = []\n"
        "def replace(self, target):\n"
        f"    if len(count) == {moved}: kill()\n"
        "    count.append(rename(self, target))\n"
        f"    if len(count) == {moved} == 5: kill()\n"
        "    return count[-1]\n"
        "Path.replace = replace\n" + FILL,
        results,
    )
    found = contents(results)
    provenance = found.pop("provenance.json")
    assert list(found.values()).count("new") == min(moved, 3)
    assert provenance == ("new" if moved == 5 else "old")
    assert (names(results) == before) == (moved == 5)
    with publishing(results) as new:
        fill(new)
    assert names(results) == before


def test_a_folder_can_be_a_link_to_another_file_system(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")  # noqa: S108
    if not os.access(elsewhere, os.W_OK) or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    real = elsewhere / f"mochi-test-{os.getpid()}"
    real.mkdir()
    try:
        (tmp_path / "link").symlink_to(real)
        with publishing(tmp_path / "link") as new:
            (new / "encoder").write_text("new")
        assert names(real) == {"encoder"}
    finally:
        (real / "encoder").unlink(missing_ok=True)
        real.rmdir()


def test_a_file_that_is_a_link_is_replaced_and_its_target_unchanged(tmp_path: Path) -> None:
    """DVC can link results to its cache."""
    cached = tmp_path / "cached"
    cached.write_text("old")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "encoder").symlink_to(cached)
    with publishing(folder) as new:
        (new / "encoder").write_text("new")
    assert cached.read_text() == "old"
    assert not (folder / "encoder").is_symlink()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    require_writable(tmp_path / "new")
    assert names(tmp_path / "new") == set()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="results cannot be written there"):
        require_writable(tmp_path / "file" / "below")


def test_a_full_disk_gives_a_message_and_keeps_the_files(tmp_path: Path) -> None:
    """With a limit on the size of files, which a process can set for itself."""
    kept = tmp_path / "encoder.safetensors"
    kept.write_text("old")
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from safetensors.torch import save_file\n"
        "from mochi.errors import UserError\n"
        "from mochi.storage.atomic import publishing, replacing, write_text\n"
        "folder = Path(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "def tensors(path): save_file({'a': torch.zeros(1000)}, path)\n"
        "def inside():\n"
        "    with publishing(folder) as new: tensors(new / 'encoder.safetensors')\n"
        "def alone():\n"
        "    with replacing(folder / 'encoder.safetensors') as path: tensors(path)\n"
        "def text(): write_text(folder / 'encoder.safetensors', 'x' * 9999)\n"
        "for write in (inside, alone, text):\n"
        "    try: write()\n"
        "    except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for line in lines:
        assert "cannot be written: File too large; raise the limit on the size of files" in line
        assert line.startswith(str(tmp_path))
        assert ".tmp" not in line
    assert names(tmp_path) == {kept.name}
    assert kept.read_text() == "old"


def test_other_errors_are_not_replaced(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "missing"
    with pytest.raises(FileNotFoundError, match="missing"), replacing(tmp_path / "out" / "table.csv"):
        elsewhere.read_text()


def test_too_little_space_is_reported_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_space({tmp_path / "not" / "there": 1000, tmp_path: 1000})
    with pytest.raises(UserError, match=r"not/there, .*B of free disk space; expected"):
        require_space({tmp_path / "not" / "there": free // 3 * 2, tmp_path: free // 3 * 2})
    assert not names(tmp_path)


@pytest.mark.parametrize("name", ["folder", "file/x.txt", "n" * 250])
def test_an_invalid_file_name_is_reported_as_it_was_given(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose") as refused:
        write_text(tmp_path / name, "x")
    assert str(refused.value).startswith(f"{tmp_path / name}: cannot be written: ")
