//! `grpc.health.v1.Health`: what [`Health`] says, for each service (gRPC Health Checking Protocol).
//!
//! No service works without the audit log, the key-value store, policies and keys, so all have the same status: that of
//! the broker, whose name here is empty. A watch is told of a change at once, and ends when the broker stops.
//!
//! Callers whom nobody knows may ask, as often as they like: an answer is a read of memory, causes no probe and leaves
//! no record, and the balancers that ask share their address with the callers behind them. What a stranger can hold are
//! watches, bounded like all streams.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::Stream;
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{self, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::server::health::Health;

/// How long a request is at most: a service's name.
const LARGEST: usize = 4 * 1024;

/// The service.
pub(super) struct Told {
    health: Arc<Health>,
    services: BTreeSet<String>,
}

/// The health of these services, each named `package.Service`, and of the broker as a whole.
pub(super) fn service(health: Arc<Health>, services: impl IntoIterator<Item = String>) -> HealthServer<Told> {
    let services = services.into_iter().chain([String::new()]).collect();
    HealthServer::new(Told { health, services }).max_decoding_message_size(LARGEST)
}

#[tonic::async_trait]
impl health_server::Health for Told {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        match self.services.contains(&request.get_ref().service) {
            true => Ok(Response::new(said(serving(&self.health)))),
            false => Err(Status::not_found("no service of this name")),
        }
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let known = self.services.contains(&request.get_ref().service);
        let watch = Watch {
            readiness: self.health.readiness(),
            shutdown: self.health.shutdown(),
            health: Arc::clone(&self.health),
            known,
            told: None,
        };
        Ok(Response::new(Box::pin(futures_util::stream::unfold(watch, Watch::next))))
    }
}

/// One caller's watch.
struct Watch {
    health: Arc<Health>,
    readiness: watch::Receiver<bool>,
    shutdown: watch::Receiver<bool>,
    known: bool,
    told: Option<ServingStatus>,
}

impl Watch {
    /// The next status that differs from the last; none after that of a broker that stops.
    async fn next(mut self) -> Option<(Result<HealthCheckResponse, Status>, Self)> {
        loop {
            // Before it is read, so that a change meanwhile is not missed.
            self.readiness.mark_unchanged();
            let stopping = self.health.draining();
            let status = if self.known { serving(&self.health) } else { ServingStatus::ServiceUnknown };
            if self.told != Some(status) {
                self.told = Some(status);
                return Some((Ok(said(status)), self));
            }
            if stopping {
                return None;
            }
            tokio::select! {
                // An error means that nobody is left who could say more.
                changed = self.readiness.changed() => changed.ok()?,
                stopped = self.shutdown.wait_for(|stop| *stop) => if stopped.is_err() { return None },
            }
        }
    }
}

fn serving(health: &Health) -> ServingStatus {
    if health.ready() { ServingStatus::Serving } else { ServingStatus::NotServing }
}

fn said(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::server::health::Check;
    use futures_util::StreamExt as _;
    use health_server::Health as _;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tonic::Code;

    struct Fixture {
        told: Told,
        works: Arc<AtomicBool>,
        stop: watch::Sender<bool>,
    }

    async fn fixture() -> Fixture {
        let works = Arc::new(AtomicBool::new(true));
        let probe = Arc::clone(&works);
        let check = Check::needed("kv", move || {
            let works = probe.load(Ordering::SeqCst);
            async move { if works { Ok(()) } else { Err("gone".to_owned()) } }
        });
        let (stop, stopped) = watch::channel(false);
        let health = Health::new(vec![check], ManualClock::new(jiff::Timestamp::UNIX_EPOCH), stopped);
        health.check_now().await;
        let services = ["", "claviger.v1.SecretService"].map(str::to_owned).into();
        Fixture { told: Told { health, services }, works, stop }
    }

    fn asked(service: &str) -> Request<HealthCheckRequest> {
        Request::new(HealthCheckRequest { service: service.to_owned() })
    }

    async fn next(stream: &mut <Told as health_server::Health>::WatchStream) -> ServingStatus {
        stream.next().await.unwrap().unwrap().status()
    }

    #[tokio::test]
    async fn each_service_has_the_brokers_health_and_no_other_name_has_any() {
        let fixture = fixture().await;
        for service in ["", "claviger.v1.SecretService"] {
            let status = fixture.told.check(asked(service)).await.unwrap().into_inner().status();
            assert_eq!(status, ServingStatus::Serving, "{service}");
        }
        let status = fixture.told.check(asked("claviger.v1.Nothing")).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound);
        let mut unknown = fixture.told.watch(asked("claviger.v1.Nothing")).await.unwrap().into_inner();
        assert_eq!(next(&mut unknown).await, ServingStatus::ServiceUnknown);
    }

    #[tokio::test]
    async fn a_watch_is_told_of_each_change_and_ends_with_the_broker() {
        let fixture = fixture().await;
        let mut watch = fixture.told.watch(asked("")).await.unwrap().into_inner();
        assert_eq!(next(&mut watch).await, ServingStatus::Serving);
        for (works, expected) in [(false, ServingStatus::NotServing), (true, ServingStatus::Serving)] {
            fixture.works.store(works, Ordering::SeqCst);
            fixture.told.health.check_now().await;
            assert_eq!(next(&mut watch).await, expected);
        }
        fixture.stop.send(true).unwrap();
        assert_eq!(next(&mut watch).await, ServingStatus::NotServing);
        assert!(watch.next().await.is_none());
        let status = fixture.told.check(asked("")).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::NotServing);
    }
}
