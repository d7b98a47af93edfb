"""The package as users install it: built from the project's files, in an environment with only the
dependencies of the core. Without network.
"""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import mochi
from mochi.extras import EXTRAS
from tests.project import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]

TRAINING_STEP = """
import importlib.util, json, sys
from pathlib import Path

import torch

import mochi
from mochi.config import load_experiment, pretrain_run
from mochi.contrast.moco import MoCo

experiment = load_experiment(Path(sys.argv[1]))
run = pretrain_run(experiment, "mochi-16-24-8", 0)
moco = MoCo(run.encoder, run.recipe, run.seed)
size = run.augmentation.image_size
generator = torch.Generator().manual_seed(0)
query, key = (torch.randn(run.recipe.batch_size, 3, size, size, generator=generator) for _ in range(2))
labels = torch.zeros(run.recipe.batch_size, dtype=torch.long)
step = moco.training_step(query, key, labels, step=0, synthesize=True)
step.loss.loss.backward()
moco.enqueue(step.key, labels)
norm = sum(parameter.grad.norm() for parameter in moco.query_encoder.parameters())
optional = [name for name in sys.argv[2:] if importlib.util.find_spec(name)]
print(json.dumps([mochi.__file__, optional, float(step.loss.loss), float(norm), moco.queue.fill()]))
"""


IMPORT_EVERYTHING = """
import importlib, json, pkgutil
import mochi

missing = {}
for module in pkgutil.walk_packages(mochi.__path__, "mochi."):
    if module.name != "mochi.__main__":
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            missing[module.name] = error.name
print(json.dumps(missing))
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the files that git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("git lists the files to export, and this is not a clone")
    folder = tmp_path_factory.mktemp("package")
    listing = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    assert listing.returncode == 0, listing.stderr
    for name in listing.stdout.split("\0"):
        if (source := ROOT / name).is_file() and not name.startswith("results/"):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = run(*pip, "--wheel-dir", folder, ".", cwd=folder / "source")
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def read_metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def dependencies(requirements: list[str]) -> Iterator[metadata.Distribution]:
    """The distributions that these requirements need, with their own dependencies."""
    seen, left = set(), [Requirement(each) for each in requirements]
    while left:
        requirement = left.pop()
        for extra in requirement.extras or {""}:
            if (requirement.name, extra) in seen:
                continue
            seen.add((requirement.name, extra))
            found = metadata.distribution(requirement.name)
            left += [
                needed
                for needed in map(Requirement, found.requires or [])
                if needed.marker is None or needed.marker.evaluate({"extra": extra})
            ]
            yield found


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Path:
    """The bin folder of a virtual environment with the wheel and links to the dependencies of the core."""
    folder = wheel.parent / "environment"
    assert run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent).returncode == 0
    paths = sysconfig.get_paths("venv", {"base": str(folder), "platbase": str(folder)})
    site = Path(paths["purelib"])
    needed = [each for each in read_metadata(wheel).get_all("Requires-Dist", []) if "extra ==" not in each]
    for distribution in dependencies(needed):
        for name in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(Path(str(distribution.locate_file(name))))
    bin_folder = Path(paths["scripts"])
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        bin_folder / "python",
        "install",
        "--no-deps",
        "--no-index",
    ]
    done = run(*pip, wheel, cwd=wheel.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return bin_folder


def test_the_wheel_has_the_package_and_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    folders = {name.split("/")[0] for name in names}
    assert folders == {"mochi", f"mochi_pipeline-{mochi.__version__}.dist-info"}
    assert {"mochi/py.typed", "mochi/data/ingest/sources/imagenet100.txt"} <= names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "mochi").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_the_version_is_the_same_everywhere(wheel: Path) -> None:
    assert read_metadata(wheel)["Version"] == mochi.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == mochi.__version__


def test_the_installed_command_line(environment: Path, tmp_path: Path) -> None:
    done = run(environment / "mochi", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"mochi {mochi.__version__}\n"), done.stderr
    assert run(environment / "mochi", "--help", cwd=tmp_path).returncode == 0


def test_a_training_step_needs_only_the_core(environment: Path, tmp_path: Path) -> None:
    """No optional package and no tool of the workflow can be imported."""
    optional = [*EXTRAS, "dvc", "snakemake", "tensorboard"]
    command = [environment / "python", "-c", TRAINING_STEP, ROOT / "tests/tiny.yaml", *optional]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, found, loss, norm, fill = json.loads(done.stdout)
    assert Path(file).is_relative_to(environment.parent)
    assert found == []
    assert 0 < loss < 100
    assert norm > 0
    assert fill > 0


def test_only_known_modules_import_optional_packages(environment: Path, tmp_path: Path) -> None:
    done = run(environment / "python", "-c", IMPORT_EVERYTHING, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    missing = json.loads(done.stdout)
    assert {module.split(".")[1] for module in missing} == {"analysis", "detection", "report"}, missing
    assert set(missing.values()) <= set(EXTRAS), "the message does not name the extra"


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (("explain", "mochi-16-24-8", "linear", "--config"), "pandas", "report"),
        (("prepare", "--config"), "skimage", "demo"),
    ],
)
def test_a_missing_extra_is_named(
    environment: Path, tmp_path: Path, command: tuple[str, ...], package: str, extra: str
) -> None:
    done = run(environment / "mochi", *command, ROOT / "tests/tiny.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f'error: {package} is not installed; this command needs it: pip install "mochi-pipeline[{extra}]"'
    )


def test_extras_install_what_the_messages_say() -> None:
    distributions = metadata.packages_distributions()
    for package, extra in EXTRAS.items():
        named = {Requirement(each).name for each in OPTIONAL[extra]}
        assert named & set(distributions[package]), f"{extra} does not install {package}"


def test_the_extra_all_has_everything_for_users() -> None:
    (requirement,) = map(Requirement, OPTIONAL["all"])
    assert requirement.extras == set(OPTIONAL) - {"all", "dev", "docs"}


def test_the_lock_satisfies_the_requirements() -> None:
    """If it does not: `make lock`."""
    text = (ROOT / "requirements.lock").read_text()
    pins: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([\w.+!-]+)", text, re.MULTILINE):
        pins.setdefault(name, []).append(version)
    assert "://" not in text
    for requirement in map(Requirement, chain(PROJECT["dependencies"], *OPTIONAL.values())):
        if requirement.name != PROJECT["name"]:
            found = pins[requirement.name.lower()]
            assert all(requirement.specifier.contains(version) for version in found), (requirement, found)
