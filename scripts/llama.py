#!/usr/bin/env python3
"""Builds the patched llama.cpp: fetches the pinned source, applies ggml-patches/, configures and compiles.

usage: llama.py source | build [TARGET ...]

Everything lands under build/ (PALU_BUILD overrides):
  tools/           cmake and ninja, installed by pip
  llama.cpp-src/   the source with the patches applied
  llama.cpp/       the CMake build; programs in llama.cpp/bin

In the environment, LLAMA_CPP_DIR names a checkout of the pinned version to copy instead of downloading one, and
LLAMA_CMAKE_ARGS holds more arguments for CMake, as in LLAMA_CMAKE_ARGS=-DGGML_CUDA=ON.
"""
import filecmp
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("PALU_BUILD", ROOT / "build")).resolve()
TOOLS, SOURCE, BINARY = BUILD / "tools", BUILD / "llama.cpp-src", BUILD / "llama.cpp"

# llama.cpp b11312 (0c1e57098bba43ac29e6e3b677cdceebdd22334f) as this package's source distribution carries it
PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
PATCHES = sorted((ROOT / "ggml-patches").glob("*.patch"))
TARGETS = ["llama-perplexity", "llama-bench", "llama-completion", "llama-cli", "llama-server",
           "llama-palu-convert", "test-llama-archs", "palu-steps"]


def say(text):
    print(f"llama: {text}", flush=True)


def run(*command, **kwargs):
    result = subprocess.run([str(c) for c in command], **kwargs)
    if result.returncode != 0:
        sys.exit(f"llama: '{' '.join(str(c) for c in command)}' failed with status {result.returncode}")
    return result


def tools():
    """cmake and ninja, from pip, in a folder of this project."""
    bin_dir = TOOLS / "bin"
    if not ((bin_dir / "cmake").exists() and (bin_dir / "ninja").exists()):
        say("installing cmake and ninja into build/tools")
        run(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", "--target", TOOLS,
            "cmake==3.31.10", "ninja==1.13.0")
    env = dict(os.environ)
    env["PATH"] = f"{bin_dir}{os.pathsep}{env['PATH']}"
    env["PYTHONPATH"] = f"{TOOLS}{os.pathsep}{env.get('PYTHONPATH', '')}"
    return env


def sha256(path):
    h = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            h.update(block)
    return h.hexdigest()


def pristine():
    """The unpatched source: a folder."""
    given = os.environ.get("LLAMA_CPP_DIR")
    if given:
        if not (Path(given) / "src" / "llama-kv-cache.cpp").exists():
            sys.exit(f"llama: LLAMA_CPP_DIR={given} is not a llama.cpp checkout")
        return Path(given)
    folder = BUILD / "download"
    sdist = folder / f"{PACKAGE.replace('-', '_')}-{VERSION}.tar.gz"
    if not sdist.exists():
        say(f"downloading the source distribution of {PACKAGE} {VERSION}, which carries llama.cpp b11312")
        run(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}", "-d", folder)
    if sha256(sdist) != SDIST_SHA256:
        sys.exit(f"llama: {sdist} has the wrong checksum; delete it and try again")
    inner = f"{PACKAGE.replace('-', '_')}-{VERSION}/vendor/llama.cpp/"
    out = BUILD / "llama.cpp-pristine"
    if not (out / ".complete").exists():
        shutil.rmtree(out, ignore_errors=True)
        with tarfile.open(sdist) as tar:
            for member in tar:
                if member.name.startswith(inner) and (member.isfile() or member.isdir()):
                    member.name = member.name[len(inner):]
                    if member.name and not member.name.startswith(".git"):
                        tar.extract(member, out)
        (out / ".complete").touch()
    return out


