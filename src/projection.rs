//! The projection file: what it holds, how it is laid out in GGUF, and when it is refused.
//!
//! A [`ProjectionFile`] is the file as it stands on disk: per layer and side a mean, and per head group a nested basis,
//! most important channel first, with the spectrum. [`ProjectionFile::at`] turns it into a [`Projection`] for one budget.

use crate::layout::{self, Allocation, Spectrum, MAX_BITS, SEGMENT};
use anyhow::{bail, ensure, Context, Result};
use half::f16;
use std::path::Path;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// keys before RoPE
    Key = 0,
    Value = 1,
}

pub const SIDES: [Side; 2] = [Side::Key, Side::Value];

impl Side {
    /// As tensor names have it.
    pub fn letter(self) -> char {
        match self {
            Side::Key => 'k',
            Side::Value => 'v',
        }
    }
}

/// Where a file comes from; every assumption that it rests on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Meta {
    /// `general.architecture` of the model
    pub arch: String,
    /// `general.name` of the model
    pub model_name: String,
    pub model_identity: u64,
    /// layers of the model, cached or not
    pub n_layer: usize,
    /// the budget that the file was made for, and the largest that it can serve
    pub bits_per_value: f64,
    /// budgets that weights were measured at, ascending; the last is `bits_per_value`
    pub budgets: Vec<f64>,
    /// XXH64 of the calibration text, or of the sampled tokens
    pub calibration_hash: u64,
    /// file name of the calibration text, or "self"
    pub calibration: String,
    pub calibration_tokens: u64,
    /// how distortion was weighted, e.g. "attention+output, measured"
    pub metric: String,
    /// the command's options, for people
    pub options: String,
}

/// One head group of one side in a file.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupFile {
    /// variance of each latent channel in the metric, largest first; a multiple of [`SEGMENT`] of them
    pub variance: Vec<f32>,
    /// `[rank][d]`, d = group_size*head_dim: z = enc (x - mean)
    pub enc: Vec<f16>,
    /// `[rank][d]`: x = mean + sum over c of `z[c] dec[c]`
    pub dec: Vec<f16>,
    /// `[rank/SEGMENT]` in a file with an allocation of its own, else empty: the budget decides
    pub bits: Vec<u8>,
}

/// One side of one layer in a file.
#[derive(Clone, Debug, PartialEq)]
pub struct SideFile {
    pub n_head_kv: usize,
    pub head_dim: usize,
    /// KV heads that share one latent; divides n_head_kv
    pub group_size: usize,
    /// what a unit of distortion costs, measured at each of [`Meta::budgets`]
    pub weight: Vec<f64>,
    /// `[n_head_kv*head_dim]`
    pub mean: Vec<f32>,
    pub groups: Vec<GroupFile>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct LayerFile {
    /// index of the layer in the model
    pub il: usize,
    /// [key, value]
    pub sides: [SideFile; 2],
}

#[derive(Clone, Debug, PartialEq)]
pub struct ProjectionFile {
    pub meta: Meta,
    /// ascending by `il`
    pub layers: Vec<LayerFile>,
}

/// One head group at a budget.
#[derive(Clone, Debug)]
pub struct Group {
    /// first KV head
    pub head0: usize,
    /// KV heads
    pub n_head: usize,
    /// kept channels, a multiple of [`SEGMENT`]; 0: nothing but the mean is left
    pub rank: usize,
    /// `[rank/SEGMENT]`, each 1 to 8
    pub bits: Vec<u8>,
    /// byte of the row at which the group's step size (f16) stands; its codes follow, segment after segment
    pub offset: usize,
    /// `[rank]` step of each channel's quantizer at scale 1: standard deviation times the best step for its bits
    pub step: Vec<f32>,
    /// `[rank][d]`, d = n_head*head_dim
    pub enc: Vec<f16>,
    /// `[rank][d]`
    pub dec: Vec<f16>,
}

/// One side of one layer at a budget: everything that codec and attention need.
#[derive(Clone, Debug)]
pub struct SideProj {
    pub side: Side,
    pub n_head_kv: usize,
    pub head_dim: usize,
    pub mean: Vec<f32>,
    pub groups: Vec<Group>,
    pub row_bytes: usize,
}

impl SideProj {
    pub fn rank(&self) -> usize {
        self.groups.iter().map(|g| g.rank).sum()
    }

