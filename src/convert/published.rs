//! Palu as published (Chang et al., ICLR 2025): a truncated SVD per head group, ranks for a given part of all channels, latents
//! rotated by a Hadamard matrix and quantized with one bit width and one scale per token and group.
//!
//! The paper factorizes the projection W = U Σ Vᵀ, or W S with S Sᵀ = E[x xᵀ] ("whitened"), and caches z = Σ^½ Vᵀ x, respectively
//! z = Σ^½ Vᵀ S⁻¹ x. With k = W x + b that is z = Σ^-½ Uᵀ (k - b) in both, and k is rebuilt as U Σ^½ z + b. U and Σ² are eigenvectors
//! and eigenvalues of W Wᵀ, respectively of W E[x xᵀ] Wᵀ = E[(k - b)(k - b)ᵀ]. So both come from what the tap sees, and from W and b as
//! the runtime gives them.
//!
//! The Fisher score of a matrix is, in the paper, the mean of the roots of its squared gradients. Here it is measured forward: with
//! errors of deviation ε on every element of the matrix' output, the divergence grows by ½ ε² tr(F), F being the Fisher information of
//! that output, Σ E[g gᵀ] over the true gradients g. The score is √(tr(F)/elements).

use super::collect::Layer;
use super::measure::{Probe, Trial};
use super::solve::{self, GroupSize};
use super::stats::{LayerShape, Tap};
use crate::layout::{MAX_BITS, SEGMENT};
use crate::projection::{GroupFile, Side, SideFile, SIDES};
use anyhow::{ensure, Context, Result};
use faer::Mat;
use half::f16;
use std::collections::BTreeMap;

