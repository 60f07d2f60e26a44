//! A layer on an NVIDIA GPU: its tables in device memory, and the launches of the kernels in `cuda/`.
//!
//! The kernels come as one fatbin inside the library and are loaded through the driver, which is looked for when the first
//! layer is made: the library itself links to nothing of CUDA. Which kernel runs how is decided by `cuda/plan.c`.
//! Nothing here allocates or waits once a layer is made, so that launches can be captured in a CUDA graph.

use crate::attention::{AttnParams, RebuildParams};
use crate::recent::RecentParams;
use crate::codec::{planes, Decoder, StoreParams};
use crate::layout::SEGMENT;
use crate::projection::{Layer, Side, SideProj, SIDES};
use crate::rope::RopeParams;
use abi::*;
use anyhow::{anyhow, bail, ensure, Context, Result};
use cudarc::driver::{result, sys, CudaContext, DriverError};
use std::collections::HashMap;
use std::ffi::{c_void, CStr, CString};
use std::sync::{Arc, Mutex};

/// The structs of `cuda/palu_cuda.h`, field by field; a test holds them to the C compiler's layout.
mod abi {
    use std::ffi::c_char;
    use std::ptr::null;

    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Group {
        pub rank: i32,
        pub rank_pad: i32,
        pub seg0: i32,
        pub step0: i32,
        pub row_offset: i32,
        pub row_end: i32,
        pub dec0: i64,
        pub enc0: i64,
    }

    /// `PALU_CUDA_NEAR_GROUPS`
    pub const NEAR_GROUPS: usize = 8;

    #[repr(C)]
    #[derive(Clone, Copy, Debug)]
    pub struct Side {
        pub groups: *const Group,
        pub segs: *const u32,
        pub dec: *const i8,
        pub dec_tiles: *const i8,
        pub dec_scale: *const f32,
        pub dec_half: *const f32,
        pub mean: *const f32,
        pub pairs: *const f32,
        pub enc: *const u16,
        pub step: *const f32,
        pub n_head_kv: i32,
        pub head_dim: i32,
        pub group_size: i32,
        pub n_group: i32,
        pub row_bytes: i32,
        pub rank_max: i32,
        pub row_span_max: i32,
        pub rank_sum: i32,
        pub planes: i32,
        pub slice_span: i32,
        pub near_groups: [Group; NEAR_GROUPS],
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug)]
    pub struct Rope {
        pub pair_dim: *const i32,
        pub turn: *const u64,
        pub mag: *const f32,
        pub n_fast: i32,
    }

    impl Rope {
        pub const NONE: Self = Self { pair_dim: null(), turn: null(), mag: null(), n_fast: 0 };
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Part {
        pub first_chunk: i32,
        pub first_tile: i32,
        pub end_tile: i32,
        pub chunk_tiles: i32,
        pub heads_per_cta: i32,
        pub beside: i32,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug)]
    pub struct Attn {
        pub k: Side,
        pub v: Side,
        pub rope: Rope,
        pub q: *const f32,
        pub q_nb_head: i64,
        pub q_nb_token: i64,
        pub q_nb_stream: i64,
        pub rows_k: *const u8,
        pub rows_v: *const u8,
        pub rows_k_nb_stream: i64,
        pub rows_v_nb_stream: i64,
        pub mask: *const u8,
        pub mask_nb_token: i64,
        pub mask_nb_stream: i64,
        pub pos: *const i32,
        pub sinks: *const f32,
        pub extra: *const f32,
        pub partial: *mut f32,
        pub out: *mut f32,
        pub mask_f16: i32,
        pub n_head: i32,
        pub n_token: i32,
        pub n_stream: i32,
        pub n_kv: i32,
        pub n_chunk: i32,
        pub n_context: i32,
        pub context_tokens: i32,
        pub part: Part,
        pub rank_stride: i32,
        pub scale: f32,
        pub softcap: f32,
        pub max_bias: f32,
        pub trig_scale: f32,
        pub mma_cols: i32,
        pub mma_slice: i32,
        pub k_stage_words: i32,
        pub v_stage_words: i32,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug)]
    pub struct Stored {
        pub side: Side,
        pub x: *const f32,
        pub x_nb_head: i64,
        pub x_nb_token: i64,
        pub idxs: *const i64,
        pub rows: *mut u8,
        pub latent: *mut f32,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug)]
    pub struct Store {
        pub of: [Stored; 2],
        pub done: *mut u32,
        pub n_side: i32,
        pub n_token: i32,
        pub beside: i32,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug)]
    pub struct Rebuild {
        pub side: Side,
        pub rope: Rope,
        pub rows: *const u8,
        pub rows_nb_stream: i64,
        pub pos: *const i32,
        pub out: *mut u16,
        pub n_stream: i32,
        pub n_kv: i32,
        pub n_out: i32,
        pub n_split: i32,
        pub slab: i32,
        pub stages: i32,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug)]
    pub struct Recent {
        pub q: *const f32,
        pub q_nb_head: i64,
        pub q_nb_token: i64,
        pub q_nb_stream: i64,
        pub cur: [*const f32; 2],
        pub cur_nb_head: [i64; 2],
        pub cur_nb_token: [i64; 2],
        pub slots: [*mut u16; 2],
        pub idxs: *const i32,
        pub out: *mut f32,
        pub n_head: i32,
        pub n_head_kv: i32,
        pub head_dim: [i32; 2],
        pub n_token: i32,
        pub n_stream: i32,
        pub n_slot: i32,
        pub n_recent: i32,
        pub store: i32,
        pub beside: i32,
        pub scale: f32,
        pub softcap: f32,
        pub max_bias: f32,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug)]
    pub struct Prepend {
        pub slots: *const u16,
        pub cur: *const f32,
        pub cur_nb_head: i64,
        pub cur_nb_token: i64,
        pub out: *mut u16,
        pub n_head_kv: i32,
        pub head_dim: i32,
        pub n_stream: i32,
        pub n_more: i32,
        pub n_out: i32,
        pub n_slot: i32,
        pub n_token: i32,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug)]
    pub struct DeviceInfo {
        pub arch: i32,
        pub n_sm: i32,
        pub smem_optin: i32,
        pub n_cluster: i32,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug)]
    pub struct Launch {
        pub kernel: *const c_char,
        pub grid: [u32; 3],
        pub block: u32,
        pub smem: u32,
    }

    impl Launch {
        pub const NONE: Self = Self { kernel: null(), grid: [0; 3], block: 0, smem: 0 };
    }

    extern "C" {
        pub fn palu_cuda_plan_store(dev: *const DeviceInfo, p: *const Store, out: *mut Launch) -> i32;
        pub fn palu_cuda_plan_rebuild(
            dev: *const DeviceInfo,
            p: *mut Rebuild,
            groups: *const Group,
            out: *mut Launch,
        ) -> i32;
        pub fn palu_cuda_plan_attn(dev: *const DeviceInfo, p: *mut Attn, rest: *mut Part, out: *mut Launch) -> i32;
        pub fn palu_cuda_plan_one_cluster(dev: *const DeviceInfo, out: *mut Launch) -> i32;
        pub fn palu_cuda_plan_recent(p: *const Recent, out: *mut Launch) -> i32;
        pub fn palu_cuda_plan_prepend(p: *const Prepend, out: *mut Launch) -> i32;
        pub fn palu_cuda_tile_keys(
            side: *const Side,
            groups: *const Group,
            pair_dim: *const i32,
            dec: *const i8,
            out: *mut i8,
        ) -> i32;
        pub fn palu_cuda_slice_span(side: *const Side, groups: *const Group, segs: *const u32) -> i32;
        pub fn palu_cuda_pair_table(
            side: *const Side,
            pair_dim: *const i32,
            dec_scale: *const f32,
            dec_half: *const f32,
            mean: *const f32,
            out: *mut f32,
        );
        pub fn palu_cuda_fast_pairs(turn: *const u64, n_pair: i32) -> i32;
        pub fn palu_cuda_plan_on_rows(dev: *const DeviceInfo, p: *const Attn, n_seq: i32) -> i32;
        pub fn palu_cuda_partial_size(p: *const Attn) -> usize;
    }
}

