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
//! - before each, the file is checked to be the one that was written, as it was left;
//! - a key signs from the batch on that its handover is in, and not before that is acknowledged;
//! - what is reserved is still there behind it, but for what it wrote of that itself: see `reserve`. Where that can't be,
//!   the records that have no claim are refused, and what is left is a batch.

mod beside;
mod draft;
mod space;

use std::mem;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use jiff::Timestamp;

use self::beside::{Beside, Mark};
use self::draft::{Draft, Drafted, Level, Part, Tally, Written};
use super::chain::{Fields, Head, Lines, Notice};
use super::checkpoint::SigningKey;
use super::expected;
use super::figures::{LOOK_EVERY, Room};
use super::log::{Settings, Shared};
use super::queue::{Answer, Phase, Queue, Waiter, Work};
use super::resume::{Resumed, resume};
use super::segment::{Folder, Preparer, Segment, list, unavailable};
use super::{Anchor, AuditError, CHECKPOINT_WITHIN, SYNC_WITHIN};
use crate::clock::SharedClock;

/// How long a log that can't be written waits before it tries by itself.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// How often a log that can't be written says so.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);
/// How many bytes may be written and not synced. A power loss leaves that much to be cut off at most.
const MOST_UNSYNCED: usize = 4 << 20;
/// How many groups a batch keeps memory for.
const USUAL_BATCH: usize = 4_096;

