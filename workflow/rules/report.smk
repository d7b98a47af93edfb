# Scores, tables, figures and provenance of the experiment, which git stores, and report.html.
REPORT = wanted.reported(EXPERIMENT)


rule report:
    input:
        list(REPORT.inputs.values()),
    output:
        update(
            [
                report_file(REPORT.folder, name)
                for name in (*REPORT.outputs, wanted.RECORD)
            ]
        ),
    log:
        f"logs/{NAME}/report.log",
    params:
        settings=settings_of(REPORT),
        code=code_of(REPORT),
    shell:
        "python -m mochi report 2>&1 | tee {log:q}"
