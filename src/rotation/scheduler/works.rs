//! What the scheduler and the doors have in common: the engine, and what is counted, logged and waited for around it.

use std::sync::Arc;

use tokio::sync::{Notify, watch};

use super::super::Trouble;
use super::super::engine::{Engine, Order, Over, Told};
use super::super::machine::Phase;
use super::super::record::Rotation;
use super::figures::Figures;
use super::steps::Steps;
use super::tasks::Tasks;
use crate::broker::Broker;
use crate::secret::SecretId;

/// What the scheduler and the doors have in common.
#[derive(Clone)]
pub(in crate::rotation) struct Works {
    pub(in crate::rotation) broker: Arc<Broker>,
    pub(in crate::rotation) engine: Arc<Engine>,
    pub(in crate::rotation) figures: Arc<Figures>,
    pub(in crate::rotation) steps: Arc<Steps>,
    pub(in crate::rotation) waker: Waker,
    pub(in crate::rotation) tasks: Tasks,
}

/// Tells the scheduler to look now.
#[derive(Debug, Clone, Default)]
pub(in crate::rotation) struct Waker(Arc<Notify>);

impl Waker {
    /// Something may be due that was not.
    pub(in crate::rotation) fn wake(&self) {
        self.0.notify_one();
    }

    pub(super) async fn woken(&self) {
        self.0.notified().await;
    }
}

impl Works {
    pub(in crate::rotation) fn new(broker: Arc<Broker>, engine: Arc<Engine>) -> Self {
        let steps = Arc::new(Steps::new(Arc::clone(engine.clock())));
        let (waker, tasks) = (Waker::default(), Tasks::default());
        Self { broker, engine, figures: Arc::default(), steps, waker, tasks }
    }

    /// One activation, with what is counted and logged of it, whoever asked.
    pub(in crate::rotation) async fn activate(
        &self,
        id: &SecretId,
        order: &Order,
        tell: &(dyn Fn(Told) + Send + Sync),
    ) -> Over {
        let before = self.engine.ledger().get(id).await.ok().flatten();
        let over = self.engine.run(id, order, tell).await;
        self.figures.count(&over, before.as_ref().is_some_and(is_retiring));
        self.note_health(id, before.as_ref(), &over).await;
        log(id, order, &over);
        over
    }

    async fn note_health(&self, id: &SecretId, before: Option<&Rotation>, over: &Over) {
        let retires = before.is_some_and(|rotation| rotation.definition.retire_after.is_some());
        if matches!(over, Over::Ended { .. }) && !retires {
            return self.figures.note(id, None);
        }
        // How many failures there were, and what is left to do, only the record knows.
        if let Ok(rotation) = self.engine.ledger().get(id).await {
            self.figures.note(id, rotation.map(|rotation| rotation.health()));
        }
    }
}

/// Whether AWSCURRENT has moved, and only what was current before is still to be withdrawn.
pub(in crate::rotation) fn is_retiring(rotation: &Rotation) -> bool {
    rotation.run.as_ref().is_some_and(|run| run.phase() == Phase::Retire)
}

fn log(id: &SecretId, order: &Order, over: &Over) {
    let asked_by = order.asked_by.as_str();
    match over {
        Over::Ended { ending, .. } => tracing::info!(secret = %id, asked_by, ?ending, "a rotation is over"),
        Over::Unfinished { failure, retry_at, .. } if failure.trouble.needs_a_person() => {
            let (trouble, mend) = (failure.trouble.code(), failure.trouble.mend());
            tracing::error!(secret = %id, trouble, %failure, mend, %retry_at, "a rotation is blocked");
        }
        Over::Unfinished { failure, retry_at, .. } => {
            let trouble = failure.trouble.code();
            tracing::warn!(secret = %id, trouble, %failure, %retry_at, "a rotation is tried again later");
        }
        Over::Refused(failure) if failure.trouble != Trouble::Stopping => {
            tracing::error!(secret = %id, trouble = failure.trouble.code(), %failure, "a rotation can't begin");
        }
        _ => {}
    }
}

/// Waits until it says true, or nobody is left who could.
pub(in crate::rotation) async fn said(flag: &mut watch::Receiver<bool>) {
    let _ = flag.wait_for(|is| *is).await;
}
