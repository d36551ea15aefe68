//! What has to be done now and then, whether or not anyone calls.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::state::AuditPlace;
use crate::broker::Broker;
use crate::environment::{Environment, StoreChoice};
use crate::kv::embedded::Embedded;
use crate::server::told;
use crate::store::StoreError;
use crate::store::sealed::Sealed;

/// How often leases are looked at that nobody asks about, and the audit log's last checkpoint is kept.
const SHORT: Duration = Duration::from_secs(1);
/// How often secrets are removed whose recovery window is over.
const LONG: Duration = Duration::from_secs(3_600);
/// How often it is kept when each token was last used.
const MINUTE: Duration = Duration::from_secs(60);

/// What is kept in order.
pub(super) struct House {
    pub(super) kv: Embedded,
    pub(super) sealed: Arc<Sealed>,
    pub(super) place: Arc<Mutex<AuditPlace>>,
    pub(super) broker: Arc<Broker>,
}

impl House {
    /// Works until `shutdown` says true. What fails is logged and tried again the next time.
    pub(super) async fn keep(self, shutdown: watch::Receiver<bool>) {
        let stop = told(shutdown);
        tokio::pin!(stop);
        let [mut short, mut minute, mut long] = [SHORT, MINUTE, LONG].map(|every| {
            let mut ticks = interval(every);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        loop {
            tokio::select! {
                _ = short.tick() => self.look_after_the_store().await,
                _ = minute.tick() => self.keep_token_use().await,
                _ = long.tick() => self.remove_what_is_gone().await,
                () = &mut stop => return,
            }
        }
    }

    async fn look_after_the_store(&self) {
        self.broker.caches().tidy();
        if let Err(error) = self.kv.expire().await {
            tracing::error!(%error, "expired leases could not be ended");
        }
        let place = self.broker.log().last_checkpoint();
        if let Err(error) = self.place.lock().await.keep(place).await {
            tracing::error!(%error, "the place of the audit log could not be kept");
        }
    }

    async fn keep_token_use(&self) {
        if let Err(error) = self.broker.keep_token_use().await {
            tracing::error!(%error, "the last use of tokens could not be kept");
        }
    }

    async fn remove_what_is_gone(&self) {
        if let Err(error) = self.broker.prune_tokens().await {
            tracing::error!(%error, "ended tokens could not be removed");
        }
        if let Err(error) = self.broker.forget_old_consumers().await {
            tracing::error!(%error, "consumers that went long ago could not be removed");
        }
        for environment in self.broker.registry().iter() {
            if environment.store == StoreChoice::Sealed
                && let Err(error) = self.remove_from(environment).await
            {
                tracing::error!(%error, environment = %environment.name, "deleted secrets could not be removed");
            }
        }
    }

    /// Removes one secret after the other, each after its record.
    async fn remove_from(&self, environment: &Environment) -> Result<(), StoreError> {
        for id in self.sealed.gone(&environment.name).await? {
            if let Err(error) = self.broker.record_purge(&id).await {
                tracing::error!(%error, secret = %id, "not removed, because it can't be put on record");
                return Ok(());
            }
            self.sealed.purge(&id).await?;
        }
        Ok(())
    }
}
