//! Where versions live. [`Store`] is the one trait; [`sealed`] keeps envelope-encrypted versions in the key-value
//! layer, [`aws`] asks AWS Secrets Manager, and two are stores around a store: the cache, and [`coalesced`], which asks
//! a distant one for many secrets at once.
//!
//! `tests/integration/store_conformance.rs` runs one suite over every implementation and over the cache around each.

pub mod aws;
pub mod coalesced;
pub mod guarded;
pub mod sealed;

use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;

use crate::error::{Reason, Reasoned};
use crate::secret::{
    EnvironmentName, Label, LabelError, LabelMove, SecretId, SecretName, SecretValue, Selector, ValueError,
    Version, VersionId,
};

/// Where a label move stands in the order of a store's changes. Stores that number their changes compare; AWS does
/// not, so [`Order::Unknown`] compares with nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The revision of the secret's last change.
    Revision(u64),
    /// The store does not say.
    Unknown,
}

impl Order {
    /// Whether `self` is certainly older than `other`.
    #[must_use]
    pub const fn is_older_than(self, other: Self) -> bool {
        match (self, other) {
            (Self::Revision(this), Self::Revision(that)) => this < that,
            _ => false,
        }
    }
}

/// Where an answer came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The store itself, now.
    Store,
    /// The broker's cache.
    Cache,
}

/// One version with its value.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// The version; its labels are those of the moment of the fetch.
    pub version: Version,
    /// Its value.
    pub value: SecretValue,
    /// Where the labels stand in the store's order.
    pub order: Order,
    /// Store or cache.
    pub source: Source,
    /// How long ago the store said so. Zero from the store itself.
    pub age: Duration,
    /// Whether the store could not be asked although the time to live was over.
    pub stale: bool,
}

/// Whether a cached answer will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Freshness {
    /// Cached within its time to live, or stale within its bound while the store is unreachable.
    #[default]
    Cached,
    /// The store is asked, and where it can't be there is no answer. A cache stores what it learns.
    Refresh,
}

/// A new version to write.
#[derive(Debug, Clone)]
pub struct Put {
    /// The value.
    pub value: SecretValue,
    /// The client request token, which becomes the version's id: the same token with the same value is a retry and
    /// changes nothing; with another value it is refused.
    pub token: VersionId,
    /// The labels that the version asks for; none means AWSCURRENT.
    pub labels: Vec<Label>,
    /// What the caller believes to be AWSCURRENT; where it isn't, nothing is written. `Some(None)`: the secret must
    /// not exist.
    pub expected: Option<Option<VersionId>>,
}

/// What a write left behind.
#[derive(Debug, Clone)]
pub struct Written {
    /// The version written or moved to.
    pub version: Version,
    /// The version that lost AWSCURRENT to it, if one did.
    pub superseded: Option<VersionId>,
    /// Where the change stands in the store's order.
    pub order: Order,
    /// False where a retry found its work done.
    pub changed: bool,
}

/// What is known of a secret without any value.
#[derive(Debug, Clone)]
pub struct Description {
    /// The secret.
    pub name: SecretName,
    /// Its versions, newest first. Versions without a label may be pruned by the store.
    pub versions: Vec<Version>,
    /// When its first version was written.
    pub created_at: Timestamp,
    /// When a version was last written or a label last moved.
    pub changed_at: Timestamp,
    /// When it will be gone, where it is deleted.
    pub deletion_at: Option<Timestamp>,
    /// Where the description stands in the store's order.
    pub order: Order,
}

/// One line of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The secret.
    pub name: SecretName,
    /// When a version was last written or a label last moved.
    pub changed_at: Timestamp,
    /// When it will be gone, where it is deleted.
    pub deletion_at: Option<Timestamp>,
}

/// What part of a list is asked for.
#[derive(Debug, Clone, Default)]
pub struct ListRequest {
    /// Only names that start with this; empty: all.
    pub prefix: String,
    /// Where the last page ended, as that page said; `None`: from the first.
    pub page_token: Option<String>,
    /// At most so many names. Implementations may return fewer, and bound it at 100.
    pub limit: usize,
    /// Also the deleted ones within their recovery window.
    pub include_deleted: bool,
}

