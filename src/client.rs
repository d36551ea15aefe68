//! What asks a broker: an address, a connection, typed clients, errors with their stable reason.
//!
//! ```text
//! Address ─▶ Connection::open ─▶ secrets() policies() audit() tokens() ─▶ generated calls
//!               │                        each call carries the token and a deadline
//!               └─ Unix socket: the kernel says who serves it, before the first byte is sent
//! ```
//!
//! INVARIANT: neither a token nor a value goes where others could read it: plain HTTP only on loopback, a Unix socket
//! only where someone serves it who may (see [`Connection::open`]).
//!
//! What wiping does not reach: the header that carries the token, and the buffers of the HTTP/2 library.

use std::error::Error;
use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;
use zeroize::{Zeroize as _, Zeroizing};

use crate::error::{Reason, Reasoned};
use crate::proto::v1;
use crate::secret::{ContentType, SecretValue};

use v1::audit_service_client::AuditServiceClient;
use v1::policy_service_client::PolicyServiceClient;
use v1::secret_service_client::SecretServiceClient;
use v1::token_service_client::TokenServiceClient;

/// The socket of the system's broker.
pub const SYSTEM_SOCKET: &str = "/run/claviger/claviger.sock";
/// The file name of a broker's socket.
pub const SOCKET_NAME: &str = "claviger.sock";
/// The longest deadline that a call may name.
pub const LONGEST_DEADLINE: Duration = Duration::from_secs(3_600);

/// The domain of every [`Reason`] on the wire.
const DOMAIN: &str = "claviger";
/// 500 values of 64 KiB each, with room for what surrounds them; as much for 10,000 audit records.
const LARGEST_ANSWER: usize = 64 * 1024 * 1024;

/// Where a broker listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket, by its absolute path.
    Unix(PathBuf),
    /// Plain HTTP/2 on a loopback address.
    Http(Uri),
}

impl Address {
    /// Parses `unix:///path` or `http://host[:port]`, the latter only where the host is a loopback address.
    ///
    /// # Errors
    /// [`Reason::InvalidArgument`]; [`Reason::Unsupported`] for `https://`. Of a URL they name scheme and host alone:
    /// people put passwords and tokens into the rest.
    pub fn parse(text: &str) -> Result<Self, ClientError> {
        let refuse = |problem: &str| ClientError::invalid(format!("address `{}`: {problem}", repeated(text)));
        match text.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(("unix", _)) => {
                Err(refuse("the path of a socket is absolute; write unix:///run/claviger/claviger.sock"))
            }
            Some(("http", _)) => loopback(text).map(Self::Http).map_err(refuse),
            Some(("https", _)) => Err(ClientError {
                reason: Reason::Unsupported,
                ..refuse("this build does not speak TLS; use unix:///path, or http:// on a loopback address")
            }),
            _ => Err(refuse("is neither unix:///path nor http://host:port")),
        }
    }

    /// The first of the places where a broker of this machine listens that has a socket: `claviger.sock` in the
    /// caller's runtime folder (`$XDG_RUNTIME_DIR`, where there is one), then [`SYSTEM_SOCKET`].
    ///
    /// # Errors
    /// [`Reason::Unavailable`] where there is none; names the places.
    pub fn find(runtime_folder: Option<&Path>) -> Result<Self, ClientError> {
        let own = runtime_folder.map(|folder| folder.join(SOCKET_NAME));
        let places: Vec<PathBuf> = own.into_iter().chain([PathBuf::from(SYSTEM_SOCKET)]).collect();
        if let Some(found) = places.iter().find(|place| place.exists()) {
            return Ok(Self::Unix(found.clone()));
        }
        let places: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
        let message = format!("no broker: there is no socket at {}; {MEND}", places.join(" or "));
        Err(ClientError::unavailable(message))
    }
}

const MEND: &str = "start one with `claviger dev` or `claviger serve`, or set --address";

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Http(uri) => {
                write!(f, "http://{}", uri.authority().map_or("", |authority| authority.as_str()))
            }
        }
    }
}

