//! A connection to one broker, and what each call over it presents.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{self, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use http::Uri;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::body::Body;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{self, Channel, Endpoint};
use tonic::{Code, Request, Status};
use tower::Service;
use zeroize::Zeroizing;

use super::address::{Address, MEND};
use super::error::{ClientError, is_late, ours, root_cause};
use super::network::Network;
use super::tls::TlsOptions;
use crate::error::Reason;
use crate::proto::v1;
use crate::secret::SecretValue;

use v1::audit_service_client::AuditServiceClient;
use v1::cache_service_client::CacheServiceClient;
use v1::key_service_client::KeyServiceClient;
use v1::policy_service_client::PolicyServiceClient;
use v1::rotation_service_client::RotationServiceClient;
use v1::secret_service_client::SecretServiceClient;
use v1::token_service_client::TokenServiceClient;

/// The longest deadline that a call may name.
pub const LONGEST_DEADLINE: Duration = Duration::from_secs(3_600);

/// 500 values of 64 KiB each, with room for what surrounds them; as much for 10,000 audit records.
const LARGEST_ANSWER: usize = 64 * 1024 * 1024;
/// How often a network that says nothing is asked whether it is still there, and how long it has to answer.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(10));

/// What carries a call: the connection, and this side's token and deadline.
type Carrier = InterceptedService<Line, Presenting>;

/// The client of the service for secrets.
pub type Secrets = SecretServiceClient<Carrier>;
/// The client of the service for policies.
pub type Policies = PolicyServiceClient<Carrier>;
/// The client of the service for the audit log.
pub type Audit = AuditServiceClient<Carrier>;
/// The client of the service for tokens.
pub type Tokens = TokenServiceClient<Carrier>;
/// The client of the service for the broker's keys.
pub type Keys = KeyServiceClient<Carrier>;
/// The client of the service for the broker's caches.
pub type Caches = CacheServiceClient<Carrier>;
/// The client of the service for rotations.
pub type Rotations = RotationServiceClient<Carrier>;

/// A connection to one broker. Cheap to clone; connects again by itself when the broker was restarted.
#[derive(Debug, Clone)]
pub struct Connection {
    line: Line,
    presenting: Presenting,
}

impl Connection {
    /// Connects to `address`. Every call presents `token`, where there is one, and may take `timeout` (at most
    /// [`LONGEST_DEADLINE`]). An `https://` broker is known by the system's certificate authorities.
    ///
    /// A Unix socket is used only where its server's user id is 0, this process's own, or that of the owner of the
    /// socket's folder, provided that nobody else may write to that folder: anyone who can may put a socket there.
    ///
    /// # Errors
    /// [`Reason::Unavailable`] where nobody answers, [`Reason::Unauthenticated`] where the wrong one does,
    /// [`Reason::InvalidArgument`] for a token that can't be one.
    pub async fn open(
        address: &Address,
        token: Option<&SecretValue>,
        timeout: Duration,
    ) -> Result<Self, ClientError> {
        Self::open_with(address, &TlsOptions::default(), token, timeout).await
    }

    /// The same, with another idea of whom to trust, and a client certificate.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`Reason::InvalidCertificate`] for files that can't be used. That a broker wants a
    /// client certificate, or does not accept the one presented, shows at the first call at the latest:
    /// [`Reason::Unauthenticated`].
    pub async fn open_with(
        address: &Address,
        tls: &TlsOptions,
        token: Option<&SecretValue>,
        timeout: Duration,
    ) -> Result<Self, ClientError> {
        let deadline = timeout.min(LONGEST_DEADLINE);
        let authorization = token.map(bearer).transpose()?;
        let presenting = Presenting { authorization, deadline: Some(deadline) };
        Ok(Self { line: Line::open(address, tls, deadline).await?, presenting })
    }

