//! One secret as it is stored: everything but the values.
//!
//! ```text
//! offset  bytes
//!      0     32  MAC of environment, name and the JSON
//!     32      …  JSON: {"generation":7,"created_at":"…","changed_at":"…","deletion_at":"…",
//!                       "labels":{"AWSCURRENT":"<version id>",…},
//!                       "versions":[{"id":"…","content_type":"text","created_at":"…","tag":"…"},…]}
//! ```
//!
//! The versions stand oldest first.
//!
//! The generation is that of the environment's root whose transaction wrote the record, so it never repeats in an
//! environment, not even where a name is used again.

use data_encoding::BASE64_NOPAD;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::crypto::{Mac, MacKey};
use crate::secret::{ContentType, Labels, SecretId, Version, VersionId};

const LABEL: &[u8] = b"claviger secret record v1";

/// A secret: its versions, labels and times.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SecretRecord {
    pub(super) generation: u64,
    pub(super) created_at: Timestamp,
    pub(super) changed_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) deletion_at: Option<Timestamp>,
    pub(super) labels: Labels,
    /// Oldest first.
    pub(super) versions: Vec<VersionRecord>,
}

/// A version without its value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VersionRecord {
    pub(super) id: VersionId,
    #[serde(with = "content_type")]
    pub(super) content_type: ContentType,
    pub(super) created_at: Timestamp,
    /// Of the value; the default until that is sealed.
    pub(super) tag: ValueTag,
}

/// The authentication tag of a value's ciphertext: what the sealed value ends with (crypto/envelope.rs).
///
/// Sealing the same value again gives another tag, so a record fits the bytes that were sealed with it and none that
/// an earlier version of the same id left behind. Wrapping the data key anew leaves the tag alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct ValueTag([u8; 16]);

impl ValueTag {
    /// The tag of a sealed value; `None` where the bytes are too few to be one.
    pub(super) fn of(sealed: &[u8]) -> Option<Self> {
        sealed.last_chunk::<16>().copied().map(Self)
    }
}

impl From<ValueTag> for String {
    fn from(tag: ValueTag) -> Self {
        BASE64_NOPAD.encode(&tag.0)
    }
}

impl TryFrom<String> for ValueTag {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let bytes = BASE64_NOPAD.decode(text.as_bytes()).unwrap_or_default();
        <[u8; 16]>::try_from(bytes).map(Self).map_err(|_| "a value's tag is 16 bytes in base64")
    }
}

/// Why stored bytes are no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RecordError {
    /// Changed, or another secret's.
    Tampered,
    /// Authentic, but of a format that this version does not know.
    Newer,
}

impl SecretRecord {
    /// A secret of which nothing is written yet.
    pub(super) fn new(now: Timestamp) -> Self {
        Self {
            generation: 0,
            created_at: now,
            changed_at: now,
            deletion_at: None,
            labels: Labels::default(),
            versions: Vec::new(),
        }
    }

    /// The bytes to store for `id`, with their MAC.
    pub(super) fn encode(&self, key: &MacKey, id: &SecretId) -> Result<(Vec<u8>, Mac), serde_json::Error> {
        let json = serde_json::to_vec(self)?;
        let mac = key.sign(&parts(id, &json));
        Ok(([mac.as_slice(), &json].concat(), mac))
    }

    /// The record that was stored for `id`, with its MAC.
    pub(super) fn decode(key: &MacKey, id: &SecretId, stored: &[u8]) -> Result<(Self, Mac), RecordError> {
        let (mac, json) = authenticate(key, id, stored).ok_or(RecordError::Tampered)?;
        let record = serde_json::from_slice(json).map_err(|_| RecordError::Newer)?;
        Ok((record, mac))
    }

    /// Whether the recovery window is over: nobody may see the secret any more.
    pub(super) fn is_gone(&self, now: Timestamp) -> bool {
        self.deletion_at.is_some_and(|at| at <= now)
    }

    /// What is kept of a version.
    pub(super) fn version(&self, id: &VersionId) -> Option<&VersionRecord> {
        self.versions.iter().find(|version| version.id == *id)
    }

    /// A version as it is told.
    pub(super) fn shown(&self, version: &VersionRecord) -> Version {
        Version {
            id: version.id.clone(),
            labels: self.labels.of(&version.id),
            created_at: version.created_at,
        }
    }
}

/// The MAC and the JSON of what was stored for `id`; `None` where it is not authentic.
pub(super) fn authenticate<'a>(key: &MacKey, id: &SecretId, stored: &'a [u8]) -> Option<(Mac, &'a [u8])> {
    let (mac, json) = stored.split_first_chunk()?;
    key.verify(&parts(id, json), mac).then_some((*mac, json))
}

fn parts<'a>(id: &'a SecretId, json: &'a [u8]) -> [&'a [u8]; 4] {
    [LABEL, id.environment.as_str().as_bytes(), id.name.as_str().as_bytes(), json]
}

