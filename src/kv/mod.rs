//! A small transactional key-value layer with revisions: what etcd offers, cut to what this program needs.
//!
//! Every change has a revision, one number that only grows and counts all keys together. A key remembers the revision
//! that created it and the one that last changed it; a transaction compares those and then writes, all or nothing.
//! That is all that compare-and-swap, fences and leases need.
//!
//! | implementation | durability | who shares it |
//! |---|---|---|
//! | [`embedded`] | SQLite, WAL, `synchronous = FULL` | one broker process, by a lock that the kernel releases |
//!
//! `tests/integration/kv_conformance.rs` is written against the trait; an implementation is done when it passes.

pub mod embedded;

use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::Stream;

use crate::error::{Reason, Reasoned};

/// A position in the one history of all keys. 0 is before the first change.
pub type Revision = u64;

/// A lease's number. 0 is never one.
pub type LeaseId = u64;

/// What went wrong in the layer below. Keys are named, values never.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum KvError {
    /// Another process owns the embedded file.
    #[error("{path} is in use by another process; stop it, or ask that broker instead of opening its file")]
    Locked {
        /// The file.
        path: String,
    },
    /// The file or the network failed.
    #[error("key-value store: {doing}: {cause}")]
    Unavailable {
        /// What was being done.
        doing: &'static str,
        /// What the layer below said.
        cause: String,
    },
    /// A watch asked for history that is gone.
    #[error("revision {asked} is compacted; the oldest kept is {oldest}; read again and watch from there")]
    Compacted {
        /// The revision asked for.
        asked: Revision,
        /// The oldest one kept.
        oldest: Revision,
    },
    /// The lease has expired or never was.
    #[error("lease {id} has expired or does not exist; take a new one")]
    LeaseNotFound {
        /// The lease.
        id: LeaseId,
    },
    /// The file is not one of ours, or from a newer version.
    #[error("{path}: {problem}")]
    BadFile {
        /// The file.
        path: String,
        /// What is wrong with it and the mend.
        problem: String,
    },
}

impl Reasoned for KvError {
    fn reason(&self) -> Reason {
        match self {
            Self::Locked { .. } => Reason::Locked,
            Self::Unavailable { .. } => Reason::StoreUnavailable,
            Self::Compacted { .. } => Reason::InvalidArgument,
            Self::LeaseNotFound { .. } => Reason::Conflict,
            Self::BadFile { .. } => Reason::Tampered,
        }
    }
}

/// One key as it stands. Values may be ciphertext or hashes; nothing here prints them.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: Vec<u8>,
    /// The value.
    pub value: Vec<u8>,
    /// The revision that created the key (anew, after a deletion).
    pub create_revision: Revision,
    /// The revision that last changed it.
    pub mod_revision: Revision,
    /// The lease that the key lives on, if any.
    pub lease: Option<LeaseId>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry")
            .field("key", &String::from_utf8_lossy(&self.key))
            .field("mod_revision", &self.mod_revision)
            .finish_non_exhaustive()
    }
}

/// A condition of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key exists and was last changed by this revision. Revision 0 means that the key does not exist.
    ModRevision(Vec<u8>, Revision),
}

impl Compare {
    /// The key does not exist.
    #[must_use]
    pub fn absent(key: impl Into<Vec<u8>>) -> Self {
        Self::ModRevision(key.into(), 0)
    }

    /// The key is as `entry` was read; where there was none, it still does not exist.
    #[must_use]
    pub fn unchanged(key: impl Into<Vec<u8>>, entry: Option<&Entry>) -> Self {
        Self::ModRevision(key.into(), entry.map_or(0, |entry| entry.mod_revision))
    }
}

/// A write of a transaction.
#[derive(Clone, PartialEq, Eq)]
pub enum Write {
    /// Sets a key; with a lease, until the lease ends.
    Put {
        /// The key.
        key: Vec<u8>,
        /// Its new value.
        value: Vec<u8>,
        /// The lease that it lives on.
        lease: Option<LeaseId>,
    },
    /// Removes a key; a key that is not there is no error.
    Delete {
        /// The key.
        key: Vec<u8>,
    },
}

impl Write {
    /// Sets a key for good.
    #[must_use]
    pub fn put(key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: None }
    }

    /// Removes a key.
    #[must_use]
    pub fn delete(key: impl Into<Vec<u8>>) -> Self {
        Self::Delete { key: key.into() }
    }
}

/// All of the writes if all of the comparisons hold, else none of them.
#[derive(Clone, Default)]
pub struct Transaction {
    /// The conditions.
    pub compare: Vec<Compare>,
    /// The writes. Every key that they change gets the same revision; where a key is written twice, the last counts.
    pub write: Vec<Write>,
}

/// What became of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Whether the comparisons held and the writes were made, durably.
    pub succeeded: bool,
    /// The store's revision after it.
    pub revision: Revision,
}

/// A page of a range read.
#[derive(Debug, Clone)]
pub struct Page {
    /// The entries, in the order of their keys.
    pub entries: Vec<Entry>,
    /// Whether keys follow that did not fit.
    pub more: bool,
    /// The store's revision at the time of the read.
    pub revision: Revision,
}

/// A change that a watch reports. A hint to read again, not a copy of the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The key.
    pub key: Vec<u8>,
    /// The revision that changed it.
    pub revision: Revision,
    /// Whether the key is gone.
    pub deleted: bool,
}

/// Changes from a revision on, in order, without gaps; ends with an error when the watcher fell too far behind.
pub type Watch = Pin<Box<dyn Stream<Item = Result<Event, KvError>> + Send>>;

/// A transactional key-value store with revisions.
#[async_trait]
pub trait Kv: Send + Sync {
    /// One key, as the last committed transaction left it.
    async fn get(&self, key: &[u8]) -> Result<Option<Entry>, KvError>;

    /// The keys that start with `prefix` and come after `after` (exclusive; empty: from the first), at most `limit`.
    async fn range(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<Page, KvError>;

    /// Commits `transaction`. When this returns, a success is on the disk (or on a quorum of disks).
    async fn commit(&self, transaction: Transaction) -> Result<Outcome, KvError>;

    /// Changes of keys under `prefix` with a revision of at least `from`; first those of the past, then as they come.
    async fn watch(&self, prefix: &[u8], from: Revision) -> Result<Watch, KvError>;

    /// The revision of the last change.
    async fn revision(&self) -> Result<Revision, KvError>;

    /// A new lease that ends after `ttl` unless it is renewed; its keys go with it.
    async fn lease(&self, ttl: Duration) -> Result<LeaseId, KvError>;

    /// Gives a lease its full time again.
    ///
    /// # Errors
    /// [`KvError::LeaseNotFound`] where it has ended: whoever held it no longer does.
    async fn renew(&self, lease: LeaseId) -> Result<(), KvError>;

    /// Ends a lease now and removes its keys. One that has ended already is no error.
    async fn release(&self, lease: LeaseId) -> Result<(), KvError>;
}
