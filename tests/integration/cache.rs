//! The cache against a scripted store: an in-memory one that counts its calls and can be held, lag, fail and lose
//! acknowledgements. What is under test is the cache; the stores themselves have their conformance suite. At the end the
//! cache within a broker: who may purge it, and that policy stands before it.
//!
//! A test named `b7_…` is the proof of row B7 of the catalogue of what breaks around a cache.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use claviger::cache::{Cache, Settings};
use claviger::clock::ManualClock;
use claviger::environment::{Environment, NamePattern, Registry};
use claviger::error::{Reason, Reasoned as _};
use claviger::policy::{PolicySource, Resource};
use claviger::secret::{
    EnvironmentName, Label, LabelMove, Labels, SecretId, SecretValue, Selector, Version, VersionId,
};
use claviger::store::{
    Description, Fetched, Freshness, ListPage, ListRequest, Order, Put, RecoveryWindow, Source, Store,
    StoreError, Written,
};
use jiff::Timestamp;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, yield_now};

use crate::support::assembled::{
    administrator, clock, get, person, put as put_text, records, resolved, start,
};
use crate::support::program::Served;

const CURRENT: Selector = Selector::CURRENT;
const PREVIOUS: Selector = Selector::Label(Label::Previous);
const TTL: Duration = Duration::from_secs(60);
const PAST_TTL: Duration = Duration::from_secs(61);
const STALE_FOR: Duration = Duration::from_secs(600);
const NEGATIVE_TTL: Duration = Duration::from_secs(5);
const LONGEST_HOLD_BACK: Duration = Duration::from_secs(5);
/// Within the last fifth of a time to live, whether or not chance has shortened it by a tenth.
const NEARLY_OVER: Duration = Duration::from_secs(52);

type Fault = fn(&SecretId) -> StoreError;

fn outage(id: &SecretId) -> StoreError {
    StoreError::Unavailable { environment: id.environment.clone(), cause: "scripted".to_owned() }
}

fn throttled(id: &SecretId) -> StoreError {
    StoreError::Throttled { environment: id.environment.clone(), cause: "scripted".to_owned() }
}

fn denied(id: &SecretId) -> StoreError {
    StoreError::Denied { environment: id.environment.clone(), cause: "scripted".to_owned() }
}

fn id(name: &str) -> SecretId {
    SecretId::parse("production", name).unwrap()
}

fn version(n: u64) -> VersionId {
    VersionId::parse(&format!("{n:032}")).unwrap()
}

fn put(n: u64) -> Put {
    let value = SecretValue::text(format!("value {n}")).unwrap();
    Put { value, token: version(n), labels: Vec::new(), expected: None }
}

/// Holds one answer back until it is opened.
struct Gate {
    reached: Semaphore,
    opened: Semaphore,
}

impl Gate {
    async fn reached(&self) {
        self.reached.acquire().await.unwrap().forget();
    }

    fn open(&self) {
        self.opened.add_permits(1);
    }

    async fn pass(&self) {
        self.reached.add_permits(1);
        self.opened.acquire().await.unwrap().forget();
    }
}

#[derive(Default)]
struct Gates(Mutex<VecDeque<Arc<Gate>>>);

impl Gates {
    fn hold_next(&self) -> Arc<Gate> {
        let gate = Arc::new(Gate { reached: Semaphore::new(0), opened: Semaphore::new(0) });
        self.0.lock().unwrap().push_back(Arc::clone(&gate));
        gate
    }

    async fn pass(&self) {
        let gate = self.0.lock().unwrap().pop_front();
        if let Some(gate) = gate {
            gate.pass().await;
        }
    }
}

#[derive(Clone, Default)]
struct Kept {
    labels: Labels,
    versions: BTreeMap<VersionId, SecretValue>,
    revision: u64,
    deleted: bool,
}

#[derive(Clone, Default)]
struct World {
    secrets: HashMap<SecretId, Kept>,
    revision: u64,
}

impl World {
    fn read(&self, id: &SecretId, selector: &Selector, numbered: bool) -> Result<Fetched, StoreError> {
        let kept = self.secrets.get(id).ok_or_else(|| StoreError::SecretNotFound(id.clone()))?;
        if kept.deleted {
            return Err(StoreError::SecretDeleted(id.clone()));
        }
        let holder = match selector {
            Selector::Label(label) => kept.labels.holder(label),
            Selector::Version(version) => Some(version),
        };
        let found = holder.and_then(|holder| kept.versions.get_key_value(holder));
        let (holder, value) = found
            .ok_or_else(|| StoreError::VersionNotFound { id: id.clone(), selector: selector.clone() })?;
        Ok(Fetched {
            version: described(kept, holder),
            value: value.clone(),
            order: if numbered { Order::Revision(kept.revision) } else { Order::Unknown },
            source: Source::Store,
            age: Duration::ZERO,
            stale: false,
        })
    }
}

fn described(kept: &Kept, holder: &VersionId) -> Version {
    Version { id: holder.clone(), labels: kept.labels.of(holder), created_at: Timestamp::UNIX_EPOCH }
}

#[derive(Default)]
struct Scripted {
    world: Mutex<World>,
    /// What reads by label see instead of the world; with `true`, reads by version id too.
    lag: Mutex<Option<(World, bool)>>,
    unnumbered: bool,
    read_fault: Mutex<Option<Fault>>,
    write_fault: Mutex<Option<Fault>>,
    lose_next_acknowledgement: AtomicBool,
    panic_next: AtomicBool,
    reads: Gates,
    writes: Gates,
    gets: AtomicU64,
    batches: AtomicU64,
    last_batch: AtomicUsize,
    /// Whether tasks take turns at every step, for the sake of unlikely orders.
    jumbled: bool,
    turns: AtomicU64,
}

impl Scripted {
    fn gets(&self) -> u64 {
        self.gets.load(SeqCst)
    }

    fn fail_reads(&self, fault: Option<Fault>) {
        *self.read_fault.lock().unwrap() = fault;
    }

    /// From now on reads see what is now, whatever is written.
    fn lag(&self, versions_too: bool) {
        *self.lag.lock().unwrap() = Some((self.world.lock().unwrap().clone(), versions_too));
    }

    fn catch_up(&self) {
        *self.lag.lock().unwrap() = None;
    }

    fn read(&self, id: &SecretId, selector: &Selector) -> Result<Fetched, StoreError> {
        if let Some(fault) = *self.read_fault.lock().unwrap() {
            return Err(fault(id));
        }
        let by_id = matches!(selector, Selector::Version(_));
        match &*self.lag.lock().unwrap() {
            Some((world, versions_too)) if *versions_too || !by_id => {
                world.read(id, selector, !self.unnumbered)
            }
            _ => self.world.lock().unwrap().read(id, selector, !self.unnumbered),
        }
    }

    async fn jumble(&self) {
        if self.jumbled {
            for _ in 0..self.turns.fetch_add(1, SeqCst) * 7 % 5 {
                yield_now().await;
            }
        }
    }

    /// Changes a secret as its own `change` says, and numbers it.
    async fn write<T>(
        &self,
        id: &SecretId,
        change: impl FnOnce(&mut Kept, Order) -> Result<T, StoreError> + Send,
    ) -> Result<T, StoreError> {
        if let Some(fault) = *self.write_fault.lock().unwrap() {
            return Err(fault(id));
        }
        self.jumble().await;
        let changed = {
            let mut world = self.world.lock().unwrap();
            world.revision += 1;
            let revision = world.revision;
            let mut kept = world.secrets.get(id).cloned().unwrap_or_default();
            let order = if self.unnumbered { Order::Unknown } else { Order::Revision(revision) };
            let changed = change(&mut kept, order);
            if changed.is_ok() {
                kept.revision = revision;
                world.secrets.insert(id.clone(), kept);
            }
            changed
        };
        self.jumble().await;
        self.writes.pass().await;
        if self.lose_next_acknowledgement.swap(false, SeqCst) {
            return Err(outage(id));
        }
        changed
    }
}

/// What became of AWSCURRENT between two sets of labels.
fn written(kept: &Kept, before: &Labels, id: &VersionId, order: Order) -> Written {
    let now = kept.labels.holder(&Label::Current);
    let superseded = before.holder(&Label::Current).filter(|before| now != Some(*before)).cloned();
    Written { version: described(kept, id), superseded, order, changed: true }
}

