//! `claviger serve`: the broker.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};
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
    /// Start although the database or the audit log was brought back from the past, cut or removed; it is put on record
    #[arg(long)]
    accept_loss: bool,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit, CliError> {
    telemetry::start(context.environ.text(telemetry::VARIABLE)?).map_err(CliError::usage)?;
    let file = args.config.display().to_string();
    let text = read(&args.config)
        .map_err(|problem| CliError::new(Reason::InvalidConfig, format!("{file}: {problem}")))?;
    let mut resolved = Raw::parse(&text, &file)?.resolve()?;
    resolved.accept_loss = args.accept_loss;
    // Before anything is opened, so that no signal finds a broker that can't end in good order.
    let stopped = stop_on_signal(Hangup::Reloads)?;
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

/// Reads the configuration, as far as any is long.
fn read(path: &Path) -> Result<String, String> {
    const LONGEST: u64 = 1024 * 1024;
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(LONGEST + 1).read_to_string(&mut text));
    match read {
        Ok(length) if length as u64 > LONGEST => {
            Err("is longer than 1 MiB, which no configuration is".to_owned())
        }
        Ok(_) => Ok(text),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err("does not exist; deploy/broker.toml is one to start from".to_owned())
        }
        Err(error) => Err(format!("can't be read: {error}")),
    }
}

/// What SIGHUP means.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Hangup {
    /// Read the policies again; not handled here.
    Reloads,
    /// The terminal is gone: stop.
    Stops,
}

/// Turns true with the first SIGTERM or SIGINT, and with SIGHUP where it means that.
pub(super) fn stop_on_signal(hangup: Hangup) -> Result<watch::Receiver<bool>, CliError> {
    let failed =
        |error: std::io::Error| CliError::new(Reason::Internal, format!("signals can't be handled: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut gone =
        if hangup == Hangup::Stops { Some(signal(SignalKind::hangup()).map_err(failed)?) } else { None };
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        let gone = async {
            match &mut gone {
                Some(gone) => gone.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = gone => {}
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        let _ = stop.send(true);
    });
    Ok(stopped)
}
