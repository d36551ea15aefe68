//! What every request passes before its service sees it: a request id, who is calling, a deadline.
//!
//! Only `grpc.health.v1` is open to callers whom nobody knows.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderValue, Request, Response};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use super::status::status;
use crate::broker::{Broker, BrokerError, Call};
use crate::error::Reason;
use crate::identity::{Chain, IdentityError, Presented, Principal, SourceAddress};
use crate::secret::SecretValue;
use crate::server::Limits;
use crate::server::listen::ConnectionInfo;

const OPEN: &str = "/grpc.health.v1.Health/";

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
            request_id: self.request_id.to_string(),
            reason: (!reason.is_empty()).then(|| reason.to_owned()),
        }
    }
}

/// The door, as a layer around all services.
#[derive(Clone)]
pub struct Door {
    broker: Arc<Broker>,
    identity: Arc<Chain>,
    longest: Duration,
}

impl Door {
    /// A door to `broker` for whom `identity` recognises.
    #[must_use]
    pub const fn new(broker: Arc<Broker>, identity: Arc<Chain>, limits: Limits) -> Self {
        Self { broker, identity, longest: limits.deadline }
    }

    /// Who is calling; a caller whom nobody knows is on record before they hear so.
    async fn caller(
        &self,
        presented: Result<Presented, IdentityError>,
        source_address: SourceAddress,
        request_id: Arc<str>,
    ) -> Result<Caller, Status> {
        let known = match presented {
            Ok(presented) => self.identity.authenticate(&presented).await,
            Err(error) => Err(error),
        };
        match known {
            Ok(principal) => Ok(Caller { principal, source_address, request_id }),
            Err(error) => {
                let recorded =
                    self.broker.record_stranger(&source_address, &request_id, "authenticate", &error).await;
                Err(match recorded {
                    Ok(()) => status(&error, &request_id),
                    Err(unrecorded) => status(&unrecorded, &request_id),
                })
            }
        }
    }
}

/// Reads what the caller presents. A header that is there but is not a bearer token is an invalid credential, not
/// none.
fn presented(request: &Request<Body>) -> Result<Presented, IdentityError> {
    let peer = request.extensions().get::<ConnectionInfo>().and_then(|connection| connection.peer);
    let Some(header) = request.headers().get(http::header::AUTHORIZATION) else {
        return Ok(Presented { peer, bearer: None });
    };
    let malformed = || IdentityError::Invalid {
        method: "token",
        problem: "the authorization header is not `Bearer TOKEN`",
    };
    let (scheme, token) = header.to_str().ok().and_then(|text| text.split_once(' ')).ok_or_else(malformed)?;
    if !scheme.eq_ignore_ascii_case("bearer") || token.len() > 512 {
        return Err(malformed());
    }
    let bearer = SecretValue::text(token.to_owned()).map_err(|_| malformed())?;
    Ok(Presented { peer, bearer: Some(bearer) })
}

impl<S> Layer<S> for Door {
    type Service = Doorkeeper<S>;

    fn layer(&self, inner: S) -> Doorkeeper<S> {
        Doorkeeper { door: self.clone(), inner }
    }
}

/// The door around one service.
#[derive(Clone)]
pub struct Doorkeeper<S> {
    door: Door,
    inner: S,
}

impl<S> Service<Request<Body>> for Doorkeeper<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let ready = self.inner.clone();
        // The clone may not be ready; the one that was polled is.
        let mut inner = std::mem::replace(&mut self.inner, ready);
        if request.uri().path().starts_with(OPEN) {
            return Box::pin(inner.call(request));
        }
        let door = self.door.clone();
        Box::pin(async move {
            let request_id: Arc<str> = uuid::Uuid::new_v4().to_string().into();
            let deadline = match deadline(&request, door.longest) {
                Ok(deadline) => deadline,
                Err(error) => return Ok(refused(&status(&error, &request_id), &request_id)),
            };
            let presented = presented(&request);
            let connection = request.extensions().get::<ConnectionInfo>();
            let source = connection.map_or(SourceAddress::Internal, |connection| connection.source.clone());
            let served = async {
                match door.caller(presented, source, Arc::clone(&request_id)).await {
                    Ok(caller) => {
                        request.extensions_mut().insert(caller);
                        inner.call(request).await
                    }
                    Err(error) => Ok(refused(&error, &request_id)),
                }
            };
            match tokio::time::timeout(deadline, served).await {
                Ok(Ok(response)) if too_large(&response) => {
                    Ok(refused(&status(&oversized(), &request_id), &request_id))
                }
                Ok(response) => response.map(|response| named(response, &request_id)),
                Err(_) => Ok(refused(&status(&late(), &request_id), &request_id)),
            }
        })
    }
}

/// How long the call may take: what its `grpc-timeout` says (gRPC over HTTP/2, "Requests"), at most `longest`. A
/// little is kept back, so that the caller hears from this side and not from its own timer.
fn deadline(request: &Request<Body>, longest: Duration) -> Result<Duration, BrokerError> {
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
        message: "the deadline passed before there was an answer; a change may still take effect".to_owned(),
    }
}

/// The transport answers OUT_OF_RANGE to a message over its bound, which nothing else here does; the code that fits
/// is RESOURCE_EXHAUSTED (gRPC status codes, "RESOURCE_EXHAUSTED").
fn too_large(response: &Response<Body>) -> bool {
    response.headers().get("grpc-status").is_some_and(|code| code == "11")
}

fn oversized() -> BrokerError {
    let message = "the request message is larger than this broker takes; send less at a time".to_owned();
    BrokerError::Rejected { reason: Reason::LimitExceeded, message }
}

fn refused(status: &Status, request_id: &str) -> Response<Body> {
    named(status.clone().into_http(), request_id)
}

fn named(mut response: Response<Body>, request_id: &str) -> Response<Body> {
    if let Ok(value) = HeaderValue::from_str(request_id) {
        response.headers_mut().insert("x-request-id", value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reasoned as _;

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
}
