//! TLS 1.3, with or without certificates of clients.
//!
//! ```text
//! files ─┬▶ own pair (who may write it? does it fit? is it valid?) ──▶ taken or kept out ─┬▶ Material, swapped in
//!        └▶ authorities (who may write them? which have not expired?) ▶ taken or kept out ┘      │
//!                ▲                                                                               │
//!                └── looked at again as time goes by ◀───────────────────────────────────────────┤
//! accept ─▶ handshake ─▶ registered ─▶ chain verified against what is in force now ◀─────────────┤
//!                             ▲                                                                  │
//!                             └── each live chain verified again; who fails is dropped ──────────┘
//! ```
//!
//! INVARIANT: no connection outlives the trust in its client's certificate by more than a minute, and none that
//! begins after a change of the authorities is judged by the old ones. A connection registers before its last check,
//! and a change is in force before the live ones are looked through, so one of the two looks sees the other.
//! Sessions are resumed only under the material that they began with: each has ticket keys of its own.
//!
//! Revocation lists are not read: an authority that must not be trusted any more is taken out of the bundle, and
//! clients' certificates are meant to be short-lived.

mod expiry;
mod files;
#[cfg(test)]
mod fixtures;
mod live;
mod material;
mod part;
mod reload;
mod trust;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
use material::{Material, Pair};
use part::{Look, Part};
use trust::Trust;

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
    /// Held while files are read and what is in force is replaced, so that an older read never replaces a newer one.
    reading: Mutex<()>,
    own: Part,
    authorities: Part,
}

impl Tls {
    /// Reads and checks the files.
    ///
    /// # Errors
    /// [`TlsError`]: also where a certificate is not valid at this time.
    pub fn load(settings: Settings, clock: SharedClock) -> Result<Arc<Self>, TlsError> {
        let now = clock.now();
        let pair = Arc::new(Pair::check(&settings, &Pair::read(&settings)?, now)?);
        let check = |path: &Path| Trust::check(path, settings.clients, &Trust::read(path)?, now);
        let trust = settings.client_ca.as_deref().map(check).transpose()?.map(Arc::new);
        trust.iter().for_each(|trust| trust.say_warnings());
        let material = Material::new(pair, trust, &settings, &clock)?;
        Ok(Arc::new(Self {
            settings,
            clock,
            present: ArcSwap::from_pointee(material),
            live: Arc::default(),
            notices: Mutex::default(),
            reading: Mutex::default(),
            own: Part::new("server"),
            authorities: Part::new("client_ca"),
        }))
    }

    /// Reads the files again. The pair of certificate and key is judged by itself, and so are the authorities. What is
    /// valid comes into force for new connections, and live ones whose client is no longer trusted are closed; what is
    /// not is logged, counted and kept out. Blocks on the files.
    ///
    /// # Errors
    /// [`TlsError`]: of what was refused the last valid one stays in force, and what was not is in force.
    pub fn reload(&self, cause: &str) -> Result<(), TlsError> {
        self.look_again(Look { cause, asked: true })
    }

    /// As [`reload`](Self::reload), where the files are not those in force. The same refusal is said once.
    fn reload_if_changed(&self, cause: &str) -> Result<(), TlsError> {
        self.look_again(Look { cause, asked: false })
    }

    fn look_again(&self, look: Look<'_>) -> Result<(), TlsError> {
        let _one_at_a_time = self.one_at_a_time();
        let (present, now, settings) = (self.present.load_full(), self.clock.now(), &self.settings);
        let pair = self.own.judge(look, Pair::read(settings), &present.pair.digest, |files| {
            Pair::check(settings, files, now)
        });
        let trust = match (&settings.client_ca, &present.trust) {
            (Some(path), Some(trust)) => {
                self.authorities.judge(look, Trust::read(path), &trust.digest, |files| {
                    Trust::check(path, settings.clients, files, now)
                })
            }
            _ => Ok(None),
        };
        let (pair, pair_refused) = apart(pair);
        let (trust, trust_refused) = apart(trust);
        self.take(look.cause, &present, pair, trust)?;
        pair_refused.or(trust_refused).map_or(Ok(()), Err)
    }

    /// Puts in force what is new.
    fn take(
        &self,
        cause: &str,
        present: &Material,
        pair: Option<Pair>,
        trust: Option<Trust>,
    ) -> Result<(), TlsError> {
        let (server, client_ca) = (pair.is_some(), trust.is_some());
        if !server && !client_ca {
            return Ok(());
        }
        let closed = self.replace(present, pair, trust)?;
        if server {
            self.own.took();
        }
        if client_ca {
            self.authorities.took();
        }
        tracing::info!(cause, server, client_ca, closed, "certificates reloaded");
        Ok(())
    }

