//! What every request passes before its service sees it: a request id, who is calling, how often, a deadline; and what
//! is counted and logged of it when it ends.
//!
//! ```text
//! request ─▶ account opens ─▶ who? ──known──▶ rate ─▶ answer ─▶ account closes: one count, one log line
//!                              └─stranger─▶ rate ─▶ record ─▶ UNAUTHENTICATED
//! ```
//!
//! Only `grpc.health.v1` is open to callers whom nobody knows.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Request, Response};
use hyper::body::Incoming;
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tower::ServiceExt as _;

use super::account::{self, Accounts};
use super::read;
use super::status::{status, status_after};
use super::transport::Reply;
use crate::broker::{Broker, BrokerError, Call};
use crate::error::{Reason, Reasoned as _};
use crate::identity::{Chain, IdentityError, Presented, Principal, SourceAddress};
use crate::proto::FILE_DESCRIPTOR_SET;
use crate::secret::SecretValue;
use crate::server::limits::{Limited, RateLimits};
use crate::server::listen::ConnectionInfo;
use crate::server::{House, Limits};

const OPEN: &str = "/grpc.health.v1.Health/";
const REQUEST_ID: &str = "x-request-id";

/// The path of every method that the door serves, as [`Metrics::new`](crate::telemetry::metrics::Metrics::new) takes
/// them.
#[must_use]
pub fn methods() -> Vec<String> {
    let sets = [
        FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
    ];
    let described = sets.into_iter().flat_map(described);
    described
        .flat_map(|(service, methods)| methods.into_iter().map(move |method| format!("/{service}/{method}")))
        .collect()
}

/// The full name of every service of ours.
pub(super) fn services() -> Vec<String> {
    described(FILE_DESCRIPTOR_SET).map(|(service, _)| service).collect()
}

/// Services by their full names, and their methods.
fn described(set: &[u8]) -> impl Iterator<Item = (String, Vec<String>)> + use<> {
    let files = FileDescriptorSet::decode(set).unwrap_or_default().file;
    files.into_iter().flat_map(|file| {
        let package = file.package.unwrap_or_default();
        file.service.into_iter().map(move |service| {
            let methods = service.method.into_iter().map(|method| method.name.unwrap_or_default());
            (format!("{package}.{}", service.name.unwrap_or_default()), methods.collect())
        })
    })
}

/// Who is calling, once that is known; in the request's extensions.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    principal: Arc<Principal>,
    source_address: SourceAddress,
    pub(super) request_id: Arc<str>,
}

impl Caller {
    /// The call as the broker takes it, with the reason that the message gave.
    pub(super) fn call(&self, reason: &str) -> Call {
        Call {
            principal: Arc::clone(&self.principal),
            source_address: self.source_address.clone(),
            request_id: Arc::clone(&self.request_id),
            reason: (!reason.is_empty()).then(|| reason.to_owned()),
        }
    }
}

/// The door, before all services.
#[derive(Clone)]
pub(super) struct Door {
    inner: Arc<Inner>,
}

struct Inner {
    broker: Arc<Broker>,
    identity: Arc<Chain>,
    rates: Arc<RateLimits>,
    accounts: Accounts,
    limits: Limits,
}

impl Door {
    /// A door to the house for whom it recognises, as often as its rates permit.
    pub(super) fn new(house: &House) -> Self {
        let House { broker, identity, rates, metrics, clock, limits, .. } = house;
        Self {
            inner: Arc::new(Inner {
                broker: Arc::clone(broker),
                identity: Arc::clone(identity),
                rates: Arc::clone(rates),
                accounts: Accounts::new(Arc::clone(metrics), Arc::clone(clock)),
                limits: *limits,
            }),
        }
    }

    /// One call, from its headers to its answer's.
    pub(super) async fn call(
        self,
        routes: Routes,
        request: Request<Incoming>,
        connection: Arc<ConnectionInfo>,
    ) -> Response<Reply> {
        let account = self.inner.accounts.open(&request, &connection.source);
        let mut response = if request.uri().path().starts_with(OPEN) {
            connection.renew();
            routed(routes, request.map(Body::new)).await
        } else {
            self.inner.answer(routes, request, &connection, &account.request_id).await
        };
        if let Ok(value) = HeaderValue::from_str(&account.request_id) {
            response.headers_mut().insert(REQUEST_ID, value);
        }
        account.close(&response);
        response
    }
}

/// What the services say. In a box: it is a large future, and few calls need it.
async fn routed(routes: Routes, request: Request<Body>) -> Response<Reply> {
    let answered: Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(routes.oneshot(request));
    match answered.await {
        Ok(response) => response.map(Reply::Other),
        Err(error) => {
            let error = format!("{error}");
            Status::internal(error).into_http().map(Reply::Other)
        }
    }
}

