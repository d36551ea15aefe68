//! Where the next lines go: into which segment, and the writer's side of [`reserve`](super::super::reserve), whose blocks
//! they take.

use std::mem;
use std::sync::atomic::Ordering::Relaxed;

use super::super::AuditError;
use super::super::queue::Work;
use super::super::reserve::Claim;
use super::super::segment::{Segment, not_set_aside, unavailable, wide};
use super::Writer;
use super::draft::Part;

/// How many bytes are set aside with what is reserved, for what the log has to say about itself in between.
const OWN_ROOM: u64 = 4_096;

impl Writer {
    /// Sets space aside, where that is what the work asks for.
    pub(super) fn grant(&mut self, work: &Work) -> Result<(), AuditError> {
        let Work::Reserve(hold) = work else { return Ok(()) };
        self.hold_segment()?;
        let space = self.owed().saturating_add(hold.wanted()).saturating_add(OWN_ROOM);
        self.segment.secure(space).map_err(|error| not_set_aside(self.segment.path(), &error))?;
        hold.grant();
        Ok(())
    }

    /// How many bytes are reserved.
    pub(super) fn owed(&self) -> u64 {
        if self.is_ending { 0 } else { self.shared.queue.owed.load(Relaxed) }
    }

    /// Gives back what is set aside, once nobody has reserved anything.
    pub(super) fn give_back(&mut self) {
        if self.segment.is_roomy() && self.owed() == 0 {
            // Where it fails, the next start does it.
            let _ = self.segment.trim();
        }
    }

    /// Has the next segment prepared while this one fills up. A log in trouble needs the disk itself.
    pub(super) fn prepare(&mut self) {
        if self.is_troubled {
            self.preparer.release(&self.folder);
        } else {
            self.preparer.follow(&self.folder, self.segment.taken());
        }
    }

    /// Leaves the files as they are to be at rest, at the end.
    pub(super) fn put_away(&mut self) {
        self.preparer.stop(&self.folder);
        // Where it fails, the next start does it.
        let _ = self.segment.finish();
    }

    /// How many bytes must be the segment's behind what was acknowledged before the drafted lines may be written: theirs,
    /// and all that stays owed. 0 where nothing is reserved.
    pub(super) fn space(&self, batch: &[Work], part: Part) -> u64 {
        let owed = self.owed();
        if owed == 0 {
            return 0;
        }
        let claims = batch.iter().filter(|work| part.takes(work)).filter_map(Work::claim);
        let claimed: u64 = claims.map(Claim::bytes).sum();
        wide(self.lines.bytes().len()).saturating_add(owed.saturating_sub(claimed))
    }

    /// Sees to it that `space` is the segment's, where there is something to write.
    pub(super) fn keep_reserve(&mut self, space: u64, part: Part) -> Result<(), AuditError> {
        if space == 0 || self.lines.bytes().is_empty() {
            return Ok(());
        }
        let mut secured = self.segment.secure(space.saturating_add(OWN_ROOM));
        if part == Part::Claimed {
            secured = secured.or_else(|_| self.segment.secure(space));
        }
        let Err(error) = secured else { return Ok(()) };
        // What was written before waits for the disk no longer than it would have.
        if self.unsynced_since.is_some() && self.segment.sync().is_ok() {
            self.unsynced_since = None;
            self.tell_checkpoint();
        }
        Err(unavailable(self.segment.path(), &error))
    }

    /// Begins the next segment where the drafted lines don't fit into this one. `space`, where it is not 0, must then be
    /// the next one's; where the disk does not have as much once more, this one grows beyond its size.
    pub(super) fn make_room(&mut self, space: u64) -> Result<(), AuditError> {
        let drafted = wide(self.lines.bytes().len());
        let held = self.segment.len();
        if drafted == 0 || held == 0 || held.saturating_add(drafted) <= self.settings.segment_bytes {
            return Ok(());
        }
        self.segment.sync().map_err(|error| unavailable(self.segment.path(), &error))?;
        self.unsynced_since = None;
        let first = self.tally.head.seq + 1;
        let next = if space == 0 { Some(self.next(first)?) } else { self.roomy(first, space)? };
        let Some(next) = next else { return Ok(()) };
        let full = mem::replace(&mut self.segment, next);
        self.preparer.retire(full);
        self.retention_due = true;
        Ok(())
    }

    /// A new segment: the one that was prepared, or an empty one.
    fn next(&mut self, first: u64) -> Result<Segment, AuditError> {
        if let Some(file) = self.preparer.take(&self.folder) {
            match self.folder.adopt(file, self.settings.segment_bytes, first) {
                Ok(next) => return Ok(next),
                Err(error) => tracing::info!(%error, "audit log: the segment prepared ahead is of no use"),
            }
        }
        self.folder.create(first)
    }

    /// A new segment of which `space` is its own; `None`, and nothing is left of it, where the disk does not have it.
    fn roomy(&mut self, first: u64, space: u64) -> Result<Option<Segment>, AuditError> {
        let made = self.next(first).and_then(|mut next| {
            let secured = next.secure(space.saturating_add(OWN_ROOM)).inspect_err(|_| {
                // Only what holds nothing can be taken back.
                let _ = next.empty();
            });
            secured.map(|()| next).map_err(|error| unavailable(self.folder.path(), &error))
        });
        match made {
            Ok(next) => Ok(Some(next)),
            Err(_) => {
                // An empty one in the middle of the chain would break it.
                let discarded = self.folder.discard(first);
                discarded.map(|()| None).map_err(|error| unavailable(self.folder.path(), &error))
            }
        }
    }
}
