//! Space in the audit log that is set aside before something is begun that must not stop half way, on disks that are
//! really full.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use claviger::audit::{AuditError, Kind, Log, RECORD_ROOM, Record, Report, Reservation, Settings, verify};
use claviger::environment::Durability::{self, Durable, Relaxed};
use claviger::error::{Reason, Reasoned};
use futures_util::FutureExt;
use rustix::fs::FallocateFlags;

use crate::audit::{Place, record};

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);
/// How many records nobody needs to fill what is left of a disk.
const MANY: usize = 1_000;

/// A disk of its own, gone with the value.
struct Disk(tempfile::TempDir);

impl Disk {
    /// One in memory.
    fn tmpfs(kib: u32) -> Self {
        let disk = Self(tempfile::tempdir().unwrap());
        fs::create_dir(disk.path()).unwrap();
        let options = format!("size={kib}k,mode=0700");
        let mounted = run("mount", &["-t", "tmpfs", "-o", &options, "tmpfs"], &[&disk.path()]);
        assert!(mounted, "this test mounts a small disk and must run as root");
        disk
    }

    /// One with a real file system; `None` where the machine has no loop devices.
    fn ext4() -> Option<Self> {
        let disk = Self(tempfile::tempdir().unwrap());
        let image = disk.0.path().join("image");
        fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        fs::create_dir(disk.path()).unwrap();
        let made = run("mkfs.ext4", &["-q", "-F"], &[&image]);
        (made && run("mount", &["-o", "loop"], &[&image, &disk.path()])).then_some(disk)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("mount")
    }

    fn filler(&self) -> PathBuf {
        self.path().join("filler")
    }

    /// Takes every block that is free.
    fn fill(&self) {
        let mut filler = fs::File::create(self.filler()).unwrap();
        for size in [64 << 10, 4 << 10, 1] {
            while filler.write_all(&vec![b'x'; size]).is_ok() {}
        }
        filler.sync_all().unwrap();
    }

    fn make_free(&self) {
        fs::remove_file(self.filler()).unwrap();
    }

    /// How many blocks are free.
    fn free(&self) -> u64 {
        rustix::fs::statvfs(self.path().as_path()).unwrap().f_bfree
    }

    fn settings(&self) -> Settings {
        Settings::new(self.path().join("audit"), "a")
    }

