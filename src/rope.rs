//! The angles of a cell's rotation, as `ggml_rope_ext()` computes them, YaRN (Peng et al. 2023) included.

use crate::kernels::TRIG_STRIDE;
use anyhow::{ensure, Result};
use std::sync::{Arc, Mutex, Weak};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeKind {
    /// keys are used as stored
    None,
    /// rotates `(x[2i], x[2i + 1])`
    Norm,
    /// rotates `(x[i], x[i + n_rot/2])`
    Neox,
}

/// What a model's RoPE says; the names are those of `ggml_rope_ext()`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeParams {
    pub kind: RopeKind,
    pub n_rot: usize,
    pub n_offs: usize,
    pub n_ctx_orig: i32,
    pub freq_base: f32,
    pub freq_scale: f32,
    pub ext_factor: f32,
    pub attn_factor: f32,
    pub beta_fast: f32,
    pub beta_slow: f32,
    /// `[n_rot/2]`, or empty
    pub freq_factors: Vec<f32>,
}

impl RopeParams {
    pub fn none() -> Self {
        Self {
            kind: RopeKind::None,
            n_rot: 0,
            n_offs: 0,
            n_ctx_orig: 0,
            freq_base: 10000.0,
            freq_scale: 1.0,
            ext_factor: 0.0,
            attn_factor: 1.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            freq_factors: Vec::new(),
        }
    }

    pub fn check(&self, head_dim: usize) -> Result<()> {
        if self.kind == RopeKind::None {
            return Ok(());
        }
        ensure!(
            self.n_rot > 0 && self.n_rot.is_multiple_of(2) && self.n_offs + self.n_rot <= head_dim,
            "RoPE over {} dimensions from {} does not fit a head of {head_dim}",
            self.n_rot,
            self.n_offs
        );
        ensure!(
            self.freq_factors.is_empty() || self.freq_factors.len() == self.n_rot / 2,
            "RoPE has {} frequency factors for {} frequencies",
            self.freq_factors.len(),
            self.n_rot / 2
        );
        ensure!(
            self.freq_base.is_finite() && self.freq_base > 0.0,
            "RoPE frequency base {} is not positive",
            self.freq_base
        );
        Ok(())
    }

    /// Dimensions `(a, b)` of each rotated pair.
    pub fn pair(&self, i: usize) -> (usize, usize) {
        match self.kind {
            RopeKind::None => unreachable!("no pairs without RoPE"),
            RopeKind::Norm => (self.n_offs + 2 * i, self.n_offs + 2 * i + 1),
            RopeKind::Neox => (self.n_offs + i, self.n_offs + i + self.n_rot / 2),
        }
    }

    /// Pairs that are rotated.
    pub fn n_pair(&self) -> usize {
        if self.kind == RopeKind::None {
            0
        } else {
            self.n_rot / 2
        }
    }

    /// All of a head's dimensions in pairs: the [`Self::n_pair`] rotated ones, then the rest two at a time, of which an odd
    /// last one is left out.
    pub fn pairs(&self, head_dim: usize) -> Vec<(usize, usize)> {
        let mut pairs: Vec<_> = (0..self.n_pair()).map(|i| self.pair(i)).collect();
        let rest: Vec<_> = (0..head_dim).filter(|d| !pairs.iter().any(|(a, b)| a == d || b == d)).collect();
        pairs.extend(rest.chunks_exact(2).map(|p| (p[0], p[1])));
        pairs
    }

    /// Radians per position of each pair, and the magnitude that the rotation multiplies by.
    ///
    /// Linear in the position: YaRN only mixes frequencies. The frequency ratio is rounded to f32 first, as ggml does,
    /// because at position 100,000 its last bit is an angle.
    pub fn frequencies(&self) -> (Vec<f64>, f32) {
        let n = self.n_rot / 2;
        let ratio = f64::from(self.freq_base.powf(-2.0 / self.n_rot as f32));
        let corr = |beta: f32| {
            self.n_rot as f32 * (self.n_ctx_orig as f32 / (beta * 2.0 * std::f32::consts::PI)).ln()
                / (2.0 * self.freq_base.ln())
        };
        let low = corr(self.beta_fast).floor().max(0.0);
        let high = corr(self.beta_slow).ceil().min(self.n_rot as f32 - 1.0);
        let mut magnitude = self.attn_factor;
        if self.ext_factor != 0.0 {
            magnitude *= 1.0 + 0.1 * (1.0 / self.freq_scale).ln();
        }
        let freq = (0..n)
            .map(|i| {
                let factor = self.freq_factors.get(i).map_or(1.0, |&f| f64::from(f));
                let extrap = ratio.powi(i as i32) / factor;
                let interp = f64::from(self.freq_scale) * extrap;
                if self.ext_factor == 0.0 {
                    return interp;
                }
                let y = (i as f32 - low) / (high - low).max(0.001);
                let mix = f64::from((1.0 - y.clamp(0.0, 1.0)) * self.ext_factor);
                interp * (1.0 - mix) + extrap * mix
            })
            .collect();
        (freq, magnitude)
    }
}

