//! What the files hold: read with an eye on who may write them, and checked before any of it is used.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use ring::digest;
use rustix::fs::{Mode, OFlags};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::time_provider::TimeProvider;
use rustls::{InconsistentKeys, RootCertStore, ServerConfig};
use x509_parser::parse_x509_certificate;
use zeroize::Zeroizing;

use super::{Clients, Settings, TlsError};
use crate::clock::SharedClock;
use crate::identity::mtls::instant;

const CERTIFICATE: &str = "certificate";
const KEY: &str = "private key";
const CLIENT_CA: &str = "client CA bundle";

/// The largest file that is read: a bundle of a few hundred authorities.
const LARGEST: u64 = 1024 * 1024;

/// The files, as they are.
pub(super) struct Files {
    certificate: Zeroizing<Vec<u8>>,
    key: Zeroizing<Vec<u8>>,
    client_ca: Option<Zeroizing<Vec<u8>>>,
}

impl Files {
    pub(super) fn read(settings: &Settings) -> Result<Self, TlsError> {
        let client_ca = settings.client_ca.as_deref();
        Ok(Self {
            certificate: read(CERTIFICATE, &settings.certificate, public_problem)?,
            key: read(KEY, &settings.key, key_problem)?,
            client_ca: client_ca.map(|path| read(CLIENT_CA, path, public_problem)).transpose()?,
        })
    }

    /// Tells one set of files from another.
    pub(super) fn digest(&self) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        for file in [&self.certificate, &self.key].into_iter().chain(&self.client_ca) {
            context.update(&u64::try_from(file.len()).unwrap_or(u64::MAX).to_be_bytes());
            context.update(file);
        }
        let mut digest = [0; 32];
        digest.iter_mut().zip(context.finish().as_ref()).for_each(|(to, from)| *to = *from);
        digest
    }
}

/// Reads a file whose owner and mode `problem` finds nothing wrong with. Symbolic links are followed, because that is
/// how Kubernetes and certbot replace certificates; what is looked at is the open file.
fn read(
    what: &'static str,
    path: &Path,
    problem: fn(owner: u32, mode: u32) -> Option<String>,
) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    let refuse = |problem: String| TlsError::new(what, path, problem);
    // Without O_NONBLOCK the open of a FIFO would wait for a writer; without O_NOCTTY that of a terminal would adopt it.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|error| refuse(format!("can't be opened: {}", io::Error::from(error))))?;
    let file = File::from(file);
    let found = file.metadata().map_err(|error| refuse(format!("can't be read: {error}")))?;
    if !found.is_file() {
        return Err(refuse("is not a regular file; correct the path".to_owned()));
    }
    if found.len() > LARGEST {
        return Err(refuse(format!("holds more than {LARGEST} bytes; correct the path")));
    }
    if let Some(problem) = problem(found.uid(), found.mode() & 0o7777) {
        return Err(refuse(problem));
    }
    // Room for all of it at once: a buffer that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(found.len() + 1).unwrap_or(0)));
    file.take(LARGEST).read_to_end(&mut bytes).map_err(|error| refuse(format!("can't be read: {error}")))?;
    Ok(bytes)
}

/// A key is its owner's alone. Where root owns it, one group may read it too: so do Kubernetes (`fsGroup`), Debian
/// (`ssl-cert`) and systemd hand a key to a service.
fn key_problem(owner: u32, mode: u32) -> Option<String> {
    let ours = rustix::process::geteuid().as_raw();
    let permitted = if owner == 0 { 0o640 } else { 0o600 };
    if owner != ours && owner != 0 {
        Some(format!(
            "is owned by uid {owner}, but must be owned by uid {ours} or by root; run `chown` on it"
        ))
    } else if mode & !permitted != 0 {
        Some(format!(
            "has mode {mode:04o}, but a key is for its owner alone, or root's and readable by one group; run `chmod \
             0600` on it, or in Kubernetes set `defaultMode: 0440` and an `fsGroup`"
        ))
    } else {
        None
    }
}

/// Whoever may write the authorities decides who is trusted.
fn public_problem(_: u32, mode: u32) -> Option<String> {
    (mode & 0o002 != 0).then(|| format!("has mode {mode:04o}: anyone may write it; run `chmod o-w` on it"))
}

