//! The store: versions and labels.

use claviger::rotation::machine::{Event, Labels, Progress};

/// The two accounts that take turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum User {
    A,
    B,
}

impl User {
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    pub const fn index(self) -> usize {
        match self {
            Self::A => 0,
            Self::B => 1,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Password {
    /// The one that was written with this version.
    Of(u8),
    /// Another one, generated for the same version later: only where values are not kept.
    Anew(u8),
    /// A person's, which the store does not know.
    Foreign,
    /// None: withdrawn.
    Nobody,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Version {
    pub user: User,
    pub password: Password,
    pub by_person: bool,
    /// AWSPENDING was taken off it for good.
    pub given_up: bool,
    /// It carries a label of its own.
    pub kept: bool,
}

/// The versions and the system's labels, by the rules of `secret::Labels`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Shelf {
    pub current: u8,
    pub pending: Option<u8>,
    pub previous: Option<u8>,
    pub versions: Vec<Option<Version>>,
}

impl Shelf {
    pub fn version(&self, id: u8) -> Option<Version> {
        self.versions.get(usize::from(id)).copied().flatten()
    }

    pub fn change(&mut self, id: u8, change: impl FnOnce(&mut Version)) {
        if let Some(Some(version)) = self.versions.get_mut(usize::from(id)) {
            change(version);
        }
    }

    pub fn write(&mut self, id: u8, user: User, by_person: bool) {
        let place = usize::from(id);
        if self.versions.len() <= place {
            self.versions.resize(place + 1, None);
        }
        let password = Password::Of(id);
        self.versions[place] = Some(Version { user, password, by_person, given_up: false, kept: false });
    }

    pub fn move_current(&mut self, to: u8) {
        if self.current != to {
            self.previous = Some(self.current);
            self.current = to;
        }
    }

    /// Whether nothing but an old backup could give the value back.
    pub fn is_lost(&self, id: u8) -> bool {
        let labelled = self.current == id || self.pending == Some(id) || self.previous == Some(id);
        self.version(id).is_none_or(|version| version.given_up && !version.kept && !labelled)
    }

    /// The labels. An AWSPENDING that was left behind by an earlier rotation is put out of the way first; one that is on
    /// AWSPREVIOUS has been current already, and is nobody's claim.
    pub fn look(&mut self, token: Option<u8>) -> Labels<u8> {
        let mut pending = self.pending;
        if let Some(holder) = pending.filter(|holder| *holder != self.current) {
            let was_current = self.previous == Some(holder);
            if token == Some(holder) {
                pending = pending.filter(|_| !was_current);
            } else if was_current || holder < self.current {
                self.take_claim_off(holder, true);
                pending = None;
            }
        }
        let token_known = token.is_some_and(|token| self.version(token).is_some());
        Labels { current: self.current, pending, token_known }
    }

    pub fn create(&mut self, run: &Progress<u8>) -> Event<u8> {
        if self.version(run.token).is_some() {
            return Event::Created;
        }
        let is_held = self.pending.is_some_and(|holder| holder != self.current && holder != run.token);
        let Some(base) = self.version(self.current).filter(|_| self.current == run.expected && !is_held)
        else {
            return Event::Conflict;
        };
        self.write(run.token, base.user.other(), false);
        self.pending = Some(run.token);
        Event::Created
    }

    pub fn take_claim_off(&mut self, token: u8, keep: bool) -> Event<u8> {
        let (is_held, is_current) = (self.pending == Some(token), self.current == token);
        self.change(token, |version| {
            version.kept |= keep;
            // Off what is current, the claim is spent, and nothing is given up.
            version.given_up |= is_held && !keep && !is_current;
        });
        self.pending = self.pending.filter(|holder| *holder != token);
        Event::Withdrawn
    }
}
