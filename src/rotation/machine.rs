//! The rotation as a state machine: a pure function from a state and an event to the next state and one effect.
//!
//! ```text
//!            claim            create           set              test           finish          retire
//!  (idle) ─▶ Look ─▶ Save ─▶ Create ─▶ Read ─▶ Probe current    Test ─▶ Save ─▶ Promote ─▶ ┬─▶ Retire ─▶ Ended
//!              ▲    token    ▲ token    │       ─▶ Save ─▶ Set ─▶▲       Finish             └─▶ Ended(Rotated)
//!              │             │ known:   │          Set    Save   │
//!              │             └ Read ────┘                 Test   │
//!              └── every activation begins here and goes to its phase; a phase that may have touched the target
//!                  already asks the target first (Probe pending) and never assumes
//! ```
//!
//! A *run* is one rotation of one secret, from claim to end, however many crashes lie between. An *activation* is one
//! stretch of work on it by one owner under one fence: it ends with [`Effect::Rest`] (to be taken up again, by whoever
//! is first) or with [`Effect::Ended`].
//!
//! INVARIANTS, which the property tests and the model check hold this file to:
//! - labels are the truth: what was promoted is what carries AWSCURRENT, whatever the record says;
//! - the phase is saved before the effect that it names first touches anything, so that whoever comes after knows what
//!   may have happened;
//! - a value is generated only where the store does not know the token;
//! - an effect whose outcome is not known ends the activation, so that under one fence at most one change of the target
//!   is ever on its way;
//! - a pending value that the target may hold is given up only behind a higher fence, and is kept under a label of its
//!   own; another value is tried in its place only when the target has definitely rejected it and definitely accepts
//!   AWSCURRENT.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How far a run is. Each phase names what may have happened by now, not what has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Claimed. The pending version may be written; the target is untouched.
    Create,
    /// The pending version is durable and was read back. The target may hold it.
    Set,
    /// The target said that it holds it. A fresh login proves it.
    Test,
    /// Proven. AWSCURRENT may have moved.
    Finish,
    /// AWSCURRENT has moved. What was current may have been withdrawn from the target.
    Retire,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 5] = [Self::Create, Self::Set, Self::Test, Self::Finish, Self::Retire];

    /// Its name, as records, messages and figures have it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Set => "set",
            Self::Test => "test",
            Self::Finish => "finish",
            Self::Retire => "retire",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What of a run outlives an activation. `T` names versions: the pending version's id is the run's token.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress<T> {
    /// The client request token of the pending version, and so its id.
    pub token: T,
    /// What was AWSCURRENT when the pending value was made from it.
    pub expected: T,
    /// How far the run is.
    pub phase: Phase,
}

/// What a rotation is like, as far as the machine is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Traits {
    /// Whether something outside of the store has to be told: a database, a provider.
    pub has_target: bool,
    /// Whether to go on where the target rejects AWSCURRENT, which somebody else must have changed.
    pub repairs: bool,
    /// Whether what was current is withdrawn from the target after a while.
    pub retires: bool,
}

/// Where the system's labels stand, and whether the store knows the run's token.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Labels<T> {
    /// AWSCURRENT.
    pub current: T,
    /// AWSPENDING, where it is on a value that is still to come and not on one whose time is over.
    pub pending: Option<T>,
    /// Whether a version of the run's token (or of the token offered to a new run) exists.
    pub token_known: bool,
}

/// Which version is shown to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Which {
    /// The run's pending version.
    Pending,
    /// AWSCURRENT.
    Current,
    /// AWSPREVIOUS.
    Previous,
}

/// What a target said to a login. Only the first two may drive a change of state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Probe {
    /// It checked the password and let us in.
    Accepted,
    /// It checked the password and definitely did not, or there is no such account.
    Rejected,
    /// It would let anyone in, or did not show that it checked: proof of nothing.
    Unverifiable,
    /// There is no telling: unreachable, starting, full, not trusted.
    Unknown,
}