    /// The same connection under another token.
    ///
    /// # Errors
    /// [`Reason::InvalidArgument`] for a token that can't be one.
    pub(super) fn with_token(&self, token: &SecretValue) -> Result<Self, ClientError> {
        let presenting = Presenting { authorization: Some(bearer(token)?), ..self.presenting.clone() };
        Ok(Self { line: self.line.clone(), presenting })
    }

    /// The same connection with another deadline for each call, or none.
    #[must_use]
    pub(super) fn with_deadline(&self, deadline: Option<Duration>) -> Self {
        Self { line: self.line.clone(), presenting: Presenting { deadline, ..self.presenting.clone() } }
    }

    /// Secrets.
    #[must_use]
    pub fn secrets(&self) -> Secrets {
        SecretServiceClient::new(self.carrier()).max_decoding_message_size(LARGEST_ANSWER)
    }

    /// Secrets without a deadline: for `WatchSecrets`, which ends when its caller or the broker does.
    #[must_use]
    pub fn secrets_without_deadline(&self) -> Secrets {
        self.with_deadline(None).secrets()
    }

    /// Policies.
    #[must_use]
    pub fn policies(&self) -> Policies {
        PolicyServiceClient::new(self.carrier())
    }

    /// The audit log, but for following it.
    #[must_use]
    pub fn audit(&self) -> Audit {
        AuditServiceClient::new(self.carrier()).max_decoding_message_size(LARGEST_ANSWER)
    }

    /// The audit log without a deadline: for `Tail`, which ends when its caller or the broker does.
    #[must_use]
    pub fn audit_without_deadline(&self) -> Audit {
        AuditServiceClient::new(self.with_deadline(None).carrier())
    }

    /// Tokens.
    #[must_use]
    pub fn tokens(&self) -> Tokens {
        TokenServiceClient::new(self.carrier())
    }

    /// The broker's keys.
    #[must_use]
    pub fn keys(&self) -> Keys {
        KeyServiceClient::new(self.carrier())
    }

    /// The broker's keys without a deadline: for `RotateRootKey`, which takes as long as there are keys to wrap.
    #[must_use]
    pub fn keys_without_deadline(&self) -> Keys {
        self.with_deadline(None).keys()
    }

    /// The broker's caches.
    #[must_use]
    pub fn caches(&self) -> Caches {
        CacheServiceClient::new(self.carrier())
    }

    /// Rotations.
    #[must_use]
    pub fn rotations(&self) -> Rotations {
        RotationServiceClient::new(self.carrier())
    }

    /// Rotations without a deadline: for `Rotate` and `RotateDue`, which take as long as the targets do.
    #[must_use]
    pub fn rotations_without_deadline(&self) -> Rotations {
        self.with_deadline(None).rotations()
    }

    fn carrier(&self) -> Carrier {
        InterceptedService::new(self.line.clone(), self.presenting.clone())
    }
}

/// A channel that says what its failures mean, and whether they leave a doubt: what the transport says helps nobody.
#[derive(Debug, Clone)]
pub struct Line {
    channel: Channel,
    network: Option<Arc<Network>>,
}

impl Line {
    async fn open(address: &Address, tls: &TlsOptions, deadline: Duration) -> Result<Self, ClientError> {
        let mut network = None;
        let channel = match address {
            Address::Unix(path) => {
                let path: Arc<Path> = path.as_path().into();
                let connector = tower::service_fn(move |_: Uri| {
                    let path = Arc::clone(&path);
                    async move { connect_unix(&path).await.map(TokioIo::new) }
                });
                stand_in().connect_timeout(deadline).connect_with_connector(connector).await
            }
            Address::Http(uri) | Address::Https(uri) => {
                let shared = Arc::new(Network::new(address, uri, tls)?);
                network = Some(Arc::clone(&shared));
                let connector = tower::service_fn(move |_: Uri| {
                    let network = Arc::clone(&shared);
                    async move { network.connect().await.map(TokioIo::new) }
                });
                let endpoint = kept_alive(stand_in()).origin(uri.clone()).connect_timeout(deadline);
                endpoint.connect_with_connector(connector).await
            }
        };
        let channel = channel.map_err(|error| unreachable(address, &error))?;
        Ok(Self { channel, network })
    }
}

