//! One watcher's place: what it was not told yet, what it was told last, and whose turn it is.
//!
//! ```text
//!            note                 pick                    settle
//! a change ───────▶ ready ──────────────────▶ being told ────────▶ said
//!                     ▲                           │ the store can't be asked
//!                     └──────── deferred ◀────────┘ defer
//! ```
//!
//! What is being told stays among the untold until it is settled, so that a watcher that goes away in between loses
//! nothing. Pure but for a bell: no store, no policy.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use tokio::sync::Notify;

use super::bounds::{Over, Ticket};
use super::{ConsumerName, HEARTBEAT, PATIENCE, Subject};
use crate::clock::SharedClock;
use crate::kv::Revision;
use crate::secret::{SecretName, VersionId};

/// How long to wait before a store is asked again that could not be: at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// A secret of which the watcher has to hear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Untold {
    pub(super) name: SecretName,
    /// The oldest change that it was not told.
    pub(super) first: Revision,
    /// The newest one.
    pub(super) latest: Revision,
    /// How many there were. 0: none since it came, but it wants to know how the secret is.
    pub(super) changes: u64,
    /// How often the store could not be asked.
    attempts: u32,
}

/// What a watcher was told of a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Said {
    /// That this version is current.
    Version(VersionId),
    /// That there is none.
    Gone,
    /// That it may not know, or nothing for that reason.
    Denied,
    /// That the store refuses to say.
    Problem,
}

/// What the sweep finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finding {
    /// Nothing to do.
    Fine,
    /// Something is due that no change announces.
    Due,
    /// It has been owed something for too long without asking for it.
    Slow,
    /// It has ended already, and was not asked since.
    Ended,
}

/// Why a watch ended without its watcher.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// It was owed something for too long without asking for it.
    Slow,
    /// There is no room for a name that its prefix came to cover.
    Over(Over),
}

/// Who sits there.
pub(super) struct Sitter {
    pub(super) subject: Subject,
    pub(super) consumer: ConsumerName,
}

pub(super) struct Seat {
    pub(super) number: u64,
    pub(super) sitter: Sitter,
    /// What it holds, of which principal.
    pub(super) ticket: Ticket,
    /// Changes up to here it knew when it came.
    after: Revision,
    clock: SharedClock,
    state: Mutex<State>,
    bell: Notify,
    /// Since when it is the watcher's turn: it was given something, or woken, and did not ask since. Milliseconds of
    /// the clock plus one; 0: it is not.
    unattended_since: AtomicU64,
}

#[derive(Default)]
struct State {
    /// A tree, which is as small as what is in it: most of the time next to nothing.
    untold: BTreeMap<SecretName, Waiting>,
    /// All of the untold, oldest first.
    oldest: BTreeSet<(Revision, SecretName)>,
    /// Those of them that can be told now.
    ready: BTreeSet<(Revision, SecretName)>,
    /// The others, by when to try again.
    deferred: BTreeSet<(Duration, SecretName)>,
    said: HashMap<SecretName, Last>,
    position: Revision,
    /// When there was something to tell, after there was nothing.
    owed_since: Duration,
    told_at: Duration,
    look_at: Option<Duration>,
    ended: Option<End>,
}

struct Waiting {
    first: Revision,
    latest: Revision,
    changes: u64,
    attempts: u32,
    due: Option<Duration>,
}

struct Last {
    said: Said,
    /// Changes up to here are in what was said.
    covered: Revision,
}

impl Seat {
    pub(super) fn new(
        number: u64,
        sitter: Sitter,
        ticket: Ticket,
        after: Revision,
        clock: SharedClock,
    ) -> Self {
        let now = clock.monotonic();
        let state = State { position: after, told_at: now, owed_since: now, ..State::default() };
        let seat = Self {
            number,
            sitter,
            ticket,
            after,
            clock,
            state: Mutex::new(state),
            bell: Notify::new(),
            unattended_since: AtomicU64::new(0),
        };
        seat.wait_for_watcher();
        seat
    }

