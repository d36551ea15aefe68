//! Whether the wall clock can be believed.
//!
//! Schedules are kept in wall-clock time, and a wall clock can be set: by NTP, by a person, by a dying battery. One that
//! jumps a year ahead makes everything due at once. So its steps are measured against the monotonic clock, and for a
//! while after one no new run begins: whoever set the clock wrongly has time to set it right.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;

use crate::clock::SharedClock;

/// A difference that is no step: slewing, leap seconds, a process that was paused between two readings.
const SLACK: Duration = Duration::from_secs(60);
/// How long a clock that was set must go on evenly before it is believed.
const SETTLES_WITHIN: Duration = Duration::from_secs(600);

/// Watches the wall clock for steps.
#[derive(Debug)]
pub(in crate::rotation) struct Steps {
    clock: SharedClock,
    seen: Mutex<Seen>,
}

/// What both clocks showed at the last look, and when, by the monotonic one, the other is to be believed again.
#[derive(Debug, Clone, Copy)]
struct Seen {
    wall: Timestamp,
    monotonic: Duration,
    settled_at: Option<Duration>,
}

impl Steps {
    /// Believes what `clock` shows now.
    #[must_use]
    pub(in crate::rotation) fn new(clock: SharedClock) -> Self {
        let seen = Seen { wall: clock.now(), monotonic: clock.monotonic(), settled_at: None };
        Self { clock, seen: Mutex::new(seen) }
    }

    /// How long no new run begins because the clock was set; `None` where it was not, or long enough ago. Logs a step
    /// once.
    #[must_use]
    pub(in crate::rotation) fn held(&self) -> Option<Duration> {
        // Both clocks are read under the lock, so that two looks can't swap their readings.
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let (wall, monotonic) = self.read();
        let expected = seen.wall.saturating_add(monotonic.saturating_sub(seen.monotonic));
        let off_by = wall.duration_since(expected.unwrap_or(Timestamp::MAX));
        (seen.wall, seen.monotonic) = (wall, monotonic);
        if off_by.unsigned_abs() > SLACK {
            seen.settled_at = Some(monotonic + SETTLES_WITHIN);
            let (step, wait) = (off_by.as_secs(), SETTLES_WITHIN.as_secs());
            tracing::warn!(
                step,
                wait,
                "the clock was set (seconds); no rotation begins until it has gone on evenly"
            );
        }
        let left = seen.settled_at?.checked_sub(monotonic).filter(|left| !left.is_zero());
        if left.is_none() {
            seen.settled_at = None;
            tracing::info!("the clock is believed again; rotations begin as they are due");
        }
        left
    }

    /// What both clocks show at one moment: read again where the process was held up in between.
    fn read(&self) -> (Timestamp, Duration) {
        loop {
            let before = self.clock.monotonic();
            let wall = self.clock.now();
            let monotonic = self.clock.monotonic();
            if monotonic.saturating_sub(before) < SLACK / 2 {
                return (wall, monotonic);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    const DAY: Duration = Duration::from_secs(86_400);

    fn at_noon() -> (std::sync::Arc<ManualClock>, Steps) {
        let clock = ManualClock::new("2026-01-01T12:00:00Z".parse().unwrap());
        let steps = Steps::new(clock.clone());
        (clock, steps)
    }

    #[test]
    fn time_that_passes_is_no_step() {
        let (clock, steps) = at_noon();
        for passed in [Duration::ZERO, Duration::from_millis(1), SLACK, DAY, 365 * DAY] {
            clock.advance(passed);
            assert_eq!(steps.held(), None, "{passed:?}");
        }
    }

    #[test]
    fn r31_a_step_either_way_holds_until_the_clock_has_gone_on_evenly() {
        for to in ["2027-01-01T12:00:00Z", "2025-01-01T12:00:00Z", "2026-01-01T12:02:00Z"] {
            let (clock, steps) = at_noon();
            clock.set_wall(to.parse().unwrap());
            assert_eq!(steps.held(), Some(SETTLES_WITHIN), "{to}");
            clock.advance(SETTLES_WITHIN / 2);
            assert_eq!(steps.held(), Some(SETTLES_WITHIN / 2));
            // Set right again: from here on it has to go on evenly anew.
            clock.set_wall("2026-01-01T12:30:00Z".parse().unwrap());
            assert_eq!(steps.held(), Some(SETTLES_WITHIN));
            clock.advance(SETTLES_WITHIN);
            assert_eq!(steps.held(), None);
            assert_eq!(steps.held(), None);
        }
    }

    #[test]
    fn a_clock_that_is_drawn_even_slowly_is_not_set() {
        let (clock, steps) = at_noon();
        for _ in 0..1_000 {
            clock.advance(DAY / 24);
            clock.set_wall(crate::clock::Clock::now(&*clock).saturating_add(Duration::from_secs(2)).unwrap());
            assert_eq!(steps.held(), None);
        }
    }
}
