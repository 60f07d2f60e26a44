//! `palu convert`: how a projection file is made.
//!
//! The runtime runs the model ([`host`]); this module chooses the tokens ([`windows`]), looks at keys, values and queries
//! through a tap ([`stats`]), works out what errors cost from attention itself ([`weigh`]), adds it all up ([`collect`]), finds the
//! bases ([`solve`]), measures how layers compare ([`measure`]) and writes the file. [`published`] does it the paper's way instead.

pub mod checkpoint;
pub mod collect;
pub mod host;
pub mod measure;
pub mod published;
pub mod report;
pub mod solve;
pub mod stats;
pub mod weigh;
pub mod windows;

pub use host::{Host, HostModel, HostParams};
pub use stats::{Tap, TapParams};

use crate::hash::xxh64;
use crate::layout::{MAX_BITS, ROW_ALIGN, SCALE_BYTES, SEGMENT};
use crate::recent::N_RECENT;
use crate::projection::{LayerFile, Meta, ProjectionFile, SIDES};
use anyhow::{ensure, Context, Result};
use checkpoint::{with_suffix, Checkpoint, Memo};
use collect::Pass;
use host::Model;
use measure::{parallel, Coarse, Effort, Outcome, Probe};
use published::{Decomposition, Published, RankSearch};
use report::Stage;
use solve::{GroupSize, Metric, Recipe};
use stats::{LayerShape, LayerStats};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Instant;
use windows::Windows;

