//! The C ABI of `include/palu.h`. The contract stands there; here are only the boundary's own duties: null and range
//! checks, one panic guard, one place for the last error.

#![allow(clippy::missing_safety_doc, reason = "the contract is in include/palu.h")]

use crate::attention::{self, AttnLayer};
use crate::codec;
use crate::projection::{Projection, Side};
use crate::rope::{RopeKind, RopeParams};
use anyhow::{anyhow, ensure, Context, Result};
use std::cell::RefCell;
use std::ffi::{c_char, CStr, CString};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;

/// `palu_status`; numbers are never reused.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Ok = 0,
    Argument = 1,
    Io = 2,
    Format = 3,
    Mismatch = 4,
    Unsupported = 5,
    Internal = 6,
    NotFound = 7,
    Interrupted = 8,
}

/// An error with the status that the caller is to see.
#[derive(Debug)]
struct Failure(Status, String);
impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.1)
    }
}
impl std::error::Error for Failure {}

fn failure(status: Status, text: impl Into<String>) -> anyhow::Error {
    Failure(status, text.into()).into()
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::new(CString::default());
}

fn set_last_error(text: &str) {
    let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
    LAST_ERROR.with(|e| *e.borrow_mut() = text);
}

/// Runs `f`; turns its error, or its panic, into a status and the last error. `otherwise`: the status of errors without their own.
fn guard(otherwise: Status, f: impl FnOnce() -> Result<()>) -> Status {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(())) => Status::Ok,
        Ok(Err(e)) => {
            set_last_error(&format!("{e:#}"));
            if let Some(Failure(status, _)) = e.downcast_ref::<Failure>() {
                *status
            } else if e.chain().any(|c| c.is::<std::io::Error>()) {
                Status::Io
            } else {
                otherwise
            }
        }
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            set_last_error(&format!("internal error: {}", text.unwrap_or("a panic without a message")));
            Status::Internal
        }
    }
}

/// The one null check.
unsafe fn reference<'a, T>(pointer: *const T, name: &str) -> Result<&'a T> {
    // SAFETY: the caller of the C function promises that a pointer that is not null points to a live T
    unsafe { pointer.as_ref() }.ok_or_else(|| failure(Status::Argument, format!("{name} is a null pointer")))
}

unsafe fn text<'a>(pointer: *const c_char, name: &str) -> Result<&'a str> {
    ensure!(!pointer.is_null(), failure(Status::Argument, format!("{name} is a null pointer")));
    // SAFETY: not null; the caller promises a terminated string
    unsafe { CStr::from_ptr(pointer) }.to_str().map_err(|_| failure(Status::Argument, format!("{name} is not UTF-8")))
}

fn side(side: i32) -> Result<Side> {
    match side {
        0 => Ok(Side::Key),
        1 => Ok(Side::Value),
        _ => Err(anyhow!("side {side} is neither key (0) nor value (1)")),
    }
}

fn share(ith: i32, nth: i32) -> Result<(usize, usize)> {
    ensure!(nth > 0 && (0..nth).contains(&ith), "share {ith} of {nth} makes no sense");
    Ok((ith as usize, nth as usize))
}

#[no_mangle]
pub extern "C" fn palu_abi_version() -> i32 {
    5
}

#[no_mangle]
pub extern "C" fn palu_last_error() -> *const c_char {
    LAST_ERROR.with(|e| e.borrow().as_ptr())
}

#[no_mangle]
pub extern "C" fn palu_cpu_path() -> *const c_char {
    match attention::cpu_path() {
        "AVX-512 VNNI" => c"AVX-512 VNNI".as_ptr(),
        "AVX2" => c"AVX2".as_ptr(),
        _ => c"portable".as_ptr(),
    }
}

#[no_mangle]
pub unsafe extern "C" fn palu_hash(data: *const u8, size: usize, seed: u64) -> u64 {
    if data.is_null() || size == 0 {
        return crate::hash::xxh64(&[], seed);
    }
    // SAFETY: the caller promises size readable bytes
    crate::hash::xxh64(unsafe { std::slice::from_raw_parts(data, size) }, seed)
}

#[repr(C)]
pub struct ProjInfo {
    bits_per_value: f64,
    bytes_per_token: u64,
    f16_bytes_per_token: u64,
    model_identity: u64,
    identity: u64,
    n_layer: i32,
    n_layer_kv: i32,
}

#[repr(C)]
pub struct LayerInfo {
    n_head_kv: i32,
    head_dim_k: i32,
    head_dim_v: i32,
    rank_k: i32,
    rank_v: i32,
    row_bytes_k: usize,
    row_bytes_v: usize,
}

