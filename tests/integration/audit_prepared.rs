//! Segments of the audit log that are prepared ahead: what a log under load makes of them, what a crash leaves of them,
//! and that nothing can be hidden in them.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use claviger::audit::{FindingKind, Log, Query, Record, Report, Settings, query, verify};
use claviger::environment::Durability::{Durable, Relaxed};
use claviger::error::{Reason, Reasoned};

use crate::audit::{Place, SmallDisk, details, findings, json, kinds, record};

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(86_400);
const SEGMENT: u64 = 64 << 10;
/// How much a start cuts off at most.
const MOST_TORN: usize = 16 << 20;

fn settings(place: &Place) -> Settings {
    Settings { segment_bytes: SEGMENT, ..place.settings() }
}

fn open(place: &Place) -> Log {
    place.try_open(settings(place)).unwrap()
}

fn verified(place: &Place) -> Report {
    verify(&place.audit(), &[place.public()], &[]).unwrap()
}

fn folder(place: &Place) -> PathBuf {
    place.audit().join("a")
}

fn next(place: &Place) -> PathBuf {
    folder(place).join("next.prepared")
}

/// The names of an instance's files, without the lock.
fn names(place: &Place) -> BTreeSet<String> {
    let entries = fs::read_dir(folder(place)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != "lock").collect()
}

/// A record of about 1,000 bytes.
fn long(name: &str) -> Record {
    Record { secret: "x".repeat(600), ..record(name) }
}

async fn append(log: &Log, written: &mut Vec<String>) {
    let name = format!("n{}", written.len());
    let durability = if written.len().is_multiple_of(3) { Relaxed } else { Durable };
    log.append(long(&name), durability).await.unwrap();
    written.push(name);
}

fn ends_in_zeros(path: &Path) -> bool {
    fs::read(path).unwrap().ends_with(&[0])
}

/// Appends until the log writes to a prepared segment that is not one of `former`, and gives it.
async fn into_prepared(place: &Place, log: &Log, written: &mut Vec<String>, former: &[PathBuf]) -> PathBuf {
    let found = async {
        loop {
            append(log, written).await;
            let last = place.segments().pop().unwrap();
            if ends_in_zeros(&last) && !former.contains(&last) {
                return last;
            }
        }
    };
    tokio::time::timeout(HUNG, found).await.expect("segments are prepared under load")
}

/// What a process that was killed now would leave.
fn killed(place: &Place) -> Place {
    let mut copy = Place::new();
    copy.key.clone_from(&place.key);
    fs::create_dir_all(folder(&copy)).unwrap();
    for directory in [copy.audit(), folder(&copy)] {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).unwrap();
    }
    for name in names(place) {
        fs::copy(folder(place).join(&name), folder(&copy).join(&name)).unwrap();
    }
    copy
}

/// A log that ended without a word, of one segment, and its bytes.
async fn abandoned(count: usize) -> (Place, Vec<u8>) {
    let place = Place::new();
    let log = place.open();
    for n in 0..count {
        log.append(long(&format!("n{n}")), Durable).await.unwrap();
    }
    drop(log);
    let bytes = fs::read(&place.segments()[0]).unwrap();
    (place, bytes)
}

/// Where each line of a text begins.
fn beginnings(bytes: &[u8]) -> Vec<usize> {
    let ends = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    std::iter::once(0).chain(ends).collect()
}

/// The lines without a fault at the beginning, and what is torn behind them, of a file that was `whole`.
fn parted(torn: &[u8], whole: &[u8]) -> (usize, Vec<u8>) {
    let same = torn.iter().zip(whole).take_while(|(one, other)| one == other).count();
    let kept = torn[..same].iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    let end = torn.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    (kept, torn[kept..end.max(kept)].to_vec())
}

