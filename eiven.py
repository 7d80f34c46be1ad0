"""EIVEN, section 2 of the paper: a frozen LLaMA reads four projected [cls] tokens of a photo and answers.

    photo --ViT--> [cls] of layers 3, 6, 9, 12 --projector--> I' --+
    question ------------------------------------------------> Q --+--> X = [I', Q, C] --LLaMA with adapters--> answer
    title and category --------------------------------------> C --+

Only the adapters (theta_a) and the projector (theta_p) are trained.  Readings of the paper that it leaves open:
X begins with LLaMA's begin token, as every text that LLaMA was trained on; the projector's sigma is SwiGLU with
its gate, as Shazeer 2020 (arXiv 2002.05202) defines it, where LaVIN, which the authors built on, has a plain swish.

One legend of shapes for the whole project:
    B rows (examples)   T tokens of the longest row   N real tokens of all rows   A answer tokens of all rows
    P photos   K [cls] tokens of a photo (4)   V ViT width (768)   D LLaMA width (4096)   r adapter rank (8)
The paper's D is our V and its D_text our D; its R is the answer, and in figure 3 I' and C' are the second product's.
"""

import json
import math
import random
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from adapters import Adapter, merge
from console import UserError, whole_file, write_text
from llama import Cache, next_tokens, official_name, pack
from weights import map_safetensors

TEMPERATURE, TOP_P = 0.1, 0.75                           # of answers (section 4.1)
CLS_EVERY = 3                                           # a [cls] token after every third layer (section 4.1)


def taps(vit_layers):
    """The ViT layers, counted from 1, whose [cls] token is I_k of section 2.1: 3, 6, 9, 12 for ViT-B/16."""
    if vit_layers % CLS_EVERY:
        raise UserError(f"the ViT has {vit_layers} layers; EIVEN takes the [cls] token of every {CLS_EVERY}rd layer, "
                        f"the last one included, so their number must be a multiple of {CLS_EVERY}")
    return tuple(range(CLS_EVERY, vit_layers + 1, CLS_EVERY))


class Projector(nn.Module):
    """I' = (swish(I Wg + bg) * (I Wd + bd)) Wu + bu, section 2.1: (P, K, V) -> (P, K, D), in fp32.

    hidden is d_h, the width between (paper: 128).
    """

    def __init__(self, visual_width, width, hidden=128):
        super().__init__()
        self.gate = nn.Linear(visual_width, hidden)
        self.down = nn.Linear(visual_width, hidden)
        self.up = nn.Linear(hidden, width)

    def forward(self, features):
        return self.up(F.silu(self.gate(features)) * self.down(features))


