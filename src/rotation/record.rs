//! What is remembered of a rotation.
//!
//! ```text
//! kv  rotation/record/<environment>/<secret>   →   offset  bytes
//!                                                       0     32  MAC of the environment, the secret and the JSON
//!                                                      32      …  JSON of a [`Rotation`]
//! ```
//!
//! No value is in it. It says where an admin's password may be sent, so that whoever can write the database must not be
//! able to make one up: hence the MAC.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::definition::Definition;
use super::machine::{Ending, Phase, Progress};
use super::{Failure, Trouble};
use crate::crypto::{MAC_BYTES, Mac, MacKey};
use crate::secret::{SecretId, VersionId};

/// How many ended runs are remembered.
pub const HISTORY: usize = 50;
/// From so many failures in a row on, a rotation is said to be degraded.
pub const DEGRADED_FROM: u32 = 5;
/// How many values the target may refuse before a person is asked.
pub const MOST_REFUSED: u32 = 3;
const LABEL: &[u8] = b"claviger rotation v1";

/// The rotation of one secret: its definition, when it is next due, the run in progress, and what was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotation {
    /// What a new run begins with.
    pub definition: Definition,
    /// Nothing new begins; a run in progress comes to its end.
    pub paused: bool,
    /// When the next run is due. Looked at only where there is no run.
    pub next_at: Timestamp,
    /// When the last run ended with a new AWSCURRENT.
    pub rotated_at: Option<Timestamp>,
    /// The highest fence given out. It only grows, also over a removal.
    pub fence: u64,
    /// Which target it is, by its own account, since the first rotation.
    pub fingerprint: Option<String>,
    /// How many values the target refused in a row.
    pub refused: u32,
    /// The run in progress.
    pub run: Option<Run>,
    /// Ended runs, newest last, at most [`HISTORY`].
    pub history: Vec<Ended>,
}

/// A run in progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// What outlives an activation. `None` between the first lease and the claim: nothing was done yet.
    pub progress: Option<Progress<VersionId>>,
    /// The definition that the run began with, and that it ends with.
    pub definition: Definition,
    /// When it began.
    pub started_at: Timestamp,
    /// Who or what asked for it: `schedule`, or a principal with its request.
    pub asked_by: String,
    /// Failures in a row.
    pub attempt: u32,
    /// Not to be taken up before.
    pub not_before: Timestamp,
    /// Why the last activation did not bring it to its end.
    pub failure: Option<Failure>,
    /// When that was.
    pub failed_at: Option<Timestamp>,
    /// Which target it is, by its own account: as it was known when the run began, or since its first change.
    pub fingerprint: Option<String>,
    /// When AWSCURRENT moved, once it has.
    pub promoted_at: Option<Timestamp>,
    /// A person asked for its end.
    pub abort: bool,
}

/// A run that is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ended {
    /// How.
    pub ending: Ending,
    /// The token, where one was claimed.
    pub token: Option<VersionId>,
    /// When it began.
    pub started_at: Timestamp,
    /// When it was over.
    pub ended_at: Timestamp,
    /// Who or what asked for it.
    pub asked_by: String,
    /// How many failures lay on the way.
    pub failures: u32,
}

/// How a rotation is, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Health {
    /// Waiting for its time.
    Idle,
    /// A run is in progress.
    Running,
    /// A run fails again and again, and is tried again.
    Degraded,
    /// A run needs a person.
    Blocked,
    /// Nothing begins until it is resumed.
    Paused,
}

impl Health {
    /// Its name, in answers and figures.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Running => "running",
            Self::Degraded => "degraded",
            Self::Blocked => "blocked",
            Self::Paused => "paused",
        }
    }
}

impl Rotation {
    /// A rotation that was just set.
    #[must_use]
    pub const fn new(definition: Definition, next_at: Timestamp) -> Self {
        Self {
            definition,
            paused: false,
            next_at,
            rotated_at: None,
            fence: 0,
            fingerprint: None,
            refused: 0,
            run: None,
            history: Vec::new(),
        }
    }

