//! Finding what changed in a store that tells nobody: each watched secret is looked at once per time to live, by
//! whichever of its watchers is first, under that watcher's own leave to read it. What is found goes into kv, and from
//! there to all of them. Nothing leaves the broker here, so nothing is on record here.
//!
//! ```text
//! a look is due ─▶ Looks, in turn ─▶ one task per environment ─▶ store ─▶ kv
//! ```
//!
//! INVARIANT: in one environment one look runs at a time, and those that wait hold neither the broker nor the seat. So
//! however many watch a store that does not answer, one task waits for it. A watch waits with one look at most.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::channel::Channel;
use super::seat::Seat;
use super::{Current, Subject, is_absence};
use crate::broker::{Broker, BrokerError, Call, MAX_BATCH};
use crate::error::Reason;
use crate::policy::{Action, Grant, Resource};
use crate::secret::{SecretName, Selector};
use crate::store::guarded::Guarded;
use crate::store::{Freshness, ListRequest};

/// How many names under a prefix are followed, where the store has to be asked for them.
const MOST_LISTED: usize = 10_000;

/// A look that a watcher is due.
pub(super) struct Look {
    broker: Weak<Broker>,
    call: Arc<Call>,
    seat: Weak<Seat>,
}

/// The looks of one environment.
#[derive(Default)]
pub(super) struct Looks {
    due: Mutex<Due>,
}

#[derive(Default)]
struct Due {
    waiting: VecDeque<Look>,
    is_looking: bool,
}

/// Looks when it is this one's turn.
pub(super) fn look_when_due(channel: &Arc<Channel>, look: Look) {
    if channel.looks.add(look) {
        tokio::spawn(look_in_turn(Arc::downgrade(channel)));
    }
}

async fn look_in_turn(channel: Weak<Channel>) {
    while let Some(channel) = channel.upgrade()
        && let Some(look) = channel.looks.next()
    {
        // In a task of its own: one that panics must not end the turns.
        if let Err(error) = tokio::spawn(look.take(channel)).await {
            tracing::error!(%error, "what is watched could not be looked at");
        }
    }
}

impl Look {
    pub(super) fn new(broker: &Arc<Broker>, call: &Arc<Call>, seat: &Arc<Seat>) -> Self {
        Self { broker: Arc::downgrade(broker), call: Arc::clone(call), seat: Arc::downgrade(seat) }
    }

    /// Whether anybody still sits there.
    fn is_wanted(&self) -> bool {
        self.seat.strong_count() > 0
    }

    async fn take(self, channel: Arc<Channel>) {
        let (Some(broker), Some(seat)) = (self.broker.upgrade(), self.seat.upgrade()) else { return };
        seat.look_at(channel.next_look(seat.number));
        let subject = seat.sitter.subject.clone();
        drop(seat);
        look(&broker, &self.call, &channel, subject).await;
    }
}

impl Looks {
    /// Whether nobody takes looks: then whoever hears it does, until there is none left.
    fn add(&self, look: Look) -> bool {
        let mut due = self.due();
        if due.waiting.len() == due.waiting.capacity() {
            // Before it grows: those that nobody wants any more make room.
            due.waiting.retain(Look::is_wanted);
        }
        due.waiting.push_back(look);
        !std::mem::replace(&mut due.is_looking, true)
    }

    fn next(&self) -> Option<Look> {
        let mut due = self.due();
        let next = due.waiting.pop_front();
        due.is_looking = next.is_some();
        next
    }

