//! Checkpoints: an Ed25519 signature over where a chain stands, and the keys that make and check it.
//!
//! What is signed is text, a line per part, in the manner of a signed note (C2SP `tlog-checkpoint`), so that it can be
//! checked with nothing but the log and an Ed25519 tool:
//!
//! ```text
//! claviger audit checkpoint v1                                  claviger audit handover v1
//! <instance>                                                    <instance>
//! <sequence of the record before>                               <sequence of the record before>
//! <hash of the record before, 64 hex digits>                    <hash of the record before, 64 hex digits>
//! <generation>                                                  <generation>
//! <time of the checkpoint's own line, as it stands there>       <time of the checkpoint's own line>
//!                                                               key <the key that signs for the last time, 64 hex digits>
//!                                                               next <the key that signs from here on, 64 hex digits>
//! ```
//!
//! No part can hold a newline, so that no two statements read alike. A handover is signed by both keys: by the one in
//! force, or anyone could name a successor, and by the next, or the one in force could name a key that nobody holds. Its
//! line is complete: whether both signatures fit can be told without any other key, and whoever trusts one of the two
//! may trust the other, the next from there on, the former up to there.

use std::borrow::Cow;
use std::fmt;

use data_encoding::{BASE64, HEXLOWER, HEXLOWER_PERMISSIVE};
use ring::digest;
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

use super::AuditError;
use super::chain::{ChainHash, Frame, Head};

/// What a checkpoint vouches for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Statement<'a> {
    pub(super) instance: &'a str,
    /// The record before the checkpoint.
    pub(super) head: Head,
    /// See [`Settings::generation`](super::Settings::generation).
    pub(super) generation: u64,
    pub(super) time: &'a str,
}

/// From which key to which one the log is handed over.
type Heirs = (VerifyingKey, VerifyingKey);

impl Statement<'_> {
    /// What is signed.
    fn text(&self, heirs: Option<Heirs>) -> String {
        let Self { instance, head, generation, time } = self;
        let (title, heirs) = match heirs {
            None => ("checkpoint", String::new()),
            Some((key, next)) => ("handover", format!("key {key}\nnext {next}\n")),
        };
        format!(
            "claviger audit {title} v1\n{instance}\n{}\n{}\n{generation}\n{time}\n{heirs}",
            head.seq, head.hash
        )
    }
}

/// What a checkpoint's line says. The order of the fields is the order on the line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Checkpoint {
    /// The hash of the record before.
    pub(super) head: ChainHash,
    /// How many changes the stores had seen.
    pub(super) generation: u64,
    /// The id of the key that signs.
    pub(super) key: String,
    pub(super) signature: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) handover: Option<Handover>,
}

/// How a checkpoint hands the log over to another key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Handover {
    /// The key that signs, for the last time.
    pub(super) key: VerifyingKey,
    /// The key that signs from here on.
    pub(super) next_key: VerifyingKey,
    /// The next key's signature over what `key` signs as well.
    pub(super) next_signature: String,
}

impl Checkpoint {
    /// Signs a statement with `key`, and hands over to `next` where there is one.
    pub(super) fn new(statement: &Statement<'_>, key: &SigningKey, next: Option<&SigningKey>) -> Self {
        let text = statement.text(next.map(|next| (key.public, next.public)));
        let handover = next.map(|next| Handover {
            key: key.public,
            next_key: next.public,
            next_signature: next.sign(&text),
        });
        Self {
            head: statement.head.hash,
            generation: statement.generation,
            key: key.id.clone(),
            signature: key.sign(&text),
            handover,
        }
    }

    /// Whether `signer` signed that the chain stood where the line stands; where it hands over, whether the next key
    /// signed that too.
    pub(super) fn fits(&self, instance: &str, line: &Frame<'_>, signer: &VerifyingKey) -> bool {
        let head = Head { seq: line.seq.saturating_sub(1), hash: line.prev };
        let statement = Statement { instance, head, generation: self.generation, time: line.time };
        let text = statement.text(self.handover.as_ref().map(|handover| (handover.key, handover.next_key)));
        self.head == line.prev
            && self.key == signer.id()
            && signer.admits(&text, &self.signature)
            && self.handover.as_ref().is_none_or(|handover| handover.fits(&text, signer))
    }
}

