//! The inner loops of codec and attention, written once over a few vector operations ([`Isa`]) and compiled for each
//! instruction set. [`path`] picks the best set that the machine has, once per process.
//!
//! All paths do the same operations in the same order up to the grouping of sums, so their results agree to rounding.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod generic;
mod portable;

use std::cell::{Cell, RefCell};
use std::sync::OnceLock;

/// Cells that the kernels take at a time.
pub(crate) const TILE: usize = 64;
/// Floats between rows of a table whose rows are written a vector beyond their end.
pub(crate) const TRIG_STRIDE: usize = TILE + 16;
/// Latent channels that one AVX-512 register holds as codes; strides of code buffers are multiples of it.
pub(crate) const BLOCK: usize = 64;
/// Dimensions of values are padded to a multiple of this many floats.
pub(crate) const PAD: usize = 16;

pub(crate) fn round_up(n: usize, to: usize) -> usize {
    n.div_ceil(to) * to
}

/// A dot product outside of the kernels.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    // eight sums, so that it vectorizes
    let mut sum = [0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        for i in 0..8 {
            sum[i] += a[i] * b[i];
        }
    }
    sum.iter().sum::<f32>() + rest
}

/// An instruction set that the kernels are compiled for; the later, the faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    Portable,
    Avx2,
    Avx512,
}

impl Path {
    pub const ALL: [Path; 3] = [Path::Portable, Path::Avx2, Path::Avx512];

    pub fn name(self) -> &'static str {
        match self {
            Path::Portable => "portable",
            Path::Avx2 => "AVX2",
            Path::Avx512 => "AVX-512 VNNI",
        }
    }

    /// Whether this machine can run it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = || {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
                    && is_x86_feature_detected!("bmi2")
            };
            match self {
                Path::Portable => true,
                Path::Avx2 => avx2(),
                Path::Avx512 => {
                    avx2()
                        && is_x86_feature_detected!("avx512f")
                        && is_x86_feature_detected!("avx512bw")
                        && is_x86_feature_detected!("avx512vl")
                        && is_x86_feature_detected!("avx512dq")
                        && is_x86_feature_detected!("avx512vnni")
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Path::Portable
        }
    }
}

thread_local! {
    static FORCED: Cell<Option<Path>> = const { Cell::new(None) };
}

/// Makes kernels called on this thread take `path`, or again the process's choice. For tests and benchmarks.
///
/// # Panics
/// If the machine cannot run `path`.
pub fn force_path(path: Option<Path>) {
    if let Some(path) = path {
        assert!(path.is_available(), "this machine has no {}", path.name());
    }
    FORCED.with(|f| f.set(path));
}

/// The path that kernels called on this thread take.
pub fn path() -> Path {
    static BEST: OnceLock<Path> = OnceLock::new();
    FORCED.with(Cell::get).unwrap_or_else(|| {
        *BEST.get_or_init(|| {
            let limit = match std::env::var("PALU_CPU_PATH").as_deref() {
                Ok("portable") => Path::Portable,
                Ok("avx2") => Path::Avx2,
                _ => Path::Avx512,
            };
            Path::ALL.into_iter().rfind(|p| *p <= limit && p.is_available()).unwrap_or(Path::Portable)
        })
    })
}

