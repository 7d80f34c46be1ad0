"""The method against its equations, which experiments/plain.py writes out in the plainest way."""

import dataclasses
import math

import pytest
import torch
from conftest import randomize
from random_weights import write_llama
from safetensors.torch import load_file
from test_llama import close

from adapters import KINDS
from base.console import UserError
from base.packing import pack
from data import Encoded
from eiven import EIVEN, cls_layers, nucleus
from experiments.plain import answer_log_probs
from llama import LLAMA_7B, LLaMA, load_llama

V, K = 24, 2
EOS = 2
CLS_TOKENS = torch.randn(3, K, V, generator=torch.Generator().manual_seed(5))
# None, one or two photos, and answers of different lengths; the first two begin alike.
EXAMPLES = [Encoded((0,), [5, 9, 17, 30], [60, 61, EOS]), Encoded((0,), [5, 9, 8], [60, EOS]),
            Encoded((1, 2), [7, 7, 7, 9, 12, 13, 14, 15], [61, 62, 63, 64, EOS]),
            Encoded((), [44, 45], [60, EOS])]


@pytest.fixture
def build(llama_dir):
    """build(kind): EIVEN on a tiny LLaMA of its own."""
    def new(kind="rep"):
        return EIVEN(*load_llama(llama_dir, torch.float32), V, kind, 4, projector_dim=6)
    return new


@pytest.fixture
def model(build):
    return randomize(build())


