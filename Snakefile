# One experiment, from raw images to tables. `snakemake --cores all [--configfile config/NAME.yaml]`.
from snakemake.utils import min_version

min_version("9.18")


# For `--software-deployment-method apptainer`; see docs/container.md.
container: "mochi.sif"


# Introduction of `snakemake --report`.
report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/gpus.smk"
include: "workflow/rules/pictures.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/analyze.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/messages.smk"


localrules:
    all,
    analyses,
    data,
    encoders,
    evaluations,
    scenes,
    report,


# The report alone is not enough: if it exists, as in a clone, Snakemake does not notice that its inputs are missing.
rule all:
    default_target: True
    input:
        rules.encoders.input,
        rules.evaluations.input,
        rules.analyses.input,
        rules.report.output,


# Replaces Snakemake's lock (`nolock` in the profile), which a killed run leaves behind.
onstart:
    lock_until_exit(Path(".snakemake/run.lock"))


onsuccess:
    show_results()


onerror:
    show_how_to_continue(log)
