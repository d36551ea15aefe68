//! The Rust client, as a service uses it, against the real broker.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use claviger::client::{
    Address, Builder, Cached, Client, ClientError, ClientIdentity, Connection, Expected, PutOptions, Query,
    Snapshot, TlsOptions,
};
use claviger::clock::ManualClock;
use claviger::error::Reason;
use claviger::proto::v1;
use claviger::secret::{Label, SecretValue, Selector, VersionId};
use rustix::process::Signal;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::AsyncReadExt as _;
use tonic::Code;

use crate::support::certificates::{Authority, Leaf};
use crate::support::program::{Program, Served, claviger};

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);
const CANARY: &str = "canary-7c1e90d2";

fn builder(program: &Program) -> Builder {
    let address = format!("unix://{}", program.socket.display());
    Client::builder().address(address).environment("development").consumer("tests").timeout(HUNG)
}

async fn client(program: &Program) -> Client {
    builder(program).build().await.unwrap()
}

fn text(text: &str) -> SecretValue {
    SecretValue::text(text.to_owned()).unwrap()
}

fn shown(value: &SecretValue) -> &str {
    value.expose_text().unwrap()
}

/// What the handle says next.
async fn changed(cached: &mut Cached) -> Result<Snapshot, ClientError> {
    tokio::time::timeout(HUNG, cached.changed()).await.expect("it is told")
}

