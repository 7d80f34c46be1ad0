"""One product, followed: what is shown is what the model computed, whatever the run is like."""

import html.parser
import importlib
import re
import shutil
import sys
from operator import attrgetter

import pytest
import torch
from conftest import command, held, randomize, train_run

import evaluate
from base.console import UserError, printable
from base.tsv import read_tsv
from data import Product, base_question, read_split
from eiven import nucleus
from llama import Tokenizer
from tools import explain, explain_page


@pytest.fixture
def loaded(run):
    return evaluate.load(run)


@pytest.fixture(scope="module")
def product(data_root):
    return read_split(data_root, "shoes", "test")[0]


class Tags(html.parser.HTMLParser):
    """Every tag that is opened is closed, in order, and nothing is loaded or run; collects the text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text = [], ""
        self.feed(page)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert tag != "script" and not {"href", "onload"} & dict(attributes).keys()
        assert dict(attributes).get("src", "data:image/").startswith("data:image/")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


# ---------------------------------------------------------------------------------------- what is recorded


def record(attention, projection):
    """Lists that get the values (..., S, width) and the inputs of the output projection of each call."""
    values, outputs = [], []
    attention.v_proj.register_forward_hook(lambda m, x, y: values.append(y))
    projection.register_forward_pre_hook(lambda m, x: outputs.append(x[0]))
    return values, outputs


def check_output(weights, v, out):
    """Attention weights (H, S) times values (S, G·d) are what the output projection reads, (H·d)."""
    v = v.unflatten(-1, (-1, len(out) // len(weights)))
    v = v.repeat_interleave(len(weights) // v.shape[1], dim=1)
    torch.testing.assert_close(torch.einsum("hs,shd->hd", weights, v).flatten(), out, atol=1e-5, rtol=1e-4)


def test_the_weights_times_the_values_are_the_output_of_every_llama_layer(loaded, product, monkeypatch):
    """At the answering position; the tiny LLaMA has grouped heads."""
    layers = randomize(loaded.model).llama.layers
    recorded = [record(block.self_attn, block.self_attn.o_proj) for block in layers]
    step, shown = explain_page.layers_step, []
    monkeypatch.setattr(explain_page, "layers_step", lambda *a: shown.extend(a) or step(*a))
    _, steps = explain.explain(loaded, product)
    _, attention, changes = shown
    assert len(attention) == len(changes) == 3 and all(change > 0 for change in changes)
    for weights, (values, outputs) in zip(attention, recorded):
        check_output(weights, values[0], outputs[0][-1])
    assert steps[4].lines[0].split() == ["layer", "begin", "I′1", "I′2", "Q", "C", "Answer:", "adapter"]
    for line in steps[4].lines[1:]:
        assert sum(float(share[:-1]) for share in line.split()[1:-1]) == pytest.approx(100, abs=0.5)


def test_the_weights_times_the_values_are_the_output_of_the_vit_layers(loaded, product):
    modules = [loaded.photo_features.vit.layers[layer - 1].self_attn for layer in (3, 6)]
    recorded = [record(module, module.out_proj) for module in modules]
    photo, attention = explain.look(loaded.photo_features, product)
    assert list(attention) == [3, 6] and photo.shape == (32, 32, 3)
    for weights, ([values], [outputs]) in zip(attention.values(), recorded):
        check_output(weights, values[0], outputs[0, 0])


def test_answers_are_those_of_predictions_tsv_and_nothing_is_left_behind(loaded, run, data_root):
    products = read_split(data_root, "shoes", "test")
    for product, (_, line) in zip(products[:5], read_tsv(run / "predictions.tsv")):
        answer, _ = explain.explain(loaded, product)
        assert (product.id, answer.value) == (line["id"], line["prediction"])
        assert answer.probability == pytest.approx(float(line["probability"]), abs=1e-4)
    modules = [*loaded.model.modules(), *loaded.photo_features.vit.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


@pytest.mark.parametrize("temperature, top_p", [(3.0, 0.5), (0, 0.75)])
def test_the_shown_nucleus_is_the_one_that_is_drawn_from(temperature, top_p, tokenizer_file):
    """Uniform numbers all over the bar draw as many tokens as it says, and in its order."""
    tokenizer = Tokenizer(tokenizer_file)
    logits = torch.randn(tokenizer.vocab_size, generator=torch.Generator().manual_seed(3)) * 4
    seen = {}
    for uniform in torch.linspace(0.0005, 0.9995, 500).tolist():
        drawn = int(nucleus(logits[None], temperature, top_p, [uniform]))
        seen[explain_page.token_text(drawn, tokenizer)] = None
    step = explain_page.draws_step([(logits, uniform, drawn)], temperature, top_p, tokenizer)
    assert f"nucleus of {len(seen)};" in step.lines[0]
    assert step.lines[0].startswith(f" 1. {[*seen][-1]} {logits.softmax(-1)[drawn]:.3f}  (draw 0.999")
    assert "".join([*seen][:explain_page.LIKELIEST]) in Tags(step.picture).text


@pytest.mark.parametrize("text", [True, False])
def test_tokens_are_labelled_with_their_parts(tokenizer_file, text):
    """In a title with the words that part X, and with bytes that have no token."""
    tokenizer = Tokenizer(tokenizer_file)
    product = Product("", "", "Shoes", "Context: Answer: black 靴", "Boot Style", "")
    tokens = explain.label_prompt(tokenizer.encode(base_question(product, text).prompt), text, tokenizer)
    joined = {"Q": "", "C": "", "Answer:": ""}
    for token, part in tokens:
        joined[part] += re.sub("<0x(..)>", lambda code: chr(int(code[1], 16)), token.replace("▁", " "))
    assert joined["Q"].strip() == "Question: What is the Boot Style of this product?↵"
    assert joined["Answer:"] == "Answer:"
    assert joined["C"] == "Context: Context: Answer: black \xe9\x9d\xb4, Shoes↵" * text


# ---------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("more", ["", "--no-image", "--no-text --features single"])
def test_every_kind_of_run_is_explained(more, flags, tmp_path):
    run = train_run(tmp_path / "run", flags, "--epochs", 1, *more.split())
    done = command("-m tools.explain", [run, "B0041"], tmp_path)
    assert held(done) is None and done.code == 0, done.err
    [page] = (run / "explain").iterdir()
    assert done.out.endswith(f"as a page: {page}\n") and page.name == "B0041-Boot-Style.html"
    text = Tags(page.read_text(encoding="utf-8")).text
    numbers = re.findall(r"^(\d)\. ", done.out, re.MULTILINE)
    assert numbers == list("4567" if "--no-image" in more else "1234567")
    assert all(f"{number}. " in text for number in numbers)
    assert ("     C  " in done.out) == ("--no-text" not in more)
    [line] = [row for _, row in read_tsv(run / "predictions.tsv") if row["id"] == "B0041"]
    assert f"{line['prediction']}  (probability {float(line['probability']):.2f})" in text
    assert f"the gold value is {line['attribute_values']}" in text or "which is right" in text


def test_what_comes_from_outside_is_escaped_and_functions_that_are_named_exist(loaded, product):
    bad = "<script>alert('1')</script> & \""
    product = Product(bad, product.image, bad, bad, "<i>", "<u>")
    _, steps = explain.explain(loaded, product)
    page = explain_page.page_html(product, steps, bad)
    Tags(page)
    assert "<u>" not in page and "<i>:" not in page
    for step in steps:
        for code in step.code.split(", "):
            file, name = code.split(".py: ")
            assert callable(attrgetter(name)(importlib.import_module(file)))
    lines = explain_page.summary(product, [steps[-1]._replace(lines=["a\x1b[2Jb\n"])])
    assert all(line.isprintable() for line in lines)


# ---------------------------------------------------------------------------------------- the command


def test_a_product_of_any_split_or_from_flags_has_a_page(run, data_root, tmp_path, monkeypatch, capsys):
    """B0001 is in train."""
    run = shutil.copytree(run, tmp_path / "run")
    one = data_root / "images" / "B0041.jpg", "black boot, Shoes", "boot style"

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["explain", str(run), *arguments])
        explain.main()

    main("B0001", "--attribute", "boot style")
    main("--image", str(one[0]), "--text", one[1], "--attribute", one[2])
    pages = {path.name for path in (run / "explain").iterdir()}
    assert pages == {"B0001-Boot-Style.html", "-Boot-Style.html"}
    said = capsys.readouterr().out.partition("product: Boot Style\n")[2]
    assert f"     {printable(evaluate.load(run).answer(*one))}\n" in said and "gold" not in said
    for unknown in ["B9"], ["B0001", "--attribute", "Heel Height"]:
        with pytest.raises(UserError, match="no product of shoes has this ID"):
            main(*unknown)
