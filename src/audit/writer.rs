//! The one thread that writes.
//!
//! ```text
//!   append ──▶ queue ──▶ chained ──▶ one write ──▶ one fdatasync, where ──▶ all answered ──▶ subscribers told
//!   append ──▶   │       one after    for all       one of them must be
//!   append ──▶   │       the other    that wait     durable
//! ```
//!
//! INVARIANTS, of each batch:
//! - it is acknowledged as a whole or not at all, and where it is not, nothing of it stays in the file;
//! - the chain's head moves only with an acknowledged batch;
//! - before each, the file is checked to be the one that was written, as it was left.

use std::mem;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::chain::{Fields, Head, Lines, Notice};
use super::checkpoint::{SigningKey, Statement};
use super::expected;
use super::log::{Settings, Shared};
use super::queue::{self, Phase, Queue, Submission};
use super::resume::{Resumed, resume};
use super::segment::{Folder, Segment, list, unavailable};
use super::{Anchor, AuditError, CHECKPOINT_EVERY, CHECKPOINT_WITHIN, SYNC_WITHIN};
use crate::clock::SharedClock;

/// How long a log that can't be written waits before it tries by itself.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// How often a log that can't be written says so.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);
/// How many groups a batch keeps memory for.
const USUAL_BATCH: usize = 4_096;

/// How far a batch must go before it is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Written,
    Synced,
    /// Synced, and with a checkpoint at its end.
    Signed,
}

/// Where the chain stands, as far as acknowledged.
#[derive(Debug, Clone, Copy)]
struct Tally {
    head: Head,
    /// How many records follow the last checkpoint, and since when.
    unsigned: u64,
    unsigned_since: Option<Duration>,
    /// Never falls, but by a loss that is accepted at the start: a store from the past is not vouched for.
    generation: u64,
    /// The newest checkpoint, until it is known to be on the disk and told.
    checkpoint: Option<Head>,
}

/// See the module.
pub(super) struct Writer {
    settings: Settings,
    key: SigningKey,
    clock: SharedClock,
    shared: Arc<Shared>,
    folder: Folder,
    segment: Segment,
    tally: Tally,
    /// What the log has to say about itself, at the head of the next batch.
    pending: Vec<Notice>,
    lines: Lines,
    unsynced_since: Option<Duration>,
    retention_due: bool,
    is_troubled: bool,
    retry_at: Duration,
    complained_at: Option<Duration>,
}

impl Writer {
    /// Takes the instance's folder, mends what a crash left, and says in the log that it is open. Gives the generation
    /// that the chain found vouches for as well.
    pub(super) fn open(
        settings: Settings,
        key: SigningKey,
        clock: SharedClock,
        shared: Arc<Shared>,
    ) -> Result<(Self, u64), AuditError> {
        let folder = Folder::open(&settings.directory, &settings.instance)?;
        let found = resume(folder.path(), &settings.instance, &key.verifying_key())?;
        // Before anything is changed: a chain that is refused is evidence.
        let losses = expected::check(folder.path(), &settings, &key.verifying_key(), &found)?;
        let segment = match found.segment {
            Some((first, whole)) => folder.reopen(first, whole)?,
            None => folder.create(found.head.seq + 1)?,
        };
        // A loss that was accepted is recorded once, and from then on the stores are vouched for as they are.
        let generation = if settings.accept_loss {
            found.generation.min((settings.generation)())
        } else {
            found.generation
        };
        let tally = Tally {
            head: found.head,
            unsigned: found.unsigned,
            unsigned_since: None,
            generation,
            checkpoint: None,
        };
        let lines = Lines::new(&settings.instance);
        let mut writer = Self {
            settings,
            key,
            clock,
            shared,
            folder,
            segment,
            tally,
            pending: Vec::new(),
            lines,
            unsynced_since: None,
            retention_due: true,
            is_troubled: false,
            retry_at: Duration::ZERO,
            complained_at: None,
        };
        let anchored = found.generation;
        writer.begin(found, losses)?;
        Ok((writer, anchored))
    }

    fn begin(&mut self, found: Resumed, losses: Vec<Notice>) -> Result<(), AuditError> {
        if let Some(torn) = &found.torn {
            tracing::warn!(?torn, "audit log: a line that a crash left unfinished was cut off");
        }
        for lost in &losses {
            tracing::error!(?lost, "audit log: it goes on without what was lost, as it was told to");
        }
        self.pending.extend(found.torn);
        self.pending.extend(losses);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        self.pending.push(Notice::Start { version, unsigned: found.unsigned });
        self.commit(&[], Level::Signed)?;
        self.tick();
        Ok(())
    }

