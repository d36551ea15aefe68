//! [`hands_over`]: what a start asks of the log after a crash in the middle of a handover.
//!
//! ```text
//!   audit.key.next kept ─▶ handover in the log ─▶ audit.key.next renamed to audit.key
//!                       └──── crash: forget it ──┴──── crash: finish it
//! ```

use std::path::Path;

use super::AuditError;
use super::chain::{Entry, Frame, Notice};
use super::checkpoint::VerifyingKey;
use super::segment::{self, Chunk, LineReader};
use super::verify::list_instances;

/// What each handover's line holds and no text of a record can, where quotation marks are escaped.
const MARK: &str = "\"handover\":{";

/// Whether a chain below `directory` was handed over from `key` to `next`: by a whole line, in which both signed where the
/// chain stands. It is then on the disk. Reads the newest segments first, and no more than it must. No log is no error.
///
/// # Errors
/// [`AuditError::Unreadable`], [`AuditError::Unavailable`].
pub fn hands_over(directory: &Path, key: &VerifyingKey, next: &VerifyingKey) -> Result<bool, AuditError> {
    if !directory.exists() {
        return Ok(false);
    }
    for instance in list_instances(directory)? {
        let folder = directory.join(&instance);
        for first in segment::list(&folder)?.segments.iter().rev() {
            let path = folder.join(segment::file_name(*first));
            if stands_in(&path, &instance, key, next)? {
                segment::sync(&path)?;
                return Ok(true);
            }
        }
    }
    Ok(false)
}

fn stands_in(
    path: &Path,
    instance: &str,
    key: &VerifyingKey,
    next: &VerifyingKey,
) -> Result<bool, AuditError> {
    let mut lines = LineReader::open(path)?;
    while let Some(chunk) = lines.read()? {
        if let Chunk::Line(line) = chunk
            && stands_on(line, instance, key, next).is_some()
        {
            return Ok(true);
        }
    }
    Ok(false)
}

fn stands_on(line: &[u8], instance: &str, key: &VerifyingKey, next: &VerifyingKey) -> Option<()> {
    std::str::from_utf8(line).ok().filter(|text| text.contains(MARK))?;
    let frame = Frame::parse(line).filter(Frame::is_authentic)?;
    let Ok(Entry::Notice(Notice::Checkpoint(checkpoint))) = frame.entry() else { return None };
    let handover = checkpoint.handover.as_ref()?;
    let fits = handover.key == *key && handover.next_key == *next && checkpoint.fits(instance, &frame, key);
    fits.then_some(())
}
