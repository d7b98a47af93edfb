# Results in a clone, where Snakemake remembers nothing of them: are they what this experiment asks for?
import yaml

from mochi.errors import UserError
from mochi.running.outdated import date, date_results


def recorded_code():
    record = Path(rules.code.output[0])
    return yaml.safe_load(record.read_text()) if record.exists() else CODE


def recorded_settings(path, stage):
    try:
        run = configuration.load_run(path, stage)
    except configuration.ConfigError:
        return None
    return configuration.digest(configuration.settings(run, stage))


def date_what_was_made_otherwise():
    for folder, method, seed, stage in STAGES:
        settings = settings_digest(method, seed, stage)
        code = CODE["detection" if stage.startswith("detection-") else stage]
        resolved = Path(folder, "run.yaml")
        if date_results(Path(folder), settings, code) and settings != recorded_settings(
            resolved, stage
        ):
            date(resolved, outdated=True)
            OTHERWISE.add(str(resolved))
    made = recorded_code()
    for name, output in (
        ("tables", rules.tables.output),
        ("figures", rules.figures.output),
    ):
        date(Path(output[0]), outdated=made.get(name) != CODE[name])


if workflow.is_main_process:
    try:
        date_what_was_made_otherwise()
    except UserError as error:
        raise WorkflowError(str(error)) from None