/// As much of an address as an error repeats: of a URL its scheme and host, of a path all of it; nothing that stands
/// before an `@`, and no token.
fn repeated(text: &str) -> String {
    const MOST: usize = 128;
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let host = match scheme {
        "unix" => rest,
        // The last one: a password may hold others.
        _ => rest.rsplit_once('@').map_or(rest, |(_, behind)| behind),
    };
    let host = match scheme {
        "" | "unix" => host,
        _ => host.split(['/', '?', '#']).next().unwrap_or_default(),
    };
    let host = host.split_once("clv_").map_or(host, |(before, _)| before);
    let separator = if text.contains("://") { "://" } else { "" };
    let shown = scheme.chars().chain(separator.chars()).chain(host.chars());
    shown.take(MOST).flat_map(char::escape_default).collect()
}

/// An address that plain HTTP may be spoken to.
fn loopback(text: &str) -> Result<Uri, &'static str> {
    let uri: Uri = text.parse().map_err(|_| "is not a URL; write http://127.0.0.1:port")?;
    let authority = uri.authority().ok_or("names no host; write http://127.0.0.1:port")?;
    if authority.as_str().contains('@') {
        return Err("holds a user name; a token goes into CLAVIGER_TOKEN or a --token-file");
    }
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err("has a path or a query; write http://127.0.0.1:port");
    }
    let host = authority.host().trim_matches(['[', ']']);
    let is_loopback =
        host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    if !is_loopback {
        return Err(
            "would send secrets in the clear; plain http:// is for loopback addresses, use unix:///path",
        );
    }
    Ok(uri)
}

/// Why a call was not answered as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ClientError {
    /// The stable reason: the broker's own, or this side's where the broker could not be asked.
    pub reason: Reason,
    /// The gRPC code.
    pub code: Code,
    /// What is wrong and the mend; never a value.
    pub message: String,
    /// The request's id, as the broker's audit log has it; `None` where no broker answered.
    pub request_id: Option<String>,
}

impl Reasoned for ClientError {
    fn reason(&self) -> Reason {
        self.reason
    }
}

impl ClientError {
    fn new(reason: Reason, code: Code, message: impl Into<String>) -> Self {
        Self { reason, code, message: message.into(), request_id: None }
    }

    fn invalid(message: impl Into<String>) -> Self {
        Self::new(Reason::InvalidArgument, Code::InvalidArgument, message)
    }

    fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Reason::Unavailable, Code::Unavailable, message)
    }

    /// An answer that breaks the protocol, which says what.
    #[must_use]
    pub fn malformed(what: &str) -> Self {
        let message = format!("the broker's answer {what}; is it of another version?");
        Self::new(Reason::Internal, Code::Internal, message)
    }
}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        if let Some(ours) = chain(&status).find_map(|error| error.downcast_ref::<Self>()) {
            return ours.clone();
        }
        let info = status.get_details_error_info().filter(|info| info.domain == DOMAIN);
        let Some(mut info) = info else { return without_details(&status) };
        Self {
            // A reason that this side does not know comes from a newer broker; its code still says what kind it is.
            reason: Reason::from_code(&info.reason).unwrap_or_else(|| presumed(status.code())),
            code: status.code(),
            message: status.message().to_owned(),
            request_id: info.metadata.remove("request_id"),
        }
    }
}

impl From<v1::Problem> for ClientError {
    fn from(problem: v1::Problem) -> Self {
        let code = Code::from_i32(problem.code);
        let reason = Reason::from_code(&problem.reason).unwrap_or_else(|| presumed(code));
        Self { reason, code, message: problem.message, request_id: None }
    }
}

/// A status that no broker wrote: the transport's own, or another server's.
fn without_details(status: &Status) -> ClientError {
    let code = status.code();
    if chain(status).any(|error| error.is::<tonic::TimeoutExpired>()) {
        let message =
            "the deadline passed before there was an answer; a change may still take effect; raise --timeout";
        return ClientError::new(Reason::DeadlineExceeded, Code::DeadlineExceeded, message);
    }
    let said = shown(status.message());
    match code {
        Code::Unavailable | Code::Unknown | Code::Cancelled => {
            let cause = status.source().map_or(said, root_cause);
            ClientError::unavailable(format!(
                "the connection to the broker failed: {cause}; a change may still take effect"
            ))
        }
        Code::Unimplemented => {
            let message = "the broker does not know this call; is it of another version?";
            ClientError::new(Reason::Unsupported, code, message)
        }
        code => ClientError::new(presumed(code), code, format!("the broker answered {code:?}: {said}")),
    }
}

