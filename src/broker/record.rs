//! How a call becomes an audit record. No function here is given a value.

use super::{BrokerError, Call, Disclosed, outcome_of};
use crate::audit::{Kind, Outcome, Record, Texts, View};
use crate::error::Reasoned;
use crate::identity::SourceAddress;
use crate::policy::{Action, Decision, Grant, Resource};
use crate::secret::{FieldName, SecretId, Version};
use crate::store::{Fetched, Source};

/// Who called, from where, why.
pub(super) fn of_call(call: &Call, operation: &'static str) -> Record {
    Record {
        kind: Some(Kind::Access),
        principal: call.principal.shown().to_owned(),
        proof: call.principal.shown_proof().to_owned(),
        source_address: call.source_address.to_string(),
        operation: operation.to_owned(),
        request_id: call.request_id.to_string(),
        reason: call.reason.clone().unwrap_or_default(),
        ..Record::default()
    }
}

/// The same, with what it was about and what policy said.
pub(super) fn of_resource(
    call: &Call,
    operation: &'static str,
    action: Action,
    resource: &Resource,
    decision: Option<&Decision>,
) -> Record {
    let mut record = of_call(call, operation);
    action.as_str().clone_into(&mut record.action);
    if let Some(environment) = resource.environment() {
        environment.as_str().clone_into(&mut record.environment);
    }
    if let Resource::Secret(id) = resource {
        id.name.as_str().clone_into(&mut record.secret);
    }
    if let Some(decision) = decision {
        decision.effect.as_str().clone_into(&mut record.decision);
        record.policies = decision.policies.iter().map(ToString::to_string).collect();
    }
    record
}

/// The same, for what a grant permits.
pub(super) fn of_grant(call: &Call, operation: &'static str, grant: &Grant) -> Record {
    of_resource(call, operation, grant.action(), grant.resource(), Some(grant.decision()))
}

/// What is the same in every record of one call's reads.
pub(super) struct Reads<'a> {
    call: &'a Call,
    operation: &'static str,
    source_address: String,
}

impl<'a> Reads<'a> {
    pub(super) fn of(call: &'a Call, operation: &'static str) -> Self {
        Self { call, operation, source_address: call.source_address.to_string() }
    }

    /// A read that policy permitted, as it is written: what [`of_grant`] says, without making a [`Record`] of it.
    pub(super) fn permitted<'b>(&'b self, grant: &'b Grant, field: Option<&'b FieldName>) -> View<'b> {
        let (environment, secret) = match grant.resource() {
            Resource::Secret(id) => (id.environment.as_str(), id.name.as_str()),
            Resource::Environment(environment) => (environment.as_str(), ""),
            Resource::Broker => ("", ""),
        };
        View {
            kind: Some(Kind::Access),
            principal: self.call.principal.shown(),
            proof: self.call.principal.shown_proof(),
            source_address: &self.source_address,
            action: grant.action().as_str(),
            operation: self.operation,
            environment,
            secret,
            field: field.map_or("", FieldName::as_str),
            decision: grant.decision().effect.as_str(),
            policies: Texts::Shared(&grant.decision().policies),
            request_id: &self.call.request_id,
            reason: self.call.reason.as_deref().unwrap_or_default(),
            ..View::default()
        }
    }
}

/// The same read, at its end.
pub(super) fn ended<'a>(view: View<'a>, result: Result<&'a Disclosed, &BrokerError>) -> View<'a> {
    match result {
        Ok(disclosed) => View {
            version_id: disclosed.version.id.as_str(),
            labels: Texts::Labels(&disclosed.version.labels),
            source: match disclosed.source {
                Source::Store => "store",
                Source::Cache => "cache",
            },
            stale: disclosed.stale,
            outcome: Some(if disclosed.value.is_some() { Outcome::Ok } else { Outcome::Unchanged }),
            ..view
        },
        Err(error) => {
            View { outcome: Some(outcome_of(error.reason())), error: error.reason().code(), ..view }
        }
    }
}

/// A caller whom nobody knows.
pub(super) fn stranger(
    source_address: &SourceAddress,
    request_id: &str,
    operation: &'static str,
    error: &impl Reasoned,
) -> Record {
    Record {
        kind: Some(Kind::Access),
        source_address: source_address.to_string(),
        operation: operation.to_owned(),
        request_id: request_id.to_owned(),
        outcome: Some(outcome_of(error.reason())),
        error: error.reason().code().to_owned(),
        detail: error.to_string(),
        ..Record::default()
    }
}

/// The policy set itself.
pub(super) fn of_policies(operation: &str) -> Record {
    Record { kind: Some(Kind::Policy), operation: operation.to_owned(), ..Record::default() }
}

/// The broker's own work on a secret, by nobody's call.
pub(super) fn of_housekeeping(operation: &str, id: &SecretId) -> Record {
    Record {
        kind: Some(Kind::Intent),
        operation: operation.to_owned(),
        environment: id.environment.to_string(),
        secret: id.name.to_string(),
        ..Record::default()
    }
}

impl Record {
    /// It is about to be done.
    pub(super) fn intent(mut self) -> Self {
        self.kind = Some(Kind::Intent);
        self
    }

    /// It was done.
    pub(super) fn done(mut self) -> Self {
        self.outcome = Some(Outcome::Ok);
        self
    }

    /// It was not done.
    pub(super) fn ended(mut self, error: &BrokerError) -> Self {
        self.outcome = Some(outcome_of(error.reason()));
        error.reason().code().clone_into(&mut self.error);
        self
    }

    /// What a request that made no sense was about, in the caller's words; the log escapes and cuts them.
    pub(super) fn about(mut self, environment: &str, secret: &str) -> Self {
        environment.clone_into(&mut self.environment);
        secret.clone_into(&mut self.secret);
        self
    }

    /// Which member was asked for.
    pub(super) fn of_field(mut self, field: Option<&FieldName>) -> Self {
        if let Some(field) = field {
            field.as_str().clone_into(&mut self.field);
        }
        self
    }

    /// Which version it was about.
    pub(super) fn of_version(mut self, version: &Version) -> Self {
        version.id.as_str().clone_into(&mut self.version_id);
        self.labels = version.labels.iter().map(ToString::to_string).collect();
        self
    }

    /// Which version left, from where, and whether it was past its time.
    pub(super) fn of_fetched(self, fetched: &Fetched) -> Self {
        let mut record = self.of_version(&fetched.version);
        match fetched.source {
            Source::Store => "store",
            Source::Cache => "cache",
        }
        .clone_into(&mut record.source);
        record.stale = fetched.stale;
        record
    }

    /// What else is worth knowing.
    pub(super) fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }
}