/// Where channel c of a key decoder's row stands; `palu_cuda_key_channel()`.
fn key_channel(c: usize) -> usize {
    (c & !31) | (c >> 2 & 1) << 4 | (c >> 3 & 3) << 2 | (c & 3)
}

/// Channels that a decoder's row is padded to; `PALU_CUDA_RANK_ALIGN`.
const RANK_ALIGN: usize = 32;
/// Rebuilt keys, as integers times `trig_scale`, stay below this, so that they and their rotations are finite in f16.
const KEY_LIMIT: f64 = 46000.0;

#[cfg(palu_fatbin)]
static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/palu.fatbin"));
#[cfg(not(palu_fatbin))]
static FATBIN: &[u8] = &[];

impl Launch {
    /// As the driver wants it, without attributes.
    fn config(&self, stream: *mut c_void) -> sys::CUlaunchConfig {
        let [x, y, z] = self.grid;
        sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: self.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.smem,
            hStream: stream.cast(),
            attrs: std::ptr::null_mut(),
            numAttrs: 0,
        }
    }
}

/// One GPU with the kernels loaded.
pub struct Device {
    context: Arc<CudaContext>,
    module: sys::CUmodule,
    functions: Mutex<HashMap<CString, usize>>,
    info: DeviceInfo,
    name: String,
    /// kernels may be launched before the one in front is done
    early: bool,
}

// SAFETY: module and functions are handles that the driver lets any thread use
unsafe impl Send for Device {}
// SAFETY: as above
unsafe impl Sync for Device {}

fn driver<T>(what: &str, result: Result<T, DriverError>) -> Result<T> {
    result.map_err(|e| match e.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => anyhow!("{what}: out of GPU memory"),
        _ => {
            let name = e.error_name().ok().and_then(|s| s.to_str().ok()).unwrap_or("an unknown error");
            let text = e.error_string().ok().and_then(|s| s.to_str().ok()).unwrap_or("");
            anyhow!("{what}: {name} ({text})")
        }
    })
}

impl Device {
    /// GPU number `ordinal`, as the driver counts them; opened once per process.
    pub fn get(ordinal: i32) -> Result<Arc<Self>> {
        static OPEN: Mutex<Vec<(i32, Arc<Device>)>> = Mutex::new(Vec::new());
        let mut open = OPEN.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, device)) = open.iter().find(|(o, _)| *o == ordinal) {
            return Ok(device.clone());
        }
        let device = Arc::new(Self::open(ordinal).with_context(|| format!("CUDA device {ordinal}"))?);
        open.push((ordinal, device.clone()));
        Ok(device)
    }

    fn open(ordinal: i32) -> Result<Self> {
        use sys::CUdevice_attribute_enum as Attribute;
        ensure!(!FATBIN.is_empty(), "this libpalu was built without CUDA kernels (no nvcc was found)");
        // SAFETY: only looks for the library; cudarc would panic without it
        ensure!(unsafe { sys::is_culib_present() }, "the NVIDIA driver (libcuda) was not found");
        let index = usize::try_from(ordinal).context("its number is negative")?;
        let context = driver("cannot be opened", CudaContext::new(index))?;
        let attribute = |a| driver("cannot be asked for its properties", context.attribute(a));
        let info = DeviceInfo {
            arch: 10 * attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
                + attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            n_sm: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            smem_optin: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            n_cluster: 0,
        };
        let name = driver("cannot be asked for its name", context.name())?;
        ensure!(info.arch >= 75, "{name} has compute capability {}.{}, 7.5 is needed", info.arch / 10, info.arch % 10);
        // SAFETY: the image is a whole fatbin, made by nvcc
        let module = match unsafe { result::module::load_data(FATBIN.as_ptr().cast()) } {
            Ok(module) => module,
            Err(e)
                if matches!(
                    e.0,
                    sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION | sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
                ) =>
            {
                bail!("{name}'s driver is too old for these kernels, or they were not compiled for compute capability {}.{}", info.arch / 10, info.arch % 10)
            }
            Err(e) => driver("the kernels cannot be loaded", Err(e))?,
        };
        let mut version = 0;
        // SAFETY: writes one number
        driver("cannot be asked for its version", unsafe { sys::cuDriverGetVersion(&mut version).result() })?;
        // stream capture knows such launches from CUDA 12.3 on
        let early = info.arch >= 90 && version >= 12030;
        let mut device = Self { context, module, functions: Mutex::default(), info, name, early };
        if info.arch == 90 {
            device.info.n_cluster = device.clusters()?;
        }
        Ok(device)
    }

    /// How many clusters of `decode_sm90_cluster` run at once.
    fn clusters(&self) -> Result<i32> {
        let mut launch = Launch::NONE;
        // SAFETY: plain data
        ensure!(unsafe { palu_cuda_plan_one_cluster(&self.info, &mut launch) } == 0, "a cluster has no launch shape");
        // SAFETY: plan.c names kernels by literals
        let f = self.function(unsafe { CStr::from_ptr(launch.kernel) })?;
        let config = launch.config(std::ptr::null_mut());
        let mut n = 0;
        // SAFETY: a kernel of this device's module, and one number to write to
        let asked = unsafe { sys::cuOccupancyMaxActiveClusters(&mut n, f, &config).result() };
        driver("cannot be asked how many clusters run at once", asked)?;
        Ok(n)
    }

    /// "NVIDIA H200, sm_90"
    pub fn description(&self) -> String {
        format!("{}, sm_{}", self.name, self.info.arch)
    }

    fn function(&self, name: &CStr) -> Result<sys::CUfunction> {
        use sys::CUfunction_attribute_enum as Attribute;
        let mut functions = self.functions.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(&f) = functions.get(name) {
            return Ok(f as sys::CUfunction);
        }
        let text = name.to_string_lossy();
        // SAFETY: the module lives as long as the device, and the function as long as the module
        unsafe {
            let f = driver(&format!("kernel {text}"), result::module::get_function(self.module, name.to_owned()))?;
            let fixed = driver(
                &text,
                result::function::get_function_attribute(f, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES),
            )?;
            let most = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            driver(&text, result::function::set_function_attribute(f, most, self.info.smem_optin - fixed))?;
            functions.insert(name.to_owned(), f as usize);
            Ok(f)
        }
    }

    /// # Safety
    /// `params` is the struct that the kernel takes, and every pointer in it is good on this device until the kernel is done.
    unsafe fn launch<T>(&self, launch: &Launch, params: &mut T, stream: *mut c_void) -> Result<()> {
        if launch.kernel.is_null() {
            return Ok(());
        }
        driver("cannot be used", self.context.bind_to_thread())?;
        // SAFETY: plan.c names kernels by literals
        let name = unsafe { CStr::from_ptr(launch.kernel) };
        let f = self.function(name)?;
        let mut params = [std::ptr::from_mut(params).cast::<c_void>()];
        // the kernel may start before the one in front of it is done; it waits itself (grid_wait() in cuda/common.cuh)
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig { attrs: &mut early, numAttrs: self.early.into(), ..launch.config(stream) };
        // SAFETY: the caller's promise
        let launched = unsafe { sys::cuLaunchKernelEx(&config, f, params.as_mut_ptr(), std::ptr::null_mut()).result() };
        launched.or_else(|e| driver(&format!("kernel {}", name.to_string_lossy()), Err(e)))
    }
}

