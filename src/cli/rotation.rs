//! `claviger rotation`: how and when secrets are rotated, and how their rotations are.
//!
//! ```text
//! set, status, pause, resume, abort
//!          {"environment","name","rotator","schedule","health":"idle"|"running"|"degraded"|"blocked"|"paused",
//!           "next_at","rotated_at","min_gap_seconds","run":{…},"history":[…],"definition"}
//!          run      {"version_id","phase","started_at","asked_by","attempt","not_before","aborting","trouble":{…}}
//!          trouble  {"code","message","mend","needs_person"}
//! list     {"environment","rotations":[the same, without history and definition],"more"}
//! history  {"environment","name","history":[{"ending","version_id","started_at","ended_at","asked_by","failures"}]}
//! remove   {"environment","name"}
//! ```
//! Ended runs stand newest first.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::connect::connect;
use super::output::{self, moment, printable, table};
use super::rotated::{Trouble, given, when};
use super::{CliError, Context, Exit};
use crate::client::ClientError;
use crate::error::Reason;
use crate::proto::v1;
use crate::secret::SecretName;

/// The most that a page holds (see `ListRotationsRequest`).
const PAGE: usize = 100;

/// What can be done with rotations.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Set how and when a secret is rotated
    Set(SetArgs),
    /// Remove a rotation; the secret stays as it is
    Remove(NameArgs),
    /// Show how a rotation is, and what to do where something is in its way
    Status(NameArgs),
    /// List an environment's rotations
    List(ListArgs),
    /// Begin nothing new; a run in progress comes to its end
    Pause(NameArgs),
    /// End a pause, and have a blocked or waiting run taken up at once
    Resume(NameArgs),
    /// End a run without a new version; what the target may hold is kept
    Abort(NameArgs),
    /// List the runs that are over
    History(NameArgs),
}

/// What `rotation set` takes.
#[derive(clap::Args)]
pub(super) struct SetArgs {
    /// Secret
    name: SecretName,
    /// Definition, as TOML: rotator, schedule, and the rotator's own table; `-` is stdin
    #[arg(long, short, value_name = "FILE")]
    file: PathBuf,
}

/// Which rotation.
#[derive(clap::Args)]
pub(super) struct NameArgs {
    /// Secret
    name: SecretName,
}

/// What `rotation list` takes.
#[derive(clap::Args)]
pub(super) struct ListArgs {
    /// At most so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
}

/// Does one of them.
pub(super) async fn run(command: Command, context: &Context) -> Result<Exit, CliError> {
    match command {
        Command::Set(args) => set(args, context).await?,
        Command::Remove(args) => remove(args, context).await?,
        Command::Status(args) => status(args, context).await?,
        Command::List(args) => list(args, context).await?,
        Command::Pause(args) => pause(args, context).await?,
        Command::Resume(args) => resume(args, context).await?,
        Command::Abort(args) => abort(args, context).await?,
        Command::History(args) => history(args, context).await?,
    }
    Ok(Exit::DONE)
}

async fn set(args: SetArgs, context: &Context) -> Result<(), CliError> {
    let request = v1::SetRotationRequest {
        environment: context.environment()?.to_string(),
        name: args.name.to_string(),
        definition: definition(&args.file)?,
        reason: context.reason(),
    };
    let answer = connect(context).await?.rotations().set_rotation(request).await;
    let answer = answer.map_err(|status| of_file(&args.file, ClientError::from(status).into()))?;
    let shape = Shape::read(answer.into_inner().rotation)?;
    let now = context.clock.now();
    context.output.answer(&shape, || {
        let Shape { rotator, schedule, .. } = &shape;
        let next = when(shape.next_at, now);
        format!("{}: set, rotator {}, {}; next {next}", shape.id(), printable(rotator), printable(schedule))
    })
}

/// The broker says where in the definition something is wrong; which file that is, only this side knows.
fn of_file(file: &Path, mut error: CliError) -> CliError {
    if error.reason == Some(Reason::InvalidConfig) {
        error.message = format!("{}: {}", printable(&file.display().to_string()), error.message);
    }
    error
}

async fn remove(args: NameArgs, context: &Context) -> Result<(), CliError> {
    let environment = context.environment()?;
    let request = v1::RemoveRotationRequest {
        environment: environment.to_string(),
        name: args.name.to_string(),
        reason: context.reason(),
    };
    connect(context).await?.rotations().remove_rotation(request).await.map_err(ClientError::from)?;
    let shape = Removed { environment: environment.as_str(), name: args.name.as_str() };
    context.output.answer(&shape, || format!("{environment}:{}: its rotation is removed", args.name))
}

