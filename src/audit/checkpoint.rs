//! Checkpoints: an Ed25519 signature over where a chain stands, and the keys that make and check it.
//!
//! What is signed is text, a line per part, in the manner of a signed note (C2SP `tlog-checkpoint`), so that it can be
//! checked with nothing but the log and an Ed25519 tool:
//!
//! ```text
//! claviger audit checkpoint v1
//! <instance>
//! <sequence of the record before>
//! <hash of the record before, 64 hex digits>
//! <generation>
//! <time of the checkpoint's own line, as it stands there>
//! ```
//!
//! No part can hold a newline, so that no two statements read alike.

use std::fmt;

use data_encoding::{BASE64, HEXLOWER, HEXLOWER_PERMISSIVE};
use ring::digest;
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use zeroize::Zeroizing;

use super::AuditError;
use super::chain::{Frame, Head};

/// What a checkpoint says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Statement<'a> {
    pub(super) instance: &'a str,
    /// The record before the checkpoint.
    pub(super) head: Head,
    /// See [`Settings::generation`](super::Settings::generation).
    pub(super) generation: u64,
    pub(super) time: &'a str,
}

impl<'a> Statement<'a> {
    /// What the checkpoint on this line should say.
    pub(super) fn of(instance: &'a str, line: &Frame<'a>, generation: u64) -> Self {
        let head = Head { seq: line.seq.saturating_sub(1), hash: line.prev };
        Self { instance, head, generation, time: line.time }
    }

    fn text(&self) -> String {
        let Self { instance, head, generation, time } = self;
        format!(
            "claviger audit checkpoint v1\n{instance}\n{}\n{}\n{generation}\n{time}\n",
            head.seq, head.hash
        )
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

    /// The statement's signature in Base64.
    pub(super) fn sign(&self, statement: &Statement<'_>) -> String {
        BASE64.encode(self.pair.sign(statement.text().as_bytes()).as_ref())
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

    /// Whether `signature`, in Base64, is this key's over the statement.
    pub(super) fn admits(&self, statement: &Statement<'_>, signature: &str) -> bool {
        BASE64.decode(signature.as_bytes()).is_ok_and(|signature| {
            UnparsedPublicKey::new(&ED25519, &self.0).verify(statement.text().as_bytes(), &signature).is_ok()
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

/// Whoever reads a key from a file puts the file's name in place of this one.
fn refused(problem: impl Into<String>) -> AuditError {
    AuditError::Key { path: "(as given)".to_owned(), problem: problem.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::chain::ChainHash;
    use crate::error::{Reason, Reasoned};

    fn key() -> SigningKey {
        SigningKey::from_pkcs8(&SigningKey::generate_pkcs8().unwrap()).unwrap()
    }

    fn statement() -> Statement<'static> {
        let head = Head { seq: 7, hash: ChainHash::genesis("a") };
        Statement { instance: "a", head, generation: 41, time: "2026-01-02T03:04:05Z" }
    }

    #[test]
    fn a_statement_reads_as_it_is_drawn() {
        let text = statement().text();
        let hash = ChainHash::genesis("a");
        assert_eq!(text, format!("claviger audit checkpoint v1\na\n7\n{hash}\n41\n2026-01-02T03:04:05Z\n"));
    }

    #[test]
    fn a_signature_fits_one_statement_and_one_key() {
        let key = key();
        let signature = key.sign(&statement());
        let public = key.verifying_key();
        assert!(public.admits(&statement(), &signature));
        let seven = statement().head;
        for other in [
            Statement { instance: "b", ..statement() },
            Statement { head: Head { seq: 8, ..seven }, ..statement() },
            Statement { head: Head { hash: ChainHash::genesis("b"), ..seven }, ..statement() },
            Statement { generation: 42, ..statement() },
            Statement { time: "2026-01-02T03:04:06Z", ..statement() },
        ] {
            assert!(!public.admits(&other, &signature), "{other:?}");
        }
        assert!(!self::key().verifying_key().admits(&statement(), &signature));
        for bad in ["", "!", "AAAA", &signature.to_lowercase()] {
            assert!(!public.admits(&statement(), bad), "{bad}");
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