/// Why a call goes no further.
struct Refusal {
    status: Status,
    /// One of many alike, which the log does not name one by one.
    quiet: bool,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self { status, quiet: false }
    }
}

impl Inner {
    /// The answer to a call that is not open to everyone.
    async fn answer(
        &self,
        routes: Routes,
        request: Request<Incoming>,
        connection: &ConnectionInfo,
        request_id: &Arc<str>,
    ) -> Response<Reply> {
        let deadline = match deadline(&request, self.limits.deadline) {
            Ok(deadline) => deadline,
            // Nobody knows yet whose call it is.
            Err(error) => return refused(Refusal { status: status(&error, request_id), quiet: true }),
        };
        let served = async {
            let presented = presented(&request, connection);
            match self.caller(presented, &connection.source, request_id).await {
                Ok(caller) => {
                    connection.known();
                    self.serve(routes, request, caller).await
                }
                Err(refusal) => refused(refusal),
            }
        };
        match tokio::time::timeout(deadline, served).await {
            Ok(response) if too_large(&response) => refused(status(&oversized(), request_id).into()),
            Ok(response) => response,
            Err(_) => refused(status(&late(), request_id).into()),
        }
    }

    /// What a caller who is known gets.
    async fn serve(&self, routes: Routes, request: Request<Incoming>, caller: Caller) -> Response<Reply> {
        let mut request = if read::is_read(&request) {
            let (head, body) = request.into_parts();
            match read::read(body, self.limits.message_bytes).await {
                read::Body::Message(message) => {
                    let answer = read::answer(&self.broker, &caller, message).await;
                    return answer.unwrap_or_else(|status| refused(status.into()));
                }
                read::Body::Other(body) => Request::from_parts(head, Body::new(body)),
            }
        } else {
            request.map(Body::new)
        };
        request.extensions_mut().insert(caller);
        routed(routes, request).await
    }

    /// Who is calling. A caller whom nobody knows, or who calls too often, is on record before they hear so.
    async fn caller(
        &self,
        presented: Result<Presented, IdentityError>,
        source_address: &SourceAddress,
        request_id: &Arc<str>,
    ) -> Result<Caller, Refusal> {
        let known = match presented {
            Ok(presented) => self.identity.authenticate(&presented).await,
            Err(error) => Err(error),
        };
        match known {
            Ok(principal) => {
                let (source_address, request_id) = (source_address.clone(), Arc::clone(request_id));
                let caller = Caller { principal, source_address, request_id };
                match self.rates.admit(&caller.principal, &caller.source_address) {
                    Ok(()) => Ok(caller),
                    Err(limited) => Err(Box::pin(self.turned_away(&caller, &limited)).await),
                }
            }
            Err(error) => Err(Box::pin(self.not_let_in(source_address, request_id, &error)).await),
        }
    }

    /// A caller who is known and calls too often. Only now and then is there a record, which counts the others: a flood
    /// must not fill the log.
    async fn turned_away(&self, caller: &Caller, limited: &Limited) -> Refusal {
        let request_id = &caller.request_id;
        let Some(times) = limited.unrecorded else {
            return Refusal { status: status_after(limited, request_id, limited.retry_after), quiet: true };
        };
        let call = caller.call("");
        let error = self.broker.record_rejected(&call, "rate_limit", ("", ""), counted(limited, times)).await;
        status_after(&error, request_id, limited.retry_after).into()
    }

    /// A caller whom nobody knows.
    async fn not_let_in(
        &self,
        source_address: &SourceAddress,
        request_id: &str,
        error: &IdentityError,
    ) -> Refusal {
        let limited = match self.rates.admit_stranger(source_address) {
            Ok(()) => {
                let recorded =
                    self.broker.record_stranger(source_address, request_id, "authenticate", error).await;
                return match recorded {
                    Ok(()) => status(error, request_id).into(),
                    Err(unrecorded) => status(&unrecorded, request_id).into(),
                };
            }
            Err(limited) => limited,
        };
        let told = status_after(&limited, request_id, limited.retry_after);
        let Some(times) = limited.unrecorded else { return Refusal { status: told, quiet: true } };
        let counted = counted(&limited, times);
        match self.broker.record_stranger(source_address, request_id, "rate_limit", &counted).await {
            Ok(()) => told.into(),
            Err(unrecorded) => status(&unrecorded, request_id).into(),
        }
    }
}

