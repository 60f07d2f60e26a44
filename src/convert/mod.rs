//! `palu convert`: how a projection file is made.
//!
//! The runtime runs the model ([`host`]); this module chooses the tokens ([`windows`]), looks at keys, values and queries
//! through a tap ([`stats`]), works out what errors cost from attention itself ([`weigh`]), finds the bases ([`solve`]), measures
//! how layers compare ([`measure`]) and writes the file.

pub mod host;
pub mod measure;
pub mod report;
pub mod solve;
pub mod stats;
pub mod weigh;
pub mod windows;

pub use host::{Host, HostModel, HostParams};
pub use stats::{Tap, TapParams};

use crate::layout::{ROW_ALIGN, SCALE_BYTES};
use crate::projection::{LayerFile, Meta, ProjectionFile, SIDES};
use anyhow::{bail, ensure, Context, Result};
use host::Model;
use measure::{parallel, Outcome, Probe};
use report::Stage;
use stats::{LayerShape, LayerStats, Mode};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use weigh::HeadWeights;
use windows::Windows;

/// Tokens of a window, where the model was trained for as many.
const WINDOW: usize = 2048;
/// Tokens of a window that the model writes itself, one at a time.
const SELF_WINDOW: usize = 512;
const TOKENS: usize = 131_072;
const SELF_TOKENS: usize = 16_384;
/// Above this, every channel has all of its bits whatever the head size.
const MAX_BITS_PER_VALUE: f64 = 9.0;

/// Make the projection file of a model
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// The model
    #[arg(value_name = "MODEL.gguf")]
    pub model: PathBuf,
    /// UTF-8 text of the kind that the model will see, or "self": text that the model writes itself
    #[arg(long, value_name = "TEXT|self")]
    pub calibration: PathBuf,
    /// Projection file to write; an existing one is replaced once the new one is complete
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
    /// Budget: stored bits per cached value, scales and padding included (f16 is 16). The file serves smaller ones too
    #[arg(long, value_name = "B", value_parser = parse_bits, allow_negative_numbers = true)]
    pub bits_per_value: f64,
    /// KV heads that share a latent; 0: all of a layer (best quality), 1: none (least work)
    #[arg(long, value_name = "G", default_value_t = 0)]
    pub group_size: usize,
    /// Tokens to collect statistics from [default: 131072, with "self" 16384]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub tokens: Option<u32>,
    /// Tokens that divergence is measured on, other ones
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    pub probe_tokens: u32,
    /// Seed of the sampling with "self"
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Memory for statistics, in GiB; if they take more, the text is run several times
    #[arg(long, value_name = "GIB", default_value_t = 4.0, value_parser = parse_memory)]
    pub stats_memory: f64,
    /// Threads [default: all processors]
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Layers of the model to run on the GPU (also -ngl) [default: the runtime's]
    #[arg(long, visible_alias = "ngl", value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    pub n_gpu_layers: i32,
}

fn parse_bits(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(b) if b > 0.0 && b <= MAX_BITS_PER_VALUE => Ok(b),
        _ => Err(format!("bits per value are a number above 0 and at most {MAX_BITS_PER_VALUE}")),
    }
}

fn parse_memory(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(m) if m > 0.0 && m.is_finite() => Ok(m),
        _ => Err("memory is a positive number of GiB".to_owned()),
    }
}

/// The arguments with llama.cpp's `-ngl` as clap can read it.
pub fn normalize_args(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    args.into_iter().map(|a| if a == "-ngl" { "--ngl".into() } else { a }).collect()
}

impl Options {
    fn is_self(&self) -> bool {
        self.calibration.as_os_str() == "self"
    }

