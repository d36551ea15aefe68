//! How one key of the audit log gives way to the next: what each of them vouches for, what shows, and what a crash leaves.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use claviger::audit::{
    Anchor, AuditError, FindingKind, Log, Report, Settings, SigningKey, VerifyingKey, hands_over, verify,
};
use claviger::clock::Clock;
use claviger::environment::Durability::{Durable, Relaxed};
use claviger::error::{Reason, Reasoned};
use futures_util::future::join_all;
use jiff::Timestamp;
use ring::signature::{Ed25519KeyPair, KeyPair};
use rustix::process::Signal;

use crate::audit::{
    BODY, Place, SmallDisk, details, findings, json, kinds, place_of, rechained, record, rehashed,
};
use crate::support::assembled::{self, administrator, records};
use crate::support::program::{self, Program};

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(86_400);

/// A key pair outside of the log: what it signs is put together here from the documented format alone.
struct Pair {
    document: Vec<u8>,
    pair: Ed25519KeyPair,
    public: VerifyingKey,
}

impl Pair {
    fn new() -> Self {
        Self::of(SigningKey::generate_pkcs8().unwrap().to_vec())
    }

    fn of(document: Vec<u8>) -> Self {
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&document).unwrap();
        let public = VerifyingKey::from_bytes(pair.public_key().as_ref()).unwrap();
        Self { document, pair, public }
    }

    fn signing(&self) -> SigningKey {
        SigningKey::from_pkcs8(&self.document).unwrap()
    }

    fn sign(&self, text: &str) -> String {
        data_encoding::BASE64.encode(self.pair.sign(text.as_bytes()).as_ref())
    }

    /// The checkpoint by this key that would follow these lines; with `next`, one that hands over to it.
    fn checkpoint(&self, lines: &[String], next: Option<&Self>) -> String {
        let before = place_of(lines.last().unwrap());
        let Anchor { instance, seq, hash } = before;
        let time = "2026-01-02T03:04:05.000000Z";
        let title = if next.is_some() { "handover" } else { "checkpoint" };
        let mut text = format!("claviger audit {title} v1\n{instance}\n{seq}\n{hash}\n0\n{time}\n");
        if let Some(next) = next {
            text += &format!("key {}\nnext {}\n", self.public, next.public);
        }
        let (id, signature) = (self.public.id(), self.sign(&text));
        let handover = next.map_or_else(String::new, |next| {
            format!(
                r#","handover":{{"key":"{}","next_key":"{}","next_signature":"{}"}}"#,
                self.public,
                next.public,
                next.sign(&text)
            )
        });
        let body = format!(
            r#""seq":{},"prev":"{hash}","time":"{time}","instance":"{instance}","kind":"checkpoint","head":"{hash}","generation":0,"key":"{id}","signature":"{signature}"{handover}}}"#,
            seq + 1
        );
        rehashed(&format!("{}{body}", " ".repeat(BODY)))
    }
}

/// A log that was handed over twice, with records by each key, and the keys.
struct HandedOver {
    place: Place,
    pairs: [Pair; 3],
}

impl HandedOver {
    /// start, checkpoint, n0, n1, handover 1, n2, n3, handover 2, n4, n5, shutdown, checkpoint
    async fn new() -> Self {
        let place = Place::new();
        let pairs = [Pair::of(place.key.clone()), Pair::new(), Pair::new()];
        let log = place.open();
        for n in 0..6 {
            if n == 2 || n == 4 {
                log.rotate_key(pairs[n / 2].signing()).await.unwrap();
            }
            log.append(record(format!("n{n}")), Durable).await.unwrap();
        }
        log.close().await.unwrap();
        Self { place, pairs }
    }

    fn keys(&self, which: &[usize]) -> Vec<VerifyingKey> {
        which.iter().map(|n| self.pairs[*n].public).collect()
    }

    fn verify(&self, which: &[usize]) -> Report {
        verify(&self.place.audit(), &self.keys(which), &[]).unwrap()
    }
}

