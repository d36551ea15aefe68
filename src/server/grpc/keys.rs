//! `KeyService`.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::Stream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::{Request, Response, Status};

use super::secrets::{Said, answer};
use super::status::status;
use super::{Changes, convert};
use crate::broker::keys::{AuditKeyInfo, RootKeyInfo, RootKeyProgress, RootKeyRotated};
use crate::broker::{Broker, BrokerError};
use crate::error::Reason;
use crate::proto::v1::{self, key_service_server::KeyService};

/// The service.
pub(super) struct KeyAdministration {
    broker: Arc<Broker>,
    changes: Changes,
    shutdown: watch::Receiver<bool>,
}

impl KeyAdministration {
    pub(super) const fn new(broker: Arc<Broker>, changes: Changes, shutdown: watch::Receiver<bool>) -> Self {
        Self { broker, changes, shutdown }
    }
}

type Rotation = Pin<Box<dyn Stream<Item = Result<v1::RotateRootKeyResponse, Status>> + Send>>;

#[tonic::async_trait]
impl KeyService for KeyAdministration {
    async fn get_key_status(
        &self,
        request: Request<v1::GetKeyStatusRequest>,
    ) -> Result<Response<v1::GetKeyStatusResponse>, Status> {
        answer(
            &self.broker,
            request,
            "key_status",
            |q| Said { reason: &q.reason, ..Said::default() },
            |call, _| {
                Ok(async move {
                    let status = self.broker.key_status(&call).await?;
                    Ok(v1::GetKeyStatusResponse {
                        root_keys: status.root_keys.into_iter().map(root_key).collect(),
                        audit_keys: status.audit_keys.into_iter().map(audit_key).collect(),
                    })
                })
            },
        )
        .await
    }

    type RotateRootKeyStream = Rotation;

    async fn rotate_root_key(
        &self,
        request: Request<v1::RotateRootKeyRequest>,
    ) -> Result<Response<Rotation>, Status> {
        answer(
            &self.broker,
            request,
            "rotate_root_key",
            |q| Said { reason: &q.reason, ..Said::default() },
            |call, q| {
                let (broker, changes) = (Arc::clone(&self.broker), self.changes.clone());
                let stop = self.shutdown.clone();
                let request_id = call.request_id.clone();
                Ok(async move {
                    let (told, progress) = watch::channel(RootKeyProgress::default());
                    // A task of its own: it goes on when nobody looks any more.
                    let rotation = tokio::spawn(async move {
                        let rotate =
                            async move { broker.rotate_root_key(&call, q.rewrap_only, told, stop).await };
                        changes.run(rotate).await
                    });
                    Ok(follow(progress, rotation, request_id))
                })
            },
        )
        .await
    }

    async fn rotate_audit_key(
        &self,
        request: Request<v1::RotateAuditKeyRequest>,
    ) -> Result<Response<v1::RotateAuditKeyResponse>, Status> {
        answer(
            &self.broker,
            request,
            "rotate_audit_key",
            |q| Said { reason: &q.reason, ..Said::default() },
            |call, _| {
                let broker = Arc::clone(&self.broker);
                Ok(self.changes.run(async move {
                    let rotated = broker.rotate_audit_key(&call).await?;
                    Ok(v1::RotateAuditKeyResponse {
                        key: Some(audit_key(rotated.info)),
                        at: Some(convert::timestamp(rotated.at)),
                    })
                }))
            },
        )
        .await
    }
}

/// How far the rotation is whenever that changed since the last look, so that a slow reader sees fewer steps and holds
/// up nothing; then how it ended.
fn follow(
    progress: watch::Receiver<RootKeyProgress>,
    rotation: JoinHandle<Result<RootKeyRotated, BrokerError>>,
    request_id: Arc<str>,
) -> Rotation {
    let state = Some((progress, rotation, request_id));
    Box::pin(futures_util::stream::unfold(state, |state| async move {
        let (mut progress, rotation, request_id) = state?;
        if progress.changed().await.is_ok() {
            let reached = *progress.borrow_and_update();
            return Some((Ok(under_way(reached)), Some((progress, rotation, request_id))));
        }
        let rotated = rotation.await.unwrap_or_else(|error| {
            let message = format!("the rotation did not finish: {error}; ask again");
            Err(BrokerError::Rejected { reason: Reason::Internal, message })
        });
        Some((rotated.map(finished).map_err(|error| status(&error, &request_id)), None))
    }))
}

fn under_way(reached: RootKeyProgress) -> v1::RotateRootKeyResponse {
    v1::RotateRootKeyResponse {
        done: reached.done,
        total: reached.total,
        rewrapped: reached.rewrapped,
        ..v1::RotateRootKeyResponse::default()
    }
}

fn finished(rotated: RootKeyRotated) -> v1::RotateRootKeyResponse {
    v1::RotateRootKeyResponse {
        finished: true,
        root_key_id: rotated.id,
        retired: rotated.retired.unwrap_or_default(),
        ..under_way(rotated.counts)
    }
}

fn root_key(key: RootKeyInfo) -> v1::RootKey {
    v1::RootKey { id: key.id, origin: key.origin, wrapped: key.wrapped, in_force: key.in_force }
}

fn audit_key(key: AuditKeyInfo) -> v1::AuditKey {
    v1::AuditKey { id: key.id, public_key: key.public_key, in_force: key.in_force }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt as _;
    use tonic_types::StatusExt as _;

    fn reached(done: u64) -> RootKeyProgress {
        RootKeyProgress { done, total: 9, rewrapped: done }
    }

    #[tokio::test]
    async fn a_reader_sees_the_newest_step_and_then_the_end() {
        let (told, progress) = watch::channel(RootKeyProgress::default());
        let ended = RootKeyRotated { id: "k".to_owned(), counts: reached(9), retired: None };
        told.send_replace(reached(3));
        told.send_replace(reached(5));
        let rotation = tokio::spawn(async move {
            drop(told);
            Ok(ended)
        });
        let steps: Vec<_> = follow(progress, rotation, "r-1".into()).map(Result::unwrap).collect().await;
        let seen: Vec<_> = steps.iter().map(|step| (step.done, step.finished)).collect();
        assert_eq!(seen, [(5, false), (9, true)]);
        assert_eq!((steps[1].root_key_id.as_str(), steps[1].retired.as_str()), ("k", ""));
    }

    #[tokio::test]
    async fn a_refusal_is_the_stream_s_only_item() {
        let (told, progress) = watch::channel(RootKeyProgress::default());
        drop(told);
        let refusal = BrokerError::Rejected { reason: Reason::Conflict, message: "not now".to_owned() };
        let rotation = tokio::spawn(async move { Err(refusal) });
        let items: Vec<_> = follow(progress, rotation, "r-1".into()).collect().await;
        let [Err(status)] = &items[..] else { panic!("{items:?}") };
        assert_eq!(status.get_details_error_info().unwrap().reason, "CONFLICT");
    }
}
