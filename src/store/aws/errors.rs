//! What AWS and the SDK say, as a [`StoreError`]. The only file that knows AWS's error codes.
//!
//! ```text
//! SdkError ─┐
//!           ├─▶ Failure { kind, cause } ──about(secret) / of(environment)──▶ StoreError
//! Errors[] ─┘                              (what the caller was doing decides the rest)
//! ```
//!
//! A cause is one line of bounded length. AWS keeps values out of its messages; what an emulator might repeat is
//! removed by [`Failure::without`].

use std::error::Error;
use std::iter::successors;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_secretsmanager::error::{ProvideErrorMetadata, SdkError};

use crate::secret::{EnvironmentName, SecretId, SecretValue, Selector};
use crate::store::StoreError;

/// The sources that the default credentials chain asks, in its order.
const CREDENTIALS_CHAIN: &str = "environment variables, shared profile, web identity token, container endpoint, \
                                 instance metadata";
const LONGEST_CAUSE: usize = 300;
const UNREADABLE: &str = "its answer can't be read";

/// The broker's own credentials are missing, expired or wrong: no call will do better.
const CREDENTIALS: &[&str] = &[
    "AuthFailure",
    "ExpiredToken",
    "ExpiredTokenException",
    "IncompleteSignature",
    "IncompleteSignatureException",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "MissingAuthenticationToken",
    "MissingAuthenticationTokenException",
    "OptInRequired",
    "RequestExpired",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
];

/// This action on this resource is not permitted, or not with its key.
const DENIED: &[&str] =
    &["AccessDenied", "AccessDeniedException", "DecryptionFailure", "EncryptionFailure", "NotAuthorized"];

/// Too many calls just now. `LimitExceededException`, which the SDK tries again as well, is a quota of Secrets Manager
/// that no waiting lifts.
const THROTTLED: &[&str] = &[
    "BandwidthLimitExceeded",
    "PriorRequestNotComplete",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "SlowDown",
    "ThrottledException",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
];

const OUTAGE: &[&str] = &[
    "InternalFailure",
    "InternalServerError",
    "InternalServiceError",
    "RequestTimeout",
    "ServiceUnavailable",
];

/// What kind of answer a failed call got, as far as its code says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// `ResourceNotFoundException`: the secret or the version.
    NotFound,
    /// `InvalidRequestException` of a secret within its recovery window.
    Deleted,
    /// `ResourceExistsException`: the name, or the token with another value.
    Exists,
    /// A request that AWS can't take.
    Refused,
    /// `LimitExceededException`: a quota.
    Limit,
    /// Asks to slow down.
    Throttled,
    /// Not permitted to these credentials.
    Denied,
    /// No usable credentials.
    Unauthenticated,
    /// No answer, or one that says there was an outage.
    Unavailable,
}

/// A call that failed, before it is known what it was about.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) kind: Kind,
    cause: String,
    /// Whether the call was not made, because of the account's quota.
    pub(super) is_held_back: bool,
}

impl<E> From<SdkError<E>> for Failure
where
    E: Error + ProvideErrorMetadata + 'static,
{
    fn from(error: SdkError<E>) -> Self {
        match &error {
            // What could not be read may hold a value, so nothing of it is repeated.
            SdkError::ResponseError(_) => Self::unavailable(UNREADABLE),
            SdkError::ServiceError(service) if service.raw().status().is_success() => {
                Self::unavailable(UNREADABLE)
            }
            SdkError::ServiceError(service) => {
                let said = service.err();
                Self::of_code(said.code(), said.message(), Some(service.raw().status().as_u16()))
            }
            SdkError::TimeoutError(_) => Self::unavailable("no answer within the time permitted"),
            SdkError::ConstructionFailure(_) => {
                Self { kind: Kind::Refused, cause: causes(&error), is_held_back: false }
            }
            _ => Self::of_dispatch(&error),
        }
    }
}

