//! Watches: everything that becomes current is told, to whoever may know it, in order, on record, and to nobody for ever.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::future::pending;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use claviger::broker::consumers::{ConsumerName, NAMES_PER_PRINCIPAL, VersionInUse};
use claviger::broker::watch::{Bounds, Event, PATIENCE, Subject, Told, WatchRequest, Watching};
use claviger::broker::{Broker, Call};
use claviger::clock::ManualClock;
use claviger::config::Resolved;
use claviger::config::assembly::Running;
use claviger::error::{Reason, Reasoned};
use claviger::identity::{Principal, PrincipalKind, Proof, SourceAddress};
use claviger::policy::PolicySource;
use claviger::proto::v1;
use claviger::proto::v1::secret_service_client::SecretServiceClient;
use claviger::proto::v1::watch_secrets_response::Event as Wire;
use claviger::secret::{Label, LabelMove, SecretName, VersionId};
use claviger::server::{Limits, Listen};
use claviger::store::RecoveryWindow;
use futures_util::future::join_all;
use rustix::process::Signal;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_types::StatusExt as _;

use crate::floods::{heard, mute_watch, until_closed};
use crate::support::assembled::{administrator, clock, id, put, records, resolved, start};
use crate::support::moto::Moto;
use crate::support::program::{Program, Served};
use crate::support::{channel, secrets};

/// When a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);

async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(HUNG, work).await.expect("it does not hang")
}

/// A caller whose proof is none that the broker would have to know.
fn caller(kind: PrincipalKind, name: &str, groups: &[&str]) -> Call {
    let groups: BTreeSet<_> = groups.iter().map(ToString::to_string).collect();
    let proof = Proof { method: "peer_credentials", detail: "uid=7".to_owned() };
    Call {
        principal: Arc::new(Principal::new(kind, name, groups, BTreeMap::new(), proof)),
        source_address: SourceAddress::Unix { pid: Some(1) },
        request_id: VersionId::generate().to_string().into(),
        reason: None,
    }
}

fn ana() -> Call {
    caller(PrincipalKind::User, "ana", &["team"])
}

fn names(names: &[&str]) -> Subject {
    Subject::Names(names.iter().map(|name| SecretName::parse(name).unwrap()).collect())
}

fn asked(subject: Subject) -> WatchRequest {
    WatchRequest {
        environment: "development".parse().unwrap(),
        subject,
        consumer: ConsumerName::parse("orders-1").unwrap(),
        after: 0,
        with_values: true,
    }
}

async fn watch(broker: &Arc<Broker>, subject: Subject) -> Watching {
    broker.watch(&ana(), asked(subject)).await.unwrap()
}

async fn next(watching: &mut Watching) -> Told {
    soon(watching.next(pending())).await.unwrap()
}

/// What was told, in short: `changed a=value`, `gone a`, `problem a REASON`, `started 2`, `progress`.
fn short(told: &Told) -> String {
    match &told.event {
        Event::Started { secrets } => format!("started {secrets}"),
        Event::Changed { secret, .. } => {
            let value = secret.value.as_ref().map_or("-", |value| value.expose_text().unwrap());
            format!("changed {}={value}", secret.id.name)
        }
        Event::Gone(id) => format!("gone {}", id.name),
        Event::Problem { id, error } => format!("problem {} {}", id.name, error.reason()),
        Event::Progress => "progress".to_owned(),
    }
}

async fn hear(watching: &mut Watching) -> String {
    short(&next(watching).await)
}

async fn write(running: &Running, name: &str, value: &str) -> VersionId {
    put(running, id("development", name), value).await.unwrap().version.id
}

/// A second watcher that hears of nothing but `mark`: once it was told of a mark, all that was written before is known
/// to every watcher.
struct Marks {
    watching: Watching,
    written: u32,
}

impl Marks {
    async fn new(running: &Running) -> Self {
        let mut watching = watch(&running.broker, names(&["mark"])).await;
        assert_eq!(hear(&mut watching).await, "started 1");
        assert_eq!(hear(&mut watching).await, "gone mark");
        Self { watching, written: 0 }
    }

    async fn pass(&mut self, running: &Running) {
        self.written += 1;
        write(running, "mark", &self.written.to_string()).await;
        let expected = format!("changed mark={}", self.written);
        while hear(&mut self.watching).await != expected {}
    }
}

/// The shipped policies in a folder, and a file of its own for a test.
fn with_policies(folder: &Path) -> (Resolved, PathBuf) {
    let policies = folder.join("policies");
    fs::create_dir(&policies).unwrap();
    for (file, text) in claviger::policy::SHIPPED {
        fs::write(policies.join(file), text).unwrap();
    }
    let mut resolved = resolved(folder);
    resolved.policy = PolicySource::Directory(policies.clone());
    (resolved, policies.join("zz.cedar"))
}

const W_READS: &str = r#"@id("w-reads") permit (principal == Workload::"w", action in [Action::"read", Action::"list"],
    resource in Environment::"development");"#;
const NO_A: &str = r#"@id("no-a") forbid (principal == Workload::"w", action == Action::"read",
    resource == Secret::"development:a");"#;

fn w() -> Call {
    caller(PrincipalKind::Workload, "w", &[])
}

