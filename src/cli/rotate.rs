//! `claviger rotate`: secrets get a new version now, or where they are due.
//!
//! ```text
//! NAME        {"environment","name","result","version_id","phase","trouble":{…},"retry_at","due_at","error":{…}}
//! NAME NAME…  {"rotations":[the same],"done","total"}
//! --due       the same
//!
//! result   rotated, in_progress, skipped · superseded, aborted: over without a new version
//!          unfinished: tried again at retry_at · blocked: needs a person · refused: did not begin
//!          due: with --dry-run · null: nobody said how it ended; phase is how far it was
//! trouble  {"code","message","mend","needs_person"}
//! error    {"reason","message","request_id"}
//! ```
//! For people, a line on stdout for each secret, and on stderr what is in its way, what happened, and the mend.
//!
//! It is the broker who rotates: whoever interrupts this command stops looking, and nothing else.

use std::collections::BTreeSet;

use futures_util::StreamExt as _;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::connect::connect;
use super::output::Output;
use super::progress::Progress;
use super::rotated::{Rotation, exit_of, worst};
use super::{CliError, Context, Exit};
use crate::client::{ClientError, Connection};
use crate::error::Reason;
use crate::proto::v1;
use crate::secret::SecretName;

const LASTS: &str = "A rotation takes as long as its target does; --timeout bounds its start alone. Of several \
                     secrets, the worst decides the exit code: 1, 3, 7, 4, 2, 6, 5, 0.";

/// How many secrets are asked for at once. The broker has bounds of its own on how many it works on.
const AT_ONCE: usize = 32;

/// What `rotate` takes.
#[derive(clap::Args)]
#[command(after_help = LASTS)]
pub(super) struct Args {
    /// Secrets to rotate now
    #[arg(value_name = "NAME", required_unless_present = "due", conflicts_with = "due")]
    names: Vec<SecretName>,
    /// All that are due and that you may rotate: of the environment, where one is chosen, else of all
    #[arg(long, conflicts_with_all = ["wait", "no_wait"])]
    due: bool,
    /// Only show what is due
    #[arg(long, requires = "due", conflicts_with = "names")]
    dry_run: bool,
    /// Wait until it is over, also through failures that may pass; the default
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Try once, and don't wait for what someone else is rotating
    #[arg(long, overrides_with = "wait")]
    no_wait: bool,
}

impl Args {
    const fn waits(&self) -> bool {
        self.wait || !self.no_wait
    }
}

/// Rotates.
pub(super) async fn run(args: Args, context: &Context) -> Result<Exit, CliError> {
    match args.due {
        true => rotate_due(args.dry_run, context).await,
        false => rotate_names(args, context).await,
    }
}

async fn rotate_names(args: Args, context: &Context) -> Result<Exit, CliError> {
    let environment = context.environment()?;
    let wait = args.waits();
    let names: BTreeSet<SecretName> = args.names.into_iter().collect();
    let mut seen = Seen { total: names.len() as u64, ..Seen::default() };
    let watcher = Watcher::new(seen.total, context).await?;
    let all = async {
        let requests = names.iter().map(|name| v1::RotateRequest {
            environment: environment.to_string(),
            name: name.to_string(),
            wait,
            reason: context.reason(),
        });
        let runs = futures_util::stream::iter(requests.map(|request| watcher.rotate(request)));
        let mut runs = runs.buffer_unordered(AT_ONCE);
        while let Some(rotation) = runs.next().await {
            watcher.bar.one_more();
            watcher.bar.aside(|| rotation.show(context))?;
            seen.done += u64::from(rotation.error.is_none());
            seen.rotations.push(rotation);
        }
        Ok::<_, CliError>(())
    };
    let looked = unless_interrupted(all).await?;
    drop(watcher);
    let interrupted = looked.is_none();
    looked.transpose()?;
    if context.output.is_json() {
        seen.rotations.sort_by(|a, b| a.name.cmp(&b.name));
        match seen.rotations.as_slice() {
            // Where nothing is known but an error, the error is all there is to say.
            [only] if seen.total == 1 && only.is_known() => context.output.json(only)?,
            _ if seen.total == 1 => {}
            _ => context.output.json(&seen)?,
        }
    }
    Ok(seen.conclude(wait, interrupted, context.output))
}