mod content_type {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::secret::ContentType;

    pub(super) fn serialize<S: Serializer>(
        content_type: &ContentType,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(content_type.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ContentType, D::Error> {
        let text = String::deserialize(deserializer)?;
        [ContentType::Text, ContentType::Binary]
            .into_iter()
            .find(|content_type| content_type.as_str() == text)
            .ok_or_else(|| D::Error::custom("unknown content type"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::RootKey;
    use crate::secret::Label;
    use std::time::Duration;

    fn key() -> MacKey {
        let root = RootKey::from_bytes(&[1; 32]).unwrap();
        MacKey::create(&root, &[b"test"]).unwrap().0
    }

    fn id(environment: &str, name: &str) -> SecretId {
        SecretId::parse(environment, name).unwrap()
    }

    fn record() -> SecretRecord {
        let now: Timestamp = "2026-03-01T12:00:00.123456789Z".parse().unwrap();
        let version = VersionId::parse(&"1".repeat(32)).unwrap();
        let labels =
            Labels::default().put(&version, &[Label::Current, Label::parse("stable").unwrap()]).unwrap();
        let tag = ValueTag([0xab; 16]);
        SecretRecord {
            generation: 7,
            deletion_at: Some(now),
            labels,
            versions: vec![VersionRecord {
                id: version,
                content_type: ContentType::Binary,
                created_at: now,
                tag,
            }],
            ..SecretRecord::new(now)
        }
    }

    #[test]
    fn what_is_stored_is_read_back_at_its_place_alone() {
        let key = key();
        let (stored, mac) = record().encode(&key, &id("a", "b/c")).unwrap();
        assert_eq!(SecretRecord::decode(&key, &id("a", "b/c"), &stored), Ok((record(), mac)));
        for other in [id("a", "b"), id("b", "b/c"), id("ab", "c")] {
            assert_eq!(SecretRecord::decode(&key, &other, &stored), Err(RecordError::Tampered), "{other}");
        }
    }

    #[test]
    fn every_byte_counts() {
        let key = key();
        let (stored, _) = record().encode(&key, &id("a", "b")).unwrap();
        for position in 0..stored.len() {
            let mut changed = stored.clone();
            changed[position] ^= 1;
            assert_eq!(SecretRecord::decode(&key, &id("a", "b"), &changed), Err(RecordError::Tampered));
            assert!(SecretRecord::decode(&key, &id("a", "b"), &stored[..position]).is_err());
        }
    }

    #[test]
    fn an_authentic_record_of_another_format_is_told_from_a_changed_one() {
        let key = key();
        let json = br#"{"generation":7,"shape":"new"}"#;
        let mac = key.sign(&parts(&id("a", "b"), json));
        let stored = [mac.as_slice(), json].concat();
        assert_eq!(SecretRecord::decode(&key, &id("a", "b"), &stored), Err(RecordError::Newer));
    }

    /// Whoever changes the JSON finds out here that stored records could no longer be read.
    #[test]
    fn the_json_is_pinned() {
        let (stored, _) = record().encode(&key(), &id("a", "b")).unwrap();
        let version = "1".repeat(32);
        let time = "2026-03-01T12:00:00.123456789Z";
        let expected = format!(
            "{{\"generation\":7,\"created_at\":\"{time}\",\"changed_at\":\"{time}\",\"deletion_at\":\"{time}\",\
             \"labels\":{{\"AWSCURRENT\":\"{version}\",\"stable\":\"{version}\"}},\
             \"versions\":[{{\"id\":\"{version}\",\"content_type\":\"binary\",\"created_at\":\"{time}\",\
             \"tag\":\"q6urq6urq6urq6urq6urqw\"}}]}}"
        );
        assert_eq!(String::from_utf8(stored[32..].to_vec()).unwrap(), expected);
    }

    #[test]
    fn a_tag_is_the_last_16_bytes_and_survives_its_text() {
        let sealed: Vec<u8> = (0..40).collect();
        let tag = ValueTag::of(&sealed).unwrap();
        assert_eq!(Some(tag), ValueTag::of(&sealed[24..]));
        assert_ne!(Some(tag), ValueTag::of(&sealed[..39]));
        assert_eq!(ValueTag::of(&sealed[25..]), None);
        assert_eq!(ValueTag::try_from(String::from(tag)), Ok(tag));
        for text in ["", "q6urq6urq6urq6urq6ur", "q6urq6urq6urq6urq6urqw==", "q6urq6urq6urq6urq6urq6ur", "!"]
        {
            assert!(ValueTag::try_from(text.to_owned()).is_err(), "{text}");
        }
    }

    #[test]
    fn gone_is_when_the_window_is_over() {
        let record = record();
        let at = record.deletion_at.unwrap();
        assert!(record.is_gone(at));
        assert!(!record.is_gone(at - Duration::from_nanos(1)));
        assert!(!SecretRecord::new(at).is_gone(at));
    }
}
