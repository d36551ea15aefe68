//! A broker over the network: how it is connected to, and what it means where that ends at once.
//!
//! ```text
//! HTTP/2 library ── Listening ── TLS, or nothing ── TCP
//!                       └─▶ Heard: whether the broker began to speak, and the alert that it ended a connection with
//! ```
//!
//! The HTTP/2 library can't be asked why a connection ended: it forgets the cause where a call was still waiting to be
//! sent, and where it can't write it does not read any more. A broker that refuses a certificate says so and closes (RFC
//! 8446, section 4.4.2.4), at a moment of its own; what a caller is told must not depend on that moment.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use http::Uri;
use rustls::AlertDescription;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tonic::Code;

use super::address::{self, Address, MEND};
use super::error::ClientError;
use super::tls::{Handshake, PRESENT, TlsOptions, refused_certificate};
use crate::error::Reason;

const HTTP_PORT: u16 = 80;
const HTTPS_PORT: u16 = 443;
/// How long a second look at a broker may take that ended a connection without a word.
const SECOND_LOOK: Duration = Duration::from_secs(2);
/// How a client begins: the preface, and a SETTINGS frame that says nothing (RFC 9113, section 3.4).
const GREETING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// The type of the frame that a server begins with (RFC 9113, section 6.5), and how many bytes come before it.
const SETTINGS: u8 = 4;
const BEFORE_TYPE: usize = 3;

/// A broker at a TCP address.
#[derive(Debug)]
pub(super) struct Network {
    address: Address,
    host: String,
    port: u16,
    handshake: Option<Handshake>,
    heard: Arc<Heard>,
}

/// What the broker said, whatever became of the call.
#[derive(Debug, Default)]
struct Heard {
    /// It began to speak HTTP/2, on some connection: it accepted what was presented then.
    spoke: AtomicBool,
    /// The alert that it ended a connection with, unless it spoke on a later one.
    alert: ArcSwapOption<AlertDescription>,
}

impl Network {
    pub(super) fn new(address: &Address, uri: &Uri, tls: &TlsOptions) -> Result<Self, ClientError> {
        let (handshake, usual_port) = match address {
            Address::Https(_) => (Some(Handshake::new(uri, tls)?), HTTPS_PORT),
            Address::Http(_) | Address::Unix(_) => (None, HTTP_PORT),
        };
        Ok(Self {
            address: address.clone(),
            host: address::host(uri).to_owned(),
            port: uri.port_u16().unwrap_or(usual_port),
            handshake,
            heard: Arc::default(),
        })
    }

    pub(super) async fn connect(&self) -> Result<Listening, ClientError> {
        let Some(handshake) = &self.handshake else { return Ok(self.listening(self.dial().await?)) };
        let prepared = handshake.prepare().await?;
        let stream = handshake.shake(prepared, self.dial().await?).await?;
        Ok(self.listening(stream))
    }

    async fn dial(&self) -> Result<TcpStream, ClientError> {
        let absent = |error: io::Error| {
            ClientError::unavailable(format!("no broker at {}: {error}; {MEND}", self.address))
        };
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await.map_err(absent)?;
        stream.set_nodelay(true).map_err(absent)?;
        Ok(stream)
    }

    fn listening(&self, stream: impl Duplex + 'static) -> Listening {
        Listening {
            stream: Box::new(stream),
            heard: Arc::clone(&self.heard),
            before_type: Some(BEFORE_TYPE),
            hung_up: false,
        }
    }

    /// What a failed call says about the broker, or about what was presented to it; `None` where it says nothing but
    /// that the connection failed.
    pub(super) async fn meaning(&self) -> Option<ClientError> {
        if let Some(refused) = self.refused() {
            return Some(refused);
        }
        if self.heard.spoke.load(Ordering::Relaxed) {
            return None;
        }
        let Some(handshake) = &self.handshake else { return Some(self.not_in_the_clear()) };
        // A broker that stops closes a connection early, too; but it does not do so a second time.
        let looked = tokio::time::timeout(SECOND_LOOK, self.second_look(handshake)).await;
        looked.ok().flatten()
    }

