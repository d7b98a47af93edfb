"""The command line: one command for each stage, and commands that check, inspect and explain.

Only this module writes to stdout. Imports of heavy modules are inside the commands that need them, so that
`--help` and a stage that is up to date return at once.
"""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from mochi import __version__
from mochi.errors import UserError
from mochi.extras import EXTRAS, not_installed
from mochi.provenance.wanted import Result
from mochi.runtime.progress import configure_logging, printable

if TYPE_CHECKING:
    from mochi.config import Experiment
    from mochi.inference.encoder import LoadedEncoder, Overrides
    from mochi.inference.folder import FolderFeatures

app = typer.Typer(
    help="MoCHi: hard negative mixing for contrastive learning, from raw images to the paper's tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
)
_INSPECT, _USE, _STAGE = "Check and explain", "Use an encoder", "Stages (run by the workflow)"

DEFAULT_CONFIG = Path("config/config.yaml")
# readable=False: not checked by typer, whose usage errors have another form, but where a file is read.
ConfigArgument = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", envvar="MOCHI_CONFIG", help="Experiment file.", readable=False),
]
ConfigFile = Annotated[
    Path, typer.Option("--config", envvar="MOCHI_CONFIG", help="Experiment file.", readable=False)
]
Method = Annotated[str, typer.Option(help="A row of the experiment, such as moco-v2.")]
Seed = Annotated[int, typer.Option(min=0, help="A seed of that row.")]
Jobs = Annotated[int, typer.Option(min=1, help="Processes that decode images.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads for computing, per GPU.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that load images, per GPU.")]
EncoderFile = Annotated[
    Path | None,
    typer.Option("--encoder", help="Encoder file. Default: the one trained by this run.", readable=False),
]
OneGpu = Annotated[
    int | None,
    typer.Option("--gpus", min=0, max=1, help="0 or 1. Default: the first visible, without claiming it."),
]
EncoderPath = Annotated[Path, typer.Option("--encoder", help="Encoder file.", readable=False)]
EncoderConfig = Annotated[
    Path | None,
    typer.Option("--config", help="Experiment file with the encoder and its image size.", readable=False),
]
ImageFolder = Annotated[
    Path, typer.Option("--images", metavar="DIR", help="Folder of images.", readable=False)
]
Architecture = Annotated[str | None, typer.Option(help="For an encoder without metadata: resnet18, ...")]
Stem = Annotated[str | None, typer.Option(help="For an encoder without metadata: imagenet, half or full.")]
Width = Annotated[int | None, typer.Option(min=1, help="For an encoder without metadata: 64, ...")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Side of the crop. Default: as in training.")]
Resize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Short side before the crop. Default: 8/7 of a crop of 64 px or more, else the crop."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images encoded at once.")]
DecodingThreads = Annotated[
    int | None, typer.Option(min=1, help="Decoding threads. Default: one per core.")
]
OutFolder = Annotated[
    Path | None, typer.Option("--out", help="Results folder. Default: the run's folder in results/.")
]
Gpus = Annotated[
    int | None, typer.Option(min=0, help="Total GPUs, one torchrun rank each. Default: the first visible.")
]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        _echo(f"mochi {__version__}")
        raise typer.Exit


@app.command(rich_help_panel=_INSPECT)
def check(
    config: ConfigArgument = DEFAULT_CONFIG,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the prepared data and compare every sha256.")
    ] = False,
) -> None:
    """Check an experiment, its data and this machine before anything is computed."""
    from mochi import preflight
    from mochi.config import load_experiment

    experiment = load_experiment(config)
    findings = preflight.check(experiment, verify=verify)
    for finding in findings:
        _echo(str(finding))
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)
    _echo(f"{experiment.name}: {len(experiment.methods)} methods, ready")


