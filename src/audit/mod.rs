//! What happened: one record per item, chained by SHA-256, checkpointed by Ed25519, durable before the answer leaves.
//!
//! ```text
//! DIR/audit/<instance>/<first sequence, 20 digits>.jsonl     0600, one chain per instance across its segments
//!
//! {"hash":"<64 hex>","seq":7,"prev":"<64 hex>","time":"…","instance":"…","kind":"access",…fields…}\n
//!          └ SHA-256(0x01 ‖ every byte of the line behind `{"hash":"<64 hex>",` up to the newline)
//!                             `prev` is the hash of record 6, so the hash covers the whole past; the first record's
//!                             is SHA-256(0x00 ‖ `claviger audit chain v1` ‖ newline ‖ instance)
//!
//! {"hash":"…","seq":100,"prev":"…","time":"…","instance":"…","kind":"checkpoint","head":"…","generation":41,
//!                                                                "key":"<16 hex>","signature":"<base64>"}     one line
//!
//! {…"kind":"checkpoint",…,"key":"<16 hex>","signature":"<base64>",
//!     "handover":{"key":"<64 hex>","next_key":"<64 hex>","next_signature":"<base64>"}}     one line: another key signs
//!
//! DIR/audit/<instance>/next.prepared                         zeros that will be the next segment; not there at rest
//! DIR/audit/<instance>/<first sequence>.torn-<offset>        what a start cut off that segment, behind this byte
//! ```
//!
//! Under load, segments are prepared ahead: lines overwrite zeros that are on the disk already. So the segment that is
//! written to, and those that a crash left, may end in NUL bytes, which are no content: [`verify`](verify()),
//! [`query`](query()) and the next start take them for the end. A segment at rest is its lines and nothing else.
//!
//! What a crash tore at the end of the last segment holds no record that anyone was told is durable. A start cuts it off
//! and [says so](Kind::Repaired); where it is more than one unfinished line, it keeps it in a file of its own before, which
//! no retention removes.
//!
//! A chain alone can be rewritten by whoever can write the file; a checkpoint can't without the signing key. What
//! follows the last checkpoint is unanchored, and verification says so. A cut tail shows only against an [`Anchor`]:
//! a sequence and its hash, kept elsewhere. A log and its stores each keep such a mark of the other: a checkpoint holds
//! the stores' `generation`, and the place of the [last checkpoint](Log::last_checkpoint) comes back to the next start
//! as [what is expected](Settings::expected) of the chain. Neither can go back in time alone without being noticed.
//!
//! A log that can't be written refuses, and whoever asked does nothing. What can't stop half way, because something else is
//! changed between its records, takes a [`Reservation`] of the disk's space before it begins: its records are then written
//! though the disk is full for everyone else.
//!
//! The signing key is [exchanged](Log::rotate_key) by a checkpoint that the former key and the next one both sign, so that
//! [`verify`](verify()) follows the succession from any key of it.

mod chain;
mod checkpoint;
mod encode;
mod expected;
mod figures;
mod handover;
mod log;
mod query;
mod queue;
mod report;
mod reserve;
mod resume;
mod segment;
mod verify;
mod writer;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Reason, Reasoned};

#[cfg(test)]
use chain::Fields;

pub use chain::ChainHash;
pub use checkpoint::{SigningKey, VerifyingKey};
pub use encode::{Batch, Texts, View};
pub use figures::Figures;
pub use handover::hands_over;
pub use log::{Log, Settings};
pub use query::{Query, query};
pub use report::{Anchor, Finding, FindingKind, InstanceReport, Report};
pub use reserve::Reservation;
pub use verify::verify;

/// What a record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Someone asked for something and got it, or not.
    Access,
    /// A change was authorised and is about to be made.
    Intent,
    /// The log was opened.
    Start,
    /// The log was closed in good order.
    Shutdown,
    /// A signed statement about everything before it.
    Checkpoint,
    /// A torn end, left by a crash, was cut off: an unfinished line, or all from the first line on of which a page did not
    /// reach the disk.
    Repaired,
    /// The log is no longer what was written: its file was deleted or replaced while it ran. Or a start was told to
    /// go on with a log, or with stores, that are less than they are known to have been.
    Lost,
    /// Old segments were removed as the retention says.
    Retention,
    /// The policy set was loaded, reloaded, or refused.
    Policy,
}

impl Kind {
    /// The kind as lines have it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Access => "access",
            Self::Intent => "intent",
            Self::Start => "start",
            Self::Shutdown => "shutdown",
            Self::Checkpoint => "checkpoint",
            Self::Repaired => "repaired",
            Self::Lost => "lost",
            Self::Retention => "retention",
            Self::Policy => "policy",
        }
    }
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Done; a value left, where one was asked for.
    Ok,
    /// The caller already had it; no value left.
    Unchanged,
    /// Policy said no.
    Denied,
    /// The caller is not known.
    Unauthenticated,
    /// There is no such thing.
    NotFound,
    /// It failed for another reason.
    Failed,
}

impl Outcome {
    /// The outcome as lines have it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Unchanged => "unchanged",
            Self::Denied => "denied",
            Self::Unauthenticated => "unauthenticated",
            Self::NotFound => "not_found",
            Self::Failed => "failed",
        }
    }
}

