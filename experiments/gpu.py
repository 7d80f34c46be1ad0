"""All that a GPU has to show, within eight minutes:

    python -m experiments.gpu                           results go to runs/gpu/, a file for each part
    python -m experiments.gpu --device cpu --quick      a trial of this script, without a GPU

Each part is a command with a limit of its time; what it has printed by then is kept.  Nothing is needed but
the repository: weights are the demo's or random.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from base import console
from base.console import PROJECT


def make_parts(device, quick, out):
    """{name: (seconds at most, command)}, in order."""
    speed = f"-m experiments.speed --device {device} --models demo {'' if quick else 'smollm2 wide'}"
    full = f"-m experiments.full_size --device {device} {'--llama demo/llama --rounds 1' if quick else ''}"
    train = f"train.py --demo --labels 10 --device {device} {'--epochs 1' if quick else ''}"
    parts = {"values": (50, f"-m pytest -q -p no:cacheprovider -k {device} tests/test_device.py"),
             "speed-fp32": (110, speed),
             "speed-bf16": (90, f"{speed} --dtype bf16"),
             "7b-bf16": (60, full),
             "7b-int8": (60, f"{full} --int8"),
             "7b-bf16-expandable-segments": (50, full),
             "demo-bf16": (40, f"{train} --dtype bf16 --out {out}/run-bf16"),
             "demo-fp32": (20, f"{train} --dtype fp32 --out {out}/run-fp32")}
    if device == "cpu":                                 # there, activations are always fp32
        del parts["speed-bf16"]
    return parts


def main():
    parser = argparse.ArgumentParser(description="Values, speed and memory on a GPU, within eight minutes.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="the smallest size of everything")
    parser.add_argument("--out", type=Path, default="runs/gpu", help="a new folder (default: %(default)s)")
    args = parser.parse_args()
    parts = make_parts(args.device, args.quick, args.out.absolute())
    if args.out.exists():
        parser.error(f"--out {args.out}: is there already; name a new folder")
    args.out.mkdir(parents=True)
    for name, (limit, command) in parts.items():
        env = os.environ | {"TEST_ON_GPU": "1", "PYTHONUNBUFFERED": "1"}        # the first: tests/conftest.py
        if name.endswith("segments"):                   # PyTorch's memory then grows in place
            env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        print(f"\n=== {name}: python {command}", flush=True)
        start, path = time.monotonic(), args.out / f"{name}.txt"
        with open(path, "w", encoding="utf-8") as file:
            try:
                end = subprocess.run([sys.executable, *command.split()], stdout=file, stderr=file, env=env,
                                     cwd=PROJECT, timeout=limit, check=False).returncode
            except subprocess.TimeoutExpired:
                end = "stopped at its limit"
        print(f"{path.read_text(encoding='utf-8')}=== {time.monotonic() - start:.0f} s, exit code {end}",
              flush=True)


if __name__ == "__main__":
    console.run(main)
