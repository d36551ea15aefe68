//! The gRPC door.
//!
//! ```text
//! connection ─▶ Door (request id, who, deadline) ─▶ service (parse) ─▶ Broker ─▶ convert ─▶ reply
//!                                                              errors ─▶ status.rs
//! ```

mod audit;
mod convert;
mod door;
mod policies;
mod secrets;
mod status;
mod tokens;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{RwLock, watch};
use tonic::Status;
use tonic::transport::server::Router;
use tower::layer::util::{Identity, Stack};

use super::{Limits, ServerError};
use crate::broker::{Broker, BrokerError};
use crate::error::Reason;
use crate::proto::{FILE_DESCRIPTOR_SET, v1};

use v1::audit_service_server::AuditServiceServer;
use v1::policy_service_server::PolicyServiceServer;
use v1::secret_service_server::SecretServiceServer;
use v1::token_service_server::TokenServiceServer;

pub use door::Door;

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
pub(super) async fn router(
    broker: &Arc<Broker>,
    door: &Door,
    changes: &Changes,
    limits: Limits,
    shutdown: watch::Receiver<bool>,
) -> Result<Router<Stack<Door, Identity>>, ServerError> {
    let secrets = secrets::Secrets::new(Arc::clone(broker), changes.clone());
    let tokens = tokens::TokenAdministration::new(Arc::clone(broker), changes.clone());
    let policies = policies::PolicyQuestions::new(Arc::clone(broker), changes.clone());
    let audit = audit::AuditReading::new(Arc::clone(broker), shutdown.clone());
    let (health, health_service) = tonic_health::server::health_reporter();
    tokio::spawn(watch_health(health, Arc::clone(broker), shutdown));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let bytes = limits.message_bytes;
    Ok(tonic::transport::Server::builder()
        .max_concurrent_streams(limits.streams)
        .concurrency_limit_per_connection(usize::try_from(limits.streams).unwrap_or(usize::MAX))
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .http2_max_header_list_size(16 * 1024)
        .layer(door.clone())
        .add_service(SecretServiceServer::new(secrets).max_decoding_message_size(bytes))
        .add_service(PolicyServiceServer::new(policies).max_decoding_message_size(bytes))
        .add_service(AuditServiceServer::new(audit).max_decoding_message_size(bytes))
        .add_service(TokenServiceServer::new(tokens).max_decoding_message_size(bytes))
        .add_service(health_service)
        .add_service(reflection))
}

/// The services whose health is told; the empty name is the broker as a whole. None serves without the audit log.
const SERVICES: [&str; 5] = [
    "",
    "claviger.v1.SecretService",
    "claviger.v1.PolicyService",
    "claviger.v1.AuditService",
    "claviger.v1.TokenService",
];

/// Says NOT_SERVING while the audit log can't be written, and once the broker was told to stop.
async fn watch_health(
    health: tonic_health::server::HealthReporter,
    broker: Arc<Broker>,
    mut shutdown: watch::Receiver<bool>,
) {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        let stopping = tokio::select! {
            _ = tick.tick() => false,
            _ = shutdown.wait_for(|stop| *stop) => true,
        };
        let serving = !stopping && broker.log().health().is_ok();
        let status = match serving {
            true => tonic_health::ServingStatus::Serving,
            false => tonic_health::ServingStatus::NotServing,
        };
        for service in SERVICES {
            health.set_service_status(service, status).await;
        }
        if stopping {
            return;
        }
    }
}

/// A parse error, as the door's own kind of error.
fn rejected(error: &impl crate::error::Reasoned) -> BrokerError {
    BrokerError::Rejected { reason: error.reason(), message: error.to_string() }
}

fn missing_caller() -> Status {
    Status::internal("the door let a request in without saying whose it is")
}
