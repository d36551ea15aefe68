//! The front doors: listeners, limits, and an orderly end. Nothing here decides anything; every door calls the one
//! [`Broker`](crate::broker::Broker).

pub mod grpc;
mod listen;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use crate::broker::Broker;
use crate::error::{Reason, Reasoned};
use crate::identity::Chain;

pub use listen::{Bound, Listen};

/// Bounds on what callers may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time, over all listeners. One more is closed at once.
    pub connections: usize,
    /// Calls at a time on one connection.
    pub streams: u32,
    /// The largest request message, in bytes.
    pub message_bytes: usize,
    /// How long a call may take that names no deadline, and the longest that one may name.
    pub deadline: Duration,
    /// How long calls in flight may take to end once the broker was told to stop.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1_024,
            streams: 256,
            message_bytes: 1024 * 1024,
            deadline: Duration::from_secs(30),
            drain: Duration::from_secs(10),
        }
    }
}

/// Why a door can't be opened or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// An address can't be listened on.
    #[error("listen on {address}: {problem}")]
    Listen {
        /// The address.
        address: String,
        /// What is wrong and the mend.
        problem: String,
    },
    /// The transport failed.
    #[error("server: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// The reflection service can't be built.
    #[error("server: reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

impl Reasoned for ServerError {
    fn reason(&self) -> Reason {
        match self {
            Self::Listen { .. } => Reason::InvalidConfig,
            Self::Transport(_) | Self::Reflection(_) => Reason::Internal,
        }
    }
}

/// Serves until `shutdown` says true, then lets calls in flight end, for as long as the limits say and no longer:
/// a connection that never closes must not keep the process.
///
/// # Errors
/// Where a listener or the transport fails.
pub async fn serve(
    broker: Arc<Broker>,
    identity: Arc<Chain>,
    listeners: Vec<Bound>,
    limits: Limits,
    shutdown: watch::Receiver<bool>,
) -> Result<(), ServerError> {
    let connections = Arc::new(Semaphore::new(limits.connections));
    let changes = grpc::Changes::default();
    let door = grpc::Door::new(Arc::clone(&broker), identity, limits);
    let mut servers = Vec::with_capacity(listeners.len());
    for listener in listeners {
        let incoming = listener.incoming(Arc::clone(&connections));
        let router = grpc::router(&broker, &door, &changes, limits, shutdown.clone()).await?;
        servers.push(router.serve_with_incoming_shutdown(incoming, told(shutdown.clone())));
    }
    let all = futures_util::future::try_join_all(servers);
    tokio::pin!(all);
    let hard_end = async {
        told(shutdown.clone()).await;
        after(limits.drain).await;
    };
    tokio::select! {
        ended = &mut all => { ended?; }
        () = hard_end => tracing::warn!(drain = ?limits.drain, "calls in flight were cut off"),
    }
    changes.finished(limits.drain).await;
    Ok(())
}

/// Waits until `shutdown` says true.
pub(crate) async fn told(mut shutdown: watch::Receiver<bool>) {
    // An error means that nobody is left who could say it: the same as being told.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

#[expect(clippy::disallowed_methods, reason = "a hard end is a time, not a condition")]
async fn after(time: Duration) {
    tokio::time::sleep(time).await;
}