@app.command(rich_help_panel=_INSPECT)
def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of images, a VOC or a COCO tree.", readable=False)
    ],
    report: Annotated[Path | None, typer.Option(help="Also write the report as JSON.")] = None,
    jobs: Jobs = 1,
) -> None:
    """Summarise a folder of images and recommend settings."""
    from mochi.data import inspect as inspection
    from mochi.data.describe_folder import detection_data
    from mochi.runtime.progress import counter
    from mochi.storage.atomic import require_writable_file, write_json

    if report is not None:
        require_writable_file(report)
    summary = inspection.inspect(folder, jobs=jobs, progress=counter("inspect"))
    _echo(inspection.render(summary))
    if data := detection_data(folder):
        from mochi.detection import sets

        contents = sets.inspect(data, jobs)
        _echo(sets.render(contents))
        summary["detection"] = contents._asdict()
    if report is not None:
        write_json(report, summary)


@app.command(rich_help_panel=_INSPECT)
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of images, a VOC or a COCO tree.", readable=False)
    ],
    out: Annotated[Path, typer.Option(help="Experiment file to write; its name becomes the experiment's.")],
    hours: Annotated[
        float | None,
        typer.Option(
            help="Choose epochs, image size and seeds so that the experiment takes about this long here."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a complete experiment file for a folder of images."""
    from mochi.new_experiment import new_experiment

    for line in new_experiment(folder, out, hours=hours, force=force):
        _echo(line)


@app.command(rich_help_panel=_INSPECT)
def plan(
    config: ConfigArgument = DEFAULT_CONFIG,
    measure: Annotated[bool, typer.Option(help="Time a few steps to estimate the hours.")] = True,
) -> None:
    """Estimate the runs, steps, hours, memory and disk of an experiment on this machine.

    Measures for at most a minute, with the threads and workers that a run has in the workflow.
    """
    from mochi import plan as planning
    from mochi.config import load_experiment

    for line in planning.plan(load_experiment(config), measure=measure):
        _echo(line)


@app.command(rich_help_panel=_INSPECT)
def status(config: ConfigArgument = DEFAULT_CONFIG) -> None:
    """Show which runs of an experiment are running, failed, done, stale or not started."""
    from mochi.config import load_experiment
    from mochi.status import status as experiment_status

    for line in experiment_status(load_experiment(config)):
        _echo(line)


@app.command(rich_help_panel=_INSPECT)
def adopt(
    config: ConfigArgument = DEFAULT_CONFIG,
    accept_code: Annotated[
        bool,
        typer.Option("--accept-code", help="Keep results whose code changed; recorded in provenance.json."),
    ] = False,
    restore: Annotated[
        bool, typer.Option("--restore", help="Replace stale results with current ones from DVC's cache.")
    ] = False,
) -> None:
    """Compare existing results with the experiment and tell Snakemake which are current."""
    from mochi.adopt import adopt as adopt_results
    from mochi.config import load_experiment

    experiment = load_experiment(config)
    for line in adopt_results(experiment, config, accept_code=accept_code, restore=restore):
        _echo(line)
    _remove_leftovers(experiment)


@app.command(rich_help_panel=_INSPECT)
def explain(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A row of the table.")],
    task: Annotated[str, typer.Argument(metavar="TASK", help="An evaluation, such as linear.")],
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Trace one number to its commands, settings, code, data and machine."""
    from mochi.config import load_experiment
    from mochi.report.explain import explain as trace

    for line in trace(load_experiment(config), method, task):
        _echo(line)


@app.command(rich_help_panel=_INSPECT)
def schema() -> None:
    """Print the keys of an experiment file as a JSON Schema, for editors."""
    import json

    from mochi.config.schema import schema as experiment_schema

    _echo(json.dumps(experiment_schema(), indent=2))


@app.command(rich_help_panel=_USE)
def features(
    encoder: EncoderPath,
    images: ImageFolder,
    out: Annotated[Path, typer.Option(help="File to write: F.npz or F.parquet.")],
    config: EncoderConfig = None,
    architecture: Architecture = None,
    stem: Stem = None,
    width: Width = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    batch_size: BatchSize = 64,
    jobs: DecodingThreads = None,
    gpus: OneGpu = None,
) -> None:
    """Write the features of every image in a folder: paths and vectors."""
    _take_gpus(gpus)
    from mochi.inference.encoder import Overrides
    from mochi.inference.write import FEATURES, require_output, write_features

    require_output(out, FEATURES)
    overrides = Overrides(config, architecture, stem, width, image_size, resize)
    _, encoded = _load_and_encode(encoder, overrides, images, batch_size, jobs)
    listed = write_features(out, encoded)
    _echo(f"{out}: {len(encoded.paths)} images, vectors of {encoded.vectors.shape[1]} numbers")
    if listed is not None:
        _echo(f"{len(encoded.quarantined)} files are not usable images; see {listed}")
    _echo_ignored(encoded)


@app.command(rich_help_panel=_USE)
def neighbors(
    encoder: EncoderPath,
    images: ImageFolder,
    out: Annotated[Path, typer.Option(help="Picture to write, for example sheet.png.")],
    query: Annotated[
        list[Path] | None,
        typer.Option(readable=False, help="Query image; may be repeated. Default: some of DIR."),
    ] = None,
    num_queries: Annotated[int, typer.Option(min=1, help="Queries taken from DIR without --query.")] = 8,
    k: Annotated[int, typer.Option(min=1, help="Neighbours of each query.")] = 8,
    hardest: Annotated[
        bool, typer.Option("--hardest", help="Only images of other classes: the hardest negatives.")
    ] = False,
    config: EncoderConfig = None,
    architecture: Architecture = None,
    stem: Stem = None,
    width: Width = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    batch_size: BatchSize = 64,
    jobs: DecodingThreads = None,
    gpus: OneGpu = None,
) -> None:
    """Draw queries and their most similar images of a folder as one picture."""
    _take_gpus(gpus)
    from mochi.inference.encoder import Overrides
    from mochi.inference.neighbors import PICTURE_SUFFIXES, require_images, sheet
    from mochi.inference.write import require_output

    require_output(out, PICTURE_SUFFIXES)
    require_images(query or [], images, out)
    overrides = Overrides(config, architecture, stem, width, image_size, resize)
    loaded, encoded = _load_and_encode(encoder, overrides, images, batch_size, jobs)
    sheet(loaded, images, encoded, query or [], out, k=k, num_queries=num_queries, hardest=hardest)
    _echo(f"{out}: written")
    for path, reason in encoded.quarantined:
        _echo(f"skipped: {path!r}: {reason}")
    _echo_ignored(encoded)


@app.command("import", rich_help_panel=_USE)
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A checkpoint: .pth, .pkl, .safetensors.")],
    out: Annotated[Path, typer.Option(help="Encoder file to write, X.safetensors.")],
    which: Annotated[str, typer.Option(help="query, momentum, or the prefix of an encoder.")] = "query",
    architecture: Annotated[
        str | None, typer.Option(help="Such as resnet50. Default: from the shapes of the tensors.")
    ] = None,
    stem: Annotated[
        str | None, typer.Option(help="half or full: the shapes do not show the stride of a 3x3 stem.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the training images, pixels.")
    ] = None,
    channel_order: Annotated[
        Literal["RGB", "BGR"] | None, typer.Option(help="Of the training images. Default: RGB.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean subtracted from each channel: three numbers, a,b,c.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Divisor of each channel: a,b,c.")] = None,
) -> None:
    """Convert a checkpoint of MoCo, lightly, solo-learn, VISSL, timm, detectron2, ... to an encoder file.

    No code in the file is run. Missing or unknown tensors are listed and refused.
    """
    from mochi.encoders.importing import Choices, import_checkpoint

    numbers = _numbers("--mean", mean), _numbers("--std", std)
    choices = Choices(which, architecture, stem, image_size, channel_order, *numbers)
    for line in import_checkpoint(file, out, choices):
        _echo(line)


def _echo_ignored(encoded: "FolderFeatures") -> None:
    if encoded.ignored:
        _echo(f"ignored: {dict(encoded.ignored)}")


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option}: found {text!r}; expected numbers, such as 0.485,0.456,0.406") from None


