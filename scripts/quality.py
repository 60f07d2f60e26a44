#!/usr/bin/env python3
"""`make quality`: measures what each part of the converter is worth, and writes docs/quality.md.

    quality.py [--models DIR] [--only WORD] [--jobs N] [--seconds S] [--results FILE] [--list] [--write]

Every row is a conversion of a model and llama-perplexity's KL divergence to the f16 cache, -c 2048, over 16 chunks of WikiText-2 test and 4
chunks of this project's source (another kind of text). Finished rows are kept in build/quality/results.json (--results) and not
measured again; remove that file to start afresh. What rows share (statistics, projection files, stock logits) is made once, and
kept too. Rows that matter most are measured first. --models: a folder with wiki-gqa-16m-q8_0.gguf, of which further rows are
made. --only: rows with this word in them alone. --jobs: so many programs at once, which share the processors. --seconds: stop
after so long; what is finished is kept. --list: says what is there and what is not. --write: writes the page of what is there,
and measures nothing.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from llama import until_said

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("PALU_BUILD", ROOT / "build")).resolve()
BIN, OUT, DATA = BUILD / "llama.cpp" / "bin", BUILD / "quality", ROOT / "tests" / "data"
PALU = ROOT / "target" / "release" / "palu"
PAGE = ROOT / "docs" / "quality.md"
WIKI, TEST = DATA / "calibration.wiki.txt", DATA / "wiki.test.raw"
N_CPU = int(os.environ.get("PALU_THREADS", len(os.sched_getaffinity(0))))
STOCK = {"q8_0": 53.1, "q5_0": 34.4, "q4_0": 28.1}  # percent of f16's bytes
WEIGHT_TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_K", "Q2_K", "IQ4_XS"]
OURS = "--bits-per-value 2.25"
# what the tables of parts vary: rows alone, so that parts show as they are
PARTS = f"{OURS} --concentration 1"
N_CTX, RECENT = 2048, 16


class Row:
    """One line of a table: a model, how its projection is made (or a stock cache type), at which budget it is used. `ablation`: what
    examples/ablations.rs makes of the cache. `recent`: how many of the last tokens are read in f16; `told`: whether the converter
    knows it."""

    def __init__(self, section, label, model, options=PARTS, text="wiki", stock=None, bits=None, ablation=None, recent=0, told=True):
        self.section, self.label, self.model, self.options = section, label, model, options
        self.text, self.stock, self.bits, self.ablation = text, stock, bits, ablation
        self.recent, self.told = recent, recent if told else 0
        self.key = " | ".join(str(x) for x in (model, stock or f"{options} of {text}", bits or "own"))
        if recent:
            self.key += f" | recent {recent}" + ("" if told else ", not told")
        if ablation is not None:
            self.key += f" | {ablation or 'as it is'}"


# by section: what examples/ablations.rs is told, and what a reader is
ABLATIONS = {
    "exact": [("", "rows alone"), ("sinks=4,bits=2.25", "first 4 tokens in f16"),
              *((f"window={n}" + ",bits=2.25" * (n > 1), f"last {n} tokens in f16" if n > 1 else "own token in f16, which costs nothing") for n in (1, 4, 16, 32, 64, 128)),
              ("window=16,side=k,bits=2.25", "keys of the last 16 tokens in f16"), ("window=16,side=v,bits=2.25", "values of the last 16 tokens in f16"),
              ("q4_0", "llama.cpp q4_0, rotated"), ("q4_0,window=16", "q4_0, last 16 tokens in f16"), ("q4_0,window=64", "q4_0, last 64 tokens in f16")],
    "scales": [("", "one per row and head group"), ("scales=0", "none"), ("scales=64,bits=2.25", "per 64 channels"),
               ("scales=32,bits=2.25", "per 32 channels"), ("scales=16,bits=2.25", "per 16 channels")],
    "choice": [("", "searched"), ("scale=max", "nothing is clipped"), ("scale=rms", "from the latent's energy")],
}


def rows_bits(bits, recent=RECENT):
    """What is left for rows of so many bits per value when the last tokens of a context are in f16."""
    return bits - 16 * recent / N_CTX


def rows(have_gqa):
    out = []
    models = ["mha-17m"] + (["gqa-16m"] if have_gqa else [])
    for m in models:
        add = lambda section, label, options=PARTS, m=m, **more: out.append(Row(section, label, m, options, **more))
        for t in STOCK:
            add("caches", f"llama.cpp {t}, rotated", stock=t)
        for b in (4.5, 3.0, 2.7, 2.25, 1.9, 1.6):
            add("caches", f"ours, {rows_bits(b):g} bits and {RECENT} tokens in f16", f"--bits-per-value {rows_bits(b):g}", recent=RECENT)
        for b in (2.25, 1.6):
            add("caches", f"ours, {b:g} bits, rows alone", f"--bits-per-value {b:g}")
        for keep, bits in ((0.7, 4), (0.7, 3), (0.5, 4), (0.5, 3)):
            add("caches", f"Palu as published: G-LRD, Fisher, keep {keep}, {bits} bits", f"--preset palu --keep {keep} --bits {bits}")
        for label, more in (("M-LRD", "--group-size 1"), ("J-LRD", "--group-size all"), ("G-LRD, uniform ranks", "--rank-search uniform"),
                            ("G-LRD, ranks uniform within a layer", "--rank-search fisher-uniform"), ("G-LRD, plain SVD", "--decomposition svd")):
            add("published", f"{label}, keep 0.7, 4 bits", f"--preset palu --keep 0.7 --bits 4 {more}")
        for metric in ("attention", "query", "none"):
            add("metric", metric, PARTS + ("" if metric == "attention" else f" --metric {metric}"))
        add("recent", "rows alone", OURS)
        for n in (4, 8, 16, 32, 64):
            add("recent", f"{n} tokens in f16", f"--bits-per-value {rows_bits(2.25, n):g}", recent=n)
        add("recent", f"{RECENT} tokens in f16, the converter not told", f"--bits-per-value {rows_bits(2.25):g}", recent=RECENT, told=False)
        for part in (1, 0.25, 0):
            add("recent", f"{RECENT} tokens in f16, concentration {part:g}", f"--bits-per-value {rows_bits(2.25):g} --concentration {part:g}", recent=RECENT)
        for text, label in (("mixed", "half Wikipedia, half C++"), ("code", "C++")):
            add("recent", f"{RECENT} tokens in f16, calibrated on {label}", f"--bits-per-value {rows_bits(2.25):g}", text=text, recent=RECENT)
        for part in (1, 0.5, 0):
            add("concentration", f"Σp² to the power of {part:g}", PARTS if part == 1 else OURS + ("" if part == 0.5 else f" --concentration {part}"))
        for part in (0, 0.25, 0.5, 0.9):
            add("importance", f"{part:g} of the covariance", PARTS + (f" --importance {part}" if part else ""))
        for group in ("all", "3", "2", "1") if m == "mha-17m" else ("all", "1"):
            add("group", f"{group} heads", PARTS + ("" if group == "all" else f" --group-size {group}"))
        for bits in ("0,1,2,3,4,5,6,7,8", "0,1,2,3,4,5,6,8", "0,2,3,4,5,6,8", "0,2,4,6,8", "0,2,4,8", "0,4", "0,3"):
            add("alphabet", "{" + bits + "}", PARTS + ("" if bits.count(",") == 8 else f" --alphabet {bits}"))
        for n in (8, 16, 32, 64):
            add("segment", f"{n} channels", PARTS + ("" if n == 8 else f" --segment {n}"))
        add("mean", "subtracted")
        add("mean", "not subtracted", PARTS + " --no-mean")
        add("hadamard", "none")
        for n in (8, 16, 64):
            add("hadamard", f"within {n} neighbouring channels", PARTS + f" --hadamard {n}")
        for label, more in (("no measuring", "--effort 0,0,0,0,0"), ("--refine quick", "--refine quick"), ("--refine default", ""),
                            ("one round, alone and in context", "--effort 1,1,0,0,0"),
                            ("and four parts of each spectrum", "--effort 1,1,4,0,0"), ("and two descents", "--effort 1,1,0,2,0"),
                            ("--refine thorough", "--refine thorough"), ("twice the probe", "--probe-tokens 8192")):
            add("effort", label, f"{PARTS} {more}".strip())
        for n in (8192, 32768, 131072, 524288):
            add("tokens", f"{n // 1024}K", PARTS + ("" if n == 131072 else f" --tokens {n}"))
        for text, label in (("wiki", "Wikipedia"), ("mixed", "half Wikipedia, half C++"), ("code", "C++")):
            add("mix", label, text=text)
        for made, used in ((4.5, (3.0, 2.25, 1.6)), (3.0, (3.0,)), (2.7, (2.7,)), (2.25, (2.25, 1.6))):
            for bits in used:
                add("budgets", f"made for {made:g}, used at {bits:g}", f"--bits-per-value {made:g} --concentration 1", bits=bits if bits < made else None)
        for section, ablations in ABLATIONS.items():
            for ablation, label in ablations:
                if m != "mha-17m" or "scales=16" not in ablation:  # scales alone would take more than there is
                    add(section, label, ablation=ablation)
    for t in WEIGHT_TYPES:
        for stock in (None, "q4_0"):
            out.append(Row("weights", f"{t}: " + ("ours at 2.25 bits" if stock is None else "llama.cpp q4_0"), f"mha-17m-{t}",
                           PARTS + " --refine quick --tokens 32768", stock=stock))
    return out


# Sections in the order in which they are measured; after them the rows whose keys have one of the words, which take long.
WORTH = ["caches", "recent", "concentration", "budgets", "exact", "mean", "hadamard", "segment", "alphabet", "tokens", "mix", "effort", "published", "importance",
         "metric", "group", "scales", "choice", "weights"]
SLOW = ["524288", "thorough", "q5_0"]


SECTIONS = {
    "caches": ("Caches", "The projection files are each made for the budget that they are used at. Bytes are those of 2048 tokens, the last 16 in f16 included. "
               "Palu as published, and all tables of parts, have rows alone."),
    "recent": ("The last tokens in f16", "At 14.1% of f16 in all, for a context of 2048 tokens; a longer one leaves more to rows. `palu convert` weighs what is "
               "read from rows; not told, it weighs all that attention reads. Concentration as in the table of that name."),
    "published": ("Palu as published, its other forms", "G-LRD shares a latent among up to four KV heads, as the paper recommends; J-LRD among all, M-LRD among none."),
    "metric": ("Metric", "What an error costs within a layer's keys or values: attention's own second moments (`src/convert/weigh.rs`), the queries and "
               "the output projection alone, or every channel the same."),
    "concentration": ("Values of narrow heads", "How much a query head that attends narrowly on the calibration text counts in the values' metric: the "
                      "second moment of its weights, to a power. 0.5 is the default; the other tables but the first two have 1."),
    "importance": ("Importance of tokens", "The part of the covariance in which a token counts as much as attention reads it."),
    "group": ("Head groups", "KV heads that share a latent. Rebuilding costs in proportion."),
    "alphabet": ("Bit widths", "The widths that a segment may have."),
    "segment": ("Segment width", "Channels that share a bit width."),
    "mean": ("Means", ""),
    "hadamard": ("Hadamard rotation of the latents", "Rotated channels have one variance, and so one bit width."),
    "effort": ("Measuring", "How the weights of layers and sides are found."),
    "tokens": ("Calibration tokens", ""),
    "mix": ("Calibration text", "The C++ is llama.cpp's; the source that divergence is measured on is Rust."),
    "budgets": ("One file for several budgets", ""),
    "exact": ("First and last tokens in f16", "Of 2048 tokens, beside rows whose budget is lowered until the total is 14.1% of f16 (`examples/ablations.rs`: "
              "the cache as floats, so without the decoder's rounding to 8 bits). q4_0 cannot be lowered."),
    "scales": ("Scales", "Per latent channels, in 14.1% of f16 with their two bytes each; none: steps are the same for all tokens. As floats, too."),
    "choice": ("Choice of a row's scale", "As floats, too."),
    "weights": ("Weight types", "mha-17m through `llama-quantize --allow-requantize`, 32K calibration tokens, `--refine quick`; divergence is to the f16 "
                "cache of the same weights. The bundled model is Q8_0 already, so F32, F16, BF16 and Q8_0 say that the format of weights makes no "
                "difference. Rows of 384 weights are no multiple of 256, so llama-quantize takes the nearest type with blocks of 32 for them."),
}


NOTES = """
## What was found