/// A page of a list, in the order of the names where the store has one.
#[derive(Debug, Clone, Default)]
pub struct ListPage {
    /// The secrets.
    pub secrets: Vec<Listed>,
    /// Where the next page starts; `None`: this was the last.
    pub next_page_token: Option<String>,
}

/// How long a deleted secret can be restored: 7 to 30 days (AWS Secrets Manager, `DeleteSecret`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecoveryWindow(u8);

impl RecoveryWindow {
    /// What a caller gets who says nothing (AWS's default).
    pub const DEFAULT: Self = Self(30);

    /// A window of so many days; `None` outside of 7–30.
    #[must_use]
    pub const fn days(days: u8) -> Option<Self> {
        if days >= 7 && days <= 30 { Some(Self(days)) } else { None }
    }

    /// The number of days.
    #[must_use]
    pub const fn as_days(self) -> u8 {
        self.0
    }
}

/// What a store has counted since it was made of its calls to what is behind it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Upstream {
    /// Calls that asked for values: a batch is one, each further page of its answer another. What a client library tries
    /// again by itself is not counted again. `None` of a store that has nothing behind it.
    pub value_calls: Option<u64>,
    /// Questions for a value that went along in a call which another question had opened.
    pub coalesced: u64,
    /// Calls that waited for the quota of their account.
    pub quota_waits: u64,
    /// How long they did, all together.
    pub quota_waited: Duration,
    /// Calls that were not made, because they would have had to wait for too long.
    pub quota_refusals: u64,
}

/// Why a store did not do what it was asked. Names and versions are named; values never.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No such secret.
    #[error("no secret `{name}` in environment `{environment}`", name = .0.name, environment = .0.environment)]
    SecretNotFound(SecretId),
    /// The secret has no such version.
    #[error("secret `{name}` in environment `{environment}` has no {selector}", name = .id.name, environment = .id.environment)]
    VersionNotFound {
        /// The secret.
        id: SecretId,
        /// What was asked for.
        selector: Selector,
    },
    /// Deleted, and still within its window.
    #[error("secret `{name}` in environment `{environment}` is deleted; restore it first", name = .0.name, environment = .0.environment)]
    SecretDeleted(SecretId),
    /// AWSCURRENT is not what the caller expected, or the secret exists where it must not.
    #[error("secret `{name}` in environment `{environment}` changed meanwhile: AWSCURRENT is {found}; describe it and try again", name = .id.name, environment = .id.environment)]
    Conflict {
        /// The secret.
        id: SecretId,
        /// Where AWSCURRENT is, or that there is none.
        found: String,
    },
    /// The token names a version with another value or content.
    #[error("client request token `{token}` was used before with another value; use a new token")]
    TokenReused {
        /// The token.
        token: VersionId,
    },
    /// A label rule.
    #[error(transparent)]
    Label(#[from] LabelError),
    /// A size or encoding rule.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// A request that this store can't take; says which part and why.
    #[error("{0}")]
    Invalid(String),
    /// A bound of the store was reached.
    #[error("{0}")]
    LimitExceeded(String),
    /// The store can't be reached, timed out, or reported an outage: worth another try.
    #[error("store of environment `{environment}` can't be reached: {cause}")]
    Unavailable {
        /// The environment.
        environment: EnvironmentName,
        /// What the layer below said.
        cause: String,
    },
    /// The store asks to slow down: worth another try, later.
    #[error("store of environment `{environment}` throttles the broker: {cause}")]
    Throttled {
        /// The environment.
        environment: EnvironmentName,
        /// What the store said.
        cause: String,
    },
    /// The store refuses the broker's credentials, or has none to check.
    #[error("store of environment `{environment}` refuses the broker: {cause}")]
    Denied {
        /// The environment.
        environment: EnvironmentName,
        /// What the store said.
        cause: String,
    },
    /// A record fails authentication.
    #[error(
        "{what} fails authentication: it was changed, moved or brought back from the past; restore it from a backup"
    )]
    Tampered {
        /// Which record.
        what: String,
    },
    /// The data was sealed under another root key.
    #[error("{0}")]
    WrongKey(String),
    /// What lies below the store failed while it was opened, before any environment was concerned.
    #[error("the store can't be opened: {0}")]
    NotOpened(String),
}

