# From raw images to shards and their manifest; detection sets made from photographs.
from mochi.data.ingest.sources.folder import current_listing

DATA = layout.dataset(EXPERIMENT.dataset.name)
MANIFEST = f"{DATA}/manifest.json"
# Listing a million files takes seconds: once, and not again in every job.
LISTING = current_listing(EXPERIMENT.dataset, DATA) if workflow.is_main_process else ""
PREPARED = wanted.prepared(EXPERIMENT.dataset, DATA, LISTING)
SCENES = {str(folder): result for folder, result in wanted.scenes(EXPERIMENT).items()}


rule prepare:
    output:
        results_of(DATA, "prepare"),
    log:
        f"logs/{NAME}/prepare.log",
    threads: workflow.cores or 1
    params:
        settings=settings_of(PREPARED),
        code=code_of(PREPARED),
    shell:
        "python -m mochi prepare --jobs {threads} 2>&1 | tee {log:q}"


rule scenes:
    output:
        results_of("{folder}", "scenes"),
    log:
        f"logs/{NAME}/scenes-{{folder}}.log",
    wildcard_constraints:
        folder="|".join(map(re.escape, SCENES)) or "nothing",
    params:
        settings=lambda wildcards: settings_of(SCENES[wildcards.folder]),
        code=lambda wildcards: code_of(SCENES[wildcards.folder]),
    shell:
        "python -m mochi scenes {wildcards.folder:q} 2>&1 | tee {log:q}"


# `snakemake data`: everything that is prepared or made, and nothing computed on it.
rule data:
    input:
        MANIFEST,
        [f"{folder}/scenes.json" for folder in SCENES],
