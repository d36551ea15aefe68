//! The PostgreSQL rotator against real servers: what it makes of each fault of a server, or of the way to it.

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use claviger::rotation::Trouble;
use claviger::rotation::machine::Probe;
use claviger::rotation::rotators::{ENTRIES, Rotator, SetOutcome, TestOutcome, Work};
use claviger::secret::{SecretId, SecretValue};
use jiff::Timestamp;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustix::process::Signal;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::support::certificates::{self, Authority, Days, Issued};
use crate::support::postgresql::{Options, Postgres, poll};

const HUNG: Duration = Duration::from_secs(60);
/// In everything that is said to an admin's session, only a change of roles has it.
const CHANGE: &[u8] = b"DO LANGUAGE plpgsql";

/// What a fence of the secret `prod:database` looks like.
fn fence(number: u64) -> String {
    format!("[claviger fence {number} of d4e9d6ed4830b775]")
}

/// A server on which all is as it should be: the owner, what it owns, the admin and the first of the two users.
fn prepare(server: &Postgres) {
    server.sql(
        "CREATE ROLE claviger_admin LOGIN CREATEROLE PASSWORD 'admin-password';
         CREATE ROLE shop_owner NOLOGIN;
         CREATE ROLE shop_a LOGIN PASSWORD 'first-password' IN ROLE shop_owner;
         ALTER ROLE shop_a SET role TO shop_owner;
         COMMENT ON ROLE shop_a IS 'the shop';
         CREATE DATABASE shop OWNER shop_owner;",
    );
    server.sql_in(
        "shop",
        "SET ROLE shop_owner; CREATE TABLE goods (id int, price int); CREATE SEQUENCE numbers;
         CREATE FUNCTION total() RETURNS int LANGUAGE sql AS 'SELECT 1';
         RESET ROLE; CREATE TABLE stock (id int, price int); CREATE SEQUENCE tickets; CREATE SCHEMA annex;
         CREATE FUNCTION taxes() RETURNS int LANGUAGE sql AS 'SELECT 1';",
    );
}

fn prepared(options: &Options<'_>) -> Postgres {
    let server = Postgres::with(options);
    prepare(&server);
    server
}

/// A rotator of these hosts; `change` is laid over the usual settings.
fn rotator(hosts: &[String], change: &Value) -> Arc<dyn Rotator> {
    let mut settings = json!({
        "hosts": hosts,
        "database": "shop",
        "users": ["shop_a", "shop_b"],
        "owner": "shop_owner",
        "admin": "database-admin",
        "tls": "disable",
    });
    for (key, value) in change.as_object().unwrap() {
        settings[key] = value.clone();
    }
    settings.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    let entry = ENTRIES.iter().find(|entry| entry.kind == "postgresql-alternating").unwrap();
    (entry.build)(settings.as_object().unwrap()).unwrap()
}

fn secret(name: &str) -> SecretId {
    SecretId::parse("prod", name).unwrap()
}

fn login(username: &str, password: &str) -> SecretValue {
    SecretValue::text(json!({"username": username, "password": password}).to_string()).unwrap()
}

/// A rotator with what a run gives it.
struct Run {
    id: SecretId,
    rotator: Arc<dyn Rotator>,
    current: SecretValue,
    pending: SecretValue,
    admin: SecretValue,
    fence: u64,
    fingerprint: Option<String>,
}

impl Run {
    /// From the first user to the second one.
    fn of(rotator: Arc<dyn Rotator>) -> Self {
        let current = login("shop_a", "first-password");
        let pending = rotator.create(&current, Timestamp::UNIX_EPOCH, 0).unwrap();
        let admin = login("claviger_admin", "admin-password");
        Self { id: secret("database"), rotator, current, pending, admin, fence: 1, fingerprint: None }
    }

    fn on(server: &Postgres) -> Self {
        Self::of(rotator(&[server.place()], &json!({})))
    }

    /// The same run by another owner, with another value.
    fn with(&self, fence: u64, pending: SecretValue) -> Self {
        Self {
            id: self.id.clone(),
            rotator: Arc::clone(&self.rotator),
            current: self.current.clone(),
            pending,
            admin: self.admin.clone(),
            fence,
            fingerprint: self.fingerprint.clone(),
        }
    }

    fn work(&self) -> Work<'_> {
        Work {
            id: &self.id,
            current: &self.current,
            pending: &self.pending,
            admin: Some(&self.admin),
            fence: self.fence,
            fingerprint: self.fingerprint.as_deref(),
        }
    }

    fn pending_password(&self) -> String {
        let value: Value = serde_json::from_slice(self.pending.expose()).unwrap();
        value["password"].as_str().unwrap().to_owned()
    }

    async fn set(&self) -> Result<SetOutcome, Trouble> {
        soon(self.rotator.set(&self.work())).await.map_err(|failure| self.harmless(failure))
    }

    async fn bar(&self) -> Result<(), Trouble> {
        soon(self.rotator.bar(&self.work())).await.map_err(|failure| self.harmless(failure))
    }

    async fn retire(&self) -> Result<(), Trouble> {
        soon(self.rotator.retire(&self.work())).await.map_err(|failure| self.harmless(failure))
    }

    async fn test(&self) -> Result<TestOutcome, Trouble> {
        soon(self.rotator.test(&self.work())).await.map_err(|failure| self.harmless(failure))
    }

    /// What a test finds different, in words.
    async fn drift(&self) -> String {
        let failure = soon(self.rotator.test(&self.work())).await.unwrap_err();
        assert_eq!(failure.trouble, Trouble::GrantDrift, "{failure}");
        failure.message
    }

    async fn probe(&self, value: &SecretValue) -> Probe {
        let probed = soon(self.rotator.probe(&self.work(), value)).await;
        assert!(!probed.why.contains(&self.pending_password()), "{}", probed.why);
        probed.probe
    }

    async fn probe_current(&self) -> Probe {
        self.probe(&self.current).await
    }

    async fn probe_pending(&self) -> Probe {
        self.probe(&self.pending).await
    }

    /// A failure's class; its text holds no value.
    fn harmless(&self, failure: claviger::rotation::Failure) -> Trouble {
        for secret in [self.pending_password().as_str(), "admin-password", "first-password", "SCRAM-SHA-256$"]
        {
            assert!(!failure.message.contains(secret), "{failure}");
        }
        println!("{}: {}", failure.trouble, failure.message);
        failure.trouble
    }

    /// The run is over: what was pending is current, and the next value is made.
    fn finish(&mut self) {
        self.current = self.pending.clone();
        self.pending = self.rotator.create(&self.current, Timestamp::UNIX_EPOCH, 0).unwrap();
        self.fence += 1;
    }
}

