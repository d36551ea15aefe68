//! TLS towards a server: `verify-full`, or nothing.
//!
//! The file of authorities is read anew for every connection, so a renewed one counts from the next on. The crypto
//! provider is ring, named outright.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// What libpq offers from PostgreSQL 17 on, and what a server there must answer with, if with anything.
const PROTOCOL: &[u8] = b"postgresql";
/// The authorities of a whole operating system fit.
const LARGEST_FILE: u64 = 4 * 1024 * 1024;

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
    fn an_authority_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        let made = rcgen::generate_simple_self_signed(["db.internal".to_owned()]).unwrap();
        std::fs::write(&file, made.cert.pem()).unwrap();
        assert_eq!(config(Some(&file)).unwrap().alpn_protocols, [PROTOCOL]);
    }
}
