//! What is said of a run: a table as it is measured, or one JSON object at its end.

use std::time::Duration;

use serde_json::{Map, Number, Value};

/// The table goes to stdout, or beside JSON to stderr, so that stdout holds nothing but the object.
pub(crate) struct Report {
    json: bool,
    figures: Vec<(String, f64)>,
}

impl Report {
    pub(crate) fn new(json: bool) -> Self {
        let report = Self { json, figures: Vec::new() };
        report.row(["row", "baseline", "claviger", "ratio", "target"]);
        report.row(["---"; 5]);
        report
    }

    /// A line of the table, as people read it.
    pub(crate) fn row(&self, cells: [&str; 5]) {
        let line = format!("| {} |", cells.join(" | "));
        if self.json { eprintln!("{line}") } else { println!("{line}") }
    }

    /// A figure, as programs read it.
    pub(crate) fn figure(&mut self, name: impl Into<String>, figure: f64) {
        self.figures.push((name.into(), figure));
    }

    /// Says the figures. A figure that is no number, because nothing was there to divide by, is an error.
    pub(crate) fn finish(self) -> Result<(), String> {
        let mut object = Map::new();
        for (name, figure) in self.figures {
            let number = Number::from_f64(figure);
            let number = number.ok_or_else(|| format!("`{name}` is {figure}: its row measured nothing"))?;
            object.insert(name, Value::Number(number));
        }
        if self.json {
            println!("{}", Value::Object(object));
        }
        Ok(())
    }
}

pub(crate) fn milliseconds(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

pub(crate) fn microseconds(microseconds: f64) -> String {
    format!("{microseconds:.1} µs")
}
