//! The page: one HTML file with everything in it.

use super::chart::{bits, dots, escape, Dot, Plot, Point, Series, Strip};
use super::report::{bytes, error, small, Divergence, Report};
use super::run::{DECODE, PREFILL};
use super::windows::{first_counted, Kind, PASSAGE};
use crate::convert::host::Cache;
use crate::layout::SEGMENT;
use crate::projection::{Side, SIDES};
use std::fmt::Write;

const STYLE: &str = include_str!("page.css");

/// The class of a cache's colour: f16, s0.. for llama.cpp's, p0.. for projections.
fn class(report: &Report, c: usize) -> String {
    if c == 0 {
        return "f16".to_owned();
    }
    let is_palu = report.is_palu(c);
    let before = (1..c).filter(|&i| report.is_palu(i) == is_palu).count();
    if is_palu {
        format!("p{}", before % 4)
    } else {
        format!("s{}", before % 5)
    }
}

fn label(report: &Report, c: usize) -> &str {
    &report.contenders[c].label
}

fn figure(title: &str, svg: &str, caption: &str) -> String {
    let caption = if caption.is_empty() { String::new() } else { format!("<figcaption>{caption}</figcaption>") };
    format!("<figure><h4>{}</h4>{svg}{caption}</figure>", escape(title))
}

/// Caches in lines by what made them: llama.cpp's, and each projection file's budgets.
fn families(report: &Report) -> Vec<(String, Vec<usize>)> {
    let mut families: Vec<(Option<&std::path::Path>, Vec<usize>)> = Vec::new();
    for c in report.shown().into_iter().filter(|&c| c > 0) {
        let file = match &report.contenders[c].cache {
            Cache::Stock(_) => None,
            Cache::Palu { file, .. } => Some(file.as_path()),
        };
        match families.iter_mut().find(|f| f.0 == file) {
            Some(f) => f.1.push(c),
            None => families.push((file, vec![c])),
        }
    }
    let mut out = Vec::new();
    for (file, mut members) in families {
        members.sort_by(|&a, &b| report.percent(a).total_cmp(&report.percent(b)));
        let class = file.map_or_else(|| "stock".to_owned(), |_| class(report, members[members.len() - 1]));
        out.push((class, members));
    }
    out
}

/// A figure of every cache against its bytes.
fn against_bytes(report: &Report, t: usize, title: &str, what: &str, f: impl Fn(&Divergence) -> (f64, f64)) -> String {
    let mut series = Vec::new();
    for (line, members) in families(report) {
        let value = |c: usize| report.divergence(t, c).map(&f);
        let point = |c: usize, label: &str| {
            let (y, error) = value(c)?;
            let hint = format!("{}: {} at {:.1}% of f16's bytes", report.contenders[c].label, small(y), report.percent(c));
            Some(Point { x: report.percent(c), y, error, label: label.to_owned(), hint })
        };
        let points = members.iter().filter_map(|&c| point(c, "")).collect();
        series.push(Series { class: line, label: String::new(), points, round: true, line: true });
        for &c in &members {
            let points = point(c, label(report, c)).into_iter().collect();
            series.push(Series { class: class(report, c), label: String::new(), points, round: report.is_palu(c), line: false });
        }
    }
    let plot = Plot {
        narrow: true,
        about: format!("{title} of each cache against its bytes, {}", report.texts[t].name),
        x_label: "bytes, % of the f16 cache",
        y_label: what,
        x_log: false,
        y_log: true,
        x_from: 0.0,
        x_to: 60.0,
        series,
        shade: None,
    };
    figure(title, &plot.svg(), "")
}

fn along_position(report: &Report, t: usize) -> String {
    let cut = &report.cuts[t];
    let mut series = Vec::new();
    for c in report.shown().into_iter().filter(|&c| c > 0) {
        let Some(d) = report.divergence(t, c) else { continue };
        let width = cut.chunk as f64 / d.by_position.len() as f64;
        let point = |(i, &y): (usize, &f64)| Point {
            x: (i as f64 + 0.5) * width,
            y,
            error: 0.0,
            label: String::new(),
            hint: format!("{}: {} at tokens {:.0} to {:.0}", label(report, c), small(y), i as f64 * width, (i + 1) as f64 * width),
        };
        let points = d.by_position.iter().enumerate().filter(|(_, y)| y.is_finite()).map(point).collect();
        series.push(Series { class: class(report, c), label: label(report, c).to_owned(), points, round: report.is_palu(c), line: true });
    }
    let plot = Plot {
        narrow: false,
        about: format!("Mean divergence along the position, {}", report.texts[t].name),
        x_label: "position in the chunk, tokens",
        y_label: "mean KLD, nats per token (log scale)",
        x_log: false,
        y_log: true,
        x_from: 0.0,
        x_to: cut.chunk as f64,
        series,
        shade: Some((0.0, first_counted(cut.chunk) as f64, "not counted")),
    };
    figure(&format!("On {}", report.texts[t].name), &plot.svg(), "")
}