/// The line of the first handover, the record of `HandedOver` with this index.
const HANDOVER: usize = 4;
const ANY_KEYS: [&[usize]; 7] = [&[0], &[1], &[2], &[0, 1], &[0, 2], &[1, 2], &[0, 1, 2]];

fn open_with(place: &Place, settings: Settings, pair: &Pair) -> Result<Log, AuditError> {
    Log::open(settings, pair.signing(), place.clock.clone())
}

#[tokio::test]
async fn any_key_of_a_succession_vouches_for_the_whole_log() {
    let log = HandedOver::new().await;
    let lines = log.place.lines();
    assert_eq!(lines.len(), 12);
    assert_eq!(kinds(&lines[4..6]), ["checkpoint", "access"]);
    for which in ANY_KEYS {
        let report = log.verify(which);
        assert!(report.is_clean(), "{which:?}: {report:?}");
        let instance = &report.instances[0];
        assert_eq!((instance.anchored, instance.unanchored), (Some(12), 0), "{which:?}");
        assert!(instance.clean_shutdown);
        assert_eq!(
            instance.checkpoints,
            [4, 3, 2][which[0]],
            "those before are covered, not checked: {which:?}"
        );
    }
    let stranger = verify(&log.place.audit(), &[Pair::new().public], &[]).unwrap();
    assert_eq!(findings(&stranger), [FindingKind::UnknownKey; 3], "once for each key: {stranger:?}");
    assert_eq!(stranger.unanchored(), 12);
}

#[tokio::test]
async fn a_handover_is_a_checkpoint_in_its_place_that_both_keys_sign() {
    let place = Place::new();
    let (first, next) = (Pair::of(place.key.clone()), Pair::new());
    let log = place.open();
    log.append(record("before"), Durable).await.unwrap();
    let (key, at) = log.rotate_key(next.signing()).await.unwrap();
    assert_eq!((key, at), (next.public, place.clock.now()));
    assert_eq!(log.verifying_keys(), [first.public, next.public]);
    let lines = place.lines();
    assert_eq!(log.last_checkpoint(), Some(place_of(&lines[3])), "it is on the disk");
    assert_eq!(lines[3], first.checkpoint(&lines[..3], Some(&next)), "made from the documented format alone");
    let line = json(&lines[3]);
    assert_eq!(line["time"].as_str().unwrap().parse::<Timestamp>().unwrap(), at);
    assert_eq!(line["handover"]["next_key"], next.public.to_hex());

    // Asked again it is the same one; a key that signed before is none to hand over to.
    assert_eq!(log.rotate_key(next.signing()).await.unwrap(), (key, at));
    assert_eq!(place.lines().len(), 4);
    log.rotate_key(Pair::new().signing()).await.unwrap();
    for used in [&first, &next] {
        let error = log.rotate_key(used.signing()).await.unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidKey, "{error}");
    }
    log.close().await.unwrap();
    assert_eq!(log.rotate_key(Pair::new().signing()).await.unwrap_err().reason(), Reason::Unavailable);
    assert!(verify(&place.audit(), &[first.public], &[]).unwrap().is_clean());
}

