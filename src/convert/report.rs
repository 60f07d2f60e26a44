//! What a person sees while a model is converted, and afterwards.

use super::measure::{Outcome, Probe};
use crate::projection::{Projection, SIDES};
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fmt::Write;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Without a terminal, a line this often.
const LINE_EVERY: Duration = Duration::from_secs(15);

/// One stage of the work: a bar with the time left on a terminal, else a line now and then. On stderr.
pub struct Stage {
    bar: ProgressBar,
    name: &'static str,
    start: Instant,
    line: Instant,
    terminal: bool,
    skipped: usize,
}

impl Stage {
    pub fn new(name: &'static str, n: usize) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let style = ProgressStyle::with_template("{msg:24} [{bar:30}] {pos}/{len}, {eta} left").expect("a sound template");
        let bar = ProgressBar::with_draw_target(Some(n as u64), target).with_style(style).with_message(name);
        bar.tick();
        let now = Instant::now();
        Self { bar, name, start: now, line: now, terminal, skipped: 0 }
    }

    pub fn set_length(&mut self, n: usize) {
        self.bar.set_length(n as u64);
    }

    /// What was done before does not tell how long the rest takes.
    pub fn skip(&mut self, done: usize) {
        self.skipped = done;
        self.bar.set_position(done as u64);
        self.bar.reset_eta();
    }

    pub fn set(&mut self, done: usize) {
        self.bar.set_position(done as u64);
        if !self.terminal && self.line.elapsed() >= LINE_EVERY && done > 0 {
            self.line = Instant::now();
            let n = self.bar.length().unwrap_or(0);
            let each = self.start.elapsed().as_secs_f64() / done.saturating_sub(self.skipped).max(1) as f64;
            let left = each * n.saturating_sub(done as u64) as f64;
            eprintln!("{}: {done} of {n}, about {left:.0} s left", self.name);
        }
    }

    pub fn step(&mut self) {
        self.set(self.bar.position() as usize + 1);
    }

    /// Name and seconds of the stage.
    pub fn finish(self) -> (&'static str, f64) {
        self.bar.finish_and_clear();
        let seconds = self.start.elapsed().as_secs_f64();
        if !self.terminal {
            eprintln!("{}: {seconds:.1} s", self.name);
        }
        (self.name, seconds)
    }
}

/// Most memory that this process has used, in bytes.
pub fn peak_memory() -> u64 {
    // SAFETY: getrusage only writes the struct
    let max = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage.ru_maxrss as u64
    };
    if cfg!(target_os = "macos") {
        max
    } else {
        1024 * max
    }
}

/// Per layer and side: ranks, mean bits of the kept channels, bytes; then the totals.
pub fn table(projection: &Projection) -> String {
    let mut s = String::from("layer  keys: rank   bits  bytes  values: rank   bits  bytes\n");
    for layer in &projection.layers {
        let [k, v] = SIDES.map(|side| layer.side(side));
        let channels = |s: &crate::projection::SideProj| format!("{}/{}", s.rank(), s.n_head_kv * s.head_dim);
        let _ = writeln!(
            s,
            "{:5}  {:>10} {:6.2} {:6}  {:>12} {:6.2} {:6}",
            layer.il,
            channels(k),
            k.code_bits(),
            k.row_bytes,
            channels(v),
            v.code_bits(),
            v.row_bytes
        );
    }
    let (bytes, f16) = (projection.bytes_per_token(), projection.f16_bytes_per_token());
    let _ = writeln!(
        s,
        "{bytes} bytes per token, {:.1}% of f16's {f16}; {:.3} bits per value",
        100.0 * bytes as f64 / f16 as f64,
        projection.bits_per_value
    );
    s
}

/// The end of a conversion.
pub fn summary(
    projection: &Projection,
    budgets: &[f64],
    outcome: &Outcome,
    stages: &[(&'static str, f64)],
    probe: &Probe,
    n_collect: usize,
) -> String {
    let mut s = table(projection);
    if outcome.divergence.is_empty() {
        s.push_str("every channel has all of its bits, so nothing was measured\n");
    }
    for (budget, k) in budgets.iter().zip(&outcome.divergence).rev() {
        let _ = writeln!(s, "mean KL divergence on the probe tokens, {budget:.3} bits per value: {k:.6}");
    }
    let times: Vec<String> = stages.iter().map(|(name, seconds)| format!("{name} {seconds:.1} s")).collect();
    let _ = writeln!(s, "{}; peak memory {}", times.join(", "), HumanBytes(peak_memory()));
    let collect: f64 = stages.iter().filter(|(name, _)| *name == "collect").map(|(_, seconds)| seconds).sum();
    let _ = write!(s, "{:.2} ms per calibration token", 1e3 * collect / n_collect.max(1) as f64);
    if probe.n_run > 0 {
        let each = probe.seconds / probe.n_run as f64;
        let _ = write!(s, "; {} measurements of {} tokens, {each:.2} s each", probe.n_run, probe.n_token());
    }
    s + "\n"
}
