//! The tap: sees keys before RoPE, values and queries of the running model, and either accumulates moments and keeps the
//! window for [`super::weigh`], or sends keys and values through the codec.
//!
//! Work is split over the runtime's threads by rows of the moment matrices, in blocks of fixed size, so that every sum is
//! formed in the same order whatever the number of threads.

use super::windows::Random;
use crate::codec::Codec;
use crate::hash::xxh64;
use crate::projection::{Side, SIDES};
use crate::rope::{RopeKind, RopeParams};
use anyhow::{bail, ensure, Result};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::Range;
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
    pub scoring: Scoring,
}

/// How a layer's queries score cells; as `palu_tap_layer` has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Scoring {
    pub scale: f32,
    /// 0: none
    pub softcap: f32,
    /// ALiBi; 0: none
    pub max_bias: f32,
    pub reach: Reach,
    /// `[n_head]`, or empty
    pub sinks: Vec<f32>,
}

impl Scoring {
    /// softmax(q·k/√d), and nothing else.
    pub fn plain(head_dim_k: usize) -> Self {
        Self { scale: 1.0 / (head_dim_k as f32).sqrt(), softcap: 0.0, max_bias: 0.0, reach: Reach::All, sinks: Vec::new() }
    }

    /// ALiBi's slope of query head `h` of `n_head`, as `ggml_soft_max_ext()` has it.
    fn slope(&self, h: usize, n_head: usize) -> f32 {
        if self.max_bias <= 0.0 {
            return 0.0;
        }
        let n = 1usize << n_head.max(1).ilog2();
        let base = |bias: f32| 2f32.powf(-bias / n as f32);
        if h < n {
            base(self.max_bias).powi(h as i32 + 1)
        } else {
            base(self.max_bias / 2.0).powi(2 * (h - n) as i32 + 1)
        }
    }

    /// Score of a cell `distance` before the query of head `h`, from their product.
    pub fn score(&self, product: f32, h: usize, n_head: usize, distance: usize) -> f32 {
        let mut score = self.scale * product;
        if self.softcap > 0.0 {
            score = self.softcap * (score / self.softcap).tanh();
        }
        score - self.slope(h, n_head) * distance as f32
    }

    /// What an error of the product does to the score: its derivative over that of a layer without a cap.
    pub fn passed(&self, product: f32) -> f32 {
        if self.softcap > 0.0 {
            1.0 - (self.scale * product / self.softcap).tanh().powi(2)
        } else {
            1.0
        }
    }
}

/// The first cell that a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    All,
    /// this many cells, its own included
    Last(usize),
    /// from the last multiple of this position on
    Chunk(usize),
    /// this many cells before it
    Before(usize),
}

impl Reach {
    pub fn first(self, pos: usize) -> usize {
        match self {
            Self::All => 0,
            Self::Last(n) => (pos + 1).saturating_sub(n),
            Self::Chunk(n) => pos / n * n,
            Self::Before(n) => pos.saturating_sub(n),
        }
    }
}

/// `palu_tap_layer.read`
pub type ReadFn = unsafe extern "C" fn(*const c_void, *mut f32, usize) -> i64;

/// The matrices that keys and values come from, as the runtime keeps them.
#[derive(Clone, Copy)]
pub struct Projections {
    /// by side; null where there is no such matrix
    pub matrix: [*const c_void; 2],
    pub bias: [*const c_void; 2],
    pub read: Option<ReadFn>,
}

// SAFETY: the handles are only given back to the runtime, from the thread that runs it
unsafe impl Send for Projections {}
unsafe impl Sync for Projections {}

impl Projections {
    pub const NONE: Self = Self { matrix: [std::ptr::null(); 2], bias: [std::ptr::null(); 2], read: None };

    fn read(&self, handle: *const c_void) -> Result<Option<Vec<f32>>> {
        let (false, Some(read)) = (handle.is_null(), self.read) else { return Ok(None) };
        // SAFETY: a capacity of 0 only asks for the size
        let n = usize::try_from(unsafe { read(handle, std::ptr::null_mut(), 0) });
        let Ok(n) = n else { bail!("the runtime cannot read a projection") };
        let mut out = vec![0f32; n];
        // SAFETY: the buffer has the capacity given
        ensure!(unsafe { read(handle, out.as_mut_ptr(), n) } == n as i64, "the runtime cannot read a projection");
        Ok(Some(out))
    }

