//! What is asked of a run.

use std::time::Duration;

/// What there is to measure.
const ROWS: [&str; 8] = ["rates", "p99", "batch", "tls", "start", "entry", "policies", "exec"];

pub(crate) struct Options {
    /// How long a turn is that is counted.
    pub(crate) window: Duration,
    /// How many turns each has within a row.
    pub(crate) rounds: usize,
    /// How often a program is started whose start is measured.
    pub(crate) runs: usize,
    /// One JSON object instead of a table.
    pub(crate) json: bool,
    rows: Vec<&'static str>,
}

impl Options {
    pub(crate) fn parse(arguments: &[&str]) -> Result<Self, String> {
        let mut options =
            Self { window: Duration::from_secs(1), rounds: 5, runs: 30, json: false, rows: ROWS.to_vec() };
        // Cargo adds `--bench` of its own accord.
        let mut arguments = arguments.iter().copied().filter(|argument| *argument != "--bench");
        while let Some(argument) = arguments.next() {
            match argument {
                "--json" => options.json = true,
                // For its output alone: these are too few turns, and too short, for a figure to mean anything.
                "--short" => {
                    (options.window, options.rounds, options.runs) = (Duration::from_millis(300), 1, 3);
                }
                "--seconds" => options.window = Duration::from_secs(number(argument, arguments.next())?),
                "--rounds" => options.rounds = usize::try_from(number(argument, arguments.next())?).unwrap(),
                "--rows" => options.rows = rows(arguments.next())?,
                _ => {
                    return Err(format!(
                        "`{argument}`: give --rows NAME,…, --seconds NUMBER, --rounds NUMBER, --short, --json or nothing"
                    ));
                }
            }
        }
        Ok(options)
    }

    pub(crate) fn wants(&self, row: &str) -> bool {
        self.rows.contains(&row)
    }
}

fn number(option: &str, text: Option<&str>) -> Result<u64, String> {
    let text = text.ok_or_else(|| format!("`{option}` needs a number"))?;
    let number = text.parse::<u64>().ok().filter(|number| (1..=600).contains(number));
    number.ok_or_else(|| format!("{option}: `{text}` is not a number from 1 to 600"))
}

fn rows(text: Option<&str>) -> Result<Vec<&'static str>, String> {
    let all = ROWS.join(", ");
    let known = |text: &str| {
        let found = ROWS.into_iter().find(|row| *row == text);
        found.ok_or_else(|| format!("--rows: `{text}` is none of {all}"))
    };
    text.ok_or_else(|| format!("`--rows` needs names out of {all}"))?.split(',').map(known).collect()
}
