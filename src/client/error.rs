//! Why a call was not answered as asked.

use std::error::Error;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::error::{Reason, Reasoned};
use crate::proto::v1;
use crate::secret::{FieldError, LabelError, NameError, ValueError};

/// The domain of every [`Reason`] on the wire.
const DOMAIN: &str = "claviger";
/// What is said where nobody knows whether a change was made.
const DOUBT: &str = "; a change may still take effect";

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
    pub(super) fn new(reason: Reason, code: Code, message: impl Into<String>) -> Self {
        Self { reason, code, message: message.into(), request_id: None }
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Reason::InvalidArgument, Code::InvalidArgument, message)
    }

    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Reason::Unavailable, Code::Unavailable, message)
    }

    /// An answer that breaks the protocol, which says what.
    #[must_use]
    pub fn malformed(what: &str) -> Self {
        let message = format!("the broker's answer {what}; is it of another version?");
        Self::new(Reason::Internal, Code::Internal, message)
    }

    /// The deadline passed, and there was no answer.
    pub(super) fn late(message: impl Into<String>) -> Self {
        Self::new(Reason::DeadlineExceeded, Code::DeadlineExceeded, message)
    }

    /// The same, of a call that changes something: nobody knows whether it did.
    #[must_use]
    pub(super) fn doubtful(mut self) -> Self {
        if !self.message.contains(DOUBT) {
            self.message.push_str(DOUBT);
        }
        self
    }

    /// Whether the same call is worth another try, a little later: the broker or its store was away, or one of them
    /// asked to slow down. A deadline that passed is not among them.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        self.code == Code::Unavailable || matches!(self.reason, Reason::RateLimited | Reason::StoreThrottled)
    }

    /// Whether the answer was a no: what the caller still has of the secret, it should have no longer. Anything else
    /// says that the broker could not answer, not that it would not.
    pub(super) const fn is_refusal(&self) -> bool {
        matches!(
            self.code,
            Code::NotFound
                | Code::PermissionDenied
                | Code::Unauthenticated
                | Code::FailedPrecondition
                | Code::InvalidArgument
                | Code::Unimplemented
        )
    }

    /// What this side found wrong before it asked, or in what it was answered.
    fn local(error: &impl Reasoned) -> Self {
        let code = match error.reason() {
            Reason::FieldNotFound => Code::NotFound,
            Reason::NotAnObject => Code::FailedPrecondition,
            _ => Code::InvalidArgument,
        };
        Self::new(error.reason(), code, error.to_string())
    }
}

macro_rules! from_local {
    ($($error:ty),+) => {
        $(impl From<$error> for ClientError {
            fn from(error: $error) -> Self {
                Self::local(&error)
            }
        })+
    };
}
from_local!(NameError, LabelError, ValueError, FieldError);

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        if let Some(ours) = ours(&status) {
            return ours;
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
    if is_late(status) {
        return ClientError::late("the deadline passed before there was an answer; raise --timeout");
    }
    let said = shown(status.message());
    // What came over the wire has no source; the transport's own failures have, whatever code they are given.
    let code = if code == Code::Internal && status.source().is_some() { Code::Unavailable } else { code };
    match code {
        Code::Unavailable | Code::Unknown | Code::Cancelled => {
            ClientError::unavailable(failed(&status.source().map_or(said, root_cause)))
        }
        Code::Unimplemented => {
            let message = "the broker does not know this call; is it of another version?";
            ClientError::new(Reason::Unsupported, code, message)
        }
        code => ClientError::new(presumed(code), code, format!("the broker answered {code:?}: {said}")),
    }
}

