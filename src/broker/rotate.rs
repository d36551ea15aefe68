//! What a rotation asks of the broker. It is just another principal: each step is authorised and on record, and what it
//! changes is seen by caches and watchers in the same step as everyone else's changes.
//!
//! INVARIANT: before a run touches its target, everything that it needs to come to its end is in its hands: the grants,
//! so that a change of policy does not strand it half way, and space in the audit log, so that a full disk does not.

use super::watch::Current;
use super::{Broker, BrokerError, Call, record};
use crate::audit::{Outcome, RECORD_ROOM, Record, Reservation};
use crate::environment::{Durability, StoreChoice};
use crate::error::{Reason, Reasoned};
use crate::policy::{Action, Context, Grant, Resource};
use crate::secret::{
    EnvironmentName, Label, LabelMove, SecretId, SecretName, SecretValue, Selector, VersionId,
};
use crate::store::{Description, Fetched, Freshness, StoreError, Written};

/// What one activation may write into the log: two records for each of its steps, generously.
const SPACE: u64 = 64 * RECORD_ROOM;

/// Who rotates what.
#[derive(Debug, Clone)]
pub struct Run {
    /// The engine, and in its reason who asked.
    pub call: Call,
    /// The secret.
    pub id: SecretId,
    /// The secret that holds the admin's credential, in the same environment.
    pub admin: Option<SecretName>,
}

/// What an activation holds: grants, and space in the log.
#[derive(Debug)]
pub struct Held {
    call: Call,
    describe: Grant,
    read: Grant,
    rotate: Grant,
    admin: Option<Grant>,
    space: Reservation,
}

impl Broker {
    /// Takes what a run needs.
    ///
    /// # Errors
    /// [`BrokerError`]; the caller needs [`Action::Describe`], [`Action::Read`] and [`Action::Rotate`] on the secret, and
    /// [`Action::Read`] on the admin's. Where the log has no space, before anything was done.
    pub async fn hold(&self, run: Run) -> Result<Held, BrokerError> {
        let Run { call, id, admin } = run;
        let secret = Resource::Secret(id.clone());
        let describe = self.authorize(&call, "rotate", Action::Describe, &secret).await?;
        let read = self.authorize(&call, "rotate", Action::Read, &secret).await?;
        let rotate = self.authorize(&call, "rotate", Action::Rotate, &secret).await?;
        let admin = match admin {
            None => None,
            Some(name) => {
                let admin = Resource::Secret(SecretId::new(id.environment, name));
                Some(self.authorize(&call, "rotate", Action::Read, &admin).await?)
            }
        };
        let space = self.parts.log.reserve(SPACE).await?;
        Ok(Held { call, describe, read, rotate, admin, space })
    }

