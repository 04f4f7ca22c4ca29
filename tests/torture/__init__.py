"""The fault battery: every promise of the README attacked, each test a function `run(n, seed) -> failures`.

`make test` runs a slice of each, `make torture BUDGET=90m` as many cases as fit, and adds them to RELIABILITY.md.
"""