def source():
    """Patches a fresh copy, then moves over what changed, so that an incremental build stays incremental."""
    origin = pristine()
    stamp_text = "\n".join([str(origin)] + [f"{p.name} {sha256(p)}" for p in PATCHES])
    stamp = SOURCE / ".palu-stamp"
    if stamp.exists() and stamp.read_text() == stamp_text:
        return
    say(f"applying {len(PATCHES)} patches")
    fresh = BUILD / "llama.cpp-fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(origin, fresh, ignore=shutil.ignore_patterns(".git", ".complete", "build"))
    # a folder inside another repository is that repository's to git; this makes it nobody's
    env = dict(os.environ, GIT_CEILING_DIRECTORIES=str(BUILD))
    for patch in PATCHES:
        run("git", "apply", "--whitespace=nowarn", patch, cwd=fresh, env=env)
    if SOURCE.exists():
        for path in sorted(p for p in SOURCE.rglob("*") if p.is_file()):
            if not (fresh / path.relative_to(SOURCE)).exists():
                path.unlink()
    for path in (p for p in fresh.rglob("*") if p.is_file()):
        target = SOURCE / path.relative_to(fresh)
        if not target.exists() or not filecmp.cmp(path, target, shallow=False):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    shutil.rmtree(fresh)
    stamp.write_text(stamp_text)


# loads a tile configuration over whatever the stack held, and clears a tile
AMX_PROBE = """
#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
__attribute__((noinline)) static void dirty_stack(void) {
    volatile unsigned char dirt[1024];
    for (int i = 0; i < 1024; ++i) { dirt[i] = 0xff; }
}
__attribute__((noinline)) static int use_tile(void) {
    struct { unsigned char palette, row, pad[14]; unsigned short colsb[16]; unsigned char rows[16]; } config;
    memset(&config, 0, sizeof(config));
    config.palette = 1; config.colsb[0] = 64; config.rows[0] = 16;
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_release();
    return 0;
}
int main(void) {
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) != 0) { return 1; }
    dirty_stack();
    return use_tile();
}
"""


def machine_flags():
    """Compiler flags that keep -march=native from using what this machine will not run.

    AMX is tried, optimized as the build will be: in GCC before 12.4 and 13.3, loading a tile configuration reads eight of its
    64 bytes, so the others are never written (bug 114098), and llama.cpp's first matrix product dies. Some hypervisors show AMX and do not run it, too.
    """
    if platform.machine() != "x86_64" or sys.platform != "linux" or "amx_tile" not in Path("/proc/cpuinfo").read_text():
        return ""
    program = BUILD / "amx-probe"
    compiled = subprocess.run(["cc", "-O3", "-mamx-tile", "-x", "c", "-", "-o", str(program)], input=AMX_PROBE, text=True,
                              stderr=subprocess.DEVNULL)
    if compiled.returncode == 0 and subprocess.run([str(program)]).returncode == 0:
        return ""
    say("AMX does not work here with this compiler; building without")
    return "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


def build(targets):
    env = tools()
    source()
    library = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "libpalu.a"
    if not library.exists():
        sys.exit(f"llama: {library} is missing; run 'cargo build --release' first")
    flags = machine_flags()
    run("cmake", "-S", SOURCE, "-B", BINARY, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF",
        "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_BUILD_HTML=OFF",
        f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}",
        f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={ROOT / 'tests' / 'llama' / 'steps.cmake'}",
        f"-DLLAMA_PALU_INCLUDE={ROOT / 'include'}", f"-DLLAMA_PALU_LIB={library}",
        *shlex.split(os.environ.get("LLAMA_CMAKE_ARGS", "")), env=env, stdout=subprocess.DEVNULL)
    # ninja prints its own progress line
    run("ninja", "-C", BINARY, *targets, env=env)


def until_said(pattern, run, attempts=3):
    """What run() returns, a program's output, and where the pattern is in it, or None. llama.cpp's log is written by a thread of its own,
    and now and then its last lines are lost when the program ends: then it runs again."""
    for _ in range(attempts):
        output = run()
        found = re.search(pattern, output)
        if found:
            break
    return output, found


def main():
    match sys.argv[1:]:
        case ["source"]:
            source()
        case ["build", *targets]:
            build(targets or TARGETS)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
