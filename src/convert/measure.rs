//! How much a unit of distortion costs in each layer and side, measured; and the allocation that follows.
//!
//! The metric says which errors of one side cost more than others of the same side, but not how layers and sides compare.
//! So each is compressed alone, and the divergence that it causes is divided by the distortion that its bits predict.

use super::host::Model;
use super::stats::{Mode, Tap};
use crate::codec::Codec;
use crate::layout::{self, Allocation, MAX_BITS};
use crate::projection::{ProjectionFile, Side, SideProj, SIDES};
use anyhow::{ensure, Context, Result};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::Mutex;

/// Divergence below which f32 logits show rounding error and no more.
const DIVERGENCE_FLOOR: f64 = 1e-7;
/// Logits kept in memory, those of the run without compression and those being compared with it.
const LOGITS_BYTES: usize = 1 << 30;

/// `f(0..n)` on some threads; results in order.
pub fn parallel<T: Send>(n: usize, n_thread: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(n));
    std::thread::scope(|scope| {
        for _ in 0..n_thread.clamp(1, n.max(1)) {
            scope.spawn(|| loop {
                let i = next.fetch_add(1, Relaxed);
                if i >= n {
                    return;
                }
                let result = f(i);
                done.lock().expect("no thread panics while it holds the lock").push((i, result));
            });
        }
    });
    let mut done = done.into_inner().expect("threads that panic end the scope first");
    done.sort_unstable_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, result)| result).collect()
}

/// log of the sum of exp.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(max) + logits.iter().map(|&l| f64::from((l - max).exp())).sum::<f64>().ln()
}

/// Kullback-Leibler divergence of softmax(other) from softmax(base), in nats.
fn divergence(base: &[f32], base_lse: f64, other: &[f32]) -> f64 {
    // by differences of logits, because the divergence is a small difference of large entropies
    let mut sum = 0.0;
    for (&b, &o) in base.iter().zip(other) {
        let p = (f64::from(b) - base_lse) as f32;
        // a logit of -inf in both is a token that cannot be
        if p > -80.0 {
            sum += f64::from(p.exp()) * (f64::from(b) - f64::from(o));
        }
    }
    sum + log_sum_exp(other) - base_lse
}

fn position(logits: &[f32], n_vocab: usize, i: usize) -> &[f32] {
    &logits[i * n_vocab..][..n_vocab]
}

/// Windows whose logits without compression are known.
pub struct Probe<'a> {
    model: &'a Model<'a>,
    tap: &'a Tap,
    n_thread: usize,
    windows: &'a [Vec<i32>],
    /// positions compared, at the end of each window: cells far back are read there
    n_position: usize,
    /// `[window][n_position][n_vocab]`
    base: Vec<Vec<f32>>,
    /// `[window][n_position]`
    base_lse: Vec<Vec<f64>>,
    logits: Vec<f32>,
}

impl<'a> Probe<'a> {
    pub fn new(model: &'a Model<'a>, tap: &'a Tap, windows: &'a [Vec<i32>], n_thread: usize) -> Result<Self> {
        let shortest = windows.iter().map(Vec::len).min().context("there is no window to measure on")?;
        let most = LOGITS_BYTES / (4 * model.n_vocab * (windows.len() + 1));
        let n_position = (shortest / 2).min(most).max(1);
        let n_vocab = model.n_vocab;
        let logits = vec![0f32; n_position * n_vocab];
        let mut probe =
            Self { model, tap, n_thread, windows, n_position, base: Vec::new(), base_lse: Vec::new(), logits };
        tap.replace_mode(Mode::Pass);
        for window in windows {
            probe.eval(window)?;
            let lse = parallel(n_position, n_thread, |i| log_sum_exp(position(&probe.logits, n_vocab, i)));
            ensure!(lse.iter().all(|l| l.is_finite()), "the model's own logits are not finite");
            probe.base.push(probe.logits.clone());
            probe.base_lse.push(lse);
        }
        Ok(probe)
    }

    fn eval(&mut self, window: &[i32]) -> Result<()> {
        self.model.eval(window, false, window.len() - self.n_position, &mut self.logits)
    }

