//! What the log counts, and when a filling disk is worth a word.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::telemetry::metrics::{Latency, LatencySnapshot};

/// How often the disk is looked at.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Below so many thousandths of free room the disk is low: it is 80 % full.
const LOW: u32 = 200;
/// Below so many it is critical: it is 90 % full.
const CRITICAL: u32 = 100;

/// What a log did since it was opened, and how it is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Figures {
    /// How many of the callers' records were acknowledged.
    pub records: u64,
    /// How many of the callers' records were refused: the disk failed or hung, the queue was full, the log was closed.
    pub failed: u64,
    /// How many of the callers' records wait for the disk now.
    pub backlog: u64,
    /// How long the acknowledged groups of records took, from the submission to the answer.
    pub latency: LatencySnapshot,
    /// How large the segment is that is written to, in bytes.
    pub segment_bytes: u64,
    /// How much of the disk is free, in thousandths of what this process may use, as of at most 10 s ago; `None` where
    /// the kernel does not say.
    pub disk_free_permille: Option<u32>,
}

/// What is counted where it happens, without a lock.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) records: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) latency: Latency,
    pub(super) segment_bytes: AtomicU64,
    /// [`Figures::disk_free_permille`]; more than 1,000 where it is not known.
    disk_free: AtomicU64,
}

impl Counters {
    pub(super) fn keep_disk_free(&self, permille: Option<u32>) {
        self.disk_free.store(permille.map_or(u64::MAX, u64::from), Relaxed);
    }

    pub(super) fn figures(&self, backlog: u64) -> Figures {
        let disk_free = u32::try_from(self.disk_free.load(Relaxed)).ok();
        Figures {
            records: self.records.load(Relaxed),
            failed: self.failed.load(Relaxed),
            backlog,
            latency: self.latency.snapshot(),
            segment_bytes: self.segment_bytes.load(Relaxed),
            disk_free_permille: disk_free,
        }
    }
}

/// How much room the disk has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Room {
    Ample,
    /// 80 % are used.
    Low,
    /// 90 % are used.
    Critical,
}

impl Room {
    /// A disk whose room is not known gives no alarm.
    pub(super) const fn of(free_permille: Option<u32>) -> Self {
        match free_permille {
            Some(free) if free <= CRITICAL => Self::Critical,
            Some(free) if free <= LOW => Self::Low,
            _ => Self::Ample,
        }
    }

    /// Says once that there is less room than at the look before.
    pub(super) fn warn_after(self, before: Self, segment: &str) {
        if self <= before {
            return;
        }
        match self {
            Self::Ample => {}
            Self::Low => tracing::warn!(
                segment,
                "audit log: its disk is 80 % full; free space, when it is full nothing is served"
            ),
            Self::Critical => tracing::error!(
                segment,
                "audit log: its disk is 90 % full; free space, when it is full nothing is served"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::{Arc, Mutex};

    #[test]
    fn b16_a_filling_disk_is_low_at_80_and_critical_at_90_percent() {
        for (free, room) in [
            (Some(1_000), Room::Ample),
            (Some(201), Room::Ample),
            (Some(200), Room::Low),
            (Some(101), Room::Low),
            (Some(100), Room::Critical),
            (Some(0), Room::Critical),
            (None, Room::Ample),
        ] {
            assert_eq!(Room::of(free), room, "{free:?}");
        }
        assert!(Room::Ample < Room::Low && Room::Low < Room::Critical);
    }

    #[derive(Clone, Default)]
    struct Said(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Said {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn b16_each_crossing_is_said_once() {
        let said = Said::default();
        let writer = said.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        let rooms = [Room::Ample, Room::Ample, Room::Low, Room::Low, Room::Critical, Room::Critical];
        let again = [Room::Low, Room::Critical, Room::Ample, Room::Critical];
        tracing::subscriber::with_default(subscriber, || {
            rooms.into_iter().chain(again).fold(Room::Ample, |before, room| {
                room.warn_after(before, "1.jsonl");
                room
            });
        });
        let said = String::from_utf8(said.0.lock().unwrap().clone()).unwrap();
        let levels: Vec<_> =
            said.lines().map(|line| if line.contains("WARN") { "80 %" } else { "90 %" }).collect();
        assert_eq!(levels, ["80 %", "90 %", "90 %", "90 %"], "{said}");
        assert!(said.lines().zip(levels).all(|(line, level)| line.contains(level)), "{said}");
    }

    #[test]
    fn what_is_not_known_of_the_disk_is_not_said() {
        let counters = Counters::default();
        counters.keep_disk_free(Some(7));
        assert_eq!(counters.figures(3).disk_free_permille, Some(7));
        assert_eq!(counters.figures(3).backlog, 3);
        counters.keep_disk_free(None);
        assert_eq!(counters.figures(0).disk_free_permille, None);
    }
}
