//! The line format: what a record becomes, how a line is taken apart again, and the hash between them. No I/O.
//!
//! A line is read by position, not by JSON: hash, sequence, previous hash, time and instance stand where the writer
//! puts them or the line is not one of a log. Only the fields behind them are parsed as JSON, strictly.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, Write};
use std::str::FromStr;

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use ring::digest;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::ser::Formatter;

use super::checkpoint::Checkpoint;
use super::encode::{Batch, acts};
use super::{AuditError, Kind, Record};

/// The longest line that a reader takes into memory, in bytes without the newline. What the writer makes is shorter
/// by construction: see `encode`.
pub(super) const MAX_LINE: usize = 1 << 20;

/// What a line has around its fields in bytes, at most: hash, sequence, previous hash, time and instance.
pub(super) const FRAME: usize = 320;

const HEX: usize = 64;

/// A record's SHA-256 in the chain; shown, read and serialised as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChainHash([u8; 32]);

impl ChainHash {
    /// What stands before the first record. It binds the instance's name, so that a chain fits one folder only.
    pub(super) fn genesis(instance: &str) -> Self {
        Self::over(&[b"\x00claviger audit chain v1\n", instance.as_bytes()])
    }

    /// The hash of a line's body. The leading byte keeps it apart from [`genesis`](Self::genesis).
    pub(super) fn of_body(body: &[u8]) -> Self {
        Self::over(&[b"\x01", body])
    }

    pub(super) fn finish(context: digest::Context) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(context.finish().as_ref());
        Self(bytes)
    }

    fn over(parts: &[&[u8]]) -> Self {
        let mut context = digest::Context::new(&digest::SHA256);
        parts.iter().for_each(|part| context.update(part));
        Self::finish(context)
    }

    fn from_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        if text.len() != HEX {
            return None;
        }
        HEXLOWER.decode_mut(text.as_bytes(), &mut bytes).ok()?;
        Some(Self(bytes))
    }
}

impl fmt::Display for ChainHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HEXLOWER.encode_mut_str(&self.0, &mut [0; HEX]))
    }
}

impl fmt::Debug for ChainHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ChainHash {
    type Err = AuditError;

    fn from_str(text: &str) -> Result<Self, AuditError> {
        Self::from_hex(text).ok_or_else(|| {
            AuditError::Query("a record's hash is 64 lower-case hexadecimal digits".to_owned())
        })
    }
}

impl Serialize for ChainHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ChainHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Where a chain stands: the last record's sequence and hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) seq: u64,
    pub(super) hash: ChainHash,
}

impl Head {
    /// A chain without records.
    pub(super) fn genesis(instance: &str) -> Self {
        Self { seq: 0, hash: ChainHash::genesis(instance) }
    }
}

/// What the log writes about itself. The order of the fields is the order on the line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Notice {
    /// The log was opened by a broker of `version`, which found so many records behind the last checkpoint.
    Start { version: String, unsigned: u64 },
    /// The log was closed in good order.
    Shutdown {},
    /// A key signs where the chain stands, and that the stores had seen so many changes.
    Checkpoint(Checkpoint),
    /// So many bytes with this SHA-256 were cut off the end of `segment`.
    Repaired { segment: String, bytes: u64, sha256: ChainHash },
    /// `segment`, which ended with the record before this one, is no longer what was written; or it was the last when
    /// a start was told to accept a loss, which `problem` names.
    Lost { segment: String, problem: String },
    /// Everything before record `first` may be gone; `first_prev` is the hash of the record before it.
    Retention { first: u64, first_prev: ChainHash, removed: u64 },
}

/// A line's fields, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Entry {
    Record(Box<Record>),
    Notice(Notice),
}

impl Entry {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Record(record) => record.kind.unwrap_or(Kind::Access),
            Self::Notice(Notice::Start { .. }) => Kind::Start,
            Self::Notice(Notice::Shutdown {}) => Kind::Shutdown,
            Self::Notice(Notice::Checkpoint(_)) => Kind::Checkpoint,
            Self::Notice(Notice::Repaired { .. }) => Kind::Repaired,
            Self::Notice(Notice::Lost { .. }) => Kind::Lost,
            Self::Notice(Notice::Retention { .. }) => Kind::Retention,
        }
    }
}

