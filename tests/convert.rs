//! `palu convert` end to end, with a tiny transformer in place of the runtime.
#![cfg(feature = "convert")]

use palu::codec::Codec;
use palu::convert::stats::{Change, LayerShape, Mode, Projections, Scoring};
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
    key_bias: Vec<f32>,
    layers: Vec<Layer>,
    rope: RopeParams,
    tap: *mut Tap,
    /// calls of the tap per node
    nth: usize,
    n_past: usize,
    has_tokenizer: bool,
    loads: usize,
    /// tokens run so far, and after how many the runtime fails
    n_run: usize,
    n_run_most: usize,
    /// added to one element behind the tap
    nudge: Option<(usize, Side, usize, f32)>,
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
        let key_bias = (0..N_KV).map(|c| if c == 3 { 50.0 } else { 0.0 }).collect();
        Self { embedding, key_bias, layers, rope, tap: std::ptr::null_mut(), nth, n_past: 0, has_tokenizer: true, loads: 0, n_run: 0, n_run_most: usize::MAX, nudge: None }
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

    fn projections(&self, il: usize) -> Projections {
        let layer = &self.layers[il];
        let handle = |w: &Vec<f32>| std::ptr::from_ref(w).cast();
        let bias = std::ptr::from_ref(&self.key_bias).cast();
        Projections { matrix: [handle(&layer.wk), handle(&layer.wv)], bias: [bias, std::ptr::null()], read: Some(read) }
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
        if let Some((_, _, element, step)) = self.nudge.filter(|n| (n.0, n.1) == (il, side)) {
            out[element] += step;
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
        self.n_run += n;
        if self.n_run > self.n_run_most {
            return Err(-1);
        }
        assert!(self.n_past + n <= N_CTX, "the context is full");
        let pos: Vec<i32> = (0..n).map(|t| (self.n_past + t) as i32).collect();
        let embedding = |t: i32| self.embedding[t as usize * N_EMBD..][..N_EMBD].iter().map(|x| x.tanh());
        let mut x: Vec<Vec<f32>> = tokens.iter().map(|&t| embedding(t).collect()).collect();
        for il in 0..N_LAYER {
            let shape = LayerShape {
                n_head: N_HEAD,
                n_head_kv: N_HEAD_KV,
                head_dim_k: HEAD_DIM,
                head_dim_v: HEAD_DIM,
                rope: self.rope.clone(),
                scoring: Scoring::plain(HEAD_DIM),
            };
            unsafe { (*self.tap).describe(il, shape, self.projections(il)) }.map_err(|_| -1)?;
            let layer = &self.layers[il];
            let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
            for (t, x) in x.iter().enumerate() {
                let start = q.len();
                q.extend(times(&layer.wq, x));
                self.rotate(&mut q[start..], self.n_past + t);
                k.extend(times(&layer.wk, x).iter().zip(&self.key_bias).map(|(k, b)| k + b));
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

unsafe extern "C" fn read(matrix: *const c_void, out: *mut f32, cap: usize) -> i64 {
    let matrix = &*matrix.cast::<Vec<f32>>();
    if cap >= matrix.len() {
        std::ptr::copy_nonoverlapping(matrix.as_ptr(), out, matrix.len());
    }
    matrix.len() as i64
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
    let sides = projection.layers.iter().flat_map(|l| SIDES.map(|s| ((l.il, s), Change::Codec(Codec::new(l.side(s))))));
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
fn interrupted_work_resumes_and_gives_the_same_file() {
    let w = Workspace::new();
    let mut whole = Toy::new(1);
    assert_eq!(w.convert(&mut whole, "text.txt", "whole", &SMALL), 0);
    let bytes = |name: &str| std::fs::read(w.path(name)).unwrap();
    // while statistics are collected (nothing of so short a time is saved), and while divergence is measured
    for share in [0.05, 0.5, 0.85] {
        let mut cut = Toy::new(1);
        cut.n_run_most = (share * whole.n_run as f64) as usize;
        assert_ne!(w.convert(&mut cut, "text.txt", "out", &SMALL), 0);
        assert!(!w.path("out").exists());
        let mut rest = Toy::new(1);
        assert_eq!(w.convert(&mut rest, "text.txt", "out", &SMALL), 0);
        assert!(bytes("out") == bytes("whole"), "cut at {share}");
        if share > 0.4 {
            assert!(cut.n_run + rest.n_run < whole.n_run + whole.n_run / 8, "{} and {} of {}", cut.n_run, rest.n_run, whole.n_run);
        }
        std::fs::remove_file(w.path("out")).unwrap();
    }
    assert_eq!(w.names(), ["model.gguf", "text.txt", "whole"], "checkpoints are removed when they are no longer needed");
}

#[test]
fn kept_statistics_are_used_again_by_the_same_work_alone() {
    let w = Workspace::new();
    let statistics = w.arg("statistics");
    let kept = |bits| [&SMALL[2..], &["--statistics", &statistics, "--bits-per-value", bits]].concat();
    let run = |output: &str, args: &[&str]| {
        let mut toy = Toy::new(1);
        assert_eq!(w.convert(&mut toy, "text.txt", output, args), 0, "{args:?}");
        toy.n_run
    };
    let first = run("a", &kept("4"));
    let again = run("b", &kept("4"));
    assert!(again < 10, "{again} tokens were run again");
    assert!(std::fs::read(w.path("a")).unwrap() == std::fs::read(w.path("b")).unwrap());
    assert!(run("c", &kept("3")) + 3900 < first, "another budget needs no second pass over the text");
    let fresh = run("d", &[&SMALL[2..], &["--bits-per-value", "3"]].concat());
    assert!(fresh > 3900 && std::fs::read(w.path("c")).unwrap() == std::fs::read(w.path("d")).unwrap());
    std::fs::write(w.path("other.txt"), text(10)).unwrap();
    let mut toy = Toy::new(1);
    assert_eq!(w.convert(&mut toy, "other.txt", "e", &kept("4")), 0);
    assert!(toy.n_run > 3900, "another text is another matter");
}

#[test]
fn more_refinement_is_no_worse_on_the_probe_and_holds_at_every_budget() {
    let w = Workspace::new();
    let statistics = w.arg("statistics");
    let mut last = f64::INFINITY;
    for level in ["quick", "default", "thorough"] {
        let args = ["--bits-per-value", "3", "--tokens", "4000", "--probe-tokens", "900", "--statistics", &statistics, "--refine", level];
        assert_eq!(w.convert(&mut Toy::new(1), "text.txt", level, &args), 0);
        let d = divergence(&w.path(level), 3.0);
        assert!(d < 1.15 * last, "{level}: {d} after {last}");
        last = last.min(d);
    }
    let file = ProjectionFile::read(&w.path("thorough")).unwrap();
    assert!(file.meta.budgets.len() > 1, "{:?}", file.meta.budgets);
    for &bits in &file.meta.budgets {
        assert!(file.at(bits).unwrap().bits_per_value <= bits);
    }
}

/// Palu as published: what is promised about ranks, bits and bases, and that it works.
#[test]
fn the_published_method() {
    let w = Workspace::new();
    let convert = |output: &str, more: &[&str]| {
        let args = [&["--tokens", "4000", "--probe-tokens", "300", "--preset", "palu"], more].concat();
        w.convert(&mut Toy::new(1), "text.txt", output, &args)
    };
    for (i, more) in [
        &["--keep", "1", "--bits", "8", "--decomposition", "svd", "--rank-search", "uniform"][..],
        &["--keep", "1", "--bits", "8", "--group-size", "1"],
        &["--keep", "1", "--bits", "8", "--group-size", "all", "--rank-search", "fisher-uniform"],
    ]
    .iter()
    .enumerate()
    {
        let name = format!("{i}");
        assert_eq!(convert(&name, more), 0, "{more:?}");
        let file = ProjectionFile::read(&w.path(&name)).unwrap();
        assert!(file.is_fixed() && file.meta.metric == "palu as published");
        let sides = || file.layers.iter().flat_map(|l| &l.sides);
        assert!(sides().flat_map(|s| &s.groups).all(|g| g.bits.iter().all(|&b| b == 8)));
        assert!(sides().flat_map(|s| &s.groups).all(|g| g.variance.iter().all(|v| *v == g.variance[0])), "one step per group");
        for layer in &file.layers {
            assert_eq!(layer.sides[0].mean[3], 50.0, "the bias of the keys is added, not stored");
            assert!(layer.sides[1].mean.iter().all(|m| *m == 0.0), "and no mean is subtracted");
        }
        assert!(divergence(&w.path(&name), 0.0) < 1e-3, "{more:?}: everything kept with 8 bits");
        assert!(file.at(file.meta.bits_per_value / 2.0).is_err(), "an allocation of its own serves one budget");
    }
    assert_eq!(convert("rough", &["--keep", "0.5", "--bits", "3"]), 0);
    let rough = ProjectionFile::read(&w.path("rough")).unwrap();
    let ours = ["--bits-per-value", &rough.meta.bits_per_value.to_string(), "--tokens", "4000", "--probe-tokens", "300"];
    assert_eq!(w.convert(&mut Toy::new(1), "text.txt", "ours", &ours), 0);
    let (theirs, ours) = (divergence(&w.path("rough"), 0.0), divergence(&w.path("ours"), 0.0));
    assert!(ours < theirs, "{ours} with our method, {theirs} with theirs, in the same bytes");
    for bad in [&["--keep", "0.5"][..], &["--bits", "3"], &["--keep", "1.5", "--bits", "3"], &["--keep", "0.5", "--bits", "9"], &["--keep", "0.5", "--bits", "3", "--bits-per-value", "3"]] {
        assert_ne!(convert("bad", bad), 0, "{bad:?}");
    }
}

/// What errors of a side cost, measured forward with noise, is the mean square of its true gradients: the trace of the Fisher
/// information, here by finite differences of every element. So both rank the projections alike.
#[test]
fn noise_measures_what_gradients_do() {
    const N: usize = 12;
    const STEP: f32 = 1e-2;
    let mut toy = Toy::new(1);
    let mut tap = Tap::new(N_CTX);
    toy.tap = &mut tap;
    let tokens: Vec<i32> = text(5).bytes().take(N).map(|b| i32::from(b) % N_VOCAB as i32).collect();
    let log_softmax = |logits: Vec<f32>| -> Vec<f64> {
        let mut out = Vec::new();
        for l in logits.chunks(N_VOCAB) {
            let z = l.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            out.extend(l.iter().map(|&x| f64::from(x) - z));
        }
        out
    };
    let base = log_softmax(toy.eval(&tokens, false).unwrap());
    let (mut by_gradient, mut by_noise) = (Vec::new(), Vec::new());
    for (il, side) in (0..N_LAYER).flat_map(|il| SIDES.map(|s| (il, s))) {
        let mut fisher = 0.0;
        for element in 0..N * N_KV {
            toy.nudge = Some((il, side, element, STEP));
            let changed = log_softmax(toy.eval(&tokens, false).unwrap());
            fisher += base.iter().zip(&changed).map(|(a, b)| a.exp() * ((b - a) / f64::from(STEP)).powi(2)).sum::<f64>();
        }
        toy.nudge = None;
        by_gradient.push(fisher);

        let mut divergence = 0.0;
        for seed in 0..40 {
            tap.replace_mode(Mode::Compress([((il, side), Change::Noise { deviation: STEP, seed })].into()));
            let changed = log_softmax(toy.eval(&tokens, false).unwrap());
            divergence += base.iter().zip(&changed).map(|(a, b)| a.exp() * (a - b)).sum::<f64>() / 40.0;
        }
        tap.replace_mode(Mode::Pass);
        by_noise.push(2.0 * divergence / f64::from(STEP * STEP));
    }
    for (a, b) in by_gradient.iter().zip(&by_noise) {
        assert!((a - b).abs() < 0.2 * a, "{by_gradient:?} by gradients, {by_noise:?} by noise");
    }
    let order = |x: &[f64]| {
        let mut order: Vec<usize> = (0..x.len()).collect();
        order.sort_by(|&a, &b| x[a].total_cmp(&x[b]));
        order
    };
    assert_eq!(order(&by_gradient), order(&by_noise), "{by_gradient:?} by gradients, {by_noise:?} by noise");
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
