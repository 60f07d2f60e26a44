//! Every architecture that llama.cpp can write a random model of: either the patched llama.cpp gives the stock logits with a
//! projection that is as lossless as can be, and nearly so with one of 14.1% of the bytes, or it refuses the model with a reason.
//! The page docs/architectures.md is generated here (`make docs`); what it lists is held against what happens.

mod runtime;
use runtime::{cache_dir, llama, logits, nmse, palu, steps, succeed, text};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

const BITS: &str = "8.2";
/// 14.1% of f16, half of q4_0's.
const SMALL_BITS: &str = "2.25";
const NMSE_MOST: f64 = 1e-3;
/// Deviation of the random weights. With llama.cpp's default of 0.1 attention has next to no part in the logits, as the weights of
/// norms are as small; from 0.4 on some models are chaotic and make much of any rounding.
const DEVIATION: &str = "0.2";
/// Most of q4_0's divergence at SMALL_BITS, half of its bytes, and at BITS: talkie has a third there, made from so few tokens, and a
/// hundredth with 16384; all others have a hundredth.
const SMALL_MOST: f64 = 1.0;
const FULL_MOST: f64 = 0.5;
const DOC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/architectures.md");
/// A prompt, then tokens one by one, then a few together: both schedules of the kernels.
const SCRIPT: [&str; 5] = ["rand:0@0:120:1", "rand:0@120:1:2", "rand:0@121:1:3", "rand:0@122:5:4", "rand:0@127:64:5"];
const N_TOKEN: usize = 191;
const N_COLLECT: &str = "3072";

enum Outcome {
    Served(Figures),
    Refused(String),
    /// llama.cpp itself does not run these steps on this model
    NotCausal(String),
}

/// How far the logits are from those of the stock f32 cache.
struct Figures {
    nmse: f64,
    /// mean KL divergence at BITS, at SMALL_BITS and of a stock q4_0 cache, where llama.cpp has one for the model
    divergence: f64,
    small: f64,
    stock: Option<f64>,
}

/// Mean KL divergence of a token's distribution.
fn divergence(reference: &[f32], other: &[f32]) -> f64 {
    assert_eq!(reference.len(), other.len());
    let n_vocab = reference.len() / N_TOKEN;
    let log_softmax = |logits: &[f32]| -> Vec<f64> {
        let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
        logits.iter().map(|&l| f64::from(l) - max - sum.ln()).collect()
    };
    let token = |(p, q): (&[f32], &[f32])| -> f64 {
        // logits of tokens that a model rules out are -inf in both
        let pairs = log_softmax(p).into_iter().zip(log_softmax(q)).filter(|(p, _)| p.is_finite());
        pairs.map(|(p, q)| p.exp() * (p - q)).sum()
    };
    reference.chunks(n_vocab).zip(other.chunks(n_vocab)).map(token).sum::<f64>() / N_TOKEN as f64
}

fn reason(stderr: &str) -> String {
    // the patched llama.cpp's own sentence says more than the converter's that the model was refused
    let said = |by: &str| stderr.lines().rev().find_map(|l| l.split_once(by)).map(|(_, why)| why.trim().to_owned());
    said("palu: ").or_else(|| said("palu convert: ")).unwrap_or_else(|| panic!("no reason given:\n{stderr}"))
}

fn try_model(model: &Path, dir: &Path) -> Outcome {
    let options = ["--ctx", "256", "--threads", "1"];
    let name = model.file_stem().unwrap().to_str().unwrap();
    let run_stock = |cache: [&str; 4]| {
        let out = dir.join(format!("{name}.{}", cache[1]));
        let output = llama("palu-steps").arg(model).arg(&out).args(cache).args(options).args(SCRIPT).output().unwrap();
        if output.status.success() { Ok(logits(&out)) } else { Err(output.status) }
    };
    // without flash attention, which would read an f32 cache as f16
    let expected = match run_stock(["--type", "f32", "--fa", "0"]) {
        Ok(logits) => logits,
        Err(status) => return Outcome::NotCausal(status.to_string()),
    };
    let mut got = Vec::new();
    for bits in [BITS, SMALL_BITS] {
        let projection = dir.join(format!("{name}.{bits}.palu"));
        let convert = palu()
            .args(["convert", model.to_str().unwrap(), "--calibration", "self", "--bits-per-value", bits, "--threads", "1"])
            .args(["--tokens", N_COLLECT, "--probe-tokens", "512", "--refine", "quick", "--output"])
            .arg(&projection)
            .output()
            .unwrap();
        let stderr = text(&convert.stderr);
        if !convert.status.success() {
            assert!(convert.status.code().is_some(), "{name}: {}\n{stderr}", convert.status);
            assert!(!projection.exists(), "{name}: refused, but a file was left");
            assert!(got.is_empty(), "{name}: refused at {bits} bits alone\n{stderr}");
            return Outcome::Refused(reason(&stderr));
        }
        got.push(steps(model, &[&["--palu", projection.to_str().unwrap()], &options[..], &SCRIPT].concat()));
    }
    Outcome::Served(Figures {
        nmse: nmse(&expected, &got[0]),
        divergence: divergence(&expected, &got[0]),
        small: divergence(&expected, &got[1]),
        stock: run_stock(["--type", "q4_0", "--fa", "1"]).ok().map(|l| divergence(&expected, &l)),
    })
}

