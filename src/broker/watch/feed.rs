//! All watches of a broker: a channel for each environment that is watched, a bound on the seats, and the sweep.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::OnceCell;
use tokio::time::{MissedTickBehavior, interval};

use super::channel::{Arrival, Channel};
use super::seat::{Seat, Sitter};
use super::{BrokerError, Current, MAX_WATCHES, observed};
use crate::broker::consumers::ConsumerName;
use crate::clock::SharedClock;
use crate::environment::{Environment, EnvironmentError, Registry, StoreChoice};
use crate::error::Reason;
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
    counters: Counters,
}

struct Place {
    environment: Arc<Environment>,
    channel: OnceCell<Arc<Channel>>,
}

#[derive(Default)]
struct Counters {
    live: AtomicU64,
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
    /// A feed of the environments of `registry`, whose changes show in `kv`.
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
                counters: Counters::default(),
            }),
        }
    }

    /// How many watches there are, and what became of them.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let Counters { live, pushed, coalesced, ended_slow } = &self.inner.counters;
        Figures {
            live: live.load(Ordering::Relaxed),
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

    /// Takes a seat.
    pub(super) async fn seat(
        &self,
        channel: &Arc<Channel>,
        sitter: Sitter,
        mut arrival: Arrival<'_>,
    ) -> Result<Seated, BrokerError> {
        arrival.after = self.known_past(channel, arrival.after).await?;
        let live = &self.inner.counters.live;
        let room = |taken: u64| (taken < MAX_WATCHES).then_some(taken + 1);
        live.fetch_update(Ordering::AcqRel, Ordering::Relaxed, room).map_err(|_| full())?;
        let number = self.inner.numbers.fetch_add(1, Ordering::Relaxed);
        let seat = Arc::new(Seat::new(number, sitter, arrival.after, Arc::clone(&self.inner.clock)));
        channel.join(&seat, arrival);
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

    /// Who watches a secret now, and is told of it: the consumer and the principal.
    pub(crate) fn watchers(&self, id: &SecretId) -> Vec<(ConsumerName, String)> {
        let channel = self.inner.channels.get(&id.environment).and_then(|place| place.channel.get());
        let seats = channel.map(|channel| channel.wanting(&id.name)).unwrap_or_default();
        let hears = seats.iter().filter(|seat| seat.hears_of(&id.name));
        hears.map(|seat| (seat.sitter.consumer.clone(), seat.sitter.principal.clone())).collect()
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
            for slow in channel.sweep() {
                if self.free(channel, &slow) {
                    self.counters.ended_slow.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(consumer = %slow.sitter.consumer, principal = %slow.sitter.principal,
                        "a watch ended: it was not asked for what it had to tell");
                }
                slow.end();
            }
        }
    }

    /// Whoever finds the seat taken counts it free.
    fn free(&self, channel: &Channel, seat: &Seat) -> bool {
        let taken = channel.leave(seat.number);
        if taken {
            self.counters.live.fetch_sub(1, Ordering::AcqRel);
        }
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

fn full() -> BrokerError {
    let message = format!(
        "this broker has {MAX_WATCHES} watches, which is all it takes; end one, or ask another broker"
    );
    BrokerError::rejected(Reason::LimitExceeded, message)
}

fn not_followed(environment: &Environment, error: &KvError) -> BrokerError {
    StoreError::Unavailable { environment: environment.name.clone(), cause: error.to_string() }.into()
}