    /// How it is.
    #[must_use]
    pub fn health(&self) -> Health {
        match &self.run {
            Some(run) if run.failure.as_ref().is_some_and(|failure| failure.trouble.needs_a_person()) => {
                Health::Blocked
            }
            Some(run) if run.attempt >= DEGRADED_FROM => Health::Degraded,
            Some(_) => Health::Running,
            None if self.paused => Health::Paused,
            None => Health::Idle,
        }
    }

    /// When somebody should look at it next; `None` where nobody should: it is paused and no run is in progress.
    #[must_use]
    pub fn attention_at(&self) -> Option<Timestamp> {
        match &self.run {
            Some(run) => Some(run.not_before),
            None => (!self.paused).then_some(self.next_at),
        }
    }

    /// Puts a run's end into the history.
    pub fn ended(&mut self, ending: Ending, at: Timestamp) {
        let Some(run) = self.run.take() else { return };
        self.refused = 0;
        if ending == Ending::Rotated && run.definition == self.definition {
            self.fingerprint.clone_from(&run.fingerprint);
        }
        if ending == Ending::Rotated {
            self.rotated_at = Some(run.promoted_at.unwrap_or(at));
        }
        self.history.push(Ended {
            ending,
            token: run.progress.map(|progress| progress.token),
            started_at: run.started_at,
            ended_at: at,
            asked_by: run.asked_by,
            failures: run.attempt,
        });
        let surplus = self.history.len().saturating_sub(HISTORY);
        self.history.drain(..surplus);
    }

    /// The record's bytes for its place.
    ///
    /// # Errors
    /// [`Trouble::Defect`].
    pub fn encode(&self, key: &MacKey, id: &SecretId) -> Result<Vec<u8>, Failure> {
        let defect = |error: serde_json::Error| Failure::new(Trouble::Defect, error.to_string());
        let json = serde_json::to_vec(self).map_err(defect)?;
        let mac = key.sign(&parts(id, &json));
        Ok([mac.as_slice(), &json].concat())
    }

    /// Reads a record back.
    ///
    /// # Errors
    /// [`Trouble::RecordUnreadable`] where it was changed, moved, or is of a newer version.
    pub fn decode(key: &MacKey, id: &SecretId, bytes: &[u8]) -> Result<Self, Failure> {
        let unreadable = |problem: &str| {
            let message = format!("the record of the rotation of {id} {problem}");
            Failure::new(Trouble::RecordUnreadable, message)
        };
        let (mac, json) = bytes.split_first_chunk::<MAC_BYTES>().ok_or_else(|| unreadable("is cut short"))?;
        let mac: &Mac = mac;
        if !key.verify(&parts(id, json), mac) {
            return Err(unreadable("was changed by something other than this broker"));
        }
        serde_json::from_slice(json)
            .map_err(|_| unreadable("is of a version that this program does not know"))
    }
}

fn parts<'a>(id: &'a SecretId, json: &'a [u8]) -> [&'a [u8]; 4] {
    [LABEL, id.environment.as_str().as_bytes(), id.name.as_str().as_bytes(), json]
}

impl Run {
    /// A run that nothing was done for yet.
    #[must_use]
    pub const fn new(definition: Definition, asked_by: String, now: Timestamp) -> Self {
        Self {
            progress: None,
            definition,
            started_at: now,
            asked_by,
            attempt: 0,
            not_before: now,
            failure: None,
            failed_at: None,
            fingerprint: None,
            promoted_at: None,
            abort: false,
        }
    }

