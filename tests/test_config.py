"""Config: defaults → TOML → flags → one validated Config, and every way it can be refused."""
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from llm_trainer.config import (
    Config, ModelConfig, changes, all_settings, differences, idle, load_config, profiles, reference)
from llm_trainer.errors import ConfigError, NotFoundError
from llm_trainer.terminal import clean

ROOT = Path(__file__).parent.parent
FIXED_NAMES = """arch n_layer n_head n_kv_head head_size n_embd n_hidden seq_len dropout dataset tokenizer vocab_size
    val_fraction shuffle num_workers batch_size grad_accum_steps epochs max_steps optimizer lr min_lr warmup_steps
    schedule weight_decay grad_clip patience dtype compile device deterministic seed log_every eval_every save_every
    save_minutes keep_checkpoints sample_every""".split()


def written(folder, text):
    file = folder / "mine.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def refusal(*args, **kwargs):
    with pytest.raises(ConfigError) as e: load_config(*args, **kwargs)
    return str(e.value)


# Profiles

@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda f: f.stem)
def test_every_profile_loads_and_states_only_differences(file):
    config = load_config(file)
    default, stated = Config().flat(), {key for table in tomllib.loads(file.read_text()).values() for key in table}
    assert "dataset" in stated
    assert {key for key in stated - {"dataset"} if config.flat()[key] == default[key]} == set()
    assert idle(config) == []
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_profiles_that_are_promised_exist():
    assert {"default", "quickstart", "tiny", "shakespeare-char", "shakespeare-char-cpu", "small", "medium",
            "gpt2-124m"} <= set(profiles())


def test_tiny_ends_as_a_real_run_does():
    tiny = load_config("tiny")
    assert tiny.training.max_steps == 0 and tiny.data.dataset == "python-docs-tiny"


def test_a_workspace_profile_wins_over_the_packaged_one(tmp_path):
    (tmp_path / "tiny.toml").write_text("[training]\nepochs = 7\n")
    assert load_config("tiny", configs=tmp_path).training.epochs == 7
    assert load_config("quickstart", configs=tmp_path) == load_config("quickstart")


def test_unknown_profile_lists_the_profiles_and_the_nearest():
    message = refusal("quikstart")
    assert "did you mean quickstart?" in message and "tiny" in message and "gpt2-124m" in message


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="no profile file"): load_config(tmp_path / "gone.toml")


# Settings

def test_the_names_of_the_contract():
    assert set(FIXED_NAMES) <= set(all_settings())


def test_names_are_unique_across_groups():
    assert len(all_settings()) == sum(len(type(group).model_fields) for _, group in Config())


@pytest.mark.parametrize("knob", all_settings().values(), ids=lambda k: k.name)
def test_every_setting_is_described_bounded_and_classed(knob):
    assert len(knob.description) > 20 and not knob.description.endswith(".")
    assert knob.change in ("fixed", "changeable", "cosmetic")
    if knob.type in ("int", "float"): assert None not in knob.bounds
    if knob.type == "choice": assert knob.default in knob.choices
    assert f"`{knob.name}`" in reference(knob.group)


@pytest.mark.parametrize("knob", [k for k in all_settings().values() if k.type in ("int", "float")],
                         ids=lambda k: k.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308, -1, 10**400, "1", True, [1], {"a": 1}, "ten"],
                         ids=repr)
def test_no_number_takes_what_is_none(knob, value):
    assert f"--{knob.name}" in refusal("tiny", {knob.name: value})


def test_types_are_strict():
    assert "whole number" in refusal("tiny", {"epochs": 3.0})
    assert "one of true, false" in refusal("tiny", {"shuffle": 1})
    assert load_config("tiny", {"lr": 1}).training.lr == 1.0


def test_every_knob_reads_its_own_default_from_text():
    for name, value in Config().flat().items():
        if value is not None: assert all_settings()[name].parse(str(value)) == value


@pytest.mark.parametrize("name,text,value", [("lr", "3e-4", 3e-4), ("n_layer", "4", 4), ("compile", "True", True),
    ("compile", "auto", "auto"), ("shuffle", "false", False), ("dataset", "5", "5"), ("n_layer", "4.0", "4.0")])
