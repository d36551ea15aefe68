//! What is remembered, and for how long. moka bounds how much; how long is decided here, by the clock that is handed in.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use moka::sync::Cache as Map;

use super::Settings;
use super::entry::{Absences, Entry, Slot};
use crate::secret::{SecretId, Selector};
use crate::store::{Fetched, Order, StoreError};

/// How many secrets' absences are kept. A map of its own, so that asking for names that don't exist evicts no value.
const MOST_ABSENCES: u64 = 2_048;
/// How long a store that could not be asked is left alone: at least, and at most.
const HOLD_BACK: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));

/// What is known without asking the store.
pub(super) enum Recalled {
    /// Within its time to live.
    Fresh(Fetched),
    /// The same, of an answer that is hot and nearly over. Told to one reader, who has it fetched anew.
    Due(Fetched),
    /// Past it, and within the bound on staleness.
    Stale(Fetched),
    /// The store said that there is no such thing, a moment ago.
    Absent(StoreError),
}

pub(super) struct Memory {
    entries: Map<SecretId, Arc<Entry>>,
    absences: Map<SecretId, Arc<Absences>>,
    settings: Settings,
    seed: RandomState,
    draws: AtomicU64,
}

impl Memory {
    pub(super) fn new(settings: Settings) -> Self {
        let weight = |id: &SecretId, entry: &Arc<Entry>| entry.weight(id);
        Self {
            entries: Map::builder().max_capacity(settings.capacity_bytes).weigher(weight).build(),
            absences: Map::builder().max_capacity(MOST_ABSENCES).build(),
            settings,
            seed: RandomState::new(),
            draws: AtomicU64::new(0),
        }
    }

    pub(super) const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What answers `selector` now: a fresh answer, a known absence, or a stale answer while the store is held back.
    pub(super) fn recall(&self, id: &SecretId, selector: &Selector, now: Duration) -> Option<Recalled> {
        let held_back = |entry: &Entry| entry.retry_at().is_some_and(|retry_at| now < retry_at);
        self.judge(id, selector, now, held_back).or_else(|| self.absent(id, selector, now))
    }

    /// What answers `selector` while someone else finds out whether a store that failed is back.
    pub(super) fn recall_while_retried(
        &self,
        id: &SecretId,
        selector: &Selector,
        now: Duration,
    ) -> Option<Recalled> {
        self.judge(id, selector, now, |entry| entry.retry_at().is_some())
    }

    /// What answers `selector` after the store could not be asked.
    pub(super) fn fall_back(&self, id: &SecretId, selector: &Selector, now: Duration) -> Option<Recalled> {
        self.judge(id, selector, now, |_| true)
    }

    /// INVARIANT: a stale answer leaves only here, only where the store can't be asked, and no older than its bound.
    fn judge(
        &self,
        id: &SecretId,
        selector: &Selector,
        now: Duration,
        unreachable: impl FnOnce(&Entry) -> bool,
    ) -> Option<Recalled> {
        let entry = self.entries.get(id)?;
        let slot = entry.slot(selector)?;
        if now < slot.expires_at {
            let answer = slot.answer(now, false);
            return Some(if slot.hit(now) { Recalled::Due(answer) } else { Recalled::Fresh(answer) });
        }
        let bound = self.settings.ttl.saturating_add(self.settings.stale_for);
        (slot.age(now) <= bound && unreachable(&entry)).then(|| Recalled::Stale(slot.answer(now, true)))
    }

    fn absent(&self, id: &SecretId, selector: &Selector, now: Duration) -> Option<Recalled> {
        self.absences.get(id)?.error(id, selector, now).map(Recalled::Absent)
    }

    /// Whether anything may be kept of a secret. Asked only where something is about to be: what is never kept is never
    /// found either, so a hit pays nothing for the list.
    fn keeps(&self, id: &SecretId) -> bool {
        let Settings { ttl, uncached, .. } = &self.settings;
        !ttl.is_zero() && !uncached.iter().any(|pattern| pattern.fits(&id.name))
    }

