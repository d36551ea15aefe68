//! The only reader of time. Everything else takes a [`Clock`], so that a test can say what time it is.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;

/// Reads the time.
pub trait Clock: Send + Sync + fmt::Debug {
    /// Wall-clock time, for records and for expiries that outlive the process. May step.
    fn now(&self) -> Timestamp;

    /// Time since an arbitrary start, for TTLs and backoff within the process. Never steps back, and counts the
    /// time that the machine was suspended.
    fn monotonic(&self) -> Duration;
}

/// A clock that many own.
pub type SharedClock = Arc<dyn Clock>;

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl SystemClock {
    /// The machine's clock, shared.
    #[must_use]
    pub fn shared() -> SharedClock {
        Arc::new(Self)
    }
}

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the one place where wall-clock time is read")]
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn monotonic(&self) -> Duration {
        // CLOCK_BOOTTIME, not CLOCK_MONOTONIC: a laptop that slept an hour has an hour older cache.
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
    }
}

/// A clock that stands still until it is told to move. For tests, ours and those of users.
#[derive(Debug)]
pub struct ManualClock {
    state: Mutex<(Timestamp, Duration)>,
}

impl ManualClock {
    /// A clock that shows `now`.
    #[must_use]
    pub fn new(now: Timestamp) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new((now, Duration::from_secs(1_000))) })
    }

    /// Moves both readings forward.
    pub fn advance(&self, by: Duration) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = state.0.saturating_add(by).unwrap_or(Timestamp::MAX);
        state.1 += by;
    }

    /// Steps wall-clock time alone, as NTP or a person would.
    pub fn set_wall(&self, now: Timestamp) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0 = now;
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    fn monotonic(&self) -> Duration {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1
    }
}

/// Why text is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("duration `{text}`: {problem}; write a number with a unit, for example `30s`, `5m`, `12h` or `30d`")]
pub struct DurationError {
    text: String,
    problem: &'static str,
}

/// Parses a duration with a unit (`250ms`, `30s`, `5m`, `1h30m`, `30d`). A day is 24 hours.
///
/// # Errors
/// A missing unit, a negative or an overlong duration; zero is left to the caller.
pub fn parse_duration(text: &str) -> Result<Duration, DurationError> {
    const LONGEST: Duration = Duration::from_secs(100 * 366 * 86_400);
    let refuse = |problem| DurationError {
        text: text.chars().take(32).flat_map(char::escape_default).collect(),
        problem,
    };
    if text.trim().parse::<f64>().is_ok() {
        return Err(refuse("has no unit"));
    }
    let span: jiff::Span = text.parse().map_err(|_| refuse("is not a duration"))?;
    let signed = span
        .to_duration(jiff::SpanRelativeTo::days_are_24_hours())
        .map_err(|_| refuse("has months or years, whose length varies"))?;
    let duration = Duration::try_from(signed).map_err(|_| refuse("is negative"))?;
    if duration > LONGEST {
        return Err(refuse("is longer than a century"));
    }
    Ok(duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_clock_moves_forward() {
        let clock = SystemClock;
        let before = clock.monotonic();
        assert!(clock.monotonic() >= before);
        assert!(clock.now() > Timestamp::UNIX_EPOCH);
    }

    #[test]
    fn durations_need_units() {
        assert_eq!(parse_duration("5m").unwrap(), Duration::from_secs(300));
        assert_eq!(parse_duration("1h30m").unwrap(), Duration::from_secs(5_400));
        assert_eq!(parse_duration("30d").unwrap(), Duration::from_secs(30 * 86_400));
        for bad in ["5", "-1s", "1e9h", "", " ", "5 parsecs", "0", "1mo", "999999999h"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn manual_clock_moves_only_when_told() {
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        let start = clock.monotonic();
        clock.advance(Duration::from_secs(5));
        assert_eq!(clock.monotonic() - start, Duration::from_secs(5));
        assert_eq!(clock.now().as_second(), 5);
        clock.set_wall(Timestamp::UNIX_EPOCH);
        assert_eq!(clock.monotonic() - start, Duration::from_secs(5));
    }
}
