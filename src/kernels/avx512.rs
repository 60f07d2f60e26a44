//! The kernels for AVX-512 with VNNI, and VBMI where the machine has it.

use super::avx2::{spread, squeeze};
use super::{generic, Isa, Kernels, UnpackPlan, TILE};
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(crate) struct Avx512;

// SAFETY of every unsafe block here: the instructions are there (the trait's contract), and pointers are valid for a
// vector (the method's contract).
impl Isa for Avx512 {
    const LANES: usize = 16;
    const PRODUCT_ROWS: usize = 6;
    const GEMM_ROWS: usize = 6;
    const COLS: usize = 4;
    type F = __m512;
    type I = __m512i;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: __m512) {
        unsafe { _mm512_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn fnma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fnmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    unsafe fn exp2(a: __m512) -> __m512 {
        unsafe {
            // a - floor(a), and 0 for infinities; vscalefps takes the floor itself, and makes 2^-inf = 0
            let r = _mm512_reduce_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(a);
            let mut e = _mm512_set1_ps(generic::EXP2[5]);
            for i in (0..5).rev() {
                e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(generic::EXP2[i]));
            }
            _mm512_scalef_ps(e, a)
        }
    }
    #[inline(always)]
    unsafe fn mul_nonzero(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_maskz_mul_ps(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(a, _mm512_setzero_ps()), a, b) }
    }
    #[inline(always)]
    unsafe fn select_eq(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b), y, x) }
    }
    #[inline(always)]
    unsafe fn gt_bits(a: __m512, b: __m512) -> u32 {
        unsafe { u32::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b)) }
    }
    #[inline(always)]
    unsafe fn sum(a: __m512) -> f32 {
        unsafe { _mm512_reduce_add_ps(a) }
    }
    #[inline(always)]
    unsafe fn largest(a: __m512) -> f32 {
        unsafe { _mm512_reduce_max_ps(a) }
    }
    #[inline(always)]
    unsafe fn store_u8(p: *mut u8, a: __m512) {
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a))) }
    }

    #[inline(always)]
    unsafe fn isplat(x: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn iload(p: *const i32) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn iadd(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn isum(a: __m512i) -> i32 {
        unsafe { _mm512_reduce_add_epi32(a) }
    }
    #[inline(always)]
    unsafe fn shr8(a: __m512i) -> __m512i {
        unsafe { _mm512_srai_epi32::<8>(a) }
    }
    #[inline(always)]
    unsafe fn to_i(a: __m512) -> __m512i {
        unsafe { _mm512_cvtps_epi32(a) }
    }
    #[inline(always)]
    unsafe fn store_bytes(p: *mut u8, a: __m512i) {
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(a)) }
    }
    #[inline(always)]
    unsafe fn shl8(a: __m512i) -> __m512i {
        unsafe { _mm512_slli_epi32::<8>(a) }
    }
    #[inline(always)]
    unsafe fn to_f(a: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn byte<const J: i32>(a: __m512i) -> __m512 {
        unsafe {
            let shift = _mm_cvtsi32_si128(24 - 8 * J);
            _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_sll_epi32(a, shift)))
        }
    }
    #[inline(always)]
    unsafe fn dot4<const WIDE: bool>(acc: __m512i, u: __m512i, s: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(acc, u, s) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,f16c")]
unsafe fn unpack_vbmi(
    plan: &UnpackPlan,
    rows: *const u8,
    row_bytes: usize,
    visible: u64,
    codes: *mut u8,
    scales: *mut f32,
) {
    // SAFETY: rows of visible cells are readable, `codes` holds TILE rows of `stride` bytes, `scales` TILE floats. A whole
    // vector is only read where that ends before the last visible row does, else just the block's bytes.
    unsafe {
        let end = (TILE - visible.leading_zeros() as usize) * row_bytes;
        for (b, block) in plan.blocks.iter().enumerate() {
            let permutation = _mm512_load_si512(block.permutation.as_ptr().cast());
            let shift = _mm512_load_si512(block.shift.as_ptr().cast());
            let mask = _mm512_load_si512(block.mask.as_ptr().cast());
            for t in 0..TILE {
                let out = codes.add(t * plan.stride + 64 * b);
                if visible >> t & 1 == 0 {
                    _mm512_storeu_si512(out.cast(), _mm512_setzero_si512());
                    continue;
                }
                let at = t * row_bytes + block.offset;
                let bytes = if at + 64 <= end {
                    _mm512_loadu_si512(rows.add(at).cast())
                } else {
                    _mm512_maskz_loadu_epi8(u64::MAX >> (64 - block.bytes), rows.add(at).cast())
                };
                let codes = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(permutation, bytes));
                _mm512_storeu_si512(out.cast(), _mm512_and_si512(codes, mask));
            }
        }
        generic::unpack_scales::<Avx512>(plan, rows, row_bytes, visible, scales);
    }
}

