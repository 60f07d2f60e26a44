//! The angles of a cell's rotation, as `ggml_rope_ext()` computes them, YaRN (Peng et al. 2023) included.

use anyhow::{ensure, Result};

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
            self.n_rot > 0 && self.n_rot % 2 == 0 && self.n_offs + self.n_rot <= head_dim,
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
        ensure!(self.freq_base.is_finite() && self.freq_base > 0.0, "RoPE frequency base {} is not positive", self.freq_base);
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

    /// Radians per position of each pair, and the magnitude that the rotation multiplies by.
    ///
    /// Linear in the position: YaRN only mixes frequencies. The frequency ratio is rounded to f32 first, as ggml does,
    /// because at position 100,000 its last bit is an angle.
    pub fn frequencies(&self) -> (Vec<f64>, f32) {
        let n = self.n_rot / 2;
        let ratio = f64::from(self.freq_base.powf(-2.0 / self.n_rot as f32));
        let corr = |beta: f32| {
            self.n_rot as f32 * (self.n_ctx_orig as f32 / (beta * 2.0 * std::f32::consts::PI)).ln() / (2.0 * self.freq_base.ln())
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
