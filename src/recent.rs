//! The last tokens of each sequence in f16, beside the rows.
//!
//! Most of what attention reads is near, so errors there cost the most: with the last 16 tokens exact, the divergence is less
//! than half at equal bytes (docs/quality.md). Every token has its row; the buffer of this module only takes the place of the
//! nearest ones, so a cell that the buffer lost is read from its row. Slots are a ring that the caller keeps: for every query
//! it says which slot, or which token of the same call, has the cell at each distance, and hides these cells from the
//! attention over rows. What comes out here is merged with that attention's result (`AttnParams::extra`).

use crate::attention::{extra_row, slope, EXTRA_HEAD};
use crate::kernels::dot;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// What a runtime should take by default; `PALU_N_RECENT`.
pub const N_RECENT: usize = 16;

/// `palu_recent_params`.
#[derive(Clone, Copy, Debug)]
pub struct RecentParams {
    /// `[n_stream][n_token][n_head][head_dim_k]`, rotated, last dimension contiguous; strides in bytes
    pub q: *const f32,
    pub q_nb_head: usize,
    pub q_nb_token: usize,
    pub q_nb_stream: usize,
    /// `[n_stream*n_token][n_head_kv][head_dim]`: this call's tokens, keys rotated
    pub cur: [*const f32; 2],
    pub cur_nb_head: [usize; 2],
    pub cur_nb_token: [usize; 2],
    /// f16 `[n_stream][n_slot][n_head_kv][head_dim]`: earlier ones
    pub slots: [*mut u16; 2],
    /// `[n_stream][n_token][n_recent + 1]`
    pub idxs: *const i32,
    /// `[n_stream][n_token][n_head][`[`extra_row`]`]`, or null: tokens are stored and nothing else
    pub out: *mut f32,
    pub n_head: usize,
    pub n_head_kv: usize,
    pub head_dim: [usize; 2],
    pub n_token: usize,
    pub n_stream: usize,
    pub n_slot: usize,
    pub n_recent: usize,
    pub scale: f32,
    pub softcap: f32,
    pub max_bias: f32,
}

impl RecentParams {
    /// Does this share: of every KV head of a stream first all queries, then the tokens that go to slots.
    ///
    /// # Safety
    /// Pointers of the shapes above; indices below `n_slot + n_token`, and the last of each token's below `n_slot`, all different
    /// within a stream or negative.
    pub unsafe fn run(&self, ith: usize, nth: usize) {
        let mut scratch = Scratch {
            known: [vec![false; self.n_slot], vec![false; self.n_slot]],
            values: self.head_dim.map(|n| vec![0.0; self.n_slot * n]),
            scores: vec![0.0; self.n_recent],
        };
        for unit in (ith..self.n_stream * self.n_head_kv).step_by(nth) {
            let (stream, kv) = (unit / self.n_head_kv, unit % self.n_head_kv);
            // SAFETY: the caller's promise; no other share has this head
            unsafe {
                if !self.out.is_null() {
                    scratch.known.iter_mut().for_each(|k| k.fill(false));
                    for token in 0..self.n_token {
                        self.attend(stream, token, kv, &mut scratch);
                    }
                }
                for token in 0..self.n_token {
                    self.store(stream, token, kv);
                }
            }
        }
    }

    unsafe fn idxs_of(&self, stream: usize, token: usize) -> &[i32] {
        let n = self.n_recent + 1;
        // SAFETY: within the indices
        unsafe { std::slice::from_raw_parts(self.idxs.add((stream * self.n_token + token) * n), n) }
    }

    /// A head of this call's token.
    unsafe fn current(&self, side: usize, stream: usize, token: usize, kv: usize) -> &[f32] {
        let at =
            (stream * self.n_token + token) * self.cur_nb_token[side] + kv * self.cur_nb_head[side];
        // SAFETY: within the tokens
        unsafe { std::slice::from_raw_parts(self.cur[side].byte_add(at), self.head_dim[side]) }
    }

