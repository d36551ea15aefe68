//! How a secret is changed: read, decide, commit; and again where someone else was first.

use jiff::Timestamp;

use super::record::{SecretRecord, ValueTag, VersionRecord};
use super::root::Root;
use super::rules::{self, Plan};
use super::{
    ATTEMPTS, Sealed, Stored, contended, keys, no_random_bytes, refused, root_of, tampered, the_record,
    unavailable,
};
use crate::crypto::{CryptoError, Mac};
use crate::kv::{Compare, Revision, Transaction, Write};
use crate::secret::{LabelMove, SecretId, SecretValue, VersionId};
use crate::store::{Order, Put, StoreError, Written};

/// A change that is asked for.
pub(super) enum Request<'a> {
    Put(&'a Put),
    Move(&'a LabelMove),
    /// From the first version to the second.
    Promote(&'a VersionId, &'a VersionId),
    Delete {
        at: Timestamp,
    },
    Restore,
}

impl Request<'_> {
    /// The value that is to be written.
    fn value(&self) -> Option<&SecretValue> {
        match self {
            Self::Put(put) => Some(&put.value),
            Self::Move(_) | Self::Promote(..) | Self::Delete { .. } | Self::Restore => None,
        }
    }
}

/// How a change ended.
pub(super) struct Done {
    pub(super) record: SecretRecord,
    superseded: Option<VersionId>,
    revision: Revision,
    changed: bool,
}

impl Done {
    /// As it is told; `version` is the one that the change was about.
    pub(super) fn written(
        &self,
        id: &SecretId,
        version: Option<&VersionRecord>,
    ) -> Result<Written, StoreError> {
        let version = version.ok_or_else(|| tampered(the_record(id)))?;
        Ok(Written {
            version: self.record.shown(version),
            superseded: self.superseded.clone(),
            order: Order::Revision(self.revision),
            changed: self.changed,
        })
    }
}

/// What a change of a secret starts from.
struct Before {
    stored: Option<Stored>,
    root: Root,
    root_revision: Revision,
}

impl Before {
    fn record(&self) -> Option<&SecretRecord> {
        self.stored.as_ref().map(|stored| &stored.record)
    }

    fn mac(&self) -> Option<&Mac> {
        self.stored.as_ref().map(|stored| &stored.mac)
    }

    /// The version of this id, where the secret is not gone.
    fn version(&self, id: &VersionId, now: Timestamp) -> Option<(&Stored, &VersionRecord)> {
        let stored = self.stored.as_ref().filter(|stored| !stored.record.is_gone(now))?;
        Some((stored, stored.record.version(id)?))
    }
}

/// What is to be committed.
struct Change<'a> {
    /// What the record becomes; `None`: it goes.
    next: Option<&'a SecretRecord>,
    /// The versions whose values go.
    dropped: Vec<VersionId>,
    /// The last version's value, where that is new.
    value: Option<NewValue>,
}

/// A new value on its way into the store.
struct NewValue {
    write: Write,
    /// That the root key which it is under is still the one in force (see rewrap.rs).
    under: Compare,
}

impl Sealed {
    /// Does what `request` asks, deciding anew as often as someone else was first.
    pub(super) async fn change(&self, id: &SecretId, request: &Request<'_>) -> Result<Done, StoreError> {
        self.verified(&id.environment).await?;
        let _writer = self.writer.lock().await;
        for _ in 0..ATTEMPTS {
            let before = self.before(id).await?;
            let Some(plan) = self.decide(id, &before, request).await? else { continue };
            let superseded = plan.superseded;
            let Some(mut next) = plan.next else {
                let Some(stored) = before.stored else { continue };
                return Ok(Done {
                    record: stored.record,
                    superseded,
                    revision: stored.revision,
                    changed: false,
                });
            };
            next.generation = before.root.generation + 1;
            let value = self.sealed(id, &mut next, request.value()).await?;
            let change = Change { next: Some(&next), dropped: plan.dropped, value };
            if let Some(revision) = self.commit(id, &before, change).await? {
                return Ok(Done { record: next, superseded, revision, changed: true });
            }
        }
        Err(contended(&id.environment))
    }

