//! Compiles the host side of the CUDA kernels' launch plan, and, where nvcc is found, the kernels into one fatbin.
//!
//! nvcc: `PALU_NVCC`, else `$CUDA_HOME/bin/nvcc`, `$CUDA_PATH/bin/nvcc`, `build/cuda/bin/nvcc` (made by scripts/cuda.py), else the PATH.
//! `PALU_NVCC=none` builds without kernels. `PALU_CUDA_ARCHS` (e.g. `90a`) compiles for fewer architectures.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Machine code for these, and PTX of the first for anything newer.
const ARCHS: &str = "75 80 86 89 90a 100 120";

fn nvcc() -> Option<PathBuf> {
    for name in ["PALU_NVCC", "CUDA_HOME", "CUDA_PATH", "PALU_CUDA_ARCHS", "PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let under = |folder: PathBuf| Some(folder.join("bin/nvcc")).filter(|p| p.exists());
    match std::env::var("PALU_NVCC") {
        Ok(given) if given == "none" => return None,
        Ok(given) => {
            assert!(Path::new(&given).exists(), "PALU_NVCC={given} does not exist");
            return Some(given.into());
        }
        Err(_) => {}
    }
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("build/cuda");
    println!("cargo:rerun-if-changed={}", own.join("bin/nvcc").display());
    ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(std::env::var_os)
        .map(PathBuf::from)
        .chain([own])
        .find_map(under)
        .or_else(|| std::env::split_paths(&std::env::var_os("PATH")?).map(|p| p.join("nvcc")).find(|p| p.exists()))
}

fn main() {
    println!("cargo:rustc-check-cfg=cfg(palu_fatbin)");
    println!("cargo:rerun-if-changed=cuda");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    #[cfg(feature = "cuda")]
    cc::Build::new().std("c11").warnings(true).file("cuda/plan.c").file("cuda/layout.c").compile("palu_cuda_plan");

    let Some(nvcc) = nvcc() else {
        println!("cargo:warning=nvcc was not found: building without CUDA kernels");
        return;
    };
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("palu.fatbin");
    let archs = std::env::var("PALU_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.into());
    let mut command = Command::new(&nvcc);
    command.args(["-std=c++17", "-O3", "-fatbin", "-t", "0", "cuda/palu.cu", "-o"]).arg(&out);
    for arch in archs.split_whitespace() {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    if let Some(first) = archs.split_whitespace().next() {
        command.arg(format!("-gencode=arch=compute_{first},code=compute_{first}"));
    }
    match command.status() {
        Ok(status) => assert!(status.success(), "{} failed: {status}", nvcc.display()),
        Err(e) => panic!("cannot run {}: {e}", nvcc.display()),
    }
    println!("cargo:rustc-cfg=palu_fatbin");
}
