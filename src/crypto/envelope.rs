//! The envelope around a value: a data key of its own seals it, the root key wraps the data key.
//!
//! ```text
//! sealed value, format 1                                 wrapped key (76 bytes)
//! offset  bytes                                          offset  bytes
//!      0      4  magic and format, `CLV1`                     0     16  root key id
//!      4     76  wrapped data key ─────────────────────▶     16     12  nonce, random
//!     80     12  nonce of the value, random                  28     48  AES-256-GCM(root key, key) and tag
//!     92      n  AES-256-GCM(data key, value)
//!   92+n     16  tag
//!
//! associated data, each part behind its length (32 bits, big-endian)
//!   value     format label │ store id │ environment │ name │ version id │ content type
//!   data key  format label │ store id │ environment │ name │ version id │ content type │ root key id
//! ```
//!
//! Wrapping a data key under another root key so replaces bytes 4 to 80 and leaves the value alone.
//!
//! Nonces: a data key seals one value, so its nonce can't repeat. The root key wraps one key per version under random
//! 96-bit nonces, which NIST SP 800-38D (section 8.3) permits up to 2^32 times per key.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::root_key::{KEY_BYTES, ROOT_KEY_ID_BYTES, RootKey, RootKeyId};
use super::{CryptoError, fill_random, length_prefixed, random};
use crate::secret::{ContentType, EnvironmentName, SecretName, SecretValue, VersionId};

const MAGIC: [u8; 4] = *b"CLV1";
const FORMAT: &[u8] = b"claviger sealed value v1";
const TAG_BYTES: usize = 16;
const WRAPPED_BYTES: usize = ROOT_KEY_ID_BYTES + NONCE_LEN + KEY_BYTES + TAG_BYTES;

/// The one place that a sealed value fits.
#[derive(Debug, Clone, Copy)]
pub struct Slot<'a> {
    /// The store, made once and never reused.
    pub store_id: Uuid,
    /// The environment.
    pub environment: &'a EnvironmentName,
    /// The secret.
    pub name: &'a SecretName,
    /// The version.
    pub version_id: &'a VersionId,
    /// Text or bytes.
    pub content_type: ContentType,
}

impl Slot<'_> {
    fn parts(&self) -> [&[u8]; 6] {
        [
            FORMAT,
            self.store_id.as_bytes(),
            self.environment.as_str().as_bytes(),
            self.name.as_str().as_bytes(),
            self.version_id.as_str().as_bytes(),
            self.content_type.as_str().as_bytes(),
        ]
    }
}

/// What is drawn at random for one sealing.
struct Fresh {
    data_key: Zeroizing<[u8; KEY_BYTES]>,
    wrap_nonce: [u8; NONCE_LEN],
    value_nonce: [u8; NONCE_LEN],
}

impl Fresh {
    fn draw() -> Result<Self, CryptoError> {
        let mut data_key = Zeroizing::new([0_u8; KEY_BYTES]);
        fill_random(data_key.as_mut_slice())?;
        Ok(Self { data_key, wrap_nonce: random()?, value_nonce: random()? })
    }
}

impl RootKey {
    /// Seals `value` for `slot` under a fresh data key.
    ///
    /// # Errors
    /// [`CryptoError::Random`]; [`CryptoError::Malformed`] where the value is not of the slot's content type.
    pub fn seal(&self, slot: &Slot<'_>, value: &SecretValue) -> Result<Vec<u8>, CryptoError> {
        self.seal_with(slot, value, &Fresh::draw()?)
    }

    /// Opens what [`seal`](Self::seal) made for the same slot.
    ///
    /// # Errors
    /// [`CryptoError::WrongKey`], [`CryptoError::Tampered`], [`CryptoError::Malformed`].
    pub fn open(&self, slot: &Slot<'_>, sealed: &[u8]) -> Result<SecretValue, CryptoError> {
        let parts = SealedParts::split(sealed).ok_or(CryptoError::Malformed)?;
        let data_key = self.unwrap_key(&slot.parts(), parts.wrapped)?;
        // Exactly as long as the value, so that the value takes the buffer over instead of copying it.
        let mut value = Zeroizing::new(parts.ciphertext.to_vec());
        aead(&data_key)?
            .open_in_place_separate_tag(
                Nonce::assume_unique_for_key(*parts.nonce),
                Aad::from(length_prefixed(&slot.parts())),
                (*parts.tag).into(),
                value.as_mut_slice(),
                0..,
            )
            .map_err(|_| CryptoError::Tampered)?;
        SecretValue::new(std::mem::take(&mut *value), slot.content_type).map_err(|_| CryptoError::Malformed)
    }

