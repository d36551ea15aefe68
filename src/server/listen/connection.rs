//! One connection, whatever it came over.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Sleep;

use super::places::{Place, Standing};
use crate::identity::mtls::ClientCertificate;
use crate::identity::{Peer, SourceAddress};
use crate::server::tls::Secured;

/// What is known of a connection's other end.
#[derive(Debug, Clone)]
pub(in crate::server) struct ConnectionInfo {
    pub(in crate::server) source: SourceAddress,
    /// What the kernel says.
    pub(in crate::server) peer: Option<Peer>,
    /// What the handshake verified.
    pub(in crate::server) certificate: Option<Arc<ClientCertificate>>,
    standing: Arc<Standing>,
}

impl ConnectionInfo {
    /// A call on it was authenticated.
    pub(in crate::server) fn known(&self) {
        self.standing.known();
    }

    /// A call on it asked for what is open to everyone: it may stay unknown for a while longer.
    pub(in crate::server) fn renew(&self) {
        self.standing.renew();
    }
}

/// What a connection has from the moment when it was accepted.
pub(super) struct Admitted {
    pub(super) info: ConnectionInfo,
    stranger: Option<Pin<Box<Sleep>>>,
    place: Place,
}

impl Admitted {
    #[expect(clippy::disallowed_methods, reason = "a limit on waiting is a time")]
    pub(super) fn new(source: SourceAddress, peer: Option<Peer>, place: Place) -> Self {
        let standing = Arc::clone(place.standing());
        let stranger = (!standing.is_known()).then(|| Box::pin(tokio::time::sleep(KNOWN_WITHIN)));
        let info = ConnectionInfo { source, peer, certificate: None, standing };
        Self { info, stranger, place }
    }

    /// The same, after a handshake. Whose certificate it verified is known.
    pub(super) fn shaken(mut self, certificate: Option<Arc<ClientCertificate>>) -> Self {
        if certificate.is_some() {
            self.info.known();
        }
        self.info.certificate = certificate;
        self
    }
}

/// A connection that holds its place among the connections permitted.
///
/// Two things end it, whatever the protocol thinks of it:
/// - It has not begun to speak HTTP/2 within [`BEGIN_WITHIN`] of its handshake: the protocol keeps its own watch over
///   silence, but only from there on.
/// - Nobody is known to be on it [`KNOWN_WITHIN`] after it was accepted, though it answer every ping. Calls to the open
///   health service renew that time and nothing else: the connection of a balancer that asks at least that often lives,
///   in the share of the unknown.
pub(in crate::server) struct Connection {
    stream: Socket,
    info: ConnectionInfo,
    /// Until when the rest of the beginning must be there, and how many bytes of it are missing.
    begin: Option<(Pin<Box<Sleep>>, usize)>,
    /// Until when somebody must be known to be on it; `None` once somebody is.
    stranger: Option<Pin<Box<Sleep>>>,
    /// Below the stream, so that it is free only when that is closed.
    _place: Place,
}

pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
    /// In a box: a TLS connection is some kilobytes large.
    Tls(Box<Secured>),
}

/// How long a connection may keep its place without having begun.
const BEGIN_WITHIN: Duration = Duration::from_secs(10);
/// How long a connection may keep its place without anyone knowing who is on it.
const KNOWN_WITHIN: Duration = Duration::from_secs(30);
/// The client's connection preface and the head of its SETTINGS frame, in bytes (RFC 9113, sections 3.4 and 4.1).
const BEGINNING: usize = 24 + 9;

impl Connection {
    #[expect(clippy::disallowed_methods, reason = "a limit on waiting is a time")]
    pub(super) fn new(stream: Socket, admitted: Admitted) -> Self {
        let Admitted { info, stranger, place } = admitted;
        let begin = Some((Box::pin(tokio::time::sleep(BEGIN_WITHIN)), BEGINNING));
        Self { stream, info, begin, stranger, _place: place }
    }

    /// What is known of its other end.
    pub(in crate::server) const fn info(&self) -> &ConnectionInfo {
        &self.info
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
            Some((limit, _)) => limit
                .as_mut()
                .poll(cx)
                .map(|()| Err(too_late("the connection did not begin to speak HTTP/2"))),
            None => Poll::Pending,
        }
    }

    /// Ready once the connection has been unknown for too long. Asked before each read and each write, so that neither
    /// one that always has something to say nor one that takes no answer goes unnoticed.
    fn poll_outstayed(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        while let Some(limit) = &mut self.stranger {
            if self.info.standing.is_known() {
                self.stranger = None;
                break;
            }
            ready!(limit.as_mut().poll(cx));
            if !self.info.standing.may_stay() {
                return Poll::Ready(too_late("nobody is known to be on the connection"));
            }
            let renewed = limit.deadline() + KNOWN_WITHIN;
            limit.as_mut().reset(renewed);
        }
        Poll::Pending
    }
}

