"""The method against its equations, written out a second time in the plainest way."""

import copy
import dataclasses
import math

import pytest
import torch
from conftest import randomize
from safetensors.torch import load_file, save_file

import eiven
from base.checkpoint import check_frozen
from base.console import UserError
from base.packing import pack
from data import Encoded
from eiven import EIVEN, Projector, cls_layers, nucleus
from experiments.plain import answer_log_probs
from llama import LLaMA, LlamaConfig, load_llama
from support import export

V, K = 24, 2


@pytest.fixture
def model(tiny):
    llama, tokenizer = tiny
    return EIVEN(llama, tokenizer, visual_width=V, adapter="rep", adapter_dim=4, projector_dim=6)


@pytest.fixture
def batch(model):
    """(examples, cls_tokens): one and two photos, and answers of different lengths; two examples share a prefix."""
    encode, eos = model.tokenizer.encode, model.tokenizer.eos_id
    question = "Question: What is the Boot Style of this product?"
    examples = [Encoded((0,), encode(f"{question}\nContext: black leather\nAnswer:"), encode("Rain Boots") + [eos]),
            Encoded((0,), encode(f"{question}\nContext: black shoe with a Heel\nAnswer:"), encode("Flat") + [eos]),
            Encoded((1, 2), encode("Which product's Heel Height is Flat?\nAnswer:"), encode("Second product has Flat.") + [eos]),
            Encoded((), encode("Context: no photo\nAnswer:"), encode("No.") + [eos])]
    return examples, torch.randn(3, K, V, generator=torch.Generator().manual_seed(5))


