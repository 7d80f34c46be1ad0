"""Sequences without padding, except in attention: which tokens a layer computes, how they are grouped, and the KV cache.

A batch of B sequences is one matrix of N tokens.  Linear layers run on these N rows; only attention needs whole sequences,
and gathers them by index.  This avoids two kinds of wasted work:
    padding             sequences of similar length form a group, and only a group is padded to its longest sequence (on
                        a GPU all are one group: there, starting more operations would take longer)
    repeated prefixes   a prefix that several sequences share is computed once.  With causal attention a hidden state depends
                        only on the token itself and the tokens before it, so equal prefixes have equal hidden states.
                        (The gradient of a shared token is the sum over its sequences, by autograd of index_select.)
Example: the sequences [1, 5, 6] and [1, 5, 7] are ids [1, 5, 6, 7], position [0, 1, 2, 2], table [[0, 1, 2], [0, 1, 3]].

Shapes   B sequences   N tokens   M tokens whose logits are needed
         b sequences of a group   T longest of them, or most needed tokens
         H query heads   G key/value heads   d head dimension   S keys that a query may attend to
"""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, replace

import torch


@dataclass
class Groups:
    """How tokens (N, ...) become padded sequences, one tensor a group, and back.

    tables   for each group (b, T): the index of every token; padding has index 0, and its outputs are not used
    inverse  (N,): row of each token in the concatenated, padded groups; a shared token has several, any one of them
    masks    for each group (b, 1, T, S), True where a query may attend to a key; None: plain causal attention.  Padding
             comes after the last token of its sequence, so the causal mask hides it.
    """

    tables: list
    inverse: torch.Tensor
    masks: list = None

    def pad(self, x):
        """(N, ...) -> for each group (b, T, ...)"""
        flat = x.flatten(1)                             # index_select has a fast backward only for matrices
        return [flat.index_select(0, table.view(-1)).view(*table.shape, *x.shape[1:]) for table in self.tables]

    def unpad(self, groups):
        """for each group (b, T, D) -> (N, D)"""
        return torch.cat([x.flatten(0, 1) for x in groups]).index_select(0, self.inverse)


@dataclass
class Tokens:
    """The tokens of a forward pass, and in a layer's copy (`at_layer`) what that layer does with them.

    ids, position   (N,): token ids, and their positions in their sequences
    groups          Groups of all N tokens
    needed_index    (M,): the tokens whose logits are needed, sequence after sequence; None: all N
    needed_groups   Groups of those M tokens as queries
    cache           KVCache that keys and values are stored in, or None
    layer, cos, sin, last   see `at_layer`
    """

    ids: torch.Tensor
    position: torch.Tensor
    groups: Groups
    needed_index: torch.Tensor = None
    needed_groups: Groups = None
    cache: "KVCache" = None
    layer: int = None
    cos: torch.Tensor = None
    sin: torch.Tensor = None
    last: bool = False

    def at_layer(self, layer, cos, sin, last):
        """For layer number `layer`; cos, sin (N, 1, d/2) are the rotary table; the last layer returns only the needed tokens."""
        return replace(self, layer=layer, cos=cos, sin=sin, last=last and self.needed_index is not None)

    def needed(self, x):
        """(N, ...) -> (M, ...) in the last layer, where the other tokens are only keys and values; x itself in all others."""
        return x.index_select(0, self.needed_index) if self.last else x

    def sequences(self, q, k, v):
        """q (M, H, d), k and v (N, G, d) -> for each group q (b, H, T, d), k and v (b, G, S, d), and its mask or None."""
        queries = self.needed_groups if self.last else self.groups
        keys, values = self.groups.pad(k), self.groups.pad(v)
        if self.cache is not None:
            keys, values = self.cache.update(self.layer, keys, values, self.position, self.groups.masks)
        masks = queries.masks or [None] * len(queries.tables)
        for q, k, v, mask in zip(queries.pad(q), keys, values, masks):
            yield q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask

    def unpad(self, out):
        """Attention's output, for each group (b, H, T, d) -> (M, H d)"""
        queries = self.needed_groups if self.last else self.groups
        return queries.unpad([x.transpose(1, 2).flatten(2) for x in out])


