//! What a request makes of a secret. Pure: a record in, a [`Plan`] out; nothing here reads or writes.
//!
//! ```text
//!             put                        delete                       window over
//!   absent ─────────▶ live ─────────────────────────▶ deleted ─────────────────────▶ gone
//!                      ▲ ◀──────────── restore ──────────┘                             │
//!                      └──────────────────── put, as if it had never been ─────────────┘
//! ```

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};

use super::record::{SecretRecord, ValueTag, VersionRecord};
use crate::secret::{Label, LabelMove, Labels, SecretId, Selector, VersionId};
use crate::store::{Put, StoreError};

/// How many versions without a label are kept (AWS Secrets Manager, "Secret versions").
const KEPT_UNLABELLED: usize = 100;
/// A version is not pruned before this age, whatever the count (ibid.).
const KEPT_FOR: SignedDuration = SignedDuration::from_hours(24);
/// How many versions one put prunes at most, which bounds its transaction.
const MOST_PRUNED: usize = 50;
/// How many versions a secret can have: a record is read and written as a whole.
const MOST_VERSIONS: usize = 10_000;

/// What is to be done.
#[derive(Debug, PartialEq)]
pub(super) struct Plan {
    /// What the record becomes, but for its generation and the tag of a new value; `None`: the request finds its work
    /// done.
    pub(super) next: Option<SecretRecord>,
    /// The versions whose values go.
    pub(super) dropped: Vec<VersionId>,
    /// The version that loses AWSCURRENT.
    pub(super) superseded: Option<VersionId>,
}

impl Plan {
    const NOTHING: Self = Self { next: None, dropped: Vec::new(), superseded: None };

    fn write(next: SecretRecord) -> Self {
        Self { next: Some(next), ..Self::NOTHING }
    }
}

/// Writes a version. `same_value`: whether the version that has the token already has the value too; `None` where
/// there is no such version.
pub(super) fn put(
    id: &SecretId,
    record: Option<&SecretRecord>,
    put: &Put,
    same_value: Option<bool>,
    now: Timestamp,
) -> Result<Plan, StoreError> {
    let before = record.filter(|record| !record.is_gone(now));
    if before.is_some_and(|record| record.deletion_at.is_some()) {
        return Err(StoreError::SecretDeleted(id.clone()));
    }
    // Before `expected`: the retry of a put that succeeded expects what it has itself replaced.
    match same_value {
        Some(true) => return Ok(Plan::NOTHING),
        Some(false) => return Err(StoreError::TokenReused { token: put.token.clone() }),
        None => {}
    }
    let current = before.and_then(|record| record.labels.holder(&Label::Current)).cloned();
    check_expected(id, put.expected.as_ref(), current.as_ref())?;

    let mut next = before.cloned().unwrap_or_else(|| SecretRecord::new(now));
    next.labels = next.labels.put(&put.token, &put.labels)?;
    next.changed_at = now;
    next.versions.push(VersionRecord {
        id: put.token.clone(),
        content_type: put.value.content_type(),
        created_at: now,
        tag: ValueTag::default(),
    });
    let dropped = match record {
        Some(record) if before.is_none() => left_behind(record, &put.token),
        _ => prune(&mut next, now),
    };
    if next.versions.len() > MOST_VERSIONS {
        return Err(StoreError::LimitExceeded(format!(
            "secret `{}` in environment `{}` has {MOST_VERSIONS} versions; those of the last 24 hours are not pruned, \
             so write less often",
            id.name, id.environment
        )));
    }
    let superseded = superseded(current, &next);
    Ok(Plan { next: Some(next), dropped, superseded })
}

/// Moves a label.
pub(super) fn move_label(
    id: &SecretId,
    record: Option<&SecretRecord>,
    change: &LabelMove,
    now: Timestamp,
) -> Result<Plan, StoreError> {
    let record = live(id, record, now)?;
    if let Some(to) = change.to.as_ref().filter(|to| record.version(to).is_none()) {
        return Err(StoreError::VersionNotFound { id: id.clone(), selector: Selector::Version(to.clone()) });
    }
    relabelled(record, record.labels.apply(change)?, now)
}

/// Brings a pending version into use.
pub(super) fn promote(
    id: &SecretId,
    record: Option<&SecretRecord>,
    (from, to): (&VersionId, &VersionId),
    now: Timestamp,
) -> Result<Plan, StoreError> {
    let record = live(id, record, now)?;
    if record.version(to).is_none() {
        return Err(StoreError::VersionNotFound { id: id.clone(), selector: Selector::Version(to.clone()) });
    }
    relabelled(record, record.labels.finish(from, to)?, now)
}

