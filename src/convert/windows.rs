//! Which tokens are run: windows spread over the calibration text, or sampled from the model itself.

use super::host::Model;
use crate::hash::xxh64;
use anyhow::{bail, ensure, Context, Result};
use std::path::Path;

/// Fewest tokens of text that a covariance is estimated from; a floor against mistakes, not a recommendation.
pub const MIN_TOKENS: usize = 256;
/// A text too short for full windows is cut into at least this many, because one of them is the probe.
const MIN_WINDOWS: usize = 4;
/// Text is tokenized in pieces of about this many bytes: the callback takes 32-bit sizes, and some tokenizers need
/// memory many times their input.
const PIECE_BYTES: usize = 1 << 20;

pub struct Windows {
    /// what statistics are collected from
    pub collect: Vec<Vec<i32>>,
    /// what divergence is measured on; none of them in `collect`
    pub probe: Vec<Vec<i32>>,
    /// XXH64 of the text, or of the sampled tokens (little-endian i32)
    pub hash: u64,
}

impl Windows {
    pub fn n_token(&self) -> usize {
        self.collect.iter().map(Vec::len).sum()
    }

    /// Tokens of the longest window that is collected from.
    pub fn longest(&self) -> usize {
        self.collect.iter().map(Vec::len).max().unwrap_or(0)
    }
}

/// Reads a calibration text; refuses what cannot be one.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read calibration text {}", path.display()))?;
    ensure!(!bytes.is_empty(), "calibration text {} is empty", path.display());
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(e) => bail!("calibration text {} is not UTF-8 at byte {}", path.display(), e.utf8_error().valid_up_to()),
    }
}

/// Cuts text after a line end where there is one, else between characters.
fn pieces(text: &str, size: usize) -> Vec<&str> {
    let mut rest = text;
    let mut out = Vec::new();
    while rest.len() > size {
        let mut end = size;
        while !rest.is_char_boundary(end) {
            end -= 1;
        }
        let end = rest[..end].rfind('\n').map_or(end, |i| i + 1);
        let (piece, tail) = rest.split_at(end);
        out.push(piece);
        rest = tail;
    }
    if !rest.is_empty() {
        out.push(rest);
    }
    out
}

/// About `n_collect` and `n_probe` tokens in windows of the context's size, spread evenly over the whole text: tokens of
/// the first articles alone gave three times the divergence.
pub fn from_text(model: &Model, text: &str, n_collect: usize, n_probe: usize) -> Result<Windows> {
    ensure!(model.has_tokenizer, "the model has no vocabulary to tokenize text with; use --calibration self");
    let mut tokens = Vec::new();
    for piece in pieces(text, PIECE_BYTES) {
        tokens.extend(model.tokenize(piece)?);
    }
    ensure!(
        tokens.len() >= MIN_TOKENS,
        "the calibration text is too short: {} tokens, at least {MIN_TOKENS} are needed",
        tokens.len()
    );
    let bad = tokens.iter().find(|&&t| t < 0 || t as usize >= model.n_vocab);
    ensure!(bad.is_none(), "the runtime's tokenizer gave a token outside the vocabulary");

    let n_bos = usize::from(model.token_bos.is_some());
    let length = (model.n_ctx - n_bos).min(tokens.len() / MIN_WINDOWS).max(1);
    let (n_collect, n_probe) = split(tokens.len() / length, n_collect.div_ceil(length + n_bos), n_probe.div_ceil(length + n_bos));
    let n_window = n_collect + n_probe;
    let mut windows = Windows { collect: Vec::new(), probe: Vec::new(), hash: xxh64(text.as_bytes(), 0) };
    for i in 0..n_window {
        // the last window ends with the text
        let start = (tokens.len() - length) * i / (n_window - 1).max(1);
        let window = model.token_bos.into_iter().chain(tokens[start..start + length].iter().copied()).collect();
        if is_probe(i, n_window, n_probe) {
            windows.probe.push(window);
        } else {
            windows.collect.push(window);
        }
    }
    Ok(windows)
}

/// How many of `n` windows are collected from and probed: what is asked for, or shares of what there is.
fn split(n: usize, n_collect: usize, n_probe: usize) -> (usize, usize) {
    let n_probe = n_probe.clamp(1, (n / MIN_WINDOWS).max(1));
    (n_collect.clamp(1, (n - n_probe).max(1)), n_probe)
}

