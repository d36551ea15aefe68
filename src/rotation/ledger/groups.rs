//! When a member of a group last began, so that the members of a pair never change together.

use std::time::Duration;

use jiff::Timestamp;

use super::super::Failure;
use super::{ATTEMPTS, Ledger, contended, unavailable};
use crate::crypto::MAC_BYTES;
use crate::kv::{Compare, Transaction, Write};
use crate::secret::{EnvironmentName, SecretId, SecretName};

const GROUPS: &str = "rotation/group/";
const LABEL: &[u8] = b"claviger rotation group v1";

impl Ledger {
    /// When a member of `group` in this environment last began, and which. What this broker did not write counts as
    /// nothing: it is no more than a deletion, which nobody notices either.
    ///
    /// # Errors
    /// [`Trouble::StoreUnavailable`](super::super::Trouble::StoreUnavailable).
    pub async fn group_began(
        &self,
        environment: &EnvironmentName,
        group: &str,
    ) -> Result<Option<(Timestamp, SecretName)>, Failure> {
        let key = key(environment, group);
        let entry = self.kv.get(&key).await.map_err(unavailable(environment))?;
        Ok(entry.and_then(|entry| self.read(&key, &entry.value)).map(|(began, _, by)| (began, by)))
    }

    /// Notes that a member of `group` begins, or goes on, now.
    ///
    /// # Errors
    /// [`Trouble::StoreUnavailable`](super::super::Trouble::StoreUnavailable).
    pub async fn note_group(&self, id: &SecretId, group: &str) -> Result<(), Failure> {
        let key = key(&id.environment, group);
        let write = vec![Write::put(key.clone(), self.written(&key, id, Duration::ZERO))];
        self.commit(id, Transaction { compare: Vec::new(), write }).await.map(drop)
    }

    /// As [`note_group`](Self::note_group), if no other member began within `gap` or its own; else when this one may. Of several
    /// that ask at once, one may. What was noted in the future, before the clock was set back, does not count.
    ///
    /// # Errors
    /// [`Trouble::StoreUnavailable`](super::super::Trouble::StoreUnavailable).
    pub async fn claim_group(
        &self,
        id: &SecretId,
        group: &str,
        gap: Duration,
    ) -> Result<Option<Timestamp>, Failure> {
        let key = key(&id.environment, group);
        for _ in 0..ATTEMPTS {
            let entry = self.kv.get(&key).await.map_err(unavailable(id))?;
            let noted = entry.as_ref().and_then(|entry| self.read(&key, &entry.value));
            let now = self.clock.now();
            let other = noted.filter(|(began, _, by)| *by != id.name && *began <= now);
            let until =
                |(began, theirs, _): (Timestamp, Duration, SecretName)| began.saturating_add(gap.max(theirs));
            let free_at = other.map(|noted| until(noted).unwrap_or(Timestamp::MAX));
            if let Some(free_at) = free_at.filter(|free_at| *free_at > now) {
                return Ok(Some(free_at));
            }
            let compare = vec![Compare::unchanged(key.clone(), entry.as_ref())];
            let write = vec![Write::put(key.clone(), self.written(&key, id, gap))];
            if self.commit(id, Transaction { compare, write }).await? {
                return Ok(None);
            }
        }
        Err(contended(id))
    }

    fn written(&self, key: &[u8], id: &SecretId, gap: Duration) -> Vec<u8> {
        let text = format!("{} {} {}", self.clock.now(), gap.as_secs(), id.name);
        [self.key.sign(&[LABEL, key, text.as_bytes()]).as_slice(), text.as_bytes()].concat()
    }

    fn read(&self, key: &[u8], value: &[u8]) -> Option<(Timestamp, Duration, SecretName)> {
        let (mac, text) = value.split_first_chunk::<MAC_BYTES>()?;
        if !self.key.verify(&[LABEL, key, text], mac) {
            return None;
        }
        let mut parts = std::str::from_utf8(text).ok()?.splitn(3, ' ');
        let began = parts.next()?.parse().ok()?;
        let gap = Duration::from_secs(parts.next()?.parse().ok()?);
        Some((began, gap, SecretName::parse(parts.next()?).ok()?))
    }
}

fn key(environment: &EnvironmentName, group: &str) -> Vec<u8> {
    format!("{GROUPS}{environment}/{group}").into_bytes()
}
