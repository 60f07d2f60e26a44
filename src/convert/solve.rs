//! From moments to a nested basis per head group: eigenvectors of M^½ C M^½, C being the covariance of a side and M what
//! an error costs. All in f64: the f32 eigensolver is off by 1e-4 at a thousand channels.

use super::collect::Layer;
use super::stats::{LayerShape, LayerStats};
use super::weigh::HeadWeights;
use crate::layout::SEGMENT;
use crate::projection::{GroupFile, Side, SideFile};
use crate::rope::{RopeKind, RopeParams};
use anyhow::{bail, ensure, Context, Result};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{self_adjoint_evd, self_adjoint_evd_scratch, ComputeEigenvectors};
use faer::linalg::matmul::matmul;
use faer::diag::Diag;
use faer::{Accum, Mat, MatRef, Par};
use half::f16;

/// Tokens between query and key at which queries count that the text does not attend with.
const DISTANCES: [usize; 7] = [0, 1, 4, 16, 64, 256, 1024];
/// Their part of the key metric, relative to the attended part; with none, the divergence is a little larger.
const UNATTENDED: f64 = 0.1;
/// Smallest eigenvalue of a metric, relative to its largest: below, directions that the calibration text happened not to
/// use would be treated as free.
const METRIC_FLOOR: f64 = 1e-4;
/// Variance below this part of the largest is rounding error.
const VARIANCE_FLOOR: f64 = 1e-12;

/// What an error costs within a side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Metric {
    /// every channel the same
    None,
    /// keys: the queries, averaged over distances; values: the output projection
    Query,
    /// attention itself, see [`super::weigh`]
    Attention,
}

/// How bases are found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recipe {
    pub metric: Metric,
    /// Part of the covariance, 0 to 1, in which tokens count as much as their errors cost; in the rest, all the same.
    pub importance: f64,
    /// How much the values of a head count for attending narrowly, as an exponent of Σ p²: 1 as much as the calibration text says,
    /// 0 not at all, which is right for text that heads read in other ways.
    pub concentration: f64,
    /// whether means are subtracted
    pub mean: bool,
}

/// Eigenvalues, ascending, and eigenvectors in columns.
pub fn eigen(a: MatRef<f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    let n = a.nrows();
    ensure!((0..n).all(|j| a.col(j).iter().all(|v| v.is_finite())), "its statistics are not finite");
    let (mut s, mut u) = (Diag::zeros(n), Mat::zeros(n, n));
    // one thread per matrix: the result must not depend on the number of threads
    let mut memory = MemBuffer::new(self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, Par::Seq, Default::default()));
    let solved = self_adjoint_evd(a, s.as_mut(), Some(u.as_mut()), Par::Seq, MemStack::new(&mut memory), Default::default());
    ensure!(solved.is_ok(), "its eigenvalues do not converge");
    Ok((s.column_vector().iter().copied().collect(), u))
}

