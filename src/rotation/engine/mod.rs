//! Carries a run on: takes the lease, asks the machine what is next, does it, tells the machine what became of it.
//!
//! ```text
//! run ─▶ turn at the target, place of few ─▶ ledger: lease, fence ─▶ broker: grants, space in the log
//!                                                    │
//!      ┌─────────────── one event ◀──────────────────┤
//!      ▼                                             │
//!   machine ─── one effect ─▶ lease still ours? ─▶ work: broker, rotator, ledger, each within a bound
//!      │
//!      └─ Rest, Ended ─▶ record: backoff, trouble, history, next time ─▶ lease given back
//! ```
//!
//! INVARIANT: no effect begins unless the lease is live by this process's own clock, with time left for the effect. What
//! a pause defeats of that, the fence at the target and the compare-and-swaps of record and labels make good.

mod order;
mod pace;
mod work;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{Semaphore, watch};

pub use self::order::{Order, Over, Settings, Told, When};
use self::pace::{Pace, backoff, share};
use self::work::Work;
use super::definition::Definition;
use super::ledger::{Begin, Lease, Ledger, Saved, Taken};
use super::machine::{Activation, Block, Effect, Ending, Event, Phase, Rest, Traits};
use super::record::{Rotation, Run};
use super::schedule::later;
use super::{Failure, Trouble, schedule};
use crate::broker::{self, Broker, Call};
use crate::clock::SharedClock;
use crate::environment::Environment;
use crate::identity::Principal;
use crate::secret::{SecretId, VersionId};

/// When to come by again where somebody else is at the target.
const BUSY: Duration = Duration::from_secs(2);

/// The group that policies know the engine by.
pub const PRINCIPAL: &str = "rotation-engine";

/// Carries runs on.
pub struct Engine {
    broker: Arc<Broker>,
    ledger: Arc<Ledger>,
    clock: SharedClock,
    settings: Settings,
    places: Semaphore,
    targets: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// The turns of changes in AWS.
    aws: Pace,
    stopping: watch::Receiver<bool>,
}

impl Engine {
    /// An engine. It begins nothing new, and stops at the next phase boundary, once `stopping` says true.
    #[must_use]
    pub fn new(
        broker: Arc<Broker>,
        ledger: Arc<Ledger>,
        clock: SharedClock,
        settings: Settings,
        stopping: watch::Receiver<bool>,
    ) -> Self {
        Self {
            broker,
            ledger,
            clock,
            settings,
            places: Semaphore::new(settings.concurrency),
            targets: Mutex::default(),
            aws: Pace::default(),
            stopping,
        }
    }

    /// Where records and leases are.
    #[must_use]
    pub const fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// How it works.
    #[must_use]
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The time.
    #[must_use]
    pub const fn clock(&self) -> &SharedClock {
        &self.clock
    }

    /// At least so long lies between two rotations of a secret: the environment's longest time to live, plus the grace
    /// that the definition gives to whoever holds values beyond it.
    #[must_use]
    pub fn gap(&self, id: &SecretId, definition: &Definition) -> Duration {
        let declared = self.broker.registry().get(&id.environment);
        declared.map(|declared| longest_ttl(declared)).unwrap_or_default() + definition.grace
    }

    /// One activation: begins a run or takes one up, and carries it on until it is over, fails, or the broker ends.
    /// `tell` hears of each phase as it begins, and of how it came out.
    pub async fn run(&self, id: &SecretId, order: &Order, tell: &(dyn Fn(Told) + Send + Sync)) -> Over {
        // On the heap, here and below: what a run holds between its steps is more than a small stack has room for.
        let over = Box::pin(self.activate(id, order, tell)).await.unwrap_or_else(Over::Refused);
        tell(Told::Over(over.clone()));
        over
    }

