//! A batch under construction: encoded, chained and checkpointed, and not written yet. No I/O.

use std::time::Duration;

use jiff::Timestamp;

use super::super::chain::{Fields, Head, Lines, Notice};
use super::super::checkpoint::{Checkpoint, SigningKey, Statement};
use super::super::log::Settings;
use super::super::queue::Work;
use super::super::{AuditError, CHECKPOINT_EVERY, CHECKPOINT_WITHIN};

/// How far a batch must go before it is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    Written,
    Synced,
    /// Synced, and with a checkpoint at its end.
    Signed,
}

/// What of a batch is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    All,
    /// What space was reserved for.
    Claimed,
}

impl Part {
    pub(super) fn takes(self, work: &Work) -> bool {
        self == Self::All || work.claim().is_some()
    }

    /// How far it must go.
    pub(super) fn level(self, batch: &[Work]) -> Level {
        let is_durable = batch.iter().any(|work| work.is_durable() && self.takes(work));
        if is_durable { Level::Synced } else { Level::Written }
    }
}

/// Where the chain stands, as far as acknowledged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tally {
    pub(super) head: Head,
    /// How many records follow the last checkpoint, and since when.
    pub(super) unsigned: u64,
    pub(super) unsigned_since: Option<Duration>,
    /// Never falls, but by a loss that is accepted at the start: a store from the past is not vouched for.
    pub(super) generation: u64,
    /// The newest checkpoint, until it is known to be on the disk and told.
    pub(super) checkpoint: Option<Head>,
}

/// A batch as lines that are not written yet.
pub(super) struct Drafted {
    pub(super) tally: Tally,
    pub(super) written: Written,
}

/// A batch that is written.
pub(super) struct Written {
    /// The sequence of each group's last record; 0 for one without.
    pub(super) sequences: Vec<u64>,
    pub(super) at: Timestamp,
}

/// A batch under construction.
pub(super) struct Draft<'a> {
    pub(super) lines: &'a mut Lines,
    pub(super) settings: &'a Settings,
    pub(super) key: &'a SigningKey,
    pub(super) tally: Tally,
    pub(super) time: String,
    pub(super) now: Duration,
}

impl<'a> Draft<'a> {
    /// Adds what a caller asks for; gives the sequence of its last record.
    pub(super) fn work(&mut self, work: &'a Work) -> Result<u64, AuditError> {
        if let Work::Handover(next) = work {
            return self.hand_over(next);
        }
        let mut last = 0;
        for fields in work.fields() {
            last = self.push(fields)?;
        }
        Ok(last)
    }

    /// Adds a record and, where it is time, a checkpoint; gives the record's sequence.
    pub(super) fn push(&mut self, fields: &[u8]) -> Result<u64, AuditError> {
        self.tally.head = self.lines.push(self.tally.head, &self.time, fields);
        self.tally.unsigned += 1;
        self.tally.unsigned_since.get_or_insert(self.now);
        let sequence = self.tally.head.seq;
        if self.tally.unsigned >= CHECKPOINT_EVERY {
            self.checkpoint(None)?;
        }
        Ok(sequence)
    }

    /// Adds the checkpoint that makes `next` the key in force, unless it is; gives the last record's sequence.
    fn hand_over(&mut self, next: &'a SigningKey) -> Result<u64, AuditError> {
        if next.verifying_key() != self.key.verifying_key() {
            self.checkpoint(Some(next))?;
            self.key = next;
        }
        Ok(self.tally.head.seq)
    }

    pub(super) fn finish(&mut self, level: Level) -> Result<(), AuditError> {
        let is_signed = self.tally.unsigned == 0 && !self.lines.bytes().is_empty();
        let waited = self.tally.unsigned_since.map(|since| self.now.saturating_sub(since));
        let is_due = waited.is_some_and(|waited| waited >= CHECKPOINT_WITHIN);
        if is_due || (level == Level::Signed && !is_signed) { self.checkpoint(None) } else { Ok(()) }
    }

    fn checkpoint(&mut self, next: Option<&SigningKey>) -> Result<(), AuditError> {
        let Tally { head, generation, .. } = self.tally;
        let generation = generation.max((self.settings.generation)());
        let statement = Statement { instance: &self.settings.instance, head, generation, time: &self.time };
        let notice = Notice::Checkpoint(Checkpoint::new(&statement, self.key, next));
        let head = self.lines.push(head, &self.time, Fields::of_notice(&notice)?.as_bytes());
        self.tally = Tally { head, unsigned: 0, unsigned_since: None, generation, checkpoint: Some(head) };
        Ok(())
    }
}
