//! GGUF version 3, as far as a projection file needs it: a reader for untrusted bytes and a writer.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. The reader checks every length against the bytes
//! that are there before it uses it, and never allocates more than the file is long.

use anyhow::{bail, ensure, Context, Result};
use std::collections::HashMap;
use std::io::{self, Write};

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
const ALIGNMENT: usize = 32;
/// Header bytes before the first key: magic, version, counts of tensors and keys.
pub const HEADER_BYTES: usize = 24;
const MAX_DIMS: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorType {
    F32 = 0,
    F16 = 1,
}

impl TensorType {
    fn bytes(self) -> usize {
        match self {
            TensorType::F32 => 4,
            TensorType::F16 => 2,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U32(u32),
    U64(u64),
    F64(f64),
    Str(String),
    U32s(Vec<u32>),
    F64s(Vec<f64>),
    /// a kind that projection files do not use
    Other,
}

const T_U8: u32 = 0;
const T_I8: u32 = 1;
const T_U16: u32 = 2;
const T_I16: u32 = 3;
const T_U32: u32 = 4;
const T_I32: u32 = 5;
const T_F32: u32 = 6;
const T_BOOL: u32 = 7;
const T_STR: u32 = 8;
const T_ARR: u32 = 9;
const T_U64: u32 = 10;
const T_I64: u32 = 11;
const T_F64: u32 = 12;

fn scalar_bytes(kind: u32) -> Option<usize> {
    Some(match kind {
        T_U8 | T_I8 | T_BOOL => 1,
        T_U16 | T_I16 => 2,
        T_U32 | T_I32 | T_F32 => 4,
        T_U64 | T_I64 | T_F64 => 8,
        _ => return None,
    })
}

struct Cursor<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.data.len());
        let end = end.context("the file ends in the middle of its header")?;
        let bytes = &self.data[self.at..end];
        self.at = end;
        Ok(bytes)
    }
    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into()?))
    }
    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into()?))
    }
    fn size(&mut self) -> Result<usize> {
        usize::try_from(self.u64()?).context("a length does not fit this machine")
    }
    fn string(&mut self) -> Result<&'a str> {
        let n = self.size()?;
        std::str::from_utf8(self.take(n)?).context("a name or text is not UTF-8")
    }
    fn array<const N: usize, T>(&mut self, n: usize, f: impl Fn([u8; N]) -> T) -> Result<Vec<T>> {
        let bytes = self.take(n.checked_mul(N).context("an array is too long")?)?;
        Ok(bytes.chunks_exact(N).map(|c| f(c.try_into().unwrap())).collect())
    }
    fn value(&mut self, kind: u32) -> Result<Value> {
        Ok(match kind {
            T_U32 => Value::U32(self.u32()?),
            T_U64 => Value::U64(self.u64()?),
            T_F64 => Value::F64(f64::from_le_bytes(self.take(8)?.try_into()?)),
            T_STR => Value::Str(self.string()?.to_owned()),
            T_ARR => {
                let (kind, n) = (self.u32()?, self.size()?);
                match kind {
                    T_U32 => Value::U32s(self.array(n, u32::from_le_bytes)?),
                    T_F64 => Value::F64s(self.array(n, f64::from_le_bytes)?),
                    T_STR => {
                        for _ in 0..n {
                            self.string()?;
                        }
                        Value::Other
                    }
                    _ => {
                        let size = scalar_bytes(kind).with_context(|| format!("unknown array type {kind}"))?;
                        self.take(n.checked_mul(size).context("an array is too long")?)?;
                        Value::Other
                    }
                }
            }
            _ => {
                self.take(scalar_bytes(kind).with_context(|| format!("unknown value type {kind}"))?)?;
                Value::Other
            }
        })
    }
}

#[derive(Clone, Debug)]
struct TensorInfo {
    kind: u32,
    shape: Vec<usize>,
    /// of the data, from the start of the file
    start: usize,
}