# ---------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("examples, cls_tokens", [(EXAMPLES, CLS_TOKENS), (EXAMPLES[3:], None)],
                         ids=["photos", "no photos"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_equation(build, kind, examples, cls_tokens):
    """With checkpointing, too: without photos nothing before the first adapter has a gradient."""
    model = randomize(build(kind))
    trained = model.trainable_parameters()
    if cls_tokens is None:
        trained = {name: p for name, p in trained.items() if name.startswith("adapters")}
    by_hand = -sum(answer_log_probs(model, e, cls_tokens).sum() for e in examples) / len(examples)
    expected = torch.autograd.grad(by_hand, list(trained.values()))
    for checkpointed in (False, True):
        model.llama.grad_checkpoint = checkpointed
        loss = model(examples, cls_tokens)
        close(loss, by_hand)
        for ours, theirs in zip(torch.autograd.grad(loss, list(trained.values())), expected):
            assert theirs.any()
            close(ours / theirs.abs().max(), theirs / theirs.abs().max(), 1e-4)


def test_step_0_is_exactly_llama(build, tiny):
    llama, _ = tiny
    tokens = pack([EXAMPLES[0].prompt])
    plain = llama(llama.embed(tokens.ids), tokens)
    for kind in KINDS:
        model = build(kind)
        assert model.llama(model.embed(tokens.ids, None), tokens).equal(plain)


def test_adapters_and_projector_alone_are_trained(build):
    model = build()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert set(map(id, trained)) == set(map(id, model.trainable_parameters().values()))


@pytest.mark.parametrize("kind, count", [("rep", 1_704_192), ("mlp", 2_228_480), ("mlp-linear", 2_228_480)])
def test_trainable_parameters_at_7b(kind, count):
    with torch.device("meta"):
        trained = EIVEN(LLaMA(LLAMA_7B), None, adapter=kind).trainable_parameters()
    sizes = {"adapters": 0, "projector": 0}
    for name, p in trained.items():
        sizes[name.split(".")[0]] += p.numel()
    # I Wg + bg, I Wd + bd: 768 -> 128; Wu, bu: 128 -> 4096
    assert sizes == {"adapters": count, "projector": 2 * 98_432 + 528_384}


def test_cls_layers():
    assert cls_layers(12) == (3, 6, 9, 12)
    with pytest.raises(UserError, match="has 10 layers"):
        cls_layers(10)


ROW = Encoded((), [5, 6], [7, 2])


@pytest.mark.parametrize("call, said", [
    (lambda m: m([]), "batch is empty"),
    (lambda m: m([ROW._replace(answer=[])]), "has no answer"),
    (lambda m: m.generate([ROW], seeds=["a", "b"]), "2 seeds for 1 examples"),
    (lambda m: m.score([ROW._replace(answer=[])]), "has no answer"),
    (lambda m: m([ROW._replace(photos=(3,))], torch.ones(3, K, V)), r"holds 3 photos, .* \(3,\)"),
    (lambda m: m([ROW._replace(photos=(-1,))], torch.ones(3, K, V)), r"3 photos, .* \(-1,\)"),
    (lambda m: EIVEN(m.llama, m.tokenizer, None)([ROW], torch.ones(1, K, V)), "has no projector"),
])
def test_misuse_is_named(model, call, said):
    with pytest.raises(ValueError, match=said):
        call(model)


def test_what_is_too_long_is_named(model):
    for call, length in ((model, 2046), (model.generate, 2047)):
        with pytest.raises(UserError, match="2,049 tokens, .* at most 2,048"):
            call([ROW._replace(prompt=[5] * length)])


# ---------------------------------------------------------------------------------------- answers


def end_bias(model, ending):
    """Add `ending` to the logits of EOS."""
    model.llama.lm_head.bias = torch.nn.Parameter(ending * torch.eye(model.llama.config.vocab_size)[EOS])


@torch.no_grad()
@pytest.mark.parametrize("temperature, top_p, ending", [(0, 1.0, 2.2), (1.0, 0.95, 5.0)])
def test_answers_of_a_batch_are_those_given_alone_and_of_full_passes(model, temperature, top_p, ending):
    """Answers of different lengths end one after the other; observe sees each step."""
    model.llama.grad_checkpoint = True                  # for training alone: it would pass by the cache
    end_bias(model, ending)
    settings = {"temperature": temperature, "top_p": top_p, "limit": 8}
    seen = []

    def observe(logits, uniform, drawn, running):
        assert drawn.equal(nucleus(logits, temperature, top_p, uniform))
        seen.extend((b, drawn[b].item()) for b in running)

    together = model.generate(EXAMPLES, CLS_TOKENS, range(4), observe=observe, **settings)
    assert len({len(ids) for ids, _ in together}) > 1
    for i, (example, (ids, p)) in enumerate(zip(EXAMPLES, together)):
        assert model.generate([example], CLS_TOKENS, [i], **settings) == [(ids, pytest.approx(p, rel=1e-4))]
        answer = ids + [EOS] * (len(ids) < 8)
        assert [token for row, token in seen if row == i] == answer
        log_p = model.answer_logits([example._replace(answer=answer)], CLS_TOKENS).log_softmax(-1)
        assert p == pytest.approx(log_p[range(len(answer)), answer].sum().exp().item(), rel=1e-4)


def test_an_answer_ends_where_the_model_has_no_more_positions(model):
    """30 positions: with the begin token, a prompt of 27 ids leaves 2 for the answer."""
    end_bias(model, -99)
    assert [len(ids) for ids, _ in model.generate([ROW])] == [32]       # the limit that nobody gave
    model.llama.config = dataclasses.replace(model.llama.config, max_position_embeddings=30)
    batch = [ROW._replace(prompt=[5] * n) for n in (27, 2, 3, 28)]
    assert [len(ids) for ids, _ in model.generate(batch, limit=8)] == [2, 8, 8, 1]


def test_draws_are_those_of_the_seed_and_of_the_papers_settings(model):
    drawn = [model.generate(EXAMPLES[:1], CLS_TOKENS, [seed], temperature=2.0) for seed in ("a", "a", "b")]
    assert drawn[0] == drawn[1] != drawn[2]
    spelt_out = model.generate(EXAMPLES, CLS_TOKENS, [0] * 4, temperature=0.1, top_p=0.75, limit=32)
    assert model.generate(EXAMPLES, CLS_TOKENS) == spelt_out


def test_scores_are_those_of_each_answer_alone(model):
    """Answers that begin alike, of different lengths, by the plain model."""
    candidates = [[[5, 6, 2], [5, 6, 7, 2], [9, 2], [5, 2]], [[7, 2]], [[8, 9, 9, 9, 2], [8, 2]], [[7, 2]]]
    examples = [example._replace(answer=R) for example, answers in zip(EXAMPLES, candidates) for R in answers]
    for example, score in zip(examples, model.score(examples, CLS_TOKENS), strict=True):
        assert score == pytest.approx(answer_log_probs(model, example, CLS_TOKENS).sum().item(), rel=1e-4)


def test_embeddings_beyond_the_pieces_are_never_written(tiny_config, tokenizer_file, tmp_path):
    """16 more rows, which would win everywhere: as if they were not there."""
    pieces = tiny_config.vocab_size
    config = dataclasses.replace(tiny_config, vocab_size=pieces + 16)
    write_llama(tmp_path, config, tokenizer_file, torch.float32, std=0.2)
    model = randomize(EIVEN(*load_llama(tmp_path), V, "rep", 4, 6))
    model.llama.lm_head.bias = torch.nn.Parameter(50.0 * (torch.arange(pieces + 16) >= pieces))
    [(ids, p)] = model.generate(EXAMPLES[:1], CLS_TOKENS, limit=4)
    assert max(ids) < pieces
    [plain] = model.score([EXAMPLES[0]._replace(answer=ids)], CLS_TOKENS)
    assert p == pytest.approx(math.exp(plain), rel=1e-4)


@pytest.mark.parametrize("kind", ["rep", "mlp-linear"])
def test_merged_adapters_change_no_logit(build, kind):
    model = randomize(build(kind))
    before = model.answer_logits(EXAMPLES, CLS_TOKENS)
    close(model.merge_adapters().answer_logits(EXAMPLES, CLS_TOKENS), before, 1e-4)


def test_logits_that_are_not_finite_are_an_error(model):
    model.llama.embed_tokens.weight.data[EXAMPLES[0].prompt[3]] = float("inf")
    with pytest.raises(FloatingPointError, match="example 0 are not finite"):
        model.generate(EXAMPLES, CLS_TOKENS)
    with pytest.raises(FloatingPointError, match="not finite"):
        model.score(EXAMPLES, CLS_TOKENS)


# ---------------------------------------------------------------------------------------- nucleus


def nucleus_by_hand(p, top_p, u):
    """The most probable tokens until their sum reaches top_p; then along the number line to u of that sum."""
    kept, mass = [], 0.0
    for token in p.argsort(descending=True).tolist():
        if mass < top_p:
            kept.append(token)
            mass += p[token]
    position = u * mass
    for token in kept:
        position -= p[token]
        if position < 0:
            return token
    return kept[-1]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 0.75), (0.1, 0.75), (0.5, 0.3), (0.5, 1.0)])