    /// Whether the broker ends.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// The turn at the target comes before the place, so that those who wait for one target hold up no other; and both
    /// before the lease, which runs.
    async fn activate(
        &self,
        id: &SecretId,
        order: &Order,
        tell: &(dyn Fn(Told) + Send + Sync),
    ) -> Result<Over, Failure> {
        let Some(rotation) = self.ledger.get(id).await? else { return Ok(Over::NotSet) };
        let definition = rotation.run.as_ref().map_or(&rotation.definition, |run| &run.definition);
        let turn = definition.rotator()?.target().map(|target| self.turn(target));
        let _turn = match &turn {
            Some(turn) if order.when == When::IfDueAndFree => match turn.try_lock() {
                Ok(turn) => Some(turn),
                Err(_) => return Ok(Over::Skipped { until: later(self.clock.now(), BUSY) }),
            },
            Some(turn) => Some(turn.lock().await),
            None => None,
        };
        let _place = self.places.acquire().await.map_err(|_| stopping())?;
        if self.is_stopping() {
            return Err(stopping());
        }
        let together = self.together(id, order, &rotation).await?;
        let taken = self.ledger.take(id, |rotation| self.begin(id, order, together, rotation)).await?;
        let (lease, rotation) = match taken {
            Taken::Mine(lease, rotation) => (lease, rotation),
            Taken::No(over) => return Ok(over),
            Taken::Missing => return Ok(Over::NotSet),
            Taken::Busy(rotation) => return Ok(in_progress(rotation.as_ref())),
        };
        let over = Box::pin(self.carry_on(&lease, rotation, order, tell)).await;
        self.ledger.release(lease).await;
        over
    }

    /// Until when a new run has to wait for another member of the secret's group. Where it need not, this one has the
    /// group from now on, so that of two members that are due at once only one begins.
    async fn together(
        &self,
        id: &SecretId,
        order: &Order,
        rotation: &Rotation,
    ) -> Result<Option<Timestamp>, Failure> {
        let Some(group) = &rotation.definition.group else { return Ok(None) };
        let begins = rotation.run.is_none()
            && self.not_now(id, order.when, None, rotation, self.clock.now()).is_none();
        match begins {
            true => self.ledger.claim_group(id, group, self.gap(id, &rotation.definition)).await,
            false => Ok(None),
        }
    }

    /// What to make of a record as it is: a run that is taken up or begun, or why not.
    fn begin(
        &self,
        id: &SecretId,
        order: &Order,
        together: Option<Timestamp>,
        mut rotation: Rotation,
    ) -> Begin<Over> {
        let now = self.clock.now();
        let until = later(now, self.settings.lease);
        if self.is_outlived(id, order.when, &rotation, now) {
            rotation.ended(Ending::Rotated, now);
        }
        if let Some(run) = &mut rotation.run {
            let waits = run.not_before > now && !run.abort;
            let again_at = run.failed_at.map(|at| later(at, self.settings.retry_from));
            return match (order.when, &run.failure, again_at) {
                (When::IfDue | When::IfDueAndFree, ..) if waits => {
                    Begin::No(Over::Skipped { until: run.not_before })
                }
                // However often somebody asks, a target is not asked more often than this.
                (When::Now, Some(failure), Some(retry_at)) if waits && retry_at > now => {
                    let token = run.progress.as_ref().map(|progress| progress.token.clone());
                    Begin::No(Over::Unfinished { token, failure: failure.clone(), retry_at })
                }
                (When::Now, ..) if waits && run.phase() == Phase::Retire => {
                    Begin::No(Over::TooSoon { until: run.not_before })
                }
                _ => {
                    run.not_before = until;
                    Begin::Run(rotation)
                }
            };
        }
        if let Some(over) = self.not_now(id, order.when, together, &rotation, now) {
            return Begin::No(over);
        }
        let mut run = Run::new(rotation.definition.clone(), order.asked_by.clone(), now);
        run.not_before = until;
        run.fingerprint.clone_from(&rotation.fingerprint);
        rotation.run = Some(run);
        Begin::Run(rotation)
    }

