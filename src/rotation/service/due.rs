//! All that is due, rotated for whoever asks: a cron job, or several at once.
//!
//! ```text
//! index: due ─▶ may the caller? ─┬─ yes ─▶ a few at once: on record ─▶ activation ─▶ told ─▶ counted
//!                                └─ no ──▶ left out: counted, on record once
//! ```

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::sync::{mpsc, watch};

use super::super::Failure;
use super::super::engine::{Order, Over, Told, When};
use super::super::scheduler::Works;
use super::rotate::answered;
use super::{Rotations, not_set, order};
use crate::broker::{BrokerError, Call};
use crate::error::{Reason, Reasoned as _};
use crate::policy::{Action, Resource};
use crate::secret::{EnvironmentName, SecretId};

const OPERATION: &str = "rotate_due";
/// What one round takes on at most. What is left stays due.
const MOST: usize = 100_000;
/// How long a result waits for a reader who does not read. After that, what does not fit is not told, until there is room
/// again: no reader holds up a rotation for longer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many decisions are made before others get their turn.
const CHUNK: usize = 256;
/// How many names of what was left out are on record.
const NAMED: usize = 10;

/// What is told of a round.
#[derive(Debug, Clone)]
pub enum Due {
    /// How many are due that the caller may rotate. Told first.
    Total(u64),
    /// What happens to one of them. In a dry run, `Over::Skipped` with the time since when it is due.
    Step(SecretId, Told),
    /// How many are over. Told after each, and at the end.
    Done(u64),
}

impl Rotations {
    /// Rotates all that is due, of one environment or of all, and that the caller may rotate; a few at once. `tell` hears
    /// how far it is. With `dry_run`, it only hears what would be rotated.
    ///
    /// Each secret is rotated once, however many ask at the same time: the others are told that it is in progress, or not
    /// due any more. What the caller may not rotate is left out, and on record in one piece. Where the caller is gone
    /// (drops this future, or the other end of `tell`), what has begun comes to its end, and the rest stays due.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Rotate`] on each secret. [`Reason::Denied`] where the environment named has
    /// something due and the caller may rotate none of it; [`Reason::EnvironmentNotFound`]; [`Reason::Unavailable`] for a
    /// while after the clock was set.
    pub async fn rotate_due(
        &self,
        call: Call,
        environment: Option<EnvironmentName>,
        dry_run: bool,
        tell: mpsc::Sender<Due>,
    ) -> Result<(), BrokerError> {
        let (_here, here) = watch::channel(());
        let order = order(&call, When::IfDue);
        let teller = Teller::new(tell, PATIENCE);
        let works = self.works().clone();
        let round = Round { works, call, order, environment, dry_run, teller, here };
        self.works().tasks.run(round.over()).await
    }
}

/// One round: who asked for what.
struct Round {
    works: Works,
    call: Call,
    order: Order,
    environment: Option<EnvironmentName>,
    dry_run: bool,
    teller: Teller,
    /// Ends with the caller.
    here: watch::Receiver<()>,
}

impl Round {
    async fn over(self) -> Result<(), BrokerError> {
        self.environment_is_declared().await?;
        // Read first: a step behind the look at the clocks must not make more due.
        let now = self.works.engine.clock().now();
        if !self.dry_run {
            self.clock_is_believed().await?;
        }
        let due = self.works.engine.ledger().due(now, self.environment.as_ref(), MOST).await?;
        let (permitted, left_out) = self.divide(due).await;
        self.record_left_out(&permitted, &left_out).await?;
        self.teller.result(Due::Total(u64::try_from(permitted.len()).unwrap_or(u64::MAX))).await;
        let at_once = self.works.engine.settings().concurrency;
        futures_util::stream::iter(permitted).for_each_concurrent(at_once, |id| self.one(id)).await;
        self.teller.all_told().await;
        Ok(())
    }