def test_flags_are_parsed_by_type(name, text, value):
    parsed = all_settings()[name].parse(text)
    assert parsed == value and type(parsed) is type(value)


# Sizes that must fit together

def test_derived_sizes():
    gpt2, qwen3 = ModelConfig(n_embd=192, n_head=4), ModelConfig(arch="qwen3", n_embd=192, n_head=4)
    assert (gpt2.n_kv_head, gpt2.head_size, gpt2.n_hidden) == (4, 48, 768)
    assert (qwen3.n_kv_head, qwen3.head_size, qwen3.n_hidden) == (4, 48, 512)
    assert Config(model=gpt2).replace(n_embd=256).model.n_hidden == 1024


@pytest.mark.parametrize("sizes,word", [
    (dict(n_embd=130, n_head=4), "multiple of n_head"), (dict(n_embd=2, n_head=4), "multiple of n_head"),
    (dict(arch="qwen3", n_head=4, n_kv_head=3), "multiple of n_kv_head"),
    (dict(n_head=4, n_kv_head=2), "must equal n_head"),
    (dict(n_head=4, n_embd=128, head_size=16), "must equal n_embd"),
    (dict(arch="qwen3", n_head=4, n_embd=12), "must be even"), (dict(lr=1e-5, min_lr=1e-4), "must not exceed lr")])
def test_sizes_that_can_not_be_built(sizes, word):
    with pytest.raises(ConfigError, match=word): Config().replace(**sizes)


def test_a_tokenizer_is_a_kind_or_a_path():
    assert "did you mean byte?" in refusal("tiny", {"tokenizer": "bite"})
    assert load_config("tiny", {"tokenizer": "./bite"}).data.tokenizer == "./bite"


def test_a_text_is_not_empty():
    for name in ("sample_prompt", "dataset"):
        assert "a text" in (said := refusal("tiny", {name: ""})) and 'not ""' in said


def test_a_mix_of_datasets(tmp_path):
    file = written(tmp_path, '[data]\ndataset = [{name = "python-docs", weight = 2}, {name = "python-code"}]\n')
    assert [(s.name, s.weight) for s in load_config(file).data.dataset] == [("python-docs", 2.0), ("python-code", 1.0)]
    for bad in ("[]", "[1]", "[{weight = 1}]", '[{name = "a", weight = 0}]', '[{name = "a", wieght = 1}]', "{}"):
        assert "dataset" in refusal(written(tmp_path, f"[data]\ndataset = {bad}\n")).splitlines()[0]


def test_a_dataset_flag_drops_what_belonged_to_the_other_dataset():
    data = load_config("default", {"dataset": "python-docs"}).data
    assert data.dataset_config is None and data.dataset_revision is None
    assert load_config("default", {"dataset": "a/b", "dataset_config": "c"}).data.dataset_config == "c"


# Files that are wrong

@pytest.mark.parametrize("text,words", [
    ("[training]\nepcohs = 3\n", ["mine.toml", "epcohs", "did you mean epochs?"]),
    ("[trainin]\nepochs = 3\n", ["[trainin]", "did you mean training?"]),
    ("[training]\nn_layer = 3\n", ["n_layer belongs in [model], not in [training]"]),
    ("n_layer = 3\n", ["put it under [model]"]),
    ("model = 3\n", ["model must be a table"]),
    ("[training]\nlr = 1e-3\nlr = 1e-4\n", ["not valid TOML", "line 3"]),
    ("[training]\n[training]\n", ["not valid TOML"]),
    ("[training]\nlr = \n", ["not valid TOML"]),
    ("[training]\nseed = " + "9" * 5000, ["not valid TOML"]),
    ("[training]\nseed = 0x" + "f" * 5000, ["seed", "thousands of digits"]),
    ("[training]\nseed = " + "[" * 20_000, ["nested too deeply"]),
    ("[training]\nseed = " + "[" * 50 + "]" * 50, ["seed must be a whole number"]),
    ("a." * 10_000 + "a = 1", ["nested too deeply"]),
    ("a.b.c = 1", ["no such table: [a]"]),
    ("[training]\n" + "\n".join(f"k{i} = 1" for i in range(4000)), ["… and 3995 more"]),
    ("[training]\nepochs = \"\\u001b]0;x\\u0007\"\n", ["epochs must be"]),
    (b"\x89PNG\r\n\x1a\n\x00\x00", ["not a text file"]),
    (b"\x00" * 1000, ["not valid TOML"]),
    (b"#" * 70_000, ["bigger than 64 kB"]),
], ids=range(19))
def test_a_wrong_file_is_one_message(tmp_path, text, words):
    began = time.process_time()
    message = refusal(written(tmp_path, text))
    assert all(word in message for word in words), message
    assert "\x1b" not in message and len(message) < 2000
    assert time.process_time() - began < 20  # a hang, not a speed