/// What the world is asked to do. The answer to each is one [`Event`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Effect<T> {
    /// Read the labels. Answer: [`Event::Labels`].
    Look,
    /// Save the run under this owner's fence, where it is still the owner's. Answer: [`Event::Saved`] or
    /// [`Event::Lost`].
    Save(Progress<T>),
    /// Generate a value from AWSCURRENT and write it under the token with AWSPENDING, if `expected` is current. Answer:
    /// [`Event::Created`], or [`Event::Conflict`] where AWSCURRENT moved or AWSPENDING is another's.
    Create(Progress<T>),
    /// Read the pending value back by its id and see that it fits AWSCURRENT. Answer: [`Event::Read`].
    Read(T),
    /// Show a version to the target. Answer: [`Event::Probed`].
    Probe(Which),
    /// Make the target take the pending value, if it has seen no higher fence. Answer: [`Event::Set`], or
    /// [`Event::Refused`] where the target definitely does not want this value.
    Set,
    /// Log in anew with the pending value at every endpoint and compare what the login may do. Answer:
    /// [`Event::Tested`], or [`Event::Rejected`] where a target definitely rejects what it took before.
    Test,
    /// Move AWSCURRENT by compare-and-swap, and spend AWSPENDING in the same step. Answer: [`Event::Promoted`] or
    /// [`Event::Conflict`], where either label is elsewhere.
    Promote(Progress<T>),
    /// Make the target refuse whatever carries a lower fence, without any other change. Answer: [`Event::Barred`].
    Bar,
    /// Take AWSPENDING off the token, which is current. Answer: [`Event::Withdrawn`].
    Withdraw(T),
    /// Take AWSPENDING off the token, whose value is given up, and keep the version under a label of its own: a late
    /// change, or another's, may yet put it into the target. Answer: [`Event::Withdrawn`].
    Keep(T),
    /// Withdraw from the target what was current before, if AWSCURRENT is still the token. Answer: [`Event::Retired`].
    Retire(Progress<T>),
    /// Give the target back what may have been withdrawn: someone made it AWSCURRENT again. Answer: [`Event::Retired`].
    Unretire(Progress<T>),
    /// The activation is over, the run is not.
    Rest(Rest),
    /// The run is over.
    Ended(Ending),
}

/// Why an activation is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rest {
    /// The last effect failed or its outcome is not known; try again after a backoff.
    Failed,
    /// Someone else owns the run now.
    Lost,
    /// AWSCURRENT moved; what was current is withdrawn later.
    UntilRetirement,
    /// A person has to look at this; the word says at what.
    Blocked(Block),
}

/// What a person has to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Block {
    /// The target rejects AWSCURRENT but accepts AWSPREVIOUS: somebody changed the password or the label.
    CurrentRejected,
    /// The target rejects every value that the store knows.
    LockedOut,
    /// The target lets in without checking the password.
    Unverifiable,
    /// The target refuses the value itself.
    ValueRefused,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// The token is AWSCURRENT.
    Rotated,
    /// Someone else moved AWSCURRENT meanwhile; theirs stays.
    Superseded,
    /// A person said so, and nothing that the target might hold was lost.
    Aborted,
    /// The target definitely refused the value; another one may do.
    Discarded,
}

/// What the world answered.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event<T> {
    /// The labels.
    Labels(Labels<T>),
    /// The run is saved. `abort`: a person asked for its end.
    Saved {
        /// Whether a person asked for the run's end.
        abort: bool,
    },
    /// Another owner has the run.
    Lost,
    /// The pending version is written, or was before.
    Created,
    /// The pending value is in the store, in memory, and fits.
    Read,
    /// What the target said.
    Probed(Probe),
    /// The target holds the pending value.
    Set,
    /// The target definitely refused the value, not the change.
    Refused,
    /// Every endpoint accepts the pending value, and it may do what AWSCURRENT may.
    Tested,
    /// An endpoint definitely rejects the pending value.
    Rejected,
    /// AWSCURRENT is on the token.
    Promoted,
    /// A label is not where it was expected.
    Conflict,
    /// Lower fences are refused from now on.
    Barred,
    /// AWSPENDING is off the token.
    Withdrawn,
    /// What was current before is withdrawn.
    Retired,
    /// There is no such secret any more, nor anything of it that could be kept.
    Gone,
    /// The effect failed, or there is no telling whether it was done.
    Failed,
}