/// Waits for a condition that nothing announces.
async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waiting = async {
        let mut look = tokio::time::interval(Duration::from_millis(10));
        while !condition().await {
            look.tick().await;
        }
    };
    tokio::time::timeout(HUNG, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// Writes a private file.
fn write(path: &Path, content: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::write(path, content).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    path.to_owned()
}

/// A token of a service that may read development, and the token's id.
fn service_token(program: &Program) -> (String, String) {
    let group = ["--group", "service-development", "--expires", "1h"];
    let token = program.ok(["token", "create", "--workload", "orders"].iter().chain(&group));
    let token = token.trim().to_owned();
    let id = token.split('_').nth(1).unwrap().to_owned();
    (token, id)
}

#[tokio::test(flavor = "multi_thread")]
async fn typed_calls_do_what_they_say() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let client = client(&program).await;

    let first = client.put("app/db", &text(r#"{"user":"app","password":"one"}"#)).await.unwrap();
    assert!(first.changed);
    assert_eq!(first.version.labels, [Label::Current]);
    assert_eq!(shown(&client.get("app/db#password").await.unwrap()), "one");
    assert_eq!(shown(&client.get(("app/db", "user")).await.unwrap()), "app");
    let elsewhere = client.get("staging:app/db").await.unwrap_err();
    assert_eq!(elsewhere.reason, Reason::SecretNotFound);
    assert!(elsewhere.request_id.is_some());
    assert_eq!(client.get("app/db#nope").await.unwrap_err().reason, Reason::FieldNotFound);

    let token = VersionId::generate();
    let options = PutOptions {
        expected: Expected::Version(first.version.id.clone()),
        token: Some(token.clone()),
        ..PutOptions::default()
    };
    let second = client.put_with("app/db", &text("two"), options.clone()).await.unwrap();
    assert_eq!((second.changed, &second.version.id), (true, &token));
    let absent = PutOptions { expected: Expected::Absent, ..PutOptions::default() };
    let conflict = client.put_with("app/db", &text("three"), absent).await.unwrap_err();
    assert_eq!(conflict.reason, Reason::Conflict);

    let known = client.read(&Query::new("app/db").unwrap().unless(token.clone())).await.unwrap();
    assert!(known.value.is_none() && known.version.id == token);
    let previous = Query::new("app/db").unwrap().version(Selector::Label(Label::Previous)).refreshed();
    let previous = client.read(&previous).await.unwrap();
    assert_eq!((previous.version.id.clone(), previous.stale), (first.version.id.clone(), false));

    let queries = [
        Query::new("app/db").unwrap(),
        Query::new("missing").unwrap(),
        Query::new("app/db").unwrap().version(Selector::Version(first.version.id.clone())),
    ];
    let answers = client.batch(&queries).await.unwrap();
    let told: Vec<_> = answers
        .iter()
        .map(|answer| answer.as_ref().map(|answer| answer.version.id.clone()).map_err(|error| error.reason))
        .collect();
    let expected = [Ok(token.clone()), Err(Reason::SecretNotFound), Ok(first.version.id.clone())];
    assert_eq!(told, expected);

    let described = client.describe("app/db").await.unwrap();
    assert_eq!(described.versions.len(), 2);
    assert!(described.changed_at >= described.created_at && described.deletion_at.is_none());
    let listed = client.list("app/").await.unwrap();
    assert_eq!(listed.iter().map(|listed| listed.name.as_str()).collect::<Vec<_>>(), ["app/db"]);

    let rolled = client.because("the test has it").unwrap().rollback("app/db", None).await.unwrap();
    assert_eq!((rolled.version.id, rolled.superseded), (first.version.id.clone(), Some(token.clone())));
    assert!(!client.report_in_use("app/db", &token).await.unwrap(), "it is not current any more");
    assert!(client.report_in_use("app/db", &first.version.id).await.unwrap());
    let consumers = client.consumers("app/db").await.unwrap();
    assert_eq!(consumers.len(), 1);
    assert_eq!(
        (consumers[0].name.as_str(), consumers[0].version_id.as_ref(), consumers[0].current),
        ("tests", Some(&first.version.id), true)
    );

    assert!(client.delete("app/db", Some(7)).await.unwrap() > described.changed_at);
    assert_eq!(client.get("app/db").await.unwrap_err().reason, Reason::SecretDeleted);
    client.restore("app/db").await.unwrap();
    assert_eq!(shown(&client.get("app/db#password").await.unwrap()), "one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_has_all_pages() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let client = client(&program).await;
    let puts = (0..101).map(|number| {
        let client = client.clone();
        tokio::spawn(async move { client.put(format!("many/{number:03}"), &text("x")).await })
    });
    for put in puts.collect::<Vec<_>>() {
        put.await.unwrap().unwrap();
    }
    let listed = client.list("many/").await.unwrap();
    assert_eq!(listed.len(), 101);
    assert_eq!(listed.last().unwrap().name.as_str(), "many/100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_begins_while_the_broker_is_away_is_answered_when_it_is_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::dev(folder.path());
    let client = client(&program).await;
    client.put("app", &text("before")).await.unwrap();
    program.signal(Signal::KILL);

    let read = tokio::spawn({
        let client = client.clone();
        async move { client.get("app").await }
    });
    let written = tokio::spawn({
        let client = client.clone();
        async move { client.put("new", &text("meanwhile")).await }
    });
    let refused = builder(&program).timeout(Duration::from_millis(300)).build().await.unwrap_err();
    assert!(matches!(refused.reason, Reason::Unavailable | Reason::DeadlineExceeded), "{refused}");
    assert!(!read.is_finished() && !written.is_finished());

    let program = Program::dev(folder.path());
    assert_eq!(shown(&read.await.unwrap().unwrap()), "before");
    let written = written.await.unwrap().unwrap();
    assert_eq!(client.describe("new").await.unwrap().versions.len(), 1, "once, however often it was sent");
    assert_eq!(client.describe("new").await.unwrap().versions[0].id, written.version.id);
    drop(program);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_at_hand_follows_what_becomes_current() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let client = client(&program).await;
    let first = client.put("app", &text(r#"{"password":"one"}"#)).await.unwrap();
    let mut cached = client.cached("app").await.unwrap();
    let mut clone = cached.clone();
    let now = cached.current().unwrap();
    assert_eq!((&now.version_id, now.stale), (&first.version.id, false));
    assert_eq!(shown(&cached.field("password").unwrap()), "one");
    assert_eq!(cached.field("nope").unwrap_err().reason, Reason::FieldNotFound);

    // Another name joins the same watch, and what is at hand stays.
    let jwt = client.cached("jwt").await.unwrap();
    assert!(jwt.field("secret").is_ok() && !cached.current().unwrap().stale);

    let second = client.put("app", &text(r#"{"password":"two"}"#)).await.unwrap();
    let told = changed(&mut cached).await.unwrap();
    assert_eq!(told.version_id, second.version.id);
    assert_eq!(changed(&mut clone).await.unwrap().version_id, second.version.id, "each handle by itself");
    assert_eq!(shown(&cached.field("password").unwrap()), "two");

    assert!(cached.report_in_use(&told).await.unwrap());
    let consumers = client.consumers("app").await.unwrap();
    let found = consumers.iter().find(|consumer| consumer.name == "tests").unwrap();
    assert!(found.watching && found.current);
    assert_eq!(found.version_id.as_ref(), Some(&second.version.id));

    client.rollback("app", Some(&first.version.id)).await.unwrap();
    assert_eq!(changed(&mut cached).await.unwrap().version_id, first.version.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn b1_the_last_good_value_is_served_within_its_bound_and_said_to_be_stale() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::dev(folder.path());
    let clock = ManualClock::new(jiff::Timestamp::UNIX_EPOCH);
    let shared = Arc::<ManualClock>::clone(&clock);
    let client = builder(&program).clock(shared).stale_for(Duration::from_secs(3_600)).build().await.unwrap();
    client.put("app", &text("good")).await.unwrap();
    let mut cached = client.cached("app").await.unwrap();
    assert!(!cached.current().unwrap().stale);

    program.signal(Signal::KILL);
    until("stale", async || cached.current().unwrap().stale).await;
    clock.advance(Duration::from_secs(1_800));
    let stale = cached.current().unwrap();
    assert_eq!(shown(&stale.value), "good");
    assert!(stale.age >= Duration::from_secs(1_800), "{:?}", stale.age);
    clock.advance(Duration::from_secs(1_801));
    let error = cached.current().unwrap_err();
    assert_eq!(error.reason, Reason::Unavailable);
    assert!(error.message.contains("development:app") && error.message.contains("3600s"), "{error}");

    let program = Program::dev(folder.path());
    until("fresh", async || cached.current().is_ok_and(|now| !now.stale)).await;
    assert_eq!(shown(&cached.current().unwrap().value), "good");
    let written = client.put("app", &text("better")).await.unwrap();
    assert_eq!(changed(&mut cached).await.unwrap().version_id, written.version.id, "it watches again");
    drop(program);
}

#[tokio::test(flavor = "multi_thread")]
async fn b2_what_is_deleted_is_gone_at_once_and_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let client = client(&program).await;
    let written = client.put("app", &text("x")).await.unwrap();
    let mut cached = client.cached("app").await.unwrap();
    client.delete("app", None).await.unwrap();
    assert_eq!(changed(&mut cached).await.unwrap_err().reason, Reason::SecretNotFound);
    let gone = cached.current().unwrap_err();
    assert!(gone.message.contains("development:app is gone"), "{gone}");
    assert_eq!(client.cached("app").await.unwrap_err().reason, Reason::SecretNotFound);
    client.restore("app").await.unwrap();
    assert_eq!(changed(&mut cached).await.unwrap().version_id, written.version.id);
    assert_eq!(client.cached("never-was").await.unwrap_err().reason, Reason::SecretNotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn b2_what_is_denied_is_gone_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let root = client(&program).await;
    root.put("app", &text("x")).await.unwrap();
    let (token, id) = service_token(&program);
    let service = builder(&program).token(text(&token)).build().await.unwrap();
    let mut cached = service.cached("app").await.unwrap();
    assert_eq!(service.cached("production:jwt").await.unwrap_err().reason, Reason::Denied);

    program.ok(["token", "revoke", &id]);
    // The broker looks at a watcher's credential before it tells it anything.
    root.put("app", &text("not for them")).await.unwrap();
    assert_eq!(changed(&mut cached).await.unwrap_err().reason, Reason::Unauthenticated);
    assert_eq!(cached.current().unwrap_err().reason, Reason::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_was_replaced_in_its_file_is_taken_from_there() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let ((old, old_id), (new, new_id)) = (service_token(&program), service_token(&program));
    let file = write(&folder.path().join("token"), &old);
    let client = builder(&program).token_file(&file).build().await.unwrap();
    client.get("jwt").await.unwrap();
    let mut cached = client.cached("jwt").await.unwrap();

    write(&file, &format!("{new}\n"));
    program.ok(["token", "revoke", &old_id]);
    client.get("jwt").await.unwrap();
    assert!(program.put("development", "jwt", b"{}").status.success());
    assert_eq!(
        shown(&changed(&mut cached).await.unwrap().value),
        "{}",
        "the watch began anew under the new one"
    );

    program.ok(["token", "revoke", &new_id]);
    assert_eq!(client.get("jwt").await.unwrap_err().reason, Reason::Unauthenticated, "there is no other");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_client_holds_is_shown() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let root = client(&program).await;
    root.put("app", &text(CANARY)).await.unwrap();
    let (token, _) = service_token(&program);
    let building = builder(&program).token(text(&token));
    let mut seen = format!("{building:?}");
    let client = building.build().await.unwrap();
    let cached = client.cached("app").await.unwrap();
    let answer = client.read(&Query::new("app").unwrap()).await.unwrap();
    let error = cached.field("x").unwrap_err();
    seen += &format!("{client:?}{cached:?}{:?}{answer:?}{error:?}{error}", cached.current().unwrap());
    assert!(!seen.contains(CANARY) && !seen.contains(&token), "{seen}");
    assert!(seen.contains("redacted"), "{seen}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_ends_with_its_last_handle() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let observer = client(&program).await;
    let watching = async || {
        let consumers = observer.consumers("jwt").await.unwrap();
        consumers.iter().any(|consumer| consumer.name == "short-lived" && consumer.watching)
    };
    let client = builder(&program).consumer("short-lived").build().await.unwrap();
    let cached = client.cached("jwt").await.unwrap();
    assert!(watching().await);
    drop(client);
    assert!(cached.current().is_ok(), "one handle is enough");
    observer.put("jwt", &text("{}")).await.unwrap();
    let mut cached = cached;
    changed(&mut cached).await.unwrap();
    drop(cached);
    until("the watch is gone", async || !watching().await).await;
}

/// A broker that asks for client certificates, and holds a secret `app`.
struct Remote {
    program: Program,
    /// `https://127.0.0.1:PORT`.
    address: String,
    /// `http://127.0.0.1:PORT` of the door for probes.
    admin: String,
    authority: Authority,
    stranger: Authority,
    /// The authority's own certificate, as clients have it.
    ca_file: PathBuf,
    folder: tempfile::TempDir,
}

impl Remote {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path();
        let (authority, stranger) = (Authority::new("the authority"), Authority::new("a stranger"));
        let server = authority.server();
        write(&place.join("tls.crt"), &server.certificate);
        write(&place.join("tls.key"), &server.key);
        write(&place.join("ca.crt"), &authority.pem());
        let ca_file = write(&place.join("trusted.crt"), &authority.pem());
        let tls = format!(
            r#"tls = {{ address = "127.0.0.1:0", certificate = "{0}/tls.crt", key = "{0}/tls.key", client_ca = "{0}/ca.crt" }}"#,
            place.display()
        );
        let callers = r#"
[[identity.mtls.callers]]
dns = "orders.internal"
kind = "workload"
id = "orders"
groups = ["service-development"]
"#;
        let Served { program, admin, .. } = Served::with(place, &tls, callers);
        assert!(program.put("development", "app", b"over the network").status.success());
        program.wait_for_log("listening on https://");
        let log = program.log();
        let address = log.split_whitespace().find(|word| word.starts_with("https://")).unwrap().to_owned();
        Self { program, address, admin, authority, stranger, ca_file, folder }
    }

    /// What `orders` presents, as this authority has it.
    fn orders(&self, issuer: &Authority, name: &str) -> ClientIdentity {
        let issued = issuer.client(&Leaf { dns: &["orders.internal"], ..Leaf::default() });
        let file = |kind: &str| self.folder.path().join(format!("{name}.{kind}"));
        ClientIdentity {
            certificate: write(&file("crt"), &issued.certificate),
            key: write(&file("key"), &issued.key),
        }
    }

    fn tls(&self, identity: Option<ClientIdentity>) -> TlsOptions {
        TlsOptions { ca_file: Some(self.ca_file.clone()), identity, server_name: None }
    }

    async fn client(&self, tls: TlsOptions) -> Result<Client, ClientError> {
        builder(&self.program).address(self.address.as_str()).tls(tls).build().await
    }

    /// Runs `get app` against an address, as a user does.
    fn get(&self, address: &str, identity: Option<&ClientIdentity>) -> (Option<i32>, String, String) {
        let mut command = claviger(["get", "-e", "development", "app"]);
        command.env("CLAVIGER_ADDR", address).env("CLAVIGER_CA_FILE", &self.ca_file);
        if let Some(ClientIdentity { certificate, key }) = identity {
            command.arg("--client-cert").arg(certificate).arg("--client-key").arg(key);
        }
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }
}

/// Opens a connection and asks something over it.
async fn asked(address: &str, tls: &TlsOptions) -> Result<(), ClientError> {
    let address = Address::parse(address).unwrap();
    list(&Connection::open_with(&address, tls, None, HUNG).await?).await
}

async fn list(connection: &Connection) -> Result<(), ClientError> {
    let request = v1::ListSecretsRequest { environment: "development".to_owned(), ..Default::default() };
    connection.secrets().list_secrets(request).await.map(drop).map_err(ClientError::from)
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tls_each_side_is_known_by_its_certificate() {
    let remote = Remote::start();
    let orders = remote.orders(&remote.authority, "orders");
    let client = remote.client(remote.tls(Some(orders.clone()))).await.unwrap();
    assert_eq!(shown(&client.get("app").await.unwrap()), "over the network");
    assert_eq!(shown(&client.cached("app").await.unwrap().current().unwrap().value), "over the network");

    // Another authority's broker is none.
    let other_ca = write(&remote.folder.path().join("other.crt"), &remote.stranger.pem());
    let tls = TlsOptions { ca_file: Some(other_ca), ..remote.tls(Some(orders.clone())) };
    let error = remote.client(tls).await.unwrap_err();
    assert_eq!(error.reason, Reason::Unauthenticated);
    assert!(error.message.contains("--ca-file"), "{error}");

    // The command line goes the same way.
    let (code, stdout, stderr) = remote.get(&remote.address, Some(&orders));
    assert_eq!((code, stdout.as_str()), (Some(0), "over the network"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_refused_is_told_alike_each_time() {
    let remote = Remote::start();
    let foreign = remote.orders(&remote.stranger, "foreign");
    for (identity, words) in [
        (Some(foreign), "the broker does not accept the client certificate ("),
        (None, "the broker wants a client certificate (CertificateRequired)"),
    ] {
        // What the broker thinks it says after the handshake: before, while or after the call is sent.
        let tls = remote.tls(identity.clone());
        for _ in 0..20 {
            let error = asked(&remote.address, &tls).await.unwrap_err();
            assert_eq!(
                (error.reason, error.code),
                (Reason::Unauthenticated, Code::Unauthenticated),
                "{error}"
            );
            assert!(error.message.starts_with(words), "{error}");
        }
        for _ in 0..5 {
            let (code, _, stderr) = remote.get(&remote.address, identity.as_ref());
            assert_eq!(code, Some(3), "{stderr}");
            assert!(stderr.contains(words) && stderr.contains("[UNAUTHENTICATED]"), "{stderr}");
        }
    }
}

/// A server of TLS that ends so many connections right after the handshake, without a word, and then is gone.
async fn hanging_up(authority: &Authority, times: usize) -> String {
    let server = authority.server();
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(server.certificate.as_bytes()).collect();
    let key = PrivateKeyDer::from_pem_slice(server.key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain.unwrap(), key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("https://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        for _ in 1..times {
            let (stream, _) = listener.accept().await.unwrap();
            drop(acceptor.accept(stream).await);
        }
        let (stream, _) = listener.accept().await.unwrap();
        let last = acceptor.accept(stream).await;
        // It listens no more before the last one learns of its end.
        drop(listener);
        drop(last);
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_end_without_a_word_raise_a_suspicion_at_the_second_one() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new("the authority");
    let issued = authority.client(&Leaf::default());
    let identity = ClientIdentity {
        certificate: write(&folder.path().join("own.crt"), &issued.certificate),
        key: write(&folder.path().join("own.key"), &issued.key),
    };
    let ca_file = Some(write(&folder.path().join("ca.crt"), &authority.pem()));
    for (identity, words) in [
        (Some(identity), "perhaps it does not accept the client certificate"),
        (None, "perhaps it wants a client certificate; name yours with --client-cert"),
    ] {
        let tls = TlsOptions { ca_file: ca_file.clone(), identity, server_name: None };
        let address = hanging_up(&authority, usize::MAX).await;
        for _ in 0..10 {
            let error = asked(&address, &tls).await.unwrap_err();
            assert_eq!(error.reason, Reason::Unauthenticated, "{error}");
            assert!(error.message.contains(words) && error.message.contains("twice"), "{error}");
            assert!(error.is_transient(), "a suspicion is no refusal");
        }
        // What was there once and is gone stops, and has nothing against anyone.
        let error = asked(&hanging_up(&authority, 1).await, &tls).await.unwrap_err();
        assert_eq!((error.reason, error.code), (Reason::Unavailable, Code::Unavailable), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_ends_with_the_trust_in_its_certificate_says_so() {
    let remote = Remote::start();
    let tls = remote.tls(Some(remote.orders(&remote.authority, "orders")));
    let address = Address::parse(&remote.address).unwrap();
    let connection = Connection::open_with(&address, &tls, None, HUNG).await.unwrap();
    let request = v1::WatchSecretsRequest {
        environment: "development".to_owned(),
        names: vec!["app".to_owned()],
        consumer: "tests".to_owned(),
        ..Default::default()
    };
    let mut told = connection.secrets_without_deadline().watch_secrets(request).await.unwrap().into_inner();
    assert!(told.message().await.unwrap().is_some());

    write(&remote.folder.path().join("ca.crt"), &remote.stranger.pem());
    rustix::process::kill_process(remote.program.id(), Signal::HUP).unwrap();
    let ended = async {
        loop {
            match told.message().await {
                Ok(next) => assert!(next.is_some(), "an end without a word"),
                Err(status) => return ClientError::from(status),
            }
        }
    };
    let error = tokio::time::timeout(HUNG, ended).await.expect("the broker cuts it off");
    assert_eq!(error.reason, Reason::Unavailable, "{error}");
    assert!(error.message.starts_with("the broker ended the connection ("), "{error}");
    assert!(error.message.contains("no longer trusts the client certificate"), "{error}");
    assert!(!error.message.contains("docs.rs") && !error.message.contains("take effect"), "{error}");
    until("the next connection hears why", async || {
        let refused = list(&connection).await.unwrap_err();
        refused.reason == Reason::Unauthenticated && refused.message.contains("does not accept")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_does_not_speak_in_the_clear_is_asked_about() {
    let remote = Remote::start();
    let plain = remote.address.replacen("https://", "http://", 1);
    for address in [&plain, &remote.admin] {
        let asks =
            format!("{address}: the other side does not speak HTTP/2 in the clear; is it an https:// port");
        let error = asked(address, &TlsOptions::default()).await.unwrap_err();
        assert!(error.message.starts_with(&asks), "{error}");
        let (code, _, stderr) = remote.get(address, None);
        assert_eq!(code, Some(5), "{stderr}");
        assert!(stderr.contains(&asks), "{stderr}");
    }
}

/// A socket where calls end, or are never answered.
fn without_answers(path: &Path, ends: bool) {
    let listener = tokio::net::UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            // The client's preface (RFC 9113, section 3.4): it is connected.
            stream.read_exact(&mut [0; 24]).await.unwrap();
            if !ends {
                held.push(stream);
            }
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_changes_something_leaves_a_doubt() {
    let folder = tempfile::tempdir().unwrap();
    for (name, ends, timeout, reason) in [
        ("ends.sock", true, HUNG, Reason::Unavailable),
        ("mute.sock", false, Duration::from_secs(1), Reason::DeadlineExceeded),
    ] {
        let path = folder.path().join(name);
        without_answers(&path, ends);
        let address = Address::parse(&format!("unix://{}", path.display())).unwrap();
        let connection = Connection::open(&address, None, timeout).await.unwrap();
        let read = list(&connection).await.unwrap_err();
        let request = v1::DeleteSecretRequest {
            environment: "development".to_owned(),
            name: "app".to_owned(),
            ..Default::default()
        };
        let deleted =
            connection.secrets().delete_secret(request).await.map_err(ClientError::from).unwrap_err();
        for (error, doubt) in [(read, false), (deleted, true)] {
            assert_eq!(error.reason, reason, "{error}");
            assert_eq!(error.message.contains("a change may still take effect"), doubt, "{error}");
        }
    }
}
