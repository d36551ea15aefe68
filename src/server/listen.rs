//! Listeners: a Unix socket, or TCP on loopback. Both give connections of one type, counted against one bound.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::transport::server::Connected;

use super::ServerError;
use crate::identity::{Peer, SourceAddress};

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A Unix socket, created with this mode.
    Unix {
        /// The socket.
        path: PathBuf,
        /// Its permission bits. Policy decides who may do what; these only decide who may ask.
        mode: u32,
    },
    /// A loopback address.
    Tcp(SocketAddr),
}

impl Listen {
    /// Listens. A socket file that a dead broker left behind is replaced; one that answers is not, nor is anything
    /// that is not a socket.
    ///
    /// # Errors
    /// [`ServerError::Listen`].
    pub async fn bind(&self) -> Result<Bound, ServerError> {
        match self {
            Self::Unix { path, mode } => bind_unix(path, *mode).await,
            Self::Tcp(address) => bind_tcp(*address).await,
        }
    }
}

/// A listener that is ready. Removes its socket file when it goes.
#[derive(Debug)]
pub struct Bound {
    listener: Listener,
    address: String,
    _socket: Option<SocketFile>,
}

#[derive(Debug)]
enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Bound {
    /// The address that a client names: `unix:///path` or `http://127.0.0.1:port`, with the port really taken.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Connections, as they come; one over the bound is closed at once.
    pub(super) fn incoming(self, bound: Arc<Semaphore>) -> impl Stream<Item = io::Result<Connection>> {
        futures_util::stream::unfold((self, bound), |(listener, bound)| async move {
            let mut complaint = Complaint::default();
            loop {
                let accepted = listener.accept().await;
                match (accepted, Arc::clone(&bound).try_acquire_owned()) {
                    (Ok((stream, info)), Ok(permit)) => {
                        let connection = Connection::new(stream, info, permit);
                        return Some((Ok(connection), (listener, bound)));
                    }
                    (Ok((_, info)), Err(_)) => {
                        complaint.say(|suppressed| {
                            tracing::warn!(source = %info.source, suppressed, "connection refused: the bound on connections is reached");
                        });
                    }
                    // Out of file descriptors, or a peer that went before it was accepted: the listener lives on, but
                    // not in a circle without a pause.
                    (Err(error), _) => {
                        complaint.say(|suppressed| tracing::warn!(%error, suppressed, "accept failed"));
                        pause().await;
                    }
                }
            }
        })
    }

    async fn accept(&self) -> io::Result<(Socket, ConnectionInfo)> {
        match &self.listener {
            Listener::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let credentials = stream.peer_cred()?;
                let pid = credentials.pid();
                let peer = Peer { uid: credentials.uid(), gid: credentials.gid(), pid };
                Ok((
                    Socket::Unix(stream),
                    ConnectionInfo { source: SourceAddress::Unix { pid }, peer: Some(peer) },
                ))
            }
            Listener::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok((Socket::Tcp(stream), ConnectionInfo { source: SourceAddress::Tcp(address), peer: None }))
            }
        }
    }
}

/// A warning that repeats is said with its 1st, 10th, 100th … occurrence.
#[derive(Default)]
struct Complaint {
    times: u64,
    next: u64,
}

impl Complaint {
    fn say(&mut self, say: impl FnOnce(u64)) {
        self.times += 1;
        if self.times > self.next {
            say(self.times - 1);
            self.next = self.times.saturating_mul(10).saturating_sub(1);
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "there is no condition to wait for: file descriptors come back in time"
)]
async fn pause() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// What the kernel says of a connection's other end.
#[derive(Debug, Clone)]
pub(super) struct ConnectionInfo {
    pub(super) source: SourceAddress,
    pub(super) peer: Option<Peer>,
}

/// A connection that holds its place among the connections permitted.
///
/// One that has not begun to speak HTTP/2 within [`BEGIN_WITHIN`] is closed: the protocol keeps its own watch over
/// silence, but only from there on.
pub(super) struct Connection {
    stream: Socket,
    info: ConnectionInfo,
    /// Until when the rest of the beginning must be there, and how many bytes of it are missing.
    begin: Option<(Pin<Box<tokio::time::Sleep>>, usize)>,
    _permit: OwnedSemaphorePermit,
}

/// How long a connection may keep its place without having begun.
const BEGIN_WITHIN: Duration = Duration::from_secs(10);
/// The client's connection preface and the head of its SETTINGS frame, in bytes (RFC 9113, sections 3.4 and 4.1).
const BEGINNING: usize = 24 + 9;

impl Connection {
    #[expect(clippy::disallowed_methods, reason = "a limit on waiting is a time")]
    fn new(stream: Socket, info: ConnectionInfo, permit: OwnedSemaphorePermit) -> Self {
        let begin = Some((Box::pin(tokio::time::sleep(BEGIN_WITHIN)), BEGINNING));
        Self { stream, info, begin, _permit: permit }
    }

