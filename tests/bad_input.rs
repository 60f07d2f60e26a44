//! What users get wrong, with the real programs: one clear sentence, a non-zero status, nothing lost and nothing half-written.

mod runtime;
use palu::gguf::Reader;
use runtime::{llama, palu, projection, refuse, CALIBRATION, MODEL};
use std::path::{Path, PathBuf};
use std::process::Command;

fn convert(model: &Path, calibration: &Path, output: &Path) -> Command {
    let mut command = palu();
    command.arg("convert").arg(model).arg("--calibration").arg(calibration).arg("--output").arg(output);
    command.args(["--bits-per-value", "2.25", "--tokens", "4096", "--probe-tokens", "512"]);
    command
}

/// The bundled model with `bytes` written over the beginning of a tensor.
fn damaged_model(dir: &Path, tensor: &str, bytes: &[u8]) -> PathBuf {
    let mut data = std::fs::read(MODEL).unwrap();
    let start = Reader::parse(&data).unwrap().start(tensor).expect("the tensor is there");
    data[start..start + bytes.len()].copy_from_slice(bytes);
    let path = dir.join(format!("{tensor}.gguf"));
    std::fs::write(&path, data).unwrap();
    path
}

fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[test]
fn tools_refuse_what_is_not_this_models_projection() {
    let dir = tempfile::tempdir().unwrap();
    let good = projection("2.25");
    let tool = |model: &Path, file: &Path| {
        let mut command = llama("llama-completion");
        command.args(["-m", model.to_str().unwrap(), "--palu", file.to_str().unwrap(), "-p", "a", "-n", "1", "-no-cnv"]);
        command
    };
    refuse(&mut tool(Path::new(MODEL), Path::new("/nonexistent/file")), "cannot open");
    refuse(&mut tool(Path::new(MODEL), dir.path()), "not a regular file");
    refuse(&mut tool(Path::new(MODEL), Path::new(MODEL)), "a GGUF file of another kind");

    let bytes = std::fs::read(&good).unwrap();
    let bad = dir.path().join("bad.gguf");
    for n in [0, 10, 60, 1000, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&bad, &bytes[..n]).unwrap();
        refuse(&mut tool(Path::new(MODEL), &bad), "palu: ");
    }
    for i in [0, 5, 30, 55, 300, 5000, bytes.len() / 2, bytes.len() - 1] {
        let mut damaged = bytes.clone();
        damaged[i] ^= 0x10;
        std::fs::write(&bad, &damaged).unwrap();
        refuse(&mut tool(Path::new(MODEL), &bad), "palu: ");
    }

    // the same architecture and shapes, other weights
    let other = damaged_model(dir.path(), "blk.3.attn_k.weight", &[0; 64]);
    refuse(&mut tool(&other, &good), "made for a model with other weights");
    refuse(tool(Path::new(MODEL), &good).args(["--palu-bits", "7"]), "cannot serve 7");
    refuse(tool(Path::new(MODEL), &good).args(["-ctk", "q8_0"]), "palu: ");
    // the environment works like the option
    let mut by_environment = llama("llama-completion");
    by_environment.args(["-m", MODEL, "-p", "a", "-n", "1", "-no-cnv"]).env("LLAMA_ARG_PALU", "/nonexistent/file");
    refuse(&mut by_environment, "cannot open /nonexistent/file");
}

#[test]
fn conversion_refuses_bad_models_and_texts() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out.gguf");
    let [empty, short, model] = ["empty.txt", "short.txt", "model.gguf"].map(|n| dir.path().join(n));
    std::fs::write(&empty, "").unwrap();
    std::fs::write(&short, "A few words are no calibration.").unwrap();
    let text = Path::new(CALIBRATION);
    refuse(&mut convert(Path::new(MODEL), &empty, &output), "empty");
    refuse(&mut convert(Path::new(MODEL), &short, &output), "token");
    refuse(&mut convert(Path::new(MODEL), Path::new("/nonexistent/text"), &output), "/nonexistent/text");
    refuse(&mut convert(Path::new("/nonexistent/model"), text, &output), "/nonexistent/model");
    refuse(&mut convert(text, text, &output), "not a GGUF file");
    let bytes = std::fs::read(MODEL).unwrap();
    for n in [100, bytes.len() / 2] {
        std::fs::write(&model, &bytes[..n]).unwrap();
        refuse(&mut convert(&model, text, &output), "palu convert: ");
    }
    // q8_0 blocks begin with an f16 scale
    let nan = damaged_model(dir.path(), "blk.2.attn_v.weight", &half::f16::NAN.to_le_bytes());
    refuse(&mut convert(&nan, text, &output), "layer 2: the model's values are not finite");
    assert!(!output.exists());
}

#[test]
fn a_failed_conversion_leaves_an_existing_file_alone() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out.gguf");
    std::fs::write(&output, "precious").unwrap();
    let nan = damaged_model(dir.path(), "blk.2.attn_k.weight", &half::f16::NAN.to_le_bytes());
    let before = entries(dir.path());
    refuse(&mut convert(&nan, Path::new(CALIBRATION), &output), "not finite");
    assert_eq!(std::fs::read(&output).unwrap(), b"precious");
    assert_eq!(entries(dir.path()), before, "nothing half-written stays");
    refuse(&mut convert(Path::new(MODEL), Path::new(CALIBRATION), Path::new("/proc/out.gguf")), "cannot write");
    refuse(&mut convert(Path::new(MODEL), Path::new(CALIBRATION), Path::new("/nonexistent/out.gguf")), "cannot write");
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // a file system of its own, in a namespace of its own
    let script = format!(
        "mount -t tmpfs -o size=256k tmpfs {0} && echo precious > {0}/out.gguf && \
         {{ \"$@\"; status=$?; test $status -ne 0 && test \"$(ls {0})\" = out.gguf && test \"$(cat {0}/out.gguf)\" = precious && exit 42; exit 1; }}",
        dir.path().display()
    );
    let inner = convert(Path::new(MODEL), Path::new(CALIBRATION), &dir.path().join("out.gguf"));
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &script, "sh"]).arg(inner.get_program()).args(inner.get_args());
    for (key, value) in inner.get_envs() {
        command.env(key, value.unwrap_or_default());
    }
    let output = command.output().expect("unshare starts");
    let stderr = runtime::text(&output.stderr);
    if stderr.contains("unshare") || stderr.contains("mount:") {
        println!("SKIPPED: no private file system can be mounted here: {stderr}");
        return;
    }
    assert_eq!(output.status.code(), Some(42), "{stderr}");
    assert!(stderr.contains("No space left"), "{stderr}");
}
