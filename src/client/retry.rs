//! How often a call is tried, and how long it waits in between.
//!
//! ```text
//! attempt ─ UNAVAILABLE ─▶ pause: random, of at most 100 ms ─▶ attempt ─▶ … 200 ms … 400 ms … 2 s ─▶ the deadline
//! ```
//!
//! The pause is drawn anew from all of its length, so that a thousand clients who lost one broker do not come back as
//! one.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::error::ClientError;
use crate::clock::Clock;
use crate::crypto::random;
use crate::error::Reason;

/// Which failures a call is tried again after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    /// Whatever is transient: the call changes nothing.
    Harmless,
    /// The same: the call changes something, and the second attempt finds the work of the first.
    Repeatable,
    /// Only where the broker turned it away at the door: once it is inside, nobody knows what it did.
    TurnedAway,
}

impl Again {
    fn fits(self, error: &ClientError) -> bool {
        match self {
            Self::Harmless | Self::Repeatable => error.is_transient(),
            Self::TurnedAway => error.reason == Reason::RateLimited,
        }
    }
}

/// Tries until there is an answer, an error that another try does not mend, or no time left. Each attempt is told how
/// much there is.
pub(super) async fn persist<T, F>(
    timeout: Duration,
    clock: &dyn Clock,
    again: Again,
    attempt: impl Fn(Duration) -> F,
) -> Result<T, ClientError>
where
    F: Future<Output = Result<T, ClientError>>,
{
    let last = Mutex::new(None);
    let start = clock.monotonic();
    let left = || timeout.saturating_sub(clock.monotonic().saturating_sub(start));
    let attempts = async {
        let mut backoff = Backoff::of_calls();
        loop {
            let error = match attempt(left()).await {
                Err(error) if again.fits(&error) => error,
                settled => return settled,
            };
            let length = backoff.length();
            if length >= left() {
                return Err(error);
            }
            *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            pause(length).await;
        }
    };
    let settled = tokio::time::timeout(timeout, attempts).await;
    settled.unwrap_or_else(|_| {
        let late = late(timeout, last.into_inner().unwrap_or_else(PoisonError::into_inner));
        Err(if again == Again::Harmless { late } else { late.doubtful() })
    })
}

fn late(timeout: Duration, last: Option<ClientError>) -> ClientError {
    let before = last.map(|error| format!("; before that: {}", error.message)).unwrap_or_default();
    ClientError::late(format!("no answer within {timeout:?}{before}"))
}

/// Pauses that double, up to a longest one.
#[derive(Debug)]
pub(super) struct Backoff {
    first: Duration,
    next: Duration,
    longest: Duration,
}

impl Backoff {
    /// Between the attempts of a call, which has a deadline.
    pub(super) const fn of_calls() -> Self {
        Self::new(Duration::from_secs(2))
    }

    /// Between the attempts of a watch, which goes on for ever.
    pub(super) const fn of_watches() -> Self {
        Self::new(Duration::from_secs(10))
    }

    const fn new(longest: Duration) -> Self {
        let first = Duration::from_millis(100);
        Self { first, next: first, longest }
    }

    /// How long the next pause is.
    pub(super) fn length(&mut self) -> Duration {
        let most = self.next;
        self.next = most.saturating_mul(2).min(self.longest);
        let share = random().map_or(u32::MAX, u32::from_le_bytes);
        most.mul_f64(f64::from(share) / f64::from(u32::MAX))
    }

