//! The rotation's machine under exhaustive model checking: every order in which three replicas, a cron, a person, the
//! store and the target can act, with so many faults as a test's budget says.
//!
//! ```text
//!   shelf       versions and labels
//!   world       record, target, who works, what is on its way; how often what may go wrong; what holds it up
//!   model       what can happen, and what becomes of an effect       ─┐
//!   properties  what must be true of every state                     ─┴─▶ stateright visits them all
//!   fuzz        the machine alone against any answers; long random walks through the same model
//! ```
//!
//! An effect can be done and answered; be done with its answer lost; fail undone; be refused; be late, so that its request
//! arrives at any later time, when others may have done whole runs; arrive twice. Whoever works can die, or lose its lease
//! without knowing. A person can roll back, put a value of their own, change a password at the target, ask for the end.
//!
//! | test | unique states |
//! |---|---|
//! | nothing goes wrong: four strategies, three rotations each | 46, 46, 58, 31 |
//! | crashes and lost answers | 1,625 |
//! | pauses past the lease | 47,322 |
//! | late requests | 17,130 |
//! | repeated requests | 13,119 |
//! | a person moves AWSCURRENT, and a pause | 73,516 |
//! | a person moves AWSCURRENT, and a late request | 46,833 |
//! | an abort, a pause, a late request | 84,140 |
//! | an abort, a person, a late request | 59,613 |
//! | a password changed at the target, a pause, a late request | 70,838 |
//! | two passwords changed at the target, with repair | 17,309 |
//! | refused values, a late request | 20,482 |
//! | refused values, a pause | 12,803 |
//! | retiring: a person, a late request | 65,144 |
//! | retiring: a pause, a late request | 21,449 |
//! | without a target | 110,130 |
//! | labels that are moved one at a time | 119,845 |
//! | the lease looked at only where a run is saved | 19,971 |
//!
//! Together 801,450. What the checker found in earlier forms of the machine, each a lockout or a lost value, and how it was
//! mended:
//!
//! - a move of AWSCURRENT whose answer was lost was repeated after a person had rolled back: so the move spends
//!   AWSPENDING in the same transaction, and a run whose claim is spent ends;
//! - one who was paused before that move made it after an abort and a further rotation, when the account held another
//!   password: the same mend;
//! - a value that the target refused was withdrawn, the answer lost, and the next one set it, because the target had
//!   changed its mind: so what is given up keeps a label;
//! - AWSPENDING that stayed on a version after its rotation was taken, once a person had moved AWSCURRENT on, for a value
//!   that is still to come, and the old value came back: so it goes with the move, and what is older is not taken up.
//!
//! What the model takes for granted: the put of a pending value and the move of AWSCURRENT are each one transaction; a
//! fence is compared in the same transaction as the change of the target; a key-value transaction that compares what it
//! read can't be done twice. What it excuses is said at [`properties::a_person_broke_it`] and `Rotations::needs_a_person`.

mod fuzz;
mod model;
mod properties;
mod shelf;
mod world;

use claviger::rotation::machine::Traits;
use stateright::{Checker as _, HasDiscoveries, Model as _};

use self::model::Rotations;
use self::world::{Budget, Guards, Promotion};

const ALTERNATING: Traits = Traits { has_target: true, repairs: false, retires: false };
const REPAIRING: Traits = Traits { has_target: true, repairs: true, retires: false };
const RETIRING: Traits = Traits { has_target: true, repairs: false, retires: true };
const STORE_ONLY: Traits = Traits { has_target: false, repairs: false, retires: false };

const TWO_DUES: Budget = Budget {
    dues: 2,
    troubles: 0,
    pauses: 0,
    late: 0,
    repeats: 0,
    moves: 0,
    resets: 0,
    aborts: 0,
    refusals: 0,
};

