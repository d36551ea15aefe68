//! Reads the files again when their folders change, on SIGHUP, and each minute where neither was noticed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::{Tls, TlsError};
use crate::server::told;

/// How often files are looked at without a notice, and clients' certificates for their end: not every file system
/// says what changes on it, and none says it of what a link leads to.
const MINUTE: Duration = Duration::from_secs(60);
/// How long a folder must be quiet: certificate and key are two files.
const QUIET: Duration = Duration::from_millis(200);
/// How long quiet is waited for, in a folder where others write too.
const AT_MOST: Duration = Duration::from_secs(2);

impl Tls {
    /// Keeps certificates, trust and warnings up to date until `shutdown` says true, in a task of its own.
    ///
    /// # Errors
    /// [`TlsError`]: a folder can't be watched.
    pub fn keep_fresh(self: &Arc<Self>, shutdown: watch::Receiver<bool>) -> Result<(), TlsError> {
        // Folders, not files: what is renamed into the place of a file, or of a link on the way to it, is another one.
        let folders: BTreeSet<PathBuf> = self.settings.files().map(folder_of).collect();
        let (changed, changes) = mpsc::channel(1);
        let watcher = watch_folders(&folders, changed)?;
        let hangup = signal(SignalKind::hangup()).map_err(|error| {
            TlsError::new("signal", Path::new("SIGHUP"), format!("can't be heard: {error}"))
        })?;
        tokio::spawn(keep(Arc::clone(self), watcher, changes, hangup, shutdown));
        Ok(())
    }
}

fn folder_of(file: &Path) -> PathBuf {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new(".")).to_owned()
}

fn watch_folders(
    folders: &BTreeSet<PathBuf>,
    changed: mpsc::Sender<()>,
) -> Result<RecommendedWatcher, TlsError> {
    let refuse = |folder: &Path, error: notify::Error| {
        TlsError::new("folder", folder, format!("can't be watched for changes: {error}"))
    };
    let first = folders.first().map_or(Path::new("."), PathBuf::as_path);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| !event.kind.is_access()) {
            // A full channel says that a look is due already.
            let _ = changed.try_send(());
        }
    })
    .map_err(|error| refuse(first, error))?;
    for folder in folders {
        watcher.watch(folder, RecursiveMode::NonRecursive).map_err(|error| refuse(folder, error))?;
    }
    Ok(watcher)
}

#[derive(Clone, Copy)]
enum Cause {
    Change,
    Hangup,
    Minute,
}

async fn keep(
    tls: Arc<Tls>,
    _watcher: RecommendedWatcher,
    mut changes: mpsc::Receiver<()>,
    mut hangup: Signal,
    shutdown: watch::Receiver<bool>,
) {
    let stop = told(shutdown);
    tokio::pin!(stop);
    let mut minute = interval(MINUTE);
    minute.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let cause = tokio::select! {
            Some(()) = changes.recv() => Cause::Change,
            Some(()) = hangup.recv() => Cause::Hangup,
            _ = minute.tick() => Cause::Minute,
            () = &mut stop => return,
        };
        if matches!(cause, Cause::Change) {
            let _ = timeout(AT_MOST, quiet(&mut changes)).await;
        }
        let looking = Arc::clone(&tls);
        if let Err(error) = tokio::task::spawn_blocking(move || looking.look(cause)).await {
            tracing::error!(%error, "looking after the certificates failed");
        }
    }
}

async fn quiet(changes: &mut mpsc::Receiver<()>) {
    while timeout(QUIET, changes.recv()).await.is_ok_and(|change| change.is_some()) {}
}

impl Tls {
    fn look(&self, cause: Cause) {
        // A failure is on the log and counted, and what was in force still is.
        let _ = match cause {
            Cause::Hangup => self.reload("SIGHUP"),
            Cause::Change => self.reload_if_changed("file change"),
            Cause::Minute => self.reload_if_changed("a look each minute"),
        };
        self.sweep();
    }
}