fn relabelled(record: &SecretRecord, labels: Labels, now: Timestamp) -> Result<Plan, StoreError> {
    if labels == record.labels {
        return Ok(Plan::NOTHING);
    }
    let current = record.labels.holder(&Label::Current).cloned();
    let next = SecretRecord { labels, changed_at: now, ..record.clone() };
    let superseded = superseded(current, &next);
    Ok(Plan { superseded, ..Plan::write(next) })
}

/// Deletes a secret, to be gone at `deletion_at`.
pub(super) fn delete(
    id: &SecretId,
    record: Option<&SecretRecord>,
    deletion_at: Timestamp,
    now: Timestamp,
) -> Result<Plan, StoreError> {
    let record = live(id, record, now)?;
    Ok(Plan::write(SecretRecord { deletion_at: Some(deletion_at), ..record.clone() }))
}

/// Brings a deleted secret back; one that is not deleted stays as it is.
pub(super) fn restore(
    id: &SecretId,
    record: Option<&SecretRecord>,
    now: Timestamp,
) -> Result<Plan, StoreError> {
    let record = present(id, record, now)?;
    if record.deletion_at.is_none() {
        return Ok(Plan::NOTHING);
    }
    Ok(Plan::write(SecretRecord { deletion_at: None, ..record.clone() }))
}

/// The record of a secret that is there, deleted or not.
pub(super) fn present<'a>(
    id: &SecretId,
    record: Option<&'a SecretRecord>,
    now: Timestamp,
) -> Result<&'a SecretRecord, StoreError> {
    record.filter(|record| !record.is_gone(now)).ok_or_else(|| StoreError::SecretNotFound(id.clone()))
}

/// The record of a secret that is there and not deleted.
pub(super) fn live<'a>(
    id: &SecretId,
    record: Option<&'a SecretRecord>,
    now: Timestamp,
) -> Result<&'a SecretRecord, StoreError> {
    let record = present(id, record, now)?;
    match record.deletion_at {
        None => Ok(record),
        Some(_) => Err(StoreError::SecretDeleted(id.clone())),
    }
}

/// The version that `selector` points at.
pub(super) fn select<'a>(
    id: &SecretId,
    record: &'a SecretRecord,
    selector: &Selector,
) -> Result<&'a VersionRecord, StoreError> {
    let version = match selector {
        Selector::Label(label) => record.labels.holder(label),
        Selector::Version(version) => Some(version),
    };
    version
        .and_then(|version| record.version(version))
        .ok_or_else(|| StoreError::VersionNotFound { id: id.clone(), selector: selector.clone() })
}

/// The version that a label move is about: where the label goes, else where it came from, else the current one.
pub(super) fn subject<'a>(record: &'a SecretRecord, change: &LabelMove) -> Option<&'a VersionRecord> {
    let current = record.labels.holder(&Label::Current);
    [change.to.as_ref(), change.from.as_ref(), current]
        .into_iter()
        .flatten()
        .find_map(|version| record.version(version))
}

fn check_expected(
    id: &SecretId,
    expected: Option<&Option<VersionId>>,
    current: Option<&VersionId>,
) -> Result<(), StoreError> {
    match expected {
        Some(expected) if expected.as_ref() != current => Err(StoreError::Conflict {
            id: id.clone(),
            found: current.map_or_else(
                || "on no version, because the secret does not exist".to_owned(),
                |version| format!("on version {version}"),
            ),
        }),
        _ => Ok(()),
    }
}

fn superseded(before: Option<VersionId>, next: &SecretRecord) -> Option<VersionId> {
    before.filter(|version| next.labels.holder(&Label::Current) != Some(version))
}

/// The values of a secret that is gone, but for the key that the new version takes over.
fn left_behind(record: &SecretRecord, token: &VersionId) -> Vec<VersionId> {
    record.versions.iter().map(|version| &version.id).filter(|id| *id != token).cloned().collect()
}

