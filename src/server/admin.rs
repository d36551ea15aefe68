//! The operators' door: plain HTTP on a port of its own, for probes and scrapes.
//!
//! | path | answer |
//! |---|---|
//! | `/livez` | 200 while this process answers at all |
//! | `/readyz` | 503 while the broker takes no calls: told to stop, or a check fails that it needs |
//! | `/health` | every check as JSON, 503 where one fails |
//! | `/metrics` | OpenMetrics text |
//!
//! `?verbose` lists the checks of the first two, a line each.
//!
//! Whoever reaches it may ask, so nothing here names a secret, a caller, an account or a path, and nothing can be changed
//! through it. It may listen on any address: probes come from the network.
//!
//! INVARIANT: a connection carries one request and is over within [`WITHIN`], whatever its other end does; there are
//! never more than [`CONNECTIONS`], and of one network never more than [`PER_NETWORK`].
//!
//! INVARIANT: who dawdles keeps nobody out. A probe that finds no place means a restart, so a newcomer is closed only
//! where all whose place it could have are being answered:
//!
//! ```text
//! newcomer ─▶ network full? ─ yes ─▶ the oldest of it ──┐
//!                   │ no                                 ├─ without a whole head goes
//!              door full? ──── yes ─▶ the oldest of all ─┘
//!                   │ no
//!               comes in
//! ```

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use http::{Request, StatusCode, Uri};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};
use tower::ServiceExt as _;

use super::ServerError;
use super::health::{Finding, Health};
use crate::telemetry;

/// How many connections there may be at a time.
const CONNECTIONS: usize = 64;
/// How many of them from one IPv4 address, or from one IPv6 network of 64 bits.
const PER_NETWORK: usize = 8;
/// How long a connection may take, from its first byte to the last of its answer.
const WITHIN: Duration = Duration::from_secs(10);
/// How much of that it may take for its request's head.
const HEAD_WITHIN: Duration = Duration::from_secs(2);
/// The largest head, in bytes.
const LARGEST_HEAD: usize = 16 * 1024;
/// The most header fields.
const MOST_FIELDS: usize = 64;

/// Gives the figures of one scrape. May block for a moment: it reads what the kernel says.
pub type Scrape = Arc<dyn Fn() -> String + Send + Sync>;

/// The door, open but not yet served.
#[derive(Debug)]
pub struct BoundAdmin {
    listener: TcpListener,
    address: SocketAddr,
}

impl BoundAdmin {
    /// Listens.
    ///
    /// # Errors
    /// [`ServerError::Listen`].
    pub async fn bind(address: SocketAddr) -> Result<Self, ServerError> {
        let refuse = |error: std::io::Error| ServerError::Listen {
            address: format!("http://{address}"),
            problem: format!("{error}; change listen.admin"),
        };
        let listener = TcpListener::bind(address).await.map_err(refuse)?;
        let address = listener.local_addr().map_err(refuse)?;
        Ok(Self { listener, address })
    }

    /// The address, with the port really taken.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until this future is dropped, and every connection with it. It outlives the order to stop: `/readyz` says
    /// so while calls in flight end.
    pub async fn serve(self, health: Arc<Health>, scrape: Scrape) {
        let router = router(Admin { health, scrape, turn: Arc::new(Semaphore::new(1)) });
        let mut guests = Guests::default();
        loop {
            match self.listener.accept().await {
                Ok((stream, from)) => {
                    let settled = Arc::default();
                    let conversation = converse(stream, router.clone(), Arc::clone(&settled));
                    guests.receive(network(from.ip()), settled, conversation).await;
                }
                Err(error) => {
                    tracing::warn!(%error, "the admin door could not accept a connection");
                    pause().await;
                }
            }
            // What has arrived by now is read before the next one comes in, so that no whole head counts as half.
            tokio::task::yield_now().await;
        }
    }
}

/// Whose connections are counted together: who has an IPv6 address has all of its network of 64 bits.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address @ IpAddr::V4(_) => address,
    }
}

/// Who is here, in the order in which they came.
#[derive(Default)]
struct Guests {
    here: Vec<Guest>,
    conversations: JoinSet<()>,
}

struct Guest {
    network: IpAddr,
    /// Set once and for good: by the conversation when it has the whole head, or before that by whoever ends it.
    settled: Arc<AtomicBool>,
    conversation: AbortHandle,
}

