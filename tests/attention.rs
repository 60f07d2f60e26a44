//! Attention over rows against a plain reference in f64.
#![allow(clippy::needless_range_loop, reason = "indices name channels and dimensions")]

mod common;

use common::{random_side, read_row, rebuild_as_defined, rebuild_exactly, Random};
use half::f16;
use palu::attention::{extra_row, AttnLayer, AttnParams, RebuildParams, EXTRA_HEAD};
use palu::codec::{planes, Decoder};
use palu::kernels::{force_path, Path};
use palu::projection::{Layer, Side, SideProj};
use palu::rope::{RopeKind, RopeParams};

/// A copy of some values that ends where an unreadable page begins.
struct Guarded<T> {
    map: *mut libc::c_void,
    bytes: usize,
    first: *mut T,
    n: usize,
}

impl<T: Copy> Guarded<T> {
    fn new(values: &[T]) -> Self {
        let page = 4096;
        let room = size_of_val(values).next_multiple_of(page);
        let bytes = room + page;
        // SAFETY: a new mapping; the copy fits before its last page
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let map = libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(map, libc::MAP_FAILED);
            assert_eq!(libc::mprotect(map.byte_add(room), page, libc::PROT_NONE), 0);
            let first = map.byte_add(room - size_of_val(values)).cast::<T>();
            first.copy_from_nonoverlapping(values.as_ptr(), values.len());
            Self { map, bytes, first, n: values.len() }
        }
    }

    fn values(&self) -> &[T] {
        // SAFETY: the copy
        unsafe { std::slice::from_raw_parts(self.first, self.n) }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping that new() made
        unsafe { libc::munmap(self.map, self.bytes) };
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mask {
    Null,
    Causal16,
    Causal32,
    /// holes, cells that nobody sees, queries that see nothing; f16 or f32
    Holes16,
    Holes32,
    /// -distance, for ALiBi
    Distance,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Positions {
    InOrder,
    /// all within 100 of each other, in no order
    Near,
    /// they jump, repeat, and are negative or large
    Scattered,
}

#[derive(Clone, Debug)]
struct Case {
    n_head: usize,
    n_head_kv: usize,
    group_k: usize,
    group_v: usize,
    head_dim_k: usize,
    head_dim_v: usize,
    bits_k: Vec<u8>,
    bits_v: Vec<u8>,
    rope: RopeParams,
    n_token: usize,
    n_stream: usize,
    n_kv: usize,
    mask: Mask,
    positions: Positions,
    sinks: bool,
    /// something from other cells for most queries
    extra: bool,
    softcap: f32,
    max_bias: f32,
    seed: u64,
}

fn neox(n_rot: usize) -> RopeParams {
    RopeParams { kind: RopeKind::Neox, n_rot, ..RopeParams::none() }
}

impl Default for Case {
    fn default() -> Self {
        Self {
            n_head: 6,
            n_head_kv: 6,
            group_k: 6,
            group_v: 6,
            head_dim_k: 64,
            head_dim_v: 64,
            bits_k: vec![6, 5, 4, 4, 3, 3, 2, 2, 1],
            bits_v: vec![7, 4, 4, 3, 3, 2, 2, 2, 2, 1, 1],
            rope: neox(64),
            n_token: 1,
            n_stream: 1,
            n_kv: 200,
            mask: Mask::Holes16,
            positions: Positions::InOrder,
            sinks: false,
            extra: false,
            softcap: 0.0,
            max_bias: 0.0,
            seed: 1,
        }
    }
}

struct Inputs {
    layer: Layer,
    attn: AttnLayer,
    q: Vec<f32>,
    rows: [Vec<u8>; 2],
    /// `[n_stream][n_token][n_kv]`
    mask: Vec<f32>,
    mask16: Vec<f16>,
    pos: Vec<i32>,
    sinks: Vec<f32>,
    /// `[n_stream][n_token][n_head][extra_row]`
    extra: Vec<f32>,
}

impl Case {
    fn inputs(&self) -> Inputs {
        let mut random = Random(self.seed * 77 + 5);
        let k = random_side(&mut random, Side::Key, self.n_head_kv, self.group_k, self.head_dim_k, &self.bits_k, 0);
        let v = random_side(&mut random, Side::Value, self.n_head_kv, self.group_v, self.head_dim_v, &self.bits_v, 1);
        let layer = Layer { il: 0, sides: [k, v] };
        let attn = AttnLayer::new(&layer, &self.rope).unwrap();
        let cells = self.n_stream * self.n_kv;
        let mut rows = [Side::Key, Side::Value].map(|side| {
            let p = layer.side(side);
            let x = random.tokens(p, cells);
            let mut rows = vec![0; cells * p.row_bytes];
            attn.codec(side).encode_rows(&x, &mut rows);
            rows
        });
        let mut pos: Vec<i32> = (0..cells).map(|i| (i % self.n_kv) as i32).collect();
        for (i, p) in pos.iter_mut().enumerate() {
            *p = match self.positions {
                Positions::InOrder => *p,
                Positions::Near => 70_000 + random.below(100) as i32,
                Positions::Scattered => match i / 5 % 4 {
                    0 => random.below(300_000) as i32 - 1000,
                    1 => 131_000 + i as i32,
                    2 => -(i as i32),
                    _ => *p,
                },
            };
        }
        let mut mask = vec![0.0f32; self.n_stream * self.n_token * self.n_kv];
        let hole = |random: &mut Random, share: usize| random.below(10) < share;
        for s in 0..self.n_stream {
            let nobody: Vec<bool> = (0..self.n_kv).map(|c| hole(&mut random, 2) || (64..140).contains(&c)).collect();
            for t in 0..self.n_token {
                let blind = t % 5 == 3;
                for c in 0..self.n_kv {
                    // the last query sees all of the context
                    let now = self.n_kv as i64 - self.n_token as i64 + t as i64;
                    let future = c as i64 > now;
                    mask[(s * self.n_token + t) * self.n_kv + c] = match self.mask {
                        Mask::Null => 0.0,
                        Mask::Causal16 | Mask::Causal32 => [0.0, f32::NEG_INFINITY][usize::from(future)],
                        Mask::Holes16 | Mask::Holes32 => [0.0, f32::NEG_INFINITY]
                            [usize::from(blind || nobody[c] || (future && now >= 0) || hole(&mut random, 1))],
                        Mask::Distance if future => f32::NEG_INFINITY,
                        Mask::Distance => -((now - c as i64) as f32),
                    };
                }
            }
            // cells that no query sees hold garbage
            for c in 0..self.n_kv {
                if (0..self.n_token).all(|t| mask[(s * self.n_token + t) * self.n_kv + c] == f32::NEG_INFINITY) {
                    for (rows, p) in rows.iter_mut().zip(&layer.sides) {
                        rows[(s * self.n_kv + c) * p.row_bytes..][..p.row_bytes].fill(0xff);
                    }
                    pos[s * self.n_kv + c] = random.bits() as i32;
                }
            }
        }
        let q =
            (0..self.n_stream * self.n_token * self.n_head * self.head_dim_k).map(|_| random.normal() as f32).collect();
        let sinks = (0..self.n_head).map(|_| 3.0 * random.normal() as f32).collect();
        let mask16 = mask.iter().map(|&m| f16::from_f32(m)).collect();
        let mut extra = Vec::new();
        for i in 0..self.n_stream * self.n_token * self.n_head {
            // none, and far above and below what rows give, among them
            let nothing = i % 4 == 1;
            let top = [0.0, 40.0, -40.0][i / 4 % 3] + random.normal() as f32;
            extra.extend([if nothing { f32::NEG_INFINITY } else { top }, if nothing { 0.0 } else { 1.5 }, f32::NAN, f32::NAN]);
            extra.extend((0..self.head_dim_v).map(|_| if nothing { 0.0 } else { random.normal() as f32 }));
        }
        Inputs { layer, attn, q, rows, mask, mask16, pos, sinks, extra }
    }

    fn scale(&self) -> f32 {
        0.5 / (self.head_dim_k as f32).sqrt()
    }

    /// Runs the kernels on this thread's path, in `nth` shares.
    fn run(&self, inputs: &Inputs, nth: usize) -> Vec<f32> {
        let (k, v) = (inputs.layer.side(Side::Key), inputs.layer.side(Side::Value));
        let out = Guarded::new(&vec![f32::NAN; self.n_stream * self.n_token * self.n_head * self.head_dim_v]);
        let size = inputs.attn.partial_size(self.n_head, self.n_token, self.n_stream, self.n_kv);
        let partial = Guarded::new(&vec![f32::NAN; size]);
        let (q, pos, sinks) = (Guarded::new(&inputs.q), Guarded::new(&inputs.pos), Guarded::new(&inputs.sinks));
        let extra = Guarded::new(&inputs.extra);
        let (mask, mask16) = (Guarded::new(&inputs.mask), Guarded::new(&inputs.mask16));
        let (rows_k, rows_v) = (Guarded::new(&inputs.rows[0]), Guarded::new(&inputs.rows[1]));
        let half_mask = !matches!(self.mask, Mask::Causal32 | Mask::Holes32);
        let size = if half_mask { 2 } else { 4 };
        let head_bytes = 4 * self.head_dim_k;
        let p = AttnParams {
            q: q.first,
            q_nb_head: head_bytes,
            q_nb_token: head_bytes * self.n_head,
            q_nb_stream: head_bytes * self.n_head * self.n_token,
            rows_k: rows_k.first,
            rows_v: rows_v.first,
            rows_k_nb_stream: k.row_bytes * self.n_kv,
            rows_v_nb_stream: v.row_bytes * self.n_kv,
            mask: match self.mask {
                Mask::Null => std::ptr::null(),
                _ if half_mask => mask16.first.cast(),
                _ => mask.first.cast(),
            },
            mask_nb_token: size * self.n_kv,
            mask_nb_stream: size * self.n_kv * self.n_token,
            mask_f16: half_mask,
            pos: pos.first,
            sinks: if self.sinks { sinks.first } else { std::ptr::null() },
            extra: if self.extra { extra.first } else { std::ptr::null() },
            partial: partial.first,
            out: out.first,
            n_head: self.n_head,
            n_token: self.n_token,
            n_stream: self.n_stream,
            n_kv: self.n_kv,
            scale: self.scale(),
            softcap: self.softcap,
            max_bias: self.max_bias,
        };
        unsafe {
            for ith in (0..nth).rev() {
                inputs.attn.attend(&p, ith, nth);
            }
            for ith in 0..nth {
                inputs.attn.combine(&p, ith, nth);
            }
        }
        out.values().to_vec()
    }

    /// Keys, rotated, and values of all cells in f64. `exact`: with the file's decoder instead of the integer one.
    fn rebuilt(&self, inputs: &Inputs, exact: bool) -> [Vec<Vec<f64>>; 2] {
        let rebuild = |side: &SideProj, rows: &[u8]| -> Vec<Vec<f64>> {
            let pairs = if side.side == Side::Key { self.rope.pairs(side.head_dim) } else { Vec::new() };
            let decoders: Vec<Decoder> = side.groups.iter().map(|g| Decoder::new(g, planes(side), &pairs)).collect();
            rows.chunks(side.row_bytes)
                .map(|row| {
                    (0..side.groups.len())
                        .flat_map(|g| {
                            let (scale, codes) = read_row(side, g, row);
                            if exact {
                                rebuild_exactly(side, g, scale, &codes)
                            } else {
                                rebuild_as_defined(side, g, &decoders[g], scale, &codes)
                            }
                        })
                        .collect()
                })
                .collect()
        };
        let mut keys = rebuild(inputs.layer.side(Side::Key), &inputs.rows[0]);
        let values = rebuild(inputs.layer.side(Side::Value), &inputs.rows[1]);
        if self.rope.kind != RopeKind::None {
            let (freq, magnitude) = self.rope.frequencies();
            for (key, &pos) in keys.iter_mut().zip(&inputs.pos) {
                for head in key.chunks_mut(self.head_dim_k) {
                    for (i, f) in freq.iter().enumerate() {
                        let (a, b) = match self.rope.kind {
                            RopeKind::Norm => (2 * i, 2 * i + 1),
                            _ => (i, i + self.rope.n_rot / 2),
                        };
                        let (a, b) = (a + self.rope.n_offs, b + self.rope.n_offs);
                        let (sin, cos) = (f64::from(pos) * f).sin_cos();
                        let (x, y) = (head[a] * f64::from(magnitude), head[b] * f64::from(magnitude));
                        head[a] = x * cos - y * sin;
                        head[b] = x * sin + y * cos;
                    }
                }
            }
        }
        [keys, values]
    }

    /// The same as [`Self::run`] in f64 and the plainest way.
    fn reference(&self, inputs: &Inputs, exact: bool) -> Vec<f64> {
        let [keys, values] = self.rebuilt(inputs, exact);
        let rep = self.n_head / self.n_head_kv;
        let mut out = Vec::new();
        for s in 0..self.n_stream {
            for t in 0..self.n_token {
                for h in 0..self.n_head {
                    let q =
                        &inputs.q[((s * self.n_token + t) * self.n_head + h) * self.head_dim_k..][..self.head_dim_k];
                    let slope = if self.max_bias > 0.0 {
                        let n = 1usize << self.n_head.ilog2();
                        let (base, power) = if h < n {
                            (-f64::from(self.max_bias) / n as f64, h as f64 + 1.0)
                        } else {
                            (-f64::from(self.max_bias) / 2.0 / n as f64, 2.0 * (h - n) as f64 + 1.0)
                        };
                        2f64.powf(base * power)
                    } else {
                        1.0
                    };
                    let mut scores = Vec::new();
                    for c in 0..self.n_kv {
                        let mask = f64::from(inputs.mask[(s * self.n_token + t) * self.n_kv + c]);
                        if mask == f64::NEG_INFINITY {
                            continue;
                        }
                        let key = &keys[s * self.n_kv + c][h / rep * self.head_dim_k..];
                        let dot: f64 = q.iter().zip(key).map(|(q, k)| f64::from(*q) * k).sum();
                        let mut score = f64::from(self.scale()) * dot;
                        if self.softcap != 0.0 {
                            score = f64::from(self.softcap) * (score / f64::from(self.softcap)).tanh();
                        }
                        scores.push((c, score + slope * mask));
                    }
                    let sink = if self.sinks { f64::from(inputs.sinks[h]) } else { f64::NEG_INFINITY };
                    let row = (s * self.n_token + t) * self.n_head + h;
                    let other = &inputs.extra[row * extra_row(self.head_dim_v)..][..extra_row(self.head_dim_v)];
                    let other_max = if self.extra { f64::from(other[0]) } else { f64::NEG_INFINITY };
                    let max = scores.iter().fold(sink.max(other_max), |m, s| m.max(s.1));
                    let total: f64 = scores.iter().map(|s| (s.1 - max).exp()).sum::<f64>()
                        + (sink - max).exp()
                        + if other_max > f64::NEG_INFINITY { (other_max - max).exp() * f64::from(other[1]) } else { 0.0 };
                    let mut y = vec![0.0; self.head_dim_v];
                    if other_max > f64::NEG_INFINITY {
                        let weight = (other_max - max).exp() / total;
                        y.iter_mut().zip(&other[EXTRA_HEAD..]).for_each(|(y, v)| *y += weight * f64::from(*v));
                    }
                    for (c, score) in scores {
                        let p = (score - max).exp() / total;
                        let value = &values[s * self.n_kv + c][h / rep * self.head_dim_v..][..self.head_dim_v];
                        y.iter_mut().zip(value).for_each(|(y, v)| *y += p * v);
                    }
                    out.extend(y);
                }
            }
        }
        out
    }

    /// Rows as an f16 cache, made in three shares.
    fn check_rebuilt(&self, inputs: &Inputs) {
        let want = self.rebuilt(inputs, false);
        for (side, want) in [Side::Key, Side::Value].into_iter().zip(&want) {
            let p = inputs.layer.side(side);
            let out = Guarded::new(&vec![0x7e00u16; want.len() * p.n_head_kv * p.head_dim]);
            let (rows, pos) = (Guarded::new(&inputs.rows[side as usize]), Guarded::new(&inputs.pos));
            let params = RebuildParams::of_rows(
                rows.first,
                p.row_bytes * self.n_kv,
                pos.first,
                out.first,
                self.n_stream,
                self.n_kv,
            );
            for ith in 0..3 {
                // SAFETY: the shapes are those of the case
                unsafe { inputs.attn.rebuild(side, &params, ith, 3) };
            }
            for (&got, &want) in out.values().iter().zip(want.iter().flatten()) {
                let got = f16::from_bits(got).to_f64();
                assert!((got - want).abs() <= 2e-3 * want.abs().max(1.0) || !want.is_finite(), "{got} for {want}: {self:?}");
            }
        }
    }

    fn check(&self) {
        let inputs = self.inputs();
        let defined = self.reference(&inputs, false);
        let exact = self.reference(&inputs, true);
        let size = defined.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        for path in Path::ALL.into_iter().filter(|p| p.is_available()) {
            force_path(Some(path));
            let out = self.run(&inputs, 1);
            for nth in [2, 3, 7] {
                let other = self.run(&inputs, nth);
                let same = out.iter().zip(&other).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{} shares change the result of {self:?} on {}", nth, path.name());
            }
            let distance = |reference: &[f64]| {
                out.iter().zip(reference).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, |m: f64, x| {
                    if x.is_nan() {
                        x
                    } else {
                        m.max(x)
                    }
                })
            };
            let rounding = distance(&defined) / size.max(1.0);
            assert!(rounding < 3e-5, "off by {rounding} on {}: {self:?}", path.name());
            let decoder = distance(&exact) / size.max(1.0);
            assert!(decoder < 0.1, "off by {decoder} from the exact decoder on {}: {self:?}", path.name());
            self.check_rebuilt(&inputs);
        }
        force_path(None);
    }
}

#[test]
fn other_cells_are_merged() {
    for (i, n_token) in [1, 2, 5, 33, 64].into_iter().enumerate() {
        for n_kv in [7, 200, 1500] {
            let case = Case { n_token, n_kv, extra: true, mask: Mask::Holes32, seed: i as u64, ..Case::default() };
            Case { sinks: i % 2 == 0, ..case.clone() }.check();
            Case { n_head: 4, n_head_kv: 2, group_k: 2, group_v: 2, n_stream: 2, ..case }.check();
        }
    }
}

#[test]
fn numbers_of_query_tokens() {
    for (i, n_token) in [1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 129, 300].into_iter().enumerate() {
        let mask = [Mask::Holes16, Mask::Causal32, Mask::Holes32, Mask::Causal16][i % 4];
        Case { n_token, n_kv: 331, mask, seed: i as u64, ..Case::default() }.check();
    }
    Case {
        n_token: 512,
        n_kv: 520,
        mask: Mask::Causal16,
        n_head: 2,
        n_head_kv: 1,
        group_k: 1,
        group_v: 1,
        bits_k: vec![4; 6],
        bits_v: vec![4; 6],
        ..Case::default()
    }
    .check();
}

#[test]
fn lengths_of_context() {
    for (i, n_kv) in [1, 2, 63, 64, 65, 128, 129, 700, 1024, 1100, 4500].into_iter().enumerate() {
        for n_token in [1, 20] {
            let mask = [Mask::Null, Mask::Causal16][i % 2];
            let case = Case {
                n_token: n_token.min(n_kv),
                n_kv,
                mask,
                n_head: 2,
                n_head_kv: 2,
                group_k: 2,
                group_v: 2,
                seed: i as u64,
                ..Case::default()
            };
            case.check();
        }
    }
}

#[test]
fn heads_and_groups() {
    // query heads, KV heads, heads per group of keys and of values
    for (n_head, n_head_kv, group_k, group_v) in
        [(4, 4, 1, 4), (8, 2, 2, 1), (8, 1, 1, 1), (6, 6, 2, 3), (12, 4, 4, 2), (5, 5, 5, 1)]
    {
        for n_token in [1, 5, 40] {
            Case { n_head, n_head_kv, group_k, group_v, n_token, seed: n_head as u64, ..Case::default() }.check();
        }
    }
}

#[test]
fn head_sizes() {
    for (head_dim_k, head_dim_v) in
        [(64, 128), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (40, 24), (32, 8), (8, 48), (12, 20)]
    {
        for n_token in [1, 30] {
            let (n_head, n_head_kv, group_k, group_v) = (4, 2, 2, 2);
            Case {
                n_head,
                n_head_kv,
                group_k,
                group_v,
                head_dim_k,
                head_dim_v,
                rope: neox(head_dim_k),
                n_token,
                n_kv: 150,
                ..Case::default()
            }
            .check();
        }
    }
}

#[test]
fn ropes() {
    let yarn = RopeParams { n_ctx_orig: 256, freq_scale: 0.25, ext_factor: 1.0, attn_factor: 1.1, ..neox(64) };
    let ropes = [
        RopeParams::none(),
        RopeParams { kind: RopeKind::Norm, n_rot: 64, ..RopeParams::none() },
        RopeParams { kind: RopeKind::Norm, n_rot: 20, ..RopeParams::none() },
        neox(32),
        RopeParams { n_offs: 16, ..neox(48) },
        RopeParams { n_offs: 7, kind: RopeKind::Norm, ..neox(30) },
        RopeParams { freq_base: 1e6, ..neox(64) }, // nearly all pairs are slow
        RopeParams { freq_factors: (0..32).map(|i| 1.0 + i as f32 / 4.0).collect(), freq_base: 500_000.0, ..neox(64) },
        yarn,
    ];
    for (i, rope) in ropes.into_iter().enumerate() {
        for positions in [Positions::InOrder, Positions::Near, Positions::Scattered] {
            for n_token in [1, 18] {
                Case {
                    rope: rope.clone(),
                    positions,
                    n_token,
                    n_head: 3,
                    n_head_kv: 3,
                    group_k: 3,
                    group_v: 3,
                    seed: i as u64,
                    ..Case::default()
                }
                .check();
            }
        }
    }
}

#[test]
fn softmax_variants() {
    for n_token in [1, 6, 35] {
        Case { n_token, sinks: true, ..Case::default() }.check();
        Case { n_token, softcap: 5.0, ..Case::default() }.check();
        Case { n_token, max_bias: 8.0, mask: Mask::Distance, ..Case::default() }.check();
        Case {
            n_token,
            n_head: 12,
            max_bias: 4.0,
            mask: Mask::Distance,
            sinks: true,
            softcap: 30.0,
            ..Case::default()
        }
        .check();
    }
}

#[test]
fn streams() {
    for (n_token, n_stream) in [(1, 2), (1, 5), (3, 3), (24, 2)] {
        Case { n_token, n_stream, n_kv: 190, ..Case::default() }.check();
        Case { n_token, n_stream, n_kv: 50, sinks: true, ..Case::default() }.check();
    }
}

#[test]
fn ranks_and_bits() {
    for (bits_k, bits_v) in [
        (vec![], vec![]),
        (vec![4], vec![]),
        (vec![], vec![3, 2]),
        (vec![8; 12], vec![8; 9]),                        // two planes, codes beyond 127
        (vec![8, 8, 8, 2, 1, 1, 1, 1], vec![8, 1, 1, 1]), // one plane, codes beyond 127
        (vec![6; 40], vec![7; 33]),                       // two planes
        (vec![1; 48], vec![2; 48]),
    ] {
        for n_token in [1, 22] {
            Case { bits_k: bits_k.clone(), bits_v: bits_v.clone(), n_token, ..Case::default() }.check();
        }
    }
}

#[test]
fn rows_that_are_not_numbers_reach_only_the_queries_that_see_them() {
    for (n_token, bits) in [(2, vec![4u8, 3]), (2, vec![]), (40, vec![4, 3]), (40, vec![])] {
        for side in [0, 1] {
            let case = Case {
                n_token,
                n_kv: 100,
                mask: Mask::Causal16,
                bits_k: bits.clone(),
                bits_v: bits.clone(),
                ..Case::default()
            };
            let mut inputs = case.inputs();
            // the last cell, which only the last query sees
            let row_bytes = inputs.layer.sides[side].row_bytes;
            inputs.rows[side][99 * row_bytes..][..2].copy_from_slice(&f16::NAN.to_le_bytes());
            for path in Path::ALL.into_iter().filter(|p| p.is_available()) {
                force_path(Some(path));
                let out = case.run(&inputs, 1);
                let per_token = case.n_head * case.head_dim_v;
                assert!(out[..(n_token - 1) * per_token].iter().all(|x| x.is_finite()), "{}", path.name());
                assert!(out[(n_token - 1) * per_token..].iter().all(|x| x.is_nan()), "{}", path.name());
            }
            force_path(None);
        }
    }
}

#[test]
fn queries_that_see_nothing_give_zeros() {
    for sinks in [false, true] {
        for n_token in [4, 40] {
            let case = Case { n_token, sinks, ..Case::default() };
            let inputs = case.inputs();
            let out = case.run(&inputs, 2);
            for (t, out) in out.chunks(case.n_head * case.head_dim_v).enumerate() {
                assert_eq!(out.iter().all(|&x| x == 0.0), t % 5 == 3, "token {t}");
            }
        }
    }
    let case = Case { n_token: 1, n_kv: 0, mask: Mask::Null, ..Case::default() };
    assert!(case.run(&case.inputs(), 1).iter().all(|&x| x == 0.0), "an empty context");
}

#[test]
fn frequencies_are_ggmls() {
    // the loop of ggml_rope_cache_init() in f32
    for rope in [
        neox(64),
        RopeParams { freq_scale: 0.25, ..neox(128) },
        RopeParams {
            n_ctx_orig: 4096,
            freq_scale: 0.125,
            ext_factor: 1.0,
            attn_factor: 0.9,
            freq_base: 500_000.0,
            ..neox(128)
        },
        RopeParams {
            n_ctx_orig: 2048,
            freq_scale: 0.5,
            ext_factor: 0.7,
            freq_factors: (0..32).map(|i| 1.0 + i as f32 / 9.0).collect(),
            ..neox(64)
        },
    ] {
        let (freq, magnitude) = rope.frequencies();
        for pos in [0, 1, 17, 1000] {
            let theta_scale = rope.freq_base.powf(-2.0 / rope.n_rot as f32);
            let mut theta = pos as f32;
            let dim = |beta: f32| {
                rope.n_rot as f32 * (rope.n_ctx_orig as f32 / (beta * 2.0 * std::f32::consts::PI)).ln()
                    / (2.0 * rope.freq_base.ln())
            };
            let (low, high) =
                (dim(rope.beta_fast).floor().max(0.0), dim(rope.beta_slow).ceil().min(rope.n_rot as f32 - 1.0));
            for i in 0..rope.n_rot / 2 {
                let extrapolated = theta / rope.freq_factors.get(i).unwrap_or(&1.0);
                let interpolated = rope.freq_scale * extrapolated;
                let (mut angle, mut scale) = (interpolated, rope.attn_factor);
                if rope.ext_factor != 0.0 {
                    let ramp = 1.0 - ((i as f32 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                    let mix = ramp * rope.ext_factor;
                    angle = interpolated * (1.0 - mix) + extrapolated * mix;
                    scale *= 1.0 + 0.1 * (1.0 / rope.freq_scale).ln();
                }
                assert!(
                    (f64::from(angle) - f64::from(pos) * freq[i]).abs() <= 1e-5 * f64::from(angle) + 1e-7,
                    "{rope:?} pair {i} at {pos}"
                );
                assert!((scale - magnitude).abs() < 1e-6);
                theta *= theta_scale;
            }
        }
    }
}
