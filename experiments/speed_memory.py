"""The sections load and memory of experiments.speed.  Each figure comes from a Python of its own: a peak of memory never comes
down again."""

import hashlib
import json
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from base.console import UserError
from data import Epoch, encode_examples, fingerprint, read_split, sample_labels, values_of
from demo import world
from eiven import EIVEN
from experiments.measuring import now, peak, read_bytes  # noqa: F401   child() calls the last
from llama import load_llama
from support.config import PROJECT
from support.features import PhotoFeatures

BATCH = 32                                              # examples of a step


def child(code, *arguments):
    """What a Python of its own prints last, from JSON: for peaks of memory, which never come down again."""
    code_of_child = f"import json, sys\nfrom experiments.speed_memory import {code}\nprint(json.dumps({code}(*sys.argv[1:])))"
    done = subprocess.run([sys.executable, "-c", code_of_child, *map(str, arguments)], cwd=PROJECT, capture_output=True,
                          text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it was stopped, perhaps for want of memory"]
        raise UserError(f"{code} ended with {done.returncode}: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def load_and_touch(folder, device):
    """(seconds, peak of the CPU's memory, bytes of weights)"""
    start = now()
    llama, _ = load_llama(folder, device=device)
    for p in llama.parameters():
        p.view(torch.int8).view(-1)[::4096].sum()
    return now() - start, peak(), sum(p.nbytes for p in llama.parameters())


def bench_load(report, args):
    if not args.weights_7b:
        return print("load      needs --weights-7b (of a small model, Python's own start is most)")
    folder = Path(args.weights_7b).resolve()
    child("read_bytes", folder)
    pairs = [(child("load_and_touch", folder, args.device), child("read_bytes", folder)) for _ in range(args.rounds)]
    report.ratio("load", "7B: load and touch every page / read the same bytes", [loaded[0] for loaded, _ in pairs],
                 [read for _, read in pairs], at_most=1.5)
    report.add("load", "7B: peak memory / weights", [top / size for (_, top, size), _ in pairs], "x", at_most=1.1,
               note="Python and PyTorch included")


def write_products(folder, n):
    """A data set of n products, each with a photo of a few bytes, whose features are in the cache already."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True)
    (folder / "x").mkdir()
    photo_features = PhotoFeatures(folder / "features.sqlite", world.VIT, folder / "images")
    templates = list(read_split(world.write_dataset(), "general", "train"))
    tokens = torch.randn(4, photo_features.width).numpy().tobytes()

    def entries():
        with open(folder / "x" / "train.tsv", "w", encoding="utf-8") as file:
            file.write("id\timages\tcategory\ttexts\tattribute_names\tattribute_values\n")
            for i in range(n):
                p, photo = templates[i % len(templates)], f"photo {i}".encode()
                (folder / "images" / f"{i}.jpg").write_bytes(photo)
                file.write(f"P{i}\t{i}.jpg\t{p.category}\t{p.title} {i}\t{p.attribute}\t{p.value}\n")
                yield hashlib.sha256(photo_features.vit_key + hashlib.sha256(photo).digest()).digest(), 4, tokens

    with sqlite3.connect(folder / "features.sqlite") as database:
        database.executemany("insert into cls values (?, ?, ?)", entries())


def train_a_little(folder):
    """Peak memory of a training's start and 20 steps on such a data set."""
    folder = Path(folder)
    products = sample_labels(read_split(folder, "x", "train"), None, 0)
    fingerprint(products), values_of(products)
    photo_features = PhotoFeatures(folder / "features.sqlite", world.VIT, folder / "images")
    photo_features.prepare(p.image for p in products)
    llama, tokenizer = load_llama(world.LLAMA, torch.float32)
    model = EIVEN(llama, tokenizer, photo_features.width)
    epoch = Epoch(products, 0, 0)
    for step in range(20):
        batch, photos = encode_examples([epoch[(step * BATCH + k) % len(epoch)] for k in range(BATCH)], tokenizer)
        model(batch, photo_features.read(photos, "cpu")).backward()
    return peak()


def bench_memory(report, sizes=(1000, 1_000_000)):
    peaks = []
    (PROJECT / "cache").mkdir(exist_ok=True)
    for n in sizes:
        with tempfile.TemporaryDirectory(dir=PROJECT / "cache") as folder:
            write_products(folder, n)
            peaks.append(child("train_a_little", folder))
    more = (peaks[1] - peaks[0]) / 1e6
    report.add("memory", f"training on {sizes[1]:,} products against {sizes[0]:,}: more memory", [more], "MB", at_most=200,
               note=f"peaks {peaks[0] / 1e6:,.0f} and {peaks[1] / 1e6:,.0f} MB; one run each")