#[async_trait]
impl Store for Scripted {
    async fn get(&self, id: &SecretId, selector: &Selector, _: Freshness) -> Result<Fetched, StoreError> {
        self.gets.fetch_add(1, SeqCst);
        assert!(!self.panic_next.swap(false, SeqCst), "scripted panic");
        self.jumble().await;
        let answer = self.read(id, selector);
        self.jumble().await;
        self.reads.pass().await;
        answer
    }

    async fn batch_get(
        &self,
        items: &[(SecretId, Selector)],
        _: Freshness,
    ) -> Vec<Result<Fetched, StoreError>> {
        self.batches.fetch_add(1, SeqCst);
        self.last_batch.store(items.len(), SeqCst);
        self.jumble().await;
        let answers = items.iter().map(|(id, selector)| self.read(id, selector)).collect();
        self.jumble().await;
        self.reads.pass().await;
        answers
    }

    async fn put(&self, id: &SecretId, put: Put) -> Result<Written, StoreError> {
        self.write(id, |kept, order| {
            let current = kept.labels.holder(&Label::Current).cloned();
            if put.expected.is_some_and(|expected| expected != current) {
                return Err(StoreError::Conflict { id: id.clone(), found: format!("{current:?}") });
            }
            let before = kept.labels.clone();
            kept.labels = before.put(&put.token, &put.labels)?;
            kept.versions.insert(put.token.clone(), put.value);
            Ok(written(kept, &before, &put.token, order))
        })
        .await
    }

    async fn describe(&self, id: &SecretId) -> Result<Description, StoreError> {
        let world = self.world.lock().unwrap();
        let kept = world.secrets.get(id).ok_or_else(|| StoreError::SecretNotFound(id.clone()))?;
        Ok(Description {
            name: id.name.clone(),
            versions: kept.versions.keys().map(|version| described(kept, version)).collect(),
            created_at: Timestamp::UNIX_EPOCH,
            changed_at: Timestamp::UNIX_EPOCH,
            deletion_at: None,
            order: Order::Revision(kept.revision),
        })
    }

    async fn list(&self, _: &EnvironmentName, _: &ListRequest) -> Result<ListPage, StoreError> {
        Ok(ListPage::default())
    }

    async fn move_label(&self, id: &SecretId, change: &LabelMove) -> Result<Written, StoreError> {
        self.write(id, |kept, order| {
            let before = kept.labels.clone();
            kept.labels = before.apply(change)?;
            let of = change.to.as_ref().or(change.from.as_ref()).unwrap();
            Ok(written(kept, &before, of, order))
        })
        .await
    }

    async fn delete(&self, id: &SecretId, _: RecoveryWindow) -> Result<Timestamp, StoreError> {
        self.write(id, |kept, _| {
            kept.deleted = true;
            Ok(Timestamp::MAX)
        })
        .await
    }

    async fn restore(&self, id: &SecretId) -> Result<(), StoreError> {
        self.write(id, |kept, _| {
            kept.deleted = false;
            Ok(())
        })
        .await
    }

    async fn ping(&self, _: &EnvironmentName) -> Result<(), StoreError> {
        Ok(())
    }
}

struct House {
    store: Arc<Scripted>,
    clock: Arc<ManualClock>,
    cache: Cache,
}

const SETTINGS: Settings = Settings {
    ttl: TTL,
    negative_ttl: NEGATIVE_TTL,
    stale_for: STALE_FOR,
    capacity_bytes: 1 << 20,
    answer_within: Settings::ANSWER_WITHIN,
    uncached: Vec::new(),
};

impl House {
    fn new() -> Self {
        Self::with(Scripted::default(), SETTINGS)
    }

    /// Around a store that does not number its changes.
    fn unnumbered() -> Self {
        Self::with(Scripted { unnumbered: true, ..Scripted::default() }, SETTINGS)
    }

    fn with(store: Scripted, settings: Settings) -> Self {
        let store = Arc::new(store);
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        let cache = Cache::new(Arc::clone(&store) as Arc<dyn Store>, settings, Arc::clone(&clock) as _);
        Self { store, clock, cache }
    }

    /// As someone else would, past the cache.
    async fn seed(&self, name: &str, n: u64) {
        self.store.put(&id(name), put(n)).await.unwrap();
    }

    async fn put(&self, name: &str, n: u64) -> Written {
        self.cache.put(&id(name), put(n)).await.unwrap()
    }

    async fn get(&self, name: &str) -> Result<Fetched, StoreError> {
        self.cache.get(&id(name), &CURRENT, Freshness::Cached).await
    }

    /// The version that the cache says is current.
    async fn current(&self, name: &str) -> VersionId {
        self.get(name).await.unwrap().version.id
    }

    async fn refresh(&self, name: &str) -> Result<Fetched, StoreError> {
        self.cache.get(&id(name), &CURRENT, Freshness::Refresh).await
    }

    async fn reason(&self, name: &str) -> Reason {
        self.get(name).await.unwrap_err().reason()
    }

    fn spawn_get(&self, name: &'static str) -> JoinHandle<Result<Fetched, StoreError>> {
        let cache = self.cache.clone();
        tokio::spawn(async move { cache.get(&id(name), &CURRENT, Freshness::Cached).await })
    }

    /// Waits until so many questions wait for the store, or did.
    async fn until_misses(&self, misses: u64) {
        for _ in 0..1_000_000 {
            if self.cache.stats().misses >= misses {
                return;
            }
            yield_now().await;
        }
        panic!("only {} of {misses} questions arrived", self.cache.stats().misses);
    }

    /// Lets the tasks of this runtime do what they can: none of them waits for time.
    async fn settle(&self) {
        for _ in 0..1_000 {
            yield_now().await;
        }
    }

    /// Has a secret fetched, and read so often that it is hot; then lets time pass until its time to live is nearly over.
    async fn heat(&self, name: &str) {
        for _ in 0..3 {
            self.current(name).await;
        }
        self.clock.advance(NEARLY_OVER);
    }
}

#[tokio::test]
async fn b4_a_thousand_who_ask_at_once_cost_one_call() {
    let house = House::new();
    house.seed("a", 1).await;
    let gate = house.store.reads.hold_next();
    let callers: Vec<_> = (0..1_000).map(|_| house.spawn_get("a")).collect();
    house.until_misses(1_000).await;
    gate.open();
    for caller in callers {
        let fetched = caller.await.unwrap().unwrap();
        assert_eq!((fetched.version.id, fetched.source), (version(1), Source::Store));
    }
    assert_eq!(house.store.gets(), 1);
    assert_eq!(house.get("a").await.unwrap().source, Source::Cache);
}

#[tokio::test]
async fn b5_who_goes_away_takes_nothing_from_who_stays() {
    let house = House::new();
    house.seed("a", 1).await;
    let gate = house.store.reads.hold_next();
    let first = house.spawn_get("a");
    gate.reached().await;
    let others: Vec<_> = (0..10).map(|_| house.spawn_get("a")).collect();
    house.until_misses(11).await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    gate.open();
    for other in others {
        assert_eq!(other.await.unwrap().unwrap().version.id, version(1));
    }
    assert_eq!(house.store.gets(), 1);
}

#[tokio::test]
async fn b5_what_nobody_waits_for_any_more_is_still_learnt() {
    let house = House::new();
    house.seed("a", 1).await;
    let gate = house.store.reads.hold_next();
    let only = house.spawn_get("a");
    gate.reached().await;
    only.abort();
    assert!(only.await.unwrap_err().is_cancelled());
    gate.open();
    let fetched = house.get("a").await.unwrap();
    assert_eq!(fetched.version.id, version(1));
    assert_eq!(house.store.gets(), 1, "joined, or found");
}

#[tokio::test]
async fn b6_a_store_that_panics_ends_the_wait_and_not_the_cache() {
    let house = House::new();
    house.seed("a", 1).await;
    house.store.panic_next.store(true, SeqCst);
    assert_eq!(house.reason("a").await, Reason::StoreUnavailable);
    assert_eq!(house.current("a").await, version(1));
}

#[tokio::test]
async fn b6_a_store_that_hangs_ends_the_wait_of_all_and_is_asked_again() {
    let settings = Settings { answer_within: Duration::from_millis(50), ..SETTINGS };
    let house = House::with(Scripted::default(), settings);
    house.seed("a", 1).await;
    let never_opened = house.store.reads.hold_next();
    let callers: Vec<_> = (0..10).map(|_| house.spawn_get("a")).collect();
    never_opened.reached().await;
    house.until_misses(10).await;
    for caller in callers {
        assert_eq!(caller.await.unwrap().unwrap_err().reason(), Reason::StoreUnavailable);
    }
    assert_eq!(house.store.gets(), 1);
    assert_eq!(house.current("a").await, version(1));
    assert_eq!(house.store.gets(), 2);
}

