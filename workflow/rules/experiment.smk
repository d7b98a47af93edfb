# The experiment, its runs, and what each stage's results depend on.
import json
import os
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.resources import Resource

from mochi import config as configuration
from mochi.runtime import gpus
from mochi.provenance.fingerprint import stage_digests

if workflow.config_settings.config:
    raise WorkflowError(
        "--config changes settings on the command line, where no result could be traced back to them; "
        "copy the experiment file, change the line and the name there and pass it with --configfile"
    )
if len(workflow.overwrite_configfiles) > 1:
    raise WorkflowError("one experiment at a time: --configfile takes a single file")

# Relative, so that a clone elsewhere has the same inputs.
CONFIG = os.path.relpath((workflow.overwrite_configfiles or ["config/config.yaml"])[0])
try:
    EXPERIMENT = configuration.load_experiment(Path(CONFIG))
except configuration.ConfigError as error:
    raise WorkflowError(str(error)) from None

NAME = EXPERIMENT.name
# Stage -> digest of its code, a param of its rule: a changed formula re-runs what it touches.
CODE = stage_digests()
DATA = f"data/{EXPERIMENT.dataset.name}"
MANIFEST = f"{DATA}/manifest.json"
PUBLISHED = "workflow/published.csv"
RUN = f"results/{NAME}/{{method}}/seed{{seed}}"
RUNS = [
    {"method": method, "seed": seed}
    for method in EXPERIMENT.methods
    for seed in configuration.method_seeds(EXPERIMENT, method)
]


wildcard_constraints:
    method="|".join(map(re.escape, EXPERIMENT.methods)),
    seed="[0-9]+",


# Snakemake does not know how many GPUs there are. A job on a cluster has been given its own already.
GPUS = gpus.visible()
if workflow.is_main_process and "gpu" not in workflow.global_resources:
    workflow.register_resource("gpu", Resource("gpu", len(GPUS)))
GPUS_PER_RUN = 1 if GPUS else 0
# On processors two runs of one thread side by side beat one run of two threads.
THREADS_PER_RUN = 8 if GPUS_PER_RUN else 1


def settings_digest(method, seed, stage):
    """Of all settings that the stage's results depend on."""
    run = configuration.resolve(EXPERIMENT, method, int(seed), CONFIG)
    return configuration.digest(configuration.settings(run, stage))


def of_every_run(pattern):
    return [pattern.format(**run) for run in RUNS]


# Files that say otherwise than the experiment; `outdated.smk` finds them.
OTHERWISE = set()


def otherwise(pattern):
    """The input of a rule that has none, any file that is always there: newer than one to be made again."""
    return lambda wildcards: (
        PUBLISHED if pattern.format(**wildcards) in OTHERWISE else ancient(PUBLISHED)
    )


# What a stage depends on and no more: editing the probe changes the probe's run.yaml alone.
rule resolve:
    input:
        otherwise(RUN + "/{stage}/run.yaml"),
    output:
        RUN + "/{stage}/run.yaml",
    log:
        f"logs/{NAME}/{{method}}/seed{{seed}}/{{stage}}.resolve.log",
    params:
        settings=lambda wildcards: settings_digest(**wildcards),
    shell:
        "python -m mochi resolve --config {CONFIG:q} --method {wildcards.method:q}"
        " --seed {wildcards.seed} --stage {wildcards.stage} --out {output:q} 2> {log:q}"


# What the code of each stage was, for DVC, which reads it key by key.
rule code:
    input:
        otherwise(f"results/{NAME}/code.yaml"),
    output:
        f"results/{NAME}/code.yaml",
    log:
        f"logs/{NAME}/code.log",
    params:
        digests=CODE,
    shell:
        "python -m mochi digests --out {output:q} 2> {log:q}"
