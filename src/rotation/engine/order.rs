//! What is asked of the engine, and what it says.

use std::time::Duration;

use jiff::Timestamp;

use super::super::Failure;
use super::super::machine::{Ending, Phase};
use crate::secret::VersionId;

/// How the engine works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// The first failure is tried again within this.
    pub retry_from: Duration,
    /// And however many there were, within this. What needs a person is looked at again this rarely.
    pub retry_to: Duration,
    /// How many runs are worked on at once.
    pub concurrency: usize,
    /// How long a run belongs to one who gives no sign of life.
    pub lease: Duration,
    /// How long one step may take. What takes longer is not waited for, and counts as not known.
    pub step: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            retry_from: Duration::from_secs(5),
            retry_to: Duration::from_secs(3_600),
            concurrency: 8,
            lease: Duration::from_secs(60),
            step: Duration::from_secs(20),
        }
    }
}

/// When a run may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// If it is due; a run in progress is taken up if it is time.
    IfDue,
    /// The same, and if nobody else is at its target: for who comes by again anyway.
    IfDueAndFree,
    /// Now, however long the schedule has yet to go; a run in progress is taken up at once.
    Now,
}

/// What is asked of the engine, and by whom.
#[derive(Debug, Clone)]
pub struct Order {
    /// `schedule`, or the principal.
    pub asked_by: String,
    /// The request that it was asked with.
    pub request_id: Option<String>,
    /// When.
    pub when: When,
}

/// What is told of a run while it goes on.
#[derive(Debug, Clone)]
pub enum Told {
    /// A phase begins.
    Phase {
        /// The pending version.
        token: Option<VersionId>,
        /// The phase.
        phase: Phase,
    },
    /// It is over, for now or for good.
    Over(Over),
}

/// How an activation came out.
#[derive(Debug, Clone)]
pub enum Over {
    /// The run is over.
    Ended {
        /// How.
        ending: Ending,
        /// The pending version, where one was claimed.
        token: Option<VersionId>,
    },
    /// Someone else works on it.
    InProgress {
        /// The pending version, where one was claimed.
        token: Option<VersionId>,
        /// How far it may be.
        phase: Phase,
    },
    /// It is tried again later; where the trouble needs a person, it is blocked.
    Unfinished {
        /// The pending version, where one was claimed.
        token: Option<VersionId>,
        /// Why.
        failure: Failure,
        /// When.
        retry_at: Timestamp,
    },
    /// It is not due.
    Skipped {
        /// When it is.
        until: Timestamp,
    },
    /// The last rotation is too fresh: users may hold the value before it.
    TooSoon {
        /// When the next one may begin.
        until: Timestamp,
    },
    /// It is paused.
    Paused,
    /// It could not be begun.
    Refused(Failure),
    /// No rotation is set for this secret.
    NotSet,
}
