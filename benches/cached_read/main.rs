//! What a cached read costs, against a bare tonic echo of the same message sizes: the same client, the same machine,
//! the same run. Beside it what else has a bound: decisions, memory, `exec`. Absolute figures mean little alone.
//!
//! ```text
//! cargo bench --bench cached_read                         all rows, about a minute and a half
//! cargo bench --bench cached_read -- --seconds 1          shorter windows, more noise
//! cargo bench --bench cached_read -- --rows policies,exec some rows: rates, p99, start, entry, policies, exec
//! ```
//!
//! Server and client are processes of their own, each pinned to one core. Baseline and broker take turns, row by row,
//! so that a drift of the machine's speed hits both. Everything is kept under `TMPDIR`, whose disk is what durable
//! answers wait for: a file system in memory has none.

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

mod exec;
mod memory;
mod policies;
mod reads;
mod server;

use std::path::Path;
use std::time::Duration;

/// The size of a value that is read, in bytes.
const VALUE: usize = 200;

/// What there is to measure.
const ROWS: [&str; 6] = ["rates", "p99", "start", "entry", "policies", "exec"];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match *arguments.as_slice() {
        ["--serve", what, folder] => server::serve(what, Path::new(folder)),
        ["--ask", address, token, connections, streams, times] => {
            let number = |text: &str| text.parse().expect("a number");
            reads::ask(address, token, number(connections), number(streams), times.parse().unwrap());
        }
        ["--memory"] => memory::fill(),
        _ => match Options::parse(&arguments) {
            Ok(options) => measure(&options),
            Err(problem) => {
                eprintln!("cached_read: {problem}");
                std::process::exit(2);
            }
        },
    }
}

struct Options {
    /// How long each figure is measured that is one over time.
    window: Duration,
    rows: Vec<&'static str>,
}

impl Options {
    fn parse(arguments: &[&str]) -> Result<Self, String> {
        let mut options = Self { window: Duration::from_secs(4), rows: ROWS.to_vec() };
        // Cargo adds `--bench` of its own accord.
        let mut arguments = arguments.iter().copied().filter(|argument| *argument != "--bench");
        while let Some(argument) = arguments.next() {
            match (argument, arguments.next()) {
                ("--seconds", Some(text)) => options.window = seconds(text)?,
                ("--rows", Some(text)) => {
                    options.rows = text.split(',').map(known).collect::<Result<_, _>>()?
                }
                _ => return Err(format!("`{argument}`: give --seconds NUMBER, --rows NAME,… or nothing")),
            }
        }
        Ok(options)
    }

    fn wants(&self, row: &str) -> bool {
        self.rows.contains(&row)
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<u64>().ok().filter(|seconds| (1..=600).contains(seconds));
    seconds
        .map(Duration::from_secs)
        .ok_or_else(|| format!("--seconds: `{text}` is not a number from 1 to 600"))
}

fn known(text: &str) -> Result<&'static str, String> {
    let found = ROWS.into_iter().find(|row| *row == text);
    found.ok_or_else(|| format!("--rows: `{text}` is none of {}", ROWS.join(", ")))
}

fn measure(options: &Options) {
    pin(1);
    let folder = tempfile::tempdir().expect("a temporary folder");
    row(["row", "baseline", "claviger", "ratio", "target"]);
    row(["---"; 5]);
    if ["rates", "p99", "start"].into_iter().any(|row| options.wants(row)) {
        reads::measure(options, folder.path());
    }
    if options.wants("entry") {
        memory::measure();
    }
    if options.wants("policies") {
        policies::measure();
    }
    if options.wants("exec") {
        exec::measure(folder.path());
    }
}

fn row(cells: [&str; 5]) {
    println!("| {} |", cells.join(" | "));
}

fn milliseconds(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[times.len() * percent / 100]
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn pin(core: usize) {
    let mut cores = rustix::thread::CpuSet::new();
    cores.set(core);
    if let Err(error) = rustix::thread::sched_setaffinity(None, &cores) {
        eprintln!("not pinned to core {core}: {error}");
    }
}
