# Are the results that lie here what this experiment asks for? Snakemake may not remember, or not these.
import yaml

from mochi.errors import UserError
from mochi.running.outdated import (
    date,
    date_results,
    date_summary,
    seen_by_snakemake,
)


def recorded_settings(path, stage):
    try:
        run = configuration.load_run(path, stage)
    except configuration.ConfigError:
        return None
    return configuration.digest(configuration.settings(run, stage))


def make_again(path, *params):
    """A file that says otherwise than these params of its rule, before what depends on it."""
    if path.exists() and not seen_by_snakemake(path, *params):
        date(path, outdated=True)
        OTHERWISE.add(str(path))


def date_what_was_made_otherwise():
    for folder, method, seed, stage in STAGES:
        settings = settings_digest(method, seed, stage)
        code = CODE["detection" if stage.startswith("detection-") else stage]
        resolved = Path(folder, "run.yaml")
        if not date_results(
            Path(folder), settings, code
        ) and settings != recorded_settings(resolved, stage):
            make_again(resolved, settings)
    code = Path(rules.code.output[0])
    if code.exists() and yaml.safe_load(code.read_text()) != CODE:
        make_again(code, *CODE.values())
    prepared = manifest()
    if (DATASET, LISTING) != (prepared.get("options"), prepared.get("listing")):
        make_again(Path(MANIFEST), configuration.digest(DATASET), LISTING)
    for rule, stage, files in (
        (rules.tables, "tables", [*METRICS, PUBLISHED]),
        (rules.figures, "figures", [*METRICS, *CURVES]),
    ):
        date_summary(
            Path(rule.output.made_from), EXPERIMENT.title, CODE[stage], map(Path, files)
        )


if workflow.is_main_process:
    try:
        date_what_was_made_otherwise()
    except UserError as error:
        raise WorkflowError(str(error)) from None
