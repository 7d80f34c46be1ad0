"""Attacks on configs, states, weights, logs and arguments, and on folders that two processes use at once.

The rule for each attack (conftest.held): exit 0, or exit 2 with one line that says what is wrong; never a traceback, a signal,
a hang over 20 s or 1 GB.  Besides, no input is changed, and what a command leaves in a run folder can be used by a later start.

The attacks are drawn from a seed.  An ordinary run of the tests takes a sample of each kind; ATTACKS=all takes all of them:
    ATTACKS=all python -m pytest tests/test_attacks_configs.py -rP
"""

import hashlib
import itertools
import json
import math
import os
import random
import shutil
import sys
import time

import pytest
import torch
from conftest import at_once, command, held
from safetensors.torch import load_file, save_file

import train
from experiments.random_weights import write_llama
from support import config, run_folder

ALL = os.environ.get("ATTACKS") == "all"
SPLITS = ("train", "val", "test")


# ------------------------------------------------------------------------------------------------ what is attacked


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_config, tokenizer_file, vit_dir, data_root):
    """A folder that is copied for every attack: data, LLaMA in two shards, a ViT in two layouts, a run that is finished, and
    the same run stopped after the first of its two steps."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "data" / "shoes").mkdir(parents=True)
    for split in SPLITS:                                # few products: thousands of attacks answer them
        lines = (data_root / "shoes" / f"{split}.tsv").read_text().splitlines(keepends=True)
        (folder / "data" / "shoes" / f"{split}.tsv").write_text("".join(lines[:None if split == "train" else 5]))
    (folder / "data" / "images").symlink_to(data_root / "images")
    write_llama(folder / "llama", tiny_config, tokenizer_file, torch.float32, shards=2, std=0.2)
    shutil.copytree(vit_dir, folder / "vit")
    (folder / "clip").mkdir()                           # open_clip's files; the heads are 64 wide there, so it is another ViT
    torch.save(load_file(vit_dir / "model.safetensors"), folder / "clip" / "pytorch_model.bin")
    (folder / "clip" / "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": true, "embed_dim": 512}}')
    (folder / "clip" / "config.json").write_text('{"vision_config": {"num_attention_heads": 3, "hidden_act": "quick_gelu"}}')
    before = config.FEATURE_CACHE, run_folder.SAVE_EVERY, train.train_step
    config.FEATURE_CACHE, run_folder.SAVE_EVERY = folder / "cache.sqlite", -1
    train.main([*sources(folder), *FLAGS, "--out", str(folder / "run")])
    steps = iter([before[2]])
    train.train_step = lambda *arguments: next(steps)(*arguments)       # the second step ends the run
    with pytest.raises(StopIteration):
        train.main([*sources(folder), *FLAGS, "--out", str(folder / "stopped")])
    config.FEATURE_CACHE, run_folder.SAVE_EVERY, train.train_step = before
    return folder


FLAGS = ["--dataset", "shoes", "--labels", "2", "--epochs", "2", "--device", "cpu"]


def sources(folder, vit="vit"):
    return ["--data", str(folder / "data"), "--llama", str(folder / "llama"), "--vit", str(folder / vit)]


def commands(folder):
    """{name: (script, arguments)} of what is run after an attack."""
    image = str(folder / "data" / "images" / "B0001.jpg")
    one = ["--image", image, "--text", "black shoe", "--attribute", "Boot Style"]
    run = [str(folder / "run"), *sources(folder)]
    return {"train": ("train.py", [*sources(folder), *FLAGS, "--epochs", "1", "--out", str(folder / "new")]),
            "train with clip": ("train.py", [*sources(folder, "clip"), *FLAGS, "--epochs", "1", "--out", str(folder / "new")]),
            "resume": ("train.py", ["--resume", str(folder / "stopped"), *sources(folder)]),
            "answer": ("evaluate.py", [*run, *one]),
            "constrain": ("evaluate.py", [*run, *one, "--constrain"]),
            "score": ("evaluate.py", run),
            "file": ("evaluate.py", [*run, "--input", str(folder / "data" / "shoes" / "test.tsv"), "--output",
                                     str(folder / "answers.tsv")])}


def own_cache(folder):
    def before():
        config.FEATURE_CACHE = folder / "cache.sqlite"
    return before


def digests(folder):
    """{file: digest} of all inputs: what no command may change."""
    return {path: hashlib.sha256(path.read_bytes()).digest() for part in ("data/shoes", "llama", "vit", "clip")
            for path in (folder / part).iterdir()}


def outcome_of(world, tmp_path, breaks, name, refused=False):
    """None if a command kept the rule on a copy of the world that `breaks` changed, else what is wrong.

    refused  exit 0 is wrong: no result could be right
    """
    folder = tmp_path / "world"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world, folder, symlinks=True)
    breaks(folder)
    before, (script, arguments) = digests(folder), commands(folder)[name]
    outcome = command(script, arguments, tmp_path, before=own_cache(folder))
    wrong = held(outcome)
    if wrong is None and digests(folder) != before:
        wrong = "an input was changed"
    if wrong is None and refused and outcome.code == 0:
        wrong = "exit 0 with a wrong result"
    left = folder / ("stopped" if name == "resume" else "new")
    if wrong is None and script == "train.py" and outcome.code == 2 and left.is_dir():
        # The attack is undone.  What it left must be usable, unless the run began with other data or weights.
        for part in ("data", "llama", "vit", "clip"):
            shutil.rmtree(folder / part)
            shutil.copytree(world / part, folder / part, symlinks=True)
        for part in ("config.json", "state.pt") if name == "resume" else ():
            shutil.copyfile(world / "stopped" / part, left / part)
        again = command("train.py", ["--resume", str(left), *sources(folder)], tmp_path, before=own_cache(folder))
        if held(again) or again.code and (name == "resume" or "was trained with another" not in again.err):
            wrong = f"what it left cannot be used: {again.err[-200:]}"
    return wrong


def attack(kind, cases, sample, outcome):
    """Run a seeded sample of the cases (all with ATTACKS=all); print how many held, and fail with those that did not.

    cases  a list of (what it is, arguments of `outcome`); `outcome` gives None if the rule was kept
    """
    chosen, start = cases if ALL else random.Random(kind).sample(cases, min(sample, len(cases))), time.monotonic()
    broken = {what: wrong for what, *arguments in chosen if (wrong := outcome(*arguments))}
    print(f"{kind}: {len(chosen)} of {len(cases)} attacks, {len(chosen) - len(broken)} held, {time.monotonic() - start:.0f} s")
    assert not broken, "\n".join(f"{what}: {wrong}" for what, wrong in broken.items())


# ------------------------------------------------------------------------------------------------ JSON, field by field


GONE = object()                                         # the field is left out
VALUES = [GONE, None, True, False, "abc", "2", "", "\ud800", "\0", -1, 0, 1, 3, 2.5, 1e300, -1e300, float("nan"), float("inf"),
          10 ** 7, 10 ** 30, [], [1], {}, {"a": 1}, [[1] * 3] * 3]
TEXTS = ["", "null", "5", '"text"', "[]", "[1]", "{}", "{", '{"a": 1,}', "[" * 200_000, "[" * 200_000 + "]" * 200_000,
         '{"a":' * 100_000, '{"num_attention_heads": ' + "1" * 5000 + "}", "\ufeff{}", "{}\0", "NaN", "<html>"]


def fields_of(value, path=()):
    """The path of every field of a JSON object, nested ones too; of a list its first element."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from fields_of(inner, (*path, key))


