"""The same training at any number of processes: gloo worlds of two and four, each started once for many lives."""
import json
from pathlib import Path

import pytest
import torch
from world import live, live_together

from llm_trainer import workspace
from llm_trainer.config import deal
from llm_trainer.data.batches import MixStream, Stream, Windows, val_batches
from llm_trainer.errors import UsageError
from llm_trainer.model.huggingface import load_model
from llm_trainer.training.checkpoint import verify
from llm_trainer.training.distributed import Group, choose, owners, save_together

pytestmark = pytest.mark.xdist_group("worlds")


# -- What needs no second process --

@pytest.mark.parametrize("batch,accumulation,world,expected", [
    (8, 1, 1, (8, 1)), (8, 1, 2, (4, 1)), (8, 2, 2, (8, 1)), (32, 16, 2, (32, 8)), (5, 2, 2, (5, 1)), (4, 3, 2, (3, 2)),
    (1, 4, 4, (1, 1))])
def test_the_global_batch_stays_as_it_is(batch, accumulation, world, expected):
    micro, rounds = deal(batch, accumulation, world)
    assert (micro, rounds) == expected and micro * rounds * world == batch * accumulation and micro <= batch


def test_a_batch_that_can_not_be_dealt_is_refused_with_one_that_can():
    with pytest.raises(UsageError, match="16 sequences(.|\n)*15: --batch-size 5 --grad-accum-steps 3"): deal(8, 2, 3)
    assert deal(5, 3, 3) == (5, 1)


def windows(n=1000): return Windows(torch.arange(n).numpy().astype("<u2"), 16)


@pytest.mark.parametrize("world,size", [(2, 4), (4, 2), (4, 1), (3, 2)])
@pytest.mark.parametrize("make", [lambda **k: Stream(windows(), seed=3, **k),
                                  lambda **k: MixStream([windows(), windows(300)], [.7, .3], seed=3, **k)],
                         ids=["one text", "a mix"])
def test_the_ranks_read_what_one_process_reads(make, world, size):
    alone, step = make(batch_size=size * world).iterate(5), size * world
    ranks = [make(batch_size=size, rank=r, world=world).iterate(5) for r in range(world)]
    for at in range(5, 5 + 40 * step, step):
        x, y = next(alone)
        parts = [next(rank) for rank in ranks]
        assert torch.equal(x, torch.cat([p[0] for p in parts])) and torch.equal(y, torch.cat([p[1] for p in parts]))
        stream = make(batch_size=size)
        assert stream.targets(at, step) == int((y >= 0).sum())
        assert torch.equal(stream.read(at, step)[0], x)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("most", [0, 3])
