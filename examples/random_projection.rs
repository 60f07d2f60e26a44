//! Writes a projection file that compresses nothing well but has the ranks and bits that a trained model's file has, for timing
//! attention on models of random weights.
//!
//! usage: random_projection OUT ARCH IDENTITY N_LAYER N_HEAD_KV HEAD_DIM GROUP_SIZE BITS_PER_VALUE
//!
//! IDENTITY (hexadecimal) is the model's, as the message about a wrong projection file names it. Bases are cosines. The spectra
//! fall as those of trained models do, steeply at first and then evenly: at 2.25 bits per value (14.1% of f16) a joint group of
//! 1024 keeps about 47% of the key channels, a quarter of them with more than 4 bits, and 61% of the value channels. (Files that
//! the converter made for trained models keep 55% and 60%, with 3.3 and 3.9 bits per code; more than 4 of 22% of the key codes.)

use half::f16;
use palu::projection::{GroupFile, LayerFile, Meta, ProjectionFile, SideFile};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [out, arch, identity, rest @ ..] = &args[..] else { anyhow::bail!("see the head of this file for the usage") };
    let numbers = rest.iter().map(|a| a.parse::<f64>()).collect::<Result<Vec<_>, _>>()?;
    let [n_layer, n_head_kv, head_dim, group_size, bits] = numbers[..] else { anyhow::bail!("five numbers are needed") };
    let (n_layer, n_head_kv, head_dim, group_size) = (n_layer as usize, n_head_kv as usize, head_dim as usize, group_size as usize);
    let d = group_size * head_dim;
    // bits that a channel is worth: even from `kept` (a share of the channels) up, and `head` more at the top
    let side = |slope: f64, kept: f64, head: f64, width: f64| {
        let basis: Vec<f16> = (0..d * d)
            .map(|at| {
                let (c, i) = ((at / d) as f64, (at % d) as f64);
                let size = if c == 0.0 { (1.0 / d as f64).sqrt() } else { (2.0 / d as f64).sqrt() };
                f16::from_f64(size * ((i + 0.5) * c * std::f64::consts::PI / d as f64).cos())
            })
            .collect();
        let worth = |x: f64| slope * (kept - x) + head * (-x / width).exp();
        let variance = (0..d).map(|c| 4f64.powf(worth(c as f64 / d as f64)) as f32).collect();
        let group = GroupFile { variance, enc: basis.clone(), dec: basis, bits: Vec::new() };
        SideFile {
            n_head_kv,
            head_dim,
            group_size,
            weight: vec![1.0],
            mean: vec![0.0; n_head_kv * head_dim],
            groups: vec![group; n_head_kv / group_size],
        }
    };
    let sides = [side(8.0, 0.515, 3.0, 0.06), side(11.0, 0.64, 1.5, 0.08)];
    let file = ProjectionFile {
        meta: Meta {
            arch: arch.clone(),
            model_identity: u64::from_str_radix(identity, 16)?,
            n_layer,
            bits_per_value: bits,
            budgets: vec![bits],
            calibration: "none".into(),
            metric: "none".into(),
            options: "random_projection".into(),
            ..Meta::default()
        },
        layers: (0..n_layer).map(|il| LayerFile { il, sides: sides.clone() }).collect(),
    };
    file.write(out.as_ref())?;
    let projection = file.at(0.0)?;
    for side in &projection.layers[0].sides {
        let bits: Vec<u8> = side.groups.iter().flat_map(|g| g.bits.iter().copied()).collect();
        println!(
            "{:?}: rank {} of {}, {:.2} bits per code, {:.0}% of the codes with more than 4 bits, {} bytes",
            side.side,
            side.rank(),
            n_head_kv * head_dim,
            side.code_bits(),
            100.0 * bits.iter().filter(|&&b| b > 4).count() as f64 / bits.len().max(1) as f64,
            side.row_bytes
        );
    }
    println!("{:.1}% of f16", 100.0 * projection.bytes_per_token() as f64 / projection.f16_bytes_per_token() as f64);
    Ok(())
}
