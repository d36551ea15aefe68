//! The audit log as its callers and its auditors see it: what is acknowledged stays, and what is tampered with shows.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

use claviger::audit::{
    ANSWER_WITHIN, Anchor, AuditError, CHECKPOINT_EVERY, CHECKPOINT_WITHIN, FindingKind, Kind, Log, Outcome,
    Query, Record, Report, Settings, SigningKey, VerifyingKey, query, verify,
};
use claviger::clock::{Clock, ManualClock, SystemClock};
use claviger::environment::Durability::{Durable, Relaxed};
use claviger::error::{Reason, Reasoned};
use futures_util::FutureExt;
use futures_util::future::join_all;
use jiff::Timestamp;
use proptest::prelude::*;

use crate::support::{assembled, program};

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(86_400);
/// The length of `{"hash":"<64 hex>",`, behind which the hashed bytes begin.
pub(super) const BODY: usize = 75;

/// A folder, a key and a clock: what a log needs besides itself.
pub(super) struct Place {
    directory: tempfile::TempDir,
    pub(super) key: Vec<u8>,
    pub(super) clock: Arc<ManualClock>,
}

impl Place {
    pub(super) fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            key: SigningKey::generate_pkcs8().unwrap().to_vec(),
            clock: ManualClock::new("2026-01-02T03:04:05Z".parse().unwrap()),
        }
    }

    pub(super) fn audit(&self) -> PathBuf {
        self.directory.path().join("audit")
    }

    pub(super) fn settings(&self) -> Settings {
        Settings::new(self.audit(), "a")
    }

    pub(super) fn try_open(&self, settings: Settings) -> Result<Log, AuditError> {
        Log::open(settings, SigningKey::from_pkcs8(&self.key).unwrap(), self.clock.clone())
    }

    pub(super) fn open(&self) -> Log {
        self.try_open(self.settings()).unwrap()
    }

    /// Opens the log where it still holds `expected`.
    fn open_expecting(&self, expected: &Anchor) -> Result<Log, AuditError> {
        self.try_open(Settings { expected: Some(expected.clone()), ..self.settings() })
    }

    /// Opens the log whether or not it still holds `expected`.
    fn accept_loss(&self, expected: &Anchor) -> Log {
        let expected = Some(expected.clone());
        self.try_open(Settings { expected, accept_loss: true, ..self.settings() }).unwrap()
    }

    /// One segment per batch.
    pub(super) fn open_in_pieces(&self) -> Log {
        self.try_open(Settings { segment_bytes: 1, ..self.settings() }).unwrap()
    }

    pub(super) fn public(&self) -> VerifyingKey {
        SigningKey::from_pkcs8(&self.key).unwrap().verifying_key()
    }

    fn verify(&self) -> Report {
        self.verify_with(&[])
    }

    fn verify_with(&self, anchors: &[Anchor]) -> Report {
        verify(&self.audit(), &[self.public()], anchors).unwrap()
    }

    pub(super) fn segments(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.audit().join("a")).unwrap();
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
        paths.sort();
        paths
    }

    /// Every line of every segment.
    pub(super) fn lines(&self) -> Vec<String> {
        let texts = self.segments().into_iter().map(|path| fs::read_to_string(path).unwrap());
        texts.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
    }

    /// Puts other lines in place of the only segment's.
    pub(super) fn rewrite(&self, lines: &[String]) {
        let segments = self.segments();
        assert_eq!(segments.len(), 1);
        fs::write(&segments[0], lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    }

    fn anchor(&self) -> Anchor {
        let report = self.verify();
        let instance = &report.instances[0];
        Anchor { instance: "a".to_owned(), seq: instance.last.unwrap(), hash: instance.last_hash.unwrap() }
    }
}

pub(super) fn record(detail: impl Into<String>) -> Record {
    Record {
        principal: "User::\"ana\"".to_owned(),
        action: "read".to_owned(),
        environment: "staging".to_owned(),
        secret: "database".to_owned(),
        outcome: Some(Outcome::Ok),
        detail: detail.into(),
        ..Record::default()
    }
}

/// A line's place.
pub(super) fn place_of(line: &str) -> Anchor {
    let record = json(line);
    let text = |member: &str| record[member].as_str().unwrap().to_owned();
    format!("{}:{}:{}", text("instance"), record["seq"], text("hash")).parse().unwrap()
}

/// A start's refusal of a log that lacks `expected`, in words.
fn refusal(opened: Result<Log, AuditError>) -> String {
    let error = opened.unwrap_err();
    assert!(matches!(error, AuditError::Cut { .. }), "{error}");
    assert_eq!(error.reason(), Reason::AuditBroken);
    let text = error.to_string();
    assert!(text.contains("--accept-loss") && !text.contains('\n'), "{text}");
    text
}

pub(super) fn json(line: &str) -> serde_json::Value {
    serde_json::from_str(line).unwrap()
}

pub(super) fn kinds(lines: &[String]) -> Vec<String> {
    lines.iter().map(|line| json(line)["kind"].as_str().unwrap().to_owned()).collect()
}

pub(super) fn details(lines: &[String]) -> Vec<String> {
    lines.iter().filter_map(|line| json(line)["detail"].as_str().map(str::to_owned)).collect()
}

pub(super) fn findings(report: &Report) -> Vec<FindingKind> {
    report.findings.iter().map(|finding| finding.kind).collect()
}

fn hash(line: &str) -> String {
    let input = [&[1][..], &line.as_bytes()[BODY..]].concat();
    data_encoding::HEXLOWER.encode(ring::digest::digest(&ring::digest::SHA256, &input).as_ref())
}

/// Gives a line the hash that its bytes have.
pub(super) fn rehashed(line: &str) -> String {
    format!("{{\"hash\":\"{}\",{}", hash(line), &line[BODY..])
}

fn replace_member(line: &str, member: &str, value: &str) -> String {
    let marker = format!("\"{member}\":\"");
    match line.find(&marker).map(|at| at + marker.len()) {
        Some(start) => format!("{}{value}{}", &line[..start], &line[start + value.len()..]),
        None => line.to_owned(),
    }
}

/// What whoever can write the file but not sign would do: everything from `from` on chained anew.
pub(super) fn rechained(lines: &[String], from: usize) -> Vec<String> {
    let mut chained = lines[..from].to_vec();
    for line in &lines[from..] {
        let mut line = line.clone();
        if let Some(before) = chained.last() {
            let prev = before[9..73].to_owned();
            line = replace_member(&line, "prev", &prev);
            line = replace_member(&line, "head", &prev);
        }
        chained.push(rehashed(&line));
    }
    chained
}

/// A closed log of `count` records: start, checkpoint, the records, shutdown, checkpoint.
async fn closed_log(count: usize) -> Place {
    let place = Place::new();
    let log = place.open();
    for n in 0..count {
        log.append(record(format!("n{n}")), Durable).await.unwrap();
    }
    log.close().await.unwrap();
    place
}

#[tokio::test]
async fn records_chain_and_verify() {
    let place = Place::new();
    let log = place.open();
    assert_eq!((log.instance(), log.directory()), ("a", place.audit().as_path()));
    for n in 0..5 {
        assert_eq!(log.append(record(format!("n{n}")), Durable).await.unwrap(), 3 + 2 * n);
        assert_eq!(log.append(record(format!("r{n}")), Relaxed).await.unwrap(), 4 + 2 * n);
    }
    log.append_all(vec![record("x"), record("y")], Durable).await.unwrap();
    log.append_all(Vec::new(), Durable).await.unwrap();
    assert!(log.health().is_ok());
    log.close().await.unwrap();

    let report = place.verify();
    assert!(report.is_clean(), "{report:?}");
    let [instance] = &report.instances[..] else { panic!("{report:?}") };
    assert_eq!(
        (instance.first, instance.last, instance.records, instance.segments),
        (Some(1), Some(16), 16, 1)
    );
    assert_eq!((instance.checkpoints, instance.anchored, instance.unanchored), (2, Some(16), 0));
    assert!(instance.clean_shutdown);
    let kinds = kinds(&place.lines());
    assert_eq!((kinds[0].as_str(), kinds[1].as_str(), kinds[2].as_str()), ("start", "checkpoint", "access"));
    assert_eq!((kinds[14].as_str(), kinds[15].as_str()), ("shutdown", "checkpoint"));
    assert_eq!(details(&place.lines())[8..], ["n4", "r4", "x", "y"]);
    assert_eq!(fs::metadata(&place.segments()[0]).unwrap().mode() & 0o7777, 0o600);
}