    fn n_thread(&self) -> usize {
        self.threads.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), |n| n as usize)
    }

    /// What can be told to be wrong before the model is loaded, in one sentence.
    pub fn check(&self) -> Result<()> {
        use std::io::Read;
        let model = self.model.display();
        let mut magic = [0u8; 4];
        let file = std::fs::File::open(&self.model).with_context(|| format!("cannot open model {model}"))?;
        ensure!(file.metadata().is_ok_and(|m| m.is_file()), "model {model} is not a regular file");
        ensure!((&file).read_exact(&mut magic).is_ok() && &magic == b"GGUF", "model {model} is not a GGUF file");
        if !self.is_self() {
            windows::read_text(&self.calibration)?;
        }
        let output = self.output.display();
        ensure!(!self.output.is_dir(), "output {output} is a directory");
        if let (Ok(a), Ok(b)) = (self.output.canonicalize(), self.model.canonicalize()) {
            ensure!(a != b, "output {output} is the model itself");
        }
        if let (Ok(a), Ok(b)) = (self.output.canonicalize(), self.calibration.canonicalize()) {
            ensure!(a != b, "output {output} is the calibration text itself");
        }
        ensure!(self.output.file_name().is_some(), "output {output} names no file");
        let directory = self.output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // writing is the only reliable test: access() knows nothing of read-only mounts' quotas or of root
        let trial = directory.join(format!(".palu-{}.tmp", std::process::id()));
        std::fs::File::create(&trial)
            .and_then(|_| std::fs::remove_file(&trial))
            .with_context(|| format!("cannot write into {}", directory.display()))
    }

    /// What the file's content depends on, as options.
    fn recorded(&self, n_collect: usize, n_probe: usize) -> String {
        let mut s = format!("--bits-per-value {} --tokens {n_collect} --probe-tokens {n_probe}", self.bits_per_value);
        if self.group_size > 0 {
            s += &format!(" --group-size {}", self.group_size);
        }
        if self.is_self() {
            s += &format!(" --seed {}", self.seed);
        }
        s
    }
}

#[derive(clap::Parser)]
#[command(name = "palu convert", about = "Make the projection file of a model")]
struct Command {
    #[command(flatten)]
    options: Options,
}

/// The whole of `palu convert` (`palu_command()`); returns the exit status.
///
/// # Safety
/// The host's callbacks must do what `palu.h` says.
pub unsafe fn run(args: &[String], host: &Host) -> i32 {
    use clap::Parser;
    // a program's own name may stand before the command
    let skip = usize::from(args.len() > 1 && args[0] != "convert" && args[1] == "convert");
    let args = normalize_args(args[skip.min(args.len())..].iter().map(OsString::from));
    let command = match Command::try_parse_from(args) {
        Ok(command) => command,
        Err(e) => {
            let _ = e.print();
            return e.exit_code();
        }
    };
    match convert(&command.options, host) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("palu convert: {e:#}");
            1
        }
    }
}