/// Asks for `n` bytes to be brought into the cache.
pub(crate) fn prefetch(p: *const u8, n: usize) {
    #[cfg(target_arch = "x86_64")]
    for i in (0..n).step_by(64) {
        // SAFETY: prefetching has no effect but on speed, whatever the address
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.wrapping_add(i).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (p, n);
}

/// Runs `$body` with `$isa` naming the type of the path to take.
macro_rules! dispatch {
    ($isa:ident => $body:expr) => {
        match $crate::kernels::path() {
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::Path::Avx512 => {
                type $isa = $crate::kernels::Avx512;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::Path::Avx2 => {
                type $isa = $crate::kernels::Avx2;
                $body
            }
            _ => {
                type $isa = $crate::kernels::Portable;
                $body
            }
        }
    };
}
pub(crate) use dispatch;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

/// Vector operations of one instruction set. Floats are f32.
///
/// # Safety
/// All of them need the machine to have the instruction set, and pointers to be readable or writable for a whole vector.
/// They must be inlined into a function that is compiled for the set.
pub(crate) trait Isa: Kernels + Copy + 'static {
    /// floats in a vector
    const LANES: usize;
    /// Rows that an integer and a float product keep in registers, and vectors of each.
    const PRODUCT_ROWS: usize;
    const GEMM_ROWS: usize;
    const COLS: usize;
    type F: Copy;
    /// i32 lanes, as many as `F` has
    type I: Copy;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, x: Self::F);
    unsafe fn load_f16(p: *const u16) -> Self::F;
    unsafe fn load_u8(p: *const u8) -> Self::F;
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// a*b + c
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// c - a*b
    unsafe fn fnma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `b` where either is not a number
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// to the nearest integer, ties to even
    unsafe fn round(a: Self::F) -> Self::F;
    /// 2^a to 3 units in the last place; 0 below -126, no overflow below 127
    unsafe fn exp2(a: Self::F) -> Self::F;
    /// a * b, but 0 where a is 0, whatever b
    unsafe fn mul_nonzero(a: Self::F, b: Self::F) -> Self::F;
    /// a == b ? x : y, lane by lane
    unsafe fn select_eq(a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// bit i: a\[i\] > b\[i\]
    unsafe fn gt_bits(a: Self::F, b: Self::F) -> u32;
    unsafe fn sum(a: Self::F) -> f32;
    /// the largest lane; lanes that are not a number may or may not count
    unsafe fn largest(a: Self::F) -> f32;
    /// low bytes of the lanes, which are integers in 0..256
    unsafe fn store_u8(p: *mut u8, a: Self::F);

    unsafe fn isplat(x: i32) -> Self::I;
    unsafe fn iload(p: *const i32) -> Self::I;
    unsafe fn iadd(a: Self::I, b: Self::I) -> Self::I;
    /// wraps
    unsafe fn isum(a: Self::I) -> i32;
    /// a * 256
    unsafe fn shl8(a: Self::I) -> Self::I;
    /// floor(a / 256)
    unsafe fn shr8(a: Self::I) -> Self::I;
    /// to the nearest integer
    unsafe fn to_i(a: Self::F) -> Self::I;
    /// the low byte of each lane
    unsafe fn store_bytes(p: *mut u8, a: Self::I);
    unsafe fn to_f(a: Self::I) -> Self::F;
    /// byte `J` of each lane, sign extended
    unsafe fn byte<const J: i32>(a: Self::I) -> Self::F;
    /// acc + the dot product of each lane's four unsigned bytes of `u` and four signed bytes of `s`. `WIDE`: bytes of `u`
    /// may exceed 127.
    unsafe fn dot4<const WIDE: bool>(acc: Self::I, u: Self::I, s: Self::I) -> Self::I;
}

/// Whole kernels of one instruction set: those of [`generic`], compiled for the set, and those that need special
/// instructions. Arguments are described in [`generic`].
///
/// # Safety
/// The machine must have the instruction set; pointers as the functions of [`generic`] say.
pub(crate) trait Kernels {
    unsafe fn unpack(
        plan: &UnpackPlan,
        rows: *const u8,
        row_bytes: usize,
        visible: u64,
        codes: *mut u8,
        scales: *mut f32,
    );
    unsafe fn unpack_row(plan: &UnpackPlan, row: *const u8, codes: *mut u8) -> f32;
    unsafe fn pack_row(plan: &UnpackPlan, codes: *const u8, scale: f32, row: *mut u8);
    unsafe fn transpose(codes: *const u8, stride: usize, rank: usize, out: *mut u8);
    unsafe fn rebuild_keys(p: &generic::RebuildKeys);
    unsafe fn score_keys(p: &generic::ScoreKeys);
    unsafe fn prepare_nodes(p: &generic::PrepareNodes);
    unsafe fn fill_basis(pos: *const i32, n: usize, middle: i32, half: f32, out: *mut f32);
    unsafe fn rebuild_values(p: &generic::RebuildValues);
    unsafe fn gemm_f32(p: &generic::Gemm<f32>);
    unsafe fn gemm_u8(p: &generic::Gemm<u8>);
    unsafe fn gemm_f16(p: &generic::Gemm<u16>);
    unsafe fn rotate(k: *mut f32, n_pair: usize, cos: *const f32, sin: *const f32);
    unsafe fn fill_trig(p: &generic::FillTrig);
    unsafe fn scan_mask(mask: *const u8, f16: bool, n: usize) -> (u64, u64);
    unsafe fn load_mask(mask: *const u8, f16: bool, n: usize, out: *mut f32);
    unsafe fn softmax(p: &generic::Softmax);
    unsafe fn merge(out: *mut f32, x: *const f32, weight: f32, n: usize);
    unsafe fn project_value(p: &generic::ProjectValue);
    unsafe fn finish_value(p: &generic::FinishValue);
    unsafe fn quantize(p: &generic::Quantize, codes: *mut u8) -> f32;
    unsafe fn refit(p: &generic::Quantize, codes: *const u8) -> f32;
    unsafe fn normalize(n: usize, y: *mut f32, inverse_step: *const f32, half: *const f32) -> f32;
    unsafe fn center(n: usize, x: *const f32, mean: *const f32, out: *mut f32) -> bool;
}

/// How the codes of one head group stand in a row.
#[derive(Clone, Debug)]
pub(crate) struct UnpackPlan {
    pub row_bytes: usize,
    /// byte of the row at which the scale stands
    pub scale_offset: usize,
    /// channels
    pub rank: usize,
    /// bytes between code rows: the rank padded to [`BLOCK`]
    pub stride: usize,
    pub segments: Vec<Segment>,
    /// one per [`BLOCK`] channels
    pub blocks: Vec<BlockPlan>,
}

/// Eight channels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    /// byte of the row at which the codes begin
    pub offset: u32,
    pub bits: u8,
}