    /// Replaces what there is anew, closes the connections that are no longer trusted, and gives their number.
    fn replace(
        &self,
        present: &Material,
        pair: Option<Pair>,
        trust: Option<Trust>,
    ) -> Result<usize, TlsError> {
        trust.iter().for_each(Trust::say_warnings);
        let pair = pair.map_or_else(|| Arc::clone(&present.pair), Arc::new);
        let trust = trust.map(Arc::new).or_else(|| present.trust.clone());
        let material = Material::new(pair, trust, &self.settings, &self.clock)
            .inspect_err(|error| tracing::error!(%error, "certificates not replaced"))?;
        self.present.store(Arc::new(material));
        Ok(self.close_untrusted())
    }

    /// Verifies each live chain against the authorities in force.
    fn close_untrusted(&self) -> usize {
        let (material, now) = (self.present.load_full(), self.clock.now());
        self.live.end_unless(|watched| material.trusts(&watched.chain, now))
    }

    /// Closes connections whose client's certificate has expired, stops trusting authorities that have, and warns of
    /// own certificates that soon do. To be called at least each minute; [`keep_fresh`](Self::keep_fresh) does.
    pub fn sweep(&self) {
        self.sweep_authorities();
        let (material, now) = (self.present.load_full(), self.clock.now());
        // What no date has passed in was verified before. What else the client sent along may be out of date without
        // harm, so a passed date is only a reason to look.
        let ended =
            self.live.end_unless(|watched| now <= watched.soonest || material.trusts(&watched.chain, now));
        if ended > 0 {
            tracing::info!(closed = ended, "connections closed: their clients' certificates have expired");
        }
        self.notices.lock().unwrap_or_else(PoisonError::into_inner).say(&material.expiries(), now);
    }

    fn sweep_authorities(&self) {
        let _one_at_a_time = self.one_at_a_time();
        let present = self.present.load_full();
        let Some(changed) = present.trust.as_ref().and_then(|trust| trust.at(self.clock.now())) else {
            return;
        };
        match changed.and_then(|trust| self.replace(&present, None, Some(trust))) {
            Ok(closed) => tracing::warn!(closed, "which authorities for clients count has changed with time"),
            Err(error) => tracing::error!(%error, "an authority that has expired is still trusted"),
        }
    }

    fn one_at_a_time(&self) -> MutexGuard<'_, ()> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When what is in force expires: `server` for the broker's own chain, `client_ca` for the first of the
    /// authorities for clients that count; where none does any more, the last that did.
    #[must_use]
    pub fn expiries(&self) -> Vec<(String, Timestamp)> {
        let expiries = self.present.load().expiries();
        expiries.into_iter().map(|(name, not_after)| (name.to_owned(), not_after)).collect()
    }

    /// How often either part of the files was read again: taken, and kept out.
    #[must_use]
    pub fn reloads(&self) -> (u64, u64) {
        let parts = self.reloads_by_part().into_iter();
        parts.fold((0, 0), |(ok, failed), (_, taken, kept_out)| (ok + taken, failed + kept_out))
    }

