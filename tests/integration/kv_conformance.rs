//! What every key-value layer does, written against the trait [`Kv`], and run over each implementation:
//!
//! ```text
//! every_check!(embedded, EmbeddedStore);
//! ```
//!
//! A new implementation needs a [`Fixture`] and one such line. What only the embedded store has (its file) follows at
//! the end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use claviger::clock::ManualClock;
use claviger::kv::embedded::{Embedded, Settings};
use claviger::kv::{
    Compare, Entry, Event, Kv, KvError, LeaseId, Outcome, Revision, Transaction, Watch, Write,
};
use futures_util::{FutureExt, StreamExt};
use jiff::Timestamp;
use proptest::prelude::*;
use tempfile::TempDir;

/// An empty store, and what can be done to it from outside.
trait Fixture: Sized {
    async fn new() -> Self;

    fn kv(&self) -> Arc<dyn Kv>;

    /// When this returns, leases see that `by` has passed.
    async fn let_time_pass(&self, by: Duration);

    /// When this returns, all that has happened until now is too old to be watched.
    async fn forget_history(&self);
}

/// Short enough to wait for where time is real, and no shorter than etcd permits.
const LEASE: Duration = Duration::from_secs(3);

macro_rules! every_check {
    ($module:ident, $fixture:ty) => {
        every_check! { $module, $fixture:
            a_key_is_put_read_and_deleted,
            values_and_keys_are_any_bytes,
            a_transaction_has_one_revision,
            what_changes_nothing_takes_no_revision,
            the_last_write_of_a_key_counts,
            a_range_is_in_order_and_holds_its_prefix_alone,
            a_range_comes_in_pages,
            a_comparison_that_fails_writes_nothing,
            an_absent_key_is_created_once,
            racing_increments_all_count,
            a_watch_tells_the_past_and_then_the_present,
            a_watch_from_the_future_waits_for_it,
            a_watch_tells_of_its_prefix_alone,
            a_watch_has_no_seam,
            a_lease_that_ends_takes_its_keys,
            a_renewed_lease_lives_on,
            a_released_lease_is_over,
            an_ended_lease_holds_nothing,
            forgotten_history_is_an_error,
        }
    };
    ($module:ident, $fixture:ty: $($check:ident),+ $(,)?) => {
        mod $module {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $check() {
                    super::$check(&<$fixture>::new().await).await;
                }
            )+
        }
    };
}

every_check!(embedded, EmbeddedStore);

async fn a_key_is_put_read_and_deleted(fixture: &impl Fixture) {
    let kv = fixture.kv();
    assert_eq!(kv.get(b"a").await.unwrap(), None);
    let first = write(&kv, [Write::put("a", "1")]).await.revision;
    let entry = kv.get(b"a").await.unwrap().unwrap();
    let expected = Entry {
        key: b"a".to_vec(),
        value: b"1".to_vec(),
        create_revision: first,
        mod_revision: first,
        lease: None,
    };
    assert_eq!(entry, expected);

    let second = write(&kv, [Write::put("a", "2")]).await.revision;
    let entry = kv.get(b"a").await.unwrap().unwrap();
    assert_eq!(
        (entry.create_revision, entry.mod_revision, entry.value.as_slice()),
        (first, second, &b"2"[..])
    );

    write(&kv, [Write::delete("a")]).await;
    assert_eq!(kv.get(b"a").await.unwrap(), None);
    let anew = write(&kv, [Write::put("a", "3")]).await.revision;
    assert_eq!(kv.get(b"a").await.unwrap().unwrap().create_revision, anew);
}

async fn values_and_keys_are_any_bytes(fixture: &impl Fixture) {
    let kv = fixture.kv();
    let all_bytes: Vec<u8> = (0..=u8::MAX).collect();
    let pairs: [(&[u8], Vec<u8>); 5] = [
        (b"\0", all_bytes.clone()),
        (b"a\0b", Vec::new()),
        (b"\xff\xfe", b"\r\n\0".to_vec()),
        (b"' OR 1=1; --", b"'\"$1".to_vec()),
        (&all_bytes, vec![0xff; 70_000]),
    ];
    for (key, value) in &pairs {
        write(&kv, [Write::put(*key, value.clone())]).await;
    }
    for (key, value) in pairs {
        assert_eq!(kv.get(key).await.unwrap().unwrap().value, value, "{key:?}");
    }
    assert_eq!(kv.get(b"a").await.unwrap(), None, "a key ends where it ends, not at a NUL");
}

async fn a_transaction_has_one_revision(fixture: &impl Fixture) {
    let kv = fixture.kv();
    let before = kv.revision().await.unwrap();
    write(&kv, [Write::put("a", "1"), Write::put("b", "1")]).await;
    let outcome = write(&kv, [Write::put("a", "2"), Write::delete("b"), Write::put("c", "1")]).await;
    assert_eq!(outcome.revision, before + 2, "revisions count the changes");
    assert_eq!(kv.revision().await.unwrap(), outcome.revision);
    for key in [&b"a"[..], b"c"] {
        assert_eq!(kv.get(key).await.unwrap().unwrap().mod_revision, outcome.revision);
    }
    let events = take(&mut kv.watch(b"", outcome.revision).await.unwrap(), 3).await;
    let at = outcome.revision;
    assert_eq!(sorted(events), [event("a", at, false), event("b", at, true), event("c", at, false)]);
}

