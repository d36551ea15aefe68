//! The broker's own clockwork: looks what is due, and has the engine do it.
//!
//! ```text
//! tick, or told ─▶ clock believed? ─▶ ledger: what is due ─▶ each record ─▶ verdict ─┬─▶ engine, a few at once
//!                                                                                   ├─▶ spread: a little later
//!                                                                                   └─▶ aside: not to be asked again yet
//! hourly, and after the clock was set ─▶ survey: the index mended, next times mended, what is in trouble counted
//! ```
//!
//! INVARIANT: however the clock was set and however long the broker was away, a secret is rotated once for it, and not
//! all of them at once: what became due while nobody looked is spread before the first of it begins, and while the clock
//! can't be believed nothing new begins at all.

mod figures;
mod steps;
mod survey;
mod tasks;
mod works;

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::task::{self, JoinError, JoinSet};
use tokio::time::{MissedTickBehavior, interval};

use super::engine::{Engine, Order, Over, Told, When};
use super::record::Rotation;
use super::schedule::{self, Verdict};
use super::service::Rotations;
use super::{Failure, Trouble};
use crate::secret::SecretId;

pub use figures::FiguresNow;

pub(in crate::rotation) use works::{Works, is_retiring, said};

/// How often it looks without being told.
const EVERY: Duration = Duration::from_secs(1);
/// How many records one look goes through before the shutdown is asked about again.
const BATCH: usize = 64;
/// How many lines of the index one look reads at most.
const MOST: usize = 8_192;
/// Not looking for so long is having been away: suspended, stopped, or waiting for a disk.
const AWAY: Duration = Duration::from_secs(60);
/// How often every record is looked at.
const SURVEY_EVERY: Duration = Duration::from_secs(3_600);
/// How long what can't be begun is left alone. Its own time may come before; then the record says so.
const ASIDE: Duration = Duration::from_secs(60);
/// The same, where only a person will change it.
const LONG_ASIDE: Duration = Duration::from_secs(600);
/// The same, where somebody else works on it, or the store was away for a moment.
const SHORT_ASIDE: Duration = Duration::from_secs(5);

/// The broker's own clockwork.
pub struct Scheduler {
    works: Works,
    running: JoinSet<Over>,
    busy: HashMap<task::Id, SecretId>,
    survey: JoinSet<()>,
    /// What was looked at and could not be begun, and when, by the monotonic clock, it is looked at again.
    aside: HashMap<SecretId, Duration>,
    /// What was spread and has not begun yet, and the time that it was given.
    spread: HashMap<SecretId, Timestamp>,
    /// Since when it has been looking without a break.
    since: Timestamp,
    looked_at: Option<Duration>,
    measured_at: Option<Duration>,
    surveyed_at: Option<Duration>,
    /// Whether the last look left something over.
    more: bool,
}

impl Scheduler {
    /// The clockwork for these rotations. It does nothing until it is [kept](Self::keep).
    #[must_use]
    pub fn new(rotations: &Rotations) -> Self {
        let works = rotations.works().clone();
        let since = works.engine.clock().now();
        Self {
            works,
            running: JoinSet::new(),
            busy: HashMap::new(),
            survey: JoinSet::new(),
            aside: HashMap::new(),
            spread: HashMap::new(),
            since,
            looked_at: None,
            measured_at: None,
            surveyed_at: None,
            more: false,
        }
    }

