//! Envelope encryption, root keys and what protects them.
//!
//! ```text
//! key file, systemd credential, variable ──▶ RootKey ──wraps──▶ data key, one per version ──seals──▶ value
//!                                               │└─────wraps──▶ integrity key, one per store ─MACs─▶ records
//!                                            KeyRing: the newest root key, and others that still open what they
//!                                            wrapped; rewraps from any of them to the newest
//! ```
//!
//! All of it is AES-256-GCM and HMAC-SHA256 from `ring`. Whatever is authenticated is a list of parts, each behind
//! its length, so that no two lists read alike.
//!
//! What wiping does not reach: `ring` builds its key schedules on the stack and never wipes them. Those of the root
//! key and of the keys for MACs are moved into a locked page and wiped there, and the stack that was used to load them is
//! overwritten. The schedule of a data key stays on the stack, after its one value was sealed or opened, until the stack
//! is used again.

mod envelope;
mod key_file;
mod key_ring;
mod mac;
mod memory;
mod root_key;

use ring::rand::{SecureRandom, SystemRandom};

use crate::error::{Reason, Reasoned};

pub use envelope::Slot;
pub use key_file::{KeyError, KeyProblem, create_key_file, read_key_file};
pub use key_ring::KeyRing;
pub use mac::{MAC_BYTES, Mac, MacKey};
pub use memory::{harden_process, let_go_of_code};
pub use root_key::{KEY_BYTES, RootKey, RootKeyId, RootKeySource};

/// Why something can't be sealed or opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CryptoError {
    /// The bytes were sealed under another root key. Nothing is said of whether they are whole.
    #[error(
        "wrong root key: sealed under {sealed_under}, the key given is {given}; give the key that it was sealed under, as \
         root_key or under root_key.previous"
    )]
    WrongKey {
        /// The key that would open it.
        sealed_under: RootKeyId,
        /// The key that was tried; of several, the newest.
        given: RootKeyId,
    },
    /// The bytes were changed, or were sealed for another place.
    #[error("authentication fails: the bytes were changed, or belong to another place")]
    Tampered,
    /// The bytes are not of a format that this version knows, or a value is not of its slot's content type.
    #[error("the bytes are not in a format that this version knows")]
    Malformed,
    /// The operating system gave no random bytes.
    #[error("the operating system gives no random bytes")]
    Random,
}

impl Reasoned for CryptoError {
    fn reason(&self) -> Reason {
        match self {
            Self::WrongKey { .. } => Reason::WrongKey,
            Self::Tampered | Self::Malformed => Reason::Tampered,
            Self::Random => Reason::Internal,
        }
    }
}

/// Random bytes from the operating system, for nonces and ids. A key is drawn where it is kept, not by this.
///
/// # Errors
/// [`CryptoError::Random`].
pub fn random<const N: usize>() -> Result<[u8; N], CryptoError> {
    let mut bytes = [0; N];
    fill_random(&mut bytes)?;
    Ok(bytes)
}

fn fill_random(bytes: &mut [u8]) -> Result<(), CryptoError> {
    SystemRandom::new().fill(bytes).map_err(|_| CryptoError::Random)
}

/// A part's length as it stands before the part: 32 bits, big-endian.
///
/// INVARIANT: no part reaches 4 GiB; what is authenticated here are names, ids and records.
fn length_of(part: &[u8]) -> [u8; 4] {
    u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes()
}

/// The parts, each behind its length.
fn length_prefixed(parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(parts.iter().map(|part| 4 + part.len()).sum());
    for part in parts {
        bytes.extend_from_slice(&length_of(part));
        bytes.extend_from_slice(part);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parts_are_drawn_as_documented() {
        assert_eq!(length_prefixed(&[b"ab", b"", b"c"]), b"\0\0\0\x02ab\0\0\0\0\0\0\0\x01c");
    }

    #[test]
    fn random_bytes_differ() {
        assert_ne!(random::<32>().unwrap(), random::<32>().unwrap());
    }

    proptest! {
        #[test]
        fn no_two_lists_read_alike(
            one in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..4), 0..4),
            other in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..4), 0..4),
        ) {
            let read = |list: &Vec<Vec<u8>>| length_prefixed(&list.iter().map(Vec::as_slice).collect::<Vec<_>>());
            prop_assert_eq!(one == other, read(&one) == read(&other));
        }
    }
}
