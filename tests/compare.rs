//! `palu compare` on the bundled model: its figures against llama-perplexity's, what it keeps, what it refuses.

mod runtime;
use palu::projection::ProjectionFile;
use runtime::{llama, palu, projection, refuse, succeed, text, MODEL, TEST_TEXT};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

fn compare(texts: &[&Path], out: &Path, options: &[&str]) -> Command {
    let mut command = palu();
    command.args(["compare", MODEL, "--threads", "2", "--out"]).arg(out).args(options);
    for text in texts {
        command.arg("--text").arg(text);
    }
    command
}

fn results(out: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(out.join("results.json")).unwrap()).unwrap()
}

/// The figure that llama-perplexity prints after a name.
fn printed(output: &str, name: &str) -> f64 {
    let line = output.lines().find(|l| l.split_whitespace().collect::<Vec<_>>().join(" ").starts_with(name));
    let line = line.unwrap_or_else(|| panic!("no '{name}' in:\n{output}"));
    line.split(':').nth(1).unwrap().split_whitespace().next().unwrap().trim_end_matches('%').parse().unwrap()
}

#[track_caller]
fn near(a: &Value, b: f64, relative: f64, absolute: f64, what: &str) {
    let a = a.as_f64().unwrap_or_else(|| panic!("{what} is {a}"));
    assert!((a - b).abs() <= relative * b.abs() + absolute, "{what}: {a}, llama-perplexity: {b}");
}

#[test]
fn figures_are_llama_perplexitys() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let file = projection("2.25");
    let file = file.to_str().unwrap();
    let at_less = format!("{file}@1.6");
    let run = succeed(&mut compare(
        &[Path::new(TEST_TEXT)],
        &out,
        &["--chunks", "2", "--recall-windows", "1", "--caches", "q4_0", "--palu", file, "--palu", &at_less, "--speed-depths", "0,64", "--speed-rounds", "1"],
    ));
    let r = results(&out);

    // what was compared, and its bytes as the runtime allocated them
    let caches = r["caches"].as_array().unwrap();
    let labels: Vec<&str> = caches.iter().map(|c| c["label"].as_str().unwrap()).collect();
    assert_eq!(labels, ["f16", "q4_0", "palu 2.25", "palu 1.6"]);
    let file_bytes = |bits| ProjectionFile::read(Path::new(file)).unwrap().at(bits).unwrap().bytes_per_token() as f64;
    // the last tokens in f16 stand beside the rows
    let recent = palu::recent::N_RECENT as f64 * 12288.0 / r["context"].as_f64().unwrap();
    for (cache, bytes) in caches.iter().zip([12288.0, 3456.0, file_bytes(0.0) + recent, file_bytes(1.6) + recent]) {
        let allocated = cache["bytes_per_token"].as_f64().unwrap();
        assert!((allocated - bytes).abs() < 0.5, "{}: {allocated} bytes per token, expected {bytes}", cache["label"]);
        let speed = &cache["speed"];
        for what in ["decode_tokens_per_second", "prefill_tokens_per_second"] {
            assert!(speed[what].as_array().unwrap().iter().all(|v| v.as_f64().unwrap() > 0.0), "{speed}");
        }
    }
    assert_eq!(caches[2]["layers"].as_array().unwrap().len(), 8);

    // one text was given, so there is a second of another kind
    let texts = r["texts"].as_array().unwrap();
    assert_eq!(texts.len(), 2);
    assert_eq!((texts[0]["chunks"].as_u64(), texts[0]["recall_windows"].as_u64()), (Some(2), Some(1)));
    assert_eq!(texts[1]["path"], Value::Null);
    for text in texts {
        let all = text["results"].as_array().unwrap();
        assert_eq!(all.len(), 4);
        for (i, one) in all.iter().enumerate() {
            let kld = &one["kld"];
            let [median, p99, p999, max] = ["median", "p99", "p99_9", "max"].map(|k| kld[k].as_f64().unwrap());
            assert!(median <= p99 && p99 <= p999 && p999 <= max);
            assert_eq!(kld["mean"].as_f64().unwrap() == 0.0, i == 0, "only the f16 cache is the f16 cache: {one}");
            assert_eq!(one["kld_by_position"].as_array().unwrap().len(), 16);
            let recall = &one["recall"];
            assert_eq!(recall["kld_mean"].as_f64().unwrap() == 0.0, i == 0);
            let [first, again] = ["nll_first", "nll_repeat"].map(|k| recall[k].as_f64().unwrap());
            assert!(again < first, "a repeated passage is easier than a new one: {recall}");
        }
    }

    // the same figures from llama.cpp's own tool
    let base = dir.path().join("f16.kld");
    let perplexity = || {
        let mut command = llama("llama-perplexity");
        command.args(["-m", MODEL, "-f", TEST_TEXT, "-c", "2048", "--chunks", "2", "-t", "2", "-fa", "on"]);
        command
    };
    succeed(perplexity().arg("--kl-divergence-base").arg(&base));
    let palu_args = ["--palu", file, "--palu-bits", "1.6"];
    for (i, args) in [(1, &["-ctk", "q4_0", "-ctv", "q4_0"]), (3, &palu_args)] {
        // llama.cpp's log is written by a thread of its own, and now and then its last lines are lost when the program ends
        let run = || text(&succeed(perplexity().arg("--kl-divergence").arg("--kl-divergence-base").arg(&base).args(args)).stdout);
        let output = (0..3).map(|_| run()).find(|o| o.contains("Same top p: ")).expect("llama-perplexity prints the divergence");
        let own = &texts[0]["results"][i];
        // its file of the f16 cache's probabilities has 16 bits each
        near(&own["kld"]["mean"], printed(&output, "Mean KLD"), 1e-3, 1e-5, "mean");
        near(&own["kld"]["median"], printed(&output, "Median KLD"), 5e-3, 1e-5, "median");
        near(&own["kld"]["p99_9"], printed(&output, "99.9% KLD"), 5e-3, 1e-5, "99.9%");
        near(&own["kld"]["max"], printed(&output, "Maximum KLD"), 5e-3, 1e-5, "maximum");
        near(&own["ppl"], printed(&output, "Mean PPL(Q)"), 1e-5, 0.0, "perplexity");
        // not the ratio to f16's perplexity: that file lifts probabilities that lie 16 nats below the likeliest
        near(&own["same_top"], printed(&output, "Same top p") / 100.0, 1e-3, 0.0, "same top");
    }

    // what people see
    let stdout = text(&run.stdout);
    for part in ["wiki.test.raw", "the bundled mixed sample", "palu 1.6", "mean KLD", "of the f16 cache's bytes", "report.html"] {
        assert!(stdout.contains(part), "no '{part}' in:\n{stdout}");
    }
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    for part in ["<svg", "Divergence against bytes", "Recall of far text", "Where the bits go", "Speed against depth", "palu compare"] {
        assert!(page.contains(part), "the page has no '{part}'");
    }
    for outside in ["http://", "https://", "src=", "url(", "@import", "<script"] {
        assert!(!page.contains(outside), "the page needs something from outside: {outside}");
    }
}

