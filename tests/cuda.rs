//! The CUDA path against the CPU path, on the GPU. Without one, every test says so on stderr and passes.
#![cfg(feature = "cuda")]
#![allow(
    clippy::explicit_write,
    reason = "a skipped test is to be seen, and the test runner keeps eprintln! to itself"
)]

mod common;

use common::{random_side, Random, RecentCase};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DeviceRepr};
use half::f16;
use palu::attention::{extra_row, AttnLayer, AttnParams, RebuildParams};
use palu::codec::StoreParams;
use palu::cuda::{AttnStep, CudaLayer, Device, StoreStep};
use palu::projection::{Layer, Side, SIDES};
use palu::recent::RecentParams;
use palu::rope::{RopeKind, RopeParams};
use std::io::Write;
use std::sync::Arc;

/// A stream of the first GPU, or a line that says why there is none.
fn gpu(test: &str) -> Option<Arc<CudaStream>> {
    match Device::get(0) {
        Ok(_) => Some(CudaContext::new(0).unwrap().new_stream().unwrap()),
        Err(e) => {
            assert!(std::env::var_os("PALU_TEST_GPU").is_none(), "PALU_TEST_GPU is set: {e:#}");
            writeln!(std::io::stderr(), "skipped {test}: {e:#}").unwrap();
            None
        }
    }
}

/// Device memory with a canary behind it.
struct Buffer<T> {
    slice: CudaSlice<T>,
    stream: Arc<CudaStream>,
    n: usize,
}

impl<T: DeviceRepr + Copy + PartialEq + std::fmt::Debug> Buffer<T> {
    const CANARY: usize = 64;

    fn new(stream: &Arc<CudaStream>, values: &[T], canary: T) -> Self {
        let mut all = values.to_vec();
        all.resize(values.len() + Self::CANARY, canary);
        Self { slice: stream.clone_htod(&all).unwrap(), stream: stream.clone(), n: values.len() }
    }

    fn at(&self) -> *mut T {
        self.slice.device_ptr(&self.stream).0 as *mut T
    }

    fn read(&self, canary: T) -> Vec<T> {
        let mut all = self.stream.clone_dtoh(&self.slice).unwrap();
        self.stream.synchronize().unwrap();
        assert!(
            all[self.n..].iter().all(|x| *x == canary || format!("{x:?}") == format!("{canary:?}")),
            "written beyond the end"
        );
        all.truncate(self.n);
        all
    }
}

#[derive(Clone, Debug)]
struct Case {
    n_head: usize,
    n_head_kv: usize,
    group_k: usize,
    group_v: usize,
    dim_k: usize,
    dim_v: usize,
    bits_k: Vec<u8>,
    bits_v: Vec<u8>,
    rope: RopeParams,
    n_token: usize,
    n_stream: usize,
    n_kv: usize,
    mask_f16: bool,
    /// every token has its own cells
    own: bool,
    far: bool,
    sinks: bool,
    softcap: f32,
    max_bias: f32,
}

fn rope(kind: RopeKind, n_rot: usize) -> RopeParams {
    RopeParams { kind, n_rot, ..RopeParams::none() }
}

/// `n` segments whose bits fall from `first` to `last`.
fn falling(n: usize, first: u8, last: u8) -> Vec<u8> {
    (0..n)
        .map(|i| (f64::from(first) + (f64::from(last) - f64::from(first)) * i as f64 / (n - 1) as f64).round() as u8)
        .collect()
}

impl Default for Case {
    fn default() -> Self {
        Self {
            n_head: 32,
            n_head_kv: 8,
            group_k: 8,
            group_v: 8,
            dim_k: 128,
            dim_v: 128,
            bits_k: falling(52, 6, 3),
            bits_v: falling(70, 6, 3),
            rope: rope(RopeKind::Norm, 128),
            n_token: 1,
            n_stream: 1,
            n_kv: 500,
            mask_f16: true,
            own: false,
            far: false,
            sinks: false,
            softcap: 0.0,
            max_bias: 0.0,
        }
    }
}