async fn what_changes_nothing_takes_no_revision(fixture: &impl Fixture) {
    let kv = fixture.kv();
    let before = write(&kv, [Write::put("a", "1")]).await.revision;
    let nothing = [
        Transaction::default(),
        Transaction { compare: vec![Compare::absent("b")], write: Vec::new() },
        Transaction { compare: Vec::new(), write: vec![Write::delete("b"), Write::delete("c")] },
    ];
    for transaction in nothing {
        let outcome = kv.commit(transaction).await.unwrap();
        assert_eq!(outcome, Outcome { succeeded: true, revision: before });
    }
    assert_eq!(kv.revision().await.unwrap(), before);
}

async fn the_last_write_of_a_key_counts(fixture: &impl Fixture) {
    let kv = fixture.kv();
    let writes = [
        Write::put("kept", "1"),
        Write::put("gone", "1"),
        Write::delete("kept"),
        Write::put("kept", "2"),
        Write::delete("gone"),
    ];
    let at = write(&kv, writes).await.revision;
    assert_eq!(kv.get(b"kept").await.unwrap().unwrap().value, b"2");
    assert_eq!(kv.get(b"gone").await.unwrap(), None);
    let after = write(&kv, [Write::put("next", "1")]).await.revision;
    let events = take(&mut kv.watch(b"", at).await.unwrap(), 2).await;
    assert_eq!(events, [event("kept", at, false), event("next", after, false)]);
}

async fn a_range_is_in_order_and_holds_its_prefix_alone(fixture: &impl Fixture) {
    let kv = fixture.kv();
    let mut keys: Vec<&[u8]> = vec![
        b"b",
        b"a",
        b"\xff\xff",
        b"a0",
        b"a/\xff",
        b"a/",
        b"a/1",
        b"\xff",
        b"a.",
        b"a/10",
        b"a/\xff\xff",
        b"a/\0",
        b"\xff\x01",
        b"\xfe",
        b"a/2",
    ];
    let written = write(&kv, keys.iter().map(|key| Write::put(*key, *key))).await;
    keys.sort_unstable();
    let prefixes: [&[u8]; 9] =
        [b"", b"a", b"a/", b"a/1", b"a/\xff", b"a/\xff\xff", b"\xff", b"\xff\xff", b"nothing"];
    for prefix in prefixes {
        let expected: Vec<_> = keys.iter().filter(|key| key.starts_with(prefix)).copied().collect();
        let page = kv.range(prefix, b"", 100).await.unwrap();
        let found: Vec<_> = page.entries.iter().map(|entry| entry.key.as_slice()).collect();
        assert_eq!(found, expected, "under {prefix:?}");
        assert!(page.entries.iter().all(|entry| entry.value == entry.key));
        assert!(!page.more);
        assert_eq!(page.revision, written.revision);
    }
}

async fn a_range_comes_in_pages(fixture: &impl Fixture) {
    let kv = fixture.kv();
    let names: Vec<String> = (0..25).map(|n| format!("p/{n:02}")).collect();
    write(&kv, names.iter().map(|name| Write::put(name.as_str(), "v"))).await;
    write(&kv, [Write::put("o", "before"), Write::put("q", "behind")]).await;
    for limit in [1, 7, 24, 25, 26] {
        let (mut found, mut after): (Vec<String>, Vec<u8>) = (Vec::new(), Vec::new());
        loop {
            let page = kv.range(b"p/", &after, limit).await.unwrap();
            assert!(page.entries.len() == limit || !page.more, "a page is full where more follow");
            found.extend(page.entries.into_iter().map(|entry| String::from_utf8(entry.key).unwrap()));
            if !page.more {
                break;
            }
            after = found.last().unwrap().clone().into_bytes();
        }
        assert_eq!(found, names, "by {limit}");
    }
    let none = kv.range(b"p/", b"p/24", 10).await.unwrap();
    assert!(none.entries.is_empty() && !none.more, "after is exclusive");
    let all = kv.range(b"p/", b"a", 100).await.unwrap();
    assert_eq!(all.entries.len(), 25, "a place before the prefix is its beginning");
    let none = kv.range(b"p/", b"z", 100).await.unwrap();
    assert!(none.entries.is_empty() && !none.more, "nothing comes after a place behind the prefix");
    let between = kv.range(b"p/", b"p/10x", 1).await.unwrap();
    assert_eq!(between.entries.first().unwrap().key, b"p/11", "the place itself need not exist");
}