def set_field(file, path, value):
    def breaks(folder):
        record = json.loads((folder / file).read_text())
        holder = record
        for key in path[:-1]:
            holder = holder[key]
        if value is GONE:
            del holder[path[-1]]
        elif value == "double" or value == "minus":     # by size and sign
            holder[path[-1]] *= 2 if value == "double" else -1
        else:
            holder[path[-1]] = value
        (folder / file).write_text(json.dumps(record))
    return breaks


def set_text(file, text):
    return lambda folder: (folder / file).write_text(text, encoding="utf-8")


MORE = {"llama/config.json": ["rope_scaling", "rope_parameters", "hidden_act", "mlp_bias", "quantization_config",
                              "sliding_window", "pretraining_tp", "partial_rotary_factor"],
        "vit/config.json": ["vision_config", "hidden_act"]}
JSON_FILES = {"llama/config.json": "train", "vit/config.json": "train", "clip/open_clip_config.json": "train with clip",
              "clip/config.json": "train with clip", "llama/model.safetensors.index.json": "train",
              "run/config.json": "constrain", "stopped/config.json": "resume"}


def json_cases(world):
    draw = random.Random("JSON")
    for file, name in JSON_FILES.items():
        record = json.loads((world / file).read_text())
        paths = list(fields_of(record))
        if "index" in file:                             # the map and one of its many names
            paths = [("weight_map",), ("weight_map", next(iter(record["weight_map"])))]
        for path in [*paths, *((field,) for field in MORE.get(file, ()))]:
            value = record
            for key in path:
                value = value.get(key) if isinstance(value, dict) else value[key]
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            values = [*(v for v in VALUES if v is not GONE or path[0] in record), *(["double", "minus"] if number else [])]
            for new in values if file.startswith(("llama", "vit", "clip")) else draw.sample(values, 8):
                yield f"{file}, {path} = {str(new)[:30]!r}", set_field(file, path, new), name
        for text in TEXTS:
            yield f"{file} is {text[:30]!r}", set_text(file, text), name


