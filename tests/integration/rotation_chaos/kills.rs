//! SIGKILL: at every phase's edge, just before and just after the change is committed, and at any instant.

use std::time::{Duration, Instant};

use super::database::{failed_logins, port};
use super::oracle::{Account, Oracle};
use super::proxy::{Answer, Fault, Proxy};
use super::seed::Seed;
use super::stage::{Plan, Stage, login};
use super::until;
use crate::support::moto::{FaultProxy, Mode, Moto};
use crate::support::postgresql::Postgres;

/// Each of them a broker, a database and an oracle of its own.
const LANES: u64 = 4;
const KILLS: u64 = 100;

#[tokio::test(flavor = "multi_thread")]
async fn sigkill_at_every_phase_edge_ends_in_the_same_version() {
    const ROUNDS: usize = 3;
    let server = Postgres::start();
    let mut stage = Stage::raise(&server, Plan::to_be_killed()).await;
    let oracle = Oracle::watch(&stage);
    for _ in 0..ROUNDS {
        for phase in ["create", "set", "test", "finish"] {
            let mut steps = stage.begin(false).await;
            let token = steps.reaches(phase).await;
            stage.kill();
            stage.start();
            stage.assert_resumed(&token).await;
        }
    }
    let account = oracle.stop();
    account.assert_clean();
    assert!(account.versions.len() <= 1 + ROUNDS * 4, "{account:?}");
    // A resumed run asks the target first. That is one login with a value that it may not have.
    assert!(failed_logins(&server) as u64 <= account.late + (ROUNDS * 4) as u64, "{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn r8_killed_right_after_the_value_was_made_the_same_value_is_resumed() {
    let server = Postgres::start();
    let mut stage = Stage::raise(&server, Plan::to_be_killed()).await;
    let oracle = Oracle::watch(&stage);
    for _ in 0..3 {
        let mut steps = stage.begin(false).await;
        // From here on the target may hold it, so it is durable.
        let token = steps.reaches("set").await;
        let pending = login(&stage.version(&token).await);
        stage.kill();
        stage.start();
        assert_eq!(login(&stage.version(&token).await), pending, "it was durable");
        stage.assert_resumed(&token).await;
        assert_eq!(login(&stage.current().await), pending);
    }
    oracle.stop().assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn r4_r10_a_dead_brokers_change_that_comes_late_is_refused_by_the_target() {
    let server = Postgres::start();
    let mut proxy = Proxy::before(port(&server)).await;
    let mut stage = Stage::raise(&server, Plan::to_be_killed().through(proxy.port)).await;
    let oracle = Oracle::watch(&stage);
    proxy.next(Fault::Keep);
    let mut steps = stage.begin(false).await;
    let token = steps.reaches("set").await;
    proxy.struck().await;
    // Killed before the server has seen anything of it.
    stage.kill();
    stage.start();
    stage.assert_resumed(&token).await;
    for _ in 0..2 {
        assert_eq!(stage.rotate().await.result, "rotated");
    }
    // The user of the change that is on its way has AWSCURRENT again, with another password.
    let now = stage.pair.verifiers(&server);
    assert_eq!(proxy.release().await, Answer::Refused("CLV01".to_owned()));
    assert_eq!(stage.pair.verifiers(&server), now, "nothing was changed");
    stage.assert_sound().await;
    oracle.stop().assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn r11_killed_after_the_commit_the_value_is_found_and_not_set_again() {
    let server = Postgres::start();
    let mut proxy = Proxy::before(port(&server)).await;
    let mut stage = Stage::raise(&server, Plan::to_be_killed().through(proxy.port)).await;
    let oracle = Oracle::watch(&stage);
    for _ in 0..3 {
        proxy.next(Fault::LoseAnswer);
        let mut steps = stage.begin(false).await;
        let token = steps.reaches("set").await;
        proxy.struck().await;
        stage.kill();
        let committed = stage.pair.verifiers(&server);
        stage.start();
        stage.assert_resumed(&token).await;
        assert_eq!(stage.pair.verifiers(&server), committed, "a value set again has another salt");
    }
    oracle.stop().assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn r24_killed_while_the_label_is_about_to_move() {
    const MOVES: &str = "UpdateSecretVersionStage";
    let server = Postgres::start();
    let aws = FaultProxy::start(Moto::start().await.endpoint()).await;
    let mut stage = Stage::raise(&server, Plan::to_be_killed().in_aws(aws.endpoint())).await;
    let oracle = Oracle::watch(&stage);
    // Before it is there.
    aws.forget();
    aws.set_for(MOVES, Mode::Hang);
    let token = stage.begin(false).await.reaches("finish").await;
    until("the label is about to move", async || (aws.calls(MOVES) > 0).then_some(())).await;
    assert_ne!(stage.current().await.version_id, token, "not yet");
    stage.kill();
    aws.set(Mode::Pass);
    stage.start();
    stage.assert_resumed(&token).await;
    // It is there, and nobody knows.
    aws.next(MOVES, 1, Mode::CutAfterRequest);
    let token = stage.begin(false).await.reaches("finish").await;
    stage.assert_resumed(&token).await;
    oracle.stop().assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn r24_killed_right_after_the_label_moved_it_is_not_moved_twice() {
    let server = Postgres::start();
    let mut stage = Stage::raise(&server, Plan::to_be_killed()).await;
    let oracle = Oracle::watch(&stage);
    for _ in 0..3 {
        let before = stage.current().await.version_id;
        let mut steps = stage.begin(false).await;
        let token = steps.reaches("finish").await;
        until("the label moves", async || (stage.current().await.version_id == token).then_some(())).await;
        stage.kill();
        stage.start();
        stage.assert_resumed(&token).await;
        assert_eq!(stage.labels().await["AWSPREVIOUS"], before, "it moved once");
    }
    oracle.stop().assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn r28_killed_before_the_old_value_is_retired_it_is_valid_until_it_is() {
    let server = Postgres::start();
    let mut proxy = Proxy::before(port(&server)).await;
    let plan = Plan { more: "retire_after = \"4s\"", ..Plan::to_be_killed() }.through(proxy.port);
    let mut stage = Stage::raise(&server, plan).await;
    stage.settle().await;
    let oracle = Oracle::watch(&stage);
    // Before it is withdrawn; while that is on its way; after it was committed.
    for edge in [None, Some(Fault::Keep), Some(Fault::LoseAnswer)] {
        if let Some(fault) = edge {
            proxy.next_retirement(fault);
        }
        let old = login(&stage.current().await);
        let step = stage.rotate().await;
        assert_eq!(step.result, "rotated", "{step:?}");
        assert_eq!(stage.status().await.run.expect("the old one is to be retired").phase, "retire");
        stage.pair.lets_in(&old).expect("users of the old value have time");
        if edge.is_some() {
            assert_eq!(Some(proxy.struck().await), edge);
        }
        stage.kill();
        assert_eq!(stage.pair.lets_in(&old).is_ok(), edge != Some(Fault::LoseAnswer));
        stage.start();
        stage.settle().await;
        assert!(stage.pair.lets_in(&old).is_err(), "it is retired");
        stage.pair.lets_in(&login(&stage.current().await)).expect("AWSCURRENT is not touched");
        assert_eq!(stage.labels().await["AWSCURRENT"], step.version_id);
        if edge == Some(Fault::Keep) {
            let now = stage.pair.verifiers(&server);
            assert_eq!(proxy.release().await, Answer::Refused("CLV01".to_owned()), "it came too late");
            assert_eq!(stage.pair.verifiers(&server), now, "nothing was changed");
        }
    }
    oracle.stop().assert_clean();
}

#[test]
fn sigkill_at_100_random_instants_loses_nothing() {
    let server = Postgres::start();
    let seed = Seed::or(20_260_401);
    let killed: Vec<_> = std::thread::scope(|scope| {
        let lane = |number| {
            let (seed, server) = (seed.branch(number), &server);
            scope.spawn(move || in_a_runtime(be_killed(server, seed, |kills| kills < KILLS / LANES)))
        };
        let lanes: Vec<_> = (0..LANES).map(lane).collect();
        lanes.into_iter().map(|lane| lane.join().expect("a lane fails, see above")).collect()
    });
    let within: u64 = killed.iter().map(|killed| killed.within).sum();
    for killed in killed {
        killed.account.assert_clean();
    }
    // Or nothing is proven.
    assert!(within > KILLS / 4, "only {within} of {KILLS} came while a run was in progress");
}

/// The same for as long as `CLAVIGER_SOAK` says, in seconds.
#[test]
#[ignore = "takes as long as it is told to; `bash tests/run --soak`"]
fn sigkill_for_as_long_as_told_loses_nothing() {
    let seconds = std::env::var("CLAVIGER_SOAK").map_or(600, |text| text.parse().unwrap());
    let end = Instant::now() + Duration::from_secs(seconds);
    let server = Postgres::start();
    in_a_runtime(be_killed(&server, Seed::or(1), |_| Instant::now() < end)).account.assert_clean();
}

fn in_a_runtime<T>(work: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(1).enable_all().build().unwrap().block_on(work)
}

/// What became of a broker that was killed again and again.
struct Killed {
    account: Account,
    /// How many of the kills left a run in progress behind.
    within: u64,
}

/// Rotates and is killed, again and again, for as long as `goes_on` says of the number of kills.
async fn be_killed(server: &Postgres, mut seed: Seed, goes_on: impl Fn(u64) -> bool) -> Killed {
    let mut stage = Stage::raise(server, Plan::to_be_killed()).await;
    let oracle = Oracle::every(Duration::from_millis(100), &stage);
    let usual = u64::try_from(usual(&stage).await.as_micros()).unwrap();
    let (mut kills, mut within) = (0, 0);
    while goes_on(kills) {
        stage.old_enough().await;
        let asking = stage.ask().await;
        // The instant itself, in most cases within the run.
        tokio::time::sleep(Duration::from_micros(seed.below(usual * 5 / 4))).await;
        stage.kill();
        kills += 1;
        let cut_off = asking.await.expect("it only asks");
        stage.start();
        // What was told and what is on record: neither alone sees all of them.
        within += u64::from(stage.status().await.run.is_some() || cut_off);
        stage.settle().await;
        stage.assert_sound().await;
    }
    let account = oracle.stop();
    println!(
        "{kills} kills, {within} of them within a run, {} versions, {} logins, {} late, {} reads without a broker",
        account.versions.len(),
        account.logins,
        account.late,
        account.reads_failed
    );
    Killed { account, within }
}

/// How long a rotation takes here and now: the middle one of three.
async fn usual(stage: &Stage) -> Duration {
    let mut taken = [Duration::ZERO; 3];
    for time in &mut taken {
        stage.old_enough().await;
        let begun = Instant::now();
        assert_eq!(stage.rotate().await.result, "rotated");
        *time = begun.elapsed();
    }
    taken.sort_unstable();
    taken[1]
}