unsafe fn convert(options: &Options, host: &Host) -> Result<()> {
    options.check()?;
    let n_thread = options.n_thread();
    let mut times = Vec::new();
    let (window, n_collect) = if options.is_self() { (SELF_WINDOW, SELF_TOKENS) } else { (WINDOW, TOKENS) };
    let n_collect = options.tokens.map_or(n_collect, |n| n as usize);
    let n_probe = options.probe_tokens as usize;

    let tap = Tap::new(window);
    let stage = Stage::new("load", 1);
    let model = Model::load(host, &tap, &options.model, options.n_gpu_layers, n_thread, window)?;
    times.push(stage.finish());

    // a token, so that the graph has described every layer
    model.eval(&[model.token_bos.unwrap_or(0)], false, 0, &mut [])?;
    let shapes = tap.layers();
    ensure!(!shapes.is_empty(), "{} models have no layer that can be compressed: no KV cache, or none of plain keys and values (latent attention, recurrence)", model.arch);
    let last = shapes.keys().copied().max().unwrap_or(0);
    ensure!(last < model.n_layer, "the runtime described layer {last} of {}", model.n_layer);
    check_budget(options, &shapes)?;

    let windows = if options.is_self() {
        let mut stage = Stage::new("sample text", 0);
        let windows = windows::sampled(&model, n_collect, n_probe, options.seed, |done, n| {
            stage.set_length(n);
            stage.set(done);
        })?;
        times.push(stage.finish());
        windows
    } else {
        let stage = Stage::new("tokenize", 1);
        let windows = windows::from_text(&model, &windows::read_text(&options.calibration)?, n_collect, n_probe)?;
        times.push(stage.finish());
        windows
    };

    let widest = shapes.values().flat_map(|s| SIDES.map(|side| s.width(side))).max().unwrap_or(0);
    if windows.n_token() < 4 * widest {
        eprintln!(
            "palu convert: warning: {} tokens are few for layers of {widest} channels; a longer text gives a better cache",
            windows.n_token()
        );
    }

    let layers = collect_and_solve(options, &model, &tap, &shapes, &windows, n_thread, &mut times)?;
    let n_probe_real = windows.probe.iter().map(Vec::len).sum();
    let mut file = ProjectionFile {
        meta: Meta {
            arch: model.arch.clone(),
            model_name: model.name.clone(),
            model_identity: model.identity,
            n_layer: model.n_layer,
            bits_per_value: options.bits_per_value,
            calibration_hash: windows.hash,
            calibration: options.calibration.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            calibration_tokens: windows.n_token() as u64,
            metric: String::new(),
            options: options.recorded(windows.n_token(), n_probe_real),
        },
        layers,
    };

    let mut stage = Stage::new("measure", measure::n_run(file.layers.len()));
    let probe = || Probe::new(&model, &tap, &windows.probe, n_thread);
    let outcome = measure::settle(&mut file, probe, || stage.step())?;
    times.push(stage.finish());
    file.meta.metric = if outcome.divergence.is_some() { "attention+output, measured" } else { "attention+output" }.to_owned();

    keep_allocated(&mut file, &outcome)?;
    let projection = file.at(0.0)?;
    file.write(&options.output)?;
    print!("{}", report::summary(&projection, &outcome, &times));
    println!("wrote {}", options.output.display());
    Ok(())
}

/// Groups must divide heads, and the budget must at least pay for the rows' scales.
fn check_budget(options: &Options, shapes: &BTreeMap<usize, LayerShape>) -> Result<()> {
    let (mut bytes, mut values) = (0, 0);
    for (&il, shape) in shapes {
        let groups = shape.n_head_kv / solve::group_size(options.group_size, il, shape)?;
        bytes += 2 * (groups * SCALE_BYTES).next_multiple_of(ROW_ALIGN);
        values += SIDES.iter().map(|&s| shape.width(s)).sum::<usize>();
    }
    let least = 8.0 * bytes as f64 / values as f64;
    let bits = options.bits_per_value;
    ensure!(bits > least, "{bits} bits per value do not pay for more than the rows' scales, which take {least:.3}");
    Ok(())
}

