//! When a secret is next due.
//!
//! ```text
//! every 30d                          so long after the last one
//! cron 0 3 * * 1                     Mondays at 03:00, UTC
//! cron 0 3 * * 1 Europe/Zurich       Mondays at 03:00, as the clocks there show it
//! database · api-key · signing-key   every 30, 90, 182 days, as practice does it
//! ```
//!
//! A cron's times are those of a wall clock. One that a change of the clocks leaves out is made up for as much later as
//! the clocks went forward; one that they show twice counts the first time. So every planned time is met once.
//!
//! What is planned is kept in the record and looked at anew each time: [`verdict`] is a pure function of the record and
//! the time, so that it makes no difference how often, or after how long, anybody looks.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::Timestamp;
use jiff::civil::{self, DateTime};
use jiff::tz::{self, TimeZone};
use ring::digest;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::record::Rotation;
use super::{Failure, Trouble};
use crate::clock::parse_duration;
use crate::secret::SecretId;

/// The presets, and how many days lie between two rotations.
pub const PRESETS: [(&str, u32); 3] = [("database", 30), ("api-key", 90), ("signing-key", 182)];

const DAY: Duration = Duration::from_secs(86_400);
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(3_660 * 86_400);
/// The longest text of a schedule, in bytes.
const MAX_TEXT: usize = 256;
/// Being late by less than this is punctual.
const LATE: Duration = Duration::from_secs(60);
/// Over how long what is overdue is spread at most.
const WINDOW: Duration = Duration::from_secs(15 * 60);
/// Where crons are tried out: what they say of it does not change with the day on which one asks.
const TRIAL: DateTime = civil::datetime(2024, 1, 1, 0, 0, 0, 0);

/// When a secret is rotated. Shows as the text that it was read from, with single spaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    text: Arc<str>,
    when: When,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum When {
    Every(Duration),
    Cron { pattern: Arc<Cron>, zone: Option<Arc<str>> },
}

impl Schedule {
    /// Reads a schedule: `every` and a duration of a second to ten years, `cron` and five fields with perhaps a time
    /// zone, or a [preset](PRESETS).
    ///
    /// # Errors
    /// A line that says what is wrong and the mend; also where a cron never fires, or its zone is not known here.
    pub fn parse(text: &str) -> Result<Self, String> {
        let schedule = Self::shaped(text)?;
        if let When::Cron { pattern, zone } = &schedule.when {
            zone_of(zone.as_deref())?;
            if pattern.find_next_occurrence(&TRIAL, true).is_err() {
                return Err(format!("`{schedule}` never fires: there is no such day; correct it"));
            }
        }
        Ok(schedule)
    }

    /// The first planned time after `after`. For `every`, as if a rotation had ended then.
    ///
    /// # Errors
    /// [`Trouble::ValueUnfit`] where the time zone is not known on this machine any more, or no such day comes.
    pub fn next_after(&self, after: Timestamp) -> Result<Timestamp, Failure> {
        match &self.when {
            When::Every(interval) => Ok(later(after, *interval)),
            When::Cron { pattern, zone } => {
                let unfit = |problem: String| {
                    Failure::new(Trouble::ValueUnfit, format!("schedule `{self}`: {problem}"))
                };
                let zone = zone_of(zone.as_deref()).map_err(unfit)?;
                next_fire(pattern, &zone, after).ok_or_else(|| unfit("no such time comes".to_owned()))
            }
        }
    }

    /// How long it typically is from one rotation to the next.
    #[must_use]
    pub fn interval(&self) -> Duration {
        match &self.when {
            When::Every(interval) => *interval,
            When::Cron { pattern, .. } => average(pattern).unwrap_or(DAY),
        }
    }

