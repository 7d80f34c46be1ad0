"""How many CPU threads PyTorch computes with: as given, or measured at the start.

Threads that wait for each other spin.  Beside another busy process one of them is often not running, the others spin for
its whole pause, and a step takes five times as long.  One thread alone waits for nobody.  No setting is right for both an
idle and a busy machine (docs/speed.md), so a run tries its own matmuls before it starts, and watches its steps.
"""

import os
import statistics
import sys
import time
from collections import deque

import torch

EACH = 0.15                                             # seconds to try one number of threads
FLOPS = 1e9                                             # of a call while trying: some hundredths of a second
TIMES_SLOWER = 2.5                                      # than the best so far: then the machine is called busy
STEPS = 10                                              # whose median is looked at


def choose_threads(config, model, stream=None):
    """Set PyTorch's number of threads, write it to config.threads, and say so on `stream` if it was measured.

    It is --threads (or the number that a resumed run started with), else OMP_NUM_THREADS, else the fastest of a few.
    The last bits of sums depend on it.  On a GPU it hardly matters, and is left as it is.
    """
    most = torch.get_num_threads()
    if config.threads:
        torch.set_num_threads(config.threads)
    elif "OMP_NUM_THREADS" not in os.environ and model.device.type == "cpu" and most > 1 and not config.shard:
        rates = rates_of(most, feed_forward(model.llama))
        best = max(rates, key=rates.get)
        torch.set_num_threads(best)
        slower = "" if best == most else f" ({most} are {rates[best] / rates[most]:.1f} x slower now)"
        print(f"CPU threads: {best} of {most}, measured{slower}; --threads N sets another number", file=stream, flush=True)
    config.threads = torch.get_num_threads()


def feed_forward(llama):
    """A function that calls the feed-forward of LLaMA's first layer on 16 to 2,048 tokens, as many as take FLOPS."""
    config, mlp = llama.config, llama.layers[0].mlp
    tokens = int(FLOPS / (6 * config.hidden_size * config.intermediate_size))
    x = torch.ones(max(16, min(tokens, 2048)), config.hidden_size, dtype=llama.compute_dtype)
    return torch.no_grad()(lambda: mlp(x))


def rates_of(most, call):
    """{number of threads: calls per second}: for `most` threads, half of them, and so on down to one."""
    rates, threads = {}, most
    while threads:
        torch.set_num_threads(threads)
        call()                                          # threads start, and weights are read
        calls, start = 0, time.perf_counter()
        while (took := time.perf_counter() - start) < EACH:
            call()
            calls += 1
        rates[threads], threads = calls / took, threads // 2
    return rates


class StepTimes:
    """Watches the time of training steps, and says once if the machine has become busy.  threads: that compute a step."""

    def __init__(self, threads):
        self.threads, self.last, self.best = threads, time.monotonic(), float("inf")
        self.recent = deque(maxlen=STEPS)               # seconds per token

    def step(self, tokens):
        """A step with so many tokens is done."""
        now = time.monotonic()
        self.recent.append((now - self.last) / tokens)
        self.last = now
        if len(self.recent) < STEPS or self.threads == 1:
            return
        median = statistics.median(self.recent)
        self.best = min(self.best, median)
        if median > TIMES_SLOWER * self.best:
            print(f"\nnote: steps take {median / self.best:.1f} x as long as before: other work keeps this machine busy, and "
                  f"{self.threads} threads wait for each other. Ctrl-C and --resume RUN --threads 1 may be faster; the last bits "
                  "of sums change with it", file=sys.stderr, flush=True)
            self.threads = 1                            # said once
