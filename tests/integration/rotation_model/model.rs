//! What can happen, and what the world makes of an effect.
//!
//! Which replica works makes no difference, so that workers have no names; they stand in the order of their fences.

use claviger::rotation::machine::{Activation, Effect, Ending, Event, Phase, Probe, Progress, Traits, Which};
use stateright::{Model, Property};

use super::properties;
use super::shelf::{Password, Shelf, User};
use super::world::{Account, Budget, Guards, Promotion, Record, Request, Run, Seen, Worker, World, bit};

/// How many replicas there are.
const REPLICAS: usize = 3;
/// How many requests may be on their way that nobody waits for any more.
const MOST_UNDERWAY: usize = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Due,
    TakeUp,
    /// The worker's effect is done, and answered.
    Do(usize),
    Refuse(usize),
    FailUndone(usize),
    LoseAnswer(usize),
    Crash(usize),
    Delay(usize),
    Repeat(usize),
    Pause(usize),
    /// A request arrives that nobody waits for.
    Arrive(usize),
    Abort,
    RollBack,
    Put(User),
    Reset(User),
}

impl Action {
    pub const fn is_progress(self) -> bool {
        matches!(self, Self::Due | Self::TakeUp | Self::Do(_))
    }
}

/// One secret that is rotated.
#[derive(Debug, Clone, Copy)]
pub struct Rotations {
    pub traits: Traits,
    pub budget: Budget,
    pub guards: Guards,
}

impl Rotations {
    pub fn start(&self) -> World {
        let mut store = Shelf { current: 1, pending: None, previous: Some(0), versions: Vec::new() };
        store.write(0, User::B, false);
        store.write(1, User::A, false);
        let holds = |version| Account { password: Password::Of(version), fence: 0 };
        World {
            workers: Vec::new(),
            underway: Vec::new(),
            record: Record { fence: 0, lease: None, run: Run::None, abort: false, due: false },
            store,
            target: [holds(1), holds(0)],
            left: self.budget,
            seen: Seen { accepted: bit(0) | bit(1), before: Some(0), ..Seen::default() },
        }
    }

    fn is_untroubled(&self, world: &World) -> bool {
        world.left == Budget { dues: world.left.dues, ..self.budget }
    }

    fn take_up(&self, world: &mut World) {
        world.record.fence += 1;
        let fence = world.record.fence;
        world.record.lease = Some(fence);
        let run = match &world.record.run {
            Run::Claimed(run) => Some(run.clone()),
            _ => None,
        };
        if run.is_none() {
            world.record.run = Run::Begun;
        }
        let worker = self.activation(world, fence, run);
        world.workers.push(worker);
    }

    fn activation(&self, world: &World, fence: u8, run: Option<Progress<u8>>) -> Worker {
        let offered = run.as_ref().map_or_else(|| world.fresh(), |run| run.token);
        let (activation, effect) = Activation::begin(self.traits, run, offered, world.record.abort);
        Worker { fence, offered, activation, effect }
    }

    /// The worker's effect is done in time, and it hears of it.
    fn carry_out(&self, world: &mut World, index: usize) {
        let request = world.workers[index].request();
        let event = self.perform(world, &request);
        if let Effect::Retire(run) = &request.effect
            && event == Event::Retired
        {
            self.undo_retirement(world, run, request.fence);
        }
        self.answer(world, index, event);
    }

    fn answer(&self, world: &mut World, index: usize, event: Event<u8>) {
        let Worker { fence, offered, activation, effect } = world.workers.remove(index);
        let is_checked = !self.guards.checks_lease || world.record.lease == Some(fence);
        let next = match (effect, event) {
            // Another value is tried at once, under the same lease.
            (Effect::Ended(Ending::Discarded), Event::Saved { .. }) if is_checked => {
                Some(self.activation(world, fence, None))
            }
            (Effect::Ended(_), _) => None,
            (_, event) => {
                let (activation, effect) = activation.next(event);
                let goes_on = is_checked && !matches!(effect, Effect::Rest(_));
                goes_on.then_some(Worker { fence, offered, activation, effect })
            }
        };
        match next {
            Some(worker) => world.workers.insert(index, worker),
            None => world.release(fence),
        }
    }

