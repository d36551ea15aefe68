//! The front doors: listeners, limits, and an orderly end. Nothing here decides anything; every door calls the one
//! [`Broker`].

pub mod admin;
pub mod grpc;
pub mod health;
pub mod limits;
mod listen;
pub mod tls;
mod workers;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::sync::watch;

use self::health::Health;
use self::limits::{Rate, RateLimits};
use self::tls::TlsError;
use crate::broker::Broker;
use crate::clock::SharedClock;
use crate::error::{Reason, Reasoned};
use crate::identity::Chain;
use crate::rotation::service::Rotations;
use crate::telemetry::metrics::Metrics;

pub use listen::{Bound, Listen, Places};
pub use workers::Workers;

/// Bounds on what callers may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How many threads serve connections; `None`: one for each processor that the process may use.
    pub workers: Option<NonZeroUsize>,
    /// Connections at a time, over all listeners. One more is closed at once. A sixteenth of them, at least 16, is kept for
    /// Unix sockets; of the others, half may be of callers who have not said yet who they are.
    pub connections: usize,
    /// Connections at a time of one caller: of one Unix user, of one IPv4 address, of one IPv6 network of 64 bits.
    pub connections_per_caller: usize,
    /// Watches at a time of one principal.
    pub watches_per_caller: usize,
    /// Calls at a time on one connection.
    pub streams: u32,
    /// The largest request message, in bytes.
    pub message_bytes: usize,
    /// How long a call may take that names no deadline, and the longest that one may name.
    pub deadline: Duration,
    /// How long calls in flight may take to end once the broker was told to stop.
    pub drain: Duration,
    /// How often one principal may call; `None`: as often as it likes.
    pub per_principal: Option<Rate>,
    /// How often one address may call; `None`: as often as it likes.
    pub per_address: Option<Rate>,
    /// How often one address may fail to say who it is.
    pub strangers: Rate,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            workers: None,
            connections: 1_024,
            connections_per_caller: 256,
            watches_per_caller: 1_024,
            streams: 256,
            message_bytes: 1024 * 1024,
            deadline: Duration::from_secs(30),
            drain: Duration::from_secs(10),
            per_principal: None,
            per_address: None,
            strangers: Rate::STRANGERS,
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
    /// A certificate, its key or the authorities for clients.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The threads that serve can't be started.
    #[error(
        "server: the threads that serve connections can't be started: {0}; ask for fewer with `listen.workers`"
    )]
    Workers(std::io::Error),
    /// The reflection service can't be built.
    #[error("server: reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

impl Reasoned for ServerError {
    fn reason(&self) -> Reason {
        match self {
            Self::Listen { .. } => Reason::InvalidConfig,
            Self::Tls(error) => error.reason(),
            Self::Workers(_) | Self::Reflection(_) => Reason::Internal,
        }
    }
}

/// What stands behind the doors, shared by all of them.
#[derive(Clone)]
pub struct House {
    /// What every door calls.
    pub broker: Arc<Broker>,
    /// What the doors of rotation call.
    pub rotations: Arc<Rotations>,
    /// Who is calling.
    pub identity: Arc<Chain>,
    /// How often.
    pub rates: Arc<RateLimits>,
    /// Places for connections.
    pub places: Places,
    /// Whether the broker can do its work.
    pub health: Arc<Health>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// The time.
    pub clock: SharedClock,
    /// Bounds on what callers may use.
    pub limits: Limits,
}

/// Has `workers` serve until `shutdown` says true, then lets calls in flight end, for as long as the limits say and no
/// longer: a connection that never closes must not keep the process. What calls began and did not wait for runs on with
/// the workers.
///
/// # Errors
/// Where a listener fails.
pub async fn serve(
    house: House,
    workers: &Workers,
    listeners: Vec<Bound>,
    shutdown: watch::Receiver<bool>,
) -> Result<(), ServerError> {
    let changes = grpc::Changes::default();
    let drain = house.limits.drain;
    let mut accepting = Vec::with_capacity(listeners.len());
    for listener in listeners {
        if let Some(tls) = listener.tls() {
            tls.keep_fresh(shutdown.clone())?;
        }
        let transport = grpc::transport(&house, &changes, shutdown.clone())?;
        let (incoming, shutdown) = (listener.incoming(house.places.clone()), shutdown.clone());
        let stopped = told(shutdown.clone());
        accepting.push(incoming.take_until(stopped).for_each(move |accepted| {
            workers.give(transport.clone().serve(accepted, shutdown.clone()));
            std::future::ready(())
        }));
    }
    futures_util::future::join_all(accepting).await;
    tokio::select! {
        () = workers.idle() => {}
        () = after(drain) => {
            tracing::warn!(?drain, "calls in flight were cut off");
            workers.cut();
        }
    }
    changes.finished(drain.min(LONGEST_CHANGE)).await;
    Ok(())
}

/// How long a change may still take after everything else has ended.
const LONGEST_CHANGE: Duration = Duration::from_secs(4);

/// Waits until `shutdown` says true.
pub(crate) async fn told(mut shutdown: watch::Receiver<bool>) {
    // An error means that nobody is left who could say it: the same as being told.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

#[expect(clippy::disallowed_methods, reason = "a hard end is a time, not a condition")]
async fn after(time: Duration) {
    tokio::time::sleep(time).await;
}
