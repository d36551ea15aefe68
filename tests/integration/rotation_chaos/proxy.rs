//! Between broker and PostgreSQL: does to one change of a role what a network does on a bad day.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinHandle, JoinSet};

use super::HUNG;

/// The changes that it can tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    /// A password is set.
    Setting,
    /// What was current before is withdrawn.
    Retirement,
}

/// What happens to a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// It never gets there: the connection is reset.
    LoseRequest,
    /// It is committed, and the answer never comes back: the connection is reset.
    LoseAnswer,
    /// As [`LoseAnswer`](Self::LoseAnswer), and nobody gets through any more until [`Proxy::open`].
    LoseAnswerAndClose,
    /// It never gets there: the answer is that the server does not take this password.
    Refuse,
    /// It is kept until [`Proxy::release`]. Who sent it may be dead by then: the server gets it all the same.
    Keep,
}

/// What the server answered to a change that was kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// It is done.
    Committed,
    /// SQLSTATE of the refusal.
    Refused(String),
}

/// A proxy that passes everything on until it is told otherwise.
pub(super) struct Proxy {
    pub(super) port: u16,
    shared: Arc<Shared>,
    struck: mpsc::UnboundedReceiver<Fault>,
    answers: mpsc::UnboundedReceiver<Answer>,
    task: JoinHandle<()>,
}

struct Shared {
    upstream: AtomicU16,
    closed: AtomicBool,
    next: Mutex<Option<(Change, Fault)>>,
    always: Mutex<Option<Fault>>,
    release: Notify,
    struck: mpsc::UnboundedSender<Fault>,
    answers: mpsc::UnboundedSender<Answer>,
}

impl Proxy {
    /// One in front of the server on this port.
    pub(super) async fn before(upstream: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (struck_by, struck) = mpsc::unbounded_channel();
        let (answer, answers) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            upstream: AtomicU16::new(upstream),
            closed: AtomicBool::new(false),
            next: Mutex::default(),
            always: Mutex::default(),
            release: Notify::new(),
            struck: struck_by,
            answers: answer,
        });
        let task = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Self { port, shared, struck, answers, task }
    }

    /// Does this to the next change of a password, once.
    pub(super) fn next(&self, fault: Fault) {
        *self.shared.next.lock().unwrap() = Some((Change::Setting, fault));
    }

    /// Does this to the next withdrawal of a password, once.
    pub(super) fn next_retirement(&self, fault: Fault) {
        *self.shared.next.lock().unwrap() = Some((Change::Retirement, fault));
    }

    /// Does this to each change of a password, until it is told otherwise.
    pub(super) fn always(&self, fault: Option<Fault>) {
        *self.shared.always.lock().unwrap() = fault;
    }

    /// Lets connections through again.
    pub(super) fn open(&self) {
        self.shared.closed.store(false, Ordering::SeqCst);
    }

    /// From the next connection on, leads to the server on this port.
    pub(super) fn lead_to(&self, upstream: u16) {
        self.shared.upstream.store(upstream, Ordering::SeqCst);
    }

    /// Waits until it was done.
    pub(super) async fn struck(&mut self) -> Fault {
        tokio::time::timeout(HUNG, self.struck.recv()).await.expect("a change comes by").unwrap()
    }

    /// Lets the server have what was kept, and gives what it says.
    pub(super) async fn release(&mut self) -> Answer {
        self.shared.release.notify_one();
        tokio::time::timeout(HUNG, self.answers.recv()).await.expect("the server answers").unwrap()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // Dropped with the task, and every connection with it.
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        if !shared.closed.load(Ordering::SeqCst) {
            connections.spawn(serve(client, Arc::clone(&shared)));
        }
    }
}

