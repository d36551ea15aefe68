//! The command line: parse, ask a broker, print. One file per subcommand.
//!
//! ```text
//! argv ─▶ Cli ──▶ Context ─▶ connect ─▶ the subcommand's run ─▶ Exit ──────┐
//! environment ─▶ Environ ┘                                └─▶ CliError ────┴─▶ exit code
//! ```
//!
//! `exit.rs` alone picks exit codes, `output.rs` alone prints and prompts. Nothing here reads the process's
//! environment: `main.rs` hands it over once.

mod audit;
mod cache;
mod connect;
mod consumers;
mod delete;
mod describe;
mod dev;
mod exec;
mod exit;
mod get;
mod key;
mod list;
mod output;
mod policy;
mod progress;
mod put;
mod rollback;
mod rotate;
mod rotated;
mod rotation;
mod serve;
mod token;
mod usage;
mod watch;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use clap::error::ErrorKind;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::client::LONGEST_DEADLINE;
use crate::clock::{SharedClock, SystemClock, parse_duration};
use crate::crypto::harden_process;
use crate::error::{Reason, Reasoned as _};
use crate::secret::EnvironmentName;

pub(crate) use exit::{CliError, Exit};
pub(crate) use output::{Format, Output};

/// Parses the command line, does what it says, and gives the exit code.
///
/// `arguments` are the process's own, program name first; `environment` its variables.
pub fn run(
    arguments: impl IntoIterator<Item = OsString>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let (output, result) = match Cli::try_parse_from(&arguments) {
        Ok(cli) => {
            let context = Context {
                environ: Environ::new(environment),
                output: Output::new(cli.global.output),
                clock: SystemClock::shared(),
                global: cli.global,
            };
            harden(&cli.command).iter().for_each(|shortfall| context.output.notice(shortfall));
            (context.output, carry_out(cli.command, &context))
        }
        Err(error) => {
            let output = Output::new(usage::format_of(&arguments));
            (output, not_parsed(error, output))
        }
    };
    result
        .unwrap_or_else(|error| {
            output.error(&error);
            error.exit()
        })
        .into()
}

/// Help and the version are answers, as clap writes them; whatever else it has to say is an error like all others.
fn not_parsed(error: clap::Error, output: Output) -> Result<Exit, CliError> {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => output.clap(&error).map(|()| Exit::DONE),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand if !output.is_json() => {
            output.clap(&error).map(|()| Exit::USAGE)
        }
        _ => Err(usage::complaint(error)),
    }
}

/// Before the first secret is read: no core dump, no debugger of the same user. What `exec` becomes must not inherit a
/// limit that it did not ask for; that the process is not dumpable ends with execve by itself.
fn harden(command: &Command) -> Vec<String> {
    match command {
        Command::Exec(_) => set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .err()
            .map(|error| format!("the process stays dumpable (PR_SET_DUMPABLE: {error})"))
            .into_iter()
            .collect(),
        _ => harden_process(),
    }
}

