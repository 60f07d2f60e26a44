//! llama-perplexity with caches that rows cannot hold, for docs/quality.md: first or last tokens in f16, other scales than one per
//! row and head group, other ways to choose them. Also counts codes, for their entropy.
//!
//! A static library that `tests/llama/ablations.cpp` is linked with. The linker's --wrap puts the functions below between
//! llama.cpp and the C ABI: tokens are kept as they came and as they would be rebuilt, both as floats, and attention reads the one or
//! the other. What it would take in bytes is counted, and the budget lowered until the total is the one that was asked for.
//!
//! A specification is a list of words, separated by commas:
//!   bits=B       stored bits per value in total, at most the projection file's own; 0: the file's own
//!   sinks=N      the first N tokens in f16
//!   window=N     the last N tokens before a query, itself included, in f16
//!   side=k|v     the tokens in f16 are so on this side alone
//!   scales=N     a scale per N latent channels instead of one per row and head group; 0: none
//!   scale=WORD   search (as the library does), max (nothing is clipped), rms (from the latent's energy)
//!   q4_0         llama.cpp's rotated q4_0 cache instead, after RoPE
//!   one=I        only row I is compressed: 2*layer + side, all others are f16

#![allow(clippy::missing_safety_doc, reason = "the contract is in include/palu.h")]

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use half::f16;
use palu::attention::AttnLayer;
use palu::capi::{AttnParams, Rope, Status, StoreParams};
use palu::codec::{SEARCH_PATIENCE, SEARCH_RATIO, SEARCH_REFINEMENTS};
use palu::convert::stats::RopeTable;
use palu::layout::{ROW_ALIGN, SCALE_BYTES, SEGMENT, STEP};
use palu::projection::{Group, Layer, Projection, Side, SideProj};
use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::ffi::{c_char, CStr};
use std::sync::{Arc, Mutex, OnceLock};

/// Tokens that the bytes of a cache are counted for: llama-perplexity's -c.
const N_CTX: f64 = 2048.0;
const Q4_0_BITS: f64 = 4.5;
const Q4_0_BLOCK: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Choice {
    Search,
    Max,
    Rms,
}

#[derive(Clone, Debug)]
struct Spec {
    bits: f64,
    sinks: usize,
    window: usize,
    side: Option<Side>,
    /// channels per scale; `None`: all of a head group
    scales: Option<usize>,
    choice: Choice,
    q4_0: bool,
    one: Option<usize>,
}

impl Spec {
    fn parse(text: &str) -> Option<Self> {
        let mut spec = Self { bits: 0.0, sinks: 0, window: 0, side: None, scales: None, choice: Choice::Search, q4_0: false, one: None };
        for word in text.split(',').filter(|w| !w.is_empty()) {
            match word.split_once('=').unwrap_or((word, "")) {
                ("bits", n) => spec.bits = n.parse().ok()?,
                ("sinks", n) => spec.sinks = n.parse().ok()?,
                ("window", n) => spec.window = n.parse().ok()?,
                ("side", "k") => spec.side = Some(Side::Key),
                ("side", "v") => spec.side = Some(Side::Value),
                ("scales", n) => spec.scales = Some(n.parse().ok()?),
                ("scale", "search") => spec.choice = Choice::Search,
                ("scale", "max") => spec.choice = Choice::Max,
                ("scale", "rms") => spec.choice = Choice::Rms,
                ("q4_0", "") => spec.q4_0 = true,
                ("one", n) => spec.one = Some(n.parse().ok()?),
                _ => return None,
            }
        }
        Some(spec)
    }

    fn n_scale(&self, group: &Group) -> usize {
        match self.scales {
            None => 1,
            Some(0) => 0,
            Some(n) => group.rank.div_ceil(n),
        }
    }

    fn row_bytes(&self, side: &SideProj) -> usize {
        let bytes = |g: &Group| SCALE_BYTES * self.n_scale(g) + g.bits.iter().map(|&b| b as usize).sum::<usize>();
        side.groups.iter().map(bytes).sum::<usize>().next_multiple_of(ROW_ALIGN)
    }

