//! What the doors call: set a rotation, look at it, pause it, abort a run, rotate.
//!
//! | question or change | needs |
//! |---|---|
//! | set, remove | `administer` on the environment |
//! | look | `describe` on the secret |
//! | list | `list` on the environment |
//! | pause, resume, abort, rotate | `rotate` on the secret |
//!
//! INVARIANT: each is authorised and on record as its caller's, before anything changes; what is then done to the secret
//! is the engine's, under the engine's own name, with the caller's in its reason. What is begun comes to a phase's end
//! although its caller is gone.

mod due;
mod rotate;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use super::definition::Definition;
use super::engine::{Engine, Order, Told, When};
use super::machine::{Ending, Phase};
use super::record::{Rotation, Run};
use super::scheduler::{FiguresNow, Works, is_retiring};
use super::{Failure, Trouble, schedule};
use crate::broker::{Broker, BrokerError, Call};
use crate::error::{Reason, Reasoned as _};
use crate::policy::{Action, Resource};
use crate::secret::{EnvironmentName, Label, SecretId, SecretName, Selector};
use crate::store::StoreError;

pub use due::Due;

/// A rotation, as it is shown to whoever may see it.
#[derive(Debug, Clone)]
pub struct Shown {
    /// The secret.
    pub id: SecretId,
    /// Its rotation, or why the record can't be read.
    pub rotation: Result<Rotation, Failure>,
    /// At least so long lies between two rotations. Zero where the record can't be read.
    pub min_gap: Duration,
}

/// A page of an environment's rotations, by name.
#[derive(Debug, Clone)]
pub struct ShownPage {
    /// The rotations.
    pub rotations: Vec<Shown>,
    /// Whether more follow.
    pub more: bool,
}

/// The rotations, as the doors have them.
#[derive(Clone)]
pub struct Rotations {
    works: Works,
}

impl Rotations {
    /// The rotations of a broker, carried out by `engine`.
    #[must_use]
    pub fn new(broker: Arc<Broker>, engine: Arc<Engine>) -> Self {
        Self { works: Works::new(broker, engine) }
    }

    /// What carries them out.
    #[must_use]
    pub const fn engine(&self) -> &Arc<Engine> {
        &self.works.engine
    }

    /// What is counted of them.
    #[must_use]
    pub fn figures(&self) -> FiguresNow {
        let clock_stepped = self.works.steps.held().is_some();
        self.works.figures.now(self.works.engine.clock().monotonic(), clock_stepped)
    }

    /// Lets nothing begin any more, and waits until all that is under way, the scheduler's too, has come to a phase's
    /// end. The engine must have been told to stop, or that may be long.
    pub async fn drained(&self) {
        self.works.tasks.drained().await;
    }

    pub(in crate::rotation) const fn works(&self) -> &Works {
        &self.works
    }

    /// Sets how and when a secret is rotated. A new rotation is first due when its schedule says, never at once. One
    /// that was set before keeps its history, and its next time unless schedule or grace changed; which target it is, is
    /// found out anew. A run in progress ends as it began, unless it is blocked: then it goes on with what was mended,
    /// where its target is the same or was not touched yet.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Administer`] on the environment, and [`Action::Read`] on the secret that holds the
    /// admin's credential, where the definition names one. [`Reason::InvalidConfig`] where the definition is
    /// not one. Where the caller may describe the secret: [`Reason::SecretNotFound`], [`Reason::SecretDeleted`],
    /// [`Reason::VersionNotFound`] where there is nothing to rotate. Others learn of that from the first run.
    pub async fn set(&self, call: &Call, id: SecretId, definition: &str) -> Result<Shown, BrokerError> {
        let asks = (Action::Administer, Resource::Environment(id.environment.clone()));
        let (this, caller, definition) = (self.clone(), call.clone(), definition.to_owned());
        let work = async move {
            let definition = parse(&definition)?;
            this.may_use(&caller, &id, &definition).await?;
            this.must_exist(&caller, &id).await?;
            let gap = this.works.engine.gap(&id, &definition);
            this.alter(&id, |before| Ok(Some(this.defined(before, &definition, gap)))).await?;
            this.works.waker.wake();
            this.shown(id).await
        };
        self.changing(call, "set_rotation", asks, work).await
    }

