# Scores, tables, figures and records of the experiment: what git keeps; and the page that shows them.
REPORT = wanted.reported(EXPERIMENT)


def shown(name):
    """A file of the report; those to look at are marked for `snakemake --report`."""
    path = str(REPORT.folder / name)
    if name.endswith(".svg"):
        return in_report(path, "Figures", "figure", figure=Path(name).stem)
    if name in ("summary.csv", "report.html"):
        return in_report(path, "Tables", name, file=name)
    return path


rule report:
    input:
        list(REPORT.inputs.values()),
    output:
        update([shown(name) for name in (*REPORT.outputs, wanted.RECORD)]),
    log:
        f"logs/{NAME}/report.log",
    params:
        settings=settings_of(REPORT),
        code=code_of(REPORT),
    shell:
        "python -m mochi report 2>&1 | tee {log:q}"