pub fn product(a: MatRef<f64>, b: MatRef<f64>) -> Mat<f64> {
    let mut c = Mat::zeros(a.nrows(), b.ncols());
    matmul(c.as_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
    c
}

/// R m Rᵀ for the rotation R by `distance` positions, magnitude left out.
fn rotated(m: &Mat<f64>, rope: &RopeParams, freq: &[f64], distance: usize) -> Mat<f64> {
    let mut m = m.clone();
    for (i, f) in freq.iter().enumerate() {
        let (a, b) = rope.pair(i);
        let (sin, cos) = (f * distance as f64).sin_cos();
        for j in 0..m.ncols() {
            let (xa, xb) = (m[(a, j)], m[(b, j)]);
            m[(a, j)] = xa * cos - xb * sin;
            m[(b, j)] = xa * sin + xb * cos;
        }
        for j in 0..m.nrows() {
            let (xa, xb) = (m[(j, a)], m[(j, b)]);
            m[(j, a)] = xa * cos - xb * sin;
            m[(j, b)] = xa * sin + xb * cos;
        }
    }
    m
}

fn trace(m: &Mat<f64>) -> f64 {
    (0..m.nrows()).map(|i| m[(i, i)]).sum()
}

/// R m Rᵀ averaged over [`DISTANCES`] within the context: the queries' moment `m` as keys see it that lie so far back.
fn over_distances(m: &Mat<f64>, rope: &RopeParams, n_ctx: usize) -> Mat<f64> {
    if rope.kind == RopeKind::None {
        return m.clone();
    }
    let (freq, _) = rope.frequencies();
    let distances: Vec<usize> = DISTANCES.into_iter().filter(|&d| d == 0 || d < n_ctx).collect();
    let mut sum = Mat::zeros(m.nrows(), m.ncols());
    for &distance in &distances {
        sum += rotated(m, rope, &freq, distance);
    }
    sum / faer::Scale(distances.len() as f64)
}

/// What an error of a key costs, per KV head: see [`super::weigh`]. A part comes from all queries at all distances, for
/// what the calibration text happens not to attend to.
pub fn key_metric(weights: &[HeadWeights], rope: &RopeParams, n_ctx: usize) -> Vec<Mat<f64>> {
    let head = |weights: &HeadWeights| {
        let (attended, all) = (weights.key(), over_distances(&weights.plain(), rope, n_ctx));
        let share = if trace(&all) > 0.0 { UNATTENDED * trace(&attended) / trace(&all) } else { 0.0 };
        attended + faer::Scale(share) * all
    };
    weights.iter().map(head).collect()
}

/// WᵀW per query head, W being the head's part of the output projection `w` `[n_out][n_head*head_dim_v]`; without one, W
/// is the identity.
pub fn output_grams(w: Option<&[f32]>, shape: &LayerShape) -> Vec<Mat<f64>> {
    let hd = shape.head_dim_v;
    let Some(w) = w else { return vec![Mat::identity(hd, hd); shape.n_head] };
    let n_in = shape.n_head * hd;
    let w = MatRef::from_row_major_slice(w, w.len() / n_in, n_in);
    let head = |h: usize| {
        let part = w.subcols(h * hd, hd);
        let part = Mat::from_fn(part.nrows(), hd, |i, j| f64::from(part[(i, j)]));
        product(part.transpose(), part.as_ref())
    };
    (0..shape.n_head).map(head).collect()
}

/// A square root of a Gram matrix, row-major.
pub fn gram_root(gram: &Mat<f64>) -> Result<Vec<f32>> {
    let (values, vectors) = eigen(gram.as_ref())?;
    let n = values.len();
    Ok((0..n * n).map(|at| (values[at / n].max(0.0).sqrt() * vectors[(at % n, at / n)]) as f32).collect())
}

/// What an error of a value costs, per KV head: see [`super::weigh`]. `concentration` as in [`Recipe`].
pub fn value_metric(grams: &[Mat<f64>], weights: &[HeadWeights], concentration: f64) -> Vec<Mat<f64>> {
    let head = |(grams, weights): (&[Mat<f64>], &HeadWeights)| {
        let mut sum = Mat::<f64>::zeros(grams[0].nrows(), grams[0].nrows());
        for (gram, c) in grams.iter().zip(weights.concentration()) {
            sum += faer::Scale(c.powf(concentration)) * gram;
        }
        sum
    };
    grams.chunks(grams.len() / weights.len()).zip(weights).map(head).collect()
}

/// M^½ and M^-½ per KV head, M scaled to a mean eigenvalue of 1 over the side.
fn roots(metric: &[Mat<f64>]) -> Result<Vec<[Mat<f64>; 2]>> {
    let mut spectra = Vec::new();
    for m in metric {
        spectra.push(eigen(m.as_ref()).context("the metric cannot be decomposed")?);
    }
    let max = spectra.iter().flat_map(|(w, _)| w).copied().fold(0.0, f64::max);
    if max <= 0.0 {
        // nothing reads this side (an output projection of zeros, say): every error costs the same
        let identity = |m: &Mat<f64>| [Mat::identity(m.nrows(), m.nrows()), Mat::identity(m.nrows(), m.nrows())];
        return Ok(metric.iter().map(identity).collect());
    }
    let clamped = |w: f64| w.max(METRIC_FLOOR * max);
    let n: usize = spectra.iter().map(|(w, _)| w.len()).sum();
    let scale = spectra.iter().flat_map(|(w, _)| w).map(|&w| clamped(w)).sum::<f64>() / n as f64;
    let root = |(w, u): &(Vec<f64>, Mat<f64>)| {
        [0.5, -0.5].map(|power| {
            let scaled = Mat::from_fn(u.nrows(), u.ncols(), |i, j| u[(i, j)] * (clamped(w[j]) / scale).powf(power));
            product(scaled.as_ref(), u.transpose())
        })
    };
    Ok(spectra.iter().map(root).collect())
}

/// All latent channels of a head group, most important first. `covariance` is that of the group's channels, `roots` of its heads.
fn decompose(covariance: MatRef<f64>, roots: &[[Mat<f64>; 2]]) -> Result<GroupFile> {
    let d = covariance.nrows();
    let hd = d / roots.len();
    let mut a = Mat::zeros(d, d);
    for (i, [left, _]) in roots.iter().enumerate() {
        for (j, [right, _]) in roots.iter().enumerate() {
            let half = product(left.as_ref(), covariance.submatrix(i * hd, j * hd, hd, hd));
            a.submatrix_mut(i * hd, j * hd, hd, hd).copy_from(product(half.as_ref(), right.as_ref()));
        }
    }
    let (values, vectors) = eigen(a.as_ref())?;

    let n_channel = d.next_multiple_of(SEGMENT);
    let floor = values[d - 1].max(0.0) * VARIANCE_FLOOR;
    let mut variance: Vec<f32> = values.iter().rev().map(|&v| if v > floor { v as f32 } else { 0.0 }).collect();
    variance.resize(n_channel, 0.0);

    // an eigenvector's sign is the solver's accident: its largest entry (the first of equals) is made positive
    let mut u = vectors;
    for j in 0..d {
        let largest = u.col(j).iter().copied().fold(0.0f64, |m, v| if v.abs() > m.abs() { v } else { m });
        if largest < 0.0 {
            u.col_mut(j).iter_mut().for_each(|v| *v = -*v);
        }
    }
    let side = |which: usize| -> Result<Vec<f16>> {
        let mut out = vec![f16::ZERO; n_channel * d];
        for (h, root) in roots.iter().enumerate() {
            // channels in columns: M^±½ of the head times its rows of U
            let part = product(root[which].as_ref(), u.submatrix(h * hd, 0, hd, d));
            for c in 0..d {
                for i in 0..hd {
                    let value = f16::from_f64(part[(i, d - 1 - c)]);
                    ensure!(value.is_finite(), "its basis does not fit f16");
                    out[c * d + h * hd + i] = value;
                }
            }
        }
        Ok(out)
    };
    Ok(GroupFile { variance, enc: side(0)?, dec: side(1)?, bits: Vec::new() })
}

/// Center and second moments about it, per head group that was collected. `importance` as in [`Recipe`]; `center`: `None` for
/// the mean.
pub fn moments(stats: &LayerStats, side: Side, importance: f64, center: Option<Vec<f64>>) -> (Vec<f64>, Vec<Mat<f64>>) {
    let plain = stats.moments[side as usize].finish();
    let weighted = stats.attended.as_ref().map_or_else(|| (plain.0.clone(), vec![None; plain.1.len()]), |a| a[side as usize].finish());
    let width = stats.moments[side as usize].group();
    let share = |g: usize| if weighted.1[g].is_some() { importance } else { 0.0 };
    let center = center.unwrap_or_else(|| {
        (0..plain.0.len()).map(|c| { let s = share(c / width); (1.0 - s) * plain.0[c] + s * weighted.0[c] }).collect()
    });
    let group = |g: usize| {
        let mut sum = Mat::zeros(width, width);
        for (share, (mean, covariance)) in [(1.0 - share(g), &plain), (share(g), &weighted)] {
            let (true, Some(covariance)) = (share > 0.0, &covariance[g]) else { continue };
            let off = |i: usize| mean[g * width + i] - center[g * width + i];
            sum += Mat::from_fn(width, width, |i, j| share * (covariance[(i, j)] + off(i) * off(j)));
        }
        sum
    };
    let groups = (0..plain.1.len()).map(group).collect();
    (center, groups)
}

/// The block of group `g` of width `d`, out of blocks of a multiple of it.
pub fn group_block(blocks: &[Mat<f64>], g: usize, d: usize) -> MatRef<'_, f64> {
    let per_block = blocks[0].nrows() / d;
    let at = g % per_block * d;
    blocks[g / per_block].submatrix(at, at, d, d)
}

