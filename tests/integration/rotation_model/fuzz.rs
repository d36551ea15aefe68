//! The machine alone, against answers that fit and answers that don't; long random walks through the model; and the
//! model's labels against the product's.

use claviger::rotation::machine::{Activation, Effect, Event, Labels, Phase, Probe, Progress, Rest, Traits};
use claviger::secret::{self, Label, LabelMove, VersionId};
use proptest::prelude::*;
use stateright::{Expectation, Model as _};

use super::model::{Action, Rotations};
use super::properties;
use super::shelf::{Shelf, User};
use super::world::{Budget, Guards, World};
use super::{ALTERNATING, REPAIRING, RETIRING, STORE_ONLY};

/// What was AWSCURRENT when the run was claimed, its token, a stranger's version, and what a new run is offered.
const EXPECTED: u8 = 1;
const TOKEN: u8 = 2;
const STRANGER: u8 = 3;
const OFFERED: u8 = 9;
/// No activation asks for more than this.
const LONGEST: usize = 24;

fn every_labels() -> Vec<Event<u8>> {
    let mut every = Vec::new();
    for current in [EXPECTED, TOKEN, STRANGER, OFFERED] {
        for pending in [None, Some(TOKEN), Some(STRANGER), Some(OFFERED)] {
            for token_known in [false, true] {
                every.push(Event::Labels(Labels { current, pending, token_known }));
            }
        }
    }
    every
}

/// What the world may answer, but for [`Event::Failed`].
fn fitting(effect: &Effect<u8>) -> Vec<Event<u8>> {
    match effect {
        // The usual ones first and more often, or hardly any activation would get further.
        Effect::Look => {
            let usual =
                |pending, token_known| Event::Labels(Labels { current: EXPECTED, pending, token_known });
            let mut every = every_labels();
            for _ in 0..16 {
                every.extend([usual(Some(TOKEN), true), usual(None, false)]);
            }
            every
        }
        Effect::Save(_) => vec![Event::Saved { abort: false }, Event::Saved { abort: true }, Event::Lost],
        Effect::Create(_) => vec![Event::Created, Event::Conflict],
        Effect::Read(_) => vec![Event::Read],
        Effect::Probe(_) => [Probe::Accepted, Probe::Rejected, Probe::Unverifiable, Probe::Unknown]
            .map(Event::Probed)
            .to_vec(),
        Effect::Set => vec![Event::Set, Event::Refused],
        Effect::Test => vec![Event::Tested, Event::Rejected],
        Effect::Promote(_) => vec![Event::Promoted, Event::Conflict],
        Effect::Bar => vec![Event::Barred],
        Effect::Withdraw(_) | Effect::Keep(_) => vec![Event::Withdrawn],
        Effect::Retire(_) | Effect::Unretire(_) => vec![Event::Retired],
        Effect::Rest(_) | Effect::Ended(_) => vec![Event::Failed],
    }
}

fn any_event() -> impl Strategy<Value = Event<u8>> {
    let mut every = every_labels();
    every.extend([
        Event::Saved { abort: false },
        Event::Saved { abort: true },
        Event::Lost,
        Event::Created,
        Event::Read,
        Event::Probed(Probe::Accepted),
        Event::Probed(Probe::Rejected),
        Event::Probed(Probe::Unverifiable),
        Event::Probed(Probe::Unknown),
        Event::Set,
        Event::Refused,
        Event::Tested,
        Event::Rejected,
        Event::Promoted,
        Event::Conflict,
        Event::Barred,
        Event::Withdrawn,
        Event::Retired,
        Event::Gone,
        Event::Failed,
    ]);
    proptest::sample::select(every)
}

/// An answer that fits, the how-manieth of them; or one that need not.
#[derive(Debug, Clone)]
enum Answer {
    Fitting(usize),
    Any(Event<u8>),
}

fn any_answers() -> impl Strategy<Value = Vec<Answer>> {
    let answer = prop_oneof![
        20 => (0..10_000_usize).prop_map(Answer::Fitting),
        1 => any_event().prop_map(Answer::Any),
    ];
    proptest::collection::vec(answer, 0..40)
}

