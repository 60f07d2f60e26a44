#!/usr/bin/env python3
"""The llama-bench part of `make bench`: prefill of 2048 tokens, and decoding at growing depth, for stock caches and palu.

Each figure is the median of llama-bench's repetitions; caches take turns, so that a change of the machine's speed meets all.
"""
import json
import statistics

from demo import BIN, BUDGETS, MODEL, PROJECTION, THREADS, convert, run, table

DEPTHS = [0, 512, 1024, 1536]
ROUNDS = 3
CACHES = [("f16", []), ("q8_0", ["-ctk", "q8_0", "-ctv", "q8_0"]), ("q4_0", ["-ctk", "q4_0", "-ctv", "q4_0"])]
CACHES += [(f"palu {b:g}", ["--palu", PROJECTION, "--palu-bits", f"{b:g}"]) for b in BUDGETS]


def bench(args, what):
    text = run([BIN / "llama-bench", "-m", MODEL, "-t", THREADS, "-fa", "1", "-o", "json", *args], what)
    return {(r["n_prompt"], r["n_depth"]): r["samples_ts"] for r in json.loads(text[text.index("[\n"):text.rindex("]") + 1])}


def main():
    convert()
    samples = {}
    for i in range(ROUNDS):
        for name, args in CACHES:
            result = bench([*args, "-p", "2048", "-n", "0", "-r", "3"], f"{name}: prefill, round {i + 1} of {ROUNDS}")
            depths = ",".join(map(str, DEPTHS))
            result |= bench([*args, "-p", "0", "-n", "64", "-d", depths, "-r", "3"], f"{name}: decode, round {i + 1} of {ROUNDS}")
            for key, values in result.items():
                samples.setdefault((name, key), []).extend(values)
    median = lambda name, key: statistics.median(samples[name, key])
    keys = [(2048, 0)] + [(0, d) for d in DEPTHS]
    cell = lambda name, key: f"{median(name, key):.0f} ({median(name, key) / median('f16', key):.2f}x)"
    print(f"\n{MODEL.name}, {THREADS} threads: tokens per second, and the ratio to the f16 cache\n")
    table(["cache", "prefill 2048"] + [f"decode @{d}" for d in DEPTHS], [[name] + [cell(name, k) for k in keys] for name, _ in CACHES])


main()
