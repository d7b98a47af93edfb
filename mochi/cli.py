"""The command line: what a user types, one command for each rule of the workflow.

Only this module prints or exits. Imports of heavy modules stand in the commands that need them, so that
`--help` and the small commands answer at once.
"""

import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from mochi.errors import UserError

app = typer.Typer(
    help="MoCHi: hard negative mixing for contrastive learning, from raw images to the paper's tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Option("--config", help="Experiment file.")]
RunFile = Annotated[Path, typer.Option("--run", help="run.yaml, made by `resolve`.")]
DataFolder = Annotated[Path, typer.Option("--data", help="Prepared data set: the folder of manifest.json.")]
DataRoot = Annotated[Path, typer.Option("--data-root", help="Where prepared data sets lie.")]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder that receives the results.")]
EncoderFile = Annotated[Path, typer.Option("--encoder", help="encoder.safetensors of the pretrain stage.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Processor threads to compute with.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that load images.")]
OneGpu = Annotated[
    int | None, typer.Option("--gpus", min=0, max=1, help="0 or 1. Default: what is visible.")
]
Gpus = Annotated[
    int | None,
    typer.Option(
        "--gpus", min=0, help="GPUs in all; several become torchrun ranks. Default: what is visible."
    ),
]


@app.command()
def check(
    config: Annotated[Path | None, typer.Option("--config", help="Experiment file to check.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of images to report on instead.")] = None,
    data_root: DataRoot = Path("data"),
    report: Annotated[Path | None, typer.Option(help="With --data: write the report as JSON.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="With --data: processes that decode images.")] = 1,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the prepared data whole and compare every sha256.")
    ] = False,
) -> None:
    """Check an experiment or a folder of images, and this machine, before anything is computed."""
    if data is not None:
        if config is not None:
            raise UserError("found both --config and --data; check one thing at a time")
        _report_on_images(data, report, jobs, data_root)
        return
    from mochi import preflight as checking
    from mochi.config import load_experiment

    experiment = load_experiment(config or Path("config/config.yaml"))
    findings = checking.check(experiment, data_root, verify=verify)
    for finding in findings:
        typer.echo(finding)
    if any(finding.startswith("error") for finding in findings):
        raise typer.Exit(1)
    typer.echo(f"{experiment.name}: {len(experiment.methods)} methods, ready")


def _report_on_images(folder: Path, report: Path | None, jobs: int, data_root: Path) -> None:
    """What is in a folder, and which settings fit a set of this size."""
    from mochi.data import inspect as reporting
    from mochi.runtime.progress import counter
    from mochi.storage.atomic import write_json

    found = reporting.inspect(folder, jobs=jobs, cache=data_root / ".cache", progress=counter("check"))
    typer.echo(reporting.render(found))
    if report is not None:
        write_json(report, found)


@app.command()
def plan(
    config: ConfigFile = Path("config/config.yaml"),
    data_root: DataRoot = Path("data"),
    measure: Annotated[bool, typer.Option(help="Time a few steps here to estimate the hours.")] = True,
) -> None:
    """Runs, steps, disk and estimated hours of an experiment on this machine."""
    from mochi import preflight as checking
    from mochi.config import load_experiment

    for line in checking.plan(load_experiment(config), data_root, measure=measure):
        typer.echo(line)


@app.command()
def resolve(
    method: Annotated[str, typer.Option(help="A row of the experiment.")],
    seed: Annotated[int, typer.Option(help="One of its seeds.")],
    out: Annotated[Path, typer.Option(help="The run.yaml to write.")],
    config: ConfigFile = Path("config/config.yaml"),
    stage: Annotated[str | None, typer.Option(help="Keep only what this stage depends on.")] = None,
) -> None:
    """Write run.yaml: one method and seed of an experiment, complete in itself."""
    from mochi import config as configuration
    from mochi.storage.atomic import write_text

    experiment = configuration.load_experiment(config)
    run = configuration.resolve(experiment, method, seed, str(config))
    if seed not in (known := configuration.method_seeds(experiment, method)):
        raise UserError(f"--seed: found {seed}; {method} has the seeds {', '.join(map(str, known))}")
    write_text(out, configuration.write_run(configuration.only_for(run, stage) if stage else run))


@app.command()
def prepare(
    out: Annotated[Path, typer.Option(help="Folder of the prepared data set, for example data/mine.")],
    config: Annotated[Path | None, typer.Option(help="Experiment file whose dataset to prepare.")] = None,
    source: Annotated[str | None, typer.Option(help="Origin of the images, without --config.")] = None,
    path: Annotated[
        str | None, typer.Option(help="Where the images lie, for sources that need it.")
    ] = None,
    option: Annotated[list[str], typer.Option(help="More options of the source, as key=value.")] = [],  # noqa: B006
    jobs: Annotated[int, typer.Option(min=1, help="Processes that decode images.")] = 1,
) -> None:
    """Images into shards and a manifest. Unreadable files are set aside and listed."""
    from mochi.config import load_experiment, parse_dataset
    from mochi.data.ingest import prepare as stage
    from mochi.runtime.progress import counter

    if (config is None) == (source is None):
        raise UserError("found both or neither of --config and --source; give one of them")
    if config:
        dataset = load_experiment(config).dataset
    else:
        dataset = parse_dataset(source or "", out.name, path, option)
    _prepare_process(1, out)
    manifest = stage.prepare(dataset, out, jobs=jobs, progress=counter(f"prepare {out.name}"))
    for name, split in manifest["splits"].items():
        typer.echo(f"{name}: {split['count']} images, {split['unlabelled']} of them without a label")
    typer.echo(f"{len(manifest['classes'])} classes; ignored: {manifest['ignored'] or 'nothing'}")
    if manifest["quarantined"]:
        typer.echo(f"{manifest['quarantined']} unreadable files are listed in {out / 'quarantine.csv'}")


@app.command()
def pretrain(
    run: RunFile,
    data: DataFolder,
    out: OutFolder,
    work: Annotated[Path, typer.Option(help="Folder of the resume checkpoint, removed at the end.")],
    threads: Threads = 1,
    workers: Workers = 0,
    events: Annotated[Path | None, typer.Option(help="Folder for TensorBoard events.")] = None,
    gpus: Gpus = None,
    nodes: Annotated[int, typer.Option(min=1, help="Hosts that share the GPUs; several need Slurm.")] = 1,
) -> None:
    """Train an encoder: MoCo, MoCHi, the supervised ceiling or the untrained floor."""
    _take_gpus(gpus, nodes)
    from mochi.config import load_run
    from mochi.pretraining import stage as stage
    from mochi.runtime.launch import local_share

    _prepare_process(local_share(threads), out, work)
    workers = local_share(workers, at_least=0)
    with _holding(work):
        stage.run(load_run(run, "pretrain"), data, out, work, workers=workers, events=events)


@app.command()
def linear(
    run: RunFile,
    data: DataFolder,
    encoder: EncoderFile,
    out: OutFolder,
    threads: Threads = 1,
    workers: Workers = 0,
    gpus: OneGpu = None,
) -> None:
    """Linear classification on the frozen encoder."""
    _take_gpus(gpus)
    from mochi.config import load_run
    from mochi.evaluation import linear as stage

    _prepare_process(threads, out)
    stage.run(load_run(run, "linear"), data, encoder, out, workers=workers)


@app.command()
def knn(
    run: RunFile,
    data: DataFolder,
    encoder: EncoderFile,
    out: OutFolder,
    threads: Threads = 1,
    workers: Workers = 0,
    gpus: OneGpu = None,
) -> None:
    """Nearest-neighbour classification on the frozen encoder."""
    _take_gpus(gpus)
    from mochi.config import load_run
    from mochi.evaluation import knn as stage

    _prepare_process(threads, out)
    stage.run(load_run(run, "knn"), data, encoder, out, workers=workers)


@app.command()
def scenes(
    name: Annotated[str, typer.Option("--set", help="Detection set of the experiment, with `scenes`.")],
    out: Annotated[Path, typer.Option(help="Folder to make, for example data/photo-scenes.")],
    config: ConfigFile = Path("config/config.yaml"),
) -> None:
    """Make a detection set from photographs: VOC files and COCO files of the same scenes."""
    from mochi.config import load_experiment
    from mochi.detection import scenes as stage

    sets = load_experiment(config).evaluation.detection
    if name not in sets:
        raise UserError(f"--set: found {name!r}; {config} has {', '.join(sets) or 'no detection sets'}")
    _prepare_process(1, out.parent)
    splits = stage.run(sets[name].data, out)["splits"]
    for split, counts in splits.items():
        typer.echo(f"{out} {split}: {counts['images']} images, {counts['objects']} objects")


@app.command()
def detect(
    run: RunFile,
    name: Annotated[str, typer.Option("--set", help="Detection set of the run.")],
    encoder: EncoderFile,
    out: OutFolder,
    work: Annotated[Path, typer.Option(help="Folder of resume checkpoints, removed at the end.")],
    threads: Threads = 1,
    events: Annotated[Path | None, typer.Option(help="Folder for TensorBoard events.")] = None,
    gpus: Gpus = None,
) -> None:
    """Fine-tune the encoder as a detector, several times, and judge it."""
    _take_gpus(gpus)
    from mochi.config import load_run
    from mochi.detection import stage as stage
    from mochi.runtime.launch import local_share

    _prepare_process(local_share(threads), out, work)
    with _holding(work):
        stage.run(load_run(run, f"detection-{name}"), name, encoder, out, work, events)


@app.command()
def tables(
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder that receives the tables. Default: in the results.")
    ] = None,
    config: ConfigFile = Path("config/config.yaml"),
    results: Annotated[Path, typer.Option(help="Root of the results.")] = Path("results"),
    published: Annotated[Path, typer.Option(help="The papers' numbers.")] = Path("workflow/published.csv"),
    explain: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="METHOD TASK", help="Print the chain behind one cell instead."),
    ] = None,
) -> None:
    """Collect an experiment's results: mean, spread, number of seeds, published value."""
    from mochi.config import load_experiment

    experiment = load_experiment(config)
    if explain:
        from mochi.report.explain import explain as trace

        for line in trace(experiment, results, *explain):
            typer.echo(line)
        return
    from mochi.report import tables as stage

    out = out or results / experiment.name / "tables"
    _prepare_process(1, out)
    stage.run(experiment, results, published, out)