fn shown(divergence: &Option<f64>) -> String {
    divergence.map_or("-".to_owned(), |d| format!("{d:.1e}"))
}

/// The page without what differs from machine to machine: of a line with divergences the model alone.
fn without_figures(page: &str) -> String {
    let is_figure = |cell: &str| cell.trim().parse::<f64>().is_ok();
    page.lines().map(|l| if l.split('|').any(is_figure) { l.split('|').nth(1).unwrap_or(l) } else { l }).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_architecture_is_served_exactly_or_refused() {
    let dir = cache_dir().join("archs");
    std::fs::create_dir_all(&dir).unwrap();
    succeed(llama("test-llama-archs").args(["-s", "1", "-d", DEVIATION, "-o"]).arg(&dir));
    let mut models: Vec<PathBuf> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
    models.retain(|p| p.extension().is_some_and(|e| e == "gguf"));
    models.sort();
    assert!(models.len() > 100, "only {} models", models.len());

    let work = tempfile::tempdir().unwrap();
    let next = Mutex::new(0..models.len());
    let outcomes = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| loop {
                let Some(i) = next.lock().unwrap().next() else { break };
                let outcome = try_model(&models[i], work.path());
                outcomes.lock().unwrap().push((i, outcome));
            });
        }
    });
    let mut outcomes = outcomes.into_inner().unwrap();
    outcomes.sort_by_key(|o| o.0);

    let mut served = String::new();
    let mut refused = String::new();
    let mut bad = Vec::new();
    let mut n_served = 0;
    for (i, outcome) in &outcomes {
        let name = models[*i].file_stem().unwrap().to_str().unwrap();
        match outcome {
            Outcome::Served(Figures { nmse, divergence, small, stock }) => {
                println!("{name}: NMSE {nmse:.2e}, KLD {divergence:.2e}, {small:.2e}, q4_0 {}", shown(stock));
                n_served += 1;
                served += &format!("| `{name}` | {} | {} | {} |\n", shown(&Some(*divergence)), shown(&Some(*small)), shown(stock));
                if !(*nmse <= NMSE_MOST) {
                    bad.push(format!("{name}: NMSE {nmse:.2e}"));
                }
                if stock.is_some_and(|s| !(*small <= SMALL_MOST * s && *divergence <= FULL_MOST * s)) {
                    bad.push(format!("{name}: KLD {divergence:.2e}, {small:.2e}, q4_0 {}", shown(stock)));
                }
            }
            Outcome::Refused(why) => refused += &format!("| `{name}` | {why} |\n"),
            Outcome::NotCausal(status) => refused += &format!("| `{name}` | not a causal language model with a KV cache (stock llama.cpp: {status}) |\n"),
        }
    }
    assert!(bad.is_empty(), "these architectures do not give the stock logits:\n{}", bad.join("\n"));
    assert!(n_served > 60, "only {n_served} architectures are served");

    let doc = format!(
        "# Architectures\n\n\
         Generated by `make docs` from the random models that llama.cpp's `test-llama-archs` writes (dense and mixture of experts, weights\n\
         of deviation {DEVIATION}); `make test` holds this page against what happens.\n\n\
         ## Served\n\n\
         Served means: with a projection of full rank and {BITS} bits per value, the logits of a prompt, of single tokens and of small\n\
         batches are those of the stock f32 cache to NMSE {NMSE_MOST:e} or better; and the mean KL divergence, in this table, is no more than\n\
         {FULL_MOST} of a stock q4_0 cache's, and at {SMALL_BITS} bits per value (14.1% of f16, half of q4_0's bytes) no more than q4_0's. The\n\
         projections are made from {N_COLLECT} tokens that the model writes itself. Random models have a vocabulary of 128 and two or three\n\
         layers, so their keys and values have few directions: what a trained model loses is in [quality.md](quality.md). Figures\n\
         differ in their last digits from machine to machine. A dash: llama.cpp has no q4_0 cache for this head size.\n\n\
         | model | KLD at {BITS} bits | at {SMALL_BITS} bits | stock q4_0 |\n|---|---|---|---|\n{served}\n\
         ## Refused, when the model is loaded or converted\n\n| model | reason |\n|---|---|\n{refused}"
    );
    if std::env::var_os("PALU_WRITE_DOCS").is_some() {
        std::fs::write(DOC, &doc).unwrap();
    }
    let written = std::fs::read_to_string(DOC).unwrap_or_default();
    assert!(without_figures(&written) == without_figures(&doc), "docs/architectures.md is not what happens; run `make docs`. It should read:\n{doc}");
}
