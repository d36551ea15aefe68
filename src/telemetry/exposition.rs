//! What a scrape shows: the figures of all parts, and how they become OpenMetrics text.
//!
//! Names are `claviger_…` with their unit, `_total` where they only grow, and `process_…` as every exporter has them.
//! Labels are environments, methods, codes and kinds; never a secret, a caller or an address.

use std::fmt;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, MetricEncoder, NoLabelSet, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::metrics::{AttemptFigures, LatencySnapshot, MethodFigures};
use super::process::Process;

/// What this text is, as an HTTP `content-type`.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the parts of a broker count by themselves, as it stands at one time.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// One for each environment.
    pub caches: Vec<CacheFigures>,
    /// The audit log.
    pub audit: AuditFigures,
    /// The certificates in force.
    pub certificates: Vec<CertificateFigures>,
    /// Reloads of certificates and of certificate authorities.
    pub certificate_reloads: AttemptFigures,
    /// The listeners.
    pub connections: ConnectionFigures,
    /// Watches.
    pub watches: WatchFigures,
    /// Calls that were turned away for their rate.
    pub rate_limited: RateFigures,
    /// Rotations.
    pub rotations: RotationFigures,
    /// The policy set in force.
    pub policy: PolicyFigures,
    /// How many root keys are loaded: the present one, and those before it.
    pub root_keys: u64,
    /// Tasks of the runtime that have not ended.
    pub tasks: u64,
    /// The process; `None` where the kernel does not say.
    pub process: Option<Process>,
}

/// One environment's cache and the store below it.
#[derive(Debug, Clone, Default)]
pub struct CacheFigures {
    /// The environment.
    pub environment: String,
    /// Reads that the cache answered with a value in its time.
    pub hits: u64,
    /// Reads that waited for the store.
    pub misses: u64,
    /// Reads that were answered past their time, because the store could not be reached.
    pub stale: u64,
    /// Reads that the cache answered with an absence.
    pub negative_hits: u64,
    /// Entries that were fetched anew before their time was over.
    pub refreshes_ahead: u64,
    /// Calls to the store; one that asks for many secrets is one.
    pub upstream_calls: u64,
    /// Secrets that it was asked for.
    pub upstream_secrets: u64,
    /// Those of them that went along in a call which another had opened.
    pub coalesced: u64,
    /// Calls that waited for the quota of their account.
    pub quota_waits: u64,
    /// How long they did, all together.
    pub quota_waited: Duration,
    /// Calls that were not made, because they would have had to wait for too long.
    pub quota_refusals: u64,
    /// Those of them that failed.
    pub upstream_errors: u64,
    /// Entries that are held.
    pub entries: u64,
    /// Bytes that they weigh.
    pub bytes: u64,
}

/// The audit log.
#[derive(Debug, Clone, Default)]
pub struct AuditFigures {
    /// Records that were acknowledged.
    pub records: u64,
    /// Records that were refused, because they could not be written.
    pub failed: u64,
    /// Records that wait.
    pub backlog: u64,
    /// How long a record took from its append until it was as durable as it had to be.
    pub latency: LatencySnapshot,
    /// How full the disk is, from 0 to 1; `None` where the kernel does not say.
    pub disk_used_ratio: Option<f64>,
}

/// A certificate in force.
#[derive(Debug, Clone, Default)]
pub struct CertificateFigures {
    /// What it is for: `server`, `client_ca`.
    pub kind: String,
    /// When it ends, in seconds since 1970.
    pub not_after: i64,
}

/// The listeners.
#[derive(Debug, Clone, Copy, Default)]
pub struct ConnectionFigures {
    /// Connections that are open.
    pub open: u64,
    /// Connections that were closed at once, over a bound.
    pub refused: u64,
}

/// Watches.
#[derive(Debug, Clone, Copy, Default)]
pub struct WatchFigures {
    /// Watches that are open.
    pub open: u64,
    /// Changes that were told.
    pub pushed: u64,
    /// Changes that were skipped for a newer one of the same secret.
    pub coalesced: u64,
    /// Watches that were ended because the caller did not keep up.
    pub ended_slow: u64,
}

