//! Running the model: every window on every cache, then speed. Whatever was finished before is not run again.

use super::parts::Parts;
use super::score::{Base, Scores};
use super::windows::{self, Cut, Kind, Window};
use super::{Contender, Depths, Options, Text, DEPTHS};
use crate::convert::host::{Cache, Host, Load, Model};
use anyhow::{bail, ensure, Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{json, Value};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Tokens of a batch, the host's.
const BATCH: usize = 512;
/// Tokens decoded one at a time, and tokens of a prompt, that speed is measured on.
pub const DECODE: usize = 32;
pub const PREFILL: usize = 256;
/// What a decoded token takes, in tokens of a prompt; only for the time left.
const DECODE_COST: usize = 8;
/// Without a terminal, a line this often.
const LINE_EVERY: Duration = Duration::from_secs(15);

/// What the runtime says of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    pub arch: String,
    pub name: String,
    pub identity: u64,
    pub n_layer: usize,
    pub n_vocab: usize,
    /// tokens that the model was trained for
    pub n_ctx_train: usize,
    /// tokens of the contexts compared
    pub n_ctx: usize,
    pub bos: Option<i32>,
}

impl ModelInfo {
    fn n_bos(&self) -> usize {
        usize::from(self.bos.is_some())
    }

    fn to_json(&self) -> Value {
        json!({
            "arch": self.arch, "name": self.name, "identity": self.identity, "n_layer": self.n_layer, "n_vocab": self.n_vocab,
            "n_ctx_train": self.n_ctx_train, "n_ctx": self.n_ctx, "bos": self.bos,
        })
    }

    fn from_json(v: &Value) -> Option<Self> {
        let number = |name: &str| v[name].as_u64().map(|n| n as usize);
        Some(Self {
            arch: v["arch"].as_str()?.to_owned(),
            name: v["name"].as_str()?.to_owned(),
            identity: v["identity"].as_u64()?,
            n_layer: number("n_layer")?,
            n_vocab: number("n_vocab")?,
            n_ctx_train: number("n_ctx_train")?,
            n_ctx: number("n_ctx")?,
            bos: v["bos"].as_i64().map(|b| b as i32),
        })
    }
}

/// Tokens per second at each depth, of one round.
#[derive(Clone, Debug, PartialEq)]
pub struct Speed {
    pub prefill: Vec<f64>,
    pub decode: Vec<f64>,
}

impl Speed {
    fn to_json(&self) -> Value {
        json!({ "prefill": self.prefill, "decode": self.decode })
    }

    fn from_json(v: &Value, n: usize) -> Option<Self> {
        let list = |name: &str| v[name].as_array()?.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>();
        let speed = Self { prefill: list("prefill")?, decode: list("decode")? };
        (speed.prefill.len() == n && speed.decode.len() == n).then_some(speed)
    }
}

/// Everything that was measured.
pub struct Measured {
    pub model: ModelInfo,
    /// per text
    pub cuts: Vec<Cut>,
    /// per contender: bytes allocated for the cache of n_ctx tokens, or why the runtime refuses it
    pub caches: Vec<Result<u64, String>>,
    /// per text, contender and kind (chunk, recall): the windows' scores; empty where the cache was refused
    pub scores: Vec<Vec<[Vec<Scores>; 2]>>,
    pub depths: Vec<usize>,
    /// per contender, the rounds
    pub speed: Vec<Vec<Speed>>,
}

pub const KINDS: [Kind; 2] = [Kind::Chunk, Kind::Recall];

/// The work as a person sees it: on a terminal a bar with the time left, else a line now and then. On stderr.
struct Progress {
    bar: ProgressBar,
    start: Instant,
    line: Instant,
    terminal: bool,
}

impl Progress {
    fn new(n: usize) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let style = ProgressStyle::with_template("{msg:36} [{bar:30}] {percent:>3}%, {eta} left").expect("a sound template");
        let bar = ProgressBar::with_draw_target(Some(n as u64), target).with_style(style);
        let now = Instant::now();
        Self { bar, start: now, line: now, terminal }
    }

    fn say(&self, what: String) {
        self.bar.set_message(what);
    }

    fn add(&mut self, n: usize) {
        self.bar.inc(n as u64);
        if !self.terminal && self.line.elapsed() >= LINE_EVERY {
            self.line = Instant::now();
            let (done, all) = (self.bar.position(), self.bar.length().unwrap_or(0));
            let left = self.start.elapsed().as_secs_f64() * all.saturating_sub(done) as f64 / done.max(1) as f64;
            eprintln!("{}: {}% done, about {left:.0} s left", self.bar.message(), 100 * done / all.max(1));
        }
    }
}