fn cases() -> Vec<Case> {
    let mha = Case {
        n_head: 8,
        n_head_kv: 8,
        group_k: 4,
        group_v: 4,
        bits_k: falling(24, 5, 2),
        bits_v: falling(30, 5, 1),
        ..Case::default()
    };
    let small = Case {
        n_head: 6,
        n_head_kv: 6,
        group_k: 6,
        group_v: 6,
        dim_k: 64,
        dim_v: 64,
        bits_k: falling(20, 6, 1),
        bits_v: falling(24, 7, 1),
        rope: rope(RopeKind::Neox, 64),
        ..Case::default()
    };
    let yarn = RopeParams {
        ext_factor: 1.0,
        freq_scale: 0.25,
        n_ctx_orig: 4096,
        freq_factors: (0..32).map(|i| 1.0 + i as f32 / 8.0).collect(),
        ..rope(RopeKind::Neox, 64)
    };
    vec![
        Case::default(),
        Case { n_kv: 2000, far: true, ..Case::default() },
        Case { n_token: 3, n_stream: 2, n_kv: 317, ..Case::default() },
        // rows of the second stream begin anywhere
        Case { n_stream: 2, n_kv: 317, ..Case::default() },
        // contexts that clusters share: streams, tokens, both, two tokens at a time; more tiles than clusters, so that some have two contexts
        Case { n_stream: 8, n_kv: 320, sinks: true, ..Case::default() },
        Case { n_token: 5, n_kv: 1100, own: true, far: true, ..Case::default() },
        Case { n_token: 4, n_stream: 3, n_kv: 256, own: true, mask_f16: false, ..Case::default() },
        Case { n_head: 16, n_token: 2, n_stream: 4, n_kv: 576, ..Case::default() },
        Case { n_token: 17, mask_f16: false, sinks: true, ..Case::default() },
        mha.clone(),
        Case { n_stream: 3, n_kv: 300, sinks: true, softcap: 20.0, ..mha.clone() },
        Case { group_k: 1, group_v: 2, n_token: 5, bits_k: falling(9, 6, 2), bits_v: falling(16, 5, 2), ..mha.clone() },
        small.clone(),
        Case { n_token: 21, max_bias: 8.0, ..small.clone() },
        Case { rope: yarn, far: true, n_token: 2, ..small.clone() },
        Case { rope: rope(RopeKind::Norm, 32), n_token: 4, mask_f16: false, ..small.clone() },
        Case { rope: RopeParams::none(), bits_k: falling(3, 8, 8), ..small.clone() },
        // decoders of 16 bits
        Case { bits_k: falling(40, 8, 5), bits_v: falling(44, 8, 5), ..small.clone() },
        Case {
            dim_k: 256,
            dim_v: 256,
            n_head: 8,
            n_head_kv: 2,
            group_k: 2,
            group_v: 1,
            rope: rope(RopeKind::Neox, 256),
            n_token: 2,
            ..mha.clone()
        },
        Case {
            dim_k: 96,
            dim_v: 64,
            n_head: 12,
            n_head_kv: 4,
            group_k: 4,
            group_v: 4,
            rope: rope(RopeKind::Neox, 48),
            ..mha.clone()
        },
        // nothing kept in some groups
        Case { bits_k: vec![4], bits_v: vec![5, 3], group_k: 2, group_v: 2, ..small.clone() },
        Case { n_kv: 1500, bits_k: falling(60, 6, 2), bits_v: falling(90, 6, 2), ..Case::default() },
        // one query row per head and few channels: slow pairs are interpolated
        Case {
            bits_k: falling(16, 4, 2),
            bits_v: falling(48, 4, 2),
            rope: rope(RopeKind::Neox, 128),
            n_kv: 1000,
            far: true,
            ..mha.clone()
        },
        Case {
            bits_k: falling(13, 5, 1),
            bits_v: falling(41, 7, 1),
            rope: rope(RopeKind::Norm, 64),
            n_stream: 2,
            n_kv: 777,
            mask_f16: false,
            sinks: true,
            max_bias: 8.0,
            ..mha.clone()
        },
    ]
}

