//! The only file that picks gRPC codes and messages (`google.rpc.Status` with `google.rpc.ErrorInfo`, AIP-193).

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::broker::BrokerError;
use crate::error::{Reason, Reasoned};
use crate::proto::v1;

/// The domain of every [`Reason`] on the wire.
const DOMAIN: &str = "claviger";

/// A status for a whole call.
pub(super) fn status(error: &impl Reasoned, request_id: &str) -> Status {
    let metadata = HashMap::from([("request_id".to_owned(), request_id.to_owned())]);
    let details = ErrorDetails::with_error_info(error.reason().code(), DOMAIN, metadata);
    Status::with_error_details(code(error.reason()), error.to_string(), details)
}

/// The same for a call that is worth another try, but not before `retry_after` (`google.rpc.RetryInfo`).
pub(super) fn status_after(error: &impl Reasoned, request_id: &str, retry_after: Duration) -> Status {
    let metadata = HashMap::from([("request_id".to_owned(), request_id.to_owned())]);
    let mut details = ErrorDetails::with_error_info(error.reason().code(), DOMAIN, metadata);
    details.set_retry_info(Some(retry_after));
    Status::with_error_details(code(error.reason()), error.to_string(), details)
}

/// The same for one item of a batch.
pub(super) fn problem(error: &BrokerError) -> v1::Problem {
    let reason = error.reason();
    v1::Problem { code: code(reason).into(), reason: reason.code().to_owned(), message: error.to_string() }
}

const fn code(reason: Reason) -> Code {
    match reason {
        Reason::InvalidEnvironment
        | Reason::InvalidName
        | Reason::InvalidReference
        | Reason::InvalidField
        | Reason::InvalidLabel
        | Reason::InvalidVersionId
        | Reason::InvalidValue
        | Reason::InvalidArgument
        | Reason::InvalidKey
        | Reason::InvalidCertificate
        | Reason::InvalidPolicy
        | Reason::InvalidConfig
        | Reason::ValueEmpty
        | Reason::ValueTooLarge => Code::InvalidArgument,
        Reason::Unauthenticated => Code::Unauthenticated,
        Reason::Denied => Code::PermissionDenied,
        Reason::EnvironmentNotFound
        | Reason::SecretNotFound
        | Reason::VersionNotFound
        | Reason::TokenNotFound
        | Reason::RotationNotFound
        | Reason::FieldNotFound => Code::NotFound,
        Reason::ApprovalRequired
        | Reason::RotationBlocked
        | Reason::RotationTooSoon
        | Reason::SecretDeleted
        | Reason::NotAnObject
        | Reason::StoreDenied
        | Reason::WrongKey
        | Reason::Locked => Code::FailedPrecondition,
        Reason::Conflict => Code::Aborted,
        Reason::TokenReused => Code::AlreadyExists,
        Reason::LimitExceeded | Reason::RateLimited | Reason::SlowConsumer => Code::ResourceExhausted,
        Reason::DeadlineExceeded => Code::DeadlineExceeded,
        Reason::StoreUnavailable
        | Reason::StoreThrottled
        | Reason::AuditUnavailable
        | Reason::RotationUnfinished
        | Reason::Unavailable => Code::Unavailable,
        Reason::Tampered | Reason::AuditBroken => Code::DataLoss,
        Reason::Unsupported => Code::Unimplemented,
        _ => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_code_and_travels_with_it() {
        for reason in Reason::ALL {
            let error = BrokerError::Rejected { reason: *reason, message: "what and how".to_owned() };
            let status = status(&error, "r-1");
            assert_ne!(status.code(), Code::Ok);
            assert_ne!(status.code(), Code::Unknown, "{reason}");
            let info = status.get_details_error_info().unwrap();
            assert_eq!((info.reason.as_str(), info.domain.as_str()), (reason.code(), "claviger"));
            assert_eq!(info.metadata["request_id"], "r-1");
        }
    }
}
