//! How much there may be of watches: of one principal, and of all.
//!
//! ```text
//! Feed ─▶ Ledger   what each principal holds, and all of them together
//!           │ admit
//!           ▼
//!         Ticket   what one seat holds; grows with a prefix, given back with the seat
//! ```
//!
//! INVARIANT: what the ledger counts is the sum of what the tickets hold. A ticket is given back once, by whichever is
//! first: the seat is freed, or nobody has it any more.
//!
//! Memory is estimated, and not measured: a name counts in full for each of its watchers, although they share it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{BrokerError, MAX_WATCHES, Subject};
use crate::error::Reason;
use crate::secret::SecretName;

/// What a watch is counted as besides its names, in bytes.
const WATCH_BYTES: u64 = 1_024;
/// What a watched name is counted as besides its own bytes: its places among the watched, the untold and the told.
const NAME_BYTES: u64 = 384;

/// How much there may be of watches at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Watches of one principal. Default 1,024.
    pub per_principal: usize,
    /// Names in all watches of one principal: a name counts in each watch, and a prefix as the names that it covers.
    /// Default 20,000.
    pub names_per_principal: usize,
    /// What all watches of the broker may hold in memory, as estimated, in bytes. Default 128 MiB.
    pub bytes: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { per_principal: 1_024, names_per_principal: 20_000, bytes: 128 * 1024 * 1024 }
    }
}

impl Bounds {
    /// So many watches of one principal, and 20 names for each of them; the memory of all watches as by default.
    #[must_use]
    pub fn of_watches(per_principal: usize) -> Self {
        const NAMES_EACH: usize = 20;
        let names_per_principal = per_principal.saturating_mul(NAMES_EACH);
        Self { per_principal, names_per_principal, ..Self::default() }
    }

    fn check(&self, principal: &str, own: Held, all: Held) -> Result<(), Over> {
        let Self { per_principal, names_per_principal, bytes } = *self;
        if own.watches > per_principal {
            return Err(Over(format!(
                "{principal} has {per_principal} watches, which is all that one caller may have; end one, watch more \
                 names with each, or raise listen.watches_per_caller"
            )));
        }
        if own.names > names_per_principal {
            return Err(Over(format!(
                "{principal} would watch {} names, and one caller may watch {names_per_principal} with all its watches; \
                 watch fewer names, or raise listen.watches_per_caller",
                own.names
            )));
        }
        if all.watches > MAX_WATCHES {
            return Err(Over(format!(
                "this broker has {MAX_WATCHES} watches, which is all it takes; end one, or ask another broker"
            )));
        }
        if all.bytes > bytes {
            return Err(Over(format!(
                "the watches of this broker would hold {} bytes, and all together may hold {bytes}; watch fewer names, \
                 or ask another broker",
                all.bytes
            )));
        }
        Ok(())
    }
}

/// Over a bound: which, and the mend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Over(String);

impl From<Over> for BrokerError {
    fn from(Over(message): Over) -> Self {
        Self::rejected(Reason::LimitExceeded, message)
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Held {
    watches: usize,
    names: usize,
    bytes: u64,
}

impl Held {
    /// A watch; of a prefix without the names that it covers, which come one by one.
    fn of_watch(subject: &Subject) -> Self {
        let names = match subject {
            Subject::Names(names) => Self::of_names(names),
            // Its text is in the seat and in the index.
            Subject::Prefix(prefix) => Self { bytes: 2 * prefix.len() as u64, ..Self::default() },
        };
        names.plus(Self { watches: 1, names: 0, bytes: WATCH_BYTES })
    }

    fn of_names<'a>(names: impl IntoIterator<Item = &'a SecretName>) -> Self {
        names.into_iter().fold(Self::default(), |held, name| {
            held.plus(Self { watches: 0, names: 1, bytes: NAME_BYTES + name.as_str().len() as u64 })
        })
    }

    const fn plus(self, more: Self) -> Self {
        Self {
            watches: self.watches.saturating_add(more.watches),
            names: self.names.saturating_add(more.names),
            bytes: self.bytes.saturating_add(more.bytes),
        }
    }

    const fn minus(self, less: Self) -> Self {
        Self {
            watches: self.watches.saturating_sub(less.watches),
            names: self.names.saturating_sub(less.names),
            bytes: self.bytes.saturating_sub(less.bytes),
        }
    }
}

/// What is held, by whom.
#[derive(Default)]
pub(super) struct Ledger {
    books: Mutex<Books>,
}

#[derive(Default)]
struct Books {
    bounds: Bounds,
    all: Held,
    /// Those who hold anything, by how records name them: kind and id.
    principals: HashMap<Arc<str>, Held>,
}

impl Ledger {
    /// From now on; who holds more already keeps it, and gets nothing more.
    pub(super) fn set(&self, bounds: Bounds) {
        self.books().bounds = bounds;
    }