@app.command(rich_help_panel=_USE)
def export(
    file: Annotated[
        Path,
        typer.Argument(metavar="X.safetensors", help="An encoder file of this project.", readable=False),
    ],
    format: Annotated[
        Literal["torchvision", "timm", "detectron2", "moco"],
        typer.Option(help="Library to write it for."),
    ],
    out: Annotated[Path, typer.Option(help="File to write.")],
) -> None:
    """Write an encoder for torchvision, timm, detectron2 or MoCo's scripts."""
    from mochi.encoders.exporting import export_encoder

    for line in export_encoder(file, format, out):
        _echo(line)


@app.command(rich_help_panel=_STAGE)
def prepare(
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATASET", help="A data set of the experiment. Default: its `dataset`."),
    ] = None,
    config: ConfigFile = DEFAULT_CONFIG,
    source: Annotated[
        str | None, typer.Option(help="Source of the images, instead of an experiment file.")
    ] = None,
    path: Annotated[str | None, typer.Option(help="Location of the images, with --source.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write. Default: data/NAME; required with --source."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Further options of the source, as key=value.")
    ] = None,
    jobs: Jobs = 1,
) -> None:
    """Decode and check images; write shards and a manifest."""
    from mochi import layout
    from mochi.config import datasets, load_experiment, parse_dataset
    from mochi.data.ingest.sources.folder import current_listing
    from mochi.provenance.wanted import prepared

    if source is None:
        experiment = load_experiment(config)
        known = datasets(experiment)
        if data is not None and data not in known:
            raise UserError(f"DATASET: found {data!r}; {experiment.name} has: {', '.join(known)}")
        dataset = experiment.dataset if data is None else known[data]
    elif data is not None:
        raise UserError(f"DATASET: found {data!r} with --source; --out names the data set")
    elif out is None:
        raise UserError("--out: missing; give the folder to prepare, for example data/mine")
    else:
        dataset = parse_dataset(source, out.name, path, option or [])
    folder = out or layout.dataset(dataset.name)
    result = prepared(dataset, folder, current_listing(dataset, folder))
    if _is_current(result):
        return
    from mochi.data.format import open_dataset
    from mochi.data.ingest.prepare import prepare as prepare_dataset
    from mochi.data.inspect import repeated
    from mochi.provenance.record import Stopwatch, write_record
    from mochi.runtime.progress import counter
    from mochi.storage.atomic import require_writable

    require_writable(folder)
    watch = Stopwatch()
    manifest = prepare_dataset(
        dataset, folder, jobs=jobs, progress=counter(f"prepare {folder.name}"),
        finish=lambda new: write_record(new, result, watch),
    )  # fmt: skip
    for name, split in manifest["splits"].items():
        _echo(f"{name}: {split['count']} images, {split['unlabelled']} of them without a label")
    _echo(f"{len(manifest['classes'])} classes; ignored: {manifest['ignored'] or 'nothing'}")
    for name, split in manifest["splits"].items():
        if split["shrunk"]:
            _echo(f"{name}: {split['shrunk']} images were larger than max_side and are stored smaller")
        if note := open_dataset(folder).split(name).oversized():
            _echo(f"note: {note}")
    for warning in repeated(manifest["duplicates"]):
        _echo(f"warning: {warning}; {folder / 'duplicates.csv'} lists them")
    if manifest["quarantined"]:
        _echo(f"{manifest['quarantined']} unreadable files are listed in {folder / 'quarantine.csv'}")


