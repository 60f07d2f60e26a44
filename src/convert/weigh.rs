//! What errors of keys and values cost, from attention itself: no gradient is needed for it.
//!
//! A query q at position t gives cell s the weight p_s = softmax(q·k_s/√d). An error e of that cell's key moves the head's
//! output by p_s (v_s - o)(q̃·e)/√d, where q̃ is the query as the key sees it before RoPE: rotated back by the cell's
//! position. An error e of the value moves it by p_s e. Errors of cells are independent, so with the output projection W
//! of the head
//!
//! - M_k = mean over queries of Σ_s p_s² |W (v_s - o)|² q̃ q̃ᵀ
//! - M_v = mean over queries of Σ_s p_s² WᵀW
//!
//! both summed over the query heads that read the KV head. Sliding windows, caps of the scores, sinks and ALiBi are taken as the
//! layer has them; the scale alone is left out of M_k, because it is the same for all that M_k compares.
//!
//! The last tokens before a query are read in f16 (`palu_recent()`), so an error of their rows costs next to nothing: their p_s is
//! taken times [`RECENT`]. What is left is read from afar, by other heads and for other reasons.
//!
//! The same sums say which cells matter: a token that nothing attends to may be stored badly. So each cell's part is handed on
//! as its importance, which the tokens' covariance is weighted with.

use super::stats::{add_products, LayerShape, RopeTable, Window};
use crate::kernels::dot;
use faer::Mat;

/// Queries looked at in each window.
pub const QUERIES_PER_WINDOW: usize = 32;
/// Cells whose effect on the output is less than this part of a query's largest are left out.
const NEGLIGIBLE: f32 = 0.01;
/// What remains of the weight of a cell that is read in f16: enough to tell channels apart where there are no other cells, and because
/// after a removal or a shift some of these are read from their rows.
const RECENT: f32 = 0.05;
/// Rows per product.
const ROWS: usize = 1024;

/// What errors of each cell of a window cost, `[n_token]`: of its key, of its value.
pub type Importance = [Vec<f32>; 2];

/// One KV head's sums.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadWeights {
    n_query: usize,
    /// `[head_dim_k][head_dim_k]`
    key: Vec<f64>,
    /// the same, but of the queries as they are before RoPE: where the text attends to is left out
    plain: Vec<f64>,
    /// per query head, Σ p²
    concentration: Vec<f64>,
}

impl HeadWeights {
    pub fn new(shape: &LayerShape) -> Self {
        let d = shape.head_dim_k * shape.head_dim_k;
        Self { n_query: 0, key: vec![0.0; d], plain: vec![0.0; d], concentration: vec![0.0; shape.n_head / shape.n_head_kv] }
    }

