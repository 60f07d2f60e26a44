//! Attention over rows.
//!
//! Codes are unpacked a tile of [`TILE`] cells at a time and multiplied by the integer decoder. Two schedules share the
//! pieces; which one runs follows from the shapes alone, and neither's result depends on the number of threads:
//!
//! - **Split** (few query tokens, a long context): a unit of work is a chunk of the context, for all heads. Codes are
//!   unpacked once, keys are rebuilt once per KV head, and values are summed as codes: u\[c\] = sum over cells of weight *
//!   code\[c\]. A chunk leaves its largest score, its sums and u; [`AttnLayer::combine`] merges chunks and decodes u once
//!   per head and query.
//!   Where each KV head has one query, its keys are not even written down, and the rotated pairs that turn slowly are
//!   scored together: in a window of [`WINDOW_TILES`] tiles, the query is rotated back to the window's middle and six
//!   Chebyshev polynomials of the position carry the rest. That takes the place of half of the integer product (of more
//!   with larger heads and RoPE bases), at an error below 1.1e-5 of the slow pairs' part of a score.
//! - **Blocks** (many query tokens): a unit is a KV head and a block of query tokens. Each tile's keys and values are
//!   rebuilt once for the block, and the rest is two float products with an online softmax between them.

use crate::codec::{Codec, Decoder, StoreParams};
use crate::kernels::generic::{
    FillTrig, FinishValue, Gemm, Nodes, PairQuery, PlainQuery, PrepareNodes, ProjectValue, RebuildKeys, RebuildValues,
    ScoreKeys, Softmax, NODE_ROWS, N_NODE, STRIP,
};
use crate::kernels::{self, dispatch, room, round_up, Aligned, Arena, Isa, PAD, TILE, TRIG_STRIDE};
use crate::projection::{Group, Layer, Side, SideProj};
use crate::rope::{Angles, RopeKind, RopeParams};
use anyhow::Result;
use std::f32::consts::LOG2_E;
use std::ptr::null;
use std::sync::Arc;

/// What the kernels of this process use: "AVX-512 VNNI", "AVX2" or "portable".
pub fn cpu_path() -> &'static str {
    kernels::path().name()
}

/// Where attention finds its inputs; `palu_attn_params`.
#[derive(Clone, Copy, Debug)]
pub struct AttnParams {
    /// `[n_stream][n_token][n_head][head_dim_k]`, rotated, last dimension contiguous; strides in bytes
    pub q: *const f32,
    pub q_nb_head: usize,
    pub q_nb_token: usize,
    pub q_nb_stream: usize,
    /// `[n_stream][n_kv][row_bytes]`, rows contiguous within a stream
    pub rows_k: *const u8,
    pub rows_v: *const u8,
    pub rows_k_nb_stream: usize,
    pub rows_v_nb_stream: usize,
    /// `[n_stream][n_token][n_kv]` f16 or f32, or null
    pub mask: *const u8,
    pub mask_nb_token: usize,
    pub mask_nb_stream: usize,
    pub mask_f16: bool,
    /// `[n_stream][n_kv]`
    pub pos: *const i32,
    /// `[n_head]` or null
    pub sinks: *const f32,
    /// what the same queries got from other cells, `[n_stream][n_token][n_head][`[`extra_row`]`]`, or null
    pub extra: *const f32,
    /// [`AttnLayer::partial_size`] floats
    pub partial: *mut f32,
    /// `[n_stream][n_token][n_head][head_dim_v]`
    pub out: *mut f32,
    pub n_head: usize,
    pub n_token: usize,
    pub n_stream: usize,
    pub n_kv: usize,
    pub scale: f32,
    pub softcap: f32,
    pub max_bias: f32,
}

/// Floats of one query's row of [`AttnParams::extra`]: its largest score, the sum of e^(score - largest), two that are not used, and from
/// [`EXTRA_HEAD`] on the sum of e^(score - largest) times values.
pub fn extra_row(head_dim_v: usize) -> usize {
    EXTRA_HEAD + head_dim_v
}

/// See [`extra_row`].
pub const EXTRA_HEAD: usize = 4;

/// Rows to be rebuilt as the f16 cache that they stand for; `palu_rebuild_params`.
#[derive(Clone, Copy, Debug)]
pub struct RebuildParams {
    /// `[n_stream][n_kv][row_bytes]`, rows contiguous within a stream
    pub rows: *const u8,
    /// stride in bytes
    pub rows_nb_stream: usize,
    /// `[n_stream][n_kv]`; only read for keys
    pub pos: *const i32,
    /// f16 `[n_stream][n_slot + n_token + n_pad + n_kv][n_head_kv][head_dim]`
    pub out: *mut u16,
    pub n_stream: usize,
    pub n_kv: usize,
    /// f16 `[n_stream][n_slot][n_head_kv][head_dim]`, come before the rows
    pub slots: *const u16,
    pub n_slot: usize,
    /// `[n_stream*n_token][n_head_kv][head_dim]`, keys rotated, come next; strides in bytes
    pub cur: *const f32,
    pub cur_nb_head: usize,
    pub cur_nb_token: usize,
    pub n_token: usize,
    /// cells of zeros between these and the rows
    pub n_pad: usize,
}

impl RebuildParams {
    /// Rows alone.
    pub fn of_rows(rows: *const u8, rows_nb_stream: usize, pos: *const i32, out: *mut u16, n_stream: usize, n_kv: usize) -> Self {
        let (slots, cur) = (null(), null());
        Self { rows, rows_nb_stream, pos, out, n_stream, n_kv, slots, n_slot: 0, cur, cur_nb_head: 0, cur_nb_token: 0, n_token: 0, n_pad: 0 }
    }

    /// Cells of a stream before the rows.
    pub fn n_more(&self) -> usize {
        self.n_slot + self.n_token + self.n_pad
    }
}

/// One layer, ready to run.
pub struct AttnLayer {
    codecs: [Codec; 2],
    keys: Vec<KeyGroup>,
    slow: Option<SlowKeys>,
    angles: Option<Arc<Angles>>,
    /// `[head_dim_k]`: which dimension of a head stands at each place of a rebuilt key: first halves of the rotated pairs, second
    /// halves, the rest
    order: Vec<usize>,
    /// that order is the model's own
    in_order: bool,
}

/// The slow pairs of all heads, and the dimensions that are not rotated, for scoring together; see [`PrepareNodes`].
struct SlowKeys {
    /// pairs before the first slow one, and slow ones
    n_fast: usize,
    n_pair: usize,
    n_plain: usize,
    /// `[N_NODE][pair_room]`
    bessel: Vec<f32>,
    groups: Vec<SlowGroup>,
}

/// With `n_dim` = 2*pair_room + plain_room: first halves of the slow pairs, second halves, dimensions that are not rotated,
/// each padded to [`PAD`].
struct SlowGroup {
    /// `[n_head][n_dim/4][stride][4]`: bytes of the decoder + 128
    dec: Aligned<u8>,
    /// `[n_head][n_dim]` each
    scale: Aligned<f32>,
    mean: Aligned<f32>,
    /// `[stride]`: 2^bits - 1
    levels: Aligned<u8>,
    limit: f32,
}

/// The Bessel function J_n(x), for small x, by its series.
fn bessel(n: usize, x: f64) -> f64 {
    let mut term = (1..=n).fold(1.0, |t, i| t * x / 2.0 / i as f64);
    let mut sum = term;
    for m in 1..20 {
        term *= -(x / 2.0) * (x / 2.0) / (m as f64 * (m + n) as f64);
        sum += term;
    }
    sum
}