fn too_late(problem: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, problem)
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Poll::Ready(outstayed) = self.poll_outstayed(cx) {
            return Poll::Ready(Err(outstayed));
        }
        let before = buf.filled().len();
        let read = match &mut self.stream {
            Socket::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Socket::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Socket::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
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
        if let Poll::Ready(outstayed) = self.poll_outstayed(cx) {
            return Poll::Ready(Err(outstayed));
        }
        match &mut self.stream {
            Socket::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Socket::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Socket::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(outstayed) = self.poll_outstayed(cx) {
            return Poll::Ready(Err(outstayed));
        }
        match &mut self.stream {
            Socket::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Socket::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Socket::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    /// No, though sockets are: HTTP/2 would then leave every message of 256 bytes and more where it is, and end a write
    /// with each. As it is, it copies those below a kilobyte, and many replies leave in one write.
    fn is_write_vectored(&self) -> bool {
        false
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(outstayed) = self.poll_outstayed(cx) {
            return Poll::Ready(Err(outstayed));
        }
        match &mut self.stream {
            Socket::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Socket::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::{Limits, Places};
    use std::task::Waker;
    use tokio::io::AsyncWriteExt as _;

    fn admitted(places: &Places) -> Admitted {
        let source = SourceAddress::Tcp("10.0.0.1:1".parse().unwrap());
        let place = places.take(&source, None).unwrap();
        Admitted::new(source, None, place)
    }

    /// A stranger's connection whose time is over, and its other end.
    #[expect(clippy::disallowed_methods, reason = "a time that is over is no wait")]
    async fn outstayed() -> (Connection, UnixStream) {
        let mut over = Box::pin(tokio::time::sleep(Duration::ZERO));
        over.as_mut().await;
        let (here, there) = UnixStream::pair().unwrap();
        let admitted = Admitted { stranger: Some(over), ..admitted(&Places::new(&Limits::default())) };
        (Connection::new(Socket::Unix(here), admitted), there)
    }

    fn read(connection: &mut Connection) -> Poll<Result<(), io::ErrorKind>> {
        let (mut bytes, mut cx) = ([0; 64], Context::from_waker(Waker::noop()));
        let read = Pin::new(connection).poll_read(&mut cx, &mut ReadBuf::new(&mut bytes));
        read.map(|read| read.map_err(|error| error.kind()))
    }

    #[tokio::test]
    async fn b25_a_connection_that_stays_unknown_is_closed_whatever_it_says() {
        let (mut connection, mut there) = outstayed().await;
        there.write_all(b"a ping").await.unwrap();
        assert_eq!(read(&mut connection), Poll::Ready(Err(io::ErrorKind::TimedOut)));
        assert_eq!(connection.write(b"pong").await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(connection.flush().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn b25_a_call_to_what_is_open_renews_the_time_once() {
        let (mut connection, _there) = outstayed().await;
        connection.info().renew();
        assert_eq!(read(&mut connection), Poll::Pending);
        let until = connection.stranger.as_ref().map(|limit| limit.deadline());
        assert!(until.is_some_and(|until| until > tokio::time::Instant::now()), "it counts on");
        assert!(!connection.info.standing.may_stay(), "the next time takes another call");
        assert!(!connection.info.standing.is_known());
    }

    #[tokio::test]
    async fn a_connection_with_a_call_that_was_authenticated_stays() {
        let (mut connection, _there) = outstayed().await;
        connection.info().known();
        assert_eq!(read(&mut connection), Poll::Pending);
        assert!(connection.stranger.is_none(), "no time is kept any more");
        connection.write_all(b"pong").await.unwrap();
    }

    #[tokio::test]
    async fn who_comes_over_a_unix_socket_is_known_from_the_start() {
        let places = Places::new(&Limits::default());
        let peer = Peer { uid: 7, gid: 7, pid: None };
        let source = SourceAddress::Unix { pid: None };
        let place = places.take(&source, Some(peer)).unwrap();
        assert!(Admitted::new(source, Some(peer), place).stranger.is_none());
        assert!(
            admitted(&places).shaken(None).stranger.is_some(),
            "a handshake without a certificate makes nobody known"
        );
    }
}