/// Tokens of a window, where the model was trained for as many.
const WINDOW: usize = 2048;
/// Tokens of a window that the model writes itself, one at a time.
const SELF_WINDOW: usize = 512;
const TOKENS: usize = 131_072;
const SELF_TOKENS: usize = 16_384;
/// See [`Recipe::importance`].
const IMPORTANCE: f64 = 0.0;
/// See [`Recipe::concentration`]. With 1, text of another kind than the calibration's costs up to a third more; with 0, text of its
/// own kind up to 9% more.
const CONCENTRATION: f64 = 0.5;
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
    #[arg(required_unless_present = "preset", conflicts_with = "preset")]
    pub bits_per_value: Option<f64>,
    /// KV heads that share a latent: all of a layer (best quality), 1 (least work), or auto: as many as make 1024 channels
    #[arg(long, value_name = "G|all|auto", default_value = "auto")]
    pub group_size: GroupSize,
    /// How much is measured to find what errors cost
    #[arg(long, value_enum, value_name = "LEVEL", default_value = "default", conflicts_with = "preset")]
    pub refine: Refine,
    /// Tokens to collect statistics from [default: 131072, with "self" 16384]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub tokens: Option<u32>,
    /// Tokens that divergence is measured on, other ones
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    pub probe_tokens: u32,
    /// Statistics: used if this file has those of the same model, text and tokens, else collected and kept in it
    #[arg(long, value_name = "FILE")]
    pub statistics: Option<PathBuf>,
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

    /// Another method than this project's own: palu is that of the paper (arXiv 2407.21118)
    #[arg(long, value_enum, help_heading = "Published methods", requires_all = ["keep", "bits"])]
    pub preset: Option<Preset>,
    /// Part of all channels that is kept
    #[arg(long, value_name = "R", value_parser = parse_share, help_heading = "Published methods", requires = "preset")]
    pub keep: Option<f64>,
    /// Bits of each code
    #[arg(long, value_name = "N", value_parser = published::parse_bits, help_heading = "Published methods", requires = "preset")]
    pub bits: Option<u8>,
    /// What is decomposed: the projection, or its effect on the text
    #[arg(long, value_enum, default_value = "whitened", help_heading = "Published methods")]
    pub decomposition: Decomposition,
    /// How ranks are given out
    #[arg(long, value_enum, default_value = "fisher", help_heading = "Published methods")]
    pub rank_search: RankSearch,

    /// What an error costs within a side
    #[arg(long, value_enum, default_value = "attention", help_heading = "Advanced, for comparison", hide_short_help = true)]
    pub metric: Metric,
    /// Part of the covariance in which tokens count as much as attention reads them
    #[arg(long, value_name = "PART", default_value_t = IMPORTANCE, value_parser = parse_part)]
    #[arg(help_heading = "Advanced, for comparison", hide_short_help = true)]
    pub importance: f64,
    /// How much values count for being read by heads that attend narrowly: 0 not at all, 1 as on the calibration text
    #[arg(long, value_name = "PART", default_value_t = CONCENTRATION, value_parser = parse_part)]
    #[arg(help_heading = "Advanced, for comparison", hide_short_help = true)]
    pub concentration: f64,
    /// Last tokens of a sequence that are read in f16 (as --palu-recent): errors of their rows do not count
    #[arg(long, value_name = "N", default_value_t = N_RECENT, help_heading = "Advanced, for comparison", hide_short_help = true)]
    pub recent: usize,
    /// Subtract no means
    #[arg(long, help_heading = "Advanced, for comparison", hide_short_help = true)]
    pub no_mean: bool,
    /// Bit widths of codes, as 0,2,4,8; the file then serves its own budget alone
    #[arg(long, value_name = "LIST", value_parser = parse_alphabet, help_heading = "Advanced, for comparison", hide_short_help = true)]
    pub alphabet: Option<Alphabet>,
    /// Channels that share a bit width, a multiple of 8; the file then serves its own budget alone
    #[arg(long, value_name = "N", value_parser = parse_segment, help_heading = "Advanced, for comparison", hide_short_help = true)]
    pub segment: Option<usize>,
    /// Rotate every so many neighbouring channels by a Hadamard matrix, a multiple of 8
    #[arg(long, value_name = "N", value_parser = parse_segment, help_heading = "Advanced, for comparison", hide_short_help = true)]
    pub hadamard: Option<usize>,
    /// Measure as said instead of by a level: rounds,context,parts,descents,budgets
    #[arg(long, value_name = "N,N,N,N,N", value_parser = parse_effort, help_heading = "Advanced, for comparison", hide_short_help = true)]
    pub effort: Option<Effort>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Preset {
    Palu,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Refine {
    /// one round
    Quick,
    Default,
    /// several times the default's time
    Thorough,
}

impl Refine {
    fn effort(self) -> Effort {
        match self {
            Self::Quick => Effort { rounds: 1, context: false, parts: 0, descents: 0, budgets: 0 },
            Self::Default => Effort { rounds: 2, context: false, parts: 0, descents: 0, budgets: 0 },
            Self::Thorough => Effort { rounds: 2, context: true, parts: 4, descents: 2, budgets: 2 },
        }
    }
}

fn parse_effort(s: &str) -> Result<Effort, String> {
    let numbers: Vec<usize> = s.split(',').filter_map(|n| n.parse().ok()).collect();
    match numbers[..] {
        [rounds, context, parts, descents, budgets] if numbers.iter().all(|&n| n < 100) => {
            Ok(Effort { rounds, context: context > 0, parts, descents, budgets })
        }
        _ => Err("five small numbers".to_owned()),
    }
}

/// Bit widths, rising from 0.
#[derive(Clone, Debug)]
pub struct Alphabet(Vec<u8>);

fn parse_alphabet(s: &str) -> Result<Alphabet, String> {
    let bits: Option<Vec<u8>> = s.split(',').map(|b| b.parse().ok().filter(|b| *b <= MAX_BITS as u8)).collect();
    match bits {
        Some(bits) if bits.len() > 1 && bits[0] == 0 && bits.windows(2).all(|w| w[0] < w[1]) => Ok(Alphabet(bits)),
        _ => Err(format!("bit widths rise from 0 to at most {MAX_BITS}")),
    }
}

fn parse_segment(s: &str) -> Result<usize, String> {
    s.parse().ok().filter(|n: &usize| *n > 0 && *n <= 1024 && n.is_multiple_of(SEGMENT)).ok_or_else(|| format!("it is a multiple of {SEGMENT}, at most 1024"))
}

fn parse_share(s: &str) -> Result<f64, String> {
    s.parse().ok().filter(|r| *r > 0.0 && *r <= 1.0).ok_or_else(|| "the part kept is above 0 and at most 1".to_owned())
}

fn parse_part(s: &str) -> Result<f64, String> {
    s.parse().ok().filter(|r| (0.0..=1.0).contains(r)).ok_or_else(|| "a part is between 0 and 1".to_owned())
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

/// Threads that were asked for, else all processors.
pub(crate) fn n_thread(asked: Option<u32>) -> usize {
    asked.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), |n| n as usize)
}