/// The limit, as the one record says it that stands for many calls.
fn counted(limited: &Limited, times: u64) -> BrokerError {
    let message = format!("{limited} (turned away since this was last recorded: {times})");
    BrokerError::Rejected { reason: limited.reason(), message }
}

/// Reads what the caller presents. A header that is there but is not a bearer token is an invalid credential, not
/// none.
fn presented<B>(request: &Request<B>, connection: &ConnectionInfo) -> Result<Presented, IdentityError> {
    let by_connection = Presented {
        peer: connection.peer,
        certificate: connection.certificate.clone(),
        source: connection.source.clone(),
        bearer: None,
    };
    let mut headers = request.headers().get_all(http::header::AUTHORIZATION).iter();
    let Some(header) = headers.next() else { return Ok(by_connection) };
    let malformed = || IdentityError::Invalid {
        method: "token",
        problem: "the authorization header is not `Bearer TOKEN`, once",
    };
    if headers.next().is_some() {
        return Err(malformed());
    }
    let (scheme, token) = header.to_str().ok().and_then(|text| text.split_once(' ')).ok_or_else(malformed)?;
    if !scheme.eq_ignore_ascii_case("bearer") || token.len() > 512 {
        return Err(malformed());
    }
    let bearer = SecretValue::text(token.to_owned()).map_err(|_| malformed())?;
    Ok(Presented { bearer: Some(bearer), ..by_connection })
}

fn refused(refusal: Refusal) -> Response<Reply> {
    let mut response = refusal.status.into_http().map(Reply::Other);
    if refusal.quiet {
        account::hush(&mut response);
    }
    response
}

/// How long the call may take: what its `grpc-timeout` says (gRPC over HTTP/2, "Requests"), at most `longest`. A
/// little is kept back, so that the caller hears from this side and not from its own timer.
fn deadline<B>(request: &Request<B>, longest: Duration) -> Result<Duration, BrokerError> {
    let Some(header) = request.headers().get("grpc-timeout") else { return Ok(longest) };
    let asked = header.to_str().ok().and_then(grpc_timeout).ok_or_else(|| BrokerError::Rejected {
        reason: Reason::InvalidArgument,
        message: "the grpc-timeout header is not 1 to 8 digits and one of H, M, S, m, u, n".to_owned(),
    })?;
    if asked.is_zero() {
        return Err(late());
    }
    Ok(asked.saturating_sub((asked / 10).min(Duration::from_millis(20))).min(longest))
}

fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3_600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

fn late() -> BrokerError {
    BrokerError::Rejected {
        reason: Reason::DeadlineExceeded,
        message: "the deadline passed before there was an answer; a change, where one was asked for, may still take effect".to_owned(),
    }
}

/// The transport answers OUT_OF_RANGE to a message over its bound, which nothing else here does; the code that fits
/// is RESOURCE_EXHAUSTED (gRPC status codes, "RESOURCE_EXHAUSTED").
fn too_large(response: &Response<Reply>) -> bool {
    response.headers().get("grpc-status").is_some_and(|code| code == "11")
}

fn oversized() -> BrokerError {
    let message = "the request message is larger than this broker takes; send less at a time".to_owned();
    BrokerError::Rejected { reason: Reason::LimitExceeded, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_follow_the_protocol() {
        assert_eq!(grpc_timeout("30S"), Some(Duration::from_secs(30)));
        assert_eq!(grpc_timeout("5m"), Some(Duration::from_millis(5)));
        assert_eq!(grpc_timeout("0n"), Some(Duration::ZERO));
        for bad in ["", "S", "5", "5s", "-5S", "123456789S", "5é"] {
            assert_eq!(grpc_timeout(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_deadline_is_bounded_and_zero_is_late() {
        let request =
            |timeout: &str| Request::builder().header("grpc-timeout", timeout).body(Body::empty()).unwrap();
        let longest = Duration::from_secs(30);
        assert_eq!(deadline(&request("1H"), longest).unwrap(), longest);
        assert_eq!(deadline(&request("0S"), longest).unwrap_err().reason(), Reason::DeadlineExceeded);
        assert_eq!(deadline(&request("x"), longest).unwrap_err().reason(), Reason::InvalidArgument);
        assert!(deadline(&request("1S"), longest).unwrap() < Duration::from_secs(1));
    }

    #[test]
    fn every_method_is_known_by_its_path() {
        let methods = methods();
        for path in ["/claviger.v1.SecretService/GetSecret", "/grpc.health.v1.Health/Check"] {
            assert!(methods.iter().any(|known| known == path), "{path}: {methods:?}");
        }
        assert!(services().iter().any(|service| service == "claviger.v1.SecretService"));
        assert!(!services().iter().any(|service| service.starts_with("grpc.")));
    }
}