/// Cosines and sines of every angle position * frequency, from tables: a position is written in base 256, and the
/// rotations of its digits are multiplied. Rotation is linear in the position, so that a negative position is the
/// conjugate of its absolute value.
pub(crate) struct Angles {
    pub n_pair: usize,
    /// `[n_pair]` radians per position
    pub frequency: Vec<f64>,
    pub magnitude: f32,
    /// `[4][256][n_pair]` rotations by digit * 256^place, without magnitude
    digit_cos: Vec<f32>,
    digit_sin: Vec<f32>,
    /// `[n_pair][TRIG_STRIDE]` rotations by 0, 1, 2, ... times the magnitude
    pub low_cos: Vec<f32>,
    pub low_sin: Vec<f32>,
}

impl Angles {
    /// The table for `rope`, shared by all layers that rotate the same way.
    pub fn shared(rope: &RopeParams) -> Arc<Self> {
        static TABLES: Mutex<Vec<(RopeParams, Weak<Angles>)>> = Mutex::new(Vec::new());
        let mut tables = TABLES.lock().unwrap_or_else(|e| e.into_inner());
        tables.retain(|(_, table)| table.strong_count() > 0);
        if let Some(table) = tables.iter().find(|(r, _)| r == rope).and_then(|(_, table)| table.upgrade()) {
            return table;
        }
        let table = Arc::new(Self::new(rope));
        tables.push((rope.clone(), Arc::downgrade(&table)));
        table
    }

    fn new(rope: &RopeParams) -> Self {
        let (freq, magnitude) = rope.frequencies();
        let n_pair = freq.len();
        let mut table = Self {
            n_pair,
            frequency: freq.clone(),
            magnitude,
            digit_cos: Vec::with_capacity(4 * 256 * n_pair),
            digit_sin: Vec::with_capacity(4 * 256 * n_pair),
            low_cos: Vec::with_capacity(n_pair * TRIG_STRIDE),
            low_sin: Vec::with_capacity(n_pair * TRIG_STRIDE),
        };
        for place in 0..4 {
            for digit in 0..256 {
                for f in &freq {
                    let (sin, cos) = ((f64::from(digit) * 256f64.powi(place)) * f).sin_cos();
                    table.digit_cos.push(cos as f32);
                    table.digit_sin.push(sin as f32);
                }
            }
        }
        for f in &freq {
            for t in 0..TRIG_STRIDE {
                let (sin, cos) = (t as f64 * f).sin_cos();
                table.low_cos.push((cos * f64::from(magnitude)) as f32);
                table.low_sin.push((sin * f64::from(magnitude)) as f32);
            }
        }
        table
    }

    /// The rotation by `position`, without magnitude, into cos and sin `[n_pair]`.
    pub fn at(&self, position: i64, cos: &mut [f32], sin: &mut [f32]) {
        let n = self.n_pair;
        let size = position.unsigned_abs();
        let digit = |place: usize| (place * 256 + (size >> (8 * place) & 255) as usize) * n;
        cos.copy_from_slice(&self.digit_cos[digit(0)..][..n]);
        sin.copy_from_slice(&self.digit_sin[digit(0)..][..n]);
        for place in 1..4 {
            if size >> (8 * place) == 0 {
                break;
            }
            let (c2, s2) = (&self.digit_cos[digit(place)..][..n], &self.digit_sin[digit(place)..][..n]);
            for i in 0..n {
                let (c, s) = (cos[i], sin[i]);
                cos[i] = c * c2[i] - s * s2[i];
                sin[i] = s * c2[i] + c * s2[i];
            }
        }
        if position < 0 {
            sin.iter_mut().for_each(|s| *s = -*s);
        }
    }
}