fn error(got: &[f32], want: &[f32]) -> f64 {
    let (mut e2, mut w2) = (0.0, 0.0);
    for (&g, &w) in got.iter().zip(want) {
        e2 += (f64::from(g) - f64::from(w)).powi(2);
        w2 += f64::from(w).powi(2);
    }
    (e2 / w2).sqrt()
}

struct Setup {
    layer: Layer,
    cpu: AttnLayer,
    gpu: CudaLayer,
    random: Random,
}

impl Case {
    fn setup(&self, seed: u64) -> Setup {
        let mut random = Random(seed * 31 + 7);
        let k = random_side(&mut random, Side::Key, self.n_head_kv, self.group_k, self.dim_k, &self.bits_k, 0);
        let v = random_side(&mut random, Side::Value, self.n_head_kv, self.group_v, self.dim_v, &self.bits_v, 1);
        let layer = Layer { il: 0, sides: [k, v] };
        let cpu = AttnLayer::new(&layer, &self.rope).unwrap();
        let gpu = CudaLayer::new(&layer, &self.rope, 0).unwrap();
        Setup { layer, cpu, gpu, random }
    }

    /// Rows made by the CPU.
    fn rows(&self, s: &mut Setup) -> [Vec<u8>; 2] {
        SIDES.map(|side| {
            let p = s.layer.side(side);
            let x = s.random.tokens(p, self.n_stream * self.n_kv);
            let mut rows = vec![0; self.n_stream * self.n_kv * p.row_bytes];
            s.cpu.codec(side).encode_rows(&x, &mut rows);
            rows
        })
    }

    fn positions(&self) -> Vec<i32> {
        let first = if self.far { 120_000 } else { 0 };
        // a shift in the middle, as after a part of a conversation was removed
        (0..self.n_stream * self.n_kv)
            .map(|i| first + (i % self.n_kv) as i32 + if self.far && i % self.n_kv > 400 { 41 } else { 0 })
            .collect()
    }
}

#[test]
fn rows_are_stored_as_on_the_cpu() {
    let Some(stream) = gpu("rows_are_stored_as_on_the_cpu") else { return };
    for (i, case) in cases().iter().enumerate() {
        let mut s = case.setup(i as u64);
        for (side, n_token) in SIDES.into_iter().flat_map(|side| [1, 3, 70].map(|n| (side, n))) {
            let p = s.layer.side(side);
            let d = p.n_head_kv * p.head_dim;
            let mut x = s.random.tokens(p, n_token);
            if n_token == 3 {
                x[d + 5] = f32::NAN;
            }
            let n_row = n_token + 9;
            let idxs: Vec<i64> = (0..n_token as i64).map(|t| (t * 5 + 2) % n_row as i64).collect();
            let unique: std::collections::BTreeSet<_> = idxs.iter().collect();
            if unique.len() < n_token {
                continue;
            }
            let mut want = vec![0xa5u8; n_row * p.row_bytes];
            let params = StoreParams {
                x: x.as_ptr(),
                x_nb_head: 4 * p.head_dim,
                x_nb_token: 4 * d,
                idxs: idxs.as_ptr(),
                rows: want.as_mut_ptr(),
                n_token,
            };
            // SAFETY: shapes as above
            unsafe { s.cpu.store(side, &params, 0, 1) };

            let (gx, gi) = (Buffer::new(&stream, &x, f32::NAN), Buffer::new(&stream, &idxs, -1));
            let rows = Buffer::new(&stream, &vec![0xa5u8; n_row * p.row_bytes], 0xa5);
            let latent = Buffer::new(&stream, &vec![f32::NAN; s.gpu.latent_size(side, n_token)], f32::NAN);
            let params = StoreParams { x: gx.at(), idxs: gi.at(), rows: rows.at(), ..params };
            for step in [StoreStep::Project { beside: None }, StoreStep::Quantize { beside: None }] {
                // SAFETY: shapes as above, on the device
                unsafe { s.gpu.store(&[(side, params)], latent.at(), step, stream.cu_stream().cast()) }.unwrap();
            }
            let got = rows.read(0xa5);
            // sums are added in another order: a latent between two codes may fall to the other one, or a scale to its neighbour
            let [a, b] = [&got, &want].map(|rows| {
                let mut x = vec![0.0; n_row * d];
                s.cpu.codec(side).decode_rows(rows, &mut x);
                x
            });
            for t in 0..n_row {
                let (a, b) = (&a[t * d..][..d], &b[t * d..][..d]);
                if idxs.contains(&(t as i64)) {
                    let is_bad = n_token == 3 && idxs[1] == t as i64 && p.groups[0].rank > 0;
                    assert_eq!(is_bad, a.iter().any(|x| x.is_nan()), "{case:?} {side:?} {n_token} tokens: row {t}");
                    assert!(
                        is_bad || error(a, b) < 2e-2,
                        "{case:?} {side:?} {n_token} tokens: row {t}: {}",
                        error(a, b)
                    );
                } else {
                    assert_eq!(
                        got[t * p.row_bytes..][..p.row_bytes],
                        want[t * p.row_bytes..][..p.row_bytes],
                        "row {t} is not to be touched"
                    );
                }
            }
            let same = got.chunks(p.row_bytes).zip(want.chunks(p.row_bytes)).filter(|(a, b)| a == b).count();
            assert!(same * 10 >= n_row * 8, "{case:?} {side:?}: only {same} of {n_row} rows are the same");
        }
    }
}

