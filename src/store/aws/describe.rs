//! What is known of secrets without their values.

use std::cmp::Reverse;

use aws_sdk_secretsmanager::operation::describe_secret::DescribeSecretOutput;
use aws_sdk_secretsmanager::types::{
    Filter, FilterNameStringType, SecretListEntry, SortByType, SortOrderType,
};
use jiff::Timestamp;
use serde::Deserialize as _;
use serde::de::value::{Error as MapError, MapDeserializer};

use super::errors::{Failure, Kind, malformed};
use super::quota::Operation;
use super::{Aws, names, timestamp};
use crate::secret::{Label, Labels, SecretId, Version, VersionId};
use crate::store::{Description, ListPage, ListRequest, Listed, Order, StoreError};

/// The most that one page may hold (AWS Secrets Manager, `ListSecrets` and `ListSecretVersionIds`, `MaxResults`).
const PAGE: i32 = 100;
/// AWS keeps about 100 versions and all of the last 24 hours. A list of more pages than this has no end.
const MOST_PAGES: usize = 100;

/// What `DescribeSecret` says of a secret.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) labels: Labels,
    pub(super) created_at: Timestamp,
    pub(super) changed_at: Timestamp,
    /// AWS's reference calls `DeletedDate` the date that the deletion is scheduled for.
    pub(super) deletion_at: Option<Timestamp>,
    /// Who in AWS changes the value on its own: rotation there, or a service that owns the secret.
    pub(super) managed_by: Option<String>,
}

impl Seen {
    /// A secret that was created a moment ago and has no version yet.
    pub(super) fn empty(now: Timestamp) -> Self {
        Self {
            labels: Labels::default(),
            created_at: now,
            changed_at: now,
            deletion_at: None,
            managed_by: None,
        }
    }

    /// Refuses where the secret is deleted, or where AWS changes its value on its own: two rotations of one secret
    /// lock each other out.
    pub(super) fn writable(&self, id: &SecretId) -> Result<(), StoreError> {
        if self.deletion_at.is_some() {
            return Err(StoreError::SecretDeleted(id.clone()));
        }
        match &self.managed_by {
            None => Ok(()),
            Some(manager) => Err(StoreError::Invalid(format!(
                "secret `{}` in environment `{}` is changed by AWS itself ({manager}); cancel that there first \
                 (CancelRotateSecret), or change the secret there",
                id.name, id.environment
            ))),
        }
    }

    /// The version that carries `label`, as an error message names it.
    pub(super) fn place(&self, label: &Label) -> String {
        self.labels.holder(label).map_or_else(|| "on no version".to_owned(), |id| format!("on version {id}"))
    }
}

impl Aws {
    /// Asks for everything about a secret but its value; also of a deleted one.
    pub(super) async fn look(&self, id: &SecretId) -> Result<Seen, StoreError> {
        let name = self.name_in_aws(id)?;
        let call = self.client.describe_secret().secret_id(&name).send();
        let asked = self.ask(Operation::DescribeSecret, call).await;
        let answer = asked.map_err(|failure| failure.about(id, None))?;
        if answer.name() != Some(name.as_str()) {
            return Err(StoreError::SecretNotFound(id.clone()));
        }
        seen(id, answer)
    }

    /// Every version that AWS still has, newest first, with the labels of `seen`.
    pub(super) async fn versions(&self, id: &SecretId, seen: &Seen) -> Result<Vec<Version>, StoreError> {
        let mut versions = match self.listed_versions(id, &seen.labels).await {
            // Of a deleted secret AWS may not list versions; the labels are known all the same.
            Err(StoreError::SecretDeleted(_)) if seen.deletion_at.is_some() => Vec::new(),
            listed => listed?,
        };
        // AWS does not list a version whose value is still to come, and some list lags behind its labels.
        for (_, holder) in seen.labels.iter() {
            if !versions.iter().any(|version| version.id == *holder) {
                versions.push(labelled(holder, &seen.labels, seen.changed_at));
            }
        }
        versions.sort_by_key(|version| Reverse(version.created_at));
        Ok(versions)
    }