/// One connection, which is plain: `tls = "disable"`.
async fn serve(client: TcpStream, shared: Arc<Shared>) -> io::Result<()> {
    let server = TcpStream::connect(("127.0.0.1", shared.upstream.load(Ordering::SeqCst))).await?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let fault = {
        let requests = async {
            to_server.write_all(&startup(&mut from_client).await?).await?;
            loop {
                let request = message(&mut from_client).await?;
                if let Some(fault) = shared.meant(&request) {
                    return io::Result::Ok((fault, request));
                }
                to_server.write_all(&request).await?;
            }
        };
        let answers = async {
            let copied = tokio::io::copy(&mut from_server, &mut to_client).await;
            copied.map(drop)
        };
        tokio::pin!(requests, answers);
        tokio::select! {
            fault = &mut requests => fault,
            ended = &mut answers => return ended,
        }
    };
    let (fault, request) = fault?;
    if fault == Fault::Keep {
        // Whether the one who asked is still there makes no difference.
        let _ = shared.struck.send(fault);
        shared.release.notified().await;
    }
    if fault == Fault::Refuse {
        let _ = shared.struck.send(fault);
        to_client.write_all(REFUSAL).await?;
        // What is left to be said is good-bye.
        return tokio::io::copy(&mut from_client, &mut to_server).await.map(drop);
    }
    if fault != Fault::LoseRequest {
        to_server.write_all(&request).await?;
        let (bytes, answer) = answer_to(&request, &mut from_client, &mut to_server, &mut from_server).await?;
        if fault == Fault::Keep {
            let _ = shared.answers.send(answer);
            if to_client.write_all(&bytes).await.is_err() {
                return Ok(());
            }
            let back = tokio::io::copy(&mut from_server, &mut to_client);
            let forth = tokio::io::copy(&mut from_client, &mut to_server);
            return tokio::select! {
                ended = back => ended.map(drop),
                ended = forth => ended.map(drop),
            };
        }
    }
    if fault == Fault::LoseAnswerAndClose {
        shared.closed.store(true, Ordering::SeqCst);
    }
    let client = to_client.reunite(from_client).map_err(io::Error::other)?;
    client.set_zero_linger()?;
    drop(client);
    let _ = shared.struck.send(fault);
    Ok(())
}

/// An ErrorResponse with the SQLSTATE by which a change says that the server does not take a password, and
/// ReadyForQuery.
const REFUSAL: &[u8] = b"E\0\0\0\x26SERROR\0CCLV03\0Mnot this password\0\0Z\0\0\0\x05I";

/// The server's answer, up to where it is ready for more. What is asked in several messages needs the rest of them.
async fn answer_to(
    request: &[u8],
    from_client: &mut (impl AsyncRead + Unpin),
    to_server: &mut (impl tokio::io::AsyncWrite + Unpin),
    from_server: &mut (impl AsyncRead + Unpin),
) -> io::Result<(Vec<u8>, Answer)> {
    const QUERY: u8 = b'Q';
    const SYNC: u8 = b'S';
    let mut kind = request[0];
    while kind != QUERY && kind != SYNC {
        let more = message(from_client).await?;
        to_server.write_all(&more).await?;
        kind = more[0];
    }
    let (mut bytes, mut answer) = (Vec::new(), Answer::Committed);
    loop {
        let part = message(from_server).await?;
        bytes.extend_from_slice(&part);
        match part[0] {
            b'E' => answer = Answer::Refused(code(&part)),
            b'Z' => return Ok((bytes, answer)),
            _ => {}
        }
    }
}

/// The SQLSTATE in an ErrorResponse: fields, each a letter and text up to a NUL.
fn code(response: &[u8]) -> String {
    let mut fields = response[5..].split(|byte| *byte == 0);
    let code = fields.find_map(|field| field.strip_prefix(b"C")).unwrap_or_default();
    String::from_utf8_lossy(code).into_owned()
}

impl Shared {
    /// What is to be done to this request, if it is a change.
    fn meant(&self, request: &[u8]) -> Option<Fault> {
        let holds = |text: &[u8]| request.windows(text.len()).any(|window| window == text);
        if !holds(b"DO LANGUAGE plpgsql") {
            return None;
        }
        let change = match (holds(b"SCRAM-SHA-256$"), holds(b"PASSWORD NULL")) {
            (true, _) => Change::Setting,
            (false, true) => Change::Retirement,
            (false, false) => return None,
        };
        let always = self.always.lock().unwrap().filter(|_| change == Change::Setting);
        let once = self.next.lock().unwrap().take_if(|(of, _)| *of == change).map(|(_, fault)| fault);
        once.or(always)
    }
}

/// The first message, which has no letter in front: length, bytes.
async fn startup(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    from.read_exact(&mut bytes).await?;
    body(from, bytes, 0).await
}

/// Any other: a letter, length, bytes.
async fn message(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 5];
    from.read_exact(&mut bytes).await?;
    body(from, bytes, 1).await
}

/// The length counts itself.
async fn body(from: &mut (impl AsyncRead + Unpin), mut bytes: Vec<u8>, at: usize) -> io::Result<Vec<u8>> {
    let length = u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    bytes.resize(at + length, 0);
    from.read_exact(&mut bytes[at + 4..]).await?;
    Ok(bytes)
}