/// What connections are made with.
pub(super) struct Material {
    pub(super) server: Arc<ServerConfig>,
    pub(super) digest: [u8; 32],
    /// `server` for the chain, `client_ca` for the first of the authorities that expires.
    pub(super) expiries: Vec<(&'static str, Timestamp)>,
    pub(super) warnings: Vec<String>,
    clients: Option<Arc<dyn ClientCertVerifier>>,
}

impl Material {
    pub(super) fn new(settings: &Settings, files: &Files, clock: &SharedClock) -> Result<Self, TlsError> {
        let now = clock.now();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let (chain, not_after) = chain(&settings.certificate, &files.certificate, now)?;
        let key = certified(settings, chain, &files.key)?;
        let authorities = match (&settings.client_ca, &files.client_ca) {
            (Some(path), Some(bytes)) => Some((path, authorities(path, bytes, now)?)),
            _ => None,
        };
        let (mut expiries, mut warnings, mut clients) = (vec![("server", not_after)], Vec::new(), None);
        if let Some((path, authorities)) = authorities {
            expiries.push(("client_ca", authorities.soonest));
            warnings.extend(authorities.warnings);
            clients = Some(verifier(path, authorities.roots, settings.clients, &provider)?);
        }
        let server = server(key, clients.clone(), provider, Arc::clone(clock))
            .map_err(|error| TlsError::new(CERTIFICATE, &settings.certificate, error.to_string()))?;
        Ok(Self { server: Arc::new(server), digest: files.digest(), expiries, warnings, clients })
    }

    /// Whether what a client presented is trusted at this time.
    pub(super) fn trusts(&self, chain: &[CertificateDer<'static>], now: Timestamp) -> bool {
        let (Some(verifier), Some((leaf, others))) = (&self.clients, chain.split_first()) else {
            return false;
        };
        verifier.verify_client_cert(leaf, others, unix_time(now)).is_ok()
    }

    pub(super) fn say_warnings(&self) {
        self.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    }
}

fn certificates(
    what: &'static str,
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err(TlsError::new(what, path, "holds no certificate in PEM")),
        Ok(found) => Ok(found),
        Err(_) => Err(TlsError::new(what, path, "is not whole PEM; write the file anew, and then rename it")),
    }
}

/// From when until when a certificate is valid.
fn validity(der: &CertificateDer<'_>) -> Option<(Timestamp, Timestamp)> {
    let (_, certificate) = parse_x509_certificate(der).ok()?;
    let validity = certificate.validity();
    Some((instant(validity.not_before), instant(validity.not_after)))
}

/// The broker's own chain, every certificate of it valid now, and the first end of one.
fn chain(
    path: &Path,
    pem: &[u8],
    now: Timestamp,
) -> Result<(Vec<CertificateDer<'static>>, Timestamp), TlsError> {
    let chain = certificates(CERTIFICATE, path, pem)?;
    let mut soonest = Timestamp::MAX;
    for (der, position) in chain.iter().zip(1_u32..) {
        let refuse = |problem: String| TlsError::new(CERTIFICATE, path, problem);
        let (from, until) = validity(der)
            .ok_or_else(|| refuse(format!("certificate {position} in it can't be read as X.509")))?;
        if now < from {
            let problem = format!("certificate {position} in it is not valid before {from}; check the clock");
            return Err(refuse(problem));
        }
        if now > until {
            return Err(refuse(format!("certificate {position} in it expired on {until}; have it renewed")));
        }
        soonest = soonest.min(until);
    }
    Ok((chain, soonest))
}

/// The chain with its key. What the PEM reader and the cipher say of a key is not passed on: it may quote it.
fn certified(
    settings: &Settings,
    chain: Vec<CertificateDer<'static>>,
    pem: &[u8],
) -> Result<CertifiedKey, TlsError> {
    let refuse = |problem: &str| TlsError::new(KEY, &settings.key, problem);
    let key = PrivateKeyDer::from_pem_slice(pem).map(Zeroizing::new).map_err(|_| {
        refuse("holds no private key in PEM; it must be PKCS#8, SEC1 or PKCS#1, whole and not encrypted")
    })?;
    let key = rustls::crypto::ring::sign::any_supported_type(&key).map_err(|_| {
        refuse("is of no kind that is supported: ECDSA on P-256 or P-384, Ed25519, RSA from 2048 bits")
    })?;
    let certified = CertifiedKey::new(chain, key);
    match certified.keys_match() {
        Ok(()) => Ok(certified),
        Err(rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {
            let certificate = settings.certificate.display();
            Err(refuse(&format!("is not the key of the certificate in {certificate}; replace both together")))
        }
        Err(error) => {
            Err(TlsError::new(CERTIFICATE, &settings.certificate, format!("can't be used: {error}")))
        }
    }
}

struct Authorities {
    roots: RootCertStore,
    soonest: Timestamp,
    warnings: Vec<String>,
}

/// The authorities for clients. One that has expired is left out, though verification would not ask: a root's own end
/// is no part of a path (RFC 5280, section 6.1).
fn authorities(path: &Path, pem: &[u8], now: Timestamp) -> Result<Authorities, TlsError> {
    let (mut roots, mut soonest, mut warnings) = (RootCertStore::empty(), Timestamp::MAX, Vec::new());
    for (der, position) in certificates(CLIENT_CA, path, pem)?.into_iter().zip(1_u32..) {
        let unusable = |problem: &dyn std::fmt::Display| {
            TlsError::new(CLIENT_CA, path, format!("certificate {position} in it can't be used: {problem}"))
        };
        let (_, until) = validity(&der).ok_or_else(|| unusable(&"it is not X.509"))?;
        if now > until {
            let problem = format!("certificate {position} in it expired on {until} and is left out");
            warnings.push(TlsError::new(CLIENT_CA, path, problem).to_string());
            continue;
        }
        soonest = soonest.min(until);
        roots.add(der).map_err(|error| unusable(&error))?;
    }
    if roots.is_empty() {
        let problem = "every certificate in it has expired; add the present authority";
        return Err(TlsError::new(CLIENT_CA, path, problem));
    }
    Ok(Authorities { roots, soonest, warnings })
}

fn verifier(
    path: &Path,
    roots: RootCertStore,
    clients: Clients,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider));
    let builder = match clients {
        Clients::Required => builder,
        Clients::Optional => builder.allow_unauthenticated(),
    };
    builder.build().map_err(|error| TlsError::new(CLIENT_CA, path, format!("can't be used: {error}")))
}