    /// Whether a run that only waits to withdraw what was current before stands in the way of the next one, which will
    /// replace that very value.
    fn is_outlived(&self, id: &SecretId, when: When, rotation: &Rotation, now: Timestamp) -> bool {
        let promoted_at = match &rotation.run {
            Some(run) if run.phase() == Phase::Retire => run.promoted_at.unwrap_or(run.started_at),
            _ => return false,
        };
        let gap = self.gap(id, &rotation.definition);
        let planned = schedule::next_at(&rotation.definition.schedule, promoted_at, gap);
        !rotation.paused && later(promoted_at, gap) <= now && (when == When::Now || planned <= now)
    }

    /// Why no new run may begin, if none may.
    fn not_now(
        &self,
        id: &SecretId,
        when: When,
        together: Option<Timestamp>,
        rotation: &Rotation,
        now: Timestamp,
    ) -> Option<Over> {
        let gap = self.gap(id, &rotation.definition);
        // A rotation in the future was made before the clock was set back: how long ago is not known, but the schedule
        // sees to it that it is not counted twice.
        let apart = rotation.rotated_at.filter(|at| *at <= now).map(|at| later(at, gap));
        let free_at = apart.into_iter().chain(together).max();
        match when {
            _ if rotation.paused => Some(Over::Paused),
            When::IfDue | When::IfDueAndFree if rotation.next_at > now => {
                Some(Over::Skipped { until: rotation.next_at })
            }
            When::IfDue | When::IfDueAndFree => {
                free_at.filter(|at| *at > now).map(|until| Over::Skipped { until })
            }
            When::Now => free_at.filter(|at| *at > now).map(|until| Over::TooSoon { until }),
        }
    }

    /// An activation under a lease. A record is left in good order whatever happens, or the lease ends by itself and
    /// whoever comes next finds the run as it was saved last.
    async fn carry_on(
        &self,
        lease: &Lease,
        rotation: Rotation,
        order: &Order,
        tell: &(dyn Fn(Told) + Send + Sync),
    ) -> Result<Over, Failure> {
        let Some(run) = rotation.run.clone() else { return Err(defect("a lease without a run")) };
        let held = self.hold(lease, &run, order).await;
        let (rotator, held) = match held {
            Ok(held) => held,
            Err(failure) => return self.rest(lease, failure).await,
        };
        let traits = Traits {
            has_target: rotator.has_target(),
            repairs: run.definition.repair,
            retires: run.definition.retire_after.is_some() && rotator.can_retire(),
        };
        let mut work = Work::new(self, lease, rotator, held, rotation);
        let effect = Box::pin(self.drive(lease, &mut work, traits, run, tell)).await;
        self.conclude(lease, work.into_failure(), effect).await
    }

    /// Lets the machine run until it has nothing more to ask; gives its last word.
    async fn drive(
        &self,
        lease: &Lease,
        work: &mut Work<'_>,
        traits: Traits,
        run: Run,
        tell: &(dyn Fn(Told) + Send + Sync),
    ) -> Effect<VersionId> {
        let mut run = run;
        loop {
            let offered = VersionId::generate();
            let (mut machine, mut effect) =
                Activation::begin(traits, run.progress.clone(), offered, run.abort);
            while !matches!(effect, Effect::Rest(_) | Effect::Ended(_)) {
                let event = self.perform(lease, work, &effect).await;
                if let (Effect::Save(progress), Event::Saved { .. }) = (&effect, &event) {
                    tell(Told::Phase { token: Some(progress.token.clone()), phase: progress.phase });
                    if self.is_stopping() {
                        work.fail(stopping());
                        return Effect::Rest(Rest::Failed);
                    }
                }
                (machine, effect) = machine.next(event);
            }
            // Another value may do: at once, under the same lease, with a token of its own.
            match effect {
                Effect::Ended(Ending::Discarded) => match work.discarded().await {
                    Ok(true) => run.progress = None,
                    Ok(false) => return Effect::Rest(Rest::Blocked(Block::ValueRefused)),
                    Err(failure) => {
                        work.fail(failure);
                        return Effect::Rest(Rest::Failed);
                    }
                },
                last => return last,
            }
        }
    }

