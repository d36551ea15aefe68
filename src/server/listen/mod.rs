//! Listeners: a Unix socket, TCP on loopback, TLS anywhere. All give connections of one type, counted against one
//! bound, and against others for each caller and for those whom nobody knows.
//!
//! ```text
//! accept ─▶ a place? ── no ─▶ closed at once, counted
//!              │ yes, and on to a worker
//!              ├─ Unix, TCP ──────────────────────────▶ Connection ─▶ HTTP/2 within 10 s,
//!              └─ TLS ─▶ handshake, beside others, ──────▶ ┘          and over the network
//!                        within 5 s                                   somebody known within 30 s
//! ```

mod connection;
mod places;

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::Stream;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::ServerError;
use super::tls::{Settings, Tls};
use crate::clock::{SharedClock, SystemClock};
use crate::identity::{Peer, SourceAddress};

pub(in crate::server) use connection::{Connection, ConnectionInfo};
pub use places::Places;

use connection::{Admitted, Socket};
use places::Place;

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
    /// Any address, with TLS.
    Tls(Settings),
}

impl Listen {
    /// Listens, by the machine's clock. A socket file that a dead broker left behind is replaced; one that answers is
    /// not, nor is anything that is not a socket.
    ///
    /// # Errors
    /// [`ServerError::Listen`], and [`ServerError::Tls`] where certificate, key or authorities can't be used.
    pub async fn bind(&self) -> Result<Bound, ServerError> {
        self.bind_by(SystemClock::shared()).await
    }

    /// As [`bind`](Self::bind), by another clock: certificates are judged by it.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub async fn bind_by(&self, clock: SharedClock) -> Result<Bound, ServerError> {
        match self {
            Self::Unix { path, mode } => bind_unix(path, *mode).await,
            Self::Tcp(address) => bind_tcp(*address).await,
            Self::Tls(settings) => bind_tls(settings, clock).await,
        }
    }
}

/// A listener that is ready. Removes its socket file when it goes.
#[derive(Debug)]
pub struct Bound {
    listener: Listener,
    address: String,
    socket: Option<SocketFile>,
}

#[derive(Debug)]
enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
    Tls(TcpListener, Arc<Tls>),
}

impl Bound {
    /// The address that a client names: `unix:///path`, `http://127.0.0.1:port` or `https://address:port`, with the
    /// port really taken.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether the socket file that callers look for is still this listener's; a network address always is.
    pub(crate) fn reachable(&self) -> impl Fn() -> bool + Send + Sync + 'static {
        let mark = self.socket.as_ref().map(|socket| (socket.path.clone(), socket.inode));
        move || {
            mark.as_ref().is_none_or(|(path, inode)| {
                std::fs::symlink_metadata(path).is_ok_and(|found| found.ino() == *inode)
            })
        }
    }

    /// The certificates of a TLS listener.
    #[must_use]
    pub const fn tls(&self) -> Option<&Arc<Tls>> {
        match &self.listener {
            Listener::Tls(_, tls) => Some(tls),
            Listener::Unix(_) | Listener::Tcp(_) => None,
        }
    }

    /// Connections, as they come; one without a place is closed at once.
    pub(super) fn incoming(self, places: Places) -> impl Stream<Item = Accepted> {
        let incoming = Incoming { bound: self, places, complaints: Arc::default() };
        futures_util::stream::unfold(incoming, |mut incoming| async move {
            let accepted = incoming.next().await;
            Some((accepted, incoming))
        })
    }

    /// The next connection, where it comes from, and who the kernel says it is.
    async fn accept(&self) -> io::Result<(Detached, SourceAddress, Option<Peer>)> {
        match &self.listener {
            Listener::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let credentials = stream.peer_cred()?;
                let pid = credentials.pid();
                let peer = Peer { uid: credentials.uid(), gid: credentials.gid(), pid };
                Ok((Detached::Unix(stream.into_std()?), SourceAddress::Unix { pid }, Some(peer)))
            }
            Listener::Tcp(listener) | Listener::Tls(listener, _) => {
                let (stream, address) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok((Detached::Tcp(stream.into_std()?), SourceAddress::Tcp(address), None))
            }
        }
    }
}

/// A listener at work.
struct Incoming {
    bound: Bound,
    places: Places,
    complaints: Arc<Complaints>,
}

impl Incoming {
    async fn next(&mut self) -> Accepted {
        loop {
            match self.bound.accept().await {
                Ok((socket, source, peer)) => {
                    if let Some(accepted) = self.admit(socket, source, peer) {
                        return accepted;
                    }
                }
                // Out of file descriptors, or a peer that went before it was accepted: the listener lives on, but not
                // in a circle without a pause.
                Err(error) => {
                    self.complaints.accept.say(|suppressed| {
                        tracing::warn!(%error, suppressed, "accept failed");
                    });
                    pause().await;
                }
            }
        }
    }

    /// Gives a connection its place, before anything is read from it.
    fn admit(&self, socket: Detached, source: SourceAddress, peer: Option<Peer>) -> Option<Accepted> {
        match self.places.take(&source, peer) {
            Ok(place) => {
                let (tls, complaints) = (self.bound.tls().cloned(), Arc::clone(&self.complaints));
                Some(Accepted { socket, source, peer, place, tls, complaints })
            }
            Err(full) => {
                self.complaints.place.say(|suppressed| {
                    tracing::warn!(%source, suppressed, "connection refused: {full}");
                });
                None
            }
        }
    }
}

