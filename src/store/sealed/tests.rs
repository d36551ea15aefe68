//! The store over the embedded key-value layer: what it promises, and what an intruder at the file can't do.

use super::*;
use crate::clock::{Clock, ManualClock};
use crate::crypto::{RootKey, RootKeyId};
use crate::error::{Reason, Reasoned};
use crate::kv::embedded::Embedded;
use crate::secret::{ContentType, Label};
use futures_util::FutureExt as _;
use futures_util::future::join_all;
use std::collections::HashMap;

/// A key-value file, and what a broker needs to open the store in it, as often as it likes.
struct Machine {
    kv: Arc<dyn Kv>,
    clock: Arc<ManualClock>,
    _folder: tempfile::TempDir,
}

impl Machine {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = ManualClock::new("2026-03-01T12:00:00Z".parse().unwrap());
        let shared: SharedClock = clock.clone();
        let kv = Embedded::open(&folder.path().join("claviger.db"), shared).await.unwrap();
        Self { kv: Arc::new(kv), clock, _folder: folder }
    }

    /// The store as a broker finds it that has just started.
    async fn start(&self) -> Sealed {
        self.start_with(1).await.unwrap()
    }

    async fn start_with(&self, key: u8) -> Result<Sealed, StoreError> {
        self.start_with_ring(KeyRing::of(root_key(key))).await
    }

    async fn start_with_ring(&self, ring: KeyRing) -> Result<Sealed, StoreError> {
        Sealed::open(Arc::clone(&self.kv), Arc::new(ring), self.clock.clone()).await
    }

    fn pass(&self, days: u64) {
        self.clock.advance(DAY * u32::try_from(days).unwrap());
    }

    async fn stored(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.kv.get(key).await.unwrap().map(|entry| entry.value)
    }

    async fn everything(&self) -> Vec<Entry> {
        let page = self.kv.range(keys::ALL, &[], 10_000).await.unwrap();
        assert!(!page.more);
        page.entries
    }

    /// Writes past the store, as someone could who can write its file.
    async fn overwrite(&self, key: &[u8], value: Option<&[u8]>) {
        let write = vec![value.map_or_else(|| Write::delete(key), |value| Write::put(key, value))];
        assert!(self.kv.commit(Transaction { compare: vec![], write }).await.unwrap().succeeded);
    }

    /// Makes the whole store what it was, as someone could who has kept an old copy of its file.
    async fn bring_back(&self, past: &[Entry]) {
        for entry in self.everything().await {
            self.overwrite(&entry.key, None).await;
        }
        for entry in past {
            self.overwrite(&entry.key, Some(&entry.value)).await;
        }
    }

    async fn swap(&self, one: &[u8], other: &[u8]) {
        let (first, second) = (self.stored(one).await.unwrap(), self.stored(other).await.unwrap());
        self.overwrite(one, Some(&second)).await;
        self.overwrite(other, Some(&first)).await;
    }
}

fn root_key(key: u8) -> RootKey {
    RootKey::from_bytes(&[key; 32]).unwrap()
}

fn id(environment: &str, name: &str) -> SecretId {
    SecretId::parse(environment, name).unwrap()
}

fn environment(name: &str) -> EnvironmentName {
    EnvironmentName::parse(name).unwrap()
}

fn version(number: usize) -> VersionId {
    VersionId::parse(&format!("{number:032}")).unwrap()
}

fn value(text: &str) -> SecretValue {
    SecretValue::text(text.to_owned()).unwrap()
}

fn request(number: usize, text: &str) -> Put {
    Put { value: value(text), token: version(number), labels: vec![], expected: None }
}

async fn read(store: &Sealed, id: &SecretId) -> Result<String, Reason> {
    read_version(store, id, &Selector::CURRENT).await
}

async fn read_version(store: &Sealed, id: &SecretId, selector: &Selector) -> Result<String, Reason> {
    match store.get(id, selector, Freshness::Cached).await {
        Ok(fetched) => Ok(fetched.value.expose_text().unwrap().to_owned()),
        Err(error) => Err(error.reason()),
    }
}

async fn names(store: &Sealed, request: &ListRequest) -> Vec<String> {
    let page = store.list(&environment("production"), request).await.unwrap();
    page.secrets.iter().map(|listed| listed.name.to_string()).collect()
}

fn revision(order: Order) -> u64 {
    match order {
        Order::Revision(revision) => revision,
        Order::Unknown => panic!("the sealed store numbers its changes"),
    }
}

#[tokio::test]
async fn what_is_put_is_read_back_also_after_a_restart() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    let text = id("production", "database/main");
    let bytes = id("production", "certificate");
    store.put(&text, request(1, "first")).await.unwrap();
    let binary = SecretValue::binary(vec![0, 0xff, 10]).unwrap();
    store.put(&bytes, Put { value: binary.clone(), ..request(2, "") }).await.unwrap();

    for store in [store, machine.start().await] {
        let fetched = store.get(&text, &Selector::CURRENT, Freshness::Cached).await.unwrap();
        assert_eq!(fetched.value.expose_text(), Some("first"));
        assert_eq!(fetched.version.id, version(1));
        assert_eq!(fetched.version.labels, [Label::Current]);
        assert_eq!(fetched.version.created_at, machine.clock.now());
        assert_eq!((fetched.source, fetched.age, fetched.stale), (Source::Store, Duration::ZERO, false));
        let fetched = store.get(&bytes, &Selector::CURRENT, Freshness::Refresh).await.unwrap();
        assert!(fetched.value.same_as(&binary));
        assert_eq!(fetched.value.content_type(), ContentType::Binary);
    }
}

