#!/usr/bin/env python3
"""`make bench-cuda`: llama-bench and llama-batched-bench on an NVIDIA GPU with a model of an 8B's shape, stock caches beside palu, in one run.

usage: bench_cuda.py [--depths D,D,...] [--prompt N] [--gen N] [--repetitions N] [--rounds N] [--sequences N,N,...] [--each N]
                     [--seconds N] [--json FILE]

The model has random weights (q4_K) and the projection file random bases with the ranks and bits of a trained model's: speed and
memory are real, words are not. Prints Markdown; docs/performance.md holds what it printed, and where. The JSON file has every
sample, and grows with each measurement. --sequences: so many at once, of --each tokens, in streams of their own and in one
(--kv-unified, as llama-server has it). After --seconds, what is left is left out, the least telling measurements first.
PALU_LLAMA_BIN names the folder of llama.cpp's programs, if it is not build/llama.cpp/bin.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from random_model import projection

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("PALU_LLAMA_BIN", ROOT / "build" / "llama.cpp" / "bin"))
WORK = ROOT / "build" / "bench-cuda"
MODEL, PROJECTION = WORK / "8b.gguf", WORK / "8b.palu.gguf"
N_LAYER, N_HEAD_KV, HEAD_DIM = 32, 8, 128
BUDGETS = [2.25, 1.6]
GIB = 2**30

failed = []  # commands of llama-bench


def output(command, check=True):
    result = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if check and result.returncode != 0:
        sys.exit(f"bench-cuda: '{' '.join(map(str, command))}' failed with status {result.returncode}:\n{result.stdout[-2000:]}")
    return result.stdout


def prepare():
    WORK.mkdir(parents=True, exist_ok=True)
    output([sys.executable, ROOT / "scripts" / "random_model.py", "gqa-8b", MODEL])
    command = [BIN / "llama-completion", "-m", MODEL, "-no-cnv", "-p", "a", "-n", "1", "--palu", PROJECTION]
    status, said = projection(PROJECTION, N_LAYER, N_HEAD_KV, N_HEAD_KV, max(BUDGETS), lambda: output(command, check=False))
    if status != 0:
        sys.exit(f"bench-cuda: there is no projection file for the model:\n{said[-2000:]}")
    print(said, file=sys.stderr)


def bench(cache, seconds, *args):
    """One run of llama-bench: its results, one after the other, until the time is up."""
    command = [BIN / "llama-bench", "-m", MODEL, "-ngl", "99", "-fa", "1", "-o", "jsonl", *cache, *args]
    with subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), process.kill()))
        timer.daemon = True
        timer.start()
        errors = []
        reader = threading.Thread(target=lambda: errors.extend(process.stderr))
        reader.start()
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        process.wait()
        reader.join()
        timer.cancel()
    if process.returncode != 0 and not late.is_set():
        said = "".join(errors)[-2000:]
        print(f"bench-cuda: '{' '.join(map(str, command))}' failed with status {process.returncode}:\n{said}", file=sys.stderr, flush=True)
        failed.append(command)


def batched(cache, seconds, sequences, each, n_gen):
    """llama-batched-bench: its results, one for each of the numbers of sequences, until the time is up."""
    results, end = {}, time.monotonic() + seconds
    for _ in range(3): # the last lines of llama.cpp's log can be lost when a program ends
        left = [n for n in sequences if n not in results]
        if not left or time.monotonic() >= end:
            break
        command = [BIN / "llama-batched-bench", "-m", MODEL, "-ngl", "99", "-fa", "1", "-c", max(left)*(each + n_gen), "-b", 2048, "-ub", 512, "-npp", each,
                   "-ntg", n_gen, "-npl", ",".join(map(str, left)), "--output-format", "jsonl", *cache]
        try:
            run = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=end - time.monotonic())
        except subprocess.TimeoutExpired:
            break
        if run.returncode != 0:
            print(f"bench-cuda: '{' '.join(map(str, command))}' failed with status {run.returncode}:\n{run.stderr[-2000:]}", file=sys.stderr, flush=True)
            failed.append(command)
            break
        results |= {r["pl"]: r for r in map(json.loads, re.findall(r"^\{.*\}$", run.stdout, re.M))}
    return [results[n] for n in sequences if n in results]


def row(cells):
    print("| " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--depths", default="0,16384,65536,131072")
    parser.add_argument("--prompt", type=int, default=16384)
    parser.add_argument("--gen", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sequences", default="1,2,4,8")
    parser.add_argument("--each", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    sequences = [int(n) for n in args.sequences.split(",")]
    prepare()
    values = 2*N_LAYER*N_HEAD_KV*HEAD_DIM
    palu = [(f"palu {b:g}", b, ["--palu", PROJECTION, "--palu-bits", f"{b:g}"]) for b in BUDGETS]
    caches = [("f16", 16, []), ("q8_0", 8.5, ["-ctk", "q8_0", "-ctv", "q8_0"]), ("q4_0", 4.5, ["-ctk", "q4_0", "-ctv", "q4_0"]), *palu]
    arguments = {name: cache for name, _, cache in caches}
    prompt = ["-p", args.prompt, "-n", 0]
    # most of the time goes into filling the depths; the micro-batch, which decoding does not have, makes that faster
    decode = ["-p", 0, "-n", args.gen, "-d", args.depths, "-ub", 2048]
    order = [(name, what) for names in (["f16", palu[0][0]], [palu[1][0], "q4_0", "q8_0"]) for what in (decode, prompt) for name in names]
    samples, log = {}, []
    for name, what in order*args.rounds:
        left = end - time.monotonic()
        if left <= 0:
            print(f"bench-cuda: no time left for {name} {' '.join(map(str, what))}", file=sys.stderr)
            continue
        for r in bench(arguments[name], min(left, 1e6), *what, "-r", args.repetitions):
            key = ("prompt", r["n_prompt"]) if r["n_prompt"] else ("decode", r["n_depth"])
            samples.setdefault((name, key), []).extend(r["samples_ts"])
            log.append({"cache": name} | {k: r[k] for k in ("gpu_info", "model_type", "n_prompt", "n_gen", "n_depth", "n_ubatch", "samples_ts")})
            if args.json:
                args.json.write_text(json.dumps(log, indent=1) + "\n")
            print(f"{name} {key[0]} {key[1]}: {' '.join(f'{s:.1f}' for s in r['samples_ts'])}", file=sys.stderr, flush=True)
    for unified in (False, True):
        for name in ("f16", palu[0][0], palu[1][0]):
            left = end - time.monotonic()
            if left <= 0:
                print(f"bench-cuda: no time left for several sequences with {name}", file=sys.stderr)
                continue
            for r in batched([*arguments[name], *(["--kv-unified"] if unified else [])], min(left, 1e6), sequences, args.each, 2*args.gen):
                at = "in one stream" if unified else "in streams"
                for key, speed in (("decode", r["speed_tg"]), ("prompts", r["speed_pp"])):
                    samples.setdefault((name, (f"{key} {at}", r["pl"])), []).append(speed)
                log.append({"cache": name, "unified": unified} | r)
                if args.json:
                    args.json.write_text(json.dumps(log, indent=1) + "\n")
                print(f"{name} {r['pl']} sequences {at}: prompts {r['speed_pp']:.0f}, decode {r['speed_tg']:.1f}", file=sys.stderr, flush=True)
    keys = [("prompt", args.prompt)] + [("decode", int(d)) for d in args.depths.split(",")]

    def cell(name, key):
        if (name, key) not in samples:
            return "-"
        median = statistics.median(samples[name, key])
        return f"{median:.0f}" + (f" ({median/statistics.median(samples['f16', key]):.2f}x)" if ("f16", key) in samples else "")

    print("\nTokens per second, and the ratio to f16:\n")
    row(["cache", "bytes/token"] + [f"{what} {n}" if what == "prompt" else f"{what} @{n}" for what, n in keys])
    row(["---"]*(2 + len(keys)))
    for name, bits, _ in caches:
        row([name, f"{values*bits/8:.0f}"] + [cell(name, k) for k in keys])

    print(f"\nThe same for several sequences of {args.each} tokens at once, all together:\n")
    row(["cache"] + [str(n) for n in sequences])
    row(["---"]*(1 + len(sequences)))
    for what in ("decode in streams", "decode in one stream", "prompts in streams", "prompts in one stream"):
        for name in ("f16", palu[0][0], palu[1][0]):
            row([f"{what}, {name}"] + [cell(name, (what, n)) for n in sequences])

    # what fits: the weights, and one layer rebuilt as f16 while a prompt is processed, besides the cache
    weights = MODEL.stat().st_size
    print("\nLongest context in tokens, and slots of 32768 tokens, beside the weights (buffers of some 0.6 GiB left free):\n")
    row(["cache", "24 GiB", "80 GiB"])
    row(["---"]*3)
    for name, bits, cache in caches:
        per_token = values*bits/8 + (2*2*N_HEAD_KV*HEAD_DIM if "palu" in name else 0)
        fits = lambda size: int((size*GIB - weights - 0.6*GIB)/per_token)
        row([name] + [f"{fits(size)} ({fits(size)//32768} slots)" for size in (24, 80)])
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