impl Reasoned for StoreError {
    fn reason(&self) -> Reason {
        match self {
            Self::SecretNotFound(_) => Reason::SecretNotFound,
            Self::VersionNotFound { .. } => Reason::VersionNotFound,
            Self::SecretDeleted(_) => Reason::SecretDeleted,
            Self::Conflict { .. } => Reason::Conflict,
            Self::TokenReused { .. } => Reason::TokenReused,
            Self::Label(error) => error.reason(),
            Self::Value(error) => error.reason(),
            Self::Invalid(_) => Reason::InvalidArgument,
            Self::LimitExceeded(_) => Reason::LimitExceeded,
            Self::Unavailable { .. } => Reason::StoreUnavailable,
            Self::Throttled { .. } => Reason::StoreThrottled,
            Self::Denied { .. } => Reason::StoreDenied,
            Self::Tampered { .. } => Reason::Tampered,
            Self::WrongKey(_) => Reason::WrongKey,
            Self::NotOpened(_) => Reason::StoreUnavailable,
        }
    }
}

impl StoreError {
    /// Whether the store may answer otherwise in a moment, so that a cached value within its bound may stand in.
    /// An answer (not found, deleted, denied) is never transient.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Throttled { .. })
    }
}

/// Where versions live.
#[async_trait]
pub trait Store: Send + Sync {
    /// The version that `selector` points at, with its value.
    async fn get(
        &self,
        id: &SecretId,
        selector: &Selector,
        freshness: Freshness,
    ) -> Result<Fetched, StoreError>;

    /// As [`get`](Self::get) for each item, in order; one item's failure is its own.
    async fn batch_get(
        &self,
        items: &[(SecretId, Selector)],
        freshness: Freshness,
    ) -> Vec<Result<Fetched, StoreError>>;

    /// Writes a version; creates the secret where it does not exist.
    async fn put(&self, id: &SecretId, put: Put) -> Result<Written, StoreError>;

    /// What is known of a secret without any value; also of a deleted one within its window.
    async fn describe(&self, id: &SecretId) -> Result<Description, StoreError>;

    /// A page of an environment's secrets.
    async fn list(
        &self,
        environment: &EnvironmentName,
        request: &ListRequest,
    ) -> Result<ListPage, StoreError>;

    /// Moves one label by compare-and-swap.
    async fn move_label(&self, id: &SecretId, change: &LabelMove) -> Result<Written, StoreError>;

    /// Brings a pending version into use: AWSCURRENT moves from `from` to `to`, and AWSPENDING, which must be on `to`,
    /// goes ([`Labels::finish`](crate::secret::Labels::finish)). A store with transactions does both in one; what is
    /// here is for one without: it looks, then moves one label after the other, so that a move which is late by whole
    /// rotations can meet labels that stand as it expects.
    async fn promote(&self, id: &SecretId, from: &VersionId, to: &VersionId) -> Result<Written, StoreError> {
        let description = self.describe(id).await?;
        let holds = |label: &Label| {
            description.versions.iter().any(|version| version.id == *to && version.labels.contains(label))
        };
        let is_pending = holds(&Label::Pending);
        if !is_pending && !holds(&Label::Current) {
            let (label, found) = (Label::Pending, "another version or none".to_owned());
            return Err(LabelError::Moved { label, found, expected: format!("version {to}") }.into());
        }
        let change = LabelMove { label: Label::Current, from: Some(from.clone()), to: Some(to.clone()) };
        let written = self.move_label(id, &change).await?;
        let spent = LabelMove { label: Label::Pending, from: Some(to.clone()), to: None };
        if is_pending
            && let Err(error) = self.move_label(id, &spent).await
            && error.reason() != Reason::Conflict
        {
            // AWSCURRENT has moved, which is what was asked for; the label is found by the next look.
            tracing::debug!(%error, "AWSPENDING stays behind for now");
        }
        Ok(written)
    }

    /// Deletes a secret; it can be restored until the returned time.
    async fn delete(&self, id: &SecretId, window: RecoveryWindow) -> Result<Timestamp, StoreError>;

    /// Brings a deleted secret back.
    async fn restore(&self, id: &SecretId) -> Result<(), StoreError>;

    /// Whether the store answers at all; cheap enough for a health check.
    async fn ping(&self, environment: &EnvironmentName) -> Result<(), StoreError>;

    /// What it has asked of what is behind it. A store around a store tells what the one below it does.
    fn upstream(&self) -> Upstream {
        Upstream::default()
    }
}