    /// How many watches there are.
    pub(super) fn watches(&self) -> usize {
        self.books().all.watches
    }

    /// One more watch of a principal.
    pub(super) fn admit(self: &Arc<Self>, principal: &str, subject: &Subject) -> Result<Ticket, Over> {
        let held = Held::of_watch(subject);
        let principal = self.books().charge(principal, held)?;
        Ok(Ticket { ledger: Arc::clone(self), principal, held: Mutex::new(Some(held)) })
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // Nothing panics under the lock: it adds and compares.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Books {
    /// All of it or, over a bound, nothing; gives the principal as all its watches share it.
    fn charge(&mut self, principal: &str, more: Held) -> Result<Arc<str>, Over> {
        let (principal, own) = match self.principals.get_key_value(principal) {
            Some((principal, own)) => (Arc::clone(principal), *own),
            None => (Arc::from(principal), Held::default()),
        };
        let (own, all) = (own.plus(more), self.all.plus(more));
        self.bounds.check(&principal, own, all)?;
        self.all = all;
        self.principals.insert(Arc::clone(&principal), own);
        Ok(principal)
    }

    fn discharge(&mut self, principal: &str, less: Held) {
        self.all = self.all.minus(less);
        if let Some(own) = self.principals.get_mut(principal) {
            *own = own.minus(less);
            if own.watches == 0 {
                self.principals.remove(principal);
            }
        }
    }
}

/// What one seat holds.
pub(super) struct Ticket {
    ledger: Arc<Ledger>,
    principal: Arc<str>,
    /// `None`: it was given back.
    held: Mutex<Option<Held>>,
}

impl Ticket {
    /// Whose it is, as records have it.
    pub(super) const fn principal(&self) -> &Arc<str> {
        &self.principal
    }

    /// The seat comes to hold these names too. All of them or, over a bound, none; a seat that was freed holds nothing.
    pub(super) fn hold<'a>(&self, names: impl IntoIterator<Item = &'a SecretName>) -> Result<(), Over> {
        let more = Held::of_names(names);
        let mut held = self.held();
        if let Some(held) = held.as_mut() {
            self.ledger.books().charge(&self.principal, more)?;
            *held = held.plus(more);
        }
        Ok(())
    }

    /// Gives back what is held. Only the first time counts.
    pub(super) fn give_back(&self) {
        if let Some(held) = self.held().take() {
            self.ledger.books().discharge(&self.principal, held);
        }
    }

    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.give_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reasoned as _;

    const ANA: &str = "User::\"ana\"";
    const BEN: &str = "User::\"ben\"";

    fn ledger(bounds: Bounds) -> Arc<Ledger> {
        let ledger = Arc::new(Ledger::default());
        ledger.set(bounds);
        ledger
    }

    fn names(count: usize) -> Subject {
        Subject::Names((0..count).map(|n| SecretName::parse(&format!("n{n}")).unwrap()).collect())
    }

    fn refused(ledger: &Arc<Ledger>, principal: &str, subject: &Subject) -> String {
        let error = BrokerError::from(ledger.admit(principal, subject).map(|_| ()).unwrap_err());
        assert_eq!(error.reason(), Reason::LimitExceeded);
        error.to_string()
    }

