//! Writes a projection file that compresses nothing well but has the ranks and bits that a trained model's file has, for timing
//! attention on models of random weights.
//!
//! usage: random_projection OUT ARCH IDENTITY N_LAYER N_HEAD_KV HEAD_DIM GROUP_SIZE BITS_PER_VALUE
//!
//! IDENTITY (hexadecimal) is the model's, as the message about a wrong projection file names it. Bases are cosines; the
//! spectra fall so that at 2.25 bits per value about 44% of the key channels and 59% of the value channels are kept, as
//! the converter keeps them for trained models at 14.1% of f16.

use half::f16;
use palu::projection::{GroupFile, LayerFile, Meta, ProjectionFile, SideFile};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [out, arch, identity, rest @ ..] = &args[..] else { anyhow::bail!("see the head of this file for the usage") };
    let numbers = rest.iter().map(|a| a.parse::<f64>()).collect::<Result<Vec<_>, _>>()?;
    let [n_layer, n_head_kv, head_dim, group_size, bits] = numbers[..] else { anyhow::bail!("five numbers are needed") };
    let (n_layer, n_head_kv, head_dim, group_size) = (n_layer as usize, n_head_kv as usize, head_dim as usize, group_size as usize);
    let d = group_size * head_dim;
    let side = |falls: f64| {
        let basis: Vec<f16> = (0..d * d)
            .map(|at| {
                let (c, i) = ((at / d) as f64, (at % d) as f64);
                let size = if c == 0.0 { (1.0 / d as f64).sqrt() } else { (2.0 / d as f64).sqrt() };
                f16::from_f64(size * ((i + 0.5) * c * std::f64::consts::PI / d as f64).cos())
            })
            .collect();
        let variance = (0..d).map(|c| (-falls * c as f64 / d as f64).exp() as f32).collect();
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
    let sides = [side(18.5), side(14.0)];
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
        println!("{:?}: rank {} of {}, {:.2} bits per code, {} bytes", side.side, side.rank(), n_head_kv * head_dim, side.code_bits(), side.row_bytes);
    }
    println!("{:.1}% of f16", 100.0 * projection.bytes_per_token() as f64 / projection.f16_bytes_per_token() as f64);
    Ok(())
}
