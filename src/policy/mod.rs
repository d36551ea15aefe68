//! May they: Cedar policies, and the [`Grant`] that only this module can make.
//!
//! A question (principal, action, resource, context) goes through the current [`Policies`]; the answer is a [`Grant`]
//! or a [`Refusal`], each with the [`Decision`] behind it. Deny is the default; an evaluation error denies.
//!
//! Annotations that the house gives a meaning to:
//!
//! | annotation | meaning |
//! |---|---|
//! | `@id("…")` | the policy's id in decisions and audit records; required, unique |
//! | `@approvals("N")` | on a permit: what it permits needs N approvals by others (1 or more) |
//! | `@expires("RFC 3339")` | inert from then on |
//! | `@allow_wildcard("why")` | this permit may give every action on what is protected, anything to everyone on everything without a condition, or `administer` to everyone |
//! | `@loud("true")` | a decision by it is logged as a warning |

mod bounds;
mod engine;
mod entities;
mod expectations;
mod explain;
mod rules;
mod slice;
mod source;

use std::fmt;
use std::sync::Arc;

use crate::error::{Reason, Reasoned};
use crate::identity::Principal;
use crate::secret::{EnvironmentName, SecretId};

pub use engine::{Policies, Reloaded};
pub use expectations::{Expectation, ExpectationReport, load_expectations};
pub use explain::{ExplainedPolicy, Explanation};
pub use source::{PolicySource, SHIPPED};

macro_rules! actions {
    ($($(#[$doc:meta])* $variant:ident = $name:literal),+ $(,)?) => {
        /// What a caller wants to do.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Action { $($(#[$doc])* $variant),+ }

        impl Action {
            /// Every action.
            pub const ALL: &'static [Action] = &[$(Action::$variant),+];

            /// The action's name, as policies and audit records have it.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Action::$variant => $name),+ }
            }
        }
    };
}

actions! {
    /// See a value.
    Read = "read",
    /// See which secrets there are.
    List = "list",
    /// See a secret's versions and labels.
    Describe = "describe",
    /// Write a version, or move a label of the user's own.
    Write = "write",
    /// Start a rotation.
    Rotate = "rotate",
    /// Make the previous version current again.
    Rollback = "rollback",
    /// Delete or restore a secret.
    Delete = "delete",
    /// Copy values into this environment from another.
    Promote = "promote",
    /// Approve another's request.
    Approve = "approve",
    /// Manage tokens, policies and the broker.
    Administer = "administer",
    /// Read and verify the audit log.
    Audit = "audit",
}

impl Action {
    /// The action of this name.
    ///
    /// # Errors
    /// [`Reason::InvalidArgument`], with the nearest name.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        Self::ALL.iter().copied().find(|action| action.as_str() == text).ok_or_else(|| {
            let nearest = Self::ALL
                .iter()
                .map(|action| action.as_str())
                .min_by_key(|name| strsim::damerau_levenshtein(name, text))
                .unwrap_or_default();
            let text: String = text.escape_default().take(32).collect();
            PolicyError::UnknownAction { text, nearest }
        })
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What an action is done to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Resource {
    /// The broker itself: tokens, policies, the whole audit log. `Environment::"claviger"` in policies, a name that
    /// no environment can have.
    Broker,
    /// An environment as a whole.
    Environment(EnvironmentName),
    /// One secret, whether or not it exists.
    Secret(SecretId),
}

impl Resource {
    /// The environment concerned; `None` for the broker.
    #[must_use]
    pub const fn environment(&self) -> Option<&EnvironmentName> {
        match self {
            Self::Broker => None,
            Self::Environment(environment) => Some(environment),
            Self::Secret(id) => Some(&id.environment),
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Broker => f.write_str("the broker"),
            Self::Environment(environment) => write!(f, "environment `{environment}`"),
            Self::Secret(id) => write!(f, "secret `{}` in environment `{}`", id.name, id.environment),
        }
    }
}

/// What of the request itself a policy may look at. A decision that did is not cached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Context {
    /// Why the caller wants it, in the caller's words. Policies don't see one that is blank.
    pub reason: Option<String>,
}

/// Yes, no, or not alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Permitted.
    Allow,
    /// Forbidden, or not permitted by any policy.
    Deny,
    /// Permitted with so many approvals by others.
    ApprovalRequired(u8),
}

impl Effect {
    /// The effect's name, as audit records have it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::ApprovalRequired(_) => "approval_required",
        }
    }
}

/// An answer with the ids of the policies that decided; empty where no policy applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Yes, no, or not alone.
    pub effect: Effect,
    /// The ids of the deciding policies, sorted.
    pub policies: Vec<Arc<str>>,
    /// Whether a policy failed to evaluate, which denies.
    pub evaluation_failed: bool,
}

/// Leave to do one thing to one resource. Made only by [`Policies::authorize`]; whoever holds one has been authorised
/// for exactly what it names.
#[derive(Debug, Clone)]
pub struct Grant {
    principal: Arc<Principal>,
    action: Action,
    resource: Resource,
    decision: Arc<Decision>,
}

impl Grant {
    /// Who was authorised.
    #[must_use]
    pub const fn principal(&self) -> &Arc<Principal> {
        &self.principal
    }

    /// To do what.
    #[must_use]
    pub const fn action(&self) -> Action {
        self.action
    }

    /// To what.
    #[must_use]
    pub const fn resource(&self) -> &Resource {
        &self.resource
    }

    /// By which policies.
    #[must_use]
    pub const fn decision(&self) -> &Arc<Decision> {
        &self.decision
    }
}

/// A decision that is not a grant. The caller is told no more than the message; policy ids go to the audit log.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}", .message)]
pub struct Refusal {
    /// The decision behind it.
    pub decision: Arc<Decision>,
    message: String,
}

impl Refusal {
    fn new(principal: &Principal, action: Action, resource: &Resource, decision: Arc<Decision>) -> Self {
        let message = match decision.effect {
            Effect::ApprovalRequired(approvals) => {
                format!(
                    "{principal} may {action} {resource} only with {approvals} approvals by others, which this version \
                     can't take yet"
                )
            }
            Effect::Allow | Effect::Deny => {
                format!("{principal} may not {action} {resource}; ask whoever keeps the policies")
            }
        };
        Self { decision, message }
    }
}

impl Reasoned for Refusal {
    fn reason(&self) -> Reason {
        match self.decision.effect {
            Effect::ApprovalRequired(_) => Reason::ApprovalRequired,
            Effect::Allow | Effect::Deny => Reason::Denied,
        }
    }
}

/// Why a policy set is not usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// A file can't be read.
    #[error("{path}: {problem}")]
    Unreadable {
        /// The file or folder.
        path: String,
        /// What is wrong and the mend.
        problem: String,
    },
    /// A file does not parse, validate, or keep the house rules.
    #[error("{place}: {problem}")]
    Invalid {
        /// File, line and column, policy id: as far as known.
        place: String,
        /// What is wrong and the mend.
        problem: String,
    },
    /// No policy at all: nobody could do anything.
    #[error("{place}: no policy; write at least one permit, or start from the shipped set")]
    Empty {
        /// Where policies were looked for.
        place: String,
    },
    /// No such action.
    #[error("unknown action `{text}`; did you mean `{nearest}`?")]
    UnknownAction {
        /// What was given.
        text: String,
        /// The nearest action.
        nearest: &'static str,
    },
}

impl Reasoned for PolicyError {
    fn reason(&self) -> Reason {
        match self {
            Self::UnknownAction { .. } => Reason::InvalidArgument,
            _ => Reason::InvalidPolicy,
        }
    }
}