/// What there is for a newcomer.
enum Place {
    Free,
    /// That of a guest who must go first, and whom nobody else chooses any more.
    Of(AbortHandle),
    None,
}

impl Guests {
    /// Lets a conversation begin, where there is a place or one can be made; says whether it did.
    async fn receive(
        &mut self,
        network: IpAddr,
        settled: Arc<AtomicBool>,
        conversation: impl Future<Output = ()> + Send + 'static,
    ) -> bool {
        while self.conversations.try_join_next().is_some() {}
        self.here.retain(|guest| !guest.conversation.is_finished());
        match self.place_for(network) {
            Place::Free => {}
            Place::Of(dawdler) => self.dismiss(&dawdler).await,
            Place::None => return false,
        }
        let conversation = self.conversations.spawn(conversation);
        self.here.push(Guest { network, settled, conversation });
        true
    }

    fn place_for(&self, network: IpAddr) -> Place {
        let of_network = |guest: &&Guest| guest.network == network;
        if self.here.iter().filter(of_network).count() >= PER_NETWORK {
            self.of_oldest(of_network)
        } else if self.here.len() >= CONNECTIONS {
            self.of_oldest(|_| true)
        } else {
            Place::Free
        }
    }

    fn of_oldest(&self, among: impl Fn(&&Guest) -> bool) -> Place {
        let mut oldest = self.here.iter().filter(among);
        let dawdler = oldest.find(|guest| !guest.settled.swap(true, Ordering::AcqRel));
        dawdler.map_or(Place::None, |guest| Place::Of(guest.conversation.clone()))
    }

    /// Ends a conversation; its socket is closed when this returns.
    async fn dismiss(&mut self, dawdler: &AbortHandle) {
        tracing::debug!("an admin connection without a whole request gave its place to another");
        dawdler.abort();
        while !dawdler.is_finished() && self.conversations.join_next().await.is_some() {}
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "there is no condition to wait for: file descriptors come back in time"
)]
async fn pause() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// One request and its answer; `settled` is set when the request's head is complete.
async fn converse(stream: TcpStream, router: Router, settled: Arc<AtomicBool>) {
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        settled.store(true, Ordering::Release);
        router.clone().oneshot(request)
    });
    let conversation = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(LARGEST_HEAD)
        .max_headers(MOST_FIELDS)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(WITHIN, conversation).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "an admin connection failed"),
        Err(_) => tracing::debug!("an admin connection took too long"),
    }
}

#[derive(Clone)]
struct Admin {
    health: Arc<Health>,
    scrape: Scrape,
    /// Of one scrape at a time.
    turn: Arc<Semaphore>,
}

fn router(admin: Admin) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .fallback(nothing_here)
        .with_state(admin)
}

async fn livez(uri: Uri) -> Response {
    lines("livez", is_verbose(&uri), [("runtime", true)])
}

async fn readyz(State(admin): State<Admin>, uri: Uri) -> Response {
    let findings = admin.health.findings();
    let needed = findings.iter().filter(|found| found.needed_for_ready);
    let checks = needed.map(|found| (found.name.as_str(), found.result.is_ok()));
    lines("readyz", is_verbose(&uri), checks.chain([("shutdown", !admin.health.draining())]))
}

/// As Kubernetes writes its own health endpoints: `ok`, or a line for each check where one fails or all are asked for.
fn lines<'a>(endpoint: &str, verbose: bool, checks: impl IntoIterator<Item = (&'a str, bool)>) -> Response {
    let mut text = String::new();
    let mut passed = true;
    for (name, ok) in checks {
        text += &if ok { format!("[+]{name} ok\n") } else { format!("[-]{name} failed\n") };
        passed &= ok;
    }
    let text = match (passed, verbose) {
        (true, false) => "ok".to_owned(),
        (true, true) => format!("{text}{endpoint} check passed\n"),
        (false, _) => format!("{text}{endpoint} check failed\n"),
    };
    answer(status(passed), "text/plain; charset=utf-8", text)
}

fn is_verbose(uri: &Uri) -> bool {
    let mut parameters = uri.query().unwrap_or_default().split('&');
    parameters.any(|parameter| parameter.split('=').next() == Some("verbose"))
}

