# One experiment, from raw images to tables. `snakemake --cores all [--configfile config/NAME.yaml]`.
from pathlib import Path

from snakemake.utils import min_version

from mochi.runtime.locks import hold

min_version("9.18")


include: "workflow/rules/experiment.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/detection.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/outdated.smk"


localrules:
    all,
    code,
    resolve,
    runs,
    scenes,
    tables,
    figures,


# Instead of Snakemake's lock (`nolock` in the profile), which outlives a kill.
onstart:
    hold(Path(".snakemake/run.lock"))


rule all:
    default_target: True
    input:
        rules.code.output,
        rules.tables.output,
        rules.figures.output,
