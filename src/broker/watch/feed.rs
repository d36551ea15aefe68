//! All watches of a broker: a channel for each environment that is watched, the seats, and the sweep.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::OnceCell;
use tokio::time::{MissedTickBehavior, interval};

use super::bounds::{Bounds, Ledger};
use super::channel::{Arrival, Channel};
use super::seat::{End, Seat, Sitter};
use super::{BrokerError, Current, observed};
use crate::broker::consumers::ConsumerName;
use crate::clock::SharedClock;
use crate::environment::{Environment, EnvironmentError, Registry, StoreChoice};
use crate::kv::{Kv, KvError, Revision};
use crate::secret::{EnvironmentName, SecretId};
use crate::store::StoreError;

/// How often the sweep looks at every seat.
const SWEEP: Duration = Duration::from_secs(1);

/// What tells watchers of changes. Cheap to clone; clones are one feed.
///
/// Costs nothing until something is watched: an environment is followed from its first watch on.
#[derive(Clone)]
pub struct Feed {
    inner: Arc<Inner>,
}

/// How many watches there are, and what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Watches now.
    pub live: u64,
    /// Current versions that were told since the broker's start.
    pub pushed: u64,
    /// Changes that were left out because a later one was told instead.
    pub coalesced: u64,
    /// Watches that ended because the watcher did not keep up.
    pub ended_slow: u64,
}

struct Inner {
    kv: Arc<dyn Kv>,
    clock: SharedClock,
    channels: BTreeMap<EnvironmentName, Place>,
    numbers: AtomicU64,
    sweeping: AtomicBool,
    ledger: Arc<Ledger>,
    counters: Counters,
}

struct Place {
    environment: Arc<Environment>,
    channel: OnceCell<Arc<Channel>>,
}

#[derive(Default)]
struct Counters {
    pushed: AtomicU64,
    coalesced: AtomicU64,
    ended_slow: AtomicU64,
}

/// A seat that is taken. Dropping it frees the seat, whatever ended the watch.
pub(super) struct Seated {
    pub(super) channel: Arc<Channel>,
    pub(super) seat: Arc<Seat>,
    feed: Arc<Inner>,
}

impl Feed {
    /// A feed of the environments of `registry`, whose changes show in `kv`, with the bounds by default.
    #[must_use]
    pub fn new(kv: Arc<dyn Kv>, registry: &Registry, clock: SharedClock) -> Self {
        let place = |environment: &Arc<Environment>| {
            let place = Place { environment: Arc::clone(environment), channel: OnceCell::new() };
            (environment.name.clone(), place)
        };
        Self {
            inner: Arc::new(Inner {
                kv,
                clock,
                channels: registry.iter().map(place).collect(),
                numbers: AtomicU64::new(0),
                sweeping: AtomicBool::new(false),
                ledger: Arc::new(Ledger::default()),
                counters: Counters::default(),
            }),
        }
    }

    /// The same feed with other bounds, for all its clones. Who holds more already keeps it.
    #[must_use]
    pub fn with_bounds(self, bounds: Bounds) -> Self {
        self.inner.ledger.set(bounds);
        self
    }

