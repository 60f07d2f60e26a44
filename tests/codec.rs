//! Rows against a plain reading of the documented format.
#![allow(clippy::needless_range_loop, reason = "indices name channels and dimensions")]

mod common;

use common::{random_side, Random};
use half::f16;
use palu::codec::{planes, Codec, Decoder};
use palu::kernels::{force_path, Path};
use palu::layout::DISTORTION;
use palu::projection::{Side, SideProj};

fn each_path(f: impl Fn()) {
    for path in Path::ALL.into_iter().filter(|p| p.is_available()) {
        force_path(Some(path));
        f();
    }
    force_path(None);
}

/// Scale and codes of one group, read bit by bit.
fn read_row(side: &SideProj, g: usize, row: &[u8]) -> (f64, Vec<u32>) {
    common::read_row(side, g, row)
}

/// Latents of a token in f64.
fn latents(side: &SideProj, g: usize, x: &[f32]) -> Vec<f64> {
    let group = &side.groups[g];
    let d = group.n_head * side.head_dim;
    let from = group.head0 * side.head_dim;
    (0..group.rank)
        .map(|c| (0..d).map(|i| group.enc[c * d + i].to_f64() * f64::from(x[from + i] - side.mean[from + i])).sum())
        .collect()
}

#[test]
fn rows_decode_as_the_integer_decoder_says() {
    for (seed, n_head, group_size, head_dim, bits) in [
        (1, 6, 6, 64, &[8u8, 7, 6, 5, 4, 3, 2, 1][..]),
        (2, 2, 1, 80, &[3, 3, 2]),
        (3, 4, 2, 128, &[8, 8, 8, 6, 6, 6, 5, 5, 5, 5, 5]),
        (4, 1, 1, 24, &[1]),
        (5, 2, 2, 40, &[]),
        (6, 1, 1, 256, &[4; 25]),
    ] {
        let mut random = Random(seed);
        let side = random_side(&mut random, Side::Value, n_head, group_size, head_dim, bits, 2);
        let n = 70;
        let x = random.tokens(&side, n);
        let codec = Codec::new(&side);
        each_path(|| {
            let mut rows = vec![0xaa; n * side.row_bytes];
            codec.encode_rows(&x, &mut rows);
            let d = n_head * head_dim;
            let mut out = vec![f32::NAN; n * d];
            codec.decode_rows(&rows, &mut out);
            for t in 0..n {
                let row = &rows[t * side.row_bytes..][..side.row_bytes];
                let used: usize =
                    side.groups.iter().map(|g| 2 + g.bits.iter().map(|&b| b as usize).sum::<usize>()).sum();
                assert!(row[used..].iter().all(|&b| b == 0), "padding is zero");
                for (g, group) in side.groups.iter().enumerate() {
                    let (scale, codes) = read_row(&side, g, row);
                    let decoder = Decoder::new(group, planes(&side), &[]);
                    let exact = common::rebuild_exactly(&side, g, scale, &codes);
                    for i in 0..group.n_head * head_dim {
                        let at = group.head0 * head_dim + i;
                        let mut defined = f64::from(side.mean[at]);
                        let mut size = defined.abs();
                        if group.rank > 0 {
                            let sum: i64 = (0..group.rank)
                                .map(|c| i64::from(decoder.weight[i * group.rank + c]) * i64::from(codes[c]))
                                .sum();
                            let sum = sum as f64 + decoder.offset2[i] as f64 / 2.0;
                            defined += scale * f64::from(decoder.scale[i]) * sum;
                            size += (scale * f64::from(decoder.scale[i]) * sum).abs();
                        }
                        let got = f64::from(out[t * d + at]);
                        assert!((got - defined).abs() <= 4e-7 * size + 1e-12, "{got} for {defined}");
                        let tolerance = if planes(&side) == 2 { 2e-3 } else { 0.12 };
                        assert!((got - exact[i]).abs() <= tolerance, "{got} for {}", exact[i]);
                    }
                }
            }
        });
    }
}

