//! What is counted while the broker works: numbers alone, never a name of a secret or of a caller.
//!
//! ```text
//! call ─▶ Metrics::method ─▶ &Method ─▶ finished (atomics)
//!                                           │
//! scrape ─▶ Snapshot of all other parts ─▶ encode ─▶ OpenMetrics text
//! ```
//!
//! INVARIANT: counting takes no lock and allocates nothing. Which methods there are is known before the first call;
//! whatever else a caller names is counted as one.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::exposition::{self, Snapshot};

/// The upper bounds of a [`Latency`]'s buckets, in nanoseconds; what is longer falls into one more.
const BOUNDS: [u64; 16] = [
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    10_000_000_000,
];

/// A histogram of times: 50 µs to 10 s in 16 steps, and what is longer. Observing is two atomic additions.
#[derive(Debug)]
pub struct Latency {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    nanoseconds: AtomicU64,
}

/// What a [`Latency`] held at one time.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LatencySnapshot {
    /// Upper bound in seconds, and how many observations fell between the bound before and this one: not cumulative.
    /// The last bound is infinite.
    pub buckets: Vec<(f64, u64)>,
    /// How many observations there are: the sum of all buckets.
    pub count: u64,
    /// The sum of all observations, in seconds. Read a moment apart from the buckets.
    pub sum_seconds: f64,
}

impl Latency {
    /// A histogram without observations.
    #[must_use]
    pub const fn new() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BOUNDS.len() + 1], nanoseconds: AtomicU64::new(0) }
    }

    /// Adds one observation.
    pub fn observe(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let place = BOUNDS.iter().position(|bound| nanoseconds <= *bound).unwrap_or(BOUNDS.len());
        if let Some(bucket) = self.buckets.get(place) {
            bucket.fetch_add(1, Relaxed);
        }
        self.nanoseconds.fetch_add(nanoseconds, Relaxed);
    }

    /// What it holds now.
    #[must_use]
    pub fn snapshot(&self) -> LatencySnapshot {
        let bounds = BOUNDS.iter().map(|bound| *bound as f64 / 1e9).chain([f64::INFINITY]);
        let counts = self.buckets.iter().map(|bucket| bucket.load(Relaxed));
        let buckets: Vec<_> = bounds.zip(counts).collect();
        LatencySnapshot {
            count: buckets.iter().map(|(_, count)| count).sum(),
            sum_seconds: self.nanoseconds.load(Relaxed) as f64 / 1e9,
            buckets,
        }
    }
}

impl Default for Latency {
    fn default() -> Self {
        Self::new()
    }
}

/// How often something that is tried went well, and how often not.
#[derive(Debug, Default)]
pub struct Attempts {
    ok: AtomicU64,
    failed: AtomicU64,
}

/// What [`Attempts`] held at one time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AttemptFigures {
    /// How many went well.
    pub ok: u64,
    /// How many did not.
    pub failed: u64,
}

impl Attempts {
    /// Counts one.
    pub fn count(&self, ok: bool) {
        let counter = if ok { &self.ok } else { &self.failed };
        counter.fetch_add(1, Relaxed);
    }

    /// How many there were until now.
    #[must_use]
    pub fn figures(&self) -> AttemptFigures {
        AttemptFigures { ok: self.ok.load(Relaxed), failed: self.failed.load(Relaxed) }
    }
}

/// The names of the gRPC status codes, by their numbers (gRPC, "Status codes and their use in gRPC").
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];
const UNKNOWN: usize = 2;

/// How a call ended, as a gRPC status code. A number that is none counts as `UNKNOWN`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallCode(usize);

impl CallCode {
    /// The caller got an answer, or a stream began.
    pub const OK: Self = Self(0);
    /// The caller went before there was an answer.
    pub const CANCELLED: Self = Self(1);

    /// The code of this number.
    #[must_use]
    pub const fn from_number(number: usize) -> Self {
        if number < CODES.len() { Self(number) } else { Self(UNKNOWN) }
    }

    /// Its name, as gRPC writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        CODES.get(self.0).copied().unwrap_or("UNKNOWN")
    }
}

/// What is counted of one method.
#[derive(Debug)]
pub struct Method {
    name: Box<str>,
    by_code: [AtomicU64; CODES.len()],
    latency: Latency,
}

impl Method {
    fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            by_code: [const { AtomicU64::new(0) }; CODES.len()],
            latency: Latency::new(),
        }
    }

    /// Its full name without the leading slash, `package.Service/Method`; `other` for all that no service has.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Counts a call that ended.
    pub fn finished(&self, code: CallCode, took: Duration) {
        if let Some(counter) = self.by_code.get(code.0) {
            counter.fetch_add(1, Relaxed);
        }
        self.latency.observe(took);
    }

    fn figures(&self) -> MethodFigures {
        let calls = self.by_code.iter().map(|counter| counter.load(Relaxed));
        MethodFigures {
            name: self.name.to_string(),
            calls: CODES.iter().copied().zip(calls).collect(),
            latency: self.latency.snapshot(),
        }
    }
}