#[tokio::test]
async fn labels_follow_the_rules_from_put_to_rollback() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    let id = id("production", "database");
    let first = store.put(&id, request(1, "one")).await.unwrap();
    assert_eq!((first.superseded, first.changed), (None, true));
    let second = store.put(&id, request(2, "two")).await.unwrap();
    assert_eq!(second.superseded, Some(version(1)));
    assert!(first.order.is_older_than(second.order));

    let pending = Put { labels: vec![Label::Pending], ..request(3, "three") };
    let claimed = store.put(&id, pending).await.unwrap();
    assert_eq!((claimed.superseded, claimed.version.labels), (None, vec![Label::Pending]));
    let stolen = Put { labels: vec![Label::Pending], ..request(4, "four") };
    assert_eq!(store.put(&id, stolen).await.unwrap_err().reason(), Reason::Conflict);
    assert_eq!(read_version(&store, &id, &Selector::Version(version(4))).await, Err(Reason::VersionNotFound));

    let rollback = LabelMove { label: Label::Current, from: Some(version(2)), to: Some(version(1)) };
    let moved = store.move_label(&id, &rollback).await.unwrap();
    assert_eq!(
        (moved.version.id.clone(), moved.superseded, moved.changed),
        (version(1), Some(version(2)), true)
    );
    assert_eq!(read(&store, &id).await.unwrap(), "one");
    assert_eq!(read_version(&store, &id, &Selector::Label(Label::Previous)).await.unwrap(), "two");
    assert_eq!(read_version(&store, &id, &Selector::Label(Label::Pending)).await.unwrap(), "three");

    let again = store.move_label(&id, &rollback).await.unwrap();
    assert_eq!((again.changed, revision(again.order)), (false, revision(moved.order)), "a retry is harmless");
    let stale = LabelMove { label: Label::Current, from: Some(version(2)), to: Some(version(3)) };
    assert_eq!(store.move_label(&id, &stale).await.unwrap_err().reason(), Reason::Conflict);

    let described = store.describe(&id).await.unwrap();
    let listed: Vec<_> = described.versions.iter().map(|version| version.id.clone()).collect();
    assert_eq!(listed, [version(3), version(2), version(1)], "newest first");
    assert_eq!(revision(described.order), revision(moved.order));
}

#[tokio::test]
async fn a_token_stands_for_one_value() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    let id = id("production", "database");
    let first = store.put(&id, request(1, "one")).await.unwrap();
    store.put(&id, request(2, "two")).await.unwrap();

    let retry = store.put(&id, request(1, "one")).await.unwrap();
    assert_eq!((retry.changed, retry.version.id, retry.superseded), (false, version(1), None));
    assert_eq!(retry.version.labels, [Label::Previous], "a late retry does not bring the value back");
    assert!(first.order.is_older_than(retry.order));
    let binary = Put { value: SecretValue::binary(b"one".to_vec()).unwrap(), ..request(1, "") };
    for other in [request(1, "other"), binary] {
        assert_eq!(store.put(&id, other).await.unwrap_err().reason(), Reason::TokenReused);
    }
    assert_eq!(read(&store, &id).await.unwrap(), "two");
}

#[tokio::test]
async fn one_of_many_that_expect_the_same_wins() {
    let machine = Machine::new().await;
    // Two brokers, so that the transactions decide and not one broker's lock.
    let stores = [machine.start().await, machine.start().await];
    let id = id("production", "database");
    let mut current = None;
    for round in 0..3 {
        let attempts = (0..8).map(|number| {
            let token = round * 10 + number;
            let put = Put { expected: Some(current.clone()), ..request(token, &format!("value {token}")) };
            stores[number % 2].put(&id, put)
        });
        let (won, lost): (Vec<_>, Vec<_>) = join_all(attempts).await.into_iter().partition(Result::is_ok);
        assert_eq!((won.len(), lost.len()), (1, 7));
        assert!(lost.into_iter().all(|lost| lost.unwrap_err().reason() == Reason::Conflict));
        let winner = won.into_iter().next().unwrap().unwrap();
        assert_eq!(winner.superseded, current);
        current = Some(winner.version.id);
    }
    assert_eq!(stores[0].describe(&id).await.unwrap().versions.len(), 3);
    assert!(read(&machine.start().await, &id).await.is_ok(), "the root was kept in step");
}

#[tokio::test]
async fn writers_of_different_secrets_all_succeed() {
    let machine = Machine::new().await;
    let stores = [machine.start().await, machine.start().await];
    let ids: Vec<_> = (0..10).map(|number| id("production", &format!("secret-{number}"))).collect();
    let puts =
        ids.iter().enumerate().map(|(number, id)| stores[number % 2].put(id, request(number, "value")));
    assert!(join_all(puts).await.iter().all(Result::is_ok));
    assert_eq!(
        names(&machine.start().await, &ListRequest { limit: 100, ..ListRequest::default() }).await.len(),
        10
    );
}

#[tokio::test]
async fn what_is_absent_is_said() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    let there = id("production", "database");
    let absent = id("production", "databas");
    store.put(&there, request(1, "one")).await.unwrap();
    let change = LabelMove { label: Label::Pending, from: None, to: Some(version(1)) };
    let refused = [
        store.describe(&absent).await.unwrap_err(),
        store.move_label(&absent, &change).await.unwrap_err(),
        store.delete(&absent, RecoveryWindow::DEFAULT).await.unwrap_err(),
        store.restore(&absent).await.unwrap_err(),
    ];
    assert!(refused.iter().all(|error| error.reason() == Reason::SecretNotFound), "{refused:?}");
    let asked = [
        (absent, Selector::CURRENT),
        (there.clone(), Selector::Version(version(2))),
        (there.clone(), Selector::Label(Label::Pending)),
        (there, Selector::CURRENT),
    ];
    let answers = store.batch_get(&asked, Freshness::Cached).await;
    let reasons: Vec<_> = answers.iter().map(|answer| answer.as_ref().err().map(Reasoned::reason)).collect();
    let (secret, version) = (Some(Reason::SecretNotFound), Some(Reason::VersionNotFound));
    assert_eq!(reasons, [secret, version, version, None]);
}

