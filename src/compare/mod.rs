//! `palu compare`: what a model loses, and gains, with each kind of cache.
//!
//! The runtime runs the model on one cache after the other ([`crate::convert::host`]); this module chooses the tokens
//! ([`windows`]), scores predictions against the f16 cache's ([`score`]), keeps finished parts ([`parts`], [`run`]), and makes a
//! table, JSON and a page of it ([`report`], [`page`], [`chart`]).

pub mod chart;
pub mod page;
pub mod parts;
pub mod report;
pub mod run;
pub mod score;
pub mod windows;

use crate::convert::host::{Cache, Host};
use crate::convert::{check_model, n_thread, normalize_args};
use crate::hash::xxh64;
use crate::projection::{Projection, ProjectionFile};
use anyhow::{bail, Context, Result};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Text of other kinds than an encyclopedia's: code, dialogue, lists, records, other languages. Used where only one text is given.
const MIXED: &str = include_str!("mixed.txt");
/// Cache types of llama.cpp's tools.
const TYPES: [&str; 9] = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"];
/// Depths that speed is measured at, as far as the model's context goes.
const DEPTHS: [usize; 4] = [0, 512, 1024, 1536];

/// Compare KV caches on a model: divergence, far recall, bytes and speed, as a table, JSON and a page
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// The model
    #[arg(value_name = "MODEL.gguf")]
    pub model: PathBuf,
    /// UTF-8 text to run the model on; several are compared one by one. With one text alone, a bundled mixed sample is the second
    #[arg(long = "text", value_name = "FILE", required = true)]
    pub texts: Vec<PathBuf>,
    /// Projection file to compare, at BITS per value or its own budget; may be given several times
    #[arg(long, value_name = "FILE[@BITS]")]
    pub palu: Vec<String>,
    /// llama.cpp's caches to compare with f16
    #[arg(long, value_name = "TYPES", value_delimiter = ',', default_value = "q8_0,q5_0,q4_0", value_parser = parse_type)]
    pub caches: Vec<String>,
    /// Folder for the results; parts that were finished before are taken from it
    #[arg(long, short, value_name = "DIR", default_value = "palu-compare")]
    pub out: PathBuf,
    /// Tokens of a chunk, cut to what the model was trained for
    #[arg(long, short, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(16..))]
    pub ctx: u32,
    /// Chunks of each text, from its beginning; the second half of each counts
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub chunks: u32,
    /// Far-recall windows of each text: a passage, at least 1000 tokens, the passage again
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub recall_windows: u32,
    /// Tokens already in the cache where speed is measured, or "none" [default: 0,512,1024,1536]
    #[arg(long, value_name = "DEPTHS", value_parser = parse_depths)]
    pub speed_depths: Option<Depths>,
    /// Rounds of speed measurements, in which all caches take turns
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub speed_rounds: u32,
    /// Memory for the f16 cache's logits, in GiB; if they take more, caches are loaded several times
    #[arg(long, value_name = "GIB", default_value_t = 1.0, value_parser = parse_memory)]
    pub logits_memory: f64,
    /// Threads [default: all processors]
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Layers of the model to run on the GPU (also -ngl) [default: the runtime's]
    #[arg(long, visible_alias = "ngl", value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    pub n_gpu_layers: i32,
}

/// Depths in ascending order.
#[derive(Clone, Debug, PartialEq)]
pub struct Depths(Vec<usize>);

fn parse_type(s: &str) -> Result<String, String> {
    if TYPES.contains(&s) {
        Ok(s.to_owned())
    } else {
        Err(format!("cache types are {}", TYPES.join(", ")))
    }
}

fn parse_depths(s: &str) -> Result<Depths, String> {
    if s == "none" {
        return Ok(Depths(Vec::new()));
    }
    let depths: Result<Vec<usize>, _> = s.split(',').map(str::parse).collect();
    let mut depths = depths.map_err(|_| "depths are numbers of tokens with commas between them, or none".to_owned())?;
    depths.sort_unstable();
    depths.dedup();
    Ok(Depths(depths))
}

