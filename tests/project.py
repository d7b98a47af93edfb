"""A copy of the project with the tiny experiment as its default, for tests that run and change it."""

import atexit
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
COPIED = (
    "Snakefile", "mochi", "workflow", "profiles", "config", "dvc.yaml", ".dvc", ".dvcignore", ".gitignore",
)  # fmt: skip
NOT_COPIED = shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local")
CONFIG = "config/config.yaml"
MOCHI = "mochi-16-24-8"
ENCODER = f"results/tiny/encoders/{MOCHI}/seed0/encoder.safetensors"


class Project:
    """A project folder, and tools that run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def new(cls, folder: Path) -> "Project":
        """Copy the sources of the working tree, without results, into a new folder."""
        folder.mkdir(parents=True)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=NOT_COPIED)
            else:
                shutil.copy(source, folder / name)
        shutil.copy(ROOT / "tests/tiny.yaml", folder / CONFIG)
        # .gitignore excludes the tiny experiment's results, which are tracked here.
        ignored = folder / ".gitignore"
        ignored.write_text(ignored.read_text().replace("/results/tiny/\n", ""))
        stages = yaml.safe_load((folder / "dvc.yaml").read_text().replace("embedded", "tiny"))
        data = "photo-patches-tiny"
        stages["vars"] = [
            {"datasets": {data: {"config": CONFIG, "section": "dataset"}}},
            {"experiments": {"tiny": {"config": CONFIG, "data": data}}},
        ]
        (folder / "dvc.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
        return cls(folder)

    def copy(self, folder: Path) -> "Project":
        """Copy everything, including results and modification times."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Project(folder)

    def run(self, *command: str, seconds: int = 300) -> subprocess.CompletedProcess[str]:
        """Run a command of this environment in the folder; it is killed after a time limit."""
        return subprocess.run(
            ["timeout", "-s", "KILL", str(seconds), *command],
            cwd=self.folder, env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip

    def succeed(self, *command: str) -> str:
        """Run a command that must succeed; returns its output."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `snakemake` on two cores."""
        return snakemake(self.folder, "--cores", "2", *arguments)

    def mochi(self, *arguments: str) -> str:
        """Run a `mochi` command that must succeed."""
        return self.succeed("python", "-m", "mochi", *arguments)

    def jobs(self, *arguments: str) -> dict[str, int]:
        """Rule -> number of jobs in a dry run."""
        done = self.snakemake("--dry-run", *arguments)
        assert done.returncode == 0, done.stderr
        if "Nothing to be done" in done.stdout + done.stderr:
            return {}
        counts = dict(re.findall(r"^(\w+)\s+(\d+)$", done.stdout + done.stderr, re.MULTILINE))
        return {rule: int(count) for rule, count in counts.items() if rule not in {"all", "total"}}

    def record(self, store: Path) -> None:
        """Commit the finished experiment to git and DVC, and push it to a remote that is a folder."""
        for command in (
            ["git", "init", "--quiet", "--initial-branch", "main"],
            ["dvc", "remote", "add", "--quiet", "--default", "store", str(store)],
            ["dvc", "commit", "--force", "--quiet"],
            ["git", "add", "--all"],
            ["git", "commit", "--quiet", "--message", "Results of the tiny experiment"],
            ["dvc", "push", "--quiet"],
        ):
            self.succeed(*command)

    def clone(self, folder: Path, *, pull: bool = True) -> "Project":
        """What another user gets with `git clone` and `dvc pull`."""
        self.succeed("git", "clone", "--quiet", ".", str(folder))
        project = Project(folder)
        if pull:
            project.succeed("dvc", "pull", "--quiet")
        return project

    @contextmanager
    def repository(self) -> Iterator[Any]:
        """The project as `dvc` reads it."""
        from dvc.repo import Repo  # type: ignore[import-untyped]

        with chdir(self.folder), Repo() as repo:
            yield repo

    def changed_stages(self) -> dict[str, Any]:
        """`dvc status`: stage -> what changed."""
        return dict(json.loads(self.run("dvc", "status", "--json").stdout))

    def edit(self, file: str, old: str, new: str) -> None:
        """Replace a text, which must be in the file."""
        path = self.folder / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def digests(self, pattern: str) -> dict[str, str]:
        """sha256 of the files that match a pattern."""
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.folder.glob(pattern)
            if path.is_file()
        }

    def listing(self) -> dict[str, tuple[float, bytes]]:
        """Every file with its modification time and content, except those that imports write."""
        return {
            str(path.relative_to(self.folder)): (path.stat().st_mtime, path.read_bytes())
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`snakemake` in a folder, killed after a time; as a fork, see tests/forks.py."""
    forks = _forks()
    assert forks.stdin is not None
    assert forks.stdout is not None
    with NamedTemporaryFile("r") as stdout, NamedTemporaryFile("r") as stderr:
        asked = [str(folder), arguments, stdout.name, stderr.name]
        forks.stdin.write(f"{json.dumps(asked)}\n")
        forks.stdin.flush()
        code = int(forks.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, stdout.read(), stderr.read())


@cache
def _forks() -> subprocess.Popen[str]:
    forks = subprocess.Popen(
        [sys.executable, "-P", ROOT / "tests/forks.py"], env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(forks.communicate)  # the end of its input is its end
    return forks


def environment() -> dict[str, str]:
    """The environment of this process, with the scripts of its Python first and a name for git commits.

    Slurm's plugin asks for the controller at each start of Snakemake; without a configuration it does not
    wait 10 s for one that does not answer.
    """
    scripts = Path(sys.executable).parent
    git = {
        f"GIT_{who}_{what}": "test@example.org"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **git, "PATH": path, "SLURM_CONF": os.devnull}