def test_the_loss_is_the_papers_equation(model, batch):
    examples, cls_tokens = batch
    randomize(model)
    by_hand = -sum(answer_log_probs(model, e, cls_tokens).sum() for e in examples) / len(examples)
    torch.testing.assert_close(model(examples, cls_tokens), by_hand, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_equation(model, batch):
    examples, cls_tokens = batch
    randomize(model)
    trained = model.trainable_parameters()
    ours = torch.autograd.grad(model(examples, cls_tokens), list(trained.values()))
    by_hand = -sum(answer_log_probs(model, e, cls_tokens).sum() for e in examples) / len(examples)
    for name, a, b in zip(trained, ours, torch.autograd.grad(by_hand, list(trained.values()))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item(), msg=lambda m: f"{name}: {m}")


def test_gradient_checkpointing_changes_no_gradient(model, batch):
    examples, cls_tokens = batch
    randomize(model)
    trained = list(model.trainable_parameters().values())
    plain = torch.autograd.grad(model(examples, cls_tokens), trained)
    model.llama.grad_checkpoint = True
    for photos in (cls_tokens, None):                     # without photos nothing before the first adapter has a gradient
        some = examples if photos is not None else examples[3:]
        again = torch.autograd.grad(model(some, photos), trained, allow_unused=True)
        if photos is not None:
            for a, b in zip(again, plain):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        else:
            assert all(g is not None and g.abs().sum() > 0 for g in again[:-6])


def test_micro_batches_give_the_gradient_of_the_batch(model, batch):
    examples, cls_tokens = batch
    randomize(model)
    trained = list(model.trainable_parameters().values())
    whole = torch.autograd.grad(model(examples, cls_tokens), trained)
    parts = [torch.autograd.grad(model([e], cls_tokens) / len(examples), trained, allow_unused=True) for e in examples]
    for i, expected in enumerate(whole):
        total = sum(p[i] for p in parts if p[i] is not None)
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


def test_step_0_is_exactly_llama(tiny, batch):
    llama, tokenizer = tiny
    ids = batch[0][0].prompt
    tokens = pack([ids])
    plain = llama.logits(llama(llama.embed(tokens.ids), tokens))
    with_adapters = EIVEN(copy.deepcopy(llama), tokenizer, V, "mlp", 4, 6)
    h = with_adapters.llama(with_adapters.embed(tokens.ids, None), tokens)
    assert torch.equal(with_adapters.llama.logits(h), plain)


def test_a_training_step_leaves_every_frozen_tensor_bit_equal(model, batch):
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = model.trainable_parameters()
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
    with pytest.raises(ValueError, match="example 0 .* no answer"):
        model([Encoded((), [5, 6], [])])


@pytest.mark.parametrize("photos, cls_tokens, said", [
    ((3,), torch.ones(3, K, V), r"cls_tokens has the features of 3 photos, but an example names the photos \(3,\)"),
    ((-1,), torch.ones(3, K, V), r"the features of 3 photos, but an example names the photos \(-1,\)"),
    ((0,), None, r"cls_tokens has the features of 0 photos, but an example names the photos \(0,\)"),
])
def test_photos_without_features_are_refused(model, photos, cls_tokens, said):
    example = Encoded(photos, [5, 6], [7, 2])
    for call in (model, model.generate, lambda batch, photos: model.score(batch, [[[7, 2]]], photos)):
        with pytest.raises(ValueError, match=said):
            call([example], cls_tokens)


def test_wrong_arguments_are_named(model, tiny):
    example = Encoded((), [5, 6], [7, 2])
    for call in (lambda: model([]), lambda: model.generate([]), lambda: model.score([], [])):
        with pytest.raises(ValueError, match="batch is empty"):
            call()
    for candidates in ([[]], [], [[[7, 2]], [[7, 2]]]):
        with pytest.raises(ValueError, match="candidates must hold, for each example of the batch, at least one answer"):
            model.score([example], candidates)
    with pytest.raises(ValueError, match="has no answer"):
        model.score([example], [[[7, 2], []]])
    with pytest.raises(ValueError, match="seeds holds 2, but must hold one for each of the 1 examples"):
        model.generate([example], seeds=["a", "b"])
    with pytest.raises(ValueError, match="adapter is 'foo', but must be one of rep, mlp, mlp-linear"):
        EIVEN(*tiny, V, "foo")
    with pytest.raises(ValueError, match="cls_tokens is given, but the model has no projector"):
        EIVEN(*tiny, None)([example], torch.ones(1, K, V))


def test_a_row_longer_than_llama_reads_is_refused(model):
    with pytest.raises(UserError, match="a question and its answer have 2,049 tokens, but this LLaMA was trained to read 2,048 at most"):
        model([Encoded((), [5] * 2046, [6, 2])])
    model.input_ids(Encoded((), [5] * 2045, [6, 2]), None)


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
        trained = EIVEN(llama, None, 768, adapter).trainable_parameters()
    assert sum(p.numel() for name, p in trained.items() if name.startswith("adapters.")) == count
    # I Wg + bg, I Wd + bd: 768 -> 128; Wu, bu: 128 -> 4096
    assert sum(p.numel() for name, p in trained.items() if name.startswith("projector.")) == 2 * 98_432 + 528_384
    assert all(p.dtype == torch.float32 for p in trained.values())


def test_taps():
    assert cls_layers(12) == (3, 6, 9, 12)
    with pytest.raises(UserError, match="has 10 layers"):
        cls_layers(10)


# ------------------------------------------------------------------------------------------------ answering


def answers(model, examples, cls_tokens, **how):
    return model.generate(examples, cls_tokens, [f"seed {i}" for i in range(len(examples))], limit=8, **how)


@pytest.mark.parametrize("temperature, top_p", [(0, 1.0), (0.1, 0.75), (2.0, 0.95)])
def test_batched_answers_are_those_given_alone(model, batch, temperature, top_p):
    examples, cls_tokens = batch
    randomize(model)
    together = answers(model, examples, cls_tokens, temperature=temperature, top_p=top_p)
    for i, example in enumerate(examples):
        [(ids, p)] = model.generate([example], cls_tokens, [f"seed {i}"], temperature, top_p, limit=8)
        assert (ids, p) == (together[i][0], pytest.approx(together[i][1], rel=1e-4))


def test_cached_answers_are_those_of_full_passes(model, batch):
    """Greedy decoding, where each token comes from a pass over everything before it; and the answer's probability."""
    examples, cls_tokens = batch
    randomize(model)
    for example, (ids, probability) in zip(examples, answers(model, examples, cls_tokens, temperature=0)):
        I_projected = model.project(cls_tokens)
        x, log_p, expected = model.input_ids(example, I_projected), 0.0, []
        for _ in range(8):
            tokens = pack([x + expected], [1])
            h = model.llama(model.embed(tokens.ids, I_projected), tokens)
            log = model.llama.logits(h).log_softmax(-1)[0]
            log_p += log.max().item()
            if log.argmax() == model.tokenizer.eos_id:
                break
            expected.append(log.argmax().item())
        assert ids == expected
        assert probability == pytest.approx(math.exp(log_p), rel=1e-4)


def test_examples_that_end_leave_the_batch_and_change_nothing(model, batch, monkeypatch):
    """Answers of very different lengths, forced token by token, so that the cache is compacted on the way."""
    examples, cls_tokens = batch
    eos = model.tokenizer.eos_id
    forced = [[7, eos], [8, 9, 10, 11, 12, eos], [7, 8, eos], [9, 9, 9, 9, 9, 9, eos]]
    uniform = [(b + 0.5) / 10 for b in range(4)]        # tells which example a row of the cache belongs to
    step, rows_of_steps = [0], []

    def nucleus(logits, temperature, top_p, draws):
        rows_of_steps.append([uniform.index(u) for u in draws])
        step[0] += 1
        return torch.tensor([(forced[b] + [eos] * 9)[step[0] - 1] for b in rows_of_steps[-1]])

    class Always:
        def __init__(self, seed):
            self.seed = seed

        def random(self):
            return uniform[self.seed]

    monkeypatch.setattr(eiven, "nucleus", nucleus)
    monkeypatch.setattr(eiven.random, "Random", Always)
    found = model.generate(examples, cls_tokens, [0, 1, 2, 3], limit=8)
    assert [ids for ids, _ in found] == [ids[:-1] for ids in forced]
    assert [len(rows) for rows in rows_of_steps] == [4, 4, 4, 2, 2, 2, 1] and rows_of_steps[3] == [1, 3]
    for example, (_, p), answer in zip(examples, found, forced):
        expected = answer_log_probs(model, example._replace(answer=answer), cls_tokens).sum().exp()
        assert p == pytest.approx(expected.item(), rel=1e-4)


def test_an_answer_ends_where_the_model_has_no_more_positions(model, monkeypatch):
    """30 positions: a prompt of 27 ids and the begin token leaves 2 for the answer, one of 2 leaves all of the limit."""
    monkeypatch.setattr(eiven, "nucleus", lambda logits, temperature, top_p, draws: torch.full((len(logits),), 9))
    assert model.generate([Encoded((), [5, 6], [])])[0][0] == [9] * 32          # the limit that nobody gave
    config = dataclasses.replace(model.llama.config, max_position_embeddings=30)
    monkeypatch.setattr(model.llama, "config", config)
    prompts = [[5] * 27, [5, 6], [7, 8], [5] * 28]
    found = model.generate([Encoded((), prompt, []) for prompt in prompts], limit=8)
    assert [ids for ids, _ in found] == [[9] * 2, [9] * 8, [9] * 8, [9]]
    for prompt, (ids, p) in zip(prompts, found):
        assert p == pytest.approx(answer_log_probs(model, Encoded((), prompt, ids), None).sum().exp().item(), rel=1e-4)
    for call in (model.generate, lambda batch: model.score(batch, [[[9, 2]]])):
        with pytest.raises(UserError, match="this LLaMA was trained to read 30 at most"):
            call([Encoded((), [5] * 29, [])])


def test_logits_that_are_not_finite_are_an_error(model, batch):
    examples, cls_tokens = batch
    model.llama.embed_tokens.weight.data[examples[0].prompt[3]] = float("inf")
    with pytest.raises(FloatingPointError, match="not finite"):
        model.generate(examples, cls_tokens)
    with pytest.raises(FloatingPointError, match="not finite"):
        model.score(examples, [[e.answer] for e in examples], cls_tokens)


def test_frozen_weights_are_the_reason_only_where_they_are_not_finite(model):
    model.llama.layers[1].adapter.up_bias.data[3] = float("inf")        # a learning rate that is too high does this
    check_frozen(model.llama, "folder")
    model.llama.layers[2].mlp.up_proj.weight.data[3, 4] = float("-inf")
    with pytest.raises(UserError, match="folder: the weights are damaged: layers.2.mlp.up_proj.weight holds NaN or infinity"):
        check_frozen(model.llama, "folder")


def test_scores_are_those_of_each_answer_alone(model, batch):
    """Answers that begin alike, of different lengths: by the plain model, each alone."""
    examples, cls_tokens = batch
    randomize(model)
    eos = model.tokenizer.eos_id
    candidates = [[[5, 6, eos], [5, 6, 7, eos], [9, eos], [5, eos]], [[7, eos]], [[8, 9, 9, 9, 9, eos], [8, 9, eos]], [[7, eos], [6, eos]]]
    found = model.score(examples, candidates, cls_tokens)
    for example, several, log_p in zip(examples, candidates, found, strict=True):
        expected = [answer_log_probs(model, example._replace(answer=R), cls_tokens).sum().item() for R in several]
        assert log_p == pytest.approx(expected, rel=1e-4)


def test_merged_answers_are_the_same(model, batch):
    examples, cls_tokens = batch
    randomize(model)
    before = answers(model, examples, cls_tokens)
    loss = model(examples, cls_tokens)
    model.merge_adapters()
    torch.testing.assert_close(model(examples, cls_tokens), loss, rtol=1e-5, atol=1e-5)
    assert [ids for ids, _ in answers(model, examples, cls_tokens)] == [ids for ids, _ in before]


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


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    """Four tokens of exactly 0.25: two of them reach top-p 0.5, so the third is never drawn."""
    assert {nucleus(torch.zeros(1, 4), 1.0, 0.5, [u / 100]).item() for u in range(100)} == {0, 1}
    assert nucleus(torch.zeros(1, 4), 1.0, 0.5, [1 - 2 ** -53]).item() == 1     # 1.0 in fp32
    assert [nucleus(torch.zeros(1, 4), 1.0, 1.0, [u]).item() for u in (0, 0.25, 0.5, 0.75)] == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------ files


def test_what_was_trained_is_saved_and_read_back(model, batch, tmp_path, llama_dir):
    randomize(model)
    model.save(tmp_path / "adapter.safetensors")
    other = EIVEN(*load_llama(llama_dir, torch.float32), V, "rep", 4, 6)
    other.load(tmp_path / "adapter.safetensors")
    assert torch.equal(other(*batch), model(*batch))
    size = sum(p.numel() for p in model.trainable_parameters().values()) * 4
    assert size < (tmp_path / "adapter.safetensors").stat().st_size < size + 4000       # nothing frozen is in it


def test_another_adapter_does_not_load(model, tmp_path, llama_dir):
    model.save(tmp_path / "adapter.safetensors")
    other = EIVEN(*load_llama(llama_dir, torch.float32), V, "mlp", 4, 6)
    with pytest.raises(UserError, match=r"adapters.0.up_weight is \(2, 16, 2\) in the file and \(1, 32, 4\) in the model"):
        other.load(tmp_path / "adapter.safetensors")
    without = EIVEN(*load_llama(llama_dir, torch.float32), None, "rep", 4)
    with pytest.raises(UserError, match="projector.* is .* in the file and absent in the model"):
        without.load(tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("change, said", [
    (lambda t: t["projector.up.bias"].fill_(float("nan")), "projector.up.bias holds NaN or infinity; was it trained"),
    (lambda t: t["adapters.2.up_bias"][3:4].fill_(float("inf")), "adapters.2.up_bias holds NaN or infinity"),
    (lambda t: t.update({"adapters.0.up_bias": torch.ones(1)}), r"adapters.0.up_bias is \(1,\) in the file and \(32,\) in"),
    (lambda t: t.update({"adapters.0.up_bias": torch.ones(32, dtype=torch.int32)}), "is torch.int32 in the file and"),
])
def test_a_damaged_adapter_does_not_load(model, tmp_path, change, said):
    model.save(tmp_path / "adapter.safetensors")
    tensors = load_file(tmp_path / "adapter.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter.safetensors")
    before = copy.deepcopy(model.trainable_parameters())
    with pytest.raises(UserError, match=said):
        model.load(tmp_path / "adapter.safetensors")
    assert all(torch.equal(p, before[name]) for name, p in model.trainable_parameters().items())


@pytest.mark.parametrize("shard_bytes", [10 ** 9, 20_000])
def test_an_export_is_an_ordinary_llama(model, batch, tmp_path, llama_dir, shard_bytes, monkeypatch):
    """transformers reads it, gets image tokens by the README's lines, and gives our merged logits."""
    transformers = pytest.importorskip("transformers")
    import safetensors.torch
    monkeypatch.setattr(export, "SHARD_BYTES", shard_bytes)
    examples, cls_tokens = batch
    randomize(model)
    with torch.no_grad():
        unmerged = model.answer_logits(examples, cls_tokens)
        merged = model.merge_adapters().answer_logits(examples, cls_tokens)
        torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
    readme = export.export_readme(model, (3, 6), text=True)
    export.export(model, llama_dir, tmp_path / "out", readme)
    assert (len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3) == (shard_bytes < 10 ** 9)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    scope = {"torch": torch, "safetensors": safetensors, "llama": peer}
    lines = [line.strip() for line in (tmp_path / "out" / "README.md").read_text().splitlines() if line.startswith("    ")]
    monkeypatch.chdir(tmp_path / "out")
    theirs = []
    with torch.no_grad():
        for e in examples[:2]:                          # one photo each
            ids = torch.tensor([model.tokenizer.bos_id, *e.prompt, *e.answer[:-1]])
            scope |= {"ids": ids, "cls": cls_tokens[0]}
            exec("\n".join(lines[1:8]), scope)
            theirs.append(peer(inputs_embeds=scope["x"][None]).logits[0, -len(e.answer):])
    expected = merged[:len(examples[0].answer) + len(examples[1].answer)]
    torch.testing.assert_close(torch.cat(theirs), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="exists already"):
        export.export(model, llama_dir, tmp_path / "out", readme)
    again, _ = load_llama(tmp_path / "out")     # and our own loader reads it
    assert again.config.attention_bias


def test_an_export_says_what_its_run_saw(model, tiny):
    assert "Context: {title}, {category}" in export.export_readme(model, (6,), text=True)
    alone = export.export_readme(model, (6,), text=False)
    assert "Context" not in alone and "(1, 24), the [cls] after ViT layer 6\n" in alone
    texts = export.export_readme(model, (), text=True)
    assert "projector" not in texts and "image" not in texts