#[tokio::test]
async fn a_chain_goes_on_after_a_restart() {
    let place = closed_log(2).await;
    let log = place.open();
    log.append(record("again"), Durable).await.unwrap();
    log.close().await.unwrap();
    let report = place.verify();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.instances[0].last, Some(11));
    assert_eq!(place.segments().len(), 1);
}

#[tokio::test]
async fn b20_every_tampering_is_found_and_named() {
    type Tamper = fn(&mut Vec<String>);
    let cases: [(&str, FindingKind, Tamper); 15] = [
        ("edited", FindingKind::HashMismatch, |lines| lines[4] = lines[4].replace("database", "databasf")),
        ("hash edited", FindingKind::HashMismatch, |lines| {
            lines[4] = replace_member(&lines[4], "hash", "0000")
        }),
        ("edited and rehashed", FindingKind::BrokenLink, |lines| {
            lines[4] = rehashed(&lines[4].replace("database", "databasf"));
        }),
        ("deleted", FindingKind::MissingRecords, |lines| drop(lines.remove(4))),
        ("exchanged", FindingKind::OutOfOrder, |lines| lines.swap(4, 5)),
        ("repeated", FindingKind::Duplicate, |lines| lines.insert(5, lines[4].clone())),
        ("repeated later", FindingKind::OutOfOrder, |lines| lines.push(lines[4].clone())),
        ("put in between", FindingKind::OutOfOrder, |lines| {
            let forged = lines[5].replace("database", "databasf");
            lines.insert(5, rehashed(&forged));
        }),
        ("put in between as text", FindingKind::Malformed, |lines| lines.insert(5, "hello".to_owned())),
        ("given a field", FindingKind::Malformed, |lines| {
            lines[4] = rehashed(&lines[4].replace("\"action\"", "\"value\":\"x\",\"action\""));
        }),
        ("given the log's own fields", FindingKind::Malformed, |lines| {
            lines[4] = rehashed(&lines[4].replace("\"access\"", "\"shutdown\""));
        }),
        ("cut at the start", FindingKind::MissingStart, |lines| drop(lines.drain(..2))),
        ("rewritten before a checkpoint", FindingKind::BadSignature, |lines| {
            lines[4] = lines[4].replace("database", "databasf");
            *lines = rechained(lines, 4);
        }),
        ("rewritten from the first record", FindingKind::BadSignature, |lines| {
            lines[0] = lines[0].replace("\"unsigned\":0", "\"unsigned\":1");
            *lines = rechained(lines, 0);
        }),
        ("signature of another checkpoint", FindingKind::BadSignature, |lines| {
            let stolen = json(&lines[1])["signature"].as_str().unwrap().to_owned();
            let last = lines.len() - 1;
            lines[last] = rehashed(&replace_member(&lines[last], "signature", &stolen));
        }),
    ];
    for (name, expected, tamper) in cases {
        let place = closed_log(6).await;
        assert!(place.verify().is_clean());
        let mut lines = place.lines();
        tamper(&mut lines);
        place.rewrite(&lines);
        let report = place.verify();
        assert!(findings(&report).contains(&expected), "{name}: {report:?}");
        for finding in &report.findings {
            assert!(finding.file.starts_with("a/") || finding.line == 0, "{name}: {finding}");
            assert!(!finding.to_string().contains('\n'), "{name}: {finding}");
        }
    }
}

#[tokio::test]
async fn a_finding_says_where() {
    let place = closed_log(6).await;
    let mut lines = place.lines();
    lines[4] = lines[4].replace("database", "databasf");
    place.rewrite(&lines);
    let report = place.verify();
    let [finding] = &report.findings[..] else { panic!("{report:?}") };
    assert_eq!(finding.file, "a/00000000000000000001.jsonl");
    assert_eq!((finding.line, finding.sequence, finding.kind.as_str()), (5, Some(5), "hash_mismatch"));
}

#[tokio::test]
async fn b20_a_cut_or_rewritten_tail_shows_against_an_anchor() {
    for cut in [1, 2, 4] {
        let place = closed_log(6).await;
        let anchor = place.anchor();
        assert!(place.verify_with(std::slice::from_ref(&anchor)).is_clean());
        let mut lines = place.lines();
        lines.truncate(lines.len() - cut);
        place.rewrite(&lines);
        let report = place.verify();
        assert!(report.is_clean(), "nothing in the chain itself shows it: {report:?}");
        assert!(!report.instances[0].clean_shutdown);
        assert_eq!(report.unanchored(), 8 - u64::try_from(cut).unwrap(), "{report:?}");
        assert_eq!(findings(&place.verify_with(&[anchor])), [FindingKind::AnchorMissing]);
    }
    let place = closed_log(6).await;
    let mut lines = place.lines();
    lines.truncate(8);
    let last = json(&lines[7]);
    let anchor = format!("a:8:{}", last["hash"].as_str().unwrap()).parse::<Anchor>().unwrap();
    lines[5] = lines[5].replace("database", "databasf");
    place.rewrite(&rechained(&lines, 5));
    assert!(place.verify().is_clean(), "behind the last checkpoint anyone who can write can rewrite");
    assert_eq!(place.verify().unanchored(), 6);
    assert_eq!(findings(&place.verify_with(&[anchor])), [FindingKind::AnchorMismatch]);
}

#[tokio::test]
async fn b20_a_folder_that_is_gone_shows_against_an_anchor() {
    let place = closed_log(1).await;
    let anchor = place.anchor();
    fs::rename(place.audit().join("a"), place.audit().join("b")).unwrap();
    let found = findings(&place.verify_with(&[anchor]));
    assert!(found.contains(&FindingKind::AnchorMissing), "{found:?}");
    assert!(found.contains(&FindingKind::MissingStart), "a chain fits its own instance only: {found:?}");
    assert!(found.contains(&FindingKind::BadSignature), "{found:?}");
    fs::remove_dir_all(place.audit().join("b")).unwrap();
    assert!(matches!(verify(&place.audit(), &[], &[]), Err(AuditError::Unreadable { .. })));
}

#[tokio::test]
async fn segments_follow_each_other_and_one_that_is_gone_shows() {
    for (gone, expected) in
        [(0, FindingKind::MissingStart), (3, FindingKind::MissingRecords), (7, FindingKind::AnchorMissing)]
    {
        let place = Place::new();
        let log = place.open_in_pieces();
        for n in 0..6 {
            log.append(record(format!("n{n}")), Durable).await.unwrap();
        }
        log.close().await.unwrap();
        let segments = place.segments();
        assert_eq!(segments.len(), 8, "start, six records, shutdown");
        let anchor = place.anchor();
        assert!(place.verify_with(std::slice::from_ref(&anchor)).is_clean());
        for segment in &segments {
            let first =
                json(fs::read_to_string(segment).unwrap().lines().next().unwrap())["seq"].as_u64().unwrap();
            assert_eq!(segment.file_name().unwrap().to_str().unwrap(), format!("{first:020}.jsonl"));
        }
        fs::remove_file(&segments[gone]).unwrap();
        let found = findings(&place.verify_with(&[anchor]));
        assert!(found.contains(&expected), "{gone}: {found:?}");
    }
}

#[tokio::test]
async fn a_segment_under_another_name_shows() {
    let place = closed_log(2).await;
    let segment = place.segments().remove(0);
    for name in ["00000000000000000002.jsonl", "1.jsonl", "copy.jsonl"] {
        let other = segment.with_file_name(name);
        fs::rename(&segment, &other).unwrap();
        let found = findings(&place.verify());
        assert!(found.contains(&FindingKind::SegmentName), "{name}: {found:?}");
        fs::rename(&other, &segment).unwrap();
    }
}

#[tokio::test]
async fn an_unfinished_segment_in_the_middle_shows() {
    let place = Place::new();
    let log = place.open_in_pieces();
    log.append(record("x"), Durable).await.unwrap();
    log.close().await.unwrap();
    fs::OpenOptions::new().append(true).open(&place.segments()[0]).unwrap().write_all(b"half").unwrap();
    assert_eq!(findings(&place.verify()), [FindingKind::Malformed]);
}

/// A closed log's key and bytes, made once.
fn closed_bytes() -> &'static (VerifyingKey, Vec<u8>) {
    static CLOSED: OnceLock<(VerifyingKey, Vec<u8>)> = OnceLock::new();
    CLOSED.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let place = runtime.block_on(closed_log(4));
        (place.public(), fs::read(&place.segments()[0]).unwrap())
    })
}