/// See the module.
pub(super) struct Writer {
    settings: Settings,
    key: SigningKey,
    clock: SharedClock,
    shared: Arc<Shared>,
    /// Goes before the folder is let go of.
    preparer: Preparer,
    folder: Folder,
    segment: Segment,
    tally: Tally,
    /// What the log has to say about itself, at the head of the next batch.
    pending: Vec<Notice>,
    lines: Lines,
    /// Memory for those who wait.
    waiters: Vec<Waiter>,
    unsynced_since: Option<Duration>,
    beside: Beside,
    /// Whether one beside the writer has failed since the writer synced itself.
    syncs_alone: bool,
    /// When the last sync beside the writer began, and which checkpoint it is to bring to the disk: what was written since
    /// waits from then on.
    synced_at: Duration,
    synced_checkpoint: Option<Head>,
    retention_due: bool,
    room: Room,
    look_at: Duration,
    /// Whether nothing can be appended any more.
    is_ending: bool,
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
            Some((first, whole)) => folder.reopen(first, whole, found.keep_torn)?,
            None => folder.create(found.head.seq + 1)?,
        };
        let preparer = Preparer::new(&folder, settings.segment_bytes);
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
            preparer,
            folder,
            segment,
            tally,
            pending: Vec::new(),
            lines,
            waiters: Vec::new(),
            unsynced_since: None,
            beside: Beside::default(),
            syncs_alone: false,
            synced_at: Duration::ZERO,
            synced_checkpoint: None,
            retention_due: true,
            room: Room::Ample,
            look_at: Duration::ZERO,
            is_ending: false,
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
            tracing::warn!(?torn, "audit log: what a crash left unfinished at its end was cut off");
        }
        for lost in &losses {
            tracing::error!(?lost, "audit log: it goes on without what was lost, as it was told to");
        }
        self.pending.extend(found.torn);
        self.pending.extend(losses);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        self.pending.push(Notice::Start { version, unsigned: found.unsigned });
        self.say(Level::Signed)?;
        self.tick();
        Ok(())
    }

    /// Serves until the log is closed or no one holds it any more.
    pub(super) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let _failure = Failure(&shared.queue);
        let mut batch = Vec::new();
        let result = loop {
            let phase = shared.queue.take(&mut batch, Some(self.patience()));
            if !batch.is_empty() {
                self.serve(&mut batch);
            }
            // From then on, what was reserved serves the log's own last words.
            self.is_ending = phase != Phase::Open;
            match phase {
                Phase::Open => self.tick(),
                Phase::Closing => {
                    self.pending.push(Notice::Shutdown {});
                    break self.say(Level::Signed);
                }
                Phase::Abandoned | Phase::Closed | Phase::Failed => break self.say(Level::Synced),
            }
        };
        self.put_away();
        // The folder is free before anyone is told.
        drop(self);
        shared.queue.finish(&result);
    }

    fn serve(&mut self, batch: &mut Vec<Work>) {
        if batch.iter().any(|work| work.is_reserve() || work.claim().is_some()) {
            self.serve_each(batch);
        } else {
            let result = self.commit(batch, Part::All.level(batch));
            if let Ok(written) = &result {
                self.succeed(batch, written.at);
            }
            self.shared.queue.settle(&mut self.waiters, result.map(|written| written.sequences));
        }
        batch.clear();
        batch.shrink_to(USUAL_BATCH);
    }

    /// Serves a batch in which space is asked for, or was: each of it has an answer of its own.
    fn serve_each(&mut self, batch: &mut Vec<Work>) {
        let grants: Vec<_> = batch.iter().map(|work| self.grant(work)).collect();
        let (result, refused) = self.commit_each(batch);
        let outcomes: Vec<Answer> = match &result {
            Ok(written) => written.sequences.iter().copied().map(Ok).collect(),
            Err(error) => vec![Err(error.clone()); batch.len()],
        };
        let mut answers = Vec::with_capacity(batch.len());
        for ((work, grant), outcome) in batch.iter_mut().zip(grants).zip(outcomes) {
            let answer = match &refused {
                _ if work.is_reserve() => grant.map(|()| 0),
                Some(error) if work.claim().is_none() => Err(error.clone()),
                _ => outcome,
            };
            // One that was not written goes back before its caller can try again.
            if let Some(claim) = work.take_claim()
                && answer.is_ok()
            {
                claim.spend();
            }
            answers.push(answer);
        }
        if let (Ok(written), None) = (&result, &refused) {
            self.succeed(batch, written.at);
        }
        self.shared.queue.settle_each(&mut self.waiters, answers);
    }

    /// Writes a batch; where that fails, at least what space was reserved for. Gives why the others were refused then.
    fn commit_each(&mut self, batch: &[Work]) -> (Result<Written, AuditError>, Option<AuditError>) {
        let is_ordinary = |work: &Work| work.claim().is_none() && !work.is_reserve();
        match self.try_commit(batch, Part::All, Part::All.level(batch)) {
            Err(error) if batch.iter().any(|work| work.claim().is_some()) => {
                self.note(Some(&error));
                (self.try_commit(batch, Part::Claimed, Part::Claimed.level(batch)), Some(error))
            }
            result => {
                // A record that has its own space does not show that others have some.
                if result.is_err() || batch.iter().any(is_ordinary) {
                    self.note(result.as_ref().err());
                }
                (result, None)
            }
        }
    }

    /// Puts the keys in force that a batch handed over to.
    fn succeed(&mut self, batch: &mut Vec<Work>, at: Timestamp) {
        for work in batch.extract_if(.., |work| matches!(work, Work::Handover(_))) {
            let Work::Handover(next) = work else { continue };
            if next.verifying_key() != self.key.verifying_key() {
                tracing::info!(
                    key = next.id(),
                    former = self.key.id(),
                    "audit log: another key signs from now on"
                );
                self.shared.signs(next.verifying_key(), at);
                self.key = *next;
            }
        }
    }

    /// Writes what the log has to say about itself.
    fn say(&mut self, level: Level) -> Result<(), AuditError> {
        self.commit(&[], level).map(|_| ())
    }

    /// What time alone makes due.
    fn tick(&mut self) {
        self.give_back();
        self.prepare();
        if mem::take(&mut self.retention_due)
            && let Err(error) = self.retain()
        {
            tracing::error!(%error, "audit log: old segments could not be removed");
        }
        let now = self.clock.monotonic();
        if now >= self.look_at {
            self.look_at_disk(now);
        }
        self.take_note_of_the_disk(now);
        if self.due().is_none_or(|due| now < due) || self.sync_beside(now) {
            return;
        }
        // Only a record that reaches the disk proves that the trouble is over.
        let level = if self.is_troubled { Level::Signed } else { Level::Synced };
        // What it failed with is noted.
        let _ = self.say(level);
    }

    /// Takes note of what a sync beside the writer brought to the disk.
    fn take_note_of_the_disk(&mut self, now: Duration) {
        let mark = match self.beside.ended() {
            None => return,
            Some(Ok(mark)) => mark,
            Some(Err(error)) => {
                tracing::warn!(%error, "audit log: a sync failed; it is made again, and what was lost is written again");
                self.syncs_alone = true;
                return;
            }
        };
        if mark.first == self.segment.first() {
            self.segment.is_synced_to(mark.bytes);
            let rest = self.segment.unsynced() > 0;
            self.unsynced_since = rest.then_some(self.unsynced_since.unwrap_or(now).max(self.synced_at));
            if let Some(head) = self.synced_checkpoint.take().filter(|_| self.tally.checkpoint.is_some()) {
                self.tell(head);
                // A later one is told when it is on the disk.
                self.tally.checkpoint = self.tally.checkpoint.filter(|later| *later != head);
            }
        }
    }

    /// Whether all that is due is a sync, and one is made beside the writer.
    fn sync_beside(&mut self, now: Duration) -> bool {
        let is_all =
            !self.is_troubled && self.sign_due().is_none_or(|due| now < due) && self.pending.is_empty();
        if !is_all || self.syncs_alone || self.segment.unsynced() > MOST_UNSYNCED {
            return false;
        }
        if self.beside.is_under_way(now) {
            return true;
        }
        let mark = Mark { first: self.segment.first(), bytes: self.segment.len() };
        // One that takes too long is not begun again beside it.
        let is_free = self.beside.due().is_none();
        let begun = is_free && self.segment.other().is_some_and(|file| self.beside.begin(file, mark, now));
        if begun {
            (self.synced_at, self.synced_checkpoint) = (now, self.tally.checkpoint);
        }
        begun
    }

    /// Says where the disk fills up, before it is full and nothing can be served.
    fn look_at_disk(&mut self, now: Duration) {
        self.look_at = now + LOOK_EVERY;
        let free = self.folder.free_permille();
        self.shared.queue.counters.keep_disk_free(free);
        let room = Room::of(free);
        room.warn_after(mem::replace(&mut self.room, room), &self.segment.path().display().to_string());
    }

    fn due(&self) -> Option<Duration> {
        let sync = self.unsynced_since.map(|since| {
            let due = since + SYNC_WITHIN;
            self.beside.due().map_or(due, |late| due.max(late))
        });
        let retry = self.is_troubled.then_some(self.retry_at);
        [sync, self.sign_due(), retry].into_iter().flatten().min().map(|due| due.max(self.retry_at))
    }

    fn sign_due(&self) -> Option<Duration> {
        self.tally.unsigned_since.map(|since| since + CHECKPOINT_WITHIN)
    }

    fn patience(&self) -> Duration {
        let due = self.due().map_or(self.look_at, |due| due.min(self.look_at));
        due.saturating_sub(self.clock.monotonic())
    }

    /// Writes what is pending and a batch.
    fn commit(&mut self, batch: &[Work], level: Level) -> Result<Written, AuditError> {
        let result = self.try_commit(batch, Part::All, level);
        self.note(result.as_ref().err());
        result
    }

    fn try_commit(&mut self, batch: &[Work], part: Part, level: Level) -> Result<Written, AuditError> {
        self.hold_segment()?;
        let Drafted { tally, written } = self.draft(batch, part, level)?;
        // What the log says about itself waits for no one.
        let sync = level != Level::Written
            || !self.pending.is_empty()
            || self.segment.unsynced().saturating_add(self.lines.bytes().len()) > MOST_UNSYNCED;
        if self.lines.bytes().is_empty() && !sync {
            return Ok(written);
        }
        let space = self.space(batch, part);
        self.make_room(space)?;
        self.keep_reserve(space, part)?;
        let appended = self.segment.append(self.lines.bytes(), sync);
        appended.map_err(|error| unavailable(self.segment.path(), &error))?;
        self.shared.queue.counters.segment_bytes.store(self.segment.len(), Relaxed);
        self.tally = tally;
        self.pending.clear();
        self.unsynced_since =
            if sync { None } else { self.unsynced_since.or_else(|| Some(self.clock.monotonic())) };
        if sync {
            self.syncs_alone = false;
            self.tell_checkpoint();
        }
        self.publish();
        Ok(written)
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
    fn draft(&mut self, batch: &[Work], part: Part, level: Level) -> Result<Drafted, AuditError> {
        self.lines.clear();
        let at = self.clock.now();
        let mut draft = Draft {
            lines: &mut self.lines,
            settings: &self.settings,
            key: &self.key,
            tally: self.tally,
            time: format!("{at:.6}"),
            now: self.clock.monotonic(),
        };
        for notice in &self.pending {
            draft.push(Fields::of_notice(notice)?.as_bytes())?;
        }
        let mut sequences = Vec::with_capacity(batch.len());
        for work in batch {
            sequences.push(if part.takes(work) { draft.work(work)? } else { 0 });
        }
        draft.finish(level)?;
        Ok(Drafted { tally: draft.tally, written: Written { sequences, at } })
    }

    fn tell_checkpoint(&mut self) {
        // What is under way beside the writer would bring no newer one.
        self.synced_checkpoint = None;
        if let Some(head) = self.tally.checkpoint.take() {
            self.tell(head);
        }
    }

    fn tell(&self, Head { seq, hash }: Head) {
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
        self.say(Level::Signed)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::{Batch, View};
    use crate::clock::{Clock as _, ManualClock};
    use crate::environment::Durability;

    fn writer(directory: &std::path::Path) -> (Writer, Arc<ManualClock>) {
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        let settings = Settings::new(directory, "a");
        let key = SigningKey::from_pkcs8(&SigningKey::generate_pkcs8().unwrap()).unwrap();
        let shared = Arc::new(Shared::new(directory, &settings, key.verifying_key(), clock.clone()));
        (Writer::open(settings, key, clock.clone(), shared).unwrap().0, clock)
    }

    fn relaxed() -> Work {
        let mut records = Batch::default();
        records.push(&View { secret: "database", ..View::default() });
        Work::Records { records, durability: Durability::Relaxed, claim: None }
    }

    /// Begins a sync beside the writer of what was written, and gives time until it has ended.
    fn synced_beside(writer: &mut Writer, clock: &ManualClock) {
        writer.commit(&[relaxed()], Level::Written).unwrap();
        clock.advance(SYNC_WITHIN);
        writer.tick();
        assert!(writer.beside.due().is_some(), "one is under way");
        while writer.beside.due().is_some() && !writer.syncs_alone {
            writer.take_note_of_the_disk(clock.monotonic());
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_a_sync_beside_the_writer_brought_to_the_disk_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, clock) = writer(folder.path());
        synced_beside(&mut writer, &clock);
        assert_eq!((writer.segment.unsynced(), writer.unsynced_since), (0, None));
    }

    #[test]
    fn after_a_sync_beside_the_writer_that_failed_nothing_is_believed_before_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, clock) = writer(folder.path());
        writer.segment.fail_beside();
        synced_beside(&mut writer, &clock);
        assert!(writer.segment.unsynced() > 0 && writer.unsynced_since.is_some(), "kept to be written again");
        assert!(!writer.sync_beside(clock.monotonic()), "no other is asked");
        writer.tick();
        assert_eq!((writer.segment.unsynced(), writer.unsynced_since), (0, None), "the writer's own");
        assert!(!writer.syncs_alone);
    }

    #[test]
    fn a_checkpoint_that_is_told_is_never_older_than_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, clock) = writer(folder.path());
        let told = |writer: &Writer| writer.shared.checkpoint.lock().unwrap().clone().unwrap().seq;
        let work: Vec<_> = (0..100).map(|_| relaxed()).collect();
        writer.commit(&work, Level::Written).unwrap();
        clock.advance(SYNC_WITHIN);
        writer.tick();
        // A durable commit comes between, with a checkpoint of its own, and another is written behind it.
        writer.commit(&work, Level::Synced).unwrap();
        let newest = told(&writer);
        writer.commit(&work, Level::Written).unwrap();
        while writer.beside.due().is_some() {
            writer.take_note_of_the_disk(clock.monotonic());
            std::thread::yield_now();
        }
        assert_eq!(told(&writer), newest);
    }
}
