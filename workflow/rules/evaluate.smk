# Evaluations of the encoders: on frozen features, and fine-tuned as detectors.
PROBES = probes(EXPERIMENT)
DETECTION_SETS = list(EXPERIMENT.evaluation.detection)


rule evaluate:
    input:
        lambda wildcards: list(evaluated(wildcards).inputs.values()),
    output:
        results_of(PLACES.evaluation("{method}", "{seed}", "{task}"), "evaluate"),
    log:
        PLACES.log("{method}", "{seed}", "{task}.log"),
    benchmark:
        PLACES.log("{method}", "{seed}", "{task}.tsv")
    wildcard_constraints:
        task="|".join(map(re.escape, PROBES)) or "nothing",
    threads: THREADS_PER_RUN
    resources:
        gpu=GPUS_PER_RUN,
    params:
        settings=lambda wildcards: settings_of(evaluated(wildcards)),
        code=lambda wildcards: code_of(evaluated(wildcards)),
    shell:
        logged(
            "python -m mochi evaluate {wildcards.task:q} --method {wildcards.method:q}"
            " --seed {wildcards.seed} --threads {threads}"
            " --workers $(( {threads} - 1 )) --gpus {resources.gpu}"
        )


rule detect:
    input:
        lambda wildcards: list(evaluated(wildcards).inputs.values()),
    output:
        results_of(
            PLACES.evaluation("{method}", "{seed}", f"{wanted.DETECTION}{{set}}"),
            "detect",
        ),
    log:
        PLACES.log("{method}", "{seed}", f"{wanted.DETECTION}{{set}}.log"),
    benchmark:
        PLACES.log("{method}", "{seed}", f"{wanted.DETECTION}{{set}}.tsv")
    wildcard_constraints:
        set="|".join(map(re.escape, DETECTION_SETS)) or "nothing",
    threads: THREADS_PER_RUN
    resources:
        gpu=GPUS_PER_RUN,
    params:
        settings=lambda wildcards: settings_of(evaluated(wildcards)),
        code=lambda wildcards: code_of(evaluated(wildcards)),
    shell:
        logged(
            "python -m mochi detect {wildcards.set:q} --method {wildcards.method:q}"
            " --seed {wildcards.seed} --threads {threads}"
            " --gpus {resources.gpu}"
        )


# `snakemake evaluations`: every number, and no report.
rule evaluations:
    input:
        [
            PLACES.evaluation(*one) / name
            for one in wanted.evaluations(EXPERIMENT)
            for name in ("metrics.json", wanted.RECORD)
        ],