    /// Reads the shape alone. What depends on the machine, or takes a search, was looked at when it was first set.
    fn shaped(text: &str) -> Result<Self, String> {
        if text.len() > MAX_TEXT {
            return Err(format!("is {} bytes long; at most {MAX_TEXT} are read", text.len()));
        }
        if let Some(c) = text.chars().find(|c| !matches!(c, ' '..='~')) {
            return Err(format!("has the character `{}`; write printable ASCII", c.escape_default()));
        }
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let when = match words.as_slice() {
            [] => return Err("is empty; write for example `every 30d`".to_owned()),
            ["every", length @ ..] => every(&length.join(" "))?,
            ["cron", rest @ ..] => cron(rest)?,
            [word] => When::Every(DAY * preset(word).ok_or_else(|| unknown(word))?),
            [word, ..] if preset(word).is_some() => {
                return Err(format!("`{word}` stands alone; remove what follows it"));
            }
            [word, ..] => return Err(unknown(word)),
        };
        Ok(Self { text: words.join(" ").into(), when })
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Schedule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Schedule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <Cow<'de, str>>::deserialize(deserializer)?;
        Self::shaped(&text).map_err(serde::de::Error::custom)
    }
}

/// When the next run is due after one that ended, or a rotation that was set, at `at`: as planned, but at least `gap`
/// later. A cron's time that is too close is left out, so that the next one is a planned one too.
///
/// Where a schedule can't say (see [`Schedule::next_after`]), it is its usual interval.
#[must_use]
pub fn next_at(schedule: &Schedule, at: Timestamp, gap: Duration) -> Timestamp {
    match &schedule.when {
        When::Every(interval) => later(at, gap.max(*interval)),
        When::Cron { .. } => {
            // Not before the end of the gap, but at that very moment it may be.
            let before = gap.saturating_sub(Duration::from_nanos(1));
            let usual = || later(at, gap.max(schedule.interval()));
            schedule.next_after(later(at, before)).unwrap_or_else(|_| usual())
        }
    }
}

/// What a record's planned time comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is time.
    Due,
    /// It is not, until then.
    NotYet(Timestamp),
    /// It has been time for a while. Where nobody was there to see, the planned time is to become this one, once, so that
    /// not all that is overdue begins at once.
    Spread(Timestamp),
    /// The planned time is further ahead than any that could be planned now: the clock was set back, or the schedule
    /// changed. It is to become this one.
    Rebase(Timestamp),
}

/// What is to be made of a rotation without a run. `gap` is the least that lies between two rotations of it.
///
/// - Never [`Due`](Verdict::Due) within `gap` of the last rotation, by the clock's own account. One that lies in the
///   future was made before the clock was set back, and says nothing: the planned time, once rebased, does.
/// - A planned time never counts twice, and those that went by while nobody looked count as one: what is planned next is
///   planned from the end of the run.
#[must_use]
pub fn verdict(id: &SecretId, rotation: &Rotation, gap: Duration, now: Timestamp) -> Verdict {
    let schedule = &rotation.definition.schedule;
    let planned = rotation.next_at;
    let anew = next_at(schedule, now, gap);
    // What was planned before now is planned no later than what would be planned now, save for what it was spread by.
    if planned > later(anew, WINDOW + LATE) {
        return Verdict::Rebase(anew);
    }
    let rotated_at = rotation.rotated_at.filter(|at| *at <= later(now, LATE));
    let earliest = rotated_at.map_or(planned, |at| planned.max(later(at, gap)));
    if earliest > now {
        Verdict::NotYet(earliest)
    } else if later(earliest, LATE) < now {
        Verdict::Spread(later(now, offset(id, schedule.interval())))
    } else {
        Verdict::Due
    }
}

/// The place of a secret among all that are overdue: always the same one, within a tenth of the interval and at most
/// [`WINDOW`].
fn offset(id: &SecretId, interval: Duration) -> Duration {
    let hash = digest::digest(&digest::SHA256, id.to_string().as_bytes());
    let hash: &[u8] = hash.as_ref();
    let share = hash.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
    (interval / 10).min(WINDOW).mul_f64(f64::from(share) / f64::from(u32::MAX))
}

/// What a cron's fields may hold: name, what to write, the signs beside digits and `*,-/`, the words.
struct Field {
    name: &'static str,
    hint: &'static str,
    signs: &'static str,
    words: &'static [&'static str],
}

