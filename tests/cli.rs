//! The command `palu` as people run it.
#![cfg(feature = "cli")]

use half::f16;
use palu::projection::{GroupFile, LayerFile, Meta, ProjectionFile, SideFile};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const PALU: &str = env!("CARGO_BIN_EXE_palu");

fn palu(args: &[&str]) -> Output {
    Command::new(PALU).args(args).output().unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

/// The single line that an unsuccessful run leaves on stderr.
fn complaint(output: &Output) -> &str {
    assert!(!output.status.success());
    assert!(output.stdout.is_empty());
    let text = std::str::from_utf8(&output.stderr).unwrap().trim_end();
    assert_eq!(text.lines().count(), 1, "one clear sentence: {text}");
    text
}

fn sample(path: &Path) {
    let side = |rank: usize| SideFile {
        n_head_kv: 2,
        head_dim: 16,
        group_size: 2,
        weight: vec![0.5],
        mean: vec![0.25; 32],
        groups: vec![GroupFile {
            bits: Vec::new(),
            variance: (0..rank).map(|c| 0.9f32.powi(c as i32)).collect(),
            enc: vec![f16::ONE; rank * 32],
            dec: vec![f16::ONE; rank * 32],
        }],
    };
    let meta = Meta {
        arch: "llama".into(),
        model_name: "sample".into(),
        model_identity: 0xabc,
        n_layer: 2,
        bits_per_value: 4.0,
        budgets: vec![4.0],
        calibration_hash: 1,
        calibration: "text.txt".into(),
        calibration_tokens: 1000,
        metric: "attention+output, measured".into(),
        options: "--bits-per-value 4".into(),
    };
    let layers = (0..2).map(|il| LayerFile { il, sides: [side(24), side(16)] }).collect();
    ProjectionFile { meta, layers }.write(path).unwrap();
}

struct Workspace(tempfile::TempDir);

impl Workspace {
    fn new() -> Self {
        let w = Self(tempfile::tempdir().unwrap());
        std::fs::write(w.path("model.gguf"), b"GGUF").unwrap();
        std::fs::write(w.path("text.txt"), "some text").unwrap();
        w
    }
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
    fn arg(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }
}

#[test]
fn inspect_tells_sizes_ranks_and_origin() {
    let w = Workspace::new();
    let file = w.arg("file.gguf");
    sample(Path::new(&file));
    let output = palu(&["inspect", &file]);
    assert!(output.status.success());
    for part in ["sample", "llama", "0000000000000abc", "text.txt", "attention+output, measured", "bytes per token", "% of f16"] {
        assert!(stdout(&output).contains(part), "{part} in\n{}", stdout(&output));
    }

    let json = |args: &[&str]| -> serde_json::Value {
        let output = palu(&[&["inspect", &file, "--json"], args].concat());
        assert!(output.status.success());
        serde_json::from_str(stdout(&output)).unwrap()
    };
    let whole = json(&[]);
    let projection = ProjectionFile::read(Path::new(&file)).unwrap().at(0.0).unwrap();
    assert_eq!(whole["bytes_per_token"], projection.bytes_per_token());
    assert_eq!(whole["f16_bytes_per_token"], 2 * 2 * 2 * 32);
    assert_eq!(whole["bits_per_value"], projection.bits_per_value);
    let percent = 100.0 * projection.bytes_per_token() as f64 / 256.0;
    assert_eq!(whole["percent_of_f16"], percent);
    assert_eq!(whole["layers"].as_array().unwrap().len(), 2);
    assert_eq!(whole["layers"][1]["layer"], 1);
    assert_eq!(whole["layers"][0]["key"]["rank"], projection.layers[0].sides[0].rank());
    assert_eq!(whole["layers"][0]["value"]["row_bytes"], projection.layers[0].sides[1].row_bytes);
    assert_eq!(whole["model"]["architecture"], "llama");
    assert_eq!(whole["calibration"]["tokens"], 1000);

    let half = json(&["--bits", "1.5"]);
    assert!(half["bits_per_value"].as_f64().unwrap() <= 1.5);
    assert!(half["bytes_per_token"].as_u64() < whole["bytes_per_token"].as_u64());
    assert_ne!(half["identity"], whole["identity"], "rows of one budget cannot be read at another");
    assert!(complaint(&palu(&["inspect", &file, "--bits", "5"])).contains("4 bits per value"));
}

#[test]
fn inspect_refuses_what_is_no_projection_file() {
    let w = Workspace::new();
    assert!(complaint(&palu(&["inspect", &w.arg("missing")])).contains("missing"));
    assert!(complaint(&palu(&["inspect", &w.arg("text.txt")])).contains("text.txt"));
    assert!(complaint(&palu(&["inspect", &w.arg("model.gguf")])).contains("model.gguf"));
    sample(&w.path("cut"));
    let bytes = std::fs::read(w.path("cut")).unwrap();
    std::fs::write(w.path("cut"), &bytes[..bytes.len() - 1]).unwrap();
    assert!(complaint(&palu(&["inspect", &w.arg("cut")])).contains("checksum"));
}

/// A helper that only shows its arguments.
fn with_helper(w: &Workspace, args: &[&str]) -> Output {
    use std::os::unix::fs::PermissionsExt;
    let helper = w.path("llama-palu-convert");
    std::fs::write(&helper, "#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit 7\n").unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    Command::new(PALU).args(args).env("PALU_LLAMA_BIN", w.0.path()).output().unwrap()
}

#[test]
fn convert_becomes_the_helper() {
    let w = Workspace::new();
    let (model, text, out) = (w.arg("model.gguf"), w.arg("text.txt"), w.arg("out"));
    let args = ["convert", &model, "--calibration", &text, "--output", &out, "--bits-per-value", "2.25", "-ngl", "99"];
    let output = with_helper(&w, &args);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    let mut want = args;
    want[8] = "--ngl";
    assert_eq!(stdout(&output).lines().collect::<Vec<_>>(), want);
}

#[test]
fn convert_refuses_bad_input_before_any_work() {
    let w = Workspace::new();
    std::fs::write(w.path("empty.txt"), "").unwrap();
    std::fs::write(w.path("binary.txt"), [0xff, 0xfe, 0x00]).unwrap();
    std::fs::write(w.path("out"), "precious").unwrap();
    let run = |model: &str, text: &str, out: &str| {
        let (model, text, out) = (w.arg(model), w.arg(text), w.arg(out));
        with_helper(&w, &["convert", &model, "--calibration", &text, "--output", &out, "--bits-per-value", "2.25"])
    };
    assert!(complaint(&run("missing.gguf", "text.txt", "out")).contains("missing.gguf"));
    assert!(complaint(&run("text.txt", "text.txt", "out")).contains("not a GGUF file"));
    assert!(complaint(&run("", "text.txt", "out")).contains("not a regular file"));
    assert!(complaint(&run("model.gguf", "missing.txt", "out")).contains("missing.txt"));
    assert!(complaint(&run("model.gguf", "empty.txt", "out")).contains("is empty"));
    assert!(complaint(&run("model.gguf", "binary.txt", "out")).contains("not UTF-8"));
    assert!(complaint(&run("model.gguf", "text.txt", "missing/out")).contains("cannot write into"));
    assert!(complaint(&run("model.gguf", "text.txt", "")).contains("is a directory"));
    assert!(complaint(&run("model.gguf", "text.txt", "model.gguf")).contains("the model itself"));
    assert!(complaint(&run("model.gguf", "text.txt", "text.txt")).contains("the calibration text itself"));
    assert_eq!(std::fs::read(w.path("out")).unwrap(), b"precious");

    let (model, text, out) = (w.arg("model.gguf"), w.arg("text.txt"), w.arg("out"));
    for bits in ["0", "-1", "17", "nan", "few"] {
        let output = with_helper(&w, &["convert", &model, "--calibration", &text, "--output", &out, "--bits-per-value", bits]);
        assert!(!output.status.success());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains("bits per value are a number above 0"), "{stderr}");
    }
    assert!(!palu(&["convert"]).status.success());
    assert!(!palu(&[]).status.success());
}

#[test]
fn convert_says_how_to_get_the_helper() {
    let w = Workspace::new();
    // somewhere else than where the build puts it, so that no helper is near
    let alone = w.path("palu");
    std::fs::copy(PALU, &alone).unwrap();
    let output = Command::new(&alone)
        .args(["convert", &w.arg("model.gguf"), "--calibration", &w.arg("text.txt")])
        .args(["--output", &w.arg("out"), "--bits-per-value", "2.25"])
        .env_remove("PALU_LLAMA_BIN")
        .env("PATH", "")
        .output()
        .unwrap();
    assert!(complaint(&output).contains("make llama"));
}
