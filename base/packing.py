"""Sequences of different lengths as one list of tokens: no padding in linear layers, and no prefix twice.

The sequences are put into a prefix tree.  Each node of the tree is one token of the list:

    sequences        tree              ids       1 5 6 7 8   (N,)    the token ids of node 0, 1, 2, 3, 4
    A = [1, 5, 6]    1 - 5 - 6         position  0 1 2 2 1   (N,)    the depth of each node
    B = [1, 5, 7]    |   `-- 7         table     0 1 2       (B T,)  a row of nodes for each sequence;
    C = [1, 8]       `-- 8                       0 1 3               node 0 is also the padding
                                                 0 4 0
                                       back      6 4 2 5 7   (N,)    one place of each node in the table,
                                                                     row after row; never padding

With causal attention the hidden state of a token depends only on itself and the tokens before it, so
sequences that begin with the same ids can share the nodes of their prefix.  Linear layers and norms run on
the (N, D) matrix of the list.  Only attention needs whole sequences: `pad` copies the nodes of each sequence
into a row, and `unpad` takes one copy of each node back.

In a training step the sequences of comparisons are about twice as long as the others.  So there are up to two
buckets, of shorter and of longer sequences, each with its own T; the table holds the first, then the second.

Padding stands after the last token of its sequence.  In training and for prompts, causal attention hides it.
In the KV cache new tokens stand after it; there the mask hides it.
"""

from dataclasses import dataclass

import torch


@dataclass
class Tokens:
    """The tokens of a forward pass.

    ids, position, table, back   as in the drawing above
    needed   (M,): the node of each token whose logits are used, sequence after sequence; one may be repeated
    buckets  a list of (B, T), one for each bucket
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
        its copies.
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

    n_needed  for each sequence, the number of its last tokens whose logits are used; None: all
    bucketed  two buckets where lengths differ; not with a KV cache, which takes one
    """
    nodes = {}                                          # (node before or -1, id) -> node
    ids, position, paths = [], [], []
    for sequence in sequences:
        path, node = [], -1
        for depth, token_id in enumerate(sequence):
            node = nodes.setdefault((node, token_id), len(ids))
            if node == len(ids):                        # a new one
                ids.append(token_id)
                position.append(depth)
            path.append(node)
        paths.append(path)
    lengths = [len(path) for path in paths]
    needed = [node for path, n in zip(paths, n_needed or lengths) for node in path[len(path) - n:]]
    # The first bucket ends a third of the way from the shortest to the longest, between base questions and
    # comparisons.  experiments/speed.py prints how much padding is left.
    limit = min(lengths) + (max(lengths) - min(lengths)) / 3 if bucketed else max(lengths)
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
    """Tokens of a cached step: one new token for each of B sequences.  The KV cache holds the padded prompts,
    then the tokens of `step` earlier steps.

    ids: the new ones, (B,); lengths: of the prompts, a list; dtype: of the mask
    """
    longest = max(lengths)
    S = longest + step + 1
    lengths = to_device(lengths, ids.device)                                    # (B,)
    # A GPU needs rows of a mask that begin at multiples of 8 numbers; else each layer copies it.
    key = torch.arange((S + 7) // 8 * 8, device=ids.device)
    padding = (key >= lengths[:, None, None, None]) & (key < longest)
    mask = torch.zeros(padding.shape, dtype=dtype, device=ids.device).masked_fill(padding, float("-inf"))
    mask = mask[..., :S]                                                        # (B, 1, 1, S)
    each = torch.arange(len(ids), device=ids.device)                            # (B,)   each row is one node
    return Tokens(ids, lengths + step, each, each, each, [(len(ids), 1)], mask)


def to_device(numbers, device, dtype=None):
    """Numbers (a list, or a tensor) as a tensor on the device.

    From pinned memory a GPU copies when it comes to this operation; otherwise the CPU would wait for it.
    """
    tensor, kind = torch.as_tensor(numbers, dtype=dtype), torch.device(device).type
    if kind == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=kind != "mps")        # mps would read memory that is free by then
