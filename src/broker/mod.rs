//! Read this first: the one place where grant, cached store, audit and value meet. Every front door calls it, and so
//! does the broker's own work.
//!
//! ```text
//! read    Call ─▶ authorize ─▶ Grant ─▶ Guarded (cache, store) ─▶ record, durable ─▶ value
//! change  Call ─▶ authorize ─▶ Grant ─▶ intent, durable ─▶ Guarded ─▶ record, durable ─▶ answer
//!                    │
//!                    └─ Refusal ─▶ record, durable ─▶ error
//! ```
//!
//! INVARIANT: nothing that a store said leaves this module before its record is as durable as its environment asks
//! ([`Broker::released`], and for values [`Broker::recorded`]); a change is on record before it is made ([`Broker::intend`]). When the log can't be
//! written, both fail and nothing is served.
//!
//! INVARIANT: the stores are reachable only through [`Guarded`], whose methods take a [`Grant`].

mod administer;
pub mod caches;
pub mod consumers;
pub mod keys;
mod read;
mod record;
mod rotate;
pub mod watch;
mod write;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::audit::{AuditError, Batch, Log, Outcome, Record};
use crate::clock::SharedClock;
use crate::environment::{Durability, EnvironmentError, Registry};
use crate::error::{Reason, Reasoned};
use crate::identity::token::{TokenError, Tokens};
use crate::identity::{Principal, SourceAddress};
use crate::policy::{Action, Context, Grant, Policies, PolicyError, Refusal, Resource};
use crate::secret::{FieldError, SecretId};
use crate::store::StoreError;
use crate::store::guarded::Guarded;
use crate::telemetry::metrics::Metrics;

pub use administer::AuditView;
pub use read::{BatchRequest, Disclosed, MAX_BATCH, Read};
pub use rotate::{Held, Run};
pub use write::RolledBack;

/// The parts that a broker is made of.
pub struct Parts {
    /// The declared environments.
    pub registry: Registry,
    /// Who may do what.
    pub policies: Arc<Policies>,
    /// The cached stores.
    pub stores: Guarded,
    /// What happened.
    pub log: Log,
    /// The broker's own tokens.
    pub tokens: Arc<Tokens>,
    /// Who is told of changes.
    pub feed: watch::Feed,
    /// Who runs on which version.
    pub consumers: consumers::Consumers,
    /// What is remembered of the stores.
    pub caches: caches::Caches,
    /// The broker's own keys.
    pub keys: keys::Keys,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// The time.
    pub clock: SharedClock,
}

/// The broker.
pub struct Broker {
    parts: Parts,
    /// Whether the last reload of the policies was refused.
    reload_refused: AtomicBool,
}

/// A call as the front door understood it: who, from where, why.
#[derive(Debug, Clone)]
pub struct Call {
    /// Who is calling.
    pub principal: Arc<Principal>,
    /// From where.
    pub source_address: SourceAddress,
    /// The request's id, told to the caller too.
    pub request_id: Arc<str>,
    /// Why, in the caller's words.
    pub reason: Option<String>,
}

impl Call {
    /// A call by the broker itself, under its own principal. Authorised and recorded like any other.
    #[must_use]
    pub fn internal(principal: Principal, reason: &str) -> Self {
        Self {
            principal: Arc::new(principal),
            source_address: SourceAddress::Internal,
            request_id: uuid::Uuid::new_v4().to_string().into(),
            reason: Some(reason.to_owned()),
        }
    }
}

/// Why there is no answer. Each variant is its layer's own error; this one only tells them apart.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// Policy.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The environment.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The field asked for.
    #[error("secret `{name}` in environment `{environment}`: {source}", name = .id.name, environment = .id.environment)]
    Field {
        /// The secret.
        id: SecretId,
        /// What is wrong with the field.
        source: FieldError,
    },
    /// The audit log.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The policy set.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A request that the broker can't take.
    #[error("{message}")]
    Rejected {
        /// The stable reason.
        reason: Reason,
        /// What is wrong and the mend.
        message: String,
    },
}

impl Reasoned for BrokerError {
    fn reason(&self) -> Reason {
        match self {
            Self::Refused(error) => error.reason(),
            Self::Environment(error) => error.reason(),
            Self::Store(error) => error.reason(),
            Self::Field { source, .. } => source.reason(),
            Self::Audit(error) => error.reason(),
            Self::Policy(error) => error.reason(),
            Self::Token(error) => error.reason(),
            Self::Rejected { reason, .. } => *reason,
        }
    }
}

impl BrokerError {
    /// A request that the broker can't take: the stable reason, what is wrong, and the mend.
    #[must_use]
    pub fn rejected(reason: Reason, message: impl Into<String>) -> Self {
        Self::Rejected { reason, message: message.into() }
    }
}

impl Broker {
    /// A broker of these parts.
    #[must_use]
    pub const fn new(parts: Parts) -> Self {
        Self { parts, reload_refused: AtomicBool::new(false) }
    }

    /// The declared environments.
    #[must_use]
    pub const fn registry(&self) -> &Registry {
        &self.parts.registry
    }

    /// The audit log.
    #[must_use]
    pub const fn log(&self) -> &Log {
        &self.parts.log
    }

    /// The policies.
    #[must_use]
    pub const fn policies(&self) -> &Arc<Policies> {
        &self.parts.policies
    }

    /// Who is told of changes.
    #[must_use]
    pub const fn feed(&self) -> &watch::Feed {
        &self.parts.feed
    }