/// What an activation waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Awaits {
    Labels,
    Claim,
    Creation,
    Value,
    Preflight,
    Previous,
    SetSaved,
    Recheck,
    Set,
    /// The bars and probes of a value that the target refused.
    RefusalBar,
    RefusedPending,
    RefusedCurrent,
    RefusedWithdrawal,
    TestSaved,
    Test,
    BackSaved,
    FinishSaved,
    Promotion,
    Settlement,
    /// Giving the run up, for the reason that it then ends with.
    GivingUpBar(Ending),
    GivingUp(Ending),
    /// AWSPENDING's going, once AWSCURRENT is there.
    Cleared,
    RetireSaved,
    Retirement,
    /// Nothing: the activation is over.
    Nothing,
}

/// One activation of a run.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Activation<T> {
    traits: Traits,
    run: Option<Progress<T>>,
    /// The token that a new run would get.
    offered: T,
    abort: bool,
    awaits: Awaits,
}

impl<T: Clone + Eq> Activation<T> {
    /// The beginning of an activation: of `run`, or where there is none of a new one under the token `offered`.
    /// `abort`: a person asked for the run's end.
    #[must_use]
    pub const fn begin(
        traits: Traits,
        run: Option<Progress<T>>,
        offered: T,
        abort: bool,
    ) -> (Self, Effect<T>) {
        (Self { traits, run, offered, abort, awaits: Awaits::Labels }, Effect::Look)
    }

    /// The run, once it is claimed.
    #[must_use]
    pub const fn run(&self) -> Option<&Progress<T>> {
        self.run.as_ref()
    }

    /// The next state and effect. An event that nobody waits for counts as a failure: what became of the effect is not
    /// known.
    #[must_use]
    pub fn next(mut self, event: Event<T>) -> (Self, Effect<T>) {
        if let Event::Saved { abort } = event {
            self.abort |= abort;
        }
        let effect = match event {
            Event::Lost => self.over(Effect::Rest(Rest::Lost)),
            Event::Failed => self.rest(Rest::Failed),
            event => self.advance(event),
        };
        (self, effect)
    }

    fn advance(&mut self, event: Event<T>) -> Effect<T> {
        match (self.awaits, event) {
            (Awaits::Labels, Event::Labels(labels)) => self.looked(labels),
            (Awaits::Settlement, Event::Labels(labels)) => self.settled(&labels),
            (Awaits::Labels | Awaits::Settlement, Event::Gone) if self.run.is_some() => {
                self.over(Effect::Ended(Ending::Superseded))
            }
            (Awaits::Value, Event::Read) => self.has_value(),
            (Awaits::Creation, Event::Created) => self.with_run(Awaits::Value, |run| Effect::Read(run.token)),
            // Nothing was written, and the target is untouched.
            (Awaits::Creation, Event::Conflict) => self.over(Effect::Ended(Ending::Superseded)),
            (awaits, Event::Saved { .. }) => self.saved(awaits),
            (awaits, Event::Probed(probe)) => self.probed(awaits, probe),
            (Awaits::Set, Event::Set) => self.save(Phase::Test, Awaits::TestSaved),
            (Awaits::Set, Event::Refused) => self.ask(Awaits::RefusalBar, Effect::Bar),
            (Awaits::RefusalBar, Event::Barred) => {
                self.ask(Awaits::RefusedPending, Effect::Probe(Which::Pending))
            }
            (Awaits::RefusedWithdrawal, Event::Withdrawn) => self.over(Effect::Ended(Ending::Discarded)),
            (Awaits::Test, Event::Tested) => match self.phase() {
                Some(Phase::Finish) => self.with_run(Awaits::Promotion, Effect::Promote),
                _ => self.save(Phase::Finish, Awaits::FinishSaved),
            },
            (Awaits::Test, Event::Rejected) => self.save(Phase::Set, Awaits::BackSaved),
            (Awaits::Promotion, Event::Promoted) => self.promoted(),
            (Awaits::Cleared, Event::Withdrawn) => self.cleared(),
            (Awaits::Promotion, Event::Conflict) => self.ask(Awaits::Settlement, Effect::Look),
            (Awaits::GivingUpBar(ending), Event::Barred) => {
                self.with_run(Awaits::GivingUp(ending), |run| Effect::Keep(run.token))
            }
            (Awaits::GivingUp(ending), Event::Withdrawn) => self.over(Effect::Ended(ending)),
            (Awaits::Retirement, Event::Retired) => self.over(Effect::Ended(Ending::Rotated)),
            _ => self.rest(Rest::Failed),
        }
    }