class EIVEN(nn.Module):
    """The whole method: the same class trains, evaluates and answers.

    llama          frozen; its blocks get an adapter each
    visual_width   V of the photos' features, or None for a model without images
    adapter        "rep", "mlp" or "mlp-linear", of rank adapter_dim
    """

    def __init__(self, llama, tokenizer, visual_width=768, adapter="rep", adapter_dim=8, projector_dim=128):
        super().__init__()
        self.llama, self.tokenizer = llama, tokenizer
        width, device = llama.config.hidden_size, llama.embed_tokens.weight.device
        for block in llama.layers:
            block.adapter = Adapter(adapter, width, adapter_dim).to(device)
        self.projector = Projector(visual_width, width, projector_dim).to(device) if visual_width else None

    @property
    def device(self):
        return self.llama.embed_tokens.weight.device

    def trained(self):
        """{name: parameter} of all that is trained, and of nothing frozen: theta_a and theta_p."""
        parts = {f"adapters.{i}": block.adapter for i, block in enumerate(self.llama.layers)}
        if self.projector is not None:
            parts["projector"] = self.projector
        return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}

    # ------------------------------------------------------------------------------------------------ figure 2

    def forward(self, rows, features=None):
        """The training objective L of section 2.2 for a batch: a scalar, in nats.

        rows      B of them, each with .photos (places in `features`), .prompt and .answer (lists of ids: [Q, C] and
                  R with its end token)
        features  (P, K, V) [cls] tokens of the photos, from the frozen ViT
        """
        for b, row in enumerate(rows):
            if not row.answer:
                raise ValueError(f"row {b} of the batch has no answer: nothing to learn from")
        target = torch.tensor([token for row in rows for token in row.answer], device=self.device)      # (A,)
        logits = self.answer_logits(rows, features)     # (A, vocab)
        return F.cross_entropy(logits, target, reduction="sum") / len(rows)

    def answer_logits(self, rows, features=None):
        """Logits (A, vocab) that predict the answer tokens of rows, one row after the other: figure 2, bottom to top."""
        X = [self.sequence(row, features) for row in rows]                      # [I', Q, C] as ids
        # R_t is predicted from [X, R_<t]: the last token of an answer is predicted, never read.
        answers = [len(row.answer) for row in rows]     # so many of a row's last tokens predict one of its answer
        layout = pack([x + row.answer[:-1] for x, row in zip(X, rows)], answers, self.device)

        x = self.embed(layout.ids, features)            # (N, D)   text by LLaMA's table, photos by the projector
        h = self.llama(x, layout)                       # (A, D)   logits are needed where answers are predicted
        return self.llama.logits(h)                     # (A, vocab)

    def sequence(self, row, features):
        """X = [I', Q, C] as ids.  Image token k of photo p has the id -1 - (p K + k): below 0, as no text has."""
        K = features.shape[1] if row.photos else 0
        x = [self.tokenizer.bos_id, *(-1 - (p * K + k) for p in row.photos for k in range(K)), *row.prompt]
        most = self.llama.config.max_position_embeddings
        if len(x) + len(row.answer) > most:
            raise UserError(f"a question is {len(x):,} tokens long, with its answer more than the {most:,} that this LLaMA "
                            f"was trained to read: {self.tokenizer.decode(row.prompt)[:120]!r}…; shorten its title")
        return x

    def embed(self, ids, features):
        """(N,) ids -> (N, D): text tokens from LLaMA's table, image tokens from the projector."""
        x = self.llama.embed(ids.clamp(min=0))
        image = (ids < 0).nonzero().squeeze(1)
        if len(image) == 0:
            return x
        visual_tokens = self.projector(features.float()).flatten(0, 1)          # (P, K, V) -> (P K, D)
        return x.index_copy(0, image, visual_tokens[-1 - ids[image]].to(x.dtype))

    # ------------------------------------------------------------------------------------------------ answering

    @torch.no_grad()
    def generate(self, rows, features=None, seeds=None, temperature=TEMPERATURE, top_p=TOP_P, limit=32, allowed=None):
        """Answers to rows: a list of (ids without end token, probability of that answer under the model).

        seeds     one per row; the draws of a row depend on its seed alone, not on its neighbours in the batch
        temperature, top_p   nucleus sampling, temperature first (section 4.1); temperature 0 takes the best token
        limit     tokens after which an answer is cut off
        allowed   per row a list of answers (lists of ids with end token): only these can be given
        The probability is the model's own, at temperature 1 and top-p 1, of the answer with its end token.
        """
        B, device = len(rows), self.device
        seeds = seeds or [0] * B
        draws = [random.Random(seed) for seed in seeds]
        X = [self.sequence(row, features) for row in rows]
        layout = pack(X, [1] * B, device, groups=False)
        cache = Cache(self.llama.config, B, max(map(len, X)) + limit, self.llama.compute_dtype, device)
        h = self.llama(self.embed(layout.ids, features), layout, cache)         # (B, D)
        cache.length = torch.tensor([len(x) for x in X], device=device)

        answers, log_p = [[] for _ in rows], [0.0] * B
        live, ended = list(range(B)), set()             # which row each line of the cache belongs to; which are done
        for step in range(limit):
            logits = self.llama.logits(h)               # (live, vocab)
            masked = logits
            if allowed is not None:
                masked = torch.full_like(logits, float("-inf"))
                for i, b in enumerate(live):
                    ways = {a[step] for a in allowed[b] if a[:step] == answers[b] and len(a) > step}
                    masked[i, list(ways) or [self.tokenizer.eos_id]] = 0
                masked = masked + logits
            token = nucleus(masked, temperature, top_p, [draws[b].random() for b in live])      # (live,)
            gain = logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1).tolist()
            for b, t, g in zip(live, token.tolist(), gain):
                if b in ended:
                    continue
                log_p[b] += g
                if t == self.tokenizer.eos_id:
                    ended.add(b)
                else:
                    answers[b].append(t)
            if len(ended) == B or step == limit - 1:
                break
            going = [i for i, b in enumerate(live) if b not in ended]
            if 2 * len(going) <= len(live):             # rows that have ended leave the batch, when it pays
                cache.keep(torch.tensor(going, device=device))
                token, live = token[going], [live[i] for i in going]
            h = self.llama(self.llama.embed(token), next_tokens(token, cache.length), cache)     # (live, D)
            cache.length = cache.length + 1
        return [(answer, math.exp(p)) for answer, p in zip(answers, log_p)]

    # ------------------------------------------------------------------------------------------------ merge, files

    def merge_adapters(self):
        """Fold the adapters into q, k and v: afterwards the LLaMA inside is an ordinary one, with biases."""
        for block in self.llama.layers:
            for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                merge(block.adapter, linear)
            block.adapter = nn.Identity()
        return self

    def save(self, path):
        """Write all that was trained, and nothing frozen, to one safetensors file."""
        with whole_file(path) as partial:
            save_file({name: p.detach().cpu().contiguous() for name, p in self.trained().items()}, partial)

    def load(self, path):
        """Read what `save` wrote, strictly."""
        tensors = map_safetensors(path, "what was trained (adapter.safetensors)")
        trained = self.trained()
        wrong = [n for n in trained.keys() | tensors.keys()
                 if n not in tensors or n not in trained or tensors[n].shape != trained[n].shape]
        if wrong:
            name = min(wrong)
            raise UserError(
                f"{path}: does not fit this model in {len(wrong)} tensors: {name} is "
                f"{tuple(tensors[name].shape) if name in tensors else 'absent'} in the file and "
                f"{tuple(trained[name].shape) if name in trained else 'absent'} in the model; "
                "was it trained with another LLaMA, ViT or adapter?")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[name])