#[no_mangle]
pub unsafe extern "C" fn palu_proj_load(path: *const c_char, bits_per_value: f64, out: *mut *mut Projection) -> Status {
    guard(Status::Format, || {
        ensure!(!out.is_null(), failure(Status::Argument, "out is a null pointer"));
        let path = Path::new(unsafe { text(path, "path") }?);
        let (file, checksum) = crate::projection::ProjectionFile::read_with_checksum(path)?;
        let proj = file.lay_out(bits_per_value, checksum).map_err(|e| failure(Status::Argument, format!("{}: {e:#}", path.display())))?;
        // SAFETY: out is not null and the caller promises that it can be written
        unsafe { *out = Box::into_raw(Box::new(proj)) };
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn palu_proj_free(proj: *mut Projection) {
    if !proj.is_null() {
        // SAFETY: made by palu_proj_load and given back once
        drop(unsafe { Box::from_raw(proj) });
    }
}

#[no_mangle]
pub unsafe extern "C" fn palu_proj_get_info(proj: *const Projection, out: *mut ProjInfo) -> Status {
    guard(Status::Argument, || {
        let p = unsafe { reference(proj, "proj") }?;
        ensure!(!out.is_null(), "out is a null pointer");
        let info = ProjInfo {
            bits_per_value: p.bits_per_value,
            bytes_per_token: p.bytes_per_token() as u64,
            f16_bytes_per_token: p.f16_bytes_per_token() as u64,
            model_identity: p.meta.model_identity,
            identity: p.identity,
            n_layer: p.meta.n_layer as i32,
            n_layer_kv: p.layers.len() as i32,
        };
        // SAFETY: not null; the caller promises that it can be written
        unsafe { out.write(info) };
        Ok(())
    })
}

fn layer_of(proj: &Projection, il: i32) -> Result<&crate::projection::Layer> {
    let layer = usize::try_from(il).ok().and_then(|il| proj.layer(il));
    layer.ok_or_else(|| failure(Status::NotFound, format!("the projection file has no layer {il}")))
}

#[no_mangle]
pub unsafe extern "C" fn palu_proj_get_layer(proj: *const Projection, il: i32, out: *mut LayerInfo) -> Status {
    guard(Status::Argument, || {
        let layer = layer_of(unsafe { reference(proj, "proj") }?, il)?;
        ensure!(!out.is_null(), "out is a null pointer");
        let [k, v] = &layer.sides;
        let info = LayerInfo {
            n_head_kv: k.n_head_kv as i32,
            head_dim_k: k.head_dim as i32,
            head_dim_v: v.head_dim as i32,
            rank_k: k.rank() as i32,
            rank_v: v.rank() as i32,
            row_bytes_k: k.row_bytes,
            row_bytes_v: v.row_bytes,
        };
        // SAFETY: not null; the caller promises that it can be written
        unsafe { out.write(info) };
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn palu_proj_check_model(proj: *const Projection, arch: *const c_char, identity: u64, n_layer: i32) -> Status {
    guard(Status::Mismatch, || {
        let m = &unsafe { reference(proj, "proj") }?.meta;
        let arch = unsafe { text(arch, "arch") }?;
        ensure!(
            m.arch == arch && m.n_layer as i64 == i64::from(n_layer),
            "the projection file was made for a {} model of {} layers, and this is a {arch} model of {n_layer} layers",
            m.arch,
            m.n_layer
        );
        ensure!(
            m.model_identity == identity,
            "the projection file was made for a model with other weights (identity {:016x}{}), and this model is {identity:016x}",
            m.model_identity,
            if m.model_name.is_empty() { String::new() } else { format!(", {}", m.model_name) }
        );
        Ok(())
    })
}

#[repr(C)]
pub struct Rope {
    kind: i32,
    n_rot: i32,
    n_offs: i32,
    n_ctx_orig: i32,
    freq_base: f32,
    freq_scale: f32,
    ext_factor: f32,
    attn_factor: f32,
    beta_fast: f32,
    beta_slow: f32,
    freq_factors: *const f32,
}

impl Rope {
    /// # Safety
    /// `freq_factors` must be null or have the floats that palu.h says.
    pub unsafe fn params(&self) -> Result<RopeParams> {
        let kind = match self.kind {
            0 => return Ok(RopeParams::none()),
            1 => RopeKind::Norm,
            2 => RopeKind::Neox,
            kind => return Err(failure(Status::Unsupported, format!("RoPE type {kind} is not supported"))),
        };
        let n_rot = usize::try_from(self.n_rot).context("n_rot is negative")?;
        let freq_factors = if self.freq_factors.is_null() {
            Vec::new()
        } else {
            // SAFETY: not null; the caller promises n_rot/2 floats
            unsafe { std::slice::from_raw_parts(self.freq_factors, n_rot / 2) }.to_vec()
        };
        Ok(RopeParams {
            kind,
            n_rot,
            n_offs: usize::try_from(self.n_offs).context("n_offs is negative")?,
            n_ctx_orig: self.n_ctx_orig,
            freq_base: self.freq_base,
            freq_scale: self.freq_scale,
            ext_factor: self.ext_factor,
            attn_factor: self.attn_factor,
            beta_fast: self.beta_fast,
            beta_slow: self.beta_slow,
            freq_factors,
        })
    }
}

/// A null pointer is no RoPE.
unsafe fn rope_or_none(rope: *const Rope) -> Result<RopeParams> {
    // SAFETY: not null; the caller promises a palu_rope
    if rope.is_null() { Ok(RopeParams::none()) } else { unsafe { (*rope).params() } }
}

#[no_mangle]
pub unsafe extern "C" fn palu_layer_create(proj: *const Projection, il: i32, rope: *const Rope, out: *mut *mut AttnLayer) -> Status {
    guard(Status::Argument, || {
        let layer = layer_of(unsafe { reference(proj, "proj") }?, il)?;
        ensure!(!out.is_null(), "out is a null pointer");
        let rope = unsafe { rope_or_none(rope) }?;
        let ready = AttnLayer::new(layer, &rope)?;
        // SAFETY: not null; the caller promises that it can be written
        unsafe { *out = Box::into_raw(Box::new(ready)) };
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn palu_layer_free(layer: *mut AttnLayer) {
    if !layer.is_null() {
        // SAFETY: made by palu_layer_create and given back once
        drop(unsafe { Box::from_raw(layer) });
    }
}

#[repr(C)]
pub struct StoreParams {
    pub x: *const f32,
    pub x_nb_head: usize,
    pub x_nb_token: usize,
    pub idxs: *const i64,
    pub rows: *mut u8,
    pub n_row: i64,
    pub n_token: i32,
    pub side: i32,
}

impl StoreParams {
    fn of_side(&self) -> Result<(Side, codec::StoreParams)> {
        let store = codec::StoreParams {
            x: self.x,
            x_nb_head: self.x_nb_head,
            x_nb_token: self.x_nb_token,
            idxs: self.idxs,
            rows: self.rows,
            n_token: count(self.n_token, "n_token")?,
        };
        Ok((side(self.side)?, store))
    }
}

#[no_mangle]
pub unsafe extern "C" fn palu_store(layer: *const AttnLayer, params: *const StoreParams, ith: i32, nth: i32) -> Status {
    guard(Status::Argument, || {
        let (layer, p) = unsafe { (reference(layer, "layer")?, reference(params, "params")?) };
        let (ith, nth) = share(ith, nth)?;
        let n_token = usize::try_from(p.n_token).context("n_token is negative")?;
        if n_token == 0 {
            return Ok(());
        }
        ensure!(!p.x.is_null() && !p.idxs.is_null() && !p.rows.is_null(), "x, idxs or rows is a null pointer");
        // SAFETY: not null; the caller promises n_token numbers
        let idxs = unsafe { std::slice::from_raw_parts(p.idxs, n_token) };
        if let Some(i) = idxs.iter().find(|&&i| !(0..p.n_row).contains(&i)) {
            return Err(anyhow!("row {i} of {} does not exist", p.n_row));
        }
        let (side, store) = p.of_side()?;
        // SAFETY: the caller promises x and rows of the shapes in palu.h; idxs were checked, and are all different
        unsafe { layer.store(side, &store, ith, nth) };
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn palu_load_rows(layer: *const AttnLayer, which: i32, rows: *const u8, idxs: *const i64, n_token: i32, out: *mut f32) -> Status {
    guard(Status::Argument, || {
        let codec = unsafe { reference(layer, "layer") }?.codec(side(which)?);
        let n_token = usize::try_from(n_token).context("n_token is negative")?;
        if n_token == 0 {
            return Ok(());
        }
        ensure!(!rows.is_null() && !idxs.is_null() && !out.is_null(), "rows, idxs or out is a null pointer");
        // SAFETY: not null; the caller promises n_token numbers
        ensure!(unsafe { std::slice::from_raw_parts(idxs, n_token) }.iter().all(|&i| i >= 0), "a row's number is negative");
        // SAFETY: the caller promises rows that hold every row of idxs, and room for n_token tokens
        unsafe { codec.decode(rows, idxs, n_token, out) };
        Ok(())
    })
}

#[repr(C)]
pub struct RebuildParams {
    rows: *const u8,
    rows_nb_stream: usize,
    pos: *const i32,
    out: *mut u16,
    n_stream: i32,
    n_kv: i32,
    side: i32,
    slots: *const u16,
    cur: *const f32,
    cur_nb_head: usize,
    cur_nb_token: usize,
    n_slot: i32,
    n_token: i32,
    n_pad: i32,
}

impl RebuildParams {
    fn check(&self) -> Result<(Side, attention::RebuildParams)> {
        let side = side(self.side)?;
        let p = attention::RebuildParams {
            rows: self.rows,
            rows_nb_stream: self.rows_nb_stream,
            pos: self.pos,
            out: self.out,
            n_stream: count(self.n_stream, "n_stream")?,
            n_kv: count(self.n_kv, "n_kv")?,
            slots: self.slots,
            n_slot: count(self.n_slot, "n_slot")?,
            cur: self.cur,
            cur_nb_head: self.cur_nb_head,
            cur_nb_token: self.cur_nb_token,
            n_token: count(self.n_token, "n_token")?,
            n_pad: count(self.n_pad, "n_pad")?,
        };
        ensure!(!p.rows.is_null() && !p.out.is_null(), "rows or out is a null pointer");
        ensure!(side == Side::Value || !p.pos.is_null(), "pos is a null pointer");
        ensure!(p.n_slot == 0 || !p.slots.is_null(), "slots is a null pointer");
        ensure!(p.n_token == 0 || !p.cur.is_null(), "cur is a null pointer");
        Ok((side, p))
    }
}

#[no_mangle]
pub unsafe extern "C" fn palu_rebuild(layer: *const AttnLayer, params: *const RebuildParams, ith: i32, nth: i32) -> Status {
    guard(Status::Argument, || {
        let (layer, p) = unsafe { (reference(layer, "layer")?, reference(params, "params")?) };
        let (ith, nth) = share(ith, nth)?;
        let (side, p) = p.check()?;
        // SAFETY: the caller promises the shapes in palu.h; null pointers were checked
        unsafe { layer.rebuild(side, &p, ith, nth) };
        Ok(())
    })
}

fn count(n: i32, name: &str) -> Result<usize> {
    usize::try_from(n).with_context(|| format!("{name} is negative"))
}

#[repr(C)]
pub struct AttnParams {
    q: *const f32,
    q_nb_head: usize,
    q_nb_token: usize,
    q_nb_stream: usize,
    rows_k: *const u8,
    rows_v: *const u8,
    rows_k_nb_stream: usize,
    rows_v_nb_stream: usize,
    mask: *const u8,
    mask_nb_token: usize,
    mask_nb_stream: usize,
    mask_f16: i32,
    pos: *const i32,
    sinks: *const f32,
    extra: *const f32,
    partial: *mut f32,
    out: *mut f32,
    n_head: i32,
    n_token: i32,
    n_stream: i32,
    n_kv: i32,
    scale: f32,
    softcap: f32,
    max_bias: f32,
}

impl AttnParams {
    /// The same in Rust's terms, once it makes sense for so many KV heads.
    pub fn check(&self, n_head_kv: usize) -> Result<attention::AttnParams> {
        let p = attention::AttnParams {
            q: self.q,
            q_nb_head: self.q_nb_head,
            q_nb_token: self.q_nb_token,
            q_nb_stream: self.q_nb_stream,
            rows_k: self.rows_k,
            rows_v: self.rows_v,
            rows_k_nb_stream: self.rows_k_nb_stream,
            rows_v_nb_stream: self.rows_v_nb_stream,
            mask: self.mask,
            mask_nb_token: self.mask_nb_token,
            mask_nb_stream: self.mask_nb_stream,
            mask_f16: self.mask_f16 != 0,
            pos: self.pos,
            sinks: self.sinks,
            extra: self.extra,
            partial: self.partial,
            out: self.out,
            n_head: count(self.n_head, "n_head")?,
            n_token: count(self.n_token, "n_token")?,
            n_stream: count(self.n_stream, "n_stream")?,
            n_kv: count(self.n_kv, "n_kv")?,
            scale: self.scale,
            softcap: self.softcap,
            max_bias: self.max_bias,
        };
        ensure!(p.n_head > 0 && p.n_head.is_multiple_of(n_head_kv), "{} query heads do not divide over {n_head_kv} KV heads", p.n_head);
        ensure!(!p.q.is_null() && !p.pos.is_null(), "q or pos is a null pointer");
        ensure!(!p.rows_k.is_null() && !p.rows_v.is_null(), "rows_k or rows_v is a null pointer");
        Ok(p)
    }
}

/// Runs one of the two steps of attention on checked parameters.
unsafe fn attend(
    layer: *const AttnLayer,
    params: *const AttnParams,
    (ith, nth): (i32, i32),
    step: impl FnOnce(&AttnLayer, &attention::AttnParams, usize, usize, bool) -> Result<()>,
) -> Status {
    guard(Status::Argument, || {
        let (layer, p) = unsafe { (reference(layer, "layer")?, reference(params, "params")?) };
        let (ith, nth) = share(ith, nth)?;
        let p = p.check(layer.codec(Side::Key).n_head_kv)?;
        let is_split = layer.n_chunk(p.n_head, p.n_token, p.n_stream, p.n_kv) > 1;
        step(layer, &p, ith, nth, is_split)
    })
}

#[no_mangle]
pub unsafe extern "C" fn palu_attn(layer: *const AttnLayer, params: *const AttnParams, ith: i32, nth: i32) -> Status {
    let step = |layer: &AttnLayer, p: &attention::AttnParams, ith, nth, is_split: bool| {
        ensure!(!if is_split { p.partial.is_null() } else { p.out.is_null() }, "partial or out is a null pointer");
        // SAFETY: the caller promises the shapes in palu.h; heads and null pointers were checked
        unsafe { layer.attend(p, ith, nth) };
        Ok(())
    };
    unsafe { attend(layer, params, (ith, nth), step) }
}

#[no_mangle]
pub unsafe extern "C" fn palu_attn_combine(layer: *const AttnLayer, params: *const AttnParams, ith: i32, nth: i32) -> Status {
    let step = |layer: &AttnLayer, p: &attention::AttnParams, ith, nth, is_split: bool| {
        if is_split {
            ensure!(!p.partial.is_null() && !p.out.is_null(), "partial or out is a null pointer");
            // SAFETY: as above, and the caller promises that all of palu_attn's calls are done
            unsafe { layer.combine(p, ith, nth) };
        }
        Ok(())
    };
    unsafe { attend(layer, params, (ith, nth), step) }
}

#[repr(C)]
pub struct RecentParams {
    q: *const f32,
    q_nb_head: usize,
    q_nb_token: usize,
    q_nb_stream: usize,
    k_cur: *const f32,
    k_cur_nb_head: usize,
    k_cur_nb_token: usize,
    v_cur: *const f32,
    v_cur_nb_head: usize,
    v_cur_nb_token: usize,
    k_slots: *mut u16,
    v_slots: *mut u16,
    idxs: *const i32,
    out: *mut f32,
    n_head: i32,
    n_head_kv: i32,
    head_dim_k: i32,
    head_dim_v: i32,
    n_token: i32,
    n_stream: i32,
    n_slot: i32,
    n_recent: i32,
    scale: f32,
    softcap: f32,
    max_bias: f32,
}

impl RecentParams {
    fn check(&self) -> Result<crate::recent::RecentParams> {
        let p = crate::recent::RecentParams {
            q: self.q,
            q_nb_head: self.q_nb_head,
            q_nb_token: self.q_nb_token,
            q_nb_stream: self.q_nb_stream,
            cur: [self.k_cur, self.v_cur],
            cur_nb_head: [self.k_cur_nb_head, self.v_cur_nb_head],
            cur_nb_token: [self.k_cur_nb_token, self.v_cur_nb_token],
            slots: [self.k_slots, self.v_slots],
            idxs: self.idxs,
            out: self.out,
            n_head: count(self.n_head, "n_head")?,
            n_head_kv: count(self.n_head_kv, "n_head_kv")?,
            head_dim: [count(self.head_dim_k, "head_dim_k")?, count(self.head_dim_v, "head_dim_v")?],
            n_token: count(self.n_token, "n_token")?,
            n_stream: count(self.n_stream, "n_stream")?,
            n_slot: count(self.n_slot, "n_slot")?,
            n_recent: count(self.n_recent, "n_recent")?,
            scale: self.scale,
            softcap: self.softcap,
            max_bias: self.max_bias,
        };
        ensure!(p.n_head_kv > 0 && p.n_head.is_multiple_of(p.n_head_kv), "{} query heads do not divide over {} KV heads", p.n_head, p.n_head_kv);
        ensure!(!p.cur.iter().any(|c| c.is_null()), "k_cur or v_cur is a null pointer");
        ensure!(!p.slots.iter().any(|s| s.is_null()) && !p.idxs.is_null(), "k_slots, v_slots or idxs is a null pointer");
        ensure!(p.out.is_null() || !p.q.is_null(), "q is a null pointer");
        Ok(p)
    }
}

#[no_mangle]
pub unsafe extern "C" fn palu_recent(params: *const RecentParams, ith: i32, nth: i32) -> Status {
    guard(Status::Argument, || {
        let p = unsafe { reference(params, "params") }?;
        let (ith, nth) = share(ith, nth)?;
        let p = p.check()?;
        let (n, per_token) = (p.n_stream * p.n_token, p.n_recent + 1);
        // SAFETY: not null; the caller promises that many numbers
        let idxs = unsafe { std::slice::from_raw_parts(p.idxs, n * per_token) };
        for token in idxs.chunks_exact(per_token) {
            let (slot, cells) = token.split_last().expect("at least one");
            if let Some(i) = cells.iter().find(|&&i| i64::from(i) >= (p.n_slot + p.n_token) as i64) {
                return Err(anyhow!("there is no slot or token {i}"));
            }
            ensure!(i64::from(*slot) < p.n_slot as i64, "slot {slot} of {} does not exist", p.n_slot);
        }
        // SAFETY: the caller promises the shapes in palu.h; indices and null pointers were checked
        unsafe { p.run(ith, nth) };
        Ok(())
    })
}

fn sizes(shapes: [i32; 4]) -> Result<[usize; 4]> {
    let mut sizes = [0; 4];
    for (size, shape) in sizes.iter_mut().zip(shapes) {
        *size = count(shape, "a shape")?;
    }
    Ok(sizes)
}

/// `f` of a layer and shapes; `otherwise` where they make no sense.
unsafe fn of_shapes<T>(layer: *const AttnLayer, shapes: [i32; 4], otherwise: T, f: impl FnOnce(&AttnLayer, [usize; 4]) -> T) -> T {
    let mut result = None;
    guard(Status::Argument, || {
        let layer = unsafe { reference(layer, "layer") }?;
        result = Some(f(layer, sizes(shapes)?));
        Ok(())
    });
    result.unwrap_or(otherwise)
}

#[no_mangle]
pub unsafe extern "C" fn palu_attn_n_chunk(layer: *const AttnLayer, n_head: i32, n_token: i32, n_stream: i32, n_kv: i32) -> i32 {
    unsafe { of_shapes(layer, [n_head, n_token, n_stream, n_kv], 1, |l, [h, t, s, c]| l.n_chunk(h, t, s, c) as i32) }
}

#[no_mangle]
pub unsafe extern "C" fn palu_attn_partial_size(layer: *const AttnLayer, n_head: i32, n_token: i32, n_stream: i32, n_kv: i32) -> usize {
    unsafe { of_shapes(layer, [n_head, n_token, n_stream, n_kv], 0, |l, [h, t, s, c]| l.partial_size(h, t, s, c)) }
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::*;
    use crate::cuda::{AttnStep, CudaLayer, StoreStep};
    use std::ffi::c_void;

    /// `palu_cuda_layer`: the layer, and its description as C wants it.
    pub struct Layer {
        layer: CudaLayer,
        description: CString,
    }

    #[no_mangle]
    pub unsafe extern "C" fn palu_cuda_layer_create(proj: *const Projection, il: i32, rope: *const Rope, device: i32, out: *mut *mut Layer) -> Status {
        guard(Status::Unsupported, || {
            let layer = layer_of(unsafe { reference(proj, "proj") }?, il)?;
            ensure!(!out.is_null(), failure(Status::Argument, "out is a null pointer"));
            let rope = unsafe { rope_or_none(rope) }?;
            let layer = CudaLayer::new(layer, &rope, device)?;
            let description = CString::new(layer.description()).unwrap_or_default();
            // SAFETY: not null; the caller promises that it can be written
            unsafe { *out = Box::into_raw(Box::new(Layer { layer, description })) };
            Ok(())
        })
    }

    #[no_mangle]
    pub unsafe extern "C" fn palu_cuda_layer_free(layer: *mut Layer) {
        if !layer.is_null() {
            // SAFETY: made by palu_cuda_layer_create and given back once
            drop(unsafe { Box::from_raw(layer) });
        }
    }

    #[no_mangle]
    pub unsafe extern "C" fn palu_cuda_description(layer: *const Layer) -> *const c_char {
        // SAFETY: the caller promises a layer or null
        unsafe { layer.as_ref() }.map_or(c"".as_ptr(), |l| l.description.as_ptr())
    }

    /// `f` of a layer; `otherwise`, and the last error, where it fails.
    unsafe fn of_layer<T>(layer: *const Layer, otherwise: T, f: impl FnOnce(&CudaLayer) -> Result<T>) -> T {
        let mut result = None;
        guard(Status::Argument, || {
            result = Some(f(&unsafe { reference(layer, "layer") }?.layer)?);
            Ok(())
        });
        result.unwrap_or(otherwise)
    }

    #[no_mangle]
    pub unsafe extern "C" fn palu_cuda_store_latent_size(layer: *const Layer, which: i32, n_token: i32) -> usize {
        unsafe { of_layer(layer, 0, |l| Ok(l.latent_size(side(which)?, count(n_token, "n_token")?))) }
    }

    fn cells_beside(n_kv: i32) -> Option<usize> {
        usize::try_from(n_kv).ok().filter(|&n| n != 0)
    }

    unsafe fn store_step(layer: *const Layer, params: *const StoreParams, n_params: i32, latent: *mut f32, step: StoreStep, stream: *mut c_void) -> Status {
        guard(Status::Argument, || {
            let layer = unsafe { &reference(layer, "layer")?.layer };
            ensure!((1..=2).contains(&n_params), "n_params is {n_params}, neither 1 nor 2");
            let store = (0..n_params as usize)
                .map(|i| unsafe { reference(params.wrapping_add(i), "params")? }.of_side())
                .collect::<Result<Vec<_>>>()?;
            ensure!(!store.iter().any(|(_, p)| p.x.is_null()) && !latent.is_null(), "x or latent is a null pointer");
            if matches!(step, StoreStep::Quantize { .. }) {
                ensure!(!store.iter().any(|(_, p)| p.idxs.is_null() || p.rows.is_null()), "idxs or rows is a null pointer");
            }
            // SAFETY: the caller promises the shapes in palu.h on the layer's device
            unsafe { layer.store(&store, latent, step, stream) }
        })
    }

    #[no_mangle]
    pub unsafe extern "C" fn palu_cuda_project(layer: *const Layer, params: *const StoreParams, n_params: i32, latent: *mut f32, beside: i32, stream: *mut c_void) -> Status {
        unsafe { store_step(layer, params, n_params, latent, StoreStep::Project { beside: cells_beside(beside) }, stream) }
    }

    #[no_mangle]
    pub unsafe extern "C" fn palu_cuda_store(layer: *const Layer, params: *const StoreParams, n_params: i32, latent: *mut f32, beside: i32, stream: *mut c_void) -> Status {
        unsafe { store_step(layer, params, n_params, latent, StoreStep::Quantize { beside: cells_beside(beside) }, stream) }
    }

    #[no_mangle]
    pub unsafe extern "C" fn palu_cuda_attn_on_rows(layer: *const Layer, n_head: i32, n_token: i32, n_stream: i32, n_kv: i32, n_seq: i32) -> i32 {
        let shapes = [n_head, n_token, n_stream, n_kv];
        unsafe { of_layer(layer, 0, |l| Ok(i32::from(l.on_rows(sizes(shapes)?, count(n_seq, "n_seq")?)?))) }
    }

    #[no_mangle]
    pub unsafe extern "C" fn palu_cuda_attn_partial_size(layer: *const Layer, n_head: i32, n_token: i32, n_stream: i32, n_kv: i32) -> usize {
        let shapes = [n_head, n_token, n_stream, n_kv];
        unsafe { of_layer(layer, 0, |l| l.partial_size(sizes(shapes)?)) }
    }

    #[no_mangle]
    pub unsafe extern "C" fn palu_cuda_recent(layer: *const Layer, params: *const RecentParams, beside: i32, stream: *mut c_void) -> Status {
        guard(Status::Argument, || {
            let (layer, p) = unsafe { (&reference(layer, "layer")?.layer, reference(params, "params")?) };
            // SAFETY: the caller promises the shapes in palu.h on the layer's device
            unsafe { layer.recent(&p.check()?, beside != 0, stream) }
        })
    }

    unsafe fn attn_step(layer: *const Layer, params: *const AttnParams, step: AttnStep, stream: *mut c_void) -> Status {
        guard(Status::Argument, || {
            let (layer, p) = unsafe { (&reference(layer, "layer")?.layer, reference(params, "params")?) };
            let p = p.check(layer.n_head_kv())?;
            // SAFETY: the caller promises the shapes in palu.h on the layer's device
            unsafe { layer.attend(&p, step, stream) }
        })
    }

    #[no_mangle]
    pub unsafe extern "C" fn palu_cuda_attn(layer: *const Layer, params: *const AttnParams, beside: i32, stream: *mut c_void) -> Status {
        unsafe { attn_step(layer, params, AttnStep::Chunks { beside: beside != 0 }, stream) }
    }

    #[no_mangle]
    pub unsafe extern "C" fn palu_cuda_attn_combine(layer: *const Layer, params: *const AttnParams, stream: *mut c_void) -> Status {
        unsafe { attn_step(layer, params, AttnStep::Combine, stream) }
    }

    #[no_mangle]
    pub unsafe extern "C" fn palu_cuda_rebuild(layer: *const Layer, params: *const RebuildParams, stream: *mut c_void) -> Status {
        guard(Status::Argument, || {
            let (layer, p) = unsafe { (&reference(layer, "layer")?.layer, reference(params, "params")?) };
            let (side, p) = p.check()?;
            // SAFETY: the caller promises the shapes in palu.h on the layer's device
            unsafe { layer.rebuild(side, &p, stream) }
        })
    }
}

#[cfg(feature = "convert")]
mod convert {
    use super::*;
    use crate::compare;
    use crate::convert::stats::{LayerShape, Projections, Reach, ReadFn, Scoring};
    use crate::convert::{self, Host, Tap, TapParams};
    use std::ffi::c_void;

    /// `palu_tap_layer`
    #[repr(C)]
    pub struct TapLayer {
        n_head: i32,
        n_head_kv: i32,
        head_dim_k: i32,
        head_dim_v: i32,
        window: i32,
        n_window: i32,
        scale: f32,
        softcap: f32,
        max_bias: f32,
        rope: *const Rope,
        sinks: *const f32,
        proj: [*const c_void; 2],
        proj_bias: [*const c_void; 2],
        read: Option<ReadFn>,
    }

    impl TapLayer {
        unsafe fn shape(&self) -> Result<LayerShape> {
            let n_head = count(self.n_head, "n_head")?;
            let n_window = count(self.n_window, "n_window")?;
            let reach = match self.window {
                0 => Reach::All,
                1 => Reach::Last(n_window),
                2 => Reach::Chunk(n_window),
                3 => Reach::Before(n_window / 2),
                window => return Err(failure(Status::Unsupported, format!("window {window} is not supported"))),
            };
            // SAFETY: not null; the caller promises n_head floats
            let sinks = if self.sinks.is_null() { &[][..] } else { unsafe { std::slice::from_raw_parts(self.sinks, n_head) } };
            Ok(LayerShape {
                n_head,
                n_head_kv: count(self.n_head_kv, "n_head_kv")?,
                head_dim_k: count(self.head_dim_k, "head_dim_k")?,
                head_dim_v: count(self.head_dim_v, "head_dim_v")?,
                rope: unsafe { rope_or_none(self.rope) }?,
                scoring: Scoring { scale: self.scale, softcap: self.softcap, max_bias: self.max_bias, reach, sinks: sinks.to_vec() },
            })
        }
    }

    #[no_mangle]
    pub unsafe extern "C" fn palu_tap_describe(tap: *const Tap, il: i32, layer: *const TapLayer) -> Status {
        guard(Status::Argument, || {
            let (tap, layer) = unsafe { (reference(tap, "tap")?, reference(layer, "layer")?) };
            let projections = Projections { matrix: layer.proj, bias: layer.proj_bias, read: layer.read };
            tap.describe(count(il, "il")?, unsafe { layer.shape() }?, projections)
        })
    }

    #[no_mangle]
    pub unsafe extern "C" fn palu_tap_run(tap: *const Tap, params: *const TapParams, ith: i32, nth: i32) -> Status {
        guard(Status::Argument, || {
            let (tap, p) = unsafe { (reference(tap, "tap")?, reference(params, "params")?) };
            let (ith, nth) = share(ith, nth)?;
            // SAFETY: the caller promises the shapes in palu.h
            unsafe { tap.run(p, ith, nth) }
        })
    }

    #[no_mangle]
    pub unsafe extern "C" fn palu_command(argc: i32, argv: *const *const c_char, host: *const Host) -> i32 {
        let mut exit = 1;
        let status = guard(Status::Argument, || {
            let host = unsafe { reference(host, "host") }?;
            ensure!(argc > 0 && !argv.is_null(), "argv is empty");
            // SAFETY: the caller promises argc terminated strings
            let args = (0..argc as usize).map(|i| unsafe { text(*argv.add(i), "argv") }.map(str::to_owned));
            let args = args.collect::<Result<Vec<_>>>()?;
            // SAFETY: the caller promises callbacks that do what palu.h says
            // a program's own name may stand before the command
            let is_compare = args.iter().take(2).any(|a| a == "compare") && args[0] != "convert";
            exit = unsafe { if is_compare { compare::run(&args, host) } else { convert::run(&args, host) } };
            Ok(())
        });
        if status != Status::Ok {
            LAST_ERROR.with(|e| eprintln!("palu: {}", e.borrow().to_string_lossy()));
        }
        exit
    }
}