    fn perform(&self, world: &mut World, request: &Request) -> Event<u8> {
        let Request { fence, run, effect } = request;
        match effect {
            Effect::Look => Event::Labels(world.store.look(run.as_ref().map(|run| run.token))),
            Effect::Save(run) => self.save(world, *fence, run),
            Effect::Ended(ending) => Self::end(world, *fence, *ending),
            Effect::Create(run) => world.store.create(run),
            Effect::Promote(run) => self.promote(world, run),
            Effect::Withdraw(token) => world.store.take_claim_off(*token, false),
            Effect::Keep(token) => world.store.take_claim_off(*token, true),
            Effect::Rest(_) => Event::Failed,
            at_target => match run {
                Some(run) => self.reach(world, *fence, run, at_target),
                None => Event::Failed,
            },
        }
    }

    fn save(&self, world: &mut World, fence: u8, run: &Progress<u8>) -> Event<u8> {
        if world.record.fence != fence || world.record.run == Run::None {
            return Event::Lost;
        }
        if world.record.run == Run::Begun {
            world.seen.claimed |= bit(run.token);
            world.seen.outdated &= !bit(run.token);
        }
        if self.guards.saves_before_set || run.phase != Phase::Set {
            world.record.run = Run::Claimed(run.clone());
        }
        Event::Saved { abort: world.record.abort }
    }

    fn end(world: &mut World, fence: u8, ending: Ending) -> Event<u8> {
        if world.record.fence != fence || world.record.run == Run::None {
            return Event::Lost;
        }
        let abort = world.record.abort;
        if ending == Ending::Discarded {
            world.record.run = Run::Begun;
        } else {
            world.record.run = Run::None;
            world.record.abort = false;
            world.record.due = false;
        }
        Event::Saved { abort }
    }

    fn promote(&self, world: &mut World, run: &Progress<u8>) -> Event<u8> {
        let promotion = self.guards.promotion;
        let (store, seen) = (&mut world.store, &mut world.seen);
        if store.current == run.token {
            return Event::Promoted;
        }
        let is_claimed = promotion == Promotion::Plain || store.pending == Some(run.token);
        if store.current != run.expected || !is_claimed {
            return Event::Conflict;
        }
        seen.promoted_twice |= seen.promoted & bit(run.token) != 0;
        seen.promoted_unaccepted |= self.traits.has_target && seen.accepted & bit(run.token) == 0;
        seen.overwrote_person |= seen.outdated & bit(run.token) != 0;
        seen.promoted |= bit(run.token);
        seen.promotions += 1;
        seen.before = Some(store.current);
        seen.person_broke_it = false;
        store.move_current(run.token);
        if promotion == Promotion::TakesClaim {
            store.pending = None;
        }
        Event::Promoted
    }

    /// What needs the run's values, most of it at the target.
    fn reach(&self, world: &mut World, fence: u8, run: &Progress<u8>, effect: &Effect<u8>) -> Event<u8> {
        match effect {
            Effect::Read(token) => self.read(world, run, *token),
            Effect::Probe(Which::Pending) => Event::Probed(self.log_in(world, Some(run.token))),
            Effect::Probe(Which::Current) => Event::Probed(self.log_in(world, Some(run.expected))),
            Effect::Probe(Which::Previous) => {
                let previous = world.store.previous;
                Event::Probed(self.log_in(world, previous))
            }
            Effect::Test => match self.log_in(world, Some(run.token)) {
                Probe::Accepted => Event::Tested,
                _ => Event::Rejected,
            },
            Effect::Set => match world.store.version(run.token) {
                Some(version) if self.admits(world, version.user, fence) => {
                    world.account_mut(version.user).password = version.password;
                    world.seen.accepted |= bit(run.token);
                    Event::Set
                }
                _ => Event::Failed,
            },
            Effect::Bar => match world.store.version(run.token).or_else(|| world.store.version(run.expected))
            {
                Some(version) if !self.guards.bars || self.admits(world, version.user, fence) => {
                    Event::Barred
                }
                _ => Event::Failed,
            },
            Effect::Retire(run) => match world.store.version(run.expected) {
                Some(version) if self.admits(world, version.user, fence) => {
                    world.account_mut(version.user).password = Password::Nobody;
                    Event::Retired
                }
                _ => Event::Failed,
            },
            Effect::Unretire(run) => match world.store.version(run.expected) {
                Some(version) if self.admits(world, version.user, fence) => {
                    world.account_mut(version.user).password = version.password;
                    Event::Retired
                }
                _ => Event::Failed,
            },
            _ => Event::Failed,
        }
    }

