//! How much a unit of distortion costs in each layer and side, measured; and the allocation that follows.
//!
//! The metric says which errors of one side cost more than others of the same side, but not how layers and sides compare.
//! So each is compressed alone, and the divergence that it causes is divided by the distortion that its bits predict.

use super::checkpoint::Memo;
use super::host::Model;
use super::stats::{Change, Mode, Tap};
use crate::codec::Codec;
use crate::hash::xxh64;
use crate::layout::{self, Allocation, Spectrum, DISTORTION, MAX_BITS, ROW_ALIGN, SCALE_BYTES, SEGMENT};
use crate::projection::{GroupFile, ProjectionFile, Side, SideProj, SIDES};
use anyhow::{ensure, Context, Result};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use half::f16;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::Mutex;
use std::time::Instant;

/// Divergence below which f32 logits show rounding error and no more.
const DIVERGENCE_FLOOR: f64 = 1e-7;
/// Logits kept in memory, those of the run without compression and those being compared with it.
const LOGITS_BYTES: usize = 1 << 30;

/// Between the budgets that weights are measured at.
const BUDGET_RATIO: f64 = 1.414;

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

/// A side that is changed while divergence is measured.
pub enum Trial {
    /// stored as rows
    Stored(SideProj),
    /// the same, but of the error only what [`Change::Part`] keeps
    Part(SideProj, Vec<Option<Vec<f32>>>),
    Noise(f32),
}

impl Trial {
    /// A hash of all that it depends on.
    fn key(&self, seed: u64) -> u64 {
        let floats = |x: &[f32], h| x.iter().fold(h, |h, v| xxh64(&v.to_le_bytes(), h));
        let halves = |x: &[f16], h| {
            // SAFETY: f16 has no padding
            let bytes = unsafe { std::slice::from_raw_parts(x.as_ptr().cast::<u8>(), 2 * x.len()) };
            xxh64(bytes, h)
        };
        let stored = |p: &SideProj, h| {
            let h = floats(&p.mean, h);
            p.groups.iter().fold(h, |h, g| halves(&g.dec, halves(&g.enc, floats(&g.step, xxh64(&g.bits, h)))))
        };
        match self {
            Self::Stored(p) => stored(p, xxh64(b"stored", seed)),
            Self::Part(p, parts) => {
                let h = stored(p, xxh64(b"part", seed));
                parts.iter().fold(h, |h, part| floats(part.as_deref().unwrap_or(&[]), xxh64(b",", h)))
            }
            Self::Noise(deviation) => floats(&[*deviation], xxh64(b"noise", seed)),
        }
    }

    fn change(self) -> Change {
        match self {
            Self::Stored(p) => Change::Codec(Codec::new(&p)),
            Self::Part(p, parts) => Change::Part(Codec::new(&p), parts),
            Self::Noise(deviation) => Change::Noise { deviation, seed: 0 },
        }
    }
}

/// Windows that divergence is measured on.
pub struct Probe<'a> {
    model: &'a Model<'a>,
    tap: &'a Tap,
    n_thread: usize,
    windows: &'a [Vec<i32>],
    /// positions compared, at the end of each window: cells far back are read there
    n_position: usize,
    /// logits without compression and the logarithms of their sums, `[window][n_position][n_vocab]` and `[window][n_position]`
    base: Vec<(Vec<f32>, Vec<f64>)>,
    logits: Vec<f32>,
    memo: Memo,
    seed: u64,
    /// runs of the model over the windows, and the seconds that they took
    pub n_run: usize,
    pub seconds: f64,
}

impl<'a> Probe<'a> {
    /// `identity` stands for the model.
    pub fn new(model: &'a Model<'a>, tap: &'a Tap, windows: &'a [Vec<i32>], n_thread: usize, memo: Memo, identity: u64) -> Result<Self> {
        let shortest = windows.iter().map(Vec::len).min().context("there is no window to measure on")?;
        let most = LOGITS_BYTES / (4 * model.n_vocab * (windows.len() + 1));
        let n_position = (shortest / 2).min(most).max(1);
        let token = |h, t: &i32| xxh64(&t.to_le_bytes(), h);
        let seed = windows.iter().fold(xxh64(&(n_position as u64).to_le_bytes(), identity), |h, w| w.iter().fold(xxh64(b"w", h), token));
        Ok(Self { model, tap, n_thread, windows, n_position, base: Vec::new(), logits: Vec::new(), memo, seed, n_run: 0, seconds: 0.0 })
    }