struct Runner<'a> {
    host: &'a Host,
    options: &'a Options,
    parts: &'a Parts,
    contenders: &'a [Contender],
    /// the model as it is loaded now: contender, tokens of the context
    loaded: Option<(usize, usize, Model<'static>)>,
    progress: Option<Progress>,
}

/// A window of a text.
type Id = (usize, Kind, usize);

impl Runner<'_> {
    /// The model on a contender's cache.
    ///
    /// # Safety
    /// As [`Model::open`].
    unsafe fn model(&mut self, contender: usize, n_ctx: usize) -> Result<&Model<'static>> {
        if self.loaded.as_ref().is_none_or(|l| (l.0, l.1) != (contender, n_ctx)) {
            self.loaded = None;
            let load = Load {
                path: &self.options.model,
                cache: &self.contenders[contender].cache,
                n_gpu_layers: self.options.n_gpu_layers,
                n_threads: self.options.n_thread(),
                n_ctx,
            };
            self.loaded = Some((contender, n_ctx, Model::open(self.host, None, &load)?));
        }
        Ok(&self.loaded.as_ref().expect("just loaded").2)
    }

    fn say(&self, what: impl FnOnce() -> String) {
        if let Some(p) = &self.progress {
            p.say(what());
        }
    }

    fn add(&mut self, n: usize) {
        if let Some(p) = &mut self.progress {
            p.add(n);
        }
    }
}

/// Runs a window; `f` gets the logits `[n][n_vocab]` of each run of scored positions, and the first one's index among them.
fn run_window(model: &Model, window: &Window, mut f: impl FnMut(usize, &[f32], &[i32]) -> Result<()>) -> Result<()> {
    let n_vocab = model.n_vocab;
    let mut rows = Vec::new();
    let mut logits = Vec::new();
    let mut done = 0;
    for start in (0..window.tokens.len()).step_by(BATCH) {
        let end = (start + BATCH).min(window.tokens.len());
        let piece = &window.tokens[start..end];
        let n = window.scored[done..].iter().take_while(|&&p| p < end).count();
        let scored = &window.scored[done..done + n];
        let Some(&first) = scored.first() else {
            model.eval(piece, start > 0, 0, &mut [])?;
            continue;
        };
        logits.resize((end - first) * n_vocab, 0.0);
        model.eval(piece, start > 0, first - start, &mut logits)?;
        rows.clear();
        for &p in scored {
            rows.extend_from_slice(&logits[(p - first) * n_vocab..][..n_vocab]);
        }
        let targets: Vec<i32> = scored.iter().map(|&p| window.tokens[p + 1]).collect();
        f(done, &rows, &targets)?;
        done += n;
    }
    Ok(())
}

fn score_key(text: &Text, cut: &Cut, n_ctx: usize, (_, kind, i): Id, contender: &Contender) -> String {
    // the context's size decides how a cache is laid out and, for recall, the gap
    format!("{} text {:016x} ctx {n_ctx} length {} {} {i}", contender.key, text.hash, cut.chunk, kind.name())
}

/// Cuts every text, tokenizing those that were not seen before; tokens are only there for those.
unsafe fn cut(
    runner: &mut Runner,
    text: &Text,
    model: &ModelInfo,
    tokens: &mut Option<Vec<i32>>,
    must_tokenize: bool,
) -> Result<Cut> {
    let options = runner.options;
    let (n_chunk, n_recall) = (options.chunks as usize, options.recall_windows as usize);
    let needed = windows::needed(model.n_ctx, n_chunk, n_recall);
    let key = format!("text {:016x} needed {needed}", text.hash);
    let known = runner.parts.get("tokens", &key).and_then(|v| v.as_u64());
    let n_token = match known {
        Some(n) if !must_tokenize => n as usize,
        _ => {
            let (cache, n_ctx) = runner.loaded.as_ref().map_or((0, model.n_ctx), |l| (l.0, l.1));
            let found = windows::tokenize(runner.model(cache, n_ctx)?, &text.text, needed)?;
            if known != Some(found.len() as u64) {
                runner.parts.put("tokens", &key, &json!(found.len()))?;
            }
            tokens.insert(found).len()
        }
    };
    let cut = Cut::new(n_token, model.n_bos(), model.n_ctx, n_chunk, n_recall, text.path.is_none());
    cut.with_context(|| match &text.path {
        Some(path) => format!(
            "text {} is too short: it has {n_token} tokens and a chunk takes {}; give a longer text or a smaller --ctx",
            path.display(),
            model.n_ctx
        ),
        None => "the bundled sample is too short".to_owned(),
    })
}

