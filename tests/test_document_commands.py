"""Every command of the documents is accepted by its program; it is run by a test, or listed here with the
reason why not, as every Python block is.
"""

import argparse
import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pytest
import yaml
from typer.main import get_command

from mochi.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = (
    "apptainer", "cp", "docker", "dvc", "export", "git", "make", "mochi", "pip", "pre-commit", "python",
    "snakemake", "source", "tensorboard",
)  # fmt: skip

RUN = {
    "mochi adopt": "tests/test_reruns.py",
    "mochi adopt --accept-code": "tests/test_reruns.py",
    "mochi adopt --restore": "tests/test_dvc.py",
    "mochi analyze": "tests/test_reruns.py",
    "mochi check*": "tests/test_cli.py",
    "mochi detect *": "tests/detection/test_workflow.py",
    "mochi explain*": "tests/test_dvc.py",
    "mochi export*": "tests/encoders/test_importing.py",
    "mochi features*": "tests/test_inference.py",
    "mochi import*": "tests/encoders/test_importing.py",
    "mochi init*": "tests/test_new_experiment.py",
    "mochi inspect*": "tests/test_cli.py",
    "mochi neighbors*": "tests/test_inference.py",
    "mochi plan*": "tests/test_cli.py",
    "mochi prepare *": "tests/test_cli.py",
    "mochi report*": "tests/test_workflow.py",
    "mochi status*": "tests/test_status.py",
    "python -m benchmarks.data": "tests/benchmarks/test_data.py",
    "python -m benchmarks.gpu": "tests/benchmarks/test_gpu.py",
    "python -m benchmarks.negatives": "tests/benchmarks/test_negatives.py",
    "python -m benchmarks.step": "tests/benchmarks/test_step.py",
    "python -m benchmarks.training": "tests/benchmarks/test_training.py",
    "python -m mochi": "tests/test_workflow.py",
    "snakemake -n": "tests/test_workflow.py",
    "snakemake --cores all": "tests/test_workflow.py",
    "snakemake --cores all --resources gpu=2": "tests/test_workflow.py",
    "CUDA_VISIBLE_DEVICES=0,1 snakemake --cores all": "tests/test_workflow.py",
    "snakemake --cores all --configfile config/mine.yaml": ".ci/test_init.py",
    "snakemake --profile profiles/slurm": ".ci/test_slurm.py",
    "snakemake --profile profiles/slurm ...": ".ci/test_slurm.py",
    "dvc checkout": "tests/test_dvc.py",
    "dvc commit --force": "tests/test_dvc.py",
    "dvc config core.no_scm true": ".ci/test_dvc.py",
    "dvc exp apply*": ".ci/test_dvc.py",
    "dvc exp run": ".ci/test_dvc.py",
    "dvc exp run -S *": ".ci/test_dvc.py",
    "dvc metrics diff*": ".ci/test_dvc.py",
    "dvc metrics show": "tests/test_dvc.py",
    "dvc params diff*": ".ci/test_dvc.py",
    "dvc plots *": "tests/test_dvc.py",
    "dvc pull": "tests/test_dvc.py",
    "dvc push": "tests/project.py",
    "dvc remote add --default store /mnt/share/mochi": "tests/project.py",
    "dvc repro": "tests/test_dvc.py",
    "dvc status": "tests/project.py",
    "git add --all": "tests/project.py",
    "git checkout*": ".ci/test_dvc.py",
    "git clone*": "tests/project.py",
    "git commit": ".ci/test_dvc.py",
    "pip wheel --no-deps .": "tests/test_package.py",
}
"""Pattern of commands -> the file that runs them, with other names and smaller data."""

