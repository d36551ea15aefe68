//! Says once, each, that a certificate has 30, 7 and 1 days left, and that it has none.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};

const DAYS: [i64; 3] = [30, 7, 1];

/// How many lines each certificate has crossed, by its name and its end: a renewed one begins anew.
#[derive(Debug, Default)]
pub(super) struct Notices {
    crossed: BTreeMap<&'static str, (Timestamp, usize)>,
}

impl Notices {
    /// Warns of those that have crossed a line since the last time.
    pub(super) fn say(&mut self, expiries: &[(&'static str, Timestamp)], now: Timestamp) {
        for &(certificate, not_after) in expiries {
            if self.notice(certificate, not_after, now) {
                let days_left = not_after.duration_since(now).as_hours() / 24;
                tracing::warn!(certificate, %not_after, days_left, "a certificate is to be renewed");
            }
        }
    }

    fn notice(&mut self, name: &'static str, not_after: Timestamp, now: Timestamp) -> bool {
        let crossed = crossed(not_after.duration_since(now));
        let before = self.crossed.insert(name, (not_after, crossed));
        crossed > before.filter(|(end, _)| *end == not_after).map_or(0, |(_, crossed)| crossed)
    }
}

fn crossed(left: SignedDuration) -> usize {
    let lines = DAYS.iter().filter(|days| left <= SignedDuration::from_hours(**days * 24));
    lines.count() + usize::from(left.is_negative())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b24_each_line_is_said_once_and_a_renewal_begins_anew() {
        let end: Timestamp = "2026-03-01T00:00:00Z".parse().unwrap();
        let at = |days: i64| end - SignedDuration::from_hours(24 * days);
        let mut notices = Notices::default();
        let said: Vec<_> = [60, 31, 30, 29, 8, 7, 6, 2, 1, 0, -1, -2]
            .into_iter()
            .filter(|days| notices.notice("server", end, at(*days)))
            .collect();
        assert_eq!(said, [30, 7, 1, -1]);
        let renewed = end + SignedDuration::from_hours(24 * 20);
        assert!(notices.notice("server", renewed, at(0)), "20 days are left of the renewed one");
        assert!(!notices.notice("server", renewed, at(0)));
        assert!(notices.notice("client_ca", end, at(5)), "each certificate has lines of its own");
    }
}