fn recall(report: &Report, t: usize) -> Option<String> {
    let f16 = report.recall(t, 0)?;
    let rows: Vec<Dot> = report
        .shown()
        .into_iter()
        .filter(|&c| c > 0)
        .filter_map(|c| {
            let r = report.recall(t, c)?;
            Some(Dot {
                class: class(report, c),
                label: label(report, c).to_owned(),
                round: report.is_palu(c),
                value: r.mean,
                error: r.mean_error,
                note: format!("{:.1}%", 100.0 * r.hit),
            })
        })
        .collect();
    let about = format!("Divergence on repeated passages, {}", report.texts[t].name);
    let caption = format!(
        "{} passages of {PASSAGE} tokens, repeated {} tokens after their end; {} scored tokens. Bars: two standard errors. \
         With the f16 cache the model guesses {:.1}% of the repeat's tokens. Its surprise at them falls from {:.2} nats per token where a \
         passage stands first to {:.2} where it is repeated{}",
        report.cuts[t].n_recall,
        report.cuts[t].gap,
        f16.n,
        100.0 * f16.hit,
        f16.nll_first,
        f16.nll,
        if f16.nll < 0.8 * f16.nll_first { ": it does look back." } else { ": it makes little use of text this far back." }
    );
    Some(figure(
        &format!("On {}", report.texts[t].name),
        &dots(&about, "mean KLD on the repeat, nats per token (log scale)", "guessed right", &rows),
        &caption,
    ))
}

fn map(report: &Report, c: usize) -> String {
    let Some(projection) = &report.contenders[c].projection else { return String::new() };
    let side = |side: Side| {
        let strips: Vec<Strip> = projection
            .layers
            .iter()
            .map(|l| {
                let s = l.side(side);
                let width = s.n_head_kv * s.head_dim;
                Strip {
                    layer: l.il,
                    bits: s.groups.iter().flat_map(|g| g.bits.clone()).collect(),
                    segment: SEGMENT,
                    rank: s.rank(),
                    width,
                    per_value: 8.0 * s.row_bytes as f64 / width as f64,
                }
            })
            .collect();
        let name = match side {
            Side::Key => "Keys (before RoPE)",
            Side::Value => "Values",
        };
        figure(name, &bits(&format!("{name}: bits per channel in each layer, {}", label(report, c)), &strips), "")
    };
    format!("<div class=\"row\">{}</div>", SIDES.map(side).concat())
}

fn speed(report: &Report, title: &str, decode: bool) -> String {
    let mut series = Vec::new();
    for c in report.shown() {
        let Some(s) = &report.speed[c] else { continue };
        let values = if decode { &s.decode } else { &s.prefill };
        let point = |(&depth, &y): (&usize, &f64)| Point {
            x: depth as f64,
            y,
            error: 0.0,
            label: String::new(),
            hint: format!("{}: {y:.0} tokens per second after {depth} tokens", label(report, c)),
        };
        let points = report.depths.iter().zip(values).map(point).collect();
        series.push(Series { class: class(report, c), label: label(report, c).to_owned(), points, round: report.is_palu(c), line: true });
    }
    let plot = Plot {
        narrow: false,
        about: format!("{title} against depth"),
        x_label: "depth: tokens already in the cache",
        y_label: "tokens per second",
        x_log: false,
        y_log: false,
        x_from: 0.0,
        x_to: report.depths.last().map_or(1.0, |&d| d as f64),
        series,
        shade: None,
    };
    figure(title, &plot.svg(), "")
}

fn table(report: &Report, t: usize) -> String {
    let has_recall = report.recall(t, 0).is_some();
    let head = [
        "cache", "bytes/token", "of f16", "mean KLD", "median", "99.9%", "perplexity", "same top token",
    ];
    let mut s = String::from("<div class=\"scroll\"><table><thead><tr>");
    for h in head.into_iter().chain(["recall KLD", "recall hits"].into_iter().filter(|_| has_recall)) {
        let _ = write!(s, "<th scope=\"col\">{h}</th>");
    }
    s.push_str("</tr></thead><tbody>");
    for c in report.shown() {
        let Some(d) = report.divergence(t, c) else { continue };
        let _ = write!(
            s,
            "<tr class=\"{}{}\"><th scope=\"row\">{}</th><td>{:.0}</td><td>{:.1}%</td><td>{} <small>± {}</small></td><td>{}</td><td>{}</td><td>{:.3}</td><td>{:.2}%</td>",
            class(report, c),
            if report.is_palu(c) { " palu" } else { "" },
            escape(label(report, c)),
            report.bytes_per_token(c),
            report.percent(c),
            small(d.mean),
            error(d.mean_error),
            small(d.median),
            small(d.p999),
            d.ppl,
            100.0 * d.same_top
        );
        if let Some(r) = report.recall(t, c) {
            let _ = write!(s, "<td>{} <small>± {}</small></td><td>{:.1}%</td>", small(r.mean), error(r.mean_error), 100.0 * r.hit);
        }
        s.push_str("</tr>");
    }
    s.push_str("</tbody></table></div>");
    s
}