pub(super) unsafe fn measure(
    options: &Options,
    host: &Host,
    parts: &Parts,
    texts: &[Text],
    contenders: &[Contender],
) -> Result<Measured> {
    let mut runner = Runner { host, options, parts, contenders, loaded: None, progress: None };
    let n_ctx = options.ctx as usize;

    let key = format!("ctx {n_ctx}");
    let known = parts.get("model", &key).and_then(|v| ModelInfo::from_json(&v));
    let model = match known {
        Some(model) => model,
        None => {
            let m = runner.model(0, n_ctx).with_context(|| format!("cannot load model {}", options.model.display()))?;
            ensure!(m.has_tokenizer, "the model has no vocabulary to tokenize text with");
            let info = ModelInfo {
                arch: m.arch.clone(),
                name: m.name.clone(),
                identity: m.identity,
                n_layer: m.n_layer,
                n_vocab: m.n_vocab,
                n_ctx_train: m.n_ctx_train,
                n_ctx: m.n_ctx,
                bos: m.token_bos,
            };
            parts.put("model", &key, &info.to_json())?;
            info
        }
    };
    if model.n_ctx < n_ctx {
        eprintln!("palu compare: the model was trained for {} tokens, so chunks are {} and not {n_ctx}", model.n_ctx_train, model.n_ctx);
    }
    let n_ctx = model.n_ctx;
    check_pairing(&model, contenders)?;
    let depths = depths(options.speed_depths.as_ref(), &model)?;

    // what is known, and what is left to do
    let mut tokens: Vec<Option<Vec<i32>>> = texts.iter().map(|_| None).collect();
    let mut cuts = Vec::new();
    for (text, tokens) in texts.iter().zip(&mut tokens) {
        cuts.push(cut(&mut runner, text, &model, tokens, false)?);
    }
    let cache_key = |c: &Contender| format!("{} ctx {n_ctx}", c.key);
    let mut caches: Vec<Option<Result<u64, String>>> =
        contenders.iter().map(|c| parts.get("cache", &cache_key(c)).and_then(|v| v.as_u64()).map(Ok)).collect();
    let mut ids: Vec<Id> = Vec::new();
    for kind in KINDS {
        for (t, cut) in cuts.iter().enumerate() {
            ids.extend((0..cut.n_window(kind)).map(|i| (t, kind, i)));
        }
    }
    let mut scores: Vec<Vec<Option<Scores>>> = Vec::new();
    for &id in &ids {
        let (text, cut) = (&texts[id.0], &cuts[id.0]);
        let n = cut.positions(id.1, model.n_bos()).len();
        let known = |c: &Contender| Scores::from_json(&parts.get("score", &score_key(text, cut, n_ctx, id, c))?, n);
        scores.push(contenders.iter().map(known).collect());
    }
    let speed_key = |c: &Contender, round: usize| format!("{} depths {depths:?} round {round}", c.key);
    let n_round = if depths.is_empty() { 0 } else { options.speed_rounds as usize };
    let mut speed: Vec<Vec<Option<Speed>>> = contenders
        .iter()
        .map(|c| (0..n_round).map(|r| Speed::from_json(&parts.get("speed", &speed_key(c, r))?, depths.len())).collect())
        .collect();

    let length = |id: &Id| cuts[id.0].length(id.1, model.n_bos());
    let mut work = 0;
    for (id, scores) in ids.iter().zip(&scores) {
        let missing = scores.iter().skip(1).filter(|s| s.is_none()).count();
        work += length(id) * (missing + usize::from(missing > 0 || scores[0].is_none()));
    }
    let speed_cost = depths.last().copied().unwrap_or(0) + depths.len() * (PREFILL + DECODE_COST * DECODE);
    work += speed_cost * speed.iter().flatten().filter(|s| s.is_none()).count();
    if work > 0 {
        runner.progress = Some(Progress::new(work));
    }

    // blocks of windows whose f16 logits fit into memory
    let limit = (options.logits_memory * (1u64 << 30) as f64) as usize;
    let bytes = |id: &Id| 4 * model.n_vocab * cuts[id.0].positions(id.1, model.n_bos()).len();
    let mut blocks: Vec<Vec<usize>> = Vec::new();
    let mut used = usize::MAX;
    for (w, id) in ids.iter().enumerate().filter(|(w, _)| scores[*w].iter().any(Option::is_none)) {
        if used.saturating_add(bytes(id)) > limit {
            blocks.push(Vec::new());
            used = 0;
        }
        used += bytes(id);
        blocks.last_mut().expect("the first window opens a block").push(w);
    }

    for block in &blocks {
        let mut windows = Vec::new();
        for &w in block {
            let (t, kind, i) = ids[w];
            if tokens[t].is_none() {
                cut(&mut runner, &texts[t], &model, &mut tokens[t], true)?;
            }
            let tokens = tokens[t].as_ref().expect("just tokenized");
            windows.push((w, cuts[t].window(kind, i, tokens, model.bos)));
        }
        let mut bases: Vec<Base> = Vec::new();
        for (c, contender) in contenders.iter().enumerate() {
            let missing = |w: &usize| scores[*w][c].is_none();
            // the f16 cache's logits are what all others are held against
            if matches!(caches[c], Some(Err(_))) || (c > 0 && caches[c].is_some() && !block.iter().any(missing)) {
                continue;
            }
            match runner.model(c, n_ctx) {
                Ok(m) => {
                    let kv_bytes = m.kv_bytes;
                    if !matches!(caches[c], Some(Ok(b)) if b == kv_bytes) {
                        parts.put("cache", &cache_key(contender), &json!(kv_bytes))?;
                        caches[c] = Some(Ok(kv_bytes));
                    }
                }
                Err(e) => {
                    refuse(contender, &mut caches[c], e)?;
                    continue;
                }
            }
            for (b, (w, window)) in windows.iter().enumerate() {
                if c > 0 && scores[*w][c].is_some() {
                    continue;
                }
                let (t, kind, i) = ids[*w];
                let n = cuts[t].n_window(kind);
                runner.say(|| format!("{}: {} {} of {n}, text {}", contender.label, kind.name(), i + 1, t + 1));
                let (n_thread, n_vocab) = (options.n_thread(), model.n_vocab);
                let mut result = Scores::default();
                if c == 0 {
                    bases.push(Base::default());
                }
                run_window(runner.model(c, n_ctx)?, window, |first, logits, targets| {
                    if c == 0 {
                        bases[b].push(logits, n_vocab, n_thread);
                    }
                    bases[b].score(first, logits, targets, n_vocab, n_thread, &mut result)
                })
                .with_context(|| format!("the {} cache", contender.label))?;
                if scores[*w][c].is_none() {
                    parts.put("score", &score_key(&texts[t], &cuts[t], n_ctx, ids[*w], contender), &result.to_json())?;
                    scores[*w][c] = Some(result);
                }
                runner.add(window.tokens.len());
            }
        }
    }
    drop(tokens);

    for round in 0..n_round {
        for (c, (contender, rounds)) in contenders.iter().zip(&mut speed).enumerate() {
            if rounds[round].is_some() || matches!(caches[c], Some(Err(_))) {
                continue;
            }
            runner.say(|| format!("{}: speed, round {} of {n_round}", contender.label, round + 1));
            let last = depths.last().copied().unwrap_or(0);
            let m = match runner.model(c, last + 1 + DECODE + PREFILL) {
                Ok(m) => m,
                Err(e) => {
                    refuse(contender, &mut caches[c], e)?;
                    continue;
                }
            };
            let result = time(m, &depths)?;
            parts.put("speed", &speed_key(contender, round), &result.to_json())?;
            rounds[round] = Some(result);
            runner.add(speed_cost);
        }
    }
    if let Some(p) = runner.progress.take() {
        p.bar.finish_and_clear();
    }

    // a cache of which everything but its size was known
    for (c, contender) in contenders.iter().enumerate().filter(|(c, _)| caches[*c].is_none()).collect::<Vec<_>>() {
        match runner.model(c, n_ctx) {
            Ok(m) => {
                parts.put("cache", &cache_key(contender), &json!(m.kv_bytes))?;
                caches[c] = Some(Ok(m.kv_bytes));
            }
            Err(e) => refuse(contender, &mut caches[c], e)?,
        }
    }

    let mut by_text: Vec<Vec<[Vec<Scores>; 2]>> =
        texts.iter().map(|_| contenders.iter().map(|_| [Vec::new(), Vec::new()]).collect()).collect();
    for ((t, kind, _), scores) in ids.into_iter().zip(scores) {
        for (c, s) in scores.into_iter().enumerate().filter(|(c, _)| matches!(caches[*c], Some(Ok(_)))) {
            by_text[t][c][kind as usize].push(s.context("a window was left out")?);
        }
    }
    Ok(Measured {
        model,
        cuts,
        caches: caches.into_iter().map(|c| c.expect("every cache was loaded")).collect(),
        scores: by_text,
        depths,
        speed: speed.into_iter().map(|rounds| rounds.into_iter().flatten().collect()).collect(),
    })
}

