"""The public face: six functions that a notebook or a script needs, each tried on a real run."""
import os
import subprocess
import sys

import pytest

import llm_trainer as lt
from llm_trainer import workspace
from llm_trainer.errors import ConfigError, NotFoundError, UsageError


pytestmark = pytest.mark.xdist_group("public")  # one workspace, and each test goes on from the one before


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    before = os.environ.get("LLM_TRAINER_HOME")
    made = workspace.init(tmp_path_factory.mktemp("public"))
    os.environ["LLM_TRAINER_HOME"] = str(made.root)
    yield made
    if before is None: del os.environ["LLM_TRAINER_HOME"]
    else: os.environ["LLM_TRAINER_HOME"] = before


def test_importing_it_loads_nothing():
    code = ("import sys; before = set(sys.modules); import llm_trainer;"
            "print(sorted(m for m in set(sys.modules) - before if m.startswith('llm_trainer.')))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_train_yields_events_of_a_run_that_everybody_sees(space):
    kinds = [event.kind for event in lt.train("tiny", name="first", max_steps=6, eval_every=0)]
    assert kinds.count("step") == 6 and kinds[-1] == "finished" and "saved" in kinds
    run, = lt.list_runs()
    assert run.id == "first" and run.status().status == "completed" and run.status().step == 6 and not run.locked
    assert len(run.metrics("val")) == 1


def test_leaving_the_loop_saves_and_stops(space):
    for event in lt.train("tiny", name="left", max_steps=50, eval_every=0, save_every=0):
        if event.kind == "step" and event.step == 5: break
    del event
    state = lt.list_runs()[0].status()
    assert (state.status, state.reason["code"]) == ("stopped", "signal") and state.checkpoint_step == state.step >= 5


def test_generate_continues_a_run_or_a_folder(space):
    text = "".join(lt.generate("first", "The ", max_new_tokens=12, seed=1))
    folder = space.checkpoints / "first" / "step-00000006"
    assert text and text == "".join(lt.generate(folder, "The ", max_new_tokens=12, seed=1))
    assert text == "".join(lt.generate(lt.list_runs()[1], "The ", max_new_tokens=12, seed=1))


def test_start_outlives_the_caller(space):
    run = lt.start("tiny", name="apart", max_steps=4, note="by itself")
    assert run.id == "apart" and run.status().status in ("queued", "running", "completed")
    assert run.notes().strip() == "by itself"
    subprocess.run([sys.executable, "-m", "llm_trainer", "status", "apart", "--watch"], check=True,
                   stdout=subprocess.DEVNULL)
    assert run.status().status == "completed"


def test_what_cannot_be_meant_makes_no_run(space):
    before = sorted(run.id for run in lt.list_runs())
    for error, act in ((ConfigError, lambda: lt.load_config("tiny", n_layers=2)),
                       (ConfigError, lambda: lt.train("nosuch")), (ConfigError, lambda: lt.load_config(5)),
                       (ConfigError, lambda: lt.start(5)), (UsageError, lambda: lt.start("tiny", name="first")),
                       (NotFoundError, lambda: lt.generate("nobody", "x"))):
        with pytest.raises(error): act()
    assert sorted(run.id for run in lt.list_runs()) == before


def test_python_m_is_the_program():
    done = subprocess.run([sys.executable, "-m", "llm_trainer", "--version"], capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == f"llm-trainer {lt.__version__}"