    /// Works until `shutdown` says true; then begins nothing more, and ends when the runs that it began have come to a
    /// phase's end, which the engine sees to. Whoever calls it bounds that; [`Rotations::drained`] waits for them too.
    pub async fn keep(mut self, mut shutdown: watch::Receiver<bool>) {
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let more = self.more;
            tokio::select! {
                biased;
                () = said(&mut shutdown) => break,
                () = self.works.waker.woken() => self.aside.clear(),
                Some(over) = self.running.join_next_with_id() => self.came_back(over),
                _ = ticks.tick() => {}
                () = std::future::ready(()), if more => {}
            }
            self.look().await;
        }
        self.survey.abort_all();
        while let Some(over) = self.running.join_next_with_id().await {
            self.came_back(over);
        }
    }

    async fn look(&mut self) {
        let monotonic = self.works.engine.clock().monotonic();
        // The time first: one that was read behind this look at the clocks could be of a step that it did not see.
        let now = self.works.engine.clock().now();
        let held = self.works.steps.held();
        self.mind_the_time(monotonic, held.is_some());
        self.works.figures.note_look(monotonic);
        self.measure(monotonic).await;
        self.begin_survey(monotonic, held.is_some());
        self.aside.retain(|_, until| *until > monotonic);
        self.more = match self.take_up_what_is_due(now, monotonic, held).await {
            Ok(more) => more,
            Err(failure) => {
                tracing::warn!(%failure, "what is due can't be read; tried again in a moment");
                false
            }
        };
    }

    /// What became due while nobody looked, or by a step of the clock, is not to begin all at once.
    fn mind_the_time(&mut self, monotonic: Duration, held: bool) {
        let away = self.looked_at.is_none_or(|looked_at| monotonic.saturating_sub(looked_at) > AWAY);
        self.looked_at = Some(monotonic);
        if away || held {
            self.since = self.works.engine.clock().now();
        }
        if held {
            // Next times may be of the time before the step.
            self.surveyed_at = None;
        }
    }

    /// How far behind it is.
    async fn measure(&mut self, monotonic: Duration) {
        let measured = self.measured_at.is_some_and(|at| monotonic.saturating_sub(at) < EVERY);
        if measured {
            return;
        }
        self.measured_at = Some(monotonic);
        if let Ok(next) = self.works.engine.ledger().next_attention().await {
            let now = self.works.engine.clock().now();
            let overdue = next.map(|next| now.duration_since(next)).unwrap_or_default();
            self.works.figures.note_overdue(Duration::try_from(overdue).unwrap_or_default());
        }
    }

    fn begin_survey(&mut self, monotonic: Duration, held: bool) {
        while self.survey.try_join_next().is_some() {}
        let fresh = self.surveyed_at.is_some_and(|at| monotonic.saturating_sub(at) < SURVEY_EVERY);
        if fresh || held || !self.survey.is_empty() {
            return;
        }
        self.surveyed_at = Some(monotonic);
        self.survey.spawn(survey::survey(self.works.clone()));
    }

    /// Whether there is more than one look takes.
    async fn take_up_what_is_due(
        &mut self,
        now: Timestamp,
        monotonic: Duration,
        held: Option<Duration>,
    ) -> Result<bool, Failure> {
        if self.free() == 0 {
            return Ok(false);
        }
        let limit = (BATCH + self.busy.len() + self.aside.len()).min(MOST);
        let mut due = self.works.engine.ledger().due(now, None, limit).await?;
        due.retain(|id| !self.aside.contains_key(id) && !self.busy.values().any(|busy| busy == id));
        let full = due.len() >= BATCH;
        for id in due.into_iter().take(BATCH) {
            if self.free() == 0 {
                // The next one to come back makes room, and another look.
                return Ok(false);
            }
            self.take_up(id, now, monotonic, held).await?;
        }
        Ok(full)
    }

    fn free(&self) -> usize {
        self.works.engine.settings().concurrency.saturating_sub(self.running.len())
    }

    /// The index only hints; the record decides.
    async fn take_up(
        &mut self,
        id: SecretId,
        now: Timestamp,
        monotonic: Duration,
        held: Option<Duration>,
    ) -> Result<(), Failure> {
        let rotation = match self.works.engine.ledger().get(&id).await {
            Ok(Some(rotation)) => rotation,
            Ok(None) => {
                self.aside.insert(id, monotonic + ASIDE);
                return Ok(());
            }
            Err(failure) if failure.trouble == Trouble::RecordUnreadable => {
                tracing::error!(secret = %id, %failure, "a rotation can't be looked at");
                self.aside.insert(id, monotonic + LONG_ASIDE);
                return Ok(());
            }
            Err(failure) => return Err(failure),
        };
        match self.what_to_do(&id, &rotation, now, held) {
            What::Begin => self.begin(id),
            What::Rebase(next_at) => put_off(&self.works.engine, &id, rotation.next_at, next_at).await?,
            What::Spread(next_at) => {
                put_off(&self.works.engine, &id, rotation.next_at, next_at).await?;
                self.spread.insert(id, next_at);
            }
            What::NotYet(wait) => {
                self.aside.insert(id, monotonic + wait);
            }
        }
        Ok(())
    }

    fn what_to_do(&self, id: &SecretId, rotation: &Rotation, now: Timestamp, held: Option<Duration>) -> What {
        match (rotation.attention_at(), held) {
            (None, _) => return What::NotYet(ASIDE),
            (Some(at), _) if at > now => return What::NotYet(between(now, at)),
            // What is in progress goes on, whatever the clock says; but nothing is withdrawn by a clock that was set.
            _ if rotation.run.is_some() && !(held.is_some() && is_retiring(rotation)) => return What::Begin,
            (_, Some(held)) => return What::NotYet(held),
            _ => {}
        }
        match verdict(&self.works.engine, id, rotation, now) {
            // Due since before anybody looked. Later ones are only waiting for their turn.
            Verdict::Spread(at) if rotation.next_at < self.since && !self.was_spread(id, rotation) => {
                What::Spread(at)
            }
            Verdict::Due | Verdict::Spread(_) => What::Begin,
            Verdict::NotYet(at) => What::NotYet(between(now, at)),
            Verdict::Rebase(at) => What::Rebase(at),
        }
    }

    /// Once is enough: a machine that sleeps more than it wakes would never come to it.
    fn was_spread(&self, id: &SecretId, rotation: &Rotation) -> bool {
        self.spread.get(id) == Some(&rotation.next_at)
    }

    fn begin(&mut self, id: SecretId) {
        self.spread.remove(&id);
        let (works, secret) = (self.works.clone(), id.clone());
        let handle = self.running.spawn(async move {
            let Some(_running) = works.tasks.enter().await else { return Over::Refused(ending()) };
            let order = Order { asked_by: "schedule".to_owned(), request_id: None, when: When::IfDueAndFree };
            works.activate(&secret, &order, &|_: Told| {}).await
        });
        self.busy.insert(handle.id(), id);
    }

    /// A run that rests is looked at again when it says so; one that could not begin, after a while.
    fn came_back(&mut self, came_back: Result<(task::Id, Over), JoinError>) {
        let (task, over) = match came_back {
            Ok((task, over)) => (task, Some(over)),
            Err(error) => {
                tracing::error!(%error, "a rotation was broken off by a defect; its run goes on later");
                (error.id(), None)
            }
        };
        let Some(id) = self.busy.remove(&task) else { return };
        let now = self.works.engine.clock().now();
        let wait = match over {
            Some(Over::Ended { .. }) => return,
            Some(Over::Unfinished { retry_at, .. }) => between(now, retry_at),
            Some(Over::Skipped { until } | Over::TooSoon { until }) => between(now, until),
            Some(Over::InProgress { .. }) => SHORT_ASIDE,
            Some(Over::Refused(failure)) if !failure.trouble.needs_a_person() => SHORT_ASIDE,
            Some(Over::Refused(_) | Over::NotSet) => LONG_ASIDE,
            Some(Over::Paused) | None => ASIDE,
        };
        self.aside.insert(id, self.works.engine.clock().monotonic() + wait);
    }
}

