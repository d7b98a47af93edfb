# Messages at the end of a run.


def show_results():
    """Show the table and where the results are."""
    table = PATHS.results / "summary.md"
    if table.exists():
        where = f"tables, figures, records: {PATHS.results}"
        print(f"\n{table.read_text()}\n{where}", file=sys.stderr)


def show_how_to_continue(logs):
    """Show the error of each failed job, from the job's log, and how to continue."""
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
        f"`mochi report --config {CONFIG}` writes a report of the results so far",
        file=sys.stderr,
    )
