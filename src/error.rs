//! Stable reasons: what a failure is called on the wire, in the audit log and in scripts.
//!
//! Each layer has its own error type, beside the code that raises it. What they share is that each names one
//! [`Reason`]. A reason's [`code`](Reason::code) never changes and is never reused; messages may improve.
//! Which gRPC status a reason becomes is decided in `server/grpc/status.rs`, which exit code in `cli/exit.rs`,
//! and nowhere else.

use std::fmt;

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $code:literal),+ $(,)?) => {
        /// Why something failed, as a closed set of stable codes.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Reason { $($(#[$doc])* $variant),+ }

        impl Reason {
            /// Every reason, for tables and for parsing a code back.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant),+];

            /// The stable code: upper snake case, as `google.rpc.ErrorInfo.reason` wants it.
            #[must_use]
            pub const fn code(self) -> &'static str {
                match self { $(Reason::$variant => $code),+ }
            }
        }
    };
}

reasons! {
    /// An environment's name is not a DNS label, or is reserved.
    InvalidEnvironment = "INVALID_ENVIRONMENT",
    /// A secret's name breaks the grammar.
    InvalidName = "INVALID_NAME",
    /// A reference is not `[environment:]name[#field]`.
    InvalidReference = "INVALID_REFERENCE",
    /// A field's name breaks the grammar.
    InvalidField = "INVALID_FIELD",
    /// A staging label breaks the grammar, or is not the caller's to move.
    InvalidLabel = "INVALID_LABEL",
    /// A version id or client request token is not 32–64 permitted characters.
    InvalidVersionId = "INVALID_VERSION_ID",
    /// A value can't be stored or used as asked (for instance NUL in an environment variable).
    InvalidValue = "INVALID_VALUE",
    /// A value is empty and `allow_empty` was not said.
    ValueEmpty = "VALUE_EMPTY",
    /// A value is larger than 65,536 bytes.
    ValueTooLarge = "VALUE_TOO_LARGE",
    /// Any other argument is missing, out of its bounds or contradicts another.
    InvalidArgument = "INVALID_ARGUMENT",
    /// No credential was presented, or the one presented is not valid.
    Unauthenticated = "UNAUTHENTICATED",
    /// Policy says no. Also the answer for what is absent, to a caller who may not know.
    Denied = "DENIED",
    /// Policy says: only with approvals by others.
    ApprovalRequired = "APPROVAL_REQUIRED",
    /// The environment is not declared.
    EnvironmentNotFound = "ENVIRONMENT_NOT_FOUND",
    /// No secret has this name in this environment.
    SecretNotFound = "SECRET_NOT_FOUND",
    /// The secret has no such version, or no version carries the label.
    VersionNotFound = "VERSION_NOT_FOUND",
    /// No token has this id.
    TokenNotFound = "TOKEN_NOT_FOUND",
    /// The value is a JSON object without this member.
    FieldNotFound = "FIELD_NOT_FOUND",
    /// A field was asked of a value that is not a JSON object.
    NotAnObject = "NOT_AN_OBJECT",
    /// The secret is deleted and within its recovery window.
    SecretDeleted = "SECRET_DELETED",
    /// What the caller expected to be current no longer is.
    Conflict = "CONFLICT",
    /// The client request token was used before with another value.
    TokenReused = "TOKEN_REUSED",
    /// The store can't be reached, or answers with an outage.
    StoreUnavailable = "STORE_UNAVAILABLE",
    /// The store asks to slow down.
    StoreThrottled = "STORE_THROTTLED",
    /// The store refuses the broker's own credentials.
    StoreDenied = "STORE_DENIED",
    /// No rotation is set for this secret.
    RotationNotFound = "ROTATION_NOT_FOUND",
    /// A rotation needs a person.
    RotationBlocked = "ROTATION_BLOCKED",
    /// A rotation is not over: it is tried again later.
    RotationUnfinished = "ROTATION_UNFINISHED",
    /// A rotation can't begin yet: the last one is too fresh.
    RotationTooSoon = "ROTATION_TOO_SOON",
    /// The audit log can't be written: nothing is served.
    AuditUnavailable = "AUDIT_UNAVAILABLE",
    /// The audit log fails verification.
    AuditBroken = "AUDIT_BROKEN",
    /// Stored data fails authentication: changed, moved or brought back from the past.
    Tampered = "TAMPERED",
    /// A root key is not the one that the data was sealed under.
    WrongKey = "WRONG_KEY",
    /// A key file, credential or variable does not hold a usable key.
    InvalidKey = "INVALID_KEY",
    /// A certificate, its key or a certificate authority can't be used.
    InvalidCertificate = "INVALID_CERTIFICATE",
    /// A policy set does not parse, validate or satisfy the house rules.
    InvalidPolicy = "INVALID_POLICY",
    /// A configuration file or manifest is not valid.
    InvalidConfig = "INVALID_CONFIG",
    /// A size or count is over its bound.
    LimitExceeded = "LIMIT_EXCEEDED",
    /// The caller asks more often than it may; worth another try, later.
    RateLimited = "RATE_LIMITED",
    /// A watcher did not take what it was told for too long.
    SlowConsumer = "SLOW_CONSUMER",
    /// The deadline passed first.
    DeadlineExceeded = "DEADLINE_EXCEEDED",
    /// The broker is shutting down or can't be reached.
    Unavailable = "UNAVAILABLE",
    /// Another process owns the embedded file.
    Locked = "LOCKED",
    /// This build or this store can't do what was asked.
    Unsupported = "UNSUPPORTED",
    /// A defect of the broker.
    Internal = "INTERNAL",
}

impl Reason {
    /// The reason whose [`code`](Self::code) this is.
    #[must_use]
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.code() == code)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// An error that knows its stable reason.
pub trait Reasoned: std::error::Error {
    /// The stable reason.
    fn reason(&self) -> Reason;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn codes_are_distinct_and_parse_back() {
        let codes: BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.code()).collect();
        assert_eq!(codes.len(), Reason::ALL.len());
        for reason in Reason::ALL {
            assert_eq!(Reason::from_code(reason.code()), Some(*reason));
        }
        assert_eq!(Reason::from_code("NO_SUCH_CODE"), None);
    }
}
