# Evaluations of the encoders: on frozen features, and as backbones of detectors.
PROBES = probes(EXPERIMENT)
DETECTION_JOBS = [
    job
    for name in EXPERIMENT.evaluation.detection
    for job in wanted.detection_jobs(EXPERIMENT, name)
]
SEARCHES = [job for job in DETECTION_JOBS if job.endswith(wanted.LR_SEARCH)]
FINE_TUNINGS = [job for job in DETECTION_JOBS if job not in SEARCHES]


rule evaluate:
    input:
        lambda wildcards: list(evaluated(wildcards).inputs.values()),
    output:
        results_of(PATHS.evaluation("{method}", "{seed}", "{task}"), "evaluate"),
    log:
        PATHS.log("{method}", "{seed}", "{task}.log"),
    benchmark:
        PATHS.log("{method}", "{seed}", "{task}.tsv")
    wildcard_constraints:
        task="|".join(map(re.escape, PROBES)) or "nothing",
    threads: threads_of("evaluate")
    resources:
        gpu=GPUS_PER_RUN,
    params:
        settings=lambda wildcards: settings_of(evaluated(wildcards)),
        code=lambda wildcards: code_of(evaluated(wildcards)),
    shell:
        logged(
            "python -m mochi evaluate {wildcards.task:q} --method {wildcards.method:q}"
            " --seed {wildcards.seed}" + share_of_a_gpu() + "--gpus {resources.gpu}"
        )


rule detect:
    input:
        lambda wildcards: list(evaluated(wildcards).inputs.values()),
    output:
        results_of(
            PATHS.evaluation("{method}", "{seed}", f"{wanted.DETECTION}{{job}}"),
            "detect",
            set="{job}",
            method="{method}",
            seed="{seed}",
        ),
    log:
        PATHS.log("{method}", "{seed}", f"{wanted.DETECTION}{{job}}.log"),
    benchmark:
        PATHS.log("{method}", "{seed}", f"{wanted.DETECTION}{{job}}.tsv")
    wildcard_constraints:
        job="|".join(map(re.escape, FINE_TUNINGS)) or "nothing",
    threads: threads_of("detect")
    resources:
        gpu=GPUS_PER_RUN,
    params:
        settings=lambda wildcards: settings_of(evaluated(wildcards)),
        code=lambda wildcards: code_of(evaluated(wildcards)),
    shell:
        logged(
            "python -m mochi detect {wildcards.job:q} --method {wildcards.method:q}"
            " --seed {wildcards.seed}" + share_of_a_gpu() + "--gpus {resources.gpu}"
        )


# Learning rate search for fine-tunings that are separate jobs.
rule search:
    input:
        lambda wildcards: list(evaluated(wildcards).inputs.values()),
    output:
        results_of(
            PATHS.evaluation("{method}", "{seed}", f"{wanted.DETECTION}{{job}}"),
            "search",
        ),
    log:
        PATHS.log("{method}", "{seed}", f"{wanted.DETECTION}{{job}}.log"),
    benchmark:
        PATHS.log("{method}", "{seed}", f"{wanted.DETECTION}{{job}}.tsv")
    wildcard_constraints:
        job="|".join(map(re.escape, SEARCHES)) or "nothing",
    threads: threads_of("search")
    resources:
        gpu=GPUS_PER_RUN,
    params:
        settings=lambda wildcards: settings_of(evaluated(wildcards)),
        code=lambda wildcards: code_of(evaluated(wildcards)),
    shell:
        logged(
            "python -m mochi detect {wildcards.job:q} --method {wildcards.method:q}"
            " --seed {wildcards.seed}" + share_of_a_gpu() + "--gpus {resources.gpu}"
        )


# `snakemake evaluations`: all evaluations, without the report.
rule evaluations:
    input:
        [
            PATHS.evaluation(*one) / name
            for one in wanted.evaluations(EXPERIMENT)
            for name in ("metrics.json", wanted.RECORD)
        ],