    fn heard(&mut self, bytes: usize) {
        self.begin = self
            .begin
            .take()
            .map(|(limit, missing)| (limit, missing.saturating_sub(bytes)))
            .filter(|(_, missing)| *missing > 0);
    }

    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.begin {
            Some((limit, _)) => {
                let late = || {
                    io::Error::new(io::ErrorKind::TimedOut, "the connection did not begin to speak HTTP/2")
                };
                limit.as_mut().poll(cx).map(|()| Err(late()))
            }
            None => Poll::Pending,
        }
    }
}

enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Connected for Connection {
    type ConnectInfo = ConnectionInfo;

    fn connect_info(&self) -> ConnectionInfo {
        self.info.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = match &mut self.stream {
            Socket::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Socket::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
        };
        if read.is_pending() {
            return self.poll_silence(cx);
        }
        self.heard(buf.filled().len() - before);
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Socket::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Socket::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Socket::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Socket::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Socket::Unix(stream) => stream.is_write_vectored(),
            Socket::Tcp(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Socket::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Tcp(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Socket::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// The socket file that this process made, told from a later one of the same name by its inode.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket file could not be removed");
        }
    }
}

async fn bind_unix(path: &Path, mode: u32) -> Result<Bound, ServerError> {
    let address = format!("unix://{}", path.display());
    let refuse = |problem: String| ServerError::Listen { address: address.clone(), problem };
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(refuse("exists and is not a socket; choose another path".to_owned()));
        }
        Ok(_) if UnixStream::connect(path).await.is_ok() => {
            return Err(refuse("another process answers there; stop it or choose another path".to_owned()));
        }
        Ok(_) => std::fs::remove_file(path).map_err(|error| refuse(format!("stale socket: {error}")))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(refuse(error.to_string())),
    }
    let listener = UnixListener::bind(path).map_err(|error| refuse(error.to_string()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .map_err(|error| refuse(format!("mode {mode:o}: {error}")))?;
    let inode = std::fs::symlink_metadata(path).map_err(|error| refuse(error.to_string()))?.ino();
    let socket = Some(SocketFile { path: path.to_owned(), inode });
    Ok(Bound { listener: Listener::Unix(listener), address, _socket: socket })
}

async fn bind_tcp(address: SocketAddr) -> Result<Bound, ServerError> {
    let refuse = |problem: String| ServerError::Listen { address: address.to_string(), problem };
    if !address.ip().is_loopback() {
        let problem = "is not a loopback address, and without TLS secrets would cross the network in the clear; use 127.0.0.1 or [::1]";
        return Err(refuse(problem.to_owned()));
    }
    let listener = TcpListener::bind(address).await.map_err(|error| refuse(error.to_string()))?;
    let taken = listener.local_addr().map_err(|error| refuse(error.to_string()))?;
    Ok(Bound { listener: Listener::Tcp(listener), address: format!("http://{taken}"), _socket: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let listen = Listen::Unix { path: path.clone(), mode: 0o600 };
        let bound = listen.bind().await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let error = listen.bind().await.unwrap_err().to_string();
        assert!(error.contains("another process answers there"), "{error}");
        drop(bound);
        assert!(!path.exists(), "the socket file goes with its listener");
    }

    #[tokio::test]
    async fn what_is_not_a_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        let error = Listen::Unix { path: path.clone(), mode: 0o600 }.bind().await.unwrap_err().to_string();
        assert!(error.contains("not a socket"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
    }

    #[tokio::test]
    async fn tcp_without_tls_stays_on_loopback() {
        let everywhere = Listen::Tcp("0.0.0.0:0".parse().unwrap());
        assert!(everywhere.bind().await.unwrap_err().to_string().contains("loopback"));
        let local = Listen::Tcp("127.0.0.1:0".parse().unwrap()).bind().await.unwrap();
        assert!(local.address().starts_with("http://127.0.0.1:"));
    }
}