    fn is_empty(ledger: &Ledger) -> bool {
        let books = ledger.books();
        books.all == Held::default() && books.principals.is_empty()
    }

    #[test]
    fn a_principal_has_so_many_watches_and_another_its_own() {
        let ledger = ledger(Bounds { per_principal: 2, ..Bounds::default() });
        let one = ledger.admit(ANA, &names(1)).unwrap();
        let two = ledger.admit(ANA, &Subject::Prefix("a".to_owned())).unwrap();
        assert!(Arc::ptr_eq(one.principal(), two.principal()));
        let message = refused(&ledger, ANA, &names(1));
        assert!(message.contains(ANA) && message.contains("2 watches"), "{message}");
        assert!(message.contains("raise listen.watches_per_caller"), "{message}");
        let other = ledger.admit(BEN, &names(1)).unwrap();
        drop(one);
        let three = ledger.admit(ANA, &names(1)).unwrap();
        assert_eq!(ledger.watches(), 3);
        drop((two, three, other));
        assert!(is_empty(&ledger));
    }

    #[test]
    fn a_principal_watches_so_many_names_with_all_its_watches() {
        let ledger = ledger(Bounds { names_per_principal: 10, ..Bounds::default() });
        let six = ledger.admit(ANA, &names(6)).unwrap();
        let message = refused(&ledger, ANA, &names(5));
        assert!(message.contains("11 names") && message.contains("watch fewer names"), "{message}");
        let four = ledger.admit(ANA, &names(4)).unwrap();
        drop(six);
        let prefix = ledger.admit(ANA, &Subject::Prefix(String::new())).unwrap();
        let Subject::Names(more) = names(7) else { panic!("names") };
        assert!(prefix.hold(&more).is_err(), "what a prefix covers counts");
        prefix.hold(more.iter().take(6)).unwrap();
        assert!(prefix.hold(more.iter().take(1)).is_err());
        drop((four, prefix));
        assert!(is_empty(&ledger));
    }

    #[test]
    fn all_watches_together_hold_so_much_memory() {
        let long = SecretName::parse(&"x".repeat(512)).unwrap();
        let one = Held::of_watch(&Subject::Names([long.clone()].into()));
        assert_eq!(one, Held { watches: 1, names: 1, bytes: WATCH_BYTES + NAME_BYTES + 512 });
        let ledger = ledger(Bounds { bytes: 2 * one.bytes, ..Bounds::default() });
        let subject = Subject::Names([long].into());
        let held = [ANA, BEN].map(|principal| ledger.admit(principal, &subject).unwrap());
        let message = refused(&ledger, "User::\"eve\"", &subject);
        assert!(message.contains(&format!("may hold {}", 2 * one.bytes)), "{message}");
        drop(held);
        assert!(is_empty(&ledger));
        ledger.admit("User::\"eve\"", &subject).unwrap();
    }

    #[test]
    fn the_most_that_one_principal_may_is_far_from_all_that_there_is() {
        let bounds = Bounds::default();
        let names = bounds.names_per_principal as u64 * (NAME_BYTES + 512);
        let most = names + bounds.per_principal as u64 * WATCH_BYTES;
        assert!(most < bounds.bytes / 4, "{most}");
        assert_eq!(Bounds::of_watches(1_024).names_per_principal, 20_480);
        assert_eq!(Bounds::of_watches(usize::MAX).names_per_principal, usize::MAX);
    }

    #[test]
    fn a_ticket_is_given_back_once() {
        let ledger = ledger(Bounds::default());
        let (one, two) = (ledger.admit(ANA, &names(3)).unwrap(), ledger.admit(ANA, &names(3)).unwrap());
        one.give_back();
        one.give_back();
        one.hold([&SecretName::parse("late").unwrap()]).unwrap();
        drop(one);
        assert_eq!(ledger.watches(), 1);
        assert_eq!(ledger.books().all, Held::of_watch(&names(3)));
        drop(two);
        assert!(is_empty(&ledger));
    }
}
