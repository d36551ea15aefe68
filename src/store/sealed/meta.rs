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
//!
//! INVARIANT: the root key that is named here is the one in force: every new value is wrapped by it (see rewrap.rs).

use std::sync::Arc;

use uuid::Uuid;

use crate::crypto::{CryptoError, KeyRing, MacKey, RootKey};

const MAGIC: [u8; 4] = *b"CLM1";
const CONTEXT: &[u8] = b"claviger integrity key v1";

/// A store's identity and its integrity key.
#[derive(Debug)]
pub(super) struct Meta {
    pub(super) store_id: Uuid,
    pub(super) integrity: MacKey,
}

impl Meta {
    /// A new store under the newest root key, and the record that [`open`](Self::open) reads.
    pub(super) fn create(keys: &KeyRing) -> Result<(Self, Vec<u8>), CryptoError> {
        let store_id = Uuid::new_v4();
        let (integrity, wrapped) = MacKey::create(&keys.newest(), &context(&store_id))?;
        Ok((Self { store_id, integrity }, stored(&store_id, &wrapped)))
    }

    /// Reads a store's record.
    pub(super) fn open(keys: &KeyRing, stored: &[u8]) -> Result<Self, CryptoError> {
        let (store_id, wrapped) = split(stored)?;
        let integrity = keys.open_mac_key(&context(&store_id), wrapped)?;
        Ok(Self { store_id, integrity })
    }
}

/// The root key that a store's record is under.
pub(super) fn root_key(keys: &KeyRing, stored: &[u8]) -> Result<Arc<RootKey>, CryptoError> {
    let (store_id, wrapped) = split(stored)?;
    keys.key_around(&context(&store_id), wrapped)
}

/// A store's record with its key wrapped by the newest root key; `None` where it is so already.
pub(super) fn rewrap(keys: &KeyRing, old: &[u8]) -> Result<Option<Vec<u8>>, CryptoError> {
    let (store_id, wrapped) = split(old)?;
    let wrapped = keys.rewrap_mac_key(&context(&store_id), wrapped)?;
    Ok(wrapped.map(|wrapped| stored(&store_id, &wrapped)))
}

fn split(stored: &[u8]) -> Result<(Uuid, &[u8]), CryptoError> {
    let rest = stored.strip_prefix(&MAGIC).ok_or(CryptoError::Malformed)?;
    let (store_id, wrapped) = rest.split_first_chunk().ok_or(CryptoError::Malformed)?;
    Ok((Uuid::from_bytes(*store_id), wrapped))
}

fn stored(store_id: &Uuid, wrapped: &[u8]) -> Vec<u8> {
    [MAGIC.as_slice(), store_id.as_bytes(), wrapped].concat()
}

fn context(store_id: &Uuid) -> [&[u8]; 2] {
    [CONTEXT, store_id.as_bytes()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(key: u8) -> KeyRing {
        KeyRing::of(RootKey::from_bytes(&[key; 32]).unwrap())
    }

    #[test]
    fn what_is_created_opens_to_the_same() {
        let root = ring(1);
        let (meta, stored) = Meta::create(&root).unwrap();
        assert_eq!(stored.len(), 96);
        let again = Meta::open(&root, &stored).unwrap();
        assert_eq!(again.store_id, meta.store_id);
        assert_eq!(again.integrity.sign(&[b"x"]), meta.integrity.sign(&[b"x"]));
    }

    #[test]
    fn every_byte_counts() {
        let root = ring(1);
        let (_, stored) = Meta::create(&root).unwrap();
        for position in 0..stored.len() {
            let mut changed = stored.clone();
            changed[position] ^= 1;
            assert!(Meta::open(&root, &changed).is_err(), "byte {position}");
            assert!(Meta::open(&root, &stored[..position]).is_err(), "{position} bytes");
        }
    }

    #[test]
    fn another_root_key_takes_over_and_every_mac_stays() {
        let ring = ring(1);
        let (meta, stored) = Meta::create(&ring).unwrap();
        assert_eq!(root_key(&ring, &stored).unwrap().id(), ring.newest().id());
        assert_eq!(rewrap(&ring, &stored), Ok(None));
        ring.adopt(RootKey::from_bytes(&[2; 32]).unwrap());
        let rewrapped = rewrap(&ring, &stored).unwrap().unwrap();
        assert_eq!(root_key(&ring, &rewrapped).unwrap().id(), ring.newest().id());
        let again = Meta::open(&KeyRing::of(RootKey::from_bytes(&[2; 32]).unwrap()), &rewrapped).unwrap();
        assert_eq!(again.store_id, meta.store_id);
        assert_eq!(again.integrity.sign(&[b"x"]), meta.integrity.sign(&[b"x"]));
    }
}
