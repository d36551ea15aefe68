//! TLS and client certificates, against a broker that serves in this process and whose clock the tests turn.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use claviger::broker::Broker;
use claviger::clock::{ManualClock, SharedClock};
use claviger::identity::token::TokenRequest;
use claviger::identity::{PrincipalKind, mtls};
use claviger::proto::v1;
use claviger::proto::v1::secret_service_client::SecretServiceClient;
use claviger::server::tls::{Clients, Settings, Tls};
use claviger::server::{Limits, Listen};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
    date_time_ymd,
};
use rustls::ClientConfig;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::support::assembled;
use crate::support::certificates::{Authority, Issued, Leaf, Taken, channel, client, connect, connect_from};
use crate::support::program::Program;

const HUNG: Duration = Duration::from_secs(60);
const ORDERS: &str = "spiffe://example.org/orders";

/// A broker that serves, and what it stands on.
struct Served {
    folder: tempfile::TempDir,
    authority: Authority,
    broker: Arc<Broker>,
    tls: Arc<Tls>,
    address: SocketAddr,
    clock: Arc<ManualClock>,
    _stop: watch::Sender<bool>,
}

struct Setup {
    clients: Clients,
    common_name: bool,
    limits: Limits,
}

impl Default for Setup {
    fn default() -> Self {
        Self { clients: Clients::Required, common_name: false, limits: Limits::default() }
    }
}

impl Setup {
    async fn serve(self) -> Served {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new("the authority");
        write(folder.path(), &authority.server(), &authority.pem());
        self.serve_from(folder, authority).await
    }

    async fn serve_from(self, folder: tempfile::TempDir, authority: Authority) -> Served {
        let mut resolved = assembled::resolved(folder.path());
        resolved.mtls = callers(self.common_name);
        let clock = assembled::clock();
        let shared: SharedClock = clock.clone();
        let running = assembled::start(&resolved, shared.clone()).await.unwrap();
        assembled::put(&running, assembled::id("development", "database"), "value").await.unwrap();
        let door = Listen::Tls(Settings {
            address: "127.0.0.1:0".parse().unwrap(),
            certificate: folder.path().join("tls.crt"),
            key: folder.path().join("tls.key"),
            client_ca: Some(folder.path().join("ca.crt")),
            clients: self.clients,
        });
        let door = door.bind_by(shared).await.unwrap();
        let socket = Listen::Unix { path: folder.path().join("broker.sock"), mode: 0o600 };
        let socket = socket.bind().await.unwrap();
        let address = door.address().strip_prefix("https://").unwrap().parse().unwrap();
        let tls = Arc::clone(door.tls().unwrap());
        let broker = Arc::clone(&running.broker);
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(running.serve(vec![door, socket], self.limits, stopped));
        Served { folder, authority, broker, tls, address, clock, _stop: stop }
    }
}

impl Served {
    fn client(&self, identity: &Issued) -> Arc<ClientConfig> {
        client(&self.authority, Some(identity))
    }

    async fn takes(&self, config: &Arc<ClientConfig>) -> bool {
        Taken::connect(config, self.address).await.is_some()
    }

    async fn get(&self, config: &Arc<ClientConfig>) -> Result<(), Status> {
        let mut client = SecretServiceClient::new(channel(config, self.address).await);
        client.get_secret(database()).await.map(drop)
    }

    async fn token(&self) -> String {
        let request = TokenRequest {
            kind: PrincipalKind::User,
            principal: "ada".to_owned(),
            groups: BTreeSet::from(["team".to_owned()]),
            claims: Default::default(),
            expires_in: Duration::from_secs(3_600),
            environments: Default::default(),
            source_addresses: Vec::new(),
            created_by: "test".to_owned(),
        };
        let (_, secret) = self.broker.create_token(&assembled::administrator(), request).await.unwrap();
        secret.expose_text().unwrap().to_owned()
    }

    /// Who is on record as having read, and by which proof.
    fn readers(&self) -> BTreeSet<(String, String)> {
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        assembled::records(self.folder.path())
            .iter()
            .filter(|record| record["action"] == "read")
            .map(|record| (text(&record["principal"]), text(&record["proof"])))
            .collect()
    }
}

fn database() -> v1::GetSecretRequest {
    v1::GetSecretRequest {
        environment: "development".to_owned(),
        name: "database".to_owned(),
        ..Default::default()
    }
}

