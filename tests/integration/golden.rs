//! Golden sessions of the command line (`tests/cli`): help, usage errors, exit codes, JSON errors. After a change that
//! is meant, `TRYCMD=overwrite cargo test --test integration golden::` records them anew; read the difference.

use std::path::Path;

#[test]
fn sessions_are_as_recorded() {
    // Nothing of the developer's own surroundings; a session sets CLAVIGER_ENV itself where it matters.
    trycmd::TestCases::new()
        .register_bin("claviger", Path::new(env!("CARGO_BIN_EXE_claviger")))
        .env("CLAVIGER_ADDR", "")
        .env("CLAVIGER_TOKEN", "unused")
        .env("CLAVIGER", env!("CARGO_BIN_EXE_claviger"))
        .env("XDG_RUNTIME_DIR", "/nonexistent")
        .env("COLUMNS", "100")
        .case("tests/cli/*.trycmd")
        .case("tests/cli/*.toml");
}