    /// `[width][n_in]` and the bias `[width]` (zeros for none) of a side, or `None` where it is not one matrix.
    pub fn of(&self, side: Side, width: usize) -> Result<Option<(Vec<f32>, Vec<f32>)>> {
        let Some(matrix) = self.read(self.matrix[side as usize])? else { return Ok(None) };
        let bias = self.read(self.bias[side as usize])?.unwrap_or_else(|| vec![0.0; width]);
        ensure!(!matrix.is_empty() && matrix.len() % width == 0 && bias.len() == width, "the runtime's projection has another shape");
        Ok(Some((matrix, bias)))
    }
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

/// Adds `xᵀ x` of rows `rows` and columns `columns` to `sum` `[rows][columns]`, by way of f32 products `scratch`.
pub fn add_products(x: &[f32], d: usize, rows: Range<usize>, columns: Range<usize>, sum: &mut [f64], scratch: &mut Vec<f32>) {
    let x = MatRef::from_row_major_slice(x, x.len() / d, d);
    scratch.resize(rows.len() * columns.len(), 0.0);
    let product = MatMut::from_row_major_slice_mut(scratch, rows.len(), columns.len());
    let (left, right) = (x.subcols(rows.start, rows.len()).transpose(), x.subcols(columns.start, columns.len()));
    matmul(product, Accum::Replace, left, right, 1.0f32, Par::Seq);
    for (s, &p) in sum.iter_mut().zip(scratch.iter()) {
        *s += f64::from(p);
    }
}

/// Some rows of the lower triangle of a head group's second moment.
#[derive(Clone, Debug, PartialEq)]
struct Block {
    /// first channel of the group
    col0: usize,
    /// first channel of the rows
    row0: usize,
    /// `[rows]`
    sum: Vec<f64>,
    /// `[rows][row0 + rows - col0]`
    product: Vec<f64>,
}

/// First and second moments of a side's channels within head groups, less a provisional mean: keys of some models have biases
/// hundreds of times their deviation, and the second moment around zero would leave nothing of the deviation in f32.
pub struct Moments {
    d: usize,
    /// channels of a head group
    group: usize,
    /// sum of the tokens' weights, per group
    total: Mutex<Vec<f64>>,
    shift: OnceLock<Vec<f32>>,
    /// each has one owner per call, so its lock is never waited for
    blocks: Vec<Mutex<Block>>,
}

impl Moments {
    pub fn new(d: usize, group: usize) -> Self {
        let block = |col0: usize, row0: usize| {
            let rows = BLOCK_ROWS.min(col0 + group - row0);
            Mutex::new(Block { col0, row0, sum: vec![0.0; rows], product: vec![0.0; rows * (row0 + rows - col0)] })
        };
        let blocks = (0..d).step_by(group).flat_map(|c| (c..c + group).step_by(BLOCK_ROWS).map(move |r| block(c, r))).collect();
        Self { d, group, total: Mutex::new(vec![0.0; d / group]), shift: OnceLock::new(), blocks }
    }

    /// Bytes that [`Moments::new`] takes.
    pub fn bytes(d: usize, group: usize) -> usize {
        8 * d.div_ceil(group) * (group * (group + BLOCK_ROWS) / 2 + group)
    }

