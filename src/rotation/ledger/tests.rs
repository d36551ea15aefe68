use futures_util::future::join_all;
use jiff::Timestamp;

use super::super::definition::Definition;
use super::super::record::Run;
use super::super::schedule::Schedule;
use super::*;
use crate::clock::{Clock as _, ManualClock};
use crate::crypto::RootKey;
use crate::kv::embedded::Embedded;

const LEASE: Duration = Duration::from_secs(60);

struct Bench {
    _folder: tempfile::TempDir,
    kv: Embedded,
    key: Arc<MacKey>,
    clock: Arc<ManualClock>,
}

impl Bench {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = ManualClock::new(at("2026-01-01T00:00:00Z"));
        let kv = Embedded::open(&folder.path().join("claviger.db"), Arc::clone(&clock) as _).await.unwrap();
        let root = RootKey::from_bytes(&[1; 32]).unwrap();
        let key = Arc::new(MacKey::create(&root, &[b"test"]).unwrap().0);
        Self { _folder: folder, kv, key, clock }
    }

    fn ledger(&self, instance: &str) -> Ledger {
        let clock: SharedClock = Arc::clone(&self.clock) as _;
        Ledger::new(Arc::new(self.kv.clone()), Arc::clone(&self.key), clock, instance, LEASE)
    }

    async fn write(&self, write: Vec<Write>) {
        let outcome = self.kv.commit(Transaction { compare: Vec::new(), write }).await.unwrap();
        assert!(outcome.succeeded);
    }

    /// The keys of the index, without their prefix.
    async fn index(&self) -> Vec<String> {
        let page = self.kv.range(b"rotation/due/", &[], 10_000).await.unwrap();
        let text = |entry: Entry| String::from_utf8(entry.key).unwrap();
        page.entries.into_iter().map(|entry| text(entry).replace("rotation/due/", "")).collect()
    }
}

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn secret(name: &str) -> SecretId {
    SecretId::parse("production", name).unwrap()
}

fn rotation(next_at: &str) -> Rotation {
    let definition = Definition {
        rotator: "random".to_owned(),
        schedule: Schedule::parse("every 30d").unwrap(),
        grace: Duration::from_secs(300),
        group: None,
        retire_after: None,
        repair: false,
        settings: serde_json::Map::new(),
    };
    Rotation::new(definition, at(next_at))
}

async fn set(ledger: &Ledger, id: &SecretId, next_at: &str) {
    ledger.update(id, |_| Ok((Some(rotation(next_at)), ()))).await.unwrap();
}

/// Begins a run, or goes on with the one that is there.
fn begun(mut rotation: Rotation) -> Begin<()> {
    let run = Run::new(rotation.definition.clone(), "schedule".to_owned(), rotation.next_at);
    rotation.run.get_or_insert(run);
    Begin::Run(rotation)
}

async fn mine(ledger: &Ledger, id: &SecretId) -> (Lease, Rotation) {
    match ledger.take(id, begun).await.unwrap() {
        Taken::Mine(lease, rotation) => (lease, rotation),
        other => panic!("not ours: {other:?}"),
    }
}

#[tokio::test]
async fn a_record_comes_back_as_it_was_written_and_goes_when_it_is_removed() {
    let bench = Bench::new().await;
    let (ledger, id) = (bench.ledger("a"), secret("team/database"));
    assert_eq!(ledger.get(&id).await.unwrap(), None);
    assert!(matches!(ledger.take(&id, begun).await.unwrap(), Taken::Missing));
    set(&ledger, &id, "2026-02-01T00:00:00Z").await;
    assert_eq!(ledger.get(&id).await.unwrap(), Some(rotation("2026-02-01T00:00:00Z")));
    assert_eq!(bench.index().await, ["00000001769904000000/production/team/database"]);
    let revision = bench.kv.last_revision();
    ledger.update(&id, |same| Ok((same, ()))).await.unwrap();
    assert_eq!(bench.kv.last_revision(), revision, "what is the same is not written");
    let refused = Failure::new(Trouble::Defect, "no");
    let error = ledger.update::<()>(&id, |_| Err(refused.clone())).await.unwrap_err();
    assert_eq!(error, refused);
    let gone = ledger.update(&id, |was| Ok((None, was.is_some()))).await.unwrap();
    assert!(gone);
    assert_eq!(ledger.get(&id).await.unwrap(), None);
    assert!(bench.index().await.is_empty());
    assert!(!ledger.update(&id, |was| Ok((None, was.is_some()))).await.unwrap());
}