impl Handover {
    fn fits(&self, text: &str, signer: &VerifyingKey) -> bool {
        self.key == *signer && self.next_key != *signer && self.next_key.admits(text, &self.next_signature)
    }
}

/// The private half of the audit key. Neither printed nor serialised. `ring` keeps it in memory that it doesn't wipe.
pub struct SigningKey {
    pair: Ed25519KeyPair,
    public: VerifyingKey,
    id: String,
}

impl SigningKey {
    /// A fresh key as a PKCS#8 version 1 document (RFC 8410, section 7), the form that OpenSSL writes too.
    ///
    /// # Errors
    /// [`AuditError::Key`] where the system gives no random bytes.
    pub fn generate_pkcs8() -> Result<Zeroizing<Vec<u8>>, AuditError> {
        // SEQUENCE { version 0, AlgorithmIdentifier { 1.3.101.112 }, OCTET STRING { OCTET STRING { seed } } }. Written
        // here because ring's own document is not wiped.
        const BEFORE_SEED: [u8; 16] =
            [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
        let mut document = Zeroizing::new(vec![0; BEFORE_SEED.len() + 32]);
        let (before, seed) = document.split_at_mut(BEFORE_SEED.len());
        before.copy_from_slice(&BEFORE_SEED);
        SystemRandom::new().fill(seed).map_err(|_| refused("the system gives no random bytes; try again"))?;
        Ok(document)
    }

    /// Reads a PKCS#8 document, version 1 or 2, in DER.
    ///
    /// # Errors
    /// [`AuditError::Key`] where it is anything else; the message holds nothing of it.
    pub fn from_pkcs8(document: &[u8]) -> Result<Self, AuditError> {
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(document).map_err(|error| {
            refused(format!(
                "not an unencrypted Ed25519 private key in PKCS#8 DER ({error}); put back the key that this log was signed with"
            ))
        })?;
        let public = VerifyingKey::from_bytes(pair.public_key().as_ref())?;
        Ok(Self { pair, public, id: public.id() })
    }

    /// The public half.
    #[must_use]
    pub const fn verifying_key(&self) -> VerifyingKey {
        self.public
    }

    /// The key's id: see [`VerifyingKey::id`].
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The signature over `text` in Base64.
    fn sign(&self, text: &str) -> String {
        BASE64.encode(self.pair.sign(text.as_bytes()).as_ref())
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The public half of an audit key; shown as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VerifyingKey([u8; 32]);

impl VerifyingKey {
    /// Takes the 32 bytes of an Ed25519 public key.
    ///
    /// # Errors
    /// [`AuditError::Key`] for another number of bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, AuditError> {
        <[u8; 32]>::try_from(bytes).map(Self).map_err(|_| {
            refused(format!(
                "{} bytes are no Ed25519 public key; it is 32 bytes or 64 hexadecimal digits",
                bytes.len()
            ))
        })
    }

    /// Reads 64 hexadecimal digits, with or without white space around them.
    ///
    /// # Errors
    /// [`AuditError::Key`].
    pub fn parse(text: &str) -> Result<Self, AuditError> {
        let bytes = HEXLOWER_PERMISSIVE.decode(text.trim().as_bytes()).map_err(|_| {
            refused("the public key is not hexadecimal; it is 32 bytes or 64 hexadecimal digits")
        })?;
        Self::from_bytes(&bytes)
    }

    /// Reads several, one on each line, as `audit.pub` holds them; empty lines don't count.
    ///
    /// # Errors
    /// [`AuditError::Key`]; also where there is none.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, AuditError> {
        let lines = text.lines().filter(|line| !line.trim().is_empty());
        let keys = lines.map(Self::parse).collect::<Result<Vec<_>, _>>()?;
        if keys.is_empty() {
            return Err(refused("it holds no public key; it is 64 hexadecimal digits on each line"));
        }
        Ok(keys)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 lower-case hexadecimal digits.
    #[must_use]
    pub fn to_hex(&self) -> String {
        HEXLOWER.encode(&self.0)
    }

    /// What a checkpoint calls the key: the first 8 bytes of its SHA-256, as 16 hexadecimal digits.
    #[must_use]
    pub fn id(&self) -> String {
        let mut id = HEXLOWER.encode(digest::digest(&digest::SHA256, &self.0).as_ref());
        id.truncate(16);
        id
    }

    /// Whether `signature`, in Base64, is this key's over `text`.
    fn admits(&self, text: &str, signature: &str) -> bool {
        BASE64.decode(signature.as_bytes()).is_ok_and(|signature| {
            UnparsedPublicKey::new(&ED25519, &self.0).verify(text.as_bytes(), &signature).is_ok()
        })
    }
}

impl fmt::Display for VerifyingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_hex())
    }
}