    /// That the broker does not accept the certificate, or wants one.
    fn refused(&self) -> Option<ClientError> {
        let presents = self.handshake.as_ref().is_some_and(Handshake::presents);
        self.heard.alert.load_full().and_then(|alert| refused_certificate(*alert, presents))
    }

    /// Connects once more, asks nothing, and looks how that ends.
    async fn second_look(&self, handshake: &Handshake) -> Option<ClientError> {
        let ended = match self.connect().await {
            Ok(stream) => greeted(stream).await.is_err(),
            Err(error) => return Some(error).filter(|error| error.reason == Reason::Unauthenticated),
        };
        self.refused().or_else(|| ended.then(|| self.suspected(handshake)))
    }

    /// The code says that this is no certain no: what the caller still has of a secret it may keep.
    fn suspected(&self, handshake: &Handshake) -> ClientError {
        let suspicion = match handshake.presents() {
            true => "perhaps it does not accept the client certificate; present another one".to_owned(),
            false => format!("perhaps it wants a client certificate; {PRESENT}"),
        };
        let message = format!(
            "{}: the broker twice ended the connection right after the handshake, without a word; {suspicion}, or look \
             into its log",
            self.address
        );
        ClientError::new(Reason::Unauthenticated, Code::Unavailable, message)
    }

    fn not_in_the_clear(&self) -> ClientError {
        ClientError::unavailable(format!(
            "{}: the other side does not speak HTTP/2 in the clear; is it an https:// port, or the one for probes and \
             metrics?",
            self.address
        ))
    }
}

/// Begins to speak HTTP/2, and waits for the first word of the other side.
async fn greeted(mut stream: Listening) -> io::Result<u8> {
    stream.write_all(GREETING).await?;
    stream.flush().await?;
    stream.read_u8().await
}

/// What bytes go through in both directions.
trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// A stream that notes how the other side begins and ends, and hears it out: once the other side hung up, what is
/// written goes nowhere, and reading comes to the end by itself.
pub(super) struct Listening {
    stream: Box<dyn Duplex>,
    heard: Arc<Heard>,
    /// How many more bytes come before the type of the first frame; none once it was seen.
    before_type: Option<usize>,
    hung_up: bool,
}

impl Listening {
    fn note(&mut self, bytes: &[u8]) {
        let Some(before) = self.before_type else { return };
        let kind = bytes.get(before);
        self.before_type = kind.is_none().then(|| before.saturating_sub(bytes.len()));
        if kind == Some(&SETTINGS) {
            self.heard.begin();
        }
    }

    fn written<T>(&mut self, written: Poll<io::Result<T>>, nowhere: T) -> Poll<io::Result<T>> {
        match written {
            Poll::Ready(Err(error)) if is_hang_up(error.kind()) => {
                self.hung_up = true;
                Poll::Ready(Ok(nowhere))
            }
            written => written,
        }
    }
}

