//! One environment: when each of its secrets changed last, and who wants to hear of it.
//!
//! The index is asked by name: a change costs the length of its name and the number of those who watch it, not the
//! number of watchers. It is locked for that look-up; what is told to whom is worked through without it.

use std::collections::BTreeSet;
use std::hash::{BuildHasher as _, RandomState};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::task::AbortHandle;

use super::bounds::Over;
use super::index::{Index, Known, claim, prefixes};
use super::look::Looks;
use super::seat::{Finding, Seat, Untold};
use super::{Current, Subject, follow, is_absence, observed};
use crate::clock::SharedClock;
use crate::environment::{Environment, StoreChoice};
use crate::kv::{Kv, KvError, Revision};
use crate::policy::Grant;
use crate::secret::{SecretId, SecretName, Selector};
use crate::store::guarded::Guarded;
use crate::store::sealed::Sealed;
use crate::store::{Fetched, Freshness, Order, StoreError};

/// Locks among which the secrets are spread that have to be read past the cache.
const STRIPES: usize = 16;
/// How long after a store could not be asked nobody asks it again for the sake of a watcher.
const HOLD_BACK: Duration = Duration::from_secs(1);

/// Where an environment's changes show in kv.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// In the records of the sealed store, whose revisions are those of the store's answers.
    Sealed,
    /// In what this broker writes down of a store that numbers nothing.
    Observed,
}

/// The last failure of a store, and when.
type Failure = Option<(Duration, StoreError)>;

pub(super) struct Channel {
    pub(super) environment: Arc<Environment>,
    pub(super) origin: Origin,
    pub(super) kv: Arc<dyn Kv>,
    pub(super) clock: SharedClock,
    /// All changes of the environment up to here are in the seats that want to hear of them.
    seen: AtomicU64,
    index: Mutex<Index>,
    /// Looks at a store that tells nobody of its changes.
    pub(super) looks: Looks,
    /// One at a time reads a secret past the cache; the others find it there.
    refreshing: [tokio::sync::Mutex<Failure>; STRIPES],
    spread: RandomState,
    follower: OnceLock<AbortHandle>,
}

/// With what a watcher comes.
pub(super) struct Arrival<'a> {
    /// What it may not know.
    pub(super) denied: &'a BTreeSet<SecretName>,
    /// What the store has under its prefix, where kv does not say it.
    pub(super) listed: Vec<SecretName>,
    /// What it knows already.
    pub(super) after: Revision,
}

impl Channel {
    /// Reads what there is, and follows from there on.
    pub(super) async fn open(
        kv: Arc<dyn Kv>,
        environment: Arc<Environment>,
        clock: SharedClock,
    ) -> Result<Arc<Self>, KvError> {
        let origin = match environment.store {
            StoreChoice::Sealed => Origin::Sealed,
            StoreChoice::Aws(_) => Origin::Observed,
        };
        let channel = Arc::new(Self {
            environment,
            origin,
            kv,
            clock,
            seen: AtomicU64::new(0),
            index: Mutex::default(),
            looks: Looks::default(),
            refreshing: std::array::from_fn(|_| tokio::sync::Mutex::default()),
            spread: RandomState::new(),
            follower: OnceLock::new(),
        });
        let changes = channel.catch_up().await?;
        let follower = tokio::spawn(follow::follow(Arc::downgrade(&channel), changes));
        let _ = channel.follower.set(follower.abort_handle());
        Ok(channel)
    }

    /// What the keys in kv start with that change with the environment's secrets.
    pub(super) fn prefix(&self) -> Vec<u8> {
        match self.origin {
            Origin::Sealed => Sealed::watched_prefix(&self.environment.name),
            Origin::Observed => observed::prefix(&self.environment.name),
        }
    }

    /// The key that changes with every one of them.
    pub(super) fn mark(&self) -> Vec<u8> {
        match self.origin {
            Origin::Sealed => Sealed::watched_mark(&self.environment.name),
            Origin::Observed => observed::mark(&self.environment.name),
        }
    }

    /// The secret whose key this is.
    pub(super) fn name(&self, key: &[u8]) -> Option<SecretName> {
        let environment = &self.environment.name;
        match self.origin {
            Origin::Sealed => Sealed::watched_secret(environment, key).map(|id| id.name),
            Origin::Observed => observed::name(environment, key),
        }
    }

