"""What the tests share: tiny models in the official layouts, with a tokenizer of their own; nothing is
downloaded.
"""

import io
import itertools
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import sys
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would only wait for each other
# Commands are forked here, and a process that sees a GPU cannot be forked once it has computed a gradient.
# So the tests see no GPU, except those that test_device.py starts in a process of their own.
if "TEST_ON_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# isort: split

import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file

import llama
import train
from base.console import PROJECT
from base.tsv import write_tsv
from make_golden import VIT
from random_weights import write_llama, write_vit

torch.set_num_threads(1)

SHARED = PROJECT.parent / "shared"
WORDS = ("Question What is the Boot Style Heel Height Pattern of this product these two products Are they "
         "same Do have Why Which product's Context First Second Both has Answer Yes No Rain Boots Chelsea "
         "Combat Flat High Heel Striped Floral Women's Men's black leather shoe with a").split()
LABELS = [("Boot Style", "Rain Boots"), ("Boot Style", "Chelsea"), ("Boot Style", "Combat"),
          ("Heel Height", "Flat"), ("Heel Height", "High Heel")]


def train_tokenizer(path, normalization_rule_name="identity", **more):
    """Write a SentencePiece model of 400 pieces with byte fallback, trained on a few words, to `path`."""
    draw, model = random.Random(0), io.BytesIO()
    lines = [" ".join(draw.choices(WORDS, k=8)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=400, model_type="bpe",
        normalization_rule_name=normalization_rule_name, remove_extra_whitespaces=False,    # keeps newlines
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, **more)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A tokenizer.model of a few words."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def tiny_config(tokenizer_file):
    """A LLaMA with every size different from every other: 3 layers, grouped key/value heads, its own
    head_dim.
    """
    return llama.LlamaConfig(
        vocab_size=llama.Tokenizer(tokenizer_file).vocab_size, hidden_size=32, intermediate_size=56,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-6)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory, tiny_config, tokenizer_file):
    """The tiny LLaMA as a folder in the Hugging Face layout.  Weights are ten times the usual: it has
    opinions.
    """
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder, tiny_config, tokenizer_file, torch.float32, std=0.2)
    return folder


@pytest.fixture(scope="session")
def vit_dir(tmp_path_factory):
    """A ViT of 6 layers (two [cls] tokens) as a folder in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("vit")
    write_vit(folder, VIT, std=0.2)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Photo features and the demo world of a test module are in a folder of its own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EIVEN_CACHE", str(folder))
        yield folder


@pytest.fixture
def tiny(llama_dir):
    """(LLaMA, Tokenizer), freshly loaded."""
    return llama.load_llama(llama_dir, torch.float32)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """ROOT/shoes/{train,val,test}.tsv with a photo each: 6 products a value for training, 2 and 3 for val
    and test.
    """
    root, draw, number = tmp_path_factory.mktemp("data"), random.Random(1), 0
    (root / "images").mkdir()
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        rows = []
        for attribute, value in LABELS * count:
            number += 1
            title = " ".join(draw.choices(WORDS[-12:], k=draw.randint(2, 9)))
            photo = f"B{number:04}.jpg"
            rows.append([f"B{number:04}", photo, "Shoes", f"[Title] {title}", attribute, value])
            colour = tuple(draw.randrange(256) for _ in range(3))
            Image.new("RGB", (40, 50), colour).save(root / "images" / photo)
        write_tsv(root / "shoes" / f"{split}.tsv", rows)
    return root


def randomize(model, seed=0):
    """Give all that is trained random values: a zero up-projection would pass whatever the code does."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.normal_(0, 0.3, generator=draw)
    return model


@pytest.fixture(scope="module")
def flags(data_root, llama_dir, vit_dir):
    return ["--data", str(data_root), "--dataset", "shoes", "--llama", str(llama_dir), "--vit", str(vit_dir),
            "--labels", "4", "--epochs", "3", "--batch-size", "8", "--device", "cpu"]


