//! Fills a store, by the store's own code: each secret is put, sealed and counted as any other, only not onto a disk.
//!
//! ```text
//! embedded file ─▶ all that a new broker has there ─▶ memory ◀─ put, put, put … (sealed::Sealed)
//!       ▲                                                │
//!       └──────────── a thousand keys at a time ─────────┘
//! ```
//!
//! A put of its own costs a commit each, which is not what is asked about here.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use claviger::clock::SystemClock;
use claviger::crypto::{KeyRing, RootKey, RootKeySource};
use claviger::kv::embedded::{Embedded, Settings};
use claviger::kv::{
    Compare, Entry, Kv, KvError, LeaseId, Outcome, Page, Revision, Transaction, Watch, Write,
};
use claviger::secret::{SecretValue, VersionId};
use claviger::store::sealed::Sealed;
use claviger::store::{Put, Store as _};

use crate::place::{Place, VALUE, id};

/// What the keys of the sealed store start with.
const SEALED: &[u8] = b"sealed/";
/// How many keys are copied at once.
const AT_ONCE: usize = 1_000;

pub(crate) fn fill(place: &Place, size: usize) {
    let begun = Instant::now();
    std::fs::create_dir_all(place.config().parent().unwrap()).unwrap();
    place.configure();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        // What a broker makes of itself at its first start.
        place.start().await.stop().await.unwrap_or_else(|error| panic!("{error}"));
        // Watches, of which there are none, need not look back far.
        let settings = Settings { history: 10 };
        let file = Embedded::open_with(&place.database(), SystemClock::shared(), settings).await.unwrap();
        let memory = Arc::new(Memory::default());
        memory.load(&file).await;
        put_all(place, &memory, size).await;
        memory.save(&file).await;
        file.close().await.unwrap();
    });
    eprintln!("{size} secrets were put in {:.0} s", begun.elapsed().as_secs_f64());
}

async fn put_all(place: &Place, memory: &Arc<Memory>, size: usize) {
    let (key, _) = RootKey::load(&RootKeySource::File(place.root_key())).unwrap_or_else(|e| panic!("{e}"));
    let kv: Arc<dyn Kv> = Arc::<Memory>::clone(memory);
    let store = Sealed::open(kv, Arc::new(KeyRing::of(key)), SystemClock::shared()).await.unwrap();
    for number in 0..size {
        let put = Put {
            value: SecretValue::text("x".repeat(VALUE)).unwrap(),
            token: VersionId::generate(),
            labels: Vec::new(),
            expected: None,
        };
        store.put(&id(number), put).await.unwrap();
    }
}

/// The key-value layer in memory, for one who reads and writes alone.
#[derive(Default)]
struct Memory {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    revision: Revision,
    entries: BTreeMap<Vec<u8>, Entry>,
}

impl Memory {
    /// Takes over what the file has.
    async fn load(&self, file: &Embedded) {
        let page = file.range(b"", b"", usize::from(u16::MAX)).await.unwrap();
        assert!(!page.more, "a new broker has few keys");
        let mut state = self.state.lock().unwrap();
        state.revision = page.revision;
        state.entries = page.entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
    }

    /// Writes all of the sealed store into the file.
    async fn save(&self, file: &Embedded) {
        let entries = std::mem::take(&mut self.state.lock().unwrap().entries);
        let mut writes = Vec::with_capacity(AT_ONCE);
        for (key, entry) in entries.into_iter().filter(|(key, _)| key.starts_with(SEALED)) {
            writes.push(Write::put(key, entry.value));
            if writes.len() == AT_ONCE {
                commit(file, std::mem::take(&mut writes)).await;
            }
        }
        commit(file, writes).await;
    }
}

async fn commit(file: &Embedded, write: Vec<Write>) {
    let outcome = file.commit(Transaction { compare: Vec::new(), write }).await.unwrap();
    assert!(outcome.succeeded);
}

#[async_trait]
impl Kv for Memory {
    async fn get(&self, key: &[u8]) -> Result<Option<Entry>, KvError> {
        Ok(self.state.lock().unwrap().entries.get(key).cloned())
    }

    async fn range(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<Page, KvError> {
        let state = self.state.lock().unwrap();
        let from = if after < prefix { Bound::Included(prefix) } else { Bound::Excluded(after) };
        let mut found = state
            .entries
            .range::<[u8], _>((from, Bound::Unbounded))
            .map(|(_, entry)| entry)
            .take_while(|entry| entry.key.starts_with(prefix));
        let entries = found.by_ref().take(limit).cloned().collect();
        Ok(Page { entries, more: found.next().is_some(), revision: state.revision })
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, KvError> {
        let mut state = self.state.lock().unwrap();
        let holds = |Compare::ModRevision(key, expected): &Compare| {
            state.entries.get(key).map_or(0, |entry| entry.mod_revision) == *expected
        };
        if !transaction.compare.iter().all(holds) {
            return Ok(Outcome { succeeded: false, revision: state.revision });
        }
        state.revision += 1;
        let revision = state.revision;
        for write in transaction.write {
            match write {
                Write::Put { key, value, lease } => {
                    let before = state.entries.get(&key).map(|entry| entry.create_revision);
                    let create_revision = before.unwrap_or(revision);
                    let entry =
                        Entry { key: key.clone(), value, create_revision, mod_revision: revision, lease };
                    state.entries.insert(key, entry);
                }
                Write::Delete { key } => {
                    state.entries.remove(&key);
                }
            }
        }
        Ok(Outcome { succeeded: true, revision })
    }

    async fn watch(&self, _: &[u8], _: Revision) -> Result<Watch, KvError> {
        Err(only_filled())
    }

    async fn revision(&self) -> Result<Revision, KvError> {
        Ok(self.state.lock().unwrap().revision)
    }

    async fn lease(&self, _: Duration) -> Result<LeaseId, KvError> {
        Err(only_filled())
    }

    async fn renew(&self, _: LeaseId) -> Result<(), KvError> {
        Err(only_filled())
    }

    async fn release(&self, _: LeaseId) -> Result<(), KvError> {
        Err(only_filled())
    }
}

fn only_filled() -> KvError {
    KvError::Unavailable { doing: "serving", cause: "this one is only filled".to_owned() }
}