/// Rotations, since the broker's start where they are counted.
#[derive(Debug, Clone, Default)]
pub struct RotationFigures {
    /// Runs that are over, by how they ended.
    pub ended: Vec<(&'static str, u64)>,
    /// Activations that did not bring a run to its end, by what was in the way.
    pub failures: Vec<(&'static str, u64)>,
    /// Rotations that are set, by how they are.
    pub health: Vec<(&'static str, u64)>,
    /// For how long the one is due that waits longest, in seconds.
    pub overdue: u64,
    /// How long ago the scheduler last looked, in seconds; `None` where there is none.
    pub scheduler_looked: Option<u64>,
    /// Whether nothing new begins because the clock was moved.
    pub clock_stepped: bool,
}

/// Calls that were turned away for their rate, by whose rate it was.
#[derive(Debug, Clone, Copy, Default)]
pub struct RateFigures {
    /// A principal's.
    pub principal: u64,
    /// An address's.
    pub address: u64,
    /// That of callers whom nobody knows.
    pub stranger: u64,
}

/// The policy set in force.
#[derive(Debug, Clone, Copy, Default)]
pub struct PolicyFigures {
    /// Grows with every set that is taken.
    pub generation: u64,
    /// How many policies it has.
    pub policies: u64,
}

/// The text of one scrape, with the line at its end that says so.
pub(super) fn encode(
    methods: Vec<MethodFigures>,
    policy_reloads: AttemptFigures,
    snapshot: Snapshot,
) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape { methods, policy_reloads, snapshot }));
    let mut scraped = String::with_capacity(16 * 1024);
    if text::encode(&mut scraped, &registry).is_err() {
        // Writing into memory does not fail. Should it, nothing is better than half: that would look like a restart.
        scraped.clear();
    }
    scraped
}

#[derive(Debug)]
struct Scrape {
    methods: Vec<MethodFigures>,
    policy_reloads: AttemptFigures,
    snapshot: Snapshot,
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut families = Families(encoder);
        families.build()?;
        self.requests(&mut families)?;
        self.caches(&mut families)?;
        self.audit(&mut families)?;
        self.certificates(&mut families)?;
        self.callers(&mut families)?;
        self.rotations(&mut families)?;
        self.policy(&mut families)?;
        self.process(&mut families)
    }
}

impl Scrape {
    /// A method without calls has its `OK` counter alone: what counts from zero shows its first step.
    fn requests(&self, families: &mut Families<'_>) -> fmt::Result {
        let help = "Calls that ended, by method and gRPC code; a stream counts when it begins.";
        let calls = self.methods.iter().flat_map(|method| {
            let shown = method.calls.iter().filter(|(code, count)| *count > 0 || *code == "OK");
            shown.map(move |(code, count)| ([("method", method.name.as_str()), ("code", *code)], *count))
        });
        families.counters("claviger_requests", help, None, calls)?;
        let help = "Time from a call's headers to its answer's headers.";
        let called = self.methods.iter().filter(|method| method.latency.count > 0);
        let times = called.map(|method| ([("method", method.name.as_str())], &method.latency));
        families.histograms("claviger_request_duration", help, times)
    }

    fn caches(&self, families: &mut Families<'_>) -> fmt::Result {
        let caches = &self.snapshot.caches;
        let help = "Reads, by how the cache answered them.";
        let reads = caches.iter().flat_map(|cache| {
            let results = [
                ("hit", cache.hits),
                ("miss", cache.misses),
                ("stale", cache.stale),
                ("negative_hit", cache.negative_hits),
            ];
            let environment = ("environment", cache.environment.as_str());
            results.map(|(result, count)| ([environment, ("result", result)], count))
        });
        families.counters("claviger_cache_reads", help, None, reads)?;
        let each = |figure: fn(&CacheFigures) -> u64| {
            caches.iter().map(move |cache| ([("environment", cache.environment.as_str())], figure(cache)))
        };
        let help = "Entries that were fetched anew before their time was over.";
        families.counters(
            "claviger_cache_refreshes_ahead",
            help,
            None,
            each(|cache| cache.refreshes_ahead),
        )?;
        let help = "Secrets and absences that are held.";
        families.gauges("claviger_cache_entries", help, None, each(|cache| cache.entries))?;
        let help = "What the entries weigh.";
        families.gauges("claviger_cache_size", help, Some(&Unit::Bytes), each(|cache| cache.bytes))?;
        let help = "Calls to the store below the cache.";
        families.counters("claviger_upstream_calls", help, None, each(|cache| cache.upstream_calls))?;
        let help = "Calls to the store below the cache that failed.";
        families.counters("claviger_upstream_errors", help, None, each(|cache| cache.upstream_errors))?;
        let help = "Secrets that the store below the cache was asked for.";
        families.counters("claviger_upstream_secrets", help, None, each(|cache| cache.upstream_secrets))?;
        let help = "Questions to the store that went along in a call which another had opened.";
        families.counters("claviger_upstream_coalesced", help, None, each(|cache| cache.coalesced))?;
        self.quotas(families)
    }

