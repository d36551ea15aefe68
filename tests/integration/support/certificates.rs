//! A small certificate authority, and TLS clients that hold its certificates. No code of the product.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);

/// Signs certificates.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    /// The intermediate certificates that link it to a root, in PEM.
    links: String,
}

/// A certificate with what links it to its root, and its key, both in PEM.
#[derive(Clone)]
pub struct Issued {
    pub certificate: String,
    pub key: String,
}

/// The day on which a validity begins and the one on which it is over: year, month, day.
pub type Days = ((i32, u8, u8), (i32, u8, u8));

/// What a certificate says.
#[derive(Clone, Copy, Default)]
pub struct Leaf<'a> {
    pub spiffe: Option<&'a str>,
    pub dns: &'a [&'a str],
    pub common_name: Option<&'a str>,
    /// Without it, it is valid for ages.
    pub valid: Option<Days>,
}

impl Authority {
    /// A root.
    pub fn new(name: &str) -> Self {
        let issuer = CertifiedIssuer::self_signed(authority(name), KeyPair::generate().unwrap()).unwrap();
        Self { issuer, links: String::new() }
    }

    /// An authority below this one.
    pub fn intermediate(&self, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let issuer = CertifiedIssuer::signed_by(authority(name), key, &*self.issuer).unwrap();
        let links = format!("{}{}", issuer.pem(), self.links);
        Self { issuer, links }
    }

    /// Its own certificate, in PEM.
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A certificate for a server on this machine.
    pub fn server(&self) -> Issued {
        self.server_valid(None)
    }

    /// The same, valid from one day until another.
    pub fn server_valid(&self, valid: Option<Days>) -> Issued {
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.issue(params, valid)
    }

    /// A certificate for a client.
    pub fn client(&self, leaf: &Leaf<'_>) -> Issued {
        let mut params = CertificateParams::default();
        let uris = leaf.spiffe.iter().map(|uri| SanType::URI((*uri).try_into().unwrap()));
        let dns = leaf.dns.iter().map(|name| SanType::DnsName((*name).try_into().unwrap()));
        params.subject_alt_names = uris.chain(dns).collect();
        params.distinguished_name = DistinguishedName::new();
        if let Some(name) = leaf.common_name {
            params.distinguished_name.push(DnType::CommonName, name);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(params, leaf.valid)
    }

    /// A certificate for a client with a SPIFFE ID.
    pub fn spiffe(&self, id: &str) -> Issued {
        self.client(&Leaf { spiffe: Some(id), ..Leaf::default() })
    }

    fn issue(&self, mut params: CertificateParams, valid: Option<Days>) -> Issued {
        if let Some((from, until)) = valid {
            params.not_before = date_time_ymd(from.0, from.1, from.2);
            params.not_after = date_time_ymd(until.0, until.1, until.2);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &*self.issuer).unwrap();
        Issued { certificate: format!("{}{}", certificate.pem(), self.links), key: key.serialize_pem() }
    }
}

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// A client of TLS 1.3 and HTTP/2 that trusts this authority and presents this certificate. It resumes sessions.
pub fn client(trusted: &Authority, identity: Option<&Issued>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(trusted.pem().as_bytes()).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(issued) => {
            let chain: Result<Vec<_>, _> =
                CertificateDer::pem_slice_iter(issued.certificate.as_bytes()).collect();
            let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
            builder.with_client_auth_cert(chain.unwrap(), key).unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// A TLS connection. The server may still refuse the client's certificate: in TLS 1.3 the client is done first.
pub async fn connect(
    config: &Arc<ClientConfig>,
    server: SocketAddr,
) -> std::io::Result<TlsStream<TcpStream>> {
    connect_from("127.0.0.1", config, server).await
}

/// The same, from another address of this machine.
pub async fn connect_from(
    source: &str,
    config: &Arc<ClientConfig>,
    server: SocketAddr,
) -> std::io::Result<TlsStream<TcpStream>> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(format!("{source}:0").parse().unwrap())?;
    let stream = socket.connect(server).await?;
    let name = ServerName::try_from("localhost").unwrap();
    timeout(HUNG, TlsConnector::from(Arc::clone(config)).connect(name, stream)).await.expect("an answer")
}

/// gRPC over such a connection; each one that is made anew, too.
pub async fn channel(config: &Arc<ClientConfig>, server: SocketAddr) -> Channel {
    let config = Arc::clone(config);
    let connector = tower::service_fn(move |_| {
        let config = Arc::clone(&config);
        async move { connect(&config, server).await.map(hyper_util::rt::TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://localhost");
    endpoint.connect_with_connector(connector).await.expect("the listener answers")
}

/// A connection that the server took, down to the frames of HTTP/2: it never connects anew.
pub struct Taken {
    stream: TlsStream<TcpStream>,
    seen: Vec<u8>,
}

impl Taken {
    /// Connects; `None` where the server turns the client away.
    pub async fn connect(config: &Arc<ClientConfig>, server: SocketAddr) -> Option<Self> {
        Self::over(connect(config, server).await.ok()?).await
    }

    /// Begins to speak HTTP/2 (RFC 9113, section 3.4), and waits for the server to do so.
    pub async fn over(mut stream: TlsStream<TcpStream>) -> Option<Self> {
        let settings = [0_u8, 0, 0, 4, 0, 0, 0, 0, 0];
        let begun = stream.write_all(&[&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &settings].concat()).await;
        begun.and(stream.flush().await).ok()?;
        let mut taken = Self { stream, seen: Vec::new() };
        taken.read().await.then_some(taken)
    }

    /// What the server presented.
    pub fn server_certificate(&self) -> Vec<u8> {
        self.stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
    }

    /// Whether the handshake took up an earlier session.
    pub fn is_resumed(&self) -> bool {
        self.stream.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed)
    }

    /// Whether the server answers a PING frame (RFC 9113, section 6.7).
    pub async fn answers(&mut self) -> bool {
        let (ping, pong) = ([0_u8, 0, 8, 6, 0, 0, 0, 0, 0], [0_u8, 0, 8, 6, 1, 0, 0, 0, 0]);
        let sent = self.stream.write_all(&[&ping[..], b"are you?"].concat()).await;
        if sent.and(self.stream.flush().await).is_err() {
            return false;
        }
        let answer = [&pong[..], b"are you?"].concat();
        self.seen.clear();
        while !self.seen.windows(answer.len()).any(|window| window == answer) {
            if !self.read().await {
                return false;
            }
        }
        true
    }

    /// Waits until the server closes it.
    pub async fn closed(&mut self) {
        while self.read().await {}
    }

    /// Reads once; whether there was anything.
    async fn read(&mut self) -> bool {
        let mut buffer = [0; 1_024];
        let read = timeout(HUNG, self.stream.read(&mut buffer)).await.expect("a word, or an end");
        let count = read.unwrap_or(0);
        self.seen.extend(&buffer[..count]);
        count > 0
    }
}