/// How `vpermb` and `vpmultishiftqb` take [`BLOCK`] codes from at most 64 consecutive bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct BlockPlan {
    /// source byte of each byte: a segment's bytes go to one qword
    pub permutation: [u8; BLOCK],
    /// bit of its qword at which each code begins
    pub shift: [u8; BLOCK],
    /// 2^bits - 1
    pub mask: [u8; BLOCK],
    /// the source bytes within the row
    pub offset: usize,
    pub bytes: usize,
}

impl UnpackPlan {
    pub fn new(row_bytes: usize, scale_offset: usize, bits: &[u8]) -> Self {
        let mut offset = scale_offset + crate::layout::SCALE_BYTES;
        let segments: Vec<Segment> = bits
            .iter()
            .map(|&bits| {
                let segment = Segment { offset: offset as u32, bits };
                offset += bits as usize;
                segment
            })
            .collect();
        assert!(offset <= row_bytes);
        let blocks = segments
            .chunks(BLOCK / 8)
            .map(|segments| {
                let first = segments[0].offset as usize;
                let mut plan =
                    BlockPlan { permutation: [0; BLOCK], shift: [0; BLOCK], mask: [0; BLOCK], offset: first, bytes: 0 };
                for (s, segment) in segments.iter().enumerate() {
                    let bits = segment.bits;
                    for i in 0..8u8 {
                        let at = 8 * s + i as usize;
                        // bytes beyond the segment only reach bits that the mask clears
                        plan.permutation[at] = (segment.offset as usize - first) as u8 + i.min(bits - 1);
                        plan.shift[at] = i * bits;
                        plan.mask[at] = (0xffu32 >> (8 - bits)) as u8;
                    }
                    plan.bytes = segment.offset as usize + bits as usize - first;
                }
                plan
            })
            .collect();
        let rank = 8 * bits.len();
        Self { row_bytes, scale_offset, rank, stride: round_up(rank, BLOCK), segments, blocks }
    }
}

/// Memory that a thread keeps from call to call; it only grows.
pub(crate) struct Arena {
    words: Vec<CacheLine>,
    used: usize,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct CacheLine([u8; 64]);

thread_local! {
    static ARENA: RefCell<Arena> = const { RefCell::new(Arena { words: Vec::new(), used: 0 }) };
}

impl Arena {
    /// Lends this thread's arena with room for `bytes` (the sum of what will be taken, each rounded up to 64).
    pub fn with<R>(bytes: usize, f: impl FnOnce(&mut Arena) -> R) -> R {
        ARENA.with_borrow_mut(|arena| {
            let lines = bytes.div_ceil(64);
            if arena.words.len() < lines {
                arena.words.resize(lines, CacheLine([0; 64]));
            }
            arena.used = 0;
            f(arena)
        })
    }

    /// Room for `n` values of `T`, aligned to 64 bytes, with whatever an earlier use left there. It stays where it is
    /// until the closure of [`Arena::with`] returns.
    pub fn take<T: Copy>(&mut self, n: usize) -> *mut T {
        let lines = (n * size_of::<T>()).div_ceil(64);
        assert!(self.used + lines <= self.words.len(), "the arena was lent with too little room");
        let pointer = self.words[self.used..].as_mut_ptr();
        self.used += lines;
        pointer.cast()
    }
}

/// Constants that the kernels load whole cache lines of.
#[derive(Clone)]
pub(crate) struct Aligned<T> {
    lines: Vec<CacheLine>,
    n: usize,
    kind: std::marker::PhantomData<T>,
}

impl<T: Copy> Aligned<T> {
    /// Copies; room up to the end of the last cache line is zeros.
    pub fn new(values: &[T]) -> Self {
        let mut lines = vec![CacheLine([0; 64]); size_of_val(values).div_ceil(64)];
        // SAFETY: there is room for them
        unsafe { lines.as_mut_ptr().cast::<T>().copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        Self { lines, n: values.len(), kind: std::marker::PhantomData }
    }

    /// Address of value `i`, with the right to read from there to the end.
    pub fn at(&self, i: usize) -> *const T {
        debug_assert!(i <= self.n);
        self.lines.as_ptr().cast::<T>().wrapping_add(i)
    }
}

/// Bytes that [`Arena::take`] uses for `n` values of `T`.
pub(crate) const fn room<T>(n: usize) -> usize {
    (n * size_of::<T>()).div_ceil(64) * 64
}