async fn status(args: NameArgs, context: &Context) -> Result<(), CliError> {
    let shape = get(args, context).await?;
    let now = context.clock.now();
    context.output.answer(&shape, || shape.text(now))
}

async fn history(args: NameArgs, context: &Context) -> Result<(), CliError> {
    let Shape { environment, name, history, .. } = get(args, context).await?;
    let shape = History { environment, name, history: history.unwrap_or_default() };
    context.output.answer(&shape, || ended_table(&shape.history))
}

async fn get(args: NameArgs, context: &Context) -> Result<Shape, CliError> {
    let request = v1::GetRotationRequest {
        environment: context.environment()?.to_string(),
        name: args.name.to_string(),
        reason: context.reason(),
    };
    let answer =
        connect(context).await?.rotations().get_rotation(request).await.map_err(ClientError::from)?;
    Shape::read(answer.into_inner().rotation)
}

async fn pause(args: NameArgs, context: &Context) -> Result<(), CliError> {
    let request = v1::PauseRotationRequest {
        environment: context.environment()?.to_string(),
        name: args.name.to_string(),
        reason: context.reason(),
    };
    let answer =
        connect(context).await?.rotations().pause_rotation(request).await.map_err(ClientError::from)?;
    let shape = Shape::read(answer.into_inner().rotation)?;
    context.output.answer(&shape, || {
        let run = if shape.run.is_some() { "; the run in progress comes to its end" } else { "" };
        format!("{}: paused{run}", shape.id())
    })
}

async fn resume(args: NameArgs, context: &Context) -> Result<(), CliError> {
    let request = v1::ResumeRotationRequest {
        environment: context.environment()?.to_string(),
        name: args.name.to_string(),
        reason: context.reason(),
    };
    let answer =
        connect(context).await?.rotations().resume_rotation(request).await.map_err(ClientError::from)?;
    let shape = Shape::read(answer.into_inner().rotation)?;
    let now = context.clock.now();
    context.output.answer(&shape, || match &shape.run {
        Some(_) => format!("{}: resumed; the run in progress is taken up now", shape.id()),
        None => format!("{}: resumed; next {}", shape.id(), when(shape.next_at, now)),
    })
}

async fn abort(args: NameArgs, context: &Context) -> Result<(), CliError> {
    let request = v1::AbortRotationRequest {
        environment: context.environment()?.to_string(),
        name: args.name.to_string(),
        reason: context.reason(),
    };
    let answer =
        connect(context).await?.rotations().abort_rotation(request).await.map_err(ClientError::from)?;
    let shape = Shape::read(answer.into_inner().rotation)?;
    context.output.answer(&shape, || match &shape.run {
        Some(_) => format!("{}: the run ends as soon as whoever works on it gets to it", shape.id()),
        None => format!("{}: no run is in progress any more", shape.id()),
    })
}

async fn list(args: ListArgs, context: &Context) -> Result<(), CliError> {
    let environment = context.environment()?;
    let limit = args.limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let mut client = connect(context).await?.rotations();
    let mut request = v1::ListRotationsRequest {
        environment: environment.to_string(),
        reason: context.reason(),
        ..v1::ListRotationsRequest::default()
    };
    let (mut rotations, mut more) = (Vec::new(), true);
    while more && rotations.len() < limit {
        let missing = limit.saturating_sub(rotations.len()).min(PAGE);
        request.page_size = i32::try_from(missing).unwrap_or(0);
        let page = client.list_rotations(request.clone()).await.map_err(ClientError::from)?.into_inner();
        more = !page.next_page_token.is_empty();
        if more && page.next_page_token == request.page_token {
            return Err(ClientError::malformed("gives the same page for ever").into());
        }
        request.page_token = page.next_page_token;
        rotations.extend(page.rotations.into_iter().map(Shape::brief));
    }
    let shape = List { environment: environment.as_str(), rotations, more };
    let now = context.clock.now();
    context.output.answer(&shape, || list_table(&shape.rotations, now))?;
    if more && !context.output.is_json() {
        context.output.notice("there are more; raise --limit");
    }
    Ok(())
}