#[tokio::test]
async fn an_answer_is_good_for_nine_tenths_of_its_time_at_least_and_never_longer_than_all_of_it() {
    let house = House::new();
    for name in ["a", "b", "c", "d"] {
        house.seed(name, 1).await;
        house.current(name).await;
    }
    house.clock.advance(TTL * 9 / 10 - Duration::from_millis(1));
    for name in ["a", "b", "c", "d"] {
        let fetched = house.get(name).await.unwrap();
        assert_eq!((fetched.source, fetched.stale), (Source::Cache, false));
        assert_eq!(fetched.age, TTL * 9 / 10 - Duration::from_millis(1));
    }
    house.clock.advance(TTL / 10 + Duration::from_millis(1));
    for name in ["a", "b", "c", "d"] {
        assert_eq!(house.get(name).await.unwrap().source, Source::Store);
    }
}

#[tokio::test]
async fn b1_stale_is_bounded_and_said() {
    let house = House::new();
    house.seed("a", 1).await;
    house.current("a").await;
    house.store.fail_reads(Some(outage));
    house.clock.advance(PAST_TTL);
    let fetched = house.get("a").await.unwrap();
    assert_eq!((fetched.source, fetched.stale, fetched.age), (Source::Cache, true, PAST_TTL));
    house.clock.advance(TTL + STALE_FOR - PAST_TTL);
    let fetched = house.get("a").await.unwrap();
    assert_eq!((fetched.stale, fetched.age), (true, TTL + STALE_FOR));
    assert_eq!(house.cache.stats().stale, 2);
    house.clock.advance(Duration::from_millis(1));
    assert_eq!(house.reason("a").await, Reason::StoreUnavailable);
    house.store.fail_reads(None);
    let fetched = house.get("a").await.unwrap();
    assert_eq!((fetched.source, fetched.stale), (Source::Store, false));
}

#[tokio::test]
async fn b1_a_held_back_store_does_not_stretch_the_bound_on_staleness() {
    let house = House::new();
    house.seed("a", 1).await;
    house.current("a").await;
    house.store.fail_reads(Some(outage));
    house.clock.advance(TTL + STALE_FOR);
    assert!(house.get("a").await.unwrap().stale);
    house.clock.advance(Duration::from_millis(1));
    assert_eq!(house.reason("a").await, Reason::StoreUnavailable);
}

#[tokio::test]
async fn b3_throttling_is_an_outage_too() {
    let house = House::new();
    house.seed("a", 1).await;
    house.current("a").await;
    house.store.fail_reads(Some(throttled));
    house.clock.advance(PAST_TTL);
    assert!(house.get("a").await.unwrap().stale);
    house.clock.advance(STALE_FOR);
    assert_eq!(house.reason("a").await, Reason::StoreThrottled);
}

#[tokio::test]
async fn b3_an_outage_does_not_cost_every_request_a_try() {
    let house = House::new();
    house.seed("a", 1).await;
    house.current("a").await;
    house.store.fail_reads(Some(outage));
    house.clock.advance(PAST_TTL);
    for window in 0..5 {
        for _ in 0..20 {
            assert!(house.get("a").await.unwrap().stale);
        }
        assert_eq!(house.store.gets(), 2 + window, "one try per window");
        house.clock.advance(LONGEST_HOLD_BACK);
    }
    house.store.fail_reads(None);
    assert_eq!(house.get("a").await.unwrap().source, Source::Store, "the store is found back");
    assert_eq!(house.get("a").await.unwrap().source, Source::Cache);
}

#[tokio::test]
async fn while_one_tries_whether_a_failed_store_is_back_the_others_are_served() {
    let house = House::new();
    house.seed("a", 1).await;
    house.current("a").await;
    house.store.fail_reads(Some(outage));
    house.clock.advance(PAST_TTL);
    assert!(house.get("a").await.unwrap().stale);
    house.clock.advance(LONGEST_HOLD_BACK);
    let gate = house.store.reads.hold_next();
    let trying = house.spawn_get("a");
    gate.reached().await;
    assert!(house.get("a").await.unwrap().stale);
    gate.open();
    assert!(trying.await.unwrap().unwrap().stale);
}

#[tokio::test]
async fn b2_gone_deleted_and_denied_are_never_covered_by_a_cached_value() {
    let faults: [(Fault, Reason); 4] = [
        (|id| StoreError::SecretNotFound(id.clone()), Reason::SecretNotFound),
        (|id| StoreError::SecretDeleted(id.clone()), Reason::SecretDeleted),
        (denied, Reason::StoreDenied),
        (|_| StoreError::Tampered { what: "scripted".to_owned() }, Reason::Tampered),
    ];
    for (fault, reason) in faults {
        let house = House::new();
        house.seed("a", 1).await;
        house.current("a").await;
        house.clock.advance(PAST_TTL);
        house.store.fail_reads(Some(fault));
        assert_eq!(house.reason("a").await, reason);
        house.clock.advance(NEGATIVE_TTL);
        house.store.fail_reads(Some(outage));
        assert_eq!(house.reason("a").await, Reason::StoreUnavailable, "{reason} evicts");
    }
}

#[tokio::test]
async fn b2_what_a_refresh_learns_to_be_gone_is_gone_for_all() {
    let house = House::new();
    house.seed("a", 1).await;
    house.current("a").await;
    house.store.fail_reads(Some(denied));
    assert_eq!(house.refresh("a").await.unwrap_err().reason(), Reason::StoreDenied);
    assert_eq!(house.reason("a").await, Reason::StoreDenied);
}

#[tokio::test]
async fn a_value_fetched_before_a_denial_is_neither_joined_nor_kept() {
    let house = House::new();
    house.seed("a", 1).await;
    let gate = house.store.reads.hold_next();
    let early = house.spawn_get("a");
    gate.reached().await;
    house.store.fail_reads(Some(denied));
    assert_eq!(house.refresh("a").await.unwrap_err().reason(), Reason::StoreDenied);
    assert_eq!(house.reason("a").await, Reason::StoreDenied, "not joined");
    gate.open();
    assert!(early.await.unwrap().is_ok(), "it was asked before");
    assert_eq!(house.reason("a").await, Reason::StoreDenied, "not kept");
}

#[tokio::test]
async fn b7_absences_are_believed_for_a_moment_and_a_put_ends_them() {
    let house = House::new();
    for _ in 0..10 {
        assert_eq!(house.reason("a").await, Reason::SecretNotFound);
    }
    assert_eq!((house.store.gets(), house.cache.stats().negative_hits), (1, 9));
    house.put("a", 1).await;
    assert_eq!(house.current("a").await, version(1));

    let previous = house.cache.get(&id("a"), &PREVIOUS, Freshness::Cached).await;
    assert_eq!(previous.unwrap_err().reason(), Reason::VersionNotFound);
    house.put("a", 2).await;
    let previous = house.cache.get(&id("a"), &PREVIOUS, Freshness::Cached).await;
    assert_eq!(previous.unwrap().version.id, version(1));

    assert_eq!(house.reason("b").await, Reason::SecretNotFound);
    house.seed("b", 1).await;
    assert_eq!(house.reason("b").await, Reason::SecretNotFound, "made by someone else");
    house.clock.advance(NEGATIVE_TTL);
    assert_eq!(house.current("b").await, version(1));
}

#[tokio::test]
async fn an_absence_found_before_a_put_is_not_believed_after_it() {
    let house = House::new();
    let gate = house.store.reads.hold_next();
    let early = house.spawn_get("a");
    gate.reached().await;
    house.put("a", 1).await;
    gate.open();
    assert_eq!(early.await.unwrap().unwrap_err().reason(), Reason::SecretNotFound);
    assert_eq!(house.current("a").await, version(1));
}

