//! Where a writer goes on: the end of a chain, read strictly.
//!
//! A crash can leave one thing only, a last line that is not whole; it is named, to be cut off and recorded. Anything
//! else that is wrong stops the start, and is evidence.

use std::path::{Path, PathBuf};

use super::AuditError;
use super::chain::{Entry, Frame, Head, Notice};
use super::checkpoint::{Checkpoint, VerifyingKey};
use super::segment::{self, Chunk, LineReader, unreadable};

/// Where a writer goes on.
#[derive(Debug)]
pub(super) struct Resumed {
    pub(super) head: Head,
    /// The last segment's first sequence, and how many of its bytes are whole lines.
    pub(super) segment: Option<(u64, u64)>,
    /// The torn line behind them, to be cut off.
    pub(super) torn: Option<Notice>,
    /// How many records follow the last checkpoint by this key, or the one that handed over to it.
    pub(super) unsigned: u64,
    /// The generation that the last checkpoint by this key vouches for, or a higher one of a checkpoint behind it by
    /// another key: that can't be checked here, and so may raise what is asked of the stores but not lower it.
    pub(super) generation: u64,
}

/// Checks the end of a chain: the last segment, and those before it back to a checkpoint by `key`, or one that hands over
/// to it.
///
/// # Errors
/// [`AuditError::Broken`] for anything wrong but a torn last line; [`AuditError::Key`] where `key` handed over to another;
/// [`AuditError::Unreadable`].
pub(super) fn resume(folder: &Path, instance: &str, key: &VerifyingKey) -> Result<Resumed, AuditError> {
    let segments = segment::list(folder)?.segments;
    let mut resumed =
        Resumed { head: Head::genesis(instance), segment: None, torn: None, unsigned: 0, generation: 0 };
    // What the segment read last begins with, which this one must end with.
    let mut due: Option<Head> = None;
    for first in segments.iter().rev() {
        let tail = Tail::read(folder, instance, key, *first)?;
        if resumed.segment.is_none() {
            resumed.segment = Some((*first, tail.whole));
            resumed.torn = tail.torn.clone();
        } else if tail.torn.is_some() {
            return Err(tail.broken("it ends in a damaged line, and a later segment follows it"));
        }
        resumed.unsigned += tail.unsigned;
        resumed.generation = resumed.generation.max(tail.generation);
        match (due, tail.head) {
            (None, Some(head)) => resumed.head = head,
            (Some(due), Some(head)) if due != head => {
                return Err(tail.broken("the next segment does not go on where it ends"));
            }
            (Some(_), None) => return Err(tail.broken("it is empty, and a later segment follows it")),
            _ => {}
        }
        if tail.is_signed || tail.explains_gap {
            break;
        }
        due = tail.before.or(due);
    }
    match resumed.segment {
        // An empty segment must be the one that the next record would have begun.
        Some((first, 0)) if first != resumed.head.seq + 1 => Err(AuditError::Broken {
            path: folder.join(segment::file_name(first)).display().to_string(),
            problem: format!("it is empty, and the chain before it ends at record {}", resumed.head.seq),
        }),
        _ => Ok(resumed),
    }
}

/// One segment, read strictly.
struct Tail {
    path: PathBuf,
    line: u64,
    before: Option<Head>,
    head: Option<Head>,
    whole: u64,
    torn: Option<Notice>,
    is_signed: bool,
    /// The first record says that the segment before it was lost.
    explains_gap: bool,
    unsigned: u64,
    generation: u64,
    /// The id of the key that handed over to the one that signs.
    former: Option<String>,
}