    /// It went well: the next pause is short again.
    pub(super) const fn reset(&mut self) {
        self.next = self.first;
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the pause between two attempts; what bounds them is the caller's"
)]
pub(super) async fn pause(length: Duration) {
    tokio::time::sleep(length).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{ManualClock, SystemClock};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tonic::Code;

    const LONG: Duration = Duration::from_secs(60);

    fn error(reason: Reason, code: Code) -> ClientError {
        ClientError::new(reason, code, "as the test has it")
    }

    /// Fails so often with this error, then succeeds; gives what came of it and how many attempts there were.
    async fn after(times: usize, error: ClientError, again: Again) -> (Result<(), ClientError>, usize) {
        let attempts = AtomicUsize::new(0);
        let attempt = |_| async {
            match attempts.fetch_add(1, Ordering::Relaxed) < times {
                true => Err(error.clone()),
                false => Ok(()),
            }
        };
        let settled = persist(LONG, &SystemClock, again, attempt).await;
        (settled, attempts.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn what_is_transient_is_tried_again() {
        let away = error(Reason::StoreUnavailable, Code::Unavailable);
        assert_eq!(after(2, away.clone(), Again::Harmless).await, (Ok(()), 3));
        assert_eq!(after(2, away.clone(), Again::Repeatable).await, (Ok(()), 3));
        assert_eq!(after(1, away.clone(), Again::TurnedAway).await, (Err(away), 1));
        let limited = error(Reason::RateLimited, Code::ResourceExhausted);
        assert_eq!(after(1, limited, Again::TurnedAway).await, (Ok(()), 2));
        for (reason, code) in [
            (Reason::Denied, Code::PermissionDenied),
            (Reason::Conflict, Code::Aborted),
            (Reason::DeadlineExceeded, Code::DeadlineExceeded),
            (Reason::LimitExceeded, Code::ResourceExhausted),
        ] {
            let settled = error(reason, code);
            assert_eq!(after(1, settled.clone(), Again::Harmless).await, (Err(settled), 1), "{reason}");
        }
    }

    #[tokio::test]
    async fn no_attempt_is_begun_that_could_not_end() {
        let clock = ManualClock::new(jiff::Timestamp::UNIX_EPOCH);
        let away = error(Reason::Unavailable, Code::Unavailable);
        let attempt = |left: Duration| {
            assert_eq!(left, LONG);
            clock.advance(LONG);
            let away = away.clone();
            async { Err::<(), _>(away) }
        };
        let settled = persist(LONG, &*clock, Again::Harmless, attempt).await;
        assert_eq!(settled.unwrap_err(), away, "what was wrong, not that time ran out");
    }

    #[tokio::test]
    async fn an_attempt_that_hangs_ends_with_the_deadline_and_says_what_was_before() {
        let attempts = AtomicUsize::new(0);
        let away = error(Reason::Unavailable, Code::Unavailable);
        let attempt = |_| {
            let first = attempts.fetch_add(1, Ordering::Relaxed) == 0;
            let away = away.clone();
            async move { if first { Err(away) } else { std::future::pending::<Result<(), _>>().await } }
        };
        let timeout = Duration::from_secs(1);
        let error = persist(timeout, &SystemClock, Again::Harmless, attempt).await.unwrap_err();
        assert_eq!(error.reason, Reason::DeadlineExceeded);
        assert!(error.message.contains("as the test has it"), "{error}");
    }

    #[tokio::test]
    async fn only_a_call_that_changes_something_leaves_doubt() {
        for (again, doubt) in [(Again::Harmless, false), (Again::Repeatable, true), (Again::TurnedAway, true)]
        {
            let hangs = |_| std::future::pending::<Result<(), ClientError>>();
            let error = persist(Duration::from_millis(1), &SystemClock, again, hangs).await.unwrap_err();
            assert_eq!(error.message.contains("a change may still take effect"), doubt, "{again:?}: {error}");
        }
    }

    #[test]
    fn pauses_grow_to_a_bound_and_begin_anew() {
        let mut backoff = Backoff::of_calls();
        let bounds = [100, 200, 400, 800, 1_600, 2_000, 2_000].map(Duration::from_millis);
        for most in bounds {
            assert!(backoff.length() <= most);
        }
        assert_eq!(backoff.next, Duration::from_secs(2));
        backoff.reset();
        assert!(backoff.length() <= Duration::from_millis(100));
    }
}