/// Visits every state; `at_least` so many, so that a model that can do nothing does not pass for one that does nothing
/// wrong.
fn holds(traits: Traits, budget: Budget, guards: Guards, at_least: usize) {
    let rotations = Rotations { traits, budget, guards };
    let checker = rotations.checker().spawn_bfs().join();
    checker.assert_properties();
    let states = checker.unique_state_count();
    println!("{states} states: {rotations:?}");
    assert!(states >= at_least, "only {states} states, of at least {at_least}: {rotations:?}");
}

/// The control: without one of the guards, the property is broken, and the checker finds it.
fn breaks(property: &'static str, budget: Budget, guards: Guards) {
    let rotations = Rotations { traits: ALTERNATING, budget, guards };
    let until = HasDiscoveries::AnyOf([property].into());
    let checker = rotations.checker().finish_when(until).spawn_bfs().join();
    let path = checker.assert_any_discovery(property);
    println!("{property}, in {} states: {path}", checker.unique_state_count());
    assert!(path.into_actions().len() > 1, "it was broken from the start");
}

#[test]
fn where_nothing_goes_wrong_it_rotates_and_no_login_fails() {
    let budget = Budget { dues: 3, ..TWO_DUES };
    holds(ALTERNATING, budget, Guards::ALL, 40);
    holds(REPAIRING, budget, Guards::ALL, 40);
    holds(RETIRING, budget, Guards::ALL, 50);
    holds(STORE_ONLY, budget, Guards::ALL, 25);
}

#[test]
fn r1_r2_r5_r6_r10_r11_r24_it_survives_crashes_and_lost_answers_anywhere() {
    holds(ALTERNATING, Budget { troubles: 3, aborts: 1, ..TWO_DUES }, Guards::ALL, 1_000);
}

#[test]
fn r4_it_survives_two_who_were_paused_past_their_lease() {
    holds(ALTERNATING, Budget { pauses: 2, troubles: 1, ..TWO_DUES }, Guards::ALL, 25_000);
}

#[test]
fn r2_r11_it_survives_requests_that_arrive_when_nobody_waits_any_more() {
    holds(ALTERNATING, Budget { late: 2, troubles: 1, ..TWO_DUES }, Guards::ALL, 9_000);
}

#[test]
fn it_survives_requests_that_arrive_twice() {
    holds(ALTERNATING, Budget { repeats: 1, late: 1, troubles: 1, ..TWO_DUES }, Guards::ALL, 6_000);
}

#[test]
fn r25_a_person_who_moves_current_is_respected_also_by_one_who_was_paused() {
    holds(ALTERNATING, Budget { moves: 1, pauses: 1, troubles: 1, ..TWO_DUES }, Guards::ALL, 40_000);
}

#[test]
fn r25_a_person_who_moves_current_is_respected_also_by_what_comes_late() {
    holds(ALTERNATING, Budget { moves: 1, late: 1, troubles: 1, ..TWO_DUES }, Guards::ALL, 25_000);
}

#[test]
fn an_aborted_run_does_not_come_back() {
    holds(ALTERNATING, Budget { aborts: 1, late: 1, pauses: 1, ..TWO_DUES }, Guards::ALL, 45_000);
}

#[test]
fn an_aborted_run_does_not_undo_what_a_person_does_after_it() {
    holds(ALTERNATING, Budget { aborts: 1, late: 1, moves: 1, ..TWO_DUES }, Guards::ALL, 30_000);
}

#[test]
fn r37_a_password_that_is_changed_at_the_target_harms_nothing_else() {
    holds(ALTERNATING, Budget { resets: 1, late: 1, pauses: 1, ..TWO_DUES }, Guards::ALL, 40_000);
}

#[test]
fn r16_r17_with_repair_passwords_that_are_changed_at_the_target_are_mended() {
    holds(REPAIRING, Budget { resets: 2, late: 1, troubles: 1, ..TWO_DUES }, Guards::ALL, 10_000);
}

#[test]
fn r14_a_value_that_the_target_refuses_is_not_lost_where_it_changes_its_mind() {
    holds(ALTERNATING, Budget { refusals: 2, late: 1, troubles: 1, ..TWO_DUES }, Guards::ALL, 11_000);
}