/// Whether a log of these bytes is told from a whole one.
fn shows(folder: &Path, bytes: &[u8]) -> bool {
    let instance = folder.join("a");
    fs::create_dir_all(&instance).unwrap();
    fs::write(instance.join("00000000000000000001.jsonl"), bytes).unwrap();
    let report = verify(folder, &[closed_bytes().0], &[]).unwrap();
    !report.is_clean() || report.instances[0].torn_bytes > 0
}

#[test]
fn a_flip_of_any_byte_shows() {
    let folder = tempfile::tempdir().unwrap();
    let (_, bytes) = closed_bytes();
    assert!(!shows(folder.path(), bytes));
    for position in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[position] ^= 1_u8 << (position % 8);
        assert!(shows(folder.path(), &flipped), "byte {position}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_change_of_bytes_shows(
        position in any::<prop::sample::Index>(), mask in 1_u8.., cut in 0_usize..3, put in ".{0,3}",
    ) {
        let folder = tempfile::tempdir().unwrap();
        let (_, bytes) = closed_bytes();
        let mut changed = bytes.clone();
        let at = position.index(bytes.len());
        changed[at] ^= mask;
        let end = (at + cut).min(changed.len());
        drop(changed.splice(at..end, put.bytes()));
        // Whole lines cut off the end are for an anchor to see.
        let is_prefix = bytes.starts_with(&changed);
        prop_assume!(!is_prefix);
        prop_assert!(shows(folder.path(), &changed));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_appends_share_syncs_and_are_all_there() {
    let place = Place::new();
    let log = place.open();
    let appends = (0..1_000).map(|n| {
        let log = log.clone();
        tokio::spawn(async move {
            let durability = if n % 3 == 0 { Relaxed } else { Durable };
            (n, log.append(record(format!("n{n}")), durability).await.unwrap())
        })
    });
    let acknowledged: BTreeSet<(u64, String)> = join_all(appends)
        .await
        .into_iter()
        .map(Result::unwrap)
        .map(|(n, seq)| (seq, format!("n{n}")))
        .collect();
    log.close().await.unwrap();
    let written: BTreeSet<(u64, String)> = place
        .lines()
        .iter()
        .map(|line| json(line))
        .filter(|line| line["kind"] == "access")
        .map(|line| (line["seq"].as_u64().unwrap(), line["detail"].as_str().unwrap().to_owned()))
        .collect();
    assert_eq!(acknowledged.len(), 1_000, "each sequence once");
    assert_eq!(written, acknowledged);
    let report = place.verify();
    assert!(report.is_clean(), "dense: {report:?}");
    assert!(report.instances[0].checkpoints >= 1_000 / CHECKPOINT_EVERY);
}

#[tokio::test]
async fn a_group_stands_together() {
    let place = Place::new();
    let log = place.open();
    let group = |name: &'static str| (0..5).map(move |n| record(format!("{name}{n}"))).collect::<Vec<_>>();
    let names = ["a", "b", "c", "d"];
    for result in join_all(names.map(|name| log.append_all(group(name), Durable))).await {
        result.unwrap();
    }
    log.close().await.unwrap();
    let written = details(&place.lines());
    assert_eq!(written.len(), 20);
    for group in written.chunks(5) {
        let name = &group[0][..1];
        assert_eq!(group, (0..5).map(|n| format!("{name}{n}")).collect::<Vec<_>>());
    }
}

/// A disk of 64 KiB, gone with the value.
pub(super) struct SmallDisk(pub(super) tempfile::TempDir);

impl SmallDisk {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs"])
            .arg(folder.path())
            .status()
            .unwrap();
        assert!(mounted.success(), "this test mounts a small disk and must run as root");
        Self(folder)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn b16_a_full_disk_refuses_and_space_mends_it() {
    let disk = SmallDisk::new();
    let filler = disk.0.path().join("filler");
    fs::write(&filler, vec![b'x'; 24 << 10]).unwrap();
    let place = Place::new();
    let settings = Settings::new(disk.0.path().join("audit"), "a");
    let log = place.try_open(settings.clone()).unwrap();
    let append = async |name: &str, durability| {
        log.append(Record { secret: "x".repeat(600), ..record(name) }, durability).await
    };

    let mut acknowledged = Vec::new();
    let refused = loop {
        let name = format!("n{}", acknowledged.len());
        let durability = if acknowledged.len() % 2 == 0 { Durable } else { Relaxed };
        match append(&name, durability).await {
            Ok(_) => acknowledged.push(name),
            Err(error) => break error,
        }
        assert!(acknowledged.len() < 200, "the disk must be full by now");
    };
    assert!(acknowledged.len() > 10);
    assert_eq!(refused.reason(), Reason::AuditUnavailable, "{refused}");
    for durability in [Durable, Relaxed, Durable] {
        let error = append("refused", durability).await.unwrap_err();
        assert_eq!(error.reason(), Reason::AuditUnavailable, "{error}");
    }
    assert_eq!(
        log.append_all(vec![record("refused"); 50], Durable).await.unwrap_err().reason(),
        refused.reason()
    );
    assert_eq!(log.health().unwrap_err().reason(), Reason::AuditUnavailable);
    let report = verify(&settings.directory, &[place.public()], &[]).unwrap();
    assert!(report.is_clean(), "what was refused left nothing: {report:?}");
    assert_eq!(report.instances[0].torn_bytes, 0);

    fs::remove_file(&filler).unwrap();
    for n in 0..3 {
        append(&format!("after{n}"), Durable).await.unwrap();
        acknowledged.push(format!("after{n}"));
    }
    assert!(log.health().is_ok());
    log.close().await.unwrap();
    let report = verify(&settings.directory, &[place.public()], &[]).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert!(report.instances[0].clean_shutdown);
    let text = fs::read_to_string(settings.directory.join("a/00000000000000000001.jsonl")).unwrap();
    let lines: Vec<_> = text.lines().map(str::to_owned).collect();
    assert_eq!(details(&lines), acknowledged, "every acknowledged record, and no other");
    let figures = log.figures();
    assert_eq!((figures.records, figures.failed), (acknowledged.len() as u64, 1 + 3 + 50));
    assert_eq!((figures.latency.count, figures.backlog), (figures.records, 0));
    assert_eq!(figures.segment_bytes, text.len() as u64);
}

#[tokio::test]
async fn b16_how_full_the_disk_is_shows_before_it_is_full() {
    let disk = SmallDisk::new();
    let place = Place::new();
    let log = place.try_open(Settings::new(disk.0.path().join("audit"), "a")).unwrap();
    let ample = log.figures().disk_free_permille.unwrap();
    assert!((201..=1_000).contains(&ample), "{ample}");
    let filler = disk.0.path().join("filler");
    fs::write(&filler, vec![b'x'; 52 << 10]).unwrap();
    let look = async || {
        place.clock.advance(Duration::from_secs(10));
        for _ in 0..2 {
            // The second one finds that the writer has looked after the first.
            log.append(record("look"), Durable).await.unwrap();
        }
        log.figures().disk_free_permille.unwrap()
    };
    let low = look().await;
    assert!(low <= 200, "80 % are used: {low}");
    assert!(log.health().is_ok(), "and everything is served");
    fs::remove_file(&filler).unwrap();
    assert!(look().await > 200);
    log.close().await.unwrap();
}

/// A store that, told to, keeps the log's thread waiting when that asks how many changes there were: as a disk does that
/// does not answer.
#[derive(Default)]
struct Gate {
    /// Whether it is shut, and whether someone stands before it.
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Gate {
    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.1 = state.0;
        self.changed.notify_all();
        drop(self.changed.wait_while(state, |state| state.0).unwrap());
    }

    fn shut(&self, shut: bool) {
        *self.state.lock().unwrap() = (shut, false);
        self.changed.notify_all();
    }

    fn wait_for_someone(&self) {
        let waited = self.changed.wait_timeout_while(self.state.lock().unwrap(), HUNG, |state| !state.1);
        assert!(!waited.unwrap().1.timed_out(), "nobody comes");
    }
}

/// Waits until a log whose disk hung is well again.
async fn until_it_answers(log: &Log) {
    let well = async {
        while log.health().is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(HUNG, well).await.expect("the disk answers");
}

#[tokio::test]
async fn b17_a_writer_that_hangs_is_refused_like_a_full_disk_and_resumes() {
    let place = Place::new();
    let gate = Arc::new(Gate::default());
    let generation = Arc::clone(&gate);
    let settings = Settings {
        generation: Arc::new(move || {
            generation.pass();
            0
        }),
        ..place.settings()
    };
    let log = place.try_open(settings).unwrap();
    log.append(record("before"), Durable).await.unwrap();
    gate.shut(true);
    let append = |name: &'static str, count: usize, durability| {
        let log = log.clone();
        tokio::spawn(async move { log.append_all(vec![record(name); count], durability).await })
    };
    // So many that a checkpoint is due among them.
    let hanging = append("hanging", 100, Durable);
    let behind_it = Arc::clone(&gate);
    tokio::task::spawn_blocking(move || behind_it.wait_for_someone()).await.unwrap();
    let waiting = append("waiting", 1, Relaxed);
    place.clock.advance(ANSWER_WITHIN);
    for refused in [hanging, waiting] {
        let error = tokio::time::timeout(HUNG, refused).await.unwrap().unwrap().unwrap_err();
        assert_eq!(error.reason(), Reason::AuditUnavailable, "{error}");
        assert!(error.to_string().contains("has not answered for 2 s"), "{error}");
    }
    for durability in [Durable, Relaxed] {
        let error = log.append(record("refused"), durability).await.unwrap_err();
        assert_eq!(error.reason(), Reason::AuditUnavailable, "at once: {error}");
    }
    assert_eq!(log.health().unwrap_err().reason(), Reason::AuditUnavailable);
    assert_eq!((log.figures().failed, log.figures().backlog), (103, 0));

    gate.shut(false);
    until_it_answers(&log).await;
    log.append(record("after"), Durable).await.unwrap();
    assert!(log.health().is_ok());
    assert_eq!(log.figures().records, 2);
    log.close().await.unwrap();
    assert!(place.verify().is_clean());
    let written = details(&place.lines());
    assert_eq!((written.first().unwrap().as_str(), written.last().unwrap().as_str()), ("before", "after"));
    assert!(written[1..written.len() - 1].iter().all(|detail| detail == "hanging"), "{written:?}");
    assert_eq!(written.len(), 102, "what was in hand has a record, and nobody was served for it");
}

#[tokio::test]
async fn b17_a_log_can_be_let_go_while_its_disk_hangs() {
    let place = Place::new();
    let gate = Arc::new(Gate::default());
    let generation = Arc::clone(&gate);
    let settings = Settings {
        generation: Arc::new(move || {
            generation.pass();
            0
        }),
        ..place.settings()
    };
    let log = place.try_open(settings).unwrap();
    gate.shut(true);
    let closing = {
        let log = log.clone();
        tokio::spawn(async move { log.close().await })
    };
    let behind_it = Arc::clone(&gate);
    tokio::task::spawn_blocking(move || behind_it.wait_for_someone()).await.unwrap();
    place.clock.advance(ANSWER_WITHIN);
    let error = tokio::time::timeout(HUNG, closing).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.reason(), Reason::AuditUnavailable, "{error}");
    drop(log);
    gate.shut(false);
}

/// A disk of its own whose writes can be made to hang, as those of a disk that is gone do.
struct FreezableDisk(tempfile::TempDir);

impl FreezableDisk {
    /// `None` where the machine has no loop devices.
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let (image, mount) = (folder.path().join("image"), folder.path().join("mount"));
        fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        fs::create_dir(&mount).unwrap();
        let run = |program: &str, arguments: &[&str], paths: &[&Path]| {
            Command::new(program).args(arguments).args(paths).status().is_ok_and(|status| status.success())
        };
        let made = run("mkfs.ext4", &["-q", "-F"], &[image.as_path()]);
        (made && run("mount", &["-o", "loop"], &[image.as_path(), mount.as_path()])).then_some(Self(folder))
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("mount")
    }

    fn freeze(&self, freeze: bool) -> bool {
        let how = if freeze { "--freeze" } else { "--unfreeze" };
        Command::new("fsfreeze").arg(how).arg(self.path()).status().is_ok_and(|status| status.success())
    }
}

impl Drop for FreezableDisk {
    fn drop(&mut self) {
        self.freeze(false);
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

#[tokio::test]
async fn b17_a_disk_that_hangs_refuses_and_resumes() {
    let Some(disk) = FreezableDisk::new() else {
        eprintln!("not done: this machine has no loop device to freeze");
        return;
    };
    let place = Place::new();
    let settings = Settings::new(disk.path().join("audit"), "a");
    let key = SigningKey::from_pkcs8(&place.key).unwrap();
    let log = Log::open(settings.clone(), key, SystemClock::shared()).unwrap();
    log.append(record("before"), Durable).await.unwrap();
    assert!(disk.freeze(true));
    // The kernel keeps the writer in its write.
    let error =
        tokio::time::timeout(HUNG, log.append(record("hanging"), Durable)).await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Reason::AuditUnavailable, "{error}");
    assert_eq!(log.health().unwrap_err().reason(), Reason::AuditUnavailable);
    assert!(log.append(record("refused"), Relaxed).await.is_err());
    assert!(disk.freeze(false));
    until_it_answers(&log).await;
    log.append(record("after"), Durable).await.unwrap();
    assert!(log.health().is_ok());
    log.close().await.unwrap();
    assert!(verify(&settings.directory, &[place.public()], &[]).unwrap().is_clean());
}

#[tokio::test]
async fn b16_a_log_in_trouble_recovers_by_itself() {
    let disk = SmallDisk::new();
    let place = Place::new();
    let settings = Settings::new(disk.0.path().join("audit"), "a");
    let log = place.try_open(settings.clone()).unwrap();
    let filler = disk.0.path().join("filler");
    // A tmpfs takes what fits and then says that it is full.
    let _ = fs::write(&filler, vec![b'x'; 64 << 10]);
    while log.append(Record { secret: "x".repeat(900), ..record("x") }, Durable).await.is_ok() {}
    assert!(log.health().is_err());
    let mut lines = log.subscribe();
    fs::remove_file(&filler).unwrap();
    // Nobody appends: the log's own attempt, a second later by its clock, is a checkpoint.
    place.clock.advance(Duration::from_secs(2));
    let line = lines.recv().await.unwrap();
    assert_eq!(json(&line)["kind"], "checkpoint");
    log.close().await.unwrap();
    assert!(verify(&settings.directory, &[place.public()], &[]).unwrap().is_clean());
}

fn problem_noticed(place: &Place) -> (PathBuf, String) {
    let segment = place.segments().pop().unwrap();
    let first = json(fs::read_to_string(&segment).unwrap().lines().next().unwrap());
    assert_eq!(first["kind"], "lost");
    assert_eq!(first["segment"], "00000000000000000001.jsonl");
    (segment, first["problem"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn b18_a_deleted_file_is_noticed_and_the_chain_goes_on_elsewhere() {
    for durability in [Durable, Relaxed] {
        let place = Place::new();
        let log = place.open();
        log.append(record("before"), durability).await.unwrap();
        fs::remove_file(&place.segments()[0]).unwrap();
        assert_eq!(
            log.append(record("after"), durability).await.unwrap(),
            5,
            "the noticing record is served"
        );
        let (segment, problem) = problem_noticed(&place);
        assert!(problem.contains("deleted"), "{problem}");
        assert!(segment.ends_with("00000000000000000004.jsonl"));
        log.close().await.unwrap();
        let report = place.verify();
        assert_eq!(findings(&report), [FindingKind::MissingStart]);
        assert_eq!(report.instances[0].losses, 1);
        // The next start finds a chain that it can go on with; the evidence stays.
        place.open_expecting(&log.last_checkpoint().unwrap()).unwrap().close().await.unwrap();
        assert_eq!(findings(&place.verify()), [FindingKind::MissingStart]);
    }
}

#[tokio::test]
async fn b18_a_replaced_or_changed_file_is_noticed() {
    type Change = fn(&Path);
    let cases: [(&str, Change, &[FindingKind]); 3] = [
        (
            "replaced",
            |path| {
                let copy = path.with_extension("copy");
                fs::copy(path, &copy).unwrap();
                fs::rename(&copy, path).unwrap();
            },
            &[],
        ),
        (
            "cut",
            |path| fs::OpenOptions::new().write(true).open(path).unwrap().set_len(0).unwrap(),
            &[FindingKind::MissingStart],
        ),
        (
            "grew",
            |path| fs::OpenOptions::new().append(true).open(path).unwrap().write_all(b"x\n").unwrap(),
            &[FindingKind::Malformed],
        ),
    ];
    for (word, change, expected) in cases {
        let place = Place::new();
        let log = place.open();
        log.append(record("before"), Durable).await.unwrap();
        change(&place.segments()[0]);
        log.append(record("after"), Durable).await.unwrap();
        let (_, problem) = problem_noticed(&place);
        assert!(problem.contains(word), "{problem}");
        log.close().await.unwrap();
        let report = place.verify();
        assert_eq!(findings(&report), expected, "{word}: {report:?}");
        assert_eq!(report.instances[0].losses, 1);
    }
}

#[tokio::test]
async fn b18_a_removed_folder_is_made_again() {
    let place = Place::new();
    let log = place.open();
    log.append(record("before"), Durable).await.unwrap();
    fs::remove_dir_all(place.audit()).unwrap();
    log.append(record("after"), Durable).await.unwrap();
    assert_eq!(fs::metadata(place.audit().join("a")).unwrap().mode() & 0o7777, 0o700);
    assert_eq!(details(&place.lines()), ["after"]);
    assert_eq!(
        place.try_open(place.settings()).unwrap_err().reason(),
        Reason::Locked,
        "the new folder is held too"
    );
    log.close().await.unwrap();
    assert_eq!(findings(&place.verify()), [FindingKind::MissingStart]);
}

#[tokio::test]
async fn b19_a_last_line_that_is_whole_and_wrong_is_no_crash() {
    let tears: [fn(&mut Vec<u8>); 2] = [
        |bytes| {
            let last = bytes.len() - 10;
            bytes[last] ^= 1;
        },
        |bytes| bytes.extend(b"hello\n"),
    ];
    for tear in tears {
        let place = closed_log(3).await;
        let segment = place.segments().remove(0);
        let mut bytes = fs::read(&segment).unwrap();
        tear(&mut bytes);
        fs::write(&segment, &bytes).unwrap();
        assert_eq!(place.try_open(place.settings()).unwrap_err().reason(), Reason::AuditBroken);
        assert_eq!(fs::read(&segment).unwrap(), bytes, "and it is left as evidence");
    }
}

#[tokio::test]
async fn b19_a_torn_last_line_is_cut_off_and_recorded() {
    type Tear = fn(&mut Vec<u8>);
    let cases: [(&str, Tear); 3] = [
        ("half a line", |bytes| bytes.truncate(bytes.len() - 40)),
        ("without its newline", |bytes| bytes.truncate(bytes.len() - 1)),
        ("a part of the last line that never arrived", |bytes| {
            let end = bytes.len() - 10;
            bytes[end - 30..end].fill(0);
        }),
    ];
    for (name, tear) in cases {
        let place = Place::new();
        let log = place.open();
        for n in 0..3 {
            log.append(record(format!("n{n}")), Durable).await.unwrap();
        }
        drop(log);
        let segment = place.segments().remove(0);
        let whole = fs::read(&segment).unwrap();
        let mut torn = whole.clone();
        tear(&mut torn);
        fs::write(&segment, &torn).unwrap();
        let kept = torn
            .iter()
            .zip(&whole)
            .take_while(|(one, other)| one == other)
            .enumerate()
            .filter(|(_, (byte, _))| **byte == b'\n')
            .last()
            .map_or(0, |(position, _)| position + 1);
        let cut = &torn[kept..];

        let log = place.open();
        log.append(record("after"), Durable).await.unwrap();
        log.close().await.unwrap();
        let report = place.verify();
        assert!(report.is_clean(), "{name}: {report:?}");
        assert_eq!(report.instances[0].repairs, 1, "{name}");
        let lines = place.lines();
        let repaired = lines.iter().map(|line| json(line)).find(|line| line["kind"] == "repaired").unwrap();
        assert_eq!(repaired["bytes"], cut.len(), "{name}");
        let digest = ring::digest::digest(&ring::digest::SHA256, cut);
        assert_eq!(repaired["sha256"], data_encoding::HEXLOWER.encode(digest.as_ref()), "{name}");
        assert_eq!(repaired["segment"], "00000000000000000001.jsonl", "{name}");
    }
}

#[tokio::test]
async fn damage_before_the_last_line_stops_the_start() {
    type Damage = fn(&mut Vec<String>);
    let cases: [(&str, Damage); 6] = [
        ("edited", |lines| lines[4] = lines[4].replace("database", "databasf")),
        ("deleted", |lines| drop(lines.remove(4))),
        ("exchanged", |lines| lines.swap(4, 5)),
        ("text", |lines| lines.insert(4, "hello".to_owned())),
        ("another start", |lines| drop(lines.drain(..2))),
        ("rewritten", |lines| {
            lines[4] = lines[4].replace("database", "databasf");
            *lines = rechained(lines, 4);
        }),
    ];
    for (name, damage) in cases {
        let place = closed_log(6).await;
        let mut lines = place.lines();
        damage(&mut lines);
        place.rewrite(&lines);
        let before = fs::read(&place.segments()[0]).unwrap();
        let error = place.try_open(place.settings()).unwrap_err();
        assert_eq!(error.reason(), Reason::AuditBroken, "{name}: {error}");
        assert!(error.to_string().contains("00000000000000000001.jsonl:"), "{name}: {error}");
        assert_eq!(fs::read(&place.segments()[0]).unwrap(), before, "{name}: evidence is left as it was");
    }
}

#[tokio::test]
async fn a_start_looks_back_to_the_last_checkpoint() {
    let place = Place::new();
    let log = place.open_in_pieces();
    for n in 0..4 {
        log.append(record(format!("n{n}")), Durable).await.unwrap();
    }
    drop(log);
    // start + checkpoint | n0 | n1 | n2 | n3
    let segments = place.segments();
    let middle = fs::read_to_string(&segments[2]).unwrap();
    fs::write(&segments[2], middle.replace("database", "databasf")).unwrap();
    assert_eq!(place.try_open(place.settings()).unwrap_err().reason(), Reason::AuditBroken);
    fs::remove_file(&segments[2]).unwrap();
    assert_eq!(place.try_open(place.settings()).unwrap_err().reason(), Reason::AuditBroken);
    fs::write(&segments[2], middle).unwrap();
    let log = place.open();
    log.close().await.unwrap();
    let start = place.lines().iter().map(|line| json(line)).rfind(|line| line["kind"] == "start").unwrap();
    assert_eq!(start["unsigned"], 4);
    assert!(place.verify().is_clean());
}

#[tokio::test]
async fn a_log_cut_back_to_a_checkpoint_is_refused_until_the_loss_is_accepted() {
    // start, checkpoint, n0, n1, shutdown, checkpoint
    let place = closed_log(2).await;
    let earlier = place.segments().iter().map(|path| fs::read(path).unwrap()).collect::<Vec<_>>().concat();
    let log = place.open();
    log.append(record("lost"), Durable).await.unwrap();
    log.close().await.unwrap();
    let expected = log.last_checkpoint().unwrap();
    assert_eq!((expected.seq, &expected), (11, &place.anchor()));
    place.open_expecting(&expected).unwrap().close().await.unwrap();

    let segment = place.segments().remove(0);
    fs::write(&segment, &earlier).unwrap();
    assert!(place.verify().is_clean(), "nothing in the chain itself shows it");
    for _ in 0..2 {
        let text = refusal(place.open_expecting(&expected));
        assert!(text.contains("record 11 ") && text.contains(&expected.hash.to_string()), "{text}");
        assert!(text.contains("ends at record 6;"), "{text}");
        assert_eq!(fs::read(&segment).unwrap(), earlier, "evidence is left as it was");
    }

    let log = place.accept_loss(&expected);
    let last = log.last_checkpoint().unwrap();
    let lines = place.lines();
    assert_eq!(kinds(&lines[6..]), ["lost", "start", "checkpoint"]);
    assert_eq!(last, place_of(&lines[8]), "the loss is on the disk");
    let lost = json(&lines[6]);
    assert_eq!(lost["segment"], "00000000000000000001.jsonl");
    assert!(lost["problem"].as_str().unwrap().contains("record 11 "), "{lost}");
    log.close().await.unwrap();
    let report = place.verify();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.instances[0].losses, 1);
    assert_eq!(findings(&place.verify_with(&[expected])), [FindingKind::AnchorMismatch]);
    place.open_expecting(&last).unwrap();
}

#[tokio::test]
async fn a_torn_record_that_is_expected_is_no_mere_repair() {
    let place = closed_log(1).await;
    let expected = place.anchor();
    let segment = place.segments().remove(0);
    let mut bytes = fs::read(&segment).unwrap();
    bytes.truncate(bytes.len() - 1);
    fs::write(&segment, &bytes).unwrap();
    refusal(place.open_expecting(&expected));
    assert_eq!(fs::read(&segment).unwrap(), bytes, "evidence is left as it was");
    place.accept_loss(&expected).close().await.unwrap();
    assert_eq!(kinds(&place.lines()[4..7]), ["repaired", "lost", "start"]);
    assert!(place.verify().is_clean());
}

#[tokio::test]
async fn a_log_that_is_gone_is_refused_until_the_loss_is_accepted() {
    for gone in ["audit", "audit/a"] {
        let place = closed_log(1).await;
        let expected = place.anchor();
        fs::remove_dir_all(place.directory.path().join(gone)).unwrap();
        for _ in 0..2 {
            let text = refusal(place.open_expecting(&expected));
            assert!(text.contains("no record at all"), "{text}");
            assert!(place.segments().is_empty(), "no new chain was begun");
        }
        place.accept_loss(&expected).close().await.unwrap();
        assert_eq!(kinds(&place.lines()), ["lost", "start", "checkpoint", "shutdown", "checkpoint"]);
        let report = place.verify();
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(report.instances[0].losses, 1);
    }
}

#[tokio::test]
async fn another_record_in_the_expected_ones_place_is_refused() {
    let place = closed_log(2).await;
    let lines = place.lines();
    let other = Anchor { hash: place_of(&lines[2]).hash, ..place_of(&lines[3]) };
    for expected in [other, Anchor { hash: place_of(&lines[2]).hash, ..place.anchor() }] {
        let text = refusal(place.open_expecting(&expected));
        assert!(text.contains("00000000000000000001.jsonl holds another one"), "{text}");
    }
    let text = refusal(place.open_expecting(&Anchor { instance: "b".to_owned(), ..place.anchor() }));
    assert!(text.contains("chain of instance `a`"), "{text}");
    assert_eq!(place.lines(), lines);
    for line in &lines {
        assert!(place.open_expecting(&place_of(line)).is_ok(), "{line}");
    }
    let other = Anchor { hash: place_of(&lines[2]).hash, ..place_of(&lines[3]) };
    place.accept_loss(&other).close().await.unwrap();
    assert_eq!(place.verify().instances[0].losses, 1);
    assert!(place.verify().is_clean());
}

#[tokio::test]
async fn what_is_expected_is_looked_up_in_earlier_segments() {
    let place = Place::new();
    let log = place.open_in_pieces();
    let first = log.last_checkpoint().unwrap();
    for n in 0..3 {
        log.append(record(format!("n{n}")), Durable).await.unwrap();
    }
    log.close().await.unwrap();
    // start + checkpoint | n0 | n1 | n2 | shutdown + checkpoint
    let segments = place.segments();
    let middle = place_of(&fs::read_to_string(&segments[2]).unwrap());
    for expected in [&first, &middle] {
        assert!(place.open_expecting(expected).is_ok(), "{expected}");
        let other = Anchor { hash: log.last_checkpoint().unwrap().hash, ..expected.clone() };
        refusal(place.open_expecting(&other));
    }
    fs::remove_file(&segments[2]).unwrap();
    let text = refusal(place.open_expecting(&middle));
    assert!(text.contains("00000000000000000003.jsonl, where it belongs, does not hold it"), "{text}");
    fs::remove_file(&segments[0]).unwrap();
    let text = refusal(place.open_expecting(&first));
    assert!(text.contains("no signed retention record"), "{text}");
}

#[tokio::test]
async fn what_the_retention_removed_is_not_cut_off() {
    let place = Place::new();
    let settings = Settings { segment_bytes: 1, retention: 10 * DAY, ..place.settings() };
    let log = place.try_open(settings.clone()).unwrap();
    let expected = log.last_checkpoint().unwrap();
    place.clock.advance(11 * DAY);
    log.append(record("new"), Durable).await.unwrap();
    log.close().await.unwrap();
    assert!(place_of(&place.lines()[0]).seq > expected.seq, "removed");
    let settings = Settings { expected: Some(expected), ..settings };
    place.try_open(settings.clone()).unwrap().close().await.unwrap();

    // More than the retention record gives up is.
    fs::remove_file(&place.segments()[0]).unwrap();
    refusal(place.try_open(settings));
}

#[tokio::test]
async fn the_last_checkpoint_is_the_newest_on_the_disk() {
    let place = Place::new();
    let log = place.open();
    let last = || log.last_checkpoint().unwrap();
    let many = || vec![record("many"); usize::try_from(CHECKPOINT_EVERY).unwrap()];
    assert_eq!(last(), place_of(&place.lines()[1]), "the start's own");
    log.append(record("one"), Durable).await.unwrap();
    assert_eq!(last().seq, 2);
    log.append_all(many(), Durable).await.unwrap();
    let checkpoint = last();
    assert_eq!(checkpoint, place_of(&place.lines()[102]), "behind the hundredth record since");
    log.append_all(many(), Relaxed).await.unwrap();
    assert!(kinds(&place.lines()[103..]).contains(&"checkpoint".to_owned()));
    assert_eq!(last(), checkpoint, "what is only written may not survive");
    log.append(record("one"), Durable).await.unwrap();
    assert!(last().seq > checkpoint.seq);
    log.clone().close().await.unwrap();
    assert_eq!(last(), place.anchor(), "the shutdown's");
    assert_eq!(last(), place_of(place.lines().last().unwrap()));
    assert_eq!(kinds(&place.lines()).last().unwrap(), "checkpoint");
}

#[tokio::test]
async fn a_record_of_another_instance_shows() {
    let place = closed_log(6).await;
    let mut lines = place.lines();
    assert!(lines.iter().all(|line| line.contains("Z\",\"instance\":\"a\",\"kind\":")), "{lines:?}");
    // Behind the last checkpoint anyone who can write can rewrite.
    lines.truncate(8);
    for line in [4, 5, 7] {
        lines[line] = lines[line].replace("\"instance\":\"a\"", "\"instance\":\"b\"");
    }
    place.rewrite(&rechained(&lines, 4));
    let report = place.verify();
    assert_eq!(findings(&report), [FindingKind::Malformed; 2], "once for each run of them: {report:?}");
    assert_eq!((report.findings[0].sequence, report.findings[1].sequence), (Some(5), Some(8)));
    assert!(report.findings[0].message.contains("instance `b`"), "{report:?}");
    let error = place.try_open(place.settings()).unwrap_err();
    assert_eq!(error.reason(), Reason::AuditBroken, "{error}");
    assert!(error.to_string().contains("instance `b`"), "{error}");
}

#[tokio::test]
async fn an_empty_last_segment_is_written_to() {
    let place = closed_log(1).await;
    let next = place.segments()[0].with_file_name("00000000000000000006.jsonl");
    fs::write(&next, "").unwrap();
    place.open().close().await.unwrap();
    assert!(fs::metadata(&next).unwrap().len() > 0);
    assert!(place.verify().is_clean());

    let place = closed_log(1).await;
    fs::write(place.segments()[0].with_file_name("00000000000000000009.jsonl"), "").unwrap();
    assert_eq!(place.try_open(place.settings()).unwrap_err().reason(), Reason::AuditBroken);
}

#[tokio::test]
async fn b21_two_writers_never_share_a_chain() {
    let place = Place::new();
    let log = place.open();
    let error = place.try_open(place.settings()).unwrap_err();
    assert_eq!(error.reason(), Reason::Locked, "{error}");
    log.close().await.unwrap();
    let next = place.open();
    assert!(matches!(log.append(record("x"), Durable).await, Err(AuditError::Closed)));
    drop(next);
    place.open().close().await.unwrap();
    assert!(place.verify().is_clean());
}

#[tokio::test]
async fn old_segments_go_and_the_chain_says_so() {
    let place = Place::new();
    let settings = Settings { segment_bytes: 1, retention: 10 * DAY, ..place.settings() };
    let log = place.try_open(settings.clone()).unwrap();
    for n in 0..3 {
        place.clock.advance(DAY);
        log.append(record(format!("old{n}")), Durable).await.unwrap();
    }
    let removed = place.anchor();
    place.clock.advance(11 * DAY);
    log.append(record("new"), Durable).await.unwrap();
    log.close().await.unwrap();

    let report = place.verify();
    assert!(report.is_clean(), "{report:?}");
    assert!(report.instances[0].first.unwrap() > removed.seq, "{report:?}");
    assert_eq!(details(&place.lines()), ["new"]);
    let retention =
        place.lines().iter().rev().map(|line| json(line)).find(|line| line["kind"] == "retention").unwrap();
    assert_eq!(retention["first"].as_u64(), report.instances[0].first);
    assert!(place.verify_with(&[removed]).is_clean(), "what was given up is not missing");

    // By age at a start too, and nothing younger.
    place.clock.advance(11 * DAY);
    let log = place.try_open(settings).unwrap();
    assert!(details(&place.lines()).is_empty());
    log.append(record("newer"), Durable).await.unwrap();
    log.close().await.unwrap();
    assert!(place.verify().is_clean());
    assert_eq!(details(&place.lines()), ["newer"]);

    // A removal that no signed record explains shows.
    fs::remove_file(&place.segments()[0]).unwrap();
    assert!(findings(&place.verify()).contains(&FindingKind::MissingStart));
}

#[tokio::test]
async fn a_retention_record_that_is_not_signed_excuses_nothing() {
    let place = Place::new();
    let log = place.open_in_pieces();
    for n in 0..3 {
        log.append(record(format!("n{n}")), Durable).await.unwrap();
    }
    drop(log);
    let segments = place.segments();
    let kept = json(&fs::read_to_string(&segments[2]).unwrap());
    let last = fs::read_to_string(&segments[3]).unwrap();
    let forged = format!(
        "{}\"seq\":6,\"prev\":\"{}\",\"time\":\"2026-01-02T03:04:05Z\",\"instance\":\"a\",\"kind\":\"retention\",\"first\":{},\"first_prev\":{},\"removed\":2}}",
        " ".repeat(BODY),
        &last[9..73],
        kept["seq"],
        kept["prev"],
    );
    fs::write(segments[3].with_file_name("00000000000000000006.jsonl"), rehashed(&forged) + "\n").unwrap();
    assert!(place.verify().is_clean());
    fs::remove_file(&segments[0]).unwrap();
    fs::remove_file(&segments[1]).unwrap();
    assert!(findings(&place.verify()).contains(&FindingKind::MissingStart));
}

#[tokio::test]
async fn a_relaxed_record_is_in_the_file_before_it_is_acknowledged() {
    let place = Place::new();
    let log = place.open();
    let mut lines = log.subscribe();
    for n in 0..3 {
        log.append(record(format!("n{n}")), Relaxed).await.unwrap();
        assert_eq!(details(&place.lines()).last().unwrap(), &format!("n{n}"));
    }
    for written in &place.lines()[2..] {
        assert_eq!(&*lines.recv().await.unwrap(), written);
    }
    // Dropped without `close`: still written, still whole.
    drop(log);
    assert_eq!(details(&place.lines()), ["n0", "n1", "n2"]);
    assert!(place.verify().is_clean());
}

#[tokio::test]
async fn b20_what_follows_the_last_checkpoint_is_said() {
    let place = Place::new();
    let log = place.open();
    for n in 0..3 {
        log.append(record(format!("n{n}")), Durable).await.unwrap();
    }
    let report = place.verify();
    assert!(report.is_clean(), "a log that is open verifies too: {report:?}");
    assert_eq!((report.unanchored(), report.instances[0].anchored), (3, Some(2)));
    assert!(!report.instances[0].clean_shutdown);

    log.close().await.unwrap();
    assert!(place.verify().instances[0].clean_shutdown);
    place.open();
    assert!(!place.verify().instances[0].clean_shutdown, "opened since");
}

#[tokio::test]
async fn b20_verify_prints_what_is_unanchored() {
    let place = Place::new();
    let log = place.open();
    for n in 0..3 {
        log.append(record(format!("n{n}")), Durable).await.unwrap();
    }
    let key = place.directory.path().join("audit.pub");
    fs::write(&key, format!("{}\n", place.public())).unwrap();
    let verified = || {
        let mut verify = program::claviger(["audit", "verify", "--dir"]);
        let output = verify.arg(place.audit()).arg("--public-key").arg(&key).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, said) = verified();
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("the log is whole; UNANCHORED: 3 records follow the last checkpoints"), "{said}");
    log.close().await.unwrap();
    let (code, said) = verified();
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("the log is whole; everything is anchored: "), "{said}");
    assert!(!said.contains("UNANCHORED"), "{said}");
    let mut lines = place.lines();
    lines[3] = lines[3].replace("database", "databasf");
    place.rewrite(&lines);
    let (code, said) = verified();
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("00000000000000000001.jsonl:4: hash_mismatch: "), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn b21_two_brokers_on_one_audit_folder_need_two_instances() {
    use std::os::unix::fs::{DirBuilderExt, symlink};
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = assembled::start(&assembled::resolved(one.path()), assembled::clock()).await.unwrap();
    let data = other.path().join("data");
    for folder in [data.clone(), data.join("keys")] {
        fs::DirBuilder::new().mode(0o700).create(folder).unwrap();
    }
    symlink(one.path().join("data/audit"), data.join("audit")).unwrap();
    for file in ["audit.key", "audit.pub"] {
        fs::copy(one.path().join("data/keys").join(file), data.join("keys").join(file)).unwrap();
    }
    let mut resolved = assembled::resolved(other.path());
    let refused = assembled::start(&resolved, assembled::clock()).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::Locked, "{refused}");
    assert!(refused.to_string().contains("instance name of its own"), "{refused}");

    resolved.instance = "other".to_owned();
    let second = assembled::start(&resolved, assembled::clock()).await.unwrap();
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    let key = fs::read_to_string(data.join("keys/audit.pub")).unwrap();
    let key = VerifyingKey::parse(&key).unwrap();
    let report = verify(&one.path().join("data/audit"), &[key], &[]).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.instances.len(), 2);
}

#[tokio::test]
async fn time_and_number_make_a_checkpoint_due() {
    let place = Place::new();
    let log = place.open();
    for n in 0..CHECKPOINT_EVERY {
        assert_eq!(place.verify().unanchored(), n);
        log.append(record("many"), Relaxed).await.unwrap();
    }
    assert_eq!(place.verify().unanchored(), 0);
    drop(log);

    let place = Place::new();
    let log = place.open();
    log.append(record("early"), Durable).await.unwrap();
    place.clock.advance(CHECKPOINT_WITHIN);
    log.append(record("late"), Durable).await.unwrap();
    drop(log);
    assert!(kinds(&place.lines())[2..].iter().any(|kind| kind == "checkpoint"));
}

#[tokio::test]
async fn a_large_group_has_checkpoints_within() {
    let place = Place::new();
    let log = place.open();
    log.append_all(vec![record("x"); 450], Durable).await.unwrap();
    log.close().await.unwrap();
    let mut between = 0;
    for kind in kinds(&place.lines()) {
        between = if kind == "checkpoint" { 0 } else { between + 1 };
        assert!(between <= CHECKPOINT_EVERY);
    }
    assert!(place.verify().is_clean());
}

#[tokio::test]
async fn a_closed_log_refuses() {
    let place = Place::new();
    let log = place.open();
    let other = log.clone();
    log.close().await.unwrap();
    other.close().await.unwrap();
    let error = other.append(record("x"), Durable).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Unavailable, "{error}");
    assert!(other.append_all(vec![record("x")], Relaxed).await.is_err());
    assert_eq!(kinds(&place.lines()), ["start", "checkpoint", "shutdown", "checkpoint"]);
}