impl SlowKeys {
    /// `None` where it would not pay.
    fn new(
        side: &SideProj,
        codec: &Codec,
        angles: Option<&Angles>,
        order: &[usize],
        pairs: &[(usize, usize)],
    ) -> Option<Self> {
        let frequency = angles.map_or(&[][..], |a| &a.frequency);
        let slow = |f: &f64| f.abs() * f64::from(HALF_WINDOW) <= SLOW_PHASE;
        let n_fast = frequency.iter().rposition(|f| !slow(f)).map_or(0, |last| last + 1);
        let n_pair = frequency.len() - n_fast;
        let n_plain = order.len() - 2 * frequency.len();
        if codec.planes != 1 || 2 * n_pair + n_plain < SLOW_DIMS {
            return None;
        }
        let pair_room = round_up(n_pair, PAD);
        let mut table = vec![0.0; N_NODE * pair_room];
        for j in 0..N_NODE {
            for i in 0..n_pair {
                let value = bessel(j, frequency[n_fast + i] * f64::from(HALF_WINDOW));
                // cos: J_0 - 2 J_2 + 2 J_4, sin: 2 J_1 - 2 J_3 + 2 J_5
                table[j * pair_room + i] =
                    (value * if j == 0 { 1.0 } else { 2.0 } * if j % 4 >= 2 { -1.0 } else { 1.0 }) as f32;
            }
        }
        let mut slow = Self { n_fast, n_pair, n_plain, bessel: table, groups: Vec::new() };
        let n_dim = slow.n_dim();
        // place among the slow dimensions, and place in a rebuilt key
        let places: Vec<(usize, usize)> = (0..n_pair)
            .flat_map(|i| [(i, n_fast + i), (pair_room + i, frequency.len() + n_fast + i)])
            .chain((0..n_plain).map(|i| (2 * pair_room + i, 2 * frequency.len() + i)))
            .collect();
        for (group, codes) in side.groups.iter().zip(&codec.groups) {
            let (rank, stride) = (group.rank, codes.plan.stride);
            let decoder = Decoder::new(group, 1, pairs);
            let mut dec = vec![128u8; group.n_head * n_dim * stride];
            let (mut scale, mut mean) = (vec![0.0; group.n_head * n_dim], vec![0.0; group.n_head * n_dim]);
            for head in 0..group.n_head {
                for &(to, from) in &places {
                    let from = head * side.head_dim + order[from];
                    mean[head * n_dim + to] = side.mean[group.head0 * side.head_dim + from];
                    if rank > 0 {
                        scale[head * n_dim + to] = decoder.scale[from];
                    }
                    for c in 0..rank {
                        let at = ((head * n_dim + to) / 4 * stride + c) * 4 + to % 4;
                        dec[at] = decoder.byte(from, c, 0, 1).wrapping_add(-128) as u8;
                    }
                }
            }
            let mut levels = vec![0u8; stride];
            for (level, half) in levels[..rank].iter_mut().zip(codes.half_levels()) {
                *level = (2.0 * half) as u8;
            }
            let most: f32 = levels.iter().map(|&l| f32::from(l)).sum();
            slow.groups.push(SlowGroup {
                dec: Aligned::new(&dec),
                scale: Aligned::new(&scale),
                mean: Aligned::new(&mean),
                levels: Aligned::new(&levels),
                // sums of weight * level stay below 2^31
                limit: (2.1e9 / most.max(1.0)).min(32512.0),
            });
        }
        Some(slow)
    }

    fn pair_room(&self) -> usize {
        round_up(self.n_pair, PAD)
    }

    fn n_dim(&self) -> usize {
        2 * self.pair_room() + round_up(self.n_plain, PAD)
    }
}

/// A head group's key decoder, dimensions in [`AttnLayer::order`].
struct KeyGroup {
    /// `[n_head][planes][head_dim][rank]`
    dec: Aligned<i8>,
    /// `[n_head][head_dim]` each
    init: Aligned<i32>,
    half: Aligned<f32>,
    scale: Aligned<f32>,
    mean: Aligned<f32>,
}

impl KeyGroup {
    fn new(side: &SideProj, group: &Group, planes: usize, order: &[usize], pairs: &[(usize, usize)]) -> Self {
        let (rank, n) = (group.rank, side.head_dim);
        let decoder = Decoder::new(group, planes, pairs);
        let mut dec = vec![0i8; group.n_head * planes * n * rank];
        let (mut init, mut half) = (vec![0i32; group.n_head * n], vec![0.0; group.n_head * n]);
        let (mut scale, mut mean) = (half.clone(), half.clone());
        for head in 0..group.n_head {
            for (i, &from) in order.iter().enumerate() {
                let (from, to) = (head * n + from, head * n + i);
                mean[to] = side.mean[group.head0 * n + from];
                if rank > 0 {
                    (init[to], half[to]) = decoder.offset(from);
                    scale[to] = decoder.scale[from];
                }
                for plane in 0..planes {
                    for c in 0..rank {
                        dec[((head * planes + plane) * n + i) * rank + c] = decoder.byte(from, c, plane, planes);
                    }
                }
            }
        }
        Self {
            dec: Aligned::new(&dec),
            init: Aligned::new(&init),
            half: Aligned::new(&half),
            scale: Aligned::new(&scale),
            mean: Aligned::new(&mean),
        }
    }
}

/// Cells on each side of the middle of a window of positions in which slow pairs are scored together.
const HALF_WINDOW: i32 = 64;
/// Tiles of a window.
const WINDOW_TILES: usize = 2;
/// Largest angle over half a window of a pair that counts as slow: [`N_NODE`] = 6 polynomials then leave out less than
/// 2 J_6(0.8) = 1.1e-5 of what the fastest of these pairs adds to a score, and less of slower ones.
const SLOW_PHASE: f64 = 0.8;
/// Slow dimensions from which on scoring them together is faster: it costs [`NODE_ROWS`] rows and the preparation.
const SLOW_DIMS: usize = 20;

/// Query rows (tokens times query heads of a KV head) up to which the split schedule is the faster one: it spends rank
/// multiplications per row, head and cell, the other one rank*head_dim/4 per head and cell and head_dim per row.
const SPLIT_ROWS: usize = 16;
/// Query tokens up to which the split schedule runs however many heads share a KV head, because it can use more threads.
const SPLIT_TOKENS: usize = 4;
const MAX_CHUNKS: usize = 64;
/// Tiles of context from which chunks have two: merging costs as much as a few cells.
const TWO_TILES_FROM: usize = 16;
/// Query rows of a block: what one rebuilt tile is shared by.
const BLOCK_ROWS: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Schedule {
    Split { tiles_per_chunk: usize, n_chunk: usize },
    Blocks { tokens: usize, n_block: usize },
}

/// Slope of each head's ALiBi, as `ggml_soft_max_ext()` has it.
pub(crate) fn slope(max_bias: f32, n_head: usize, head: usize) -> f32 {
    if max_bias <= 0.0 {
        return 1.0;
    }
    let n = 1 << n_head.ilog2();
    if head < n {
        (-max_bias / n as f32).exp2().powi(head as i32 + 1)
    } else {
        (-max_bias / 2.0 / n as f32).exp2().powi(2 * (head - n) as i32 + 1)
    }
}

/// Part of a tile that exists: its first cell, and how many.
#[derive(Clone, Copy)]
struct Tile {
    first: usize,
    n: usize,
}

impl AttnParams {
    fn heads_per_kv(&self, layer: &AttnLayer) -> usize {
        self.n_head / layer.codecs[0].n_head_kv
    }

    fn tile(&self, i: usize) -> Tile {
        Tile { first: i * TILE, n: TILE.min(self.n_kv - i * TILE) }
    }

    /// Key and value rows of a tile that will be read soon, and their bytes.
    fn ahead(&self, layer: &AttnLayer, stream: usize, tile: usize) -> [(*const u8, usize); 2] {
        let first = tile.saturating_mul(TILE);
        let n = TILE.min(self.n_kv.saturating_sub(first));
        let [k, v] = [layer.codecs[0].row_bytes, layer.codecs[1].row_bytes];
        let rows = |rows: *const u8, nb_stream: usize, row: usize| {
            (rows.wrapping_add(stream.wrapping_mul(nb_stream).wrapping_add(first.wrapping_mul(row))), n * row)
        };
        [rows(self.rows_k, self.rows_k_nb_stream, k), rows(self.rows_v, self.rows_v_nb_stream, v)]
    }