#[tokio::test]
async fn deletion_hides_then_restores_then_ends() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    let id = id("production", "database");
    store.put(&id, request(1, "one")).await.unwrap();
    let at = store.delete(&id, RecoveryWindow::days(7).unwrap()).await.unwrap();
    assert_eq!(at, machine.clock.now() + 7 * DAY);

    assert_eq!(read(&store, &id).await, Err(Reason::SecretDeleted));
    assert_eq!(store.put(&id, request(2, "two")).await.unwrap_err().reason(), Reason::SecretDeleted);
    let again = store.delete(&id, RecoveryWindow::DEFAULT).await.unwrap_err();
    assert_eq!(again.reason(), Reason::SecretDeleted);
    assert_eq!(store.describe(&id).await.unwrap().deletion_at, Some(at));
    let mut list = ListRequest { limit: 10, ..ListRequest::default() };
    assert_eq!(names(&store, &list).await, [] as [&str; 0]);
    list.include_deleted = true;
    assert_eq!(names(&store, &list).await, ["database"]);

    store.restore(&id).await.unwrap();
    store.restore(&id).await.unwrap();
    assert_eq!(read(&store, &id).await.unwrap(), "one");

    store.delete(&id, RecoveryWindow::days(7).unwrap()).await.unwrap();
    machine.pass(7);
    assert_eq!(read(&store, &id).await, Err(Reason::SecretNotFound));
    assert_eq!(store.restore(&id).await.unwrap_err().reason(), Reason::SecretNotFound);
    assert_eq!(names(&store, &list).await, [] as [&str; 0]);
}

#[tokio::test]
async fn a_name_is_used_anew_after_its_end_and_nothing_old_is_left() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    let id = id("production", "database");
    for number in 1..=3 {
        store.put(&id, request(number, "old")).await.unwrap();
    }
    let old = store.describe(&id).await.unwrap();
    store.delete(&id, RecoveryWindow::days(7).unwrap()).await.unwrap();
    machine.pass(7);

    let must_not_exist = Put { expected: Some(None), ..request(2, "new") };
    let anew = store.put(&id, must_not_exist).await.unwrap();
    assert_eq!((anew.changed, anew.superseded), (true, None));
    assert!(old.order.is_older_than(anew.order));
    let described = store.describe(&id).await.unwrap();
    assert_eq!((described.versions.len(), described.created_at), (1, machine.clock.now()));
    for number in [1, 3] {
        assert_eq!(machine.stored(&keys::value(&id, &version(number))).await, None);
    }
    assert_eq!(read(&machine.start().await, &id).await.unwrap(), "new");
}

#[tokio::test]
async fn purging_removes_what_is_gone_and_that_alone() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    let (gone, deleted, live) = (id("production", "a"), id("production", "b"), id("production", "c"));
    for (number, id) in [&gone, &deleted, &live].into_iter().enumerate() {
        store.put(id, request(number, "value")).await.unwrap();
    }
    store.delete(&gone, RecoveryWindow::days(7).unwrap()).await.unwrap();
    store.delete(&deleted, RecoveryWindow::days(8).unwrap()).await.unwrap();
    machine.pass(7);
    let record = machine.stored(&keys::record(&gone)).await.unwrap();

    let absent = id("production", "d");
    assert_eq!(store.gone(&environment("production")).await.unwrap(), std::slice::from_ref(&gone));
    for (id, purged) in [(&deleted, false), (&live, false), (&absent, false), (&gone, true), (&gone, false)] {
        assert_eq!(store.purge(id).await.unwrap(), purged, "{id}");
    }
    assert!(store.gone(&environment("production")).await.unwrap().is_empty());
    assert_eq!(machine.stored(&keys::record(&gone)).await, None);
    assert_eq!(machine.stored(&keys::value(&gone, &version(0))).await, None);
    assert_eq!(read(&machine.start().await, &live).await.unwrap(), "value");
    store.restore(&deleted).await.unwrap();

    machine.overwrite(&keys::record(&gone), Some(&record)).await;
    assert_eq!(
        read(&machine.start().await, &live).await,
        Err(Reason::Tampered),
        "what was removed came back"
    );
}

#[tokio::test]
async fn a_name_that_is_in_use_again_is_not_purged() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    let id = id("production", "database");
    store.put(&id, request(1, "old")).await.unwrap();
    store.delete(&id, RecoveryWindow::days(7).unwrap()).await.unwrap();
    machine.pass(7);
    assert_eq!(store.gone(&id.environment).await.unwrap(), std::slice::from_ref(&id));
    store.put(&id, request(2, "new")).await.unwrap();
    assert!(!store.purge(&id).await.unwrap());
    assert_eq!(read(&store, &id).await.unwrap(), "new");
}

#[tokio::test]
async fn purges_that_race_with_writers_remove_each_secret_once() {
    let machine = Machine::new().await;
    let stores = [machine.start().await, machine.start().await];
    let ids: Vec<_> = (0..6).map(|number| id("production", &format!("secret-{number}"))).collect();
    for (number, id) in ids.iter().enumerate() {
        stores[0].put(id, request(number, "value")).await.unwrap();
        stores[0].delete(id, RecoveryWindow::days(7).unwrap()).await.unwrap();
    }
    machine.pass(7);
    let live = id("production", "live");
    let purges = ids.iter().flat_map(|id| stores.iter().map(move |store| store.purge(id)));
    let puts = (10..14).map(|number| stores[number % 2].put(&live, request(number, "value")));
    let (purged, written) = futures_util::future::join(join_all(purges), join_all(puts)).await;
    assert_eq!(purged.into_iter().filter(|purged| *purged.as_ref().unwrap()).count(), ids.len());
    assert!(written.iter().all(Result::is_ok));
    assert!(stores[1].gone(&live.environment).await.unwrap().is_empty());
    assert_eq!(read(&machine.start().await, &live).await.unwrap(), "value");
}

