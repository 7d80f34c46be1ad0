"""The paper's ablations, run over seeds and set beside the paper's own rows:

    python -m experiments.paper_tables --labels 10 50 --seeds 0 1 2 --jobs 2        Tables 2, 3 and 5
    python -m experiments.paper_tables --rows full --labels 10 50 100 all           Table 1: the label curve
    python -m experiments.paper_tables --dataset footwear --data ROOT --llama DIR --no-image --labels 50

Every row is a run of train.py with one or two flags changed; paper.tsv holds these flags and the paper's
figures.  Flags that this command does not know go to train.py.  Runs that are done are not done again and
broken ones are resumed, so it can be stopped at any time; whenever a run ends, the tables so far are written
to RUNS/tables.md.  At the end the kinds of comparisons among the rows are set side by side (comparing.py).
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from base import console
from base.console import PROJECT, Progress, UserError, read_json, write_text
from base.tsv import read_tsv
from experiments.comparing import ARMS, COLUMNS, compare
from support.config import number


def new_parser(description):
    """A parser with the flags that several commands share; the first sentence of a docstring describes it.

    Of its labels, None stands for all.
    """
    parser = argparse.ArgumentParser(description=description.split(":")[0], allow_abbrev=False)
    parser.add_argument("--labels", nargs="+", default=[10, 50], metavar="N|all", help="for each value",
                        type=number(int, 1, 10 ** 9, word="all"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--runs", type=Path, default=PROJECT / "runs" / "tables", help="folder of the runs")
    return parser


def paper_rows():
    """The rows of paper.tsv: table, row, configuration, its flags, and the paper's figures."""
    path = Path(__file__).with_name("paper.tsv")
    return [row for _, row in read_tsv(path, "the paper's figures", ("table", "configuration"))]


def run_folder(runs, dataset, row, labels, seed):
    return runs / f"{dataset}-{labels or 'all'}-{row}-seed{seed}"


def do_run(folder, flags):
    """Train and score a run, new or resumed, unless it is done; its output goes to FOLDER.txt."""
    if (folder / "metrics.json").exists():
        return
    if (folder / "config.json").exists():
        flags = ["--resume", str(folder)]
    else:
        flags = [*flags, "--out", str(folder)]
    command = [sys.executable, str(PROJECT / "train.py"), *flags]
    with open(f"{folder}.txt", "a", encoding="utf-8") as log:
        if subprocess.run(command, stdout=log, stderr=log, check=False).returncode:
            raise UserError(f"this run failed: {' '.join(command)}; its output is in {folder}.txt")


def same_flags(runs, *flags):
    """UserError if the folder's runs were started with other flags: their scores would stand in one table."""
    path = runs / "flags.txt"
    before = path.read_text(encoding="utf-8") if path.exists() else " ".join(flags)
    if before != " ".join(flags):
        raise UserError(f"{runs}: its runs were started with {before}, but now it is {' '.join(flags)}; name "
                        "another folder with --runs")
    write_text(path, before)


def scores(runs, dataset, row, labels, seeds):
    """micro-F1 of each run that is done."""
    paths = [run_folder(runs, dataset, row, labels, seed) / "metrics.json" for seed in seeds]
    return [read_json(path, "a run's scores")["micro_f1"] for path in paths if path.exists()]


def cell(values):
    """Mean and spread as text."""
    if not len(values):
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} ({len(values)})"


def markdown(header, rows):
    """A table as lines."""
    return [f"| {' | '.join(map(str, cells))} |" for cells in (header, ["---"] * len(header), *rows)]


def tables(runs, dataset, labels, seeds):
    """The tables as far as the runs are done, in Markdown."""
    lines = [f"micro-F1 in per cent, test split of `{dataset}`: mean ± standard deviation (how many seeds)."]
    done = [read_json(path, "a run's scores") for path in runs.glob(f"{dataset}-*/metrics.json")]
    lines += sorted({f"{metrics['sources']} n = {metrics['n']}" for metrics in done})
    for table, rows in itertools.groupby(paper_rows(), lambda row: row["table"]):
        cells = []
        for row in rows:
            ours = [cell(scores(runs, dataset, row["configuration"], count, seeds)) for count in labels]
            cells.append([row["row"], *ours, row.get(dataset, "not given")])
        header = ["", *(f"{count or 'all'} labels" for count in labels), f"paper, {row['labels']} labels"]
        lines += ["", f"**{table}**", "", *markdown(header, cells)]
    return "\n".join(lines) + "\n"


def main():
    flags_of = {row["configuration"]: row["flags"].split() for row in paper_rows()
                if row["flags"] != "experiments.baselines"}
    parser = new_parser(__doc__)
    parser.epilog = "Other flags go to train.py as they are."
    parser.add_argument("--dataset", default="general")
    parser.add_argument("--rows", nargs="+", default=list(flags_of), choices=flags_of, metavar="ROW",
                        help=f"which configurations (default: all): {', '.join(flags_of)}")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    args, passed_on = parser.parse_known_args()
    same_flags(args.runs, args.dataset, *passed_on)
    passed_on += ["--dataset", args.dataset, "--threads", str(max(1, os.cpu_count() // args.jobs))]
    # Seeds outermost: soon there is a whole table of one seed.
    plan = list(itertools.product(args.seeds, args.labels, args.rows))
    path = args.runs / "tables.md"

    def one(task):
        seed, count, row = task
        do_run(run_folder(args.runs, args.dataset, row, count, seed),
               [*passed_on, "--labels", str(count or "all"), "--seed", str(seed), *flags_of[row]])

    with Progress("runs", len(plan), "runs") as progress, ThreadPoolExecutor(args.jobs) as workers:
        for _ in workers.map(one, plan):
            progress.step()
            write_text(path, tables(args.runs, args.dataset, args.labels, args.seeds))
    print(f"{path.read_text(encoding='utf-8')}\nwritten to {path}")
    arms = [arm for arm in ARMS if arm in args.rows]
    for count in args.labels if len(arms) > 1 and len(args.seeds) > 1 else ():
        rows = compare({arm: [run_folder(args.runs, args.dataset, arm, count, seed) for seed in args.seeds]
                        for arm in arms})
        print(f"\n**{count or 'all'} labels**: differences in points (95 % interval), paired by seed\n",
              *markdown(COLUMNS, rows), sep="\n")


if __name__ == "__main__":
    console.run(main)
