//! What is under way for each secret, and what an answer that comes back is still worth. Pure: no store, no async.
//!
//! ```text
//!            ┌────────────── a newer revision is learnt ──────────────┐
//!            │                                                        ▼
//!         Timely ── the secret is written or invalidated ──▶ Void ◀── Overtaken
//!   others join it, its                              nobody joins,     nobody joins, its
//!   answer may be kept                               nothing is kept   answer is kept unless older
//! ```
//!
//! A write voids what is under way twice: before it, so that nobody who asks during the write joins a fetch from
//! before; and after it, so that nothing fetched meanwhile outlasts it.
//!
//! A [`Tracker`] lives while something is under way, and where the store does not number its changes for a minute
//! after a write. Revisions need no longer memory: a fetch that begins later can't be told less.

use std::collections::HashMap;
use std::time::Duration;

use tokio::sync::watch;

use crate::secret::{Label, SecretId, Selector, VersionId};
use crate::store::{Fetched, Order, StoreError, Written};

/// How long a version that this broker superseded is not accepted back from a store that does not number its changes.
const NOT_BACK_FOR: Duration = Duration::from_secs(60);

/// What the store said.
pub(super) type Answer = Result<Fetched, StoreError>;
/// Where those wait who asked the same; holds the answer once there is one.
pub(super) type Landing = watch::Receiver<Option<Answer>>;

/// What the answer of a fetch is still worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// All that is known.
    Timely,
    /// Something newer was learnt since it began.
    Overtaken,
    /// The secret was written or invalidated since it began.
    Void,
}

/// What to do with an answer in the light of what this broker wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Give it and keep it.
    Keep,
    /// Give it, but don't keep it: it may come from before the write.
    Pass,
    /// Discard it: it does come from before the write. This version is the answer.
    Instead(VersionId),
}

struct Underway {
    number: u64,
    selector: Selector,
    landing: Landing,
    standing: Standing,
}

/// One secret.
#[derive(Default)]
pub(super) struct Tracker {
    fetches: Vec<Underway>,
    last_number: u64,
    writes: usize,
    newest: Option<u64>,
    recent: Option<Recent>,
}

impl Tracker {
    /// The fetch for `selector` that a caller who asks now may share.
    pub(super) fn joinable(&self, selector: &Selector) -> Option<Landing> {
        let shared = |fetch: &&Underway| fetch.standing == Standing::Timely && fetch.selector == *selector;
        self.fetches.iter().find(shared).map(|fetch| fetch.landing.clone())
    }

    /// Numbers a fetch that begins now.
    pub(super) fn fetch_began(&mut self, selector: Selector, landing: Landing) -> u64 {
        self.last_number += 1;
        self.fetches.push(Underway {
            number: self.last_number,
            selector,
            landing,
            standing: Standing::Timely,
        });
        self.last_number
    }

    pub(super) fn fetch_ended(&mut self, number: u64) {
        self.fetches.retain(|fetch| fetch.number != number);
    }

    pub(super) fn standing(&self, number: u64) -> Standing {
        let fetch = self.fetches.iter().find(|fetch| fetch.number == number);
        fetch.map_or(Standing::Void, |fetch| fetch.standing)
    }

    pub(super) fn write_began(&mut self) {
        self.writes += 1;
        self.void(None);
    }

    pub(super) fn write_ended(&mut self) {
        self.writes = self.writes.saturating_sub(1);
        self.void(None);
    }

    /// What is under way is worth nothing any more; with a selector, only what was asked by it.
    pub(super) fn void(&mut self, only: Option<&Selector>) {
        for fetch in &mut self.fetches {
            if only.is_none_or(|selector| fetch.selector == *selector) {
                fetch.standing = Standing::Void;
            }
        }
    }

    /// Takes note of where the secret stands; false where something newer is known.
    pub(super) fn learn(&mut self, order: Order) -> bool {
        let Order::Revision(revision) = order else { return true };
        if self.newest.is_some_and(|newest| revision < newest) {
            return false;
        }
        if self.newest.replace(revision) != Some(revision) {
            let timely = self.fetches.iter_mut().filter(|fetch| fetch.standing == Standing::Timely);
            timely.for_each(|fetch| fetch.standing = Standing::Overtaken);
        }
        true
    }