    /// What the watcher does not know as it comes: secrets with the revision of their last change, where one is known.
    /// There may be no room for what its prefix covers.
    pub(super) fn expect(&self, backlog: Vec<(SecretName, Option<Revision>)>) -> Result<(), Over> {
        self.make_room(backlog.iter().map(|(name, _)| name))?;
        let mut state = self.lock();
        for (name, changed) in backlog {
            let first = changed.unwrap_or(0).max(self.after + 1);
            let latest = changed.unwrap_or(0);
            state.insert(name, Waiting { first, latest, changes: 0, attempts: 0, due: None });
        }
        Ok(())
    }

    /// The names of a watch have their room from the start; those under a prefix as they come.
    fn make_room<'a>(&self, names: impl IntoIterator<Item = &'a SecretName>) -> Result<(), Over> {
        match self.sitter.subject {
            Subject::Names(_) => Ok(()),
            Subject::Prefix(_) => self.ticket.hold(names),
        }
    }

    /// Whether it came for the first time, and so is told how everything is.
    pub(super) const fn is_new(&self) -> bool {
        self.after == 0
    }

    /// Takes note of a change.
    pub(super) fn note(&self, name: &SecretName, revision: Revision) {
        let mut state = self.lock();
        let covered = state.said.get(name).map_or(self.after, |last| last.covered.max(self.after));
        if state.ended.is_some() || revision <= covered {
            return;
        }
        match state.untold.get_mut(name) {
            Some(waiting) if revision <= waiting.latest => return,
            Some(waiting) => {
                waiting.latest = revision;
                waiting.changes += 1;
            }
            None => self.owe(&mut state, name, revision),
        }
        drop(state);
        self.ring();
    }

    fn owe(&self, state: &mut State, name: &SecretName, revision: Revision) {
        let is_new = !state.said.contains_key(name);
        if is_new && let Err(over) = self.make_room([name]) {
            state.end(End::Over(over));
            return;
        }
        if state.untold.is_empty() {
            state.owed_since = self.clock.monotonic();
        }
        let waiting = Waiting { first: revision, latest: revision, changes: 1, attempts: 0, due: None };
        state.insert(name.clone(), waiting);
    }

    /// The oldest that can be told now.
    pub(super) fn pick(&self) -> Option<Untold> {
        let now = self.clock.monotonic();
        let mut state = self.lock();
        state.wake_deferred(now);
        let (_, name) = state.ready.first()?;
        let waiting = state.untold.get(name)?;
        let Waiting { first, latest, changes, attempts, .. } = *waiting;
        Some(Untold { name: name.clone(), first, latest, changes, attempts })
    }

    /// What was said of a secret last.
    pub(super) fn said(&self, name: &SecretName) -> Option<Said> {
        self.lock().said.get(name).map(|last| last.said.clone())
    }

    /// What was picked is told, with all changes up to `covered`; `said` is `None` where there was nothing to say.
    /// Changes that came meanwhile stay untold.
    pub(super) fn settle(&self, untold: &Untold, covered: Revision, said: Option<Said>) {
        let mut state = self.lock();
        let Some(waiting) = state.take(&untold.name) else { return };
        if let Some(said) = said {
            state.said.insert(untold.name.clone(), Last { said, covered });
        } else if let Some(last) = state.said.get_mut(&untold.name) {
            last.covered = last.covered.max(covered);
        }
        if waiting.latest > covered {
            let changes = waiting.changes.saturating_sub(untold.changes).max(1);
            let first = covered + 1;
            let rest = Waiting { first, latest: waiting.latest, changes, attempts: 0, due: None };
            state.insert(untold.name.clone(), rest);
        }
    }

    /// What was picked can't be told now, because the store can't be asked.
    pub(super) fn defer(&self, untold: &Untold) {
        let (least, most) = RETRY;
        let pause = least.saturating_mul(1 << untold.attempts.min(5)).min(most);
        let due = self.clock.monotonic().saturating_add(pause);
        let mut state = self.lock();
        let Some(mut waiting) = state.take(&untold.name) else { return };
        waiting.attempts = waiting.attempts.saturating_add(1);
        waiting.due = Some(due);
        state.insert(untold.name.clone(), waiting);
    }

    /// The watcher was told at its start that it may not know these.
    pub(super) fn deny(&self, names: impl IntoIterator<Item = SecretName>) {
        let mut state = self.lock();
        let denied = names.into_iter().map(|name| (name, Last { said: Said::Denied, covered: 0 }));
        state.said.extend(denied);
    }

    /// Something goes out now: up to where everything was told, given where the channel stood a moment ago.
    pub(super) fn hand_out(&self, seen: Revision) -> Revision {
        let mut state = self.lock();
        let told = match state.oldest.first() {
            // What was not told is forgotten; who comes back has to hear of it.
            _ if state.ended.is_some() => state.position,
            Some((first, _)) => first.saturating_sub(1),
            None => seen,
        };
        // The guard is for a watcher that comes from another broker, whose channel was further.
        state.position = state.position.max(told);
        state.told_at = self.clock.monotonic();
        state.position
    }

    /// Whether nothing went out for as long as a watcher is left without news.
    pub(super) fn is_silent(&self) -> bool {
        let now = self.clock.monotonic();
        now.saturating_sub(self.lock().told_at) >= HEARTBEAT
    }

    /// When to look next at what the store tells nobody of.
    pub(super) fn look_at(&self, at: Duration) {
        self.lock().look_at = Some(at);
    }

    /// Whether that is now; whoever hears it says when next.
    pub(super) fn is_look_due(&self) -> bool {
        let now = self.clock.monotonic();
        self.lock().look_at.take_if(|at| *at <= now).is_some()
    }

    /// Whether the watcher hears of a secret that it watches.
    pub(super) fn hears_of(&self, name: &SecretName) -> bool {
        self.lock().said.get(name).is_none_or(|last| last.said != Said::Denied)
    }

    /// Forgets everything, and says so to a watcher that asks again.
    pub(super) fn end(&self, end: End) {
        self.lock().end(end);
        self.ring();
    }

    /// Why it ended, where it did.
    pub(super) fn ended(&self) -> Option<End> {
        self.lock().ended.clone()
    }

    /// What the sweep has to do.
    pub(super) fn find(&self, now: Duration) -> Finding {
        let state = self.lock();
        if state.ended.is_some() {
            return Finding::Ended;
        }
        let unattended = self.unattended_since().map(|since| now.saturating_sub(since.max(state.owed_since)));
        if !state.untold.is_empty() && unattended.is_some_and(|for_long| for_long >= PATIENCE) {
            return Finding::Slow;
        }
        let retry = state.deferred.first().is_some_and(|(due, _)| *due <= now);
        let look = state.look_at.is_some_and(|at| at <= now);
        let silent = now.saturating_sub(state.told_at) >= HEARTBEAT;
        if retry || look || silent { Finding::Due } else { Finding::Fine }
    }

    /// Wakes the watcher, where it waits.
    pub(super) fn ring(&self) {
        self.bell.notify_one();
    }

    /// Waits until there is something to do.
    pub(super) async fn rung(&self) {
        self.bell.notified().await;
    }

    /// Does `work` for the watcher and keeps the account of whose turn it is. A watcher takes its turn by polling: over
    /// gRPC nobody polls while the other side does not read, whatever wakes the work.
    pub(super) async fn attended<T>(self: &Arc<Self>, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        let mut wakers: Option<(Waker, Waker)> = None;
        let done = std::future::poll_fn(|context| {
            self.unattended_since.store(0, Ordering::Release);
            let (_, waker) = match wakers.take() {
                Some(same) if same.0.will_wake(context.waker()) => wakers.insert(same),
                _ => {
                    let alarm = Alarm { seat: Arc::clone(self), watcher: context.waker().clone() };
                    wakers.insert((context.waker().clone(), Waker::from(Arc::new(alarm))))
                }
            };
            work.as_mut().poll(&mut Context::from_waker(waker))
        })
        .await;
        self.wait_for_watcher();
        done
    }

    /// From now on it is the watcher's turn, unless it was before.
    fn wait_for_watcher(&self) {
        let now = u64::try_from(self.clock.monotonic().as_millis()).unwrap_or(u64::MAX - 1) + 1;
        let _ = self.unattended_since.compare_exchange(0, now, Ordering::AcqRel, Ordering::Acquire);
    }

    fn unattended_since(&self) -> Option<Duration> {
        let since = self.unattended_since.load(Ordering::Acquire).checked_sub(1)?;
        Some(Duration::from_millis(since))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock leaves an entry at worst that is told twice.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The first end is the one that counts. Nothing is handed out from then on that is further than what was.
    fn end(&mut self, end: End) {
        if self.ended.is_none() {
            *self = Self { ended: Some(end), position: self.position, ..Self::default() };
        }
    }

    fn insert(&mut self, name: SecretName, waiting: Waiting) {
        let place = (waiting.first, name.clone());
        match waiting.due {
            None => self.ready.insert(place.clone()),
            Some(due) => self.deferred.insert((due, name.clone())),
        };
        self.oldest.insert(place);
        self.untold.insert(name, waiting);
    }

    fn take(&mut self, name: &SecretName) -> Option<Waiting> {
        let waiting = self.untold.remove(name)?;
        let place = (waiting.first, name.clone());
        self.oldest.remove(&place);
        self.ready.remove(&place);
        if let Some(due) = waiting.due {
            self.deferred.remove(&(due, name.clone()));
        }
        Some(waiting)
    }

    fn wake_deferred(&mut self, now: Duration) {
        while let Some((due, name)) = self.deferred.first().cloned()
            && due <= now
            && let Some(mut waiting) = self.take(&name)
        {
            waiting.due = None;
            self.insert(name, waiting);
        }
    }
}

