"""Several processes that work on one run: each on a GPU of its own, on one machine or on several.

    torchrun --nproc-per-node 2 train.py --dataset general --labels 50

torchrun is PyTorch's own launcher.  Each process has the whole model, and takes its part of every batch.
Process 0 alone prints, and writes the run folder.  Without torchrun there is one process, and each function
here returns at once.  docs/hardware.md shows the commands.

All that is exchanged goes over TCP (gloo), the gradients too: for LLaMA-7B they are 10 MB a step.  So if a
process ends, its connections close and the others notice at once, whatever device they compute on.
"""

import os
import signal
import socket
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from base import console
from base.console import UserError, reason

WAIT = timedelta(days=7)                                # for others: process 0 may compute features for hours


def size():
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank():
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


# ---------------------------------------------------------------------------------------- values


@contextmanager
def exchange():
    """Around everything that waits for other processes: if one of them has ended, say so."""
    try:
        yield
    except RuntimeError as error:                       # its connection has closed
        raise UserError("another process of this run has ended. If it printed an error, that is the cause. "
                        "A training continues with --resume RUN") from error


def gather(value=None):
    """The values of all processes, a list in order of rank: any objects that pickle takes.

    It returns once all processes have called it.
    """
    values = [value] * size()
    if len(values) > 1:
        with exchange():
            distributed.all_gather_object(values, value)
    return values


def broadcast(value=None):
    """The value that process 0 gives, in every process."""
    return gather(value)[0]


@contextmanager
def one_first():
    """The first process of each machine goes through the block, then the others: they find in the caches
    what it made.
    """
    first = size() == 1 or os.environ["LOCAL_RANK"] == "0"
    if first:
        yield
    gather()                                            # all come here
    if not first:
        yield


@contextmanager
def in_process_0(context):
    """Process 0 alone enters a context manager, such as a lock; every process gets what it yields."""
    if rank() > 0:
        yield broadcast()
        return
    with context as value:
        yield broadcast(value)


def check_same(what, values):
    """UserError if a process has another value than process 0: together they would train a mixture.

    what    for the message, e.g. "flags"
    values  {name: value}; the first that differs is named
    """
    gathered = gather(values)
    differences = [
        f"{what}: {name} is {ours!r:.200} in process 0 and {theirs.get(name)!r:.200} in process {other}"
        for other, theirs in enumerate(gathered)
        for name, ours in gathered[0].items()
        if theirs.get(name) != ours
    ]
    if differences and rank() > 0:                      # process 0 says it
        raise SystemExit(2)
    if differences:
        raise UserError(f"{differences[0]}; start all processes with the same flags, data and code")


# ---------------------------------------------------------------------------------------- one training step


def micro_batches(examples, at_once=None):
    """This process's part of a batch: yields (examples, their share in the average over the batch).

    at_once  examples held in memory at once; None: all of this process's
    A process that has no part yields one example with share 0: its gradients are 0, but they are there.
    """
    mine = examples[rank()::size()]
    if not mine:
        yield examples[:1], 0.0
        return
    at_once = at_once or len(mine)
    for start in range(0, len(mine), at_once):
        part = mine[start:start + at_once]
        yield part, len(part) / len(examples)


def sum_over_processes(parameters, *numbers):
    """Add up the gradients of all processes, in place, and these numbers, whose sums are returned."""
    if size() == 1:
        return numbers
    gradients = [p.grad for p in parameters]
    vector = parameters_to_vector(gradients)            # one exchange for all
    total = torch.cat([vector.cpu(), torch.tensor(numbers)])
    with exchange():
        distributed.all_reduce(total)
    vector_to_parameters(total.to(vector.device), gradients)
    return total[len(vector):].tolist()


# ---------------------------------------------------------------------------------------- start and end


def run(main):
    """console.run(main) in each process that torchrun started, or in the only one without torchrun.

    Each process prints its own error, with its rank; all else is printed by process 0 alone.  A process that
    fails just ends, and torchrun then ends the others.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        console.run(main)
        return

    def joined():
        signal.signal(signal.SIGINT, interrupted)
        join()
        if rank() == 0:
            main()
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            main()

    console.run(joined, f"{Path(sys.argv[0]).name} [rank {os.environ.get('RANK', '?')}]")


def join():
    """Join the processes that torchrun started."""
    try:
        device = int(os.environ["LOCAL_RANK"])
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun listens here.  If nobody does, the variables are old, and PyTorch would try for WAIT.
            address = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
            socket.create_connection(address, timeout=60).close()
        distributed.init_process_group("gloo", timeout=WAIT)
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"torchrun's processes cannot be connected ({reason(error)}). If GLOO_SOCKET_IFNAME "
                        "is set, it must name a network interface of this machine. To start without "
                        "torchrun, unset TORCHELASTIC_RUN_ID") from error
    if device < torch.cuda.device_count():
        torch.cuda.set_device(device)                   # what "cuda" means from here on


def interrupted(*_):
    """Ctrl-C: the terminal sends it to all processes, and torchrun sends it once more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
