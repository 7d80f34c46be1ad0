"""The paper's ablations, run over seeds and set beside the paper's own rows:  python -m experiments.paper_tables

    python -m experiments.paper_tables --labels 10 50 --seeds 0 1 2 --jobs 2        Tables 2, 3 and 5
    python -m experiments.paper_tables --curve --labels 10 50 100 all               Table 1 / figure 4: the label curve alone
    python -m experiments.paper_tables --dataset footwear --data ROOT --llama DIR --vit PATH --labels 50 100 --seeds 0

Every row is a run of train.py with one or two flags changed.  What this command does not know goes to train.py as it
is.  Runs that are done are not done again and broken ones are resumed, so it can be stopped at any time; whenever a run
ends, the tables so far are written to RUNS/tables.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from base import console
from base.checkpoint import check_fields, read_json
from base.console import Progress, UserError, write_text
from eiven import TEMPERATURE, TOP_P
from experiments.baselines import read_baselines

PROJECT = Path(__file__).resolve().parent.parent
BASE = ("--features", "single", "--lbc", "none")
ROWS = {                                                # name of a configuration: flags that make it
    "full": (),
    "no-mgvf": ("--features", "single"),
    "base": BASE,
    "base-no-image": (*BASE, "--no-image"),
    "base-no-text": (*BASE, "--no-text"),
    "judge-first": ("--lbc", "judge_first"),
    "better-instance": ("--lbc", "better_instance"),
    "no-lbc": ("--lbc", "none"),
    "no-lbc-twice": ("--lbc", "none", "--epochs", "30"),        # as many steps as with comparisons
    "base-mlp": (*BASE, "--adapter", "mlp"),
    "base-mlp-linear": (*BASE, "--adapter", "mlp-linear"),
    "no-image": ("--no-image",),
    "no-text": ("--no-text",),
}
# (title, [(what the row is called, configuration)])
TABLES = [
    ("Table 2: components and modalities", [
        ("EIVEN", "full"),
        ("- MGVF", "no-mgvf"),
        ("EIVEN-Base (no MGVF, no LBC)", "base"),
        ("Base - Image", "base-no-image"),
        ("Base - Text Context", "base-no-text"),
        ("EIVEN - Image", "no-image"),
        ("EIVEN - Text Context", "no-text"),
    ]),
    ("Table 3: Learning-by-Comparison", [
        ("LBC_Judge_Last", "full"),
        ("LBC_Judge_First", "judge-first"),
        ("LBC_Better_Instance", "better-instance"),
        ("w/o LBC (and, in the paper's figures, w/o MGVF)", "base"),
        ("w/o LBC, MGVF kept", "no-lbc"),
        ("the same for 30 epochs, as many steps as with LBC", "no-lbc-twice"),
    ]),
    ("Table 5: adapters in EIVEN-Base", [
        ("RepAdapter", "base"),
        ("MLP-Adapter", "base-mlp"),
        ("MLP-Adapter-L", "base-mlp-linear"),
    ]),
]
# The paper's own figures with 50 / 100 labels, by configuration, for clothing, footwear and general (Tables 2, 3 and 5)
PAPER = {
    "full": ("54.01 / 61.21", "67.33 / 74.44", "57.31 / 64.98"),
    "no-mgvf": ("49.92 / 57.75", "65.04 / 72.73", "53.50 / 62.27"),
    "base": ("49.76 / 55.50", "64.14 / 73.46", "47.85 / 59.30"),
    "base-no-image": ("43.97 / 50.45", "54.72 / 68.01", "37.20 / 49.40"),
    "base-no-text": ("16.49 / 19.91", "22.25 / 29.38", "11.96 / 18.28"),
    "judge-first": ("53.08 / 60.25", "66.78 / 74.64", "54.97 / 64.71"),
    "better-instance": ("52.34 / 60.22", "68.26 / 73.51", "53.02 / 63.51"),
    "base-mlp": ("53.43 / 59.61", "67.60 / 73.38", "not given"),
    "base-mlp-linear": ("45.86 / 54.89", "64.92 / 69.81", "not given"),
}
DATASETS = ("clothing", "footwear", "general")
CURVE = {                                               # Table 1 and, for 50, Table 2
    "10": ("34.92", "38.80", "32.27"), "50": ("54.01", "67.33", "57.31"),
    "100": ("61.21", "74.44", "64.98"), "all": ("74.61", "84.20", "76.31"),
}


def papers(figures, dataset):
    """Of the paper's figures for its three data sets the one for this."""
    return figures[DATASETS.index(dataset)] if figures and dataset in DATASETS else "not given"


