//! `palu convert` end to end, with a tiny transformer in place of the runtime.
#![cfg(feature = "convert")]

use palu::codec::Codec;
use palu::convert::stats::Mode;
use palu::convert::{run, Host, HostModel, HostParams, Tap, TapParams};
use palu::projection::{ProjectionFile, Side, SIDES};
use palu::rope::{RopeKind, RopeParams};
use std::ffi::{c_char, c_void};
use std::path::{Path, PathBuf};

const N_LAYER: usize = 3;
const N_VOCAB: usize = 48;
const N_EMBD: usize = 64;
const N_HEAD: usize = 4;
const N_HEAD_KV: usize = 2;
const HEAD_DIM: usize = 16;
const N_CTX: usize = 96;
const N_KV: usize = N_HEAD_KV * HEAD_DIM;
const N_Q: usize = N_HEAD * HEAD_DIM;

#[derive(Default)]
struct Layer {
    wq: Vec<f32>,
    wk: Vec<f32>,
    wv: Vec<f32>,
    wo: Vec<f32>,
    /// rotated keys and values of the tokens so far
    cache_k: Vec<f32>,
    cache_v: Vec<f32>,
}

/// A transformer with RoPE, grouped queries and biased keys; its ctx pointer is what the host's callbacks get.
struct Toy {
    embedding: Vec<f32>,
    layers: Vec<Layer>,
    rope: RopeParams,
    tap: *mut Tap,
    /// calls of the tap per node
    nth: usize,
    n_past: usize,
    has_tokenizer: bool,
    loads: usize,
}

struct Lcg(u64);
impl Lcg {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }
    fn matrix(&mut self, n_out: usize, n_in: usize) -> Vec<f32> {
        let scale = (12.0 / n_in as f32).sqrt();
        (0..n_out * n_in).map(|_| scale * self.next()).collect()
    }
}

