//! Cached reads over the wire: how many a second, how late the slowest, and what the servers weigh.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use claviger::proto::v1;
use claviger::proto::v1::secret_service_client::SecretServiceClient;
use tokio::runtime::Runtime;
use tonic::Request;
use tonic::transport::Channel;

use crate::{Options, VALUE, milliseconds, percentile, resident_kib, row};

/// What is asked of, and where the disk is that answers wait for.
struct Bench<'a> {
    runtime: Runtime,
    folder: &'a Path,
    window: Duration,
    echo: Server,
    durable: Server,
    relaxed: Server,
}

pub(crate) fn measure(options: &Options, folder: &Path) {
    let bench = Bench {
        runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
        folder,
        window: options.window,
        echo: Server::start("echo", folder),
        durable: Server::start("durable", folder),
        relaxed: Server::start("relaxed", folder),
    };
    if options.wants("rates") {
        bench.rates();
    }
    if options.wants("p99") {
        bench.p99();
    }
    if options.wants("start") {
        let megabytes = |server: &Server| format!("{:.1} MB", server.memory_at_start_kib as f64 * 1.024e-3);
        let (echo, broker) = (megabytes(&bench.echo), megabytes(&bench.durable));
        row(["memory at start", &echo, &broker, "–", "≤ 25 MB"]);
    }
}

impl Bench<'_> {
    fn rates(&self) {
        for (name, server, connections, streams, target) in [
            ("durable, 4 × 16", &self.durable, 4, 16, "≥ 0.55"),
            ("durable, 16 × 16", &self.durable, 16, 16, "≥ 0.7"),
            ("relaxed, 4 × 16", &self.relaxed, 4, 16, "≥ 0.8"),
            ("relaxed, 64 × 1", &self.relaxed, 64, 1, "–"),
            ("durable, 64 × 1", &self.durable, 64, 1, "–"),
        ] {
            let half = |server: &Server| {
                self.runtime.block_on(rate(&server.reader, connections, streams, self.window / 2))
            };
            let (mut bare, mut ours) = (0.0, 0.0);
            for _ in 0..2 {
                bare += half(&self.echo);
                ours += half(server);
            }
            let name = format!("cached reads a second, {name}");
            let (shown_bare, shown_ours) = (format!("{:.0}", bare / 2.0), format!("{:.0}", ours / 2.0));
            row([&name, &shown_bare, &shown_ours, &format!("{:.2}", ours / bare), target]);
        }
    }

    fn p99(&self) {
        let p99 = |server: &Server| self.runtime.block_on(p99_at_10k(&server.reader, self.window));
        compare("relaxed, against the echo's", p99(&self.echo), p99(&self.relaxed), "≤ 1.3");
        let mut file = File::create_new(self.folder.join("commits")).unwrap();
        let mut commits = commit_times(&mut file, self.window / 2);
        let (bare, ours) = (p99(&self.echo), p99(&self.durable));
        commits.extend(commit_times(&mut file, self.window / 2));
        compare("durable, against the echo's", bare, ours, "–");
        compare("durable, against the disk's commits", percentile(&mut commits, 99), ours, "≤ 3");
    }
}

fn compare(name: &str, bare: Duration, ours: Duration, target: &str) {
    let name = format!("p99 at 10,000 reads a second over 16 connections, {name}");
    let ratio = format!("{:.2}", ours.as_secs_f64() / bare.as_secs_f64());
    row([&name, &milliseconds(bare), &milliseconds(ours), &ratio, target]);
}

/// How long the disk takes, asked up to 200 times a second, to commit a value's size at the end of a file: the least
/// that a durable answer waits for.
fn commit_times(file: &mut File, window: Duration) -> Vec<Duration> {
    const GAP: Duration = Duration::from_millis(5);
    let begin = Instant::now();
    let mut times = Vec::new();
    while begin.elapsed() < window {
        let start = Instant::now();
        file.write_all(&[b'x'; VALUE]).unwrap();
        file.sync_data().unwrap();
        let took = start.elapsed();
        times.push(took);
        std::thread::sleep(GAP.saturating_sub(took));
    }
    times
}

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
    fn start(what: &str, folder: &Path) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--serve", what])
            .arg(folder)
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
/// due, not from when it could be sent. The pace is kept by asking for the time again and again: a timer's millisecond
/// would be most of what is measured.
async fn p99_at_10k(reader: &Reader, window: Duration) -> Duration {
    const CONNECTIONS: usize = 16;
    const GAP: Duration = Duration::from_micros(100);
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        clients.push(reader.connect().await);
    }
    let mut calls = Vec::new();
    let mut due = Instant::now();
    let end = due + window;
    while due < end {
        while Instant::now() < due {
            tokio::task::yield_now().await;
        }
        let (mut client, request, at) = (clients[calls.len() % CONNECTIONS].clone(), reader.request(), due);
        calls.push(tokio::spawn(async move {
            client.get_secret(request).await.expect("an answer");
            at.elapsed()
        }));
        due += GAP;
    }
    let mut times = Vec::new();
    for call in calls {
        times.push(call.await.unwrap());
    }
    percentile(&mut times, 99)
}

/// Asks a server so often, for a profile of it.
pub(crate) fn ask(address: &str, token: &str, connections: usize, streams: usize, times: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let token = (token != "-").then(|| token.to_owned());
    let reader = Reader { address: address.to_owned(), token };
    runtime.block_on(async {
        let each = times / u64::try_from(connections * streams).unwrap();
        let mut tasks = Vec::new();
        for _ in 0..connections {
            let client = reader.connect().await;
            for _ in 0..streams {
                let (mut client, reader) = (client.clone(), reader.clone());
                tasks.push(tokio::spawn(async move {
                    for _ in 0..each {
                        client.get_secret(reader.request()).await.expect("an answer");
                    }
                }));
            }
        }
        for task in tasks {
            task.await.unwrap();
        }
    });
}