/// One side of a layer with all of its channels, weighted for equal relative error.
fn side_file(shape: &LayerShape, side: Side, stats: &LayerStats, metric: &[Mat<f64>], group_size: usize, recipe: &Recipe) -> Result<SideFile> {
    let head_dim = shape.head_dim(side);
    let zero = (!recipe.mean).then(|| vec![0.0; shape.width(side)]);
    let (mean, covariance) = moments(stats, side, recipe.importance, zero);
    ensure!(mean.iter().all(|m| m.is_finite() && m.abs() <= f64::from(f32::MAX)), "its statistics are not finite");
    let roots = roots(metric)?;
    let d = group_size * head_dim;
    let mut groups = Vec::new();
    for (g, roots) in roots.chunks(group_size).enumerate() {
        groups.push(decompose(group_block(&covariance, g, d), roots)?);
    }
    let total: f64 = groups.iter().flat_map(|g| &g.variance).map(|&v| f64::from(v)).sum();
    ensure!(total.is_finite(), "its statistics are not finite");
    Ok(SideFile {
        n_head_kv: shape.n_head_kv,
        head_dim,
        group_size,
        weight: vec![if total > 0.0 { 1.0 / total } else { 0.0 }],
        mean: mean.iter().map(|&m| m as f32).collect(),
        groups,
    })
}

