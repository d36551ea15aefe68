//! What is not the broker's death: it is stopped, the network loses things, the target, the store or the disk's space
//! is away for a while.

use std::io::Write as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use claviger::proto::v1;
use rustix::process::Signal;

use super::database::{failed_logins, port};
use super::oracle::Oracle;
use super::proxy::{Fault, Proxy};
use super::stage::{Plan, Stage};
use super::until;
use crate::support::moto::{FaultProxy, Mode, Moto};
use crate::support::postgresql::Postgres;

#[tokio::test(flavor = "multi_thread")]
async fn r4_stopped_for_longer_than_its_lease_the_broker_goes_on_without_harm() {
    let server = Postgres::start();
    // Its lease is 2 s.
    let stage = Stage::raise(&server, Plan::to_be_killed()).await;
    let oracle = Oracle::watch(&stage);
    for phase in ["create", "set", "test", "finish"] {
        let mut steps = stage.begin(false).await;
        let token = steps.reaches(phase).await;
        stage.signal(Signal::STOP);
        // Time is what is waited for.
        tokio::time::sleep(Duration::from_secs(3)).await;
        stage.signal(Signal::CONT);
        stage.assert_resumed(&token).await;
    }
    oracle.stop().assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn r7_a_full_disk_stops_a_rotation_where_it_can_go_on() {
    let server = Postgres::start();
    let folder = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(&folder.path().join("data"));
    let plan = Plan { below: Some(folder.path().to_owned()), ..Plan::to_be_killed() };
    let stage = Stage::raise(&server, plan).await;
    let oracle = Oracle::watch(&stage);
    // Full before it begins: nothing is answered, and the target is not touched without a value that is kept.
    let ballast = disk.fill();
    stage.old_enough().await;
    stage.ask().await.await.expect("it only asks");
    std::fs::remove_file(ballast).unwrap();
    answers_again(&stage).await;
    stage.settle().await;
    stage.assert_sound().await;
    // Full when it has begun.
    for phase in ["create", "set", "test", "finish"] {
        let mut steps = stage.begin(false).await;
        let token = steps.reaches(phase).await;
        let ballast = disk.fill();
        steps.drain().await;
        std::fs::remove_file(ballast).unwrap();
        answers_again(&stage).await;
        stage.assert_resumed(&token).await;
    }
    let account = oracle.stop();
    account.assert_no_lockout();
    assert_eq!(account.unreachable, 0, "{account:?}");
}

/// The log has found its space again.
async fn answers_again(stage: &Stage) {
    until("the broker answers again", async || {
        let request = v1::GetRotationRequest {
            environment: super::stage::ENVIRONMENT.to_owned(),
            name: super::stage::NAME.to_owned(),
            ..Default::default()
        };
        stage.rotations().await.get_rotation(request).await.ok()
    })
    .await;
}

/// A small disk of its own; gone with the value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path) -> Self {
        std::fs::DirBuilder::new().mode(0o700).create(at).unwrap();
        let options = ["-t", "tmpfs", "-o", "size=16m,mode=0700", "tmpfs"];
        let status = Command::new("mount").args(options).arg(at).status().unwrap();
        assert!(status.success(), "mounting a tmpfs takes root");
        Self(at.to_owned())
    }

    /// Takes every free page.
    fn fill(&self) -> PathBuf {
        let ballast = self.0.join("ballast");
        let mut file = std::fs::File::create(&ballast).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        ballast
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn r10_a_change_that_never_arrives_is_made_again() {
    let server = Postgres::start();
    let mut proxy = Proxy::before(port(&server)).await;
    let stage = Stage::raise(&server, Plan::default().through(proxy.port)).await;
    let oracle = Oracle::watch(&stage);
    let before = stage.pair.verifiers(&server);
    proxy.next(Fault::LoseRequest);
    let token = stage.begin(false).await.reaches("set").await;
    assert_eq!(proxy.struck().await, Fault::LoseRequest);
    stage.assert_resumed(&token).await;
    assert_ne!(stage.pair.verifiers(&server), before);
    oracle.stop().assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn r11_a_change_whose_answer_is_lost_is_found_and_not_made_again() {
    let server = Postgres::start();
    let mut proxy = Proxy::before(port(&server)).await;
    let stage = Stage::raise(&server, Plan::default().through(proxy.port)).await;
    let oracle = Oracle::watch(&stage);
    for _ in 0..5 {
        proxy.next(Fault::LoseAnswer);
        let token = stage.begin(false).await.reaches("set").await;
        assert_eq!(proxy.struck().await, Fault::LoseAnswer);
        let committed = stage.pair.verifiers(&server);
        stage.assert_resumed(&token).await;
        assert_eq!(stage.pair.verifiers(&server), committed, "a value set again has another salt");
    }
    oracle.stop().assert_clean();
    assert_eq!(failed_logins(&server), 0, "the target was asked, and it accepted");
}

#[tokio::test(flavor = "multi_thread")]
async fn r12_while_the_target_is_away_the_phase_is_kept_and_current_is_served() {
    let mut server = Postgres::start();
    let stage = Stage::raise(&server, Plan::default()).await;
    let oracle = Oracle::watch(&stage);
    let before = stage.current().await.version_id;
    stage.old_enough().await;
    server.stop(Signal::INT);
    let step = stage.begin(false).await.end().await;
    assert_eq!(step.result, "unfinished", "{step:?}");
    let run = stage.meets("target_unavailable").await;
    assert_eq!(run.phase, "create", "the target is asked before it is touched");
    // Away for so long that somebody should hear of it.
    until("it is said to be degraded", async || {
        let rotation = stage.status().await;
        (rotation.health() == v1::RotationHealth::Degraded).then_some(())
    })
    .await;
    assert_eq!(stage.current().await.version_id, before, "AWSCURRENT is served");
    server.restart();
    stage.assert_resumed(&run.version_id).await;
    // Away in the middle of it.
    for phase in ["set", "test", "finish"] {
        let mut steps = stage.begin(false).await;
        let token = steps.reaches(phase).await;
        server.stop(Signal::INT);
        steps.drain().await;
        server.restart();
        stage.assert_resumed(&token).await;
    }
    let account = oracle.stop();
    account.assert_no_lockout();
    // At most one for each run that was taken up again.
    assert!(failed_logins(&server) as u64 <= account.late + 4, "a storm of failed logins:\n{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn r26_while_the_store_is_away_after_the_change_current_goes_on_to_log_in() {
    let server = Postgres::start();
    let aws = FaultProxy::start(Moto::start().await.endpoint()).await;
    let stage = Stage::raise(&server, Plan::default().in_aws(aws.endpoint())).await;
    let mut oracle = Oracle::watch(&stage);
    let before = stage.current().await.version_id;
    // The target has the new password, and the label can't move.
    aws.set_for("UpdateSecretVersionStage", Mode::Unavailable);
    let token = stage.begin(false).await.reaches("finish").await;
    stage.meets("store_unavailable").await;
    // Nor can anything be read.
    aws.set(Mode::Unavailable);
    oracle.logs_in(20);
    assert_eq!(stage.current().await.version_id, before);
    aws.set(Mode::Pass);
    stage.assert_resumed(&token).await;
    oracle.saw(&token);
    oracle.stop().assert_clean();
}
