//! What `claviger rotation set NAME --file F.toml` takes.
//!
//! ```toml
//! rotator = "postgresql-alternating"
//! schedule = "every 30d"             # or "cron 0 3 * * 1 Europe/Zurich", or "database": see schedule.rs
//! grace = "5m"                       # 0s to 90d, default 5m
//! group = "orders"                   # with whom it is never rotated within the gap
//! retire_after = "1d"                # where the rotator can withdraw what was current before
//! repair = true                      # default false
//!
//! [postgresql-alternating]           # the table of the rotator's name holds its own settings
//! …
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use super::rotators::{ENTRIES, Entry, Rotator};
use super::schedule::Schedule;
use super::{Failure, Trouble};
use crate::clock::parse_duration;
use crate::error::{Reason, Reasoned};

/// The longest text that is read, in bytes.
pub const MAX_BYTES: usize = 65_536;
/// The grace where none is written.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(300);

const LONGEST_GRACE: Duration = Duration::from_secs(90 * 86_400);
const LONGEST_RETIREMENT: Duration = Duration::from_secs(365 * 86_400);
const LONGEST_GROUP: usize = 64;
const KEYS: [&str; 6] = ["rotator", "schedule", "grace", "group", "retire_after", "repair"];

/// How, and when, a secret is rotated.
///
/// INVARIANT: made by [`Definition::parse`] alone, or read back from a record that was: the rotator exists and takes the
/// settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    /// The rotator's kind.
    pub rotator: String,
    /// When.
    pub schedule: Schedule,
    /// How long users may hold a value beyond the cache's time to live: connection pools, caches of their own. Between
    /// two rotations lies at least the environment's longest time to live plus this.
    pub grace: Duration,
    /// Two secrets of one group are not rotated within the group's gap, which is the longer of their gaps: the members
    /// of a pair never change together.
    pub group: Option<String>,
    /// How long after the promotion what was current before is withdrawn from the target; never, where it is `None`:
    /// then the next rotation replaces it.
    pub retire_after: Option<Duration>,
    /// Whether to go on where the target rejects AWSCURRENT.
    pub repair: bool,
    /// The rotator's own settings: the table of its name.
    pub settings: Map<String, Json>,
}

/// Why a definition was refused: where in its text, what is wrong, and the mend, in one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DefinitionError {
    place: Option<Place>,
    problem: String,
}

/// Both count from 1; the column in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    line: usize,
    column: usize,
}

impl fmt::Display for DefinitionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            Some(Place { line, column }) => write!(f, "line {line}, column {column}: {}", self.problem),
            None => write!(f, "the definition: {}", self.problem),
        }
    }
}

impl std::error::Error for DefinitionError {}

impl Reasoned for DefinitionError {
    fn reason(&self) -> Reason {
        Reason::InvalidConfig
    }
}

impl DefinitionError {
    /// Whatever the problem quotes, it becomes one line that shows no control characters.
    fn new(place: Option<Place>, problem: &str) -> Self {
        let line = problem.split_whitespace().collect::<Vec<_>>().join(" ");
        let shown = |c: char| {
            let hidden = c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}');
            if hidden { c.escape_default().collect() } else { String::from(c) }
        };
        Self { place, problem: line.chars().map(shown).collect() }
    }
}

impl Definition {
    /// Reads a definition, and has its rotator look at its settings.
    ///
    /// # Errors
    /// The first thing that is wrong, with line and column.
    pub fn parse(text: &str) -> Result<Self, DefinitionError> {
        if text.len() > MAX_BYTES {
            let problem = format!("is {} bytes long; at most {MAX_BYTES} are read", text.len());
            return Err(DefinitionError::new(None, &problem));
        }
        let document = DeTable::parse(text).map_err(|error| {
            let place = error.span().map(|span| place(text, span.start));
            DefinitionError::new(place, &format!("not valid TOML: {}", error.message()))
        })?;
        Reader { text, table: document.get_ref() }.read()
    }

    /// The rotator, with its settings.
    ///
    /// # Errors
    /// [`Trouble::ValueUnfit`] where this version has no such rotator, or one that does not take the settings any more.
    pub fn rotator(&self) -> Result<Arc<dyn Rotator>, Failure> {
        let unfit = |problem: String| {
            let kind = cut(&self.rotator);
            Failure::new(Trouble::ValueUnfit, format!("the definition's rotator `{kind}`: {problem}"))
        };
        let entry =
            entry(&self.rotator).ok_or_else(|| unfit("this version has none of that name".to_owned()))?;
        (entry.build)(&self.settings).map_err(unfit)
    }