fn carry_out(command: Command, context: &Context) -> Result<Exit, CliError> {
    // A broker serves on threads of its own, and does the rest of its work on these; a command that asks one question must
    // not start threads for it.
    let mut runtime = match command {
        Command::Dev(_) | Command::Serve(_) => tokio::runtime::Builder::new_multi_thread(),
        _ => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = runtime
        .enable_all()
        .build()
        .map_err(|error| CliError::new(Reason::Internal, format!("the runtime can't be started: {error}")))?;
    let ended = runtime.block_on(dispatch(command, context));
    // What still runs was told to end long ago; a thread that the kernel holds must not hold the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

async fn dispatch(command: Command, context: &Context) -> Result<Exit, CliError> {
    match command {
        Command::Get(args) => get::run(args, context).await,
        Command::Put(args) => put::run(args, context).await,
        Command::List(args) => list::run(args, context).await,
        Command::Describe(args) => describe::run(args, context).await,
        Command::Versions(args) => describe::run_versions(args, context).await,
        Command::Rollback(args) => rollback::run(args, context).await,
        Command::Delete(args) => delete::run(args, context).await,
        Command::Restore(args) => delete::run_restore(args, context).await,
        Command::Exec(args) => exec::run(args, context).await,
        Command::Policy(command) => policy::run(command, context).await,
        Command::Audit(command) => audit::run(command, context).await,
        Command::Token(command) => token::run(command, context).await,
        Command::Key(command) => key::run(command, context).await,
        Command::Rotate(args) => rotate::run(args, context).await,
        Command::Rotation(command) => rotation::run(command, context).await,
        Command::Cache(command) => cache::run(command, context).await,
        Command::Watch(args) => watch::run(args, context).await,
        Command::Consumers(args) => consumers::run(args, context).await,
        Command::Dev(args) => dev::run(args, context).await,
        Command::Serve(args) => serve::run(args, context).await,
    }
}

const ENDINGS: &str = "Exit codes: 0 done, 2 usage, 3 denied, 4 not found, 5 unavailable, 6 conflict, 7 approval needed, \
                       1 anything else. `exec` ends as its command does; 125, 126 and 127 say that it did not run.";

const ABOUT: &str =
    "A secrets broker: secrets per environment, under policy, with a tamper-evident audit log";

#[derive(clap::Parser)]
#[command(name = "claviger", version, about = ABOUT, max_term_width = 100, after_help = ENDINGS)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every subcommand takes.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Environment; else CLAVIGER_ENV. There is no default
    #[arg(short, long, alias = "environment", value_name = "ENV", global = true)]
    pub(crate) env: Option<EnvironmentName>,
    /// Broker: unix:///path, https://, or http:// on loopback; else CLAVIGER_ADDR, else this machine's socket
    #[arg(short, long, value_name = "ADDRESS", global = true)]
    pub(crate) address: Option<String>,
    /// File that holds the token; else CLAVIGER_TOKEN holds it
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) token_file: Option<PathBuf>,
    /// Certificate authority that an https:// broker must have its certificate from; else CLAVIGER_CA_FILE, else the
    /// system's
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) ca_file: Option<PathBuf>,
    /// Client certificate for an https:// broker; else CLAVIGER_CLIENT_CERT
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) client_cert: Option<PathBuf>,
    /// Its key; else CLAVIGER_CLIENT_KEY
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) client_key: Option<PathBuf>,
    /// How answers and errors are written
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t, global = true)]
    pub(crate) output: Format,
    /// Why; recorded, and policies may ask for it
    #[arg(long, value_name = "TEXT", value_parser = parse_reason, global = true)]
    pub(crate) reason: Option<String>,
    /// How long a call may take, for example 500ms or 2m
    #[arg(long, value_name = "DURATION", value_parser = parse_timeout, default_value = "30s", global = true)]
    pub(crate) timeout: Duration,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Print a secret's value, or one field of it, and nothing else
    Get(get::Args),
    /// Write a secret's value from stdin, a file or a prompt
    Put(put::Args),
    /// List the names of an environment's secrets
    List(list::Args),
    /// Show a secret without its value
    Describe(describe::Args),
    /// List a secret's versions
    Versions(describe::VersionsArgs),
    /// Make an earlier version current again
    Rollback(rollback::Args),
    /// Delete a secret; it can be restored for a while
    Delete(delete::Args),
    /// Bring a deleted secret back
    Restore(delete::RestoreArgs),
    /// Run a command with secrets in its environment
    Exec(exec::Args),
    /// Check, test and explain policies
    #[command(subcommand)]
    Policy(policy::Command),
    /// Read and verify the audit log
    #[command(subcommand)]
    Audit(audit::Command),
    /// Issue, list and revoke the broker's own tokens
    #[command(subcommand)]
    Token(token::Command),
    /// Make, rotate and look at the broker's own keys
    #[command(subcommand)]
    Key(key::Command),
    /// Rotate secrets now, or all that are due
    Rotate(rotate::Args),
    /// Set how and when a secret is rotated, and look how that goes
    #[command(subcommand)]
    Rotation(rotation::Command),
    /// Make the broker forget what it remembers of its stores
    #[command(subcommand)]
    Cache(cache::Command),
    /// Be told of versions that become current
    Watch(watch::Args),
    /// List who uses a secret, and which version
    Consumers(consumers::Args),
    /// Run a throw-away broker with sample secrets
    Dev(dev::Args),
    /// Run the broker
    Serve(serve::Args),
}

