"""The model (all but the ViT) without tricks: one sequence, every formula written out, loops over heads.

    python -m experiments.plain                 compares it with EIVEN on the demo world's model

Read this first.  It computes what eiven.py, llama.py and adapters.py compute, slowly: no packing, no shared
prefixes, no cache, no fused operation.  tests/test_eiven.py compares the fast model with it.

Shapes   T tokens of the sequence   D LLaMA's width   d head dimension   P photos   K [cls] tokens of a photo
         V ViT's width   r adapter rank
"""

import math

import torch

from experiments.speed import make_subject


def answer_log_probs(model, example, cls_tokens):
    """log p(R_t | X, R_<t) for each token of the example's answer R: (|R|,).  X = [I', Q, C], section 2.2.

    model       EIVEN with unmerged adapters; its LLaMA has no biases, and an lm_head of its own
    cls_tokens  (P, K, V), I of each photo
    """
    llama, config = model.llama, model.llama.config
    table = llama.embed_tokens.weight                                       # (vocab, D)
    visual_tokens = [projector(model.projector, cls_tokens[p]) for p in example.photos]     # I', (K, D) each
    text = table[example.prompt + example.answer]
    x = torch.cat([table[[model.tokenizer.bos_id]], *visual_tokens, text])  # (T, D)
    T, d = len(x), config.head_dim

    for block in llama.layers:
        h = adapter(block.adapter, rms_norm(x, block.input_layernorm))      # (T, D)   x itself is not changed
        q = h @ block.self_attn.q_proj.weight.T                             # (T, heads d)
        k = h @ block.self_attn.k_proj.weight.T
        v = h @ block.self_attn.v_proj.weight.T
        heads = []
        for i in range(config.num_attention_heads):
            # the key/value head of head i
            j = i // (config.num_attention_heads // config.num_key_value_heads)
            q_i = rotate(q[:, i * d:(i + 1) * d], config.rope_theta)        # (T, d)
            k_j = rotate(k[:, j * d:(j + 1) * d], config.rope_theta)
            v_j = v[:, j * d:(j + 1) * d]
            scores = q_i @ k_j.T / math.sqrt(d)                             # (T, T)
            scores = scores + torch.full((T, T), float("-inf")).triu(1)     # causal mask
            heads.append(scores.softmax(-1) @ v_j)
        x = x + torch.cat(heads, -1) @ block.self_attn.o_proj.weight.T
        h = rms_norm(x, block.post_attention_layernorm)
        gate = h @ block.mlp.gate_proj.weight.T
        up = h @ block.mlp.up_proj.weight.T
        x = x + (gate * gate.sigmoid() * up) @ block.mlp.down_proj.weight.T

    logits = rms_norm(x, llama.norm) @ llama.lm_head.weight.T               # (T, vocab)
    R = torch.tensor(example.answer)
    before = torch.arange(T - len(R) - 1, T - 1)        # the token before R_t predicts R_t
    return logits.log_softmax(-1)[before, R]


def projector(p, I):                                    # I as in the paper
    """I' = (swish(I Wg + bg) * (I Wd + bd)) Wu + bu, section 2.1 with SwiGLU's gate: (K, V) -> (K, D)"""
    gate = I @ p.gate.weight.T + p.gate.bias
    return (gate * gate.sigmoid() * (I @ p.down.weight.T + p.down.bias)) @ p.up.weight.T + p.up.bias


def adapter(a, h):
    """h' = h + s (up sigma(down h + b_down) + b_up), section 2.2 and Appendix D: (T, D) -> (T, D)"""
    z = h @ a.down.weight.T + a.down.bias                                   # (T, r)
    if a.kind == "mlp":
        z = z.clamp(min=0)
    parts = zip(z.chunk(len(a.up_weight), dim=-1), a.up_weight)             # RepAdapter: up in two groups
    return h + a.scale * (torch.cat([z_g @ up_g.T for z_g, up_g in parts], -1) + a.up_bias)


def rms_norm(x, norm):
    """x / rms(x) * weight: (T, D) -> (T, D)"""
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def rotate(x, theta):
    """Rotary positions: the pair (i, i + d/2) of token t is rotated by t theta^(-2i/d): (T, d) -> (T, d)"""
    out, half = x.clone(), x.shape[1] // 2
    for t in range(len(x)):
        for i in range(half):
            angle = t * theta ** (-i / half)
            a, b = x[t, i], x[t, i + half]
            out[t, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def main():
    model, batches, _, cls_tokens = make_subject("demo", "cpu")
    batch = batches[0][:2]
    with torch.no_grad():
        plain = -sum(answer_log_probs(model, example, cls_tokens).sum() for example in batch) / 2
        print(f"the training objective L of two examples: {plain:.6f} written out, "
              f"{model(batch, cls_tokens):.6f} by EIVEN.forward")


if __name__ == "__main__":
    main()