/// Device memory of one layer's tables.
struct Memory {
    device: Arc<Device>,
    at: sys::CUdeviceptr,
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.device.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by `Tables::upload`, freed once. Freeing waits for kernels that still read it.
            let _ = unsafe { result::free_sync(self.at) };
        }
    }
}

/// Tables on their way to the device: they are laid out in one piece of memory, and pointers are offsets until it exists.
#[derive(Default)]
struct Tables(Vec<u8>);

impl Tables {
    const ALIGN: usize = 256;

    /// Adds a table; returns its offset as a pointer. Offsets begin with 256: null stays null.
    fn add<T: Copy>(&mut self, table: &[T]) -> *const T {
        self.0.resize(self.0.len().next_multiple_of(Self::ALIGN).max(Self::ALIGN), 0);
        let at = self.0.len();
        // SAFETY: T is a plain number or a struct of them without padding
        self.0.extend_from_slice(unsafe { std::slice::from_raw_parts(table.as_ptr().cast(), size_of_val(table)) });
        at as *const T
    }

    fn upload(mut self, device: &Arc<Device>) -> Result<Memory> {
        // kernels read decoders 16 bytes at a time
        self.0.resize(self.0.len().next_multiple_of(Self::ALIGN).max(Self::ALIGN), 0);
        driver("cannot be used", device.context.bind_to_thread())?;
        let what = format!("{} bytes of projections", self.0.len());
        // SAFETY: the context is current; the memory is freed by `Memory`
        unsafe {
            let at = driver(&what, result::malloc_sync(self.0.len()))?;
            let memory = Memory { device: device.clone(), at };
            driver(&what, result::memcpy_htod_sync(at, &self.0))?;
            Ok(memory)
        }
    }
}

fn moved<T>(offset: *const T, base: sys::CUdeviceptr) -> *const T {
    if offset.is_null() {
        offset
    } else {
        (base + offset as u64) as *const T
    }
}

impl abi::Side {
    fn moved(self, base: sys::CUdeviceptr) -> Self {
        Self {
            groups: moved(self.groups, base),
            segs: moved(self.segs, base),
            dec: moved(self.dec, base),
            dec_tiles: moved(self.dec_tiles, base),
            dec_scale: moved(self.dec_scale, base),
            dec_half: moved(self.dec_half, base),
            mean: moved(self.mean, base),
            pairs: moved(self.pairs, base),
            enc: moved(self.enc, base),
            step: moved(self.step, base),
            ..self
        }
    }
}

