//! TLS 1.3 towards a broker: whom this side trusts, and the certificate that it presents.
//!
//! The files are read anew for every connection, so a certificate that was renewed is presented from the next one on
//! and nobody has to be told. The crypto provider is ring, named outright: no default of the process is asked for.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use http::Uri;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{AlertDescription, ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::Code;

use super::address::{self, Address, MEND};
use super::error::{ClientError, shown};
use super::files::read_private;
use crate::error::Reason;

const HTTP2: &[u8] = b"h2";
/// The largest file of certificates: the authorities of a whole operating system fit.
const LARGEST_FILE: u64 = 4 * 1024 * 1024;
const LARGEST_KEY: usize = 64 * 1024;

/// How an `https://` broker is known, and how this side lets itself be known. Other addresses have no use for it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TlsOptions {
    /// The file (PEM) with the certificate authorities that the broker's certificate must come from; `None` means those
    /// that the system trusts.
    pub ca_file: Option<PathBuf>,
    /// The certificate that this side presents to a broker that asks for one.
    pub identity: Option<ClientIdentity>,
    /// The name that the broker's certificate must be for, where it is not the host of the address.
    pub server_name: Option<String>,
}

/// A client certificate and its key, as files (PEM).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientIdentity {
    /// The certificate, and behind it those that lead to its authority.
    pub certificate: PathBuf,
    /// The key: a regular file, the caller's or root's, for nobody else's eyes (as
    /// [`read_token_file`](super::read_token_file) has it).
    pub key: PathBuf,
}

impl TlsOptions {
    /// Reads the files. Blocks.
    fn config(&self) -> Result<ClientConfig, ClientError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(format!("TLS 1.3 is not to be had: {error}")))?
            .with_root_certificates(self.roots()?);
        let mut config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some(identity) => {
                let (chain, key) = identity.read()?;
                let key_file = identity.key.display();
                builder.with_client_auth_cert(chain, key).map_err(|error| {
                    let certificate = identity.certificate.display();
                    unusable(format!("{key_file}: is not the key of {certificate} ({error}); name the pair"))
                })?
            }
        };
        config.alpn_protocols = vec![HTTP2.to_vec()];
        Ok(config)
    }

    fn roots(&self) -> Result<RootCertStore, ClientError> {
        let mut roots = RootCertStore::empty();
        let Some(path) = &self.ca_file else {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            return match roots.is_empty() {
                true => Err(unusable("this system trusts no certificate authority; name one with --ca-file")),
                false => Ok(roots),
            };
        };
        for certificate in certificates(path)? {
            roots.add(certificate).map_err(|error| {
                unusable(format!("{}: holds a certificate that is no authority: {error}", path.display()))
            })?;
        }
        Ok(roots)
    }
}

impl ClientIdentity {
    /// A certificate and its key, of which each may have been named or not.
    ///
    /// # Errors
    /// [`Reason::InvalidArgument`] where one is named without the other, which is of no use.
    pub fn pair(certificate: Option<PathBuf>, key: Option<PathBuf>) -> Result<Option<Self>, ClientError> {
        let missing = |what| Err(ClientError::invalid(what));
        match (certificate, key) {
            (Some(certificate), Some(key)) => Ok(Some(Self { certificate, key })),
            (None, None) => Ok(None),
            (Some(_), None) => missing(
                "a client certificate is named, but not its key; name it with --client-key or CLAVIGER_CLIENT_KEY",
            ),
            (None, Some(_)) => missing(
                "a client certificate's key is named, but not the certificate; name it with --client-cert or \
                 CLAVIGER_CLIENT_CERT",
            ),
        }
    }

    fn read(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), ClientError> {
        let chain = certificates(&self.certificate)?;
        let refuse = |problem: String| unusable(format!("{}: {problem}", self.key.display()));
        let pem = read_private(&self.key, "client key", LARGEST_KEY).map_err(refuse)?;
        // What the parser has to say may show a line of the file.
        let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| {
            refuse("holds no private key in PEM; name the key, not the certificate".to_owned())
        })?;
        Ok((chain, key))
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ClientError> {
    let refuse = |problem: &str| unusable(format!("{}: {problem}", path.display()));
    let found = std::fs::metadata(path).map_err(|error| refuse(&format!("can't be read: {error}")))?;
    if !found.is_file() || found.len() > LARGEST_FILE {
        return Err(refuse("is no file of certificates: too large, a folder, a pipe or a device"));
    }
    let pem = std::fs::read(path).map_err(|error| refuse(&format!("can't be read: {error}")))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(refuse("holds no certificate in PEM")),
        Err(_) => Err(refuse("is not PEM throughout; write the certificates anew")),
    }
}

