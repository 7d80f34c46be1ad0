"""One product, followed: what is recorded is what the model computed, and the page shows it, whatever the run is like."""

import csv
import html.parser
import importlib
import re
import sys

import pytest
import torch
from conftest import command, held, randomize

import eiven
import evaluate
import train
from base.console import UserError
from data import Product, read_split
from eiven import nucleus
from experiments.random_weights import VARIANTS
from llama import Tokenizer
from support import explain
from support.explain import answer_token, attention_weights, find_product, label_tokens, page_name, steps, summary
from support.explain_page import escape, heat_map, page_html, shown_photo
from vit import CLIP_MEAN, CLIP_STD


@pytest.fixture(scope="module")
def flags(data_root, llama_dir, vit_dir):
    return ["--data", str(data_root), "--dataset", "shoes", "--llama", str(llama_dir), "--vit", str(vit_dir),
            "--labels", "2", "--epochs", "1", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def run_folder(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.main([*flags, "--out", str(folder)])
    return folder


@pytest.fixture
def run(run_folder):
    return evaluate.load(run_folder, data_needed=True)


@pytest.fixture
def products(data_root):
    return read_split(data_root, "shoes", "test")


class Tags(html.parser.HTMLParser):
    """Every tag that is opened is closed, in order; collects the sources and all text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.text = [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        assert tag != "script"
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


# ------------------------------------------------------------------------------------------------ what is recorded


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_the_weights_times_the_values_are_the_output_of_every_llama_layer(variant, run, products, tmp_path, tokenizer_file):
    """The input of o_proj at the answering position, for grouped and other kinds of heads."""
    if variant:
        from dataclasses import replace

        from experiments.random_weights import write_llama
        from llama import load_llama
        write_llama(tmp_path / "llama", replace(run.model.llama.config, **VARIANTS[variant]), tokenizer_file, torch.float32,
                    std=0.2)
        run.model = eiven.EIVEN(*load_llama(tmp_path / "llama"), 24)
    model, values, outputs, handles = randomize(run.model), {}, {}, []
    for i, block in enumerate(model.llama.layers):
        attention = block.self_attn
        handles += [attention.v_proj.register_forward_hook(lambda m, x, y, i=i: values.setdefault(i, y)),
                    attention.o_proj.register_forward_pre_hook(lambda m, x, i=i: outputs.setdefault(i, x[0][-1]))]
    e = explain.explain(run, products[0])
    for handle in handles:
        handle.remove()
    assert len(e.attention) == len(e.changes) == 3
    for i, weights in enumerate(e.attention):
        v = values[i].unflatten(-1, (-1, model.llama.config.head_dim))                  # (N, G, d)
        v = v.repeat_interleave(len(weights) // v.shape[1], dim=1)
        torch.testing.assert_close(torch.einsum("hs,shd->hd", weights, v).flatten(), outputs[i], atol=1e-5, rtol=1e-4)
    for row in e.shares():
        assert list(row) == ["begin", "I′1", "I′2", "Q", "C", "Answer:"] and sum(row.values()) == pytest.approx(1)


def test_the_weights_times_the_values_are_the_output_of_the_vit_layers(run, products):
    vit, kept, handles = run.photo_features.vit, {}, []
    for depth in (3, 6):
        attention = vit.layers[depth - 1].self_attn
        handles += [attention.v_proj.register_forward_hook(lambda m, x, y, d=depth: kept.__setitem__((d, "v"), y[0])),
                    attention.out_proj.register_forward_pre_hook(lambda m, x, d=depth: kept.__setitem__((d, "out"), x[0][0, 0]))]
    e = explain.explain(run, products[0])
    for handle in handles:
        handle.remove()
    assert e.vit_layers == (3, 6) and e.pixels.shape == (3, 32, 32)
    for depth, weights in zip(e.vit_layers, e.cls_attention):
        assert weights.shape == (3, 1 + 16)
        v = kept[depth, "v"].unflatten(-1, (3, -1))                                     # (S, heads, d)
        torch.testing.assert_close(torch.einsum("hs,shd->hd", weights, v).flatten(), kept[depth, "out"], atol=1e-6, rtol=1e-4)


def test_embeddings_and_changes_are_those_of_the_modules(run, products):
    model = randomize(run.model)
    e = explain.explain(run, products[0])
    image = products[0].image
    assert torch.equal(e.I, run.photo_features.read_one(image))
    torch.testing.assert_close(e.I_projected, model.projector(e.I))
    x = model.embed(torch.tensor(model.input_ids(*encoded(run, products[0]))), e.I_projected[None])
    h = model.llama.layers[0].input_layernorm(x)
    expected = (model.llama.layers[0].adapter(h) - h).norm() / h.norm()
    assert e.changes[0] == pytest.approx(expected.item(), rel=1e-4) and len(e.tokens) == len(x)


def encoded(run, product):
    """(the product's question as ids without answer, I' of its photo), as EIVEN.generate gets them."""
    from data import base_question, encode_examples
    [example], [name] = encode_examples([base_question(product)], run.model.tokenizer)
    return example._replace(answer=()), run.model.projector(run.photo_features.read_one(name)[None])


@pytest.mark.parametrize("merged", [False, True])
def test_the_answers_are_those_of_predictions_tsv(run, run_folder, products, merged):
    if merged:
        run.model.merge_adapters()
    with open(run_folder / "predictions.tsv", encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file, dialect="excel-tab"))
    for product, line in zip(products[:5], written):
        e = explain.explain(run, product)
        assert (product.id, e.answer.value) == (line["id"], line["prediction"])
        assert e.answer.probability == pytest.approx(float(line["probability"]), abs=1e-4)
        chosen = [c for token in e.answer_tokens for c in token.choices if c.chosen]
        assert len(chosen) == len(e.answer_tokens)
        assert e.answer.probability == pytest.approx(torch.tensor([c.probability for c in chosen]).prod().item(), rel=1e-3)
        assert e.changes == [None] * 3 if merged else all(change > 0 for change in e.changes)


@pytest.mark.parametrize("temperature, top_p", [(0.1, 0.75), (0.7, 0.9), (1.0, 1.0), (3.0, 0.5), (0, 0.75)])
def test_the_shown_nucleus_is_the_one_that_is_drawn_from(temperature, top_p, tokenizer_file):
    """Every uniform number chooses the token whose part of the draw it lies in; tokens without a part are never chosen."""
    tokenizer = Tokenizer(tokenizer_file)
    logits = torch.randn(tokenizer.vocab_size, generator=torch.Generator().manual_seed(3)) * 4
    seen = set()
    for uniform in torch.linspace(0.0005, 0.9995, 100).tolist():
        chosen = int(nucleus(logits[None], temperature, top_p, [uniform]))
        token = answer_token(logits, uniform, chosen, temperature, top_p, tokenizer)
        [choice] = [c for c in token.choices if c.chosen]
        start, end = choice.share
        assert start <= uniform < end and choice.probability == pytest.approx(logits.softmax(-1)[chosen].item())
        assert [c.rank for c in token.choices][:10] == list(range(1, 11))
        assert sum(logits > logits[chosen]) + 1 == choice.rank
        seen.add(chosen)
    assert len(seen) <= token.nucleus and (token.nucleus == 1) == (temperature == 0 or len(seen) == 1)


def test_a_nucleus_by_hand(tokenizer_file):
    """Probabilities 0.5, 0.3 and 0.2 at top-p 0.75: two tokens, with 5/8 and 3/8 of the draw."""
    tokenizer = Tokenizer(tokenizer_file)
    logits = torch.full((tokenizer.vocab_size,), -1e9)
    logits[[300, 310, 320]] = torch.tensor([0.3, 0.5, 0.2]).log()
    token = answer_token(logits, 0.7, 300, 1.0, 0.75, tokenizer)
    assert token.nucleus == 2
    assert [(c.rank, c.share and pytest.approx(c.share), c.chosen) for c in token.choices[:3]] == [
        (1, (0, 0.625), False), (2, (0.625, 1), True), (3, None, False)]
    assert [c.probability for c in token.choices[:3]] == pytest.approx([0.5, 0.3, 0.2])


def test_attention_weights_by_hand():
    """Two query heads share one key head; scores ln 3 and 0 at d = 1 give 3/4 and 1/4."""
    q, k = torch.tensor([[1.0], [-1.0]]), torch.tensor([[[torch.tensor(3.0).log()]], [[0.0]]])
    torch.testing.assert_close(attention_weights(q, k), torch.tensor([[0.75, 0.25], [0.25, 0.75]]))


def test_nothing_is_left_behind(run, products):
    """No hook stays on any module, eiven.nucleus is the original, and answers do not change, after an error neither."""
    def hooked():
        modules = [*run.model.modules(), *run.photo_features.vit.modules()]
        return [m for m in modules if m._forward_hooks or m._forward_pre_hooks]

    before = explain.explain(run, products[1]).answer
    assert not hooked() and eiven.nucleus is nucleus
    run.model.llama.config = None
    with pytest.raises(AttributeError):
        explain.explain(run, products[1])
    run.model.llama.config = evaluate.load(run.folder).model.llama.config
    run.model.projector.up.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        explain.explain(run, products[1])
    assert not hooked() and eiven.nucleus is nucleus
    run.model.load(run.folder / "adapter.safetensors")
    assert explain.explain(run, products[1]).answer == before


def test_tokens_are_labelled_with_their_parts(run):
    """In a title with the words that part X, with bytes that have no token, and with none at all."""
    product = Product("", "", "Shoes", "Context: Answer: <b> 靴 \U0001f45e", "Boot Style", "")
    for text in (True, False):
        example = explain.base_question(product, text)
        ids = [run.model.tokenizer.bos_id, 0, 0, *run.model.tokenizer.encode(example.prompt)]
        e = explain.Explanation(product, "", 0.1, 0.75, I=torch.zeros(2, 24))
        tokens = label_tokens(ids, e, run.model.tokenizer, example)
        parts = list(dict.fromkeys(part for _, part in tokens))
        assert parts == ["begin", "I′1", "I′2", "Q", *(["C"] if text else []), "Answer:"]
        joined = {part: "".join(t for t, p in tokens if p == part) for part in parts}
        assert joined["Q"].replace("▁", " ").strip() == "Question: What is the Boot Style of this product?↵"
        assert joined["Answer:"] == "Answer:"
        if text:
            assert joined["C"].startswith("Context:▁Context:▁Answer:▁<b>") and joined["C"].endswith("Shoes↵")
            assert joined["C"].count("<0x") == 3 + 4    # the bytes of the two characters


def test_the_photo_is_shown_as_it_was():
    values = torch.arange(3 * 4 * 4).view(3, 4, 4) * 5
    pixels = (values / 255 - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    assert shown_photo(pixels).getpixel((1, 2)) == tuple(values[:, 2, 1].tolist())


def test_a_heat_map_goes_from_blue_over_white_to_vermillion():
    picture = heat_map(torch.tensor([[0.0] * 5, [-2.0, -9.0, 0.0, 1.0, 2.0]]), largest=2.0)
    assert [picture.getpixel((i, 1)) for i in range(5)] == [
        (0, 114, 178), (0, 114, 178), (255, 255, 255), (234, 174, 128), (213, 94, 0)]


# ------------------------------------------------------------------------------------------------ the page, the summary


@pytest.mark.parametrize("more, merge", [
    ([], False), ([], True), (["--no-image"], False), (["--no-text"], False), (["--features", "single"], False),
    (["--adapter", "mlp"], False), (["--adapter", "mlp-linear"], True), (["--dtype", "bf16"], False),
])
def test_every_kind_of_run_is_explained(more, merge, flags, tmp_path, data_root, monkeypatch, capsys):
    folder = tmp_path / "run"
    train.main([*flags, *more, "--out", str(folder)])
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(folder), "--explain", "B0041", *["--merge"] * merge])
    evaluate.main()
    out = capsys.readouterr().out.splitlines()
    assert len(out) <= 60 and max(map(len, out[:-1])) <= 100
    [page] = (folder / "explain").iterdir()
    assert out[-1] == f"as a page: {page}" and page.name.startswith("B0041-")
    tags = Tags(page.read_text(encoding="utf-8"))
    assert all(source.startswith(("data:image/", "#")) for source in tags.sources), "the page must need no other file"
    text, printed = "".join(tags.text), "\n".join(out)
    numbers = re.findall(r"^(\d)\. ", printed, re.MULTILINE)
    assert numbers == (list("4567") if "--no-image" in more else list("1234567"))
    for number in numbers:
        assert f"{number}. " in text
    assert ("merged" in printed and "merged" in text) == merge
    assert ("Context:" in "".join(printed.split())) == ("--no-text" not in more)
    with open(folder / "predictions.tsv", encoding="utf-8", newline="") as file:
        [line] = [row for row in csv.DictReader(file, dialect="excel-tab") if row["id"] == "B0041"]
    assert line["prediction"] in text and f"(probability {float(line['probability']):.2f})" in text
    assert f"the gold value is {line['attribute_values']}" in text or "which is right" in text


def test_functions_that_are_named_exist(run, products):
    for step in steps(explain.explain(run, products[0])):
        for code in step.code:
            file, name = code.split(": ")
            found = importlib.import_module(file.removesuffix(".py"))
            for part in name.split("."):
                found = getattr(found, part)
            assert callable(found)


def test_what_comes_from_outside_is_escaped(run, products, tmp_path):
    """Title, ID, attribute and gold value with HTML and quotes in them; half a pair of surrogates, from a file name."""
    assert escape("<\udce9>") == "&lt;?&gt;"
    run.folder = tmp_path
    bad = "<script>alert('1')</script> & \""
    hostile = Product(bad, products[0].image, bad, bad, "<i>", "<u>")
    e = explain.explain(run, hostile)
    page = page_html(e, steps(e), explain.verdict(e))
    assert "<script" not in page and "<i>" not in page.split("</h1>")[0].split("<h1>")[1] and "<u>" not in page
    Tags(page)
    explain.show(run, hostile)
    assert len(list((tmp_path / "explain").iterdir())) == 1


def test_a_long_title_and_a_long_answer_stay_readable(run, products):
    long = Product("B" * 300, products[0].image, "", "boot " * 200, "Boot Style", "Chelsea")
    e = explain.explain(run, long, temperature=5.0, top_p=1.0)
    e.answer_tokens = e.answer_tokens * 8
    lines = summary(e)
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    page = page_html(e, steps(e), explain.verdict(e))
    assert "B" * 61 not in page and "boot boot" in page


def test_a_token_far_down_the_nucleus_lies_where_it_was_drawn(run, products):
    """The bar of a draw: each part from its start to its end, in per cent, also that of a token outside the ten likeliest."""
    e = explain.explain(run, products[0], temperature=5.0, top_p=1.0)
    far = next(c for token in e.answer_tokens for c in token.choices if c.chosen and c.rank > 10)
    start, end = far.share
    assert f"left: {100 * start:.2f}%; width: {100 * (end - start):.2f}%" in page_html(e, steps(e), "")


# ------------------------------------------------------------------------------------------------ finding, file names


ROWS = [Product("A", "", "", "", "Boot Style", "Combat"), Product("A", "", "", "", "Heel Height", "Flat"),
        Product("B", "", "", "", "Boot Style", "Chelsea"), Product("B", "", "", "", "Boot Style", "Combat")]


def test_a_product_is_found_by_id_and_attribute():
    assert find_product(ROWS, "A", "heel height", "test.tsv") is ROWS[1]
    assert find_product(ROWS, "B", None, "test.tsv") is ROWS[2]         # the same question twice: the first row


@pytest.mark.parametrize("given, attribute, said", [
    ("C", None, "--explain 'C': test.tsv has no product of this ID; it has, for example, A and B. Other splits: --split"),
    ("A", None, "test.tsv has 2 rows of this ID; choose one with --attribute: 'Boot Style', 'Heel Height'"),
    ("B", "Heel Height", "--explain 'B' --attribute 'Heel Height': test.tsv has no such row; this product has 'Boot Style'"),
    ("x" * 300, None, "--explain 'x{59}…': test.tsv has no"),
])
def test_a_product_that_is_not_found_is_one_line(given, attribute, said):
    with pytest.raises(UserError, match=said) as error:
        find_product(ROWS, given, attribute, "test.tsv")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_any_id_makes_a_safe_file_name_of_its_own(tmp_path):
    ids = ["B0041", "b0041", "../../etc/passwd", "a/b", "a\\b", "a-b", "靴" * 300, "x" * 300, "x" * 301, "", ".", "..", "CON",
           "a\0b", "\udce9", "e\u0301", "\u00e9"]
    names = [page_name(Product(i, "", "", "", "Boot Style", "")) for i in ids]
    names.append(page_name(Product("B0041", "", "", "", "Heel Height", "")))
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        (tmp_path / name).write_text("")
        assert (tmp_path / name).parent == tmp_path and len(name.encode()) < 200
    assert len(list(tmp_path.iterdir())) == len(names)


# ------------------------------------------------------------------------------------------------ the command


def test_a_product_from_flags_is_explained(run_folder, data_root, tmp_path):
    image = str(data_root / "images" / "B0041.jpg")
    arguments = [str(run_folder), "--image", image, "--text", "black boot, Shoes", "--attribute", "boot style"]
    answered = command("evaluate.py", arguments, tmp_path)
    explained = command("evaluate.py", [*arguments, "--explain"], tmp_path)
    assert held(explained) is None and explained.code == 0
    answer = answered.out.removeprefix("Boot Style: ").strip()
    assert f"     {answer}\n" in explained.out and "gold" not in explained.out
    assert "black" in explained.out.replace("▁", "") and explained.out.startswith("product: Boot Style\n")


@pytest.mark.parametrize("arguments, said", [
    (["--explain", "nobody"], "test.tsv has no product of this ID; it has, for example, B0041 and B0055"),
    (["--explain", "B0041", "--split", "val"], "val.tsv has no product of this ID"),
    (["--explain", "B0041", "--attribute", "Sleeve"], "this product has 'Boot Style'"),
    (["--explain"], "--explain follows one free answer: give the ID"),
    (["--explain", "--attribute", "Boot Style"], "give the ID of a product of the split, or --attribute with"),
    (["--explain", "--text", "a boot"], "give --attribute and --image or --text"),
    (["--explain", "--text", "a boot", "--attribute", "Boot Style"], "this run was trained with images: give --image"),
    (["--explain", "--image", "gone.jpg", "--attribute", "Boot Style"], "gone.jpg: there is no such file"),
    (["--explain", "B0041", "--text", "a boot"], "--explain follows one free answer"),
    (["--explain", "B0041", "--constrain"], "leave --input, --export, --constrain, --values and --min-confidence out"),
    (["--explain", "B0041", "--export", "out"], "leave --input, --export, --constrain, --values and --min-confidence out"),
])
def test_mistakes_are_one_line(run_folder, tmp_path, arguments, said):
    outcome = command("evaluate.py", [str(run_folder), *arguments], tmp_path)
    assert held(outcome) is None and outcome.code == 2 and said in outcome.err
    assert not (run_folder / "explain" / "nobody").exists()


def test_a_run_without_photos_takes_none(flags, data_root, tmp_path):
    train.main([*flags, "--no-image", "--out", str(tmp_path / "run")])
    outcome = command("evaluate.py", [str(tmp_path / "run"), "--explain", "--image", str(data_root / "images" / "B0041.jpg"),
                                      "--text", "a boot", "--attribute", "Boot Style"], tmp_path)
    assert held(outcome) is None and outcome.code == 2 and "(--no-image): leave --image out" in outcome.err
