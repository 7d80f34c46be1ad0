"""The method against its equations, written out a second time in the plainest way."""

import copy
import math

import pytest
import torch
from conftest import randomize

import eiven
from console import UserError
from data import Row
from eiven import EIVEN, Projector, nucleus, taps
from llama import LlamaConfig, LLaMA, pack

V, K = 24, 2


@pytest.fixture
def model(tiny):
    llama, tokenizer = tiny
    return EIVEN(llama, tokenizer, visual_width=V, adapter="rep", adapter_dim=4, projector_dim=6)


@pytest.fixture
def batch(model):
    """(rows, features): one and two photos, and answers of different lengths; two rows begin alike."""
    encode, eos = model.tokenizer.encode, model.tokenizer.eos_id
    question = "Question: What is the Boot Style of this product?"
    rows = [Row((0,), encode(f"{question}\nContext: black leather\nAnswer:"), encode("Rain Boots") + [eos]),
            Row((0,), encode(f"{question}\nContext: black shoe with a Heel\nAnswer:"), encode("Flat") + [eos]),
            Row((1, 2), encode("Which product's Heel Height is Flat?\nAnswer:"), encode("Second product has Flat.") + [eos]),
            Row((), encode("Context: no photo\nAnswer:"), encode("No.") + [eos])]
    return rows, torch.randn(3, K, V, generator=torch.Generator().manual_seed(5))