    /// Keeps an answer, unless what is kept is newer.
    pub(super) fn remember(&self, id: &SecretId, selector: &Selector, fetched: &Fetched, asked_at: Duration) {
        if !self.keeps(id) {
            return;
        }
        let before = self.entries.get(id);
        if let Some(before) = &before
            && fetched.order.is_older_than(before.order())
        {
            // Races are sorted out before; what is left is a store that went back in time.
            tracing::warn!(secret = %id, "the store answers with an older state of the secret than before; not cached");
            return;
        }
        let lifetime = self.shortened(self.settings.ttl);
        let slot = Slot::new(selector.clone(), fetched.clone(), asked_at, lifetime);
        self.entries.insert(id.clone(), Arc::new(Entry::with(before.as_deref(), slot)));
        self.absences.invalidate(id);
    }

    /// Keeps that there is no such version, or with `None` no such secret.
    pub(super) fn remember_absence(
        &self,
        id: &SecretId,
        of: Option<&Selector>,
        asked_at: Duration,
        now: Duration,
    ) {
        if self.settings.negative_ttl.is_zero() || !self.keeps(id) {
            return;
        }
        let until = asked_at.saturating_add(self.settings.negative_ttl);
        let before = self.absences.get(id);
        self.absences
            .insert(id.clone(), Arc::new(Absences::with(before.as_deref(), of.cloned(), until, now)));
    }

    /// Forgets whatever an answer that may not be kept might contradict.
    pub(super) fn distrust(&self, id: &SecretId, selector: &Selector, order: Order) {
        let Some(entry) = self.entries.get(id) else { return };
        match order {
            Order::Unknown => self.forget_selector(id, selector),
            Order::Revision(_) if entry.order().is_older_than(order) => _ = self.forget(id),
            Order::Revision(_) => {}
        }
    }

    /// Forgets the answer to one selector.
    pub(super) fn forget_selector(&self, id: &SecretId, selector: &Selector) {
        let Some(entry) = self.entries.get(id).filter(|entry| entry.slot(selector).is_some()) else { return };
        match entry.without(selector) {
            Some(rest) => self.entries.insert(id.clone(), Arc::new(rest)),
            None => self.entries.invalidate(id),
        }
    }

    /// Forgets a secret, its absence too. Whether there was an answer to forget.
    pub(super) fn forget(&self, id: &SecretId) -> bool {
        self.absences.invalidate(id);
        self.entries.remove(id).is_some()
    }

    /// Forgets everything. How many secrets there were answers of.
    pub(super) fn clear(&self) -> u64 {
        let (held, _) = self.size();
        self.entries.invalidate_all();
        self.absences.invalidate_all();
        self.tidy();
        held
    }

    /// Notes that the store can't be asked, so that not every request waits to find that out again.
    pub(super) fn hold_back(&self, id: &SecretId, now: Duration) {
        if let Some(entry) = self.entries.get(id) {
            let (least, most) = HOLD_BACK;
            let retry_at = now.saturating_add(least + (most - least).mul_f64(self.draw()));
            self.entries.insert(id.clone(), Arc::new(entry.held_back(retry_at)));
        }
    }

    /// How many secrets are kept, and how many bytes they weigh.
    pub(super) fn size(&self) -> (u64, u64) {
        self.tidy();
        (self.entries.entry_count(), self.entries.weighted_size())
    }

    /// moka has no thread of its own: it applies what was done to it, evicts what is too much, and lets go of what was
    /// removed when it is used. A map that nobody uses is swept here.
    pub(super) fn tidy(&self) {
        self.entries.run_pending_tasks();
        self.absences.run_pending_tasks();
    }

    /// 0.9 to 1.0 of `ttl`: what was cached together does not expire together.
    fn shortened(&self, ttl: Duration) -> Duration {
        ttl.saturating_sub((ttl / 10).mul_f64(self.draw()))
    }