/// Why a line is not taken.
enum Flaw {
    /// As a crash leaves the last line.
    Torn(&'static str),
    /// As no crash does.
    Wrong(String),
    /// The key that is to sign handed over to this one.
    HandedOver(VerifyingKey),
}

impl Flaw {
    /// Of a line that has its end. A crash leaves one where a page before its last did not reach the disk, which then
    /// reads as zeros; nothing else does.
    fn of_whole(line: &[u8], problem: &'static str) -> Self {
        if line.contains(&0) { Self::Torn(problem) } else { Self::Wrong(problem.to_owned()) }
    }
}

impl Tail {
    fn read(folder: &Path, instance: &str, key: &VerifyingKey, first: u64) -> Result<Self, AuditError> {
        let path = folder.join(segment::file_name(first));
        let mut lines = LineReader::open(&path)?;
        let mut tail = Self {
            path,
            line: 0,
            before: None,
            head: None,
            whole: 0,
            torn: None,
            is_signed: false,
            explains_gap: false,
            unsigned: 0,
            generation: 0,
            former: None,
        };
        let mut flaw = None;
        while let Some(chunk) = lines.read()? {
            if let Some(problem) = flaw {
                return Err(tail.broken(problem));
            }
            tail.line += 1;
            let taken = match chunk {
                Chunk::Line(line) => tail.take(line, instance, key, first),
                Chunk::Torn(_) | Chunk::TooLong => Err(Flaw::Torn("the line is too long, or not finished")),
            };
            match taken {
                Ok(()) => {}
                Err(Flaw::Torn(problem)) => flaw = Some(problem),
                Err(Flaw::Wrong(problem)) => return Err(tail.broken(&problem)),
                Err(Flaw::HandedOver(next)) => return Err(tail.handed_over(&next)),
            }
        }
        if flaw.is_some() {
            let cut = segment::digest_from(&tail.path, tail.whole)
                .map_err(|error| unreadable(&tail.path, &error))?;
            let (sha256, bytes) = cut;
            tail.torn = Some(Notice::Repaired { segment: segment::file_name(first), bytes, sha256 });
        }
        Ok(tail)
    }

    fn take(&mut self, line: &[u8], instance: &str, key: &VerifyingKey, first: u64) -> Result<(), Flaw> {
        let frame = Frame::parse(line).ok_or_else(|| Flaw::of_whole(line, "the line is not a record"))?;
        if !frame.is_authentic() {
            return Err(Flaw::of_whole(line, "the record was changed"));
        }
        if let Some(problem) = frame.astray(instance) {
            return Err(Flaw::Wrong(problem));
        }
        match self.head {
            None if frame.seq != first => {
                return Err(Flaw::Wrong(format!("its first record is {}", frame.seq)));
            }
            Some(head) if !frame.follows(head) => {
                return Err(Flaw::Wrong(format!("record {} does not follow record {}", frame.seq, head.seq)));
            }
            _ => {}
        }
        let entry = frame.entry().map_err(Flaw::Wrong)?;
        if self.head.is_none() {
            self.before = Some(Head { seq: frame.seq - 1, hash: frame.prev });
            self.explains_gap = matches!(entry, Entry::Notice(Notice::Lost { .. }));
        }
        self.unsigned += 1;
        if let Entry::Notice(Notice::Checkpoint(checkpoint)) = entry {
            self.checkpoint(&frame, instance, key, &checkpoint)?;
        }
        self.head = Some(frame.head());
        self.whole += u64::try_from(line.len()).unwrap_or(u64::MAX).saturating_add(1);
        Ok(())
    }

    fn checkpoint(
        &mut self,
        frame: &Frame<'_>,
        instance: &str,
        key: &VerifyingKey,
        checkpoint: &Checkpoint,
    ) -> Result<(), Flaw> {
        let Checkpoint { key: id, generation, handover, .. } = checkpoint;
        if self.former.as_ref() == Some(id) {
            return Err(Flaw::Wrong("the checkpoint's key had handed over to another before".to_owned()));
        }
        let taken_over = handover.as_ref().filter(|handover| handover.next_key == *key);
        let signer = match taken_over {
            Some(handover) => Some(handover.key),
            None => Some(*key).filter(|key| key.id() == *id),
        };
        if let Some(signer) = signer {
            if !checkpoint.fits(instance, frame, &signer) {
                let problem = "the checkpoint's signature does not fit the chain before it".to_owned();
                return Err(Flaw::Wrong(problem));
            }
            match (taken_over, handover) {
                (None, Some(handover)) => return Err(Flaw::HandedOver(handover.next_key)),
                (Some(_), _) => self.former = Some(id.clone()),
                (None, None) => {}
            }
            self.is_signed = true;
            self.unsigned = 0;
            self.generation = *generation;
        }
        self.generation = self.generation.max(*generation);
        Ok(())
    }

    fn handed_over(&self, next: &VerifyingKey) -> AuditError {
        AuditError::Key {
            path: "(as given)".to_owned(),
            problem: format!(
                "it handed over to key {} in {}:{}; put back the key that signs since then",
                next.id(),
                self.path.display(),
                self.line
            ),
        }
    }

    fn broken(&self, problem: &str) -> AuditError {
        AuditError::Broken {
            path: format!("{}:{}", self.path.display(), self.line),
            problem: problem.to_owned(),
        }
    }
}