#[test]
fn rebuilt_rows_are_those_of_the_cpu() {
    let Some(stream) = gpu("rebuilt_rows_are_those_of_the_cpu") else { return };
    for (i, case) in cases().iter().enumerate() {
        let mut s = case.setup(100 + i as u64);
        let rows = case.rows(&mut s);
        let pos = case.positions();
        for side in SIDES {
            let p = s.layer.side(side);
            // every other case with slots, tokens and zeros behind the rows
            let [n_slot, n_token, n_pad] = if i % 2 == 0 { [16, case.n_token, 5] } else { [0; 3] };
            let width = p.n_head_kv * p.head_dim;
            let n = case.n_stream * (case.n_kv + n_slot + n_token + n_pad) * width;
            let slots: Vec<u16> = (0..case.n_stream * n_slot * width).map(|_| f16::from_f32(s.random.normal() as f32).to_bits()).collect();
            let cur: Vec<f32> = (0..case.n_stream * n_token * width).map(|_| s.random.normal() as f32).collect();
            let mut want = vec![0x7e00u16; n];
            let rows = &rows[side as usize];
            let params = RebuildParams {
                slots: slots.as_ptr(),
                n_slot,
                cur: cur.as_ptr(),
                cur_nb_head: 4 * p.head_dim,
                cur_nb_token: 4 * width,
                n_token,
                n_pad,
                ..RebuildParams::of_rows(
                    rows.as_ptr(),
                    case.n_kv * p.row_bytes,
                    pos.as_ptr(),
                    want.as_mut_ptr(),
                    case.n_stream,
                    case.n_kv,
                )
            };
            // SAFETY: shapes as above
            unsafe { s.cpu.rebuild(side, &params, 0, 1) };
            let (rows, pos) = (Buffer::new(&stream, rows, 0), Buffer::new(&stream, &pos, 0));
            let (slots, cur) = (Buffer::new(&stream, &slots, 0x7e00), Buffer::new(&stream, &cur, f32::NAN));
            let out = Buffer::new(&stream, &vec![0x7e00u16; n], 0x7e00);
            let params = RebuildParams { rows: rows.at(), pos: pos.at(), out: out.at(), slots: slots.at(), cur: cur.at(), ..params };
            // SAFETY: shapes as above, on the device
            unsafe { s.gpu.rebuild(side, &params, stream.cu_stream().cast()) }.unwrap();
            let float = |x: Vec<u16>| x.into_iter().map(|x| f16::from_bits(x).to_f32()).collect::<Vec<_>>();
            let e = error(&float(out.read(0x7e00)), &float(want));
            assert!(e < 4e-4, "{case:?} {side:?}: {e}");
        }
    }
}