#[tokio::test]
async fn b7_asking_for_what_is_not_there_evicts_nothing_that_is() {
    let house = House::new();
    house.seed("a", 1).await;
    house.current("a").await;
    for n in 0..3_000 {
        assert_eq!(house.reason(&format!("missing-{n}")).await, Reason::SecretNotFound);
        let selector = Selector::Version(version(1_000 + n));
        let missing = house.cache.get(&id("a"), &selector, Freshness::Cached).await;
        assert_eq!(missing.unwrap_err().reason(), Reason::VersionNotFound);
    }
    assert_eq!(house.get("a").await.unwrap().source, Source::Cache);
    assert_eq!(house.cache.stats().entries, 1, "absences are kept elsewhere");
    let asked = house.store.gets();
    house.seed("missing-1", 1).await;
    house.clock.advance(NEGATIVE_TTL);
    assert_eq!(house.current("missing-1").await, version(1), "what was made since is there");
    assert_eq!(house.store.gets(), asked + 1);
}

#[tokio::test]
async fn a_restored_secret_is_there_at_once() {
    let house = House::new();
    house.put("a", 1).await;
    house.current("a").await;
    house.cache.delete(&id("a"), RecoveryWindow::DEFAULT).await.unwrap();
    assert_eq!(house.reason("a").await, Reason::SecretDeleted);
    house.cache.restore(&id("a")).await.unwrap();
    assert_eq!(house.current("a").await, version(1));
}

#[tokio::test]
async fn zero_switches_caching_off() {
    let house = House::with(Scripted::default(), Settings { ttl: Duration::ZERO, ..SETTINGS });
    house.seed("a", 1).await;
    for n in 1..4 {
        assert_eq!(house.get("a").await.unwrap().source, Source::Store);
        assert_eq!(house.store.gets(), n);
    }
    house.store.fail_reads(Some(outage));
    assert_eq!(house.reason("a").await, Reason::StoreUnavailable);

    let house = House::with(Scripted::default(), Settings { negative_ttl: Duration::ZERO, ..SETTINGS });
    for n in 1..4 {
        assert_eq!(house.reason("a").await, Reason::SecretNotFound);
        assert_eq!(house.store.gets(), n);
    }
}

#[tokio::test]
async fn b10_what_is_held_is_bounded_in_bytes() {
    let capacity_bytes = 64 * 1_024;
    let house = House::with(Scripted::default(), Settings { capacity_bytes, ..SETTINGS });
    for n in 0..100 {
        let value = SecretValue::binary(vec![7; 4_096]).unwrap();
        let name = id(&format!("large-{n}"));
        house.store.put(&name, Put { value, ..put(1) }).await.unwrap();
        house.cache.get(&name, &CURRENT, Freshness::Cached).await.unwrap();
    }
    let stats = house.cache.stats();
    assert!(stats.bytes <= capacity_bytes, "{stats:?}");
    assert!((1..=15).contains(&stats.entries), "{stats:?}");
    assert!(stats.bytes >= stats.entries * 4_096, "{stats:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn b10_what_is_held_is_bounded_in_bytes_under_load_too() {
    let capacity_bytes = 64 * 1_024;
    let house = House::with(Scripted::default(), Settings { capacity_bytes, ..SETTINGS });
    let names: Arc<Vec<SecretId>> = Arc::new((0..200).map(|n| id(&format!("large-{n}"))).collect());
    for name in names.iter() {
        let value = SecretValue::binary(vec![7; 4_096]).unwrap();
        house.store.put(name, Put { value, ..put(1) }).await.unwrap();
    }
    let readers: Vec<_> = (1..=8)
        .map(|seed: u64| {
            let (cache, names) = (house.cache.clone(), Arc::clone(&names));
            let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            tokio::spawn(async move {
                for n in 0..1_000 {
                    // Half of the reads are of a few names, so that some of them stay.
                    let which = if n % 2 == 0 { dice.roll(5) } else { dice.roll(200) };
                    let name = &names[usize::try_from(which).unwrap()];
                    let fetched = cache.get(name, &CURRENT, Freshness::Cached).await.unwrap();
                    assert_eq!(fetched.value.len(), 4_096);
                    let stats = cache.stats();
                    // What others do meanwhile is applied a little later.
                    assert!(stats.bytes <= 2 * capacity_bytes, "{stats:?}");
                }
            })
        })
        .collect();
    for reader in readers {
        reader.await.unwrap();
    }
    let stats = house.cache.stats();
    assert!(stats.hits > 0 && stats.misses > 0, "{stats:?}");
    assert!(stats.bytes <= capacity_bytes && stats.entries <= 15, "{stats:?}");
}

#[tokio::test]
async fn a_fetch_from_before_a_put_is_neither_joined_nor_kept_after_it() {
    for house in [House::new(), House::unnumbered()] {
        house.seed("a", 1).await;
        let gate = house.store.reads.hold_next();
        let early = house.spawn_get("a");
        gate.reached().await;
        house.put("a", 2).await;
        assert_eq!(house.current("a").await, version(2), "not joined");
        gate.open();
        early.await.unwrap().unwrap();
        assert_eq!(house.current("a").await, version(2), "not kept");
    }
}

#[tokio::test]
async fn a_fetch_from_within_a_put_is_neither_joined_nor_kept_after_it() {
    for house in [House::new(), House::unnumbered()] {
        house.seed("a", 1).await;
        house.store.lag(false);
        let acknowledgement = house.store.writes.hold_next();
        let cache = house.cache.clone();
        let writing = tokio::spawn(async move { cache.put(&id("a"), put(2)).await });
        acknowledgement.reached().await;
        assert_eq!(house.current("a").await, version(1), "the write has not ended");
        house.cache.purge(Some(&id("a")));
        let gate = house.store.reads.hold_next();
        let early = house.spawn_get("a");
        gate.reached().await;
        acknowledgement.open();
        writing.await.unwrap().unwrap();
        house.store.catch_up();
        assert_eq!(house.current("a").await, version(2), "not joined");
        gate.open();
        early.await.unwrap().unwrap();
        assert_eq!(house.current("a").await, version(2), "not kept");
    }
}

#[tokio::test]
async fn what_was_cached_while_a_put_was_under_way_does_not_outlast_it() {
    let house = House::unnumbered();
    house.seed("a", 1).await;
    house.store.lag(false);
    let acknowledgement = house.store.writes.hold_next();
    let cache = house.cache.clone();
    let writing = tokio::spawn(async move { cache.put(&id("a"), put(2)).await });
    acknowledgement.reached().await;
    assert_eq!(house.current("a").await, version(1));
    acknowledgement.open();
    writing.await.unwrap().unwrap();
    house.store.catch_up();
    assert_eq!(house.current("a").await, version(2));
}

#[tokio::test]
async fn b8_an_older_revision_never_replaces_a_newer_one() {
    let house = House::new();
    house.seed("a", 1).await;
    let gate = house.store.reads.hold_next();
    let early = house.spawn_get("a");
    gate.reached().await;
    house.seed("a", 2).await;
    assert_eq!(house.refresh("a").await.unwrap().version.id, version(2));
    assert_eq!(house.current("a").await, version(2));
    gate.open();
    assert_eq!(early.await.unwrap().unwrap().version.id, version(1));
    assert_eq!(house.current("a").await, version(2));
    assert_eq!(house.store.gets(), 2);
}

#[tokio::test]
async fn b8_a_store_that_went_back_in_time_changes_nothing_that_is_cached() {
    let house = House::new();
    house.seed("a", 1).await;
    house.store.lag(true);
    house.seed("a", 2).await;
    let past = house.store.lag.lock().unwrap().take();
    assert_eq!(house.current("a").await, version(2));
    *house.store.lag.lock().unwrap() = past;
    assert_eq!(house.refresh("a").await.unwrap().version.id, version(1), "as the store says");
    assert_eq!(house.current("a").await, version(2));
}

#[tokio::test]
async fn b8_an_empty_value_is_a_value_and_replaces_only_what_is_older() {
    let house = House::new();
    let empty = Put { value: SecretValue::text(String::new()).unwrap(), ..put(1) };
    house.cache.put(&id("a"), empty).await.unwrap();
    for source in [Source::Store, Source::Cache] {
        let fetched = house.get("a").await.unwrap();
        assert_eq!((fetched.value.len(), fetched.source), (0, source));
    }
    house.store.lag(true);
    let past = house.store.lag.lock().unwrap().take();
    house.put("a", 2).await;
    assert_eq!(house.current("a").await, version(2));
    *house.store.lag.lock().unwrap() = past;
    assert!(house.refresh("a").await.unwrap().value.is_empty(), "as the store says");
    assert_eq!(
        house.get("a").await.unwrap().value.expose_text(),
        Some("value 2"),
        "the last good one is kept"
    );
}

#[tokio::test]
async fn news_by_one_selector_clear_what_is_known_by_the_others() {
    let house = House::new();
    house.seed("a", 1).await;
    house.seed("a", 2).await;
    let previous = async || {
        let answer = house.cache.get(&id("a"), &PREVIOUS, Freshness::Cached).await;
        answer.unwrap().version.id
    };
    assert_eq!(previous().await, version(1));
    house.seed("a", 3).await;
    assert_eq!(house.current("a").await, version(3));
    assert_eq!(previous().await, version(2));
}

fn rollback(from: u64, to: u64) -> LabelMove {
    LabelMove { label: Label::Current, from: Some(version(from)), to: Some(version(to)) }
}

#[tokio::test]
async fn a_rollback_is_seen_at_once_and_by_every_selector() {
    for house in [House::new(), House::unnumbered()] {
        house.put("a", 1).await;
        house.put("a", 2).await;
        let get = async |selector: Selector| {
            house.cache.get(&id("a"), &selector, Freshness::Cached).await.unwrap().version
        };
        assert_eq!(get(CURRENT).await.id, version(2));
        assert_eq!(get(PREVIOUS).await.id, version(1));
        assert_eq!(get(Selector::Version(version(1))).await.labels, [Label::Previous]);
        house.cache.move_label(&id("a"), &rollback(2, 1)).await.unwrap();
        assert_eq!(get(CURRENT).await.id, version(1));
        assert_eq!(get(PREVIOUS).await.id, version(2));
        assert_eq!(get(Selector::Version(version(1))).await.labels, [Label::Current]);
        assert_eq!(house.get("a").await.unwrap().source, Source::Cache);
    }
}

#[tokio::test]
async fn what_this_broker_superseded_is_not_accepted_back_for_a_minute() {
    let settings = Settings { ttl: Duration::from_secs(10), ..SETTINGS };
    let house = House::with(Scripted { unnumbered: true, ..Scripted::default() }, settings);
    house.put("a", 1).await;
    house.clock.advance(Duration::from_secs(120));
    assert_eq!(house.current("a").await, version(1));
    house.store.lag(false);
    house.put("a", 2).await;
    let fetched = house.get("a").await.unwrap();
    assert_eq!((fetched.version.id, fetched.source), (version(2), Source::Store));
    assert_eq!(fetched.version.labels, [Label::Current]);
    assert_eq!(fetched.value.expose_text(), Some("value 2"));
    assert_eq!(house.store.gets(), 3, "by the label, and then by the id");
    assert_eq!(house.get("a").await.unwrap().source, Source::Cache);
    assert_eq!(house.refresh("a").await.unwrap().version.id, version(2));
    for _ in 0..5 {
        house.clock.advance(Duration::from_secs(11));
        assert_eq!(house.current("a").await, version(2));
    }
    house.clock.advance(Duration::from_secs(10));
    assert_eq!(house.current("a").await, version(1), "after more than a minute the store is believed");
}

#[tokio::test]
async fn neither_is_it_where_the_store_does_not_know_the_new_version_at_all() {
    let house = House::unnumbered();
    house.put("a", 1).await;
    house.clock.advance(Duration::from_secs(120));
    house.current("a").await;
    house.store.lag(true);
    house.put("a", 2).await;
    assert_eq!(house.reason("a").await, Reason::StoreUnavailable);
    house.store.catch_up();
    assert_eq!(house.current("a").await, version(2));
}

#[tokio::test]
async fn what_a_rollback_superseded_is_not_accepted_back_either() {
    let house = House::unnumbered();
    house.put("a", 1).await;
    house.put("a", 2).await;
    house.store.lag(false);
    house.cache.move_label(&id("a"), &rollback(2, 1)).await.unwrap();
    assert_eq!(house.current("a").await, version(1));
    let by_id = house.cache.get(&id("a"), &Selector::Version(version(2)), Freshness::Cached).await.unwrap();
    assert_eq!(by_id.version.labels, [Label::Previous]);
}

#[tokio::test]
async fn previous_is_not_accepted_from_before_a_put() {
    let house = House::unnumbered();
    house.put("a", 1).await;
    house.store.lag(false);
    house.put("a", 2).await;
    let fetched = house.cache.get(&id("a"), &PREVIOUS, Freshness::Cached).await.unwrap();
    assert_eq!(fetched.version.id, version(1), "the store says that there is none");
    assert_eq!(fetched.version.labels, [Label::Previous]);
    house.store.lag(false);
    house.put("a", 3).await;
    let fetched = house.cache.get(&id("a"), &PREVIOUS, Freshness::Cached).await.unwrap();
    assert_eq!(fetched.version.id, version(2), "the store says that it is the one before");
}

#[tokio::test]
async fn someone_elses_newer_version_is_accepted_at_once() {
    let house = House::unnumbered();
    house.put("a", 1).await;
    house.put("a", 2).await;
    house.seed("a", 3).await;
    assert_eq!(house.current("a").await, version(3));
}

#[tokio::test]
async fn a_write_with_a_lost_acknowledgement_is_seen() {
    for house in [House::new(), House::unnumbered()] {
        house.seed("a", 1).await;
        house.current("a").await;
        house.store.lose_next_acknowledgement.store(true, SeqCst);
        let error = house.cache.put(&id("a"), put(2)).await.unwrap_err();
        assert!(error.is_transient());
        assert_eq!(house.current("a").await, version(2));
    }
}

#[tokio::test]
async fn a_write_whose_caller_goes_away_is_seen() {
    let house = House::new();
    house.seed("a", 1).await;
    house.current("a").await;
    let acknowledgement = house.store.writes.hold_next();
    let cache = house.cache.clone();
    let writing = tokio::spawn(async move { cache.put(&id("a"), put(2)).await });
    acknowledgement.reached().await;
    writing.abort();
    assert!(writing.await.unwrap_err().is_cancelled());
    acknowledgement.open();
    for _ in 0..1_000_000 {
        if house.current("a").await == version(2) {
            return;
        }
        yield_now().await;
    }
    panic!("the write was not seen");
}

#[tokio::test]
async fn a_conflict_says_that_the_cache_is_outdated_and_a_refusal_does_not() {
    let house = House::new();
    house.seed("a", 1).await;
    house.current("a").await;
    house.seed("a", 2).await;
    let error =
        house.cache.put(&id("a"), Put { expected: Some(Some(version(1))), ..put(3) }).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Conflict);
    assert_eq!(house.current("a").await, version(2));
    *house.store.write_fault.lock().unwrap() = Some(denied);
    house.cache.put(&id("a"), put(3)).await.unwrap_err();
    assert_eq!(house.get("a").await.unwrap().source, Source::Cache);
}