    /// Mean divergence per token with these sides compressed.
    pub fn divergence(&mut self, sides: impl IntoIterator<Item = ((usize, Side), Codec)>) -> Result<f64> {
        let sides: BTreeMap<_, _> = sides.into_iter().collect();
        let (first, side) = *sides.keys().next().context("nothing is compressed")?;
        self.tap.replace_mode(Mode::Compress(sides));
        let mut sum = 0.0;
        for (w, window) in self.windows.iter().enumerate() {
            self.eval(window)?;
            let (base, lse, logits, n_vocab) = (&self.base[w], &self.base_lse[w], &self.logits, self.model.n_vocab);
            let each = parallel(self.n_position, self.n_thread, |i| {
                divergence(position(base, n_vocab, i), lse[i], position(logits, n_vocab, i))
            });
            sum += each.iter().sum::<f64>();
        }
        self.tap.replace_mode(Mode::Pass);
        ensure!(sum.is_finite(), "the model's logits are not finite once the {} of layer {first} are compressed", super::solve::name(side));
        Ok(sum / (self.windows.len() * self.n_position) as f64)
    }
}

/// A file of all channels with an allocation for it.
struct Candidate {
    /// per layer and side
    weight: Vec<f64>,
    allocation: Allocation,
}

/// Layer and side of each row, as [`ProjectionFile::spectra`] orders them.
fn rows(file: &ProjectionFile) -> Vec<(usize, Side)> {
    file.layers.iter().enumerate().flat_map(|(i, _)| SIDES.map(|s| (i, s))).collect()
}

fn set_weights(file: &mut ProjectionFile, weight: &[f64]) {
    for ((i, side), &w) in rows(file).into_iter().zip(weight) {
        file.layers[i].sides[side as usize].weight = w;
    }
}

fn candidate(file: &mut ProjectionFile, weight: Vec<f64>) -> Candidate {
    set_weights(file, &weight);
    let allocation = layout::allocate(&file.spectra(), file.meta.bits_per_value);
    Candidate { weight, allocation }
}

/// Bits of each group of row `row`.
fn row_bits<'b>(file: &ProjectionFile, allocation: &'b Allocation, row: usize) -> &'b [Vec<u8>] {
    let n_group = |&(i, side): &(usize, Side)| file.layers[i].sides[side as usize].groups.len();
    let rows = rows(file);
    let start: usize = rows[..row].iter().map(n_group).sum();
    &allocation.bits[start..start + n_group(&rows[row])]
}

fn row_codec(file: &ProjectionFile, allocation: &Allocation, row: usize) -> ((usize, Side), Codec) {
    let (i, side) = rows(file)[row];
    let bits: Vec<&[u8]> = row_bits(file, allocation, row).iter().map(Vec::as_slice).collect();
    let layer = &file.layers[i];
    let proj = SideProj::new(side, &layer.sides[side as usize], &bits, allocation.row_bytes[row]);
    ((layer.il, side), Codec::new(&proj))
}

/// What the allocation predicts for row `row`, in the metric.
fn row_distortion(file: &ProjectionFile, allocation: &Allocation, row: usize) -> f64 {
    let (i, side) = rows(file)[row];
    let groups = &file.layers[i].sides[side as usize].groups;
    groups.iter().zip(row_bits(file, allocation, row)).map(|(g, bits)| layout::distortion(&g.variance, bits)).sum()
}

/// Weights from each row's divergence and predicted distortion. A row whose divergence is lost in rounding error keeps its
/// prior, scaled as the measured ones moved.
fn measured_weights(divergence: &[f64], distortion: &[f64], prior: &[f64]) -> Vec<f64> {
    let ratio = |i: usize| {
        let sound = divergence[i] > DIVERGENCE_FLOOR && distortion[i] > 0.0 && prior[i] > 0.0;
        sound.then(|| divergence[i] / distortion[i] / prior[i])
    };
    let mut moved: Vec<f64> = (0..prior.len()).filter_map(ratio).collect();
    moved.sort_unstable_by(f64::total_cmp);
    // the lower quartile, because these rows are known to cost little
    let fallback = moved.get(moved.len() / 4).copied().unwrap_or(1.0);
    (0..prior.len())
        .map(|i| match ratio(i) {
            Some(ratio) => prior[i] * ratio,
            // not more than would have shown
            None if distortion[i] > 0.0 => (prior[i] * fallback).min(DIVERGENCE_FLOOR / distortion[i]),
            None => prior[i] * fallback,
        })
        .collect()
}

pub struct Outcome {
    /// mean divergence per token with everything compressed; `None` where there was nothing to decide
    pub divergence: Option<f64>,
    pub allocation: Allocation,
}

