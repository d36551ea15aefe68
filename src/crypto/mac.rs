//! Message authentication of what is stored in the clear: HMAC-SHA256 under a key that the root key wraps.

use ring::hmac;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::memory::{Locked, wipe_stack_below};
use super::root_key::{KEY_BYTES, RootKey};
use super::{CryptoError, fill_random, length_of};

/// The size of a MAC.
pub const MAC_BYTES: usize = 32;

/// HMAC-SHA256 of a list of parts.
pub type Mac = [u8; MAC_BYTES];

/// A key for MACs, in a locked page and wiped with it. Root key rotation wraps it anew and leaves every MAC alone.
///
/// `ring`'s own type holds the two hash states that the key turns into, which are as good as the key, and does not
/// wipe them; here they live in the page that is wiped.
pub struct MacKey(Locked<hmac::Key>);

impl MacKey {
    /// A fresh key and the same key wrapped by `root` for `context`.
    ///
    /// # Errors
    /// [`CryptoError::Random`].
    pub fn create(root: &RootKey, context: &[&[u8]]) -> Result<(Self, Vec<u8>), CryptoError> {
        let created = Self::created(root, context);
        wipe_stack_below();
        created
    }

    #[inline(never)]
    fn created(root: &RootKey, context: &[&[u8]]) -> Result<(Self, Vec<u8>), CryptoError> {
        let mut bytes = Zeroizing::new([0_u8; KEY_BYTES]);
        fill_random(bytes.as_mut_slice())?;
        let wrapped = root.wrap_key(context, &bytes)?;
        Ok((Self::new(&bytes), wrapped))
    }

    /// The key that [`create`](Self::create) wrapped for the same context.
    ///
    /// # Errors
    /// [`CryptoError::WrongKey`], [`CryptoError::Tampered`], [`CryptoError::Malformed`].
    pub fn open(root: &RootKey, context: &[&[u8]], wrapped: &[u8]) -> Result<Self, CryptoError> {
        let opened = Self::opened(root, context, wrapped);
        wipe_stack_below();
        opened
    }

    #[inline(never)]
    fn opened(root: &RootKey, context: &[&[u8]], wrapped: &[u8]) -> Result<Self, CryptoError> {
        Ok(Self::new(&*root.unwrap_key(context, wrapped)?))
    }

    fn new(bytes: &[u8; KEY_BYTES]) -> Self {
        Self(Locked::new(hmac::Key::new(hmac::HMAC_SHA256, bytes)))
    }

    /// The MAC of `parts`, each taken with its length. The first part should say what the others are.
    #[must_use]
    pub fn sign(&self, parts: &[&[u8]]) -> Mac {
        let mut context = hmac::Context::with_key(&self.0);
        for part in parts {
            context.update(&length_of(part));
            context.update(part);
        }
        let mut mac = [0; MAC_BYTES];
        mac.copy_from_slice(context.sign().as_ref());
        mac
    }

    /// Whether `mac` is that of `parts`, in time that does not depend on where it differs.
    #[must_use]
    pub fn verify(&self, parts: &[&[u8]], mac: &Mac) -> bool {
        self.sign(parts).as_slice().ct_eq(mac.as_slice()).into()
    }
}

impl std::fmt::Debug for MacKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MacKey([redacted])")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use data_encoding::HEXLOWER;

    /// Computed apart from this program: HMAC-SHA256 under the bytes 0x00..0x1f of the parts `record`, ``, `ab`.
    #[test]
    fn macs_are_those_of_the_drawn_parts() {
        let bytes: [u8; KEY_BYTES] = std::array::from_fn(|index| index as u8);
        let key = MacKey::new(&bytes);
        assert_eq!(
            HEXLOWER.encode(&key.sign(&[b"record", b"", b"ab"])),
            "f250812722b6d7b1eaecc96076a5a312a807eb0e566d508f8d6ec9862d66dab6"
        );
    }

    #[test]
    fn a_mac_fits_its_parts_alone() {
        let key = MacKey::new(&[3; KEY_BYTES]);
        let mac = key.sign(&[b"record", b"a", b"bc"]);
        assert!(key.verify(&[b"record", b"a", b"bc"], &mac));
        assert!(!key.verify(&[b"record", b"ab", b"c"], &mac));
        assert!(!key.verify(&[b"record", b"a", b"bc", b""], &mac));
        assert!(!MacKey::new(&[4; KEY_BYTES]).verify(&[b"record", b"a", b"bc"], &mac));
        for position in 0..MAC_BYTES {
            let mut other = mac;
            other[position] ^= 1;
            assert!(!key.verify(&[b"record", b"a", b"bc"], &other), "byte {position}");
        }
    }

    #[test]
    fn a_wrapped_key_opens_in_its_context_under_its_root_key() {
        let root = RootKey::from_bytes(&[1; KEY_BYTES]).unwrap();
        let (key, wrapped) = MacKey::create(&root, &[b"integrity", b"store-1"]).unwrap();
        let again = MacKey::open(&root, &[b"integrity", b"store-1"], &wrapped).unwrap();
        assert_eq!(key.sign(&[b"x"]), again.sign(&[b"x"]));

        let elsewhere = MacKey::open(&root, &[b"integrity", b"store-2"], &wrapped);
        assert_eq!(elsewhere.unwrap_err(), CryptoError::Tampered);
        let other = RootKey::from_bytes(&[2; KEY_BYTES]).unwrap();
        assert_eq!(
            MacKey::open(&other, &[b"integrity", b"store-1"], &wrapped).unwrap_err(),
            CryptoError::WrongKey { sealed_under: root.id(), given: other.id() }
        );
    }

    #[test]
    fn debug_shows_nothing() {
        assert_eq!(format!("{:?}", MacKey::new(&[0xab; KEY_BYTES])), "MacKey([redacted])");
    }
}