#[tokio::test]
async fn a_refresh_asks_learns_and_never_falls_back() {
    let house = House::new();
    house.seed("a", 1).await;
    house.current("a").await;
    house.seed("a", 2).await;
    assert_eq!(house.current("a").await, version(1), "cached");
    let fetched = house.refresh("a").await.unwrap();
    assert_eq!((fetched.version.id, fetched.source), (version(2), Source::Store));
    assert_eq!(house.current("a").await, version(2), "and learnt");
    house.store.fail_reads(Some(outage));
    assert_eq!(house.refresh("a").await.unwrap_err().reason(), Reason::StoreUnavailable);
    assert_eq!(house.current("a").await, version(2), "still within its time");
    house.clock.advance(PAST_TTL);
    assert_eq!(house.refresh("a").await.unwrap_err().reason(), Reason::StoreUnavailable);
    let held_back = house.store.gets();
    assert!(house.get("a").await.unwrap().stale);
    assert_eq!(house.store.gets(), held_back, "a refresh finds an outage for all");
}

#[tokio::test]
async fn a_refresh_does_not_join_a_fetch_from_before_it() {
    let house = House::new();
    house.seed("a", 1).await;
    let gate = house.store.reads.hold_next();
    let early = house.spawn_get("a");
    gate.reached().await;
    house.seed("a", 2).await;
    assert_eq!(house.refresh("a").await.unwrap().version.id, version(2));
    gate.open();
    early.await.unwrap().unwrap();
}

fn items(names: &[&str]) -> Vec<(SecretId, Selector)> {
    names.iter().map(|name| (id(name), CURRENT)).collect()
}