    /// The definition as text, which reads as the same definition. Comments are not kept, and defaults are written out.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let text = |text: &str| toml::Value::from(text).to_string();
        let mut lines = vec![
            format!("rotator = {}", text(&self.rotator)),
            format!("schedule = {}", text(&self.schedule.to_string())),
            format!("grace = {}", text(&written(self.grace))),
        ];
        lines.extend(self.group.as_deref().map(|group| format!("group = {}", text(group))));
        lines.extend(self.retire_after.map(|after| format!("retire_after = {}", text(&written(after)))));
        if self.repair {
            lines.push("repair = true".to_owned());
        }
        let mut toml = lines.join("\n") + "\n";
        if !self.settings.is_empty() {
            toml.push('\n');
            toml.push_str(&table(&self.rotator, &self.settings));
        }
        toml
    }
}

fn entry(kind: &str) -> Option<&'static Entry> {
    ENTRIES.iter().copied().find(|entry| entry.kind == kind)
}

/// A table of settings. They came from TOML, so that there is nothing among them that TOML has not.
fn table(name: &str, settings: &Map<String, Json>) -> String {
    let document = BTreeMap::from([(name, settings)]);
    toml::to_string(&document).unwrap_or_default()
}

/// A duration as it is read: a number of the largest unit that it is a whole number of.
fn written(duration: Duration) -> String {
    const UNITS: [(u128, &str); 6] = [
        (86_400_000_000_000, "d"),
        (3_600_000_000_000, "h"),
        (60_000_000_000, "m"),
        (1_000_000_000, "s"),
        (1_000_000, "ms"),
        (1_000, "us"),
    ];
    let nanoseconds = duration.as_nanos();
    if nanoseconds == 0 {
        return "0s".to_owned();
    }
    let whole = UNITS.into_iter().find(|(unit, _)| nanoseconds.is_multiple_of(*unit));
    let (unit, name) = whole.unwrap_or((1, "ns"));
    format!("{}{name}", nanoseconds / unit)
}

type Value<'i> = Spanned<DeValue<'i>>;
type Key<'i> = Spanned<DeString<'i>>;

/// Reads a document that is TOML.
struct Reader<'t> {
    text: &'t str,
    table: &'t DeTable<'t>,
}

impl<'t> Reader<'t> {
    fn read(&self) -> Result<Definition, DefinitionError> {
        self.refuse_unknown()?;
        let entry = self.entry()?;
        self.refuse_others(entry)?;
        let schedule = self.schedule()?;
        let grace = self.duration("grace", LONGEST_GRACE)?.unwrap_or(DEFAULT_GRACE);
        let group = self.group()?;
        let repair = self.repair()?;
        let settings = self.settings(entry)?;
        let rotator = (entry.build)(&settings).map_err(|problem| self.refused(entry, &problem))?;
        let retire_after = self.retire_after(rotator.as_ref(), grace, &schedule)?;
        let kind = entry.kind.to_owned();
        Ok(Definition { rotator: kind, schedule, grace, group, retire_after, repair, settings })
    }

    fn refuse_unknown(&self) -> Result<(), DefinitionError> {
        let known = || KEYS.into_iter().chain(ENTRIES.iter().map(|entry| entry.kind));
        let unknown = |(key, _): &(&Key<'t>, &Value<'t>)| known().all(|known| known != key.get_ref());
        let Some((key, _)) = self.table.iter().filter(unknown).min_by_key(|(key, _)| key.span().start) else {
            return Ok(());
        };
        let name: &str = key.get_ref();
        let near = nearest(name, known());
        Err(self.at(key, &format!("unknown key `{}`; did you mean `{near}`?", cut(name))))
    }

