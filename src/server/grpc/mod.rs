//! The gRPC door.
//!
//! ```text
//! connection ─▶ transport ─▶ Door (request id, who, deadline) ─▶ service (parse) ─▶ Broker ─▶ convert ─▶ reply
//!                                       └─ GetSecret ─▶ read ─▶ Broker ─▶ wire ─▶ reply
//!                                                                  errors ─▶ status.rs
//! ```

mod account;
mod audit;
mod caches;
mod convert;
mod door;
mod health;
mod keys;
mod policies;
mod read;
mod rotations;
mod secrets;
mod status;
mod tokens;
mod transport;
mod watches;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{RwLock, watch};
use tonic::Status;
use tonic::service::Routes;

use self::door::Door;
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

pub use door::methods;

pub(super) use transport::Transport;

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
pub(super) fn transport(
    house: &House,
    changes: &Changes,
    shutdown: watch::Receiver<bool>,
) -> Result<Transport, ServerError> {
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
    let bytes = house.limits.message_bytes;
    let routes = Routes::new(SecretServiceServer::new(secrets).max_decoding_message_size(bytes))
        .add_service(PolicyServiceServer::new(policies).max_decoding_message_size(bytes))
        .add_service(AuditServiceServer::new(audit).max_decoding_message_size(bytes))
        .add_service(TokenServiceServer::new(tokens).max_decoding_message_size(bytes))
        .add_service(KeyServiceServer::new(keys).max_decoding_message_size(bytes))
        .add_service(CacheServiceServer::new(caches).max_decoding_message_size(bytes))
        .add_service(RotationServiceServer::new(rotations).max_decoding_message_size(bytes))
        .add_service(health)
        .add_service(reflection);
    Ok(Transport::new(Door::new(house), routes, &house.limits))
}

/// A parse error, as the door's own kind of error.
fn rejected(error: &impl crate::error::Reasoned) -> BrokerError {
    BrokerError::Rejected { reason: error.reason(), message: error.to_string() }
}

fn missing_caller() -> Status {
    Status::internal("the door let a request in without saying whose it is")
}
