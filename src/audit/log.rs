//! [`Log`]: the handle that callers append through. The thread behind it is in `writer`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::broadcast;

use super::chain::Fields;
use super::checkpoint::SigningKey;
use super::queue::{Queue, Submission};
use super::segment::unavailable;
use super::writer::Writer;
use super::{Anchor, AuditError, Record};
use crate::clock::SharedClock;
use crate::environment::Durability;

/// How many lines a subscriber may be behind before it loses some.
const SUBSCRIBER_LAG: usize = 1_024;

/// How a log is kept.
#[derive(Clone)]
pub struct Settings {
    /// The folder of all instances' chains: `DIR/audit`. Made where it is missing.
    pub directory: PathBuf,
    /// The instance, which is the folder's name below: 1–64 of `A-Za-z0-9._-`, not starting with a dot.
    pub instance: String,
    /// How large a segment grows, in bytes, before the next begins; a batch is never split. Default 64 MiB.
    pub segment_bytes: u64,
    /// How old a segment's newest record is at least when the segment is removed. Default 730 days.
    pub retention: Duration,
    /// The authenticated number of changes that the broker's stores have seen, which each checkpoint vouches for. It
    /// only ever grows. Called by the log's thread, and by [`Log::open`] itself; must not block. Default 0.
    pub generation: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// A record of this instance that is known from elsewhere to have been written: the [`Log::last_checkpoint`] of
    /// an earlier run. A chain without it is refused. Default none, where a cut tail goes unnoticed.
    pub expected: Option<Anchor>,
    /// Goes on where the chain lacks what is [`expected`](Self::expected), or the stores report a lower
    /// [`generation`](Self::generation) than it vouches for, and records each as lost. Checkpoints then vouch for the
    /// stores as they are. Default `false`.
    pub accept_loss: bool,
}

impl Settings {
    /// The defaults.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>, instance: impl Into<String>) -> Self {
        Self {
            directory: directory.into(),
            instance: instance.into(),
            segment_bytes: 64 << 20,
            retention: Duration::from_secs(730 * 86_400),
            generation: Arc::new(|| 0),
            expected: None,
            accept_loss: false,
        }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("directory", &self.directory)
            .field("instance", &self.instance)
            .field("segment_bytes", &self.segment_bytes)
            .field("retention", &self.retention)
            .field("expected", &self.expected)
            .field("accept_loss", &self.accept_loss)
            .finish_non_exhaustive()
    }
}

/// An instance's audit log, open for writing. Cheap to clone; clones share one writer.
///
/// A log that is dropped without [`close`](Self::close) writes what waits and syncs it, but leaves no shutdown record.
#[derive(Clone)]
pub struct Log {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    directory: PathBuf,
    instance: String,
    anchored_generation: u64,
    thread: Option<JoinHandle<()>>,
}

/// What the handles and the writer share.
pub(super) struct Shared {
    pub(super) queue: Queue,
    pub(super) lines: broadcast::Sender<Arc<str>>,
    /// What the last attempt to write failed with.
    pub(super) trouble: Mutex<Option<AuditError>>,
    /// The newest checkpoint that is known to be on the disk.
    pub(super) checkpoint: Mutex<Option<Anchor>>,
}

