//! Whom a listener trusts: the authorities for clients that have not expired.
//!
//! A root's own end is no part of a path (RFC 5280, section 6.1), so verification alone would trust it for ever. Which
//! of the bundle count is therefore decided here, when it is read and again as time goes by. Where none is left, nobody
//! is trusted: a certificate that is presented is refused, and where one is required there are no connections.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};

use super::files::{Digest, Files, public_problem, read};
use super::material::{certificates, unix_time, validity};
use super::{Clients, TlsError};

const CLIENT_CA: &str = "client CA bundle";

/// The authorities of one bundle, and the verifier that those stand behind which count now.
pub(super) struct Trust {
    path: PathBuf,
    clients: Clients,
    pub(super) digest: Digest,
    authorities: Vec<Authority>,
    verifier: Arc<dyn ClientCertVerifier>,
}

#[derive(Clone)]
struct Authority {
    der: CertificateDer<'static>,
    until: Timestamp,
    /// Whether the verifier knows it.
    counts: bool,
}

impl Trust {
    pub(super) fn read(path: &Path) -> Result<Files<1>, TlsError> {
        Ok(Files([read(CLIENT_CA, path, public_problem)?]))
    }

    /// The authorities of a bundle, where at least one has not expired and those can be used.
    pub(super) fn check(
        path: &Path,
        clients: Clients,
        files: &Files<1>,
        now: Timestamp,
    ) -> Result<Self, TlsError> {
        let Files([pem]) = files;
        let mut authorities = Vec::new();
        for (der, position) in certificates(CLIENT_CA, path, pem)?.into_iter().zip(1_u32..) {
            let (_, until) = validity(&der).ok_or_else(|| unusable(path, position, &"it is not X.509"))?;
            authorities.push(Authority { der, until, counts: now <= until });
        }
        if !authorities.iter().any(|authority| authority.counts) {
            let problem = "every certificate in it has expired; add the present authority";
            return Err(TlsError::new(CLIENT_CA, path, problem));
        }
        Self::of(path, clients, files.digest(), authorities)
    }

    fn of(
        path: &Path,
        clients: Clients,
        digest: Digest,
        authorities: Vec<Authority>,
    ) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        for (authority, position) in authorities.iter().zip(1_u32..) {
            if authority.counts {
                roots.add(authority.der.clone()).map_err(|error| unusable(path, position, &error))?;
            }
        }
        let verifier = verifier(path, roots, clients)?;
        Ok(Self { path: path.to_owned(), clients, digest, authorities, verifier })
    }

    /// What the same bundle is worth at another time, where that is not the same.
    pub(super) fn at(&self, now: Timestamp) -> Option<Result<Self, TlsError>> {
        if self.authorities.iter().all(|authority| authority.counts == (now <= authority.until)) {
            return None;
        }
        let judged =
            |authority: &Authority| Authority { counts: now <= authority.until, ..authority.clone() };
        let authorities = self.authorities.iter().map(judged).collect();
        Some(Self::of(&self.path, self.clients, self.digest, authorities))
    }

    pub(super) fn verifier(&self) -> Arc<dyn ClientCertVerifier> {
        Arc::clone(&self.verifier)
    }

    /// Whether what a client presented is trusted at this time.
    pub(super) fn trusts(&self, chain: &[CertificateDer<'static>], now: Timestamp) -> bool {
        let Some((leaf, others)) = chain.split_first() else { return false };
        self.verifier.verify_client_cert(leaf, others, unix_time(now)).is_ok()
    }

    /// The first end of an authority that counts; where none does any more, the last there was.
    pub(super) fn soonest(&self) -> Timestamp {
        let counting = self.authorities.iter().filter(|authority| authority.counts);
        let last = || self.authorities.iter().map(|authority| authority.until).max();
        counting.map(|authority| authority.until).min().or_else(last).unwrap_or(Timestamp::MAX)
    }

    /// A line for each authority that does not count.
    pub(super) fn warnings(&self) -> Vec<String> {
        let positions = self.authorities.iter().zip(1_u32..).filter(|(authority, _)| !authority.counts);
        positions
            .map(|(Authority { until, .. }, position)| {
                let problem = format!("certificate {position} in it expired on {until} and is left out");
                TlsError::new(CLIENT_CA, &self.path, problem).to_string()
            })
            .collect()
    }

    pub(super) fn say_warnings(&self) {
        self.warnings().iter().for_each(|warning| tracing::warn!("{warning}"));
        if !self.authorities.iter().any(|authority| authority.counts) {
            let problem = "every authority in it has expired: no client is trusted; add the present one";
            tracing::error!("{}", TlsError::new(CLIENT_CA, &self.path, problem));
        }
    }
}

