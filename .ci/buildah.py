"""Build and run the image without a container engine: buildah on a base made by debootstrap. Needs root."""

import os
import shutil
import ssl
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Measured, with a margin: layers, the copy of a stage while it is committed, downloads of pip.
NEEDED_GIB = {"locked": 45, "none": 8}
# The host's certificate authorities are mounted here while packages are downloaded; they are never copied.
CA_MOUNT = "/etc/ssl/certs/build-host-ca.crt"


@dataclass(frozen=True)
class Builder:
    """buildah with all its storage below one folder, so that removing it leaves nothing behind."""

    folder: Path
    driver: str

    def __call__(self, *arguments: str, seconds: int = 600) -> str:
        """Run buildah; returns its output. Raises CalledProcessError with the output on failure."""
        storage = ["--root", f"{self.folder}/storage", "--runroot", f"{self.folder}/run"]
        for _ in range(3):
            done = subprocess.run(
                ["buildah", *storage, "--storage-driver", self.driver, *arguments],
                env={**os.environ, "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(self.folder / "tmp")},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=seconds,
                check=False,
            )
            # buildah 1.28 sometimes fails in a race before it starts the command.
            if "sealing memfd copy: Device or resource busy" not in done.stdout:
                break
        if done.returncode:
            raise RuntimeError(
                f"buildah {' '.join(arguments)}: exit {done.returncode}\n{done.stdout[-20000:]}"
            )
        return done.stdout

    def remove(self) -> None:
        """Remove images, containers and caches."""
        self("rm", "--all")
        self("rmi", "--all", "--force")
        shutil.rmtree(self.folder)


def builder(folder: Path) -> Builder:
    """A builder with overlay mounts if the kernel supports them, otherwise with full copies of each
    layer.
    """
    (folder / "tmp").mkdir(parents=True)
    layers = [folder / "tmp" / name for name in ("lower", "upper", "work", "merged")]
    for layer in layers:
        layer.mkdir()
    options = "lowerdir={},upperdir={},workdir={}".format(*layers[:3])
    mounted = subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", options, str(layers[3])],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        return Builder(folder, "vfs")
    subprocess.run(["umount", str(layers[3])], check=True)
    return Builder(folder, "overlay")


def make_base(build: Builder, name: str) -> None:
    """A minimal Debian of the release of this host, from its package archive."""
    system = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    sources = Path("/etc/apt/sources.list.d/debian.sources").read_text().splitlines()
    mirror = next(line.split()[1] for line in sources if line.startswith("URIs:"))
    root = build.folder / "debian"
    subprocess.run(
        ["debootstrap", "--variant=minbase", system["VERSION_CODENAME"], str(root), mirror],
        check=True, stdout=subprocess.DEVNULL, timeout=900,
    )  # fmt: skip
    container = build("from", "scratch").strip()
    build("add", "--quiet", container, str(root), "/")
    build("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
    build("commit", "--quiet", "--rm", container, name)
    shutil.rmtree(root)


def build_image(build: Builder, base: str, torch: str, name: str) -> None:
    """Run the steps of the Dockerfile on another base; `torch` is its build argument TORCH."""
    authorities = ssl.get_default_verify_paths().cafile
    assert authorities is not None, "this host has no certificate authorities"
    pip = build.folder / "pip.conf"
    pip.write_text(f"[global]\ncert = {CA_MOUNT}\ntimeout = 180\n")
    mounts = ["-v", f"{authorities}:{CA_MOUNT}:ro", "-v", f"{pip}:/etc/pip.conf:ro"]
    arguments = ["--build-arg", f"BASE_IMAGE={base}", "--build-arg", f"TORCH={torch}"]
    build("bud", "--layers=false", *mounts, *arguments, "--tag", name, str(ROOT), seconds=2400)


def host_torch(build: Builder) -> Sequence[str]:
    """Mounts that provide the host's torch to an image without torch, after the image's own packages."""
    link = build.folder / "host-torch.pth"
    link.write_text("/opt/host-packages\n")
    version = f"python{sysconfig.get_python_version()}"
    packages = sysconfig.get_paths()["purelib"]
    return [
        "-v", f"{packages}:/opt/host-packages:ro",
        "-v", f"{link}:/opt/venv/lib/{version}/site-packages/host-torch.pth:ro",
    ]  # fmt: skip
