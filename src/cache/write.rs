//! One change of a secret under way.
//!
//! INVARIANT: whatever becomes of it (done, refused, unknown, panicked), nothing that was fetched before it ended is
//! kept or joined after it. Only a refusal that proves that nothing changed leaves what was cached.

use std::sync::Arc;
use std::time::Duration;

use super::Inner;
use super::fetch::unavailable;
use super::tracker::Tracker;
use crate::secret::SecretId;
use crate::store::StoreError;

struct Change {
    cache: Arc<Inner>,
    id: SecretId,
    /// Whether the store refused for a reason that has nothing to do with what it holds.
    refused: bool,
}

/// Makes a change in a task of its own, so that what it did is learnt also where the caller goes away; `note` tells the
/// tracker what a success means.
pub(super) async fn change<T: Send + 'static>(
    cache: &Arc<Inner>,
    id: &SecretId,
    call: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    note: fn(&mut Tracker, &T, Duration),
) -> Result<T, StoreError> {
    let change = Change::begin(cache, id);
    let task = tokio::spawn(async move {
        let outcome = call.await;
        change.end(&outcome, note);
        outcome
    });
    task.await.unwrap_or_else(|_| {
        Err(unavailable(id, "the write ended without an answer; look before trying again"))
    })
}

impl Change {
    fn begin(cache: &Arc<Inner>, id: &SecretId) -> Self {
        let mut shard = cache.shard(id);
        shard.sweep(cache.clock.monotonic());
        shard.tracker(id).write_began();
        Self { cache: Arc::clone(cache), id: id.clone(), refused: false }
    }

    fn end<T>(mut self, outcome: &Result<T, StoreError>, note: fn(&mut Tracker, &T, Duration)) {
        match outcome {
            Ok(done) => {
                let now = self.cache.clock.monotonic();
                note(self.cache.shard(&self.id).tracker(&self.id), done, now);
            }
            Err(error) => self.refused = changed_nothing(error),
        }
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        let now = self.cache.clock.monotonic();
        let mut shard = self.cache.shard(&self.id);
        shard.tracker(&self.id).write_ended();
        if !self.refused {
            self.cache.memory.forget(&self.id);
        }
        shard.release(&self.id, now);
    }
}

/// Whether an error proves that the secret is as it was. A conflict does not: it proves that someone else changed it.
const fn changed_nothing(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::Invalid(_)
            | StoreError::LimitExceeded(_)
            | StoreError::Value(_)
            | StoreError::TokenReused { .. }
            | StoreError::Denied { .. }
    )
}