const FIELDS: [Field; 5] = [
    Field { name: "minute", hint: "0 to 59", signs: "", words: &[] },
    Field { name: "hour", hint: "0 to 23", signs: "", words: &[] },
    Field {
        name: "day of the month",
        hint: "1 to 31, L for the last, 15W for the weekday closest to the 15th",
        signs: "?",
        words: &["L", "W", "LW"],
    },
    Field {
        name: "month",
        hint: "1 to 12 or JAN to DEC",
        signs: "",
        words: &["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"],
    },
    Field {
        name: "day of the week",
        hint: "0 to 7 or SUN to SAT, 5L for the last Friday, 1#2 for the second Monday",
        signs: "?#+",
        words: &["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT", "L"],
    },
];

impl Field {
    /// Whether it has only what it may have. Stricter than the parser, which would take a weekday for a minute, and
    /// would look for a minute that is in an empty list until the year 5000.
    fn permits(&self, text: &str) -> bool {
        let sign = |c: char| c.is_ascii_alphanumeric() || "*,-/".contains(c) || self.signs.contains(c);
        let known = |word: &str| self.words.iter().any(|known| known.eq_ignore_ascii_case(word));
        let mut words = text.split(|c: char| !c.is_ascii_alphabetic()).filter(|word| !word.is_empty());
        text.chars().all(sign) && text.split(',').all(|item| !item.is_empty()) && words.all(known)
    }
}

fn every(length: &str) -> Result<When, String> {
    let interval = parse_duration(length).map_err(|error| error.to_string())?;
    if !(SHORTEST..=LONGEST).contains(&interval) {
        return Err(format!("`every {length}` is not within a second and ten years; correct it"));
    }
    Ok(When::Every(interval))
}

fn cron(words: &[&str]) -> Result<When, String> {
    const SHAPE: &str = "write `cron` with minute, hour, day of the month, month and day of the week, and a time zone \
                         where it is not UTC: `cron 0 3 * * 1 Europe/Zurich`";
    let Some((fields, zone)) = words.split_first_chunk::<5>() else {
        return Err(format!("a cron has five fields, here are {}; {SHAPE}", words.len()));
    };
    let zone = match zone {
        [] => None,
        [zone] if zone.starts_with(|c: char| c.is_ascii_alphabetic()) => Some(Arc::from(*zone)),
        _ => return Err(format!("a cron has five fields and no seconds, here are {}; {SHAPE}", words.len())),
    };
    if let Some((field, text)) = FIELDS.iter().zip(fields).find(|(field, text)| !field.permits(text)) {
        return Err(wrong(field, text));
    }
    let pattern = parser().parse(&fields.join(" ")).map_err(|_| at_fault(fields))?;
    Ok(When::Cron { pattern: Arc::new(pattern), zone })
}

fn parser() -> CronParser {
    CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build()
}

/// Which field the parser does not take: the first that it does not take among stars either.
fn at_fault(fields: &[&str; 5]) -> String {
    let alone = |at: usize| {
        let shown = fields.iter().enumerate().map(|(n, field)| if n == at { *field } else { "*" });
        shown.collect::<Vec<_>>().join(" ")
    };
    let mut places = FIELDS.iter().zip(fields).enumerate();
    let found = places.find(|(at, _)| parser().parse(&alone(*at)).is_err());
    found.map_or_else(
        || format!("`{}` is no cron; correct it", fields.join(" ")),
        |(_, (field, text))| wrong(field, text),
    )
}

fn wrong(field: &Field, text: &str) -> String {
    format!(
        "`{text}` can't be a cron's {}; write {}, `*`, a list, a range, or a step as in */2",
        field.name, field.hint
    )
}

fn preset(word: &str) -> Option<u32> {
    PRESETS.into_iter().find(|(name, _)| *name == word).map(|(_, days)| days)
}

fn unknown(word: &str) -> String {
    let known = PRESETS.map(|(name, _)| name).into_iter().chain(["every", "cron"]);
    let near = known.map(|known| (strsim::damerau_levenshtein(known, word), known)).min();
    match near.filter(|(distance, _)| *distance <= 2) {
        Some((_, near)) => format!("`{word}` is no schedule; did you mean `{near}`?"),
        None => format!(
            "`{word}` is no schedule; write `every 30d`, `cron 0 3 * * 1`, `database`, `api-key` or `signing-key`"
        ),
    }
}

