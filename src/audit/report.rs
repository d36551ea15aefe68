//! What a verification says: findings, and what each instance's chain is.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use super::AuditError;
use super::chain::ChainHash;
use super::segment;

/// How many findings a report lists; the others are counted.
pub(super) const MAX_FINDINGS: usize = 1_000;

/// A record that is known from elsewhere to have been in the log; written and read as `instance:sequence:hash`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anchor {
    /// The instance.
    pub instance: String,
    /// The record's sequence.
    pub seq: u64,
    /// The record's hash.
    pub hash: ChainHash,
}

impl fmt::Display for Anchor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.instance, self.seq, self.hash)
    }
}

impl FromStr for Anchor {
    type Err = AuditError;

    fn from_str(text: &str) -> Result<Self, AuditError> {
        let mut parts = text.splitn(3, ':');
        let mut part = || parts.next().unwrap_or_default();
        let (instance, seq, hash) = (part(), part(), part());
        match (segment::is_instance(instance), seq.parse(), hash.parse()) {
            (true, Ok(seq), Ok(hash)) => Ok(Self { instance: instance.to_owned(), seq, hash }),
            _ => Err(AuditError::Query(
                "an anchor is `instance:sequence:hash`, the hash as 64 hex digits".to_owned(),
            )),
        }
    }
}

/// What kind of thing is wrong. The names are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// A line is not one of this log: cut, too long, not JSON, with a field that no record has, or of another
    /// instance.
    Malformed,
    /// A line was changed: its bytes don't have its hash.
    HashMismatch,
    /// A record doesn't follow the one before it: something was rewritten or put in between.
    BrokenLink,
    /// Records are missing in the middle.
    MissingRecords,
    /// The first records are missing, and no signed retention record says why.
    MissingStart,
    /// The same record stands twice in a row.
    Duplicate,
    /// A record stands where a later one belongs.
    OutOfOrder,
    /// A file's name is not its first record's sequence.
    SegmentName,
    /// A checkpoint's signature doesn't fit the chain: the chain was rewritten, or the checkpoint made up.
    BadSignature,
    /// A checkpoint was signed by a key that is not among those given, and that none of them vouches for.
    UnknownKey,
    /// A checkpoint was signed by, or hands over to, a key that had handed over to another before.
    RetiredKey,
    /// An anchored record has another hash: the chain was rewritten.
    AnchorMismatch,
    /// An anchored record is not there: the end of the chain was cut off.
    AnchorMissing,
}

impl FindingKind {
    /// The stable name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::HashMismatch => "hash_mismatch",
            Self::BrokenLink => "broken_link",
            Self::MissingRecords => "missing_records",
            Self::MissingStart => "missing_start",
            Self::Duplicate => "duplicate",
            Self::OutOfOrder => "out_of_order",
            Self::SegmentName => "segment_name",
            Self::BadSignature => "bad_signature",
            Self::UnknownKey => "unknown_key",
            Self::RetiredKey => "retired_key",
            Self::AnchorMismatch => "anchor_mismatch",
            Self::AnchorMissing => "anchor_missing",
        }
    }
}

impl fmt::Display for FindingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// `instance/segment`, or the instance alone.
    pub file: String,
    /// The line, from 1; 0 where it is not about a line.
    pub line: u64,
    /// The record's sequence, as far as known.
    pub sequence: Option<u64>,
    /// What kind of thing it is.
    pub kind: FindingKind,
    /// What is wrong, in one line.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: {}", self.file, self.line, self.kind, self.message)
    }
}

/// What one instance's chain is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct InstanceReport {
    /// The instance.
    pub instance: String,
    /// How many segments there are.
    pub segments: u64,
    /// How many records there are, the log's own among them.
    pub records: u64,
    /// The first record's sequence.
    pub first: Option<u64>,
    /// The last record's sequence.
    pub last: Option<u64>,
    /// The last record's hash. Kept elsewhere with the sequence, it is an [`Anchor`].
    pub last_hash: Option<ChainHash>,
    /// How many checkpoints are signed by a key given, or by one that took over from it.
    pub checkpoints: u64,
    /// The sequence of the last of them: everything up to it is as it was signed.
    pub anchored: Option<u64>,
    /// How many records follow it. They may have been rewritten by whoever can write the file.
    pub unanchored: u64,
    /// How many bytes at the log's end are torn: an unfinished line, or a stretch of lines with a hole in it. A write under
    /// way, or a crash. NUL bytes behind them are not counted.
    pub torn_bytes: u64,
    /// How often a start cut off a torn end.
    pub repairs: u64,
    /// How many [`Lost`](super::Kind::Lost) records there are: what is left may be whole, but is not all there was.
    pub losses: u64,
    /// Whether the log was closed in good order and not opened since.
    pub clean_shutdown: bool,
}

/// What [`verify`](super::verify()) found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Every instance, by name.
    pub instances: Vec<InstanceReport>,
    /// What is wrong, at most 1,000 of it.
    pub findings: Vec<Finding>,
    /// How many findings more there were.
    pub more_findings: u64,
}

impl Report {
    /// Whether nothing is wrong. What is unanchored or torn is not wrong; it is not vouched for.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }

    /// How many records of all instances follow their last checkpoint.
    #[must_use]
    pub fn unanchored(&self) -> u64 {
        self.instances.iter().map(|instance| instance.unanchored).sum()
    }

    pub(super) fn add(&mut self, finding: Finding) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        } else {
            self.more_findings += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors_are_written_and_read() {
        let text = format!("broker-1:12:{}", ChainHash::genesis("x"));
        let anchor: Anchor = text.parse().unwrap();
        assert_eq!((anchor.instance.as_str(), anchor.seq), ("broker-1", 12));
        assert_eq!(anchor.to_string(), text);
        for bad in
            ["", "a", "a:1", "a:1:00", "a:x:00", "../a:1:00", &text[1..text.len() - 1], &format!("{text}:1")]
        {
            assert!(bad.parse::<Anchor>().is_err(), "{bad}");
        }
    }

    #[test]
    fn kinds_are_serialised_by_their_stable_names() {
        for kind in [FindingKind::Malformed, FindingKind::BrokenLink, FindingKind::AnchorMissing] {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
        }
    }

    #[test]
    fn a_report_lists_a_thousand_findings_and_counts_the_others() {
        let mut report = Report::default();
        let finding = Finding {
            file: "a".to_owned(),
            line: 1,
            sequence: None,
            kind: FindingKind::Malformed,
            message: String::new(),
        };
        (0..MAX_FINDINGS + 5).for_each(|_| report.add(finding.clone()));
        assert_eq!((report.findings.len(), report.more_findings), (MAX_FINDINGS, 5));
        assert!(!report.is_clean());
    }
}