async fn a_comparison_that_fails_writes_nothing(fixture: &impl Fixture) {
    let kv = fixture.kv();
    write(&kv, [Write::put("a", "1"), Write::put("b", "1")]).await;
    let seen = kv.get(b"a").await.unwrap();
    let swap = |compare: Vec<Compare>| Transaction {
        compare,
        write: vec![Write::put("a", "2"), Write::delete("b")],
    };

    let outcome = kv.commit(swap(vec![Compare::unchanged("a", seen.as_ref())])).await.unwrap();
    assert!(outcome.succeeded);
    write(&kv, [Write::put("b", "2")]).await;

    let now = kv.get(b"a").await.unwrap().unwrap();
    let before = kv.revision().await.unwrap();
    for compare in [
        vec![Compare::unchanged("a", seen.as_ref())],
        vec![Compare::unchanged("a", None)],
        vec![Compare::absent("a")],
        vec![Compare::ModRevision(b"a".to_vec(), now.mod_revision + 1)],
        vec![Compare::unchanged("c", Some(&now))],
        vec![Compare::unchanged("a", Some(&now)), Compare::absent("b")],
        vec![Compare::absent("b"), Compare::unchanged("a", Some(&now))],
    ] {
        let outcome = kv.commit(swap(compare.clone())).await.unwrap();
        assert_eq!(outcome, Outcome { succeeded: false, revision: before }, "{compare:?}");
    }
    assert_eq!(kv.get(b"a").await.unwrap().unwrap(), now);
    assert_eq!(kv.get(b"b").await.unwrap().unwrap().value, b"2");
    assert_eq!(kv.revision().await.unwrap(), before);

    let both = vec![Compare::unchanged("a", Some(&now)), Compare::absent("c"), Compare::unchanged("d", None)];
    assert!(kv.commit(swap(both)).await.unwrap().succeeded);
    assert!(
        kv.commit(swap(vec![Compare::absent("b")])).await.unwrap().succeeded,
        "what is deleted is absent"
    );
}

async fn an_absent_key_is_created_once(fixture: &impl Fixture) {
    let kv = fixture.kv();
    let before = kv.revision().await.unwrap();
    let claims = (0..16_u8).map(|n| {
        let kv = Arc::clone(&kv);
        tokio::spawn(async move {
            let claim = Transaction {
                compare: vec![Compare::absent("claim")],
                write: vec![Write::put("claim", [n])],
            };
            kv.commit(claim).await.unwrap().succeeded.then_some(n)
        })
    });
    let won: Vec<u8> =
        futures_util::future::join_all(claims).await.into_iter().filter_map(Result::unwrap).collect();
    assert_eq!(kv.get(b"claim").await.unwrap().unwrap().value, won, "one won, and its value stands");
    assert_eq!(kv.revision().await.unwrap(), before + 1);
}

async fn racing_increments_all_count(fixture: &impl Fixture) {
    const TASKS: u64 = 32;
    let kv = fixture.kv();
    let before = kv.revision().await.unwrap();
    let tasks = (0..TASKS).map(|_| tokio::spawn(increment(Arc::clone(&kv))));
    for task in futures_util::future::join_all(tasks).await {
        task.unwrap();
    }
    assert_eq!(kv.get(b"counter").await.unwrap().unwrap().value, TASKS.to_be_bytes());
    assert_eq!(kv.revision().await.unwrap(), before + TASKS, "a lost race takes no revision");
}

async fn increment(kv: Arc<dyn Kv>) {
    loop {
        let seen = kv.get(b"counter").await.unwrap();
        let count =
            seen.as_ref().map_or(0, |entry| u64::from_be_bytes(entry.value.as_slice().try_into().unwrap()));
        let next = Transaction {
            compare: vec![Compare::unchanged("counter", seen.as_ref())],
            write: vec![Write::put("counter", (count + 1).to_be_bytes())],
        };
        if kv.commit(next).await.unwrap().succeeded {
            return;
        }
    }
}

async fn a_watch_tells_the_past_and_then_the_present(fixture: &impl Fixture) {
    let kv = fixture.kv();
    let first = write(&kv, [Write::put("a", "1")]).await.revision;
    let second = write(&kv, [Write::put("b", "1")]).await.revision;
    let third = write(&kv, [Write::delete("a")]).await.revision;

    let mut from_first = kv.watch(b"", first).await.unwrap();
    let mut from_second = kv.watch(b"", second).await.unwrap();
    let past = [event("a", first, false), event("b", second, false), event("a", third, true)];
    assert_eq!(take(&mut from_first, 3).await, past);
    assert_eq!(take(&mut from_second, 2).await, past[1..]);
    assert!(from_first.next().now_or_never().is_none(), "the past is told once");

    let fourth = write(&kv, [Write::put("a", "2")]).await.revision;
    for watch in [&mut from_first, &mut from_second] {
        assert_eq!(take(watch, 1).await, [event("a", fourth, false)]);
    }
}