/// # Errors
/// What is wrong with the name, or this machine.
fn zone_of(name: Option<&str>) -> Result<TimeZone, String> {
    let Some(name) = name else { return Ok(TimeZone::UTC) };
    let zones = tz::db();
    if let Ok(zone) = zones.get(name) {
        return Ok(zone);
    }
    if zones.is_definitively_empty() {
        return Err(format!(
            "time zone `{name}`: this machine has no time zones; install tzdata, or use UTC"
        ));
    }
    let distance = |zone: &str| strsim::damerau_levenshtein(&zone.to_lowercase(), &name.to_lowercase());
    let near = zones.available().map(|zone| (distance(zone.as_str()), zone.as_str().to_owned())).min();
    let hint = match near.filter(|(distance, _)| *distance <= 3) {
        Some((_, near)) => format!("did you mean `{near}`?"),
        None => "write one of the IANA database, for example `Europe/Zurich`".to_owned(),
    };
    Err(format!("time zone `{name}` is not known; {hint}"))
}

/// The first of a cron's times after `after`. One that the clocks leave out is as much later as they went forward; one
/// that they show twice is the first of the two, so that behind it in the second hour there is nothing until that is over.
fn next_fire(pattern: &Cron, zone: &TimeZone, after: Timestamp) -> Option<Timestamp> {
    /// No clock goes back by more than a day, which has so many minutes.
    const MOST_REPEATED: usize = 1_441;
    let mut local = zone.to_datetime(after);
    for _ in 0..MOST_REPEATED {
        local = pattern.find_next_occurrence(&local, false).ok()?;
        let at = zone.to_timestamp(local).ok()?;
        if at > after {
            return Some(at);
        }
    }
    None
}

/// Of the first few times.
fn average(pattern: &Cron) -> Option<Duration> {
    const FEW: u32 = 8;
    let first: DateTime = pattern.find_next_occurrence(&TRIAL, true).ok()?;
    let mut last = first;
    for _ in 0..FEW {
        last = pattern.find_next_occurrence(&last, false).ok()?;
    }
    Some(last.duration_since(first).unsigned_abs() / FEW)
}

