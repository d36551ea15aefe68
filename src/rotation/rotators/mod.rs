//! What knows how to change one kind of credential.
//!
//! Adding one is a file with an `ENTRY`, and its line in [`ENTRIES`]. A rotation's definition names it by its kind, and
//! the table of the same name holds its settings.

pub mod jwt_secret;
mod object;
pub mod password;
pub mod postgresql;
pub mod random;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;

use super::machine::Probe;
use super::{Failure, Trouble};
use crate::secret::{SecretId, SecretName, SecretValue};

/// Every kind of rotator.
pub const ENTRIES: &[&Entry] = &[&random::ENTRY, &jwt_secret::ENTRY, &postgresql::ENTRY];

/// A kind of rotator.
pub struct Entry {
    /// What definitions call it, and its table.
    pub kind: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// Checks a table's settings and makes one. The error names the key and the mend.
    pub build: Build,
}

/// From a table's settings to a rotator, or what is wrong with which key.
pub type Build = fn(&serde_json::Map<String, serde_json::Value>) -> Result<Arc<dyn Rotator>, String>;

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind)
    }
}

/// What a step works with.
#[derive(Debug, Clone, Copy)]
pub struct Work<'a> {
    /// The secret.
    pub id: &'a SecretId,
    /// AWSCURRENT's value; in [`Rotator::retire`] the value that was current before.
    pub current: &'a SecretValue,
    /// The pending value; in [`Rotator::retire`] the value that is current now.
    pub pending: &'a SecretValue,
    /// The admin secret's value, where the rotator [names one](Rotator::admin).
    pub admin: Option<&'a SecretValue>,
    /// This owner's fence. A target that has seen a higher one must refuse.
    pub fence: u64,
    /// Which target it was before, where that is known.
    pub fingerprint: Option<&'a str>,
}

/// What a target said to a login, and why, in a line without any value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probed {
    /// What it said.
    pub probe: Probe,
    /// Why, for records and people.
    pub why: String,
}

/// What became of a change of the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SetOutcome {
    /// The target holds the pending value, durably by its own account.
    Done,
    /// It definitely refused this value; why, in a line.
    Refused(String),
}

/// What became of a test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TestOutcome {
    /// Every endpoint accepts the pending value, and it may do what AWSCURRENT may.
    Passed,
    /// The target definitely rejects what it took before; why, in a line.
    Rejected(String),
}

/// Changes one kind of credential. The steps are called by the engine in the machine's order, each perhaps more than
/// once: after a crash, a step is repeated by whoever takes the run over.
///
/// A [`Failure`] means: not done, or no telling. None of them may hold a value.
#[async_trait]
pub trait Rotator: Send + Sync + fmt::Debug {
    /// Whether something outside of the store has to be told. Without a target, only [`create`](Self::create) and
    /// [`check`](Self::check) are ever called.
    fn has_target(&self) -> bool {
        false
    }

    /// What names the target, so that one change at a time is made there.
    fn target(&self) -> Option<String> {
        None
    }

    /// The secret, of the same environment, that holds the admin's credential.
    fn admin(&self) -> Option<&SecretName> {
        None
    }

    /// How much longer than any other step a [test](Self::test) may take: endpoints may be behind.
    fn patience(&self) -> Duration {
        Duration::ZERO
    }

    /// Whether [`retire`](Self::retire) does anything.
    fn can_retire(&self) -> bool {
        false
    }

    /// The next value, made from the current one. `refused`: how many values the target refused before this one in a row.
    ///
    /// # Errors
    /// [`Trouble::ValueUnfit`] where the current value is not of the shape that this rotator needs.
    fn create(&self, current: &SecretValue, now: Timestamp, refused: u32) -> Result<SecretValue, Failure>;

    /// Whether a pending value can follow the current one: made by this rotator, or by someone who knew how.
    ///
    /// # Errors
    /// [`Trouble::ValueUnfit`].
    fn check(&self, current: &SecretValue, pending: &SecretValue) -> Result<(), Failure>;

    /// Which target answers, by an account of its own that survives restarts and failovers.
    ///
    /// # Errors
    /// [`Failure`].
    async fn identify(&self, work: &Work<'_>) -> Result<Option<String>, Failure> {
        let _ = work;
        Ok(None)
    }

    /// One login with `value`, on a fresh connection, encrypted as the definition says and never less.
    async fn probe(&self, work: &Work<'_>, value: &SecretValue) -> Probed {
        let _ = (work, value);
        Probed { probe: Probe::Unknown, why: "this rotator has no target".to_owned() }
    }

    /// Makes the target take the pending value, comparing the fence atomically with the change. Repeated with the same
    /// value, it changes nothing.
    ///
    /// # Errors
    /// [`Failure`]; [`Trouble::Fenced`], [`Trouble::WrongTarget`].
    async fn set(&self, work: &Work<'_>) -> Result<SetOutcome, Failure> {
        let _ = work;
        Err(no_target())
    }

    /// Makes the target refuse every lower fence, and changes nothing else.
    ///
    /// # Errors
    /// [`Failure`].
    async fn bar(&self, work: &Work<'_>) -> Result<(), Failure> {
        let _ = work;
        Err(no_target())
    }

    /// Logs in anew with the pending value at every endpoint, and compares what it may do with what AWSCURRENT may.
    ///
    /// # Errors
    /// [`Failure`]; [`Trouble::StandbyBehind`], [`Trouble::Unverifiable`], [`Trouble::GrantDrift`].
    async fn test(&self, work: &Work<'_>) -> Result<TestOutcome, Failure> {
        let _ = work;
        Err(no_target())
    }

    /// Withdraws from the target what was current before.
    ///
    /// # Errors
    /// [`Failure`].
    async fn retire(&self, work: &Work<'_>) -> Result<(), Failure> {
        let _ = work;
        Err(no_target())
    }
}

fn no_target() -> Failure {
    Failure::new(Trouble::Defect, "a rotator without a target was asked to reach one")
}