    /// Takes note of what a write left.
    pub(super) fn wrote(&mut self, written: &Written, now: Duration) {
        self.learn(written.order);
        if written.order == Order::Unknown {
            self.recent.get_or_insert_default().record(written, now);
        }
    }

    /// The secret was deleted or restored: what was written before says nothing any more.
    pub(super) fn start_over(&mut self) {
        self.recent = None;
    }

    /// What `answer` is worth after what this broker wrote. Corrects the labels of one that claims too much.
    pub(super) fn verdict(&self, selector: &Selector, answer: &mut Answer, now: Duration) -> Verdict {
        match &self.recent {
            Some(recent) if !recent.is_over(now) => recent.verdict(selector, answer, now),
            _ => Verdict::Keep,
        }
    }

    fn is_idle(&self, now: Duration) -> bool {
        self.fetches.is_empty()
            && self.writes == 0
            && self.recent.as_ref().is_none_or(|recent| recent.is_over(now))
    }
}

/// What this broker lately wrote to a store that does not number its changes. Such a store may tell for a while what was
/// before.
#[derive(Default)]
struct Recent {
    last: Duration,
    current: Option<VersionId>,
    previous: Option<VersionId>,
    superseded: Vec<(VersionId, Duration)>,
}

impl Recent {
    fn record(&mut self, written: &Written, now: Duration) {
        let id = &written.version.id;
        self.last = now;
        self.superseded.retain(|(_, at)| is_recent(*at, now));
        // Where nothing was superseded (a first version, a retry that found its work done, a label of the user's own),
        // the labels still tell; but they may be from before a later write.
        let told = written.version.labels.contains(&Label::Current) && !self.is_superseded(id, now);
        if written.superseded.is_none() && !told {
            return;
        }
        let last = self.current.replace(id.clone());
        let superseded = written.superseded.clone().or(last).filter(|superseded| superseded != id);
        self.superseded.retain(|(version, _)| version != id);
        if let Some(superseded) = superseded {
            self.superseded.push((superseded.clone(), now));
            self.previous = Some(superseded);
        }
    }

    fn verdict(&self, selector: &Selector, answer: &mut Answer, now: Duration) -> Verdict {
        const PREVIOUS: Selector = Selector::Label(Label::Previous);
        let told = match &*answer {
            Ok(fetched) => &fetched.version.id,
            Err(StoreError::VersionNotFound { .. }) if *selector == PREVIOUS => {
                return instead(self.previous.as_ref());
            }
            Err(_) => return Verdict::Pass,
        };
        match selector {
            Selector::Label(Label::Current) if Some(told) == self.current.as_ref() => Verdict::Keep,
            Selector::Label(Label::Current) if self.is_superseded(told, now) => {
                instead(self.current.as_ref())
            }
            Selector::Label(Label::Previous) if Some(told) == self.previous.as_ref() => Verdict::Keep,
            // What is current to this broker's knowledge became previous by someone else's later write, or it was
            // previous before a rollback: both are possible.
            Selector::Label(Label::Previous) if Some(told) != self.current.as_ref() => {
                instead(self.previous.as_ref())
            }
            _ => {
                let superseded = self.is_superseded(told, now);
                if let Ok(fetched) = answer
                    && superseded
                {
                    fetched.version.labels.retain(|label| *label != Label::Current);
                }
                Verdict::Pass
            }
        }
    }

    fn is_superseded(&self, id: &VersionId, now: Duration) -> bool {
        self.superseded.iter().any(|(version, at)| version == id && is_recent(*at, now))
    }

    fn is_over(&self, now: Duration) -> bool {
        !is_recent(self.last, now)
    }
}

fn instead(version: Option<&VersionId>) -> Verdict {
    version.cloned().map_or(Verdict::Pass, Verdict::Instead)
}

