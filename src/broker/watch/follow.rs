//! How a channel keeps up with kv, and how it knows that it did.
//!
//! ```text
//! catch_up: the revision, a watch from the next one on, everything that is there
//!    │            ▲
//!    ▼            │ the watch fell too far behind, or kv can't be asked: at the next tick
//! a change ─▶ seats, then past its revision
//! a tick   ─▶ nothing changed here since: past everything that changed elsewhere
//! ```
//!
//! The tick matters: the revision counts all keys. A watcher of an environment where nothing happens would else be left
//! with a revision from long ago.

use std::collections::BTreeSet;
use std::sync::Weak;
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::time::{MissedTickBehavior, interval};

use super::channel::{Channel, Origin};
use super::{Current, observed};
use crate::kv::{Entry, Event, KvError, Watch};
use crate::secret::SecretName;

const TICK: Duration = Duration::from_secs(2);
/// How many records are read at once.
const PAGE: usize = 500;

/// Follows until the channel is gone. What fails is tried again at the next tick.
pub(super) async fn follow(channel: Weak<Channel>, changes: Watch) {
    let mut changes = Some(changes);
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let heard = tokio::select! {
            heard = next(&mut changes) => Some(heard),
            _ = tick.tick() => None,
        };
        let Some(channel) = channel.upgrade() else { return };
        let done = match heard {
            Some(Some(Ok(event))) => channel.hear(&event).await,
            Some(Some(Err(error))) => Err(error),
            Some(None) => Err(ended()),
            None if changes.is_some() => channel.advance().await,
            None => channel.catch_up().await.map(|again| changes = Some(again)),
        };
        if let Err(error) = done {
            tracing::warn!(%error, environment = %channel.environment.name, "watchers hear of no changes for now");
            changes = None;
        }
    }
}

/// Waits for ever where nothing is followed.
async fn next(changes: &mut Option<Watch>) -> Option<Result<Event, KvError>> {
    match changes {
        Some(changes) => changes.next().await,
        None => std::future::pending().await,
    }
}

fn ended() -> KvError {
    KvError::Unavailable { doing: "watching", cause: "the watch ended".to_owned() }
}

impl Channel {
    /// Learns what there is and what changed since it last knew; gives the changes from there on.
    pub(super) async fn catch_up(&self) -> Result<Watch, KvError> {
        let revision = self.kv.revision().await?;
        let prefix = self.prefix();
        // Before the records are read: what changes meanwhile is told twice, and not missed.
        let changes = self.kv.watch(&prefix, revision.saturating_add(1)).await?;
        let mut gone: BTreeSet<SecretName> = self.known_under("").into_iter().collect();
        let mut after = Vec::new();
        loop {
            let page = self.kv.range(&prefix, &after, PAGE).await?;
            for entry in &page.entries {
                self.meet(entry, &mut gone);
            }
            match page.entries.last() {
                Some(last) if page.more => after.clone_from(&last.key),
                _ => break,
            }
        }
        for name in gone {
            self.learn(&name, revision.max(1), None);
        }
        self.pass(revision);
        Ok(changes)
    }

    fn meet(&self, entry: &Entry, gone: &mut BTreeSet<SecretName>) {
        let Some(name) = self.name(&entry.key) else { return };
        gone.remove(&name);
        let current = match self.origin {
            Origin::Sealed => Current::Unknown,
            Origin::Observed => observed::decode(&entry.value),
        };
        self.learn(&name, entry.mod_revision, Some(current));
    }

    /// INVARIANT: no other key under the prefix changes with the same revision, so that after this one all are told.
    async fn hear(&self, event: &Event) -> Result<(), KvError> {
        if let Some(name) = self.name(&event.key) {
            let current = match (event.deleted, self.origin) {
                (true, _) => None,
                (false, Origin::Sealed) => Some(Current::Unknown),
                (false, Origin::Observed) => Some(observed::read(self.kv.as_ref(), &self.id(&name)).await?),
            };
            self.learn(&name, event.revision, current);
        }
        self.pass(event.revision);
        Ok(())
    }

    /// Moves past what changed in other places, where nothing changed in this one.
    async fn advance(&self) -> Result<(), KvError> {
        let revision = self.kv.revision().await?;
        // Asked after the revision: nothing up to that can be missing in it.
        let changed = self.kv.get(&self.mark()).await?.map_or(0, |entry| entry.mod_revision);
        if changed <= self.seen() {
            self.pass(revision);
        }
        Ok(())
    }
}
