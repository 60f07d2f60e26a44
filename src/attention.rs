//! Attention over rows.
//!
//! Codes are unpacked a tile of [`TILE`] cells at a time and multiplied by the integer decoder. Two schedules share the
//! pieces; which one runs follows from the shapes alone, and neither's result depends on the number of threads:
//!
//! - **Split** (few query tokens, a long context): a unit of work is a chunk of the context, for all heads. Codes are
//!   unpacked once, keys are rebuilt once per KV head, and values are summed as codes: u\[c\] = sum over cells of weight *
//!   code\[c\]. A chunk leaves its largest score, its sums and u; [`AttnLayer::combine`] merges chunks and decodes u once
//!   per head and query.
//! - **Blocks** (many query tokens): a unit is a KV head and a block of query tokens. Each tile's keys and values are
//!   rebuilt once for the block, and the rest is two float products with an online softmax between them.

use crate::codec::{Codec, Decoder, StoreParams};
use crate::kernels::generic::{FillTrig, FinishValue, Gemm, ProjectValue, RebuildKeys, RebuildValues, Softmax};
use crate::kernels::{self, dispatch, room, round_up, Aligned, Arena, Isa, PAD, TILE, TRIG_STRIDE};
use crate::projection::{Group, Layer, Side, SideProj};
use crate::rope::{Angles, RopeKind, RopeParams};
use anyhow::{ensure, Result};
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