#[cfg(test)]
impl Seat {
    /// One of a principal who has no other.
    pub(super) fn alone(number: u64, subject: Subject) -> Arc<Self> {
        let ticket = Arc::new(super::bounds::Ledger::default()).admit("User::\"ana\"", &subject).unwrap();
        let sitter = Sitter { subject, consumer: ConsumerName::parse("orders").unwrap() };
        Arc::new(Self::new(number, sitter, ticket, 0, crate::clock::SystemClock::shared()))
    }
}

/// Wakes the watcher's task, and notes when: from then on it is the watcher that is waited for.
struct Alarm {
    seat: Arc<Seat>,
    watcher: Waker,
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.seat.wait_for_watcher();
        self.watcher.wake_by_ref();
    }
}

#[cfg(test)]
mod tests {
    use super::super::bounds::{Bounds, Ledger};
    use super::*;
    use crate::clock::ManualClock;

    fn name(text: &str) -> SecretName {
        SecretName::parse(text).unwrap()
    }

    fn version(n: u8) -> Said {
        Said::Version(VersionId::parse(&format!("{n:032}")).unwrap())
    }

    fn seat(after: Revision) -> (Arc<Seat>, Arc<ManualClock>) {
        seat_of(&Arc::new(Ledger::default()), after)
    }

