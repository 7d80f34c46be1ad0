"""Several processes that work on one run: each on a GPU of its own, on one machine or on several.

    torchrun --nproc-per-node 2 train.py --dataset general --labels 50

torchrun is PyTorch's own launcher.  Each process has the whole model, and takes its part of every batch.  Process 0 alone
prints, and writes the run folder.  Without torchrun there is one process, and each function here returns at once.
docs/scale.md shows the commands.
"""

import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from safetensors import safe_open
from torch import distributed

from base import console
from base.checkpoint import map_safetensors, shard_files
from base.console import UserError, first_line
from base.frozen_ops import quantize
from base.packing import pack
from llama import load_llama, official_name

ENDED = "another process of this run has ended, or the job was stopped; a training continues with --resume RUN"
objects = None                                          # the group for all that is no gradient; it may wait for long


def size():
    """The number of processes."""
    return distributed.get_world_size() if objects else 1


def size_here():
    """The number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if objects else 1


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
    """In process 0 the values of all processes, a list in order of rank; in the others []."""
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


# ------------------------------------------------------------------------------------------------ --shard


def load_shard(folder, dtype, device, int8=False):
    """What load_llama returns; but of each weight of a layer, a process reads and keeps only its part of the rows.

    PyTorch gathers the rows of a layer when it is computed, and drops them afterwards.  All processes must therefore call
    LLaMA equally often: see `keep_up`.  Embeddings, the last norm and lm_head are whole in every process.
    Errors  those of load_llama; UserError if there is only one process
    """
    if size() == 1:
        raise UserError("--shard spreads LLaMA's layers over several processes, but there is one: start it with torchrun "
                        "(docs/scale.md), or leave --shard out")
    from torch.distributed.device_mesh import init_device_mesh  # 0.6 s, that no other run needs
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    llama, tokenizer = load_llama(folder, dtype, "meta", int8)          # every file is checked, and no weight read
    mesh = init_device_mesh(device.type, (size(),))
    for block in llama.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    whole = {p for p in llama.parameters() if not isinstance(p, DTensor)}
    fully_shard(llama, mesh=mesh, ignored_params=whole)
    llama.to_empty(device=device)
    files = {name: path for path in shard_files(folder, "LLaMA weights") for name in map_safetensors(path, "LLaMA weights")}
    for name, parameter in llama.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == "scale":                             # is computed with its weight
            continue
        part, first = parameter, 0
        if isinstance(parameter, DTensor):              # one of a layer
            part = parameter.to_local()
            first = min(-(-len(parameter) // size()) * rank(), len(parameter))          # fully_shard's rule
        official = official_name(name)
        with safe_open(files[official], framework="pt") as file:        # closed after each tensor: its pages are given back
            rows = file.get_slice(official)[first:first + len(part)]
            if part.dtype == torch.int8:                # one scale for each row
                rows, scale = quantize(rows.to(device))
                kept = llama.get_submodule(owner).scale
                (kept.to_local() if isinstance(kept, DTensor) else kept).copy_(scale)
            part.copy_(rows)
    llama.idle = pack([[0]], [1], device)               # one token: what a process computes that has no work of its own
    llama.register_forward_pre_hook(announce)
    return llama, tokenizer


def announce(llama, inputs):
    """Before each call of a sharded LLaMA: tell the others that there is work."""
    if inputs[1] is not llama.idle:
        working(llama, 1)


@torch.no_grad()
def keep_up(llama):
    """Call a sharded LLaMA for as long as another process calls it; without --shard, nothing."""
    while hasattr(llama, "idle") and working(llama, 0):
        llama(llama.embed(llama.idle.ids), llama.idle)


def working(llama, here):
    """How many processes have work for a sharded LLaMA; here: 1 if this one has, else 0."""
    count = torch.tensor(here, device=llama.idle.ids.device)
    distributed.all_reduce(count)
    return count.item()


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
            if isinstance(error, RuntimeError) and "gloo" in str(error):        # its connection has broken
                raise UserError(ENDED) from None
            if isinstance(error, distributed.DistError):
                raise UserError(f"{ENDED} ({first_line(error)})") from None
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
    with suppress(RuntimeError, OSError):
        sys.stdout.flush()
        sys.stderr.flush()
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
    signal.signal(signal.SIGTERM, sigterm)              # torchrun's way to end the other processes
    distributed.barrier(group=objects)                  # nobody may fail before all are connected
    return store


def sigterm(*_):
    raise UserError(ENDED)


def silence():
    """Nothing that this process prints is seen from here on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