    /// Adds a window's queries of KV head `g`; returns what each cell's errors cost these queries. `output`: per query
    /// head of the layer, a square root of WᵀW, `[head_dim_v][head_dim_v]`. `n_recent`: cells that are read in f16, the query's
    /// own among them.
    pub fn add(&mut self, g: usize, shape: &LayerShape, rope: &RopeTable, window: &Window, output: &[Vec<f32>], n_recent: usize) -> Importance {
        let (dk, dv, n_rep) = (shape.head_dim_k, shape.head_dim_v, shape.n_head / shape.n_head_kv);
        let n_token = (window.keys.len() / shape.n_head_kv / dk).min(window.values.len() / shape.n_head_kv / dv);
        let scoring = &shape.scoring;
        let mut importance = [vec![0f32; n_token], vec![0f32; n_token]];
        let mut keys = Vec::with_capacity(n_token * dk);
        for s in 0..n_token {
            keys.extend_from_slice(&window.keys[(s * shape.n_head_kv + g) * dk..][..dk]);
            rope.rotate(&mut keys[s * dk..], s as i32);
        }
        let (mut scratch, mut rows, mut plain) = (Vec::new(), Vec::new(), Vec::new());
        for rep in 0..n_rep {
            let h = g * n_rep + rep;
            // values as they reach the residual stream, up to a rotation
            let mut y = vec![0f32; n_token * dv];
            for (s, y) in y.chunks_exact_mut(dv).enumerate() {
                let v = &window.values[(s * shape.n_head_kv + g) * dv..][..dv];
                for (y, root) in y.iter_mut().zip(output[h].chunks_exact(dv)) {
                    *y = dot(root, v);
                }
            }
            let gain: f32 = output[h].iter().map(|w| w * w).sum();
            let sink = scoring.sinks.get(h).copied().unwrap_or(f32::NEG_INFINITY);
            for (i, &pos) in window.positions.iter().enumerate() {
                let cells = scoring.reach.first(pos)..(pos + 1).min(n_token);
                let q = &window.queries[(i * shape.n_head + h) * dk..][..dk];
                let products: Vec<f32> = keys[cells.start * dk..cells.end * dk].chunks_exact(dk).map(|k| dot(q, k)).collect();
                let score = |(s, &x): (usize, &f32)| scoring.score(x, h, shape.n_head, pos - (cells.start + s));
                let mut p: Vec<f32> = products.iter().enumerate().map(score).collect();
                push_seen(&mut plain, q, rope, pos, 1.0);
                let max = p.iter().copied().fold(sink, f32::max);
                p.iter_mut().for_each(|p| *p = (*p - max).exp());
                let total: f32 = p.iter().sum::<f32>() + (sink - max).exp();
                let y = &y[cells.start * dv..cells.end * dv];
                let mut mean = vec![0f32; dv];
                for (p, y) in p.iter_mut().zip(y.chunks_exact(dv)) {
                    *p /= total;
                    mean.iter_mut().zip(y).for_each(|(m, y)| *m += *p * y);
                }
                let n_far = p.len().saturating_sub(n_recent);
                p[n_far..].iter_mut().for_each(|p| *p *= RECENT);
                self.concentration[rep] += p.iter().map(|&p| f64::from(p * p)).sum::<f64>();
                let length = dot(q, q);
                for (s, (p, y)) in p.iter_mut().zip(y.chunks_exact(dv)).enumerate() {
                    importance[1][cells.start + s] += gain * *p * *p;
                    let away: f32 = y.iter().zip(&mean).map(|(y, m)| (y - m) * (y - m)).sum();
                    *p *= away.sqrt() * scoring.passed(products[s]);
                    importance[0][cells.start + s] += length * *p * *p;
                }
                let least = NEGLIGIBLE * p.iter().copied().fold(0.0, f32::max);
                for (s, &p) in p.iter().enumerate().filter(|(_, &p)| p > least) {
                    push_seen(&mut rows, q, rope, cells.start + s, p);
                }
                if rows.len() >= ROWS * dk {
                    add_products(&rows, dk, 0..dk, 0..dk, &mut self.key, &mut scratch);
                    rows.clear();
                }
            }
        }
        if !rows.is_empty() {
            add_products(&rows, dk, 0..dk, 0..dk, &mut self.key, &mut scratch);
        }
        if !plain.is_empty() {
            add_products(&plain, dk, 0..dk, 0..dk, &mut self.plain, &mut scratch);
        }
        self.n_query += window.positions.len();
        importance
    }

    /// All sums, for a checkpoint.
    pub fn save(&self, out: &mut Vec<f64>) {
        out.push(self.n_query as f64);
        out.extend(self.key.iter().chain(&self.plain).chain(&self.concentration));
    }

    /// How many [`HeadWeights::save`] writes.
    pub fn n_float(&self) -> usize {
        1 + self.key.len() + self.plain.len() + self.concentration.len()
    }

    /// Sets what [`HeadWeights::save`] wrote; `None` if there is too little of it.
    pub fn restore(&mut self, from: &mut &[f64]) -> Option<()> {
        let (&n_query, mut rest) = from.split_first()?;
        for sum in [&mut self.key, &mut self.plain, &mut self.concentration] {
            let (head, tail) = rest.split_at_checked(sum.len())?;
            sum.copy_from_slice(head);
            rest = tail;
        }
        self.n_query = n_query as usize;
        *from = rest;
        Some(())
    }

