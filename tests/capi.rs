//! The C ABI from C and C++: `include/palu.h` compiles in both without a warning, and tests/capi.c uses it under
//! AddressSanitizer with the link line that the README documents.

mod runtime;
use runtime::{projection, succeed, MODEL};
use std::path::{Path, PathBuf};
use std::process::Command;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// As the README has it.
const LINK: [&str; 4] = ["-lpthread", "-ldl", "-lm", "-lgcc_s"];

fn library() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_palu")).with_file_name("libpalu.a")
}

#[test]
fn the_header_compiles_as_c_and_cpp() {
    for (compiler, language) in [("cc", "c"), ("c++", "c++")] {
        let file = tempfile::Builder::new().suffix(&format!(".{}", if language == "c" { "c" } else { "cpp" })).tempfile().unwrap();
        std::fs::write(file.path(), "#include \"palu.h\"\nint main(void) { return palu_abi_version() - PALU_ABI_VERSION; }\n").unwrap();
        succeed(Command::new(compiler).args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-I"]).arg(format!("{ROOT}/include")).arg(file.path()));
    }
}

#[test]
fn a_c_program_uses_the_library() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("capi");
    succeed(
        Command::new("cc")
            .args(["-std=c11", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-o"])
            .arg(&program)
            .arg(format!("{ROOT}/tests/capi.c"))
            .arg(format!("-I{ROOT}/include"))
            .arg(library())
            .args(LINK),
    );
    succeed(Command::new(&program).arg(projection("2.25")).arg(MODEL));
}

#[test]
fn the_readme_documents_the_link_line() {
    let readme = std::fs::read_to_string(format!("{ROOT}/README.md")).unwrap();
    assert!(readme.contains(&format!("libpalu.a {}", LINK.join(" "))), "README.md does not have the link line of this test");
}