    fn seal_with(&self, slot: &Slot<'_>, value: &SecretValue, fresh: &Fresh) -> Result<Vec<u8>, CryptoError> {
        if value.content_type() != slot.content_type {
            return Err(CryptoError::Malformed);
        }
        let wrapped = self.wrap_key_with(&slot.parts(), &fresh.data_key, fresh.wrap_nonce)?;
        let mut ciphertext = Zeroizing::new(value.expose().to_vec());
        let tag = aead(&fresh.data_key)?
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(fresh.value_nonce),
                Aad::from(length_prefixed(&slot.parts())),
                ciphertext.as_mut_slice(),
            )
            .map_err(|_| CryptoError::Malformed)?;
        Ok([MAGIC.as_slice(), wrapped.as_slice(), &fresh.value_nonce, ciphertext.as_slice(), tag.as_ref()]
            .concat())
    }

    /// Wraps a sealed value's data key by `next` instead of this key: replaces bytes 4 to 80, and nothing else. The value
    /// is not looked at.
    pub(super) fn rewrap(&self, next: &Self, slot: &Slot<'_>, sealed: &[u8]) -> Result<Vec<u8>, CryptoError> {
        let parts = SealedParts::split(sealed).ok_or(CryptoError::Malformed)?;
        let data_key = self.unwrap_key(&slot.parts(), parts.wrapped)?;
        let wrapped = next.wrap_key(&slot.parts(), &data_key)?;
        Ok([MAGIC.as_slice(), &wrapped, parts.nonce, parts.ciphertext, parts.tag].concat())
    }

    /// Wraps another key for `context`; what is wrapped names this key, and opens under it and for the same context.
    pub(super) fn wrap_key(&self, context: &[&[u8]], key: &[u8; KEY_BYTES]) -> Result<Vec<u8>, CryptoError> {
        self.wrap_key_with(context, key, random()?)
    }

    fn wrap_key_with(
        &self,
        context: &[&[u8]],
        key: &[u8; KEY_BYTES],
        nonce: [u8; NONCE_LEN],
    ) -> Result<Vec<u8>, CryptoError> {
        let mut wrapped = Zeroizing::new(*key);
        let tag = self
            .aead()
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(self.wrapping(context)),
                wrapped.as_mut_slice(),
            )
            .map_err(|_| CryptoError::Malformed)?;
        Ok([self.id().as_bytes().as_slice(), &nonce, wrapped.as_slice(), tag.as_ref()].concat())
    }

    /// Opens what [`wrap_key`](Self::wrap_key) made for the same context.
    pub(super) fn unwrap_key(
        &self,
        context: &[&[u8]],
        wrapped: &[u8],
    ) -> Result<Zeroizing<[u8; KEY_BYTES]>, CryptoError> {
        let parts = WrappedParts::split(wrapped).ok_or(CryptoError::Malformed)?;
        if parts.root_key != self.id() {
            return Err(CryptoError::WrongKey { sealed_under: parts.root_key, given: self.id() });
        }
        let mut key = Zeroizing::new(*parts.key);
        self.aead()
            .open_in_place_separate_tag(
                Nonce::assume_unique_for_key(*parts.nonce),
                Aad::from(self.wrapping(context)),
                (*parts.tag).into(),
                key.as_mut_slice(),
                0..,
            )
            .map_err(|_| CryptoError::Tampered)?;
        Ok(key)
    }

    /// The associated data of a wrapping: its context and this key's id.
    fn wrapping(&self, context: &[&[u8]]) -> Vec<u8> {
        let id = self.id();
        let mut parts = context.to_vec();
        parts.push(id.as_bytes());
        length_prefixed(&parts)
    }
}

impl RootKeyId {
    /// The root key that a sealed value names as its own; `None` where the bytes are no sealed value. Nothing is
    /// authenticated by this.
    #[must_use]
    pub fn of_value(sealed: &[u8]) -> Option<Self> {
        Self::of_wrapped(SealedParts::split(sealed)?.wrapped)
    }

    /// The same of a wrapped key.
    #[must_use]
    pub fn of_wrapped(wrapped: &[u8]) -> Option<Self> {
        WrappedParts::split(wrapped).map(|parts| parts.root_key)
    }
}

fn aead(key: &[u8; KEY_BYTES]) -> Result<LessSafeKey, CryptoError> {
    UnboundKey::new(&AES_256_GCM, key).map(LessSafeKey::new).map_err(|_| CryptoError::Malformed)
}