#[tokio::test]
async fn old_versions_without_a_label_are_pruned_with_their_values() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    let id = id("production", "database");
    for number in 0..102 {
        store.put(&id, request(number, "value")).await.unwrap();
    }
    assert_eq!(store.describe(&id).await.unwrap().versions.len(), 102);
    machine.pass(1);
    store.put(&id, request(102, "value")).await.unwrap();
    assert_eq!(read_version(&store, &id, &Selector::Version(version(0))).await, Err(Reason::VersionNotFound));
    assert_eq!(read_version(&store, &id, &Selector::Version(version(1))).await.unwrap(), "value");
    assert_eq!(machine.stored(&keys::value(&id, &version(0))).await, None);
    assert!(machine.stored(&keys::value(&id, &version(1))).await.is_some());
}

#[tokio::test]
async fn lists_are_paged_by_name_and_cut_by_prefix() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    for (number, name) in ["b", "a/b", "a", "ab", "a/b/c"].into_iter().enumerate() {
        store.put(&id("production", name), request(number, "value")).await.unwrap();
    }
    store.put(&id("production-eu", "a"), request(9, "value")).await.unwrap();
    let all = ListRequest { limit: 100, ..ListRequest::default() };
    assert_eq!(names(&store, &all).await, ["a", "a/b", "a/b/c", "ab", "b"]);
    for (prefix, expected) in
        [("a/", vec!["a/b", "a/b/c"]), ("ab", vec!["ab"]), ("c", vec![]), ("\0", vec![])]
    {
        assert_eq!(names(&store, &ListRequest { prefix: prefix.to_owned(), ..all.clone() }).await, expected);
    }

    let mut paged = Vec::new();
    let mut request = ListRequest { limit: 2, ..ListRequest::default() };
    loop {
        let page = store.list(&environment("production"), &request).await.unwrap();
        assert!(page.secrets.len() <= 2);
        paged.extend(page.secrets.iter().map(|listed| listed.name.to_string()));
        request.page_token = page.next_page_token;
        if request.page_token.is_none() {
            break;
        }
    }
    assert_eq!(paged, ["a", "a/b", "a/b/c", "ab", "b"]);

    let exact =
        store.list(&environment("production"), &ListRequest { limit: 5, ..all.clone() }).await.unwrap();
    assert_eq!((exact.secrets.len(), exact.next_page_token), (5, None), "a full last page is the last");
    let bad = ListRequest { page_token: Some("../x".to_owned()), ..all };
    let error = store.list(&environment("production"), &bad).await.unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidArgument);
}

#[tokio::test]
async fn names_that_look_like_others_parts_stay_apart() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    let ids = [id("a", "b/c"), id("a", "b"), id("b", "c"), id("a", "bc"), id("ab", "c"), id("a", "v/a/b")];
    for (number, id) in ids.iter().enumerate() {
        store.put(id, request(1, &number.to_string())).await.unwrap();
    }
    for (number, id) in ids.iter().enumerate() {
        assert_eq!(read(&store, id).await.unwrap(), number.to_string());
    }
}

#[tokio::test]
async fn no_value_is_stored_in_the_clear() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    store.put(&id("production", "database"), request(1, "canary-5f3a9c")).await.unwrap();
    for entry in machine.everything().await {
        assert!(!entry.value.windows(6).any(|window| window == b"canary"), "{entry:?}");
    }
}

#[tokio::test]
async fn values_do_not_fit_each_others_places() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    let mut places = Vec::new();
    for (environment, name) in [("production", "a"), ("production", "b"), ("staging", "a")] {
        for number in [1, 2] {
            let id = id(environment, name);
            let text = format!("{environment} {name} {number}");
            store.put(&id, request(number, &text)).await.unwrap();
            places.push((keys::value(&id, &version(number)), id, Selector::Version(version(number)), text));
        }
    }
    for (index, (one, id, selector, text)) in places.iter().enumerate() {
        for (other, other_id, other_selector, _) in &places[index + 1..] {
            machine.swap(one, other).await;
            assert_eq!(read_version(&store, id, selector).await, Err(Reason::Tampered));
            assert_eq!(read_version(&store, other_id, other_selector).await, Err(Reason::Tampered));
            machine.swap(one, other).await;
            assert_eq!(read_version(&store, id, selector).await.as_ref(), Ok(text));
        }
    }
}

#[tokio::test]
async fn a_value_that_is_changed_or_missing_is_named() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    let id = id("production", "database");
    store.put(&id, request(1, "one")).await.unwrap();
    let key = keys::value(&id, &version(1));
    let mut changed = machine.stored(&key).await.unwrap();
    *changed.last_mut().unwrap() ^= 1;
    let others: [Option<&[u8]>; 3] = [Some(&changed), Some(&[]), None];
    for other in others {
        machine.overwrite(&key, other).await;
        let error = store.get(&id, &Selector::CURRENT, Freshness::Cached).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Tampered);
        let expected = format!("version {} of secret `database` in environment `production`", version(1));
        assert!(error.to_string().starts_with(&expected), "{error}");
        assert!(!error.is_transient(), "nothing older may stand in for it");
    }
}