def test_every_field_of_every_json(world, tmp_path):
    attack("JSON fields", list(json_cases(world)), 40, lambda breaks, name: outcome_of(world, tmp_path, breaks, name))


# ------------------------------------------------------------------------------------------------ state.pt


TENSORS = [torch.ones(()), torch.ones(1), torch.ones(3, 5), torch.tensor(float("nan")), torch.tensor(-2.0), torch.tensor(1e9),
           torch.ones(1, dtype=torch.int64), torch.ones(0), torch.ones(1, 1).expand(3000, 3000), torch.eye(2).to_sparse()]
TIMES = [float("nan"), float("inf"), -1.0, 1e30, 0.0]


def state_cases(world):
    state = torch.load(world / "stopped" / "state.pt")

    def paths(value, path=()):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            yield (*path, key)
            yield from paths(inner, (*path, key))

    def breaks(path, change):
        def breaks(folder):
            state = torch.load(folder / "stopped" / "state.pt")
            holder = state
            for key in path[:-1]:
                holder = holder[key]
            if change is GONE:
                del holder[path[-1]]
            else:
                holder[path[-1]] = change(holder[path[-1]])
            torch.save(state, folder / "stopped" / "state.pt")
        return breaks

    draw = random.Random("state")
    for path in paths(state):
        yield f"state.pt without {path}", breaks(path, GONE), "resume"
        values = [None, "abc", -1, 0, 10 ** 9, 10 ** 30, 2.5, float("nan"), [], [1], {}, {"a": 1}, *TENSORS]
        for value in values if len(path) < 2 else draw.sample(values, 5):
            yield f"state.pt, {path} = {str(value)[:30]}", breaks(path, lambda _, value=value: value), "resume"
        value = state
        for key in path:
            value = value[key]
        if isinstance(value, torch.Tensor):
            for times in draw.sample(TIMES, 2):
                yield f"state.pt, {path} * {times}", breaks(path, lambda tensor, times=times: tensor * times), "resume"
            yield f"state.pt, {path} cut", breaks(path, lambda tensor: tensor.flatten()[:-1]), "resume"
            yield f"state.pt, {path} in fp64", breaks(path, lambda tensor: tensor.double()), "resume"


def test_every_field_of_the_state(world, tmp_path):
    attack("state.pt", list(state_cases(world)), 20, lambda breaks, name: outcome_of(world, tmp_path, breaks, name))


# ------------------------------------------------------------------------------------------------ bytes