/// One side of layer `il` with all of its channels; `n_ctx`: what the model was trained for.
pub fn solve(il: usize, shape: &LayerShape, side: Side, layer: &Layer, n_ctx: usize, group_size: usize, recipe: &Recipe) -> Result<SideFile> {
    let metric = match (recipe.metric, side) {
        (Metric::None, _) => vec![Mat::identity(shape.head_dim(side), shape.head_dim(side)); shape.n_head_kv],
        (Metric::Query, Side::Key) => layer.weights.iter().map(|w| over_distances(&w.plain(), &shape.rope, n_ctx)).collect(),
        (Metric::Query, Side::Value) => {
            let sum = |grams: &[Mat<f64>]| grams[1..].iter().fold(grams[0].clone(), |sum, g| sum + g);
            layer.grams.chunks(layer.grams.len() / shape.n_head_kv).map(sum).collect()
        }
        (Metric::Attention, Side::Key) => key_metric(&layer.weights, &shape.rope, n_ctx),
        (Metric::Attention, Side::Value) => value_metric(&layer.grams, &layer.weights, recipe.concentration),
    };
    side_file(shape, side, &layer.stats, &metric, group_size, recipe).with_context(|| format!("layer {il}, {}", name(side)))
}

pub fn name(side: Side) -> &'static str {
    match side {
        Side::Key => "keys",
        Side::Value => "values",
    }
}

/// Widest head group that is made without being asked for. Rebuilding a token takes width times rank multiplications, a basis that
/// many numbers, and a decomposition width cubed.
const WIDEST_GROUP: usize = 1024;

/// KV heads that share a latent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupSize {
    /// as many as come to 1024 channels
    Auto,
    All,
    Heads(usize),
}

impl std::str::FromStr for GroupSize {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Self::Auto),
            "all" | "0" => Ok(Self::All),
            _ => s.parse().map(Self::Heads).map_err(|_| "a group size is auto, all, or a number of KV heads".to_owned()),
        }
    }
}

impl std::fmt::Display for GroupSize {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::All => f.write_str("all"),
            Self::Heads(n) => write!(f, "{n}"),
        }
    }
}

