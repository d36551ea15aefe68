//! What is counted of rotations, whoever asked for them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::super::Trouble;
use super::super::engine::Over;
use super::super::machine::Ending;
use super::super::record::Health;
use crate::secret::SecretId;

/// Counters since the start, and how rotations are now.
#[derive(Debug)]
pub(in crate::rotation) struct Figures {
    rotated: AtomicU64,
    superseded: AtomicU64,
    aborted: AtomicU64,
    discarded: AtomicU64,
    failures: Vec<(Trouble, AtomicU64)>,
    standing: Mutex<Standing>,
    overdue_seconds: AtomicU64,
    /// When the scheduler last looked, by the monotonic clock, in milliseconds; 0: never.
    looked_at: AtomicU64,
}

/// How rotations are. What is neither paused nor has a run is idle.
#[derive(Debug, Default)]
struct Standing {
    /// Those with a run, and how that is. As large as there are such.
    runs: BTreeMap<SecretId, Health>,
    /// How many there are in all: counted by the survey, kept up by changes.
    set: u64,
    /// How many of them are paused and have no run.
    paused: u64,
}

/// The figures at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FiguresNow {
    /// Runs that are over, by how they ended.
    pub ended: Vec<(&'static str, u64)>,
    /// Activations that did not bring a run to its end, by what was in the way.
    pub failures: Vec<(&'static str, u64)>,
    /// Rotations that are set, by how they are. Zero until the scheduler has counted them once, but for those with a run
    /// that this broker has worked on.
    pub health: Vec<(&'static str, u64)>,
    /// How long the one has been due that has been due for longest, in seconds; 0 where none is.
    pub overdue: u64,
    /// How long ago the scheduler last looked, in seconds; `None` where it never has. After a minute it is stuck.
    pub scheduler_looked: Option<u64>,
    /// Whether nothing new begins because the clock was set.
    pub clock_stepped: bool,
}

impl Default for Figures {
    fn default() -> Self {
        let failures = Trouble::ALL.iter().map(|trouble| (*trouble, AtomicU64::new(0))).collect();
        Self {
            rotated: AtomicU64::default(),
            superseded: AtomicU64::default(),
            aborted: AtomicU64::default(),
            discarded: AtomicU64::default(),
            failures,
            standing: Mutex::default(),
            overdue_seconds: AtomicU64::default(),
            looked_at: AtomicU64::default(),
        }
    }
}

impl Figures {
    /// The figures as they are at `monotonic`.
    pub(in crate::rotation) fn now(&self, monotonic: Duration, clock_stepped: bool) -> FiguresNow {
        let ended = [
            ("rotated", &self.rotated),
            ("superseded", &self.superseded),
            ("aborted", &self.aborted),
            ("discarded", &self.discarded),
        ];
        FiguresNow {
            ended: ended.map(|(name, counter)| (name, read(counter))).to_vec(),
            failures: self.failures.iter().map(|(trouble, count)| (trouble.code(), read(count))).collect(),
            health: self.health(),
            overdue: read(&self.overdue_seconds),
            scheduler_looked: match read(&self.looked_at) {
                0 => None,
                at => Some(monotonic.saturating_sub(Duration::from_millis(at)).as_secs()),
            },
            clock_stepped,
        }
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn health(&self) -> Vec<(&'static str, u64)> {
        let standing = self.standing();
        let (mut running, mut degraded, mut blocked) = (0, 0, 0);
        for health in standing.runs.values() {
            match health {
                Health::Blocked => blocked += 1,
                Health::Degraded => degraded += 1,
                _ => running += 1,
            }
        }
        let paused = standing.paused;
        let idle = standing.set.saturating_sub(paused + running + degraded + blocked);
        [
            (Health::Idle, idle),
            (Health::Running, running),
            (Health::Degraded, degraded),
            (Health::Blocked, blocked),
            (Health::Paused, paused),
        ]
        .map(|(health, count)| (health.as_str(), count))
        .to_vec()
    }

    /// How an activation came out. `retiring`: the run had moved AWSCURRENT before, and was counted then.
    pub(super) fn count(&self, over: &Over, retiring: bool) {
        let counter = match over {
            Over::Ended { ending: Ending::Rotated, .. } if !retiring => Some(&self.rotated),
            Over::Ended { ending: Ending::Superseded, .. } => Some(&self.superseded),
            Over::Ended { ending: Ending::Aborted, .. } => Some(&self.aborted),
            Over::Ended { ending: Ending::Discarded, .. } => Some(&self.discarded),
            Over::Unfinished { failure, .. } | Over::Refused(failure) => {
                let mut counters = self.failures.iter();
                counters.find(|(trouble, _)| *trouble == failure.trouble).map(|(_, counter)| counter)
            }
            _ => None,
        };
        if let Some(counter) = counter {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How a rotation is; `None` where it is no more.
    pub(super) fn note(&self, id: &SecretId, health: Option<Health>) {
        self.standing().note(id, health);
    }

    /// How many there are in all, and how many are paused and have no run.
    pub(super) fn note_all(&self, set: u64, paused: u64) {
        let mut standing = self.standing();
        (standing.set, standing.paused) = (set, paused);
    }

    /// What a change of a record did to how it is counted.
    pub(in crate::rotation) fn note_change(
        &self,
        id: &SecretId,
        before: Option<Health>,
        after: Option<Health>,
    ) {
        let mut standing = self.standing();
        standing.set = stepped(standing.set, before.is_some(), after.is_some());
        let paused = |health| health == Some(Health::Paused);
        standing.paused = stepped(standing.paused, paused(before), paused(after));
        standing.note(id, after);
    }

    pub(super) fn note_overdue(&self, overdue: Duration) {
        self.overdue_seconds.store(overdue.as_secs(), Ordering::Relaxed);
    }

    pub(super) fn note_look(&self, at: Duration) {
        let millis = u64::try_from(at.as_millis()).unwrap_or(u64::MAX).max(1);
        self.looked_at.store(millis, Ordering::Relaxed);
    }
}

impl Standing {
    fn note(&mut self, id: &SecretId, health: Option<Health>) {
        match health {
            Some(health @ (Health::Running | Health::Degraded | Health::Blocked)) => {
                self.runs.insert(id.clone(), health);
            }
            Some(Health::Idle | Health::Paused) | None => {
                self.runs.remove(id);
            }
        }
    }
}

const fn stepped(count: u64, was: bool, is: bool) -> u64 {
    match (was, is) {
        (false, true) => count.saturating_add(1),
        (true, false) => count.saturating_sub(1),
        _ => count,
    }
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::super::super::Failure;
    use super::*;
    use jiff::Timestamp;

    fn ended(ending: Ending) -> Over {
        Over::Ended { ending, token: None }
    }

    fn id(name: &str) -> SecretId {
        SecretId::parse("development", name).unwrap()
    }

    fn not_zero(counts: Vec<(&'static str, u64)>) -> Vec<(&'static str, u64)> {
        counts.into_iter().filter(|(_, count)| *count > 0).collect()
    }

    #[test]
    fn a_run_counts_once_although_it_ends_twice() {
        let figures = Figures::default();
        figures.count(&ended(Ending::Rotated), false);
        figures.count(&ended(Ending::Rotated), true);
        figures.count(&ended(Ending::Aborted), false);
        figures.count(&Over::NotSet, false);
        let now = figures.now(Duration::ZERO, false);
        assert_eq!(not_zero(now.ended), [("rotated", 1), ("aborted", 1)]);
    }

    #[test]
    fn failures_count_by_their_class() {
        let figures = Figures::default();
        let failure = Failure::new(Trouble::TargetUnavailable, "gone");
        let retry_at = Timestamp::UNIX_EPOCH;
        for _ in 0..3 {
            let over = Over::Unfinished { token: None, failure: failure.clone(), retry_at };
            figures.count(&over, false);
        }
        assert_eq!(not_zero(figures.now(Duration::ZERO, false).failures), [("target_unavailable", 3)]);
    }

    #[test]
    fn every_rotation_is_counted_once_by_how_it_is() {
        let figures = Figures::default();
        figures.note_all(5, 1);
        figures.note(&id("a"), Some(Health::Blocked));
        figures.note(&id("b"), Some(Health::Degraded));
        let health = |figures: &Figures| not_zero(figures.now(Duration::ZERO, false).health);
        assert_eq!(health(&figures), [("idle", 2), ("degraded", 1), ("blocked", 1), ("paused", 1)]);
        figures.note(&id("a"), Some(Health::Running));
        figures.note(&id("b"), Some(Health::Idle));
        assert_eq!(health(&figures), [("idle", 3), ("running", 1), ("paused", 1)]);
    }

    #[test]
    fn changes_are_counted_without_another_survey() {
        let figures = Figures::default();
        let health = |figures: &Figures| not_zero(figures.now(Duration::ZERO, false).health);
        figures.note_change(&id("a"), None, Some(Health::Idle));
        figures.note_change(&id("b"), None, Some(Health::Idle));
        figures.note_change(&id("a"), Some(Health::Idle), Some(Health::Paused));
        assert_eq!(health(&figures), [("idle", 1), ("paused", 1)]);
        figures.note_change(&id("a"), Some(Health::Paused), None);
        figures.note_change(&id("b"), Some(Health::Idle), None);
        figures.note_change(&id("c"), Some(Health::Idle), None);
        assert!(health(&figures).is_empty());
    }

    #[test]
    fn a_scheduler_that_never_looked_is_known_from_one_that_did_at_zero() {
        let figures = Figures::default();
        let looked = |at| figures.now(Duration::from_secs(at), false).scheduler_looked;
        assert_eq!(looked(5), None);
        figures.note_look(Duration::ZERO);
        assert_eq!(looked(5), Some(4));
        figures.note_look(Duration::from_secs(5));
        assert_eq!(looked(7), Some(2));
    }
}