    /// Bits per value of a full context.
    fn total(&self, projection: &Projection) -> f64 {
        let (mut bits, mut values) = (0.0, 0.0);
        for side in projection.layers.iter().flat_map(|l| &l.sides) {
            let n = (side.n_head_kv * side.head_dim) as f64;
            let coded = if self.q4_0 { Q4_0_BITS * n } else { 8.0 * self.row_bytes(side) as f64 };
            let exact = if self.side.is_none_or(|s| s == side.side) { (self.sinks + self.window) as f64 } else { 0.0 };
            bits += ((N_CTX - exact) * coded + exact * 16.0 * n) / N_CTX;
            values += n;
        }
        bits / values
    }
}

static SPEC: OnceLock<Spec> = OnceLock::new();

fn spec() -> &'static Spec {
    SPEC.get().expect("the program sets it first")
}

/// Sets what is tried; 0 if it makes no sense.
///
/// # Safety
/// `text` must be a terminated string.
#[no_mangle]
pub unsafe extern "C" fn palu_ablation(text: *const c_char) -> i32 {
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    i32::from(Spec::parse(&text).is_some_and(|spec| SPEC.set(spec).is_ok()))
}

/// A head group's latents, coded.
struct Coder {
    group: Group,
    /// `[rank][d]`
    enc: Vec<f32>,
    dec: Vec<f32>,
    /// `[rank]`: (2^bits - 1)/2
    half: Vec<f32>,
    /// how often each code came, `[rank][256]`
    count: Mutex<Vec<u64>>,
}

impl Coder {
    fn new(group: &Group) -> Self {
        let floats = |x: &[f16]| x.iter().map(|v| v.to_f32()).collect();
        let half = (0..group.rank).map(|c| ((1u32 << group.bits[c / SEGMENT]) - 1) as f32 / 2.0).collect();
        Self { enc: floats(&group.enc), dec: floats(&group.dec), half, count: Mutex::new(vec![0; 256 * group.rank]), group: group.clone() }
    }

    /// Tokens `x` `[n][d]`, less the mean, to what is rebuilt of them.
    fn pass(&self, x: &[f32], out: &mut [f32]) {
        let rank = self.group.rank;
        if rank == 0 {
            return out.fill(0.0);
        }
        let d = self.enc.len() / rank;
        let n = x.len() / d;
        let mut z = vec![0f32; n * rank];
        product(&mut z, x, &self.enc, n, d, rank, true);
        let mut count = vec![0u64; 256 * rank];
        for z in z.chunks_exact_mut(rank) {
            z.iter_mut().zip(&self.group.step).for_each(|(z, s)| *z = if *s > 0.0 { *z / s } else { 0.0 });
            let per_scale = match spec().scales {
                None | Some(0) => rank,
                Some(n) => n,
            };
            for start in (0..rank).step_by(per_scale) {
                let channels = start..(start + per_scale).min(rank);
                let scale = self.scale(&z[channels.clone()], channels.start);
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                for c in channels {
                    let code = code(z[c], self.half[c], inverse);
                    count[256 * c + code as usize] += 1;
                    z[c] = (code - self.half[c]) * scale * self.group.step[c];
                }
            }
        }
        self.count.lock().expect("no thread panicked").iter_mut().zip(&count).for_each(|(a, b)| *a += b);
        product(out, &z, &self.dec, n, rank, d, false);
    }

