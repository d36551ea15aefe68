//! What is known of the rotation of one secret, and how a command that asked for some of them ends.

use jiff::Timestamp;
use serde::Serialize;

use super::output::{self, moment, printable};
use super::{CliError, Context, Exit};
use crate::error::Reason;
use crate::proto::v1;

/// A reason for each exit code there is for a failure, worst first: what needs a person and stays, what needs another
/// command, what passes.
const WORST_FIRST: [Reason; 7] = [
    Reason::RotationBlocked,
    Reason::Denied,
    Reason::ApprovalRequired,
    Reason::RotationNotFound,
    Reason::InvalidArgument,
    Reason::Conflict,
    Reason::RotationUnfinished,
];

/// The exit of several things, of which some may have failed.
pub(super) fn worst(exits: impl Iterator<Item = Exit>) -> Exit {
    let exits: Vec<Exit> = exits.collect();
    WORST_FIRST.into_iter().map(exit_of).find(|exit| exits.contains(exit)).unwrap_or(Exit::DONE)
}

/// The exit of a failure for this reason.
pub(super) fn exit_of(reason: Reason) -> Exit {
    CliError::new(reason, "").exit()
}

/// What is known of the rotation of one secret.
#[derive(Serialize)]
pub(super) struct Rotation {
    environment: String,
    pub(super) name: String,
    pub(super) result: Option<String>,
    version_id: Option<String>,
    phase: Option<String>,
    trouble: Option<Trouble>,
    retry_at: Option<Timestamp>,
    due_at: Option<Timestamp>,
    pub(super) error: Option<Fault>,
    #[serde(skip)]
    failure: Option<CliError>,
}

#[derive(Serialize)]
pub(super) struct Fault {
    reason: Option<&'static str>,
    message: String,
    request_id: Option<String>,
}

impl Rotation {
    pub(super) const fn of(environment: String, name: String) -> Self {
        Self {
            environment,
            name,
            result: None,
            version_id: None,
            phase: None,
            trouble: None,
            retry_at: None,
            due_at: None,
            error: None,
            failure: None,
        }
    }

    /// The newest step says all there is to say, but for a version that was named before.
    pub(super) fn take(&mut self, step: v1::RotationStep) {
        self.result = given(step.result);
        self.version_id = given(step.version_id).or_else(|| self.version_id.take());
        self.phase = given(step.phase);
        self.trouble = step.trouble.map(Trouble::from);
        self.retry_at = output::time(step.retry_at);
    }

    /// It was only asked about: the time that it is skipped until is the time that it is due since.
    pub(super) fn only_asked(&mut self) {
        if self.result.as_deref() == Some("skipped") {
            self.result = Some("due".to_owned());
            self.due_at = self.retry_at.take();
        }
    }

    /// It could not be followed, or not to its end.
    pub(super) fn fail(&mut self, mut error: CliError) {
        if self.is_known() {
            let name = printable(&self.name);
            error.message = format!(
                "{}: {}; what has begun is gone on with by itself, and `claviger rotation status {name}` shows how it is",
                self.id(),
                error.message
            );
        }
        self.error = Some(Fault {
            reason: error.reason.map(Reason::code),
            message: output::without_tokens(&error.message),
            request_id: error.request_id.clone(),
        });
        self.failure = Some(error);
    }

    /// Whether the broker said anything about it.
    pub(super) const fn is_known(&self) -> bool {
        self.result.is_some() || self.phase.is_some() || self.version_id.is_some()
    }

    fn id(&self) -> String {
        printable(&format!("{}:{}", self.environment, self.name))
    }

    /// What is being done, for a bar.
    pub(super) fn doing(&self) -> String {
        let doing = self.phase.as_deref().or(self.result.as_deref()).unwrap_or_default();
        format!("{}:{} {doing}", self.environment, self.name)
    }

