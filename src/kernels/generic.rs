//! The kernels, written over [`Isa`].
//!
//! # Safety
//! Every function here needs the instruction set of its `I`, and pointers that are readable (`*const`) or writable
//! (`*mut`) over the shapes in the comments. It must be inlined into a function that is compiled for the set.

#![allow(clippy::needless_range_loop, reason = "indices over registers, which the compiler unrolls")]

use super::{Isa, Segment, UnpackPlan, PAD, TILE, TRIG_STRIDE};
use std::cmp::min;

/// The methods of [`super::Kernels`] that need no special instructions.
macro_rules! kernels {
    ($(#[$attribute:meta])*) => {
        $(#[$attribute])*
        unsafe fn rebuild_keys(p: &generic::RebuildKeys) {
            // SAFETY: as the caller promises
            unsafe { generic::rebuild_keys::<Self>(p) }
        }
        $(#[$attribute])*
        unsafe fn score_keys(p: &generic::ScoreKeys) {
            // SAFETY: as the caller promises
            unsafe { generic::score_keys::<Self>(p) }
        }
        $(#[$attribute])*
        unsafe fn prepare_nodes(p: &generic::PrepareNodes) {
            // SAFETY: as the caller promises
            unsafe { generic::prepare_nodes::<Self>(p) }
        }
        $(#[$attribute])*
        unsafe fn fill_basis(pos: *const i32, n: usize, middle: i32, half: f32, out: *mut f32) {
            // SAFETY: as the caller promises
            unsafe { generic::fill_basis(pos, n, middle, half, out) }
        }
        $(#[$attribute])*
        unsafe fn rebuild_values(p: &generic::RebuildValues) {
            // SAFETY: as the caller promises
            unsafe { generic::rebuild_values::<Self>(p) }
        }
        $(#[$attribute])*
        unsafe fn gemm_f32(p: &generic::Gemm<f32>) {
            // SAFETY: as the caller promises
            unsafe { generic::gemm::<Self, f32>(p) }
        }
        $(#[$attribute])*
        unsafe fn gemm_u8(p: &generic::Gemm<u8>) {
            // SAFETY: as the caller promises
            unsafe { generic::gemm::<Self, u8>(p) }
        }
        $(#[$attribute])*
        unsafe fn gemm_f16(p: &generic::Gemm<u16>) {
            // SAFETY: as the caller promises
            unsafe { generic::gemm::<Self, u16>(p) }
        }
        $(#[$attribute])*
        unsafe fn rotate(k: *mut f32, n_pair: usize, cos: *const f32, sin: *const f32) {
            // SAFETY: as the caller promises
            unsafe { generic::rotate::<Self>(k, n_pair, cos, sin) }
        }
        $(#[$attribute])*
        unsafe fn fill_trig(p: &generic::FillTrig) {
            // SAFETY: as the caller promises
            unsafe { generic::fill_trig::<Self>(p) }
        }
        $(#[$attribute])*
        unsafe fn load_mask(mask: *const u8, f16: bool, n: usize, out: *mut f32) {
            // SAFETY: as the caller promises
            unsafe { generic::load_mask::<Self>(mask, f16, n, out) }
        }
        $(#[$attribute])*
        unsafe fn softmax(p: &generic::Softmax) {
            // SAFETY: as the caller promises
            unsafe { generic::softmax::<Self>(p) }
        }
        $(#[$attribute])*
        unsafe fn merge(out: *mut f32, x: *const f32, weight: f32, n: usize) {
            // SAFETY: as the caller promises
            unsafe { generic::merge::<Self>(out, x, weight, n) }
        }
        $(#[$attribute])*
        unsafe fn project_value(p: &generic::ProjectValue) {
            // SAFETY: as the caller promises
            unsafe { generic::project_value::<Self>(p) }
        }
        $(#[$attribute])*
        unsafe fn finish_value(p: &generic::FinishValue) {
            // SAFETY: as the caller promises
            unsafe { generic::finish_value(p) }
        }
        $(#[$attribute])*
        unsafe fn quantize(p: &generic::Quantize, codes: *mut u8) -> f32 {
            // SAFETY: as the caller promises
            unsafe { generic::quantize::<Self>(p, codes) }
        }
        $(#[$attribute])*
        unsafe fn refit(p: &generic::Quantize, codes: *const u8) -> f32 {
            // SAFETY: as the caller promises
            unsafe { generic::refit::<Self>(p, codes) }
        }
        $(#[$attribute])*
        unsafe fn normalize(n: usize, y: *mut f32, inverse_step: *const f32, half: *const f32) -> f32 {
            // SAFETY: as the caller promises
            unsafe { generic::normalize::<Self>(n, y, inverse_step, half) }
        }
        $(#[$attribute])*
        unsafe fn center(n: usize, x: *const f32, mean: *const f32, out: *mut f32) -> bool {
            // SAFETY: as the caller promises
            unsafe { generic::center(n, x, mean, out) }
        }
    };
}
pub(super) use kernels;

/// Runs `$body` for blocks of rows and of vectors that cover `$rows` by `$vectors`, with the block's size in the
/// constants `$m` and `$n`, so that its accumulators stay in registers.
macro_rules! blocks {
    ($rows:expr, $max_rows:expr, $vectors:expr, $max_vectors:expr, |$r:ident, $c:ident, $m:ident, $n:ident| $body:expr) => {{
        let mut $r = 0;
        while $r < $rows {
            match min($rows - $r, $max_rows) {
                6.. => columns!(6, $vectors, $max_vectors, |$r, $c, $m, $n| $body),
                4 | 5 => columns!(4, $vectors, $max_vectors, |$r, $c, $m, $n| $body),
                2 | 3 => columns!(2, $vectors, $max_vectors, |$r, $c, $m, $n| $body),
                _ => columns!(1, $vectors, $max_vectors, |$r, $c, $m, $n| $body),
            }
        }
    }};
}

/// All columns of one block of rows of [`blocks`].
macro_rules! columns {
    ($rows:literal, $vectors:expr, $max_vectors:expr, |$r:ident, $c:ident, $m:ident, $n:ident| $body:expr) => {{
        const $m: usize = $rows;
        let mut $c = 0;
        while $c < $vectors {
            match min($vectors - $c, $max_vectors) {
                4.. => {
                    const $n: usize = 4;
                    $body;
                    $c += $n;
                }
                2 | 3 => {
                    const $n: usize = 2;
                    $body;
                    $c += $n;
                }
                _ => {
                    const $n: usize = 1;
                    $body;
                    $c += $n;
                }
            }
        }
        $r += $m;
    }};
}

//
// Rows
//

/// `bits` ones in each byte.
#[inline(always)]
pub(super) fn code_mask(bits: u8) -> u64 {
    0x0101_0101_0101_0101 * (0xff >> (8 - bits))
}

/// Eight codes of `bits` bits, each into a byte of its own.
#[inline(always)]
pub(super) fn spread(codes: u64, bits: u8) -> u64 {
    let mask = code_mask(bits) & 0xff;
    (0..8).fold(0, |out, i| out | ((codes >> (i * u32::from(bits))) & mask) << (8 * i))
}

/// The inverse of [`spread`].
#[inline(always)]
pub(super) fn squeeze(codes: u64, bits: u8) -> u64 {
    let mask = code_mask(bits) & 0xff;
    (0..8).fold(0, |out, i| out | ((codes >> (8 * i)) & mask) << (i * u32::from(bits)))
}

/// The bytes of a segment in the low bytes of a word; what the others hold is not said.
#[inline(always)]
unsafe fn segment_word(row: *const u8, row_bytes: usize, segment: Segment) -> u64 {
    let offset = segment.offset as usize;
    // SAFETY: no byte outside the row is read
    unsafe {
        if offset + 8 <= row_bytes {
            return u64::from_le(row.add(offset).cast::<u64>().read_unaligned());
        }
        (0..segment.bits as usize).fold(0, |word, i| word | u64::from(*row.add(offset + i)) << (8 * i))
    }
}

/// Codes of one row: `codes[stride]`, zeros from the rank on. Returns the scale.
#[inline(always)]
pub(super) unsafe fn unpack_row(
    plan: &UnpackPlan,
    row: *const u8,
    codes: *mut u8,
    spread: impl Fn(u64, u8) -> u64,
) -> f32 {
    // SAFETY: row[row_bytes], codes[stride]
    unsafe {
        unpack_codes(plan, row, codes, spread);
        half::f16::from_bits(u16::from_le(row.add(plan.scale_offset).cast::<u16>().read_unaligned())).to_f32()
    }
}

#[inline(always)]
unsafe fn unpack_codes(plan: &UnpackPlan, row: *const u8, codes: *mut u8, spread: impl Fn(u64, u8) -> u64) {
    // SAFETY: row[row_bytes], codes[stride]
    unsafe {
        for (s, &segment) in plan.segments.iter().enumerate() {
            let word = spread(segment_word(row, plan.row_bytes, segment), segment.bits);
            codes.add(8 * s).cast::<u64>().write_unaligned(word.to_le());
        }
        std::ptr::write_bytes(codes.add(plan.rank), 0, plan.stride - plan.rank);
    }
}

/// Scales `[TILE]` of a tile's rows; zeros for cells whose bit in `visible` is 0, whose rows are not read.
#[inline(always)]
pub(super) unsafe fn unpack_scales<I: Isa>(
    plan: &UnpackPlan,
    rows: *const u8,
    row_bytes: usize,
    visible: u64,
    scales: *mut f32,
) {
    // SAFETY: rows of visible cells are readable; scales[TILE]
    unsafe {
        let mut half = [0u16; TILE];
        for (t, half) in half.iter_mut().enumerate() {
            if visible >> t & 1 == 1 {
                *half = u16::from_le(rows.add(t * row_bytes + plan.scale_offset).cast::<u16>().read_unaligned());
            }
        }
        for t in (0..TILE).step_by(I::LANES) {
            I::store(scales.add(t), I::load_f16(half.as_ptr().add(t)));
        }
    }
}

/// Codes `[TILE][stride]` and scales `[TILE]` of a tile's rows; zeros for cells whose bit in `visible` is 0, whose rows are not read.
#[inline(always)]
pub(super) unsafe fn unpack<I: Isa>(
    plan: &UnpackPlan,
    rows: *const u8,
    row_bytes: usize,
    visible: u64,
    codes: *mut u8,
    scales: *mut f32,
    spread: impl Fn(u64, u8) -> u64 + Copy,
) {
    // SAFETY: rows of visible cells are readable; codes[TILE][stride], scales[TILE]
    unsafe {
        for t in 0..TILE {
            let out = codes.add(t * plan.stride);
            if visible >> t & 1 == 0 {
                std::ptr::write_bytes(out, 0, plan.stride);
            } else {
                unpack_codes(plan, rows.add(t * row_bytes), out, spread);
            }
        }
        unpack_scales::<I>(plan, rows, row_bytes, visible, scales);
    }
}

/// Writes scale and codes `[rank]` into a row. Writes up to 8 bytes beyond a segment, but never beyond `row_bytes` + 8.
#[inline(always)]
pub(super) unsafe fn pack_row(
    plan: &UnpackPlan,
    codes: *const u8,
    scale: f32,
    row: *mut u8,
    squeeze: impl Fn(u64, u8) -> u64,
) {
    // SAFETY: row[row_bytes + 8], codes[rank]
    unsafe {
        row.add(plan.scale_offset).cast::<u16>().write_unaligned(half::f16::from_f32(scale).to_bits().to_le());
        for (s, segment) in plan.segments.iter().enumerate() {
            let word = squeeze(u64::from_le(codes.add(8 * s).cast::<u64>().read_unaligned()), segment.bits);
            // the bytes after the segment become 0, and the next segment or group overwrites them
            row.add(segment.offset as usize).cast::<u64>().write_unaligned(word.to_le());
        }
    }
}

/// Codes `[TILE][stride]` to `[rank/4][TILE][4]`.
#[inline(always)]
pub(super) unsafe fn transpose(codes: *const u8, stride: usize, rank: usize, out: *mut u8) {
    // SAFETY: as the shapes say
    unsafe {
        for t in 0..TILE {
            for k in 0..rank / 4 {
                let four = codes.add(t * stride + 4 * k).cast::<u32>().read_unaligned();
                out.add(4 * (k * TILE + t)).cast::<u32>().write_unaligned(four);
            }
        }
    }
}

//
// Integer products
//

/// `M` by `N` vectors of sums over channels, in steps of four. `KEYS`: lanes are cells, so that the unsigned codes are the
/// vectors and the decoder is what is repeated; otherwise lanes are dimensions and it is the other way round.
///
/// The decoder has one plane of bytes, or two, of which the first counts 256 times as much.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn product<I: Isa, const M: usize, const N: usize, const KEYS: bool, const WIDE: bool, const PLANES: usize>(
    k4: usize,
    vectors: *const u8,
    vectors_step: usize,
    vectors_plane: usize,
    scalars: *const u8,
    scalars_row: usize,
    scalars_plane: usize,
    init: [[I::I; N]; M],
) -> [[I::I; N]; M] {
    // SAFETY: k4 steps of N vectors, and 4*k4 bytes of M rows, are readable in each plane
    unsafe {
        let mut acc = if PLANES == 1 { init } else { [[I::isplat(0); N]; M] };
        for plane in 0..PLANES {
            if plane == 1 {
                for m in 0..M {
                    for n in 0..N {
                        acc[m][n] = I::iadd(I::shl8(acc[m][n]), init[m][n]);
                    }
                }
            }
            let mut v = vectors.add(plane * vectors_plane);
            let mut s = scalars.add(plane * scalars_plane);
            for _ in 0..k4 {
                let x: [I::I; N] = std::array::from_fn(|n| I::iload(v.add(4 * I::LANES * n).cast()));
                for m in 0..M {
                    let y = I::isplat(s.add(m * scalars_row).cast::<i32>().read_unaligned());
                    for n in 0..N {
                        acc[m][n] = if KEYS {
                            I::dot4::<WIDE>(acc[m][n], x[n], y)
                        } else {
                            I::dot4::<WIDE>(acc[m][n], y, x[n])
                        };
                    }
                }
                v = v.add(vectors_step);
                s = s.add(4);
            }
        }
        acc
    }
}

/// Keys of one head for a tile of cells, before RoPE: k\[d\]\[t\] = mean\[d\] + cell_scale\[t\] * scale\[d\] * (sum + init\[d\] + half\[d\]).
pub(crate) struct RebuildKeys {
    pub head_dim: usize,
    /// channels / 4
    pub k4: usize,
    pub planes: usize,
    /// some codes exceed 127
    pub wide: bool,
    /// `[k4][TILE][4]`
    pub codes: *const u8,
    /// `[planes][head_dim][4*k4]`
    pub dec: *const i8,
    /// `[head_dim]` each
    pub init: *const i32,
    pub half: *const f32,
    pub scale: *const f32,
    pub mean: *const f32,
    /// `[TILE]`
    pub cell_scale: *const f32,
    /// `[head_dim][TILE]`
    pub out: *mut f32,
}

#[inline(always)]
pub(super) unsafe fn rebuild_keys<I: Isa>(p: &RebuildKeys) {
    // SAFETY: as the shapes say
    unsafe {
        // only AVX2 has to know which codes are wide
        match (p.wide && I::LANES == 8, p.planes) {
            (false, 1) => rebuild_keys_of::<I, false, 1>(p),
            (false, _) => rebuild_keys_of::<I, false, 2>(p),
            (true, 1) => rebuild_keys_of::<I, true, 1>(p),
            (true, _) => rebuild_keys_of::<I, true, 2>(p),
        }
    }
}

#[inline(always)]
unsafe fn rebuild_keys_of<I: Isa, const WIDE: bool, const PLANES: usize>(p: &RebuildKeys) {
    let rank = 4 * p.k4;
    // SAFETY: as the shapes say
    unsafe {
        blocks!(p.head_dim, I::PRODUCT_ROWS, TILE / I::LANES, I::COLS, |d, c, M, N| {
            let t = c * I::LANES;
            let acc = product::<I, M, N, true, WIDE, PLANES>(
                p.k4,
                p.codes.add(4 * t),
                4 * TILE,
                0,
                p.dec.cast::<u8>().add(d * rank),
                rank,
                p.head_dim * rank,
                std::array::from_fn(|m| [I::isplat(*p.init.add(d + m)); N]),
            );
            for m in 0..M {
                let scale = I::splat(*p.scale.add(d + m));
                let offset = I::splat(*p.half.add(d + m) * *p.scale.add(d + m));
                let mean = I::splat(*p.mean.add(d + m));
                for n in 0..N {
                    let x = I::fma(I::to_f(acc[m][n]), scale, offset);
                    let x = I::fma(x, I::load(p.cell_scale.add(t + n * I::LANES)), mean);
                    I::store(p.out.add((d + m) * TILE + t + n * I::LANES), x);
                }
            }
        });
    }
}

/// Scores of one query against keys of one head, which are not written anywhere: s\[t\] = q . rotate(k\[t\]), one plane.
///
/// With x = qa ka + qb kb and y = qb ka - qa kb, a rotated pair adds cos x + sin y, where ka and kb are linear in the
/// integer sums. So the query, the decoder's scales and its means go into a few numbers per pair, once per call.
///
/// Slow pairs and dimensions that are not rotated may come as [`Nodes`] instead.
pub(crate) struct ScoreKeys {
    /// pairs to be taken one by one, the first of `pair_stride` pairs
    pub n_pair: usize,
    pub pair_stride: usize,
    /// dimensions that are not rotated, after 2 * `pair_stride`
    pub n_plain: usize,
    /// null: there are none
    pub nodes: *const Nodes,
    pub k4: usize,
    pub wide: bool,
    /// `[k4][TILE][4]`
    pub codes: *const u8,
    /// `[2*pair_stride + n_plain][4*k4]`
    pub dec: *const i8,
    /// `[2*pair_stride + n_plain]`
    pub init: *const i32,
    /// `[n_pair]`
    pub pairs: *const PairQuery,
    /// `[n_plain]`
    pub plain: *const PlainQuery,
    /// `[n_pair][TRIG_STRIDE]`
    pub cos: *const f32,
    pub sin: *const f32,
    /// `[TILE]`
    pub cell_scale: *const f32,
    /// `[TILE]`
    pub out: *mut f32,
}

/// A query's part in one rotated pair: x = `xa` Ia + `xb` Ib + `x0`, y likewise, and the mean's x and y.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct PairQuery {
    pub xa: f32,
    pub xb: f32,
    pub x0: f32,
    pub ya: f32,
    pub yb: f32,
    pub y0: f32,
    pub mean_x: f32,
    pub mean_y: f32,
}

/// A query's part in one dimension that is not rotated: `x` I + `x0`, and the mean's part.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct PlainQuery {
    pub x: f32,
    pub x0: f32,
    pub mean: f32,
}

#[inline(always)]
pub(super) unsafe fn score_keys<I: Isa>(p: &ScoreKeys) {
    // SAFETY: as the shapes say
    unsafe {
        if p.wide && I::LANES == 8 {
            score_keys_of::<I, true>(p)
        } else {
            score_keys_of::<I, false>(p)
        }
    }
}

#[inline(always)]
unsafe fn score_keys_of<I: Isa, const WIDE: bool>(p: &ScoreKeys) {
    // SAFETY: as the shapes say
    unsafe {
        for t in (0..TILE).step_by(I::COLS * I::LANES) {
            match I::COLS {
                4 => score_columns::<I, WIDE, 4>(p, t),
                _ => score_columns::<I, WIDE, 2>(p, t),
            }
        }
    }
}

#[inline(always)]
unsafe fn score_columns<I: Isa, const WIDE: bool, const N: usize>(p: &ScoreKeys, t: usize) {
    // SAFETY: as the shapes say
    unsafe {
        // parts that the cell's scale multiplies, and parts of the mean
        let mut sums = [[I::splat(0.0); N]; 2];
        let mut i = 0;
        while i < p.n_pair {
            match min(p.n_pair - i, I::PRODUCT_ROWS / 2) {
                3.. => {
                    score_pairs::<I, WIDE, N, 3, 6>(p, t, i, &mut sums);
                    i += 3;
                }
                2 => {
                    score_pairs::<I, WIDE, N, 2, 4>(p, t, i, &mut sums);
                    i += 2;
                }
                _ => {
                    score_pairs::<I, WIDE, N, 1, 2>(p, t, i, &mut sums);
                    i += 1;
                }
            }
        }
        let rank = 4 * p.k4;
        for i in 0..p.n_plain {
            let d = 2 * p.pair_stride + i;
            let [acc] = product::<I, 1, N, true, WIDE, 1>(
                p.k4,
                p.codes.add(4 * t),
                4 * TILE,
                0,
                p.dec.cast::<u8>().add(d * rank),
                0,
                0,
                [[I::isplat(*p.init.add(d)); N]],
            );
            let q = *p.plain.add(i);
            for n in 0..N {
                sums[0][n] = I::add(sums[0][n], I::fma(I::to_f(acc[n]), I::splat(q.x), I::splat(q.x0)));
                sums[1][n] = I::add(sums[1][n], I::splat(q.mean));
            }
        }
        if let Some(nodes) = p.nodes.as_ref() {
            score_nodes::<I, WIDE, N, 4, 2>(p, nodes, t, 0, &mut sums);
            score_nodes::<I, WIDE, N, 2, 1>(p, nodes, t, 4, &mut sums);
        }
        for n in 0..N {
            let at = t + n * I::LANES;
            I::store(p.out.add(at), I::fma(sums[0][n], I::load(p.cell_scale.add(at)), sums[1][n]));
        }
    }
}

/// `P` pairs from pair `i` on, `M` = 2 `P` rows.
#[inline(always)]
unsafe fn score_pairs<I: Isa, const WIDE: bool, const N: usize, const P: usize, const M: usize>(
    p: &ScoreKeys,
    t: usize,
    i: usize,
    sums: &mut [[I::F; N]; 2],
) {
    let rank = 4 * p.k4;
    // SAFETY: as the shapes say
    unsafe {
        let first = p.dec.cast::<u8>().add(i * rank);
        // first halves of the pairs, then second halves
        let row = |m: usize| (m % P) + (m / P) * p.pair_stride;
        let mut acc: [[I::I; N]; M] = std::array::from_fn(|m| [I::isplat(*p.init.add(i + row(m))); N]);
        let mut v = p.codes.add(4 * t);
        for k in 0..p.k4 {
            let x: [I::I; N] = std::array::from_fn(|n| I::iload(v.add(4 * I::LANES * n).cast()));
            for m in 0..M {
                let y = I::isplat(first.add(row(m) * rank + 4 * k).cast::<i32>().read_unaligned());
                for n in 0..N {
                    acc[m][n] = I::dot4::<WIDE>(acc[m][n], x[n], y);
                }
            }
            v = v.add(4 * TILE);
        }
        for j in 0..P {
            let q = *p.pairs.add(i + j);
            let at = (i + j) * TRIG_STRIDE + t;
            for n in 0..N {
                let (a, b) = (I::to_f(acc[j][n]), I::to_f(acc[P + j][n]));
                let x = I::fma(a, I::splat(q.xa), I::fma(b, I::splat(q.xb), I::splat(q.x0)));
                let y = I::fma(a, I::splat(q.ya), I::fma(b, I::splat(q.yb), I::splat(q.y0)));
                let (c, s) = (I::load(p.cos.add(at + n * I::LANES)), I::load(p.sin.add(at + n * I::LANES)));
                sums[0][n] = I::fma(c, x, I::fma(s, y, sums[0][n]));
                sums[1][n] = I::fma(c, I::splat(q.mean_x), I::fma(s, I::splat(q.mean_y), sums[1][n]));
            }
        }
    }
}

/// Polynomials that stand for the slow pairs.
pub(crate) const N_NODE: usize = 6;
/// Of these, the first ones whose weights have two planes.
const N_NODE_FINE: usize = 4;
/// Rows of a head's [`Nodes::weight`].
pub(crate) const NODE_ROWS: usize = N_NODE + N_NODE_FINE;

/// What the slow pairs of a head, and its dimensions that are not rotated, add to the scores of one query in a window of
/// positions: sum over j of basis\[j\]\[t\] * (cell_scale\[t\] * scale\[j\] * (sum over c of weight\[j\]\[c\] * (code\[c\] - half level)) + mean\[j\]).
pub(crate) struct Nodes {
    /// `[NODE_ROWS][stride]`: upper bytes of the fine nodes, their lower bytes, the others
    pub weight: *mut i8,
    pub stride: usize,
    /// `[N_NODE]` each
    pub scale: *mut f32,
    pub init: *mut i32,
    /// scale/2 where the sum of half levels is not integral, else 0
    pub offset: *mut f32,
    pub mean: *mut f32,
    /// `[N_NODE][TILE]`: Chebyshev polynomials of the cells' positions within the window
    pub basis: *const f32,
}

/// `M` nodes from node `j` on, of `PLANES` planes.
#[inline(always)]
unsafe fn score_nodes<I: Isa, const WIDE: bool, const N: usize, const M: usize, const PLANES: usize>(
    p: &ScoreKeys,
    nodes: &Nodes,
    t: usize,
    j: usize,
    sums: &mut [[I::F; N]; 2],
) {
    // SAFETY: as the shapes say
    unsafe {
        let row = if j == 0 { 0 } else { N_NODE_FINE + j };
        let acc = product::<I, M, N, true, WIDE, PLANES>(
            p.k4,
            p.codes.add(4 * t),
            4 * TILE,
            0,
            nodes.weight.cast::<u8>().add(row * nodes.stride),
            nodes.stride,
            N_NODE_FINE * nodes.stride,
            std::array::from_fn(|m| [I::isplat(*nodes.init.add(j + m)); N]),
        );
        for m in 0..M {
            let j = j + m;
            let (scale, offset) = (I::splat(*nodes.scale.add(j)), I::splat(*nodes.offset.add(j)));
            let mean = I::splat(*nodes.mean.add(j));
            for n in 0..N {
                let basis = I::load(nodes.basis.add(j * TILE + t + n * I::LANES));
                sums[0][n] = I::fma(basis, I::fma(I::to_f(acc[m][n]), scale, offset), sums[0][n]);
                sums[1][n] = I::fma(basis, mean, sums[1][n]);
            }
        }
    }
}

/// Computes a head's [`Nodes`] for one query and one window.
///
/// In a window around position p0, cos and sin of (p - p0) * frequency are sums of Chebyshev polynomials whose
/// coefficients, Bessel functions, fall off fast where the window is short beside the pair's wave length. So the slow
/// pairs of all cells are scored with the query rotated back to p0, once per polynomial.
pub(crate) struct PrepareNodes<'a> {
    pub n_pair: usize,
    pub n_plain: usize,
    /// both padded to [`PAD`]; their dimensions are n_dim = 2*pair_room + plain_room
    pub pair_room: usize,
    pub plain_room: usize,
    /// the query's first and second halves of the slow pairs, and its dimensions that are not rotated
    pub qa: *const f32,
    pub qb: *const f32,
    pub q_plain: *const f32,
    /// `[n_pair]`: rotation by p0, times the magnitude
    pub cos: *const f32,
    pub sin: *const f32,
    /// `[N_NODE][pair_room]`: coefficients of the polynomials, even ones of cos and odd ones of sin
    pub bessel: *const f32,
    /// `[n_dim]`, zeros in the padding
    pub scale: *const f32,
    pub mean: *const f32,
    /// `[n_dim/4][stride][4]`: the decoder + 128
    pub dec: *const u8,
    /// `[stride]`: 2^bits - 1, zeros beyond the rank
    pub levels: *const u8,
    /// largest weight with which sums stay in range
    pub limit: f32,
    /// `[N_NODE][n_dim]`
    pub coefficient: *mut f32,
    /// `[2][N_NODE][n_dim]`
    pub coefficient_bytes: *mut i8,
    /// `[N_NODE][stride]`
    pub weight: *mut f32,
    pub out: &'a Nodes,
}

#[inline(always)]
pub(super) unsafe fn prepare_nodes<I: Isa>(p: &PrepareNodes) {
    let n_dim = 2 * p.pair_room + p.plain_room;
    let stride = p.out.stride;
    // SAFETY: as the shapes say
    unsafe {
        let zero = I::splat(0.0);
        let size = |x: I::F| I::max(x, I::sub(zero, x));

        // coefficients of the slow dimensions in each polynomial, to two planes of bytes
        for i in 0..p.n_pair {
            let (qa, qb, c, s) = (*p.qa.add(i), *p.qb.add(i), *p.cos.add(i), *p.sin.add(i));
            let (ua, ub) = (c * qa + s * qb, c * qb - s * qa);
            for j in (0..N_NODE).step_by(2) {
                let (even, odd) = (*p.bessel.add(j * p.pair_room + i), *p.bessel.add((j + 1) * p.pair_room + i));
                let g = p.coefficient.add(j * n_dim + i);
                (*g, *g.add(p.pair_room)) = (even * ua, even * ub);
                (*g.add(n_dim), *g.add(n_dim + p.pair_room)) = (odd * ub, -(odd * ua));
            }
        }
        let mut top = [0.0f32; N_NODE];
        for j in 0..N_NODE {
            let g = p.coefficient.add(j * n_dim);
            for half in 0..2 {
                std::ptr::write_bytes(g.add(half * p.pair_room + p.n_pair), 0, p.pair_room - p.n_pair);
            }
            std::ptr::write_bytes(g.add(2 * p.pair_room), 0, p.plain_room);
            if j == 0 {
                g.add(2 * p.pair_room).copy_from_nonoverlapping(p.q_plain, p.n_plain);
            }
            let (mut mean, mut largest) = (zero, zero);
            for d in (0..n_dim).step_by(I::LANES) {
                let x = I::load(g.add(d));
                mean = I::fma(x, I::load(p.mean.add(d)), mean);
                let x = I::mul(x, I::load(p.scale.add(d)));
                largest = I::max(size(x), largest);
                I::store(g.add(d), x);
            }
            *p.out.mean.add(j) = I::sum(mean);
            top[j] = I::largest(largest);
        }
        let units = top.map(|top| unit(top, 32512.0));
        let mut inits = [0i32; N_NODE];
        for j in 0..N_NODE {
            let inverse = I::splat(units[j].1);
            let mut sum = I::isplat(0);
            for d in (0..n_dim).step_by(I::LANES) {
                let x = I::to_i(I::mul(I::load(p.coefficient.add(j * n_dim + d)), inverse));
                sum = I::iadd(sum, x);
                let bytes = p.coefficient_bytes.add(j * n_dim + d).cast::<u8>();
                I::store_bytes(bytes, I::shr8(I::iadd(x, I::isplat(128))));
                I::store_bytes(bytes.add(N_NODE * n_dim), x);
            }
            // the decoder's bytes are 128 too large
            inits[j] = I::isum(sum).wrapping_mul(-128);
        }

        // what the polynomials multiply the codes by, in the coefficients' units
        let mut largest = [zero; N_NODE];
        blocks!(N_NODE, I::PRODUCT_ROWS, stride / I::LANES, I::COLS, |j, c, M, N| {
            let acc = product::<I, M, N, true, true, 2>(
                n_dim / 4,
                p.dec.add(4 * c * I::LANES),
                4 * stride,
                0,
                p.coefficient_bytes.cast::<u8>().add(j * n_dim),
                n_dim,
                N_NODE * n_dim,
                std::array::from_fn(|m| [I::isplat(inits[j + m]); N]),
            );
            for m in 0..M {
                for n in 0..N {
                    let x = I::to_f(acc[m][n]);
                    largest[j + m] = I::max(size(x), largest[j + m]);
                    I::store(p.weight.add((j + m) * stride + (c + n) * I::LANES), x);
                }
            }
        });
        let top = largest.map(|x| I::largest(x));
        for j in 0..N_NODE {
            let weight = p.weight.add(j * stride);
            let fine = j < N_NODE_FINE;
            let (unit, inverse) = unit(top[j], if fine { p.limit } else { 127.0 });
            let inverse = I::splat(inverse);
            let upper = p.out.weight.cast::<u8>().add(if fine { j } else { N_NODE_FINE + j } * stride);
            let lower = p.out.weight.cast::<u8>().add((N_NODE_FINE + j) * stride);
            for c in (0..stride).step_by(I::LANES) {
                let x = I::to_i(I::mul(I::load(weight.add(c)), inverse));
                if fine {
                    I::store_bytes(upper.add(c), I::shr8(I::iadd(x, I::isplat(128))));
                }
                I::store_bytes(lower.add(c), x);
            }
            // twice what the half levels take away
            let mut sum = I::isplat(0);
            if fine {
                for c in (0..stride).step_by(4 * I::LANES) {
                    sum = I::dot4::<true>(sum, I::iload(p.levels.add(c).cast()), I::iload(upper.add(c).cast()));
                }
                sum = I::shl8(sum);
            }
            for c in (0..stride).step_by(4 * I::LANES) {
                sum = I::dot4::<true>(sum, I::iload(p.levels.add(c).cast()), I::iload(lower.add(c).cast()));
            }
            let twice = -I::isum(sum);
            let scale = unit * units[j].0;
            *p.out.scale.add(j) = scale;
            *p.out.init.add(j) = twice >> 1;
            *p.out.offset.add(j) = (twice & 1) as f32 * 0.5 * scale;
        }
    }
}

/// Chebyshev polynomials `[N_NODE][TILE]` of (pos - middle)/half; cells from `n` on get those of 0.
#[inline(always)]
pub(super) unsafe fn fill_basis(pos: *const i32, n: usize, middle: i32, half: f32, out: *mut f32) {
    // SAFETY: pos[n], out[N_NODE][TILE]
    unsafe {
        let mut x = [0.0f32; TILE];
        for t in 0..n {
            x[t] = (*pos.add(t)).wrapping_sub(middle) as f32 / half;
        }
        let (mut before, mut now) = ([1.0f32; TILE], x);
        for j in 0..N_NODE {
            out.add(j * TILE).cast::<[f32; TILE]>().write_unaligned(before);
            for t in 0..TILE {
                (before[t], now[t]) = (now[t], 2.0 * x[t] * now[t] - before[t]);
            }
        }
    }
}

/// Step and inverse step that make `top` the integer `limit`; zeros for a `top` of 0, or one so small that the inverse is infinite.
#[inline(always)]
fn unit(top: f32, limit: f32) -> (f32, f32) {
    if top > 1e-30 {
        (top / limit, limit / top)
    } else {
        (top * 0.0, 0.0)
    }
}

/// Values of one head without scales and mean: out\[t\]\[d\] = sum + init\[d\].
pub(crate) struct RebuildValues {
    pub n_token: usize,
    /// dimensions, a multiple of [`PAD`]
    pub dim: usize,
    pub k4: usize,
    pub planes: usize,
    pub wide: bool,
    /// `[n_token][stride]`
    pub codes: *const u8,
    pub stride: usize,
    /// `[planes][k4][dim][4]`
    pub dec: *const i8,
    /// `[dim]`
    pub init: *const i32,
    /// `[n_token][out_stride]`
    pub out: *mut f32,
    pub out_stride: usize,
}

#[inline(always)]
pub(super) unsafe fn rebuild_values<I: Isa>(p: &RebuildValues) {
    // SAFETY: as the shapes say
    unsafe {
        // only AVX2 has to know which codes are wide
        match (p.wide && I::LANES == 8, p.planes) {
            (false, 1) => rebuild_values_of::<I, false, 1>(p),
            (false, _) => rebuild_values_of::<I, false, 2>(p),
            (true, 1) => rebuild_values_of::<I, true, 1>(p),
            (true, _) => rebuild_values_of::<I, true, 2>(p),
        }
    }
}

#[inline(always)]
unsafe fn rebuild_values_of<I: Isa, const WIDE: bool, const PLANES: usize>(p: &RebuildValues) {
    // SAFETY: as the shapes say
    unsafe {
        blocks!(p.n_token, I::PRODUCT_ROWS, p.dim / I::LANES, I::COLS, |t, c, M, N| {
            let d = c * I::LANES;
            let init: [I::I; N] = std::array::from_fn(|n| I::iload(p.init.add(d + n * I::LANES)));
            let acc = product::<I, M, N, false, WIDE, PLANES>(
                p.k4,
                p.dec.cast::<u8>().add(4 * d),
                4 * p.dim,
                4 * p.dim * p.k4,
                p.codes.add(t * p.stride),
                p.stride,
                0,
                [init; M],
            );
            for m in 0..M {
                for n in 0..N {
                    I::store(p.out.add((t + m) * p.out_stride + d + n * I::LANES), I::to_f(acc[m][n]));
                }
            }
        });
    }
}

//
// Float products
//

/// What the right factor of a product is stored as.
pub(crate) trait Element: Copy {
    unsafe fn load<I: Isa>(p: *const Self) -> I::F;
}
impl Element for f32 {
    #[inline(always)]
    unsafe fn load<I: Isa>(p: *const f32) -> I::F {
        // SAFETY: readable for a vector
        unsafe { I::load(p) }
    }
}
impl Element for u8 {
    #[inline(always)]
    unsafe fn load<I: Isa>(p: *const u8) -> I::F {
        // SAFETY: readable for a vector
        unsafe { I::load_u8(p) }
    }
}
/// f16
impl Element for u16 {
    #[inline(always)]
    unsafe fn load<I: Isa>(p: *const u16) -> I::F {
        // SAFETY: readable for a vector
        unsafe { I::load_f16(p) }
    }
}

/// c\[m\]\[n\] = alpha\[m\] c + sum over k of a\[m\]\[k\] b\[k\]\[n\]; without alpha, c is only written.
///
/// Sums run over k in order whatever the shape, so that a row's result does not depend on the rows beside it.
pub(crate) struct Gemm<B> {
    pub m: usize,
    /// a multiple of [`PAD`]
    pub n: usize,
    pub k: usize,
    pub a: *const f32,
    pub lda: usize,
    pub b: *const B,
    pub ldb: usize,
    pub c: *mut f32,
    pub ldc: usize,
    /// `[m]` or null
    pub alpha: *const f32,
}

#[inline(always)]
pub(super) unsafe fn gemm<I: Isa, B: Element>(p: &Gemm<B>) {
    debug_assert!(p.n.is_multiple_of(PAD));
    // SAFETY: as the shapes say
    unsafe {
        blocks!(p.m, I::GEMM_ROWS, p.n / I::LANES, I::COLS, |r, c, M, N| {
            let j = c * I::LANES;
            let mut acc = [[I::splat(0.0); N]; M];
            if !p.alpha.is_null() {
                for m in 0..M {
                    let alpha = I::splat(*p.alpha.add(r + m));
                    for n in 0..N {
                        acc[m][n] = I::mul(alpha, I::load(p.c.add((r + m) * p.ldc + j + n * I::LANES)));
                    }
                }
            }
            let mut a = p.a.add(r * p.lda);
            let mut b = p.b.add(j);
            for _ in 0..p.k {
                let x: [I::F; N] = std::array::from_fn(|n| B::load::<I>(b.add(n * I::LANES)));
                for m in 0..M {
                    let y = I::splat(*a.add(m * p.lda));
                    for n in 0..N {
                        acc[m][n] = I::fma(y, x[n], acc[m][n]);
                    }
                }
                a = a.add(1);
                b = b.add(p.ldb);
            }
            for m in 0..M {
                for n in 0..N {
                    I::store(p.c.add((r + m) * p.ldc + j + n * I::LANES), acc[m][n]);
                }
            }
        });
    }
}

/// out\[n\] += weight * x, n a multiple of [`PAD`].
#[inline(always)]
pub(super) unsafe fn merge<I: Isa>(out: *mut f32, x: *const f32, weight: f32, n: usize) {
    // SAFETY: as the shapes say
    unsafe {
        let w = I::splat(weight);
        for i in (0..n).step_by(I::LANES) {
            I::store(out.add(i), I::fma(w, I::load(x.add(i)), I::load(out.add(i))));
        }
    }
}

//
// RoPE
//

/// Rotates keys `[2*n_pair..][TILE]`, whose pairs are (i, i + n_pair), by cos and sin `[n_pair][TRIG_STRIDE]`.
#[inline(always)]
pub(super) unsafe fn rotate<I: Isa>(k: *mut f32, n_pair: usize, cos: *const f32, sin: *const f32) {
    // SAFETY: as the shapes say
    unsafe {
        for i in 0..n_pair {
            let (a, b) = (k.add(i * TILE), k.add((i + n_pair) * TILE));
            for t in (0..TILE).step_by(I::LANES) {
                let (c, s) = (I::load(cos.add(i * TRIG_STRIDE + t)), I::load(sin.add(i * TRIG_STRIDE + t)));
                let (x, y) = (I::load(a.add(t)), I::load(b.add(t)));
                I::store(a.add(t), I::fnma(y, s, I::mul(x, c)));
                I::store(b.add(t), I::fma(y, c, I::mul(x, s)));
            }
        }
    }
}

/// Angles of a run of cells at consecutive positions: (cos, sin)\[i\]\[t\] = base\[i\] * low\[i\]\[t\] as complex numbers.
pub(crate) struct FillTrig {
    pub n_pair: usize,
    /// cells
    pub n: usize,
    /// `[n_pair]`, of the run's first position
    pub base_cos: *const f32,
    pub base_sin: *const f32,
    /// `[n_pair][TRIG_STRIDE]`, of 0, 1, 2, ...
    pub low_cos: *const f32,
    pub low_sin: *const f32,
    /// `[n_pair][TRIG_STRIDE]` from the run's first cell on; up to a vector beyond the run is overwritten
    pub cos: *mut f32,
    pub sin: *mut f32,
}

#[inline(always)]
pub(super) unsafe fn fill_trig<I: Isa>(p: &FillTrig) {
    // SAFETY: as the shapes say; rows have room for a vector beyond their last cell
    unsafe {
        for i in 0..p.n_pair {
            let (c, s) = (I::splat(*p.base_cos.add(i)), I::splat(*p.base_sin.add(i)));
            for t in (0..p.n).step_by(I::LANES) {
                let at = i * TRIG_STRIDE + t;
                let (lc, ls) = (I::load(p.low_cos.add(at)), I::load(p.low_sin.add(at)));
                I::store(p.cos.add(at), I::fnma(s, ls, I::mul(c, lc)));
                I::store(p.sin.add(at), I::fma(s, lc, I::mul(c, ls)));
            }
        }
    }
}

//
// Softmax
//

/// 2^x = sum of c x^i on 0..1, to 7.5e-8 of it (minimax).
pub(super) const EXP2: [f32; 6] =
    [0.999_999_9, 0.693_153_07, 0.240_153_62, 0.055_826_318, 0.008_989_34, 0.001_877_576_8];

/// Some rows of scores of one tile, one step of their online softmax. Scores are in units of ln 2, so that
/// probabilities are powers of two.
pub(crate) struct Softmax {
    /// rows
    pub n: usize,
    /// `[n][TILE]`: scores; become the weights of the cells' codes: probability (up to the factor that the sum undoes) * value scale
    pub s: *mut f32,
    /// `[n]`: masks `[TILE]`, or null where all cells are visible and nothing is added
    pub mask: *const *const f32,
    /// `[n]`
    pub slope: *const f32,
    /// 0: none
    pub softcap: f32,
    /// `[TILE]`
    pub value_scale: *const f32,
    /// `[n]`: largest score so far
    pub max: *mut f32,
    /// `[n][PAD]` each, lane by lane: sums of probabilities and of weights so far
    pub sum: *mut f32,
    pub sum_weight: *mut f32,
    /// `[n]`: become the factors that earlier sums have to be multiplied by
    pub alpha: *mut f32,
}

#[inline(always)]
pub(super) unsafe fn softmax<I: Isa>(p: &Softmax) {
    // SAFETY: as the shapes say
    unsafe {
        for row in (0..p.n).step_by(STRIP) {
            let n = min(STRIP, p.n - row);
            // all rows' largest scores before any row's powers: the reductions are long chains that overlap
            let mut top = [0.0; STRIP];
            for j in 0..n {
                top[j] = adjust::<I>(p, row + j);
            }
            for j in 0..n {
                exponentiate::<I>(p, row + j, top[j]);
            }
        }
    }
}

/// Rows of scores that are worked on at a time.
pub(crate) const STRIP: usize = 6;

/// Applies soft cap and mask to a row, and returns its largest score.
#[inline(always)]
unsafe fn adjust<I: Isa>(p: &Softmax, row: usize) -> f32 {
    // SAFETY: as the shapes say
    unsafe {
        let s = p.s.add(row * TILE);
        let mask = *p.mask.add(row);
        let hidden = I::splat(f32::NEG_INFINITY);
        let mut top = hidden;
        if p.softcap == 0.0 && mask.is_null() {
            for t in (0..TILE).step_by(I::LANES) {
                top = I::max(I::load(s.add(t)), top);
            }
            return I::largest(top);
        }
        let slope = I::splat(*p.slope.add(row) * std::f32::consts::LOG2_E);
        for t in (0..TILE).step_by(I::LANES) {
            let mut x = I::load(s.add(t));
            if p.softcap != 0.0 {
                // tanh(x) = 1 - 2/(exp(2x) + 1)
                let e = I::exp2(I::mul(x, I::splat(2.0 / p.softcap)));
                let tanh = I::sub(I::splat(1.0), I::div(I::splat(2.0), I::add(e, I::splat(1.0))));
                x = I::mul(tanh, I::splat(p.softcap * std::f32::consts::LOG2_E));
            }
            if !mask.is_null() {
                let mask = I::load(mask.add(t));
                // a hidden cell's score may be anything, also not a number
                x = I::select_eq(mask, hidden, hidden, I::fma(slope, mask, x));
            }
            I::store(s.add(t), x);
            top = I::max(x, top);
        }
        I::largest(top)
    }
}

/// Turns a row's scores into weights and adds to its sums.
#[inline(always)]
unsafe fn exponentiate<I: Isa>(p: &Softmax, row: usize, top: f32) {
    // SAFETY: as the shapes say
    unsafe {
        let s = p.s.add(row * TILE);
        let (sums, sums_weight) = (p.sum.add(row * PAD), p.sum_weight.add(row * PAD));
        let before = *p.max.add(row);
        let max = before.max(top);
        // where nothing is visible yet, any finite number makes the probabilities 0
        let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let alpha = if before == max { 1.0 } else { (before - base).exp2() };
        let (mut sum, mut sum_weight) = (I::load(sums), I::load(sums_weight));
        if alpha != 1.0 {
            let a = I::splat(alpha);
            (sum, sum_weight) = (I::mul(a, sum), I::mul(a, sum_weight));
        }
        let b = I::splat(base);
        for t in (0..TILE).step_by(I::LANES) {
            let e = I::exp2(I::sub(I::load(s.add(t)), b));
            // a hidden cell's scale may be not a number
            let w = I::mul_nonzero(e, I::load(p.value_scale.add(t)));
            sum = I::add(sum, e);
            sum_weight = I::add(sum_weight, w);
            I::store(s.add(t), w);
        }
        I::store(sums, sum);
        I::store(sums_weight, sum_weight);
        *p.max.add(row) = max;
        *p.alpha.add(row) = alpha;
    }
}

/// A mask's `n <= TILE` cells as f32 `[TILE]`; cells beyond are hidden.
#[inline(always)]
pub(super) unsafe fn load_mask<I: Isa>(mask: *const u8, f16: bool, n: usize, out: *mut f32) {
    // SAFETY: as the shapes say; f16 and f32 masks are aligned for their type
    unsafe {
        let mut t = 0;
        while t + I::LANES <= n {
            let x = if f16 { I::load_f16(mask.cast::<u16>().add(t)) } else { I::load(mask.cast::<f32>().add(t)) };
            I::store(out.add(t), x);
            t += I::LANES;
        }
        while t < TILE {
            *out.add(t) = if t >= n {
                f32::NEG_INFINITY
            } else if f16 {
                half::f16::from_bits(*mask.cast::<u16>().add(t)).to_f32()
            } else {
                *mask.cast::<f32>().add(t)
            };
            t += 1;
        }
    }
}

/// Bits of a mask's `n <= TILE` cells: which are visible, and whose mask is not 0.
#[inline(always)]
pub(super) unsafe fn scan_mask<I: Isa>(mask: *const u8, f16: bool, n: usize) -> (u64, u64) {
    // SAFETY: as the shapes say
    unsafe {
        let mut buffer = [0.0f32; TILE];
        let whole = n == TILE;
        if !whole {
            load_mask::<I>(mask, f16, n, buffer.as_mut_ptr());
        }
        let (hidden, zero) = (I::splat(f32::NEG_INFINITY), I::splat(0.0));
        let (mut visible, mut other) = (0, 0);
        for t in (0..TILE).step_by(I::LANES) {
            let x = if !whole {
                I::load(buffer.as_ptr().add(t))
            } else if f16 {
                I::load_f16(mask.cast::<u16>().add(t))
            } else {
                I::load(mask.cast::<f32>().add(t))
            };
            visible |= u64::from(I::gt_bits(x, hidden)) << t;
            other |= u64::from(I::gt_bits(zero, x) | I::gt_bits(x, zero)) << t;
        }
        (visible, other)
    }
}

//
// Values of a latent
//

/// out\[d\] = sum over c of dec\[c\]\[d\] latent\[c\].
pub(crate) struct ProjectValue {
    /// a multiple of [`PAD`]
    pub dim: usize,
    pub k4: usize,
    pub planes: usize,
    /// `[planes][k4][dim][4]`
    pub dec: *const i8,
    /// `[4*k4]`
    pub latent: *const f32,
    /// `[dim]`
    pub out: *mut f32,
}

#[inline(always)]
pub(super) unsafe fn project_value<I: Isa>(p: &ProjectValue) {
    // SAFETY: as the shapes say
    unsafe {
        for d in (0..p.dim).step_by(I::LANES) {
            let mut total = I::splat(0.0);
            for plane in 0..p.planes {
                let mut dec = p.dec.add(4 * (plane * p.k4 * p.dim + d));
                let mut sums = [I::mul(total, I::splat(256.0)), I::splat(0.0), I::splat(0.0), I::splat(0.0)];
                for k in 0..p.k4 {
                    let x = I::iload(dec.cast());
                    let latent = p.latent.add(4 * k);
                    sums[0] = I::fma(I::byte::<0>(x), I::splat(*latent), sums[0]);
                    sums[1] = I::fma(I::byte::<1>(x), I::splat(*latent.add(1)), sums[1]);
                    sums[2] = I::fma(I::byte::<2>(x), I::splat(*latent.add(2)), sums[2]);
                    sums[3] = I::fma(I::byte::<3>(x), I::splat(*latent.add(3)), sums[3]);
                    dec = dec.add(4 * p.dim);
                }
                total = I::add(I::add(sums[0], sums[1]), I::add(sums[2], sums[3]));
            }
            I::store(p.out.add(d), total);
        }
    }
}

/// out\[d\] = ((x\[d\] + weight*half\[d\]) * scale\[d\] + sum*mean\[d\]) * factor.
pub(crate) struct FinishValue {
    pub dim: usize,
    pub x: *const f32,
    pub half: *const f32,
    pub scale: *const f32,
    pub mean: *const f32,
    pub weight: f32,
    pub sum: f32,
    pub factor: f32,
    pub out: *mut f32,
}

#[inline(always)]
pub(super) unsafe fn finish_value(p: &FinishValue) {
    // SAFETY: as the shapes say
    unsafe {
        for d in 0..p.dim {
            let x = (*p.x.add(d) + p.weight * *p.half.add(d)) * *p.scale.add(d);
            *p.out.add(d) = (x + p.sum * *p.mean.add(d)) * p.factor;
        }
    }
}

//
// Quantizer
//

/// One row's latent against one scale.
pub(crate) struct Quantize {
    /// channels, a multiple of [`PAD`]; those beyond the rank have half, weight and y of 0
    pub n: usize,
    /// latent / step
    pub y: *const f32,
    /// (2^bits - 1)/2
    pub half: *const f32,
    /// step^2
    pub weight: *const f32,
    pub scale: f32,
}

/// Returns the squared error; writes the codes `[n]` unless `codes` is null.
#[inline(always)]
pub(super) unsafe fn quantize<I: Isa>(p: &Quantize, codes: *mut u8) -> f32 {
    // SAFETY: as the shapes say
    unsafe {
        let inverse = I::splat(1.0 / p.scale);
        let scale = I::splat(p.scale);
        let zero = I::splat(0.0);
        let mut error = [zero; 2];
        for c in (0..p.n).step_by(I::LANES) {
            let (y, half) = (I::load(p.y.add(c)), I::load(p.half.add(c)));
            let code = I::round(I::min(I::max(I::fma(y, inverse, half), zero), I::add(half, half)));
            let e = I::fnma(I::sub(code, half), scale, y);
            let which = (c / I::LANES) & 1;
            error[which] = I::fma(I::mul(e, e), I::load(p.weight.add(c)), error[which]);
            if !codes.is_null() {
                I::store_u8(codes.add(c), code);
            }
        }
        I::sum(I::add(error[0], error[1]))
    }
}

/// The scale with the smallest squared error for given codes.
#[inline(always)]
pub(super) unsafe fn refit<I: Isa>(p: &Quantize, codes: *const u8) -> f32 {
    // SAFETY: as the shapes say
    unsafe {
        let (mut above, mut below) = (I::splat(0.0), I::splat(0.0));
        for c in (0..p.n).step_by(I::LANES) {
            let level = I::sub(I::load_u8(codes.add(c)), I::load(p.half.add(c)));
            let weighted = I::mul(level, I::load(p.weight.add(c)));
            above = I::fma(weighted, I::load(p.y.add(c)), above);
            below = I::fma(weighted, level, below);
        }
        I::sum(above) / I::sum(below)
    }
}

/// Latent `[n]` to steps. Returns the smallest scale at which no code is clipped, or NaN where a latent is not finite.
#[inline(always)]
pub(super) unsafe fn normalize<I: Isa>(n: usize, y: *mut f32, inverse_step: *const f32, half: *const f32) -> f32 {
    // SAFETY: as the shapes say
    unsafe {
        let (mut top, mut finite) = (I::splat(0.0), I::splat(0.0));
        let zero = I::splat(0.0);
        for c in (0..n).step_by(I::LANES) {
            let x = I::mul(I::load(y.add(c)), I::load(inverse_step.add(c)));
            I::store(y.add(c), x);
            let size = I::max(x, I::sub(zero, x));
            top = I::max(I::div(size, I::add(I::load(half.add(c)), I::splat(0.5))), top);
            finite = I::fma(x, zero, finite);
        }
        I::largest(top) + I::sum(finite)
    }
}

/// out = x - mean. Returns whether all of `x[n]` are finite.
#[inline(always)]
pub(super) unsafe fn center(n: usize, x: *const f32, mean: *const f32, out: *mut f32) -> bool {
    // SAFETY: as the shapes say
    unsafe {
        let mut bad = 0;
        for i in 0..n {
            let x = *x.add(i);
            bad |= u32::from(!x.is_finite());
            *out.add(i) = x - *mean.add(i);
        }
        bad == 0
    }
}
