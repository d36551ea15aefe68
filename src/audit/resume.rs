//! Where a writer goes on: the end of a chain, read strictly.
//!
//! ```text
//!   lines, acknowledged or not      torn, never told to be durable         written ahead
//!   ├── line\n ── … ── line\n ──┼── li 0 0 0 0 e\n ── line\n ── lin ──┼── 0 0 0 0 0 0 ┤
//!                                │                                     └ no content, cut off without a word
//!                                └ cut off and recorded; kept in a file, where it is more than one unfinished line
//! ```
//!
//! A crash can leave two things only behind the lines that are whole. One is a last line that is not. The other comes of
//! a batch that overwrote zeros: each of its pages is on the disk or is not, so that its first line that is not whole has
//! zeros in it, and anything may stand behind. No more is torn than a crash leaves of what was under way. Anything else
//! that is wrong stops the start, and is evidence.

use std::path::{Path, PathBuf};

use ring::digest;

use super::AuditError;
use super::chain::{ChainHash, Entry, Frame, Head, Notice};
use super::checkpoint::{Checkpoint, VerifyingKey};
use super::segment::{self, Chunk, LineReader, MAX_TORN, unreadable, wide};

/// Where a writer goes on.
#[derive(Debug)]
pub(super) struct Resumed {
    pub(super) head: Head,
    /// The last segment's first sequence, and how many of its bytes are whole lines.
    pub(super) segment: Option<(u64, u64)>,
    /// What is torn behind them, to be cut off.
    pub(super) torn: Option<Notice>,
    /// Whether that is to be kept in a file before: it is more than one unfinished line.
    pub(super) keep_torn: bool,
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
/// [`AuditError::Broken`] for anything wrong but a torn end; [`AuditError::Key`] where `key` handed over to another;
/// [`AuditError::Unreadable`].
pub(super) fn resume(folder: &Path, instance: &str, key: &VerifyingKey) -> Result<Resumed, AuditError> {
    let segments = segment::list(folder)?.segments;
    let mut resumed = Resumed {
        head: Head::genesis(instance),
        segment: None,
        torn: None,
        keep_torn: false,
        unsigned: 0,
        generation: 0,
    };
    // What the segment read last begins with, which this one must end with.
    let mut due: Option<Head> = None;
    for first in segments.iter().rev() {
        let tail = Tail::read(folder, instance, key, *first)?;
        if resumed.segment.is_none() {
            resumed.segment = Some((*first, tail.whole));
            (resumed.torn, resumed.keep_torn) = (tail.torn.clone(), tail.keep_torn);
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
    keep_torn: bool,
    is_signed: bool,
    /// The first record says that the segment before it was lost.
    explains_gap: bool,
    unsigned: u64,
    generation: u64,
    /// The id of the key that handed over to the one that signs.
    former: Option<String>,
}

/// The first line that is not whole.
struct Tear {
    problem: &'static str,
    /// Whether it has a hole, so that anything may stand behind it.
    is_holed: bool,
    /// Whether it is more than one unfinished line.
    is_more: bool,
}

/// Why a line is not taken.
enum Flaw {
    /// As a crash leaves a line.
    Torn { problem: &'static str, is_holed: bool },
    /// As no crash does.
    Wrong(String),
    /// The key that is to sign handed over to this one.
    HandedOver(VerifyingKey),
}

impl Flaw {
    /// Of a line that has its end. A crash leaves one where a page before its last did not reach the disk, which then
    /// reads as zeros; nothing else does.
    fn of_whole(line: &[u8], problem: &'static str) -> Self {
        if line.contains(&0) {
            Self::Torn { problem, is_holed: true }
        } else {
            Self::Wrong(problem.to_owned())
        }
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
            keep_torn: false,
            is_signed: false,
            explains_gap: false,
            unsigned: 0,
            generation: 0,
            former: None,
        };
        let mut tear: Option<Tear> = None;
        while let Some(chunk) = lines.read()? {
            if let Some(tear) = &mut tear {
                if !tear.is_holed {
                    return Err(tail.broken(tear.problem));
                }
                tear.is_more = true;
                continue;
            }
            tail.line += 1;
            let is_more = !matches!(chunk, Chunk::Torn(_));
            let taken = match chunk {
                Chunk::Line(line) => tail.take(line, instance, key, first),
                Chunk::Torn(_) => Err(Flaw::Torn { problem: "the line is not finished", is_holed: false }),
                Chunk::TooLong { holed } => {
                    Err(Flaw::Torn { problem: "the line is too long, or not finished", is_holed: holed })
                }
            };
            match taken {
                Ok(()) => {}
                Err(Flaw::Torn { problem, is_holed }) => tear = Some(Tear { problem, is_holed, is_more }),
                Err(Flaw::Wrong(problem)) => return Err(tail.broken(&problem)),
                Err(Flaw::HandedOver(next)) => return Err(tail.handed_over(&next)),
            }
        }
        if let Some(tear) = tear {
            tail.tear(first, &tear)?;
        }
        Ok(tail)
    }

    /// Names what is torn off behind the lines that are whole.
    fn tear(&mut self, first: u64, tear: &Tear) -> Result<(), AuditError> {
        let torn = segment::torn(&self.path, self.whole).map_err(|error| unreadable(&self.path, &error))?;
        let Some(torn) = torn else {
            let problem = format!("{}, and with what follows it is more than {MAX_TORN} bytes", tear.problem);
            return Err(self.broken(&problem));
        };
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(&torn);
        let (bytes, sha256) = (wide(torn.len()), ChainHash::finish(context));
        self.torn = Some(Notice::Repaired { segment: segment::file_name(first), bytes, sha256 });
        self.keep_torn = tear.is_more;
        Ok(())
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
