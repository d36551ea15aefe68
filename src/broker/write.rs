//! Changes: a version, a label, a rollback, a deletion and its undoing.
//!
//! Each is on record twice: as an intent before the store is touched, and with its outcome after. Where the second
//! record fails, the caller is told so; a retry with the same client request token finds the work done.

use jiff::Timestamp;

use super::watch::Current;
use super::{Broker, BrokerError, Call, record};
use crate::audit::Record;
use crate::error::Reason;
use crate::policy::{Action, Grant, Resource};
use crate::secret::{Label, LabelMove, SecretId, Version, VersionId};
use crate::store::{Put, RecoveryWindow, Written};

/// What a rollback left.
#[derive(Debug, Clone)]
pub struct RolledBack {
    /// What is current now.
    pub version: Version,
    /// What was current before.
    pub superseded: Option<VersionId>,
}

impl Broker {
    /// Writes a version; creates the secret where it does not exist.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Write`]. An empty value is refused unless `allow_empty`.
    pub async fn put(
        &self,
        call: &Call,
        id: SecretId,
        put: Put,
        allow_empty: bool,
    ) -> Result<Written, BrokerError> {
        if put.value.is_empty() && !allow_empty {
            let message =
                format!("secret `{}`: the value is empty; say allow_empty where that is meant", id.name);
            let error = BrokerError::rejected(Reason::ValueEmpty, message);
            let about = (id.environment.as_str(), id.name.as_str());
            return Err(self.record_rejected(call, "put", about, error).await);
        }
        let grant = self.authorize(call, "put", Action::Write, &Resource::Secret(id)).await?;
        self.intend(call, "put", &grant).await?;
        let written = self.parts.stores.put(&grant, put).await.map_err(BrokerError::from);
        self.made_current(&grant, &written).await;
        self.released(&grant, record::of_grant(call, "put", &grant), written, wrote).await
    }

    /// Moves a label of the user's own.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Write`]. The AWS labels are refused: they move with put, rollback and
    /// rotation.
    pub async fn move_label(
        &self,
        call: &Call,
        id: SecretId,
        change: LabelMove,
    ) -> Result<Written, BrokerError> {
        if change.label.is_system() {
            let message = format!(
                "label {} moves only with put, rollback and rotation; choose a label of your own",
                change.label
            );
            let error = BrokerError::rejected(Reason::InvalidLabel, message);
            let about = (id.environment.as_str(), id.name.as_str());
            return Err(self.record_rejected(call, "move_label", about, error).await);
        }
        let grant = self.authorize(call, "move_label", Action::Write, &Resource::Secret(id)).await?;
        self.intend(call, "move_label", &grant).await?;
        let moved = self.parts.stores.move_label(&grant, &change).await.map_err(BrokerError::from);
        let record =
            record::of_grant(call, "move_label", &grant).with_detail(format!("label {}", change.label));
        self.released(&grant, record, moved, wrote).await
    }

    /// Makes `to` current again, or AWSPREVIOUS where it is `None`; with `expected`, only if that is current.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Rollback`].
    pub async fn rollback(
        &self,
        call: &Call,
        id: SecretId,
        to: Option<VersionId>,
        expected: Option<VersionId>,
    ) -> Result<RolledBack, BrokerError> {
        let grant = self.authorize(call, "rollback", Action::Rollback, &Resource::Secret(id)).await?;
        self.intend(call, "rollback", &grant).await?;
        let written = self.parts.stores.rollback(&grant, to, expected).await.map_err(BrokerError::from);
        self.made_current(&grant, &written).await;
        let written =
            self.released(&grant, record::of_grant(call, "rollback", &grant), written, wrote).await?;
        Ok(RolledBack { version: written.version, superseded: written.superseded })
    }

    /// Deletes a secret; says until when it can be restored.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Delete`].
    pub async fn delete(
        &self,
        call: &Call,
        id: SecretId,
        window: RecoveryWindow,
    ) -> Result<Timestamp, BrokerError> {
        let grant = self.authorize(call, "delete", Action::Delete, &Resource::Secret(id)).await?;
        self.intend(call, "delete", &grant).await?;
        let deleted = self.parts.stores.delete(&grant, window).await.map_err(BrokerError::from);
        if deleted.is_ok() {
            self.tell_watchers(&grant, Current::Gone).await;
        }
        self.released(&grant, record::of_grant(call, "delete", &grant), deleted, |until, record| {
            record.done().with_detail(format!("can be restored until {until}"))
        })
        .await
    }

    /// Brings a deleted secret back.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Delete`]: who may delete may undo it.
    pub async fn restore(&self, call: &Call, id: SecretId) -> Result<(), BrokerError> {
        let grant = self.authorize(call, "restore", Action::Delete, &Resource::Secret(id)).await?;
        self.intend(call, "restore", &grant).await?;
        let restored = self.parts.stores.restore(&grant).await.map_err(BrokerError::from);
        if restored.is_ok() {
            self.tell_watchers(&grant, Current::Unknown).await;
        }
        self.finished(call, "restore", &grant, restored).await
    }

    async fn made_current(&self, grant: &Grant, written: &Result<Written, BrokerError>) {
        if let Ok(Written { version, .. }) = written
            && version.labels.contains(&Label::Current)
        {
            self.tell_watchers(grant, Current::Version(version.id.clone())).await;
        }
    }

    /// Said as soon as the change is made, also where its second record fails: it was made.
    async fn tell_watchers(&self, grant: &Grant, current: Current) {
        if let Resource::Secret(id) = grant.resource() {
            self.parts.feed.changed(id, current).await;
        }
    }

    /// The end of something that has no more to say than whether it was done.
    pub(super) async fn finished<T>(
        &self,
        call: &Call,
        operation: &'static str,
        grant: &Grant,
        result: Result<T, BrokerError>,
    ) -> Result<T, BrokerError> {
        self.released(grant, record::of_grant(call, operation, grant), result, |_, record| record.done())
            .await
    }
}

fn wrote(written: &Written, record: Record) -> Record {
    let record = record.of_version(&written.version).done();
    if written.changed { record } else { record.with_detail("a retry: nothing changed") }
}