/// A cache type that the runtime cannot do for this model is left out; a projection file that cannot be used is an error.
fn refuse(contender: &Contender, cache: &mut Option<Result<u64, String>>, error: anyhow::Error) -> Result<()> {
    match &contender.cache {
        Cache::Stock(kind) if kind != "f16" => {
            eprintln!("palu compare: left out {kind}: {error:#}");
            *cache = Some(Err(format!("{error:#}")));
            Ok(())
        }
        Cache::Stock(_) => Err(error).context("cannot run the model on an f16 cache"),
        Cache::Palu { file, .. } => Err(error).with_context(|| format!("cannot use {}", file.display())),
    }
}

/// As the runtime would, but before anything is run.
fn check_pairing(model: &ModelInfo, contenders: &[Contender]) -> Result<()> {
    for contender in contenders {
        let (Cache::Palu { file, .. }, Some(projection)) = (&contender.cache, &contender.projection) else { continue };
        let (file, meta) = (file.display(), &projection.meta);
        ensure!(
            meta.arch == model.arch && meta.n_layer == model.n_layer,
            "projection file {file} was made for a {} model of {} layers, and this is a {} model of {} layers",
            meta.arch,
            meta.n_layer,
            model.arch,
            model.n_layer
        );
        let name = if meta.model_name.is_empty() { String::new() } else { format!(", {}", meta.model_name) };
        ensure!(
            meta.model_identity == model.identity,
            "projection file {file} was made for a model with other weights (identity {:016x}{name}), and this model is {:016x}",
            meta.model_identity,
            model.identity
        );
    }
    Ok(())
}

