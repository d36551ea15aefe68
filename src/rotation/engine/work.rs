//! The effects of the machine, done: at the store through the broker, at the target through the rotator, in the record
//! through the ledger.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use super::super::ledger::{Lease, Saved};
use super::super::machine::{Effect, Ending, Event, Labels, Phase, Probe, Progress, Which};
use super::super::record::{MOST_REFUSED, Rotation};
use super::super::rotators::{self, Probed, Rotator, SetOutcome, TestOutcome};
use super::super::{Failure, Trouble};
use super::Engine;
use crate::broker::{BrokerError, Held};
use crate::error::{Reason, Reasoned as _};
use crate::secret::{Label, SecretValue, Selector, VersionId};
use crate::store::{Description, StoreError};

/// How the labels of values begin that were given up although the target may hold them.
const GIVEN_UP: &str = "given-up-";
/// How many of them a secret has at most (AWS Secrets Manager: 20 labels for a version, and as many for a secret).
const MOST_GIVEN_UP: usize = 8;

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

    async fn probe(&mut self, which: Which) -> Result<Event<VersionId>, Failure> {
        let value = match which {
            Which::Pending => self.pending_value()?,
            Which::Current => {
                let expected = self.expected()?;
                self.current(&expected).await?
            }
            Which::Previous => match self.previous().await? {
                Some(value) => value,
                None => return Ok(Event::Probed(Probe::Rejected)),
            },
        };
        let step = match which {
            Which::Pending => "rotate.probe_pending",
            Which::Current => "rotate.probe_current",
            Which::Previous => "rotate.probe_previous",
        };
        self.load_admin().await?;
        let Probed { probe, why } = self.login(step, &value).await?;
        match probe {
            Probe::Unknown => Err(self.unknown(why).await),
            Probe::Accepted => Ok(Event::Probed(probe)),
            Probe::Rejected | Probe::Unverifiable => {
                // Where this leads to a person, this is why.
                self.fail(Failure::new(Trouble::CurrentRejected, why));
                Ok(Event::Probed(probe))
            }
        }
    }

    async fn previous(&self) -> Result<Option<SecretValue>, Failure> {
        match self.engine.broker.rotation_read(&self.held, &Selector::Label(Label::Previous)).await {
            Ok(fetched) => Ok(Some(fetched.value)),
            Err(error) if error.reason() == Reason::VersionNotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The fingerprint is saved before the first change: whatever answers later must be the same.
    async fn set(&mut self) -> Result<Event<VersionId>, Failure> {
        self.begins("rotate.set").await?;
        self.load_admin().await?;
        if self.fingerprint().is_none()
            && let Some(fingerprint) = self.rotator.identify(&self.work()?).await?
            && !self.remember(fingerprint).await?
        {
            return Ok(Event::Lost);
        }
        match self.rotator.set(&self.work()?).await {
            Ok(SetOutcome::Done) => {
                self.ended("rotate.set", "the target holds the pending value").await?;
                Ok(Event::Set)
            }
            Ok(SetOutcome::Refused(why)) => {
                self.ended("rotate.set", &format!("the target refused the value: {why}")).await?;
                self.fail(Failure::new(Trouble::ValueRefused, why));
                Ok(Event::Refused)
            }
            Err(failure) => Err(self.failed("rotate.set", failure).await),
        }
    }

    async fn remember(&mut self, fingerprint: String) -> Result<bool, Failure> {
        let saved = self
            .engine
            .ledger
            .save(self.lease, |rotation| {
                if let Some(run) = &mut rotation.run {
                    run.fingerprint = Some(fingerprint.clone());
                }
            })
            .await?;
        match saved {
            Saved::Done(rotation) => {
                self.rotation = rotation;
                Ok(true)
            }
            Saved::Lost => Ok(false),
        }
    }

    async fn test(&mut self) -> Result<Event<VersionId>, Failure> {
        self.begins("rotate.test").await?;
        self.load_admin().await?;
        match self.rotator.test(&self.work()?).await {
            Ok(TestOutcome::Passed) => {
                self.ended("rotate.test", "every endpoint accepts the pending value").await?;
                Ok(Event::Tested)
            }
            Ok(TestOutcome::Rejected(why)) => {
                self.ended("rotate.test", &format!("the target rejects the pending value: {why}")).await?;
                self.fail(Failure::new(Trouble::TargetUnavailable, why));
                Ok(Event::Rejected)
            }
            Err(failure) => Err(self.failed("rotate.test", failure).await),
        }
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

    async fn bar(&mut self) -> Result<Event<VersionId>, Failure> {
        self.begins("rotate.bar").await?;
        self.load_admin().await?;
        let expected = self.expected()?;
        if let Err(failure) = self.current(&expected).await {
            // A bar needs no value: what is current now stands in for one that is gone.
            if failure.trouble != Trouble::StoreRefused {
                return Err(failure);
            }
            let now = self.engine.broker.rotation_read(&self.held, &Selector::CURRENT).await?;
            self.current = Some((expected, now.value));
        }
        if self.pending.is_none() {
            self.load_pending().await?;
        }
        match self.rotator.bar(&self.work()?).await {
            Ok(()) => {
                self.ended("rotate.bar", "lower fences are refused").await?;
                Ok(Event::Barred)
            }
            Err(failure) => Err(self.failed("rotate.bar", failure).await),
        }
    }

    /// A value that is given up may be gone from the store, or never have got there.
    async fn load_pending(&mut self) -> Result<(), Failure> {
        let Some(token) = self.token() else { return Ok(()) };
        match self.engine.broker.rotation_read(&self.held, &Selector::Version(token.clone())).await {
            Ok(fetched) => self.pending = Some((token, fetched.value)),
            Err(error) if error.reason() == Reason::VersionNotFound => {
                self.pending = self.current.clone();
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Values that were given up before the rotation before this one: every account has been set anew since, behind a
    /// higher fence, so that no target can hold them. A label that stays is taken away the next time.
    async fn forget_outlived(&self) {
        let ended = self.rotation.history.iter().rev();
        let before =
            ended.filter(|ended| ended.ending == Ending::Rotated).map(|ended| ended.started_at).next();
        let outlived = |version: &&(Timestamp, Label)| match before {
            Some(before) => version.0 < before,
            None => !self.rotator.has_target(),
        };
        for (_, label) in self.given_up.iter().filter(outlived) {
            if let Err(error) = self.engine.broker.unlabel(&self.held, label).await {
                tracing::debug!(%error, "a value that was given up keeps its label for now");
            }
        }
    }

    /// Of values that are given up one after the other without a rotation that succeeds, the newest are kept: a store has
    /// a bound on labels, and each of the older ones is behind several fences.
    async fn forget_surplus(&self) -> Result<(), Failure> {
        let surplus = (self.given_up.len() + 1).saturating_sub(MOST_GIVEN_UP);
        for (_, label) in self.given_up.iter().take(surplus) {
            self.engine.broker.unlabel(&self.held, label).await?;
        }
        Ok(())
    }

    /// Someone moved AWSCURRENT to a version of the very account that the run was changing: to AWSPREVIOUS, say, which
    /// was live until the run set another value there. The run gives up, and the target gets back what is current.
    async fn make_good(&mut self) -> Result<(), Failure> {
        if !self.rotator.has_target() || self.phase() < Phase::Set {
            return Ok(());
        }
        let expected = self.expected()?;
        let fetched = self.engine.broker.rotation_read(&self.held, &Selector::CURRENT).await?;
        let base = match self.current(&expected).await {
            Ok(base) => base,
            // What the run began from is gone with its secret, and so is all that could be made good.
            Err(failure) if failure.trouble == Trouble::StoreRefused => return Ok(()),
            Err(failure) => return Err(failure),
        };
        // Of the other account, or nothing that this rotator could set: for whoever moved the label to see to.
        if fetched.version.id == expected || self.rotator.check(&base, &fetched.value).is_err() {
            return Ok(());
        }
        self.load_admin().await?;
        match self.login("rotate.probe_current", &fetched.value).await? {
            Probed { probe: Probe::Accepted, .. } => return Ok(()),
            Probed { probe: Probe::Rejected, .. } => {}
            Probed { why, .. } => return Err(self.unknown(why).await),
        }
        self.give_back("rotate.restore", &base, &fetched.value).await
    }

    /// Makes the target take a value again that is current, but that it does not hold any more.
    async fn give_back(
        &self,
        step: &'static str,
        other: &SecretValue,
        value: &SecretValue,
    ) -> Result<(), Failure> {
        self.begins(step).await?;
        let work = rotators::Work { current: other, pending: value, ..self.work()? };
        match self.rotator.set(&work).await {
            Ok(SetOutcome::Done) => self.ended(step, "the target holds what is current").await,
            Ok(SetOutcome::Refused(why)) => {
                Err(self.failed(step, Failure::new(Trouble::ValueRefused, why)).await)
            }
            Err(failure) => Err(self.failed(step, failure).await),
        }
    }

    /// Why there is no telling. What needs a person (another target answers than before, the admin's secret is no
    /// credential) passes by no waiting.
    async fn unknown(&self, why: String) -> Failure {
        if let Ok(work) = self.work()
            && let Err(failure) = self.rotator.identify(&work).await
            && failure.trouble.needs_a_person()
        {
            return failure;
        }
        Failure::new(Trouble::TargetUnavailable, why)
    }

    /// One login, on record before and after.
    async fn login(&self, step: &'static str, value: &SecretValue) -> Result<Probed, Failure> {
        self.begins(step).await?;
        let probed = self.rotator.probe(&self.work()?, value).await;
        self.ended(step, &format!("{}: {}", name_of(probed.probe), probed.why)).await?;
        Ok(probed)
    }

    fn phase(&self) -> Phase {
        self.rotation.run.as_ref().map_or(Phase::Create, super::Run::phase)
    }

    async fn withdraw(
        &mut self,
        token: &VersionId,
        keep: Option<Label>,
    ) -> Result<Event<VersionId>, Failure> {
        self.pace().await;
        self.engine.broker.withdraw(&self.held, token, keep).await?;
        Ok(Event::Withdrawn)
    }

    /// What was current before is withdrawn only as long as the run's version is current: someone may have rolled back.
    async fn retire(&mut self, run: &Progress<VersionId>) -> Result<Event<VersionId>, Failure> {
        self.load_admin().await?;
        self.load_pending().await?;
        self.current(&run.expected).await?;
        // The last way back is not taken away while the way forward is not known to be open.
        let pending = self.pending_value()?;
        match self.login("rotate.probe_current", &pending).await? {
            Probed { probe: Probe::Accepted, .. } => {}
            Probed { probe: Probe::Rejected, why } => {
                return Err(Failure::new(Trouble::CurrentRejected, why));
            }
            Probed { why, .. } => return Err(self.unknown(why).await),
        }
        self.begins("rotate.retire").await?;
        match self.rotator.retire(&self.work()?).await {
            Ok(()) => self.ended("rotate.retire", "what was current before is withdrawn").await?,
            Err(failure) => return Err(self.failed("rotate.retire", failure).await),
        }
        self.undo_retirement(run).await?;
        Ok(Event::Retired)
    }

    /// Someone may have rolled back while what they rolled back to was being withdrawn: then the target gets it again.
    async fn undo_retirement(&mut self, run: &Progress<VersionId>) -> Result<(), Failure> {
        let description = self.engine.broker.rotation_look(&self.held).await?;
        if holder(&description, &Label::Current).as_ref() != Some(&run.expected) {
            return Ok(());
        }
        self.restore_previous().await
    }

    /// The same, where the process died or the answer was lost in between.
    async fn unretire(&mut self, run: &Progress<VersionId>) -> Result<Event<VersionId>, Failure> {
        self.load_admin().await?;
        self.load_pending().await?;
        let current = self.current(&run.expected).await?;
        match self.login("rotate.probe_current", &current).await? {
            Probed { probe: Probe::Accepted, .. } => return Ok(Event::Retired),
            Probed { probe: Probe::Rejected, .. } => {}
            Probed { why, .. } => return Err(self.unknown(why).await),
        }
        self.restore_previous().await?;
        Ok(Event::Retired)
    }

    async fn restore_previous(&self) -> Result<(), Failure> {
        let work = self.work()?;
        self.give_back("rotate.unretire", work.pending, work.current).await
    }

    fn work(&self) -> Result<rotators::Work<'_>, Failure> {
        let missing = || super::defect("a step was reached without its values");
        let (_, current) = self.current.as_ref().ok_or_else(missing)?;
        let (_, pending) = self.pending.as_ref().ok_or_else(missing)?;
        Ok(rotators::Work {
            current,
            pending,
            admin: self.admin.as_ref(),
            fence: self.lease.fence(),
            fingerprint: self.fingerprint(),
            id: self.lease.id(),
        })
    }

    fn fingerprint(&self) -> Option<&str> {
        self.rotation.run.as_ref().and_then(|run| run.fingerprint.as_deref())
    }

    fn pending_value(&self) -> Result<SecretValue, Failure> {
        let missing = || super::defect("a step was reached without its value");
        self.pending.as_ref().map(|(_, value)| value.clone()).ok_or_else(missing)
    }

    async fn load_admin(&mut self) -> Result<(), Failure> {
        if self.admin.is_none() {
            let admin = self.engine.broker.rotation_admin(&self.held).await.map_err(of_admin)?;
            self.admin = admin.map(|fetched| fetched.value);
        }
        Ok(())
    }

    async fn begins(&self, step: &'static str) -> Result<(), Failure> {
        let detail = match self.token() {
            Some(token) => format!("version {token}, fence {}", self.lease.fence()),
            None => format!("fence {}", self.lease.fence()),
        };
        Ok(self.engine.broker.step_begins(&self.held, step, detail).await?)
    }

    async fn ended(&self, step: &'static str, said: &str) -> Result<(), Failure> {
        Ok(self.engine.broker.step_ended(&self.held, step, Ok(said.to_owned())).await?)
    }

    /// Puts a failure of the target on record. Where that fails too, the log's trouble is the worse one.
    async fn failed(&self, step: &'static str, failure: Failure) -> Failure {
        let ended = Err((failure.reason(), failure.message.clone()));
        match self.engine.broker.step_ended(&self.held, step, ended).await {
            Ok(()) => failure,
            Err(error) => error.into(),
        }
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

/// What is wrong with the admin's secret is mended there, and not at the one that is rotated.
fn of_admin(error: BrokerError) -> Failure {
    match error.reason() {
        Reason::SecretNotFound | Reason::SecretDeleted | Reason::VersionNotFound => {
            let message = format!("the secret with the admin's credential: {error}");
            Failure::new(Trouble::ValueUnfit, message)
        }
        _ => error.into(),
    }
}

fn given_up(description: &Description) -> Vec<(Timestamp, Label)> {
    let of = |version: &crate::secret::Version| {
        let labels = version.labels.iter().filter(|label| label.as_str().starts_with(GIVEN_UP));
        labels.map(|label| (version.created_at, label.clone())).collect::<Vec<_>>()
    };
    let mut found: Vec<_> = description.versions.iter().flat_map(of).collect();
    found.sort_by_key(|(created_at, _)| *created_at);
    found
}

/// The label of a value that was given up although the target may hold it: no store prunes a version with a label.
fn kept_under(token: &VersionId) -> Result<Label, Failure> {
    Label::parse(&format!("{GIVEN_UP}{token}")).map_err(|error| super::defect(&error.to_string()))
}

const fn name_of(probe: Probe) -> &'static str {
    match probe {
        Probe::Accepted => "accepted",
        Probe::Rejected => "rejected",
        Probe::Unverifiable => "unverifiable",
        Probe::Unknown => "unknown",
    }
}
