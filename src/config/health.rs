//! What must work for the broker to do its work, each a named check.

use std::sync::Arc;

use crate::broker::Broker;
use crate::clock::SharedClock;
use crate::crypto::KeyRing;
use crate::environment::StoreChoice;
use crate::kv::Kv;
use crate::rotation::service::Rotations;
use crate::server::Bound;
use crate::server::health::{Check, Problem};
use crate::server::tls::Tls;

use super::state;

/// The checks of a broker. Without kv, audit log, policies and root key it takes no calls; a store that is away is
/// shown, and its environment goes on with what is cached.
pub(super) fn checks(
    (broker, rotations): (&Arc<Broker>, &Arc<Rotations>),
    kv: &Arc<dyn Kv>,
    ring: &Arc<KeyRing>,
    doors: &[Bound],
    clock: &SharedClock,
) -> Vec<Check> {
    let tls = doors.iter().filter_map(Bound::tls);
    let mut checks =
        vec![kv_answers(kv), log_is_written(broker), policies_are_there(broker), key_fits(kv, ring)];
    checks.push(policies_are_the_newest(broker));
    checks.push(scheduler_looks(rotations));
    checks.push(no_rotation_is_blocked(rotations));
    checks.extend(broker.registry().iter().map(|environment| {
        let every = match environment.store {
            StoreChoice::Sealed => Check::OFTEN,
            StoreChoice::Aws(_) => Check::SELDOM,
        };
        let (broker, name) = (Arc::clone(broker), environment.name.clone());
        Check::shown(format!("store:{name}"), every, move || {
            let (broker, name) = (Arc::clone(&broker), name.clone());
            async move { broker.caches().ping(&name).await.map_err(|error| Problem::of(&error)) }
        })
    }));
    checks.extend(tls.map(|tls| certificates(tls, clock)));
    checks.extend(doors.iter().filter(|door| door.address().starts_with("unix:")).map(socket_is_there));
    checks
}

fn kv_answers(kv: &Arc<dyn Kv>) -> Check {
    let kv = Arc::clone(kv);
    Check::needed("kv", move || {
        let kv = Arc::clone(&kv);
        async move { kv.get(b"state/key").await.map(|_| ()).map_err(|error| Problem::of(&error)) }
    })
}

fn log_is_written(broker: &Arc<Broker>) -> Check {
    let broker = Arc::clone(broker);
    Check::needed("audit", move || {
        let health = broker.log().health().map_err(|error| Problem::of(&error));
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

/// A scheduler that does not look any more rotates nothing, and nobody would notice for a month.
fn scheduler_looks(rotations: &Arc<Rotations>) -> Check {
    const STUCK: u64 = 60;
    let rotations = Arc::clone(rotations);
    Check::shown("rotation_scheduler", Check::OFTEN, move || {
        let looked = rotations.figures().scheduler_looked;
        async move {
            match looked {
                Some(seconds) if seconds > STUCK => {
                    Err(format!("the scheduler last looked {seconds} s ago; restart the broker"))
                }
                Some(_) | None => Ok(()),
            }
        }
    })
}

fn no_rotation_is_blocked(rotations: &Arc<Rotations>) -> Check {
    let rotations = Arc::clone(rotations);
    Check::shown("rotations", Check::OFTEN, move || {
        let health = rotations.figures().health;
        let blocked = health.iter().find(|(health, _)| *health == "blocked").map_or(0, |(_, count)| *count);
        async move {
            match blocked {
                0 => Ok(()),
                blocked => {
                    Err(format!("{blocked} blocked: a person is needed; see `claviger rotation list`"))
                }
            }
        }
    })
}

fn key_fits(kv: &Arc<dyn Kv>, ring: &Arc<KeyRing>) -> Check {
    let (kv, ring) = (Arc::clone(kv), Arc::clone(ring));
    Check::needed("root_key", move || {
        let (kv, ring) = (Arc::clone(&kv), Arc::clone(&ring));
        async move {
            let wrapping = state::wrapped_by(kv.as_ref()).await.map_err(|error| Problem::of(&error))?;
            ring.key(wrapping).map(|_| ()).map_err(|error| Problem::of(&error))
        }
    })
}

/// A socket file that someone removed or replaced leads no caller here, though the listener lives.
fn socket_is_there(door: &Bound) -> Check {
    let reachable = door.reachable();
    Check::shown("socket", Check::OFTEN, move || {
        let there = reachable();
        async move {
            match there {
                true => Ok(()),
                false => Err("the socket file was removed or replaced; restart the broker".to_owned()),
            }
        }
    })
}

fn certificates(tls: &Arc<Tls>, clock: &SharedClock) -> Check {
    let (tls, clock) = (Arc::clone(tls), Arc::clone(clock));
    Check::shown("certificates", Check::OFTEN, move || {
        let now = clock.now();
        let expired = tls.expiries().into_iter().find(|(_, until)| *until <= now);
        let refused = tls.is_refusing();
        async move {
            match (expired, refused) {
                (Some((kind, until)), _) => {
                    Err(format!("{kind} expired at {until}; put a new one in its place"))
                }
                (None, true) => Err("the files were refused; the last valid ones are in force".to_owned()),
                (None, false) => Ok(()),
            }
        }
    })
}
