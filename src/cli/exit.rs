//! How the program ends: the only file that picks an exit code, and the one error type of the command line.

use std::any::Any;
use std::io;
use std::process::ExitCode;

use crate::client::ClientError;
use crate::error::{Reason, Reasoned};

/// An exit code.
///
/// | code | meaning |
/// |---|---|
/// | 0 | done |
/// | 1 | anything that has no code of its own |
/// | 2 | usage: an argument is missing or not valid |
/// | 3 | denied, or not known |
/// | 4 | not found |
/// | 5 | unavailable: worth another try |
/// | 6 | conflict: something changed meanwhile |
/// | 7 | approval needed |
/// | 125 | `exec`: claviger itself failed before the command ran |
/// | 126, 127 | `exec`: the command can't be executed, was not found |
/// | 130 | `rotate`: interrupted; what has begun goes on in the broker |
/// | 141 | whoever read the output went away (as a shell shows SIGPIPE) |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit(u8);

impl Exit {
    /// Done.
    pub(crate) const DONE: Self = Self(0);
    /// What was looked at has faults: a broken log, a policy set that does not hold.
    pub(crate) const FAULTS: Self = Self(1);
    /// A usage error.
    pub(crate) const USAGE: Self = Self(2);
    /// Ctrl-C, as a shell shows SIGINT.
    pub(crate) const INTERRUPTED: Self = Self(130);
    const BEFORE_COMMAND: Self = Self(125);
    const PIPE_CLOSED: Self = Self(141);

    /// The code of a child process, passed on.
    pub(crate) const fn of_child(code: u8) -> Self {
        Self(code)
    }

    const fn of(reason: Reason) -> Self {
        Self(match reason {
            Reason::InvalidEnvironment
            | Reason::InvalidName
            | Reason::InvalidReference
            | Reason::InvalidField
            | Reason::InvalidLabel
            | Reason::InvalidVersionId
            | Reason::InvalidValue
            | Reason::ValueEmpty
            | Reason::ValueTooLarge
            | Reason::InvalidArgument => 2,
            Reason::Unauthenticated | Reason::Denied => 3,
            Reason::EnvironmentNotFound
            | Reason::SecretNotFound
            | Reason::VersionNotFound
            | Reason::TokenNotFound
            | Reason::RotationNotFound
            | Reason::FieldNotFound
            | Reason::SecretDeleted => 4,
            Reason::StoreUnavailable
            | Reason::StoreThrottled
            | Reason::AuditUnavailable
            | Reason::RotationUnfinished
            | Reason::DeadlineExceeded
            | Reason::RateLimited
            | Reason::SlowConsumer
            | Reason::Unavailable => 5,
            Reason::Conflict | Reason::TokenReused | Reason::RotationTooSoon => 6,
            Reason::ApprovalRequired => 7,
            Reason::NotAnObject
            | Reason::RotationBlocked
            | Reason::StoreDenied
            | Reason::AuditBroken
            | Reason::Tampered
            | Reason::WrongKey
            | Reason::InvalidKey
            | Reason::InvalidCertificate
            | Reason::InvalidPolicy
            | Reason::InvalidConfig
            | Reason::LimitExceeded
            | Reason::Locked
            | Reason::Unsupported
            | Reason::Internal => 1,
        })
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.0)
    }
}

/// Why a command did not do what it was asked. Its text may have several lines and never holds a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CliError {
    /// The stable reason; `None` where there is nothing to say, because nobody reads the output any more.
    pub(crate) reason: Option<Reason>,
    /// What is wrong and the mend.
    pub(crate) message: String,
    /// The request's id, where a broker answered.
    pub(crate) request_id: Option<String>,
    exit: Exit,
}

impl CliError {
    /// An error of this reason.
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason: Some(reason), message: message.into(), request_id: None, exit: Exit::of(reason) }
    }

    /// An argument that is missing or not valid.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Reason::InvalidArgument, message)
    }

    /// A file named by the caller that can't be read or used.
    pub(crate) fn file(path: &std::path::Path, problem: impl std::fmt::Display) -> Self {
        Self::usage(format!("{}: {problem}", path.display()))
    }

    /// Output that can't be written. A reader that went away is no error to tell anyone of.
    pub(crate) fn output(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => {
                Self { reason: None, message: String::new(), request_id: None, exit: Exit::PIPE_CLOSED }
            }
            _ => Self::new(
                Reason::Internal,
                format!("the output can't be written: {error}; look where it goes"),
            ),
        }
    }

    /// The same, of a command that starts another one and failed before it did: its code must not be taken for the
    /// other's.
    #[must_use]
    pub(crate) fn before_command(self) -> Self {
        Self { exit: Exit::BEFORE_COMMAND, ..self }
    }

    /// The same with another code; for the two that say why a command can't be executed.
    #[must_use]
    pub(crate) fn with_exit(self, exit: Exit) -> Self {
        Self { exit, ..self }
    }

    /// Whether it says that the command, and not claviger, could not be started.
    pub(crate) const fn is_of_command(&self) -> bool {
        matches!(self.exit.0, 126 | 127)
    }

    /// The exit code.
    pub(crate) const fn exit(&self) -> Exit {
        self.exit
    }
}

impl<E: Reasoned + 'static> From<E> for CliError {
    fn from(error: E) -> Self {
        // The client's error is the one that knows a request.
        let client = (&error as &dyn Any).downcast_ref::<ClientError>();
        let request_id = client.and_then(|error| error.request_id.clone());
        Self { request_id, ..Self::new(error.reason(), error.to_string()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::SecretName;

    #[test]
    fn every_promised_code_is_reached_and_no_other() {
        let codes: std::collections::BTreeSet<u8> =
            Reason::ALL.iter().map(|reason| Exit::of(*reason).0).collect();
        assert_eq!(codes.into_iter().collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn reasons_end_as_promised() {
        for (reason, code) in [
            (Reason::InvalidName, 2),
            (Reason::ValueEmpty, 2),
            (Reason::Denied, 3),
            (Reason::Unauthenticated, 3),
            (Reason::SecretNotFound, 4),
            (Reason::Unavailable, 5),
            (Reason::DeadlineExceeded, 5),
            (Reason::Conflict, 6),
            (Reason::ApprovalRequired, 7),
            (Reason::Tampered, 1),
            (Reason::Internal, 1),
        ] {
            assert_eq!(CliError::new(reason, "").exit(), Exit(code), "{reason}");
        }
    }

    #[test]
    fn before_the_command_runs_every_failure_is_125() {
        assert_eq!(CliError::new(Reason::Denied, "no").before_command().exit(), Exit(125));
    }

    #[test]
    fn an_error_keeps_its_reason_text_and_request() {
        let error = CliError::from(SecretName::parse("a//b").unwrap_err());
        assert_eq!((error.reason, error.exit()), (Some(Reason::InvalidName), Exit::USAGE));
        assert!(error.message.contains("a//b"), "{}", error.message);
        let client = ClientError {
            reason: Reason::Denied,
            code: tonic::Code::PermissionDenied,
            message: "no".to_owned(),
            request_id: Some("r-1".to_owned()),
        };
        assert_eq!(CliError::from(client).request_id.as_deref(), Some("r-1"));
    }

    #[test]
    fn a_closed_pipe_ends_quietly() {
        let closed = CliError::output(&io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!((closed.reason, closed.exit()), (None, Exit(141)));
        let full = CliError::output(&io::Error::from(io::ErrorKind::StorageFull));
        assert_eq!(full.exit(), Exit::FAULTS);
    }
}
