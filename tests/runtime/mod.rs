//! What the runtime tests share: the built programs, the bundled model, and runs of both.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

pub const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/wiki-mha-17m-q8_0.gguf");
pub const CALIBRATION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/calibration.wiki.txt");
pub const TEST_TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/wiki.test.raw");

/// The patched llama.cpp's programs.
fn llama_bin() -> PathBuf {
    let build = std::env::var_os("PALU_BUILD").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("build"), PathBuf::from);
    build.join("llama.cpp/bin")
}

/// A program of the patched llama.cpp. The runtime tests need `make llama` first, and say so rather than pass without it.
pub fn llama(program: &str) -> Command {
    let path = llama_bin().join(program);
    assert!(path.exists(), "{} is missing: run `make llama` first", path.display());
    let mut command = Command::new(path);
    command.stdin(Stdio::null());
    command
}

pub fn palu() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_palu"));
    command.env("PALU_LLAMA_BIN", llama_bin()).stdin(Stdio::null());
    command
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
pub fn succeed(command: &mut Command) -> Output {
    let output = command.output().expect("the program starts");
    assert!(output.status.success(), "{command:?}: {}\n{}{}", output.status, text(&output.stdout), text(&output.stderr));
    output
}

/// The command must fail by itself (no signal), and name the cause.
#[track_caller]
pub fn refuse(command: &mut Command, cause: &str) -> String {
    let mut output = command.output().expect("the program starts");
    // llama.cpp's log is written by a thread of its own, and now and then its last lines are lost when the program ends
    for _ in 0..4 {
        if text(&output.stderr).contains(cause) {
            break;
        }
        output = command.output().expect("the program starts");
    }
    let stderr = text(&output.stderr);
    let code = output.status.code();
    assert!(code.is_some_and(|c| c != 0), "{command:?}: {}, expected a refusal\n{stderr}", output.status);
    assert!(stderr.contains(cause), "{command:?} does not name the cause '{cause}':\n{stderr}");
    assert!(!stderr.contains("panicked at"), "{stderr}");
    stderr
}

/// A folder that outlives the tests, for results that are slow to make.
pub fn cache_dir() -> &'static Path {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(dir).unwrap();
    dir
}

/// Makes a file once for all test programs and threads; its name must stand for everything that it depends on.
pub fn made_once(name: &str, make: impl FnOnce(&Path)) -> PathBuf {
    let path = cache_dir().join(name);
    let lock = std::fs::File::create(path.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    if !path.exists() {
        let partial = path.with_extension("partial");
        make(&partial);
        std::fs::rename(&partial, &path).unwrap();
    }
    path
}

/// Changes whenever the converter, the codec or the runtime may.
fn build_key() -> &'static str {
    static KEY: OnceLock<String> = OnceLock::new();
    KEY.get_or_init(|| {
        let helper = llama("llama-palu-convert");
        let bytes = std::fs::read(helper.get_program()).unwrap();
        format!("{:016x}", ::palu::hash::xxh64(&bytes, 0))
    })
}

/// The bundled model's projection at a budget, from little text: for tests of everything but quality.
pub fn projection(bits: &str) -> PathBuf {
    converted(bits, &["--tokens", "16384", "--probe-tokens", "2048"])
}

/// The bundled model's projection at a budget.
pub fn converted(bits: &str, options: &[&str]) -> PathBuf {
    let name = format!("wiki-mha-17m-{bits}{}-{}.gguf", options.join(""), build_key());
    made_once(&name, |path| {
        succeed(palu().args(["convert", MODEL, "--calibration", CALIBRATION, "--bits-per-value", bits]).args(options).arg("--output").arg(path));
    })
}

/// Runs a script of `palu-steps` and returns the logits that it wrote.
#[track_caller]
pub fn steps(model: &Path, args: &[&str]) -> Vec<f32> {
    let out = tempfile::NamedTempFile::new().unwrap();
    succeed(llama("palu-steps").arg(model).arg(out.path()).args(args));
    logits(out.path())
}

/// The logits in a file that `palu-steps` wrote.
#[track_caller]
pub fn logits(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    assert!(!bytes.is_empty());
    bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
}

/// Mean squared error over mean square.
pub fn nmse(reference: &[f32], other: &[f32]) -> f64 {
    assert_eq!(reference.len(), other.len());
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 { reference.iter().zip(other).map(|(&a, &b)| f(a.into(), b.into())).sum() };
    sum(&|a, b| (a - b) * (a - b)) / sum(&|a, _| a * a)
}