@app.command(rich_help_panel=_STAGE)
def scenes(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write: `data.path` of a detection set.")
    ],
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Generate a detection set from photographs, as VOC and COCO files."""
    from mochi.config import load_experiment
    from mochi.provenance.wanted import scenes as scenes_of

    experiment = load_experiment(config)
    results = scenes_of(experiment)
    if folder not in results:
        known = ", ".join(map(str, results)) or "none"
        raise UserError(f"DIR: found {folder}; {config} makes scenes in: {known}")
    if _is_current(result := results[folder]):
        return
    from mochi.detection.scenes import run as generate_scenes
    from mochi.provenance.record import Stopwatch, write_record
    from mochi.storage.atomic import require_writable

    require_writable(folder.parent)
    watch = Stopwatch()
    sets = experiment.evaluation.detection.values()
    data = next(chosen.data for chosen in sets if Path(chosen.data.path) == folder)
    splits = generate_scenes(data, folder)["splits"]
    write_record(folder, result, watch)
    for split, counts in splits.items():
        _echo(f"{folder} {split}: {counts['images']} images, {counts['objects']} objects")


@app.command(rich_help_panel=_STAGE)
def pretrain(
    method: Method,
    seed: Seed,
    config: ConfigFile = DEFAULT_CONFIG,
    threads: Threads = 1,
    workers: Workers = 0,
    gpus: Gpus = None,
    nodes: Annotated[int, typer.Option(min=1, help="Hosts that share the GPUs; several need Slurm.")] = 1,
) -> None:
    """Train the encoder of a row: contrastive, supervised, or the random-init baseline."""
    from mochi.config import load_experiment, pretrain_run
    from mochi.provenance.wanted import pretrained

    experiment = load_experiment(config)
    run = pretrain_run(experiment, method, seed, str(config))
    result = pretrained(experiment, method, seed)
    if _is_done(experiment.name, method, seed, "pretrain", result):
        return
    _take_gpus(gpus, nodes)
    from mochi.pretraining import stage as pretraining

    _set_up_process(threads)
    with _work(experiment.name, method, seed, "pretrain", result) as (work, events):
        pretraining.run(run, result, work, workers=workers, events=events)


@app.command(rich_help_panel=_STAGE)
def evaluate(
    task: Annotated[
        str,
        typer.Argument(metavar="TASK", help="Name of an evaluation of the experiment, such as linear."),
    ],
    method: Method,
    seed: Seed,
    config: ConfigFile = DEFAULT_CONFIG,
    encoder: EncoderFile = None,
    out: OutFolder = None,
    threads: Threads = 1,
    workers: Workers = 0,
    gpus: Gpus = None,
) -> None:
    """Evaluate a frozen encoder."""
    from mochi.config import load_experiment, probe_run
    from mochi.provenance.wanted import evaluated, same_features

    experiment = load_experiment(config)
    run = probe_run(experiment, method, seed, task)
    wanted = evaluated(experiment, method, seed, task)
    result = _with_options(wanted, encoder, out)
    if _is_done(experiment.name, method, seed, task, result):
        return
    _take_gpus(gpus)
    from mochi.evaluation import stage as evaluation

    _set_up_process(threads)
    others = same_features(experiment, method, seed, task) if result == wanted else []
    with _work(experiment.name, method, seed, task, result) as (work, _):
        evaluation.run(run, result, work, workers=workers, others=others)


@app.command(rich_help_panel=_STAGE)
def detect(
    job: Annotated[
        str,
        typer.Argument(
            metavar="SET",
            help="A detection set of the experiment, or one of its jobs: SET/fine-tuning0, SET/lr-search.",
        ),
    ],
    method: Method,
    seed: Seed,
    config: ConfigFile = DEFAULT_CONFIG,
    encoder: EncoderFile = None,
    out: OutFolder = None,
    threads: Threads = 1,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that load images. Default: the set's `workers`.")
    ] = None,
    gpus: Gpus = None,
) -> None:
    """Fine-tune a detector on an encoder and evaluate it, once for each fine-tuning seed of the set."""
    from mochi.config import load_experiment
    from mochi.provenance.wanted import detection_jobs, evaluated, fine_tuning_run
    from mochi.stages import DETECTION

    experiment, task = load_experiment(config), f"{DETECTION}{job}"
    run = fine_tuning_run(experiment, method, seed, job)
    if out is None and job not in (jobs := detection_jobs(experiment, run.set_name)):
        raise UserError(
            f"SET: found {job}, which is computed by {', '.join(jobs)}; name one of these, or give --out "
            "for one result of them all"
        )
    result = _with_options(evaluated(experiment, method, seed, task), encoder, out)
    if _is_done(experiment.name, method, seed, task, result):
        return
    _take_gpus(gpus)
    from mochi.detection import stage as detection

    _set_up_process(threads)
    num_workers = run.detection.training.workers if workers is None else workers
    with _work(experiment.name, method, seed, task, result) as (work, events):
        detection.run(run, result, work, workers=num_workers, events=events)


@app.command(rich_help_panel=_STAGE)
def analyze(
    method: Method,
    seed: Seed,
    config: ConfigFile = DEFAULT_CONFIG,
    threads: Threads = 1,
    workers: Workers = 0,
    gpus: Annotated[
        int | None, typer.Option(min=0, max=1, help="0 or 1. Default: the first visible.")
    ] = None,
) -> None:
    """Analyse an encoder on the validation images: alignment, uniformity, neighbours, map."""
    from mochi.config import analysis_run, load_experiment
    from mochi.provenance.wanted import analyzed
    from mochi.stages import ANALYSIS

    experiment = load_experiment(config)
    run = analysis_run(experiment, method, seed)
    result = analyzed(experiment, method, seed)
    if _is_done(experiment.name, method, seed, ANALYSIS, result):
        return
    _take_gpus(gpus)
    from mochi.analysis import stage as analysis

    _set_up_process(threads)
    with _work(experiment.name, method, seed, ANALYSIS, result):
        analysis.run(run, result, workers=workers)


@app.command(rich_help_panel=_STAGE)
def report(config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Write tables, figures, records and report.html of an experiment; list what is missing."""
    from mochi.config import load_experiment
    from mochi.provenance.wanted import reported

    experiment = load_experiment(config)
    if _is_current(result := reported(experiment)):
        return
    from mochi.report import stage as reporting

    _echo(f"table: {reporting.run(experiment, result)}")


