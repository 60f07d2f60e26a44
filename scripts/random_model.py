#!/usr/bin/env python3
"""Writes a GGUF of the llama architecture with random weights in Q4_K: a model of a real one's size without its download.

    random_model.py SHAPE OUTPUT.gguf      SHAPE: mha-7b (32 layers of 32 heads of 128), gqa-8b (32 layers, 8 KV heads), or gqa-small (2 such
                                           layers with little else, for tests)

The vocabulary is byte level and small, so that any text can be tokenized and logits cost nothing. Blocks of random bits with
scales for weights of deviation 1/sqrt(n_in): what the model says is noise, what it costs to run and to convert is not.
All matrices are cut from one bank of blocks, each at another place, no matrix with a block twice where the bank is as large.
4 to 5 GB are written in about a minute.
"""
import math
import random
import struct
import subprocess
import sys
from pathlib import Path

from llama import until_said

SHAPES = {
    "mha-7b": {"n_layer": 32, "n_embd": 4096, "n_head": 32, "n_head_kv": 32, "n_ff": 11008},
    "gqa-8b": {"n_layer": 32, "n_embd": 4096, "n_head": 32, "n_head_kv": 8, "n_ff": 14336},
    "gqa-small": {"n_layer": 2, "n_embd": 4096, "n_head": 32, "n_head_kv": 8, "n_ff": 1024},
}
F32, Q4_K = 0, 12  # ggml_type
BLOCK, BLOCK_BYTES = 256, 144
ALIGNMENT = 32
BANK_BLOCKS = 1 << 18


def gguf_string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


class I32(int):
    """An integer that GGUF has as i32; others are u32."""


def gguf_value(value):
    """Type and bytes of a value; lists are arrays of their first element's type."""
    if isinstance(value, str):
        return 8, gguf_string(value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, I32):
        return 5, struct.pack("<i", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    kinds = [gguf_value(v) for v in value]
    return 9, struct.pack("<IQ", kinds[0][0], len(kinds)) + b"".join(k[1] for k in kinds)


def byte_level_alphabet():
    """A printable character for each byte, as byte-level BPE vocabularies write them (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b if b in printable else next(spare)) for b in range(256)]


def q4_k_bank(n_in):
    """Blocks of [d, dmin, 12 bytes of 6-bit scales and minima, 128 bytes of 4-bit codes]: about uniform, deviation 1/sqrt(n_in)."""
    # all scales and minima 32: six bits in each of the first eight bytes, the last four sub-blocks' high bits above them
    scales = bytes([32 | 0x80] * 8 + [0] * 4)
    step = math.sqrt(12 / n_in) / 15 / 32
    head = struct.pack("<ee", step, 7.5 * step) + scales
    generator = random.Random(n_in)
    return b"".join(head + generator.randbytes(BLOCK_BYTES - len(head)) for _ in range(BANK_BLOCKS))


def projection(out, n_layer, n_head_kv, group_size, bits, load=None):
    """Writes a projection file of random bases (examples/random_projection.rs) for heads of 128: status, and what was said. load() is what a
    program says that loads the model with it: a file names its model, and the message about a wrong one names the right one."""
    example = Path(__file__).resolve().parent.parent / "target" / "release" / "examples" / "random_projection"

    def write(identity):
        command = [example, out, "llama", identity, n_layer, n_head_kv, 128, group_size, bits]
        r = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return r.returncode, r.stdout

    status, said = write("0")
    if status != 0 or not load:
        return status, said
    said, found = until_said(r"this model is ([0-9a-f]{16})", load, attempts=10)
    return write(found[1]) if found else (1, said)


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(__doc__)
    shape, path = SHAPES[sys.argv[1]], sys.argv[2]
    n_embd, head_dim = shape["n_embd"], shape["n_embd"] // shape["n_head"]
    tokens = byte_level_alphabet()
    tokens += [f"<unused{i}>" for i in range(512 - len(tokens))]
    keys = {
        "general.architecture": "llama",
        "general.name": f"random {sys.argv[1]}",
        "llama.block_count": shape["n_layer"],
        "llama.context_length": 131072,
        "llama.embedding_length": n_embd,
        "llama.feed_forward_length": shape["n_ff"],
        "llama.attention.head_count": shape["n_head"],
        "llama.attention.head_count_kv": shape["n_head_kv"],
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [I32(1)] * len(tokens),
        # a vocabulary without merges is refused: one that joins two spaces, which become bytes no other way
        "tokenizer.ggml.merges": [f"{tokens[32]} {tokens[32]}"],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    tensors = [("token_embd.weight", [n_embd, len(tokens)], Q4_K), ("output_norm.weight", [n_embd], F32)]
    tensors += [("output.weight", [n_embd, len(tokens)], Q4_K)]
    n_kv = shape["n_head_kv"] * head_dim
    for i in range(shape["n_layer"]):
        matrices = {
            "attn_q": [n_embd, n_embd], "attn_k": [n_embd, n_kv], "attn_v": [n_embd, n_kv], "attn_output": [n_embd, n_embd],
            "ffn_gate": [n_embd, shape["n_ff"]], "ffn_up": [n_embd, shape["n_ff"]], "ffn_down": [shape["n_ff"], n_embd],
        }
        tensors += [(f"blk.{i}.{name}.weight", ne, Q4_K) for name, ne in matrices.items()]
        tensors += [(f"blk.{i}.{name}.weight", [n_embd], F32) for name in ("attn_norm", "ffn_norm")]

    def n_bytes(ne, kind):
        n = math.prod(ne)
        return 4 * n if kind == F32 else n // BLOCK * BLOCK_BYTES

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for key, value in keys.items():
        kind, data = gguf_value(value)
        head += gguf_string(key) + struct.pack("<I", kind) + data
    offset = 0
    for name, ne, kind in tensors:
        head += gguf_string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)
        offset += -(-n_bytes(ne, kind) // ALIGNMENT) * ALIGNMENT
    banks = {n: q4_k_bank(n) for n in {ne[0] for _, ne, kind in tensors if kind == Q4_K}}
    generator = random.Random(1)
    with open(path, "wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for name, ne, kind in tensors:
            if kind == F32:
                file.write(struct.pack("<f", 1.0) * ne[0])
            else:
                bank, left = banks[ne[0]], math.prod(ne) // BLOCK
                at = generator.randrange(BANK_BLOCKS)
                while left > 0:
                    n = min(left, BANK_BLOCKS - at)
                    file.write(memoryview(bank)[at * BLOCK_BYTES:(at + n) * BLOCK_BYTES])
                    at, left = 0, left - n
            file.write(bytes(-file.tell() % ALIGNMENT))
    print(f"wrote {path}: {sum(n_bytes(ne, kind) for _, ne, kind in tensors) / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
