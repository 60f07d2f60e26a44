//! The kernels, written over [`Isa`].
//!
//! # Safety
//! Every function here needs the instruction set of its `I`, and pointers that are readable (`*const`) or writable
//! (`*mut`) over the shapes in the comments. It must be inlined into a function that is compiled for the set.

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
        unsafe fn scan_mask(mask: *const u8, f16: bool, n: usize) -> (u64, u64) {
            // SAFETY: as the caller promises
            unsafe { generic::scan_mask::<Self>(mask, f16, n) }
        }
        $(#[$attribute])*
        unsafe fn load_mask(mask: *const u8, f16: bool, n: usize, out: *mut f32) {
            // SAFETY: as the caller promises
            unsafe { generic::load_mask::<Self>(mask, f16, n, out) }
        }
        $(#[$attribute])*
        unsafe fn softmax(p: &generic::Softmax) -> f32 {
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

/// A row's scale.
#[inline(always)]
pub(super) unsafe fn scale(at: *const u8) -> f32 {
    // SAFETY: two readable bytes
    half::f16::from_bits(u16::from_le(unsafe { at.cast::<u16>().read_unaligned() })).to_f32()
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
pub(super) unsafe fn unpack_row(plan: &UnpackPlan, row: *const u8, codes: *mut u8, spread: impl Fn(u64, u8) -> u64) -> f32 {
    // SAFETY: row[row_bytes], codes[stride]
    unsafe {
        for (s, &segment) in plan.segments.iter().enumerate() {
            let word = spread(segment_word(row, plan.row_bytes, segment), segment.bits);
            codes.add(8 * s).cast::<u64>().write_unaligned(word.to_le());
        }
        std::ptr::write_bytes(codes.add(plan.rank), 0, plan.stride - plan.rank);
        scale(row.add(plan.scale_offset))
    }
}

/// Codes `[TILE][stride]` and scales `[TILE]` of a tile's rows; zeros for cells whose bit in `visible` is 0, whose rows are not read.
#[inline(always)]
pub(super) unsafe fn unpack(
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
            *scales.add(t) = if visible >> t & 1 == 0 {
                std::ptr::write_bytes(out, 0, plan.stride);
                0.0
            } else {
                unpack_row(plan, rows.add(t * row_bytes), out, spread)
            };
        }
    }
}

/// Writes scale and codes `[rank]` into a row. Writes up to 8 bytes beyond a segment, but never beyond `row_bytes` + 8.
#[inline(always)]
pub(super) unsafe fn pack_row(plan: &UnpackPlan, codes: *const u8, scale: f32, row: *mut u8, squeeze: impl Fn(u64, u8) -> u64) {
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
unsafe fn product<I: Isa, const M: usize, const N: usize, const KEYS: bool, const WIDE: bool>(
    k4: usize,
    planes: usize,
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
        let mut acc = init;
        for plane in 0..planes {
            if plane == 0 && planes == 2 {
                acc = [[I::isplat(0); N]; M];
            }
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
                        acc[m][n] = if KEYS { I::dot4::<WIDE>(acc[m][n], x[n], y) } else { I::dot4::<WIDE>(acc[m][n], y, x[n]) };
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
        if p.wide && I::LANES == 8 {
            rebuild_keys_of::<I, true>(p)
        } else {
            rebuild_keys_of::<I, false>(p)
        }
    }
}

#[inline(always)]
unsafe fn rebuild_keys_of<I: Isa, const WIDE: bool>(p: &RebuildKeys) {
    let rank = 4 * p.k4;
    // SAFETY: as the shapes say
    unsafe {
        blocks!(p.head_dim, I::PRODUCT_ROWS, TILE / I::LANES, I::COLS, |d, c, M, N| {
            let t = c * I::LANES;
            let acc = product::<I, M, N, true, WIDE>(
                p.k4,
                p.planes,
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
        if p.wide && I::LANES == 8 {
            rebuild_values_of::<I, true>(p)
        } else {
            rebuild_values_of::<I, false>(p)
        }
    }
}

#[inline(always)]
unsafe fn rebuild_values_of<I: Isa, const WIDE: bool>(p: &RebuildValues) {
    // SAFETY: as the shapes say
    unsafe {
        blocks!(p.n_token, I::PRODUCT_ROWS, p.dim / I::LANES, I::COLS, |t, c, M, N| {
            let d = c * I::LANES;
            let init: [I::I; N] = std::array::from_fn(|n| I::iload(p.init.add(d + n * I::LANES)));
            let acc = product::<I, M, N, false, WIDE>(
                p.k4,
                p.planes,
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

/// exp(x) to 2 units in the last place; 0 below -87, no overflow below 88.
#[inline(always)]
unsafe fn exp<I: Isa>(x: I::F) -> I::F {
    // 1/k!, whose sum to r^7 is 5e-9 short of exp(r) for |r| <= ln(2)/2
    const TAYLOR: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    // ln 2 in two parts, the first with so few bits that its multiples are exact
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // SAFETY: arithmetic
    unsafe {
        let least = I::splat(-87.0);
        // the constant stands first, so that what is not a number stays so
        let y = I::min(I::splat(88.0), I::max(least, x));
        let n = I::round(I::mul(y, I::splat(std::f32::consts::LOG2_E)));
        let r = I::fnma(n, I::splat(LN2_LOW), I::fnma(n, I::splat(LN2_HIGH), y));
        let mut e = I::splat(TAYLOR[0]);
        for c in &TAYLOR[1..] {
            e = I::fma(e, r, I::splat(*c));
        }
        I::select_lt(x, least, I::splat(0.0), I::scale2(e, n))
    }
}

/// One step of the online softmax: a row of scores of one tile.
pub(crate) struct Softmax {
    /// `[TILE]`: scores; becomes the weights of the cells' codes: probability (up to the factor that the sum undoes) * value scale
    pub s: *mut f32,
    /// `[TILE]`, or null where all cells are visible and nothing is added
    pub mask: *const f32,
    pub slope: f32,
    /// 0: none
    pub softcap: f32,
    /// `[TILE]`
    pub value_scale: *const f32,
    /// largest score so far
    pub max: f32,
    /// `[PAD]` each, lane by lane: sums of probabilities and of weights so far
    pub sum: *mut f32,
    pub sum_weight: *mut f32,
    /// becomes the factor that earlier sums have to be multiplied by
    pub alpha: *mut f32,
}

/// Returns the new largest score.
#[inline(always)]
pub(super) unsafe fn softmax<I: Isa>(p: &Softmax) -> f32 {
    // SAFETY: as the shapes say
    unsafe {
        let hidden = I::splat(f32::NEG_INFINITY);
        let mut top = hidden;
        if p.softcap != 0.0 || !p.mask.is_null() {
            for t in (0..TILE).step_by(I::LANES) {
                let mut s = I::load(p.s.add(t));
                if p.softcap != 0.0 {
                    // tanh(x) = 1 - 2/(exp(2x) + 1)
                    let e = exp::<I>(I::mul(s, I::splat(2.0 / p.softcap)));
                    let tanh = I::sub(I::splat(1.0), I::div(I::splat(2.0), I::add(e, I::splat(1.0))));
                    s = I::mul(tanh, I::splat(p.softcap));
                }
                if !p.mask.is_null() {
                    let mask = I::load(p.mask.add(t));
                    // a hidden cell's score may be anything, also not a number
                    s = I::select_eq(mask, hidden, hidden, I::fma(I::splat(p.slope), mask, s));
                }
                I::store(p.s.add(t), s);
                top = I::max(s, top);
            }
        } else {
            for t in (0..TILE).step_by(I::LANES) {
                top = I::max(I::load(p.s.add(t)), top);
            }
        }
        let max = p.max.max(I::largest(top));
        // where nothing is visible yet, any finite number makes the probabilities 0
        let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let alpha = if p.max == max { 1.0 } else { (p.max - base).exp() };
        let a = I::splat(alpha);
        let b = I::splat(base);
        let zero = I::splat(0.0);
        let mut sum = I::mul(a, I::load(p.sum));
        let mut sum_weight = I::mul(a, I::load(p.sum_weight));
        for t in (0..TILE).step_by(I::LANES) {
            let e = exp::<I>(I::sub(I::load(p.s.add(t)), b));
            // a hidden cell's scale may be not a number
            let w = I::select_eq(e, zero, zero, I::mul(e, I::load(p.value_scale.add(t))));
            sum = I::add(sum, e);
            sum_weight = I::add(sum_weight, w);
            I::store(p.s.add(t), w);
        }
        I::store(p.sum, sum);
        I::store(p.sum_weight, sum_weight);
        *p.alpha = alpha;
        max
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