    fn read(&self, world: &mut World, run: &Progress<u8>, token: u8) -> Event<u8> {
        let (Some(pending), Some(base)) = (world.store.version(token), world.store.version(run.expected))
        else {
            return Event::Failed;
        };
        if self.traits.has_target && pending.user == base.user {
            return Event::Failed;
        }
        if !self.guards.keeps_values && run.phase >= Phase::Set {
            world.store.change(token, |version| version.password = Password::Anew(token));
        }
        Event::Read
    }

    fn log_in(&self, world: &mut World, id: Option<u8>) -> Probe {
        if id.is_some_and(|id| world.authenticates(id)) {
            return Probe::Accepted;
        }
        world.seen.login_failed_untroubled |= self.is_untroubled(world);
        Probe::Rejected
    }

    /// Compares the fence, and raises what the account has seen to it.
    fn admits(&self, world: &mut World, user: User, fence: u8) -> bool {
        let account = world.account_mut(user);
        if !self.guards.fences {
            return true;
        }
        let admitted = fence >= account.fence;
        account.fence = account.fence.max(fence);
        admitted
    }

    /// Whoever withdrew looks once more, and gives back what someone has rolled back to meanwhile.
    fn undo_retirement(&self, world: &mut World, run: &Progress<u8>, fence: u8) {
        if world.store.current == run.expected
            && let Some(version) = world.store.version(run.expected)
            && self.admits(world, version.user, fence)
        {
            world.account_mut(version.user).password = version.password;
        }
    }

    /// Whether a run in progress may change this account, whatever a person does there.
    fn is_being_changed(&self, world: &World, user: User) -> bool {
        match &world.record.run {
            Run::None => false,
            Run::Begun => true,
            Run::Claimed(run) => {
                let of = |id| world.store.version(id).map(|version| version.user);
                let pending = of(run.token).or_else(|| of(run.expected).map(User::other));
                let retired = of(run.expected).filter(|_| self.traits.retires && run.phase >= Phase::Finish);
                pending == Some(user) || retired == Some(user)
            }
        }
    }

    fn move_by_person(&self, world: &mut World, to: u8) {
        world.seen.outdated |= world.seen.claimed;
        world.seen.before = Some(world.store.current);
        world.store.move_current(to);
    }

    fn roll_back(&self, world: &mut World) {
        let Some(to) = world.store.previous else { return };
        let Some(version) = world.store.version(to) else { return };
        let is_dead = self.traits.has_target && !world.authenticates(to);
        world.seen.person_broke_it = is_dead || self.is_being_changed(world, version.user);
        self.move_by_person(world, to);
    }

    fn put(&self, world: &mut World, user: User) {
        let id = world.fresh();
        world.seen.person_broke_it = self.is_being_changed(world, user);
        world.store.write(id, user, true);
        world.account_mut(user).password = Password::Of(id);
        world.seen.accepted |= bit(id);
        self.move_by_person(world, id);
    }

    fn step(&self, world: &mut World, action: Action) {
        let left = &mut world.left;
        match action {
            Action::Due => {
                left.dues -= 1;
                world.record.due = true;
            }
            Action::TakeUp => self.take_up(world),
            Action::Do(index) => self.carry_out(world, index),
            Action::Refuse(index) => {
                left.refusals -= 1;
                self.answer(world, index, Event::Refused);
            }
            Action::FailUndone(index) => {
                left.troubles -= 1;
                self.answer(world, index, Event::Failed);
            }
            Action::LoseAnswer(index) => {
                left.troubles -= 1;
                let request = world.workers[index].request();
                self.perform(world, &request);
                self.answer(world, index, Event::Failed);
            }
            Action::Crash(index) => {
                left.troubles -= 1;
                let fence = world.workers.remove(index).fence;
                world.release(fence);
            }
            Action::Delay(index) => {
                left.late -= 1;
                let request = world.workers[index].request();
                world.underway.push(request);
                self.answer(world, index, Event::Failed);
            }
            Action::Repeat(index) => {
                left.repeats -= 1;
                let request = world.workers[index].request();
                world.underway.push(request);
                self.carry_out(world, index);
            }
            Action::Pause(index) => {
                left.pauses -= 1;
                let fence = world.workers[index].fence;
                world.release(fence);
            }
            Action::Arrive(index) => {
                let request = world.underway.remove(index);
                self.perform(world, &request);
            }
            Action::Abort => {
                left.aborts -= 1;
                world.record.abort = true;
            }
            Action::RollBack => {
                left.moves -= 1;
                self.roll_back(world);
            }
            Action::Put(user) => {
                left.moves -= 1;
                self.put(world, user);
            }
            Action::Reset(user) => {
                left.resets -= 1;
                world.account_mut(user).password = Password::Foreign;
            }
        }
    }

