//! Rotations as the doors have them, and the broker's own clockwork, in this process: who may, who is first, and what
//! becomes of a run that is cut off. Rows R1 to R3, R5, R6, R9, R24 and R31 to R35 of the matrix in `tests/README.md`, as
//! far as they need no target. The values are in the embedded store; for the quotas of row R9, in AWS.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use claviger::broker::Call;
use claviger::clock::{Clock as _, ManualClock};
use claviger::config::Resolved;
use claviger::config::assembly::Running;
use claviger::crypto::{MacKey, RootKey};
use claviger::error::{Reason, Reasoned as _};
use claviger::kv::embedded::Embedded;
use claviger::kv::{Entry, Kv, KvError, LeaseId, Outcome, Page, Revision, Transaction, Watch};
use claviger::policy::PolicySource;
use claviger::rotation::Trouble;
use claviger::rotation::definition::Definition;
use claviger::rotation::engine::{Engine, Order, Over, Settings, Told, When};
use claviger::rotation::ledger::Ledger;
use claviger::rotation::machine::Ending;
use claviger::rotation::record::{Health, Rotation};
use claviger::rotation::schedule::next_at;
use claviger::rotation::scheduler::Scheduler;
use claviger::rotation::service::{Due, Rotations};
use claviger::secret::{EnvironmentName, Label, SecretId, VersionId};
use claviger::store::{Description, RecoveryWindow};
use futures_util::future::join_all;
use jiff::Timestamp;
use tempfile::TempDir;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;

use crate::support::assembled::{
    BrokerResult, administrator, clock, get, id, person, program, put, records, resolved, start,
};
use crate::support::moto::{FaultProxy, Mode, Moto, REGION};
use crate::support::program::{Program, Served, with_input};

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(86_400);
const YEAR: Duration = Duration::from_secs(365 * 86_400);
/// The environments' time to live with its stretch, and the definitions' grace.
const GAP: Duration = Duration::from_secs(330 + 60);

/// A broker, and rotations whose records are in a key-value store of their own, which fails when it is told to.
struct House {
    folder: TempDir,
    running: Running,
    clock: Arc<ManualClock>,
    kv: Arc<Faulty>,
    key: Arc<MacKey>,
    stop: watch::Sender<bool>,
    rotations: Rotations,
}

impl House {
    async fn start() -> Self {
        Self::under(|_| PolicySource::shipped()).await
    }

    /// The same, under the policies that `source` puts into its folder.
    async fn under(source: impl FnOnce(&Path) -> PolicySource) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = clock();
        let resolved = Resolved { policy: source(folder.path()), ..resolved(folder.path()) };
        let running = start(&resolved, clock.clone()).await.unwrap();
        let inner = Embedded::open(&folder.path().join("rotations.db"), clock.clone()).await.unwrap();
        let kv = Arc::new(Faulty::new(inner));
        let key = Arc::new(MacKey::create(&RootKey::generate().unwrap(), &[b"test"]).unwrap().0);
        let (stop, _) = watch::channel(false);
        let rotations = boot(&running, &kv, &key, &clock, &stop, "test");
        Self { folder, running, clock, kv, key, stop, rotations }
    }

    /// A broker's rotations after its start: of the same name as another, that one is dead.
    fn boot(&self, instance: &str) -> Rotations {
        boot(&self.running, &self.kv, &self.key, &self.clock, &self.stop, instance)
    }

    fn ledger(&self) -> &Arc<Ledger> {
        self.rotations.engine().ledger()
    }

    async fn put(&self, id: &SecretId, value: &str) {
        put(&self.running, id.clone(), value).await.unwrap();
    }

    /// A secret with a rotation.
    async fn set(&self, id: &SecretId, definition: &str) {
        self.put(id, "first").await;
        self.rotations.set(&administrator(), id.clone(), definition).await.unwrap();
    }

    /// Many of them, past the doors.
    async fn set_many(&self, ids: &[SecretId], definition: &str) {
        let definition = Definition::parse(definition).unwrap();
        let now = self.clock.now();
        let definition = &definition;
        join_all(ids.iter().map(|id| async move {
            self.put(id, "first").await;
            let gap = self.rotations.engine().gap(id, definition);
            let new = Rotation::new(definition.clone(), next_at(&definition.schedule, now, gap));
            self.ledger().update(id, |_| Ok((Some(new.clone()), ()))).await.unwrap();
        }))
        .await;
    }

    async fn record(&self, id: &SecretId) -> Rotation {
        self.ledger().get(id).await.unwrap().unwrap()
    }

    async fn described(&self, id: &SecretId) -> Described {
        Described(self.running.broker.describe(&administrator(), id.clone()).await.unwrap())
    }

    async fn value(&self, id: &SecretId) -> String {
        let disclosed = get(&self.running, &administrator(), id.clone()).await.unwrap();
        disclosed.value.unwrap().expose_text().unwrap().to_owned()
    }

    fn schedule(&self) -> Clockwork {
        let (stop, shutdown) = watch::channel(false);
        let task = tokio::spawn(Scheduler::new(&self.rotations).keep(shutdown));
        Clockwork { stop, task }
    }

    /// Waits until the scheduler has looked through everything as it is now.
    async fn looked(&self) {
        for _ in 0..2 {
            self.clock.advance(Duration::from_secs(1));
            until("the scheduler looks", async || self.rotations.figures().scheduler_looked == Some(0)).await;
        }
    }

    /// Sets the wall clock, as NTP or a person would; that it was set is noticed.
    fn set_clock(&self, to: Timestamp) {
        self.clock.set_wall(to);
        assert!(self.rotations.figures().clock_stepped);
    }

    /// Lets time pass, as it does: with a scheduler that looks now and then.
    async fn pass(&self, time: Duration) {
        self.clock.advance(time);
        self.looked().await;
    }

    async fn end(self) -> Vec<serde_json::Value> {
        self.running.stop().await.unwrap();
        records(self.folder.path())
    }
}

fn boot(
    running: &Running,
    kv: &Arc<Faulty>,
    key: &Arc<MacKey>,
    clock: &Arc<ManualClock>,
    stop: &watch::Sender<bool>,
    instance: &str,
) -> Rotations {
    let settings = Settings::default();
    let ledger = Ledger::new(kv.clone(), Arc::clone(key), clock.clone(), instance, settings.lease);
    let broker = Arc::clone(&running.broker);
    let engine =
        Engine::new(Arc::clone(&broker), Arc::new(ledger), clock.clone(), settings, stop.subscribe());
    Rotations::new(broker, Arc::new(engine))
}

