//! Reads the policies again on SIGHUP and when their folder changes. A set that is not valid changes nothing but
//! the audit log and the broker's own.

use std::sync::Arc;
use std::time::Duration;

use notify::{RecursiveMode, Watcher as _};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use super::assembly::StartError;
use crate::broker::Broker;
use crate::policy::PolicySource;

/// How long a folder must be quiet: an editor or a deployment writes several files.
const QUIET: Duration = Duration::from_millis(200);

/// Watches until the returned guard is dropped or `shutdown` says true. Policies that are part of the program do not
/// change.
pub(super) fn on_change(
    broker: Arc<Broker>,
    source: &PolicySource,
    shutdown: watch::Receiver<bool>,
) -> Result<Option<notify::RecommendedWatcher>, StartError> {
    let PolicySource::Directory(folder) = source else { return Ok(None) };
    let failed = |error: &dyn std::fmt::Display| StartError::Folder {
        path: folder.display().to_string(),
        problem: format!("can't be watched for changes: {error}"),
    };
    let (changed, changes) = mpsc::channel(1);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| !event.kind.is_access()) {
            // A full channel says that a reload is due already.
            let _ = changed.try_send(());
        }
    })
    .map_err(|error| failed(&error))?;
    watcher.watch(folder, RecursiveMode::NonRecursive).map_err(|error| failed(&error))?;
    let hangup = signal(SignalKind::hangup()).map_err(|error| failed(&error))?;
    tokio::spawn(reload(broker, changes, hangup, shutdown));
    Ok(Some(watcher))
}

async fn reload(
    broker: Arc<Broker>,
    mut changes: mpsc::Receiver<()>,
    mut hangup: tokio::signal::unix::Signal,
    mut shutdown: watch::Receiver<bool>,
) {
    let mut known = broker.policies().warnings();
    loop {
        let cause = tokio::select! {
            Some(()) = changes.recv() => "file change",
            Some(()) = hangup.recv() => "SIGHUP",
            _ = shutdown.wait_for(|stop| *stop) => return,
        };
        while tokio::time::timeout(QUIET, changes.recv()).await.is_ok_and(|change| change.is_some()) {}
        match broker.reload_policy_unasked(cause).await {
            Ok(reloaded) => {
                tracing::info!(
                    generation = reloaded.generation,
                    policies = reloaded.policies,
                    cause,
                    "policies reloaded"
                );
                for warning in unknown(&mut known, reloaded.warnings) {
                    tracing::warn!("{warning}");
                }
            }
            Err(error) => {
                tracing::error!(%error, cause, "policies not reloaded; the last good set stays in force")
            }
        }
    }
}

/// Those of `warnings` that were not there before; `known` becomes what is there now, so that one that comes back is
/// said again.
fn unknown(known: &mut Vec<String>, warnings: Vec<String>) -> Vec<String> {
    let unknown = warnings.iter().filter(|warning| !known.contains(warning)).cloned().collect();
    *known = warnings;
    unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_is_said_once_for_as_long_as_it_is_there() {
        let mut known = vec!["from the start".to_owned()];
        let mut said =
            |now: &[&str]| unknown(&mut known, now.iter().map(|text| (*text).to_owned()).collect());
        assert!(said(&["from the start"]).is_empty());
        assert_eq!(said(&["from the start", "new"]), ["new"]);
        assert!(said(&["new", "from the start"]).is_empty(), "in whatever order");
        assert!(said(&["new"]).is_empty());
        assert_eq!(said(&["from the start", "new"]), ["from the start"], "it was gone in between");
    }
}