    fn seat_of(ledger: &Arc<Ledger>, after: Revision) -> (Arc<Seat>, Arc<ManualClock>) {
        let clock = ManualClock::new(jiff::Timestamp::UNIX_EPOCH);
        let subject = Subject::Prefix(String::new());
        let ticket = ledger.admit("User::\"ana\"", &subject).unwrap();
        let sitter = Sitter { subject, consumer: ConsumerName::parse("orders-1").unwrap() };
        (Arc::new(Seat::new(1, sitter, ticket, after, Arc::clone(&clock) as SharedClock)), clock)
    }

    fn tell(seat: &Seat, n: u8) -> (String, u64) {
        let untold = seat.pick().unwrap();
        seat.settle(&untold, untold.latest, Some(version(n)));
        (untold.name.to_string(), untold.changes)
    }

    #[test]
    fn changes_of_one_secret_become_one_and_the_oldest_comes_first() {
        let (seat, _) = seat(0);
        for (secret, revision) in [("a", 10), ("b", 11), ("a", 12), ("a", 12), ("a", 14)] {
            seat.note(&name(secret), revision);
        }
        assert_eq!(seat.hand_out(14), 9);
        assert_eq!(tell(&seat, 1), ("a".to_owned(), 3));
        assert_eq!(seat.hand_out(14), 10, "b is not told yet");
        assert_eq!(tell(&seat, 2), ("b".to_owned(), 1));
        assert_eq!(seat.hand_out(14), 14);
        assert_eq!(seat.pick(), None);
    }