    /// Mean bits of the kept codes.
    pub fn code_bits(&self) -> f64 {
        let bits: usize = self.groups.iter().flat_map(|g| &g.bits).map(|&b| b as usize * SEGMENT).sum();
        bits as f64 / self.rank().max(1) as f64
    }

    /// Puts `bits` (per group and segment, zeros at the end) on a side of a file.
    pub fn new(side: Side, file: &SideFile, bits: &[&[u8]], row_bytes: usize) -> Self {
        let d = file.group_size * file.head_dim;
        let mut offset = 0;
        let groups = file
            .groups
            .iter()
            .zip(bits)
            .enumerate()
            .map(|(i, (group, bits))| {
                let kept: Vec<u8> = bits.iter().copied().take_while(|&b| b > 0).collect();
                let rank = kept.len() * SEGMENT;
                let step = (0..rank)
                    .map(|c| group.variance[c].sqrt() * layout::STEP[kept[c / SEGMENT] as usize])
                    .collect();
                let group = Group {
                    head0: i * file.group_size,
                    n_head: file.group_size,
                    rank,
                    offset,
                    step,
                    enc: group.enc[..rank * d].to_vec(),
                    dec: group.dec[..rank * d].to_vec(),
                    bits: kept,
                };
                offset += layout::SCALE_BYTES + group.bits.iter().map(|&b| b as usize).sum::<usize>();
                group
            })
            .collect();
        assert!(offset <= row_bytes);
        Self { side, n_head_kv: file.n_head_kv, head_dim: file.head_dim, mean: file.mean.clone(), groups, row_bytes }
    }
}

#[derive(Clone, Debug)]
pub struct Layer {
    pub il: usize,
    /// [key, value]
    pub sides: [SideProj; 2],
}

impl Layer {
    pub fn side(&self, side: Side) -> &SideProj {
        &self.sides[side as usize]
    }

    /// Keys and values, where they fit each other and this RoPE.
    pub(crate) fn sides_for(&self, rope: &crate::rope::RopeParams) -> Result<[&SideProj; 2]> {
        let [k, v] = &self.sides;
        ensure!(
            k.n_head_kv == v.n_head_kv,
            "layer {} has {} heads of keys and {} of values",
            self.il,
            k.n_head_kv,
            v.n_head_kv
        );
        rope.check(k.head_dim)?;
        Ok([k, v])
    }
}

/// A projection file at one budget.
#[derive(Clone, Debug)]
pub struct Projection {
    pub meta: Meta,
    /// stored bits per cached value, everything counted
    pub bits_per_value: f64,
    /// of the file and the row layout: rows written under one identity cannot be read under another
    pub identity: u64,
    pub layers: Vec<Layer>,
}

impl Projection {
    pub fn layer(&self, il: usize) -> Option<&Layer> {
        self.layers.binary_search_by_key(&il, |l| l.il).ok().map(|i| &self.layers[i])
    }

    /// Bytes per token over all layers, K and V.
    pub fn bytes_per_token(&self) -> usize {
        self.layers.iter().flat_map(|l| &l.sides).map(|s| s.row_bytes).sum()
    }

    pub fn f16_bytes_per_token(&self) -> usize {
        self.layers.iter().flat_map(|l| &l.sides).map(|s| 2 * s.n_head_kv * s.head_dim).sum()
    }
}

impl ProjectionFile {
    /// What the allocator sees at a budget: one spectrum per layer, side and group, in file order.
    pub fn spectra(&self, bits_per_value: f64) -> Vec<Spectrum> {
        let mut spectra = Vec::new();
        for (row, side) in self.layers.iter().flat_map(|l| &l.sides).enumerate() {
            let weight = interpolated(&self.meta.budgets, &side.weight, bits_per_value);
            for group in &side.groups {
                spectra.push(Spectrum {
                    variance: group.variance.clone(),
                    weight,
                    n_value: side.group_size * side.head_dim,
                    row,
                });
            }
        }
        spectra
    }

