"""Where the speed tables of the README and of docs/ come from. Each module with a `main` is one benchmark.

`python -m benchmarks.NAME --help`; run on an idle machine, twice: see `harness`.
"""