async fn a_watch_from_the_future_waits_for_it(fixture: &impl Fixture) {
    let kv = fixture.kv();
    let now = write(&kv, [Write::put("a", "1")]).await.revision;
    let mut next = kv.watch(b"", now + 1).await.unwrap();
    let mut later = kv.watch(b"", now + 2).await.unwrap();
    assert!(next.next().now_or_never().is_none());
    write(&kv, [Write::put("b", "1")]).await;
    assert_eq!(take(&mut next, 1).await, [event("b", now + 1, false)]);
    assert!(later.next().now_or_never().is_none());
    write(&kv, [Write::put("c", "1")]).await;
    assert_eq!(take(&mut later, 1).await, [event("c", now + 2, false)]);
}

async fn a_watch_tells_of_its_prefix_alone(fixture: &impl Fixture) {
    let kv = fixture.kv();
    let from = kv.revision().await.unwrap() + 1;
    let mut live = kv.watch(b"a/", from).await.unwrap();
    write(&kv, [Write::put("a", "1"), Write::put("a0", "1"), Write::put("b/a/", "1")]).await;
    let both = write(&kv, [Write::put("a/1", "1"), Write::put("c", "1")]).await.revision;
    write(&kv, [Write::delete("a0")]).await;
    let last = write(&kv, [Write::put(*b"a/\xff", "1"), Write::delete("a")]).await.revision;
    let expected =
        [event("a/1", both, false), Event { key: b"a/\xff".to_vec(), revision: last, deleted: false }];
    assert_eq!(take(&mut live, 2).await, expected);
    assert_eq!(take(&mut kv.watch(b"a/", from).await.unwrap(), 2).await, expected);
    assert!(live.next().now_or_never().is_none());
}

/// Watches that begin in the midst of writing, from the past, hear each revision once and in order.
async fn a_watch_has_no_seam(fixture: &impl Fixture) {
    const WRITES: usize = 120;
    let kv = fixture.kv();
    let from = kv.revision().await.unwrap() + 1;
    let (progress, written) = tokio::sync::watch::channel(0);
    let writing = tokio::spawn({
        let kv = Arc::clone(&kv);
        async move {
            let mut revisions = Vec::new();
            for n in 0..WRITES {
                revisions.push(write(&kv, [Write::put(format!("w/{n:03}"), "v")]).await.revision);
                progress.send_replace(n + 1);
            }
            revisions
        }
    });
    let watching: Vec<_> = [0, 10, 50, 100]
        .into_iter()
        .map(|start| {
            let (kv, mut written) = (Arc::clone(&kv), written.clone());
            tokio::spawn(async move {
                written.wait_for(|written| *written >= start).await.map(drop).unwrap();
                let mut watch = kv.watch(b"w/", from).await.unwrap();
                take(&mut watch, WRITES).await
            })
        })
        .collect();
    let revisions = writing.await.unwrap();
    let expected: Vec<_> = revisions
        .iter()
        .enumerate()
        .map(|(n, revision)| event(&format!("w/{n:03}"), *revision, false))
        .collect();
    for watch in watching {
        assert_eq!(watch.await.unwrap(), expected);
    }
}

async fn a_lease_that_ends_takes_its_keys(fixture: &impl Fixture) {
    let kv = fixture.kv();
    let lease = kv.lease(LEASE).await.unwrap();
    assert_ne!(lease, 0);
    write(&kv, [put_on("a", lease), put_on("b", lease), put_on("freed", lease), Write::put("free", "v")])
        .await;
    assert_eq!(kv.get(b"a").await.unwrap().unwrap().lease, Some(lease));
    let before = write(&kv, [Write::put("freed", "v")]).await.revision;
    assert_eq!(
        kv.get(b"freed").await.unwrap().unwrap().lease,
        None,
        "a write without a lease takes the key off it"
    );
    let mut watch = kv.watch(b"", before + 1).await.unwrap();

    fixture.let_time_pass(LEASE * 2).await;
    assert_eq!(kv.get(b"a").await.unwrap(), None);
    assert_eq!(kv.get(b"b").await.unwrap(), None);
    assert!(kv.get(b"free").await.unwrap().is_some());
    assert!(kv.get(b"freed").await.unwrap().is_some());
    let events = sorted(take(&mut watch, 2).await);
    let at = kv.revision().await.unwrap();
    assert!(at > before, "the end of a lease is a change");
    assert_eq!(events, [event("a", at, true), event("b", at, true)]);
    let outcome =
        kv.commit(Transaction { compare: vec![Compare::absent("a")], write: Vec::new() }).await.unwrap();
    assert!(outcome.succeeded);
}

async fn a_renewed_lease_lives_on(fixture: &impl Fixture) {
    let kv = fixture.kv();
    let (renewed, other) = (kv.lease(LEASE).await.unwrap(), kv.lease(LEASE).await.unwrap());
    assert_ne!(renewed, other);
    let before = write(&kv, [put_on("renewed", renewed), put_on("other", other)]).await.revision;
    for _ in 0..3 {
        fixture.let_time_pass(LEASE * 2 / 3).await;
        kv.renew(renewed).await.unwrap();
    }
    assert!(kv.get(b"renewed").await.unwrap().is_some());
    assert_eq!(kv.get(b"other").await.unwrap(), None);
    assert_eq!(kv.revision().await.unwrap(), before + 1, "to renew is no change");
    fixture.let_time_pass(LEASE * 2).await;
    assert_eq!(kv.get(b"renewed").await.unwrap(), None);
}