def run_folder(runs, dataset, row, labels, seed):
    return runs / f"{dataset}-{labels}-{row}-seed{seed}"


def do_run(folder, flags, threads):
    """One run of train.py, new or resumed; its output goes to the run's own log."""
    command = [sys.executable, str(PROJECT / "train.py"), *flags, "--out", str(folder)]
    if (folder / "config.json").exists():
        command = [sys.executable, str(PROJECT / "train.py"), "--resume", str(folder)]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode
    if code:
        said = (folder / "output.txt").read_text(encoding="utf-8").strip().splitlines()
        raise UserError(f"a run ended with exit code {code}: {' '.join(command)}\n  it said: {said[-1] if said else 'nothing'}")


def same_flags(runs, flags):
    """UserError if the folder holds runs that were started with other flags: their scores would stand in one table."""
    path = runs / "flags.json"
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8"))) != flags:
        raise UserError(f"{runs}: its runs were started with {' '.join(before)}, but now it is {' '.join(flags)}; "
                        "name another folder with --runs")
    write_text(path, json.dumps(flags) + "\n")


METRICS = {"micro_f1": (float, (0, 100)), "n": (int, (1, 10 ** 12)), "sources": (str, None, ""), "merged": (bool, (False, True)),
           "constrained": (bool, (False, True)), "temperature": (float, (0, 1000)), "top_p": (float, (0, 1)),
           "min_confidence": (float, (0, 1), 0.0)}


def read_metrics(path):
    """{field of METRICS: value} of a run's metrics.json."""
    return check_fields(read_json(path, "a run's scores"), METRICS, path)


def scores(runs, dataset, row, labels, seeds, split="test"):
    """(micro-F1 of the runs that are done, products scored)."""
    found, n = [], 0
    for seed in seeds:
        path = run_folder(runs, dataset, row, labels, seed) / ("val" if split == "val" else "") / "metrics.json"
        if path.exists():
            metrics = read_metrics(path)
            sampling = (metrics["temperature"], metrics["top_p"]) == (TEMPERATURE, TOP_P)
            if metrics["merged"] or metrics["constrained"] or metrics["min_confidence"] or not sampling:
                raise UserError(f"{path}: was scored again with other settings; score it as it was: python evaluate.py "
                                f"{path.parent}")
            found.append(metrics["micro_f1"])
            n = metrics["n"]
    return found, n


def cell(found):
    """Mean and spread as text."""
    if not found:
        return "-"
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.1f}{spread} ({len(found)})"