    /// Serves until the log is closed or no one holds it any more.
    pub(super) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let _failure = Failure(&shared.queue);
        let mut batch = Vec::new();
        let result = loop {
            let phase = shared.queue.take(&mut batch, self.patience());
            if !batch.is_empty() {
                self.serve(&mut batch);
            }
            match phase {
                Phase::Open => self.tick(),
                Phase::Closing => {
                    self.pending.push(Notice::Shutdown {});
                    break self.commit(&[], Level::Signed);
                }
                Phase::Abandoned | Phase::Closed | Phase::Failed => break self.commit(&[], Level::Synced),
            }
        };
        // The folder is free before anyone is told.
        drop(self);
        shared.queue.finish(&result.map(|_| ()));
    }

    fn serve(&mut self, batch: &mut Vec<Submission>) {
        let level = if batch.iter().any(Submission::is_durable) { Level::Synced } else { Level::Written };
        match self.commit(batch, level) {
            Ok(sequences) => queue::answer(batch.drain(..).zip(sequences.into_iter().map(Ok))),
            Err(error) => queue::answer(batch.drain(..).map(|submission| (submission, Err(error.clone())))),
        }
        batch.shrink_to(USUAL_BATCH);
    }

    /// What time alone makes due.
    fn tick(&mut self) {
        if mem::take(&mut self.retention_due)
            && let Err(error) = self.retain()
        {
            tracing::error!(%error, "audit log: old segments could not be removed");
        }
        let now = self.clock.monotonic();
        if self.due().is_none_or(|due| now < due) {
            return;
        }
        // Only a record that reaches the disk proves that the trouble is over.
        let level = if self.is_troubled { Level::Signed } else { Level::Synced };
        // What it failed with is noted.
        let _ = self.commit(&[], level);
    }

    fn due(&self) -> Option<Duration> {
        let sync = self.unsynced_since.map(|since| since + SYNC_WITHIN);
        let sign = self.tally.unsigned_since.map(|since| since + CHECKPOINT_WITHIN);
        let retry = self.is_troubled.then_some(self.retry_at);
        [sync, sign, retry].into_iter().flatten().min().map(|due| due.max(self.retry_at))
    }

    fn patience(&self) -> Option<Duration> {
        self.due().map(|due| due.saturating_sub(self.clock.monotonic()))
    }

    /// Writes what is pending and a batch; gives the sequence of each group's last record.
    fn commit(&mut self, batch: &[Submission], level: Level) -> Result<Vec<u64>, AuditError> {
        let result = self.try_commit(batch, level);
        self.note(result.as_ref().err());
        result
    }

    fn try_commit(&mut self, batch: &[Submission], level: Level) -> Result<Vec<u64>, AuditError> {
        self.hold_segment()?;
        let (tally, sequences) = self.draft(batch, level)?;
        self.make_room()?;
        // What the log says about itself waits for no one.
        let sync = level != Level::Written || !self.pending.is_empty();
        let written = self.segment.append(self.lines.bytes(), sync);
        written.map_err(|error| unavailable(self.segment.path(), &error))?;
        self.tally = tally;
        self.pending.clear();
        self.unsynced_since =
            if sync { None } else { self.unsynced_since.or_else(|| Some(self.clock.monotonic())) };
        if sync {
            self.tell_checkpoint();
        }
        self.publish();
        Ok(sequences)
    }

    /// Makes sure that the segment is the file that was written, as it was left; else begins another one that says so.
    fn hold_segment(&mut self) -> Result<(), AuditError> {
        let problem = self.segment.problem().map_err(|error| unavailable(self.segment.path(), &error))?;
        let Some(problem) = problem else {
            return self.segment.mend().map_err(|error| unavailable(self.segment.path(), &error));
        };
        self.folder.refresh()?;
        let next = self.folder.create(self.tally.head.seq + 1)?;
        let lost = mem::replace(&mut self.segment, next);
        tracing::error!(segment = %lost.path().display(), problem, "audit log: someone tampered with the log");
        self.unsynced_since = None;
        // It may have gone with the segment.
        self.tally.checkpoint = None;
        if lost.len() > 0 {
            self.pending.push(Notice::Lost { segment: lost.name(), problem });
        }
        Ok(())
    }

    /// Encodes and chains; nothing but `lines` changes.
    fn draft(&mut self, batch: &[Submission], level: Level) -> Result<(Tally, Vec<u64>), AuditError> {
        self.lines.clear();
        let mut draft = Draft {
            lines: &mut self.lines,
            settings: &self.settings,
            key: &self.key,
            tally: self.tally,
            time: format!("{:.6}", self.clock.now()),
            now: self.clock.monotonic(),
        };
        for notice in &self.pending {
            draft.push(&Fields::of_notice(notice)?)?;
        }
        let mut sequences = Vec::with_capacity(batch.len());
        for group in batch {
            let mut last = 0;
            for fields in group.fields() {
                last = draft.push(fields)?;
            }
            sequences.push(last);
        }
        draft.finish(level)?;
        Ok((draft.tally, sequences))
    }

    /// Begins the next segment where the drafted lines don't fit into this one.
    fn make_room(&mut self) -> Result<(), AuditError> {
        let drafted = u64::try_from(self.lines.bytes().len()).unwrap_or(u64::MAX);
        let held = self.segment.len();
        if drafted == 0 || held == 0 || held.saturating_add(drafted) <= self.settings.segment_bytes {
            return Ok(());
        }
        self.segment.sync().map_err(|error| unavailable(self.segment.path(), &error))?;
        self.unsynced_since = None;
        self.segment = self.folder.create(self.tally.head.seq + 1)?;
        self.retention_due = true;
        Ok(())
    }

    fn tell_checkpoint(&mut self) {
        let Some(Head { seq, hash }) = self.tally.checkpoint.take() else { return };
        let anchor = Anchor { instance: self.settings.instance.clone(), seq, hash };
        *self.shared.checkpoint.lock().unwrap_or_else(PoisonError::into_inner) = Some(anchor);
    }

    fn publish(&self) {
        if self.shared.lines.receiver_count() > 0 {
            for line in String::from_utf8_lossy(self.lines.bytes()).lines() {
                // The last receiver may have gone since.
                drop(self.shared.lines.send(Arc::from(line)));
            }
        }
    }

    /// Removes the segments that are older than the retention, oldest first, once a signed record says so.
    fn retain(&mut self) -> Result<(), AuditError> {
        let Ok(cutoff) = self.clock.now().checked_sub(self.settings.retention) else { return Ok(()) };
        let mut segments = list(self.folder.path())?.segments;
        // The current one always stays.
        let current = segments.pop();
        let is_old =
            |first: &&u64| matches!(self.folder.newest(**first), Ok(Some(newest)) if newest < cutoff);
        let old = segments.iter().take_while(is_old).count();
        let Some(kept) = segments.get(old).copied().or(current).filter(|_| old > 0) else { return Ok(()) };
        let Some(before) = self.folder.before(kept)? else {
            tracing::error!(
                segment = kept,
                "audit log: its first line is damaged, so nothing before it is removed"
            );
            return Ok(());
        };
        let removed = u64::try_from(old).unwrap_or(u64::MAX);
        self.pending.push(Notice::Retention { first: kept, first_prev: before.hash, removed });
        self.commit(&[], Level::Signed)?;
        for first in segments.into_iter().take(old) {
            self.folder.remove(first).map_err(|error| unavailable(self.folder.path(), &error))?;
        }
        tracing::info!(removed, first = kept, "audit log: segments older than the retention were removed");
        Ok(())
    }

    /// Keeps the health, sets when to try again, and complains at most every so often.
    fn note(&mut self, error: Option<&AuditError>) {
        if error.is_none() && !self.is_troubled {
            return;
        }
        *self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner) = error.cloned();
        self.is_troubled = error.is_some();
        let Some(error) = error else {
            tracing::info!("audit log: it is written again");
            return;
        };
        let now = self.clock.monotonic();
        self.retry_at = now + RETRY_EVERY;
        if self.complained_at.is_none_or(|at| now.saturating_sub(at) >= COMPLAIN_EVERY) {
            self.complained_at = Some(now);
            tracing::error!(%error, "audit log: nothing is served until this is mended");
        }
    }
}

