//! How costs grow with what there is: reads from the cache and from the store, pages of a list, descriptions, memory, the
//! first use after a start, and the start itself. Where a line bends, what it is made of changes; benches/README.md says
//! what.
//!
//! ```text
//! cargo bench --bench scale                               all rows, some ten minutes, most of them to fill stores
//! cargo bench --bench scale -- --most 100000              nothing larger than this
//! cargo bench --bench scale -- --rows reads,pages         some rows: reads, memory, pages, start
//! cargo bench --bench scale -- --seconds 1                shorter windows, more noise
//! cargo bench --bench scale -- --json                     one JSON object instead of tables
//! ```
//!
//! A whole broker in a process of its own for each size, asked through [`Broker`](claviger::broker::Broker): policy,
//! cache, store and audit (relaxed), and no wire, which knows nothing of sizes. Filling is not measured (see fill.rs).
//! Everything is kept under `TMPDIR`; a million secrets take two gigabytes there, and about as much memory.

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

mod costs;
mod fill;
mod place;
#[path = "../shared/process.rs"]
#[allow(dead_code, reason = "nothing is pinned here")]
mod process;
#[path = "../shared/program.rs"]
mod program;
mod start;
#[path = "../shared/teams.rs"]
#[allow(dead_code, reason = "only the texts are of use here")]
mod teams;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use place::Place;

/// How many secrets there are.
const SIZES: [usize; 4] = [10, 1_000, 100_000, 1_000_000];
/// With how many secrets the program is started, at most.
const STARTED_WITH: usize = 100_000;
/// What there is to measure.
const ROWS: [&str; 4] = ["reads", "memory", "pages", "start"];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match *arguments.as_slice() {
        ["--fill", size, folder] => fill::fill(&Place::at(Path::new(folder)), size.parse().unwrap()),
        ["--measure", size, folder, rows, milliseconds] => {
            let window = Duration::from_millis(milliseconds.parse().unwrap());
            let rows: Vec<&str> = rows.split(',').collect();
            let figures = costs::measure(&Place::at(Path::new(folder)), size.parse().unwrap(), &rows, window);
            println!("{}", serde_json::to_string(&figures).unwrap());
        }
        _ => match Options::parse(&arguments) {
            Ok(options) => measure(&options),
            Err(problem) => {
                eprintln!("scale: {problem}");
                std::process::exit(2);
            }
        },
    }
}

struct Options {
    rows: Vec<&'static str>,
    /// The largest number of secrets.
    most: usize,
    /// How long each figure is measured that is one over time.
    window: Duration,
    json: bool,
}

impl Options {
    fn parse(arguments: &[&str]) -> Result<Self, String> {
        let mut options = Self {
            rows: ROWS.to_vec(),
            most: SIZES[SIZES.len() - 1],
            window: Duration::from_secs(3),
            json: false,
        };
        // Cargo adds `--bench` of its own accord.
        let mut arguments = arguments.iter().copied().filter(|argument| *argument != "--bench");
        while let Some(argument) = arguments.next() {
            if argument == "--json" {
                options.json = true;
                continue;
            }
            let value = arguments.next().ok_or_else(|| format!("`{argument}` needs a value"))?;
            match argument {
                "--rows" => options.rows = value.split(',').map(known).collect::<Result<_, _>>()?,
                "--most" => options.most = number(argument, value, SIZES[0], SIZES[SIZES.len() - 1])?,
                "--seconds" => {
                    let seconds = number(argument, value, 1, 600)?;
                    options.window = Duration::from_secs(u64::try_from(seconds).unwrap());
                }
                _ => return Err(format!("`{argument}`: give --rows, --most, --seconds, --json or nothing")),
            }
        }
        Ok(options)
    }

    fn wants(&self, row: &str) -> bool {
        self.rows.contains(&row)
    }
}

fn known(text: &str) -> Result<&'static str, String> {
    let found = ROWS.into_iter().find(|row| *row == text);
    found.ok_or_else(|| format!("--rows: `{text}` is none of {}", ROWS.join(", ")))
}

