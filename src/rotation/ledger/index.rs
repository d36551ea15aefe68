//! What is due, in the order in which it is, without a look at what is not.

use jiff::Timestamp;

use super::super::Failure;
use super::super::record::Rotation;
use super::{Ledger, RECORDS, Stored, id_in, parse_id, record_key, unavailable};
use crate::kv::{Compare, Entry, Transaction, Write};
use crate::secret::{EnvironmentName, SecretId};

const DUE: &str = "rotation/due/";
/// How many digits a time has.
const DIGITS: usize = 20;
/// How many keys are read at a time.
const PAGE: usize = 256;
/// What errors call all of them.
const ALL: &str = "all secrets";

impl Ledger {
    /// What wants attention at `now`, earliest first, at most `limit`. Hints: the record decides.
    ///
    /// # Errors
    /// [`Trouble::StoreUnavailable`](super::super::Trouble::StoreUnavailable).
    pub async fn due(
        &self,
        now: Timestamp,
        environment: Option<&EnvironmentName>,
        limit: usize,
    ) -> Result<Vec<SecretId>, Failure> {
        let latest = now.as_millisecond();
        let (mut found, mut after) = (Vec::new(), Vec::new());
        while found.len() < limit {
            let page = self.kv.range(DUE.as_bytes(), &after, PAGE).await.map_err(unavailable(ALL))?;
            for (at, id) in page.entries.iter().filter_map(|entry| parse(&entry.key)) {
                if at > latest || found.len() >= limit {
                    return Ok(found);
                }
                if environment.is_none_or(|environment| *environment == id.environment) {
                    found.push(id);
                }
            }
            match page.entries.last() {
                Some(last) if page.more => after.clone_from(&last.key),
                _ => break,
            }
        }
        Ok(found)
    }

    /// When the first of all wants attention, be it overdue or yet to come.
    ///
    /// # Errors
    /// [`Trouble::StoreUnavailable`](super::super::Trouble::StoreUnavailable).
    pub async fn next_attention(&self) -> Result<Option<Timestamp>, Failure> {
        let page = self.kv.range(DUE.as_bytes(), &[], 1).await.map_err(unavailable(ALL))?;
        let first = page.entries.first().and_then(|entry| parse(&entry.key));
        Ok(first.and_then(|(at, _)| Timestamp::from_millisecond(at).ok()))
    }

    /// Gives every record that can be read the entry that it lacks, and removes the entries that are due and don't fit
    /// their records; how many of both. To be called at the start and now and then: it looks at every record.
    ///
    /// # Errors
    /// [`Trouble::StoreUnavailable`](super::super::Trouble::StoreUnavailable); what was mended until then stays.
    pub async fn mend_index(&self) -> Result<u64, Failure> {
        Ok(self.add_what_lacks().await? + self.remove_what_misleads().await?)
    }

    async fn add_what_lacks(&self) -> Result<u64, Failure> {
        let (mut added, mut after) = (0, Vec::new());
        loop {
            let page = self.kv.range(RECORDS.as_bytes(), &after, PAGE).await.map_err(unavailable(ALL))?;
            for entry in &page.entries {
                added += u64::from(self.add_if_it_lacks(entry).await?);
            }
            match page.entries.last() {
                Some(last) if page.more => after.clone_from(&last.key),
                _ => return Ok(added),
            }
        }
    }

    async fn add_if_it_lacks(&self, entry: &Entry) -> Result<bool, Failure> {
        let Some(id) = id_in(&entry.key, RECORDS) else { return Ok(false) };
        let Ok(rotation) = Rotation::decode(&self.key, &id, &entry.value) else { return Ok(false) };
        let Some(due) = key_of(&id, &rotation) else { return Ok(false) };
        if self.kv.get(&due).await.map_err(unavailable(&id))?.is_some() {
            return Ok(false);
        }
        let compare = vec![Compare::unchanged(entry.key.clone(), Some(entry))];
        self.commit(&id, Transaction { compare, write: vec![Write::put(due, Vec::new())] }).await
    }

    /// What misleads and is not due yet does no harm until then.
    async fn remove_what_misleads(&self) -> Result<u64, Failure> {
        let latest = self.clock.now().as_millisecond();
        let (mut removed, mut after) = (0, Vec::new());
        loop {
            let page = self.kv.range(DUE.as_bytes(), &after, PAGE).await.map_err(unavailable(ALL))?;
            for entry in &page.entries {
                match parse(&entry.key) {
                    Some((at, _)) if at > latest => return Ok(removed),
                    Some((_, id)) => removed += u64::from(self.remove_if_it_misleads(&entry.key, &id).await?),
                    None => removed += u64::from(self.remove(&entry.key).await?),
                }
            }
            match page.entries.last() {
                Some(last) if page.more => after.clone_from(&last.key),
                _ => return Ok(removed),
            }
        }
    }

    /// A record that can't be read keeps its entry: it may be of a newer version, whose brokers can.
    async fn remove_if_it_misleads(&self, due: &[u8], id: &SecretId) -> Result<bool, Failure> {
        let stored = match self.stored(id).await {
            Ok(stored) => stored,
            Err(failure) if failure.trouble == super::Trouble::RecordUnreadable => return Ok(false),
            Err(failure) => return Err(failure),
        };
        let fits = |stored: &Stored| key_of(id, &stored.rotation).is_some_and(|key| key == due);
        if stored.as_ref().is_some_and(fits) {
            return Ok(false);
        }
        let revision = stored.map_or(0, |stored| stored.revision);
        let compare = vec![Compare::ModRevision(record_key(id), revision)];
        self.commit(id, Transaction { compare, write: vec![Write::delete(due)] }).await
    }

    async fn remove(&self, due: &[u8]) -> Result<bool, Failure> {
        let transaction = Transaction { compare: Vec::new(), write: vec![Write::delete(due)] };
        Ok(self.kv.commit(transaction).await.map_err(unavailable(ALL))?.succeeded)
    }
}

/// Where a rotation stands in the index; `None` where nobody should look at it.
pub(super) fn key_of(id: &SecretId, rotation: &Rotation) -> Option<Vec<u8>> {
    let at = millis(rotation.attention_at()?);
    Some(format!("{DUE}{at:0DIGITS$}/{}/{}", id.environment, id.name).into_bytes())
}

/// Milliseconds since 1970, rounded up; what is before that is all the same.
fn millis(at: Timestamp) -> i64 {
    const NANOSECONDS: i128 = 1_000_000;
    let up = at.as_nanosecond().saturating_add(NANOSECONDS - 1).div_euclid(NANOSECONDS);
    i64::try_from(up).unwrap_or(i64::MAX).max(0)
}

fn parse(key: &[u8]) -> Option<(i64, SecretId)> {
    let (at, id) = std::str::from_utf8(key).ok()?.strip_prefix(DUE)?.split_once('/')?;
    let plain = at.len() == DIGITS && at.bytes().all(|byte| byte.is_ascii_digit());
    Some((plain.then(|| at.parse().ok())??, parse_id(id)?))
}
