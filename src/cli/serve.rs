//! `claviger serve`: the broker.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use zeroize::Zeroizing;

use super::Context;
use super::exit::{CliError, Exit};
use crate::config::Raw;
use crate::config::assembly::Running;
use crate::error::Reason;
use crate::telemetry;

/// Runs the broker in the foreground until SIGTERM or SIGINT.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The configuration (TOML)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit, CliError> {
    telemetry::start(context.environ.text(telemetry::VARIABLE)?).map_err(CliError::usage)?;
    let file = args.config.display().to_string();
    let text = std::fs::read_to_string(&args.config)
        .map_err(|error| CliError::new(Reason::InvalidConfig, format!("{file}: {error}")))?;
    let resolved = Raw::parse(&text, &file)?.resolve()?;
    // Before anything is opened, so that no signal finds a broker that can't end in good order.
    let stopped = stop_on_signal()?;
    let running = Running::start(&resolved, &variables(context), Arc::clone(&context.clock)).await?;
    for warning in &running.warnings {
        context.output.notice(warning);
    }
    let mut doors = Vec::new();
    for listen in &resolved.listen {
        let door = listen.bind().await?;
        context.output.notice(&format!("listening on {}", door.address()));
        doors.push(door);
    }
    running.serve(doors, resolved.limits, stopped).await?;
    Ok(Exit::DONE)
}

/// Reads the variables that a configuration names; one that is not text counts as not set.
pub(super) fn variables(context: &Context) -> impl Fn(&str) -> Option<Zeroizing<String>> + Sync {
    |name| context.environ.text(name).ok().flatten().map(|text| Zeroizing::new(text.to_owned()))
}

/// Turns true with the first SIGTERM or SIGINT.
pub(super) fn stop_on_signal() -> Result<watch::Receiver<bool>, CliError> {
    let failed =
        |error: std::io::Error| CliError::new(Reason::Internal, format!("signals can't be handled: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        let _ = stop.send(true);
    });
    Ok(stopped)
}
