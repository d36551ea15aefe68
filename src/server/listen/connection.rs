//! One connection, whatever it came over.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tonic::transport::server::Connected;

use super::places::Place;
use crate::identity::mtls::ClientCertificate;
use crate::identity::{Peer, SourceAddress};
use crate::server::tls::Secured;

/// What is known of a connection's other end before it says a word.
#[derive(Debug, Clone)]
pub(in crate::server) struct ConnectionInfo {
    pub(in crate::server) source: SourceAddress,
    /// What the kernel says.
    pub(in crate::server) peer: Option<Peer>,
    /// What the handshake verified.
    pub(in crate::server) certificate: Option<Arc<ClientCertificate>>,
}

/// A connection that holds its place among the connections permitted.
///
/// One that has not begun to speak HTTP/2 within [`BEGIN_WITHIN`] of its handshake is closed: the protocol keeps its
/// own watch over silence, but only from there on.
pub(in crate::server) struct Connection {
    stream: Socket,
    info: ConnectionInfo,
    /// Until when the rest of the beginning must be there, and how many bytes of it are missing.
    begin: Option<(Pin<Box<tokio::time::Sleep>>, usize)>,
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
/// The client's connection preface and the head of its SETTINGS frame, in bytes (RFC 9113, sections 3.4 and 4.1).
const BEGINNING: usize = 24 + 9;

impl Connection {
    #[expect(clippy::disallowed_methods, reason = "a limit on waiting is a time")]
    pub(super) fn new(stream: Socket, info: ConnectionInfo, place: Place) -> Self {
        let begin = Some((Box::pin(tokio::time::sleep(BEGIN_WITHIN)), BEGINNING));
        Self { stream, info, begin, _place: place }
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
        match &mut self.stream {
            Socket::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Socket::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Socket::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Socket::Unix(stream) => stream.is_write_vectored(),
            Socket::Tcp(stream) => stream.is_write_vectored(),
            Socket::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
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