    /// A query's largest score over other cells, in units of ln 2, its sum, and its values.
    unsafe fn extra_at(&self, stream: usize, token: usize, head: usize, head_dim_v: usize) -> (f32, f32, *const f32) {
        if self.extra.is_null() {
            return (f32::NEG_INFINITY, 0.0, null());
        }
        let row = ((stream * self.n_token + token) * self.n_head + head) * extra_row(head_dim_v);
        // SAFETY: within the extra rows
        unsafe {
            let row = self.extra.add(row);
            (LOG2_E * *row, *row.add(1), row.add(EXTRA_HEAD))
        }
    }

    /// Address of a token's mask at a tile, or null.
    unsafe fn mask_at(&self, stream: usize, token: usize, tile: Tile) -> *const u8 {
        if self.mask.is_null() {
            return null();
        }
        let size = if self.mask_f16 { 2 } else { 4 };
        // SAFETY: within the mask
        unsafe { self.mask.add(stream * self.mask_nb_stream + token * self.mask_nb_token + tile.first * size) }
    }

    /// Cells of a tile that a token sees, and whether its mask is anything but 0 or hidden there.
    unsafe fn visible<I: Isa>(&self, stream: usize, token: usize, tile: Tile) -> (u64, bool) {
        let all = u64::MAX >> (TILE - tile.n);
        // SAFETY: the caller of the attention vouches for the mask
        unsafe {
            let mask = self.mask_at(stream, token, tile);
            if mask.is_null() {
                return (all, false);
            }
            let (visible, other) = I::scan_mask(mask, self.mask_f16, tile.n);
            (visible, other & visible != 0)
        }
    }

    /// A token's mask at a tile, f32 `[TILE]`, -inf beyond its end.
    unsafe fn load_mask<I: Isa>(&self, stream: usize, token: usize, tile: Tile, out: *mut f32) {
        // SAFETY: the caller of the attention vouches for the mask; `out` has room
        unsafe {
            let mask = self.mask_at(stream, token, tile);
            if mask.is_null() {
                for t in 0..TILE {
                    *out.add(t) = if t < tile.n { 0.0 } else { f32::NEG_INFINITY };
                }
            } else {
                I::load_mask(mask, self.mask_f16, tile.n, out);
            }
        }
    }
}

/// Scratch for one tile's codes, keys and angles.
struct TileScratch {
    /// `[TILE][stride]`
    codes: *mut u8,
    /// `[stride/4][TILE][4]`
    codes_t: *mut u8,
    /// `[TILE]`
    key_scale: *mut f32,
    /// `[head_dim_k][TILE]`
    keys: *mut f32,
    /// `[n_pair][TRIG_STRIDE]`
    cos: *mut f32,
    sin: *mut f32,
    /// `[n_pair]`
    base_cos: *mut f32,
    base_sin: *mut f32,
}

impl AttnLayer {
    /// Prepares a layer. Fails where `rope` does not fit the layer's heads.
    pub fn new(layer: &Layer, rope: &RopeParams) -> Result<Self> {
        let [k, v] = layer.sides_for(rope)?;
        let mut order = Vec::with_capacity(k.head_dim);
        let mut angles = None;
        let pairs = rope.pairs(k.head_dim);
        if rope.kind != RopeKind::None {
            let rotated = &pairs[..rope.n_pair()];
            order.extend(rotated.iter().map(|p| p.0));
            order.extend(rotated.iter().map(|p| p.1));
            angles = Some(Angles::shared(rope));
        }
        order.extend((0..k.head_dim).filter(|d| !order.contains(d)).collect::<Vec<_>>());
        let codecs = [Codec::with_pairs(k, &pairs), Codec::new(v)];
        let keys = k.groups.iter().map(|g| KeyGroup::new(k, g, codecs[0].planes, &order, &pairs)).collect();
        let in_order = order.iter().copied().eq(0..k.head_dim);
        let slow = SlowKeys::new(k, &codecs[0], angles.as_deref(), &order, &pairs);
        Ok(Self { codecs, keys, slow, angles, order, in_order })
    }

    pub fn codec(&self, side: Side) -> &Codec {
        &self.codecs[side as usize]
    }

    /// Stores this share of the tokens; see `palu_store`.
    ///
    /// # Safety
    /// As [`Codec::encode`].
    pub unsafe fn store(&self, side: Side, p: &StoreParams, ith: usize, nth: usize) {
        // SAFETY: the caller's promise
        unsafe { self.codec(side).encode(p, ith, nth) }
    }

    /// Rebuilds this share of the rows as f16, keys rotated; see `palu_rebuild`.
    ///
    /// # Safety
    /// Pointers of the shapes in [`RebuildParams`]; no other share of the same call writes the same cells.
    pub unsafe fn rebuild(&self, side: Side, p: &RebuildParams, ith: usize, nth: usize) {
        let codec = self.codec(side);
        let (dim, n_head) = (codec.head_dim, codec.n_head_kv);
        let angles = self.angles.as_ref().filter(|_| side == Side::Key);
        let n_pair = angles.map_or(0, |a| a.n_pair);
        let (mut cos, mut sin) = (vec![0.0; n_pair], vec![0.0; n_pair]);
        let mut x = vec![0.0f32; TILE * n_head * dim];
        let tiles = p.n_kv.div_ceil(TILE);
        for unit in (ith..p.n_stream * tiles).step_by(nth) {
            let (stream, first) = (unit / tiles, unit % tiles * TILE);
            let n = TILE.min(p.n_kv - first);
            let idxs: [i64; TILE] = std::array::from_fn(|t| (first + t) as i64);
            // SAFETY: the caller's promise; x holds a tile
            unsafe {
                codec.decode(p.rows.add(stream * p.rows_nb_stream), idxs.as_ptr(), n, x.as_mut_ptr());
                for (t, cell) in x[..n * n_head * dim].chunks_exact_mut(n_head * dim).enumerate() {
                    let at = stream * p.n_kv + first + t;
                    if let Some(angles) = angles {
                        angles.at(i64::from(*p.pos.add(at)), &mut cos, &mut sin);
                        for head in cell.chunks_exact_mut(dim) {
                            for i in 0..n_pair {
                                let (a, b) = (self.order[i], self.order[n_pair + i]);
                                let (c, s) = (cos[i] * angles.magnitude, sin[i] * angles.magnitude);
                                (head[a], head[b]) = (head[a] * c - head[b] * s, head[a] * s + head[b] * c);
                            }
                        }
                    }
                    let to = at + (stream + 1) * p.n_more();
                    let out = std::slice::from_raw_parts_mut(p.out.add(to * n_head * dim), n_head * dim);
                    for (to, &from) in out.iter_mut().zip(cell.iter()) {
                        *to = half::f16::from_f32(from).to_bits();
                    }
                }
            }
        }
        for unit in (ith..p.n_stream * p.n_more()).step_by(nth) {
            let (stream, i) = (unit / p.n_more(), unit % p.n_more());
            let to = (stream * (p.n_more() + p.n_kv) + i) * n_head * dim;
            // SAFETY: the caller's promise
            unsafe {
                let out = std::slice::from_raw_parts_mut(p.out.add(to), n_head * dim);
                if i < p.n_slot {
                    let from = p.slots.add((stream * p.n_slot + i) * n_head * dim);
                    out.copy_from_slice(std::slice::from_raw_parts(from, n_head * dim));
                } else if i < p.n_slot + p.n_token {
                    let token = p.cur.byte_add((stream * p.n_token + i - p.n_slot) * p.cur_nb_token);
                    for (head, out) in out.chunks_exact_mut(dim).enumerate() {
                        let from = std::slice::from_raw_parts(token.byte_add(head * p.cur_nb_head), dim);
                        out.iter_mut().zip(from).for_each(|(to, &x)| *to = half::f16::from_f32(x).to_bits());
                    }
                } else {
                    out.fill(0);
                }
            }
        }
    }