    /// Removes a rotation. The secret stays as it is; a run that rests after a failure goes with it, and what it has made
    /// stays under AWSPENDING, where a rotation that is set anew takes it up.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Administer`] on the environment. [`Reason::RotationNotFound`];
    /// [`Reason::Conflict`] while a run is worked on.
    pub async fn remove(&self, call: &Call, id: SecretId) -> Result<(), BrokerError> {
        let asks = (Action::Administer, Resource::Environment(id.environment.clone()));
        let this = self.clone();
        let work = async move {
            let remove = |before: Option<Rotation>| {
                let before = before.ok_or_else(|| not_set(&id))?;
                let busy = || conflict(&id, "is in progress; abort it or wait for its end, then remove it");
                // One that rests after a failure may never come to an end: its target is gone, or its secret.
                let rests = |run: &Run| run.failure.is_some() || run.progress.is_none();
                if before.run.as_ref().is_none_or(rests) { Ok(None) } else { Err(busy()) }
            };
            this.alter(&id, remove).await
        };
        self.changing(call, "remove_rotation", asks, work).await
    }

    /// One rotation.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Describe`] on the secret. [`Reason::RotationNotFound`].
    pub async fn get(&self, call: &Call, id: SecretId) -> Result<Shown, BrokerError> {
        let asks = (Action::Describe, Resource::Secret(id.clone()));
        self.works.broker.governed(call, "get_rotation", asks, false, self.shown(id)).await
    }

    /// A page of an environment's rotations: those after `after`, at most `limit`.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::List`] on the environment.
    pub async fn list(
        &self,
        call: &Call,
        environment: EnvironmentName,
        after: Option<SecretName>,
        limit: usize,
    ) -> Result<ShownPage, BrokerError> {
        let asks = (Action::List, Resource::Environment(environment.clone()));
        let work = async move {
            let page = self.works.engine.ledger().list(&environment, after.as_ref(), limit).await?;
            let rotations = page.rotations.into_iter().map(|(id, rotation)| self.show(id, rotation));
            Ok(ShownPage { rotations: rotations.collect(), more: page.more })
        };
        self.works.broker.governed(call, "list_rotations", asks, false, work).await
    }

    /// Lets nothing new begin. A run in progress comes to its end.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Rotate`] on the secret. [`Reason::RotationNotFound`].
    pub async fn pause(&self, call: &Call, id: SecretId) -> Result<Shown, BrokerError> {
        let asks = (Action::Rotate, Resource::Secret(id.clone()));
        let this = self.clone();
        let work = async move {
            let pause = |before: Option<Rotation>| {
                let rotation = before.ok_or_else(|| not_set(&id))?;
                Ok(Some(Rotation { paused: true, ..rotation }))
            };
            this.alter(&id, pause).await?;
            this.shown(id).await
        };
        self.changing(call, "pause_rotation", asks, work).await
    }

    /// Ends a pause, and has a run that failed or is blocked taken up at once.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Rotate`] on the secret. [`Reason::RotationNotFound`].
    pub async fn resume(&self, call: &Call, id: SecretId) -> Result<Shown, BrokerError> {
        let asks = (Action::Rotate, Resource::Secret(id.clone()));
        let this = self.clone();
        let work = async move {
            let now = this.now();
            let resume = |before: Option<Rotation>| {
                let mut rotation = before.ok_or_else(|| not_set(&id))?;
                rotation.paused = false;
                if let Some(run) = &mut rotation.run {
                    hasten(run, now);
                }
                Ok(Some(rotation))
            };
            this.alter(&id, resume).await?;
            this.works.waker.wake();
            this.shown(id).await
        };
        self.changing(call, "resume_rotation", asks, work).await
    }

    /// Ends the run in progress without a new AWSCURRENT: at once, or where somebody works on it, as soon as that one
    /// gets to it. Where the target can't be asked what it holds, the run goes on being aborted until it can.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Rotate`] on the secret. [`Reason::RotationNotFound`]; [`Reason::Conflict`] where
    /// no run is in progress. Where AWSCURRENT has moved already, what was current before is not withdrawn any more.
    pub async fn abort(&self, call: &Call, id: SecretId) -> Result<Shown, BrokerError> {
        let asks = (Action::Rotate, Resource::Secret(id.clone()));
        // Not `Now`: where the run has ended by another's hand, none is begun in its place.
        let (this, order) = (self.clone(), order(call, When::IfDue));
        let work = async move {
            let now = this.now();
            let abort = |before| match before {
                Some(rotation) if is_retiring(&rotation) => Ok(Some(this.unretired(&id, rotation))),
                before => aborting(&id, before, now).map(Some),
            };
            this.alter(&id, abort).await?;
            this.works.activate(&id, &order, &|_: Told| {}).await;
            this.shown(id).await
        };
        self.changing(call, "abort_rotation", asks, work).await
    }

