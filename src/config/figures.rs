//! What a scrape shows: the figures of every part, gathered.

use std::sync::Arc;

use jiff::Timestamp;

use crate::broker::Broker;
use crate::cache::Stats;
use crate::crypto::KeyRing;
use crate::rotation::scheduler::FiguresNow;
use crate::secret::EnvironmentName;
use crate::server::admin::Scrape;
use crate::server::limits::RateLimits;
use crate::server::tls::Tls;
use crate::server::{House, Places};
use crate::telemetry::metrics::AttemptFigures;
use crate::telemetry::{
    AuditFigures, CacheFigures, CertificateFigures, ConnectionFigures, PolicyFigures, Process, RateFigures,
    RotationFigures, Snapshot, WatchFigures,
};

/// Gathers the figures of a house and its certificates, and writes them down.
pub(super) fn scrape(house: &House, tls: Vec<Arc<Tls>>, ring: Arc<KeyRing>) -> Scrape {
    let House { broker, rotations, rates, places, metrics, .. } = house.clone();
    let runtime = tokio::runtime::Handle::current();
    Arc::new(move || {
        metrics.encode(Snapshot {
            caches: broker.caches().statistics().into_iter().map(cache).collect(),
            audit: audit(&broker),
            certificates: tls.iter().flat_map(|tls| tls.expiries()).map(certificate).collect(),
            certificate_reloads: reloads(&tls),
            connections: connections(&places),
            watches: watches(&broker),
            rate_limited: rate_limited(&rates),
            rotations: rotations.figures().into(),
            policy: PolicyFigures {
                generation: broker.policies().generation(),
                policies: count(broker.policies().len()),
            },
            root_keys: count(ring.ids().len()),
            tasks: count(runtime.metrics().num_alive_tasks()),
            process: Process::read(),
        })
    })
}

fn cache((environment, stats): (EnvironmentName, Stats)) -> CacheFigures {
    CacheFigures {
        environment: environment.to_string(),
        hits: stats.hits,
        misses: stats.misses,
        stale: stats.stale,
        negative_hits: stats.negative_hits,
        refreshes_ahead: stats.refreshes_ahead,
        upstream_secrets: stats.upstream_secrets,
        coalesced: stats.coalesced,
        quota_waits: stats.quota_waits,
        quota_waited: stats.quota_waited,
        quota_refusals: stats.quota_refusals,
        upstream_calls: stats.upstream_calls,
        upstream_errors: stats.upstream_errors,
        entries: stats.entries,
        bytes: stats.bytes,
    }
}

fn audit(broker: &Broker) -> AuditFigures {
    let figures = broker.log().figures();
    AuditFigures {
        records: figures.records,
        failed: figures.failed,
        backlog: figures.backlog,
        latency: figures.latency,
        disk_used_ratio: figures.disk_free_permille.map(|free| 1.0 - f64::from(free) / 1_000.0),
    }
}

fn certificate((kind, not_after): (String, Timestamp)) -> CertificateFigures {
    CertificateFigures { kind, not_after: not_after.as_second() }
}

fn reloads(tls: &[Arc<Tls>]) -> AttemptFigures {
    tls.iter().map(|tls| tls.reloads()).fold(AttemptFigures::default(), |sum, (ok, failed)| AttemptFigures {
        ok: sum.ok + ok,
        failed: sum.failed + failed,
    })
}

fn connections(places: &Places) -> ConnectionFigures {
    ConnectionFigures { open: count(places.open()), refused: places.refused() }
}

fn watches(broker: &Broker) -> WatchFigures {
    let figures = broker.feed().figures();
    WatchFigures {
        open: figures.live,
        pushed: figures.pushed,
        coalesced: figures.coalesced,
        ended_slow: figures.ended_slow,
    }
}

impl From<FiguresNow> for RotationFigures {
    fn from(figures: FiguresNow) -> Self {
        let FiguresNow { ended, failures, health, overdue, scheduler_looked, clock_stepped } = figures;
        Self { ended, failures, health, overdue, scheduler_looked, clock_stepped }
    }
}

fn rate_limited(rates: &RateLimits) -> RateFigures {
    let (principal, address, stranger) = rates.figures();
    RateFigures { principal, address, stranger }
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}
