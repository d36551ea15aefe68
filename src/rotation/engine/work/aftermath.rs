//! What follows a run: what it gave up, what was current before, and what people moved meanwhile.

use jiff::Timestamp;

use super::super::super::machine::{Ending, Event, Phase, Probe, Progress};
use super::super::super::rotators::{self, Probed, SetOutcome};
use super::super::super::{Failure, Trouble};
use super::{Work, holder};
use crate::secret::{Label, SecretValue, Selector, VersionId};
use crate::store::Description;

/// How the labels of values begin that were given up although the target may hold them.
const GIVEN_UP: &str = "given-up-";
/// How many of them a secret has at most (AWS Secrets Manager: 20 labels for a version, and as many for a secret).
const MOST_GIVEN_UP: usize = 8;

impl Work<'_> {
    /// Values that were given up before the rotation before this one: every account has been set anew since, behind a
    /// higher fence, so that no target can hold them. A label that stays is taken away the next time.
    pub(super) async fn forget_outlived(&self) {
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
    pub(super) async fn forget_surplus(&self) -> Result<(), Failure> {
        let surplus = (self.given_up.len() + 1).saturating_sub(MOST_GIVEN_UP);
        for (_, label) in self.given_up.iter().take(surplus) {
            self.engine.broker.unlabel(&self.held, label).await?;
        }
        Ok(())
    }

    /// Someone moved AWSCURRENT to a version of the very account that the run was changing: to AWSPREVIOUS, say, which
    /// was live until the run set another value there. The run gives up, and the target gets back what is current.
    pub(super) async fn make_good(&mut self) -> Result<(), Failure> {
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
    pub(super) async fn give_back(
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

    pub(super) async fn withdraw(
        &mut self,
        token: &VersionId,
        keep: Option<Label>,
    ) -> Result<Event<VersionId>, Failure> {
        self.pace().await;
        self.engine.broker.withdraw(&self.held, token, keep).await?;
        Ok(Event::Withdrawn)
    }

    /// What was current before is withdrawn only as long as the run's version is current: someone may have rolled back.
    pub(super) async fn retire(&mut self, run: &Progress<VersionId>) -> Result<Event<VersionId>, Failure> {
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
    pub(super) async fn undo_retirement(&mut self, run: &Progress<VersionId>) -> Result<(), Failure> {
        let description = self.engine.broker.rotation_look(&self.held).await?;
        if holder(&description, &Label::Current).as_ref() != Some(&run.expected) {
            return Ok(());
        }
        self.restore_previous().await
    }

    /// The same, where the process died or the answer was lost in between.
    pub(super) async fn unretire(&mut self, run: &Progress<VersionId>) -> Result<Event<VersionId>, Failure> {
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

    pub(super) async fn restore_previous(&self) -> Result<(), Failure> {
        let work = self.work()?;
        self.give_back("rotate.unretire", work.pending, work.current).await
    }
}

pub(super) fn given_up(description: &Description) -> Vec<(Timestamp, Label)> {
    let of = |version: &crate::secret::Version| {
        let labels = version.labels.iter().filter(|label| label.as_str().starts_with(GIVEN_UP));
        labels.map(|label| (version.created_at, label.clone())).collect::<Vec<_>>()
    };
    let mut found: Vec<_> = description.versions.iter().flat_map(of).collect();
    found.sort_by_key(|(created_at, _)| *created_at);
    found
}

/// The label of a value that was given up although the target may hold it: no store prunes a version with a label.
pub(super) fn kept_under(token: &VersionId) -> Result<Label, Failure> {
    Label::parse(&format!("{GIVEN_UP}{token}")).map_err(|error| super::super::defect(&error.to_string()))
}
