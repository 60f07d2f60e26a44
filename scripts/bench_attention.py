#!/usr/bin/env python3
"""`make bench-attention`: decode attention of one layer on an NVIDIA GPU, palu's kernels beside PyTorch's flash and cuDNN attention over f16.

usage: bench_attention.py [--json FILE] [--plot FILE.svg] [--check PROGRAM] [--from FILE.json]

32 query heads of 128 over 32 (MHA) or 8 (GQA) KV heads, one query token, 4K to 256K cells, batches of 1 and 8, everything in one run;
medians, inputs larger than the L2 cache in turn. Needs PyTorch, and nvcc unless --check names a built cuda/check.cu. Prints Markdown
and draws the times at batch 1; docs/performance.md holds both. Limits are of the H200: 4.3 TB/s of copying as measured, 1979 TOP/s for
the integer products that rebuild keys.
"""
import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CELLS, BATCHES = [4096, 16384, 65536, 262144], [1, 8]
BYTES_PER_US, OPS_PER_US = 4.3e6, 1979e6


def build():
    program = ROOT / "build" / "cuda-check"
    nvcc = shutil.which("nvcc") or str(ROOT / "build" / "cuda" / "bin" / "nvcc")
    program.parent.mkdir(exist_ok=True)
    asked = subprocess.run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], stdout=subprocess.PIPE, text=True, check=True)
    capability = asked.stdout.split()[0].replace(".", "")
    arch = capability + ("a" if capability == "90" else "")
    subprocess.run([nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xcompiler", "-pthread", "-o", program, "check.cu"],
                   cwd=ROOT / "cuda", check=True)
    return program


def ours(program):
    lines = subprocess.run([program, "table"], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    for r in rows:
        r["limit_us"] = max(r["bytes"] / BYTES_PER_US, r["ops"] / OPS_PER_US)
    return rows


def others():
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    attention = torch.nn.functional.scaled_dot_product_attention
    rows = []
    for shape, heads in (("MHA", 32), ("GQA", 8)):
        for batch in BATCHES:
            for cells in CELLS:
                size = 2 * batch * heads * cells * 128 * 2
                n = max(1, min(16, (300 << 20) // size + 1))
                if n * size > 60 << 30:
                    continue
                kv = [[torch.randn(batch, heads, cells, 128, dtype=torch.float16, device="cuda") for _ in "kv"] for _ in range(n)]
                q = torch.randn(batch, 32, 1, 128, dtype=torch.float16, device="cuda")
                for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
                    try:
                        with sdpa_kernel(backend):
                            call = lambda i: attention(q, *kv[i % n], enable_gqa=heads != 32)
                            call(0)
                            graph = torch.cuda.CUDAGraph()
                            with torch.cuda.graph(graph):
                                for i in range(10):
                                    call(i)
                        times = []
                        for _ in range(12):
                            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                            start.record()
                            graph.replay()
                            end.record()
                            end.synchronize()
                            times.append(100 * start.elapsed_time(end))
                        us = statistics.median(times[2:])
                    except RuntimeError as e:
                        print(f"bench-attention: {shape} {name}, batch {batch}, {cells} cells: {e}", file=sys.stderr)
                        continue
                    rows.append({"name": f"{shape} {name} over f16", "cells": cells, "batch": batch, "back_to_back_us": us, "limit_us": size / BYTES_PER_US})
                del kv
                torch.cuda.empty_cache()
    return rows


def table(rows):
    for batch in BATCHES:
        print(f"\nBatch {batch}, microseconds, and the part of the limit that is reached:\n")
        print("| | bits per value | " + " | ".join(f"{c // 1024}K" for c in CELLS) + " |")
        print("|---" * (len(CELLS) + 2) + "|")
        for name in dict.fromkeys(r["name"] for r in rows):
            mine = {r["cells"]: r for r in rows if r["name"] == name and r["batch"] == batch}
            if mine:
                cells = [f"{mine[c]['back_to_back_us']:.0f} ({100 * mine[c]['limit_us'] / mine[c]['back_to_back_us']:.0f}%)" if c in mine else "-" for c in CELLS]
                bits = next(iter(mine.values())).get("bits", 16)
                print(f"| {name} | {bits:.2f} | " + " | ".join(cells) + " |")


def plot(rows, path):
    """Time per cell against cells, one panel for each shape, at batch 1."""
    colors = ["#1b6ca8", "#d1495b", "#2e8b57", "#8e5ea2", "#777777", "#e0912f"]
    width, height, left, top, w, h = 860, 400, 60, 40, 300, 290
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/>']
    rows = [r for r in rows if r["batch"] == 1 and "channels" not in r["name"]]
    for panel, shape in enumerate(("MHA", "GQA")):
        mine = [r for r in rows if r["name"].startswith(shape)]
        per_cell = [1000 * r["back_to_back_us"] / r["cells"] for r in mine]
        low, high = math.floor(math.log2(min(per_cell))), math.ceil(math.log2(max(per_cell)))
        x0 = left + panel * (w + 100)
        at = lambda r: (x0 + w * math.log2(r["cells"] / CELLS[0]) / math.log2(CELLS[-1] / CELLS[0]),
                        top + h * (1 - (math.log2(1000 * r["back_to_back_us"] / r["cells"]) - low) / (high - low)))
        out.append(f'<text x="{x0}" y="{top - 16}" font-weight="bold">{shape}, nanoseconds per cell</text>')
        for e in range(low, high + 1):
            y = top + h * (1 - (e - low) / (high - low))
            out.append(f'<line x1="{x0}" x2="{x0 + w}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/><text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{2.0 ** e:g}</text>')
        for c in CELLS:
            x = x0 + w * math.log2(c / CELLS[0]) / math.log2(CELLS[-1] / CELLS[0])
            out.append(f'<text x="{x:.1f}" y="{top + h + 18}" text-anchor="middle">{c // 1024}K</text>')
        for i, name in enumerate(dict.fromkeys(r["name"] for r in mine)):
            points = [at(r) for r in sorted((r for r in mine if r["name"] == name), key=lambda r: r["cells"])]
            dash = ' stroke-dasharray="5 4"' if "f16" in name else ""
            out.append(f'<polyline fill="none" stroke="{colors[i]}" stroke-width="2"{dash} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
            out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colors[i]}"/>' for x, y in points]
            label = name[4:].replace("over f16", "f16")
            out.append(f'<text x="{x0 + 8 + i % 3 * 100}" y="{top + h + 40 + i // 3 * 16}" fill="{colors[i]}">{label}</text>')
    out.append("</svg>")
    Path(path).write_text("\n".join(out) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--check", type=Path)
    parser.add_argument("--from", type=Path, dest="source", help="a JSON file of an earlier run: prints and draws it again")
    options = parser.parse_args()
    rows = json.loads(options.source.read_text()) if options.source else ours(options.check or build()) + others()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    table(rows)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