struct SealedParts<'a> {
    wrapped: &'a [u8],
    nonce: &'a [u8; NONCE_LEN],
    ciphertext: &'a [u8],
    tag: &'a [u8; TAG_BYTES],
}

impl<'a> SealedParts<'a> {
    fn split(sealed: &'a [u8]) -> Option<Self> {
        let rest = sealed.strip_prefix(&MAGIC)?;
        let (wrapped, rest) = rest.split_at_checked(WRAPPED_BYTES)?;
        let (nonce, rest) = rest.split_first_chunk()?;
        let (ciphertext, tag) = rest.split_last_chunk()?;
        Some(Self { wrapped, nonce, ciphertext, tag })
    }
}

struct WrappedParts<'a> {
    root_key: RootKeyId,
    nonce: &'a [u8; NONCE_LEN],
    key: &'a [u8; KEY_BYTES],
    tag: &'a [u8; TAG_BYTES],
}

impl<'a> WrappedParts<'a> {
    fn split(wrapped: &'a [u8]) -> Option<Self> {
        let (root_key, rest) = wrapped.split_first_chunk()?;
        let (nonce, rest) = rest.split_first_chunk()?;
        let (key, tag) = rest.split_first_chunk()?;
        Some(Self { root_key: RootKeyId::from_bytes(*root_key), nonce, key, tag: tag.try_into().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use data_encoding::HEXLOWER;
    use proptest::prelude::*;

    /// The parts of a slot, owned.
    #[derive(Debug, Clone, PartialEq)]
    struct Place {
        store_id: Uuid,
        environment: EnvironmentName,
        name: SecretName,
        version_id: VersionId,
        content_type: ContentType,
    }

    impl Place {
        fn new() -> Self {
            Self {
                store_id: Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff),
                environment: EnvironmentName::parse("production").unwrap(),
                name: SecretName::parse("database/main").unwrap(),
                version_id: VersionId::parse("11111111-2222-4333-8444-555555555555").unwrap(),
                content_type: ContentType::Text,
            }
        }

        fn slot(&self) -> Slot<'_> {
            Slot {
                store_id: self.store_id,
                environment: &self.environment,
                name: &self.name,
                version_id: &self.version_id,
                content_type: self.content_type,
            }
        }

        /// This place and others that differ from it in one component each, or shift a character between two.
        fn neighbours() -> Vec<Self> {
            let own = Self::new();
            let name = |text| SecretName::parse(text).unwrap();
            let environment = |text| EnvironmentName::parse(text).unwrap();
            vec![
                Self { store_id: Uuid::from_u128(1), ..own.clone() },
                Self { environment: environment("staging"), ..own.clone() },
                Self { name: name("database"), ..own.clone() },
                Self { version_id: VersionId::parse(&"6".repeat(36)).unwrap(), ..own.clone() },
                Self { content_type: ContentType::Binary, ..own.clone() },
                Self { environment: environment("productiond"), name: name("atabase/main"), ..own.clone() },
                own,
            ]
        }

        fn value(&self, text: &str) -> SecretValue {
            SecretValue::new(text.as_bytes().to_vec(), self.content_type).unwrap()
        }
    }

    fn root(seed: u8) -> RootKey {
        RootKey::from_bytes(&[seed; KEY_BYTES]).unwrap()
    }

    fn counting<const N: usize>(from: u8) -> [u8; N] {
        std::array::from_fn(|index| from + index as u8)
    }

    fn known() -> (RootKey, Vec<u8>) {
        let root = RootKey::from_bytes(&counting(0)).unwrap();
        let fresh = Fresh {
            data_key: Zeroizing::new(counting(0x20)),
            wrap_nonce: counting(0xa0),
            value_nonce: counting(0xb0),
        };
        let place = Place::new();
        let sealed = root.seal_with(&place.slot(), &place.value("correct horse"), &fresh).unwrap();
        (root, sealed)
    }

    /// Computed apart from this program, after the drawing at the top: whoever changes layout or associated data
    /// finds out here that sealed stores could no longer be read.
    #[test]
    fn the_format_is_pinned() {
        let (root, sealed) = known();
        let expected = concat!(
            "434c5631",
            "89a87a262e63cd97051a13084209db9f",
            "a0a1a2a3a4a5a6a7a8a9aaab",
            "c6395e0e61ee24984a4cadf82b57eef1409d6b23a682745ba4371cbd43964b3e",
            "c7831806eeff56888db6d0b4bc17fb03",
            "b0b1b2b3b4b5b6b7b8b9babb",
            "55955835f740bc2e5a626f8966",
            "316f677e6f24d9523af971e9b83230cd",
        );
        assert_eq!(HEXLOWER.encode(&sealed), expected);
        let opened = root.open(&Place::new().slot(), &sealed).unwrap();
        assert_eq!(opened.expose(), b"correct horse");
        assert_eq!(opened.content_type(), ContentType::Text);
    }

    #[test]
    fn a_ciphertext_fits_one_slot() {
        let root = root(1);
        let places = Place::neighbours();
        for own in &places {
            let sealed = root.seal(&own.slot(), &own.value("value")).unwrap();
            for place in &places {
                let opened = root.open(&place.slot(), &sealed);
                if place == own {
                    assert_eq!(opened.unwrap().expose(), b"value");
                } else {
                    assert_eq!(opened.unwrap_err(), CryptoError::Tampered, "{own:?} in {place:?}");
                }
            }
        }
    }

    #[test]
    fn every_bit_counts() {
        let (root, sealed) = known();
        for position in 0..sealed.len() {
            for bit in 0..8 {
                let mut changed = sealed.clone();
                changed[position] ^= 1 << bit;
                let error = root.open(&Place::new().slot(), &changed).unwrap_err();
                let expected = match position {
                    0..4 => matches!(error, CryptoError::Malformed),
                    4..20 => matches!(error, CryptoError::WrongKey { given, .. } if given == root.id()),
                    _ => error == CryptoError::Tampered,
                };
                assert!(expected, "bit {bit} of byte {position}: {error}");
            }
        }
    }

    #[test]
    fn what_is_cut_or_lengthened_is_refused() {
        let (root, sealed) = known();
        for length in 0..sealed.len() {
            assert!(root.open(&Place::new().slot(), &sealed[..length]).is_err(), "{length} bytes");
        }
        let longer = [sealed.as_slice(), &[0]].concat();
        assert_eq!(root.open(&Place::new().slot(), &longer).unwrap_err(), CryptoError::Tampered);
    }

    /// The two halves of an envelope belong together, although each is whole.
    #[test]
    fn a_wrapped_key_does_not_fit_another_value() {
        let root = root(1);
        let place = Place::new();
        let one = root.seal(&place.slot(), &place.value("one")).unwrap();
        let two = root.seal(&place.slot(), &place.value("two")).unwrap();
        let (header, _) = one.split_at(MAGIC.len() + WRAPPED_BYTES);
        let (_, body) = two.split_at(MAGIC.len() + WRAPPED_BYTES);
        let mixed = [header, body].concat();
        assert_eq!(root.open(&place.slot(), &mixed).unwrap_err(), CryptoError::Tampered);
    }

    #[test]
    fn another_root_key_is_called_the_wrong_one() {
        let place = Place::new();
        let sealed = root(1).seal(&place.slot(), &place.value("value")).unwrap();
        let error = root(2).open(&place.slot(), &sealed).unwrap_err();
        assert_eq!(error, CryptoError::WrongKey { sealed_under: root(1).id(), given: root(2).id() });
        let expected = format!("sealed under {}, the key given is {}", root(1).id(), root(2).id());
        assert!(error.to_string().contains(&expected), "{error}");
    }

    #[test]
    fn a_value_of_another_content_type_than_its_slot_is_not_sealed() {
        let place = Place::new();
        let binary = SecretValue::binary(b"value".to_vec()).unwrap();
        assert_eq!(root(1).seal(&place.slot(), &binary).unwrap_err(), CryptoError::Malformed);
    }

    #[test]
    fn nothing_repeats_between_two_sealings() {
        let place = Place::new();
        let seal = || root(1).seal(&place.slot(), &place.value("value")).unwrap();
        let (one, two) = (seal(), seal());
        assert_ne!(one[20..32], two[20..32], "wrap nonce");
        assert_ne!(one[32..64], two[32..64], "data key");
        assert_ne!(one[80..92], two[80..92], "value nonce");
        assert_ne!(one[92..], two[92..], "ciphertext");
    }

    proptest! {
        #[test]
        fn what_is_sealed_opens_to_the_same(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let place = Place { content_type: ContentType::Binary, ..Place::new() };
            let value = SecretValue::binary(bytes).unwrap();
            let sealed = root(1).seal(&place.slot(), &value).unwrap();
            prop_assert_eq!(sealed.len(), 92 + value.len() + 16);
            prop_assert!(root(1).open(&place.slot(), &sealed).unwrap().same_as(&value));
        }

        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let with_magic = [MAGIC.as_slice(), &bytes].concat();
            prop_assert!(root(1).open(&Place::new().slot(), &bytes).is_err());
            prop_assert!(root(1).open(&Place::new().slot(), &with_magic).is_err());
        }
    }
}