/// A connection that has its place, and has said nothing yet. It belongs to no runtime.
pub(in crate::server) struct Accepted {
    socket: Detached,
    source: SourceAddress,
    peer: Option<Peer>,
    place: Place,
    tls: Option<Arc<Tls>>,
    complaints: Arc<Complaints>,
}

/// A socket that no runtime watches.
enum Detached {
    Unix(std::os::unix::net::UnixStream),
    Tcp(std::net::TcpStream),
}

impl Accepted {
    /// The connection, after its handshake where it has one, on the runtime that asks; `None`, which was complained of,
    /// where there is none.
    pub(in crate::server) async fn begin(self) -> Option<Connection> {
        let Self { socket, source, peer, place, tls, complaints } = self;
        let admitted = Admitted::new(source.clone(), peer, place);
        let begun = async {
            Ok(match (socket, tls) {
                (Detached::Unix(stream), _) => {
                    Connection::new(Socket::Unix(UnixStream::from_std(stream)?), admitted)
                }
                (Detached::Tcp(stream), None) => {
                    Connection::new(Socket::Tcp(TcpStream::from_std(stream)?), admitted)
                }
                (Detached::Tcp(stream), Some(tls)) => {
                    let secured = tls.accept(TcpStream::from_std(stream)?).await?;
                    let admitted = admitted.shaken(secured.certificate());
                    Connection::new(Socket::Tls(Box::new(secured)), admitted)
                }
            })
        };
        let begun: io::Result<Connection> = begun.await;
        begun
            .inspect_err(|error| {
                complaints.handshake.say(|suppressed| {
                    tracing::warn!(%source, %error, suppressed, "TLS handshake failed");
                });
            })
            .ok()
    }
}

/// What a listener warns of.
#[derive(Default)]
struct Complaints {
    accept: Complaint,
    place: Complaint,
    handshake: Complaint,
}

/// A warning that repeats is said with its 1st, 10th, 100th … occurrence.
#[derive(Default)]
struct Complaint {
    /// How often there was reason to, and from which time on it is said again.
    times: Mutex<(u64, u64)>,
}

impl Complaint {
    fn say(&self, say: impl FnOnce(u64)) {
        let mut counted = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let (times, next) = &mut *counted;
        *times += 1;
        if *times > *next {
            let suppressed = *times - 1;
            *next = times.saturating_mul(10).saturating_sub(1);
            drop(counted);
            say(suppressed);
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
    Ok(Bound { listener: Listener::Unix(listener), address, socket })
}

async fn bind_tcp(address: SocketAddr) -> Result<Bound, ServerError> {
    if !address.ip().is_loopback() {
        let problem = "is not a loopback address, and without TLS secrets would cross the network in the clear; use 127.0.0.1 or [::1], or `tls`";
        return Err(ServerError::Listen { address: address.to_string(), problem: problem.to_owned() });
    }
    let (listener, taken) = listen_tcp(address).await?;
    Ok(Bound { listener: Listener::Tcp(listener), address: format!("http://{taken}"), socket: None })
}

async fn bind_tls(settings: &Settings, clock: SharedClock) -> Result<Bound, ServerError> {
    let tls = Tls::load(settings.clone(), clock)?;
    let (listener, taken) = listen_tcp(settings.address).await?;
    Ok(Bound { listener: Listener::Tls(listener, tls), address: format!("https://{taken}"), socket: None })
}

/// The listener, and the address with the port really taken.
async fn listen_tcp(address: SocketAddr) -> Result<(TcpListener, SocketAddr), ServerError> {
    let refuse =
        |error: io::Error| ServerError::Listen { address: address.to_string(), problem: error.to_string() };
    let listener = TcpListener::bind(address).await.map_err(refuse)?;
    let taken = listener.local_addr().map_err(refuse)?;
    Ok((listener, taken))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt as _;

    #[tokio::test]
    async fn a_stalesocket_is_replaced_and_a_live_one_is_not() {
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
    async fn what_is_not_asocket_is_left_alone() {
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
        assert!(local.tls().is_none());
    }

    #[test]
    fn a_listener_can_be_driven_by_a_runtime_that_did_not_open_it() {
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (opener, driver) = (runtime(), runtime());
        let bound = opener.block_on(Listen::Tcp("127.0.0.1:0".parse().unwrap()).bind()).unwrap();
        let address = bound.address().strip_prefix("http://").unwrap().to_owned();
        // The opener's reactor has to turn for its listener; its tasks and its timers are not asked for.
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let turning = std::thread::spawn(move || opener.block_on(stopped).is_err());
        let _client = std::net::TcpStream::connect(address).unwrap();
        let places = Places::new(&crate::server::Limits::default());
        let mut incoming = Box::pin(bound.incoming(places));
        let first = driver.block_on(async { incoming.next().await.unwrap().begin().await.unwrap() });
        assert!(matches!(first.info().source, SourceAddress::Tcp(_)));
        drop((first, incoming, stop));
        assert!(turning.join().unwrap());
    }

    #[test]
    fn a_complaint_that_repeats_is_said_less_and_less() {
        let (complaint, mut said) = (Complaint::default(), Vec::new());
        (1..=1_000).for_each(|_| complaint.say(|suppressed| said.push(suppressed)));
        assert_eq!(said, [0, 9, 99, 999]);
    }
}
