//! The rotations as they are kept, whose turn it is, and in which order they are due.
//!
//! ```text
//! kv  rotation/record/<environment>/<secret>                →  MAC and JSON of a Rotation (see record.rs)
//!     rotation/lease/<environment>/<secret>                 →  <instance>/<boot>, on a lease of the layer below
//!     rotation/due/<milliseconds>/<environment>/<secret>    →  nothing
//!     rotation/group/<environment>/<group>                  →  MAC and <time> <secret>
//! ```
//!
//! An environment's name holds no slash, a secret's may: what comes after the environment is the secret. The
//! milliseconds (since 1970, 20 digits) are when a rotation wants attention, rounded up, so that nothing is met before
//! its time; the order of the keys is the order in which rotations are due.
//!
//! | file | holds |
//! |---|---|
//! | `lease.rs` | one activation: lease, fence, and what is saved under them |
//! | `index.rs` | what is due, and how the index is mended |
//! | `groups.rs` | when a group was last rotated |
//!
//! INVARIANTS:
//! - A record changes by compare-and-swap, and the index with it, in one transaction.
//! - A fence is given out once. It is above the record's last one and above the revision before it, and the revision
//!   after it is not below it: so the next fence is higher also where the record was removed and set anew in between.
//! - The index has no MAC, because it only hints: the record decides what is done, and an entry that does not fit its
//!   record is removed when the index is mended.
//!
//! A record's MAC shows that this broker wrote it for this secret, not that it is the last one. One that was put back
//! from the past, fence included, or whose removal was undone, is noticed by the target, which compares fences itself,
//! and by the labels, which are the truth of what is current. A target that can't compare fences is as safe as its
//! rotator's description says.

mod groups;
mod index;
mod lease;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

pub use self::lease::{Begin, Lease, Saved, Taken};
use super::record::Rotation;
use super::{Failure, Trouble};
use crate::clock::SharedClock;
use crate::crypto::MacKey;
use crate::kv::{Compare, Entry, Kv, KvError, Revision, Transaction, Write};
use crate::secret::{EnvironmentName, SecretId, SecretName};

const RECORDS: &str = "rotation/record/";
const LEASES: &str = "rotation/lease/";
/// How often a lost race is run again. Among so many who write one record at once, each gets its turn.
const ATTEMPTS: usize = 16;

/// Keeps rotations. Any number of ledgers may work on one key-value store.
pub struct Ledger {
    kv: Arc<dyn Kv>,
    key: Arc<MacKey>,
    clock: SharedClock,
    /// `<instance>/<boot>`: an instance runs once at a time, so whoever has its name and another boot is dead.
    owner: String,
    lease: Duration,
}

/// A page of an environment's rotations.
#[derive(Debug)]
pub struct Listed {
    /// By name. A record that can't be read is there with the reason.
    pub rotations: Vec<(SecretId, Result<Rotation, Failure>)>,
    /// Whether there are more after the last of these.
    pub more: bool,
}

/// A record as it was read.
struct Stored {
    rotation: Rotation,
    revision: Revision,
}

impl Ledger {
    /// A ledger of `instance`, a name that no other running broker on this store has. What is taken is ours for `lease`,
    /// unless it is renewed.
    #[must_use]
    pub fn new(
        kv: Arc<dyn Kv>,
        key: Arc<MacKey>,
        clock: SharedClock,
        instance: &str,
        lease: Duration,
    ) -> Self {
        let owner = format!("{instance}/{}", uuid::Uuid::new_v4());
        Self { kv, key, clock, owner, lease }
    }

    /// The rotation of a secret, where one is set.
    ///
    /// # Errors
    /// [`Trouble::RecordUnreadable`] where it was changed, moved, or is of a newer version;
    /// [`Trouble::StoreUnavailable`].
    pub async fn get(&self, id: &SecretId) -> Result<Option<Rotation>, Failure> {
        Ok(self.stored(id).await?.map(|stored| stored.rotation))
    }

    /// Rotations of an environment by the names of their secrets, after the one given, at most `limit`.
    ///
    /// # Errors
    /// [`Trouble::StoreUnavailable`]. A record that can't be read is no error of the others.
    pub async fn list(
        &self,
        environment: &EnvironmentName,
        after: Option<&SecretName>,
        limit: usize,
    ) -> Result<Listed, Failure> {
        let prefix = format!("{RECORDS}{environment}/");
        let after = after.map(|name| format!("{prefix}{name}")).unwrap_or_default();
        let page = self.kv.range(prefix.as_bytes(), after.as_bytes(), limit).await;
        let page = page.map_err(unavailable(environment))?;
        let read = |entry: &Entry| {
            let id = id_in(&entry.key, RECORDS)?;
            let rotation = Rotation::decode(&self.key, &id, &entry.value);
            Some((id, rotation))
        };
        Ok(Listed { rotations: page.entries.iter().filter_map(read).collect(), more: page.more })
    }