    /// A number from 0 to 1: enough to spread load, not a secret.
    fn draw(&self) -> f64 {
        let drawn = self.seed.hash_one(self.draws.fetch_add(1, Ordering::Relaxed));
        f64::from(u32::try_from(drawn >> 32).unwrap_or(u32::MAX)) / f64::from(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::NamePattern;
    use crate::secret::{Label, SecretValue, Version, VersionId};
    use crate::store::Source;
    use std::sync::Weak;
    use std::thread::yield_now;

    const NOW: Duration = Duration::from_secs(1_000);

    fn settings() -> Settings {
        Settings {
            ttl: Duration::from_secs(60),
            negative_ttl: Duration::from_secs(5),
            stale_for: Duration::from_secs(600),
            capacity_bytes: 64 * 1_024,
            answer_within: Settings::ANSWER_WITHIN,
            uncached: vec![NamePattern::parse("payments/*").unwrap(), NamePattern::parse("jwt").unwrap()],
        }
    }

    fn id(name: &str) -> SecretId {
        SecretId::parse("production", name).unwrap()
    }

    fn fetched() -> Fetched {
        Fetched {
            version: Version {
                id: VersionId::generate(),
                labels: vec![Label::Current],
                created_at: jiff::Timestamp::UNIX_EPOCH,
            },
            value: SecretValue::binary(vec![7; 4_096]).unwrap(),
            order: Order::Revision(1),
            source: Source::Store,
            age: Duration::ZERO,
            stale: false,
        }
    }

    /// Has a secret remembered, and gives what tells whether it is still in memory.
    fn remembered(memory: &Memory, name: &str) -> Weak<Entry> {
        memory.remember(&id(name), &Selector::CURRENT, &fetched(), NOW);
        Arc::downgrade(&memory.entries.get(&id(name)).unwrap())
    }

    /// The map frees what it no longer holds once no thread of this process may still be looking at it, the other
    /// tests' among them: that takes several rounds.
    fn tidied_until(memory: &Memory, done: impl Fn() -> bool) -> bool {
        (0..1_000_000).any(|_| {
            memory.tidy();
            yield_now();
            done()
        })
    }

    #[test]
    fn b11_what_was_forgotten_is_dropped_when_the_map_is_tidied() {
        let memory = Memory::new(settings());
        let (one, other) = (remembered(&memory, "a"), remembered(&memory, "b"));
        assert!(memory.forget(&id("a")) && !memory.forget(&id("a")));
        assert!(tidied_until(&memory, || one.strong_count() == 0), "forgotten");
        assert_eq!(other.strong_count(), 1, "kept");
        let replaced = other;
        let now = remembered(&memory, "b");
        assert!(tidied_until(&memory, || replaced.strong_count() == 0), "replaced");
        assert_eq!(memory.clear(), 1);
        assert!(tidied_until(&memory, || now.strong_count() == 0), "cleared");
    }

    #[test]
    fn b11_what_was_evicted_is_dropped_when_the_map_is_tidied() {
        let memory = Memory::new(settings());
        let entries: Vec<_> = (0..200).map(|n| remembered(&memory, &format!("large-{n}"))).collect();
        let alive = || entries.iter().filter(|entry| entry.strong_count() > 0).count();
        assert!(tidied_until(&memory, || alive() <= 15), "{} are held of 64 KiB", alive());
        let (held, bytes) = memory.size();
        assert!(bytes <= 64 * 1_024 && held > 0, "{held} of {bytes} bytes");
    }

    #[test]
    fn b7_absences_are_bounded_and_evict_no_answer() {
        let memory = Memory::new(settings());
        remembered(&memory, "a");
        for n in 0..10 * MOST_ABSENCES {
            memory.remember_absence(&id(&format!("missing-{n}")), None, NOW, NOW);
        }
        memory.tidy();
        assert!(memory.absences.entry_count() <= MOST_ABSENCES, "{}", memory.absences.entry_count());
        assert!(matches!(memory.recall(&id("a"), &Selector::CURRENT, NOW), Some(Recalled::Fresh(_))));
    }

    #[test]
    fn nothing_is_kept_of_what_is_not_to_be_cached() {
        let memory = Memory::new(settings());
        for (name, kept) in
            [("payments/key", false), ("jwt", false), ("jwt-2", true), ("payments", true), ("a/jwt", true)]
        {
            memory.remember(&id(name), &Selector::CURRENT, &fetched(), NOW);
            assert_eq!(memory.recall(&id(name), &Selector::CURRENT, NOW).is_some(), kept, "{name}");
            let absent = Selector::Label(Label::Pending);
            memory.remember_absence(&id(name), Some(&absent), NOW, NOW);
            assert_eq!(memory.recall(&id(name), &absent, NOW).is_some(), kept, "{name}");
        }
    }
}
