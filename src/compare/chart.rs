//! Plots as inline SVG. Colours are the page's variables, so that plots follow its light and dark themes.

use super::report::small;
use std::fmt::Write;

/// Plots of two columns are this wide, in units of about a pixel.
const WIDTH: f64 = 400.0;
/// Plots of three columns; on a phone, either is as wide as the page.
pub const NARROW: f64 = 350.0;
/// Width of a character of labels, on average.
const CHAR: f64 = 7.9;
const LINE: f64 = 14.0;

pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Where numbers lie along an axis.
#[derive(Clone, Copy)]
struct Scale {
    log: bool,
    low: f64,
    high: f64,
    start: f64,
    end: f64,
}

impl Scale {
    fn at(&self, v: f64) -> f64 {
        let f = |v: f64| if self.log { v.max(1e-300).ln() } else { v };
        let part = (f(v) - f(self.low)) / (f(self.high) - f(self.low));
        self.start + part.clamp(0.0, 1.0) * (self.end - self.start)
    }

    fn ticks(&self) -> Vec<f64> {
        if !self.log {
            let step = step(self.high - self.low, 5.0);
            let first = (self.low / step).ceil() as i64;
            return (first..).map(|i| i as f64 * step).take_while(|&v| v <= self.high * (1.0 + 1e-9)).collect();
        }
        let decades = (self.high / self.low).log10();
        let parts: &[f64] = if decades > 4.0 { &[1.0] } else if decades > 1.6 { &[1.0, 3.0] } else { &[1.0, 2.0, 5.0] };
        let range = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let all = range.flat_map(|e| parts.iter().map(move |p| p * 10f64.powi(e)));
        all.filter(|&v| v >= self.low * (1.0 - 1e-9) && v <= self.high * (1.0 + 1e-9)).collect()
    }
}

/// A round distance between about `n` ticks.
fn step(span: f64, n: f64) -> f64 {
    let rough = span / n;
    let unit = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|s| s * unit).find(|&s| s >= rough * 0.999).unwrap_or(rough)
}

