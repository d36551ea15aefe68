//! Telling one watcher one thing at a time.
//!
//! ```text
//! prepare   token alive? ─▶ oldest untold ─▶ policy now ─▶ cached store ──▶ what there is to tell
//!              ▲                                  nothing new │
//!              └──────────── the bell ◀───────────────────────┘
//! release   what there is to tell ─▶ record, durable ─▶ settled ─▶ Told
//! ```
//!
//! `prepare` may be dropped at any point and takes nothing with it; only `release` changes what is owed.
//!
//! What leaves with its value is on record as `ok`; what is told without it as `unchanged`, like a read that found the
//! caller's own version: no value left. Both say to which consumer.

use std::collections::VecDeque;
use std::fmt;
use std::pin::pin;
use std::sync::Arc;

use tokio::task::JoinSet;

use super::channel::Origin;
use super::feed::Seated;
use super::look::{Look, look_when_due};
use super::seat::{End, Said, Untold};
use super::{Current, Event, PATIENCE, Subject, Told, is_absence};
use crate::audit::{Outcome, Record};
use crate::broker::{Broker, BrokerError, Call, Disclosed, record};
use crate::environment::Durability;
use crate::error::Reason;
use crate::kv::Revision;
use crate::policy::{Action, Decision, Grant, Resource};
use crate::secret::SecretName;
use crate::store::{Fetched, Order, StoreError};

/// A watch in place. Asked with [`next`](Self::next); dropping it ends it.
pub struct Watching {
    broker: Arc<Broker>,
    call: Arc<Call>,
    with_values: bool,
    seated: Seated,
    /// What is told before anything else.
    first: VecDeque<Event>,
}

/// What there is to tell.
enum Step {
    First(Event),
    Silence,
    Current { untold: Untold, grant: Grant, fetched: Fetched },
    Failed { untold: Untold, grant: Grant, error: StoreError },
    Refused { untold: Untold, decision: Option<Arc<Decision>>, error: BrokerError },
}

impl Watching {
    pub(super) fn new(
        broker: Arc<Broker>,
        call: Call,
        with_values: bool,
        seated: Seated,
        permitted: usize,
        problems: Vec<(SecretName, BrokerError)>,
    ) -> Self {
        let mut first = VecDeque::from([Event::Started { secrets: permitted }]);
        let problem = |(name, error): (SecretName, _)| Event::Problem { id: seated.channel.id(&name), error };
        first.extend(problems.into_iter().map(problem));
        if seated.channel.origin == Origin::Observed {
            seated.seat.look_at(seated.channel.next_look(seated.seat.number));
        }
        Self { broker, call: Arc::new(call), with_values, seated, first }
    }

    /// The next thing to tell; waits until there is one, or until `stop` is done.
    ///
    /// # Errors
    /// [`Reason::SlowConsumer`] where this was not asked for too long, [`Reason::LimitExceeded`] where its prefix came to
    /// cover more names than there is room for, [`Reason::Unauthenticated`] where the caller's credential has ended,
    /// [`Reason::Unavailable`] with `stop`, [`Reason::AuditUnavailable`]. After an error the watch is over, and nothing
    /// is lost: what was not told comes after the last revision that was.
    pub async fn next(&mut self, stop: impl Future<Output = ()>) -> Result<Told, BrokerError> {
        let seat = Arc::clone(&self.seated.seat);
        seat.attended(self.tell(stop)).await
    }

    async fn tell(&mut self, stop: impl Future<Output = ()>) -> Result<Told, BrokerError> {
        let mut stop = pin!(stop);
        loop {
            let step = tokio::select! {
                biased;
                () = &mut stop => return Err(stopping()),
                step = self.prepare() => step?,
            };
            if let Some(event) = self.release(step).await? {
                // In this order: what enters the seat in between is newer than `seen`.
                let seen = self.seated.channel.seen();
                return Ok(Told { revision: self.seated.seat.hand_out(seen), event });
            }
        }
    }

    async fn prepare(&mut self) -> Result<Step, BrokerError> {
        loop {
            self.still_good().await?;
            if let Some(event) = self.first.pop_front() {
                return Ok(Step::First(event));
            }
            if let Some(untold) = self.seated.seat.pick() {
                if let Some(step) = self.look_up(untold).await {
                    return Ok(step);
                }
                // Much that is nothing new may follow, and nothing of it has to wait.
                tokio::task::yield_now().await;
                continue;
            }
            if self.seated.seat.is_silent() {
                return Ok(Step::Silence);
            }
            self.look_around();
            self.seated.seat.rung().await;
        }
    }

