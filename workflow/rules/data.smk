# From raw images to shards and their manifest.
rule prepare:
    input:
        config=ancient(CONFIG),
    output:
        MANIFEST,
    log:
        f"logs/{NAME}/prepare.log",
    benchmark:
        f"logs/{NAME}/prepare.tsv"
    threads: workflow.cores or 1
    params:
        out=DATA,
        dataset=configuration.digest(EXPERIMENT.dataset.model_dump(mode="json")),
        code=CODE["prepare"],
    shell:
        "python -m mochi prepare --config {input.config:q} --out {params.out:q} --jobs {threads}"
        " 2>&1 | tee {log:q}"
