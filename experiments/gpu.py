"""All that a GPU has to show, within eight minutes:

    python -m experiments.gpu                           results go to runs/gpu/, a file for each part
    python -m experiments.gpu --device cpu --quick      a trial of this script (speed-bf16 needs a GPU)

Each part is a command with a limit of its time; what it has printed by then is kept.  Nothing is needed but
the repository: weights are the demo's or random.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from base import console
from base.console import PROJECT

# Name, seconds at most, command.
PARTS = """
values 50 -m pytest -q -p no:cacheprovider -k {device} tests/test_device.py
speed-fp32 80 -m experiments.speed --device {device} --models {models}
speed-bf16 70 -m experiments.speed --device {device} --models {models} --dtype bf16
7b-bf16 60 -m experiments.full_size --device {device} {size}
7b-int8 60 -m experiments.full_size --device {device} {size} --dtype int8
7b-bf16-expandable-segments 50 -m experiments.full_size --device {device} {size}
demo-bf16 90 train.py --demo --labels 10 --device {device} --dtype bf16 --out {out}/run-bf16 {epochs}
demo-fp32 20 train.py --demo --labels 10 --device {device} --dtype fp32 --out {out}/run-fp32 {epochs}
"""
FULL = {"models": "demo smollm2 wide", "size": "", "epochs": ""}
QUICK = {"models": "demo", "size": "--llama demo/llama --rounds 1", "epochs": "--epochs 1"}


def main():
    parser = argparse.ArgumentParser(description="Values, speed and memory on a GPU, within eight minutes.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="the smallest size of everything")
    parser.add_argument("--out", type=Path, default="runs/gpu", help="a new folder (default: %(default)s)")
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True)
    parts = PARTS.format(device=args.device, out=out, **(QUICK if args.quick else FULL))
    for part in parts.strip().splitlines():
        name, limit, *command = part.split()
        env = os.environ | {"TEST_ON_GPU": "1", "PYTHONUNBUFFERED": "1"}        # the first: tests/conftest.py
        if name.endswith("segments"):                   # PyTorch's memory then grows in place
            env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        print(f"\n=== {part}", flush=True)
        with open(out / f"{name}.txt", "w+", encoding="utf-8") as file:
            try:
                end = subprocess.run([sys.executable, *command], stdout=file, stderr=file, env=env,
                                     cwd=PROJECT, timeout=int(limit), check=False).returncode
            except subprocess.TimeoutExpired:
                end = "stopped at its limit"
            file.seek(0)
            print(f"{file.read()}=== exit code {end}", flush=True)


if __name__ == "__main__":
    console.run(main)
