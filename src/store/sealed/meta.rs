//! The store's own record: who it is, and the key of its MACs.
//!
//! ```text
//! offset  bytes
//!      0      4  magic and format, `CLM1`
//!      4     16  store id, a version 4 UUID
//!     20     76  integrity key, wrapped by the root key for this store id (crypto/envelope.rs)
//! ```
//!
//! The wrapped key names its root key, so that a store is refused at once under the wrong one; and rotating the root
//! key wraps this one key anew and leaves every MAC alone.

use uuid::Uuid;

use crate::crypto::{CryptoError, MacKey, RootKey};

const MAGIC: [u8; 4] = *b"CLM1";
const CONTEXT: &[u8] = b"claviger integrity key v1";

/// A store's identity and its integrity key.
#[derive(Debug)]
pub(super) struct Meta {
    pub(super) store_id: Uuid,
    pub(super) integrity: MacKey,
}

impl Meta {
    /// A new store, and the record that [`open`](Self::open) reads.
    pub(super) fn create(root: &RootKey) -> Result<(Self, Vec<u8>), CryptoError> {
        let store_id = Uuid::new_v4();
        let (integrity, wrapped) = MacKey::create(root, &[CONTEXT, store_id.as_bytes()])?;
        let stored = [MAGIC.as_slice(), store_id.as_bytes(), &wrapped].concat();
        Ok((Self { store_id, integrity }, stored))
    }

    /// Reads a store's record.
    pub(super) fn open(root: &RootKey, stored: &[u8]) -> Result<Self, CryptoError> {
        let rest = stored.strip_prefix(&MAGIC).ok_or(CryptoError::Malformed)?;
        let (store_id, wrapped) = rest.split_first_chunk().ok_or(CryptoError::Malformed)?;
        let store_id = Uuid::from_bytes(*store_id);
        let integrity = MacKey::open(root, &[CONTEXT, store_id.as_bytes()], wrapped)?;
        Ok(Self { store_id, integrity })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_created_opens_to_the_same() {
        let root = RootKey::from_bytes(&[1; 32]).unwrap();
        let (meta, stored) = Meta::create(&root).unwrap();
        assert_eq!(stored.len(), 96);
        let again = Meta::open(&root, &stored).unwrap();
        assert_eq!(again.store_id, meta.store_id);
        assert_eq!(again.integrity.sign(&[b"x"]), meta.integrity.sign(&[b"x"]));
    }

    #[test]
    fn every_byte_counts() {
        let root = RootKey::from_bytes(&[1; 32]).unwrap();
        let (_, stored) = Meta::create(&root).unwrap();
        for position in 0..stored.len() {
            let mut changed = stored.clone();
            changed[position] ^= 1;
            assert!(Meta::open(&root, &changed).is_err(), "byte {position}");
            assert!(Meta::open(&root, &stored[..position]).is_err(), "{position} bytes");
        }
    }
}
