//! What is kept of one secret: the answers to a few selectors, and what is known not to be there.
//!
//! Both are immutable and replaced as a whole: a reader takes no lock and never sees half of a change.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use crate::secret::{Label, SecretId, Selector};
use crate::store::{Fetched, Order, Source, StoreError};

/// How many selectors of one secret are kept, so that asking for many version ids can't grow an entry.
const MOST_SELECTORS: usize = 8;
/// What an entry costs beside its answers: the map's node, the queue's node, counters and the key. An estimate.
const ENTRY_OVERHEAD: usize = 384;
/// What the allocations of an answer cost beside their contents: value, version id and list of labels. An estimate.
const SLOT_OVERHEAD: usize = 96;
/// How many hits make an answer hot. One may be the second half of someone's start; from two on it is asked for again
/// and again within one time to live.
const HOT: u32 = 2;
/// The last part of its time to live in which a hot answer is fetched anew: a fifth.
const AHEAD: u32 = 5;

/// The answer to one selector.
#[derive(Clone)]
pub(super) struct Slot {
    pub(super) selector: Selector,
    pub(super) fetched: Fetched,
    /// When the store was asked, not when it answered: an age is never understated.
    pub(super) asked_at: Duration,
    pub(super) expires_at: Duration,
    /// From when on it is fetched anew where it is hot.
    ahead_from: Duration,
    demand: Demand,
}

impl Slot {
    pub(super) fn new(selector: Selector, fetched: Fetched, asked_at: Duration, lifetime: Duration) -> Self {
        Self {
            selector,
            fetched,
            asked_at,
            expires_at: asked_at.saturating_add(lifetime),
            ahead_from: asked_at.saturating_add(lifetime - lifetime / AHEAD),
            demand: Demand::default(),
        }
    }

    /// Counts a hit. True for one of them, where the answer is hot and nearly over: whoever makes it has the answer
    /// fetched anew.
    pub(super) fn hit(&self, now: Duration) -> bool {
        self.demand.hit() && now >= self.ahead_from && self.demand.claim()
    }

    pub(super) fn age(&self, now: Duration) -> Duration {
        now.saturating_sub(self.asked_at)
    }

    pub(super) fn answer(&self, now: Duration, stale: bool) -> Fetched {
        Fetched { source: Source::Cache, age: self.age(now), stale, ..self.fetched.clone() }
    }

    /// Labels outlast version ids: whoever may read versions by id must not push AWSCURRENT out.
    fn worth(&self) -> (bool, Duration) {
        (matches!(self.selector, Selector::Label(_)), self.asked_at)
    }

    fn weight(&self) -> usize {
        let label = |label: &Label| size_of::<Label>() + label.as_str().len();
        let version = &self.fetched.version;
        let labels: usize = version.labels.iter().map(label).sum();
        size_of::<Self>() + SLOT_OVERHEAD + version.id.as_str().len() + labels + self.fetched.value.len()
    }
}

/// How much an answer is wanted. Once it is known to be hot, a hit writes nothing: the processors share the cache line.
#[derive(Default)]
struct Demand {
    hits: AtomicU32,
    claimed: AtomicBool,
}

impl Demand {
    /// Whether the answer is hot, with this hit.
    fn hit(&self) -> bool {
        self.hits.load(Relaxed) >= HOT || self.hits.fetch_add(1, Relaxed) + 1 >= HOT
    }

    /// True once.
    fn claim(&self) -> bool {
        !self.claimed.load(Relaxed) && !self.claimed.swap(true, Relaxed)
    }
}

/// An entry is replaced as a whole, and its answers take along what is known of them. A hit that is counted meanwhile
/// may be lost; then the answer is hot a hit later.
impl Clone for Demand {
    fn clone(&self) -> Self {
        Self {
            hits: AtomicU32::new(self.hits.load(Relaxed)),
            claimed: AtomicBool::new(self.claimed.load(Relaxed)),
        }
    }
}

/// A secret as the store last described it.
///
/// INVARIANT: all answers come from one state of the secret, as far as the store numbers its states. So an entry is
/// older than an answer, or as old, as a whole.
pub(super) struct Entry {
    order: Order,
    slots: Box<[Slot]>,
    retry_at: Option<Duration>,
}

