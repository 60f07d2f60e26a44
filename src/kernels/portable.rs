//! The kernels in plain Rust, in vectors of eight that the compiler may map to whatever the target has.

use super::{generic, Isa, Kernels, UnpackPlan};

#[derive(Clone, Copy)]
pub(crate) struct Portable;

const N: usize = 8;

#[derive(Clone, Copy)]
pub(crate) struct F([f32; N]);
#[derive(Clone, Copy)]
pub(crate) struct I([i32; N]);

#[inline(always)]
fn map(f: impl Fn(usize) -> f32) -> F {
    F(std::array::from_fn(f))
}

#[inline(always)]
fn imap(f: impl Fn(usize) -> i32) -> I {
    I(std::array::from_fn(f))
}

/// Fused where the target fuses, because without hardware for it `mul_add` is a slow library call.
#[inline(always)]
fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

impl Isa for Portable {
    const LANES: usize = N;
    const PRODUCT_ROWS: usize = 2;
    const GEMM_ROWS: usize = 2;
    const COLS: usize = 2;
    type F = F;
    type I = I;

    #[inline(always)]
    unsafe fn splat(x: f32) -> F {
        F([x; N])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> F {
        // SAFETY: readable for a vector
        F(unsafe { p.cast::<[f32; N]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: F) {
        // SAFETY: writable for a vector
        unsafe { p.cast::<[f32; N]>().write_unaligned(x.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> F {
        // SAFETY: readable for a vector
        let h = unsafe { p.cast::<[u16; N]>().read_unaligned() };
        // the exponent's bias is corrected by a multiplication, which also takes subnormal numbers along
        map(|i| {
            let (h, size) = (u32::from(h[i]), u32::from(h[i] & 0x7fff) << 13);
            let finite = (f32::from_bits(size) * f32::from_bits(0x7780_0000)).to_bits();
            let size = if size < 0x0f80_0000 { finite } else { size | 0x7f80_0000 };
            f32::from_bits(size | (h & 0x8000) << 16)
        })
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> F {
        // SAFETY: readable for a vector
        let b = unsafe { p.cast::<[u8; N]>().read_unaligned() };
        map(|i| f32::from(b[i]))
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        map(|i| a.0[i] + b.0[i])
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        map(|i| a.0[i] - b.0[i])
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        map(|i| a.0[i] * b.0[i])
    }
    #[inline(always)]
    unsafe fn div(a: F, b: F) -> F {
        map(|i| a.0[i] / b.0[i])
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        map(|i| mul_add(a.0[i], b.0[i], c.0[i]))
    }
    #[inline(always)]
    unsafe fn fnma(a: F, b: F, c: F) -> F {
        map(|i| mul_add(-a.0[i], b.0[i], c.0[i]))
    }
    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        map(|i| if a.0[i] > b.0[i] { a.0[i] } else { b.0[i] })
    }
    #[inline(always)]
    unsafe fn min(a: F, b: F) -> F {
        map(|i| if a.0[i] < b.0[i] { a.0[i] } else { b.0[i] })
    }
    #[inline(always)]
    unsafe fn round(a: F) -> F {
        // adding 1.5*2^23 leaves no bits after the point; exact for |a| < 2^22, and larger values pass through unrounded
        const MAGIC: f32 = 12_582_912.0;
        map(|i| if a.0[i].abs() < 4_194_304.0 { (a.0[i] + MAGIC) - MAGIC } else { a.0[i] })
    }
    #[inline(always)]
    unsafe fn exp2(a: F) -> F {
        map(|i| {
            let x = a.0[i];
            let n = x.clamp(-126.0, 127.0).floor();
            let r = if x < -126.0 { 0.0 } else { x - n };
            let e = generic::EXP2.iter().rev().fold(0.0, |e, c| mul_add(e, r, *c));
            // not a number becomes 0 as an integer, and stays so in e
            e * f32::from_bits(if x < -126.0 { 0 } else { ((n as i32) + 127) as u32 } << 23)
        })
    }
    #[inline(always)]
    unsafe fn mul_nonzero(a: F, b: F) -> F {
        map(|i| if a.0[i] == 0.0 { 0.0 } else { a.0[i] * b.0[i] })
    }
    #[inline(always)]
    unsafe fn select_eq(a: F, b: F, x: F, y: F) -> F {
        map(|i| if a.0[i] == b.0[i] { x.0[i] } else { y.0[i] })
    }
    #[inline(always)]
    unsafe fn gt_bits(a: F, b: F) -> u32 {
        (0..N).fold(0, |bits, i| bits | (u32::from(a.0[i] > b.0[i]) << i))
    }
    #[inline(always)]
    unsafe fn sum(a: F) -> f32 {
        let a = a.0;
        ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
    }
    #[inline(always)]
    unsafe fn largest(a: F) -> f32 {
        a.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn store_u8(p: *mut u8, a: F) {
        // SAFETY: writable for a vector of bytes
        unsafe { p.cast::<[u8; N]>().write_unaligned(std::array::from_fn(|i| a.0[i] as u8)) }
    }

    #[inline(always)]
    unsafe fn isplat(x: i32) -> I {
        I([x; N])
    }
    #[inline(always)]
    unsafe fn iload(p: *const i32) -> I {
        // SAFETY: readable for a vector
        I(unsafe { p.cast::<[i32; N]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn iadd(a: I, b: I) -> I {
        imap(|i| a.0[i].wrapping_add(b.0[i]))
    }
    #[inline(always)]
    unsafe fn isum(a: I) -> i32 {
        a.0.into_iter().fold(0, i32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn shr8(a: I) -> I {
        imap(|i| a.0[i] >> 8)
    }
    #[inline(always)]
    unsafe fn to_i(a: F) -> I {
        // SAFETY: arithmetic
        let a = unsafe { Self::round(a) };
        imap(|i| a.0[i] as i32)
    }
    #[inline(always)]
    unsafe fn store_bytes(p: *mut u8, a: I) {
        // SAFETY: writable for a vector of bytes
        unsafe { p.cast::<[u8; N]>().write_unaligned(std::array::from_fn(|i| a.0[i] as u8)) }
    }
    #[inline(always)]
    unsafe fn shl8(a: I) -> I {
        imap(|i| a.0[i] << 8)
    }
    #[inline(always)]
    unsafe fn to_f(a: I) -> F {
        map(|i| a.0[i] as f32)
    }
    #[inline(always)]
    unsafe fn byte<const J: i32>(a: I) -> F {
        map(|i| ((a.0[i] << (24 - 8 * J)) >> 24) as f32)
    }
    #[inline(always)]
    unsafe fn dot4<const WIDE: bool>(acc: I, u: I, s: I) -> I {
        let term = |i: usize, j: u32| ((u.0[i] >> (8 * j)) & 0xff) * ((s.0[i] << (24 - 8 * j)) >> 24);
        imap(|i| acc.0[i].wrapping_add(term(i, 0) + term(i, 1) + term(i, 2) + term(i, 3)))
    }
}

impl Kernels for Portable {
    unsafe fn unpack(
        plan: &UnpackPlan,
        rows: *const u8,
        row_bytes: usize,
        visible: u64,
        codes: *mut u8,
        scales: *mut f32,
    ) {
        // SAFETY: as the caller promises
        unsafe { generic::unpack::<Self>(plan, rows, row_bytes, visible, codes, scales, generic::spread) }
    }
    unsafe fn unpack_row(plan: &UnpackPlan, row: *const u8, codes: *mut u8) -> f32 {
        // SAFETY: as the caller promises
        unsafe { generic::unpack_row(plan, row, codes, generic::spread) }
    }
    unsafe fn pack_row(plan: &UnpackPlan, codes: *const u8, scale: f32, row: *mut u8) {
        // SAFETY: as the caller promises
        unsafe { generic::pack_row(plan, codes, scale, row, generic::squeeze) }
    }
    unsafe fn transpose(codes: *const u8, stride: usize, rank: usize, out: *mut u8) {
        // SAFETY: as the caller promises
        unsafe { generic::transpose(codes, stride, rank, out) }
    }
    unsafe fn scan_mask(mask: *const u8, f16: bool, n: usize) -> (u64, u64) {
        // SAFETY: as the caller promises
        unsafe { generic::scan_mask::<Self>(mask, f16, n) }
    }
    generic::kernels!();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_float_converts_as_it_should() {
        for first in (0..=u16::MAX).step_by(N) {
            let h: [u16; N] = std::array::from_fn(|i| first + i as u16);
            // SAFETY: the array is as long as a vector
            let f = unsafe { Portable::load_f16(h.as_ptr()) };
            for i in 0..N {
                let expected = half::f16::from_bits(h[i]).to_f32();
                assert!(f.0[i] == expected || f.0[i].is_nan() && expected.is_nan(), "{:04x}", h[i]);
            }
        }
    }
}