    /// Whether the watcher still has its seat, and its token. The end of a token is on record.
    async fn still_good(&self) -> Result<(), BrokerError> {
        match self.seated.seat.ended() {
            None => {}
            Some(End::Slow) => return Err(slow()),
            Some(End::Over(over)) => return Err(over.into()),
        }
        if self.broker.parts.tokens.is_live(&self.call.principal) {
            return Ok(());
        }
        let message = "the token presented has ended; watch again with a new one";
        let error = BrokerError::rejected(Reason::Unauthenticated, message);
        let environment = self.seated.channel.environment.name.as_str();
        let record = record::of_call(&self.call, "watch").about(environment, "").ended(&error);
        self.broker.append(self.said_to(record, ""), Durability::Durable).await?;
        Err(error)
    }

    /// What there is to tell of a secret now; nothing where the watcher knows it, or the store can't be asked.
    async fn look_up(&self, untold: Untold) -> Option<Step> {
        let Seated { channel, seat, .. } = &self.seated;
        let resource = Resource::Secret(channel.id(&untold.name));
        let said = seat.said(&untold.name);
        let grant = match self.broker.decide(&self.call, Action::Read, &resource) {
            Ok(grant) => grant,
            Err(_) if said == Some(Said::Denied) => return self.nothing_new(&untold, untold.latest),
            Err((decision, error)) => return Some(Step::Refused { untold, decision, error }),
        };
        let (grant, fetched) = self.fetch(grant, untold.clone()).await?;
        match fetched {
            Ok(fetched) => match said {
                Some(Said::Version(id)) if id == fetched.version.id => {
                    self.nothing_new(&untold, covered(&untold, fetched.order))
                }
                _ => Some(Step::Current { untold, grant, fetched }),
            },
            Err(error) if error.is_transient() => {
                seat.defer(&untold);
                None
            }
            Err(error) if is_absence(&error) && self.knows_absent(said.as_ref(), &untold) => {
                self.nothing_new(&untold, untold.latest)
            }
            Err(error) => Some(Step::Failed { untold, grant, error }),
        }
    }

    /// Asks for what is current, in a task of its own: others wait for the same answer, and nobody has to poll a watch.
    /// The task ends with whoever waits here, so that there are never more of them than watches.
    async fn fetch(&self, grant: Grant, untold: Untold) -> Option<(Grant, Result<Fetched, StoreError>)> {
        let (broker, channel) = (Arc::clone(&self.broker), Arc::clone(&self.seated.channel));
        let wanted = untold.clone();
        let mut fetching = JoinSet::new();
        fetching.spawn(async move {
            let before = channel.known(&wanted.name);
            let fetched = channel.fetch(&broker.parts.stores, &grant, &wanted).await;
            if let Ok(fetched) = &fetched {
                let current = Current::Version(fetched.version.id.clone());
                channel.observe(&wanted.name, before.as_ref(), current).await;
            }
            (grant, fetched)
        });
        match fetching.join_next().await? {
            Ok(answer) => Some(answer),
            Err(error) => {
                tracing::error!(%error, "a watched secret could not be fetched");
                self.seated.seat.defer(&untold);
                None
            }
        }
    }

    fn nothing_new(&self, untold: &Untold, covered: Revision) -> Option<Step> {
        self.seated.seat.settle(untold, covered, None);
        None
    }

    /// A secret that was told to be gone stays gone; one that a prefix covers, and that was gone before its watcher
    /// came for the first time, never was.
    fn knows_absent(&self, said: Option<&Said>, untold: &Untold) -> bool {
        let came_late = untold.changes == 0 && self.seated.seat.is_new();
        let by_prefix = matches!(self.seated.seat.sitter.subject, Subject::Prefix(_));
        match said {
            Some(Said::Gone) => true,
            None => by_prefix && came_late,
            Some(_) => false,
        }
    }

    /// Puts what there is to tell on record, and takes it off what is owed. `None`: it is on record and not told.
    async fn release(&self, step: Step) -> Result<Option<Event>, BrokerError> {
        match step {
            Step::First(event) => Ok(Some(event)),
            Step::Silence => Ok(Some(Event::Progress)),
            Step::Current { untold, grant, fetched } => {
                self.tell_current(untold, grant, fetched).await.map(Some)
            }
            Step::Failed { untold, grant, error } => self.tell_failed(untold, grant, error).await.map(Some),
            Step::Refused { untold, decision, error } => self.tell_refused(untold, decision, error).await,
        }
    }