impl fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scheduler").field("busy", &self.busy).field("aside", &self.aside.len()).finish()
    }
}

fn ending() -> Failure {
    Failure::new(Trouble::Stopping, "the broker is ending")
}

/// What is made of a record that somebody should look at.
enum What {
    Begin,
    /// It has been due for a while, with others; its turn is then.
    Spread(Timestamp),
    /// Its next time was of another clock.
    Rebase(Timestamp),
    NotYet(Duration),
}

/// What the schedule says of a rotation without a run.
fn verdict(engine: &Engine, id: &SecretId, rotation: &Rotation, now: Timestamp) -> Verdict {
    schedule::verdict(id, rotation, engine.gap(id, &rotation.definition), now)
}

/// Moves a next time, if it is still the one that was looked at and no run has begun.
async fn put_off(engine: &Engine, id: &SecretId, from: Timestamp, to: Timestamp) -> Result<(), Failure> {
    let change = |rotation: Option<Rotation>| {
        let moved = rotation.map(|mut rotation| {
            if rotation.run.is_none() && rotation.next_at == from {
                rotation.next_at = to;
            }
            rotation
        });
        Ok((moved, ()))
    };
    engine.ledger().update(id, change).await
}

/// How long to leave alone what is not before `at`: the record may change before that.
fn between(now: Timestamp, at: Timestamp) -> Duration {
    Duration::try_from(at.duration_since(now)).unwrap_or_default().clamp(Duration::from_millis(1), ASIDE)
}