- **Against q4_0** at 28.1% of f16: at 14.1% the mean divergence is 9% of q4_0's on mha-17m and 19% on gqa-16m, at 10.0% it is 19 and 54%; median and 99.9% likewise. On Rust
  source, calibrated on Wikipedia, it is 31 and 104% at 14.1%, 1.6 and 3.2 times at 10.0%: q4_0 knows no kind of text, and a model of two KV heads
  has little to spare. So calibrate on the kinds of text that will be read: **half Wikipedia, half C++** gives 11 and 33% of q4_0's divergence on Wikipedia and 12 and 18% on Rust source, at half
  of q4_0's bytes; median and 99.9% are lower in the same way. q4_0 with its last 16 tokens in f16, too (28.7%), has 0.0022 and 0.0024 on Wikipedia: 5 times what ours has at its size.
- **Far recall** (`palu compare`, three passages repeated 1535 tokens later, so that the last tokens in f16 do not help): 0.0008 and 0.0015 at 14.1 and 10.0% on mha-17m, 0.0018 and 0.0054 on
  gqa-16m; q4_0 has 0.0107 and 0.0109.
- **Palu as published** costs 35 times our mean divergence at 1.3 times our bytes (0.7 kept, 4 bits) on mha-17m, and 31 times at 1.4 times on gqa-16m; at 10 to 11.5% (0.5, 3 bits)
  70 and 57 times. On gqa-16m half of the ranks is too few at any number of bits. Of its forms, ranks that are the same everywhere do better than Fisher's on these models (0.0153 instead of 0.0290, 0.0206 instead of
  0.0665), as does one latent for all heads where there are six (0.0149): still 24 times ours at the same size. Its Fisher scores are measured forward here; `tests/convert.rs` holds them against gradients by finite differences: traces agree within a
  fifth, and the ranking is the same.