struct Clockwork {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Clockwork {
    async fn end(self) {
        self.stop.send_replace(true);
        tokio::time::timeout(HUNG, self.task).await.expect("hung").unwrap();
    }
}

struct Described(Description);

impl Described {
    fn holder(&self, label: &Label) -> Option<VersionId> {
        let mut versions = self.0.versions.iter();
        versions.find(|version| version.labels.contains(label)).map(|version| version.id.clone())
    }

    fn current(&self) -> VersionId {
        self.holder(&Label::Current).unwrap()
    }

    fn versions(&self) -> usize {
        self.0.versions.len()
    }
}

/// What goes wrong with a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// It is not made, and said so.
    Down,
    /// It is made, but the answer says that it was not.
    AnswerLost,
    /// Nothing is heard of it, and it is made when the store is let go on.
    HangBefore,
    /// It is made, and nothing is heard of it until the store is let go on.
    HangAfter,
}

/// A key-value store that fails when it is told to.
struct Faulty {
    inner: Embedded,
    /// After how many more commits what goes wrong, once.
    armed: Mutex<Option<(usize, Fault)>>,
    struck: Notify,
    goes_on: Notify,
}

impl Faulty {
    fn new(inner: Embedded) -> Self {
        Self { inner, armed: Mutex::default(), struck: Notify::new(), goes_on: Notify::new() }
    }

    /// The `nth` commit from now on goes wrong.
    fn arm(&self, nth: usize, fault: Fault) {
        *self.armed.lock().unwrap() = Some((nth, fault));
    }

    /// Whether there was no such commit.
    fn disarm(&self) -> bool {
        self.armed.lock().unwrap().take().is_some()
    }

    fn fault(&self) -> Option<Fault> {
        let mut armed = self.armed.lock().unwrap();
        let (left, fault) = (*armed)?;
        if left > 1 {
            *armed = Some((left - 1, fault));
            return None;
        }
        *armed = None;
        Some(fault)
    }
}

fn broken() -> KvError {
    KvError::Unavailable { doing: "committing", cause: "on purpose".to_owned() }
}

#[async_trait]
impl Kv for Faulty {
    async fn get(&self, key: &[u8]) -> Result<Option<Entry>, KvError> {
        self.inner.get(key).await
    }

