//! Parse, run, exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    claviger::cli::run(std::env::args_os(), std::env::vars_os())
}