async fn a_released_lease_is_over(fixture: &impl Fixture) {
    let kv = fixture.kv();
    let (lease, other) = (kv.lease(LEASE).await.unwrap(), kv.lease(LEASE).await.unwrap());
    let before = write(&kv, [put_on("a", lease), put_on("b", other)]).await.revision;
    kv.release(lease).await.unwrap();
    assert_eq!(kv.get(b"a").await.unwrap(), None);
    assert!(kv.get(b"b").await.unwrap().is_some());
    let told = take(&mut kv.watch(b"", before + 1).await.unwrap(), 1).await;
    assert_eq!(told, [event("a", before + 1, true)]);
    kv.release(lease).await.unwrap();
    kv.release(LeaseId::from(u32::MAX)).await.unwrap();
    assert!(matches!(kv.renew(lease).await, Err(KvError::LeaseNotFound { id }) if id == lease));
}

async fn an_ended_lease_holds_nothing(fixture: &impl Fixture) {
    let kv = fixture.kv();
    let lease = kv.lease(LEASE).await.unwrap();
    fixture.let_time_pass(LEASE * 2).await;
    let before = kv.revision().await.unwrap();
    for ended in [lease, LeaseId::from(u32::MAX)] {
        let commit = |compare| {
            let write = vec![Write::put("b", "v"), put_on("a", ended)];
            kv.commit(Transaction { compare, write })
        };
        let refused = commit(Vec::new()).await;
        assert!(matches!(refused, Err(KvError::LeaseNotFound { id }) if id == ended), "{refused:?}");
        let unmet = commit(vec![Compare::ModRevision(b"a".to_vec(), 1)]).await.unwrap();
        assert!(!unmet.succeeded, "what is not written needs no lease");
        assert!(matches!(kv.renew(ended).await, Err(KvError::LeaseNotFound { id }) if id == ended));
    }
    assert_eq!(kv.get(b"b").await.unwrap(), None, "all or nothing");
    assert_eq!(kv.revision().await.unwrap(), before);
}

async fn forgotten_history_is_an_error(fixture: &impl Fixture) {
    let kv = fixture.kv();
    let first = write(&kv, [Write::put("a", "1")]).await.revision;
    let mut slow = kv.watch(b"", first).await.unwrap();
    fixture.forget_history().await;
    let oldest = compacted(kv.watch(b"", first).await, first).await;
    assert!(oldest > first);
    // A watch that was begun in time may have been sent the event before it was forgotten, but no gap after it.
    match next(&mut slow).await {
        Ok(told) => assert_eq!(told, event("a", first, false)),
        Err(error) => assert!(matches!(error, KvError::Compacted { .. }), "{error}"),
    }
    let last = write(&kv, [Write::put("b", "1")]).await.revision;
    assert!(last >= oldest);
    assert_eq!(take(&mut kv.watch(b"", last).await.unwrap(), 1).await, [event("b", last, false)]);
    assert_eq!(kv.get(b"a").await.unwrap().unwrap().mod_revision, first, "what is there is not history");
}

/// What a watch of forgotten history says, at once or as its first item: the oldest revision that is left.
async fn compacted(watch: Result<Watch, KvError>, from: Revision) -> Revision {
    let error = match watch {
        Err(error) => error,
        Ok(mut watch) => next(&mut watch).await.unwrap_err(),
    };
    match error {
        KvError::Compacted { asked, oldest } => {
            assert_eq!(asked, from);
            oldest
        }
        other => panic!("{other}"),
    }
}

async fn write(kv: &Arc<dyn Kv>, writes: impl IntoIterator<Item = Write>) -> Outcome {
    let write = writes.into_iter().collect();
    let outcome = kv.commit(Transaction { compare: Vec::new(), write }).await.unwrap();
    assert!(outcome.succeeded);
    outcome
}

fn put_on(key: &str, lease: LeaseId) -> Write {
    Write::Put { key: key.into(), value: b"v".to_vec(), lease: Some(lease) }
}

fn event(key: &str, revision: Revision, deleted: bool) -> Event {
    Event { key: key.into(), revision, deleted }
}

/// The order of the keys within one revision is the implementation's own.
fn sorted(mut events: Vec<Event>) -> Vec<Event> {
    events.sort_by(|one, other| (one.revision, &one.key).cmp(&(other.revision, &other.key)));
    events
}

/// The next event, or a failed test instead of one that hangs.
async fn next(watch: &mut Watch) -> Result<Event, KvError> {
    let waited = tokio::time::timeout(Duration::from_secs(30), watch.next()).await;
    waited.expect("no event came").expect("the watch has ended")
}

async fn take(watch: &mut Watch, count: usize) -> Vec<Event> {
    let mut events = Vec::new();
    while events.len() < count {
        events.push(next(watch).await.unwrap());
    }
    events
}

