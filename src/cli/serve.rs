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
use crate::config::Resolved;
use crate::config::assembly::Running;
use crate::config::check::{Finding, Level, check_text};
use crate::crypto;
use crate::error::Reason;
use crate::server::admin::BoundAdmin;
use crate::telemetry;

/// Runs the broker in the foreground until SIGTERM or SIGINT.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The configuration (TOML)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Look at everything that the configuration names, say what is wrong, and end; nothing is changed
    #[arg(long)]
    check: bool,
    /// With --check: also ask the stores
    #[arg(long, requires = "check")]
    online: bool,
    /// Start although the database or the audit log was brought back from the past, cut or removed; it is put on record
    #[arg(long)]
    accept_loss: bool,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit, CliError> {
    let format = start_logging(context, None)?;
    let say = |line: &str| match format {
        telemetry::Format::Json => tracing::info!("{line}"),
        telemetry::Format::Text => context.output.notice(line),
    };
    let file = args.config.display().to_string();
    let text = read(&args.config)
        .map_err(|problem| CliError::new(Reason::InvalidConfig, format!("{file}: {problem}")))?;
    if args.check {
        let findings = check_text(&text, &file, &variables(context), args.online, &context.clock).await;
        return report(context, &file, &findings);
    }
    let mut resolved = Resolved::from_text(&text, &file)?;
    resolved.accept_loss = args.accept_loss;
    // Before anything is opened, so that no signal finds a broker that can't end in good order.
    let stopped = stop_on_signal(Hangup::Reloads)?;
    let running = Running::start(&resolved, &variables(context), Arc::clone(&context.clock)).await?;
    for warning in &running.warnings {
        match format {
            telemetry::Format::Json => tracing::warn!("{warning}"),
            telemetry::Format::Text => context.output.notice(warning),
        }
    }
    let mut doors = Vec::new();
    for listen in &resolved.listen {
        let door = listen.bind().await?;
        say(&format!("listening on {}", door.address()));
        doors.push(door);
    }
    let running = match resolved.admin {
        Some(address) => {
            let admin = BoundAdmin::bind(address).await?;
            say(&format!("probes and metrics on http://{}", admin.address()));
            running.with_admin(admin)
        }
        None => running,
    };
    // From here on little of the program is called: some megabytes of it were for the start.
    crypto::let_go_of_code();
    running.serve(doors, resolved.limits, stopped).await?;
    Ok(Exit::DONE)
}

/// One line for each finding; a problem makes it exit 1.
fn report(context: &Context, file: &str, findings: &[Finding]) -> Result<Exit, CliError> {
    let named = |level| match level {
        Level::Fine => "ok",
        Level::Warning => "warning",
        Level::Problem => "error",
    };
    let problems = findings.iter().filter(|finding| finding.level == Level::Problem).count();
    if context.output.is_json() {
        let found: Vec<_> = findings
            .iter()
            .map(|finding| {
                serde_json::json!({"level": named(finding.level), "place": finding.place, "message": finding.said})
            })
            .collect();
        context.output.json(&serde_json::json!({"file": file, "problems": problems, "findings": found}))?;
    } else {
        for finding in findings {
            let line = format!("{:8} {}: {}", named(finding.level), finding.place, finding.said);
            context.output.text(&line)?;
        }
        let end = match problems {
            0 => format!("{file}: a broker can start"),
            1 => format!("{file}: 1 problem"),
            many => format!("{file}: {many} problems"),
        };
        context.output.text(&end)?;
    }
    Ok(if problems == 0 { Exit::DONE } else { Exit::FAULTS })
}

/// Logs as the process's environment says; `level` where it says nothing.
pub(super) fn start_logging(context: &Context, level: Option<&str>) -> Result<telemetry::Format, CliError> {
    let format = telemetry::Format::parse(context.environ.text(telemetry::FORMAT_VARIABLE)?);
    let format = format.map_err(CliError::usage)?;
    let level = context.environ.text(telemetry::VARIABLE)?.or(level);
    telemetry::start(level, format).map_err(CliError::usage)?;
    Ok(format)
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
            Err("does not exist; deploy/one-machine.toml is one to start from".to_owned())
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

/// Turns true with the first SIGTERM or SIGINT, and with SIGHUP where it means that. The second SIGTERM or SIGINT ends
/// the process where it stands: nothing that was acknowledged depends on an orderly end.
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
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::warn!("told twice to end: ending at once");
        std::process::exit(1);
    });
    Ok(stopped)
}
