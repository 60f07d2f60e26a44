#!/usr/bin/env python3
"""`make test-cuda`: what only a machine with an NVIDIA GPU can test, the GPU against the CPU.

usage: test_cuda.py [STAGE ...] [--check PROGRAM] [--library PROGRAM] [--projection FILE] [--cpu]

Stages, all of them by default:
  kernels     cuda/check.cu: every kernel against double precision
  library     tests/cuda.rs, which `make test` skips without a GPU
  ops         test-backend-ops on the bundled model's layers and on an 8B's shapes
  divergence  llama-perplexity's KL divergence with all layers on the GPU, for micro-batches of 512, 16 and 1; and on two, if there are
  scripts     what llama.cpp does with a cache (tests/llama/steps.cpp): logits
  sequences   the same with 32 query heads over 8 KV heads of 128 dimensions (random weights): long contexts, several sequences and tokens at once
  states      saved on one device and loaded on the other
  memcheck    compute-sanitizer over kernels and library

--check and --library name programs that are built already: cuda/check.cu, and the test program of tests/cuda.rs; --projection a file
made for the bundled model. PALU_LLAMA_BIN names the folder of llama.cpp's programs, if it is not build/llama.cpp/bin. --cpu puts the CPU
in the GPU's place, where there is none, in the stages that can do that: a test of this script.
"""
import argparse
import array
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import random_model
from bench_attention import build as build_check
from llama import until_said

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("PALU_LLAMA_BIN", ROOT / "build" / "llama.cpp" / "bin"))
DATA = ROOT / "tests" / "data"
MODEL, TEXT, CALIBRATION = DATA / "wiki-mha-17m-q8_0.gguf", DATA / "wiki.test.raw", DATA / "calibration.wiki.txt"
N_VOCAB = {MODEL: 8192}
N_CPU = len(os.sched_getaffinity(0))
STAGES = ["kernels", "library", "ops", "divergence", "scripts", "sequences", "states", "memcheck"]
WORK = Path(tempfile.mkdtemp(prefix="palu-test-cuda-"))
GPU_ENV, CPU_ENV = dict(os.environ), dict(os.environ, CUDA_VISIBLE_DEVICES="")

results = []


def report(stage, name, ok, detail=""):
    results.append(ok)
    print(f"{'ok    ' if ok else 'FAILED'} {stage}: {name}{'  ' if detail else ''}{detail}", flush=True)