def plain_log_probabilities(model, row, features):
    """log p(R_t | X, R_<t) of one row: no packing, no sharing, attention by loops over heads."""
    llama, config = model.llama, model.llama.config
    table = llama.embed_tokens.weight
    visual = [model.projector(features[p]) for p in row.photos]
    x = torch.cat([table[[model.tokenizer.bos_id]], *visual, table[row.prompt + row.answer]])       # (T, D)
    T, d = len(x), config.head_dim

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def turn(x):                                        # pair (i, i + d/2) by the angle t theta^(-2i/d)
        out = x.clone()
        for t in range(T):
            for i in range(d // 2):
                angle = t * config.rope_theta ** (-2 * i / d)
                a, b = x[t, i], x[t, i + d // 2]
                out[t, i] = a * math.cos(angle) - b * math.sin(angle)
                out[t, i + d // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    for block in llama.layers:
        h = block.adapter(norm(x, block.input_layernorm.weight))
        q, k, v = (h @ m.weight.T for m in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj))
        heads = []
        for i in range(config.num_attention_heads):
            j = i // (config.num_attention_heads // config.num_key_value_heads)
            qi, ki, vi = turn(q[:, i * d:(i + 1) * d]), turn(k[:, j * d:(j + 1) * d]), v[:, j * d:(j + 1) * d]
            scores = qi @ ki.T / math.sqrt(d) + torch.full((T, T), float("-inf")).triu(1)
            heads.append(scores.softmax(-1) @ vi)
        x = x + torch.cat(heads, -1) @ block.self_attn.o_proj.weight.T
        h = norm(x, block.post_attention_layernorm.weight)
        gate, up = h @ block.mlp.gate_proj.weight.T, h @ block.mlp.up_proj.weight.T
        x = x + (gate * gate.sigmoid() * up) @ block.mlp.down_proj.weight.T
    logits = norm(x, llama.norm.weight) @ llama.lm_head.weight.T
    start = T - len(row.answer)
    return logits.log_softmax(-1)[torch.arange(start - 1, T - 1), row.answer]


def test_the_loss_is_the_papers_equation(model, batch):
    rows, features = batch
    randomize(model)
    by_hand = -sum(plain_log_probabilities(model, row, features).sum() for row in rows) / len(rows)
    torch.testing.assert_close(model(rows, features), by_hand, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_equation(model, batch):
    rows, features = batch
    randomize(model)
    trained = model.trained()
    ours = torch.autograd.grad(model(rows, features), list(trained.values()))
    by_hand = -sum(plain_log_probabilities(model, row, features).sum() for row in rows) / len(rows)
    for name, a, b in zip(trained, ours, torch.autograd.grad(by_hand, list(trained.values()))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item(), msg=lambda m: f"{name}: {m}")


def test_gradient_checkpointing_changes_no_gradient(model, batch):
    rows, features = batch
    randomize(model)
    trained = list(model.trained().values())
    plain = torch.autograd.grad(model(rows, features), trained)
    model.llama.grad_checkpoint = True
    for photos in (features, None):                     # without photos nothing before the first adapter has a gradient
        some = rows if photos is not None else rows[3:]
        again = torch.autograd.grad(model(some, photos), trained, allow_unused=True)
        if photos is not None:
            for a, b in zip(again, plain):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        else:
            assert all(g is not None and g.abs().sum() > 0 for g in again[:-6])


def test_micro_batches_give_the_gradient_of_the_batch(model, batch):
    rows, features = batch
    randomize(model)
    trained = list(model.trained().values())
    whole = torch.autograd.grad(model(rows, features), trained)
    parts = [torch.autograd.grad(model([row], features) / len(rows), trained, allow_unused=True) for row in rows]
    for i, expected in enumerate(whole):
        total = sum(p[i] for p in parts if p[i] is not None)
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


def test_step_0_is_exactly_llama(tiny, batch):
    llama, tokenizer = tiny
    ids = batch[0][0].prompt
    layout = pack([ids])
    plain = llama.logits(llama(llama.embed(layout.ids), layout))
    with_adapters = EIVEN(copy.deepcopy(llama), tokenizer, V, "mlp", 4, 6)
    h = with_adapters.llama(with_adapters.embed(layout.ids, None), layout)
    assert torch.equal(with_adapters.llama.logits(h), plain)


def test_a_training_step_leaves_every_frozen_tensor_bit_equal(model, batch):
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = model.trained()
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    for _ in range(2):                                  # at step 1 `down` has no gradient yet: `up` is zero
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()
    learned = {id(p) for p in trained.values()}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in learned), name
        assert p.requires_grad == (id(p) in learned), name


def test_a_row_without_an_answer_is_refused(model):
    with pytest.raises(ValueError, match="row 0 .* no answer"):
        model([Row((), [5, 6], [])])


def test_a_row_longer_than_llama_reads_is_refused(model):
    with pytest.raises(UserError, match="a question is 2,047 tokens long, .* more than the 2,048"):
        model([Row((), [5] * 2046, [6, 2])])
    model.sequence(Row((), [5] * 2045, [6, 2]), None)


def test_projector_is_swiglu_with_its_gate():
    projector = Projector(3, 5, hidden=2)
    x = torch.randn(4, 3)
    g, d = x @ projector.gate.weight.T + projector.gate.bias, x @ projector.down.weight.T + projector.down.bias
    expected = (g / (1 + (-g).exp()) * d) @ projector.up.weight.T + projector.up.bias
    torch.testing.assert_close(projector(x), expected)


@pytest.mark.parametrize("adapter, count", [("rep", 1_704_192), ("mlp", 2_228_480), ("mlp-linear", 2_228_480)])
def test_trainable_parameters_at_7b(adapter, count):
    config = LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, 1e-6)
    with torch.device("meta"):
        llama = LLaMA(config)
        assert sum(p.numel() for p in llama.parameters()) == 6_738_415_616
        trained = EIVEN(llama, None, 768, adapter).trained()
    assert sum(p.numel() for name, p in trained.items() if name.startswith("adapters.")) == count
    # I Wg + bg, I Wd + bd: 768 -> 128; Wu, bu: 128 -> 4096
    assert sum(p.numel() for name, p in trained.items() if name.startswith("projector.")) == 2 * 98_432 + 528_384
    assert all(p.dtype == torch.float32 for p in trained.values())


def test_taps():
    assert taps(12) == (3, 6, 9, 12)
    with pytest.raises(UserError, match="has 10 layers"):
        taps(10)


# ------------------------------------------------------------------------------------------------ answering


def answers(model, rows, features, **how):
    return model.generate(rows, features, [f"seed {i}" for i in range(len(rows))], limit=8, **how)


@pytest.mark.parametrize("temperature, top_p", [(0, 1.0), (0.1, 0.75), (2.0, 0.95)])
def test_batched_answers_are_those_given_alone(model, batch, temperature, top_p):
    rows, features = batch
    randomize(model)
    together = answers(model, rows, features, temperature=temperature, top_p=top_p)
    for i, row in enumerate(rows):
        [(ids, p)] = model.generate([row], features, [f"seed {i}"], temperature, top_p, limit=8)
        assert (ids, p) == (together[i][0], pytest.approx(together[i][1], rel=1e-4))


def test_cached_answers_are_those_of_full_passes(model, batch):
    """Greedy decoding, where each token comes from a pass over everything before it; and the answer's probability."""
    rows, features = batch
    randomize(model)
    for row, (ids, probability) in zip(rows, answers(model, rows, features, temperature=0)):
        x, log_p, expected = model.sequence(row, features), 0.0, []
        for _ in range(8):
            layout = pack([x + expected], [1])
            h = model.llama(model.embed(layout.ids, features), layout)
            log = model.llama.logits(h).log_softmax(-1)[0]
            log_p += log.max().item()
            if log.argmax() == model.tokenizer.eos_id:
                break
            expected.append(log.argmax().item())
        assert ids == expected
        assert probability == pytest.approx(math.exp(log_p), rel=1e-4)


def test_rows_that_end_leave_and_change_nothing(model, batch):
    """Rows of very different answer lengths, forced by `allowed`, so that the cache is compacted on the way."""
    rows, features = batch
    eos = model.tokenizer.eos_id
    allowed = [[[7, eos]], [[8, 9, 10, 11, 12, eos]], [[7, 8, eos]], [[9, 9, 9, 9, 9, 9, eos]]]
    found = answers(model, rows, features, allowed=allowed)
    assert [ids for ids, _ in found] == [a[0][:-1] for a in allowed]
    for row, (_, p), [answer] in zip(rows, found, allowed):
        expected = plain_log_probabilities(model, row._replace(answer=answer), features).sum().exp()
        assert p == pytest.approx(expected.item(), rel=1e-4)


def test_only_allowed_answers_are_given(model, batch):
    rows, features = batch
    randomize(model)
    eos = model.tokenizer.eos_id
    allowed = [[[5, 6, eos], [5, 7, eos], [9, eos]]] * len(rows)
    for ids, _ in answers(model, rows, features, temperature=3.0, top_p=1.0, allowed=allowed):
        assert ids + [eos] in allowed[0]


def test_merged_answers_are_the_same(model, batch):
    rows, features = batch
    randomize(model)
    before = answers(model, rows, features)
    loss = model(rows, features)
    model.merge_adapters()
    torch.testing.assert_close(model(rows, features), loss, rtol=1e-5, atol=1e-5)
    assert [ids for ids, _ in answers(model, rows, features)] == [ids for ids, _ in before]


def log(*p):
    return torch.tensor([p], dtype=torch.float64).log()


@pytest.mark.parametrize("uniform, expected", [(0.0, 2), (0.624, 2), (0.626, 0), (0.999999, 0)])
def test_nucleus_by_hand(uniform, expected):
    """p = 0.3, 0.15, 0.5, 0.05 at top-p 0.75: the nucleus is {2, 0}, 0.5 / 0.8 = 0.625 of it is token 2."""
    assert nucleus(log(0.3, 0.15, 0.5, 0.05), 1.0, 0.75, [uniform]).item() == expected


def test_nucleus_limits():
    p = log(0.3, 0.15, 0.5, 0.05)
    assert nucleus(p, 1.0, 0.5, [0.999]).item() == 2            # the best token alone reaches top_p
    assert nucleus(p, 0, 1.0, [0.999]).item() == 2              # greedy
    assert nucleus(p, 1.0, 1.0, [0.999]).item() == 3            # everything
    # Temperature comes first: p^10 makes the best token 0.994 of the whole.
    assert nucleus(p, 0.1, 0.75, [0.999]).item() == 2
    draws = [nucleus(p, 1.0, 1.0, [(i + 0.5) / 1000]).item() for i in range(1000)]
    assert [draws.count(i) for i in range(4)] == [300, 150, 500, 50]


# ------------------------------------------------------------------------------------------------ files


def test_what_was_trained_is_saved_and_read_back(model, batch, tmp_path, llama_dir):
    from llama import load_llama
    randomize(model)
    model.save(tmp_path / "adapter.safetensors")
    other = EIVEN(*load_llama(llama_dir, torch.float32), V, "rep", 4, 6)
    other.load(tmp_path / "adapter.safetensors")
    assert torch.equal(other(*batch), model(*batch))
    size = sum(p.numel() for p in model.trained().values()) * 4
    assert size < (tmp_path / "adapter.safetensors").stat().st_size < size + 4000       # nothing frozen is in it


def test_another_adapter_does_not_load(model, tmp_path, llama_dir):
    from llama import load_llama
    model.save(tmp_path / "adapter.safetensors")
    other = EIVEN(*load_llama(llama_dir, torch.float32), V, "mlp", 4, 6)
    with pytest.raises(UserError, match=r"adapters.0.up_weight is \(2, 16, 2\) in the file and \(1, 32, 4\) in the model"):
        other.load(tmp_path / "adapter.safetensors")
    without = EIVEN(*load_llama(llama_dir, torch.float32), None, "rep", 4)
    with pytest.raises(UserError, match="projector.* is .* in the file and absent in the model"):
        without.load(tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("shard_bytes", [10 ** 9, 20_000])
def test_an_export_is_an_ordinary_llama(model, batch, tmp_path, llama_dir, shard_bytes, monkeypatch):
    """transformers reads it, gets image tokens by the README's lines, and gives our merged logits."""
    transformers = pytest.importorskip("transformers")
    import safetensors.torch
    monkeypatch.setattr(eiven, "SHARD_BYTES", shard_bytes)
    rows, features = batch
    randomize(model)
    with torch.no_grad():
        unmerged = model.answer_logits(rows, features)
        merged = model.merge_adapters().answer_logits(rows, features)
        torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
    readme = eiven.export_readme(model, (3, 6), text=True)
    eiven.export(model, llama_dir, tmp_path / "out", readme)
    assert (len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3) == (shard_bytes < 10 ** 9)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    scope = {"torch": torch, "safetensors": safetensors, "llama": peer}
    lines = [line.strip() for line in (tmp_path / "out" / "README.md").read_text().splitlines() if line.startswith("    ")]
    monkeypatch.chdir(tmp_path / "out")
    theirs = []
    with torch.no_grad():
        for row in rows[:2]:                            # one photo each
            ids = torch.tensor([model.tokenizer.bos_id, *row.prompt, *row.answer[:-1]])
            scope |= {"ids": ids, "cls": features[0]}
            exec("\n".join(lines[1:8]), scope)
            theirs.append(peer(inputs_embeds=scope["x"][None]).logits[0, -len(row.answer):])
    expected = merged[:len(rows[0].answer) + len(rows[1].answer)]
    torch.testing.assert_close(torch.cat(theirs), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="exists already"):
        eiven.export(model, llama_dir, tmp_path / "out", readme)
    again, _ = __import__("llama").load_llama(tmp_path / "out")     # and our own loader reads it
    assert again.config.attention_bias


def test_an_export_says_what_its_run_saw(model, tiny):
    assert "Context: {title}, {category}" in eiven.export_readme(model, (6,), text=True)
    alone = eiven.export_readme(model, (6,), text=False)
    assert "Context" not in alone and "(1, 24), the [cls] after ViT layer 6\n" in alone
    texts = eiven.export_readme(model, (), text=True)
    assert "projector" not in texts and "image" not in texts