/// What a subcommand is given.
pub(crate) struct Context {
    /// The process's environment.
    pub(crate) environ: Environ,
    /// Where answers go.
    pub(crate) output: Output,
    /// The time.
    pub(crate) clock: SharedClock,
    /// What every subcommand takes.
    pub(crate) global: Global,
}

impl Context {
    /// The environment that the caller chose. Never a default.
    ///
    /// # Errors
    /// A usage error where none was.
    pub(crate) fn environment(&self) -> Result<EnvironmentName, CliError> {
        let missing = || CliError::usage("which environment? give -e ENV or set CLAVIGER_ENV");
        self.chosen_environment()?.ok_or_else(missing)
    }

    /// The same, where none has a meaning of its own: the broker as a whole.
    pub(crate) fn chosen_environment(&self) -> Result<Option<EnvironmentName>, CliError> {
        match (&self.global.env, self.environ.text("CLAVIGER_ENV")?) {
            (Some(given), _) => Ok(Some(given.clone())),
            (None, Some(text)) => EnvironmentName::parse(text)
                .map(Some)
                .map_err(|error| CliError::new(error.reason(), format!("CLAVIGER_ENV: {error}"))),
            (None, None) => Ok(None),
        }
    }

    /// Why, as a request carries it: empty where the caller said nothing.
    pub(crate) fn reason(&self) -> String {
        self.global.reason.clone().unwrap_or_default()
    }
}

/// The environment of this process, as it was at its start. May hold a token, so it has no debug output.
pub(crate) struct Environ(BTreeMap<OsString, OsString>);

impl Environ {
    fn new(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        Self(variables.into_iter().collect())
    }

    /// A variable that holds text. One that is empty counts as not set.
    ///
    /// # Errors
    /// Where it is not UTF-8.
    pub(crate) fn text(&self, name: &str) -> Result<Option<&str>, CliError> {
        let value = self.0.get(OsStr::new(name)).filter(|value| !value.is_empty());
        let not_text = || CliError::usage(format!("{name} is not UTF-8; set it anew"));
        value.map(|value| value.to_str().ok_or_else(not_text)).transpose()
    }

    /// Whether a variable is there and holds nothing.
    pub(crate) fn is_empty(&self, name: &str) -> bool {
        self.0.get(OsStr::new(name)).is_some_and(|value| value.is_empty())
    }

    /// A variable that holds a path. One that is empty counts as not set.
    pub(crate) fn path(&self, name: &str) -> Option<&Path> {
        self.0.get(OsStr::new(name)).filter(|value| !value.is_empty()).map(Path::new)
    }

    /// Every variable, for a child process.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&OsStr, &OsStr)> {
        self.0.iter().map(|(name, value)| (name.as_os_str(), value.as_os_str()))
    }
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    let timeout = parse_duration(text).map_err(|error| error.to_string())?;
    if timeout.is_zero() || timeout > LONGEST_DEADLINE {
        return Err("must be more than nothing and at most 1h".to_owned());
    }
    Ok(timeout)
}

/// The bound that records have too.
fn parse_reason(text: &str) -> Result<String, String> {
    const MOST: usize = 512;
    match text.len() {
        0 => Err("is empty; say why, or leave it out".to_owned()),
        1..=MOST => Ok(text.to_owned()),
        length => Err(format!("is {length} bytes long; at most {MOST} are permitted")),
    }
}