    async fn tell_current(
        &self,
        untold: Untold,
        grant: Grant,
        fetched: Fetched,
    ) -> Result<Event, BrokerError> {
        let record = record::of_grant(&self.call, "watch", &grant).of_fetched(&fetched).done();
        let record = match self.with_values {
            true => self.said_to(record, ""),
            false => {
                let record = Record { outcome: Some(Outcome::Unchanged), ..record };
                self.said_to(record, " without its value")
            }
        };
        self.broker.append(record, self.broker.durability(grant.resource())).await?;
        let skipped = untold.changes.saturating_sub(1);
        let said = Said::Version(fetched.version.id.clone());
        self.seated.seat.settle(&untold, covered(&untold, fetched.order), Some(said));
        self.seated.count_pushed(skipped);
        Ok(Event::Changed { secret: self.disclosed(&untold.name, fetched), skipped })
    }

    async fn tell_failed(
        &self,
        untold: Untold,
        grant: Grant,
        error: StoreError,
    ) -> Result<Event, BrokerError> {
        let gone = is_absence(&error);
        let error = BrokerError::from(error);
        let record = record::of_grant(&self.call, "watch", &grant).ended(&error);
        self.broker.append(self.said_to(record, ""), self.broker.durability(grant.resource())).await?;
        let id = self.seated.channel.id(&untold.name);
        let said = if gone { Said::Gone } else { Said::Problem };
        self.seated.seat.settle(&untold, untold.latest, Some(said));
        Ok(if gone { Event::Gone(id) } else { Event::Problem { id, error } })
    }

    /// Of a secret that a prefix covers, and of which nothing was ever said, nothing is said now either.
    async fn tell_refused(
        &self,
        untold: Untold,
        decision: Option<Arc<Decision>>,
        error: BrokerError,
    ) -> Result<Option<Event>, BrokerError> {
        let id = self.seated.channel.id(&untold.name);
        let resource = Resource::Secret(id.clone());
        let record = record::of_resource(&self.call, "watch", Action::Read, &resource, decision.as_deref());
        let record = self.said_to(record.ended(&error), "");
        self.broker.append(record, self.broker.durability(&resource)).await?;
        let Seated { seat, .. } = &self.seated;
        let by_name = matches!(seat.sitter.subject, Subject::Names(_));
        let known = by_name || seat.said(&untold.name).is_some();
        seat.settle(&untold, untold.latest, Some(Said::Denied));
        Ok(known.then_some(Event::Problem { id, error }))
    }

    fn said_to(&self, record: Record, how: &str) -> Record {
        record.with_detail(format!("told to {}{how}", self.seated.seat.sitter.consumer))
    }

    fn disclosed(&self, name: &SecretName, fetched: Fetched) -> Disclosed {
        let Fetched { version, value, source, age, stale, .. } = fetched;
        Disclosed {
            id: self.seated.channel.id(name),
            field: None,
            version,
            value: self.with_values.then_some(value),
            source,
            age,
            stale,
        }
    }

    /// Where it is time, has somebody look at what the store tells nobody of.
    fn look_around(&self) {
        let Seated { channel, seat, .. } = &self.seated;
        if seat.is_look_due() {
            look_when_due(channel, Look::new(&self.broker, &self.call, seat));
        }
    }
}

impl fmt::Debug for Watching {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Seated { channel, seat, .. } = &self.seated;
        f.debug_struct("Watching")
            .field("environment", &channel.environment.name)
            .field("consumer", &seat.sitter.consumer)
            .finish_non_exhaustive()
    }
}

/// Which changes an answer of this order holds.
fn covered(untold: &Untold, order: Order) -> Revision {
    match order {
        Order::Revision(revision) => revision.max(untold.latest),
        Order::Unknown => untold.latest,
    }
}

fn slow() -> BrokerError {
    let seconds = PATIENCE.as_secs();
    let message = format!(
        "the watch had something to tell for {seconds} seconds and was not asked for it; watch again after the last \
         revision, and read faster"
    );
    BrokerError::rejected(Reason::SlowConsumer, message)
}

fn stopping() -> BrokerError {
    let message = "the broker is shutting down; watch again after the last revision";
    BrokerError::rejected(Reason::Unavailable, message)
}
