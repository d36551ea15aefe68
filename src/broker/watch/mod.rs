//! Who wants to hear of what becomes current, and how they are told.
//!
//! ```text
//! a secret changes ─▶ kv ─▶ Channel   one per environment: one watch of kv, and an index of who wants what
//!                              │ note(name, revision)
//!                              ▼
//!                            Seat     one per watcher: what it was not told yet, one entry per secret
//!                              │ pick, whenever the watcher asks
//!                              ▼
//!                          Watching ─▶ token, policy ─▶ cached store ─▶ record, durable ─▶ Told
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `feed` | the channels, the seats, the sweep |
//! | `bounds` | how many watches there may be, and what they may hold |
//! | `channel` | one environment: what changed last, who hears of it |
//! | `index` | what is known of its secrets, and which seats want what |
//! | `follow` | how a channel keeps up with kv |
//! | `seat` | one watcher's debts |
//! | `session` | telling, one thing at a time |
//! | `start` | who may watch what |
//! | `observed` | revisions for stores that have none |
//! | `look` | finding changes that such a store tells nobody of |
//!
//! INVARIANT: what is told of a secret is decided anew each time, and leaves after its record ([`Broker`]'s own rule).
//!
//! INVARIANT: with every [`Told`] goes a revision up to which nothing is left untold. A change enters a seat before the
//! channel moves past its revision, and leaves it after it was told; so the position is the oldest untold change less
//! one, or where the channel stands. A watcher that comes back is given every secret that changed after its revision,
//! from what is stored now and not from history: nothing can be compacted away. It may hear of something twice.
//!
//! A watcher is asked for, never pushed at: nothing is read, recorded or queued until it wants the next thing.
//! Meanwhile changes of one secret become one, so its debts are bounded by the number of names that it watches, and
//! those by [`Bounds`]. One that is owed something and does not ask for [`PATIENCE`] loses its seat and everything kept
//! for it in the [sweep](Feed::sweep), whether or not it ever asks again; where it does, it is told
//! [`Reason::SlowConsumer`]. A prefix that comes to cover more names than there is room for loses its seat too, with
//! [`Reason::LimitExceeded`].
//!
//! [`Broker`]: super::Broker
//! [`Reason::SlowConsumer`]: crate::error::Reason::SlowConsumer
//! [`Reason::LimitExceeded`]: crate::error::Reason::LimitExceeded

mod bounds;
mod channel;
mod feed;
mod follow;
mod index;
mod look;
mod observed;
mod seat;
mod session;
mod start;

use std::collections::BTreeSet;
use std::time::Duration;

use super::consumers::ConsumerName;
use super::{BrokerError, Disclosed};
use crate::kv::Revision;
use crate::secret::{EnvironmentName, SecretId, SecretName, VersionId};
use crate::store::StoreError;

pub use bounds::Bounds;
pub use feed::{Feed, Figures};
pub use session::Watching;

/// How many names one watch may have.
pub const MAX_NAMES: usize = 500;
/// How many watches there may be at a time, whoever has them.
pub const MAX_WATCHES: usize = 65_536;
/// How long a watcher may leave unasked for what it has to hear.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// After how much silence a watcher is told that nothing happened, and its token is looked at again.
pub const HEARTBEAT: Duration = Duration::from_secs(15);

/// What is watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// These secrets, whether or not they exist; 1 to [`MAX_NAMES`].
    Names(BTreeSet<SecretName>),
    /// Every secret that may be read and whose name starts with this, those that come to be later among them.
    Prefix(String),
}

/// What a watcher asks for.
#[derive(Debug, Clone)]
pub struct WatchRequest {
    /// The environment.
    pub environment: EnvironmentName,
    /// Which secrets of it.
    pub subject: Subject,
    /// Who watches, as it calls itself.
    pub consumer: ConsumerName,
    /// Only what changed after this revision; 0: first every secret as it is. One that is still to come belongs to
    /// another store, and counts as 0.
    pub after: Revision,
    /// Also the values.
    pub with_values: bool,
}

/// One thing that a watcher is told.
#[derive(Debug)]
pub struct Told {
    /// Everything up to here was told; to go on, watch after it. Never less than with what was told before.
    pub revision: Revision,
    /// What happened.
    pub event: Event,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// The watch is in place.
    Started {
        /// How many secrets are watched now.
        secrets: usize,
    },
    /// A version is current that the watcher was not told of.
    Changed {
        /// The secret; its value only where values were asked for.
        secret: Disclosed,
        /// How many changes of it before this one were left out.
        skipped: u64,
    },
    /// The secret was deleted, has no current version, or never was.
    Gone(SecretId),
    /// The secret can't be told.
    Problem {
        /// The secret.
        id: SecretId,
        /// Why.
        error: BrokerError,
    },
    /// Nothing, for a while.
    Progress,
}

/// What is known of a secret's current version without asking for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Current {
    /// It has this id.
    Version(VersionId),
    /// There is none.
    Gone,
    /// Something changed, and the store has to be asked what.
    Unknown,
}

/// Whether the store says that there is nothing current.
const fn is_absence(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::SecretNotFound(_) | StoreError::VersionNotFound { .. } | StoreError::SecretDeleted(_)
    )
}
