# Analyses of the encoders: alignment and uniformity, nearest images, a map of the features.
ANALYSES = [
    PATHS.evaluation(*run, wanted.ANALYSIS) / name
    for run in all_runs(EXPERIMENT)
    for name in ("analysis.json", wanted.RECORD)
]


rule analyze:
    input:
        lambda wildcards: list(analyzed(wildcards).inputs.values()),
    output:
        results_of(
            PATHS.evaluation("{method}", "{seed}", wanted.ANALYSIS),
            "analyze",
            method="{method}",
            seed="{seed}",
        ),
    log:
        PATHS.log("{method}", "{seed}", f"{wanted.ANALYSIS}.log"),
    benchmark:
        PATHS.log("{method}", "{seed}", f"{wanted.ANALYSIS}.tsv")
    threads: threads_of("analyze")
    resources:
        gpu=GPUS_PER_RUN,
    params:
        settings=lambda wildcards: settings_of(analyzed(wildcards)),
        code=lambda wildcards: code_of(analyzed(wildcards)),
    shell:
        logged(
            "python -m mochi analyze --method {wildcards.method:q} --seed {wildcards.seed}"
            + share_of_a_gpu()
            + "--gpus {resources.gpu}"
        )


# `snakemake analyses`: the analyses that DVC stores, without the report.
rule analyses:
    input:
        ANALYSES,
