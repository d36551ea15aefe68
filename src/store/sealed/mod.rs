//! The store of our own: envelope-encrypted values, versions and labels on top of the key-value layer.
//!
//! ```text
//!   put ─▶ read record and root ─▶ rules ─▶ seal the value ─▶ one transaction: value, record, root
//!               ▲                                                   │ compared with what was read
//!               └───────────────── changed meanwhile ◀──────────────┘
//!   get ─▶ read record, check its MAC ─▶ label or id ─▶ read the value, compare its tag, open it for this very slot
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `keys` | where things stand |
//! | `meta` | the store's id and integrity key |
//! | `record` | one secret, under a MAC for its place |
//! | `root` | what an environment's records add up to |
//! | `rules` | what a request makes of a secret |
//! | `change` | how that is committed |
//! | `rewrap` | how everything goes from one root key to the next |
//! | `verify` | whether an environment's records add up |
//! | `gone` | what nobody can restore any more, and its end |
//! | `progress` | how far the store has come |
//!
//! What an intruder who can write the key-value store can't do unnoticed: change, move or swap a value or a record,
//! or bring back an older value of a version id that was used again (found when it is read); remove a record, add one
//! that was removed, or bring an older one back (found when the environment is first used after the broker's start,
//! and then all of it is refused). What this module can't see is an environment brought back whole, records and root
//! together, or removed whole; the audit log's checkpoints know how far the store had come ([`Sealed::generation`]).
//!
//! Wiping: values are opened into buffers that wipe themselves, and the key-value layer sees ciphertext alone.

mod change;
mod gone;
mod keys;
mod meta;
mod progress;
mod record;
mod rewrap;
mod root;
mod rules;
#[cfg(test)]
mod tests;
mod verify;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::Mutex;

use self::change::Request;
use self::gone::Sweeps;
use self::meta::Meta;
use self::progress::Progress;
use self::record::{RecordError, SecretRecord, ValueTag, VersionRecord};
use self::root::Root;
use self::verify::{Records, Verified};
use super::{
    Description, Fetched, Freshness, ListPage, ListRequest, Listed, Order, Put, RecoveryWindow, Source,
    Store, StoreError, Written,
};
use crate::clock::SharedClock;
use crate::crypto::{CryptoError, KeyRing, Mac, Slot};
use crate::kv::{Compare, Entry, Kv, KvError, Revision, Transaction, Write};
use crate::secret::{EnvironmentName, LabelMove, SecretId, SecretName, SecretValue, Selector, VersionId};

pub use rewrap::Rewrapped;

/// How often a lost race is run again before the caller is told to.
const ATTEMPTS: usize = 16;
/// The most names of one list page.
const MOST_LISTED: usize = 100;
/// How many records one list page looks at, those of deleted secrets that it leaves out among them. A page that comes
/// to this bound is short, or empty, and has a next one.
const MOST_LOOKED_AT: usize = 1_000;
/// What a store can't do without.
const STORES_OWN: &str = "the sealed store's own record, `sealed/meta`,";
const DAY: Duration = Duration::from_secs(86_400);

/// Envelope-encrypted secrets in a key-value store.
pub struct Sealed {
    kv: Arc<dyn Kv>,
    root_keys: Arc<KeyRing>,
    clock: SharedClock,
    meta: Meta,
    /// One change at a time within this process, which spares it most lost races. Correctness is the transactions'.
    writer: Mutex<()>,
    verified: Verified,
    sweeps: Sweeps,
    progress: Progress,
}

impl Sealed {
    /// Opens the store in `kv`; makes it where there is none.
    ///
    /// # Errors
    /// [`StoreError::WrongKey`] where it is under a root key that is not in the ring; [`StoreError::Tampered`] where
    /// its own record is missing or was changed, or an environment's root was changed; [`StoreError::NotOpened`].
    pub async fn open(
        kv: Arc<dyn Kv>,
        root_keys: Arc<KeyRing>,
        clock: SharedClock,
    ) -> Result<Self, StoreError> {
        let meta = match kv.get(keys::META).await.map_err(not_opened)? {
            Some(entry) => open_meta(&root_keys, &entry)?,
            None => create_meta(kv.as_ref(), &root_keys).await?,
        };
        let progress = Progress::read(kv.as_ref(), &meta.integrity).await?;
        let (writer, verified, sweeps) = (Mutex::default(), Verified::default(), Sweeps::default());
        Ok(Self { kv, root_keys, clock, meta, writer, verified, sweeps, progress })
    }