/// Without one newline at the end, of either kind.
fn without_newline(bytes: &[u8]) -> &[u8] {
    let shorter = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    if shorter.len() == bytes.len() { bytes } else { shorter.strip_suffix(b"\r").unwrap_or(shorter) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    /// A context as `claviger ARGUMENTS` would have it.
    pub(super) fn context(arguments: &[&str], variables: &[(&str, &str)]) -> Context {
        let arguments = ["claviger"].iter().chain(arguments).chain(&["list"]);
        let cli = Cli::try_parse_from(arguments).ok().unwrap();
        Context {
            environ: Environ::new(variables.iter().map(|(name, value)| (name.into(), value.into()))),
            output: Output::new(cli.global.output),
            clock: crate::clock::ManualClock::new(jiff::Timestamp::from_second(1_800_000_000).unwrap()),
            global: cli.global,
        }
    }

    /// What clap finds wrong with `claviger ARGUMENTS`.
    pub(super) fn refusal(arguments: &[&str]) -> clap::Error {
        Cli::try_parse_from(["claviger"].iter().chain(arguments)).err().unwrap()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn an_environment_is_given_and_never_guessed() {
        let chosen = |arguments: &[&str], variables: &[(&str, &str)]| {
            context(arguments, variables).environment().map(|name| name.to_string())
        };
        assert_eq!(chosen(&["-e", "staging"], &[("CLAVIGER_ENV", "production")]).unwrap(), "staging");
        assert_eq!(chosen(&[], &[("CLAVIGER_ENV", "production")]).unwrap(), "production");
        for variables in [&[][..], &[("CLAVIGER_ENV", "")]] {
            let error = chosen(&[], variables).unwrap_err();
            assert_eq!(error.exit(), Exit::USAGE);
            assert!(error.message.contains("CLAVIGER_ENV"), "{}", error.message);
        }
        let error = chosen(&[], &[("CLAVIGER_ENV", "Prod")]).unwrap_err();
        assert_eq!(error.reason, Some(Reason::InvalidEnvironment));
        assert!(error.message.starts_with("CLAVIGER_ENV: "), "{}", error.message);
    }

    #[test]
    fn global_options_stand_on_either_side_of_the_subcommand() {
        for arguments in
            [["claviger", "-e", "staging", "get", "db"], ["claviger", "get", "db", "-e", "staging"]]
        {
            let cli = Cli::try_parse_from(arguments).ok().unwrap();
            assert_eq!(cli.global.env.unwrap().as_str(), "staging");
            assert_eq!(cli.global.timeout, Duration::from_secs(30));
        }
    }

    #[test]
    fn usage_errors_name_the_argument_and_the_mend() {
        for (arguments, part) in [
            (&["get", "a//b"][..], "segment 2"),
            (&["get", "db#a#b"], "more than one `#`"),
            (&["-e", "Prod", "get", "db"], "character 1"),
            (&["--timeout", "5", "list"], "has no unit"),
            (&["--timeout", "0s", "list"], "more than nothing"),
            (&["--timeout", "2h", "list"], "at most 1h"),
            (&["--reason", "", "list"], "--reason"),
            (&["--output", "yaml", "list"], "json"),
            (&["lst"], "list"),
            (&["get", "--refesh", "db"], "--refresh"),
            (&["exec", "-m", "x.toml"], "CMD"),
        ] {
            let error = refusal(arguments);
            assert_eq!(error.exit_code(), 2, "{arguments:?}");
            let text = error.render().to_string();
            assert!(text.contains(part), "{arguments:?}: {text}");
        }
        assert_eq!(refusal(&["--help"]).kind(), ErrorKind::DisplayHelp);
        assert_eq!(refusal(&["--version"]).exit_code(), 0);
    }

    #[test]
    fn variables_are_read_from_what_was_handed_over() {
        use std::os::unix::ffi::OsStringExt as _;
        let environ = Environ::new([
            ("A".into(), "text".into()),
            ("EMPTY".into(), OsString::new()),
            ("BYTES".into(), OsString::from_vec(vec![0xff])),
        ]);
        assert_eq!(environ.text("A").unwrap(), Some("text"));
        assert_eq!(environ.text("EMPTY").unwrap(), None);
        assert_eq!(environ.path("A"), Some(Path::new("text")));
        assert!(environ.is_empty("EMPTY") && !environ.is_empty("A") && !environ.is_empty("MISSING"));
        assert!(environ.text("BYTES").unwrap_err().message.contains("BYTES"));
        assert_eq!(environ.iter().count(), 3);
    }

    #[test]
    fn one_newline_is_cut() {
        for (from, to) in
            [("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("a", "a"), ("a\r", "a\r"), ("", ""), ("\n", "")]
        {
            assert_eq!(without_newline(from.as_bytes()), to.as_bytes(), "{from:?}");
        }
    }
}