/// One layer, ready to run.
pub struct AttnLayer {
    codecs: [Codec; 2],
    keys: Vec<KeyGroup>,
    angles: Option<Arc<Angles>>,
    /// `[head_dim_k]`: which dimension of a head stands at each place of a rebuilt key: first halves of the rotated pairs, second
    /// halves, the rest
    order: Vec<usize>,
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
    fn new(side: &SideProj, group: &Group, planes: usize, order: &[usize]) -> Self {
        let (rank, n) = (group.rank, side.head_dim);
        let decoder = Decoder::new(group, planes);
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
/// Query rows whose scores are worked on at a time: [`Isa::GEMM_ROWS`] of the fast paths.
const STRIP: usize = 6;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Schedule {
    Split { tiles_per_chunk: usize, n_chunk: usize },
    Blocks { tokens: usize, n_block: usize },
}

/// Slope of each head's ALiBi, as `ggml_soft_max_ext()` has it.
fn slope(max_bias: f32, n_head: usize, head: usize) -> f32 {
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
        let [k, v] = [layer.side(Side::Key), layer.side(Side::Value)];
        ensure!(k.n_head_kv == v.n_head_kv, "layer {} has {} heads of keys and {} of values", layer.il, k.n_head_kv, v.n_head_kv);
        rope.check(k.head_dim)?;
        let mut order = Vec::with_capacity(k.head_dim);
        let mut angles = None;
        if rope.kind != RopeKind::None {
            let pairs: Vec<_> = (0..rope.n_rot / 2).map(|i| rope.pair(i)).collect();
            order.extend(pairs.iter().map(|p| p.0));
            order.extend(pairs.iter().map(|p| p.1));
            angles = Some(Angles::shared(rope));
        }
        order.extend((0..k.head_dim).filter(|d| !order.contains(d)).collect::<Vec<_>>());
        let codecs = [Codec::new(k), Codec::new(v)];
        let keys = k.groups.iter().map(|g| KeyGroup::new(k, g, codecs[0].planes, &order)).collect();
        Ok(Self { codecs, keys, angles, order })
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

    /// Angles of a tile's visible cells.
    unsafe fn tile_angles<I: Isa>(&self, p: &AttnParams, stream: usize, tile: Tile, visible: u64, s: &TileScratch) {
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
                while end < tile.n && (visible >> end & 1 == 0 || i64::from(*pos.add(end)) == first + (end - t) as i64) {
                    end += 1;
                }
                angles.at(first, base_cos, base_sin);
                I::fill_trig(&FillTrig {
                    n_pair: n,
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
    unsafe fn key_codes<I: Isa>(&self, p: &AttnParams, group: usize, stream: usize, tile: Tile, visible: u64, s: &TileScratch) {
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
        let index = codec.group_of_head[head];
        let (group, keys) = (&codec.groups[index], &self.keys[index]);
        let (n, rank) = (codec.head_dim, group.plan.rank);
        let at = (head - group.head0) * n;
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

    /// A query in [`AttnLayer::order`], times the score's scale.
    unsafe fn load_query(&self, p: &AttnParams, stream: usize, token: usize, head: usize, out: *mut f32) {
        // SAFETY: within the queries
        unsafe {
            let q = p.q.byte_add(stream * p.q_nb_stream + token * p.q_nb_token + head * p.q_nb_head);
            for (i, &d) in self.order.iter().enumerate() {
                *out.add(i) = *q.add(d) * p.scale;
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
        let bytes = self.tile_room()
            + self.merge_room()
            + room::<f32>(n_row * head_dim)
            + room::<f32>(n_row * TILE)
            + room::<f32>(p.n_token * TILE)
            + room::<f32>(n_group * TILE)
            + 2 * room::<f32>(n_row * PAD)
            + 2 * room::<f32>(n_row)
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
                        }
                    }
                    let partial = if n_chunk == 1 { own } else { p.partial.add(unit * n_row * row) };
                    let first = chunk * tiles_per_chunk;
                    let last = (first + tiles_per_chunk).min(p.n_kv.div_ceil(TILE));
                    self.split_chunk::<I>(p, stream, first..last, partial, &s);
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

    unsafe fn split_chunk<I: Isa>(
        &self,
        p: &AttnParams,
        stream: usize,
        tiles: std::ops::Range<usize>,
        partial: *mut f32,
        s: &SplitScratch,
    ) {
        let [keys, values] = &self.codecs;
        let n_row = p.n_head * p.n_token;
        let rows_per_kv = n_row / keys.n_head_kv;
        let head_dim = keys.head_dim;
        let row = self.partial_row();
        // SAFETY: as the shapes of the scratch say; the caller vouches for `p`
        unsafe {
            std::ptr::write_bytes(s.sum, 0, n_row * PAD);
            std::ptr::write_bytes(s.sum_weight, 0, n_row * PAD);
            for r in 0..n_row {
                *s.max.add(r) = f32::NEG_INFINITY;
            }
            let mut first = true;
            for i in tiles {
                let tile = p.tile(i);
                let (mut visible, mut masked) = (0, false);
                for token in 0..p.n_token {
                    let (v, other) = p.visible::<I>(stream, token, tile);
                    visible |= v;
                    masked |= other | (v != u64::MAX);
                }
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

                self.tile_angles::<I>(p, stream, tile, visible, &s.tile);
                for (g, group) in keys.groups.iter().enumerate() {
                    self.key_codes::<I>(p, g, stream, tile, visible, &s.tile);
                    for head in group.head0..group.head0 + group.n_head {
                        self.head_keys::<I>(head, &s.tile);
                        let r = head * rows_per_kv;
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
                        let (token, head) = self.row(p, r);
                        *s.max.add(r) = I::softmax(&Softmax {
                            s: s.scores.add(r * TILE),
                            mask: if masked { s.mask.add(token * TILE) } else { null() },
                            slope: slope(p.max_bias, p.n_head, head),
                            softcap: p.softcap,
                            value_scale: scales,
                            max: *s.max.add(r),
                            sum: s.sum.add(r * PAD),
                            sum_weight: s.sum_weight.add(r * PAD),
                            alpha: s.alpha.add(r),
                        });
                    }
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
            let sink = if p.sinks.is_null() { f32::NEG_INFINITY } else { *p.sinks.add(head) };
            let max = (0..n_chunk).fold(sink, |max, c| max.max(*partial.add(c * step)));
            let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
            let n = round_up(group.plan.rank, PAD);
            std::ptr::write_bytes(latent, 0, n);
            let (mut sum, mut sum_weight) = (0.0, 0.0);
            for c in 0..n_chunk {
                let part = partial.add(c * step);
                if *part.add(1) == 0.0 {
                    continue; // nothing visible: the sum of codes was not written
                }
                let w = (*part - base).exp();
                sum += w * *part.add(1);
                sum_weight += w * *part.add(2);
                I::merge(latent, part.add(PAD), w, n);
            }
            let total = sum + (sink - base).exp();
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
            + room::<f32>(STRIP * TILE)
            + 2 * room::<f32>(TILE)
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
                mask: arena.take(TILE),
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

    unsafe fn block<I: Isa>(&self, p: &AttnParams, stream: usize, kv: usize, tokens: std::ops::Range<usize>, s: &BlockScratch) {
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
                self.tile_angles::<I>(p, stream, tile, visible, &s.tile);
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

                let mut masked_token = usize::MAX;
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
                    for j in 0..n {
                        let (r, t) = (r + j, (r + j) / rep);
                        let (visible, other) = *s.visible.add(t);
                        let masked = other || visible != u64::MAX;
                        if masked && masked_token != t {
                            masked_token = t;
                            p.load_mask::<I>(stream, tokens.start + t, tile, s.mask);
                        }
                        *s.max.add(r) = I::softmax(&Softmax {
                            s: s.scores.add(j * TILE),
                            mask: if masked { s.mask } else { null() },
                            slope: slope(p.max_bias, p.n_head, kv * rep + r % rep),
                            softcap: p.softcap,
                            value_scale: s.value_scale,
                            max: *s.max.add(r),
                            sum: s.sum.add(r * PAD),
                            sum_weight: s.sum_weight.add(r * PAD),
                            alpha: s.alpha.add(j),
                        });
                    }
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
                let sink = if p.sinks.is_null() { f32::NEG_INFINITY } else { *p.sinks.add(head) };
                let max = sink.max(*s.max.add(r));
                let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
                let shrink = (*s.max.add(r) - base).exp();
                let total = if sum == 0.0 { 0.0 } else { sum * shrink } + (sink - base).exp();
                if total == 0.0 || sum == 0.0 {
                    std::ptr::write_bytes(out, 0, values.head_dim);
                    continue;
                }
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
        }
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
    /// `[TILE]` each
    mask: *mut f32,
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
