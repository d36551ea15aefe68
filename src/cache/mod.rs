//! A [`Store`] around a [`Store`]: a [`Cache`] remembers what the store of one environment said.
//!
//! ```text
//! get ─▶ memory ── fresh ─────────────────────────────────────────────▶ answer (source: cache)
//!           │   └── hot and nearly over ─▶ a fetch that nobody waits for   ▲
//!           │ miss                                                        │
//!           ▼                                                             │ the store can't be asked, and the age is
//!        tracker ── someone asks already: join ──┐                        │ within ttl + stale_for (stale: true)
//!           │ nobody does                        ▼                        │
//!           └──▶ fetch, in its own task ─▶ store ─▶ settle ─▶ everyone who waits
//!
//! put, move_label, delete, restore ─▶ void what is under way ─▶ store ─▶ void it again, forget the secret
//! ```
//!
//! INVARIANT: an answer is never replaced by an older one, also where the version is legitimately older (a rollback has
//! a newer revision). What was fetched before a change by this broker is not served to who asks after it.
//!
//! INVARIANT: a value is served past its time to live only while the store can't be asked (transient errors, throttling
//! included), no longer than `stale_for`, and the answer says so. That a secret is gone, deleted or refused is never
//! covered by a cached value, and evicts it.
//!
//! An answer that is hot (from its second hit on) and in the last fifth of its time to live is fetched anew ahead of
//! its end: once, by the rules of any other fetch, while readers go on getting what is remembered. Where the store can't
//! be asked, nothing changes until that time is over; where it says that the secret is gone or refused, that is that.
//!
//! Of secrets that are not to be cached nothing is kept, and each read asks the store. Those who ask at the same time
//! share one call, so an answer may be as old as that call takes; whoever needs to know what holds after asking says
//! [`Freshness::Refresh`].
//!
//! A hit takes no lock of ours: a lookup in the concurrent map, a scan of at most eight selectors, a reading of the
//! clock, a reading of how hot the answer is. It allocates the list of labels, the text of each label of the user's own
//! among them, and the future's box that the trait needs; value and version id are shared. A miss takes the lock of its
//! shard, never across an await.
//!
//! What is evicted is wiped when the last reference goes; the concurrent map may hold one until it is used again, or
//! [tidied](Cache::tidy).

mod asked;
mod entry;
mod fetch;
mod memory;
mod tracker;
mod write;

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;

pub use asked::MostAsked;

use crate::clock::SharedClock;
use crate::environment::{Environment, NamePattern};
use crate::secret::{EnvironmentName, LabelMove, SecretId, Selector, VersionId};
use crate::store::{
    Description, Fetched, Freshness, ListPage, ListRequest, Put, RecoveryWindow, Store, StoreError, Upstream,
    Written,
};
use asked::AskedFor;
use fetch::{Fetch, unavailable};
use memory::{Memory, Recalled};
use tracker::{Answer, Landing, Shard, Tracker};
use write::change;

/// Locks among which the secrets are spread. Only misses and writes take them.
const SHARDS: usize = 16;

/// How long and how much.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// How long an answer is served without asking again, less up to a tenth by chance. Zero: nothing is cached.
    pub ttl: Duration,
    /// How long an absence is believed. Zero: absences are not cached.
    pub negative_ttl: Duration,
    /// How long past its time to live an answer may stand in for a store that can't be asked.
    pub stale_for: Duration,
    /// Bytes of values and bookkeeping, beyond which what is used least is evicted.
    pub capacity_bytes: u64,
    /// How long the store may take to answer before it counts as unreachable; its own timeouts are shorter.
    pub answer_within: Duration,
    /// Secrets of which nothing is kept, neither values nor absences.
    pub uncached: Vec<NamePattern>,
}

impl Settings {
    /// 30 seconds.
    pub const ANSWER_WITHIN: Duration = Duration::from_secs(30);

    /// What an environment asks for, within `capacity_bytes`.
    #[must_use]
    pub fn of(environment: &Environment, capacity_bytes: u64) -> Self {
        Self {
            ttl: environment.ttl,
            negative_ttl: environment.negative_ttl,
            stale_for: environment.stale_for,
            capacity_bytes,
            answer_within: Self::ANSWER_WITHIN,
            uncached: environment.uncached.clone(),
        }
    }
}