    /// Shows it to people: a line on stdout; on stderr, for programs too, why it could not be followed.
    pub(super) fn show(&self, context: &Context) -> Result<(), CliError> {
        let output = context.output;
        if !output.is_json() {
            if self.is_known() {
                output.text(&self.line(context.clock.now()))?;
            }
            self.in_the_way().iter().for_each(|line| output.notice(line));
        }
        self.failure.iter().for_each(|error| output.error(error));
        Ok(())
    }

    fn line(&self, now: Timestamp) -> String {
        let result = match self.result.as_deref() {
            Some("in_progress") => "in progress",
            Some(result) => result,
            None => "not over",
        };
        let mut parts = vec![self.id(), printable(result)];
        parts.extend(self.version_id.as_deref().map(printable));
        parts.extend(match (result, self.retry_at, self.due_at) {
            ("skipped", Some(until), _) => Some(format!("not before {}", when(Some(until), now))),
            ("skipped", None, _) => Some("it is paused".to_owned()),
            ("unfinished" | "blocked", at @ Some(_), _) => Some(format!("tried again {}", when(at, now))),
            ("due", _, at @ Some(_)) => Some(format!("since {}", when(at, now))),
            _ => None,
        });
        parts.join("  ")
    }

    /// What is in its way, what happened, and the mend: a line each, that stands for itself wherever it is found.
    fn in_the_way(&self) -> Vec<String> {
        let Some(trouble) = &self.trouble else { return self.came_to_nothing() };
        let (id, result) = (self.id(), self.result.as_deref().unwrap_or("not over"));
        vec![
            format!("{id}: {result}: {}", trouble.code),
            format!("{id}: {}", trouble.message),
            format!("{id}: mend: {}", trouble.mend),
        ]
    }

    /// What became of a run that is over without a new version.
    fn came_to_nothing(&self) -> Vec<String> {
        let why = match self.result.as_deref() {
            Some("superseded") => {
                "AWSCURRENT was changed while the run was in progress, and stays; what the run had made is given up; \
                 rotate again where a new version is still wanted"
            }
            Some("aborted") => "the run was aborted; AWSCURRENT stays as it was",
            _ => return Vec::new(),
        };
        vec![format!("{}: {why}", self.id())]
    }

    /// A failure that is only waited through.
    pub(super) fn waited_through(&self, now: Timestamp) -> String {
        let trouble = self.trouble.as_ref().map(|trouble| format!("{}: {}", trouble.code, trouble.message));
        let trouble = trouble.unwrap_or_default();
        format!("{}: {trouble}; tried again {}", self.id(), when(self.retry_at, now))
    }

    /// `waited`: its end was asked for, and not only a try.
    pub(super) fn exit(&self, waited: bool) -> Exit {
        match &self.failure {
            Some(error) => error.exit(),
            None => self.reason(waited).map_or(Exit::DONE, exit_of),
        }
    }

    /// Why it is not as it was asked to be.
    fn reason(&self, waited: bool) -> Option<Reason> {
        let has_moved = self.phase.as_deref() == Some("retire");
        match self.result.as_deref() {
            Some("rotated" | "skipped" | "due") => None,
            Some("in_progress") if !waited || has_moved => None,
            Some("superseded" | "aborted") => Some(Reason::Conflict),
            Some("blocked") => Some(Reason::RotationBlocked),
            Some("refused") => Some(self.refusal()),
            Some("unfinished" | "discarded" | "in_progress") | None => Some(Reason::RotationUnfinished),
            Some(_) => Some(Reason::Internal),
        }
    }

    fn refusal(&self) -> Reason {
        match &self.trouble {
            Some(trouble) if trouble.code == "denied" => Reason::Denied,
            Some(trouble) if trouble.code == "secret_missing" => Reason::SecretNotFound,
            Some(trouble) if trouble.code == "secret_deleted" => Reason::SecretDeleted,
            Some(trouble) if trouble.needs_person => Reason::RotationBlocked,
            _ => Reason::RotationUnfinished,
        }
    }
}

/// What is in a rotation's way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Trouble {
    pub(super) code: String,
    pub(super) message: String,
    pub(super) mend: String,
    pub(super) needs_person: bool,
}