fn unusable(message: impl Into<String>) -> ClientError {
    ClientError::new(Reason::InvalidCertificate, Code::InvalidArgument, message)
}

/// What makes a connection to one broker a secure one.
#[derive(Debug)]
pub(super) struct Handshake {
    address: Address,
    name: ServerName<'static>,
    options: TlsOptions,
}

impl Handshake {
    pub(super) fn new(uri: &Uri, options: &TlsOptions) -> Result<Self, ClientError> {
        let named = options.server_name.clone().unwrap_or_else(|| address::host(uri).to_owned());
        let name = ServerName::try_from(named.clone()).map_err(|_| {
            ClientError::invalid(format!(
                "server name `{}`: is neither a DNS name nor an address",
                shown(&named)
            ))
        })?;
        Ok(Self { address: Address::Https(uri.clone()), name, options: options.clone() })
    }

    /// Whether this side presents a certificate.
    pub(super) const fn presents(&self) -> bool {
        self.options.identity.is_some()
    }

    /// Reads the files, for one connection.
    pub(super) async fn prepare(&self) -> Result<TlsConnector, ClientError> {
        let options = self.options.clone();
        let config = tokio::task::spawn_blocking(move || options.config()).await.map_err(|_| {
            ClientError::unavailable("the certificates were not read: the process is ending")
        })??;
        Ok(TlsConnector::from(Arc::new(config)))
    }

    pub(super) async fn shake(
        &self,
        prepared: TlsConnector,
        stream: TcpStream,
    ) -> Result<TlsStream<TcpStream>, ClientError> {
        let stream =
            prepared.connect(self.name.clone(), stream).await.map_err(|error| self.not_shaken(&error))?;
        match stream.get_ref().1.alpn_protocol() == Some(HTTP2) {
            true => Ok(stream),
            false => Err(self.wrong("what answers there speaks TLS, but not HTTP/2: it is no broker")),
        }
    }

    /// Why the handshake failed. A certificate that is not accepted is somebody else's until proven otherwise.
    fn not_shaken(&self, error: &io::Error) -> ClientError {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        let said = shown(&error.to_string());
        // A broker that is quick says what it thinks of this side's certificate before this side is through.
        if let Some(rustls::Error::AlertReceived(alert)) = inner
            && let Some(refused) = refused_certificate(*alert, self.presents())
        {
            return refused;
        }
        match inner {
            Some(rustls::Error::InvalidCertificate(_)) => self.wrong(&format!(
                "{said}; name the broker's certificate authority with --ca-file, or ask whoever runs it"
            )),
            Some(_) => ClientError::unavailable(format!(
                "no broker at {}: what answers there does not speak TLS 1.3 ({said})",
                self.address
            )),
            None => ClientError::unavailable(format!("no broker at {}: {said}; {MEND}", self.address)),
        }
    }

    fn wrong(&self, problem: &str) -> ClientError {
        let message = format!("{}: {problem}", self.address);
        ClientError::new(Reason::Unauthenticated, Code::Unauthenticated, message)
    }
}

/// What a broker means that ends a connection with this alert: that it does not accept the client's certificate, or the
/// want of one. In TLS 1.3 it says so after the handshake is over for the client, so the first call hears it (RFC 8446,
/// section 4.4.2.4).
pub(super) fn refused_certificate(alert: AlertDescription, presented: bool) -> Option<ClientError> {
    const OF_CERTIFICATES: [AlertDescription; 9] = [
        AlertDescription::CertificateRequired,
        AlertDescription::NoCertificate,
        AlertDescription::BadCertificate,
        AlertDescription::UnsupportedCertificate,
        AlertDescription::CertificateRevoked,
        AlertDescription::CertificateExpired,
        AlertDescription::CertificateUnknown,
        AlertDescription::UnknownCA,
        AlertDescription::AccessDenied,
    ];
    if !OF_CERTIFICATES.contains(&alert) {
        return None;
    }
    let message = match presented {
        true => format!("the broker does not accept the client certificate ({alert:?}); present another one"),
        false => format!("the broker wants a client certificate ({alert:?}); {PRESENT}"),
    };
    Some(ClientError::new(Reason::Unauthenticated, Code::Unauthenticated, message))
}

