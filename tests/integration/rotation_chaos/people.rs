//! People do things in the middle of it, or behind the broker's back. And whoever reads or watches hears of a rotation
//! at once.

use claviger::proto::v1;
use claviger::proto::v1::watch_secrets_response::Event;

use super::HUNG;
use super::database::{failed_logins, port};
use super::oracle::Oracle;
use super::proxy::{Answer, Fault, Proxy};
use super::stage::{ENVIRONMENT, NAME, Plan, Stage, login};
use crate::support::postgresql::Postgres;

#[tokio::test(flavor = "multi_thread")]
async fn r16_a_current_password_changed_behind_our_back_blocks_until_repair_is_allowed() {
    let server = Postgres::start();
    let stage = Stage::raise(&server, Plan::default()).await;
    let current = login(&stage.current().await);
    server.sql(&format!("ALTER ROLE {} PASSWORD 'changed-by-hand'", current.username));
    let before = stage.pair.verifiers(&server);
    is_blocked(&stage, "current_rejected").await;
    assert_eq!(stage.pair.verifiers(&server), before, "the target is left alone");
    assert!(failed_logins(&server) <= 4, "{}", server.log());
    repair(&stage).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r17_when_every_password_was_changed_the_admin_sets_one_where_repair_is_allowed() {
    let server = Postgres::start();
    let stage = Stage::raise(&server, Plan::default()).await;
    for user in &stage.pair.users {
        server.sql(&format!("ALTER ROLE {user} PASSWORD 'changed-by-hand'"));
    }
    let before = stage.pair.verifiers(&server);
    is_blocked(&stage, "locked_out").await;
    assert_eq!(stage.pair.verifiers(&server), before, "the target is left alone");
    assert!(failed_logins(&server) <= 6, "{}", server.log());
    repair(&stage).await;
}

async fn is_blocked(stage: &Stage, trouble: &str) {
    let step = stage.begin(false).await.end().await;
    assert_eq!(step.result, "blocked", "{step:?}");
    let said = step.trouble.expect("why");
    assert_eq!(said.code, trouble, "{said:?}");
    assert!(said.needs_person && !said.mend.is_empty(), "{said:?}");
    assert_eq!(stage.status().await.health(), v1::RotationHealth::Blocked);
}

/// A run ends as it began, so this takes another one.
async fn repair(stage: &Stage) {
    let request = v1::AbortRotationRequest {
        environment: ENVIRONMENT.to_owned(),
        name: NAME.to_owned(),
        ..Default::default()
    };
    stage.rotations().await.abort_rotation(request).await.unwrap();
    let rotation = stage.settle().await;
    assert_eq!(rotation.history[0].ending, "aborted", "{rotation:?}");
    stage.set_with("repair = true").await;
    let step = stage.rotate().await;
    assert_eq!(step.result, "rotated", "{step:?}");
    stage.pair.lets_in(&login(&stage.current().await)).expect("AWSCURRENT logs in again");
    // The other user's turn.
    assert_eq!(stage.rotate().await.result, "rotated");
    stage.assert_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r25_a_value_that_a_person_writes_meanwhile_stays() {
    let server = Postgres::start();
    let mut proxy = Proxy::before(port(&server)).await;
    let stage = Stage::raise(&server, Plan::default().through(proxy.port)).await;
    let oracle = Oracle::watch(&stage);
    proxy.next(Fault::Keep);
    let token = stage.begin(false).await.reaches("set").await;
    proxy.struck().await;
    let login = login(&stage.current().await);
    let theirs = serde_json::json!({
        "username": login.username, "password": login.password, "note": "written by hand"
    });
    stage.put(NAME, &theirs.to_string());
    let written = stage.current().await.version_id;
    assert_eq!(proxy.release().await, Answer::Committed);
    let rotation = stage.settle().await;
    let ended = &rotation.history[0];
    assert_eq!((ended.ending.as_str(), &ended.version_id), ("superseded", &token), "{rotation:?}");
    let labels = stage.labels().await;
    assert_eq!(labels["AWSCURRENT"], written, "theirs stays");
    let kept = labels.iter().any(|(label, version)| label.starts_with("given-up-") && *version == token);
    assert!(kept, "what the target holds is kept: {labels:?}");
    assert_eq!(stage.rotate().await.result, "rotated");
    stage.assert_sound().await;
    oracle.stop().assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn r25_what_a_person_rolled_back_to_is_not_changed_by_a_run_that_is_on_its_way() {
    let server = Postgres::start();
    let mut proxy = Proxy::before(port(&server)).await;
    // A step is waited for no longer than a second.
    let stage = Stage::raise(&server, Plan::to_be_killed().through(proxy.port)).await;
    let mut oracle = Oracle::watch(&stage);
    assert_eq!(stage.rotate().await.result, "rotated");
    let labels = stage.labels().await;
    oracle.saw(&labels["AWSCURRENT"]);
    proxy.next(Fault::Keep);
    let token = stage.begin(false).await.reaches("set").await;
    proxy.struck().await;
    // The change that is on its way is of the very user that this leads back to.
    oracle.may_go_back();
    stage.roll_back(&labels["AWSPREVIOUS"], &labels["AWSCURRENT"]).await;
    let rotation = stage.settle().await;
    let ended = &rotation.history[0];
    assert_eq!((ended.ending.as_str(), &ended.version_id), ("superseded", &token), "{rotation:?}");
    assert_eq!(proxy.release().await, Answer::Refused("CLV01".to_owned()), "it came too late");
    assert_eq!(stage.labels().await["AWSCURRENT"], labels["AWSPREVIOUS"]);
    stage.assert_sound().await;
    oracle.stop().assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn r25_what_a_person_rolled_back_to_while_the_run_changed_it_is_set_again() {
    let server = Postgres::start();
    let mut proxy = Proxy::before(port(&server)).await;
    let stage = Stage::raise(&server, Plan::default().through(proxy.port)).await;
    assert_eq!(stage.rotate().await.result, "rotated");
    let labels = stage.labels().await;
    proxy.next(Fault::Keep);
    let token = stage.begin(false).await.reaches("set").await;
    proxy.struck().await;
    stage.roll_back(&labels["AWSPREVIOUS"], &labels["AWSCURRENT"]).await;
    assert_eq!(proxy.release().await, Answer::Committed, "it was in time for the change");
    is_made_good(&stage, &token, &labels["AWSPREVIOUS"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r25_what_a_person_rolled_back_to_after_the_change_is_set_again() {
    let server = Postgres::start();
    let mut proxy = Proxy::before(port(&server)).await;
    let stage = Stage::raise(&server, Plan::default().through(proxy.port)).await;
    assert_eq!(stage.rotate().await.result, "rotated");
    let labels = stage.labels().await;
    let there = login(&stage.version(&labels["AWSPREVIOUS"]).await);
    stage.pair.lets_in(&there).expect("nobody has changed it yet");
    // The target is away with the answer, so that the run rests.
    proxy.next(Fault::LoseAnswerAndClose);
    let token = stage.begin(false).await.reaches("set").await;
    proxy.struck().await;
    stage.meets("target_unavailable").await;
    assert!(stage.pair.lets_in(&there).is_err(), "it was committed");
    stage.roll_back(&labels["AWSPREVIOUS"], &labels["AWSCURRENT"]).await;
    proxy.open();
    is_made_good(&stage, &token, &labels["AWSPREVIOUS"]).await;
}

/// The run gives up, and the version that a person chose instead logs in again, though the run had set another password
/// in its place.
async fn is_made_good(stage: &Stage, token: &str, chosen: &str) {
    let rotation = stage.settle().await;
    let ended = &rotation.history[0];
    assert_eq!((ended.ending.as_str(), ended.version_id.as_str()), ("superseded", token), "{rotation:?}");
    assert_eq!(stage.labels().await["AWSCURRENT"], chosen, "theirs stays");
    stage.pair.lets_in(&login(&stage.current().await)).expect("AWSCURRENT logs in again");
    let records = ["audit", "query", "--action", "rotate", "--limit", "1000", "--output", "json"];
    let records = stage.program().ok(records);
    assert!(records.contains("rotate.restore"), "it is on record: {records}");
    stage.assert_sound().await;
    // Each of the two has its turn.
    for _ in 0..2 {
        assert_eq!(stage.rotate().await.result, "rotated");
        stage.assert_sound().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn r27_readers_and_watchers_hear_of_a_rotation_at_once() {
    let server = Postgres::start();
    let stage = Stage::raise(&server, Plan::default()).await;
    let request = v1::WatchSecretsRequest {
        environment: ENVIRONMENT.to_owned(),
        names: vec![NAME.to_owned()],
        consumer: "r27".to_owned(),
        with_values: true,
        ..Default::default()
    };
    let mut told = stage.secrets().await.watch_secrets(request).await.unwrap().into_inner();
    let mut expected = stage.current().await.version_id;
    for _ in 0..5 {
        let changed = loop {
            let event = tokio::time::timeout(HUNG, told.message()).await.expect("hung: a watch");
            if let Some(Event::Changed(changed)) = event.unwrap().expect("it goes on").event {
                break changed.secret.unwrap();
            }
        };
        assert_eq!(changed.version_id, expected, "each version once, in order");
        stage.pair.lets_in(&login(&changed)).expect("what is told logs in");
        // In the cache, until it is not true any more.
        assert_eq!(stage.current().await.version_id, expected);
        let step = stage.rotate().await;
        assert_eq!(step.result, "rotated", "{step:?}");
        expected = stage.current().await.version_id;
        assert_eq!(expected, step.version_id, "no reader gets the old one from the cache");
    }
}