    fn quotas(&self, families: &mut Families<'_>) -> fmt::Result {
        let caches = &self.snapshot.caches;
        let help = "Calls that the quota of their account held up, by what became of them.";
        let held_up = caches.iter().flat_map(|cache| {
            let results = [("waited", cache.quota_waits), ("refused", cache.quota_refusals)];
            let environment = ("environment", cache.environment.as_str());
            results.map(|(result, count)| ([environment, ("result", result)], count))
        });
        families.counters("claviger_upstream_quota", help, None, held_up)?;
        let help = "How long calls waited for the quota of their account.";
        let waited = caches
            .iter()
            .map(|cache| ([("environment", cache.environment.as_str())], cache.quota_waited.as_secs_f64()));
        families.counters("claviger_upstream_quota_wait", help, Some(&Unit::Seconds), waited)
    }

    fn audit(&self, families: &mut Families<'_>) -> fmt::Result {
        let audit = &self.snapshot.audit;
        let help = "Audit records, by whether they were written.";
        families.counters(
            "claviger_audit_records",
            help,
            None,
            [([("result", "ok")], audit.records), ([("result", "failed")], audit.failed)],
        )?;
        let help = "Audit records that wait to be written.";
        families.gauges("claviger_audit_backlog_records", help, None, [([], audit.backlog)])?;
        let help = "Time until an audit record was as durable as it had to be.";
        families.histograms("claviger_audit_append_duration", help, [([], &audit.latency)])?;
        let help = "How full the disk of the audit log is, from 0 to 1.";
        let used = audit.disk_used_ratio.map(|used| ([], used));
        families.gauges("claviger_audit_disk_used_ratio", help, None, used)
    }

    fn certificates(&self, families: &mut Families<'_>) -> fmt::Result {
        let help = "When a certificate ends, in seconds since 1970.";
        let ends = self.snapshot.certificates.iter();
        let ends = ends.map(|certificate| ([("kind", certificate.kind.as_str())], certificate.not_after));
        families.gauges("claviger_certificate_not_after_timestamp", help, Some(&Unit::Seconds), ends)?;
        let help = "Reloads of certificates and authorities; the last good ones stay in force.";
        families.attempts("claviger_certificate_reloads", help, self.snapshot.certificate_reloads)
    }