/// Takes out versions that no label needs: beyond the first hundred, the oldest first, none younger than a day.
fn prune(record: &mut SecretRecord, now: Timestamp) -> Vec<VersionId> {
    let labelled: BTreeSet<&VersionId> = record.labels.iter().map(|(_, version)| version).collect();
    let unlabelled: Vec<&VersionRecord> =
        record.versions.iter().filter(|version| !labelled.contains(&version.id)).collect();
    let beyond = unlabelled.len().saturating_sub(KEPT_UNLABELLED).min(MOST_PRUNED);
    let dropped: Vec<VersionId> = unlabelled
        .into_iter()
        .take(beyond)
        .filter(|version| now.duration_since(version.created_at) >= KEPT_FOR)
        .map(|version| version.id.clone())
        .collect();
    record.versions.retain(|version| !dropped.contains(&version.id));
    dropped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Reason, Reasoned};
    use crate::secret::SecretValue;
    use std::time::Duration;

    fn id() -> SecretId {
        SecretId::parse("production", "database").unwrap()
    }

    fn version(number: usize) -> VersionId {
        VersionId::parse(&format!("{number:032}")).unwrap()
    }

    fn at(hours: u64) -> Timestamp {
        Timestamp::UNIX_EPOCH + Duration::from_secs(hours * 3_600)
    }

    fn request(number: usize, labels: &[Label]) -> Put {
        let value = SecretValue::text("value".to_owned()).unwrap();
        Put { value, token: version(number), labels: labels.to_vec(), expected: None }
    }

    /// The record after puts of these versions, an hour apart from hour 0 on.
    fn after_puts(count: usize, labels: &[Label]) -> SecretRecord {
        let mut record: Option<SecretRecord> = None;
        for number in 0..count {
            let plan =
                put(&id(), record.as_ref(), &request(number, labels), None, at(number as u64)).unwrap();
            record = plan.next;
        }
        record.unwrap()
    }

    #[test]
    fn a_first_put_creates_and_a_second_supersedes() {
        let plan = put(&id(), None, &request(1, &[]), None, at(1)).unwrap();
        assert_eq!((plan.superseded, plan.dropped), (None, vec![]));
        let record = plan.next.unwrap();
        let plan = put(&id(), Some(&record), &request(2, &[]), None, at(2)).unwrap();
        assert_eq!(plan.superseded, Some(version(1)));
        let next = plan.next.unwrap();
        assert_eq!((next.created_at, next.changed_at), (at(1), at(2)));
        let plan = put(&id(), Some(&next), &request(3, &[Label::Pending]), None, at(3)).unwrap();
        assert_eq!(plan.superseded, None);
    }

    #[test]
    fn a_retry_comes_before_what_it_expects() {
        let record = after_puts(2, &[]);
        let retry = Put { expected: Some(Some(version(0))), ..request(1, &[]) };
        assert_eq!(put(&id(), Some(&record), &retry, Some(true), at(9)).unwrap(), Plan::NOTHING);
        let error = put(&id(), Some(&record), &retry, Some(false), at(9)).unwrap_err();
        assert_eq!(error.reason(), Reason::TokenReused);
    }

    #[test]
    fn an_expectation_that_fails_writes_nothing_and_says_what_is() {
        let record = after_puts(2, &[]);
        let expecting = |expected| Put { expected: Some(expected), ..request(7, &[]) };
        assert!(put(&id(), Some(&record), &expecting(Some(version(1))), None, at(9)).is_ok());
        assert!(put(&id(), None, &expecting(None), None, at(9)).is_ok());
        for expected in [None, Some(version(0))] {
            let error = put(&id(), Some(&record), &expecting(expected), None, at(9)).unwrap_err();
            assert_eq!(error.reason(), Reason::Conflict);
            assert!(
                error.to_string().contains(&format!("AWSCURRENT is on version {}", version(1))),
                "{error}"
            );
        }
        let error = put(&id(), None, &expecting(Some(version(0))), None, at(9)).unwrap_err();
        assert!(error.to_string().contains("the secret does not exist"), "{error}");
    }

    #[test]
    fn a_label_moves_to_a_version_that_is_there() {
        let record = after_puts(2, &[]);
        let change = |to| LabelMove { label: Label::Current, from: Some(version(1)), to: Some(to) };
        let plan = move_label(&id(), Some(&record), &change(version(0)), at(9)).unwrap();
        assert_eq!(plan.superseded, Some(version(1)));
        assert_eq!(plan.next.unwrap().labels.holder(&Label::Previous), Some(&version(1)));
        assert_eq!(move_label(&id(), Some(&record), &change(version(1)), at(9)).unwrap(), Plan::NOTHING);
        let error = move_label(&id(), Some(&record), &change(version(5)), at(9)).unwrap_err();
        assert_eq!(error.reason(), Reason::VersionNotFound);
        let error = move_label(&id(), None, &change(version(0)), at(9)).unwrap_err();
        assert_eq!(error.reason(), Reason::SecretNotFound);
    }

    #[test]
    fn a_move_is_about_where_the_label_goes_or_came_from() {
        let record = after_puts(2, &[]);
        let label = || Label::parse("stable").unwrap();
        let about = |from: Option<usize>, to: Option<usize>| {
            let change = LabelMove { label: label(), from: from.map(version), to: to.map(version) };
            subject(&record, &change).unwrap().id.clone()
        };
        assert_eq!(about(Some(1), Some(0)), version(0));
        assert_eq!(about(Some(0), None), version(0));
        assert_eq!(about(None, None), version(1), "current");
        assert_eq!(about(Some(5), None), version(1), "what is not there is passed over");
    }

    #[test]
    fn the_ways_of_a_deleted_secret() {
        let record = after_puts(1, &[]);
        let deleted = delete(&id(), Some(&record), at(100), at(9)).unwrap().next.unwrap();
        assert_eq!(deleted.changed_at, record.changed_at, "no version was written and no label moved");
        let change = LabelMove { label: Label::Pending, from: None, to: Some(version(0)) };
        for (now, reason) in [(at(99), Reason::SecretDeleted), (at(100), Reason::SecretNotFound)] {
            let refused = [
                delete(&id(), Some(&deleted), at(200), now).unwrap_err(),
                move_label(&id(), Some(&deleted), &change, now).unwrap_err(),
                live(&id(), Some(&deleted), now).unwrap_err(),
            ];
            assert!(refused.iter().all(|error| error.reason() == reason), "{refused:?}");
        }
        let error = put(&id(), Some(&deleted), &request(1, &[]), None, at(99)).unwrap_err();
        assert_eq!(error.reason(), Reason::SecretDeleted);
        assert_eq!(restore(&id(), Some(&deleted), at(99)).unwrap().next, Some(record.clone()));
        assert_eq!(restore(&id(), Some(&deleted), at(100)).unwrap_err().reason(), Reason::SecretNotFound);
        assert_eq!(restore(&id(), Some(&record), at(99)).unwrap(), Plan::NOTHING);
    }

    #[test]
    fn a_gone_secret_starts_anew_and_leaves_nothing() {
        let record = after_puts(3, &[]);
        let gone = delete(&id(), Some(&record), at(100), at(9)).unwrap().next.unwrap();
        let plan = put(&id(), Some(&gone), &request(1, &[]), None, at(100)).unwrap();
        assert_eq!(plan.dropped, [version(0), version(2)], "the new version takes over the key of the old");
        let next = plan.next.unwrap();
        assert_eq!((next.created_at, next.deletion_at, next.versions.len()), (at(100), None, 1));
        assert_eq!(next.labels.holder(&Label::Previous), None);
        assert_eq!(plan.superseded, None);
    }

    #[test]
    fn pruning_takes_the_oldest_unlabelled_beyond_a_hundred_and_a_day() {
        // 102 versions: current, previous and 100 without a label.
        let record = after_puts(102, &[]);
        assert_eq!(record.versions.len(), 102);
        let plan = put(&id(), Some(&record), &request(102, &[]), None, at(102)).unwrap();
        assert_eq!(plan.dropped, [version(0)]);
        let next = plan.next.unwrap();
        assert_eq!(next.versions.first().map(|version| version.id.clone()), Some(version(1)));
        assert_eq!(next.versions.len(), 102);
    }

    #[test]
    fn pruning_spares_the_labelled_and_the_young() {
        let mut record = after_puts(102, &[]);
        let stable = Label::parse("stable").unwrap();
        record.labels =
            record.labels.apply(&LabelMove { label: stable, from: None, to: Some(version(0)) }).unwrap();
        let plan = put(&id(), Some(&record), &request(102, &[]), None, at(102)).unwrap();
        assert_eq!(plan.dropped, [] as [VersionId; 0], "100 without a label are left");
        let record = plan.next.unwrap();
        let plan = put(&id(), Some(&record), &request(103, &[]), None, at(103)).unwrap();
        assert_eq!(plan.dropped, [version(1)]);
        let plan = put(&id(), Some(&record), &request(103, &[]), None, at(24)).unwrap();
        assert_eq!(plan.dropped, [] as [VersionId; 0], "version 1 is 23 hours old");
    }

    #[test]
    fn one_put_prunes_a_bounded_number() {
        let mut record = after_puts(2, &[]);
        let old = |number| VersionRecord { id: version(number), ..record.versions[0].clone() };
        let mut versions: Vec<_> = (1_000..1_300).map(old).collect();
        versions.append(&mut record.versions);
        record.versions = versions;
        let plan = put(&id(), Some(&record), &request(9, &[]), None, at(900)).unwrap();
        assert_eq!(plan.dropped.len(), MOST_PRUNED);
        assert_eq!(plan.dropped.first(), Some(&version(1_000)));
    }

    #[test]
    fn versions_are_bounded() {
        let mut record = after_puts(1, &[]);
        let young = |number| VersionRecord { id: version(number), ..record.versions[0].clone() };
        let versions: Vec<_> = (1..MOST_VERSIONS).map(young).collect();
        record.versions.extend(versions);
        let error = put(&id(), Some(&record), &request(20_000, &[]), None, at(1)).unwrap_err();
        assert_eq!(error.reason(), Reason::LimitExceeded);
    }
}
