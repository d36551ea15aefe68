//! One question to the store, from the caller who is first to ask it to everyone who waits for the answer.
//!
//! ```text
//! begin (registered, joinable) ─▶ launch (a task of its own) ─▶ the store ─▶ verdict ─▶ settle ─▶ everyone is told
//! ```
//!
//! The task outlives whoever began it: a caller who goes away takes nothing from those who stay.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::watch;

use super::Inner;
use super::tracker::{Answer, Landing, Standing, Tracker, Verdict};
use crate::secret::{SecretId, Selector, VersionId};
use crate::store::{Freshness, StoreError};

/// A question under way. Dropping it, also by a panic of the store, ends the wait of everyone who joined.
pub(super) struct Fetch {
    cache: Arc<Inner>,
    id: SecretId,
    selector: Selector,
    number: u64,
    asked_at: Duration,
    tell: watch::Sender<Option<Answer>>,
}

impl Fetch {
    /// Registers a question with the secret's tracker.
    pub(super) fn begin(
        cache: &Arc<Inner>,
        tracker: &mut Tracker,
        id: &SecretId,
        selector: &Selector,
        asked_at: Duration,
    ) -> (Self, Landing) {
        let (tell, landing) = watch::channel(None);
        let number = tracker.fetch_began(selector.clone(), landing.clone());
        let fetch = Self {
            cache: Arc::clone(cache),
            id: id.clone(),
            selector: selector.clone(),
            number,
            asked_at,
            tell,
        };
        (fetch, landing)
    }

    /// Asks the store all of `fetches` in one call.
    pub(super) fn launch(fetches: Vec<Self>, freshness: Freshness) {
        let Some(cache) = fetches.first().map(|fetch| Arc::clone(&fetch.cache)) else { return };
        tokio::spawn(async move {
            let items = fetches.iter().map(|fetch| (fetch.id.clone(), fetch.selector.clone())).collect();
            let answers = cache.ask(items, freshness).await;
            join_all(fetches.into_iter().zip(answers).map(|(fetch, answer)| fetch.conclude(answer))).await;
        });
    }

    async fn conclude(self, mut answer: Answer) {
        let keep = match self.verdict(&mut answer) {
            Verdict::Keep => true,
            Verdict::Pass => false,
            Verdict::Instead(version) => {
                answer = self.present(version).await;
                true
            }
        };
        self.settle(&answer, keep);
        let tell = self.tell.clone();
        // First off the register, then told: whoever has the answer can't join the question any more.
        drop(self);
        tell.send_replace(Some(answer));
    }

    fn verdict(&self, answer: &mut Answer) -> Verdict {
        let now = self.cache.clock.monotonic();
        self.cache.shard(&self.id).tracker(&self.id).verdict(&self.selector, answer, now)
    }

    /// The answer where the store still tells what was before a write of this broker: the version that was written,
    /// asked by its id, under the label that it was given.
    async fn present(&self, version: VersionId) -> Answer {
        let items = vec![(self.id.clone(), Selector::Version(version.clone()))];
        match self.cache.ask(items, Freshness::Refresh).await.pop() {
            Some(Ok(mut fetched)) => {
                let labels = &mut fetched.version.labels;
                if let Selector::Label(label) = &self.selector
                    && !labels.contains(label)
                {
                    labels.push(label.clone());
                    labels.sort_unstable();
                }
                Ok(fetched)
            }
            Some(Err(StoreError::VersionNotFound { .. })) | None => {
                let cause = format!(
                    "it does not show version {version} yet, which was written a moment ago; try again"
                );
                Err(unavailable(&self.id, cause))
            }
            Some(Err(error)) => Err(error),
        }
    }

    /// Takes note of what the store said: what may be kept is, what it proves wrong goes.
    ///
    /// INVARIANT: all of it happens under the secret's lock, and before anyone is told.
    fn settle(&self, answer: &Answer, keep: bool) {
        let Self { cache, id, selector, asked_at, .. } = self;
        let now = cache.clock.monotonic();
        let mut shard = cache.shard(id);
        let tracker = shard.tracker(id);
        let standing = tracker.standing(self.number);
        match answer {
            Ok(fetched) => {
                let newest = tracker.learn(fetched.order);
                if newest && keep && standing != Standing::Void {
                    cache.memory.remember(id, selector, fetched, *asked_at);
                } else if newest {
                    cache.memory.distrust(id, selector, fetched.order);
                }
            }
            Err(error) if error.is_transient() => cache.memory.hold_back(id, now),
            Err(error) => {
                let whole = concerns_whole_secret(error);
                let only = (!whole).then_some(selector);
                tracker.void(only);
                match only {
                    None => _ = cache.memory.forget(id),
                    Some(selector) => cache.memory.forget_selector(id, selector),
                }
                if keep && standing == Standing::Timely && is_absence(error) {
                    cache.memory.remember_absence(id, only, *asked_at, now);
                }
            }
        }
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        let now = self.cache.clock.monotonic();
        let mut shard = self.cache.shard(&self.id);
        shard.tracker(&self.id).fetch_ended(self.number);
        shard.release(&self.id, now);
    }
}

impl Inner {
    /// Asks the store, one call for all `items`; an answer for each that the store gave one for.
    async fn ask(&self, items: Vec<(SecretId, Selector)>, freshness: Freshness) -> Vec<Answer> {
        let count = |number: usize| number.try_into().unwrap_or(u64::MAX);
        self.counters.upstream_calls.fetch_add(1, Relaxed);
        self.counters.upstream_secrets.fetch_add(count(items.len()), Relaxed);
        let asked = async {
            match items.as_slice() {
                [(id, selector)] => vec![self.store.get(id, selector, freshness).await],
                many => self.store.batch_get(many, freshness).await,
            }
        };
        let longest = self.memory.settings().answer_within;
        let answers = tokio::time::timeout(longest, asked).await.unwrap_or_else(|_| {
            let cause = || format!("no answer within {longest:?}");
            let late = |(id, _): &(SecretId, Selector)| unavailable(id, cause());
            items.iter().map(|item| Err(late(item))).collect()
        });
        let failed =
            answers.iter().filter(|answer| matches!(answer, Err(error) if !is_absence(error))).count();
        self.counters.upstream_errors.fetch_add(count(failed), Relaxed);
        self.asked.count(items.iter().zip(&answers).map(|((id, _), answer)| (id, answer.is_ok())));
        answers
    }
}

pub(super) fn unavailable(id: &SecretId, cause: impl Into<String>) -> StoreError {
    StoreError::Unavailable { environment: id.environment.clone(), cause: cause.into() }
}

const fn is_absence(error: &StoreError) -> bool {
    matches!(error, StoreError::SecretNotFound(_) | StoreError::VersionNotFound { .. })
}

/// Whether nothing of the secret may be served any more. Otherwise the error is about one selector: who asks for
/// versions that don't exist must not evict those that do.
const fn concerns_whole_secret(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::SecretNotFound(_)
            | StoreError::SecretDeleted(_)
            | StoreError::Denied { .. }
            | StoreError::Tampered { .. }
            | StoreError::WrongKey(_)
    )
}