    /// Whether the file says how many bits each channel has, so that it serves its own budget alone.
    pub fn is_fixed(&self) -> bool {
        self.layers.iter().flat_map(|l| &l.sides).flat_map(|s| &s.groups).any(|g| !g.bits.is_empty())
    }

    /// The allocation for a budget, or the file's own.
    pub fn allocation(&self, bits_per_value: f64) -> Allocation {
        if !self.is_fixed() {
            return layout::allocate(&self.spectra(bits_per_value), bits_per_value);
        }
        let row_bytes = |side: &SideFile| {
            let bytes = |g: &GroupFile| layout::SCALE_BYTES + g.bits.iter().map(|&b| b as usize).sum::<usize>();
            side.groups.iter().map(bytes).sum::<usize>().next_multiple_of(layout::ROW_ALIGN)
        };
        let sides = || self.layers.iter().flat_map(|l| &l.sides);
        Allocation {
            bits: sides().flat_map(|s| &s.groups).map(|g| g.bits.clone()).collect(),
            row_bytes: sides().map(row_bytes).collect(),
        }
    }
}

/// Between the two `nodes` around `x`, linear; beyond them, constant.
fn interpolated(nodes: &[f64], values: &[f64], x: f64) -> f64 {
    let above = nodes.iter().position(|&n| n >= x).unwrap_or(nodes.len() - 1);
    if above == 0 || nodes[above] <= x {
        return values[above];
    }
    let t = (x - nodes[above - 1]) / (nodes[above] - nodes[above - 1]);
    values[above - 1] + t * (values[above] - values[above - 1])
}

/// Version 1 had one budget, and no allocation of its own.
const VERSION: u32 = 2;
const OLDEST_VERSION: u32 = 1;
const CHECKSUM_KEY: &str = "palu.checksum";
/// The checksum is the first key, so that it is found before anything else is believed.
const CHECKSUM_AT: usize = crate::gguf::HEADER_BYTES + 8 + CHECKSUM_KEY.len() + 4;

/// XXH64 of a file's bytes, those of the checksum itself left out.
fn checksum(bytes: &[u8]) -> u64 {
    let before = crate::hash::xxh64(&bytes[..CHECKSUM_AT], 0);
    crate::hash::xxh64(&bytes[CHECKSUM_AT + 8..], before)
}

impl ProjectionFile {
    /// The bytes of the file. The same projection always gives the same bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        use crate::gguf::Value::{Str, F64, F64s, U32, U32s, U64};
        let mut w = crate::gguf::Writer::default();
        let m = &self.meta;
        w.value(CHECKSUM_KEY, U64(0));
        w.value("general.architecture", Str("palu".into()));
        w.value("general.type", Str("projection".into()));
        w.value("palu.version", U32(VERSION));
        w.value("palu.model.architecture", Str(m.arch.clone()));
        w.value("palu.model.name", Str(m.model_name.clone()));
        w.value("palu.model.identity", U64(m.model_identity));
        w.value("palu.model.block_count", U32(m.n_layer as u32));
        w.value("palu.bits_per_value", F64(m.bits_per_value));
        w.value("palu.budgets", F64s(m.budgets.clone()));
        w.value("palu.calibration.source", Str(m.calibration.clone()));
        w.value("palu.calibration.hash", U64(m.calibration_hash));
        w.value("palu.calibration.tokens", U64(m.calibration_tokens));
        w.value("palu.metric", Str(m.metric.clone()));
        w.value("palu.options", Str(m.options.clone()));
        let u32s = |f: &dyn Fn(&LayerFile) -> usize| U32s(self.layers.iter().map(|l| f(l) as u32).collect());
        w.value("palu.layer.index", u32s(&|l| l.il));
        for side in SIDES {
            let key = |name: &str| format!("palu.layer.{}.{name}", side.letter());
            let i = side as usize;
            w.value(&key("head_count"), u32s(&|l| l.sides[i].n_head_kv));
            w.value(&key("head_dim"), u32s(&|l| l.sides[i].head_dim));
            w.value(&key("group_size"), u32s(&|l| l.sides[i].group_size));
            w.value(&key("weight"), F64s(self.layers.iter().flat_map(|l| l.sides[i].weight.clone()).collect()));
            if self.is_fixed() {
                let groups = self.layers.iter().flat_map(|l| &l.sides[i].groups);
                w.value(&key("bits"), U32s(groups.flat_map(|g| g.bits.iter().map(|&b| u32::from(b))).collect()));
            }
        }
        for (layer, side) in self.layers.iter().flat_map(|l| SIDES.map(|s| (l, s))) {
            let s = &layer.sides[side as usize];
            w.f32_tensor(&mean_name(layer.il, side), &[s.mean.len()], &s.mean);
            let d = s.group_size * s.head_dim;
            for (g, group) in s.groups.iter().enumerate().filter(|(_, g)| !g.variance.is_empty()) {
                let rank = group.variance.len();
                w.f32_tensor(&group_name(layer.il, side, g, "variance"), &[rank], &group.variance);
                w.f16_tensor(&group_name(layer.il, side, g, "enc"), &[d, rank], &group.enc);
                w.f16_tensor(&group_name(layer.il, side, g, "dec"), &[d, rank], &group.dec);
            }
        }
        let mut bytes = w.to_bytes();
        let sum = checksum(&bytes);
        bytes[CHECKSUM_AT..CHECKSUM_AT + 8].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Writes the file whole or not at all: to a temporary name beside it, which then replaces it.
    pub fn write(&self, path: &Path) -> Result<()> {
        use std::io::Write;
        let mut name = path.file_name().with_context(|| format!("{} names no file", path.display()))?.to_owned();
        name.push(".tmp");
        let temporary = path.with_file_name(name);
        let written = std::fs::File::create(&temporary).and_then(|mut f| {
            f.write_all(&self.to_bytes())?;
            f.sync_all()
        });
        written.and_then(|()| std::fs::rename(&temporary, path)).map_err(|e| {
            let _ = std::fs::remove_file(&temporary);
            anyhow::Error::new(e).context(format!("cannot write {}", path.display()))
        })
    }