/// 16 rows of 16 dwords, rows `stride` bytes apart, to 16 rows of 16 dwords `TILE` dwords apart.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn transpose_16(from: *const u8, stride: usize, to: *mut u8) {
    // SAFETY: 64 bytes of each of 16 rows are readable and writable
    unsafe {
        let mut r: [__m512i; 16] = std::array::from_fn(|i| _mm512_loadu_si512(from.add(i * stride).cast()));
        let mut t = r;
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..4 {
            r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        // r[4i + j]: column 4l + j of rows 4i..4i+4 in 128-bit lane l
        for j in 0..4 {
            let a = _mm512_shuffle_i32x4::<0x88>(r[j], r[4 + j]);
            let b = _mm512_shuffle_i32x4::<0xdd>(r[j], r[4 + j]);
            let c = _mm512_shuffle_i32x4::<0x88>(r[8 + j], r[12 + j]);
            let d = _mm512_shuffle_i32x4::<0xdd>(r[8 + j], r[12 + j]);
            for (l, column) in [
                (0, _mm512_shuffle_i32x4::<0x88>(a, c)),
                (2, _mm512_shuffle_i32x4::<0xdd>(a, c)),
                (1, _mm512_shuffle_i32x4::<0x88>(b, d)),
                (3, _mm512_shuffle_i32x4::<0xdd>(b, d)),
            ] {
                _mm512_storeu_si512(to.add((4 * l + j) * 4 * TILE).cast(), column);
            }
        }
    }
}

impl Kernels for Avx512 {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")]
    unsafe fn unpack(
        plan: &UnpackPlan,
        rows: *const u8,
        row_bytes: usize,
        visible: u64,
        codes: *mut u8,
        scales: *mut f32,
    ) {
        // SAFETY: as the caller promises
        unsafe {
            if is_x86_feature_detected!("avx512vbmi") {
                unpack_vbmi(plan, rows, row_bytes, visible, codes, scales);
            } else {
                generic::unpack::<Self>(plan, rows, row_bytes, visible, codes, scales, spread);
            }
        }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")]
    unsafe fn unpack_row(plan: &UnpackPlan, row: *const u8, codes: *mut u8) -> f32 {
        // SAFETY: as the caller promises
        unsafe { generic::unpack_row(plan, row, codes, spread) }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")]
    unsafe fn pack_row(plan: &UnpackPlan, codes: *const u8, scale: f32, row: *mut u8) {
        // SAFETY: as the caller promises
        unsafe { generic::pack_row(plan, codes, scale, row, squeeze) }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")]
    unsafe fn transpose(codes: *const u8, stride: usize, rank: usize, out: *mut u8) {
        // SAFETY: `codes` has TILE rows of `stride` bytes, a multiple of 64; `out` has room for stride/4 rows of 4*TILE bytes
        unsafe {
            for c in (0..rank).step_by(64) {
                for t in (0..TILE).step_by(16) {
                    transpose_16(codes.add(t * stride + c), stride, out.add(c * TILE + 4 * t));
                }
            }
        }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")]
    unsafe fn scan_mask(mask: *const u8, f16: bool, n: usize) -> (u64, u64) {
        // SAFETY: as the caller promises
        unsafe {
            if !f16 || n != TILE {
                return generic::scan_mask::<Self>(mask, f16, n);
            }
            let (low, high) = (_mm512_loadu_si512(mask.cast()), _mm512_loadu_si512(mask.add(64).cast()));
            let hidden = _mm512_set1_epi16(half::f16::NEG_INFINITY.to_bits() as i16);
            let size = _mm512_set1_epi16(0x7fff);
            let both = |low: __mmask32, high: __mmask32| u64::from(low) | u64::from(high) << 32;
            (
                both(_mm512_cmpneq_epi16_mask(low, hidden), _mm512_cmpneq_epi16_mask(high, hidden)),
                both(_mm512_test_epi16_mask(low, size), _mm512_test_epi16_mask(high, size)),
            )
        }
    }
    generic::kernels!(#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")]);
}