    /// The scale of some channels from `first` on, which are in steps.
    fn scale(&self, y: &[f32], first: usize) -> f32 {
        let (half, step) = (&self.half[first..], &self.group.step[first..]);
        let rounded = |s: f32| f16::from_f32(s.min(f16::MAX.to_f32())).to_f32();
        let widest = y.iter().zip(half).fold(0f32, |top, (y, h)| top.max(y.abs() / (h + 0.5)));
        let error = |scale: f32| -> f32 {
            let inverse = 1.0 / scale;
            // eight sums, so that it vectorizes
            let mut sum = [0f32; 8];
            for ((y, half), step) in y.chunks(8).zip(half.chunks(8)).zip(step.chunks(8)) {
                for (i, ((&y, &h), &s)) in y.iter().zip(half).zip(step).enumerate() {
                    let e = (code(y, h, inverse) - h) * scale - y;
                    sum[i] += e * e * s * s;
                }
            }
            sum.iter().sum()
        };
        match spec().choice {
            _ if spec().scales == Some(0) => 1.0,
            Choice::Max => rounded(widest),
            Choice::Rms => {
                let bits = |i: usize| self.group.bits[(first + i) / SEGMENT] as usize;
                let energy: f32 = y.iter().zip(step).map(|(y, s)| y * y * s * s).sum();
                let expected: f32 = (0..y.len()).map(|i| (step[i] / STEP[bits(i)]).powi(2)).sum();
                rounded((energy / expected).sqrt())
            }
            Choice::Search => {
                let (mut best, mut least, mut worse) = (0.0, f32::INFINITY, 0);
                let mut scale = widest;
                while worse < SEARCH_PATIENCE && rounded(scale) > 0.0 {
                    let e = error(rounded(scale));
                    if e < least {
                        (best, least, worse) = (rounded(scale), e, 0);
                    } else {
                        worse += 1;
                    }
                    scale /= SEARCH_RATIO;
                }
                let mut ratio = SEARCH_RATIO.sqrt();
                for _ in 0..SEARCH_REFINEMENTS {
                    let middle = best;
                    for scale in [rounded(middle * ratio), rounded(middle / ratio)] {
                        if scale > 0.0 && error(scale) < least {
                            (best, least) = (scale, error(scale));
                        }
                    }
                    ratio = ratio.sqrt();
                }
                best
            }
        }
    }
}

fn code(y: f32, half: f32, inverse: f32) -> f32 {
    /// 1.5 * 2^23: the sum has no bits below the point, rounded to even
    const MAGIC: f32 = 12_582_912.0;
    ((y * inverse + half).max(0.0).min(2.0 * half) + MAGIC) - MAGIC
}

/// `out[n][m] = a[n][k] b`, b being `[m][k]` (`transposed`) or `[k][m]`.
fn product(out: &mut [f32], a: &[f32], b: &[f32], n: usize, k: usize, m: usize, transposed: bool) {
    let b = if transposed { MatRef::from_row_major_slice(b, m, k).transpose() } else { MatRef::from_row_major_slice(b, k, m) };
    matmul(MatMut::from_row_major_slice_mut(out, n, m), Accum::Replace, MatRef::from_row_major_slice(a, n, k), b, 1.0f32, Par::Seq);
    clear_vectors();
}

/// Wide registers that a matrix product leaves dirty make every scalar instruction after it wait.
fn clear_vectors() {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx") {
        // SAFETY: the processor has the instruction
        unsafe { std::arch::x86_64::_mm256_zeroupper() };
    }
}

/// A head through ggml's q4_0, in the basis of a Hadamard matrix, as llama.cpp stores it.
fn q4_0(x: &mut [f32]) {
    hadamard(x);
    for block in x.chunks_mut(Q4_0_BLOCK) {
        let top = block.iter().fold(0f32, |top, &v| if v.abs() > top.abs() { v } else { top });
        let inverse = if top != 0.0 { -8.0 / top } else { 0.0 };
        let scale = f16::from_f32(top / -8.0).to_f32();
        block.iter_mut().for_each(|v| *v = ((*v * inverse + 8.5).floor().min(15.0) - 8.0) * scale);
    }
    hadamard(x);
}

/// Its own inverse.
fn hadamard(x: &mut [f32]) {
    let n = x.len();
    assert!(n.is_power_of_two(), "heads of {n} dimensions are not rotated");
    let mut width = 1;
    while width < n {
        for start in (0..n).step_by(2 * width) {
            for i in start..start + width {
                (x[i], x[i + width]) = (x[i] + x[i + width], x[i] - x[i + width]);
            }
        }
        width *= 2;
    }
    x.iter_mut().for_each(|v| *v /= (n as f32).sqrt());
}

/// One side's tokens as floats, `[n_row][d]`.
struct Table(Vec<UnsafeCell<f32>>);

// SAFETY: threads write different rows, and none reads before all have written
unsafe impl Sync for Table {}

impl Table {
    fn new(n: usize) -> Self {
        Self((0..n).map(|_| UnsafeCell::new(0.0)).collect())
    }