/// What [`Method`] held at one time.
#[derive(Debug, Clone)]
pub(super) struct MethodFigures {
    pub(super) name: String,
    /// By the name of the code; every code is there.
    pub(super) calls: Vec<(&'static str, u64)>,
    pub(super) latency: LatencySnapshot,
}

/// Everything that is counted where it happens. What other parts count by themselves comes with the [`Snapshot`].
#[derive(Debug)]
pub struct Metrics {
    /// By the path that a call names: `/package.Service/Method`.
    methods: HashMap<Box<str>, Method>,
    other: Method,
    policy_reloads: Attempts,
}

impl Metrics {
    /// Counters for these methods, each named by its path, `/package.Service/Method`.
    #[must_use]
    pub fn new(paths: impl IntoIterator<Item = String>) -> Self {
        let method = |path: String| {
            let method = Method::new(path.trim_start_matches('/'));
            (path.into_boxed_str(), method)
        };
        Self {
            methods: paths.into_iter().map(method).collect(),
            other: Method::new("other"),
            policy_reloads: Attempts::default(),
        }
    }

    /// Where calls with this path are counted.
    #[must_use]
    pub fn method(&self, path: &str) -> &Method {
        self.methods.get(path).unwrap_or(&self.other)
    }

    /// Counts a reload of the policies, whoever asked for it.
    pub fn policy_reload(&self, ok: bool) {
        self.policy_reloads.count(ok);
    }

    /// Everything as OpenMetrics text ([`CONTENT_TYPE`](super::CONTENT_TYPE)), for one scrape.
    #[must_use]
    pub fn encode(&self, snapshot: Snapshot) -> String {
        let mut methods: Vec<_> = self.methods.values().map(Method::figures).collect();
        methods.sort_by(|a, b| a.name.cmp(&b.name));
        methods.push(self.other.figures());
        exposition::encode(methods, self.policy_reloads.figures(), snapshot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_observation_falls_into_one_bucket_and_bounds_belong_to_it() {
        let latency = Latency::new();
        for micros in [0, 50, 51, 10_000_000, 10_000_001] {
            latency.observe(Duration::from_micros(micros));
        }
        latency.observe(Duration::MAX);
        let seen = latency.snapshot();
        assert_eq!(seen.buckets.len(), 17);
        let count = |bound: f64| seen.buckets.iter().find(|(found, _)| *found == bound).unwrap().1;
        assert_eq!((count(0.000_05), count(0.000_1), count(10.0), count(f64::INFINITY)), (2, 1, 1, 2));
        assert_eq!(seen.count, 6);
        assert!(seen.buckets.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }

    #[test]
    fn the_sum_is_in_seconds() {
        let latency = Latency::new();
        latency.observe(Duration::from_millis(1_500));
        latency.observe(Duration::from_millis(500));
        assert!((latency.snapshot().sum_seconds - 2.0).abs() < 1e-9);
    }

    #[test]
    fn whatever_a_caller_names_counts_as_one() {
        let metrics = Metrics::new(["/a.B/C".to_owned()]);
        assert_eq!(metrics.method("/a.B/C").name(), "a.B/C");
        for path in ["", "/", "/a.B/c", "/x.Y/Z", "a.B/C"] {
            assert_eq!(metrics.method(path).name(), "other", "{path}");
        }
    }

    #[test]
    fn codes_have_the_names_that_grpc_gives_them() {
        assert_eq!(CallCode::OK.name(), "OK");
        assert_eq!(CallCode::CANCELLED.name(), "CANCELLED");
        assert_eq!(CallCode::from_number(16).name(), "UNAUTHENTICATED");
        assert_eq!(CallCode::from_number(17), CallCode::from_number(2));
    }

    #[test]
    fn calls_are_counted_by_method_and_code() {
        let metrics = Metrics::new(["/a.B/C".to_owned()]);
        metrics.method("/a.B/C").finished(CallCode::OK, Duration::from_millis(1));
        metrics.method("/a.B/C").finished(CallCode::from_number(7), Duration::from_millis(1));
        metrics.method("/q.R/S").finished(CallCode::OK, Duration::from_millis(1));
        let text = metrics.encode(Snapshot::default());
        for line in [
            "claviger_requests_total{method=\"a.B/C\",code=\"OK\"} 1\n",
            "claviger_requests_total{method=\"a.B/C\",code=\"PERMISSION_DENIED\"} 1\n",
            "claviger_requests_total{method=\"other\",code=\"OK\"} 1\n",
            "claviger_request_duration_seconds_count{method=\"a.B/C\"} 2\n",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
        assert!(!text.contains("q.R"), "{text}");
    }
}