    async fn range(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<Page, KvError> {
        self.inner.range(prefix, after, limit).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, KvError> {
        let fault = self.fault();
        if fault.is_some() {
            self.struck.notify_one();
        }
        match fault {
            None => self.inner.commit(transaction).await,
            Some(Fault::Down) => Err(broken()),
            Some(Fault::AnswerLost) => {
                self.inner.commit(transaction).await?;
                Err(broken())
            }
            Some(Fault::HangBefore) => {
                self.goes_on.notified().await;
                self.inner.commit(transaction).await
            }
            Some(Fault::HangAfter) => {
                let outcome = self.inner.commit(transaction).await;
                self.goes_on.notified().await;
                outcome
            }
        }
    }

    async fn watch(&self, prefix: &[u8], from: Revision) -> Result<Watch, KvError> {
        self.inner.watch(prefix, from).await
    }

    async fn revision(&self) -> Result<Revision, KvError> {
        self.inner.revision().await
    }

    async fn lease(&self, ttl: Duration) -> Result<LeaseId, KvError> {
        self.inner.lease(ttl).await
    }

    async fn renew(&self, lease: LeaseId) -> Result<(), KvError> {
        self.inner.renew(lease).await
    }

    async fn release(&self, lease: LeaseId) -> Result<(), KvError> {
        self.inner.release(lease).await
    }
}

/// Looks until it is so.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let looking = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(HUNG, looking).await.unwrap_or_else(|_| panic!("hung until {what}"));
}

/// Looks until a number is what it should be, for as long as it goes on changing.
async fn until_is(what: &str, goal: u64, mut number: impl AsyncFnMut() -> u64) {
    let mut last = number().await;
    while last != goal {
        let so_far = last;
        let changes = async {
            while last == so_far {
                tokio::time::sleep(Duration::from_millis(20)).await;
                last = number().await;
            }
        };
        tokio::time::timeout(HUNG, changes).await.unwrap_or_else(|_| panic!("hung: {what} at {so_far}"));
    }
}

fn random(schedule: &str, length: usize) -> String {
    format!(
        "rotator = \"random\"\nschedule = \"{schedule}\"\ngrace = \"1m\"\n\n[random]\nlength = {length}\n"
    )
}

fn daily() -> String {
    random("every 1d", 32)
}

fn ids(environment: &str, number: usize) -> Vec<SecretId> {
    (0..number).map(|n| id(environment, &format!("s-{n:04}"))).collect()
}

async fn rotate(rotations: &Rotations, call: Call, id: &SecretId) -> BrokerResult<Over> {
    let (tell, _told) = mpsc::channel(64);
    let over = rotations.rotate(call, id.clone(), false, tell);
    tokio::time::timeout(HUNG, over).await.expect("hung")
}

/// What a round told.
#[derive(Default)]
struct Round {
    total: u64,
    done: u64,
    overs: Vec<(SecretId, Over)>,
}

async fn rotate_due(
    rotations: &Rotations,
    call: Call,
    environment: Option<&str>,
    dry_run: bool,
) -> BrokerResult<Round> {
    let (tell, mut told) = mpsc::channel(16);
    let environment = environment.map(|name| name.parse().unwrap());
    let rotating = rotations.rotate_due(call, environment, dry_run, tell);
    let following = async {
        let mut round = Round::default();
        while let Some(due) = told.recv().await {
            match due {
                Due::Total(total) => round.total = total,
                Due::Done(done) => round.done = done,
                Due::Step(id, Told::Over(over)) => round.overs.push((id, over)),
                Due::Step(_, Told::Phase { .. }) => {}
            }
        }
        round
    };
    let (rotated, round) = tokio::join!(rotating, following);
    rotated.map(|()| round)
}

fn figure(figures: &[(&'static str, u64)], name: &str) -> u64 {
    figures.iter().find(|(named, _)| *named == name).unwrap().1
}

fn rotated(rotations: &Rotations) -> u64 {
    figure(&rotations.figures().ended, "rotated")
}

fn blocked(house: &House) -> u64 {
    figure(&house.rotations.figures().health, "blocked")
}

fn token_of(over: &Over) -> VersionId {
    match over {
        Over::Ended { ending: Ending::Rotated, token: Some(token) } => token.clone(),
        other => panic!("not rotated: {other:?}"),
    }
}

fn unfinished(over: Over) -> (Trouble, Option<VersionId>) {
    match over {
        Over::Unfinished { failure, token, .. } => (failure.trouble, token),
        other => panic!("not unfinished: {other:?}"),
    }
}

fn reason<T: std::fmt::Debug>(result: BrokerResult<T>) -> Reason {
    result.unwrap_err().reason()
}

/// A run that was cut off by the death of its broker when the pending value was durable: what comes after.
async fn cut_off_with_a_pending_value(house: &House, id: &SecretId) -> (Rotations, VersionId) {
    for nth in 1..20 {
        let rotations = house.boot("test");
        killed(house, &rotations, id, nth, Fault::HangBefore).await.expect("the run is cut off");
        let described = house.described(id).await;
        if let Some(pending) = described.holder(&Label::Pending) {
            assert_ne!(pending, described.current());
            return (house.boot("test"), pending);
        }
    }
    panic!("no pending value was ever written");
}

/// An activation whose process dies at a commit. `None`: there was no such commit, and it came to its end.
async fn killed(house: &House, rotations: &Rotations, id: &SecretId, nth: usize, fault: Fault) -> Option<()> {
    house.kv.arm(nth, fault);
    let (engine, secret) = (Arc::clone(rotations.engine()), id.clone());
    let mut activation = tokio::spawn(async move { engine.run(&secret, &now(), &|_: Told| {}).await });
    let over = tokio::select! {
        () = house.kv.struck.notified() => None,
        over = &mut activation => Some(over.unwrap()),
        () = tokio::time::sleep(HUNG) => panic!("hung"),
    };
    if over.is_some() {
        assert!(house.kv.disarm(), "what hangs does not come to its end: {over:?}");
        return None;
    }
    activation.abort();
    assert!(activation.await.unwrap_err().is_cancelled());
    Some(())
}

fn now() -> Order {
    Order { asked_by: "test".to_owned(), request_id: None, when: When::Now }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_is_set_shown_paused_and_removed() {
    let house = House::start().await;
    let (api, root) = (id("development", "api"), administrator());
    let rotations = &house.rotations;
    assert_eq!(reason(rotations.get(&root, api.clone()).await), Reason::RotationNotFound);
    house.set(&api, &daily()).await;
    house.set(&id("development", "jwt"), "rotator = \"jwt-secret\"\nschedule = \"signing-key\"\n").await;
    house.set(&id("staging", "api"), &daily()).await;

    let shown = rotations.get(&root, api.clone()).await.unwrap();
    let record = shown.rotation.unwrap();
    assert_eq!((record.health(), shown.min_gap), (Health::Idle, GAP));
    assert_eq!(record.next_at, house.clock.now() + DAY, "at its time, never at once");
    let page = rotations.list(&root, "development".parse().unwrap(), None, 1).await.unwrap();
    assert_eq!((page.rotations.len(), page.more), (1, true));
    let after = Some(page.rotations[0].id.name.clone());
    let page = rotations.list(&root, "development".parse().unwrap(), after, 1).await.unwrap();
    assert_eq!((page.rotations[0].id.name.as_str(), page.more), ("jwt", false));

    let paused = rotations.pause(&root, api.clone()).await.unwrap().rotation.unwrap();
    assert_eq!(paused.health(), Health::Paused);
    assert_eq!(reason(rotate(rotations, administrator(), &api).await), Reason::Conflict);
    house.clock.advance(2 * DAY);
    let round = rotate_due(rotations, administrator(), Some("development"), false).await.unwrap();
    assert_eq!((round.total, round.done), (0, 0), "what is paused is not due");
    let resumed = rotations.resume(&root, api.clone()).await.unwrap().rotation.unwrap();
    assert_eq!(resumed.health(), Health::Idle);

    let over = rotate(rotations, person("ana", &["administrators"]), &api).await.unwrap();
    let record = rotations.get(&root, api.clone()).await.unwrap().rotation.unwrap();
    let last = record.history.last().unwrap();
    assert_eq!((last.ending, last.token.clone().unwrap()), (Ending::Rotated, token_of(&over)));
    assert_eq!((last.asked_by.as_str(), last.failures), (r#"User::"ana""#, 0));
    assert_eq!(record.rotated_at, Some(house.clock.now()));
    assert_eq!(house.value(&api).await.len(), 32, "what was cached is forgotten with the promotion");

    assert_eq!(reason(rotations.abort(&root, api.clone()).await), Reason::Conflict);
    rotations.remove(&root, api.clone()).await.unwrap();
    assert_eq!(reason(rotations.remove(&root, api.clone()).await), Reason::RotationNotFound);
    assert_eq!(reason(rotate(rotations, administrator(), &api).await), Reason::RotationNotFound);
    assert_eq!(house.described(&api).await.versions(), 2, "the secret stays");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_set_is_said_at_once_and_nothing_is_set() {
    let house = House::start().await;
    let root = administrator();
    let set = async |id: SecretId, definition: &str| house.rotations.set(&root, id, definition).await;
    house.put(&id("development", "api"), "v").await;
    house.put(&id("development", "gone"), "v").await;
    let broker = &house.running.broker;
    broker.delete(&root, id("development", "gone"), RecoveryWindow::DEFAULT).await.unwrap();
    for bad in
        ["", "rotator = 1", "rotator = \"no-such\"\nschedule = \"every 1d\"", "schedule = \"every 1d\""]
    {
        assert_eq!(reason(set(id("development", "api"), bad).await), Reason::InvalidConfig, "{bad:?}");
    }
    assert_eq!(reason(set(id("no-such-place", "api"), &daily()).await), Reason::EnvironmentNotFound);
    assert_eq!(reason(set(id("development", "missing"), &daily()).await), Reason::SecretNotFound);
    assert_eq!(reason(set(id("development", "gone"), &daily()).await), Reason::SecretDeleted);
    let all = house.rotations.list(&root, "development".parse().unwrap(), None, 100).await.unwrap();
    assert!(all.rotations.is_empty());
    house.end().await;
}

const DATABASE: &str = "rotator = \"postgresql-alternating\"\nschedule = \"every 30d\"\n[postgresql-alternating]\n\
    hosts = [\"127.0.0.1:1\"]\ndatabase = \"shop\"\nusers = [\"a\", \"b\"]\nowner = \"shop\"\ntls = \"disable\"\n";

/// The engine may read every secret. Where a definition has it send one to a host, whoever sets it must be one who may.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_an_admin_s_credential_sent_somewhere_may_read_it() {
    let house = House::under(|folder| {
        let policies = folder.join("policies");
        std::fs::create_dir(&policies).unwrap();
        for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/policies")).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                std::fs::copy(&path, policies.join(path.file_name().unwrap())).unwrap();
            }
        }
        let forbid = "@id(\"not-for-eve\") forbid (principal == User::\"eve\", action == Action::\"read\", \
                      resource == Secret::\"development:database-admin\");";
        std::fs::write(policies.join("eve.cedar"), forbid).unwrap();
        PolicySource::Directory(policies)
    })
    .await;
    let database = id("development", "database");
    house.put(&database, "v").await;
    let set = async |who: Call, admin: &str| {
        let definition = format!("{DATABASE}admin = \"{admin}\"\n");
        house.rotations.set(&who, database.clone(), &definition).await
    };
    let eve = || person("eve", &["administrators"]);
    assert_eq!(reason(set(eve(), "database-admin").await), Reason::Denied);
    assert_eq!(
        reason(set(administrator(), "database").await),
        Reason::InvalidConfig,
        "not the secret itself"
    );
    assert_eq!(reason(house.rotations.get(&eve(), database.clone()).await), Reason::RotationNotFound);
    set(administrator(), "database-admin").await.unwrap();
    let records = house.end().await;
    let asked = |r: &&serde_json::Value| r["secret"] == "database-admin" && r["operation"] == "set_rotation";
    let outcomes: Vec<_> = records.iter().filter(asked).map(|r| r["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["denied", "ok"]);
}

/// What can't come to its end is a person's to mend, or to remove.
#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_run_goes_on_with_the_definition_that_mends_it_or_is_removed() {
    let house = House::start().await;
    let root = administrator();
    let of = |field: &str| format!("{}field = \"{field}\"\n", random("every 1d", 32));
    let blocked = async |name: &str| {
        let id = id("development", name);
        house.put(&id, r#"{"key":"first-value"}"#).await;
        house.rotations.set(&root, id.clone(), &of("kye")).await.unwrap();
        let over = rotate(&house.rotations, administrator(), &id).await.unwrap();
        assert_eq!(unfinished(over).0, Trouble::ValueUnfit);
        id
    };
    let mended = blocked("mended").await;
    house.rotations.set(&root, mended.clone(), &of("key")).await.unwrap();
    let over = rotate(&house.rotations, administrator(), &mended).await.unwrap();
    assert_eq!(house.described(&mended).await.current(), token_of(&over));
    assert_ne!(house.value(&mended).await, r#"{"key":"first-value"}"#);

    let removed = blocked("removed").await;
    house.rotations.remove(&root, removed.clone()).await.unwrap();
    assert_eq!(reason(house.rotations.get(&root, removed.clone()).await), Reason::RotationNotFound);
    assert_eq!(house.value(&removed).await, r#"{"key":"first-value"}"#);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_that_is_set_anew_keeps_its_past_and_its_time() {
    let house = House::start().await;
    let (api, root) = (id("development", "api"), administrator());
    house.set(&api, &random("every 30d", 32)).await;
    house.clock.advance(DAY);
    rotate(&house.rotations, administrator(), &api).await.unwrap();
    let rotated = house.record(&api).await;
    house.clock.advance(10 * DAY);
    let anew = async |definition: String| {
        let shown = house.rotations.set(&root, api.clone(), &definition).await.unwrap();
        shown.rotation.unwrap()
    };
    let same_time = anew(random("every 30d", 64)).await;
    assert_eq!((same_time.next_at, same_time.rotated_at), (rotated.next_at, rotated.rotated_at));
    assert_eq!((same_time.fence, &same_time.history), (rotated.fence, &rotated.history));
    let later = anew(random("every 60d", 64)).await;
    assert_eq!(later.next_at, rotated.rotated_at.unwrap() + 60 * DAY, "counted from the last one");
    let sooner = anew(random("every 7d", 64)).await;
    assert_eq!(sooner.next_at, house.clock.now() + 7 * DAY, "and never at once");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn between_two_rotations_lies_the_longest_life_of_what_was_current_before() {
    let house = House::start().await;
    let api = id("development", "api");
    house.set(&api, &random("every 1m", 32)).await;
    rotate(&house.rotations, administrator(), &api).await.unwrap();
    assert_eq!(house.record(&api).await.next_at, house.clock.now() + GAP, "whatever the schedule says");
    house.clock.advance(GAP - Duration::from_secs(1));
    let error = rotate(&house.rotations, administrator(), &api).await.unwrap_err();
    assert_eq!(error.reason(), Reason::RotationTooSoon);
    assert!(error.to_string().contains("2026-01-01T00:06:30Z"), "{error}");
    house.clock.advance(Duration::from_secs(1));
    rotate(&house.rotations, administrator(), &api).await.unwrap();
    assert_eq!(house.described(&api).await.versions(), 3);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r3_many_who_rotate_one_secret_at_once_make_one_rotation() {
    let house = House::start().await;
    let api = id("development", "api");
    house.set(&api, &daily()).await;
    // Two brokers on one store: neither is dead to the other.
    let brokers = [house.boot("one"), house.boot("two")];
    for round in 0..200 {
        house.clock.advance(GAP);
        let before = house.described(&api).await.current();
        let racing = (0..8).map(|n| {
            let (rotations, api) = (brokers[n % 2].clone(), api.clone());
            tokio::spawn(async move { rotate(&rotations, administrator(), &api).await })
        });
        let mut tokens = Vec::new();
        for outcome in join_all(racing).await {
            match outcome.unwrap() {
                Ok(Over::InProgress { .. }) => {}
                Ok(over) => tokens.push(token_of(&over)),
                Err(error) => assert_eq!(error.reason(), Reason::RotationTooSoon, "round {round}: {error}"),
            }
        }
        let after = house.described(&api).await;
        assert_eq!(tokens, [after.current()], "round {round}: one token");
        assert_eq!(after.holder(&Label::Previous), Some(before), "round {round}: I8");
        assert!(after.holder(&Label::Pending).is_none_or(|pending| pending == tokens[0]));
    }
    assert_eq!(brokers.iter().map(rotated).sum::<u64>(), 200);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r33_a_scheduler_and_three_crons_make_one_rotation_of_each_that_is_due() {
    let house = House::start().await;
    let due = ids("development", 100);
    house.set_many(&due, &daily()).await;
    house.clock.advance(DAY);
    let clockwork = house.schedule();
    let crons = join_all(
        (0..3).map(|n| rotate_due(&house.rotations, program(&format!("cron-{n}"), &["cron"]), None, false)),
    );
    let rounds = tokio::time::timeout(2 * HUNG, crons).await.expect("hung");
    until_is("rotated", 100, async || rotated(&house.rotations)).await;
    clockwork.end().await;
    for round in rounds {
        let round = round.unwrap();
        assert_eq!((round.done, round.overs.len()), (round.total, usize::try_from(round.total).unwrap()));
        for (id, over) in round.overs {
            match over {
                Over::InProgress { .. } | Over::Skipped { .. } => {}
                over => assert_eq!(token_of(&over), house.described(&id).await.current()),
            }
        }
    }
    assert_eq!(rotated(&house.rotations), 100);
    for id in &due {
        let record = house.record(id).await;
        assert_eq!((house.described(id).await.versions(), record.history.len()), (2, 1), "{id}");
        assert!(record.run.is_none() && record.next_at > house.clock.now());
    }
    let nothing = rotate_due(&house.rotations, program("cron", &["cron"]), None, false).await.unwrap();
    assert_eq!(nothing.total, 0);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r32_what_is_overdue_after_a_long_absence_is_rotated_once_each_and_not_at_once() {
    let house = House::start().await;
    let due = ids("development", 1_000);
    house.set_many(&due, &random("every 1d", 32)).await;
    house.clock.advance(90 * DAY);
    let now = house.clock.now();
    let clockwork = house.schedule();
    let environment: EnvironmentName = "development".parse().unwrap();
    let waiting = async || {
        let all = house.ledger().list(&environment, None, 1_000).await.unwrap();
        let times = all.rotations.into_iter().map(|(_, rotation)| rotation.unwrap().next_at);
        times.filter(|next_at| *next_at > now).collect::<Vec<_>>()
    };
    until_is("spread", 1_000, async || u64::try_from(waiting().await.len()).unwrap()).await;
    assert_eq!(rotated(&house.rotations), 0, "not one begins before all have their time");
    let times = waiting().await;
    assert!(times.iter().all(|at| *at <= now + Duration::from_secs(15 * 60)));
    let minutes: BTreeSet<_> = times.iter().map(|at| (at.as_second() - now.as_second()) / 60).collect();
    assert_eq!(minutes.len(), 15, "over the whole quarter of an hour: {minutes:?}");

    house.clock.advance(Duration::from_secs(15 * 60));
    until_is("rotated", 1_000, async || rotated(&house.rotations)).await;
    house.looked().await;
    clockwork.end().await;
    assert_eq!(rotated(&house.rotations), 1_000, "one for 90 that were missed");
    let all = house.ledger().list(&environment, None, 1_000).await.unwrap();
    for (id, rotation) in all.rotations {
        let rotation = rotation.unwrap();
        assert_eq!(rotation.history.len(), 1, "{id}");
        assert!(rotation.next_at > house.clock.now());
    }
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r31_a_clock_that_is_set_rotates_nothing_by_itself() {
    let house = House::start().await;
    let due = ids("development", 20);
    house.set_many(&due, &random("every 30d", 32)).await;
    let clockwork = house.schedule();
    house.looked().await;
    let cron = || program("cron", &["cron"]);

    // A year ahead, and back again.
    let truth = house.clock.now();
    house.set_clock(truth + YEAR);
    house.looked().await;
    assert_eq!(
        reason(rotate_due(&house.rotations, cron(), None, false).await.map(|_| ())),
        Reason::Unavailable
    );
    house.set_clock(truth);
    house.looked().await;
    house.pass(Duration::from_secs(601)).await;
    assert!(!house.rotations.figures().clock_stepped);
    assert_eq!(rotated(&house.rotations), 0);

    // A year back, and it stays: what was planned is planned anew, and comes once.
    house.set_clock(truth - YEAR);
    house.looked().await;
    house.pass(Duration::from_secs(601)).await;
    let latest = house.clock.now() + 31 * DAY;
    until("all are planned anew", async || {
        let mut records = Vec::new();
        for id in &due {
            records.push(house.record(id).await);
        }
        records.iter().all(|record| record.next_at <= latest)
    })
    .await;
    assert_eq!(rotated(&house.rotations), 0);
    house.pass(31 * DAY).await;
    house.pass(Duration::from_secs(901)).await;
    // What could not begin at its time is looked at again a little later.
    let a_second_later = async || {
        house.clock.advance(Duration::from_secs(1));
        rotated(&house.rotations)
    };
    until_is("rotated", 20, a_second_later).await;

    // Right again, a year ahead of what was thought: one each, spread, when the clock is believed.
    house.set_clock(truth + 32 * DAY);
    house.looked().await;
    house.looked().await;
    assert_eq!(rotated(&house.rotations), 20);
    house.pass(Duration::from_secs(601)).await;
    house.pass(Duration::from_secs(901)).await;
    until_is("rotated", 40, a_second_later).await;
    house.looked().await;
    clockwork.end().await;
    for id in &due {
        assert_eq!(house.record(id).await.history.len(), 2, "{id}");
    }
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r34_a_run_ends_as_it_began_whatever_is_set_meanwhile() {
    let house = House::start().await;
    let (api, root) = (id("development", "api"), administrator());
    house.set(&api, &random("every 1d", 20)).await;
    let (rotations, token) = cut_off_with_a_pending_value(&house, &api).await;
    rotations.set(&root, api.clone(), &random("every 1d", 64)).await.unwrap();
    assert_eq!(reason(rotations.remove(&root, api.clone()).await), Reason::Conflict);
    let over = rotate(&rotations, administrator(), &api).await.unwrap();
    assert_eq!((token_of(&over), house.value(&api).await.len()), (token, 20));
    house.clock.advance(GAP);
    rotate(&rotations, administrator(), &api).await.unwrap();
    assert_eq!(house.value(&api).await.len(), 64);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r35_a_secret_that_is_deleted_in_a_run_keeps_its_pending_value_and_the_run_goes_on_when_it_is_back() {
    let house = House::start().await;
    let (api, root) = (id("development", "api"), administrator());
    house.set(&api, &daily()).await;
    let (rotations, token) = cut_off_with_a_pending_value(&house, &api).await;
    let broker = &house.running.broker;
    broker.delete(&root, api.clone(), RecoveryWindow::DEFAULT).await.unwrap();
    let over = rotate(&rotations, administrator(), &api).await.unwrap();
    assert_eq!(unfinished(over), (Trouble::SecretDeleted, Some(token.clone())));
    assert_eq!(house.record(&api).await.health(), Health::Blocked);
    assert_eq!(figure(&rotations.figures().health, "blocked"), 1);
    assert_eq!(house.described(&api).await.holder(&Label::Pending), Some(token.clone()));

    broker.restore(&root, api.clone()).await.unwrap();
    let resumed = rotations.resume(&root, api.clone()).await.unwrap().rotation.unwrap();
    assert_eq!(resumed.attention_at(), Some(house.clock.now()), "at once");
    let over = rotate(&rotations, administrator(), &api).await.unwrap();
    assert_eq!((token_of(&over), house.described(&api).await.current()), (token.clone(), token));
    assert_eq!(figure(&rotations.figures().health, "blocked"), 0);
    house.end().await;
}

/// Every commit of a run's record goes wrong in every way, one at a time; each time the run converges to one rotation.
async fn converges(fault: Fault) {
    let house = House::start().await;
    let mut struck = 0;
    for nth in 1..50 {
        let api = id("development", &format!("s-{nth}"));
        house.set(&api, &daily()).await;
        let first = house.described(&api).await.current();
        let rotations = house.boot("test");
        if matches!(fault, Fault::HangBefore | Fault::HangAfter) {
            if killed(&house, &rotations, &api, nth, fault).await.is_none() {
                break;
            }
        } else {
            house.kv.arm(nth, fault);
            let _ = rotations.engine().run(&api, &now(), &|_: Told| {}).await;
            if house.kv.disarm() {
                break;
            }
        }
        struck += 1;
        let left = house.described(&api).await;
        let pending = left.holder(&Label::Pending).filter(|_| left.current() == first);
        let rotations = match fault {
            Fault::HangBefore | Fault::HangAfter => house.boot("test"),
            Fault::Down | Fault::AnswerLost => rotations,
        };
        let mut tries = 0;
        loop {
            match rotations.engine().run(&api, &now(), &|_: Told| {}).await {
                Over::Ended { ending: Ending::Rotated, .. } | Over::TooSoon { .. } => break,
                // The lease was taken, and the answer lost: it ends by itself.
                Over::InProgress { .. } => house.clock.advance(Duration::from_secs(61)),
                // A target is not asked at once again, however often somebody asks for it.
                Over::Unfinished { .. } => house.clock.advance(Duration::from_secs(5)),
                _ => {}
            }
            tries += 1;
            assert!(tries < 5, "{fault:?} at commit {nth}: {:?}", house.record(&api).await);
        }
        let (after, record) = (house.described(&api).await, house.record(&api).await);
        assert_eq!(after.versions(), 2, "{fault:?} at commit {nth}: one value was made");
        assert_eq!(after.holder(&Label::Previous), Some(first), "{fault:?} at commit {nth}");
        assert!(pending.is_none_or(|pending| pending == after.current()), "{fault:?} at commit {nth}");
        assert_eq!((record.run, record.history.len()), (None, 1), "{fault:?} at commit {nth}");
    }
    assert!((3..49).contains(&struck), "{fault:?}: a run commits its record a few times, not {struck}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r1_a_store_that_is_down_for_any_commit_of_a_run_delays_it() {
    converges(Fault::Down).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r2_r24_a_lost_answer_to_any_commit_of_a_run_does_not_make_another_value() {
    converges(Fault::AnswerLost).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r5_a_broker_that_dies_before_any_commit_of_a_run_is_succeeded() {
    converges(Fault::HangBefore).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r6_a_broker_that_dies_after_any_commit_of_a_run_is_succeeded() {
    converges(Fault::HangAfter).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r9_a_value_that_does_not_fit_is_a_typed_error_and_changes_nothing() {
    let house = House::start().await;
    let api = id("development", "api");
    let definition =
        "rotator = \"random\"\nschedule = \"every 1d\"\n\n[random]\nfield = \"key\"\nlength = 4096\n";
    let large = format!(r#"{{"key":"short","pad":"{}"}}"#, "x".repeat(65_000));
    house.put(&api, &large).await;
    house.rotations.set(&administrator(), api.clone(), definition).await.unwrap();
    let over = rotate(&house.rotations, administrator(), &api).await.unwrap();
    let (trouble, _) = unfinished(over);
    assert!(trouble.needs_a_person(), "{trouble}");
    let described = house.described(&api).await;
    assert_eq!((described.versions(), described.holder(&Label::Pending)), (1, None));
    assert_eq!(house.value(&api).await, large);
    house.end().await;
}

/// A broker as its users have it, whose values are in AWS behind a proxy.
struct InAws {
    proxy: FaultProxy,
    program: Program,
    _folder: TempDir,
}

impl InAws {
    const NAME: &str = "api";

    /// With a secret that has a rotation and a first value.
    async fn start() -> Self {
        let proxy = FaultProxy::start(Moto::start().await.endpoint()).await;
        let folder = tempfile::tempdir().unwrap();
        // The names are this test's alone, in a server that others use too.
        let tables = format!(
            "[rotation]\nscheduler = false\nretry_from = \"100ms\"\n[environments.staging]\nstore = \"aws\"\n\
             [environments.staging.aws]\nregion = \"{REGION}\"\nendpoint = \"{}\"\n\
             name_template = \"{}/{{environment}}/{{name}}\"\n",
            proxy.endpoint(),
            uuid::Uuid::new_v4(),
        );
        let credentials = [
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ];
        let (config, _) = Served::configure(folder.path(), "", &tables);
        let program = Program::serve(&config, &folder.path().join("broker.sock"), &credentials);
        let put = program.put("staging", Self::NAME, b"first");
        assert!(put.status.success(), "{}", String::from_utf8_lossy(&put.stderr));
        let set = program.command(["rotation", "set", Self::NAME, "--file", "-", "-e", "staging"]);
        let set = with_input(set, daily().as_bytes());
        assert!(set.status.success(), "{}", String::from_utf8_lossy(&set.stderr));
        Self { proxy, program, _folder: folder }
    }

    /// One activation: the exit code, and how it came out.
    fn rotate(&self) -> (Option<i32>, serde_json::Value) {
        let arguments = ["rotate", Self::NAME, "--no-wait", "-e", "staging", "--output", "json"];
        let output = self.program.run(arguments);
        (output.status.code(), serde_json::from_slice(&output.stdout).expect("a document"))
    }

    fn json(&self, command: &[&str]) -> serde_json::Value {
        let arguments = [command, &[Self::NAME, "-e", "staging", "--output", "json"]].concat();
        serde_json::from_str(&self.program.ok(arguments)).expect("a document")
    }

    fn value(&self) -> String {
        self.program.ok(["get", Self::NAME, "-e", "staging", "--refresh"])
    }

    /// While `fault` is done to every write of a version, the run stays where it is, with this result and trouble, and
    /// nothing changes; then it comes to its end with the version that it claimed.
    async fn stays_and_goes_on(&self, fault: Mode, expected: (i32, [&str; 2])) {
        let before = self.json(&["versions"])["versions"].clone();
        assert_eq!(before.as_array().unwrap().len(), 1, "{before}");
        self.proxy.forget();
        self.proxy.set_for("PutSecretValue", fault);
        let (code, stays) = self.rotate();
        assert!(self.proxy.calls("PutSecretValue") > 0, "{stays}");
        let told = [&stays["result"], &stays["trouble"]["code"]].map(|told| told.as_str().unwrap());
        assert_eq!((code, told), (Some(expected.0), expected.1), "{stays}");
        assert!(stays["retry_at"].is_string() && stays["version_id"].is_string(), "{stays}");
        assert_eq!(self.json(&["versions"])["versions"], before);
        assert_eq!(self.value(), "first");

        self.proxy.set(Mode::Pass);
        let mut rotated = serde_json::Value::Null;
        until("the run is taken up again", async || {
            rotated = self.rotate().1;
            rotated["result"] == "rotated"
        })
        .await;
        assert_eq!(rotated["version_id"], stays["version_id"]);
        assert_eq!(self.json(&["versions"])["versions"].as_array().unwrap().len(), 2, "one value was made");
        assert_eq!(self.value().len(), 32);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn r9_a_write_that_is_throttled_is_made_later() {
    let aws = InAws::start().await;
    aws.stays_and_goes_on(Mode::Throttle, (5, ["unfinished", "store_unavailable"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r9_a_quota_that_is_reached_waits_for_a_person() {
    let aws = InAws::start().await;
    let refusal = serde_json::json!({"__type": "LimitExceededException", "Message": "too many versions"});
    let fault = Mode::Answer(400, refusal.to_string());
    aws.stays_and_goes_on(fault, (1, ["blocked", "store_refused"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_aborted_by_whoever_asks_or_by_whoever_works_on_it() {
    let house = House::start().await;
    let (api, root) = (id("development", "api"), administrator());
    house.set(&api, &daily()).await;
    let first = house.described(&api).await.current();
    let (rotations, token) = cut_off_with_a_pending_value(&house, &api).await;
    let aborted = rotations.abort(&root, api.clone()).await.unwrap().rotation.unwrap();
    let last = aborted.history.last().unwrap();
    assert_eq!((aborted.health(), last.ending), (Health::Idle, Ending::Aborted));
    assert_eq!(last.token.as_ref(), Some(&token));
    let after = house.described(&api).await;
    assert_eq!((after.current(), after.holder(&Label::Pending)), (first.clone(), None));
    assert_eq!(reason(rotations.abort(&root, api.clone()).await), Reason::Conflict, "it is over");

    // Another broker is at it.
    house.clock.advance(GAP);
    house.kv.arm(2, Fault::HangBefore);
    let other = house.boot("other");
    let working = tokio::spawn({
        let api = api.clone();
        async move { rotate(&other, administrator(), &api).await }
    });
    tokio::time::timeout(HUNG, house.kv.struck.notified()).await.expect("hung");
    let aborting = rotations.abort(&root, api.clone()).await.unwrap().rotation.unwrap();
    assert!(aborting.run.is_some_and(|run| run.abort), "whoever works on it gets to it");
    house.kv.goes_on.notify_one();
    let over = tokio::time::timeout(HUNG, working).await.expect("hung").unwrap().unwrap();
    assert!(matches!(over, Over::Ended { ending: Ending::Aborted, .. }), "{over:?}");
    assert_eq!(house.described(&api).await.current(), first);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_waits_hears_how_a_run_ended_that_somebody_else_worked_on() {
    let house = House::start().await;
    let api = id("development", "api");
    house.set(&api, &daily()).await;
    house.kv.arm(2, Fault::HangBefore);
    let working = tokio::spawn({
        let (rotations, api) = (house.rotations.clone(), api.clone());
        async move { rotate(&rotations, administrator(), &api).await }
    });
    tokio::time::timeout(HUNG, house.kv.struck.notified()).await.expect("hung");
    let other = house.boot("other");
    let over = rotate(&other, administrator(), &api).await.unwrap();
    assert!(matches!(over, Over::InProgress { .. }), "who does not wait is told so: {over:?}");

    let (tell, mut told) = mpsc::channel(64);
    let waiting = tokio::spawn({
        let (other, api) = (other.clone(), api.clone());
        async move { other.rotate(administrator(), api, true, tell).await }
    });
    let (_, first) = tokio::time::timeout(HUNG, told.recv()).await.expect("hung").unwrap();
    assert!(matches!(first, Told::Over(Over::InProgress { .. })), "{first:?}");
    house.kv.goes_on.notify_one();
    let token = token_of(&tokio::time::timeout(HUNG, working).await.expect("hung").unwrap().unwrap());
    let heard = tokio::time::timeout(HUNG, waiting).await.expect("hung").unwrap().unwrap();
    assert_eq!(token_of(&heard), token);
    assert_eq!(house.described(&api).await.versions(), 2);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_goes_leaves_an_activation_to_its_end_and_the_end_of_the_broker_waits_for_it() {
    let house = House::start().await;
    let api = id("development", "api");
    house.set(&api, &daily()).await;
    house.kv.arm(2, Fault::HangBefore);
    let (tell, told) = mpsc::channel(64);
    let caller = tokio::spawn({
        let (rotations, api) = (house.rotations.clone(), api.clone());
        async move { rotations.rotate(administrator(), api, true, tell).await }
    });
    tokio::time::timeout(HUNG, house.kv.struck.notified()).await.expect("hung");
    drop(told);
    caller.abort();
    assert!(caller.await.unwrap_err().is_cancelled());
    let drained = tokio::spawn({
        let rotations = house.rotations.clone();
        async move { rotations.drained().await }
    });
    until("nothing begins any more", async || {
        let refused = rotate(&house.rotations, administrator(), &api).await;
        refused.is_err_and(|error| error.reason() == Reason::Unavailable)
    })
    .await;
    assert!(!drained.is_finished());
    house.kv.goes_on.notify_one();
    tokio::time::timeout(HUNG, drained).await.expect("hung").unwrap();
    let record = house.record(&api).await;
    assert_eq!((record.run, record.history.len()), (None, 1));
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_waits_for_another_s_run_and_goes_holds_nothing_up() {
    let house = House::start().await;
    let api = id("development", "api");
    house.set(&api, &daily()).await;
    house.kv.arm(2, Fault::HangBefore);
    let working = tokio::spawn({
        let (rotations, api) = (house.rotations.clone(), api.clone());
        async move { rotate(&rotations, administrator(), &api).await }
    });
    tokio::time::timeout(HUNG, house.kv.struck.notified()).await.expect("hung");
    let other = house.boot("other");
    let (tell, mut told) = mpsc::channel(64);
    let waiting = tokio::spawn({
        let (other, api) = (other.clone(), api.clone());
        async move { other.rotate(administrator(), api, true, tell).await }
    });
    tokio::time::timeout(HUNG, told.recv()).await.expect("hung").unwrap();
    drop(told);
    let over = tokio::time::timeout(HUNG, waiting).await.expect("hung").unwrap().unwrap();
    assert!(matches!(over, Over::InProgress { .. }), "{over:?}");
    tokio::time::timeout(HUNG, other.drained()).await.expect("nothing of it is left");
    house.kv.goes_on.notify_one();
    tokio::time::timeout(HUNG, working).await.expect("hung").unwrap().unwrap();
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_is_rotated_by_whoever_may_and_shown_before_to_whoever_asks() {
    let house = House::start().await;
    let (ours, theirs) = (ids("development", 3), ids("production", 2));
    house.set_many(&ours, &daily()).await;
    house.set_many(&theirs, &daily()).await;
    let due_at = house.clock.now() + DAY;
    house.clock.advance(DAY);
    let developer = || person("dan", &["developers"]);
    let dry = rotate_due(&house.rotations, developer(), None, true).await.unwrap();
    assert_eq!((dry.total, dry.done, dry.overs.len()), (3, 3, 3), "what another may rotate is left out");
    for (id, over) in dry.overs {
        assert!(ours.contains(&id) && matches!(over, Over::Skipped { until } if until == due_at), "{over:?}");
        assert_eq!(house.described(&id).await.versions(), 1, "nothing was done");
    }
    let round = rotate_due(&house.rotations, developer(), None, false).await.unwrap();
    assert_eq!((round.total, round.done), (3, 3));
    round.overs.iter().for_each(|(_, over)| drop(token_of(over)));
    let nowhere = rotate_due(&house.rotations, developer(), Some("production"), false).await;
    assert_eq!(reason(nowhere.map(|_| ())), Reason::Denied, "a job that can do nothing must not look well");
    let cron = program("nightly", &["cron"]);
    let unknown = rotate_due(&house.rotations, cron, Some("no-such-place"), false).await;
    assert_eq!(reason(unknown.map(|_| ())), Reason::EnvironmentNotFound);
    for id in &theirs {
        assert_eq!(house.described(id).await.versions(), 1);
    }
    let records = house.end().await;
    let refused: Vec<_> = records
        .iter()
        .filter(|r| r["operation"] == "rotate_due" && r["outcome"] == "denied")
        .map(|r| r["detail"].as_str().unwrap())
        .collect();
    assert_eq!(refused.len(), 3, "once for each round: {refused:?}");
    assert!(refused[0].contains("2 of 5") && refused[0].contains("production:s-0001"), "{}", refused[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_production_a_person_needs_approvals_and_a_cron_does_not() {
    let house = House::start().await;
    let api = id("production", "api");
    house.set(&api, &daily()).await;
    for call in [person("lea", &["leads"]), administrator()] {
        assert_eq!(reason(rotate(&house.rotations, call.clone(), &api).await), Reason::ApprovalRequired);
        assert_eq!(reason(house.rotations.pause(&call, api.clone()).await), Reason::ApprovalRequired);
    }
    let cron = || program("nightly", &["cron"]);
    assert_eq!(reason(house.rotations.set(&cron(), api.clone(), &daily()).await), Reason::Denied);
    assert_eq!(reason(house.rotations.remove(&cron(), api.clone()).await), Reason::Denied);
    assert_eq!(reason(get(&house.running, &cron(), api.clone()).await.map(|_| ())), Reason::Denied);
    assert_eq!(reason(rotate(&house.rotations, person("eve", &["team"]), &api).await), Reason::Denied);
    assert_eq!(house.described(&api).await.versions(), 1);
    rotate(&house.rotations, cron(), &api).await.unwrap();
    assert_eq!(house.described(&api).await.versions(), 2);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_step_is_on_record_as_the_engine_s_with_whoever_asked() {
    let house = House::start().await;
    let api = id("production", "api");
    house.set(&api, &daily()).await;
    let cron = program("nightly", &["cron"]);
    let request = cron.request_id.clone();
    let token = token_of(&rotate(&house.rotations, cron, &api).await.unwrap());
    let value = house.value(&api).await;
    let records = house.end().await;
    let asked: Vec<_> = records
        .iter()
        .filter(|r| r["principal"] == r#"Workload::"nightly""# && r["operation"] == "rotate")
        .collect();
    assert_eq!((&asked[0]["kind"], &asked[1]["kind"]), (&"intent".into(), &"access".into()));
    assert_eq!((&asked[1]["outcome"], asked.len()), (&"ok".into(), 2));
    let steps: Vec<_> =
        records.iter().filter(|r| r["principal"] == r#"Workload::"rotation-engine""#).collect();
    for step in &steps {
        let reason = step["reason"].as_str().unwrap();
        assert!(reason.contains(r#"Workload::"nightly""#) && reason.contains(&*request), "{reason}");
        assert_eq!((&step["decision"], &step["secret"]), (&"allow".into(), &"api".into()));
    }
    for operation in ["rotate.create", "rotate.finish"] {
        let step: Vec<_> = steps.iter().filter(|step| step["operation"] == operation).collect();
        assert_eq!((&step[0]["kind"], &step[1]["kind"]), (&"intent".into(), &"access".into()), "{operation}");
        assert_eq!(step[1]["version_id"], token.as_str(), "{operation}");
    }
    assert!(records.iter().all(|record| !record.to_string().contains(&value)), "and no value");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scheduler_rotates_what_is_due_and_takes_up_at_once_what_is_resumed() {
    let house = House::start().await;
    let (api, root) = (id("development", "api"), administrator());
    house.set(&api, &random("every 30d", 32)).await;
    let clockwork = house.schedule();
    house.looked().await;
    assert_eq!(figure(&house.rotations.figures().health, "idle"), 1);
    house.clock.advance(30 * DAY - Duration::from_secs(30));
    house.looked().await;
    assert_eq!(rotated(&house.rotations), 0);
    house.clock.advance(Duration::from_secs(30));
    until_is("rotated", 1, async || rotated(&house.rotations)).await;
    assert_eq!(house.record(&api).await.history.last().unwrap().asked_by, "schedule");

    let broker = &house.running.broker;
    house.clock.advance(29 * DAY);
    broker.delete(&root, api.clone(), RecoveryWindow::DEFAULT).await.unwrap();
    house.clock.advance(DAY);
    until_is("blocked", 1, async || blocked(&house)).await;
    assert_eq!(figure(&house.rotations.figures().failures, "secret_deleted"), 1);
    broker.restore(&root, api.clone()).await.unwrap();
    house.looked().await;
    assert_eq!(rotated(&house.rotations), 1, "it is looked at again rarely");
    house.rotations.resume(&root, api.clone()).await.unwrap();
    until_is("rotated", 2, async || rotated(&house.rotations)).await;
    until_is("blocked", 0, async || blocked(&house)).await;
    clockwork.end().await;
    house.end().await;
}
