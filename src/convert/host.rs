//! The runtime that runs the model, as `palu.h` has it (`palu_host`), and a safe face for it.

use super::stats::Tap;
use anyhow::{bail, ensure, Context, Result};
use std::ffi::{c_char, c_void, CString};
use std::path::{Path, PathBuf};

/// `palu_host_params`
#[repr(C)]
pub struct HostParams {
    pub path: *const c_char,
    pub type_k: *const c_char,
    pub type_v: *const c_char,
    pub palu: *const c_char,
    pub palu_bits: f64,
    pub tap: *mut Tap,
    pub n_gpu_layers: i32,
    pub n_threads: i32,
    pub n_ctx: i32,
}

/// `palu_host_model`
#[repr(C)]
pub struct HostModel {
    pub arch: [c_char; 64],
    pub name: [c_char; 128],
    pub error: [c_char; 512],
    pub identity: u64,
    pub kv_bytes: u64,
    pub n_ctx: i32,
    pub n_layer: i32,
    pub n_vocab: i32,
    pub n_ctx_train: i32,
    pub token_bos: i32,
    pub has_tokenizer: i32,
}

pub type LoadFn = unsafe extern "C" fn(*mut c_void, *const HostParams, *mut HostModel) -> i32;
pub type TokenizeFn = unsafe extern "C" fn(*mut c_void, *const c_char, i32, *mut i32, i32) -> i32;
pub type EvalFn = unsafe extern "C" fn(*mut c_void, *const i32, i32, i32, i32, *mut f32) -> i32;
pub type OutputProjFn = unsafe extern "C" fn(*mut c_void, i32, *mut f32, usize) -> i32;

/// `palu_host`
#[repr(C)]
pub struct Host {
    pub ctx: *mut c_void,
    pub load: Option<LoadFn>,
    pub tokenize: Option<TokenizeFn>,
    pub eval: Option<EvalFn>,
    pub output_proj: Option<OutputProjFn>,
}

/// What keys and values are kept in while a model runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Cache {
    /// llama.cpp's own, of a ggml type
    Stock(String),
    Palu { file: PathBuf, bits: f64 },
}

/// How a model is to be loaded.
pub struct Load<'a> {
    pub path: &'a Path,
    pub cache: &'a Cache,
    pub n_gpu_layers: i32,
    pub n_threads: usize,
    pub n_ctx: usize,
}

/// A model that a [`Host`] has loaded, with a context. Another one that the same host loads takes its place.
pub struct Model<'a> {
    ctx: *mut c_void,
    tokenize: TokenizeFn,
    eval: EvalFn,
    output_proj: OutputProjFn,
    /// what the context's graph calls
    tap: Option<&'a Tap>,
    pub arch: String,
    pub name: String,
    pub identity: u64,
    /// allocated for the cache
    pub kv_bytes: u64,
    pub n_layer: usize,
    pub n_vocab: usize,
    /// tokens of the context
    pub n_ctx: usize,
    pub n_ctx_train: usize,
    pub token_bos: Option<i32>,
    pub has_tokenizer: bool,
}

fn text(chars: &[c_char]) -> String {
    let bytes: Vec<u8> = chars.iter().take_while(|&&c| c != 0).map(|&c| c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).context("a path cannot hold a zero byte")
}

/// The reason in a line of llama.cpp's log, without the names of functions.
fn reason(line: &str) -> &str {
    if let Some((_, why)) = line.split_once("palu: ") {
        return why;
    }
    let is_name = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    match line.split_once(": ") {
        Some((name, why)) if is_name(name) => why,
        _ => line,
    }
}

impl<'a> Model<'a> {
    /// With a context whose graph calls the tap, and an f16 cache.
    ///
    /// # Safety
    /// The callbacks must do what `palu.h` says for as long as the model lives.
    pub unsafe fn load(host: &Host, tap: &'a Tap, path: &Path, n_gpu_layers: i32, n_threads: usize, n_ctx: usize) -> Result<Self> {
        let cache = Cache::Stock("f16".to_owned());
        Self::open(host, Some(tap), &Load { path, cache: &cache, n_gpu_layers, n_threads, n_ctx })
    }