async fn soon<T>(work: impl Future<Output = T>) -> T {
    timeout(HUNG, work).await.expect("an answer")
}

fn remark(server: &Postgres, role: &str) -> String {
    server.sql(&format!("SELECT shobj_description(oid, 'pg_authid') FROM pg_roles WHERE rolname = '{role}'"))
}

#[tokio::test]
async fn the_users_take_turns_and_the_current_one_always_works() {
    let server = prepared(&Options { settings: &[("log_statement", "all")], ..Options::default() });
    let mut run = Run::on(&server);
    run.fingerprint = soon(run.rotator.identify(&run.work())).await.unwrap();
    assert_eq!(
        run.fingerprint.clone().unwrap(),
        server.sql("SELECT system_identifier FROM pg_control_system()")
    );
    let mut passwords = Vec::new();
    for _ in 0..5 {
        passwords.push(run.pending_password());
        run.rotator.check(&run.current, &run.pending).unwrap();
        assert_eq!(run.probe_current().await, Probe::Accepted);
        assert_eq!(run.set().await, Ok(SetOutcome::Done));
        assert_eq!(run.probe_current().await, Probe::Accepted);
        assert_eq!(run.test().await, Ok(TestOutcome::Passed));
        assert_eq!(run.probe_pending().await, Probe::Accepted);
        run.finish();
    }
    assert_eq!(remark(&server, "shop_a"), format!("the shop {}", fence(5)));
    assert_eq!(remark(&server, "shop_b"), fence(5));
    let log = server.log();
    assert!(log.contains("SCRAM-SHA-256$4096:"), "statements are logged");
    assert!(!log.contains("authentication failed"), "no failing login on the way:\n{log}");
    for password in passwords {
        assert!(!log.contains(&password), "a password is in the server's log");
    }
}

#[tokio::test]
async fn names_of_any_kind_are_quoted() {
    let server = Postgres::start();
    let (a, b, owner) = (r#"we"ird'%I\x $claviger$ a"#, r#"we"ird'%I\x $claviger$ b"#, r#"o"w'n\er; --"#);
    let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let (role_a, role_owner) = (quoted(a), quoted(owner));
    server.sql(&format!(
        "CREATE ROLE claviger_admin LOGIN CREATEROLE PASSWORD 'admin-password';
         CREATE ROLE {role_owner} NOLOGIN;
         CREATE ROLE {role_a} LOGIN PASSWORD 'first-password' IN ROLE {role_owner};
         ALTER ROLE {role_a} SET role TO {role_owner};
         COMMENT ON ROLE {role_a} IS 'it''s \\ % [claviger fence]';"
    ));
    let change = json!({"users": [a, b], "owner": owner, "database": "postgres"});
    let rotator = rotator(&[server.place()], &change);
    let current = login(a, "first-password");
    let pending = rotator.create(&current, Timestamp::UNIX_EPOCH, 0).unwrap();
    let admin = login("claviger_admin", "admin-password");
    let fence_before = u64::MAX - 2;
    let id = secret("database");
    let mut run = Run { id, rotator, current, pending, admin, fence: fence_before, fingerprint: None };
    for _ in 0..2 {
        assert_eq!(run.set().await, Ok(SetOutcome::Done));
        assert_eq!(run.set().await, Ok(SetOutcome::Done));
        assert_eq!(run.test().await, Ok(TestOutcome::Passed));
        run.finish();
    }
    let remarks = server.sql(
        "SELECT shobj_description(oid, 'pg_authid') FROM pg_roles WHERE rolname LIKE 'we%' ORDER BY rolname",
    );
    let fence = fence(u64::MAX - 1);
    assert_eq!(remarks, format!("it's \\ % [claviger fence] {fence}\n{fence}"));
}

/// Sits between the rotator and a server, hears what is said to it, and cuts.
struct Between {
    place: String,
    heard: Arc<Mutex<Vec<u8>>>,
    cut: Arc<Mutex<Cut>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    Never,
    /// The change does not reach the server.
    Before,
    /// The server made the change; its answer does not come.
    After,
}

impl Between {
    async fn new(address: &str, server: &Postgres) -> Self {
        let listener = TcpListener::bind((address, 0)).await.unwrap();
        let place = listener.local_addr().unwrap().to_string();
        let (heard, cut) = (Arc::default(), Arc::new(Mutex::new(Cut::Never)));
        let between = Self { place, heard: Arc::clone(&heard), cut: Arc::clone(&cut) };
        let server = server.place();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&server).await.unwrap();
                tokio::spawn(relay(client, server, Arc::clone(&heard), Arc::clone(&cut)));
            }
        });
        between
    }

    fn cut(&self, cut: Cut) {
        *self.cut.lock().unwrap() = cut;
    }

    fn heard(&self) -> Vec<u8> {
        self.heard.lock().unwrap().clone()
    }
}

