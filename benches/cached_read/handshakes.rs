//! What TLS costs: a handshake, whole or resumed, beside a connection without one; and a read over TLS beside one over
//! plain TCP, from the same broker.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, HandshakeKind};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Endpoint, Uri};

use crate::client::{Bench, Client, Line, Server, What};
use crate::report::{Report, microseconds};
use crate::turns::{Turn, median, paired, sum, take_turns};

pub(crate) fn measure(bench: &Bench<'_>, report: &mut Report) {
    let server = &bench.relaxed;
    let secured = server.tls.expect("the broker has a TLS listener");
    connections(bench, server, secured, report);
    requests(bench, server, secured, report);
}

/// How many connections are made at once.
const AT_ONCE: usize = 4;

fn connections(bench: &Bench<'_>, server: &Server, secured: SocketAddr, report: &mut Report) {
    let tls = |resumption| TlsConnector::from(bench.certificates.client(resumption));
    let plain = Way { address: server.reader.socket(), tls: None };
    let whole = Way { address: secured, tls: Some(tls(Resumption::disabled())) };
    // A session of its own for each, because it can be taken up once.
    let resumed = || Way { address: secured, tls: Some(tls(Resumption::default())) };
    let ways = [
        (vec![plain; AT_ONCE], false),
        (vec![whole; AT_ONCE], false),
        ((0..AT_ONCE).map(|_| resumed()).collect(), true),
    ];
    for way in &ways[2].0 {
        assert!(!bench.runtime.block_on(way.connect()), "the first handshake has nothing to resume");
    }
    let turns = take_turns(bench.rounds, ways.len(), |number, part| {
        let (ways, resumed) = &ways[number];
        server.turn(|| bench.runtime.block_on(connect_often(ways, *resumed, part.of(bench.window / 2))))
    });
    let [plain, whole, resumed] = <[_; 3]>::try_from(turns).expect("three took turns");
    report.figure("tcp_connect_cpu_us", sum(&plain).cpu_each());
    for (name, figure, turns) in
        [("a whole handshake", "tls_full", &whole), ("a resumed handshake", "tls_resumed", &resumed)]
    {
        let ratio = paired(turns, &plain, Turn::rate);
        report.figure(format!("{figure}_per_s"), rate(turns));
        let cells = [format!("{:.0}", rate(&plain)), format!("{:.0}", rate(turns)), format!("{ratio:.2}")];
        row(&format!("connections a second, TLS with {name}, against TCP"), &cells, report);
        let (bare, ours) = (sum(&plain).cpu_each(), sum(turns).cpu_each());
        report.figure(format!("{figure}_handshake_cpu_us"), ours - bare);
        let cells = [microseconds(bare), microseconds(ours), format!("{:+.1} µs", ours - bare)];
        row(&format!("the server's processor time for each, TLS with {name}, against TCP"), &cells, report);
    }
}

/// Reads over connections that are there, 4 × 16.
fn requests(bench: &Bench<'_>, server: &Server, secured: SocketAddr, report: &mut Report) {
    const CONNECTIONS: usize = 4;
    let config = bench.certificates.client(Resumption::default());
    let over_tls = async {
        let mut clients = Vec::with_capacity(CONNECTIONS);
        for _ in 0..CONNECTIONS {
            clients.push(client(server, secured, &config).await);
        }
        clients
    };
    let (plain, tls) = bench.runtime.block_on(async { (server.connect(CONNECTIONS).await, over_tls.await) });
    let line = |clients| Line { server, clients, streams: 16, what: What::Same };
    let turns = bench.lines_in_turn(&[line(plain), line(tls)], bench.window / 2);
    let [bare, ours] = <[_; 2]>::try_from(turns).expect("two took turns");
    let ratio = paired(&ours, &bare, Turn::rate);
    report.figure("tls_64", ratio);
    let cells = [format!("{:.0}", rate(&bare)), format!("{:.0}", rate(&ours)), format!("{ratio:.2}")];
    row("cached reads a second, relaxed, 4 × 16, over TLS, against TCP", &cells, report);
    let (bare, ours) = (sum(&bare).cpu_each(), sum(&ours).cpu_each());
    report.figure("tls_request_cpu_us", ours - bare);
    let cells = [microseconds(bare), microseconds(ours), format!("{:+.1} µs", ours - bare)];
    row("the server's processor time for each, over TLS, against TCP", &cells, report);
}

fn row(name: &str, [bare, ours, compared]: &[String; 3], report: &Report) {
    report.row([name, bare, ours, compared, "–"]);
}

fn rate(turns: &[Turn]) -> f64 {
    median(turns.iter().map(Turn::rate).collect())
}

/// How a connection is made.
#[derive(Clone)]
struct Way {
    address: SocketAddr,
    tls: Option<TlsConnector>,
}

impl Way {
    /// Makes one, up to the broker's first word of HTTP/2, and drops it; whether it took up an earlier session.
    async fn connect(&self) -> bool {
        let stream = tcp(self.address).await.expect("the broker listens");
        // Ended by a reset: otherwise each would hold its port for a minute, and they would run out.
        stream.set_zero_linger().unwrap();
        let Some(tls) = &self.tls else {
            greet(stream).await;
            return false;
        };
        let stream = tls.connect(name(), stream).await.expect("a handshake");
        let resumed = stream.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed);
        greet(stream).await;
        resumed
    }
}

/// Makes connections for so long, one after the other each way, all ways at once.
async fn connect_often(ways: &[Way], resumed: bool, window: Duration) -> (u64, Duration) {
    let start = Instant::now();
    let mut tasks = Vec::with_capacity(ways.len());
    for way in ways {
        let way = way.clone();
        tasks.push(tokio::spawn(async move {
            let mut made = 0_u64;
            while start.elapsed() < window {
                assert_eq!(way.connect().await, resumed, "whether a session was taken up");
                made += 1;
            }
            made
        }));
    }
    let mut made = 0;
    for task in tasks {
        made += task.await.unwrap();
    }
    (made, start.elapsed())
}

/// Begins to speak HTTP/2 (RFC 9113, section 3.4), and waits for the server's own beginning. What comes before that,
/// tickets for later sessions, has been read then.
async fn greet(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    stream.write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &SETTINGS].concat()).await.unwrap();
    stream.flush().await.unwrap();
    let mut frame = [0; SETTINGS.len()];
    stream.read_exact(&mut frame).await.expect("the broker speaks HTTP/2");
    assert_eq!(frame[3], SETTINGS[3], "the broker begins with its settings");
}

async fn tcp(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn name() -> ServerName<'static> {
    ServerName::try_from("localhost").unwrap()
}

/// A client over TLS.
async fn client(server: &Server, secured: SocketAddr, config: &Arc<ClientConfig>) -> Client {
    let tls = TlsConnector::from(Arc::clone(config));
    let connector = tower::service_fn(move |_: Uri| {
        let tls = tls.clone();
        async move { tls.connect(name(), tcp(secured).await?).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://localhost");
    server.reader.over(endpoint.connect_with_connector(connector).await.expect("the broker listens"))
}
