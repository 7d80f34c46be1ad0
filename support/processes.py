"""Several processes that work on one run: on one GPU each, on one machine or on several.

    torchrun --nproc-per-node 2 train.py --dataset general --labels 50

torchrun is PyTorch's own launcher.  Each process has the whole model, and takes its part of every batch.  Process 0 alone
prints, and writes the run folder.  Without torchrun there is one process, and each function here returns at once.
docs/scale.md shows the commands.
"""

import os
import signal
import time
import traceback
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch import distributed

from base import console
from base.console import UserError

LOST = ("gloo", "NCCL", "Connection", "store")          # an error with one of these words: another process has gone
objects = None                                          # the group for all that is no gradient; it may wait for long


def size():
    """The number of processes."""
    return distributed.get_world_size() if objects else 1


def rank():
    """The number of this process, from 0."""
    return distributed.get_rank() if objects else 0


def broadcast(value=None):
    """The value that process 0 gives, in every process: any object that pickle takes."""
    if size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0, group=objects)
    return box[0]


def gather(value):
    """In process 0 the list of every process's value, in order of rank; [] in the others."""
    if size() == 1:
        return [value]
    values = [None] * size() if rank() == 0 else None
    distributed.gather_object(value, values, dst=0, group=objects)
    return values or []


@contextmanager
def one_first():
    """The first process of each machine goes through the block, then the others: they find in the caches what it made."""
    local = int(os.environ["LOCAL_RANK"]) if size() > 1 else 0
    if local > 0:
        distributed.barrier(group=objects)
    yield
    if size() > 1 and local == 0:
        distributed.barrier(group=objects)


@contextmanager
def in_process_0(context):
    """Process 0 alone enters a context manager, such as a lock; every process gets what it yields."""
    if rank() == 0:
        with context as value:
            yield broadcast(value)
    else:
        yield broadcast()


# ------------------------------------------------------------------------------------------------ one training step


def micro_batches(examples, at_once=None):
    """This process's part of a batch: yields (examples, weight), the weight being their share in the average over the batch.

    at_once  examples held in memory at once; None: all of this process's
    Every process yields equally often.  One that has nothing left yields the batch's first example with weight 0.
    """
    mine, most = examples[rank()::size()], -(-len(examples) // size())
    for start in range(0, most, at_once or most):
        part = mine[start:start + (at_once or most)]
        yield (part, len(part) / len(examples)) if part else (examples[:1], 0.0)


def sum_over_processes(parameters, *numbers):
    """Add up the gradients of all processes, in place, and these numbers, whose sums are returned."""
    if size() == 1:
        return numbers
    flat = torch.cat([*(p.grad.flatten() for p in parameters), torch.tensor(numbers, device=parameters[0].device)])
    distributed.all_reduce(flat)
    parts = flat.split([*(p.numel() for p in parameters), len(numbers)])
    for p, part in zip(parameters, parts):
        p.grad.copy_(part.view_as(p))
    return parts[-1].tolist()


# ------------------------------------------------------------------------------------------------ start and end


def run(main):
    """console.run(main) in each process that torchrun started, or in the only one without torchrun.

    If one process fails, all of them end.  Only the first one prints its error: the others fail in the same way, or because
    they wait for it.
    """
    if not distributed.is_available() or not distributed.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return console.run(main)
    store, stderr = join(), os.dup(2)
    speaks, code = rank() == 0, 1
    if not speaks:
        silence()

    def first_error():
        nonlocal speaks
        try:
            main()
        except BaseException as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)       # the error is printed first
            if rank() == 0 or isinstance(error, Exception):     # Ctrl-C and --help are the same everywhere: process 0's
                with suppress(RuntimeError):                    # the store has gone
                    speaks = store.add("failed", 1) == 1
            os.dup2(stderr, 2) if speaks else silence()
            if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
                another_ended()
            raise

    try:
        console.run(first_error)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:                               # noqa: BLE001   the process ends below, in its own way
        traceback.print_exc()
    if not code:
        return distributed.destroy_process_group()
    with suppress(RuntimeError):
        if speaks:
            store.set("said", "")
        else:
            store.wait(["said"], timedelta(seconds=10))
    if not speaks:                                      # torchrun ends this process, and reports only the one that failed
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1)
    os._exit(code)                                      # at once: PyTorch would wait for the others


def join():
    """Join the processes that torchrun started; their store of keys and values, which outlives each of them."""
    global objects
    if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))            # what "cuda" means from here on
    store, number, processes = next(distributed.rendezvous("env://"))
    distributed.init_process_group(store=store, rank=number, world_size=processes)
    objects = distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    signal.signal(signal.SIGTERM, another_ended)        # torchrun's way to end the other processes
    distributed.barrier(group=objects)                  # nobody may fail before all are connected
    return store


def another_ended(*_):
    raise UserError("another process of this run has ended, or the job was stopped; a training continues with --resume RUN") from None


def silence():
    """Nothing that this process prints is seen from here on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
