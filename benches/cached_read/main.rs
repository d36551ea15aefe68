//! What a cached read costs, against a bare tonic echo of the same message sizes: the same client, the same machine,
//! the same run. Beside it what else has a bound: batches, TLS, decisions, memory, `exec`. Absolute figures mean little
//! alone.
//!
//! ```text
//! benches/compare [--json | --short]                      all rows beside their targets: the way in
//! cargo bench --bench cached_read -- --rows policies,exec some rows: rates, p99, batch, tls, start, entry, policies, exec
//! cargo bench --bench cached_read -- --seconds 4          longer windows, less noise
//! cargo bench --bench cached_read -- --rounds 9           more turns, less noise
//! ```
//!
//! Server and client are processes of their own, each pinned to one core. Those that are compared take turns, row by
//! row and several times within a row, so that a drift of the machine's speed hits both; see turns.rs. Everything is
//! kept under `TMPDIR`, whose disk is what durable answers wait for: a file system in memory has none.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "a benchmark reads the time, prints, and stops when something is wrong"
)]

mod batch;
mod certificates;
mod client;
mod exec;
mod handshakes;
mod memory;
mod options;
mod policies;
#[path = "../shared/process.rs"]
mod process;
#[path = "../shared/program.rs"]
mod program;
mod reads;
mod report;
mod server;
mod start;
#[path = "../shared/teams.rs"]
mod teams;
mod turns;

use std::path::Path;
use std::time::{Duration, Instant};

use client::Bench;
use options::Options;
use process::{Side, pin};
use report::Report;

/// The size of a value that is read, in bytes.
const VALUE: usize = 200;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match *arguments.as_slice() {
        ["--serve", what, folder] => server::serve(what, Path::new(folder)),
        ["--ask", address, token, connections, streams, times] => {
            let number = |text: &str| text.parse().expect("a number");
            client::ask(address, token, number(connections), number(streams), times.parse().unwrap());
        }
        ["--memory"] => memory::fill(),
        _ => {
            let options = Options::parse(&arguments).unwrap_or_else(|problem| end(2, &problem));
            measure(&options).unwrap_or_else(|problem| end(1, &problem));
        }
    }
}

fn end(code: i32, problem: &str) -> ! {
    eprintln!("cached_read: {problem}");
    std::process::exit(code)
}

/// Measures what is asked for; an error where that gave something that is no number.
fn measure(options: &Options) -> Result<(), String> {
    pin(Side::Client);
    let begun = Instant::now();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut report = Report::new(options.json);
    if ["rates", "p99", "batch", "tls"].into_iter().any(|row| options.wants(row)) {
        over_the_wire(options, folder.path(), &mut report);
    }
    if options.wants("start") {
        start::measure(folder.path(), &mut report);
    }
    if options.wants("entry") {
        memory::measure(&mut report);
    }
    if options.wants("policies") {
        policies::measure(&mut report);
    }
    if options.wants("exec") {
        exec::measure(folder.path(), options.runs, &mut report);
    }
    report.figure("measured_s", begun.elapsed().as_secs_f64());
    report.finish()
}

fn over_the_wire(options: &Options, folder: &Path, report: &mut Report) {
    let bench = Bench::start(options, folder);
    if options.wants("rates") {
        reads::rates(&bench, report);
    }
    if options.wants("p99") {
        reads::p99(&bench, report);
    }
    if options.wants("batch") {
        batch::measure(&bench, report);
    }
    if options.wants("tls") {
        handshakes::measure(&bench, report);
    }
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[times.len() * percent / 100]
}