    fn schedule(&self, n_head: usize, n_token: usize, n_kv: usize) -> Schedule {
        let rep = n_head / self.codecs[0].n_head_kv;
        if n_token * rep <= SPLIT_ROWS || n_token <= SPLIT_TOKENS {
            let n_tile = n_kv.div_ceil(TILE);
            let tiles_per_chunk = n_tile.div_ceil(MAX_CHUNKS).max(if n_tile >= TWO_TILES_FROM { 2 } else { 1 });
            Schedule::Split { tiles_per_chunk, n_chunk: n_tile.div_ceil(tiles_per_chunk).max(1) }
        } else {
            let tokens = (BLOCK_ROWS / rep).clamp(1, n_token);
            Schedule::Blocks { tokens, n_block: n_token.div_ceil(tokens) }
        }
    }

    /// Chunks that the context is split into; see `palu_attn_n_chunk`.
    pub fn n_chunk(&self, n_head: usize, n_token: usize, _n_stream: usize, n_kv: usize) -> usize {
        match self.schedule(n_head, n_token, n_kv) {
            Schedule::Split { n_chunk, .. } => n_chunk,
            Schedule::Blocks { .. } => 1,
        }
    }

    /// Floats of one query row in a chunk's partial result: largest score, sum of probabilities, sum of weights, and from
    /// [`PAD`] on the sum of codes.
    fn partial_row(&self) -> usize {
        PAD + self.codecs[1].stride
    }

    /// Floats of [`AttnParams::partial`], `[n_stream][n_chunk][n_head_kv][n_token][n_head/n_head_kv][partial_row]`; 0 with one chunk.
    pub fn partial_size(&self, n_head: usize, n_token: usize, n_stream: usize, n_kv: usize) -> usize {
        match self.n_chunk(n_head, n_token, n_stream, n_kv) {
            1 => 0,
            n_chunk => n_stream * n_chunk * n_head * n_token * self.partial_row(),
        }
    }

    /// Does this share of the attention; see `palu_attn`.
    ///
    /// # Safety
    /// `p` must describe memory as [`AttnParams`] says, `n_head` must be a multiple of the layer's `n_head_kv`, and nothing
    /// else may write to that memory during the call but the other shares of the same call.
    pub unsafe fn attend(&self, p: &AttnParams, ith: usize, nth: usize) {
        debug_assert!(p.n_head.is_multiple_of(self.codecs[0].n_head_kv));
        if p.n_token == 0 || p.n_stream == 0 {
            return;
        }
        // SAFETY: the machine has the path's instruction set; the caller vouches for `p`
        unsafe {
            match self.schedule(p.n_head, p.n_token, p.n_kv) {
                Schedule::Split { tiles_per_chunk, n_chunk } => {
                    dispatch!(I => self.split::<I>(p, tiles_per_chunk, n_chunk, ith, nth))
                }
                Schedule::Blocks { tokens, n_block } => dispatch!(I => self.blocks::<I>(p, tokens, n_block, ith, nth)),
            }
        }
    }

    /// Does this share of what is left after all of [`AttnLayer::attend`]; see `palu_attn_combine`.
    ///
    /// # Safety
    /// As [`AttnLayer::attend`], whose shares must all be done.
    pub unsafe fn combine(&self, p: &AttnParams, ith: usize, nth: usize) {
        let Schedule::Split { n_chunk, .. } = self.schedule(p.n_head, p.n_token, p.n_kv) else { return };
        if n_chunk == 1 || p.n_token == 0 || p.n_stream == 0 {
            return;
        }
        let n_row = p.n_head * p.n_token;
        let row = self.partial_row();
        dispatch!(I => Arena::with(self.merge_room(), |arena| {
            let scratch = self.take_merge(arena);
            for unit in (ith..p.n_stream * n_row).step_by(nth) {
                let (stream, r) = (unit / n_row, unit % n_row);
                // SAFETY: within the partial results; the caller vouches for `p`
                unsafe {
                    let first = p.partial.add((stream * n_chunk * n_row + r) * row);
                    self.merge_chunks::<I>(p, stream, r, first, n_row * row, n_chunk, scratch);
                }
            }
        }));
    }

    //
    // Pieces of a tile
    //

    fn tile_room(&self) -> usize {
        let stride = self.codecs[0].stride.max(self.codecs[1].stride);
        let n_pair = self.angles.as_ref().map_or(0, |a| a.n_pair);
        2 * room::<u8>(TILE * stride)
            + room::<f32>(TILE)
            + room::<f32>(self.order.len() * TILE)
            + 2 * room::<f32>((n_pair + 1) * TRIG_STRIDE)
            + 2 * room::<f32>(n_pair)
    }

    fn take_tile(&self, arena: &mut Arena) -> TileScratch {
        let stride = self.codecs[0].stride.max(self.codecs[1].stride);
        let n_pair = self.angles.as_ref().map_or(0, |a| a.n_pair);
        TileScratch {
            codes: arena.take(TILE * stride),
            codes_t: arena.take(TILE * stride),
            key_scale: arena.take(TILE),
            keys: arena.take(self.order.len() * TILE),
            cos: arena.take((n_pair + 1) * TRIG_STRIDE),
            sin: arena.take((n_pair + 1) * TRIG_STRIDE),
            base_cos: arena.take(n_pair),
            base_sin: arena.take(n_pair),
        }
    }

    /// Angles of a tile's visible cells, for the first `n_pair` pairs.
    unsafe fn tile_angles<I: Isa>(
        &self,
        p: &AttnParams,
        stream: usize,
        tile: Tile,
        visible: u64,
        n_pair: usize,
        s: &TileScratch,
    ) {
        let Some(angles) = &self.angles else { return };
        let n = angles.n_pair;
        // SAFETY: within the positions and the scratch
        unsafe {
            let pos = p.pos.add(stream * p.n_kv + tile.first);
            let (base_cos, base_sin) =
                (std::slice::from_raw_parts_mut(s.base_cos, n), std::slice::from_raw_parts_mut(s.base_sin, n));
            let mut t = 0;
            while t < tile.n {
                if visible >> t & 1 == 0 {
                    t += 1;
                    continue;
                }
                // a run of consecutive positions; hidden cells inside it do not end it
                let first = i64::from(*pos.add(t));
                let mut end = t + 1;
                while end < tile.n && (visible >> end & 1 == 0 || i64::from(*pos.add(end)) == first + (end - t) as i64)
                {
                    end += 1;
                }
                angles.at(first, base_cos, base_sin);
                I::fill_trig(&FillTrig {
                    n_pair: n.min(n_pair),
                    n: end - t,
                    base_cos: s.base_cos,
                    base_sin: s.base_sin,
                    low_cos: angles.low_cos.as_ptr(),
                    low_sin: angles.low_sin.as_ptr(),
                    cos: s.cos.add(t),
                    sin: s.sin.add(t),
                });
                t = end;
            }
        }
    }

    /// Codes and scales of a key group's cells, cells as lanes.
    unsafe fn key_codes<I: Isa>(
        &self,
        p: &AttnParams,
        group: usize,
        stream: usize,
        tile: Tile,
        visible: u64,
        s: &TileScratch,
    ) {
        let codec = &self.codecs[0];
        let plan = &codec.groups[group].plan;
        // SAFETY: visible cells are within the stream's rows
        unsafe {
            let rows = p.rows_k.add(stream * p.rows_k_nb_stream + tile.first * codec.row_bytes);
            I::unpack(plan, rows, codec.row_bytes, visible, s.codes, s.key_scale);
            I::transpose(s.codes, plan.stride, plan.rank, s.codes_t);
        }
    }

