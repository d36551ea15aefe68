//! B27: what one connection can do with frames alone, and half of B25: what it can leave undone. Raw HTTP/2 (RFC 9113) to the real binary: every bound holds, its
//! memory does not grow, and others are served all the while.

use std::io::{ErrorKind, Read, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use claviger::proto::v1;
use prost::Message as _;
use tonic::Code;

use crate::support::program::{Program, Served};
use crate::support::secrets;

/// How long a read or a write may take before a test is called hung.
const HUNG: Duration = Duration::from_secs(60);
/// How much the broker's memory may grow at its peak, in KiB.
const GROWTH: u64 = 64 * 1024;
/// Calls at a time on one connection.
const STREAMS: usize = 256;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;
const ENHANCE_YOUR_CALM: u32 = 11;
const LAST_PING: &[u8; 8] = b"the last";

/// A frame as it goes over the wire (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A text as HPACK writes it without compression (RFC 7541, section 5.2).
fn text(text: &str) -> Vec<u8> {
    let length = u8::try_from(text.len()).unwrap();
    assert!(length < 127, "a longer one has more bytes of length");
    [&[length][..], text.as_bytes()].concat()
}

/// A header field that no table remembers (RFC 7541, section 6.2.2).
fn field(name: &str, value: &str) -> Vec<u8> {
    [vec![0], text(name), text(value)].concat()
}

/// The headers of a call that reads a secret.
fn get_secret() -> Vec<u8> {
    headers("/claviger.v1.SecretService/GetSecret")
}

/// The headers of a call: `:method: POST` and `:scheme: http` from the static table, `:path` and `:authority` with names
/// from there.
fn headers(path: &str) -> Vec<u8> {
    [
        vec![0x83, 0x86, 0x04],
        text(path),
        vec![0x01],
        text("localhost"),
        field("content-type", "application/grpc"),
        field("te", "trailers"),
    ]
    .concat()
}

/// The number of the nth stream that a client opens.
fn nth(n: u32) -> u32 {
    2 * n + 1
}

/// A connection with a call on it that answers no frame of the broker's: what it does not read, nobody does.
fn mute(socket: &Path, headers: &[u8], flags: u8, body: &[u8]) -> UnixStream {
    let mut connection = UnixStream::connect(socket).unwrap();
    connection.set_read_timeout(Some(HUNG)).unwrap();
    connection.set_write_timeout(Some(HUNG)).unwrap();
    let frames = [
        PREFACE.to_vec(),
        frame(SETTINGS, 0, 0, &[]),
        frame(HEADERS, END_HEADERS, nth(0), headers),
        frame(DATA, flags, nth(0), body),
    ];
    connection.write_all(&frames.concat()).unwrap();
    connection
}

/// Such a connection with a watch on it.
pub fn mute_watch(socket: &Path, asked: &v1::WatchSecretsRequest) -> UnixStream {
    let message = asked.encode_to_vec();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let body = [&[0][..], &length[..], &message[..]].concat();
    mute(socket, &headers("/claviger.v1.SecretService/WatchSecrets"), END_STREAM, &body)
}

/// Reads until the first message of an answer.
pub fn heard(connection: &mut UnixStream) {
    loop {
        let frame = read_frame(connection).expect("the connection stays open");
        if frame.kind == DATA && !frame.payload.is_empty() {
            return;
        }
    }
}

/// Reads, and answers nothing, until the broker closes the connection.
pub fn until_closed(mut connection: UnixStream) {
    while read_frame(&mut connection).is_some() {}
}

/// What the broker sent until it answered the last ping or closed the connection.
#[derive(Debug, Default)]
pub struct Told {
    /// How many streams it refused to open.
    pub refused: usize,
    /// The code that it ended the connection with.
    pub gone: Option<u32>,
    /// Whether it closed the connection, whatever it said before.
    pub closed: bool,
}

/// The other end of a connection to a broker.
pub struct Peer {
    socket: UnixStream,
    reader: Option<JoinHandle<Told>>,
}

impl Peer {
    /// Connects, and exchanges settings.
    pub fn connect(socket: &Path) -> Self {
        let mut socket = UnixStream::connect(socket).unwrap();
        socket.set_read_timeout(Some(HUNG)).unwrap();
        socket.set_write_timeout(Some(HUNG)).unwrap();
        socket.write_all(PREFACE).unwrap();
        socket.write_all(&frame(SETTINGS, 0, 0, &[])).unwrap();
        while read_frame(&mut socket).expect("the broker speaks HTTP/2").kind != SETTINGS {}
        socket.write_all(&frame(SETTINGS, ACK, 0, &[])).unwrap();
        let reader = {
            let socket = socket.try_clone().unwrap();
            std::thread::spawn(move || listen(socket))
        };
        Self { socket, reader: Some(reader) }
    }

    /// Begins a call whose message never comes, and waits until the broker has it.
    pub fn half_a_call(socket: &Path) -> Self {
        let mut peer = Self::connect(socket);
        assert_eq!(peer.send([frame(HEADERS, END_HEADERS, nth(0), &get_secret())]), 1);
        let told = peer.finish();
        assert!(!told.closed && told.gone.is_none(), "{told:?}");
        peer
    }

    /// Sends frames, as many as the broker takes, and gives how many those were.
    pub fn send(&mut self, frames: impl IntoIterator<Item = Vec<u8>>) -> usize {
        let mut sent = 0;
        for frame in frames {
            match self.socket.write_all(&frame) {
                Ok(()) => sent += 1,
                Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                    break;
                }
                Err(error) => panic!("hung: {error}"),
            }
        }
        sent
    }

    /// Waits until the broker has seen all that was sent, or wants no more of it. The connection stays open.
    pub fn finish(&mut self) -> Told {
        self.send([frame(PING, 0, 0, LAST_PING)]);
        self.reader.take().expect("once").join().expect("the reader ends")
    }
}

