//! What a cached read costs, against a bare tonic echo of the same message sizes: the same client, the same machine,
//! the same run. Every figure is a ratio to the echo; absolute rates are printed beside it, and mean nothing alone.
//!
//! ```text
//! cargo bench --bench cached_read                  all rows, about a minute and a half
//! cargo bench --bench cached_read -- --seconds 1   shorter windows, more noise
//! ```
//!
//! Server and client are processes of their own, each pinned to one core. Echo and broker take turns, row by row, so
//! that a drift of the machine's speed hits both.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "a benchmark reads the time, prints, and stops when something is wrong"
)]

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger::clock::SystemClock;
use claviger::config::assembly::Running;
use claviger::config::{Resolved, RootKeyChoice};
use claviger::environment::{Durability, Environment, Registry};
use claviger::identity::peer_credentials;
use claviger::policy::PolicySource;
use claviger::proto::v1;
use claviger::proto::v1::secret_service_client::SecretServiceClient;
use claviger::proto::v1::secret_service_server::{SecretService, SecretServiceServer};
use claviger::server::{Limits, Listen};
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

/// The size of the value that is read, in bytes.
const VALUE: usize = 200;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().position(|argument| argument == "--serve") {
        Some(at) => serve(&arguments[at + 1]),
        None => compare(&arguments),
    }
}

// The servers.

fn serve(what: &str) {
    pin(0);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    match what {
        "echo" => runtime.block_on(serve_echo()),
        _ => runtime.block_on(serve_broker(what == "relaxed")),
    }
}

/// Answers every read with the same bytes, and does nothing else.
struct Echo(v1::GetSecretResponse);

macro_rules! echo {
    ($($name:ident: $request:ident -> $response:ident),+ $(,)?) => {
        #[tonic::async_trait]
        impl SecretService for Echo {
            async fn get_secret(
                &self,
                _: Request<v1::GetSecretRequest>,
            ) -> Result<Response<v1::GetSecretResponse>, Status> {
                Ok(Response::new(self.0.clone()))
            }

            $(async fn $name(&self, _: Request<v1::$request>) -> Result<Response<v1::$response>, Status> {
                Err(Status::unimplemented("the echo only reads"))
            })+
        }
    };
}

echo! {
    batch_get_secrets: BatchGetSecretsRequest -> BatchGetSecretsResponse,
    list_secrets: ListSecretsRequest -> ListSecretsResponse,
    describe_secret: DescribeSecretRequest -> DescribeSecretResponse,
    put_secret: PutSecretRequest -> PutSecretResponse,
    move_label: MoveLabelRequest -> MoveLabelResponse,
    rollback_secret: RollbackSecretRequest -> RollbackSecretResponse,
    delete_secret: DeleteSecretRequest -> DeleteSecretResponse,
    restore_secret: RestoreSecretRequest -> RestoreSecretResponse,
}

async fn serve_echo() {
    let secret = v1::Secret {
        environment: "production".to_owned(),
        name: "benchmark".to_owned(),
        version_id: "11111111-1111-4111-8111-111111111111".to_owned(),
        labels: vec!["AWSCURRENT".to_owned()],
        created_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 123_456_789 }),
        payload: Some(v1::SecretPayload { data: vec![b'x'; VALUE].into(), content_type: 1 }),
        age: Some(prost_types::Duration { seconds: 3, nanos: 123_456_789 }),
        source: 2,
        ..Default::default()
    };
    let echo = SecretServiceServer::new(Echo(v1::GetSecretResponse { secret: Some(secret) }));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    ready(&format!("http://{} -", listener.local_addr().unwrap()));
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    tonic::transport::Server::builder().add_service(echo).serve_with_incoming(incoming).await.unwrap();
}