    pub(super) fn id(&self, name: &SecretName) -> SecretId {
        SecretId::new(self.environment.name.clone(), name.clone())
    }

    /// Up to where everything is in the seats. Read it before looking into one.
    pub(super) fn seen(&self) -> Revision {
        self.seen.load(Ordering::Acquire)
    }

    /// Everything up to here is in the seats.
    pub(super) fn pass(&self, revision: Revision) {
        self.seen.fetch_max(revision, Ordering::AcqRel);
    }

    /// A secret changed, or with `None` is not in kv any more: whoever wants to hear of it has it in its seat when this
    /// returns.
    pub(super) fn learn(&self, name: &SecretName, revision: Revision, current: Option<Current>) {
        let (name, seats) = {
            let mut index = self.index();
            if index.known.get(name).is_some_and(|known| known.revision >= revision) {
                return;
            }
            let name = index.shared(name);
            match current {
                Some(current) => index.known.insert(name.clone(), Known::new(revision, current)),
                None => index.known.remove(&name),
            };
            let seats = index.wanting(&name);
            (name, seats)
        };
        for seat in seats {
            seat.note(&name, revision);
        }
    }

    /// What is known of a secret.
    pub(super) fn known(&self, name: &SecretName) -> Option<Known> {
        self.index().known.get(name).cloned()
    }

    /// The secrets in kv whose names start so.
    pub(super) fn known_under(&self, prefix: &str) -> Vec<SecretName> {
        self.index().under(prefix).map(|(name, _)| name.clone()).collect()
    }

    /// What is watched, in the names that others hold already.
    pub(super) fn shared(&self, subject: Subject) -> Subject {
        match subject {
            Subject::Names(names) => {
                let index = self.index();
                Subject::Names(names.iter().map(|name| index.shared(name)).collect())
            }
            Subject::Prefix(_) => subject,
        }
    }

    /// Seats a watcher, with what it does not know yet. From the revision on that the channel has now, it hears of
    /// everything. There may be no room for what its prefix covers.
    pub(super) fn join(&self, seat: &Arc<Seat>, arrival: &Arrival<'_>) -> Result<(), Over> {
        let mut index = self.index();
        seat.expect(index.backlog(&seat.sitter.subject, arrival))?;
        if let Subject::Names(names) = &seat.sitter.subject {
            seat.deny(names.iter().filter(|name| arrival.denied.contains(*name)).cloned());
        }
        index.take_in(seat);
        Ok(())
    }

    /// Frees a seat; whether it was taken.
    pub(super) fn leave(&self, number: u64) -> bool {
        self.index().take_out(number)
    }

    /// Shows those who would hear of a change of this secret, until `visit` has seen enough. Some at a time: whoever
    /// tells of a change needs the index, and does not wait for who wants to know who watches. Who comes or goes
    /// meanwhile may be shown or not.
    pub(super) fn show_wanting(&self, name: &SecretName, mut visit: impl FnMut(&Seat) -> ControlFlow<()>) {
        for prefix in std::iter::once(None).chain(prefixes(name).map(Some)) {
            let mut after = None;
            loop {
                let some = self.index().some_wanting(name, prefix, after);
                let Some(last) = some.last() else { break };
                after = Some(last.number);
                if some.iter().try_for_each(|seat| visit(seat)).is_break() {
                    return;
                }
            }
        }
    }

    /// Wakes whom something is due that no change announces; gives those back who did not ask for too long, or have
    /// ended and were not asked since.
    pub(super) fn sweep(&self) -> Vec<Arc<Seat>> {
        let now = self.clock.monotonic();
        let every = self.look_every();
        let seats: Vec<_> = {
            let mut index = self.index();
            let recent = |at: &mut Duration| now.saturating_sub(*at) <= every;
            index.looked_at.retain(|_, at| recent(at));
            index.listed_at.retain(|_, at| recent(at));
            index.seats.values().cloned().collect()
        };
        let mut over = Vec::new();
        for seat in seats {
            match seat.find(now) {
                Finding::Fine => {}
                Finding::Due => seat.ring(),
                Finding::Slow | Finding::Ended => over.push(seat),
            }
        }
        over
    }

    /// How often a store is looked at that tells nobody of its changes.
    pub(super) fn look_every(&self) -> Duration {
        const LEAST: Duration = Duration::from_secs(10);
        self.environment.ttl.max(LEAST)
    }

