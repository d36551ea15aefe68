//! Logs: one line each, to standard error.
//!
//! Only this program's own events can be turned up. Those of the libraries below stay at warnings and worse, whatever
//! is asked for: at their finest levels some of them print the messages that they carry, and so the values in them.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// The variable that says how much is logged.
pub const VARIABLE: &str = "CLAVIGER_LOG";

/// Starts logging at `level`: `error`, `warn`, `info` (the default), `debug` or `trace`. A second start in one
/// process changes nothing.
///
/// # Errors
/// A line that names the variable, where the level is none of these.
pub fn start(level: Option<&str>) -> Result<(), String> {
    let level: LevelFilter = match level.unwrap_or("info") {
        known @ ("error" | "warn" | "info" | "debug" | "trace" | "off") => {
            known.parse().unwrap_or(LevelFilter::INFO)
        }
        _ => return Err(format!("{VARIABLE} must be off, error, warn, info, debug or trace")),
    };
    let filter = EnvFilter::new(format!("warn,claviger={level}"));
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .try_init();
    drop(started);
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_levels_are_taken() {
        let error = super::start(Some("h2=trace")).unwrap_err();
        assert!(error.contains("CLAVIGER_LOG"), "{error}");
    }
}
