//! What has to be done now and then, whether or not anyone calls.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::environment::{Registry, StoreChoice};
use crate::kv::embedded::Embedded;
use crate::server::told;
use crate::store::sealed::Sealed;

/// How often leases are looked at that nobody asks about.
const LEASES: Duration = Duration::from_secs(1);
/// How often secrets are removed whose recovery window is over.
const PURGE: Duration = Duration::from_secs(3_600);

/// Works until `shutdown` says true. What fails is logged and tried again the next time.
pub(super) async fn run(
    kv: Embedded,
    sealed: Arc<Sealed>,
    registry: Registry,
    shutdown: watch::Receiver<bool>,
) {
    let stop = told(shutdown);
    tokio::pin!(stop);
    let (mut leases, mut purge) = (interval(LEASES), interval(PURGE));
    leases.set_missed_tick_behavior(MissedTickBehavior::Delay);
    purge.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = leases.tick() => {
                if let Err(error) = kv.expire().await {
                    tracing::error!(%error, "expired leases could not be ended");
                }
            }
            _ = purge.tick() => remove_what_is_gone(&sealed, &registry).await,
            () = &mut stop => return,
        }
    }
}

async fn remove_what_is_gone(sealed: &Sealed, registry: &Registry) {
    for environment in registry.iter().filter(|environment| environment.store == StoreChoice::Sealed) {
        match sealed.purge(&environment.name).await {
            Ok(0) => {}
            Ok(removed) => {
                tracing::info!(environment = %environment.name, removed, "removed secrets whose recovery window is over");
            }
            Err(error) => {
                tracing::error!(%error, environment = %environment.name, "deleted secrets could not be removed")
            }
        }
    }
}
