//! What bounds a known caller beside policy: the limits of tokens, rates, and where an environment takes calls from.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use claviger::broker::{Broker, Call};
use claviger::clock::{Clock as _, ManualClock};
use claviger::config::Resolved;
use claviger::config::assembly::{Running, StartError};
use claviger::environment::{Environment, Registry, parse_range};
use claviger::error::{Reason, Reasoned as _};
use claviger::identity::token::{SourceRange, TokenRequest};
use claviger::identity::{PrincipalKind, SourceAddress};
use claviger::policy::{Action, Effect, Resource};
use claviger::proto::v1;
use claviger::proto::v1::audit_service_client::AuditServiceClient;
use claviger::proto::v1::secret_service_client::SecretServiceClient;
use claviger::proto::v1::token_service_client::TokenServiceClient;
use claviger::server::Listen;
use claviger::server::limits::Rate;
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

use crate::support::assembled::{administrator, clock, id, put, records, resolved, start};
use crate::support::channel;
use crate::support::program::{self, Program};

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);

/// A broker in this process that listens on a Unix socket and on loopback, by a clock that the test turns.
struct Served {
    broker: Arc<Broker>,
    clock: Arc<ManualClock>,
    unix: Channel,
    tcp: Channel,
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<(), StartError>>,
    folder: PathBuf,
}

impl Served {
    /// Starts one below `folder`, with a secret `database` in each environment.
    async fn start(resolved: &Resolved, folder: &Path) -> Self {
        let clock = clock();
        let running = start(resolved, clock.clone()).await.unwrap();
        for environment in ["development", "staging", "production"] {
            put(&running, id(environment, "database"), environment).await.unwrap();
        }
        Self::of(running, clock, resolved, folder).await
    }

    async fn of(running: Running, clock: Arc<ManualClock>, resolved: &Resolved, folder: &Path) -> Self {
        let socket = folder.join("broker.sock");
        let unix = Listen::Unix { path: socket.clone(), mode: 0o600 }.bind().await.unwrap();
        let tcp = Listen::Tcp("127.0.0.1:0".parse().unwrap()).bind().await.unwrap();
        let address = tcp.address().to_owned();
        let broker = Arc::clone(&running.broker);
        let limits = resolved.limits;
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(async move { running.serve(vec![unix, tcp], limits, stopped).await });
        let unix = channel(&socket).await;
        let tcp = Endpoint::from_shared(address).unwrap().connect().await.unwrap();
        Self { broker, clock, unix, tcp, stop, task, folder: folder.to_owned() }
    }

    /// Issues a token and gives its id and itself.
    async fn token(
        &self,
        id: &str,
        groups: &[&str],
        change: impl FnOnce(&mut TokenRequest),
    ) -> (String, String) {
        let mut request = token_request(id, groups);
        change(&mut request);
        let (record, secret) = self.broker.create_token(&administrator(), request).await.unwrap();
        (record.id, secret.expose_text().unwrap().to_owned())
    }

    /// Ends it, and gives what is on record.
    async fn stop(self) -> Vec<Value> {
        let Self { stop, task, folder, broker, unix, tcp, .. } = self;
        drop((broker, unix, tcp));
        stop.send(true).unwrap();
        tokio::time::timeout(HUNG, task).await.expect("it ends").unwrap().unwrap();
        records(&folder)
    }
}

fn token_request(id: &str, groups: &[&str]) -> TokenRequest {
    TokenRequest {
        kind: PrincipalKind::User,
        principal: id.to_owned(),
        groups: groups.iter().map(ToString::to_string).collect(),
        claims: Default::default(),
        expires_in: Duration::from_secs(3_600),
        environments: Default::default(),
        source_addresses: Vec::new(),
        created_by: "test".to_owned(),
    }
}

fn ranges(texts: &[&str]) -> Vec<SourceRange> {
    texts.iter().map(|text| SourceRange::parse(text).unwrap()).collect()
}

fn with_token<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