    /// One effect, if the lease is still ours, within its bound.
    async fn perform(
        &self,
        lease: &Lease,
        work: &mut Work<'_>,
        effect: &Effect<VersionId>,
    ) -> Event<VersionId> {
        match work.keep_lease().await {
            Ok(true) => {}
            Ok(false) => return Event::Lost,
            Err(failure) => {
                work.fail(failure);
                return Event::Failed;
            }
        }
        let bound = match effect {
            Effect::Test => self.settings.step + work.patience(),
            _ => self.settings.step,
        };
        let step = tokio::time::timeout(bound, Box::pin(work.perform(effect)));
        let event = tokio::select! {
            event = step => event,
            never = self.keep_alive(lease) => match never {},
        };
        let late = |_| {
            let message = format!("{} took longer than {bound:?}", name_of(effect));
            Err(Failure::new(Trouble::Unanswered, message))
        };
        event.unwrap_or_else(late).unwrap_or_else(|failure| {
            work.fail(failure);
            Event::Failed
        })
    }

    /// Renews the lease while a step takes its time. One that is lost all the same ends no step: what a second owner
    /// does meanwhile, the fence sees to.
    async fn keep_alive(&self, lease: &Lease) -> Infallible {
        let mut ticks = tokio::time::interval(self.settings.lease / 3);
        // The first comes at once, and the lease was looked at a moment ago.
        ticks.tick().await;
        loop {
            ticks.tick().await;
            if let Err(error) = self.ledger.renew(lease).await {
                tracing::debug!(%error, "a lease can't be renewed for now");
            }
        }
    }

    /// Writes down how an activation came out.
    async fn conclude(
        &self,
        lease: &Lease,
        failure: Option<Failure>,
        effect: Effect<VersionId>,
    ) -> Result<Over, Failure> {
        let unknown = || defect("a step failed without a reason");
        match effect {
            Effect::Ended(ending) => self.end(lease, ending).await,
            Effect::Rest(Rest::UntilRetirement) => self.await_retirement(lease).await,
            Effect::Rest(Rest::Lost) => {
                Ok(in_progress(self.ledger.get(lease.id()).await.ok().flatten().as_ref()))
            }
            Effect::Rest(Rest::Blocked(block)) => self.rest(lease, blocked(block, failure)).await,
            _ => self.rest(lease, failure.unwrap_or_else(unknown)).await,
        }
    }

    async fn end(&self, lease: &Lease, ending: Ending) -> Result<Over, Failure> {
        let now = self.clock.now();
        let mut token = None;
        let saved = self
            .ledger
            .save(lease, |rotation| {
                token = claimed(rotation);
                rotation.ended(ending, now);
                let gap = self.gap(lease.id(), &rotation.definition);
                // A retirement does not put the next rotation off.
                let from = if ending == Ending::Rotated { rotation.rotated_at.unwrap_or(now) } else { now };
                rotation.next_at = schedule::next_at(&rotation.definition.schedule, from, gap);
            })
            .await?;
        match saved {
            Saved::Done(_) => Ok(Over::Ended { ending, token }),
            Saved::Lost => Ok(in_progress(self.ledger.get(lease.id()).await?.as_ref())),
        }
    }

    /// AWSCURRENT has moved, which is what was asked for; what is left is for later.
    async fn await_retirement(&self, lease: &Lease) -> Result<Over, Failure> {
        let mut token = None;
        let saved = self
            .ledger
            .save(lease, |rotation| {
                token = claimed(rotation);
                if let Some(run) = &mut rotation.run {
                    let after = run.definition.retire_after.unwrap_or_default();
                    run.not_before = later(run.promoted_at.unwrap_or(run.not_before), after);
                    (run.attempt, run.failure, run.failed_at) = (0, None, None);
                }
            })
            .await?;
        match saved {
            Saved::Done(_) => Ok(Over::Ended { ending: Ending::Rotated, token }),
            Saved::Lost => Ok(in_progress(self.ledger.get(lease.id()).await?.as_ref())),
        }
    }

