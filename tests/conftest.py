"""What the tests share: tiny models in the official layouts, with a tokenizer of their own; nothing is downloaded."""

import csv
import hashlib
import io
import multiprocessing
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")           # the models are tiny: threads would only wait for each other
# Commands are forked here, and a process that sees a GPU cannot be forked once it has computed a gradient.  So the tests see
# none, except those that test_device.py starts in a process of their own.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
if "TEST_ON_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# isort: split

import pytest
import sentencepiece
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llama
import train
import vit
from dataset import build
from experiments import make_mave
from experiments.random_weights import write_llama, write_vit
from support import config

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"

WORDS = ("Question What is the Boot Style Heel Height Pattern of this product these two products Are they same Do have "
         "Why Which product's Context First Second Both has Answer Yes No Rain Boots Chelsea Combat Flat High Heel "
         "Striped Floral Women's Men's black leather shoe with a").split()


def train_tokenizer(path, **more):
    """Write a SentencePiece model of 400 pieces with byte fallback, trained on a few words, to `path`."""
    draw, model = random.Random(0), io.BytesIO()
    lines = [" ".join(draw.choices(WORDS, k=8)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,     # as LLaMA's: a newline stays one
        hard_vocab_limit=False, minloglevel=2, **more)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A tokenizer.model of a few words."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def tiny_config(tokenizer_file):
    """A LLaMA with every shape different from every other: 3 layers, grouped key/value heads, its own head_dim."""
    return llama.LlamaConfig(vocab_size=llama.Tokenizer(tokenizer_file).vocab_size, hidden_size=32,
                             intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                             head_dim=12, rms_norm_eps=1e-6)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory, tiny_config, tokenizer_file):
    """The tiny LLaMA as a folder in the Hugging Face layout.  Weights are ten times the usual, so that it has opinions."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder, tiny_config, tokenizer_file, torch.float32, std=0.2)
    return folder


@pytest.fixture(scope="session")
def vit_dir(tmp_path_factory):
    """A ViT of 6 layers (two [cls] tokens) as a folder in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("vit")
    write_vit(folder, vit.ViTConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=6, num_attention_heads=3,
                                    patch_size=8, image_size=32), std=0.2)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The features of a test module's photos go to a file of its own."""
    config.FEATURE_CACHE = tmp_path_factory.mktemp("cache") / "features.sqlite"


@pytest.fixture
def tiny(llama_dir):
    """(LLaMA, Tokenizer), freshly loaded."""
    return llama.load_llama(llama_dir, torch.float32)