    /// The same for each part, under the names that [`expiries`](Self::expiries) has for them.
    #[must_use]
    pub fn reloads_by_part(&self) -> [(&'static str, u64, u64); 2] {
        [self.own.figures(), self.authorities.figures()]
    }

    /// Whether files that lie there now were refused, so that older ones are in force.
    #[must_use]
    pub fn is_refusing(&self) -> bool {
        self.own.is_refusing() || self.authorities.is_refusing()
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

/// What there is to take, and why there is not.
fn apart<T>(judged: Result<Option<T>, TlsError>) -> (Option<T>, Option<TlsError>) {
    match judged {
        Ok(found) => (found, None),
        Err(error) => (None, Some(error)),
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("settings", &self.settings).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::fixtures::{Folder, Issuer, pair, year};
    use super::*;
    use crate::clock::ManualClock;

    /// A listener on these files, in 2026.
    fn load(folder: &Folder) -> (Arc<Tls>, Arc<ManualClock>) {
        let clock = ManualClock::new(year(2026));
        (Tls::load(folder.settings.clone(), clock.clone()).unwrap(), clock)
    }

    impl Tls {
        fn trusts(&self, issuer: &Issuer) -> bool {
            self.present.load().trusts(&issuer.client(), self.clock.now())
        }

        fn figures(&self) -> [(u64, u64); 2] {
            self.reloads_by_part().map(|(_, taken, kept_out)| (taken, kept_out))
        }
    }

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
    #[test]
    fn b24_distrust_does_not_wait_for_a_pair_that_is_refused() {
        let (folder, old, new) = (Folder::new(), Issuer::until(2030), Issuer::until(2030));
        folder.write("ca.crt", 0o644, &old.pem());
        let (tls, _) = load(&folder);
        let live = tls.live.watch(old.client());
        let expired = || folder.pair(2020, 2025);
        let foreign = || folder.write("tls.key", 0o600, &pair(2025, 2027).1);
        let gone = || std::fs::remove_file(folder.path("tls.crt")).unwrap();
        let breaks: [&dyn Fn(); 3] = [&expired, &foreign, &gone];
        for (break_pair, kept_out) in breaks.into_iter().zip(1..) {
            break_pair();
            tls.reload_if_changed("test").unwrap_err();
            assert_eq!(tls.figures(), [(0, kept_out), (0, 0)]);
        }
        assert!(tls.trusts(&old) && !live.is_ended());
        folder.write("ca.crt", 0o644, &new.pem());
        tls.reload_if_changed("test").unwrap_err();
        assert!(live.is_ended() && !tls.trusts(&old) && tls.trusts(&new));
        assert_eq!((tls.figures(), tls.reloads()), ([(0, 3), (1, 0)], (1, 3)));
    }

    #[test]
    fn b24_a_renewal_does_not_wait_for_authorities_that_are_refused() {
        let (folder, authority) = (Folder::new(), Issuer::until(2030));
        folder.write("ca.crt", 0o644, &authority.pem());
        let (tls, _) = load(&folder);
        folder.write("ca.crt", 0o666, &Issuer::until(2030).pem());
        folder.pair(2025, 2029);
        assert!(tls.reload_if_changed("test").unwrap_err().to_string().contains("ca.crt"));
        assert_eq!(tls.figures(), [(1, 0), (0, 1)]);
        assert!(tls.trusts(&authority));
        assert_eq!(tls.expiries()[0], ("server".to_owned(), year(2029)));
    }

    #[test]
    fn a_refusal_is_said_once_and_judged_as_long_as_it_is_there() {
        let folder = Folder::new();
        let (tls, clock) = load(&folder);
        let good = ["tls.crt", "tls.key"].map(|name| std::fs::read_to_string(folder.path(name)).unwrap());
        folder.pair(2027, 2029);
        for _ in 0..3 {
            tls.reload_if_changed("test").unwrap_err();
        }
        assert_eq!(tls.figures(), [(0, 1), (0, 0)]);
        tls.reload("test").unwrap_err();
        assert_eq!(tls.figures(), [(0, 2), (1, 0)], "who asks is told");
        folder.pair(2028, 2029);
        tls.reload_if_changed("test").unwrap_err();
        assert_eq!(tls.figures(), [(0, 3), (1, 0)], "another one is another");
        let refused = ["tls.crt", "tls.key"].map(|name| std::fs::read_to_string(folder.path(name)).unwrap());
        let write = |[certificate, key]: &[String; 2]| {
            folder.write("tls.crt", 0o644, certificate);
            folder.write("tls.key", 0o600, key);
        };
        write(&good);
        tls.reload_if_changed("test").unwrap();
        write(&refused);
        tls.reload_if_changed("test").unwrap_err();
        assert_eq!(tls.figures(), [(0, 4), (1, 0)], "it came anew");
        clock.set_wall(year(2028));
        tls.reload_if_changed("test").unwrap();
        assert_eq!(tls.figures(), [(1, 4), (1, 0)], "what was not valid yet is taken once it is");
    }

    #[test]
    fn an_authority_that_expires_is_no_longer_trusted_though_no_file_changes() {
        let (folder, first, second) = (Folder::new(), Issuer::until(2027), Issuer::until(2029));
        folder.pair(2025, 2040);
        folder.write("ca.crt", 0o644, &format!("{}{}", first.pem(), second.pem()));
        let (tls, clock) = load(&folder);
        let (goes, stays) = (tls.live.watch(first.client()), tls.live.watch(second.client()));
        tls.sweep();
        assert!(!goes.is_ended());
        assert_eq!(tls.expiries()[1], ("client_ca".to_owned(), year(2027)));

        clock.set_wall(year(2028));
        tls.sweep();
        assert!(goes.is_ended() && !stays.is_ended());
        assert!(!tls.trusts(&first) && tls.trusts(&second));
        assert_eq!(tls.expiries()[1].1, year(2029));

        clock.set_wall(year(2030));
        tls.sweep();
        assert!(stays.is_ended() && !tls.trusts(&second), "nobody is left");
        tls.reload_if_changed("test").unwrap();
        tls.reload("test").unwrap_err();
        assert!(!tls.trusts(&second));

        let third = Issuer::until(2035);
        folder.write("ca.crt", 0o644, &third.pem());
        tls.reload_if_changed("test").unwrap();
        assert!(tls.trusts(&third));
    }
}