    /// An environment that is not declared is refused as it is everywhere else.
    async fn environment_is_declared(&self) -> Result<(), BrokerError> {
        let Some(environment) = &self.environment else { return Ok(()) };
        if self.works.broker.registry().get(environment).is_ok() {
            return Ok(());
        }
        let asks = (Action::Rotate, Resource::Environment(environment.clone()));
        self.works.broker.governed(&self.call, OPERATION, asks, false, async { Ok(()) }).await
    }

    /// After the clock was set, what is due may not be.
    async fn clock_is_believed(&self) -> Result<(), BrokerError> {
        let Some(held) = self.works.steps.held() else { return Ok(()) };
        let message = format!(
            "the broker's clock was set a moment ago, so that what is due may not be; ask again in {} seconds, or rotate \
             by name",
            held.as_secs().max(1)
        );
        Err(self.rejected(BrokerError::rejected(Reason::Unavailable, message)).await)
    }

    async fn rejected(&self, error: BrokerError) -> BrokerError {
        let environment = self.environment.as_ref().map_or("", EnvironmentName::as_str);
        self.works.broker.record_rejected(&self.call, OPERATION, (environment, ""), error).await
    }

    /// What the caller may rotate, and what not.
    async fn divide(&self, due: Vec<SecretId>) -> (Vec<SecretId>, Vec<SecretId>) {
        let (mut permitted, mut left_out) = (Vec::new(), Vec::new());
        for some in due.chunks(CHUNK) {
            for id in some {
                let resource = Resource::Secret(id.clone());
                match self.works.broker.would_permit(&self.call, Action::Rotate, &resource) {
                    true => permitted.push(id.clone()),
                    false => left_out.push(id.clone()),
                }
            }
            tokio::task::yield_now().await;
        }
        (permitted, left_out)
    }

    /// What the caller may not rotate is on record in one piece: a cron job of one team must not fill the log with the
    /// secrets of all the others.
    async fn record_left_out(
        &self,
        permitted: &[SecretId],
        left_out: &[SecretId],
    ) -> Result<(), BrokerError> {
        if left_out.is_empty() {
            return Ok(());
        }
        let named: Vec<_> = left_out.iter().take(NAMED).map(ToString::to_string).collect();
        let all = if left_out.len() > NAMED { ", …" } else { "" };
        let caller = &self.call.principal;
        let message = format!(
            "{caller} may not rotate {} of {} that are due: {}{all}",
            left_out.len(),
            permitted.len() + left_out.len(),
            named.join(", ")
        );
        let recorded = self.rejected(BrokerError::rejected(Reason::Denied, message)).await;
        if recorded.reason() != Reason::Denied {
            return Err(recorded);
        }
        match &self.environment {
            // A job that is meant for this environment, and can do nothing there, must not look well.
            Some(environment) if permitted.is_empty() => {
                let message = format!(
                    "{caller} may rotate nothing that is due in environment `{environment}`; ask whoever keeps the \
                     policies"
                );
                Err(BrokerError::rejected(Reason::Denied, message))
            }
            _ => Ok(()),
        }
    }

    async fn one(&self, id: SecretId) {
        if self.nobody_waits() {
            return;
        }
        let asks = (Action::Rotate, Resource::Secret(id.clone()));
        let mut kept = None;
        let work = async {
            let over = match self.dry_run {
                true => self.due_since(&id).await?,
                false => self.activate(&id).await,
            };
            kept = Some(over.clone());
            answered(&id, over)
        };
        let governed = self.works.broker.governed(&self.call, OPERATION, asks, !self.dry_run, work).await;
        let over = match (governed, kept) {
            (Ok(over), _) => over,
            (Err(_), Some(over)) => over,
            (Err(error), None) => Over::Refused(Failure::from(error)),
        };
        self.teller.over(id, over).await;
    }

    async fn activate(&self, id: &SecretId) -> Over {
        let tell = |told: Told| {
            if matches!(told, Told::Phase { .. }) {
                self.teller.passing(Due::Step(id.clone(), told));
            }
        };
        self.works.activate(id, &self.order, &tell).await
    }