def _is_current(result: Result) -> bool:
    """Whether the result is current; print this, or why it is computed again."""
    reason = result.why_stale()
    if reason is None:
        _echo(f"{result.label}: up to date; to compute it again, remove {result.record}", err=True)
    elif reason != "missing":
        _echo(f"{result.label}: computed again, stale: {reason}", err=True)
        if "recipe.epochs " in reason:
            _echo(
                "  from the beginning, because `epochs` changes the learning rate at every step; the "
                "existing encoder is kept until the new one is done; to keep both, add a row with the "
                "new epochs",
                err=True,
            )
    return reason is None


def _is_done(experiment: str, method: str, seed: int, task: str, result: Result) -> bool:
    """Whether the result is current; if so, remove the work folder of a job killed after its last write."""
    done = _is_current(result)
    if done:
        _remove_work(experiment, method, seed, task, result)
    return done


def _remove_leftovers(experiment: "Experiment") -> None:
    """Remove such work folders of all current results, whose jobs Snakemake will not start again."""
    from mochi.config import all_runs
    from mochi.layout import Paths
    from mochi.provenance.wanted import analyzed, evaluated, evaluations, pretrained, searches
    from mochi.stages import ANALYSIS

    results = {(*run, "pretrain"): pretrained(experiment, *run) for run in all_runs(experiment)}
    results |= {
        job: evaluated(experiment, *job) for job in (*searches(experiment), *evaluations(experiment))
    }
    results |= {(*run, ANALYSIS): analyzed(experiment, *run) for run in all_runs(experiment)}
    for job, result in results.items():
        if Paths(experiment.name).work(*job).exists() and result.why_stale() is None:
            _remove_work(experiment.name, *job, result)