    fn due(&self) -> MutexGuard<'_, Due> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks at what nobody looked at lately of what this caller watches.
async fn look(broker: &Broker, call: &Call, channel: &Channel, subject: Subject) {
    let names = match subject {
        Subject::Names(names) => names.into_iter().collect(),
        Subject::Prefix(prefix) => under(broker, call, channel, &prefix).await,
    };
    let permitted = |name: SecretName| {
        let resource = Resource::Secret(channel.id(&name));
        broker.decide(call, Action::Read, &resource).ok().map(|grant| (name, grant))
    };
    let (names, grants): (Vec<_>, Vec<_>) = names.into_iter().filter_map(permitted).unzip();
    let claimed = channel.claim(names.clone());
    let mut asked: Vec<_> = names.into_iter().zip(grants).collect();
    asked.retain(|(name, _)| claimed.binary_search(name).is_ok());
    for some in asked.chunks(MAX_BATCH) {
        look_at(broker, channel, some).await;
    }
}

async fn look_at(broker: &Broker, channel: &Channel, asked: &[(SecretName, Grant)]) {
    // Before the store is asked: what is learnt meanwhile from elsewhere is newer.
    let known: Vec<_> = asked.iter().map(|(name, _)| channel.known(name)).collect();
    let items: Vec<_> = asked.iter().map(|(_, grant)| (grant, Selector::CURRENT)).collect();
    let answers = broker.parts.stores.batch_get(&items, Freshness::Refresh).await;
    for (((name, _), before), answer) in asked.iter().zip(known).zip(answers) {
        let current = match answer {
            Ok(fetched) => Current::Version(fetched.version.id),
            Err(error) if is_absence(&error) => Current::Gone,
            Err(error) => {
                tracing::debug!(%error, "a watched secret could not be looked at");
                continue;
            }
        };
        // A secret that never was is no news.
        if before.is_some() || current != Current::Gone {
            channel.observe(name, before.as_ref(), current).await;
        }
    }
}

/// The names under a prefix, sorted: those that were seen before, and where nobody asked lately, those that the store
/// has now.
async fn under(broker: &Broker, call: &Call, channel: &Channel, prefix: &str) -> Vec<SecretName> {
    let mut names = channel.known_under(prefix);
    let resource = Resource::Environment(channel.environment.name.clone());
    if let Ok(grant) = broker.decide(call, Action::List, &resource)
        && channel.claim_list(prefix)
    {
        match listed(&broker.parts.stores, &grant, prefix).await {
            Ok(listed) => names.extend(listed),
            Err(error) => tracing::debug!(%error, "a watched prefix could not be listed"),
        }
    }
    names.sort_unstable();
    names.dedup();
    names
}

/// The names of a store that start so.
pub(super) async fn listed(
    stores: &Guarded,
    grant: &Grant,
    prefix: &str,
) -> Result<Vec<SecretName>, BrokerError> {
    let mut names = Vec::new();
    let mut request = ListRequest { prefix: prefix.to_owned(), limit: 100, ..ListRequest::default() };
    loop {
        let page = stores.list(grant, &request).await?;
        names.extend(page.secrets.into_iter().map(|listed| listed.name));
        if names.len() > MOST_LISTED {
            let message =
                format!("more than {MOST_LISTED} secrets start so; watch a longer prefix, or name them");
            return Err(BrokerError::rejected(Reason::LimitExceeded, message));
        }
        match page.next_page_token {
            Some(token) => request.page_token = Some(token),
            None => return Ok(names),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Principal;

    fn look_of(seat: &Arc<Seat>) -> Look {
        let call = Arc::new(Call::internal(Principal::internal("test", []), "a test"));
        Look { broker: Weak::new(), call, seat: Arc::downgrade(seat) }
    }

    fn seats(count: u64) -> Vec<Arc<Seat>> {
        (0..count).map(|number| Seat::alone(number, Subject::Prefix(String::new()))).collect()
    }

    fn number(look: &Look) -> u64 {
        look.seat.upgrade().unwrap().number
    }

    #[test]
    fn however_many_are_due_one_takes_them_in_turn() {
        let (looks, seats) = (Looks::default(), seats(100));
        for round in 0..2 {
            let takers = seats.iter().filter(|seat| looks.add(look_of(seat))).count();
            assert_eq!(takers, 1, "round {round}");
            let order: Vec<_> = std::iter::from_fn(|| looks.next()).map(|look| number(&look)).collect();
            assert_eq!(order, (0..100).collect::<Vec<_>>());
        }
    }

    #[test]
    fn who_is_gone_leaves_no_look_behind() {
        let looks = Looks::default();
        for _ in 0..1_000 {
            looks.add(look_of(&Seat::alone(0, Subject::Prefix(String::new()))));
        }
        assert!(looks.due().waiting.len() < 10);
        let stays = seats(1);
        assert!(!looks.add(look_of(&stays[0])), "one is at it since the first");
        let wanted = std::iter::from_fn(|| looks.next()).filter(Look::is_wanted).count();
        assert_eq!(wanted, 1);
    }

    #[tokio::test]
    async fn the_turns_end_with_the_broker() {
        let folder = tempfile::tempdir().unwrap();
        let clock = crate::clock::SystemClock::shared();
        let path = folder.path().join("claviger.db");
        let kv = crate::kv::embedded::Embedded::open(&path, Arc::clone(&clock)).await.unwrap();
        let environment = Arc::new(crate::environment::Environment::sealed("production".parse().unwrap()));
        let channel = Channel::open(Arc::new(kv), environment, clock).await.unwrap();
        let seats = seats(3);
        for seat in &seats {
            look_when_due(&channel, look_of(seat));
        }
        let is_idle = || !channel.looks.due().is_looking;
        let turns = async {
            while !is_idle() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(60), turns).await.unwrap();
        assert!(channel.looks.due().waiting.is_empty());
    }
}