    #[test]
    fn what_changes_while_it_is_told_is_told_again() {
        let (seat, _) = seat(0);
        seat.note(&name("a"), 5);
        let untold = seat.pick().unwrap();
        seat.note(&name("a"), 7);
        seat.note(&name("a"), 8);
        seat.settle(&untold, 7, Some(version(1)));
        assert_eq!(seat.hand_out(8), 7);
        let rest = seat.pick().unwrap();
        assert_eq!((rest.first, rest.latest), (8, 8));
        seat.settle(&rest, 9, Some(version(2)));
        assert_eq!(seat.pick(), None);
        seat.note(&name("a"), 9);
        assert_eq!(seat.pick(), None, "what was said came from revision 9");
    }

    #[test]
    fn a_watcher_that_comes_back_hears_of_what_it_does_not_know() {
        let (seat, _) = seat(20);
        seat.expect(vec![(name("a"), Some(25)), (name("b"), Some(22)), (name("new"), None)]).unwrap();
        seat.note(&name("c"), 20);
        assert_eq!(seat.hand_out(30), 20);
        let order: Vec<_> = (0..3).map(|_| tell(&seat, 1).0).collect();
        assert_eq!(order, ["new", "b", "a"]);
        assert_eq!(seat.hand_out(30), 30);
    }

    #[test]
    fn positions_never_go_back() {
        let (seat, _) = seat(50);
        assert_eq!(seat.hand_out(40), 50, "another broker was further");
        seat.note(&name("a"), 60);
        assert_eq!(seat.hand_out(60), 59);
        tell(&seat, 1);
        assert_eq!(seat.hand_out(60), 60);
    }

    #[test]
    fn what_can_not_be_told_holds_the_position_and_nothing_else() {
        let (seat, clock) = seat(0);
        seat.note(&name("a"), 5);
        seat.note(&name("b"), 6);
        let untold = seat.pick().unwrap();
        seat.defer(&untold);
        assert_eq!(tell(&seat, 1).0, "b");
        assert_eq!((seat.pick(), seat.hand_out(6)), (None, 4));
        assert_eq!(seat.find(clock_now(&clock)), Finding::Fine);
        clock.advance(Duration::from_secs(1));
        assert_eq!(seat.find(clock_now(&clock)), Finding::Due);
        seat.note(&name("a"), 9);
        let again = seat.pick().unwrap();
        assert_eq!((again.first, again.latest, again.changes), (5, 9, 2));
        seat.defer(&again);
        clock.advance(Duration::from_secs(1));
        assert_eq!(seat.pick(), None, "the second pause is longer");
        clock.advance(Duration::from_secs(1));
        tell(&seat, 1);
        assert_eq!(seat.hand_out(9), 9);
    }

    fn clock_now(clock: &ManualClock) -> Duration {
        crate::clock::Clock::monotonic(clock)
    }