#[test]
fn attention_is_that_of_the_cpu() {
    let Some(stream) = gpu("attention_is_that_of_the_cpu") else { return };
    for (i, case) in cases().iter().enumerate() {
        let mut s = case.setup(200 + i as u64);
        let mut rows = case.rows(&mut s);
        let mut pos = case.positions();
        let mut mask = vec![0.0f32; case.n_stream * case.n_token * case.n_kv];
        for (at, m) in mask.iter_mut().enumerate() {
            let (c, t) = (at % case.n_kv, at / case.n_kv % case.n_token);
            let future = c + case.n_token > case.n_kv + t;
            let hidden = future || (200..290).contains(&c) || s.random.below(10) == 0 || (case.n_token == 5 && t == 2) || (case.own && c / 97 % case.n_token != t);
            *m = if hidden {
                f32::NEG_INFINITY
            } else if case.max_bias > 0.0 {
                c as f32 - case.n_kv as f32
            } else {
                0.0
            };
        }
        // cells that no query sees hold garbage
        for c in 0..case.n_stream * case.n_kv {
            let (stream, cell) = (c / case.n_kv, c % case.n_kv);
            if (0..case.n_token).all(|t| mask[(stream * case.n_token + t) * case.n_kv + cell] == f32::NEG_INFINITY) {
                for (rows, p) in rows.iter_mut().zip(&s.layer.sides) {
                    rows[c * p.row_bytes..][..p.row_bytes].fill(0xff);
                }
                pos[c] = -1;
            }
        }
        let mask16: Vec<u16> = mask.iter().map(|&m| f16::from_f32(m).to_bits()).collect();
        let q: Vec<f32> =
            (0..case.n_stream * case.n_token * case.n_head * case.dim_k).map(|_| s.random.normal() as f32).collect();
        let sinks: Vec<f32> = (0..case.n_head).map(|_| s.random.normal() as f32).collect();
        let n_out = case.n_stream * case.n_token * case.n_head * case.dim_v;
        let mut extra = Vec::new();
        for row in 0..n_out / case.dim_v {
            let top = if row % 3 == 1 { f32::NEG_INFINITY } else { 3.0 * s.random.normal() as f32 };
            extra.extend([top, if row % 3 == 1 { 0.0 } else { 1.7 }, f32::NAN, f32::NAN]);
            extra.extend((4..extra_row(case.dim_v)).map(|_| if row % 3 == 1 { 0.0 } else { s.random.normal() as f32 }));
        }
        let mut want = vec![f32::NAN; n_out];
        let shapes = [case.n_head, case.n_token, case.n_stream, case.n_kv];
        let mut partial = vec![f32::NAN; s.cpu.partial_size(shapes[0], shapes[1], shapes[2], shapes[3])];
        let size = if case.mask_f16 { 2 } else { 4 };
        let params = AttnParams {
            q: q.as_ptr(),
            q_nb_head: 4 * case.dim_k,
            q_nb_token: 4 * case.dim_k * case.n_head,
            q_nb_stream: 4 * case.dim_k * case.n_head * case.n_token,
            rows_k: rows[0].as_ptr(),
            rows_v: rows[1].as_ptr(),
            rows_k_nb_stream: s.layer.sides[0].row_bytes * case.n_kv,
            rows_v_nb_stream: s.layer.sides[1].row_bytes * case.n_kv,
            mask: if case.mask_f16 { mask16.as_ptr().cast() } else { mask.as_ptr().cast() },
            mask_nb_token: size * case.n_kv,
            mask_nb_stream: size * case.n_kv * case.n_token,
            mask_f16: case.mask_f16,
            pos: pos.as_ptr(),
            sinks: if case.sinks { sinks.as_ptr() } else { std::ptr::null() },
            extra: if i % 2 == 0 { extra.as_ptr() } else { std::ptr::null() },
            partial: partial.as_mut_ptr(),
            out: want.as_mut_ptr(),
            n_head: case.n_head,
            n_token: case.n_token,
            n_stream: case.n_stream,
            n_kv: case.n_kv,
            scale: 1.0 / (case.dim_k as f32).sqrt(),
            softcap: case.softcap,
            max_bias: case.max_bias,
        };
        // SAFETY: shapes as above
        unsafe {
            s.cpu.attend(&params, 0, 1);
            s.cpu.combine(&params, 0, 1);
        }
        let (gq, gpos, gsinks) =
            (Buffer::new(&stream, &q, f32::NAN), Buffer::new(&stream, &pos, 0), Buffer::new(&stream, &sinks, f32::NAN));
        let (gk, gv) = (Buffer::new(&stream, &rows[0], 0xff), Buffer::new(&stream, &rows[1], 0xff));
        let gextra = Buffer::new(&stream, &extra, f32::NAN);
        let (m16, m32) = (Buffer::new(&stream, &mask16, 0), Buffer::new(&stream, &mask, f32::NAN));
        let partial = Buffer::new(&stream, &vec![f32::NAN; s.gpu.partial_size(shapes).unwrap()], f32::NAN);
        let out = Buffer::new(&stream, &vec![f32::NAN; n_out], f32::NAN);
        let params = AttnParams {
            q: gq.at(),
            rows_k: gk.at(),
            rows_v: gv.at(),
            mask: if case.mask_f16 { m16.at().cast() } else { m32.at().cast() },
            pos: gpos.at(),
            sinks: if case.sinks { gsinks.at() } else { std::ptr::null() },
            extra: if i % 2 == 0 { gextra.at() } else { std::ptr::null() },
            partial: partial.at(),
            out: out.at(),
            ..params
        };
        for step in [AttnStep::Chunks { beside: false }, AttnStep::Combine] {
            // SAFETY: shapes as above, on the device
            unsafe { s.gpu.attend(&params, step, stream.cu_stream().cast()) }.unwrap();
        }
        let e = error(&out.read(f32::NAN), &want);
        partial.read(f32::NAN); // nothing behind it was written
        // keys, queries and weights in f16 on the GPU
        assert!(e < 2e-3, "{case:?}: {e}");
    }
}

