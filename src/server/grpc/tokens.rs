//! `TokenService`.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::policies::principal_kind;
use super::secrets::{Said, answer};
use super::{Changes, convert};
use crate::broker::{Broker, BrokerError};
use crate::identity::PrincipalKind;
use crate::identity::token::{Shown, SourceRange, TokenRequest};
use crate::proto::v1::{self, token_service_server::TokenService};

const MAX_PAGE: usize = 1_000;

/// The service.
pub(super) struct TokenAdministration {
    broker: Arc<Broker>,
    changes: Changes,
}

impl TokenAdministration {
    pub(super) const fn new(broker: Arc<Broker>, changes: Changes) -> Self {
        Self { broker, changes }
    }
}

#[tonic::async_trait]
impl TokenService for TokenAdministration {
    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Result<Response<v1::CreateTokenResponse>, Status> {
        answer(
            &self.broker,
            request,
            "create_token",
            |q| Said { reason: &q.reason, ..Said::default() },
            |call, q| {
                let subject = q.subject.ok_or_else(|| convert::invalid("subject: is missing"))?;
                let token = TokenRequest {
                    kind: principal_kind(subject.kind)?,
                    principal: subject.id,
                    groups: subject.groups.into_iter().collect(),
                    claims: subject.claims.into_iter().collect(),
                    expires_in: convert::span("expires_in", q.expires_in)?,
                    environments: q
                        .environments
                        .iter()
                        .map(|name| convert::environment(name))
                        .collect::<Result<_, _>>()?,
                    source_addresses: q
                        .source_addresses
                        .iter()
                        .map(|text| source_range(text))
                        .collect::<Result<_, _>>()?,
                    created_by: call.principal.to_string(),
                };
                let broker = Arc::clone(&self.broker);
                Ok(self.changes.run(async move {
                    let (record, secret) = broker.create_token(&call, token).await?;
                    let secret = secret.expose_text().unwrap_or_default().to_owned();
                    let token = described(Shown { record, last_used: None });
                    Ok(v1::CreateTokenResponse { token: Some(token), secret })
                }))
            },
        )
        .await
    }

    async fn list_tokens(
        &self,
        request: Request<v1::ListTokensRequest>,
    ) -> Result<Response<v1::ListTokensResponse>, Status> {
        answer(
            &self.broker,
            request,
            "list_tokens",
            |_| Said::default(),
            |call, q| {
                let limit = match usize::try_from(q.page_size) {
                    Ok(0) => MAX_PAGE,
                    Ok(size) if size <= MAX_PAGE => size,
                    _ => return Err(convert::invalid("page_size: must be 1 to 1000, or 0 for 1000")),
                };
                Ok(async move {
                    let mut tokens = self.broker.list_tokens(&call).await?;
                    tokens.retain(|token| token.record.id.as_str() > q.page_token.as_str());
                    let more = tokens.len() > limit;
                    tokens.truncate(limit);
                    let next_page_token = match tokens.last() {
                        Some(last) if more => last.record.id.clone(),
                        _ => String::new(),
                    };
                    Ok(v1::ListTokensResponse {
                        tokens: tokens.into_iter().map(described).collect(),
                        next_page_token,
                    })
                })
            },
        )
        .await
    }

    async fn revoke_token(
        &self,
        request: Request<v1::RevokeTokenRequest>,
    ) -> Result<Response<v1::RevokeTokenResponse>, Status> {
        answer(
            &self.broker,
            request,
            "revoke_token",
            |q| Said { reason: &q.reason, ..Said::default() },
            |call, q| {
                let broker = Arc::clone(&self.broker);
                Ok(self.changes.run(async move {
                    broker.revoke_token(&call, &q.id).await?;
                    Ok(v1::RevokeTokenResponse {})
                }))
            },
        )
        .await
    }
}

fn source_range(text: &str) -> Result<SourceRange, BrokerError> {
    SourceRange::parse(text).map_err(|problem| convert::invalid(format!("source_addresses: {problem}")))
}

fn described(Shown { record, last_used }: Shown) -> v1::Token {
    let kind = match record.kind {
        PrincipalKind::User => v1::PrincipalKind::User,
        PrincipalKind::Workload => v1::PrincipalKind::Workload,
    };
    v1::Token {
        id: record.id,
        subject: Some(v1::Subject {
            kind: kind.into(),
            id: record.principal,
            groups: record.groups.into_iter().collect(),
            claims: record.claims.into_iter().collect(),
        }),
        created_at: Some(convert::timestamp(record.created_at)),
        expires_at: Some(convert::timestamp(record.expires_at)),
        revoked_at: record.revoked_at.map(convert::timestamp),
        created_by: record.created_by,
        environments: record.environments.iter().map(ToString::to_string).collect(),
        source_addresses: record.source_addresses.iter().map(ToString::to_string).collect(),
        last_used_at: last_used.as_ref().map(|used| convert::timestamp(used.at)),
        last_used_from: last_used.map(|used| used.from).unwrap_or_default(),
    }
}
