//! Root keys together: the newest, and others that still open what they wrapped. What makes it possible to go from one
//! root key to the next while both are in use.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::CryptoError;
use super::envelope::Slot;
use super::mac::MacKey;
use super::root_key::{RootKey, RootKeyId};
use crate::secret::SecretValue;

/// The root keys that are loaded. What is wrapped names its root key, so it is opened by that one, or refused.
///
/// A key that was once in the ring stays: whoever read something a moment ago may be about to open it.
pub struct KeyRing {
    keys: ArcSwap<Keys>,
}

struct Keys {
    newest: Arc<RootKey>,
    others: Vec<Arc<RootKey>>,
}

impl Keys {
    fn iter(&self) -> impl Iterator<Item = &Arc<RootKey>> {
        std::iter::once(&self.newest).chain(&self.others)
    }

    /// The same keys and `newest`, which comes first. One that is among them already is not taken twice.
    fn led_by(&self, newest: &Arc<RootKey>) -> Self {
        let newest = self.iter().find(|key| key.id() == newest.id()).unwrap_or(newest);
        let others = self.iter().filter(|key| key.id() != newest.id()).cloned().collect();
        Self { newest: Arc::clone(newest), others }
    }
}

impl KeyRing {
    /// A ring of one key.
    #[must_use]
    pub fn of(key: RootKey) -> Self {
        Self { keys: ArcSwap::from_pointee(Keys { newest: Arc::new(key), others: Vec::new() }) }
    }

    /// The same ring with one more key, which opens what it wrapped; the newest stays the newest.
    #[must_use]
    pub fn with(self, other: RootKey) -> Self {
        let newest = self.newest();
        self.adopt(other);
        self.keys.rcu(|keys| keys.led_by(&newest));
        self
    }

    /// Makes `key` the newest: at once, for everyone. The others go on opening what they wrapped.
    pub fn adopt(&self, key: RootKey) {
        let key = Arc::new(key);
        self.keys.rcu(|keys| keys.led_by(&key));
    }

    /// The key that everything is to be wrapped by.
    #[must_use]
    pub fn newest(&self) -> Arc<RootKey> {
        Arc::clone(&self.keys.load().newest)
    }

    /// The ids of all keys, the newest first.
    #[must_use]
    pub fn ids(&self) -> Vec<RootKeyId> {
        self.keys.load().iter().map(|key| key.id()).collect()
    }

    /// The key that has this id.
    ///
    /// # Errors
    /// [`CryptoError::WrongKey`] where it is not in the ring.
    pub fn key(&self, id: RootKeyId) -> Result<Arc<RootKey>, CryptoError> {
        let keys = self.keys.load();
        let found = keys.iter().find(|key| key.id() == id).cloned();
        found.ok_or_else(|| CryptoError::WrongKey { sealed_under: id, given: keys.newest.id() })
    }

    /// Opens a value that one of the keys [sealed](RootKey::seal) for the same slot.
    ///
    /// # Errors
    /// [`CryptoError::WrongKey`], [`CryptoError::Tampered`], [`CryptoError::Malformed`].
    pub fn open(&self, slot: &Slot<'_>, sealed: &[u8]) -> Result<SecretValue, CryptoError> {
        self.key(RootKeyId::of_value(sealed).ok_or(CryptoError::Malformed)?)?.open(slot, sealed)
    }

    /// The same sealed value with its data key wrapped by the newest key; `None` where it names that one already. The
    /// value itself is neither opened nor changed, and so neither are its nonce and its tag.
    ///
    /// # Errors
    /// As [`open`](Self::open), of the data key.
    pub fn rewrap(&self, slot: &Slot<'_>, sealed: &[u8]) -> Result<Option<Vec<u8>>, CryptoError> {
        let Some((from, newest)) = self.steps(RootKeyId::of_value(sealed))? else { return Ok(None) };
        from.rewrap(&newest, slot, sealed).map(Some)
    }

    /// Opens a key for MACs that one of the keys wrapped for the same context.
    ///
    /// # Errors
    /// As [`MacKey::open`].
    pub fn open_mac_key(&self, context: &[&[u8]], wrapped: &[u8]) -> Result<MacKey, CryptoError> {
        let root = self.key(RootKeyId::of_wrapped(wrapped).ok_or(CryptoError::Malformed)?)?;
        MacKey::open(&root, context, wrapped)
    }

    /// The key that wrapped a key for MACs, found to be authentic for this context.
    ///
    /// # Errors
    /// As [`MacKey::open`].
    pub fn key_around(&self, context: &[&[u8]], wrapped: &[u8]) -> Result<Arc<RootKey>, CryptoError> {
        let root = self.key(RootKeyId::of_wrapped(wrapped).ok_or(CryptoError::Malformed)?)?;
        drop(root.unwrap_key(context, wrapped)?);
        Ok(root)
    }

