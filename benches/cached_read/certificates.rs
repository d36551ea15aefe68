//! The certificates of the TLS rows: one authority, and the server's certificate from it.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use claviger::server::tls;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use rustls::client::Resumption;
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore};

const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";

/// What a client trusts.
pub(crate) struct Certificates {
    roots: Arc<RootCertStore>,
}

impl Certificates {
    /// Makes them anew, and leaves in `folder` what a server presents: ECDSA on P-256, as most have it.
    pub(crate) fn make(folder: &Path) -> Self {
        let mut authority = CertificateParams::default();
        authority.distinguished_name.push(DnType::CommonName, "the benchmark's authority");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let server = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let server = server.signed_by(&key, &*authority).unwrap();
        for (name, pem, mode) in [(CERTIFICATE, server.pem(), 0o644), (KEY, key.serialize_pem(), 0o600)] {
            let path = folder.join(name);
            std::fs::write(&path, pem).unwrap();
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        }
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(authority.der().to_vec())).unwrap();
        Self { roots: Arc::new(roots) }
    }

    /// A client of TLS 1.3 and HTTP/2.
    pub(crate) fn client(&self, resumption: Resumption) -> Arc<ClientConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(Arc::clone(&self.roots))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = resumption;
        Arc::new(config)
    }
}

/// How a broker presents them; `None` where none were made.
pub(crate) fn settings(folder: &Path) -> Option<tls::Settings> {
    let certificate = folder.join(CERTIFICATE);
    certificate.exists().then(|| tls::Settings {
        address: "127.0.0.1:0".parse().unwrap(),
        certificate,
        key: folder.join(KEY),
        client_ca: None,
        clients: tls::Clients::default(),
    })
}