fn times(w: &[f32], x: &[f32]) -> Vec<f32> {
    w.chunks(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
}

impl Toy {
    fn new(nth: usize) -> Self {
        let mut r = Lcg(5);
        let layers = (0..N_LAYER)
            .map(|_| Layer {
                wq: r.matrix(N_Q, N_EMBD),
                wk: r.matrix(N_KV, N_EMBD),
                wv: r.matrix(N_KV, N_EMBD),
                wo: r.matrix(N_EMBD, N_Q),
                ..Layer::default()
            })
            .collect();
        let rope = RopeParams { kind: RopeKind::Neox, n_rot: HEAD_DIM, freq_base: 100.0, ..RopeParams::none() };
        let embedding = r.matrix(N_VOCAB, N_EMBD).iter().map(|x| 3.0 * x).collect();
        Self { embedding, layers, rope, tap: std::ptr::null_mut(), nth, n_past: 0, has_tokenizer: true, loads: 0 }
    }

    fn rotate(&self, x: &mut [f32], pos: usize) {
        let (freq, _) = self.rope.frequencies();
        for head in x.chunks_mut(HEAD_DIM) {
            for (i, f) in freq.iter().enumerate() {
                let (a, b) = self.rope.pair(i);
                let (sin, cos) = ((f * pos as f64).sin() as f32, (f * pos as f64).cos() as f32);
                (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
            }
        }
    }

    fn through_tap(&self, il: usize, side: Side, x: &[f32], q: &[f32], pos: &[i32]) -> Result<Vec<f32>, i32> {
        let mut out = vec![0.0; x.len()];
        let is_key = side == Side::Key;
        let params = TapParams {
            x: x.as_ptr(),
            x_nb_head: 4 * HEAD_DIM,
            x_nb_token: 4 * N_KV,
            q: if is_key { q.as_ptr() } else { std::ptr::null() },
            q_nb_head: 4 * HEAD_DIM,
            q_nb_token: 4 * N_Q,
            pos: if is_key { pos.as_ptr() } else { std::ptr::null() },
            out: out.as_mut_ptr(),
            n_token: pos.len() as i32,
            il: il as i32,
            side: side as i32,
        };
        for ith in 0..self.nth {
            unsafe { (*self.tap).run(&params, ith, self.nth) }.map_err(|_| -1)?;
        }
        Ok(out)
    }

    /// Logits of all tokens.
    fn eval(&mut self, tokens: &[i32], keep: bool) -> Result<Vec<f32>, i32> {
        if !keep {
            self.n_past = 0;
            for layer in &mut self.layers {
                layer.cache_k.clear();
                layer.cache_v.clear();
            }
        }
        let n = tokens.len();
        assert!(self.n_past + n <= N_CTX, "the context is full");
        let pos: Vec<i32> = (0..n).map(|t| (self.n_past + t) as i32).collect();
        let embedding = |t: i32| self.embedding[t as usize * N_EMBD..][..N_EMBD].iter().map(|x| x.tanh());
        let mut x: Vec<Vec<f32>> = tokens.iter().map(|&t| embedding(t).collect()).collect();
        for il in 0..N_LAYER {
            unsafe { (*self.tap).describe(il, N_HEAD, N_HEAD_KV, HEAD_DIM, HEAD_DIM, self.rope.clone()) }.map_err(|_| -1)?;
            let layer = &self.layers[il];
            let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
            for (t, x) in x.iter().enumerate() {
                let start = q.len();
                q.extend(times(&layer.wq, x));
                self.rotate(&mut q[start..], self.n_past + t);
                k.extend(times(&layer.wk, x).iter().enumerate().map(|(c, k)| k + if c == 3 { 50.0 } else { 0.0 }));
                v.extend(times(&layer.wv, x));
            }
            let mut k = self.through_tap(il, Side::Key, &k, &q, &pos)?;
            let v = self.through_tap(il, Side::Value, &v, &[], &pos)?;
            for (t, k) in k.chunks_mut(N_KV).enumerate() {
                self.rotate(k, self.n_past + t);
            }
            self.layers[il].cache_k.extend(k);
            self.layers[il].cache_v.extend(v);
            let layer = &self.layers[il];
            for (t, x) in x.iter_mut().enumerate() {
                let mut out = vec![0.0; N_Q];
                for h in 0..N_HEAD {
                    let g = h / (N_HEAD / N_HEAD_KV);
                    let q = &q[t * N_Q + h * HEAD_DIM..][..HEAD_DIM];
                    let visible = self.n_past + t + 1;
                    let cell = |cache: &[f32], s: usize, d: usize| cache[s * N_KV + g * HEAD_DIM + d];
                    let score = |s: usize| (0..HEAD_DIM).map(|d| q[d] * cell(&layer.cache_k, s, d)).sum::<f32>() / 4.0;
                    let scores: Vec<f32> = (0..visible).map(score).collect();
                    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let p: Vec<f32> = scores.iter().map(|s| (s - max).exp()).collect();
                    let total: f32 = p.iter().sum();
                    for d in 0..HEAD_DIM {
                        out[h * HEAD_DIM + d] = (0..visible).map(|s| p[s] / total * cell(&layer.cache_v, s, d)).sum();
                    }
                }
                for (x, o) in x.iter_mut().zip(times(&layer.wo, &out)) {
                    *x = (*x + o).tanh();
                }
            }
        }
        self.n_past += n;
        Ok(x.iter().flat_map(|x| times(&self.embedding, x)).map(|l| 0.3 * l).collect())
    }

    fn host(&mut self) -> Host {
        let ctx = std::ptr::from_mut(self).cast();
        Host { ctx, load: Some(load), tokenize: Some(tokenize), eval: Some(eval), output_proj: Some(output_proj) }
    }
}

unsafe extern "C" fn load(ctx: *mut c_void, params: *const HostParams, out: *mut HostModel) -> i32 {
    let toy = &mut *ctx.cast::<Toy>();
    toy.loads += 1;
    toy.tap = (*params).tap;
    let out = &mut *out;
    out.n_ctx = (*params).n_ctx.min(N_CTX as i32);
    for (to, from) in out.arch.iter_mut().zip(b"toy") {
        *to = *from as c_char;
    }
    out.identity = 0xfeed;
    out.n_layer = N_LAYER as i32;
    out.n_vocab = N_VOCAB as i32;
    out.n_ctx_train = N_CTX as i32;
    out.token_bos = if toy.has_tokenizer { 1 } else { -1 };
    out.has_tokenizer = i32::from(toy.has_tokenizer);
    0
}

unsafe extern "C" fn tokenize(_: *mut c_void, text: *const c_char, size: i32, tokens: *mut i32, cap: i32) -> i32 {
    if cap < size {
        return -size;
    }
    for (i, &byte) in std::slice::from_raw_parts(text.cast::<u8>(), size as usize).iter().enumerate() {
        *tokens.add(i) = i32::from(byte) % N_VOCAB as i32;
    }
    size
}

unsafe extern "C" fn eval(ctx: *mut c_void, tokens: *const i32, n: i32, keep: i32, first_logit: i32, logits: *mut f32) -> i32 {
    let toy = &mut *ctx.cast::<Toy>();
    match toy.eval(std::slice::from_raw_parts(tokens, n as usize), keep != 0) {
        Ok(all) => {
            if !logits.is_null() {
                let wanted = &all[first_logit as usize * N_VOCAB..];
                std::ptr::copy_nonoverlapping(wanted.as_ptr(), logits, wanted.len());
            }
            0
        }
        Err(rc) => rc,
    }
}

unsafe extern "C" fn output_proj(ctx: *mut c_void, il: i32, out: *mut f32, cap: usize) -> i32 {
    let toy = &*ctx.cast::<Toy>();
    let w = &toy.layers[il as usize].wo;
    if cap >= w.len() {
        std::ptr::copy_nonoverlapping(w.as_ptr(), out, w.len());
    }
    N_EMBD as i32
}

/// Some words in random order.
fn text(seed: u64) -> String {
    const WORDS: [&str; 8] = ["sea ", "of ", "green ", "and ", "blue.\n", "Far ", "off ", "quiet "];
    let mut r = Lcg(seed);
    (0..3000).map(|_| WORDS[((r.next() + 0.5) * 8.0) as usize % 8]).collect()
}

struct Workspace {
    directory: tempfile::TempDir,
}

impl Workspace {
    fn new() -> Self {
        let w = Self { directory: tempfile::tempdir().unwrap() };
        std::fs::write(w.path("model.gguf"), b"GGUF and nothing else").unwrap();
        std::fs::write(w.path("text.txt"), text(9)).unwrap();
        w
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn arg(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn convert(&self, toy: &mut Toy, calibration: &str, output: &str, more: &[&str]) -> i32 {
        let mut args = vec!["convert".into(), self.arg("model.gguf"), "--output".into(), self.arg(output)];
        args.extend(["--calibration".into(), if calibration == "self" { "self".into() } else { self.arg(calibration) }]);
        args.extend(more.iter().map(|&s| s.to_owned()));
        unsafe { run(&args, &toy.host()) }
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

const SMALL: [&str; 6] = ["--bits-per-value", "4", "--tokens", "4000", "--probe-tokens", "300"];

/// Mean divergence of the toy with a projection from the toy without, on tokens that the conversion never saw.
fn divergence(file: &Path, bits: f64) -> f64 {
    let projection = ProjectionFile::read(file).unwrap().at(bits).unwrap();
    let mut toy = Toy::new(1);
    let mut tap = Tap::new(N_CTX);
    toy.tap = &mut tap;
    let tokens: Vec<i32> = text(77).bytes().take(N_CTX).map(|b| i32::from(b) % N_VOCAB as i32).collect();
    let base = toy.eval(&tokens, false).unwrap();
    let sides = projection.layers.iter().flat_map(|l| SIDES.map(|s| ((l.il, s), Codec::new(l.side(s)))));
    tap.replace_mode(Mode::Compress(sides.collect()));
    let other = toy.eval(&tokens, false).unwrap();
    let mut sum = 0.0;
    for (a, b) in base.chunks(N_VOCAB).zip(other.chunks(N_VOCAB)) {
        let lse = |l: &[f32]| l.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        let (la, lb) = (lse(a), lse(b));
        sum += a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - la).exp() * (f64::from(a) - la - f64::from(b) + lb)).sum::<f64>();
    }
    sum / N_CTX as f64
}

#[test]
fn a_file_is_made_that_keeps_the_model_what_it_is() {
    let w = Workspace::new();
    assert_eq!(w.convert(&mut Toy::new(2), "text.txt", "out.gguf", &SMALL), 0);
    let file = ProjectionFile::read(&w.path("out.gguf")).unwrap();
    assert_eq!(file.layers.len(), N_LAYER);
    assert_eq!((file.meta.arch.as_str(), file.meta.model_identity, file.meta.n_layer), ("toy", 0xfeed, N_LAYER));
    assert_eq!(file.meta.calibration, "text.txt");
    assert_eq!(file.meta.metric, "attention+output, measured");
    assert!((3900..=4100).contains(&file.meta.calibration_tokens), "{}", file.meta.calibration_tokens);
    let p = file.at(0.0).unwrap();
    assert!(p.bits_per_value <= 4.0 && p.bits_per_value > 3.8, "{}", p.bits_per_value);
    let (good, rough) = (divergence(&w.path("out.gguf"), 4.0), divergence(&w.path("out.gguf"), 2.0));
    assert!(good < 0.01 && good < rough / 4.0, "{good} at 4 bits, {rough} at 2");
    assert_eq!(w.names(), ["model.gguf", "out.gguf", "text.txt"], "nothing else is left behind");
}

#[test]
fn threads_and_passes_change_no_byte() {
    let w = Workspace::new();
    assert_eq!(w.convert(&mut Toy::new(1), "text.txt", "one", &[&SMALL[..], &["--threads", "1"]].concat()), 0);
    assert_eq!(w.convert(&mut Toy::new(3), "text.txt", "three", &[&SMALL[..], &["--threads", "3"]].concat()), 0);
    // room for one layer's statistics at a time
    assert_eq!(w.convert(&mut Toy::new(1), "text.txt", "passes", &[&SMALL[..], &["--stats-memory", "0.00001"]].concat()), 0);
    let bytes = |name: &str| std::fs::read(w.path(name)).unwrap();
    assert!(bytes("one") == bytes("three"));
    assert!(bytes("one") == bytes("passes"));
}

#[test]
fn group_sizes() {
    let w = Workspace::new();
    assert_eq!(w.convert(&mut Toy::new(1), "text.txt", "out", &[&SMALL[..], &["--group-size", "1"]].concat()), 0);
    let file = ProjectionFile::read(&w.path("out")).unwrap();
    assert!(file.layers.iter().flat_map(|l| &l.sides).all(|s| s.group_size == 1 && s.groups.len() == N_HEAD_KV));
    assert!(divergence(&w.path("out"), 4.0) < 0.05);
    assert_ne!(w.convert(&mut Toy::new(1), "text.txt", "bad", &[&SMALL[..], &["--group-size", "3"]].concat()), 0);
    assert!(!w.path("bad").exists());
}

#[test]
fn a_model_without_vocabulary_writes_its_own_text() {
    let w = Workspace::new();
    let mut toy = Toy::new(1);
    toy.has_tokenizer = false;
    assert_ne!(w.convert(&mut toy, "text.txt", "out", &SMALL), 0, "text cannot be tokenized");
    let few = ["--bits-per-value", "4", "--tokens", "900", "--probe-tokens", "200"];
    for output in ["a", "b"] {
        assert_eq!(w.convert(&mut toy, "self", output, &few), 0);
    }
    assert_eq!(w.convert(&mut toy, "self", "c", &[&few[..], &["--seed", "1"]].concat()), 0);
    let bytes = |name: &str| std::fs::read(w.path(name)).unwrap();
    assert!(bytes("a") == bytes("b"), "the same seed gives the same file");
    assert!(bytes("a") != bytes("c"), "another seed gives another");
    assert_eq!(ProjectionFile::read(&w.path("a")).unwrap().meta.calibration, "self");
}

#[test]
fn a_budget_for_everything_needs_no_measuring() {
    let w = Workspace::new();
    let generous = ["--bits-per-value", "9", "--tokens", "4000"];
    assert_eq!(w.convert(&mut Toy::new(1), "text.txt", "out", &generous), 0);
    let file = ProjectionFile::read(&w.path("out")).unwrap();
    assert_eq!(file.meta.metric, "attention+output");
    assert!(divergence(&w.path("out"), 0.0) < 1e-3);
}

#[test]
fn bad_input_is_refused_and_the_old_file_kept() {
    let w = Workspace::new();
    std::fs::write(w.path("old"), "precious").unwrap();
    std::fs::write(w.path("short.txt"), "too short").unwrap();
    std::fs::write(w.path("empty.txt"), "").unwrap();
    std::fs::write(w.path("binary.txt"), [0x41, 0xff, 0xfe]).unwrap();
    std::fs::write(w.path("not-a-model"), "text").unwrap();
    for text in ["short.txt", "empty.txt", "binary.txt", "missing.txt"] {
        assert_ne!(w.convert(&mut Toy::new(1), text, "old", &SMALL), 0, "{text}");
    }
    for bits in ["0", "-1", "nan", "inf", "17", "many", "0.3"] {
        assert_ne!(w.convert(&mut Toy::new(1), "text.txt", "old", &["--bits-per-value", bits]), 0, "{bits} bits");
    }
    assert_ne!(w.convert(&mut Toy::new(1), "text.txt", "old", &[]), 0, "no budget");

    // damaged weights: not-a-number from some layer on
    for (il, side) in [(0, "k"), (1, "v"), (2, "k")] {
        let mut toy = Toy::new(1);
        let layer = &mut toy.layers[il];
        (if side == "k" { &mut layer.wk } else { &mut layer.wv })[7] = f32::NAN;
        assert_ne!(w.convert(&mut toy, "text.txt", "old", &SMALL), 0, "{side} of layer {il}");
    }
    let mut toy = Toy::new(1);
    toy.layers[1].wo[3] = f32::INFINITY;
    assert_ne!(w.convert(&mut toy, "text.txt", "old", &SMALL), 0, "output projection");
    assert_eq!(std::fs::read(w.path("old")).unwrap(), b"precious");

    let mut toy = Toy::new(1);
    assert_ne!(w.convert(&mut toy, "text.txt", "missing/out", &SMALL), 0);
    assert_ne!(w.convert(&mut toy, "text.txt", "model.gguf", &SMALL), 0, "the model itself");
    assert_ne!(w.convert(&mut toy, "text.txt", ".", &SMALL), 0, "a directory");
    assert_eq!(toy.loads, 0, "all of this is known before the model is loaded");
    assert!(w.names().iter().all(|n| !n.contains("tmp")), "{:?}", w.names());
}

#[test]
fn a_host_that_leaves_out_a_callback_is_refused() {
    let w = Workspace::new();
    let mut toy = Toy::new(1);
    let args: Vec<String> = ["convert", &w.arg("model.gguf"), "--calibration", "self", "--output", &w.arg("out"), "--bits-per-value", "4"]
        .map(str::to_owned)
        .into();
    assert_ne!(unsafe { run(&args, &Host { eval: None, ..toy.host() }) }, 0);
}