    async fn due_since(&self, id: &SecretId) -> Result<Over, BrokerError> {
        let rotation = self.works.engine.ledger().get(id).await?.ok_or_else(|| not_set(id))?;
        Ok(rotation.attention_at().map_or(Over::Paused, |until| Over::Skipped { until }))
    }

    fn nobody_waits(&self) -> bool {
        self.teller.tell.is_closed()
            || self.here.has_changed().is_err()
            || self.works.tasks.is_ending()
            || self.works.engine.is_stopping()
    }
}

/// Tells the caller how far it is.
struct Teller {
    tell: mpsc::Sender<Due>,
    patience: Duration,
    done: AtomicU64,
    /// Whether the caller did not read for longer than is waited.
    behind: AtomicBool,
}

impl Teller {
    fn new(tell: mpsc::Sender<Due>, patience: Duration) -> Self {
        Self { tell, patience, done: AtomicU64::new(0), behind: AtomicBool::new(false) }
    }

    /// Something that can be missed.
    fn passing(&self, due: Due) {
        let _ = self.tell.try_send(due);
    }

    /// Something that is waited for, but not for ever, and not again of one who did not read the last time.
    async fn result(&self, due: Due) {
        let patience = if self.behind.load(Ordering::Relaxed) { Duration::ZERO } else { self.patience };
        let told = tokio::time::timeout(patience, self.tell.send(due)).await;
        self.behind.store(told.is_err(), Ordering::Relaxed);
    }

    async fn over(&self, id: SecretId, over: Over) {
        self.result(Due::Step(id, Told::Over(over))).await;
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        self.passing(Due::Done(done));
    }

    /// Counts that were missed are made good at the end.
    async fn all_told(&self) {
        self.result(Due::Done(self.done.load(Ordering::Relaxed))).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HUNG: Duration = Duration::from_secs(60);

    fn id(name: &str) -> SecretId {
        SecretId::parse("development", name).unwrap()
    }

    #[tokio::test]
    async fn a_reader_who_did_not_read_once_is_not_waited_for_again() {
        let (tell, mut told) = mpsc::channel(1);
        let teller = Teller::new(tell, Duration::from_millis(10));
        teller.over(id("first"), Over::NotSet).await;
        teller.over(id("second"), Over::NotSet).await;
        assert!(teller.behind.load(Ordering::Relaxed), "the second found no room");
        let teller = Teller { patience: HUNG * 60, ..teller };
        let others = async {
            for n in 0..1_000 {
                teller.over(id(&n.to_string()), Over::NotSet).await;
            }
        };
        tokio::time::timeout(HUNG, others).await.expect("hung");
        assert!(matches!(told.recv().await, Some(Due::Step(told, _)) if told == id("first")));
        teller.all_told().await;
        assert!(matches!(told.recv().await, Some(Due::Done(1_002))), "what was missed is made good");
        assert!(!teller.behind.load(Ordering::Relaxed), "there was room again");
    }

    #[tokio::test]
    async fn a_reader_who_reads_is_told_every_result() {
        let (tell, mut told) = mpsc::channel(1);
        let teller = Teller::new(tell, HUNG);
        let reader = tokio::spawn(async move {
            let mut results = 0;
            while let Some(due) = told.recv().await {
                results += u32::from(matches!(due, Due::Step(..)));
            }
            results
        });
        for n in 0..1_000 {
            teller.over(id(&n.to_string()), Over::NotSet).await;
        }
        drop(teller);
        assert_eq!(tokio::time::timeout(HUNG, reader).await.expect("hung").unwrap(), 1_000);
    }

    #[tokio::test]
    async fn a_reader_who_is_gone_holds_up_nothing() {
        let (tell, told) = mpsc::channel(1);
        let teller = Teller::new(tell, HUNG);
        drop(told);
        for n in 0..1_000 {
            teller.over(id(&n.to_string()), Over::NotSet).await;
        }
        assert_eq!(teller.done.load(Ordering::Relaxed), 1_000);
    }
}
