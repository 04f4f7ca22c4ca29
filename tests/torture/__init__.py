"""The fault battery: every promise of the README attacked, each test a function `run(n, seed) -> failures`.

`make test` runs a slice of most, `make test-slow` of those that take long; `make torture BUDGET=90m` runs as many cases
as fit and adds them to RELIABILITY.md."""