    fn entry(&self) -> Result<&'static Entry, DefinitionError> {
        let kinds = || ENTRIES.iter().map(|entry| entry.kind);
        let Some((text, value)) = self.string("rotator")? else {
            let kinds = kinds().map(|kind| format!("`{kind}`")).collect::<Vec<_>>().join(", ");
            let problem = format!("names no rotator; write `rotator = \"…\"` with one of {kinds}");
            return Err(DefinitionError::new(None, &problem));
        };
        entry(text).ok_or_else(|| {
            let near = nearest(text, kinds());
            self.at(value, &format!("rotator: there is no `{}`; did you mean `{near}`?", cut(text)))
        })
    }

    /// Settings of another rotator would have no effect.
    fn refuse_others(&self, entry: &Entry) -> Result<(), DefinitionError> {
        let mut others = ENTRIES.iter().filter(|other| other.kind != entry.kind);
        let Some((key, _)) = others.find_map(|other| self.table.get_key_value(other.kind)) else {
            return Ok(());
        };
        let (other, kind) = (cut(key.get_ref()), entry.kind);
        Err(self
            .at(key, &format!("[{other}] has settings of another rotator than `{kind}`; remove one of them")))
    }

    fn schedule(&self) -> Result<Schedule, DefinitionError> {
        let Some((text, value)) = self.string("schedule")? else {
            let problem = "has no schedule; write for example `schedule = \"every 30d\"`";
            return Err(DefinitionError::new(None, problem));
        };
        Schedule::parse(text).map_err(|problem| self.at(value, &format!("schedule: {problem}")))
    }

    fn group(&self) -> Result<Option<String>, DefinitionError> {
        let Some((text, value)) = self.string("group")? else { return Ok(None) };
        let fits = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        if (1..=LONGEST_GROUP).contains(&text.len()) && text.chars().all(fits) {
            return Ok(Some(text.to_owned()));
        }
        let problem = format!("group: `{}` is not 1 to {LONGEST_GROUP} of A-Z, a-z, 0-9 and _.-", cut(text));
        Err(self.at(value, &problem))
    }

    fn repair(&self) -> Result<bool, DefinitionError> {
        let Some(value) = self.table.get("repair") else { return Ok(false) };
        let refused =
            || self.at(value, "repair: is neither true nor false; write one of them, without quotes");
        value.get_ref().as_bool().ok_or_else(refused)
    }

    fn retire_after(
        &self,
        rotator: &dyn Rotator,
        grace: Duration,
        schedule: &Schedule,
    ) -> Result<Option<Duration>, DefinitionError> {
        let Some(after) = self.duration("retire_after", LONGEST_RETIREMENT)? else { return Ok(None) };
        let problem = if !rotator.can_retire() {
            "retire_after: this rotator has nothing to withdraw; remove the line".to_owned()
        } else if after < grace {
            let grace = written(grace);
            format!(
                "retire_after: is shorter than the grace of {grace}, within which users may hold the value before"
            )
        } else if after >= schedule.interval() {
            format!(
                "retire_after: is not shorter than `{schedule}`; what is current would be due again before"
            )
        } else {
            return Ok(Some(after));
        };
        let place = self.table.get("retire_after").map(|value| self.place(value.span().start));
        Err(DefinitionError::new(place, &problem))
    }

    fn duration(&self, key: &str, longest: Duration) -> Result<Option<Duration>, DefinitionError> {
        let Some((text, value)) = self.string(key)? else { return Ok(None) };
        let duration = parse_duration(text).map_err(|error| self.at(value, &format!("{key}: {error}")))?;
        if duration > longest {
            let longest = written(longest);
            return Err(
                self.at(value, &format!("{key}: `{}` is longer than {longest}; shorten it", cut(text)))
            );
        }
        Ok(Some(duration))
    }

    fn settings(&self, entry: &Entry) -> Result<Map<String, Json>, DefinitionError> {
        let Some((key, value)) = self.table.get_key_value(entry.kind) else { return Ok(Map::new()) };
        let Some(table) = value.get_ref().as_table() else {
            let (kind, found) = (entry.kind, value.get_ref().type_str());
            let problem = format!("{kind}: is of type {found}; write its settings as a table, [{kind}]");
            return Err(self.at(key, &problem));
        };
        json_of(table).map_err(|(offset, problem)| {
            DefinitionError::new(Some(self.place(offset)), &format!("[{}]: {problem}", entry.kind))
        })
    }

    /// What a rotator says of its settings, at the key that it names first, or else at its table.
    fn refused(&self, entry: &Entry, problem: &str) -> DefinitionError {
        let table = self.table.get_key_value(entry.kind);
        let settings = table.and_then(|(_, value)| value.get_ref().as_table());
        let mut named = problem.split('`').skip(1).step_by(2);
        let key = settings.and_then(|settings| named.find_map(|name| settings.get_key_value(name)));
        let span = key.map(|(key, _)| key.span()).or_else(|| table.map(|(key, _)| key.span()));
        let place = span.map(|span| self.place(span.start));
        DefinitionError::new(place, &format!("[{}]: {problem}", entry.kind))
    }

    fn string(&self, key: &str) -> Result<Option<(&'t str, &'t Value<'t>)>, DefinitionError> {
        let Some(value) = self.table.get(key) else { return Ok(None) };
        let found = value.get_ref().type_str();
        let text = value.get_ref().as_str();
        let text =
            text.ok_or_else(|| self.at(value, &format!("{key}: is of type {found}; write it in quotes")))?;
        Ok(Some((text, value)))
    }

    fn at<T>(&self, what: &Spanned<T>, problem: &str) -> DefinitionError {
        DefinitionError::new(Some(self.place(what.span().start)), problem)
    }

    fn place(&self, offset: usize) -> Place {
        place(self.text, offset)
    }
}

