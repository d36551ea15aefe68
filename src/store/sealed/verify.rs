//! Whether an environment's records add up, and the walk over them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::root::Members;
use super::{ATTEMPTS, Sealed, contended, keys, record, tampered, the_record, unavailable};
use crate::kv::{Entry, Revision};
use crate::secret::{EnvironmentName, SecretId};
use crate::store::StoreError;

/// How many records one range read fetches.
const PAGE: usize = 128;

/// The environments that were used since the start. Each is compared once.
#[derive(Default)]
pub(super) struct Verified(Mutex<HashMap<EnvironmentName, Arc<Check>>>);

/// What is known of one environment.
#[derive(Default)]
struct Check {
    adds_up: AtomicBool,
    /// How far the comparison is; held by the one who is at it.
    walk: tokio::sync::Mutex<Walk>,
}

/// A comparison under way. It takes time in proportion to all records, maybe more than a caller has: whoever gives up
/// leaves it where it stands, and the next one goes on from there.
#[derive(Default)]
struct Walk {
    /// The revision of the root that it began with.
    root: Option<Revision>,
    members: Members,
    /// The key of the last record that is among the members.
    after: Vec<u8>,
}

impl Verified {
    fn check(&self, environment: &EnvironmentName) -> Arc<Check> {
        let mut checks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(check) = checks.get(environment) {
            return Arc::clone(check);
        }
        Arc::clone(checks.entry(environment.clone()).or_default())
    }
}

impl Sealed {
    /// Compares an environment's records with its root, the first time that the environment is used.
    pub(super) async fn verified(&self, environment: &EnvironmentName) -> Result<(), StoreError> {
        let check = self.verified.check(environment);
        if check.adds_up.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut walk = check.walk.lock().await;
        if check.adds_up.load(Ordering::Acquire) {
            return Ok(());
        }
        let compared = self.verify(environment, &mut walk).await;
        match &compared {
            Ok(()) => check.adds_up.store(true, Ordering::Release),
            Err(error) if error.is_transient() => {}
            Err(_) => *walk = Walk::default(),
        }
        compared
    }

    /// Nobody in this process changes a record meanwhile: every change waits for this first.
    async fn verify(&self, environment: &EnvironmentName, walk: &mut Walk) -> Result<(), StoreError> {
        for _ in 0..ATTEMPTS {
            let (root, revision) = self.root(environment).await?;
            if walk.root != Some(revision) {
                *walk = Walk { root: Some(revision), ..Walk::default() };
            }
            self.add_up(environment, walk).await?;
            // Every change of a record changes the root: where that stood still, so did all that was read between.
            let unchanged = self.root(environment).await?.1 == revision;
            let found = std::mem::take(walk).members;
            if !unchanged {
                continue;
            }
            return if root.members == found {
                Ok(())
            } else {
                Err(tampered(format!("the set of secrets of environment `{environment}`")))
            };
        }
        Err(contended(environment))
    }

    /// Adds the records to the members of the walk that are not among them yet.
    async fn add_up(&self, environment: &EnvironmentName, walk: &mut Walk) -> Result<(), StoreError> {
        let (key, prefix) = (&self.meta.integrity, keys::records(environment));
        loop {
            let page = self.kv.range(&prefix, &walk.after, PAGE).await.map_err(unavailable(environment))?;
            // Nothing waits from here to the next page, so that a page is among the members as a whole or not at all.
            for entry in &page.entries {
                let id = secret(environment, entry)?;
                let (mac, _) =
                    record::authenticate(key, &id, &entry.value).ok_or_else(|| tampered(the_record(&id)))?;
                walk.members.add(key, &mac);
            }
            let Some(last) = page.entries.last() else { return Ok(()) };
            walk.after.clone_from(&last.key);
            if !page.more {
                return Ok(());
            }
        }
    }
}

/// The secret whose record this is said to be.
fn secret(environment: &EnvironmentName, entry: &Entry) -> Result<SecretId, StoreError> {
    keys::secret(environment, &entry.key)
        .ok_or_else(|| tampered(format!("a key of environment `{environment}`")))
}

/// Walks an environment's records in the order of their names, a page at a time. What it gives is not yet checked.
pub(super) struct Records<'a> {
    store: &'a Sealed,
    environment: &'a EnvironmentName,
    prefix: Vec<u8>,
    after: Vec<u8>,
    /// How many the next range read fetches.
    fetch: usize,
    page: std::vec::IntoIter<Entry>,
    more: bool,
}

impl<'a> Records<'a> {
    /// Those of the names that start with `prefix`, after the key `after`.
    pub(super) fn of(
        store: &'a Sealed,
        environment: &'a EnvironmentName,
        prefix: &str,
        after: &[u8],
    ) -> Self {
        let prefix = [keys::records(environment).as_slice(), prefix.as_bytes()].concat();
        let (after, page) = (after.to_vec(), Vec::new().into_iter());
        Self { store, environment, prefix, after, fetch: PAGE, page, more: true }
    }

    /// The same, where so many will do as a rule.
    pub(super) fn at_first(self, fetch: usize) -> Self {
        Self { fetch, ..self }
    }

    pub(super) async fn next(&mut self) -> Result<Option<(SecretId, Entry)>, StoreError> {
        loop {
            if let Some(entry) = self.page.next() {
                return Ok(Some((secret(self.environment, &entry)?, entry)));
            }
            if !self.more {
                return Ok(None);
            }
            let fetch = std::mem::replace(&mut self.fetch, PAGE);
            let page = self.store.kv.range(&self.prefix, &self.after, fetch).await;
            let page = page.map_err(unavailable(self.environment))?;
            self.more = page.more;
            match page.entries.last() {
                Some(last) => self.after.clone_from(&last.key),
                None => self.more = false,
            }
            self.page = page.entries.into_iter();
        }
    }
}
