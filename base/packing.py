"""Sequences of different lengths as one list of tokens: no padding in linear layers, and no prefix twice.

The sequences are put into a prefix tree.  Each node of the tree is one token of the list:

    sequences        tree              ids       1 5 6 7 8   (N,)    the nodes, in the order they were made
    A = [1, 5, 6]    1 - 5 - 6         position  0 1 2 2 1   (N,)    the depth of each node
    B = [1, 5, 7]    |   `-- 7         table     0 1 2       (B, T)  the nodes of each sequence,
    C = [1, 8]       `-- 8                       0 1 3               padded with 0 at the end
                                                 0 4 0
                                       back      6 4 2 5 7   (N,)    a place of each node in the flat table

With causal attention the hidden state of a token depends only on the tokens before it, so sequences that
begin alike can share the nodes of their prefix.  Linear layers and norms run on the (N, D) matrix of the
list.  Attention alone needs whole sequences: `pad` gathers them by the table, and `unpad` takes one copy of
each node from the result.

Padding stands after the last token of its sequence.  In the first pass causal attention hides it.  When
answers are generated, its keys are in the KV cache; there the mask `key <= position` hides every place after
the new token.
"""

from dataclasses import dataclass

import torch


@dataclass
class Tokens:
    """The tokens of a forward pass.

    ids, position, table, back   as in the drawing above
    needed  (M,): indices of the tokens whose logits are used, sequence after sequence; None: all N, in order
    mask    (B, 1, T, S): True where a query may see a key; None: causal attention among the T tokens of each
            sequence
    """

    ids: torch.Tensor
    position: torch.Tensor
    table: torch.Tensor
    back: torch.Tensor
    needed: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def pad(self, x):
        """(N, heads, d) -> (B, heads, T, d).  The gradient of a shared token is the sum over its
        sequences.
        """
        rows = x.flatten(1).index_select(0, self.table.flatten())              # (B T, heads d)
        return rows.view(*self.table.shape, *x.shape[1:]).transpose(1, 2)

    def unpad(self, y):
        """(B, heads, T, d) -> (N, heads d)"""
        return y.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, self.back)


def pack(sequences, n_needed=None, device="cpu"):
    """Tokens of sequences (lists of ids, any lengths).

    n_needed  for each sequence, the number of its last tokens whose logits are used; None: all tokens
    """
    nodes = {}                                          # (index of the node before, id) -> index of the node
    ids, position, table = [], [], []
    for sequence in sequences:
        path, before = [], -1
        for depth, token_id in enumerate(sequence):
            before = nodes.setdefault((before, token_id), len(ids))
            if before == len(ids):                      # a new node
                ids.append(token_id)
                position.append(depth)
            path.append(before)
        table.append(path)
    T = max(map(len, table))
    back = [0] * len(ids)
    for b, path in enumerate(table):
        for t, node in enumerate(path):
            back[node] = b * T + t
    needed = None
    if n_needed is not None:
        last = [node for path, n in zip(table, n_needed) for node in path[len(path) - n:]]
        needed = torch.tensor(last, device=device)                              # (M,)
    table = [path + [0] * (T - len(path)) for path in table]
    return Tokens(*(torch.tensor(x, device=device) for x in (ids, position, table, back)), needed)


def next_tokens(ids, position):
    """Tokens of one new token for each of B sequences, whose earlier tokens are in the KV cache.

    ids (B,); position: a list of B, where each new token stands in its sequence
    """
    rows = torch.arange(len(ids), device=ids.device)
    key = torch.arange(max(position) + 1, device=ids.device)                    # (S,)
    position = torch.tensor(position, device=ids.device)                        # (B,)
    mask = key <= position[:, None, None, None]                                 # (B, 1, 1, S)
    return Tokens(ids, position, rows[:, None], rows, mask=mask)
