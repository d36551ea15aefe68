//! The client: servers in processes of their own, connections to them, and how they are asked.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;

use claviger::proto::v1;
use claviger::proto::v1::secret_service_client::SecretServiceClient;
use tokio::runtime::Runtime;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;

use crate::certificates::Certificates;
use crate::options::Options;
use crate::turns::{Part, Turn, take_turns};
use crate::{VALUE, percentile, process, server};

/// What is asked of, and where the disk is that answers wait for.
pub(crate) struct Bench<'a> {
    pub(crate) runtime: Runtime,
    pub(crate) folder: &'a Path,
    pub(crate) window: Duration,
    pub(crate) rounds: usize,
    pub(crate) certificates: Certificates,
    pub(crate) echo: Server,
    pub(crate) durable: Server,
    pub(crate) relaxed: Server,
}

impl<'a> Bench<'a> {
    pub(crate) fn start(options: &Options, folder: &'a Path) -> Self {
        Self {
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
            folder,
            window: options.window,
            rounds: options.rounds,
            // Before the servers that present them.
            certificates: Certificates::make(folder),
            echo: Server::start("echo", folder),
            durable: Server::start("durable", folder),
            relaxed: Server::start("relaxed", folder),
        }
    }

    /// Has each server answer in turn, the same things to as many connections with as many streams each.
    pub(crate) fn in_turn(
        &self,
        servers: &[&Server],
        (connections, streams): (usize, usize),
        what: What,
    ) -> Vec<Vec<Turn>> {
        let lines: Vec<Line<'_>> = servers
            .iter()
            .map(|server| Line {
                server,
                clients: self.runtime.block_on(server.connect(connections)),
                streams,
                what,
            })
            .collect();
        self.lines_in_turn(&lines, self.window)
    }

    /// The same of lines that are open.
    pub(crate) fn lines_in_turn(&self, lines: &[Line<'_>], window: Duration) -> Vec<Vec<Turn>> {
        take_turns(self.rounds, lines.len(), |number, part: Part| {
            let line = &lines[number];
            line.server.turn(|| self.runtime.block_on(line.ask(part.of(window))))
        })
    }
}

/// A server in a process of its own.
pub(crate) struct Server {
    process: Child,
    pub(crate) reader: Reader,
    /// Where it speaks TLS, if it does.
    pub(crate) tls: Option<SocketAddr>,
}

/// How a server is asked.
#[derive(Clone)]
pub(crate) struct Reader {
    address: String,
    authorization: Option<MetadataValue<Ascii>>,
}

impl Server {
    fn start(what: &str, folder: &Path) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--serve", what])
            .arg(folder)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: Vec<&str> = line.split_whitespace().collect();
        let [address, token, tls] = said[..] else { panic!("--serve {what} said `{}`", line.trim()) };
        let tls = tls.strip_prefix("https://").map(|address| address.parse().expect("an address"));
        Self { process, reader: Reader::new(address, token), tls }
    }

    pub(crate) async fn connect(&self, connections: usize) -> Vec<Client> {
        let mut clients = Vec::with_capacity(connections);
        for _ in 0..connections {
            clients.push(self.reader.connect().await);
        }
        clients
    }