fn has(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

async fn relay(
    mut client: TcpStream,
    mut server: TcpStream,
    heard: Arc<Mutex<Vec<u8>>>,
    cut: Arc<Mutex<Cut>>,
) {
    let (mut asked, mut answered) = (vec![0; 65_536], vec![0; 65_536]);
    let mut drops_answer = false;
    loop {
        tokio::select! {
            read = client.read(&mut asked) => {
                let Ok(count @ 1..) = read else { return };
                heard.lock().unwrap().extend_from_slice(&asked[..count]);
                if has(&asked[..count], CHANGE) {
                    let cut = *cut.lock().unwrap();
                    match cut {
                        Cut::Never => {}
                        Cut::Before => return,
                        Cut::After => drops_answer = true,
                    }
                }
                if server.write_all(&asked[..count]).await.is_err() {
                    return;
                }
            }
            read = server.read(&mut answered) => {
                let Ok(count @ 1..) = read else { return };
                if drops_answer || client.write_all(&answered[..count]).await.is_err() {
                    return;
                }
            }
        }
    }
}

#[tokio::test]
async fn r10_a_change_that_did_not_arrive_is_told_and_made_again() {
    let server = prepared(&Options::default());
    let between = Between::new("127.0.0.1", &server).await;
    let run = Run::of(rotator(std::slice::from_ref(&between.place), &json!({})));
    between.cut(Cut::Before);
    assert_eq!(run.set().await, Err(Trouble::Unanswered));
    assert_eq!(run.probe_pending().await, Probe::Rejected);
    assert_eq!(run.probe_current().await, Probe::Accepted);
    between.cut(Cut::Never);
    assert_eq!(run.set().await, Ok(SetOutcome::Done));
    assert_eq!(run.test().await, Ok(TestOutcome::Passed));
}

#[tokio::test]
async fn r11_a_change_whose_answer_is_lost_is_found_made() {
    let server = prepared(&Options::default());
    let between = Between::new("127.0.0.1", &server).await;
    let run = Run::of(rotator(std::slice::from_ref(&between.place), &json!({})));
    between.cut(Cut::After);
    assert_eq!(run.set().await, Err(Trouble::Unanswered));
    between.cut(Cut::Never);
    assert_eq!(run.probe_pending().await, Probe::Accepted);
    assert_eq!(run.probe_current().await, Probe::Accepted);
    assert_eq!(run.test().await, Ok(TestOutcome::Passed));
    assert!(!has(&between.heard(), run.pending_password().as_bytes()));
}

#[tokio::test]
async fn r12_a_target_that_is_down_or_hangs_tells_nothing() {
    let mut server = prepared(&Options::default());
    let run = Run::on(&server);
    server.freeze();
    assert_eq!(run.probe_current().await, Probe::Unknown);
    server.thaw();
    assert_eq!(run.set().await, Ok(SetOutcome::Done));
    server.stop(Signal::QUIT);
    assert_eq!(run.probe_pending().await, Probe::Unknown);
    assert_eq!(run.set().await, Err(Trouble::TargetUnavailable));
    assert_eq!(run.test().await, Err(Trouble::TargetUnavailable));
    server.restart();
    assert_eq!(run.probe_pending().await, Probe::Accepted);
    assert_eq!(run.test().await, Ok(TestOutcome::Passed));
}

#[tokio::test]
async fn r13_another_cluster_with_the_same_roles_is_left_alone() {
    let (server, other) = (prepared(&Options::default()), prepared(&Options::default()));
    let mut run = Run::on(&server);
    run.fingerprint = soon(run.rotator.identify(&run.work())).await.unwrap();
    let mut astray = Run::on(&other);
    astray.fingerprint.clone_from(&run.fingerprint);
    assert_eq!(astray.set().await, Err(Trouble::WrongTarget));
    assert_eq!(astray.bar().await, Err(Trouble::WrongTarget));
    assert_eq!(astray.test().await, Err(Trouble::WrongTarget));
    // It would reject this one, which means nothing.
    assert_eq!(astray.probe_pending().await, Probe::Unknown);
    assert_eq!(astray.probe_current().await, Probe::Unknown);
    assert_eq!(other.sql("SELECT count(*) FROM pg_roles WHERE rolname = 'shop_b'"), "0");
    assert_eq!(remark(&other, "shop_a"), "the shop");
    let pinned = json!({"system_identifier": run.fingerprint.clone().unwrap()});
    assert_eq!(Run::of(rotator(&[other.place()], &pinned)).set().await, Err(Trouble::WrongTarget));
    assert_eq!(Run::of(rotator(&[server.place()], &pinned)).set().await, Ok(SetOutcome::Done));
    // An endpoint that belongs to another cluster does not pass for one of this.
    other.sql("CREATE ROLE shop_b LOGIN IN ROLE shop_owner; ALTER ROLE shop_b SET role TO shop_owner");
    let run = Run::of(rotator(&[server.place()], &json!({"endpoints": [other.place()]})));
    assert_eq!(run.set().await, Ok(SetOutcome::Done));
    other.sql(&format!("ALTER ROLE shop_b PASSWORD '{}'", run.pending_password()));
    assert_eq!(run.test().await, Err(Trouble::WrongTarget));
}

#[tokio::test]
async fn r14_a_password_that_the_server_refuses_is_said_to_be_refused() {
    let checks = Options { settings: &[("shared_preload_libraries", "passwordcheck")], ..Options::default() };
    let server = prepared(&checks);
    // Of a verifier, the module can tell one thing: that the password is the user's name.
    let run = Run::on(&server).with(1, login("shop_b", "shop_b"));
    assert!(matches!(run.set().await, Ok(SetOutcome::Refused(_))));
    assert_eq!(run.bar().await, Ok(()));
    assert_eq!(soon(run.rotator.probe(&run.work(), &run.pending)).await.probe, Probe::Rejected);
    assert_eq!(run.probe_current().await, Probe::Accepted);
    let next = run.rotator.create(&run.current, Timestamp::UNIX_EPOCH, 1).unwrap();
    assert_eq!(run.with(2, next).set().await, Ok(SetOutcome::Done));
}

#[tokio::test]
async fn r15_a_missing_privilege_is_said_and_leaks_nothing() {
    let server = prepared(&Options { settings: &[("log_statement", "all")], ..Options::default() });
    server.sql("ALTER ROLE claviger_admin NOCREATEROLE");
    let run = Run::on(&server);
    assert_eq!(run.set().await, Err(Trouble::PrivilegeMissing));
    assert_eq!(run.bar().await, Err(Trouble::PrivilegeMissing));
    assert_eq!(run.retire().await, Err(Trouble::PrivilegeMissing));
    let log = server.log();
    assert!(log.contains("permission denied") && !log.contains(&run.pending_password()), "{log}");
    server.sql("ALTER ROLE claviger_admin CREATEROLE");
    assert_eq!(run.set().await, Ok(SetOutcome::Done));
}

#[tokio::test]
async fn r15_roles_that_must_not_be_rotated_are_refused() {
    let server = prepared(&Options::default());
    let run = Run::on(&server);
    server.sql("ALTER ROLE claviger_admin PASSWORD 'other'");
    assert_eq!(run.set().await, Err(Trouble::AdminRejected));
    // Without an admin a login that succeeds still says something, and one that fails nothing.
    assert_eq!(run.probe_current().await, Probe::Accepted);
    assert_eq!(run.probe_pending().await, Probe::Unknown);
    server.sql("ALTER ROLE claviger_admin PASSWORD 'admin-password'");
    server.sql("CREATE ROLE shop_b SUPERUSER");
    assert_eq!(run.set().await, Err(Trouble::ValueUnfit));
    server.sql("ALTER ROLE shop_b NOSUPERUSER VALID UNTIL '2001-01-01'");
    assert_eq!(run.set().await, Err(Trouble::ValueUnfit));
    server.sql("ALTER ROLE shop_b VALID UNTIL 'infinity'");
    let own = Run { admin: login("shop_a", "first-password"), ..run.with(1, run.pending.clone()) };
    assert_eq!(own.set().await, Err(Trouble::ValueUnfit));
    let missing = Run::of(rotator(&[server.place()], &json!({"owner": "nobody"})));
    assert_eq!(missing.set().await, Err(Trouble::ValueUnfit));
    let database = Run::of(rotator(&[server.place()], &json!({"database": "none_such"})));
    assert_eq!(database.set().await, Err(Trouble::ValueUnfit));
    assert_eq!(server.sql("SELECT rolcanlogin FROM pg_roles WHERE rolname = 'shop_b'"), "f");
}

#[tokio::test]
async fn r15_r21_standbys_are_passed_over_and_waited_for() {
    let server = prepared(&Options::default());
    let standby = server.standby();
    let change = json!({"endpoints": [standby.place()], "propagation": "2s"});
    let mut run = Run::of(rotator(&[standby.place(), server.place()], &change));
    let only_standby = Run::of(rotator(&[standby.place()], &json!({})));
    assert_eq!(only_standby.set().await, Err(Trouble::TargetReadOnly));
    assert_eq!(only_standby.probe_pending().await, Probe::Unknown);
    assert_eq!(run.set().await, Ok(SetOutcome::Done));
    let patient =
        Run::of(rotator(&[standby.place(), server.place()], &json!({"endpoints": [standby.place()]})));
    assert_eq!(patient.with(1, run.pending.clone()).test().await, Ok(TestOutcome::Passed));
    run.finish();

    standby.sql("SELECT pg_wal_replay_pause()");
    standby.wait_for("SELECT pg_get_wal_replay_pause_state() = 'paused'");
    assert_eq!(run.set().await, Ok(SetOutcome::Done));
    assert_eq!(run.test().await, Err(Trouble::StandbyBehind));
    assert_eq!(run.probe_pending().await, Probe::Accepted);
    standby.sql("SELECT pg_wal_replay_resume()");
    let end = server.sql("SELECT pg_current_wal_lsn()");
    standby.wait_for(&format!("SELECT pg_last_wal_replay_lsn() >= '{end}'"));
    assert_eq!(run.test().await, Ok(TestOutcome::Passed));
    drop(standby);
    assert_eq!(run.test().await, Err(Trouble::TargetUnavailable));
}

#[tokio::test]
async fn r20_a_role_made_half_is_completed() {
    let server = prepared(&Options::default());
    for half in [
        "CREATE ROLE shop_b",
        "CREATE ROLE shop_b LOGIN PASSWORD 'half'",
        "CREATE ROLE shop_b IN ROLE shop_owner",
        "CREATE ROLE shop_b; ALTER ROLE shop_b SET role TO shop_owner",
    ] {
        server.sql(half);
        let run = Run::on(&server);
        assert_eq!(run.set().await, Ok(SetOutcome::Done), "{half}");
        assert_eq!(run.test().await, Ok(TestOutcome::Passed), "{half}");
        server.sql("DROP ROLE shop_b");
    }
}

#[tokio::test]
async fn r20_what_one_user_may_and_the_other_may_not_is_named() {
    let server = prepared(&Options::default());
    let run = Run::on(&server);
    assert_eq!(run.set().await, Ok(SetOutcome::Done));
    for (change, back, named) in [
        (
            "GRANT SELECT ON stock TO shop_a",
            "REVOKE SELECT ON stock FROM shop_a",
            "SELECT on table public.stock",
        ),
        (
            "GRANT UPDATE (price) ON stock TO shop_b",
            "REVOKE UPDATE (price) ON stock FROM shop_b",
            "UPDATE on column public.stock.price",
        ),
        (
            "GRANT USAGE ON SEQUENCE tickets TO shop_b",
            "REVOKE USAGE ON SEQUENCE tickets FROM shop_b",
            "USAGE on sequence public.tickets",
        ),
        (
            "GRANT CREATE ON SCHEMA annex TO shop_a",
            "REVOKE CREATE ON SCHEMA annex FROM shop_a",
            "CREATE on schema annex",
        ),
        (
            "REVOKE EXECUTE ON FUNCTION taxes() FROM PUBLIC; GRANT EXECUTE ON FUNCTION taxes() TO shop_a",
            "GRANT EXECUTE ON FUNCTION taxes() TO shop_b, PUBLIC",
            "EXECUTE on function public.taxes()",
        ),
        (
            "GRANT CREATE ON DATABASE postgres TO shop_a WITH GRANT OPTION",
            "REVOKE CREATE ON DATABASE postgres FROM shop_a",
            "CREATE WITH GRANT OPTION on database postgres",
        ),
        ("GRANT pg_monitor TO shop_b", "REVOKE pg_monitor FROM shop_b", "membership of pg_monitor"),
        ("ALTER ROLE shop_a CONNECTION LIMIT 3", "ALTER ROLE shop_a CONNECTION LIMIT -1", "rolconnlimit"),
        (
            "ALTER ROLE shop_a SET work_mem TO '8MB'",
            "ALTER ROLE shop_a RESET work_mem",
            "the setting work_mem",
        ),
        (
            "ALTER DEFAULT PRIVILEGES FOR ROLE shop_owner GRANT SELECT ON TABLES TO shop_a",
            "ALTER DEFAULT PRIVILEGES FOR ROLE shop_owner REVOKE SELECT ON TABLES FROM shop_a",
            "default SELECT on new tables of shop_owner",
        ),
        ("CREATE POLICY p ON goods TO shop_a", "DROP POLICY p ON goods", "the row policy p on public.goods"),
        (
            "ALTER TABLE goods OWNER TO shop_a",
            "ALTER TABLE goods OWNER TO shop_owner",
            "REASSIGN OWNED BY \"shop_a\"",
        ),
        (
            "ALTER ROLE shop_a RESET role",
            "ALTER ROLE shop_a SET role TO shop_owner",
            "\"shop_b\" alone has the setting role",
        ),
        (
            "ALTER ROLE shop_b RESET role",
            "ALTER ROLE shop_b SET role TO shop_owner",
            "ALTER ROLE \"shop_b\" SET role TO \"shop_owner\"",
        ),
    ] {
        server.sql_in("shop", change);
        let drift = run.drift().await;
        assert!(drift.contains(named), "{change}: {drift}");
        server.sql_in("shop", back);
        assert_eq!(run.test().await, Ok(TestOutcome::Passed), "{back}");
    }
    // What the other one has by another way is no difference.
    server.sql_in("shop", "GRANT SELECT ON goods TO shop_a; GRANT ALL ON goods TO shop_owner");
    assert_eq!(run.test().await, Ok(TestOutcome::Passed));
    // A setting may be a secret.
    server.sql("ALTER ROLE shop_a SET app.key TO 'canary-5f3a'");
    let drift = run.drift().await;
    assert!(drift.contains("app.key") && !drift.contains("canary"), "{drift}");
}

#[tokio::test]
async fn r22_a_login_that_proves_nothing_is_unverifiable() {
    let server = prepared(&Options::default());
    let run = Run::on(&server);
    assert_eq!(run.set().await, Ok(SetOutcome::Done));
    for (access, expected) in [
        ("host all shop_b all trust", Probe::Unverifiable),
        ("host all shop_b all password", Probe::Unverifiable),
        // It asks for SCRAM where the verifier is one.
        ("host all shop_b all md5", Probe::Accepted),
        ("host all shop_b all scram-sha-256", Probe::Accepted),
        // It has nothing to do with the password.
        ("host all shop_b all reject", Probe::Unknown),
        ("hostssl all shop_b all scram-sha-256\nhost all shop_b all reject", Probe::Unknown),
        // Nobody at all is asked.
        ("host all all all trust", Probe::Unverifiable),
    ] {
        server.access(&[access]);
        assert_eq!(run.probe_pending().await, expected, "{access}");
        if expected == Probe::Unverifiable {
            assert_eq!(run.test().await, Err(Trouble::Unverifiable), "{access}");
        }
    }
    server.access(&["host all shop_b all md5"]);
    server.sql("SET password_encryption = 'md5'; ALTER ROLE shop_b PASSWORD 'weak'");
    assert_eq!(run.probe(&login("shop_b", "weak")).await, Probe::Unverifiable);
    let everyone = ["host all all all trust"];
    server.access(&everyone);
    assert_eq!(run.set().await, Err(Trouble::Unverifiable));
}

#[tokio::test]
async fn what_a_server_says_to_a_login_is_told_apart() {
    let server = prepared(&Options::default());
    let run = Run::on(&server);
    assert_eq!(run.probe_current().await, Probe::Accepted);
    assert_eq!(run.probe(&login("shop_a", "wrong")).await, Probe::Rejected);
    assert_eq!(run.probe(&login("nobody", "wrong")).await, Probe::Rejected);
    server.sql("ALTER ROLE shop_a NOLOGIN");
    assert_eq!(run.probe_current().await, Probe::Rejected);
    server.sql("ALTER ROLE shop_a LOGIN CONNECTION LIMIT 0");
    assert_eq!(run.probe_current().await, Probe::Unknown);
    server.sql("ALTER ROLE shop_a CONNECTION LIMIT -1 VALID UNTIL '2001-01-01'");
    assert_eq!(run.probe_current().await, Probe::Rejected);
    server.sql("ALTER ROLE shop_a VALID UNTIL 'infinity'");
    // The admin may connect, the user may not: the password is right all the same.
    server
        .sql("REVOKE CONNECT ON DATABASE shop FROM PUBLIC; GRANT CONNECT ON DATABASE shop TO claviger_admin");
    server.sql("REVOKE shop_owner FROM shop_a");
    assert_eq!(run.probe_current().await, Probe::Accepted);
}

/// A probe of a server that shows this certificate, on the way over `between`.
async fn probe_over_tls(between: &Between, ca_file: &std::path::Path) -> Probe {
    let change = json!({"tls": "verify-full", "ca_file": ca_file});
    let run = Run::of(rotator(std::slice::from_ref(&between.place), &change));
    let probe = run.probe_current().await;
    let heard = between.heard();
    // An SSLRequest (PostgreSQL documentation, "SSLRequest"), and then TLS or nothing.
    assert_eq!(heard[..8], [0, 0, 0, 8, 4, 210, 22, 47]);
    assert!(heard.len() == 8 || heard[8] == 22, "a TLS record of type handshake");
    for secret in ["shop_a", "claviger_admin", "first-password", "admin-password"] {
        assert!(!has(&heard, secret.as_bytes()), "{secret} went over the wire in the clear");
    }
    assert_eq!(run.rotator.set(&run.work()).await.is_ok(), probe == Probe::Accepted);
    probe
}

#[tokio::test]
async fn r23_a_wrong_certificate_is_no_answer_and_nothing_is_said_in_the_clear() {
    const OVER: Option<Days> = Some(((2020, 1, 1), (2021, 1, 1)));
    let folder = tempfile::tempdir().unwrap();
    let (authority, stranger) = (Authority::new("the authority"), Authority::new("a stranger"));
    let (ca_file, strangers) = (folder.path().join("ca.pem"), folder.path().join("stranger.pem"));
    std::fs::write(&ca_file, authority.pem()).unwrap();
    std::fs::write(&strangers, stranger.pem()).unwrap();

    let (good, expired) = (authority.server(), authority.server_valid(OVER));
    let server = prepared(&Options { certificate: Some(&good), ..Options::default() });
    let right = Between::new("127.0.0.1", &server).await;
    assert_eq!(probe_over_tls(&right, &ca_file).await, Probe::Accepted);
    let unknown = Between::new("127.0.0.1", &server).await;
    assert_eq!(probe_over_tls(&unknown, &strangers).await, Probe::Unknown);
    let misnamed = Between::new("127.0.0.2", &server).await;
    assert_eq!(probe_over_tls(&misnamed, &ca_file).await, Probe::Unknown);
    let unreadable = Between::new("127.0.0.1", &server).await;
    assert_eq!(probe_over_tls(&unreadable, &folder.path().join("none.pem")).await, Probe::Unknown);

    let over = prepared(&Options { certificate: Some(&expired), ..Options::default() });
    let expired = Between::new("127.0.0.1", &over).await;
    assert_eq!(probe_over_tls(&expired, &ca_file).await, Probe::Unknown);

    let plain = prepared(&Options::default());
    let without = Between::new("127.0.0.1", &plain).await;
    assert_eq!(probe_over_tls(&without, &ca_file).await, Probe::Unknown);
    assert!(without.heard().chunks(8).all(|request| request == [0, 0, 0, 8, 4, 210, 22, 47]));
}

/// What can log in nobody, but is a verifier, of which the server says how many iterations it has.
fn verifier(iterations: u32) -> String {
    let key = format!("{}=", "A".repeat(43));
    format!("SCRAM-SHA-256${iterations}:AAAAAAAAAAAAAAAAAAAAAA==${key}:{key}")
}

#[tokio::test]
async fn r22_no_proof_is_sent_for_a_hash_that_is_too_cheap() {
    let server = prepared(&Options::default());
    let run = Run::on(&server);
    server.sql(&format!("ALTER ROLE shop_a PASSWORD '{}'", verifier(4_095)));
    let probed = soon(run.rotator.probe(&run.work(), &run.current)).await;
    assert_eq!(probed.probe, Probe::Unverifiable);
    assert!(probed.why.contains("4095 iterations") && probed.why.contains("anew"), "{}", probed.why);
    server.sql(&format!("ALTER ROLE shop_a PASSWORD '{}'", verifier(4_096)));
    assert_eq!(run.probe_current().await, Probe::Rejected);
    server.sql(&format!("ALTER ROLE claviger_admin PASSWORD '{}'", verifier(1)));
    assert_eq!(run.set().await, Err(Trouble::Unverifiable));
    assert_eq!(server.sql("SELECT count(*) FROM pg_roles WHERE rolname = 'shop_b'"), "0");
}

/// What a host does that has a right certificate for its name but is not the database's.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rogue {
    PassesOn,
    /// It takes out the offer to bind the login to the certificate.
    Strips,
}