async fn serve_broker(relaxed: bool) {
    let folder = tempfile::tempdir().unwrap();
    let mut environment = Environment::sealed("production".parse().unwrap());
    environment.durability = if relaxed { Durability::Relaxed } else { Durability::Durable };
    let resolved = Resolved {
        directory: folder.path().join("data"),
        listen: vec![Listen::Tcp("127.0.0.1:0".parse().unwrap())],
        limits: Limits::default(),
        root_key: RootKeyChoice::File(folder.path().join("root.key")),
        policy: PolicySource::shipped(),
        instance: "benchmark".to_owned(),
        retention: Resolved::RETENTION,
        peers: peer_credentials::Config::default(),
        cache_bytes: Resolved::CACHE_BYTES,
        registry: Registry::new([environment]).unwrap(),
    };
    let running = Running::start(&resolved, &|_| None, SystemClock::shared()).await.unwrap();
    let token = prepare(&running).await;
    let door = resolved.listen[0].bind().await.unwrap();
    ready(&format!("{} {token}", door.address()));
    let (_stop, stopped) = watch::channel(false);
    running.serve(vec![door], resolved.limits, stopped).await.unwrap();
}

/// Puts the secret and issues the token that the client reads it with.
async fn prepare(running: &Running) -> String {
    use claviger::broker::Call;
    use claviger::identity::{Principal, PrincipalKind, token::TokenRequest};
    let administrator = || Call::internal(Principal::internal("benchmark", ["administrators"]), "benchmark");
    let put = claviger::store::Put {
        value: claviger::secret::SecretValue::text("x".repeat(VALUE)).unwrap(),
        token: claviger::secret::VersionId::generate(),
        labels: Vec::new(),
        expected: None,
    };
    let id = claviger::secret::SecretId::parse("production", "benchmark").unwrap();
    running.broker.put(&administrator(), id, put, false).await.unwrap();
    let request = TokenRequest {
        kind: PrincipalKind::User,
        principal: "reader".to_owned(),
        groups: BTreeSet::from(["operators".to_owned()]),
        claims: std::collections::BTreeMap::new(),
        expires_in: Duration::from_secs(3_600),
        created_by: "benchmark".to_owned(),
    };
    let (_, secret) = running.broker.create_token(&administrator(), request).await.unwrap();
    secret.expose_text().unwrap().to_owned()
}

fn ready(line: &str) {
    println!("{line}");
    std::io::stdout().flush().unwrap();
}

// The client.

struct Server {
    process: Child,
    reader: Reader,
    memory_at_start_kib: u64,
}

/// How a server is asked.
#[derive(Clone)]
struct Reader {
    address: String,
    token: Option<String>,
}

impl Server {
    fn start(what: &str) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--serve", what])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let (address, token) = line.trim().split_once(' ').expect("the server says where it is");
        let token = (token != "-").then(|| token.to_owned());
        let memory_at_start_kib = resident_kib(process.id());
        Self { reader: Reader { address: address.to_owned(), token }, process, memory_at_start_kib }
    }
}

impl Reader {
    async fn connect(&self) -> SecretServiceClient<Channel> {
        let endpoint = Channel::from_shared(self.address.clone()).unwrap().tcp_nodelay(true);
        SecretServiceClient::new(endpoint.connect().await.unwrap())
    }

