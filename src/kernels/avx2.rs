//! The kernels for AVX2 with FMA, F16C and BMI2.

use super::{generic, Isa, Kernels, UnpackPlan};
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

// SAFETY of every unsafe block here: the instructions are there (the trait's contract), and pointers are valid for a
// vector (the method's contract).
impl Isa for Avx2 {
    const LANES: usize = 8;
    const PRODUCT_ROWS: usize = 4;
    const GEMM_ROWS: usize = 6;
    const COLS: usize = 2;
    type F = __m256;
    type I = __m256i;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: __m256) {
        unsafe { _mm256_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn fnma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fnmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn round(a: __m256) -> __m256 {
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    unsafe fn exp2(a: __m256) -> __m256 {
        unsafe {
            let least = _mm256_set1_ps(-126.0);
            // the variable stands second, so that what is not a number stays so
            let x = _mm256_min_ps(_mm256_set1_ps(127.0), _mm256_max_ps(least, a));
            let n = _mm256_floor_ps(x);
            let r = _mm256_sub_ps(x, n);
            let mut e = _mm256_set1_ps(generic::EXP2[5]);
            for i in (0..5).rev() {
                e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(generic::EXP2[i]));
            }
            let n = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)));
            let e = _mm256_mul_ps(e, _mm256_castsi256_ps(n));
            _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(a, least), e)
        }
    }
    #[inline(always)]
    unsafe fn mul_nonzero(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_NEQ_UQ>(a, _mm256_setzero_ps()), _mm256_mul_ps(a, b)) }
    }
    #[inline(always)]
    unsafe fn select_eq(a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
        unsafe { _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_EQ_OQ>(a, b)) }
    }
    #[inline(always)]
    unsafe fn gt_bits(a: __m256, b: __m256) -> u32 {
        unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) as u32 }
    }
    #[inline(always)]
    unsafe fn sum(a: __m256) -> f32 {
        unsafe {
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps::<1>(a, a)))
        }
    }
    #[inline(always)]
    unsafe fn largest(a: __m256) -> f32 {
        unsafe {
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps::<1>(a, a)))
        }
    }
    #[inline(always)]
    unsafe fn store_u8(p: *mut u8, a: __m256) {
        unsafe {
            let a = _mm256_cvtps_epi32(a);
            let a = _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            _mm_storel_epi64(p.cast(), _mm_packus_epi16(a, a));
        }
    }

    #[inline(always)]
    unsafe fn isplat(x: i32) -> __m256i {
        unsafe { _mm256_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn iload(p: *const i32) -> __m256i {
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn iadd(a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn isum(a: __m256i) -> i32 {
        unsafe {
            let a = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            let a = _mm_add_epi32(a, _mm_shuffle_epi32::<0b_00_00_11_10>(a));
            _mm_cvtsi128_si32(_mm_add_epi32(a, _mm_shuffle_epi32::<1>(a)))
        }
    }
    #[inline(always)]
    unsafe fn shr8(a: __m256i) -> __m256i {
        unsafe { _mm256_srai_epi32::<8>(a) }
    }
    #[inline(always)]
    unsafe fn to_i(a: __m256) -> __m256i {
        unsafe { _mm256_cvtps_epi32(a) }
    }
    #[inline(always)]
    unsafe fn store_bytes(p: *mut u8, a: __m256i) {
        unsafe {
            let a = _mm256_and_si256(a, _mm256_set1_epi32(0xff));
            let a = _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            _mm_storel_epi64(p.cast(), _mm_packus_epi16(a, a));
        }
    }
    #[inline(always)]
    unsafe fn shl8(a: __m256i) -> __m256i {
        unsafe { _mm256_slli_epi32::<8>(a) }
    }
    #[inline(always)]
    unsafe fn to_f(a: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn byte<const J: i32>(a: __m256i) -> __m256 {
        unsafe {
            let shift = _mm_cvtsi32_si128(24 - 8 * J);
            _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_sll_epi32(a, shift)))
        }
    }
    #[inline(always)]
    unsafe fn dot4<const WIDE: bool>(acc: __m256i, u: __m256i, s: __m256i) -> __m256i {
        unsafe {
            let ones = _mm256_set1_epi16(1);
            if WIDE {
                // a pair of products may exceed an i16, so that one of each pair is cleared
                let low = _mm256_set1_epi16(0xff);
                let even = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(u, low), s), ones);
                let odd = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_andnot_si256(low, u), s), ones);
                _mm256_add_epi32(acc, _mm256_add_epi32(even, odd))
            } else {
                // 2 * 127 * 128 fits an i16
                _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), ones))
            }
        }
    }
}

/// Every code of a segment into a byte of its own.
#[inline(always)]
pub(super) fn spread(codes: u64, bits: u8) -> u64 {
    // SAFETY: only inlined into functions compiled for BMI2
    unsafe { _pdep_u64(codes, generic::code_mask(bits)) }
}

/// The inverse of [`spread`].
#[inline(always)]
pub(super) fn squeeze(codes: u64, bits: u8) -> u64 {
    // SAFETY: only inlined into functions compiled for BMI2
    unsafe { _pext_u64(codes, generic::code_mask(bits)) }
}

impl Kernels for Avx2 {
    #[target_feature(enable = "avx2,fma,f16c,bmi2")]
    unsafe fn unpack(
        plan: &UnpackPlan,
        rows: *const u8,
        row_bytes: usize,
        visible: u64,
        codes: *mut u8,
        scales: *mut f32,
    ) {
        // SAFETY: as the caller promises
        unsafe { generic::unpack::<Self>(plan, rows, row_bytes, visible, codes, scales, spread) }
    }
    #[target_feature(enable = "avx2,fma,f16c,bmi2")]
    unsafe fn unpack_row(plan: &UnpackPlan, row: *const u8, codes: *mut u8) -> f32 {
        // SAFETY: as the caller promises
        unsafe { generic::unpack_row(plan, row, codes, spread) }
    }
    #[target_feature(enable = "avx2,fma,f16c,bmi2")]
    unsafe fn pack_row(plan: &UnpackPlan, codes: *const u8, scale: f32, row: *mut u8) {
        // SAFETY: as the caller promises
        unsafe { generic::pack_row(plan, codes, scale, row, squeeze) }
    }
    #[target_feature(enable = "avx2,fma,f16c,bmi2")]
    unsafe fn transpose(codes: *const u8, stride: usize, rank: usize, out: *mut u8) {
        // SAFETY: as the caller promises
        unsafe { generic::transpose(codes, stride, rank, out) }
    }
    #[target_feature(enable = "avx2,fma,f16c,bmi2")]
    unsafe fn scan_mask(mask: *const u8, f16: bool, n: usize) -> (u64, u64) {
        // SAFETY: as the caller promises
        unsafe { generic::scan_mask::<Self>(mask, f16, n) }
    }
    generic::kernels!(#[target_feature(enable = "avx2,fma,f16c,bmi2")]);
}
