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

/// Queries over slots and tokens of the same call, in no order, some named by nobody; see `palu_recent()`.
#[derive(Clone, Debug)]
pub struct RecentCase {
    pub n_head: usize,
    pub n_head_kv: usize,
    pub head_dim: [usize; 2],
    pub n_token: usize,
    pub n_stream: usize,
    pub n_slot: usize,
    pub n_recent: usize,
    pub softcap: f32,
    pub max_bias: f32,
}

pub struct RecentInputs {
    pub q: Vec<f32>,
    /// `[n_stream*n_token][n_head_kv][head_dim]`
    pub cur: [Vec<f32>; 2],
    /// `[n_stream][n_slot][n_head_kv][head_dim]`
    pub slots: [Vec<u16>; 2],
    pub idxs: Vec<i32>,
}

impl RecentCase {
    pub fn all() -> Vec<Self> {
        let one = Self {
            n_head: 6,
            n_head_kv: 6,
            head_dim: [64, 64],
            n_token: 1,
            n_stream: 1,
            n_slot: 16,
            n_recent: 16,
            softcap: 0.0,
            max_bias: 0.0,
        };
        let joint = Self {
            n_head: 32,
            n_head_kv: 8,
            head_dim: [128, 128],
            ..one.clone()
        };
        vec![
            one.clone(),
            joint.clone(),
            Self {
                n_token: 5,
                n_stream: 3,
                n_slot: 48,
                ..joint.clone()
            },
            Self {
                n_token: 40,
                head_dim: [96, 64],
                softcap: 5.0,
                ..one.clone()
            },
            Self {
                n_token: 3,
                head_dim: [256, 72],
                n_head: 8,
                n_head_kv: 2,
                max_bias: 8.0,
                ..one.clone()
            },
            Self {
                n_token: 2,
                n_head: 5,
                n_head_kv: 1,
                head_dim: [90, 46],
                n_recent: 7,
                n_slot: 21,
                ..one.clone()
            },
            Self {
                n_recent: 100,
                n_slot: 300,
                n_token: 9,
                ..joint.clone()
            },
            Self {
                n_recent: 1,
                n_slot: 1,
                ..one
            },
        ]
    }

    pub fn inputs(&self, random: &mut Random) -> RecentInputs {
        let normal = |random: &mut Random, n: usize| {
            (0..n).map(|_| random.normal() as f32).collect::<Vec<_>>()
        };
        let tokens = self.n_stream * self.n_token;
        let q = normal(random, tokens * self.n_head * self.head_dim[0]);
        let cur = self
            .head_dim
            .map(|d| normal(random, tokens * self.n_head_kv * d));
        let mut named = vec![false; self.n_stream * self.n_slot];
        let mut idxs = Vec::new();
        for token in 0..tokens {
            let mut free: Vec<i32> = (0..(self.n_slot + token % self.n_token + 1) as i32).collect();
            let mut own: Vec<i32> = (0..self.n_recent)
                .map(|_| {
                    let some = !free.is_empty() && random.below(4) > 0 && token % 7 != 3;
                    if some {
                        free.swap_remove(random.below(free.len()))
                    } else {
                        -1
                    }
                })
                .collect();
            for &i in own.iter().filter(|&&i| i >= 0 && i < self.n_slot as i32) {
                named[token / self.n_token * self.n_slot + i as usize] = true;
            }
            // the last tokens go to slots of their own, among them such as queries of this call read
            let left = self.n_token - token % self.n_token - 1;
            own.push(if left < self.n_slot && left % 3 != 1 {
                left as i32
            } else {
                -1
            });
            idxs.extend(own);
        }
        let slots = self.head_dim.map(|d| {
            let mut x: Vec<u16> = (0..named.len() * self.n_head_kv * d)
                .map(|_| f16::from_f32(random.normal() as f32).to_bits())
                .collect();
            for (slot, x) in x.chunks_mut(self.n_head_kv * d).enumerate() {
                if !named[slot] {
                    x.fill(0x7e00); // not-a-number
                }
            }
            x
        });
        RecentInputs {
            q,
            cur,
            slots,
            idxs,
        }
    }

