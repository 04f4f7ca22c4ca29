"""Runs that torchrun starts: two of its nodes on this machine agree beforehand, train one run and end together."""
import os
import signal
import subprocess
import sys
from pathlib import Path
from socket import socket

import pytest
from conftest import until

from llm_trainer import workspace
from llm_trainer.config import load_config
from llm_trainer.errors import BusyError, UsageError
from llm_trainer.runs import launch, torchrun
from llm_trainer.runs.run import Run
from llm_trainer.system import process

HERE = Path(__file__).resolve().parents[1]
TINY = ["train", "--config", "tiny", "--device", "cpu", "--threads", "1", "--name", "pair", "--sample-every", "0",
        "--eval-every", "0", "--save-every", "5"]


def elsewhere(folder):
    "The variables of a process that takes itself for one of another machine"
    (folder / "sitecustomize.py").write_text("""
import os
from llm_trainer.system import process
here = os.uname()
os.uname = lambda: os.uname_result((here.sysname, "far-away", here.release, here.version, here.machine))
process.boot_id = lambda: "another boot"
""")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(HERE), os.environ.get("PYTHONPATH", "")])}


class Nodes:
    "Two torchrun nodes of one process each, on loopback"
    def __init__(self, homes, *words, changes=((), ()), restarts=0, own=({}, {}), **variables):
        with socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
        def start(node, home): return subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                     "--node-rank", str(node),
                     "--max-restarts", str(restarts), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}",
                     "--rdzv-id", "trial", "-m", "llm_trainer", *words, *changes[node]],
                    env={**env, "LLM_TRAINER_HOME": str(home), **own[node]}, cwd=home, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, text=True)
        self.nodes = [start(node, home) for node, home in enumerate(homes)]

    def over(self): return any(node.poll() is not None for node in self.nodes)

    def reaches(self, condition):
        "Waits until `condition` holds; fails with what they said when they end before"
        until(lambda: condition() or self.over())
        if not condition(): raise AssertionError(str(self.ends()))

    def ends(self, seconds=300):
        "Their exit codes, and what each said"
        try: said = [node.communicate(timeout=seconds)[0] for node in self.nodes]
        finally:
            for node in self.nodes: node.kill()
        return [node.returncode for node in self.nodes], said


def steps(run):
    "Has it a checkpoint, and is at a step, where a silent rank is missed soonest?"
    return (run.state().step or 0) >= 6 and run.state().phase == "training"


def left(run): return [rank for rank in run.state().ranks if process.process_state(rank["pid"]) not in (None, "zombie")]


def test_two_nodes_train_one_run_and_stop_together(space):
    nodes, run = Nodes([space.root] * 2, *TINY, "--epochs", "1000"), Run(space.runs / "pair")
    nodes.reaches(lambda: run.state().step)
    assert [rank["rank"] for rank in run.state().ranks] == [0, 1] and run.state().pid == run.state().ranks[0]["pid"]
    launch.stop(run)
    codes, said = nodes.ends()
    state, attempt = run.status(), run.attempts()[-1]
    assert codes == [0, 0] and state.status == "stopped" and state.step == state.checkpoint_step and not left(run), said
    assert (attempt["world_size"], attempt["devices"]) == (2, ["cpu", "cpu"]) and "validation" not in said[1]
    assert "Run pair" in said[0] and "Run pair" not in said[1]  # rank 0 speaks


@pytest.mark.slow
def test_the_same_torchrun_resumes(space):
    for words in (TINY + ["--max-steps", "6"], ["resume", "pair", "--max-steps", "9"], ["resume", "pair"]):
        codes, said = Nodes([space.root] * 2, *words).ends()
        assert codes == [0, 0], said
    run = Run(space.runs / "pair")
    assert run.status().status == "completed" and run.state().step == 9 and len(run.attempts()) == 2
    assert [row["step"] for row in run.metrics("train")] == sorted({row["step"] for row in run.metrics("train")})


@pytest.mark.slow
@pytest.mark.parametrize("rank,signum,restarts", [(1, signal.SIGKILL, 0), (0, signal.SIGKILL, 0),
                                                  (1, signal.SIGSTOP, 0),
                                                  (0, signal.SIGSTOP, 0), (1, signal.SIGKILL, 1)])
def test_a_rank_that_is_lost_ends_the_others_or_all_start_again(space, rank, signum, restarts):
    # a rank of a busy machine may be silent for seconds; where none is suspended, nobody waits for the end of that time
    seconds = "8" if signum == signal.SIGSTOP else "60"
    nodes = Nodes([space.root] * 2, *TINY, "--epochs", "1000", restarts=restarts, LLM_TRAINER_HUNG_SECONDS=seconds)
    run = Run(space.runs / "pair")
    nodes.reaches(lambda: steps(run))
    os.kill(run.state().ranks[rank]["pid"], signum)
    if restarts:
        nodes.reaches(lambda: len(run.attempts()) == 2 and run.state().attempt == 2 and run.state().phase == "training")
        launch.stop(run)
    codes, said = nodes.ends()
    state = run.status()
    if restarts: assert codes == [0, 0] and state.status == "stopped" and run.attempts()[1]["restart"] == 1, said
    else:
        assert 0 not in codes and state.reason["code"] == "rank_lost", (state, said)
        assert f"Rank {rank}" in state.reason["message"], (state, said)
    until(lambda: not left(run))