struct Frame {
    kind: u8,
    flags: u8,
    payload: Vec<u8>,
}

impl Frame {
    /// The error code at this place of the payload.
    fn code(&self, at: usize) -> Option<u32> {
        Some(u32::from_be_bytes(self.payload.get(at..at + 4)?.try_into().ok()?))
    }
}

/// The next frame; `None` where the connection is closed.
fn read_frame(socket: &mut impl Read) -> Option<Frame> {
    let mut head = [0; 9];
    read(socket, &mut head)?;
    let [a, b, c, kind, flags, ..] = head;
    let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
    read(socket, &mut payload)?;
    Some(Frame { kind, flags, payload })
}

fn read(socket: &mut impl Read, bytes: &mut [u8]) -> Option<()> {
    match socket.read_exact(bytes) {
        Ok(()) => Some(()),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            panic!("hung: {error}")
        }
        Err(_) => None,
    }
}

fn listen(mut socket: UnixStream) -> Told {
    let mut told = Told::default();
    loop {
        let Some(frame) = read_frame(&mut socket) else {
            told.closed = true;
            return told;
        };
        match frame.kind {
            RST_STREAM if frame.code(0) == Some(REFUSED_STREAM) => told.refused += 1,
            GOAWAY => told.gone = frame.code(4),
            PING if frame.flags & ACK != 0 && frame.payload == LAST_PING => return told,
            _ => {}
        }
    }
}

/// The most memory that the broker ever had, in KiB.
fn peak(program: &Program) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.id().as_raw_nonzero())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
}

/// Floods a broker and checks that it stays as it was, for this connection still open as for all others.
fn flood(frames: impl IntoIterator<Item = Vec<u8>>) -> (usize, Told) {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    program.ok(["get", "-e", "development", "database"]);
    let before = peak(&program);
    let mut peer = Peer::connect(&program.socket);
    let sent = peer.send(frames);
    let told = peer.finish();
    program.ok(["get", "-e", "development", "database"]);
    let grown = peak(&program) - before;
    assert!(grown < GROWTH, "{grown} KiB for one connection: {told:?}");
    (sent, told)
}