#[test]
fn recent_tokens_are_those_of_the_cpu() {
    let Some(stream) = gpu("recent_tokens_are_those_of_the_cpu") else { return };
    let gpu = cases()[0].setup(300).gpu;
    for (i, case) in RecentCase::all().iter().enumerate() {
        let x = case.inputs(&mut Random(i as u64 + 9));
        let n_out = case.n_stream * case.n_token * case.n_head * extra_row(case.head_dim[1]);
        for attends in [true, false] {
            let (q, idxs) = (Buffer::new(&stream, &x.q, f32::NAN), Buffer::new(&stream, &x.idxs, 0));
            let cur = [0, 1].map(|side| Buffer::new(&stream, &x.cur[side], f32::NAN));
            let slots = [0, 1].map(|side| Buffer::new(&stream, &x.slots[side], 0x7e00));
            let out = Buffer::new(&stream, &vec![f32::NAN; n_out], f32::NAN);
            let (cur_at, slots_at) = ([cur[0].at().cast_const(), cur[1].at()], [slots[0].at(), slots[1].at()]);
            let p = case.params(q.at(), cur_at, slots_at, idxs.at(), if attends { out.at() } else { std::ptr::null_mut() });
            // SAFETY: the shapes are those of the case, on the device
            unsafe { gpu.recent(&p, false, stream.cu_stream().cast()) }.unwrap();
            let (got, stored) = (out.read(f32::NAN), [slots[0].read(0x7e00), slots[1].read(0x7e00)]);
            if attends {
                case.check(&x, &got);
            } else {
                assert!(got.iter().all(|x| x.is_nan()));
            }
            assert!(stored == case.stored(&x), "slots of {case:?}");
        }
    }
}

/// What a sequence of decoded tokens leaves behind.
struct Decoded {
    rows: [Vec<u8>; 2],
    slots: [Vec<u16>; 2],
    out: Vec<Vec<f32>>,
}

