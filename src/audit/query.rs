//! [`query`]: records by their fields, newest first, over every instance.
//!
//! A query reads; it does not verify. What is not a record is skipped and counted in the broker's own log.

use std::collections::VecDeque;
use std::path::Path;

use jiff::Timestamp;

use super::chain::{Entry, Frame};
use super::segment::{self, Chunk, LineReader};
use super::verify::instances;
use super::{AuditError, Kind, Outcome, Record};

/// The most records that one query gives.
const MAX_LIMIT: usize = 10_000;

/// Which records are wanted: those that satisfy everything that is set. Texts are compared exactly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// The instance whose chain is searched.
    pub instance: Option<String>,
    /// The principal, as the record has it: `User::"ana"`.
    pub principal: Option<String>,
    /// The action.
    pub action: Option<String>,
    /// The environment.
    pub environment: Option<String>,
    /// The secret; with a `*` at its end, any secret that begins so.
    pub secret: Option<String>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// What the record is about.
    pub kind: Option<Kind>,
    /// From this time on.
    pub since: Option<Timestamp>,
    /// Before this time.
    pub until: Option<Timestamp>,
    /// The request's id.
    pub request_id: Option<String>,
    /// Any part of the line, as it is written there.
    pub text: Option<String>,
    /// How many records at most: 1–10,000, 100 where nothing is said.
    pub limit: usize,
}

impl Default for Query {
    fn default() -> Self {
        Self {
            instance: None,
            principal: None,
            action: None,
            environment: None,
            secret: None,
            outcome: None,
            kind: None,
            since: None,
            until: None,
            request_id: None,
            text: None,
            limit: 100,
        }
    }
}

/// The lines that `query` asks for, as they stand in the files, newest first.
///
/// A segment whose newest record is older than `since` ends the search of its instance; where the machine's clock was
/// set back by more than a segment's span, records before that are not looked at.
///
/// # Errors
/// [`AuditError::Query`] where the query makes no sense; [`AuditError::Unreadable`].
pub fn query(directory: &Path, query: &Query) -> Result<Vec<String>, AuditError> {
    query.check()?;
    let mut skipped = 0;
    let mut chains = Vec::new();
    let wanted = |name: &String| query.instance.as_ref().is_none_or(|wanted| wanted == name);
    for instance in instances(directory)?.into_iter().filter(wanted) {
        chains.push(search(&directory.join(instance), query, &mut skipped)?);
    }
    if skipped > 0 {
        tracing::warn!(
            skipped,
            "audit query passed over lines that are not records; run `claviger audit verify`"
        );
    }
    Ok(merge(chains, query.limit))
}

impl Query {
    fn check(&self) -> Result<(), AuditError> {
        let refuse = |problem: String| Err(AuditError::Query(problem));
        if !(1..=MAX_LIMIT).contains(&self.limit) {
            return refuse(format!("limit {} is not between 1 and {MAX_LIMIT}", self.limit));
        }
        if let (Some(since), Some(until)) = (self.since, self.until)
            && since >= until
        {
            return refuse(format!("since {since} is not before until {until}; exchange them"));
        }
        let inner_star = |secret: &String| secret.find('*').is_some_and(|star| star + 1 < secret.len());
        if self.secret.as_ref().is_some_and(inner_star) {
            return refuse("secret may hold one `*`, at its end".to_owned());
        }
        Ok(())
    }

    fn admits_time(&self, time: Timestamp) -> bool {
        self.since.is_none_or(|since| time >= since) && self.until.is_none_or(|until| time < until)
    }

    fn admits(&self, entry: &Entry) -> bool {
        let of_kind = self.kind.is_none_or(|kind| kind == entry.kind());
        match entry {
            Entry::Record(record) => of_kind && self.admits_record(record),
            Entry::Notice(_) => of_kind && !self.asks_for_fields(),
        }
    }

    fn admits_record(&self, record: &Record) -> bool {
        let same =
            |wanted: &Option<String>, found: &str| wanted.as_deref().is_none_or(|wanted| wanted == found);
        same(&self.principal, &record.principal)
            && same(&self.action, &record.action)
            && same(&self.environment, &record.environment)
            && same(&self.request_id, &record.request_id)
            && (self.outcome.is_none() || self.outcome == record.outcome)
            && self.secret.as_deref().is_none_or(|wanted| match wanted.strip_suffix('*') {
                Some(beginning) => !record.secret.is_empty() && record.secret.starts_with(beginning),
                None => record.secret == wanted,
            })
    }