fn speed_table(report: &Report) -> String {
    let mut s = String::from("<div class=\"scroll\"><table><thead><tr><th scope=\"col\" rowspan=\"2\">tokens per second</th>");
    for what in ["decoding at depth", "reading a prompt at depth"] {
        let _ = write!(s, "<th scope=\"colgroup\" colspan=\"{}\">{what}</th>", report.depths.len());
    }
    s.push_str("</tr><tr>");
    for d in report.depths.iter().chain(&report.depths) {
        let _ = write!(s, "<th scope=\"col\">{d}</th>");
    }
    s.push_str("</tr></thead><tbody>");
    let Some(f16) = &report.speed[0] else { return String::new() };
    for c in report.shown() {
        let Some(own) = &report.speed[c] else { continue };
        let _ = write!(
            s,
            "<tr class=\"{}{}\"><th scope=\"row\">{}</th>",
            class(report, c),
            if report.is_palu(c) { " palu" } else { "" },
            escape(label(report, c))
        );
        for (v, base) in own.decode.iter().chain(&own.prefill).zip(f16.decode.iter().chain(&f16.prefill)) {
            let _ = write!(s, "<td>{v:.0}<br><small>{:.2}x</small></td>", v / base);
        }
        s.push_str("</tr>");
    }
    s.push_str("</tbody></table></div>");
    s
}