    /// How far it is; a run without a claim is about to create.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.progress.as_ref().map_or(Phase::Create, |progress| progress.phase)
    }

    /// How long it has been going on.
    #[must_use]
    pub fn age(&self, now: Timestamp) -> Duration {
        Duration::try_from(now.duration_since(self.started_at)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn definition(length: usize) -> Definition {
        let text = format!("rotator = \"random\"\nschedule = \"every 30d\"\n\n[random]\nlength = {length}\n");
        Definition::parse(&text).unwrap()
    }

    /// One with a run that began a second before the year did.
    fn running() -> Rotation {
        let run = Run::new(definition(32), "schedule".to_owned(), at("2025-12-31T23:59:59Z"));
        let idle = Rotation::new(definition(32), at("2026-01-31T00:00:00Z"));
        Rotation { run: Some(run), ..idle }
    }

    #[test]
    fn how_it_is_and_when_to_look_at_it_follow_from_the_run_first() {
        let next_at = at("2026-01-31T00:00:00Z");
        let idle = Rotation::new(definition(32), next_at);
        assert_eq!((idle.health(), idle.attention_at()), (Health::Idle, Some(next_at)));
        let paused = Rotation { paused: true, ..idle };
        assert_eq!((paused.health(), paused.attention_at()), (Health::Paused, None));

        // A pause lets a run come to its end.
        let mut rotation = Rotation { paused: true, ..running() };
        let not_before = at("2026-01-01T01:00:00Z");
        rotation.run.as_mut().unwrap().not_before = not_before;
        let mut health = |attempt: u32, trouble: Option<Trouble>| {
            let run = rotation.run.as_mut().unwrap();
            (run.attempt, run.failure) = (attempt, trouble.map(|trouble| Failure::new(trouble, "it failed")));
            assert_eq!(rotation.attention_at(), Some(not_before));
            rotation.health()
        };
        assert_eq!(health(0, None), Health::Running);
        assert_eq!(health(DEGRADED_FROM - 1, Some(Trouble::TargetUnavailable)), Health::Running);
        assert_eq!(health(DEGRADED_FROM, Some(Trouble::TargetUnavailable)), Health::Degraded);
        assert_eq!(health(1, Some(Trouble::LockedOut)), Health::Blocked);
        assert_eq!(health(DEGRADED_FROM, Some(Trouble::LockedOut)), Health::Blocked);
    }

    #[test]
    fn only_a_run_that_rotated_counts_as_a_rotation() {
        let (promoted_at, over_at) = (at("2026-01-01T00:00:00Z"), at("2026-01-02T00:00:00Z"));
        for (ending, promoted, expected) in [
            (Ending::Rotated, Some(promoted_at), Some(promoted_at)),
            (Ending::Rotated, None, Some(over_at)),
            (Ending::Superseded, None, None),
            (Ending::Aborted, None, None),
        ] {
            let mut rotation = Rotation { refused: 2, ..running() };
            let run = rotation.run.as_mut().unwrap();
            (run.promoted_at, run.attempt) = (promoted, 3);
            rotation.ended(ending, over_at);
            assert_eq!((&rotation.run, rotation.refused), (&None, 0));
            assert_eq!(rotation.rotated_at, expected, "{ending:?}");
            let [ended] = &rotation.history[..] else { panic!("{:?}", rotation.history) };
            assert_eq!((ended.ending, ended.ended_at, ended.failures), (ending, over_at, 3));
            rotation.ended(ending, over_at);
            assert_eq!(rotation.history.len(), 1, "there was no other run");
        }
    }

    #[test]
    fn r13_which_target_it_is_is_learnt_from_a_rotation_of_this_definition() {
        let ended = |ending: Ending, length: usize| {
            let mut rotation = Rotation { fingerprint: Some("before".to_owned()), ..running() };
            rotation.definition = definition(length);
            rotation.run.as_mut().unwrap().fingerprint = Some("found".to_owned());
            rotation.ended(ending, at("2026-01-02T00:00:00Z"));
            rotation.fingerprint.unwrap()
        };
        assert_eq!(ended(Ending::Rotated, 32), "found");
        assert_eq!(ended(Ending::Superseded, 32), "before");
        assert_eq!(ended(Ending::Rotated, 40), "before", "it was set anew meanwhile");
    }

    #[test]
    fn of_many_runs_the_last_are_remembered() {
        let mut rotation = running();
        for n in 0..u32::try_from(HISTORY).unwrap() + 3 {
            let run = Run::new(definition(32), "schedule".to_owned(), at("2026-01-01T00:00:00Z"));
            rotation.run = Some(Run { attempt: n, ..run });
            rotation.ended(Ending::Rotated, at("2026-01-02T00:00:00Z"));
        }
        assert_eq!(rotation.history.len(), HISTORY);
        let failures: Vec<u32> = rotation.history.iter().map(|ended| ended.failures).collect();
        assert_eq!((failures.first(), failures.is_sorted()), (Some(&3), true), "newest last");
    }
}
