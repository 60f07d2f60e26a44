//! The command line: `palu convert`, `palu compare` and `palu inspect`.

use anyhow::{bail, Context, Result};
use clap::{Parser, Subcommand};
use palu::compare;
use palu::convert::{normalize_args, report, Options};
use palu::projection::{Projection, ProjectionFile, SIDES};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Projection files: the small files beside a model that its low-rank, quantized KV cache needs
#[derive(Parser)]
#[command(name = "palu", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Convert(Box<Options>),
    Compare(compare::Options),
    /// Show what a projection file holds
    Inspect {
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Budget in bits per value, at most the file's own [default: the file's own]
        #[arg(long, value_name = "B", default_value_t = 0.0)]
        bits: f64,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let args = normalize_args(std::env::args_os());
    let result = match Cli::parse_from(&args).command {
        Command::Convert(options) => options.check().and_then(|()| run_helper(&args[1..])),
        Command::Compare(options) => options.check().and_then(|()| run_helper(&args[1..])),
        Command::Inspect { file, bits, json } => inspect(&file, bits, json),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("palu: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// The program that converts and compares: the runtime with this library in it.
const HELPER: &str = "llama-palu-convert";

fn find_helper() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.canonicalize().ok()?.parent()?.to_owned()));
    let mut directories: Vec<PathBuf> = std::env::var_os("PALU_LLAMA_BIN").map(PathBuf::from).into_iter().collect();
    if let Some(beside) = beside {
        // installed: bin/palu and llama.cpp/bin; built: target/release/palu and build/llama.cpp/bin
        directories.extend(["../llama.cpp/bin", "../../build/llama.cpp/bin"].map(|d| beside.join(d)));
    }
    directories.extend(std::env::var_os("PATH").iter().flat_map(std::env::split_paths));
    directories.into_iter().map(|d| d.join(HELPER)).find(|p| p.is_file())
}

/// Becomes the helper; `args` from "convert" on.
fn run_helper(args: &[OsString]) -> Result<()> {
    let Some(helper) = find_helper() else {
        bail!("cannot find {HELPER}; `make llama` builds it, and PALU_LLAMA_BIN names its directory");
    };
    let mut command = std::process::Command::new(&helper);
    command.args(args);
    let error = std::os::unix::process::CommandExt::exec(&mut command);
    Err(error).with_context(|| format!("cannot run {}", helper.display()))
}

fn inspect(path: &Path, bits: f64, json: bool) -> Result<()> {
    let file = ProjectionFile::read(path)?;
    let projection = file.at(bits)?;
    let text = if json { serde_json::to_string_pretty(&as_json(&file, &projection))? } else { as_text(&file, &projection) };
    // a reader that stops early (`| head`) is no error
    match std::io::Write::write_all(&mut std::io::stdout(), format!("{}\n", text.trim_end()).as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e).context("cannot write to standard output"),
        _ => Ok(()),
    }
}

fn percent_of_f16(projection: &Projection) -> f64 {
    100.0 * projection.bytes_per_token() as f64 / projection.f16_bytes_per_token() as f64
}

fn as_json(file: &ProjectionFile, projection: &Projection) -> serde_json::Value {
    use serde_json::json;
    let meta = &projection.meta;
    let layers: Vec<_> = projection
        .layers
        .iter()
        .zip(&file.layers)
        .map(|(layer, stored)| {
            let [key, value] = SIDES.map(|side| {
                let (s, stored) = (layer.side(side), &stored.sides[side as usize]);
                json!({
                    "n_head_kv": s.n_head_kv,
                    "head_dim": s.head_dim,
                    "group_size": stored.group_size,
                    "rank": s.rank(),
                    "mean_code_bits": s.code_bits(),
                    "row_bytes": s.row_bytes,
                    "weight": stored.weight,
                })
            });
            json!({ "layer": layer.il, "key": key, "value": value })
        })
        .collect();
    json!({
        "model": {
            "architecture": meta.arch,
            "name": meta.model_name,
            "identity": format!("{:016x}", meta.model_identity),
            "n_layer": meta.n_layer,
        },
        "identity": format!("{:016x}", projection.identity),
        "calibration": {
            "source": meta.calibration,
            "hash": format!("{:016x}", meta.calibration_hash),
            "tokens": meta.calibration_tokens,
        },
        "metric": meta.metric,
        "options": meta.options,
        "max_bits_per_value": meta.bits_per_value,
        "bits_per_value": projection.bits_per_value,
        "bytes_per_token": projection.bytes_per_token(),
        "f16_bytes_per_token": projection.f16_bytes_per_token(),
        "percent_of_f16": percent_of_f16(projection),
        "layers": layers,
    })
}

fn as_text(file: &ProjectionFile, projection: &Projection) -> String {
    let meta = &projection.meta;
    let name = if meta.model_name.is_empty() { "a model without a name" } else { &meta.model_name };
    format!(
        "model: {name} ({}, {} layers, {} of them cached here), identity {:016x}\n\
         made from {} ({} tokens, hash {:016x}), metric: {}\n\
         options: {}\n\
         for up to {} bits per value; identity at this budget {:016x}\n\n{}",
        meta.arch,
        meta.n_layer,
        file.layers.len(),
        meta.model_identity,
        meta.calibration,
        meta.calibration_tokens,
        meta.calibration_hash,
        meta.metric,
        meta.options,
        meta.bits_per_value,
        projection.identity,
        report::table(projection)
    )
}