/// `at` and so much more; the end of time where that is beyond it.
pub(super) fn later(at: Timestamp, by: Duration) -> Timestamp {
    at.saturating_add(by).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rotation::definition::Definition;

    const YEAR: i64 = 365 * 86_400;
    const HOUR: Duration = Duration::from_secs(3_600);

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn schedule(text: &str) -> Schedule {
        Schedule::parse(text).unwrap()
    }

    fn secret(n: usize) -> SecretId {
        SecretId::parse("production", &format!("secret-{n:04}")).unwrap()
    }

    fn rotation(schedule: Schedule, next_at: Timestamp) -> Rotation {
        let definition = Definition {
            rotator: "random".to_owned(),
            schedule,
            grace: Duration::from_secs(300),
            group: None,
            retire_after: None,
            repair: false,
            settings: serde_json::Map::new(),
        };
        Rotation::new(definition, next_at)
    }

    /// The times after `after`, one after the other.
    fn times(text: &str, after: &str, count: usize) -> Vec<String> {
        let schedule = schedule(text);
        let next = |at: &Timestamp| Some(schedule.next_after(*at).unwrap());
        std::iter::successors(Some(at(after)), next).skip(1).take(count).map(|at| at.to_string()).collect()
    }

    #[test]
    fn schedules_are_read_and_shown_as_they_were_written() {
        for (text, shown, interval) in [
            ("every 30d", "every 30d", 30 * DAY),
            ("  every   1h 30m ", "every 1h 30m", HOUR * 3 / 2),
            ("every 1s", "every 1s", SHORTEST),
            ("database", "database", 30 * DAY),
            ("api-key", "api-key", 90 * DAY),
            ("signing-key", "signing-key", 182 * DAY),
            ("cron 0 3 * * 1", "cron 0 3 * * 1", 7 * DAY),
            ("cron 0 3 * * mon Europe/Zurich", "cron 0 3 * * mon Europe/Zurich", 7 * DAY),
            ("cron */15 9-17 * * MON-FRI", "cron */15 9-17 * * MON-FRI", Duration::from_secs(900)),
            ("cron 0 0 L * *", "cron 0 0 L * *", DAY * 30),
            ("cron 0 0 ? JAN 1#2 UTC", "cron 0 0 ? JAN 1#2 UTC", DAY * 364),
        ] {
            let schedule = schedule(text);
            assert_eq!(schedule.to_string(), shown);
            let off = schedule.interval().abs_diff(interval);
            assert!(off <= interval / 30, "{text}: {:?}", schedule.interval());
            let json = serde_json::to_string(&schedule).unwrap();
            assert_eq!(json, format!("\"{shown}\""));
            assert_eq!(serde_json::from_str::<Schedule>(&json).unwrap(), schedule);
        }
    }

    #[test]
    fn what_is_no_schedule_is_refused_with_the_mend() {
        let long = format!("every {}", "1".repeat(300));
        for (bad, says) in [
            ("", "every 30d"),
            ("   ", "every 30d"),
            ("30d", "every 30d"),
            ("evry 30d", "did you mean `every`?"),
            ("databse", "did you mean `database`?"),
            ("database 30d", "stands alone"),
            ("every", "duration"),
            ("every 5", "no unit"),
            ("every 0s", "within a second and ten years"),
            ("every 10ms", "within a second and ten years"),
            ("every 4000d", "within a second and ten years"),
            ("every -1s", "negative"),
            ("every 1mo", "months or years"),
            ("every fortnight", "duration `fortnight`"),
            ("every\u{9}30d", "printable ASCII"),
            ("évery 30d", "printable ASCII"),
            (long.as_str(), "at most 256"),
            ("cron", "five fields"),
            ("cron @daily", "five fields"),
            ("cron * * * *", "five fields, here are 4"),
            ("cron 0 0 3 * * 1", "no seconds"),
            ("cron 0 0 3 * * 1 Europe/Zurich", "no seconds"),
            ("cron 60 * * * *", "minute; write 0 to 59"),
            ("cron * 24 * * *", "hour; write 0 to 23"),
            ("cron * * 0 * *", "day of the month"),
            ("cron * * 32 * *", "day of the month"),
            ("cron * * * 13 *", "month; write 1 to 12"),
            ("cron * * * MON *", "month; write 1 to 12"),
            ("cron * * * * 8", "day of the week"),
            ("cron MON * * * *", "minute"),
            ("cron , * * * *", "minute"),
            ("cron 1,,2 * * * *", "minute"),
            ("cron */0 * * * *", "minute"),
            ("cron 0 5-1 * * *", "hour"),
            ("cron 0 0 30 2 *", "never fires"),
            ("cron 0 0 31 4,6,9,11 *", "never fires"),
            ("cron 0 3 * * 1 Europe/Zurrich", "did you mean `Europe/Zurich`?"),
            ("cron 0 3 * * 1 Mars/Olympus_Mons", "IANA"),
            ("cron 0 3 * * 1 Europe/Zurich now", "no seconds"),
        ] {
            let error = Schedule::parse(bad).unwrap_err();
            assert!(error.contains(says), "{bad:?}: {error}");
            assert!(!error.contains('\n') && error.len() < 400, "{bad:?}: {error}");
        }
    }

    #[test]
    fn r31_a_time_that_does_not_exist_or_exists_twice_is_met_once() {
        // Clocks in Zurich go from 02:00 to 03:00 on 29 March 2026, and from 03:00 back to 02:00 on 25 October.
        let daily = "cron 30 2 * * * Europe/Zurich";
        assert_eq!(
            times(daily, "2026-03-27T12:00:00Z", 3),
            ["2026-03-28T01:30:00Z", "2026-03-29T01:30:00Z", "2026-03-30T00:30:00Z"]
        );
        let in_october = ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"];
        assert_eq!(times(daily, "2026-10-24T12:00:00Z", 2), in_october);
        for after in ["2026-10-25T00:45:00Z", "2026-10-25T01:10:00Z", "2026-10-25T01:30:00Z"] {
            assert_eq!(times(daily, after, 1), [in_october[1]], "{after}");
        }
        // Also where there is more than one a day, which is no interval.
        let twice = "cron 30 2,14 * * * Europe/Zurich";
        assert_eq!(
            times(twice, "2026-03-28T22:00:00Z", 3),
            ["2026-03-29T01:30:00Z", "2026-03-29T12:30:00Z", "2026-03-30T00:30:00Z"]
        );
        assert_eq!(times(twice, "2026-10-24T22:00:00Z", 2), ["2026-10-25T00:30:00Z", "2026-10-25T13:30:00Z"]);
        let hourly = times("cron 30 * * * * Europe/Zurich", "2026-03-29T00:00:00Z", 3);
        assert_eq!(hourly, ["2026-03-29T00:30:00Z", "2026-03-29T01:30:00Z", "2026-03-29T02:30:00Z"]);
        // Without a zone there is nothing to change.
        assert_eq!(times("cron 30 2 * * *", "2026-03-29T00:00:00Z", 1), ["2026-03-29T02:30:00Z"]);
    }

    #[test]
    fn the_next_time_keeps_the_gap_and_a_cron_its_window() {
        let noon = at("2026-01-07T12:00:00Z");
        assert_eq!(next_at(&schedule("every 1d"), noon, HOUR), later(noon, DAY));
        assert_eq!(next_at(&schedule("every 1h"), noon, DAY), later(noon, DAY));
        let nightly = schedule("cron 0 3 * * *");
        assert_eq!(next_at(&nightly, noon, HOUR), at("2026-01-08T03:00:00Z"));
        assert_eq!(next_at(&nightly, noon, DAY), at("2026-01-09T03:00:00Z"));
        // Just at the end of the gap is not too close.
        assert_eq!(next_at(&nightly, at("2026-01-07T03:00:00Z"), DAY), at("2026-01-08T03:00:00Z"));
        assert_eq!(next_at(&nightly, at("2026-01-07T03:00:00Z"), Duration::ZERO), at("2026-01-08T03:00:00Z"));
    }

    #[test]
    fn a_zone_that_is_gone_is_told_and_the_interval_stands_in() {
        let stored: Schedule = serde_json::from_str("\"cron 0 3 * * 1 Mars/Olympus_Mons\"").unwrap();
        let noon = at("2026-01-07T12:00:00Z");
        let failure = stored.next_after(noon).unwrap_err();
        assert_eq!(failure.trouble, Trouble::ValueUnfit);
        assert!(failure.message.contains("Mars/Olympus_Mons"), "{failure}");
        assert_eq!(next_at(&stored, noon, HOUR), later(noon, 7 * DAY));
    }

    #[test]
    fn a_verdict_for_each_time() {
        let (id, now) = (secret(1), at("2026-06-01T00:00:00Z"));
        let planned = |text: &str| rotation(schedule("every 30d"), at(text));
        let of = |rotation: &Rotation| verdict(&id, rotation, HOUR, now);
        assert_eq!(of(&planned("2026-06-01T00:00:00Z")), Verdict::Due);
        assert_eq!(of(&planned("2026-05-31T23:59:00Z")), Verdict::Due);
        assert!(matches!(of(&planned("2026-05-31T23:58:00Z")), Verdict::Spread(at) if at >= now));
        let tomorrow = at("2026-06-02T00:00:00Z");
        assert_eq!(of(&planned("2026-06-02T00:00:00Z")), Verdict::NotYet(tomorrow));
        assert_eq!(of(&planned("2026-08-01T00:00:00Z")), Verdict::Rebase(later(now, 30 * DAY)));
        // Rotated a moment ago by hand: the plan has to wait.
        let mut fresh = planned("2026-06-01T00:00:00Z");
        fresh.rotated_at = Some(at("2026-05-31T23:30:00Z"));
        assert_eq!(of(&fresh), Verdict::NotYet(at("2026-06-01T00:30:00Z")));
        // The clock was set back behind the last rotation: it is planned anew, and then due as planned.
        let mut ahead = planned("2027-07-01T00:00:00Z");
        ahead.rotated_at = Some(at("2027-06-01T00:00:00Z"));
        assert_eq!(of(&ahead), Verdict::Rebase(later(now, 30 * DAY)));
        ahead.next_at = now;
        assert_eq!(of(&ahead), Verdict::Due);
    }

    #[test]
    fn r32_a_thousand_overdue_secrets_are_spread_and_not_bunched() {
        let now = at("2026-06-01T00:00:00Z");
        let overdue = rotation(schedule("every 30d"), at("2026-03-03T00:00:00Z"));
        let mut minutes = [0_usize; 15];
        for n in 0..1_000 {
            let Verdict::Spread(slot) = verdict(&secret(n), &overdue, HOUR, now) else { panic!("{n}") };
            assert_eq!(verdict(&secret(n), &overdue, HOUR, now), Verdict::Spread(slot), "always the same");
            let wait = Duration::try_from(slot.duration_since(now)).unwrap();
            minutes[usize::try_from(wait.as_secs() / 60).unwrap().min(14)] += 1;
            // As it is planned now, it is due once.
            let mut spread = overdue.clone();
            spread.next_at = slot;
            assert_eq!(verdict(&secret(n), &spread, HOUR, slot), Verdict::Due);
        }
        assert!(minutes.iter().all(|count| (40..=100).contains(count)), "{minutes:?}");
    }

    #[test]
    fn r32_what_is_often_due_is_not_spread_far() {
        let now = at("2026-06-01T00:00:00Z");
        let often = rotation(schedule("every 10m"), at("2026-03-03T00:00:00Z"));
        for n in 0..100 {
            let Verdict::Spread(slot) = verdict(&secret(n), &often, Duration::ZERO, now) else {
                panic!("{n}")
            };
            assert!(slot <= later(now, Duration::from_secs(60)), "{slot}");
        }
    }

    /// What happens to a broker and its clock.
    #[derive(Debug, Clone)]
    enum Happens {
        Waits(Duration),
        /// Suspended, or stopped and started again: time passes and nobody looks.
        IsAway(Duration),
        ClockIsSet(i64),
    }

    fn happens() -> impl Strategy<Value = Happens> {
        let minutes = |most: u64| (1..most).prop_map(|minutes| Duration::from_secs(60 * minutes));
        prop_oneof![
            4 => minutes(100_000).prop_map(Happens::Waits),
            2 => minutes(600_000).prop_map(Happens::IsAway),
            2 => prop_oneof![Just(YEAR), Just(-YEAR), -100_000_i64..100_000].prop_map(Happens::ClockIsSet),
        ]
    }

    /// A broker that does what the verdict says.
    struct World {
        id: SecretId,
        rotation: Rotation,
        gap: Duration,
        wall: Timestamp,
        monotonic: Duration,
        /// Since when somebody looks.
        since: Timestamp,
        ran_at: Duration,
        runs: usize,
        set_forward: bool,
    }

    impl World {
        fn new(schedule: Schedule, gap: Duration) -> Self {
            let wall = at("2026-01-01T00:00:00Z");
            let rotation = rotation(schedule.clone(), next_at(&schedule, wall, gap));
            let (monotonic, ran_at) = (Duration::ZERO, Duration::ZERO);
            let (id, since) = (secret(7), wall);
            Self { id, rotation, gap, wall, monotonic, since, ran_at, runs: 0, set_forward: false }
        }

        fn happens(&mut self, what: &Happens) {
            match *what {
                Happens::Waits(passed) => self.wait(passed),
                Happens::IsAway(passed) => {
                    self.pass(passed);
                    self.since = self.wall;
                }
                Happens::ClockIsSet(by) => {
                    self.wall = self.wall.checked_add(jiff::SignedDuration::from_secs(by)).unwrap();
                    self.since = self.wall;
                    self.set_forward |= by > 0;
                }
            }
            self.look();
        }

        fn pass(&mut self, passed: Duration) {
            self.wall = later(self.wall, passed);
            self.monotonic += passed;
        }

        fn wait(&mut self, mut left: Duration) {
            loop {
                let until = Duration::try_from(self.look().duration_since(self.wall)).unwrap();
                if until > left {
                    return self.pass(left);
                }
                self.pass(until);
                left -= until;
            }
        }

        /// Does what is to be done; until when there is nothing more.
        fn look(&mut self) -> Timestamp {
            for _ in 0..8 {
                match verdict(&self.id, &self.rotation, self.gap, self.wall) {
                    Verdict::NotYet(until) => {
                        assert!(until > self.wall);
                        return until;
                    }
                    Verdict::Spread(slot) if self.rotation.next_at < self.since => {
                        assert!((self.wall..=later(self.wall, WINDOW)).contains(&slot));
                        self.rotation.next_at = slot;
                        // Once: what is due later is only waiting for its turn.
                        assert!(self.rotation.next_at >= self.since);
                    }
                    Verdict::Due | Verdict::Spread(_) => self.run(),
                    Verdict::Rebase(next_at) => {
                        assert!(next_at > self.wall);
                        self.rotation.next_at = next_at;
                    }
                }
            }
            panic!("it does not come to rest");
        }

        fn run(&mut self) {
            let schedule = self.rotation.definition.schedule.clone();
            if let Some(rotated_at) = self.rotation.rotated_at.filter(|at| *at <= self.wall) {
                let since = Duration::try_from(self.wall.duration_since(rotated_at)).unwrap();
                assert!(since >= self.gap, "{since:?} after the last one, by the clock's own account");
            }
            if !self.set_forward {
                let since = self.monotonic - self.ran_at;
                assert!(since >= schedule.interval().max(self.gap), "{since:?} after the last one");
            }
            (self.ran_at, self.set_forward) = (self.monotonic, false);
            self.runs += 1;
            self.rotation.rotated_at = Some(self.wall);
            self.rotation.next_at = next_at(&schedule, self.wall, self.gap);
        }
    }

    proptest! {
        /// However the clock is set and however long nobody looks: never within the gap, at most one for an interval
        /// that passes, one where the clock says that intervals passed, and none for having been set back.
        #[test]
        fn r31_r32_at_most_one_rotation_for_an_interval(
            hours in 6_u64..9_600,
            gap in 0_u64..200,
            happens in prop::collection::vec(happens(), 1..16),
        ) {
            let mut world = World::new(schedule(&format!("every {hours}h")), HOUR * u32::try_from(gap).unwrap());
            let mut forward = 0;
            for what in &happens {
                forward += usize::from(matches!(what, Happens::ClockIsSet(by) if *by > 0));
                world.happens(what);
            }
            let shortest = HOUR.as_secs() * hours.max(gap);
            let most = usize::try_from(world.monotonic.as_secs() / shortest).unwrap() + forward;
            prop_assert!(world.runs <= most, "{} runs where {most} may be", world.runs);
            // And it goes on: within an interval, what it was spread by, what was noticed of the clock, and the gap to a
            // run that was in the future when it was planned.
            let before = world.runs;
            world.wait(Duration::from_secs(shortest) + world.gap + 2 * WINDOW + LATE);
            prop_assert!(world.runs > before, "{:?} at {}", world.rotation, world.wall);
        }

        #[test]
        fn r31_a_crons_times_grow(
            text in prop::sample::select(vec![
                "cron 30 2 * * * Europe/Zurich",
                "cron */7 1-3 * * * Europe/Zurich",
                "cron * * * * * America/New_York",
                "cron 15,45 2 * * SUN Australia/Lord_Howe",
                "cron 0 0 L * * Pacific/Apia",
            ]),
            second in 1_700_000_000_i64..1_900_000_000,
            gap in 0_u64..100_000,
        ) {
            let (schedule, start) = (schedule(text), Timestamp::from_second(second).unwrap());
            let next = schedule.next_after(start).unwrap();
            prop_assert!(next > start);
            prop_assert!(schedule.next_after(next).unwrap() > next);
            let gap = Duration::from_secs(gap);
            prop_assert!(next_at(&schedule, start, gap) >= later(start, gap));
            prop_assert!(next_at(&schedule, start, gap) >= next);
        }

        #[test]
        fn any_text_is_read_or_refused_in_a_line(text in "(every|cron|database|) ?[ -~]{0,40}") {
            match Schedule::parse(&text) {
                Ok(schedule) => prop_assert_eq!(Schedule::parse(&schedule.to_string()), Ok(schedule)),
                Err(problem) => prop_assert!(!problem.contains('\n') && !problem.is_empty()),
            }
        }
    }
}