    /// Rotated keys of one KV head.
    unsafe fn head_keys<I: Isa>(&self, head: usize, s: &TileScratch) {
        let codec = &self.codecs[0];
        let group = &codec.groups[codec.group_of_head[head]];
        let (keys, at) = self.key_head(head);
        let (n, rank) = (codec.head_dim, group.plan.rank);
        // SAFETY: the group's constants cover the head
        unsafe {
            I::rebuild_keys(&RebuildKeys {
                head_dim: n,
                k4: rank / 4,
                planes: codec.planes,
                wide: group.wide,
                codes: s.codes_t,
                dec: keys.dec.at(at * codec.planes * rank),
                init: keys.init.at(at),
                half: keys.half.at(at),
                scale: keys.scale.at(at),
                mean: keys.mean.at(at),
                cell_scale: s.key_scale,
                out: s.keys,
            });
            if let Some(angles) = &self.angles {
                I::rotate(s.keys, angles.n_pair, s.cos, s.sin);
            }
        }
    }

    /// A query in [`AttnLayer::order`], times the score's scale, and in units of ln 2.
    unsafe fn load_query(&self, p: &AttnParams, stream: usize, token: usize, head: usize, out: *mut f32) {
        // SAFETY: within the queries
        unsafe {
            let q = p.q.byte_add(stream * p.q_nb_stream + token * p.q_nb_token + head * p.q_nb_head);
            let scale = p.scale * LOG2_E;
            if self.in_order {
                for i in 0..self.order.len() {
                    *out.add(i) = *q.add(i) * scale;
                }
            } else {
                for (i, &d) in self.order.iter().enumerate() {
                    *out.add(i) = *q.add(d) * scale;
                }
            }
        }
    }

    //
    // Split
    //

    unsafe fn split<I: Isa>(&self, p: &AttnParams, tiles_per_chunk: usize, n_chunk: usize, ith: usize, nth: usize) {
        let n_row = p.n_head * p.n_token;
        let head_dim = self.order.len();
        let row = self.partial_row();
        let n_group = self.codecs[1].groups.len();
        let (n_kv, stride) = (self.codecs[0].n_head_kv, self.codecs[0].stride);
        let n_dim = self.slow.as_ref().map_or(0, SlowKeys::n_dim);
        let bytes = self.tile_room()
            + self.merge_room()
            + room::<f32>(n_row * head_dim)
            + room::<f32>(n_row * TILE)
            + room::<f32>(p.n_token * TILE)
            + room::<f32>(n_group * TILE)
            + 2 * room::<f32>(n_row * PAD)
            + 3 * room::<f32>(n_row)
            + room::<*const f32>(n_row)
            + room::<PairQuery>(n_kv * head_dim / 2)
            + room::<PlainQuery>(n_kv * head_dim)
            + room::<i8>(n_kv * NODE_ROWS * stride)
            + 4 * room::<f32>(n_kv * N_NODE)
            + room::<f32>(N_NODE * TILE)
            + room::<f32>(N_NODE * n_dim)
            + room::<i8>(2 * N_NODE * n_dim)
            + room::<f32>(N_NODE * stride)
            + if n_chunk == 1 { room::<f32>(n_row * row) } else { 0 };
        Arena::with(bytes, |arena| {
            let s = SplitScratch {
                tile: self.take_tile(arena),
                q: arena.take(n_row * head_dim),
                scores: arena.take(n_row * TILE),
                mask: arena.take(p.n_token * TILE),
                value_scale: arena.take(n_group * TILE),
                sum: arena.take(n_row * PAD),
                sum_weight: arena.take(n_row * PAD),
                max: arena.take(n_row),
                alpha: arena.take(n_row),
                slope: arena.take(n_row),
                row_mask: arena.take(n_row),
                pairs: arena.take(n_kv * head_dim / 2),
                plain: arena.take(n_kv * head_dim),
                nodes: arena.take(n_kv * NODE_ROWS * stride),
                node_scale: arena.take(n_kv * N_NODE),
                node_init: arena.take(n_kv * N_NODE),
                node_offset: arena.take(n_kv * N_NODE),
                node_mean: arena.take(n_kv * N_NODE),
                basis: arena.take(N_NODE * TILE),
                coefficient: arena.take(N_NODE * n_dim),
                coefficient_bytes: arena.take(2 * N_NODE * n_dim),
                node_weight: arena.take(N_NODE * stride),
            };
            let merge = self.take_merge(arena);
            let own: *mut f32 = if n_chunk == 1 { arena.take(n_row * row) } else { std::ptr::null_mut() };
            let mut loaded = usize::MAX;
            for unit in (ith..p.n_stream * n_chunk).step_by(nth) {
                let (stream, chunk) = (unit / n_chunk, unit % n_chunk);
                // SAFETY: the scratch has the room that it needs; the caller vouches for `p`
                unsafe {
                    if loaded != stream {
                        loaded = stream;
                        for r in 0..n_row {
                            let (token, head) = self.row(p, r);
                            self.load_query(p, stream, token, head, s.q.add(r * head_dim));
                            *s.slope.add(r) = slope(p.max_bias, p.n_head, head);
                            if self.is_fused(p) {
                                self.load_pair_query(head, s.q.add(r * head_dim), &s);
                            }
                        }
                    }
                    let partial = if n_chunk == 1 { own } else { p.partial.add(unit * n_row * row) };
                    let first = chunk * tiles_per_chunk;
                    let last = (first + tiles_per_chunk).min(p.n_kv.div_ceil(TILE));
                    let next = (chunk + nth) * tiles_per_chunk;
                    self.split_chunk::<I>(p, stream, first..last, next, partial, &s);
                    if n_chunk == 1 {
                        for r in 0..n_row {
                            self.merge_chunks::<I>(p, stream, r, own.add(r * row), 0, 1, merge);
                        }
                    }
                }
            }
        });
    }

    /// Token and query head of a row of the split schedule, `[n_head_kv][n_token][n_head/n_head_kv]`.
    fn row(&self, p: &AttnParams, r: usize) -> (usize, usize) {
        let rep = p.heads_per_kv(self);
        (r / rep % p.n_token, r / (rep * p.n_token) * rep + r % rep)
    }

    /// Whether each KV head has one query, so that its keys are used once and need not be written down.
    fn is_fused(&self, p: &AttnParams) -> bool {
        p.n_head * p.n_token == self.codecs[0].n_head_kv && self.codecs[0].planes == 1
    }

    /// A head's query as [`ScoreKeys`] takes it.
    unsafe fn load_pair_query(&self, head: usize, q: *const f32, s: &SplitScratch) {
        let n_pair = self.angles.as_ref().map_or(0, |a| a.n_pair);
        let (keys, at) = self.key_head(head);
        let n_plain = self.order.len() - 2 * n_pair;
        // SAFETY: the group's constants cover the head, the scratch has room for all heads
        unsafe {
            for i in 0..n_pair {
                let (a, b) = (at + i, at + i + n_pair);
                let (qa, qb) = (*q.add(i), *q.add(i + n_pair));
                let (scale_a, scale_b) = (*keys.scale.at(a), *keys.scale.at(b));
                let (half_a, half_b) = (*keys.half.at(a), *keys.half.at(b));
                let (mean_a, mean_b) = (*keys.mean.at(a), *keys.mean.at(b));
                let (xa, xb, ya, yb) = (qa * scale_a, qb * scale_b, qb * scale_a, -qa * scale_b);
                s.pairs.add(head * n_pair + i).write(PairQuery {
                    xa,
                    xb,
                    x0: xa * half_a + xb * half_b,
                    ya,
                    yb,
                    y0: ya * half_a + yb * half_b,
                    mean_x: qa * mean_a + qb * mean_b,
                    mean_y: qb * mean_a - qa * mean_b,
                });
            }
            for i in 0..n_plain {
                let (q, at) = (*q.add(2 * n_pair + i), at + 2 * n_pair + i);
                let x = q * *keys.scale.at(at);
                s.plain.add(head * n_plain + i).write(PlainQuery {
                    x,
                    x0: x * *keys.half.at(at),
                    mean: q * *keys.mean.at(at),
                });
            }
        }
    }