const fn is_hang_up(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

impl Heard {
    fn begin(&self) {
        self.spoke.store(true, Ordering::Relaxed);
        self.alert.store(None);
    }

    fn end(&self, error: &io::Error) {
        let error = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
        if let Some(rustls::Error::AlertReceived(alert)) = error {
            self.alert.store(Some(Arc::new(*alert)));
        }
    }
}

impl AsyncRead for Listening {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        match &read {
            Ok(()) => self.note(buf.filled().get(before..).unwrap_or_default()),
            Err(error) => self.heard.end(error),
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Listening {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.hung_up {
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.written(written, bytes.len())
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = parts.iter().map(|part| part.len()).sum();
        if self.hung_up {
            return Poll::Ready(Ok(length));
        }
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.written(written, length)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.hung_up {
            return Poll::Ready(Ok(()));
        }
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.written(flushed, ())
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.hung_up {
            return Poll::Ready(Ok(()));
        }
        let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.written(shut, ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;
    use tokio::net::TcpListener;

    const HUNG: Duration = Duration::from_secs(60);

    fn network(text: &str) -> Network {
        let address = Address::parse(text).unwrap();
        let (Address::Http(uri) | Address::Https(uri)) = &address else { panic!("{text}") };
        Network::new(&address, uri, &TlsOptions::default()).unwrap()
    }

    /// Takes no byte, and has an alert to tell.
    struct Refusing(Option<AlertDescription>);

    impl AsyncRead for Refusing {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let alert = self.0.take().map(rustls::Error::AlertReceived);
            Poll::Ready(alert.map_or(Ok(()), |alert| Err(io::Error::new(io::ErrorKind::InvalidData, alert))))
        }
    }

    impl AsyncWrite for Refusing {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
        }
    }

    #[test]
    fn host_and_port_are_those_of_the_address() {
        let found = |text: &str| {
            let Network { host, port, .. } = network(text);
            (host, port)
        };
        assert_eq!(found("http://127.0.0.1"), ("127.0.0.1".to_owned(), 80));
        assert_eq!(found("https://broker.example"), ("broker.example".to_owned(), 443));
        assert_eq!(found("https://[2001:db8::1]:7340"), ("2001:db8::1".to_owned(), 7340));
    }

    #[tokio::test]
    async fn whoever_hangs_up_is_heard_out() {
        let network = network("https://broker.example");
        let mut stream = network.listening(Refusing(Some(AlertDescription::CertificateRequired)));
        stream.write_all(GREETING).await.unwrap();
        stream.flush().await.unwrap();
        stream.shutdown().await.unwrap();
        assert!(network.refused().is_none(), "nothing was read");
        assert_eq!(stream.read_u8().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        let refused = network.meaning().await.unwrap();
        assert_eq!((refused.reason, refused.code), (Reason::Unauthenticated, Code::Unauthenticated));
        assert!(refused.message.contains("wants a client certificate"), "{refused}");

        let mut other = network.listening(Refusing(Some(AlertDescription::InternalError)));
        assert_eq!(other.shutdown().await.unwrap_err().kind(), io::ErrorKind::TimedOut, "nobody hung up");
        assert!(other.read_u8().await.is_err());
        assert!(network.refused().is_none(), "the alert of the last connection counts");
    }

    #[tokio::test]
    async fn a_broker_begins_with_its_settings() {
        for (said, speaks) in [
            (&b"\0\0\0\x04\0\0\0\0\0"[..], true),
            (&b"HTTP/1.1 400 Bad Request\r\n"[..], false),
            (&b"\x15\x03\x03\0\x02\x02\x32"[..], false),
            (&b"\0\0\0"[..], false),
        ] {
            for at_once in [1, 2, 64] {
                let network = network("http://127.0.0.1:1");
                network.heard.alert.store(Some(Arc::new(AlertDescription::UnknownCA)));
                let (here, mut there) = tokio::io::duplex(64);
                there.write_all(said).await.unwrap();
                drop(there);
                let mut stream = network.listening(here);
                let mut buffer = vec![0; at_once];
                while stream.read(&mut buffer).await.unwrap() > 0 {}
                assert_eq!(network.heard.spoke.load(Ordering::Relaxed), speaks, "{said:?}");
                assert_eq!(network.refused().is_none(), speaks, "an alert before that is of the past");
            }
        }
    }

    /// Closes the first connections as soon as there is a word on them.
    async fn closing(times: usize) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            for _ in 0..times {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read_u8().await;
            }
        });
        address
    }

    #[tokio::test]
    async fn what_does_not_speak_in_the_clear_is_asked_about() {
        let network = network(&format!("http://{}", closing(1).await));
        assert!(greeted(network.connect().await.unwrap()).await.is_err());
        let meaning = network.meaning().await.unwrap();
        assert_eq!((meaning.reason, meaning.code), (Reason::Unavailable, Code::Unavailable));
        assert!(meaning.message.contains("in the clear; is it an https:// port"), "{meaning}");
        network.heard.begin();
        assert_eq!(network.meaning().await, None, "what spoke once does speak");
    }

    #[tokio::test]
    async fn a_second_look_that_finds_no_broker_suspects_nothing() {
        let network = network(&format!("https://{}", closing(1).await));
        let looked = tokio::time::timeout(HUNG, network.meaning()).await.expect("it ends");
        assert_eq!(looked, None, "it does not speak TLS");
    }
}