impl Case {
    /// Decodes tokens one after the other, all launches in one go: stored before attention reads the rows, or beside it.
    fn decode(&self, s: &mut Setup, stream: &Arc<CudaStream>, beside: bool) -> Decoded {
        const STEPS: usize = 40;
        const RECENT: usize = 16;
        let seed = s.random.0;
        let (n_stream, n_kv) = (self.n_stream, self.n_kv);
        // not all of them anew: the CPU takes a millisecond for each
        let rows = Case { n_stream: 1, n_kv: 67, ..self.clone() }.rows(s);
        let rows = [0, 1].map(|i| {
            rows[i].iter().copied().cycle().take(n_stream * n_kv * s.layer.sides[i].row_bytes).collect::<Vec<u8>>()
        });
        let grows = [0, 1].map(|i| Buffer::new(stream, &rows[i], 0xa5));
        let pos = Buffer::new(stream, &self.positions(), 0);
        let width = [self.n_head_kv * self.dim_k, self.n_head_kv * self.dim_v];
        let slots = width.map(|w| Buffer::new(stream, &vec![0u16; n_stream * RECENT * w], 0x7e00));
        let sizes = SIDES.map(|side| s.gpu.latent_size(side, n_stream));
        let latent = Buffer::new(stream, &vec![f32::NAN; sizes[0] + sizes[1]], f32::NAN);
        let shapes = [self.n_head, 1, n_stream, n_kv];
        let partial = Buffer::new(stream, &vec![f32::NAN; s.gpu.partial_size(shapes).unwrap()], f32::NAN);
        let extra = Buffer::new(stream, &vec![f32::NAN; n_stream * self.n_head * extra_row(self.dim_v)], f32::NAN);
        let first = n_kv - STEPS;
        struct Step {
            q: Buffer<f32>,
            cur: [Buffer<f32>; 2],
            idxs: Buffer<i64>,
            recent: Buffer<i32>,
            mask: Buffer<f32>,
            out: Buffer<f32>,
        }
        let normal = |random: &mut Random, n: usize| (0..n).map(|_| random.normal() as f32).collect::<Vec<_>>();
        let steps: Vec<Step> = (0..STEPS)
            .map(|i| {
                let (mut idxs, mut recent, mut mask) = (Vec::new(), Vec::new(), Vec::new());
                for st in 0..n_stream {
                    idxs.push((st * n_kv + first + i) as i64);
                    // token i goes to slot i%RECENT and is the first of its own last ones
                    recent.extend((0..RECENT).map(|d| if d == 0 { RECENT as i32 } else if d <= i { ((i - d) % RECENT) as i32 } else { -1 }));
                    recent.push((i % RECENT) as i32);
                    mask.extend((0..n_kv).map(|c| if c + RECENT.min(i + 1) > first + i { f32::NEG_INFINITY } else { 0.0 }));
                }
                Step {
                    q: Buffer::new(stream, &normal(&mut s.random, n_stream * self.n_head * self.dim_k), f32::NAN),
                    cur: width.map(|w| Buffer::new(stream, &normal(&mut s.random, n_stream * w), f32::NAN)),
                    idxs: Buffer::new(stream, &idxs, -1),
                    recent: Buffer::new(stream, &recent, 0),
                    mask: Buffer::new(stream, &mask, f32::NAN),
                    out: Buffer::new(stream, &vec![f32::NAN; n_stream * self.n_head * self.dim_v], f32::NAN),
                }
            })
            .collect();
        stream.synchronize().unwrap();
        s.random.0 = seed;
        let on: *mut std::ffi::c_void = stream.cu_stream().cast();
        for step in &steps {
            let store = [0, 1].map(|i| {
                let params = StoreParams {
                    x: step.cur[i].at(),
                    x_nb_head: 4 * width[i] / self.n_head_kv,
                    x_nb_token: 4 * width[i],
                    idxs: step.idxs.at(),
                    rows: grows[i].at(),
                    n_token: n_stream,
                };
                (SIDES[i], params)
            });
            let q_nb = 4 * self.n_head * self.dim_k;
            let recent = RecentParams {
                q: step.q.at(),
                q_nb_head: 4 * self.dim_k,
                q_nb_token: q_nb,
                q_nb_stream: q_nb,
                cur: [step.cur[0].at(), step.cur[1].at()],
                cur_nb_head: [4 * self.dim_k, 4 * self.dim_v],
                cur_nb_token: width.map(|w| 4 * w),
                slots: [slots[0].at(), slots[1].at()],
                idxs: step.recent.at(),
                out: extra.at(),
                n_head: self.n_head,
                n_head_kv: self.n_head_kv,
                head_dim: [self.dim_k, self.dim_v],
                n_token: 1,
                n_stream,
                n_slot: RECENT,
                n_recent: RECENT,
                scale: 1.0 / (self.dim_k as f32).sqrt(),
                softcap: self.softcap,
                max_bias: 0.0,
            };
            let attn = AttnParams {
                q: step.q.at(),
                q_nb_head: 4 * self.dim_k,
                q_nb_token: q_nb,
                q_nb_stream: q_nb,
                rows_k: grows[0].at(),
                rows_v: grows[1].at(),
                rows_k_nb_stream: s.layer.sides[0].row_bytes * n_kv,
                rows_v_nb_stream: s.layer.sides[1].row_bytes * n_kv,
                mask: step.mask.at().cast(),
                mask_nb_token: 4 * n_kv,
                mask_nb_stream: 4 * n_kv,
                mask_f16: false,
                pos: pos.at(),
                sinks: std::ptr::null(),
                extra: extra.at(),
                partial: partial.at(),
                out: step.out.at(),
                n_head: self.n_head,
                n_token: 1,
                n_stream,
                n_kv,
                scale: recent.scale,
                softcap: self.softcap,
                max_bias: 0.0,
            };
            let cells = beside.then_some(n_kv);
            // SAFETY: shapes as above, on the device; what is stored is hidden from this attention
            unsafe {
                s.gpu.store(&store, latent.at(), StoreStep::Project { beside: cells }, on).unwrap();
                if !beside {
                    s.gpu.store(&store, latent.at(), StoreStep::Quantize { beside: cells }, on).unwrap();
                }
                s.gpu.attend(&attn, AttnStep::Chunks { beside }, on).unwrap();
                s.gpu.recent(&recent, beside, on).unwrap();
                if beside {
                    s.gpu.store(&store, latent.at(), StoreStep::Quantize { beside: cells }, on).unwrap();
                }
                s.gpu.attend(&attn, AttnStep::Combine, on).unwrap();
            }
        }
        Decoded {
            rows: [grows[0].read(0xa5), grows[1].read(0xa5)],
            slots: [slots[0].read(0x7e00), slots[1].read(0x7e00)],
            out: steps.iter().map(|step| step.out.read(f32::NAN)).collect(),
        }
    }
}

#[test]
fn rows_stored_beside_attention_change_nothing() {
    let Some(stream) = gpu("rows_stored_beside_attention_change_nothing") else { return };
    // every kernel: GQA in clusters and not, MHA interpolated and not, other shapes
    let mut all: Vec<Case> = cases().into_iter().filter(|c| c.n_token == 1 && c.max_bias == 0.0).collect();
    all.push(Case { n_kv: 4000, n_stream: 2, ..Case::default() });
    all.push(Case { n_kv: 9000, ..Case::default() });
    all.push(Case { n_kv: 60_000, ..Case::default() }); // two decode kernels
    for (i, case) in all.iter().enumerate() {
        let mut s = case.setup(400 + i as u64);
        let [a, b] = [false, true].map(|beside| case.decode(&mut s, &stream, beside));
        assert!(a.rows == b.rows, "rows of {case:?}");
        assert!(a.slots == b.slots, "slots of {case:?}");
        for (t, (a, b)) in a.out.iter().zip(&b.out).enumerate() {
            assert!(a.iter().all(|x| x.is_finite()) && a == b, "token {t} of {case:?}: {}", error(a, b));
        }
    }
}