    /// Where the labels stand.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn rotation_look(&self, held: &Held) -> Result<Description, BrokerError> {
        let description = self.parts.stores.describe(&held.describe).await.map_err(BrokerError::from);
        let record = record::of_grant(&held.call, "rotate.look", &held.describe);
        self.released_within(held, record, description, |_, record| record.done()).await
    }

    /// A version of the secret, from the store itself.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn rotation_read(&self, held: &Held, selector: &Selector) -> Result<Fetched, BrokerError> {
        self.read_with(held, &held.read, selector).await
    }

    /// The admin's credential, from the store itself; `None` where the run has no admin.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn rotation_admin(&self, held: &Held) -> Result<Option<Fetched>, BrokerError> {
        match &held.admin {
            None => Ok(None),
            Some(grant) => self.read_with(held, grant, &Selector::CURRENT).await.map(Some),
        }
    }

    async fn read_with(
        &self,
        held: &Held,
        grant: &Grant,
        selector: &Selector,
    ) -> Result<Fetched, BrokerError> {
        let fetched = self.parts.stores.get(grant, selector, Freshness::Refresh).await;
        let record = record::of_grant(&held.call, "rotate.read", grant);
        self.released_within(held, record, fetched.map_err(BrokerError::from), |fetched, record| {
            record.of_fetched(fetched).done()
        })
        .await
    }

    /// Writes the pending version, if `expected` is current.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn put_pending(
        &self,
        held: &Held,
        token: VersionId,
        value: SecretValue,
        expected: VersionId,
    ) -> Result<Written, BrokerError> {
        self.changing(held, "rotate.create", || {
            self.parts.stores.put_pending(&held.rotate, token, value, expected)
        })
        .await
    }

    /// Moves AWSCURRENT by compare-and-swap, and spends AWSPENDING with it. In the same step the cache forgets what was current, and watchers are told.
    ///
    /// # Errors
    /// [`BrokerError`]; a label conflict where AWSCURRENT is on neither of them.
    pub async fn promote(&self, held: &Held, from: VersionId, to: VersionId) -> Result<Written, BrokerError> {
        let moving = async || {
            let written = self.parts.stores.promote(&held.rotate, &from, &to).await?;
            if let Resource::Secret(id) = held.rotate.resource() {
                self.parts.feed.changed(id, Current::Version(to)).await;
            }
            Ok(written)
        };
        self.changing(held, "rotate.finish", moving).await
    }

    /// Takes AWSPENDING off a version; with `keep`, the version stays under that label. One that does not carry it, or
    /// does not exist, is no error.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn withdraw(
        &self,
        held: &Held,
        token: &VersionId,
        keep: Option<Label>,
    ) -> Result<(), BrokerError> {
        if let Some(label) = keep {
            let change = LabelMove { label, from: None, to: Some(token.clone()) };
            let kept = self
                .changing(held, "rotate.keep", || self.parts.stores.move_in_rotation(&held.rotate, &change))
                .await;
            match kept {
                Err(BrokerError::Store(StoreError::VersionNotFound { .. })) => return Ok(()),
                other => drop(other?),
            }
        }
        let change = LabelMove { label: Label::Pending, from: Some(token.clone()), to: None };
        let withdrawn = self
            .changing(held, "rotate.withdraw", || self.parts.stores.move_in_rotation(&held.rotate, &change))
            .await;
        match withdrawn {
            Err(error) if matches!(error.reason(), Reason::Conflict | Reason::VersionNotFound) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Takes a label of the user's own kind off whatever carries it.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn unlabel(&self, held: &Held, label: &Label) -> Result<(), BrokerError> {
        let description = self.rotation_look(held).await?;
        let carrier = description.versions.into_iter().find(|version| version.labels.contains(label));
        let Some(carrier) = carrier else { return Ok(()) };
        let change = LabelMove { label: label.clone(), from: Some(carrier.id), to: None };
        self.changing(held, "rotate.forget", || self.parts.stores.move_in_rotation(&held.rotate, &change))
            .await
            .map(drop)
    }

    async fn changing<F>(
        &self,
        held: &Held,
        operation: &'static str,
        change: impl FnOnce() -> F,
    ) -> Result<Written, BrokerError>
    where
        F: Future<Output = Result<Written, StoreError>>,
    {
        let record = record::of_grant(&held.call, operation, &held.rotate);
        self.append_within(held, record.clone().intent()).await?;
        let written = change().await.map_err(BrokerError::from);
        self.released_within(held, record, written, |written, record| {
            record.of_version(&written.version).done()
        })
        .await
    }

    /// A step at the target is about to be made.
    ///
    /// # Errors
    /// Where the log can't be written: then it must not be made.
    pub async fn step_begins(
        &self,
        held: &Held,
        operation: &'static str,
        detail: String,
    ) -> Result<(), BrokerError> {
        let record = record::of_grant(&held.call, operation, &held.rotate).intent().with_detail(detail);
        self.append_within(held, record).await
    }

    /// How it ended, where it is known.
    ///
    /// # Errors
    /// Where the log can't be written.
    pub async fn step_ended(
        &self,
        held: &Held,
        operation: &'static str,
        ended: Result<String, (Reason, String)>,
    ) -> Result<(), BrokerError> {
        let mut record = record::of_grant(&held.call, operation, &held.rotate);
        match ended {
            Ok(detail) => record = record.done().with_detail(detail),
            Err((reason, detail)) => {
                record.outcome = Some(Outcome::Failed);
                reason.code().clone_into(&mut record.error);
                record = record.with_detail(detail);
            }
        }
        self.append_within(held, record).await
    }

    /// A question or a change that is not about a stored value: authorised, put on record before it is made where it is
    /// a change, and with its outcome after.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn governed<T>(
        &self,
        call: &Call,
        operation: &'static str,
        (action, resource): (Action, Resource),
        is_change: bool,
        work: impl Future<Output = Result<T, BrokerError>>,
    ) -> Result<T, BrokerError> {
        let grant = self.authorize(call, operation, action, &resource).await?;
        if is_change {
            self.intend(call, operation, &grant).await?;
        }
        let result = work.await;
        self.finished(call, operation, &grant, result).await
    }

    /// Whether policy would permit it; nothing is done and nothing is recorded. For choosing among many things, each of
    /// which is then asked for by [`governed`](Self::governed).
    #[must_use]
    pub fn would_permit(&self, call: &Call, action: Action, resource: &Resource) -> bool {
        let context = Context { reason: call.reason.clone() };
        self.admitted(call, resource).is_ok()
            && self.parts.policies.authorize(&call.principal, action, resource, &context).is_ok()
    }

    /// Whether the values of an environment are in AWS Secrets Manager, whose quotas hold for what is changed there.
    #[must_use]
    pub fn is_aws(&self, environment: &EnvironmentName) -> bool {
        let declared = self.parts.registry.get(environment);
        declared.is_ok_and(|declared| matches!(declared.store, StoreChoice::Aws(_)))
    }

    async fn released_within<T>(
        &self,
        held: &Held,
        record: Record,
        result: Result<T, BrokerError>,
        describe: impl FnOnce(&T, Record) -> Record,
    ) -> Result<T, BrokerError> {
        let record = match &result {
            Ok(answer) => describe(answer, record),
            Err(error) => record.ended(error),
        };
        self.append_within(held, record).await?;
        result
    }

    async fn append_within(&self, held: &Held, record: Record) -> Result<(), BrokerError> {
        self.parts.log.append_within(&held.space, record, Durability::Durable).await?;
        Ok(())
    }
}
