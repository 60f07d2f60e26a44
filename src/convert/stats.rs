//! The tap: sees keys before RoPE, values and queries of the running model, and either accumulates moments and keeps the
//! window for [`super::weigh`], or sends keys and values through the codec.
//!
//! Work is split over the runtime's threads by rows of the moment matrices, in blocks of fixed size, so that every sum is
//! formed in the same order whatever the number of threads.

use crate::codec::Codec;
use crate::projection::{Side, SIDES};
use crate::rope::{RopeKind, RopeParams};
use anyhow::{bail, ensure, Result};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Rows of a moment matrix that one thread forms at a time.
const BLOCK_ROWS: usize = 64;

/// `palu_tap_params`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TapParams {
    /// `[n_token][n_head_kv][head_dim]`
    pub x: *const f32,
    pub x_nb_head: usize,
    pub x_nb_token: usize,
    /// `[n_token][n_head][head_dim_k]`, rotated; null for values
    pub q: *const f32,
    pub q_nb_head: usize,
    pub q_nb_token: usize,
    /// `[n_token]`; null for values
    pub pos: *const i32,
    /// `[n_token][n_head_kv][head_dim]`, contiguous
    pub out: *mut f32,
    pub n_token: i32,
    pub il: i32,
    pub side: i32,
}

/// Attention of one layer, as the graph described it.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerShape {
    pub n_head: usize,
    pub n_head_kv: usize,
    pub head_dim_k: usize,
    pub head_dim_v: usize,
    pub rope: RopeParams,
}

impl LayerShape {
    pub fn head_dim(&self, side: Side) -> usize {
        match side {
            Side::Key => self.head_dim_k,
            Side::Value => self.head_dim_v,
        }
    }

    /// Channels of one side of a token.
    pub fn width(&self, side: Side) -> usize {
        self.n_head_kv * self.head_dim(side)
    }
}

/// `[n_token][n_head][head_dim]` with strides in bytes.
#[derive(Clone, Copy)]
struct Heads {
    x: *const f32,
    nb_head: usize,
    nb_token: usize,
    head_dim: usize,
}

impl Heads {
    /// # Safety
    /// Token and head must lie within what the strides describe.
    unsafe fn head(&self, token: usize, head: usize) -> &[f32] {
        let x = self.x.cast::<u8>().add(token * self.nb_token + head * self.nb_head).cast();
        std::slice::from_raw_parts(x, self.head_dim)
    }
}

/// Cosine and sine of every pair at every position.
pub struct RopeTable {
    params: RopeParams,
    freq: Vec<f64>,
    magnitude: f32,
    /// `[n_pos][n_rot/2]`
    cos_sin: Vec<(f32, f32)>,
}

impl RopeTable {
    pub fn new(params: &RopeParams, n_pos: usize) -> Self {
        let (freq, magnitude) = if params.kind == RopeKind::None { (Vec::new(), 1.0) } else { params.frequencies() };
        let cos_sin = (0..n_pos).flat_map(|p| freq.iter().map(move |f| angle(f * p as f64))).collect();
        Self { params: params.clone(), freq, magnitude, cos_sin }
    }

    /// Rotates `x` to `pos`, with the magnitude.
    pub fn rotate(&self, x: &mut [f32], pos: i32) {
        self.turn(x, pos, 1.0);
    }

    /// The transpose of [`RopeTable::rotate`], with the magnitude too: x·rotate(y) = rotate_back(x)·y.
    pub fn rotate_back(&self, x: &mut [f32], pos: i32) {
        self.turn(x, pos, -1.0);
    }

    fn turn(&self, x: &mut [f32], pos: i32, sign: f32) {
        let n = self.freq.len();
        for (i, freq) in self.freq.iter().enumerate() {
            let known = usize::try_from(pos).ok().and_then(|p| self.cos_sin.get(p * n + i));
            let (cos, sin) = known.copied().unwrap_or_else(|| angle(freq * f64::from(pos)));
            let (cos, sin) = (self.magnitude * cos, self.magnitude * sign * sin);
            let (a, b) = self.params.pair(i);
            let (xa, xb) = (x[a], x[b]);
            x[a] = xa * cos - xb * sin;
            x[b] = xa * sin + xb * cos;
        }
    }
}