    fn request(&self) -> Request<v1::GetSecretRequest> {
        let mut request = Request::new(v1::GetSecretRequest {
            environment: "production".to_owned(),
            name: "benchmark".to_owned(),
            ..Default::default()
        });
        if let Some(token) = &self.token {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        request
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn compare(arguments: &[String]) {
    let seconds = arguments
        .iter()
        .position(|argument| argument == "--seconds")
        .map_or(4, |at| arguments[at + 1].parse().expect("--seconds takes a number"));
    pin(1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (echo, durable, relaxed) =
        (Server::start("echo"), Server::start("durable"), Server::start("relaxed"));
    let window = Duration::from_secs(seconds);
    println!(
        "cached read of {VALUE} bytes, policy and audit on, as a ratio to the bare echo of the same run"
    );
    println!("| row | echo/s | broker/s | ratio | target |");
    println!("|---|---|---|---|---|");
    for (row, server, connections, streams, target) in [
        ("durable, 4 × 16", &durable, 4, 16, "≥ 0.55"),
        ("durable, 16 × 16", &durable, 16, 16, "≥ 0.7"),
        ("relaxed, 4 × 16", &relaxed, 4, 16, "≥ 0.8"),
        ("relaxed, 64 × 1", &relaxed, 64, 1, ""),
        ("durable, 64 × 1", &durable, 64, 1, ""),
    ] {
        let (mut bare, mut ours) = (0.0, 0.0);
        for _ in 0..2 {
            bare += runtime.block_on(rate(&echo.reader, connections, streams, window / 2));
            ours += runtime.block_on(rate(&server.reader, connections, streams, window / 2));
        }
        println!("| {row} | {:.0} | {:.0} | {:.2} | {target} |", bare / 2.0, ours / 2.0, ours / bare);
    }
    for (row, server, target) in [("relaxed", &relaxed, "≤ 1.3"), ("durable", &durable, "see the table")] {
        let bare = runtime.block_on(p99_at_10k(&echo.reader, window));
        let ours = runtime.block_on(p99_at_10k(&server.reader, window));
        let ratio = ours.as_secs_f64() / bare.as_secs_f64();
        println!("| p99 at 10,000/s, 16 connections, {row} | {bare:?} | {ours:?} | {ratio:.2} | {target} |");
    }
    let mib = |kib: u64| kib as f64 / 1024.0;
    println!(
        "memory at start: echo {:.1} MiB, broker {:.1} MiB",
        mib(echo.memory_at_start_kib),
        mib(durable.memory_at_start_kib)
    );
}

/// Answers per second of a closed loop, `connections` × `streams` in flight.
async fn rate(reader: &Reader, connections: usize, streams: usize, window: Duration) -> f64 {
    let mut tasks = Vec::new();
    let start = Instant::now();
    for _ in 0..connections {
        let client = reader.connect().await;
        for _ in 0..streams {
            let (mut client, reader) = (client.clone(), reader.clone());
            tasks.push(tokio::spawn(async move {
                let mut answered = 0_u64;
                while start.elapsed() < window {
                    let answer = client.get_secret(reader.request()).await.expect("an answer").into_inner();
                    assert_eq!(answer.secret.unwrap().payload.unwrap().data.len(), VALUE);
                    answered += 1;
                }
                answered
            }));
        }
    }
    let mut answered = 0;
    for task in tasks {
        answered += task.await.unwrap();
    }
    answered as f64 / start.elapsed().as_secs_f64()
}

/// The 99th percentile at a steady 10,000 requests a second over 16 connections, counted from when a request was
/// due, not from when it could be sent.
async fn p99_at_10k(reader: &Reader, window: Duration) -> Duration {
    const CONNECTIONS: u32 = 16;
    let gap = Duration::from_secs(1) * CONNECTIONS / 10_000;
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        let (client, reader) = (reader.connect().await, Arc::new(reader.clone()));
        connections.push(tokio::spawn(async move {
            let mut due = Instant::now();
            let end = due + window;
            let mut calls = Vec::new();
            while due < end {
                tokio::time::sleep_until(due.into()).await;
                let (mut client, reader, at) = (client.clone(), Arc::clone(&reader), due);
                calls.push(tokio::spawn(async move {
                    client.get_secret(reader.request()).await.expect("an answer");
                    at.elapsed()
                }));
                due += gap;
            }
            let mut times = Vec::new();
            for call in calls {
                times.push(call.await.unwrap());
            }
            times
        }));
    }
    let mut times = Vec::new();
    for connection in connections {
        times.extend(connection.await.unwrap());
    }
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn pin(core: usize) {
    let mut cores = rustix::thread::CpuSet::new();
    cores.set(core);
    if let Err(error) = rustix::thread::sched_setaffinity(None, &cores) {
        eprintln!("not pinned to core {core}: {error}");
    }
}