#[tokio::test]
async fn r3_of_many_that_want_one_secret_one_gets_it() {
    let bench = Bench::new().await;
    let (a, b, id) = (bench.ledger("a"), bench.ledger("b"), secret("database"));
    for round in 0..20 {
        set(&a, &id, "2026-02-01T00:00:00Z").await;
        let all = (0..16).map(|n| if n % 2 == 0 { a.take(&id, begun) } else { b.take(&id, begun) });
        let (mut leases, mut busy) = (Vec::new(), 0);
        for taken in join_all(all).await {
            match taken.unwrap() {
                Taken::Mine(lease, rotation) => leases.push((lease, rotation)),
                Taken::Busy(Some(_)) => busy += 1,
                other => panic!("round {round}: {other:?}"),
            }
        }
        assert_eq!((leases.len(), busy), (1, 15), "round {round}");
        let (lease, rotation) = leases.remove(0);
        assert_eq!(rotation.fence, lease.fence());
        assert_eq!(a.get(&id).await.unwrap(), Some(rotation));
        a.release(lease).await;
        a.update(&id, |_| Ok((None, ()))).await.unwrap();
    }
}

#[tokio::test]
async fn r4_who_comes_after_the_lease_has_a_higher_fence_and_who_wakes_late_changes_nothing() {
    let bench = Bench::new().await;
    let (a, b, id) = (bench.ledger("a"), bench.ledger("b"), secret("database"));
    set(&a, &id, "2026-01-01T00:00:00Z").await;
    let (early, _) = mine(&a, &id).await;
    assert!(early.is_fresh(bench.clock.monotonic()) && early.is_live(bench.clock.monotonic()));
    assert!(matches!(b.take(&id, begun).await.unwrap(), Taken::Busy(Some(_))));
    bench.clock.advance(LEASE / 2);
    assert!(!early.is_fresh(bench.clock.monotonic()) && early.is_live(bench.clock.monotonic()));
    assert!(a.renew(&early).await.unwrap());
    assert!(early.is_fresh(bench.clock.monotonic()));
    bench.clock.advance(LEASE - Duration::from_secs(1));
    assert!(!early.is_live(bench.clock.monotonic()), "it may be over by another's clock");
    assert!(matches!(b.take(&id, begun).await.unwrap(), Taken::Busy(Some(_))));
    bench.clock.advance(Duration::from_secs(1));

    let (late, taken) = mine(&b, &id).await;
    assert!(late.fence() > early.fence());
    assert!(!a.renew(&early).await.unwrap());
    let saved = a.save(&early, |rotation| rotation.paused = true).await.unwrap();
    assert!(matches!(saved, Saved::Lost), "{saved:?}");
    a.release(early).await;
    assert_eq!(b.get(&id).await.unwrap(), Some(taken));
    assert!(b.renew(&late).await.unwrap(), "what the other gave back was not ours");
    let saved = b.save(&late, |rotation| rotation.refused = 2).await.unwrap();
    assert!(matches!(saved, Saved::Done(Rotation { refused: 2, .. })), "{saved:?}");
    b.release(late).await;
    mine(&a, &id).await;
}

#[tokio::test]
async fn a_lease_that_is_over_and_that_nobody_took_saves_nothing() {
    let bench = Bench::new().await;
    let (a, id) = (bench.ledger("a"), secret("database"));
    set(&a, &id, "2026-01-01T00:00:00Z").await;
    let (lease, taken) = mine(&a, &id).await;
    bench.clock.advance(LEASE);
    assert!(matches!(a.save(&lease, |rotation| rotation.paused = true).await.unwrap(), Saved::Lost));
    assert!(!a.renew(&lease).await.unwrap());
    assert_eq!(a.get(&id).await.unwrap(), Some(taken));
}