/// The reason that a code suggests where none is given.
const fn presumed(code: Code) -> Reason {
    match code {
        Code::InvalidArgument | Code::OutOfRange => Reason::InvalidArgument,
        Code::Unauthenticated => Reason::Unauthenticated,
        Code::PermissionDenied => Reason::Denied,
        Code::NotFound => Reason::SecretNotFound,
        Code::Aborted | Code::AlreadyExists | Code::FailedPrecondition => Reason::Conflict,
        Code::ResourceExhausted => Reason::LimitExceeded,
        Code::DeadlineExceeded => Reason::DeadlineExceeded,
        Code::Unavailable => Reason::Unavailable,
        Code::Unimplemented => Reason::Unsupported,
        Code::DataLoss => Reason::Tampered,
        _ => Reason::Internal,
    }
}

/// An error and what caused it, outermost first.
fn chain<'e>(error: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| (*error).source())
}

fn root_cause(error: &(dyn Error + 'static)) -> String {
    chain(error).last().map(|error| shown(&error.to_string())).unwrap_or_default()
}

/// Foreign text on one line, cut where it is long.
fn shown(text: &str) -> String {
    let escaped = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    escaped.take(256).collect()
}

/// The client of the service for secrets.
pub type Secrets = SecretServiceClient<InterceptedService<Channel, Presenting>>;
/// The client of the service for policies.
pub type Policies = PolicyServiceClient<InterceptedService<Channel, Presenting>>;
/// The client of the service for the audit log.
pub type Audit = AuditServiceClient<InterceptedService<Channel, Presenting>>;
/// The client of the service for tokens.
pub type Tokens = TokenServiceClient<InterceptedService<Channel, Presenting>>;

/// A connection to one broker. Cheap to clone; connects again by itself when the broker was restarted.
#[derive(Debug, Clone)]
pub struct Connection {
    channel: Channel,
    presenting: Presenting,
}

impl Connection {
    /// Connects to `address`. Every call presents `token`, where there is one, and may take `timeout` (at most
    /// [`LONGEST_DEADLINE`]).
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
        let deadline = timeout.min(LONGEST_DEADLINE);
        let presenting =
            Presenting { authorization: token.map(bearer).transpose()?, deadline: Some(deadline) };
        let channel = match address {
            Address::Unix(path) => {
                let path: Arc<Path> = path.as_path().into();
                let connector = tower::service_fn(move |_: Uri| {
                    let path = Arc::clone(&path);
                    async move { connect_unix(&path).await.map(TokioIo::new) }
                });
                // The name is what HTTP/2 wants to see as authority; nothing resolves it.
                let endpoint = Endpoint::from_static("http://localhost").connect_timeout(deadline);
                endpoint.connect_with_connector(connector).await
            }
            Address::Http(uri) => Endpoint::from(uri.clone()).connect_timeout(deadline).connect().await,
        };
        let channel = channel.map_err(|error| unreachable(address, &error))?;
        Ok(Self { channel, presenting })
    }

    /// Secrets.
    #[must_use]
    pub fn secrets(&self) -> Secrets {
        SecretServiceClient::new(self.service()).max_decoding_message_size(LARGEST_ANSWER)
    }

    /// Policies.
    #[must_use]
    pub fn policies(&self) -> Policies {
        PolicyServiceClient::new(self.service())
    }

    /// The audit log, but for following it.
    #[must_use]
    pub fn audit(&self) -> Audit {
        AuditServiceClient::new(self.service()).max_decoding_message_size(LARGEST_ANSWER)
    }

    /// The audit log without a deadline: for `Tail`, which ends when its caller or the broker does.
    #[must_use]
    pub fn audit_without_deadline(&self) -> Audit {
        let presenting = Presenting { deadline: None, ..self.presenting.clone() };
        AuditServiceClient::new(InterceptedService::new(self.channel.clone(), presenting))
    }

    /// Tokens.
    #[must_use]
    pub fn tokens(&self) -> Tokens {
        TokenServiceClient::new(self.service())
    }

    fn service(&self) -> InterceptedService<Channel, Presenting> {
        InterceptedService::new(self.channel.clone(), self.presenting.clone())
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
    match chain(error).find_map(|error| error.downcast_ref::<ClientError>()) {
        Some(ours) => ours.clone(),
        None => ClientError::unavailable(format!("no broker at {address}: {}; {MEND}", root_cause(error))),
    }
}

/// A value as it was received. The received buffer is wiped where nothing else holds it.
///
/// # Errors
/// Where the payload is not what its content type says.
pub fn received(payload: v1::SecretPayload) -> Result<SecretValue, ClientError> {
    let content_type = match payload.content_type() {
        v1::ContentType::Text => ContentType::Text,
        v1::ContentType::Binary => ContentType::Binary,
        v1::ContentType::Unspecified => return Err(ClientError::malformed("has a value of no known type")),
    };
    let value = SecretValue::new(payload.data.to_vec(), content_type);
    if let Ok(mut buffer) = payload.data.try_into_mut() {
        buffer.as_mut().zeroize();
    }
    value.map_err(|_| ClientError::malformed("has a value that is too large or not of its type"))
}

/// A value as it is sent.
#[must_use]
pub fn payload(value: &SecretValue) -> v1::SecretPayload {
    let content_type = match value.content_type() {
        ContentType::Text => v1::ContentType::Text,
        ContentType::Binary => v1::ContentType::Binary,
    };
    v1::SecretPayload { data: Bytes::copy_from_slice(value.expose()), content_type: content_type.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use tonic_types::ErrorDetails;

    #[test]
    fn addresses_are_sockets_or_loopback() {
        assert_eq!(Address::parse("unix:///run/c.sock").unwrap(), Address::Unix("/run/c.sock".into()));
        for good in [
            "http://127.0.0.1:8400",
            "http://localhost:8400",
            "http://[::1]:8400",
            "http://127.9.9.9",
            "http://[::1]:1/",
        ] {
            assert!(matches!(Address::parse(good), Ok(Address::Http(_))), "{good}");
        }
        assert_eq!(Address::parse("http://[::1]:8400/").unwrap().to_string(), "http://[::1]:8400");
    }

    #[test]
    fn other_addresses_are_refused_with_a_mend() {
        for (bad, part) in [
            ("", "neither"),
            ("/run/c.sock", "neither"),
            ("unix:/run/c.sock", "neither"),
            ("unix://run/c.sock", "absolute"),
            ("unix://", "absolute"),
            ("http://10.0.0.1:8400", "in the clear"),
            ("http://example.com", "in the clear"),
            ("http://127.0.0.1.example.com", "in the clear"),
            ("http://0.0.0.0:1", "in the clear"),
            ("http://me@127.0.0.1", "user name"),
            ("http://127.0.0.1/v1", "path"),
            ("http://127.0.0.1?x=1", "path"),
            ("http://", "URL"),
            ("ftp://127.0.0.1", "neither"),
            ("unix://a\nb", "absolute"),
        ] {
            let error = Address::parse(bad).unwrap_err();
            assert_eq!(error.reason, Reason::InvalidArgument, "{bad}");
            assert!(error.message.contains(part), "{bad}: {}", error.message);
            assert!(!error.message.contains('\n'), "{bad}");
        }
        assert_eq!(Address::parse("https://127.0.0.1").unwrap_err().reason, Reason::Unsupported);
    }

    #[test]
    fn what_is_secret_in_an_address_is_not_repeated() {
        for (bad, shown) in [
            ("http://me:s3cret@127.0.0.1:8400", "`http://127.0.0.1:8400`"),
            ("http://me:s3cret@example.com", "`http://example.com`"),
            ("http://me:s3cret/s3cret@s3cret@example.com/x", "`http://example.com`"),
            ("http://me:s3cret @example.com", "`http://example.com`"),
            ("http://s3cret@", "`http://`"),
            ("http://127.0.0.1/?token=s3cret", "`http://127.0.0.1`"),
            ("https://me:s3cret@example.com", "`https://example.com`"),
            ("ftp://me:s3cret@example.com", "`ftp://example.com`"),
            ("me:s3cret@example.com", "`example.com`"),
            ("clv_0123456789abcdef_s3cret", "``"),
            ("unix://run/c@1.sock", "`unix://run/c@1.sock`"),
        ] {
            let message = Address::parse(bad).unwrap_err().message;
            assert!(message.contains(shown) && !message.contains("s3cret"), "{bad}: {message}");
        }
    }

    #[test]
    fn the_runtime_folder_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join(SOCKET_NAME);
        std::fs::write(&socket, "").unwrap();
        assert_eq!(Address::find(Some(folder.path())).unwrap(), Address::Unix(socket.clone()));
        std::fs::remove_file(&socket).unwrap();
        if !Path::new(SYSTEM_SOCKET).exists() {
            let error = Address::find(Some(folder.path())).unwrap_err();
            assert_eq!(error.reason, Reason::Unavailable);
            assert!(
                error.message.contains(SYSTEM_SOCKET) && error.message.contains("claviger dev"),
                "{error}"
            );
        }
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

    #[test]
    fn a_status_gives_its_reason_and_request() {
        let metadata = HashMap::from([("request_id".to_owned(), "r-1".to_owned())]);
        let details = ErrorDetails::with_error_info("SECRET_NOT_FOUND", "claviger", metadata);
        let error: ClientError = Status::with_error_details(Code::NotFound, "no secret", details).into();
        assert_eq!(error.reason, Reason::SecretNotFound);
        assert_eq!((error.message.as_str(), error.request_id.as_deref()), ("no secret", Some("r-1")));
    }

    #[test]
    fn a_status_of_a_stranger_gives_the_reason_that_its_code_suggests() {
        let details = ErrorDetails::with_error_info("SECRET_NOT_FOUND", "elsewhere", HashMap::new());
        let error: ClientError = Status::with_error_details(Code::PermissionDenied, "no", details).into();
        assert_eq!((error.reason, error.request_id), (Reason::Denied, None));
        let details = ErrorDetails::with_error_info("FROM_THE_FUTURE", "claviger", HashMap::new());
        let error: ClientError = Status::with_error_details(Code::FailedPrecondition, "no", details).into();
        assert_eq!(error.reason, Reason::Conflict);
        let error = ClientError::from(Status::unknown("Service was not ready:\ntransport error"));
        assert_eq!(error.reason, Reason::Unavailable);
        assert!(!error.message.contains('\n'));
        assert_eq!(ClientError::from(Status::unimplemented("")).reason, Reason::Unsupported);
        let late = Status::from_error(Box::new(tonic::TimeoutExpired(())));
        assert_eq!(ClientError::from(late).reason, Reason::DeadlineExceeded);
    }

    #[test]
    fn an_item_of_a_batch_has_its_own_problem() {
        let problem = v1::Problem { code: 7, reason: "DENIED".to_owned(), message: "no".to_owned() };
        let error = ClientError::from(problem);
        assert_eq!((error.reason, error.code), (Reason::Denied, Code::PermissionDenied));
    }

    #[test]
    fn values_come_as_they_went() {
        for value in
            [SecretValue::text("é\n".to_owned()).unwrap(), SecretValue::binary(vec![0, 255]).unwrap()]
        {
            assert!(received(payload(&value)).unwrap().same_as(&value));
        }
        let untyped = v1::SecretPayload { data: Bytes::from_static(b"canary"), content_type: 9 };
        let error = received(untyped).unwrap_err();
        assert_eq!(error.reason, Reason::Internal);
        let not_text = v1::SecretPayload { data: Bytes::from_static(&[0xff]), content_type: 1 };
        assert!(!received(not_text).unwrap_err().message.contains("255"));
    }
}