#[tokio::test]
async fn a_caller_that_goes_away_loses_no_record() {
    let place = Place::new();
    let log = place.open();
    for n in 0..10 {
        // Polled once, then dropped.
        let _ = log.append(record(format!("n{n}")), Durable).now_or_never();
    }
    log.append(record("last"), Durable).await.unwrap();
    log.close().await.unwrap();
    assert_eq!(details(&place.lines()).len(), 11);
    assert!(place.verify().is_clean());
}

#[tokio::test]
async fn the_logs_own_kinds_are_not_a_callers() {
    let place = Place::new();
    let log = place.open();
    let error = log.append(Record { kind: Some(Kind::Shutdown), ..record("x") }, Durable).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Internal);
    log.append(Record { kind: Some(Kind::Intent), ..record("x") }, Durable).await.unwrap();
    log.append(Record { kind: Some(Kind::Policy), ..Record::default() }, Durable).await.unwrap();
    log.close().await.unwrap();
    assert_eq!(kinds(&place.lines())[2..4], ["intent", "policy"]);
    assert!(place.verify().is_clean());
}

#[tokio::test]
async fn text_of_strangers_stays_within_its_line() {
    let place = Place::new();
    let log = place.open();
    let reason = "\"}\n{\"hash\":\"0\"}\r\u{0}\u{1b}[31m\u{9b}\u{7f}\u{2028}\u{202e}";
    log.append(Record { reason: reason.to_owned(), ..record("x") }, Durable).await.unwrap();
    log.append(Record { reason: "é".repeat(600), ..record("y") }, Durable).await.unwrap();
    log.close().await.unwrap();
    let lines = place.lines();
    assert_eq!(lines.len(), 6);
    assert!(lines.iter().all(|line| !line.contains(char::is_control)));
    assert_eq!(json(&lines[2])["reason"], reason);
    assert_eq!(json(&lines[3])["reason"], "é".repeat(256));
    assert!(place.verify().is_clean());
}