    pub fn read(path: &Path) -> Result<Self> {
        Ok(Self::read_with_checksum(path)?.0)
    }

    /// The file, and the checksum that its identity begins with.
    pub(crate) fn read_with_checksum(path: &Path) -> Result<(Self, u64)> {
        let file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        ensure!(file.metadata().is_ok_and(|m| m.is_file()), "cannot read {}: not a regular file", path.display());
        // SAFETY: the map is only read, and copied from before this function returns. Another process that shortens the
        // file meanwhile can stop this one, as with every mapped file.
        let map = match unsafe { memmap2::Mmap::map(&file) } {
            Ok(map) => map,
            Err(e) => bail!("cannot read {}: {e}", path.display()),
        };
        let parsed = Self::from_bytes(&map).with_context(|| format!("{} is not a usable projection file", path.display()))?;
        Ok((parsed, checksum(&map)))
    }

    /// Parses and checks a file, every byte of it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        ensure!(bytes.len() >= CHECKSUM_AT + 8 && bytes.starts_with(b"GGUF"), "it is not a GGUF file or is cut short");
        let key = &bytes[crate::gguf::HEADER_BYTES + 8..CHECKSUM_AT - 4];
        ensure!(key == CHECKSUM_KEY.as_bytes(), "it is a GGUF file of another kind");
        let sum = u64::from_le_bytes(bytes[CHECKSUM_AT..CHECKSUM_AT + 8].try_into()?);
        ensure!(sum == checksum(bytes), "its checksum is wrong: it is cut short or damaged");