@app.command()
def figures(
    out: OutFolder,
    config: ConfigFile = Path("config/config.yaml"),
    results: Annotated[Path, typer.Option(help="Root of the results.")] = Path("results"),
) -> None:
    """Draw an experiment's results: accuracy with spread, training curves, hardness of negatives."""
    from mochi.config import load_experiment
    from mochi.report import figures as stage

    _prepare_process(1, out)
    stage.run(load_experiment(config), results, out)


@app.command()
def digests(out: Annotated[Path, typer.Option(help="The YAML file to write.")]) -> None:
    """Write the digest of each stage's code: what executes, without comments and layout."""
    import yaml

    from mochi.provenance.fingerprint import stage_digests
    from mochi.storage.atomic import write_text

    write_text(out, yaml.safe_dump(stage_digests(), sort_keys=False))


@app.command()
def record(config: ConfigFile = Path("config/config.yaml")) -> None:
    """Let DVC store a finished experiment: writes its dvc.yaml and dvc.lock, which belong into git."""
    from mochi.record import record as write_and_commit

    path = write_and_commit(config)
    typer.echo(f"recorded in {path} and {path.with_suffix('.lock')}; add both to git, then `dvc push`")


benchmark = typer.Typer(help="What things cost here, as ratios within one run.", no_args_is_help=True)
app.add_typer(benchmark, name="benchmark")
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Counted rounds of every alternative.")]


