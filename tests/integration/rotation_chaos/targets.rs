//! Something is wrong with the target itself. The run says what it is, leaves AWSCURRENT alone, makes no storm of logins,
//! and comes to its end as the same run once somebody has mended it.

use super::database::{failed_logins, port};
use super::oracle::Oracle;
use super::proxy::{Fault, Proxy};
use super::stage::{Plan, Stage, login};
use super::until;
use crate::support::postgresql::Postgres;

/// How often a run is tried while a fault lasts, at least.
const ATTEMPTS: u32 = 2;

/// Something that is wrong, and how it is mended.
struct Wrong<'a> {
    /// The row of the table of faults.
    row: &'a str,
    /// What the run says.
    trouble: &'a str,
    disturb: &'a dyn Fn(),
    mend: &'a dyn Fn(),
}

#[tokio::test(flavor = "multi_thread")]
async fn r15_r20_r21_r22_what_is_wrong_with_the_target_is_said_and_mended() {
    let server = Postgres::start();
    let standby = server.standby();
    let plan = Plan { endpoints: vec![port(&standby)], ..Plan::default() };
    let stage = Stage::raise(&server, plan).await;
    let (pair, admin) = (&stage.pair, &stage.pair.admin.username);
    let in_pair = |sql: &str| drop(server.sql_in(&pair.database, sql));
    for wrong in [
        Wrong {
            row: "R15",
            trouble: "privilege_missing",
            disturb: &|| drop(server.sql(&format!("ALTER ROLE {admin} NOCREATEROLE"))),
            mend: &|| drop(server.sql(&format!("ALTER ROLE {admin} CREATEROLE"))),
        },
        Wrong {
            row: "R20",
            trouble: "grant_drift",
            disturb: &|| {
                let user = &pair.users[0];
                in_pair(&format!(
                    "CREATE TABLE public.extra (id int); GRANT SELECT ON public.extra TO {user}"
                ));
            },
            mend: &|| in_pair("DROP TABLE public.extra"),
        },
        Wrong {
            row: "R21",
            trouble: "standby_behind",
            disturb: &|| {
                standby.sql("SELECT pg_wal_replay_pause()");
                standby.wait_for("SELECT pg_get_wal_replay_pause_state() = 'paused'");
            },
            mend: &|| drop(standby.sql("SELECT pg_wal_replay_resume()")),
        },
        Wrong {
            row: "R22",
            trouble: "unverifiable",
            disturb: &|| server.access(&["host all all all trust"]),
            mend: &|| server.access(&[]),
        },
    ] {
        is_said_and_mended(&server, &stage, &wrong).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn r13_another_cluster_behind_the_same_address_is_left_alone() {
    let server = Postgres::start();
    let other = Postgres::start();
    let proxy = Proxy::before(port(&server)).await;
    let stage = Stage::raise(&server, Plan::default().through(proxy.port)).await;
    // It would let everyone in, and take every change.
    stage.pair.double(&server, &other);
    let before = stage.pair.verifiers(&other);
    let oracle = Oracle::watch(&stage);
    let wrong = Wrong {
        row: "R13",
        trouble: "wrong_target",
        disturb: &|| proxy.lead_to(port(&other)),
        mend: &|| proxy.lead_to(port(&server)),
    };
    is_said_and_mended(&server, &stage, &wrong).await;
    assert_eq!(stage.pair.verifiers(&other), before, "nothing was changed there");
    assert_eq!(failed_logins(&other), 0, "{}", other.log());
    oracle.stop().assert_clean();
}

async fn is_said_and_mended(server: &Postgres, stage: &Stage, wrong: &Wrong<'_>) {
    let Wrong { row, trouble, disturb, mend } = wrong;
    let before = stage.current().await;
    let failed = failed_logins(server);
    disturb();
    let step = stage.begin(false).await.end().await;
    assert!(["blocked", "unfinished"].contains(&step.result.as_str()), "{row}: {step:?}");
    let token = stage.meets(trouble).await.version_id;
    // It is tried again by itself, and says the same.
    let run =
        until("it is tried again", async || stage.status().await.run.filter(|run| run.attempt >= ATTEMPTS))
            .await;
    let said = run.trouble.expect("why it is not at its end");
    assert_eq!(said.code, *trouble, "{row}: {said:?}");
    assert!(!said.mend.is_empty(), "{row}: {said:?}");
    let current = stage.current().await;
    assert_eq!(current.version_id, before.version_id, "{row}");
    stage.pair.lets_in(&login(&current)).unwrap_or_else(|why| panic!("{row}: {why}"));
    mend();
    stage.resume();
    stage.assert_resumed(&token).await;
    // At most one for each time that it was taken up: whether the target has the pending value already.
    let tried = stage.status().await.history[0].failures as usize + 1;
    let failed = failed_logins(server) - failed;
    assert!(failed <= tried, "{row}: {failed} failed logins in {tried} attempts:\n{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn r14_a_value_that_the_target_refuses_is_replaced_by_another() {
    let server = Postgres::start();
    let mut proxy = Proxy::before(port(&server)).await;
    let stage = Stage::raise(&server, Plan::default().through(proxy.port)).await;
    let oracle = Oracle::watch(&stage);
    let before = stage.current().await.version_id;
    proxy.next(Fault::Refuse);
    let mut steps = stage.begin(true).await;
    let refused = steps.reaches("set").await;
    assert_eq!(proxy.struck().await, Fault::Refuse);
    let step = steps.end().await;
    assert_eq!(step.result, "rotated", "{step:?}");
    assert_ne!(step.version_id, refused, "another value");
    let labels = stage.labels().await;
    assert_eq!((&labels["AWSCURRENT"], &labels["AWSPREVIOUS"]), (&step.version_id, &before));
    stage.settle().await;
    stage.assert_sound().await;
    let account = oracle.stop();
    account.assert_clean();
    // Before another one is tried, the target is asked whether it has taken this one all the same.
    assert!(failed_logins(&server) as u64 <= account.late + 1, "{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn r14_where_every_value_is_refused_a_person_is_needed_and_nothing_is_lost() {
    const REFUSALS: usize = 14;
    const MOST_GIVEN_UP: usize = 8;
    let server = Postgres::start();
    let mut proxy = Proxy::before(port(&server)).await;
    let stage = Stage::raise(&server, Plan::default().through(proxy.port)).await;
    let oracle = Oracle::watch(&stage);
    let before = stage.labels().await;
    let verifiers = stage.pair.verifiers(&server);
    proxy.always(Some(Fault::Refuse));
    let step = stage.begin(false).await.end().await;
    assert_eq!(step.result, "blocked", "{step:?}");
    assert_eq!(step.trouble.expect("why").code, "value_refused");
    // However often somebody has it tried again.
    for _ in 0..REFUSALS {
        stage.resume();
        proxy.struck().await;
    }
    stage.meets("value_refused").await;
    let labels = stage.labels().await;
    for label in ["AWSCURRENT", "AWSPREVIOUS"] {
        assert_eq!(labels[label], before[label], "{label}");
        let kept = login(&stage.version(&labels[label]).await);
        stage.pair.lets_in(&kept).unwrap_or_else(|why| panic!("{label}: {why}"));
    }
    assert_eq!(stage.pair.verifiers(&server), verifiers, "the target is as it was");
    let given_up = labels.keys().filter(|label| label.starts_with("given-up-")).count();
    assert!((1..=MOST_GIVEN_UP).contains(&given_up), "{labels:?}");
    proxy.always(None);
    stage.resume();
    let rotation = stage.settle().await;
    assert_eq!(rotation.history[0].ending, "rotated", "{rotation:?}");
    stage.assert_sound().await;
    oracle.stop().assert_clean();
}