    /// The error is the runtime's reason.
    ///
    /// # Safety
    /// The callbacks must do what `palu.h` says for as long as the model lives, and another model must not be opened with the
    /// same host meanwhile.
    pub unsafe fn open(host: &Host, tap: Option<&'a Tap>, options: &Load) -> Result<Self> {
        let (Some(load), Some(tokenize), Some(eval), Some(output_proj)) = (host.load, host.tokenize, host.eval, host.output_proj)
        else {
            bail!("the runtime left out a callback");
        };
        let path = c_string(&options.path.to_string_lossy())?;
        let (kind, file, palu_bits) = match options.cache {
            Cache::Stock(kind) => (Some(c_string(kind)?), None, 0.0),
            Cache::Palu { file, bits } => (None, Some(c_string(&file.to_string_lossy())?), *bits),
        };
        let pointer = |s: &Option<CString>| s.as_ref().map_or(std::ptr::null(), |s| s.as_ptr());
        let params = HostParams {
            path: path.as_ptr(),
            type_k: pointer(&kind),
            type_v: pointer(&kind),
            palu: pointer(&file),
            palu_bits,
            tap: tap.map_or(std::ptr::null_mut(), |tap| std::ptr::from_ref(tap).cast_mut()),
            n_gpu_layers: options.n_gpu_layers,
            n_threads: options.n_threads as i32,
            n_ctx: options.n_ctx as i32,
        };
        let mut model = HostModel {
            arch: [0; 64],
            name: [0; 128],
            error: [0; 512],
            identity: 0,
            kv_bytes: 0,
            n_ctx: 0,
            n_layer: 0,
            n_vocab: 0,
            n_ctx_train: 0,
            token_bos: -1,
            has_tokenizer: 0,
        };
        let rc = load(host.ctx, &params, &mut model);
        ensure!(rc >= 0, "{}", reason(text(&model.error).trim()));
        ensure!(model.n_layer > 0 && model.n_vocab > 0 && model.n_ctx > 0, "the runtime described a model without layers or vocabulary");
        Ok(Self {
            ctx: host.ctx,
            tokenize,
            eval,
            output_proj,
            tap,
            arch: text(&model.arch),
            name: text(&model.name),
            identity: model.identity,
            kv_bytes: model.kv_bytes,
            n_layer: model.n_layer as usize,
            n_vocab: model.n_vocab as usize,
            n_ctx: (model.n_ctx as usize).min(options.n_ctx),
            n_ctx_train: model.n_ctx_train.max(0) as usize,
            token_bos: (model.token_bos >= 0).then_some(model.token_bos),
            has_tokenizer: model.has_tokenizer != 0,
        })
    }

    /// Tokens of one piece of text, without added special tokens.
    pub fn tokenize(&self, text: &str) -> Result<Vec<i32>> {
        let mut tokens = vec![0i32; text.len() + 8];
        for _ in 0..2 {
            // SAFETY: both buffers have the sizes given
            let n = unsafe {
                (self.tokenize)(self.ctx, text.as_ptr().cast(), text.len() as i32, tokens.as_mut_ptr(), tokens.len() as i32)
            };
            if n >= 0 {
                tokens.truncate(n as usize);
                return Ok(tokens);
            }
            if n == i32::MIN {
                break; // llama.cpp: more tokens than can be counted
            }
            tokens.resize((n.unsigned_abs() as usize).max(tokens.len()), 0);
        }
        bail!("the runtime cannot tokenize the text");
    }

    /// Runs `tokens` from position 0, or after what is there (`keep`). `logits` gets `[n_token - first_logit][n_vocab]`, or
    /// is empty for none.
    pub fn eval(&self, tokens: &[i32], keep: bool, first_logit: usize, logits: &mut [f32]) -> Result<()> {
        let out = if logits.is_empty() {
            std::ptr::null_mut()
        } else {
            assert_eq!(logits.len(), (tokens.len() - first_logit) * self.n_vocab);
            logits.as_mut_ptr()
        };
        // SAFETY: the buffers have the sizes that palu.h asks for
        let rc = unsafe {
            (self.eval)(self.ctx, tokens.as_ptr(), tokens.len() as i32, i32::from(keep), first_logit as i32, out)
        };
        if let Some(error) = self.tap.and_then(Tap::take_error) {
            bail!(error);
        }
        ensure!(rc >= 0, "the runtime failed to run {} tokens", tokens.len());
        Ok(())
    }

    /// Output projection of layer `il`, `[n_out][n_in]`, or `None` where there is no such single matrix.
    pub fn output_proj(&self, il: usize, n_in: usize) -> Result<Option<Vec<f32>>> {
        // SAFETY: a capacity of 0 only asks for the size
        let n_out = unsafe { (self.output_proj)(self.ctx, il as i32, std::ptr::null_mut(), 0) };
        ensure!(n_out >= 0, "the runtime cannot read the output projection of layer {il}");
        if n_out == 0 {
            return Ok(None);
        }
        let mut w = vec![0f32; n_out as usize * n_in];
        // SAFETY: the buffer has the capacity given
        let n = unsafe { (self.output_proj)(self.ctx, il as i32, w.as_mut_ptr(), w.len()) };
        ensure!(n == n_out, "the runtime cannot read the output projection of layer {il}");
        Ok(Some(w))
    }
}