@pytest.mark.slow
def test_a_rank_0_that_is_suspended_on_another_machine_is_given_up_and_says_nothing_when_it_wakes(space, tmp_path):
    nodes = Nodes([space.root] * 2, *TINY, "--epochs", "1000", own=(elsewhere(tmp_path), {}),
                  LLM_TRAINER_HUNG_SECONDS="8")
    run = Run(space.runs / "pair")
    nodes.reaches(lambda: steps(run))
    first = run.state().ranks[0]
    os.kill(first["pid"], signal.SIGSTOP)
    state = until(lambda: (found := run.status()).status == "failed" and found)
    told = state.reason["message"]
    assert state.reason["code"] == "rank_lost" and "Rank 0 on far-away gave no sign of life" in told and state.locked
    assert "End it on far-away: llm-trainer stop pair --now" in told and "`resume pair`" in told
    with pytest.raises(BusyError, match="has ended(.|\n)*on far-away(.|\n)*stop pair --now"):
        launch.resume(run, space, devices="1")
    os.kill(first["pid"], signal.SIGCONT)
    codes, said = nodes.ends()
    assert 0 not in codes, said
    until(lambda: not run.locked and not left(run))
    assert run.status().reason["message"] == told and run.status().status == "failed"
    plan = launch.plan_resume(run, space, devices="1")
    assert plan.from_step >= 5


@pytest.mark.slow
@pytest.mark.parametrize("what", ["arguments", "workspace", "flag of one", "devices", "batch", "name"])
def test_nodes_that_do_not_fit_together_say_why_and_make_nothing(space, tmp_path, what):
    homes = [space.root, workspace.init(tmp_path / "other").root if what == "workspace" else space.root]
    extra = {"arguments": ((), ["--lr", "1e-3"]), "flag of one": ((), ["--wrong", "1"]),
             "devices": (["--devices", "2"],) * 2,
             "batch": (["--batch-size", "5"],) * 2, "name": (["--name", "A B"],) * 2}.get(what, ((), ()))
    words = [word for word in TINY if what != "name" or word not in ("--name", "pair")]
    codes, said = Nodes(homes, *words, changes=extra).ends()
    why = {"arguments": "different arguments", "workspace": "does not share the workspace",
           "flag of one": "different arguments",
           "devices": "--nproc-per-node", "batch": "can't share 5 sequences", "name": "can't name a run"}[what]
    assert codes == [1, 1] and all("exitcode  : 2" in text for text in said) and why in said[0], said
    assert not list(space.runs.glob("[!.]*")) and not list(space.runs.glob(".new*"))


def test_a_rank_that_ends_on_another_machine_is_missed_at_once():
    "NCCL may wait for it for minutes, and rank 0 sees no process of that machine; its neighbours there do"
    from torch.distributed import HashStore
    children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    try:
        far = {**process.identity(), "boot_id": "another", "host": "far-away"}
        known = [{**far, "rank": 0}, {**process.identity(), "rank": 1},
                 *({**process.identity(child.pid), "rank": 2 + i} for i, child in enumerate(children))]
        store, teams = HashStore(), {}
        for rank in (0, 1):
            teams[rank] = team = torchrun.Team(torchrun.Seat(rank, 4, rank, 4, 0, "x"), store)
            team.known, team._pulse = known, store
        def seen():
            teams[1]._report()
            teams[0]._listen(range(1, 4), 0.5)
            return teams[0].gone()
        assert seen() == []
        store.set("bye/3", "1")
        for child in children: child.kill(), child.wait()
        assert seen() == [2] and teams[0]._judge().startswith("Rank 2 on")  # rank 3 said goodbye
    finally:
        for child in children: child.kill()


def test_the_seat_is_read_from_the_variables_of_torchrun(monkeypatch):
    for name in (*torchrun.VARIABLES, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun.seat() is None
    values = dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT="1")
    for name, value in values.items(): monkeypatch.setenv(name, value)
    place = torchrun.seat()
    assert (place.rank, place.world, place.local_rank, place.local_world, place.restart) == (3, 4, 1, 2, 0)
    assert str(os.getppid()) in place.launch
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    assert torchrun.seat().launch == "job 7"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert torchrun.seat() is None  # one process is a run like any other
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UsageError, match="unset them"): torchrun.seat()
    for flags in (dict(background=True), dict(devices="2"), dict(restarts=1), dict(parallel=True)):
        with pytest.raises(UsageError, match="under torchrun"): torchrun.check(**flags)
    torchrun.check(background=False, devices=None, restarts=0)


def test_a_run_of_several_machines_is_not_started_on_one_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "gpus", lambda: ["GPU-a", "GPU-b"])
    config = load_config("tiny").replace(device="cuda").to_dict()
    with pytest.raises(UsageError, match="several machines(.|\n)*--devices 2"):
        launch.take_devices(None, config, tmp_path, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"])
    as_given = ["cuda:0", "cuda:0"]  # torchrun's are as they are
    assert launch.take_devices(as_given, config, tmp_path) == as_given
