//! How a token becomes a row, and back.
//!
//! A row holds, for each head group in order, an f16 scale and then the codes of the group's latent channels, a segment
//! of eight at a time: a little-endian string of eight numbers of b bits. Code c stands for the latent value
//! (c - (2^b - 1)/2) * step * scale, and a token is mean + the sum of its latent values times the decoder's rows.
//!
//! Decoding is done in integers: a [`Decoder`] holds the decoder times the steps, rounded to 8 or 16 bits with one scale
//! per dimension. It *defines* what a row decodes to, here and in attention, on the CPU and on a GPU. Two dimensions that
//! RoPE turns into each other share a scale, so that a kernel can rotate before it scales.

use crate::kernels::generic::{Gemm, Quantize, RebuildValues};
use crate::kernels::{dispatch, room, round_up, Aligned, Arena, Isa, Kernels, UnpackPlan, BLOCK, PAD, TILE};
use crate::layout::SEGMENT;
use crate::projection::{Group, SideProj};
use half::f16;

/// Mean bits of a side's codes above which its decoder gets 16 bits: with 8 its rounding would be heard beside that of such codes.
const TWO_PLANES_FROM_BITS: f64 = 4.5;

/// Bytes per weight of a side's integer decoder.
pub fn planes(side: &SideProj) -> usize {
    if side.code_bits() > TWO_PLANES_FROM_BITS {
        2
    } else {
        1
    }
}

/// One head group's integer decoder: x\[d\] = mean\[d\] + row_scale * scale\[d\] * (sum over c of weight\[d\]\[c\] * code\[c\] + offset\[d\]).
#[derive(Clone, Debug)]
pub struct Decoder {
    pub rank: usize,
    /// `[d][rank]`, d = n_head*head_dim: at most 127 with one plane and 32512 with two
    pub weight: Vec<i32>,
    /// `[d]`
    pub scale: Vec<f32>,
    /// `[d]`: twice the offset, which is what codes of 0 are short of: -sum of weight * (2^b - 1)
    pub offset2: Vec<i64>,
}

impl Decoder {
    /// `pairs`: dimensions of a head that share a scale; see [`crate::rope::RopeParams::pairs`]. Those that are not rotated
    /// do as well, because kernels treat all pairs alike.
    pub fn new(group: &Group, planes: usize, pairs: &[(usize, usize)]) -> Self {
        let rank = group.rank;
        let d = group.dec.len() / rank.max(1);
        let levels = |c: usize| f64::from((1u32 << group.bits[c / SEGMENT]) - 1);
        let mut decoder = Self { rank, weight: Vec::with_capacity(d * rank), scale: Vec::new(), offset2: Vec::new() };
        let column = |i: usize| (0..rank).map(move |c| f64::from(group.dec[c * d + i]) * f64::from(group.step[c]));
        let mut scales: Vec<f64> = (0..d)
            .map(|i| {
                let top = column(i).fold(0.0f64, |top, x| top.max(x.abs()));
                if planes == 1 {
                    return top / 127.0;
                }
                // sums stay below 2^31
                let sum: f64 = column(i).enumerate().map(|(c, x)| x.abs() * levels(c) / 2.0).sum();
                (top / 32512.0).max(sum / f64::from(1u32 << 30))
            })
            .collect();
        let head_dim = d / group.n_head;
        for head in (0..if rank > 0 { group.n_head } else { 0 }).map(|h| h * head_dim) {
            for &(a, b) in pairs {
                let scale = scales[head + a].max(scales[head + b]);
                (scales[head + a], scales[head + b]) = (scale, scale);
            }
        }
        for i in 0..d {
            let scale = scales[i] as f32;
            let start = decoder.weight.len();
            let limit = if planes == 1 { 127.0 } else { 32512.0 };
            decoder.weight.extend(column(i).map(|x| match x / f64::from(scale) {
                w if w.is_finite() => w.round().clamp(-limit, limit) as i32,
                _ => 0,
            }));
            decoder.scale.push(scale);
            let offset2 =
                decoder.weight[start..].iter().enumerate().map(|(c, &w)| i64::from(w) * levels(c) as i64).sum::<i64>();
            decoder.offset2.push(-offset2);
        }
        decoder
    }

