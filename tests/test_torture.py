"""A slice of the fault battery: each test of `tests/torture/` with the few cases that fit `make test`."""
import pytest
from torture import battery, forks, lives

pytestmark = pytest.mark.xdist_group("torture")  # what they share is made once
LONG = {"T1", "T2", "T3", "T8", "T21", "T27", "T29"}  # lives of whole runs, which T5, T6, T9 and T19 have, too


@pytest.mark.parametrize("t", [pytest.param(t, id=t.id.replace(" ", "-"), marks=[pytest.mark.slow] * (t.id in LONG))
                               for t in battery.trials() if t.slice])
def test_battery(t):
    failures = t.run(t.slice, 0)
    assert not failures, "\n".join(failures)


def test_children_that_end_in_the_same_instant_are_all_heard_of(tmp_path):
    children = [forks.server().start(["--version"], tmp_path) for _ in range(12)]
    while any(child.alive() for child in children): pass
    assert [child.wait() for child in children] == [0] * 12


def test_a_child_that_sleeps_for_too_long_is_ended(tmp_path):
    hangs = forks.server().start(["train", "--config", "torture"], lives.new_home(tmp_path),
                                 failpoint="lock.taken=stop")
    assert hangs.wait(limit=1) == -1000 and not hangs.alive()
