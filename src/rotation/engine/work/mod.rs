//! The effects of the machine, done: at the store through the broker, at the target through the rotator, in the record
//! through the ledger.
//!
//! | file | holds |
//! |---|---|
//! | `target` | what is done at the target |
//! | `aftermath` | what a run gave up, what was current before, what people moved meanwhile |

mod aftermath;
mod target;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use self::aftermath::{given_up, kept_under};
use super::super::ledger::{Lease, Saved};
use super::super::machine::{Effect, Event, Labels, Phase, Progress};
use super::super::record::{MOST_REFUSED, Rotation};
use super::super::rotators::Rotator;
use super::super::{Failure, Trouble};
use super::Engine;
use crate::broker::{BrokerError, Held};
use crate::error::{Reason, Reasoned as _};
use crate::secret::{Label, SecretValue, Selector, VersionId};
use crate::store::{Description, StoreError};

/// What one activation works with. Values are here only as long as it lasts.
pub(super) struct Work<'a> {
    engine: &'a Engine,
    lease: &'a Lease,
    rotator: Arc<dyn Rotator>,
    held: Held,
    rotation: Rotation,
    /// The versions that values below belong to.
    current: Option<(VersionId, SecretValue)>,
    pending: Option<(VersionId, SecretValue)>,
    admin: Option<SecretValue>,
    /// What was generated in this activation, until it is read back.
    generated: Option<SecretValue>,
    /// The labels of values that were given up, by the age of their versions, oldest first.
    given_up: Vec<(Timestamp, Label)>,
    failure: Option<Failure>,
}

impl<'a> Work<'a> {
    pub(super) fn new(
        engine: &'a Engine,
        lease: &'a Lease,
        rotator: Arc<dyn Rotator>,
        held: Held,
        rotation: Rotation,
    ) -> Self {
        let (current, pending, admin, generated, failure) = (None, None, None, None, None);
        let given_up = Vec::new();
        Self { engine, lease, rotator, held, rotation, current, pending, admin, generated, given_up, failure }
    }

    /// Why the last step was not done.
    pub(super) fn fail(&mut self, failure: Failure) {
        self.failure = Some(failure);
    }

    pub(super) fn into_failure(self) -> Option<Failure> {
        self.failure
    }

    /// How much longer a test may take.
    pub(super) fn patience(&self) -> Duration {
        self.rotator.patience()
    }

    /// Whether the run is still ours for at least one more step.
    pub(super) async fn keep_lease(&self) -> Result<bool, Failure> {
        let now = self.engine.clock.monotonic();
        if self.lease.is_fresh(now) {
            return Ok(true);
        }
        Ok(self.lease.is_live(now) && self.engine.ledger.renew(self.lease).await?)
    }

    /// The target refused a value. Whether another one is to be tried.
    pub(super) async fn discarded(&mut self) -> Result<bool, Failure> {
        (self.pending, self.generated) = (None, None);
        let saved = self
            .engine
            .ledger
            .save(self.lease, |rotation| {
                rotation.refused = rotation.refused.saturating_add(1);
                if let Some(run) = &mut rotation.run {
                    run.progress = None;
                }
            })
            .await?;
        match saved {
            Saved::Done(rotation) => {
                self.rotation = rotation;
                Ok(self.rotation.refused < MOST_REFUSED)
            }
            Saved::Lost => Err(Failure::new(Trouble::Unanswered, "another owner has the run")),
        }
    }

