//! What the machine is surrounded by: the record, the store, the target, whoever works, and what is on its way.

use claviger::rotation::machine::{Activation, Effect, Progress};

use super::shelf::{Password, Shelf, User};

/// No fence gets this high before it is counted anew.
const FENCES: usize = 32;

/// One login user at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Account {
    pub password: Password,
    /// The highest fence that it has seen.
    pub fence: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Run {
    None,
    /// Leased, but not claimed.
    Begun,
    Claimed(Progress<u8>),
}

/// What is in the key-value layer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Record {
    pub fence: u8,
    /// Who has the lease, by its fence.
    pub lease: Option<u8>,
    pub run: Run,
    pub abort: bool,
    pub due: bool,
}

/// An activation, and what it waits for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Worker {
    pub fence: u8,
    /// The token that a new run would get.
    pub offered: u8,
    pub activation: Activation<u8>,
    pub effect: Effect<u8>,
}

impl Worker {
    pub fn request(&self) -> Request {
        Request { fence: self.fence, run: self.activation.run().cloned(), effect: self.effect.clone() }
    }
}

/// An effect on its way.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Request {
    pub fence: u8,
    pub run: Option<Progress<u8>>,
    pub effect: Effect<u8>,
}

/// How often something may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Budget {
    /// The rotation becomes due.
    pub dues: u8,
    /// A crash, a failure before or after the effect was done, an answer that is lost.
    pub troubles: u8,
    /// The lease of one who lives ends, and it does not know.
    pub pauses: u8,
    /// Nobody waits for a request any more, and it arrives at any later time.
    pub late: u8,
    /// A request is done, answered, and arrives once more at any later time.
    pub repeats: u8,
    /// A person rolls back, or puts a new value with the target having it too.
    pub moves: u8,
    /// A person changes a password at the target and tells nobody.
    pub resets: u8,
    /// A person asks for the run's end.
    pub aborts: u8,
    /// The target refuses a value. It may change its mind about it.
    pub refusals: u8,
}

/// How AWSCURRENT is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Promotion {
    /// Only while AWSPENDING is on the token too, and AWSPENDING goes with the move, in one transaction.
    TakesClaim,
    /// Only while AWSPENDING is on the token, which stays.
    ComparesClaim,
    /// By AWSCURRENT alone.
    Plain,
}

/// What holds the invariants up. Each can be taken away, to see that it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Guards {
    /// The target compares fences.
    pub fences: bool,
    /// A bar raises the fence.
    pub bars: bool,
    /// The phase is saved before the first change of the target.
    pub saves_before_set: bool,
    /// A value that is stored is the one that is used.
    pub keeps_values: bool,
    /// The lease is looked at before each effect.
    pub checks_lease: bool,
    pub promotion: Promotion,
}

impl Guards {
    pub const ALL: Self = Self {
        fences: true,
        bars: true,
        saves_before_set: true,
        keeps_values: true,
        checks_lease: true,
        promotion: Promotion::TakesClaim,
    };
}

/// What only the properties look at.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Seen {
    pub promotions: u8,
    pub promoted: u32,
    /// What the target has held, by version.
    pub accepted: u32,
    pub claimed: u32,
    /// What was claimed before a person last moved AWSCURRENT.
    pub outdated: u32,
    /// What was AWSCURRENT before the last move.
    pub before: Option<u8>,
    /// A person moved AWSCURRENT to an account that a run was changing, or to a version that the target did not accept.
    pub person_broke_it: bool,
    pub promoted_twice: bool,
    pub promoted_unaccepted: bool,
    pub overwrote_person: bool,
    pub login_failed_untroubled: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    pub workers: Vec<Worker>,
    pub underway: Vec<Request>,
    pub record: Record,
    pub store: Shelf,
    pub target: [Account; 2],
    pub left: Budget,
    pub seen: Seen,
}

pub const fn bit(version: u8) -> u32 {
    1 << version
}

impl World {
    pub fn account(&self, user: User) -> Account {
        self.target[user.index()]
    }

    pub fn account_mut(&mut self, user: User) -> &mut Account {
        &mut self.target[user.index()]
    }

    pub fn authenticates(&self, id: u8) -> bool {
        self.store.version(id).is_some_and(|version| self.account(version.user).password == version.password)
    }

    pub fn wants_work(&self) -> bool {
        self.record.due || self.record.run != Run::None
    }

    /// An id that nothing anywhere speaks of.
    pub fn fresh(&self) -> u8 {
        let written = u8::try_from(self.store.versions.len()).unwrap_or(u8::MAX);
        let claimed = match &self.record.run {
            Run::Claimed(run) => run.token + 1,
            _ => 0,
        };
        let offered = self
            .workers
            .iter()
            .map(|worker| worker.activation.run().map_or(worker.offered, |run| run.token) + 1);
        let underway = self.underway.iter().filter_map(|request| Some(request.run.as_ref()?.token + 1));
        offered.chain(underway).fold(written.max(claimed), u8::max)
    }

    pub fn release(&mut self, fence: u8) {
        self.record.lease = self.record.lease.filter(|holder| *holder != fence);
    }

    fn each_fence(&mut self, mut change: impl FnMut(&mut u8)) {
        change(&mut self.record.fence);
        self.record.lease.iter_mut().for_each(&mut change);
        self.target.iter_mut().for_each(|account| change(&mut account.fence));
        self.workers.iter_mut().for_each(|worker| change(&mut worker.fence));
        self.underway.iter_mut().for_each(|request| change(&mut request.fence));
    }

    /// Counts the fences anew, from zero: they are only ever compared, so that a run that is tried again and again comes
    /// back to a state that was seen, and the search ends.
    pub fn canonical(&mut self) {
        let mut used = [false; FENCES];
        used[0] = true;
        self.each_fence(|fence| used[usize::from(*fence)] = true);
        let mut rank = [0_u8; FENCES];
        let mut next = 0;
        for (rank, used) in rank.iter_mut().zip(used) {
            *rank = next;
            next += u8::from(used);
        }
        self.each_fence(|fence| *fence = rank[usize::from(*fence)]);
        if self.underway.len() > 1 {
            self.underway.sort_by_cached_key(|request| format!("{request:?}"));
        }
    }
}