    fn rotations(&self, families: &mut Families<'_>) -> fmt::Result {
        let rotations = &self.snapshot.rotations;
        let by = |label: &'static str, counts: &[(&'static str, u64)]| {
            counts.iter().map(|(name, count)| ([(label, *name)], *count)).collect::<Vec<_>>()
        };
        let help = "Rotations that are over, by how they ended.";
        families.counters("claviger_rotations_ended", help, None, by("ending", &rotations.ended))?;
        let help = "Attempts that did not bring a rotation to its end, by what was in the way.";
        families.counters("claviger_rotation_failures", help, None, by("trouble", &rotations.failures))?;
        let help = "Rotations that are set, by how they are.";
        families.gauges("claviger_rotations", help, None, by("health", &rotations.health))?;
        let help = "For how long the rotation is due that waits longest.";
        families.gauges(
            "claviger_rotation_overdue",
            help,
            Some(&Unit::Seconds),
            [([], rotations.overdue)],
        )?;
        let help = "How long ago the scheduler last looked for what is due.";
        let looked = rotations.scheduler_looked.map(|seconds| ([], seconds));
        families.gauges("claviger_rotation_scheduler_looked", help, Some(&Unit::Seconds), looked)?;
        let help = "Whether nothing new is rotated because the clock was moved.";
        let stepped = u64::from(rotations.clock_stepped);
        families.gauges("claviger_rotation_clock_stepped", help, None, [([], stepped)])
    }

    fn callers(&self, families: &mut Families<'_>) -> fmt::Result {
        let Snapshot { connections, watches, rate_limited, .. } = &self.snapshot;
        let help = "Connections that are open.";
        families.gauges("claviger_connections_open", help, None, [([], connections.open)])?;
        let help = "Connections that were closed at once, over a bound.";
        families.counters("claviger_connections_refused", help, None, [([], connections.refused)])?;
        let help = "Watches that are open.";
        families.gauges("claviger_watches_open", help, None, [([], watches.open)])?;
        let help = "Changes of watched secrets, by what became of them.";
        families.counters(
            "claviger_watch_changes",
            help,
            None,
            [([("result", "pushed")], watches.pushed), ([("result", "coalesced")], watches.coalesced)],
        )?;
        let help = "Watches that were ended because the caller did not keep up.";
        families.counters("claviger_watches_ended_slow", help, None, [([], watches.ended_slow)])?;
        let help = "Calls that were turned away, by whose rate was reached.";
        families.counters(
            "claviger_rate_limited",
            help,
            None,
            [
                ([("scope", "principal")], rate_limited.principal),
                ([("scope", "address")], rate_limited.address),
                ([("scope", "stranger")], rate_limited.stranger),
            ],
        )
    }

    fn policy(&self, families: &mut Families<'_>) -> fmt::Result {
        let policy = self.snapshot.policy;
        let help = "Grows with every policy set that is taken.";
        families.gauges("claviger_policy_generation", help, None, [([], policy.generation)])?;
        families.gauges("claviger_policies", "Policies in force.", None, [([], policy.policies)])?;
        let help = "Reloads of the policies; where one fails, the last good set stays in force.";
        families.attempts("claviger_policy_reloads", help, self.policy_reloads)?;
        let help = "Root keys that are loaded: the present one, and those before it.";
        families.gauges("claviger_root_keys", help, None, [([], self.snapshot.root_keys)])?;
        let help = "Tasks of the runtime that have not ended.";
        families.gauges("claviger_tasks", help, None, [([], self.snapshot.tasks)])
    }

    fn process(&self, families: &mut Families<'_>) -> fmt::Result {
        let Some(process) = &self.snapshot.process else { return Ok(()) };
        let help = "When the process started, in seconds since 1970.";
        let start = [([], process.start_time_seconds)];
        families.gauges("process_start_time", help, Some(&Unit::Seconds), start)?;
        let cpu = [([], process.cpu_seconds)];
        families.counters("process_cpu", "Processor time that was used.", Some(&Unit::Seconds), cpu)?;
        let memory = [([], process.resident_bytes)];
        families.gauges("process_resident_memory", "Resident memory.", Some(&Unit::Bytes), memory)?;
        families.gauges("process_open_fds", "Open file descriptors.", None, [([], process.open_fds)])?;
        let most = process.max_fds.map(|most| ([], most));
        families.gauges("process_max_fds", "How many file descriptors may be open.", None, most)
    }
}

/// The labels of one sample.
type Labels<'l, const N: usize> = [(&'l str, &'l str); N];

/// Writes one family after the other. One without a sample is left out.
struct Families<'a>(DescriptorEncoder<'a>);

/// What is said of a family before its samples.
struct Family<'a> {
    name: &'a str,
    help: &'a str,
    unit: Option<&'a Unit>,
    kind: MetricType,
}

