//! How long to wait: before another try, and before a change in AWS.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::super::Trouble;
use super::Settings;
use crate::crypto::random;

/// The turns of changes in AWS: its quota is 50 a second for an account (AWS Secrets Manager quotas), of which half is left
/// to others.
#[derive(Debug, Default)]
pub(super) struct Pace {
    free_at: Mutex<Duration>,
}

impl Pace {
    const EVERY: Duration = Duration::from_millis(40);

    /// Takes the next turn, at `now` by the monotonic clock; how long that is from now.
    pub(super) fn turn(&self, now: Duration) -> Duration {
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = (*free_at).max(now);
        *free_at = mine + Self::EVERY;
        mine.saturating_sub(now)
    }
}

/// Full jitter: anything between nothing and a bound that doubles with each failure, so that those who failed together
/// don't come back together. What needs a person waits for most of the longest time. `share` is the jitter, from 0 to 1.
pub(super) fn backoff(settings: &Settings, trouble: Trouble, attempt: u32, share: f64) -> Duration {
    let Settings { retry_from, retry_to, .. } = *settings;
    if trouble == Trouble::Stopping {
        return Duration::ZERO;
    }
    if trouble.needs_a_person() {
        return retry_to.mul_f64(0.5 + share / 2.0);
    }
    let bound = retry_from.saturating_mul(2_u32.saturating_pow(attempt.saturating_sub(1).min(30)));
    // Not at once: what failed a moment ago fails again.
    bound.min(retry_to).mul_f64(share).max(retry_from / 10)
}

/// A random number from 0 to 1.
pub(super) fn share() -> f64 {
    f64::from(u32::from_be_bytes(random::<4>().unwrap_or_default())) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_thousand_changes_at_once_keep_to_25_a_second() {
        let (pace, now) = (Pace::default(), Duration::from_secs(100));
        let waits: Vec<_> = (0..1_000).map(|_| pace.turn(now)).collect();
        assert_eq!(waits[0], Duration::ZERO);
        for (place, wait) in waits.iter().enumerate() {
            let within_a_second =
                waits.iter().filter(|other| **other >= *wait && **other < *wait + Duration::from_secs(1));
            assert!(within_a_second.count() <= 25, "after the change {place}");
        }
        assert_eq!(
            pace.turn(now + Duration::from_secs(60)),
            Duration::ZERO,
            "who waited long enough goes at once"
        );
    }

    proptest! {
        #[test]
        fn waits_double_up_to_their_bound_and_are_jittered_all_over(attempt in 1_u32..100, share in 0.0..=1.0_f64) {
            let settings = Settings::default();
            let wait = backoff(&settings, Trouble::TargetUnavailable, attempt, share);
            let bound = settings.retry_from * 2_u32.pow((attempt - 1).min(20));
            prop_assert!(wait <= bound.min(settings.retry_to) && wait >= settings.retry_from / 10);
            let most = backoff(&settings, Trouble::TargetUnavailable, attempt, 1.0);
            prop_assert_eq!(most, bound.min(settings.retry_to));
            let blocked = backoff(&settings, Trouble::PrivilegeMissing, attempt, share);
            prop_assert!(blocked >= settings.retry_to / 2 && blocked <= settings.retry_to);
            prop_assert_eq!(backoff(&settings, Trouble::Stopping, attempt, share), Duration::ZERO);
        }
    }
}
