//! A great many schedules: what it costs to find those that are due, and to decide about each.
//!
//! The ledger is filled by transactions of the key-value layer, in the format that the ledger reads (see its own
//! drawing): a thousand records and their places in the index at a time. How long that takes is not measured.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger::clock::SystemClock;
use claviger::crypto::{MacKey, RootKey};
use claviger::kv::embedded::{Embedded, Settings};
use claviger::kv::{Kv, Transaction, Write};
use claviger::rotation::ledger::Ledger;
use claviger::rotation::record::Rotation;
use claviger::rotation::schedule::{Verdict, verdict};
use claviger::secret::SecretId;
use jiff::Timestamp;

use crate::{Beside, Options, Row, definition, median, per_second};

/// How many secrets a transaction sets rotations for.
const BATCH: usize = 1_000;
/// How many times each question is asked.
const QUESTIONS: usize = 501;
/// How many records are decoded, to have something beside a decision.
const DECODED: usize = 100_000;
const GAP: Duration = Duration::from_secs(600);

pub(crate) async fn measure(options: &Options, folder: &Path) -> Vec<Row> {
    // Watches, of which there are none, need not look back far.
    let path = folder.join("schedules.db");
    let embedded = Embedded::open_with(&path, SystemClock::shared(), Settings { history: 10 }).await.unwrap();
    let kv: Arc<dyn Kv> = Arc::new(embedded.clone());
    let key = Arc::new(key());
    fill(kv.as_ref(), &key, options.schedules).await;
    let lease = Duration::from_secs(60);
    let ledger = Ledger::new(Arc::clone(&kv), key, SystemClock::shared(), "benchmark", lease);

    let get = bare_get(kv.as_ref(), options.schedules).await;
    let mut rows = Vec::new();
    if options.wants("schedules") {
        for due in [0, 100, 10_000].into_iter().filter(|due| *due <= options.schedules) {
            let name = format!("the first 100 of {due} due, of {} schedules", options.schedules);
            rows.push(Row::new(name, first_due(&ledger, due).await, "µs", Some(&get)));
        }
        let name = format!("when the next one is due, of {} schedules", options.schedules);
        rows.push(Row::new(name, next_attention(&ledger).await, "µs", Some(&get)));
    }
    if options.wants("mend") {
        eprintln!("looking at every record …");
        let begun = Instant::now();
        assert_eq!(ledger.mend_index().await.unwrap(), 0, "nothing is amiss");
        let each = begun.elapsed().as_secs_f64() * 1e6 / options.schedules as f64;
        rows.push(Row::new("the index compared with the records, for each", each, "µs", Some(&get)));
    }
    embedded.close().await.unwrap();
    rows
}

fn key() -> MacKey {
    let root = RootKey::generate().unwrap_or_else(|error| panic!("{error}"));
    let (key, _) =
        MacKey::create(&root, &[b"benchmark".as_slice()]).unwrap_or_else(|error| panic!("{error}"));
    key
}

/// When the first of them is due. Each other one is due a millisecond after the one before.
fn first_at() -> Timestamp {
    "2100-01-01T00:00:00Z".parse().unwrap()
}

fn after_first(milliseconds: usize) -> Timestamp {
    first_at().checked_add(Duration::from_millis(milliseconds as u64)).unwrap()
}

fn id(number: usize) -> SecretId {
    SecretId::parse("production", &format!("payments/service-{number:07}/database")).unwrap()
}

async fn fill(kv: &dyn Kv, key: &MacKey, count: usize) {
    let begun = Instant::now();
    let mut rotation = Rotation::new(definition("every 30d"), first_at());
    let numbers: Vec<usize> = (0..count).collect();
    for batch in numbers.chunks(BATCH) {
        let mut write = Vec::with_capacity(2 * batch.len());
        for number in batch {
            let id = id(*number);
            rotation.next_at = after_first(*number);
            let record = rotation.encode(key, &id).unwrap();
            let place = format!("{}/{}", id.environment, id.name);
            write.push(Write::put(format!("rotation/record/{place}"), record));
            let due = format!("rotation/due/{:020}/{place}", rotation.next_at.as_millisecond());
            write.push(Write::put(due, Vec::new()));
        }
        assert!(kv.commit(Transaction { compare: Vec::new(), write }).await.unwrap().succeeded);
    }
    eprintln!("{count} schedules were set in {:.0} s", begun.elapsed().as_secs_f64());
}

/// One record, read from the key-value layer.
async fn bare_get(kv: &dyn Kv, count: usize) -> Beside {
    let mut times = Vec::with_capacity(QUESTIONS);
    for number in 0..QUESTIONS {
        // Not in order: 7,919 is prime.
        let id = id(number * 7_919 % count);
        let record = format!("rotation/record/{}/{}", id.environment, id.name);
        let begun = Instant::now();
        assert!(kv.get(record.as_bytes()).await.unwrap().is_some());
        times.push(begun.elapsed());
    }
    Beside { what: "one record, read", figure: median(times) }
}

async fn first_due(ledger: &Ledger, due: usize) -> f64 {
    let now = match due.checked_sub(1) {
        Some(last) => after_first(last),
        None => first_at().checked_sub(Duration::from_secs(1)).unwrap(),
    };
    let mut times = Vec::with_capacity(QUESTIONS);
    for _ in 0..QUESTIONS {
        let begun = Instant::now();
        let found = ledger.due(now, None, 100).await.unwrap();
        times.push(begun.elapsed());
        assert_eq!(found.len(), due.min(100));
    }
    median(times)
}

async fn next_attention(ledger: &Ledger) -> f64 {
    let mut times = Vec::with_capacity(QUESTIONS);
    for _ in 0..QUESTIONS {
        let begun = Instant::now();
        let next = ledger.next_attention().await.unwrap();
        times.push(begun.elapsed());
        assert_eq!(next, Some(first_at()));
    }
    median(times)
}

/// The decision about each of so many schedules, without any I/O, beside what it takes to read a record's bytes.
pub(crate) fn verdicts(count: usize) -> Vec<Row> {
    let decoded = decoded();
    ["every 30d", "cron 0 3 * * 1", "cron 0 3 * * 1 Europe/Zurich"]
        .into_iter()
        .map(|schedule| {
            let rate = decided(schedule, count);
            Row::new(format!("decisions, `{schedule}`, {count} times"), rate, "/s", Some(&decoded))
        })
        .collect()
}

fn decided(schedule: &str, count: usize) -> f64 {
    let ids: Vec<_> = (0..1_024).map(id).collect();
    let mut rotation = Rotation::new(definition(schedule), first_at());
    // Half of them are due by now, some for so long that they are spread.
    let now = after_first(count / 2);
    let (begun, mut due) = (Instant::now(), 0_usize);
    for number in 0..count {
        rotation.next_at = after_first(number);
        let verdict = verdict(&ids[number % ids.len()], black_box(&rotation), GAP, now);
        due += usize::from(matches!(verdict, Verdict::Due | Verdict::Spread(_)));
    }
    let rate = per_second(count, begun);
    assert_eq!(due, count / 2 + 1, "`{schedule}`");
    rate
}

fn decoded() -> Beside {
    let (key, id) = (key(), id(0));
    let bytes = Rotation::new(definition("every 30d"), first_at()).encode(&key, &id).unwrap();
    let begun = Instant::now();
    for _ in 0..DECODED {
        black_box(Rotation::decode(&key, &id, black_box(&bytes)).unwrap());
    }
    Beside { what: "records decoded", figure: per_second(DECODED, begun) }
}
