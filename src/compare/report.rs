//! What was measured, in figures: for the terminal, as JSON, and in sentences.

use super::run::{Measured, ModelInfo, DECODE, KINDS, PREFILL};
use super::score::{mean, percentile, Scores};
use super::windows::{chunk_positions, first_counted, Cut, Kind, PASSAGE};
use super::{Contender, Options, Text};
use crate::convert::host::Cache;
use serde_json::{json, Value};
use std::fmt::Write;

/// Parts that the positions of a chunk are cut into.
const BINS: usize = 16;

/// Divergence over the positions that count.
#[derive(Clone, Debug)]
pub struct Divergence {
    pub n: usize,
    pub mean: f64,
    pub mean_error: f64,
    pub median: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
    /// exp of the mean negative log likelihood
    pub ppl: f64,
    /// mean of log(PPL/PPL of f16), and its standard error
    pub log_ratio: f64,
    pub log_ratio_error: f64,
    /// share of positions at which the likeliest token is the f16 cache's
    pub same_top: f64,
    /// mean divergence in each of [`BINS`] stretches of the chunk, the first half too
    pub by_position: Vec<f64>,
}

/// Over the tokens of repeated passages.
#[derive(Clone, Debug)]
pub struct Recall {
    pub n: usize,
    pub mean: f64,
    pub mean_error: f64,
    pub p999: f64,
    /// -log of the probability of a token where its passage stands first, and where it is repeated
    pub nll_first: f64,
    pub nll: f64,
    /// share of the repeat's tokens that were the likeliest
    pub hit: f64,
    pub same_top: f64,
}

pub struct TextResult {
    pub divergence: Divergence,
    pub recall: Option<Recall>,
}

/// Medians over the rounds, in tokens per second, per depth.
pub struct SpeedResult {
    pub prefill: Vec<f64>,
    pub decode: Vec<f64>,
}

pub struct Report {
    pub command: String,
    pub model_file: String,
    pub model: ModelInfo,
    pub n_thread: usize,
    pub processor: String,
    pub speed_rounds: usize,
    pub texts: Vec<Text>,
    pub cuts: Vec<Cut>,
    pub contenders: Vec<Contender>,
    /// per contender: bytes of the cache of n_ctx tokens, or why there is none
    pub caches: Vec<Result<u64, String>>,
    /// per text and contender
    pub results: Vec<Vec<Option<TextResult>>>,
    pub depths: Vec<usize>,
    /// per contender
    pub speed: Vec<Option<SpeedResult>>,
}

fn share(bits: impl Iterator<Item = bool>) -> f64 {
    mean(bits.map(f64::from).collect::<Vec<_>>().into_iter()).0
}