/// An endpoint for a connector of our own, which does not look at its name; nothing else resolves it.
fn stand_in() -> Endpoint {
    Endpoint::from_static("http://localhost")
}

/// A peer that vanished without a word is noticed while a call waits for it.
fn kept_alive(endpoint: Endpoint) -> Endpoint {
    endpoint.http2_keep_alive_interval(KEEP_ALIVE.0).keep_alive_timeout(KEEP_ALIVE.1)
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl Service<http::Request<Body>> for Line {
    type Response = http::Response<Body>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<http::Response<Body>, BoxError>>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<(), BoxError>> {
        self.channel.poll_ready(cx).map_err(BoxError::from)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let changes = changes(request.uri().path());
        let network = self.network.clone();
        let answer = self.channel.call(request);
        async move {
            match answer.await {
                Ok(answer) if changes => Ok(answer.map(|body| Body::new(Doubtful(body)))),
                Ok(answer) => Ok(answer),
                Err(error) => Err(BoxError::from(explained(error, changes, network.as_deref()).await)),
            }
        }
        .boxed()
    }
}

/// Whether a call changes something, by its path (`/PACKAGE.SERVICE/METHOD`). One that is not known here does: rather a
/// doubt too many than one too few.
fn changes(path: &str) -> bool {
    let (_, method) = path.rsplit_once('/').unwrap_or_default();
    !matches!(
        method,
        "GetSecret"
            | "BatchGetSecrets"
            | "ListSecrets"
            | "DescribeSecret"
            | "WatchSecrets"
            | "ListConsumers"
            | "Check"
            | "Explain"
            | "Query"
            | "Tail"
            | "Verify"
            | "ListTokens"
            | "GetKeyStatus"
            | "GetCacheStatistics"
            | "GetRotation"
            | "ListRotations"
    )
}

async fn explained(error: transport::Error, changes: bool, network: Option<&Network>) -> ClientError {
    let (found, late) = (ours(&error), is_late(&error));
    if let Some(found) = found {
        return found;
    }
    if let Some(network) = network.filter(|_| !late)
        && let Some(meaning) = network.meaning().await
    {
        return meaning;
    }
    let failed = ClientError::from(Status::from_error(Box::new(error)));
    if changes { failed.doubtful() } else { failed }
}

/// The answer to a call that changes something.
struct Doubtful(Body);

impl HttpBody for Doubtful {
    type Data = Bytes;
    type Error = ClientError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ClientError>>> {
        Pin::new(&mut self.0).poll_frame(cx).map_err(|cut| ClientError::from(cut).doubtful())
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}

/// What each call presents: the token, and by when an answer is wanted.
#[derive(Clone)]
pub struct Presenting {
    authorization: Option<MetadataValue<Ascii>>,
    deadline: Option<Duration>,
}

impl Interceptor for Presenting {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(authorization) = &self.authorization {
            request.metadata_mut().insert("authorization", authorization.clone());
        }
        if let Some(deadline) = self.deadline {
            request.set_timeout(deadline);
        }
        Ok(request)
    }
}

impl fmt::Debug for Presenting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Presenting")
            .field("authorization", &self.authorization.as_ref().map(|_| "[redacted]"))
            .field("deadline", &self.deadline)
            .finish()
    }
}

/// The header that presents `token`, marked so that neither logs nor header compression keep it.
fn bearer(token: &SecretValue) -> Result<MetadataValue<Ascii>, ClientError> {
    let refuse = || ClientError::invalid("the token is not one: a token is printable ASCII without spaces");
    let text = token
        .expose_text()
        .filter(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic()));
    let header = Zeroizing::new(["Bearer ", text.ok_or_else(refuse)?].concat());
    let mut value: MetadataValue<Ascii> = header.parse().map_err(|_| refuse())?;
    value.set_sensitive(true);
    Ok(value)
}