/// Probe runs that [`settle`] makes at most, that without compression included.
pub fn n_run(n_layer: usize) -> usize {
    2 * 2 * n_layer + 5
}

/// Measures `file`'s weights (set to their prior by then) and leaves those that did best in it. `probe` is made on demand;
/// `progress` is told after each run.
pub fn settle<'a>(
    file: &mut ProjectionFile,
    probe: impl FnOnce() -> Result<Probe<'a>>,
    mut progress: impl FnMut(),
) -> Result<Outcome> {
    let n_row = rows(file).len();
    let prior: Vec<f64> = file.layers.iter().flat_map(|l| &l.sides).map(|s| s.weight).collect();
    let mut current = candidate(file, prior.clone());
    let spectra = file.spectra();
    let saturated = spectra.iter().zip(&current.allocation.bits).all(|(s, bits)| {
        s.variance.chunks(layout::SEGMENT).zip(bits).all(|(v, &b)| b as usize == MAX_BITS || v.iter().all(|&v| v == 0.0))
    });
    if saturated {
        return Ok(Outcome { divergence: None, allocation: current.allocation });
    }

    let mut probe = probe()?;
    progress();
    let mut best_divergence = together(&mut probe, file, &current)?;
    progress();
    let mut last: Option<Vec<f64>> = None;
    for _ in 0..2 {
        let mut each = Vec::new();
        for row in 0..n_row {
            each.push(probe.divergence([row_codec(file, &current.allocation, row)])?);
            progress();
        }
        let distortion: Vec<f64> = (0..n_row).map(|row| row_distortion(file, &current.allocation, row)).collect();
        let weight = measured_weights(&each, &distortion, &prior);
        // two measurements at different operating points: their middle often does better than the second alone
        let middle = last.map(|last| last.iter().zip(&weight).map(|(a, b)| (a * b).sqrt()).collect());
        last = Some(weight.clone());
        for weight in std::iter::once(weight).chain(middle) {
            let next = candidate(file, weight);
            let divergence = together(&mut probe, file, &next)?;
            progress();
            if divergence < best_divergence {
                (best_divergence, current) = (divergence, next);
            }
        }
    }
    set_weights(file, &current.weight);
    Ok(Outcome { divergence: Some(best_divergence), allocation: current.allocation })
}

fn together(probe: &mut Probe, file: &ProjectionFile, candidate: &Candidate) -> Result<f64> {
    probe.divergence((0..rows(file).len()).map(|row| row_codec(file, &candidate.allocation, row)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_that_of_the_definition() {
        let (a, b) = ([0.5f32, -1.0, 3.0, f32::NEG_INFINITY], [0.4f32, -0.5, 2.0, f32::NEG_INFINITY]);
        let p = |l: &[f32]| l.iter().map(|&x| (f64::from(x) - log_sum_exp(l)).exp()).collect::<Vec<f64>>();
        let want: f64 = p(&a).iter().zip(p(&b)).take(3).map(|(p, q)| p * (p / q).ln()).sum();
        assert!((divergence(&a, log_sum_exp(&a), &b) - want).abs() < 1e-7);
        assert_eq!(divergence(&a, log_sum_exp(&a), &a), 0.0);
        assert!(divergence(&a, log_sum_exp(&a), &[f32::NAN; 4]).is_nan());
    }

    #[test]
    fn weights_are_divergence_per_distortion_and_bounded_where_nothing_shows() {
        let prior = [1.0, 2.0, 4.0, 1.0];
        let weight = measured_weights(&[1e-3, 2e-3, 0.0, 4e-3], &[0.1, 0.1, 0.5, 0.1], &prior);
        assert!((weight[0] - 1e-2).abs() < 1e-12 && (weight[1] - 2e-2).abs() < 1e-12 && (weight[3] - 4e-2).abs() < 1e-12);
        assert_eq!(weight[2], DIVERGENCE_FLOOR / 0.5);
        // nothing can be measured at all: the prior's proportions stay where they were
        assert_eq!(measured_weights(&[0.0; 4], &[0.0; 4], &prior), prior);
    }

    #[test]
    fn parallel_results_are_in_order() {
        assert_eq!(parallel(100, 7, |i| i * i), (0..100).map(|i| i * i).collect::<Vec<_>>());
        assert!(parallel(0, 3, |i| i).is_empty());
    }
}