/// What to do where a broker asks for a certificate.
pub(super) const PRESENT: &str = "name yours with --client-cert and --client-key";

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn handshake(uri: &str, options: &TlsOptions) -> Result<Handshake, ClientError> {
        Handshake::new(&uri.parse().unwrap(), options)
    }

    /// A certificate of its own making, and its key, as files.
    fn pair(folder: &Path, name: &str) -> ClientIdentity {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let identity = ClientIdentity {
            certificate: folder.join(format!("{name}.pem")),
            key: folder.join(format!("{name}.key")),
        };
        std::fs::write(&identity.certificate, made.cert.pem()).unwrap();
        std::fs::write(&identity.key, made.signing_key.serialize_pem()).unwrap();
        std::fs::set_permissions(&identity.key, std::fs::Permissions::from_mode(0o600)).unwrap();
        identity
    }

    #[test]
    fn the_name_is_the_host_unless_another_is_given() {
        let found = handshake("https://broker.example", &TlsOptions::default()).unwrap();
        assert_eq!(found.name.to_str(), "broker.example");
        let six = handshake("https://[2001:db8::1]:7340", &TlsOptions::default()).unwrap();
        assert_eq!(six.name.to_str(), "2001:db8::1");
        let named = TlsOptions { server_name: Some("broker.internal".to_owned()), ..TlsOptions::default() };
        assert_eq!(handshake("https://10.0.0.1", &named).unwrap().name.to_str(), "broker.internal");
        let bad = TlsOptions { server_name: Some("two words".to_owned()), ..TlsOptions::default() };
        let error = handshake("https://10.0.0.1", &bad).unwrap_err();
        assert_eq!(error.reason, Reason::InvalidArgument);
    }

    #[test]
    fn a_pair_is_taken_and_only_tls_1_3_is_spoken() {
        let folder = tempfile::tempdir().unwrap();
        let identity = pair(folder.path(), "a");
        let ca_file = Some(identity.certificate.clone());
        let options = TlsOptions { ca_file, identity: Some(identity), server_name: None };
        let config = options.config().unwrap();
        assert_eq!(config.alpn_protocols, [HTTP2]);
        assert!(config.client_auth_cert_resolver.has_certs());
    }

    #[test]
    fn each_wrong_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (mine, other) = (pair(folder.path(), "a"), pair(folder.path(), "b"));
        let with = |identity: ClientIdentity| TlsOptions {
            ca_file: Some(mine.certificate.clone()),
            identity: Some(identity),
            server_name: None,
        };
        let refused = |options: TlsOptions| {
            let error = options.config().unwrap_err();
            assert_eq!(error.reason, Reason::InvalidCertificate, "{error}");
            error.message
        };
        let mixed = ClientIdentity { certificate: mine.certificate.clone(), key: other.key.clone() };
        let message = refused(with(mixed));
        assert!(message.contains("b.key") && message.contains("a.pem"), "{message}");
        let swapped = ClientIdentity { certificate: mine.certificate.clone(), key: mine.certificate.clone() };
        std::fs::set_permissions(&mine.certificate, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(refused(with(swapped)).contains("no private key"));
        let no_certificate = ClientIdentity { certificate: mine.key.clone(), key: mine.key.clone() };
        assert!(refused(with(no_certificate)).contains("no certificate"));
        std::fs::set_permissions(&mine.key, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(refused(with(mine.clone())).contains("others may read the client key"));
        let missing =
            TlsOptions { ca_file: Some("/nonexistent/ca.pem".into()), identity: None, server_name: None };
        assert!(refused(missing).starts_with("/nonexistent/ca.pem: "));
    }

    #[test]
    fn an_alert_about_certificates_says_what_to_do() {
        let wanted = refused_certificate(AlertDescription::CertificateRequired, false).unwrap();
        assert_eq!(wanted.reason, Reason::Unauthenticated);
        assert!(wanted.message.contains("(CertificateRequired); name yours with --client-cert"), "{wanted}");
        let refused = refused_certificate(AlertDescription::UnknownCA, true).unwrap();
        assert!(refused.message.contains("does not accept the client certificate (UnknownCA)"), "{refused}");
        assert!(refused_certificate(AlertDescription::InternalError, true).is_none());
    }

    #[test]
    fn an_alert_that_comes_before_the_handshake_is_over_is_said_as_later() {
        let broker = handshake("https://broker.example", &TlsOptions::default()).unwrap();
        let alert = rustls::Error::AlertReceived(AlertDescription::CertificateRequired);
        let early = broker.not_shaken(&io::Error::new(io::ErrorKind::InvalidData, alert));
        assert_eq!(Some(early), refused_certificate(AlertDescription::CertificateRequired, false));
        let other = rustls::Error::AlertReceived(AlertDescription::ProtocolVersion);
        let other = broker.not_shaken(&io::Error::new(io::ErrorKind::InvalidData, other));
        assert!(other.message.contains("does not speak TLS 1.3"), "{other}");
    }
}