fn parse_memory(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(m) if m > 0.0 && m.is_finite() => Ok(m),
        _ => Err("memory is a positive number of GiB".to_owned()),
    }
}

/// A projection file and a budget, as the command line names them.
fn parse_palu(s: &str) -> Result<(PathBuf, f64)> {
    let whole = PathBuf::from(s);
    if whole.exists() {
        return Ok((whole, 0.0));
    }
    match s.rsplit_once('@') {
        Some((file, bits)) if Path::new(file).exists() => match bits.parse::<f64>() {
            Ok(bits) if bits > 0.0 && bits.is_finite() => Ok((file.into(), bits)),
            _ => bail!("--palu {s}: bits per value are a number above 0, and '{bits}' is not"),
        },
        Some((file, bits)) if bits.parse::<f64>().is_ok() => bail!("cannot open projection file {file}: no such file"),
        _ => bail!("cannot open projection file {s}: no such file"),
    }
}

/// XXH64 of a whole file.
fn hash_file(path: &Path) -> Result<u64> {
    let file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    // SAFETY: the map is only read. Another process that shortens the file meanwhile can stop this one, as with every mapped file.
    let map = unsafe { memmap2::Mmap::map(&file) }.with_context(|| format!("cannot read {}", path.display()))?;
    Ok(xxh64(&map, 0))
}

/// The files of a model: `NAME-00001-of-00003.gguf` stands for all three.
fn model_files(path: &Path) -> Vec<PathBuf> {
    let split = || {
        let name = path.file_name()?.to_str()?;
        let stem = name.strip_suffix(".gguf")?;
        let (rest, n) = stem.rsplit_once("-of-")?;
        let (prefix, _) = rest.rsplit_once("-00001")?;
        let n: usize = n.parse().ok()?;
        Some((1..=n).map(|i| path.with_file_name(format!("{prefix}-{i:05}-of-{n:05}.gguf"))).collect())
    };
    split().unwrap_or_else(|| vec![path.to_owned()])
}

impl Options {
    fn n_thread(&self) -> usize {
        n_thread(self.threads)
    }

    /// What can be told to be wrong before the model is loaded, in one sentence.
    pub fn check(&self) -> Result<()> {
        check_model(&self.model)?;
        for text in &self.texts {
            windows::read_text(text)?;
        }
        for palu in &self.palu {
            let (path, bits) = parse_palu(palu)?;
            ProjectionFile::read(&path)?.at(bits).with_context(|| format!("--palu {palu}"))?;
        }
        let out = self.out.display();
        std::fs::create_dir_all(&self.out).with_context(|| format!("cannot make the folder {out}"))?;
        // writing is the only reliable test: access() knows nothing of read-only mounts' quotas or of root
        let trial = self.out.join(format!(".palu-{}.tmp", std::process::id()));
        std::fs::File::create(&trial)
            .and_then(|_| std::fs::remove_file(&trial))
            .with_context(|| format!("cannot write into {out}"))
    }
}

/// A text that the model is run on.
pub struct Text {
    /// file name, or what the bundled sample is called
    pub name: String,
    /// as the command line has it; `None`: the bundled sample
    pub path: Option<PathBuf>,
    pub hash: u64,
    pub text: String,
}

/// A cache that is compared; the first is f16.
pub struct Contender {
    pub label: String,
    pub cache: Cache,
    /// what its results depend on
    pub key: String,
    pub projection: Option<Projection>,
}