    async fn listed_versions(&self, id: &SecretId, labels: &Labels) -> Result<Vec<Version>, StoreError> {
        let name = self.name_in_aws(id)?;
        let mut versions = Vec::new();
        let mut next = None;
        for _ in 0..MOST_PAGES {
            let request = self.client.list_secret_version_ids().secret_id(&name).include_deprecated(true);
            let call = request.max_results(PAGE).set_next_token(next).send();
            let asked = self.ask(Operation::ListSecretVersionIds, call).await;
            let page = asked.map_err(|failure| failure.about(id, None))?;
            for entry in page.versions.unwrap_or_default() {
                if let Some(version) =
                    entry.version_id.as_deref().and_then(|text| VersionId::parse(text).ok())
                {
                    let created_at = timestamp(entry.created_date);
                    let created_at = created_at.ok_or_else(|| malformed(id, "a version's date"))?;
                    versions.push(labelled(&version, labels, created_at));
                }
            }
            next = page.next_token.filter(|token| !token.is_empty());
            if next.is_none() {
                break;
            }
        }
        // AWS lists in no order that it documents, oldest first as a rule: for equal dates, the later one is newer.
        versions.reverse();
        Ok(versions)
    }

    /// A secret with its versions.
    pub(super) async fn described(&self, id: &SecretId) -> Result<Description, StoreError> {
        let seen = self.look(id).await?;
        Ok(Description {
            name: id.name.clone(),
            versions: self.versions(id, &seen).await?,
            created_at: seen.created_at,
            changed_at: seen.changed_at,
            deletion_at: seen.deletion_at,
            order: Order::Unknown,
        })
    }

    /// A page of this environment's secrets. May hold fewer than asked for, or none, and still have a next one.
    pub(super) async fn page(&self, request: &ListRequest) -> Result<ListPage, StoreError> {
        // AWS takes other characters for operators or refuses them, and no name holds them.
        if !request.prefix.chars().all(names::is_permitted) {
            return Ok(ListPage::default());
        }
        let prefix = self.names.prefix(&request.prefix);
        let by_name = Filter::builder().key(FilterNameStringType::Name).values(&prefix).build();
        let call = self
            .client
            .list_secrets()
            .set_filters((!prefix.is_empty()).then(|| vec![by_name]))
            .max_results(page_size(request.limit))
            .set_next_token(request.page_token.clone())
            .include_planned_deletion(request.include_deleted)
            .sort_by(SortByType::Name)
            .sort_order(SortOrderType::Asc)
            .send();
        let asked = self.ask(Operation::ListSecrets, call).await;
        let page = asked.map_err(|failure| failure.of(&self.environment))?;
        let entries = page.secret_list.unwrap_or_default();
        Ok(ListPage {
            secrets: entries.into_iter().filter_map(|entry| self.listed(entry, request)).collect(),
            next_page_token: page.next_token.filter(|token| !token.is_empty()),
        })
    }

    /// AWS's filter knows nothing of what follows a name, and is not relied on for the rest.
    fn listed(&self, entry: SecretListEntry, request: &ListRequest) -> Option<Listed> {
        let name = self.names.secret_called(entry.name.as_deref()?)?;
        let deletion_at = timestamp(entry.deleted_date);
        if !name.as_str().starts_with(&request.prefix) || (deletion_at.is_some() && !request.include_deleted)
        {
            return None;
        }
        let changed_at = timestamp(entry.last_changed_date).or_else(|| timestamp(entry.created_date))?;
        Some(Listed { name, changed_at, deletion_at })
    }

    /// Whether AWS answers.
    pub(super) async fn probe(&self) -> Result<(), StoreError> {
        let call = self.client.list_secrets().max_results(1).send();
        let asked = self.ask(Operation::ListSecrets, call).await;
        asked.map(drop).map_err(|failure| failure.of(&self.environment))
    }

    /// Until when a secret can be restored that someone has deleted meanwhile: perhaps an attempt of the same call,
    /// whose answer was lost.
    pub(super) async fn deletion_at(&self, id: &SecretId, failure: Failure) -> Result<Timestamp, StoreError> {
        if failure.kind != Kind::Deleted {
            return Err(failure.about(id, None));
        }
        self.look(id).await?.deletion_at.ok_or_else(|| failure.about(id, None))
    }
}

fn labelled(id: &VersionId, labels: &Labels, created_at: Timestamp) -> Version {
    Version { id: id.clone(), labels: labels.of(id), created_at }
}

