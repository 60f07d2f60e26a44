#!/usr/bin/env python3
"""`make bench-cuda`: llama-bench on an NVIDIA GPU with a model of an 8B's shape, stock caches beside palu, in one run.

usage: bench_cuda.py [--depths D,D,...] [--prompt N] [--rounds N]

The model has random weights (q4_K) and the projection file random bases with the ranks and bits of a trained model's: speed and
memory are real, words are not. Prints Markdown; docs/performance.md holds what it printed, and where.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / "build" / "llama.cpp" / "bin"
WORK = ROOT / "build" / "bench-cuda"
MODEL, PROJECTION = WORK / "8b.gguf", WORK / "8b.palu.gguf"
N_LAYER, N_HEAD_KV, HEAD_DIM = 32, 8, 128
BUDGETS = [2.25, 1.6]
GIB = 2**30


def output(command, check=True):
    result = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if check and result.returncode != 0:
        sys.exit(f"bench-cuda: '{' '.join(map(str, command))}' failed with status {result.returncode}:\n{result.stdout[-2000:]}")
    return result.stdout


def projection(identity):
    example = ROOT / "target" / "release" / "examples" / "random_projection"
    return output([example, PROJECTION, "llama", identity, N_LAYER, N_HEAD_KV, HEAD_DIM, N_HEAD_KV, max(BUDGETS)])


def prepare():
    WORK.mkdir(parents=True, exist_ok=True)
    output([sys.executable, ROOT / "scripts" / "random_model.py", "gqa-8b", MODEL])
    projection("0")
    # a projection file names its model; the message about a wrong one names the right one
    refused = output([BIN / "llama-completion", "-m", MODEL, "-no-cnv", "-p", "a", "-n", "1", "--palu", PROJECTION], check=False)
    identity = re.search(r"this model is ([0-9a-f]{16})", refused)
    if not identity:
        sys.exit(f"bench-cuda: the model was not identified:\n{refused[-2000:]}")
    print(projection(identity[1]), file=sys.stderr)


def bench(cache, *args):
    text = output([BIN / "llama-bench", "-m", MODEL, "-ngl", "99", "-fa", "1", "-o", "json", *cache, *args])
    results = json.loads(text[text.index("[\n"):text.rindex("]") + 1])
    return {("prompt", r["n_prompt"]) if r["n_prompt"] else ("decode", r["n_depth"]): r["samples_ts"] for r in results}


def row(cells):
    print("| " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--depths", default="0,16384,65536,131072")
    parser.add_argument("--prompt", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    prepare()
    values = 2*N_LAYER*N_HEAD_KV*HEAD_DIM
    caches = [("f16", 16, []), ("q8_0", 8.5, ["-ctk", "q8_0", "-ctv", "q8_0"]), ("q4_0", 4.5, ["-ctk", "q4_0", "-ctv", "q4_0"])]
    caches += [(f"palu {b:g}", b, ["--palu", PROJECTION, "--palu-bits", f"{b:g}"]) for b in BUDGETS]
    samples = {}
    for _ in range(args.rounds):
        for name, _, cache in caches:
            result = bench(cache, "-p", args.prompt, "-n", 0, "-r", 2)
            result |= bench(cache, "-p", 0, "-n", 64, "-d", args.depths, "-r", 2)
            for key, speeds in result.items():
                samples.setdefault((name, key), []).extend(speeds)
    keys = [("prompt", args.prompt)] + [("decode", int(d)) for d in args.depths.split(",")]
    median = lambda name, key: statistics.median(samples[name, key])
    print("\nTokens per second, and the ratio to f16:\n")
    row(["cache", "bytes/token"] + [f"{what} {n}" if what == "prompt" else f"{what} @{n}" for what, n in keys])
    row(["---"]*(2 + len(keys)))
    for name, bits, _ in caches:
        row([name, f"{values*bits/8:.0f}"] + [f"{median(name, k):.0f} ({median(name, k)/median('f16', k):.2f}x)" for k in keys])

    # what fits: the weights, and one layer rebuilt as f16 while a prompt is processed, besides the cache
    weights = MODEL.stat().st_size
    print("\nLongest context in tokens, and slots of 32768 tokens, beside the weights (buffers of some 0.6 GiB left free):\n")
    row(["cache", "24 GiB", "80 GiB"])
    row(["---"]*3)
    for name, bits, cache in caches:
        per_token = values*bits/8 + (2*2*N_HEAD_KV*HEAD_DIM if "palu" in name else 0)
        fits = lambda size: int((size*GIB - weights - 0.6*GIB)/per_token)
        row([name] + [f"{fits(size)} ({fits(size)//32768} slots)" for size in (24, 80)])


main()