#[test]
fn r14_a_value_that_the_target_refuses_is_not_lost_by_one_who_was_paused() {
    holds(ALTERNATING, Budget { refusals: 1, pauses: 1, troubles: 1, ..TWO_DUES }, Guards::ALL, 7_000);
}

#[test]
fn r28_a_retirement_does_not_undo_what_a_person_does_after_it() {
    holds(RETIRING, Budget { moves: 1, late: 1, troubles: 1, ..TWO_DUES }, Guards::ALL, 35_000);
}

#[test]
fn r28_a_retirement_that_comes_late_harms_nothing() {
    holds(RETIRING, Budget { late: 1, pauses: 1, ..TWO_DUES }, Guards::ALL, 11_000);
}

#[test]
fn it_holds_without_a_target() {
    holds(STORE_ONLY, Budget { late: 1, pauses: 1, moves: 1, ..TWO_DUES }, Guards::ALL, 45_000);
}

/// A store whose labels can only be moved one at a time (AWS): still nothing is lost by a crash, a person, an abort or a
/// refusal. What remains open is a move of AWSCURRENT that arrives late:
/// [`control_current_is_moved_only_while_the_claim_is_there`].
#[test]
fn it_survives_all_but_late_moves_where_labels_are_moved_one_at_a_time() {
    let guards = Guards { promotion: Promotion::Plain, ..Guards::ALL };
    let budget = Budget { troubles: 2, moves: 1, aborts: 1, refusals: 1, ..TWO_DUES };
    holds(ALTERNATING, budget, guards, 60_000);
}

#[test]
fn safety_does_not_hang_on_looking_at_the_lease() {
    let guards = Guards { checks_lease: false, ..Guards::ALL };
    holds(ALTERNATING, Budget { aborts: 1, pauses: 1, troubles: 1, ..TWO_DUES }, guards, 11_000);
}

#[test]
fn control_the_target_compares_fences() {
    let guards = Guards { fences: false, ..Guards::ALL };
    breaks(properties::CURRENT_WORKS, Budget { late: 1, aborts: 1, ..TWO_DUES }, guards);
    breaks(properties::CURRENT_WORKS, Budget { late: 1, dues: 3, ..TWO_DUES }, guards);
}

#[test]
fn control_a_stored_value_is_never_generated_anew() {
    let guards = Guards { keeps_values: false, ..Guards::ALL };
    breaks(properties::NOTHING_LOST, Budget { troubles: 1, ..TWO_DUES }, guards);
}

#[test]
fn control_a_run_is_given_up_behind_a_bar() {
    let guards = Guards { bars: false, ..Guards::ALL };
    breaks(properties::CURRENT_WORKS, Budget { aborts: 1, late: 1, moves: 1, ..TWO_DUES }, guards);
}

#[test]
fn control_the_phase_is_saved_before_the_target_is_changed() {
    let guards = Guards { saves_before_set: false, ..Guards::ALL };
    breaks(properties::CURRENT_WORKS, Budget { aborts: 1, late: 1, moves: 1, ..TWO_DUES }, guards);
}

#[test]
fn control_current_is_moved_only_while_the_claim_is_there() {
    let guards = Guards { promotion: Promotion::Plain, ..Guards::ALL };
    breaks(properties::CURRENT_WORKS, Budget { aborts: 1, pauses: 1, ..TWO_DUES }, guards);
    breaks(properties::CURRENT_WORKS, Budget { aborts: 1, late: 1, ..TWO_DUES }, guards);
}

#[test]
fn control_the_claim_goes_with_the_move() {
    let guards = Guards { promotion: Promotion::ComparesClaim, ..Guards::ALL };
    breaks(properties::ONCE_PER_TOKEN, Budget { late: 1, moves: 1, ..TWO_DUES }, guards);
    breaks(properties::PERSONS_STAY, Budget { late: 1, moves: 1, ..TWO_DUES }, guards);
}