    fn segments(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.settings().directory.join("a")).unwrap();
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
        paths.sort();
        paths
    }

    /// Every line of every segment.
    fn lines(&self) -> Vec<serde_json::Value> {
        let texts = self.segments().into_iter().map(|path| fs::read_to_string(path).unwrap());
        texts
            .flat_map(|text| text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<_>>())
            .collect()
    }

    /// The names of the callers' records, sorted.
    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> =
            self.lines().iter().filter_map(|line| line["detail"].as_str().map(str::to_owned)).collect();
        names.sort();
        names
    }

    fn count(&self, kind: &str) -> usize {
        self.lines().iter().filter(|line| line["kind"] == kind).count()
    }

    fn verify(&self, place: &Place) -> Report {
        let report = verify(&self.settings().directory, &[place.public()], &[]).unwrap();
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(report.instances[0].torn_bytes, 0);
        report
    }

    /// Waits until as many blocks are free as were.
    async fn until_free(&self, blocks: u64) {
        let freed = async {
            while self.free() < blocks {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(HUNG, freed).await.expect("what was reserved goes back");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

fn run(program: &str, arguments: &[&str], paths: &[&PathBuf]) -> bool {
    Command::new(program).args(arguments).args(paths).status().is_ok_and(|status| status.success())
}

/// A record of more than 800 bytes.
fn long(name: &str) -> Record {
    Record { secret: "x".repeat(600), ..record(name) }
}

/// Appends ordinary records until one is refused.
async fn until_refused(log: &Log, written: &mut Vec<String>) -> AuditError {
    for n in 0..MANY {
        let name = format!("ordinary{n}");
        match log.append(long(&name), Durable).await {
            Ok(_) => written.push(name),
            Err(error) => return error,
        }
    }
    panic!("the disk must be full by now");
}

/// Appends within a reservation as long as it is sure that a record fits.
async fn use_up(log: &Log, reservation: &Reservation, written: &mut Vec<String>) {
    while reservation.rest() >= RECORD_ROOM {
        let name = format!("within{}", written.len());
        log.append_within(reservation, long(&name), Durable).await.unwrap();
        written.push(name);
    }
}

/// Appends an ordinary record as soon as the disk takes one.
async fn until_written(log: &Log, name: &str, durability: Durability) {
    let written = async {
        while log.append(long(name), durability).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(HUNG, written).await.expect("the log is written again");
}

#[tokio::test]
async fn b16_what_is_reserved_is_written_though_the_disk_is_full() {
    let real = Disk::ext4();
    if real.is_none() {
        eprintln!("not done on ext4: this machine has no loop device");
    }
    for disk in [Some(Disk::tmpfs(1_024)), real].into_iter().flatten() {
        full_disk(&disk).await;
    }
}

async fn full_disk(disk: &Disk) {
    const RESERVED: u64 = 96 << 10;
    let place = Place::new();
    let log = place.try_open(disk.settings()).unwrap();
    let reservation = log.reserve(RESERVED).await.unwrap();
    assert_eq!(reservation.rest(), RESERVED);
    disk.fill();
    let mut written = Vec::new();
    let refused = until_refused(&log, &mut written).await;
    assert_eq!(refused.reason(), Reason::AuditUnavailable, "{refused}");
    assert_eq!(log.health().unwrap_err().reason(), Reason::AuditUnavailable);
    let before = written.len();

    let mut refusals = 0;
    while reservation.rest() >= RECORD_ROOM {
        let (within, beside) = (format!("within{}", written.len()), format!("beside{}", written.len()));
        let durability = if written.len().is_multiple_of(2) { Durable } else { Relaxed };
        let (reserved, ordinary) = tokio::join!(
            log.append_within(&reservation, long(&within), durability),
            log.append(long(&beside), Durable)
        );
        reserved.unwrap();
        written.push(within);
        // What a reserved record did not need is anybody's.
        match ordinary {
            Ok(_) => written.push(beside),
            Err(error) => {
                assert_eq!(error.reason(), Reason::AuditUnavailable, "{error}");
                refusals += 1;
            }
        }
    }
    assert!((written.len() - before) as u64 >= RESERVED / RECORD_ROOM);
    assert!(refusals > 0);
    let group = vec![long("refused"); 200];
    assert_eq!(log.append_all(group, Durable).await.unwrap_err().reason(), Reason::AuditUnavailable);

    let mut beyond = 0;
    let error = loop {
        let name = format!("beyond{beyond}");
        match log.append_within(&reservation, long(&name), Durable).await {
            Ok(_) => written.push(name),
            Err(error) => break error,
        }
        beyond += 1;
        assert!(beyond < MANY, "a reservation that is used up is none");
    };
    assert_eq!(error.reason(), Reason::AuditUnavailable, "{error}");
    assert!(log.health().is_err());
    disk.verify(&place);

    disk.make_free();
    until_written(&log, "after", Durable).await;
    written.push("after".to_owned());
    assert!(log.health().is_ok());
    drop(reservation);
    log.close().await.unwrap();
    assert!(disk.verify(&place).instances[0].clean_shutdown);
    written.sort();
    assert_eq!(disk.names(), written, "every acknowledged record, and no other");
    assert!(disk.count("checkpoint") >= 3, "the start's, the shutdown's, and those that were due in between");
}

#[tokio::test]
async fn r7_a_reservation_on_a_full_disk_is_refused_and_changes_nothing() {
    let disk = Disk::tmpfs(128);
    let place = Place::new();
    let log = place.try_open(disk.settings()).unwrap();
    disk.fill();
    let (free, lines) = (disk.free(), disk.lines());
    for bytes in [1, 16 << 10, 1 << 40, u64::MAX] {
        let error = log.reserve(bytes).await.unwrap_err();
        assert_eq!(error.reason(), Reason::AuditUnavailable, "{bytes}: {error}");
        assert_eq!((disk.free(), disk.lines()), (free, lines.clone()), "{bytes}");
    }
    assert!(log.health().is_ok(), "no record was refused");

    disk.make_free();
    let held = log.reserve(16 << 10).await.unwrap();
    disk.fill();
    for bytes in [128 << 10, 1 << 40] {
        assert_eq!(log.reserve(bytes).await.unwrap_err().reason(), Reason::AuditUnavailable);
    }
    let mut written = Vec::new();
    until_refused(&log, &mut written).await;
    use_up(&log, &held, &mut written).await;
    disk.make_free();
    until_written(&log, "after", Durable).await;
    log.close().await.unwrap();
    disk.verify(&place);
}

#[tokio::test]
async fn what_is_reserved_goes_back_when_nobody_holds_it() {
    let disk = Disk::tmpfs(128);
    let place = Place::new();
    let log = place.try_open(disk.settings()).unwrap();
    let free = disk.free();
    let page = 4_096;
    let (one, other) = tokio::join!(log.reserve(16 << 10), log.reserve(20 << 10));
    let (one, other) = (one.unwrap(), other.unwrap());
    assert!(disk.free() <= free - (36 << 10) / page);
    drop(one);
    log.append_within(&other, record("within"), Relaxed).await.unwrap();
    assert!(disk.free() <= free - (20 << 10) / page, "the other one holds its own");
    drop(other);
    // The record may have begun a page.
    disk.until_free(free - 1).await;

    // Whoever asks and goes away leaves nothing behind.
    drop(log.reserve(32 << 10).now_or_never());
    log.append(record("after"), Durable).await.unwrap();
    disk.until_free(free - 1).await;

    let held = log.reserve(16 << 10).await.unwrap();
    log.close().await.unwrap();
    assert!(disk.free() >= free - 1, "a log that is closed holds nothing");
    drop(held);
    disk.verify(&place);
}

#[tokio::test]
async fn what_is_reserved_moves_to_the_next_segment_or_keeps_this_one() {
    let disk = Disk::tmpfs(128);
    let place = Place::new();
    let settings = Settings { segment_bytes: 4_096, ..disk.settings() };
    let log = place.try_open(settings.clone()).unwrap();
    let reservation = log.reserve(16 << 10).await.unwrap();
    let mut written = Vec::new();
    for n in 0..10 {
        let name = format!("first{n}");
        log.append(long(&name), Durable).await.unwrap();
        written.push(name);
    }
    assert!(disk.segments().len() > 1);
    disk.fill();
    until_refused(&log, &mut written).await;
    let held = disk.segments();
    use_up(&log, &reservation, &mut written).await;
    assert_eq!(disk.segments(), held, "there is no room for it in another one");
    let longest = fs::metadata(held.last().unwrap()).unwrap().len();
    assert!(longest > settings.segment_bytes, "so this one grows: {longest}");
    disk.verify(&place);

    disk.make_free();
    until_written(&log, "after", Durable).await;
    written.push("after".to_owned());
    assert_eq!(disk.segments().len(), held.len() + 1);
    drop(reservation);
    drop(log);
    let log = place.try_open(settings).unwrap();
    log.close().await.unwrap();
    disk.verify(&place);
    written.sort();
    assert_eq!(disk.names(), written);
}

#[tokio::test]
async fn a_log_that_ends_without_a_word_while_space_is_reserved_goes_on() {
    let disk = Disk::tmpfs(128);
    let place = Place::new();
    let log = place.try_open(disk.settings()).unwrap();
    let reservation = log.reserve(32 << 10).await.unwrap();
    disk.fill();
    for (name, durability) in [("one", Durable), ("two", Relaxed)] {
        log.append_within(&reservation, long(name), durability).await.unwrap();
    }
    drop(log);
    disk.verify(&place);
    // The start finds room where the reservation was.
    let log = place.try_open(disk.settings()).unwrap();
    drop(reservation);
    log.append(long("three"), Durable).await.unwrap();
    log.close().await.unwrap();
    disk.verify(&place);
    assert_eq!(disk.names(), ["one", "three", "two"]);
    assert_eq!(disk.count("repaired"), 0);
}

#[tokio::test]
async fn what_a_killed_broker_had_set_aside_is_given_back() {
    let disk = Disk::tmpfs(128);
    let place = Place::new();
    let log = place.try_open(disk.settings()).unwrap();
    log.append(record("before"), Durable).await.unwrap();
    drop(log);
    let free = disk.free();
    set_aside(&disk.segments()[0], 64 << 10);
    assert!(disk.free() < free);
    disk.verify(&place);
    let log = place.try_open(disk.settings()).unwrap();
    assert!(disk.free() >= free - 1);
    log.close().await.unwrap();
    disk.verify(&place);
    assert_eq!(disk.count("repaired"), 0);
}

/// What a process that is killed leaves of a reservation.
fn set_aside(segment: &Path, bytes: u64) {
    let file = fs::OpenOptions::new().write(true).open(segment).unwrap();
    let length = file.metadata().unwrap().len();
    rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, length, bytes).unwrap();
    assert_eq!(file.metadata().unwrap().len(), length);
}

#[tokio::test]
async fn b18_what_is_reserved_is_reserved_anew_where_the_file_is_gone() {
    let disk = Disk::tmpfs(256);
    let place = Place::new();
    let log = place.try_open(disk.settings()).unwrap();
    let reservation = log.reserve(16 << 10).await.unwrap();
    fs::remove_file(&disk.segments()[0]).unwrap();
    log.append(record("after"), Durable).await.unwrap();
    disk.fill();
    let mut written = Vec::new();
    until_refused(&log, &mut written).await;
    use_up(&log, &reservation, &mut written).await;
    assert_eq!(disk.count("lost"), 1);
    disk.make_free();
    until_written(&log, "last", Durable).await;
    log.close().await.unwrap();
}

#[tokio::test]
async fn a_reservation_is_of_one_log_and_one_that_is_used_up_is_none() {
    let (place, elsewhere) = (Place::new(), Place::new());
    let (log, other) = (place.open(), elsewhere.open());
    let reservation = log.reserve(RECORD_ROOM).await.unwrap();
    let error = other.append_within(&reservation, record("astray"), Durable).await.unwrap_err();
    assert!(matches!(error, AuditError::Record(_)), "{error}");
    let own = Record { kind: Some(Kind::Checkpoint), ..record("forged") };
    assert!(matches!(log.append_within(&reservation, own, Durable).await, Err(AuditError::Record(_))));
    assert_eq!(reservation.rest(), RECORD_ROOM, "what was refused took nothing");

    let first = log.append_within(&reservation, record("first"), Durable).await.unwrap();
    assert!(reservation.rest() < RECORD_ROOM);
    let none = log.reserve(0).await.unwrap();
    let second = log.append_within(&none, record("second"), Durable).await.unwrap();
    assert_eq!((none.rest(), second), (0, first + 1));
    log.close().await.unwrap();
    other.close().await.unwrap();
    let rest = reservation.rest();
    let late = log.append_within(&reservation, record("late"), Durable).await;
    assert!(matches!(late, Err(AuditError::Closed)));
    assert_eq!(reservation.rest(), rest);
    assert!(matches!(log.reserve(1).await, Err(AuditError::Closed)));
}
