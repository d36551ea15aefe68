//! Rotation: a secret's next value, brought from AWSPENDING to AWSCURRENT without a moment in which nobody can log in.
//!
//! ```text
//! scheduler ─▶ due? ─▶ ledger: lease and fence ─▶ engine ─▶ machine: (state, event) ─▶ (state, effect) ──┐
//!  cron, person ──┘       (kv, by compare-and-swap)  ▲                                                  │
//!                                                    └── one event ◀── broker (labels, values, records) ◀┤
//!                                                                  ◀── rotator (target)              ◀───┘
//! ```
//!
//! | file | holds |
//! |---|---|
//! | [`machine`] | what happens next: pure, model-checked |
//! | [`definition`] | what `rotation set` takes: rotator, schedule, grace |
//! | [`schedule`] | when the next one is due |
//! | [`record`] | what is remembered of a rotation, and how it is written |
//! | [`ledger`] | records, leases and the order in which they are due, in the key-value layer |
//! | [`rotators`] | what knows how to change one kind of credential, one file each |
//! | [`engine`] | carries the machine's effects out, through the broker |
//! | [`scheduler`] | the broker's own clockwork |
//! | [`service`] | what the doors call: set, rotate, status, pause, abort |
//!
//! Labels are the truth of a rotation. The record holds only what labels can't: whose turn it is, how far a run may
//! have come, when to try again, and the definition that the run began with.

pub mod definition;
pub mod engine;
pub mod ledger;
pub mod machine;
pub mod record;
pub mod rotators;
pub mod schedule;
pub mod scheduler;
pub mod service;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::broker::BrokerError;
use crate::error::{Reason, Reasoned};

macro_rules! troubles {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, person: $person:literal, mend: $mend:literal;)+) => {
        /// What is in a rotation's way: a closed set of stable classes. Each says whether it may pass by itself, and what
        /// a person should do about it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Trouble { $($(#[$doc])* #[serde(rename = $code)] $variant),+ }

        impl Trouble {
            /// Every class.
            pub const ALL: &'static [Trouble] = &[$(Trouble::$variant),+];

            /// The stable code, in records, answers and figures.
            #[must_use]
            pub const fn code(self) -> &'static str {
                match self { $(Trouble::$variant => $code),+ }
            }

            /// Whether it stays until a person does something: the rotation is *blocked*. It is still looked at again,
            /// rarely, so that what was mended needs no further word.
            #[must_use]
            pub const fn needs_a_person(self) -> bool {
                match self { $(Trouble::$variant => $person),+ }
            }

            /// What a person should do.
            #[must_use]
            pub const fn mend(self) -> &'static str {
                match self { $(Trouble::$variant => $mend),+ }
            }
        }
    };
}

troubles! {
    /// The target can't be reached, is starting, is full, or its certificate is not trusted.
    TargetUnavailable = "target_unavailable", person: false,
        mend: "nothing, unless it lasts: see that the target runs, can be reached and shows a valid certificate";
    /// The store can't be reached or throttles.
    StoreUnavailable = "store_unavailable", person: false,
        mend: "nothing, unless it lasts: see that the environment's store can be reached";
    /// The store refuses for a reason that does not pass by itself: a bound, a key, a record that fails authentication.
    StoreRefused = "store_refused", person: true, mend: "do what the store's message says";
    /// The audit log can't be written.
    AuditUnavailable = "audit_unavailable", person: false,
        mend: "free space on the audit log's disk";
    /// A standby does not accept the new value yet.
    StandbyBehind = "standby_behind", person: false,
        mend: "nothing, unless it lasts: see that replication to the standby runs";
    /// Programs still use what is to be withdrawn.
    StillInUse = "still_in_use", person: false,
        mend: "nothing, unless it lasts: have the programs that still use the earlier credential connect anew";
    /// The answer to a step did not come in time; it may have been done.
    Unanswered = "unanswered", person: false,
        mend: "nothing: the target is asked what it holds before anything is changed";
    /// The broker is ending; the run goes on after the next start.
    Stopping = "stopping", person: false, mend: "nothing: the run goes on after the next start";
    /// Policy does not let the engine do it.
    Denied = "denied", person: true,
        mend: "let the rotation engine read, describe and rotate this secret, and read the admin secret, by policy";
    /// There is no such secret, or no current version of it.
    SecretMissing = "secret_missing", person: true,
        mend: "write a first value with `claviger put`, or remove the rotation";
    /// The secret is deleted and can still be restored.
    SecretDeleted = "secret_deleted", person: true,
        mend: "restore the secret, or remove the rotation; the pending value is kept until the secret is gone";
    /// The current or the pending value is not what this rotator can work with.
    ValueUnfit = "value_unfit", person: true,
        mend: "write a value of the shape that the message names, or mend the rotation's definition";
    /// The target refuses the admin's credential.
    AdminRejected = "admin_rejected", person: true, mend: "write the admin's right credential to its secret";
    /// The admin may not do what is needed.
    PrivilegeMissing = "privilege_missing", person: true, mend: "grant the admin what the message names";
    /// None of the hosts takes writes.
    TargetReadOnly = "target_read_only", person: true, mend: "name the primary among the definition's hosts";
    /// What answers is not the target that was rotated before.
    WrongTarget = "wrong_target", person: true,
        mend: "find out what answers at this address; where the target was rebuilt on purpose, set the rotation anew";
    /// The target has seen a higher fence: a later run, or a broker whose database is newer than this one's.
    Fenced = "fenced", person: true,
        mend: "find out whether another broker rotates this target, or this broker's database was brought back from the past";
    /// The target lets in without checking the password.
    Unverifiable = "unverifiable", person: true,
        mend: "make the target demand SCRAM-SHA-256 of this user from this address (pg_hba.conf)";
    /// The target rejects AWSCURRENT but accepts AWSPREVIOUS.
    CurrentRejected = "current_rejected", person: true,
        mend: "find out who changed it; roll back to AWSPREVIOUS, or set `repair = true` to let the rotation go forward";
    /// The target rejects every value that the store knows.
    LockedOut = "locked_out", person: true,
        mend: "find out who changed it; set `repair = true` to let the rotation set a new one through the admin";
    /// The new user may do less, or more, than the current one.
    GrantDrift = "grant_drift", person: true, mend: "give both users the same rights; the message names the first differences";
    /// The target refused every value that was tried.
    ValueRefused = "value_refused", person: true,
        mend: "make length and alphabet fit what the target permits";
    /// The record is of a newer version of this program, or was changed by something else.
    RecordUnreadable = "record_unreadable", person: true,
        mend: "run the newer version; where there is none, restore the database";
    /// A defect of this program.
    Defect = "defect", person: true, mend: "report it, with the log lines around it";
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// Why a step of a rotation was not done. One line, without any value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The stable class.
    pub trouble: Trouble,
    /// What happened, where.
    pub message: String,
}