def run(command, env=None, cwd=None):
    """Status and output, both streams together."""
    r = subprocess.run([str(c) for c in command], env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    return r.returncode, r.stdout


def last_lines(text, n=3):
    return " | ".join(line.strip() for line in text.strip().splitlines()[-n:])[-500:]


def kernels(o):
    status, said = run([o.check, "check"])
    wrong = [line for line in said.splitlines() if "WRONG" in line]
    report("kernels", "cuda/check.cu", status == 0 and not wrong, wrong[0] if wrong else last_lines(said, 1))


def library_command(o):
    return [o.library] if o.library else ["cargo", "test", "--release", "--test", "cuda", "--"]


def library(o):
    status, said = run(library_command(o), dict(GPU_ENV, PALU_TEST_GPU="1"), ROOT)
    report("library", "tests/cuda.rs", status == 0 and "skipped" not in said, last_lines(said, 1))


def ops(o):
    files = [o.projection]
    for n_head_kv, group_size in [(8, 8), (32, 4)]:
        files.append(WORK / f"{n_head_kv}x128.gguf")
        status, said = random_model.projection(files[-1], 1, n_head_kv, group_size, 2.25)
        if status != 0:
            return report("ops", "random_projection", False, last_lines(said))
    for file in files:
        names = "PALU_STORE_K,PALU_STORE_V,PALU_ATTN,PALU_STEP"
        status, said = run([BIN / "test-backend-ops", "test", "-o", names], dict(GPU_ENV, LLAMA_ARG_PALU=str(file)))
        passed = re.findall(r"(\d+)/(\d+) tests passed", said)
        ok = status == 0 and bool(passed) and all(a == b != "0" for a, b in passed)
        report("ops", file.name, ok, ", ".join("/".join(p) for p in passed) or last_lines(said))


def divergence(o):
    common = ["-m", MODEL, "-f", TEXT, "-c", 2048, "-fa", "on"]

    def mean(chunks, env, *args):
        base = ["--kl-divergence-base", WORK / f"{chunks}.kld", "--kl-divergence"]
        status = None

        def attempt():
            nonlocal status
            status, said = run([BIN / "llama-perplexity", *common, *base, *args], env)
            return said

        said, found = until_said(r"Mean +KLD: +([0-9.]+)", attempt)
        return float(found[1]) if found and status == 0 else last_lines(said)

    palu = ["--palu", o.projection]
    for chunks, batches in [(4, [512]), (1, [16, 1])]:
        status, said = run([BIN / "llama-perplexity", *common, "--chunks", chunks, "--kl-divergence-base", WORK / f"{chunks}.kld"], CPU_ENV)
        if status != 0:
            return report("divergence", "f16 on the CPU", False, last_lines(said))
        cpu = mean(chunks, CPU_ENV, *palu)
        splits = [("", [])]
        if chunks == 1 and o.n_device > 1:
            splits.append((", half of the layers each on two devices", ["-sm", "layer", "-ts", "1,1"]))
        elif chunks == 1:
            print("skipped divergence: layers on two devices, of which there are not so many", flush=True)
        for ub in batches:
            for name, split in splits:
                gpu = mean(chunks, o.gpu_env, *palu, "-ngl", o.ngl, "-b", ub, "-ub", ub, *split)
                ok = isinstance(cpu, float) and isinstance(gpu, float) and gpu < 1.25*cpu
                report("divergence", f"{chunks} chunks, micro-batches of {ub}{name}", ok, f"{gpu}, on the CPU {cpu}")


PLAIN = ["rand:0@0:100:1", "rand:0@100:20:2"]
SINGLE = ["rand:0@0:100:1"] + [f"rand:0@{100 + i}:1:{50 + i}" for i in range(40)]
LONG = ["rand:0@0:1000:1"] + [f"rand:0@{1000 + i}:1:{50 + i}" for i in range(60)] + ["rand:0@1060:3:4", "rand:0@1063:16:5", "rand:0@1079:33:6"]
TWO = ["rand:0@0:60:1+1@0:60:2", "rand:0@60:4:3+1@60:4:4"] + [f"rand:0@{64 + i}:1:{i}+1@{64 + i}:1:{90 + i}" for i in range(8)]
COPY = ["rand:0@0:100:1", "cp:0:2:-1:-1", "rm:0:-1:-1", "rand:2@100:20:2"]
HOLE = ["rand:0@0:200:1", "rm:0:4:104", "add:0:104:-1:-100", "rand:0@100:8:2", "rand:0@108:1:3", "rand:0@109:1:4", "rand:0@110:1:5"]
THREE, PAIR = ["--seqs", "3"], ["--seqs", "2", "--ctx", "512"]
# options, steps, tokens compared, the script that it must equal on the same device, and how well
SCRIPTS = {
    "plain": ([], PLAIN, 20, None, 0),
    "one by one": ([], SINGLE, 40, None, 0),
    "1000, then 1, 3, 16, 33": (["--ctx", "1280"], LONG, 112, None, 0),
    "micro-batches of 1": (["--ubatch", "1"], PLAIN, 20, None, 0),
    "micro-batches of 7": (["--ubatch", "7"], PLAIN, 20, None, 0),
    "4 recent tokens, micro-batches of 3": (["--palu-recent", "4", "--ubatch", "3"], PLAIN, 20, None, 0),
    "without flash attention": (["--fa", "0"], PLAIN, 20, None, 0),
    "some layers on the CPU": (["--ngl", "3"], SINGLE, 40, None, 0),
    "tail removed": ([], ["rand:0@0:100:1", "rand:0@100:50:9", "rm:0:100:-1", "rand:0@100:20:2"], 20, "plain", 5e-2),
    "copied, unified": ([*THREE, "--unified"], COPY, 20, "plain", 1e-3),
    "copied": (THREE, COPY, 20, "plain", 1e-3),
    "two at once, unified": ([*PAIR, "--unified"], TWO, 24, None, 0),
    "two at once": (PAIR, TWO, 24, None, 0),
    "moved": ([], ["rand:0@0:100:1", "add:0:0:-1:37", "rand:0@137:20:2"], 20, "plain", 5e-2),
    "there and back": ([], ["rand:0@0:100:1", "add:0:0:-1:37", "add:0:0:-1:-37", "rand:0@100:20:2"], 20, "plain", 1e-6),
    "hole closed": ([], HOLE, 11, None, 0),
    "kept, cleared": (THREE, ["rand:1@0:30:7", "clear", "rand:0@0:100:1+1@0:10:3", "keep:0", "rand:0@100:20:2"], 20, "plain", 1e-2),
}


def several(n, more):
    """Prompts of n sequences, each longer by `more` tokens than the one before, then 24 steps with a token of each."""
    length = [80 + i*more for i in range(n)]
    prompts = [f"rand:{i}@0:{length[i]}:{i}" for i in range(n)]
    return prompts + ["rand:" + "+".join(f"{i}@{length[i] + t}:1:{100*i + t}" for i in range(n)) for t in range(24)]


AFTER_5000 = ["rand:0@0:5000:1"] + [f"rand:0@{5000 + i}:1:{50 + i}" for i in range(24)]
THREES = ["rand:0@0:300:1"] + [f"rand:0@{300 + 3*i}:3:{50 + i}" for i in range(24)]
# options, steps, tokens compared
SEQUENCES = {
    "one": ([], SINGLE, 40),
    "one, 5000 tokens": (["--ctx", "6144"], AFTER_5000, 24),
    "three tokens at a time": ([], THREES, 72),
    "four": (["--seqs", "4", "--ctx", "4096"], several(4, 170), 96),
    "four, unified": (["--seqs", "4", "--ctx", "2048", "--unified"], several(4, 170), 96),
    "eleven": (["--seqs", "11", "--ctx", "4400"], several(11, 20), 264),
    "eleven, unified": (["--seqs", "11", "--ctx", "4096", "--unified"], several(11, 20), 264),
}


def steps(o, gpu, options, script, palu=True, model=MODEL, projection=None):
    """The file of logits, or what went wrong."""
    handle, out = tempfile.mkstemp(dir=WORK)
    os.close(handle)
    if not gpu or o.cpu:
        options = [v for i, v in enumerate(options) if v != "--ngl" and (i == 0 or options[i - 1] != "--ngl")]
    # an option of the script's own comes last, and counts
    command = [BIN / "palu-steps", model, out, *(["--palu", projection or o.projection] if palu else []), *(["--ngl", o.ngl] if gpu else []), *options, *script]
    status, said = run(command, o.gpu_env if gpu else CPU_ENV)
    return Path(out) if status == 0 else f"status {status}: {last_lines(said)}"


def nmse(reference, other, n, model=MODEL):
    """Of the last n tokens' logits; not a number where there are none."""
    if not isinstance(reference, Path) or not isinstance(other, Path):
        return float("nan")
    parts = []
    for path in (reference, other):
        parts.append(array.array("f"))
        parts[-1].frombytes(path.read_bytes()[-4*n*N_VOCAB[model]:])
    return sum((x - y)**2 for x, y in zip(*parts)) / sum(x*x for x in parts[0])


def scripts(o):
    with concurrent.futures.ThreadPoolExecutor(max(1, min(6, N_CPU//2))) as pool:
        jobs = {(name, gpu): pool.submit(steps, o, gpu, s[0], s[1]) for name, s in SCRIPTS.items() for gpu in (True, False)}
        for name, (_, _, n, same, limit) in SCRIPTS.items():
            gpu, cpu = jobs[name, True].result(), jobs[name, False].result()
            error = nmse(cpu, gpu, n)
            again = nmse(jobs[same, True].result(), gpu, n) if same else 0.0
            said = "".join(f"; {x}" for x in (gpu, cpu) if isinstance(x, str))
            report("scripts", name, error < 2e-2 and again <= limit, f"{error:.1e} from the CPU" + (f", {again:.1e} from '{same}'" if same else "") + said)


def sequences(o):
    model, file = WORK / "gqa.gguf", WORK / "gqa.palu.gguf"
    N_VOCAB[model] = 512
    status, said = run([sys.executable, ROOT / "scripts" / "random_model.py", "gqa-small", model])
    if status == 0:
        status, said = random_model.projection(file, 2, 8, 8, 2.25, lambda: run([BIN / "palu-steps", model, WORK / "none", "--palu", file, "rand:0@0:1:1"], CPU_ENV)[1])
    if status != 0:
        return report("sequences", "model and projection", False, last_lines(said))
    for name, (options, script, n) in SEQUENCES.items():
        gpu, cpu = (steps(o, gpu, options, script, model=model, projection=file) for gpu in (True, False))
        error = nmse(cpu, gpu, n, model)
        report("sequences", name, error < 2e-2, f"{error:.1e} from the CPU" + "".join(f"; {x}" for x in (gpu, cpu) if isinstance(x, str)))


def states(o):
    first, rest = "rand:0@0:150:1", ["rand:0@150:10:2", *(f"rand:0@{160 + i}:1:{i}" for i in range(10))]
    whole = {gpu: steps(o, gpu, [], [first, *rest]) for gpu in (True, False)}
    name = {True: "GPU", False: "CPU"}
    for kind, of in [("state", ""), ("sequence", "-seq:0")]:
        for saved in (True, False):
            file = WORK / f"{kind}.{name[saved]}"
            said = steps(o, saved, [], [first, f"save{of}:{file}"])
            if not isinstance(said, Path):
                report("states", f"{kind} saved on the {name[saved]}", False, said)
                continue
            for loaded in (True, False):
                error = nmse(whole[loaded], steps(o, loaded, [], [f"load{of}:{file}", *rest]), 20)
                # on the same device nothing changes
                report("states", f"{kind} saved on the {name[saved]}, loaded on the {name[loaded]}", error <= (1e-6 if saved == loaded else 2e-2), f"{error:.1e}")
    refused = steps(o, True, [], [f"load:{WORK / 'state.GPU'}"], palu=False)
    report("states", "a stock cache refuses it", isinstance(refused, str) and "the state was refused" in refused, "" if isinstance(refused, Path) else refused)


def memcheck(o):
    sanitizer = shutil.which("compute-sanitizer")
    if not sanitizer:
        return report("memcheck", "compute-sanitizer", False, "not found")
    for name, command in [("kernels, joint groups", [o.check, "check", "joint"]), ("library", [*library_command(o), "attention"])]:
        status, said = run([sanitizer, "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", 9, *command], dict(GPU_ENV, PALU_TEST_GPU="1"), ROOT)
        errors = re.findall(r"ERROR SUMMARY: .*", said)
        report("memcheck", name, status == 0, ", ".join(sorted(set(errors))) or last_lines(said))


def projection():
    """Of the bundled model, at 14.1%."""
    out = WORK / "projection.gguf"
    status, said = run([ROOT / "target" / "release" / "palu", "convert", MODEL, "--calibration", CALIBRATION, "--tokens", 16384, "--probe-tokens", 2048,
                        "--bits-per-value", 2.25, "--output", out], CPU_ENV)
    if status != 0:
        sys.exit(f"test-cuda: the bundled model could not be converted: {last_lines(said)}")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    parser.add_argument("--check", type=Path)
    parser.add_argument("--library", type=Path)
    parser.add_argument("--projection", type=Path)
    parser.add_argument("--cpu", action="store_true")
    o = parser.parse_args()
    unknown = [s for s in o.stages if s not in STAGES]
    if unknown:
        sys.exit(f"test-cuda: there is no stage '{unknown[0]}'; there are {', '.join(STAGES)}")
    wanted = o.stages or [s for s in STAGES if not o.cpu or s in ("divergence", "scripts", "sequences", "states")]
    if not o.cpu and (not shutil.which("nvidia-smi") or run(["nvidia-smi"])[0] != 0):
        sys.exit("test-cuda: there is no NVIDIA GPU here")
    o.n_device = 0
    if not o.cpu and set(wanted) - {"kernels", "library", "memcheck"}:
        o.n_device = len(set(re.findall(r"\bCUDA[0-9]+", run([BIN / "llama-bench", "--list-devices"])[1])))
        if o.n_device == 0:
            sys.exit(f"test-cuda: llama.cpp in {BIN} has no CUDA device; build it with LLAMA_CMAKE_ARGS=-DGGML_CUDA=ON")
    o.gpu_env, o.ngl = (CPU_ENV, 0) if o.cpu else (GPU_ENV, 99)
    try:
        if not o.check and {"kernels", "memcheck"} & set(wanted):
            o.check = build_check()
        if not o.projection and {"ops", "divergence", "scripts", "states"} & set(wanted):
            o.projection = projection()
        for stage in wanted:
            globals()[stage](o)
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
    print(f"test-cuda: {sum(results)} ok, {len(results) - sum(results)} failed")
    sys.exit(0 if results and all(results) else 1)


if __name__ == "__main__":
    main()
