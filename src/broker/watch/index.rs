//! What is known of an environment's secrets, and which seats want to hear of which.
//!
//! A place in it is a number, and a name that several know of is kept once: ten thousand watchers of one secret cost ten
//! thousand numbers.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use super::channel::Arrival;
use super::seat::Seat;
use super::{Current, Subject};
use crate::kv::Revision;
use crate::secret::SecretName;

/// How many seats are taken out at once by who has time.
const AT_ONCE: usize = 256;

#[derive(Default)]
pub(super) struct Index {
    pub(super) known: BTreeMap<SecretName, Known>,
    pub(super) seats: HashMap<u64, Arc<Seat>>,
    by_name: HashMap<SecretName, Places>,
    by_prefix: HashMap<String, Places>,
    pub(super) looked_at: HashMap<SecretName, Duration>,
    pub(super) listed_at: HashMap<String, Duration>,
}

/// The numbers of seats, sorted. New ones are almost always the largest.
type Places = Vec<u64>;

/// What kv says of a secret.
#[derive(Debug, Clone)]
pub(super) struct Known {
    /// The revision of its last change.
    pub(super) revision: Revision,
    /// What is current, where kv says it.
    pub(super) current: Current,
    /// A change up to which the store, asked past the cache, had no current version of it.
    pub(super) absent_at: Revision,
}

impl Known {
    pub(super) const fn new(revision: Revision, current: Current) -> Self {
        Self { revision, current, absent_at: 0 }
    }
}

impl Index {
    /// The name as others hold it already, where they do.
    pub(super) fn shared(&self, name: &SecretName) -> SecretName {
        let known = self.known.get_key_value(name).map(|(name, _)| name);
        let watched = || self.by_name.get_key_value(name).map(|(name, _)| name);
        known.or_else(watched).unwrap_or(name).clone()
    }

    pub(super) fn take_in(&mut self, seat: &Arc<Seat>) {
        self.seats.insert(seat.number, Arc::clone(seat));
        match &seat.sitter.subject {
            Subject::Names(names) => names.iter().for_each(|name| keep(&mut self.by_name, name, seat.number)),
            Subject::Prefix(prefix) => keep(&mut self.by_prefix, prefix, seat.number),
        }
    }

    /// Whether it was there.
    pub(super) fn take_out(&mut self, number: u64) -> bool {
        let Some(seat) = self.seats.remove(&number) else { return false };
        match &seat.sitter.subject {
            Subject::Names(names) => names.iter().for_each(|name| forget(&mut self.by_name, name, number)),
            Subject::Prefix(prefix) => forget(&mut self.by_prefix, prefix, number),
        }
        true
    }

    /// All who would hear of a change of this secret.
    pub(super) fn wanting(&self, name: &SecretName) -> Vec<Arc<Seat>> {
        let by_prefix = prefixes(name).filter_map(|prefix| self.by_prefix.get(prefix));
        let numbers = self.by_name.get(name).into_iter().chain(by_prefix).flatten();
        numbers.filter_map(|number| self.seats.get(number)).cloned().collect()
    }

    /// Some of those who would, by its name or by this prefix of it: the next after the seat of that number, until there
    /// are none.
    pub(super) fn some_wanting(
        &self,
        name: &SecretName,
        prefix: Option<&str>,
        after: Option<u64>,
    ) -> Vec<Arc<Seat>> {
        let numbers = match prefix {
            None => self.by_name.get(name),
            Some(prefix) => self.by_prefix.get(prefix),
        };
        let numbers = numbers.map(Vec::as_slice).unwrap_or_default();
        let before = numbers.partition_point(|number| Some(*number) <= after);
        let next = numbers.iter().skip(before).take(AT_ONCE);
        next.filter_map(|number| self.seats.get(number)).cloned().collect()
    }

    pub(super) fn under(&self, prefix: &str) -> impl Iterator<Item = (&SecretName, &Known)> {
        let from: (Bound<&str>, Bound<&str>) = (Bound::Included(prefix), Bound::Unbounded);
        self.known.range::<str, _>(from).take_while(move |(name, _)| name.as_str().starts_with(prefix))
    }

