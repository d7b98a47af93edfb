# The experiment, its results, and what each of them depends on.
import os
import re
import sys
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError

from mochi import layout
from mochi.adopt import ADOPTING
from mochi.config import ConfigError, all_runs, datasets, load_experiment, probes
from mochi.layout import Paths
from mochi.provenance import wanted
from mochi.runtime.locks import lock_until_exit

# One file is one experiment. Snakemake merges several files key by key, so the default is read only if none is given.
if not workflow.configfiles:

    configfile: "config/config.yaml"


CONFIG = os.path.relpath(workflow.configfiles[-1])
if len(workflow.configfiles) > 1:
    raise WorkflowError("one experiment at a time: --configfile takes a single file")
try:
    EXPERIMENT = load_experiment(Path(CONFIG))
except ConfigError as error:
    raise WorkflowError(str(error)) from None
# As bytes: YAML is UTF-8 whatever the locale.
if config != yaml.safe_load(Path(CONFIG).read_bytes()):
    raise WorkflowError(
        "--config is not supported: settings on the command line could not be traced from a result; "
        "copy the experiment file, change the setting and the name there, and pass it with --configfile"
    )

# The file that `mochi` commands read by default. As a param, renaming the file would re-run every job.
os.environ["MOCHI_CONFIG"] = CONFIG


envvars:
    "MOCHI_CONFIG",


NAME = EXPERIMENT.name
PATHS = Paths(NAME)


wildcard_constraints:
    method="|".join(map(re.escape, EXPERIMENT.methods)),
    seed="[0-9]+",


# A job runs again when its settings or its code change: they are params of its rule. `mochi adopt` makes
# Snakemake record for every existing result whether its provenance.json is current.
def settings_of(result):
    return "stale" if is_stale(result) else result.settings_digest


def code_of(result):
    return "stale" if is_stale(result) else result.code_digest


def is_stale(result):
    return ADOPTING in os.environ and result.why_stale() is not None


def pretrained(wildcards):
    return wanted.pretrained(EXPERIMENT, wildcards.method, int(wildcards.seed))


def evaluated(wildcards):
    task = wildcards.get("task") or f"{wanted.DETECTION}{wildcards.job}"
    return wanted.evaluated(EXPERIMENT, wildcards.method, int(wildcards.seed), task)


def analyzed(wildcards):
    return wanted.analyzed(EXPERIMENT, wildcards.method, int(wildcards.seed))


def results_of(folder, stage, **labels):
    """The files of a result. Snakemake keeps the old ones while a job runs; the job replaces them at its end."""
    names = (*wanted.STAGES[stage].outputs, wanted.RECORD)
    return update([result_file(f"{folder}/{name}", **labels) for name in names])


def logged(command):
    """The command, with a log that a resumed job appends to.

    Snakemake deletes the log of a job before the job runs again; a hard link, LOG.part, keeps its content.
    """
    return (
        "touch {log:q}.part && ln -f {log:q}.part {log:q}"
        f" && {command} 2>&1 | tee -a {{log:q}} && rm {{log:q}}.part"
    )