#[tokio::test]
async fn a_value_whose_tag_is_right_is_authenticated_all_the_same() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    let id = id("production", "database");
    store.put(&id, request(1, "one")).await.unwrap();
    let key = keys::value(&id, &version(1));
    let sealed = machine.stored(&key).await.unwrap();
    for position in [0, 40, 85, 92] {
        let mut changed = sealed.clone();
        changed[position] ^= 1;
        machine.overwrite(&key, Some(&changed)).await;
        assert_eq!(read(&store, &id).await, Err(Reason::Tampered), "byte {position}");
    }
    machine.overwrite(&key, Some(&sealed)).await;
    assert_eq!(read(&store, &id).await.unwrap(), "one");
}

/// Writes a value under version 0 of `id`, which was there before, and puts the `old` bytes of that version in its
/// place; they were sealed for this very slot.
async fn old_bytes_do_not_fit(machine: &Machine, store: &Sealed, id: &SecretId, old: &[u8]) {
    let key = keys::value(id, &version(0));
    store.put(id, request(0, "new")).await.unwrap();
    let new = machine.stored(&key).await.unwrap();
    machine.overwrite(&key, Some(old)).await;
    for store in [store, &machine.start().await] {
        assert_eq!(read(store, id).await, Err(Reason::Tampered));
        let retry = store.put(id, request(0, "new")).await;
        assert_eq!(retry.unwrap_err().reason(), Reason::Tampered);
    }
    machine.overwrite(&key, Some(&new)).await;
    assert_eq!(read(store, id).await.unwrap(), "new");
}

#[tokio::test]
async fn the_bytes_of_a_secret_that_is_gone_do_not_fit_its_successor() {
    for purged in [true, false] {
        let machine = Machine::new().await;
        let store = machine.start().await;
        let id = id("production", "database");
        store.put(&id, request(0, "old")).await.unwrap();
        let old = machine.stored(&keys::value(&id, &version(0))).await.unwrap();
        store.delete(&id, RecoveryWindow::days(7).unwrap()).await.unwrap();
        machine.pass(7);
        if purged {
            assert!(store.purge(&id).await.unwrap());
        }
        old_bytes_do_not_fit(&machine, &store, &id, &old).await;
    }
}

#[tokio::test]
async fn the_bytes_of_a_pruned_version_do_not_fit_its_successor() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    let id = id("production", "database");
    for number in 0..102 {
        store.put(&id, request(number, "old")).await.unwrap();
    }
    let old = machine.stored(&keys::value(&id, &version(0))).await.unwrap();
    machine.pass(1);
    store.put(&id, request(102, "value")).await.unwrap();
    assert_eq!(machine.stored(&keys::value(&id, &version(0))).await, None, "pruned");
    old_bytes_do_not_fit(&machine, &store, &id, &old).await;
}

#[tokio::test]
async fn the_generation_counts_changes_and_survives_a_restart() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    assert_eq!(store.generation(), 0);
    let (a, b) = (id("production", "a"), id("staging", "a"));
    store.put(&a, request(1, "one")).await.unwrap();
    store.put(&b, request(1, "one")).await.unwrap();
    store.put(&a, request(2, "two")).await.unwrap();
    assert_eq!(store.generation(), 3);

    store.put(&a, request(2, "two")).await.unwrap();
    store.put(&a, request(2, "other")).await.unwrap_err();
    store.restore(&a).await.unwrap();
    store.purge(&a).await.unwrap();
    read(&store, &a).await.unwrap();
    assert_eq!(store.generation(), 3, "nothing was changed");

    let change = LabelMove { label: Label::Pending, from: None, to: Some(version(1)) };
    store.move_label(&a, &change).await.unwrap();
    store.delete(&a, RecoveryWindow::days(7).unwrap()).await.unwrap();
    machine.pass(7);
    assert!(store.purge(&a).await.unwrap());
    assert_eq!(store.generation(), 6);
    assert_eq!(machine.start().await.generation(), 6);
}

#[tokio::test]
async fn the_generation_is_right_whoever_wins_the_races() {
    let machine = Machine::new().await;
    let stores = [machine.start().await, machine.start().await];
    let id = |number: usize| id("production", &format!("secret-{}", number % 3));
    let attempts = (0_usize..24).map(|number| {
        let expected = number.is_multiple_of(2).then_some(None);
        let put = Put { expected, ..request(number, "value") };
        let (store, id) = (&stores[number / 2 % 2], id(number));
        async move { store.put(&id, put).await }
    });
    let answers = join_all(attempts).await;
    let mut committed = answers.iter().filter(|answer| answer.is_ok()).count() as u64;
    assert!(
        (12..=15).contains(&committed),
        "{committed}: whoever expects nothing, and finds something, loses"
    );
    assert_eq!(machine.start().await.generation(), committed);
    for (number, store) in stores.iter().enumerate() {
        assert!(store.generation() <= committed);
        store.put(&id(0), request(100 + number, "value")).await.unwrap();
        committed += 1;
        assert_eq!(store.generation(), committed, "the other's changes are seen with the root");
    }
}

#[tokio::test]
async fn more_roots_than_a_page_are_all_counted() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    for number in 0..130 {
        store.put(&id(&format!("pr-{number}"), "a"), request(1, "value")).await.unwrap();
    }
    assert_eq!((store.generation(), machine.start().await.generation()), (130, 130));
}

#[tokio::test]
async fn an_old_copy_of_the_whole_store_has_come_less_far() {
    let machine = Machine::new().await;
    let (store, [a, b, _]) = stocked(&machine).await;
    let past = machine.everything().await;
    assert_eq!(store.generation(), 3);
    store.put(&a, request(11, "second")).await.unwrap();
    assert_eq!(machine.start().await.generation(), 4);

    machine.bring_back(&past).await;
    let store = machine.start().await;
    assert_eq!(read(&store, &a).await.unwrap(), "first", "authentic throughout");
    assert_eq!(store.generation(), 3);
    for key in [keys::root(&a.environment), keys::record(&a), keys::record(&b)] {
        machine.overwrite(&key, None).await;
    }
    assert_eq!(machine.start().await.generation(), 1, "an environment that is removed whole is missing");
}