fn parts(out: &Path) -> BTreeMap<PathBuf, SystemTime> {
    let entries = std::fs::read_dir(out.join("parts")).unwrap().map(|e| e.unwrap());
    entries.map(|e| (e.path(), e.metadata().unwrap().modified().unwrap())).collect()
}

#[test]
fn finished_parts_are_kept_and_changed_inputs_run_again() {
    let dir = tempfile::tempdir().unwrap();
    let (out, path, other) = (dir.path().join("out"), dir.path().join("text.txt"), dir.path().join("other.txt"));
    let whole = std::fs::read_to_string(TEST_TEXT).unwrap();
    let lines = |from: usize, bytes: usize| -> String {
        let mut size = 0;
        whole.lines().skip(from).take_while(|l| { size += l.len(); size <= bytes }).map(|l| format!("{l}\n")).collect()
    };
    std::fs::write(&path, lines(0, 12_000)).unwrap();
    std::fs::write(&other, lines(500, 12_000)).unwrap();
    let options = ["--ctx", "256", "--chunks", "2", "--caches", "q8_0", "--speed-depths", "0", "--speed-rounds", "1"];
    let run = |options: &[&str]| {
        succeed(&mut compare(&[&path, &other], &out, options));
        (results(&out), parts(&out))
    };
    let (first, first_parts) = run(&options);
    assert_eq!(first["texts"][0]["recall_windows"], 0, "nothing is far in 256 tokens");
    // 2 texts of 2 chunks on 2 caches, speed of both
    let count = |parts: &BTreeMap<PathBuf, SystemTime>, kind: &str| parts.keys().filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with(kind)).count();
    assert_eq!((count(&first_parts, "score-"), count(&first_parts, "speed-")), (8, 2));

    // again: nothing is run, and nothing is another figure
    let (again, again_parts) = run(&options);
    assert_eq!(again, first);
    assert_eq!(again_parts, first_parts);

    // one part lost, as when the program was stopped: it alone is made again, with the same content
    let lost = first_parts.keys().rfind(|p| p.to_str().unwrap().contains("score-")).unwrap();
    let content = std::fs::read(lost).unwrap();
    std::fs::remove_file(lost).unwrap();
    let (resumed, resumed_parts) = run(&options);
    assert_eq!(resumed, first);
    assert_eq!(std::fs::read(lost).unwrap(), content);
    assert!(resumed_parts.iter().all(|(p, t)| p == lost || first_parts[p] == *t), "another part was made again");

    // one damaged: the same
    std::fs::write(lost, &content[..content.len() / 2]).unwrap();
    assert_eq!(run(&options).0, first);

    // more chunks: only the new ones are run
    let mut more = options;
    more[3] = "3";
    let (_, more_parts) = run(&more);
    assert_eq!(count(&more_parts, "score-"), 8 + 4);
    assert!(first_parts.iter().all(|(p, t)| p == lost || more_parts[p] == *t), "a part was made again");

    // another text: its parts are made again, the other text's are not
    std::fs::write(&path, format!("Something else. {}", lines(0, 12_000))).unwrap();
    let (changed, changed_parts) = run(&options);
    assert_eq!(count(&changed_parts, "score-"), 12 + 4);
    assert_ne!(changed["texts"][0]["results"][0]["ppl"], first["texts"][0]["results"][0]["ppl"]);
    assert_eq!(changed["texts"][1]["results"], first["texts"][1]["results"]);

    // little memory: caches take turns on fewer windows, with the same figures
    let small = dir.path().join("small");
    succeed(compare(&[&path, &other], &small, &options).args(["--logits-memory", "0.000001"]));
    assert_eq!(results(&small)["texts"], changed["texts"]);
}