/// Runs the windows, as often as the statistics' memory makes it necessary, and decomposes every layer.
fn collect_and_solve(
    options: &Options,
    model: &Model,
    tap: &Tap,
    shapes: &BTreeMap<usize, LayerShape>,
    windows: &Windows,
    n_thread: usize,
    times: &mut Vec<(&'static str, f64)>,
) -> Result<Vec<LayerFile>> {
    let limit = (options.stats_memory * (1u64 << 30) as f64) as usize;
    let mut passes: Vec<Vec<usize>> = Vec::new();
    let mut used = usize::MAX;
    let longest = windows.collect.iter().map(Vec::len).max().unwrap_or(0);
    let sample = (longest / weigh::QUERIES_PER_WINDOW).max(1);
    for (&il, shape) in shapes {
        let bytes = LayerStats::bytes(shape, longest);
        if used.saturating_add(bytes) > limit {
            passes.push(Vec::new());
            used = 0;
        }
        used += bytes;
        passes.last_mut().expect("the first layer opens a pass").push(il);
    }

    let mut layers = Vec::new();
    let (mut collect_time, mut solve_time) = (0.0, 0.0);
    for pass in &passes {
        let mut stage = Stage::new("collect", windows.collect.len());
        tap.replace_mode(Mode::Collect(pass.iter().map(|&il| (il, LayerStats::new(&shapes[&il], sample))).collect()));
        // the runtime is asked from this thread alone
        let mut outputs = Vec::new();
        for &il in pass {
            let shape = &shapes[&il];
            let w = model.output_proj(il, shape.n_head * shape.head_dim_v)?;
            let grams = solve::output_grams(w.as_deref(), shape);
            let roots: Result<Vec<Vec<f32>>> = grams.iter().map(solve::gram_root).collect();
            outputs.push((grams, roots.with_context(|| format!("layer {il}, output projection"))?));
        }
        let heads: Vec<(usize, usize)> =
            pass.iter().enumerate().flat_map(|(i, il)| (0..shapes[il].n_head_kv).map(move |g| (i, g))).collect();
        let weights: Vec<Mutex<HeadWeights>> =
            heads.iter().map(|&(i, _)| Mutex::new(HeadWeights::new(&shapes[&pass[i]]))).collect();
        for (i, window) in windows.collect.iter().enumerate() {
            model.eval(window, false, 0, &mut [])?;
            if let Some((il, side)) = tap.find_non_finite() {
                bail!("layer {il}: the model's {} are not finite; is the model file damaged?", solve::name(side));
            }
            let seen = tap.take_windows();
            parallel(heads.len(), n_thread, |j| {
                let (i, g) = heads[j];
                let (shape, rope) = tap.layer(pass[i]);
                stats::lock(&weights[j]).add(g, &shape, &rope, &seen[i], &outputs[i].1);
            });
            stage.set(i + 1);
        }
        collect_time += stage.finish().1;
        let Mode::Collect(stats) = tap.replace_mode(Mode::Pass) else { unreachable!("nobody else changes the mode") };
        for (il, stats) in &stats {
            ensure!(SIDES.iter().all(|&s| stats.moments[s as usize].n_token() > 0), "the runtime never ran layer {il} through the tap");
        }

        let stage = Stage::new("decompose", 1);
        let mut weights = weights.into_iter().map(|w| w.into_inner().expect("no thread panicked"));
        let mut jobs = Vec::new();
        for ((il, stats), (grams, _)) in stats.into_iter().zip(outputs) {
            let weights: Vec<HeadWeights> = weights.by_ref().take(shapes[&il].n_head_kv).collect();
            jobs.push((il, stats, weights, grams));
        }
        let n_ctx = model.n_ctx_train;
        let solved = parallel(jobs.len(), n_thread, |i| {
            let (il, stats, weights, grams) = &jobs[i];
            let group_size = solve::group_size(options.group_size, *il, &shapes[il])?;
            solve::layer_file(*il, &shapes[il], stats, weights, grams, n_ctx, group_size)
        });
        for layer in solved {
            layers.push(layer?);
        }
        solve_time += stage.finish().1;
    }
    times.extend([("collect", collect_time), ("decompose", solve_time)]);
    Ok(layers)
}

/// Drops the channels that the allocation gives no bits. A file lays itself out again from what is left, so that must come
/// to the same allocation.
fn keep_allocated(file: &mut ProjectionFile, outcome: &Outcome) -> Result<()> {
    use crate::layout::{allocate, SEGMENT};
    let mut bits = outcome.allocation.bits.iter();
    for side in file.layers.iter_mut().flat_map(|l| &mut l.sides) {
        let d = side.group_size * side.head_dim;
        for group in &mut side.groups {
            let rank = SEGMENT * bits.next().context("an allocation per group")?.iter().take_while(|&&b| b > 0).count();
            group.variance.truncate(rank);
            group.enc.truncate(rank * d);
            group.dec.truncate(rank * d);
        }
    }
    let again = allocate(&file.spectra(), file.meta.bits_per_value);
    let kept = |bits: &[u8]| bits.iter().copied().take_while(|&b| b > 0).collect::<Vec<u8>>();
    let same = again.bits.iter().zip(&outcome.allocation.bits).all(|(a, b)| kept(a) == kept(b));
    ensure!(same && again.row_bytes == outcome.allocation.row_bytes, "the file would not lay itself out as it was measured");
    Ok(())
}