    /// Removes what was kept for an interruption.
    pub fn forget(&self) {
        self.memo.remove();
    }

    /// Tokens that are run per measurement.
    pub fn n_token(&self) -> usize {
        self.windows.iter().map(Vec::len).sum()
    }

    fn eval(&mut self, window: &[i32]) -> Result<()> {
        self.model.eval(window, false, window.len() - self.n_position, &mut self.logits)
    }

    fn run_base(&mut self) -> Result<()> {
        self.logits = vec![0f32; self.n_position * self.model.n_vocab];
        self.tap.replace_mode(Mode::Pass);
        for window in self.windows {
            self.eval(window)?;
            let (logits, n_vocab) = (&self.logits, self.model.n_vocab);
            let lse = parallel(self.n_position, self.n_thread, |i| log_sum_exp(position(logits, n_vocab, i)));
            ensure!(lse.iter().all(|l| l.is_finite()), "the model's own logits are not finite");
            self.base.push((self.logits.clone(), lse));
        }
        Ok(())
    }

    /// Mean divergence per token with these sides of these layers changed.
    pub fn divergence(&mut self, trials: BTreeMap<(usize, Side), Trial>) -> Result<f64> {
        let (first, side) = *trials.keys().next().context("nothing is compressed")?;
        let place = |h, &(il, side): &(usize, Side)| xxh64(&(2 * il as u64 + side as u64).to_le_bytes(), h);
        let key = trials.iter().fold(self.seed, |h, (at, trial)| trial.key(place(h, at)));
        if let Some(known) = self.memo.get(key) {
            return Ok(known);
        }
        if self.base.is_empty() {
            self.run_base()?;
        }
        let start = Instant::now();
        self.tap.replace_mode(Mode::Compress(trials.into_iter().map(|(at, trial)| (at, trial.change())).collect()));
        let mut sum = 0.0;
        for (w, window) in self.windows.iter().enumerate() {
            self.eval(window)?;
            let ((base, lse), logits, n_vocab) = (&self.base[w], &self.logits, self.model.n_vocab);
            let each = parallel(self.n_position, self.n_thread, |i| {
                divergence(position(base, n_vocab, i), lse[i], position(logits, n_vocab, i))
            });
            sum += each.iter().sum::<f64>();
        }
        self.tap.replace_mode(Mode::Pass);
        ensure!(sum.is_finite(), "the model's logits are not finite once the {} of layer {first} are compressed", super::solve::name(side));
        let mean = sum / (self.windows.len() * self.n_position) as f64;
        self.memo.put(key, mean);
        self.n_run += 1;
        self.seconds += start.elapsed().as_secs_f64();
        Ok(mean)
    }
}

/// A file of all channels with an allocation for it.
#[derive(Clone)]
struct Candidate {
    /// per layer and side
    weight: Vec<f64>,
    allocation: Allocation,
}

/// Layer and side of each row, as [`ProjectionFile::spectra`] orders them.
fn rows(file: &ProjectionFile) -> Vec<(usize, Side)> {
    file.layers.iter().enumerate().flat_map(|(i, _)| SIDES.map(|s| (i, s))).collect()
}

/// Bits of each group of row `row`.
fn row_bits<'b>(file: &ProjectionFile, allocation: &'b Allocation, row: usize) -> &'b [Vec<u8>] {
    let n_group = |&(i, side): &(usize, Side)| file.layers[i].sides[side as usize].groups.len();
    let rows = rows(file);
    let start: usize = rows[..row].iter().map(n_group).sum();
    &allocation.bits[start..start + n_group(&rows[row])]
}

fn side_proj(file: &ProjectionFile, allocation: &Allocation, row: usize) -> SideProj {
    let (i, side) = rows(file)[row];
    let bits: Vec<&[u8]> = row_bits(file, allocation, row).iter().map(Vec::as_slice).collect();
    SideProj::new(side, &file.layers[i].sides[side as usize], &bits, allocation.row_bytes[row])
}