/// One side's tables, and the power of two that keeps its integers in f16's range. `pair_dim`: the same pairs.
fn side_tables(
    tables: &mut Tables,
    side: &SideProj,
    pairs: &[(usize, usize)],
    pair_dim: &[i32],
) -> (abi::Side, Vec<abi::Group>, f32) {
    let n_plane = planes(side);
    let n_head = side.groups.first().map_or(side.n_head_kv, |g| g.n_head);
    let d = n_head * side.head_dim;
    let (mut groups, mut segs, mut dec, mut enc, mut step) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut dec_scale, mut dec_half) = (Vec::new(), Vec::new());
    let mut largest = 1.0f64;
    for g in &side.groups {
        let rank_pad = g.rank.next_multiple_of(RANK_ALIGN);
        let mut group = Group {
            rank: g.rank as i32,
            rank_pad: rank_pad as i32,
            seg0: segs.len() as i32,
            step0: step.len() as i32,
            row_offset: g.offset as i32,
            row_end: 0,
            dec0: dec.len() as i64,
            enc0: enc.len() as i64,
        };
        let mut at = g.offset + crate::layout::SCALE_BYTES;
        for &bits in &g.bits {
            segs.push(at as u32 | u32::from(bits) << 24);
            at += bits as usize;
        }
        group.row_end = at as i32;
        groups.push(group);
        step.extend_from_slice(&g.step);
        enc.extend(g.enc.iter().map(|e| e.to_bits()));

        let decoder = Decoder::new(g, n_plane, pairs);
        let place = |c: usize| if side.side == Side::Key { key_channel(c) } else { c };
        for plane in 0..n_plane {
            for i in 0..d {
                let row = dec.len();
                dec.resize(row + rank_pad, 0i8);
                for c in 0..g.rank {
                    dec[row + place(c)] = decoder.byte(i, c, plane, n_plane);
                }
            }
        }
        for i in 0..d {
            let weights = if g.rank > 0 { &decoder.weight[i * g.rank..][..g.rank] } else { &[] };
            let most = |c: usize| f64::from(1u32 << (g.bits[c / SEGMENT] - 1));
            largest = weights.iter().enumerate().map(|(c, w)| f64::from(w.abs()) * most(c)).sum::<f64>().max(largest);
            dec_half.push((weights.iter().map(|&w| i64::from(w)).sum::<i64>() as f64 / 2.0) as f32);
            dec_scale.push(if g.rank > 0 { decoder.scale[i] } else { 0.0 });
        }
    }
    let mut trig_scale = 1.0f32;
    while largest * f64::from(trig_scale) > KEY_LIMIT {
        trig_scale *= 0.5;
    }
    let max = |f: &dyn Fn(&Group) -> i32| groups.iter().map(f).max().unwrap_or(0);
    let mut header = abi::Side {
        groups: tables.add(&groups),
        segs: tables.add(&segs),
        dec: tables.add(&dec),
        dec_tiles: std::ptr::null(),
        dec_scale: tables.add(&dec_scale),
        dec_half: tables.add(&dec_half),
        mean: tables.add(&side.mean),
        pairs: std::ptr::null(),
        enc: tables.add(&enc),
        step: tables.add(&step),
        n_head_kv: side.n_head_kv as i32,
        head_dim: side.head_dim as i32,
        group_size: n_head as i32,
        n_group: side.groups.len() as i32,
        row_bytes: side.row_bytes as i32,
        rank_max: max(&|g| g.rank),
        row_span_max: max(&|g| g.row_end - g.row_offset),
        rank_sum: step.len() as i32,
        planes: n_plane as i32,
        slice_span: 0,
        near_groups: std::array::from_fn(|i| groups.get(i).copied().unwrap_or_default()),
    };
    // SAFETY: groups and segments of this side
    header.slice_span = unsafe { palu_cuda_slice_span(&header, groups.as_ptr(), segs.as_ptr()) };
    if side.side == Side::Key {
        let mut tiles = vec![0i8; dec.len()];
        // SAFETY: groups and pairs of this side; the tiles are as large as the decoders
        let status = unsafe {
            palu_cuda_tile_keys(&header, groups.as_ptr(), pair_dim.as_ptr(), dec.as_ptr(), tiles.as_mut_ptr())
        };
        if status == 0 {
            header.dec_tiles = tables.add(&tiles);
        }
        let mut of_pairs = vec![0.0f32; 4 * dec_scale.len()];
        // SAFETY: tables and pairs of this side, whose heads have an even number of dimensions; eight numbers for each pair
        unsafe {
            palu_cuda_pair_table(
                &header,
                pair_dim.as_ptr(),
                dec_scale.as_ptr(),
                dec_half.as_ptr(),
                side.mean.as_ptr(),
                of_pairs.as_mut_ptr(),
            );
        }
        header.pairs = tables.add(&of_pairs);
    }
    (header, groups, trig_scale)
}

/// Turns per position, modulo 1, times 2^64.
fn turn(radians: f64) -> u64 {
    let turns = radians / std::f64::consts::TAU;
    // two steps: a double has 53 bits, of which the first conversion takes the upper ones and leaves the rest exactly
    let scaled = (turns - turns.floor()) * 2f64.powi(32);
    let high = scaled.floor();
    ((high as u64) << 32).wrapping_add(((scaled - high) * 2f64.powi(32)) as u64)
}

fn rope_tables(tables: &mut Tables, pair_dim: &[i32], rope: &RopeParams) -> abi::Rope {
    let (frequency, magnitude) = if rope.n_pair() == 0 { (Vec::new(), 1.0) } else { rope.frequencies() };
    let mut turns: Vec<u64> = frequency.iter().map(|&f| turn(f)).collect();
    let mut mag = vec![magnitude; turns.len()];
    turns.resize(pair_dim.len() / 2, 0);
    mag.resize(pair_dim.len() / 2, 1.0);
    // SAFETY: as many as counted
    let n_fast = unsafe { palu_cuda_fast_pairs(turns.as_ptr(), turns.len() as i32) };
    abi::Rope { pair_dim: tables.add(pair_dim), turn: tables.add(&turns), mag: tables.add(&mag), n_fast }
}

/// `palu_cuda_layer`.
pub struct CudaLayer {
    device: Arc<Device>,
    sides: [abi::Side; 2],
    groups: [Vec<abi::Group>; 2],
    rope: abi::Rope,
    trig_scale: f32,
    /// zeros: how many of a group's channels a kernel has done, for each of [`STREAMS`] streams
    done: *mut u32,
    /// the streams that have their own
    streams: Mutex<Vec<usize>>,
    /// attention by clusters, which leave multiprocessors to what runs beside
    has_clusters: bool,
    _memory: Memory,
}

/// Streams on which few tokens are stored by one kernel; on more, by two.
const STREAMS: usize = 64;

// SAFETY: the pointers point to device memory that nobody writes, but for `done`, of which every stream has its part
unsafe impl Send for CudaLayer {}
// SAFETY: as above
unsafe impl Sync for CudaLayer {}

/// The two steps of storing tokens. `beside`, in both or in none, the cells of each stream that attention reads: the second one runs beside the
/// kernels in front of it in the stream, which are that attention, to rows that the caller knows not to be those that are written here,
/// and [`CudaLayer::recent`]; in front of these is the first one. Over a long context, few tokens are stored by the second one alone.
#[derive(Clone, Copy, Debug)]
pub enum StoreStep {
    /// To latents.
    Project { beside: Option<usize> },
    /// Latents to rows.
    Quantize { beside: Option<usize> },
}

/// The two steps of attention.
#[derive(Clone, Copy, Debug)]
pub enum AttnStep {
    /// Partial results of the context's chunks. `beside`: projecting, as in [`StoreStep::Project`], is in front of it, and no kernel in front of
    /// that in the stream writes a row that it reads and may still be at work when projecting has begun; so rows are read before that is done.
    Chunks { beside: bool },
    /// Their sum, decoded.
    Combine,
}