def train_run(folder, flags, *more):
    """Train with these flags; the run's folder."""
    train.main([*map(str, [*flags, *more]), "--out", str(folder)])
    return folder


def resume(run, *more):
    train.main(["--resume", str(run), *more])


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    """A finished run: 20 labelled products, as many comparisons, 3 epochs of 5 steps."""
    return train_run(tmp_path_factory.mktemp("runs") / "run", flags)


@pytest.fixture
def own(run, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(run, tmp_path / "run")


def log(run):
    """The lines of log.jsonl; none if it is not there."""
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


def losses(run):
    return [line["loss"] for line in log(run)]


def result(run):
    """What is equal, bit for bit, of two runs that are the same: losses, what was trained, and answers."""
    trained = load_file(run / "adapter.safetensors")
    answers = [(run / split / "predictions.tsv").read_bytes() for split in ("", "val")]
    return losses(run), {name: tensor.tolist() for name, tensor in trained.items()}, answers


# ---------------------------------------------------------------------------------------- commands


class Outcome(NamedTuple):
    """How a command ended; signal is 0 if it ended by itself."""

    code: int
    signal: int
    out: str
    err: str


def start(script, arguments, folder, limit_s=20, before=None, env=None):
    """Start `python SCRIPT ARGUMENTS` ("train.py", or "-m dataset") in a forked child, which has torch
    imported already; a function that waits for its end, and returns its Outcome.

    folder   where what it prints is kept;  limit_s: then it is killed (SIGALRM in the Outcome)
    before   called in the child first, e.g. to set a limit of file sizes;  env: {name: value} added to its
             environment
    """
    files = [folder / "stdout.txt", folder / "stderr.txt"]

    def child():
        signal.alarm(limit_s)
        for descriptor, path in enumerate(files, start=1):
            with path.open("w") as file:
                os.dup2(file.fileno(), descriptor)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        os.environ.update(env or {})
        sys.argv = [str(PROJECT / script), *map(str, arguments)]
        if before:
            before()
        if script.startswith("-m "):
            runpy.run_module(script.removeprefix("-m "), run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()

    def end():
        process.join()
        code = process.exitcode                         # -N: ended by signal N
        return Outcome(max(code, 0), max(-code, 0), *(path.read_text("utf-8", "replace") for path in files))
    return end


def command(*what, **how):
    """The Outcome of a command that is started like this."""
    return start(*what, **how)()


def together(count, script, arguments, folder, before=None, **env):
    """The Outcomes of a command in `count` processes, which join as those of torchrun do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
           "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), **env}
    ends = []
    for rank in map(str, range(count)):
        (folder / f"rank{rank}").mkdir(exist_ok=True)
        own = env | {"RANK": rank, "LOCAL_RANK": rank}
        ends.append(start(script, arguments, folder / f"rank{rank}", 60, before, own))
    return [end() for end in ends]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(*_):
    """Ctrl-C."""
    signal.default_int_handler(signal.SIGINT, None)


def ends_at(n, end=kill):
    """For `before` of a command: end() before the n-th change on the disk."""
    def before():
        moments = itertools.count(1)

        def with_moment(function):
            def call(*arguments, **how):
                if next(moments) == n:
                    end()
                return function(*arguments, **how)
            return call

        for name in ("fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, with_moment(getattr(os, name)))
    return before


def held(outcome):
    """None if a command kept the rule, else what is wrong.

    The rule: exit 0, or exit 1 or 2 with one line that says what is wrong; never a traceback, a signal, or a
    hang.
    """
    errors = [line for line in outcome.err.splitlines() if ": error: " in line]
    if outcome.signal or "Traceback" in outcome.err or len(errors) != bool(outcome.code) or outcome.code > 2:
        return f"exit {outcome.code}, signal {outcome.signal}: {outcome.err[-300:]}"
    return None


def jpeg(size=(60, 40), kind="JPEG", mode="RGB"):
    """The bytes of a photo of noise."""
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(file, kind)
    return file.getvalue()