impl fmt::Debug for VerifyingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for VerifyingKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for VerifyingKey {
    /// Takes what [`to_hex`](Self::to_hex) gives and nothing else, so that a key has one spelling on a line.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <Cow<'de, str>>::deserialize(deserializer)?;
        let bytes = HEXLOWER.decode(text.as_bytes()).map_err(serde::de::Error::custom)?;
        Self::from_bytes(&bytes).map_err(serde::de::Error::custom)
    }
}

/// Whoever reads a key from a file puts the file's name in place of this one.
fn refused(problem: impl Into<String>) -> AuditError {
    AuditError::Key { path: "(as given)".to_owned(), problem: problem.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::chain::{Entry, Fields, Lines, Notice};
    use crate::error::{Reason, Reasoned};

    fn key() -> SigningKey {
        SigningKey::from_pkcs8(&SigningKey::generate_pkcs8().unwrap()).unwrap()
    }

    fn statement() -> Statement<'static> {
        let head = Head { seq: 7, hash: ChainHash::genesis("a") };
        Statement { instance: "a", head, generation: 41, time: "2026-01-02T03:04:05Z" }
    }

    /// The line on which a checkpoint of `statement` stands.
    fn line(statement: &Statement<'_>, checkpoint: &Checkpoint) -> String {
        let mut lines = Lines::new(statement.instance);
        let fields = Fields::of_notice(&Notice::Checkpoint(checkpoint.clone())).unwrap();
        lines.push(statement.head, statement.time, fields.as_bytes());
        String::from_utf8(lines.bytes().to_vec()).unwrap().trim_end().to_owned()
    }

    /// Whether a checkpoint fits where a statement says that it stands.
    fn fits(statement: &Statement<'_>, checkpoint: &Checkpoint, signer: &SigningKey) -> bool {
        let line = line(statement, checkpoint);
        let frame = Frame::parse(line.as_bytes()).unwrap();
        assert_eq!(frame.entry().unwrap(), Entry::Notice(Notice::Checkpoint(checkpoint.clone())));
        checkpoint.fits(statement.instance, &frame, &signer.public)
    }

    #[test]
    fn a_statement_reads_as_it_is_drawn() {
        let hash = ChainHash::genesis("a");
        let place = format!("a\n7\n{hash}\n41\n2026-01-02T03:04:05Z\n");
        assert_eq!(statement().text(None), format!("claviger audit checkpoint v1\n{place}"));
        let (one, other) = (key().public, key().public);
        assert_eq!(
            statement().text(Some((one, other))),
            format!("claviger audit handover v1\n{place}key {one}\nnext {other}\n")
        );
    }

    #[test]
    fn a_signature_fits_one_statement_and_one_key() {
        let (key, next) = (key(), key());
        for next in [None, Some(&next)] {
            let checkpoint = Checkpoint::new(&statement(), &key, next);
            assert!(fits(&statement(), &checkpoint, &key));
            assert!(!fits(&statement(), &checkpoint, &self::key()));
            let seven = statement().head;
            for other in [
                Statement { instance: "b", ..statement() },
                Statement { head: Head { seq: 8, ..seven }, ..statement() },
                Statement { head: Head { hash: ChainHash::genesis("b"), ..seven }, ..statement() },
                Statement { time: "2026-01-02T03:04:06Z", ..statement() },
            ] {
                assert!(!fits(&other, &checkpoint, &key), "{other:?}");
            }
            let generation = Checkpoint { generation: 42, ..checkpoint.clone() };
            assert!(!fits(&statement(), &generation, &key));
            for bad in ["", "!", "AAAA", &checkpoint.signature.to_lowercase()] {
                let bad = Checkpoint { signature: bad.to_owned(), ..checkpoint.clone() };
                assert!(!fits(&statement(), &bad, &key), "{bad:?}");
            }
        }
    }

    #[test]
    fn a_handover_takes_both_keys_and_is_nothing_else() {
        let (key, next, stranger) = (key(), key(), key());
        let good = Checkpoint::new(&statement(), &key, Some(&next));
        let plain = Checkpoint::new(&statement(), &key, None);
        let handover = good.handover.clone().unwrap();
        assert!(fits(&statement(), &good, &key));
        assert!(!fits(&statement(), &good, &next), "the next key's signature is no checkpoint of its own");
        for handover in [
            Handover { next_key: stranger.public, ..handover.clone() },
            Handover { key: stranger.public, ..handover.clone() },
            Handover { key: next.public, next_key: key.public, ..handover.clone() },
            Handover { next_signature: good.signature.clone(), ..handover.clone() },
            Handover { next_signature: String::new(), ..handover.clone() },
        ] {
            let bad = Checkpoint { handover: Some(handover), ..good.clone() };
            assert!(!fits(&statement(), &bad, &key), "{bad:?}");
        }
        for bad in [
            Checkpoint { handover: None, ..good.clone() },
            Checkpoint { handover: Some(handover.clone()), ..plain.clone() },
            Checkpoint { key: next.id.clone(), ..good.clone() },
            Checkpoint { signature: handover.next_signature.clone(), ..good.clone() },
        ] {
            assert!(!fits(&statement(), &bad, &key), "{bad:?}");
        }
        let signature = handover.next_signature.clone();
        let by_next = Checkpoint { key: next.id.clone(), signature, handover: None, ..good.clone() };
        assert!(!fits(&statement(), &by_next, &next), "nor does it make one");
        let to_itself = Checkpoint::new(&statement(), &key, Some(&key));
        assert!(!fits(&statement(), &to_itself, &key));
    }

    #[test]
    fn half_a_handover_is_no_checkpoint() {
        let (key, next) = (key(), key());
        let good = line(&statement(), &Checkpoint::new(&statement(), &key, Some(&next)));
        let text = next.public.to_hex();
        for bad in [
            good.replace(r#","next_signature":""#, r#","signature":""#),
            good.replace(&format!(r#","next_key":"{text}""#), ""),
            good.replace(&text, &text.to_uppercase()),
            good.replace(&text, &text[2..]),
            good.replace(r#""handover":{"#, r#""handover":{"more":1,"#),
        ] {
            assert_ne!(bad, good);
            assert!(Frame::parse(bad.as_bytes()).unwrap().entry().is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_are_read_a_line_each() {
        let (one, other) = (key().public, key().public);
        assert_eq!(VerifyingKey::parse_list(&format!("{one}\n")).unwrap(), [one]);
        assert_eq!(VerifyingKey::parse_list(&format!("\n {one}\r\n\n{other}")).unwrap(), [one, other]);
        for bad in ["", "\n \n", "x", &format!("{one} {other}"), &format!("{one}\nx\n")] {
            assert_eq!(VerifyingKey::parse_list(bad).unwrap_err().reason(), Reason::InvalidKey, "{bad}");
        }
    }

    #[test]
    fn keys_are_read_and_named() {
        // RFC 8032, section 7.1, test 1, wrapped in PKCS#8.
        let seed = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
        let document = HEXLOWER.decode(format!("302e020100300506032b657004220420{seed}").as_bytes()).unwrap();
        let key = SigningKey::from_pkcs8(&document).unwrap();
        let public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
        assert_eq!(key.verifying_key().to_hex(), public);
        assert_eq!(
            VerifyingKey::parse(&format!(" {}\n", public.to_uppercase())).unwrap(),
            key.verifying_key()
        );
        assert_eq!(key.id().len(), 16);
        assert_eq!(key.id(), key.verifying_key().id());
    }

    #[test]
    fn what_is_no_key_is_refused_and_not_shown() {
        for document in [&b""[..], b"canary-5f3a", &[0x30; 48]] {
            let error = SigningKey::from_pkcs8(document).unwrap_err();
            assert_eq!(error.reason(), Reason::InvalidKey);
            assert!(!error.to_string().contains("canary"), "{error}");
        }
        for text in ["", "zz", "abcd", "d75a98"] {
            assert_eq!(VerifyingKey::parse(text).unwrap_err().reason(), Reason::InvalidKey, "{text}");
        }
        let key = key();
        assert_eq!(format!("{key:?}"), format!("SigningKey {{ id: {:?}, .. }}", key.id()));
    }
}