#[test]
fn codes_are_the_nearest_for_a_scale_that_is_near_the_best() {
    let mut random = Random(11);
    let side = random_side(&mut random, Side::Key, 4, 4, 64, &[8, 6, 5, 5, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1, 1], 0);
    let codec = Codec::new(&side);
    let n = 65;
    let x = random.tokens(&side, n);
    each_path(|| {
        let mut rows = vec![0; n * side.row_bytes];
        codec.encode_rows(&x, &mut rows);
        let mut excess = 0.0;
        for t in 0..n {
            let group = &side.groups[0];
            let z = latents(&side, 0, &x[t * 256..][..256]);
            let error = |scale: f64, codes: Option<&[u32]>| -> f64 {
                (0..group.rank)
                    .map(|c| {
                        let levels = f64::from((1u32 << group.bits[c / 8]) - 1);
                        let unit = f64::from(group.step[c]) * scale;
                        let nearest = (z[c] / unit + levels / 2.0).clamp(0.0, levels).round();
                        let code = codes.map_or(nearest, |codes| f64::from(codes[c]));
                        (z[c] - (code - levels / 2.0) * unit).powi(2)
                    })
                    .sum()
            };
            let (scale, codes) = read_row(&side, 0, &rows[t * side.row_bytes..]);
            let got = error(scale, Some(&codes));
            assert!(got <= error(scale, None) * 1.0001, "nearest codes");
            let best = (-200..400).map(|i| error(1.01f64.powi(i), None)).fold(f64::INFINITY, f64::min);
            assert!(got <= best * 1.15, "error {got}, and {best} at the best scale");
            excess += (got / best - 1.0) / n as f64;
        }
        assert!(excess < 0.03, "the error is on average {excess} above the best scale's");
    });
}

#[test]
fn gaussian_latents_lose_what_the_layout_predicts() {
    for bits in 1..=8u8 {
        let mut random = Random(u64::from(bits));
        let side = random_side(&mut random, Side::Key, 2, 2, 64, &[bits; 16], 0);
        let codec = Codec::new(&side);
        let n = 500;
        let x = random.tokens(&side, n);
        let mut rows = vec![0; n * side.row_bytes];
        codec.encode_rows(&x, &mut rows);
        let (mut lost, mut total) = (0.0, 0.0);
        for t in 0..n {
            let z = latents(&side, 0, &x[t * 128..][..128]);
            let (scale, codes) = read_row(&side, 0, &rows[t * side.row_bytes..]);
            for c in 0..128 {
                let levels = f64::from((1u32 << bits) - 1);
                let level = (f64::from(codes[c]) - levels / 2.0) * f64::from(side.groups[0].step[c]) * scale;
                // as a share of the channel's variance
                let variance =
                    (f64::from(side.groups[0].step[c]) / f64::from(palu::layout::STEP[bits as usize])).powi(2);
                lost += (z[c] - level).powi(2) / variance;
                total += 1.0;
            }
        }
        let ratio = lost / total / DISTORTION[bits as usize];
        // a scale per row does better than the fixed quantizer that the prediction is for, at many bits
        assert!((0.4..1.1).contains(&ratio), "{bits} bits: {ratio} of the predicted distortion");
    }
}

#[test]
fn what_is_not_finite_rebuilds_to_not_a_number() {
    let mut random = Random(5);
    for bits in [&[6u8, 4, 2][..], &[]] {
        let side = random_side(&mut random, Side::Key, 4, 2, 32, bits, 0);
        let codec = Codec::new(&side);
        each_path(|| {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = Random(9).tokens(&side, 3);
                x[128 + 70] = bad; // token 1, head 2, which is in group 1
                let mut rows = vec![0; 3 * side.row_bytes];
                codec.encode_rows(&x, &mut rows);
                let mut out = vec![0.0; 3 * 128];
                codec.decode_rows(&rows, &mut out);
                for (i, y) in out.iter().enumerate() {
                    assert_eq!(y.is_nan(), (128 + 64..256).contains(&i), "{i}");
                }
            }
        });
    }
}