/// Lets go of everyone who waits, where the writer ends by a panic.
struct Failure<'a>(&'a Queue);

impl Drop for Failure<'_> {
    fn drop(&mut self) {
        self.0.fail();
    }
}

/// A batch under construction.
struct Draft<'a> {
    lines: &'a mut Lines,
    settings: &'a Settings,
    key: &'a SigningKey,
    tally: Tally,
    time: String,
    now: Duration,
}

impl Draft<'_> {
    /// Adds a record and, where it is time, a checkpoint; gives the record's sequence.
    fn push(&mut self, fields: &Fields) -> Result<u64, AuditError> {
        self.tally.head = self.lines.push(self.tally.head, &self.time, fields);
        self.tally.unsigned += 1;
        self.tally.unsigned_since.get_or_insert(self.now);
        let sequence = self.tally.head.seq;
        if self.tally.unsigned >= CHECKPOINT_EVERY {
            self.checkpoint()?;
        }
        Ok(sequence)
    }

    fn finish(&mut self, level: Level) -> Result<(), AuditError> {
        let is_signed = self.tally.unsigned == 0 && !self.lines.bytes().is_empty();
        let waited = self.tally.unsigned_since.map(|since| self.now.saturating_sub(since));
        let is_due = waited.is_some_and(|waited| waited >= CHECKPOINT_WITHIN);
        if is_due || (level == Level::Signed && !is_signed) { self.checkpoint() } else { Ok(()) }
    }

    fn checkpoint(&mut self) -> Result<(), AuditError> {
        let Tally { head, generation, .. } = self.tally;
        let generation = generation.max((self.settings.generation)());
        let statement = Statement { instance: &self.settings.instance, head, generation, time: &self.time };
        let signature = self.key.sign(&statement);
        let key = self.key.id().to_owned();
        let notice = Notice::Checkpoint { head: head.hash, generation, key, signature };
        let head = self.lines.push(head, &self.time, &Fields::of_notice(&notice)?);
        self.tally = Tally { head, unsigned: 0, unsigned_since: None, generation, checkpoint: Some(head) };
        Ok(())
    }
}