impl Entry {
    /// `before`, with `slot` in the place of what was there for its selector; without whatever `slot` proves outdated.
    pub(super) fn with(before: Option<&Self>, slot: Slot) -> Self {
        let order = slot.fetched.order;
        let mut slots = match before {
            Some(before) if before.order == order && !before.contradicts(&slot) => {
                before.others(&slot.selector)
            }
            _ => Vec::new(),
        };
        if slots.len() >= MOST_SELECTORS
            && let Some((least, _)) = slots.iter().enumerate().min_by_key(|(_, slot)| slot.worth())
        {
            slots.swap_remove(least);
        }
        slots.push(slot);
        Self { order, slots: slots.into_boxed_slice(), retry_at: None }
    }

    /// The entry without the answer to `selector`; `None` where nothing would be left.
    pub(super) fn without(&self, selector: &Selector) -> Option<Self> {
        let slots = self.others(selector);
        (!slots.is_empty()).then(|| Self { slots: slots.into_boxed_slice(), ..*self })
    }

    /// The entry after the store could not be asked, and is not to be asked again before `retry_at`.
    pub(super) fn held_back(&self, retry_at: Duration) -> Self {
        Self { slots: self.slots.clone(), retry_at: Some(retry_at), ..*self }
    }

    pub(super) fn slot(&self, selector: &Selector) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.selector == *selector)
    }

    pub(super) const fn order(&self) -> Order {
        self.order
    }

    /// Until when the store is not asked again; `None` where it answered when it was last asked.
    pub(super) const fn retry_at(&self) -> Option<Duration> {
        self.retry_at
    }

    /// Bytes of values plus bookkeeping.
    pub(super) fn weight(&self, id: &SecretId) -> u32 {
        let slots: usize = self.slots.iter().map(Slot::weight).sum();
        u32::try_from(ENTRY_OVERHEAD + id.name.as_str().len() + slots).unwrap_or(u32::MAX)
    }

    /// Where a store does not number its changes, another version under one selector says that labels have moved.
    fn contradicts(&self, slot: &Slot) -> bool {
        self.slot(&slot.selector).is_some_and(|old| old.fetched.version.id != slot.fetched.version.id)
    }

    fn others(&self, selector: &Selector) -> Vec<Slot> {
        self.slots.iter().filter(|slot| slot.selector != *selector).cloned().collect()
    }
}

/// What is known not to be there: the secret itself, or what some selectors point at. Oldest first.
pub(super) struct Absences(Box<[Absence]>);

#[derive(Clone)]
struct Absence {
    /// `None`: the whole secret.
    of: Option<Selector>,
    until: Duration,
}

impl Absences {
    /// `before`, and that `of` is absent `until` then; without what is over.
    pub(super) fn with(before: Option<&Self>, of: Option<Selector>, until: Duration, now: Duration) -> Self {
        let holds = |absence: &&Absence| now < absence.until && absence.of != of;
        let mut kept: Vec<Absence> =
            before.map_or_else(Vec::new, |before| before.0.iter().filter(holds).cloned().collect());
        if kept.len() >= MOST_SELECTORS {
            kept.remove(0);
        }
        kept.push(Absence { of, until });
        Self(kept.into_boxed_slice())
    }

