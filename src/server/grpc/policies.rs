//! `PolicyService`.

use std::collections::BTreeSet;
use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::secrets::{Said, answer};
use super::{Changes, convert, rejected};
use crate::broker::{Broker, BrokerError};
use crate::identity::{Principal, PrincipalKind, Proof};
use crate::policy::Action;
use crate::proto::v1::{self, policy_service_server::PolicyService};

/// The service.
pub(super) struct PolicyQuestions {
    broker: Arc<Broker>,
    changes: Changes,
}

impl PolicyQuestions {
    pub(super) const fn new(broker: Arc<Broker>, changes: Changes) -> Self {
        Self { broker, changes }
    }
}

#[tonic::async_trait]
impl PolicyService for PolicyQuestions {
    async fn check(&self, request: Request<v1::CheckRequest>) -> Result<Response<v1::CheckResponse>, Status> {
        answer(
            &self.broker,
            request,
            "check_policy",
            |q| Said { reason: &q.reason, environment: &q.environment, name: &q.name },
            |call, q| {
                let action = Action::parse(&q.action).map_err(|error| rejected(&error))?;
                let resource = convert::resource(&q.environment, &q.name)?;
                Ok(async move {
                    let effect = self.broker.check_policy(&call, action, &resource).await?;
                    let (effect, approvals) = convert::effect(effect);
                    Ok(v1::CheckResponse { effect, approvals })
                })
            },
        )
        .await
    }

    async fn explain(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::ExplainResponse>, Status> {
        answer(
            &self.broker,
            request,
            "explain_policy",
            |q| Said { reason: &q.reason, environment: &q.environment, name: &q.name },
            |call, q| {
                let action = Action::parse(&q.action).map_err(|error| rejected(&error))?;
                let resource = convert::resource(&q.environment, &q.name)?;
                let subject = q.subject.map(subject).transpose()?;
                Ok(async move {
                    let principal =
                        subject.as_ref().map_or_else(|| call.principal.to_string(), ToString::to_string);
                    let explanation = self.broker.explain_policy(&call, subject, action, &resource).await?;
                    let (effect, approvals) = convert::effect(explanation.effect);
                    let policies = explanation.policies.into_iter().map(|policy| v1::ExplainedPolicy {
                        id: policy.id.to_string(),
                        file: policy.file.to_string(),
                        effect: policy.effect.to_owned(),
                        satisfied: policy.satisfied,
                        decided: policy.decided,
                        error: policy.error.unwrap_or_default(),
                    });
                    Ok(v1::ExplainResponse { effect, approvals, principal, policies: policies.collect() })
                })
            },
        )
        .await
    }

    async fn reload(
        &self,
        request: Request<v1::ReloadRequest>,
    ) -> Result<Response<v1::ReloadResponse>, Status> {
        answer(
            &self.broker,
            request,
            "reload_policy",
            |_| Said::default(),
            |call, _| {
                let broker = Arc::clone(&self.broker);
                Ok(self.changes.run(async move {
                    let reloaded = broker.reload_policy(&call).await?;
                    Ok(v1::ReloadResponse {
                        generation: reloaded.generation,
                        policies: i32::try_from(reloaded.policies).unwrap_or(i32::MAX),
                        warnings: reloaded.warnings,
                    })
                }))
            },
        )
        .await
    }
}

/// A principal as a question describes it. It proves nothing; questions about it change nothing.
pub(super) fn subject(subject: v1::Subject) -> Result<Principal, BrokerError> {
    let kind = principal_kind(subject.kind)?;
    if subject.id.is_empty() {
        return Err(convert::invalid("subject.id: is empty"));
    }
    let groups: BTreeSet<_> = subject.groups.into_iter().collect();
    let claims = subject.claims.into_iter().collect();
    let proof = Proof { method: "supposed", detail: String::new() };
    Ok(Principal::new(kind, subject.id, groups, claims, proof))
}

pub(super) fn principal_kind(kind: i32) -> Result<PrincipalKind, BrokerError> {
    match v1::PrincipalKind::try_from(kind) {
        Ok(v1::PrincipalKind::User) => Ok(PrincipalKind::User),
        Ok(v1::PrincipalKind::Workload) => Ok(PrincipalKind::Workload),
        _ => Err(convert::invalid("subject.kind: must be PRINCIPAL_KIND_USER or PRINCIPAL_KIND_WORKLOAD")),
    }
}
