//! TLS 1.3, with or without certificates of clients.
//!
//! ```text
//! files ─▶ Files (who may write them?) ─▶ Material (do they fit? are they valid?) ─▶ swapped in whole, or kept out
//!                                                                                      │
//! accept ─▶ handshake ─▶ registered ─▶ chain verified against what is in force now ◀───┤
//!                             ▲                                                        │
//!                             └── each live chain verified again; who fails is dropped ┘
//! ```
//!
//! INVARIANT: no connection outlives the trust in its client's certificate by more than a minute, and none that
//! begins after a change of the authorities is judged by the old ones. A connection registers before its last check,
//! and a change is in force before the live ones are looked through, so one of the two looks sees the other.
//! Sessions are resumed only under the files that they began with: each load has ticket keys of its own.
//!
//! Revocation lists are not read: an authority that must not be trusted any more is taken out of the bundle, and
//! clients' certificates are meant to be short-lived.

mod expiry;
mod live;
mod material;
mod reload;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use jiff::Timestamp;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use crate::clock::SharedClock;
use crate::error::{Reason, Reasoned};
use crate::identity::mtls::ClientCertificate;

use expiry::Notices;
use live::Live;
use material::{Files, Material};

pub(in crate::server) use live::Secured;

/// How long a handshake may take.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);

/// `[listen] tls`, as written.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// An IP address and a port.
    pub address: String,
    /// The certificate and what links it to a root, PEM, the broker's own first.
    pub certificate: PathBuf,
    /// Its private key: PEM, PKCS#8, SEC1 or PKCS#1, not encrypted.
    pub key: PathBuf,
    /// The authorities that clients' certificates are trusted by, PEM. Without it, none is asked for.
    pub client_ca: Option<PathBuf>,
    /// Whether a client must present a certificate. Only with `client_ca`.
    pub clients: Option<Clients>,
}

/// Whether a client must present a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clients {
    /// No certificate, no connection.
    #[default]
    Required,
    /// A client may also present a token instead. A certificate that is presented must be trusted all the same.
    Optional,
}

impl Config {
    /// Checks what can be checked without I/O.
    ///
    /// # Errors
    /// The key, and a line on what is wrong with it and the mend.
    pub fn resolve(self) -> Result<Settings, (&'static str, String)> {
        let address: SocketAddr = self.address.parse().map_err(|_| {
            let given = self.address.escape_default();
            (
                "address",
                format!("must be an IP address and a port, for example \"0.0.0.0:7341\", not `{given}`"),
            )
        })?;
        if self.client_ca.is_none() && self.clients.is_some() {
            return Err(("clients", "counts only beside client_ca; set that too".to_owned()));
        }
        Ok(Settings {
            address,
            certificate: self.certificate,
            key: self.key,
            client_ca: self.client_ca,
            clients: self.clients.unwrap_or_default(),
        })
    }
}

/// A TLS listener, checked and complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Where to listen; any address, and port 0 for a free one.
    pub address: SocketAddr,
    /// The file of the certificate chain.
    pub certificate: PathBuf,
    /// The file of the private key.
    pub key: PathBuf,
    /// The file of the authorities for clients.
    pub client_ca: Option<PathBuf>,
    /// Whether a client must present a certificate, where there are authorities.
    pub clients: Clients,
}

impl Settings {
    fn files(&self) -> impl Iterator<Item = &Path> {
        [&self.certificate, &self.key].into_iter().chain(&self.client_ca).map(PathBuf::as_path)
    }
}

/// Why a certificate, a key or the authorities can't be used. Nothing of the key is in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {path}: {problem}")]
pub struct TlsError {
    what: &'static str,
    path: String,
    problem: String,
}

impl TlsError {
    fn new(what: &'static str, path: &Path, problem: impl Into<String>) -> Self {
        let path = path.to_string_lossy().escape_debug().to_string();
        Self { what, path, problem: problem.into() }
    }
}

impl Reasoned for TlsError {
    fn reason(&self) -> Reason {
        Reason::InvalidCertificate
    }
}

/// The certificate, key and authorities that are in force, and the connections that stand on them.
pub struct Tls {
    settings: Settings,
    clock: SharedClock,
    present: ArcSwap<Material>,
    live: Arc<Live>,
    notices: Mutex<Notices>,
    /// Held while files are read, so that an older read never replaces a newer one.
    reading: Mutex<()>,
    reloaded: AtomicU64,
    kept_out: AtomicU64,
}

impl Tls {
    /// Reads and checks the files.
    ///
    /// # Errors
    /// [`TlsError`]: also where a certificate is not valid at this time.
    pub fn load(settings: Settings, clock: SharedClock) -> Result<Arc<Self>, TlsError> {
        let material = Material::new(&settings, &Files::read(&settings)?, &clock)?;
        material.say_warnings();
        Ok(Arc::new(Self {
            settings,
            clock,
            present: ArcSwap::from_pointee(material),
            live: Arc::default(),
            notices: Mutex::default(),
            reading: Mutex::default(),
            reloaded: AtomicU64::new(0),
            kept_out: AtomicU64::new(0),
        }))
    }