/// Connects to a socket and looks at who serves it.
async fn connect_unix(path: &Path) -> Result<UnixStream, ClientError> {
    let shown = path.display();
    let failed = |error: &io::Error| ClientError::unavailable(no_broker_at(path, error));
    let stream = UnixStream::connect(path).await.map_err(|error| failed(&error))?;
    let server = stream.peer_cred().map_err(|error| failed(&error))?.uid();
    let folder = path.parent().and_then(|folder| std::fs::metadata(folder).ok());
    let folder = folder.map(|folder| (folder.uid(), folder.mode()));
    if !may_serve(server, rustix::process::geteuid().as_raw(), folder) {
        let message = format!(
            "unix://{shown} is served by uid {server}, which is neither root, nor you, nor the owner of a folder that \
             only its owner may write to; ask whoever set it up, or set --address"
        );
        return Err(ClientError::new(Reason::Unauthenticated, Code::Unauthenticated, message));
    }
    Ok(stream)
}

/// Whether `server` may serve a socket in a folder of this owner and mode. A sticky bit does not help: it keeps others
/// from removing a socket, not from being first.
fn may_serve(server: u32, own: u32, folder: Option<(u32, u32)>) -> bool {
    const WRITABLE_BY_OTHERS: u32 = 0o022;
    server == 0
        || server == own
        || folder.is_some_and(|(owner, mode)| owner == server && mode & WRITABLE_BY_OTHERS == 0)
}

fn no_broker_at(path: &Path, error: &io::Error) -> String {
    let shown = path.display();
    match error.kind() {
        io::ErrorKind::NotFound => format!("no broker at unix://{shown}: there is no such socket; {MEND}"),
        io::ErrorKind::ConnectionRefused => {
            format!("no broker at unix://{shown}: nobody listens there; {MEND}")
        }
        io::ErrorKind::PermissionDenied => {
            format!(
                "no access to unix://{shown}: its permissions keep you out; ask for access, or set --address"
            )
        }
        _ => format!("no broker at unix://{shown}: {error}; {MEND}"),
    }
}