    /// How many changes the store holds: the sum of the generations of all environments' roots, from roots whose MACs
    /// were verified and from nothing else. Each committed change of a secret adds one, a purge too; what fails, or
    /// finds its work done, adds none. It never shrinks while the store is open.
    ///
    /// This is what the audit log's checkpoints vouch for. A store brought back from the past as a whole is authentic
    /// throughout, but opens with a number smaller than the one that the log last wrote down; compare them before the
    /// first change. Where several brokers change one store, it is what this one has seen of it, and never more than
    /// was committed.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.progress.total()
    }

    /// Compares all records of an environment with its root, which its first use since the start does otherwise, and
    /// every caller until then waits for. Takes time in proportion to the records; given up, it is taken up again where
    /// it stood.
    ///
    /// # Errors
    /// As the methods of [`Store`].
    pub async fn check(&self, environment: &EnvironmentName) -> Result<(), StoreError> {
        self.verified(environment).await
    }

    /// An environment's root, and the revision that wrote it; 0 where there is none yet.
    async fn root(&self, environment: &EnvironmentName) -> Result<(Root, Revision), StoreError> {
        let entry = self.kv.get(&keys::root(environment)).await.map_err(unavailable(environment))?;
        let Some(entry) = entry else { return Ok((Root::default(), 0)) };
        let root = Root::decode(&self.meta.integrity, environment, &entry.value)
            .ok_or_else(|| tampered(root_of(environment)))?;
        self.progress.note(environment, root.generation);
        Ok((root, entry.mod_revision))
    }

    /// A secret's record; `None` where there is none. One that is gone is still there.
    async fn record(&self, id: &SecretId) -> Result<Option<Stored>, StoreError> {
        let entry = self.kv.get(&keys::record(id)).await.map_err(unavailable(&id.environment))?;
        entry.map(|entry| self.decode(id, &entry)).transpose()
    }

    fn decode(&self, id: &SecretId, entry: &Entry) -> Result<Stored, StoreError> {
        match SecretRecord::decode(&self.meta.integrity, id, &entry.value) {
            Ok((record, mac)) => Ok(Stored { record, mac, revision: entry.mod_revision }),
            Err(RecordError::Tampered) => Err(tampered(the_record(id))),
            Err(RecordError::Newer) => Err(StoreError::Unavailable {
                environment: id.environment.clone(),
                cause: format!("{} is of a newer format; upgrade this broker", the_record(id)),
            }),
        }
    }

    /// A version's value; `None` where the secret changed between the reading of its record and now.
    async fn value(
        &self,
        id: &SecretId,
        stored: &Stored,
        version: &VersionRecord,
    ) -> Result<Option<SecretValue>, StoreError> {
        let entry = self.kv.get(&keys::value(id, &version.id)).await.map_err(unavailable(&id.environment))?;
        let opened = match entry {
            Some(entry) if ValueTag::of(&entry.value) == Some(version.tag) => {
                self.root_keys.open(&self.slot(id, version), &entry.value)
            }
            Some(_) | None => Err(CryptoError::Tampered),
        };
        match opened {
            Ok(value) => Ok(Some(value)),
            Err(error) => {
                let record = self.kv.get(&keys::record(id)).await.map_err(unavailable(&id.environment))?;
                if record.is_none_or(|record| record.mod_revision != stored.revision) {
                    return Ok(None);
                }
                Err(refused(id, &version.id, &error))
            }
        }
    }

    fn slot<'a>(&self, id: &'a SecretId, version: &'a VersionRecord) -> Slot<'a> {
        Slot {
            store_id: self.meta.store_id,
            environment: &id.environment,
            name: &id.name,
            version_id: &version.id,
            content_type: version.content_type,
        }
    }
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealed").field("store_id", &self.meta.store_id).finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for Sealed {
    /// Always asks the key-value store, whatever `freshness` permits.
    async fn get(&self, id: &SecretId, selector: &Selector, _: Freshness) -> Result<Fetched, StoreError> {
        self.verified(&id.environment).await?;
        for _ in 0..ATTEMPTS {
            let stored = self.record(id).await?.ok_or_else(|| StoreError::SecretNotFound(id.clone()))?;
            let record = rules::live(id, Some(&stored.record), self.clock.now())?;
            let version = rules::select(id, record, selector)?;
            if let Some(value) = self.value(id, &stored, version).await? {
                return Ok(Fetched {
                    version: record.shown(version),
                    value,
                    order: Order::Revision(stored.revision),
                    source: Source::Store,
                    age: Duration::ZERO,
                    stale: false,
                });
            }
        }
        Err(contended(&id.environment))
    }

    async fn batch_get(
        &self,
        items: &[(SecretId, Selector)],
        freshness: Freshness,
    ) -> Vec<Result<Fetched, StoreError>> {
        let mut answers = Vec::with_capacity(items.len());
        for (id, selector) in items {
            answers.push(self.get(id, selector, freshness).await);
        }
        answers
    }

    /// The id of a version that was pruned, or went with its secret, may be used again with any value: no record
    /// remembers it. The old bytes don't come back with it; the new version's record names the tag of the new ones.
    async fn put(&self, id: &SecretId, put: Put) -> Result<Written, StoreError> {
        let done = self.change(id, &Request::Put(&put)).await?;
        let version = done.record.version(&put.token);
        done.written(id, version)
    }

    async fn describe(&self, id: &SecretId) -> Result<Description, StoreError> {
        self.verified(&id.environment).await?;
        let stored = self.record(id).await?.ok_or_else(|| StoreError::SecretNotFound(id.clone()))?;
        let record = rules::present(id, Some(&stored.record), self.clock.now())?;
        Ok(Description {
            name: id.name.clone(),
            versions: record.versions.iter().rev().map(|version| record.shown(version)).collect(),
            created_at: record.created_at,
            changed_at: record.changed_at,
            deletion_at: record.deletion_at,
            order: Order::Revision(stored.revision),
        })
    }

    async fn list(
        &self,
        environment: &EnvironmentName,
        request: &ListRequest,
    ) -> Result<ListPage, StoreError> {
        let after = match &request.page_token {
            None => Vec::new(),
            Some(token) => keys::record(&SecretId::new(environment.clone(), page_token(token)?)),
        };
        self.verified(environment).await?;
        let now = self.clock.now();
        let limit = request.limit.clamp(1, MOST_LISTED);
        // One more than is shown says whether that is all.
        let mut records = Records::of(self, environment, &request.prefix, &after).at_first(limit + 1);
        let (mut page, mut looked_at) = (ListPage::default(), 0);
        while let Some((id, entry)) = records.next().await? {
            looked_at += 1;
            let SecretRecord { changed_at, deletion_at, .. } = self.decode(&id, &entry)?.record;
            let hidden = deletion_at.is_some_and(|at| at <= now || !request.include_deleted);
            if hidden && looked_at < MOST_LOOKED_AT {
                continue;
            }
            if hidden {
                // Names a deleted secret to who may list the environment, and could have had it listed.
                page.next_page_token = Some(id.name.to_string());
                break;
            }
            if page.secrets.len() == limit {
                page.next_page_token = page.secrets.last().map(|last| last.name.to_string());
                break;
            }
            page.secrets.push(Listed { name: id.name, changed_at, deletion_at });
        }
        Ok(page)
    }

    async fn move_label(&self, id: &SecretId, change: &LabelMove) -> Result<Written, StoreError> {
        let done = self.change(id, &Request::Move(change)).await?;
        let version = rules::subject(&done.record, change);
        done.written(id, version)
    }

    async fn promote(&self, id: &SecretId, from: &VersionId, to: &VersionId) -> Result<Written, StoreError> {
        let done = self.change(id, &Request::Promote(from, to)).await?;
        done.written(id, done.record.version(to))
    }

    async fn delete(&self, id: &SecretId, window: RecoveryWindow) -> Result<Timestamp, StoreError> {
        let at = self.clock.now().saturating_add(DAY * u32::from(window.as_days())).unwrap_or(Timestamp::MAX);
        self.change(id, &Request::Delete { at }).await?;
        Ok(at)
    }

    async fn restore(&self, id: &SecretId) -> Result<(), StoreError> {
        self.change(id, &Request::Restore).await.map(|_| ())
    }

    async fn ping(&self, environment: &EnvironmentName) -> Result<(), StoreError> {
        self.kv.get(keys::META).await.map(|_| ()).map_err(unavailable(environment))
    }
}

