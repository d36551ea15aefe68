//! `claviger exec`: what a command needs, read in one round trip, put into its environment; then it is the command's.
//!
//! ```text
//! manifest ─▶ variables ─▶ BatchGetSecrets ─▶ inject::resolve ─▶ inject::compose ─▶ inject::exec::replace
//! no manifest ──────────▶ all that the caller may read ─▶ inject::from_secrets ─┘
//! ```
//!
//! Whatever goes wrong before the command runs ends with 125, so that nobody takes it for the command's own code; a
//! command that can't be executed ends with 126, one that is not found with 127.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, IsTerminal as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{self, SignalKind};

use super::connect::connect;
use super::{CliError, Context, Exit};
use crate::client::{self, ClientError, Connection};
use crate::error::{Reason, Reasoned as _};
use crate::inject::exec::ExecError;
use crate::inject::{self, ChildEnvironment, Existing, InjectError, Manifest, Options, Variables};
use crate::proto::v1;
use crate::secret::{EnvironmentName, SecretId, SecretName, SecretValue};

/// The file that is looked for beside the caller's code.
const MANIFEST: &str = "claviger.toml";
/// The most that one batch asks for (see `BatchGetSecretsRequest`).
const BATCH: usize = 500;

/// What `exec` takes.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Manifest; else claviger.toml here or in a folder above; else everything that you may read
    #[arg(short, long, value_name = "FILE")]
    manifest: Option<PathBuf>,
    /// Hand down nothing of this environment but PATH, HOME, USER, TERM, the language and the like
    #[arg(long)]
    pristine: bool,
    /// Where this environment has a variable too, keep its value, not the secret
    #[arg(long)]
    parent_wins: bool,
    /// Command with its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Becomes the command. Returns only where it does not.
pub(super) async fn run(args: Args, context: &Context) -> Result<Exit, CliError> {
    match prepare(&args, context).await {
        Ok(environment) => Err(not_run(&inject::exec::replace(&args.command, environment))),
        Err(error) => Err(error.before_command()),
    }
}

async fn prepare(args: &Args, context: &Context) -> Result<ChildEnvironment, CliError> {
    let environment = context.environment()?;
    let manifest = manifest(args)?;
    let connection = connect(context).await?;
    let variables = variables(&connection, manifest.as_ref(), &environment, context).await?;
    let existing = if args.parent_wins { Existing::ParentWins } else { Existing::SecretWins };
    let parent = context.environ.iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
    let (child, notices) =
        inject::compose(parent, &variables, Options { pristine: args.pristine, existing })?;
    notices.iter().for_each(|notice| context.output.notice(&notice.to_string()));
    Ok(child)
}

fn manifest(args: &Args) -> Result<Option<Manifest>, CliError> {
    let path = match &args.manifest {
        Some(path) => Some(path.clone()),
        None => {
            let here = std::fs::canonicalize(".").map_err(|error| {
                CliError::usage(format!("the current folder can't be read: {error}; name a manifest with -m"))
            })?;
            find_manifest(&here)?
        }
    };
    Ok(path.as_deref().map(Manifest::load).transpose()?)
}

/// The manifest in this folder, or in the nearest one above it. One that was come across and not named must be the
/// caller's own or root's: anyone may leave one in a shared folder, and it decides what a command finds.
fn find_manifest(here: &Path) -> Result<Option<PathBuf>, CliError> {
    let mut places = here.ancestors().map(|folder| folder.join(MANIFEST));
    let Some((path, found)) = places.find_map(|path| Some((path.clone(), std::fs::metadata(&path).ok()?)))
    else {
        return Ok(None);
    };
    if !belongs(found.uid(), rustix::process::geteuid().as_raw()) {
        let problem =
            format!("belongs to uid {}, not to you; where you trust it, name it with -m", found.uid());
        return Err(CliError::file(&path, problem));
    }
    Ok(Some(path))
}

const fn belongs(owner: u32, own: u32) -> bool {
    owner == own || owner == 0
}

/// The variables that a manifest asks for in this environment; without one, what every secret gives that the caller
/// may read. Says on stderr what is worth a word.
///
/// # Errors
/// Where the broker can't be asked; every variable that is missing or not usable, at once.
pub(super) async fn variables(
    connection: &Connection,
    manifest: Option<&Manifest>,
    environment: &EnvironmentName,
    context: &Context,
) -> Result<Variables, CliError> {
    let variables = match manifest {
        Some(manifest) => asked_for(connection, manifest, environment, context).await?,
        None => everything(connection, environment, context).await?,
    };
    variables.notices().iter().for_each(|notice| context.output.notice(&notice.to_string()));
    Ok(variables)
}