fn server(
    key: CertifiedKey,
    clients: Option<Arc<dyn ClientCertVerifier>>,
    provider: Arc<CryptoProvider>,
    clock: SharedClock,
) -> Result<ServerConfig, rustls::Error> {
    let mut server = ServerConfig::builder_with_details(provider, Arc::new(Time(clock)))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(clients.unwrap_or_else(WebPkiClientVerifier::no_client_auth))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    server.alpn_protocols = vec![b"h2".to_vec()];
    // Keys of its own for each load: what was begun under other files begins again.
    server.ticketer = rustls::crypto::ring::Ticketer::new()?;
    Ok(server)
}

/// The clock, as rustls asks for it.
#[derive(Debug)]
struct Time(SharedClock);

impl TimeProvider for Time {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix_time(self.0.now()))
    }
}

fn unix_time(now: Timestamp) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(now.as_second()).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::path::PathBuf;

    struct Folder {
        folder: tempfile::TempDir,
        settings: Settings,
    }

    impl Folder {
        /// A valid pair, from 2025 to 2027, and an authority until 2028.
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = |name: &str| folder.path().join(name);
            let settings = Settings {
                address: "127.0.0.1:0".parse().unwrap(),
                certificate: path("tls.crt"),
                key: path("tls.key"),
                client_ca: Some(path("ca.crt")),
                clients: Clients::Required,
            };
            let this = Self { folder, settings };
            this.pair(2025, 2027);
            this.write("ca.crt", 0o644, &authority(2028));
            this
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn write(&self, name: &str, mode: u32, text: &str) {
            std::fs::write(self.path(name), text).unwrap();
            std::fs::set_permissions(self.path(name), Permissions::from_mode(mode)).unwrap();
        }

        fn pair(&self, from: i32, until: i32) {
            let (certificate, key) = pair(from, until);
            self.write("tls.crt", 0o644, &certificate);
            self.write("tls.key", 0o600, &key);
        }

        fn load(&self) -> Result<Material, TlsError> {
            let clock: SharedClock = ManualClock::new("2026-01-01T00:00:00Z".parse().unwrap());
            Files::read(&self.settings).and_then(|files| Material::new(&self.settings, &files, &clock))
        }

        fn refused(&self) -> String {
            self.load().map(|_| ()).unwrap_err().to_string()
        }
    }

    fn params(from: i32, until: i32) -> CertificateParams {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.not_before = date_time_ymd(from, 1, 1);
        params.not_after = date_time_ymd(until, 1, 1);
        params
    }

    fn pair(from: i32, until: i32) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        (params(from, until).self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    fn authority(until: i32) -> String {
        let mut params = params(2020, until);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap().pem()
    }

    #[test]
    fn what_fits_is_taken_and_its_ends_are_known() {
        let folder = Folder::new();
        let material = folder.load().unwrap();
        let ends: Vec<_> = material.expiries.iter().map(|(name, end)| (*name, end.to_string())).collect();
        let expected = [("server", "2027-01-01T00:00:00Z"), ("client_ca", "2028-01-01T00:00:00Z")];
        assert_eq!(ends, expected.map(|(name, end)| (name, end.to_owned())));
        assert!(material.warnings.is_empty());
        assert!(!material.trusts(&[], Timestamp::UNIX_EPOCH));
    }

    #[test]
    fn b24_pairs_that_do_not_fit_or_are_not_valid_are_refused() {
        let folder = Folder::new();
        folder.write("tls.key", 0o600, &pair(2025, 2027).1);
        assert!(folder.refused().contains("is not the key of the certificate"), "{}", folder.refused());
        folder.pair(2020, 2025);
        assert!(folder.refused().contains("expired on 2025-01-01"), "{}", folder.refused());
        folder.pair(2027, 2028);
        assert!(folder.refused().contains("not valid before 2027-01-01"), "{}", folder.refused());
        let (mut chain, key) = pair(2025, 2027);
        chain.push_str(&pair(2020, 2025).0);
        folder.write("tls.crt", 0o644, &chain);
        folder.write("tls.key", 0o600, &key);
        assert!(folder.refused().contains("certificate 2 in it expired"), "{}", folder.refused());
    }

    #[test]
    fn b24_files_that_are_not_whole_are_refused_and_no_key_is_quoted() {
        let folder = Folder::new();
        let (certificate, key) = pair(2025, 2027);
        for (name, text, word) in [
            ("tls.crt", "", "holds no certificate"),
            ("tls.crt", "rubbish", "holds no certificate"),
            ("tls.crt", &certificate[..certificate.len() / 2], "is not whole PEM"),
            ("tls.key", "", "holds no private key"),
            ("tls.key", &key[..key.len() / 2], "holds no private key"),
            ("tls.key", key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY").as_str(), "not encrypted"),
            ("tls.key", key.replace('M', "N").as_str(), "private key"),
            ("ca.crt", "", "holds no certificate"),
            ("ca.crt", authority(2025).as_str(), "every certificate in it has expired"),
        ] {
            let good = std::fs::read_to_string(folder.path(name)).unwrap();
            folder.write(name, 0o600, text);
            let error = folder.refused();
            assert!(error.contains(word) && error.contains(name), "{name}: {error}");
            assert!(key.lines().all(|line| !error.contains(line)), "{error}");
            folder.write(name, 0o600, &good);
        }
        folder.load().unwrap();
        std::fs::remove_file(folder.path("ca.crt")).unwrap();
        assert!(folder.refused().contains("can't be opened"), "{}", folder.refused());
    }

    #[test]
    fn an_expired_authority_is_left_out_of_the_bundle() {
        let folder = Folder::new();
        folder.write("ca.crt", 0o644, &format!("{}{}", authority(2025), authority(2029)));
        let material = folder.load().unwrap();
        assert!(material.warnings.iter().any(|line| line.contains("certificate 1 in it expired")));
        assert_eq!(material.expiries[1].1.to_string(), "2029-01-01T00:00:00Z");
    }

    #[test]
    fn files_that_others_may_write_or_keys_that_they_may_read_are_refused() {
        let folder = Folder::new();
        for (name, mode) in [("tls.key", 0o644), ("tls.key", 0o604), ("tls.crt", 0o646), ("ca.crt", 0o666)] {
            let path = folder.path(name);
            let before = std::fs::metadata(&path).unwrap().permissions();
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert!(folder.refused().contains("chmod"), "{name} {mode:o}: {}", folder.refused());
            std::fs::set_permissions(&path, before).unwrap();
        }
        assert!(key_problem(0, 0o440).is_none() && key_problem(0, 0o640).is_none());
        assert!(key_problem(0, 0o660).is_some());
        let stranger = rustix::process::geteuid().as_raw() + 1;
        assert!(key_problem(stranger, 0o600).unwrap().contains("owned by"));
    }

    #[test]
    fn links_are_followed_as_kubernetes_makes_them() {
        let folder = Folder::new();
        std::fs::create_dir(folder.path("..one")).unwrap();
        std::fs::rename(folder.path("tls.key"), folder.path("..one/tls.key")).unwrap();
        symlink("..one", folder.path("..data")).unwrap();
        symlink("..data/tls.key", folder.path("tls.key")).unwrap();
        folder.load().unwrap();
        std::fs::remove_file(folder.path("tls.key")).unwrap();
        std::fs::create_dir(folder.path("tls.key")).unwrap();
        assert!(folder.refused().contains("not a regular file"), "{}", folder.refused());
    }
}