/// Ends TLS with a certificate of its own, and passes on to the real server, over TLS, what it hears.
async fn rogue(authority: &Authority, server: &Postgres, kind: Rogue) -> String {
    let own = authority.server();
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(own.certificate.as_bytes()).collect();
    let key = PrivateKeyDer::from_pem_slice(own.key.as_bytes()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain.unwrap(), key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let mut trusting = (*certificates::client(authority, None)).clone();
    trusting.alpn_protocols.clear();
    let connector = TlsConnector::from(Arc::new(trusting));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (place, server) = (listener.local_addr().unwrap().to_string(), server.place());
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let (acceptor, connector, server) = (acceptor.clone(), connector.clone(), server.clone());
            let passed_on = async move {
                let mut request = [0; 8];
                client.read_exact(&mut request).await?;
                client.write_all(b"S").await?;
                let client = acceptor.accept(client).await?;
                let mut real = TcpStream::connect(server).await?;
                real.write_all(&request).await?;
                assert_eq!(real.read_u8().await?, b'S');
                let real = connector.connect(ServerName::try_from("127.0.0.1").unwrap(), real).await?;
                pass_on(client, real, kind).await
            };
            tokio::spawn(passed_on);
        }
    });
    place
}

async fn pass_on(
    mut client: impl AsyncRead + AsyncWrite + Unpin,
    mut real: impl AsyncRead + AsyncWrite + Unpin,
    kind: Rogue,
) -> std::io::Result<()> {
    // AuthenticationSASL with one mechanism.
    const STRIPPED: &[u8] = b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0";
    let mut buffer = vec![0; 65_536];
    let count = client.read(&mut buffer).await?;
    real.write_all(&buffer[..count]).await?;
    real.flush().await?;
    let count = real.read(&mut buffer).await?;
    assert!(has(&buffer[..count], b"SCRAM-SHA-256-PLUS\0"), "the real server offers to bind the login");
    let offer = if kind == Rogue::Strips { STRIPPED } else { &buffer[..count] };
    client.write_all(offer).await?;
    client.flush().await?;
    tokio::io::copy_bidirectional(&mut client, &mut real).await.map(drop)
}