    /// The offset's integer part and the half that may be left.
    pub(crate) fn offset(&self, d: usize) -> (i32, f32) {
        let twice = self.offset2[d];
        // wrapping is fine: the sum that it is added to comes back into range
        (twice.div_euclid(2) as i32, twice.rem_euclid(2) as f32 / 2.0)
    }

    /// Byte `plane` of `planes` of a weight, the upper one first.
    pub(crate) fn byte(&self, d: usize, c: usize, plane: usize, planes: usize) -> i8 {
        let w = self.weight[d * self.rank + c];
        if planes == 1 {
            return w as i8;
        }
        let low = w as i8; // wraps to -128..=127
        if plane == 0 {
            ((w - i32::from(low)) / 256) as i8
        } else {
            low
        }
    }
}

/// Where tokens to be stored are and where their rows go; `palu_store_params`.
#[derive(Clone, Copy, Debug)]
pub struct StoreParams {
    /// `[n_token][n_head_kv][head_dim]`, last dimension contiguous
    pub x: *const f32,
    /// strides in bytes
    pub x_nb_head: usize,
    pub x_nb_token: usize,
    /// `[n_token]`, all different
    pub idxs: *const i64,
    /// `[n_row][row_bytes]`
    pub rows: *mut u8,
    pub n_token: usize,
}

/// Encoder and decoder of one side of one layer.
pub struct Codec {
    pub n_head_kv: usize,
    pub head_dim: usize,
    pub row_bytes: usize,
    /// head_dim padded to [`PAD`]
    pub(crate) dim: usize,
    pub(crate) planes: usize,
    /// `[n_head_kv*head_dim]`
    mean: Vec<f32>,
    pub(crate) groups: Vec<GroupCodec>,
    /// `[n_head_kv]`
    pub(crate) group_of_head: Vec<usize>,
    /// largest padded rank of a group
    pub(crate) stride: usize,
}

pub(crate) struct GroupCodec {
    pub head0: usize,
    pub n_head: usize,
    pub plan: UnpackPlan,
    /// some codes exceed 127
    pub wide: bool,
    /// f16 `[stride/BLOCK][d][BLOCK]`
    enc: Aligned<u16>,
    /// `[stride]`, zeros from the rank on
    inverse_step: Vec<f32>,
    half: Vec<f32>,
    weight: Vec<f32>,
    /// `[n_head][planes][rank/4][dim][4]`
    dec: Aligned<i8>,
    /// `[n_head][dim]`
    init: Aligned<i32>,
    dec_half: Aligned<f32>,
    scale: Aligned<f32>,
    mean: Aligned<f32>,
}

/// One head's decoder, as the kernels take it.
pub(crate) struct HeadDecoder {
    pub dec: *const i8,
    pub init: *const i32,
    pub half: *const f32,
    pub scale: *const f32,
    pub mean: *const f32,
}

impl GroupCodec {
    fn new(side: &SideProj, group: &Group, planes: usize, dim: usize, pairs: &[(usize, usize)]) -> Self {
        let (rank, head_dim) = (group.rank, side.head_dim);
        let d = group.n_head * head_dim;
        let plan = UnpackPlan::new(side.row_bytes, group.offset, &group.bits);
        let stride = plan.stride;

        let mut enc = vec![0u16; stride * d];
        for c in 0..rank {
            for i in 0..d {
                enc[(c / BLOCK * d + i) * BLOCK + c % BLOCK] = group.enc[c * d + i].to_bits();
            }
        }
        let padded =
            |f: &dyn Fn(usize) -> f32| (0..stride).map(|c| if c < rank { f(c) } else { 0.0 }).collect::<Vec<f32>>();

        let decoder = Decoder::new(group, planes, pairs);
        let mut dec = vec![0i8; group.n_head * planes * rank * dim];
        let (mut init, mut dec_half) = (vec![0i32; group.n_head * dim], vec![0.0; group.n_head * dim]);
        let (mut scale, mut mean) = (vec![0.0; group.n_head * dim], vec![0.0; group.n_head * dim]);
        for head in 0..group.n_head {
            for i in 0..head_dim {
                let from = head * head_dim + i;
                for plane in 0..planes {
                    for c in 0..rank {
                        let at = (((head * planes + plane) * (rank / 4) + c / 4) * dim + i) * 4 + c % 4;
                        dec[at] = decoder.byte(from, c, plane, planes);
                    }
                }
                mean[head * dim + i] = side.mean[group.head0 * head_dim + from];
                if rank > 0 {
                    (init[head * dim + i], dec_half[head * dim + i]) = decoder.offset(from);
                    scale[head * dim + i] = decoder.scale[from];
                }
            }
        }
        Self {
            head0: group.head0,
            n_head: group.n_head,
            plan,
            wide: group.bits.contains(&8),
            enc: Aligned::new(&enc),
            inverse_step: padded(&|c| if group.step[c] > 0.0 { 1.0 / group.step[c] } else { 0.0 }),
            half: padded(&|c| ((1u32 << group.bits[c / SEGMENT]) - 1) as f32 / 2.0),
            weight: padded(&|c| group.step[c] * group.step[c]),
            dec: Aligned::new(&dec),
            init: Aligned::new(&init),
            dec_half: Aligned::new(&dec_half),
            scale: Aligned::new(&scale),
            mean: Aligned::new(&mean),
        }
    }