- **By chance**: a row made again with other instructions (AVX2 instead of AVX-512) differed by 0.4% on Wikipedia and 8% on Rust source, which has a quarter of
  the chunks. Smaller differences in the last column mean nothing.
- **Measuring** what layers and sides cost, instead of taking the metric's word: without, 21% higher on Wikipedia and 34% on Rust source (mha-17m), 71 and 79% (gqa-16m). One round has nearly all of it: what `--refine default`
  adds to it, parts of the spectrum, descents and twice the probe are within 6% of each other on Wikipedia.
- **Calibration tokens**: 8K instead of 128K are 32% higher on Wikipedia and 28% on Rust source (gqa-16m), 35% and nothing on mha-17m; 32K 4 and 13% on Wikipedia. 512K are within 1% of 128K there, and 1 and 21% higher on Rust source.
- **Segments** of 16 channels cost 4 and 9%, of 64 27 and 150%; means that are not subtracted 17 and 23%; Hadamard rotations within 8, 16 and 64 channels 1, 2 and 25% (mha-17m), 2, 11 and 99% (gqa-16m).
- **The metric** is worth 44% (mha-17m) and 41% (gqa-16m) against none. Attention's own second moments are 15% better than the queries' on Wikipedia, and on Rust
  source 16% and 37% worse. All of that difference is in how query heads are compared in the values' metric: attention counts a head by the second
  moment of its weights on the calibration text, and heads attend otherwise on other text. The shape of the keys' metric (attended, half and half, or all
  queries), the comparison of their heads, and a tenth of the identity added to both change it by no more than measuring does.
