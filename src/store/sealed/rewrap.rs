//! How everything goes from earlier root keys to the newest one, while everyone reads and writes.
//!
//! ```text
//! 1  the store's own record       ─▶ the newest root key is in force: every new value is under it
//! 2  the values, page after page  ─▶ the wrapped key in each is replaced, compared with what was read
//! ```
//!
//! INVARIANT: a transaction that writes a new value compares the store's own record, whose root key the value is under.
//! So it is committed before step 1, and step 2 comes upon it, or it is decided anew under the newest key. When step 2 is
//! through, nothing is left under any other, whoever wrote meanwhile and however many brokers there are.
//!
//! Records and roots know a value by its tag (record.rs), which does not change, so that neither they nor the store's
//! generation do. Ended at any point, each value is under the key that it names; done
//! again, what is done already costs a look.

use std::collections::HashMap;
use std::sync::Arc;

use super::{ATTEMPTS, STORES_OWN, Sealed, keys, meta, not_its_own, not_opened, refused, tampered};
use crate::crypto::{CryptoError, RootKey, RootKeyId, Slot};
use crate::kv::{Compare, Entry, KvError, Transaction, Write};
use crate::secret::ContentType;
use crate::store::StoreError;

/// How many values are read, and written, at a time: with values of the largest size, 4 MiB.
const PAGE: usize = 64;

/// How far a rewrapping is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rewrapped {
    /// How many wrapped keys were looked at.
    pub done: u64,
    /// How many of them were wrapped anew.
    pub changed: u64,
}

