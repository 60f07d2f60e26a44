//! Quality per byte on the bundled model: `llama-perplexity --kl-divergence` over WikiText-2 test, -c 2048, 16 chunks.

mod runtime;
use runtime::{cache_dir, converted, llama, succeed, text, MODEL, TEST_TEXT};

fn perplexity() -> std::process::Command {
    let mut command = llama("llama-perplexity");
    command.args(["-m", MODEL, "-f", TEST_TEXT, "-c", "2048", "--chunks", "16", "-t", "2", "-fa", "on"]);
    command
}

fn number(output: &str, name: &str) -> f64 {
    let line = output.lines().find(|l| l.split_whitespace().collect::<Vec<_>>().join(" ").starts_with(name));
    let line = line.unwrap_or_else(|| panic!("no '{name}' in:\n{output}"));
    line.split(':').nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn divergence_stays_below_stock_quantization_at_twice_the_bytes() {
    let base = cache_dir().join("f16.kld");
    succeed(perplexity().arg("--kl-divergence-base").arg(&base));
    let kld = |args: &[&str]| {
        // llama.cpp's log is written by a thread of its own, and now and then its last lines are lost when the program ends
        let run = || text(&succeed(perplexity().arg("--kl-divergence").arg("--kl-divergence-base").arg(&base).args(args)).stdout);
        let output = (0..3).map(|_| run()).find(|o| o.contains("Minimum KLD")).expect("llama-perplexity prints the divergence");
        (number(&output, "Mean KLD"), number(&output, "Median KLD"), number(&output, "99.9% KLD"))
    };
    let q4_0 = kld(&["-ctk", "q4_0", "-ctv", "q4_0"]);
    println!("q4_0 at 28.1% of f16: mean {:.6} median {:.6} 99.9% {:.6}", q4_0.0, q4_0.1, q4_0.2);
    let file = converted("4.5", &[]);
    let mut mean = Vec::new();
    // 16 of 2048 tokens in f16 take as much as an eighth of a bit per value
    for (bits, percent) in [("4.375", 28.1), ("2.875", 18.8), ("2.125", 14.1)] {
        let palu = kld(&["--palu", file.to_str().unwrap(), "--palu-bits", bits]);
        println!("palu at {percent}% of f16: mean {:.6} median {:.6} 99.9% {:.6}", palu.0, palu.1, palu.2);
        assert!(palu.0 < q4_0.0 && palu.1 < q4_0.1 && palu.2 < q4_0.2, "worse than q4_0 with {percent}% of f16's bytes");
        mean.push(palu.0);
    }
    assert!(mean.windows(2).all(|w| w[0] < w[1]), "more bytes must not be worse: {mean:?}");
    assert!(mean[2] < 0.002, "{mean:?}");
}