/// A step against the model: comparisons, by what they claim of a key, and writes.
#[derive(Debug, Clone)]
struct Step {
    compare: Vec<(u8, Claim)>,
    write: Vec<(u8, Option<u8>)>,
}

#[derive(Debug, Clone, Copy)]
enum Claim {
    AsItIs,
    Absent,
    ChangedBefore,
}

fn any_step() -> impl Strategy<Value = Step> {
    let claim =
        prop_oneof![4 => Just(Claim::AsItIs), 1 => Just(Claim::Absent), 1 => Just(Claim::ChangedBefore)];
    let compare = proptest::collection::vec((0..4_u8, claim), 0..3);
    let write = proptest::collection::vec((0..4_u8, proptest::option::weighted(0.7, any::<u8>())), 0..4);
    (compare, write).prop_map(|(compare, write)| Step { compare, write })
}

/// What the layer is in one map: per key its value, create and mod revision.
#[derive(Default)]
struct Model {
    revision: Revision,
    entries: BTreeMap<Vec<u8>, (Vec<u8>, Revision, Revision)>,
    events: Vec<Event>,
}

impl Model {
    fn mod_revision(&self, key: &[u8]) -> Revision {
        self.entries.get(key).map_or(0, |(_, _, modified)| *modified)
    }

    fn compare(&self, (key, claim): (u8, Claim)) -> Compare {
        let key = vec![key];
        let revision = match claim {
            Claim::AsItIs => self.mod_revision(&key),
            Claim::Absent => 0,
            Claim::ChangedBefore => self.mod_revision(&key).saturating_sub(1),
        };
        Compare::ModRevision(key, revision)
    }

    fn apply(&mut self, transaction: &Transaction) -> Outcome {
        let holds = |Compare::ModRevision(key, revision): &Compare| self.mod_revision(key) == *revision;
        if !transaction.compare.iter().all(holds) {
            return Outcome { succeeded: false, revision: self.revision };
        }
        let next = self.revision + 1;
        let mut last = BTreeMap::new();
        for write in &transaction.write {
            match write {
                Write::Put { key, value, .. } => last.insert(key.clone(), Some(value.clone())),
                Write::Delete { key } => last.insert(key.clone(), None),
            };
        }
        for (key, value) in last {
            let deleted = value.is_none();
            match value {
                Some(value) => {
                    let created = self.entries.get(&key).map_or(next, |(_, created, _)| *created);
                    self.entries.insert(key.clone(), (value, created, next));
                }
                None if self.entries.remove(&key).is_none() => continue,
                None => {}
            }
            self.events.push(Event { key, revision: next, deleted });
            self.revision = next;
        }
        Outcome { succeeded: true, revision: self.revision }
    }
}

async fn agrees_with_the_model(kv: &Arc<dyn Kv>, steps: Vec<Step>) {
    let before = kv.revision().await.unwrap();
    let mut model = Model { revision: before, ..Model::default() };
    for step in steps {
        let transaction = Transaction {
            compare: step.compare.into_iter().map(|claim| model.compare(claim)).collect(),
            write: step
                .write
                .into_iter()
                .map(|(key, value)| match value {
                    Some(value) => Write::put([key], [value]),
                    None => Write::delete([key]),
                })
                .collect(),
        };
        let expected = model.apply(&transaction);
        assert_eq!(kv.commit(transaction).await.unwrap(), expected);
    }
    let page = kv.range(b"", b"", 100).await.unwrap();
    let found: BTreeMap<_, _> = page
        .entries
        .into_iter()
        .map(|entry| (entry.key, (entry.value, entry.create_revision, entry.mod_revision)))
        .collect();
    assert_eq!(found, model.entries);
    assert_eq!(page.revision, model.revision);
    let told = take(&mut kv.watch(b"", before + 1).await.unwrap(), model.events.len()).await;
    assert_eq!(sorted(told), sorted(model.events));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn embedded_agrees_with_a_map(steps in proptest::collection::vec(any_step(), 1..16)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let fixture = EmbeddedStore::new().await;
            agrees_with_the_model(&fixture.kv(), steps).await;
        });
    }
}

struct EmbeddedStore {
    kv: Embedded,
    clock: Arc<ManualClock>,
    _folder: TempDir,
}

impl EmbeddedStore {
    /// More than any check but the one of forgotten history makes, and few enough to make in that one.
    const HISTORY: u32 = 200;
}

impl Fixture for EmbeddedStore {
    async fn new() -> Self {
        let (folder, clock) = (tempfile::tempdir().unwrap(), ManualClock::new(Timestamp::UNIX_EPOCH));
        let settings = Settings { history: Self::HISTORY };
        let kv = Embedded::open_with(&folder.path().join("kv.db"), clock.clone(), settings).await.unwrap();
        Self { kv, clock, _folder: folder }
    }

    fn kv(&self) -> Arc<dyn Kv> {
        Arc::new(self.kv.clone())
    }

    async fn let_time_pass(&self, by: Duration) {
        self.clock.advance(by);
    }