/// A line's fields as the JSON object `{"kind":…}`, encoded before the line's place in the chain is known.
#[derive(Debug, Clone)]
pub(super) struct Fields(Vec<u8>);

impl Fields {
    pub(super) fn of_notice(notice: &Notice) -> Result<Self, AuditError> {
        Self::of(notice)
    }

    /// Anything that is written as such an object.
    pub(super) fn of(fields: &impl Serialize) -> Result<Self, AuditError> {
        let mut bytes = Vec::with_capacity(384);
        match fields.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, Quiet)) {
            Ok(()) => Ok(Self(bytes)),
            Err(error) => Err(AuditError::Record(format!("it can't be encoded: {error}"))),
        }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// A record's fields, where its kind is one that callers may write.
pub(super) fn encode(record: &Record) -> Result<Batch, AuditError> {
    let mut batch = Batch::with_capacity(1);
    encode_into(&mut batch, record)?;
    Ok(batch)
}

/// The same, behind others.
pub(super) fn encode_into(batch: &mut Batch, record: &Record) -> Result<(), AuditError> {
    match record.kind.unwrap_or(Kind::Access) {
        Kind::Access | Kind::Intent | Kind::Policy => {
            batch.push(&record.view());
            Ok(())
        }
        kind => Err(AuditError::Record(format!("kind {kind:?} is the log's own"))),
    }
}

/// Compact JSON that also escapes what JSON itself would let pass and a terminal or a viewer acts upon: DEL and the
/// C1 controls, line separators, and the marks that turn the direction of text.
struct Quiet;

impl Formatter for Quiet {
    fn write_string_fragment<W>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()>
    where
        W: ?Sized + Write,
    {
        if fragment.bytes().all(|byte| byte < 0x7f) {
            return writer.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            if acts(c) || c.is_control() {
                write!(writer, "\\u{:04x}", u32::from(c))?;
            } else {
                write!(writer, "{c}")?;
            }
        }
        Ok(())
    }
}

/// Lines of one instance under construction. Keeps its memory from one batch to the next.
#[derive(Debug)]
pub(super) struct Lines {
    instance: String,
    bytes: Vec<u8>,
    body: Vec<u8>,
}

impl Lines {
    /// `instance` is a [permitted name](super::segment::is_instance), so that it needs no escaping.
    pub(super) fn new(instance: &str) -> Self {
        Self { instance: instance.to_owned(), bytes: Vec::new(), body: Vec::new() }
    }

