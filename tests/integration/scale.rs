//! What must not grow with the number of secrets: counted in what the sealed store asks of the key-value layer and gets
//! from it, never in time.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use claviger::cache::{self, Cache};
use claviger::clock::ManualClock;
use claviger::crypto::{KeyRing, RootKey};
use claviger::kv::{
    Compare, Entry, Kv, KvError, LeaseId, Outcome, Page, Revision, Transaction, Watch, Write,
};
use claviger::secret::{EnvironmentName, SecretId, SecretValue, Selector, VersionId};
use claviger::store::sealed::Sealed;
use claviger::store::{Fetched, Freshness, ListPage, ListRequest, Put, RecoveryWindow, Store};
use tokio::task::yield_now;

const FEW: usize = 10;
const MANY: usize = 10_000;
/// How many secrets a folder has.
const FOLDER: usize = 5;
const DAY: Duration = Duration::from_secs(86_400);

/// What was asked, and how many entries came back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Cost {
    gets: usize,
    ranges: usize,
    commits: usize,
    rows: usize,
}

/// A key-value layer in memory, without leases and watches, that counts. It lets others have their turn before each
/// range, as one on a disk does.
#[derive(Default)]
struct Counting {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    entries: BTreeMap<Vec<u8>, Entry>,
    revision: Revision,
    cost: Cost,
}

impl Counting {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// What it cost since this was last asked.
    fn cost(&self) -> Cost {
        std::mem::take(&mut self.state().cost)
    }
}

impl State {
    fn holds(&self, Compare::ModRevision(key, expected): &Compare) -> bool {
        self.entries.get(key).map_or(0, |entry| entry.mod_revision) == *expected
    }

    fn apply(&mut self, write: Write) {
        match write {
            Write::Delete { key } => drop(self.entries.remove(&key)),
            Write::Put { key, value, lease } => {
                let mod_revision = self.revision;
                let create_revision =
                    self.entries.get(&key).map_or(mod_revision, |entry| entry.create_revision);
                let entry = Entry { key: key.clone(), value, create_revision, mod_revision, lease };
                self.entries.insert(key, entry);
            }
        }
    }
}

#[async_trait]
impl Kv for Counting {
    async fn get(&self, key: &[u8]) -> Result<Option<Entry>, KvError> {
        let mut state = self.state();
        let found = state.entries.get(key).cloned();
        state.cost.gets += 1;
        state.cost.rows += usize::from(found.is_some());
        Ok(found)
    }

