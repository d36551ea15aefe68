//! Whether a chain still holds the record that a start expects of it, and the stores what the chain vouches for.
//!
//! ```text
//!   kept segments        ├─── first ───┼─── … ───┼─── last ───┤ head
//!   expected    behind ◀─┘             └ looked up ┘          └─▶ cut off
//!               removed, which a signed
//!               retention record must say
//! ```

use std::path::Path;

use super::chain::{ChainHash, Frame, Head, Notice};
use super::checkpoint::VerifyingKey;
use super::log::Settings;
use super::resume::Resumed;
use super::segment::{self, Chunk, LineReader};
use super::verify::gave_up;
use super::{Anchor, AuditError};

/// What the log has to say about losses that `settings` accept. Changes nothing.
///
/// # Errors
/// [`AuditError::Cut`] for a cut that they don't accept; [`AuditError::Unreadable`].
pub(super) fn check(
    folder: &Path,
    settings: &Settings,
    key: &VerifyingKey,
    found: &Resumed,
) -> Result<Vec<Notice>, AuditError> {
    let cut = match &settings.expected {
        Some(expected) => missing(folder, &settings.instance, key, found.head, expected)?,
        None => None,
    };
    match cut {
        Some(problem) if !settings.accept_loss => {
            Err(AuditError::Cut { path: folder.display().to_string(), problem })
        }
        // Without leave, stores from the past are for the owner of the log to refuse: it holds them.
        _ if !settings.accept_loss => Ok(Vec::new()),
        cut => {
            let segment = segment::file_name(found.segment.map_or(1, |(first, _)| first));
            let lost = |problem| Notice::Lost { segment: segment.clone(), problem };
            let told = settings.losses.iter().cloned();
            Ok(cut.into_iter().chain(brought_back(settings, found)).chain(told).map(lost).collect())
        }
    }
}

/// How the stores are older than the chain knows them to have been.
fn brought_back(settings: &Settings, found: &Resumed) -> Option<String> {
    let (vouched, reported) = (found.generation, (settings.generation)());
    (reported < vouched).then(|| {
        format!("the log vouches for generation {vouched} of the stores, but they report {reported}")
    })
}

/// Which record is expected and what there is instead; `None` where it is in its place, or was given up.
fn missing(
    folder: &Path,
    instance: &str,
    key: &VerifyingKey,
    head: Head,
    expected: &Anchor,
) -> Result<Option<String>, AuditError> {
    let Anchor { instance: named, seq, hash } = expected;
    let named: String = named.escape_debug().take(64).collect();
    let instead = instead(folder, instance, key, head, expected)?;
    Ok(instead
        .map(|instead| format!("record {seq} of instance `{named}` with hash {hash} is expected, {instead}")))
}

fn instead(
    folder: &Path,
    instance: &str,
    key: &VerifyingKey,
    head: Head,
    expected: &Anchor,
) -> Result<Option<String>, AuditError> {
    if expected.instance != instance {
        return Ok(Some(format!("but this is the chain of instance `{instance}`")));
    }
    if head.seq == 0 {
        return Ok(Some("but there is no record at all".to_owned()));
    }
    if head.seq < expected.seq {
        return Ok(Some(format!("but the chain ends at record {}", head.seq)));
    }
    let segments = segment::list(folder)?.segments;
    let Some(first) = segments.iter().rev().find(|first| **first <= expected.seq) else {
        let excused = gave_up(folder, instance, key, expected)?;
        return Ok((!excused).then(|| {
            "but the chain begins behind it, and no signed retention record vouches for that".to_owned()
        }));
    };
    let name = segment::file_name(*first);
    Ok(match hash_of(&folder.join(&name), expected.seq)? {
        Some(hash) if hash == expected.hash => None,
        Some(hash) => Some(format!("but {name} holds another one there, with hash {hash}")),
        None => Some(format!("but {name}, where it belongs, does not hold it")),
    })
}

/// The hash of a segment's record `seq`, as far as its line is whole.
fn hash_of(path: &Path, seq: u64) -> Result<Option<ChainHash>, AuditError> {
    let mut lines = LineReader::open(path)?;
    while let Some(chunk) = lines.read()? {
        if let Chunk::Line(line) = chunk
            && let Some(frame) = Frame::parse(line)
            && frame.seq == seq
            && frame.is_authentic()
        {
            return Ok(Some(frame.hash));
        }
    }
    Ok(None)
}