/// What a failure of the connection comes to, from what the libraries have to say of it.
fn failed(said: &str) -> String {
    const ENDED: [&str; 5] =
        ["close_notify", "broken pipe", "reset by peer", "connection closed", "not a result of an error"];
    let lower = said.to_ascii_lowercase();
    match ENDED.iter().any(|words| lower.contains(words)) {
        true => format!(
            "the broker ended the connection ({said}), perhaps because it stops or, over https://, because it no \
             longer trusts the client certificate; try again, or look into its log"
        ),
        false => format!("the connection to the broker failed: {said}"),
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
pub(super) fn chain<'e>(error: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| (*error).source())
}

/// What this side found wrong itself, wherever in the chain it is.
pub(super) fn ours(error: &(dyn Error + 'static)) -> Option<ClientError> {
    chain(error).find_map(|error| error.downcast_ref::<ClientError>()).cloned()
}

/// Whether the deadline that a call had on this side passed.
pub(super) fn is_late(error: &(dyn Error + 'static)) -> bool {
    chain(error).any(|error| error.is::<tonic::TimeoutExpired>())
}

/// What is at the bottom of an error, without the page of a library's manual that some of them point to.
pub(super) fn root_cause(error: &(dyn Error + 'static)) -> String {
    let text = chain(error).last().map(ToString::to_string).unwrap_or_default();
    shown(text.split_once(": https://").map_or(text.as_str(), |(said, _)| said))
}

/// Foreign text on one line, cut where it is long.
pub(super) fn shown(text: &str) -> String {
    let escaped = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    escaped.take(256).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::{FieldName, Label, SecretName, SecretValue};
    use std::collections::HashMap;
    use std::sync::Arc;
    use tonic_types::ErrorDetails;

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
        let late = ClientError::from(Status::from_error(Box::new(tonic::TimeoutExpired(()))));
        assert_eq!(late.reason, Reason::DeadlineExceeded);
        assert!(late.message.contains("--timeout") && !late.message.contains("take effect"), "{late}");
    }

    #[test]
    fn an_item_of_a_batch_has_its_own_problem() {
        let problem = v1::Problem { code: 7, reason: "DENIED".to_owned(), message: "no".to_owned() };
        let error = ClientError::from(problem);
        assert_eq!((error.reason, error.code), (Reason::Denied, Code::PermissionDenied));
    }

    #[test]
    fn a_failure_of_the_transport_is_an_absence() {
        let mut cut = Status::internal("h2 protocol error");
        assert_eq!(ClientError::from(cut.clone()).reason, Reason::Internal, "the broker said so itself");
        cut.set_source(Arc::new(std::io::Error::from(std::io::ErrorKind::BrokenPipe)));
        let error = ClientError::from(cut);
        assert_eq!((error.reason, error.code), (Reason::Unavailable, Code::Unavailable));
        assert!(error.is_transient() && !error.is_refusal());
    }

    #[test]
    fn an_end_of_the_connection_is_said_with_its_cause_and_mend() {
        let cut = |said: &str| {
            let mut cut = Status::internal("h2 protocol error");
            cut.set_source(Arc::new(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, said.to_owned())));
            ClientError::from(cut).message
        };
        let text = cut("peer closed connection without sending TLS close_notify: https://docs.rs/rustls/x#y");
        assert!(text.starts_with("the broker ended the connection (peer closed"), "{text}");
        assert!(text.contains("no longer trusts") && text.contains("its log"), "{text}");
        assert!(!text.contains("docs.rs") && !text.contains("take effect"), "{text}");
        for said in ["stream closed because of a broken pipe", "Connection reset by peer (os error 104)"] {
            assert!(cut(said).starts_with("the broker ended the connection ("), "{said}");
        }
        assert_eq!(cut("no route to host"), "the connection to the broker failed: no route to host");
    }

    #[test]
    fn doubt_is_said_once() {
        let error = ClientError::late("too late").doubtful().doubtful();
        assert_eq!(error.message, "too late; a change may still take effect");
    }

    #[test]
    fn what_is_worth_another_try() {
        let error = |reason, code| ClientError::new(reason, code, "");
        assert!(error(Reason::StoreUnavailable, Code::Unavailable).is_transient());
        assert!(error(Reason::RateLimited, Code::ResourceExhausted).is_transient());
        for (reason, code) in [
            (Reason::LimitExceeded, Code::ResourceExhausted),
            (Reason::DeadlineExceeded, Code::DeadlineExceeded),
            (Reason::Conflict, Code::Aborted),
            (Reason::Denied, Code::PermissionDenied),
        ] {
            assert!(!error(reason, code).is_transient(), "{reason}");
        }
        assert!(error(Reason::Denied, Code::PermissionDenied).is_refusal());
        assert!(!error(Reason::DeadlineExceeded, Code::DeadlineExceeded).is_refusal());
    }

    #[test]
    fn what_this_side_refuses_keeps_its_reason() {
        let error = ClientError::from(SecretName::parse("a//b").unwrap_err());
        assert_eq!((error.reason, error.code), (Reason::InvalidName, Code::InvalidArgument));
        assert_eq!(ClientError::from(Label::parse("").unwrap_err()).reason, Reason::InvalidLabel);
        let value = SecretValue::text(r#"{"a":"canary"}"#.to_owned()).unwrap();
        let error = ClientError::from(value.field(&FieldName::parse("b").unwrap()).unwrap_err());
        assert_eq!((error.reason, error.code), (Reason::FieldNotFound, Code::NotFound));
        assert!(!format!("{error:?}").contains("canary"));
    }
}
