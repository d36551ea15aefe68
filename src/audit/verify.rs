//! [`verify`]: every line of every instance, read once in bounded memory, going on after each finding.
//!
//! Zeros at the end of a segment were written ahead and are no content. Behind them, or among them, anything is a
//! finding; in the last segment, as much as a crash may leave is torn instead, as a [start](super::resume) would have it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::AuditError;
use super::chain::{ChainHash, Entry, Frame, Head, Notice};
use super::checkpoint::{Checkpoint, Handover, VerifyingKey};
use super::report::{Anchor, Finding, FindingKind, InstanceReport, MAX_FINDINGS, Report};
use super::segment::{self, Chunk, LineReader, MAX_TORN, unreadable};

/// Checks every instance's chain below `directory` against the keys and anchors given. Without keys the checkpoints
/// are not vouched for; without an anchor a cut tail can't be seen.
///
/// One key is enough for a chain that was handed over from key to key:
///
/// ```text
///   checkpoints by   K1 ──── K1 ──▶ K2 ──── K2 ──▶ K3 ──── K3
///                            both sign      both sign
///   K1 is given      checked        each next key is trusted from its handover on, the former no more
///   K3 is given      covered: the handover that K3 signed too says where the chain stood; what the
///                    keys before it signed is not checked again
/// ```
///
/// A key that is given is trusted wherever it did not hand over yet. Where a former key may be in wrong hands, give the
/// newest one alone: whoever has the former one could begin another succession where it still signed.
///
/// # Errors
/// [`AuditError::Unreadable`] where there is no log, or a file can't be read. What is wrong with the log is no error.
pub fn verify(directory: &Path, keys: &[VerifyingKey], anchors: &[Anchor]) -> Result<Report, AuditError> {
    let keys: Vec<_> = keys.iter().map(|key| (key.id(), *key)).collect();
    let mut report = Report::default();
    let instances = instances(directory)?;
    for instance in &instances {
        let anchors = anchors.iter().filter(|anchor| anchor.instance == *instance);
        let mut walk =
            Walk::new(instance, &keys, anchors.map(|anchor| (anchor, false)).collect(), &mut report);
        walk.chain(&directory.join(instance))?;
        let found = walk.finish();
        report.instances.push(found);
    }
    for anchor in anchors.iter().filter(|anchor| !instances.contains(&anchor.instance)) {
        report.add(Finding {
            file: anchor.instance.clone(),
            line: 0,
            sequence: Some(anchor.seq),
            kind: FindingKind::AnchorMissing,
            message: "the instance's whole folder is gone".to_owned(),
        });
    }
    Ok(report)
}

/// Whether an instance's chain begins behind `anchor` because a retention record that `key` vouches for says so. Reads
/// the whole chain, which must have no other fault: in a damaged one nothing is believed.
///
/// # Errors
/// [`AuditError::Unreadable`].
pub(super) fn gave_up(
    folder: &Path,
    instance: &str,
    key: &VerifyingKey,
    anchor: &Anchor,
) -> Result<bool, AuditError> {
    let keys = [(key.id(), *key)];
    let mut report = Report::default();
    let mut walk = Walk::new(instance, &keys, vec![(anchor, false)], &mut report);
    walk.chain(folder)?;
    drop(walk.finish());
    Ok(report.findings.iter().all(|finding| finding.kind == FindingKind::UnknownKey))
}

/// The names of the instances below the log's folder, sorted; at least one.
pub(super) fn instances(directory: &Path) -> Result<Vec<String>, AuditError> {
    let names = list_instances(directory)?;
    if names.is_empty() {
        let cause =
            "it holds no instance's folder; name the folder above the one with the .jsonl files".to_owned();
        return Err(AuditError::Unreadable { path: directory.display().to_string(), cause });
    }
    Ok(names)
}

