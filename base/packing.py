"""Sequences of different lengths as one list of tokens: no padding in linear layers, and no prefix twice.

The sequences are put into a prefix tree.  Each node of the tree is one token of the list:

    sequences        tree              ids       1 5 6 7 8   (N,)    the nodes, in the order they were made
    A = [1, 5, 6]    1 - 5 - 6         position  0 1 2 2 1   (N,)    the depth of each node
    B = [1, 5, 7]    |   `-- 7         table     0 1 2       (B T,)  the nodes of each sequence,
    C = [1, 8]       `-- 8                       0 1 3               padded with node 0, which is
                                                 0 4 0               never taken back from there
                                       back      6 4 2 5 7   (N,)    the last place of each node in the
                                                                     table, row after row

With causal attention the hidden state of a token depends only on the tokens before it, so sequences that
begin alike can share the nodes of their prefix.  Linear layers and norms run on the (N, D) matrix of the
list.  Attention alone needs whole sequences: `pad` gathers them by the table, and `unpad` takes one copy of
each node from the result.

A comparison is about twice as long as a base question.  So the sequences of a training step are in two
buckets, the shorter and the longer; the table of the second follows that of the first.

Padding stands after the last token of its sequence.  In training and for prompts, causal attention hides
it.  When answers are generated, its keys are in the KV cache; there the mask hides them.
"""

from dataclasses import dataclass

import torch


@dataclass
class Tokens:
    """The tokens of a forward pass.

    ids, position, table, back   as in the drawing above
    needed   (M,): indices of the tokens whose logits are used, sequence after sequence
    buckets  (B, T) of each bucket of sequences in the table
    mask     (B, 1, 1, S), added to the scores: -infinity where a new token may not see a key; None: causal
             attention among the T tokens of each sequence
    """

    ids: torch.Tensor
    position: torch.Tensor
    table: torch.Tensor
    back: torch.Tensor
    needed: torch.Tensor
    buckets: list
    mask: torch.Tensor | None = None

    def pad(self, x):
        """(N, heads, d) -> (B, heads, T, d) of each bucket.  The gradient of a shared token is the sum over
        its sequences.
        """
        rows = x.flatten(1).index_select(0, self.table)                         # (sum of B T, heads d)
        parts = rows.split([B * T for B, T in self.buckets])
        return [part.view(*bucket, *x.shape[1:]).transpose(1, 2) for part, bucket in zip(parts, self.buckets)]

    def unpad(self, y):
        """(B, heads, T, d) of each bucket -> (N, heads d)"""
        rows = torch.cat([bucket.transpose(1, 2).flatten(2).flatten(0, 1) for bucket in y])
        return rows.index_select(0, self.back)


def pack(sequences, n_needed=None, device="cpu", bucketed=False):
    """Tokens of sequences (lists of ids, any lengths).

    n_needed  for each sequence, the number of its last tokens whose logits are used; None: all tokens
    bucketed  the sequences may be in two buckets; not for a KV cache, which holds one
    """
    nodes = {}                                          # (index of the node before, id) -> index of the node
    ids, position, paths = [], [], []
    for sequence in sequences:
        path, before = [], -1
        for depth, token_id in enumerate(sequence):
            before = nodes.setdefault((before, token_id), len(ids))
            if before == len(ids):                      # a new node
                ids.append(token_id)
                position.append(depth)
            path.append(before)
        paths.append(path)
    needed = [node for path, n in zip(paths, n_needed or map(len, paths)) for node in path[len(path) - n:]]
    # A third of the way from the shortest to the longest: between base questions and comparisons.
    # experiments/speed.py prints how much padding is left.
    shortest, longest = min(map(len, paths)), max(map(len, paths))
    limit = shortest + (longest - shortest) / 3 if bucketed else longest
    shorter = [path for path in paths if len(path) <= limit]
    longer = [path for path in paths if len(path) > limit]
    table, buckets, back = [], [], [0] * len(ids)
    for bucket in filter(None, (shorter, longer)):
        T = max(map(len, bucket))
        buckets.append((len(bucket), T))
        for path in bucket:
            for t, node in enumerate(path):
                back[node] = len(table) + t
            table += path + [0] * (T - len(path))
    return Tokens(*(to_device(x, device) for x in (ids, position, table, back, needed)), buckets)


def next_tokens(ids, lengths, step, dtype=torch.float32):
    """Tokens of one new token for each of B sequences, whose earlier tokens are in the KV cache: first the
    prompts with their padding, then the tokens of `step` earlier steps.

    ids (B,); lengths: a list of B, of the prompts; dtype: of the mask
    """
    T, S = max(lengths), max(lengths) + step + 1
    lengths = to_device(lengths, ids.device)                                    # (B,)
    # A GPU's kernel needs rows of a multiple of 8 numbers in memory; else each layer copies the mask.
    key = torch.arange((S + 7) // 8 * 8, device=ids.device)
    padding = (key >= lengths[:, None, None, None]) & (key < T)
    mask = torch.zeros(padding.shape, dtype=dtype, device=ids.device).masked_fill(padding, float("-inf"))
    rows = torch.arange(len(ids), device=ids.device)
    return Tokens(ids, lengths + step, rows, rows, rows, [(len(ids), 1)], mask[..., :S])        # (B, 1, 1, S)


def to_device(numbers, device, dtype=None):
    """Numbers (a list, or a tensor) as a tensor on the device.

    From pinned memory a GPU copies when it comes to this operation; otherwise the CPU would wait for it.
    """
    tensor, kind = torch.as_tensor(numbers, dtype=dtype), torch.device(device).type
    if kind == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=kind != "mps")        # mps would read memory that is free by then