        let r = crate::gguf::Reader::parse(bytes)?;
        let version = r.u32("palu.version")?;
        ensure!(
            (OLDEST_VERSION..=VERSION).contains(&version),
            "it has version {version}, this library reads versions {OLDEST_VERSION} to {VERSION}"
        );
        let bits_per_value = r.f64("palu.bits_per_value")?;
        let meta = Meta {
            arch: r.str("palu.model.architecture")?.to_owned(),
            model_name: r.str("palu.model.name")?.to_owned(),
            model_identity: r.u64("palu.model.identity")?,
            n_layer: r.u32("palu.model.block_count")? as usize,
            bits_per_value,
            budgets: if version == 1 { vec![bits_per_value] } else { r.f64s("palu.budgets")?.to_vec() },
            calibration_hash: r.u64("palu.calibration.hash")?,
            calibration: r.str("palu.calibration.source")?.to_owned(),
            calibration_tokens: r.u64("palu.calibration.tokens")?,
            metric: r.str("palu.metric")?.to_owned(),
            options: r.str("palu.options")?.to_owned(),
        };
        ensure!(
            meta.bits_per_value > 0.0 && meta.bits_per_value <= 64.0,
            "its budget of {} bits per value makes no sense",
            meta.bits_per_value
        );
        ensure!(
            meta.budgets.last() == Some(&bits_per_value)
                && meta.budgets[0] > 0.0
                && meta.budgets.windows(2).all(|w| w[0] < w[1]),
            "its budgets do not rise to {bits_per_value}"
        );
        let index = r.u32s("palu.layer.index")?;
        ensure!(!index.is_empty(), "it holds no layer");
        ensure!(index.windows(2).all(|w| w[0] < w[1]), "its layers are not in order");
        ensure!((index[index.len() - 1] as usize) < meta.n_layer, "it holds a layer that its model does not have");
        let mut layers = Vec::new();
        // what is left of the allocations
        let mut bits = [Side::Key, Side::Value].map(|s| r.u32s(&format!("palu.layer.{}.bits", s.letter())).ok());
        for (i, &il) in index.iter().enumerate() {
            let mut side = |side: Side| {
                read_side(&r, i, il as usize, side, meta.budgets.len(), &mut bits[side as usize])
                    .with_context(|| format!("layer {il}, {side:?}"))
            };
            layers.push(LayerFile { il: il as usize, sides: [side(Side::Key)?, side(Side::Value)?] });
        }
        ensure!(bits[0].is_some() == bits[1].is_some() && bits.iter().flatten().all(|b| b.is_empty()), "its allocation is of another shape");
        let file = Self { meta, layers };
        if file.is_fixed() {
            let (real, said) = (file.allocation(0.0).bits_per_value(&file.spectra(0.0)), file.meta.bits_per_value);
            ensure!(real == said, "its allocation takes {real} bits per value, not {said}");
        }
        Ok(file)
    }

    /// Lays the file out for a budget; 0 means the file's own.
    pub fn at(&self, bits_per_value: f64) -> Result<Projection> {
        self.lay_out(bits_per_value, checksum(&self.to_bytes()))
    }

    pub(crate) fn lay_out(&self, bits_per_value: f64, checksum: u64) -> Result<Projection> {
        let most = self.meta.bits_per_value;
        ensure!(bits_per_value.is_finite() && bits_per_value >= 0.0, "{bits_per_value} is not a number of bits per value");
        ensure!(
            bits_per_value <= most,
            "the projection file was made for {most} bits per value and cannot serve {bits_per_value}; convert the model again with more"
        );
        let budget = if bits_per_value == 0.0 { most } else { bits_per_value };
        ensure!(
            budget == most || !self.is_fixed(),
            "the projection file was made with an allocation of its own and serves {most} bits per value alone, not {budget}"
        );
        let spectra = self.spectra(budget);
        let allocation = self.allocation(budget);
        let real = allocation.bits_per_value(&spectra);
        ensure!(real <= budget, "{budget} bits per value are not enough even for the rows' scales, which take {real:.3}");

        let mut bits = allocation.bits.iter().map(Vec::as_slice);
        let mut rows = allocation.row_bytes.iter();
        let mut layers = Vec::new();
        for layer in &self.layers {
            let mut side = |side: Side| {
                let file = &layer.sides[side as usize];
                let bits: Vec<&[u8]> = bits.by_ref().take(file.groups.len()).collect();
                SideProj::new(side, file, &bits, *rows.next().expect("a row per side"))
            };
            layers.push(Layer { il: layer.il, sides: [side(Side::Key), side(Side::Value)] });
        }
        let mut identity = checksum;
        for bits in allocation.bits.iter().filter(|b| !b.is_empty()) {
            identity = crate::hash::xxh64(bits, identity);
        }
        Ok(Projection { meta: self.meta.clone(), bits_per_value: real, identity, layers })
    }
}

