//! What must work for the broker to do its work, each a named check.

use std::sync::Arc;

use crate::broker::Broker;
use crate::clock::SharedClock;
use crate::crypto::KeyRing;
use crate::environment::StoreChoice;
use crate::error::Reasoned as _;
use crate::kv::Kv;
use crate::secret::EnvironmentName;
use crate::server::health::Check;
use crate::server::tls::Tls;
use crate::store::StoreError;

use super::state;

/// The checks of a broker. Without kv, audit log, policies and root key it takes no calls; a store that is away is
/// shown, and its environment goes on with what is cached.
pub(super) fn checks(
    broker: &Arc<Broker>,
    kv: &Arc<dyn Kv>,
    ring: &Arc<KeyRing>,
    tls: &[Arc<Tls>],
    clock: &SharedClock,
) -> Vec<Check> {
    let mut checks =
        vec![kv_answers(kv), log_is_written(broker), policies_are_there(broker), key_fits(kv, ring)];
    checks.push(policies_are_the_newest(broker));
    checks.extend(broker.registry().iter().map(|environment| {
        let every = match environment.store {
            StoreChoice::Sealed => Check::OFTEN,
            StoreChoice::Aws(_) => Check::SELDOM,
        };
        let (broker, name) = (Arc::clone(broker), environment.name.clone());
        Check::shown(format!("store:{name}"), every, move || {
            let (broker, name) = (Arc::clone(&broker), name.clone());
            async move { broker.caches().ping(&name).await.map_err(|error| code(&error, &name)) }
        })
    }));
    checks.extend(tls.iter().map(|tls| certificates(tls, clock)));
    checks
}

/// What a store's error is called. Its text may name an account or a role, and whoever reaches the door reads this.
fn code(error: &StoreError, environment: &EnvironmentName) -> String {
    tracing::debug!(%error, %environment, "a store does not answer");
    error.reason().code().to_owned()
}

fn kv_answers(kv: &Arc<dyn Kv>) -> Check {
    let kv = Arc::clone(kv);
    Check::needed("kv", move || {
        let kv = Arc::clone(&kv);
        async move { kv.get(b"state/key").await.map(|_| ()).map_err(|error| error.to_string()) }
    })
}

fn log_is_written(broker: &Arc<Broker>) -> Check {
    let broker = Arc::clone(broker);
    Check::needed("audit", move || {
        let health = broker.log().health().map_err(|error| error.to_string());
        async move { health }
    })
}

fn policies_are_there(broker: &Arc<Broker>) -> Check {
    let broker = Arc::clone(broker);
    Check::needed("policy", move || {
        let empty = broker.policies().is_empty();
        async move { if empty { Err("no policy is in force".to_owned()) } else { Ok(()) } }
    })
}

fn policies_are_the_newest(broker: &Arc<Broker>) -> Check {
    let broker = Arc::clone(broker);
    Check::shown("policy_reload", Check::OFTEN, move || {
        let refused = broker.policy_reload_refused();
        async move {
            match refused {
                true => {
                    Err("the policies in the folder were refused; the last good set is in force".to_owned())
                }
                false => Ok(()),
            }
        }
    })
}

fn key_fits(kv: &Arc<dyn Kv>, ring: &Arc<KeyRing>) -> Check {
    let (kv, ring) = (Arc::clone(kv), Arc::clone(ring));
    Check::needed("root_key", move || {
        let (kv, ring) = (Arc::clone(&kv), Arc::clone(&ring));
        async move {
            let wrapping = state::wrapped_by(kv.as_ref()).await.map_err(|error| error.to_string())?;
            ring.key(wrapping).map(|_| ()).map_err(|error| error.to_string())
        }
    })
}

fn certificates(tls: &Arc<Tls>, clock: &SharedClock) -> Check {
    let (tls, clock) = (Arc::clone(tls), Arc::clone(clock));
    Check::shown("certificates", Check::OFTEN, move || {
        let now = clock.now();
        let expired = tls.expiries().into_iter().find(|(_, until)| *until <= now);
        async move {
            match expired {
                Some((kind, until)) => Err(format!("{kind} expired at {until}; put a new one in its place")),
                None => Ok(()),
            }
        }
    })
}
