"""What the benchmarks measure with: clocks, sides that take turns, the table they print, memory."""

import resource
import statistics
import time
from pathlib import Path

import torch

from base.console import UserError


def now():
    """Seconds on a clock, read once the GPU, if one is used, has finished what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(do):
    start = now()
    do()
    return now() - start


def turns(rounds, **sides):
    """{side: its seconds, one a round}.  The sides take turns; where a round takes less than four seconds there are more
    rounds, up to 25.  Each side has been called before, by a check or a smaller call, so that none is cold."""
    took = {name: [] for name in sides}
    done = 0
    while done < rounds:
        for name, do in sides.items():
            took[name].append(seconds(do))
        done += 1
        if done == 1:
            rounds = max(rounds, min(25, int(20 / sum(s[0] for s in took.values()))))
    return took


class Report:
    """Prints the table line by line, and keeps it for the JSON."""

    def __init__(self):
        self.lines = []

    def add(self, section, what, each, unit, at_least=None, at_most=None, note="", **more):
        """The median of `each`, one figure a round, its spread, and what it should reach."""
        value, low, high = statistics.median(each), min(each), max(each)
        self.lines.append({"section": section, "what": what, "value": value, "low": low, "high": high, "rounds": len(each),
                           "unit": unit, "at_least": at_least, "at_most": at_most, "note": note, **more})
        met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)     # not met by a NaN
        goal = (f"{at_least:g} to {at_most:g}" if None not in (at_least, at_most) else
                f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}" if at_most is not None else "")
        spread = f"{low:.2f} to {high:.2f} ({len(each)})"
        print(f"{section:8}  {what:58}  {value:8.2f} {unit:2}  {spread:22}  {goal:13} {'' if met else 'MISSED':6}  {note}",
              flush=True)

    def ratio(self, section, what, over, under, unit="x", **more):
        """Of two sides' seconds, round by round."""
        self.add(section, what, [a / b for a, b in zip(over, under, strict=True)], unit,
                 seconds=[statistics.median(over), statistics.median(under)], **more)


def agree(what, ours, peer, tolerance=1e-4):
    """Both sides' results must be the same, to a share of the peer's greatest."""
    far = (ours - peer).abs().max().item() / max(peer.abs().max().item(), 1e-30)
    if not far <= tolerance:
        raise UserError(f"{what}: ours and the peer's differ by {far:.1e} of the greatest, more than {tolerance:.0e}; "
                        "their times cannot be compared")


def head_of(llama):
    """The layer whose weight makes the logits."""
    return llama.embed_tokens if llama.config.tie_word_embeddings else llama.lm_head


def passes_of(llama, do):
    """(what do() returns, for each forward pass of `llama` meanwhile (its tokens, its tokens whose logits are needed))"""
    passes = []

    def note(_, inputs):
        tokens = inputs[1]
        passes.append((len(tokens.ids), len(tokens.ids if tokens.needed_index is None else tokens.needed_index)))

    hook = llama.register_forward_pre_hook(note)
    try:
        return do(), passes
    finally:
        hook.remove()


def peak():
    """Greatest memory of this process so far, bytes: of the GPU, if one is used; else resident, where mapped files count."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_bytes(folder):
    """Seconds to read every byte of a folder's weights, as `cat` would."""
    buffer = bytearray(16 << 20)

    def do():
        for path in Path(folder).glob("*.safetensors"):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    return seconds(do)
