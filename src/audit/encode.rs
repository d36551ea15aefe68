//! A record's members as a JSON object, written by hand where the record is made: once, from borrowed text, into memory
//! that the writer chains from. It is what `serde_json` would write of a [`Record`](super::Record), quietly.

use std::sync::Arc;

use super::{Kind, Outcome};
use crate::secret::Label;

const MAX_TEXT: usize = 1_024;
const MAX_REASON: usize = 512;
const MAX_ITEMS: usize = 64;
const MAX_ITEM: usize = 256;

/// What a usual record takes, in bytes.
const USUAL: usize = 512;

/// A record as it is written, borrowed from whatever knows it: the hot path makes no [`Record`](super::Record). The
/// members mean what they mean there.
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs, reason = "the members of `Record`, by the same names")]
pub struct View<'a> {
    pub kind: Option<Kind>,
    pub principal: &'a str,
    pub proof: &'a str,
    pub source_address: &'a str,
    pub action: &'a str,
    pub operation: &'a str,
    pub environment: &'a str,
    pub secret: &'a str,
    pub field: &'a str,
    pub version_id: &'a str,
    pub labels: Texts<'a>,
    pub source: &'a str,
    pub stale: bool,
    pub decision: &'a str,
    pub policies: Texts<'a>,
    pub outcome: Option<Outcome>,
    pub error: &'a str,
    pub request_id: &'a str,
    pub reason: &'a str,
    pub detail: &'a str,
}

/// A list of texts, however its owner keeps it.
#[derive(Debug, Clone, Copy, Default)]
pub enum Texts<'a> {
    /// None.
    #[default]
    None,
    /// Texts of their own.
    Owned(&'a [String]),
    /// Shared ones.
    Shared(&'a [Arc<str>]),
    /// Labels.
    Labels(&'a [Label]),
}

impl<'a> Texts<'a> {
    fn get(self, index: usize) -> Option<&'a str> {
        match self {
            Self::None => None,
            Self::Owned(texts) => texts.get(index).map(String::as_str),
            Self::Shared(texts) => texts.get(index).map(|text| &**text),
            Self::Labels(labels) => labels.get(index).map(Label::as_str),
        }
    }
}

/// Records on their way to the log, encoded one behind the other: they are written together, or none of them is.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Batch {
    /// An empty one, with memory for so many usual records.
    #[must_use]
    pub fn with_capacity(records: usize) -> Self {
        Self { bytes: Vec::with_capacity(records.saturating_mul(USUAL)), ends: Vec::with_capacity(records) }
    }

    /// Encodes a record, its texts cut to their bounds. One without a kind is an access.
    pub fn push(&mut self, view: &View<'_>) {
        encode(&mut self.bytes, view);
        self.ends.push(self.bytes.len());
    }

    /// How many records there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub(super) const fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Each record's object.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.ends.iter().scan(0, |begin, end| {
            let object = self.bytes.get(*begin..*end).unwrap_or_default();
            *begin = *end;
            Some(object)
        })
    }
}