fn place(text: &str, offset: usize) -> Place {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    Place { line, column }
}

/// A table as JSON, which rotators read and records hold.
///
/// # Errors
/// Where there is something that JSON has not, and what it is.
fn json_of(table: &DeTable<'_>) -> Result<Map<String, Json>, (usize, String)> {
    let mut members = Map::new();
    for (key, value) in table {
        members.insert(key.get_ref().to_string(), json(value)?);
    }
    Ok(members)
}

fn json(value: &Value<'_>) -> Result<Json, (usize, String)> {
    let refuse = |problem: &str| (value.span().start, problem.to_owned());
    Ok(match value.get_ref() {
        DeValue::String(text) => Json::from(text.as_ref()),
        DeValue::Boolean(is) => Json::from(*is),
        DeValue::Integer(number) => {
            let number = i64::from_str_radix(number.as_str(), number.radix());
            Json::from(number.map_err(|_| refuse("this whole number does not fit 64 bits"))?)
        }
        DeValue::Float(number) => {
            let number = number.as_str().parse().ok().and_then(serde_json::Number::from_f64);
            Json::from(number.ok_or_else(|| refuse("this is no finite number"))?)
        }
        DeValue::Array(items) => Json::from(items.iter().map(json).collect::<Result<Vec<_>, _>>()?),
        DeValue::Table(table) => Json::from(json_of(table)?),
        DeValue::Datetime(_) => return Err(refuse("no setting is a date or a time; write it in quotes")),
    })
}

