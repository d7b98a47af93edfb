# Messages at the end of a workflow.


def show_results():
    """Show the table and the locations of results."""
    table = PLACES.results / "summary.md"
    if table.exists():
        where = f"tables, figures, records: {PLACES.results}"
        print(f"\n{table.read_text()}\n{where}", file=sys.stderr)


def show_how_to_continue(logs):
    """The error of each failed job, from the job's log that Snakemake's log names, and what to do."""
    failed = [
        Path(path)
        for log in logs
        for path in re.findall(
            r"^ +log: (.+) \(check log file", Path(log).read_text(), re.MULTILINE
        )
    ]
    for log in filter(Path.exists, dict.fromkeys(failed)):
        errors = [line for line in log.read_text().splitlines() if "error: " in line]
        print(f"{log}: {(errors or ['no error line'])[-1]}", file=sys.stderr)
    print(
        "run the same command to continue: finished jobs are kept, interrupted ones resume\n"
        f"`mochi report --config {CONFIG}` makes the report of what is there so far",
        file=sys.stderr,
    )