fn unreachable(address: &Address, error: &tonic::transport::Error) -> ClientError {
    ours(error).unwrap_or_else(|| {
        ClientError::unavailable(format!("no broker at {address}: {}; {MEND}", root_cause(error)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;
    use std::collections::BTreeSet;

    #[test]
    fn every_call_of_the_api_is_known_as_one_that_changes_something_or_not() {
        let described = prost_types::FileDescriptorSet::decode(crate::proto::FILE_DESCRIPTOR_SET).unwrap();
        let changing: BTreeSet<&str> = described
            .file
            .iter()
            .flat_map(|file| &file.service)
            .flat_map(|service| &service.method)
            .filter_map(|method| method.name.as_deref())
            .filter(|method| changes(&format!("/claviger.v1.Service/{method}")))
            .collect();
        let expected = [
            "AbortRotation",
            "CreateToken",
            "DeleteSecret",
            "MoveLabel",
            "PauseRotation",
            "PurgeCache",
            "PutSecret",
            "Reload",
            "RemoveRotation",
            "ReportVersionInUse",
            "RestoreSecret",
            "ResumeRotation",
            "RevokeToken",
            "RollbackSecret",
            "Rotate",
            "RotateAuditKey",
            "RotateDue",
            "RotateRootKey",
            "SetRotation",
        ];
        assert_eq!(changing.into_iter().collect::<Vec<_>>(), expected);
        assert!(changes("/claviger.v2.SecretService/FromTheFuture"));
    }

    #[tokio::test]
    async fn an_answer_that_is_cut_leaves_doubt_about_a_change() {
        let cut = || {
            let mut cut = Status::internal("h2 protocol error");
            cut.set_source(Arc::new(io::Error::from(io::ErrorKind::BrokenPipe)));
            futures_util::stream::iter([Err::<Bytes, _>(cut)])
        };
        let mut body = Body::new(Doubtful(Body::new(axum::body::Body::from_stream(cut()))));
        let frame = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await;
        let error = ClientError::from(frame.unwrap().unwrap_err());
        assert_eq!(error.reason, Reason::Unavailable);
        assert!(error.message.ends_with("; a change may still take effect"), "{error}");
    }

    #[tokio::test]
    async fn a_token_changes_and_the_connection_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.sock");
        let _listener = tokio::net::UnixListener::bind(&path).unwrap();
        let connection = Connection::open(&Address::Unix(path), None, Duration::from_secs(5)).await.unwrap();
        let token = SecretValue::text("clv_0123456789abcdef_x".to_owned()).unwrap();
        let renewed = connection.with_token(&token).unwrap().with_deadline(None);
        assert!(renewed.presenting.authorization.is_some() && renewed.presenting.deadline.is_none());
        assert!(!format!("{renewed:?}").contains("clv_"));
        assert!(connection.with_token(&SecretValue::text(String::new()).unwrap()).is_err());
    }

    #[test]
    fn who_may_serve_a_socket() {
        let private = Some((7, 0o40755));
        assert!(may_serve(0, 1000, None), "root");
        assert!(may_serve(1000, 1000, Some((0, 0o41777))), "oneself, also in /tmp");
        assert!(may_serve(7, 1000, private), "the folder's owner");
        assert!(!may_serve(8, 1000, private), "someone else");
        assert!(!may_serve(7, 1000, Some((7, 0o40775))), "a folder that a group may write to");
        assert!(!may_serve(7, 1000, Some((7, 0o41777))), "a folder that all may write to, sticky or not");
        assert!(!may_serve(7, 1000, None), "a folder that can't be looked at");
    }

    #[tokio::test]
    async fn a_missing_broker_is_said_with_its_address() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("none.sock");
        let open = |address| async move {
            Connection::open(&address, None, Duration::from_secs(5)).await.map(|_| ()).unwrap_err()
        };
        let error = open(Address::Unix(path.clone())).await;
        assert_eq!((error.reason, error.code), (Reason::Unavailable, Code::Unavailable));
        assert!(error.message.contains("none.sock") && error.message.contains("no such socket"), "{error}");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let error = open(Address::Unix(path)).await;
        assert!(error.message.contains("nobody listens"), "{error}");
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = open(Address::parse(&format!("http://{closed}")).unwrap()).await;
        assert_eq!(error.reason, Reason::Unavailable);
        assert!(
            error.message.contains(&closed.to_string()) && error.message.contains("--address"),
            "{error}"
        );
    }

    #[test]
    fn a_call_says_who_calls_and_by_when() {
        let token = SecretValue::text("clv_0123456789abcdef_x".to_owned()).unwrap();
        let mut presenting = Presenting {
            authorization: Some(bearer(&token).unwrap()),
            deadline: Some(Duration::from_secs(30)),
        };
        let request = presenting.call(Request::new(())).unwrap();
        let header = request.metadata().get("authorization").unwrap();
        assert_eq!(header.to_str().unwrap(), "Bearer clv_0123456789abcdef_x");
        assert!(header.is_sensitive());
        assert!(request.metadata().contains_key("grpc-timeout"));
        assert!(!format!("{presenting:?}{request:?}").contains("clv_"));
        let mut endless = Presenting { authorization: None, deadline: None };
        assert!(endless.call(Request::new(())).unwrap().metadata().is_empty());
    }

    #[test]
    fn what_can_not_be_a_token_is_refused_without_showing_it() {
        for bad in ["", "two words", "line\nbreak", "tökén"] {
            let error = bearer(&SecretValue::text(bad.to_owned()).unwrap()).unwrap_err();
            assert_eq!(error.reason, Reason::InvalidArgument);
            assert!(bad.is_empty() || !error.message.contains(bad), "{error}");
        }
        assert!(bearer(&SecretValue::binary(b"clv".to_vec()).unwrap()).is_err());
    }
}