#[tokio::test]
async fn a_log_goes_on_with_the_key_that_it_was_handed_over_to_and_no_other() {
    let place = Place::new();
    let (first, next) = (Pair::of(place.key.clone()), Pair::new());
    let log = place.open_in_pieces();
    log.rotate_key(next.signing()).await.unwrap();
    for n in 0..3 {
        log.append(record(format!("n{n}")), Durable).await.unwrap();
    }
    let expected = log.last_checkpoint();
    drop(log);
    let settings = || Settings { expected: expected.clone(), ..place.settings() };
    let before = place.lines();
    let error = open_with(&place, settings(), &first).unwrap_err();
    assert!(matches!(error, AuditError::Key { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(&format!("handed over to key {}", next.public.id())), "{text}");
    assert_eq!(place.lines(), before, "nothing is written");

    let log = open_with(&place, settings(), &next).unwrap();
    log.close().await.unwrap();
    let start = place.lines().iter().map(|line| json(line)).rfind(|line| line["kind"] == "start").unwrap();
    assert_eq!(start["unsigned"], 3, "the handover is a checkpoint of the next key too");
    let error = open_with(&place, settings(), &first).unwrap_err();
    assert!(matches!(error, AuditError::Key { .. }), "also behind checkpoints of the next one: {error}");
    for key in [first.public, next.public] {
        let report = verify(&place.audit(), &[key], &[]).unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
}

#[tokio::test]
async fn b20_every_tampering_with_a_handover_is_found_whichever_key_is_given() {
    type Tamper = fn(&mut Vec<String>, &[Pair; 3]);
    let cases: [(&str, Tamper); 11] = [
        ("another next key", |lines, _| {
            let next = json(&lines[HANDOVER])["handover"]["next_key"].as_str().unwrap().to_owned();
            lines[HANDOVER] = lines[HANDOVER].replace(&next, &Pair::new().public.to_hex());
        }),
        ("another former key", |lines, pairs| {
            let former = pairs[0].public.to_hex();
            lines[HANDOVER] = lines[HANDOVER].replace(&former, &Pair::new().public.to_hex());
        }),
        ("another key's id", |lines, pairs| {
            let (former, next) = (pairs[0].public.id(), pairs[1].public.id());
            lines[HANDOVER] = lines[HANDOVER].replace(&format!("\"{former}\""), &format!("\"{next}\""));
        }),
        ("no counter-signature", |lines, _| {
            let (before, _) = lines[HANDOVER].split_once(r#","next_signature""#).unwrap();
            lines[HANDOVER] = format!("{before}}}}}");
        }),
        ("an empty counter-signature", |lines, _| {
            let (before, _) = lines[HANDOVER].split_once(r#","next_signature""#).unwrap();
            lines[HANDOVER] = format!(r#"{before},"next_signature":""}}}}"#);
        }),
        ("the counter-signature twice", |lines, _| {
            let line = json(&lines[HANDOVER]);
            let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
            let (one, other) = (text(&line["signature"]), text(&line["handover"]["next_signature"]));
            lines[HANDOVER] = lines[HANDOVER].replace(&one, &other);
        }),
        ("made a plain checkpoint", |lines, _| {
            let (before, _) = lines[HANDOVER].split_once(r#","handover""#).unwrap();
            lines[HANDOVER] = format!("{before}}}");
        }),
        ("another place", |lines, _| lines.swap(HANDOVER, HANDOVER + 1)),
        ("removed", |lines, _| drop(lines.remove(HANDOVER))),
        ("another past", |lines, _| lines[2] = lines[2].replace("database", "databasf")),
        ("another generation", |lines, _| {
            lines[HANDOVER] = lines[HANDOVER].replace("\"generation\":0", "\"generation\":1");
        }),
    ];
    for (name, tamper) in cases {
        // As whoever can write the file but not sign: chained anew, to the end or cut right behind the handover.
        for cut in [false, true] {
            let log = HandedOver::new().await;
            let mut lines = log.place.lines();
            tamper(&mut lines, &log.pairs);
            let mut lines = rechained(&lines, 2);
            if cut {
                lines.truncate(HANDOVER + 2);
            }
            log.place.rewrite(&lines);
            for which in ANY_KEYS {
                let report = log.verify(which);
                assert!(!report.is_clean(), "{name}, {which:?}, cut: {cut}: {report:?}");
            }
            assert!(
                !hands_over(&log.place.audit(), &log.pairs[0].public, &log.pairs[1].public).unwrap(),
                "{name}"
            );
            if !cut {
                let error = open_with(&log.place, log.place.settings(), &log.pairs[2]).unwrap_err();
                assert_eq!(error.reason(), Reason::AuditBroken, "{name}: {error}");
            }
        }
    }
}

#[tokio::test]
async fn b20_a_handover_fits_one_log_and_one_place() {
    // The same keys in two instances at the same time, so that nothing but the instance tells them apart.
    let place = Place::new();
    let next = Pair::new();
    let mut lines = Vec::new();
    for instance in ["a", "b"] {
        let settings = Settings::new(place.audit(), instance);
        let log = place.try_open(settings).unwrap();
        log.append(record("n"), Durable).await.unwrap();
        log.rotate_key(next.signing()).await.unwrap();
        drop(log);
        let text = fs::read_to_string(place.audit().join(instance).join("00000000000000000001.jsonl"));
        lines.push(text.unwrap().lines().map(str::to_owned).collect::<Vec<_>>());
    }
    fs::remove_dir_all(place.audit().join("b")).unwrap();
    let (first, other) = (lines.remove(0), lines.remove(0));
    assert_eq!(kinds(&first), ["start", "checkpoint", "access", "checkpoint"]);
    let replayed = {
        let at = |line: &str| line.find(r#""generation""#).unwrap();
        rehashed(&format!("{}{}", &first[3][..at(&first[3])], &other[3][at(&other[3])..]))
    };
    let renumbered = |seq: u64| first[3].replace("\"seq\":4,", &format!("\"seq\":{seq},"));
    for (name, bad) in [
        ("another instance's signatures", [&first[..3], &[replayed]].concat()),
        ("another instance's line", [&first[..3], &other[3..]].concat()),
        ("one record earlier", rechained(&[&first[..2], &[renumbered(3)]].concat(), 2)),
        ("twice", rechained(&[&first[..], &[renumbered(5)]].concat(), 4)),
    ] {
        place.rewrite(&bad);
        for keys in [&[place.public()][..], &[next.public], &[place.public(), next.public]] {
            let report = verify(&place.audit(), keys, &[]).unwrap();
            assert!(!report.is_clean(), "{name}: {report:?}");
        }
        let found = hands_over(&place.audit(), &place.public(), &next.public).unwrap();
        assert_eq!(found, name == "twice", "{name}: only the good one counts");
    }
    place.rewrite(&first);
    assert!(hands_over(&place.audit(), &place.public(), &next.public).unwrap());
    assert!(verify(&place.audit(), &[place.public()], &[]).unwrap().is_clean());
}

#[tokio::test]
async fn b20_a_key_that_handed_over_signs_no_more() {
    let log = HandedOver::new().await;
    let lines = log.place.lines();
    let [first, second, _] = &log.pairs;
    let stranger = Pair::new();
    let before = &lines[..HANDOVER + 3];
    for (name, forged, expected) in [
        ("a checkpoint", first.checkpoint(before, None), FindingKind::RetiredKey),
        ("a second handover", first.checkpoint(before, Some(&stranger)), FindingKind::RetiredKey),
        ("back to the former one", second.checkpoint(before, Some(first)), FindingKind::RetiredKey),
        ("a stranger's checkpoint", stranger.checkpoint(before, None), FindingKind::UnknownKey),
        ("a stranger's handover", stranger.checkpoint(before, Some(first)), FindingKind::RetiredKey),
        ("strangers alone", stranger.checkpoint(before, Some(&Pair::new())), FindingKind::UnknownKey),
        ("to itself", second.checkpoint(before, Some(second)), FindingKind::BadSignature),
    ] {
        log.place.rewrite(&[before, &[forged]].concat());
        for which in [&[0][..], &[1], &[0, 1], &[0, 1, 2]] {
            let report = log.verify(which);
            assert_eq!(findings(&report), [expected], "{name}, {which:?}: {report:?}");
            assert_eq!(report.unanchored(), 3, "{name}: it vouches for nothing");
        }
    }
    log.place.rewrite(&[before, &[first.checkpoint(before, None)]].concat());
    let error = open_with(&log.place, log.place.settings(), second).unwrap_err();
    assert_eq!(error.reason(), Reason::AuditBroken, "{error}");
    // Whoever has the former key alone can go on from where it still signed; the newest key alone is not fooled.
    let before = &lines[..HANDOVER];
    log.place.rewrite(&[before, &[first.checkpoint(before, Some(&stranger))]].concat());
    assert!(log.verify(&[0]).is_clean());
    assert!(!log.verify(&[2]).is_clean());
}

#[tokio::test]
async fn a_handover_that_is_not_whole_did_not_happen() {
    let place = Place::new();
    let (first, next) = (Pair::of(place.key.clone()), Pair::new());
    let log = place.open();
    log.append(record("n"), Durable).await.unwrap();
    log.rotate_key(next.signing()).await.unwrap();
    drop(log);
    let segment = place.segments().remove(0);
    let whole = fs::read(&segment).unwrap();
    let handed_over = || hands_over(&place.audit(), &first.public, &next.public).unwrap();
    assert!(handed_over());
    assert!(!hands_over(&place.audit(), &next.public, &first.public).unwrap());
    assert!(!hands_over(&place.audit(), &Pair::new().public, &next.public).unwrap());
    assert!(!hands_over(&place.audit().join("none"), &first.public, &next.public).unwrap());
    let start = whole.iter().rposition(|byte| *byte == b'\n').unwrap();
    let start = whole[..start].iter().rposition(|byte| *byte == b'\n').unwrap() + 1;
    for length in (start..whole.len()).step_by(37).chain([whole.len() - 1]) {
        fs::write(&segment, &whole[..length]).unwrap();
        assert!(!handed_over(), "{length} of {} bytes", whole.len());
        let log = open_with(&place, place.settings(), &first).unwrap();
        drop(log);
        let report = verify(&place.audit(), &[first.public], &[]).unwrap();
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(report.instances[0].repairs, u64::from(length > start));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handover_under_load_keeps_every_record_and_the_chain() {
    let place = Place::new();
    let first = Pair::of(place.key.clone());
    let log = place.open();
    let appends = (0..600).map(|n| {
        let log = log.clone();
        tokio::spawn(async move {
            let durability = if n % 2 == 0 { Relaxed } else { Durable };
            log.append(record(format!("n{n}")), durability).await.unwrap()
        })
    });
    let appends: Vec<_> = appends.collect();
    let mut newest = first.public;
    for _ in 0..10 {
        newest = log.rotate_key(Pair::new().signing()).await.unwrap().0;
    }
    let acknowledged: BTreeSet<_> = join_all(appends).await.into_iter().map(Result::unwrap).collect();
    log.close().await.unwrap();
    assert_eq!(acknowledged.len(), 600);
    assert_eq!(details(&place.lines()).len(), 600);
    for key in [first.public, newest] {
        let report = verify(&place.audit(), &[key], &[]).unwrap();
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(report.unanchored(), 0);
    }
    let checkpoints = kinds(&place.lines()).iter().filter(|kind| *kind == "checkpoint").count();
    let report = verify(&place.audit(), &[first.public], &[]).unwrap();
    assert_eq!(report.instances[0].checkpoints, checkpoints as u64, "each of them, by whichever key");
}

#[tokio::test]
async fn b16_a_full_disk_refuses_a_handover_and_the_key_stays() {
    let disk = SmallDisk::new();
    let place = Place::new();
    let (first, next) = (Pair::of(place.key.clone()), Pair::new());
    let settings = Settings::new(disk.0.path().join("audit"), "a");
    let log = place.try_open(settings.clone()).unwrap();
    let filler = disk.0.path().join("filler");
    let _ = fs::write(&filler, vec![b'x'; 64 << 10]);
    let long = || claviger::audit::Record { secret: "x".repeat(100), ..record("x") };
    while log.append(long(), Durable).await.is_ok() {}
    let error = log.rotate_key(next.signing()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::AuditUnavailable, "{error}");
    assert_eq!(log.verifying_keys(), [first.public]);
    assert!(!hands_over(&settings.directory, &first.public, &next.public).unwrap());
    fs::remove_file(&filler).unwrap();
    log.append(record("after"), Durable).await.unwrap();
    log.rotate_key(next.signing()).await.unwrap();
    log.close().await.unwrap();
    assert!(verify(&settings.directory, &[first.public], &[]).unwrap().is_clean());
}

#[tokio::test]
async fn what_the_retention_removed_is_vouched_for_by_the_next_key() {
    let place = Place::new();
    let next = Pair::new();
    let settings = Settings { segment_bytes: 1, retention: 10 * DAY, ..place.settings() };
    let log = place.try_open(settings.clone()).unwrap();
    let expected = log.last_checkpoint();
    log.append(record("old"), Durable).await.unwrap();
    log.rotate_key(next.signing()).await.unwrap();
    place.clock.advance(11 * DAY);
    log.append(record("new"), Durable).await.unwrap();
    log.close().await.unwrap();
    assert_eq!(details(&place.lines()), ["new"], "the handover is gone too");
    let settings = Settings { expected, ..settings };
    open_with(&place, settings, &next).unwrap().close().await.unwrap();
    assert!(verify(&place.audit(), &[next.public], &[]).unwrap().is_clean());
    let report = verify(&place.audit(), &[place.public()], &[]).unwrap();
    assert!(findings(&report).contains(&FindingKind::UnknownKey), "what led to it is gone: {report:?}");
}

/// The published keys of a broker, newest last.
fn published(data: &Path) -> Vec<VerifyingKey> {
    VerifyingKey::parse_list(&fs::read_to_string(data.join("keys/audit.pub")).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_rotates_its_key_and_verifies_with_all_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let (resolved, data) = (assembled::resolved(folder.path()), folder.path().join("data"));
    let running = assembled::start(&resolved, assembled::clock()).await.unwrap();
    let denied = running.broker.rotate_audit_key(&assembled::person("ana", &["team"])).await.unwrap_err();
    assert_eq!(denied.reason(), Reason::Denied, "{denied}");
    let mut ids = vec![published(&data)[0].id()];
    for _ in 0..2 {
        ids.push(running.broker.rotate_audit_key(&administrator()).await.unwrap().info.id);
    }
    assert_eq!(published(&data).iter().map(VerifyingKey::id).collect::<Vec<_>>(), ids);
    assert!(running.broker.verify_audit(&administrator()).await.unwrap().is_clean());
    running.stop().await.unwrap();
    let running = assembled::start(&resolved, assembled::clock()).await.unwrap();
    let report = running.broker.verify_audit(&administrator()).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    running.stop().await.unwrap();
    let said = records(folder.path());
    let of_rotation = said.iter().filter(|line| line["operation"] == "rotate_audit_key");
    let kinds: Vec<_> = of_rotation.map(|line| line["kind"].as_str().unwrap().to_owned()).collect();
    assert_eq!(kinds, ["access", "intent", "access", "intent", "access"]);
    let handovers = said.iter().filter(|line| line["handover"].is_object()).count();
    assert_eq!(handovers, 2);
    for key in published(&data) {
        let report = verify(&data.join("audit"), &[key], &[]).unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_ended_between_log_and_file_goes_on_with_the_next_key() {
    for reached_the_log in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let (resolved, data) = (assembled::resolved(folder.path()), folder.path().join("data"));
        let running = assembled::start(&resolved, assembled::clock()).await.unwrap();
        let first = published(&data);
        let next = Pair::new();
        claviger::crypto::create_key_file(&data.join("keys/audit.key.next"), &next.document).unwrap();
        if reached_the_log {
            running.broker.log().rotate_key(next.signing()).await.unwrap();
        }
        running.stop().await.unwrap();
        let running = assembled::start(&resolved, assembled::clock()).await.unwrap();
        assert!(!data.join("keys/audit.key.next").exists());
        let key = Pair::of(fs::read(data.join("keys/audit.key")).unwrap()).public;
        let known = if reached_the_log { vec![first[0], next.public] } else { first };
        assert_eq!(Some(&key), known.last());
        assert_eq!(published(&data), known);
        running.stop().await.unwrap();
        assert!(verify(&data.join("audit"), &[key], &[]).unwrap().is_clean());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_whose_audit_key_is_lost_goes_on_where_that_is_accepted_and_on_record() {
    let folder = tempfile::tempdir().unwrap();
    let (mut resolved, data) = (assembled::resolved(folder.path()), folder.path().join("data"));
    let running = assembled::start(&resolved, assembled::clock()).await.unwrap();
    assembled::put(&running, assembled::id("development", "database"), "value").await.unwrap();
    running.broker.rotate_audit_key(&administrator()).await.unwrap();
    running.stop().await.unwrap();
    drop(running);
    let former = published(&data);
    fs::remove_file(data.join("keys/audit.key")).unwrap();

    let error = assembled::start(&resolved, assembled::clock()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidKey, "{error}");
    let text = error.to_string();
    assert!(text.contains("restore it from a backup") && text.contains("--accept-loss"), "{text}");
    assert!(!data.join("keys/audit.key").exists());

    resolved.accept_loss = true;
    let running = assembled::start(&resolved, assembled::clock()).await.unwrap();
    let report = running.broker.verify_audit(&administrator()).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    running.stop().await.unwrap();
    drop(running);
    resolved.accept_loss = false;
    assembled::start(&resolved, assembled::clock()).await.unwrap().stop().await.unwrap();

    let known = published(&data);
    assert_eq!((&known[..2], known.len()), (&former[..], 3));
    let report = verify(&data.join("audit"), &known, &[]).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!((report.unanchored(), report.instances[0].losses), (0, 1));
    let stranger = verify(&data.join("audit"), &former, &[]).unwrap();
    assert_eq!(findings(&stranger), [FindingKind::UnknownKey], "{stranger:?}");
    let said = records(folder.path());
    let lost = said.iter().position(|line| line["kind"] == "lost").unwrap();
    let problem = said[lost]["problem"].as_str().unwrap();
    assert!(problem.contains("audit.key") && problem.contains(&known[2].id()), "{problem}");
    assert_eq!(said[lost + 1]["kind"], "start", "the start that accepted it");
}

/// How often something was done.
#[derive(Default)]
struct Tally {
    count: Mutex<usize>,
    more: Condvar,
}

impl Tally {
    fn add(&self) {
        *self.count.lock().unwrap() += 1;
        self.more.notify_all();
    }

    fn wait_for(&self, count: usize) {
        let waited = self.more.wait_timeout_while(self.count.lock().unwrap(), HUNG, |found| *found < count);
        assert!(!waited.unwrap().1.timed_out(), "it hangs");
    }
}

#[test]
fn b31_sigkill_in_a_rotation_leaves_a_log_that_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let mut acknowledged = 0;
    for round in 0..5 {
        let mut program = Program::dev(folder.path());
        let (tally, stop) = (Arc::new(Tally::default()), Arc::new(AtomicBool::new(false)));
        let rotations = std::thread::spawn({
            let (tally, stop) = (Arc::clone(&tally), Arc::clone(&stop));
            let address = format!("unix://{}", program.socket.display());
            move || {
                let rotate = || {
                    let mut command = program::claviger(["key", "rotate", "--audit"]);
                    command.env("CLAVIGER_ADDR", &address).output().unwrap().status.success()
                };
                let mut done = 0;
                while !stop.load(Ordering::SeqCst) && rotate() {
                    done += 1;
                    tally.add();
                }
                done
            }
        });
        tally.wait_for(1 + round);
        program.signal(Signal::KILL);
        stop.store(true, Ordering::SeqCst);
        acknowledged += rotations.join().unwrap();
    }
    let mut program = Program::dev(folder.path());
    program.ok(["audit", "verify"]);
    assert!(program.signal(Signal::TERM).success());
    let keys = published(&data);
    assert!(keys.len() > acknowledged, "{} keys, {acknowledged} rotations were acknowledged", keys.len());
    assert!(!data.join("keys/audit.key.next").exists());
    for key in [keys[0], *keys.last().unwrap()] {
        let report = verify(&data.join("audit"), &[key], &[]).unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
    let output = program::claviger(["audit", "verify", "--dir"])
        .arg(data.join("audit"))
        .arg("--public-key")
        .arg(data.join("keys/audit.pub"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
