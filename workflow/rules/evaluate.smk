# What frozen encoders are worth.
EVALUATIONS = [
    task for task in configuration.EVALUATIONS if getattr(EXPERIMENT.evaluation, task)
]


rule evaluate:
    input:
        run=RUN + "/{task}/run.yaml",
        manifest=MANIFEST,
        encoder=RUN + "/pretrain/encoder.safetensors",
    output:
        metrics=RUN + "/{task}/metrics.json",
        provenance=RUN + "/{task}/provenance.json",
    log:
        f"logs/{NAME}/{{method}}/seed{{seed}}/{{task}}.log",
    benchmark:
        f"logs/{NAME}/{{method}}/seed{{seed}}/{{task}}.tsv"
    wildcard_constraints:
        task="linear|knn",
    threads: THREADS_PER_RUN
    resources:
        gpu=GPUS_PER_RUN,
    params:
        data=DATA,
        out=lambda wildcards, output: Path(output.metrics).parent,
        code=lambda wildcards: CODE[wildcards.task],
    shell:
        "python -m mochi {wildcards.task} --run {input.run:q} --data {params.data:q}"
        " --encoder {input.encoder:q} --out {params.out:q} --threads {threads}"
        " --workers $(( {threads} - 1 )) --gpus {resources.gpu} 2>&1 | tee {log:q}"