FILES = {"data/shoes/train.tsv": "train", "data/shoes/val.tsv": "train", "data/shoes/test.tsv": "file",
         "llama/config.json": "train", "llama/model.safetensors.index.json": "train",
         "llama/model-00001-of-00002.safetensors": "train", "llama/model-00002-of-00002.safetensors": "train",
         "llama/tokenizer.model": "train", "vit/model.safetensors": "train", "vit/config.json": "train",
         "clip/pytorch_model.bin": "train with clip", "clip/open_clip_config.json": "train with clip",
         "run/adapter.safetensors": "constrain", "run/config.json": "answer", "run/log.jsonl": "score",
         "run/metrics.json": "score",
         "stopped/state.pt": "resume", "stopped/log.jsonl": "resume", "stopped/config.json": "resume"}


def byte_cases(world):
    draw = random.Random("bytes")

    def change(file, how):
        def breaks(folder):
            data = (folder / file).read_bytes()
            (folder / file).write_bytes(how(data))
        return breaks

    for file, name in FILES.items():
        size = (world / file).stat().st_size
        # Half of the places are in the first 2,000 bytes: the headers are there.
        places = [draw.randrange(min(size, 2000)) for _ in range(8)] + [draw.randrange(size) for _ in range(8)]
        for place in [0, *places]:
            yield f"{file}, cut at {place}", change(file, lambda data, place=place: data[:place]), name
        for place in places:
            mask = draw.randrange(1, 256)
            yield (f"{file}, byte {place} ^ {mask}", change(file, lambda data, place=place, mask=mask: (
                data[:place] + bytes([data[place] ^ mask]) + data[place + 1:])), name)
        for place in places[:4]:
            noise = draw.randbytes(40)
            yield (f"{file}, noise at {place}", change(file, lambda data, place=place, noise=noise: (
                data[:place] + noise + data[place + 40:])), name)
        for other in FILES:
            if other != file:
                yield (f"{file} is {other}",
                       lambda folder, file=file, other=other: shutil.copyfile(folder / other, folder / file), name)


def test_every_file_cut_flipped_and_swapped(world, tmp_path):
    attack("bytes", list(byte_cases(world)), 40, lambda breaks, name: outcome_of(world, tmp_path, breaks, name))


def nan_cases(world):
    def breaks(file, name, value):
        def breaks(folder):
            tensors = load_file(folder / file)
            tensors[name].view(-1)[-1] = value
            save_file(tensors, folder / file)
        return breaks

    for file, name in (("llama/model-00001-of-00002.safetensors", "train"), ("llama/model-00002-of-00002.safetensors", "train"),
                       ("vit/model.safetensors", "train"), ("run/adapter.safetensors", "answer")):
        for tensor in load_file(world / file):
            for value in (float("nan"), float("inf"), 3e38):
                # Of embeddings and logits the last token alone is hit, which may not occur; 3e38 may be fine.
                refused = math.isnan(value) and "embed" not in tensor and "lm_head" not in tensor
                yield f"{file}, {tensor} has {value}", breaks(file, tensor, value), name, refused


def test_weights_that_are_not_finite(world, tmp_path):
    attack("NaN and infinity", list(nan_cases(world)), 12,
           lambda breaks, name, refused: outcome_of(world, tmp_path, breaks, name, refused))


# ------------------------------------------------------------------------------------------------ arguments


NUMBERS = ["0", "-1", "1e18", "1" + "0" * 18, "1" + "0" * 400, "1" * 5000, "1e300", "1e-300", "nan", "inf", "-inf", "", " ",
           "0x10", "٣", os.fsdecode(b"\xff"), "1_0", "3.5", "--"]
NUMBER_FLAGS = ["--labels", "--lbc-ratio", "--adapter-dim", "--projector-dim", "--epochs", "--batch-size",
                "--micro-batch-size", "--lr", "--seed"]
TEXT_FLAGS = ["--dataset", "--data", "--llama", "--vit", "--lbc", "--features", "--adapter", "--device", "--dtype", "--out"]
WORDS = ["", " ", "meta", "cuda:99", "mps", "cpu:1", "..", "/", "/dev/null", "/dev/null/x", "/proc/self/mem", "a\nb", "鞋",
         "x" * 300, "x" * 5000, os.fsdecode(b"caf\xe9"), "\u202e", "-x", "demo", "~", "."]