/// What can be told of a model file before the runtime loads it.
pub(crate) fn check_model(path: &Path) -> Result<()> {
    use std::io::Read;
    let model = path.display();
    let mut magic = [0u8; 4];
    let file = std::fs::File::open(path).with_context(|| format!("cannot open model {model}"))?;
    ensure!(file.metadata().is_ok_and(|m| m.is_file()), "model {model} is not a regular file");
    ensure!((&file).read_exact(&mut magic).is_ok() && &magic == b"GGUF", "model {model} is not a GGUF file");
    Ok(())
}

impl Options {
    fn is_self(&self) -> bool {
        self.calibration.as_os_str() == "self"
    }

    fn n_thread(&self) -> usize {
        n_thread(self.threads)
    }

    /// What can be told to be wrong before the model is loaded, in one sentence.
    pub fn check(&self) -> Result<()> {
        check_model(&self.model)?;
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
        let mut s = match (self.bits_per_value, self.published()) {
            (_, Some(p)) => format!("--preset palu --keep {} --bits {} --decomposition {:?} --rank-search {:?}", p.keep, p.bits, p.decomposition, p.search).to_lowercase(),
            (bits, None) => format!("--bits-per-value {} --refine {:?}", bits.unwrap_or_default(), self.refine).to_lowercase(),
        };
        s += &format!(" --tokens {n_collect} --probe-tokens {n_probe} --group-size {}", self.group_size);
        if self.metric != Metric::Attention || self.importance != IMPORTANCE || self.no_mean || self.effort.is_some() {
            let e = self.effort();
            s += &format!(" --metric {:?} --importance {} --effort {},{},{},{},{}", self.metric, self.importance, e.rounds, u8::from(e.context), e.parts, e.descents, e.budgets).to_lowercase();
        }
        if self.concentration != CONCENTRATION {
            s += &format!(" --concentration {}", self.concentration);
        }
        if self.recent != N_RECENT {
            s += &format!(" --recent {}", self.recent);
        }
        if self.no_mean {
            s += " --no-mean";
        }
        if let Some(Alphabet(bits)) = &self.alphabet {
            let list: Vec<String> = bits.iter().map(u8::to_string).collect();
            s += &format!(" --alphabet {}", list.join(","));
        }
        for (name, n) in [("segment", self.segment), ("hadamard", self.hadamard)] {
            s += &n.map_or(String::new(), |n| format!(" --{name} {n}"));
        }
        if self.is_self() {
            s += &format!(" --seed {}", self.seed);
        }
        s
    }

    fn effort(&self) -> Effort {
        self.effort.unwrap_or_else(|| self.refine.effort())
    }

    fn coarse(&self) -> Option<Coarse> {
        let any = self.alphabet.is_some() || self.segment.is_some();
        let alphabet = self.alphabet.as_ref().map_or_else(|| (0..=MAX_BITS as u8).collect(), |a| a.0.clone());
        any.then(|| Coarse { alphabet, segment: self.segment.unwrap_or(SEGMENT) })
    }

    fn recipe(&self) -> Recipe {
        Recipe { metric: self.metric, importance: self.importance, concentration: self.concentration, mean: !self.no_mean }
    }

    fn published(&self) -> Option<Published> {
        self.preset?;
        Some(Published { keep: self.keep?, bits: self.bits?, decomposition: self.decomposition, search: self.rank_search, group_size: self.group_size })
    }

    fn metric_name(&self, measured: bool) -> String {
        let name = match self.metric {
            Metric::None => "none",
            Metric::Query => "query+output",
            Metric::Attention => "attention+output",
        };
        format!("{name}{}", if measured { ", measured" } else { "" })
    }

