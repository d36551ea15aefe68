//! Versions, labels, deletion. Every write looks first: at the name, so that no other secret is hit, and at the
//! labels, because AWS would take them from whoever holds them.
//!
//! ```text
//! put ── DescribeSecret ─┬─ absent ── CreateSecret ──┬─ done (one call makes secret, version and AWSCURRENT)
//!                        │                           └─ someone was first: once more from the start
//!                        └─ there ── the token's version? ─┬─ same value: done, nothing changed
//!                                                          ├─ other value: TokenReused
//!                                                          └─ none ── labels permit? ── PutSecretValue
//! ```

use aws_sdk_secretsmanager::primitives::Blob;
use jiff::Timestamp;

use super::describe::Seen;
use super::errors::{Failure, Kind, malformed};
use super::quota::Operation;
use super::{Aws, timestamp};
use crate::secret::{
    ContentType, Label, LabelMove, Labels, SecretId, SecretValue, Selector, Version, VersionId,
};
use crate::store::{Order, Put, RecoveryWindow, StoreError, Written};

impl Aws {
    /// Writes a version; creates the secret where it does not exist.
    pub(super) async fn write(&self, id: &SecretId, put: &Put) -> Result<Written, StoreError> {
        if put.value.is_empty() {
            return Err(StoreError::Invalid(format!(
                "secret `{}`: AWS Secrets Manager keeps no empty value; write at least one byte",
                id.name
            )));
        }
        // Who loses the race to create a secret writes into the winner's, if that is what the caller expects.
        for _ in 0..2 {
            match self.look(id).await {
                Ok(seen) => return self.write_version(id, put, &seen).await,
                Err(StoreError::SecretNotFound(_)) => {}
                Err(error) => return Err(error),
            }
            if let Some(written) = self.create(id, put).await? {
                return Ok(written);
            }
        }
        Err(StoreError::Conflict {
            id: id.clone(),
            found: "on a version that was written this moment".to_owned(),
        })
    }

    /// `None` where someone else created the secret first.
    async fn create(&self, id: &SecretId, put: &Put) -> Result<Option<Written>, StoreError> {
        let empty = Seen::empty(self.clock.now());
        check_expected(id, put, &empty)?;
        let labels = empty.labels.put(&put.token, &put.labels)?;
        // A creation can't ask for labels of the user's own. Created without a value, the secret takes value and
        // labels in one further call, which a retry finds its way to whatever happens in between.
        let at_once = labels.of(&put.token) == [Label::Current];
        let (text, binary) = if at_once { on_the_wire(&put.value) } else { (None, None) };
        let name = self.name_in_aws(id)?;
        let call = self
            .client
            .create_secret()
            .name(&name)
            .client_request_token(put.token.as_str())
            .set_secret_string(text)
            .set_secret_binary(binary)
            .send();
        let asked = self.ask(Operation::CreateSecret, call).await;
        if asked.is_ok() && ends_like_an_arn(&name) {
            warn_of_partial_arns(id);
        }
        match asked {
            Ok(_) if at_once => Ok(Some(self.written(put, &empty.labels, &labels))),
            Ok(_) => self.write_version(id, put, &empty).await.map(Some),
            Err(failure) if failure.kind == Kind::Exists => Ok(None),
            Err(failure) => Err(failure.without(&put.value).about(id, None)),
        }
    }

    async fn write_version(&self, id: &SecretId, put: &Put, seen: &Seen) -> Result<Written, StoreError> {
        seen.writable(id)?;
        if let Some(written) = self.written_before(id, put, seen).await? {
            return Ok(written);
        }
        check_expected(id, put, seen)?;
        let labels = seen.labels.put(&put.token, &put.labels)?;
        let (text, binary) = on_the_wire(&put.value);
        let call = self
            .client
            .put_secret_value()
            .secret_id(self.name_in_aws(id)?)
            .client_request_token(put.token.as_str())
            .set_secret_string(text)
            .set_secret_binary(binary)
            .set_version_stages(Some(stages(&labels, &put.token)))
            .send();
        match self.ask(Operation::PutSecretValue, call).await {
            Ok(_) => Ok(self.written(put, &seen.labels, &labels)),
            Err(failure) if failure.kind == Kind::Exists => {
                Err(StoreError::TokenReused { token: put.token.clone() })
            }
            Err(failure) => Err(failure.without(&put.value).about(id, None)),
        }
    }