fn sources(answers: &[Result<Fetched, StoreError>]) -> Vec<&'static str> {
    let word = |answer: &Result<Fetched, StoreError>| match answer {
        Ok(Fetched { stale: true, .. }) => "stale",
        Ok(Fetched { source: Source::Cache, .. }) => "cache",
        Ok(Fetched { source: Source::Store, .. }) => "store",
        Err(error) => error.reason().code(),
    };
    answers.iter().map(word).collect()
}

#[tokio::test]
async fn a_batch_costs_one_call_for_all_that_is_missing() {
    let house = House::new();
    for (n, name) in (1..).zip(["a", "b", "c"]) {
        house.seed(name, n).await;
    }
    house.current("a").await;
    let names = ["c", "a", "b", "c", "missing"];
    let answers = house.cache.batch_get(&items(&names), Freshness::Cached).await;
    assert_eq!(sources(&answers), ["store", "cache", "store", "store", "SECRET_NOT_FOUND"]);
    let versions: Vec<_> = answers.iter().flatten().map(|fetched| fetched.version.id.clone()).collect();
    assert_eq!(versions, [version(3), version(1), version(2), version(3)]);
    assert_eq!((house.store.batches.load(SeqCst), house.store.last_batch.load(SeqCst)), (1, 3));
    let answers = house.cache.batch_get(&items(&names), Freshness::Cached).await;
    assert_eq!(sources(&answers), ["cache", "cache", "cache", "cache", "SECRET_NOT_FOUND"]);
    assert_eq!(house.store.batches.load(SeqCst), 1);
    let answers = house.cache.batch_get(&items(&names), Freshness::Refresh).await;
    assert_eq!(sources(&answers), ["store", "store", "store", "store", "SECRET_NOT_FOUND"]);
    assert_eq!((house.store.batches.load(SeqCst), house.store.last_batch.load(SeqCst)), (2, 4));
    assert!(house.cache.batch_get(&[], Freshness::Cached).await.is_empty());
}

#[tokio::test]
async fn b9_each_item_of_a_batch_falls_back_by_itself() {
    let house = House::new();
    house.seed("a", 1).await;
    house.seed("b", 1).await;
    house.current("a").await;
    house.clock.advance(PAST_TTL);
    house.store.fail_reads(Some(outage));
    let answers = house.cache.batch_get(&items(&["a", "b"]), Freshness::Cached).await;
    assert_eq!(sources(&answers), ["stale", "STORE_UNAVAILABLE"]);
    let answers = house.cache.batch_get(&items(&["a", "b"]), Freshness::Refresh).await;
    assert_eq!(sources(&answers), ["STORE_UNAVAILABLE", "STORE_UNAVAILABLE"]);
}

#[tokio::test]
async fn singles_join_a_batch_and_a_batch_joins_singles() {
    let house = House::new();
    for name in ["a", "b", "c"] {
        house.seed(name, 1).await;
    }
    let single_gate = house.store.reads.hold_next();
    let single = house.spawn_get("a");
    single_gate.reached().await;
    let batch_gate = house.store.reads.hold_next();
    let cache = house.cache.clone();
    let batch =
        tokio::spawn(async move { cache.batch_get(&items(&["a", "b", "c"]), Freshness::Cached).await });
    batch_gate.reached().await;
    let joining = house.spawn_get("b");
    house.until_misses(5).await;
    single_gate.open();
    batch_gate.open();
    single.await.unwrap().unwrap();
    joining.await.unwrap().unwrap();
    assert_eq!(sources(&batch.await.unwrap()), ["store", "store", "store"]);
    assert_eq!((house.store.gets(), house.store.batches.load(SeqCst)), (1, 1));
    assert_eq!(house.store.last_batch.load(SeqCst), 2);
}

#[tokio::test]
async fn what_is_hot_is_fetched_anew_before_its_time_is_over() {
    let house = House::new();
    house.seed("a", 1).await;
    house.heat("a").await;
    house.seed("a", 2).await;
    let gate = house.store.reads.hold_next();
    // Readers go on getting what is remembered, and one fetch is enough for all of them.
    for _ in 0..100 {
        let fetched = house.get("a").await.unwrap();
        assert_eq!((fetched.version.id, fetched.source), (version(1), Source::Cache));
    }
    gate.reached().await;
    assert_eq!(house.current("a").await, version(1));
    gate.open();
    house.settle().await;
    assert_eq!(house.current("a").await, version(2));
    house.clock.advance(NEARLY_OVER / 2);
    let fetched = house.get("a").await.unwrap();
    assert_eq!((fetched.version.id, fetched.source), (version(2), Source::Cache), "past the old one's time");
    let stats = house.cache.stats();
    assert_eq!((stats.refreshes_ahead, stats.misses, house.store.gets()), (1, 1, 2));
}

#[tokio::test]
async fn what_is_not_hot_is_not() {
    let house = House::new();
    house.seed("a", 1).await;
    house.current("a").await;
    house.clock.advance(NEARLY_OVER);
    assert_eq!(house.get("a").await.unwrap().source, Source::Cache);
    house.clock.advance(PAST_TTL - NEARLY_OVER);
    assert_eq!(house.get("a").await.unwrap().source, Source::Store);
    assert_eq!((house.store.gets(), house.cache.stats().refreshes_ahead), (2, 0));

    // Nor is what is hot while most of its time is left.
    for _ in 0..100 {
        house.current("a").await;
    }
    house.clock.advance(TTL * 7 / 10);
    assert_eq!(house.get("a").await.unwrap().source, Source::Cache);
    assert_eq!((house.store.gets(), house.cache.stats().refreshes_ahead), (2, 0));
}

#[tokio::test]
async fn a_fetch_ahead_is_shared_with_who_comes_too_late_for_the_old_answer() {
    let house = House::new();
    house.seed("a", 1).await;
    house.heat("a").await;
    let gate = house.store.reads.hold_next();
    assert_eq!(house.get("a").await.unwrap().source, Source::Cache);
    gate.reached().await;
    house.clock.advance(PAST_TTL - NEARLY_OVER);
    let late = house.spawn_get("a");
    house.until_misses(2).await;
    gate.open();
    assert_eq!(late.await.unwrap().unwrap().source, Source::Store);
    assert_eq!(house.store.gets(), 2);
}

#[tokio::test]
async fn a_fetch_ahead_is_not_begun_while_someone_asks_already() {
    let house = House::new();
    house.seed("a", 1).await;
    house.heat("a").await;
    let gate = house.store.reads.hold_next();
    let cache = house.cache.clone();
    let asking = tokio::spawn(async move { cache.get(&id("a"), &CURRENT, Freshness::Refresh).await });
    gate.reached().await;
    assert_eq!(house.get("a").await.unwrap().source, Source::Cache);
    gate.open();
    asking.await.unwrap().unwrap();
    assert_eq!((house.store.gets(), house.cache.stats().refreshes_ahead), (2, 0));
}

#[tokio::test]
async fn a_fetch_ahead_that_fails_changes_nothing_before_the_time_is_over() {
    for fault in [outage as Fault, throttled] {
        let house = House::new();
        house.seed("a", 1).await;
        house.heat("a").await;
        house.store.fail_reads(Some(fault));
        for _ in 0..100 {
            let fetched = house.get("a").await.unwrap();
            assert_eq!((fetched.source, fetched.stale), (Source::Cache, false));
            yield_now().await;
        }
        assert_eq!(house.store.gets(), 2, "one try");
        house.clock.advance(PAST_TTL - NEARLY_OVER);
        assert!(house.get("a").await.unwrap().stale);
        house.store.fail_reads(None);
        house.clock.advance(LONGEST_HOLD_BACK);
        assert_eq!(house.get("a").await.unwrap().source, Source::Store);
    }
}

#[tokio::test]
async fn b2_a_fetch_ahead_that_learns_of_a_deletion_or_denial_evicts_at_once() {
    let faults: [(Fault, Reason); 3] = [
        (|id| StoreError::SecretNotFound(id.clone()), Reason::SecretNotFound),
        (|id| StoreError::SecretDeleted(id.clone()), Reason::SecretDeleted),
        (denied, Reason::StoreDenied),
    ];
    for (fault, reason) in faults {
        let house = House::new();
        house.seed("a", 1).await;
        house.heat("a").await;
        house.store.fail_reads(Some(fault));
        assert_eq!(house.current("a").await, version(1), "this one is told what is remembered");
        house.settle().await;
        assert_eq!(house.cache.stats().entries, 0, "{reason} evicts");
        assert_eq!(house.reason("a").await, reason);
    }
}