    /// What changes something is on record before and after, and comes to its end without its caller.
    async fn changing<T: Send + 'static>(
        &self,
        call: &Call,
        operation: &'static str,
        asks: (Action, Resource),
        work: impl Future<Output = Result<T, BrokerError>> + Send + 'static,
    ) -> Result<T, BrokerError> {
        let (broker, call) = (Arc::clone(&self.works.broker), call.clone());
        let governed = async move { broker.governed(&call, operation, asks, true, work).await };
        self.works.tasks.run(governed).await
    }

    /// Changes a record, or leaves it as it is and says why.
    async fn alter(
        &self,
        id: &SecretId,
        change: impl Fn(Option<Rotation>) -> Result<Option<Rotation>, BrokerError> + Send,
    ) -> Result<(), BrokerError> {
        let health = |rotation: &Option<Rotation>| rotation.as_ref().map(Rotation::health);
        let attempt = move |before: Option<Rotation>| {
            let was = health(&before);
            Ok(match change(before.clone()) {
                Ok(after) => {
                    let is = health(&after);
                    (after, Ok((was, is)))
                }
                Err(refusal) => (before, Err(refusal)),
            })
        };
        let (was, is) = self.works.engine.ledger().update(id, attempt).await??;
        self.works.figures.note_change(id, was, is);
        Ok(())
    }

    /// A definition says where the admin's credential is sent, so whoever sets it must be one who may have it: the engine
    /// may read every secret, and must not lend that to others.
    async fn may_use(&self, call: &Call, id: &SecretId, definition: &Definition) -> Result<(), BrokerError> {
        let rotator = definition.rotator()?;
        let Some(admin) = rotator.admin() else { return Ok(()) };
        if *admin == id.name {
            let message = format!(
                "admin: secret `{}` is the one that is rotated; name the secret with the admin's credential",
                id.name
            );
            return Err(BrokerError::rejected(Reason::InvalidConfig, message));
        }
        let admin = SecretId::new(id.environment.clone(), admin.clone());
        let asks = (Action::Read, Resource::Secret(admin));
        self.works.broker.governed(call, "set_rotation", asks, false, async { Ok(()) }).await
    }

    /// A rotation as a definition makes it.
    fn defined(&self, before: Option<Rotation>, definition: &Definition, gap: Duration) -> Rotation {
        let now = self.now();
        let from = |at: Timestamp| schedule::next_at(&definition.schedule, at, gap);
        let Some(mut rotation) = before else { return Rotation::new(definition.clone(), from(now)) };
        let was = &rotation.definition;
        if (&was.schedule, was.grace) != (&definition.schedule, definition.grace) {
            // Counted from the last rotation; but what would have been due by then is not due at once.
            let counted = rotation.rotated_at.filter(|at| *at <= now).map(from).filter(|at| *at > now);
            rotation.next_at = counted.unwrap_or_else(|| from(now));
        }
        if let Some(run) = rotation.run.as_mut().filter(|run| may_go_on_with(run, definition)) {
            run.definition = definition.clone();
            run.fingerprint = None;
        }
        rotation.definition = definition.clone();
        // Whoever sets a rotation anew may have rebuilt its target, or made room for the values that it refused.
        rotation.fingerprint = None;
        rotation.refused = 0;
        if let Some(run) = &mut rotation.run {
            hasten(run, now);
        }
        rotation
    }

    /// That there is nothing to rotate is said at once to whoever may know. A store that does not answer now is no reason
    /// to refuse what is not about now.
    async fn must_exist(&self, call: &Call, id: &SecretId) -> Result<(), BrokerError> {
        let broker = &self.works.broker;
        if !broker.would_permit(call, Action::Describe, &Resource::Secret(id.clone())) {
            return Ok(());
        }
        match broker.describe(call, id.clone()).await {
            Ok(description) if description.deletion_at.is_some() => {
                Err(StoreError::SecretDeleted(id.clone()).into())
            }
            Ok(description) => {
                let mut versions = description.versions.iter();
                if versions.any(|version| version.labels.contains(&Label::Current)) {
                    return Ok(());
                }
                Err(StoreError::VersionNotFound { id: id.clone(), selector: Selector::CURRENT }.into())
            }
            Err(error) => match error.reason() {
                Reason::StoreUnavailable | Reason::StoreThrottled => Ok(()),
                _ => Err(error),
            },
        }
    }

    async fn shown(&self, id: SecretId) -> Result<Shown, BrokerError> {
        match self.works.engine.ledger().get(&id).await {
            Ok(Some(rotation)) => Ok(self.show(id, Ok(rotation))),
            Ok(None) => Err(not_set(&id)),
            Err(failure) if failure.trouble == Trouble::RecordUnreadable => Ok(self.show(id, Err(failure))),
            Err(failure) => Err(failure.into()),
        }
    }

    fn show(&self, id: SecretId, rotation: Result<Rotation, Failure>) -> Shown {
        let gap = |rotation: &Rotation| self.works.engine.gap(&id, &rotation.definition);
        let min_gap = rotation.as_ref().map(gap).unwrap_or_default();
        Shown { id, rotation, min_gap }
    }

    /// A run that only waits to withdraw what was current before, ended without that.
    fn unretired(&self, id: &SecretId, mut rotation: Rotation) -> Rotation {
        let now = self.now();
        rotation.ended(Ending::Rotated, now);
        let gap = self.works.engine.gap(id, &rotation.definition);
        let from = rotation.rotated_at.unwrap_or(now);
        rotation.next_at = schedule::next_at(&rotation.definition.schedule, from, gap);
        rotation
    }

    fn now(&self) -> Timestamp {
        self.works.engine.clock().now()
    }
}

