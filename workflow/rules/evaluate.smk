# What frozen encoders are worth.
EVALUATIONS = [task for task in ("linear", "knn") if getattr(EXPERIMENT.evaluation, task)]


rule evaluate:
    input:
        run=ancient(RUN + "/run.yaml"),
        manifest=MANIFEST,
        encoder=RUN + "/pretrain/encoder.safetensors",
    output:
        metrics=RUN + "/{task}/metrics.json",
        provenance=RUN + "/{task}/provenance.json",
    wildcard_constraints:
        task="linear|knn",
    params:
        data=DATA,
        out=lambda wildcards, output: Path(output.metrics).parent,
        settings=lambda wildcards: settings_of(wildcards.task)(wildcards),
        code=lambda wildcards: CODE[wildcards.task],
    threads: THREADS_PER_RUN
    resources:
        gpu=GPUS_PER_RUN,
    log:
        f"logs/{NAME}/{{method}}/seed{{seed}}/{{task}}.log",
    benchmark:
        f"logs/{NAME}/{{method}}/seed{{seed}}/{{task}}.tsv"
    shell:
        "python -m mochi {wildcards.task} --run {input.run:q} --data {params.data:q}"
        " --encoder {input.encoder:q} --out {params.out:q} --threads {threads}"
        " --workers $(( {threads} - 1 )) --gpus {resources.gpu} 2>&1 | tee {log:q}"