    /// # Safety
    /// Nobody else may use the row meanwhile.
    unsafe fn set(&self, i: usize, x: &[f32]) {
        self.0[i * x.len()..(i + 1) * x.len()].iter().zip(x).for_each(|(cell, x)| unsafe { *cell.get() = *x });
    }

    /// # Safety
    /// Nobody may write them meanwhile.
    unsafe fn get(&self, start: usize, n: usize) -> impl Iterator<Item = f32> + '_ {
        self.0[start..start + n].iter().map(|cell| unsafe { *cell.get() })
    }
}

struct Cache {
    layer: Layer,
    rope: RopeTable,
    coders: [Vec<Coder>; 2],
    /// per side: what came, and what is rebuilt of it
    tables: [OnceLock<[Table; 2]>; 2],
}

static CACHES: Mutex<BTreeMap<usize, Arc<Cache>>> = Mutex::new(BTreeMap::new());

fn cache(layer: *const AttnLayer) -> Arc<Cache> {
    CACHES.lock().expect("no thread panicked")[&(layer as usize)].clone()
}

#[allow(improper_ctypes, reason = "opaque to C")]
unsafe extern "C" {
    fn __real_palu_proj_load(path: *const c_char, bits_per_value: f64, out: *mut *mut Projection) -> Status;
    fn __real_palu_proj_free(proj: *mut Projection);
    fn __real_palu_layer_create(proj: *const Projection, il: i32, rope: *const Rope, out: *mut *mut AttnLayer) -> Status;
}

#[no_mangle]
pub unsafe extern "C" fn __wrap_palu_proj_load(path: *const c_char, bits_per_value: f64, out: *mut *mut Projection) -> Status {
    let mut budget = bits_per_value;
    loop {
        let status = unsafe { __real_palu_proj_load(path, budget, out) };
        if status != Status::Ok {
            return status;
        }
        let projection = unsafe { &**out };
        let total = spec().total(projection);
        if spec().bits == 0.0 || spec().q4_0 || total <= spec().bits + 1e-9 {
            eprintln!("ablation: rows of {:.3} bits per value, in total {total:.3}, {:.1}% of f16", projection.bits_per_value, total / 0.16);
            return status;
        }
        budget = projection.bits_per_value - (total - spec().bits).max(0.002);
        unsafe { __real_palu_proj_free(*out) };
    }
}

#[no_mangle]
pub unsafe extern "C" fn __wrap_palu_proj_free(proj: *mut Projection) {
    let caches = std::mem::take(&mut *CACHES.lock().expect("no thread panicked"));
    // per bit width: channels, bits of entropy
    let mut widths = BTreeMap::<u8, (usize, f64)>::new();
    for coder in caches.values().flat_map(|c| &c.coders).flatten() {
        let count = coder.count.lock().expect("no thread panicked");
        for (c, count) in count.chunks_exact(256).enumerate() {
            let n: u64 = count.iter().sum();
            let p = count.iter().filter(|&&k| k > 0).map(|&k| k as f64 / n as f64);
            let width = widths.entry(coder.group.bits[c / SEGMENT]).or_default();
            *width = (width.0 + 1, width.1 - p.map(|p| p * p.log2()).sum::<f64>());
        }
    }
    for (bits, (n, entropy)) in &widths {
        eprintln!("ablation: {n} channels of {bits} bits, entropy {:.3}", entropy / *n as f64);
    }
    let (bits, entropy) = widths.iter().fold((0.0, 0.0), |(b, e), (bits, (n, entropy))| (b + *bits as f64 * *n as f64, e + entropy));
    eprintln!("ablation: codes of {bits} bits per token, entropy {entropy:.0}");
    unsafe { __real_palu_proj_free(proj) }
}