impl Failure {
    /// Longer ones are cut, at a character's edge.
    const LONGEST: usize = 400;

    /// A failure. `message` becomes one line of at most 400 bytes.
    #[must_use]
    pub fn new(trouble: Trouble, message: impl AsRef<str>) -> Self {
        // A target chooses some of these words: nothing of them may steer a terminal or turn a line around.
        let steers = |c: &char| {
            c.is_control()
                || matches!(*c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        };
        let words = message.as_ref().split_whitespace().collect::<Vec<_>>().join(" ");
        let mut line: String = words.chars().filter(|c| !steers(c)).collect();
        let end = line.floor_char_boundary(Self::LONGEST);
        line.truncate(end);
        Self { trouble, message: line }
    }
}

impl Reasoned for Failure {
    fn reason(&self) -> Reason {
        match self.trouble {
            Trouble::StoreUnavailable => Reason::StoreUnavailable,
            Trouble::AuditUnavailable => Reason::AuditUnavailable,
            Trouble::Denied => Reason::Denied,
            Trouble::SecretMissing => Reason::SecretNotFound,
            Trouble::SecretDeleted => Reason::SecretDeleted,
            Trouble::RecordUnreadable => Reason::Tampered,
            Trouble::Defect => Reason::Internal,
            trouble if trouble.needs_a_person() => Reason::RotationBlocked,
            _ => Reason::RotationUnfinished,
        }
    }
}

/// What a door answers: the failure, and the mend.
impl From<Failure> for BrokerError {
    fn from(failure: Failure) -> Self {
        Self::rejected(failure.reason(), format!("{}; {}", failure.message, failure.trouble.mend()))
    }
}

/// What a layer below said, as a class of trouble.
impl From<BrokerError> for Failure {
    fn from(error: BrokerError) -> Self {
        let trouble = match error.reason() {
            Reason::StoreUnavailable | Reason::StoreThrottled | Reason::Locked | Reason::Unavailable => {
                Trouble::StoreUnavailable
            }
            Reason::AuditUnavailable | Reason::AuditBroken => Trouble::AuditUnavailable,
            Reason::Denied | Reason::ApprovalRequired | Reason::StoreDenied => Trouble::Denied,
            Reason::SecretNotFound | Reason::EnvironmentNotFound => Trouble::SecretMissing,
            Reason::SecretDeleted => Trouble::SecretDeleted,
            Reason::Internal => Trouble::Defect,
            _ => Trouble::StoreRefused,
        };
        Self::new(trouble, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_every_trouble_has_a_mend() {
        let codes: std::collections::BTreeSet<_> =
            Trouble::ALL.iter().map(|trouble| trouble.code()).collect();
        assert_eq!(codes.len(), Trouble::ALL.len());
        for trouble in Trouble::ALL {
            assert!(!trouble.mend().is_empty() && !trouble.mend().contains('\n'), "{trouble}");
            let json = serde_json::to_string(trouble).unwrap();
            assert_eq!(json, format!("\"{}\"", trouble.code()));
        }
    }

    #[test]
    fn a_failure_is_one_short_line() {
        let failure = Failure::new(Trouble::Defect, format!("a\n b\t{}", "ü".repeat(400)));
        assert!(failure.message.starts_with("a b ü") && failure.message.len() <= Failure::LONGEST);
    }
}
