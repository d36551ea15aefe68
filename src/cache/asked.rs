//! How often the store was asked for which secret. Names are for administrators alone, so none of it is a metric.
//!
//! INVARIANT: memory is bounded, whatever is asked for: so many secrets have a count of their own, and the rest has one
//! together. Names that may not exist get none, so that guessing them pushes no secret out of its place.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::secret::SecretId;

/// How many secrets have a count of their own: the first that were found. About half a megabyte at most, beside names.
const MOST_SECRETS: usize = 4_096;

/// The secrets that a store was asked for most often.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MostAsked {
    /// How many calls asked for each, most first: one that asks for many counts for each of them. Refreshes of the same
    /// secret at the same time count each, also where the store asks once for all of them.
    pub secrets: Vec<(SecretId, u64)>,
    /// How often all others were asked for, together: those that were asked for less, and what was not found.
    pub others: u64,
}

/// The counts.
#[derive(Default)]
pub(super) struct AskedFor(Mutex<Counts>);

#[derive(Default)]
struct Counts {
    by_secret: HashMap<SecretId, u64>,
    others: u64,
}

impl AskedFor {
    /// Counts a call, which asked for each of these and found it or did not.
    pub(super) fn count<'a>(&self, outcomes: impl Iterator<Item = (&'a SecretId, bool)>) {
        let mut counts = self.counts();
        for (id, found) in outcomes {
            counts.count(id, found);
        }
    }

    /// The first `most`, and all others together.
    pub(super) fn most(&self, most: usize) -> MostAsked {
        let counts = self.counts();
        let mut by_count: Vec<(&SecretId, u64)> =
            counts.by_secret.iter().map(|(id, count)| (id, *count)).collect();
        by_count.sort_unstable_by_key(|(id, count)| (Reverse(*count), *id));
        let rest: u64 = by_count.iter().skip(most).map(|(_, count)| count).sum();
        let secrets = by_count.into_iter().take(most).map(|(id, count)| (id.clone(), count)).collect();
        MostAsked { secrets, others: counts.others + rest }
    }

    /// A panic under the lock leaves a count short at worst.
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts {
    fn count(&mut self, id: &SecretId, found: bool) {
        if let Some(count) = self.by_secret.get_mut(id) {
            *count += 1;
        } else if found && self.by_secret.len() < MOST_SECRETS {
            self.by_secret.insert(id.clone(), 1);
        } else {
            self.others += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> SecretId {
        SecretId::parse("production", name).unwrap()
    }

    fn count(asked: &AskedFor, name: &str, found: bool) {
        asked.count([(&id(name), found)].into_iter());
    }

    #[test]
    fn the_most_asked_come_first_and_the_rest_together() {
        let asked = AskedFor::default();
        for name in ["c", "b", "a", "b", "a", "d", "a"] {
            count(&asked, name, true);
        }
        let expected = MostAsked { secrets: vec![(id("a"), 3), (id("b"), 2)], others: 2 };
        assert_eq!(asked.most(2), expected);
        assert_eq!(asked.most(9).secrets.len(), 4);
        assert_eq!(asked.most(9).others, 0);
    }

    #[test]
    fn what_was_never_found_has_no_count_of_its_own() {
        let asked = AskedFor::default();
        count(&asked, "guess", false);
        count(&asked, "a", true);
        count(&asked, "a", false);
        assert_eq!(asked.most(9), MostAsked { secrets: vec![(id("a"), 2)], others: 1 });
    }

    #[test]
    fn memory_is_bounded_and_nothing_goes_uncounted() {
        let asked = AskedFor::default();
        let all = 2 * MOST_SECRETS as u64;
        for n in 0..all {
            count(&asked, &format!("secret-{n}"), true);
        }
        count(&asked, "secret-0", true);
        let most = asked.most(usize::MAX);
        assert_eq!((most.secrets.len(), most.others), (MOST_SECRETS, all / 2));
        assert_eq!(most.secrets.first(), Some(&(id("secret-0"), 2)));
    }
}
