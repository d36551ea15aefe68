//! The gRPC door.
//!
//! ```text
//! connection ─▶ Door (request id, who, deadline) ─▶ service (parse) ─▶ Broker ─▶ convert ─▶ reply
//!                                                              errors ─▶ status.rs
//! ```

mod account;
mod audit;
mod caches;
mod convert;
mod door;
mod health;
mod keys;
mod policies;
mod rotations;
mod secrets;
mod status;
mod tokens;
mod watches;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{RwLock, watch};
use tonic::Status;
use tonic::transport::server::Router;
use tower::layer::util::{Identity, Stack};

use super::{House, ServerError};
use crate::broker::BrokerError;
use crate::error::Reason;
use crate::proto::{FILE_DESCRIPTOR_SET, v1};

use v1::audit_service_server::AuditServiceServer;
use v1::cache_service_server::CacheServiceServer;
use v1::key_service_server::KeyServiceServer;
use v1::policy_service_server::PolicyServiceServer;
use v1::rotation_service_server::RotationServiceServer;
use v1::secret_service_server::SecretServiceServer;
use v1::token_service_server::TokenServiceServer;

pub use door::{Door, methods};

/// Changes run to their end, with their second audit record, whether or not the caller still waits. This counts
/// them, so that a shutdown can wait for the last one before the log is closed.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    running: Arc<RwLock<()>>,
}

impl Changes {
    /// Runs `change` to its end in a task of its own.
    async fn run<T: Send + 'static>(
        &self,
        change: impl Future<Output = Result<T, BrokerError>> + Send + 'static,
    ) -> Result<T, BrokerError> {
        let running = Arc::clone(&self.running).read_owned().await;
        let task = tokio::spawn(async move {
            let _running = running;
            change.await
        });
        task.await.unwrap_or_else(|error| {
            let message = format!("the change did not finish: {error}");
            Err(BrokerError::Rejected { reason: Reason::Internal, message })
        })
    }

    /// Waits for the last change, but no longer than `at_most`.
    pub(super) async fn finished(&self, at_most: Duration) {
        if tokio::time::timeout(at_most, self.running.write()).await.is_err() {
            tracing::error!("changes were still running at the end; their intents are on record");
        }
    }
}

/// The services behind one door.
pub(super) fn router(
    house: &House,
    changes: &Changes,
    shutdown: watch::Receiver<bool>,
) -> Result<Router<Stack<Door, Identity>>, ServerError> {
    let broker = &house.broker;
    let secrets = secrets::Secrets::new(Arc::clone(broker), changes.clone(), shutdown.clone());
    let tokens = tokens::TokenAdministration::new(Arc::clone(broker), changes.clone());
    let policies = policies::PolicyQuestions::new(Arc::clone(broker), changes.clone());
    let keys = keys::KeyAdministration::new(Arc::clone(broker), changes.clone(), shutdown.clone());
    let caches = caches::CacheAdministration::new(Arc::clone(broker), changes.clone());
    let rotations =
        rotations::RotationDoor::new(Arc::clone(broker), Arc::clone(&house.rotations), changes.clone());
    let audit = audit::AuditReading::new(Arc::clone(broker), shutdown);
    let health = health::service(Arc::clone(&house.health), door::services());
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let (bytes, streams) = (house.limits.message_bytes, house.limits.streams);
    Ok(tonic::transport::Server::builder()
        .max_concurrent_streams(streams)
        .concurrency_limit_per_connection(usize::try_from(streams).unwrap_or(usize::MAX))
        .http2_keepalive_interval(Some(KEEPALIVE_EVERY))
        .http2_keepalive_timeout(Some(KEEPALIVE_WITHIN))
        .http2_max_header_list_size(16 * 1024)
        .http2_max_pending_accept_reset_streams(Some(MOST_RESETS))
        .http2_max_local_error_reset_streams(Some(MOST_ERRORS))
        .max_frame_size(16 * 1024)
        .layer(Door::new(house))
        .add_service(SecretServiceServer::new(secrets).max_decoding_message_size(bytes))
        .add_service(PolicyServiceServer::new(policies).max_decoding_message_size(bytes))
        .add_service(AuditServiceServer::new(audit).max_decoding_message_size(bytes))
        .add_service(TokenServiceServer::new(tokens).max_decoding_message_size(bytes))
        .add_service(KeyServiceServer::new(keys).max_decoding_message_size(bytes))
        .add_service(CacheServiceServer::new(caches).max_decoding_message_size(bytes))
        .add_service(RotationServiceServer::new(rotations).max_decoding_message_size(bytes))
        .add_service(health)
        .add_service(reflection))
}

/// A connection whose other end is gone is found within the sum of these, whether or not a call is under way.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);
const KEEPALIVE_WITHIN: Duration = Duration::from_secs(10);
/// How many streams a caller may open and reset before they were looked at (CVE-2023-44487), and how many this side may
/// have to reset for the caller's errors; one more ends the connection.
const MOST_RESETS: usize = 20;
const MOST_ERRORS: usize = 1_024;

/// A parse error, as the door's own kind of error.
fn rejected(error: &impl crate::error::Reasoned) -> BrokerError {
    BrokerError::Rejected { reason: error.reason(), message: error.to_string() }
}

fn missing_caller() -> Status {
    Status::internal("the door let a request in without saying whose it is")
}