    /// `[stride]`: (2^bits - 1)/2 of each channel.
    pub fn half_levels(&self) -> &[f32] {
        &self.half
    }

    /// The decoder of the group's head `head`.
    pub fn head(&self, head: usize, planes: usize, dim: usize) -> HeadDecoder {
        let at = head * dim;
        HeadDecoder {
            dec: self.dec.at(at * planes * self.plan.rank),
            init: self.init.at(at),
            half: self.dec_half.at(at),
            scale: self.scale.at(at),
            mean: self.mean.at(at),
        }
    }
}

/// Tokens that are encoded or decoded at a time.
const BATCH: usize = 48;
/// Ratio between the scales that the search tries.
pub const SEARCH_RATIO: f32 = 1.19;
/// The search ends when this many scales in a row were no better: the error is nearly unimodal, with ripples of rounding.
pub const SEARCH_PATIENCE: usize = 3;
/// How often the distance between the scales tried is halved around the best.
pub const SEARCH_REFINEMENTS: usize = 2;

impl Codec {
    /// The codec of values.
    pub fn new(side: &SideProj) -> Self {
        Self::with_pairs(side, &[])
    }

    /// The codec of keys; see [`Decoder::new`].
    pub fn with_pairs(side: &SideProj, pairs: &[(usize, usize)]) -> Self {
        let planes = planes(side);
        let dim = round_up(side.head_dim, PAD);
        let groups: Vec<GroupCodec> = side.groups.iter().map(|g| GroupCodec::new(side, g, planes, dim, pairs)).collect();
        let mut group_of_head = vec![0; side.n_head_kv];
        for (i, g) in groups.iter().enumerate() {
            group_of_head[g.head0..g.head0 + g.n_head].fill(i);
        }
        Self {
            n_head_kv: side.n_head_kv,
            head_dim: side.head_dim,
            row_bytes: side.row_bytes,
            dim,
            planes,
            mean: side.mean.clone(),
            stride: groups.iter().map(|g| g.plan.stride).max().unwrap_or(0),
            groups,
            group_of_head,
        }
    }

    /// Stores this share of the tokens; see `palu_store`.
    ///
    /// # Safety
    /// `p` must describe memory as [`StoreParams`] says, with every index within the rows, and nothing else may use the
    /// rows that this share's indices name.
    pub unsafe fn encode(&self, p: &StoreParams, ith: usize, nth: usize) {
        let share = p.n_token * ith / nth..p.n_token * (ith + 1) / nth;
        if share.is_empty() {
            return;
        }
        let batch = BATCH.min(share.len());
        let d_max = self.groups.iter().map(|g| g.n_head * self.head_dim).max().unwrap_or(0);
        let bytes = room::<f32>(batch * d_max)
            + room::<f32>(batch * self.stride)
            + 2 * room::<u8>(self.stride)
            + room::<u8>(batch * (self.row_bytes + 8))
            + room::<bool>(batch);
        dispatch!(I => Arena::with(bytes, |arena| {
            let buffers = Buffers {
                x: arena.take(batch * d_max),
                z: arena.take(batch * self.stride),
                codes: arena.take(self.stride),
                codes2: arena.take(self.stride),
                rows: arena.take(batch * (self.row_bytes + 8)),
                finite: arena.take(batch),
            };
            for first in share.clone().step_by(batch) {
                // SAFETY: the machine has the instruction set; the caller vouches for `p`
                unsafe { self.encode_batch::<I>(p, first, batch.min(share.end - first), &buffers) };
            }
        }));
    }