impl Failure {
    /// From an error's code and message, which is all that an item of a batch has.
    pub(super) fn of_code(code: Option<&str>, message: Option<&str>, status: Option<u16>) -> Self {
        let message = message.unwrap_or_default();
        let kind = match (code.unwrap_or_default(), status) {
            ("ResourceNotFoundException", _) => Kind::NotFound,
            ("ResourceExistsException", _) => Kind::Exists,
            ("LimitExceededException", _) => Kind::Limit,
            ("InvalidRequestException", _) if says_deleted(message) => Kind::Deleted,
            (code, _) if CREDENTIALS.contains(&code) => Kind::Unauthenticated,
            (code, _) if DENIED.contains(&code) => Kind::Denied,
            (code, status) if THROTTLED.contains(&code) || status == Some(429) => Kind::Throttled,
            (code, status) if OUTAGE.contains(&code) || status.is_some_and(|status| status >= 500) => {
                Kind::Unavailable
            }
            (_, Some(401 | 403)) => Kind::Denied,
            _ => Kind::Refused,
        };
        let cause = match (code, status) {
            (Some(code), _) if message.is_empty() => code.to_owned(),
            (Some(code), _) => format!("{code}: {message}"),
            (None, Some(status)) => format!("HTTP status {status} {message}"),
            (None, None) => message.to_owned(),
        };
        Self { kind, cause: one_line(&cause), is_held_back: false }
    }

    fn of_dispatch(error: &(dyn Error + 'static)) -> Self {
        let cause = causes(error);
        match chain(error).find_map(|cause| cause.downcast_ref::<CredentialsError>()) {
            Some(CredentialsError::CredentialsNotLoaded(_)) => Self {
                kind: Kind::Unauthenticated,
                cause: format!("no AWS credentials found; asked, in this order: {CREDENTIALS_CHAIN}"),
                is_held_back: false,
            },
            Some(CredentialsError::InvalidConfiguration(_)) => {
                Self { kind: Kind::Unauthenticated, cause, is_held_back: false }
            }
            // A role that may not be assumed is an answer; an STS that can't be reached is none.
            Some(_) if DENIED.iter().chain(CREDENTIALS).any(|code| cause.contains(code)) => {
                Self { kind: Kind::Unauthenticated, cause, is_held_back: false }
            }
            _ => Self { kind: Kind::Unavailable, cause, is_held_back: false },
        }
    }

    fn unavailable(cause: &str) -> Self {
        Self { kind: Kind::Unavailable, cause: cause.to_owned(), is_held_back: false }
    }

    /// A call that was not made, so that AWS need not refuse it.
    pub(super) fn throttled(cause: String) -> Self {
        Self { kind: Kind::Throttled, cause, is_held_back: true }
    }

    /// Whether the action itself is not permitted; not, as with the key of a secret, something about what was asked for.
    pub(super) fn forbids_the_action(&self) -> bool {
        self.kind == Kind::Denied && self.cause.starts_with("AccessDenied")
    }

    /// Whether `ResourceNotFoundException` left open what is missing. AWS's own texts say it: `can't find the
    /// specified secret.` against `can't find the specified secret value for …`.
    pub(super) fn leaves_open_what_is_missing(&self) -> bool {
        self.kind == Kind::NotFound && !self.cause.contains("the specified secret")
    }

    /// Withholds the message where it repeats the value that was being written.
    pub(super) fn without(mut self, value: &SecretValue) -> Self {
        let repeats = value.expose_text().is_some_and(|text| self.cause.contains(text));
        if repeats {
            self.cause = "message withheld, because it repeats the value".to_owned();
        }
        self
    }

    /// The failure of a call about one secret; `selector` where a version was asked for.
    pub(super) fn about(self, id: &SecretId, selector: Option<&Selector>) -> StoreError {
        match (self.kind, selector) {
            (Kind::NotFound, Some(selector)) if self.cause.contains("the specified secret value") => {
                StoreError::VersionNotFound { id: id.clone(), selector: selector.clone() }
            }
            (Kind::NotFound, _) => StoreError::SecretNotFound(id.clone()),
            (Kind::Deleted, _) => StoreError::SecretDeleted(id.clone()),
            (Kind::Refused | Kind::Exists, _) => StoreError::Invalid(format!(
                "AWS Secrets Manager refuses this for secret `{}`: {}",
                id.name, self.cause
            )),
            _ => self.of(&id.environment),
        }
    }

    /// The failure of a call about no secret in particular.
    pub(super) fn of(self, environment: &EnvironmentName) -> StoreError {
        let (environment, cause) = (environment.clone(), self.cause);
        match self.kind {
            Kind::Throttled => StoreError::Throttled { environment, cause },
            Kind::Denied | Kind::Unauthenticated => StoreError::Denied { environment, cause },
            Kind::Unavailable => StoreError::Unavailable { environment, cause },
            Kind::Limit => StoreError::LimitExceeded(format!(
                "AWS Secrets Manager, environment `{environment}`: {cause}"
            )),
            Kind::NotFound | Kind::Deleted | Kind::Exists | Kind::Refused => StoreError::Invalid(format!(
                "AWS Secrets Manager refuses this in environment `{environment}`: {cause}"
            )),
        }
    }
}

/// An answer that lacks what AWS documents as always there.
pub(super) fn malformed(id: &SecretId, lacks: &str) -> StoreError {
    let cause = format!("its answer about secret `{}` lacks {lacks}", id.name);
    StoreError::Unavailable { environment: id.environment.clone(), cause }
}

/// AWS has more than one wording, by operation.
fn says_deleted(message: &str) -> bool {
    ["marked for deletion", "scheduled for deletion", "marked deleted"]
        .iter()
        .any(|text| message.contains(text))
}

fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    successors(Some(error), |error: &&'a (dyn Error + 'static)| (*error).source())
}