/// A definition, from a file or stdin. What is in it is the broker's to judge; that it is not endless, ours.
fn definition(file: &Path) -> Result<String, CliError> {
    const MOST: u64 = 64 * 1024;
    let mut bytes = Vec::new();
    let read = match file == Path::new("-") {
        true => io::stdin().lock().take(MOST + 1).read_to_end(&mut bytes),
        false => File::open(file).and_then(|open| open.take(MOST + 1).read_to_end(&mut bytes)),
    };
    read.map_err(|error| CliError::file(file, format!("the definition can't be read: {error}")))?;
    if bytes.len() as u64 > MOST {
        return Err(CliError::file(file, format!("is larger than {MOST} bytes; a definition is not")));
    }
    String::from_utf8(bytes).map_err(|_| CliError::file(file, "is not UTF-8; a definition is TOML"))
}

#[derive(Serialize)]
struct Removed<'a> {
    environment: &'a str,
    name: &'a str,
}

#[derive(Serialize)]
struct List<'a> {
    environment: &'a str,
    rotations: Vec<Shape>,
    more: bool,
}

#[derive(Serialize)]
struct History {
    environment: String,
    name: String,
    history: Vec<Ended>,
}

#[derive(Serialize)]
struct Shape {
    environment: String,
    name: String,
    rotator: String,
    schedule: String,
    health: &'static str,
    next_at: Option<Timestamp>,
    rotated_at: Option<Timestamp>,
    min_gap_seconds: Option<i64>,
    run: Option<Run>,
    #[serde(skip_serializing_if = "Option::is_none")]
    history: Option<Vec<Ended>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    definition: Option<String>,
}

#[derive(Serialize)]
struct Run {
    version_id: Option<String>,
    phase: Option<String>,
    started_at: Option<Timestamp>,
    asked_by: String,
    attempt: u32,
    not_before: Option<Timestamp>,
    aborting: bool,
    trouble: Option<Trouble>,
}

#[derive(Serialize)]
struct Ended {
    ending: String,
    version_id: Option<String>,
    started_at: Option<Timestamp>,
    ended_at: Option<Timestamp>,
    asked_by: String,
    failures: u32,
}

impl From<v1::RotationRun> for Run {
    fn from(run: v1::RotationRun) -> Self {
        Self {
            version_id: given(run.version_id),
            phase: given(run.phase),
            started_at: output::time(run.started_at),
            asked_by: run.asked_by,
            attempt: run.attempt,
            not_before: output::time(run.not_before),
            aborting: run.aborting,
            trouble: run.trouble.map(Trouble::from),
        }
    }
}

impl From<v1::EndedRotation> for Ended {
    fn from(ended: v1::EndedRotation) -> Self {
        Self {
            ending: ended.ending,
            version_id: given(ended.version_id),
            started_at: output::time(ended.started_at),
            ended_at: output::time(ended.ended_at),
            asked_by: ended.asked_by,
            failures: ended.failures,
        }
    }
}

impl Shape {
    /// The rotation that an answer is about.
    fn read(rotation: Option<v1::Rotation>) -> Result<Self, CliError> {
        let mut rotation = rotation.ok_or_else(|| ClientError::malformed("holds no rotation"))?;
        let history = std::mem::take(&mut rotation.history).into_iter().map(Ended::from).collect();
        let definition = given(std::mem::take(&mut rotation.definition));
        Ok(Self { history: Some(history), definition, ..Self::brief(rotation) })
    }

    /// A rotation among others.
    fn brief(rotation: v1::Rotation) -> Self {
        Self {
            health: match rotation.health() {
                v1::RotationHealth::Idle => "idle",
                v1::RotationHealth::Running => "running",
                v1::RotationHealth::Degraded => "degraded",
                v1::RotationHealth::Blocked => "blocked",
                v1::RotationHealth::Paused => "paused",
                v1::RotationHealth::Unspecified => "unknown",
            },
            environment: rotation.environment,
            name: rotation.name,
            rotator: rotation.rotator,
            schedule: rotation.schedule,
            next_at: output::time(rotation.next_at),
            rotated_at: output::time(rotation.rotated_at),
            min_gap_seconds: rotation.min_gap.map(|gap| gap.seconds),
            run: rotation.run.map(Run::from),
            history: None,
            definition: None,
        }
    }

    fn id(&self) -> String {
        printable(&format!("{}:{}", self.environment, self.name))
    }