/// A store with two secrets in production and one in staging.
async fn stocked(machine: &Machine) -> (Sealed, [SecretId; 3]) {
    let store = machine.start().await;
    let ids = [id("production", "a"), id("production", "b"), id("staging", "a")];
    for (number, id) in ids.iter().enumerate() {
        store.put(id, request(number, "first")).await.unwrap();
    }
    (store, ids)
}

/// After a restart, production is refused as a whole, and staging is as it was.
async fn production_is_refused(machine: &Machine) {
    let store = machine.start().await;
    for name in ["a", "b", "c"] {
        assert_eq!(read(&store, &id("production", name)).await, Err(Reason::Tampered));
        let put = store.put(&id("production", name), request(50, "more")).await;
        assert_eq!(put.unwrap_err().reason(), Reason::Tampered);
    }
    let list = store.list(&environment("production"), &ListRequest::default()).await;
    assert_eq!(list.unwrap_err().reason(), Reason::Tampered);
    assert_eq!(read(&store, &id("staging", "a")).await.unwrap(), "first");
}

#[tokio::test]
async fn a_record_from_the_past_is_found() {
    let machine = Machine::new().await;
    let (store, [a, ..]) = stocked(&machine).await;
    let past = machine.stored(&keys::record(&a)).await.unwrap();
    store.put(&a, request(11, "second")).await.unwrap();
    let present = machine.stored(&keys::record(&a)).await.unwrap();
    machine.overwrite(&keys::record(&a), Some(&past)).await;
    production_is_refused(&machine).await;
    machine.overwrite(&keys::record(&a), Some(&present)).await;
    assert_eq!(read(&machine.start().await, &a).await.unwrap(), "second");
}

#[tokio::test]
async fn a_root_from_the_past_is_found() {
    let machine = Machine::new().await;
    let (store, [a, ..]) = stocked(&machine).await;
    let key = keys::root(&a.environment);
    let past = machine.stored(&key).await.unwrap();
    store.put(&a, request(11, "second")).await.unwrap();
    machine.overwrite(&key, Some(&past)).await;
    production_is_refused(&machine).await;
}

#[tokio::test]
async fn a_record_does_not_fit_another_name() {
    let machine = Machine::new().await;
    let (store, [a, b, _]) = stocked(&machine).await;
    let copy = machine.stored(&keys::record(&a)).await.unwrap();
    let c = id("production", "c");
    machine.overwrite(&keys::record(&c), Some(&copy)).await;
    assert_eq!(read(&store, &c).await, Err(Reason::Tampered), "also without a restart");
    production_is_refused(&machine).await;

    machine.overwrite(&keys::record(&c), None).await;
    machine.swap(&keys::record(&a), &keys::record(&b)).await;
    assert_eq!(read(&store, &a).await, Err(Reason::Tampered), "also without a restart");
    production_is_refused(&machine).await;
}

#[tokio::test]
async fn a_record_does_not_fit_another_environment() {
    let machine = Machine::new().await;
    let (store, [_, _, staging]) = stocked(&machine).await;
    let copy = machine.stored(&keys::record(&staging)).await.unwrap();
    machine.overwrite(&keys::record(&id("production", "a")), Some(&copy)).await;
    assert_eq!(read(&store, &id("production", "a")).await, Err(Reason::Tampered));
    production_is_refused(&machine).await;
}

#[tokio::test]
async fn a_removed_record_is_found() {
    let machine = Machine::new().await;
    let (_, [a, ..]) = stocked(&machine).await;
    machine.overwrite(&keys::record(&a), None).await;
    production_is_refused(&machine).await;
}

#[tokio::test]
async fn a_removed_root_is_found_also_without_a_restart() {
    let machine = Machine::new().await;
    let (store, [a, ..]) = stocked(&machine).await;
    machine.overwrite(&keys::root(&a.environment), None).await;
    assert_eq!(store.put(&a, request(11, "second")).await.unwrap_err().reason(), Reason::Tampered);
    production_is_refused(&machine).await;
}

#[tokio::test]
async fn a_root_that_is_changed_or_anothers_keeps_the_store_shut() {
    let machine = Machine::new().await;
    let (store, _) = stocked(&machine).await;
    let copy = machine.stored(&keys::root(&environment("staging"))).await.unwrap();
    let own = machine.stored(&keys::root(&environment("production"))).await.unwrap();
    let mut changed = own.clone();
    changed[39] ^= 1;
    for other in [copy.as_slice(), &changed, &own[..111], &[]] {
        machine.overwrite(&keys::root(&environment("production")), Some(other)).await;
        let put = store.put(&id("production", "a"), request(50, "more")).await;
        assert_eq!(put.unwrap_err().reason(), Reason::Tampered);
        let error = machine.start_with(1).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Tampered, "its generation can't be counted");
        assert!(error.to_string().starts_with("the root of environment `production`"), "{error}");
    }
    machine.overwrite(&keys::root(&environment("production")), Some(&own)).await;
    assert_eq!(machine.start().await.generation(), 3);
    machine.overwrite(b"sealed/r/no/name", Some(&own)).await;
    assert_eq!(machine.start_with(1).await.unwrap_err().reason(), Reason::Tampered);
}

#[tokio::test]
async fn another_root_key_is_called_the_wrong_one_and_changes_nothing() {
    let machine = Machine::new().await;
    stocked(&machine).await;
    let before = machine.everything().await;
    let error = machine.start_with(2).await.unwrap_err();
    assert_eq!(error.reason(), Reason::WrongKey);
    let id = |key| root_key(key).id();
    let expected = format!("sealed under {}, the key given is {}", id(1), id(2));
    assert!(error.to_string().contains(&expected), "{error}");
    assert!(machine.everything().await == before);
}