fn seen(id: &SecretId, answer: DescribeSecretOutput) -> Result<Seen, StoreError> {
    let created_at = timestamp(answer.created_date).ok_or_else(|| malformed(id, "its date of creation"))?;
    let stages = answer.version_ids_to_stages.unwrap_or_default();
    let pairs = stages.iter().flat_map(|(version, stages)| stages.iter().map(move |stage| (stage, version)));
    let rotation = answer.rotation_enabled.unwrap_or(false).then(|| "rotation is on".to_owned());
    let owner = answer.owning_service.map(|service| format!("service `{}`", service.escape_default()));
    Ok(Seen {
        labels: labels(pairs.map(|(stage, version)| (stage.as_str(), version.as_str()))),
        created_at,
        changed_at: timestamp(answer.last_changed_date).unwrap_or(created_at),
        deletion_at: timestamp(answer.deleted_date),
        managed_by: owner.or(rotation),
    })
}

/// Labels and version ids that other writers made beyond this program's grammar are not seen.
fn labels<'a>(stages: impl Iterator<Item = (&'a str, &'a str)>) -> Labels {
    let known =
        stages.filter(|(stage, version)| Label::parse(stage).is_ok() && VersionId::parse(version).is_ok());
    // INVARIANT: both were parsed above, so nothing is left to fail.
    Labels::deserialize(MapDeserializer::<_, MapError>::new(known)).unwrap_or_default()
}

/// As many as asked for, or as a page holds. Nobody asks for none: that is a request which left it open.
fn page_size(limit: usize) -> i32 {
    match i32::try_from(limit) {
        Ok(0) | Err(_) => PAGE,
        Ok(limit) => limit.min(PAGE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Reason, Reasoned};
    use aws_sdk_secretsmanager::primitives::DateTime;

    fn id() -> SecretId {
        SecretId::parse("production", "database").unwrap()
    }

    fn version(n: u8) -> VersionId {
        VersionId::parse(&format!("{n:032}")).unwrap()
    }

    fn answer() -> aws_sdk_secretsmanager::operation::describe_secret::builders::DescribeSecretOutputBuilder {
        DescribeSecretOutput::builder().created_date(DateTime::from_secs(1))
    }

    fn stages(stages: &[&str]) -> Vec<String> {
        stages.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn labels_are_read_and_foreign_ones_passed_over() {
        let answer = answer()
            .version_ids_to_stages(
                version(1).as_str(),
                stages(&["AWSCURRENT", "stable", "no label", "AWSOTHER"]),
            )
            .version_ids_to_stages(version(2).as_str(), stages(&["AWSPENDING"]))
            .version_ids_to_stages("short", stages(&["canary"]))
            .build();
        let seen = seen(&id(), answer).unwrap();
        assert_eq!(seen.labels.of(&version(1)), [Label::Current, Label::parse("stable").unwrap()]);
        assert_eq!(seen.labels.holder(&Label::Pending), Some(&version(2)));
        assert_eq!(seen.labels.iter().count(), 3);
        assert_eq!(seen.place(&Label::Previous), "on no version");
        assert_eq!(seen.changed_at, seen.created_at);
    }

    #[test]
    fn pages_stay_within_awss_bounds() {
        assert_eq!([0, 1, 100, 101, usize::MAX].map(page_size), [100, 1, 100, 100, 100]);
    }

    #[test]
    fn what_aws_changes_itself_is_not_written() {
        for answer in [answer().rotation_enabled(true), answer().owning_service("rds")] {
            let error = seen(&id(), answer.build()).unwrap().writable(&id()).unwrap_err();
            assert_eq!(error.reason(), Reason::InvalidArgument);
            assert!(error.to_string().contains("CancelRotateSecret"), "{error}");
        }
        assert!(seen(&id(), answer().rotation_enabled(false).build()).unwrap().writable(&id()).is_ok());
    }

    #[test]
    fn what_is_deleted_is_not_written() {
        let deleted = seen(&id(), answer().deleted_date(DateTime::from_secs(2)).build()).unwrap();
        assert_eq!(deleted.writable(&id()).unwrap_err().reason(), Reason::SecretDeleted);
    }
}