fn texts(options: &Options) -> Result<Vec<Text>> {
    let mut texts = Vec::new();
    for path in &options.texts {
        let text = windows::read_text(path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        texts.push(Text { name, path: Some(path.clone()), hash: xxh64(text.as_bytes(), 0), text });
    }
    if let [_] = texts[..] {
        let name = "the bundled mixed sample".to_owned();
        texts.push(Text { name, path: None, hash: xxh64(MIXED.as_bytes(), 0), text: MIXED.to_owned() });
    }
    Ok(texts)
}

fn contenders(options: &Options) -> Result<Vec<Contender>> {
    let mut all: Vec<Contender> = Vec::new();
    let stock = |kind: &str| Contender {
        label: kind.to_owned(),
        cache: Cache::Stock(kind.to_owned()),
        key: kind.to_owned(),
        projection: None,
    };
    all.push(stock("f16"));
    for kind in &options.caches {
        if all.iter().all(|c| c.key != *kind) {
            all.push(stock(kind));
        }
    }
    let files = options.palu.iter().map(|s| parse_palu(s)).collect::<Result<Vec<_>>>()?;
    let mut names: Vec<PathBuf> = Vec::new();
    for (path, _) in &files {
        if !names.contains(path) {
            names.push(path.clone());
        }
    }
    for (path, bits) in files {
        let file = ProjectionFile::read(&path)?;
        let projection = file.at(bits)?;
        let key = format!("palu {:016x}", projection.identity);
        if all.iter().any(|c| c.key == key) {
            continue;
        }
        let budget = if bits > 0.0 { bits } else { projection.meta.bits_per_value };
        // several files are told apart by letters, because their names are often long
        let label = match names.iter().position(|n| *n == path) {
            Some(i) if names.len() > 1 => format!("palu {} {budget}", (b'A' + i as u8 % 26) as char),
            _ => format!("palu {budget}"),
        };
        all.push(Contender { label, cache: Cache::Palu { file: path, bits }, key, projection: Some(projection) });
    }
    Ok(all)
}

#[derive(clap::Parser)]
#[command(name = "palu compare", about = "Compare KV caches on a model")]
struct Command {
    #[command(flatten)]
    options: Options,
}

/// The whole of `palu compare` (`palu_command()`); returns the exit status.
///
/// # Safety
/// The host's callbacks must do what `palu.h` says.
pub unsafe fn run(args: &[String], host: &Host) -> i32 {
    use clap::Parser;
    // a program's own name may stand before the command
    let skip = usize::from(args.len() > 1 && args[0] != "compare" && args[1] == "compare");
    let args = &args[skip.min(args.len())..];
    let command = match Command::try_parse_from(normalize_args(args.iter().map(OsString::from))) {
        Ok(command) => command,
        Err(e) => {
            let _ = e.print();
            return e.exit_code();
        }
    };
    match compare(&command.options, args, host) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("palu compare: {e:#}");
            1
        }
    }
}

unsafe fn compare(options: &Options, args: &[String], host: &Host) -> Result<()> {
    options.check()?;
    let mut model_hash = 0;
    for file in model_files(&options.model) {
        model_hash = xxh64(&hash_file(&file)?.to_le_bytes(), model_hash);
    }
    // another build of the runtime or of this library may compute something else
    let tool_hash = hash_file(&std::env::current_exe().context("cannot find this program's own file")?)?;
    let base = format!(
        "model {model_hash:016x} tool {tool_hash:016x} path {} threads {} ngl {}",
        crate::attention::cpu_path(),
        options.n_thread(),
        options.n_gpu_layers
    );
    let parts = parts::Parts::open(&options.out, &base)?;
    let (texts, contenders) = (texts(options)?, contenders(options)?);
    let measured = run::measure(options, host, &parts, &texts, &contenders)?;
    let report = report::Report::new(options, args, texts, contenders, measured);
    parts::write(&options.out.join("results.json"), format!("{:#}\n", report.to_json()).as_bytes())?;
    let page = options.out.join("report.html");
    parts::write(&page, page::html(&report).as_bytes())?;
    print!("{}", report.to_text());
    println!("wrote {} and results.json beside it", page.display());
    Ok(())
}