    #[test]
    fn only_who_is_owed_something_and_does_not_ask_is_slow() {
        let (seat, clock) = seat(0);
        clock.advance(PATIENCE * 2);
        assert_eq!(seat.find(clock_now(&clock)), Finding::Due, "silent, and owed nothing");
        seat.note(&name("a"), 5);
        clock.advance(PATIENCE - Duration::from_secs(1));
        assert_eq!(seat.find(clock_now(&clock)), Finding::Due);
        clock.advance(Duration::from_secs(1));
        assert_eq!(seat.find(clock_now(&clock)), Finding::Slow);
        seat.end(End::Slow);
        assert_eq!((seat.ended(), seat.pick()), (Some(End::Slow), None));
        assert_eq!(seat.find(clock_now(&clock)), Finding::Ended);
        seat.note(&name("a"), 6);
        assert_eq!(seat.pick(), None, "nothing is kept for who is gone");
    }

    #[test]
    fn a_prefix_that_covers_more_than_there_is_room_for_ends_with_the_reason() {
        let ledger = Arc::new(Ledger::default());
        ledger.set(Bounds { names_per_principal: 3, ..Bounds::default() });
        let (seat, clock) = seat_of(&ledger, 0);
        let backlog = |names: &[&str]| names.iter().map(|text| (name(text), None)).collect::<Vec<_>>();
        assert!(seat.expect(backlog(&["a", "b", "c", "d"])).is_err());
        seat.expect(backlog(&["a", "b"])).unwrap();
        seat.note(&name("c"), 5);
        for revision in [6, 7] {
            while seat.pick().is_some() {
                tell(&seat, 1);
            }
            for text in ["a", "b", "c"] {
                seat.note(&name(text), revision);
            }
        }
        assert_eq!(seat.ended(), None, "what it holds already needs no more room");
        let (untold, position) = (seat.pick().unwrap(), seat.hand_out(7));
        seat.note(&name("d"), 8);
        seat.settle(&untold, 7, Some(version(1)));
        assert_eq!(seat.hand_out(8), position, "who comes back hears of all that was not told");
        let Some(End::Over(over)) = seat.ended() else { panic!("it ended") };
        assert!(format!("{over:?}").contains("would watch 4 names"), "{over:?}");
        assert_eq!((seat.pick(), seat.find(clock_now(&clock))), (None, Finding::Ended));
        seat.end(End::Slow);
        assert_eq!(seat.ended(), Some(End::Over(over)), "the first reason stays");
        drop(seat);
        assert_eq!(ledger.watches(), 0);
    }

    #[tokio::test]
    async fn a_watcher_is_waited_for_from_the_moment_it_is_woken() {
        use std::future::poll_fn;
        use std::task::Poll;
        let (seat, clock) = seat(0);
        let waiting = Arc::clone(&seat);
        let mut work = Box::pin(async move { waiting.attended(waiting.rung()).await });
        poll_fn(|context| {
            assert!(work.as_mut().poll(context).is_pending());
            Poll::Ready(())
        })
        .await;
        assert_eq!(seat.unattended_since(), None, "it is the seat that has nothing to say");
        clock.advance(PATIENCE * 2);
        seat.note(&name("a"), 5);
        assert_eq!(seat.unattended_since(), Some(clock_now(&clock)));
        clock.advance(PATIENCE);
        assert_eq!(seat.find(clock_now(&clock)), Finding::Slow, "woken, and not seen since");
        work.await;
    }

    #[test]
    fn who_may_not_know_hears_nothing() {
        let (seat, _) = seat(0);
        seat.deny([name("a")]);
        assert!(!seat.hears_of(&name("a")) && seat.hears_of(&name("b")));
        seat.note(&name("a"), 3);
        assert_eq!(seat.said(&name("a")), Some(Said::Denied));
        tell(&seat, 1);
        assert!(seat.hears_of(&name("a")), "until policy changes its mind");
    }

    #[test]
    fn a_look_is_due_once() {
        let (seat, clock) = seat(0);
        seat.look_at(clock_now(&clock) + Duration::from_secs(5));
        assert!(!seat.is_look_due());
        clock.advance(Duration::from_secs(5));
        assert_eq!(seat.find(clock_now(&clock)), Finding::Due);
        assert!(seat.is_look_due() && !seat.is_look_due());
    }
}