    unsafe fn slot(&self, side: usize, stream: usize, slot: usize, kv: usize) -> *mut u16 {
        let at = ((stream * self.n_slot + slot) * self.n_head_kv + kv) * self.head_dim[side];
        // SAFETY: within the slots
        unsafe { self.slots[side].add(at) }
    }

    /// A head of the cell that an index names.
    unsafe fn cell<'a>(
        &'a self,
        side: usize,
        stream: usize,
        index: usize,
        kv: usize,
        s: &'a mut Scratch,
    ) -> &'a [f32] {
        let n = self.head_dim[side];
        // SAFETY: the caller's promise about indices
        unsafe {
            if index >= self.n_slot {
                return self.current(side, stream, index - self.n_slot, kv);
            }
            let values = &mut s.values[side][index * n..][..n];
            if !s.known[side][index] {
                s.known[side][index] = true;
                let from =
                    std::slice::from_raw_parts(self.slot(side, stream, index, kv).cast::<f16>(), n);
                from.convert_to_f32_slice(values);
            }
            values
        }
    }

    /// All query heads of a KV head for one token.
    unsafe fn attend(&self, stream: usize, token: usize, kv: usize, s: &mut Scratch) {
        let rep = self.n_head / self.n_head_kv;
        let [dim_k, dim_v] = self.head_dim;
        // SAFETY: as the shapes say
        unsafe {
            let idxs = &self.idxs_of(stream, token)[..self.n_recent];
            for head in kv * rep..(kv + 1) * rep {
                let q = self.q.byte_add(
                    stream * self.q_nb_stream + token * self.q_nb_token + head * self.q_nb_head,
                );
                let q = std::slice::from_raw_parts(q, dim_k);
                let slope = slope(self.max_bias, self.n_head, head);
                let mut max = f32::NEG_INFINITY;
                for (distance, &index) in idxs.iter().enumerate() {
                    let Ok(index) = usize::try_from(index) else {
                        continue;
                    };
                    let mut score = self.scale * dot(q, self.cell(0, stream, index, kv, s));
                    if self.softcap != 0.0 {
                        score = self.softcap * (score / self.softcap).tanh();
                    }
                    if self.max_bias > 0.0 {
                        score -= slope * distance as f32;
                    }
                    s.scores[distance] = score;
                    // a score that is not a number must show
                    max = if score > max || score.is_nan() {
                        score
                    } else {
                        max
                    };
                }
                let row = ((stream * self.n_token + token) * self.n_head + head) * extra_row(dim_v);
                let row = std::slice::from_raw_parts_mut(self.out.add(row), extra_row(dim_v));
                row.fill(0.0);
                let mut sum = 0.0;
                for (distance, &index) in idxs.iter().enumerate() {
                    let Ok(index) = usize::try_from(index) else {
                        continue;
                    };
                    let weight = (s.scores[distance] - max).exp();
                    sum += weight;
                    let value = self.cell(1, stream, index, kv, s);
                    row[EXTRA_HEAD..]
                        .iter_mut()
                        .zip(value)
                        .for_each(|(y, v)| *y += weight * v);
                }
                (row[0], row[1]) = (max, sum);
            }
        }
    }

    unsafe fn store(&self, stream: usize, token: usize, kv: usize) {
        // SAFETY: as the shapes say
        unsafe {
            let Ok(slot) = usize::try_from(self.idxs_of(stream, token)[self.n_recent]) else {
                return;
            };
            for side in 0..2 {
                let to = self.slot(side, stream, slot, kv).cast::<f16>();
                let to = std::slice::from_raw_parts_mut(to, self.head_dim[side]);
                to.convert_from_f32_slice(self.current(side, stream, token, kv));
            }
        }
    }
}

/// What a share knows of its KV head's slots, as f32, by side, and one query's scores.
struct Scratch {
    known: [Vec<bool>; 2],
    values: [Vec<f32>; 2],
    scores: Vec<f32>,
}