#[test]
fn what_cannot_be_compared_is_refused_in_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let test_text = Path::new(TEST_TEXT);
    let out = path("out");
    let one_line = |stderr: String| assert_eq!(stderr.trim_end().lines().count(), 1, "one clear sentence: {stderr}");
    std::fs::write(path("short.txt"), "Too short for a chunk.").unwrap();
    std::fs::write(path("empty.txt"), "").unwrap();
    std::fs::write(path("binary.txt"), [0xff, 0xfe]).unwrap();
    std::fs::write(path("a-file"), "").unwrap();

    // before any work
    one_line(refuse(&mut compare(&[&path("missing.txt")], &out, &[]), "cannot read text"));
    one_line(refuse(&mut compare(&[&path("empty.txt")], &out, &[]), "is empty"));
    one_line(refuse(&mut compare(&[&path("binary.txt")], &out, &[]), "is not UTF-8"));
    one_line(refuse(&mut compare(&[test_text], &path("a-file"), &[]), "cannot make the folder"));
    one_line(refuse(&mut compare(&[test_text], &out, &["--palu", "missing.gguf"]), "cannot open projection file missing.gguf"));
    one_line(refuse(&mut compare(&[test_text], &out, &["--palu", MODEL]), "not a usable projection file"));
    refuse(&mut compare(&[test_text], &out, &["--caches", "q8_0,q3_7"]), "cache types are f32, f16");
    refuse(&mut compare(&[test_text], &out, &["--speed-depths", "deep"]), "depths are numbers of tokens");
    refuse(&mut compare(&[], &out, &[]), "--text");
    let alone = path("palu");
    std::fs::copy(env!("CARGO_BIN_EXE_palu"), &alone).unwrap();
    let mut command = Command::new(&alone);
    command.args(["compare", MODEL, "--text", TEST_TEXT, "--out"]).arg(&out).env_remove("PALU_LLAMA_BIN").env("PATH", "");
    one_line(refuse(&mut command, "make llama"));

    let file = projection("2.25");
    let at = |bits: &str| format!("{}@{bits}", file.display());
    one_line(refuse(&mut compare(&[test_text], &out, &["--palu", &at("3")]), "cannot serve 3"));
    one_line(refuse(&mut compare(&[test_text], &out, &["--palu", &at("few")]), "'few' is not"));

    // once the model is loaded
    one_line(refuse(&mut compare(&[&path("short.txt")], &out, &[]), "is too short"));
    one_line(refuse(&mut compare(&[test_text], &out, &["--speed-depths", "5000"]), "the model was trained for 2048"));
    let mut other = ProjectionFile::read(&file).unwrap();
    other.meta.model_identity ^= 1;
    other.write(&path("other.gguf")).unwrap();
    let other = path("other.gguf");
    one_line(refuse(&mut compare(&[test_text], &out, &["--palu", other.to_str().unwrap()]), "was made for a model with other weights"));
    std::fs::write(path("model.gguf"), b"GGUF and nothing else").unwrap();
    let mut command = palu();
    command.arg("compare").arg(path("model.gguf")).args(["--text", TEST_TEXT, "--out"]).arg(&out);
    one_line(refuse(&mut command, "cannot load model"));
    assert!(!out.join("results.json").exists());
}