- **Values of narrow heads** therefore count by the root of that moment (`--concentration 0.5`): on Rust source 23% lower (gqa-16m) and 7% (mha-17m), on
  Wikipedia 1% lower and 2% higher (rows alone; with the last tokens in f16 the root is 1 to 3% from the best on Wikipedia, and on Rust source 36% better than the moment itself on mha-17m, 2% worse on gqa-16m). Not counting it at all is another 14 to 20% lower on Rust source and 7 to 14% higher on Wikipedia (with `--refine quick`).
- **Windows of random tokens** in the calibration (one of eight, so that rare tokens are not forgotten): on gqa-16m 8% higher on Wikipedia and 6% higher on Rust
  source. Not kept.
- **The last tokens in f16** are worth more than anything else here, and the default: 16 of 2048, with the rows' budget lowered for them, halve the mean on Wikipedia by themselves, and
  once more where the converter knows (`palu convert --recent`): with what is read in f16 out of the way, errors count where attention reads from afar, which other heads do.
  On mha-17m 0.0027, 0.0013, 0.0008 (rows alone, with 16 tokens, and told), on gqa-16m 0.0079, 0.0031, 0.0022; on Rust source 0.0065, 0.0058, 0.0031 and 0.0194, 0.0115, 0.0115; the 99.9% quantile falls to a quarter. 8 tokens
  are 19 and 28% worse than 16; 32 are 10 and 12% better on Wikipedia, 58% worse and 6% better on Rust source, as rows get what they leave; 64 no better than 32, and on Rust source twice as bad on mha-17m and a quarter better
  on gqa-16m. In longer contexts, where rows lose less to them, more of them should be worth it (`--palu-recent`). In the ablations as floats (below) keys alone or values alone bring less than half, a query's own token alone 4% of the
  median; q4_0 gains 78 and 79% from 16 tokens.
