//! What llama.cpp does with a cache besides appending to it, on the compressed cache: each result is held against the same
//! steps done without the operation, or, where that is not the same thing, against the same steps on the stock cache.

mod runtime;
use runtime::{llama, nmse, projection, refuse, steps, MODEL};
use std::path::Path;

/// The wide projection: compression hardly shows, so that what is left is the operation.
const WIDE: &str = "8.2";
const N_VOCAB: usize = 8192;

fn run(bits: &str, args: &[&str]) -> Vec<f32> {
    let file = projection(bits);
    steps(Path::new(MODEL), &[&["--palu", file.to_str().unwrap()], args].concat())
}

fn last(logits: &[f32], n: usize) -> &[f32] {
    &logits[logits.len() - n * N_VOCAB..]
}

#[test]
fn threads_and_flash_attention_do_not_matter() {
    let script = ["rand:0@0:200:1", "rand:0@200:1:2", "rand:0@201:3:3"];
    let one = run("2.25", &[&["--threads", "1"], &script[..]].concat());
    let two = run("2.25", &[&["--threads", "2"], &script[..]].concat());
    assert!(one == two, "results depend on the number of threads");
    for fa in ["0", "1"] {
        let other = run("2.25", &[&["--fa", fa], &script[..]].concat());
        assert!(nmse(&one, &other) < 1e-6, "-fa {fa}: {}", nmse(&one, &other));
    }
}

#[test]
fn removing_a_tail_leaves_no_trace() {
    let rows = ["--palu-recent", "0"];
    let plain = ["rand:0@0:100:1", "rand:0@100:20:2"];
    let detour = ["rand:0@0:100:1", "rand:0@100:50:9", "rm:0:100:-1", "rand:0@100:20:2"];
    let run = |options: &[&str], script: &[&str]| run("2.25", &[options, script].concat());
    assert!(last(&run(&rows, &plain), 20) == last(&run(&rows, &detour), 20));
    // but for slots that the tail took: tokens before it are read from their rows until the slots are theirs again
    let (plain, detour) = (run(&[], &plain), run(&[], &detour));
    let error = nmse(last(&plain, 20), last(&detour, 20));
    assert!(error > 0.0 && error < 0.05, "{error}");
}