    /// Where an activation begins: the labels say what is true, the run says what may have happened.
    fn looked(&mut self, labels: Labels<T>) -> Effect<T> {
        let Some(run) = self.run.clone() else { return self.claim(labels) };
        if labels.current == run.token {
            return match run.phase {
                Phase::Retire => self.with_run(Awaits::Retirement, Effect::Retire),
                Phase::Finish => self.promoted(),
                _ if !self.traits.has_target => self.promoted(),
                // A person moved the label before the target was told: it is told now.
                Phase::Create => self.save(Phase::Set, Awaits::Claim),
                _ => self.with_run(Awaits::Value, |run| Effect::Read(run.token)),
            };
        }
        match run.phase {
            // Someone rolled back to what may be withdrawn already.
            Phase::Retire if labels.current == run.expected => {
                self.with_run(Awaits::Retirement, Effect::Unretire)
            }
            // Promoted and then moved on by someone else: nothing is ours to retire.
            Phase::Retire => self.over(Effect::Ended(Ending::Rotated)),
            _ if self.abort => self.give_up(Ending::Aborted, labels.token_known),
            _ if labels.current != run.expected => self.give_up(Ending::Superseded, labels.token_known),
            Phase::Create if !labels.token_known => self.with_run(Awaits::Creation, Effect::Create),
            // The claim is spent: the run was promoted and someone moved AWSCURRENT back, or took AWSPENDING away.
            _ if !labels.token_known || labels.pending.as_ref() != Some(&run.token) => {
                self.give_up(Ending::Superseded, labels.token_known)
            }
            _ => self.with_run(Awaits::Value, |run| Effect::Read(run.token)),
        }
    }

    /// A new run; or, where AWSPENDING is on a version that no record speaks of, the run of that version, which the
    /// target may hold for all that is known.
    fn claim(&mut self, labels: Labels<T>) -> Effect<T> {
        let found = labels.pending.filter(|pending| *pending != labels.current);
        let phase = if found.is_some() { Phase::Set } else { Phase::Create };
        let token = found.unwrap_or_else(|| self.offered.clone());
        self.run = Some(Progress { token, expected: labels.current, phase });
        self.with_run(Awaits::Claim, Effect::Save)
    }

    fn saved(&mut self, awaits: Awaits) -> Effect<T> {
        match awaits {
            Awaits::RetireSaved => self.over(Effect::Rest(Rest::UntilRetirement)),
            Awaits::BackSaved => self.rest(Rest::Failed),
            Awaits::Claim | Awaits::SetSaved | Awaits::TestSaved | Awaits::FinishSaved if self.abort => {
                let written = awaits != Awaits::Claim || self.phase() != Some(Phase::Create);
                self.give_up(Ending::Aborted, written)
            }
            Awaits::Claim if self.phase() == Some(Phase::Create) => {
                self.with_run(Awaits::Creation, Effect::Create)
            }
            Awaits::Claim => self.with_run(Awaits::Value, |run| Effect::Read(run.token)),
            Awaits::SetSaved => self.ask(Awaits::Set, Effect::Set),
            Awaits::TestSaved => self.ask(Awaits::Test, Effect::Test),
            Awaits::FinishSaved => self.with_run(Awaits::Promotion, Effect::Promote),
            _ => self.rest(Rest::Failed),
        }
    }

    fn has_value(&mut self) -> Effect<T> {
        match self.phase() {
            Some(Phase::Create | Phase::Set) if !self.traits.has_target => {
                self.save(Phase::Finish, Awaits::FinishSaved)
            }
            Some(Phase::Create) => self.ask(Awaits::Preflight, Effect::Probe(Which::Current)),
            Some(Phase::Set) => self.ask(Awaits::Recheck, Effect::Probe(Which::Pending)),
            _ if !self.traits.has_target => self.with_run(Awaits::Promotion, Effect::Promote),
            // Whatever the record says, time has passed: the login is proven anew before the label moves.
            _ => self.ask(Awaits::Test, Effect::Test),
        }
    }