impl fmt::Debug for Rotations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rotations").field("engine", &self.works.engine).finish_non_exhaustive()
    }
}

fn parse(definition: &str) -> Result<Definition, BrokerError> {
    Definition::parse(definition).map_err(|error| BrokerError::rejected(error.reason(), error.to_string()))
}

/// An order in the name of who calls.
fn order(call: &Call, when: When) -> Order {
    Order { asked_by: call.principal.to_string(), request_id: Some(call.request_id.to_string()), when }
}

/// A run ends as it began, unless it can't: where a person is needed and has mended the definition, a run that has not
/// touched its target goes on with that, and so does one whose target is still the same.
fn may_go_on_with(run: &Run, definition: &Definition) -> bool {
    let is_blocked = run.failure.as_ref().is_some_and(|failure| failure.trouble.needs_a_person());
    let target = |definition: &Definition| definition.rotator().ok().and_then(|rotator| rotator.target());
    let same =
        || run.definition.rotator == definition.rotator && target(&run.definition) == target(definition);
    is_blocked && (run.phase() == Phase::Create || same())
}

/// Has a run that rests after a failure taken up now. One that waits for its retirement waits on: its time is not that of
/// another try.
fn hasten(run: &mut Run, now: Timestamp) {
    if run.failure.is_some() {
        run.not_before = run.not_before.min(now);
    }
}

fn aborting(id: &SecretId, before: Option<Rotation>, now: Timestamp) -> Result<Rotation, BrokerError> {
    let mut rotation = before.ok_or_else(|| not_set(id))?;
    let Some(run) = &mut rotation.run else {
        return Err(conflict(id, "is not in progress; there is nothing to abort"));
    };
    run.abort = true;
    hasten(run, now);
    Ok(rotation)
}

fn not_set(id: &SecretId) -> BrokerError {
    let SecretId { environment, name } = id;
    let message = format!(
        "no rotation is set for secret `{name}` in environment `{environment}`; set one with `claviger rotation set`"
    );
    BrokerError::rejected(Reason::RotationNotFound, message)
}

fn conflict(id: &SecretId, problem: &str) -> BrokerError {
    let SecretId { environment, name } = id;
    let message = format!("the rotation of secret `{name}` in environment `{environment}` {problem}");
    BrokerError::rejected(Reason::Conflict, message)
}