    /// What a watcher does not know as it comes, and may.
    pub(super) fn backlog(
        &self,
        subject: &Subject,
        arrival: &Arrival<'_>,
    ) -> Vec<(SecretName, Option<Revision>)> {
        let unknown = |name: &SecretName| (name.clone(), self.known.get(name).map(|known| known.revision));
        let mut backlog: Vec<_> = match subject {
            Subject::Names(names) => names.iter().map(unknown).collect(),
            Subject::Prefix(prefix) => {
                let known = self.under(prefix).map(|(name, known)| (name.clone(), Some(known.revision)));
                let listed = arrival.listed.iter().filter(|name| !self.known.contains_key(*name));
                known.chain(listed.map(|name| (name.clone(), None))).collect()
            }
        };
        backlog.retain(|(name, changed)| {
            changed.is_none_or(|changed| changed > arrival.after) && !arrival.denied.contains(name)
        });
        backlog
    }
}

/// What a name starts with: all that a prefix may be that covers it.
pub(super) fn prefixes(name: &SecretName) -> impl Iterator<Item = &str> {
    let text = name.as_str();
    (0..=text.len()).filter_map(move |length| text.get(..length))
}

/// Whether it is `pause` ago that someone claimed `key`; then it is claimed.
pub(super) fn claim<K: Hash + Eq + Clone>(
    claimed: &mut HashMap<K, Duration>,
    key: &K,
    now: Duration,
    pause: Duration,
) -> bool {
    let free = claimed.get(key).is_none_or(|at| now.saturating_sub(*at) >= pause);
    if free {
        claimed.insert(key.clone(), now);
    }
    free
}

fn keep<K: Hash + Eq + Clone>(places: &mut HashMap<K, Places>, key: &K, number: u64) {
    let numbers = places.entry(key.clone()).or_default();
    if let Err(at) = numbers.binary_search(&number) {
        numbers.insert(at, number);
    }
}

fn forget<K: Hash + Eq>(places: &mut HashMap<K, Places>, key: &K, number: u64) {
    let Some(numbers) = places.get_mut(key) else { return };
    if let Ok(at) = numbers.binary_search(&number) {
        numbers.remove(at);
    }
    if numbers.is_empty() {
        places.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> SecretName {
        SecretName::parse(text).unwrap()
    }

    fn by_name(number: u64, text: &str) -> Arc<Seat> {
        Seat::alone(number, Subject::Names([name(text)].into()))
    }

    fn numbers(seats: &[Arc<Seat>]) -> Vec<u64> {
        seats.iter().map(|seat| seat.number).collect()
    }

    #[test]
    fn seats_are_found_by_name_and_by_every_prefix_until_they_leave() {
        let mut index = Index::default();
        index.take_in(&by_name(2, "team/a"));
        // Two may come the other way round.
        index.take_in(&by_name(1, "team/a"));
        for (number, prefix) in [(3, ""), (4, "team/"), (5, "team/a"), (6, "team/ab"), (7, "x")] {
            index.take_in(&Seat::alone(number, Subject::Prefix(prefix.to_owned())));
        }
        assert_eq!(numbers(&index.wanting(&name("team/a"))), [1, 2, 3, 4, 5]);
        assert!(index.take_out(4) && index.take_out(1));
        assert!(!index.take_out(4), "once");
        assert_eq!(numbers(&index.wanting(&name("team/a"))), [2, 3, 5]);
        for number in [2, 3, 5, 6, 7] {
            assert!(index.take_out(number));
        }
        assert!(index.by_name.is_empty() && index.by_prefix.is_empty() && index.seats.is_empty());
    }

    #[test]
    fn many_seats_are_taken_out_some_at_a_time_and_each_once() {
        let mut index = Index::default();
        let all = AT_ONCE as u64 * 2 + 1;
        for number in 0..all {
            index.take_in(&by_name(number, "a"));
        }
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let some = index.some_wanting(&name("a"), None, after);
            let Some(last) = some.last() else { break };
            assert!(some.len() <= AT_ONCE);
            after = Some(last.number);
            seen.extend(numbers(&some));
        }
        assert_eq!(seen, (0..all).collect::<Vec<_>>());
        assert!(index.some_wanting(&name("a"), Some("a"), None).is_empty());
    }

    #[test]
    fn a_name_that_several_know_of_is_kept_once() {
        let is_shared = |one: &SecretName, other: &SecretName| std::ptr::eq(one.as_str(), other.as_str());
        let mut index = Index::default();
        let (first, again) = (name("a"), name("a"));
        assert!(is_shared(&index.shared(&first), &first));
        index.take_in(&Seat::alone(1, Subject::Names([first.clone()].into())));
        assert!(is_shared(&index.shared(&again), &first), "another watches it");
        index.known.insert(again.clone(), Known::new(1, Current::Unknown));
        assert!(is_shared(&index.shared(&name("a")), &again), "kv has it");
    }
}