def test_every_rank_validates_as_often_and_each_token_once(world, most):
    alone = list(val_batches(windows(), 7, most))
    ranks = [list(val_batches(windows(), 7, most, rank, world)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    dealt = [rank[i] for i in range(len(ranks[0])) for rank in ranks]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(alone, dealt))
    assert all((y == -100).all() for _, y in dealt[len(alone):])


def test_shards_are_about_as_large():
    sizes = {f"p{i}": 100 + i for i in range(40)} | {"big": 2000}
    found = owners(sizes, 4)
    load = [sum(n for name, n in sizes.items() if found[name] == rank) for rank in range(4)]
    assert found.keys() == sizes.keys() and max(load) < 1.2 * min(load) or load[found["big"]] == 2000


def test_the_model_is_copied_while_it_fits():
    assert choose("auto", 1, {"total": 1}, 1)[0] == "none"
    assert choose("auto", 2, {"total": 5e9}, int(8e9))[0] == "ddp"
    assert choose("auto", 2, {"total": 5e9}, int(5e9))[0] == "fsdp"
    assert choose("fsdp", 2, {"total": 1}, int(5e9))[0] == "fsdp"


def test_alone_nothing_is_asked_of_torch_distributed():
    group = Group()
    assert group.agree({"stop"}) == {"stop"} and group.share(5) == 5 and group.gather(5) == [5]
    assert group.total(1, 2.5) == (1, 2.5)
    assert save_together(group, lambda write: write(Path("x")), lambda folder: {"a": "b"}) == {"a": "b"}
    assert not torch.distributed.is_initialized()


# -- Worlds --

QUIET = dict(eval_every=0, save_every=0, sample_every=0, max_steps=12)
CASES = {"short": dict(batch_size=4, grad_accum_steps=2, max_steps=16, eval_every=8, sample_every=8),
         "gpt2": dict(max_steps=50, eval_every=25, sample_every=25), "qwen3": dict(arch="qwen3"),
         "accumulation": dict(batch_size=4, grad_accum_steps=4), "muon": dict(arch="qwen3", optimizer="muon"),
         "narrow": dict(dtype="bfloat16")}
QUICK = {1: ["short auto", "muon auto", "narrow auto"], 2: ["short ddp", "muon fsdp", "narrow fsdp"]}
SLOW = {1: ["gpt2 auto", "qwen3 auto", "accumulation auto"], 4: ["gpt2 ddp", "qwen3 fsdp", "muon ddp"],
        2: ["gpt2 ddp", "gpt2 fsdp", "accumulation ddp", "accumulation fsdp", "muon ddp"],
        8: ["gpt2 ddp", "gpt2 fsdp", "muon ddp", "muon fsdp"]}
CUT = QUIET | dict(dropout=0.1, batch_size=4, grad_accum_steps=2)
MANY = [pytest.param(world, *name.split(), marks=marks, id=f"{name} {world}")
        for table, marks in ((QUICK, []), (SLOW, [pytest.mark.slow])) for world in (2, 4, 8)
        for name in table.get(world, [])]


def lives(table, world):
    for name in table[world]:
        case, strategy = name.split()
        yield dict(name=f"{case}-{strategy}-{world}", epochs=2, changes=QUIET | CASES[case] | dict(strategy=strategy))


def cuts(strategy, *stops):
    "A run as it is, and one that is stopped after so many steps, several times"
    return [dict(name=name, changes=CUT | dict(strategy=strategy), stop=stop)
            for name, stop in ((f"whole-{strategy}", None), *((f"cut-{strategy}", stop) for stop in (*stops, None)))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("workspace")
    workspace.init(root)
    return root


def alone(root, *lived): return live(Group(), workspace.init(root), list(lived))


@pytest.fixture(scope="module")
def one(root):
    "The reference: this process alone"
    return alone(root, *lives(QUICK, 1), dict(name="journey", stop=8))


@pytest.fixture(scope="module")
def two(root, one):
    return live_together(root, 2, [*lives(QUICK, 2), *cuts("fsdp", 5),
                                   dict(name="journey", stop=9, changes=dict(strategy="fsdp")),
                                   dict(name="roomless", epochs=2, memory=2**20,
                                        changes=QUIET | CASES["narrow"] | dict(batch_size=4, grad_accum_steps=2,
                                                                               strategy="fsdp")),
                                   dict(name="hindered", changes=QUIET | dict(strategy="ddp", max_steps=4),
                                        slow={"1": 0.2})])


@pytest.fixture(scope="module")
def more(root, two):
    "What takes longer, by number of processes"
    first = alone(root, *lives(SLOW, 1), dict(name="travel", stop=8))
    second = live_together(root, 2, [*lives(SLOW, 2), *cuts("ddp", 5, 0, 3),
                                     dict(name="travel", stop=9, changes=dict(strategy="fsdp"))])
    third = live_together(root, 4, [*lives(SLOW, 4), dict(name="travel", stop=9, changes=dict(strategy="ddp"))])
    fourth = live_together(root, 8, [*lives(SLOW, 8), dict(name="descent", stop=8, changes=dict(strategy="fsdp"))])
    second |= live_together(root, 2, [dict(name="descent", stop=9, changes=dict(strategy="ddp"))])
    return {1: first, 2: second, 4: third, 8: fourth}


def losses(life): return [float.fromhex(step["loss"]) for step in life["steps"]]


@pytest.fixture
def lived(request, one, two):
    "All that was lived, by number of processes; of the slow ones only where a slow test asks"
    found = {1: dict(one), 2: dict(two), 4: {}, 8: {}}
    if request.node.get_closest_marker("slow"):
        for world, other in request.getfixturevalue("more").items(): found[world] |= other
    return found


@pytest.mark.parametrize("world,case,strategy", MANY)
def test_the_same_training(lived, world, case, strategy):
    (alone,), (life,) = lived[1][f"{case}-auto-1"], lived[world][f"{case}-{strategy}-{world}"]
    told = QUIET | CASES[case]
    assert life["status"] == "completed" and life["kinds"] == alone["kinds"] and len(life["steps"]) == told["max_steps"]
    assert [(s["lr"], s["tokens"]) for s in life["steps"]] == [(s["lr"], s["tokens"]) for s in alone["steps"]]
    assert all(other[key] == life[key] for other in life["others"]
               for key in ("steps", "kinds", "val"))  # all know the same
    far = {"muon": 5e-3, "narrow": 5e-3}.get(case, 1e-5)  # Newton–Schulz in bfloat16 amplifies rounding
    print(world, case, strategy, "losses differ by", max(abs(a - b) for a, b in zip(losses(alone), losses(life))))
    assert max(abs(a - b) for a, b in zip(losses(alone), losses(life))) < far
    assert max(abs(a - b) for a, b in zip(alone["val"], life["val"])) < far / 10
    assert not told["sample_every"] or len(life["samples"]) == 2 and life["samples"] == alone["samples"]


def test_where_memory_is_short_a_block_is_whole_only_while_it_computes(one, two):
    "And comes in bfloat16, norms among it"
    (alone,), (life,) = one["narrow-auto-1"], two["roomless"]
    assert any("whole only while it computes" in note for note in life["notes"]) and life["kinds"] == alone["kinds"]
    assert not any("whole only" in note for name, (other, *_) in two.items() if name != "roomless"
                   for note in other["notes"])
    assert max(abs(a - b) for a, b in zip(losses(alone), losses(life))) < 5e-3
    assert max(abs(a - b) for a, b in zip(alone["val"], life["val"])) < 5e-4


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_resume_is_exact_at_the_same_world_size(lived, strategy):
    "With dropout, of which each rank has its own; stopped once, or after 5, 0 and 3 steps"
    (whole,), cut = lived[2][f"whole-{strategy}"], lived[2][f"cut-{strategy}"]
    assert [life["status"] for life in cut] == ["stopped"] * (len(cut) - 1) + ["completed"] and len(cut) > 1
    assert [step for life in cut for step in life["steps"]] == whole["steps"] and cut[-1]["weights"] == whole["weights"]


def test_a_rank_that_holds_up_the_others_is_found_out(two):
    "Both take as long by the clock on the wall; what each computes itself is known to both"
    (life,) = two["hindered"]
    fast, slow = life["seconds"]
    assert slow > fast + 0.4 and all(other["seconds"] == [fast, slow] for other in life["others"])


@pytest.mark.parametrize("name,worlds", [pytest.param("journey", (1, 2), id="1 2 1"),
                                         pytest.param("travel", (1, 2, 4), marks=pytest.mark.slow, id="1 2 4 1"),
                                         pytest.param("descent", (8, 2), marks=pytest.mark.slow, id="8 2 1")])
def test_a_checkpoint_goes_from_one_world_to_the_next(root, lived, name, worlds):
    (last,) = alone(root, dict(name=name))[name]
    (whole,) = alone(root, dict(name=f"stay-{name}"))[f"stay-{name}"]
    journey = [loss for world in worlds for loss in losses(lived[world][name][0])] + losses(last)
    assert last["status"] == "completed" and len(journey) == len(whole["steps"])
    assert max(abs(a - b) for a, b in zip(losses(whole), journey)) < 1e-5


@pytest.mark.parametrize("world,name", [(2, "muon-fsdp-2"), pytest.param(4, "qwen3-fsdp-4", marks=pytest.mark.slow)])
def test_all_ranks_write_one_hugging_face_folder(lived, world, name):
    from transformers import AutoModelForCausalLM
    folder = Path(lived[world][name][0]["folder"])
    shards = sorted(f.name for f in folder.glob("*.safetensors"))
    assert shards == [f"model-0000{i + 1}-of-0000{world}.safetensors" for i in range(world)] and not verify(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    ours, theirs, tokens = load_model(folder), AutoModelForCausalLM.from_pretrained(folder), torch.arange(20)[None]
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in theirs.parameters())
    with torch.no_grad(): assert torch.allclose(ours(tokens)[0], theirs(tokens).logits, atol=1e-4)