/// Writes what a stranger may have had a hand in, cut. A JSON string is at most six times its text, so that a line stays
/// below 6 × (14 × 1,024 + 512 + 2 × 64 × 256) bytes and a few hundred more, a third of what a reader takes.
fn encode(bytes: &mut Vec<u8>, view: &View<'_>) {
    let View {
        kind,
        principal,
        proof,
        source_address,
        action,
        operation,
        environment,
        secret,
        field,
        version_id,
        labels,
        source,
        stale,
        decision,
        policies,
        outcome,
        error,
        request_id,
        reason,
        detail,
    } = *view;
    bytes.extend_from_slice(br#"{"kind":""#);
    bytes.extend_from_slice(kind.unwrap_or(Kind::Access).as_str().as_bytes());
    bytes.push(b'"');
    let mut text = |key: &str, value: &str| member(bytes, key, value, MAX_TEXT);
    text(r#","principal":""#, principal);
    text(r#","proof":""#, proof);
    text(r#","source_address":""#, source_address);
    text(r#","action":""#, action);
    text(r#","operation":""#, operation);
    text(r#","environment":""#, environment);
    text(r#","secret":""#, secret);
    text(r#","field":""#, field);
    text(r#","version_id":""#, version_id);
    list(bytes, r#","labels":["#, labels);
    member(bytes, r#","source":""#, source, MAX_TEXT);
    if stale {
        bytes.extend_from_slice(br#","stale":true"#);
    }
    member(bytes, r#","decision":""#, decision, MAX_TEXT);
    list(bytes, r#","policies":["#, policies);
    member(bytes, r#","outcome":""#, outcome.map_or("", Outcome::as_str), MAX_TEXT);
    member(bytes, r#","error":""#, error, MAX_TEXT);
    member(bytes, r#","request_id":""#, request_id, MAX_TEXT);
    member(bytes, r#","reason":""#, reason, MAX_REASON);
    member(bytes, r#","detail":""#, detail, MAX_TEXT);
    bytes.push(b'}');
}

/// A text member with its key up to the opening quote; an empty one is left out.
fn member(bytes: &mut Vec<u8>, key: &str, value: &str, most: usize) {
    if !value.is_empty() {
        bytes.extend_from_slice(key.as_bytes());
        quiet(bytes, cut(value, most));
        bytes.push(b'"');
    }
}

fn list(bytes: &mut Vec<u8>, key: &str, texts: Texts<'_>) {
    let items = (0..MAX_ITEMS).map_while(|index| texts.get(index));
    let mut before = key;
    for item in items {
        bytes.extend_from_slice(before.as_bytes());
        bytes.push(b'"');
        quiet(bytes, cut(item, MAX_ITEM));
        bytes.push(b'"');
        before = ",";
    }
    if before == "," {
        bytes.push(b']');
    }
}

fn cut(text: &str, most: usize) -> &str {
    if text.len() <= most { text } else { text.split_at(text.floor_char_boundary(most)).0 }
}

/// A string's content as JSON, in which what JSON would let pass and a terminal or a viewer acts upon is escaped too: DEL
/// and the C1 controls, line separators, and the marks that turn the direction of text.
pub(super) fn quiet(bytes: &mut Vec<u8>, text: &str) {
    let plain = |byte: u8| (0x20..0x7f).contains(&byte) && byte != b'"' && byte != b'\\';
    if text.bytes().all(plain) {
        bytes.extend_from_slice(text.as_bytes());
        return;
    }
    for c in text.chars() {
        match c {
            '"' => bytes.extend_from_slice(br#"\""#),
            '\\' => bytes.extend_from_slice(br"\\"),
            '\u{8}' => bytes.extend_from_slice(br"\b"),
            '\t' => bytes.extend_from_slice(br"\t"),
            '\n' => bytes.extend_from_slice(br"\n"),
            '\u{c}' => bytes.extend_from_slice(br"\f"),
            '\r' => bytes.extend_from_slice(br"\r"),
            c if c.is_control() || acts(c) => {
                bytes.extend_from_slice(format!("\\u{:04x}", u32::from(c)).as_bytes());
            }
            c => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

/// Whether a character is not one to be seen.
pub(super) const fn acts(c: char) -> bool {
    matches!(c, '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::{Fields, Record};
    use proptest::prelude::*;

    fn kinds() -> impl Strategy<Value = Option<Kind>> {
        prop_oneof![Just(Kind::Access), Just(Kind::Intent), Just(Kind::Policy)].prop_map(Some)
    }

    fn outcomes() -> impl Strategy<Value = Option<Outcome>> {
        let all = [
            None,
            Some(Outcome::Ok),
            Some(Outcome::Unchanged),
            Some(Outcome::Denied),
            Some(Outcome::Unauthenticated),
            Some(Outcome::NotFound),
            Some(Outcome::Failed),
        ];
        proptest::sample::select(all.to_vec())
    }

    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            4 => "[ -~]{0,40}",
            1 => proptest::collection::vec(any::<char>(), 0..40).prop_map(|chars| chars.into_iter().collect()),
        ]
    }

    proptest! {
        /// Also what a record's own `Serialize` says, so that neither loses a member that the other has.
        #[test]
        fn what_is_written_by_hand_is_what_the_record_is(
            texts in proptest::collection::vec(text(), 15),
            labels in proptest::collection::vec(text(), 0..4),
            policies in proptest::collection::vec(text(), 0..4),
            (kind, outcome, stale) in (kinds(), outcomes(), any::<bool>()),
        ) {
            let mut texts = texts.into_iter();
            let mut next = || texts.next().unwrap();
            let record = Record {
                kind,
                principal: next(),
                proof: next(),
                source_address: next(),
                action: next(),
                operation: next(),
                environment: next(),
                secret: next(),
                field: next(),
                version_id: next(),
                labels,
                source: next(),
                stale,
                decision: next(),
                policies,
                outcome,
                error: next(),
                request_id: next(),
                reason: next(),
                detail: next(),
            };
            let mut batch = Batch::default();
            batch.push(&record.view());
            let by_hand = batch.iter().next().unwrap().to_vec();
            prop_assert_eq!(
                String::from_utf8(by_hand.clone()).unwrap(),
                String::from_utf8(Fields::of(&record).unwrap().as_bytes().to_vec()).unwrap()
            );
            prop_assert_eq!(serde_json::from_slice::<Record>(&by_hand).unwrap(), record);
        }
    }

    #[test]
    fn records_stand_one_behind_the_other() {
        let mut batch = Batch::with_capacity(2);
        batch.push(&View { secret: "a", ..View::default() });
        batch.push(&View { kind: Some(Kind::Intent), ..View::default() });
        let objects: Vec<_> = batch.iter().map(|object| std::str::from_utf8(object).unwrap()).collect();
        assert_eq!(objects, [r#"{"kind":"access","secret":"a"}"#, r#"{"kind":"intent"}"#]);
        assert_eq!((batch.len(), batch.bytes()), (2, objects[0].len() + objects[1].len()));
    }
}