def pack(sequences, needed=None, device="cpu", cache=None):
    """Tokens of sequences (lists of ids, any lengths).

    needed  for each sequence, the logits of how many of its last tokens are needed; None: of all tokens
    cache   an empty KVCache for B sequences; the sequences then form one group
    """
    known = {}                                          # (index of the token before, id) -> index
    ids, position, index = [], [], []                   # index: for each sequence, the indices of its tokens
    for sequence in sequences:
        before, own = -1, []
        for t, token_id in enumerate(sequence):
            before = known.setdefault((before, token_id), len(ids))
            if before == len(ids):                      # a new token, not part of a known prefix
                ids.append(token_id)
                position.append(t)
            own.append(before)
        index.append(own)
    # A group: lengths within a factor of sqrt(2); on a GPU, and with a cache, all sequences.
    by_length = cache is None and torch.device(device).type == "cpu"
    similar = defaultdict(list)
    for b, sequence in enumerate(sequences):
        similar[int(2 * math.log2(len(sequence))) if by_length else 0].append(b)

    def tensor(x):
        return torch.tensor(x, device=device)

    def grouped(index, n):
        tables, inverse, start = [], [0] * n, 0
        for group in similar.values():
            longest = max(len(index[b]) for b in group)
            for i, b in enumerate(group):
                for t, place in enumerate(index[b], start + i * longest):
                    inverse[place] = t
            tables.append(tensor([index[b] + [0] * (longest - len(index[b])) for b in group]))
            start += len(group) * longest
        return Groups(tables, tensor(inverse))

    tokens = Tokens(tensor(ids), tensor(position), grouped(index, len(ids)), cache=cache)
    if needed is not None:
        chosen = [place for own, n in zip(index, needed) for place in own[len(own) - n:]]
        starts = itertools.accumulate(needed, initial=0)
        tokens.needed_index = tensor(chosen)
        tokens.needed_groups = grouped([list(range(start, start + n)) for start, n in zip(starts, needed)], len(chosen))
        position = tokens.position[tokens.needed_index]
        tokens.needed_groups.masks = [causal_mask(position[queries], keys.shape[1])
                                      for queries, keys in zip(tokens.needed_groups.tables, tokens.groups.tables)]
    return tokens


def next_tokens(ids, position, cache):
    """One new token for each sequence in `cache`: ids (B,), at these positions (a list of B)."""
    rows, S = torch.arange(len(ids), device=ids.device), max(position) + 1
    position = torch.tensor(position, device=ids.device)
    return Tokens(ids, position, Groups([rows[:, None]], rows, [causal_mask(position[:, None], S)]), cache=cache)


def causal_mask(position, S):
    """Queries at these positions (b, T) attend to the keys at the same or an earlier position: (b, 1, T, S)

    Padding needs no mask of its own: it comes after the last token of its sequence.
    """
    return torch.arange(S, device=position.device) <= position[:, None, :, None]


class KVCache:
    """Keys and values of the tokens so far, for decoding: each step adds one token to each sequence.

    keys, values  for each layer (B, places, G, d)
    """

    def __init__(self, config, sequences, places, dtype, device):
        shape = (config.num_hidden_layers, sequences, places, config.num_key_value_heads, config.head_dim)
        self.keys = list(torch.zeros(shape, dtype=dtype, device=device))
        self.values = list(torch.zeros(shape, dtype=dtype, device=device))

    def update(self, layer, keys, values, position, masks):
        """Store keys and values, a list of one (B, T, G, d) each; return those that the queries can attend to.

        First call (masks is None): whole prompts, stored from position 0, and returned as they are.
        Later calls: one token for each sequence (T = 1), stored at its position (B,); returns the first S positions of the
        cache, a list of one (B, S, G, d) each.
        """
        if masks is None:
            T = keys[0].shape[1]
            self.keys[layer][:, :T], self.values[layer][:, :T] = keys[0], values[0]
            return keys, values
        rows, S = torch.arange(len(position), device=position.device), masks[0].shape[-1]
        self.keys[layer][rows, position], self.values[layer][rows, position] = keys[0][:, 0], values[0][:, 0]
        return [self.keys[layer][:, :S]], [self.values[layer][:, :S]]

    def keep(self, rows):
        """Keep only these sequences (a tensor of indices)."""
        self.keys = [x[rows] for x in self.keys]
        self.values = [x[rows] for x in self.values]
