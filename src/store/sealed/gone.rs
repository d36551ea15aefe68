//! Secrets whose recovery window is over: finding them without a look at all records each time, and removing them.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;

use super::Sealed;
use super::verify::Records;
use crate::secret::{EnvironmentName, SecretId};
use crate::store::StoreError;

/// What the last walk over each environment's records found.
///
/// INVARIANT: as long as an environment's root has the generation that it had before the walk, so do its records, and
/// what the walk found still holds, whoever else uses the store.
#[derive(Default)]
pub(super) struct Sweeps(Mutex<HashMap<EnvironmentName, Sweep>>);

struct Sweep {
    generation: u64,
    /// When the first recovery window ends; `None` where nothing is deleted.
    first_end: Option<Timestamp>,
}

impl Sweeps {
    /// Whether nothing is gone at `now`, as far as that can be known without a look.
    fn rules_out(&self, environment: &EnvironmentName, generation: u64, now: Timestamp) -> bool {
        let sweeps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sweeps.get(environment).is_some_and(|sweep| {
            sweep.generation == generation && sweep.first_end.is_none_or(|first_end| now < first_end)
        })
    }

    fn note(&self, environment: &EnvironmentName, sweep: Sweep) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(environment.clone(), sweep);
    }
}

impl Sealed {
    /// The secrets whose recovery window is over and whose remains, records and values, are still there: invisible,
    /// and sealed. [`purge`](Self::purge) removes them.
    ///
    /// Looks at every record, unless the environment is as it was at the last look and no window has ended since.
    ///
    /// # Errors
    /// As the methods of [`Store`](crate::store::Store).
    pub async fn gone(&self, environment: &EnvironmentName) -> Result<Vec<SecretId>, StoreError> {
        self.verified(environment).await?;
        let now = self.clock.now();
        // Before the records are read: what changes meanwhile makes the next call look again.
        let generation = self.root(environment).await?.0.generation;
        if self.sweeps.rules_out(environment, generation, now) {
            return Ok(Vec::new());
        }
        let mut records = Records::of(self, environment, "", &[]);
        let (mut gone, mut first_end) = (Vec::new(), None::<Timestamp>);
        while let Some((id, entry)) = records.next().await? {
            let Some(end) = self.decode(&id, &entry)?.record.deletion_at else { continue };
            first_end = Some(first_end.map_or(end, |first| first.min(end)));
            if end <= now {
                gone.push(id);
            }
        }
        self.sweeps.note(environment, Sweep { generation, first_end });
        Ok(gone)
    }

    /// Removes for good what is left of a secret whose recovery window is over: record and values. `false` where there
    /// was nothing to do: no remains, a window that is not over, or a name that is in use again.
    ///
    /// # Errors
    /// As the methods of [`Store`](crate::store::Store).
    pub async fn purge(&self, id: &SecretId) -> Result<bool, StoreError> {
        self.remove(id).await
    }
}