    fn mean(&self, sum: &[f64]) -> Mat<f64> {
        let d = sum.len().isqrt();
        let n = self.n_query.max(1) as f64;
        Mat::from_fn(d, d, |i, j| 0.5 * (sum[i * d + j] + sum[j * d + i]) / n)
    }

    pub fn key(&self) -> Mat<f64> {
        self.mean(&self.key)
    }

    /// Second moment of the queries, rotated back to position 0.
    pub fn plain(&self) -> Mat<f64> {
        self.mean(&self.plain)
    }

    /// Per query head, mean of Σ p²: 1 where each query reads one cell.
    pub fn concentration(&self) -> Vec<f64> {
        self.concentration.iter().map(|c| c / self.n_query.max(1) as f64).collect()
    }
}

/// Adds `factor` times `q` as a key at `pos` sees it before RoPE.
fn push_seen(rows: &mut Vec<f32>, q: &[f32], rope: &RopeTable, pos: usize, factor: f32) {
    let start = rows.len();
    rows.extend(q.iter().map(|x| factor * x));
    rope.rotate_back(&mut rows[start..], pos as i32);
}

#[cfg(test)]
mod tests {
    use super::super::stats::{LayerStats, Mode, Projections, Reach, Scoring, Tap, TapParams};
    use super::super::windows::Random;
    use super::*;
    use crate::projection::Side;
    use crate::rope::{RopeKind, RopeParams};
    use std::collections::BTreeMap;

    const N: usize = 24;

    struct Case {
        shape: LayerShape,
        k: Vec<f32>,
        v: Vec<f32>,
        /// rotated
        q: Vec<f32>,
    }

    impl Case {
        fn new() -> Self {
            let rope = RopeParams { kind: RopeKind::Norm, n_rot: 8, freq_base: 50.0, attn_factor: 1.1, ..RopeParams::none() };
            let scoring = Scoring {
                scale: 0.4,
                softcap: 3.0,
                max_bias: 2.0,
                reach: Reach::Last(9),
                sinks: vec![0.5, -1.0, 2.0, 0.0],
            };
            let shape = LayerShape { n_head: 4, n_head_kv: 2, head_dim_k: 10, head_dim_v: 6, rope, scoring };
            let mut random = Random(4);
            let mut vector = |n: usize, scale: f32| (0..n).map(|_| scale * (random.uniform() as f32 - 0.5)).collect::<Vec<f32>>();
            Self { k: vector(N * 20, 4.0), v: vector(N * 12, 1.0), q: vector(N * 40, 4.0), shape }
        }

        /// Output of query head `h` at `pos`, in f64 and by the definition.
        fn attend(&self, h: usize, pos: usize, k: &[f32], v: &[f32]) -> Vec<f64> {
            let s = &self.shape;
            let g = h / 2;
            let table = RopeTable::new(&s.rope, N);
            let first = pos.saturating_sub(8);
            let scores: Vec<f64> = (first..=pos)
                .map(|c| {
                    let mut key = k[(c * 2 + g) * 10..][..10].to_vec();
                    table.rotate(&mut key, c as i32);
                    let q = &self.q[(pos * 4 + h) * 10..][..10];
                    let product = key.iter().zip(q).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
                    // slopes of four heads for a bias of 2
                    3.0 * (0.4 * product / 3.0).tanh() - 0.5f64.powf(0.5 * (h + 1) as f64) * (pos - c) as f64
                })
                .collect();
            let total: f64 = scores.iter().map(|s| s.exp()).sum::<f64>() + f64::from(s.scoring.sinks[h]).exp();
            let value = |c: usize, d: usize| f64::from(v[(c * 2 + g) * 6 + d]);
            (0..6).map(|d| (first..=pos).map(|c| scores[c - first].exp() / total * value(c, d)).sum()).collect()
        }
    }