/// Of what is known, that which is most like what was written.
fn nearest(text: &str, known: impl Iterator<Item = &'static str>) -> &'static str {
    // More than a name's worth is never like one, and would only take time.
    let text: String = text.chars().take(64).collect();
    // What a name begins with is nearer to it than any other of a like length.
    let begins = |known: &str| !text.is_empty() && known.starts_with(text.as_str());
    known.min_by_key(|known| (!begins(known), strsim::damerau_levenshtein(known, &text))).unwrap_or_default()
}

fn cut(text: &str) -> String {
    const MOST: usize = 64;
    let head: String = text.chars().take(MOST).flat_map(char::escape_default).collect();
    let dots = if text.chars().nth(MOST).is_some() { "…" } else { "" };
    format!("{head}{dots}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLAIN: &str = "rotator = \"random\"\nschedule = \"every 30d\"\n";

    fn with(lines: &str) -> Result<Definition, DefinitionError> {
        Definition::parse(&format!("{PLAIN}{lines}\n"))
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let plain = Definition::parse(PLAIN).unwrap();
        assert_eq!((plain.rotator.as_str(), plain.grace), ("random", DEFAULT_GRACE));
        assert_eq!((plain.group.clone(), plain.retire_after, plain.repair), (None, None, false));
        assert!(plain.settings.is_empty());
        assert_eq!(plain.to_toml(), format!("{PLAIN}grace = \"5m\"\n"));
        plain.rotator().unwrap();
    }

    #[test]
    fn every_definition_reads_back_as_itself() {
        for lines in [
            "",
            "grace = \"0s\"",
            "grace = \"90d\"",
            "grace = \"1h30m\"\ngroup = \"orders-db.2\"\nrepair = true",
            "grace = \"1500ms\"\nrepair = false",
            "grace = \"1500000001ns\"",
            "[random]",
            "[random]\nlength = 48",
            "random = { length = 0x30 }",
            "random.length = 48",
        ] {
            let definition = with(lines).unwrap_or_else(|error| panic!("{lines}: {error}"));
            let text = definition.to_toml();
            assert_eq!(Definition::parse(&text).unwrap(), definition, "{text}");
            let json = serde_json::to_string(&definition).unwrap();
            assert_eq!(serde_json::from_str::<Definition>(&json).unwrap(), definition);
        }
        for schedule in ["database", "cron 0 3 * * 1 Europe/Zurich", "every 1h 30m"] {
            let definition = Definition::parse(&format!("rotator='random'\nschedule='{schedule}'")).unwrap();
            assert_eq!(Definition::parse(&definition.to_toml()).unwrap(), definition);
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place_and_the_mend() {
        let long = format!("group = \"{}\"", "x".repeat(65));
        for (lines, place, says) in [
            ("shedule = 1", "line 3, column 1", "unknown key `shedule`; did you mean `schedule`?"),
            ("[radnom]", "line 3, column 2", "unknown key `radnom`; did you mean `random`?"),
            ("retire-after = \"1d\"", "line 3, column 1", "did you mean `retire_after`?"),
            ("\"\\u001b[31m\" = 1", "line 3, column 1", "unknown key `\\u{1b}[31m`"),
            ("schedule = \"every 1d\"", "line 3, column 1", "not valid TOML: duplicate key"),
            ("grace = ", "", "not valid TOML"),
            ("grace = \"1d", "", "not valid TOML"),
            ("grace 5m", "", "not valid TOML"),
            ("grace = 5", "line 3, column 9", "grace: is of type integer; write it in quotes"),
            ("grace = \"5\"", "line 3, column 9", "has no unit"),
            ("grace = \"-1s\"", "line 3, column 9", "is negative"),
            ("grace = \"91d\"", "line 3, column 9", "is longer than 90d; shorten it"),
            ("grace = \"1e9h\"", "line 3, column 9", "grace: duration `1e9h`"),
            ("grace = \"1mo\"", "line 3, column 9", "grace: duration `1mo`"),
            ("group = 7", "line 3, column 9", "group: is of type integer"),
            ("group = \"\"", "line 3, column 9", "group: `` is not 1 to 64"),
            ("group = \"a b\"", "line 3, column 9", "group: `a b` is not 1 to 64"),
            ("group = \"a/b\"", "line 3, column 9", "group: `a/b` is not 1 to 64"),
            ("group = \"рrod\"", "line 3, column 9", "group: `\\u{440}rod` is not 1 to 64"),
            ("group = \"a\\nb\"", "line 3, column 9", "group: `a\\nb` is not 1 to 64"),
            (long.as_str(), "line 3, column 9", "x…` is not 1 to 64"),
            ("repair = \"true\"", "line 3, column 10", "repair: is neither true nor false"),
            ("repair = 1", "line 3, column 10", "repair: is neither true nor false"),
            ("retire_after = \"1d\"", "line 3, column 16", "has nothing to withdraw; remove the line"),
            ("retire_after = \"366d\"", "line 3, column 16", "is longer than 365d"),
            ("retire_after = true", "line 3, column 16", "retire_after: is of type boolean"),
            ("[jwt-secret]", "line 3, column 2", "another rotator than `random`; remove one of them"),
            ("random = 7", "line 3, column 1", "is of type integer; write its settings as a table, [random]"),
            ("[[random]]", "line 3, column", "write its settings as a table"),
            ("[random]\nlenth = 40", "line 4, column 1", "unknown key `lenth`"),
            ("[random]\nlength = \"a\"", "line 4, column 1", "`length`"),
            ("[random]\nlength = 1979-05-27", "line 4, column 10", "[random]: no setting is a date"),
            ("[random]\nlength = nan", "line 4, column 10", "[random]: this is no finite number"),
            ("[random]\nlength = 1e999", "line 4, column 10", ""),
            ("[random]\nlength = 99999999999999999999", "line 4, column", ""),
        ] {
            let error = with(lines).expect_err(lines);
            let message = error.to_string();
            assert!(message.starts_with(place), "{lines}: {message}");
            assert!(message.contains(says), "{lines}: {message}");
            assert!(!message.contains(|c: char| c.is_control()) && message.len() < 500, "{message}");
            assert_eq!(error.reason(), Reason::InvalidConfig);
        }
    }

    #[test]
    fn what_is_missing_or_no_definition_at_all_is_told() {
        let large = format!("{PLAIN}# {}", "x".repeat(MAX_BYTES));
        for (text, says) in [
            ("", "the definition: names no rotator"),
            ("schedule = \"every 30d\"", "write `rotator = \"…\"` with one of `random`"),
            ("rotator = \"random\"", "has no schedule; write for example"),
            ("rotator = 7\nschedule = \"every 30d\"", "line 1, column 11: rotator: is of type integer"),
            (
                "rotator = \"randm\"",
                "line 1, column 11: rotator: there is no `randm`; did you mean `random`?",
            ),
            ("rotator = \"Random\"", "did you mean `random`?"),
            ("rotator = \"random\"\nschedule = 30", "line 2, column 12: schedule: is of type integer"),
            ("rotator = \"random\"\nschedule = \"30d\"", "line 2, column 12: schedule: `30d` is no schedule"),
            ("rotator = \"random\"\nschedule = \"\"", "line 2, column 12: schedule: is empty"),
            ("rotator = \"random\"\nschedule = \"cron * * * * * *\"", "no seconds"),
            (
                "# é\n\n  rotatr = \"random\"",
                "line 3, column 3: unknown key `rotatr`; did you mean `rotator`?",
            ),
            ("{\"rotator\": \"random\"}", "not valid TOML"),
            ("\0", "not valid TOML"),
            (large.as_str(), "at most 65536 are read"),
        ] {
            let message = Definition::parse(text).unwrap_err().to_string();
            assert!(message.contains(says), "{text:.80}: {message}");
            assert!(!message.contains(|c: char| c.is_control()), "{message}");
        }
    }

    #[test]
    fn what_this_version_can_not_build_any_more_is_told() {
        let plain = Definition::parse(PLAIN).unwrap();
        let gone = Definition { rotator: "carrier-pigeon".to_owned(), ..plain.clone() };
        let failure = gone.rotator().unwrap_err();
        assert_eq!(failure.trouble, Trouble::ValueUnfit);
        assert!(failure.message.contains("`carrier-pigeon`"), "{failure}");
        let settings = Map::from_iter([("lenth".to_owned(), Json::from(40))]);
        let failure = Definition { settings, ..plain }.rotator().unwrap_err();
        assert_eq!(failure.trouble, Trouble::ValueUnfit);
        assert!(failure.message.contains("`lenth`"), "{failure}");
    }

    #[test]
    fn durations_are_written_as_they_are_read() {
        for (duration, text) in [
            (Duration::ZERO, "0s"),
            (Duration::from_nanos(1), "1ns"),
            (Duration::from_micros(7), "7us"),
            (Duration::from_millis(1_500), "1500ms"),
            (Duration::from_secs(90), "90s"),
            (Duration::from_secs(5_400), "90m"),
            (Duration::from_secs(36 * 3_600), "36h"),
            (LONGEST_GRACE, "90d"),
        ] {
            assert_eq!(written(duration), text);
            assert_eq!(parse_duration(text).unwrap(), duration);
        }
    }

    fn setting() -> impl Strategy<Value = Json> {
        let scalar = prop_oneof![
            any::<bool>().prop_map(Json::from),
            any::<i64>().prop_map(Json::from),
            prop::num::f64::NORMAL.prop_map(Json::from),
            "\\PC{0,20}".prop_map(Json::from),
            ".{0,20}".prop_map(Json::from),
        ];
        scalar.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec("[a-z]{0,5}".prop_map(Json::from), 0..4).prop_map(Json::from),
                prop::collection::btree_map("[a-zA-Z_. \"-]{1,8}", inner, 0..4)
                    .prop_map(|table| Json::from(Map::from_iter(table))),
            ]
        })
    }

    proptest! {
        #[test]
        fn settings_come_back_as_they_were_written(
            settings in prop::collection::btree_map("[a-z_]{1,8}", setting(), 0..6),
        ) {
            let settings = Map::from_iter(settings);
            let text = table("jwt-secret", &settings);
            let document = DeTable::parse(&text).unwrap();
            let read = document.get_ref().get("jwt-secret").and_then(|table| table.get_ref().as_table());
            prop_assert_eq!(read.map(json_of), Some(Ok(settings)), "{}", text);
        }

        #[test]
        fn any_text_is_read_or_refused_in_a_line(text in "(rotator|schedule|grace|\\[random\\]|[ =\"a-z\\n]){0,30}") {
            if let Err(error) = Definition::parse(&text) {
                prop_assert!(!error.to_string().contains(|c: char| c.is_control()));
            }
        }
    }
}