impl From<v1::RotationTrouble> for Trouble {
    fn from(trouble: v1::RotationTrouble) -> Self {
        let v1::RotationTrouble { code, message, mend, needs_person } = trouble;
        Self { code, message, mend, needs_person }
    }
}

/// An empty text says nothing.
pub(super) fn given(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// A time for people, with how far away it is: `2026-01-13T00:00:00Z (in 12 d)`.
pub(super) fn when(at: Option<Timestamp>, now: Timestamp) -> String {
    match at {
        Some(at) => format!("{} ({})", moment(Some(at)), distance(at, now)),
        None => moment(None),
    }
}

/// Never more than it is: `in 1 min` says that there is a minute at least.
fn distance(at: Timestamp, now: Timestamp) -> String {
    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    let seconds = at.duration_since(now).unsigned_abs().as_secs();
    let length = match seconds {
        0 => return "now".to_owned(),
        1..MINUTE => format!("{seconds} s"),
        MINUTE..HOUR => format!("{} min", seconds / MINUTE),
        HOUR..172_800 => format!("{} h", seconds / HOUR),
        _ => format!("{} d", seconds / DAY),
    };
    if at > now { format!("in {length}") } else { format!("{length} ago") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn second(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn step(result: &str) -> v1::RotationStep {
        v1::RotationStep {
            environment: "development".to_owned(),
            name: "jwt".to_owned(),
            result: result.to_owned(),
            ..Default::default()
        }
    }

    fn rotation(steps: impl IntoIterator<Item = v1::RotationStep>) -> Rotation {
        let mut rotation = Rotation::of("development".to_owned(), "jwt".to_owned());
        steps.into_iter().for_each(|step| rotation.take(step));
        rotation
    }

    fn troubled(result: &str, code: &str, needs_person: bool) -> v1::RotationStep {
        let trouble = v1::RotationTrouble {
            code: code.to_owned(),
            message: "what happened".to_owned(),
            mend: "what to do".to_owned(),
            needs_person,
        };
        let retry_at = Some(prost_types::Timestamp { seconds: 7_200, nanos: 0 });
        v1::RotationStep { trouble: Some(trouble), retry_at, ..step(result) }
    }

    fn exit(step: v1::RotationStep, waited: bool) -> Exit {
        rotation([step]).exit(waited)
    }

    #[test]
    fn each_result_has_its_exit() {
        for result in ["rotated", "skipped"] {
            assert_eq!(exit(step(result), true), Exit::DONE, "{result}");
        }
        for result in ["superseded", "aborted"] {
            assert_eq!(exit(step(result), true), exit_of(Reason::Conflict), "{result}");
        }
        let later = exit_of(Reason::Unavailable);
        for result in ["unfinished", "discarded", ""] {
            assert_eq!(exit(step(result), true), later, "{result:?}");
        }
        assert_eq!(exit(step("blocked"), true), Exit::FAULTS);
        assert_eq!(exit(step("from_the_future"), true), Exit::FAULTS);
        assert_eq!(
            exit(step("in_progress"), false),
            Exit::DONE,
            "whoever does not wait has what they asked for"
        );
        assert_eq!(exit(step("in_progress"), true), later);
        let moved = v1::RotationStep { phase: "retire".to_owned(), ..step("in_progress") };
        assert_eq!(exit(moved, true), Exit::DONE);
        for (code, needs_person, reason) in [
            ("denied", true, Reason::Denied),
            ("secret_missing", true, Reason::SecretNotFound),
            ("secret_deleted", true, Reason::SecretNotFound),
            ("record_unreadable", true, Reason::Tampered),
            ("stopping", false, Reason::Unavailable),
        ] {
            assert_eq!(exit(troubled("refused", code, needs_person), true), exit_of(reason), "{code}");
        }
    }

    #[test]
    fn the_worst_of_several_exits_wins() {
        let exits = WORST_FIRST.map(exit_of);
        for (rank, exit) in exits.iter().enumerate() {
            let milder = [Exit::DONE].into_iter().chain(exits[rank..].iter().rev().copied());
            assert_eq!(worst(milder), *exit);
        }
        assert_eq!(worst([Exit::DONE, Exit::DONE].into_iter()), Exit::DONE);
        assert_eq!(worst(std::iter::empty()), Exit::DONE);
        for reason in Reason::ALL {
            assert!(exits.contains(&exit_of(*reason)), "{reason} has no rank");
        }
    }

    #[test]
    fn a_line_says_what_and_when() {
        let version = "v".repeat(32);
        let set = v1::RotationStep { phase: "set".to_owned(), version_id: version.clone(), ..step("") };
        let line = |steps: Vec<v1::RotationStep>| rotation(steps).line(second(0));
        assert_eq!(line(vec![set.clone(), step("rotated")]), format!("development:jwt  rotated  {version}"));
        assert_eq!(line(vec![set.clone()]), format!("development:jwt  not over  {version}"));
        let following = v1::RotationStep { phase: "set".to_owned(), ..step("in_progress") };
        assert_eq!(line(vec![set.clone(), following]), format!("development:jwt  in progress  {version}"));
        assert_eq!(
            line(vec![set, troubled("unfinished", "target_unavailable", false)]),
            format!("development:jwt  unfinished  {version}  tried again 1970-01-01T02:00:00Z (in 2 h)")
        );
        assert_eq!(line(vec![step("skipped")]), "development:jwt  skipped  it is paused");
        let mut due = rotation([troubled("skipped", "x", false)]);
        due.only_asked();
        assert_eq!(due.line(second(7_260)), "development:jwt  due  since 1970-01-01T02:00:00Z (1 min ago)");
        assert_eq!(due.exit(false), Exit::DONE);
    }

    #[test]
    fn what_is_in_the_way_stands_on_three_lines() {
        let blocked = rotation([troubled("blocked", "wrong_target", true)]);
        assert_eq!(
            blocked.in_the_way(),
            [
                "development:jwt: blocked: wrong_target",
                "development:jwt: what happened",
                "development:jwt: mend: what to do"
            ]
        );
        assert!(rotation([step("rotated")]).in_the_way().is_empty());
        let waited = rotation([troubled("unfinished", "unanswered", false)]).waited_through(second(0));
        assert_eq!(
            waited,
            "development:jwt: unanswered: what happened; tried again 1970-01-01T02:00:00Z (in 2 h)"
        );
    }

    #[test]
    fn who_could_not_follow_says_how_far_it_was() {
        let set = v1::RotationStep { phase: "set".to_owned(), ..step("") };
        let mut cut = rotation([set]);
        cut.fail(CliError::new(Reason::Unavailable, "the connection broke"));
        let error = cut.failure.as_ref().unwrap();
        assert!(error.message.starts_with("development:jwt: the connection broke; "), "{}", error.message);
        assert!(error.message.contains("rotation status jwt"), "{}", error.message);
        assert_eq!(cut.exit(true), exit_of(Reason::Unavailable));
        let json = serde_json::to_value(&cut).unwrap();
        assert_eq!((&json["phase"], &json["error"]["reason"]), (&"set".into(), &"UNAVAILABLE".into()));
        assert!(json["result"].is_null() && json.get("failure").is_none());

        let mut refused = rotation([]);
        refused.fail(CliError::new(Reason::Denied, "you may not"));
        assert_eq!(refused.failure.as_ref().unwrap().message, "you may not");
        assert!(!refused.is_known());
    }

    #[test]
    fn a_time_says_how_far_away_it_is() {
        for (seconds, expected) in [
            (0, "now"),
            (59, "in 59 s"),
            (-60, "1 min ago"),
            (3_599, "in 59 min"),
            (-3_600, "1 h ago"),
            (172_799, "in 47 h"),
            (172_800, "in 2 d"),
            (-86_400 * 400, "400 d ago"),
        ] {
            assert_eq!(distance(second(seconds), second(0)), expected);
        }
        assert_eq!(when(None, second(0)), "-");
    }
}