    /// Whether something is asked that only a caller's record can satisfy.
    fn asks_for_fields(&self) -> bool {
        let texts = [&self.principal, &self.action, &self.environment, &self.secret, &self.request_id];
        self.outcome.is_some() || texts.iter().any(|text| text.is_some())
    }
}

/// A line that is wanted, with its time.
struct Hit {
    time: Timestamp,
    line: String,
}

/// One instance's hits, newest first, no more than the limit.
fn search(folder: &Path, query: &Query, skipped: &mut u64) -> Result<VecDeque<Hit>, AuditError> {
    let mut hits = VecDeque::new();
    for first in segment::list(folder)?.segments.iter().rev() {
        let path = folder.join(segment::file_name(*first));
        let found = match search_segment(&path, query, query.limit - hits.len(), skipped) {
            // The retention removed it since it was listed.
            Err(_) if !path.exists() => break,
            found => found?,
        };
        hits.extend(found.hits.into_iter().rev());
        let is_older = query.since.is_some_and(|since| found.newest.is_some_and(|newest| newest < since));
        if is_older || hits.len() >= query.limit {
            break;
        }
    }
    Ok(hits)
}

struct Found {
    /// The last ones of the segment, oldest first.
    hits: VecDeque<Hit>,
    newest: Option<Timestamp>,
}

fn search_segment(path: &Path, query: &Query, limit: usize, skipped: &mut u64) -> Result<Found, AuditError> {
    let mut found = Found { hits: VecDeque::new(), newest: None };
    let mut lines = LineReader::open(path)?;
    while let Some(chunk) = lines.read()? {
        let Some((time, frame, line)) = record(&chunk) else {
            *skipped += 1;
            continue;
        };
        found.newest = found.newest.max(Some(time));
        if !query.admits_time(time) || query.text.as_ref().is_some_and(|text| !line.contains(text.as_str())) {
            continue;
        }
        match frame.entry() {
            Ok(entry) if query.admits(&entry) => {
                if found.hits.len() == limit {
                    found.hits.pop_front();
                }
                found.hits.push_back(Hit { time, line: line.to_owned() });
            }
            Ok(_) => {}
            Err(_) => *skipped += 1,
        }
    }
    Ok(found)
}

fn record<'a>(chunk: &Chunk<'a>) -> Option<(Timestamp, Frame<'a>, &'a str)> {
    let Chunk::Line(line) = *chunk else { return None };
    let frame = Frame::parse(line)?;
    Some((frame.timestamp()?, frame, std::str::from_utf8(line).ok()?))
}

/// Takes the newest of all instances until there are enough. Within an instance the chain's order holds, whatever its
/// clock said.
fn merge(mut chains: Vec<VecDeque<Hit>>, limit: usize) -> Vec<String> {
    let mut lines = Vec::new();
    while lines.len() < limit {
        let newest = chains.iter_mut().max_by_key(|chain| chain.front().map(|hit| hit.time));
        let Some(hit) = newest.and_then(VecDeque::pop_front) else { break };
        lines.push(hit.line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Reason, Reasoned};

    #[test]
    fn what_makes_no_sense_is_refused() {
        let at = |second| Some(Timestamp::from_second(second).unwrap());
        for bad in [
            Query { limit: 0, ..Query::default() },
            Query { limit: 10_001, ..Query::default() },
            Query { since: at(5), until: at(5), ..Query::default() },
            Query { secret: Some("a*b".to_owned()), ..Query::default() },
            Query { secret: Some("a**".to_owned()), ..Query::default() },
        ] {
            assert_eq!(bad.check().unwrap_err().reason(), Reason::InvalidArgument, "{bad:?}");
        }
        assert!(Query { secret: Some("*".to_owned()), limit: 10_000, ..Query::default() }.check().is_ok());
    }

    #[test]
    fn instances_are_merged_by_time_and_keep_their_own_order() {
        let chain = |name: &str, seconds: &[i64]| -> VecDeque<Hit> {
            let hit = |second: &i64| Hit {
                time: Timestamp::from_second(*second).unwrap(),
                line: format!("{name}{second}"),
            };
            seconds.iter().map(hit).collect()
        };
        let merged = merge(vec![chain("a", &[9, 20, 3]), chain("b", &[8, 4]), chain("c", &[])], 4);
        assert_eq!(merged, ["a9", "a20", "b8", "b4"], "a's clock was set back between 20 and 9");
    }
}
