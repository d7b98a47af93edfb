# Raw images to shards with a manifest; detection sets made from photographs.
from mochi.data.ingest.sources.folder import current_listing

PREPARED = {
    name: wanted.prepared(
        dataset,
        layout.dataset(name),
        # Listing a million files takes seconds, so it is done once and not in every job.
        (
            current_listing(dataset, layout.dataset(name))
            if workflow.is_main_process
            else ""
        ),
    )
    for name, dataset in datasets(EXPERIMENT).items()
}
SCENES = {str(folder): result for folder, result in wanted.scenes(EXPERIMENT).items()}


rule prepare:
    output:
        results_of(layout.dataset("{dataset}"), "prepare"),
    log:
        f"logs/{NAME}/prepare-{{dataset}}.log",
    wildcard_constraints:
        dataset="|".join(map(re.escape, PREPARED)),
    threads: workflow.cores or 1
    params:
        settings=lambda wildcards: settings_of(PREPARED[wildcards.dataset]),
        code=lambda wildcards: code_of(PREPARED[wildcards.dataset]),
    shell:
        "python -m mochi prepare {wildcards.dataset:q} --jobs {threads} 2>&1 | tee {log:q}"


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


# `snakemake data`: prepare all data sets and generate scenes; compute nothing else.
rule data:
    input:
        [f"{result.folder}/manifest.json" for result in PREPARED.values()],
        [f"{folder}/scenes.json" for folder in SCENES],
