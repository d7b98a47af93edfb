"""The image of the Dockerfile compared with what docs/container.md promises.

The RUN steps of the Dockerfile are executed on a plain Debian base. The layer with torch, most of the image
(7 GB), is only built with MOCHI_IMAGE=full in the environment; otherwise the host's torch is mounted, and
everything else is built and tested the same.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import buildah
import pytest

UID = "12345:12345"  # a uid that is not in the image's /etc/passwd
HOST = "container"


class Image:
    """The image, and a clone of the repository to mount as a user would."""

    def __init__(self, build: buildah.Builder, torch: str, work: Path) -> None:
        self.build, self.torch, self.work = build, torch, work

    @contextmanager
    def container(self) -> Iterator[str]:
        """A new container. Engines add the host name to /etc/hosts; buildah has to be told."""
        name = f"{HOST}:127.0.0.1"
        container = self.build("from", "--add-host", name, "localhost/mochi").strip().splitlines()[-1]
        try:
            yield container
        finally:
            self.build("rm", container)

    @contextmanager
    def files(self) -> Iterator[Path]:
        """The root folder of a new container."""
        with self.container() as container:
            yield Path(self.build("mount", container).strip())
            self.build("umount", container)

    def run(
        self, *command: str, mounted: bool = True, read_only: str = "", user: str = UID, seconds: int = 600
    ) -> str:
        """What `docker run --rm --user 12345:12345 -v CLONE:/work mochi COMMAND` would run and print."""
        mounts = ["-v", f"{self.work}:/work"] if mounted else []
        if read_only:
            mounts += ["-v", f"{self.work / read_only}:/work/{read_only}:ro"]
        lent = buildah.host_torch(self.build) if self.torch == "none" else []
        options = ["--user", user, "--hostname", HOST, *mounts, *lent]
        entry = self.settings()["Entrypoint"]
        with self.container() as container:
            return self.build("run", *options, container, "--", *entry, *command, seconds=seconds)

    def settings(self) -> dict[str, Any]:
        """The configuration of the image."""
        return dict(
            json.loads(self.build("inspect", "--type", "image", "localhost/mochi"))["OCIv1"]["config"]
        )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    torch = "locked" if os.environ.get("MOCHI_IMAGE") == "full" else "none"
    folder = tmp_path_factory.mktemp("container")
    free = shutil.disk_usage(folder).free / 2**30
    needed = buildah.NEEDED_GIB[torch]
    assert free > needed, f"{free:.0f} GiB are free in {folder}; a build with TORCH={torch} needs {needed}"
    build = buildah.builder(folder / "buildah")
    print(f"TORCH={torch}, {build.driver} storage, {free:.0f} GiB free")
    try:
        buildah.make_base(build, "localhost/base")
        buildah.build_image(build, "localhost/base", torch, "localhost/mochi")
        clone = folder / "a clone"
        subprocess.run(["git", "clone", "--quiet", str(buildah.ROOT), str(clone)], check=True)
        subprocess.run(["chown", "-R", UID, str(clone)], check=True)
        for parent in (clone, *clone.parents):
            if folder in (parent, *parent.parents):
                parent.chmod(0o755)
        yield Image(build, torch, clone)
    finally:
        build.remove()


def test_the_image_runs_the_workflow_without_options(image: Image) -> None:
    settings = image.settings()
    assert settings["User"] not in {"", "0", "root"}
    assert settings["StopSignal"] == "SIGINT", "on SIGTERM Snakemake waits for its jobs until it is killed"
    printed = image.run(*settings["Cmd"], "--version", mounted=False)
    assert printed.strip().splitlines()[-1].startswith("9.")


def test_no_files_of_the_build_host_are_in_the_image(image: Image) -> None:
    with image.files() as root:
        for name in (buildah.CA_MOUNT, "/etc/pip.conf"):
            path = root / name.lstrip("/")
            assert not path.exists() or path.stat().st_size == 0, f"{name} was copied into the image"
        assert not list((root / "root").glob(".cache/pip/*"))
        assert not (root / "work" / ".git").exists()


def test_any_uid_has_a_name_a_home_and_a_writable_folder(image: Image) -> None:
    show = (
        "import getpass, os, pathlib; pathlib.Path.home().joinpath('x').touch();"
        "pathlib.Path('written').touch(); print(os.getuid(), getpass.getuser())"
    )
    for mounted in (True, False):
        assert "12345 mochi" in image.run("python", "-c", show, mounted=mounted)


def test_the_experiment_from_data_to_table(image: Image) -> None:
    image.run("snakemake", "--cores", "2", "--configfile", "tests/tiny.yaml", seconds=900)
    assert (image.work / "results/tiny/summary.csv").stat().st_uid == 12345
    again = image.run("snakemake", "-n", "--configfile", "tests/tiny.yaml")
    assert "Nothing to be done" in again


def test_read_only_data_and_a_second_user_of_the_folder(image: Image) -> None:
    """Read-only data is enough, and another user of the same group can continue."""
    for path in (image.work, *image.work.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o2070 if path.is_dir() else 0o060))
    for path in (image.work / "results/tiny/evaluations").rglob("provenance.json"):
        path.unlink()
    again = ["snakemake", "--cores", "2", "--configfile", "tests/tiny.yaml"]
    printed = image.run(
        "sh", "-c", 'umask 002 && exec "$@"', "sh", *again, user="54321:12345", read_only="data"
    )
    assert "(100%) done" in printed
    owners = {path.stat().st_uid for path in (image.work / "results/tiny").rglob("metrics.json")}
    assert owners == {54321}


def test_the_package_passes_its_tests(image: Image) -> None:
    # These test mathematics, training, tables, documents and what re-runs: the same outside the container.
    suite = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile"]
    same = (
        "analysis",
        "benchmarks",
        "contrast",
        "detection",
        "encoders",
        "evaluation",
        "gpu",
        "pretraining",
        "provenance",
        "report",
        "test_documents.py",
        "test_dvc.py",
        "test_reruns.py",
    )
    suite += [f"--ignore=tests/{name}" for name in same]
    printed = image.run(*suite, seconds=1500)
    assert " passed" in printed
