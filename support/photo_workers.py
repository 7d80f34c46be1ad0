"""Processes that read the photos of a catalogue, so that the model need not wait for them."""

import multiprocessing
import os
import signal
from contextlib import suppress

from base.console import UserError
from base.photo import open_photo
from vit import crop

MOST_WORKERS = 8                                        # processes that read photos


class PhotoWorkers:
    """Processes that read the photos of one block while the model answers the block before.

    The first are forked before there are weights or threads.  A worker ends when its pipe is closed, also if the command is
    killed.
    """

    def __init__(self):
        self.pipes, self.processes, self.names = [], [], []
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        for w in range(max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))):
            self.fork(w)

    def fork(self, w):
        """Start worker number w, in the place of one that died."""
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        self.pipes[w:w + 1], self.processes[w:w + 1] = [], []
        process = context.Process(target=photo_worker, args=(theirs, [ours, *self.pipes]), daemon=True)
        process.start()
        theirs.close()
        self.pipes.insert(w, ours)
        self.processes.insert(w, process)

    def start(self, names, images, size):
        """Begin to read these photos of a folder, for a ViT that takes `size` pixels."""
        self.names, self.how = names, (images, size)
        for w, pipe in enumerate(self.pipes):
            with suppress(OSError):                     # it died; `results` sees that, too
                pipe.send((names[w::len(self.pipes)], *self.how))

    def results(self):
        """{name: what read_photo returned} of the photos that were started."""
        found = {}
        for w, pipe in enumerate(list(self.pipes)):
            share = self.names[w::len(self.pipes)]
            try:
                found.update(zip(share, pipe.recv()))
            except (EOFError, OSError):                 # a photo ended the worker, or the system did
                self.fork(w)
                found.update((name, self.alone(w, name)) for name in share)
        return found

    def alone(self, w, name):
        """One photo, read by worker w after it died: a photo that ends it again is at fault."""
        try:
            self.pipes[w].send(([name], *self.how))
            return self.pipes[w].recv()[0]
        except (EOFError, OSError):
            self.fork(w)
            return f"the photo {name!r} ended the process that read it"

    def close(self):
        for pipe, process in zip(self.pipes, self.processes):
            pipe.close()
            process.terminate()
            process.join()


def photo_worker(pipe, others):
    """What a worker does.  others: pipe ends that belong to the command."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C goes to all processes; the command ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()
    with suppress(EOFError, OSError):
        while True:
            names, images, size = pipe.recv()
            pipe.send([read_photo(images / name, size) for name in names])


def read_photo(path, size):
    """The pixels of a photo as vit.crop gives them, or a text that says what is wrong."""
    try:
        return crop(open_photo(path), size)
    except (UserError, OSError, MemoryError) as error:
        return " ".join(str(error).split()) or type(error).__name__
