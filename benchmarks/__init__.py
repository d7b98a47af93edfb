"""Benchmarks behind the speed tables of the README and docs/. Each module with a `main` is one benchmark.

`python -m benchmarks.NAME --help`. Run each twice on an idle machine: see `harness`.
"""