    /// When the next look of one watcher is due: not all at once.
    pub(super) fn next_look(&self, number: u64) -> Duration {
        let every = self.look_every();
        let spread = (every / 10).saturating_mul((self.spread.hash_one(number) % 100) as u32) / 100;
        self.clock.monotonic().saturating_add(every.saturating_sub(spread))
    }

    /// Those of `names` that nobody looked at lately. Whoever gets them looks.
    pub(super) fn claim(&self, names: Vec<SecretName>) -> Vec<SecretName> {
        let (now, pause) = (self.clock.monotonic(), self.pause());
        let mut index = self.index();
        names.into_iter().filter(|name| claim(&mut index.looked_at, name, now, pause)).collect()
    }

    /// Whether nobody listed the names that start so lately. Whoever hears it lists them.
    pub(super) fn claim_list(&self, prefix: &str) -> bool {
        let (now, pause) = (self.clock.monotonic(), self.pause());
        claim(&mut self.index().listed_at, &prefix.to_owned(), now, pause)
    }

    /// A little less than the time between two looks, so that no jitter makes it twice as long.
    fn pause(&self) -> Duration {
        self.look_every().mul_f32(0.8)
    }

    /// What is current, at least as new as what is to be told: from the cache where that knows it, else from the store,
    /// asked once for all who wait.
    pub(super) async fn fetch(
        &self,
        stores: &Guarded,
        grant: &Grant,
        untold: &Untold,
    ) -> Result<Fetched, StoreError> {
        let cached = stores.get(grant, &Selector::CURRENT, Freshness::Cached).await;
        if self.trusts(untold, &cached) {
            return cached;
        }
        let mut failure = self.stripe(&untold.name).lock().await;
        let cached = stores.get(grant, &Selector::CURRENT, Freshness::Cached).await;
        if self.trusts(untold, &cached) {
            return cached;
        }
        let now = self.clock.monotonic();
        if let Some((at, error)) = &*failure
            && now.saturating_sub(*at) < HOLD_BACK
        {
            return Err(error.clone());
        }
        let fresh = stores.get(grant, &Selector::CURRENT, Freshness::Refresh).await;
        match &fresh {
            Err(error) if error.is_transient() => *failure = Some((now, error.clone())),
            Err(error) if is_absence(error) => self.found_absent(untold),
            _ => *failure = None,
        }
        fresh
    }

    /// Writes down what the store was found to hold, where it has no revisions of its own; `before` is what was known
    /// when it was asked. What can't be written is found again by the next look.
    pub(super) async fn observe(&self, name: &SecretName, before: Option<&Known>, current: Current) {
        if self.origin == Origin::Sealed || before.is_some_and(|known| known.current == current) {
            return;
        }
        let since = before.map_or(0, |known| known.revision);
        let written = observed::write(self.kv.as_ref(), &self.id(name), &current, Some(since)).await;
        if let Err(error) = written {
            tracing::warn!(%error, environment = %self.environment.name, "a change could not be written down");
        }
    }

    /// Whether an answer is at least as new as the change that is to be told.
    fn trusts(&self, untold: &Untold, answer: &Result<Fetched, StoreError>) -> bool {
        let known = self.known(&untold.name);
        match answer {
            Ok(fetched) => match (fetched.order, known.map(|known| known.current)) {
                (Order::Revision(revision), _) => revision >= untold.latest,
                (Order::Unknown, Some(Current::Version(id))) => id == fetched.version.id,
                (Order::Unknown, Some(Current::Gone)) => false,
                (Order::Unknown, Some(Current::Unknown) | None) => true,
            },
            Err(error) if is_absence(error) => known.is_none_or(|known| {
                known.current == Current::Gone || known.absent_at >= untold.latest.max(1)
            }),
            Err(_) => true,
        }
    }

    fn found_absent(&self, untold: &Untold) {
        if let Some(known) = self.index().known.get_mut(&untold.name) {
            known.absent_at = known.absent_at.max(untold.latest);
        }
    }

    #[expect(clippy::indexing_slicing, reason = "the index is a remainder of the length, which is not zero")]
    fn stripe(&self, name: &SecretName) -> &tokio::sync::Mutex<Failure> {
        &self.refreshing[self.spread.hash_one(name) as usize % STRIPES]
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        // A panic under the lock leaves a seat without some of its places at worst.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        if let Some(follower) = self.follower.get() {
            follower.abort();
        }
    }
}