#[tokio::test]
async fn a_store_without_its_own_record_is_not_made_anew() {
    let machine = Machine::new().await;
    let (_, [a, ..]) = stocked(&machine).await;
    let meta = machine.stored(keys::META).await.unwrap();
    machine.overwrite(keys::META, None).await;
    assert_eq!(machine.start_with(1).await.unwrap_err().reason(), Reason::Tampered);
    machine.overwrite(keys::META, Some(&meta[..50])).await;
    assert_eq!(machine.start_with(1).await.unwrap_err().reason(), Reason::Tampered);
    machine.overwrite(keys::META, Some(&meta)).await;
    assert_eq!(read(&machine.start().await, &a).await.unwrap(), "first");
}

#[tokio::test]
async fn two_that_make_the_store_at_once_make_one() {
    let machine = Machine::new().await;
    let started = join_all((0..4).map(|_| machine.start())).await;
    let id = id("production", "database");
    started[0].put(&id, request(1, "one")).await.unwrap();
    for store in &started {
        assert_eq!(store.meta.store_id, started[0].meta.store_id);
        assert_eq!(read(store, &id).await.unwrap(), "one");
    }
}

#[tokio::test]
async fn records_add_up_after_any_sequence_of_changes() {
    let machine = Machine::new().await;
    let mut store = machine.start().await;
    // A fixed sequence that looks random (the constants are Knuth's for MMIX).
    let mut state = 7_u64;
    let mut draw = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for step in 0..150 {
        let id = id("production", &format!("secret-{}", draw(4)));
        let label = Label::parse("stable").unwrap();
        // Refusals are part of the sequence: they must leave everything as it was.
        match draw(7) {
            0..3 => drop(store.put(&id, request(step, "value")).await),
            3 => drop(
                store.move_label(&id, &LabelMove { label, from: None, to: Some(version(step / 2)) }).await,
            ),
            4 => drop(store.delete(&id, RecoveryWindow::days(7).unwrap()).await),
            5 => drop(store.restore(&id).await),
            _ => {
                machine.pass(draw(5));
                for gone in store.gone(&id.environment).await.unwrap() {
                    assert!(store.purge(&gone).await.unwrap());
                }
            }
        }
        if step % 10 == 0 {
            let counted = store.generation();
            store = machine.start().await;
            store.verified(&id.environment).await.unwrap();
            assert_eq!(store.generation(), counted);
        }
    }
    let list = ListRequest { limit: 100, include_deleted: true, ..ListRequest::default() };
    for name in names(&machine.start().await, &list).await {
        let id = id("production", &name);
        store.restore(&id).await.unwrap();
        assert_eq!(read(&store, &id).await.unwrap(), "value");
    }
}

#[tokio::test]
async fn a_ping_asks_the_layer_below() {
    let machine = Machine::new().await;
    machine.start().await.ping(&environment("production")).await.unwrap();
}

/// A store with more values than fit a page, of both kinds, in two environments.
async fn laden(machine: &Machine) -> (Sealed, Vec<SecretId>) {
    let store = machine.start().await;
    let ids: Vec<_> = (0..75)
        .map(|number| id(["staging", "production"][number % 2], &format!("team/secret-{number}")))
        .collect();
    for (number, id) in ids.iter().enumerate() {
        store.put(id, request(number, &format!("value {number}"))).await.unwrap();
    }
    let binary = SecretValue::binary(vec![0xff; 40]).unwrap();
    store.put(&ids[0], Put { value: binary, ..request(1_000, "") }).await.unwrap();
    store.put(&ids[1], request(1_001, "newer")).await.unwrap();
    (store, ids)
}

/// The values of all versions, in a fixed order.
async fn values(store: &Sealed, ids: &[SecretId]) -> Vec<Vec<u8>> {
    let mut values = Vec::new();
    for id in ids {
        for version in store.describe(id).await.unwrap().versions {
            let selector = Selector::Version(version.id);
            let fetched = store.get(id, &selector, Freshness::Cached).await.unwrap();
            values.push(fetched.value.expose().to_vec());
        }
    }
    values
}

async fn rewrap(store: &Sealed) -> Result<Rewrapped, StoreError> {
    store.rewrap(&mut |_| {}).await
}

fn all_under(key: u8, count: u64) -> HashMap<RootKeyId, u64> {
    HashMap::from([(root_key(key).id(), count)])
}

#[tokio::test]
async fn everything_goes_from_one_root_key_to_the_next_and_stays_what_it_was() {
    let machine = Machine::new().await;
    let (store, ids) = laden(&machine).await;
    let (before, entries) = (values(&store, &ids).await, machine.everything().await);
    let generation = store.generation();
    assert_eq!(store.wrapped().await.unwrap(), all_under(1, 78), "77 values and the store's own key");

    store.root_keys.adopt(root_key(2));
    assert_eq!(store.root_key_in_force().await.unwrap(), root_key(1).id(), "until it is asked for");
    let mut told = Vec::new();
    let done = store.rewrap(&mut |so_far| told.push(so_far)).await.unwrap();
    assert_eq!(done, Rewrapped { done: 78, changed: 78 });
    assert_eq!(told, [Rewrapped { done: 65, changed: 65 }, done]);
    assert_eq!(store.wrapped().await.unwrap(), all_under(2, 78));
    assert_eq!(store.root_key_in_force().await.unwrap(), root_key(2).id());
    assert_eq!(rewrap(&store).await.unwrap(), Rewrapped { done: 78, changed: 0 }, "nothing is left to do");

    // Records and roots are as they were, byte for byte.
    for (was, is) in entries.iter().zip(machine.everything().await) {
        assert_eq!(was.key, is.key);
        let wrapped = was.key.starts_with(keys::VALUES) || was.key == keys::META;
        assert_eq!(was.value == is.value, !wrapped, "{was:?}");
    }
    assert_eq!((store.generation(), values(&store, &ids).await), (generation, before.clone()));
    let store = machine.start_with(2).await.unwrap();
    assert_eq!((store.generation(), values(&store, &ids).await), (generation, before), "the new key alone");
    assert_eq!(machine.start_with(1).await.unwrap_err().reason(), Reason::WrongKey);
}

