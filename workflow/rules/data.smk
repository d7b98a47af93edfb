# From raw images to shards and their manifest.
def manifest():
    return json.loads(Path(MANIFEST).read_text()) if Path(MANIFEST).exists() else {}


def listing():
    """The names of the user's own images: more or fewer of them are another data set."""
    if EXPERIMENT.dataset.source != "folder":
        return ""
    from mochi.data.ingest.sources import folder

    if Path(EXPERIMENT.dataset.path).is_dir():
        return folder.listing(Path(EXPERIMENT.dataset.path))
    # Elsewhere, where nothing but the results is.
    return manifest().get("listing", "")


DATASET = EXPERIMENT.dataset.model_dump(mode="json")
# Of a million images this takes seconds: once.
LISTING = listing()


rule prepare:
    input:
        otherwise(MANIFEST),
    output:
        MANIFEST,
    log:
        f"logs/{NAME}/prepare.log",
    benchmark:
        f"logs/{NAME}/prepare.tsv"
    threads: workflow.cores or 1
    params:
        out=DATA,
        dataset=configuration.digest(DATASET),
        listing=LISTING,
        code=CODE["prepare"],
    shell:
        "python -m mochi prepare --config {CONFIG:q} --out {params.out:q} --jobs {threads}"
        " 2>&1 | tee {log:q}"