fn number(option: &str, text: &str, least: usize, most: usize) -> Result<usize, String> {
    let number = text.parse::<usize>().ok().filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| format!("{option}: `{text}` is not a number from {least} to {most}"))
}

/// What one size gave, or one start.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Figure {
    row: String,
    unit: String,
    figure: f64,
}

impl Figure {
    fn new(row: &str, figure: f64, unit: &str) -> Self {
        Self { row: row.to_owned(), unit: unit.to_owned(), figure }
    }
}

/// Figures under the heading of what they are of.
type Column = (String, Vec<Figure>);

fn measure(options: &Options) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut sizes = Vec::new();
    if options.rows.iter().any(|row| *row != "start") {
        for size in SIZES.into_iter().filter(|size| *size <= options.most) {
            let place = folder.path().join(size.to_string());
            filled(&place, size);
            sizes.push((heading(size), of_size(&place, size, options)));
            std::fs::remove_dir_all(&place).expect("a folder of ours");
        }
    }
    let mut starts = Vec::new();
    if options.wants("start") {
        starts = start::measure(folder.path(), options.most.min(STARTED_WITH));
    }
    if options.json {
        println!("{}", serde_json::json!({"sizes": listed(&sizes), "starts": listed(&starts)}));
        return;
    }
    print_table("secrets", &sizes);
    if !sizes.is_empty() && !starts.is_empty() {
        println!();
    }
    print_table("`claviger serve`", &starts);
}

/// Fills a store in a process of its own, so that nothing of it is left in the memory of who measures.
fn filled(place: &Path, size: usize) {
    eprintln!("filling a store with {size} secrets …");
    let mut fill = Command::new(std::env::current_exe().unwrap());
    fill.arg("--fill").arg(size.to_string()).arg(place);
    let status = fill.status().expect("this program, once more");
    assert!(status.success(), "the process that fills a store ended with {status}");
}

fn of_size(place: &Path, size: usize, options: &Options) -> Vec<Figure> {
    eprintln!("measuring {size} secrets …");
    let mut measure = Command::new(std::env::current_exe().unwrap());
    measure.arg("--measure").arg(size.to_string()).arg(place);
    measure.arg(options.rows.join(",")).arg(options.window.as_millis().to_string());
    let output = measure.stderr(Stdio::inherit()).output().expect("this program, once more");
    assert!(output.status.success(), "the process that measures ended with {}", output.status);
    serde_json::from_slice(&output.stdout).expect("figures")
}

/// A row for each figure, a column for each size or start.
fn print_table(corner: &str, columns: &[Column]) {
    let Some((_, longest)) = columns.iter().max_by_key(|(_, figures)| figures.len()) else { return };
    let headings: Vec<&str> = columns.iter().map(|(heading, _)| heading.as_str()).collect();
    println!("| {corner} | {} |", headings.join(" | "));
    println!("| --- |{}", " --- |".repeat(columns.len()));
    for Figure { row, .. } in longest {
        let cells: Vec<String> = columns.iter().map(|(_, figures)| cell(figures, row)).collect();
        println!("| {row} | {} |", cells.join(" | "));
    }
}

/// What a column says in a row. Not every size has every row.
fn cell(figures: &[Figure], row: &str) -> String {
    let found = figures.iter().find(|figure| figure.row == row);
    found.map_or_else(|| "–".to_owned(), |found| format!("{} {}", short(found.figure), found.unit))
}

fn listed(columns: &[Column]) -> serde_json::Value {
    columns.iter().map(|(of, figures)| serde_json::json!({"of": of, "figures": figures})).collect()
}

/// With a comma after each three digits.
fn heading(size: usize) -> String {
    let digits = size.to_string();
    let mut heading = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            heading.push(',');
        }
        heading.push(digit);
    }
    heading
}

/// Three digits that count.
fn short(figure: f64) -> String {
    match figure {
        figure if figure >= 100.0 => format!("{figure:.0}"),
        figure if figure >= 10.0 => format!("{figure:.1}"),
        figure => format!("{figure:.2}"),
    }
}