def test_unreadable_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fifo = tmp_path / "fifo.toml"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, "x" * 5000 + ".toml", "a\0b.toml", "/dev/zero/x.toml"):
        with pytest.raises((ConfigError, NotFoundError)): load_config(path)
    with pytest.raises(NotFoundError, match="no profile file fifo.toml"): load_config("fifo", configs=tmp_path)


def test_a_profile_is_closed_after_reading():
    code = "from llm_trainer.config import load_config; load_config('tiny')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and not done.stderr


def test_all_problems_are_told_at_once(tmp_path):
    message = refusal(written(tmp_path, '[model]\narch = "gpt3"\n[training]\nlr = "fast"\n'), {"batch_size": 0})
    assert "did you mean gpt2?" in message and "lr must be" in message and "--batch_size must be" in message


def test_unknown_flags_suggest_the_nearest():
    for name in ("epcohs", "n_layers", "learning", "batchsize"):
        assert f"--{name}: no such setting" in refusal("tiny", {name: 1})
    assert "did you mean batch_size?" in refusal("tiny", {"batchsize": 1})


JUNK = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                    max_leaves=8)
KEYS = st.sampled_from([*all_settings(), "model", "data", "training", "sampling"]) | st.text(max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, st.dictionaries(KEYS, JUNK, max_size=4) | JUNK, max_size=4))
def test_any_nested_dictionary_is_a_config_or_one_message(nested):
    try: config = Config.from_dict(nested)
    except ConfigError as e: assert clean(str(e)) == str(e) and len(str(e)) < 3000
    else: assert Config.from_dict(config.to_dict()) == config


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, JUNK, min_size=1, max_size=3))
def test_any_overrides_are_a_config_or_one_message(overrides):
    try: load_config("tiny", overrides)
    except ConfigError as e: assert "--" in str(e)


# What changed

def test_changes_and_differences():
    old = load_config("tiny")
    assert changes(old, old.replace(epochs=9, log_every=3)) == {"epochs": (2, 9), "log_every": (1, 3)}
    assert set(differences(old)) >= {"n_layer", "dataset"} and differences(Config()) == {}


def test_settings_without_effect_are_told():
    told = idle(load_config("tiny", {"tokenizer": "byte", "decay_fraction": 0.5}))
    assert [line.split()[0] for line in told] == ["vocab_size", "decay_fraction"]
    def mixed(*configs):
        return Config().replace(dataset=[{"name": "a/b", "config": c} for c in configs], dataset_config="all")
    assert idle(mixed("one", None)) == [] and "its own config" in idle(mixed("one", "two"))[0]


def test_a_config_is_frozen_and_shows_its_differences():
    config = load_config("tiny")
    with pytest.raises(ValueError): config.training.lr = 1.0
    assert "| `n_layer` | 2 | 6 |" in config._repr_markdown_()


# The module itself

def test_importing_config_loads_no_torch():
    code = "import sys, llm_trainer.config; print([m for m in ('torch', 'numpy', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_built_package_carries_the_profiles(tmp_path):
    library = tmp_path / "lib"
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path, "--build-lib", library],
                   cwd=ROOT, check=True, capture_output=True)
    names = {file.name for file in (library / "llm_trainer/profiles").glob("*.toml")}
    assert names == {file.name for file in (ROOT / "configs").glob("*.toml")}
    assert not (ROOT / "llm_trainer/profiles").exists()
    code = "from llm_trainer.config import *; print(load_config('tiny').model.n_layer, profiles()['tiny'])"
    seen = subprocess.run([sys.executable, "-c", code], cwd=library, capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(library)}).stdout
    assert seen == f"2 {library}/llm_trainer/profiles/tiny.toml\n"
