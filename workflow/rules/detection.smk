# Encoders fine-tuned as detectors, and the scenes made for that.
DETECTION = EXPERIMENT.evaluation.detection
DETECTED = {
    name: [
        RUN.format(method=method, seed=seed) + f"/detection-{name}/metrics.json"
        for method, seed in configuration.detection_runs(EXPERIMENT, name)
    ]
    for name in DETECTION
}
# Folder -> a set that says how its scenes are made; sets may share a folder.
SCENES = {
    chosen.data.path: name for name, chosen in DETECTION.items() if chosen.data.scenes
}


rule scenes:
    output:
        "{folder}/scenes.json",
    log:
        f"logs/{NAME}/scenes-{{folder}}.log",
    wildcard_constraints:
        folder="|".join(map(re.escape, SCENES)) or "nothing",
    params:
        set=lambda wildcards: SCENES[wildcards.folder],
        data=lambda wildcards: configuration.digest(
            DETECTION[SCENES[wildcards.folder]].data.model_dump(
                mode="json", include={"scenes", "classes"}
            )
        ),
        code=CODE["scenes"],
    shell:
        "python -m mochi scenes --config {CONFIG:q} --set {params.set:q}"
        " --out {wildcards.folder:q} 2>&1 | tee {log:q}"


rule detect:
    input:
        run=RUN + "/detection-{set}/run.yaml",
        encoder=RUN + "/pretrain/encoder.safetensors",
        annotations=lambda wildcards: DETECTION[wildcards.set].data.annotation_files(),
    output:
        multiext(
            RUN + "/detection-{set}/",
            "detections.png",
            "precision_recall.csv",
            "precision_recall.png",
        ),
        metrics=RUN + "/detection-{set}/metrics.json",
        provenance=RUN + "/detection-{set}/provenance.json",
    log:
        f"logs/{NAME}/{{method}}/seed{{seed}}/detection-{{set}}.log",
    benchmark:
        f"logs/{NAME}/{{method}}/seed{{seed}}/detection-{{set}}.tsv"
    wildcard_constraints:
        set="|".join(map(re.escape, DETECTION)) or "nothing",
    threads: THREADS_PER_RUN
    resources:
        gpu=GPUS_PER_RUN,
    params:
        out=lambda wildcards, output: Path(output.metrics).parent,
        # Declared to nobody: Snakemake deletes what it knows of before it runs a job again.
        work=f"work/{NAME}/{{method}}/seed{{seed}}/detection-{{set}}",
        events=f"logs/{NAME}/{{method}}/seed{{seed}}/tensorboard/detection-{{set}}",
        code=CODE["detection"],
    shell:
        "python -m mochi detect --run {input.run:q} --set {wildcards.set:q} --encoder {input.encoder:q}"
        " --out {params.out:q} --work {params.work:q} --events {params.events:q} --threads {threads}"
        " --gpus {resources.gpu} 2>&1 | tee {log:q}"


# Every stage of every run: its folder, method, seed and name.
STAGES = [
    (RUN.format(**run) + f"/{stage}", run["method"], run["seed"], stage)
    for run in RUNS
    for stage in ("pretrain", *EVALUATIONS)
] + [
    (
        RUN.format(method=method, seed=seed) + f"/detection-{name}",
        method,
        seed,
        f"detection-{name}",
    )
    for name in DETECTION
    for method, seed in configuration.detection_runs(EXPERIMENT, name)
]


# `snakemake runs`: the settings of every stage of every run, and nothing computed.
rule runs:
    input:
        [f"{folder}/run.yaml" for folder, _, _, _ in STAGES],