- **Measuring with the last tokens in f16**, too (the tap's graph reading them as they were), was tried and not kept: on mha-17m 26% higher on Wikipedia and 16% on Rust source, on gqa-16m 1% and 28%. What is left
  to measure is small, and so its measure is rougher; and rows serve also where slots are lost.
- **The first 4 tokens in f16**: 3% higher on gqa-16m, the median 5% higher on mha-17m, 8 and 17% higher on Rust source. Not kept.
- **More scales** cost more than they bring: one per 64 channels raises the median by 13 and 30%, one per 32 by 32 and 46%; one per 16 has 2.3 times the divergence on gqa-16m, and does not fit mha-17m's budget at all. No scale
  costs 54 and 79%: one per row and head group is right. Searching for it lowers the median by 34 and 20% against clipping nothing (on Rust source by 33% on mha-17m, and on gqa-16m it is 6% higher), and by 48 and 35% against
  taking it from the latent's energy, whose mean on mha-17m is 11 times as high.
- **The codes' entropy** is 9 to 10% below their bits on Wikipedia and 17 to 18% on Rust source, where rows are scaled up for a few channels: a tenth of the
  cache is what an entropy coder could save.
- **Two bytes per weight of every decoder** (one where codes have at most 4.5 bits on average): median 1 to 5% lower, on Rust source 0 to 2%. One is kept.
- **One latent for all heads** is worth 7 times (6 heads) and 1.7 times (2 heads) against one for each, and 3 and 1.9 times against one for each 2 and 3 of 6. Widths of {0,2,4,8} bits alone cost 42% more than all of 0 to 8.
- **Tokens weighted by what attention makes of them** (`--importance 0.5`): on mha-17m 2% lower on Wikipedia, 29% higher on Rust source, for twice the
  statistics. Off.
- **Interaction between layers** (each row measured alone and as the last one compressed): within 3% on Wikipedia and from 6% lower to 12% higher on
  Rust source, in as many measurements as two rounds of each row alone; with `--importance 0.5` beside it 8% lower on Wikipedia and 26% higher on Rust
  source (mha-17m). Neither is a gain that holds on both texts, so both stay out of the default; `--refine thorough` has the first.
- **Part of the variance spread evenly over a side's channels** (1%, so that text of another kind finds bits where the calibration's has little): on
  mha-17m 46% higher on Wikipedia and 83% higher on Rust source. Not kept.
- `--refine thorough` as a whole (parts of the spectrum, descents, several budgets) takes eight times as long as the default and changes no more than chance does: 3% lower and 2% higher on Wikipedia, 25% higher and 3% lower on Rust
  source. It is tested to be no worse on what it measures; measuring more finely is not where quality is lost.
- **Weight types**: with 32K calibration tokens and little measuring, mha-17m at 14.1% diverges by 0.0019 to 0.0020 from its own f16 cache with weights in F32, F16 and BF16, 0.0027 in Q8_0, 0.0033 in
  Q4_K, 0.0034 in IQ4_XS and 0.0038 in Q2_K (q4_0: 0.0092 to 0.0108). Nothing in the converter depends on them; coarser weights make the model's own predictions less certain.

## Time and memory

The last lines of `palu convert` say what it took. Models of random weights in Q4_K (`scripts/random_model.py`), one window of 2048 tokens to collect from, another
one to measure on, 2 cores shared with much other work, so processor time: the 8B model with 8 KV heads took 94 ms per token collected, 9 minutes in all and 5.13 GiB at its peak. The 7B model with 32 KV heads took 100 ms per token, 145 s to decompose 256 groups of 1024 channels, 11 minutes in all and 9.04 GiB at its peak.
In proportion, the default's 131,072 tokens would take 3.4 hours of processor time; `--tokens` says how many, and an interrupted conversion goes on where it was.
"""


def number(pattern, text):
    return float(re.search(pattern + r"\s*:\s*(-?[0-9.]+)", text).group(1))


class Stopped(Exception):
    """There is no time left, or the user has had enough."""


class Step:
    """Something to be made once: a file, or a row's results. `make` is called when everything in `needs` has been made."""

    def __init__(self, name, make, needs=()):
        self.name, self.make, self.needs = name, make, [n for n in needs if n]
        self.state = "waiting"  # then running, and done or failed


