//! What rotations cost: many at once, and finding out which of a great many are due. Each figure stands beside one of the
//! same machine in the same run, because alone it says little.
//!
//! ```text
//! cargo bench --bench rotation                                all rows but `mend`, a few minutes
//! cargo bench --bench rotation -- --rows due,verdict          some rows: due, schedules, verdict, mend
//! cargo bench --bench rotation -- --secrets 1000 --schedules 100000 --at-once 8
//! cargo bench --bench rotation -- --json                      one JSON object instead of a table
//! ```
//!
//! Everything is kept under `TMPDIR`, whose disk is what each step of a rotation waits for: a file system in memory has
//! none. A million schedules take about a gigabyte there.

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

mod beside;
mod due;
mod schedules;

use std::time::{Duration, Instant};

use claviger::rotation::definition::Definition;
use claviger::rotation::engine::Settings;

/// What there is to measure, and whether it is measured unasked.
const ROWS: [(&str, bool); 4] = [("due", true), ("schedules", true), ("verdict", true), ("mend", false)];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let options = Options::parse(&arguments).unwrap_or_else(|problem| {
        eprintln!("rotation: {problem}");
        std::process::exit(2);
    });
    let folder = tempfile::tempdir().expect("a temporary folder");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut rows = Vec::new();
    // First, while the process is small: it is asked how it grows.
    if options.wants("due") {
        rows.extend(runtime.block_on(due::measure(&options, folder.path())));
    }
    if options.wants("schedules") || options.wants("mend") {
        rows.extend(runtime.block_on(schedules::measure(&options, folder.path())));
    }
    if options.wants("verdict") {
        rows.extend(schedules::verdicts(options.schedules));
    }
    if options.json { print_json(&rows) } else { print_table(&rows) }
}

struct Options {
    rows: Vec<&'static str>,
    /// How many secrets are due at once.
    secrets: usize,
    /// How many schedules there are.
    schedules: usize,
    /// How many rotations are worked on at once.
    at_once: usize,
    json: bool,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut options = Self {
            rows: ROWS.into_iter().filter_map(|(row, unasked)| unasked.then_some(row)).collect(),
            secrets: 10_000,
            schedules: 1_000_000,
            at_once: Settings::default().concurrency,
            json: false,
        };
        // Cargo adds `--bench` of its own accord.
        let mut arguments = arguments.iter().map(String::as_str).filter(|argument| *argument != "--bench");
        while let Some(argument) = arguments.next() {
            if argument == "--json" {
                options.json = true;
                continue;
            }
            let value = arguments.next().ok_or_else(|| format!("`{argument}` needs a value"))?;
            match argument {
                "--rows" => options.rows = value.split(',').map(known).collect::<Result<_, _>>()?,
                "--secrets" => options.secrets = number(argument, value)?,
                "--schedules" => options.schedules = number(argument, value)?,
                "--at-once" => options.at_once = number(argument, value)?,
                _ => {
                    return Err(format!(
                        "`{argument}`: give --rows, --secrets, --schedules, --at-once, --json or nothing"
                    ));
                }
            }
        }
        Ok(options)
    }

    fn wants(&self, row: &str) -> bool {
        self.rows.contains(&row)
    }
}

fn known(text: &str) -> Result<&'static str, String> {
    let all = ROWS.map(|(row, _)| row);
    let found = all.into_iter().find(|row| *row == text);
    found.ok_or_else(|| format!("--rows: `{text}` is none of {}", all.join(", ")))
}

fn number(option: &str, text: &str) -> Result<usize, String> {
    let number = text.parse::<usize>().ok().filter(|number| (1..=10_000_000).contains(number));
    number.ok_or_else(|| format!("{option}: `{text}` is not a number from 1 to 10,000,000"))
}

/// A figure, and one of the same kind that was measured beside it.
struct Row {
    name: String,
    figure: f64,
    unit: &'static str,
    beside: Option<Beside>,
}

/// What a figure is compared with, in the same unit.
#[derive(Clone)]
struct Beside {
    what: &'static str,
    figure: f64,
}

impl Row {
    fn new(name: impl Into<String>, figure: f64, unit: &'static str, beside: Option<&Beside>) -> Self {
        Self { name: name.into(), figure, unit, beside: beside.cloned() }
    }

    fn ratio(&self) -> Option<f64> {
        self.beside.as_ref().map(|beside| self.figure / beside.figure)
    }
}

fn print_table(rows: &[Row]) {
    println!("| row | figure | beside it | ratio |");
    println!("| --- | --- | --- | --- |");
    for row in rows {
        let shown = |figure: f64| format!("{} {}", short(figure), row.unit);
        let beside = row.beside.as_ref().map(|beside| format!("{}: {}", beside.what, shown(beside.figure)));
        let ratio = row.ratio().map(short);
        let [beside, ratio] = [beside, ratio].map(|cell| cell.unwrap_or_else(|| "–".to_owned()));
        println!("| {} | {} | {beside} | {ratio} |", row.name, shown(row.figure));
    }
}

fn print_json(rows: &[Row]) {
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            let beside = row.beside.as_ref();
            serde_json::json!({
                "row": row.name,
                "figure": row.figure,
                "unit": row.unit,
                "beside": beside.map(|beside| beside.what),
                "beside_figure": beside.map(|beside| beside.figure),
                "ratio": row.ratio(),
            })
        })
        .collect();
    println!("{}", serde_json::json!({ "rows": rows }));
}

/// Three digits that count.
fn short(figure: f64) -> String {
    match figure {
        figure if figure >= 100.0 => format!("{figure:.0}"),
        figure if figure >= 10.0 => format!("{figure:.1}"),
        figure if figure >= 0.1 => format!("{figure:.2}"),
        figure => format!("{figure:.4}"),
    }
}

/// A rotation of a random text by a schedule.
fn definition(schedule: &str) -> Definition {
    let text = format!("rotator = \"random\"\nschedule = \"{schedule}\"\n");
    Definition::parse(&text).unwrap_or_else(|error| panic!("{schedule}: {error}"))
}

/// How many of something there are in a second.
fn per_second(count: usize, since: Instant) -> f64 {
    count as f64 / since.elapsed().as_secs_f64()
}

/// The median, in microseconds.
fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}
