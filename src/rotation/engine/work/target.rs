//! What is done at the target, each step on record before and after.

use super::super::super::ledger::Saved;
use super::super::super::machine::{Event, Probe, Which};
use super::super::super::rotators::{self, Probed, SetOutcome, TestOutcome};
use super::super::super::{Failure, Trouble};
use super::Work;
use crate::broker::BrokerError;
use crate::error::{Reason, Reasoned as _};
use crate::secret::{Label, SecretValue, Selector, VersionId};

impl Work<'_> {
    pub(super) async fn probe(&mut self, which: Which) -> Result<Event<VersionId>, Failure> {
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

    pub(super) async fn previous(&self) -> Result<Option<SecretValue>, Failure> {
        match self.engine.broker.rotation_read(&self.held, &Selector::Label(Label::Previous)).await {
            Ok(fetched) => Ok(Some(fetched.value)),
            Err(error) if error.reason() == Reason::VersionNotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The fingerprint is saved before the first change: whatever answers later must be the same.
    pub(super) async fn set(&mut self) -> Result<Event<VersionId>, Failure> {
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

    pub(super) async fn remember(&mut self, fingerprint: String) -> Result<bool, Failure> {
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

    pub(super) async fn test(&mut self) -> Result<Event<VersionId>, Failure> {
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

    pub(super) async fn bar(&mut self) -> Result<Event<VersionId>, Failure> {
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
    pub(super) async fn load_pending(&mut self) -> Result<(), Failure> {
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

    /// Why there is no telling. What needs a person (another target answers than before, the admin's secret is no
    /// credential) passes by no waiting.
    pub(super) async fn unknown(&self, why: String) -> Failure {
        if let Ok(work) = self.work()
            && let Err(failure) = self.rotator.identify(&work).await
            && failure.trouble.needs_a_person()
        {
            return failure;
        }
        Failure::new(Trouble::TargetUnavailable, why)
    }

    /// One login, on record before and after.
    pub(super) async fn login(&self, step: &'static str, value: &SecretValue) -> Result<Probed, Failure> {
        self.begins(step).await?;
        let probed = self.rotator.probe(&self.work()?, value).await;
        self.ended(step, &format!("{}: {}", name_of(probed.probe), probed.why)).await?;
        Ok(probed)
    }

    pub(super) fn work(&self) -> Result<rotators::Work<'_>, Failure> {
        let missing = || super::super::defect("a step was reached without its values");
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

    pub(super) fn fingerprint(&self) -> Option<&str> {
        self.rotation.run.as_ref().and_then(|run| run.fingerprint.as_deref())
    }

    pub(super) fn pending_value(&self) -> Result<SecretValue, Failure> {
        let missing = || super::super::defect("a step was reached without its value");
        self.pending.as_ref().map(|(_, value)| value.clone()).ok_or_else(missing)
    }

    pub(super) async fn load_admin(&mut self) -> Result<(), Failure> {
        if self.admin.is_none() {
            let admin = self.engine.broker.rotation_admin(&self.held).await.map_err(of_admin)?;
            self.admin = admin.map(|fetched| fetched.value);
        }
        Ok(())
    }

    pub(super) async fn begins(&self, step: &'static str) -> Result<(), Failure> {
        let detail = match self.token() {
            Some(token) => format!("version {token}, fence {}", self.lease.fence()),
            None => format!("fence {}", self.lease.fence()),
        };
        Ok(self.engine.broker.step_begins(&self.held, step, detail).await?)
    }

    pub(super) async fn ended(&self, step: &'static str, said: &str) -> Result<(), Failure> {
        Ok(self.engine.broker.step_ended(&self.held, step, Ok(said.to_owned())).await?)
    }

    /// Puts a failure of the target on record. Where that fails too, the log's trouble is the worse one.
    pub(super) async fn failed(&self, step: &'static str, failure: Failure) -> Failure {
        let ended = Err((failure.reason(), failure.message.clone()));
        match self.engine.broker.step_ended(&self.held, step, ended).await {
            Ok(()) => failure,
            Err(error) => error.into(),
        }
    }
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

const fn name_of(probe: Probe) -> &'static str {
    match probe {
        Probe::Accepted => "accepted",
        Probe::Rejected => "rejected",
        Probe::Unverifiable => "unverifiable",
        Probe::Unknown => "unknown",
    }
}