    /// Reads the files again. What is valid comes into force for new connections, and live ones whose client is no
    /// longer trusted are closed; what is not is logged, counted and kept out. Blocks on the files.
    ///
    /// # Errors
    /// [`TlsError`]: the last valid ones stay in force.
    pub fn reload(&self, cause: &str) -> Result<(), TlsError> {
        let _one_at_a_time = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        self.replace(cause, Files::read(&self.settings))
    }

    /// As [`reload`](Self::reload), where the files are not those in force.
    fn reload_if_changed(&self, cause: &str) -> Result<(), TlsError> {
        let _one_at_a_time = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        match Files::read(&self.settings) {
            Ok(files) if files.digest() == self.present.load().digest => Ok(()),
            files => self.replace(cause, files),
        }
    }

    fn replace(&self, cause: &str, files: Result<Files, TlsError>) -> Result<(), TlsError> {
        match files.and_then(|files| Material::new(&self.settings, &files, &self.clock)) {
            Ok(material) => {
                material.say_warnings();
                self.present.store(Arc::new(material));
                self.reloaded.fetch_add(1, Ordering::Relaxed);
                let closed = self.close_untrusted();
                tracing::info!(cause, closed, "certificates reloaded");
                Ok(())
            }
            Err(error) => {
                self.kept_out.fetch_add(1, Ordering::Relaxed);
                tracing::error!(%error, cause, "certificates not reloaded; the last valid ones stay in force");
                Err(error)
            }
        }
    }

    /// Verifies each live chain against the authorities in force.
    fn close_untrusted(&self) -> usize {
        let (material, now) = (self.present.load_full(), self.clock.now());
        self.live.end_unless(|watched| material.trusts(&watched.chain, now))
    }

    /// Closes connections whose client's certificate has expired, and warns of own certificates that soon do. To be
    /// called at least each minute; [`keep_fresh`](Self::keep_fresh) does.
    pub fn sweep(&self) {
        let (material, now) = (self.present.load_full(), self.clock.now());
        // What no date has passed in was verified before. What else the client sent along may be out of date without
        // harm, so a passed date is only a reason to look.
        let ended =
            self.live.end_unless(|watched| now <= watched.soonest || material.trusts(&watched.chain, now));
        if ended > 0 {
            tracing::info!(closed = ended, "connections closed: their clients' certificates have expired");
        }
        self.notices.lock().unwrap_or_else(PoisonError::into_inner).say(&material.expiries, now);
    }

    /// When what is in force expires: `server` for the broker's own chain, `client_ca` for the first of the
    /// authorities for clients.
    #[must_use]
    pub fn expiries(&self) -> Vec<(String, Timestamp)> {
        let material = self.present.load();
        material.expiries.iter().map(|(name, not_after)| ((*name).to_owned(), *not_after)).collect()
    }

    /// How often files were read again: taken, and kept out.
    #[must_use]
    pub fn reloads(&self) -> (u64, u64) {
        (self.reloaded.load(Ordering::Relaxed), self.kept_out.load(Ordering::Relaxed))
    }

    /// How many live connections stand on a client's certificate.
    #[must_use]
    pub fn certified_connections(&self) -> usize {
        self.live.len()
    }

    /// The handshake, within [`HANDSHAKE_WITHIN`].
    pub(in crate::server) async fn accept(&self, stream: TcpStream) -> io::Result<Secured> {
        let acceptor = TlsAcceptor::from(Arc::clone(&self.present.load().server));
        let shaken = tokio::time::timeout(HANDSHAKE_WITHIN, acceptor.accept(stream)).await;
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long");
        let stream = shaken.map_err(late)??;
        let Some(chain) = stream.get_ref().1.peer_certificates().map(<[_]>::to_vec) else {
            return Ok(Secured::anonymous(stream));
        };
        let leaf = chain.first().map(|leaf| ClientCertificate::parse(leaf)).transpose();
        let certificate = leaf.map_err(io::Error::other)?.map(Arc::new);
        let secured = Secured::certified(stream, self.live.watch(chain), certificate);
        // A resumed session was verified when it began, and any handshake may have begun before the last reload.
        match secured.chain().is_some_and(|chain| self.present.load().trusts(chain, self.clock.now())) {
            true => Ok(secured),
            false => Err(io::Error::other("the client's certificate is no longer trusted")),
        }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("settings", &self.settings).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Result<Settings, String> {
        let config: Config = toml::from_str(text).map_err(|error| error.to_string())?;
        config.resolve().map_err(|(key, problem)| format!("{key}: {problem}"))
    }

    #[test]
    fn clients_must_present_a_certificate_where_there_are_authorities() {
        let base = "address = '0.0.0.0:7341'\ncertificate = 'c'\nkey = 'k'\n";
        assert_eq!(config(base).unwrap().client_ca, None);
        let mutual = format!("{base}client_ca = 'ca'\n");
        assert_eq!(config(&mutual).unwrap().clients, Clients::Required);
        assert_eq!(config(&format!("{mutual}clients = 'optional'")).unwrap().clients, Clients::Optional);
        assert!(config(&format!("{base}clients = 'optional'")).unwrap_err().contains("client_ca"));
        assert!(config(&format!("{mutual}clients = 'some'")).is_err());
        assert!(config(&format!("{base}ca = 'ca'")).is_err());
        assert!(config(&base.replace("0.0.0.0:7341", "localhost")).unwrap_err().contains("IP address"));
    }
}