type Answers = BTreeMap<SecretId, Result<SecretValue, ClientError>>;

async fn asked_for(
    connection: &Connection,
    manifest: &Manifest,
    environment: &EnvironmentName,
    context: &Context,
) -> Result<Variables, CliError> {
    let wanted = manifest.variables_for(environment);
    let ids = inject::references(&wanted, environment);
    let mut answers = Answers::new();
    for some in ids.chunks(BATCH) {
        answers.extend(ask(connection, some, context).await?);
    }
    let answer = |id: &SecretId| match answers.get(id) {
        Some(Ok(value)) => Ok(value.clone()),
        Some(Err(error)) => Err(format!("{} [{}]", error.message, error.reason)),
        None => Err("the broker did not answer for it".to_owned()),
    };
    inject::resolve(&wanted, environment, &answer).map_err(|error| not_usable(&error, &answers))
}

async fn ask(connection: &Connection, ids: &[SecretId], context: &Context) -> Result<Answers, CliError> {
    let items = ids.iter().map(|id| v1::SecretQuery {
        environment: id.environment.to_string(),
        name: id.name.to_string(),
        ..v1::SecretQuery::default()
    });
    let request = v1::BatchGetSecretsRequest {
        items: items.collect(),
        reason: context.reason(),
        ..v1::BatchGetSecretsRequest::default()
    };
    let results = batch(connection, request, context).await?;
    if results.len() != ids.len() {
        return Err(ClientError::malformed("has another number of results than it was asked for").into());
    }
    let values = results.into_iter().map(|result| result.and_then(|(_, value)| value));
    Ok(ids.iter().cloned().zip(values).collect())
}

async fn everything(
    connection: &Connection,
    environment: &EnvironmentName,
    context: &Context,
) -> Result<Variables, CliError> {
    let request = v1::BatchGetSecretsRequest {
        all_in_environment: environment.to_string(),
        reason: context.reason(),
        ..v1::BatchGetSecretsRequest::default()
    };
    let (mut secrets, mut problems) = (Vec::new(), Vec::new());
    for result in batch(connection, request, context).await? {
        match result.and_then(|(name, value)| Ok((name, value?))) {
            Ok((name, value)) => {
                let name = SecretName::parse(&name)
                    .map_err(|_| ClientError::malformed("has a name that is none"))?;
                secrets.push((name, value));
            }
            Err(error) => problems.push(error),
        }
    }
    if !problems.is_empty() {
        let reason = shared(problems.iter().map(|problem| problem.reason));
        let lines: Vec<String> =
            problems.iter().map(|problem| format!("{} [{}]", problem.message, problem.reason)).collect();
        return Err(CliError::new(reason, started_nothing(lines.len(), "secrets", &lines.join("\n"))));
    }
    context.output.notice(&format!(
        "there is no {MANIFEST}; all {} secrets that you may read in {environment} are injected",
        secrets.len()
    ));
    inject::from_secrets(secrets).map_err(|error| not_usable(&error, &Answers::new()))
}

/// A name with its value or what is wrong with that, or why it was not read.
type BatchResult = Result<(String, Result<SecretValue, ClientError>), ClientError>;

async fn batch(
    connection: &Connection,
    request: v1::BatchGetSecretsRequest,
    context: &Context,
) -> Result<Vec<BatchResult>, CliError> {
    use v1::batch_get_secrets_result::Result as Outcome;
    let answer = connection.secrets().batch_get_secrets(request).await.map_err(ClientError::from)?;
    let mut stale = 0_usize;
    let results = answer.into_inner().results.into_iter().map(|result| match result.result {
        Some(Outcome::Secret(secret)) => {
            stale += usize::from(secret.stale);
            let payload = secret.payload.ok_or_else(|| ClientError::malformed("holds no value"));
            Ok((secret.name, payload.and_then(client::received)))
        }
        Some(Outcome::Problem(problem)) => Err(problem.into()),
        None => Err(ClientError::malformed("leaves an item out")),
    });
    let results = results.collect();
    if stale > 0 {
        context
            .output
            .notice(&format!("the store can't be reached; {stale} values are past their time to live"));
    }
    Ok(results)
}

