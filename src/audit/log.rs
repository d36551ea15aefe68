//! [`Log`]: the handle that callers append through. The thread behind it is in `writer`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::broadcast;

use super::chain::{encode, encode_into};
use super::checkpoint::{SigningKey, VerifyingKey};
use super::encode::Batch;
use super::figures::Figures;
use super::queue::{Queue, Work};
use super::reserve::{Hold, Reservation};
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
    /// What else was lost, in words, that the owner of the log knows of and its chain can't tell: the key that signed it
    /// before. Recorded where a loss is [accepted](Self::accept_loss). Default none.
    pub losses: Vec<String>,
    /// The keys that signed this log before the one that it is opened with, oldest first. They are only passed on, by
    /// [`Log::verifying_keys`]. Default none.
    pub former_keys: Vec<VerifyingKey>,
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
            losses: Vec::new(),
            former_keys: Vec::new(),
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
            .field("losses", &self.losses)
            .field("former_keys", &self.former_keys)
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
    threads: Vec<JoinHandle<()>>,
}

/// What the handles and the writer share.
pub(super) struct Shared {
    /// The keys that signed, and since when where that was seen; the last one signs.
    signers: Mutex<Vec<(VerifyingKey, Option<Timestamp>)>>,
    pub(super) queue: Queue,
    pub(super) lines: broadcast::Sender<Arc<str>>,
    /// What the last attempt to write failed with.
    pub(super) trouble: Mutex<Option<AuditError>>,
    /// The newest checkpoint that is known to be on the disk.
    pub(super) checkpoint: Mutex<Option<Anchor>>,
}

impl Shared {
    pub(super) fn new(path: &Path, settings: &Settings, key: VerifyingKey, clock: SharedClock) -> Self {
        let signers = settings.former_keys.iter().filter(|former| **former != key).chain([&key]);
        Self {
            signers: Mutex::new(signers.map(|key| (*key, None)).collect()),
            queue: Queue::new(path.display().to_string(), clock),
            lines: broadcast::Sender::new(SUBSCRIBER_LAG),
            trouble: Mutex::new(None),
            checkpoint: Mutex::new(None),
        }
    }

    fn signers(&self) -> MutexGuard<'_, Vec<(VerifyingKey, Option<Timestamp>)>> {
        self.signers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps who signs since when.
    pub(super) fn signs(&self, key: VerifyingKey, since: Timestamp) {
        self.signers().push((key, Some(since)));
    }
}

impl Log {
    /// Opens the log and says so in it. Blocks: it reads the chain from the last checkpoint on and syncs the start
    /// record. Starts two threads: one writes, one sleeps and looks after the first.
    ///
    /// # Errors
    /// [`AuditError::Broken`] where the chain can't be continued, [`AuditError::Cut`] where it lacks the record that
    /// is expected and no loss is accepted, [`AuditError::Locked`] where another writer has it, [`AuditError::Key`] where
    /// the chain was handed over from this key to another, [`AuditError::Unusable`], [`AuditError::Unreadable`],
    /// [`AuditError::Unavailable`].
    pub fn open(settings: Settings, key: SigningKey, clock: SharedClock) -> Result<Self, AuditError> {
        let (directory, instance) = (settings.directory.clone(), settings.instance.clone());
        let path = directory.join(&instance);
        let shared = Arc::new(Shared::new(&path, &settings, key.verifying_key(), Arc::clone(&clock)));
        let (writer, anchored_generation) = Writer::open(settings, key, clock, Arc::clone(&shared))?;
        let watched = Arc::clone(&shared);
        let mut inner = Inner { shared, directory, instance, anchored_generation, threads: Vec::new() };
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
            thread.map_err(|error| unavailable(&path, &error))
        };
        // Where the second can't be started, the first ends with `inner`.
        inner.threads.push(spawn("claviger-audit", Box::new(move || writer.run()))?);
        inner.threads.push(spawn("claviger-watch", Box::new(move || watched.queue.watch()))?);
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Appends a record and gives its sequence once it is written ([`Durability::Relaxed`]) or on the disk
    /// ([`Durability::Durable`]). Texts beyond their bounds are cut. Once polled, the record is written whether or not
    /// the answer is waited for.
    ///
    /// # Errors
    /// [`AuditError::Unavailable`] where no record is known to be there, and so nothing may be served: the disk refuses,
    /// or has not answered for [`ANSWER_WITHIN`](super::ANSWER_WITHIN), in which case the record may still appear when
    /// it does; [`AuditError::Closed`]; [`AuditError::Record`] where its kind is one of the log's own.
    pub async fn append(&self, record: Record, durability: Durability) -> Result<u64, AuditError> {
        self.append_encoded(encode(&record)?, durability).await
    }