#[tokio::test]
async fn r23_a_login_can_not_be_passed_on_to_the_real_server() {
    let folder = tempfile::tempdir().unwrap();
    let (authority, ca_file) = (Authority::new("the authority"), folder.path().join("ca.pem"));
    std::fs::write(&ca_file, authority.pem()).unwrap();
    let certificate = authority.server();
    let server = prepared(&Options { certificate: Some(&certificate), ..Options::default() });
    let tls = json!({"tls": "verify-full", "ca_file": ca_file});
    for (kind, said) in
        [(Rogue::PassesOn, "channel binding check failed"), (Rogue::Strips, "binding negotiation error")]
    {
        let run = Run::of(rotator(&[rogue(&authority, &server, kind).await], &tls));
        assert_eq!(run.set().await, Err(Trouble::Unverifiable));
        assert_eq!(run.probe_current().await, Probe::Unverifiable);
        assert!(server.log().contains(said), "{said}");
    }
    assert_eq!(remark(&server, "shop_a"), "the shop");
    let direct = Run::of(rotator(&[server.place()], &tls));
    assert_eq!(direct.set().await, Ok(SetOutcome::Done));
    assert_eq!(direct.test().await, Ok(TestOutcome::Passed));
}

/// A certificate for this machine, signed with such a key, and its authority's.
fn signed_with(kind: &'static rcgen::SignatureAlgorithm) -> (Issued, String) {
    let mut root = CertificateParams::default();
    root.distinguished_name.push(rcgen::DnType::CommonName, "an authority");
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(root, KeyPair::generate_for(kind).unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf =
        CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &*issuer).unwrap();
    (Issued { certificate: leaf.pem(), key: key.serialize_pem() }, issuer.pem())
}

