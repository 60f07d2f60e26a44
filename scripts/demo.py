#!/usr/bin/env python3
"""`make demo`: converts the bundled model, compares caches in the patched llama.cpp, and generates some text.

Every figure comes from llama-perplexity (KL divergence to the f16 cache over WikiText-2 test, -c 2048, 16 chunks) and
llama-bench. Results are kept in build/demo/ under the content of what made them, so that a second run starts at once.
"""
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("PALU_BUILD", ROOT / "build")).resolve()
BIN, OUT, DATA = BUILD / "llama.cpp" / "bin", BUILD / "demo", ROOT / "tests" / "data"
PALU = ROOT / "target" / "release" / "palu"
MODEL, CALIBRATION, TEXT = DATA / "wiki-mha-17m-q8_0.gguf", DATA / "calibration.wiki.txt", DATA / "wiki.test.raw"
PROJECTION, BASE = OUT / "wiki-mha-17m.palu.gguf", OUT / "f16.kld"
THREADS = str(len(os.sched_getaffinity(0)))
N_CTX, RECENT = 2048, 16  # tokens of a context, and those of them that are kept in f16 beside the rows
BUDGETS = [b - 16 * RECENT / N_CTX for b in (2.25, 1.6)]  # bits per value of rows: 14.1% and 10% of f16 in all
DEPTH = 1536


def digest(*paths_and_texts):
    h = hashlib.sha256()
    for item in paths_and_texts:
        h.update(item.read_bytes() if isinstance(item, Path) else str(item).encode())
    return h.hexdigest()[:16]


def run(command, what):
    """Runs a command quietly, saying what is done and for how long; its output on failure."""
    command = [str(c) for c in command]
    start, tty = time.time(), sys.stderr.isatty()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    os.set_blocking(process.stdout.fileno(), False)
    output = b""
    while process.poll() is None:
        output += process.stdout.read() or b""
        if tty:
            print(f"\r  {what} ... {time.time() - start:.0f} s", end="", file=sys.stderr, flush=True)
        time.sleep(0.1)
    output += process.stdout.read() or b""
    print(f"{chr(13) if tty else ''}  {what}: {time.time() - start:.1f} s", file=sys.stderr, flush=True)
    text = output.decode(errors="replace")
    if process.returncode != 0:
        sys.exit(f"demo: {' '.join(command)} failed with status {process.returncode}:\n{text[-2000:]}")
    return text


def cached(key, make):
    path = OUT / f"{key}.json"
    if not path.exists():
        result = make()
        path.write_text(json.dumps(result))
    return json.loads(path.read_text())


def number(pattern, text):
    return float(re.search(pattern + r"\s*:\s*(-?[0-9.]+)", text).group(1))


def perplexity(args, what):
    common = [BIN / "llama-perplexity", "-m", MODEL, "-f", TEXT, "-c", N_CTX, "--chunks", "16", "-t", THREADS, "-fa", "on"]
    if not BASE.exists():
        partial = BASE.with_suffix(".partial")
        run([*common, "--kl-divergence-base", partial], "f16 reference logits")
        partial.rename(BASE)
    # llama.cpp's log is written by a thread of its own, and now and then its last lines are lost when the program ends
    for _ in range(3):
        text = run([*common, "--kl-divergence", "--kl-divergence-base", BASE, *args], f"{what}: divergence")
        if "Minimum KLD" in text:
            break
    else:
        sys.exit(f"demo: llama-perplexity printed no divergence:\n{text[-2000:]}")
    return {"ppl": number(r"Mean PPL\(Q\)", text), "kld": number(r"Mean\s+KLD", text), "kld999": number(r"99\.9%\s+KLD", text)}


def speed(args, what):
    common = [BIN / "llama-bench", "-m", MODEL, "-t", THREADS, "-fa", "1", "-o", "json", *args]
    pick = lambda text: json.loads(text[text.index("[\n"):text.rindex("]") + 1])
    prefill = pick(run([*common, "-p", "2048", "-n", "0", "-r", "5"], f"{what}: prefill"))
    decode = pick(run([*common, "-p", "0", "-n", "64", "-d", f"0,{DEPTH}", "-r", "5"], f"{what}: decode"))
    return {"prefill": prefill[0]["avg_ts"], "decode": [r["avg_ts"] for r in decode]}


def convert():
    """The bundled model's projection, made once."""
    OUT.mkdir(parents=True, exist_ok=True)
    budget = max(BUDGETS)
    made = OUT / "projection.key"
    key = digest(MODEL, CALIBRATION, PALU, budget)
    if not (PROJECTION.exists() and made.exists() and made.read_text() == key):
        print(f"converting {MODEL.name} (once per model)", file=sys.stderr)
        command = [PALU, "convert", MODEL, "--calibration", CALIBRATION, "--output", PROJECTION, "--bits-per-value", str(budget)]
        if subprocess.run([str(c) for c in command], stdout=subprocess.DEVNULL).returncode != 0:
            sys.exit("demo: the conversion failed")
        made.write_text(key)


def table(head, rows):
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * w for w in widths], *rows]:
        print("| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |")


def main():
    convert()
    inspect = lambda bits: json.loads(run([PALU, "inspect", PROJECTION, "--bits", bits, "--json"], f"palu at {bits} bits per value"))
    f16 = inspect(max(BUDGETS))["f16_bytes_per_token"]
    # (name, bytes per token, options of llama-perplexity and llama-bench)
    caches = [("f16", f16, [])]
    caches += [(t, f16 * block / 64, ["-ctk", t, "-ctv", t]) for t, block in (("q8_0", 34), ("q4_0", 18))]
    for bits in BUDGETS:
        size = inspect(bits)["bytes_per_token"] + f16 * RECENT / N_CTX
        caches.append((f"palu {bits:g}", size, ["--palu", str(PROJECTION), "--palu-bits", f"{bits:g}", "--palu-recent", str(RECENT)]))

    tools = digest(BIN / "llama-perplexity", BIN / "llama-bench", PROJECTION)
    rows = []
    for name, size, args in caches:
        quality = cached(f"kld-{digest(tools, *args)}", lambda: perplexity(args, name))
        fast = cached(f"speed-{digest(tools, THREADS, *args)}", lambda: speed(args, name))
        rows.append([name, f"{size:.0f}", f"{100 * size / f16:.1f}%", f"{quality['ppl']:.3f}", f"{abs(quality['kld']):.5f}",
                     f"{quality['kld999']:.4f}", f"{fast['prefill']:.0f}", f"{fast['decode'][0]:.0f}", f"{fast['decode'][1]:.0f}"])
    # the last tokens' share is that of a context of N_CTX
    head = ["cache", "bytes/token", "of f16", "PPL", "mean KLD", "99.9% KLD", "prefill tok/s", "decode @0", f"decode @{DEPTH}"]
    print(f"\n{MODEL.name}: WikiText-2 test, -c 2048, 16 chunks; llama-bench with {THREADS} threads\n")
    table(head, rows)

    print(f"\nllama-completion on the compressed cache ({BUDGETS[0]:g} bits per value):\n")
    subprocess.run([str(c) for c in [BIN / "llama-completion", "-m", MODEL, "--palu", PROJECTION, "--palu-bits", BUDGETS[0],
                                     "-p", "The history of the lighthouse", "-n", "80", "-no-cnv", "--temp", "0.7", "--seed", "1",
                                     "-t", THREADS, "--no-display-prompt", "--log-verbosity", "0"]],
                   stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    print()


if __name__ == "__main__":
    main()