/// A parsed GGUF over borrowed bytes.
#[derive(Debug)]
pub struct Reader<'a> {
    data: &'a [u8],
    values: HashMap<String, Value>,
    tensors: HashMap<String, TensorInfo>,
}

impl<'a> Reader<'a> {
    pub fn parse(data: &'a [u8]) -> Result<Self> {
        let mut c = Cursor { data, at: 0 };
        ensure!(c.take(4).ok() == Some(MAGIC.as_slice()), "not a GGUF file");
        let version = c.u32()?;
        ensure!(version == VERSION, "GGUF version {version}, expected {VERSION}");
        let (n_tensor, n_value) = (c.size()?, c.size()?);
        let mut values = HashMap::new();
        for _ in 0..n_value {
            let key = c.string()?;
            let kind = c.u32()?;
            let value = c.value(kind).with_context(|| format!("key {key}"))?;
            ensure!(values.insert(key.to_owned(), value).is_none(), "key {key} occurs twice");
        }
        let mut tensors = HashMap::new();
        for _ in 0..n_tensor {
            let name = c.string()?;
            let n_dims = c.u32()? as usize;
            ensure!(n_dims <= MAX_DIMS, "tensor {name} has {n_dims} dimensions");
            let shape = (0..n_dims).map(|_| c.size()).collect::<Result<Vec<_>>>()?;
            let info = TensorInfo { kind: c.u32()?, shape, start: c.size()? };
            ensure!(tensors.insert(name.to_owned(), info).is_none(), "tensor {name} occurs twice");
        }
        let base = c.at.div_ceil(ALIGNMENT) * ALIGNMENT;
        for (name, t) in &mut tensors {
            t.start = t.start.checked_add(base).with_context(|| format!("tensor {name} lies outside of the file"))?;
        }
        Ok(Self { data, values, tensors })
    }

    pub fn value(&self, key: &str) -> Result<&Value> {
        self.values.get(key).with_context(|| format!("key {key} is missing"))
    }
    pub fn u32(&self, key: &str) -> Result<u32> {
        match self.value(key)? {
            Value::U32(v) => Ok(*v),
            _ => bail!("key {key} is not a u32"),
        }
    }
    pub fn u64(&self, key: &str) -> Result<u64> {
        match self.value(key)? {
            Value::U64(v) => Ok(*v),
            _ => bail!("key {key} is not a u64"),
        }
    }
    pub fn f64(&self, key: &str) -> Result<f64> {
        match self.value(key)? {
            Value::F64(v) => Ok(*v),
            _ => bail!("key {key} is not an f64"),
        }
    }
    pub fn str(&self, key: &str) -> Result<&str> {
        match self.value(key)? {
            Value::Str(v) => Ok(v),
            _ => bail!("key {key} is not a string"),
        }
    }
    pub fn u32s(&self, key: &str) -> Result<&[u32]> {
        match self.value(key)? {
            Value::U32s(v) => Ok(v),
            _ => bail!("key {key} is not an array of u32"),
        }
    }
    pub fn f64s(&self, key: &str) -> Result<&[f64]> {
        match self.value(key)? {
            Value::F64s(v) => Ok(v),
            _ => bail!("key {key} is not an array of f64"),
        }
    }

    /// Dimensions of a tensor, fastest first, or `None` if there is no such tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| t.shape.as_slice())
    }

    /// Where a tensor's data begins in the file, of whatever type it is.
    pub fn start(&self, name: &str) -> Option<usize> {
        self.tensors.get(name).map(|t| t.start)
    }

    fn tensor(&self, name: &str, kind: TensorType, n: usize) -> Result<&'a [u8]> {
        let t = self.tensors.get(name).with_context(|| format!("tensor {name} is missing"))?;
        ensure!(t.kind == kind as u32, "tensor {name} has type {}, expected {kind:?}", t.kind);
        let count = t.shape.iter().try_fold(1usize, |a, &b| a.checked_mul(b));
        ensure!(count == Some(n), "tensor {name} has shape {:?}, expected {n} elements", t.shape);
        let end = n.checked_mul(kind.bytes()).and_then(|b| b.checked_add(t.start));
        let end = end.filter(|&e| e <= self.data.len()).with_context(|| format!("tensor {name} lies outside of the file"))?;
        Ok(&self.data[t.start..end])
    }

    pub fn f32_tensor(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        let bytes = self.tensor(name, TensorType::F32, n)?;
        Ok(bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect())
    }
    pub fn f16_tensor(&self, name: &str, n: usize) -> Result<Vec<half::f16>> {
        let bytes = self.tensor(name, TensorType::F16, n)?;
        Ok(bytes.chunks_exact(2).map(|c| half::f16::from_le_bytes(c.try_into().unwrap())).collect())
    }
}