    fn actions_of(world: &World, index: usize, actions: &mut Vec<Action>) {
        let left = world.left;
        let worker = &world.workers[index];
        let changes =
            !matches!(worker.effect, Effect::Look | Effect::Read(_) | Effect::Probe(_) | Effect::Test);
        // A transaction that compares what it read can't be done twice.
        let repeats = changes && !matches!(worker.effect, Effect::Save(_) | Effect::Ended(_));
        let has_room = world.underway.len() < MOST_UNDERWAY;
        let permitted = [
            (true, Action::Do(index)),
            (left.refusals > 0 && worker.effect == Effect::Set, Action::Refuse(index)),
            (left.troubles > 0, Action::FailUndone(index)),
            (left.troubles > 0 && changes, Action::LoseAnswer(index)),
            (left.troubles > 0, Action::Crash(index)),
            (left.late > 0 && changes && has_room, Action::Delay(index)),
            (left.repeats > 0 && repeats && has_room, Action::Repeat(index)),
            (left.pauses > 0 && world.record.lease == Some(worker.fence), Action::Pause(index)),
        ];
        actions.extend(
            permitted.into_iter().filter(|(is_permitted, _)| *is_permitted).map(|(_, action)| action),
        );
    }

    /// Whether, once faults stop, the run comes to its end, the next one too, and AWSCURRENT authenticates after them.
    /// Asked only where nobody works, which every activation comes to, and of what is on its way only that it may be
    /// lost: what arrives instead leads to a state that is asked the same.
    pub fn settles(&self, world: &World) -> bool {
        let mut calm = world.clone();
        calm.workers.clear();
        calm.underway.clear();
        for again in [false, true] {
            calm.record.due |= again;
            if !self.finishes(&mut calm) {
                return self.needs_a_person(&calm);
            }
        }
        let authenticates = !self.traits.has_target || calm.authenticates(calm.store.current);
        calm.seen.promotions > world.seen.promotions && authenticates
    }

    fn finishes(&self, calm: &mut World) -> bool {
        for _ in 0..8 {
            if !calm.wants_work() {
                return true;
            }
            calm.record.lease = None;
            self.take_up(calm);
            let mut steps = 0;
            while !calm.workers.is_empty() {
                assert!(steps < 100, "an activation does not end: {calm:?}");
                steps += 1;
                self.carry_out(calm, 0);
            }
            calm.canonical();
        }
        !calm.wants_work()
    }

    /// Why a run may rest for good: a person broke AWSCURRENT and it may not be repaired, or a person moved AWSCURRENT to
    /// the account that a value without a run was made for.
    fn needs_a_person(&self, calm: &World) -> bool {
        if let Run::Claimed(run) = &calm.record.run
            && let (Some(pending), Some(base)) =
                (calm.store.version(run.token), calm.store.version(run.expected))
            && pending.user == base.user
        {
            return self.budget.moves > 0;
        }
        self.traits.has_target
            && !self.traits.repairs
            && !calm.authenticates(calm.store.current)
            && properties::a_person_broke_it(calm)
    }
}

impl Model for Rotations {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![self.start()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        let (left, record) = (world.left, &world.record);
        let is_idle = record.run == Run::None;
        if is_idle && !record.due && left.dues > 0 {
            actions.push(Action::Due);
        }
        if world.wants_work() && record.lease.is_none() && world.workers.len() < REPLICAS {
            actions.push(Action::TakeUp);
        }
        for index in 0..world.workers.len() {
            Self::actions_of(world, index, actions);
        }
        actions.extend((0..world.underway.len()).map(Action::Arrive));
        if left.aborts > 0 && !is_idle && !record.abort {
            actions.push(Action::Abort);
        }
        if left.moves > 0 {
            actions.push(Action::RollBack);
            actions.extend(User::BOTH.map(Action::Put));
        }
        if left.resets > 0 {
            actions.extend(User::BOTH.map(Action::Reset));
        }
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        self.step(&mut world, action);
        world.canonical();
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}