    fn text(&self, now: Timestamp) -> String {
        let gap = self.min_gap_seconds.map(|gap| format!("{:#}", SignedDuration::from_secs(gap)));
        let mut lines = vec![
            ("name", self.name.clone()),
            ("environment", self.environment.clone()),
            ("rotator", self.rotator.clone()),
            ("schedule", self.schedule.clone()),
            ("health", self.health.to_owned()),
            ("next", when(self.next_at, now)),
            ("rotated", when(self.rotated_at, now)),
            ("min gap", gap.unwrap_or_else(|| "-".to_owned())),
        ];
        lines.extend(self.run.iter().flat_map(|run| run.lines(now)));
        lines.iter().map(|(key, value)| format!("{key:<11}  {}\n", printable(value))).collect()
    }

    fn row(&self, now: Timestamp) -> [String; 6] {
        // Of a run in progress, it is the next try that comes next.
        let next = self.run.as_ref().map_or(self.next_at, |run| run.not_before);
        [
            self.name.clone(),
            self.rotator.clone(),
            self.schedule.clone(),
            self.health.to_owned(),
            when(next, now),
            when(self.rotated_at, now),
        ]
    }
}

impl Run {
    fn lines(&self, now: Timestamp) -> Vec<(&'static str, String)> {
        let shown = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        let aborting = if self.aborting { ", to be aborted" } else { "" };
        let mut lines = vec![
            ("run", format!("{} {}{aborting}", shown(&self.phase), shown(&self.version_id))),
            ("since", when(self.started_at, now)),
            ("asked by", self.asked_by.clone()),
            ("failures", self.attempt.to_string()),
            ("retry", when(self.not_before, now)),
        ];
        if let Some(trouble) = &self.trouble {
            lines.push(("trouble", format!("{}: {}", trouble.code, trouble.message)));
            lines.push(("mend", trouble.mend.clone()));
        }
        lines
    }
}

fn list_table(rotations: &[Shape], now: Timestamp) -> String {
    const HEADER: [&str; 6] = ["NAME", "ROTATOR", "SCHEDULE", "HEALTH", "NEXT", "ROTATED"];
    match rotations {
        [] => String::new(),
        rotations => table(HEADER, rotations.iter().map(|rotation| rotation.row(now))),
    }
}

fn ended_table(history: &[Ended]) -> String {
    const HEADER: [&str; 6] = ["ENDED", "ENDING", "VERSION", "BEGAN", "FAILURES", "ASKED BY"];
    let row = |ended: &Ended| {
        [
            moment(ended.ended_at),
            ended.ending.clone(),
            ended.version_id.clone().unwrap_or_else(|| "-".to_owned()),
            moment(ended.started_at),
            ended.failures.to_string(),
            ended.asked_by.clone(),
        ]
    };
    if history.is_empty() { String::new() } else { table(HEADER, history.iter().map(row)) }
}

#[cfg(test)]
mod tests {
    use super::super::tests::refusal;
    use super::*;
    use crate::error::Reason;

    fn at(second: i64) -> Option<prost_types::Timestamp> {
        Some(prost_types::Timestamp { seconds: second, nanos: 0 })
    }

