//! The clock of the machine is set by a year, forwards and back: the real binary under libfaketime.

use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;

use super::oracle::Oracle;
use super::stage::{Plan, Stage};
use super::until;
use crate::support::postgresql::Postgres;

/// A clock for a process, off by as much as is said.
struct Clock(tempfile::TempDir);

impl Clock {
    fn right() -> Self {
        let clock = Self(tempfile::tempdir().unwrap());
        clock.set("+0d");
        clock
    }

    /// Sets it, also for a process that runs.
    fn set(&self, off_by: &str) {
        let fresh = self.0.path().join("fresh");
        std::fs::write(&fresh, off_by).unwrap();
        std::fs::rename(fresh, self.file()).unwrap();
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("time")
    }

    /// What a process needs to believe it. Monotonic time stays what it is, as it does on a machine.
    fn variables(&self) -> Vec<(String, String)> {
        let library = library().display().to_string();
        let file = self.file().display().to_string();
        [
            ("LD_PRELOAD", library.as_str()),
            ("FAKETIME_TIMESTAMP_FILE", file.as_str()),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ("NO_FAKE_STAT", "1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
    }
}

fn library() -> PathBuf {
    let below = std::fs::read_dir("/usr/lib").unwrap().flatten();
    let mut found = below.map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"));
    found.find(|path| path.exists()).expect("the Debian package `libfaketime`; `bash tests/run` installs it")
}

#[tokio::test(flavor = "multi_thread")]
async fn r31_a_clock_set_by_a_year_either_way_rotates_nothing_and_stops_nobody() {
    const HOUR: i64 = 3_600;
    let server = Postgres::start();
    let clock = Clock::right();
    let plan = Plan { schedule: "every 1h", variables: clock.variables(), ..Plan::default() };
    let mut stage = Stage::raise(&server, plan).await;
    let oracle = Oracle::watch(&stage);
    let mut made = 1;
    let mut version = stage.current().await.version_id;
    for off_by in ["+365d", "+0d", "-365d", "+0d"] {
        let said = steps_said(&stage);
        clock.set(off_by);
        until("the step is noticed", async || (steps_said(&stage) > said).then_some(())).await;
        a_few_looks().await;
        assert_eq!(stage.current().await.version_id, version, "{off_by}");
        assert_eq!(stage.status().await.history.len(), made, "{off_by}");
    }
    // A person is not held up by that.
    version = by_hand(&stage, &mut made).await;
    // Not even a broker that starts with the wrong clock takes everything for due at once.
    stage.kill();
    clock.set("+365d");
    stage.start();
    a_few_looks().await;
    assert_eq!(stage.current().await.version_id, version);
    // What was rotated then has its next time in a year, until the clock is right again.
    by_hand(&stage, &mut made).await;
    stage.kill();
    clock.set("+0d");
    stage.start();
    until("its next time is within the hour", async || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let now = i64::try_from(now.as_secs()).unwrap();
        let next = stage.status().await.next_at?.seconds;
        (now..=now + 2 * HOUR).contains(&next).then_some(())
    })
    .await;
    assert_eq!(stage.status().await.history.len(), made, "nothing was rotated for it");
    by_hand(&stage, &mut made).await;
    stage.assert_sound().await;
    oracle.stop().assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn r31_a_clock_set_by_a_year_in_the_middle_of_a_run_does_not_strand_it() {
    /// Who sees to it that the run is taken up again.
    enum By {
        Nobody,
        Person,
        Restart,
    }
    let mut server = Postgres::start();
    let clock = Clock::right();
    let plan = Plan { variables: clock.variables(), ..Plan::to_be_killed() };
    let mut stage = Stage::raise(&server, plan).await;
    let oracle = Oracle::watch(&stage);
    for (off_by, by) in [("-365d", By::Nobody), ("+365d", By::Person), ("+365d", By::Restart)] {
        stage.old_enough().await;
        server.stop(Signal::INT);
        let step = stage.begin(false).await.end().await;
        assert_eq!(step.result, "unfinished", "{step:?}");
        let token = stage.meets("target_unavailable").await.version_id;
        set_and_noticed(&stage, &clock, off_by).await;
        let attempt = stage.status().await.run.expect("it rests").attempt;
        if off_by.starts_with('+') {
            // Then it is told to wait by the wrong clock.
            until("it is tried again", async || (stage.status().await.run?.attempt > attempt).then_some(()))
                .await;
        } else {
            a_few_looks().await;
        }
        set_and_noticed(&stage, &clock, "+0d").await;
        assert_eq!(stage.status().await.run.expect("it goes on").version_id, token, "{off_by}");
        server.restart();
        match by {
            By::Nobody => {}
            By::Person => stage.resume(),
            By::Restart => {
                stage.kill();
                stage.start();
            }
        }
        stage.assert_resumed(&token).await;
    }
    oracle.stop().assert_no_lockout();
}

async fn set_and_noticed(stage: &Stage, clock: &Clock, off_by: &str) {
    let said = steps_said(stage);
    clock.set(off_by);
    until("the step is noticed", async || (steps_said(stage) > said).then_some(())).await;
}

/// Rotates, and gives the version.
async fn by_hand(stage: &Stage, made: &mut usize) -> String {
    let step = stage.rotate().await;
    assert_eq!(step.result, "rotated", "{step:?}");
    *made += 1;
    let rotation = stage.status().await;
    assert_eq!(rotation.history.len(), *made, "{rotation:?}");
    step.version_id
}

/// How often the broker has said that the clock was set.
fn steps_said(stage: &Stage) -> usize {
    stage.program().log().matches("the clock was set").count()
}

/// Long enough for the scheduler to have looked: once a second. Time is what is waited for.
async fn a_few_looks() {
    tokio::time::sleep(Duration::from_secs(3)).await;
}