/// Collects keys and tensors, then writes them in the order given.
#[derive(Default)]
pub struct Writer {
    values: Vec<(String, Value)>,
    tensors: Vec<(String, TensorType, Vec<usize>, Vec<u8>)>,
}

impl Writer {
    pub fn value(&mut self, key: &str, value: Value) {
        self.values.push((key.to_owned(), value));
    }
    pub fn f32_tensor(&mut self, name: &str, shape: &[usize], data: &[f32]) {
        assert_eq!(shape.iter().product::<usize>(), data.len());
        let bytes = data.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensors.push((name.to_owned(), TensorType::F32, shape.to_vec(), bytes));
    }
    pub fn f16_tensor(&mut self, name: &str, shape: &[usize], data: &[half::f16]) {
        assert_eq!(shape.iter().product::<usize>(), data.len());
        let bytes = data.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensors.push((name.to_owned(), TensorType::F16, shape.to_vec(), bytes));
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.write(&mut out).expect("writing to memory does not fail");
        out
    }

    fn write(&self, out: &mut Vec<u8>) -> io::Result<()> {
        let string = |out: &mut Vec<u8>, s: &str| {
            out.extend((s.len() as u64).to_le_bytes());
            out.extend(s.as_bytes());
        };
        out.write_all(MAGIC)?;
        out.write_all(&VERSION.to_le_bytes())?;
        out.write_all(&(self.tensors.len() as u64).to_le_bytes())?;
        out.write_all(&(self.values.len() as u64).to_le_bytes())?;
        for (key, value) in &self.values {
            string(out, key);
            match value {
                Value::U32(v) => {
                    out.extend(T_U32.to_le_bytes());
                    out.extend(v.to_le_bytes());
                }
                Value::U64(v) => {
                    out.extend(T_U64.to_le_bytes());
                    out.extend(v.to_le_bytes());
                }
                Value::F64(v) => {
                    out.extend(T_F64.to_le_bytes());
                    out.extend(v.to_le_bytes());
                }
                Value::Str(v) => {
                    out.extend(T_STR.to_le_bytes());
                    string(out, v);
                }
                Value::U32s(v) => {
                    out.extend(T_ARR.to_le_bytes());
                    out.extend(T_U32.to_le_bytes());
                    out.extend((v.len() as u64).to_le_bytes());
                    v.iter().for_each(|v| out.extend(v.to_le_bytes()));
                }
                Value::F64s(v) => {
                    out.extend(T_ARR.to_le_bytes());
                    out.extend(T_F64.to_le_bytes());
                    out.extend((v.len() as u64).to_le_bytes());
                    v.iter().for_each(|v| out.extend(v.to_le_bytes()));
                }
                Value::Other => unreachable!("only the reader makes these"),
            }
        }
        let mut offset = 0usize;
        for (name, kind, shape, data) in &self.tensors {
            string(out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().for_each(|&n| out.extend((n as u64).to_le_bytes()));
            out.extend((*kind as u32).to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset += data.len().div_ceil(ALIGNMENT) * ALIGNMENT;
        }
        for (_, _, _, data) in &self.tensors {
            out.resize(out.len().div_ceil(ALIGNMENT) * ALIGNMENT, 0);
            out.extend(data);
        }
        out.resize(out.len().div_ceil(ALIGNMENT) * ALIGNMENT, 0);
        Ok(())
    }
}