/// As tick labels have it: no more digits than needed.
fn short(v: f64) -> String {
    if v == 0.0 {
        return "0".to_owned();
    }
    if v.abs() < 9e-5 {
        return format!("{v:.0e}");
    }
    let text = format!("{v:.5}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

pub struct Point {
    pub x: f64,
    pub y: f64,
    /// half of an error bar
    pub error: f64,
    /// beside the point, or ""
    pub label: String,
    /// what a pointer that rests on it shows
    pub hint: String,
}

pub struct Series {
    /// CSS class that gives the colour
    pub class: String,
    /// at the line's end, or "" for none
    pub label: String,
    pub points: Vec<Point>,
    /// circles, else squares
    pub round: bool,
    pub line: bool,
}

pub struct Plot<'a> {
    pub narrow: bool,
    /// for readers that cannot see it
    pub about: String,
    pub x_label: &'a str,
    pub y_label: &'a str,
    pub x_log: bool,
    pub y_log: bool,
    /// the axes begin here at the latest
    pub x_from: f64,
    pub x_to: f64,
    pub series: Vec<Series>,
    /// a stretch of x that is shaded, and why
    pub shade: Option<(f64, f64, &'a str)>,
}

#[derive(Clone, Copy)]
struct Rect {
    x: f64,
    y: f64,
    w: f64,
    h: f64,
}

impl Rect {
    fn overlap(&self, o: &Rect) -> f64 {
        let w = (self.x + self.w).min(o.x + o.w) - self.x.max(o.x);
        let h = (self.y + self.h).min(o.y + o.h) - self.y.max(o.y);
        w.max(0.0) * h.max(0.0)
    }
}

fn open(s: &mut String, width: f64, height: f64, about: &str) {
    let _ = write!(s, "<svg viewBox=\"0 0 {width} {height:.0}\" role=\"img\" aria-label=\"{}\">", escape(about));
}

fn text(s: &mut String, x: f64, y: f64, anchor: &str, class: &str, what: &str) {
    let _ = write!(s, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" class=\"{class}\">{}</text>", escape(what));
}

/// Moves labels apart, keeping their order; `y` are their middles.
fn spread(y: &mut [f64], low: f64, high: f64) {
    let mut order: Vec<usize> = (0..y.len()).collect();
    order.sort_by(|&a, &b| y[a].total_cmp(&y[b]));
    let mut last = low - LINE;
    for &i in &order {
        y[i] = y[i].max(last + LINE);
        last = y[i];
    }
    let mut next = high + LINE;
    for &i in order.iter().rev() {
        y[i] = y[i].min(next - LINE);
        next = y[i];
    }
}

impl Plot<'_> {
    pub fn svg(&self) -> String {
        let (width, height) = (if self.narrow { NARROW } else { WIDTH }, 290.0);
        let points = || self.series.iter().flat_map(|s| &s.points);
        let ends = self.series.iter().map(|s| s.label.chars().count()).max().unwrap_or(0);
        let right = if ends > 0 { (ends as f64 * CHAR + 12.0).min(130.0) } else { 14.0 };
        let (left, top, bottom) = (56.0, 24.0, 44.0);
        let shown = |v: f64| !self.y_log || v > 0.0;
        let (mut low, mut high) = points().map(|p| p.y).filter(|&y| shown(y) && y.is_finite()).fold((f64::INFINITY, 0.0), |(a, b): (f64, f64), y| (a.min(y), b.max(y)));
        if !low.is_finite() {
            (low, high) = if self.y_log { (1e-3, 1.0) } else { (0.0, 1.0) };
        }
        if self.y_log {
            (low, high) = (low / 1.6, high * 1.6);
        } else {
            (low, high) = (0.0, if high > 0.0 { high * 1.08 } else { 1.0 });
        }
        let y = Scale { log: self.y_log, low, high, start: height - bottom, end: top };
        let x_high = points().map(|p| p.x).fold(self.x_to, f64::max);
        let x_low = points().map(|p| p.x).fold(self.x_from, f64::min);
        let x = Scale { log: self.x_log, low: x_low, high: x_high.max(x_low + 1e-9), start: left, end: width - right };

        let mut s = String::new();
        open(&mut s, width, height, &self.about);
        if let Some((from, to, why)) = self.shade {
            let (a, b) = (x.at(from), x.at(to));
            let _ = write!(s, "<rect class=\"shade\" x=\"{a:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"{:.1}\"/>", b - a, height - bottom - top);
            text(&mut s, (a + b) / 2.0, top + 14.0, "middle", "note", why);
        }
        text(&mut s, 4.0, 12.0, "start", "axis", self.y_label);
        text(&mut s, (left + width - right) / 2.0, height - 8.0, "middle", "axis", self.x_label);
        for v in y.ticks() {
            let at = y.at(v);
            let _ = write!(s, "<line class=\"grid\" x1=\"{left}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>", width - right);
            text(&mut s, left - 6.0, at + 4.0, "end", "tick", &short(v));
        }
        let _ = write!(s, "<line class=\"base\" x1=\"{left}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>", width - right, at = height - bottom);
        for v in x.ticks() {
            let at = x.at(v);
            let _ = write!(s, "<line class=\"base\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>", height - bottom, height - bottom + 4.0);
            text(&mut s, at, height - bottom + 17.0, "middle", "tick", &short(v));
        }

        let mut taken: Vec<Rect> = Vec::new();
        for series in &self.series {
            let at: Vec<(f64, f64)> = series.points.iter().filter(|p| shown(p.y)).map(|p| (x.at(p.x), y.at(p.y))).collect();
            if series.line && at.len() > 1 {
                let path: Vec<String> = at.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
                let _ = write!(s, "<polyline class=\"line {}\" points=\"{}\"/>", series.class, path.join(" "));
            }
            taken.extend(at.iter().map(|(x, y)| Rect { x: x - 5.0, y: y - 5.0, w: 10.0, h: 10.0 }));
            // labels keep off the lines too
            for (a, b) in at.windows(2).filter(|_| series.line).map(|w| (w[0], w[1])) {
                let n = ((b.0 - a.0).hypot(b.1 - a.1) / 4.0).ceil();
                let along = |i: f64| Rect { x: a.0 + (b.0 - a.0) * i / n - 2.0, y: a.1 + (b.1 - a.1) * i / n - 2.0, w: 4.0, h: 4.0 };
                taken.extend((1..n as usize).map(|i| along(i as f64)));
            }
        }
        for series in &self.series {
            for p in series.points.iter().filter(|p| shown(p.y)) {
                let (px, py) = (x.at(p.x), y.at(p.y));
                if p.error > 0.0 {
                    let (a, b) = (y.at(p.y + p.error), y.at((p.y - p.error).max(y.low)));
                    let _ = write!(s, "<line class=\"bar {}\" x1=\"{px:.1}\" x2=\"{px:.1}\" y1=\"{a:.1}\" y2=\"{b:.1}\"/>", series.class);
                }
                let hint = escape(&p.hint);
                let _ = if series.round {
                    write!(s, "<circle class=\"mark {}\" cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"4.5\"><title>{hint}</title></circle>", series.class)
                } else {
                    write!(s, "<rect class=\"mark {}\" x=\"{:.1}\" y=\"{:.1}\" width=\"8\" height=\"8\"><title>{hint}</title></rect>", series.class, px - 4.0, py - 4.0)
                };
            }
        }
        // labels beside points, each where it covers least
        for (series, p) in self.series.iter().flat_map(|s| s.points.iter().map(move |p| (s, p))) {
            if p.label.is_empty() || !shown(p.y) {
                continue;
            }
            let (px, py) = (x.at(p.x), y.at(p.y));
            let w = p.label.chars().count() as f64 * CHAR;
            let spots = [(8.0, 4.0), (-8.0 - w, 4.0), (-w / 2.0, -9.0), (-w / 2.0, 18.0), (8.0, -8.0), (8.0, 16.0), (-8.0 - w, -8.0), (-8.0 - w, 16.0)];
            let cost = |&(dx, dy): &(f64, f64)| {
                let r = Rect { x: px + dx, y: py + dy - 10.0, w, h: LINE - 2.0 };
                let inside = Rect { x: left, y: top - 12.0, w: width - left - 2.0, h: height - bottom - top + 12.0 };
                taken.iter().map(|t| t.overlap(&r)).sum::<f64>() + 4.0 * (r.w * r.h - r.overlap(&inside))
            };
            let best = spots.iter().min_by(|a, b| cost(a).total_cmp(&cost(b))).copied().unwrap_or(spots[0]);
            taken.push(Rect { x: px + best.0, y: py + best.1 - 10.0, w, h: LINE - 2.0 });
            text(&mut s, px + best.0, py + best.1, "start", &format!("label {}", series.class), &p.label);
        }
        // labels at the lines' ends
        let ended: Vec<&Series> = self.series.iter().filter(|s| !s.label.is_empty() && s.points.last().is_some_and(|p| shown(p.y))).collect();
        let mut middles: Vec<f64> = ended.iter().map(|s| y.at(s.points.last().map_or(0.0, |p| p.y))).collect();
        spread(&mut middles, top, height - bottom);
        for (series, middle) in ended.into_iter().zip(middles) {
            text(&mut s, width - right + 8.0, middle + 4.0, "start", &format!("label {}", series.class), &series.label);
        }
        s.push_str("</svg>");
        s
    }
}

/// One row of a [`dots`] plot.
pub struct Dot {
    pub class: String,
    pub label: String,
    pub round: bool,
    pub value: f64,
    pub error: f64,
    /// at the row's end
    pub note: String,
}

/// Values on a logarithmic axis, one row each, with error bars of twice the standard error.
pub fn dots(about: &str, x_label: &str, note_label: &str, rows: &[Dot]) -> String {
    let row = 26.0;
    let height = 30.0 + row * rows.len() as f64 + 44.0;
    let left = rows.iter().map(|r| r.label.chars().count()).max().unwrap_or(0) as f64 * CHAR + 14.0;
    let right = 84.0;
    let positive = || rows.iter().map(|r| r.value).filter(|&v| v > 0.0);
    let (low, high) = positive().fold((f64::INFINITY, 0.0), |(a, b): (f64, f64), v| (a.min(v), b.max(v)));
    let (low, high) = if low.is_finite() { (low / 2.0, high * 2.0) } else { (1e-3, 1.0) };
    let x = Scale { log: true, low, high, start: left, end: WIDTH - right };
    let mut s = String::new();
    open(&mut s, WIDTH, height, about);
    let (top, bottom) = (24.0, height - 44.0);
    for v in x.ticks() {
        let at = x.at(v);
        let _ = write!(s, "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{bottom:.1}\"/>");
        text(&mut s, at, bottom + 17.0, "middle", "tick", &short(v));
    }
    text(&mut s, (left + WIDTH - right) / 2.0, height - 8.0, "middle", "axis", x_label);
    text(&mut s, WIDTH - 4.0, 14.0, "end", "axis", note_label);
    for (i, r) in rows.iter().enumerate() {
        let y = top + row * (i as f64 + 0.6);
        text(&mut s, left - 8.0, y + 4.0, "end", &format!("label {}", r.class), &r.label);
        text(&mut s, WIDTH - 4.0, y + 4.0, "end", "tick", &r.note);
        if r.value <= 0.0 {
            continue;
        }
        let at = x.at(r.value);
        let (a, b) = (x.at((r.value - 2.0 * r.error).max(low)), x.at(r.value + 2.0 * r.error));
        let _ = write!(s, "<line class=\"bar {}\" x1=\"{a:.1}\" x2=\"{b:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>", r.class);
        let hint = format!("{}: {} ± {}", escape(&r.label), small(r.value), small(2.0 * r.error));
        let _ = if r.round {
            write!(s, "<circle class=\"mark {}\" cx=\"{at:.1}\" cy=\"{y:.1}\" r=\"5\"><title>{hint}</title></circle>", r.class)
        } else {
            write!(s, "<rect class=\"mark {}\" x=\"{:.1}\" y=\"{:.1}\" width=\"9\" height=\"9\"><title>{hint}</title></rect>", r.class, at - 4.5, y - 4.5)
        };
    }
    s.push_str("</svg>");
    s
}

/// One layer and side of a [`bits`] map.
pub struct Strip {
    pub layer: usize,
    /// bits of each kept segment
    pub bits: Vec<u8>,
    /// channels of a segment
    pub segment: usize,
    /// channels kept, and channels that there are
    pub rank: usize,
    pub width: usize,
    /// stored bits per cached value, everything counted
    pub per_value: f64,
}

/// Which channels of each layer are kept with how many bits: a strip per layer, most bits first.
pub fn bits(about: &str, strips: &[Strip]) -> String {
    let row = if strips.len() > 40 { 11.0 } else { 17.0 };
    let (top, left, right) = (22.0, 34.0, 112.0);
    let height = top + row * strips.len() as f64 + 40.0;
    let across = WIDTH - left - right;
    let mut s = String::new();
    open(&mut s, WIDTH, height, about);
    text(&mut s, left - 6.0, 14.0, "end", "axis", "layer");
    text(&mut s, WIDTH - 52.0, 14.0, "end", "axis", "rank");
    text(&mut s, WIDTH - 2.0, 14.0, "end", "axis", "bits/val.");
    for (i, strip) in strips.iter().enumerate() {
        let y = top + row * i as f64;
        let (bar, base) = (row - 2.0, y + row / 2.0 + 3.0);
        text(&mut s, left - 6.0, base, "end", "tick", &strip.layer.to_string());
        let unit = across / strip.width.max(1) as f64;
        let _ = write!(s, "<rect class=\"b0\" x=\"{left}\" y=\"{y:.1}\" width=\"{across:.1}\" height=\"{bar:.1}\"/>");
        let mut sorted = strip.bits.clone();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        let mut start = 0;
        while start < sorted.len() {
            let run = sorted[start..].iter().take_while(|&&b| b == sorted[start]).count();
            let (x, w) = (left + (start * strip.segment) as f64 * unit, (run * strip.segment) as f64 * unit);
            let _ = write!(
                s,
                "<rect class=\"b{b}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{bar:.1}\"><title>layer {}: {} channels with {b} bits</title></rect>",
                strip.layer,
                run * strip.segment,
                b = sorted[start]
            );
            start += run;
        }
        text(&mut s, WIDTH - 52.0, base, "end", "tick", &format!("{}/{}", strip.rank, strip.width));
        text(&mut s, WIDTH - 2.0, base, "end", "tick", &format!("{:.2}", strip.per_value));
    }
    let bottom = height - 36.0;
    for percent in [0, 25, 50, 75, 100] {
        let x = left + across * f64::from(percent) / 100.0;
        text(&mut s, x, bottom + 13.0, "middle", "tick", &format!("{percent}%"));
    }
    text(&mut s, left + across / 2.0, height - 6.0, "middle", "axis", "share of the layer's channels");
    s.push_str("</svg>");
    s
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let log = Scale { log: true, low: 0.0011, high: 0.011, start: 0.0, end: 1.0 };
        let near = |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a / b - 1.0).abs() < 1e-9);
        assert!(near(&log.ticks(), &[0.002, 0.005, 0.01]), "{:?}", log.ticks());
        let linear = Scale { log: false, low: 0.0, high: 1536.0, start: 0.0, end: 1.0 };
        assert_eq!(linear.ticks(), [0.0, 500.0, 1000.0, 1500.0]);
        assert_eq!([0.005, 1e-5, 1500.0, 0.0].map(short), ["0.005", "1e-5", "1500", "0"]);
    }

    #[test]
    fn labels_are_moved_apart_and_stay_inside() {
        let mut y = [100.0, 101.0, 99.0, 20.0];
        spread(&mut y, 10.0, 110.0);
        assert!(y[2] < y[0] && y[0] < y[1] && y[1] <= 110.0);
        assert!(y[0] - y[2] >= LINE - 1e-9 && y[1] - y[0] >= LINE - 1e-9);
    }

    #[test]
    fn text_is_escaped() {
        let rows = [Dot { class: "s0".into(), label: "<b>&".into(), round: true, value: 0.1, error: 0.0, note: String::new() }];
        let svg = dots("a \"plot\"", "x", "", &rows);
        assert!(!svg.contains("<b>") && svg.contains("&lt;b&gt;&amp;") && svg.contains("a &quot;plot&quot;"));
    }
}
