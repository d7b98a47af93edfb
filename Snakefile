# One experiment, from raw images to tables. `snakemake --cores all [--configfile config/NAME.yaml]`.
from snakemake.utils import min_version

min_version("9.18")


include: "workflow/rules/experiment.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"


localrules:
    all,
    resolve,
    tables,
    figures,


rule all:
    default_target: True
    input:
        rules.tables.output,
        rules.figures.output,
