//! Between broker and PostgreSQL: does to one change of a password what a network does on a bad day.

use std::io;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinHandle, JoinSet};

use super::HUNG;

/// What happens to the next change of a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// It never gets there: the connection is reset.
    LoseRequest,
    /// It is committed, and the answer never comes back: the connection is reset.
    LoseAnswer,
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
    upstream: u16,
    next: Mutex<Option<Fault>>,
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
            upstream,
            next: Mutex::default(),
            release: Notify::new(),
            struck: struck_by,
            answers: answer,
        });
        let task = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Self { port, shared, struck, answers, task }
    }

    /// Does this to the next change of a password, once.
    pub(super) fn next(&self, fault: Fault) {
        *self.shared.next.lock().unwrap() = Some(fault);
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
        connections.spawn(serve(client, Arc::clone(&shared)));
    }
}

/// One connection, which is plain: `tls = "disable"`.
async fn serve(client: TcpStream, shared: Arc<Shared>) -> io::Result<()> {
    let server = TcpStream::connect(("127.0.0.1", shared.upstream)).await?;
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
    let client = to_client.reunite(from_client).map_err(io::Error::other)?;
    client.set_zero_linger()?;
    drop(client);
    let _ = shared.struck.send(fault);
    Ok(())
}

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
    /// What is to be done to this request, if it changes a password.
    fn meant(&self, request: &[u8]) -> Option<Fault> {
        let holds = |text: &[u8]| request.windows(text.len()).any(|window| window == text);
        if !(holds(b"DO LANGUAGE plpgsql") && holds(b"SCRAM-SHA-256$")) {
            return None;
        }
        self.next.lock().unwrap().take()
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