/// Ranks are multiples of this, as the paper has it.
const RANK_MULTIPLE: usize = 32;
/// Deviation of the errors that Fisher information is measured with, in deviations of the output: small enough for the
/// divergence to be quadratic, large enough to stand out of rounding.
const NOISE: f64 = 0.05;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Decomposition {
    /// of the projection alone
    Svd,
    /// of what the projection does to its inputs
    Whitened,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum RankSearch {
    /// the same part of every group
    Uniform,
    /// ranks in proportion to the Fisher score of each projection's group
    Fisher,
    /// ranks in proportion to the Fisher score of each projection, equal for its groups
    FisherUniform,
}

#[derive(Clone, Copy, Debug)]
pub struct Published {
    /// part of all channels that is kept
    pub keep: f64,
    /// of every code
    pub bits: u8,
    pub decomposition: Decomposition,
    pub search: RankSearch,
    pub group_size: GroupSize,
}

/// The group size that the paper recommends, where it divides the heads.
pub fn group_size(asked: GroupSize, il: usize, shape: &LayerShape) -> Result<usize> {
    match asked {
        GroupSize::Auto => Ok((1..=4).rev().find(|g| shape.n_head_kv.is_multiple_of(*g)).unwrap_or(1)),
        other => other.of(il, shape),
    }
}

/// An orthogonal matrix whose entries all have the same size, row-major: Sylvester's and Paley's constructions. `None` where
/// these do not give one.
fn hadamard(n: usize) -> Option<Vec<i8>> {
    let is_prime = |q: usize| q > 2 && (2..).take_while(|f| f * f <= q).all(|f| !q.is_multiple_of(f));
    let double = |h: Vec<i8>, n: usize| -> Vec<i8> {
        let entry = |i: usize, j: usize| h[i % n * n + j % n] * if i >= n && j >= n { -1 } else { 1 };
        (0..4 * n * n).map(|at| entry(at / (2 * n), at % (2 * n))).collect()
    };
    if n == 1 {
        return Some(vec![1]);
    }
    if n.is_multiple_of(4) && is_prime(n - 1) {
        // q = 3 mod 4: I + S, S skew with the quadratic residues' signs
        let q = n - 1;
        let mut sign = vec![-1i8; q];
        sign[0] = 0;
        (1..q).for_each(|x| sign[x * x % q] = 1);
        let entry = |i: usize, j: usize| match (i, j) {
            (0, _) => 1,
            (_, 0) => -1,
            _ if i == j => 1,
            _ => sign[(j + q - i) % q],
        };
        return Some((0..n * n).map(|at| entry(at / n, at % n)).collect());
    }
    if n.is_multiple_of(2) {
        return hadamard(n / 2).map(|h| double(h, n / 2));
    }
    None
}

/// A rotation of `n` channels that spreads each over all of them, as far as there is one, row-major.
pub fn rotation(n: usize) -> Vec<f64> {
    let block = (0..).map(|k| n >> k).take_while(|b| *b > 0).find(|&b| n.is_multiple_of(b) && hadamard(b).is_some()).unwrap_or(1);
    let h = hadamard(block).expect("there is one of 1");
    let scale = 1.0 / (block as f64).sqrt();
    let entry = |i: usize, j: usize| if i / block == j / block { scale * f64::from(h[i % block * block + j % block]) } else { 0.0 };
    (0..n * n).map(|at| entry(at / n, at % n)).collect()
}

/// Divergence per squared deviation of errors on each side's elements: half the trace of its Fisher information per element.
pub fn fisher(probe: &mut Probe, layers: &BTreeMap<usize, Layer>, mut progress: impl FnMut()) -> Result<Vec<[f64; 2]>> {
    let mut out = Vec::new();
    for (&il, layer) in layers {
        let mut scores = [0.0; 2];
        for side in SIDES {
            let (_, covariance) = solve::moments(&layer.stats, side, 0.0, None);
            let variances = covariance.iter().flat_map(|c| (0..c.nrows()).map(|i| c[(i, i)]));
            let n = layer.stats.moments[side as usize].n_group() * layer.stats.moments[side as usize].group();
            let deviation = NOISE * (variances.sum::<f64>() / n as f64).sqrt();
            if deviation > 0.0 {
                let d = probe.divergence(BTreeMap::from([((il, side), Trial::Noise(deviation as f32))]))?;
                scores[side as usize] = d.max(0.0) / (deviation * deviation) / n as f64;
            }
            progress();
        }
        out.push(scores);
    }
    Ok(out)
}

/// Ranks of all groups (`widths` each) in proportion to `scores`, as the paper's program gives them out: whole parts first, then one by one to
/// those that are not full, and in the end rounded.
fn proportional(scores: &[f64], widths: &[usize], keep: f64) -> Vec<usize> {
    let target = (widths.iter().sum::<usize>() as f64 * keep) as usize;
    let sum: f64 = scores.iter().sum();
    let share: Vec<f64> = scores.iter().map(|s| if sum > 0.0 { target as f64 * s / sum } else { 0.0 }).collect();
    let mut ranks: Vec<usize> = share.iter().zip(widths).map(|(s, &w)| w.min(*s as usize)).collect();
    let mut order: Vec<usize> = (0..ranks.len()).collect();
    order.sort_by(|&a, &b| (share[a] - ranks[a] as f64).total_cmp(&(share[b] - ranks[b] as f64)));
    let mut left = target.saturating_sub(ranks.iter().sum());
    while left > 0 {
        for &i in &order {
            if left > 0 && ranks[i] < widths[i] {
                ranks[i] += 1;
                left -= 1;
            }
        }
    }
    ranks
}

fn rounded(rank: f64, width: usize) -> usize {
    let rank = (rank / RANK_MULTIPLE as f64).round_ties_even().max(1.0) as usize * RANK_MULTIPLE;
    rank.min(width.next_multiple_of(SEGMENT))
}

/// Rank of every group of every side, in file order.
fn ranks(published: &Published, shapes: &[(&LayerShape, usize)], scores: &[[f64; 2]]) -> Vec<Vec<usize>> {
    let sides: Vec<(usize, usize, f64)> = shapes
        .iter()
        .zip(scores)
        .flat_map(|(&(shape, group), score)| {
            SIDES.map(|s| (shape.n_head_kv / group, group * shape.head_dim(s), score[s as usize].sqrt()))
        })
        .collect();
    let per_side = |f: &dyn Fn(usize, usize) -> Vec<f64>| -> Vec<Vec<usize>> {
        sides.iter().enumerate().map(|(i, &(n, d, _))| f(i, n).iter().map(|&r| rounded(r, d)).collect()).collect()
    };
    let scores: Vec<f64> = sides.iter().map(|s| s.2).collect();
    match published.search {
        RankSearch::Uniform => per_side(&|i, n| vec![sides[i].1 as f64 * published.keep; n]),
        RankSearch::FisherUniform => {
            let widths: Vec<usize> = sides.iter().map(|&(n, d, _)| n * d).collect();
            let ranks = proportional(&scores, &widths, published.keep);
            per_side(&|i, n| vec![(ranks[i] / n) as f64; n])
        }
        RankSearch::Fisher => {
            // one score per projection is what is measured, so its groups have the same
            let groups: Vec<(f64, usize)> = sides.iter().flat_map(|&(n, d, s)| vec![(s, d); n]).collect();
            let (scores, widths): (Vec<f64>, Vec<usize>) = groups.into_iter().unzip();
            let ranks = proportional(&scores, &widths, published.keep);
            let mut rest = ranks.iter();
            sides.iter().map(|&(n, d, _)| rest.by_ref().take(n).map(|&r| rounded(r as f64, d)).collect()).collect()
        }
    }
}

/// One head group: `gram` is what its basis diagonalizes, `moment` the second moment of what is stored.
fn group_file(gram: &Mat<f64>, moment: &Mat<f64>, rank: usize, bits: u8) -> Result<GroupFile> {
    let d = gram.nrows();
    let (values, vectors) = solve::eigen(gram.as_ref())?;
    let kept = rank.min(d);
    let floor = values[d - 1].max(0.0) * 1e-12;
    // √Σ, the largest first
    let root: Vec<f64> = (0..kept).map(|c| values[d - 1 - c].max(floor).powf(0.25)).collect();
    let h = rotation(rank);
    let side = |power: f64| {
        let basis = Mat::from_fn(kept, d, |c, i| if root[c] > 0.0 { root[c].powf(power) * vectors[(i, d - 1 - c)] } else { 0.0 });
        let h = Mat::from_fn(rank, kept, |i, j| h[i * rank + j]);
        solve::product(h.as_ref(), basis.as_ref())
    };
    let (enc, dec) = (side(-1.0), side(1.0));
    let latent = solve::product(solve::product(enc.as_ref(), moment.as_ref()).as_ref(), enc.transpose());
    // one step size for all: the mean variance
    let variance = (0..rank).map(|c| latent[(c, c)]).sum::<f64>() / rank as f64;
    let halves = |m: &Mat<f64>| (0..rank * d).map(|at| f16::from_f64(m[(at / d, at % d)])).collect::<Vec<f16>>();
    let (enc, dec) = (halves(&enc), halves(&dec));
    ensure!(enc.iter().chain(&dec).all(|v| v.is_finite()), "its basis does not fit f16");
    Ok(GroupFile { variance: vec![variance as f32; rank], enc, dec, bits: vec![bits; rank / SEGMENT] })
}

/// The sides of each layer, with their allocation.
pub fn solve(
    published: &Published,
    tap: &Tap,
    shapes: &BTreeMap<usize, LayerShape>,
    layers: &BTreeMap<usize, Layer>,
    scores: &[[f64; 2]],
) -> Result<Vec<[SideFile; 2]>> {
    let mut sized = Vec::new();
    for &il in layers.keys() {
        sized.push((&shapes[&il], group_size(published.group_size, il, &shapes[&il])?));
    }
    let mut ranks = ranks(published, &sized, scores).into_iter();
    let mut out = Vec::new();
    for ((&il, layer), (shape, group_size)) in layers.iter().zip(sized) {
        let mut side_of = |side: Side| -> Result<SideFile> {
            let head_dim = shape.head_dim(side);
            let (d, width) = (group_size * head_dim, shape.width(side));
            let projection = tap.projections(il).of(side, width)?;
            // a bias is added again when a token is rebuilt, and what is stored is without it
            let bias: Vec<f64> = projection.as_ref().map_or(vec![0.0; width], |(_, b)| b.iter().map(|&b| f64::from(b)).collect());
            let (_, moments) = solve::moments(&layer.stats, side, 0.0, Some(bias.clone()));
            let mut groups = Vec::new();
            for (g, rank) in ranks.next().context("ranks for every side")?.into_iter().enumerate() {
                let moment = solve::group_block(&moments, g, d).to_owned();
                let gram = match published.decomposition {
                    Decomposition::Whitened => moment.clone(),
                    Decomposition::Svd => {
                        let (w, _) = projection.as_ref().context(
                            "they are not one matrix times the layer's input (a norm, a fused or an expert projection), so only --decomposition whitened can be done",
                        )?;
                        let n_in = w.len() / width;
                        let rows = Mat::from_fn(d, n_in, |i, j| f64::from(w[(g * d + i) * n_in + j]));
                        solve::product(rows.as_ref(), rows.transpose())
                    }
                };
                groups.push(group_file(&gram, &moment, rank, published.bits)?);
            }
            Ok(SideFile { n_head_kv: shape.n_head_kv, head_dim, group_size, weight: vec![1.0], mean: bias.iter().map(|&b| b as f32).collect(), groups })
        };
        let mut side = |side| side_of(side).with_context(|| format!("layer {il}, {}", solve::name(side)));
        out.push([side(Side::Key)?, side(Side::Value)?]);
    }
    Ok(out)
}

/// Bits that a command line may ask for.
pub fn parse_bits(s: &str) -> Result<u8, String> {
    s.parse().ok().filter(|b| (1..=MAX_BITS as u8).contains(b)).ok_or_else(|| format!("codes have 1 to {MAX_BITS} bits"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use super::super::stats::Scoring;
    use crate::rope::RopeParams;

    #[test]
    fn rotations_are_orthogonal_and_flat() {
        for n in (32..=1024).step_by(32).chain([8, 24, 40]) {
            let h = rotation(n);
            let flat = 1.0 / (n as f64).sqrt();
            let block = h.iter().filter(|x| x.abs() > 0.0).count() / n;
            assert!(block == n && h.iter().all(|x| (x.abs() - flat).abs() < 1e-12) || n > 512, "{n}: blocks of {block}");
            for (i, j) in [(0, 0), (1, 1), (0, 1), (n - 1, 0), (n - 1, n - 1), (3, n / 2)] {
                let dot: f64 = (0..n).map(|k| h[i * n + k] * h[j * n + k]).sum();
                assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-9, "{n}: rows {i} and {j}");
            }
        }
    }

    #[test]
    fn ranks_are_proportional_full_at_most_and_multiples_of_32() {
        let given = proportional(&[1.0, 1.0, 6.0], &[100, 100, 100], 0.5);
        assert_eq!(given, [25, 25, 100], "what the third cannot take goes to the others, one by one");
        assert_eq!(given.iter().sum::<usize>(), 150);
        assert_eq!(proportional(&[0.0, 0.0], &[10, 10], 0.5), [5, 5]);
        assert_eq!([15.0, 16.0, 47.9, 48.1, 4000.0].map(|r| rounded(r, 384)), [32, 32, 32, 64, 384]);
        assert_eq!(rounded(20.0, 20), 24, "a head of 20 has three segments");

        let shape = LayerShape { n_head: 6, n_head_kv: 6, head_dim_k: 64, head_dim_v: 64, rope: RopeParams::none(), scoring: Scoring::plain(64) };
        let published = |search| Published { keep: 0.5, bits: 4, decomposition: Decomposition::Whitened, search, group_size: GroupSize::Heads(3) };
        let scores = [[1.0, 4.0], [1.0, 16.0]];
        let shapes = [(&shape, 3), (&shape, 3)];
        let of = |search| ranks(&published(search), &shapes, &scores);
        assert_eq!(of(RankSearch::Uniform), vec![vec![96, 96]; 4]);
        // roots of the scores: 1, 2, 1, 4 of 768 channels
        assert_eq!(of(RankSearch::FisherUniform), [vec![64, 64], vec![96, 96], vec![64, 64], vec![192, 192]]);
        assert_eq!(of(RankSearch::Fisher), [vec![64, 64], vec![96, 96], vec![64, 64], vec![192, 192]]);
    }

    #[test]
    fn a_group_projects_and_has_one_step() {
        let moment = Mat::from_fn(64, 64, |i, j| if i == j { 1.0 / (1.0 + i as f64) } else { 1e-3 });
        let group = group_file(&moment, &moment, 32, 3).unwrap();
        assert_eq!((group.variance.len(), &group.bits[..]), (32, &[3u8; 4][..]));
        let dense = |x: &[f16]| Mat::from_fn(32, 64, |c, i| x[c * 64 + i].to_f64());
        let identity = solve::product(dense(&group.enc).as_ref(), dense(&group.dec).transpose());
        for i in 0..32 {
            for j in 0..32 {
                assert!((identity[(i, j)] - f64::from(u8::from(i == j))).abs() < 0.02, "({i}, {j}): {}", identity[(i, j)]);
            }
        }
    }
}