pub fn html(report: &Report) -> String {
    let mut s = String::new();
    let model = escape(report.model_name());
    let _ = write!(
        s,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <link rel=\"icon\" href=\"data:,\"><title>KV caches compared on {model}</title><style>\n{STYLE}</style></head><body><main>\n"
    );
    let _ = write!(s, "<h1>KV caches compared on {model}</h1>\n<p class=\"facts\">");
    let mut facts = vec![
        report.model_file.clone(),
        format!("{}, {} layers", report.model.arch, report.model.n_layer),
        format!("context of {} tokens, f16 cache {}", report.model.n_ctx, bytes(report.kv_bytes(0))),
        format!("{} threads", report.n_thread),
    ];
    if !report.processor.is_empty() {
        facts.push(report.processor.clone());
    }
    let _ = writeln!(s, "{}</p>", escape(&facts.join(" · ")));

    for (c, sentences) in report.verdicts() {
        let _ = write!(s, "<div class=\"verdict {}\" style=\"border-left-color:var(--c)\">", class(report, c));
        for sentence in sentences {
            let _ = write!(s, "<p>{}</p>", escape(&sentence));
        }
        s.push_str("</div>\n");
    }
    for warning in report.warnings() {
        let _ = writeln!(s, "<div class=\"verdict warning\"><p>{}</p></div>", escape(&warning));
    }

    s.push_str(
        "<p>While a language model writes, it keeps the keys and values of every token so far: the KV cache. Storing them in fewer bytes \
         makes room for longer texts, and changes the model's predictions a little. How much is measured here as the <b>KL divergence</b> (KLD) \
         from the model's predictions with an f16 cache, in nats per token: 0 is the same, and lower is better. The mean says how much on \
         the whole; the 99.9% figure says how bad it is at the worst thousandth of all tokens.</p>\n",
    );

    s.push_str("<h2>Divergence against bytes</h2><p>Down and to the left is better: fewer bytes, closer to the f16 cache. Squares are llama.cpp's own caches, circles are projection files at their budgets.</p>\n");
    for t in 0..report.texts.len() {
        let _ = write!(s, "<h3>On {}</h3><p class=\"soft\">{}</p><div class=\"row\">", escape(&report.texts[t].name), escape(&report.about_text(t)));
        let y = "nats per token (log scale)";
        s += &against_bytes(report, t, "Mean KLD", y, |d| (d.mean, 2.0 * d.mean_error));
        s += &against_bytes(report, t, "Median KLD", y, |d| (d.median, 0.0));
        s += &against_bytes(report, t, "99.9% KLD", y, |d| (d.p999, 0.0));
        s.push_str("</div>\n");
        s += &table(report, t);
    }

    let recalls: Vec<String> = (0..report.texts.len()).filter_map(|t| recall(report, t)).collect();
    s.push_str("<h2>Recall of far text</h2>");
    if recalls.is_empty() {
        s.push_str("<p>Not measured: it takes a context of at least 1513 tokens, and texts that fill it.</p>");
    } else {
        let _ = writeln!(
            s,
            "<p>A passage is repeated far behind itself. To predict the repeat, the model has to read it out of the cache, so damage to old keys and values shows here first.</p><div class=\"row\">{}</div>",
            recalls.concat()
        );
    }

    let _ = writeln!(
        s,
        "<h2>Divergence along the position</h2><p>Does the error grow with the length of the text? Each point is the mean over a sixteenth of the chunk. The shaded first half, where little is in the cache yet, does not count in the figures above.</p><div class=\"row\">{}</div>",
        (0..report.texts.len()).map(|t| along_position(report, t)).collect::<String>()
    );

    let mut maps = report.shown().into_iter().filter(|&c| report.is_palu(c)).peekable();
    if maps.peek().is_some() {
        s.push_str(
            "<h2>Where the bits go</h2><p>A projection keeps the directions of a layer's keys and values that matter most (the rank), and gives each \
             as many bits as it is worth. A strip is a layer; its channels are sorted by their bits, and what is left blank is not stored at all.</p><div class=\"legend\">",
        );
        for b in 0..=8 {
            let _ = write!(s, "<span><i class=\"b{b}\"></i>{}</span>", if b == 0 { "not kept".to_owned() } else { format!("{b} bit{}", if b > 1 { "s" } else { "" }) });
        }
        s.push_str("</div>\n");
        for (i, c) in maps.enumerate() {
            let _ = writeln!(
                s,
                "<details{}><summary>{}: {:.2} bits per value, {:.1}% of f16</summary>{}</details>",
                if i == 0 { " open" } else { "" },
                escape(label(report, c)),
                report.contenders[c].projection.as_ref().map_or(0.0, |p| p.bits_per_value),
                report.percent(c),
                map(report, c)
            );
        }
    }

    if !report.depths.is_empty() {
        let _ = write!(
            s,
            "<h2>Speed against depth</h2><p>Higher is better. {}, on {} threads; other machines have other ratios.</p><div class=\"row\">",
            if report.speed_rounds == 1 { "One round".to_owned() } else { format!("Medians of {} rounds in which the caches took turns", report.speed_rounds) },
            report.n_thread
        );
        s += &speed(report, &format!("Decoding, {DECODE} tokens one at a time"), true);
        s += &speed(report, &format!("Reading a prompt of {PREFILL} tokens"), false);
        s.push_str("</div>\n");
        s += &speed_table(report);
    }

    s.push_str("<h2>How it was measured</h2><dl>");
    let chunks = report.n_window(Kind::Chunk);
    let mut how = vec![
        ("Reference".to_owned(), "the same model with an f16 cache, on the same tokens".to_owned()),
        (
            "Divergence".to_owned(),
            format!(
                "over {chunks} chunks from the texts' beginnings, each on an empty cache; the second half of a chunk counts. This is \
                 the definition of llama-perplexity --kl-divergence, and the figures are the same as its figures."
            ),
        ),
        (
            "Bytes".to_owned(),
            format!("what the runtime allocated for a context of {} tokens, everything included, divided by the tokens", report.model.n_ctx),
        ),
        ("llama.cpp's caches".to_owned(), "same type for keys and values, flash attention on, rotation as llama.cpp has it by default".to_owned()),
    ];
    for c in report.shown() {
        let contender = &report.contenders[c];
        if let (Cache::Palu { file, .. }, Some(p)) = (&contender.cache, &contender.projection) {
            let m = &p.meta;
            how.push((
                contender.label.clone(),
                format!(
                    "{} at {:.3} bits per value; calibrated on {} ({} tokens), {}; made with {}",
                    file.display(),
                    p.bits_per_value,
                    m.calibration,
                    m.calibration_tokens,
                    m.metric,
                    m.options
                ),
            ));
        }
    }
    for (contender, cache) in report.contenders.iter().zip(&report.caches) {
        if let Err(why) = cache {
            how.push((contender.label.clone(), format!("left out: {why}")));
        }
    }
    for (name, what) in how {
        let _ = write!(s, "<dt>{}</dt><dd>{}</dd>", escape(&name), escape(&what));
    }
    let _ = write!(
        s,
        "</dl><p>The command; <code>results.json</code> beside this page has all figures:</p><pre>{}</pre>\n</main></body></html>\n",
        escape(&report.command)
    );
    s
}
