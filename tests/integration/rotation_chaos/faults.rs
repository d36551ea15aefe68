//! What is not the broker's death: it is stopped, the network loses things, the target, the store or the disk's space
//! is away for a while.

use std::io::Write as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use claviger::proto::v1;
use rustix::process::Signal;
use tonic_types::StatusExt as _;

use super::database::{failed_logins, port};
use super::oracle::Oracle;
use super::proxy::{Answer, Fault, Proxy};
use super::stage::{ENVIRONMENT, NAME, Plan, Stage};
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
    let disk = SmallDisk::mount(&folder.path().join("data"), "16m");
    let plan = Plan { below: Some(folder.path().to_owned()), ..Plan::to_be_killed() };
    let stage = Stage::raise(&server, plan).await;
    let oracle = Oracle::watch(&stage);
    // Full before it begins: nothing is answered, and the target is not touched without a value that is kept.
    stage.old_enough().await;
    let before = stage.pair.verifiers(&server);
    let ballast = disk.fill();
    stage.ask().await.await.expect("it only asks");
    assert_eq!(stage.pair.verifiers(&server), before, "the target is left alone");
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
            environment: ENVIRONMENT.to_owned(),
            name: NAME.to_owned(),
            ..Default::default()
        };
        stage.rotations().await.get_rotation(request).await.ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r7_a_run_that_has_begun_comes_to_its_end_though_the_audit_log_is_full() {
    const LAST: &str = "rotate.withdraw";
    let server = Postgres::start();
    let mut proxy = Proxy::before(port(&server)).await;
    let folder = tempfile::tempdir().unwrap();
    // Nothing else is on this disk, so that nothing but the log can fail.
    let disk = SmallDisk::mount(&folder.path().join("data/audit"), "4m");
    let plan = Plan { below: Some(folder.path().to_owned()), ..Plan::default() };
    let stage = Stage::raise(&server, plan.through(proxy.port)).await;
    let oracle = Oracle::watch(&stage);
    let of_one_run = disk.records(LAST);
    assert!(of_one_run > 0, "the last that a run puts on record");
    proxy.next(Fault::Keep);
    let mut steps = stage.begin(false).await;
    let token = steps.reaches("set").await;
    proxy.struck().await;
    let ballast = disk.fill();
    // What is set aside is for the run alone.
    until("reads are refused", async || is_refused(&stage).await.then_some(())).await;
    assert_eq!(proxy.release().await, Answer::Committed);
    until("it comes to its end", async || (disk.records(LAST) == 2 * of_one_run).then_some(())).await;
    steps.drain().await;
    std::fs::remove_file(ballast).unwrap();
    answers_again(&stage).await;
    stage.assert_resumed(&token).await;
    let rotation = stage.status().await;
    assert_eq!(rotation.history[0].failures, 0, "at one go: {rotation:?}");
    let verified = stage.program().ok(["audit", "verify"]);
    assert!(verified.contains("whole") && !verified.contains("finding:"), "{verified}");
    oracle.stop().assert_clean();
}

/// Whether a read is refused because it can't be put on record.
async fn is_refused(stage: &Stage) -> bool {
    let request = v1::GetSecretRequest {
        environment: ENVIRONMENT.to_owned(),
        name: NAME.to_owned(),
        ..Default::default()
    };
    let answer = stage.secrets().await.get_secret(request).await;
    answer.is_err_and(|status| {
        let reason = status.get_details_error_info().map(|info| info.reason);
        assert_eq!(reason.as_deref(), Some("AUDIT_UNAVAILABLE"), "{status:?}");
        true
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_takes_the_engines_grants_away_stops_the_next_run_and_not_this_one() {
    let server = Postgres::start();
    let mut proxy = Proxy::before(port(&server)).await;
    let stage = Stage::raise(&server, Plan::default().through(proxy.port)).await;
    let oracle = Oracle::watch(&stage);
    proxy.next(Fault::Keep);
    let mut steps = stage.begin(false).await;
    let token = steps.reaches("set").await;
    proxy.struck().await;
    let policy = stage.folder().join("policies/zz.cedar");
    let forbids = r#"@id("zz") forbid (principal in Group::"rotation-engine", action, resource);"#;
    std::fs::write(&policy, forbids).unwrap();
    stage.program().ok(["policy", "reload"]);
    assert_eq!(proxy.release().await, Answer::Committed);
    let step = steps.end().await;
    assert_eq!((step.result.as_str(), step.version_id.as_str()), ("rotated", token.as_str()), "{step:?}");
    stage.assert_resumed(&token).await;
    let before = stage.pair.verifiers(&server);
    let step = stage.begin(false).await.end().await;
    assert!(["blocked", "unfinished"].contains(&step.result.as_str()), "{step:?}");
    assert_eq!(stage.pair.verifiers(&server), before, "the target is left alone");
    std::fs::remove_file(policy).unwrap();
    stage.program().ok(["policy", "reload"]);
    stage.resume();
    assert_eq!(stage.settle().await.history[0].ending, "rotated");
    stage.assert_sound().await;
    oracle.stop().assert_clean();
}

/// A small disk of its own; gone with the value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path, size: &str) -> Self {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(at).unwrap();
        let options = ["-t", "tmpfs", "-o", &format!("size={size},mode=0700"), "tmpfs"];
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

    /// How many records of an operation there are in the log that is on it.
    fn records(&self, operation: &str) -> usize {
        let instances = std::fs::read_dir(&self.0).unwrap().flatten().map(|entry| entry.path());
        let folders = instances.filter(|path| path.is_dir());
        let files = folders.flat_map(|folder| std::fs::read_dir(folder).unwrap().flatten());
        let segments = files.filter(|file| file.path().extension().is_some_and(|kind| kind == "jsonl"));
        let wanted = format!("\"operation\":\"{operation}\"");
        let count =
            |path: PathBuf| String::from_utf8_lossy(&std::fs::read(path).unwrap()).matches(&wanted).count();
        segments.map(|segment| count(segment.path())).sum()
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
    // Nor can anything be read. A move whose outcome is not known makes the cache forget what it moved from: where that
    // came after the last read, there is nothing to serve, so there is a read in between, and once more.
    let mut served = false;
    for _ in 0..20 {
        aws.set(Mode::Unavailable);
        // The second try from here on has seen nothing of the time before.
        let tried = stage.status().await.run.expect("it rests").attempt;
        until("it is tried again", async || (stage.status().await.run?.attempt >= tried + 2).then_some(()))
            .await;
        served = stage.serves().await;
        if served {
            break;
        }
        aws.set_for("UpdateSecretVersionStage", Mode::Unavailable);
        oracle.logs_in(1);
    }
    assert!(served, "what is cached is served while the store is away");
    oracle.logs_in(20);
    assert_eq!(stage.current().await.version_id, before);
    aws.set(Mode::Pass);
    stage.assert_resumed(&token).await;
    oracle.saw(&token);
    oracle.stop().assert_clean();
}