#[tokio::test]
async fn an_instance_that_starts_anew_takes_over_from_itself_at_once() {
    let bench = Bench::new().await;
    let (before, other, id) = (bench.ledger("a"), bench.ledger("b"), secret("database"));
    set(&before, &id, "2026-01-01T00:00:00Z").await;
    let (dead, _) = mine(&before, &id).await;
    assert!(matches!(before.take(&id, begun).await.unwrap(), Taken::Busy(_)), "not from the same boot");
    let after = bench.ledger("a");
    let (lease, _) = mine(&after, &id).await;
    assert!(lease.fence() > dead.fence());
    assert!(matches!(before.save(&dead, |_| ()).await.unwrap(), Saved::Lost));
    assert!(!before.renew(&dead).await.unwrap());
    assert!(matches!(other.take(&id, begun).await.unwrap(), Taken::Busy(_)));
    // The old lease's end takes nothing with it.
    bench.clock.advance(LEASE / 2);
    assert!(after.renew(&lease).await.unwrap());
    bench.clock.advance(LEASE / 2 + Duration::from_secs(1));
    assert!(matches!(after.save(&lease, |_| ()).await.unwrap(), Saved::Done(_)));
}

#[tokio::test]
async fn what_an_instance_was_at_when_it_died_is_due_at_its_next_start() {
    let bench = Bench::new().await;
    let (dead, other) = (bench.ledger("a"), bench.ledger("b"));
    let (cut_off, failed, anothers) = (secret("cut-off"), secret("failed"), secret("anothers"));
    let (released, over) = (secret("released"), secret("over"));
    let begun_at = bench.clock.now();
    let lease_ends = begun_at.saturating_add(LEASE).unwrap();
    let tried_again_at = at("2026-01-01T01:00:00Z");
    rests(&dead, &cut_off, lease_ends).await;
    rests(&dead, &failed, tried_again_at).await;
    rests(&other, &anothers, lease_ends).await;
    dead.release(rests(&dead, &released, lease_ends).await).await;
    let next_at = at("2026-02-01T00:00:00Z");
    let end = |rotation: &mut Rotation| (rotation.run, rotation.next_at) = (None, next_at);
    let lease = rests(&dead, &over, lease_ends).await;
    assert!(matches!(dead.save(&lease, end).await.unwrap(), Saved::Done(_)));
    assert_eq!(dead.reclaim().await.unwrap(), 0, "it lives, and is at it");

    bench.clock.advance(LEASE / 6);
    let now = bench.clock.now();
    let before = bench.index().await;
    assert!(other.due(now, None, 100).await.unwrap().is_empty());
    let after = bench.ledger("a");
    assert_eq!(after.reclaim().await.unwrap(), 3, "whose leases are there");
    assert_eq!(after.due(now, None, 100).await.unwrap(), std::slice::from_ref(&cut_off));
    for (id, expected) in [
        (&cut_off, now),
        (&failed, tried_again_at),
        (&anothers, lease_ends),
        (&released, lease_ends),
        (&over, next_at),
    ] {
        let rotation = after.get(id).await.unwrap().unwrap();
        assert_eq!(rotation.attention_at(), Some(expected), "{id}");
    }
    assert_eq!(bench.index().await.len(), before.len());
    assert_eq!(after.mend_index().await.unwrap(), 0);
    assert!(matches!(after.take(&anothers, begun).await.unwrap(), Taken::Busy(_)));
    mine(&after, &cut_off).await;
}

/// Takes a rotation, whose run is not to be taken up before `not_before`.
async fn rests(ledger: &Ledger, id: &SecretId, not_before: Timestamp) -> Lease {
    set(ledger, id, "2026-01-01T00:00:00Z").await;
    let (lease, _) = mine(ledger, id).await;
    let wait = |rotation: &mut Rotation| rotation.run.as_mut().unwrap().not_before = not_before;
    assert!(matches!(ledger.save(&lease, wait).await.unwrap(), Saved::Done(_)));
    lease
}

