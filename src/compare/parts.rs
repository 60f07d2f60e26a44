//! Results of finished parts, kept in the output folder under everything that they depend on, so that an interrupted or
//! repeated comparison goes on where it was.

use crate::hash::xxh64;
use anyhow::{Context, Result};
use serde_json::{json, Value};
use std::path::{Path, PathBuf};

/// Changes when a part's content would mean something else.
const VERSION: u32 = 1;

pub struct Parts {
    folder: PathBuf,
    /// what every part depends on
    base: String,
}

/// Writes a file whole or not at all.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, path)).map_err(|e| {
        let _ = std::fs::remove_file(&temporary);
        anyhow::Error::new(e).context(format!("cannot write {}", path.display()))
    })
}

impl Parts {
    pub fn open(out: &Path, base: &str) -> Result<Self> {
        let folder = out.join("parts");
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        Ok(Self { folder, base: format!("{VERSION} {base}") })
    }

    fn path(&self, kind: &str, key: &str) -> (PathBuf, String) {
        let key = format!("{} {kind} {key}", self.base);
        (self.folder.join(format!("{kind}-{:016x}.json", xxh64(key.as_bytes(), 0))), key)
    }

    /// A part that was finished before. One that cannot be read is as good as none.
    pub fn get(&self, kind: &str, key: &str) -> Option<Value> {
        let (path, key) = self.path(kind, key);
        let mut part: Value = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        (part["key"] == *key).then(|| part["value"].take())
    }

    pub fn put(&self, kind: &str, key: &str, value: &Value) -> Result<()> {
        let (path, key) = self.path(kind, key);
        write(&path, json!({ "key": key, "value": value }).to_string().as_bytes())
    }
}