#[tokio::test]
async fn a_log_under_load_goes_over_into_prepared_segments() {
    let place = Place::new();
    let log = open(&place);
    let mut written = Vec::new();
    let mut former = Vec::new();
    for _ in 0..2 {
        let prepared = into_prepared(&place, &log, &mut written, &former).await;
        assert_eq!(fs::metadata(&prepared).unwrap().len(), SEGMENT);
        assert_eq!(fs::metadata(&prepared).unwrap().mode() & 0o7777, 0o600);
        for _ in 0..3 {
            append(&log, &mut written).await;
            let report = verified(&place);
            assert!(report.is_clean(), "{report:?}");
            assert_eq!(report.instances[0].torn_bytes, 0);
        }
        let newest = query(&place.audit(), &Query { limit: 1, ..Query::default() }).unwrap();
        assert_eq!(json(&newest[0])["seq"].as_u64(), verified(&place).instances[0].last);
        former.push(prepared);
    }
    assert!(log.health().is_ok());
    log.close().await.unwrap();

    assert_eq!(details(&place.lines()), written);
    for segment in place.segments() {
        assert!(!fs::read(&segment).unwrap().contains(&0), "{} is its lines alone", segment.display());
    }
    assert!(names(&place).iter().all(|name| name.ends_with(".jsonl")), "{:?}", names(&place));
    let report = verified(&place);
    assert!(report.is_clean() && report.instances[0].clean_shutdown, "{report:?}");
    open(&place).close().await.unwrap();
    assert!(verified(&place).is_clean());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_verifies_at_any_instant_while_it_is_written() {
    const GROUPS: usize = 800;
    let place = Place::new();
    let log = open(&place);
    let writer = log.clone();
    let writing = tokio::spawn(async move {
        for n in 0..GROUPS {
            let group = vec![long(&format!("n{n}")), long("more"), long("still more")];
            writer.append_all(group, Relaxed).await.unwrap();
        }
    });
    loop {
        let is_over = writing.is_finished();
        let (audit, key) = (place.audit(), place.public());
        let report = tokio::task::spawn_blocking(move || verify(&audit, &[key], &[]).unwrap());
        let report = report.await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        if is_over {
            break;
        }
    }
    writing.await.unwrap();
    log.close().await.unwrap();
    assert_eq!(details(&place.lines()).len(), 3 * GROUPS);
    assert!(verified(&place).is_clean());
}

#[tokio::test]
async fn a_log_that_writes_little_prepares_nothing() {
    let place = Place::new();
    let log = open(&place);
    for n in 0..4 {
        log.append(long(&format!("n{n}")), Durable).await.unwrap();
    }
    assert_eq!(names(&place).len(), 1);
    assert!(!ends_in_zeros(&place.segments()[0]));
    log.close().await.unwrap();
}

#[tokio::test]
async fn b19_a_killed_log_goes_on_with_every_record_it_acknowledged() {
    let place = Place::new();
    let log = open(&place);
    let mut written = Vec::new();
    let mut former = Vec::new();
    for _ in 0..2 {
        former.push(into_prepared(&place, &log, &mut written, &former).await);
        append(&log, &mut written).await;
        let copy = killed(&place);
        assert!(ends_in_zeros(copy.segments().last().unwrap()));
        let report = verified(&copy);
        assert!(report.is_clean() && report.instances[0].torn_bytes == 0, "{report:?}");

        let expected = log.last_checkpoint();
        let again = copy.try_open(Settings { expected, ..settings(&copy) }).unwrap();
        assert!(!next(&copy).exists());
        again.append(long("after"), Durable).await.unwrap();
        again.close().await.unwrap();
        let lines = copy.lines();
        assert_eq!(details(&lines), [&written[..], &["after".to_owned()]].concat());
        assert!(!kinds(&lines).contains(&"repaired".to_owned()), "nothing was torn");
        let report = verified(&copy);
        assert!(report.is_clean() && report.instances[0].clean_shutdown, "{report:?}");
    }
    log.close().await.unwrap();
}

#[tokio::test]
async fn b19_zeros_behind_whole_lines_are_no_damage() {
    for zeros in [1, 5_000, 3 << 20] {
        let (place, whole) = abandoned(3).await;
        let segment = place.segments().remove(0);
        fs::write(&segment, [&whole[..], &vec![0; zeros][..]].concat()).unwrap();
        let report = verified(&place);
        assert!(report.is_clean() && report.instances[0].torn_bytes == 0, "{report:?}");
        place.open().close().await.unwrap();
        assert!(fs::read(&segment).unwrap().starts_with(&whole));
        assert!(!kinds(&place.lines()).contains(&"repaired".to_owned()));
        assert_eq!(names(&place).len(), 1);
        assert!(verified(&place).is_clean());
    }
}

#[tokio::test]
async fn b19_pages_that_did_not_arrive_are_cut_off_recorded_and_kept() {
    type Tear = fn(&mut Vec<u8>);
    let cases: [(&str, Tear, bool); 6] = [
        ("a page in the middle of lines", |bytes| bytes[8_192..12_288].fill(0), true),
        (
            "a page at the beginning of a line",
            |bytes| {
                let begins = beginnings(bytes)[12];
                bytes[begins..begins + 4_096].fill(0);
            },
            true,
        ),
        (
            "two pages, and the last line is not finished",
            |bytes| {
                bytes[8_192..12_288].fill(0);
                bytes[16_384..20_480].fill(0);
                bytes.truncate(bytes.len() - 10);
            },
            true,
        ),
        (
            "more zeros than a line is long",
            |bytes| {
                let begins = beginnings(bytes)[12];
                drop(bytes.splice(begins..begins, vec![0; 2 << 20]));
            },
            true,
        ),
        ("the last page", |bytes| bytes[12_288..].fill(0), false),
        ("the end of the last line", |bytes| bytes.truncate(bytes.len() - 10), false),
    ];
    for (name, tear, is_kept) in cases {
        for zeros in [0, 20_000] {
            let (place, whole) = abandoned(30).await;
            assert!(whole.len() > 24_576, "{}", whole.len());
            let segment = place.segments().remove(0);
            let mut torn = whole.clone();
            tear(&mut torn);
            torn.extend(vec![0; zeros]);
            fs::write(&segment, &torn).unwrap();
            let (kept, stretch) = parted(&torn, &whole);
            assert!(kept > 0 && !stretch.is_empty(), "{name}");
            let report = verified(&place);
            assert!(report.is_clean(), "{name}: {report:?}");
            assert_eq!(report.instances[0].torn_bytes, stretch.len() as u64, "{name}");

            let log = place.open();
            log.append(record("after"), Durable).await.unwrap();
            log.close().await.unwrap();
            assert!(fs::read(&segment).unwrap().starts_with(&whole[..kept]), "{name}");
            let report = verified(&place);
            assert!(report.is_clean(), "{name}: {report:?}");
            assert_eq!((report.instances[0].repairs, report.instances[0].torn_bytes), (1, 0), "{name}");
            let lines = place.lines();
            let repaired =
                lines.iter().map(|line| json(line)).find(|line| line["kind"] == "repaired").unwrap();
            assert_eq!(repaired["bytes"], stretch.len(), "{name}");
            let digest = ring::digest::digest(&ring::digest::SHA256, &stretch);
            assert_eq!(repaired["sha256"], data_encoding::HEXLOWER.encode(digest.as_ref()), "{name}");
            let aside = folder(&place).join(format!("00000000000000000001.torn-{kept}"));
            assert_eq!(aside.exists(), is_kept, "{name}");
            if is_kept {
                assert_eq!(fs::read(&aside).unwrap(), stretch, "{name}");
                assert_eq!(fs::metadata(&aside).unwrap().mode() & 0o7777, 0o600, "{name}");
            }
        }
    }
}

#[tokio::test]
async fn b19_what_no_crash_leaves_is_refused_and_left_as_it_is() {
    type Damage = fn(&mut Vec<u8>);
    let cases: [(&str, Damage); 4] = [
        ("more than a crash leaves", |bytes| {
            bytes.extend(vec![0; MOST_TORN]);
            bytes.extend(b"x\n");
        }),
        ("a line without zeros before the hole", |bytes| bytes.extend(b"hello\n\0\0\0hello\n")),
        ("a line without zeros before whole ones", |bytes| {
            let begins = beginnings(bytes)[4];
            bytes[begins + 100] ^= 1;
        }),
        ("a line without zeros at the end", |bytes| bytes.extend(b"hello\n\0\0\0")),
    ];
    for (name, damage) in cases {
        let (place, mut bytes) = abandoned(6).await;
        damage(&mut bytes);
        let segment = place.segments().remove(0);
        fs::write(&segment, &bytes).unwrap();
        assert!(!verified(&place).is_clean(), "{name}");
        let error = place.try_open(place.settings()).unwrap_err();
        assert_eq!(error.reason(), Reason::AuditBroken, "{name}: {error}");
        assert!(fs::read(&segment).unwrap() == bytes, "{name}");
        assert_eq!(names(&place).len(), 1, "{name}");
    }
}

#[tokio::test]
async fn b20_what_stands_behind_zeros_of_a_former_segment_shows() {
    let place = Place::new();
    let log = place.open_in_pieces();
    for n in 0..3 {
        log.append(record(format!("n{n}")), Durable).await.unwrap();
    }
    log.close().await.unwrap();
    let segment = place.segments().remove(1);
    let whole = fs::read(&segment).unwrap();
    let zeros = vec![0_u8; 10_000];
    let with = |parts: &[&[u8]]| {
        fs::write(&segment, parts.concat()).unwrap();
        findings(&verified(&place))
    };
    assert!(with(&[&whole, &zeros]).is_empty(), "zeros are no content");
    assert_eq!(with(&[&whole, &zeros, b"x"]), [FindingKind::Malformed]);
    assert_eq!(with(&[&whole, &zeros, b"x\n", &zeros]), [FindingKind::Malformed]);
    assert_eq!(with(&[&whole, &zeros, &whole]), [FindingKind::Malformed]);
    assert_eq!(with(&[&whole, &zeros, b"\n", &whole]), [FindingKind::Malformed, FindingKind::Duplicate]);
    assert_eq!(with(&[&whole[..50], &zeros, &whole[50..]])[0], FindingKind::Malformed);
    assert!(with(&[&zeros]).contains(&FindingKind::MissingRecords));
    assert!(with(&[&whole, &zeros]).is_empty());
    place.open().close().await.unwrap();
    assert!(verified(&place).is_clean());
}

#[tokio::test]
async fn b18_a_prepared_segment_that_is_changed_is_noticed() {
    type Change = fn(&Path);
    let set_len = |path: &Path, length: u64| {
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len(length).unwrap();
    };
    let cut: Change = |path| fs::OpenOptions::new().write(true).open(path).unwrap().set_len(0).unwrap();
    let cases: [(&str, Change, &[FindingKind]); 4] = [
        ("deleted", |path| fs::remove_file(path).unwrap(), &[FindingKind::MissingRecords]),
        (
            "replaced",
            |path| {
                let copy = path.with_extension("copy");
                fs::copy(path, &copy).unwrap();
                fs::rename(&copy, path).unwrap();
            },
            &[],
        ),
        ("cut", cut, &[FindingKind::MissingRecords]),
        (
            "grew",
            |path| fs::OpenOptions::new().append(true).open(path).unwrap().write_all(b"x\n").unwrap(),
            &[FindingKind::Malformed],
        ),
    ];
    for (word, change, expected) in cases {
        let place = Place::new();
        let log = open(&place);
        let prepared = into_prepared(&place, &log, &mut Vec::new(), &[]).await;
        change(&prepared);
        noticed(&place, &log, &prepared, word).await;
        log.close().await.unwrap();
        assert_eq!(findings(&verified(&place)), expected, "{word}");
        assert_eq!(verified(&place).instances[0].losses, 1, "{word}");
    }

    let place = Place::new();
    let log = open(&place);
    let prepared = into_prepared(&place, &log, &mut Vec::new(), &[]).await;
    set_len(&prepared, SEGMENT - 1);
    noticed(&place, &log, &prepared, "cut").await;
    log.close().await.unwrap();
    assert!(verified(&place).is_clean(), "no record is lost by it");
}

/// The next record goes to another segment, which says first what happened to the one before.
async fn noticed(place: &Place, log: &Log, prepared: &Path, word: &str) {
    log.append(record("after"), Durable).await.unwrap();
    let last = place.segments().pop().unwrap();
    assert_ne!(last, prepared);
    let lost = json(fs::read_to_string(last).unwrap().lines().next().unwrap());
    assert_eq!(lost["kind"], "lost");
    assert_eq!(lost["segment"], prepared.file_name().unwrap().to_str().unwrap());
    assert!(lost["problem"].as_str().unwrap().contains(word), "{word}: {lost}");
}

#[tokio::test]
async fn b20_what_is_written_among_the_zeros_shows_and_is_kept() {
    let place = Place::new();
    let log = open(&place);
    let prepared = into_prepared(&place, &log, &mut Vec::new(), &[]).await;
    let file = fs::OpenOptions::new().write(true).open(&prepared).unwrap();
    file.write_all_at(b"forged\n", SEGMENT - 100).unwrap();
    assert!(verified(&place).instances[0].torn_bytes > 0, "the last segment may be one of a crash");
    log.close().await.unwrap();
    assert!(verified(&place).instances[0].torn_bytes > 0, "it is not cut off in silence");
    open(&place).close().await.unwrap();
    let report = verified(&place);
    assert!(report.is_clean() && report.instances[0].repairs == 1, "{report:?}");
    let kept = names(&place).into_iter().find(|name| name.contains(".torn-")).unwrap();
    assert!(fs::read(folder(&place).join(kept)).unwrap().ends_with(b"forged\n"));
}

#[tokio::test]
async fn what_an_earlier_run_left_of_a_preparation_is_harmless() {
    let left: [fn(&Path, &Path); 2] = [
        |next, _| fs::write(next, vec![b'x'; 3 * 65_536]).unwrap(),
        |next, elsewhere| symlink(elsewhere, next).unwrap(),
    ];
    for leave in left {
        let place = Place::new();
        open(&place).close().await.unwrap();
        let elsewhere = place.audit().join("elsewhere");
        fs::write(&elsewhere, "mine").unwrap();
        leave(&next(&place), &elsewhere);
        assert!(verified(&place).is_clean());
        let log = open(&place);
        assert!(fs::symlink_metadata(next(&place)).is_err());
        into_prepared(&place, &log, &mut Vec::new(), &[]).await;
        log.close().await.unwrap();
        assert_eq!(fs::read(&elsewhere).unwrap(), b"mine");
        assert!(verified(&place).is_clean());
    }

    let place = Place::new();
    open(&place).close().await.unwrap();
    fs::create_dir(next(&place)).unwrap();
    let log = open(&place);
    let mut written = Vec::new();
    while place.segments().len() < 3 {
        append(&log, &mut written).await;
        assert!(!ends_in_zeros(place.segments().last().unwrap()));
    }
    assert!(log.health().is_ok());
    log.close().await.unwrap();
    assert_eq!(details(&place.lines()), written);
    assert!(verified(&place).is_clean() && next(&place).is_dir());
}

#[tokio::test]
async fn b16_a_disk_with_little_room_is_not_prepared_on() {
    let disk = SmallDisk::new();
    let place = Place::new();
    let settings = Settings { segment_bytes: 16 << 10, ..Settings::new(disk.0.path().join("audit"), "a") };
    let log = place.try_open(settings.clone()).unwrap();
    let instance = settings.directory.join("a");
    for n in 0..30 {
        log.append(long(&format!("n{n}")), Durable).await.unwrap();
        let length = fs::metadata(instance.join("next.prepared")).map_or(0, |metadata| metadata.len());
        assert_eq!(length, 0);
    }
    assert!(log.health().is_ok());
    log.close().await.unwrap();
    let report = verify(&settings.directory, &[place.public()], &[]).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert!(report.instances[0].segments > 1);
    assert!(!instance.join("next.prepared").exists());
}

#[tokio::test]
async fn retention_removes_segments_and_nothing_else() {
    let place = Place::new();
    let log = place.try_open(Settings { retention: 10 * DAY, ..settings(&place) }).unwrap();
    let mut written = Vec::new();
    let old = into_prepared(&place, &log, &mut written, &[]).await;
    into_prepared(&place, &log, &mut written, std::slice::from_ref(&old)).await;
    let torn = folder(&place).join("00000000000000000001.torn-10");
    fs::write(&torn, "torn").unwrap();
    place.clock.advance(11 * DAY);
    let removed = async {
        while old.exists() {
            append(&log, &mut written).await;
        }
    };
    tokio::time::timeout(HUNG, removed).await.expect("old segments go");
    assert!(torn.exists());
    log.close().await.unwrap();
    let report = verified(&place);
    assert!(report.is_clean(), "{report:?}");
    assert!(report.instances[0].first.unwrap() > 1);
    assert_eq!(fs::read(&torn).unwrap(), b"torn");
}