#[tokio::test]
async fn an_instance_that_was_at_more_than_a_page_has_all_of_them_back() {
    let bench = Bench::new().await;
    let ledger = bench.ledger("a");
    let lease_ends = bench.clock.now().saturating_add(LEASE).unwrap();
    let (mut records, mut leases) = (Vec::new(), Vec::new());
    for n in 0..300 {
        let (id, mut rotation) = (secret(&format!("s-{n:04}")), rotation("2026-01-01T00:00:00Z"));
        let run = Run::new(rotation.definition.clone(), "schedule".to_owned(), rotation.next_at);
        rotation.run = Some(Run { not_before: lease_ends, ..run });
        records.push(Write::put(record_key(&id), rotation.encode(&bench.key, &id).unwrap()));
        let owner = if n % 100 == 0 { "b/earlier" } else { "a/earlier" };
        leases.push(Write::put(lease_key(&id), owner));
    }
    bench.write(records).await;
    bench.write(leases).await;
    assert_eq!(ledger.mend_index().await.unwrap(), 300);
    assert_eq!(ledger.reclaim().await.unwrap(), 297);
    assert_eq!(ledger.due(bench.clock.now(), None, 1_000).await.unwrap().len(), 297);
}

#[tokio::test]
async fn who_may_not_begin_says_so_and_nothing_is_written() {
    let bench = Bench::new().await;
    let (a, b, id) = (bench.ledger("a"), bench.ledger("b"), secret("database"));
    set(&a, &id, "2026-01-01T00:00:00Z").await;
    let revision = bench.kv.last_revision();
    let taken = a.take(&id, |rotation| Begin::No(rotation.next_at)).await.unwrap();
    assert!(matches!(taken, Taken::No(next_at) if next_at == at("2026-01-01T00:00:00Z")), "{taken:?}");
    assert_eq!(bench.kv.last_revision(), revision);
    mine(&b, &id).await;
}

#[tokio::test]
async fn what_others_do_meanwhile_is_kept() {
    let bench = Bench::new().await;
    let (a, b, id) = (bench.ledger("a"), bench.ledger("b"), secret("database"));
    set(&a, &id, "2026-01-01T00:00:00Z").await;
    let (lease, _) = mine(&a, &id).await;
    let pause_and_abort = |rotation: Option<Rotation>| {
        let mut rotation = rotation.unwrap();
        rotation.paused = true;
        rotation.run.as_mut().unwrap().abort = true;
        // Nobody brings a fence back.
        rotation.fence = 0;
        Ok((Some(rotation), ()))
    };
    b.update(&id, pause_and_abort).await.unwrap();
    let attempt = |rotation: &mut Rotation| rotation.run.as_mut().unwrap().attempt += 1;
    let Saved::Done(saved) = a.save(&lease, attempt).await.unwrap() else { panic!("lost") };
    assert!(saved.paused && saved.run.as_ref().unwrap().abort);
    assert_eq!(saved.fence, lease.fence());
    assert_eq!(b.get(&id).await.unwrap(), Some(saved));

    // All at once: each counts, none undoes another.
    let saves = (0..4).map(|_| async { matches!(a.save(&lease, attempt).await.unwrap(), Saved::Done(_)) });
    let refuse = |rotation: Option<Rotation>| {
        let mut rotation = rotation.unwrap();
        rotation.refused += 1;
        Ok((Some(rotation), ()))
    };
    let updates = (0..4).map(|_| b.update(&id, refuse));
    let (saved, updated) = tokio::join!(join_all(saves), join_all(updates));
    assert!(saved.into_iter().all(|done| done) && updated.into_iter().all(|done| done.is_ok()));
    let last = a.get(&id).await.unwrap().unwrap();
    assert_eq!((last.run.unwrap().attempt, last.refused), (5, 4));
}

#[tokio::test]
async fn a_fence_grows_also_over_a_removal() {
    let bench = Bench::new().await;
    let (a, id) = (bench.ledger("a"), secret("database"));
    let mut last = 0;
    for _ in 0..5 {
        set(&a, &id, "2026-01-01T00:00:00Z").await;
        let (lease, _) = mine(&a, &id).await;
        assert!(lease.fence() > last);
        last = lease.fence();
        a.release(lease).await;
        let (lease, _) = mine(&a, &id).await;
        assert!(lease.fence() > last);
        last = lease.fence();
        a.release(lease).await;
        a.update(&id, |_| Ok((None, ()))).await.unwrap();
    }
}

