#!/usr/bin/env python3
"""Writes a llama model of random weights in a real model's shape, for tests of size and speed. Needs numpy.

usage: random_model.py OUT.gguf [--shape 8b|7b] [--type q4_0|q4_k|q8_0] [--layers N] [--seed N]

  8b  32 layers, 32 heads over 8 KV heads of 128 dimensions (grouped queries), feed-forward 14336
  7b  32 layers, 32 heads of 128 dimensions (multi-head), feed-forward 11008

The vocabulary has 32768 tokens and no text: `palu convert --calibration self` and llama-bench need none. The same
arguments give the same file.
"""
import argparse
import struct
import sys

import numpy as np

SHAPES = {"8b": dict(n_head_kv=8, n_ff=14336), "7b": dict(n_head_kv=32, n_ff=11008)}
N_EMBD, N_HEAD, HEAD_DIM, N_VOCAB, N_CTX = 4096, 32, 128, 32768, 131072
ALIGN = 32

# ggml type, file type, values and bytes of a block, and how a block of standard deviation `std` is written over random bytes
F32 = 0


def f16(x):
    return np.frombuffer(np.float16(x).tobytes(), np.uint8)


def q4_0(blocks, std):
    blocks[:, 0:2] = f16(std/4.61)  # uniform on -8..7


def q8_0(blocks, std):
    blocks[:, 0:2] = f16(std/73.9)  # uniform on -128..127


def q4_k(blocks, std):
    # all scales and minima are 32 of 63: x = 32*d*q - 32*dmin
    blocks[:, 0:2] = f16(std/(32*4.61))
    blocks[:, 2:4] = f16(7.5*std/(32*4.61))
    blocks[:, 4:12] = 160
    blocks[:, 12:16] = 0


TYPES = {"q4_0": (2, 2, 32, 18, q4_0), "q8_0": (8, 7, 32, 34, q8_0), "q4_k": (12, 15, 256, 144, q4_k)}


def string(s):
    s = s.encode()
    return struct.pack("<Q", len(s)) + s


def key(name, value):
    if isinstance(value, str):
        return string(name) + struct.pack("<I", 8) + string(value)
    if isinstance(value, float):
        return string(name) + struct.pack("<If", 6, value)
    return string(name) + struct.pack("<II", 4, value)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("out")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--type", choices=TYPES, default="q4_k")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    shape, (ggml_type, file_type, block_values, block_bytes, fill) = SHAPES[args.shape], TYPES[args.type]
    n_embd_kv = shape["n_head_kv"]*HEAD_DIM

    keys = [
        ("general.architecture", "llama"), ("general.name", f"random {args.shape}"), ("general.file_type", file_type),
        ("llama.block_count", args.layers), ("llama.context_length", N_CTX), ("llama.embedding_length", N_EMBD),
        ("llama.feed_forward_length", shape["n_ff"]), ("llama.attention.head_count", N_HEAD),
        ("llama.attention.head_count_kv", shape["n_head_kv"]), ("llama.rope.dimension_count", HEAD_DIM),
        ("llama.rope.freq_base", 500000.0), ("llama.attention.layer_norm_rms_epsilon", 1e-5), ("llama.vocab_size", N_VOCAB),
        ("tokenizer.ggml.model", "no_vocab"),
    ]
    tensors = [("token_embd.weight", N_EMBD, N_VOCAB, 1.0)]
    for i in range(args.layers):
        w = lambda name, n_in, n_out: tensors.append((f"blk.{i}.{name}.weight", n_in, n_out, n_in**-0.5))
        tensors.append((f"blk.{i}.attn_norm.weight", N_EMBD, 0, 0.0))
        w("attn_q", N_EMBD, N_EMBD)
        w("attn_k", N_EMBD, n_embd_kv)
        w("attn_v", N_EMBD, n_embd_kv)
        w("attn_output", N_EMBD, N_EMBD)
        tensors.append((f"blk.{i}.ffn_norm.weight", N_EMBD, 0, 0.0))
        w("ffn_gate", N_EMBD, shape["n_ff"])
        w("ffn_up", N_EMBD, shape["n_ff"])
        w("ffn_down", shape["n_ff"], N_EMBD)
    tensors.append(("output_norm.weight", N_EMBD, 0, 0.0))
    tensors.append(("output.weight", N_EMBD, N_VOCAB, N_EMBD**-0.5))

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(key(*k) for k in keys)
    offset, sizes = 0, []
    for name, n_in, n_out, _ in tensors:
        size = n_in*4 if n_out == 0 else n_in*n_out//block_values*block_bytes
        dims = [n_in] if n_out == 0 else [n_in, n_out]
        head += string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
        head += struct.pack("<IQ", F32 if n_out == 0 else ggml_type, offset)
        sizes.append(size)
        offset += (size + ALIGN - 1)//ALIGN*ALIGN

    rng = np.random.Generator(np.random.SFC64(args.seed))
    with open(args.out, "wb") as f:
        f.write(head + bytes(-len(head) % ALIGN))
        for (name, n_in, n_out, std), size in zip(tensors, sizes):
            if n_out == 0:
                f.write(np.ones(n_in, np.float32).tobytes())
            else:
                blocks = np.frombuffer(rng.bytes(size), np.uint8).reshape(-1, block_bytes).copy()
                fill(blocks, std)
                f.write(blocks.tobytes())
            f.write(bytes(-size % ALIGN))
    print(f"{args.out}: {args.shape}, {args.type}, {(offset + len(head))/2**30:.2f} GiB", file=sys.stderr)


main()