/// What the errors below say, without the SDK's own outermost words. Only `Display`: `Debug` shows whole answers.
fn causes(error: &(dyn Error + 'static)) -> String {
    let texts: Vec<String> = chain(error).skip(1).map(ToString::to_string).collect();
    one_line(&texts.join(": "))
}

fn one_line(text: &str) -> String {
    let words: Vec<&str> =
        text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|w| !w.is_empty()).collect();
    words.join(" ").chars().take(LONGEST_CAUSE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Reason, Reasoned};
    use crate::secret::{Label, VersionId};
    use aws_sdk_secretsmanager::operation::get_secret_value::GetSecretValueError;

    fn id() -> SecretId {
        SecretId::parse("production", "database").unwrap()
    }

    fn reason(code: &str, message: &str, status: u16) -> Reason {
        let selector = Selector::Label(Label::Pending);
        Failure::of_code(Some(code), Some(message), Some(status)).about(&id(), Some(&selector)).reason()
    }

    #[test]
    fn codes_become_reasons() {
        for (code, message, status, expected) in [
            (
                "ResourceNotFoundException",
                "Secrets Manager can't find the specified secret.",
                400,
                Reason::SecretNotFound,
            ),
            (
                "ResourceNotFoundException",
                "Secrets Manager can't find the specified secret value for staging label: AWSPENDING",
                400,
                Reason::VersionNotFound,
            ),
            (
                "InvalidRequestException",
                "You can't perform this operation on the secret because it was marked for deletion.",
                400,
                Reason::SecretDeleted,
            ),
            (
                "InvalidRequestException",
                "You can't create this secret because a secret with this name is already scheduled for deletion.",
                400,
                Reason::SecretDeleted,
            ),
            ("InvalidRequestException", "managed by another service", 400, Reason::InvalidArgument),
            ("InvalidParameterException", "bad", 400, Reason::InvalidArgument),
            ("ValidationException", "bad", 400, Reason::InvalidArgument),
            ("InvalidNextTokenException", "bad", 400, Reason::InvalidArgument),
            ("ThrottlingException", "Rate exceeded", 400, Reason::StoreThrottled),
            ("TooManyRequestsException", "", 429, Reason::StoreThrottled),
            ("Unheard", "", 429, Reason::StoreThrottled),
            ("LimitExceededException", "too many versions", 400, Reason::LimitExceeded),
            ("AccessDeniedException", "not authorized", 400, Reason::StoreDenied),
            ("DecryptionFailure", "key disabled", 400, Reason::StoreDenied),
            ("UnrecognizedClientException", "invalid token", 400, Reason::StoreDenied),
            ("ExpiredTokenException", "expired", 400, Reason::StoreDenied),
            ("InvalidSignatureException", "mismatch", 400, Reason::StoreDenied),
            ("InternalServiceError", "", 500, Reason::StoreUnavailable),
            ("Unheard", "", 503, Reason::StoreUnavailable),
        ] {
            assert_eq!(reason(code, message, status), expected, "{code} {message}");
        }
        assert_eq!(
            Failure::of_code(None, None, Some(403)).of(&id().environment).reason(),
            Reason::StoreDenied
        );
        assert_eq!(
            Failure::of_code(None, None, Some(502)).of(&id().environment).reason(),
            Reason::StoreUnavailable
        );
    }

    #[test]
    fn only_a_text_that_is_not_awss_own_leaves_open_what_is_missing() {
        let vague = Failure::of_code(Some("ResourceNotFoundException"), Some("not found"), Some(400));
        assert!(vague.leaves_open_what_is_missing());
        let message = Some("Secrets Manager can't find the specified secret.");
        assert!(
            !Failure::of_code(Some("ResourceNotFoundException"), message, None).leaves_open_what_is_missing()
        );
    }

    #[test]
    fn missing_credentials_name_the_chain_that_was_asked() {
        let error: SdkError<GetSecretValueError> =
            SdkError::dispatch_failure(aws_sdk_secretsmanager::error::ConnectorError::other(
                CredentialsError::not_loaded("none").into(),
                None,
            ));
        let error = Failure::from(error).of(&id().environment);
        assert_eq!(error.reason(), Reason::StoreDenied);
        assert!(error.to_string().contains("instance metadata"), "{error}");
    }

    #[test]
    fn a_refused_role_is_denied_and_an_unreachable_sts_unavailable() {
        for (cause, expected) in [
            ("unhandled error (AccessDenied)", Reason::StoreDenied),
            ("tcp connect error: Connection refused", Reason::StoreUnavailable),
        ] {
            let error: SdkError<GetSecretValueError> =
                SdkError::dispatch_failure(aws_sdk_secretsmanager::error::ConnectorError::other(
                    CredentialsError::provider_error(cause).into(),
                    None,
                ));
            assert_eq!(Failure::from(error).of(&id().environment).reason(), expected, "{cause}");
        }
    }

    #[test]
    fn an_action_that_is_forbidden_is_told_from_a_key_that_is() {
        let forbids = |code| Failure::of_code(Some(code), Some("no"), Some(400)).forbids_the_action();
        assert!(forbids("AccessDeniedException") && forbids("AccessDenied"));
        assert!(!forbids("DecryptionFailure") && !forbids("ThrottlingException"));
    }

    #[test]
    fn timeouts_are_transient() {
        let error: SdkError<GetSecretValueError> = SdkError::timeout_error("late");
        assert!(Failure::from(error).about(&id(), None).is_transient());
    }

    #[test]
    fn causes_are_one_bounded_line_and_never_the_value() {
        let message = format!("first\nsecond\t{}", "x".repeat(1_000));
        let error =
            Failure::of_code(Some("ValidationException"), Some(&message), Some(400)).about(&id(), None);
        let text = error.to_string();
        assert!(text.len() < 500 && !text.contains('\n'), "{text}");

        let value = SecretValue::text("canary-5f3a".to_owned()).unwrap();
        let error =
            Failure::of_code(Some("ValidationException"), Some("canary-5f3a is too short"), Some(400));
        assert!(!error.without(&value).about(&id(), None).to_string().contains("canary"));
    }

    #[test]
    fn a_missing_version_names_what_was_asked_for() {
        let version = VersionId::parse(&"v".repeat(32)).unwrap();
        let message = Some("Secrets Manager can't find the specified secret value for VersionId: vvv");
        let failure = Failure::of_code(Some("ResourceNotFoundException"), message, Some(400));
        let error = failure.about(&id(), Some(&Selector::Version(version)));
        assert!(error.to_string().contains("version vvvv"), "{error}");
    }
}