fn divergence(cut: &Cut, own: &[Scores], f16: &[Scores]) -> Divergence {
    let positions = chunk_positions(cut.chunk);
    let counted = positions.partition_point(|&p| p < first_counted(cut.chunk));
    let all = |f: &dyn Fn(&Scores) -> &[f32], scores: &[Scores]| -> Vec<f32> { scores.iter().flat_map(|s| f(s)[counted..].to_vec()).collect() };
    let mut kld = all(&|s| &s.kld, own);
    let (nll, nll_f16) = (all(&|s| &s.nll, own), all(&|s| &s.nll, f16));
    kld.sort_unstable_by(f32::total_cmp);
    let (mean_kld, mean_error) = mean(kld.iter().map(|&k| f64::from(k)));
    let (log_ratio, log_ratio_error) = mean(nll.iter().zip(&nll_f16).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    let bin = |i: usize| {
        let of = |s: &Scores| -> Vec<f64> {
            positions.iter().zip(&s.kld).filter(|(&p, _)| p * BINS / cut.chunk == i).map(|(_, &k)| f64::from(k)).collect()
        };
        mean(own.iter().flat_map(of).collect::<Vec<_>>().into_iter()).0
    };
    Divergence {
        n: kld.len(),
        mean: mean_kld,
        mean_error,
        median: percentile(&kld, 0.5),
        p90: percentile(&kld, 0.9),
        p99: percentile(&kld, 0.99),
        p999: percentile(&kld, 0.999),
        max: kld.last().map_or(f64::NAN, |&k| f64::from(k)),
        ppl: mean(nll.iter().map(|&n| f64::from(n))).0.exp(),
        log_ratio,
        log_ratio_error,
        same_top: share(own.iter().flat_map(|s| s.same_top[counted..].iter().copied())),
        by_position: (0..BINS).map(bin).collect(),
    }
}

fn recall(own: &[Scores], f16: &[Scores]) -> Option<Recall> {
    let half = own.first()?.kld.len() / 2;
    let mut kld: Vec<f32> = own.iter().flat_map(|s| s.kld[half..].to_vec()).collect();
    kld.sort_unstable_by(f32::total_cmp);
    let (mean_kld, mean_error) = mean(kld.iter().map(|&k| f64::from(k)));
    let nll = |scores: &[Scores], again: bool| {
        let of = |s: &Scores| if again { s.nll[half..].to_vec() } else { s.nll[..half].to_vec() };
        mean(scores.iter().flat_map(of).map(f64::from).collect::<Vec<_>>().into_iter()).0
    };
    Some(Recall {
        n: kld.len(),
        mean: mean_kld,
        mean_error,
        p999: percentile(&kld, 0.999),
        nll_first: nll(f16, false),
        nll: nll(own, true),
        hit: share(own.iter().flat_map(|s| s.hit[half..].iter().copied())),
        same_top: share(own.iter().flat_map(|s| s.same_top[half..].iter().copied())),
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let n = values.len();
    (values[(n - 1) / 2] + values[n / 2]) / 2.0
}

/// As /proc/cpuinfo has it; "" elsewhere.
fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|l| l.starts_with("model name")).and_then(|l| l.split_once(':'));
    line.map_or_else(String::new, |(_, name)| name.trim().to_owned())
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_./@,=:+%".contains(&b);
    if !word.is_empty() && word.bytes().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// Divergences span many decades: three significant digits.
pub fn small(x: f64) -> String {
    if x == 0.0 {
        return "0".to_owned();
    }
    if !x.is_finite() {
        return "-".to_owned();
    }
    if x.abs() < 1e-4 {
        return format!("{x:.1e}");
    }
    let digits = (2 - x.abs().log10().floor() as i32).max(0) as usize;
    format!("{x:.digits$}")
}

/// An error: one significant digit.
pub fn error(x: f64) -> String {
    if x > 0.0 && x < 1.0 {
        let digits = -x.log10().floor() as usize;
        if digits > 5 {
            return format!("{x:.0e}");
        }
        return format!("{x:.digits$}");
    }
    format!("{x:.0}")
}

/// Bytes in a unit that people read.
pub fn bytes(n: f64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut n = n;
    for unit in units {
        if n < 1024.0 || unit == "TiB" {
            return if unit == "bytes" { format!("{n:.0} {unit}") } else { format!("{n:.1} {unit}") };
        }
        n /= 1024.0;
    }
    unreachable!("the last unit takes what is left")
}

impl Report {
    pub fn new(options: &Options, args: &[String], texts: Vec<Text>, contenders: Vec<Contender>, m: Measured) -> Self {
        let result = |t: usize, c: usize| -> Option<TextResult> {
            let [own, own_recall] = &m.scores[t][c];
            let [f16, f16_recall] = &m.scores[t][0];
            (!own.is_empty()).then(|| TextResult { divergence: divergence(&m.cuts[t], own, f16), recall: recall(own_recall, f16_recall) })
        };
        let results = (0..texts.len()).map(|t| (0..contenders.len()).map(|c| result(t, c)).collect()).collect();
        let medians = |c: usize| {
            let rounds = &m.speed[c];
            let at = |f: &dyn Fn(&super::run::Speed) -> &[f64]| (0..m.depths.len()).map(|d| median(rounds.iter().map(|r| f(r)[d]).collect())).collect();
            (!rounds.is_empty()).then(|| SpeedResult { prefill: at(&|r| &r.prefill), decode: at(&|r| &r.decode) })
        };
        let speed = (0..contenders.len()).map(medians).collect();
        Self {
            command: std::iter::once("palu".to_owned()).chain(args.iter().map(|a| quoted(a))).collect::<Vec<_>>().join(" "),
            model_file: options.model.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            n_thread: options.n_thread(),
            processor: processor(),
            speed_rounds: options.speed_rounds as usize,
            model: m.model,
            texts,
            cuts: m.cuts,
            contenders,
            caches: m.caches,
            results,
            depths: m.depths,
            speed,
        }
    }

    /// Contenders that the runtime took.
    pub fn shown(&self) -> Vec<usize> {
        (0..self.contenders.len()).filter(|&c| self.caches[c].is_ok()).collect()
    }

    pub fn kv_bytes(&self, c: usize) -> f64 {
        self.caches[c].as_ref().map_or(f64::NAN, |&b| b as f64)
    }

    pub fn bytes_per_token(&self, c: usize) -> f64 {
        self.kv_bytes(c) / self.model.n_ctx as f64
    }

    pub fn percent(&self, c: usize) -> f64 {
        100.0 * self.kv_bytes(c) / self.kv_bytes(0)
    }

    pub fn is_palu(&self, c: usize) -> bool {
        self.contenders[c].projection.is_some()
    }

    /// Projection files.
    fn n_file(&self) -> usize {
        let files = self.contenders.iter().filter_map(|c| match &c.cache {
            Cache::Palu { file, .. } => Some(file),
            Cache::Stock(_) => None,
        });
        files.collect::<std::collections::BTreeSet<_>>().len()
    }

    pub fn find_stock(&self, kind: &str) -> Option<usize> {
        self.shown().into_iter().find(|&c| !self.is_palu(c) && self.contenders[c].label == kind)
    }

    pub fn divergence(&self, t: usize, c: usize) -> Option<&Divergence> {
        self.results[t][c].as_ref().map(|r| &r.divergence)
    }

    pub fn recall(&self, t: usize, c: usize) -> Option<&Recall> {
        self.results[t][c].as_ref()?.recall.as_ref()
    }

    pub fn model_name(&self) -> &str {
        if self.model.name.is_empty() {
            &self.model_file
        } else {
            &self.model.name
        }
    }

    pub fn to_json(&self) -> Value {
        let caches: Vec<Value> = self
            .contenders
            .iter()
            .enumerate()
            .map(|(c, contender)| {
                let (kind, file) = match &contender.cache {
                    Cache::Stock(kind) => (kind.as_str(), None),
                    Cache::Palu { file, .. } => ("palu", Some(file.to_string_lossy().into_owned())),
                };
                let mut v = json!({ "label": contender.label, "type": kind, "file": file });
                match &self.caches[c] {
                    Ok(b) => {
                        v["kv_bytes"] = json!(b);
                        v["bytes_per_token"] = json!(self.bytes_per_token(c));
                        v["percent_of_f16"] = json!(self.percent(c));
                    }
                    Err(why) => v["refused"] = json!(why),
                }
                if let Some(p) = &contender.projection {
                    v["bits_per_value"] = json!(p.bits_per_value);
                    v["identity"] = json!(format!("{:016x}", p.identity));
                    v["calibration"] = json!(p.meta.calibration);
                    v["layers"] = p.layers.iter().map(|l| {
                        let side = |s: &crate::projection::SideProj| json!({
                            "channels": s.n_head_kv * s.head_dim, "rank": s.rank(), "mean_code_bits": s.code_bits(), "row_bytes": s.row_bytes,
                        });
                        json!({ "layer": l.il, "key": side(&l.sides[0]), "value": side(&l.sides[1]) })
                    }).collect();
                }
                if let Some(s) = &self.speed[c] {
                    v["speed"] = json!({ "prefill_tokens_per_second": s.prefill, "decode_tokens_per_second": s.decode });
                }
                v
            })
            .collect();
        let texts: Vec<Value> = (0..self.texts.len())
            .map(|t| {
                let (text, cut) = (&self.texts[t], &self.cuts[t]);
                let results: Vec<Value> = self
                    .shown()
                    .into_iter()
                    .filter_map(|c| {
                        let d = self.divergence(t, c)?;
                        let mut v = json!({
                            "cache": self.contenders[c].label,
                            "kld": {
                                "tokens": d.n, "mean": d.mean, "mean_error": d.mean_error, "median": d.median, "p90": d.p90,
                                "p99": d.p99, "p99_9": d.p999, "max": d.max,
                            },
                            "ppl": d.ppl,
                            "log_ppl_ratio": { "mean": d.log_ratio, "error": d.log_ratio_error },
                            "same_top": d.same_top,
                            "kld_by_position": d.by_position,
                        });
                        if let Some(r) = self.recall(t, c) {
                            v["recall"] = json!({
                                "tokens": r.n, "kld_mean": r.mean, "kld_mean_error": r.mean_error, "kld_p99_9": r.p999,
                                "nll_first": r.nll_first, "nll_repeat": r.nll, "hit": r.hit, "same_top": r.same_top,
                            });
                        }
                        Some(v)
                    })
                    .collect();
                json!({
                    "name": text.name,
                    "path": text.path.as_ref().map(|p| p.to_string_lossy().into_owned()),
                    "hash": format!("{:016x}", text.hash),
                    "chunk_tokens": cut.chunk,
                    "chunks": cut.n_chunk,
                    "recall_windows": cut.n_recall,
                    "recall_gap": cut.gap,
                    "results": results,
                })
            })
            .collect();
        json!({
            "version": 1,
            "command": self.command,
            "model": {
                "file": self.model_file, "name": self.model.name, "architecture": self.model.arch,
                "identity": format!("{:016x}", self.model.identity), "n_layer": self.model.n_layer,
                "n_ctx_train": self.model.n_ctx_train,
            },
            "context": self.model.n_ctx,
            "threads": self.n_thread,
            "processor": self.processor,
            "speed": { "depths": self.depths, "rounds": self.speed_rounds, "decode_tokens": DECODE, "prefill_tokens": PREFILL },
            "caches": caches,
            "texts": texts,
            "summary": self.sentences(),
        })
    }

    /// "1.2 times less than" and its like.
    fn times(own: f64, other: f64) -> String {
        let ratio = other / own;
        if (0.95..=1.05).contains(&ratio) {
            "about as much as".to_owned()
        } else if ratio > 1.0 {
            format!("{} times less than", two(ratio))
        } else {
            format!("{} times more than", two(1.0 / ratio))
        }
    }

    /// What a reader should know first, per projection: how it does on each text, on recall, in speed.
    pub fn verdicts(&self) -> Vec<(usize, Vec<String>)> {
        let rival = ["q4_0", "q5_0", "q8_0"].into_iter().find_map(|k| self.find_stock(k));
        let against = |own: f64, other: Option<f64>, with_bytes: bool| match (rival, other) {
            (Some(r), Some(other)) => {
                let bytes = if with_bytes { format!(", which takes {:.1}%", self.percent(r)) } else { String::new() };
                format!(", {} {}{bytes}", Self::times(own, other), self.contenders[r].label)
            }
            _ => String::new(),
        };
        let mut out = Vec::new();
        for c in self.shown().into_iter().filter(|&c| self.is_palu(c)) {
            let label = &self.contenders[c].label;
            let mut first = format!("At {:.1}% of the f16 cache's bytes, {label}", self.percent(c));
            if let (Cache::Palu { file, .. }, true) = (&self.contenders[c].cache, self.n_file() > 1) {
                let _ = write!(first, " ({})", file.file_name().unwrap_or_default().to_string_lossy());
            }
            let mut rest = Vec::new();
            for t in 0..self.texts.len() {
                let Some(d) = self.divergence(t, c) else { continue };
                let other = rival.and_then(|r| self.divergence(t, r)).map(|d| d.mean);
                let name = &self.texts[t].name;
                if t == 0 {
                    let _ = write!(first, " diverges by {} nats per token on {name}{}.", small(d.mean), against(d.mean, other, true));
                } else {
                    rest.push(format!("On {name} it diverges by {}{}.", small(d.mean), against(d.mean, other, false)));
                }
            }
            if let Some((t, r)) = (0..self.texts.len()).find_map(|t| Some((t, self.recall(t, c)?))) {
                let other = rival.and_then(|r| self.recall(t, r)).map(|r| r.mean);
                rest.push(format!(
                    "Where a passage is repeated {} tokens later, it diverges by {}{}.",
                    self.cuts[t].gap,
                    small(r.mean),
                    against(r.mean, other, false)
                ));
            }
            if let (Some(own), Some(f16), Some(&depth)) = (&self.speed[c], &self.speed[0], self.depths.last()) {
                let i = self.depths.len() - 1;
                rest.push(format!(
                    "With {depth} tokens in the cache it decodes at {}x and reads a prompt at {}x the f16 cache's speed.",
                    two(own.decode[i] / f16.decode[i]),
                    two(own.prefill[i] / f16.prefill[i])
                ));
            }
            out.push((c, vec![first, rest.join(" ")]));
        }
        out
    }

    pub fn sentences(&self) -> Vec<String> {
        self.verdicts().into_iter().map(|(_, s)| s.join(" ")).chain(self.warnings()).collect()
    }

    /// What makes figures look better than they are.
    pub fn warnings(&self) -> Vec<String> {
        let mut out = Vec::new();
        for text in &self.texts {
            let calibrated = |c: &Contender| c.projection.as_ref().is_some_and(|p| p.meta.calibration_hash == text.hash);
            if self.contenders.iter().any(calibrated) {
                out.push(format!("Caution: {} is the very text that a projection was calibrated on; figures on other text will be worse.", text.name));
            }
        }
        out
    }

    /// How much of a text was run.
    pub fn about_text(&self, t: usize) -> String {
        let (text, cut) = (&self.texts[t], &self.cuts[t]);
        let counted = cut.n_chunk * (cut.chunk - 1 - first_counted(cut.chunk));
        let what = match text.path {
            Some(_) => String::new(),
            None => "Code, dialogue, lists, records and other languages, to see how a cache does on text unlike an encyclopedia. ".to_owned(),
        };
        let few = if counted < 4000 { " That is few: take the 99.9% figure as a rough one." } else { "" };
        format!("{what}{} chunk{} of {} tokens, {counted} tokens scored.{few}", cut.n_chunk, if cut.n_chunk == 1 { "" } else { "s" }, cut.chunk)
    }

    /// For the terminal.
    pub fn to_text(&self) -> String {
        let mut s = format!("\n{} ({}, {} layers), {} threads\n", self.model_name(), self.model.arch, self.model.n_layer, self.n_thread);
        for t in 0..self.texts.len() {
            let cut = &self.cuts[t];
            let _ = writeln!(
                s,
                "\n{}: {} of {} tokens; recall of {} passages of {PASSAGE} tokens",
                self.texts[t].name,
                if cut.n_chunk == 1 { "1 chunk".to_owned() } else { format!("{} chunks", cut.n_chunk) },
                cut.chunk,
                cut.n_recall
            );
            let mut rows = vec![
                ["cache", "bytes/token", "of f16", "mean KLD", "median", "99.9%", "PPL", "same top", "recall KLD", "recall hits"].map(str::to_owned).to_vec(),
            ];
            for c in self.shown() {
                let Some(d) = self.divergence(t, c) else { continue };
                let recall = self.recall(t, c);
                rows.push(vec![
                    self.contenders[c].label.clone(),
                    format!("{:.0}", self.bytes_per_token(c)),
                    format!("{:.1}%", self.percent(c)),
                    small(d.mean),
                    small(d.median),
                    small(d.p999),
                    format!("{:.3}", d.ppl),
                    format!("{:.2}%", 100.0 * d.same_top),
                    recall.map_or_else(|| "-".into(), |r| small(r.mean)),
                    recall.map_or_else(|| "-".into(), |r| format!("{:.1}%", 100.0 * r.hit)),
                ]);
            }
            s += &aligned(&rows);
        }
        if !self.depths.is_empty() {
            let _ = writeln!(s, "\ntokens per second ({}): decoding, and a prompt of {PREFILL}, after so many tokens", if self.speed_rounds == 1 { "one round".to_owned() } else { format!("median of {} rounds", self.speed_rounds) });
            let head = |what: &str| self.depths.iter().map(|d| format!("{what} @{d}")).collect::<Vec<_>>();
            let mut rows = vec![[vec!["cache".to_owned()], head("decode"), head("prompt")].concat()];
            for c in self.shown() {
                let Some(speed) = &self.speed[c] else { continue };
                let cells = speed.decode.iter().chain(&speed.prefill).map(|v| format!("{v:.0}"));
                rows.push(std::iter::once(self.contenders[c].label.clone()).chain(cells).collect());
            }
            s += &aligned(&rows);
        }
        s.push('\n');
        for sentence in self.sentences() {
            s += &sentence;
            s.push('\n');
        }
        for (contender, cache) in self.contenders.iter().zip(&self.caches) {
            if let Err(why) = cache {
                let _ = writeln!(s, "left out {}: {why}", contender.label);
            }
        }
        s
    }

    /// Windows of a kind over all texts.
    pub fn n_window(&self, kind: Kind) -> usize {
        debug_assert!(KINDS.contains(&kind));
        self.cuts.iter().map(|c| c.n_window(kind)).sum()
    }
}

/// Two significant digits.
pub fn two(x: f64) -> String {
    if x >= 9.95 {
        format!("{x:.0}")
    } else if x >= 0.995 {
        format!("{x:.1}")
    } else {
        format!("{x:.2}")
    }
}

/// A table with the first column to the left and the others to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    let width = |i: usize| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut s = String::new();
    for row in rows {
        for (i, (cell, &w)) in row.iter().zip(&widths).enumerate() {
            let _ = if i == 0 { write!(s, "{cell:<w$}") } else { write!(s, "  {cell:>w$}") };
        }
        s.push('\n');
    }
    s
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_as_people_read_them() {
        assert_eq!([0.0, 0.002_561, 0.1063, 1.2345, 12.345, 123.45, 0.000_012_3].map(small), ["0", "0.00256", "0.106", "1.23", "12.3", "123", "1.2e-5"]);
        assert_eq!([0.0, 0.000_118, 0.000_007_1, 0.25].map(error), ["0", "0.0001", "7e-6", "0.2"]);
        assert_eq!([1.0, 0.5, 2.345, 12.3].map(two), ["1.0", "0.50", "2.3", "12"]);
        assert_eq!([100.0, 2048.0, 3.5 * 1048576.0].map(bytes), ["100 bytes", "2.0 KiB", "3.5 MiB"]);
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
        assert_eq!(quoted("--palu=x@2.25"), "--palu=x@2.25");
        assert_eq!(Report::times(1.0, 4.0), "4.0 times less than");
        assert_eq!(Report::times(4.0, 1.0), "4.0 times more than");
        assert_eq!(Report::times(1.0, 1.01), "about as much as");
    }
}
