//! Nothing breaks: two hundred rotations, and not one failed login.

use super::database::failed_logins;
use super::oracle::Oracle;
use super::stage::{ENVIRONMENT, NAME, Plan, Stage, login};
use crate::support::moto::Moto;
use crate::support::postgresql::Postgres;

const ROTATIONS: usize = 200;

#[tokio::test(flavor = "multi_thread")]
async fn the_oracle_sees_no_failed_login_over_200_rotations_on_the_embedded_store() {
    rotate_under_the_oracle(Plan::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_oracle_sees_no_failed_login_over_200_rotations_on_moto() {
    rotate_under_the_oracle(Plan::default().in_aws(Moto::start().await.endpoint())).await;
}

async fn rotate_under_the_oracle(plan: Plan) {
    let server = Postgres::start();
    let stage = Stage::raise(&server, plan).await;
    let mut oracle = Oracle::watch(&stage);
    let mut expected = vec![stage.current().await.version_id];
    for turn in 0..ROTATIONS {
        let step = stage.rotate().await;
        assert_eq!(step.result, "rotated", "rotation {turn}: {step:?}\n{}", stage.program().log());
        // R27: whoever reads after that gets the new version, cached or not.
        assert_eq!(stage.current().await.version_id, step.version_id, "rotation {turn}");
        let labels = stage.labels().await;
        assert_eq!(labels["AWSCURRENT"], step.version_id, "rotation {turn}");
        assert_eq!(Some(&labels["AWSPREVIOUS"]), expected.last(), "rotation {turn}");
        // Within the gap that lies before the next one anyway.
        oracle.saw(&step.version_id);
        expected.push(step.version_id);
    }
    let rotation = stage.settle().await;
    assert!(rotation.history.iter().all(|ended| ended.failures == 0), "{rotation:?}");
    stage.assert_sound().await;
    let account = oracle.stop();
    println!(
        "{} logins over {ROTATIONS} rotations, {} late, longest gap {} ms",
        account.logins, account.late, account.longest_gap
    );
    account.assert_clean();
    assert_eq!(account.reads_failed, 0, "{account:?}");
    assert_eq!(account.versions, expected, "each new version once, in order, and none besides");
    // The broker's own probes are among these.
    assert_eq!(failed_logins(&server) as u64, account.late, "the server turned no password down");
}

#[tokio::test(flavor = "multi_thread")]
async fn from_the_command_line_a_rotation_is_set_made_and_shown() {
    let server = Postgres::start();
    let stage = Stage::raise(&server, Plan::default()).await;
    let before = stage.current().await.version_id;
    // What was set is shown as what can be set.
    let file = stage.folder().join("rotation.toml");
    std::fs::write(&file, stage.status().await.definition).unwrap();
    let program = stage.program();
    program.ok(["rotation", "set", "-e", ENVIRONMENT, NAME, "--file", file.to_str().unwrap()]);
    super::until("the last rotation is old enough", async || {
        let output = program.run(["rotate", "-e", ENVIRONMENT, NAME]);
        // 6: too soon.
        assert!(matches!(output.status.code(), Some(0 | 6)), "{}", String::from_utf8_lossy(&output.stderr));
        output.status.success().then_some(())
    })
    .await;
    let current = stage.current().await;
    assert_ne!(current.version_id, before);
    stage.pair.lets_in(&login(&current)).expect("AWSCURRENT logs in");
    let status = program.ok(["rotation", "status", "-e", ENVIRONMENT, NAME, "--output", "json"]);
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
    assert_eq!(status["health"], "idle", "{status}");
}