    /// Does one effect.
    pub(super) async fn perform(&mut self, effect: &Effect<VersionId>) -> Result<Event<VersionId>, Failure> {
        match effect {
            Effect::Look => Box::pin(self.look()).await,
            Effect::Save(progress) => Box::pin(self.save(progress)).await,
            Effect::Create(run) => Box::pin(self.create(run)).await,
            Effect::Read(token) => Box::pin(self.read(token)).await,
            Effect::Probe(which) => Box::pin(self.probe(*which)).await,
            Effect::Set => Box::pin(self.set()).await,
            Effect::Test => Box::pin(self.test()).await,
            Effect::Promote(run) => Box::pin(self.promote(run)).await,
            Effect::Bar => Box::pin(self.bar()).await,
            Effect::Withdraw(token) => {
                let event = Box::pin(self.withdraw(token, None)).await?;
                Box::pin(self.forget_outlived()).await;
                Ok(event)
            }
            Effect::Keep(token) => {
                Box::pin(self.make_good()).await?;
                Box::pin(self.forget_surplus()).await?;
                Box::pin(self.withdraw(token, Some(kept_under(token)?))).await
            }
            Effect::Retire(run) => Box::pin(self.retire(run)).await,
            Effect::Unretire(run) => Box::pin(self.unretire(run)).await,
            Effect::Rest(_) | Effect::Ended(_) => Ok(Event::Failed),
        }
    }

    async fn look(&mut self) -> Result<Event<VersionId>, Failure> {
        let description = match self.engine.broker.rotation_look(&self.held).await {
            Err(error) if error.reason() == Reason::SecretNotFound && self.token().is_some() => {
                return Ok(Event::Gone);
            }
            looked => looked?,
        };
        let id = self.lease.id();
        if description.deletion_at.is_some() {
            return Err(Failure::new(
                Trouble::SecretDeleted,
                StoreError::SecretDeleted(id.clone()).to_string(),
            ));
        }
        let Some(current) = holder(&description, &Label::Current) else {
            return Err(Failure::new(Trouble::SecretMissing, format!("secret {id} has no current version")));
        };
        self.given_up = given_up(&description);
        let pending = self.pending(&description, &current).await?;
        let token_known = match self.token() {
            Some(token) => self.is_known(&description, &token).await?,
            None => false,
        };
        Ok(Event::Labels(Labels { current, pending, token_known }))
    }

    /// AWSPENDING, unless what carries it is from before AWSCURRENT: left behind by whoever rotated here earlier, it would
    /// be taken for a value that is still to come, and an old one would be brought back.
    async fn pending(
        &self,
        description: &Description,
        current: &VersionId,
    ) -> Result<Option<VersionId>, Failure> {
        let of = |label: &Label| description.versions.iter().find(|version| version.labels.contains(label));
        let (Some(pending), Some(now)) = (of(&Label::Pending), of(&Label::Current)) else { return Ok(None) };
        let is_left_behind = pending.created_at < now.created_at || pending.labels.contains(&Label::Previous);
        if pending.id == *current || !is_left_behind {
            return Ok(Some(pending.id.clone()));
        }
        if self.token().as_ref() == Some(&pending.id) {
            // One's own, promoted and moved back by someone: the claim is spent, whatever the label says.
            let is_spent = pending.labels.contains(&Label::Previous);
            return Ok((!is_spent).then(|| pending.id.clone()));
        }
        let keep = Some(kept_under(&pending.id)?);
        self.engine.broker.withdraw(&self.held, &pending.id, keep).await?;
        Ok(None)
    }

    fn token(&self) -> Option<VersionId> {
        super::claimed(&self.rotation)
    }