fn open_meta(root_keys: &KeyRing, entry: &Entry) -> Result<Meta, StoreError> {
    Meta::open(root_keys, &entry.value).map_err(|error| not_its_own(&error))
}

async fn create_meta(kv: &dyn Kv, root_keys: &KeyRing) -> Result<Meta, StoreError> {
    let (meta, stored) = Meta::create(root_keys).map_err(not_opened)?;
    // A new integrity key would make what is there unreadable for good.
    let there = kv.range(keys::ALL, &[], 1).await.map_err(not_opened)?;
    if there.entries.is_empty() {
        let compare = vec![Compare::absent(keys::META)];
        let write = vec![Write::put(keys::META, stored)];
        if kv.commit(Transaction { compare, write }).await.map_err(not_opened)?.succeeded {
            return Ok(meta);
        }
    }
    // Another broker may have made the store meanwhile.
    match kv.get(keys::META).await.map_err(not_opened)? {
        Some(entry) => open_meta(root_keys, &entry),
        None => Err(tampered(format!("{STORES_OWN} which is missing,"))),
    }
}

/// A record as it was read.
struct Stored {
    record: SecretRecord,
    mac: Mac,
    /// What the record's next change is compared with; where the secret stands in the store's order.
    revision: Revision,
}

fn page_token(token: &str) -> Result<SecretName, StoreError> {
    SecretName::parse(token).map_err(|_| {
        StoreError::Invalid(
            "the page token is not one that a list gave; start from the first page".to_owned(),
        )
    })
}