class Bench:
    def __init__(self, models, results, threads):
        self.models, self.path, self.threads = models, results, str(threads)
        self.log = open(OUT / "log.txt", "a")
        self.results = {}
        self.steps = {}  # by name
        self.lock = threading.Lock()  # over log, results and children
        self.children = set()
        self.stopped = False
        self.reread()

    def reread(self):
        if self.path.exists():
            self.results.update(json.loads(self.path.read_text()))

    def stop(self):
        with self.lock:
            self.stopped = True
            for child in self.children:
                child.terminate()

    def run(self, command):
        command = [str(c) for c in command]
        with self.lock:
            if self.stopped:
                raise Stopped
            # threads that spin while they wait would take the processors of the others
            environment = {**os.environ, "PALU_LLAMA_BIN": str(BIN), "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
            self.children.add(child)
        text = child.communicate()[0].decode(errors="replace")
        with self.lock:
            self.children.remove(child)
            if self.stopped and child.returncode != 0:
                raise Stopped
            self.log.write(f"$ {' '.join(command)}\n{text}\n")
            self.log.flush()
        if child.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed with status {child.returncode}:\n{text[-1000:]}")
        return text

    def file(self, path, make, needs=()):
        """The step that makes a file, if it is not there. `make` takes the path of a file that is renamed into place."""
        if path.exists():
            return None

        def make_file():
            partial = path.with_name(f"{path.name}.partial")
            make(partial)
            partial.rename(path)

        return self.steps.setdefault(path, Step(path.name, make_file, needs))

    def model(self, name):
        """Path, and the step that makes it."""
        if name == "mha-17m":
            return DATA / "wiki-mha-17m-q8_0.gguf", None
        if name == "gqa-16m":
            return self.models / "wiki-gqa-16m-q8_0.gguf", None
        path, kind = OUT / f"{name}.gguf", name.rsplit("-", 1)[1]
        return path, self.file(path, lambda p: self.run([BIN / "llama-quantize", "--allow-requantize", DATA / "wiki-mha-17m-q8_0.gguf", p, kind]))

    def text(self, name):
        """Path of a calibration text or of the other text; made here and now if it is not there, as it takes no time."""
        path = OUT / f"{name}.txt"
        if name == "wiki":
            return WIKI
        if not path.exists():
            if name == "rust":
                data = b"".join(p.read_bytes() for p in sorted((ROOT / "src").rglob("*.rs")))
            elif name == "mixed":
                data = self.text("code").read_bytes()
                data = WIKI.read_bytes()[:len(data)].decode(errors="ignore").encode() + data
            else:
                source = Path(os.environ.get("LLAMA_CPP_DIR", BUILD / "llama.cpp" / "src")) / "src"
                files = sorted(source.glob("*.cpp")) or sorted((BUILD / "src").rglob("llama-*.cpp"))
                data = b"".join(p.read_bytes() for p in files)[:3_000_000].decode(errors="ignore").encode()
                if not data:
                    raise RuntimeError("llama.cpp's source is not where LLAMA_CPP_DIR says")
            path.write_bytes(data)
        return path

    def perplexity(self, model, text, n_chunk):
        return [BIN / "llama-perplexity", "-m", self.model(model)[0], "-f", text, "-c", N_CTX, "--chunks", n_chunk, "-t", self.threads, "-fa", "on"]

    def base(self, model, text, n_chunk):
        """The logits of the f16 cache, which take some 16 MB a chunk."""
        path = OUT / f"{model}.{text.stem}.kld"
        return path, self.file(path, lambda p: self.run([*self.perplexity(model, text, n_chunk), "--kl-divergence-base", p]), [self.model(model)[1]])

    def divergence(self, model, text, n_chunk, options, ablation=None):
        program, *arguments = self.perplexity(model, text, n_chunk)
        if ablation is not None:
            program, arguments = f"{program}-ablations", [ablation, *arguments]
        command = [program, *arguments, "--kl-divergence", "--kl-divergence-base", self.base(model, text, n_chunk)[0], *options]
        output, found = until_said("Minimum KLD", lambda: self.run(command))
        if not found:
            raise RuntimeError("llama-perplexity printed no divergence")
        result = {"mean": number(r"Mean\s+KLD", output), "median": number(r"Median\s+KLD", output), "tail": number(r"99\.9%\s+KLD", output)}
        if ablation is not None:
            result["percent"] = float(re.findall(r"ablation: .*, ([0-9.]+)% of f16", output)[-1])
            result["entropy"] = float(re.findall(r"ablation: codes .* entropy ([0-9]+)", output)[-1])
            result["bits"] = float(re.findall(r"ablation: codes of ([0-9]+)", output)[-1])
        return result

    def convert(self, row, options, output, statistics):
        self.run([PALU, "convert", self.model(row.model)[0], "--calibration", self.text(row.text), "--output", output, "--threads", self.threads,
                  "--statistics", statistics, "--recent", row.told, *options])

    def statistics(self, row):
        """Path, and the step that collects them: a conversion that measures nothing."""
        shared = [f"--{name} {value}" for name, value in re.findall(r"--(importance|tokens|probe-tokens) (\S+)", row.options)]
        # how much importance weighs is decided later
        name = "".join("-attended" if s.startswith("--importance") else "-" + s.split()[1] + "probe" * ("probe" in s) for s in shared)
        if row.told:
            name += f"-recent{row.told}"
        path = OUT / f"{row.model}-{row.text}{name}.stats"
        options = [*OURS.split(), "--effort", "0,0,0,0,0", *" ".join(shared).split()]

        def collect(partial):  # what an interrupted run left of it is taken up
            self.convert(row, options, partial.with_suffix(".palu"), partial)
            for beside in (".palu", ".partial.probes"):
                partial.with_suffix(beside).unlink(missing_ok=True)

        return path, self.file(path, collect, [self.model(row.model)[1]])

    def projection(self, row):
        told = f" recent {row.told}" if row.told else ""
        path = OUT / (re.sub(r"[^A-Za-z0-9.]+", "_", f"{row.model} {row.options} {row.text}{told}") + ".palu")
        statistics, collected = self.statistics(row)
        return path, self.file(path, lambda p: self.convert(row, row.options.split(), p, statistics), [collected])

    def plan(self, row):
        """Adds the row's steps."""
        if row.key in self.results:
            return
        other = self.text("rust")
        needs = [self.base(row.model, TEST, 16)[1], self.base(row.model, other, 4)[1]]
        if not row.stock:
            projection, made = self.projection(row)
            needs.append(made)

        def measure():
            result = {}
            if row.stock:
                options = ["-ctk", row.stock, "-ctv", row.stock]
                result["percent"] = STOCK[row.stock]
            else:
                inspect = json.loads(self.run([PALU, "inspect", projection, "--json", *(["--bits", row.bits] if row.bits else [])]))
                result["percent"] = inspect["percent_of_f16"] + 100 * row.recent / N_CTX
                options = ["--palu", projection, "--palu-recent", row.recent, *(["--palu-bits", row.bits] if row.bits else [])]
            result["test"] = self.divergence(row.model, TEST, 16, options, row.ablation)
            result["other"] = self.divergence(row.model, other, 4, options, row.ablation)
            result["percent"] = result["test"].get("percent", result["percent"])
            with self.lock:
                self.reread()  # another run may have added rows meanwhile
                self.results[row.key] = result
                partial = self.path.with_suffix(f".{os.getpid()}")
                partial.write_text(json.dumps(self.results, indent=1))
                partial.rename(self.path)

        self.steps.setdefault(row.key, Step(f"{row.section}: {row.key}", measure, needs))


def work(bench, n_job, seconds):
    """Does all steps, `n_job` at once: of those that can be done, the first first. Returns how many failed."""
    steps = list(bench.steps.values())
    changed = threading.Condition()
    start = time.time()

    def next_step():
        """Of the steps that wait; None when there is none and will be none."""
        while not bench.stopped:
            for step in steps:  # after all that it needs
                if step.state == "waiting" and any(n.state == "failed" for n in step.needs):
                    step.state = "failed"
            waiting = [s for s in steps if s.state == "waiting"]
            if not waiting:
                break
            for step in waiting:
                if all(n.state == "done" for n in step.needs):
                    return step
            changed.wait()
        return None

    def worker():
        while True:
            with changed:
                step = next_step()
                if step is None:
                    changed.notify_all()
                    return
                step.state = "running"
            began = time.time()
            try:
                step.make()
                state, said = "done", ""
            except Stopped:
                state, said = "waiting", None
            except Exception as e:
                state, said = "failed", f": {e}"
            with changed:
                step.state = state
                changed.notify_all()
                if said is not None:
                    n_done = sum(s.state == "done" for s in steps)
                    print(f"[{n_done}/{len(steps)}] {time.time() - start:4.0f} s  {step.name}: {time.time() - began:.0f} s{said}", flush=True,
                          file=sys.stderr if said else sys.stdout)

    workers = [threading.Thread(target=worker) for _ in range(n_job)]
    for w in workers:
        w.start()
    try:
        for w in workers:
            w.join(None if seconds is None else max(0, start + seconds - time.time()))
    finally:  # time is up, or Ctrl-C
        bench.stop()
        with changed:
            changed.notify_all()
        for w in workers:
            w.join()
    return sum(s.state == "failed" for s in steps)


def page(every, results):
    lines = ["# Quality", "",
             "What each part of the converter is worth, from `make quality`: llama-perplexity's KL divergence to the f16 cache, -c 2048, on 16 chunks of "
             "WikiText-2 test, and its mean on 4 chunks of this project's source. Calibration is `tests/data/calibration.wiki.txt`, 131,072 "
             "tokens, unless a table says otherwise. Bytes count everything that is stored. The models have 17M parameters (mha-17m: llama architecture, "
             "6 heads of 64) and 16M (gqa-16m: qwen2 architecture, 2 KV heads of 64); what is right for them need not be for models of 8B.", ""]
    for section, (title, text) in SECTIONS.items():
        mine = [r for r in every if r.section == section and r.key in results]
        # a row with nothing to compare it with says nothing
        mine = [r for r in mine if section == "weights" or sum(other.model == r.model for other in mine) > 1]
        if not mine:
            continue
        lines += [f"## {title}", "", *([text, ""] if text else []),
                  "| model | | of f16 | mean KLD | median | 99.9% | other text |", "|---|---|---|---|---|---|---|"]
        for row in mine:
            r = results[row.key]
            lines.append(f"| {row.model} | {row.label} | {r['percent']:.1f}% | {r['test']['mean']:.5f} | {r['test']['median']:.5f} | "
                         f"{r['test']['tail']:.4f} | {r['other']['mean']:.5f} |")
        lines.append("")
    entropies = [r for r in every if r.ablation == "" and r.section == "exact" and r.key in results]
    if entropies:
        lines += ["## Entropy of the codes", "", "Of each channel's codes by themselves: what a coder that knows how often each comes could save.", "",
                  "| model | text | bits of codes per token | entropy | |", "|---|---|---|---|---|"]
        for row in entropies:
            for name, text in (("Wikipedia", "test"), ("Rust source", "other")):
                r = results[row.key][text]
                lines.append(f"| {row.model} | {name} | {r['bits']:.0f} | {r['entropy']:.0f} | {100 * (r['entropy'] / r['bits'] - 1):+.1f}% |")
        lines.append("")
    lines += NOTES.strip().splitlines()
    PAGE.write_text("\n".join(lines).rstrip() + "\n")


def main():
    def positive(text):
        value = int(text)
        if value < 1:
            raise ValueError
        return value

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=os.environ.get("PALU_MODELS"))
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=positive, default=1)
    parser.add_argument("--seconds", type=positive)
    parser.add_argument("--results", type=Path, default=OUT / "results.json")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    models = Path(options.models) if options.models else OUT
    every = rows((models / "wiki-gqa-16m-q8_0.gguf").exists())
    bench = Bench(models, options.results, max(1, N_CPU // options.jobs))
    wanted = [r for r in every if options.only in f"{r.section} {r.key}"]
    if options.list:
        for row in wanted:
            print(f"{'done' if row.key in bench.results else '    '} {row.section}: {row.key}")
        return 0
    n_failed = 0
    if not options.write:
        for row in sorted(wanted, key=lambda r: (any(w in r.key for w in SLOW), WORTH.index(r.section))):
            try:
                bench.plan(row)
            except RuntimeError as e:
                print(f"{row.section}: {row.key}: {e}", file=sys.stderr)
                n_failed += 1
        n_failed += work(bench, options.jobs, options.seconds)
    page(every, bench.results)
    print(f"wrote {PAGE}")
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
