//! Which latent channels are kept with how many bits, and where they stand in a row.
//!
//! Reverse water-filling over the principal channels of all layers and sides at once, under one budget that counts every
//! stored byte. The result follows from a projection file's spectra and the budget alone, with nothing but IEEE additions,
//! multiplications and comparisons, so that every machine lays out the same rows.

use std::collections::BinaryHeap;

/// Channels that share one bit width. Eight codes of `b` bits are exactly `b` bytes.
pub const SEGMENT: usize = 8;
/// Rows are a multiple of this many bytes, so that kernels may load words.
pub const ROW_ALIGN: usize = 4;
/// Each head group of a row begins with its step size, an f16.
pub const SCALE_BYTES: usize = 2;
pub const MAX_BITS: usize = 8;

/// Mean squared error of the best uniform quantizer with 2^b levels for a Gaussian of variance 1 (Max 1960; Hui and Neuhoff 2001).
pub const DISTORTION: [f64; MAX_BITS + 1] =
    [1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003490, 0.001041, 0.0003035, 0.0000872];
/// Step size of that quantizer in standard deviations.
pub const STEP: [f32; MAX_BITS + 1] = [0.0, 1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.05687, 0.03076];

/// One head group of one side of one layer, as the allocator sees it.
#[derive(Clone, Debug)]
pub struct Spectrum {
    /// Variance of the stored latent channels in the metric, largest first; a multiple of [`SEGMENT`] of them.
    pub variance: Vec<f32>,
    /// What a unit of distortion costs here, in units of divergence.
    pub weight: f64,
    /// Cached values per token that this group stands for.
    pub n_value: usize,
    /// Row (one per layer and side) that the group is stored in; groups of a row are neighbours.
    pub row: usize,
}

/// Bits of each segment of each spectrum (zero bits only at the end), and the bytes of each row.
#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    pub bits: Vec<Vec<u8>>,
    pub row_bytes: Vec<usize>,
}

impl Allocation {
    /// Stored bits per cached value, everything counted.
    pub fn bits_per_value(&self, spectra: &[Spectrum]) -> f64 {
        let bytes: usize = self.row_bytes.iter().sum();
        let values: usize = spectra.iter().map(|s| s.n_value).sum();
        8.0 * bytes as f64 / values as f64
    }
}

#[derive(PartialEq)]
struct Step {
    gain: f64,
    spectrum: usize,
    segment: usize,
}
impl Eq for Step {}
impl Ord for Step {
    fn cmp(&self, o: &Self) -> std::cmp::Ordering {
        // the larger gain first, then the earlier place
        self.gain.total_cmp(&o.gain).then_with(|| (o.spectrum, o.segment).cmp(&(self.spectrum, self.segment)))
    }
}
impl PartialOrd for Step {
    fn partial_cmp(&self, o: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(o))
    }
}

/// Spends `bits_per_value` on the segments that buy the most, one bit at a time.
pub fn allocate(spectra: &[Spectrum], bits_per_value: f64) -> Allocation {
    let n_row = spectra.iter().map(|s| s.row + 1).max().unwrap_or(0);
    let energy: Vec<Vec<f64>> = spectra
        .iter()
        .map(|s| s.variance.chunks(SEGMENT).map(|c| s.weight * c.iter().map(|&v| f64::from(v)).sum::<f64>()).collect())
        .collect();
    let mut bits: Vec<Vec<u8>> = energy.iter().map(|e| vec![0; e.len()]).collect();
    let gain = |s: usize, g: usize, b: u8| energy[s][g] * (DISTORTION[b as usize] - DISTORTION[b as usize + 1]);

    // a row's bytes before and after alignment
    let mut used = vec![0usize; n_row];
    for s in spectra {
        used[s.row] += SCALE_BYTES;
    }
    let padded = |bytes: usize| bytes.div_ceil(ROW_ALIGN) * ROW_ALIGN;
    let n_value: usize = spectra.iter().map(|s| s.n_value).sum();
    let budget = (bits_per_value * n_value as f64 / 8.0).floor().max(0.0) as usize;
    let mut total: usize = used.iter().map(|&b| padded(b)).sum();

    let mut heap = BinaryHeap::new();
    for (s, e) in energy.iter().enumerate() {
        for g in 0..e.len() {
            heap.push(Step { gain: gain(s, g, 0), spectrum: s, segment: g });
        }
    }
    // each step adds one byte; where the row has to grow by ROW_ALIGN, the padding is filled by the next best steps of that row
    while let Some(Step { spectrum: s, segment: g, gain: value }) = heap.pop() {
        if !(value > 0.0) {
            continue;
        }
        let row = spectra[s].row;
        let grow = padded(used[row] + 1) - padded(used[row]);
        if total + grow > budget {
            continue; // another row may still have padding to fill
        }
        // a segment is only opened after the ones before it, so that kept channels are a prefix
        if bits[s][g] == 0 && g > 0 && bits[s][g - 1] == 0 {
            continue; // its predecessor was refused; nothing smaller can be kept either
        }
        total += grow;
        used[row] += 1;
        bits[s][g] += 1;
        if (bits[s][g] as usize) < MAX_BITS {
            heap.push(Step { gain: gain(s, g, bits[s][g]), spectrum: s, segment: g });
        }
    }
    Allocation { bits, row_bytes: used.into_iter().map(padded).collect() }
}

/// Distortion that an allocation predicts for one spectrum (without its weight).
pub fn distortion(variance: &[f32], bits: &[u8]) -> f64 {
    variance
        .chunks(SEGMENT)
        .zip(bits)
        .map(|(c, &b)| DISTORTION[b as usize] * c.iter().map(|&v| f64::from(v)).sum::<f64>())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spectra() -> Vec<Spectrum> {
        (0..4)
            .map(|r| Spectrum {
                variance: (0..64).map(|i| (r + 1) as f32 * 0.9f32.powi(i)).collect(),
                weight: 1.0 + r as f64,
                n_value: 64,
                row: r,
            })
            .collect()
    }

    #[test]
    fn a_budget_is_never_exceeded_and_nearly_used() {
        for b in [0.5, 1.0, 1.6, 2.25, 3.0, 4.5, 7.9, 8.6] {
            let s = spectra();
            let a = allocate(&s, b);
            let real = a.bits_per_value(&s);
            assert!(real <= b, "{real} > {b}");
            assert!(real > b.min(8.0) - 0.51, "{real} of {b} used");
            for (row, bytes) in a.row_bytes.iter().enumerate() {
                assert_eq!(bytes % ROW_ALIGN, 0);
                let content = SCALE_BYTES + a.bits[row].iter().map(|&b| b as usize).sum::<usize>();
                assert!(content <= *bytes && bytes - content < ROW_ALIGN);
            }
        }
    }

    #[test]
    fn smaller_budgets_are_nested() {
        let s = spectra();
        let large = allocate(&s, 4.0);
        let small = allocate(&s, 2.0);
        for (l, s) in large.bits.iter().zip(&small.bits) {
            let kept = |b: &[u8]| b.iter().take_while(|&&b| b > 0).count();
            assert!(kept(l) >= kept(s));
            assert!(s[kept(s)..].iter().all(|&b| b == 0), "kept channels are a prefix");
        }
    }

    #[test]
    fn energy_decides() {
        let s = spectra();
        let a = allocate(&s, 2.25);
        assert!(a.row_bytes[3] > a.row_bytes[0], "the row with more weight and variance gets more bytes");
    }
}
