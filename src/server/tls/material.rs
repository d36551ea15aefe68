//! What connections are made with: the broker's own certificate with its key, and whom it trusts.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::time_provider::TimeProvider;
use rustls::{InconsistentKeys, ServerConfig};
use x509_parser::parse_x509_certificate;
use zeroize::Zeroizing;

use super::files::{Digest, Files, key_problem, public_problem, read};
use super::trust::Trust;
use super::{Settings, TlsError};
use crate::clock::SharedClock;
use crate::identity::mtls::instant;

const CERTIFICATE: &str = "certificate";
const KEY: &str = "private key";

/// What connections are made with.
pub(super) struct Material {
    pub(super) server: Arc<ServerConfig>,
    pub(super) pair: Arc<Pair>,
    /// Where the listener has authorities for clients at all.
    pub(super) trust: Option<Arc<Trust>>,
}

impl Material {
    pub(super) fn new(
        pair: Arc<Pair>,
        trust: Option<Arc<Trust>>,
        settings: &Settings,
        clock: &SharedClock,
    ) -> Result<Self, TlsError> {
        let server = server(&pair, trust.as_deref(), Arc::clone(clock))
            .map_err(|error| TlsError::new(CERTIFICATE, &settings.certificate, error.to_string()))?;
        Ok(Self { server: Arc::new(server), pair, trust })
    }

    /// `server` for the chain, `client_ca` for the first of the authorities that expires.
    pub(super) fn expiries(&self) -> Vec<(&'static str, Timestamp)> {
        let authorities = self.trust.iter().map(|trust| ("client_ca", trust.soonest()));
        [("server", self.pair.not_after)].into_iter().chain(authorities).collect()
    }

    /// Whether what a client presented is trusted at this time.
    pub(super) fn trusts(&self, chain: &[CertificateDer<'static>], now: Timestamp) -> bool {
        self.trust.as_ref().is_some_and(|trust| trust.trusts(chain, now))
    }
}

/// The broker's certificate chain, and its key.
pub(super) struct Pair {
    key: Arc<SingleCertAndKey>,
    pub(super) digest: Digest,
    /// The first end of a certificate in the chain.
    not_after: Timestamp,
}

impl Pair {
    pub(super) fn read(settings: &Settings) -> Result<Files<2>, TlsError> {
        let certificate = read(CERTIFICATE, &settings.certificate, public_problem)?;
        Ok(Files([certificate, read(KEY, &settings.key, key_problem)?]))
    }

    /// The pair, where both fit each other and are valid now.
    pub(super) fn check(settings: &Settings, files: &Files<2>, now: Timestamp) -> Result<Self, TlsError> {
        let Files([certificate, key]) = files;
        let (chain, not_after) = chain(&settings.certificate, certificate, now)?;
        let key = Arc::new(SingleCertAndKey::from(certified(settings, chain, key)?));
        Ok(Self { key, digest: files.digest(), not_after })
    }
}

pub(super) fn certificates(
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
pub(super) fn validity(der: &CertificateDer<'_>) -> Option<(Timestamp, Timestamp)> {
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

fn server(pair: &Pair, trust: Option<&Trust>, clock: SharedClock) -> Result<ServerConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let clients = trust.map_or_else(WebPkiClientVerifier::no_client_auth, Trust::verifier);
    let mut server = ServerConfig::builder_with_details(provider, Arc::new(Time(clock)))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(clients)
        .with_cert_resolver(Arc::<SingleCertAndKey>::clone(&pair.key));
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

pub(super) fn unix_time(now: Timestamp) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(now.as_second()).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{Folder, Issuer, pair};
    use super::*;

    #[test]
    fn what_fits_is_taken_and_its_ends_are_known() {
        let folder = Folder::new();
        let material = folder.load().unwrap();
        let ends: Vec<_> =
            material.expiries().into_iter().map(|(name, end)| (name, end.to_string())).collect();
        let expected = [("server", "2027-01-01T00:00:00Z"), ("client_ca", "2028-01-01T00:00:00Z")];
        assert_eq!(ends, expected.map(|(name, end)| (name, end.to_owned())));
        assert!(material.trust.as_ref().unwrap().warnings().is_empty());
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
            ("ca.crt", Issuer::until(2025).pem().as_str(), "every certificate in it has expired"),
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
}