NOT_RUN = {
    "make reproduce": "installs every package and takes minutes; a release does it",
    "make test": "the tests themselves; the CI does it",
    "make test-slow": "half an hour, as root; a release does it",
    "make test-gpu": "needs a GPU",
    "python -m benchmarks.gpu --rounds 5": "needs a GPU; tests/benchmarks/ runs it at small sizes",
    "MOCHI_IMAGE=full make test-slow": "needs 45 GiB of disk",
    "make lint": "the CI does it",
    "make docs": "a part of make lint",
    "make lock": "needs a package index",
    "python -m pytest *": "the tests themselves",
    "pip install *": "needs a package index; tests/test_package.py installs the wheel",
    "pre-commit install": "needs a package index",
    "source *": "a shell command",
    "export *": "a shell command",
    "cp *": "a shell command",
    "cd *": "a shell command",
    "make mutants*": "hours; by hand",
    "git push": "needs a remote",
    "git rm *": "git only",
    "git tag *": "git only",
    "mochi pretrain * --gpus 4*": "needs four GPUs; tests/runtime/test_gpus.py claims simulated ones",
    "snakemake * evaluate:gpu=4": "needs four GPUs",
    "snakemake * pretrain:gpu=4": "needs four GPUs",
    "snakemake --set-resources evaluate:gpu=4": "needs four GPUs",
    "snakemake --cores all data --configfile config/imagenet*": "needs ImageNet",
    "snakemake --cores all --configfile config/cifar10-resnet18.yaml": "needs a GPU",
    "snakemake --cores 2 --configfile config/cifar10-*.yaml": "needs CIFAR-10 as JPEG files, and hours",
    "seq *": "a shell command",
    "mkdir *": "a shell command",
    "ln -s *": "a shell command",
    "snakemake --profile profiles/slurm --configfile config/imagenet*": "needs ImageNet, a cluster",
    "snakemake --executor kubernetes *": "needs a Kubernetes cluster",
    "snakemake --sdm apptainer *": "needs Apptainer",
    "snakemake --report report.zip": "Snakemake's own report, of the figures that tests/report checks",
    "apptainer *": "needs Apptainer",
    "docker *": "needs Docker; .ci/test_container.py builds and runs the image with buildah",
    "tensorboard *": "a server; tests/runtime/test_tensorboard.py reads the events with its reader",
    "SNAKEMAKE_PROFILE=profiles/slurm dvc repro": "needs Slurm; .ci/test_slurm.py runs the same profile",
    "dvc repro report@cifar10": "needs CIFAR-10 and a GPU",
    "dvc exp": "a family of commands",
    "dvc exp run --queue*": "uses DVC's queue; .ci/test_dvc.py runs one experiment in a copy",
    "dvc exp run --run-all": "uses DVC's queue",
    "dvc exp show *": "DVC only",
    "dvc fetch *": "DVC only",
    "dvc gc *": "DVC only",
    "dvc config cache.type *": "needs a file system with links; DVC only",
    "dvc remote modify *": "credentials",
    "dvc remote add --default store s3:*": "needs a server",
    "dvc remote add --default store ssh:*": "needs a server",
}
"""Pattern of commands -> why no test runs them."""

PYTHON = {
    ("README.md", "from mochi import MoCHiLoss"): "tests/test_library_example.py",
    ("docs/library.md", "*"): "tests/test_library_example.py",
    ("docs/extending.md", '"""InfoNCE against the hardest negatives alone."""'): ".ci/test_extending.py",
    ("docs/extending.md", '"""Classification by the nearest class mean."""'): ".ci/test_extending.py",
    ("docs/use.md", "import numpy as np"): "tests/test_document_commands.py",
}
"""(Document, first line of a block) -> the file that runs it."""

WRITTEN = {"config/mine.yaml"}
"""Files that a command of the documents writes."""


class Command(NamedTuple):
    """A command of a document."""

    document: str
    text: str
    is_mention: bool = False
    """Only named, in running text: it may need arguments."""