impl Families<'_> {
    fn build(&mut self) -> fmt::Result {
        let labels = [("version", env!("CARGO_PKG_VERSION"))];
        let mut build =
            self.0.encode_descriptor("claviger_build", "The build that runs.", None, MetricType::Info)?;
        build.encode_info(&labels)
    }

    fn counters<'l, T: EncodeCounterValue, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        samples: impl IntoIterator<Item = (Labels<'l, N>, T)>,
    ) -> fmt::Result {
        let family = Family { name, help, unit, kind: MetricType::Counter };
        self.each(family, samples, |encoder, value| encoder.encode_counter::<NoLabelSet, _, u64>(value, None))
    }

    fn gauges<'l, T: EncodeGaugeValue, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        samples: impl IntoIterator<Item = (Labels<'l, N>, T)>,
    ) -> fmt::Result {
        let family = Family { name, help, unit, kind: MetricType::Gauge };
        self.each(family, samples, |encoder, value| encoder.encode_gauge(value))
    }

    fn histograms<'l, 't, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'l, N>, &'t LatencySnapshot)>,
    ) -> fmt::Result {
        let family = Family { name, help, unit: Some(&Unit::Seconds), kind: MetricType::Histogram };
        let samples = samples.into_iter().filter(|(_, latency)| !latency.buckets.is_empty());
        self.each(family, samples, |encoder, latency| {
            let LatencySnapshot { buckets, count, sum_seconds } = latency;
            encoder.encode_histogram::<NoLabelSet>(*sum_seconds, *count, buckets, None)
        })
    }

    fn attempts(&mut self, name: &str, help: &str, attempts: AttemptFigures) -> fmt::Result {
        let samples = [([("result", "ok")], attempts.ok), ([("result", "failed")], attempts.failed)];
        self.counters(name, help, None, samples)
    }

    fn each<'l, T, const N: usize>(
        &mut self,
        family: Family<'_>,
        samples: impl IntoIterator<Item = (Labels<'l, N>, T)>,
        write: impl Fn(&mut MetricEncoder<'_>, &T) -> fmt::Result,
    ) -> fmt::Result {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return Ok(());
        }
        let Family { name, help, unit, kind } = family;
        let mut encoder = self.0.encode_descriptor(name, help, unit, kind)?;
        for (labels, value) in samples {
            match N {
                0 => write(&mut encoder, &value)?,
                _ => write(&mut encoder.encode_family(&labels)?, &value)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::Latency;

    fn scrape(snapshot: Snapshot) -> String {
        encode(Vec::new(), AttemptFigures { ok: 3, failed: 1 }, snapshot)
    }

    #[test]
    fn an_empty_broker_has_figures_that_end_well() {
        let text = scrape(Snapshot::default());
        assert!(text.ends_with("\n# EOF\n"), "{text}");
        assert!(text.contains("claviger_build_info{version=\""), "{text}");
        assert!(text.contains("claviger_policy_reloads_total{result=\"failed\"} 1\n"), "{text}");
        assert!(
            text.contains("# TYPE claviger_connections_open gauge\nclaviger_connections_open 0\n"),
            "{text}"
        );
        assert!(!text.contains("claviger_cache_reads"), "no environment, no family: {text}");
        assert!(!text.contains("claviger_audit_append"), "a histogram has buckets or is not there: {text}");
    }

    #[test]
    fn each_environment_has_its_own_figures() {
        let cache = |environment: &str, hits| CacheFigures {
            environment: environment.to_owned(),
            hits,
            bytes: 2_048,
            upstream_secrets: 40,
            coalesced: 38,
            quota_waits: 3,
            quota_waited: Duration::from_millis(1_500),
            ..CacheFigures::default()
        };
        let caches = vec![cache("development", 1), cache("production", 2)];
        let text = scrape(Snapshot { caches, ..Snapshot::default() });
        for line in [
            "claviger_cache_reads_total{environment=\"development\",result=\"hit\"} 1\n",
            "claviger_cache_reads_total{environment=\"production\",result=\"hit\"} 2\n",
            "# UNIT claviger_cache_size_bytes bytes\n",
            "claviger_cache_size_bytes{environment=\"production\"} 2048\n",
            "claviger_upstream_secrets_total{environment=\"production\"} 40\n",
            "claviger_upstream_coalesced_total{environment=\"production\"} 38\n",
            "claviger_upstream_quota_total{environment=\"production\",result=\"waited\"} 3\n",
            "claviger_upstream_quota_total{environment=\"production\",result=\"refused\"} 0\n",
            "claviger_upstream_quota_wait_seconds_total{environment=\"production\"} 1.5\n",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
        assert_eq!(text.matches("# TYPE claviger_cache_reads counter").count(), 1);
    }

    #[test]
    fn a_histogram_is_cumulative_and_ends_with_infinity() {
        let latency = Latency::new();
        latency.observe(Duration::from_micros(10));
        latency.observe(Duration::from_secs(60));
        let audit = AuditFigures {
            latency: latency.snapshot(),
            disk_used_ratio: Some(0.5),
            ..AuditFigures::default()
        };
        let text = scrape(Snapshot { audit, ..Snapshot::default() });
        for line in [
            "claviger_audit_append_duration_seconds_count 2\n",
            "claviger_audit_append_duration_seconds_bucket{le=\"10.0\"} 1\n",
            "claviger_audit_append_duration_seconds_bucket{le=\"+Inf\"} 2\n",
            "claviger_audit_disk_used_ratio 0.5\n",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
    }

    #[test]
    fn a_certificate_shows_its_end() {
        let certificates = vec![CertificateFigures { kind: "server".to_owned(), not_after: 1_900_000_000 }];
        let text = scrape(Snapshot { certificates, ..Snapshot::default() });
        let line = "claviger_certificate_not_after_timestamp_seconds{kind=\"server\"} 1900000000\n";
        assert!(text.contains(line), "{text}");
    }
}
