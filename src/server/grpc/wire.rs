//! The reply to a read, encoded by hand: once, into memory of the right size that is wiped when the transport is done
//! with it. It is what `prost` would write of the same message. What the transport copies on its way to the socket, into
//! the buffer of HTTP/2 or of TLS, is overwritten by later replies and wiped by nobody.
//!
//! ```text
//! 0   1            5
//! ├ 0 ┼ length ────┼─ GetSecretResponse: 0a ‖ length ‖ Secret ──▶     one gRPC message, not compressed
//! ```

use bytes::Bytes;
use prost::Message as _;
use zeroize::Zeroizing;

use super::convert::{duration, timestamp};
use crate::broker::Disclosed;
use crate::proto::v1;
use crate::secret::{ContentType, Label};
use crate::store::Source;

/// What is in front of a message (gRPC over HTTP/2, "Length-Prefixed-Message").
pub(super) const PREFIX: usize = 5;

/// A reply's one message, with its prefix.
pub(super) fn reply(disclosed: &Disclosed) -> Bytes {
    let (created_at, age) = (timestamp(disclosed.version.created_at), duration(disclosed.age));
    let (created_at_length, age_length) = (created_at.encoded_len(), age.encoded_len());
    let payload = disclosed.value.as_ref().map(|value| {
        let kind = match value.content_type() {
            ContentType::Text => v1::ContentType::Text,
            ContentType::Binary => v1::ContentType::Binary,
        };
        (value.expose(), i32::from(kind).unsigned_abs())
    });
    let payload_length = payload
        .map(|(data, kind)| bytes_length(data) + if kind == 0 { 0 } else { 1 + varint_length(kind.into()) });
    let source = match disclosed.source {
        Source::Store => v1::Source::Store,
        Source::Cache => v1::Source::Cache,
    };
    let source = i32::from(source).unsigned_abs();
    let labels = || disclosed.version.labels.iter().map(Label::as_str);
    let texts = [
        (1, disclosed.id.environment.as_str()),
        (2, disclosed.id.name.as_str()),
        (3, disclosed.field.as_ref().map_or("", |field| field.as_str())),
        (4, disclosed.version.id.as_str()),
    ];
    let secret_length = texts.iter().map(|(_, text)| bytes_length(text.as_bytes())).sum::<usize>()
        + labels().map(|label| 1 + varint_length(wide(label.len())) + label.len()).sum::<usize>()
        + nested_length(created_at_length)
        + payload_length.map_or(2, nested_length)
        + nested_length(age_length)
        + 1
        + varint_length(source.into())
        + if disclosed.stale { 2 } else { 0 };
    let message_length = nested_length(secret_length);
    // Of the right size from the start: memory that grows leaves a copy behind that nobody wipes.
    let mut to = Out(Zeroizing::new(Vec::with_capacity(PREFIX + message_length)));
    to.0.push(0);
    to.0.extend_from_slice(&u32::try_from(message_length).unwrap_or(u32::MAX).to_be_bytes());
    to.head(1, secret_length);
    for (tag, text) in texts {
        to.bytes(tag, text.as_bytes());
    }
    for label in labels() {
        to.head(5, label.len());
        to.0.extend_from_slice(label.as_bytes());
    }
    to.message(6, created_at_length, &created_at);
    match (payload, payload_length) {
        (Some((data, kind)), Some(length)) => {
            to.head(7, length);
            to.bytes(1, data);
            to.number(2, kind);
        }
        _ => to.number(8, 1),
    }
    to.message(9, age_length, &age);
    to.number(10, source);
    to.number(11, u32::from(disclosed.stale));
    Bytes::from_owner(Outgoing(to.0))
}

/// A reply on its way out.
struct Outgoing(Zeroizing<Vec<u8>>);

impl AsRef<[u8]> for Outgoing {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Protocol Buffers' wire format ("Encoding", protobuf.dev): members with the default value are left out.
struct Out(Zeroizing<Vec<u8>>);

impl Out {
    /// The key of a length-delimited member, and its length.
    fn head(&mut self, tag: u8, length: usize) {
        self.0.push(tag << 3 | 2);
        self.varint(wide(length));
    }

    fn bytes(&mut self, tag: u8, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.head(tag, bytes.len());
            self.0.extend_from_slice(bytes);
        }
    }

    fn message(&mut self, tag: u8, length: usize, message: &impl prost::Message) {
        self.head(tag, length);
        message.encode_raw(&mut *self.0);
    }

    fn number(&mut self, tag: u8, number: u32) {
        if number != 0 {
            self.0.push(tag << 3);
            self.varint(number.into());
        }
    }

    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number.to_le_bytes()[0] | 0x80);
            number >>= 7;
        }
        self.0.push(number.to_le_bytes()[0]);
    }
}

fn bytes_length(bytes: &[u8]) -> usize {
    if bytes.is_empty() { 0 } else { nested_length(bytes.len()) }
}

/// Of a length-delimited member with its key, which is one byte for all of them.
const fn nested_length(length: usize) -> usize {
    1 + varint_length(length as u64) + length
}

const fn varint_length(number: u64) -> usize {
    let bits = 64 - (number | 1).leading_zeros() as usize;
    bits.div_ceil(7)
}

fn wide(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::convert;
    use super::*;
    use crate::secret::{FieldName, SecretId, SecretValue, Version, VersionId};
    use jiff::Timestamp;
    use proptest::prelude::*;
    use std::time::Duration;

    fn values() -> impl Strategy<Value = Option<SecretValue>> {
        prop_oneof![
            Just(None),
            ".{0,300}".prop_map(|text| Some(SecretValue::text(text).unwrap())),
            proptest::collection::vec(any::<u8>(), 0..40_000)
                .prop_map(|bytes| Some(SecretValue::binary(bytes).unwrap())),
        ]
    }

    proptest! {
        #[test]
        fn it_is_what_the_library_would_write(
            value in values(),
            name in "[a-z]{1,300}",
            field in proptest::option::of("[a-z]{1,20}"),
            labels in proptest::sample::subsequence(vec!["AWSCURRENT", "AWSPENDING", "AWSPREVIOUS", "mine"], 0..4),
            (seconds, nanos) in (-1_000_i64..4_000_000_000, 0_i32..1_000_000_000),
            age in 0_u64..u64::MAX / 4,
            (stale, cached) in (any::<bool>(), any::<bool>()),
        ) {
            let disclosed = Disclosed {
                id: SecretId::parse("production", &name).unwrap(),
                field: field.map(|field| FieldName::parse(&field).unwrap()),
                version: Version {
                    id: VersionId::generate(),
                    labels: labels.into_iter().map(|label| Label::parse(label).unwrap()).collect(),
                    created_at: Timestamp::new(seconds, nanos.max(0) * i32::from(seconds >= 0)).unwrap(),
                },
                value,
                source: if cached { Source::Cache } else { Source::Store },
                age: Duration::from_nanos(age),
                stale,
            };
            let by_hand = reply(&disclosed);
            let message = v1::GetSecretResponse { secret: Some(convert::secret(disclosed)) }.encode_to_vec();
            let (prefix, body) = by_hand.split_at(PREFIX);
            prop_assert_eq!(prefix, [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes()].concat());
            prop_assert_eq!(body, message);
        }
    }
}
