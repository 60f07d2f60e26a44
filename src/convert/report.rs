//! What a person sees while a model is converted, and afterwards.

use super::measure::Outcome;
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
}

impl Stage {
    pub fn new(name: &'static str, n: usize) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let style = ProgressStyle::with_template("{msg:24} [{bar:30}] {pos}/{len}, {eta} left").expect("a sound template");
        let bar = ProgressBar::with_draw_target(Some(n as u64), target).with_style(style).with_message(name);
        bar.tick();
        let now = Instant::now();
        Self { bar, name, start: now, line: now, terminal }
    }

    pub fn set_length(&mut self, n: usize) {
        self.bar.set_length(n as u64);
    }

    pub fn set(&mut self, done: usize) {
        self.bar.set_position(done as u64);
        if !self.terminal && self.line.elapsed() >= LINE_EVERY && done > 0 {
            self.line = Instant::now();
            let n = self.bar.length().unwrap_or(0);
            let left = self.start.elapsed().as_secs_f64() * (n.saturating_sub(done as u64)) as f64 / done as f64;
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
fn peak_memory() -> u64 {
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
pub fn summary(projection: &Projection, outcome: &Outcome, stages: &[(&'static str, f64)]) -> String {
    let mut s = table(projection);
    match outcome.divergence {
        Some(k) => {
            let _ = writeln!(s, "mean KL divergence on the probe tokens: {k:.6}");
        }
        None => s.push_str("every channel has all of its bits, so nothing was measured\n"),
    }
    let times: Vec<String> = stages.iter().map(|(name, seconds)| format!("{name} {seconds:.1} s")).collect();
    let _ = writeln!(s, "{}; peak memory {}", times.join(", "), HumanBytes(peak_memory()));
    s
}