    /// Changes a record, deciding anew as often as someone else was first. `change` gets `None` where no rotation is
    /// set, and gives back what it becomes, `None` to remove it, with what the caller wants to know. A fence never goes
    /// back, whatever `change` makes of it.
    ///
    /// # Errors
    /// What `change` gives; as [`get`](Self::get); [`Trouble::StoreUnavailable`] where others were first every time.
    pub async fn update<R>(
        &self,
        id: &SecretId,
        mut change: impl FnMut(Option<Rotation>) -> Result<(Option<Rotation>, R), Failure>,
    ) -> Result<R, Failure> {
        for _ in 0..ATTEMPTS {
            let before = self.stored(id).await?;
            let (mut after, result) = change(before.as_ref().map(|stored| stored.rotation.clone()))?;
            if let (Some(after), Some(before)) = (&mut after, &before) {
                after.fence = after.fence.max(before.rotation.fence);
            }
            if after.as_ref() == before.as_ref().map(|stored| &stored.rotation) {
                return Ok(result);
            }
            let transaction = self.change(id, before.as_ref(), after.as_ref())?;
            if self.commit(id, transaction).await? {
                return Ok(result);
            }
        }
        Err(contended(id))
    }

    async fn stored(&self, id: &SecretId) -> Result<Option<Stored>, Failure> {
        let Some(entry) = self.kv.get(&record_key(id)).await.map_err(unavailable(id))? else {
            return Ok(None);
        };
        let rotation = Rotation::decode(&self.key, id, &entry.value)?;
        Ok(Some(Stored { rotation, revision: entry.mod_revision }))
    }

    /// What writes a record, and the index that fits it, if the record is still as it was read.
    fn change(
        &self,
        id: &SecretId,
        before: Option<&Stored>,
        after: Option<&Rotation>,
    ) -> Result<Transaction, Failure> {
        let record = record_key(id);
        let compare = vec![Compare::ModRevision(record.clone(), before.map_or(0, |stored| stored.revision))];
        let mut write = vec![match after {
            Some(rotation) => Write::put(record, rotation.encode(&self.key, id)?),
            None => Write::delete(record),
        }];
        let was = before.and_then(|stored| index::key_of(id, &stored.rotation));
        let is = after.and_then(|rotation| index::key_of(id, rotation));
        if was != is {
            write.extend(was.map(Write::delete));
            write.extend(is.map(|key| Write::put(key, Vec::new())));
        }
        Ok(Transaction { compare, write })
    }

    /// Whether it was done; not where what it compares is no longer so.
    async fn commit(&self, id: &SecretId, transaction: Transaction) -> Result<bool, Failure> {
        let outcome = self.kv.commit(transaction).await.map_err(unavailable(id))?;
        Ok(outcome.succeeded)
    }
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger").field("owner", &self.owner).finish_non_exhaustive()
    }
}

fn record_key(id: &SecretId) -> Vec<u8> {
    format!("{RECORDS}{}/{}", id.environment, id.name).into_bytes()
}

fn lease_key(id: &SecretId) -> Vec<u8> {
    format!("{LEASES}{}/{}", id.environment, id.name).into_bytes()
}

/// The secret that a key names after its prefix. `None` where it is none of ours.
fn id_in(key: &[u8], prefix: &str) -> Option<SecretId> {
    parse_id(std::str::from_utf8(key).ok()?.strip_prefix(prefix)?)
}

fn parse_id(text: &str) -> Option<SecretId> {
    let (environment, name) = text.split_once('/')?;
    SecretId::parse(environment, name).ok()
}

fn unavailable(what: impl fmt::Display) -> impl Fn(KvError) -> Failure {
    move |error| Failure::new(Trouble::StoreUnavailable, format!("rotation of {what}: {error}"))
}

fn contended(id: &SecretId) -> Failure {
    let message = format!("others changed the rotation of {id} {ATTEMPTS} times in a row; it is tried again");
    Failure::new(Trouble::StoreUnavailable, message)
}
