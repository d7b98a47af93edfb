# Tables and figures of the experiment.
METRICS = [
    metrics
    for task in EVALUATIONS
    for metrics in of_every_run(RUN + f"/{task}/metrics.json")
] + sum(DETECTED.values(), [])
CURVES = of_every_run(RUN + "/pretrain/metrics.csv") + of_every_run(
    RUN + "/pretrain/matching.csv"
)


rule tables:
    input:
        METRICS,
        published=PUBLISHED,
    output:
        csv=f"results/{NAME}/tables/summary.csv",
        markdown=f"results/{NAME}/tables/summary.md",
        made_from=f"results/{NAME}/tables/made_from.json",
    log:
        f"logs/{NAME}/tables.log",
    params:
        out=lambda wildcards, output: Path(output.csv).parent,
        rows=list(EXPERIMENT.methods),
        title=EXPERIMENT.title,
        code=CODE["tables"],
    shell:
        "python -m mochi tables --config {CONFIG:q} --published {input.published:q}"
        " --out {params.out:q} 2>&1 | tee {log:q}"


rule figures:
    input:
        METRICS,
        CURVES,
    output:
        multiext(f"results/{NAME}/figures/accuracy", ".png", ".svg"),
        multiext(f"results/{NAME}/figures/training", ".png", ".svg"),
        multiext(f"results/{NAME}/figures/negatives", ".png", ".svg"),
        made_from=f"results/{NAME}/figures/made_from.json",
    log:
        f"logs/{NAME}/figures.log",
    params:
        out=lambda wildcards, output: Path(output[0]).parent,
        rows=list(EXPERIMENT.methods),
        code=CODE["figures"],
    shell:
        "python -m mochi figures --config {CONFIG:q} --out {params.out:q} 2>&1 | tee {log:q}"