/// A number that must fit what the kernels count with.
fn int<T: TryFrom<usize>>(n: usize) -> Result<T> {
    T::try_from(n).map_err(|_| anyhow!("{n} is more than the CUDA kernels can count"))
}

impl CudaLayer {
    /// Puts a layer on a GPU. Fails where the kernels cannot do it, saying why.
    pub fn new(layer: &Layer, rope: &RopeParams, ordinal: i32) -> Result<Self> {
        let device = Device::get(ordinal)?;
        let [k, v] = layer.sides_for(rope)?;
        ensure!(k.head_dim % 2 == 0, "heads of {} dimensions (an odd number) are not supported on a GPU", k.head_dim);
        let mut tables = Tables::default();
        let pairs = rope.pairs(k.head_dim);
        let pair_dim: Vec<i32> = pairs.iter().flat_map(|&(a, b)| [a as i32, b as i32]).collect();
        let (k, groups_k, trig_scale) = side_tables(&mut tables, k, &pairs, &pair_dim);
        let (v, groups_v, _) = side_tables(&mut tables, v, &[], &[]);
        let rope = rope_tables(&mut tables, &pair_dim, rope);
        let done = tables.add(&vec![0u32; STREAMS * (groups_k.len() + groups_v.len())]);
        let memory = tables.upload(&device)?;
        let base = memory.at;
        let mut layer = Self {
            sides: [k.moved(base), v.moved(base)],
            groups: [groups_k, groups_v],
            rope: abi::Rope {
                pair_dim: moved(rope.pair_dim, base),
                turn: moved(rope.turn, base),
                mag: moved(rope.mag, base),
                n_fast: rope.n_fast,
            },
            trig_scale,
            done: moved(done, base).cast_mut(),
            streams: Mutex::default(),
            has_clusters: false,
            device,
            _memory: memory,
        };
        // what is to run later must have a kernel
        layer.plan_store(&layer.store_shape(&[Side::Key, Side::Value], 1)?)?;
        for side in [Side::Key, Side::Value] {
            layer.plan_rebuild(
                side,
                &RebuildParams::of_rows(std::ptr::null(), 0, std::ptr::null(), std::ptr::null_mut(), 1, 256),
            )?;
        }
        let mut shape = layer.attn_shape([layer.n_head_kv(), 1, 1, 256])?;
        shape.part.beside = 1; // what only clusters do
        layer.has_clusters = layer.plan_attn(shape)?.0.part.beside != 0;
        Ok(layer)
    }

    pub fn description(&self) -> String {
        self.device.description()
    }

    fn store_shape(&self, sides: &[Side], n_token: usize) -> Result<abi::Store> {
        let stored = |side: Side| Stored {
            side: self.sides[side as usize],
            x: std::ptr::null(),
            x_nb_head: 0,
            x_nb_token: 0,
            idxs: std::ptr::null(),
            rows: std::ptr::null_mut(),
            latent: std::ptr::null_mut(),
        };
        let &[first, ..] = sides else { bail!("neither keys nor values are to be stored") };
        let mut of = [stored(first); 2];
        match *sides {
            [_, second] => of[1] = stored(second),
            // kernels and plan take the larger of two ranks
            _ => of[1].side.rank_max = 0,
        }
        Ok(abi::Store { of, done: std::ptr::null_mut(), n_side: int(sides.len())?, n_token: int(n_token)?, beside: 0 })
    }

    /// The stream's part of `done`, or null if there are too many streams, or attention leaves nothing idle.
    fn done(&self, stream: *mut c_void) -> *mut u32 {
        if !self.has_clusters {
            return std::ptr::null_mut();
        }
        let mut streams = self.streams.lock().unwrap_or_else(|e| e.into_inner());
        let at = streams.iter().position(|&s| s == stream as usize).unwrap_or_else(|| {
            streams.push(stream as usize);
            streams.len() - 1
        });
        if at < STREAMS {
            return self.done.wrapping_add(at * (self.groups[0].len() + self.groups[1].len()));
        }
        streams.truncate(STREAMS);
        std::ptr::null_mut()
    }

    fn plan_store(&self, p: &abi::Store) -> Result<[Launch; 2]> {
        let mut launches = [Launch::NONE; 2];
        // SAFETY: plain data
        let status = unsafe { palu_cuda_plan_store(&self.device.info, p, launches.as_mut_ptr()) };
        ensure!(
            status == 0,
            "no CUDA kernel stores rows of ranks {} and {} on {}",
            p.of[0].side.rank_max,
            p.of[1].side.rank_max,
            self.device.description()
        );
        Ok(launches)
    }

    /// Whether [`StoreStep::Project`] beside attention launches anything for so many tokens.
    fn projects(&self, n_token: usize, n_kv: usize, stream: *mut c_void) -> Result<bool> {
        let mut shape = self.store_shape(&SIDES, n_token)?;
        (shape.beside, shape.done) = (int(n_kv)?, self.done(stream));
        Ok(!self.plan_store(&shape)?[0].kernel.is_null())
    }

    /// Floats of scratch that storing `n_token` tokens takes.
    pub fn latent_size(&self, side: Side, n_token: usize) -> usize {
        n_token * self.sides[side as usize].rank_sum as usize
    }

    /// Launches a step of storing tokens: of keys, of values, or of both of the same tokens, whose latents follow each other.
    ///
    /// # Safety
    /// Pointers of the shapes in `palu_store_params`, on this device; `latent` has [`Self::latent_size`] floats for each side;
    /// `stream` is a stream of the device's primary context; what [`StoreStep::Quantize`] says.
    pub unsafe fn store(&self, params: &[(Side, StoreParams)], latent: *mut f32, step: StoreStep, stream: *mut c_void) -> Result<()> {
        let sides: Vec<Side> = params.iter().map(|(side, _)| *side).collect();
        let n_token = params.first().map_or(0, |(_, p)| p.n_token);
        ensure!(params.iter().all(|(_, p)| p.n_token == n_token), "keys and values are not of the same tokens");
        let mut shape = self.store_shape(&sides, n_token)?;
        let mut latent = latent;
        for (to, (side, p)) in shape.of.iter_mut().zip(params) {
            *to = Stored {
                side: to.side,
                x: p.x,
                x_nb_head: p.x_nb_head as i64,
                x_nb_token: p.x_nb_token as i64,
                idxs: p.idxs,
                rows: p.rows,
                latent,
            };
            latent = latent.wrapping_add(self.latent_size(*side, n_token));
        }
        let (StoreStep::Project { beside } | StoreStep::Quantize { beside }) = step;
        if let Some(n_kv) = beside {
            (shape.beside, shape.done) = (int(n_kv)?, self.done(stream));
        }
        let launches = self.plan_store(&shape)?;
        let launch = &launches[usize::from(matches!(step, StoreStep::Quantize { .. }))];
        // SAFETY: the caller's promise
        unsafe { self.device.launch(launch, &mut shape, stream) }
    }

