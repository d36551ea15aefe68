//! What the broker tells its operators: logs ([`start`]), figures ([`metrics`]) and the trace that a call belongs to
//! ([`trace`]).
//!
//! A log is one line for each event, to standard error: as text, or as JSON with the members `timestamp`, `level`,
//! `message` and the event's own (`request_id`, `trace_id`, `method`, `code` … of a call).
//!
//! INVARIANT: only this program's own events can be turned up. Those of the libraries below stay at warnings and worse,
//! whatever is asked for: at their finest levels some of them print the messages that they carry, and so the values in
//! them.

mod exposition;
pub mod metrics;
mod process;
pub mod trace;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

pub use exposition::{
    AuditFigures, CONTENT_TYPE, CacheFigures, CertificateFigures, ConnectionFigures, PolicyFigures,
    RateFigures, RotationFigures, Snapshot, WatchFigures,
};
pub use process::Process;

/// The variable that says how much is logged.
pub const VARIABLE: &str = "CLAVIGER_LOG";
/// The variable that says what a line looks like.
pub const FORMAT_VARIABLE: &str = "CLAVIGER_LOG_FORMAT";

/// What a line of the log looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object.
    Json,
}

impl Format {
    /// The format of this name: `text` (the default) or `json`.
    ///
    /// # Errors
    /// A line that names the variable, where it is neither.
    pub fn parse(name: Option<&str>) -> Result<Self, String> {
        match name {
            None | Some("text") => Ok(Self::Text),
            Some("json") => Ok(Self::Json),
            Some(_) => Err(format!("{FORMAT_VARIABLE} must be text or json")),
        }
    }
}

/// Starts logging at `level`: `error`, `warn`, `info` (the default), `debug` or `trace`. A second start in one
/// process changes nothing. A line that can't be written is lost, and nothing else is.
///
/// # Errors
/// A line that names the variable, where the level is none of these.
pub fn start(level: Option<&str>, format: Format) -> Result<(), String> {
    let level: LevelFilter = match level.unwrap_or("info") {
        known @ ("error" | "warn" | "info" | "debug" | "trace" | "off") => {
            known.parse().unwrap_or(LevelFilter::INFO)
        }
        _ => return Err(format!("{VARIABLE} must be off, error, warn, info, debug or trace")),
    };
    let lines = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(format!("warn,claviger={level}")))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        // It would say so on standard error, and panic where that is gone.
        .log_internal_errors(false);
    let started = match format {
        Format::Text => lines.try_init(),
        Format::Json => {
            lines.json().flatten_event(true).with_current_span(false).with_span_list(false).try_init()
        }
    };
    drop(started);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_levels_are_taken() {
        let error = start(Some("h2=trace"), Format::Text).unwrap_err();
        assert!(error.contains("CLAVIGER_LOG"), "{error}");
    }

    #[test]
    fn only_formats_are_taken() {
        assert_eq!(Format::parse(None), Ok(Format::Text));
        assert_eq!(Format::parse(Some("json")), Ok(Format::Json));
        for bad in ["", "JSON", "logfmt"] {
            assert!(Format::parse(Some(bad)).unwrap_err().contains("CLAVIGER_LOG_FORMAT"), "{bad}");
        }
    }
}