fn unusable(path: &Path, position: u32, problem: &dyn fmt::Display) -> TlsError {
    TlsError::new(CLIENT_CA, path, format!("certificate {position} in it can't be used: {problem}"))
}

fn verifier(
    path: &Path,
    roots: RootCertStore,
    clients: Clients,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    if roots.is_empty() {
        let schemes = provider.signature_verification_algorithms.supported_schemes();
        return Ok(Arc::new(Nobody { clients, schemes }));
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    let builder = match clients {
        Clients::Required => builder,
        Clients::Optional => builder.allow_unauthenticated(),
    };
    builder.build().map_err(|error| TlsError::new(CLIENT_CA, path, format!("can't be used: {error}")))
}

/// Trusts nobody. Certificates are still asked for, so that one that is presented is refused and not overlooked.
#[derive(Debug)]
struct Nobody {
    clients: Clients,
    schemes: Vec<SignatureScheme>,
}

fn unknown_issuer() -> rustls::Error {
    CertificateError::UnknownIssuer.into()
}

impl ClientCertVerifier for Nobody {
    fn client_auth_mandatory(&self) -> bool {
        self.clients == Clients::Required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Err(unknown_issuer())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(unknown_issuer())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(unknown_issuer())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{Folder, Issuer, year};
    use super::*;

    fn trust(folder: &Folder) -> Trust {
        let path = folder.path("ca.crt");
        Trust::check(&path, Clients::Required, &Trust::read(&path).unwrap(), year(2026)).unwrap()
    }

    #[test]
    fn an_expired_authority_is_left_out_of_the_bundle() {
        let (past, present) = (Issuer::until(2025), Issuer::until(2029));
        let folder = Folder::new();
        folder.write("ca.crt", 0o644, &format!("{}{}", past.pem(), present.pem()));
        let trust = trust(&folder);
        assert!(trust.warnings().iter().any(|line| line.contains("certificate 1 in it expired")));
        assert_eq!(trust.soonest(), year(2029));
        assert!(trust.trusts(&present.client(), year(2026)));
        assert!(!trust.trusts(&past.client(), year(2026)));
        assert!(!trust.trusts(&[], year(2026)));
    }

    #[test]
    fn what_a_bundle_is_worth_follows_the_time_and_in_the_end_is_nothing() {
        let (first, second) = (Issuer::until(2027), Issuer::until(2029));
        let folder = Folder::new();
        folder.write("ca.crt", 0o644, &format!("{}{}", first.pem(), second.pem()));
        let both = trust(&folder);
        assert!(both.at(year(2027)).is_none(), "an authority counts in its last second");
        assert!(both.trusts(&first.client(), year(2028)), "verification alone does not ask for its end");

        let one = both.at(year(2028)).unwrap().unwrap();
        assert_eq!((one.warnings().len(), one.soonest(), one.digest), (1, year(2029), both.digest));
        assert!(!one.trusts(&first.client(), year(2028)) && one.trusts(&second.client(), year(2028)));

        let none = one.at(year(2030)).unwrap().unwrap();
        assert_eq!((none.warnings().len(), none.soonest()), (2, year(2029)));
        assert!(!none.trusts(&first.client(), year(2030)) && !none.trusts(&second.client(), year(2030)));
        let asked = none.verifier();
        assert!(asked.offer_client_auth() && asked.client_auth_mandatory());
        assert!(none.at(year(2031)).is_none());

        let again = none.at(year(2026)).unwrap().unwrap();
        assert!(
            again.trusts(&first.client(), year(2026)),
            "a clock that was wrong takes nothing away for good"
        );
    }

    #[test]
    fn where_certificates_are_optional_nobody_has_to_present_one_to_nobody() {
        let folder = Folder::new();
        let path = folder.path("ca.crt");
        let files = Trust::read(&path).unwrap();
        let trust = Trust::check(&path, Clients::Optional, &files, year(2026)).unwrap();
        let none = trust.at(year(2030)).unwrap().unwrap().verifier();
        assert!(none.offer_client_auth() && !none.client_auth_mandatory());
    }
}