/// Rows that say next to nothing, beside every token in f16: what comes out is the f16 cache's, so all of it was read there.
#[test]
fn recent_tokens_are_read_in_f16() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (all, one) = (file("all"), file("one"));
    let (save, load) = (format!("save:{all}"), format!("load:{all}"));
    let (save_one, load_one) = (format!("save-seq:1:{one}"), format!("load-seq:1:{one}"));
    let scripts: &[(&[&str], &[&str])] = &[
        (&[], &["rand:0@0:150:1", "rand:0@150:1:2", "rand:0@151:7:3", "rand:0@158:40:4"]),
        (&["--ubatch", "32"], &["rand:0@0:200:1", "rand:0@200:5:2"]),
        (&["--seqs", "2"], &["rand:0@0:60:1+1@0:60:2", "rand:0@60:4:3+1@60:4:4", "rand:1@64:9:5"]),
        (&["--seqs", "2", "--unified"], &["rand:0@0:60:1+1@0:60:2", "rand:0@60:4:3+1@60:4:4", "rand:1@64:9:5"]),
        (&["--seqs", "3"], &["rand:0@0:100:1", "cp:0:2:-1:-1", "rm:0:-1:-1", "rand:2@100:20:2"]),
        (&["--seqs", "3", "--unified"], &["rand:0@0:100:1", "cp:0:2:-1:-1", "rand:2@100:20:2", "rand:0@100:20:3"]),
        // tokens that come in the place of others
        (&[], &["rand:0@0:100:1", "rm:0:50:-1", "rand:0@50:60:2", "rm:0:80:-1", "rand:0@80:3:3"]),
        (&[], &["rand:0@0:100:1", &save, "clear", "rand:0@0:120:5", &load, "rand:0@100:10:2"]),
        (&["--seqs", "2", "--unified"], &["rand:0@0:30:1+1@0:90:2", &save_one, "rand:1@90:9:5", &load_one, "rand:1@90:5:6+0@30:5:7"]),
        (&["--seqs", "2"], &["rand:0@0:30:1+1@0:90:2", &save_one, "rand:1@90:9:5", &load_one, "rand:1@90:5:6+0@30:5:7"]),
        (&[], &["rand:0@0:100:1", "add:0:0:-1:37", "add:0:0:-1:-37", "rand:0@100:8:2"]),
    ];
    for (options, script) in scripts {
        let stock = steps(Path::new(MODEL), &[&["--type", "f32"], *options, *script].concat());
        let recent = run("1", &[&["--palu-bits", "0.5", "--palu-recent", "256"], *options, *script].concat());
        assert!(nmse(&stock, &recent) < 3e-4, "{options:?} {script:?}: {}", nmse(&stock, &recent));
        let rows = run("1", &[&["--palu-bits", "0.5", "--palu-recent", "0"], *options, *script].concat());
        assert!(nmse(&stock, &rows) > 1e-2, "the rows are too good for this test: {}", nmse(&stock, &rows));
    }
    // keys in slots are rotated, so a shift leaves them; the rows know their new positions
    let script = ["rand:0@0:100:1", "add:0:0:-1:37", "rand:0@137:1:2"];
    let wide = |recent: &str| run(WIDE, &[&["--palu-recent", recent], &script[..]].concat());
    assert!(nmse(last(&wide("0"), 1), last(&wide("256"), 1)) < 1e-3);
}

/// Also where a micro-batch has more tokens than are kept in f16, so that its rows are stored before they are read, and where it has fewer
/// and they are stored after it.
#[test]
fn micro_batches_do_not_matter() {
    let script = ["rand:0@0:200:1", "rand:0@200:3:2"];
    for (recent, n) in [("16", "24"), ("16", "7"), ("4", "8"), ("4", "3"), ("0", "3")] {
        let run = |options: &[&str]| run("2.25", &[&["--palu-recent", recent], options, &script[..]].concat());
        let (whole, parts) = (run(&[]), run(&["--ubatch", n]));
        // a code at the edge can fall to the other side
        let error = nmse(&whole, &parts);
        assert!(error < 2e-3, "{recent} recent tokens, micro-batches of {n}: {error}");
    }
}

#[test]
fn more_recent_tokens_than_there_is_room_for_are_refused() {
    let palu = projection("2.25");
    let palu = palu.to_str().unwrap();
    refuse(llama("palu-steps").args([MODEL, "/dev/null", "--palu", palu, "--palu-recent", "257", "rand:0@0:9:1"]), "257 recent tokens are too many");
}

#[test]
fn a_copied_sequence_goes_on_like_the_original() {
    for unified in [&["--unified"][..], &[]] {
        let options = [&["--seqs", "3"], unified].concat();
        let plain = run("2.25", &[&options[..], &["rand:0@0:100:1", "rand:0@100:20:2"]].concat());
        let copied = run("2.25", &[&options[..], &["rand:0@0:100:1", "cp:0:2:-1:-1", "rm:0:-1:-1", "rand:2@100:20:2"]].concat());
        assert!(nmse(last(&plain, 20), last(&copied, 20)) < 1e-9, "{options:?}");
    }
}