    /// A store need not describe a version that carries no label, but gives it by its id.
    async fn is_known(&self, description: &Description, token: &VersionId) -> Result<bool, Failure> {
        if description.versions.iter().any(|version| version.id == *token) {
            return Ok(true);
        }
        match self.engine.broker.rotation_read(&self.held, &Selector::Version(token.clone())).await {
            Ok(_) => Ok(true),
            Err(error) if error.reason() == Reason::VersionNotFound => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn save(&mut self, progress: &Progress<VersionId>) -> Result<Event<VersionId>, Failure> {
        let engine = self.engine;
        let now = engine.clock.now();
        let until = super::later(now, engine.settings.lease);
        let saved = engine
            .ledger
            .save(self.lease, |rotation| {
                if let Some(run) = &mut rotation.run {
                    run.progress = Some(progress.clone());
                    run.not_before = until;
                    if progress.phase == Phase::Retire {
                        run.promoted_at = run.promoted_at.or(Some(now));
                    }
                }
            })
            .await?;
        match saved {
            Saved::Done(rotation) => {
                let abort = rotation.run.as_ref().is_some_and(|run| run.abort);
                self.rotation = rotation;
                Ok(Event::Saved { abort })
            }
            Saved::Lost => Ok(Event::Lost),
        }
    }

    async fn create(&mut self, run: &Progress<VersionId>) -> Result<Event<VersionId>, Failure> {
        let current = self.current(&run.expected).await?;
        let now = self.engine.clock.now();
        let value = self.rotator.create(&current, now, self.rotation.refused)?;
        self.pace().await;
        let put = self.engine.broker.put_pending(
            &self.held,
            run.token.clone(),
            value.clone(),
            run.expected.clone(),
        );
        match put.await {
            Ok(_) => self.generated = Some(value),
            // An earlier attempt whose answer was lost: the stored value is the one.
            Err(BrokerError::Store(StoreError::TokenReused { .. })) => self.generated = None,
            Err(error) if error.reason() == Reason::Conflict => return Ok(Event::Conflict),
            Err(error) => return Err(error.into()),
        }
        Ok(Event::Created)
    }

    /// From here on the value is what the store gives back, and nothing else.
    async fn read(&mut self, token: &VersionId) -> Result<Event<VersionId>, Failure> {
        let fetched = self.engine.broker.rotation_read(&self.held, &Selector::Version(token.clone())).await?;
        if self.generated.take().is_some_and(|generated| !generated.same_as(&fetched.value)) {
            let message = format!("version {token} reads back as another value than the one written");
            return Err(Failure::new(Trouble::StoreRefused, message));
        }
        self.pending = Some((token.clone(), fetched.value.clone()));
        let expected = self.expected()?;
        let current = self.current(&expected).await?;
        self.rotator.check(&current, &fetched.value)?;
        Ok(Event::Read)
    }

    fn expected(&self) -> Result<VersionId, Failure> {
        let progress = self.rotation.run.as_ref().and_then(|run| run.progress.as_ref());
        progress.map(|progress| progress.expected.clone()).ok_or_else(|| super::defect("no run is claimed"))
    }

    /// The value of the version that was current when the run was claimed.
    async fn current(&mut self, expected: &VersionId) -> Result<SecretValue, Failure> {
        if let Some((version, value)) = &self.current
            && version == expected
        {
            return Ok(value.clone());
        }
        let selector = Selector::Version(expected.clone());
        let value = self.engine.broker.rotation_read(&self.held, &selector).await?.value;
        self.current = Some((expected.clone(), value.clone()));
        Ok(value)
    }

    async fn promote(&mut self, run: &Progress<VersionId>) -> Result<Event<VersionId>, Failure> {
        self.pace().await;
        match self.engine.broker.promote(&self.held, run.expected.clone(), run.token.clone()).await {
            Ok(_) => Ok(Event::Promoted),
            Err(error) if error.reason() == Reason::Conflict => {
                self.fail(Failure::new(Trouble::Unanswered, error.to_string()));
                Ok(Event::Conflict)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn phase(&self) -> Phase {
        self.rotation.run.as_ref().map_or(Phase::Create, super::Run::phase)
    }

    async fn pace(&self) {
        if self.engine.broker.is_aws(&self.lease.id().environment) {
            let wait = self.engine.aws.turn(self.engine.clock.monotonic());
            // Nothing ever answers here: it is the time that is waited for.
            let _ = tokio::time::timeout(wait, std::future::pending::<()>()).await;
        }
    }
}

fn holder(description: &Description, label: &Label) -> Option<VersionId> {
    let carries = |version: &&crate::secret::Version| version.labels.contains(label);
    description.versions.iter().find(carries).map(|version| version.id.clone())
}