    /// What `ask` gives, which is answers and their time, with the processor time that the server took for it.
    pub(crate) fn turn(&self, ask: impl FnOnce() -> (u64, Duration)) -> Turn {
        let before = process::cpu(self.process.id());
        let (answers, wall) = ask();
        Turn { answers, wall, cpu: process::cpu(self.process.id()) - before }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Reader {
    fn new(address: &str, token: &str) -> Self {
        let bearer = || format!("Bearer {token}").parse().expect("a token is ASCII");
        Self { address: address.to_owned(), authorization: (token != "-").then(bearer) }
    }

    /// Where it listens without TLS.
    pub(crate) fn socket(&self) -> SocketAddr {
        self.address.strip_prefix("http://").and_then(|address| address.parse().ok()).expect("an address")
    }

    async fn connect(&self) -> Client {
        let endpoint = Channel::from_shared(self.address.clone()).unwrap().tcp_nodelay(true);
        self.over(endpoint.connect().await.unwrap())
    }

    /// Asks over a connection that is there.
    pub(crate) fn over(&self, channel: Channel) -> Client {
        Client { service: SecretServiceClient::new(channel), authorization: self.authorization.clone() }
    }
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// One secret, again and again.
    Same,
    /// Those of a batch, one after the other.
    EachInTurn,
    /// Those of a batch, together.
    AllAtOnce,
}

/// One connection.
#[derive(Clone)]
pub(crate) struct Client {
    service: SecretServiceClient<Channel>,
    authorization: Option<MetadataValue<Ascii>>,
}

impl Client {
    /// Asks once. `turn` counts what was asked before.
    pub(crate) async fn ask(&mut self, what: What, turn: usize) {
        match what {
            What::Same => self.get(server::NAME.to_owned()).await,
            What::EachInTurn => self.get(server::of_batch(turn % server::BATCH)).await,
            What::AllAtOnce => self.batch().await,
        }
    }

    async fn get(&mut self, name: String) {
        let environment = server::ENVIRONMENT.to_owned();
        let request = self.request(v1::GetSecretRequest { environment, name, ..Default::default() });
        let answer = self.service.get_secret(request).await.expect("an answer").into_inner();
        assert_value(answer.secret);
    }

    async fn batch(&mut self) {
        let item = |name| v1::SecretQuery {
            environment: server::ENVIRONMENT.to_owned(),
            name,
            ..Default::default()
        };
        let items = (0..server::BATCH).map(server::of_batch).map(item).collect();
        let request = self.request(v1::BatchGetSecretsRequest { items, ..Default::default() });
        let answer = self.service.batch_get_secrets(request).await.expect("an answer").into_inner();
        assert_eq!(answer.results.len(), server::BATCH);
        for result in answer.results {
            match result.result {
                Some(v1::batch_get_secrets_result::Result::Secret(secret)) => assert_value(Some(secret)),
                other => panic!("a secret of the batch was not read: {other:?}"),
            }
        }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(authorization) = &self.authorization {
            request.metadata_mut().insert("authorization", authorization.clone());
        }
        request
    }
}

fn assert_value(secret: Option<v1::Secret>) {
    assert_eq!(secret.unwrap().payload.unwrap().data.len(), VALUE);
}

/// Connections to a server, and what is asked over them.
pub(crate) struct Line<'a> {
    pub(crate) server: &'a Server,
    pub(crate) clients: Vec<Client>,
    /// How many ask at once over each.
    pub(crate) streams: usize,
    pub(crate) what: What,
}

impl Line<'_> {
    /// Asks in a closed loop for so long; how many answers came, and how long that took.
    pub(crate) async fn ask(&self, window: Duration) -> (u64, Duration) {
        let (streams, what) = (self.streams, self.what);
        let mut tasks = Vec::with_capacity(self.clients.len() * streams);
        let start = Instant::now();
        for client in &self.clients {
            for _ in 0..streams {
                let mut client = client.clone();
                // Each begins elsewhere, so that those that ask for each in turn don't ask for the same.
                let first = tasks.len();
                tasks.push(tokio::spawn(async move {
                    let mut answered = 0;
                    while start.elapsed() < window {
                        client.ask(what, first + answered).await;
                        answered += 1;
                    }
                    answered as u64
                }));
            }
        }
        let mut answered = 0;
        for task in tasks {
            answered += task.await.unwrap();
        }
        (answered, start.elapsed())
    }
}

/// How long answers took at a steady 10,000 requests a second over these connections, counted from when a request was
/// due, not from when it could be sent. The pace is the kernel's timer's: the runtime's own has a resolution of a
/// millisecond, and to ask for the time again and again would take a processor from whoever emulates the disk.
pub(crate) async fn at_10k(clients: &[Client], window: Duration) -> Vec<Duration> {
    const GAP: Duration = Duration::from_micros(100);
    let ticks = ticks(GAP);
    let mut calls = Vec::new();
    let mut due = Instant::now();
    let end = due + window;
    while due < end {
        let mut ready = ticks.readable().await.unwrap();
        if rustix::io::read(&ticks, &mut [0; 8]).is_err() {
            ready.clear_ready();
        }
        while due <= Instant::now() && due < end {
            let (mut client, at) = (clients[calls.len() % clients.len()].clone(), due);
            calls.push(tokio::spawn(async move {
                client.ask(What::Same, 0).await;
                at.elapsed()
            }));
            due += GAP;
        }
    }
    let mut times = Vec::with_capacity(calls.len());
    for call in calls {
        times.push(call.await.unwrap());
    }
    times
}

/// A timer that fires at this pace.
#[expect(
    deprecated,
    reason = "an `OwnedFd` is the same descriptor for as long as it lives, which is all that is asked of it"
)]
fn ticks(pace: Duration) -> AsyncFd<OwnedFd> {
    let timer =
        timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC).unwrap();
    let pace = Timespec { tv_sec: 0, tv_nsec: i64::from(pace.subsec_nanos()) };
    let times = Itimerspec { it_interval: pace, it_value: pace };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &times).unwrap();
    AsyncFd::new(timer).unwrap()
}

pub(crate) fn p99(times: &[Duration]) -> Duration {
    percentile(&mut times.to_vec(), 99)
}

/// Asks a server so often, for a profile of it.
pub(crate) fn ask(address: &str, token: &str, connections: usize, streams: usize, times: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let reader = Reader::new(address, token);
    runtime.block_on(async {
        let each = times / u64::try_from(connections * streams).unwrap();
        let mut tasks = Vec::new();
        for _ in 0..connections {
            let client = reader.connect().await;
            for _ in 0..streams {
                let mut client = client.clone();
                tasks.push(tokio::spawn(async move {
                    for _ in 0..each {
                        client.ask(What::Same, 0).await;
                    }
                }));
            }
        }
        for task in tasks {
            task.await.unwrap();
        }
    });
}