fn any_traits() -> impl Strategy<Value = Traits> {
    (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(has_target, repairs, retires)| Traits {
        has_target,
        repairs,
        retires,
    })
}

fn any_run() -> impl Strategy<Value = Option<Progress<u8>>> {
    let phase = proptest::sample::select(Phase::ALL.to_vec());
    proptest::option::weighted(
        0.7,
        phase.prop_map(|phase| Progress { token: TOKEN, expected: EXPECTED, phase }),
    )
}

const fn is_over(effect: &Effect<u8>) -> bool {
    matches!(effect, Effect::Rest(_) | Effect::Ended(_))
}

/// What was seen of one activation.
struct Watch {
    traits: Traits,
    /// Whether it began without a run.
    is_new: bool,
    /// As it was loaded, or saved and acknowledged last.
    saved: Option<Progress<u8>>,
    labels: Option<Labels<u8>>,
    tested: bool,
    promoted: bool,
    barred: bool,
    asked: usize,
    over: bool,
}

impl Watch {
    fn new(traits: Traits, run: Option<Progress<u8>>) -> Self {
        let (labels, tested, promoted, barred, asked, over) = (None, false, false, false, 0, false);
        Self { traits, is_new: run.is_none(), saved: run, labels, tested, promoted, barred, asked, over }
    }

    fn hears(&mut self, effect: &Effect<u8>, event: &Event<u8>) {
        match (effect, event) {
            (Effect::Save(run), Event::Saved { .. }) => self.saved = Some(run.clone()),
            (Effect::Look, Event::Labels(labels)) => self.labels = Some(labels.clone()),
            (Effect::Test, Event::Tested) => self.tested = true,
            (Effect::Promote(_), Event::Promoted) => self.promoted = true,
            (Effect::Bar, Event::Barred) => self.barred = true,
            _ => {}
        }
    }

    fn phase(&self) -> Option<Phase> {
        self.saved.as_ref().map(|run| run.phase)
    }

    fn sees(&mut self, effect: &Effect<u8>) -> Result<(), TestCaseError> {
        if self.over {
            prop_assert!(matches!(effect, Effect::Rest(_)), "after the end came {effect:?}");
            return Ok(());
        }
        self.over = is_over(effect);
        self.asked += 1;
        prop_assert!(self.asked <= LONGEST, "it does not end");
        match effect {
            Effect::Look | Effect::Read(_) | Effect::Rest(_) | Effect::Ended(_) => {}
            Effect::Save(run) => self.sees_save(run)?,
            Effect::Create(run) => {
                let known = self.labels.as_ref().is_none_or(|labels| labels.token_known);
                prop_assert!(self.is_new || !known, "generated anew: {run:?}");
                prop_assert_eq!(self.phase(), Some(Phase::Create));
            }
            Effect::Probe(_) | Effect::Test | Effect::Bar => prop_assert!(self.traits.has_target),
            Effect::Set => {
                prop_assert!(self.traits.has_target);
                prop_assert_eq!(self.phase(), Some(Phase::Set), "the phase was not saved first");
            }
            Effect::Promote(run) => {
                prop_assert!(self.tested || !self.traits.has_target, "promoted untested: {run:?}");
                prop_assert!(!self.traits.has_target || self.phase() == Some(Phase::Finish));
            }
            Effect::Withdraw(token) => {
                let is_current = self.labels.as_ref().is_some_and(|labels| labels.current == *token);
                prop_assert!(self.promoted || is_current, "the claim goes, and its version is not current");
            }
            Effect::Keep(_) => {
                let may_hold = self.traits.has_target && self.phase() >= Some(Phase::Set);
                prop_assert!(self.barred || !may_hold, "given up without a bar");
            }
            Effect::Retire(run) => {
                let current = self.labels.as_ref().map(|labels| labels.current);
                prop_assert_eq!(current, Some(run.token));
                prop_assert_eq!(self.phase(), Some(Phase::Retire));
            }
            Effect::Unretire(run) => {
                let current = self.labels.as_ref().map(|labels| labels.current);
                prop_assert_eq!(current, Some(run.expected));
                prop_assert_eq!(self.phase(), Some(Phase::Retire));
            }
        }
        Ok(())
    }