#[test]
fn zeros_outliers_and_extremes() {
    let mut random = Random(6);
    let side = random_side(&mut random, Side::Value, 2, 2, 64, &[6, 5, 4, 3, 2, 2, 1, 1], 0);
    let codec = Codec::new(&side);
    each_path(|| {
        let mut out = vec![0.0; 128];
        let mut rows = vec![0xff; side.row_bytes];
        // a latent of zeros is the mean, exactly
        codec.encode_rows(&side.mean, &mut rows);
        codec.decode_rows(&rows, &mut out);
        assert_eq!(out, side.mean);
        let typical = Random(8).tokens(&side, 1);
        for size in [1e-12f32, 1e-4, 0.1, 1.0, 10.0, 1e3, 1e4] {
            let x: Vec<f32> = side.mean.iter().zip(&typical).map(|(m, x)| m + (x - m) * size).collect();
            codec.encode_rows(&x, &mut rows);
            codec.decode_rows(&rows, &mut out);
            let lost: f64 = out.iter().zip(&x).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            let total: f64 = x.iter().zip(&side.mean).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            assert!(lost <= 0.6 * total + 1e-10, "{lost} of {total} lost at size {size}");
        }
        // one channel far beyond its usual range is followed
        let group = &side.groups[0];
        let x: Vec<f32> =
            (0..128).map(|i| side.mean[i] + 400.0 * group.dec[3 * 128 + i].to_f32() + 0.01 * typical[i]).collect();
        codec.encode_rows(&x, &mut rows);
        codec.decode_rows(&rows, &mut out);
        let lost: f64 = out.iter().zip(&x).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        assert!(lost < 0.02 * 400.0 * 400.0, "{lost}");
        // values that no scale reaches saturate, and stay finite
        let huge: Vec<f32> = typical.iter().map(|x| x * 1e30).collect();
        codec.encode_rows(&huge, &mut rows);
        codec.decode_rows(&rows, &mut out);
        assert!(out.iter().all(|x| x.is_finite()));
        assert!(f16::from_le_bytes([rows[0], rows[1]]).is_finite());
    });
}

#[test]
fn shares_strides_and_indices_do_not_change_rows() {
    let mut random = Random(7);
    let side = random_side(&mut random, Side::Key, 3, 3, 40, &[5, 4, 3, 3, 2, 1, 1, 1, 1], 0);
    let codec = Codec::new(&side);
    let n = 101;
    let x = random.tokens(&side, n);
    each_path(|| {
        let mut expected = vec![0; n * side.row_bytes];
        codec.encode_rows(&x, &mut expected);
        // the same tokens with gaps between heads and tokens, in other rows
        let (nb_head, nb_token) = (4 * 48, 4 * 160);
        let mut strided = vec![f32::NAN; n * 160];
        for t in 0..n {
            for h in 0..3 {
                strided[t * 160 + h * 48..][..40].copy_from_slice(&x[(t * 3 + h) * 40..][..40]);
            }
        }
        let idxs: Vec<i64> = (0..n as i64).map(|t| (t * 7 + 3) % 103).collect();
        for nth in [1, 2, 3, 7, 200] {
            let mut rows = vec![0x55; 103 * side.row_bytes];
            let p = palu::codec::StoreParams {
                x: strided.as_ptr(),
                x_nb_head: nb_head,
                x_nb_token: nb_token,
                idxs: idxs.as_ptr(),
                rows: rows.as_mut_ptr(),
                n_token: n,
            };
            for ith in (0..nth).rev() {
                unsafe { codec.encode(&p, ith, nth) };
            }
            let mut named = [false; 103];
            for (t, &i) in idxs.iter().enumerate() {
                named[i as usize] = true;
                let row = |rows: &[u8], i: usize| rows[i * side.row_bytes..][..side.row_bytes].to_vec();
                assert_eq!(row(&rows, i as usize), row(&expected, t), "token {t}");
            }
            for (i, row) in rows.chunks(side.row_bytes).enumerate() {
                assert!(named[i] || row.iter().all(|&b| b == 0x55), "row {i} is left as it was");
            }
        }
    });
}