async fn rotate_due(dry_run: bool, context: &Context) -> Result<Exit, CliError> {
    let environment = context.chosen_environment()?;
    let request = v1::RotateDueRequest {
        environment: environment.map(|name| name.to_string()).unwrap_or_default(),
        dry_run,
        reason: context.reason(),
    };
    let mut seen = Seen::default();
    let watcher = Watcher::new(0, context).await?;
    let looked = unless_interrupted(watcher.rotate_due(request, &mut seen)).await?;
    drop(watcher);
    let interrupted = looked.is_none();
    match looked.transpose() {
        // It did not begin.
        Err(error) if !seen.begun => return Err(error),
        Err(error) => seen.broken = Some(error),
        Ok(_) => {}
    }
    match context.output.is_json() {
        true => context.output.json(&seen)?,
        false if seen.total == 0 && seen.broken.is_none() && context.output.is_terminal() => {
            context.output.notice("nothing is due");
        }
        false => {}
    }
    Ok(seen.conclude(false, interrupted, context.output))
}

/// What `work` comes to; `None`: the caller pressed Ctrl-C first.
async fn unless_interrupted<T>(work: impl Future<Output = T>) -> Result<Option<T>, CliError> {
    let failed =
        |error: std::io::Error| CliError::new(Reason::Internal, format!("signals can't be handled: {error}"));
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    Ok(tokio::select! {
        done = work => Some(done),
        _ = interrupt.recv() => None,
    })
}

/// Who looks at rotations while they go on.
struct Watcher<'a> {
    connection: Connection,
    bar: Progress,
    context: &'a Context,
}

impl<'a> Watcher<'a> {
    async fn new(total: u64, context: &'a Context) -> Result<Self, CliError> {
        let connection = connect(context).await?;
        Ok(Self { connection, bar: Progress::new(total, context.output), context })
    }

    /// Rotates one secret, and gives how that came out or how far it could be followed.
    async fn rotate(&self, request: v1::RotateRequest) -> Rotation {
        let mut rotation = Rotation::of(request.environment.clone(), request.name.clone());
        if let Err(error) = self.follow(request, &mut rotation).await {
            rotation.fail(error);
        }
        rotation
    }

    async fn follow(&self, request: v1::RotateRequest, rotation: &mut Rotation) -> Result<(), CliError> {
        let wait = request.wait;
        let mut client = self.connection.rotations_without_deadline();
        let mut steps = self.in_time(client.rotate(request)).await?.into_inner();
        while let Some(message) = steps.message().await.map_err(ClientError::from)? {
            let step = message.step.ok_or_else(|| ClientError::malformed("holds no step"))?;
            rotation.take(step);
            self.bar.at(&rotation.doing());
            if wait && rotation.result.as_deref() == Some("unfinished") && !self.context.output.is_json() {
                let line = rotation.waited_through(self.context.clock.now());
                self.bar.aside(|| self.context.output.notice(&line));
            }
        }
        match rotation.result {
            Some(_) => Ok(()),
            None => Err(ClientError::malformed("ends before the rotation does").into()),
        }
    }

    /// Rotates what is due, and notes what is said of it.
    async fn rotate_due(&self, request: v1::RotateDueRequest, seen: &mut Seen) -> Result<(), CliError> {
        let dry_run = request.dry_run;
        let mut client = self.connection.rotations_without_deadline();
        let mut steps = self.in_time(client.rotate_due(request)).await?.into_inner();
        while let Some(message) = steps.message().await.map_err(ClientError::from)? {
            let v1::RotateDueResponse { step, done, total } = message;
            (seen.begun, seen.done, seen.total) = (true, done, total);
            self.bar.reached(done, total);
            let Some(step) = step else { continue };
            let mut rotation = Rotation::of(step.environment.clone(), step.name.clone());
            rotation.take(step);
            self.bar.at(&rotation.doing());
            if dry_run {
                rotation.only_asked();
            }
            if rotation.result.is_some() {
                self.bar.aside(|| rotation.show(self.context))?;
                seen.rotations.push(rotation);
            }
        }
        Ok(())
    }