/// What a cache has done since it was made, and what it holds now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Answers from the cache within their time to live.
    pub hits: u64,
    /// Questions that had to wait for the store, the joined ones too.
    pub misses: u64,
    /// Answers past their time to live, because the store could not be asked.
    pub stale: u64,
    /// Absences told from the cache.
    pub negative_hits: u64,
    /// Fetches begun before an answer's time to live was over, because it was hot.
    pub refreshes_ahead: u64,
    /// Calls that asked the store for values; a batch is one. Where the store itself calls something, its own calls.
    pub upstream_calls: u64,
    /// How many secrets this cache asked for: in a batch, each counts.
    pub upstream_secrets: u64,
    /// How many of those questions went along in a call which another had opened.
    pub coalesced: u64,
    /// Calls that waited for a quota, reads and others.
    pub quota_waits: u64,
    /// How long they did, all together.
    pub quota_waited: Duration,
    /// Calls that were not made, because they would have had to wait too long for a quota.
    pub quota_refusals: u64,
    /// Answers of the store to them that were errors other than an absence.
    pub upstream_errors: u64,
    /// Secrets held.
    pub entries: u64,
    /// What they weigh: values and an estimate of their bookkeeping.
    pub bytes: u64,
}

/// A cache around the store of one environment. Clones share what they hold.
#[derive(Clone)]
pub struct Cache {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<dyn Store>,
    clock: SharedClock,
    memory: Memory,
    shards: [Mutex<Shard>; SHARDS],
    spread: RandomState,
    counters: Counters,
    asked: AskedFor,
}

#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    stale: AtomicU64,
    negative_hits: AtomicU64,
    refreshes_ahead: AtomicU64,
    upstream_calls: AtomicU64,
    upstream_secrets: AtomicU64,
    upstream_errors: AtomicU64,
}

/// Where a question stands after the first look.
enum Asked {
    Answered(Answer),
    Waiting(Landing),
}

impl Cache {
    /// An empty cache around `inner`. Its methods need a Tokio runtime, of which they spawn tasks.
    #[must_use]
    pub fn new(inner: Arc<dyn Store>, settings: Settings, clock: SharedClock) -> Self {
        Self {
            inner: Arc::new(Inner {
                store: inner,
                clock,
                memory: Memory::new(settings),
                shards: std::array::from_fn(|_| Mutex::default()),
                spread: RandomState::new(),
                counters: Counters::default(),
                asked: AskedFor::default(),
            }),
        }
    }

    /// Forgets one secret, or with `None` all, absences too; gives of how many secrets there was an answer. What is being
    /// fetched meanwhile is answered, and not kept.
    pub fn purge(&self, id: Option<&SecretId>) -> u64 {
        let Inner { memory, shards, .. } = &*self.inner;
        if let Some(id) = id {
            let mut shard = self.inner.shard(id);
            if let Some(tracker) = shard.known(id) {
                tracker.void(None);
            }
            u64::from(memory.forget(id))
        } else {
            for shard in shards {
                locked(shard).all().for_each(|tracker| tracker.void(None));
            }
            memory.clear()
        }
    }

    /// Does the housekeeping that is due: evicts what is too much, and lets go of what was removed. A cache that is used
    /// does it now and then by itself, one that rests only here. Meant for every second or so; what was removed may
    /// take two or three rounds, as a reader may still be looking at it.
    pub fn tidy(&self) {
        self.inner.memory.tidy();
    }