    fn sees_save(&self, run: &Progress<u8>) -> Result<(), TestCaseError> {
        if let Some(saved) = &self.saved {
            prop_assert_eq!((saved.token, saved.expected), (run.token, run.expected), "another run");
        }
        let is_drawn = match (self.phase(), run.phase) {
            (None, Phase::Create | Phase::Set)
            | (Some(Phase::Create), Phase::Set)
            | (Some(Phase::Set), Phase::Test)
            | (Some(Phase::Test), Phase::Finish)
            // The target rejects what it took before.
            | (Some(Phase::Test | Phase::Finish), Phase::Set) => self.traits.has_target || self.saved.is_none(),
            (Some(Phase::Create | Phase::Set), Phase::Finish) => !self.traits.has_target,
            (Some(_), Phase::Retire) => self.traits.retires,
            _ => false,
        };
        prop_assert!(is_drawn, "from {:?} to {}", self.phase(), run.phase);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_it_is_answered_the_machine_does_nothing_out_of_turn_and_ends(
        traits in any_traits(),
        run in any_run(),
        abort in proptest::bool::weighted(0.2),
        answers in any_answers(),
    ) {
        let mut watch = Watch::new(traits, run.clone());
        let (mut machine, mut effect) = Activation::begin(traits, run, OFFERED, abort);
        watch.sees(&effect)?;
        for answer in answers {
            let event = match answer {
                Answer::Fitting(which) => {
                    let mut fitting = fitting(&effect);
                    fitting.swap_remove(which % fitting.len())
                }
                Answer::Any(event) => event,
            };
            watch.hears(&effect, &event);
            (machine, effect) = machine.next(event);
            watch.sees(&effect)?;
        }
        // Whatever it waits for: that it is not known ends it.
        let (_, effect) = machine.next(Event::Failed);
        prop_assert_eq!(effect, Effect::Rest(Rest::Failed));
    }

    #[test]
    fn the_models_labels_are_the_products(steps in proptest::collection::vec((0..6_u8, 0..6_u8), 0..30)) {
        let mut shelf = Shelf { current: 0, pending: None, previous: None, versions: Vec::new() };
        shelf.write(0, User::A, false);
        let mut labels = secret::Labels::default().put(&id(0), &[]).unwrap();
        for (step, version) in steps {
            labels = step_both(&mut shelf, &labels, step, version);
            let of = |label| labels.holder(&label).cloned();
            prop_assert_eq!(of(Label::Current), Some(id(shelf.current)));
            prop_assert_eq!(of(Label::Pending), shelf.pending.map(id));
            prop_assert_eq!(of(Label::Previous), shelf.previous.map(id));
        }
    }
}

fn id(version: u8) -> VersionId {
    VersionId::parse(&format!("{version:032}")).unwrap()
}

fn step_both(shelf: &mut Shelf, labels: &secret::Labels, step: u8, version: u8) -> secret::Labels {
    let is_new = shelf.version(version).is_none();
    match step {
        0 if is_new => {
            let run = Progress { token: version, expected: shelf.current, phase: Phase::Create };
            let created = shelf.create(&run) == Event::Created;
            let put = labels.put(&id(version), &[Label::Pending]);
            assert_eq!(created, put.is_ok(), "{labels:?}, {version}");
            put.unwrap_or_else(|_| labels.clone())
        }
        1 if is_new => {
            shelf.write(version, User::B, true);
            shelf.move_current(version);
            labels.put(&id(version), &[]).unwrap()
        }
        2 if !is_new => {
            let change =
                LabelMove { label: Label::Current, from: Some(id(shelf.current)), to: Some(id(version)) };
            shelf.move_current(version);
            labels.apply(&change).unwrap()
        }
        3 => {
            let held = shelf.pending;
            shelf.take_claim_off(version, version.is_multiple_of(2));
            let change = LabelMove { label: Label::Pending, from: Some(id(version)), to: None };
            let moved = labels.apply(&change);
            assert_eq!(moved.is_ok(), held.is_none() || held == Some(version), "{labels:?}, {version}");
            moved.unwrap_or_else(|_| labels.clone())
        }
        // In time, or as late as a rotation.
        4 if !is_new => finish_both(shelf, labels, shelf.current, version),
        5 if !is_new => finish_both(shelf, labels, shelf.previous.unwrap_or(version), version),
        _ => labels.clone(),
    }
}

/// A promotion, by the rule that the model has for one that takes the claim.
fn finish_both(shelf: &mut Shelf, labels: &secret::Labels, expected: u8, version: u8) -> secret::Labels {
    let is_claimed = shelf.pending == Some(version) && shelf.current == expected;
    let may = is_claimed || shelf.current == version;
    let finished = labels.finish(&id(expected), &id(version));
    assert_eq!(finished.is_ok(), may, "{labels:?}, from {expected} to {version}");
    if may {
        shelf.move_current(version);
        shelf.take_claim_off(version, false);
    }
    finished.unwrap_or_else(|_| labels.clone())
}

/// `SplitMix64`: a walk is its seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound).unwrap();
        usize::try_from(self.roll() % bound).unwrap()
    }

    /// Mostly what brings a run on, or all that goes wrong would go wrong at its beginning.
    fn choose(&mut self, actions: &[Action]) -> Action {
        let progress: Vec<Action> = actions.iter().copied().filter(|action| action.is_progress()).collect();
        let among = if progress.is_empty() || self.below(10) < 3 { actions } else { &progress };
        among[self.below(among.len())]
    }
}