#[tokio::test(flavor = "multi_thread")]
async fn every_watcher_is_told_in_order_with_a_revision_that_only_grows() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    write(&running, "a", "1").await;
    let mut watchers = Vec::new();
    for _ in 0..3 {
        watchers.push(watch(&running.broker, names(&["a", "b"])).await);
    }
    for watching in &mut watchers {
        let told = next(watching).await;
        assert_eq!(short(&told), "started 2");
        let first: BTreeSet<_> = [hear(watching).await, hear(watching).await].into();
        assert_eq!(first, ["changed a=1".to_owned(), "gone b".to_owned()].into());
    }
    write(&running, "b", "2").await;
    write(&running, "unwatched", "x").await;
    write(&running, "a", "3").await;
    for watching in &mut watchers {
        let (b, a) = (next(watching).await, next(watching).await);
        assert_eq!((short(&b), short(&a)), ("changed b=2".to_owned(), "changed a=3".to_owned()));
        assert!(b.revision <= a.revision && b.revision > 0);
        let Event::Changed { secret, skipped } = a.event else { panic!("a change") };
        assert_eq!((secret.version.labels, skipped), (vec![Label::Current], 0));
    }
    assert_eq!(running.broker.feed().figures().live, 3);
    drop(watchers);
    assert_eq!(running.broker.feed().figures().live, 0);
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_covers_what_comes_to_be_later() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    write(&running, "team/a", "1").await;
    write(&running, "other", "1").await;
    let mut watching = watch(&running.broker, Subject::Prefix("team/".to_owned())).await;
    assert_eq!(hear(&mut watching).await, "started 1");
    assert_eq!(hear(&mut watching).await, "changed team/a=1");
    write(&running, "other", "2").await;
    write(&running, "team/new", "2").await;
    assert_eq!(hear(&mut watching).await, "changed team/new=2");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_that_are_not_asked_for_become_one() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    write(&running, "a", "first").await;
    let mut marks = Marks::new(&running).await;
    let mut watching = watch(&running.broker, names(&["a"])).await;
    assert_eq!(hear(&mut watching).await, "started 1");
    assert_eq!(hear(&mut watching).await, "changed a=first");
    for n in 0..100 {
        write(&running, "a", &n.to_string()).await;
    }
    marks.pass(&running).await;
    let told = next(&mut watching).await;
    assert_eq!(short(&told), "changed a=99");
    assert!(matches!(told.event, Event::Changed { skipped: 99, .. }), "{told:?}");
    assert_eq!(running.broker.feed().figures().coalesced, 99);
    running.stop().await.unwrap();
}