impl GroupSize {
    pub fn of(self, il: usize, shape: &LayerShape) -> Result<usize> {
        let n = shape.n_head_kv;
        let widest = shape.head_dim_k.max(shape.head_dim_v);
        match self {
            Self::All => Ok(n),
            Self::Auto => Ok((1..=n).rev().find(|g| n.is_multiple_of(*g) && g * widest <= WIDEST_GROUP).unwrap_or(1)),
            Self::Heads(g) if n.is_multiple_of(g) => Ok(g),
            Self::Heads(g) => bail!("--group-size {g} does not divide the {n} KV heads of layer {il}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::stats::Scoring;
    use super::super::windows::Random;
    use super::*;
    use crate::rope::RopeKind;

    /// A random positive definite matrix with a falling spectrum.
    fn definite(n: usize, seed: u64) -> Mat<f64> {
        let mut random = Random(seed);
        let x = Mat::from_fn(n, 3 * n, |i, _| (random.uniform() - 0.5) / (1.0 + i as f64));
        product(x.as_ref(), x.transpose())
    }

    fn dense(rows: &[f16], d: usize) -> Mat<f64> {
        Mat::from_fn(rows.len() / d, d, |i, j| rows[i * d + j].to_f64())
    }

    fn largest(m: &Mat<f64>) -> f64 {
        m.col_iter().flat_map(|c| c.iter()).fold(0.0, |m: f64, v| m.max(v.abs()))
    }

    #[test]
    fn channels_are_uncorrelated_and_orthonormal_in_the_metric() {
        // 20 channels: not a multiple of the segment
        let (hd, n_head) = (10, 2);
        let d = hd * n_head;
        let c = definite(d, 3);
        let metric = [definite(hd, 5), definite(hd, 6)];
        let roots = roots(&metric).unwrap();
        let group = decompose(c.as_ref(), &roots).unwrap();
        assert_eq!(group.variance.len(), 24);
        assert!(group.variance.windows(2).all(|w| w[0] >= w[1]));
        assert!(group.variance[20..].iter().all(|&v| v == 0.0));
        let (enc, dec) = (dense(&group.enc, d), dense(&group.dec, d));
        let (enc, dec) = (enc.subrows(0, d).to_owned(), dec.subrows(0, d).to_owned());

        // the latent of what a channel decodes to is that channel, hence any prefix of channels projects
        let identity = product(enc.as_ref(), dec.transpose());
        assert!(largest(&(&identity - Mat::<f64>::identity(d, d))) < 0.03);
        for rank in [8, 16] {
            let p = product(dec.subrows(0, rank).transpose(), enc.subrows(0, rank));
            assert!(largest(&(product(p.as_ref(), p.as_ref()) - &p)) < 0.1 * largest(&p));
        }

        // decoded channels are orthonormal in M, and latents have the variances
        let mut m = Mat::zeros(d, d);
        for (h, [root, _]) in roots.iter().enumerate() {
            m.submatrix_mut(h * hd, h * hd, hd, hd).copy_from(product(root.as_ref(), root.as_ref()));
        }
        let gram = product(product(dec.as_ref(), m.as_ref()).as_ref(), dec.transpose());
        assert!(largest(&(&gram - Mat::<f64>::identity(d, d))) < 0.03);
        let latent = product(product(enc.as_ref(), c.as_ref()).as_ref(), enc.transpose());
        for i in 0..d {
            assert!((latent[(i, i)] - f64::from(group.variance[i])).abs() < 1e-2 * f64::from(group.variance[0]));
        }
        let total: f64 = (0..d).map(|i| product(m.as_ref(), c.as_ref())[(i, i)]).sum();
        let sum: f64 = group.variance.iter().map(|&v| f64::from(v)).sum();
        assert!((total - sum).abs() < 1e-4 * total);
    }

    #[test]
    fn metric_has_a_mean_eigenvalue_of_one_and_a_floor() {
        let mut thin = Mat::zeros(6, 6);
        thin[(2, 2)] = 5.0;
        let roots = roots(&[thin]).unwrap();
        let m = product(roots[0][0].as_ref(), roots[0][0].as_ref());
        let trace: f64 = (0..6).map(|i| m[(i, i)]).sum();
        assert!((trace - 6.0).abs() < 1e-9);
        assert!((m[(0, 0)] / m[(2, 2)] - METRIC_FLOOR).abs() < 1e-9);
        assert!(super::roots(&[Mat::zeros(3, 3)]).unwrap()[0][0][(1, 1)] == 1.0, "nothing to weigh by");
        assert!(super::roots(&[Mat::from_fn(2, 2, |_, _| f64::NAN)]).is_err());
    }

    /// Averaged over distances, the moment scores an error of the key as queries do that stand there.
    #[test]
    fn distances_are_those_between_query_and_key() {
        let hd = 12;
        for kind in [RopeKind::Norm, RopeKind::Neox] {
            let rope = RopeParams { kind, n_rot: 8, n_offs: 2, freq_base: 100.0, ..RopeParams::none() };
            let mut random = Random(11);
            let mut vector = || (0..hd).map(|_| random.uniform() - 0.5).collect::<Vec<f64>>();
            let queries: Vec<Vec<f64>> = (0..5).map(|_| vector()).collect();
            let error = vector();
            let moment = Mat::from_fn(hd, hd, |i, j| queries.iter().map(|q| q[i] * q[j]).sum::<f64>());
            let metric = over_distances(&moment, &rope, 300);
            let got: f64 = (0..hd).map(|i| (0..hd).map(|j| error[i] * metric[(i, j)] * error[j]).sum::<f64>()).sum();

            let (freq, _) = rope.frequencies();
            let rotate = |x: &[f64], pos: f64| {
                let mut x = x.to_vec();
                for (i, f) in freq.iter().enumerate() {
                    let (a, b) = rope.pair(i);
                    let (sin, cos) = (f * pos).sin_cos();
                    (x[a], x[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
                }
                x
            };
            let distances = [0.0, 1.0, 4.0, 16.0, 64.0, 256.0];
            let mut want = 0.0;
            for distance in distances {
                for q in &queries {
                    // query at position 1000, key `distance` before it
                    let (q, e) = (rotate(q, 1000.0), rotate(&error, 1000.0 - distance));
                    want += q.iter().zip(&e).map(|(a, b)| a * b).sum::<f64>().powi(2) / distances.len() as f64;
                }
            }
            assert!((got - want).abs() < 1e-9 * want, "{kind:?}: {got} for {want}");
        }
    }

    #[test]
    fn output_grams_and_their_roots() {
        let shape = LayerShape { n_head: 4, n_head_kv: 2, head_dim_k: 4, head_dim_v: 3, rope: RopeParams::none(), scoring: Scoring::plain(4) };
        let mut random = Random(2);
        let (n_out, n_in) = (7, 12);
        let w: Vec<f32> = (0..n_out * n_in).map(|_| random.uniform() as f32 - 0.5).collect();
        let error = [0.3f64, -1.0, 0.7];
        for (h, gram) in output_grams(Some(&w), &shape).iter().enumerate() {
            let want: f64 =
                w.chunks(n_in).map(|row| row[h * 3..h * 3 + 3].iter().zip(error).map(|(&w, e)| f64::from(w) * e).sum::<f64>().powi(2)).sum();
            let got: f64 = (0..3).map(|i| (0..3).map(|j| error[i] * gram[(i, j)] * error[j]).sum::<f64>()).sum();
            assert!((got - want).abs() < 1e-9 * want);
            let root = gram_root(gram).unwrap();
            let reached: f64 = root.chunks(3).map(|r| r.iter().zip(error).map(|(&r, e)| f64::from(r) * e).sum::<f64>().powi(2)).sum();
            assert!((reached - want).abs() < 1e-5 * want);
        }
    }

    #[test]
    fn values_count_for_narrow_heads_as_much_as_is_asked() {
        let shape = LayerShape { n_head: 2, n_head_kv: 1, head_dim_k: 2, head_dim_v: 3, rope: RopeParams::none(), scoring: Scoring::plain(2) };
        let mut weights = HeadWeights::new(&shape);
        // one query, the key metric's two sums of 4, and how narrowly each head attends
        let saved: Vec<f64> = [1.0].into_iter().chain([0.0; 8]).chain([0.25, 0.01]).collect();
        weights.restore(&mut &saved[..]).unwrap();
        // the second head's output projection is twice as large
        let grams = [Mat::identity(3, 3), faer::Scale(4.0) * Mat::<f64>::identity(3, 3)];
        for (concentration, want) in [(0.0, 5.0), (0.5, 0.9), (1.0, 0.29)] {
            let metric = value_metric(&grams, std::slice::from_ref(&weights), concentration);
            assert!((metric[0][(1, 1)] - want).abs() < 1e-12 && metric[0][(0, 1)] == 0.0);
        }
    }

    #[test]
    fn group_sizes_divide() {
        let shape = LayerShape { n_head: 12, n_head_kv: 6, head_dim_k: 4, head_dim_v: 4, rope: RopeParams::none(), scoring: Scoring::plain(4) };
        let of = |s: &str, head_dim_k: usize| s.parse::<GroupSize>().unwrap().of(1, &LayerShape { head_dim_k, ..shape.clone() });
        assert_eq!(of("all", 4).unwrap(), 6);
        assert_eq!(of("3", 4).unwrap(), 3);
        assert!(of("4", 4).unwrap_err().to_string().contains("6 KV heads of layer 1"));
        assert_eq!(["auto", "auto", "auto"].iter().zip([4, 256, 2000]).map(|(s, d)| of(s, d).unwrap()).collect::<Vec<_>>(), [6, 3, 1]);
        assert!("many".parse::<GroupSize>().is_err());
    }
}