#[tokio::test]
async fn r23_a_login_is_bound_to_certificates_of_each_kind_or_not_made() {
    for (kind, expected) in [
        (&rcgen::PKCS_ECDSA_P384_SHA384, Probe::Accepted),
        // No hash is defined for it, and the server would take neither "y" nor, safely, "n".
        (&rcgen::PKCS_ED25519, Probe::Unverifiable),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (certificate, authority) = signed_with(kind);
        let ca_file = folder.path().join("ca.pem");
        std::fs::write(&ca_file, authority).unwrap();
        let server = prepared(&Options { certificate: Some(&certificate), ..Options::default() });
        let run = Run::of(rotator(&[server.place()], &json!({"tls": "verify-full", "ca_file": ca_file})));
        assert_eq!(run.probe_current().await, expected);
        assert_eq!(run.set().await.is_ok(), expected == Probe::Accepted);
    }
}

#[tokio::test]
async fn where_two_hosts_take_writes_nothing_is_changed() {
    let server = prepared(&Options::default());
    let standby = server.standby();
    let hosts = [server.place(), standby.place()];
    let run = Run::of(rotator(&hosts, &json!({})));
    standby.sql("SELECT pg_promote()");
    standby.wait_for("SELECT NOT pg_is_in_recovery()");
    let failure = soon(run.rotator.set(&run.work())).await.unwrap_err();
    assert_eq!(failure.trouble, Trouble::TargetUnavailable);
    assert!(hosts.iter().all(|host| failure.message.contains(host)), "{failure}");
    assert_eq!(run.probe_current().await, Probe::Unknown);
    for each in [&server, &standby] {
        assert_eq!(each.sql("SELECT count(*) FROM pg_roles WHERE rolname = 'shop_b'"), "0");
        assert_eq!(remark(each, "shop_a"), "the shop");
    }
    drop(standby);
    assert_eq!(run.set().await, Ok(SetOutcome::Done));
    // One server by two names is one.
    let other_name = server.place().replace("127.0.0.1", "localhost");
    let twice = Run::of(rotator(&[server.place(), other_name], &json!({})));
    assert_eq!(twice.with(2, run.pending.clone()).set().await, Ok(SetOutcome::Done));
}

