//! How far one cache's predictions are from another's: `llama-perplexity --kl-divergence`'s figures, per position.

use crate::convert::measure::parallel;
use anyhow::{ensure, Result};
use serde_json::{json, Value};

/// Per scored position of a window.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// KL divergence from the f16 cache's prediction to this one's, in nats
    pub kld: Vec<f32>,
    /// -log of the probability of the token that comes next
    pub nll: Vec<f32>,
    /// the likeliest token is the f16 cache's
    pub same_top: Vec<bool>,
    /// the likeliest token is the one that comes next
    pub hit: Vec<bool>,
}

fn bits_to_text(bits: &[bool]) -> String {
    bits.iter().map(|&b| if b { '1' } else { '0' }).collect()
}

fn bits_from_text(value: &Value) -> Option<Vec<bool>> {
    value.as_str()?.chars().map(|c| matches!(c, '0' | '1').then_some(c == '1')).collect()
}

fn floats(value: &Value) -> Option<Vec<f32>> {
    value.as_array()?.iter().map(|v| v.as_f64().map(|v| v as f32)).collect()
}

impl Scores {
    pub fn to_json(&self) -> Value {
        json!({
            "kld": self.kld,
            "nll": self.nll,
            "same_top": bits_to_text(&self.same_top),
            "hit": bits_to_text(&self.hit),
        })
    }

    /// `None` unless it is what [`Self::to_json`] wrote of `n` positions.
    pub fn from_json(value: &Value, n: usize) -> Option<Self> {
        let scores = Self {
            kld: floats(&value["kld"])?,
            nll: floats(&value["nll"])?,
            same_top: bits_from_text(&value["same_top"])?,
            hit: bits_from_text(&value["hit"])?,
        };
        let sizes = [scores.kld.len(), scores.nll.len(), scores.same_top.len(), scores.hit.len()];
        (sizes == [n; 4]).then_some(scores)
    }
}

/// log of the sum of exp, and the index of the largest.
fn log_sum_exp(logits: &[f32]) -> (f64, usize) {
    let (top, max) = logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, &l)| if l > best.1 { (i, l) } else { best });
    let max = f64::from(max);
    (max + logits.iter().map(|&l| (f64::from(l) - max).exp()).sum::<f64>().ln(), top)
}

/// Logits of the f16 cache at some positions.
#[derive(Default)]
pub struct Base {
    /// `[n_position][n_vocab]`
    logits: Vec<f32>,
    /// per position: log of the sum of exp, and the likeliest token
    norm: Vec<(f64, usize)>,
}

impl Base {
    /// Adds positions; `logits` is `[n][n_vocab]`.
    pub fn push(&mut self, logits: &[f32], n_vocab: usize, n_thread: usize) {
        let n = logits.len() / n_vocab;
        self.norm.extend(parallel(n, n_thread, |i| log_sum_exp(&logits[i * n_vocab..][..n_vocab])));
        self.logits.extend_from_slice(logits);
    }

    /// Scores positions from `first` on; `logits` is `[targets.len()][n_vocab]`, `targets` the tokens that come next.
    pub fn score(&self, first: usize, logits: &[f32], targets: &[i32], n_vocab: usize, n_thread: usize, out: &mut Scores) -> Result<()> {
        let each = parallel(targets.len(), n_thread, |i| {
            let base = &self.logits[(first + i) * n_vocab..][..n_vocab];
            let other = &logits[i * n_vocab..][..n_vocab];
            let (base_lse, base_top) = self.norm[first + i];
            let (lse, top) = log_sum_exp(other);
            let target = targets[i] as usize;
            // by differences of logits, because the divergence is a small difference of large entropies
            let mut sum = 0.0;
            for (&b, &o) in base.iter().zip(other) {
                let p = (f64::from(b) - base_lse).exp();
                // a logit of -inf in both is a token that cannot be
                if p > 0.0 {
                    sum += p * (f64::from(b) - f64::from(o));
                }
            }
            (sum + lse - base_lse, lse - f64::from(other[target]), top == base_top, top == target)
        });
        for (kld, nll, same_top, hit) in each {
            ensure!(kld.is_finite() && nll.is_finite(), "the model's logits are not finite");
            // rounding alone can make it negative
            out.kld.push(kld.max(0.0) as f32);
            out.nll.push(nll as f32);
            out.same_top.push(same_top);
            out.hit.push(hit);
        }
        Ok(())
    }
}

/// Mean and its standard error, as `llama-perplexity` has them.
pub fn mean(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count() as f64;
    if n < 1.0 {
        return (f64::NAN, f64::NAN);
    }
    let mean = values.clone().sum::<f64>() / n;
    let variance = values.map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
    (mean, if n > 1.0 { (variance / (n - 1.0)).sqrt() } else { 0.0 })
}

/// The value below which a fraction of `sorted` lies, linear between neighbours.
pub fn percentile(sorted: &[f32], fraction: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = fraction * last as f64;
    let (i, rest) = (at as usize, at.fract());
    let (low, high) = (f64::from(sorted[i]), f64::from(sorted[(i + 1).min(last)]));
    low + rest * (high - low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_of_known_distributions() {
        // P = (1/2, 1/4, 1/4, 0), Q = (1/4, 1/4, 1/2, 0): KL = 1/2 ln 2 - 1/4 ln 2
        let p = [2f32.ln(), 0.0, 0.0, f32::NEG_INFINITY].map(|l| l + 3.0);
        let q = [0.0, 0.0, 2f32.ln(), f32::NEG_INFINITY];
        let mut base = Base::default();
        base.push(&[p, q].concat(), 4, 1);
        let mut scores = Scores::default();
        base.score(0, &[q, q].concat(), &[2, 0], 4, 2, &mut scores).unwrap();
        assert!((f64::from(scores.kld[0]) - 0.25 * 2f64.ln()).abs() < 1e-7);
        assert_eq!(scores.kld[1], 0.0);
        assert!((f64::from(scores.nll[0]) - 2f64.ln()).abs() < 1e-7 && (f64::from(scores.nll[1]) - 4f64.ln()).abs() < 1e-7);
        assert_eq!((scores.same_top.clone(), scores.hit.clone()), (vec![false, true], vec![true, false]));
        assert_eq!(Scores::from_json(&scores.to_json(), 2).unwrap(), scores);
        assert_eq!(Scores::from_json(&scores.to_json(), 3), None);
        assert!(base.score(0, &[f32::NAN; 4], &[0], 4, 1, &mut scores).is_err());
    }

    #[test]
    fn percentiles_lie_between_neighbours() {
        let sorted = [1.0, 2.0, 4.0];
        assert_eq!([0.0, 0.25, 0.5, 0.75, 1.0].map(|f| percentile(&sorted, f)), [1.0, 1.5, 2.0, 3.0, 4.0]);
        assert!(percentile(&[], 0.5).is_nan());
        let (m, se) = mean(sorted.iter().map(|&v| f64::from(v)));
        assert!((m - 7.0 / 3.0).abs() < 1e-12 && (se - (14.0 / 9.0 / 2.0f64).sqrt()).abs() < 1e-12);
    }
}