EVALUATE = {"--temperature": NUMBERS, "--top-p": NUMBERS, "--attribute": WORDS, "--text": WORDS, "--image": WORDS,
            "--split": WORDS, "--device": WORDS, "--dtype": WORDS, "--data": WORDS, "--llama": WORDS}


def argument_cases(world):
    for flag, values in [*((flag, NUMBERS) for flag in NUMBER_FLAGS), *((flag, WORDS) for flag in TEXT_FLAGS)]:
        for value in values:
            if (flag, value) != ("--out", "/"):         # root may write there
                yield f"train.py {flag} {value[:20]!r}", "train", [f"{flag}={value}"]
    for flag, values in EVALUATE.items():
        for value in values:
            yield f"evaluate.py {flag} {value[:20]!r}", "answer" if flag != "--split" else "score", [f"{flag}={value}"]
    for value in WORDS:
        yield f"evaluate.py {value[:20]!r}", "run", [value]
        yield f"train.py --resume {value[:20]!r}", "continue", [value]


def test_arguments(world, tmp_path):
    def outcome(name, more):
        folder = tmp_path / "world"
        if not folder.exists():
            shutil.copytree(world, folder, symlinks=True)
        shutil.rmtree(folder / "new", ignore_errors=True)
        every = commands(folder) | {"run": ("evaluate.py", []), "continue": ("train.py", ["--resume"])}
        script, arguments = every[name]

        def before():
            own_cache(folder)()
            os.chdir(folder)                            # where relative names lead to
            run_folder.PROJECT = folder
        before_digests = digests(folder)
        wrong = held(command(script, [*arguments, *more], tmp_path, before=before))
        return wrong or (None if digests(folder) == before_digests else "an input was changed")
    attack("arguments", list(argument_cases(world)), 30, outcome)


# ------------------------------------------------------------------------------------------------ two at once


def test_two_processes_at_once(world, tmp_path):
    """In one --out folder one trains, with the result of training alone; a cache that both write is whole; an --output is written
    by one, and the other is refused if it comes meanwhile."""
    expected = (world / "run" / "adapter.safetensors").read_bytes()

    def outcome(what, number):
        folder = tmp_path / f"{what}{number}"
        shutil.copytree(world, folder, symlinks=True)
        for n in (1, 2):
            (folder / f"say{n}").mkdir()
        outs = [folder / "new", folder / ("new" if what == "out" else "other")]
        if what == "cache":
            (folder / "cache.sqlite").unlink()
        if what == "output":
            name, arguments = commands(folder)["file"]
            calls = [lambda n=n: command(name, arguments, folder / f"say{n}", 40, own_cache(folder)) for n in (1, 2)]
        else:
            calls = [lambda n=n, out=out: command("train.py", [*sources(folder), *FLAGS, "--out", str(out)],
                                                  folder / f"say{n}", 40, own_cache(folder)) for n, out in zip((1, 2), outs)]
        outcomes = at_once(calls)
        wrong = [w for w in map(held, outcomes) if w]
        if sorted(o.code for o in outcomes) not in {"out": [[0, 2]], "cache": [[0, 0]], "output": [[0, 0], [0, 2]]}[what]:
            wrong.append(f"exit codes {[o.code for o in outcomes]}: {[o.err[-150:] for o in outcomes]}")
        if wrong:
            return "; ".join(wrong)
        if what == "output" and (folder / "answers.tsv").read_bytes() != (world / "run" / "predictions.tsv").read_bytes():
            wrong.append("other answers")
        if what != "output" and any((out / "adapter.safetensors").read_bytes() != expected for out in outs):
            wrong.append("another result")
        shutil.rmtree(folder)
        return "; ".join(wrong)

    cases = [(f"two in one {what}, {n}", what, n) for what, n in itertools.product(("out", "cache", "output"), range(20))]
    attack("two at once", cases, 6, outcome)


if sys.platform != "linux":
    pytest.skip("the attacks fork processes and count their memory as Linux does", allow_module_level=True)