    /// Decoder of a head's keys, and where its dimensions begin there.
    fn key_head(&self, head: usize) -> (&KeyGroup, usize) {
        let group = self.codecs[0].group_of_head[head];
        (&self.keys[group], (head - self.codecs[0].groups[group].head0) * self.order.len())
    }

    /// Makes ready to score slow pairs together in a window, whose tiles' visible cells are given, for every head's one
    /// query. Returns the window's middle, or `None` where its positions are too far apart.
    unsafe fn open_window<I: Isa>(
        &self,
        p: &AttnParams,
        stream: usize,
        tiles: &[(Tile, u64)],
        s: &SplitScratch,
    ) -> Option<i32> {
        let slow = self.slow.as_ref()?;
        let (mut least, mut most) = (i32::MAX, i32::MIN);
        for &(tile, visible) in tiles {
            for t in (0..tile.n).filter(|t| visible >> t & 1 == 1) {
                // SAFETY: within the positions
                let pos = unsafe { *p.pos.add(stream * p.n_kv + tile.first + t) };
                (least, most) = (least.min(pos), most.max(pos));
            }
        }
        if most < least || i64::from(most) - i64::from(least) > i64::from(2 * HALF_WINDOW) {
            return None;
        }
        let middle = least + (most - least) / 2;
        let n_pair = slow.n_fast + slow.n_pair;
        // SAFETY: the scratch has room for the angles and for all heads
        unsafe {
            if let Some(angles) = &self.angles {
                let cos = std::slice::from_raw_parts_mut(s.tile.base_cos, n_pair);
                let sin = std::slice::from_raw_parts_mut(s.tile.base_sin, n_pair);
                angles.at(i64::from(middle), cos, sin);
                cos.iter_mut().chain(sin).for_each(|x| *x *= angles.magnitude);
            }
            for head in 0..self.codecs[0].n_head_kv {
                let index = self.codecs[0].group_of_head[head];
                let group = &slow.groups[index];
                let (n_dim, stride) = (slow.n_dim(), self.codecs[0].groups[index].plan.stride);
                let at = (head - self.codecs[0].groups[index].head0) * n_dim;
                let q = s.q.add(head * self.order.len());
                I::prepare_nodes(&PrepareNodes {
                    n_pair: slow.n_pair,
                    n_plain: slow.n_plain,
                    pair_room: slow.pair_room(),
                    plain_room: round_up(slow.n_plain, PAD),
                    qa: q.add(slow.n_fast),
                    qb: q.add(n_pair + slow.n_fast),
                    q_plain: q.add(2 * n_pair),
                    cos: s.tile.base_cos.add(slow.n_fast),
                    sin: s.tile.base_sin.add(slow.n_fast),
                    bessel: slow.bessel.as_ptr(),
                    scale: group.scale.at(at),
                    mean: group.mean.at(at),
                    dec: group.dec.at(at * stride),
                    levels: group.levels.at(0),
                    limit: group.limit,
                    coefficient: s.coefficient,
                    coefficient_bytes: s.coefficient_bytes,
                    weight: s.node_weight,
                    out: &self.nodes(head, s),
                });
            }
        }
        Some(middle)
    }

    fn nodes(&self, head: usize, s: &SplitScratch) -> Nodes {
        let stride = self.codecs[0].stride;
        let at = head * N_NODE;
        let own = self.codecs[0].groups[self.codecs[0].group_of_head[head]].plan.stride;
        Nodes {
            weight: s.nodes.wrapping_add(head * NODE_ROWS * stride),
            stride: own,
            scale: s.node_scale.wrapping_add(at),
            init: s.node_init.wrapping_add(at),
            offset: s.node_offset.wrapping_add(at),
            mean: s.node_mean.wrapping_add(at),
            basis: s.basis,
        }
    }

    /// Scores of a tile for a head's one query. `window`: a window is open.
    unsafe fn score_head<I: Isa>(&self, head: usize, window: bool, s: &SplitScratch, out: *mut f32) {
        let codec = &self.codecs[0];
        let group = &codec.groups[codec.group_of_head[head]];
        let (keys, at) = self.key_head(head);
        let n_pair = self.angles.as_ref().map_or(0, |a| a.n_pair);
        let n_plain = codec.head_dim - 2 * n_pair;
        let nodes = self.nodes(head, s);
        let slow = self.slow.as_ref().filter(|_| window);
        // SAFETY: the group's constants and the scratch cover the head
        unsafe {
            I::score_keys(&ScoreKeys {
                n_pair: slow.map_or(n_pair, |s| s.n_fast),
                pair_stride: n_pair,
                n_plain: if window { 0 } else { n_plain },
                nodes: if window { &nodes } else { null() },
                k4: group.plan.rank / 4,
                wide: group.wide,
                codes: s.tile.codes_t,
                dec: keys.dec.at(at * group.plan.rank),
                init: keys.init.at(at),
                pairs: s.pairs.add(head * n_pair),
                plain: s.plain.add(head * n_plain),
                cos: s.tile.cos,
                sin: s.tile.sin,
                cell_scale: s.tile.key_scale,
                out,
            });
        }
    }

    unsafe fn split_chunk<I: Isa>(
        &self,
        p: &AttnParams,
        stream: usize,
        tiles: std::ops::Range<usize>,
        next: usize,
        partial: *mut f32,
        s: &SplitScratch,
    ) {
        let [keys, values] = &self.codecs;
        let n_row = p.n_head * p.n_token;
        let rows_per_kv = n_row / keys.n_head_kv;
        let head_dim = keys.head_dim;
        let row = self.partial_row();
        let fused = self.is_fused(p);
        // SAFETY: as the shapes of the scratch say; the caller vouches for `p`
        unsafe {
            std::ptr::write_bytes(s.sum, 0, n_row * PAD);
            std::ptr::write_bytes(s.sum_weight, 0, n_row * PAD);
            for r in 0..n_row {
                *s.max.add(r) = f32::NEG_INFINITY;
            }
            let mut first = true;
            for begin in tiles.clone().step_by(WINDOW_TILES) {
                let mut window = [(Tile { first: 0, n: 0 }, 0, false); WINDOW_TILES];
                let n_tile = WINDOW_TILES.min(tiles.end - begin);
                for (i, (tile, visible, masked)) in window[..n_tile].iter_mut().enumerate() {
                    *tile = p.tile(begin + i);
                    for token in 0..p.n_token {
                        let (v, other) = p.visible::<I>(stream, token, *tile);
                        *visible |= v;
                        *masked |= other | (v != u64::MAX);
                    }
                }
                let middle =
                    if fused { self.open_window::<I>(p, stream, &window.map(|w| (w.0, w.1)), s) } else { None };
                for (i, &(tile, visible, masked)) in window[..n_tile].iter().enumerate() {
                    if visible == 0 {
                        continue;
                    }
                    if masked {
                        for token in 0..p.n_token {
                            p.load_mask::<I>(stream, token, tile, s.mask.add(token * TILE));
                        }
                    }
                    if first {
                        for r in 0..n_row {
                            std::ptr::write_bytes(partial.add(r * row + PAD), 0, values.stride);
                        }
                        first = false;
                    }
                    if let Some(middle) = middle {
                        I::fill_basis(
                            p.pos.add(stream * p.n_kv + tile.first),
                            tile.n,
                            middle,
                            HALF_WINDOW as f32,
                            s.basis,
                        );
                    }
                    let n_pair = match (&self.slow, middle) {
                        (Some(slow), Some(_)) => slow.n_fast,
                        _ => usize::MAX,
                    };
                    self.tile_angles::<I>(p, stream, tile, visible, n_pair, &s.tile);
                    let ahead = p.ahead(self, stream, if begin + i + 1 < tiles.end { begin + i + 1 } else { next });
                    for (g, group) in keys.groups.iter().enumerate() {
                        self.key_codes::<I>(p, g, stream, tile, visible, &s.tile);
                        for head in group.head0..group.head0 + group.n_head {
                            // the next tile's rows, a head's share of them at a time
                            for (rows, bytes) in ahead {
                                let share = bytes.div_ceil(keys.n_head_kv).next_multiple_of(64);
                                let at = (head * share).min(bytes);
                                kernels::prefetch(rows.wrapping_add(at), share.min(bytes - at));
                            }
                            let r = head * rows_per_kv;
                            if fused {
                                self.score_head::<I>(head, middle.is_some(), s, s.scores.add(r * TILE));
                                continue;
                            }
                            self.head_keys::<I>(head, &s.tile);
                            I::gemm_f32(&Gemm {
                                m: rows_per_kv,
                                n: TILE,
                                k: head_dim,
                                a: s.q.add(r * head_dim),
                                lda: head_dim,
                                b: s.tile.keys,
                                ldb: TILE,
                                c: s.scores.add(r * TILE),
                                ldc: TILE,
                                alpha: null(),
                            });
                        }
                    }

                    for (g, group) in values.groups.iter().enumerate() {
                        let scales = s.value_scale.add(g * TILE);
                        let rows = p.rows_v.add(stream * p.rows_v_nb_stream + tile.first * values.row_bytes);
                        I::unpack(&group.plan, rows, values.row_bytes, visible, s.tile.codes, scales);
                        let (begin, n) = (group.head0 * rows_per_kv, group.n_head * rows_per_kv);
                        for r in begin..begin + n {
                            *s.row_mask.add(r) = if masked { s.mask.add(self.row(p, r).0 * TILE) } else { null() };
                        }
                        I::softmax(&Softmax {
                            n,
                            s: s.scores.add(begin * TILE),
                            mask: s.row_mask.add(begin),
                            slope: s.slope.add(begin),
                            softcap: p.softcap,
                            value_scale: scales,
                            max: s.max.add(begin),
                            sum: s.sum.add(begin * PAD),
                            sum_weight: s.sum_weight.add(begin * PAD),
                            alpha: s.alpha.add(begin),
                        });
                        I::gemm_u8(&Gemm {
                            m: n,
                            n: round_up(group.plan.rank, PAD),
                            k: TILE,
                            a: s.scores.add(begin * TILE),
                            lda: TILE,
                            b: s.tile.codes,
                            ldb: group.plan.stride,
                            c: partial.add(begin * row + PAD),
                            ldc: row,
                            alpha: s.alpha.add(begin),
                        });
                    }
                }
            }
            for r in 0..n_row {
                let to = partial.add(r * row);
                *to = *s.max.add(r);
                *to.add(1) = lanes(s.sum.add(r * PAD));
                *to.add(2) = lanes(s.sum_weight.add(r * PAD));
            }
        }
    }