#[tokio::test]
async fn a_host_that_says_nothing_does_not_hold_the_others_up() {
    let server = prepared(&Options::default());
    let between = Between::new("127.0.0.1", &server).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = listener.local_addr().unwrap().to_string();
    let heard = Arc::clone(&between.heard);
    // When the client gives up on it, the other one has been asked long since.
    let given_up = tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut said = Vec::new();
        let _ = client.read_to_end(&mut said).await;
        has(&heard.lock().unwrap(), b"pg_is_in_recovery")
    });
    let run = Run::of(rotator(&[silent, between.place.clone()], &json!({})));
    assert_eq!(run.set().await, Ok(SetOutcome::Done));
    assert!(soon(given_up).await.unwrap(), "one after the other");
}

#[tokio::test]
async fn r4_a_user_is_rotated_for_one_secret_alone() {
    let server = prepared(&Options::default());
    let run = Run::on(&server);
    // The mark of an earlier version has no owner.
    server.sql("COMMENT ON ROLE shop_a IS 'the shop [claviger fence 1]'");
    assert_eq!(run.set().await, Ok(SetOutcome::Done));
    assert_eq!(remark(&server, "shop_a"), format!("the shop {}", fence(1)));
    let other = Run { id: secret("another"), ..run.with(9, login("shop_b", "of-another-secret")) };
    assert_eq!(other.set().await, Err(Trouble::Fenced));
    assert_eq!(other.bar().await, Err(Trouble::Fenced));
    assert_eq!(other.retire().await, Err(Trouble::Fenced));
    let failure = soon(other.rotator.set(&other.work())).await.unwrap_err();
    for part in ["\"shop_a\"", "d4e9d6ed4830b775", "COMMENT ON ROLE \"shop_b\" IS NULL"] {
        assert!(failure.message.contains(part), "{failure}");
    }
    assert_eq!(remark(&server, "shop_b"), fence(1));
    assert_eq!(run.probe_pending().await, Probe::Accepted);
    server.sql("COMMENT ON ROLE shop_a IS NULL; COMMENT ON ROLE shop_b IS NULL");
    assert_eq!(other.set().await, Ok(SetOutcome::Done));
    assert_eq!(run.set().await, Err(Trouble::Fenced));
}