    /// How many watches there are, and what became of them.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let Counters { pushed, coalesced, ended_slow } = &self.inner.counters;
        Figures {
            live: self.inner.ledger.watches() as u64,
            pushed: pushed.load(Ordering::Relaxed),
            coalesced: coalesced.load(Ordering::Relaxed),
            ended_slow: ended_slow.load(Ordering::Relaxed),
        }
    }

    /// Looks at every seat once: wakes those for whom something is due, takes it from those who did not ask for
    /// [`PATIENCE`](super::PATIENCE). Done every second while anything was ever watched.
    pub fn sweep(&self) {
        self.inner.sweep();
    }

    /// The channel of an environment, which is opened where this is the first time.
    pub(super) async fn channel(&self, environment: &EnvironmentName) -> Result<&Arc<Channel>, BrokerError> {
        let place = self.inner.channels.get(environment);
        let Place { environment, channel } =
            place.ok_or_else(|| EnvironmentError::NotDeclared(environment.clone()))?;
        let open = || {
            let (kv, clock) = (Arc::clone(&self.inner.kv), Arc::clone(&self.inner.clock));
            Channel::open(kv, Arc::clone(environment), clock)
        };
        let channel =
            channel.get_or_try_init(open).await.map_err(|error| not_followed(environment, &error))?;
        self.inner.keep_sweeping();
        Ok(channel)
    }

    /// Takes a seat for a principal, as records name it.
    pub(super) async fn seat(
        &self,
        channel: &Arc<Channel>,
        principal: &str,
        sitter: Sitter,
        mut arrival: Arrival<'_>,
    ) -> Result<Seated, BrokerError> {
        arrival.after = self.known_past(channel, arrival.after).await?;
        let ticket = self.inner.ledger.admit(principal, &sitter.subject)?;
        let sitter = Sitter { subject: channel.shared(sitter.subject), ..sitter };
        let number = self.inner.numbers.fetch_add(1, Ordering::Relaxed);
        let clock = Arc::clone(&self.inner.clock);
        let seat = Arc::new(Seat::new(number, sitter, ticket, arrival.after, clock));
        channel.join(&seat, &arrival)?;
        Ok(Seated { channel: Arc::clone(channel), seat, feed: Arc::clone(&self.inner) })
    }

    /// The revision that a watcher comes with; 0 where it has not come yet: then it is another store's, or this one was
    /// brought back from the past.
    async fn known_past(&self, channel: &Channel, after: Revision) -> Result<Revision, BrokerError> {
        if after <= channel.seen() {
            return Ok(after);
        }
        let unavailable = |error| not_followed(&channel.environment, &error);
        let latest = self.inner.kv.revision().await.map_err(unavailable)?;
        Ok(if after > latest { 0 } else { after })
    }

    /// This broker changed what is current. Only where the store itself leaves no trace of it in kv there is anything
    /// to do; what can't be written down is found by the next look.
    pub(crate) async fn changed(&self, id: &SecretId, current: Current) {
        let numbered = |place: &Place| place.environment.store == StoreChoice::Sealed;
        if self.inner.channels.get(&id.environment).is_none_or(numbered) {
            return;
        }
        if let Err(error) = observed::write(self.inner.kv.as_ref(), id, &current, None).await {
            tracing::warn!(%error, environment = %id.environment, "watchers will hear of a change later than they could");
        }
    }

    /// Who watches a secret now, and is told of it: the consumer and the principal, at most so many.
    pub(crate) fn watchers(&self, id: &SecretId, most: usize) -> BTreeSet<(ConsumerName, Arc<str>)> {
        let mut found = BTreeSet::new();
        let channel = self.inner.channels.get(&id.environment).and_then(|place| place.channel.get());
        let Some(channel) = channel else { return found };
        channel.show_wanting(&id.name, |seat| {
            if found.len() >= most {
                return ControlFlow::Break(());
            }
            if seat.hears_of(&id.name) {
                found.insert((seat.sitter.consumer.clone(), Arc::clone(seat.ticket.principal())));
            }
            ControlFlow::Continue(())
        });
        found
    }
}

impl fmt::Debug for Feed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Feed").field("figures", &self.figures()).finish_non_exhaustive()
    }
}

impl Inner {
    fn keep_sweeping(self: &Arc<Self>) {
        if self.sweeping.swap(true, Ordering::AcqRel) {
            return;
        }
        let feed = Arc::downgrade(self);
        tokio::spawn(keep_sweeping(feed));
    }

    fn sweep(&self) {
        for channel in self.channels.values().filter_map(|place| place.channel.get()) {
            for over in channel.sweep() {
                let is_slow = over.ended().is_none();
                if self.free(channel, &over) && is_slow {
                    self.counters.ended_slow.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(consumer = %over.sitter.consumer, principal = %over.ticket.principal(),
                        "a watch ended: it was not asked for what it had to tell");
                }
                over.end(End::Slow);
            }
        }
    }

    /// Whether the seat was taken. Its ticket is given back now, and not when the last forgets the seat.
    fn free(&self, channel: &Channel, seat: &Seat) -> bool {
        let taken = channel.leave(seat.number);
        seat.ticket.give_back();
        taken
    }
}

async fn keep_sweeping(feed: Weak<Inner>) {
    let mut tick = interval(SWEEP);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let Some(feed) = feed.upgrade() else { return };
        feed.sweep();
    }
}

impl Seated {
    /// A current version was told, and so many changes before it were not.
    pub(super) fn count_pushed(&self, skipped: u64) {
        self.feed.counters.pushed.fetch_add(1, Ordering::Relaxed);
        self.feed.counters.coalesced.fetch_add(skipped, Ordering::Relaxed);
    }
}

impl Drop for Seated {
    fn drop(&mut self) {
        self.feed.free(&self.channel, &self.seat);
    }
}

fn not_followed(environment: &Environment, error: &KvError) -> BrokerError {
    StoreError::Unavailable { environment: environment.name.clone(), cause: error.to_string() }.into()
}