    /// Leaves the run for later, with the reason.
    async fn rest(&self, lease: &Lease, failure: Failure) -> Result<Over, Failure> {
        let now = self.clock.now();
        let (mut token, mut retry_at) = (None, now);
        let saved = self
            .ledger
            .save(lease, |rotation| {
                token = claimed(rotation);
                if let Some(run) = &mut rotation.run {
                    if failure.trouble != Trouble::Stopping {
                        run.attempt = run.attempt.saturating_add(1);
                    }
                    run.not_before =
                        later(now, backoff(&self.settings, failure.trouble, run.attempt, share()));
                    run.failed_at = Some(now);
                    retry_at = run.not_before;
                    run.failure = Some(failure.clone());
                }
            })
            .await?;
        match saved {
            Saved::Done(_) => Ok(Over::Unfinished { token, failure, retry_at }),
            Saved::Lost => Ok(in_progress(self.ledger.get(lease.id()).await?.as_ref())),
        }
    }

    async fn hold(
        &self,
        lease: &Lease,
        run: &Run,
        order: &Order,
    ) -> Result<(Arc<dyn super::rotators::Rotator>, broker::Held), Failure> {
        let rotator = run.definition.rotator()?;
        let request = order.request_id.as_deref().map(|id| format!(" in request {id}")).unwrap_or_default();
        let reason = format!("asked by {}{request}; fence {}", run.asked_by, lease.fence());
        let call = Call::internal(Principal::internal(PRINCIPAL, [PRINCIPAL]), &reason);
        let (id, admin) = (lease.id().clone(), rotator.admin().cloned());
        Ok((rotator, self.broker.hold(broker::Run { call, id, admin }).await?))
    }

    /// The turn at a target: one change at a time is made there.
    fn turn(&self, target: String) -> Arc<tokio::sync::Mutex<()>> {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        targets.retain(|_, turn| Arc::strong_count(turn) > 1);
        Arc::clone(targets.entry(target).or_default())
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// How long a value that is not current any more may be answered from a cache that has not heard of it, by another
/// broker or a client: the time to live, which caches stretch by a tenth at most.
fn longest_ttl(environment: &Environment) -> Duration {
    environment.ttl + environment.ttl / 10
}

fn claimed(rotation: &Rotation) -> Option<VersionId> {
    rotation.run.as_ref()?.progress.as_ref().map(|progress| progress.token.clone())
}

fn in_progress(rotation: Option<&Rotation>) -> Over {
    let phase = rotation.and_then(|rotation| rotation.run.as_ref()).map_or(Phase::Create, Run::phase);
    Over::InProgress { token: rotation.and_then(claimed), phase }
}

fn blocked(block: Block, failure: Option<Failure>) -> Failure {
    let trouble = match block {
        Block::CurrentRejected => Trouble::CurrentRejected,
        Block::LockedOut => Trouble::LockedOut,
        Block::Unverifiable => Trouble::Unverifiable,
        Block::ValueRefused => Trouble::ValueRefused,
    };
    let message = failure.map_or_else(|| trouble.code().to_owned(), |failure| failure.message);
    Failure::new(trouble, message)
}

const fn name_of(effect: &Effect<VersionId>) -> &'static str {
    match effect {
        Effect::Look => "reading the labels",
        Effect::Save(_) => "saving the run",
        Effect::Create(_) => "writing the pending value",
        Effect::Read(_) => "reading the pending value back",
        Effect::Probe(_) => "a login at the target",
        Effect::Set => "setting the value at the target",
        Effect::Test => "testing the value at the target",
        Effect::Promote(_) => "moving AWSCURRENT",
        Effect::Bar => "raising the fence at the target",
        Effect::Withdraw(_) | Effect::Keep(_) => "taking AWSPENDING away",
        Effect::Retire(_) => "withdrawing what was current before",
        Effect::Unretire(_) => "giving back what was rolled back to",
        Effect::Rest(_) | Effect::Ended(_) => "the end",
    }
}

fn stopping() -> Failure {
    Failure::new(Trouble::Stopping, "the broker is ending; the run goes on after its next start")
}

fn defect(problem: &str) -> Failure {
    Failure::new(Trouble::Defect, problem)
}
