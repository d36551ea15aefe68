//! Revisions for the secrets of a store that numbers nothing: what this broker knows to be current, in kv.
//!
//! ```text
//! observed/s/<environment>/<name>   the current version's id · `-` where there is none · `?` where that is not known
//! observed/r/<environment>          empty; changes with every one of them
//! ```
//!
//! Written when this broker changes a secret, and when a watch finds another version than is written here. These are
//! hints: whoever could write them could make watchers look at the store once more, and tell them nothing.

use crate::kv::{Compare, Kv, KvError, Revision, Transaction, Write};
use crate::secret::{EnvironmentName, SecretId, SecretName, VersionId};

use super::Current;

/// How often a lost race is run again.
const ATTEMPTS: usize = 8;
const GONE: &str = "-";
const UNKNOWN: &str = "?";

/// What the keys of an environment's secrets start with.
pub(super) fn prefix(environment: &EnvironmentName) -> Vec<u8> {
    format!("observed/s/{environment}/").into_bytes()
}

/// The key that changes with each of them.
pub(super) fn mark(environment: &EnvironmentName) -> Vec<u8> {
    format!("observed/r/{environment}").into_bytes()
}

/// The secret whose key this is.
pub(super) fn name(environment: &EnvironmentName, key: &[u8]) -> Option<SecretName> {
    let name = key.strip_prefix(prefix(environment).as_slice())?;
    SecretName::parse(std::str::from_utf8(name).ok()?).ok()
}

/// What stands there now.
pub(super) async fn read(kv: &dyn Kv, id: &SecretId) -> Result<Current, KvError> {
    let entry = kv.get(&key(id)).await?;
    Ok(entry.map_or(Current::Unknown, |entry| decode(&entry.value)))
}

/// What a stored value says. One that makes no sense says that something changed.
pub(super) fn decode(value: &[u8]) -> Current {
    match std::str::from_utf8(value) {
        Ok(GONE) => Current::Gone,
        Ok(text) => VersionId::parse(text).map_or(Current::Unknown, Current::Version),
        Err(_) => Current::Unknown,
    }
}

/// Writes what is current, where something else stands; with `unless_since`, only where nothing was written after that
/// revision: what was learnt before is not news.
pub(super) async fn write(
    kv: &dyn Kv,
    id: &SecretId,
    current: &Current,
    unless_since: Option<Revision>,
) -> Result<(), KvError> {
    let (key, value) = (key(id), encode(current));
    for _ in 0..ATTEMPTS {
        let entry = kv.get(&key).await?;
        let since = entry.as_ref().map_or(0, |entry| entry.mod_revision);
        let same = entry.as_ref().is_some_and(|entry| entry.value == value);
        if same || unless_since.is_some_and(|known| since > known) {
            return Ok(());
        }
        let compare = vec![Compare::unchanged(key.clone(), entry.as_ref())];
        let write =
            vec![Write::put(key.clone(), value.clone()), Write::put(mark(&id.environment), Vec::<u8>::new())];
        if kv.commit(Transaction { compare, write }).await?.succeeded {
            return Ok(());
        }
    }
    // Others wrote it so often that watchers are looking anyway.
    Ok(())
}

fn key(id: &SecretId) -> Vec<u8> {
    [prefix(&id.environment).as_slice(), id.name.as_str().as_bytes()].concat()
}

fn encode(current: &Current) -> Vec<u8> {
    match current {
        Current::Version(id) => id.as_str(),
        Current::Gone => GONE,
        Current::Unknown => UNKNOWN,
    }
    .as_bytes()
    .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;
    use crate::kv::embedded::Embedded;

    #[test]
    fn what_is_written_reads_the_same() {
        let version = Current::Version(VersionId::generate());
        for current in [version, Current::Gone, Current::Unknown] {
            assert_eq!(decode(&encode(&current)), current);
        }
        for rubbish in [&b""[..], b"\xff", b"short", b"--"] {
            assert_eq!(decode(rubbish), Current::Unknown, "{rubbish:?}");
        }
    }

    #[test]
    fn a_key_names_its_secret_in_its_environment_alone() {
        let id = SecretId::parse("pr-1", "a/b").unwrap();
        assert_eq!(name(&id.environment, &key(&id)), Some(id.name.clone()));
        let other = EnvironmentName::parse("pr").unwrap();
        assert_eq!(name(&other, &key(&id)), None);
        assert_eq!(name(&id.environment, &mark(&id.environment)), None);
    }

    #[tokio::test]
    async fn the_same_twice_is_no_change_and_old_news_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let kv = Embedded::open(&folder.path().join("claviger.db"), SystemClock::shared()).await.unwrap();
        let id = SecretId::parse("production", "database").unwrap();
        let (one, two) = (Current::Version(VersionId::generate()), Current::Version(VersionId::generate()));
        write(&kv, &id, &one, None).await.unwrap();
        let first = kv.revision().await.unwrap();
        write(&kv, &id, &one, None).await.unwrap();
        assert_eq!(kv.revision().await.unwrap(), first);
        write(&kv, &id, &two, Some(0)).await.unwrap();
        assert_eq!(read(&kv, &id).await.unwrap(), one, "it was learnt before the other was written");
        write(&kv, &id, &two, Some(first)).await.unwrap();
        assert_eq!(read(&kv, &id).await.unwrap(), two);
        let marked = kv.get(&mark(&id.environment)).await.unwrap().unwrap();
        assert_eq!(marked.mod_revision, kv.revision().await.unwrap());
    }
}
