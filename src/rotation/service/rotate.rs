//! One secret, rotated now, and waited for where the caller wants to know how it ends.
//!
//! ```text
//! activation ─▶ over? ─────────────────────────────────────────────▶ answer
//!     ▲           ├─ fails, may pass ─▶ wait until it is tried again ─┐
//!     │           └─ somebody's at it ─▶ look until that one is done ─┼─▶ over by another's hand ─▶ answer
//!     └────────────── still there, and so is the caller ◀─────────────┘
//! ```

use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, watch};

use super::super::engine::{Order, Over, Told, When};
use super::super::machine::Ending;
use super::super::record::{Ended, Run};
use super::super::scheduler::{Works, is_retiring};
use super::{Rotations, conflict, not_set, order};
use crate::broker::{BrokerError, Call};
use crate::error::Reason;
use crate::policy::{Action, Resource};
use crate::secret::SecretId;

/// How often a run that somebody else works on is looked at: at first, and at last.
const LOOK_AFTER: Duration = Duration::from_millis(100);
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_secs(1);

impl Rotations {
    /// Rotates a secret now, or joins the run in progress; one activation, or with `wait` as many as it takes while
    /// nobody is needed. `tell` hears of each phase, unless it is full, and with `wait` of each activation that was not
    /// the last.
    ///
    /// Where the caller stops waiting (drops this future, or the other end of `tell`), the activation comes to its end,
    /// and no other follows it.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Rotate`] on the secret. [`Reason::RotationNotFound`];
    /// [`Reason::RotationTooSoon`] where the last rotation is too fresh; [`Reason::Conflict`] where it is paused; and
    /// why else it could not begin.
    pub async fn rotate(
        &self,
        call: Call,
        id: SecretId,
        wait: bool,
        tell: mpsc::Sender<(SecretId, Told)>,
    ) -> Result<Over, BrokerError> {
        let (_here, here) = watch::channel(());
        let order = order(&call, When::Now);
        let (works, secret) = (self.works().clone(), id.clone());
        let asked = Asked { works, id: secret, order, wait, tell, here, joined: None };
        let asks = (Action::Rotate, Resource::Secret(id));
        self.changing(&call, "rotate", asks, asked.over()).await
    }
}

/// What was asked for, and who waits for it.
struct Asked {
    works: Works,
    id: SecretId,
    order: Order,
    wait: bool,
    tell: mpsc::Sender<(SecretId, Told)>,
    /// Ends with the caller.
    here: watch::Receiver<()>,
    /// When the run began that this waits for, once it is known.
    joined: Option<Timestamp>,
}

impl Asked {
    async fn over(mut self) -> Result<Over, BrokerError> {
        loop {
            let over = self.activate().await;
            if !self.wait {
                return answered(&self.id, over);
            }
            let goes_on = match &over {
                Over::Unfinished { failure, retry_at, .. } if !failure.trouble.needs_a_person() => {
                    self.join().await;
                    self.say(over.clone());
                    self.stays_until(*retry_at).await
                }
                Over::InProgress { .. } => {
                    self.join().await;
                    self.say(over.clone());
                    self.stays_while_others_work().await
                }
                // What was waited for may have come to its end by another's hand.
                Over::Ended { .. } | Over::Unfinished { .. } => return answered(&self.id, over),
                _ => false,
            };
            if let Some(over) = self.came_to_its_end().await {
                return Ok(over);
            }
            if !goes_on {
                return answered(&self.id, over);
            }
        }
    }

    async fn activate(&self) -> Over {
        let tell = |told: Told| {
            if matches!(told, Told::Phase { .. }) {
                self.say_told(told);
            }
        };
        self.works.activate(&self.id, &self.order, &tell).await
    }

    fn say(&self, over: Over) {
        self.say_told(Told::Over(over));
    }

    /// A caller who does not keep up misses something, and holds nothing up.
    fn say_told(&self, told: Told) {
        let _ = self.tell.try_send((self.id.clone(), told));
    }

    /// Remembers which run is in progress.
    async fn join(&mut self) {
        if self.joined.is_some() {
            return;
        }
        if let Ok(Some(rotation)) = self.works.engine.ledger().get(&self.id).await {
            let last = || rotation.history.last().map(|ended| ended.started_at);
            self.joined = rotation.run.as_ref().map(|run| run.started_at).or_else(last);
        }
    }

    /// How the run ended that was joined, if it has.
    async fn came_to_its_end(&self) -> Option<Over> {
        let joined = self.joined?;
        let rotation = self.works.engine.ledger().get(&self.id).await.ok().flatten()?;
        match &rotation.run {
            Some(run) if run.started_at == joined => is_retiring(&rotation).then(|| rotated(run)),
            _ => rotation.history.iter().rfind(|ended| ended.started_at == joined).map(ended),
        }
    }

    /// Whether the caller is still there when it is time for another try.
    async fn stays_until(&mut self, at: Timestamp) -> bool {
        let now = self.works.engine.clock().now();
        self.stays(Duration::try_from(at.duration_since(now)).unwrap_or_default()).await
    }

    /// Whether the caller is still there when the run is over, or whoever works on it should have been heard of.
    async fn stays_while_others_work(&mut self) -> bool {
        let mut every = LOOK_AFTER;
        loop {
            if !self.stays(every).await {
                return false;
            }
            every = (every * 2).min(LOOK_AT_LEAST_EVERY);
            if self.came_to_its_end().await.is_some() || self.is_free().await {
                return true;
            }
        }
    }

    /// Whether the run in progress is to be taken up by whoever comes first.
    async fn is_free(&self) -> bool {
        let now = self.works.engine.clock().now();
        let rotation = self.works.engine.ledger().get(&self.id).await.ok().flatten();
        rotation.is_some_and(|rotation| rotation.run.is_none_or(|run| run.not_before <= now))
    }

    /// Whether the caller is still there after `time`, and the broker does not end.
    async fn stays(&mut self, time: Duration) -> bool {
        let mut left = time;
        loop {
            // The engine is told to stop by a flag of its own, which is looked at now and then.
            let slice = left.min(LOOK_AT_LEAST_EVERY);
            if tokio::time::timeout(slice, self.leaves()).await.is_ok() || self.works.engine.is_stopping() {
                return false;
            }
            left = left.saturating_sub(slice);
            if left.is_zero() {
                return true;
            }
        }
    }

    async fn leaves(&mut self) {
        tokio::select! {
            // Nothing is ever said there: it only ends.
            _ = self.here.changed() => {}
            () = self.tell.closed() => {}
            () = self.works.tasks.ending() => {}
        }
    }
}

fn rotated(run: &Run) -> Over {
    let token = run.progress.as_ref().map(|progress| progress.token.clone());
    Over::Ended { ending: Ending::Rotated, token }
}

fn ended(ended: &Ended) -> Over {
    Over::Ended { ending: ended.ending, token: ended.token.clone() }
}

/// What could not begin is an error, so that it is on record as one.
pub(super) fn answered(id: &SecretId, over: Over) -> Result<Over, BrokerError> {
    let SecretId { environment, name } = id;
    match over {
        Over::NotSet => Err(not_set(id)),
        Over::Paused => Err(conflict(id, "is paused; resume it first")),
        Over::TooSoon { until } => {
            let message = format!(
                "secret `{name}` in environment `{environment}` was rotated a moment ago, and can't be again before \
                 {until:.0}: until then caches and programs may hold the value before the current one, for the \
                 environment's ttl and the rotation's grace"
            );
            Err(BrokerError::rejected(Reason::RotationTooSoon, message))
        }
        Over::Refused(failure) => Err(failure.into()),
        over => Ok(over),
    }
}