#[test]
fn b27_ten_thousand_streams_on_one_connection_are_refused() {
    const MANY: u32 = 10_000;
    let headers = get_secret();
    let (_, told) = flood((0..MANY).map(|n| frame(HEADERS, END_HEADERS, nth(n), &headers)));
    let all_refused = told.refused >= MANY as usize - STREAMS;
    assert!(all_refused || told.gone == Some(ENHANCE_YOUR_CALM) || told.closed, "{told:?}");
    assert!(told.refused > 0, "{told:?}");
}

#[test]
fn b27_rapid_reset_costs_the_connection_and_no_memory() {
    let headers = get_secret();
    let begin = |n| frame(HEADERS, END_HEADERS, nth(n), &headers);
    let end = |n| frame(RST_STREAM, 0, nth(n), &CANCEL.to_be_bytes());
    // A broker that keeps up may take one after the other; a hundred that come at once are more than may wait.
    let both = |n: u32| [begin(n), end(n)].concat();
    let at_once = |batch: u32| (100 * batch..100 * (batch + 1)).flat_map(both).collect::<Vec<u8>>();
    let (_, told) = flood((0..100).map(at_once));
    assert_eq!(told.gone, Some(ENHANCE_YOUR_CALM), "{told:?}");
}

#[test]
fn b27_a_flood_of_continuations_is_cut_off() {
    const MANY: usize = 20_000;
    let padding = field("x", &"y".repeat(100)).repeat(10);
    let begin = frame(HEADERS, 0, nth(0), &get_secret());
    let more = std::iter::repeat_with(|| frame(CONTINUATION, 0, nth(0), &padding)).take(MANY);
    let (sent, told) = flood(std::iter::once(begin).chain(more));
    assert!(told.closed || told.gone == Some(ENHANCE_YOUR_CALM), "{told:?}");
    assert!(sent < MANY, "20 MB of headers were taken");
}

#[test]
fn b27_a_flood_of_settings_and_pings_is_answered_or_cut_off() {
    let settings = || frame(SETTINGS, 0, 0, &[]);
    let ping = || frame(PING, 0, 0, b"tick tok");
    let (_, told) = flood((0..50_000).flat_map(|_| [settings(), ping()]));
    assert!(matches!(told.gone, None | Some(ENHANCE_YOUR_CALM)), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn b27_headers_over_their_bound_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let mut client = secrets(&program.socket).await;
    let request = |padding: usize| {
        let message = v1::GetSecretRequest {
            environment: "development".to_owned(),
            name: "database".to_owned(),
            ..Default::default()
        };
        let mut request = tonic::Request::new(message);
        request.metadata_mut().insert("x-padding", "y".repeat(padding).parse().unwrap());
        request
    };
    client.get_secret(request(8 * 1024)).await.expect("half the bound");
    let status = client.get_secret(request(20 * 1024)).await.unwrap_err();
    // The answer is HTTP's 431, and then the stream is reset; which of them the client tells is a race.
    let told = status.code() == Code::Unknown && status.message().contains("431");
    assert!(told || status.code() == Code::Internal, "{status:?}");
    client.get_secret(request(0)).await.expect("it cost the call and no more");
    let mut other = secrets(&program.socket).await;
    other.get_secret(request(0)).await.expect("others are served");
}

#[tokio::test(flavor = "multi_thread")]
async fn b25_a_body_that_does_not_come_is_waited_for_until_the_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path());
    let headers = [get_secret(), field("grpc-timeout", "300m")].concat();
    // The first byte of five that say how long the message is.
    let mut slow = mute(&served.program.socket, &headers, 0, &[0]);
    while read_frame(&mut slow).expect("the connection stays open").kind != HEADERS {}
    let late = "claviger_requests_total{method=\"claviger.v1.SecretService/GetSecret\",code=\"DEADLINE_EXCEEDED\"} 1";
    let counted = async { while !served.http("/metrics").await.1.contains(late) {} };
    tokio::time::timeout(HUNG, counted).await.expect("the deadline ended the call");
    assert!(served.program.put("development", "database", b"v").status.success(), "others are served");
}