    /// The metrics predict what small errors of single cells do to the heads' outputs.
    #[test]
    fn metrics_are_the_squared_change_of_the_output() {
        let case = Case::new();
        let shape = &case.shape;
        let tap = Tap::new(N);
        tap.describe(0, shape.clone(), Projections::NONE).unwrap();
        tap.replace_mode(Mode::Collect(BTreeMap::from([(0, LayerStats::new(shape, 2, false, 8))])));
        let pos: Vec<i32> = (0..N as i32).collect();
        let mut out = vec![0.0; N * 20];
        for (side, x, hd) in [(Side::Key, &case.k, 10), (Side::Value, &case.v, 6)] {
            let params = TapParams {
                x: x.as_ptr(),
                x_nb_head: 4 * hd,
                x_nb_token: 8 * hd,
                q: case.q.as_ptr(),
                q_nb_head: 40,
                q_nb_token: 160,
                pos: pos.as_ptr(),
                out: out.as_mut_ptr(),
                n_token: N as i32,
                il: 0,
                side: side as i32,
            };
            unsafe { tap.run(&params, 0, 1) }.unwrap();
        }
        let window = tap.take_windows().pop().unwrap();
        assert_eq!(window.positions, [7, 15, 23]);
        let identity: Vec<f32> = (0..36).map(|i| f32::from(u8::from(i % 7 == 0))).collect();
        let (_, table) = tap.layer(0);
        for g in 0..2 {
            let mut weights = HeadWeights::new(shape);
            let importance = weights.add(g, shape, &table, &window, &vec![identity.clone(); 4], 0);
            let mut random = Random(8);
            let error: Vec<f32> = (0..10).map(|_| 1e-3 * (random.uniform() as f32 - 0.5)).collect();
            let (mut key, mut value) = (0.0, 0.0);
            for &t in &window.positions {
                for h in 2 * g..2 * g + 2 {
                    let before = case.attend(h, t, &case.k, &case.v);
                    for c in 0..=t {
                        let changed = |x: &[f32], hd: usize| {
                            let mut x = x.to_vec();
                            x[(c * 2 + g) * hd..][..hd].iter_mut().zip(&error).for_each(|(x, e)| *x += e);
                            x
                        };
                        let squared = |after: Vec<f64>| before.iter().zip(after).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / 3.0;
                        key += squared(case.attend(h, t, &changed(&case.k, 10), &case.v));
                        value += squared(case.attend(h, t, &case.k, &changed(&case.v, 6)));
                    }
                }
            }
            // with all cells in f16 but those further than 3 away, only these count
            let mut far = HeadWeights::new(shape);
            let part = far.add(g, shape, &table, &window, &vec![identity.clone(); 4], 4);
            let sum = |w: &Importance, side: usize, near: bool| {
                let is_near = |s: usize| window.positions.iter().any(|&t| s <= t && t < s + 4);
                w[side].iter().enumerate().filter(|(s, _)| is_near(*s) == near).map(|(_, &w)| f64::from(w)).sum::<f64>()
            };
            for side in 0..2 {
                assert_eq!(sum(&part, side, false), sum(&importance, side, false));
                assert!(sum(&part, side, true) < 0.9 * sum(&importance, side, true));
            }
            assert!(far.concentration().iter().zip(weights.concentration()).all(|(f, w)| *f > 0.0 && *f < w));
            // the scale of the scores is left out of the metric
            let m = weights.key();
            let e = |i: usize| f64::from(error[i]);
            let got = 0.16 * (0..10).map(|i| (0..10).map(|j| e(i) * m[(i, j)] * e(j)).sum::<f64>()).sum::<f64>();
            assert!((got - key).abs() < 0.02 * key, "{got} for {key}");
            let got = weights.concentration().iter().sum::<f64>() * (0..6).map(|i| e(i) * e(i)).sum::<f64>();
            assert!((got - value).abs() < 0.02 * value, "{got} for {value}");
            // the cells' importance is the metric's trace, cell by cell
            let total = |side: usize| importance[side].iter().map(|&w| f64::from(w)).sum::<f64>() / 3.0;
            let trace: f64 = (0..10).map(|i| m[(i, i)]).sum();
            assert!((total(0) - trace).abs() < 0.25 * trace, "rotations change no length but by YaRN's magnitude");
            assert!((total(1) - 6.0 * weights.concentration().iter().sum::<f64>()).abs() < 1e-4 * total(1));
        }
    }
}
