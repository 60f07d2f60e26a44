//! What survives an interruption: the statistics collected so far, and the divergences measured so far.
//!
//! Both are files of the converter alone, tied to what they were made from by an identity: a file of another identity, a damaged
//! one or a part of one is as good as none.

use super::stats::LayerStats;
use super::weigh::HeadWeights;
use crate::hash::xxh64;
use anyhow::{Context, Result};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// Changes whenever what is collected does.
const MAGIC: u64 = u64::from_le_bytes(*b"PALUST01");

/// `path` with something after its name.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Statistics of one pass over the text: a header, then a piece per layer, then one of all heads' weights, each followed by its hash.
pub struct Checkpoint {
    path: PathBuf,
    /// of model, tokens and everything that decides what is collected
    identity: u64,
}

impl Checkpoint {
    pub fn new(path: PathBuf, identity: u64) -> Self {
        Self { path, identity }
    }

    /// Replaces the file by one of the first `n_window` windows.
    pub fn save<'w>(&self, n_window: usize, layers: &BTreeMap<usize, LayerStats>, weights: impl Iterator<Item = &'w HeadWeights>) -> Result<()> {
        let temporary = with_suffix(&self.path, ".tmp");
        let write = || -> std::io::Result<()> {
            let mut file = BufWriter::new(File::create(&temporary)?);
            let mut piece = Vec::new();
            let mut put = |piece: &mut Vec<u8>| {
                piece.extend(xxh64(piece, self.identity).to_le_bytes());
                file.write_all(piece)?;
                piece.clear();
                std::io::Result::Ok(())
            };
            piece.extend([MAGIC, self.identity, n_window as u64].iter().flat_map(|v| v.to_le_bytes()));
            put(&mut piece)?;
            for stats in layers.values() {
                let mut floats = Vec::new();
                stats.save(&mut floats);
                piece.extend(floats.iter().flat_map(|v| v.to_le_bytes()));
                put(&mut piece)?;
            }
            let mut floats = Vec::new();
            weights.for_each(|w| w.save(&mut floats));
            piece.extend(floats.iter().flat_map(|v| v.to_le_bytes()));
            put(&mut piece)?;
            file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
            std::fs::rename(&temporary, &self.path)
        };
        write().inspect_err(|_| _ = std::fs::remove_file(&temporary)).with_context(|| format!("cannot write statistics to {}", self.path.display()))
    }

    /// Sets what an earlier run of the same work saved; returns how many windows it is of. On `None` what is set is undefined.
    pub fn load<'w>(&self, layers: &mut BTreeMap<usize, LayerStats>, weights: impl Iterator<Item = &'w mut HeadWeights>) -> Option<usize> {
        let mut file = BufReader::new(File::open(&self.path).ok()?);
        let mut take = |n: usize| -> Option<Vec<u8>> {
            let mut piece = vec![0; n + 8];
            file.read_exact(&mut piece).ok()?;
            let hash = piece.split_off(n);
            (hash == xxh64(&piece, self.identity).to_le_bytes()).then_some(piece)
        };
        let words = |piece: Vec<u8>| piece.chunks_exact(8).map(|b| b.try_into().expect("eight bytes")).collect::<Vec<[u8; 8]>>();
        let head = words(take(24)?);
        if u64::from_le_bytes(head[0]) != MAGIC || u64::from_le_bytes(head[1]) != self.identity {
            return None;
        }
        let mut floats = |n: usize| Some(words(take(8 * n)?).into_iter().map(f64::from_le_bytes).collect::<Vec<f64>>());
        for stats in layers.values_mut() {
            stats.restore(&mut floats(stats.n_float())?.as_slice())?;
        }
        let weights: Vec<_> = weights.collect();
        let all = floats(weights.iter().map(|w| w.n_float()).sum())?;
        let mut rest = all.as_slice();
        for weights in weights {
            weights.restore(&mut rest)?;
        }
        Some(u64::from_le_bytes(head[2]) as usize)
    }

    pub fn remove(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Divergences that were measured, by a hash of everything that they depend on: lines of a text file, appended as they come.
pub struct Memo {
    path: PathBuf,
    statistics: PathBuf,
    known: HashMap<u64, f64>,
}

impl Memo {
    /// Reads what stands beside the checkpoint `statistics`; lines that make no sense (the last of an interrupted run) are left out.
    pub fn open(statistics: &Path) -> Self {
        let path = with_suffix(statistics, ".probes");
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let parse = |line: &str| {
            let (key, value) = line.strip_suffix(" .")?.split_once(' ')?;
            Some((u64::from_str_radix(key, 16).ok()?, f64::from_bits(u64::from_str_radix(value, 16).ok()?)))
        };
        let known = text.lines().filter_map(parse).collect();
        Self { path, statistics: statistics.to_owned(), known }
    }

    pub fn get(&self, key: u64) -> Option<f64> {
        self.known.get(&key).copied()
    }

    /// A file that cannot be written costs no more than the time of the measurement. Without statistics to take up, it would be
    /// litter.
    pub fn put(&mut self, key: u64, value: f64) {
        self.known.insert(key, value);
        if !self.statistics.exists() {
            return;
        }
        let file = File::options().append(true).create(true).open(&self.path);
        // the newline first: what an interrupted run left of its last line ends there
        let _ = file.and_then(|mut f| f.write_all(format!("\n{key:016x} {:016x} .", value.to_bits()).as_bytes()));
    }

    pub fn remove(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::super::stats::{LayerShape, Scoring};
    use super::*;
    use crate::rope::RopeParams;

    #[test]
    fn only_the_same_work_is_taken_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("stats");
        let shape = LayerShape { n_head: 4, n_head_kv: 2, head_dim_k: 6, head_dim_v: 4, rope: RopeParams::none(), scoring: Scoring::plain(6) };
        let fresh = || (BTreeMap::from([(1, LayerStats::new(&shape, 1, true, 4)), (5, LayerStats::new(&shape, 1, true, 4))]), vec![HeadWeights::new(&shape); 4]);
        let (layers, weights) = fresh();
        let weighted = &layers[&5].attended.as_ref().unwrap()[1];
        weighted.add_weighted(1, &[1.0; 16], &[0.5; 8], &[2.0, 3.0]);
        let checkpoint = Checkpoint::new(path.clone(), 7);
        checkpoint.save(3, &layers, weights.iter()).unwrap();

        let load = |identity: u64| {
            let (mut layers, mut weights) = fresh();
            let n = Checkpoint::new(path.clone(), identity).load(&mut layers, weights.iter_mut());
            n.map(|n| (n, layers[&5].attended.as_ref().unwrap()[1].finish()))
        };
        assert_eq!(load(7), Some((3, layers[&5].attended.as_ref().unwrap()[1].finish())));
        assert_eq!(load(8), None, "another identity");
        let bytes = std::fs::read(&path).unwrap();
        for i in (0..bytes.len()).step_by(11) {
            let mut bad = bytes.clone();
            bad[i] ^= 4;
            std::fs::write(&path, &bad).unwrap();
            assert_eq!(load(7), None, "byte {i}");
        }
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(load(7), None, "cut short");
        let names = std::fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(names, 1, "no temporary file is left");
    }

    #[test]
    fn divergences_survive_and_cut_lines_do_not() {
        let directory = tempfile::tempdir().unwrap();
        let statistics = directory.path().join("a.stats");
        let path = directory.path().join("a.stats.probes");
        Memo::open(&statistics).put(1, 0.1);
        assert!(!path.exists(), "without statistics there is nothing to take up");
        std::fs::write(&statistics, "").unwrap();
        let mut memo = Memo::open(&statistics);
        memo.put(1, 0.1);
        memo.put(2, 1e-9);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 3]).unwrap();
        let mut memo = Memo::open(&statistics);
        assert_eq!((memo.get(1), memo.get(2)), (Some(0.1), None));
        memo.put(3, 0.25);
        let memo = Memo::open(&statistics);
        assert_eq!((memo.get(1), memo.get(2), memo.get(3)), (Some(0.1), None, Some(0.25)));
    }
}