impl Sealed {
    /// The root key that new values are under.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn root_key_in_force(&self) -> Result<RootKeyId, StoreError> {
        self.in_force(not_opened).await.map(|(key, _)| key.id())
    }

    /// How many keys of the store each root key wraps, by what they name. Reads every value, without opening any; one
    /// that is no sealed value at all is not counted.
    ///
    /// # Errors
    /// [`StoreError::NotOpened`] where the key-value store fails; as [`open`](Self::open).
    pub async fn wrapped(&self) -> Result<HashMap<RootKeyId, u64>, StoreError> {
        let mut wrapped = HashMap::from([(self.root_key_in_force().await?, 1)]);
        let mut pages = Pages::default();
        while let Some(entries) = pages.next(self).await? {
            for id in entries.iter().filter_map(|entry| RootKeyId::of_value(&entry.value)) {
                *wrapped.entry(id).or_default() += 1;
            }
        }
        Ok(wrapped)
    }

    /// Puts the newest root key in force, and wraps by it what is wrapped by others. `told` hears of every page.
    ///
    /// What can't be opened is left as it is, and the first of it is the error, after all else is done.
    ///
    /// # Errors
    /// [`StoreError::Tampered`] and [`StoreError::WrongKey`], naming the version; [`StoreError::NotOpened`] where the
    /// key-value store fails.
    pub async fn rewrap(&self, told: &mut (dyn FnMut(Rewrapped) + Send)) -> Result<Rewrapped, StoreError> {
        let mut so_far = Rewrapped { done: 1, changed: u64::from(self.put_in_force().await?) };
        let mut first_refusal = None;
        let mut pages = Pages::default();
        while let Some(entries) = pages.next(self).await? {
            so_far.done += entries.len() as u64;
            so_far.changed += self.rewrap_page(&entries, &mut first_refusal).await?;
            told(so_far);
        }
        first_refusal.map_or(Ok(so_far), Err)
    }

    /// The root key in force, and what holds for as long as it is that.
    pub(super) async fn in_force(
        &self,
        failed: impl FnOnce(KvError) -> StoreError + Send,
    ) -> Result<(Arc<RootKey>, Compare), StoreError> {
        let entry = self.own_record(failed).await?;
        let key = meta::root_key(&self.root_keys, &entry.value).map_err(|error| not_its_own(&error))?;
        Ok((key, Compare::unchanged(keys::META, Some(&entry))))
    }

    async fn own_record(
        &self,
        failed: impl FnOnce(KvError) -> StoreError + Send,
    ) -> Result<Entry, StoreError> {
        let entry = self.kv.get(keys::META).await.map_err(failed)?;
        entry.ok_or_else(|| tampered(format!("{STORES_OWN} which is missing,")))
    }

    /// Whether the newest root key was not in force already.
    async fn put_in_force(&self) -> Result<bool, StoreError> {
        for _ in 0..ATTEMPTS {
            let entry = self.own_record(not_opened).await?;
            let next = meta::rewrap(&self.root_keys, &entry.value).map_err(|error| not_its_own(&error))?;
            let Some(next) = next else { return Ok(false) };
            if self.replace(&[(&entry, next)]).await? {
                return Ok(true);
            }
        }
        Err(not_opened(format!("others changed {STORES_OWN} {ATTEMPTS} times in a row; try again")))
    }

    /// How many were wrapped anew.
    async fn rewrap_page(
        &self,
        entries: &[Entry],
        first_refusal: &mut Option<StoreError>,
    ) -> Result<u64, StoreError> {
        let mut changes = Vec::new();
        for entry in entries {
            match self.rewrapped(entry) {
                Ok(Some(value)) => changes.push((entry, value)),
                Ok(None) => {}
                Err(error) => {
                    first_refusal.get_or_insert(error);
                }
            }
        }
        if self.replace(&changes).await? {
            return Ok(changes.len() as u64);
        }
        // One of them changed meanwhile: it is gone, or it was written anew and so under the newest key.
        let mut changed = 0;
        for change in &changes {
            changed += u64::from(self.replace(std::slice::from_ref(change)).await?);
        }
        Ok(changed)
    }

    /// A value under the newest root key; `None` where it is so already.
    fn rewrapped(&self, entry: &Entry) -> Result<Option<Vec<u8>>, StoreError> {
        let place = keys::version(&entry.key);
        let (id, version_id) = place.ok_or_else(|| tampered("a key among the values".to_owned()))?;
        let under = |content_type| {
            let slot = Slot {
                store_id: self.meta.store_id,
                environment: &id.environment,
                name: &id.name,
                version_id: &version_id,
                content_type,
            };
            self.root_keys.rewrap(&slot, &entry.value)
        };
        // Its record would say which of the two it is; only that one authenticates.
        let rewrapped = match under(ContentType::Text) {
            Err(CryptoError::Tampered) => under(ContentType::Binary),
            rewrapped => rewrapped,
        };
        rewrapped.map_err(|error| refused(&id, &version_id, &error))
    }

    /// Replaces all of these where none of them changed since it was read, else none.
    async fn replace(&self, changes: &[(&Entry, Vec<u8>)]) -> Result<bool, StoreError> {
        if changes.is_empty() {
            return Ok(true);
        }
        let compare =
            changes.iter().map(|(entry, _)| Compare::unchanged(entry.key.clone(), Some(*entry))).collect();
        let write =
            changes.iter().map(|(entry, value)| Write::put(entry.key.clone(), value.clone())).collect();
        let outcome = self.kv.commit(Transaction { compare, write }).await.map_err(not_opened)?;
        Ok(outcome.succeeded)
    }
}

/// Walks all values in the order of their keys.
#[derive(Default)]
struct Pages {
    after: Vec<u8>,
    ended: bool,
}

impl Pages {
    /// The next of them; `None` after the last.
    async fn next(&mut self, store: &Sealed) -> Result<Option<Vec<Entry>>, StoreError> {
        if self.ended {
            return Ok(None);
        }
        let page = store.kv.range(keys::VALUES, &self.after, PAGE).await.map_err(not_opened)?;
        self.ended = !page.more;
        let Some(last) = page.entries.last() else { return Ok(None) };
        self.after.clone_from(&last.key);
        Ok(Some(page.entries))
    }
}