/// An authority until the first second of a year, in PEM, and what it issued for ages.
fn ending(year: i32) -> (String, Issued) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.not_after = date_time_ymd(year, 1, 1);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let mut leaf = CertificateParams::default();
    leaf.subject_alt_names = vec![SanType::URI(ORDERS.try_into().unwrap())];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().unwrap();
    let certificate = leaf.signed_by(&key, &*authority).unwrap().pem();
    (authority.pem(), Issued { certificate, key: key.serialize_pem() })
}

/// Writes the three files one after the other, as a person would. The authorities come first: where they are broken, no
/// moment between has a set that is whole.
fn write(folder: &Path, issued: &Issued, authorities: &str) {
    for (name, text, mode) in [
        ("ca.crt", authorities, 0o644),
        ("tls.crt", issued.certificate.as_str(), 0o644),
        ("tls.key", issued.key.as_str(), 0o600),
    ] {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
}

fn callers(common_name: bool) -> mtls::Config {
    let caller = |id: &str| mtls::Caller {
        spiffe: None,
        dns: None,
        common_name: None,
        kind: PrincipalKind::Workload,
        id: id.to_owned(),
        groups: BTreeSet::from(["team".to_owned()]),
    };
    let mut callers = vec![
        mtls::Caller { spiffe: Some(ORDERS.to_owned()), ..caller("orders") },
        mtls::Caller { dns: Some("billing.internal".to_owned()), ..caller("billing") },
    ];
    if common_name {
        callers.push(mtls::Caller { common_name: Some("legacy".to_owned()), ..caller("old-app") });
    }
    mtls::Config { trust_domain: Some("example.org".to_owned()), common_name, callers }
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

#[tokio::test(flavor = "multi_thread")]
async fn only_tls_1_3_and_http_2_are_spoken() {
    let served = Setup::default().serve().await;
    let identity = served.authority.spiffe(ORDERS);
    let mut old = ClientConfig::clone(&served.client(&identity));
    old.alpn_protocols = vec![b"http/1.1".to_vec()];
    assert!(connect(&Arc::new(old), served.address).await.is_err());

    // A ClientHello as of TLS 1.2 (RFC 5246, section 7.4.1.2): one cipher suite, one signature algorithm.
    let extensions = [0, 13, 0, 4, 0, 2, 4, 3];
    let body = [
        &[3_u8, 3][..],
        &[7; 32],
        &[0],
        &[0, 2, 0xc0, 0x2b],
        &[1, 0],
        &[0, u8::try_from(extensions.len()).unwrap()],
        &extensions,
    ]
    .concat();
    let length = u8::try_from(body.len()).unwrap();
    let hello = [&[22_u8, 3, 1, 0, length + 4, 1, 0, 0, length][..], &body].concat();
    let mut stream = tokio::net::TcpStream::connect(served.address).await.unwrap();
    stream.write_all(&hello).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(HUNG, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, [21, 3, 3, 0, 2, 2, 70], "a fatal alert: protocol_version");
    served.get(&served.client(&identity)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_trusted_certificate_there_is_no_connection_where_one_is_required() {
    let served = Setup::default().serve().await;
    let stranger = Authority::new("someone else");
    let leaf = Leaf { spiffe: Some(ORDERS), ..Leaf::default() };
    let expired = Leaf { valid: Some(((2020, 1, 1), (2025, 12, 31))), ..leaf };
    let early = Leaf { valid: Some(((2026, 1, 2), (2030, 1, 1))), ..leaf };
    assert!(!served.takes(&client(&served.authority, None)).await, "none");
    assert!(!served.takes(&served.client(&stranger.client(&leaf))).await, "of another authority");
    assert!(!served.takes(&served.client(&served.authority.client(&expired))).await, "expired");
    assert!(!served.takes(&served.client(&served.authority.client(&early))).await, "not valid yet");
    assert!(!served.takes(&served.client(&served.authority.server())).await, "for servers");
    let linked = served.authority.intermediate("below").client(&leaf);
    assert!(served.takes(&served.client(&linked)).await, "linked to the authority by another");
    let stray = stranger.intermediate("the authority").client(&leaf);
    assert!(!served.takes(&served.client(&stray)).await, "linked to one of the same name");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_certificates_are_optional_whom_nobody_knows_is_told_so() {
    let served = Setup { clients: Clients::Optional, ..Setup::default() }.serve().await;
    let status = served.get(&client(&served.authority, None)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
    served.get(&served.client(&served.authority.spiffe(ORDERS))).await.unwrap();
    let stranger = Authority::new("someone else").spiffe(ORDERS);
    assert!(!served.takes(&served.client(&stranger)).await, "one that is presented must be trusted");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_name_principals() {
    let served = Setup::default().serve().await;
    let issue = |leaf: Leaf<'_>| served.client(&served.authority.client(&leaf));
    served.get(&issue(Leaf { spiffe: Some(ORDERS), ..Leaf::default() })).await.unwrap();
    served.get(&issue(Leaf { dns: &["billing.internal"], ..Leaf::default() })).await.unwrap();
    let other = "spiffe://example.org/other";
    for (leaf, expected) in [
        (Leaf { spiffe: Some(other), dns: &["billing.internal"], ..Leaf::default() }, Code::PermissionDenied),
        (Leaf { dns: &["other.internal"], ..Leaf::default() }, Code::PermissionDenied),
        (Leaf { spiffe: Some("spiffe://example.com/orders"), ..Leaf::default() }, Code::Unauthenticated),
        (Leaf { dns: &["*.internal"], ..Leaf::default() }, Code::Unauthenticated),
        (Leaf { common_name: Some("legacy"), ..Leaf::default() }, Code::Unauthenticated),
    ] {
        let status = served.get(&issue(leaf)).await.unwrap_err();
        assert_eq!(status.code(), expected, "{status}");
    }
    let readers = served.readers();
    for expected in ["orders", "billing", other, "dns:other.internal"] {
        let principal = format!("Workload::\"{expected}\"");
        let found = readers.iter().find(|(reader, _)| *reader == principal);
        assert!(found.is_some_and(|(_, proof)| proof.starts_with("mtls:sha256=")), "{expected}: {readers:?}");
    }

    let served = Setup { common_name: true, ..Setup::default() }.serve().await;
    let legacy = served.authority.client(&Leaf { common_name: Some("legacy"), ..Leaf::default() });
    served.get(&served.client(&legacy)).await.unwrap();
    assert!(served.readers().iter().any(|(reader, _)| reader == "Workload::\"old-app\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn b24_a_renewed_certificate_is_for_new_connections_and_old_ones_live_on() {
    // As Kubernetes mounts a secret: the files are links through a link that is replaced.
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new("the authority");
    let version = |name: &str| {
        std::fs::create_dir(folder.path().join(name)).unwrap();
        write(&folder.path().join(name), &authority.server(), &authority.pem());
        symlink(name, folder.path().join("..next")).unwrap();
        std::fs::rename(folder.path().join("..next"), folder.path().join("..data")).unwrap();
    };
    version("..first");
    for name in ["tls.crt", "tls.key", "ca.crt"] {
        symlink(Path::new("..data").join(name), folder.path().join(name)).unwrap();
    }
    let identity = client(&authority, Some(&authority.spiffe(ORDERS)));
    let data = folder.path().to_owned();
    let second = Authority::new("the authority of later");
    let issued = second.server();
    let served = Setup::default().serve_from(folder, authority).await;
    let mut old = Taken::connect(&identity, served.address).await.unwrap();

    std::fs::create_dir(data.join("..second")).unwrap();
    write(&data.join("..second"), &issued, &served.authority.pem());
    symlink("..second", data.join("..next")).unwrap();
    std::fs::rename(data.join("..next"), data.join("..data")).unwrap();
    until("the change is noticed", async || served.tls.reloads().0 > 0).await;

    assert!(old.answers().await, "the old connection lives on");
    let renewed = client(&second, Some(&served.authority.spiffe(ORDERS)));
    let new = Taken::connect(&renewed, served.address).await.expect("the new certificate is presented");
    assert_ne!(new.server_certificate(), old.server_certificate());
    assert!(Taken::connect(&identity, served.address).await.is_none(), "the old one no longer is");
}

#[tokio::test(flavor = "multi_thread")]
async fn b24_what_is_not_valid_is_kept_out_and_the_old_pair_served() {
    let served = Setup::default().serve().await;
    let identity = served.client(&served.authority.spiffe(ORDERS));
    let before = Taken::connect(&identity, served.address).await.unwrap().server_certificate();
    let (one, other) = (served.authority.server(), served.authority.server());
    let at = |from, until| served.authority.server_valid(Some((from, until)));
    let authorities = served.authority.pem();
    for (issued, authorities, word) in [
        (Issued { key: other.key.clone(), ..one.clone() }, authorities.as_str(), "is not the key of"),
        (at((2020, 1, 1), (2025, 12, 1)), authorities.as_str(), "expired"),
        (at((2026, 2, 1), (2030, 1, 1)), authorities.as_str(), "not valid before"),
        (
            Issued { certificate: one.certificate[..200].to_owned(), ..other.clone() },
            authorities.as_str(),
            "PEM",
        ),
        (Issued { key: String::new(), ..one.clone() }, authorities.as_str(), "no private key"),
    ] {
        let kept_out = served.tls.reloads().1;
        write(served.folder.path(), &issued, authorities);
        let error = served.tls.reload("test").unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        assert!(served.tls.reloads().1 > kept_out, "it is counted");
        let after = Taken::connect(&identity, served.address).await.expect("the old pair is served");
        assert_eq!(after.server_certificate(), before);
    }
    write(served.folder.path(), &one, "");
    let error = served.tls.reload("test").unwrap_err().to_string();
    assert!(error.contains("no certificate"), "{error}");
    let after = Taken::connect(&identity, served.address).await.expect("the old authorities are trusted");
    assert_ne!(after.server_certificate(), before, "the new pair is served: what is wrong is not in it");
    write(served.folder.path(), &one, &authorities);
    served.tls.reload("test").unwrap();
    assert!(served.takes(&identity).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn b24_an_authority_is_distrusted_though_the_pair_beside_it_is_refused() {
    let served = Setup::default().serve().await;
    let revoked = Authority::new("to be revoked");
    let both = format!("{}{}", served.authority.pem(), revoked.pem());
    let issued = served.authority.server();
    write(served.folder.path(), &issued, &both);
    served.tls.reload("test").unwrap();
    let (stays, goes) = (served.authority.spiffe(ORDERS), revoked.spiffe(ORDERS));
    let (stays, goes) = (served.client(&stays), served.client(&goes));
    let mut stay = Taken::connect(&stays, served.address).await.unwrap();
    let mut go = Taken::connect(&goes, served.address).await.unwrap();

    let expired = served.authority.server_valid(Some(((2020, 1, 1), (2025, 12, 1))));
    write(served.folder.path(), &expired, &both);
    served.tls.reload("test").unwrap_err();
    assert!(go.answers().await, "nothing has changed for clients");
    write(served.folder.path(), &expired, &served.authority.pem());
    let error = served.tls.reload("test").unwrap_err().to_string();
    assert!(error.contains("tls.crt") && error.contains("expired"), "{error}");
    go.closed().await;
    assert!(!served.takes(&goes).await);
    assert!(stay.answers().await && served.takes(&stays).await, "the last valid pair is served");
    let [(_, _, kept_out), (_, taken, _)] = served.tls.reloads_by_part();
    assert!(kept_out >= 2 && taken >= 2, "{kept_out} {taken}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_expires_takes_its_clients_with_it_and_the_last_one_all() {
    let served = Setup { clients: Clients::Optional, ..Setup::default() }.serve().await;
    let ((first, of_first), (second, of_second)) = (ending(2027), ending(2029));
    let issued = served.authority.server();
    write(served.folder.path(), &issued, &format!("{first}{second}"));
    served.tls.reload("test").unwrap();
    let (of_first, of_second) = (served.client(&of_first), served.client(&of_second));
    let mut goes = Taken::connect(&of_first, served.address).await.unwrap();
    let mut stays = Taken::connect(&of_second, served.address).await.unwrap();

    served.clock.set_wall("2028-01-01T00:00:00Z".parse().unwrap());
    served.tls.sweep();
    goes.closed().await;
    assert!(!served.takes(&of_first).await, "not even by resuming a session");
    assert!(stays.answers().await && served.takes(&of_second).await);

    served.clock.set_wall("2030-01-01T00:00:00Z".parse().unwrap());
    served.tls.sweep();
    stays.closed().await;
    assert!(!served.takes(&of_second).await);
    assert!(served.takes(&client(&served.authority, None)).await, "the listener lives on");
    write(served.folder.path(), &issued, &served.authority.pem());
    served.tls.reload("test").unwrap();
    assert!(served.takes(&served.client(&served.authority.spiffe(ORDERS))).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn b24_clients_of_an_authority_that_is_taken_out_are_dropped_and_others_stay() {
    let served = Setup::default().serve().await;
    let revoked = Authority::new("to be revoked");
    let both = format!("{}{}", served.authority.pem(), revoked.pem());
    let issued = served.authority.server();
    write(served.folder.path(), &issued, &both);
    served.tls.reload("test").unwrap();

    let (stays, goes) = (served.authority.spiffe(ORDERS), revoked.spiffe(ORDERS));
    let (stays, goes) = (served.client(&stays), served.client(&goes));
    let mut stay = Taken::connect(&stays, served.address).await.unwrap();
    let mut idle = Taken::connect(&goes, served.address).await.unwrap();
    let resumed = Taken::connect(&goes, served.address).await.unwrap();
    assert!(resumed.is_resumed(), "sessions are resumed while nothing changes");
    let mut health = HealthClient::new(channel(&goes, served.address).await);
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert!(watch.message().await.unwrap().is_some());
    until("all are known", async || served.tls.certified_connections() == 4).await;

    write(served.folder.path(), &issued, &served.authority.pem());
    served.tls.reload("test").unwrap();
    idle.closed().await;
    let cut = tokio::time::timeout(HUNG, watch.message()).await.expect("a call in flight ends too");
    assert!(!matches!(cut, Ok(Some(_))), "{cut:?}");
    assert!(!served.takes(&goes).await, "not even by resuming a session");
    assert!(stay.answers().await, "whom another authority vouches for stays");
    assert!(served.takes(&stays).await);
    drop((stay, idle, resumed, watch, health));
    until("nothing is left behind", async || served.tls.certified_connections() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_ends_with_its_clients_certificate() {
    let served = Setup::default().serve().await;
    let valid = Some(((2025, 12, 1), (2026, 1, 2)));
    let short = Leaf { spiffe: Some(ORDERS), valid, ..Leaf::default() };
    let short = served.client(&served.authority.client(&short));
    let long = served.client(&served.authority.spiffe(ORDERS));
    let mut ends = Taken::connect(&short, served.address).await.unwrap();
    let mut stays = Taken::connect(&long, served.address).await.unwrap();
    served.tls.sweep();
    assert!(ends.answers().await, "it is valid until the day is over");
    served.clock.advance(Duration::from_secs(2 * 86_400));
    served.tls.sweep();
    ends.closed().await;
    assert!(stays.answers().await);
    assert!(!served.takes(&short).await, "not even by resuming a session");
}

#[tokio::test(flavor = "multi_thread")]
async fn b25_silent_handshakes_hold_up_nobody_and_end() {
    let served = Setup::default().serve().await;
    let identity = served.client(&served.authority.spiffe(ORDERS));
    // One after the other, these would take longer than any test may.
    let mut silent = Vec::new();
    for number in 0..30 {
        let mut stream = tokio::net::TcpStream::connect(served.address).await.unwrap();
        if number % 2 == 0 {
            stream.write_all(&[22, 3, 1, 2, 0, 1]).await.unwrap();
        }
        silent.push(stream);
    }
    assert!(served.takes(&identity).await);
    for mut stream in silent {
        // An alert may come first, and then the end; or the end alone, as a reset.
        let mut rest = Vec::new();
        let _ = tokio::time::timeout(HUNG, stream.read_to_end(&mut rest)).await.expect("it is closed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn b25_a_connection_has_its_place_before_its_handshake() {
    // Four of these are for the network, and half of them for whom nobody knows.
    let limits = Limits { connections: 20, ..Limits::default() };
    let served = Setup { limits, ..Setup::default() }.serve().await;
    let identity = served.client(&served.authority.spiffe(ORDERS));
    let mut silent = Vec::new();
    for _ in 0..2 {
        silent.push(tokio::net::TcpStream::connect(served.address).await.unwrap());
    }
    // The kernel hands connections over in order: once this one is turned away, the two before it are in.
    let refused = connect(&identity, served.address).await;
    assert!(refused.is_err(), "half of the network's places are taken by handshakes");
    for mut stream in silent {
        let mut rest = Vec::new();
        let _ = tokio::time::timeout(HUNG, stream.read_to_end(&mut rest)).await.expect("it is closed");
    }
    until("the places are free again", async || served.takes(&identity).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b25_strangers_take_half_of_the_networks_places_and_none_of_the_sockets() {
    let limits = Limits { connections: 20, ..Limits::default() };
    let served = Setup { limits, clients: Clients::Optional, ..Setup::default() }.serve().await;
    let anonymous = client(&served.authority, None);
    let identity = served.client(&served.authority.spiffe(ORDERS));
    let mut known = Taken::connect(&identity, served.address).await.unwrap();
    let mut strangers = Vec::new();
    for _ in 0..2 {
        strangers.push(Taken::connect(&anonymous, served.address).await.expect("a place for the unknown"));
    }
    assert!(!served.takes(&anonymous).await, "a third has none, though the network has one");
    strangers.pop();
    // Each that comes is unknown until its handshake has shown a certificate.
    let mut others = Vec::new();
    until("the place of the stranger is free again", async || {
        others.extend(Taken::connect(&identity, served.address).await);
        others.len() == 2
    })
    .await;
    assert!(!served.takes(&identity).await, "the network has no place left");
    let socket = served.folder.path().join("broker.sock");
    let mut local = HealthClient::new(crate::support::channel(&socket).await);
    local.check(HealthCheckRequest::default()).await.expect("a Unix socket has");
    assert!(known.answers().await && strangers[0].answers().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn b25_a_connection_is_unknown_until_a_call_on_it_is_authenticated() {
    // Two of these are for the network, and one of them for whom nobody knows.
    let limits = Limits { connections: 18, ..Limits::default() };
    let served = Setup { limits, clients: Clients::Optional, ..Setup::default() }.serve().await;
    let anonymous = channel(&client(&served.authority, None), served.address).await;
    let other = served.client(&served.authority.spiffe(ORDERS));
    let mut secrets = SecretServiceClient::new(anonymous.clone());
    HealthClient::new(anonymous).check(HealthCheckRequest::default()).await.unwrap();
    assert!(!served.takes(&other).await, "a call to what is open to everyone makes nobody known");
    let status = secrets.get_secret(database()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
    assert!(!served.takes(&other).await, "nor does one that was not let in");
    let mut request = Request::new(database());
    let bearer = format!("Bearer {}", served.token().await);
    request.metadata_mut().insert("authorization", bearer.parse().unwrap());
    secrets.get_secret(request).await.unwrap();
    assert!(served.takes(&other).await, "one that was does, though the connection is the same");
}

#[tokio::test(flavor = "multi_thread")]
async fn b25_who_says_nothing_after_the_handshake_is_closed() {
    let served = Setup::default().serve().await;
    let identity = served.client(&served.authority.spiffe(ORDERS));
    let mut stream = connect(&identity, served.address).await.unwrap();
    until("it is known", async || served.tls.certified_connections() == 1).await;
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(HUNG, stream.read_to_end(&mut rest)).await.expect("it is closed");
    until("it is forgotten", async || served.tls.certified_connections() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_caller_has_its_share_of_the_connections() {
    let limits = Limits { connections_per_caller: 2, ..Limits::default() };
    let served = Setup { limits, ..Setup::default() }.serve().await;
    let identity = served.client(&served.authority.spiffe(ORDERS));
    let first = Taken::connect(&identity, served.address).await.unwrap();
    let mut second = Taken::connect(&identity, served.address).await.unwrap();
    assert!(!served.takes(&identity).await, "a third is one too many");
    let elsewhere = connect_from("127.0.0.2", &identity, served.address).await.unwrap();
    assert!(Taken::over(elsewhere).await.is_some(), "who calls from elsewhere has a share of their own");
    assert!(second.answers().await);
    drop(first);
    until("the place is free again", async || served.takes(&identity).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_come_and_go_leave_nothing_behind() {
    let limits = Limits { connections: 20, connections_per_caller: 2, ..Limits::default() };
    let served = Setup { limits, ..Setup::default() }.serve().await;
    let identity = served.client(&served.authority.spiffe(ORDERS));
    for _ in 0..100 {
        until("a place is free again", async || served.takes(&identity).await).await;
    }
    until("the last one is forgotten", async || served.tls.certified_connections() == 0).await;
}

#[test]
fn b26_a_broker_out_of_file_descriptors_takes_calls_again_once_it_has_some() {
    use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
    use std::os::unix::net::UnixStream;

    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    program.ok(["get", "-e", "development", "database#host"]);
    let pid = Some(program.id());
    // No descriptor has a number below this one that is not taken.
    let none = Rlimit { current: Some(1), maximum: getrlimit(Resource::Nofile).maximum };
    let before = prlimit(pid, Resource::Nofile, none).expect("it is our own child");
    let mut waiting = UnixStream::connect(&program.socket).unwrap();
    waiting.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    program.wait_for_log("accept failed");
    prlimit(pid, Resource::Nofile, before).unwrap();
    // Whoever waited meanwhile is served: the head of the server's own SETTINGS frame comes.
    waiting.set_read_timeout(Some(HUNG)).unwrap();
    waiting.read_exact(&mut [0; 9]).expect("the connection was taken");
    program.ok(["get", "-e", "development", "database#host"]);
}