@benchmark.command("negatives")
def benchmark_negatives(
    batch: Annotated[int, typer.Option(min=1, help="B, queries.")] = 256,
    queue_size: Annotated[int, typer.Option(min=2, help="K.")] = 65536,
    dim: Annotated[int, typer.Option(min=1, help="C.")] = 128,
    num_hardest: Annotated[int, typer.Option(min=2, help="N, at most K.")] = 1024,
    num_pairs: Annotated[int, typer.Option(min=0, help="s.")] = 512,
    num_query: Annotated[int, typer.Option(min=0, help="s'.")] = 256,
    rounds: Rounds = 7,
    threads: Threads = 1,
) -> None:
    """The loss and its gradient: ours, MoCo-v2 by autograd, and MoCHi with materialised synthetics."""
    from mochi.benchmark import negatives, timing
    from mochi.runtime.distributed import pick_device

    _prepare_process(threads)
    if num_hardest > queue_size:
        raise UserError(f"--num-hardest: found {num_hardest}; at most the queue's {queue_size}")
    sizes = (batch, queue_size, dim, num_hardest, num_pairs, num_query)
    typer.echo("B={} K={} C={} N={} s={} s'={}, loss and gradient".format(*sizes))
    rows = negatives.run(*sizes, rounds=rounds, device=pick_device())
    typer.echo("\n".join(timing.table(rows, baseline=negatives.BASELINE)))


