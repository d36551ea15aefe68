//! How far the store has come: how many changes the environments' roots count together.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use super::root::Root;
use super::{keys, not_opened, root_of, tampered};
use crate::crypto::MacKey;
use crate::kv::{Entry, Kv};
use crate::secret::EnvironmentName;
use crate::store::StoreError;

/// How many roots one range read fetches.
const PAGE: usize = 128;

/// The highest generation seen of each environment, and their sum.
///
/// INVARIANT: what is noted is the generation of a root that is committed and whose MAC was verified or made here.
/// Noting the highest, and not counting commits, keeps the sum right also where the reply to a commit was lost, its
/// caller hung up, or another broker made it: the next look at the environment's root makes up for it.
#[derive(Default)]
pub(super) struct Progress {
    seen: Mutex<HashMap<EnvironmentName, u64>>,
    total: AtomicU64,
}

impl Progress {
    /// What all roots in `kv` say.
    pub(super) async fn read(kv: &dyn Kv, key: &MacKey) -> Result<Self, StoreError> {
        let progress = Self::default();
        let mut after: Vec<u8> = Vec::new();
        loop {
            let page = kv.range(keys::ROOTS, &after, PAGE).await.map_err(not_opened)?;
            for entry in &page.entries {
                let (environment, root) = authentic(key, entry)?;
                progress.note(&environment, root.generation);
            }
            match page.entries.last() {
                Some(last) if page.more => after.clone_from(&last.key),
                _ => return Ok(progress),
            }
        }
    }

    /// Takes note of an environment's generation; one that was seen before, or is older, changes nothing.
    pub(super) fn note(&self, environment: &EnvironmentName, generation: u64) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let highest = seen.entry(environment.clone()).or_default();
        let grown = generation.saturating_sub(*highest);
        *highest += grown;
        self.total.fetch_add(grown, Relaxed);
    }

    /// The sum over all environments. It never shrinks.
    pub(super) fn total(&self) -> u64 {
        self.total.load(Relaxed)
    }
}

fn authentic(key: &MacKey, entry: &Entry) -> Result<(EnvironmentName, Root), StoreError> {
    let environment = keys::environment(&entry.key)
        .ok_or_else(|| tampered("a key among the roots of the environments".to_owned()))?;
    let root =
        Root::decode(key, &environment, &entry.value).ok_or_else(|| tampered(root_of(&environment)))?;
    Ok((environment, root))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_twice_or_late_counts_once() {
        let progress = Progress::default();
        let environment = |name| EnvironmentName::parse(name).unwrap();
        let steps = [("a", 3, 3), ("b", 2, 5), ("a", 3, 5), ("a", 1, 5), ("b", 4, 7), ("a", 0, 7)];
        for (name, generation, expected) in steps {
            progress.note(&environment(name), generation);
            assert_eq!(progress.total(), expected, "after {name} {generation}");
        }
    }
}
