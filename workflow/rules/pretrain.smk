# One encoder for each method and seed.
rule pretrain:
    input:
        run=RUN + "/pretrain/run.yaml",
        manifest=MANIFEST,
    output:
        encoder=RUN + "/pretrain/encoder.safetensors",
        metrics=RUN + "/pretrain/metrics.csv",
        matching=RUN + "/pretrain/matching.csv",
        provenance=RUN + "/pretrain/provenance.json",
    log:
        f"logs/{NAME}/{{method}}/seed{{seed}}/pretrain.log",
    benchmark:
        f"logs/{NAME}/{{method}}/seed{{seed}}/pretrain.tsv"
    threads: THREADS_PER_RUN
    resources:
        gpu=GPUS_PER_RUN,
        nodes=1,
    params:
        data=DATA,
        out=lambda wildcards, output: Path(output.encoder).parent,
        # Declared to nobody: Snakemake deletes what it knows of before it runs a job again.
        work=f"work/{NAME}/{{method}}/seed{{seed}}",
        events=f"logs/{NAME}/{{method}}/seed{{seed}}/tensorboard",
        code=CODE["pretrain"],
    shell:
        "python -m mochi pretrain --run {input.run:q} --data {params.data:q} --out {params.out:q}"
        " --work {params.work:q} --events {params.events:q} --threads {threads}"
        " --workers $(( {threads} - 1 )) --gpus {resources.gpu} --nodes {resources.nodes} 2>&1 | tee {log:q}"
