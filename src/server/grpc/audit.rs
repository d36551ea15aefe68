//! `AuditService`.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::Stream;
use serde::Deserialize;
use tokio::sync::{broadcast, watch};
use tonic::{Request, Response, Status};

use super::convert;
use super::secrets::{Said, answer};
use super::status::status;
use crate::audit::{Query, Report};
use crate::broker::{AuditView, Broker, BrokerError, Call};
use crate::proto::v1::{self, audit_service_server::AuditService};

/// The service.
pub(super) struct AuditReading {
    broker: Arc<Broker>,
    shutdown: watch::Receiver<bool>,
}

impl AuditReading {
    pub(super) const fn new(broker: Arc<Broker>, shutdown: watch::Receiver<bool>) -> Self {
        Self { broker, shutdown }
    }
}

type Tail = Pin<Box<dyn Stream<Item = Result<v1::TailResponse, Status>> + Send>>;

#[tonic::async_trait]
impl AuditService for AuditReading {
    async fn query(&self, request: Request<v1::QueryRequest>) -> Result<Response<v1::QueryResponse>, Status> {
        answer(
            &self.broker,
            request,
            "query_audit",
            |q| Said { environment: &q.environment, ..Said::default() },
            |call, q| {
                let view = view(&q.environment)?;
                let query = query(q)?;
                Ok(async move {
                    let lines = self.broker.query_audit(&call, &view, query).await?;
                    Ok(v1::QueryResponse { lines })
                })
            },
        )
        .await
    }

    type TailStream = Tail;

    async fn tail(&self, request: Request<v1::TailRequest>) -> Result<Response<Tail>, Status> {
        answer(
            &self.broker,
            request,
            "tail_audit",
            |q| Said { environment: &q.environment, ..Said::default() },
            |call, q| {
                let view = view(&q.environment)?;
                let shutdown = self.shutdown.clone();
                Ok(async move {
                    let lines = self.broker.tail_audit(&call, &view).await?;
                    let follower = Follower { broker: Arc::clone(&self.broker), call, view };
                    Ok(follow(lines, follower, shutdown))
                })
            },
        )
        .await
    }

    async fn verify(
        &self,
        request: Request<v1::VerifyRequest>,
    ) -> Result<Response<v1::VerifyResponse>, Status> {
        answer(
            &self.broker,
            request,
            "verify_audit",
            |_| Said::default(),
            |call, _| Ok(async move { self.broker.verify_audit(&call).await.map(report) }),
        )
        .await
    }
}

fn view(environment: &str) -> Result<AuditView, BrokerError> {
    match environment {
        "" => Ok(AuditView::Everything),
        text => Ok(AuditView::Environment(convert::environment(text)?)),
    }
}

fn query(q: v1::QueryRequest) -> Result<Query, BrokerError> {
    let given = |text: String| (!text.is_empty()).then_some(text);
    let limit = match usize::try_from(q.limit) {
        Ok(0) => 100,
        Ok(limit @ 1..=10_000) => limit,
        _ => return Err(convert::invalid("limit: must be 1 to 10000, or 0 for 100")),
    };
    let outcome = match q.outcome.as_str() {
        "" => None,
        text => Some(serde_json::from_value(serde_json::Value::String(text.to_owned())).map_err(|_| {
            convert::invalid("outcome: must be ok, unchanged, denied, unauthenticated, not_found or failed")
        })?),
    };
    Ok(Query {
        principal: given(q.principal),
        action: given(q.action),
        environment: given(q.environment),
        secret: given(q.secret),
        outcome,
        since: convert::time("since", q.since)?,
        until: convert::time("until", q.until)?,
        request_id: given(q.request_id),
        limit,
        ..Query::default()
    })
}

/// Who follows, and what.
struct Follower {
    broker: Arc<Broker>,
    call: Call,
    view: AuditView,
}

/// Lines as they come. A reader that falls behind is told how many it missed; it never holds up the log. One that may
/// no longer read is told so, and the stream ends.
fn follow(lines: broadcast::Receiver<Arc<str>>, follower: Follower, shutdown: watch::Receiver<bool>) -> Tail {
    let state = Some((lines, follower, shutdown, 0_u64));
    Box::pin(futures_util::stream::unfold(state, |state| async move {
        let (mut lines, follower, mut shutdown, mut skipped) = state?;
        loop {
            let received = tokio::select! {
                received = lines.recv() => received,
                _ = shutdown.wait_for(|stop| *stop) => return None,
            };
            match received {
                Ok(line) if in_view(&line, &follower.view) => {
                    if let Err(error) = follower.broker.may_still_tail(&follower.call, &follower.view) {
                        return Some((Err(status(&error, &follower.call.request_id)), None));
                    }
                    let line = v1::TailResponse { line: line.to_string(), skipped };
                    return Some((Ok(line), Some((lines, follower, shutdown, 0))));
                }
                Ok(_) => {}
                Err(broadcast::error::RecvError::Lagged(missed)) => skipped += missed,
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }))
}

#[derive(Deserialize)]
struct OfEnvironment<'a> {
    #[serde(borrow, default)]
    environment: std::borrow::Cow<'a, str>,
}

fn in_view(line: &str, view: &AuditView) -> bool {
    match view {
        AuditView::Everything => true,
        AuditView::Environment(environment) => serde_json::from_str::<OfEnvironment<'_>>(line)
            .is_ok_and(|record| record.environment == environment.as_str()),
    }
}

fn report(report: Report) -> v1::VerifyResponse {
    let chains = report.instances.into_iter().map(|chain| v1::Chain {
        unanchored: chain.unanchored,
        first_sequence: chain.first.unwrap_or_default(),
        last_sequence: chain.last.unwrap_or_default(),
        last_hash: chain.last_hash.map(|hash| hash.to_string()).unwrap_or_default(),
        checkpoints: chain.checkpoints,
        clean_shutdown: chain.clean_shutdown,
        losses: chain.losses,
        repairs: chain.repairs,
        torn_bytes: chain.torn_bytes,
        instance: chain.instance,
    });
    let findings = report.findings.into_iter().map(|finding| v1::Finding {
        file: finding.file,
        line: finding.line,
        sequence: finding.sequence.unwrap_or_default(),
        kind: finding.kind.as_str().to_owned(),
        message: finding.message,
    });
    v1::VerifyResponse {
        chains: chains.collect(),
        findings: findings.collect(),
        more_findings: report.more_findings,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::InstanceReport;

    #[test]
    fn a_report_tells_what_was_lost_mended_and_left_out() {
        let chain = InstanceReport { losses: 1, repairs: 2, torn_bytes: 3, ..InstanceReport::default() };
        let told = report(Report { instances: vec![chain], more_findings: 4, ..Report::default() });
        assert_eq!(told.more_findings, 4);
        let [chain] = &told.chains[..] else { panic!("{told:?}") };
        assert_eq!((chain.losses, chain.repairs, chain.torn_bytes), (1, 2, 3));
    }
}