    fn second(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn idle() -> v1::Rotation {
        v1::Rotation {
            environment: "development".to_owned(),
            name: "jwt".to_owned(),
            rotator: "jwt-secret".to_owned(),
            schedule: "every 30d".to_owned(),
            health: v1::RotationHealth::Idle.into(),
            next_at: at(30 * 86_400),
            min_gap: Some(prost_types::Duration { seconds: 330, nanos: 0 }),
            definition: "rotator = \"jwt-secret\"\n".to_owned(),
            ..Default::default()
        }
    }

    fn blocked() -> v1::Rotation {
        let trouble = v1::RotationTrouble {
            code: "wrong_target".to_owned(),
            message: "another server answers\u{1b}[2J".to_owned(),
            mend: "find out what answers".to_owned(),
            needs_person: true,
        };
        let run = v1::RotationRun {
            version_id: "v".repeat(32),
            phase: "set".to_owned(),
            started_at: at(0),
            asked_by: "schedule".to_owned(),
            attempt: 3,
            not_before: at(7_260),
            trouble: Some(trouble),
            aborting: false,
        };
        v1::Rotation {
            health: v1::RotationHealth::Blocked.into(),
            next_at: None,
            rotated_at: at(-86_400 * 3),
            run: Some(run),
            ..idle()
        }
    }

    #[test]
    fn a_status_says_when_the_next_one_is() {
        let shape = Shape::read(Some(idle())).unwrap();
        assert_eq!(
            shape.text(second(0)),
            "name         jwt\nenvironment  development\nrotator      jwt-secret\nschedule     every 30d\n\
             health       idle\nnext         1970-01-31T00:00:00Z (in 30 d)\nrotated      -\n\
             min gap      5m 30s\n"
        );
    }

    #[test]
    fn a_status_says_what_is_in_the_way_and_the_mend() {
        let shown = Shape::read(Some(blocked())).unwrap().text(second(60));
        let run = format!("run          set {}\n", "v".repeat(32));
        for line in [
            "health       blocked\nnext         -\nrotated      1969-12-29T00:00:00Z (3 d ago)\n",
            run.as_str(),
            "since        1970-01-01T00:00:00Z (1 min ago)\n",
            "asked by     schedule\nfailures     3\nretry        1970-01-01T02:01:00Z (in 2 h)\n",
            "trouble      wrong_target: another server answers\\u{1b}[2J\n",
            "mend         find out what answers\n",
        ] {
            assert!(shown.contains(line), "{line} in {shown}");
        }
    }

    #[test]
    fn json_is_whole_for_one_and_brief_among_others() {
        let whole = serde_json::to_value(Shape::read(Some(blocked())).unwrap()).unwrap();
        assert_eq!((&whole["health"], &whole["run"]["phase"]), (&"blocked".into(), &"set".into()));
        assert_eq!(whole["run"]["trouble"]["code"], "wrong_target");
        assert_eq!(
            (&whole["min_gap_seconds"], &whole["rotated_at"]),
            (&330.into(), &"1969-12-29T00:00:00Z".into())
        );
        assert!(whole["next_at"].is_null() && whole["history"].as_array().unwrap().is_empty());
        assert_eq!(whole["definition"], "rotator = \"jwt-secret\"\n");
        let brief = serde_json::to_value(Shape::brief(idle())).unwrap();
        assert!(
            brief.get("definition").is_none() && brief.get("history").is_none() && brief["run"].is_null()
        );
        assert!(Shape::read(None).is_err());
    }

    #[test]
    fn rotations_and_ended_runs_are_tables_and_none_are_nothing() {
        let shown = list_table(&[idle(), blocked()].map(Shape::brief), second(0));
        let lines: Vec<&str> = shown.lines().collect();
        assert!(lines[0].starts_with("NAME  ROTATOR     SCHEDULE   HEALTH"), "{shown}");
        assert!(lines[1].ends_with("idle     1970-01-31T00:00:00Z (in 30 d)  -"), "{shown}");
        assert!(lines[2].contains("1970-01-01T02:01:00Z (in 2 h)"), "the next try: {shown}");
        let ended = v1::EndedRotation {
            ending: "superseded".to_owned(),
            started_at: at(0),
            ended_at: at(60),
            asked_by: "User::\"ana\"".to_owned(),
            failures: 2,
            ..Default::default()
        };
        assert_eq!(
            ended_table(&[ended.into()]),
            "ENDED                 ENDING      VERSION  BEGAN                 FAILURES  ASKED BY\n\
             1970-01-01T00:01:00Z  superseded  -        1970-01-01T00:00:00Z  2         User::\"ana\"\n"
        );
        assert_eq!((list_table(&[], second(0)), ended_table(&[])), (String::new(), String::new()));
    }

    #[test]
    fn a_definition_is_text_of_a_bounded_length() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rotation.toml");
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            definition(&path)
        };
        assert_eq!(read(b"rotator = \"random\"\n").unwrap(), "rotator = \"random\"\n");
        assert_eq!(read(&vec![b'#'; 64 * 1024]).unwrap().len(), 64 * 1024);
        for bad in [&vec![b'#'; 64 * 1024 + 1][..], b"a\xff"] {
            let error = read(bad).unwrap_err();
            assert_eq!(error.reason, Some(Reason::InvalidArgument));
            assert!(error.message.contains("rotation.toml"), "{}", error.message);
        }
        assert!(definition(Path::new("/nonexistent/x.toml")).unwrap_err().message.contains("can't be read"));
    }

    #[test]
    fn what_is_missing_is_refused() {
        for arguments in [
            &["rotation"][..],
            &["rotation", "set", "jwt"],
            &["rotation", "status"],
            &["rotation", "list", "--limit", "0"],
            &["rotation", "pause", "a//b"],
        ] {
            assert_eq!(refusal(arguments).exit_code(), 2, "{arguments:?}");
        }
    }
}