    /// What the cache has done and holds. Also does the housekeeping that is due.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let counters = &self.inner.counters;
        let upstream = self.inner.store.upstream();
        let (entries, bytes) = self.inner.memory.size();
        Stats {
            hits: counters.hits.load(Relaxed),
            misses: counters.misses.load(Relaxed),
            stale: counters.stale.load(Relaxed),
            negative_hits: counters.negative_hits.load(Relaxed),
            refreshes_ahead: counters.refreshes_ahead.load(Relaxed),
            upstream_calls: upstream.value_calls.unwrap_or_else(|| counters.upstream_calls.load(Relaxed)),
            upstream_secrets: counters.upstream_secrets.load(Relaxed),
            coalesced: upstream.coalesced,
            quota_waits: upstream.quota_waits,
            quota_waited: upstream.quota_waited,
            quota_refusals: upstream.quota_refusals,
            upstream_errors: counters.upstream_errors.load(Relaxed),
            entries,
            bytes,
        }
    }

    /// The secrets that the store was asked for most often, at most so many, and how often all others were.
    #[must_use]
    pub fn most_asked(&self, most: usize) -> MostAsked {
        self.inner.asked.most(most)
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("settings", self.inner.memory.settings()).finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for Cache {
    async fn get(
        &self,
        id: &SecretId,
        selector: &Selector,
        freshness: Freshness,
    ) -> Result<Fetched, StoreError> {
        let mut ahead = Vec::new();
        let recalled = self.inner.recall(id, selector, freshness, &mut ahead);
        Fetch::launch(ahead, freshness);
        if let Some(answer) = recalled {
            return answer;
        }
        let mut fetches = Vec::new();
        let asked = self.inner.ask_or_join(id, selector, freshness, &mut fetches);
        Fetch::launch(fetches, freshness);
        self.inner.answer(id, selector, freshness, asked).await
    }

    async fn batch_get(
        &self,
        items: &[(SecretId, Selector)],
        freshness: Freshness,
    ) -> Vec<Result<Fetched, StoreError>> {
        let (mut fetches, mut ahead) = (Vec::new(), Vec::new());
        let mut landings: HashMap<&(SecretId, Selector), Landing> = HashMap::new();
        let mut questions = Vec::with_capacity(items.len());
        for item in items {
            let (id, selector) = item;
            let recalled = self.inner.recall(id, selector, freshness, &mut ahead);
            let asked = match (recalled, landings.get(item)) {
                (Some(answer), _) => Asked::Answered(answer),
                (None, Some(landing)) => Asked::Waiting(landing.clone()),
                (None, None) => self.inner.ask_or_join(id, selector, freshness, &mut fetches),
            };
            if let Asked::Waiting(landing) = &asked {
                landings.entry(item).or_insert_with(|| landing.clone());
            }
            questions.push(asked);
        }
        Fetch::launch(fetches, freshness);
        // In a call of their own: nobody waits for these.
        Fetch::launch(ahead, freshness);
        let mut answers = Vec::with_capacity(items.len());
        for ((id, selector), asked) in items.iter().zip(questions) {
            answers.push(self.inner.answer(id, selector, freshness, asked).await);
        }
        answers
    }

    async fn put(&self, id: &SecretId, put: Put) -> Result<Written, StoreError> {
        let (store, of) = self.inner.upstream(id);
        change(&self.inner, id, async move { store.put(&of, put).await }, Tracker::wrote).await
    }

    async fn describe(&self, id: &SecretId) -> Result<Description, StoreError> {
        self.inner.store.describe(id).await
    }

    async fn list(
        &self,
        environment: &EnvironmentName,
        request: &ListRequest,
    ) -> Result<ListPage, StoreError> {
        self.inner.store.list(environment, request).await
    }

    async fn move_label(&self, id: &SecretId, change_of: &LabelMove) -> Result<Written, StoreError> {
        let ((store, of), label_move) = (self.inner.upstream(id), change_of.clone());
        change(&self.inner, id, async move { store.move_label(&of, &label_move).await }, Tracker::wrote).await
    }

    async fn promote(&self, id: &SecretId, from: &VersionId, to: &VersionId) -> Result<Written, StoreError> {
        let ((store, of), from, to) = (self.inner.upstream(id), from.clone(), to.clone());
        change(&self.inner, id, async move { store.promote(&of, &from, &to).await }, Tracker::wrote).await
    }

    async fn delete(&self, id: &SecretId, window: RecoveryWindow) -> Result<Timestamp, StoreError> {
        let (store, of) = self.inner.upstream(id);
        let call = async move { store.delete(&of, window).await };
        change(&self.inner, id, call, |tracker, _, _| tracker.start_over()).await
    }

    async fn restore(&self, id: &SecretId) -> Result<(), StoreError> {
        let (store, of) = self.inner.upstream(id);
        let call = async move { store.restore(&of).await };
        change(&self.inner, id, call, |tracker, (), _| tracker.start_over()).await
    }

    async fn ping(&self, environment: &EnvironmentName) -> Result<(), StoreError> {
        self.inner.store.ping(environment).await
    }

    fn upstream(&self) -> Upstream {
        self.inner.store.upstream()
    }
}

impl Inner {
    /// What can be said at once, to who does not insist on the store. Adds to `ahead` what is to be fetched anew because
    /// of it.
    fn recall(
        self: &Arc<Self>,
        id: &SecretId,
        selector: &Selector,
        freshness: Freshness,
        ahead: &mut Vec<Fetch>,
    ) -> Option<Answer> {
        match freshness {
            Freshness::Cached => {
                let recalled = self.memory.recall(id, selector, self.clock.monotonic())?;
                if matches!(recalled, Recalled::Due(_)) {
                    ahead.extend(self.fetch_ahead(id, selector));
                }
                Some(self.count(recalled))
            }
            Freshness::Refresh => None,
        }
    }

    /// The fetch of what is nearly over, unless someone asks for it already.
    fn fetch_ahead(self: &Arc<Self>, id: &SecretId, selector: &Selector) -> Option<Fetch> {
        let mut shard = self.shard(id);
        if shard.known(id).is_some_and(|tracker| tracker.joinable(selector).is_some()) {
            return None;
        }
        self.counters.refreshes_ahead.fetch_add(1, Relaxed);
        let (fetch, _) = Fetch::begin(self, shard.tracker(id), id, selector, self.clock.monotonic());
        Some(fetch)
    }

    /// Joins whoever asks the store already, or adds to `fetches` what is to be asked. A refresh asks by itself: it
    /// wants to know what holds after it was called.
    fn ask_or_join(
        self: &Arc<Self>,
        id: &SecretId,
        selector: &Selector,
        freshness: Freshness,
        fetches: &mut Vec<Fetch>,
    ) -> Asked {
        let now = self.clock.monotonic();
        let mut shard = self.shard(id);
        if freshness == Freshness::Cached {
            // Once more, now that nobody can settle: the answer may have come since the first look, and is new then.
            if let Some(recalled) = self.memory.recall(id, selector, now) {
                return Asked::Answered(self.count(recalled));
            }
            if let Some(landing) = shard.known(id).and_then(|tracker| tracker.joinable(selector)) {
                if let Some(recalled) = self.memory.recall_while_retried(id, selector, now) {
                    return Asked::Answered(self.count(recalled));
                }
                self.counters.misses.fetch_add(1, Relaxed);
                return Asked::Waiting(landing);
            }
        }
        self.counters.misses.fetch_add(1, Relaxed);
        let (fetch, landing) = Fetch::begin(self, shard.tracker(id), id, selector, now);
        fetches.push(fetch);
        Asked::Waiting(landing)
    }

    /// The answer, once there is one; or where the store can't be asked, and a refresh was not insisted on, what is
    /// remembered within its bound.
    async fn answer(&self, id: &SecretId, selector: &Selector, freshness: Freshness, asked: Asked) -> Answer {
        let mut landing = match asked {
            Asked::Answered(answer) => return answer,
            Asked::Waiting(landing) => landing,
        };
        let told = landing.wait_for(Option::is_some).await.ok().and_then(|answer| answer.clone());
        match told.unwrap_or_else(|| Err(unavailable(id, "the fetch ended without an answer; try again"))) {
            Err(error) if error.is_transient() && freshness == Freshness::Cached => {
                let remembered = self.memory.fall_back(id, selector, self.clock.monotonic());
                remembered.map_or(Err(error), |recalled| self.count(recalled))
            }
            answer => answer,
        }
    }

    fn count(&self, recalled: Recalled) -> Answer {
        let Counters { hits, stale, negative_hits, .. } = &self.counters;
        let (counter, answer) = match recalled {
            Recalled::Fresh(fetched) | Recalled::Due(fetched) => (hits, Ok(fetched)),
            Recalled::Stale(fetched) => (stale, Ok(fetched)),
            Recalled::Absent(error) => (negative_hits, Err(error)),
        };
        counter.fetch_add(1, Relaxed);
        answer
    }

    #[expect(clippy::indexing_slicing, reason = "the index is a remainder of the length, which is not zero")]
    fn shard(&self, id: &SecretId) -> MutexGuard<'_, Shard> {
        locked(&self.shards[self.spread.hash_one(id) as usize % SHARDS])
    }

    /// The store and the secret, for a task that outlives its caller.
    fn upstream(&self, id: &SecretId) -> (Arc<dyn Store>, SecretId) {
        (Arc::clone(&self.store), id.clone())
    }
}

/// A panic under the lock leaves counts and flags at worst; the next write puts them right.
fn locked(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}
