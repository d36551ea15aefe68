//! What the records of one environment add up to, so that none can be removed, added or brought back from the past
//! although each by itself is authentic.
//!
//! ```text
//! offset  bytes
//!      0     32  MAC of the rest, for this environment
//!     32      8  generation: grows by one with every change of a record   (big-endian, as is the count)
//!     40      8  count of the records
//!     48     32  nonce, random with every change
//!     80     32  sum of the members ⊕ mask
//!
//! member = HMAC(integrity key, a record's MAC)      sum = Σ members mod 2^256      mask = HMAC(integrity key, nonce)
//! ```
//!
//! The sum is a multiset hash, as MSet-Add-Hash of Clarke, Devadas, van Dijk, Gassend and Suh (ASIACRYPT 2003): one
//! change of one record changes it at a constant cost. The mask is new with every write because bare sums would give
//! away members, and whoever collects members of many old records could look for a set of them with the same sum.
//!
//! INVARIANT: a transaction that changes a record changes its environment's root, and compares both first.

use crate::crypto::{CryptoError, MAC_BYTES, Mac, MacKey, random};
use crate::secret::EnvironmentName;

const LABEL: &[u8] = b"claviger environment root v1";
const MEMBER: &[u8] = b"claviger set member v1";
const MASK: &[u8] = b"claviger set mask v1";
const NONCE_BYTES: usize = 32;

/// The root of an environment. The default is that of one without records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Root {
    pub(super) generation: u64,
    pub(super) members: Members,
}

impl Root {
    /// The root after one change: a record with the MAC `removed` gone, one with the MAC `added` there.
    pub(super) fn after(&self, key: &MacKey, removed: Option<&Mac>, added: Option<&Mac>) -> Self {
        let mut members = self.members;
        if let Some(mac) = removed {
            members.remove(key, mac);
        }
        if let Some(mac) = added {
            members.add(key, mac);
        }
        Self { generation: self.generation + 1, members }
    }

    /// The bytes to store.
    pub(super) fn encode(&self, key: &MacKey, environment: &EnvironmentName) -> Result<Vec<u8>, CryptoError> {
        let nonce: [u8; NONCE_BYTES] = random()?;
        let body = [
            self.generation.to_be_bytes().as_slice(),
            &self.members.count.to_be_bytes(),
            &nonce,
            &masked(key, &nonce, &self.members.sum),
        ]
        .concat();
        let mac = key.sign(&[LABEL, environment.as_str().as_bytes(), &body]);
        Ok([mac.as_slice(), &body].concat())
    }

    /// The root that was stored for `environment`; `None` where the bytes are not authentic.
    pub(super) fn decode(key: &MacKey, environment: &EnvironmentName, stored: &[u8]) -> Option<Self> {
        let (mac, body) = stored.split_first_chunk()?;
        if !key.verify(&[LABEL, environment.as_str().as_bytes(), body], mac) {
            return None;
        }
        let (generation, rest) = body.split_first_chunk()?;
        let (count, rest) = rest.split_first_chunk()?;
        let (nonce, rest) = rest.split_first_chunk::<NONCE_BYTES>()?;
        let sum = masked(key, nonce, rest.try_into().ok()?);
        Some(Self {
            generation: u64::from_be_bytes(*generation),
            members: Members { count: u64::from_be_bytes(*count), sum },
        })
    }
}

/// Masks a sum, or takes the mask off again.
fn masked(key: &MacKey, nonce: &[u8; NONCE_BYTES], sum: &Mac) -> Mac {
    let mut masked = key.sign(&[MASK, nonce]);
    for (byte, sum) in masked.iter_mut().zip(sum) {
        *byte ^= sum;
    }
    masked
}

/// A set of records, by their MACs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Members {
    count: u64,
    /// Little-endian.
    sum: Mac,
}

impl Members {
    /// The set with the record that has this MAC.
    pub(super) fn add(&mut self, key: &MacKey, mac: &Mac) {
        let mut carry = false;
        for (byte, term) in self.sum.iter_mut().zip(member(key, mac)) {
            let (sum, over) = byte.overflowing_add(term);
            let (sum, again) = sum.overflowing_add(u8::from(carry));
            (*byte, carry) = (sum, over || again);
        }
        self.count = self.count.wrapping_add(1);
    }