#[tokio::test]
async fn a_checkpoint_vouches_for_the_stores_and_never_for_older_ones() {
    let place = Place::new();
    let generation = Arc::new(AtomicU64::new(41));
    let settings = || {
        let generation = Arc::clone(&generation);
        Settings { generation: Arc::new(move || generation.load(Ordering::SeqCst)), ..place.settings() }
    };
    let log = place.try_open(settings()).unwrap();
    assert_eq!(log.anchored_generation(), 0);
    generation.store(57, Ordering::SeqCst);
    log.close().await.unwrap();
    for _ in 0..3 {
        generation.store(7, Ordering::SeqCst);
        let log = place.try_open(Settings { segment_bytes: 1, ..settings() }).unwrap();
        assert_eq!(log.anchored_generation(), 57, "restarts don't wash off what was vouched for");
        log.close().await.unwrap();
    }
    assert_eq!(place.verify().instances[0].losses, 0);

    let log = place.try_open(Settings { accept_loss: true, ..settings() }).unwrap();
    assert_eq!(log.anchored_generation(), 57);
    drop(log);
    for _ in 0..2 {
        let log = place.try_open(Settings { accept_loss: true, ..settings() }).unwrap();
        assert_eq!(log.anchored_generation(), 7, "a loss is accepted, and recorded, once");
        log.close().await.unwrap();
    }
    let lines = place.lines();
    let lost: Vec<_> = lines.iter().map(|line| json(line)).filter(|line| line["kind"] == "lost").collect();
    assert_eq!(lost.len(), 1);
    assert!(lost[0]["problem"].as_str().unwrap().contains("generation 57 "), "{}", lost[0]);
    assert!(place.verify().is_clean());
}