    unsafe fn encode_batch<I: Isa>(&self, p: &StoreParams, first: usize, n: usize, b: &Buffers) {
        let row_room = self.row_bytes + 8;
        // SAFETY: the buffers have room for a batch; the caller vouches for `p`
        unsafe {
            std::ptr::write_bytes(b.rows, 0, n * row_room);
            for group in &self.groups {
                let d = group.n_head * self.head_dim;
                let stride = group.plan.stride;
                for t in 0..n {
                    let mut finite = true;
                    for head in 0..group.n_head {
                        let at = p.x.byte_add((first + t) * p.x_nb_token + (group.head0 + head) * p.x_nb_head);
                        let mean = &self.mean[(group.head0 + head) * self.head_dim..][..self.head_dim];
                        finite &= I::center(self.head_dim, at, mean.as_ptr(), b.x.add(t * d + head * self.head_dim));
                    }
                    *b.finite.add(t) = finite;
                }
                for block in 0..stride / BLOCK {
                    I::gemm_f16(&Gemm {
                        m: n,
                        n: BLOCK.min(round_up(group.plan.rank - block * BLOCK, PAD)),
                        k: d,
                        a: b.x,
                        lda: d,
                        b: group.enc.at(block * d * BLOCK),
                        ldb: BLOCK,
                        c: b.z.add(block * BLOCK),
                        ldc: stride,
                        alpha: std::ptr::null(),
                    });
                }
                for t in 0..n {
                    let (scale, codes) = self.quantize::<I>(group, b.z.add(t * stride), *b.finite.add(t), b);
                    I::pack_row(&group.plan, codes, scale, b.rows.add(t * row_room));
                }
            }
            for t in 0..n {
                let row = p.rows.add(*p.idxs.add(first + t) as usize * self.row_bytes);
                row.copy_from_nonoverlapping(b.rows.add(t * row_room), self.row_bytes);
            }
        }
    }

    /// The scale and codes of a latent `[stride]`, which is overwritten.
    unsafe fn quantize<I: Isa>(&self, group: &GroupCodec, z: *mut f32, finite: bool, b: &Buffers) -> (f32, *const u8) {
        let n = round_up(group.plan.rank, PAD);
        // SAFETY: the group's constants and the buffers hold `n` values
        unsafe {
            let widest =
                if finite { I::normalize(n, z, group.inverse_step.as_ptr(), group.half.as_ptr()) } else { f32::NAN };
            let mut q = Quantize { n, y: z, half: group.half.as_ptr(), weight: group.weight.as_ptr(), scale: 0.0 };
            let (mut best, mut least, mut worse) = (0.0, f32::INFINITY, 0);
            let mut scale = widest.min(f16::MAX.to_f32());
            if widest.is_finite() {
                while worse < SEARCH_PATIENCE {
                    q.scale = f16::from_f32(scale).to_f32();
                    if q.scale == 0.0 {
                        break;
                    }
                    let error = I::quantize(&q, std::ptr::null_mut());
                    if error < least {
                        (best, least, worse) = (q.scale, error, 0);
                    } else {
                        worse += 1;
                    }
                    scale /= SEARCH_RATIO;
                }
            } else {
                best = f32::NAN;
            }
            let mut step = SEARCH_RATIO.sqrt();
            for _ in 0..SEARCH_REFINEMENTS {
                let middle = best;
                for scale in [middle * step, middle / step] {
                    q.scale = f16::from_f32(scale).to_f32();
                    if q.scale > 0.0 && q.scale.is_finite() {
                        let error = I::quantize(&q, std::ptr::null_mut());
                        if error < least {
                            (best, least) = (q.scale, error);
                        }
                    }
                }
                step = step.sqrt();
            }
            if best.is_nan() || best == 0.0 {
                std::ptr::write_bytes(b.codes, 0, group.plan.stride);
                return (best, b.codes);
            }
            q.scale = best;
            I::quantize(&q, b.codes);
            let refit = f16::from_f32(I::refit(&q, b.codes)).to_f32();
            if refit > 0.0 && refit.is_finite() {
                q.scale = refit;
                if I::quantize(&q, b.codes2) < least {
                    return (refit, b.codes2);
                }
            }
            (best, b.codes)
        }
    }

