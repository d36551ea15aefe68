//! `claviger serve`: the broker.

use std::path::PathBuf;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use zeroize::Zeroizing;

use super::exit::{CliError, Exit};
use super::Context;
use crate::config::Raw;
use crate::config::assembly::Running;
use crate::error::Reason;

/// Runs the broker in the foreground until SIGTERM or SIGINT.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The configuration (TOML)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit, CliError> {
    let file = args.config.display().to_string();
    let text = std::fs::read_to_string(&args.config)
        .map_err(|error| CliError::new(Reason::InvalidConfig, format!("{file}: {error}")))?;
    let resolved = Raw::parse(&text, &file)?.resolve()?;
    let variable = |name: &str| context.environ.text(name).map(|text| Zeroizing::new(text.to_owned()));
    let running = Running::start(&resolved, &variable, context.clock.clone()).await?;
    for warning in &running.warnings {
        context.output.notice(warning);
    }
    let mut doors = Vec::new();
    for listen in &resolved.listen {
        let door = listen.bind().await?;
        context.output.notice(&format!("listening on {}", door.address()));
        doors.push(door);
    }
    running.serve(doors, resolved.limits, stop_on_signal()?).await?;
    Ok(Exit::DONE)
}

/// Turns true with the first SIGTERM or SIGINT.
pub(super) fn stop_on_signal() -> Result<watch::Receiver<bool>, CliError> {
    let failed = |error: std::io::Error| CliError::new(Reason::Internal, format!("signals can't be handled: {error}"));
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