async fn health(State(admin): State<Admin>) -> Response {
    let findings = admin.health.findings();
    let passed = findings.iter().all(|found| found.result.is_ok());
    let (status_word, passed) = match (admin.health.draining(), passed) {
        (true, _) => ("draining", false),
        (false, true) => ("ok", true),
        (false, false) => ("failing", false),
    };
    let checks: Vec<_> = findings.iter().map(shown).collect();
    as_json(status(passed), &json!({ "status": status_word, "checks": checks }))
}

fn shown(found: &Finding) -> Value {
    let checked_at = found.checked_at.map(|at| at.to_string());
    let mut shown = json!({
        "name": found.name,
        "status": if found.result.is_ok() { "ok" } else { "failing" },
        "needed_for_ready": found.needed_for_ready,
        "checked_at": checked_at,
    });
    if let (Err(problem), Some(members)) = (&found.result, shown.as_object_mut()) {
        members.insert("detail".to_owned(), problem.as_str().into());
    }
    shown
}

async fn metrics(State(admin): State<Admin>) -> Response {
    match figures(admin).await {
        Some(figures) => answer(StatusCode::OK, telemetry::CONTENT_TYPE, figures),
        None => answer(StatusCode::INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", String::new()),
    }
}

/// One scrape, off the reactor and alone: a kernel or a disk that hangs holds one thread, however many ask. `None` where
/// it panicked.
async fn figures(Admin { scrape, turn, .. }: Admin) -> Option<String> {
    let turn = turn.acquire_owned().await.ok()?;
    let scraping = tokio::task::spawn_blocking(move || {
        // The turn ends with the scrape, not with the connection that asked for it.
        let _turn = turn;
        scrape()
    });
    scraping.await.ok()
}

async fn nothing_here() -> Response {
    let paths = ["/livez", "/readyz", "/health", "/metrics"];
    as_json(StatusCode::NOT_FOUND, &json!({ "error": "there is nothing at this path", "paths": paths }))
}

const fn status(passed: bool) -> StatusCode {
    if passed { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn as_json(status: StatusCode, value: &Value) -> Response {
    answer(status, "application/json", format!("{value}\n"))
}

fn answer(status: StatusCode, kind: &'static str, body: String) -> Response {
    let headers = [(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-store"), (X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (status, headers, body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::server::health::Check;
    use std::sync::atomic::AtomicUsize;
    use std::sync::{Mutex, mpsc};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::sync::watch;

    struct Fixture {
        address: SocketAddr,
        health: Arc<Health>,
        works: Arc<AtomicBool>,
        stop: watch::Sender<bool>,
        _connections: JoinSet<()>,
    }

    async fn fixture() -> Fixture {
        fixture_with(Arc::new(|| "# EOF\n".to_owned())).await
    }

    async fn fixture_with(scrape: Scrape) -> Fixture {
        let works = Arc::new(AtomicBool::new(true));
        let check = |name: &str, needed| {
            let works = Arc::clone(&works);
            let check = Check::needed(name, move || {
                let works = works.load(Ordering::SeqCst);
                async move { if works { Ok(()) } else { Err("disk \"full\"".to_owned()) } }
            });
            Check { needed_for_ready: needed, ..check }
        };
        let checks = vec![check("audit", true), check("store:production", false)];
        let (stop, stopped) = watch::channel(false);
        let health = Health::new(checks, ManualClock::new(jiff::Timestamp::UNIX_EPOCH), stopped);
        health.check_now().await;
        let door = BoundAdmin::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = door.address();
        let mut serving = JoinSet::new();
        serving.spawn(door.serve(Arc::clone(&health), scrape));
        Fixture { address, health, works, stop, _connections: serving }
    }

    async fn send(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// The status, the head and the body.
    async fn ask(address: SocketAddr, method: &str, target: &str) -> (u16, String, String) {
        let answer = send(address, &format!("{method} {target} HTTP/1.1\r\nhost: x\r\n\r\n")).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_ascii_lowercase(), body.to_owned())
    }

    #[tokio::test]
    async fn a_broker_that_works_says_so() {
        let fixture = fixture().await;
        for path in ["/livez", "/readyz"] {
            let (status, head, body) = ask(fixture.address, "GET", path).await;
            assert_eq!((status, body.as_str()), (200, "ok"), "{path}");
            assert!(head.contains("cache-control: no-store") && head.contains("connection: close"), "{head}");
        }
        let (_, _, body) = ask(fixture.address, "GET", "/readyz?verbose").await;
        assert_eq!(body, "[+]audit ok\n[+]shutdown ok\nreadyz check passed\n");
        let (status, head, body) = ask(fixture.address, "GET", "/metrics").await;
        assert_eq!((status, body.as_str()), (200, "# EOF\n"));
        assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
        let (status, _, body) = ask(fixture.address, "HEAD", "/health").await;
        assert_eq!((status, body.as_str()), (200, ""));
    }

    #[tokio::test]
    async fn what_fails_is_named_and_the_process_lives() {
        let fixture = fixture().await;
        fixture.works.store(false, Ordering::SeqCst);
        fixture.health.check_now().await;
        assert_eq!(ask(fixture.address, "GET", "/livez").await.0, 200);
        let (status, _, body) = ask(fixture.address, "GET", "/readyz").await;
        assert_eq!((status, body.as_str()), (503, "[-]audit failed\n[+]shutdown ok\nreadyz check failed\n"));
        let (status, _, body) = ask(fixture.address, "GET", "/health").await;
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &body["status"]), (503, &json!("failing")));
        assert_eq!(
            body["checks"][1],
            json!({
                "name": "store:production",
                "status": "failing",
                "needed_for_ready": false,
                "checked_at": "1970-01-01T00:00:00Z",
                "detail": "disk \"full\"",
            })
        );
    }

    #[tokio::test]
    async fn a_broker_that_stops_takes_no_calls() {
        let fixture = fixture().await;
        fixture.stop.send(true).unwrap();
        assert_eq!(ask(fixture.address, "GET", "/livez").await.0, 200);
        let (status, _, body) = ask(fixture.address, "GET", "/readyz").await;
        assert!(status == 503 && body.contains("[-]shutdown failed"), "{body}");
        let (status, _, body) = ask(fixture.address, "GET", "/health").await;
        assert!(status == 503 && body.contains("\"draining\""), "{body}");
    }

    #[tokio::test]
    async fn there_is_nothing_else() {
        let fixture = fixture().await;
        for (method, target, expected) in [
            ("GET", "/", 404),
            ("GET", "/metrics/", 404),
            ("GET", "//livez", 404),
            ("GET", "/livez/../metrics", 404),
            ("POST", "/nothing", 404),
            ("POST", "/metrics", 405),
            ("DELETE", "/health", 405),
        ] {
            let (status, _, body) = ask(fixture.address, method, target).await;
            assert_eq!(status, expected, "{method} {target}: {body}");
        }
    }

    #[tokio::test]
    async fn a_head_has_bounds() {
        let fixture = fixture().await;
        let fields: String = (0..200).map(|n| format!("x-{n}: y\r\n")).collect();
        let large = format!("x: {}\r\n", "y".repeat(64 * 1024));
        for fields in [fields, large] {
            // The door may close before all is sent: it owes this nothing.
            let mut stream = TcpStream::connect(fixture.address).await.unwrap();
            let _ = stream.write_all(format!("GET /livez HTTP/1.1\r\n{fields}\r\n").as_bytes()).await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            assert!(!String::from_utf8_lossy(&answer).contains("200 OK"));
        }
        assert_eq!(ask(fixture.address, "GET", "/livez").await.0, 200);
    }

    /// A connection from this address of the machine itself.
    async fn connect_from(last: u8, address: SocketAddr) -> TcpStream {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, last], 0))).unwrap();
        socket.connect(address).await.unwrap()
    }

    async fn lives(mut stream: TcpStream) -> bool {
        stream.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer.starts_with("HTTP/1.1 200 ")
    }

    #[tokio::test]
    async fn silent_connections_keep_nobody_out_and_are_closed_in_their_time() {
        let fixture = fixture().await;
        let mut silent = Vec::new();
        for n in 0..CONNECTIONS {
            let last = u8::try_from(1 + n / PER_NETWORK).unwrap();
            silent.push(connect_from(last, fixture.address).await);
        }
        for last in [100, 1, 1, 8, 101] {
            silent.push(connect_from(last, fixture.address).await);
            assert!(lives(connect_from(last, fixture.address).await).await, "from 127.0.0.{last}");
        }
        for mut stream in silent {
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            assert!(!answer.starts_with(b"HTTP/1.1 200 "));
        }
        assert!(lives(connect_from(1, fixture.address).await).await);
    }

    /// Comes from this address and stays for good, as one that is answered or one that is not yet; `None` where it is
    /// closed at once.
    async fn come(guests: &mut Guests, from: &str, answered: bool) -> Option<AbortHandle> {
        let settled = Arc::new(AtomicBool::new(answered));
        let came = guests.receive(network(from.parse().unwrap()), settled, std::future::pending()).await;
        came.then(|| guests.here.last().unwrap().conversation.clone())
    }

    /// Which of these are gone.
    fn gone(guests: &[AbortHandle]) -> Vec<usize> {
        guests.iter().enumerate().filter(|(_, guest)| guest.is_finished()).map(|(n, _)| n).collect()
    }

    #[tokio::test]
    async fn in_a_full_network_the_oldest_without_a_head_makes_way() {
        for (of_network, other) in [
            ("10.0.0.1", "10.0.0.2"),
            ("::ffff:10.0.0.1", "10.0.0.2"),
            ("2001:db8:0:1::7", "2001:db8:0:2::7"),
        ] {
            let mut guests = Guests::default();
            let mut came = vec![come(&mut guests, other, false).await.unwrap()];
            for n in 0..PER_NETWORK {
                came.push(come(&mut guests, of_network, n == 0).await.unwrap());
            }
            assert!(gone(&came).is_empty());
            for expected in [vec![2_usize], vec![2, 3]] {
                assert!(come(&mut guests, of_network, true).await.is_some(), "{of_network}");
                assert_eq!(gone(&came), expected, "{of_network}");
            }
            assert!(come(&mut guests, other, false).await.is_some());
            assert_eq!(gone(&came), vec![2_usize, 3], "another network has places of its own");
        }
        let mut guests = Guests::default();
        for n in 0..PER_NETWORK {
            come(&mut guests, &format!("2001:db8:0:1:{n}::1"), true).await.unwrap();
        }
        assert!(come(&mut guests, "2001:db8:0:1:ffff::1", false).await.is_none(), "a /64 is one network");
    }

    #[tokio::test]
    async fn at_a_full_door_the_oldest_without_a_head_makes_way() {
        let mut guests = Guests::default();
        let mut came = Vec::new();
        for n in 0..CONNECTIONS {
            came.push(come(&mut guests, &format!("10.0.{n}.1"), n % 2 == 0).await.unwrap());
        }
        for n in 0..CONNECTIONS / 2 {
            assert!(come(&mut guests, &format!("10.1.{n}.1"), true).await.is_some());
            assert_eq!(gone(&came).last(), Some(&(2 * n + 1)));
        }
        assert!(come(&mut guests, "10.2.0.1", false).await.is_none(), "all are being answered");
        assert_eq!(gone(&came).len(), CONNECTIONS / 2);
        came[0].abort();
        while !came[0].is_finished() {
            tokio::task::yield_now().await;
        }
        assert!(come(&mut guests, "10.2.0.1", false).await.is_some(), "a place that is free again");
    }

    #[tokio::test]
    async fn scrapes_come_one_after_the_other_and_block_nobody() {
        const HUNG: Duration = Duration::from_secs(60);
        let (entered, mut entries) = tokio::sync::mpsc::unbounded_channel();
        let (release, released) = mpsc::channel::<()>();
        let (released, inside) = (Mutex::new(released), AtomicUsize::new(0));
        let scrape = move || {
            entered.send(inside.fetch_add(1, Ordering::SeqCst)).unwrap();
            released.lock().unwrap().recv_timeout(HUNG).unwrap();
            inside.fetch_sub(1, Ordering::SeqCst);
            "# EOF\n".to_owned()
        };
        let fixture = fixture_with(Arc::new(scrape)).await;
        let asking: Vec<_> = (0..4).map(|_| tokio::spawn(ask(fixture.address, "GET", "/metrics"))).collect();
        assert_eq!(entries.recv().await, Some(0));
        for _ in 0..10 {
            assert_eq!(ask(fixture.address, "GET", "/livez").await.0, 200);
        }
        for _ in 0..4 {
            release.send(()).unwrap();
        }
        for asked in asking {
            assert_eq!(asked.await.unwrap().0, 200);
        }
        while let Ok(others) = entries.try_recv() {
            assert_eq!(others, 0, "two scrapes at a time");
        }
    }
}