PRODUCTS = [("Boot Style", "Rain Boots"), ("Boot Style", "Chelsea"), ("Boot Style", "Combat"),
            ("Heel Height", "Flat"), ("Heel Height", "High Heel")]


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """ROOT/shoes/{train,val,test}.tsv with a photo each: 6 products a value for training, 2 and 3 for val and test."""
    root, draw, number = tmp_path_factory.mktemp("data"), random.Random(1), 0
    (root / "images").mkdir()
    (root / "shoes").mkdir()
    for split, each in (("train", 6), ("val", 2), ("test", 3)):
        lines = ["id\timages\tcategory\ttexts\tattribute_names\tattribute_values"]
        for attribute, value in PRODUCTS * each:
            number += 1
            title = " ".join(draw.choices(WORDS[-12:], k=draw.randint(2, 9)))
            lines.append(f"B{number:04}\tB{number:04}.jpg\tShoes\t[Title] {title}\t{attribute}\t{value}")
            colour = tuple(draw.randrange(256) for _ in range(3))
            Image.new("RGB", (draw.randint(32, 60), draw.randint(32, 60)), colour).save(root / "images" / f"B{number:04}.jpg")
        (root / "shoes" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def randomize(model, seed=0):
    """Give all that is trained values of its own: a zero up-projection would pass whatever the code does."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.normal_(0, 0.3, generator=draw)
    return model


# ------------------------------------------------------------------------------------------------ the meta device

aten = torch.ops.aten
MATMULS = (aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm)


class Strict(TorchDispatchMode):
    """Run code on the meta device with a GPU's rules.  A value that is read back is 1, and a mask selects one row."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        name = operation.overloadpacket
        if name is aten._local_scalar_dense and args[0].is_meta:
            return {torch.bool: True, torch.float32: 1.0}.get(args[0].dtype, 1)
        if name is aten._to_copy and kwargs.get("device") == torch.device("cpu"):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name is not aten._to_copy:                   # a number in a tensor of no dimension may come from the CPU
            devices = {x.device for x in tensors if x.dim()}
            assert len(devices) < 2, f"{operation} has tensors of {devices}"
        if name in MATMULS:
            assert len({x.dtype for x in tensors}) == 1, f"{operation} has tensors of {[x.dtype for x in tensors]}"
        if name in (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index_put):
            row = torch.empty(1, dtype=torch.long, device="meta")
            args = (args[0], [row if x is not None and x.dtype == torch.bool else x for x in args[1]], *args[2:])
        return operation(*args, **kwargs)


# ------------------------------------------------------------------------------------------------ attacks


class Outcome(NamedTuple):
    """How a command ended.  signal is 0 if it ended by itself; megabytes is the memory that it took in addition."""

    code: int
    signal: int
    out: str
    err: str
    seconds: float
    megabytes: float


def command(script, arguments, folder, limit_s=20, before=None, env=None):
    """Run `python SCRIPT ARGUMENTS` ("train.py", or "-m dataset") in a forked child, which has torch imported already.

    folder  where the child's stdout and stderr are kept; the child itself writes to pipes, which no file-size limit touches
    limit_s the child is killed after this many seconds (signal 9 in the Outcome)
    before  called in the child first, e.g. to set a limit of file sizes
    env     {name: value} added to the child's environment
    """
    start, pipes = time.monotonic(), [os.pipe(), os.pipe()]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for descriptor, (_, end) in zip((1, 2), pipes):
                os.dup2(end, descriptor)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
            sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)      # as Python's own
            os.environ.update(env or {})
            project = Path(__file__).resolve().parent.parent
            sys.argv = [str(project / script) if script.endswith(".py") else script, *arguments]
            if before:
                before()
            try:
                if script.endswith(".py"):
                    runpy.run_path(sys.argv[0], run_name="__main__")
                else:
                    runpy.run_module(script.removeprefix("-m "), run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError:                         # as when Python itself ends
                    code = 120
            os._exit(code)
    said = [bytearray(), bytearray()]
    for end, write_end in pipes:
        os.close(write_end)
        os.set_blocking(end, False)

    def read_pipes():
        for (end, _), text in zip(pipes, said):
            try:
                while part := os.read(end, 1 << 16):
                    text += part
            except BlockingIOError:
                pass

    status = usage = None
    while status is None:
        read_pipes()
        done, ended, usage = os.wait4(child, os.WNOHANG)
        if done:
            status = ended
        elif time.monotonic() - start > limit_s:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
        else:
            time.sleep(0.005)
    read_pipes()
    for (end, _), name, text in zip(pipes, ("stdout.txt", "stderr.txt"), said):
        os.close(end)
        (folder / name).write_bytes(text)
    read = [text.decode("utf-8", errors="replace") for text in said]
    return Outcome(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1,
                   os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, *read, time.monotonic() - start,
                   max(0, usage.ru_maxrss * 1024 - resident) / 1e6)


def at_once(calls):
    """The results of calls that start at the same time, each in a forked process of its own."""
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(len(calls)), context.Queue()

    def one(number, call):
        gate.wait(60)
        results.put((number, call()))

    processes = [context.Process(target=one, args=pair) for pair in enumerate(calls)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in calls)
    for process in processes:
        process.join()
    return [found[number] for number in range(len(calls))]


def held(outcome, limit_mb=1000):
    """None if a command kept the rule, else what is wrong.

    The rule: exit 0, or exit 2 with one line that says what is wrong; never a traceback, a signal, a hang, or a lot of memory.
    """
    errors = [line for line in outcome.err.splitlines() if ": error: " in line]
    if outcome.signal:
        return f"ended by signal {outcome.signal} after {outcome.seconds:.1f} s"
    if "Traceback" in outcome.err or outcome.code not in (0, 2):
        return f"exit {outcome.code}: {outcome.err[-300:]}"
    if outcome.code == 2 and len(errors) != 1:
        return f"exit 2 with {len(errors)} error lines: {outcome.err[-300:]}"
    if outcome.megabytes > limit_mb:
        return f"took {outcome.megabytes:.0f} MB"
    return None


def run_command(script, *arguments, **how):
    return subprocess.run([sys.executable, config.PROJECT / script, *map(str, arguments)], capture_output=True, text=True,
                          timeout=300, **how)


@pytest.fixture(scope="module")
def flags(data_root, llama_dir, vit_dir):
    return ["--data", str(data_root), "--dataset", "shoes", "--llama", str(llama_dir), "--vit", str(vit_dir),
            "--labels", "4", "--epochs", "3", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    """A finished run: 20 labelled products, as many comparisons, 3 epochs of 5 steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.main([*flags, "--out", str(folder)])
    return folder


def jpeg(size=(60, 40), kind="JPEG", mode="RGB"):
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(file, kind)
    return file.getvalue()


GOOD = jpeg()
FEW = dict(more_than=5, at_most=30)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two small sources, and what an uninterrupted build makes of them."""
    folder = tmp_path_factory.mktemp("sources")
    labels, metadata = make_mave.make(folder, 6000, 6000)
    build.build(labels, metadata, folder / "root", photos=False, **FEW)
    return labels, metadata, folder / "root"


def contents(root):
    """{path: bytes} of all that a build leaves for people: not its working folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*"))
            if path.is_file() and ".build" not in path.parts}


# ------------------------------------------------------------------------------------------------ attacks

ALL = os.environ.get("ATTACKS") == "all"


@pytest.fixture(scope="module")
def tally(request):
    """Lines on how many attacks of each kind held, printed at the end."""
    lines, start = [], time.monotonic()
    yield lines
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, f"these attacks took {time.monotonic() - start:.0f} s", sep="\n")


def attack(tally, kind, judge, always=(), more=(), sample=0):
    """Judge the cases `always`, and a sample of `more` (all of it with ATTACKS=all); fail with those that did not hold.

    A case is (name, argument, ...); judge(argument, ...) returns None if it held, else what was wrong.
    """
    more = list(more)
    cases = [*always, *(more if ALL else random.Random(kind).sample(more, min(sample, len(more))))]
    start, broken = time.monotonic(), {}
    for name, *arguments in cases:
        try:
            wrong = judge(*arguments)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            broken[name] = " ".join(wrong.split())[:300]
    tally.append(f"{kind}: {len(cases) - len(broken)} of {len(cases)} attacks held "
                 f"(there are {len(always) + len(more)}), {time.monotonic() - start:.1f} s")
    assert not broken, f"{len(broken)} of {len(cases)} did not hold:\n" + "\n".join(f"{n}: {w}" for n, w in broken.items())


def judged(done, right, wrong="not as it should be"):
    """None if a command (its Outcome) kept the rule and left the right result."""
    return held(done) or (None if right else f"{wrong}: exit {done.code}: {done.err or done.out}")


class World:
    """A data set, small weights, and a finished run of them; and how to start another one."""

    def __init__(self, folder, data_root, llama_dir, vit_dir):
        self.folder, self.data = folder, data_root
        self.weights = ["--llama", str(llama_dir), "--vit", str(vit_dir), "--device", "cpu"]
        self.run, self.export = folder / "run", folder / "export"
        train.main(self.flags(self.run))

    def flags(self, out, data=None):
        return ["--data", str(data or self.data), "--dataset", "shoes", *self.weights, "--labels", "1", "--epochs", "2",
                "--batch-size", "8", "--out", str(out)]

    def one_product(self, photo):
        return [str(self.run), "--image", str(photo), "--text", "x", "--attribute", "Boot Style"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, data_root, llama_dir, vit_dir):
    """The World that a module attacks.  At the end nothing may have been written into its data set."""
    folder, before = tmp_path_factory.mktemp("world"), config.FEATURE_CACHE
    config.FEATURE_CACHE = folder / "features.sqlite"
    yield World(folder, data_root, llama_dir, vit_dir)
    config.FEATURE_CACHE = before
    assert {p.name for p in data_root.iterdir()} == {"images", "shoes"}
    assert len(list((data_root / "images").iterdir())) == len(PRODUCTS) * 11


def files_in(folder):
    """{relative path: digest} of all files below a folder."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in Path(folder).rglob("*") if p.is_file()}


def rows_of(path):
    """[{column: cell}] of a TSV."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, dialect="excel-tab"))