def _remove_work(experiment: str, method: str, seed: int, task: str, result: Result) -> None:
    from mochi.layout import Paths

    if Paths(experiment).work(method, seed, task).exists():
        # Another process at work, or a read-only folder: both leave the result as it is.
        with suppress(UserError), _work(experiment, method, seed, task, result, done=True) as (work, _):
            shutil.rmtree(work)


def _with_options(result: Result, encoder: Path | None, out: Path | None) -> Result:
    """The result with another encoder or in another folder, as the user's options say."""
    if encoder is not None:
        result = replace(result, inputs={**result.inputs, "encoder": encoder})
    return result if out is None else replace(result, folder=out)


def _load_and_encode(
    encoder: Path, overrides: "Overrides", images: Path, batch_size: int, threads: int | None
) -> "tuple[LoadedEncoder, FolderFeatures]":
    """The encoder, and its features of a folder."""
    from mochi.inference.encoder import load
    from mochi.inference.folder import encode_folder
    from mochi.runtime.cpu_memory import keep_freed_memory
    from mochi.runtime.distributed import pick_device
    from mochi.runtime.precision import make_deterministic
    from mochi.runtime.progress import counter

    keep_freed_memory()
    make_deterministic()
    loaded = load(encoder, overrides, pick_device())
    threads = threads or os.cpu_count() or 1
    return loaded, encode_folder(
        loaded, images, batch_size=batch_size, threads=threads, progress=counter("encode")
    )