impl Log {
    /// Opens the log and says so in it. Blocks: it reads the chain from the last checkpoint on and syncs the start
    /// record. Starts one thread.
    ///
    /// # Errors
    /// [`AuditError::Broken`] where the chain can't be continued, [`AuditError::Cut`] where it lacks the record that
    /// is expected and no loss is accepted, [`AuditError::Locked`] where another writer has it,
    /// [`AuditError::Unusable`], [`AuditError::Unreadable`], [`AuditError::Unavailable`].
    pub fn open(settings: Settings, key: SigningKey, clock: SharedClock) -> Result<Self, AuditError> {
        let (directory, instance) = (settings.directory.clone(), settings.instance.clone());
        let path = directory.join(&instance);
        let shared = Arc::new(Shared {
            queue: Queue::new(path.display().to_string()),
            lines: broadcast::Sender::new(SUBSCRIBER_LAG),
            trouble: Mutex::new(None),
            checkpoint: Mutex::new(None),
        });
        let (writer, anchored_generation) = Writer::open(settings, key, clock, Arc::clone(&shared))?;
        let thread = thread::Builder::new().name("claviger-audit".to_owned()).spawn(move || writer.run());
        let thread = Some(thread.map_err(|error| unavailable(&path, &error))?);
        let inner = Inner { shared, directory, instance, anchored_generation, thread };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Appends a record and gives its sequence once it is written ([`Durability::Relaxed`]) or on the disk
    /// ([`Durability::Durable`]). Texts beyond their bounds are cut. Once polled, the record is written whether or not
    /// the answer is waited for.
    ///
    /// # Errors
    /// [`AuditError::Unavailable`] where there is no record, and so nothing may be served; [`AuditError::Closed`];
    /// [`AuditError::Record`] where its kind is one of the log's own.
    pub async fn append(&self, record: Record, durability: Durability) -> Result<u64, AuditError> {
        self.submit(Fields::of_record(record)?, Vec::new(), durability).await
    }

    /// Appends records that stand next to each other, all or none. No record is no error.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub async fn append_all(&self, records: Vec<Record>, durability: Durability) -> Result<(), AuditError> {
        let mut fields = records.into_iter().map(Fields::of_record);
        let Some(first) = fields.next().transpose()? else { return Ok(()) };
        let more = fields.collect::<Result<_, _>>()?;
        self.submit(first, more, durability).await.map(|_| ())
    }

    async fn submit(
        &self,
        first: Fields,
        more: Vec<Fields>,
        durability: Durability,
    ) -> Result<u64, AuditError> {
        let queue = &self.inner.shared.queue;
        let (submission, answer) = Submission::new(first, more, durability);
        queue.push(submission)?;
        answer.await.unwrap_or_else(|_| Err(queue.stopped()))
    }

    /// Every line from now on, as it stands in the file without its newline, once it is acknowledged. A receiver that
    /// is more than 1,024 lines behind loses the oldest.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<str>> {
        self.inner.shared.lines.subscribe()
    }

    /// Whether the last attempt to write succeeded. A log in trouble tries again by itself every second.
    ///
    /// # Errors
    /// What that attempt failed with.
    pub fn health(&self) -> Result<(), AuditError> {
        let shared = &self.inner.shared;
        if shared.queue.has_failed() {
            return Err(shared.queue.stopped());
        }
        shared.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone().map_or(Ok(()), Err)
    }

    /// The [generation](Settings::generation) that the chain found at the start vouches for, before any loss was
    /// accepted; 0 without a checkpoint. A store that reports less was brought back from the past.
    #[must_use]
    pub fn anchored_generation(&self) -> u64 {
        self.inner.anchored_generation
    }

    /// The newest checkpoint that is on the disk: the place of its own record. It is there from the start on, and
    /// after [`close`](Self::close) it is the shutdown's. Kept elsewhere, it is what the next start
    /// [expects](Settings::expected); that of a log whose loss was accepted may have a lower sequence than the one
    /// kept before, and takes its place all the same. Cheap: a lock and a copy.
    #[must_use]
    pub fn last_checkpoint(&self) -> Option<Anchor> {
        self.inner.shared.checkpoint.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The folder of all instances.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.inner.directory
    }

    /// The instance.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.inner.instance
    }

    /// Writes what waits, a shutdown record and a checkpoint, syncs them, and lets go of the folder. Whoever calls
    /// this again, or meanwhile, waits for the same end.
    ///
    /// # Errors
    /// [`AuditError::Unavailable`] where the shutdown record could not be written; the log is closed all the same.
    pub async fn close(&self) -> Result<(), AuditError> {
        let queue = &self.inner.shared.queue;
        match queue.close() {
            Some(closed) => closed.await.unwrap_or_else(|_| Err(queue.stopped())),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").field("instance", &self.inner.instance).finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.queue.abandon();
        // Waited for, so that the folder is free again; by anyone but the writer itself, whose settings may hold a log.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            drop(thread.join());
        }
    }
}