    /// Adds the line that follows `head` and returns the new head.
    pub(super) fn push(&mut self, head: Head, time: &str, fields: &[u8]) -> Head {
        let Self { instance, bytes, body } = self;
        let seq = head.seq + 1;
        body.clear();
        // Writing to memory can't fail.
        let _ =
            write!(body, r#""seq":{seq},"prev":"{}","time":"{time}","instance":"{instance}","#, head.hash);
        body.extend_from_slice(fields.strip_prefix(b"{").unwrap_or_default());
        let hash = ChainHash::of_body(body);
        let _ = write!(bytes, r#"{{"hash":"{hash}","#);
        bytes.append(body);
        bytes.push(b'\n');
        Head { seq, hash }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Forgets the lines; memory beyond what a usual batch needs is given back.
    pub(super) fn clear(&mut self) {
        const USUAL: usize = 4 << 20;
        self.bytes.clear();
        self.bytes.shrink_to(USUAL);
    }
}

/// A line taken apart by position; its fields are not looked at yet, nor is its hash checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame<'a> {
    pub(super) seq: u64,
    pub(super) prev: ChainHash,
    pub(super) hash: ChainHash,
    pub(super) time: &'a str,
    /// As it stands there, which may be anything but a `"`.
    pub(super) instance: &'a str,
    body: &'a str,
    fields: &'a str,
}

impl<'a> Frame<'a> {
    /// Takes apart a line without its newline; `None` where it is not one of this log.
    pub(super) fn parse(line: &'a [u8]) -> Option<Self> {
        let line = std::str::from_utf8(line).ok()?;
        let (hash, rest) = hash_behind(line, r#"{"hash":""#)?;
        let body = rest.strip_prefix(r#"","#)?;
        let (seq, rest) = body.strip_prefix(r#""seq":"#)?.split_once(',')?;
        let (prev, rest) = hash_behind(rest, r#""prev":""#)?;
        let (time, rest) = rest.strip_prefix(r#"","time":""#)?.split_once(r#"","#)?;
        let (instance, fields) = rest.strip_prefix(r#""instance":""#)?.split_once(r#"","#)?;
        let canonical = seq.bytes().all(|digit| digit.is_ascii_digit()) && !seq.starts_with('0');
        let seq = seq.parse().ok().filter(|_| canonical)?;
        Some(Self { seq, prev, hash, time, instance, body, fields })
    }

    /// Whether the line's bytes have the line's hash.
    pub(super) fn is_authentic(&self) -> bool {
        ChainHash::of_body(self.body.as_bytes()) == self.hash
    }

    /// Whether this is the record behind `head`.
    pub(super) fn follows(&self, head: Head) -> bool {
        head.seq.checked_add(1) == Some(self.seq) && self.prev == head.hash
    }

    /// What is wrong with the record where it is one of another instance than `instance`.
    pub(super) fn astray(&self, instance: &str) -> Option<String> {
        (self.instance != instance).then(|| {
            let other: String = self.instance.escape_debug().take(64).collect();
            format!("record {} is one of instance `{other}`", self.seq)
        })
    }

    /// Where the chain stands with this record.
    pub(super) fn head(&self) -> Head {
        Head { seq: self.seq, hash: self.hash }
    }

    pub(super) fn timestamp(&self) -> Option<Timestamp> {
        self.time.parse().ok()
    }

    /// Parses the fields; an unknown one is an error, which is said in one line without control characters.
    pub(super) fn entry(&self) -> Result<Entry, String> {
        self.timestamp().ok_or("its time is not one")?;
        let (kind, _) = self
            .fields
            .strip_prefix(r#""kind":""#)
            .and_then(|rest| rest.split_once('"'))
            .ok_or("its kind is not where it belongs")?;
        let object = format!("{{{}", self.fields);
        let entry = match kind {
            "access" | "intent" | "policy" => {
                serde_json::from_str(&object).map(|record| Entry::Record(Box::new(record)))
            }
            _ => serde_json::from_str(&object).map(Entry::Notice),
        };
        entry.map_err(|error| error.to_string().escape_debug().take(200).collect())
    }
}

fn hash_behind<'a>(text: &'a str, before: &str) -> Option<(ChainHash, &'a str)> {
    let (hash, rest) = text.strip_prefix(before)?.split_at_checked(HEX)?;
    Some((ChainHash::from_hex(hash)?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TIME: &str = "2026-01-02T03:04:05.000006Z";

    fn line(record: Record) -> String {
        let mut lines = Lines::new("a");
        lines.push(Head::genesis("a"), TIME, encode(&record).unwrap().iter().next().unwrap());
        String::from_utf8(lines.bytes().to_vec()).unwrap()
    }

    fn record_of(line: &str) -> Record {
        match Frame::parse(line.trim_end_matches('\n').as_bytes()).unwrap().entry().unwrap() {
            Entry::Record(record) => *record,
            Entry::Notice(notice) => panic!("{notice:?}"),
        }
    }

    #[test]
    fn a_line_is_as_it_is_drawn() {
        let line = line(Record { secret: "database".to_owned(), ..Record::default() });
        let (hash, body) = line.strip_prefix(r#"{"hash":""#).unwrap().split_once(r#"","#).unwrap();
        let genesis = ChainHash::genesis("a");
        assert_eq!(
            body,
            format!(
                r#""seq":1,"prev":"{genesis}","time":"{TIME}","instance":"a","kind":"access","secret":"database"}}"#
            ) + "\n"
        );
        let input = [b"\x01", body.trim_end().as_bytes()].concat();
        assert_eq!(hash, HEXLOWER.encode(digest::digest(&digest::SHA256, &input).as_ref()));
    }

    #[test]
    fn a_line_comes_back_and_lines_follow_each_other() {
        let mut lines = Lines::new("a");
        let fields = encode(&Record { action: "read".to_owned(), ..Record::default() }).unwrap();
        let first = lines.push(Head::genesis("a"), TIME, fields.iter().next().unwrap());
        let second = lines.push(first, TIME, Fields::of_notice(&Notice::Shutdown {}).unwrap().as_bytes());
        let text = std::str::from_utf8(lines.bytes()).unwrap();
        let frames: Vec<_> = text.lines().map(|line| Frame::parse(line.as_bytes()).unwrap()).collect();
        assert!(frames.iter().all(Frame::is_authentic));
        assert!(frames[0].follows(Head::genesis("a")) && !frames[0].follows(Head::genesis("b")));
        assert!(frames[1].follows(first));
        assert_eq!(frames[1].head(), second);
        assert_eq!(frames[1].astray("a"), None);
        assert_eq!(frames[1].astray("b").unwrap(), "record 2 is one of instance `a`");
        assert_eq!(frames[0].entry().unwrap().kind(), Kind::Access);
        assert_eq!(frames[1].entry().unwrap(), Entry::Notice(Notice::Shutdown {}));
    }

    #[test]
    fn every_notice_comes_back() {
        let hash = ChainHash::genesis("x");
        for notice in [
            Notice::Start { version: "0.1.0".to_owned(), unsigned: 3 },
            Notice::Shutdown {},
            Notice::Checkpoint(Checkpoint {
                head: hash,
                generation: u64::MAX,
                key: "k".to_owned(),
                signature: "s".to_owned(),
                handover: None,
            }),
            Notice::Repaired { segment: "1.jsonl".to_owned(), bytes: 4, sha256: hash },
            Notice::Lost { segment: "1.jsonl".to_owned(), problem: "deleted".to_owned() },
            Notice::Retention { first: 9, first_prev: hash, removed: 1 },
        ] {
            let mut lines = Lines::new("a");
            lines.push(Head::genesis("a"), TIME, Fields::of_notice(&notice).unwrap().as_bytes());
            let frame = Frame::parse(lines.bytes().strip_suffix(b"\n").unwrap()).unwrap();
            assert_eq!(frame.entry().unwrap(), Entry::Notice(notice));
        }
    }

    #[test]
    fn untrusted_text_stays_on_its_line() {
        let reason =
            "\n{\"hash\":\"forged\"}\r\u{0}\u{1b}[2J\u{85}\u{9b}2J\u{2028}\u{202e}\u{7f} é 鍵 🔑".to_owned();
        let line = line(Record { reason: reason.clone(), principal: "a\nb".to_owned(), ..Record::default() });
        assert_eq!(line.matches('\n').count(), 1, "{line}");
        assert!(
            !line.trim_end().contains(|c: char| c.is_control() || "\u{2028}\u{202e}".contains(c)),
            "{line}"
        );
        assert!(line.contains(r"\u001b[2J\u0085\u009b2J\u2028\u202e\u007f é 鍵 🔑"), "{line}");
        assert_eq!(record_of(&line).reason, reason);
    }

    #[test]
    fn overlong_text_is_cut_at_a_character_and_the_line_is_bounded() {
        let reason = record_of(&line(Record { reason: "é".repeat(400) + "x", ..Record::default() })).reason;
        assert_eq!(reason, "é".repeat(256));
        let reason =
            record_of(&line(Record { reason: "x".to_owned() + &"é".repeat(400), ..Record::default() }))
                .reason;
        assert_eq!(reason.len(), 511, "512 would split a character");
        let long = || "\u{1}".repeat(1 << 20);
        let many = || vec![long(); 100];
        let worst = Record {
            principal: long(),
            proof: long(),
            source_address: long(),
            action: long(),
            operation: long(),
            environment: long(),
            secret: long(),
            field: long(),
            version_id: long(),
            labels: many(),
            source: long(),
            decision: long(),
            policies: many(),
            error: long(),
            request_id: long(),
            reason: long(),
            detail: long(),
            ..Record::default()
        };
        assert!(line(worst).len() < MAX_LINE / 2);
    }

    #[test]
    fn the_logs_own_kinds_are_refused() {
        for kind in
            [Kind::Start, Kind::Shutdown, Kind::Checkpoint, Kind::Repaired, Kind::Lost, Kind::Retention]
        {
            let record = Record { kind: Some(kind), ..Record::default() };
            assert!(matches!(encode(&record), Err(AuditError::Record(_))), "{kind:?}");
        }
    }

    #[test]
    fn what_is_not_exactly_a_line_is_none() {
        let good = line(Record::default());
        let good = good.trim_end();
        let upper = format!(r#"{{"hash":"{}{}"#, good[9..73].to_uppercase(), &good[73..]);
        for bad in [
            "",
            "{}",
            &good.replace("\"seq\":1", "\"seq\":01"),
            &good.replace("\"seq\":1", "\"seq\":+1"),
            &good.replace("\"seq\":1", "\"seq\":0"),
            &good.replace("\"seq\":1", "\"seq\":99999999999999999999"),
            &good.replace("\"hash\"", " \"hash\""),
            &good.replace("\"instance\":\"a\",", ""),
            &good.replace("\"instance\":\"a\"", "\"instance\":5"),
            &format!(" {good}"),
            &upper,
        ] {
            assert!(Frame::parse(bad.as_bytes()).is_none(), "{bad}");
        }
        assert!(Frame::parse(&[0xff; 300]).is_none());
    }

    #[test]
    fn unknown_fields_kinds_and_times_are_errors() {
        let good = line(Record { secret: "database".to_owned(), ..Record::default() });
        let good = good.trim_end();
        for bad in [
            good.replace("\"secret\"", "\"value\""),
            good.replace("\"kind\":\"access\"", "\"kind\":\"checkpoint\""),
            good.replace("\"kind\":\"access\"", "\"kind\":\"party\""),
            good.replace("\"kind\":\"access\",", ""),
            good.replace(TIME, "yesterday"),
            good.replace("\"database\"", "5"),
            good.replace("}", ",\"x\\n\":1}"),
            format!("{good} {{}}"),
        ] {
            let frame = Frame::parse(bad.as_bytes()).unwrap();
            let problem = frame.entry().unwrap_err();
            assert!(!problem.contains('\n'), "{problem}");
            assert!(!frame.is_authentic());
        }
    }

    proptest! {
        #[test]
        fn any_record_comes_back(
            secret in ".{0,80}", detail in "\\PC{0,80}", chars in proptest::collection::vec(any::<char>(), 0..80),
            stale in any::<bool>(),
        ) {
            let record = Record {
                kind: Some(Kind::Intent),
                secret,
                detail,
                stale,
                labels: vec![chars.into_iter().collect::<String>().chars().take(60).collect()],
                ..Record::default()
            };
            let line = line(record.clone());
            prop_assert_eq!(line.matches('\n').count(), 1);
            prop_assert_eq!(record_of(&line), record);
        }

        #[test]
        fn any_bytes_are_taken_apart_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Some(frame) = Frame::parse(&bytes) {
                let _ = frame.entry();
            }
        }

        #[test]
        fn what_resembles_a_line_is_taken_apart_without_panic(seq in "[0-9+ ]{0,22}", rest in ".{0,60}") {
            let hash = ChainHash::genesis("a");
            let before = format!(r#"{{"hash":"{hash}","seq":{seq},"prev":"{hash}","time":"{TIME}""#);
            let text = format!(r#"{before},"instance":"a","kind":"{rest}"#);
            if let Some(frame) = Frame::parse(text.as_bytes()) {
                let _ = frame.entry();
            }
        }
    }
}