#[tokio::test]
async fn what_a_server_says_is_shown_without_what_turns_a_line() {
    let server = prepared(&Options::default());
    let foul = "sh\u{202e}op\u{2066}";
    server.sql(&format!(
        "CREATE DATABASE \"{foul}\"; REVOKE CONNECT ON DATABASE \"{foul}\" FROM PUBLIC;
         GRANT CONNECT ON DATABASE \"{foul}\" TO claviger_admin"
    ));
    let run = Run::of(rotator(&[server.place()], &json!({"database": foul})));
    let probed = soon(run.rotator.probe(&run.work(), &run.current)).await;
    assert_eq!(probed.probe, Probe::Accepted);
    assert!(probed.why.contains("permission denied"), "{}", probed.why);
    assert!(!probed.why.contains(['\u{202e}', '\u{2066}']), "{:?}", probed.why);
}

#[tokio::test]
async fn r4_a_lower_fence_is_refused_whenever_it_comes() {
    let server = prepared(&Options::default());
    let late = Run::on(&server).with(4, login("shop_b", "of-the-one-that-slept"));
    let run = late.with(5, login("shop_b", "of-the-one-that-woke"));
    assert_eq!(run.set().await, Ok(SetOutcome::Done));
    assert_eq!(late.set().await, Err(Trouble::Fenced));
    assert_eq!(late.bar().await, Err(Trouble::Fenced));
    assert_eq!(late.retire().await, Err(Trouble::Fenced));
    assert_eq!(run.probe_pending().await, Probe::Accepted);
    assert_eq!(late.probe_pending().await, Probe::Rejected);
    // A bar holds, also where the pending user was never made.
    assert_eq!(run.with(9, run.pending.clone()).bar().await, Ok(()));
    server.sql("DROP ROLE shop_b");
    assert_eq!(run.with(8, run.pending.clone()).set().await, Err(Trouble::Fenced));
    assert_eq!(server.sql("SELECT count(*) FROM pg_roles WHERE rolname = 'shop_b'"), "0");
    assert_eq!(remark(&server, "shop_a"), format!("the shop {}", fence(9)));
}

#[tokio::test]
async fn r4_of_two_changes_at_once_the_higher_fence_stays() {
    let server = prepared(&Options::default());
    let here = Run::on(&server);
    // An advisory lock does not reach from one database to another; the roles' rows do.
    let there = Run::of(rotator(&[server.place()], &json!({"database": "postgres"})));
    for round in 0..10 {
        let (low, high) = (10 * round + 4, 10 * round + 5);
        let low = here.with(low, login("shop_b", &format!("low-{round}")));
        let by = if round % 2 == 0 { &here } else { &there };
        let high = by.with(high, login("shop_b", &format!("high-{round}")));
        let (first, second) = tokio::join!(low.set(), high.set());
        if second.is_err() {
            assert_eq!(second, Err(Trouble::TargetUnavailable), "it may wait in vain, but it is not fenced");
            assert_eq!(high.set().await, Ok(SetOutcome::Done));
        }
        if round % 2 == 0 {
            assert!(matches!(first, Ok(SetOutcome::Done) | Err(Trouble::Fenced)), "{first:?}");
        }
        assert_eq!(high.probe_pending().await, Probe::Accepted);
        assert_eq!(low.probe_pending().await, Probe::Rejected);
        assert_eq!(low.set().await, Err(Trouble::Fenced));
    }
}

#[tokio::test]
async fn r4_a_change_that_waits_for_a_lock_looks_at_the_fence_only_then() {
    let server = Arc::new(prepared(&Options::default()));
    let run = Run::on(&server);
    assert_eq!(run.set().await, Ok(SetOutcome::Done));
    // Someone else's change, which has raised the fence but is not committed before somebody waits for it.
    let holder = tokio::task::spawn_blocking({
        let server = Arc::clone(&server);
        move || {
            server.sql(
                "BEGIN; ALTER ROLE shop_a; COMMENT ON ROLE shop_a IS 'the shop [claviger fence 7]';
                 DO $$ BEGIN WHILE NOT EXISTS (SELECT FROM pg_locks WHERE NOT granted) LOOP
                   PERFORM pg_sleep(0.02); END LOOP; END $$;
                 COMMIT;",
            )
        }
    });
    server.wait_for(
        "SELECT count(*) > 0 FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'DO $$ BEGIN WHILE%'",
    );
    let late = run.with(6, login("shop_b", "too-late"));
    assert_eq!(late.set().await, Err(Trouble::TargetUnavailable));
    holder.await.unwrap();
    assert_eq!(late.set().await, Err(Trouble::Fenced));
    assert_eq!(run.probe_pending().await, Probe::Accepted);
    assert_eq!(remark(&server, "shop_a"), "the shop [claviger fence 7]");
}

#[tokio::test]
async fn r29_a_user_is_withdrawn_when_nobody_is_logged_in_as_it() {
    let server = prepared(&Options::default());
    let run = Run::on(&server);
    assert!(run.rotator.can_retire());
    assert_eq!(run.set().await, Ok(SetOutcome::Done));
    let open = server.session("shop", "shop_a", "first-password");
    assert_eq!(run.retire().await, Err(Trouble::StillInUse));
    assert_eq!(run.probe_current().await, Probe::Accepted);
    drop(open);
    poll("nobody is logged in", || {
        server.sql("SELECT count(*) FROM pg_stat_activity WHERE usename = 'shop_a'") == "0"
    });
    assert_eq!(run.retire().await, Ok(()));
    assert_eq!(run.retire().await, Ok(()));
    assert_eq!(run.probe_current().await, Probe::Rejected);
    assert_eq!(run.probe_pending().await, Probe::Accepted);
    // The next rotation takes the user up again.
    let mut next = run.with(2, run.pending.clone());
    next.finish();
    assert_eq!(next.set().await, Ok(SetOutcome::Done));
    assert_eq!(next.test().await, Ok(TestOutcome::Passed));
}