/// Every fault at once. Where a reference was not answered, the answer's own reason says why.
fn not_usable(error: &InjectError, answers: &Answers) -> CliError {
    let InjectError::Variables(problems) = error else {
        return CliError::new(error.reason(), error.to_string());
    };
    let unanswered: Vec<&ClientError> = answers.values().filter_map(|answer| answer.as_ref().err()).collect();
    let own = problems.iter().map(|problem| problem.reason);
    let own = own.filter(|reason| unanswered.is_empty() || *reason != Reason::Unavailable);
    let reason = shared(own.chain(unanswered.iter().map(|answer| answer.reason)));
    match unanswered.split_first() {
        // One fault, however many variables it keeps from being set.
        Some((first, others))
            if reason == Reason::EnvironmentNotFound
                && others.iter().all(|other| other.message == first.message) =>
        {
            CliError::new(reason, format!("the command was not started; {}", first.message))
        }
        _ => CliError::new(reason, started_nothing(problems.len(), "variables", &error.to_string())),
    }
}

/// The reason that all share; where they differ, what they have in common is that a value is missing or not usable.
fn shared(reasons: impl IntoIterator<Item = Reason>) -> Reason {
    let mut reasons = reasons.into_iter();
    match reasons.next() {
        Some(first) if reasons.all(|reason| reason == first) => first,
        _ => Reason::InvalidValue,
    }
}

fn started_nothing(count: usize, what: &str, lines: &str) -> String {
    format!("the command was not started; {what} that are missing or not usable: {count}\n{lines}")
}

/// Runs a command beside this process and gives its exit code, or 128+N where signal N ended it. Signals that ask this
/// process to end are the command's to answer.
///
/// # Errors
/// Where the command can't be run or waited for.
pub(super) async fn run_to_its_end(
    command: &[OsString],
    environment: ChildEnvironment,
) -> Result<Exit, CliError> {
    // Before there is a child, so that none is lost.
    let mut signals = Signals::catch()?;
    let mut child = inject::exec::spawn(command, environment).map_err(|error| not_run(&error))?;
    let process = Pid::from_child(&child);
    let mut ended = tokio::task::spawn_blocking(move || child.wait());
    loop {
        tokio::select! {
            status = &mut ended => {
                let failed = |error: &dyn std::fmt::Display| {
                    CliError::new(Reason::Internal, format!("the command can't be waited for: {error}"))
                };
                let status = status.map_err(|error| failed(&error))?.map_err(|error| failed(&error))?;
                return Ok(Exit::of_child(inject::exec::exit_code_of(status)));
            }
            signal = signals.next() => pass_on(process, signal),
        }
    }
}

/// A terminal sends its signals to both; a second one would look like a second Ctrl-C.
fn pass_on(process: Pid, signal: Signal) {
    let from_terminal = (signal == Signal::INT || signal == Signal::QUIT) && io::stdin().is_terminal();
    if !from_terminal {
        // A child that has just ended needs no signal.
        let _ = kill_process(process, signal);
    }
}

struct Signals {
    terminate: unix::Signal,
    hang_up: unix::Signal,
    interrupt: unix::Signal,
    quit: unix::Signal,
}

impl Signals {
    fn catch() -> Result<Self, CliError> {
        let catch = |kind| {
            unix::signal(kind).map_err(|error| {
                CliError::new(Reason::Internal, format!("signals can't be handled: {error}"))
            })
        };
        Ok(Self {
            terminate: catch(SignalKind::terminate())?,
            hang_up: catch(SignalKind::hangup())?,
            interrupt: catch(SignalKind::interrupt())?,
            quit: catch(SignalKind::quit())?,
        })
    }

    async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => Signal::TERM,
            _ = self.hang_up.recv() => Signal::HUP,
            _ = self.interrupt.recv() => Signal::INT,
            _ = self.quit.recv() => Signal::QUIT,
        }
    }
}