    async fn forget_history(&self) {
        for _ in 0..=Self::HISTORY {
            write(&self.kv(), [Write::put("forget", "the past")]).await;
        }
    }
}

/// What the embedded store does with its file.
mod embedded_file {
    use std::collections::BTreeSet;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{FileExt, PermissionsExt};
    use std::path::{Path, PathBuf};

    use claviger::error::{Reason, Reasoned};
    use sqlx::{ConnectOptions, Connection};

    use super::*;

    fn clock() -> Arc<ManualClock> {
        ManualClock::new(Timestamp::UNIX_EPOCH)
    }

    async fn open(path: &Path) -> Result<Embedded, KvError> {
        Embedded::open(path, clock()).await
    }

    async fn put(kv: &Embedded, key: &str, value: &str) -> Revision {
        let transaction = Transaction { compare: Vec::new(), write: vec![Write::put(key, value)] };
        kv.commit(transaction).await.unwrap().revision
    }

    fn folder() -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kv.db");
        (folder, path)
    }

    /// A file of ours that nobody has open.
    async fn closed_file(path: &Path) {
        let kv = open(path).await.unwrap();
        put(&kv, "a", "1").await;
        kv.close().await.unwrap();
    }

    fn problem(error: KvError) -> String {
        match error {
            KvError::BadFile { problem, .. } => problem,
            other => panic!("{other}"),
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn b38_a_file_belongs_to_one_at_a_time() {
        let (_folder, path) = folder();
        let first = open(&path).await.unwrap();
        let error = open(&path).await.unwrap_err();
        assert!(
            matches!(&error, KvError::Locked { path: named } if *named == path.display().to_string()),
            "{error}"
        );
        assert_eq!(error.reason(), Reason::Locked);
        put(&first, "a", "1").await;
        first.close().await.unwrap();
        assert!(open(&path).await.unwrap().get(b"a").await.unwrap().is_some());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_watch_that_nobody_polls_holds_nothing_up() {
        let (_folder, path) = folder();
        let kv = open(&path).await.unwrap();
        for n in 0..50 {
            put(&kv, &format!("a{n}"), "1").await;
        }
        for _ in 0..200 {
            let mut watch = kv.watch(b"a", 1).await.unwrap();
            // Begun, and left where it happens to be.
            let _ = watch.next().now_or_never();
            let read = tokio::time::timeout(std::time::Duration::from_secs(60), kv.get(b"a1")).await;
            assert!(read.expect("the watch holds the file").unwrap().is_some());
            drop(watch);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_was_committed_is_there_again_after_a_close_and_after_none() {
        let (_folder, path) = folder();
        let kv = open(&path).await.unwrap();
        assert_eq!((kv.last_revision(), put(&kv, "a", "1").await), (0, 1));
        kv.close().await.unwrap();

        let kv = open(&path).await.unwrap();
        assert_eq!((kv.last_revision(), put(&kv, "b", "2").await), (1, 2));
        drop(kv);

        let kv = open(&path).await.unwrap();
        assert_eq!(kv.last_revision(), 2);
        assert_eq!(kv.get(b"a").await.unwrap().unwrap().value, b"1");
        assert_eq!(kv.get(b"b").await.unwrap().unwrap().mod_revision, 2);
        let events = take(&mut kv.watch(b"", 1).await.unwrap(), 2).await;
        assert_eq!(events, [event("a", 1, false), event("b", 2, false)], "history outlives the process too");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn leases_outlive_the_process_and_end_while_it_is_away() {
        let (_folder, path) = folder();
        let clock = clock();
        let kv = Embedded::open(&path, clock.clone()).await.unwrap();
        let (short, long) = (kv.lease(LEASE).await.unwrap(), kv.lease(LEASE * 10).await.unwrap());
        kv.commit(Transaction { compare: Vec::new(), write: vec![put_on("s", short), put_on("l", long)] })
            .await
            .unwrap();
        kv.close().await.unwrap();

        clock.advance(LEASE * 2);
        let kv = Embedded::open(&path, clock).await.unwrap();
        assert_eq!(kv.get(b"s").await.unwrap(), None);
        assert_eq!(kv.get(b"l").await.unwrap().unwrap().lease, Some(long));
        kv.renew(long).await.unwrap();
        assert!(matches!(kv.renew(short).await, Err(KvError::LeaseNotFound { .. })));
        assert!(kv.lease(LEASE).await.unwrap() > long, "a lease's number is never used again");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_ticker_tells_the_watchers_of_an_idle_store() {
        let (_folder, path) = folder();
        let clock = clock();
        let kv = Embedded::open(&path, clock.clone()).await.unwrap();
        let lease = kv.lease(LEASE).await.unwrap();
        kv.commit(Transaction { compare: Vec::new(), write: vec![put_on("a", lease)] }).await.unwrap();
        let mut watch = kv.watch(b"", 2).await.unwrap();
        clock.advance(LEASE - Duration::from_millis(1));
        kv.expire().await.unwrap();
        assert_eq!(kv.last_revision(), 1);
        clock.advance(Duration::from_millis(1));
        kv.expire().await.unwrap();
        assert_eq!(take(&mut watch, 1).await, [event("a", 2, true)]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn files_are_for_their_owner_alone() {
        let (folder, path) = folder();
        let kv = open(&path).await.unwrap();
        put(&kv, "a", "1").await;
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(folder.path()).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o7777, 0o600, "{entry:?}");
            names.insert(entry.file_name().into_string().unwrap());
        }
        assert!(names.iter().map(String::as_str).eq(["kv.db", "kv.db-wal", "kv.db.lock"]), "{names:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_deleted_value_is_overwritten() {
        const CANARY: &str = "canary-5f3a-canary-5f3a";
        let (folder, path) = folder();
        let kv = open(&path).await.unwrap();
        put(&kv, "a", CANARY).await;
        put(&kv, "b", "1").await;
        put(&kv, "a", "1").await;
        kv.commit(Transaction { compare: Vec::new(), write: vec![Write::delete("a")] }).await.unwrap();
        kv.close().await.unwrap();
        for entry in fs::read_dir(folder.path()).unwrap() {
            let path = entry.unwrap().path();
            let content = fs::read(&path).unwrap();
            assert!(!content.windows(CANARY.len()).any(|bytes| bytes == CANARY.as_bytes()), "{path:?}");
        }
    }

    /// Each bad file is refused with its own words, and left as it was.
    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_not_ours_is_refused_and_left_alone() {
        let mut problems = BTreeSet::new();
        for (case, words) in [
            ("garbage", "is not a database"),
            ("short", "is 20 bytes long and no database"),
            ("foreign", "is a database of another program"),
            ("newer", "has schema 99, and this build knows schemas up to 1"),
            ("older", "has no valid schema version"),
            ("damaged", "is damaged"),
            ("open", "is open to other users (mode 0640)"),
        ] {
            let (_folder, path) = folder();
            make_bad(&path, case).await;
            let before = fs::read(&path).unwrap();
            let error = open(&path).await.unwrap_err();
            assert_eq!(error.reason(), Reason::Tampered, "{case}: {error}");
            assert!(!error.to_string().contains('\n'), "{case}: {error}");
            let problem = problem(error);
            assert!(problem.starts_with(words), "{case}: {problem}");
            assert_eq!(fs::read(&path).unwrap(), before, "{case}");
            problems.insert(problem);
        }
        assert_eq!(problems.len(), 7);
    }

    /// Positions in the header are those of the SQLite file format, section 1.3.
    async fn make_bad(path: &Path, case: &str) {
        match case {
            "garbage" => fs::write(path, "x".repeat(5_000)).unwrap(),
            "short" => fs::write(path, "x".repeat(20)).unwrap(),
            "foreign" => {
                let options =
                    sqlx::sqlite::SqliteConnectOptions::new().filename(path).create_if_missing(true);
                let mut other = options.connect().await.unwrap();
                sqlx::raw_sql("CREATE TABLE other (id)").execute(&mut other).await.unwrap();
                other.close().await.unwrap();
            }
            _ => closed_file(path).await,
        }
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_permissions(Permissions::from_mode(if case == "open" { 0o640 } else { 0o600 })).unwrap();
        match case {
            "newer" => file.write_all_at(&99_u32.to_be_bytes(), 60).unwrap(),
            "older" => file.write_all_at(&0_u32.to_be_bytes(), 60).unwrap(),
            "damaged" => file.write_all_at(&[0xff; 3_000], 100).unwrap(),
            _ => {}
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_link_is_not_followed() {
        for suffix in ["", ".lock"] {
            let (folder, path) = folder();
            let target = folder.path().join("target");
            fs::write(&target, "").unwrap();
            std::os::unix::fs::symlink(&target, format!("{}{suffix}", path.display())).unwrap();
            assert!(problem(open(&path).await.unwrap_err()).starts_with("is a symbolic link"));
            assert_eq!(fs::read(&target).unwrap(), b"");
        }
        let (_folder, path) = folder();
        fs::create_dir(&path).unwrap();
        assert!(problem(open(&path).await.unwrap_err()).starts_with("is not a regular file"));
    }

    /// Only root can give a file away, so only root can try this.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_file_of_another_user_is_refused() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let (_folder, path) = folder();
        closed_file(&path).await;
        std::os::unix::fs::chown(&path, Some(1), None).unwrap();
        assert!(problem(open(&path).await.unwrap_err()).starts_with("belongs to user 1"));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_missing_folder_is_named() {
        let (folder, _) = folder();
        let path = folder.path().join("missing").join("kv.db");
        let error = open(&path).await.unwrap_err();
        assert_eq!(error.reason(), Reason::StoreUnavailable);
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }

    /// A path may look like one of SQLite's own names.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_strange_name_is_a_name() {
        let (folder, _) = folder();
        for name in [":memory:", "file:x?mode=memory", "with space%20and%00"] {
            let path = folder.path().join(name);
            put(&open(&path).await.unwrap(), "a", "1").await;
            assert!(path.is_file(), "{name}");
        }
    }
}