@benchmark.command("step")
def benchmark_step(
    config: ConfigFile = Path("config/config.yaml"),
    data_root: DataRoot = Path("data"),
    rounds: Rounds = 30,
    threads: Threads = 1,
) -> None:
    """A training step of each contrastive method of an experiment, the encoders alone, the data alone."""
    from mochi.benchmark import step, timing
    from mochi.config import load_experiment
    from mochi.data.format import open_dataset
    from mochi.runtime.distributed import pick_device

    _prepare_process(threads)
    experiment = load_experiment(config)
    dataset = open_dataset(data_root / experiment.dataset.name)
    rows = step.run(experiment, dataset, rounds=rounds, device=pick_device())
    baseline = next(row.name for row in rows if row.ratio == 1.0)
    typer.echo("\n".join(timing.table(rows, baseline=baseline)))


def _take_gpus(count: int | None, nodes: int = 1) -> None:
    """Before anything heavy is imported: this process may become torchrun here."""
    from mochi.runtime.launch import on_gpus

    if count is not None:
        on_gpus(count, nodes)


@benchmark.command("data")
def benchmark_data(
    rounds: Rounds = 5,
    num_images: Annotated[
        int, typer.Option(min=64, help="JPEGs made for the parts that read files.")
    ] = 1024,
) -> None:
    """Views, loaders and preparation beside torchvision's and lightly's, and memory over time."""
    from mochi.benchmark import data, rows

    typer.echo("\n".join(rows.lines(data.run(repeats=rounds, num_images=num_images))))


def _prepare_process(threads: int, *folders: Path) -> None:
    """Threads as the rule gave them, and folders that can be written, before any compute."""
    import torch

    from mochi.storage.atomic import require_writable

    torch.set_num_threads(threads)
    for folder in folders:
        require_writable(folder)


def _holding(work: Path) -> AbstractContextManager[None]:
    """One training of a run at a time; its ranks are one."""
    from mochi.runtime.locks import holding

    return holding(work) if os.environ.get("RANK", "0") == "0" else nullcontext()


def main() -> NoReturn:
    """Run a command; a user's mistake ends in its message and exit code 1, never in a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except (UserError, OSError) as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        sys.exit(1)
    sys.exit(0)