fn is_recent(at: Duration, now: Duration) -> bool {
    now.saturating_sub(at) < NOT_BACK_FOR
}

/// The trackers of some of the secrets, under one lock.
#[derive(Default)]
pub(super) struct Shard {
    trackers: HashMap<SecretId, Tracker>,
    swept_at: Duration,
}

impl Shard {
    /// The tracker of `id`, which is made where there is none. Whoever makes one releases it.
    pub(super) fn tracker(&mut self, id: &SecretId) -> &mut Tracker {
        self.trackers.entry(id.clone()).or_default()
    }

    /// The tracker of `id`, where something is under way or was written lately.
    pub(super) fn known(&mut self, id: &SecretId) -> Option<&mut Tracker> {
        self.trackers.get_mut(id)
    }

    /// Every tracker.
    pub(super) fn all(&mut self) -> impl Iterator<Item = &mut Tracker> {
        self.trackers.values_mut()
    }

    /// Lets the tracker of `id` go, where nothing needs it.
    pub(super) fn release(&mut self, id: &SecretId, now: Duration) {
        if self.trackers.get(id).is_some_and(|tracker| tracker.is_idle(now)) {
            self.trackers.remove(id);
        }
    }

    /// Lets go what old writes left. Only writes leave something behind, so calling this at each of them bounds it to
    /// the writes of the last two minutes.
    pub(super) fn sweep(&mut self, now: Duration) {
        if !is_recent(self.swept_at, now) {
            self.swept_at = now;
            self.trackers.retain(|_, tracker| !tracker.is_idle(now));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::{SecretValue, Version};
    use crate::store::Source;

    const PREVIOUS: Selector = Selector::Label(Label::Previous);

    fn version(n: u8, labels: &[Label]) -> Version {
        let id = VersionId::parse(&format!("{n:032}")).unwrap();
        Version { id, labels: labels.to_vec(), created_at: jiff::Timestamp::UNIX_EPOCH }
    }

    fn told(n: u8) -> Answer {
        Ok(Fetched {
            version: version(n, &[Label::Current]),
            value: SecretValue::text(String::new()).unwrap(),
            order: Order::Unknown,
            source: Source::Store,
            age: Duration::ZERO,
            stale: false,
        })
    }

    /// A tracker that wrote, each second one: `(what became current, what it superseded)`.
    fn after(writes: &[(u8, Option<u8>)]) -> Tracker {
        let mut tracker = Tracker::default();
        for (second, (current, superseded)) in (0..).zip(writes) {
            let written = Written {
                version: version(*current, &[Label::Current]),
                superseded: superseded.map(|n| version(n, &[]).id),
                order: Order::Unknown,
                changed: true,
            };
            tracker.wrote(&written, Duration::from_secs(second));
        }
        tracker
    }

    fn verdict(tracker: &Tracker, selector: &Selector, n: u8, at: u64) -> Verdict {
        tracker.verdict(selector, &mut told(n), Duration::from_secs(at))
    }

    fn begin(tracker: &mut Tracker, selector: Selector) -> u64 {
        tracker.fetch_began(selector, watch::channel(None).1)
    }

    #[test]
    fn what_was_superseded_is_not_accepted_back_for_a_minute() {
        let tracker = after(&[(2, Some(1)), (3, Some(2))]);
        let three = Verdict::Instead(version(3, &[]).id);
        assert_eq!(verdict(&tracker, &Selector::CURRENT, 3, 2), Verdict::Keep);
        assert_eq!(verdict(&tracker, &Selector::CURRENT, 2, 2), three);
        assert_eq!(verdict(&tracker, &Selector::CURRENT, 1, 59), three);
        assert_eq!(verdict(&tracker, &Selector::CURRENT, 1, 60), Verdict::Pass, "superseded a minute ago");
        assert_eq!(
            verdict(&tracker, &Selector::CURRENT, 2, 61),
            Verdict::Keep,
            "nothing was written for a minute"
        );
        assert_eq!(
            verdict(&tracker, &Selector::CURRENT, 4, 2),
            Verdict::Pass,
            "someone else's, or older still"
        );
    }

    #[test]
    fn a_rollback_is_accepted_and_what_it_left_is_not() {
        let tracker = after(&[(2, Some(1)), (1, Some(2))]);
        assert_eq!(verdict(&tracker, &Selector::CURRENT, 1, 2), Verdict::Keep);
        assert_eq!(verdict(&tracker, &Selector::CURRENT, 2, 2), Verdict::Instead(version(1, &[]).id));
    }

    #[test]
    fn the_previous_version_is_known_too() {
        let tracker = after(&[(2, Some(1))]);
        let one = Verdict::Instead(version(1, &[]).id);
        assert_eq!(verdict(&tracker, &PREVIOUS, 1, 1), Verdict::Keep);
        assert_eq!(verdict(&tracker, &PREVIOUS, 9, 1), one, "from before the write");
        assert_eq!(verdict(&tracker, &PREVIOUS, 2, 1), Verdict::Pass, "someone else may have written since");
        let id = SecretId::parse("production", "database").unwrap();
        let mut missing = Err(StoreError::VersionNotFound { id, selector: PREVIOUS });
        assert_eq!(tracker.verdict(&PREVIOUS, &mut missing, Duration::from_secs(1)), one);
    }

    #[test]
    fn a_superseded_version_asked_by_its_id_does_not_claim_to_be_current() {
        let tracker = after(&[(2, Some(1))]);
        let mut answer = told(1);
        let selector = Selector::Version(version(1, &[]).id);
        assert_eq!(tracker.verdict(&selector, &mut answer, Duration::from_secs(1)), Verdict::Pass);
        assert!(answer.unwrap().version.labels.is_empty());
    }

    #[test]
    fn a_retry_that_finds_its_work_done_supersedes_what_was_known_to_be_current() {
        let tracker = after(&[(1, None), (2, None)]);
        assert_eq!(verdict(&tracker, &Selector::CURRENT, 1, 2), Verdict::Instead(version(2, &[]).id));
        let late = after(&[(2, Some(1)), (1, None)]);
        assert_eq!(verdict(&late, &Selector::CURRENT, 2, 2), Verdict::Keep, "labels from before do not tell");
    }

    #[test]
    fn writes_void_and_news_overtake() {
        let mut tracker = Tracker::default();
        let first = begin(&mut tracker, Selector::CURRENT);
        let second = begin(&mut tracker, PREVIOUS);
        assert!(tracker.joinable(&Selector::CURRENT).is_some());
        assert!(tracker.learn(Order::Revision(5)));
        assert_eq!(tracker.standing(first), Standing::Overtaken);
        assert!(tracker.joinable(&Selector::CURRENT).is_none());
        let third = begin(&mut tracker, Selector::CURRENT);
        assert!(tracker.learn(Order::Revision(5)));
        assert_eq!(tracker.standing(third), Standing::Timely, "no news");
        assert!(!tracker.learn(Order::Revision(4)));
        tracker.write_began();
        assert_eq!(tracker.standing(second), Standing::Void);
        let during = begin(&mut tracker, Selector::CURRENT);
        tracker.write_ended();
        assert_eq!(tracker.standing(during), Standing::Void);
    }

    #[test]
    fn nothing_is_kept_of_a_secret_that_nobody_asks_for() {
        let id = SecretId::parse("production", "database").unwrap();
        let mut shard = Shard::default();
        let number = begin(shard.tracker(&id), Selector::CURRENT);
        shard.release(&id, Duration::ZERO);
        assert!(shard.known(&id).is_some(), "a fetch is under way");
        shard.tracker(&id).fetch_ended(number);
        shard.release(&id, Duration::ZERO);
        assert!(shard.known(&id).is_none());

        *shard.tracker(&id) = after(&[(2, Some(1))]);
        shard.release(&id, Duration::from_secs(59));
        assert!(shard.known(&id).is_some(), "it was written lately");
        shard.sweep(Duration::from_secs(60));
        assert!(shard.known(&id).is_none());
    }
}