/// Numbers that look random and are the same each time.
fn dice(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    move |sides| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % sides
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_back_after_a_revision_misses_nothing() {
    const NAMES: [&str; 4] = ["a", "b", "c", "d"];
    for seed in 0..6 {
        let folder = tempfile::tempdir().unwrap();
        let running = start(&resolved(folder.path()), clock()).await.unwrap();
        let (wrote, done) = tokio::sync::watch::channel(None);
        let writer = async {
            let (mut dice, mut last) = (dice(seed), BTreeMap::new());
            for n in 0..40 {
                let name = NAMES[dice(4) as usize];
                write(&running, name, &n.to_string()).await;
                last.insert(name.to_owned(), n.to_string());
            }
            wrote.send(Some(last)).unwrap();
        };
        let watcher = async {
            let (mut dice, mut seen, mut after) = (dice(seed + 100), BTreeMap::new(), 0);
            loop {
                let request = WatchRequest { after, ..asked(names(&NAMES)) };
                let mut watching = running.broker.watch(&ana(), request).await.unwrap();
                // The last connection stays until everything was seen.
                let last = done.borrow().clone();
                for _ in 0..1 + dice(6) {
                    let mut stop = done.clone();
                    let stopped = async move { drop(stop.wait_for(Option::is_some).await) };
                    let told = match &last {
                        Some(last) if seen == *last => return seen,
                        Some(_) => watching.next(pending()).await,
                        None => watching.next(stopped).await,
                    };
                    let Ok(told) = told else { break };
                    assert!(told.revision >= after, "seed {seed}: back from {after} to {}", told.revision);
                    after = told.revision;
                    if let Event::Changed { secret, .. } = told.event {
                        let value = secret.value.unwrap().expose_text().unwrap().to_owned();
                        seen.insert(secret.id.name.to_string(), value);
                    }
                }
            }
        };
        let ((), seen) = soon(async { tokio::join!(writer, watcher) }).await;
        assert_eq!(Some(seen), *done.borrow(), "seed {seed}");
        running.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_revision_only_what_changed_since_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    write(&running, "a", "1").await;
    write(&running, "b", "1").await;
    let mut watching = watch(&running.broker, names(&["a", "b"])).await;
    let mut after = 0;
    for expected in ["started 2", "changed a=1", "changed b=1"] {
        let told = next(&mut watching).await;
        assert_eq!(short(&told), expected);
        after = told.revision;
    }
    drop(watching);
    write(&running, "b", "2").await;
    let again = |after| WatchRequest { after, ..asked(names(&["a", "b"])) };
    let mut watching = running.broker.watch(&ana(), again(after)).await.unwrap();
    assert_eq!(hear(&mut watching).await, "started 2");
    assert_eq!(hear(&mut watching).await, "changed b=2");
    // A revision that is still to come is another store's: everything is told as it is.
    let mut watching = running.broker.watch(&ana(), again(u64::MAX)).await.unwrap();
    for expected in ["started 2", "changed a=1", "changed b=2"] {
        let told = next(&mut watching).await;
        assert_eq!(short(&told), expected);
        assert!(told.revision < 1_000_000);
    }
    running.stop().await.unwrap();

    // And after a restart, which remembers no watch.
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    let mut watching = running.broker.watch(&ana(), again(after)).await.unwrap();
    assert_eq!(hear(&mut watching).await, "started 2");
    assert_eq!(hear(&mut watching).await, "changed b=2");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_not_be_read_is_a_problem_and_all_of_it_a_refusal() {
    let folder = tempfile::tempdir().unwrap();
    let (resolved, policy) = with_policies(folder.path());
    fs::write(&policy, format!("{W_READS}\n{NO_A}")).unwrap();
    let running = start(&resolved, clock()).await.unwrap();
    write(&running, "a", "1").await;
    write(&running, "b", "1").await;
    let error = running.broker.watch(&w(), asked(names(&["a"]))).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Denied);
    let mut watching = running.broker.watch(&w(), asked(names(&["a", "b"]))).await.unwrap();
    for expected in ["started 1", "problem a DENIED", "changed b=1"] {
        assert_eq!(hear(&mut watching).await, expected);
    }
    write(&running, "a", "2").await;
    write(&running, "b", "2").await;
    assert_eq!(hear(&mut watching).await, "changed b=2", "it was said once that a is not for this one");
    // Under a prefix nothing is said of it, and without leave to list there is no prefix.
    let everything = Subject::Prefix(String::new());
    let mut watching = running.broker.watch(&w(), asked(everything.clone())).await.unwrap();
    for expected in ["started 1", "changed b=2"] {
        assert_eq!(hear(&mut watching).await, expected);
    }
    let service = caller(PrincipalKind::Workload, "s", &["service-development"]);
    let error = running.broker.watch(&service, asked(everything)).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Denied);
    let undeclared = WatchRequest { environment: "no-such-place".parse().unwrap(), ..asked(names(&["a"])) };
    let error = running.broker.watch(&w(), undeclared.clone()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Denied, "absent and forbidden look alike");
    let root = caller(PrincipalKind::User, "root", &["administrators"]);
    let error = running.broker.watch(&root, undeclared).await.unwrap_err();
    assert_eq!(error.reason(), Reason::EnvironmentNotFound);
    running.stop().await.unwrap();
    let denied = records(folder.path())
        .into_iter()
        .filter(|record| record["operation"] == "watch" && record["outcome"] == "denied")
        .count();
    assert_eq!(denied, 3 + 1 + 1, "three starts withheld a, one list and one environment were refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn policy_is_asked_with_every_push() {
    let folder = tempfile::tempdir().unwrap();
    let (resolved, policy) = with_policies(folder.path());
    fs::write(&policy, W_READS).unwrap();
    let running = start(&resolved, clock()).await.unwrap();
    write(&running, "a", "1").await;
    write(&running, "b", "1").await;
    let mut watching = running.broker.watch(&w(), asked(names(&["a", "b"]))).await.unwrap();
    for expected in ["started 2", "changed a=1", "changed b=1"] {
        assert_eq!(hear(&mut watching).await, expected);
    }
    fs::write(&policy, format!("{W_READS}\n{NO_A}")).unwrap();
    running.broker.reload_policy(&administrator()).await.unwrap();
    write(&running, "a", "2").await;
    assert_eq!(hear(&mut watching).await, "problem a DENIED");
    for n in ["3", "4"] {
        write(&running, "a", n).await;
        write(&running, "b", n).await;
        assert_eq!(hear(&mut watching).await, format!("changed b={n}"), "said once");
    }
    fs::write(&policy, W_READS).unwrap();
    running.broker.reload_policy(&administrator()).await.unwrap();
    write(&running, "a", "5").await;
    assert_eq!(hear(&mut watching).await, "changed a=5");
    running.stop().await.unwrap();
    let denied = records(folder.path())
        .into_iter()
        .filter(|record| record["operation"] == "watch" && record["outcome"] == "denied")
        .count();
    assert_eq!(denied, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_and_comes_back_is_told_and_what_stays_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    let root = caller(PrincipalKind::User, "root", &["administrators"]);
    let first = write(&running, "a", "1").await;
    let second = write(&running, "a", "2").await;
    let mut watching = watch(&running.broker, names(&["a", "b"])).await;
    assert_eq!(hear(&mut watching).await, "started 2");
    let present: BTreeSet<_> = [hear(&mut watching).await, hear(&mut watching).await].into();
    assert_eq!(present, ["changed a=2".to_owned(), "gone b".to_owned()].into());

    let a = || id("development", "a");
    let label = |name: &str, to: &VersionId| LabelMove {
        label: Label::parse(name).unwrap(),
        from: None,
        to: Some(to.clone()),
    };
    running.broker.move_label(&root, a(), label("stable", &first)).await.unwrap();
    running.broker.move_label(&root, a(), label("newest", &second)).await.unwrap();
    write(&running, "b", "1").await;
    assert_eq!(hear(&mut watching).await, "changed b=1", "labels of the user's own are nobody's news");

    running.broker.rollback(&root, a(), None, None).await.unwrap();
    assert_eq!(hear(&mut watching).await, "changed a=1");
    running.broker.delete(&root, a(), RecoveryWindow::DEFAULT).await.unwrap();
    assert_eq!(hear(&mut watching).await, "gone a");
    running.broker.restore(&root, a()).await.unwrap();
    assert_eq!(hear(&mut watching).await, "changed a=1");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_told_before_its_record_and_values_only_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    let of_pushes = || -> Vec<_> {
        let pushed = |record: &serde_json::Value| {
            record["operation"] == "watch" && record["secret"] == "a" && !record["version_id"].is_null()
        };
        records(folder.path()).into_iter().filter(pushed).collect()
    };
    let mut open = watch(&running.broker, names(&["a", "b"])).await;
    let without = WatchRequest { with_values: false, ..asked(names(&["a", "b"])) };
    let mut closed = running.broker.watch(&ana(), without).await.unwrap();
    for watching in [&mut open, &mut closed] {
        for _ in 0..3 {
            hear(watching).await;
        }
    }
    for n in 1..=5_usize {
        let version = write(&running, "a", &n.to_string()).await;
        assert_eq!(hear(&mut open).await, format!("changed a={n}"));
        assert_eq!(of_pushes().len(), 2 * n - 1, "on record when it is told");
        assert_eq!(hear(&mut closed).await, "changed a=-");
        let told = of_pushes();
        assert_eq!(told.len(), 2 * n);
        let [.., with, without] = &told[..] else { panic!("two records") };
        assert_eq!((&with["outcome"], &without["outcome"]), (&"ok".into(), &"unchanged".into()));
        assert_eq!(with["detail"], "told to orders-1");
        assert_eq!(without["detail"], "told to orders-1 without its value");
        for record in [with, without] {
            assert_eq!(record["version_id"], version.as_str());
            assert_eq!((&record["action"], &record["decision"]), (&"read".into(), &"allow".into()));
            assert_eq!(record["labels"][0], "AWSCURRENT");
        }
    }
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn many_watchers_of_one_secret_have_a_record_each() {
    const WATCHERS: usize = 50;
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    let mut watchers = Vec::new();
    for _ in 0..WATCHERS {
        watchers.push(watch(&running.broker, names(&["a"])).await);
    }
    for watching in &mut watchers {
        assert_eq!(hear(watching).await, "started 1");
        assert_eq!(hear(watching).await, "gone a");
    }
    write(&running, "a", "1").await;
    for heard in join_all(watchers.iter_mut().map(hear)).await {
        assert_eq!(heard, "changed a=1");
    }
    running.stop().await.unwrap();
    let told = records(folder.path())
        .into_iter()
        .filter(|record| {
            record["operation"] == "watch" && record["outcome"] == "ok" && record["action"] == "read"
        })
        .count();
    assert_eq!(told, WATCHERS);
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_is_broken_and_moves_the_revision_on() {
    let folder = tempfile::tempdir().unwrap();
    let manual = clock();
    let running = start(&resolved(folder.path()), manual.clone()).await.unwrap();
    write(&running, "a", "1").await;
    let mut watching = watch(&running.broker, names(&["a"])).await;
    let mut after = 0;
    for _ in 0..2 {
        after = next(&mut watching).await.revision;
    }
    // What changes in another environment is none of this watcher's business, but the revision counts it too.
    put(&running, id("staging", "a"), "1").await.unwrap();
    let moved = async {
        loop {
            manual.advance(Duration::from_secs(15));
            running.broker.feed().sweep();
            let told = next(&mut watching).await;
            assert_eq!(short(&told), "progress");
            assert!(told.revision >= after);
            if told.revision > after {
                return;
            }
        }
    };
    soon(moved).await;
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn b29_a_watcher_that_does_not_ask_loses_its_seat_and_is_told_why() {
    let folder = tempfile::tempdir().unwrap();
    let manual = clock();
    let running = start(&resolved(folder.path()), manual.clone()).await.unwrap();
    let mut marks = Marks::new(&running).await;
    let mut idle = watch(&running.broker, names(&["a"])).await;
    let mut quiet = watch(&running.broker, names(&["quiet"])).await;
    for watching in [&mut idle, &mut quiet] {
        for _ in 0..2 {
            hear(watching).await;
        }
    }
    write(&running, "a", "1").await;
    marks.pass(&running).await;
    manual.advance(PATIENCE - Duration::from_secs(1));
    running.broker.feed().sweep();
    assert_eq!(running.broker.feed().figures().live, 3);
    manual.advance(Duration::from_secs(1));
    running.broker.feed().sweep();
    let figures = running.broker.feed().figures();
    assert_eq!((figures.live, figures.ended_slow), (2, 1), "who is owed nothing may be as slow as it likes");
    let error = soon(idle.next(pending())).await.unwrap_err();
    assert_eq!(error.reason(), Reason::SlowConsumer);
    drop(idle);
    assert_eq!(running.broker.feed().figures().live, 2, "freed once");
    assert_eq!(hear(&mut quiet).await, "progress");
    running.stop().await.unwrap();
}

/// A broker in this process behind a real socket.
async fn serving(folder: &Path, manual: &Arc<ManualClock>) -> (Arc<Broker>, PathBuf, Serving) {
    let mut resolved = resolved(folder);
    resolved.peers.callers.push(claviger::identity::peer_credentials::Caller {
        uid: rustix::process::getuid().as_raw(),
        kind: PrincipalKind::User,
        id: "ana".to_owned(),
        groups: ["team".to_owned()].into(),
    });
    let running = start(&resolved, manual.clone()).await.unwrap();
    let broker = Arc::clone(&running.broker);
    let socket = folder.join("s.sock");
    let door = Listen::Unix { path: socket.clone(), mode: 0o600 }.bind().await.unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let task = tokio::spawn(running.serve(vec![door], Limits::default(), stopped));
    (broker, socket, Serving { stop, task })
}

struct Serving {
    stop: tokio::sync::watch::Sender<bool>,
    task: tokio::task::JoinHandle<Result<(), claviger::config::assembly::StartError>>,
}

impl Serving {
    async fn end(self) {
        self.stop.send(true).unwrap();
        soon(self.task).await.unwrap().unwrap();
    }
}

/// A connection that takes no more than 64 KiB that nobody reads.
async fn narrow(socket: &Path) -> SecretServiceClient<Channel> {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://localhost").initial_stream_window_size(65_535);
    SecretServiceClient::new(endpoint.connect_with_connector(connector).await.unwrap())
}

fn request(names: &[&str]) -> v1::WatchSecretsRequest {
    v1::WatchSecretsRequest {
        environment: "development".to_owned(),
        names: names.iter().map(ToString::to_string).collect(),
        consumer: "orders-1".to_owned(),
        with_values: true,
        ..Default::default()
    }
}

async fn write_through(broker: &Broker, name: &str, value: String) {
    let value = claviger::secret::SecretValue::text(value).unwrap();
    let put =
        claviger::store::Put { value, token: VersionId::generate(), labels: Vec::new(), expected: None };
    broker.put(&administrator(), id("development", name), put, false).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn b29_a_slow_reader_over_the_wire_costs_its_seat_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let manual = clock();
    let (broker, socket, serving) = serving(folder.path(), &manual).await;
    write_through(&broker, "a", "first".to_owned()).await;
    let mut client = narrow(&socket).await;
    let mut stream = client.watch_secrets(request(&["a"])).await.unwrap().into_inner();
    // Nobody reads; sooner or later what is in flight fills the window, and the watch is not asked any more.
    let mut written = 0;
    while broker.feed().figures().ended_slow == 0 {
        assert!(written < 100, "a reader that does not read is noticed");
        written += 1;
        write_through(&broker, "a", format!("{written:060000}")).await;
        manual.advance(PATIENCE + Duration::from_secs(1));
        broker.feed().sweep();
    }
    assert_eq!(broker.feed().figures().live, 0, "the seat is free although the stream was never read");
    let ended = soon(async {
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it does not end in peace"),
                Err(status) => return status,
            }
        }
    })
    .await;
    assert_eq!(ended.code(), Code::ResourceExhausted, "{ended:?}");
    assert_eq!(ended.get_details_error_info().unwrap().reason, "SLOW_CONSUMER");
    serving.end().await;
}

/// From now on no more watches than these.
fn bound(running: &Running, bounds: Bounds) {
    drop(running.broker.feed().clone().with_bounds(bounds));
}

/// What one more watch is refused with.
async fn refused(running: &Running, subject: Subject) -> String {
    let error = running.broker.watch(&ana(), asked(subject)).await.unwrap_err();
    assert_eq!(error.reason(), Reason::LimitExceeded, "{error}");
    error.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_principal_has_so_many_watches_and_gets_each_back_as_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    bound(&running, Bounds { per_principal: 2, ..Bounds::default() });
    let one = watch(&running.broker, names(&["a"])).await;
    let two = watch(&running.broker, Subject::Prefix("x".to_owned())).await;
    let message = refused(&running, names(&["a"])).await;
    for part in ["User::\"ana\"", "has 2 watches", "end one", "raise listen.watches_per_caller"] {
        assert!(message.contains(part), "{message}");
    }
    let other = caller(PrincipalKind::Workload, "s", &["service-development"]);
    let others = running.broker.watch(&other, asked(names(&["a"]))).await.unwrap();
    assert_eq!(running.broker.feed().figures().live, 3);
    drop(one);
    let three = watch(&running.broker, names(&["a"])).await;
    refused(&running, names(&["a"])).await;
    drop((two, three, others));
    assert_eq!(running.broker.feed().figures().live, 0);
    running.stop().await.unwrap();
    let failed = records(folder.path())
        .into_iter()
        .filter(|record| record["operation"] == "watch" && record["outcome"] == "failed")
        .count();
    assert_eq!(failed, 2, "a refused watch is on record");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_principal_watches_so_many_names_whether_it_names_them_or_a_prefix_covers_them() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    bound(&running, Bounds { names_per_principal: 3, ..Bounds::default() });
    let mut two = watch(&running.broker, names(&["a", "b"])).await;
    let message = refused(&running, names(&["c", "d"])).await;
    for part in ["would watch 4 names", "may watch 3", "watch fewer names"] {
        assert!(message.contains(part), "{message}");
    }
    for name in ["team/1", "team/2"] {
        write(&running, name, "v").await;
    }
    let team = || Subject::Prefix("team/".to_owned());
    // The watch of `a` and `b` knows of all that was written once it was told of this.
    write(&running, "a", "v").await;
    while hear(&mut two).await != "changed a=v" {}
    refused(&running, team()).await;
    drop(two);

    // A prefix that grows over the bound ends, with the reason, and what it was not told is still to come.
    let mut watching = watch(&running.broker, team()).await;
    for expected in ["started 2", "changed team/1=v", "changed team/2=v"] {
        assert_eq!(hear(&mut watching).await, expected);
    }
    write(&running, "team/3", "v").await;
    let told = next(&mut watching).await;
    assert_eq!(short(&told), "changed team/3=v");
    let after = told.revision;
    write(&running, "team/4", "v").await;
    let error = soon(watching.next(pending())).await.unwrap_err();
    assert_eq!(error.reason(), Reason::LimitExceeded, "{error}");
    running.broker.feed().sweep();
    let figures = running.broker.feed().figures();
    assert_eq!(
        (figures.live, figures.ended_slow),
        (0, 0),
        "its seat is free although it still has the watch"
    );
    drop(watching);
    bound(&running, Bounds::default());
    let again = WatchRequest { after, ..asked(team()) };
    let mut watching = running.broker.watch(&ana(), again).await.unwrap();
    assert_eq!(hear(&mut watching).await, "started 4");
    while hear(&mut watching).await != "changed team/4=v" {}
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn all_watches_together_hold_so_much() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    bound(&running, Bounds { bytes: 100_000, ..Bounds::default() });
    let long = "x".repeat(512);
    let subject = || names(&[long.as_str()]);
    let other = caller(PrincipalKind::Workload, "s", &["service-development"]);
    let mut open = Vec::new();
    let error = loop {
        assert!(open.len() < 100, "there is a bound");
        let callers = [ana(), other.clone()];
        match running.broker.watch(&callers[open.len() % 2], asked(subject())).await {
            Ok(watching) => open.push(watching),
            Err(error) => break error,
        }
    };
    assert_eq!(error.reason(), Reason::LimitExceeded);
    let message = error.to_string();
    assert!(message.contains("may hold 100000") && message.contains("watch fewer names"), "{message}");
    assert!(open.len() > 10, "{}", open.len());
    open.pop();
    open.push(watch(&running.broker, subject()).await);
    refused(&running, subject()).await;
    drop(open);
    assert_eq!(running.broker.feed().figures().live, 0);
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bound_on_watches_is_configured_and_told_over_the_wire() {
    let folder = tempfile::tempdir().unwrap();
    let Served { program, .. } = Served::with(folder.path(), "watches_per_caller = 2", "");
    let mut client = secrets(&program.socket).await;
    let one = client.watch_secrets(request(&["a"])).await.unwrap();
    let _two = client.watch_secrets(request(&["a"])).await.unwrap();
    let status = client.watch_secrets(request(&["a"])).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert_eq!(status.get_details_error_info().unwrap().reason, "LIMIT_EXCEEDED");
    assert!(status.message().contains("raise listen.watches_per_caller"), "{status:?}");
    drop(one);
    soon(async { while client.watch_secrets(request(&["a"])).await.is_err() {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b28_ten_thousand_watches_come_and_go_and_nothing_stays() {
    const WATCHES: usize = 10_000;
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    bound(&running, Bounds::of_watches(WATCHES));
    write(&running, "a", "1").await;
    // The first watch starts what all share.
    drop(watch(&running.broker, names(&["a"])).await);
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    let mut watchers = Vec::with_capacity(WATCHES);
    while watchers.len() < WATCHES {
        let some = (0..500).map(|_| watch(&running.broker, names(&["a", "b"])));
        watchers.extend(soon(join_all(some)).await);
    }
    assert_eq!(running.broker.feed().figures().live, WATCHES as u64);
    assert!(tasks() < before + 100, "a watch is no task");
    write(&running, "a", "2").await;
    let mut last = watchers.pop().unwrap();
    assert_eq!(hear(&mut last).await, "started 2");
    drop((watchers, last));
    assert_eq!(running.broker.feed().figures().live, 0);
    soon(async {
        while tasks() > before {
            tokio::task::yield_now().await;
        }
    })
    .await;
    running.stop().await.unwrap();
}

/// How many files and sockets a process has open.
/// Without what the audit log prepares ahead when much is written.
fn open_files(program: &Program) -> usize {
    let open = fs::read_dir(format!("/proc/{}/fd", program.id().as_raw_nonzero())).unwrap();
    let name = |entry: std::io::Result<fs::DirEntry>| fs::read_link(entry.ok()?.path()).ok();
    open.filter_map(name).filter(|path| !path.to_string_lossy().contains("/audit/")).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn b28_ten_thousand_watches_over_forty_connections_leave_no_descriptor() {
    const CONNECTIONS: usize = 40;
    const STREAMS: usize = 250;
    let folder = tempfile::tempdir().unwrap();
    let Served { program, .. } = Served::with(folder.path(), "watches_per_caller = 20000", "");
    assert!(program.put("development", "database", b"v").status.success());
    let mut control = secrets(&program.socket).await;
    let ask = || v1::ListConsumersRequest {
        environment: "development".to_owned(),
        name: "database".to_owned(),
        ..Default::default()
    };
    assert!(control.list_consumers(ask()).await.unwrap().into_inner().consumers.is_empty());
    let before = open_files(&program);
    let connection = |number: usize| {
        let socket = program.socket.clone();
        async move {
            let client = secrets(&socket).await;
            let watch = |stream: usize| {
                let mut client = client.clone();
                let consumer = format!("c-{number}-{stream}");
                async move {
                    let request = v1::WatchSecretsRequest { consumer, ..request(&["database"]) };
                    let mut stream = client.watch_secrets(request).await.unwrap().into_inner();
                    for _ in 0..2 {
                        stream.message().await.unwrap().expect("started, and the secret as it is");
                    }
                    stream
                }
            };
            let streams = join_all((0..STREAMS).map(watch)).await;
            (client, streams)
        }
    };
    let opening = join_all((0..CONNECTIONS).map(connection));
    let open = tokio::time::timeout(HUNG * 5, opening).await.expect("it does not hang");
    assert_eq!(open.iter().map(|(_, streams)| streams.len()).sum::<usize>(), CONNECTIONS * STREAMS);
    let listed = control.list_consumers(ask()).await.unwrap().into_inner().consumers;
    assert!(listed.len() == 1_000 && listed.iter().all(|consumer| consumer.watching));
    assert!(open_files(&program) >= before + CONNECTIONS);
    drop(open);
    soon(async {
        loop {
            let listed = control.list_consumers(ask()).await.unwrap().into_inner().consumers;
            if listed.is_empty() && open_files(&program) <= before {
                return;
            }
        }
    })
    .await;
}

/// What a gauge of the HTTP door shows.
async fn gauge(served: &Served, name: &str) -> f64 {
    let (_, shown) = served.http("/metrics").await;
    let value = shown.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.expect("it is shown").trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn b28_ten_thousand_connections_with_a_watch_each_leave_no_descriptor_and_no_task() {
    const WAVES: usize = 40;
    const WAVE: usize = 250;
    // Less than one of each wave.
    const ROOM: usize = 16;
    let folder = tempfile::tempdir().unwrap();
    let bounds = "connections = 4096\nconnections_per_caller = 4096\nwatches_per_caller = 4096";
    let served = Served::with(folder.path(), bounds, "");
    assert!(served.program.put("development", "database", b"v").status.success());
    let asked = v1::WatchSecretsRequest { with_values: false, ..request(&["database"]) };
    let wave = |size: usize| {
        let mut open: Vec<_> = (0..size).map(|_| mute_watch(&served.program.socket, &asked)).collect();
        open.iter_mut().for_each(heard);
        open
    };
    // The first watch starts what all share.
    drop(wave(1));
    soon(async { while gauge(&served, "claviger_watches_open").await > 0.0 {} }).await;
    let files = open_files(&served.program) + ROOM;
    let tasks = gauge(&served, "claviger_tasks").await + ROOM as f64;
    for _ in 0..WAVES {
        let open = wave(WAVE);
        assert!(open_files(&served.program) >= WAVE);
        drop(open);
        // So that no wave meets the bounds of those before it.
        soon(async { while gauge(&served, "claviger_watches_open").await > 0.0 {} }).await;
    }
    soon(async {
        while open_files(&served.program) > files || gauge(&served, "claviger_tasks").await > tasks {}
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b28_a_peer_that_answers_no_ping_is_freed() {
    // Three times what it takes: twenty seconds until the ping, and ten for its answer.
    const FREED: Duration = Duration::from_secs(90);
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path());
    assert!(served.program.put("development", "database", b"v").status.success());
    let watch = || {
        let mut connection = mute_watch(&served.program.socket, &request(&["database"]));
        heard(&mut connection);
        connection
    };
    // The first watch starts what all share.
    drop(watch());
    soon(async { while gauge(&served, "claviger_watches_open").await > 0.0 {} }).await;
    let before = open_files(&served.program);
    let silent = watch();
    assert!(gauge(&served, "claviger_watches_open").await > 0.0);
    let closed = tokio::task::spawn_blocking(|| until_closed(silent));
    tokio::time::timeout(FREED, closed).await.expect("it is closed").unwrap();
    soon(async {
        while open_files(&served.program) > before || gauge(&served, "claviger_watches_open").await > 0.0 {}
    })
    .await;
}

/// What a stream tells next, but that it lives.
async fn told(stream: &mut tonic::Streaming<v1::WatchSecretsResponse>) -> Result<Wire, tonic::Status> {
    loop {
        let told = soon(stream.message()).await?.expect("a watch ends with an error");
        match told.event.expect("something happened") {
            Wire::Progress(_) => {}
            event => return Ok(event),
        }
    }
}

fn changed(event: Wire) -> v1::Secret {
    match event {
        Wire::Changed(changed) => changed.secret.unwrap(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn over_the_wire_a_put_is_told_with_its_value_and_a_shutdown_ends_the_watch() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::dev(folder.path());
    let mut client = secrets(&program.socket).await;
    let mut stream = client.watch_secrets(request(&["x"])).await.unwrap().into_inner();
    assert!(matches!(told(&mut stream).await.unwrap(), Wire::Started(v1::WatchStarted { secrets: 1 })));
    assert!(matches!(told(&mut stream).await.unwrap(), Wire::Gone(_)));
    assert!(program.put("development", "x", b"one").status.success());
    let secret = changed(told(&mut stream).await.unwrap());
    assert_eq!((secret.name.as_str(), secret.unchanged), ("x", false));
    assert_eq!(secret.payload.unwrap().data, "one");
    let quiet = v1::WatchSecretsRequest { with_values: false, ..request(&["x"]) };
    let mut quiet = client.watch_secrets(quiet).await.unwrap().into_inner();
    assert!(matches!(told(&mut quiet).await.unwrap(), Wire::Started(_)));
    let secret = changed(told(&mut quiet).await.unwrap());
    assert!(secret.payload.is_none() && !secret.unchanged && !secret.version_id.is_empty());

    for (bad, reason) in [
        (v1::WatchSecretsRequest { consumer: String::new(), ..request(&["x"]) }, "INVALID_ARGUMENT"),
        (v1::WatchSecretsRequest { prefix: "x".to_owned(), ..request(&["x"]) }, "INVALID_ARGUMENT"),
        (
            v1::WatchSecretsRequest { environment: "Prod".to_owned(), ..request(&["x"]) },
            "INVALID_ENVIRONMENT",
        ),
        (request(&["a//b"]), "INVALID_NAME"),
    ] {
        let status = client.watch_secrets(bad).await.unwrap_err();
        assert_eq!(status.get_details_error_info().unwrap().reason, reason, "{status}");
    }

    let ended = tokio::task::spawn_blocking(move || program.signal(Signal::TERM));
    for stream in [&mut stream, &mut quiet] {
        let status = told(stream).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    }
    assert!(soon(ended).await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_watch_of_a_revoked_token_ends_whether_or_not_anything_happens() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let token = program.ok(["token", "create", "--user", "ana", "--group", "team", "--expires", "1h"]);
    let mut client = secrets(&program.socket).await;
    let mut streams = Vec::new();
    for name in ["busy", "quiet"] {
        let mut request = tonic::Request::new(request(&[name]));
        let header = format!("Bearer {}", token.trim());
        request.metadata_mut().insert("authorization", header.parse().unwrap());
        let mut stream = client.watch_secrets(request).await.unwrap().into_inner();
        assert!(matches!(told(&mut stream).await.unwrap(), Wire::Started(_)));
        assert!(matches!(told(&mut stream).await.unwrap(), Wire::Gone(_)));
        streams.push(stream);
    }
    program.ok(["token", "revoke", token.trim()]);
    assert!(program.put("development", "busy", b"v").status.success());
    for mut stream in streams {
        let status = told(&mut stream).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
    }
    let ended = ["audit", "query", "--outcome", "unauthenticated", "--output", "json"];
    assert!(program.ok(ended).contains("\"watch\""), "the end of a credential is on record");
}

#[tokio::test(flavor = "multi_thread")]
async fn consumers_are_known_by_what_they_said_and_by_what_they_watch() {
    let folder = tempfile::tempdir().unwrap();
    let manual = clock();
    let running = start(&resolved(folder.path()), manual.clone()).await.unwrap();
    let first = write(&running, "a", "1").await;
    let said = |version: &VersionId| VersionInUse {
        id: id("development", "a"),
        consumer: ConsumerName::parse("orders-1").unwrap(),
        version_id: version.clone(),
    };
    assert!(running.broker.report_version_in_use(&ana(), said(&first)).await.unwrap());
    let second = write(&running, "a", "2").await;
    manual.advance(Duration::from_secs(3_600));
    assert!(!running.broker.report_version_in_use(&ana(), said(&first)).await.unwrap(), "no longer current");
    let other = caller(PrincipalKind::Workload, "s", &["service-development"]);
    let error = running.broker.report_version_in_use(&other, said(&second)).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Conflict);
    assert!(error.to_string().contains("User::\"ana\""), "{error}");
    let absent = VersionInUse { id: id("development", "nothing"), ..said(&first) };
    let error = running.broker.report_version_in_use(&ana(), absent).await.unwrap_err();
    assert_eq!(error.reason(), Reason::SecretNotFound);
    let stranger = caller(PrincipalKind::User, "eve", &[]);
    let error = running.broker.report_version_in_use(&stranger, said(&first)).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Denied);
    running.stop().await.unwrap();

    // What was said outlasts the broker; who watches does not.
    let running = start(&resolved(folder.path()), manual.clone()).await.unwrap();
    let of = || async { running.broker.consumers(&ana(), id("development", "a")).await.unwrap() };
    let listed = of().await;
    let [consumer] = &listed[..] else { panic!("one consumer") };
    let reported = consumer.reported.as_ref().unwrap();
    assert_eq!((consumer.name.as_str(), consumer.principal.as_str()), ("orders-1", "User::\"ana\""));
    assert_eq!((&reported.version_id, consumer.current, consumer.watching), (&first, false, false));
    assert_eq!(reported.reported_at.as_second() - reported.since.as_second(), 3_600);
    let watching = watch(&running.broker, names(&["a"])).await;
    let web = WatchRequest { consumer: ConsumerName::parse("web").unwrap(), ..asked(names(&["a"])) };
    let web = running.broker.watch(&other, web).await.unwrap();
    assert!(running.broker.report_version_in_use(&ana(), said(&second)).await.unwrap());
    let seen: Vec<_> = of()
        .await
        .into_iter()
        .map(|consumer| {
            (consumer.name.to_string(), consumer.reported.is_some(), consumer.current, consumer.watching)
        })
        .collect();
    assert_eq!(seen, [("orders-1".to_owned(), true, true, true), ("web".to_owned(), false, false, true)]);
    drop((watching, web));
    assert_eq!(of().await.iter().filter(|consumer| consumer.watching).count(), 0);
    running.stop().await.unwrap();
    let records = records(folder.path());
    let reports = records.iter().filter(|r| r["operation"] == "report_version" && r["kind"] == "access");
    let ends: Vec<_> = reports.map(|record| record["outcome"].as_str().unwrap()).collect();
    assert_eq!(ends, ["ok", "ok", "failed", "not_found", "denied", "ok"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_watches_is_listed_before_who_only_reported_under_however_many_names() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    let version = write(&running, "a", "1").await;
    let said = |n: usize| VersionInUse {
        id: id("development", "a"),
        consumer: ConsumerName::parse(&format!("made-up-{n:02}")).unwrap(),
        version_id: version.clone(),
    };
    for n in 0..NAMES_PER_PRINCIPAL {
        assert!(running.broker.report_version_in_use(&ana(), said(n)).await.unwrap());
    }
    let error = running.broker.report_version_in_use(&ana(), said(NAMES_PER_PRINCIPAL)).await.unwrap_err();
    assert_eq!(error.reason(), Reason::LimitExceeded);
    assert!(error.to_string().contains("report under fewer names"), "{error}");
    let other = caller(PrincipalKind::Workload, "s", &["service-development"]);
    let web = WatchRequest { consumer: ConsumerName::parse("web").unwrap(), ..asked(names(&["a"])) };
    let _web = running.broker.watch(&other, web).await.unwrap();
    let listed = running.broker.consumers(&ana(), id("development", "a")).await.unwrap();
    let shown: Vec<_> = listed.iter().map(|one| (one.name.as_str(), one.watching)).collect();
    assert_eq!(shown.len(), NAMES_PER_PRINCIPAL + 1);
    assert_eq!(shown[..2], [("web", true), ("made-up-00", false)]);
    running.stop().await.unwrap();
}

#[test]
fn people_watch_and_list_consumers_from_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let lines = |arguments: &[&str], count: usize| {
        let mut command = program.command(["watch", "-e", "development", "database"]);
        let mut child = command.args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let lines: Vec<_> = stdout.lines().take(count).map(Result::unwrap).collect();
        let listed = program.ok(["consumers", "-e", "development", "database", "--output", "json"]);
        child.kill().unwrap();
        child.wait().unwrap();
        (lines, serde_json::from_str::<serde_json::Value>(&listed).unwrap())
    };
    let json = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap();
    let (shown, listed) = lines(&[], 2);
    assert!(
        shown[0].ends_with("started 1 secrets") && shown[1].contains("changed database version"),
        "{shown:?}"
    );
    let listed = &listed["consumers"][0];
    assert_eq!((&listed["name"], &listed["watching"]), (&"claviger-watch".into(), &true.into()));
    assert!(listed["version_id"].is_null());
    let (shown, _) = lines(&["--output", "json"], 2);
    assert_eq!(json(&shown[1])["event"], "changed");
    assert!(json(&shown[1]).get("value").is_none());
    let (shown, _) = lines(&["--output", "json", "--values"], 2);
    assert!(json(&shown[1])["value"].as_str().unwrap().contains("password"));
    program.fails(2, ["watch", "-e", "development", "--values"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_without_revisions_is_watched_too() {
    let moto = Moto::start().await;
    let folder = tempfile::tempdir().unwrap();
    let unique = uuid::Uuid::new_v4();
    let text = format!(
        r#"
[listen]
unix = "{socket}"
[kv]
directory = "{data}"
[root_key]
file = "{key}"
[policy]
directory = "{policies}"
[[identity.peer_credentials.callers]]
uid = {uid}
kind = "user"
id = "tester"
groups = ["administrators", "team"]
[environments.development]
store = "aws"
ttl = "1s"
[environments.development.aws]
region = "eu-central-1"
endpoint = "{endpoint}"
name_template = "{unique}/{{environment}}/{{name}}"
"#,
        socket = folder.path().join("broker.sock").display(),
        data = folder.path().join("data").display(),
        key = folder.path().join("root.key").display(),
        policies = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies").display(),
        uid = rustix::process::getuid().as_raw(),
        endpoint = moto.endpoint(),
    );
    let config = folder.path().join("broker.toml");
    fs::write(&config, text).unwrap();
    let credentials = [
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ];
    let program = Program::serve(&config, &folder.path().join("broker.sock"), &credentials);
    assert!(program.put("development", "x", b"one").status.success());
    let mut client = SecretServiceClient::new(channel(&program.socket).await);
    let mut by_name = client.watch_secrets(request(&["x"])).await.unwrap().into_inner();
    let mut by_prefix = client.watch_secrets(request(&[])).await.unwrap().into_inner();
    let value = |secret: v1::Secret| (secret.name, secret.payload.unwrap().data);
    for stream in [&mut by_name, &mut by_prefix] {
        assert!(matches!(told(stream).await.unwrap(), Wire::Started(v1::WatchStarted { secrets: 1 })));
        assert_eq!(value(changed(told(stream).await.unwrap())), ("x".to_owned(), "one".into()));
    }
    // Through the broker: told at once.
    assert!(program.put("development", "x", b"two").status.success());
    for stream in [&mut by_name, &mut by_prefix] {
        assert_eq!(value(changed(told(stream).await.unwrap())), ("x".to_owned(), "two".into()));
    }
    // Behind its back: told with the next look.
    let secret_id = format!("{unique}/development/x");
    moto.client().put_secret_value().secret_id(&secret_id).secret_string("three").send().await.unwrap();
    for stream in [&mut by_name, &mut by_prefix] {
        assert_eq!(value(changed(told(stream).await.unwrap())), ("x".to_owned(), "three".into()));
    }
    program.ok(["delete", "-e", "development", "x", "--yes"]);
    for stream in [&mut by_name, &mut by_prefix] {
        assert!(matches!(told(stream).await.unwrap(), Wire::Gone(_)));
    }
}