#[no_mangle]
pub unsafe extern "C" fn __wrap_palu_layer_create(proj: *const Projection, il: i32, rope: *const Rope, out: *mut *mut AttnLayer) -> Status {
    let status = unsafe { __real_palu_layer_create(proj, il, rope, out) };
    if status == Status::Ok {
        let layer = unsafe { &*proj }.layer(il as usize).expect("it was just made").clone();
        let rope = unsafe { &*rope }.params().expect("it was just used");
        let coders = [0, 1].map(|side: usize| layer.sides[side].groups.iter().map(Coder::new).collect());
        let cache = Cache { layer, rope: RopeTable::new(&rope, N_CTX as usize), coders, tables: Default::default() };
        CACHES.lock().expect("no thread panicked").insert(unsafe { *out } as usize, Arc::new(cache));
    }
    status
}

#[no_mangle]
pub unsafe extern "C" fn __wrap_palu_store(layer: *const AttnLayer, params: *const StoreParams, ith: i32, nth: i32) -> Status {
    clear_vectors();
    let cache = cache(layer);
    let p = unsafe { &*params };
    let side = &cache.layer.sides[p.side as usize];
    let (hd, d) = (side.head_dim, side.n_head_kv * side.head_dim);
    let empty = || Table::new(p.n_row as usize * d);
    let [came, rebuilt] = cache.tables[p.side as usize].get_or_init(|| [empty(), empty()]);
    let n_token = p.n_token as usize;
    let tokens: Vec<usize> = (n_token * ith as usize / nth as usize..n_token * (ith + 1) as usize / nth as usize).collect();
    let mut x = Vec::with_capacity(tokens.len() * d);
    for &t in &tokens {
        for h in 0..side.n_head_kv {
            let head = unsafe { p.x.cast::<u8>().add(t * p.x_nb_token + h * p.x_nb_head).cast::<f32>() };
            x.extend_from_slice(unsafe { std::slice::from_raw_parts(head, hd) });
        }
    }
    let mut y = vec![0f32; x.len()];
    for (group, coder) in side.groups.iter().zip(&cache.coders[p.side as usize]) {
        let channels = group.head0 * hd..(group.head0 + group.n_head) * hd;
        let mean = &side.mean[channels.clone()];
        let part: Vec<f32> = x.chunks_exact(d).flat_map(|x| x[channels.clone()].iter().zip(mean).map(|(x, m)| x - m)).collect();
        let mut out = vec![0f32; part.len()];
        coder.pass(&part, &mut out);
        for (y, out) in y.chunks_exact_mut(d).zip(out.chunks_exact(channels.len())) {
            y[channels.clone()].iter_mut().zip(out).zip(mean).for_each(|((y, o), m)| *y = o + m);
        }
    }
    let as_it_is = spec().q4_0 || spec().one.is_some_and(|row| row != 2 * cache.layer.il + p.side as usize);
    for (i, &t) in tokens.iter().enumerate() {
        let (x, y) = (&x[i * d..][..d], &y[i * d..][..d]);
        let at = unsafe { *p.idxs.add(t) } as usize;
        unsafe {
            came.set(at, x);
            rebuilt.set(at, if as_it_is { x } else { y });
        }
    }
    Status::Ok
}

/// Rounded as an f16 cache does.
fn round(x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32());
}

