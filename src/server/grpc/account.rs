//! What is counted and logged of each call: one count, one time, one line.
//!
//! A call counts with the code of its answer's headers. Errors of calls that are answered at once stand there; a stream
//! that began counts as `OK`, whatever ends it, and its time is that until it began. Who goes away before there is an
//! answer counts as `CANCELLED`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use http::{Request, Response};

use crate::clock::SharedClock;
use crate::identity::SourceAddress;
use crate::telemetry::metrics::{CallCode, Method, Metrics};
use crate::telemetry::trace::{self, TraceId};

/// Where calls are counted.
pub(super) struct Accounts {
    metrics: Arc<Metrics>,
    clock: SharedClock,
    lines: Lines,
}

impl Accounts {
    pub(super) fn new(metrics: Arc<Metrics>, clock: SharedClock) -> Self {
        Self { metrics, clock, lines: Lines::default() }
    }

    /// A call that begins; it gets its request id here.
    pub(super) fn open<B>(&self, request: &Request<B>, source: &SourceAddress) -> Account<'_> {
        let mut text = uuid::Uuid::encode_buffer();
        let request_id: &str = uuid::Uuid::new_v4().hyphenated().encode_lower(&mut text);
        Account {
            accounts: self,
            method: self.metrics.method(request.uri().path()),
            began: self.clock.monotonic(),
            request_id: request_id.into(),
            trace: trace_of(request),
            source: match source {
                SourceAddress::Unix { .. } => "unix",
                SourceAddress::Tcp(_) => "tcp",
                SourceAddress::Internal => "internal",
            },
            closed: false,
        }
    }
}

/// What is counted and logged of one call when it ends, also when nobody waits for its answer any more.
pub(super) struct Account<'a> {
    accounts: &'a Accounts,
    method: &'a Method,
    began: Duration,
    pub(super) request_id: Arc<str>,
    trace: Option<TraceId>,
    source: &'static str,
    closed: bool,
}

impl Account<'_> {
    /// The call ended with this answer.
    pub(super) fn close<B>(mut self, response: &Response<B>) {
        let quiet = response.extensions().get::<Quiet>().is_some();
        self.enter(code_of(response), quiet);
    }

    fn enter(&mut self, code: CallCode, quiet: bool) {
        self.closed = true;
        let now = self.accounts.clock.monotonic();
        let took = now.saturating_sub(self.began);
        self.method.finished(code, took);
        let loudness = if quiet { Loudness::Detail } else { Loudness::of(code) };
        let loudness = if self.accounts.lines.permits(loudness, now) { loudness } else { Loudness::Detail };
        self.say(loudness, code, took);
    }

    /// Where the level is off, this is one comparison: the fields are not made.
    fn say(&self, loudness: Loudness, code: CallCode, took: Duration) {
        macro_rules! say {
            ($level:ident) => {
                tracing::$level!(
                    method = self.method.name(),
                    code = code.name(),
                    request_id = &*self.request_id,
                    trace_id = self.trace.map(tracing::field::display),
                    source = self.source,
                    elapsed_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
                    "call ended"
                )
            };
        }
        match loudness {
            Loudness::Detail => say!(debug),
            Loudness::CallersFault => say!(info),
            Loudness::BrokersFault => say!(warn),
        }
    }
}

impl Drop for Account<'_> {
    fn drop(&mut self) {
        if !self.closed {
            self.enter(CallCode::CANCELLED, false);
        }
    }
}

/// How much a call's end is worth to a reader of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loudness {
    Detail,
    CallersFault,
    BrokersFault,
}

impl Loudness {
    fn of(code: CallCode) -> Self {
        match code.name() {
            "OK" | "CANCELLED" => Self::Detail,
            "UNAVAILABLE" | "INTERNAL" | "DATA_LOSS" | "RESOURCE_EXHAUSTED" | "UNKNOWN" => Self::BrokersFault,
            _ => Self::CallersFault,
        }
    }
}

/// Bounds the lines about calls that went wrong: an outage or a flood must not fill a disk with them. Those over the
/// bound are details; every call is counted all the same.
#[derive(Debug, Default)]
struct Lines {
    second: AtomicU64,
    said: AtomicU64,
}

impl Lines {
    /// How many in one second.
    const MOST: u64 = 100;