fn angle(radians: f64) -> (f32, f32) {
    let (sin, cos) = radians.sin_cos();
    (cos as f32, sin as f32)
}

thread_local! {
    static SCRATCH: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// Adds `xᵀ x` of rows `rows` and columns `0..width` to `sum` `[rows][width]`, by way of f32 products `scratch`.
pub fn add_products(x: &[f32], d: usize, rows: std::ops::Range<usize>, width: usize, sum: &mut [f64], scratch: &mut Vec<f32>) {
    let x = MatRef::from_row_major_slice(x, x.len() / d, d);
    scratch.resize(rows.len() * width, 0.0);
    let product = MatMut::from_row_major_slice_mut(scratch, rows.len(), width);
    matmul(product, Accum::Replace, x.subcols(rows.start, rows.len()).transpose(), x.subcols(0, width), 1.0f32, Par::Seq);
    for (s, &p) in sum.iter_mut().zip(scratch.iter()) {
        *s += f64::from(p);
    }
}

/// Rows `row0..` of the lower triangle of a second moment.
struct Block {
    row0: usize,
    /// `[rows]`
    sum: Vec<f64>,
    /// `[rows][row0 + rows]`
    product: Vec<f64>,
}

/// First and second moments of a side's channels, less a provisional mean: keys of some models have biases hundreds of
/// times their deviation, and the second moment around zero would leave nothing of the deviation in f32.
pub struct Moments {
    d: usize,
    n_token: AtomicU64,
    shift: OnceLock<Vec<f32>>,
    /// each has one owner per call, so its lock is never waited for
    blocks: Vec<Mutex<Block>>,
}

impl Moments {
    pub fn new(d: usize) -> Self {
        let block = |row0: usize| {
            let rows = BLOCK_ROWS.min(d - row0);
            Mutex::new(Block { row0, sum: vec![0.0; rows], product: vec![0.0; rows * (row0 + rows)] })
        };
        Self { d, n_token: AtomicU64::new(0), shift: OnceLock::new(), blocks: (0..d).step_by(BLOCK_ROWS).map(block).collect() }
    }

    /// Bytes that [`Moments::new`] takes.
    pub fn bytes(d: usize) -> usize {
        8 * (d * (d + BLOCK_ROWS) / 2 + d)
    }

    /// Adds `fill`'s tokens `[n_token][d]`.
    fn add(&self, n_token: usize, ith: usize, nth: usize, fill: impl Fn(&mut Vec<f32>)) {
        if ith == 0 {
            self.n_token.fetch_add(n_token as u64, Relaxed);
        }
        if ith >= self.blocks.len() {
            return;
        }
        SCRATCH.with_borrow_mut(|(x, scratch)| {
            x.clear();
            fill(x);
            let shift = self.shift.get_or_init(|| {
                let mean = |c: usize| x.iter().skip(c).step_by(self.d).map(|&v| f64::from(v)).sum::<f64>() / n_token as f64;
                (0..self.d).map(|c| mean(c) as f32).collect()
            });
            for token in x.chunks_exact_mut(self.d) {
                for (x, s) in token.iter_mut().zip(shift) {
                    *x -= s;
                }
            }
            for block in self.blocks.iter().skip(ith).step_by(nth) {
                let block = &mut *lock(block);
                let rows = block.row0..block.row0 + block.sum.len();
                for token in x.chunks_exact(self.d) {
                    for (s, &x) in block.sum.iter_mut().zip(&token[rows.clone()]) {
                        *s += f64::from(x);
                    }
                }
                let width = rows.end;
                add_products(x, self.d, rows, width, &mut block.product, scratch);
            }
        });
    }

    pub fn n_token(&self) -> u64 {
        self.n_token.load(Relaxed)
    }

    pub fn is_finite(&self) -> bool {
        self.blocks.iter().all(|b| lock(b).sum.iter().all(|s| s.is_finite()))
    }

    /// Mean `[d]` and covariance `[d][d]`.
    pub fn finish(&self) -> (Vec<f64>, Mat<f64>) {
        let n = self.n_token().max(1) as f64;
        let mut offset = Vec::with_capacity(self.d);
        for block in &self.blocks {
            offset.extend(lock(block).sum.iter().map(|s| s / n));
        }
        let mut covariance = Mat::zeros(self.d, self.d);
        for block in &self.blocks {
            let block = lock(block);
            let width = block.row0 + block.sum.len();
            for (r, row) in block.product.chunks_exact(width).enumerate() {
                let i = block.row0 + r;
                for j in 0..=i {
                    let c = row[j] / n - offset[i] * offset[j];
                    covariance[(i, j)] = c;
                    covariance[(j, i)] = c;
                }
            }
        }
        let mut mean = offset;
        if let Some(shift) = self.shift.get() {
            for (m, &s) in mean.iter_mut().zip(shift) {
                *m += f64::from(s);
            }
        }
        (mean, covariance)
    }
}

/// Everything collected in one layer.
pub struct LayerStats {
    /// [key, value]
    pub moments: [Moments; 2],
    /// written by one thread
    window: Mutex<Window>,
}

impl LayerStats {
    /// `sample`: every how many positions a query is looked at.
    pub fn new(shape: &LayerShape, sample: usize) -> Self {
        Self {
            moments: SIDES.map(|s| Moments::new(shape.width(s))),
            window: Mutex::new(Window::new(sample)),
        }
    }

    pub fn bytes(shape: &LayerShape, n_window: usize) -> usize {
        let sides = |s| Moments::bytes(shape.width(s)) + 4 * n_window * shape.width(s);
        SIDES.into_iter().map(sides).sum()
    }
}

/// Keys before RoPE, values and some rotated queries of the window that is being run.
#[derive(Debug, PartialEq)]
pub struct Window {
    sample: usize,
    /// `[n_token][n_head_kv][head_dim_k]`
    pub keys: Vec<f32>,
    /// `[n_token][n_head_kv][head_dim_v]`
    pub values: Vec<f32>,
    /// `[n_query][n_head][head_dim_k]`
    pub queries: Vec<f32>,
    /// `[n_query]`
    pub positions: Vec<usize>,
}

impl Window {
    fn new(sample: usize) -> Self {
        Self { sample, keys: Vec::new(), values: Vec::new(), queries: Vec::new(), positions: Vec::new() }
    }
}

/// What the tap does with what it sees.
pub enum Mode {
    /// hands everything on as it is
    Pass,
    /// the same, and accumulates moments of these layers
    Collect(BTreeMap<usize, LayerStats>),
    /// sends these sides of these layers through the codec
    Compress(BTreeMap<(usize, Side), Codec>),
}

struct State {
    layers: BTreeMap<usize, (LayerShape, Arc<RopeTable>)>,
    mode: Mode,
}

/// `palu_tap`
pub struct Tap {
    /// tokens of a window: positions that rotations are tabulated for
    n_pos: usize,
    state: RwLock<State>,
    error: Mutex<Option<String>>,
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Tap {
    pub fn new(n_pos: usize) -> Self {
        Self { n_pos, state: RwLock::new(State { layers: BTreeMap::new(), mode: Mode::Pass }), error: Mutex::new(None) }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// `palu_tap_describe`
    pub fn describe(
        &self,
        il: usize,
        n_head: usize,
        n_head_kv: usize,
        head_dim_k: usize,
        head_dim_v: usize,
        rope: RopeParams,
    ) -> Result<()> {
        let result = self.describe_checked(il, LayerShape { n_head, n_head_kv, head_dim_k, head_dim_v, rope });
        self.keep_error(&result);
        result
    }

    fn keep_error(&self, result: &Result<()>) {
        if let Err(e) = result {
            lock(&self.error).get_or_insert_with(|| format!("{e:#}"));
        }
    }

    fn describe_checked(&self, il: usize, shape: LayerShape) -> Result<()> {
        let LayerShape { n_head, n_head_kv, head_dim_k, head_dim_v, ref rope } = shape;
        ensure!(
            n_head_kv > 0 && head_dim_k > 0 && head_dim_v > 0 && n_head >= n_head_kv && n_head.is_multiple_of(n_head_kv),
            "layer {il}: {n_head} query heads over {n_head_kv} KV heads of {head_dim_k} and {head_dim_v} dimensions"
        );
        rope.check(head_dim_k)?;
        let mut state = self.write();
        if let Some((known, _)) = state.layers.get(&il) {
            ensure!(*known == shape, "layer {il} was described in two ways");
            return Ok(());
        }
        let known = state.layers.values().find(|(s, _)| s.rope == shape.rope).map(|(_, t)| t.clone());
        let table = known.unwrap_or_else(|| Arc::new(RopeTable::new(&shape.rope, self.n_pos)));
        state.layers.insert(il, (shape, table));
        Ok(())
    }

    /// Shape and rotations of a layer that was described.
    pub fn layer(&self, il: usize) -> (LayerShape, Arc<RopeTable>) {
        let state = self.read();
        state.layers[&il].clone()
    }

    /// Takes what the last window left, layer after layer.
    pub fn take_windows(&self) -> Vec<Window> {
        let state = self.read();
        let Mode::Collect(layers) = &state.mode else { return Vec::new() };
        let take = |l: &LayerStats| {
            let mut window = lock(&l.window);
            let fresh = Window::new(window.sample);
            std::mem::replace(&mut *window, fresh)
        };
        layers.values().map(take).collect()
    }

    pub fn layers(&self) -> BTreeMap<usize, LayerShape> {
        let state = self.read();
        state.layers.iter().map(|(&il, (shape, _))| (il, shape.clone())).collect()
    }

    /// Gives the tap something else to do; returns what it did, with what it collected.
    pub fn replace_mode(&self, mode: Mode) -> Mode {
        let mut state = self.write();
        std::mem::replace(&mut state.mode, mode)
    }

    /// The first layer of those being collected whose sums are not finite.
    pub fn find_non_finite(&self) -> Option<(usize, Side)> {
        let state = self.read();
        let Mode::Collect(layers) = &state.mode else { return None };
        for (&il, stats) in layers {
            for side in SIDES {
                if !stats.moments[side as usize].is_finite() {
                    return Some((il, side));
                }
            }
        }
        None
    }

    /// The first error since the last call, if any: the runtime only learns that there was one.
    pub fn take_error(&self) -> Option<String> {
        lock(&self.error).take()
    }

    /// `palu_tap_run`
    ///
    /// # Safety
    /// Pointers and strides must describe what [`TapParams`] says.
    pub unsafe fn run(&self, p: &TapParams, ith: usize, nth: usize) -> Result<()> {
        let result = self.run_checked(p, ith, nth);
        self.keep_error(&result);
        result
    }

    unsafe fn run_checked(&self, p: &TapParams, ith: usize, nth: usize) -> Result<()> {
        ensure!(nth > 0 && ith < nth, "thread {ith} of {nth}");
        let side = match p.side {
            0 => Side::Key,
            1 => Side::Value,
            other => bail!("there is no side {other}"),
        };
        let state = self.read();
        let il = p.il as usize;
        let Some((shape, _)) = state.layers.get(&il) else { bail!("layer {} was not described", p.il) };
        ensure!(!p.x.is_null() && !p.out.is_null() && p.n_token >= 0, "a null pointer, or {} tokens", p.n_token);
        let n_token = p.n_token as usize;
        let x = Heads { x: p.x, nb_head: p.x_nb_head, nb_token: p.x_nb_token, head_dim: shape.head_dim(side) };
        let n_head_kv = shape.n_head_kv;
        let append = |to: &mut Vec<f32>, token: usize| {
            for h in 0..n_head_kv {
                to.extend_from_slice(x.head(token, h));
            }
        };

        let share = n_token * ith / nth..n_token * (ith + 1) / nth;
        let width = shape.width(side);
        SCRATCH.with_borrow_mut(|(tokens, _)| {
            tokens.clear();
            share.clone().for_each(|t| append(tokens, t));
            let out = std::slice::from_raw_parts_mut(p.out.add(share.start * width), share.len() * width);
            match &state.mode {
                Mode::Compress(sides) if sides.contains_key(&(il, side)) => {
                    let codec = &sides[&(il, side)];
                    let mut rows = vec![0; share.len() * codec.row_bytes];
                    codec.encode_rows(tokens, &mut rows);
                    codec.decode_rows(&rows, out);
                }
                _ => out.copy_from_slice(tokens),
            }
        });

        let Mode::Collect(layers) = &state.mode else { return Ok(()) };
        let Some(stats) = layers.get(&il) else { return Ok(()) };
        if n_token == 0 {
            return Ok(());
        }
        stats.moments[side as usize].add(n_token, ith, nth, |out| (0..n_token).for_each(|t| append(out, t)));
        if ith != 0 {
            return Ok(());
        }
        let window = &mut *lock(&stats.window);
        if side == Side::Value {
            (0..n_token).for_each(|t| append(&mut window.values, t));
            return Ok(());
        }
        ensure!(!p.q.is_null() && !p.pos.is_null(), "keys of layer {il} came without queries or positions");
        let q = Heads { x: p.q, nb_head: p.q_nb_head, nb_token: p.q_nb_token, head_dim: shape.head_dim_k };
        for t in 0..n_token {
            let pos = *p.pos.add(t);
            ensure!(pos as usize == window.keys.len() / width, "layer {il}: position {pos} is out of order");
            append(&mut window.keys, t);
            if (pos as usize + 1).is_multiple_of(window.sample) {
                window.positions.push(pos as usize);
                for h in 0..shape.n_head {
                    window.queries.extend_from_slice(q.head(t, h));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::windows::Random;
    use super::*;

    fn shape() -> LayerShape {
        let rope = RopeParams { kind: RopeKind::Neox, n_rot: 16, attn_factor: 1.25, ..RopeParams::none() };
        LayerShape { n_head: 6, n_head_kv: 3, head_dim_k: 24, head_dim_v: 30, rope }
    }

    /// Runs keys and values of a window in a few blocks through a collecting tap; returns it with what went in.
    fn collect(nth: usize) -> (LayerStats, Vec<f32>, Vec<f32>) {
        let shape = shape();
        let tap = Tap::new(32);
        tap.describe(4, shape.n_head, shape.n_head_kv, shape.head_dim_k, shape.head_dim_v, shape.rope.clone()).unwrap();
        tap.replace_mode(Mode::Collect(BTreeMap::from([(4, LayerStats::new(&shape, 4))])));
        let mut random = Random(1);
        let mut value = |bias: f32| bias + random.uniform() as f32 - 0.5;
        let (dk, dv, dq) = (shape.width(Side::Key), shape.width(Side::Value), shape.n_head * shape.head_dim_k);
        let (mut all_k, mut all_q) = (Vec::new(), Vec::new());
        for (pos0, n) in [(0, 33), (33, 7), (40, 40)] {
            let k: Vec<f32> = (0..n * dk).map(|i| value(300.0 * (i % dk == 5) as i32 as f32)).collect();
            let v: Vec<f32> = (0..n * dv).map(|_| value(0.0)).collect();
            let q: Vec<f32> = (0..n * dq).map(|_| value(0.0)).collect();
            let pos: Vec<i32> = (pos0..pos0 + n as i32).collect();
            for (side, x, d) in [(Side::Key, &k, dk), (Side::Value, &v, dv)] {
                let mut out = vec![0.0; x.len()];
                let params = TapParams {
                    x: x.as_ptr(),
                    x_nb_head: 4 * shape.head_dim(side),
                    x_nb_token: 4 * d,
                    q: if side == Side::Key { q.as_ptr() } else { std::ptr::null() },
                    q_nb_head: 4 * shape.head_dim_k,
                    q_nb_token: 4 * dq,
                    pos: if side == Side::Key { pos.as_ptr() } else { std::ptr::null() },
                    out: out.as_mut_ptr(),
                    n_token: n as i32,
                    il: 4,
                    side: side as i32,
                };
                for ith in (0..nth).rev() {
                    unsafe { tap.run(&params, ith, nth) }.unwrap();
                }
                assert_eq!(&out, x, "statistics leave the model as it is");
            }
            all_k.extend(k);
            all_q.extend(q);
        }
        let Mode::Collect(mut layers) = tap.replace_mode(Mode::Pass) else { unreachable!() };
        (layers.remove(&4).unwrap(), all_k, all_q)
    }

    #[test]
    fn moments_are_those_of_all_tokens() {
        let (stats, k, q) = collect(1);
        let shape = shape();
        let d = shape.width(Side::Key);
        let n = k.len() / d;
        assert_eq!(stats.moments[0].n_token(), n as u64);
        let mean: Vec<f64> = (0..d).map(|c| k.iter().skip(c).step_by(d).map(|&v| f64::from(v)).sum::<f64>() / n as f64).collect();
        let (got_mean, got) = stats.moments[0].finish();
        for i in 0..d {
            assert!((got_mean[i] - mean[i]).abs() < 1e-5 * (1.0 + mean[i].abs()));
            for j in 0..d {
                let c = k.chunks(d).map(|x| (f64::from(x[i]) - mean[i]) * (f64::from(x[j]) - mean[j])).sum::<f64>() / n as f64;
                assert!((got[(i, j)] - c).abs() < 1e-5, "({i}, {j}): {} for {c}", got[(i, j)]);
            }
        }
        let window = lock(&stats.window);
        assert_eq!(window.keys, k);
        assert_eq!(window.values.len(), n * shape.width(Side::Value));
        assert_eq!(window.positions, (0..n / 4).map(|i| 4 * i + 3).collect::<Vec<_>>());
        let dq = shape.n_head * shape.head_dim_k;
        assert_eq!(window.queries[dq..2 * dq], q[7 * dq..8 * dq]);
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let (one, ..) = collect(1);
        for nth in [2, 3, 8] {
            let (other, ..) = collect(nth);
            for side in SIDES {
                assert_eq!(one.moments[side as usize].finish(), other.moments[side as usize].finish());
            }
            assert_eq!(*lock(&one.window), *lock(&other.window));
        }
    }

    #[test]
    fn rotations_and_their_transposes() {
        let rope = shape().rope;
        // position 40 lies beyond the table
        let table = RopeTable::new(&rope, 32);
        for pos in [0, 7, 40] {
            let x: Vec<f32> = (0..24).map(|i| (i as f32).sin()).collect();
            let mut y = x.clone();
            table.rotate(&mut y, pos);
            let (freq, magnitude) = rope.frequencies();
            let (a, b) = rope.pair(1);
            let (sin, cos) = (freq[1] * f64::from(pos)).sin_cos();
            let want = f64::from(magnitude) * (f64::from(x[a]) * cos - f64::from(x[b]) * sin);
            assert!((f64::from(y[a]) - want).abs() < 1e-5);
            assert_eq!(y[16..], x[16..], "dimensions that are not rotated");
            table.rotate_back(&mut y, pos);
            assert!(x.iter().zip(&y).take(16).all(|(x, y)| (magnitude * magnitude * x - y).abs() < 1e-5));
        }
    }

    #[test]
    fn errors_are_kept_for_the_driver() {
        let tap = Tap::new(8);
        let params = TapParams {
            x: std::ptr::null(),
            x_nb_head: 0,
            x_nb_token: 0,
            q: std::ptr::null(),
            q_nb_head: 0,
            q_nb_token: 0,
            pos: std::ptr::null(),
            out: std::ptr::null_mut(),
            n_token: 1,
            il: 3,
            side: 0,
        };
        assert!(unsafe { tap.run(&params, 0, 1) }.is_err());
        assert_eq!(tap.take_error().as_deref(), Some("layer 3 was not described"));
        assert_eq!(tap.take_error(), None);
        assert!(tap.describe(0, 5, 2, 64, 64, RopeParams::none()).is_err(), "heads that do not divide");
        assert!(tap.take_error().is_some());
        tap.describe(0, 4, 2, 64, 64, RopeParams::none()).unwrap();
        assert!(tap.describe(0, 4, 2, 32, 64, RopeParams::none()).is_err(), "two descriptions");
    }
}