/// Depths that fit into the model's context with what is measured there.
fn depths(given: Option<&Depths>, model: &ModelInfo) -> Result<Vec<usize>> {
    let most = if model.n_ctx_train > 0 { model.n_ctx_train } else { usize::MAX };
    let fits = |d: usize| d.saturating_add(1 + DECODE + PREFILL) <= most;
    let Some(Depths(depths)) = given else { return Ok(DEPTHS.into_iter().filter(|&d| fits(d)).collect()) };
    if let Some(d) = depths.iter().find(|&&d| !fits(d)) {
        bail!("speed at depth {d} takes {} tokens, and the model was trained for {most}", d.saturating_add(1 + DECODE + PREFILL));
    }
    Ok(depths.clone())
}

/// Speed at each depth: some tokens decoded one at a time, then some of a prompt.
fn time(model: &Model, depths: &[usize]) -> Result<Speed> {
    let mut speed = Speed { prefill: Vec::new(), decode: Vec::new() };
    let mut random = crate::convert::windows::Random(1);
    let mut tokens = |n: usize| -> Vec<i32> { (0..n).map(|_| (random.bits() % model.n_vocab as u64) as i32).collect() };
    let mut logits = vec![0f32; model.n_vocab];
    // all of the code and the weights once, outside of what is timed
    model.eval(&tokens(PREFILL), false, 0, &mut [])?;
    model.eval(&tokens(1), false, 0, &mut logits)?;
    let mut depth = 1;
    for &wanted in depths {
        if wanted > depth {
            model.eval(&tokens(wanted - depth), true, 0, &mut [])?;
        } else if wanted < depth {
            model.eval(&tokens(wanted.max(1)), false, 0, &mut [])?;
        }
        depth = wanted.max(1);
        let decoded = tokens(DECODE);
        let start = Instant::now();
        for token in &decoded {
            model.eval(std::slice::from_ref(token), true, 0, &mut logits)?;
        }
        speed.decode.push(DECODE as f64 / start.elapsed().as_secs_f64());
        let prompt = tokens(PREFILL);
        let start = Instant::now();
        model.eval(&prompt, true, PREFILL - 1, &mut logits)?;
        speed.prefill.push(PREFILL as f64 / start.elapsed().as_secs_f64());
        depth += DECODE + PREFILL;
    }
    Ok(speed)
}