    fn plan_rebuild(&self, side: Side, p: &RebuildParams) -> Result<(abi::Rebuild, Launch)> {
        let mut p = abi::Rebuild {
            side: self.sides[side as usize],
            rope: if side == Side::Key { self.rope } else { abi::Rope::NONE },
            rows: p.rows,
            rows_nb_stream: p.rows_nb_stream as i64,
            pos: p.pos,
            // what comes before the rows is written by another kernel
            out: p.out.wrapping_add(p.n_more() * self.n_head_kv() * self.sides[side as usize].head_dim as usize),
            n_stream: int(p.n_stream)?,
            n_kv: int(p.n_kv)?,
            n_out: int(p.n_kv + p.n_more())?,
            n_split: 0,
            slab: 0,
            stages: 0,
        };
        let mut launch = Launch::NONE;
        // SAFETY: plain data, and the groups of this side
        let status = unsafe {
            palu_cuda_plan_rebuild(&self.device.info, &mut p, self.groups[side as usize].as_ptr(), &mut launch)
        };
        ensure!(
            status == 0,
            "no CUDA kernel rebuilds heads of {} dimensions and rank {} on {}",
            p.side.head_dim,
            p.side.rank_max,
            self.device.description()
        );
        Ok((p, launch))
    }

    /// # Safety
    /// Pointers of the shapes in `palu_rebuild_params`, on this device; `stream` as in [`Self::store`].
    pub unsafe fn rebuild(&self, side: Side, p: &RebuildParams, stream: *mut c_void) -> Result<()> {
        let (mut rows, launch) = self.plan_rebuild(side, p)?;
        // SAFETY: the caller's promise
        unsafe { self.device.launch(&launch, &mut rows, stream) }?;
        if p.n_more() == 0 {
            return Ok(());
        }
        let mut more = abi::Prepend {
            slots: p.slots,
            cur: p.cur,
            cur_nb_head: p.cur_nb_head as i64,
            cur_nb_token: p.cur_nb_token as i64,
            out: p.out,
            n_head_kv: rows.side.n_head_kv,
            head_dim: rows.side.head_dim,
            n_stream: rows.n_stream,
            n_more: int(p.n_more())?,
            n_out: rows.n_out,
            n_slot: int(p.n_slot)?,
            n_token: int(p.n_token)?,
        };
        let mut launch = Launch::NONE;
        // SAFETY: plain data
        ensure!(unsafe { palu_cuda_plan_prepend(&more, &mut launch) } == 0, "heads of {} dimensions cannot be copied", more.head_dim);
        // SAFETY: the caller's promise
        unsafe { self.device.launch(&launch, &mut more, stream) }
    }

    /// Attends to the last tokens and stores new ones; see `palu_recent`. `beside`: beside the kernel in front of it in the stream, which
    /// is attention to rows.
    ///
    /// # Safety
    /// Pointers of the shapes in `palu_recent_params`, on this device; `stream` as in [`Self::store`]; what `beside` says.
    pub unsafe fn recent(&self, p: &RecentParams, beside: bool, stream: *mut c_void) -> Result<()> {
        let mut p = abi::Recent {
            q: p.q,
            q_nb_head: p.q_nb_head as i64,
            q_nb_token: p.q_nb_token as i64,
            q_nb_stream: p.q_nb_stream as i64,
            cur: p.cur,
            cur_nb_head: p.cur_nb_head.map(|n| n as i64),
            cur_nb_token: p.cur_nb_token.map(|n| n as i64),
            slots: p.slots,
            idxs: p.idxs,
            out: p.out,
            n_head: int(p.n_head)?,
            n_head_kv: int(p.n_head_kv)?,
            head_dim: [int(p.head_dim[0])?, int(p.head_dim[1])?],
            n_token: int(p.n_token)?,
            n_stream: int(p.n_stream)?,
            n_slot: int(p.n_slot)?,
            n_recent: int(p.n_recent)?,
            store: 1,
            beside: i32::from(beside),
            scale: p.scale,
            softcap: p.softcap,
            max_bias: p.max_bias,
        };
        let mut launch = Launch::NONE;
        // SAFETY: plain data
        let status = unsafe { palu_cuda_plan_recent(&p, &mut launch) };
        ensure!(status == 0, "{} recent tokens with heads of {} and {} dimensions are too many, or these are odd", p.n_recent, p.head_dim[0], p.head_dim[1]);
        // SAFETY: the caller's promise
        unsafe { self.device.launch(&launch, &mut p, stream) }
    }

    fn attn_shape(&self, [n_head, n_token, n_stream, n_kv]: [usize; 4]) -> Result<abi::Attn> {
        Ok(abi::Attn {
            k: self.sides[0],
            v: self.sides[1],
            rope: self.rope,
            q: std::ptr::null(),
            q_nb_head: 0,
            q_nb_token: 0,
            q_nb_stream: 0,
            rows_k: std::ptr::null(),
            rows_v: std::ptr::null(),
            rows_k_nb_stream: 0,
            rows_v_nb_stream: 0,
            mask: std::ptr::null(),
            mask_nb_token: 0,
            mask_nb_stream: 0,
            pos: std::ptr::null(),
            sinks: std::ptr::null(),
            extra: std::ptr::null(),
            partial: std::ptr::null_mut(),
            out: std::ptr::null_mut(),
            mask_f16: 0,
            n_head: int(n_head)?,
            n_token: int(n_token)?,
            n_stream: int(n_stream)?,
            n_kv: int(n_kv)?,
            n_chunk: 0,
            n_context: 0,
            context_tokens: 0,
            part: Part::default(),
            rank_stride: 0,
            scale: 0.0,
            softcap: 0.0,
            max_bias: 0.0,
            trig_scale: self.trig_scale,
            mma_cols: 0,
            mma_slice: 0,
            k_stage_words: 0,
            v_stage_words: 0,
        })
    }