def blocks(document: Path) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return re.findall(r"^```(\S*)\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> Iterator[Command]:
    """Those in blocks of a shell, or of no language, and those in running text."""
    for document in DOCUMENTS:
        name = document.relative_to(ROOT).as_posix()
        for language, content in blocks(document):
            if language in {"", "sh", "bash", "console"}:
                for line in re.sub(r"\\\n\s*", "", content).splitlines():
                    for part in re.sub(r"(^|\s)#.*|\s{3,}.*", "", line.removeprefix("$ ")).split("&&"):
                        if part.strip():
                            yield Command(name, " ".join(part.split()))
        text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
        for span in re.findall(r"`([^`]+)`", text):
            words = span.split()
            if len(words) > 1 and program(words)[:1] in [[tool] for tool in TOOLS]:
                yield Command(name, " ".join(words), all(word.isalpha() for word in words[1:]))


def program(words: list[str]) -> list[str]:
    """A command without the environment variables before it."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


COMMANDS = sorted(set(commands()))
MOCHI = get_command(app)


@cache
def dvc_parser() -> argparse.ArgumentParser:
    from dvc.cli.parser import get_main_parser  # a second, in the process that runs these tests alone

    parser: argparse.ArgumentParser = get_main_parser()
    return parser


@cache
def snakemake_parser() -> argparse.ArgumentParser:
    from snakemake.cli import get_argument_parser

    parser: argparse.ArgumentParser = get_argument_parser()
    return parser


def test_the_documents_have_commands() -> None:
    assert len({command.text for command in COMMANDS}) > 80
    assert {program(command.text.split())[0] for command in COMMANDS} >= {
        "mochi",
        "snakemake",
        "make",
        "dvc",
    }


def test_every_command_is_run_or_listed() -> None:
    patterns = (*RUN, *NOT_RUN)
    missing = [
        each for each in COMMANDS if not any(fnmatchcase(each.text, pattern) for pattern in patterns)
    ]
    assert not missing, "name the test that runs it in RUN, or the reason why none does in NOT_RUN"


def test_the_lists_name_commands_and_the_files_that_run_them() -> None:
    texts = {command.text for command in COMMANDS}
    assert not RUN.keys() & NOT_RUN
    unknown = [each for each in (*RUN, *NOT_RUN) if not any(fnmatchcase(text, each) for text in texts)]
    assert not unknown, "in no document"
    wrong = [
        (text, file, word)
        for text in sorted(texts)
        for pattern, file in RUN.items()
        if fnmatchcase(text, pattern)
        for word in named(text)
        if word not in (ROOT / file).read_text()
    ]
    assert not wrong, "the file does not have the word of the command"


def named(text: str) -> list[str]:
    """The words of a command that a file which runs it contains: the subcommand and the long options."""
    words = program(text.split())
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    match words:
        case "mochi", subcommand, *_:
            return [f'"{subcommand}"', *options]
        case "python", "-m", module, *_:
            return [module.rpartition(".")[2], *options]
        case (("dvc" | "git"), subcommand, *_):
            return [f'"{subcommand}"']
        case _:
            return options


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.document}: {command.text}")
def test_a_command_is_one_that_its_program_accepts(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = program(shlex.split(command.text))
    for word in words:
        if re.match(r"(config|profiles|tests|docs|workflow)/", word) or word == "requirements.lock":
            assert word in WRITTEN or Path(word.partition(":")[0]).exists(), f"{word}: no such file"
    accept(words, is_mention=command.is_mention)


def accept(words: list[str], *, is_mention: bool = False) -> None:
    """Raise if the program of a command refuses its arguments."""
    match words:
        case ["mochi", *arguments] | ["python", "-m", "mochi", *arguments]:
            accept_mochi(arguments, is_mention=is_mention)
        case ["python", "-m", module, *_]:
            assert find_spec(module), f"{module}: no such module"
        case ["snakemake", *arguments]:
            accept_snakemake(arguments)
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text()
            rules = re.findall(r"^([\w-]+):", makefile, re.MULTILINE)
            variables = re.findall(r"\$\((\w+)\)", makefile)
            known = {*rules, *variables}
            assert {target.partition("=")[0] for target in targets} <= known
        case ["dvc", *arguments]:
            accept_dvc(arguments, is_mention=is_mention)
        case ["docker", "compose", *arguments]:
            services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
            place = next(place for place, word in enumerate(arguments) if word in services)
            accept_inside(arguments[place + 1 :])
        case ["docker", "run", *arguments]:
            accept_inside(arguments[arguments.index("mochi") + 1 :])
        case ["apptainer", "exec", *arguments]:
            accept_inside(arguments[arguments.index("mochi.sif") + 1 :])


def accept_inside(words: list[str]) -> None:
    """The command that a container runs, if one is given."""
    if words:
        accept(words)


def accept_mochi(arguments: list[str], *, is_mention: bool) -> None:
    assert isinstance(MOCHI, click.Group) or hasattr(MOCHI, "commands")
    if not arguments:
        return
    name, *rest = arguments
    known = MOCHI.commands
    assert name in known, f"mochi {name}: no such command"
    if is_mention:
        return
    if "..." in rest:
        options = {option for parameter in known[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options
        return
    # Placeholders for numbers; their parameters have a type.
    with known[name].make_context(name, [{"K": "0"}.get(word, word) for word in rest]):
        pass


def accept_snakemake(arguments: list[str]) -> None:
    if "kubernetes" in arguments:  # a plugin that is not in the lock
        return
    found = snakemake_parser().parse_args([word for word in arguments if word != "..."])
    for file in found.configfile or []:
        assert str(file).endswith(".yaml"), f"{file}: taken for an experiment file"
    texts = [
        (ROOT / "Snakefile").read_text(),
        *(path.read_text() for path in ROOT.glob("workflow/rules/*")),
    ]
    rules = set(re.findall(r"^(?:rule|checkpoint) (\w+):", "\n".join(texts), re.MULTILINE))
    assert set(found.targets) | set(found.set_resources or {}) <= rules


def accept_dvc(arguments: list[str], *, is_mention: bool) -> None:
    found = None
    if is_mention or "..." in arguments:
        arguments = [*arguments, "--help"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):  # --help ends so
        found = dvc_parser().parse_args([word for word in arguments if word != "..."])
    if found is None:
        return
    for setting in getattr(found, "set_param", None) or []:
        file, _, path = setting.partition("=")[0].partition(":")
        value = yaml.safe_load((ROOT / file).read_text())
        for key in path.split("."):
            value = value[key]


def test_a_python_block_is_run() -> None:
    used = set()
    for document in DOCUMENTS:
        name = document.relative_to(ROOT).as_posix()
        for language, content in blocks(document):
            if language != "python":
                continue
            first = content.splitlines()[0]
            (key,) = [key for key in PYTHON if key[0] == name and fnmatchcase(first, key[1])] or [None]
            assert key, f"{name}: no test runs the block that begins with {first!r}"
            assert name in (ROOT / PYTHON[key]).read_text()
            used.add(key)
    assert used == PYTHON.keys()


def test_the_features_block_of_the_docs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The block of docs/use.md."""
    monkeypatch.chdir(tmp_path)
    vectors = np.array([[2, 0], [0, 3], [1, 1], [-1, 0]], np.float32)
    np.savez("F.npz", paths=np.array(["a", "b", "c", "d"]), vectors=vectors)
    ((_, code),) = [block for block in blocks(ROOT / "docs/use.md") if block[0] == "python"]
    exec(compile(code, "docs/use.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out == "['a' 'c' 'b' 'd']\n"