    /// Rebuilds rows; see `palu_load_rows`.
    ///
    /// # Safety
    /// `rows` must hold every row that `idxs[n_token]` names, and `out` have room for `[n_token][n_head_kv][head_dim]`.
    pub unsafe fn decode(&self, rows: *const u8, idxs: *const i64, n_token: usize, out: *mut f32) {
        // SAFETY: the caller's promise
        unsafe { self.decode_where(rows, |t| *idxs.add(t) as usize, n_token, out) }
    }

    unsafe fn decode_where(&self, rows: *const u8, index: impl Fn(usize) -> usize, n_token: usize, out: *mut f32) {
        let batch = TILE.min(n_token);
        let bytes = room::<u8>(batch * self.stride) + room::<f32>(batch) + room::<f32>(batch * self.dim);
        dispatch!(I => Arena::with(bytes, |arena| {
            let codes: *mut u8 = arena.take(batch * self.stride);
            let scales: *mut f32 = arena.take(batch);
            let values: *mut f32 = arena.take(batch * self.dim);
            for first in (0..n_token).step_by(TILE) {
                let n = batch.min(n_token - first);
                for group in &self.groups {
                    let stride = group.plan.stride;
                    // SAFETY: the buffers have room for a batch, the caller vouches for rows, indices and `out`
                    unsafe {
                        for t in 0..n {
                            let row = rows.add(index(first + t) * self.row_bytes);
                            *scales.add(t) = <I as Kernels>::unpack_row(&group.plan, row, codes.add(t * stride));
                        }
                        for h in 0..group.n_head {
                            let head = group.head(h, self.planes, self.dim);
                            I::rebuild_values(&RebuildValues {
                                n_token: n,
                                dim: self.dim,
                                k4: group.plan.rank / 4,
                                planes: self.planes,
                                wide: group.wide,
                                codes,
                                stride,
                                dec: head.dec,
                                init: head.init,
                                out: values,
                                out_stride: self.dim,
                            });
                            for t in 0..n {
                                let to = out.add(((first + t) * self.n_head_kv + group.head0 + h) * self.head_dim);
                                for d in 0..self.head_dim {
                                    let sum = *values.add(t * self.dim + d) + *head.half.add(d);
                                    *to.add(d) = *scales.add(t) * (*head.scale.add(d) * sum) + *head.mean.add(d);
                                }
                            }
                        }
                    }
                }
            }
        }));
    }

    /// Tokens `[n][n_head_kv][head_dim]` to rows `[n][row_bytes]`, on the calling thread.
    pub fn encode_rows(&self, x: &[f32], rows: &mut [u8]) {
        let d = self.n_head_kv * self.head_dim;
        assert_eq!(x.len() % d, 0);
        let n = x.len() / d;
        assert_eq!(rows.len(), n * self.row_bytes);
        let idxs: Vec<i64> = (0..n as i64).collect();
        let p = StoreParams {
            x: x.as_ptr(),
            x_nb_head: 4 * self.head_dim,
            x_nb_token: 4 * d,
            idxs: idxs.as_ptr(),
            rows: rows.as_mut_ptr(),
            n_token: n,
        };
        // SAFETY: the slices have the shapes that `p` says, and are borrowed
        unsafe { self.encode(&p, 0, 1) }
    }

    /// Rows `[n][row_bytes]` to tokens `[n][n_head_kv][head_dim]`, on the calling thread.
    pub fn decode_rows(&self, rows: &[u8], out: &mut [f32]) {
        let d = self.n_head_kv * self.head_dim;
        assert_eq!(out.len() % d, 0);
        let n = out.len() / d;
        assert_eq!(rows.len(), n * self.row_bytes);
        // SAFETY: the slices have the shapes that are needed
        unsafe { self.decode_where(rows.as_ptr(), |t| t, n, out.as_mut_ptr()) }
    }
}

struct Buffers {
    /// `[batch][d]`
    x: *mut f32,
    /// `[batch][stride]`
    z: *mut f32,
    /// `[stride]` each
    codes: *mut u8,
    codes2: *mut u8,
    /// `[batch][row_bytes + 8]`
    rows: *mut u8,
    /// `[batch]`
    finite: *mut bool,
}