    fn plan_attn(&self, mut p: abi::Attn) -> Result<(abi::Attn, Part, [Launch; 4])> {
        let (mut rest, mut launches) = (Part::default(), [Launch::NONE; 4]);
        // SAFETY: plain data
        let status = unsafe { palu_cuda_plan_attn(&self.device.info, &mut p, &mut rest, launches.as_mut_ptr()) };
        ensure!(
            status == 0,
            "no CUDA kernel attends with heads of {} and {} dimensions, ranks of {} and {} and {} query heads on {}",
            p.k.head_dim,
            p.v.head_dim,
            p.k.rank_max,
            p.v.rank_max,
            p.n_head,
            self.device.description()
        );
        Ok((p, rest, launches))
    }

    /// Whether attention reads the rows; see `palu_cuda_attn_on_rows`. Shapes: n_head, n_token, n_stream, n_kv.
    pub fn on_rows(&self, shapes: [usize; 4], n_seq: usize) -> Result<bool> {
        let p = self.attn_shape(shapes)?;
        // SAFETY: plain data
        Ok(unsafe { palu_cuda_plan_on_rows(&self.device.info, &p, int(n_seq)?) } != 0)
    }

    /// Floats of [`AttnParams::partial`] on this device. Shapes: n_head, n_token, n_stream, n_kv.
    pub fn partial_size(&self, shapes: [usize; 4]) -> Result<usize> {
        let mut most = 0;
        // which kernel runs, and so the number of chunks, depends on whether the rows of every stream begin at a multiple of 16 bytes,
        // which is not known here
        for rows_k_nb_stream in [0, 4] {
            let (p, ..) = self.plan_attn(abi::Attn { rows_k_nb_stream, ..self.attn_shape(shapes)? })?;
            // SAFETY: a planned attention
            most = most.max(unsafe { palu_cuda_partial_size(&p) });
        }
        Ok(most)
    }

    pub fn n_head_kv(&self) -> usize {
        self.sides[0].n_head_kv as usize
    }