    /// `out`: null to store alone.
    pub fn params(
        &self,
        q: *const f32,
        cur: [*const f32; 2],
        slots: [*mut u16; 2],
        idxs: *const i32,
        out: *mut f32,
    ) -> palu::recent::RecentParams {
        let [k, v] = self.head_dim;
        palu::recent::RecentParams {
            q,
            q_nb_head: 4 * k,
            q_nb_token: 4 * k * self.n_head,
            q_nb_stream: 4 * k * self.n_head * self.n_token,
            cur,
            cur_nb_head: [4 * k, 4 * v],
            cur_nb_token: [4 * k * self.n_head_kv, 4 * v * self.n_head_kv],
            slots,
            idxs,
            out,
            n_head: self.n_head,
            n_head_kv: self.n_head_kv,
            head_dim: self.head_dim,
            n_token: self.n_token,
            n_stream: self.n_stream,
            n_slot: self.n_slot,
            n_recent: self.n_recent,
            scale: 0.7 / (k as f32).sqrt(),
            softcap: self.softcap,
            max_bias: self.max_bias,
        }
    }

    /// A head of the cell that an index names.
    fn cell(
        &self,
        x: &RecentInputs,
        side: usize,
        stream: usize,
        index: usize,
        kv: usize,
    ) -> Vec<f64> {
        let d = self.head_dim[side];
        if index < self.n_slot {
            let at = ((stream * self.n_slot + index) * self.n_head_kv + kv) * d;
            x.slots[side][at..at + d]
                .iter()
                .map(|&b| f16::from_bits(b).to_f64())
                .collect()
        } else {
            let at = ((stream * self.n_token + index - self.n_slot) * self.n_head_kv + kv) * d;
            x.cur[side][at..at + d]
                .iter()
                .map(|&x| f64::from(x))
                .collect()
        }
    }

    /// Sum of e^score and sum of e^score times value, per query, in f64.
    pub fn reference(&self, x: &RecentInputs) -> Vec<(f64, Vec<f64>)> {
        let [k, v] = self.head_dim;
        let mut out = Vec::new();
        for row in 0..self.n_stream * self.n_token * self.n_head {
            let (token, head) = (row / self.n_head, row % self.n_head);
            let (stream, kv) = (token / self.n_token, head / (self.n_head / self.n_head_kv));
            let slope = if self.max_bias > 0.0 {
                2f64.powf(-f64::from(self.max_bias) / self.n_head as f64 * (head + 1) as f64)
            } else {
                0.0
            };
            let (mut sum, mut y) = (0.0, vec![0.0; v]);
            for j in 0..self.n_recent {
                let Ok(index) = usize::try_from(x.idxs[token * (self.n_recent + 1) + j]) else {
                    continue;
                };
                let q = &x.q[row * k..][..k];
                let dot: f64 = q
                    .iter()
                    .zip(self.cell(x, 0, stream, index, kv))
                    .map(|(q, k)| f64::from(*q) * k)
                    .sum();
                let mut score = dot * f64::from(0.7 / (k as f32).sqrt());
                if self.softcap > 0.0 {
                    score = f64::from(self.softcap) * (score / f64::from(self.softcap)).tanh();
                }
                let weight = (score - slope * j as f64).exp();
                sum += weight;
                y.iter_mut()
                    .zip(self.cell(x, 1, stream, index, kv))
                    .for_each(|(y, v)| *y += weight * v);
            }
            out.push((sum, y));
        }
        out
    }

    /// Slots after the call.
    pub fn stored(&self, x: &RecentInputs) -> [Vec<u16>; 2] {
        let mut slots = x.slots.clone();
        for token in 0..self.n_stream * self.n_token {
            let Ok(slot) = usize::try_from(x.idxs[(token + 1) * (self.n_recent + 1) - 1]) else {
                continue;
            };
            for (side, slots) in slots.iter_mut().enumerate() {
                let n = self.n_head_kv * self.head_dim[side];
                let to = &mut slots[(token / self.n_token * self.n_slot + slot) * n..][..n];
                to.iter_mut()
                    .zip(&x.cur[side][token * n..])
                    .for_each(|(to, &x)| *to = f16::from_f32(x).to_bits());
            }
        }
        slots
    }

    /// Checks rows of `out` against the reference.
    pub fn check(&self, x: &RecentInputs, out: &[f32]) {
        let v = self.head_dim[1];
        for (row, (got, (sum, values))) in
            out.chunks_exact(4 + v).zip(self.reference(x)).enumerate()
        {
            if sum == 0.0 {
                assert!(
                    got[0] == f32::NEG_INFINITY && got[1..].iter().all(|&x| x == 0.0),
                    "query {row} sees nothing: {got:?} in {self:?}"
                );
                continue;
            }
            let scale = f64::from(got[0]).exp();
            let off = |got: f32, want: f64| (f64::from(got) * scale - want).abs() / sum;
            let worst = got[4..]
                .iter()
                .zip(&values)
                .map(|(&g, &w)| off(g, w))
                .fold(off(got[1], sum), f64::max);
            assert!(worst < 1e-5, "query {row} is off by {worst} in {self:?}");
        }
    }
}