    /// The beginning of an answer, within `--timeout`.
    async fn in_time<T>(
        &self,
        begins: impl Future<Output = Result<T, tonic::Status>>,
    ) -> Result<T, CliError> {
        let longest = self.context.global.timeout;
        match tokio::time::timeout(longest, begins).await {
            Ok(begun) => Ok(begun.map_err(ClientError::from)?),
            Err(_) => {
                let message = format!(
                    "nothing was heard of the rotation within {longest:?}; it may still begin; raise --timeout"
                );
                Err(CliError::new(Reason::DeadlineExceeded, message))
            }
        }
    }
}

/// What was seen of several rotations.
#[derive(Default, Serialize)]
struct Seen {
    rotations: Vec<Rotation>,
    done: u64,
    total: u64,
    #[serde(skip)]
    begun: bool,
    /// Why not all was seen.
    #[serde(skip)]
    broken: Option<CliError>,
}

impl Seen {
    /// Says why not all was seen, where it was not, and how the command ends.
    fn conclude(&self, waited: bool, interrupted: bool, output: Output) -> Exit {
        let Self { done, total, .. } = self;
        if interrupted {
            output.notice(&format!(
                "interrupted, with {done} of {total} over; what has begun goes on in the broker, and `claviger \
                 rotation list` shows how it is"
            ));
            return Exit::INTERRUPTED;
        }
        self.broken.iter().for_each(|error| output.error(error));
        let missed = total.saturating_sub(self.rotations.len() as u64);
        if missed > 0 {
            output.notice(&format!(
                "{done} of {total} are over; of the others, what has begun is gone on with by itself, the rest stays due, \
                 and `claviger rotation list` shows how they are"
            ));
        }
        let exits = self.rotations.iter().map(|rotation| rotation.exit(waited));
        let missed = (missed > 0).then(|| exit_of(Reason::RotationUnfinished));
        worst(exits.chain(self.broken.iter().map(CliError::exit)).chain(missed))
    }
}

#[cfg(test)]
mod tests {
    use super::super::output::Format;
    use super::super::tests::refusal;
    use super::*;
    use clap::Parser as _;

    fn rotation(result: &str) -> Rotation {
        let mut rotation = Rotation::of("development".to_owned(), "jwt".to_owned());
        rotation.take(v1::RotationStep { result: result.to_owned(), ..Default::default() });
        rotation
    }

    #[test]
    fn what_was_not_heard_of_counts_as_not_over() {
        let output = Output::new(Format::Text);
        let seen = |total| Seen { rotations: vec![rotation("rotated")], done: 1, total, ..Seen::default() };
        assert_eq!(seen(1).conclude(false, false, output), Exit::DONE);
        assert_eq!(seen(2).conclude(false, false, output), exit_of(Reason::Unavailable));
        assert_eq!(seen(2).conclude(false, true, output), Exit::INTERRUPTED);
        let broken = Some(CliError::new(Reason::Denied, "you may not any more"));
        assert_eq!(Seen { broken, ..seen(2) }.conclude(false, false, output), exit_of(Reason::Denied));
    }

    #[test]
    fn json_is_stable() {
        let seen = Seen { rotations: vec![rotation("rotated")], done: 1, total: 2, ..Seen::default() };
        assert_eq!(
            serde_json::to_string(&seen).unwrap(),
            "{\"rotations\":[{\"environment\":\"development\",\"name\":\"jwt\",\"result\":\"rotated\",\
             \"version_id\":null,\"phase\":null,\"trouble\":null,\"retry_at\":null,\"due_at\":null,\"error\":null}],\
             \"done\":1,\"total\":2}"
        );
    }

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn it_waits_unless_it_is_told_not_to() {
        let waits = |arguments: &[&str]| {
            let arguments = ["rotate", "jwt"].iter().chain(arguments);
            Line::try_parse_from(arguments).ok().unwrap().args.waits()
        };
        assert!(waits(&[]) && waits(&["--wait"]) && waits(&["--no-wait", "--wait"]));
        assert!(!waits(&["--no-wait"]) && !waits(&["--wait", "--no-wait"]));
    }

    #[test]
    fn names_or_what_is_due_is_asked_for() {
        for arguments in [
            &["rotate"][..],
            &["rotate", "jwt", "--due"],
            &["rotate", "jwt", "--dry-run"],
            &["rotate", "--dry-run"],
            &["rotate", "--due", "--no-wait"],
            &["rotate", "a//b"],
        ] {
            assert_eq!(refusal(arguments).exit_code(), 2, "{arguments:?}");
        }
    }
}