    /// Launches one step of attention, which always takes both.
    ///
    /// # Safety
    /// Pointers of the shapes in `palu_attn_params`, on this device; `partial` has [`Self::partial_size`] floats; `stream`
    /// as in [`Self::store`]; what `beside` says.
    pub unsafe fn attend(&self, p: &AttnParams, step: AttnStep, stream: *mut c_void) -> Result<()> {
        // without a kernel that projects in front there is nothing to be beside of
        let beside = matches!(step, AttnStep::Chunks { beside: true }) && self.projects(p.n_token * p.n_stream, p.n_kv, stream)?;
        let shape = abi::Attn {
            part: abi::Part { beside: i32::from(beside), ..abi::Part::default() },
            q: p.q,
            q_nb_head: p.q_nb_head as i64,
            q_nb_token: p.q_nb_token as i64,
            q_nb_stream: p.q_nb_stream as i64,
            rows_k: p.rows_k,
            rows_v: p.rows_v,
            rows_k_nb_stream: p.rows_k_nb_stream as i64,
            rows_v_nb_stream: p.rows_v_nb_stream as i64,
            mask: p.mask,
            mask_nb_token: p.mask_nb_token as i64,
            mask_nb_stream: p.mask_nb_stream as i64,
            pos: p.pos,
            sinks: p.sinks,
            extra: p.extra,
            partial: p.partial,
            out: p.out,
            mask_f16: i32::from(p.mask_f16),
            scale: p.scale,
            softcap: p.softcap,
            max_bias: p.max_bias,
            ..self.attn_shape([p.n_head, p.n_token, p.n_stream, p.n_kv])?
        };
        let (mut p, rest, launches) = self.plan_attn(shape)?;
        let [tiles, decode, decode_rest, combine] = &launches;
        // SAFETY: the caller's promise
        unsafe {
            if let AttnStep::Combine = step {
                return self.device.launch(combine, &mut p, stream);
            }
            self.device.launch(tiles, &mut p, stream)?;
            self.device.launch(decode, &mut p, stream)?;
            p.part = rest;
            self.device.launch(decode_rest, &mut p, stream)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn structs_are_laid_out_as_in_c() {
        extern "C" {
            static palu_cuda_layout: [usize; 32];
            static palu_cuda_layout_n: usize;
        }
        let ours = [
            size_of::<Group>(),
            offset_of!(Group, dec0),
            offset_of!(Group, enc0),
            size_of::<abi::Side>(),
            offset_of!(abi::Side, step),
            offset_of!(abi::Side, slice_span),
            offset_of!(abi::Side, near_groups),
            size_of::<abi::Rope>(),
            offset_of!(abi::Rope, n_fast),
            size_of::<Attn>(),
            offset_of!(Attn, rows_k),
            offset_of!(Attn, out),
            offset_of!(Attn, mask_f16),
            offset_of!(Attn, part),
            offset_of!(Attn, v_stage_words),
            size_of::<Stored>(),
            offset_of!(Stored, latent),
            size_of::<Store>(),
            offset_of!(Store, beside),
            size_of::<Rebuild>(),
            offset_of!(Rebuild, out),
            offset_of!(Rebuild, stages),
            size_of::<abi::Recent>(),
            offset_of!(abi::Recent, out),
            offset_of!(abi::Recent, max_bias),
            size_of::<abi::Prepend>(),
            offset_of!(abi::Prepend, out),
            offset_of!(abi::Prepend, n_token),
            size_of::<DeviceInfo>(),
            offset_of!(DeviceInfo, n_cluster),
            size_of::<Launch>(),
            offset_of!(Launch, smem),
        ];
        // SAFETY: constants of layout.c; only the first palu_cuda_layout_n of them exist
        let theirs = unsafe {
            std::slice::from_raw_parts(std::ptr::addr_of!(palu_cuda_layout).cast::<usize>(), palu_cuda_layout_n)
        };
        assert_eq!(ours, theirs);
    }

    /// Attention of 32 query heads over 8 KV heads of 128 dimensions on an H200: the kernel, its chunks and its shared memory.
    fn planned(rank_k: i32, first_bits: u32, [n_token, n_stream]: [i32; 2], n_cluster: i32) -> (String, Attn, Part, [Launch; 4]) {
        let group = |rank: i32| Group {
            rank,
            rank_pad: (rank + 31) / 32 * 32,
            seg0: 0,
            step0: 0,
            row_offset: 0,
            row_end: rank,
            dec0: 0,
            enc0: 0,
        };
        let (k, v) = (group(rank_k), group(624));
        // half of the values have so many bits, the rest 4
        let mut at = 2;
        let segs: Vec<u32> = (0..v.rank / 8)
            .map(|i| {
                let bits = if i < v.rank / 16 { first_bits } else { 4 };
                at += bits;
                (at - bits) | bits << 24
            })
            .collect();
        // SAFETY: numbers and null pointers
        let mut p: Attn = unsafe { std::mem::zeroed() };
        for (side, group, row_bytes) in [(&mut p.k, &k, 204), (&mut p.v, &v, 472)] {
            (side.n_head_kv, side.head_dim, side.group_size, side.n_group) = (8, 128, 8, 1);
            (side.row_bytes, side.rank_max, side.row_span_max, side.planes) = (row_bytes, group.rank, row_bytes, 1);
        }
        p.k.dec_tiles = std::ptr::dangling();
        // SAFETY: the group and segments of that side
        p.v.slice_span = unsafe { palu_cuda_slice_span(&p.v, &v, segs.as_ptr()) };
        // 20 segments, and the 2 bytes before them, as rows are read in words
        assert_eq!(p.v.slice_span, 20 * first_bits as i32 + 2);
        (p.n_head, p.n_token, p.n_stream, p.n_kv, p.trig_scale) = (32, n_token, n_stream, 65536, 1.0);
        p.part.beside = 1; // allowed, but only clusters do so
        let dev = DeviceInfo { arch: 90, n_sm: 132, smem_optin: 232_448, n_cluster };
        let (mut rest, mut launches) = (Part::default(), [Launch::NONE; 4]);
        // SAFETY: plain data; no pointer of p is read
        assert_eq!(unsafe { palu_cuda_plan_attn(&dev, &mut p, &mut rest, launches.as_mut_ptr()) }, 0);
        // SAFETY: plan.c names kernels by literals
        let kernel = unsafe { CStr::from_ptr(launches[1].kernel) }.to_string_lossy().into_owned();
        (kernel, p, rest, launches)
    }

    #[test]
    fn clusters_attend_where_they_fit() {
        for (rank, bits, products) in [(480, 7, 15), (448, 8, 14), (392, 8, 13), (328, 8, 12), (64, 8, 10)] {
            let (kernel, p, _, [tiles, decode, ..]) = planned(rank, bits, [1, 1], 30);
            assert_eq!((kernel.as_str(), p.part.beside), (format!("palu_decode_sm90_cluster_{products}").as_str(), 1));
            assert!(tiles.kernel.is_null() && decode.grid[0] <= 30 && decode.smem <= 232_448, "{decode:?}");
        }
        // too many channels or bits, no clusters
        for (rank, bits, shape, n_cluster) in
            [(512, 7, [1, 1], 30), (480, 8, [1, 1], 30), (512, 7, [1, 8], 30), (480, 7, [1, 33], 30), (480, 7, [1, 1], 0)]
        {
            let (kernel, p, ..) = planned(rank, bits, shape, n_cluster);
            assert_eq!((kernel.as_str(), p.part.beside, p.n_context), ("palu_decode_sm90_wide_16", 0, 0));
        }
    }

    #[test]
    fn clusters_share_streams_and_tokens() {
        // with 32 query heads over 8 KV heads, a cluster takes one token at a time
        for (shape, contexts) in [([1, 2], 2), ([1, 32], 32), ([3, 1], 3), ([4, 8], 32)] {
            let (kernel, p, _, [tiles, decode, rest, combine]) = planned(480, 7, shape, 30);
            assert_eq!(kernel, "palu_decode_sm90_cluster_many_15");
            assert_eq!((p.n_context, p.context_tokens, p.n_chunk, p.part.beside), (contexts, 1, 30, 1));
            assert_eq!((tiles.grid, decode.grid), ([contexts as u32, 1, 1], [30, 4, 1]));
            assert!(rest.kernel.is_null() && decode.smem <= 232_448 && combine.smem <= 232_448);
            // lists of tiles, then a chunk more than clusters for every context
            let lists = 32 + contexts as usize * 1024;
            let row = 32 * (4 + 624);
            // SAFETY: a planned attention
            assert_eq!(unsafe { palu_cuda_partial_size(&p) }, lists + (30 + contexts as usize) * row);
        }
        // more contexts than are shared
        assert_eq!(planned(480, 7, [5, 8], 30).1.n_context, 0);
    }

    #[test]
    fn many_tokens_are_read_from_rows_where_each_sees_its_own() {
        let on_rows = |shape, n_seq| {
            let dev = DeviceInfo { arch: 90, n_sm: 132, smem_optin: 232_448, n_cluster: 30 };
            // SAFETY: plain data; no pointer is read
            unsafe { palu_cuda_plan_on_rows(&dev, &planned(480, 7, shape, 30).1, n_seq) }
        };
        for (shape, n_seq, want) in
            [([3, 1], 1, 1), ([4, 1], 1, 1), ([5, 1], 1, 0), ([5, 1], 2, 1), ([32, 1], 32, 1), ([32, 1], 6, 0), ([33, 1], 33, 0), ([512, 1], 1, 0)]
        {
            assert_eq!(on_rows(shape, n_seq), want, "{shape:?} {n_seq}");
        }
    }

    #[test]
    fn multiprocessors_without_a_cluster_take_the_rest() {
        let (_, p, rest, [_, decode, beside, combine]) = planned(480, 7, [1, 1], 30);
        assert!(!beside.kernel.is_null());
        // every tile once, every chunk once
        assert_eq!((p.part.first_tile, p.part.end_tile, rest.end_tile), (0, rest.first_tile, 1024));
        assert_eq!((p.part.first_chunk, rest.first_chunk), (0, decode.grid[0] as i32));
        assert_eq!(p.n_chunk as u32, decode.grid[0] + beside.grid[0]);
        for (part, launch) in [(p.part, &decode), (rest, &beside)] {
            let tiles = part.end_tile - part.first_tile;
            assert_eq!((tiles + part.chunk_tiles - 1) / part.chunk_tiles, launch.grid[0] as i32);
        }
        // on what clusters leave, less two
        assert!(4 * decode.grid[0] + beside.grid[0] <= 130 && beside.grid[1] == 1 && (p.part.beside, rest.beside) == (1, 1));
        assert!(combine.smem <= 232_448);
        // nothing is left
        assert!(planned(480, 7, [1, 1], 33).3[2].kernel.is_null());
    }

    #[test]
    fn turns_are_exact_to_a_double() {
        for radians in [0.0, 1.0, 0.001, 6.5, -0.25, 1e-9] {
            let back = turn(radians) as f64 / 2f64.powi(64) * std::f64::consts::TAU;
            let want = radians.rem_euclid(std::f64::consts::TAU);
            assert!((back - want).abs() < 1e-14, "{radians}: {back} instead of {want}");
        }
    }
}