def markdown(runs, dataset, labels, seeds, split="test"):
    """The tables as far as the runs are done."""
    n = max((scores(runs, dataset, row, count, seeds, split)[1] for row in ROWS for count in labels), default=0)
    sources = {read_metrics(p)["sources"] for p in sorted(runs.glob(f"{dataset}-*/metrics.json"))}
    seen = {s for s in sources if "; no photos." not in s}          # rows without photos name no ViT
    source = max(seen or sources, default="")
    if len(seen) > 1 or any(s.split("; no photos.")[0] not in source for s in sources - seen):
        raise UserError(f"{runs}: holds runs on different data or weights: {'; '.join(sorted(sources))}")
    lines = [f"micro-F1 in per cent on the {split} split (n = {n}) of `{dataset}`: mean ± standard deviation over seeds "
             f"(how many). {source}", ""]
    texts_alone = bool(sources) and not seen            # the paper's rows have photos
    paper = f"paper: {dataset.capitalize()}"
    for title, rows in TABLES:
        if not any(scores(runs, dataset, row, count, seeds, split)[0] for _, row in rows[1:] for count in labels):
            continue
        lines += [f"**{title}**", "", "| | " + " | ".join(f"{count} labels" for count in labels) + f" | {paper}, 50 / 100 labels |",
                  "|---|" + "---|" * (len(labels) + 1)]
        for name, row in rows:
            cells = [cell(scores(runs, dataset, row, count, seeds, split)[0]) for count in labels]
            lines.append(f"| {name} | {' | '.join(cells)} | {'not given' if texts_alone else papers(PAPER.get(row), dataset)} |")
        lines.append("")
    curve = [count for count in labels if scores(runs, dataset, "full", count, seeds, split)[0]]
    if curve:
        baselines = read_baselines(runs, dataset)
        ceiling = "-" if baselines["extractive"] is None else f"{baselines['extractive']:.2f}"
        lines += ["**Table 1 and figure 4: labels per value**", "",
                  f"| labels | extractive: ceiling | discriminative: classifier | EIVEN | {paper}: EIVEN |", "|---|---|---|---|---|"]
        lines += [f"| {count} | {ceiling} | {cell(baselines['discriminative'].get(count))} | "
                  f"{cell(scores(runs, dataset, 'full', count, seeds, split)[0])} | "
                  f"{'not given' if texts_alone else papers(CURVE.get(count), dataset)} |" for count in curve]
        lines.append("")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     epilog="Other flags go to train.py as they are.")
    parser.add_argument("--dataset", default="general")
    parser.add_argument("--labels", nargs="+", default=["10", "50"], metavar="N|all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW",
                        help=f"which configurations (default: all): {', '.join(ROWS)}")
    parser.add_argument("--curve", action="store_true", help="the full method alone")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--split", default="test", choices=("val", "test"), help="whose scores to print (default: test)")
    parser.add_argument("--runs", type=Path, default=PROJECT / "runs" / "tables", help="folder of the runs")
    args, passed_on = parser.parse_known_args()
    for count in args.labels:
        if count != "all" and not (count.isdigit() and int(count)):
            parser.error(f"--labels {count}: a positive number or 'all'")
    own = {"--out", "--seed", "--resume", *(flag for flags in ROWS.values() for flag in flags if flag.startswith("--"))}
    own -= {"--no-image", "--no-text"}                  # texts or photos alone, in every row
    for flag in (word.split("=")[0] for word in passed_on):
        if flag in own:
            parser.error(f"{flag}: is set by this command, run by run")
    same_flags(args.runs, [args.dataset, *passed_on])
    threads = max(1, (os.cpu_count() or 1) // max(1, args.jobs))
    plan = []                                           # seeds outermost: soon there is a whole table of one seed
    for seed in args.seeds:
        for count in args.labels:
            for row in ["full"] if args.curve else args.rows:
                plan.append((row, count, seed))
    table = args.runs / ("tables.md" if args.split == "test" else f"tables-{args.split}.md")

    def tables():
        return markdown(args.runs, args.dataset, args.labels, args.seeds, args.split)

    def one(task):
        row, count, seed = task
        folder = run_folder(args.runs, args.dataset, row, count, seed)
        if not (folder / "metrics.json").exists():
            do_run(folder, ["--dataset", args.dataset, "--labels", count, "--seed", str(seed), *ROWS[row], *passed_on], threads)

    with Progress("runs", len(plan), "runs") as progress, ThreadPoolExecutor(max(1, args.jobs)) as workers:
        for task, _ in zip(plan, workers.map(one, plan)):
            progress.step(note="{}, {} labels, seed {}".format(*task))
            write_text(table, tables())
    print(tables())
    print(f"written to {table}")


if __name__ == "__main__":
    console.run(main)