    fn probed(&mut self, awaits: Awaits, probe: Probe) -> Effect<T> {
        match (awaits, probe) {
            (Awaits::RefusedPending, Probe::Rejected) => {
                self.ask(Awaits::RefusedCurrent, Effect::Probe(Which::Current))
            }
            (Awaits::RefusedCurrent, Probe::Accepted) => {
                self.with_run(Awaits::RefusedWithdrawal, |run| Effect::Keep(run.token))
            }
            (_, Probe::Unverifiable) => self.rest(Rest::Blocked(Block::Unverifiable)),
            (_, Probe::Unknown) => self.rest(Rest::Failed),
            (Awaits::RefusedPending | Awaits::RefusedCurrent, _) => {
                self.rest(Rest::Blocked(Block::ValueRefused))
            }
            (Awaits::Preflight, Probe::Accepted) => self.save(Phase::Set, Awaits::SetSaved),
            (Awaits::Preflight, Probe::Rejected) if self.traits.repairs => {
                self.save(Phase::Set, Awaits::SetSaved)
            }
            (Awaits::Preflight, Probe::Rejected) => {
                self.ask(Awaits::Previous, Effect::Probe(Which::Previous))
            }
            (Awaits::Previous, Probe::Accepted) => self.rest(Rest::Blocked(Block::CurrentRejected)),
            (Awaits::Previous, Probe::Rejected) => self.rest(Rest::Blocked(Block::LockedOut)),
            (Awaits::Recheck, Probe::Accepted) => self.save(Phase::Test, Awaits::TestSaved),
            (Awaits::Recheck, Probe::Rejected) => self.ask(Awaits::Set, Effect::Set),
            _ => self.rest(Rest::Failed),
        }
    }

    fn settled(&mut self, labels: &Labels<T>) -> Effect<T> {
        match &self.run {
            Some(run) if labels.current == run.token => self.promoted(),
            // The swap failed for another reason than the label that it compared; it may not fail again.
            Some(run) if labels.current == run.expected && labels.pending.as_ref() == Some(&run.token) => {
                self.rest(Rest::Failed)
            }
            _ => self.give_up(Ending::Superseded, labels.token_known),
        }
    }

    /// Where a store could not spend AWSPENDING in the same step, it must not stay behind: once AWSCURRENT moves on, it
    /// would pass for a value that is still to come.
    fn promoted(&mut self) -> Effect<T> {
        self.with_run(Awaits::Cleared, |run| Effect::Withdraw(run.token))
    }

    fn cleared(&mut self) -> Effect<T> {
        if self.traits.retires {
            self.save(Phase::Retire, Awaits::RetireSaved)
        } else {
            self.over(Effect::Ended(Ending::Rotated))
        }
    }

    /// Ends the run without it having become current. What the target may hold is kept, behind a bar.
    fn give_up(&mut self, ending: Ending, written: bool) -> Effect<T> {
        let may_hold = self.traits.has_target && self.phase().is_some_and(|phase| phase >= Phase::Set);
        match (may_hold, written) {
            (true, _) => self.ask(Awaits::GivingUpBar(ending), Effect::Bar),
            (false, true) => self.with_run(Awaits::GivingUp(ending), |run| Effect::Keep(run.token)),
            (false, false) => self.over(Effect::Ended(ending)),
        }
    }

    fn save(&mut self, phase: Phase, awaits: Awaits) -> Effect<T> {
        if let Some(run) = &mut self.run {
            run.phase = phase;
        }
        self.with_run(awaits, Effect::Save)
    }

    fn with_run(&mut self, awaits: Awaits, effect: impl FnOnce(Progress<T>) -> Effect<T>) -> Effect<T> {
        match self.run.clone() {
            Some(run) => self.ask(awaits, effect(run)),
            None => self.rest(Rest::Failed),
        }
    }

    fn ask(&mut self, awaits: Awaits, effect: Effect<T>) -> Effect<T> {
        self.awaits = awaits;
        effect
    }

    fn rest(&mut self, rest: Rest) -> Effect<T> {
        self.over(Effect::Rest(rest))
    }

    fn over(&mut self, effect: Effect<T>) -> Effect<T> {
        self.ask(Awaits::Nothing, effect)
    }

    fn phase(&self) -> Option<Phase> {
        self.run.as_ref().map(|run| run.phase)
    }
}
