#!/usr/bin/env python3
"""Lays out nvcc under build/cuda from Python wheels, for machines without a CUDA toolkit: kernels can then be compiled, not run.

usage: cuda.py

Does nothing where CUDA_HOME, CUDA_PATH, PALU_NVCC or the PATH already name an nvcc.
"""
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

DEST = Path(__file__).resolve().parent.parent / "build" / "cuda"
PACKAGES = ["cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2"]


def main():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    if "PALU_NVCC" in os.environ or shutil.which("nvcc") or any((Path(home) / "bin" / "nvcc").exists() for home in homes):
        return
    if (DEST / "bin" / "nvcc").exists():
        return
    if platform.machine() not in ("x86_64", "aarch64") or sys.platform != "linux":
        print("cuda: there are no nvcc wheels for this platform; building without CUDA kernels", file=sys.stderr)
        return
    print("cuda: installing nvcc into build/cuda", flush=True)
    packages = DEST / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore", "--upgrade", "--target", str(packages)]
    if subprocess.run(pip + PACKAGES).returncode != 0:
        sys.exit("cuda: pip could not install nvcc")
    toolkit = packages / "nvidia" / "cu13"
    if not (toolkit / "bin" / "nvcc").exists():
        sys.exit(f"cuda: {toolkit} holds no nvcc")
    for name in ("include", "lib", "nvvm", "bin"):  # bin last: it says that all is there
        link = DEST / name
        if link.is_symlink():
            link.unlink()
        link.symlink_to(os.path.relpath(toolkit / name, DEST))


main()