    /// What the store said of `selector`, where that still holds.
    pub(super) fn error(&self, id: &SecretId, selector: &Selector, now: Duration) -> Option<StoreError> {
        let concerns = |absence: &&Absence| absence.of.as_ref().is_none_or(|of| of == selector);
        let absence = self.0.iter().filter(|absence| now < absence.until).find(concerns)?;
        Some(match &absence.of {
            None => StoreError::SecretNotFound(id.clone()),
            Some(of) => StoreError::VersionNotFound { id: id.clone(), selector: of.clone() },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::{SecretValue, Version, VersionId};

    fn version(n: u64) -> VersionId {
        VersionId::parse(&format!("{n:032}")).unwrap()
    }

    fn slot(selector: Selector, holder: u64, order: Order, at: u64) -> Slot {
        let version = Version {
            id: version(holder),
            labels: vec![Label::Current],
            created_at: jiff::Timestamp::UNIX_EPOCH,
        };
        let value = SecretValue::text("x".repeat(100)).unwrap();
        let (source, age, stale) = (Source::Store, Duration::ZERO, false);
        let fetched = Fetched { version, value, order, source, age, stale };
        Slot::new(selector, fetched, Duration::from_secs(at), Duration::from_secs(60))
    }

    const PREVIOUS: Selector = Selector::Label(Label::Previous);

    #[test]
    fn a_new_state_of_the_secret_clears_what_was_said_of_the_old_one() {
        let old = Entry::with(None, slot(PREVIOUS, 1, Order::Revision(4), 0));
        let same = Entry::with(Some(&old), slot(Selector::CURRENT, 2, Order::Revision(4), 1));
        assert!(same.slot(&PREVIOUS).is_some() && same.slot(&Selector::CURRENT).is_some());
        let new = Entry::with(Some(&same), slot(Selector::CURRENT, 3, Order::Revision(5), 2));
        assert!(new.slot(&PREVIOUS).is_none());
    }

    #[test]
    fn without_numbers_another_version_is_another_state() {
        let old = Entry::with(None, slot(PREVIOUS, 1, Order::Unknown, 0));
        let same = Entry::with(Some(&old), slot(Selector::CURRENT, 2, Order::Unknown, 1));
        assert!(same.slot(&PREVIOUS).is_some());
        let again = Entry::with(Some(&same), slot(Selector::CURRENT, 2, Order::Unknown, 2));
        assert!(again.slot(&PREVIOUS).is_some());
        let moved = Entry::with(Some(&again), slot(Selector::CURRENT, 3, Order::Unknown, 3));
        assert!(moved.slot(&PREVIOUS).is_none());
    }

    #[test]
    fn version_ids_neither_grow_an_entry_nor_push_a_label_out() {
        let mut entry = Entry::with(None, slot(Selector::CURRENT, 0, Order::Revision(1), 0));
        for n in 1..100 {
            entry = Entry::with(Some(&entry), slot(Selector::Version(version(n)), n, Order::Revision(1), n));
        }
        assert_eq!(entry.slots.len(), MOST_SELECTORS);
        assert!(entry.slot(&Selector::CURRENT).is_some());
        assert!(entry.slot(&Selector::Version(version(99))).is_some(), "the newest id is kept");
        assert!(entry.slot(&Selector::Version(version(1))).is_none(), "the oldest is not");
    }

    #[test]
    fn a_hot_answer_is_due_once_and_in_its_last_fifth() {
        let at = Duration::from_secs;
        let cold = slot(Selector::CURRENT, 1, Order::Revision(1), 0);
        assert!(!cold.hit(at(59)), "the first hit");
        assert!(cold.hit(at(59)), "the second");
        assert!(!cold.hit(at(59)), "once");
        let hot = slot(Selector::CURRENT, 1, Order::Revision(1), 0);
        assert!((0..10).all(|_| !hot.hit(at(47))), "too early");
        assert!(hot.hit(at(48)) && !hot.hit(at(49)));
    }

    #[test]
    fn what_is_known_of_the_demand_outlasts_the_replacement_of_an_entry() {
        let at = Duration::from_secs;
        let current = |entry: &Entry, now| entry.slot(&Selector::CURRENT).unwrap().hit(at(now));
        let entry = Entry::with(None, slot(Selector::CURRENT, 1, Order::Revision(1), 0));
        assert!(!current(&entry, 1) && !current(&entry, 2));
        let entry = Entry::with(Some(&entry), slot(PREVIOUS, 0, Order::Revision(1), 3)).held_back(at(9));
        assert!(current(&entry, 50), "hot");
        let entry = entry.held_back(at(51)).without(&PREVIOUS).unwrap();
        assert!(!current(&entry, 52), "claimed");
        let entry = Entry::with(Some(&entry), slot(Selector::CURRENT, 1, Order::Revision(1), 53));
        assert!(!current(&entry, 112), "a new answer starts anew");
    }

    #[test]
    fn bookkeeping_of_one_secret_is_counted_and_below_a_kibibyte() {
        let id = SecretId::parse("production", "payments/api/signing-key").unwrap();
        let entry = Entry::with(None, slot(Selector::CURRENT, 1, Order::Revision(1), 0));
        let overhead = entry.weight(&id) - 100;
        assert!((400..1_024).contains(&overhead), "{overhead}");
    }

    #[test]
    fn absences_end_and_are_bounded() {
        let id = SecretId::parse("production", "database").unwrap();
        let at = Duration::from_secs;
        let mut absences = Absences::with(None, Some(PREVIOUS), at(5), at(0));
        assert!(matches!(absences.error(&id, &PREVIOUS, at(4)), Some(StoreError::VersionNotFound { .. })));
        assert!(absences.error(&id, &PREVIOUS, at(5)).is_none());
        assert!(absences.error(&id, &Selector::CURRENT, at(4)).is_none());
        for n in 0..100 {
            absences = Absences::with(Some(&absences), Some(Selector::Version(version(n))), at(5), at(0));
        }
        assert_eq!(absences.0.len(), MOST_SELECTORS);
        let gone = Absences::with(Some(&absences), None, at(5), at(0));
        assert!(matches!(gone.error(&id, &Selector::CURRENT, at(1)), Some(StoreError::SecretNotFound(_))));
    }
}