fn stored(file: &ProjectionFile, allocation: &Allocation, rows_used: impl IntoIterator<Item = usize>) -> BTreeMap<(usize, Side), Trial> {
    let places = rows(file);
    let trial = |row: usize| ((file.layers[places[row].0].il, places[row].1), Trial::Stored(side_proj(file, allocation, row)));
    rows_used.into_iter().map(trial).collect()
}

/// A file at its own budget.
pub fn whole(file: &ProjectionFile) -> BTreeMap<(usize, Side), Trial> {
    stored(file, &file.allocation(file.meta.bits_per_value), 0..rows(file).len())
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

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Effort {
    pub rounds: usize,
    /// whether each row is also measured as what its compression adds to that of all others
    pub context: bool,
    /// parts of each group's spectrum that are measured; 0: none
    pub parts: usize,
    /// rounds of trying each row's weight up and down
    pub descents: usize,
    /// budgets below the file's own that are measured too
    pub budgets: usize,
}

impl Effort {
    /// Probe runs at most.
    pub fn n_run(&self, n_layer: usize, n_group: usize) -> usize {
        let n_row = 2 * n_layer;
        let round = (n_row + 2) * (1 + usize::from(self.context));
        1 + self.rounds * round + self.parts * n_group + 2 * usize::from(self.parts > 0) + self.descents * 2 * n_row
            + self.budgets * (1 + round)
    }
}

pub struct Outcome {
    /// mean divergence per token with everything compressed, at each of the file's budgets; empty where there was nothing to decide
    pub divergence: Vec<f64>,
}

struct Search<'s, 'p> {
    coarse: Option<&'s Coarse>,
    probe: &'s mut Probe<'p>,
    progress: &'s mut dyn FnMut(),
}

impl Search<'_, '_> {
    fn divergence(&mut self, trials: BTreeMap<(usize, Side), Trial>) -> Result<f64> {
        let d = self.probe.divergence(trials)?;
        (self.progress)();
        Ok(d)
    }

    fn together(&mut self, file: &ProjectionFile, allocation: &Allocation) -> Result<f64> {
        self.divergence(stored(file, allocation, 0..rows(file).len()))
    }

    /// Finds weights at `budget`, from `start`, in `rounds` rounds; returns the best candidate with its divergence.
    fn weights(&mut self, file: &ProjectionFile, budget: f64, start: Vec<f64>, effort: &Effort, rounds: usize) -> Result<(Candidate, f64)> {
        let n_row = rows(file).len();
        let mut best = candidate(file, self.coarse, budget, start);
        let mut least = self.together(file, &best.allocation)?;
        let mut last: Option<Vec<f64>> = None;
        for _ in 0..rounds {
            let (at, all) = (best.clone(), least);
            let (mut alone, mut each) = (Vec::new(), Vec::new());
            for row in 0..n_row {
                let d = self.divergence(stored(file, &at.allocation, [row]))?;
                alone.push(d);
                if effort.context {
                    let without = self.divergence(stored(file, &at.allocation, (0..n_row).filter(|&r| r != row)))?;
                    // the first row to be compressed and the last one: half-way between lies what it adds on average
                    each.push(0.5 * (d + (all - without).max(0.0)));
                }
            }
            let distortion: Vec<f64> = (0..n_row).map(|row| row_distortion(file, &at.allocation, row)).collect();
            let middle = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a * b).sqrt()).collect::<Vec<f64>>();
            let mut weight = measured_weights(&alone, &distortion, &at.weight);
            let mut tried = Vec::new();
            if effort.context {
                // what less effort would have tried, so that more of it does not do worse
                tried.extend([weight.clone(), middle(&at.weight, &weight)]);
                weight = measured_weights(&each, &distortion, &at.weight);
            }
            // two measurements at different operating points: their middle often does better than the second alone
            let before = last.replace(weight.clone()).unwrap_or(at.weight);
            tried.extend([weight.clone(), middle(&before, &weight)]);
            for weight in tried {
                let next = candidate(file, self.coarse, budget, weight);
                let divergence = self.together(file, &next.allocation)?;
                if divergence < least {
                    (best, least) = (next, divergence);
                }
            }
        }
        Ok((best, least))
    }

    /// Tries each row's weight up and down, and keeps what is better for all rows together.
    fn descend(&mut self, file: &ProjectionFile, budget: f64, best: &mut Candidate, least: &mut f64, factor: f64) -> Result<()> {
        for row in 0..rows(file).len() {
            for factor in [factor, 1.0 / factor] {
                let mut weight = best.weight.clone();
                weight[row] *= factor;
                let next = candidate(file, self.coarse, budget, weight);
                let divergence = self.together(file, &next.allocation)?;
                if divergence < *least {
                    (*best, *least) = (next, divergence);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Measures parts of each group's spectrum, and returns a file whose channels are scaled by what the parts cost.
    fn spectrum(&mut self, file: &ProjectionFile, at: &Candidate, n_part: usize, damping: f64) -> Result<ProjectionFile> {
        let mut scaled = file.clone();
        for (row, &(i, side)) in rows(file).iter().enumerate() {
            let from = &file.layers[i].sides[side as usize];
            let n_group = from.groups.len();
            let mut costs: Vec<(usize, Range<usize>, f64, f64)> = Vec::new();
            for (g, group) in from.groups.iter().enumerate() {
                let bits = &row_bits(file, &at.allocation, row)[g];
                let d = group.enc.len() / group.variance.len();
                for part in parts(&group.variance, bits, n_part) {
                    let mut matrices = vec![None; n_group];
                    matrices[g] = Some(projector(&group.enc, &group.dec, d, part.clone()));
                    let trial = Trial::Part(side_proj(file, &at.allocation, row), matrices);
                    let divergence = self.divergence(BTreeMap::from([((file.layers[i].il, side), trial)]))?;
                    let segments = part.start / SEGMENT..part.end.div_ceil(SEGMENT);
                    costs.push((g, part.clone(), divergence, layout::distortion(&group.variance[part], &bits[segments])));
                }
            }
            let (divergence, distortion) = costs.iter().fold((0.0, 0.0), |(a, b), c| (a + c.2, b + c.3));
            for (g, part, cost, predicted) in costs {
                if !(cost > DIVERGENCE_FLOOR && predicted > 0.0) {
                    continue;
                }
                let ratio = (cost / predicted) / (divergence / distortion);
                scale(&mut scaled.layers[i].sides[side as usize].groups[g], part, ratio.powf(damping));
            }
            scaled.layers[i].sides[side as usize].groups.iter_mut().for_each(sort_channels);
        }
        Ok(scaled)
    }
}

/// Cuts a spectrum into parts of about the same predicted distortion, on segment borders.
fn parts(variance: &[f32], bits: &[u8], n_part: usize) -> Vec<Range<usize>> {
    let segment = |s: usize| layout::distortion(&variance[s * SEGMENT..(s + 1) * SEGMENT], &bits[s..=s]);
    let each: Vec<f64> = (0..bits.len()).map(segment).collect();
    let total: f64 = each.iter().sum();
    let (mut out, mut start, mut sum) = (Vec::new(), 0, 0.0);
    for (s, d) in each.iter().enumerate() {
        sum += d;
        if sum >= total * (out.len() + 1) as f64 / n_part as f64 || s + 1 == bits.len() {
            out.push(start * SEGMENT..(s + 1) * SEGMENT);
            start = s + 1;
        }
    }
    out
}

/// Σ dec_c enc_cᵀ over some channels, `[d][d]`.
fn projector(enc: &[f16], dec: &[f16], d: usize, channels: Range<usize>) -> Vec<f32> {
    let matrix = |x: &[f16]| Mat::from_fn(channels.len(), d, |c, i| x[(channels.start + c) * d + i].to_f32());
    let mut out = vec![0f32; d * d];
    let to = MatMut::from_row_major_slice_mut(&mut out, d, d);
    matmul(to, Accum::Replace, matrix(dec).transpose(), matrix(enc).as_ref(), 1.0f32, Par::Seq);
    out
}

/// Makes distortion of these channels cost `factor` as much: the latent is stretched, and shrunk again when it is read.
fn scale(group: &mut GroupFile, channels: Range<usize>, factor: f64) {
    let d = group.enc.len() / group.variance.len();
    let root = factor.sqrt() as f32;
    for c in channels {
        group.variance[c] *= root * root;
        group.enc[c * d..][..d].iter_mut().for_each(|x| *x = f16::from_f32(x.to_f32() * root));
        group.dec[c * d..][..d].iter_mut().for_each(|x| *x = f16::from_f32(x.to_f32() / root));
    }
}

/// Puts channels in falling order of variance again.
fn sort_channels(group: &mut GroupFile) {
    let n = group.variance.len();
    let d = group.enc.len() / n;
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| group.variance[b].total_cmp(&group.variance[a]));
    let rows = |x: &[f16]| order.iter().flat_map(|&c| x[c * d..][..d].iter().copied()).collect::<Vec<f16>>();
    (group.enc, group.dec) = (rows(&group.enc), rows(&group.dec));
    group.variance = order.iter().map(|&c| group.variance[c]).collect();
}

/// Bit widths and channels per width, where they are others than those of [`layout`].
#[derive(Clone, Debug, PartialEq)]
pub struct Coarse {
    /// rising, from 0 on
    pub alphabet: Vec<u8>,
    /// a multiple of [`SEGMENT`]
    pub segment: usize,
}

impl Coarse {
    /// As [`layout::allocate`], but by the steps that these widths leave: always the one that gains the most per byte.
    fn allocate(&self, spectra: &[Spectrum], bits_per_value: f64) -> Allocation {
        let unit = self.segment / SEGMENT;
        let mut bits: Vec<Vec<u8>> = spectra.iter().map(|s| vec![0; s.variance.len() / SEGMENT]).collect();
        let mut used = vec![0usize; spectra.iter().map(|s| s.row + 1).max().unwrap_or(0)];
        spectra.iter().for_each(|s| used[s.row] += SCALE_BYTES);
        let padded = |bytes: usize| bytes.next_multiple_of(ROW_ALIGN);
        let values: usize = spectra.iter().map(|s| s.n_value).sum();
        let budget = (bits_per_value * values as f64 / 8.0) as usize;
        let energy = |s: usize, u: usize| {
            let part = spectra[s].variance.chunks(self.segment).nth(u).expect("a unit of the spectrum");
            (spectra[s].weight * part.iter().map(|&v| f64::from(v)).sum::<f64>(), part.len() / SEGMENT)
        };
        // the best step on from `b` bits: gain per byte, bits, bytes
        let step = |s: usize, u: usize, b: u8| {
            let (energy, n) = energy(s, u);
            let gain = |to: u8| energy * (DISTORTION[b as usize] - DISTORTION[to as usize]) / ((to - b) as usize * n) as f64;
            let to = self.alphabet.iter().copied().filter(|&to| to > b).max_by(|&x, &y| gain(x).total_cmp(&gain(y)))?;
            (gain(to) > 0.0).then(|| (gain(to), to, (to - b) as usize * n))
        };
        let mut next: Vec<Vec<_>> = (0..spectra.len()).map(|s| (0..bits[s].len().div_ceil(unit)).map(|u| step(s, u, 0)).collect()).collect();
        loop {
            let places = next.iter().enumerate().flat_map(|(s, units)| units.iter().enumerate().map(move |(u, step)| (s, u, step)));
            let best = places.filter_map(|(s, u, step)| step.map(|step| (s, u, step))).max_by(|a, b| a.2 .0.total_cmp(&b.2 .0));
            let Some((s, u, (_, to, bytes))) = best else { break };
            let row = spectra[s].row;
            let total: usize = used.iter().enumerate().map(|(r, &b)| padded(b + if r == row { bytes } else { 0 })).sum();
            // kept channels are a prefix, so what cannot be opened closes all behind it
            if total > budget || u > 0 && bits[s][(u - 1) * unit] == 0 {
                next[s][u] = None;
                continue;
            }
            used[row] += bytes;
            let end = ((u + 1) * unit).min(bits[s].len());
            bits[s][u * unit..end].fill(to);
            next[s][u] = step(s, u, to);
        }
        Allocation { bits, row_bytes: used.into_iter().map(padded).collect() }
    }
}

/// Rotates each `n` neighbouring channels of a group by a Hadamard matrix, so that they have one variance.
pub fn rotate(group: &mut GroupFile, n: usize) {
    let d = group.enc.len() / group.variance.len();
    for start in (0..group.variance.len()).step_by(n) {
        let n = n.min(group.variance.len() - start);
        let h = super::published::rotation(n);
        for rows in [&mut group.enc, &mut group.dec] {
            let rows = &mut rows[start * d..(start + n) * d];
            let old = Mat::from_fn(n, d, |c, i| rows[c * d + i].to_f64());
            let new = super::solve::product(MatRef::from_row_major_slice(&h, n, n), old.as_ref());
            (0..n * d).for_each(|at| rows[at] = f16::from_f64(new[(at / d, at % d)]));
        }
        let part = &mut group.variance[start..start + n];
        let mean = part.iter().sum::<f32>() / n as f32;
        part.fill(mean);
    }
}

/// The file's allocation at `budget` with these weights.
fn candidate(file: &ProjectionFile, coarse: Option<&Coarse>, budget: f64, weight: Vec<f64>) -> Candidate {
    let mut spectra = file.spectra(budget);
    for s in &mut spectra {
        s.weight = weight[s.row];
    }
    let allocation = match coarse {
        None => layout::allocate(&spectra, budget),
        Some(coarse) => coarse.allocate(&spectra, budget),
    };
    Candidate { weight, allocation }
}

/// Measures `file`'s weights (set to their prior by then) and leaves those that did best in it. `probe` is made on demand;
/// `progress` is told after each run.
pub fn settle<'a>(
    file: &mut ProjectionFile,
    effort: &Effort,
    coarse: Option<&Coarse>,
    probe: &mut Probe<'a>,
    mut progress: impl FnMut(),
) -> Result<Outcome> {
    let budget = file.meta.bits_per_value;
    let prior: Vec<f64> = file.layers.iter().flat_map(|l| &l.sides).map(|s| s.weight[0]).collect();
    let first = candidate(file, coarse, budget, prior.clone());
    let spectra = file.spectra(budget);
    let saturated = spectra.iter().zip(&first.allocation.bits).all(|(s, bits)| {
        s.variance.chunks(SEGMENT).zip(bits).all(|(v, &b)| b as usize == MAX_BITS || v.iter().all(|&v| v == 0.0))
    });
    if saturated {
        return Ok(Outcome { divergence: Vec::new() });
    }
    let mut search = Search { coarse, probe, progress: &mut progress };
    let (mut best, mut least) = search.weights(file, budget, prior, effort, effort.rounds)?;
    if effort.parts > 0 {
        for damping in [1.0, 0.5] {
            let finer = search.spectrum(file, &best, effort.parts, damping)?;
            let next = candidate(&finer, search.coarse, budget, best.weight.clone());
            let divergence = search.together(&finer, &next.allocation)?;
            if divergence < least {
                (*file, best, least) = (finer, next, divergence);
                break;
            }
        }
    }
    for i in 0..effort.descents {
        search.descend(file, budget, &mut best, &mut least, [1.5, 1.25, 1.12][i.min(2)])?;
    }
    let best_allocation = best.allocation;
    let mut nodes = vec![(budget, best.weight, least)];
    for _ in 0..effort.budgets {
        let (above, weight, _) = nodes[0].clone();
        let budget = above / BUDGET_RATIO;
        let (below, least) = search.weights(file, budget, weight, effort, 1)?;
        nodes.insert(0, (budget, below.weight, least));
    }
    // only proportions matter: those of the nodes are made comparable, so that it is them that lies between
    for (_, weight, _) in &mut nodes {
        let mean = (weight.iter().filter(|w| **w > 0.0).map(|w| w.ln()).sum::<f64>() / weight.len() as f64).exp();
        weight.iter_mut().for_each(|w| *w /= mean);
    }
    file.meta.budgets = nodes.iter().map(|n| n.0).collect();
    for (row, (i, side)) in rows(file).into_iter().enumerate() {
        file.layers[i].sides[side as usize].weight = nodes.iter().map(|n| n.1[row]).collect();
    }
    if coarse.is_some() {
        let mut bits = best_allocation.bits.into_iter();
        for group in file.layers.iter_mut().flat_map(|l| &mut l.sides).flat_map(|s| &mut s.groups) {
            group.bits = bits.next().context("an allocation for every group")?;
        }
    }
    Ok(Outcome { divergence: nodes.iter().map(|n| n.2).collect() })
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

    fn spectra() -> Vec<Spectrum> {
        let variance = |r: usize| (0..48).map(|i| (r + 1) as f32 * 0.85f32.powi(i)).collect();
        (0..4).map(|r| Spectrum { variance: variance(r), weight: 1.0 + r as f64, n_value: 48, row: r / 2 }).collect()
    }

    #[test]
    fn coarse_allocations_keep_to_their_widths_and_their_budget() {
        let spectra = spectra();
        for (alphabet, segment) in [(vec![0, 2, 4, 8], 8), (vec![0, 3], 16), ((0..=8).collect(), 32), (vec![0, 1, 2, 3, 4, 5, 6, 8], 8)] {
            let coarse = Coarse { alphabet, segment };
            for budget in [1.0, 2.25, 4.0] {
                let a = coarse.allocate(&spectra, budget);
                let real = a.bits_per_value(&spectra);
                assert!(real <= budget && real > budget - 0.8, "{coarse:?}: {real} of {budget}");
                for bits in &a.bits {
                    assert!(bits.chunks(segment / SEGMENT).all(|unit| unit.iter().all(|b| *b == unit[0] && coarse.alphabet.contains(b))));
                    assert!(bits.windows(2).all(|w| w[0] > 0 || w[1] == 0), "kept channels are a prefix");
                }
                let best = layout::allocate(&spectra, budget);
                let cost = |a: &Allocation| -> f64 {
                    spectra.iter().zip(&a.bits).map(|(s, b)| s.weight * layout::distortion(&s.variance, b)).sum()
                };
                assert!(cost(&best) <= 1.001 * cost(&a), "{coarse:?} at {budget} is better than without limits");
            }
        }
    }

    #[test]
    fn parts_cover_a_spectrum_and_projectors_split_an_error() {
        let variance: Vec<f32> = (0..48).map(|i| 0.85f32.powi(i)).collect();
        let parts = parts(&variance, &[4, 3, 2, 1, 0, 0], 4);
        assert!(parts.len() <= 4 && parts[0].start == 0 && parts.last().unwrap().end == 48);
        assert!(parts.windows(2).all(|w| w[0].end == w[1].start && w[0].end % SEGMENT == 0));
        // an orthonormal basis: what all parts keep of an error is the error
        let h = super::super::published::rotation(48);
        let basis: Vec<f16> = h.iter().map(|&x| f16::from_f64(x)).collect();
        let all = parts.iter().map(|p| projector(&basis, &basis, 48, p.clone()));
        let sum = all.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a + b).collect()).unwrap();
        assert!((0..48 * 48).all(|at| (sum[at] - f32::from(u8::from(at % 49 == 0))).abs() < 2e-3));
    }

    /// What is stored decodes to the same token, however its channels are scaled, sorted and rotated.
    #[test]
    fn channels_can_be_rescaled_and_rotated() {
        let h = super::super::published::rotation(16);
        let basis: Vec<f16> = h.iter().map(|&x| f16::from_f64(x)).collect();
        let group = GroupFile { variance: (0..16).map(|i| 0.8f32.powi(i)).collect(), enc: basis.clone(), dec: basis, bits: Vec::new() };
        let identity = |g: &GroupFile| {
            let m = projector(&g.enc, &g.dec, 16, 0..16);
            (0..256).all(|at| (m[at] - f32::from(u8::from(at % 17 == 0))).abs() < 4e-3)
        };
        let mut scaled = group.clone();
        scale(&mut scaled, 8..16, 30.0);
        assert!((scaled.variance[8] / group.variance[8] - 30.0).abs() < 1e-3);
        sort_channels(&mut scaled);
        assert!(identity(&scaled) && scaled.variance.windows(2).all(|w| w[0] >= w[1]));
        let mut rotated = group.clone();
        rotate(&mut rotated, 8);
        assert!(identity(&rotated) && rotated.variance[..8].iter().all(|v| *v == rotated.variance[0]));
        assert!((rotated.variance.iter().sum::<f32>() - group.variance.iter().sum::<f32>()).abs() < 1e-5);
    }

    #[test]
    fn parallel_results_are_in_order() {
        assert_eq!(parallel(100, 7, |i| i * i), (0..100).map(|i| i * i).collect::<Vec<_>>());
        assert!(parallel(0, 3, |i| i).is_empty());
    }
}