fn not_run(error: &ExecError) -> CliError {
    CliError::new(error.reason(), error.to_string()).with_exit(Exit::of_child(error.exit_code()))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{context, refusal};
    use super::*;
    use crate::inject::VariableProblem;

    fn args() -> Args {
        Args { manifest: None, pristine: false, parent_wins: false, command: vec!["true".into()] }
    }

    #[test]
    fn the_nearest_manifest_is_found() {
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        assert_eq!(find_manifest(&deep).unwrap().filter(|path| path.starts_with(root.path())), None);
        std::fs::write(root.path().join(MANIFEST), "").unwrap();
        assert_eq!(find_manifest(&deep).unwrap(), Some(root.path().join(MANIFEST)));
        std::fs::write(root.path().join("a").join(MANIFEST), "").unwrap();
        assert_eq!(find_manifest(&deep).unwrap(), Some(root.path().join("a").join(MANIFEST)));
    }

    #[test]
    fn a_manifest_that_was_come_across_is_ones_own_or_roots() {
        assert!(belongs(1000, 1000) && belongs(0, 1000));
        assert!(!belongs(1001, 1000) && !belongs(1000, 0));
    }

    #[tokio::test]
    async fn what_fails_before_the_command_is_125() {
        let missing = Args { manifest: Some("/nonexistent/claviger.toml".into()), ..args() };
        let nowhere = ["-e", "development", "-a", "unix:///nonexistent/x.sock"];
        let error = run(missing, &context(&nowhere, &[])).await.unwrap_err();
        assert_eq!((error.exit(), error.reason), (Exit::of_child(125), Some(Reason::InvalidConfig)));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(MANIFEST);
        std::fs::write(&path, "[env]\nA = \"a\"\n").unwrap();
        let unreachable = || Args { manifest: Some(path.clone()), ..args() };
        let error = run(unreachable(), &context(&nowhere, &[])).await.unwrap_err();
        assert_eq!((error.exit(), error.reason), (Exit::of_child(125), Some(Reason::Unavailable)));
        let error = run(unreachable(), &context(&[], &[])).await.unwrap_err();
        assert_eq!(error.exit(), Exit::of_child(125));
        assert!(error.message.contains("CLAVIGER_ENV"), "{}", error.message);
    }

    #[test]
    fn a_command_stands_behind_two_dashes() {
        assert_eq!(refusal(&["exec", "ls"]).exit_code(), 2);
        assert_eq!(refusal(&["exec", "--"]).exit_code(), 2);
        assert_eq!(refusal(&["exec"]).exit_code(), 2);
    }

    #[test]
    fn every_fault_has_its_line_and_the_answers_reason_counts() {
        let problem = |subject: &str| VariableProblem {
            subject: subject.to_owned(),
            problem: "no".to_owned(),
            reason: Reason::Unavailable,
        };
        let error = InjectError::Variables(vec![problem("A (x)"), problem("B (y)")]);
        let denied = ClientError { reason: Reason::Denied, ..ClientError::malformed("x") };
        let answers = Answers::from([(SecretId::parse("development", "x").unwrap(), Err(denied))]);
        let shown = not_usable(&error, &answers);
        assert_eq!(shown.reason, Some(Reason::Denied));
        assert_eq!(
            shown.message,
            "the command was not started; variables that are missing or not usable: 2\nA (x): no\nB (y): no"
        );
    }

    #[test]
    fn faults_of_different_kinds_share_no_reason() {
        assert_eq!(shared([Reason::Denied, Reason::Denied]), Reason::Denied);
        assert_eq!(shared([Reason::Denied, Reason::SecretNotFound]), Reason::InvalidValue);
    }

    #[test]
    fn an_environment_that_is_not_declared_is_said_once() {
        let problem = |subject: &str| VariableProblem {
            subject: subject.to_owned(),
            problem: "no".to_owned(),
            reason: Reason::Unavailable,
        };
        let error = InjectError::Variables(vec![problem("A (x)"), problem("B (y)")]);
        let undeclared = || ClientError {
            reason: Reason::EnvironmentNotFound,
            message: "environment `nowhere` is not declared".to_owned(),
            ..ClientError::malformed("x")
        };
        let id = |name| SecretId::parse("nowhere", name).unwrap();
        let mut answers = Answers::from([(id("x"), Err(undeclared())), (id("y"), Err(undeclared()))]);
        let shown = not_usable(&error, &answers);
        assert_eq!(shown.reason, Some(Reason::EnvironmentNotFound));
        assert_eq!(shown.message, "the command was not started; environment `nowhere` is not declared");
        answers.insert(id("y"), Err(ClientError { reason: Reason::Denied, ..undeclared() }));
        let shown = not_usable(&error, &answers);
        assert_eq!(shown.reason, Some(Reason::InvalidValue));
        assert!(shown.message.contains("A (x)") && shown.message.contains("B (y)"), "{}", shown.message);
    }

    #[tokio::test]
    async fn a_command_beside_this_process_ends_it_with_its_own_code() {
        let environment = || {
            let path = [("PATH".into(), std::env::var_os("PATH").unwrap_or_default())];
            inject::compose(path, &Variables::default(), Options::default()).unwrap().0
        };
        let command = |script: &str| -> Vec<OsString> { vec!["sh".into(), "-c".into(), script.into()] };
        let exit = run_to_its_end(&command("exit 42"), environment()).await.unwrap();
        assert_eq!(exit, Exit::of_child(42));
        let exit = run_to_its_end(&command("kill -TERM $$"), environment()).await.unwrap();
        assert_eq!(exit, Exit::of_child(128 + 15));
        let error = run_to_its_end(&["no-such-command-anywhere".into()], environment()).await.unwrap_err();
        assert_eq!(error.exit(), Exit::of_child(127));
    }
}