#[no_mangle]
pub unsafe extern "C" fn __wrap_palu_attn(layer: *const AttnLayer, params: *const AttnParams, ith: i32, nth: i32) -> Status {
    clear_vectors();
    let cache = cache(layer);
    let [k, v] = &cache.layer.sides;
    let p = unsafe { &*params }.check(k.n_head_kv).expect("llama.cpp's parameters");
    assert!(p.n_stream == 1 && p.softcap == 0.0 && p.max_bias == 0.0 && p.sinks.is_null() && !p.mask.is_null(), "only plain attention of one stream");
    let (Some(keys), Some(values)) = (cache.tables[0].get(), cache.tables[1].get()) else { return Status::Internal };
    let (dk, dv, rep) = (k.head_dim, v.head_dim, p.n_head / k.n_head_kv);
    let pos = unsafe { std::slice::from_raw_parts(p.pos, p.n_kv) };
    let hidden = |t: usize, s: usize| -> bool {
        let row = unsafe { p.mask.add(t * p.mask_nb_token) };
        if p.mask_f16 {
            unsafe { *row.cast::<u16>().add(s) == f16::NEG_INFINITY.to_bits() }
        } else {
            unsafe { *row.cast::<f32>().add(s) == f32::NEG_INFINITY }
        }
    };
    let both = spec().sinks + spec().window > 0;
    for g in (ith as usize..k.n_head_kv).step_by(nth as usize) {
        // [came, rebuilt], [n_kv][dim]
        let tables = |tables: &[Table; 2], dim: usize, rope: bool| {
            [0, 1].map(|which: usize| {
                let mut out = Vec::with_capacity(p.n_kv * dim);
                for (s, &at) in pos.iter().enumerate() {
                    let start = out.len();
                    out.extend(unsafe { tables[which].get((s * k.n_head_kv + g) * dim, dim) });
                    if rope {
                        cache.rope.rotate(&mut out[start..], at);
                    }
                    if which == 1 && spec().q4_0 {
                        q4_0(&mut out[start..]);
                    } else if which == 0 || spec().one.is_some() {
                        round(&mut out[start..]);
                    }
                }
                out
            })
        };
        let (keys, values) = (tables(keys, dk, true), tables(values, dv, false));
        let mut q = Vec::with_capacity(p.n_token * rep * dk);
        for t in 0..p.n_token {
            for h in g * rep..(g + 1) * rep {
                let head = unsafe { p.q.cast::<u8>().add(t * p.q_nb_token + h * p.q_nb_head).cast::<f32>() };
                q.extend_from_slice(unsafe { std::slice::from_raw_parts(head, dk) });
            }
        }
        let n = p.n_token * rep;
        let mut scores = [vec![0f32; if both { n * p.n_kv } else { 0 }], vec![0f32; n * p.n_kv]];
        for which in usize::from(!both)..2 {
            product(&mut scores[which], &q, &keys[which], n, dk, p.n_kv, true);
        }
        let [exact, coded] = &mut scores;
        for i in 0..n {
            let t = i / rep;
            let seen: Vec<usize> = (0..p.n_kv).filter(|&s| !hidden(t, s)).collect();
            let now = seen.iter().map(|&s| pos[s]).max().unwrap_or(0);
            let is_exact = |s: usize| both && ((pos[s] as usize) < spec().sinks || ((now - pos[s]) as usize) < spec().window);
            let row = i * p.n_kv;
            let is_exact_in = |s: usize, side: Side| spec().side.is_none_or(|only| only == side) && is_exact(s);
            let score = |s: usize| p.scale * if is_exact_in(s, Side::Key) { exact[row + s] } else { coded[row + s] };
            let weights: Vec<f32> = seen.iter().map(|&s| score(s)).collect();
            let max = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            // what is below e^-20 of the largest is less than rounding
            let weights: Vec<f32> = weights.iter().map(|w| if w - max > -20.0 { (w - max).exp() } else { 0.0 }).collect();
            let total: f32 = weights.iter().sum();
            coded[row..row + p.n_kv].fill(0.0);
            if both {
                exact[row..row + p.n_kv].fill(0.0);
            }
            for (&s, w) in seen.iter().zip(&weights) {
                let to = if is_exact_in(s, Side::Value) { &mut *exact } else { &mut *coded };
                to[row + s] = w / total;
            }
        }
        let mut sum = vec![0f32; n * dv];
        let mut part = vec![0f32; n * dv];
        for which in usize::from(!both)..2 {
            product(&mut part, &scores[which], &values[which], n, p.n_kv, dv, false);
            sum.iter_mut().zip(&part).for_each(|(s, x)| *s += x);
        }
        for i in 0..n {
            let (t, h) = (i / rep, g * rep + i % rep);
            let out = unsafe { std::slice::from_raw_parts_mut(p.out.add((t * p.n_head + h) * dv), dv) };
            out.copy_from_slice(&sum[i * dv..][..dv]);
        }
    }
    Status::Ok
}

#[no_mangle]
pub unsafe extern "C" fn __wrap_palu_attn_n_chunk(_: *const AttnLayer, _: i32, _: i32, _: i32, _: i32) -> i32 {
    1
}

#[no_mangle]
pub unsafe extern "C" fn __wrap_palu_attn_combine(_: *const AttnLayer, _: *const AttnParams, _: i32, _: i32) -> Status {
    Status::Ok
}
