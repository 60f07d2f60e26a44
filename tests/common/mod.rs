//! Synthetic projections and a plain reading of rows.
#![allow(dead_code, reason = "each test program uses a part")]
#![allow(clippy::needless_range_loop, reason = "indices name channels and dimensions")]

use half::f16;
use palu::layout::STEP;
use palu::projection::{Group, Side, SideProj};

/// xorshift64*
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        if self.0 == 0 {
            self.0 = 0x9e37_79b9;
        }
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// 0..1
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }
    pub fn normal(&mut self) -> f64 {
        (-2.0 * (1.0 - self.uniform()).ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }
    /// Tokens whose latents have the variances that the steps of `side` were made for, with some energy outside the kept channels.
    pub fn tokens(&mut self, side: &SideProj, n: usize) -> Vec<f32> {
        let width = side.n_head_kv * side.head_dim;
        let mut x = vec![0.0; n * width];
        for x in x.chunks_mut(width) {
            for (y, m) in x.iter_mut().zip(&side.mean) {
                *y = m + 0.01 * self.normal() as f32;
            }
            for g in &side.groups {
                let d = g.n_head * side.head_dim;
                for c in 0..g.rank {
                    let z = self.normal() as f32 * g.step[c] / STEP[g.bits[c / 8] as usize];
                    for i in 0..d {
                        x[g.head0 * side.head_dim + i] += z * g.dec[c * d + i].to_f32();
                    }
                }
            }
        }
        x
    }
}

/// A side with an orthonormal basis per group, falling variances, and `bits` in every group (one segment fewer per group index,
/// so that groups differ). `extra`: bytes of padding to add to the row.
pub fn random_side(
    random: &mut Random,
    side: Side,
    n_head_kv: usize,
    group_size: usize,
    head_dim: usize,
    bits: &[u8],
    extra: usize,
) -> SideProj {
    let d = group_size * head_dim;
    let mut offset = 0;
    let groups = (0..n_head_kv / group_size)
        .map(|i| {
            let kept = bits.len().saturating_sub(i).min(d / 8);
            let bits = bits[..kept].to_vec();
            let rank = 8 * kept;
            let mut basis: Vec<Vec<f64>> = Vec::new();
            while basis.len() < rank {
                let mut v: Vec<f64> = (0..d).map(|_| random.normal()).collect();
                for _ in 0..2 {
                    for b in &basis {
                        let dot: f64 = v.iter().zip(b).map(|(x, y)| x * y).sum();
                        v.iter_mut().zip(b).for_each(|(x, y)| *x -= dot * y);
                    }
                }
                let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
                v.iter_mut().for_each(|x| *x /= norm);
                basis.push(v);
            }
            let flat: Vec<f16> = basis.iter().flatten().map(|&x| f16::from_f64(x)).collect();
            // the same step everywhere, as water-filling has it, but for some scatter
            let step =
                bits.iter().flat_map(|_| [0.3; 8]).map(|s: f32| s * (0.8 + 0.4 * random.uniform() as f32)).collect();
            let group = Group {
                head0: i * group_size,
                n_head: group_size,
                rank,
                offset,
                step,
                enc: flat.clone(),
                dec: flat,
                bits,
            };
            offset += 2 + group.bits.iter().map(|&b| b as usize).sum::<usize>();
            group
        })
        .collect();
    let mean = (0..n_head_kv * head_dim).map(|_| 0.5 * random.normal() as f32).collect();
    SideProj { side, n_head_kv, head_dim, mean, groups, row_bytes: offset.div_ceil(4) * 4 + 4 * extra }
}

/// Scale and codes of one group, read bit by bit.
pub fn read_row(side: &SideProj, g: usize, row: &[u8]) -> (f64, Vec<u32>) {
    let group = &side.groups[g];
    let scale = f16::from_le_bytes([row[group.offset], row[group.offset + 1]]).to_f64();
    let mut codes = Vec::new();
    let mut byte = group.offset + 2;
    for &b in &group.bits {
        for i in 0..8 {
            let code = (0..b as usize).fold(0, |code, j| {
                let bit = i * b as usize + j;
                code | u32::from(row[byte + bit / 8] >> (bit % 8) & 1) << j
            });
            codes.push(code);
        }
        byte += b as usize;
    }
    (scale, codes)
}

/// A group's dimensions from the file's own decoder, in f64.
pub fn rebuild_exactly(side: &SideProj, g: usize, scale: f64, codes: &[u32]) -> Vec<f64> {
    let group = &side.groups[g];
    let d = group.n_head * side.head_dim;
    let mut x: Vec<f64> = side.mean[group.head0 * side.head_dim..][..d].iter().map(|&m| f64::from(m)).collect();
    for c in 0..group.rank {
        let level = f64::from(codes[c]) - f64::from((1u32 << group.bits[c / 8]) - 1) / 2.0;
        let z = level * f64::from(group.step[c]) * scale;
        for i in 0..d {
            x[i] += z * group.dec[c * d + i].to_f64();
        }
    }
    x
}

/// A group's dimensions from the integer decoder, in f64: what the kernels are to compute.
pub fn rebuild_as_defined(
    side: &SideProj,
    g: usize,
    decoder: &palu::codec::Decoder,
    scale: f64,
    codes: &[u32],
) -> Vec<f64> {
    let group = &side.groups[g];
    (0..group.n_head * side.head_dim)
        .map(|i| {
            let mean = f64::from(side.mean[group.head0 * side.head_dim + i]);
            if group.rank == 0 {
                return mean + 0.0 * scale;
            }
            let sum: i64 =
                (0..group.rank).map(|c| i64::from(decoder.weight[i * group.rank + c]) * i64::from(codes[c])).sum();
            mean + scale * f64::from(decoder.scale[i]) * (sum as f64 + decoder.offset2[i] as f64 / 2.0)
        })
        .collect()
}