#[tokio::test]
async fn b8_a_fetch_ahead_brings_back_nothing_that_this_broker_superseded() {
    let settings = Settings { ttl: Duration::from_secs(10), ..SETTINGS };
    let house = House::with(Scripted { unnumbered: true, ..Scripted::default() }, settings);
    house.put("a", 1).await;
    house.store.lag(false);
    house.put("a", 2).await;
    for _ in 0..3 {
        assert_eq!(house.current("a").await, version(2));
    }
    let before = house.store.gets();
    house.clock.advance(Duration::from_millis(8_700));
    assert_eq!(house.get("a").await.unwrap().source, Source::Cache);
    house.settle().await;
    assert_eq!(house.store.gets(), before + 2, "by the label, and then by the id");
    house.clock.advance(Duration::from_secs(5));
    let fetched = house.get("a").await.unwrap();
    assert_eq!((fetched.version.id, fetched.source), (version(2), Source::Cache));
    assert_eq!(house.cache.stats().refreshes_ahead, 1);
}

#[tokio::test]
async fn a_put_voids_a_fetch_ahead() {
    for house in [House::new(), House::unnumbered()] {
        house.seed("a", 1).await;
        house.heat("a").await;
        let gate = house.store.reads.hold_next();
        house.current("a").await;
        gate.reached().await;
        house.put("a", 2).await;
        gate.open();
        house.settle().await;
        assert_eq!(house.current("a").await, version(2));
    }
}

#[tokio::test]
async fn what_a_batch_finds_nearly_over_costs_one_call_for_all_of_it() {
    let house = House::new();
    for name in ["a", "b", "c"] {
        house.seed(name, 1).await;
    }
    for _ in 0..3 {
        house.current("a").await;
        house.current("b").await;
    }
    house.clock.advance(NEARLY_OVER);
    let answers = house.cache.batch_get(&items(&["a", "c", "b"]), Freshness::Cached).await;
    assert_eq!(sources(&answers), ["cache", "store", "cache"]);
    house.settle().await;
    assert_eq!((house.store.batches.load(SeqCst), house.store.last_batch.load(SeqCst)), (1, 2));
    assert_eq!((house.store.gets(), house.cache.stats().refreshes_ahead), (3, 2));
}

fn uncached(patterns: &[&str]) -> House {
    let uncached = patterns.iter().map(|pattern| NamePattern::parse(pattern).unwrap()).collect();
    House::with(Scripted::default(), Settings { uncached, ..SETTINGS })
}

#[tokio::test]
async fn of_what_is_not_to_be_cached_each_read_asks_the_store() {
    let house = uncached(&["payments/*", "jwt"]);
    for name in ["payments/key", "jwt", "jwt-2"] {
        house.seed(name, 1).await;
    }
    for n in 1..=5 {
        assert_eq!(house.get("payments/key").await.unwrap().source, Source::Store);
        assert_eq!(house.get("jwt").await.unwrap().source, Source::Store);
        assert_eq!(house.reason("payments/missing").await, Reason::SecretNotFound);
        assert_eq!(house.store.gets(), 3 * n);
    }
    house.seed("payments/missing", 1).await;
    assert_eq!(house.current("payments/missing").await, version(1), "an absence is not kept either");
    house.current("jwt-2").await;
    assert_eq!(house.get("jwt-2").await.unwrap().source, Source::Cache, "this one is not meant");
    let stats = house.cache.stats();
    assert_eq!((stats.entries, stats.hits, stats.negative_hits, stats.refreshes_ahead), (1, 1, 0, 0));

    house.store.fail_reads(Some(outage));
    assert_eq!(house.reason("jwt").await, Reason::StoreUnavailable, "nothing stands in");
    let answers = house.cache.batch_get(&items(&["jwt-2", "jwt"]), Freshness::Cached).await;
    assert_eq!(sources(&answers), ["cache", "STORE_UNAVAILABLE"]);
}

#[tokio::test]
async fn those_who_ask_at_the_same_time_share_a_call_also_for_what_is_not_cached() {
    let house = uncached(&["*"]);
    house.seed("a", 1).await;
    let gate = house.store.reads.hold_next();
    let callers: Vec<_> = (0..100).map(|_| house.spawn_get("a")).collect();
    house.until_misses(100).await;
    house.seed("a", 2).await;
    assert_eq!(house.refresh("a").await.unwrap().version.id, version(2), "who insists asks by itself");
    gate.open();
    for caller in callers {
        assert_eq!(caller.await.unwrap().unwrap().version.id, version(1));
    }
    assert_eq!(house.store.gets(), 2);
    assert_eq!(house.current("a").await, version(2));
    assert_eq!(house.store.gets(), 3);
}

#[tokio::test]
async fn a_purge_says_how_much_it_forgot() {
    let house = House::new();
    for name in ["a", "b", "c"] {
        house.seed(name, 1).await;
        house.current(name).await;
    }
    house.reason("missing").await;
    assert_eq!(house.cache.purge(Some(&id("a"))), 1);
    assert_eq!(house.cache.purge(Some(&id("a"))), 0, "gone already");
    assert_eq!(house.cache.purge(Some(&id("missing"))), 0, "an absence is no secret");
    assert_eq!(house.cache.purge(None), 2);
    assert_eq!(house.cache.purge(None), 0);
    house.cache.tidy();
    assert_eq!((house.cache.stats().entries, house.cache.stats().bytes), (0, 0));
}

#[tokio::test]
async fn a_purge_forgets_one_or_all_and_what_is_under_way() {
    let house = House::new();
    house.seed("a", 1).await;
    house.seed("b", 1).await;
    house.current("a").await;
    house.current("b").await;
    house.cache.purge(Some(&id("a")));
    assert_eq!(house.get("a").await.unwrap().source, Source::Store);
    assert_eq!(house.get("b").await.unwrap().source, Source::Cache);
    house.cache.purge(None);
    assert_eq!(house.cache.stats().entries, 0);
    for everything in [true, false] {
        let gate = house.store.reads.hold_next();
        let early = house.spawn_get("a");
        gate.reached().await;
        house.cache.purge((!everything).then(|| id("a")).as_ref());
        gate.open();
        early.await.unwrap().unwrap();
        assert_eq!(house.get("a").await.unwrap().source, Source::Store);
        house.cache.purge(None);
    }
}

#[tokio::test]
async fn what_is_counted_adds_up() {
    let house = House::new();
    house.seed("a", 1).await;
    house.current("a").await;
    house.current("a").await;
    house.reason("missing").await;
    house.reason("missing").await;
    house.clock.advance(PAST_TTL);
    house.store.fail_reads(Some(outage));
    house.current("a").await;
    let stats = house.cache.stats();
    assert_eq!((stats.hits, stats.misses, stats.stale, stats.negative_hits), (1, 3, 1, 1));
    assert_eq!((stats.upstream_calls, stats.upstream_errors, stats.entries), (3, 1, 1));
    assert!(stats.bytes > 0);
}

#[tokio::test]
async fn descriptions_are_never_cached() {
    let house = House::new();
    house.put("a", 1).await;
    assert_eq!(house.cache.describe(&id("a")).await.unwrap().versions.len(), 1);
    house.seed("a", 2).await;
    assert_eq!(house.cache.describe(&id("a")).await.unwrap().versions.len(), 2);
}

