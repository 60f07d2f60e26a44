//! Runs the model over the text and adds up what bases and metrics are made from.

use super::checkpoint::Checkpoint;
use super::host::Model;
use super::measure::parallel;
use super::report::Stage;
use super::solve;
use super::stats::{self, LayerShape, LayerStats, Mode, Tap};
use super::weigh::{HeadWeights, Importance};
use crate::projection::SIDES;
use anyhow::{bail, ensure, Context, Result};
use faer::Mat;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Statistics are saved this often at most,
const SAVE_EVERY: Duration = Duration::from_secs(30);
/// and at most so that it takes this part of the time.
const SAVE_SHARE: u32 = 20;

/// Everything known about a layer.
pub struct Layer {
    pub stats: LayerStats,
    /// per KV head
    pub weights: Vec<HeadWeights>,
    /// per query head, see [`solve::output_grams`]
    pub grams: Vec<Mat<f64>>,
}

/// What one pass over the text is about.
pub struct Pass<'a> {
    pub model: &'a Model<'a>,
    pub tap: &'a Tap,
    /// of all layers
    pub shapes: &'a BTreeMap<usize, LayerShape>,
    /// of this pass, with the heads whose channels are looked at together
    pub layers: Vec<(usize, usize)>,
    pub windows: &'a [Vec<i32>],
    /// whether tokens are also weighted by what attention makes of them
    pub attended: bool,
    /// every how many positions a query is looked at
    pub sample: usize,
    /// last tokens before a query that are read in f16
    pub n_recent: usize,
    pub n_thread: usize,
    pub checkpoint: Checkpoint,
}

impl Pass<'_> {
    fn fresh(&self) -> (BTreeMap<usize, LayerStats>, Vec<HeadWeights>) {
        let stats = self.layers.iter().map(|&(il, group)| (il, LayerStats::new(&self.shapes[&il], group, self.attended, self.sample)));
        let heads = self.layers.iter().map(|(il, _)| &self.shapes[il]);
        (stats.collect(), heads.flat_map(|s| (0..s.n_head_kv).map(|_| HeadWeights::new(s))).collect())
    }

    /// Runs the windows that the checkpoint does not have yet.
    pub fn run(&self) -> Result<BTreeMap<usize, Layer>> {
        let mut stage = Stage::new("collect", self.windows.len());
        // the runtime is asked from this thread alone
        let mut outputs = Vec::new();
        for (il, _) in &self.layers {
            let shape = &self.shapes[il];
            let w = self.model.output_proj(*il, shape.n_head * shape.head_dim_v)?;
            let grams = solve::output_grams(w.as_deref(), shape);
            outputs.push(grams);
        }
        let roots = parallel(outputs.len(), self.n_thread, |i| outputs[i].iter().map(solve::gram_root).collect::<Result<Vec<_>>>());
        let roots: Vec<Vec<Vec<f32>>> = roots
            .into_iter()
            .zip(&self.layers)
            .map(|(r, (il, _))| r.with_context(|| format!("layer {il}, output projection")))
            .collect::<Result<_>>()?;

        let (mut stats, mut weights) = self.fresh();
        let mut done = self.checkpoint.load(&mut stats, weights.iter_mut()).unwrap_or(0);
        if done == 0 {
            (stats, weights) = self.fresh();
        } else {
            eprintln!("palu convert: statistics of {done} of {} windows were there already", self.windows.len());
            stage.skip(done);
        }
        done = done.min(self.windows.len());
        let weights: Vec<Mutex<HeadWeights>> = weights.into_iter().map(Mutex::new).collect();
        let heads: Vec<(usize, usize)> = (0..self.layers.len())
            .flat_map(|i| (0..self.shapes[&self.layers[i].0].n_head_kv).map(move |g| (i, g)))
            .collect();
        self.tap.replace_mode(Mode::Collect(stats));
        let (mut saved, mut pause) = (Instant::now(), SAVE_EVERY);
        for (i, window) in self.windows.iter().enumerate().skip(done) {
            self.model.eval(window, false, 0, &mut [])?;
            if let Some((il, side)) = self.tap.find_non_finite() {
                bail!("layer {il}: the model's {} are not finite; is the model file damaged?", solve::name(side));
            }
            self.weigh(&heads, &weights, &roots);
            stage.set(i + 1);
            if saved.elapsed() >= pause || i + 1 == self.windows.len() {
                let start = Instant::now();
                let result = self.tap.with_collected(|layers| {
                    let weights: Vec<_> = weights.iter().map(stats::lock).collect();
                    Some(self.checkpoint.save(i + 1, layers, weights.iter().map(|w| &**w)))
                });
                if let Some(Err(e)) = result {
                    eprintln!("palu convert: warning: {e:#}; an interruption would lose them");
                }
                (saved, pause) = (Instant::now(), SAVE_EVERY.max(SAVE_SHARE * start.elapsed()));
            }
        }
        let Mode::Collect(stats) = self.tap.replace_mode(Mode::Pass) else { unreachable!("nobody else changes the mode") };
        stage.finish();
        for (il, stats) in &stats {
            ensure!(SIDES.iter().all(|&s| !stats.moments[s as usize].is_empty()), "the runtime never ran layer {il} through the tap");
        }
        let mut weights = weights.into_iter().map(|w| w.into_inner().expect("no thread panicked"));
        let layers = stats.into_iter().zip(outputs).map(|((il, stats), grams)| {
            let weights = weights.by_ref().take(self.shapes[&il].n_head_kv).collect();
            (il, Layer { stats, weights, grams })
        });
        Ok(layers.collect())
    }

    /// Adds what attention does in the window that was just run.
    fn weigh(&self, heads: &[(usize, usize)], weights: &[Mutex<HeadWeights>], roots: &[Vec<Vec<f32>>]) {
        // not all of self: the model is for one thread
        let (tap, layers, n_recent) = (self.tap, &self.layers, self.n_recent);
        let seen = tap.take_windows();
        let importance: Vec<Importance> = parallel(heads.len(), self.n_thread, |j| {
            let (i, g) = heads[j];
            let (shape, rope) = tap.layer(layers[i].0);
            stats::lock(&weights[j]).add(g, &shape, &rope, &seen[i], &roots[i], n_recent)
        });
        if !self.attended {
            return;
        }
        // of each head group, the sum over its heads
        let mut jobs = Vec::new();
        let mut first = 0;
        for (i, (il, group)) in self.layers.iter().enumerate() {
            let n = self.shapes[il].n_head_kv;
            jobs.extend((0..n / group).flat_map(|g| SIDES.map(|side| (i, *il, g, side, first + g * group..first + (g + 1) * group))));
            first += n;
        }
        tap.with_collected(|layers| {
            parallel(jobs.len(), self.n_thread, |j| {
                let (i, il, g, side, heads) = jobs[j].clone();
                let mut sum = vec![0f32; importance[heads.start][side as usize].len()];
                for head in heads {
                    sum.iter_mut().zip(&importance[head][side as usize]).for_each(|(s, w)| *s += w);
                }
                let stats = &layers[&il];
                let shift = stats.moments[side as usize].shift().unwrap_or_default();
                stats.attended.as_ref().expect("it was asked for")[side as usize].add_weighted(g, seen[i].side(side), shift, &sum);
            });
        });
    }
}
