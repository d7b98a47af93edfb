# One encoder for each method and seed.
ENCODERS = [
    PATHS.pretrain(*run) / name
    for run in all_runs(EXPERIMENT)
    for name in ("encoder.safetensors", wanted.RECORD)
]


rule pretrain:
    input:
        lambda wildcards: list(pretrained(wildcards).inputs.values()),
    output:
        results_of(PATHS.pretrain("{method}", "{seed}"), "pretrain"),
    log:
        PATHS.log("{method}", "{seed}", "pretrain.log"),
    benchmark:
        PATHS.log("{method}", "{seed}", "pretrain.tsv")
    threads: threads_of("pretrain")
    resources:
        gpu=GPUS_PER_RUN,
        nodes=1,
    params:
        settings=lambda wildcards: settings_of(pretrained(wildcards)),
        code=lambda wildcards: code_of(pretrained(wildcards)),
    shell:
        logged(
            "python -m mochi pretrain --method {wildcards.method:q} --seed {wildcards.seed}"
            + share_of_a_gpu("{resources.nodes}")
            + "--gpus {resources.gpu} --nodes {resources.nodes}"
        )


# `snakemake encoders`: only pretraining.
rule encoders:
    input:
        ENCODERS,
