//! Where things stand in the key-value layer.
//!
//! ```text
//! sealed/meta                             format, store id, wrapped integrity key      (meta.rs)
//! sealed/r/<environment>                  what the environment's records add up to     (root.rs)
//! sealed/s/<environment>/<name>           one secret: versions, labels, times          (record.rs)
//! sealed/v/<environment>/<name>\0<id>     one version's value                          (crypto::Slot)
//! ```
//!
//! An environment has no `/`, a name no NUL and a version id neither, so a key reads one way only, and the range of
//! an environment, of a name's prefix or of a secret's values holds nothing else.

use crate::secret::{EnvironmentName, SecretId, SecretName, VersionId};

/// What every key of the store starts with.
pub(super) const ALL: &[u8] = b"sealed/";
/// The store's own record.
pub(super) const META: &[u8] = b"sealed/meta";
/// What the keys of all environments' roots start with.
pub(super) const ROOTS: &[u8] = b"sealed/r/";

/// What the keys of all values start with.
pub(super) const VALUES: &[u8] = b"sealed/v/";

/// The key of an environment's root.
pub(super) fn root(environment: &EnvironmentName) -> Vec<u8> {
    [ROOTS, environment.as_str().as_bytes()].concat()
}

/// What the keys of an environment's records start with; and, with a prefix of names appended, those of the secrets
/// whose names start so.
pub(super) fn records(environment: &EnvironmentName) -> Vec<u8> {
    format!("sealed/s/{environment}/").into_bytes()
}

/// The key of a secret's record.
pub(super) fn record(id: &SecretId) -> Vec<u8> {
    format!("sealed/s/{}/{}", id.environment, id.name).into_bytes()
}

/// The key of a version's value.
pub(super) fn value(id: &SecretId, version: &VersionId) -> Vec<u8> {
    format!("sealed/v/{}/{}\0{version}", id.environment, id.name).into_bytes()
}

/// The environment whose root has this key; `None` where the key is not one that [`root`] makes.
pub(super) fn environment(key: &[u8]) -> Option<EnvironmentName> {
    EnvironmentName::parse(std::str::from_utf8(key.strip_prefix(ROOTS)?).ok()?).ok()
}

/// The secret whose record has this key; `None` where the key is not one that [`record`] makes.
pub(super) fn secret(environment: &EnvironmentName, key: &[u8]) -> Option<SecretId> {
    let name = key.strip_prefix(records(environment).as_slice())?;
    let name = SecretName::parse(std::str::from_utf8(name).ok()?).ok()?;
    Some(SecretId::new(environment.clone(), name))
}

/// The secret and the version whose value has this key; `None` where the key is not one that [`value`] makes.
pub(super) fn version(key: &[u8]) -> Option<(SecretId, VersionId)> {
    let text = std::str::from_utf8(key.strip_prefix(VALUES)?).ok()?;
    let (place, version) = text.split_once('\0')?;
    let (environment, name) = place.split_once('/')?;
    Some((SecretId::parse(environment, name).ok()?, VersionId::parse(version).ok()?))
}

/// Where a watcher of the key-value layer finds an environment's changes.
///
/// INVARIANT: a transaction that changes a record changes no other record of the environment, and changes its root.
impl super::Sealed {
    /// What the keys of the environment's records start with.
    pub(crate) fn watched_prefix(environment: &EnvironmentName) -> Vec<u8> {
        records(environment)
    }

    /// The key that changes with every record of the environment.
    pub(crate) fn watched_mark(environment: &EnvironmentName) -> Vec<u8> {
        root(environment)
    }

    /// The secret whose record has this key.
    pub(crate) fn watched_secret(environment: &EnvironmentName, key: &[u8]) -> Option<SecretId> {
        secret(environment, key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn no_two_places_share_a_key() {
        let version = VersionId::parse(&"1".repeat(32)).unwrap();
        let mut keys = BTreeSet::new();
        let mut count = 0;
        for environment in ["a", "a-b", "s", "v"] {
            for name in ["a", "a/b", "ab", "b", "a-b/a", "v/a/b", "meta"] {
                let id = SecretId::parse(environment, name).unwrap();
                keys.extend([record(&id), value(&id, &version)]);
                count += 2;
            }
            keys.insert(root(&EnvironmentName::parse(environment).unwrap()));
            count += 1;
        }
        keys.insert(META.to_vec());
        assert_eq!(keys.len(), count + 1);
        assert!(keys.iter().all(|key| key.starts_with(ALL)));
    }

    #[test]
    fn a_records_key_names_its_secret_in_its_environment_alone() {
        let id = SecretId::parse("pr-1", "a/b").unwrap();
        assert_eq!(secret(&id.environment, &record(&id)), Some(id.clone()));
        let other = EnvironmentName::parse("pr").unwrap();
        assert_eq!(secret(&other, &record(&id)), None);
        assert_eq!(secret(&id.environment, b"sealed/s/pr-1/a//b"), None);
        assert_eq!(secret(&id.environment, b"sealed/s/pr-1/\xff"), None);
    }

    #[test]
    fn a_roots_key_names_its_environment() {
        let name = EnvironmentName::parse("pr-1").unwrap();
        assert_eq!(root(&name), b"sealed/r/pr-1");
        assert_eq!(environment(&root(&name)), Some(name));
        for other in [b"sealed/r/".as_slice(), b"sealed/r/a/b", b"sealed/r/\xff", b"sealed/s/a", META] {
            assert_eq!(environment(other), None, "{other:?}");
        }
    }

    #[test]
    fn a_values_key_names_its_version() {
        let (id, one) = (SecretId::parse("pr-1", "a/b").unwrap(), VersionId::parse(&"1".repeat(32)).unwrap());
        assert!(value(&id, &one).starts_with(VALUES));
        assert_eq!(version(&value(&id, &one)), Some((id, one)));
        for other in
            [&b"sealed/v/pr-1/a"[..], b"sealed/v/pr-1\0x", b"sealed/v/a/b\0x", b"sealed/v/\xff", META]
        {
            assert_eq!(version(other), None, "{other:?}");
        }
    }
}
