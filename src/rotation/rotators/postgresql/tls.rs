//! TLS towards a server: `verify-full`, or nothing.
//!
//! The file of authorities is read anew for every connection, so a renewed one counts from the next on. The crypto
//! provider is ring, named outright.

use std::path::Path;
use std::sync::Arc;

use ring::digest;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use x509_parser::parse_x509_certificate;
use x509_parser::signature_algorithm::SignatureAlgorithm;
use x509_parser::x509::AlgorithmIdentifier;

/// What libpq offers from PostgreSQL 17 on, and what a server there must answer with, if with anything.
const PROTOCOL: &[u8] = b"postgresql";
/// The authorities of a whole operating system fit.
const LARGEST_FILE: u64 = 4 * 1024 * 1024;
/// RSASSA-PSS, whose hash is a parameter.
const RSASSA_PSS: &str = "1.2.840.113549.1.1.10";

/// Shakes hands. The error is a line that says what is wrong with the certificate, the file or the server.
pub(super) async fn secure(
    stream: TcpStream,
    host: &str,
    ca_file: Option<&Path>,
) -> Result<TlsStream<TcpStream>, String> {
    let name = ServerName::try_from(host.to_owned()).map_err(|_| "its host is no name for TLS".to_owned())?;
    let ca_file = ca_file.map(Path::to_owned);
    let config = tokio::task::spawn_blocking(move || config(ca_file.as_deref()))
        .await
        .map_err(|_| "the authorities were not read: the process is ending".to_owned())??;
    let connector = TlsConnector::from(Arc::new(config));
    connector.connect(name, stream).await.map_err(|error| format!("TLS: {error}"))
}

/// What ties a login to this very connection: `tls-server-end-point` (RFC 5929, section 4), a hash of the server's
/// certificate. `None` where that is not defined for its kind of signature (Ed25519).
pub(super) fn end_point(stream: &TlsStream<TcpStream>) -> Option<Vec<u8>> {
    let certificate = stream.get_ref().1.peer_certificates()?.first()?;
    binding(certificate)
}

fn binding(certificate: &[u8]) -> Option<Vec<u8>> {
    let (_, parsed) = parse_x509_certificate(certificate).ok()?;
    let hash = hash_of(&parsed.signature_algorithm)?;
    Some(digest::digest(hash, certificate).as_ref().to_vec())
}

/// The hash that a signature is made with; SHA-256 in place of MD5 and SHA-1.
fn hash_of(signature: &AlgorithmIdentifier<'_>) -> Option<&'static digest::Algorithm> {
    let name = signature.algorithm.to_id_string();
    if name != RSASSA_PSS {
        return hash_named(&name);
    }
    let Ok(SignatureAlgorithm::RSASSA_PSS(parameters)) = SignatureAlgorithm::try_from(signature) else {
        return None;
    };
    // RFC 4055, section 3.1: SHA-1, unless it says otherwise.
    parameters
        .hash_algorithm()
        .map_or(Some(&digest::SHA256), |hash| hash_named(&hash.algorithm.to_id_string()))
}

/// By the name of a signature (RFC 3279, 4055, 5758) or of a hash alone.
fn hash_named(name: &str) -> Option<&'static digest::Algorithm> {
    match name {
        // RSA with MD5 and with SHA-1, ECDSA with SHA-1, SHA-1; the same three with SHA-256.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.10045.4.1"
        | "1.3.14.3.2.26"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.3.2"
        | "2.16.840.1.101.3.4.2.1" => Some(&digest::SHA256),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" | "2.16.840.1.101.3.4.2.2" => Some(&digest::SHA384),
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" | "2.16.840.1.101.3.4.2.3" => Some(&digest::SHA512),
        _ => None,
    }
}

/// Reads the authorities. Blocks.
fn config(ca_file: Option<&Path>) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS is not to be had: {error}"))?
        .with_root_certificates(ca_file.map_or_else(system, from_file)?)
        .with_no_client_auth();
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    Ok(config)
}

fn system() -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    match roots.is_empty() {
        true => Err("this system trusts no certificate authority; name one with `ca_file`".to_owned()),
        false => Ok(roots),
    }
}

fn from_file(path: &Path) -> Result<RootCertStore, String> {
    let refuse = |problem: String| format!("ca_file {}: {problem}", path.display());
    let unreadable = |error: std::io::Error| refuse(format!("can't be read: {error}"));
    let found = std::fs::metadata(path).map_err(unreadable)?;
    if !found.is_file() || found.len() > LARGEST_FILE {
        return Err(refuse("is no file of certificates: too large, a folder, a pipe or a device".to_owned()));
    }
    let pem = std::fs::read(path).map_err(unreadable)?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|_| refuse("is not PEM throughout".to_owned()))?;
        roots.add(certificate).map_err(|error| refuse(format!("holds what is no authority: {error}")))?;
    }
    match roots.is_empty() {
        true => Err(refuse("holds no certificate in PEM".to_owned())),
        false => Ok(roots),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wrong_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        let refused = |content: &str| {
            std::fs::write(&file, content).unwrap();
            from_file(&file).unwrap_err()
        };
        assert!(refused("").contains("no certificate"));
        assert!(refused("-----BEGIN CERTIFICATE-----\n%%%\n-----END CERTIFICATE-----\n").contains("ca.pem"));
        assert!(from_file(folder.path()).unwrap_err().contains("no file"));
        assert!(from_file(&folder.path().join("none")).unwrap_err().contains("can't be read"));
    }

    #[test]
    fn a_login_is_bound_to_the_certificate_by_the_hash_of_its_signature() {
        let bound = |kind| {
            let key = rcgen::KeyPair::generate_for(kind).unwrap();
            let made =
                rcgen::CertificateParams::new(vec!["db".to_owned()]).unwrap().self_signed(&key).unwrap();
            (binding(made.der()), made.der().to_vec())
        };
        let (found, der) = bound(&rcgen::PKCS_ECDSA_P256_SHA256);
        assert_eq!(found.unwrap(), digest::digest(&digest::SHA256, &der).as_ref());
        let (found, der) = bound(&rcgen::PKCS_ECDSA_P384_SHA384);
        assert_eq!(found.unwrap(), digest::digest(&digest::SHA384, &der).as_ref());
        assert_eq!(bound(&rcgen::PKCS_ED25519).0, None);
        assert_eq!(binding(b"no certificate"), None);
    }

    #[test]
    fn sha_256_stands_in_for_hashes_that_are_broken() {
        for name in ["1.2.840.113549.1.1.4", "1.2.840.113549.1.1.5", "1.2.840.10045.4.1"] {
            assert_eq!(hash_named(name), Some(&digest::SHA256), "{name}");
        }
        assert_eq!(hash_named("1.2.840.113549.1.1.13"), Some(&digest::SHA512));
        // Ed25519.
        assert_eq!(hash_named("1.3.101.112"), None);
    }

    #[test]
    fn an_authority_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        let made = rcgen::generate_simple_self_signed(["db.internal".to_owned()]).unwrap();
        std::fs::write(&file, made.cert.pem()).unwrap();
        assert_eq!(config(Some(&file)).unwrap().alpn_protocols, [PROTOCOL]);
    }
}