    /// Heads per group in layer `il`.
    fn group_size(&self, il: usize, shape: &LayerShape) -> Result<usize> {
        match self.preset {
            Some(Preset::Palu) => published::group_size(self.group_size, il, shape),
            None => self.group_size.of(il, shape),
        }
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

    let stem = options.statistics.clone().unwrap_or_else(|| with_suffix(&options.output, ".stats"));
    let mut files = Vec::new();
    let memo = Memo::open(&stem);
    let mut probe = Probe::new(&model, &tap, &windows.probe, n_thread, memo, model.identity)?;
    let n_probe_real = windows.probe.iter().map(Vec::len).sum();
    let meta = Meta {
        arch: model.arch.clone(),
        model_name: model.name.clone(),
        model_identity: model.identity,
        n_layer: model.n_layer,
        bits_per_value: options.bits_per_value.unwrap_or_default(),
        budgets: vec![options.bits_per_value.unwrap_or_default()],
        calibration_hash: windows.hash,
        calibration: options.calibration.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        calibration_tokens: windows.n_token() as u64,
        metric: String::new(),
        options: options.recorded(windows.n_token(), n_probe_real),
    };

    let mut layers = Vec::new();
    let (mut collect_time, mut solve_time, mut peak) = (0.0, 0.0, Vec::new());
    for (i, pass) in passes(options, &shapes, &windows)?.into_iter().enumerate() {
        let start = Instant::now();
        let path = if i == 0 { stem.clone() } else { with_suffix(&stem, &format!(".{i}")) };
        let identity = statistics_identity(&model, &shapes, &windows, &pass, options);
        let pass = Pass {
            model: &model,
            tap: &tap,
            shapes: &shapes,
            layers: pass,
            windows: &windows.collect,
            attended: options.importance > 0.0,
            sample: sample(&windows),
            n_recent: options.recent,
            n_thread,
            checkpoint: Checkpoint::new(path.clone(), identity),
        };
        let collected = pass.run()?;
        files.push(path);
        collect_time += start.elapsed().as_secs_f64();
        if let Some(method) = options.published() {
            // one pass, so these are all layers
            let scores = if method.search == RankSearch::Uniform {
                vec![[1.0; 2]; collected.len()]
            } else {
                let mut stage = Stage::new("fisher", 2 * collected.len());
                let scores = published::fisher(&mut probe, &collected, || stage.step())?;
                times.push(stage.finish());
                scores
            };
            let stage = Stage::new("decompose", 1);
            let sides = published::solve(&method, &tap, &shapes, &collected, &scores)?;
            layers.extend(collected.keys().zip(sides).map(|(&il, sides)| LayerFile { il, sides }));
            solve_time += stage.finish().1;
            continue;
        }
        let stage = Stage::new("decompose", 1);
        let jobs: Vec<_> = collected.iter().flat_map(|(&il, layer)| SIDES.map(|side| (il, layer, side))).collect();
        let solved = parallel(jobs.len(), n_thread, |i| {
            let (il, layer, side) = jobs[i];
            let group_size = options.group_size(il, &shapes[&il])?;
            solve::solve(il, &shapes[&il], side, layer, model.n_ctx_train, group_size, &options.recipe())
        });
        let mut solved = solved.into_iter();
        for &il in collected.keys() {
            let (Some(key), Some(value)) = (solved.next(), solved.next()) else { unreachable!("two sides per layer") };
            layers.push(LayerFile { il, sides: [key?, value?] });
        }
        solve_time += stage.finish().1;
        peak.push(report::peak_memory());
    }
    times.extend([("collect", collect_time), ("decompose", solve_time)]);

    let mut file = ProjectionFile { meta, layers };
    let outcome = if options.preset.is_some() {
        let real = file.allocation(0.0).bits_per_value(&file.spectra(0.0));
        (file.meta.bits_per_value, file.meta.budgets) = (real, vec![real]);
        file.meta.metric = "palu as published".to_owned();
        Outcome { divergence: vec![probe.divergence(measure::whole(&file))?] }
    } else {
        let effort = options.effort();
        let n_group = file.layers.iter().flat_map(|l| &l.sides).map(|s| s.groups.len()).sum();
        let mut stage = Stage::new("measure", effort.n_run(file.layers.len(), n_group));
        if let Some(n) = options.hadamard {
            file.layers.iter_mut().flat_map(|l| &mut l.sides).flat_map(|s| &mut s.groups).for_each(|g| measure::rotate(g, n));
        }
        let outcome = measure::settle(&mut file, &effort, options.coarse().as_ref(), &mut probe, || stage.step())?;
        times.push(stage.finish());
        file.meta.metric = options.metric_name(!outcome.divergence.is_empty());
        if file.is_fixed() {
            let real = file.allocation(0.0).bits_per_value(&file.spectra(0.0));
            (file.meta.bits_per_value, file.meta.budgets) = (real, vec![real]);
            file.layers.iter_mut().flat_map(|l| &mut l.sides).for_each(|s| s.weight.truncate(1));
        }
        keep_allocated(&mut file)?;
        outcome
    };
    let projection = file.at(0.0)?;
    file.write(&options.output)?;
    print!("{}", report::summary(&projection, &file.meta.budgets, &outcome, &times, &probe, windows.n_token()));
    println!("wrote {}", options.output.display());
    if options.statistics.is_none() {
        files.iter().for_each(|f| _ = std::fs::remove_file(f));
        probe.forget();
    }
    Ok(())
}

/// Every how many positions of a window a query is looked at.
fn sample(windows: &Windows) -> usize {
    (windows.longest() / weigh::QUERIES_PER_WINDOW).max(1)
}

/// Which layers' statistics are collected together, within the memory for them; each with the heads whose channels are looked at
/// together.
fn passes(options: &Options, shapes: &BTreeMap<usize, LayerShape>, windows: &Windows) -> Result<Vec<Vec<(usize, usize)>>> {
    let limit = (options.stats_memory * (1u64 << 30) as f64) as usize;
    let mut passes: Vec<Vec<(usize, usize)>> = Vec::new();
    let mut used = usize::MAX;
    for (&il, shape) in shapes {
        // what serves wider groups serves those within them, so that one file of statistics does for all
        let asked = options.group_size(il, shape)?;
        let auto = GroupSize::Auto.of(il, shape)?;
        let group_size = if auto.is_multiple_of(asked) { auto } else { asked };
        let bytes = LayerStats::bytes(shape, group_size, options.importance > 0.0, windows.longest());
        // ranks of the published method are decided for all layers at once
        if passes.is_empty() || options.preset.is_none() && used.saturating_add(bytes) > limit {
            passes.push(Vec::new());
            used = 0;
        }
        used += bytes;
        passes.last_mut().expect("the first layer opens a pass").push((il, group_size));
    }
    Ok(passes)
}

/// A hash of everything that decides what one pass collects.
fn statistics_identity(model: &Model, shapes: &BTreeMap<usize, LayerShape>, windows: &Windows, pass: &[(usize, usize)], options: &Options) -> u64 {
    let mut h = xxh64(&[u8::from(options.importance > 0.0)], model.identity);
    if options.recent > 0 {
        h = xxh64(&(options.recent as u64).to_le_bytes(), h);
    }
    for (il, group_size) in pass {
        h = xxh64(format!("{il} {group_size} {} {:?}", sample(windows), shapes[il]).as_bytes(), h);
    }
    for window in &windows.collect {
        h = xxh64(&(window.len() as u64).to_le_bytes(), h);
        h = window.iter().fold(h, |h, t| xxh64(&t.to_le_bytes(), h));
    }
    h
}

/// Groups must divide heads, and the budget must at least pay for the rows' scales.
fn check_budget(options: &Options, shapes: &BTreeMap<usize, LayerShape>) -> Result<()> {
    let (mut bytes, mut values) = (0, 0);
    for (&il, shape) in shapes {
        let groups = shape.n_head_kv / options.group_size(il, shape)?;
        bytes += 2 * (groups * SCALE_BYTES).next_multiple_of(ROW_ALIGN);
        values += SIDES.iter().map(|&s| shape.width(s)).sum::<usize>();
    }
    let least = 8.0 * bytes as f64 / values as f64;
    let Some(bits) = options.bits_per_value else { return Ok(()) };
    ensure!(bits > least, "{bits} bits per value do not pay for more than the rows' scales, which take {least:.3}");
    Ok(())
}

/// Drops the channels that no budget gives bits. A file lays itself out again from what is left, so that must come to the same
/// allocation.
fn keep_allocated(file: &mut ProjectionFile) -> Result<()> {
    let budgets = file.meta.budgets.clone();
    let before: Vec<_> = budgets.iter().map(|&b| file.allocation(b)).collect();
    let kept = |bits: &[u8]| bits.iter().take_while(|&&b| b > 0).count();
    let mut i = 0;
    for side in file.layers.iter_mut().flat_map(|l| &mut l.sides) {
        let d = side.group_size * side.head_dim;
        for group in &mut side.groups {
            let rank = SEGMENT * before.iter().map(|a| kept(&a.bits[i])).max().unwrap_or(0);
            group.variance.truncate(rank);
            group.enc.truncate(rank * d);
            group.dec.truncate(rank * d);
            group.bits.truncate(rank / SEGMENT);
            i += 1;
        }
    }
    for (&budget, before) in budgets.iter().zip(&before) {
        let after = file.allocation(budget);
        let same = after.bits.iter().zip(&before.bits).all(|(a, b)| a[..kept(a)] == b[..kept(b)]);
        ensure!(same && after.row_bytes == before.row_bytes, "the file would not lay itself out as it was measured");
    }
    Ok(())
}