    /// Records a caller who could not be recognised.
    ///
    /// # Errors
    /// Where the log can't be written.
    pub async fn record_stranger(
        &self,
        source_address: &SourceAddress,
        request_id: &str,
        operation: &'static str,
        error: &impl Reasoned,
    ) -> Result<(), BrokerError> {
        let record = record::stranger(source_address, request_id, operation, error);
        self.append(record, Durability::Durable).await
    }

    /// Records a request by a known caller that made no sense, with what it was about in the caller's own words, and
    /// gives its error back.
    pub async fn record_rejected(
        &self,
        call: &Call,
        operation: &'static str,
        (environment, secret): (&str, &str),
        error: BrokerError,
    ) -> BrokerError {
        let record = record::of_call(call, operation).about(environment, secret).ended(&error);
        let record = record.with_detail(error.to_string());
        match self.append(record, Durability::Durable).await {
            Ok(()) => error,
            Err(unrecorded) => unrecorded,
        }
    }

    /// May the caller? A refusal is on record before the caller hears of it. What is absent is refused like what is
    /// there: policy never looks into a store.
    async fn authorize(
        &self,
        call: &Call,
        operation: &'static str,
        action: Action,
        resource: &Resource,
    ) -> Result<Grant, BrokerError> {
        let outcome = self.decide(call, action, resource).and_then(|grant| {
            if let Some(environment) = resource.environment() {
                self.parts
                    .registry
                    .get(environment)
                    .map_err(|error| (Some(grant.decision().clone()), error.into()))?;
            }
            Ok(grant)
        });
        match outcome {
            Ok(grant) => Ok(grant),
            Err((decision, error)) => {
                let record =
                    record::of_resource(call, operation, action, resource, decision.as_deref()).ended(&error);
                self.append(record, self.durability(resource)).await?;
                Err(error)
            }
        }
    }

    fn decide(
        &self,
        call: &Call,
        action: Action,
        resource: &Resource,
    ) -> Result<Grant, (Option<Arc<crate::policy::Decision>>, BrokerError)> {
        self.admitted(call, resource).map_err(|error| (None, error))?;
        let context = Context { reason: call.reason.clone() };
        self.parts
            .policies
            .authorize(&call.principal, action, resource, &context)
            .map_err(|refusal| (Some(Arc::clone(&refusal.decision)), refusal.into()))
    }

    /// Whether the caller's credential is good for what it asks about, and the caller where it may be. Asked before
    /// policy is, and never cached: it depends on where a call comes from.
    fn admitted(&self, call: &Call, resource: &Resource) -> Result<(), BrokerError> {
        let environment = resource.environment();
        let refuse = |message: String| Err(BrokerError::rejected(Reason::Denied, message));
        if !call.principal.reaches(environment) {
            return refuse(format!(
                "{} presents a credential that is not good for {resource}; ask for another one",
                call.principal
            ));
        }
        let declared = environment.and_then(|environment| self.parts.registry.get(environment).ok());
        match declared {
            Some(declared) if !declared.admits(call.source_address.ip()) => refuse(format!(
                "environment `{}` does not take calls from {}; call from an address of its source_addresses",
                declared.name, call.source_address
            )),
            _ => Ok(()),
        }
    }

    /// Puts a change on record before it is made.
    async fn intend(&self, call: &Call, operation: &'static str, grant: &Grant) -> Result<(), BrokerError> {
        let record = record::of_grant(call, operation, grant).intent();
        self.append(record, self.durability(grant.resource())).await
    }

    /// Gives `result` out after its record is durable: the one exit for everything that a store said.
    async fn released<T>(
        &self,
        grant: &Grant,
        record: Record,
        result: Result<T, BrokerError>,
        describe: impl FnOnce(&T, Record) -> Record,
    ) -> Result<T, BrokerError> {
        let record = match &result {
            Ok(answer) => describe(answer, record),
            Err(error) => record.ended(error),
        };
        self.append(record, self.durability(grant.resource())).await?;
        result
    }

    /// Gives `answer` out after the records of it, which a read encodes as it makes them: the one exit for values.
    async fn recorded<T>(&self, records: Batch, durability: Durability, answer: T) -> Result<T, BrokerError> {
        if !records.is_empty() {
            self.parts.log.append_encoded(records, durability).await?;
        }
        Ok(answer)
    }

    async fn append(&self, record: Record, durability: Durability) -> Result<(), BrokerError> {
        self.parts.log.append(record, durability).await?;
        Ok(())
    }

    /// As the environment asks; the broker's own business and undeclared environments are always durable.
    fn durability(&self, resource: &Resource) -> Durability {
        resource
            .environment()
            .and_then(|environment| self.parts.registry.get(environment).ok())
            .map_or(Durability::Durable, |environment| environment.durability)
    }
}

impl fmt::Debug for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Broker").field("registry", &self.parts.registry).finish_non_exhaustive()
    }
}

/// How a failure is filed.
pub(crate) const fn outcome_of(reason: Reason) -> Outcome {
    match reason {
        Reason::Denied | Reason::ApprovalRequired => Outcome::Denied,
        Reason::Unauthenticated => Outcome::Unauthenticated,
        Reason::EnvironmentNotFound
        | Reason::SecretNotFound
        | Reason::VersionNotFound
        | Reason::FieldNotFound
        | Reason::RotationNotFound
        | Reason::TokenNotFound => Outcome::NotFound,
        _ => Outcome::Failed,
    }
}