/// Probe windows lie in the middle of `n_probe` equal stretches.
fn is_probe(i: usize, n_window: usize, n_probe: usize) -> bool {
    let stretch = i * n_probe / n_window;
    let (first, end) = ((stretch * n_window).div_ceil(n_probe), ((stretch + 1) * n_window).div_ceil(n_probe));
    i == (first + end) / 2
}

/// SplitMix64 (Steele, Lea and Flood 2014).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Of mean 0 and deviation 1 (Box and Muller 1958).
    pub fn gaussian(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.uniform()).cos()) as f32
    }

    /// An index drawn with the probabilities softmax(logits).
    fn softmax(&mut self, logits: &[f32]) -> usize {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |l: f32| f64::from(l - max).exp();
        let mut left = self.uniform() * logits.iter().map(|&l| weight(l)).sum::<f64>();
        let mut last = 0;
        for (i, &l) in logits.iter().enumerate() {
            let w = weight(l);
            if w > 0.0 {
                last = i;
            }
            left -= w;
            if left < 0.0 {
                return i;
            }
        }
        last
    }
}

/// Of the windows that a model writes itself, every so many are of random tokens instead: a model that keeps to few of its
/// tokens would leave the directions of all others without variance, and so without bits.
const RANDOM_EVERY: usize = 4;

/// Windows of the context's size that the model writes itself, one token at a time at temperature 1.
pub fn sampled(model: &Model, n_collect: usize, n_probe: usize, seed: u64, mut progress: impl FnMut(usize, usize)) -> Result<Windows> {
    let length = model.n_ctx;
    let (n_collect, n_probe) = (n_collect.div_ceil(length).max(1), n_probe.div_ceil(length).max(1));
    let n_window = n_collect + n_probe;
    let mut random = Random(seed);
    let mut windows = Windows { collect: Vec::new(), probe: Vec::new(), hash: 0 };
    let mut logits = vec![0f32; model.n_vocab];
    let mut count = [0; 2];
    for i in 0..n_window {
        // counted apart, or all random windows may happen to be probes
        let probe = is_probe(i, n_window, n_probe);
        let nth = &mut count[usize::from(probe)];
        let is_random = *nth % RANDOM_EVERY == 1;
        *nth += 1;
        let first = model.token_bos.unwrap_or_else(|| (random.bits() % model.n_vocab as u64) as i32);
        let mut window = vec![first];
        if is_random {
            window.extend((1..length).map(|_| (random.bits() % model.n_vocab as u64) as i32));
        }
        while window.len() < length {
            let keep = window.len() > 1;
            model.eval(&window[window.len() - 1..], keep, 0, &mut logits)?;
            ensure!(
                logits.iter().all(|l| l.is_finite() || *l == f32::NEG_INFINITY) && logits.iter().any(|l| l.is_finite()),
                "the model's logits are not finite, so it cannot sample its own text"
            );
            window.push(random.softmax(&logits) as i32);
            progress(i * length + window.len(), n_window * length);
        }
        let bytes: Vec<u8> = window.iter().flat_map(|t| t.to_le_bytes()).collect();
        windows.hash = xxh64(&bytes, windows.hash);
        if probe {
            windows.probe.push(window);
        } else {
            windows.collect.push(window);
        }
    }
    Ok(windows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_keep_every_byte_and_character() {
        let text = "αβγ δε\n".repeat(100) + &"é".repeat(300);
        for size in [7, 64, 100, 10_000] {
            let cut = pieces(&text, size);
            assert_eq!(cut.concat(), text);
            assert!(cut.iter().all(|p| !p.is_empty() && p.len() <= size));
        }
    }

    #[test]
    fn as_many_probe_windows_as_asked_for() {
        for n in 2..80 {
            for n_probe in 1..=n / 2 {
                assert_eq!((0..n).filter(|&i| is_probe(i, n, n_probe)).count(), n_probe, "{n_probe} of {n}");
            }
        }
        assert_eq!(split(1000, 64, 2), (64, 2));
        assert_eq!(split(4, 64, 2), (3, 1));
        assert_eq!(split(20, 64, 2), (18, 2));
    }

    #[test]
    fn samples_follow_the_softmax() {
        let logits = [0.0f32, 2f32.ln(), f32::NEG_INFINITY, 5f32.ln()];
        let mut random = Random(7);
        let mut count = [0; 4];
        for _ in 0..8000 {
            count[random.softmax(&logits)] += 1;
        }
        assert_eq!(count[2], 0);
        for (c, p) in count.iter().zip([0.125, 0.25, 0.0, 0.625]) {
            assert!((f64::from(*c) / 8000.0 - p).abs() < 0.02);
        }
    }
}