fn mean_name(il: usize, side: Side) -> String {
    format!("blk.{il}.attn_{}.mean", side.letter())
}

fn group_name(il: usize, side: Side, group: usize, what: &str) -> String {
    format!("blk.{il}.attn_{}.{group}.{what}", side.letter())
}

/// Reads side `side` of layer `il`, the `i`-th of the file, and takes its part of the allocation, if there is one, from `bits`.
fn read_side(
    r: &crate::gguf::Reader,
    i: usize,
    il: usize,
    side: Side,
    n_budget: usize,
    bits: &mut Option<&[u32]>,
) -> Result<SideFile> {
    let key = |name: &str| format!("palu.layer.{}.{name}", side.letter());
    let u32_at = |name: &str| -> Result<usize> {
        r.u32s(&key(name))?.get(i).map(|&v| v as usize).with_context(|| format!("key {} is too short", key(name)))
    };
    let (n_head_kv, head_dim, group_size) = (u32_at("head_count")?, u32_at("head_dim")?, u32_at("group_size")?);
    ensure!((1..=4096).contains(&n_head_kv), "{n_head_kv} KV heads");
    ensure!((1..=65536).contains(&head_dim), "heads of {head_dim} dimensions");
    ensure!(group_size > 0 && n_head_kv % group_size == 0, "groups of {group_size} heads do not divide {n_head_kv} KV heads");
    let weight = r.f64s(&key("weight"))?.chunks_exact(n_budget).nth(i);
    let weight = weight.with_context(|| format!("key {} is too short", key("weight")))?.to_vec();
    ensure!(weight.iter().all(|w| w.is_finite() && *w >= 0.0), "its weight {weight:?} is not a finite number");

    let mean = r.f32_tensor(&mean_name(il, side), n_head_kv * head_dim)?;
    ensure!(mean.iter().all(|v| v.is_finite()), "its mean is not finite");
    let d = group_size * head_dim;
    let mut groups = Vec::new();
    for g in 0..n_head_kv / group_size {
        let name = |what: &str| group_name(il, side, g, what);
        let rank = match r.shape(&name("variance")) {
            None => 0,
            Some(shape) => shape.iter().try_fold(1usize, |a, &b| a.checked_mul(b)).unwrap_or(usize::MAX),
        };
        ensure!(rank % SEGMENT == 0 && rank <= d.div_ceil(SEGMENT) * SEGMENT, "group {g} keeps {rank} of {d} channels");
        if rank == 0 {
            groups.push(GroupFile { variance: Vec::new(), enc: Vec::new(), dec: Vec::new(), bits: Vec::new() });
            continue;
        }
        let allocated = match bits {
            None => &[][..],
            Some(left) => {
                let (mine, rest) = left.split_at_checked(rank / SEGMENT).context("its allocation is too short")?;
                *left = rest;
                mine
            }
        };
        ensure!(allocated.iter().all(|b| (1..=MAX_BITS as u32).contains(b)), "the allocation of group {g} is out of range");
        let group = GroupFile {
            bits: allocated.iter().map(|&b| b as u8).collect(),
            variance: r.f32_tensor(&name("variance"), rank)?,
            enc: r.f16_tensor(&name("enc"), rank * d)?,
            dec: r.f16_tensor(&name("dec"), rank * d)?,
        };
        ensure!(
            group.variance.windows(2).all(|w| w[0] >= w[1]) && group.variance.iter().all(|v| v.is_finite() && *v >= 0.0),
            "the spectrum of group {g} does not fall"
        );
        ensure!(group.enc.iter().chain(&group.dec).all(|v| v.is_finite()), "the basis of group {g} is not finite");
        groups.push(group);
    }
    Ok(SideFile { n_head_kv, head_dim, group_size, weight, mean, groups })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn sample() -> ProjectionFile {
        let side = |n_head_kv: usize, head_dim: usize, group_size: usize, rank: usize| {
            let d = group_size * head_dim;
            let basis = |scale: f32| (0..rank * d).map(|i| f16::from_f32(scale * ((i * 37 % 101) as f32 - 50.0) / 50.0)).collect();
            SideFile {
                n_head_kv,
                head_dim,
                group_size,
                weight: vec![0.5, 0.25],
                mean: (0..n_head_kv * head_dim).map(|i| i as f32 * 0.01).collect(),
                groups: (0..n_head_kv / group_size)
                    .map(|g| GroupFile {
                        variance: (0..rank).map(|c| (1 + g) as f32 * 0.8f32.powi(c as i32)).collect(),
                        enc: basis(0.5),
                        dec: basis(2.0),
                        bits: Vec::new(),
                    })
                    .collect(),
            }
        };
        ProjectionFile {
            meta: Meta {
                arch: "llama".into(),
                model_name: "sample".into(),
                model_identity: 0x1234_5678_9abc_def0,
                n_layer: 3,
                bits_per_value: 4.0,
                budgets: vec![2.0, 4.0],
                calibration_hash: 7,
                calibration: "text.txt".into(),
                calibration_tokens: 4096,
                metric: "query".into(),
                options: "--bits-per-value 4".into(),
            },
            layers: vec![
                LayerFile { il: 0, sides: [side(4, 16, 4, 24), side(4, 16, 2, 16)] },
                LayerFile { il: 2, sides: [side(2, 16, 1, 8), side(2, 16, 1, 0)] },
            ],
        }
    }

    #[test]
    fn bytes_round_trip() {
        let file = sample();
        let bytes = file.to_bytes();
        assert_eq!(ProjectionFile::from_bytes(&bytes).unwrap(), file);
        assert_eq!(bytes, file.to_bytes(), "the same projection gives the same bytes");
    }

    /// Bytes with `from` replaced by `to`, of the same length, behind a valid checksum.
    fn altered(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
        let at = bytes.windows(from.len()).position(|w| w == from).expect("it is there");
        let mut bytes = bytes.to_vec();
        bytes[at..at + to.len()].copy_from_slice(to);
        let sum = checksum(&bytes);
        bytes[CHECKSUM_AT..CHECKSUM_AT + 8].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    #[test]
    fn files_of_version_1_are_read() {
        let mut file = sample();
        file.meta.budgets = vec![4.0];
        file.layers.iter_mut().flat_map(|l| &mut l.sides).for_each(|s| s.weight = vec![0.25]);
        // the budgets' key is unknown to version 1, like any other key
        let version = |v: u32| [b"palu.version".as_slice(), &4u32.to_le_bytes(), &v.to_le_bytes()].concat();
        let old = altered(&file.to_bytes(), &version(2), &version(1));
        assert_eq!(ProjectionFile::from_bytes(&old).unwrap(), file);
        let new = altered(&file.to_bytes(), &version(2), &version(3));
        assert!(ProjectionFile::from_bytes(&new).unwrap_err().to_string().contains("version 3"));
    }

    #[test]
    fn an_allocation_of_its_own_is_kept_and_serves_one_budget() {
        let mut file = sample();
        for group in file.layers.iter_mut().flat_map(|l| &mut l.sides).flat_map(|s| &mut s.groups) {
            group.bits = vec![3; group.variance.len() / SEGMENT];
        }
        let real = file.allocation(0.0).bits_per_value(&file.spectra(0.0));
        assert!(ProjectionFile::from_bytes(&file.to_bytes()).is_err(), "it takes another number of bits than it says");
        (file.meta.bits_per_value, file.meta.budgets[1]) = (real, real);
        file.meta.budgets[0] = real / 2.0;
        let read = ProjectionFile::from_bytes(&file.to_bytes()).unwrap();
        assert_eq!(read, file);
        let p = read.at(0.0).unwrap();
        assert_eq!(p.bits_per_value, real);
        assert!(p.layers.iter().flat_map(|l| &l.sides).flat_map(|s| &s.groups).all(|g| g.bits.iter().all(|&b| b == 3)));
        assert!(read.at(real / 2.0).is_err());
    }

    #[test]
    fn weights_lie_between_those_of_the_budgets_around() {
        let nodes = [1.0, 2.0, 4.0];
        let weight = |x| interpolated(&nodes, &[10.0, 20.0, 0.0], x);
        assert_eq!([0.5, 1.0, 1.5, 2.0, 3.0, 4.0].map(weight), [10.0, 10.0, 15.0, 20.0, 10.0, 0.0]);
    }

    #[test]
    fn a_change_of_any_byte_is_refused() {
        let bytes = sample().to_bytes();
        for i in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[i] ^= 1 << (i % 8);
            assert!(ProjectionFile::from_bytes(&bad).is_err(), "byte {i}");
        }
    }

    #[test]
    fn a_cut_anywhere_is_refused() {
        let bytes = sample().to_bytes();
        for n in 0..bytes.len() {
            assert!(ProjectionFile::from_bytes(&bytes[..n]).is_err(), "{n} bytes");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(ProjectionFile::from_bytes(&longer).is_err());
    }

    /// Damage behind a valid checksum, as an attacker would make it: an error or a sound file, never a crash.
    #[test]
    fn structure_is_checked_behind_the_checksum() {
        let bytes = sample().to_bytes();
        let mut refused = 0;
        for i in 0..bytes.len().min(6000) {
            for flip in [0x01, 0x80, 0xff] {
                let mut bad = bytes.clone();
                bad[i] ^= flip;
                let sum = checksum(&bad);
                bad[CHECKSUM_AT..CHECKSUM_AT + 8].copy_from_slice(&sum.to_le_bytes());
                match ProjectionFile::from_bytes(&bad) {
                    Err(_) => refused += 1,
                    Ok(file) => drop(file.at(0.0)),
                }
            }
        }
        assert!(refused > 1000, "{refused}");
    }

    #[test]
    fn one_file_serves_every_smaller_budget() {
        let file = sample();
        let mut last = 0;
        for bits in [0.8, 1.0, 2.0, 3.0, 4.0] {
            let p = file.at(bits).unwrap();
            assert!(p.bits_per_value <= bits && p.bytes_per_token() > last);
            assert_eq!(p.bits_per_value, 16.0 * p.bytes_per_token() as f64 / p.f16_bytes_per_token() as f64);
            last = p.bytes_per_token();
            for (layer, stored) in p.layers.iter().zip(&file.layers) {
                for (side, stored) in layer.sides.iter().zip(&stored.sides) {
                    let mut end = 0;
                    for (g, s) in side.groups.iter().zip(&stored.groups) {
                        assert_eq!(g.offset, end);
                        end += layout::SCALE_BYTES + g.bits.iter().map(|&b| b as usize).sum::<usize>();
                        assert_eq!(g.enc[..], s.enc[..g.enc.len()], "smaller budgets keep a prefix");
                    }
                    assert!(end <= side.row_bytes);
                }
            }
        }
        assert_ne!(file.at(2.0).unwrap().identity, file.at(3.0).unwrap().identity);
        assert_eq!(file.at(0.0).unwrap().identity, file.at(4.0).unwrap().identity);
        for bits in [-1.0, 4.5, f64::NAN, f64::INFINITY, 0.1] {
            assert!(file.at(bits).is_err(), "{bits}");
        }
    }
}