    /// The same key for MACs wrapped by the newest key; `None` where it names that one already.
    ///
    /// # Errors
    /// As [`MacKey::open`].
    pub fn rewrap_mac_key(&self, context: &[&[u8]], wrapped: &[u8]) -> Result<Option<Vec<u8>>, CryptoError> {
        let Some((from, newest)) = self.steps(RootKeyId::of_wrapped(wrapped))? else { return Ok(None) };
        let key = from.unwrap_key(context, wrapped)?;
        newest.wrap_key(context, &key).map(Some)
    }

    /// The key that opens, and the one that wraps then; `None` where they are the same.
    fn steps(&self, named: Option<RootKeyId>) -> Result<Option<Step>, CryptoError> {
        let named = named.ok_or(CryptoError::Malformed)?;
        let newest = self.newest();
        if named == newest.id() {
            return Ok(None);
        }
        Ok(Some((self.key(named)?, newest)))
    }
}

/// From one key to another.
type Step = (Arc<RootKey>, Arc<RootKey>);

impl From<RootKey> for KeyRing {
    fn from(key: RootKey) -> Self {
        Self::of(key)
    }
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("KeyRing").field(&self.ids()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::{ContentType, EnvironmentName, SecretName, VersionId};
    use uuid::Uuid;

    const CONTEXT: &[&[u8]] = &[b"integrity", b"store-1"];
    /// Where a sealed value's wrapped data key stands.
    const WRAPPED: std::ops::Range<usize> = 4..80;

    fn root(seed: u8) -> RootKey {
        let mut bytes = [seed; 32];
        bytes[0] = 0;
        RootKey::from_bytes(&bytes).unwrap()
    }

    fn value() -> SecretValue {
        SecretValue::text("correct horse".to_owned()).unwrap()
    }

    /// Calls `work` with the one slot of these tests.
    fn in_slot<T>(work: impl FnOnce(&Slot<'_>) -> T) -> T {
        let environment = EnvironmentName::parse("production").unwrap();
        let name = SecretName::parse("database/main").unwrap();
        let version_id = VersionId::parse(&"1".repeat(32)).unwrap();
        work(&Slot {
            store_id: Uuid::from_u128(7),
            environment: &environment,
            name: &name,
            version_id: &version_id,
            content_type: ContentType::Text,
        })
    }

    #[test]
    fn the_newest_comes_first_and_the_others_still_open() {
        let ring = KeyRing::of(root(1)).with(root(2));
        assert_eq!(ring.ids(), [root(1).id(), root(2).id()]);
        in_slot(|slot| {
            for seed in [1, 2] {
                let sealed = root(seed).seal(slot, &value()).unwrap();
                assert_eq!(RootKeyId::of_value(&sealed), Some(root(seed).id()));
                assert!(ring.open(slot, &sealed).unwrap().same_as(&value()));
            }
            let strange = root(3).seal(slot, &value()).unwrap();
            let wrong = CryptoError::WrongKey { sealed_under: root(3).id(), given: root(1).id() };
            assert_eq!(ring.open(slot, &strange).unwrap_err(), wrong);
            assert_eq!(ring.rewrap(slot, &strange).unwrap_err(), wrong);
            ring.adopt(root(3));
            assert!(ring.open(slot, &strange).unwrap().same_as(&value()));
        });
        assert_eq!(ring.ids(), [root(3).id(), root(1).id(), root(2).id()]);
    }

    #[test]
    fn a_key_is_not_taken_twice() {
        let ring = KeyRing::of(root(1)).with(root(2)).with(root(1));
        assert_eq!(ring.ids(), [root(1).id(), root(2).id()]);
        ring.adopt(root(2));
        ring.adopt(root(2));
        assert_eq!(ring.ids(), [root(2).id(), root(1).id()]);
        assert_eq!(format!("{ring:?}"), format!("KeyRing([{:?}, {:?}])", root(2).id(), root(1).id()));
    }

    #[test]
    fn rewrapping_changes_the_wrapped_part_alone_and_once() {
        let ring = KeyRing::of(root(2)).with(root(1));
        in_slot(|slot| {
            let sealed = root(1).seal(slot, &value()).unwrap();
            let rewrapped = ring.rewrap(slot, &sealed).unwrap().unwrap();
            assert_eq!(rewrapped.len(), sealed.len());
            for (position, (before, after)) in sealed.iter().zip(&rewrapped).enumerate() {
                assert!(before == after || WRAPPED.contains(&position), "byte {position}");
            }
            assert_ne!(sealed[WRAPPED], rewrapped[WRAPPED]);
            assert_eq!(RootKeyId::of_value(&rewrapped), Some(root(2).id()));
            assert!(root(2).open(slot, &rewrapped).unwrap().same_as(&value()), "the new key alone will do");
            assert_eq!(
                root(1).open(slot, &rewrapped).unwrap_err(),
                CryptoError::WrongKey { sealed_under: root(2).id(), given: root(1).id() }
            );
            assert_eq!(ring.rewrap(slot, &rewrapped), Ok(None), "nothing is left to do");
        });
    }

    #[test]
    fn every_bit_of_the_wrapped_part_counts_before_and_after() {
        let ring = KeyRing::of(root(2)).with(root(1));
        in_slot(|slot| {
            let sealed = root(1).seal(slot, &value()).unwrap();
            let rewrapped = ring.rewrap(slot, &sealed).unwrap().unwrap();
            for position in WRAPPED {
                for bit in 0..8 {
                    let flipped = |bytes: &[u8]| {
                        let mut bytes = bytes.to_vec();
                        bytes[position] ^= 1 << bit;
                        bytes
                    };
                    let refused = |error: CryptoError| match position {
                        4..20 => matches!(error, CryptoError::WrongKey { .. }),
                        _ => error == CryptoError::Tampered,
                    };
                    let place = format!("bit {bit} of byte {position}");
                    assert!(refused(ring.open(slot, &flipped(&rewrapped)).unwrap_err()), "{place}");
                    assert!(refused(ring.open(slot, &flipped(&sealed)).unwrap_err()), "{place}");
                    assert!(refused(ring.rewrap(slot, &flipped(&sealed)).unwrap_err()), "{place}");
                }
            }
        });
    }

    #[test]
    fn a_value_is_rewrapped_in_its_own_slot_alone() {
        let ring = KeyRing::of(root(2)).with(root(1));
        in_slot(|slot| {
            let sealed = root(1).seal(slot, &value()).unwrap();
            let elsewhere = Slot { content_type: ContentType::Binary, ..*slot };
            assert_eq!(ring.rewrap(&elsewhere, &sealed).unwrap_err(), CryptoError::Tampered);
        });
    }

    #[test]
    fn what_is_too_short_is_malformed() {
        let ring = KeyRing::of(root(2)).with(root(1));
        in_slot(|slot| {
            let sealed = root(1).seal(slot, &value()).unwrap();
            for length in 0..108 {
                assert_eq!(RootKeyId::of_value(&sealed[..length]), None, "{length} bytes");
                assert_eq!(ring.open(slot, &sealed[..length]).unwrap_err(), CryptoError::Malformed);
                assert_eq!(ring.rewrap(slot, &sealed[..length]).unwrap_err(), CryptoError::Malformed);
            }
        });
        let (_, wrapped) = MacKey::create(&root(1), CONTEXT).unwrap();
        for length in 0..wrapped.len() {
            assert_eq!(RootKeyId::of_wrapped(&wrapped[..length]), None, "{length} bytes");
            assert_eq!(
                ring.open_mac_key(CONTEXT, &wrapped[..length]).unwrap_err(),
                CryptoError::Malformed,
                "{length} bytes"
            );
        }
    }

    #[test]
    fn a_key_for_macs_is_the_same_under_another_root_key() {
        let ring = KeyRing::of(root(2)).with(root(1));
        let (key, wrapped) = MacKey::create(&root(1), CONTEXT).unwrap();
        let rewrapped = ring.rewrap_mac_key(CONTEXT, &wrapped).unwrap().unwrap();
        assert_eq!(RootKeyId::of_wrapped(&rewrapped), Some(root(2).id()));
        for wrapped in [&wrapped, &rewrapped] {
            let opened = ring.open_mac_key(CONTEXT, wrapped).unwrap();
            assert_eq!(opened.sign(&[b"x"]), key.sign(&[b"x"]));
        }
        assert_eq!(ring.key_around(CONTEXT, &wrapped).unwrap().id(), root(1).id());
        assert_eq!(ring.key_around(CONTEXT, &rewrapped).unwrap().id(), root(2).id());
        assert_eq!(ring.rewrap_mac_key(CONTEXT, &rewrapped), Ok(None));
        assert_eq!(ring.rewrap_mac_key(&[b"other"], &wrapped).unwrap_err(), CryptoError::Tampered);
        for position in 0..wrapped.len() {
            let mut changed = wrapped.clone();
            changed[position] ^= 1;
            assert!(ring.rewrap_mac_key(CONTEXT, &changed).is_err(), "byte {position}");
            assert!(ring.key_around(CONTEXT, &changed).is_err(), "byte {position}");
        }
    }
}