async fn get(channel: &Channel, token: &str, environment: &str) -> Result<String, Status> {
    let message = v1::GetSecretRequest {
        environment: environment.to_owned(),
        name: "database".to_owned(),
        ..Default::default()
    };
    let mut client = SecretServiceClient::new(channel.clone());
    let secret = client.get_secret(with_token(message, token)).await?.into_inner().secret.unwrap();
    Ok(String::from_utf8(secret.payload.unwrap().data.to_vec()).unwrap())
}

async fn refused<T>(answer: impl Future<Output = Result<T, Status>>) -> (Code, String) {
    let status = answer.await.err().expect("a refusal");
    (status.code(), status.get_details_error_info().expect("every error has its reason").reason)
}

fn denied() -> (Code, String) {
    (Code::PermissionDenied, "DENIED".to_owned())
}

fn unauthenticated() -> (Code, String) {
    (Code::Unauthenticated, "UNAUTHENTICATED".to_owned())
}

fn rate_limited() -> (Code, String) {
    (Code::ResourceExhausted, "RATE_LIMITED".to_owned())
}

fn with_error<'a>(records: &'a [Value], error: &str) -> Vec<&'a Value> {
    records.iter().filter(|record| record["error"] == error).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_one_environment_is_good_for_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(&resolved(folder.path()), folder.path()).await;
    let (_, token) = served
        .token("ana", &["administrators"], |request| {
            request.environments = ["development".parse().unwrap()].into();
        })
        .await;
    let unix = &served.unix;
    assert_eq!(get(unix, &token, "development").await.unwrap(), "development");
    assert_eq!(refused(get(unix, &token, "staging")).await, denied());
    assert_eq!(refused(get(unix, &token, "nowhere")).await, denied());
    let mut tokens = TokenServiceClient::new(unix.clone());
    let list = with_token(v1::ListTokensRequest::default(), &token);
    assert_eq!(refused(tokens.list_tokens(list)).await, denied(), "nor for the broker's own business");
    let create = v1::CreateTokenRequest {
        subject: Some(v1::Subject { kind: 1, id: "eve".to_owned(), ..Default::default() }),
        expires_in: Some(prost_types::Duration { seconds: 3_600, nanos: 0 }),
        ..Default::default()
    };
    assert_eq!(refused(tokens.create_token(with_token(create, &token))).await, denied());
    let records = served.stop().await;
    let denied: Vec<_> = with_error(&records, "DENIED")
        .into_iter()
        .map(|record| {
            assert_eq!(
                (&record["principal"], &record["outcome"]),
                (&r#"User::"ana""#.into(), &"denied".into())
            );
            (record["operation"].as_str().unwrap(), record["environment"].as_str())
        })
        .collect();
    let expected =
        [("get", Some("staging")), ("get", Some("nowhere")), ("list_tokens", None), ("create_token", None)];
    assert_eq!(denied, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_made_for_declared_environments_only_and_says_its_limits() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    let broker = &running.broker;
    let with = |environment: &str| TokenRequest {
        environments: [environment.parse().unwrap()].into(),
        source_addresses: ranges(&["10.0.0.0/8", "unix"]),
        ..token_request("ana", &["team"])
    };
    let error = broker.create_token(&administrator(), with("nowhere")).await.unwrap_err();
    assert_eq!(error.reason(), Reason::EnvironmentNotFound);
    assert!(error.to_string().contains("`nowhere`"), "{error}");
    assert!(broker.list_tokens(&administrator()).await.unwrap().is_empty());
    broker.create_token(&administrator(), with("staging")).await.unwrap();
    let listed = broker.list_tokens(&administrator()).await.unwrap();
    assert_eq!(listed[0].record.environments, ["staging".parse().unwrap()].into());
    assert_eq!(listed[0].record.source_addresses, ranges(&["10.0.0.0/8", "unix"]));
    running.stop().await.unwrap();
    let records = records(folder.path());
    let said: Vec<_> = records
        .iter()
        .filter(|record| record["operation"] == "create_token" && record["kind"] == "access")
        .map(|record| (record["outcome"].as_str().unwrap(), record["detail"].as_str().unwrap_or_default()))
        .collect();
    assert_eq!((said.len(), said[0].0, said[1].0), (2, "not_found", "ok"));
    assert!(said[1].1.ends_with(", only in staging, only from 10.0.0.0/8 unix"), "{}", said[1].1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_token_is_not_good_for_is_not_said_to_be_permitted() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    let bound = administrator().principal.as_ref().clone().only_in(["staging".parse().unwrap()].into());
    let call = Call { principal: Arc::new(bound), ..administrator() };
    for (environment, effect) in [("staging", Effect::Allow), ("production", Effect::Deny)] {
        let resource = Resource::Secret(id(environment, "database"));
        let checked = running.broker.check_policy(&call, Action::Read, &resource).await.unwrap();
        assert_eq!(checked, effect, "{environment}");
        let explained = running.broker.explain_policy(&call, None, Action::Read, &resource).await;
        match explained {
            Ok(explanation) => assert_eq!(explanation.effect, effect, "{environment}"),
            Err(error) => assert_eq!((error.reason(), effect), (Reason::Denied, Effect::Deny), "{error}"),
        }
    }
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_refused_from_where_it_is_not_good() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(&resolved(folder.path()), folder.path()).await;
    let from = |texts: &[&str]| {
        let ranges = ranges(texts);
        move |request: &mut TokenRequest| request.source_addresses = ranges
    };
    let (_, loopback) = served.token("ana", &["team"], from(&["127.0.0.0/8"])).await;
    let (_, socket) = served.token("ana", &["team"], from(&["unix"])).await;
    let (_, elsewhere) = served.token("ana", &["team"], from(&["10.0.0.0/8", "2001:db8::/32"])).await;
    get(&served.tcp, &loopback, "development").await.unwrap();
    get(&served.unix, &socket, "development").await.unwrap();
    assert_eq!(refused(get(&served.unix, &loopback, "development")).await, unauthenticated());
    assert_eq!(refused(get(&served.tcp, &socket, "development")).await, unauthenticated());
    assert_eq!(refused(get(&served.tcp, &elsewhere, "development")).await, unauthenticated());
    assert_eq!(refused(get(&served.unix, &elsewhere, "development")).await, unauthenticated());
    let records = served.stop().await;
    let from: Vec<_> = with_error(&records, "UNAUTHENTICATED")
        .into_iter()
        .map(|record| {
            assert!(record["detail"].as_str().unwrap().contains("not good for this address"), "{record}");
            record["source_address"].as_str().unwrap().split([':', '.']).next().unwrap().to_owned()
        })
        .collect();
    assert_eq!(from, ["unix", "tcp", "tcp", "unix"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_use_is_shown_and_outlives_the_broker() {
    let folder = tempfile::tempdir().unwrap();
    let resolved = resolved(folder.path());
    let served = Served::start(&resolved, folder.path()).await;
    let (used, token) = served.token("ana", &["team"], |_| ()).await;
    let (unused, _) = served.token("eve", &["team"], |_| ()).await;
    served.clock.advance(Duration::from_secs(600));
    let moment = served.clock.now();
    get(&served.tcp, &token, "development").await.unwrap();

    let (_, root) = served.token("root", &["administrators"], |_| ()).await;
    let mut tokens = TokenServiceClient::new(served.unix.clone());
    let list = with_token(v1::ListTokensRequest::default(), &root);
    let listed = tokens.list_tokens(list).await.unwrap().into_inner().tokens;
    let of = |id: &str| listed.iter().find(|token| token.id == id).unwrap();
    assert_eq!(of(&used).last_used_at.as_ref().unwrap().seconds, moment.as_second());
    assert_eq!((of(&used).last_used_from.as_str(), of(&unused).last_used_from.as_str()), ("127.0.0.1", ""));
    assert_eq!(of(&unused).last_used_at, None);
    drop(tokens);
    served.broker.keep_token_use().await.unwrap();
    let clock = Arc::clone(&served.clock);
    served.stop().await;

    let running = start(&resolved, clock).await.unwrap();
    let listed = running.broker.list_tokens(&administrator()).await.unwrap();
    let of = |id: &str| listed.iter().find(|token| token.record.id == id).unwrap().last_used.clone();
    let last = of(&used).unwrap();
    assert_eq!((last.at, last.from.as_str()), (moment, "127.0.0.1"));
    assert_eq!(of(&unused), None);
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_token_ends_its_streams() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(&resolved(folder.path()), folder.path()).await;
    let (auditor, token) = served.token("aud", &["auditors"], |_| ()).await;
    let (_, reader) = served.token("ana", &["team"], |_| ()).await;
    let mut audit = AuditServiceClient::new(served.unix.clone());
    let tail = audit.tail(with_token(v1::TailRequest::default(), &token)).await.unwrap();
    let mut lines = tail.into_inner();
    // The stream lives: what happens now is told.
    get(&served.unix, &reader, "development").await.unwrap();
    let told = tokio::time::timeout(HUNG, async {
        while let Some(line) = lines.message().await.unwrap() {
            if line.line.contains(r#"User::\"ana\""#) {
                return true;
            }
        }
        false
    });
    assert!(told.await.expect("a record is told"));
    served.broker.revoke_token(&administrator(), &auditor).await.unwrap();
    get(&served.unix, &reader, "development").await.unwrap();
    let ended = tokio::time::timeout(HUNG, async {
        loop {
            match lines.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(status) => return Some(status),
            }
        }
    });
    let status = ended.await.expect("the stream ends").expect("with an error");
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
    assert_eq!(refused(get(&served.unix, &token, "development")).await, unauthenticated());
    drop((lines, audit));
    served.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_ended_long_ago_are_removed_on_record() {
    let folder = tempfile::tempdir().unwrap();
    let resolved = resolved(folder.path());
    let clock = clock();
    let running = start(&resolved, clock.clone()).await.unwrap();
    let broker = &running.broker;
    let mut ended = Vec::new();
    for n in 0..40 {
        let request = token_request(&format!("job-{n}"), &["ci"]);
        ended.push(broker.create_token(&administrator(), request).await.unwrap().0.id);
    }
    let year = Duration::from_secs(365 * 86_400);
    let lasting = TokenRequest { expires_in: year, ..token_request("ana", &["team"]) };
    let lasting = broker.create_token(&administrator(), lasting).await.unwrap().0.id;
    assert!(broker.prune_tokens().await.unwrap().is_empty());
    clock.advance(Duration::from_secs(31 * 86_400));
    let mut pruned = broker.prune_tokens().await.unwrap();
    pruned.sort();
    ended.sort();
    assert_eq!(pruned, ended);
    let left = |tokens: Vec<claviger::identity::token::Shown>| {
        tokens.into_iter().map(|token| token.record.id).collect::<Vec<_>>()
    };
    assert_eq!(left(broker.list_tokens(&administrator()).await.unwrap()), std::slice::from_ref(&lasting));
    running.stop().await.unwrap();
    drop(running);
    let running = start(&resolved, clock).await.unwrap();
    assert_eq!(left(running.broker.list_tokens(&administrator()).await.unwrap()), [lasting]);
    running.stop().await.unwrap();
    let records = records(folder.path());
    let said: Vec<_> = records.iter().filter(|record| record["operation"] == "prune_token").collect();
    assert_eq!(said.len(), 40);
    for (record, id) in said.iter().zip(&ended) {
        assert_eq!(record["kind"], "intent");
        assert!(record["detail"].as_str().unwrap().contains(id.as_str()), "{record}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_principal_has_a_rate_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let mut resolved = resolved(folder.path());
    resolved.limits.per_principal = Some(Rate::parse("1/m burst 3").unwrap());
    let served = Served::start(&resolved, folder.path()).await;
    let (_, ana) = served.token("ana", &["team"], |_| ()).await;
    let (_, another_of_anas) = served.token("ana", &["seniors"], |_| ()).await;
    let (_, eve) = served.token("eve", &["team"], |_| ()).await;
    for channel in [&served.unix, &served.tcp, &served.unix] {
        get(channel, &ana, "development").await.unwrap();
    }
    let status = get(&served.unix, &ana, "development").await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("this principal may make 1/m burst 3"), "{status}");
    let retry = status.get_details_retry_info().unwrap().retry_delay;
    assert_eq!(retry, Some(Duration::from_secs(60)));
    for _ in 0..49 {
        assert_eq!(refused(get(&served.tcp, &ana, "development")).await, rate_limited());
    }
    assert_eq!(refused(get(&served.tcp, &another_of_anas, "development")).await, rate_limited());
    get(&served.unix, &eve, "development").await.unwrap();

    served.clock.advance(Duration::from_secs(10));
    assert_eq!(refused(get(&served.tcp, &ana, "development")).await, rate_limited());
    served.clock.advance(Duration::from_secs(50));
    get(&served.unix, &ana, "development").await.unwrap();
    assert_eq!(refused(get(&served.unix, &ana, "development")).await, rate_limited());
    let records = served.stop().await;
    let limited = with_error(&records, "RATE_LIMITED");
    // At once, after ten seconds, and after the fifty that followed: not one for each of the 53 calls.
    assert_eq!(limited.len(), 3, "{limited:?}");
    assert!(limited.iter().all(|record| record["principal"] == r#"User::"ana""#), "{limited:?}");
    assert!(limited[1]["detail"].as_str().unwrap().contains("51"), "the others are counted: {}", limited[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_a_rate_whoever_calls_from_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut resolved = resolved(folder.path());
    resolved.limits.per_address = Some(Rate::parse("1/m burst 3").unwrap());
    let served = Served::start(&resolved, folder.path()).await;
    let (_, ana) = served.token("ana", &["team"], |_| ()).await;
    let (_, eve) = served.token("eve", &["team"], |_| ()).await;
    for token in [&ana, &eve, &ana] {
        get(&served.tcp, token, "development").await.unwrap();
    }
    for token in [&ana, &eve] {
        assert_eq!(refused(get(&served.tcp, token, "development")).await, rate_limited());
    }
    for _ in 0..10 {
        get(&served.unix, &ana, "development").await.unwrap();
    }
    served.clock.advance(Duration::from_secs(60));
    get(&served.tcp, &eve, "development").await.unwrap();
    assert_eq!(refused(get(&served.tcp, &ana, "development")).await, rate_limited());
    served.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_strangers_writes_few_records_and_keeps_nobody_out() {
    let folder = tempfile::tempdir().unwrap();
    let mut resolved = resolved(folder.path());
    resolved.limits.strangers = Rate::parse("1/m burst 5").unwrap();
    let served = Served::start(&resolved, folder.path()).await;
    let (_, ana) = served.token("ana", &["team"], |_| ()).await;
    let unknown = format!("clv_0123456789abcdef_{}", "A".repeat(43));
    for n in 0..200 {
        let expected = if n < 5 { unauthenticated() } else { rate_limited() };
        assert_eq!(refused(get(&served.tcp, &unknown, "development")).await, expected, "{n}");
    }
    get(&served.tcp, &ana, "development").await.unwrap();
    served.clock.advance(Duration::from_secs(60));
    assert_eq!(refused(get(&served.tcp, &unknown, "development")).await, unauthenticated());
    assert_eq!(refused(get(&served.tcp, &unknown, "development")).await, rate_limited());
    let records = served.stop().await;
    assert_eq!(with_error(&records, "UNAUTHENTICATED").len(), 6);
    let limited = with_error(&records, "RATE_LIMITED");
    assert_eq!(limited.len(), 2, "{limited:?}");
    assert!(limited[1]["detail"].as_str().unwrap().contains("195"), "the others are counted: {}", limited[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_environment_takes_calls_from_its_addresses_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut resolved = resolved(folder.path());
    let mut production = Environment::sealed("production".parse().unwrap());
    production.source_addresses =
        vec![parse_range("10.0.0.0/8").unwrap(), parse_range("2001:db8::/32").unwrap()];
    let development = Environment::sealed("development".parse().unwrap());
    resolved.registry = Registry::new([production, development]).unwrap();
    let running = start(&resolved, clock()).await.unwrap();
    put(&running, id("production", "database"), "p").await.unwrap();
    put(&running, id("development", "database"), "d").await.unwrap();
    let from = |source_address: SourceAddress| Call { source_address, ..administrator() };
    let tcp = |address: &str| SourceAddress::Tcp(address.parse().unwrap());
    let get = async |call: &Call, environment: &str| {
        crate::support::assembled::get(&running, call, id(environment, "database")).await
    };
    for inside in [
        tcp("10.1.2.3:4"),
        tcp("[::ffff:10.1.2.3]:4"),
        tcp("[2001:db8::1]:4"),
        SourceAddress::Unix { pid: Some(1) },
        SourceAddress::Internal,
    ] {
        get(&from(inside), "production").await.unwrap();
    }
    for outside in ["192.0.2.1:4", "11.0.0.1:4", "[2001:db9::1]:4", "127.0.0.1:4"] {
        let call = from(tcp(outside));
        let error = get(&call, "production").await.unwrap_err();
        assert_eq!(error.reason(), Reason::Denied, "{outside}");
        get(&call, "development").await.unwrap();
    }
    running.stop().await.unwrap();
    let records = records(folder.path());
    let denied = with_error(&records, "DENIED");
    assert_eq!(denied.len(), 4);
    assert_eq!(denied[0]["source_address"], "tcp:192.0.2.1:4");
    assert_eq!((&denied[0]["environment"], &denied[0]["operation"]), (&"production".into(), &"get".into()));
}

#[test]
fn limits_are_given_and_shown_on_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let create = ["token", "create", "--user", "ana", "--group", "administrators", "--expires", "1h"];
    let made = |limits: &[&str]| program.ok([&create[..], limits].concat()).trim().to_owned();
    let token =
        made(&["--only-in", "development", "--only-in", "staging", "--from", "unix", "--from", "10.0.0.0/8"]);
    let elsewhere = made(&["--from", "10.0.0.0/8"]);
    let read = |token: &str, environment: &str| {
        let mut command = program.command(["get", "-e", environment, "database#port"]);
        let output = command.env("CLAVIGER_TOKEN", token).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(read(&token, "development").0, 0);
    let (code, stderr) = read(&token, "production");
    assert!(code == 3 && stderr.contains("[DENIED]"), "{code} {stderr}");
    let (code, stderr) = read(&elsewhere, "development");
    assert!(code == 3 && stderr.contains("not good for this address"), "{code} {stderr}");
    let stderr = program.fails(4, [&create[..], &["--only-in", "nowhere"]].concat());
    assert!(stderr.contains("`nowhere`"), "{stderr}");

    let listed: Value = serde_json::from_str(&program.ok(["token", "list", "--output", "json"])).unwrap();
    let id = |token: &str| token.split('_').nth(1).unwrap().to_owned();
    let of = |token: &str| {
        let tokens = listed["tokens"].as_array().unwrap();
        tokens.iter().find(|shown| shown["id"] == id(token).as_str()).unwrap().clone()
    };
    let shown = of(&token);
    assert_eq!(shown["environments"], serde_json::json!(["development", "staging"]));
    assert_eq!(shown["source_addresses"], serde_json::json!(["unix", "10.0.0.0/8"]));
    assert_eq!(shown["last_used_from"], "unix");
    assert!(shown["last_used_at"].is_string());
    assert!(of(&elsewhere)["last_used_at"].is_null() && of(&elsewhere)["last_used_from"].is_null());
    let table = program.ok(["token", "list"]);
    for words in ["ENVIRONMENTS", "LAST USED", "development,staging", "unix,10.0.0.0/8", "never"] {
        assert!(table.contains(words), "{words} in {table}");
    }
}

#[test]
fn rates_are_configured() {
    let folder = tempfile::tempdir().unwrap();
    let rates = "rates = { per_principal = \"1/h burst 20\", per_address = \"100/s\", strangers = \"20/s\" }";
    let served = program::Served::with(folder.path(), rates, "");
    let refused = (0..21).find_map(|_| {
        let output = served.program.run(["token", "list"]);
        (!output.status.success()).then_some(output)
    });
    let refused = refused.expect("no more than twenty at once");
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(5), "{stderr}");
    assert!(
        stderr.contains("this principal may make 1/h burst 20") && stderr.contains("[RATE_LIMITED]"),
        "{stderr}"
    );
}