def test_nucleus_is_that_of_the_definition(temperature, top_p):
    """Rows whose best token alone is the nucleus, and rows that are sorted, in one batch."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 9, generator=draw, dtype=torch.float64)
    uniform = torch.rand(200, generator=draw, dtype=torch.float64).tolist()
    p = (logits / temperature).softmax(-1)
    expected = [nucleus_by_hand(row, top_p, u) for row, u in zip(p, uniform)]
    assert nucleus(logits, temperature, top_p, uniform).tolist() == expected
    assert nucleus(logits, 0, top_p, uniform).equal(logits.argmax(-1))


@pytest.mark.parametrize("top_p, uniform, expected", [
    (0.5, [0, 0.49, 0.5, 0.99, 1 - 2 ** -53], [0, 0, 1, 1, 1]),         # the last is 1.0 in fp32
    (1.0, [0, 0.25, 0.5, 0.75], [0, 1, 2, 3]),
    (0.25, [0.99], [0]),
])
def test_nucleus_of_four_equal_tokens(top_p, uniform, expected):
    """Two of them reach top-p 0.5 exactly, so the third is never drawn."""
    assert nucleus(torch.zeros(len(uniform), 4), 1.0, top_p, uniform).tolist() == expected


# ---------------------------------------------------------------------------------------- files


def test_what_was_trained_is_saved_and_read_back(model, build, tmp_path):
    path = tmp_path / "adapter.safetensors"
    model.save(path, "run 1")
    other = build()
    other.load(path, "run 1")
    assert other(EXAMPLES, CLS_TOKENS).equal(model(EXAMPLES, CLS_TOKENS))
    assert set(load_file(path)) == set(model.trainable_parameters())    # nothing frozen is in it


def test_another_run_or_model_does_not_load(model, build, tmp_path):
    path = tmp_path / "adapter.safetensors"
    model.save(path, "run 1")
    with pytest.raises(UserError, match="of another run"):
        model.load(path, "run 2")
    with pytest.raises(UserError, match=r"up_weight is \(2, 16, 2\) here and \(1, 32, 4\) in the model"):
        build("mlp").load(path, "run 1")