#[tokio::test]
async fn another_key_goes_on_and_both_are_needed_to_verify() {
    let mut place = closed_log(1).await;
    let old = place.public();
    place.key = SigningKey::generate_pkcs8().unwrap().to_vec();
    place.open().close().await.unwrap();
    let new = place.public();
    assert!(verify(&place.audit(), &[old, new], &[]).unwrap().is_clean());
    for (keys, unanchored) in [(vec![new], 0), (vec![old], 4), (vec![], 9)] {
        let report = verify(&place.audit(), &keys, &[]).unwrap();
        assert!(findings(&report).iter().all(|kind| *kind == FindingKind::UnknownKey));
        assert_eq!(report.findings.len(), 2 - keys.len(), "once for each key");
        assert_eq!(report.unanchored(), unanchored, "{report:?}");
    }
}

#[tokio::test]
async fn a_folder_that_is_not_private_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let place = closed_log(1).await;
    fs::set_permissions(place.audit(), fs::Permissions::from_mode(0o777)).unwrap();
    let error = place.try_open(place.settings()).unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidConfig, "{error}");
    let error = place.try_open(Settings::new(place.directory.path(), "../a")).unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidConfig, "{error}");
}

#[tokio::test]
async fn queries_filter_and_give_the_newest_first() {
    let place = Place::new();
    let log = place.open_in_pieces();
    let since = place.clock.now();
    let principals = ["User::\"ana\"", "User::\"bo\""];
    for n in 0..6_usize {
        let record = Record {
            principal: principals[n % 2].to_owned(),
            secret: if n < 3 { "database" } else { "data/base" }.to_owned(),
            outcome: Some(if n == 5 { Outcome::Denied } else { Outcome::Ok }),
            request_id: format!("request-{n}"),
            ..record(format!("n{n}"))
        };
        log.append(record, Durable).await.unwrap();
        place.clock.advance(Duration::from_secs(1));
    }
    log.append(Record { kind: Some(Kind::Policy), ..Record::default() }, Durable).await.unwrap();
    log.close().await.unwrap();

    let found = |wanted: Query| details(&query(&place.audit(), &wanted).unwrap());
    let all = Query::default;
    let text = |text: &str| Some(text.to_owned());
    assert_eq!(found(all()), ["n5", "n4", "n3", "n2", "n1", "n0"]);
    assert_eq!(
        found(Query { limit: 2, ..all() }),
        Vec::<String>::new(),
        "shutdown and its checkpoint are newer"
    );
    assert_eq!(found(Query { limit: 2, action: text("read"), ..all() }), ["n5", "n4"]);
    assert_eq!(found(Query { principal: text(principals[1]), ..all() }), ["n5", "n3", "n1"]);
    assert_eq!(found(Query { secret: text("database"), ..all() }), ["n2", "n1", "n0"]);
    assert_eq!(found(Query { secret: text("data/*"), ..all() }), ["n5", "n4", "n3"]);
    assert_eq!(found(Query { secret: text("data"), ..all() }), Vec::<String>::new());
    assert_eq!(found(Query { secret: text("*"), ..all() }).len(), 6);
    assert_eq!(found(Query { outcome: Some(Outcome::Denied), ..all() }), ["n5"]);
    assert_eq!(found(Query { environment: text("production"), ..all() }), Vec::<String>::new());
    assert_eq!(found(Query { request_id: text("request-3"), ..all() }), ["n3"]);
    assert_eq!(found(Query { text: text("equest-2"), ..all() }), ["n2"]);
    let at = |seconds: u64| Some(since.checked_add(Duration::from_secs(seconds)).unwrap());
    assert_eq!(found(Query { since: at(4), ..all() }), ["n5", "n4"]);
    assert_eq!(found(Query { since: at(1), until: at(3), ..all() }), ["n2", "n1"]);
    let of_kind = |kind| query(&place.audit(), &Query { kind: Some(kind), ..all() }).unwrap();
    assert_eq!(of_kind(Kind::Policy).len(), 1);
    assert_eq!(kinds(&of_kind(Kind::Shutdown)), ["shutdown"]);
    assert_eq!(
        query(&place.audit(), &Query { limit: 0, ..all() }).unwrap_err().reason(),
        Reason::InvalidArgument
    );
    let lines = place.lines();
    assert!(query(&place.audit(), &all()).unwrap().iter().all(|line| lines.contains(line)), "as they stand");

    // What is not a record is passed over.
    fs::OpenOptions::new().append(true).open(&place.segments()[2]).unwrap().write_all(b"junk\nhalf").unwrap();
    assert_eq!(found(all()).len(), 6);
}