#[test]
fn sequences_do_not_see_each_other() {
    let first = run(WIDE, &["rand:0@0:60:1", "rand:0@60:4:3"]);
    let second = run(WIDE, &["rand:0@0:60:2", "rand:0@60:4:4"]);
    for unified in [&["--unified"][..], &[]] {
        let options = [&["--seqs", "2", "--ctx", "512"], unified].concat();
        let both = run(WIDE, &[&options[..], &["rand:0@0:60:1+1@0:60:2", "rand:0@60:4:3+1@60:4:4"]].concat());
        // another batch rounds its products in another order, and a code at the edge falls to the other side: noise of the size of
        // the quantization, four orders below what reading the other sequence would do
        let (a, b) = last(&both, 8).split_at(4 * N_VOCAB);
        assert!(nmse(last(&first, 4), a) < 2e-4, "{options:?}: {}", nmse(last(&first, 4), a));
        assert!(nmse(last(&second, 4), b) < 2e-4, "{options:?}: {}", nmse(last(&second, 4), b));
    }
}

#[test]
fn a_shift_costs_nothing_and_loses_nothing() {
    // RoPE is relative: a sequence moved as a whole must go on as if it had not moved
    let plain = run("2.25", &["rand:0@0:100:1", "rand:0@100:8:2"]);
    let moved = run("2.25", &["rand:0@0:100:1", "add:0:0:-1:37", "rand:0@137:8:2"]);
    let error = nmse(last(&plain, 8), last(&moved, 8));
    assert!(error < 1e-3, "{error}");
    // there and back is bit for bit nothing: only positions change
    let back = run("2.25", &["rand:0@0:100:1", "add:0:0:-1:37", "add:0:0:-1:-37", "rand:0@100:8:2"]);
    assert!(plain == back);
    // a hole closed, as context shift does it: the same steps on the stock cache give the same logits
    let script = ["rand:0@0:200:1", "rm:0:4:104", "add:0:104:-1:-100", "rand:0@100:8:2", "rand:0@108:1:3"];
    let stock = steps(Path::new(MODEL), &[&["--type", "f32"], &script[..]].concat());
    let wide = run(WIDE, &script);
    assert!(nmse(&stock, &wide) < 1e-4, "{}", nmse(&stock, &wide));
}

#[test]
fn state_goes_on_in_another_process() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let plain = run("2.25", &["rand:0@0:150:1", "rand:0@150:10:2"]);
    for (save, load) in [
        (format!("save:{}", file("all")), format!("load:{}", file("all"))),
        (format!("save-seq:0:{}", file("seq")), format!("load-seq:0:{}", file("seq"))),
    ] {
        run("2.25", &["rand:0@0:150:1", &save]);
        let resumed = run("2.25", &[&load, "rand:0@150:10:2"]);
        assert!(last(&plain, 10) == last(&resumed, 10), "{load}");
    }

    // a state belongs to its projection and budget: a stock cache and another budget refuse it, and it refuses theirs
    let palu = projection("2.25");
    let palu = palu.to_str().unwrap();
    for kind in ["all", "seq"] {
        let (save, load) = if kind == "all" { ("save:", "load:") } else { ("save-seq:0:", "load-seq:0:") };
        let load = format!("{load}{}", file(kind));
        refuse(llama("palu-steps").args([MODEL, "/dev/null", "--palu", palu, "--palu-bits", "2", &load]), "the state was refused");
        refuse(llama("palu-steps").args([MODEL, "/dev/null", &load]), "the state was refused");
        let stock = file("stock");
        steps(Path::new(MODEL), &["rand:0@0:150:1", &format!("{save}{stock}")]);
        let load = load.replace(&file(kind), &stock);
        refuse(llama("palu-steps").args([MODEL, "/dev/null", "--palu", palu, &load]), "the state was refused");
    }
}

/// `make test-cuda` without a GPU: the part of it that the CPU can stand in for, so that it works where there is one.
#[test]
fn the_tests_of_a_gpu_run() {
    let steps = llama("palu-steps");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/test_cuda.py");
    let output = std::process::Command::new("python3")
        .args([script, "--cpu", "--projection"])
        .arg(projection("2.25"))
        .arg("states")
        .env("PALU_LLAMA_BIN", Path::new(steps.get_program()).parent().unwrap())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("test-cuda: 9 ok, 0 failed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}