#[tokio::test]
async fn a_value_that_was_on_its_way_under_the_earlier_key_is_sealed_anew() {
    let machine = Machine::new().await;
    let (store, _) = laden(&machine).await;
    let (_, under_the_earlier) = store.in_force(not_opened).await.unwrap();
    store.root_keys.adopt(root_key(2));
    rewrap(&store).await.unwrap();
    let late = Transaction { compare: vec![under_the_earlier], write: vec![Write::put("sealed/x", "")] };
    assert!(!machine.kv.commit(late).await.unwrap().succeeded, "what it compares no longer holds");

    store.put(&id("production", "late"), request(2_000, "late")).await.unwrap();
    assert_eq!(store.wrapped().await.unwrap(), all_under(2, 79));
}

#[tokio::test]
async fn writes_and_reads_go_on_while_everything_is_rewrapped() {
    let machine = Machine::new().await;
    let (store, ids) = laden(&machine).await;
    store.root_keys.adopt(root_key(2));
    let writes = async {
        for (number, id) in ids.iter().enumerate() {
            store.put(id, request(3_000 + number, &format!("other {number}"))).await.unwrap();
            assert_eq!(read(&store, id).await.unwrap(), format!("other {number}"));
            if number % 10 == 9 {
                store.delete(id, RecoveryWindow::days(7).unwrap()).await.unwrap();
            }
        }
    };
    let again_and_again = async {
        for _ in 0..3 {
            rewrap(&store).await.unwrap();
        }
    };
    tokio::join!(writes, again_and_again);
    assert_eq!(store.wrapped().await.unwrap().len(), 1, "nothing is left under the earlier key");
    let store = machine.start_with(2).await.unwrap();
    for (number, id) in ids.iter().enumerate().filter(|(number, _)| number % 10 != 9) {
        assert_eq!(read(&store, id).await.unwrap(), format!("other {number}"));
    }
}

#[tokio::test]
async fn a_rewrapping_that_was_ended_is_finished_by_the_next() {
    let machine = Machine::new().await;
    let (store, ids) = laden(&machine).await;
    let before = values(&store, &ids).await;
    store.root_keys.adopt(root_key(2));
    // Ended after its first page, wherever it then is.
    let mut end = |_| panic!("ended on purpose");
    let ended = std::panic::AssertUnwindSafe(store.rewrap(&mut end)).catch_unwind().await;
    assert!(ended.is_err(), "there is more than a page");
    let left = store.wrapped().await.unwrap();
    assert_eq!(left[&root_key(1).id()] + left[&root_key(2).id()], 78);
    drop(store);

    for alone in [1, 2] {
        let found = machine.start_with(alone).await.map(|_| ());
        assert_eq!(found.is_ok(), alone == 2, "the key in force opens the store");
    }
    let ring = KeyRing::of(root_key(2)).with(root_key(1));
    let store = machine.start_with_ring(ring).await.unwrap();
    assert_eq!(values(&store, &ids).await, before, "with both keys all of it is read");
    store.put(&ids[3], request(4_000, "new")).await.unwrap();
    let done = rewrap(&store).await.unwrap();
    assert!(done.changed > 0 && done.changed < 78, "{done:?}");
    assert_eq!(store.wrapped().await.unwrap(), all_under(2, 79));
}

#[tokio::test]
async fn what_can_not_be_opened_is_named_and_does_not_stop_the_rest() {
    let machine = Machine::new().await;
    let (store, ids) = laden(&machine).await;
    let key = keys::value(&ids[4], &version(4));
    let whole = machine.stored(&key).await.unwrap();
    store.root_keys.adopt(root_key(2));
    let mut changed = whole.clone();
    changed[40] ^= 1;
    for (bytes, reason) in
        [(&changed[..], Reason::Tampered), (&whole[..30], Reason::Tampered), (b"", Reason::Tampered)]
    {
        machine.overwrite(&key, Some(bytes)).await;
        let error = rewrap(&store).await.unwrap_err();
        assert_eq!(error.reason(), reason);
        assert!(error.to_string().contains("team/secret-4"), "{error}");
        assert_eq!(machine.stored(&key).await.unwrap(), bytes, "it is left as it is");
    }
    assert_eq!(store.wrapped().await.unwrap(), all_under(2, 77), "all but that one");
    machine.overwrite(&key, Some(&whole)).await;
    assert_eq!(rewrap(&store).await.unwrap().changed, 1);
    assert_eq!(read(&machine.start_with(2).await.unwrap(), &ids[4]).await.unwrap(), "value 4");
}

#[tokio::test]
async fn b39_a_ciphertext_that_is_cut_is_refused_at_every_length() {
    let machine = Machine::new().await;
    let store = machine.start().await;
    let id = id("production", "database");
    store.put(&id, request(1, "value")).await.unwrap();
    let key = keys::value(&id, &version(1));
    let whole = machine.stored(&key).await.unwrap();
    for length in 0..whole.len() {
        machine.overwrite(&key, Some(&whole[..length])).await;
        assert_eq!(read(&store, &id).await, Err(Reason::Tampered), "{length} bytes");
    }
    machine.overwrite(&key, Some(&whole)).await;
    assert_eq!(read(&store, &id).await.unwrap(), "value");
}