    /// Adds `fill`'s tokens `[n_token][d]`, all of the same weight.
    fn add(&self, n_token: usize, ith: usize, nth: usize, fill: impl Fn(&mut Vec<f32>)) {
        if ith == 0 {
            lock(&self.total).iter_mut().for_each(|t| *t += n_token as f64);
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
                let (rows, width) = (block.row0..block.row0 + block.sum.len(), block.row0 + block.sum.len() - block.col0);
                for token in x.chunks_exact(self.d) {
                    for (s, &x) in block.sum.iter_mut().zip(&token[rows.clone()]) {
                        *s += f64::from(x);
                    }
                }
                add_products(x, self.d, rows, block.col0..block.col0 + width, &mut block.product, scratch);
            }
        });
    }

    /// Adds tokens `x` `[n_token][d]`, less `shift`, of which group `g` has weights `weights` `[n_token]`.
    pub fn add_weighted(&self, g: usize, x: &[f32], shift: &[f32], weights: &[f32]) {
        let shift = self.shift.get_or_init(|| shift.to_vec());
        let channels = g * self.group..(g + 1) * self.group;
        lock(&self.total)[g] += weights.iter().map(|&w| f64::from(w)).sum::<f64>();
        let (mut rows, mut roots, mut scratch) = (Vec::new(), Vec::new(), Vec::new());
        for (token, &w) in x.chunks_exact(self.d).zip(weights).filter(|(_, &w)| w > 0.0) {
            let root = w.sqrt();
            roots.push(root);
            rows.extend(token[channels.clone()].iter().zip(&shift[channels.clone()]).map(|(x, s)| root * (x - s)));
        }
        if roots.is_empty() {
            return;
        }
        for block in self.blocks.iter().filter(|b| lock(b).col0 == channels.start) {
            let block = &mut *lock(block);
            let row0 = block.row0 - block.col0;
            let local = row0..row0 + block.sum.len();
            for (token, &root) in rows.chunks_exact(self.group).zip(&roots) {
                for (s, &x) in block.sum.iter_mut().zip(&token[local.clone()]) {
                    *s += f64::from(root * x);
                }
            }
            add_products(&rows, self.group, local.clone(), 0..local.end, &mut block.product, &mut scratch);
        }
    }

    /// Groups.
    pub fn n_group(&self) -> usize {
        self.d / self.group
    }

    /// Channels of a head group.
    pub fn group(&self) -> usize {
        self.group
    }

    /// What all sums are less, once there is any.
    pub fn shift(&self) -> Option<&[f32]> {
        self.shift.get().map(Vec::as_slice)
    }

    /// Whether anything was added.
    pub fn is_empty(&self) -> bool {
        lock(&self.total).iter().all(|&t| t == 0.0)
    }

    pub fn is_finite(&self) -> bool {
        self.blocks.iter().all(|b| lock(b).sum.iter().all(|s| s.is_finite()))
    }

    /// Mean `[d]`, and covariance `[group][group]` of each group; `None` for a group without weight.
    pub fn finish(&self) -> (Vec<f64>, Vec<Option<Mat<f64>>>) {
        let total = lock(&self.total).clone();
        let mut offset = Vec::with_capacity(self.d);
        for block in &self.blocks {
            let block = lock(block);
            let n = total[block.col0 / self.group];
            offset.extend(block.sum.iter().map(|s| if n > 0.0 { s / n } else { 0.0 }));
        }
        let mut covariance: Vec<_> = total.iter().map(|&n| (n > 0.0).then(|| Mat::zeros(self.group, self.group))).collect();
        for block in &self.blocks {
            let block = lock(block);
            let Some(covariance) = &mut covariance[block.col0 / self.group] else { continue };
            let n = total[block.col0 / self.group];
            let width = block.row0 + block.sum.len() - block.col0;
            for (r, row) in block.product.chunks_exact(width).enumerate() {
                let i = block.row0 - block.col0 + r;
                for j in 0..=i {
                    let c = row[j] / n - offset[block.col0 + i] * offset[block.col0 + j];
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

    /// All sums, for a checkpoint.
    fn save(&self, out: &mut Vec<f64>) {
        out.extend(lock(&self.total).iter());
        let shift = self.shift.get();
        out.push(f64::from(u8::from(shift.is_some())));
        out.extend((0..self.d).map(|c| shift.map_or(0.0, |s| f64::from(s[c]))));
        for block in &self.blocks {
            let block = lock(block);
            out.extend(block.sum.iter().chain(&block.product));
        }
    }

    fn n_float(&self) -> usize {
        let blocks = self.blocks.iter().map(|b| { let b = lock(b); b.sum.len() + b.product.len() });
        self.n_group() + 1 + self.d + blocks.sum::<usize>()
    }

    /// Sets what [`Moments::save`] wrote; `None` if there is too little of it.
    fn restore(&mut self, from: &mut &[f64]) -> Option<()> {
        let mut take = |n: usize| {
            let (head, tail) = from.split_at_checked(n)?;
            *from = tail;
            Some(head)
        };
        *lock(&self.total) = take(self.d / self.group)?.to_vec();
        let has_shift = take(1)?[0] != 0.0;
        let shift: Vec<f32> = take(self.d)?.iter().map(|&s| s as f32).collect();
        self.shift = if has_shift { OnceLock::from(shift) } else { OnceLock::new() };
        for block in &self.blocks {
            let Block { sum, product, .. } = &mut *lock(block);
            for values in [sum, product] {
                let saved = take(values.len())?;
                values.copy_from_slice(saved);
            }
        }
        Some(())
    }
}

/// Everything collected in one layer.
pub struct LayerStats {
    /// [key, value]: every token the same
    pub moments: [Moments; 2],
    /// [key, value]: every token as much as its errors cost; if asked for
    pub attended: Option<[Moments; 2]>,
    /// written by one thread
    window: Mutex<Window>,
}

impl LayerStats {
    /// `group_size`: heads whose channels are looked at together; `attended`: whether tokens are also weighted; `sample`: every how
    /// many positions a query is looked at.
    pub fn new(shape: &LayerShape, group_size: usize, attended: bool, sample: usize) -> Self {
        let moments = || SIDES.map(|s| Moments::new(shape.width(s), group_size * shape.head_dim(s)));
        Self { moments: moments(), attended: attended.then(moments), window: Mutex::new(Window::new(sample)) }
    }

    pub fn bytes(shape: &LayerShape, group_size: usize, attended: bool, n_window: usize) -> usize {
        let side = |s| (1 + usize::from(attended)) * Moments::bytes(shape.width(s), group_size * shape.head_dim(s)) + 4 * n_window * shape.width(s);
        SIDES.into_iter().map(side).sum()
    }

    fn all(&self) -> impl Iterator<Item = &Moments> {
        self.moments.iter().chain(self.attended.iter().flatten())
    }

    /// All sums, for a checkpoint.
    pub fn save(&self, out: &mut Vec<f64>) {
        self.all().for_each(|m| m.save(out));
    }

    /// How many [`LayerStats::save`] writes.
    pub fn n_float(&self) -> usize {
        self.all().map(Moments::n_float).sum()
    }

    /// Sets what [`LayerStats::save`] wrote; `None` if there is too little of it.
    pub fn restore(&mut self, from: &mut &[f64]) -> Option<()> {
        self.moments.iter_mut().chain(self.attended.iter_mut().flatten()).try_for_each(|m| m.restore(from))
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

    pub fn side(&self, side: Side) -> &[f32] {
        match side {
            Side::Key => &self.keys,
            Side::Value => &self.values,
        }
    }
}

/// What the tap does with what it sees.
pub enum Mode {
    /// hands everything on as it is
    Pass,
    /// the same, and accumulates moments of these layers
    Collect(BTreeMap<usize, LayerStats>),
    /// changes these sides of these layers
    Compress(BTreeMap<(usize, Side), Change>),
}

/// What becomes of a side's tokens.
pub enum Change {
    /// stored as a row and read back
    Codec(Codec),
    /// the same, but of the error only some channels' part: `[d][d]` row-major per head group, or `None` for no error
    Part(Codec, Vec<Option<Vec<f32>>>),
    /// independent Gaussian errors
    Noise { deviation: f32, seed: u64 },
}

impl Change {
    /// Changes tokens `x` `[n_token][d]`, of which the first is token `first` of the batch, to `out`.
    fn apply(&self, x: &[f32], d: usize, first: usize, out: &mut [f32]) {
        match self {
            Self::Codec(codec) => through(codec, x, out),
            Self::Part(codec, parts) => {
                through(codec, x, out);
                let width = d / parts.len();
                let error: Vec<f32> = out.iter().zip(x).map(|(o, x)| o - x).collect();
                out.copy_from_slice(x);
                let n_token = x.len() / d;
                for (g, part) in parts.iter().enumerate().filter_map(|(g, p)| Some((g, p.as_ref()?))) {
                    let error = MatRef::from_row_major_slice(&error, n_token, d).subcols(g * width, width);
                    let part = MatRef::from_row_major_slice(part, width, width);
                    let out = MatMut::from_row_major_slice_mut(out, n_token, d).subcols_mut(g * width, width);
                    matmul(out, Accum::Add, error, part.transpose(), 1.0f32, Par::Seq);
                }
            }
            Self::Noise { deviation, seed } => {
                for (t, (x, out)) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)).enumerate() {
                    // by place and content, so that the number of threads changes nothing and equal tokens get different errors
                    let place = seed ^ (first + t) as u64;
                    let mut random = Random(x.iter().fold(place, |h, v| xxh64(&v.to_le_bytes(), h)));
                    for (x, out) in x.iter().zip(out) {
                        *out = x + deviation * random.gaussian();
                    }
                }
            }
        }
    }
}

fn through(codec: &Codec, x: &[f32], out: &mut [f32]) {
    let n_token = x.len() / (codec.n_head_kv * codec.head_dim);
    let mut rows = vec![0; n_token * codec.row_bytes];
    codec.encode_rows(x, &mut rows);
    codec.decode_rows(&rows, out);
}

struct State {
    layers: BTreeMap<usize, (LayerShape, Arc<RopeTable>)>,
    projections: BTreeMap<usize, Projections>,
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
        Self { n_pos, state: RwLock::new(State { layers: BTreeMap::new(), projections: BTreeMap::new(), mode: Mode::Pass }), error: Mutex::new(None) }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// `palu_tap_describe`
    pub fn describe(&self, il: usize, shape: LayerShape, projections: Projections) -> Result<()> {
        let result = self.describe_checked(il, shape, projections);
        self.keep_error(&result);
        result
    }

    fn keep_error(&self, result: &Result<()>) {
        if let Err(e) = result {
            lock(&self.error).get_or_insert_with(|| format!("{e:#}"));
        }
    }

    fn describe_checked(&self, il: usize, shape: LayerShape, projections: Projections) -> Result<()> {
        let LayerShape { n_head, n_head_kv, head_dim_k, head_dim_v, ref rope, ref scoring } = shape;
        ensure!(
            n_head_kv > 0 && head_dim_k > 0 && head_dim_v > 0 && n_head >= n_head_kv && n_head.is_multiple_of(n_head_kv),
            "layer {il}: {n_head} query heads over {n_head_kv} KV heads of {head_dim_k} and {head_dim_v} dimensions"
        );
        rope.check(head_dim_k)?;
        let Scoring { scale, softcap, max_bias, reach, ref sinks } = *scoring;
        ensure!(
            scale.is_finite() && softcap.is_finite() && max_bias.is_finite(),
            "layer {il}: scores are scaled by {scale}, capped at {softcap} and biased by {max_bias}"
        );
        ensure!(!matches!(reach, Reach::Last(0) | Reach::Chunk(0)), "layer {il}: a window of no token");
        ensure!(sinks.is_empty() || sinks.len() == n_head, "layer {il}: {} sinks for {n_head} heads", sinks.len());
        let mut state = self.write();
        if let Some((known, _)) = state.layers.get(&il) {
            ensure!(*known == shape, "layer {il} was described in two ways");
            return Ok(());
        }
        let known = state.layers.values().find(|(s, _)| s.rope == shape.rope).map(|(_, t)| t.clone());
        let table = known.unwrap_or_else(|| Arc::new(RopeTable::new(&shape.rope, self.n_pos)));
        state.layers.insert(il, (shape, table));
        state.projections.insert(il, projections);
        Ok(())
    }

    /// Shape and rotations of a layer that was described.
    pub fn layer(&self, il: usize) -> (LayerShape, Arc<RopeTable>) {
        let state = self.read();
        state.layers[&il].clone()
    }

    pub fn projections(&self, il: usize) -> Projections {
        self.read().projections.get(&il).copied().unwrap_or(Projections::NONE)
    }

    /// Takes what the last window left, layer after layer.
    pub fn take_windows(&self) -> Vec<Window> {
        let take = |l: &LayerStats| {
            let mut window = lock(&l.window);
            let fresh = Window::new(window.sample);
            std::mem::replace(&mut *window, fresh)
        };
        self.with_collected(|layers| layers.values().map(take).collect())
    }

    /// Looks at what is being collected.
    pub fn with_collected<T: Default>(&self, look: impl FnOnce(&BTreeMap<usize, LayerStats>) -> T) -> T {
        match &self.read().mode {
            Mode::Collect(layers) => look(layers),
            _ => T::default(),
        }
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
        self.with_collected(|layers| {
            let sides = layers.iter().flat_map(|(&il, stats)| SIDES.map(|side| (il, side, stats)));
            sides.into_iter().find(|(_, side, stats)| !stats.moments[*side as usize].is_finite()).map(|(il, side, _)| (il, side))
        })
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
                Mode::Compress(sides) if sides.contains_key(&(il, side)) => sides[&(il, side)].apply(tokens, width, share.start, out),
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
        LayerShape { n_head: 6, n_head_kv: 3, head_dim_k: 24, head_dim_v: 30, rope, scoring: Scoring::plain(24) }
    }

    /// Runs keys and values of a window in a few blocks through a collecting tap; returns it with what went in.
    fn collect(nth: usize) -> (LayerStats, Vec<f32>, Vec<f32>) {
        let shape = shape();
        let tap = Tap::new(32);
        tap.describe(4, shape.clone(), Projections::NONE).unwrap();
        tap.replace_mode(Mode::Collect(BTreeMap::from([(4, LayerStats::new(&shape, shape.n_head_kv, false, 4))])));
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
        assert_eq!(*lock(&stats.moments[0].total), [n as f64]);
        let mean: Vec<f64> = (0..d).map(|c| k.iter().skip(c).step_by(d).map(|&v| f64::from(v)).sum::<f64>() / n as f64).collect();
        let (got_mean, got) = stats.moments[0].finish();
        let got = got[0].as_ref().unwrap();
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
        let shape = |n_head, head_dim_k| LayerShape {
            n_head,
            n_head_kv: 2,
            head_dim_k,
            head_dim_v: 64,
            rope: RopeParams::none(),
            scoring: Scoring::plain(64),
        };
        assert!(tap.describe(0, shape(5, 64), Projections::NONE).is_err(), "heads that do not divide");
        assert!(tap.take_error().is_some());
        let mut bad = shape(4, 64);
        bad.scoring.sinks = vec![0.0; 3];
        assert!(tap.describe(0, bad, Projections::NONE).is_err(), "sinks of other heads");
        tap.describe(0, shape(4, 64), Projections::NONE).unwrap();
        assert!(tap.describe(0, shape(4, 32), Projections::NONE).is_err(), "two descriptions");
    }

    /// As `llama_hparams::is_masked_swa()` and `ggml_soft_max_ext()` say.
    #[test]
    fn windows_and_slopes() {
        assert_eq!([Reach::All, Reach::Last(4), Reach::Chunk(4), Reach::Before(4)].map(|r| r.first(10)), [0, 7, 8, 6]);
        assert_eq!([Reach::Last(4), Reach::Before(4)].map(|r| r.first(2)), [0, 0]);
        let scoring = Scoring { max_bias: 8.0, ..Scoring::plain(16) };
        let bias = |h| scoring.score(0.0, h, 12, 3);
        assert!((bias(0) + 3.0 * 0.5).abs() < 1e-6 && (bias(7) + 3.0 / 256.0).abs() < 1e-6);
        assert!((bias(8) + 3.0 * 0.5f32.sqrt()).abs() < 1e-6, "the heads above the power of two lie between the others");
    }
}