def _take_gpus(count: int | None, nodes: int = 1) -> None:
    """Claim GPUs before heavy imports: this process may become torchrun here."""
    from mochi.runtime.launch import on_gpus

    if count is None and nodes > 1:
        raise UserError(f"--nodes: found {nodes} without --gpus; give the total number of GPUs")
    if count is not None:
        on_gpus(count, nodes)


def _set_up_process(threads: int) -> None:
    import torch

    from mochi.runtime.cpu_memory import keep_freed_memory
    from mochi.runtime.ieee_float32 import use_ieee_float32

    torch.set_num_threads(threads)
    keep_freed_memory()
    use_ieee_float32()


@contextmanager
def _work(
    experiment: str, method: str, seed: int, task: str, result: Result, *, done: bool = False
) -> Iterator[tuple[Path, Path]]:
    """The folder of resume checkpoints, locked while in use, and the folder of TensorBoard events.

    Unless the result is known to be `done`, the command ends here if another process has computed it
    while this one waited for the lock.

    Each version of the settings and inputs has its own checkpoints: after a change of a setting and back,
    each version continues from its own.
    """
    from mochi.layout import Paths
    from mochi.provenance.fingerprint import digest, file_digest
    from mochi.runtime.job_status import reported
    from mochi.runtime.locks import locked
    from mochi.storage.atomic import require_writable

    paths = Paths(experiment)
    for name, path in result.inputs.items():
        if not path.exists():
            raise UserError(f"{path}: not found; {result.label} needs it as its {name}; compute it first")
    inputs = {name: file_digest(path) for name, path in result.inputs.items()}
    job_folder = paths.work(method, seed, task)
    work = job_folder / digest([result.settings, inputs])
    require_writable(result.folder)
    require_writable(work)
    events = paths.log(method, seed, f"tensorboard-{task}")
    if os.environ.get("RANK", "0") != "0":
        yield work, events
        return
    with locked(job_folder):
        alone = os.environ.get("WORLD_SIZE", "1") == "1"  # other ranks would wait for this one
        computed = not done and alone and result.why_stale() is None
        if not computed:
            with reported(job_folder):
                yield work, events
    for folder in (work, job_folder, *job_folder.parents):
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:  # not empty: files of another job, or checkpoints of other settings
            break
    if computed:
        _echo(f"{result.label}: up to date, computed by another process meanwhile", err=True)
        raise typer.Exit


def _require_current_folder() -> None:
    """Refuse to run in a folder that was removed: libraries would crash there."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder was removed; change to another, or to the new one") from None


_FEWER = "start fewer (--workers, --jobs, --threads), or raise the limit (`ulimit -u`)"
_HINTS = {
    errno.EACCES: "let this user read it",
    errno.EAGAIN: f"processes or threads cannot be started: {_FEWER}",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENOSPC: "free disk space (or inodes: see `df -i`)",
    errno.EDQUOT: "free some of your quota",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount its file system again",
}


def _echo(text: str, *, err: bool = False) -> None:
    """Print lines without the control characters of names in them."""
    typer.echo("\n".join(map(printable, text.split("\n"))), err=err)


def _explained(error: OSError | MemoryError) -> str:
    """An error of the system: its file and what to do."""
    if isinstance(error, MemoryError):
        return f"not enough memory; end other programs, or lower --jobs or --batch-size ({error})"
    found = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    return f"{found}; {_HINTS[error.errno]}" if error.errno in _HINTS else found


def main() -> NoReturn:
    """Run a command; a user's mistake ends with its message and exit code 1, without a traceback."""
    configure_logging()
    try:
        _require_current_folder()
        app(prog_name="mochi")
    except (UserError, OSError, MemoryError) as error:
        text = str(error) if isinstance(error, UserError) else _explained(error)
        for line in text.splitlines():
            _echo(f"error: {line}", err=True)
        sys.exit(1)
    except RuntimeError as error:
        from mochi.runtime import gpus, watchdog

        reason = watchdog.reason(error) or gpus.reason(error)
        if "can't start new thread" in str(error):
            reason = f"{error}; {_FEWER}"
        if reason is None:
            raise
        _echo(f"error: {reason}", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        _echo(f"error: {not_installed(error.name)}", err=True)
        sys.exit(1)
    sys.exit(0)