    fn merge_room(&self) -> usize {
        room::<f32>(self.codecs[1].stride) + room::<f32>(self.codecs[1].dim)
    }

    fn take_merge(&self, arena: &mut Arena) -> (*mut f32, *mut f32) {
        (arena.take(self.codecs[1].stride), arena.take(self.codecs[1].dim))
    }

    /// One query row's output from its partial results, `step` floats apart.
    #[allow(clippy::too_many_arguments)]
    unsafe fn merge_chunks<I: Isa>(
        &self,
        p: &AttnParams,
        stream: usize,
        r: usize,
        partial: *const f32,
        step: usize,
        n_chunk: usize,
        (latent, x): (*mut f32, *mut f32),
    ) {
        let codec = &self.codecs[1];
        let (token, head) = self.row(p, r);
        let kv = head / p.heads_per_kv(self);
        let group = &codec.groups[codec.group_of_head[kv]];
        // SAFETY: as the shapes of scratch and partial results say
        unsafe {
            let sink = if p.sinks.is_null() { f32::NEG_INFINITY } else { LOG2_E * *p.sinks.add(head) };
            let extra = p.extra_at(stream, token, head, codec.head_dim);
            let max = (0..n_chunk).fold(sink.max(extra.0), |max, c| max.max(*partial.add(c * step)));
            let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
            let n = round_up(group.plan.rank, PAD);
            std::ptr::write_bytes(latent, 0, n);
            let (mut sum, mut sum_weight) = (0.0, 0.0);
            for c in 0..n_chunk {
                let part = partial.add(c * step);
                if *part.add(1) == 0.0 {
                    continue; // nothing visible: the sum of codes was not written
                }
                let w = (*part - base).exp2();
                sum += w * *part.add(1);
                sum_weight += w * *part.add(2);
                I::merge(latent, part.add(PAD), w, n);
            }
            let extra_weight = (extra.0 - base).exp2();
            let total = sum + (sink - base).exp2() + extra_weight * extra.1;
            let out = p.out.add(((stream * p.n_token + token) * p.n_head + head) * codec.head_dim);
            if total == 0.0 {
                std::ptr::write_bytes(out, 0, codec.head_dim);
                return;
            }
            for (c, half) in group.half_levels()[..group.plan.rank].iter().enumerate() {
                *latent.add(c) -= half * sum_weight;
            }
            let decoder = group.head(kv - group.head0, codec.planes, codec.dim);
            I::project_value(&ProjectValue {
                dim: codec.dim,
                k4: group.plan.rank / 4,
                planes: codec.planes,
                dec: decoder.dec,
                latent,
                out: x,
            });
            I::finish_value(&FinishValue {
                dim: codec.head_dim,
                x,
                half: decoder.half,
                scale: decoder.scale,
                mean: decoder.mean,
                // the latent has its offset; but weights that are not numbers must show also where there are no channels
                weight: sum_weight * 0.0,
                sum,
                factor: 1.0 / total,
                out,
            });
            add_extra(out, extra.2, extra_weight, total, codec.head_dim);
        }
    }

    //
    // Blocks
    //

    unsafe fn blocks<I: Isa>(&self, p: &AttnParams, tokens: usize, n_block: usize, ith: usize, nth: usize) {
        let [keys, values] = &self.codecs;
        let rep = p.heads_per_kv(self);
        let n_row = tokens * rep;
        let bytes = self.tile_room()
            + room::<f32>(n_row * keys.head_dim)
            + room::<f32>(n_row * values.dim)
            + room::<f32>(TILE * values.dim)
            + 2 * room::<f32>(STRIP * TILE)
            + room::<f32>(TILE)
            + 2 * room::<f32>(n_row * PAD)
            + room::<f32>(n_row)
            + room::<f32>(STRIP)
            + room::<(u64, bool)>(tokens);
        Arena::with(bytes, |arena| {
            let s = BlockScratch {
                tile: self.take_tile(arena),
                q: arena.take(n_row * keys.head_dim),
                out: arena.take(n_row * values.dim),
                values: arena.take(TILE * values.dim),
                scores: arena.take(STRIP * TILE),
                mask: arena.take(STRIP * TILE),
                value_scale: arena.take(TILE),
                sum: arena.take(n_row * PAD),
                sum_weight: arena.take(n_row * PAD),
                max: arena.take(n_row),
                alpha: arena.take(STRIP),
                visible: arena.take(tokens),
            };
            // heads are innermost, so that the shares of a causal mask, where later blocks see more, are even
            for unit in (ith..p.n_stream * n_block * keys.n_head_kv).step_by(nth) {
                let (rest, head) = (unit / keys.n_head_kv, unit % keys.n_head_kv);
                let (stream, block) = (rest / n_block, rest % n_block);
                let first = block * tokens;
                // SAFETY: the scratch has the room that it needs; the caller vouches for `p`
                unsafe { self.block::<I>(p, stream, head, first..(first + tokens).min(p.n_token), &s) };
            }
        });
    }