#[tokio::test]
async fn what_is_due_comes_in_its_order_and_moves_with_its_record() {
    let bench = Bench::new().await;
    let ledger = bench.ledger("a");
    assert_eq!(ledger.next_attention().await.unwrap(), None);
    for (name, next_at) in [
        ("c", "2026-01-01T00:00:00Z"),
        ("a/b", "2026-01-02T00:00:00Z"),
        ("b", "2025-12-31T00:00:00Z"),
        ("later", "2026-01-03T00:00:00.0000001Z"),
        ("ancient", "1960-01-01T00:00:00Z"),
    ] {
        set(&ledger, &secret(name), next_at).await;
    }
    let staging = SecretId::parse("staging", "c").unwrap();
    set(&ledger, &staging, "2026-01-01T12:00:00Z").await;
    let due = async |now: &str, environment: Option<&str>, limit: usize| {
        let environment = environment.map(|name| EnvironmentName::parse(name).unwrap());
        let due = ledger.due(at(now), environment.as_ref(), limit).await.unwrap();
        due.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    let ordered = "production:ancient production:b production:c staging:c production:a/b";
    assert_eq!(due("2026-01-03T00:00:00Z", None, 100).await, ordered);
    assert_eq!(due("2026-01-03T00:00:00.001Z", None, 100).await, format!("{ordered} production:later"));
    assert_eq!(due("2026-01-03T00:00:00Z", None, 2).await, "production:ancient production:b");
    assert_eq!(due("2026-01-03T00:00:00Z", None, 0).await, "");
    assert_eq!(due("2026-01-03T00:00:00Z", Some("staging"), 100).await, "staging:c");
    assert_eq!(due("2026-01-01T00:00:00Z", Some("staging"), 100).await, "");
    assert_eq!(ledger.next_attention().await.unwrap(), Some(Timestamp::UNIX_EPOCH));

    // A run's own time counts while there is one; what is paused is nowhere.
    set(&ledger, &secret("ancient"), "2026-01-04T00:00:00Z").await;
    let (lease, _) = mine(&ledger, &secret("b")).await;
    let until = at("2026-01-02T12:00:00Z");
    ledger.save(&lease, |rotation| rotation.run.as_mut().unwrap().not_before = until).await.unwrap();
    let pause = |rotation: Option<Rotation>| Ok((rotation.map(|was| Rotation { paused: true, ..was }), ()));
    ledger.update(&secret("c"), pause).await.unwrap();
    let ordered = "staging:c production:a/b production:b";
    assert_eq!(due("2026-01-03T00:00:00Z", None, 100).await, ordered);
    assert_eq!(bench.index().await.len(), 5);
    assert_eq!(ledger.mend_index().await.unwrap(), 0);
}

#[tokio::test]
async fn more_than_a_page_is_due_and_listed() {
    let bench = Bench::new().await;
    let ledger = bench.ledger("a");
    let mut write = Vec::new();
    for n in 0..300 {
        let (id, rotation) = (secret(&format!("s-{n:04}")), rotation("2026-01-01T00:00:00Z"));
        let environment = if n % 100 == 0 { "staging" } else { "production" };
        let id = SecretId::parse(environment, id.name.as_str()).unwrap();
        write.push(Write::put(record_key(&id), rotation.encode(&bench.key, &id).unwrap()));
    }
    bench.write(write).await;
    let now = at("2026-01-01T00:00:00Z");
    assert!(ledger.due(now, None, 1_000).await.unwrap().is_empty());
    assert_eq!(ledger.mend_index().await.unwrap(), 300, "an index that is lost is made anew");
    assert_eq!(ledger.due(now, None, 1_000).await.unwrap().len(), 300);
    assert_eq!(ledger.due(now, None, 299).await.unwrap().len(), 299);
    let staging = EnvironmentName::parse("staging").unwrap();
    assert_eq!(ledger.due(now, Some(&staging), 1_000).await.unwrap().len(), 3);
    assert_eq!(ledger.due(now, Some(&staging), 2).await.unwrap().len(), 2);

    let production = EnvironmentName::parse("production").unwrap();
    let (mut names, mut after): (Vec<SecretName>, Option<SecretName>) = (Vec::new(), None);
    loop {
        let page = ledger.list(&production, after.as_ref(), 100).await.unwrap();
        assert!(page.rotations.iter().all(|(id, rotation)| id.environment == production && rotation.is_ok()));
        names.extend(page.rotations.into_iter().map(|(id, _)| id.name));
        after = names.last().cloned();
        if !page.more {
            break;
        }
    }
    assert_eq!(names.len(), 297);
    assert!(names.is_sorted());
    let other = EnvironmentName::parse("prod").unwrap();
    assert!(ledger.list(&other, None, 100).await.unwrap().rotations.is_empty());
}

#[tokio::test]
async fn an_index_that_misleads_is_mended() {
    let bench = Bench::new().await;
    let ledger = bench.ledger("a");
    let (lacking, moved, gone) = (secret("lacking"), secret("moved"), secret("gone"));
    set(&ledger, &lacking, "2026-02-01T00:00:00Z").await;
    set(&ledger, &moved, "2026-02-01T00:00:00Z").await;
    let right = bench.index().await;
    let early = rotation("2025-12-01T00:00:00Z");
    bench
        .write(vec![
            Write::delete(index::key_of(&lacking, &rotation("2026-02-01T00:00:00Z")).unwrap()),
            Write::put(index::key_of(&moved, &early).unwrap(), Vec::new()),
            Write::put(index::key_of(&gone, &early).unwrap(), Vec::new()),
            Write::put("rotation/due/00000000000000000001/Nobody/x", Vec::new()),
            Write::put("rotation/due/0/production/moved", Vec::new()),
        ])
        .await;
    let now = bench.clock.now();
    assert_eq!(ledger.due(now, None, 100).await.unwrap(), [gone.clone(), moved.clone()], "hints, no more");
    assert_eq!(ledger.mend_index().await.unwrap(), 5);
    assert_eq!(bench.index().await, right);
    assert_eq!(ledger.mend_index().await.unwrap(), 0);
    assert!(ledger.due(now, None, 100).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_record_that_was_changed_or_moved_is_told_and_the_others_are_listed() {
    let bench = Bench::new().await;
    let ledger = bench.ledger("a");
    let (good, bad, moved) = (secret("a"), secret("b"), secret("c"));
    set(&ledger, &good, "2026-01-01T00:00:00Z").await;
    set(&ledger, &bad, "2026-01-01T00:00:00Z").await;
    let mut changed = bench.kv.get(&record_key(&bad)).await.unwrap().unwrap().value;
    *changed.last_mut().unwrap() ^= 1;
    let elsewhere = bench.kv.get(&record_key(&good)).await.unwrap().unwrap().value;
    bench
        .write(vec![
            Write::put(record_key(&bad), changed),
            Write::put(record_key(&moved), elsewhere),
            Write::put("rotation/record/production/d", "short"),
            Write::put("rotation/record/production//", "no name"),
        ])
        .await;
    for id in [&bad, &moved, &secret("d")] {
        let failure = ledger.get(id).await.unwrap_err();
        assert_eq!(failure.trouble, Trouble::RecordUnreadable, "{id}");
        assert!(failure.message.contains(&id.to_string()), "{failure}");
        let taken = ledger.take(id, begun).await.unwrap_err();
        assert_eq!(taken.trouble, Trouble::RecordUnreadable);
        let updated = ledger.update(id, |_| Ok((None, ()))).await.unwrap_err();
        assert_eq!(updated.trouble, Trouble::RecordUnreadable);
    }
    let listed = ledger.list(&good.environment, None, 100).await.unwrap();
    let shown: Vec<_> = listed.rotations.iter().map(|(id, rotation)| (id, rotation.is_ok())).collect();
    assert_eq!(shown, [(&good, true), (&bad, false), (&moved, false), (&secret("d"), false)]);
    // What can't be read keeps its place in the index: another version's broker may know it.
    assert_eq!(ledger.mend_index().await.unwrap(), 0);
    assert_eq!(bench.index().await.len(), 2);
}

#[tokio::test]
async fn r36_a_record_of_a_newer_version_is_left_alone() {
    let bench = Bench::new().await;
    let (ledger, id) = (bench.ledger("a"), secret("database"));
    set(&ledger, &id, "2026-01-01T00:00:00Z").await;
    let entry = bench.kv.get(&record_key(&id)).await.unwrap().unwrap();
    let mut json: serde_json::Value =
        serde_json::from_slice(&entry.value[crate::crypto::MAC_BYTES..]).unwrap();
    json["canary"] = serde_json::Value::from(true);
    let json = serde_json::to_vec(&json).unwrap();
    let parts: [&[u8]; 4] = [b"claviger rotation v1", b"production", b"database", &json];
    let newer = [bench.key.sign(&parts).as_slice(), &json].concat();
    bench.write(vec![Write::put(record_key(&id), newer.clone())]).await;
    let failure = ledger.take(&id, begun).await.unwrap_err();
    assert_eq!(failure.trouble, Trouble::RecordUnreadable);
    assert!(failure.message.contains("version"), "{failure}");
    assert_eq!(bench.kv.get(&record_key(&id)).await.unwrap().unwrap().value, newer);
}

#[tokio::test]
async fn r32_the_members_of_a_group_begin_a_gap_apart() {
    let bench = Bench::new().await;
    let (a, b) = (bench.ledger("a"), bench.ledger("b"));
    let (one, two, gap) = (secret("one"), secret("two"), Duration::from_secs(600));
    assert_eq!(a.group_began(&one.environment, "pair").await.unwrap(), None);
    let claims = [a.claim_group(&one, "pair", gap), b.claim_group(&two, "pair", gap)];
    let claims: Vec<_> = join_all(claims).await.into_iter().map(Result::unwrap).collect();
    let free_at = bench.clock.now().saturating_add(gap).unwrap();
    assert_eq!(claims.iter().filter(|claim| claim.is_none()).count(), 1);
    assert!(claims.contains(&Some(free_at)));
    let (began, first) = a.group_began(&one.environment, "pair").await.unwrap().unwrap();
    assert_eq!(began, bench.clock.now());
    let (first, second) = if first == one.name { (one, two) } else { (two, one) };

    assert_eq!(a.claim_group(&first, "pair", gap).await.unwrap(), None, "one's own is no reason to wait");
    assert_eq!(a.claim_group(&second, "other", gap).await.unwrap(), None, "another group");
    bench.clock.advance(gap);
    assert_eq!(b.claim_group(&second, "pair", gap).await.unwrap(), None);
    assert_eq!(a.claim_group(&first, "pair", gap).await.unwrap(), Some(free_at.saturating_add(gap).unwrap()));

    a.note_group(&first, "pair").await.unwrap();
    let (_, by) = b.group_began(&first.environment, "pair").await.unwrap().unwrap();
    assert_eq!(by, first.name);
    bench.clock.set_wall(at("2025-01-01T00:00:00Z"));
    assert_eq!(b.claim_group(&second, "pair", gap).await.unwrap(), None, "the future says nothing");
}

#[tokio::test]
async fn r32_of_two_members_the_longer_gap_counts() {
    let (short, long) = (Duration::from_secs(60), Duration::from_secs(600));
    for (first, second) in [(short, long), (long, short)] {
        let bench = Bench::new().await;
        let (ledger, one, two) = (bench.ledger("a"), secret("one"), secret("two"));
        assert_eq!(ledger.claim_group(&one, "pair", first).await.unwrap(), None);
        let free_at = bench.clock.now().saturating_add(long).unwrap();
        assert_eq!(ledger.claim_group(&two, "pair", second).await.unwrap(), Some(free_at));
        bench.clock.advance(long);
        assert_eq!(ledger.claim_group(&two, "pair", second).await.unwrap(), None);
    }
}

#[tokio::test]
async fn a_note_of_a_group_that_this_broker_did_not_write_counts_as_none() {
    let bench = Bench::new().await;
    let (ledger, id) = (bench.ledger("a"), secret("one"));
    ledger.note_group(&id, "pair").await.unwrap();
    let key = b"rotation/group/production/pair";
    let mut value = bench.kv.get(key).await.unwrap().unwrap().value;
    bench.write(vec![Write::put("rotation/group/production/moved", value.clone())]).await;
    assert_eq!(ledger.group_began(&id.environment, "moved").await.unwrap(), None);
    *value.last_mut().unwrap() ^= 1;
    bench.write(vec![Write::put(key.as_slice(), value)]).await;
    assert_eq!(ledger.group_began(&id.environment, "pair").await.unwrap(), None);
    assert_eq!(ledger.claim_group(&id, "pair", LEASE).await.unwrap(), None);
    assert!(ledger.group_began(&id.environment, "pair").await.unwrap().is_some());
}
