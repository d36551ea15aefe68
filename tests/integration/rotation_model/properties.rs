//! What must be true of every state that can be reached: the invariants I1 to I8, as far as the machine is concerned.
//! (I3 is the login that never fails where nothing goes wrong; I7, the record before the disclosure, is the broker's.)

use claviger::rotation::machine::{Effect, Progress};
use stateright::Property;

use super::model::Rotations;
use super::shelf::{Password, User};
use super::world::{Run, World};

pub const NOTHING_LOST: &str = "I1: no value that the target holds, or may be made to hold, is lost";
pub const CURRENT_WORKS: &str = "I2: AWSCURRENT authenticates";
pub const NO_LOGIN_FAILS: &str = "I3: no login fails where nothing goes wrong";
pub const CONVERGES: &str = "I4: once faults stop, this run ends and the next one too";
pub const ONCE_WHEN_DUE: &str = "I5: each time it is due, AWSCURRENT moves at most once";
pub const ONCE_PER_TOKEN: &str = "I5: a token becomes current once";
pub const PAIRS_MATCH: &str = "I6: what becomes current is a pair that the target has accepted";
pub const PREVIOUS_WAS_CURRENT: &str = "I8: AWSPREVIOUS is what was AWSCURRENT before";
pub const PERSONS_STAY: &str =
    "what a person made current is replaced only by a run that was claimed after it";
pub const ROTATES: &str = "it rotates, each time that it is due";

pub fn all() -> Vec<Property<Rotations>> {
    vec![
        Property::<Rotations>::always(NOTHING_LOST, nothing_lost),
        Property::<Rotations>::always(CURRENT_WORKS, current_works),
        Property::<Rotations>::always(NO_LOGIN_FAILS, |_, world| !world.seen.login_failed_untroubled),
        Property::<Rotations>::always(CONVERGES, |rotations, world| {
            !world.workers.is_empty() || rotations.settles(world)
        }),
        Property::<Rotations>::always(ONCE_WHEN_DUE, |rotations, world| {
            world.seen.promotions <= rotations.budget.dues - world.left.dues
        }),
        Property::<Rotations>::always(ONCE_PER_TOKEN, |_, world| !world.seen.promoted_twice),
        Property::<Rotations>::always(PAIRS_MATCH, |_, world| !world.seen.promoted_unaccepted),
        Property::<Rotations>::always(PREVIOUS_WAS_CURRENT, |_, world| {
            world.store.previous == world.seen.before
        }),
        Property::<Rotations>::always(PERSONS_STAY, |_, world| !world.seen.overwrote_person),
        Property::<Rotations>::sometimes(ROTATES, |rotations, world| {
            world.seen.promotions == rotations.budget.dues && world.record.run == Run::None
        }),
    ]
}

/// What the target holds is in the store under a label, or was never given up; and so is what a request that is still on
/// its way would make it hold.
fn nothing_lost(rotations: &Rotations, world: &World) -> bool {
    if !rotations.traits.has_target {
        return !world.store.is_lost(world.store.current);
    }
    let is_kept = |id: u8, password: Password| {
        world.store.version(id).is_some_and(|version| version.password == password)
            && !world.store.is_lost(id)
    };
    let held = User::BOTH.into_iter().all(|user| match world.account(user).password {
        held @ (Password::Of(id) | Password::Anew(id)) => is_kept(id, held),
        Password::Foreign | Password::Nobody => true,
    });
    let awaited = world.workers.iter().map(|worker| (worker.fence, worker.activation.run(), &worker.effect));
    let late = world.underway.iter().map(|request| (request.fence, request.run.as_ref(), &request.effect));
    let mut sets = awaited.chain(late).filter(|(.., effect)| **effect == Effect::Set);
    let is_harmless = |fence: u8, run: &Progress<u8>| {
        !would_land(rotations, world, fence, run) || !world.store.is_lost(run.token)
    };
    held && sets.all(|(fence, run, _)| run.is_none_or(|run| is_harmless(fence, run)))
}

fn would_land(rotations: &Rotations, world: &World, fence: u8, run: &Progress<u8>) -> bool {
    let account = world.store.version(run.token).map(|version| world.account(version.user));
    account.is_some_and(|account| !rotations.guards.fences || fence >= account.fence)
}

fn current_works(rotations: &Rotations, world: &World) -> bool {
    !rotations.traits.has_target || world.authenticates(world.store.current) || a_person_broke_it(world)
}

/// What is excused: the account of AWSCURRENT holds a person's password, which that person did not make current, or let go
/// of again; or a person moved AWSCURRENT to what the target did not accept, or to the very account that a run in progress
/// was changing. The excuse ends with the next promotion.
pub fn a_person_broke_it(world: &World) -> bool {
    let Some(current) = world.store.version(world.store.current) else { return false };
    let by_person = match world.account(current.user).password {
        Password::Foreign => true,
        Password::Of(id) => {
            id != world.store.current && world.store.version(id).is_some_and(|version| version.by_person)
        }
        Password::Anew(_) | Password::Nobody => false,
    };
    by_person || world.seen.person_broke_it
}