SHARD_BYTES = 5_000_000_000

def export_readme(model, tapped, text):
    """How to use an export: of a run that saw the [cls] of the ViT layers `tapped` (none: no photos), and texts or not."""
    context = "\\nContext: {title}, {category}" if text else ""
    lines = ["An EIVEN run, its adapters merged: an ordinary LLaMA (Hugging Face layout, attention_bias)"
             + (" and its projector." if tapped else "."),
             f'Prompt: "Question: What is the {{attribute}} of this product?{context}\\nAnswer:", behind the begin token',
             "", '    llama = transformers.AutoModelForCausalLM.from_pretrained(".", dtype="auto")']
    if tapped:
        lines += ['    p = safetensors.torch.load_file("projector.safetensors")',
                  f"    # cls: (K, V) = {len(tapped), model.projector.gate.in_features}, the [cls] after ViT layer "
                  + ", ".join(map(str, tapped)),
                  "    linear = torch.nn.functional.linear",
                  '    gate, down = [linear(cls, p[f"{n}.weight"], p[f"{n}.bias"]) for n in ("gate", "down")]',
                  '    image = linear(torch.nn.functional.silu(gate) * down, p["up.weight"], p["up.bias"])     # (K, D)']
    image = "image.to(llama.dtype), " if tapped else ""
    return "\n".join(lines + [
        "    text = llama.get_input_embeddings()                          # ids: the begin token, then the prompt's",
        f"    x = torch.cat([text(ids[:1]), {image}text(ids[1:])])",
        "    llama.generate(inputs_embeds=x[None], max_new_tokens=32)", ""])


def export(model, llama_folder, out, readme):
    """Write a merged model to the new folder `out` as an ordinary Hugging Face LLaMA, and the projector beside it.

    model is merged already, readme is export_readme's.  Files: config.json (the source's, with attention_bias), tokenizer.model, safetensors in
    shards of 5 GB with an index, projector.safetensors, README.md.  `out` appears whole or not at all.
    """
    out, llama_folder = Path(out), Path(llama_folder)
    if out.exists():
        raise UserError(f"--export {out}: exists already; name a folder that does not")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {official_name(name): p.detach().cpu() for name, p in model.llama.named_parameters()}
    for i in range(model.llama.config.num_hidden_layers):       # transformers' attention_bias means o_proj's, too
        weight = tensors[f"model.layers.{i}.self_attn.o_proj.weight"]
        tensors.setdefault(f"model.layers.{i}.self_attn.o_proj.bias", torch.zeros(len(weight), dtype=weight.dtype))
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards, size = shards + [{}], 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        save_file(shard, partial / name, metadata={"format": "pt"})
    if len(shards) > 1:
        write_text(partial / "model.safetensors.index.json", json.dumps({
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {tensor: name for name, shard in zip(names, shards) for tensor in shard}}, indent=2) + "\n")
    config = json.loads((llama_folder / "config.json").read_text(encoding="utf-8"))
    dtype = str(model.llama.embed_tokens.weight.dtype).removeprefix("torch.")
    config |= {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "torch_dtype": dtype}
    config.pop("dtype", None)
    write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
    shutil.copyfile(llama_folder / "tokenizer.model", partial / "tokenizer.model")
    if model.projector is not None:
        save_file({n: p.detach().cpu().contiguous() for n, p in model.projector.named_parameters()},
                  partial / "projector.safetensors")
    write_text(partial / "README.md", readme)
    partial.replace(out)


def nucleus(logits, temperature, top_p, uniform):
    """Top-p sampling (Holtzman et al. 2020): one token a row, (B, vocab) -> (B,).

    The nucleus is the smallest set of most probable tokens whose probability together reaches top_p; `uniform`, one
    number in [0, 1) a row, says where in it, renormalised and in falling order, the draw falls.
    """
    best = logits.argmax(-1)
    if temperature == 0:
        return best
    p = (logits / temperature).softmax(-1)
    unsure = (p.gather(1, best[:, None]).squeeze(1) < top_p).nonzero().squeeze(1)
    if len(unsure):                                     # elsewhere the best token is the whole nucleus: no sorting
        falling, order = p[unsure].sort(dim=-1, descending=True, stable=True)
        before = falling.cumsum(-1) - falling
        falling[before >= top_p] = 0
        u = torch.tensor(uniform, device=p.device, dtype=p.dtype)[unsure, None] * falling.sum(-1, keepdim=True)
        place = (falling.cumsum(-1) <= u).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
        place = torch.minimum(place, (falling > 0).sum(-1, keepdim=True) - 1)   # rounding never leaves the nucleus
        best = best.index_copy(0, unsure, order.gather(1, place).squeeze(1))
    return best