    /// Appends records that stand next to each other, all or none. No record is no error.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub async fn append_all(&self, records: Vec<Record>, durability: Durability) -> Result<(), AuditError> {
        let mut batch = Batch::with_capacity(records.len());
        records.iter().try_for_each(|record| encode_into(&mut batch, record))?;
        if batch.is_empty() {
            return Ok(());
        }
        self.append_encoded(batch, durability).await.map(|_| ())
    }

    /// Appends records that are encoded already, all or none, and gives the sequence of the last. There must be one.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub async fn append_encoded(&self, records: Batch, durability: Durability) -> Result<u64, AuditError> {
        self.submit(Work::Records { records, durability, claim: None }).await
    }

    /// Sets `bytes` of the disk aside: as long as the reservation is held, records that are appended
    /// [within](Self::append_within) it can be written, up to so many bytes, though the disk is full for everyone else;
    /// other records are refused before they take any of it. Each record takes its line and room for a checkpoint, at
    /// most [`RECORD_ROOM`](super::RECORD_ROOM) where its fields are short. Nothing is written; a crash gives it back.
    ///
    /// It is as good as what the file system promises by `fallocate`: not against a disk that fails, a volume that is
    /// thinly provisioned, or whoever deletes the log.
    ///
    /// # Errors
    /// [`AuditError::Unavailable`] where there is not so much free space, at once and with nothing changed, or where the
    /// disk does not answer; [`AuditError::Unusable`] where the file system can't set space aside;
    /// [`AuditError::Closed`].
    pub async fn reserve(&self, bytes: u64) -> Result<Reservation, AuditError> {
        let hold = Arc::new(Hold::new(Arc::clone(&self.inner.shared), bytes));
        self.submit(Work::Reserve(Arc::clone(&hold))).await?;
        Ok(Reservation::new(hold))
    }

    /// Appends a record as [`append`](Self::append) does, in space that was set aside for it. One that finds no room in
    /// the reservation any more is an ordinary one, which is written where the disk has space. What a refused record
    /// would have taken is there for the next try.
    ///
    /// # Errors
    /// As [`append`](Self::append); [`AuditError::Record`] where the reservation is one of another log.
    pub async fn append_within(
        &self,
        reservation: &Reservation,
        record: Record,
        durability: Durability,
    ) -> Result<u64, AuditError> {
        let records = encode(&record)?;
        let claim = reservation.claim(&self.inner.shared, &records)?;
        self.submit(Work::Records { records, durability, claim }).await
    }

    async fn submit(&self, work: Work) -> Result<u64, AuditError> {
        let queue = &self.inner.shared.queue;
        let (answer, nudge) = queue.push(work)?;
        if let Some(nudge) = nudge {
            let shared = Arc::clone(&self.inner.shared);
            nudge.send(move || shared.queue.nudge());
        }
        answer.await.unwrap_or_else(|_| Err(queue.stopped()))
    }

    /// Hands the log over to another key: a durable checkpoint, in its place among the records, that both keys sign and
    /// that names the next one; from there on the next one signs. Gives the key that is now in force, and since when.
    /// Asked again with the same key, it is the same handover. Keep the next key on the disk before, and put it in the
    /// place of the former behind; see [`hands_over`](super::hands_over) for what a crash in between leaves.
    ///
    /// # Errors
    /// As [`append`](Self::append): where the disk did not answer, the handover may still come about, so keep the key and
    /// ask again. [`AuditError::Key`] where the key signs or signed this log without a handover, or handed over itself.
    pub async fn rotate_key(&self, next: SigningKey) -> Result<(VerifyingKey, Timestamp), AuditError> {
        let key = next.verifying_key();
        let since = match self.signing_since(&key)? {
            Some(since) => Some(since),
            None => {
                self.submit(Work::Handover(Box::new(next))).await?;
                self.signing_since(&key)?
            }
        };
        since.map(|since| (key, since)).ok_or_else(|| self.inner.shared.queue.stopped())
    }

    /// Since when a key signs; `None` for one that this log does not know.
    fn signing_since(&self, key: &VerifyingKey) -> Result<Option<Timestamp>, AuditError> {
        let signers = self.inner.shared.signers();
        let Some((_, since)) = signers.iter().find(|(known, _)| known == key) else { return Ok(None) };
        let is_in_force = signers.last().is_some_and(|(last, _)| last == key);
        since.filter(|_| is_in_force).map(Some).ok_or_else(|| AuditError::Key {
            path: "(as given)".to_owned(),
            problem: "it signs this log, or did; make another one".to_owned(),
        })
    }

    /// The keys that signed this log, as far as [known](Settings::former_keys), the one in force last. What its chain is
    /// verified with.
    #[must_use]
    pub fn verifying_keys(&self) -> Vec<VerifyingKey> {
        self.inner.shared.signers().iter().map(|(key, _)| *key).collect()
    }

    /// What the log did since it was opened, and how it is. Cheap: a lock and a copy.
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.inner.shared.queue.figures()
    }

    /// Every line from now on, as it stands in the file without its newline, once it is acknowledged. A receiver that
    /// is more than 1,024 lines behind loses the oldest.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<str>> {
        self.inner.shared.lines.subscribe()
    }

    /// Whether the last attempt to write succeeded, and the disk answers. A log in trouble tries again by itself every
    /// second.
    ///
    /// # Errors
    /// What that attempt failed with.
    pub fn health(&self) -> Result<(), AuditError> {
        let shared = &self.inner.shared;
        if let Some(trouble) = shared.queue.trouble() {
            return Err(trouble);
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
    /// [`AuditError::Unavailable`] where the shutdown record could not be written, or the disk does not answer; the log is
    /// closed all the same.
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
        if self.shared.queue.trouble().is_some() {
            // A disk that does not answer is not waited for; the threads end when it does.
            return;
        }
        // Waited for, so that the folder is free again; by anyone but the writer itself, whose settings may hold a log.
        for thread in self.threads.drain(..).filter(|thread| thread.thread().id() != thread::current().id()) {
            drop(thread.join());
        }
    }
}