    /// Removes a secret that is gone, record and values; `false` where there is none, or the name is in use again.
    pub(super) async fn remove(&self, id: &SecretId) -> Result<bool, StoreError> {
        self.verified(&id.environment).await?;
        let _writer = self.writer.lock().await;
        for _ in 0..ATTEMPTS {
            let before = self.before(id).await?;
            let now = self.clock.now();
            let Some(record) = before.record().filter(|record| record.is_gone(now)) else { return Ok(false) };
            let dropped = record.versions.iter().map(|version| version.id.clone()).collect();
            let removal = Change { next: None, dropped, value: None };
            if self.commit(id, &before, removal).await?.is_some() {
                return Ok(true);
            }
        }
        Err(contended(&id.environment))
    }

    async fn before(&self, id: &SecretId) -> Result<Before, StoreError> {
        let stored = self.record(id).await?;
        // After the record: where that is there, its root was written with it or before.
        let (root, root_revision) = self.root(&id.environment).await?;
        if stored.is_some() && root_revision == 0 {
            return Err(tampered(root_of(&id.environment)));
        }
        Ok(Before { stored, root, root_revision })
    }

    /// `None` where the secret changed meanwhile.
    async fn decide(
        &self,
        id: &SecretId,
        before: &Before,
        request: &Request<'_>,
    ) -> Result<Option<Plan>, StoreError> {
        let now = self.clock.now();
        let record = before.record();
        let plan = match request {
            Request::Put(put) => {
                let same_value = match before.version(&put.token, now) {
                    None => None,
                    Some((stored, version)) => match self.value(id, stored, version).await? {
                        Some(value) => Some(value.same_as(&put.value)),
                        None => return Ok(None),
                    },
                };
                rules::put(id, record, put, same_value, now)
            }
            Request::Move(change) => rules::move_label(id, record, change, now),
            Request::Promote(from, to) => rules::promote(id, record, (from, to), now),
            Request::Delete { at } => rules::delete(id, record, *at, now),
            Request::Restore => rules::restore(id, record, now),
        };
        plan.map(Some)
    }

    /// Commits a change of a record together with its environment's root; `None` where either is no longer as read, or
    /// a new value is under a root key that is no longer in force.
    async fn commit(
        &self,
        id: &SecretId,
        before: &Before,
        change: Change<'_>,
    ) -> Result<Option<Revision>, StoreError> {
        let (record_key, root_key) = (keys::record(id), keys::root(&id.environment));
        let mut write: Vec<Write> =
            change.dropped.iter().map(|version| Write::delete(keys::value(id, version))).collect();
        let (value, under) = change.value.map(|value| (value.write, value.under)).unzip();
        write.extend(value);
        let mac = match change.next {
            None => {
                write.push(Write::delete(record_key.clone()));
                None
            }
            Some(next) => {
                let (stored, mac) = next
                    .encode(&self.meta.integrity, id)
                    .map_err(|error| StoreError::Invalid(format!("{}: {error}", the_record(id))))?;
                write.push(Write::put(record_key.clone(), stored));
                Some(mac)
            }
        };
        let root = before.root.after(&self.meta.integrity, before.mac(), mac.as_ref());
        let stored = root
            .encode(&self.meta.integrity, &id.environment)
            .map_err(|error| no_random_bytes(&id.environment, &error))?;
        write.push(Write::put(root_key.clone(), stored));
        let mut compare = vec![
            Compare::ModRevision(record_key, before.stored.as_ref().map_or(0, |stored| stored.revision)),
            Compare::ModRevision(root_key, before.root_revision),
        ];
        compare.extend(under);
        let outcome =
            self.kv.commit(Transaction { compare, write }).await.map_err(unavailable(&id.environment))?;
        if !outcome.succeeded {
            return Ok(None);
        }
        self.progress.note(&id.environment, root.generation);
        Ok(Some(outcome.revision))
    }

    /// A new version's value, under the root key in force; the new version is the last of `record`, and gets the value's
    /// tag.
    async fn sealed(
        &self,
        id: &SecretId,
        record: &mut SecretRecord,
        value: Option<&SecretValue>,
    ) -> Result<Option<NewValue>, StoreError> {
        let Some((version, value)) = record.versions.last_mut().zip(value) else { return Ok(None) };
        let (root_key, under) = self.in_force(unavailable(&id.environment)).await?;
        let sealed = root_key
            .seal(&self.slot(id, version), value)
            .map_err(|error| refused(id, &version.id, &error))?;
        version.tag =
            ValueTag::of(&sealed).ok_or_else(|| refused(id, &version.id, &CryptoError::Malformed))?;
        Ok(Some(NewValue { write: Write::put(keys::value(id, &version.id), sealed), under }))
    }
}