fn the_record(id: &SecretId) -> String {
    format!("the record of secret `{}` in environment `{}`", id.name, id.environment)
}

fn root_of(environment: &EnvironmentName) -> String {
    format!("the root of environment `{environment}`")
}

fn tampered(what: String) -> StoreError {
    StoreError::Tampered { what }
}

/// Why the store's own record can't be used.
fn not_its_own(error: &CryptoError) -> StoreError {
    match error {
        CryptoError::WrongKey { .. } => StoreError::WrongKey(format!("sealed store: {error}")),
        CryptoError::Random => not_opened(error),
        _ => tampered(STORES_OWN.to_owned()),
    }
}

fn unavailable(environment: &EnvironmentName) -> impl FnOnce(KvError) -> StoreError {
    move |error| StoreError::Unavailable { environment: environment.clone(), cause: error.to_string() }
}

fn not_opened(error: impl fmt::Display) -> StoreError {
    StoreError::NotOpened(error.to_string())
}

fn no_random_bytes(environment: &EnvironmentName, error: &CryptoError) -> StoreError {
    StoreError::Unavailable { environment: environment.clone(), cause: error.to_string() }
}

fn contended(environment: &EnvironmentName) -> StoreError {
    StoreError::Unavailable {
        environment: environment.clone(),
        cause: format!("others changed the same data {ATTEMPTS} times in a row; try again"),
    }
}

fn refused(id: &SecretId, version: &VersionId, error: &CryptoError) -> StoreError {
    let what = format!("version {version} of secret `{}` in environment `{}`", id.name, id.environment);
    match error {
        CryptoError::WrongKey { .. } => StoreError::WrongKey(format!("{what}: {error}")),
        CryptoError::Random => no_random_bytes(&id.environment, error),
        _ => StoreError::Tampered { what },
    }
}