/// Small and repeatable: xorshift64 (Marsaglia, 2003).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// One caller at random, who never sees a secret older than it has seen it.
async fn wander(cache: Cache, clock: Arc<ManualClock>, mut dice: Dice) {
    let names = ["a", "b", "c"].map(id);
    let mut seen = [0; 3];
    let mut see = |which: usize, order: Order| {
        let Order::Revision(revision) = order else { panic!("the store numbers its changes") };
        assert!(revision >= seen[which], "revision {revision} of {} after {}", names[which], seen[which]);
        seen[which] = revision;
    };
    for _ in 0..400 {
        let which = usize::try_from(dice.roll(3)).unwrap();
        let selector = if dice.roll(3) == 0 { PREVIOUS } else { CURRENT };
        let freshness = if dice.roll(8) == 0 { Freshness::Refresh } else { Freshness::Cached };
        match dice.roll(40) {
            0..6 => {
                let put = Put { token: VersionId::generate(), ..put(0) };
                see(which, cache.put(&names[which], put).await.unwrap().order);
            }
            6 => drop(cache.purge(Some(&names[which]))),
            7 => clock.advance(PAST_TTL),
            8..12 => {
                let items = names.clone().map(|name| (name, selector.clone()));
                let answers = cache.batch_get(&items, freshness).await;
                for (which, answer) in answers.into_iter().enumerate() {
                    see(which, answer.unwrap().order);
                }
            }
            _ => see(which, cache.get(&names[which], &selector, freshness).await.unwrap().order),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nobody_sees_a_secret_go_back_in_time() {
    let house = House::with(Scripted { jumbled: true, ..Scripted::default() }, SETTINGS);
    for name in ["a", "b", "c"] {
        house.seed(name, 1).await;
        house.seed(name, 2).await;
    }
    let wanderers: Vec<_> = (1..=16)
        .map(|seed: u64| {
            let dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            tokio::spawn(wander(house.cache.clone(), Arc::clone(&house.clock), dice))
        })
        .collect();
    for wanderer in wanderers {
        wanderer.await.unwrap();
    }
    let stats = house.cache.stats();
    assert!(stats.hits > 0 && stats.misses > 0, "{stats:?}");
}

fn development(name: &str) -> SecretId {
    SecretId::parse("development", name).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn b12_policy_stands_before_the_cache_with_every_read() {
    let folder = tempfile::tempdir().unwrap();
    let policies = folder.path().join("policies");
    std::fs::create_dir(&policies).unwrap();
    for (file, text) in claviger::policy::SHIPPED {
        std::fs::write(policies.join(file), text).unwrap();
    }
    let mut resolved = resolved(folder.path());
    resolved.policy = PolicySource::Directory(policies.clone());
    let running = start(&resolved, clock()).await.unwrap();
    put_text(&running, development("database"), "p").await.unwrap();
    let ana = person("ana", &["team"]);
    let read = async || get(&running, &ana, development("database")).await;
    assert_eq!(read().await.unwrap().source, Source::Store);
    assert_eq!(read().await.unwrap().source, Source::Cache);

    let before = running.broker.caches().statistics();
    let forbid = r#"@id("not-ana") forbid (principal == User::"ana", action, resource);"#;
    std::fs::write(policies.join("zz.cedar"), forbid).unwrap();
    running.broker.reload_policy(&administrator()).await.unwrap();
    assert_eq!(read().await.unwrap_err().reason(), Reason::Denied, "with the next request");
    assert_eq!(running.broker.caches().statistics(), before, "the cache was not even asked");

    std::fs::remove_file(policies.join("zz.cedar")).unwrap();
    running.broker.reload_policy(&administrator()).await.unwrap();
    assert_eq!(read().await.unwrap().source, Source::Cache, "it was there all the time");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_administers_the_broker_purges_and_it_is_on_record() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    let secrets = [development("a"), development("b"), SecretId::parse("staging", "c").unwrap()];
    for secret in &secrets {
        put_text(&running, secret.clone(), "p").await.unwrap();
    }
    let sources = async || {
        let mut sources = Vec::new();
        for secret in &secrets {
            sources.push(get(&running, &administrator(), secret.clone()).await.unwrap().source);
        }
        sources
    };
    let purge = async |what: Resource| running.broker.purge_cache(&administrator(), &what).await;
    use Source::{Cache as Remembered, Store as Asked};
    assert_eq!(sources().await, [Asked, Asked, Asked]);
    let refused = running.broker.purge_cache(&person("ana", &["team"]), &Resource::Broker).await;
    assert_eq!(refused.unwrap_err().reason(), Reason::Denied);
    assert_eq!(sources().await, [Remembered, Remembered, Remembered]);
    assert_eq!(purge(Resource::Secret(secrets[0].clone())).await.unwrap(), 1);
    assert_eq!(sources().await, [Asked, Remembered, Remembered]);
    assert_eq!(purge(Resource::Environment("development".parse().unwrap())).await.unwrap(), 2);
    assert_eq!(sources().await, [Asked, Asked, Remembered]);
    assert_eq!(purge(Resource::Broker).await.unwrap(), 3);
    assert_eq!(sources().await, [Asked, Asked, Asked]);
    let nowhere = purge(Resource::Environment("nowhere".parse().unwrap())).await;
    assert_eq!(nowhere.unwrap_err().reason(), Reason::EnvironmentNotFound);
    let refused = running.broker.cache_statistics(&person("ana", &["team"])).await;
    assert_eq!(refused.unwrap_err().reason(), Reason::Denied);
    let figures = running.broker.cache_statistics(&administrator()).await.unwrap();
    let names: Vec<_> = figures.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["development", "production", "staging"]);
    assert_eq!((figures[0].1.stats.entries, figures[0].1.stats.misses), (2, 7));
    running.stop().await.unwrap();

    let records = records(folder.path());
    let purges: Vec<_> = records
        .iter()
        .filter(|record| record["operation"] == "purge_cache")
        .map(|record| {
            let text = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
            (text("kind"), text("environment"), text("secret"), text("outcome"))
        })
        .collect();
    let expected = [
        ("access", "", "", "denied"),
        ("intent", "development", "a", ""),
        ("access", "development", "a", "ok"),
        ("intent", "development", "", ""),
        ("access", "development", "", "ok"),
        ("intent", "", "", ""),
        ("access", "", "", "ok"),
        ("intent", "nowhere", "", ""),
        ("access", "nowhere", "", "not_found"),
    ]
    .map(|(kind, environment, secret, outcome)| {
        (kind.to_owned(), environment.to_owned(), secret.to_owned(), outcome.to_owned())
    });
    assert_eq!(purges, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_environment_names_what_is_not_cached() {
    let folder = tempfile::tempdir().unwrap();
    let mut resolved = resolved(folder.path());
    let mut environment = Environment::sealed("development".parse().unwrap());
    environment.uncached = vec![NamePattern::parse("payments/*").unwrap()];
    resolved.registry = Registry::new([environment]).unwrap();
    let running = start(&resolved, clock()).await.unwrap();
    for (name, then) in [("payments/key", Source::Store), ("database", Source::Cache)] {
        put_text(&running, development(name), "p").await.unwrap();
        for expected in [Source::Store, then, then] {
            let found = get(&running, &administrator(), development(name)).await.unwrap();
            assert_eq!((found.source, found.stale), (expected, false), "{name}");
        }
    }
    running.stop().await.unwrap();
}

#[test]
fn the_cache_is_purged_and_looked_at_from_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path());
    let program = &served.program;
    let json = |arguments: &[&str]| {
        let answer = program.ok(arguments.iter().chain(&["--output", "json"]));
        serde_json::from_str::<serde_json::Value>(&answer).unwrap()
    };
    let read = |name: &str| json(&["get", "-e", "development", name])["source"].as_str().unwrap().to_owned();
    for name in ["a", "b"] {
        assert!(program.put("development", name, b"value").status.success());
        assert_eq!((read(name).as_str(), read(name).as_str()), ("store", "cache"));
    }
    let said = program.ok(["cache", "purge", "-e", "development", "a"]);
    assert_eq!(said, "a in development: forgotten\n");
    assert_eq!((read("a").as_str(), read("b").as_str()), ("store", "cache"));
    let shape = json(&["cache", "purge", "-e", "development"]);
    assert_eq!(shape, serde_json::json!({"environment": "development", "name": null, "entries": 2}));
    let shape = json(&["cache", "purge", "--all"]);
    assert_eq!(shape, serde_json::json!({"environment": null, "name": null, "entries": 0}));

    let development = json(&["cache", "stats"])["caches"][0].clone();
    assert_eq!(development["environment"], "development");
    for (figure, expected) in
        [("hits", 3), ("misses", 3), ("upstream_calls", 3), ("entries", 0), ("bytes", 0)]
    {
        assert_eq!(development[figure], expected, "{figure}");
    }
    assert!(program.ok(["cache", "stats"]).starts_with("ENVIRONMENT"));

    let refused = program.fails(2, ["cache", "purge"]);
    assert!(refused.contains("--all"), "{refused}");
    program.fails(2, ["cache", "purge", "a", "--all"]);
    program.fails(2, ["cache", "purge", "--all", "-e", "development"]);
    program.fails(4, ["cache", "purge", "-e", "nowhere"]);
    let token = program.ok(["token", "create", "--user", "eve", "--expires", "1h"]);
    let mut denied = program.command(["cache", "purge", "--all"]);
    let denied = denied.env("CLAVIGER_TOKEN", token.trim()).output().unwrap();
    assert_eq!(denied.status.code(), Some(3), "{}", String::from_utf8_lossy(&denied.stderr));
}
