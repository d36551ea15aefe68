//! Whether an environment's records add up, and the walk over them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OnceCell;

use super::root::Members;
use super::{ATTEMPTS, Sealed, contended, keys, record, tampered, the_record, unavailable};
use crate::kv::Entry;
use crate::secret::{EnvironmentName, SecretId};
use crate::store::StoreError;

/// How many records one range read fetches.
const PAGE: usize = 128;

/// The environments whose records were found to add up since the start, each compared once.
#[derive(Default)]
pub(super) struct Verified(Mutex<HashMap<EnvironmentName, Arc<OnceCell<()>>>>);

impl Verified {
    fn cell(&self, environment: &EnvironmentName) -> Arc<OnceCell<()>> {
        let mut cells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(cells.entry(environment.clone()).or_default())
    }
}

impl Sealed {
    /// Compares an environment's records with its root, the first time that the environment is used.
    pub(super) async fn verified(&self, environment: &EnvironmentName) -> Result<(), StoreError> {
        let cell = self.verified.cell(environment);
        cell.get_or_try_init(|| self.verify(environment)).await.map(|_| ())
    }

    async fn verify(&self, environment: &EnvironmentName) -> Result<(), StoreError> {
        let _writer = self.writer.lock().await;
        for _ in 0..ATTEMPTS {
            let (root, revision) = self.root(environment).await?;
            let found = self.members(environment).await?;
            // Every change of a record changes the root: where that stood still, so did all that was read between.
            if self.root(environment).await?.1 != revision {
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

    async fn members(&self, environment: &EnvironmentName) -> Result<Members, StoreError> {
        let mut records = Records::of(self, environment, "", &[]);
        let mut members = Members::default();
        while let Some((id, entry)) = records.next().await? {
            let (mac, _) = record::authenticate(&self.meta.integrity, &id, &entry.value)
                .ok_or_else(|| tampered(the_record(&id)))?;
            members.add(&self.meta.integrity, &mac);
        }
        Ok(members)
    }
}

/// Walks an environment's records in the order of their names, a page at a time. What it gives is not yet checked.
pub(super) struct Records<'a> {
    store: &'a Sealed,
    environment: &'a EnvironmentName,
    prefix: Vec<u8>,
    after: Vec<u8>,
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
        Self { store, environment, prefix, after: after.to_vec(), page: Vec::new().into_iter(), more: true }
    }

    pub(super) async fn next(&mut self) -> Result<Option<(SecretId, Entry)>, StoreError> {
        loop {
            if let Some(entry) = self.page.next() {
                let id = keys::secret(self.environment, &entry.key)
                    .ok_or_else(|| tampered(format!("a key of environment `{}`", self.environment)))?;
                return Ok(Some((id, entry)));
            }
            if !self.more {
                return Ok(None);
            }
            let page = self.store.kv.range(&self.prefix, &self.after, PAGE).await;
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