    unsafe fn block<I: Isa>(
        &self,
        p: &AttnParams,
        stream: usize,
        kv: usize,
        tokens: std::ops::Range<usize>,
        s: &BlockScratch,
    ) {
        let [keys, values] = &self.codecs;
        let rep = p.heads_per_kv(self);
        let n_row = tokens.len() * rep;
        let key_group = keys.group_of_head[kv];
        let group = &values.groups[values.group_of_head[kv]];
        let decoder = group.head(kv - group.head0, values.planes, values.dim);
        // SAFETY: as the shapes of the scratch say; the caller vouches for `p`
        unsafe {
            for r in 0..n_row {
                self.load_query(p, stream, tokens.start + r / rep, kv * rep + r % rep, s.q.add(r * keys.head_dim));
                *s.max.add(r) = f32::NEG_INFINITY;
            }
            std::ptr::write_bytes(s.out, 0, n_row * values.dim);
            std::ptr::write_bytes(s.sum, 0, n_row * PAD);
            std::ptr::write_bytes(s.sum_weight, 0, n_row * PAD);

            for i in 0..p.n_kv.div_ceil(TILE) {
                let tile = p.tile(i);
                let mut visible = 0;
                for t in 0..tokens.len() {
                    let (v, other) = p.visible::<I>(stream, tokens.start + t, tile);
                    *s.visible.add(t) = (v, other);
                    visible |= v;
                }
                if visible == 0 {
                    continue;
                }
                self.tile_angles::<I>(p, stream, tile, visible, usize::MAX, &s.tile);
                self.key_codes::<I>(p, key_group, stream, tile, visible, &s.tile);
                self.head_keys::<I>(kv, &s.tile);
                let rows = p.rows_v.add(stream * p.rows_v_nb_stream + tile.first * values.row_bytes);
                I::unpack(&group.plan, rows, values.row_bytes, visible, s.tile.codes, s.value_scale);
                I::rebuild_values(&RebuildValues {
                    n_token: TILE,
                    dim: values.dim,
                    k4: group.plan.rank / 4,
                    planes: values.planes,
                    wide: group.wide,
                    codes: s.tile.codes,
                    stride: group.plan.stride,
                    dec: decoder.dec,
                    init: decoder.init,
                    out: s.values,
                    out_stride: values.dim,
                });

                for r in (0..n_row).step_by(STRIP) {
                    let n = STRIP.min(n_row - r);
                    if (r / rep..=(r + n - 1) / rep).all(|t| (*s.visible.add(t)).0 == 0) {
                        continue;
                    }
                    I::gemm_f32(&Gemm {
                        m: n,
                        n: TILE,
                        k: keys.head_dim,
                        a: s.q.add(r * keys.head_dim),
                        lda: keys.head_dim,
                        b: s.tile.keys,
                        ldb: TILE,
                        c: s.scores,
                        ldc: TILE,
                        alpha: null(),
                    });
                    let mut row_mask = [null(); STRIP];
                    let mut slopes = [0.0; STRIP];
                    for j in 0..n {
                        let t = (r + j) / rep;
                        let (visible, other) = *s.visible.add(t);
                        if other || visible != u64::MAX {
                            let mask = s.mask.add(t % STRIP * TILE);
                            if j == 0 || t != (r + j - 1) / rep {
                                p.load_mask::<I>(stream, tokens.start + t, tile, mask);
                            }
                            row_mask[j] = mask.cast_const();
                        }
                        slopes[j] = slope(p.max_bias, p.n_head, kv * rep + (r + j) % rep);
                    }
                    I::softmax(&Softmax {
                        n,
                        s: s.scores,
                        mask: row_mask.as_ptr(),
                        slope: slopes.as_ptr(),
                        softcap: p.softcap,
                        value_scale: s.value_scale,
                        max: s.max.add(r),
                        sum: s.sum.add(r * PAD),
                        sum_weight: s.sum_weight.add(r * PAD),
                        alpha: s.alpha,
                    });
                    I::gemm_f32(&Gemm {
                        m: n,
                        n: values.dim,
                        k: TILE,
                        a: s.scores,
                        lda: TILE,
                        b: s.values,
                        ldb: values.dim,
                        c: s.out.add(r * values.dim),
                        ldc: values.dim,
                        alpha: s.alpha,
                    });
                }
            }

            for r in 0..n_row {
                let (token, head) = (tokens.start + r / rep, kv * rep + r % rep);
                let out = p.out.add(((stream * p.n_token + token) * p.n_head + head) * values.head_dim);
                let (sum, weight) = (lanes(s.sum.add(r * PAD)), lanes(s.sum_weight.add(r * PAD)));
                let sink = if p.sinks.is_null() { f32::NEG_INFINITY } else { LOG2_E * *p.sinks.add(head) };
                let extra = p.extra_at(stream, token, head, values.head_dim);
                let max = sink.max(*s.max.add(r)).max(extra.0);
                let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
                let shrink = (*s.max.add(r) - base).exp2();
                let extra_weight = (extra.0 - base).exp2();
                let total =
                    if sum == 0.0 { 0.0 } else { sum * shrink } + (sink - base).exp2() + extra_weight * extra.1;
                if total == 0.0 || sum == 0.0 {
                    std::ptr::write_bytes(out, 0, values.head_dim);
                } else {
                    I::finish_value(&FinishValue {
                        dim: values.head_dim,
                        x: s.out.add(r * values.dim),
                        half: decoder.half,
                        scale: decoder.scale,
                        mean: decoder.mean,
                        weight,
                        sum,
                        factor: shrink / total,
                        out,
                    });
                }
                add_extra(out, extra.2, extra_weight, total, values.head_dim);
            }
        }
    }
}

/// Adds the values of other cells to a query's output. Nothing where there are none.
unsafe fn add_extra(out: *mut f32, values: *const f32, weight: f32, total: f32, n: usize) {
    if values.is_null() || total == 0.0 {
        return;
    }
    for d in 0..n {
        // SAFETY: both have a head's floats
        unsafe { *out.add(d) += weight / total * *values.add(d) };
    }
}

/// Sum of [`PAD`] floats.
unsafe fn lanes(p: *const f32) -> f32 {
    // SAFETY: readable
    (0..PAD).map(|i| unsafe { *p.add(i) }).sum()
}

struct SplitScratch {
    tile: TileScratch,
    /// `[n_row][head_dim_k]`
    q: *mut f32,
    /// `[n_row][TILE]`
    scores: *mut f32,
    /// `[n_token][TILE]`
    mask: *mut f32,
    /// `[value groups][TILE]`
    value_scale: *mut f32,
    /// `[n_row][PAD]` each
    sum: *mut f32,
    sum_weight: *mut f32,
    /// `[n_row]` each
    max: *mut f32,
    alpha: *mut f32,
    slope: *mut f32,
    row_mask: *mut *const f32,
    /// `[n_head_kv][n_pair]` and `[n_head_kv][head_dim_k - 2*n_pair]`, where each KV head has one query
    pairs: *mut PairQuery,
    plain: *mut PlainQuery,
    /// nodes of every KV head: `[n_head_kv][NODE_ROWS][stride]`, and `[n_head_kv][N_NODE]` each
    nodes: *mut i8,
    node_scale: *mut f32,
    node_init: *mut i32,
    node_offset: *mut f32,
    node_mean: *mut f32,
    /// `[N_NODE][TILE]`
    basis: *mut f32,
    /// `[N_NODE][n_dim]`, `[2][N_NODE][n_dim]`, `[N_NODE][stride]`
    coefficient: *mut f32,
    coefficient_bytes: *mut i8,
    node_weight: *mut f32,
}

struct BlockScratch {
    tile: TileScratch,
    /// `[n_row][head_dim_k]`
    q: *mut f32,
    /// `[n_row][dim]`
    out: *mut f32,
    /// `[TILE][dim]`
    values: *mut f32,
    /// `[STRIP][TILE]`
    scores: *mut f32,
    /// `[STRIP][TILE]`: masks of the tokens of a strip, token t in row t % STRIP
    mask: *mut f32,
    /// `[TILE]`
    value_scale: *mut f32,
    /// `[n_row][PAD]` each
    sum: *mut f32,
    sum_weight: *mut f32,
    /// `[n_row]`
    max: *mut f32,
    /// `[STRIP]`
    alpha: *mut f32,
    /// `[tokens]`: cells of the tile that each token sees, and whether its mask has other values
    visible: *mut (u64, bool),
}