#[tokio::test]
async fn queries_span_instances() {
    let place = Place::new();
    let first = place.open();
    let second = place.try_open(Settings::new(place.audit(), "b")).unwrap();
    for (n, log) in [&first, &second, &first, &second].into_iter().enumerate() {
        log.append(record(format!("n{n}")), Durable).await.unwrap();
        place.clock.advance(Duration::from_secs(1));
    }
    let found =
        query(&place.audit(), &Query { action: Some("read".to_owned()), limit: 3, ..Query::default() });
    let found = found.unwrap();
    assert_eq!(details(&found), ["n3", "n2", "n1"]);
    assert_eq!(found.iter().map(|line| place_of(line).instance).collect::<Vec<_>>(), ["b", "a", "b"]);
    let of = |instance: &str| {
        let wanted = Query {
            instance: Some(instance.to_owned()),
            action: Some("read".to_owned()),
            ..Query::default()
        };
        details(&query(&place.audit(), &wanted).unwrap())
    };
    assert_eq!((of("a"), of("b")), (vec!["n2".to_owned(), "n0".to_owned()], vec!["n3".into(), "n1".into()]));
    assert!(of("c").is_empty());
    first.close().await.unwrap();
    second.close().await.unwrap();
    let report = place.verify();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.instances.len(), 2);
}

#[test]
fn times_are_the_clocks() {
    let place = Place::new();
    drop(place.open());
    let time: Timestamp = json(&place.lines()[0])["time"].as_str().unwrap().parse().unwrap();
    assert_eq!(time, place.clock.now());
}
