"""A slice of the fault battery: each test of `tests/torture/` with the few cases that fit `make test`."""
import pytest
from torture import battery


@pytest.mark.parametrize("t", battery.trials(), ids=lambda t: t.id.replace(" ", "-"))
def test_battery(t):
    failures = t.run(t.slice, 0)
    assert not failures, "\n".join(failures)