    fn permits(&self, loudness: Loudness, now: Duration) -> bool {
        if loudness == Loudness::Detail {
            return true;
        }
        if self.second.swap(now.as_secs(), Relaxed) != now.as_secs() {
            self.said.store(0, Relaxed);
        }
        self.said.fetch_add(1, Relaxed) < Self::MOST
    }
}

/// The trace that the caller says the call belongs to. Several headers are as good as none.
fn trace_of<B>(request: &Request<B>) -> Option<TraceId> {
    let mut headers = request.headers().get_all(trace::HEADER).iter();
    let only = headers.next()?.to_str().ok()?;
    if headers.next().is_some() { None } else { TraceId::parse(only) }
}

fn code_of<B>(response: &Response<B>) -> CallCode {
    const UNKNOWN: usize = 2;
    match response.headers().get("grpc-status") {
        Some(number) => {
            let number = number.to_str().ok().and_then(|number| number.parse().ok());
            CallCode::from_number(number.unwrap_or(UNKNOWN))
        }
        None if response.status().is_success() => CallCode::OK,
        None => CallCode::from_number(UNKNOWN),
    }
}

/// Marks an answer that the log does not name.
#[derive(Debug, Clone, Copy)]
struct Quiet;

/// Keeps a call out of the log but for its details: one of many alike.
pub(super) fn hush<B>(response: &mut Response<B>) {
    response.extensions_mut().insert(Quiet);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use tonic::body::Body;

    #[test]
    fn an_answers_headers_say_how_a_call_ended() {
        let answered = |status: u16, code: Option<&str>| {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = http::StatusCode::from_u16(status).unwrap();
            if let Some(code) = code {
                response.headers_mut().insert("grpc-status", code.parse().unwrap());
            }
            code_of(&response).name()
        };
        assert_eq!(answered(200, None), "OK");
        assert_eq!(answered(200, Some("0")), "OK");
        assert_eq!(answered(200, Some("7")), "PERMISSION_DENIED");
        for (status, code) in [(200, Some("99")), (200, Some("x")), (200, Some("-1")), (415, None)] {
            assert_eq!(answered(status, code), "UNKNOWN", "{status} {code:?}");
        }
    }

    #[test]
    fn one_header_says_the_trace_and_two_say_nothing() {
        const HEADER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let one = Request::builder().header("traceparent", HEADER);
        let two = Request::builder().header("traceparent", HEADER).header("traceparent", HEADER);
        let found = trace_of(&one.body(Body::empty()).unwrap()).unwrap();
        assert_eq!(found.to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(trace_of(&two.body(Body::empty()).unwrap()), None);
    }

    #[test]
    fn lines_about_failures_are_bounded_each_second() {
        let lines = Lines::default();
        let permitted = |now| {
            (0..1_000).filter(|_| lines.permits(Loudness::BrokersFault, Duration::from_secs(now))).count()
        };
        assert_eq!((permitted(1), permitted(1), permitted(2)), (100, 0, 100));
        assert!(lines.permits(Loudness::Detail, Duration::from_secs(2)), "details have a level of their own");
    }

    #[test]
    fn a_call_is_counted_once_also_when_nobody_waits_for_it() {
        let path = "/claviger.v1.SecretService/GetSecret";
        let metrics = Arc::new(Metrics::new([path.to_owned()]));
        let clock = ManualClock::new(jiff::Timestamp::UNIX_EPOCH);
        let accounts = Accounts::new(Arc::clone(&metrics), clock.clone());
        let request = || Request::builder().uri(path).body(Body::empty()).unwrap();
        let source = SourceAddress::Unix { pid: None };
        let account = accounts.open(&request(), &source);
        assert_eq!(account.request_id.len(), 36);
        clock.advance(Duration::from_secs(3));
        account.close(&Response::new(Body::empty()));
        drop(accounts.open(&request(), &source));
        let text = metrics.encode(crate::telemetry::Snapshot::default());
        for line in [
            "requests_total{method=\"claviger.v1.SecretService/GetSecret\",code=\"OK\"} 1\n",
            "requests_total{method=\"claviger.v1.SecretService/GetSecret\",code=\"CANCELLED\"} 1\n",
            "request_duration_seconds_sum{method=\"claviger.v1.SecretService/GetSecret\"} 3.0\n",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
    }
}