/// The same, and none is no error.
pub(super) fn list_instances(directory: &Path) -> Result<Vec<String>, AuditError> {
    let failed = |error| unreadable(directory, &error);
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if segment::is_instance(&name) && entry.file_type().map_err(failed)?.is_dir() {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// One pass over one instance's chain.
struct Walk<'a> {
    instance: &'a str,
    /// The keys that are trusted, by id: those given, and those that took over.
    keys: Vec<(String, VerifyingKey)>,
    /// The ids of those that handed over.
    retired: BTreeSet<String>,
    /// The first checkpoint of each key that nothing vouches for so far.
    strangers: Vec<(String, Finding)>,
    /// From which id to which one strangers handed over.
    successions: Vec<(String, String)>,
    anchors: Vec<(&'a Anchor, bool)>,
    report: &'a mut Report,
    found: InstanceReport,
    file: String,
    line: u64,
    /// The first record's sequence, and what it says came before.
    start: Option<(u64, ChainHash)>,
    /// The last record in its place.
    head: Option<Head>,
    /// Where a retention record says that the chain begins, and whether a checkpoint vouches for that.
    retention: Option<(u64, ChainHash)>,
    signed_retention: Option<(u64, ChainHash)>,
    after_shutdown: bool,
    /// The last record was one of another instance: a folder under another name is one finding, not a thousand.
    is_astray: bool,
}

impl<'a> Walk<'a> {
    fn new(
        instance: &'a str,
        keys: &[(String, VerifyingKey)],
        anchors: Vec<(&'a Anchor, bool)>,
        report: &'a mut Report,
    ) -> Self {
        Self {
            instance,
            keys: keys.to_vec(),
            retired: BTreeSet::new(),
            strangers: Vec::new(),
            successions: Vec::new(),
            anchors,
            report,
            found: InstanceReport { instance: instance.to_owned(), ..InstanceReport::default() },
            file: instance.to_owned(),
            line: 0,
            start: None,
            head: None,
            retention: None,
            signed_retention: None,
            after_shutdown: false,
            is_astray: false,
        }
    }

    fn chain(&mut self, folder: &Path) -> Result<(), AuditError> {
        let listing = segment::list(folder)?;
        for stranger in &listing.strangers {
            let stranger: String = stranger.escape_debug().take(80).collect();
            self.add(FindingKind::SegmentName, None, format!("`{stranger}` is not a segment's name"));
        }
        for (position, first) in listing.segments.iter().enumerate() {
            let is_last = position + 1 == listing.segments.len();
            self.segment(folder, *first, is_last)?;
        }
        Ok(())
    }

    fn segment(&mut self, folder: &Path, first: u64, is_last: bool) -> Result<(), AuditError> {
        let name = segment::file_name(first);
        let path = folder.join(&name);
        let mut lines = match LineReader::open(&path) {
            // The retention removed it since it was listed; what then comes first must account for that.
            Err(_) if self.head.is_none() && !path.exists() => return Ok(()),
            opened => opened?,
        };
        self.file = format!("{}/{name}", self.instance);
        self.line = 0;
        self.found.segments += 1;
        let mut may_be_torn = is_last;
        while let Some(chunk) = lines.read()? {
            self.line += 1;
            if may_be_torn && chunk.is_torn() {
                // What a start would cut off, record, and keep.
                let bytes = lines.rest()?;
                if bytes <= MAX_TORN {
                    self.found.torn_bytes = bytes;
                    return Ok(());
                }
                may_be_torn = false;
                self.add(
                    FindingKind::Malformed,
                    None,
                    format!("from here on it is damaged: no crash leaves {bytes} bytes"),
                );
                continue;
            }
            match chunk {
                Chunk::Line(line) => self.record(line, first),
                Chunk::Torn(bytes) => {
                    self.add(
                        FindingKind::Malformed,
                        None,
                        format!("it ends in an unfinished line of {bytes} bytes"),
                    );
                }
                Chunk::TooLong { .. } => {
                    self.add(FindingKind::Malformed, None, "the line is longer than any record".to_owned());
                }
            }
        }
        Ok(())
    }

    fn record(&mut self, line: &[u8], first: u64) {
        let Some(frame) = Frame::parse(line) else {
            return self.add(FindingKind::Malformed, None, "the line is not a record".to_owned());
        };
        self.found.records += 1;
        self.found.unanchored += 1;
        self.found.clean_shutdown = false;
        self.start.get_or_insert((frame.seq, frame.prev));
        if !frame.is_authentic() {
            // Its sequence can't be believed: it stands for the one that is due.
            let seq = self.head.map_or(frame.seq, |head| head.seq + 1);
            self.head = Some(Head { seq, hash: frame.hash });
            self.after_shutdown = false;
            return self.add(FindingKind::HashMismatch, Some(seq), "the record was changed".to_owned());
        }
        if self.line == 1 && frame.seq != first {
            let message = format!("its name says {first}, its first record is {}", frame.seq);
            self.add(FindingKind::SegmentName, Some(frame.seq), message);
        }
        let astray = frame.astray(self.instance);
        let was_astray = std::mem::replace(&mut self.is_astray, astray.is_some());
        if let Some(problem) = astray.filter(|_| !was_astray) {
            self.add(FindingKind::Malformed, Some(frame.seq), problem);
        }
        if !self.is_in_place(&frame) {
            return;
        }
        self.head = Some(frame.head());
        self.meet_anchors(&frame);
        let entry = frame.entry();
        let is_shutdown = entry == Ok(Entry::Notice(Notice::Shutdown {}));
        match entry {
            Err(problem) => self.add(FindingKind::Malformed, Some(frame.seq), problem),
            Ok(Entry::Record(_)) => {}
            Ok(Entry::Notice(notice)) => self.notice(&frame, notice),
        }
        self.after_shutdown = is_shutdown;
    }

    /// Whether the record goes on where the chain stands, be it behind a gap or not.
    fn is_in_place(&mut self, frame: &Frame<'_>) -> bool {
        let Some(head) = self.head else { return true };
        let (seq, due) = (frame.seq, head.seq + 1);
        if seq == due && frame.prev != head.hash {
            let message = "it does not follow the record before it".to_owned();
            self.add(FindingKind::BrokenLink, Some(seq), message);
        } else if seq > due {
            let message = format!("records {due} to {} are missing before it", seq - 1);
            self.add(FindingKind::MissingRecords, Some(seq), message);
        } else if frame.head() == head {
            self.add(FindingKind::Duplicate, Some(seq), "the record stands twice".to_owned());
        } else if seq < due {
            self.add(FindingKind::OutOfOrder, Some(seq), format!("record {seq} stands where {due} belongs"));
        }
        seq >= due
    }

    fn notice(&mut self, frame: &Frame<'_>, notice: Notice) {
        match notice {
            Notice::Checkpoint(checkpoint) => self.checkpoint(frame, &checkpoint),
            Notice::Retention { first, first_prev, .. } => self.retention = Some((first, first_prev)),
            Notice::Repaired { .. } => self.found.repairs += 1,
            Notice::Lost { .. } => self.found.losses += 1,
            Notice::Start { .. } | Notice::Shutdown {} => {}
        }
    }

    fn checkpoint(&mut self, frame: &Frame<'_>, checkpoint: &Checkpoint) {
        let next = checkpoint.handover.as_ref().map(|handover| handover.next_key.id());
        let mut named = [Some(&checkpoint.key), next.as_ref()].into_iter().flatten();
        if let Some(id) = named.find(|id| self.is_retired(id)) {
            let message = format!("it names key {id}, which had handed over to another before");
            return self.add(FindingKind::RetiredKey, Some(frame.seq), message);
        }
        let signer = self.signer(checkpoint);
        // What a handover says of itself can be checked without trust in either key.
        let said = checkpoint.handover.as_ref().map(|handover| handover.key);
        if let Some(key) = signer.or(said)
            && !checkpoint.fits(self.instance, frame, &key)
        {
            let message = "its signature does not fit the chain before it".to_owned();
            return self.add(FindingKind::BadSignature, Some(frame.seq), message);
        }
        if signer.is_none() {
            return self.meet_stranger(frame, checkpoint);
        }
        self.found.checkpoints += 1;
        self.found.anchored = Some(frame.seq);
        self.found.unanchored = 0;
        self.found.clean_shutdown = self.after_shutdown;
        self.signed_retention = self.retention.or(self.signed_retention);
        if let Some(handover) = &checkpoint.handover {
            self.hand_over(handover);
        }
    }

    /// The key that a checkpoint must be signed by, where it is trusted, or where the one that takes over from it is.
    fn signer(&self, checkpoint: &Checkpoint) -> Option<VerifyingKey> {
        let trusted = |id: &str| self.keys.iter().find(|(known, _)| known == id).map(|(_, key)| *key);
        trusted(&checkpoint.key).or_else(|| {
            let handover = checkpoint.handover.as_ref()?;
            let next = trusted(&handover.next_key.id())?;
            (next == handover.next_key).then_some(handover.key)
        })
    }

    /// Whether a key handed over in this chain, be it to a key that is trusted or not.
    fn is_retired(&self, id: &str) -> bool {
        self.retired.contains(id) || self.successions.iter().any(|(former, _)| former == id)
    }

    /// Trusts the next key from here on. The former one, and those that led to it, are vouched for up to here.
    fn hand_over(&mut self, handover: &Handover) {
        let next = handover.next_key.id();
        if self.keys.iter().all(|(known, _)| *known != next) {
            self.keys.push((next, handover.next_key));
        }
        let mut vouched = BTreeSet::from([handover.key.id()]);
        for (former, next) in self.successions.iter().rev() {
            if vouched.contains(next) {
                vouched.insert(former.clone());
            }
        }
        self.strangers.retain(|(id, _)| !vouched.contains(id));
        self.retired.append(&mut vouched);
    }

    /// Keeps in mind that an unknown key signed, until it is vouched for or the chain ends.
    fn meet_stranger(&mut self, frame: &Frame<'_>, checkpoint: &Checkpoint) {
        let id = &checkpoint.key;
        if let Some(handover) = &checkpoint.handover
            && self.successions.len() < MAX_FINDINGS
        {
            self.successions.push((id.clone(), handover.next_key.id()));
        }
        if self.strangers.len() >= MAX_FINDINGS || self.strangers.iter().any(|(known, _)| known == id) {
            return;
        }
        let shown: String = id.escape_debug().take(16).collect();
        let message =
            format!("signed by key {shown}, which is not among those given (said once for each key)");
        let finding = self.finding(FindingKind::UnknownKey, Some(frame.seq), message);
        self.strangers.push((id.clone(), finding));
    }

    fn meet_anchors(&mut self, frame: &Frame<'_>) {
        let mut differs = false;
        for (anchor, met) in self.anchors.iter_mut().filter(|(anchor, _)| anchor.seq == frame.seq) {
            *met = true;
            differs |= anchor.hash != frame.hash;
        }
        if differs {
            let message =
                "the record is not the one that the anchor names: the chain was rewritten".to_owned();
            self.add(FindingKind::AnchorMismatch, Some(frame.seq), message);
        }
    }

    fn finish(mut self) -> InstanceReport {
        for (_, finding) in std::mem::take(&mut self.strangers) {
            self.report.add(finding);
        }
        (self.file, self.line) = (self.instance.to_owned(), 0);
        let begun = self.check_start();
        for (anchor, met) in std::mem::take(&mut self.anchors) {
            // What a signed retention record gave up is not missing.
            let given_up = begun && self.start.is_some_and(|(first, _)| anchor.seq < first);
            if !met && !given_up {
                let last = self.head.map_or(0, |head| head.seq);
                let message =
                    format!("record {} is known to have been written; the chain ends at {last}", anchor.seq);
                self.add(FindingKind::AnchorMissing, Some(anchor.seq), message);
            }
        }
        self.found.first = self.start.map(|(first, _)| first);
        self.found.last = self.head.map(|head| head.seq);
        self.found.last_hash = self.head.map(|head| head.hash);
        self.found
    }

    /// Whether the chain begins where it may: with record 1, or where a signed retention record says. A removal that
    /// a crash interrupted leaves segments from before that, which is as good.
    fn check_start(&mut self) -> bool {
        let Some((first, prev)) = self.start else { return true };
        let from_the_beginning = first == 1 && prev == ChainHash::genesis(self.instance);
        let by_retention = self
            .signed_retention
            .is_some_and(|(kept, before)| first < kept || (first, prev) == (kept, before));
        if !from_the_beginning && !by_retention {
            let message = match first {
                1 => "record 1 is not the beginning of this instance's chain".to_owned(),
                _ => format!("the chain begins at record {first}, and no signed retention record says why"),
            };
            self.add(FindingKind::MissingStart, Some(first), message);
        }
        from_the_beginning || by_retention
    }

    fn add(&mut self, kind: FindingKind, sequence: Option<u64>, message: String) {
        let finding = self.finding(kind, sequence, message);
        self.report.add(finding);
    }

    fn finding(&self, kind: FindingKind, sequence: Option<u64>, message: String) -> Finding {
        Finding { file: self.file.clone(), line: self.line, sequence, kind, message }
    }
}