    /// The set without the record that has this MAC.
    pub(super) fn remove(&mut self, key: &MacKey, mac: &Mac) {
        let mut borrow = false;
        for (byte, term) in self.sum.iter_mut().zip(member(key, mac)) {
            let (difference, under) = byte.overflowing_sub(term);
            let (difference, again) = difference.overflowing_sub(u8::from(borrow));
            (*byte, borrow) = (difference, under || again);
        }
        self.count = self.count.wrapping_sub(1);
    }
}

fn member(key: &MacKey, mac: &Mac) -> [u8; MAC_BYTES] {
    key.sign(&[MEMBER, mac])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::RootKey;
    use proptest::prelude::*;

    fn key() -> MacKey {
        let root = RootKey::from_bytes(&[1; 32]).unwrap();
        MacKey::create(&root, &[b"test"]).unwrap().0
    }

    fn environment(name: &str) -> EnvironmentName {
        EnvironmentName::parse(name).unwrap()
    }

    #[test]
    fn what_is_stored_is_read_back_in_its_environment_alone() {
        let key = key();
        let root = Root::default().after(&key, None, Some(&[1; 32])).after(&key, None, Some(&[2; 32]));
        let stored = root.encode(&key, &environment("a")).unwrap();
        assert_eq!(stored.len(), 112);
        assert_eq!(Root::decode(&key, &environment("a"), &stored), Some(root));
        assert_eq!(Root::decode(&key, &environment("b"), &stored), None);
        assert_eq!((root.generation, root.members.count), (2, 2));
    }

    #[test]
    fn every_byte_counts() {
        let key = key();
        let stored =
            Root::default().after(&key, None, Some(&[1; 32])).encode(&key, &environment("a")).unwrap();
        for position in 0..stored.len() {
            let mut changed = stored.clone();
            changed[position] ^= 1;
            assert_eq!(Root::decode(&key, &environment("a"), &changed), None, "byte {position}");
            assert_eq!(Root::decode(&key, &environment("a"), &stored[..position]), None, "{position} bytes");
        }
    }

    #[test]
    fn the_sum_is_never_stored_bare() {
        let key = key();
        let root = Root::default().after(&key, None, Some(&[1; 32]));
        let one = root.encode(&key, &environment("a")).unwrap();
        let two = root.encode(&key, &environment("a")).unwrap();
        assert_ne!(one[80..], two[80..]);
        assert_ne!(one[80..], root.members.sum);
    }

    #[test]
    fn a_changed_record_changes_the_set() {
        let key = key();
        let before = Root::default().after(&key, None, Some(&[1; 32]));
        let after = before.after(&key, Some(&[1; 32]), Some(&[2; 32]));
        assert_ne!(before.members, after.members);
        assert_eq!(after.members, Root::default().after(&key, None, Some(&[2; 32])).members);
        assert_eq!(after.after(&key, Some(&[2; 32]), None).members, Members::default());
    }

    proptest! {
        #[test]
        fn a_set_does_not_depend_on_its_history(
            macs in proptest::collection::btree_set(any::<[u8; 32]>(), 1..20),
            passing in proptest::collection::vec(any::<[u8; 32]>(), 0..10),
        ) {
            let key = key();
            let mut straight = Members::default();
            macs.iter().for_each(|mac| straight.add(&key, mac));
            let mut around = Members::default();
            passing.iter().for_each(|mac| around.add(&key, mac));
            macs.iter().rev().for_each(|mac| around.add(&key, mac));
            passing.iter().for_each(|mac| around.remove(&key, mac));
            prop_assert_eq!(straight, around);

            let first = macs.iter().next().unwrap();
            around.remove(&key, first);
            prop_assert_ne!(straight, around);
            around.add(&key, &[0; 32]);
            prop_assert!(first == &[0; 32] || straight != around);
        }
    }
}