    async fn range(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<Page, KvError> {
        yield_now().await;
        let mut state = self.state();
        let from = match after < prefix {
            true => Bound::Included(prefix),
            false => Bound::Excluded(after),
        };
        let under = state.entries.range::<[u8], _>((from, Bound::Unbounded));
        let mut under = under.map(|(_, entry)| entry).take_while(|entry| entry.key.starts_with(prefix));
        let entries: Vec<Entry> = under.by_ref().take(limit).cloned().collect();
        let page = Page { more: under.next().is_some(), entries, revision: state.revision };
        state.cost.ranges += 1;
        state.cost.rows += page.entries.len();
        Ok(page)
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, KvError> {
        let mut state = self.state();
        state.cost.commits += 1;
        let succeeded = transaction.compare.iter().all(|comparison| state.holds(comparison));
        if succeeded {
            state.revision += 1;
            transaction.write.into_iter().for_each(|write| state.apply(write));
        }
        Ok(Outcome { succeeded, revision: state.revision })
    }

    async fn watch(&self, _: &[u8], _: Revision) -> Result<Watch, KvError> {
        panic!("the sealed store watches nothing")
    }

    async fn revision(&self) -> Result<Revision, KvError> {
        Ok(self.state().revision)
    }

    async fn lease(&self, _: Duration) -> Result<LeaseId, KvError> {
        panic!("the sealed store takes no leases")
    }

    async fn renew(&self, lease: LeaseId) -> Result<(), KvError> {
        Err(KvError::LeaseNotFound { id: lease })
    }

    async fn release(&self, _: LeaseId) -> Result<(), KvError> {
        Ok(())
    }
}

/// A key-value layer, and what a broker needs to open the store in it, as often as it likes.
struct Machine {
    kv: Arc<Counting>,
    clock: Arc<ManualClock>,
}

impl Machine {
    fn new() -> Self {
        let clock = ManualClock::new("2026-03-01T12:00:00Z".parse().unwrap());
        Self { kv: Arc::default(), clock }
    }

    /// The same with so many secrets in `production`.
    async fn with_secrets(count: usize) -> Self {
        let machine = Self::new();
        let store = machine.start().await;
        for number in 0..count {
            store.put(&secret(number), put()).await.unwrap();
        }
        machine
    }

    /// The store as a broker finds it that has just started.
    async fn start(&self) -> Sealed {
        let ring = KeyRing::of(RootKey::from_bytes(&[7; 32]).unwrap());
        Sealed::open(self.kv.clone(), Arc::new(ring), self.clock.clone()).await.unwrap()
    }
}

fn production() -> EnvironmentName {
    EnvironmentName::parse("production").unwrap()
}

fn secret(number: usize) -> SecretId {
    let name = format!("folder-{:05}/secret-{}", number / FOLDER, number % FOLDER);
    SecretId::parse("production", &name).unwrap()
}

fn put() -> Put {
    let value = SecretValue::text("value".to_owned()).unwrap();
    Put { value, token: VersionId::generate(), labels: Vec::new(), expected: None }
}

async fn read(store: &dyn Store, number: usize) -> Fetched {
    store.get(&secret(number), &Selector::CURRENT, Freshness::Cached).await.unwrap()
}

async fn list(store: &Sealed, request: &ListRequest) -> ListPage {
    store.list(&production(), request).await.unwrap()
}

/// What everything costs that a caller can ask for, among so many secrets.
async fn costs_among(count: usize) -> Vec<(&'static str, Cost)> {
    let machine = Machine::with_secrets(count).await;
    machine.kv.cost();
    let mut costs = Vec::new();
    let mut note = |what| costs.push((what, machine.kv.cost()));

    let store = machine.start().await;
    note("start");
    store.check(&production()).await.unwrap();
    machine.kv.cost();

    read(&store, 7).await;
    note("read");
    store.describe(&secret(7)).await.unwrap();
    note("describe");
    store.ping(&production()).await.unwrap();
    note("ping");
    let first = list(&store, &ListRequest { limit: 3, ..ListRequest::default() }).await;
    assert_eq!(first.secrets.len(), 3);
    note("first page");
    let request = ListRequest { limit: 3, page_token: first.next_page_token, ..ListRequest::default() };
    assert_eq!(list(&store, &request).await.secrets.len(), 3);
    note("next page");
    let prefix = "folder-00001/".to_owned();
    let folder = list(&store, &ListRequest { limit: 100, prefix, ..ListRequest::default() }).await;
    assert_eq!((folder.secrets.len(), folder.next_page_token), (FOLDER, None));
    note("folder");
    store.put(&secret(7), put()).await.unwrap();
    note("put");
    store.delete(&secret(7), RecoveryWindow::DEFAULT).await.unwrap();
    note("delete");
    costs
}

#[tokio::test]
async fn every_call_costs_the_same_among_few_secrets_and_many() {
    let (few, many) = (costs_among(FEW).await, costs_among(MANY).await);
    assert_eq!(few, many);
    let costs: BTreeMap<_, _> = many.into_iter().collect();
    assert_eq!(costs["read"], Cost { gets: 2, ranges: 0, commits: 0, rows: 2 }, "a record and a value");
    assert_eq!(costs["describe"], Cost { gets: 1, ranges: 0, commits: 0, rows: 1 });
    let page = Cost { gets: 0, ranges: 1, commits: 0, rows: 4 };
    assert_eq!((costs["first page"], costs["next page"]), (page, page), "three, and whether there are more");
    assert_eq!(costs["folder"].rows, FOLDER);
    assert_eq!((costs["put"].ranges, costs["put"].commits), (0, 1));
    assert_eq!(costs["start"].rows, 2, "the store's own record, and one root for each environment");
}

#[tokio::test]
async fn a_cached_read_asks_for_nothing_however_much_is_cached() {
    for count in [FEW, 1_000] {
        let machine = Machine::with_secrets(count).await;
        let settings = cache::Settings {
            ttl: Duration::from_secs(600),
            negative_ttl: Duration::from_secs(5),
            stale_for: Duration::ZERO,
            capacity_bytes: 64 * 1_024 * 1_024,
            answer_within: cache::Settings::ANSWER_WITHIN,
            uncached: Vec::new(),
        };
        let store = Cache::new(Arc::new(machine.start().await), settings, machine.clock.clone());
        for number in 0..count {
            read(&store, number).await;
        }
        machine.kv.cost();
        for number in (0..count).step_by(3) {
            read(&store, number).await;
        }
        assert_eq!(machine.kv.cost(), Cost::default(), "among {count}");
        let stats = store.stats();
        assert_eq!(stats.entries, count as u64);
        let each = stats.bytes / stats.entries;
        assert!(each <= 1_024, "{each} bytes for a secret of 5");
    }
}

#[tokio::test]
async fn a_page_among_thousands_of_deleted_secrets_looks_at_a_bounded_number() {
    const DELETED: usize = 2_500;
    const MOST: usize = 1_000 + 128;
    let machine = Machine::with_secrets(DELETED + 1).await;
    let store = machine.start().await;
    for number in 0..DELETED {
        store.delete(&secret(number), RecoveryWindow::days(7).unwrap()).await.unwrap();
    }
    let live = secret(DELETED).name;
    // Within the recovery window, and after it.
    for passed in [DAY, 10 * DAY] {
        machine.clock.advance(passed);
        let (mut found, mut pages) = (Vec::new(), 0);
        let mut request = ListRequest { limit: 10, ..ListRequest::default() };
        loop {
            machine.kv.cost();
            let page = list(&store, &request).await;
            assert!(machine.kv.cost().rows <= MOST, "page {pages}");
            pages += 1;
            found.extend(page.secrets.into_iter().map(|listed| listed.name));
            let token = page.next_page_token;
            assert!(token.is_none() || token > request.page_token, "every page gets on");
            request.page_token = token;
            if request.page_token.is_none() {
                break;
            }
        }
        assert_eq!(found, std::slice::from_ref(&live));
        assert_eq!(pages, 3);
    }
}

#[tokio::test]
async fn what_is_gone_is_looked_for_only_where_something_can_be() {
    const RECORDS: usize = 300;
    let machine = Machine::with_secrets(RECORDS).await;
    let store = machine.start().await;
    store.delete(&secret(1), RecoveryWindow::days(7).unwrap()).await.unwrap();
    assert!(store.gone(&production()).await.unwrap().is_empty());
    let glance = Cost { gets: 1, ranges: 0, commits: 0, rows: 1 };
    let look = |cost: Cost| cost.ranges == 3 && cost.rows == 1 + RECORDS;

    machine.kv.cost();
    machine.clock.advance(6 * DAY);
    assert!(store.gone(&production()).await.unwrap().is_empty());
    assert_eq!(machine.kv.cost(), glance, "nothing changed, and no window has ended");
    machine.clock.advance(DAY);
    assert_eq!(store.gone(&production()).await.unwrap(), [secret(1)]);
    assert!(look(machine.kv.cost()), "a window has ended");
    assert_eq!(store.gone(&production()).await.unwrap(), [secret(1)], "until it is purged");

    // Another broker on the same store deletes one.
    store.purge(&secret(1)).await.unwrap();
    assert!(store.gone(&production()).await.unwrap().is_empty());
    machine.start().await.delete(&secret(2), RecoveryWindow::days(7).unwrap()).await.unwrap();
    machine.clock.advance(7 * DAY);
    assert_eq!(store.gone(&production()).await.unwrap(), [secret(2)]);
}

/// The first use of an environment compares all of its records with their root. Callers have less patience than that
/// takes where there are very many; if each began anew, none would ever get through.
#[tokio::test]
async fn callers_who_give_up_leave_the_first_comparison_where_it_stands() {
    const RECORDS: usize = 2_000;
    const PAGES: usize = RECORDS.div_ceil(128);
    const TURNS: usize = 5;
    let machine = Machine::with_secrets(RECORDS).await;
    let store = machine.start().await;
    machine.kv.cost();
    let mut gave_up = 0;
    loop {
        tokio::select! {
            biased;
            fetched = read(&store, 7) => {
                assert_eq!(fetched.value.expose_text(), Some("value"));
                break;
            }
            () = turns(TURNS) => gave_up += 1,
        }
        assert!(gave_up <= PAGES, "nobody gets on");
    }
    assert!(gave_up > 1);
    let cost = machine.kv.cost();
    assert_eq!(cost.ranges, PAGES, "each page once");
    read(&store, 8).await;
    assert_eq!(machine.kv.cost().ranges, 0);
}

async fn turns(count: usize) {
    for _ in 0..count {
        yield_now().await;
    }
}