/// What a walk may meet with. A repeated request and a person never meet: the target can't tell the second copy of a
/// change from the first one, and whoever changes the account between the two is undone.
fn mixes() -> [Rotations; 6] {
    const MANY: Budget = Budget {
        dues: 4,
        troubles: 4,
        pauses: 2,
        late: 2,
        repeats: 0,
        moves: 0,
        resets: 0,
        aborts: 2,
        refusals: 0,
    };
    [
        (ALTERNATING, Budget { repeats: 2, resets: 1, ..MANY }),
        (ALTERNATING, Budget { refusals: 2, resets: 1, ..MANY }),
        (ALTERNATING, Budget { refusals: 1, moves: 1, ..MANY }),
        (RETIRING, Budget { refusals: 1, moves: 1, ..MANY }),
        (REPAIRING, Budget { refusals: 1, moves: 1, resets: 2, ..MANY }),
        (STORE_ONLY, Budget { repeats: 2, moves: 1, ..MANY }),
    ]
    .map(|(traits, budget)| Rotations { traits, budget, guards: Guards::ALL })
}

/// The names of the properties that a state breaks.
fn broken(rotations: &Rotations, world: &World, with_convergence: bool) -> Vec<&'static str> {
    let looked_at = rotations.properties().into_iter().filter(|property| {
        property.expectation == Expectation::Always
            && (with_convergence || property.name != properties::CONVERGES)
    });
    looked_at
        .filter(|property| !(property.condition)(rotations, world))
        .map(|property| property.name)
        .collect()
}

/// One walk; whether AWSCURRENT moved on it.
fn walk(rotations: &Rotations, seed: u64) -> bool {
    let mut dice = Dice(seed);
    let mut world = rotations.start();
    let mut trail = Vec::new();
    let mut actions = Vec::new();
    for _ in 0..120 {
        rotations.actions(&world, &mut actions);
        if actions.is_empty() {
            break;
        }
        let action = dice.choose(&actions);
        actions.clear();
        trail.push(action);
        world = rotations.next_state(&world, action).unwrap();
        let broken = broken(rotations, &world, dice.below(4) == 0);
        assert!(broken.is_empty(), "seed {seed}: {broken:?} after {trail:?}: {world:?}");
    }
    assert!(rotations.settles(&world), "seed {seed}: it does not converge after {trail:?}: {world:?}");
    world.seen.promotions > 0
}

#[test]
fn r42_ten_thousand_walks_through_kills_timeouts_repeats_late_arrivals_and_pauses() {
    let mixes = mixes();
    let rotated = (0..10_000_usize)
        .filter(|seed| walk(&mixes[seed % mixes.len()], u64::try_from(*seed).unwrap()))
        .count();
    assert!(rotated > 5_000, "only {rotated} of the walks rotated at all");
}