/// What happened, without sequence, time and chain, which the log adds. No field ever holds a value.
///
/// The order of the fields is the order on the line. Empty ones are left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Record {
    /// What the record is about.
    pub kind: Option<Kind>,
    /// `User::"ana"`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub principal: String,
    /// How the principal proved itself, and what of that may be written down: `token:AbC123`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub proof: String,
    /// Where the call came from.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub source_address: String,
    /// The policy action.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub action: String,
    /// The operation, where one action has several (`put`, `move_label`, `restore`).
    #[serde(skip_serializing_if = "String::is_empty")]
    pub operation: String,
    /// The environment.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub environment: String,
    /// The secret.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub secret: String,
    /// The field, where one was asked for.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
    /// The version whose value really left, or that was really written.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub version_id: String,
    /// The labels of that version.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// `store` or `cache`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// Whether the value was past its time to live.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stale: bool,
    /// `allow`, `deny` or `approval_required`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub decision: String,
    /// The ids of the policies that decided.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<String>,
    /// How it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// The stable reason, where it did not end well.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub error: String,
    /// The request's id, which the caller is told too.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub request_id: String,
    /// Why the caller wanted it, in the caller's words; at most 512 bytes.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// What else is worth knowing, in the broker's words.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

impl Record {
    /// The record as it is written.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        View {
            kind: self.kind,
            principal: &self.principal,
            proof: &self.proof,
            source_address: &self.source_address,
            action: &self.action,
            operation: &self.operation,
            environment: &self.environment,
            secret: &self.secret,
            field: &self.field,
            version_id: &self.version_id,
            labels: Texts::Owned(&self.labels),
            source: &self.source,
            stale: self.stale,
            decision: &self.decision,
            policies: Texts::Owned(&self.policies),
            outcome: self.outcome,
            error: &self.error,
            request_id: &self.request_id,
            reason: &self.reason,
            detail: &self.detail,
        }
    }
}

/// Why there is no record, or the log can't be read.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    /// The record could not be made durable: nothing may be served.
    #[error(
        "audit log {path} can't be written: {cause}; free space or mend the disk, the broker recovers by itself"
    )]
    Unavailable {
        /// The file.
        path: String,
        /// What the system said.
        cause: String,
    },
    /// The log on the disk is not one that can be continued.
    #[error(
        "audit log {path}: {problem}; run `claviger audit verify`, keep the folder as evidence and move it away"
    )]
    Broken {
        /// The file and, as far as known, the line.
        path: String,
        /// What is wrong.
        problem: String,
    },
    /// The log on the disk lacks a record that is known to have been written.
    #[error(
        "audit log {path} was cut or replaced: {problem}; restore the log, or start once with `--accept-loss`, which records the loss"
    )]
    Cut {
        /// The instance's folder.
        path: String,
        /// Which record is expected, and what was found.
        problem: String,
    },
    /// Another process, or another log of this one, writes this chain.
    #[error(
        "audit log {path} is in use by another broker; stop it, or give this one an instance name of its own"
    )]
    Locked {
        /// The instance's folder.
        path: String,
    },
    /// The folder or the instance's name can't be used for a log.
    #[error("audit log {path}: {problem}")]
    Unusable {
        /// The folder.
        path: String,
        /// What is wrong and the mend.
        problem: String,
    },
    /// The log can't be read.
    #[error("audit log {path} can't be read: {cause}")]
    Unreadable {
        /// The folder or file.
        path: String,
        /// What the system said.
        cause: String,
    },
    /// A record is not one that a caller may append.
    #[error("audit record refused: {0}")]
    Record(String),
    /// The log is closed.
    #[error("the audit log is closed: the broker is shutting down")]
    Closed,
    /// A signing key file is not usable.
    #[error("audit signing key {path}: {problem}")]
    Key {
        /// The file.
        path: String,
        /// What is wrong and the mend.
        problem: String,
    },
    /// A query makes no sense.
    #[error("{0}")]
    Query(String),
}

impl Reasoned for AuditError {
    fn reason(&self) -> Reason {
        match self {
            Self::Unavailable { .. } | Self::Unreadable { .. } => Reason::AuditUnavailable,
            Self::Broken { .. } | Self::Cut { .. } => Reason::AuditBroken,
            Self::Locked { .. } => Reason::Locked,
            Self::Unusable { .. } => Reason::InvalidConfig,
            Self::Record(_) => Reason::Internal,
            Self::Closed => Reason::Unavailable,
            Self::Key { .. } => Reason::InvalidKey,
            Self::Query(_) => Reason::InvalidArgument,
        }
    }
}

/// How many bytes to [reserve](Log::reserve) for each record whose fields take no more than 3,000 bytes: its line, and the
/// checkpoint that may follow it.
pub const RECORD_ROOM: u64 = 4_096;
/// How many records stand between two checkpoints at most.
pub const CHECKPOINT_EVERY: u64 = 100;
/// How long an unsigned record waits for a checkpoint at most, while records come.
pub const CHECKPOINT_WITHIN: Duration = Duration::from_secs(10);
/// How long whoever waits for a disk that does not answer is kept waiting: then nothing is served, as if it were full.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How long a written record of a relaxed environment waits for the disk at most.
pub const SYNC_WITHIN: Duration = Duration::from_millis(100);