    /// What an earlier attempt with this token left. Asked by id, because a version without a label is in no
    /// description.
    async fn written_before(
        &self,
        id: &SecretId,
        put: &Put,
        seen: &Seen,
    ) -> Result<Option<Written>, StoreError> {
        if seen.labels == Labels::default() {
            return Ok(None);
        }
        match self.fetch(id, &Selector::Version(put.token.clone())).await {
            Ok(found) if found.value.same_as(&put.value) => Ok(Some(Written {
                version: found.version,
                superseded: None,
                order: Order::Unknown,
                changed: false,
            })),
            Ok(_) => Err(StoreError::TokenReused { token: put.token.clone() }),
            Err(StoreError::VersionNotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// AWS does not say when it wrote; within the travel time of the answer it was now.
    fn written(&self, put: &Put, before: &Labels, after: &Labels) -> Written {
        let version =
            Version { id: put.token.clone(), labels: after.of(&put.token), created_at: self.clock.now() };
        Written { version, superseded: superseded(before, after), order: Order::Unknown, changed: true }
    }

    /// Moves one label. AWS compares and swaps by `RemoveFromVersionId`, so that what was seen here can't have changed.
    pub(super) async fn relabel(&self, id: &SecretId, change: &LabelMove) -> Result<Written, StoreError> {
        let seen = self.look(id).await?;
        if change.label.is_system() {
            seen.writable(id)?;
        } else if seen.deletion_at.is_some() {
            return Err(StoreError::SecretDeleted(id.clone()));
        }
        let labels = seen.labels.apply(change)?;
        let mut version = self.moved_version(id, change, &seen).await?;
        let changed = labels != seen.labels;
        if changed {
            self.swap(id, change).await?;
        }
        version.labels = labels.of(&version.id);
        Ok(Written { version, superseded: superseded(&seen.labels, &labels), order: Order::Unknown, changed })
    }

    /// The version that the label goes to, or leaves for good.
    async fn moved_version(
        &self,
        id: &SecretId,
        change: &LabelMove,
        seen: &Seen,
    ) -> Result<Version, StoreError> {
        let named = change.to.as_ref().or(change.from.as_ref()).or(seen.labels.holder(&Label::Current));
        let selector = named.cloned().map_or(Selector::Label(change.label.clone()), Selector::Version);
        let versions = self.versions(id, seen).await?;
        versions
            .into_iter()
            .find(|version| Some(&version.id) == named)
            .ok_or_else(|| StoreError::VersionNotFound { id: id.clone(), selector })
    }

    async fn swap(&self, id: &SecretId, change: &LabelMove) -> Result<(), StoreError> {
        let call = self
            .client
            .update_secret_version_stage()
            .secret_id(self.name_in_aws(id)?)
            .version_stage(change.label.as_str())
            .set_remove_from_version_id(change.from.as_ref().map(ToString::to_string))
            .set_move_to_version_id(change.to.as_ref().map(ToString::to_string))
            .send();
        match self.ask(Operation::UpdateSecretVersionStage, call).await {
            Ok(_) => Ok(()),
            Err(failure) if matches!(failure.kind, Kind::Refused | Kind::NotFound) => {
                self.settle(id, change, failure).await
            }
            Err(failure) => Err(failure.about(id, None)),
        }
    }

    /// Finds out why AWS refused a move: the label had been moved meanwhile, by this very call where an attempt's
    /// answer was lost, or by someone else; or else AWS has reasons of its own.
    async fn settle(&self, id: &SecretId, change: &LabelMove, failure: Failure) -> Result<(), StoreError> {
        let now = self.look(id).await?.labels;
        if now.holder(&change.label) == change.to.as_ref() {
            return Ok(());
        }
        now.apply(change)?;
        Err(failure.about(id, change.to.clone().map(Selector::Version).as_ref()))
    }

    /// Deletes a secret; it can be restored until the returned time.
    pub(super) async fn delete_secret(
        &self,
        id: &SecretId,
        window: RecoveryWindow,
    ) -> Result<Timestamp, StoreError> {
        if self.look(id).await?.deletion_at.is_some() {
            return Err(StoreError::SecretDeleted(id.clone()));
        }
        let call = self
            .client
            .delete_secret()
            .secret_id(self.name_in_aws(id)?)
            .recovery_window_in_days(window.as_days().into())
            .send();
        match self.ask(Operation::DeleteSecret, call).await {
            Ok(answer) => {
                timestamp(answer.deletion_date).ok_or_else(|| malformed(id, "the date of deletion"))
            }
            Err(failure) => self.deletion_at(id, failure).await,
        }
    }

    /// Brings a deleted secret back; one that is not deleted stays as it is.
    pub(super) async fn restore_secret(&self, id: &SecretId) -> Result<(), StoreError> {
        if self.look(id).await?.deletion_at.is_none() {
            return Ok(());
        }
        let call = self.client.restore_secret().secret_id(self.name_in_aws(id)?).send();
        let asked = self.ask(Operation::RestoreSecret, call).await;
        asked.map(drop).map_err(|failure| failure.about(id, None))
    }
}

/// Refuses where AWSCURRENT is not where the caller expects it.
fn check_expected(id: &SecretId, put: &Put, seen: &Seen) -> Result<(), StoreError> {
    match &put.expected {
        Some(expected) if expected.as_ref() != seen.labels.holder(&Label::Current) => {
            Err(StoreError::Conflict { id: id.clone(), found: seen.place(&Label::Current) })
        }
        _ => Ok(()),
    }
}

/// Whether a name ends as the ARNs of all secrets do: with a hyphen and six characters of AWS's choice (AWS Secrets
/// Manager, `CreateSecret`, `Name`).
fn ends_like_an_arn(name: &str) -> bool {
    name.rsplit_once('-')
        .is_some_and(|(_, end)| end.len() == 6 && end.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

fn warn_of_partial_arns(id: &SecretId) {
    tracing::warn!(
        environment = %id.environment,
        secret = %id.name,
        "the secret's name ends like an ARN, with a hyphen and six characters: elsewhere, a partial ARN of it is \
         ambiguous, so ask there by its full ARN; this broker always asks by full name"
    );
}

/// The labels to ask for. INVARIANT: never none, for which AWS would promote the version.
fn stages(labels: &Labels, token: &VersionId) -> Vec<String> {
    labels.of(token).iter().map(ToString::to_string).collect()
}

fn superseded(before: &Labels, after: &Labels) -> Option<VersionId> {
    let last = before.holder(&Label::Current)?;
    (after.holder(&Label::Current) != Some(last)).then(|| last.clone())
}

/// Copies a value to where the SDK takes it from, which is as far as it is wiped.
fn on_the_wire(value: &SecretValue) -> (Option<String>, Option<Blob>) {
    match value.content_type() {
        ContentType::Text => (value.expose_text().map(ToOwned::to_owned), None),
        ContentType::Binary => (None, Some(Blob::new(value.expose()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Reason, Reasoned};

    fn version(n: u8) -> VersionId {
        VersionId::parse(&format!("{n:032}")).unwrap()
    }

    fn put(token: u8, labels: Vec<Label>, expected: Option<Option<VersionId>>) -> Put {
        let value = SecretValue::text("hunter2".to_owned()).unwrap();
        Put { value, token: version(token), labels, expected }
    }

    fn current(n: u8) -> Seen {
        let labels = Labels::default().put(&version(n), &[]).unwrap();
        Seen { labels, ..Seen::empty(Timestamp::UNIX_EPOCH) }
    }

    #[test]
    fn labels_are_always_sent() {
        let labels = Labels::default().put(&version(1), &[]).unwrap();
        let wanted = |put: &Put| stages(&labels.put(&put.token, &put.labels).unwrap(), &put.token);
        assert_eq!(wanted(&put(2, vec![], None)), ["AWSCURRENT"]);
        assert_eq!(wanted(&put(2, vec![Label::Pending], None)), ["AWSPENDING"]);
        let stable = Label::parse("stable").unwrap();
        assert_eq!(wanted(&put(2, vec![stable, Label::Current], None)), ["AWSCURRENT", "stable"]);
    }

    #[test]
    fn expectations_are_compared() {
        let id = SecretId::parse("production", "database").unwrap();
        let check = |expected, seen: &Seen| {
            check_expected(&id, &put(9, vec![], expected), seen).map_err(|e| e.reason())
        };
        let empty = Seen::empty(Timestamp::UNIX_EPOCH);
        assert_eq!(check(None, &current(1)), Ok(()));
        assert_eq!(check(Some(None), &empty), Ok(()));
        assert_eq!(check(Some(Some(version(1))), &current(1)), Ok(()));
        assert_eq!(check(Some(None), &current(1)), Err(Reason::Conflict));
        assert_eq!(check(Some(Some(version(1))), &empty), Err(Reason::Conflict));
        assert_eq!(check(Some(Some(version(2))), &current(1)), Err(Reason::Conflict));
    }

    #[test]
    fn names_that_end_like_arns_are_known() {
        for like in ["db-abc123", "db-AbCdEf", "production/db-000000", "-abc123", "a-b-secret"] {
            assert!(ends_like_an_arn(like), "{like}");
        }
        for unlike in [
            "db",
            "db-abc12",
            "db-abc1234",
            "dbabc123",
            "db-abc123/key",
            "db-ab/123",
            "db-ab_123",
            "db_abc123",
        ] {
            assert!(!ends_like_an_arn(unlike), "{unlike}");
        }
    }

    #[test]
    fn only_a_version_that_lost_awscurrent_is_superseded() {
        let one = Labels::default().put(&version(1), &[]).unwrap();
        let two = one.put(&version(2), &[]).unwrap();
        assert_eq!(superseded(&one, &two), Some(version(1)));
        assert_eq!(superseded(&one, &one), None);
        assert_eq!(superseded(&Labels::default(), &one), None);
    }
}
