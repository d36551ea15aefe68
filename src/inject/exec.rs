//! Running a command in its environment: by becoming it, or beside it.
//!
//! [`replace`] is execve(2): the process id, the terminal, the open standard streams and the argument list are the
//! command's own, its signals and its exit status reach whoever waits without a detour, and nothing of ours stays
//! behind to be read. The copies of values that the standard library makes for the call can't be wiped, and needn't
//! be: on success the kernel discards the whole address space, and on failure the caller ends.
//!
//! What the command inherits otherwise:
//! - File descriptors: standard input, output and error only. All that Rust opens is close-on-exec; sockets to the
//!   broker and key files are gone.
//! - Signals: SIGPIPE is at its default. Rust's runtime ignores it at start, and std's `Command` sets it back before
//!   execve, both when replacing and when spawning (library/std/src/sys/process/unix/unix.rs). Caught signals go back
//!   to their default by execve itself; ignored ones and the signal mask are inherited.
//! - Resource limits, umask, working directory: as they are. Whoever lowers a limit for this process's own protection
//!   must not do so before it becomes a command.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};

use super::environ::{ChildEnvironment, Limits};
use super::{InjectError, quoted};
use crate::error::{Reason, Reasoned};

/// Why a command didn't run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExecError {
    /// No command was given.
    #[error("no command was given; put it behind `--`, for example `-- ./app`")]
    NoCommand,
    /// The kernel would refuse arguments and environment for their size.
    #[error(transparent)]
    DoesNotFit(#[from] InjectError),
    /// There is no such program, or what is to interpret it is not there.
    #[error("command {program} {problem}")]
    NotFound {
        /// The program as it was given, escaped.
        program: String,
        /// Where it was sought, and the mend.
        problem: &'static str,
    },
    /// The program is there but can't be started.
    #[error("command {program} can't be started: {problem}")]
    NotStartable {
        /// The program as it was given, escaped.
        program: String,
        /// Why not.
        problem: String,
    },
}

impl ExecError {
    /// The exit status of `claviger exec` for it: 2 where no command was given, 125 where claviger itself refused,
    /// 126 where the command can't be started, 127 where it isn't found (POSIX.1-2017, `env`, Exit Status).
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::NoCommand => 2,
            Self::DoesNotFit(_) => 125,
            Self::NotStartable { .. } => 126,
            Self::NotFound { .. } => 127,
        }
    }
}

impl Reasoned for ExecError {
    fn reason(&self) -> Reason {
        match self {
            Self::DoesNotFit(error) => error.reason(),
            Self::NoCommand | Self::NotFound { .. } | Self::NotStartable { .. } => Reason::InvalidArgument,
        }
    }
}

/// Becomes the command. Returns only where that fails; SIGPIPE is then at its default, so say why and end.
///
/// A program without a slash is sought along the child's own `PATH`, which is the caller's, because no secret may set
/// it; where the child has none, along the C library's default (`/bin:/usr/bin`). As with `env` and `nohup`, glibc hands
/// an executable text file without a `#!` line to `/bin/sh` (execvp(3)). The arguments reach the program untouched.
#[must_use]
pub fn replace(command: &[OsString], environment: ChildEnvironment) -> ExecError {
    match prepared(command, &environment) {
        Ok((mut prepared, program)) => refusal(program, environment.path(), &prepared.exec()),
        Err(error) => error,
    }
}

/// Starts the command beside this process, on the same standard streams. Programs are sought as by [`replace`], but a
/// file without a `#!` line may be refused. Dropping the child neither ends it nor waits for it.
///
/// # Errors
/// [`ExecError`].
pub fn spawn(command: &[OsString], environment: ChildEnvironment) -> Result<Child, ExecError> {
    let (mut prepared, program) = prepared(command, &environment)?;
    prepared.spawn().map_err(|error| refusal(program, environment.path(), &error))
}

/// The exit status to end with for a child that ended: its own, or 128+N where signal N ended it.
#[must_use]
pub fn exit_code_of(status: ExitStatus) -> u8 {
    const BY_SIGNAL: i32 = 128;
    let code = status.code().or_else(|| status.signal().map(|signal| BY_SIGNAL + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}

fn prepared<'c>(
    command: &'c [OsString],
    environment: &ChildEnvironment,
) -> Result<(Command, &'c OsStr), ExecError> {
    let (program, arguments) = command.split_first().ok_or(ExecError::NoCommand)?;
    environment.fits(command, Limits::of_this_process())?;
    let mut prepared = Command::new(program);
    prepared.args(arguments).env_clear().envs(environment.expose());
    Ok((prepared, program))
}

fn refusal(program: &OsStr, path: Option<&OsStr>, error: &io::Error) -> ExecError {
    let shown = quoted(&program.to_string_lossy());
    let not_startable =
        |problem: &str| ExecError::NotStartable { program: shown.clone(), problem: problem.to_owned() };
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            ExecError::NotFound { program: shown, problem: whereabouts(program, path) }
        }
        io::ErrorKind::PermissionDenied if Path::new(program).is_dir() => not_startable("it is a directory"),
        io::ErrorKind::PermissionDenied => not_startable(
            "permission denied; make it executable (`chmod +x`), and look at its folders and at `noexec` mounts",
        ),
        _ if error.raw_os_error() == Some(rustix::io::Errno::NOEXEC.raw_os_error()) => {
            not_startable("it is neither a program for this machine nor a script that begins with `#!`")
        }
        _ => not_startable(&error.to_string()),
    }
}

/// The kernel says "no such file" also of a script whose interpreter, or a program whose loader, is missing.
fn whereabouts(program: &OsStr, path: Option<&OsStr>) -> &'static str {
    let is_path = program.as_bytes().contains(&b'/');
    let is_there = if is_path {
        Path::new(program).exists()
    } else {
        path.is_some_and(|path| std::env::split_paths(path).any(|folder| folder.join(program).is_file()))
    };
    match (is_there, is_path) {
        (true, _) => {
            "is there, but the interpreter of its first line or its dynamic loader is not; install that"
        }
        (false, true) => "is not there; correct the path",
        (false, false) => "is not found along PATH; correct the name or give its path",
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Options, Variables, compose};
    use super::*;

    fn command(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    fn environment(path: impl AsRef<OsStr>) -> ChildEnvironment {
        let parent = [(OsString::from("PATH"), path.as_ref().to_owned())];
        compose(parent, &Variables::default(), Options::default()).unwrap().0
    }

    // `replace` is run for real in tests/integration/inject.rs, by a process that may be replaced. Here it may not get
    // as far as execve: even where that fails it would leave SIGPIPE at its default for every other test.
    fn run(words: &[&str]) -> Result<u8, ExecError> {
        spawn(&command(words), environment("/usr/bin:/bin"))
            .map(|mut child| exit_code_of(child.wait().unwrap()))
    }

    #[test]
    fn a_childs_end_is_told_as_a_shell_tells_it() {
        assert_eq!(run(&["sh", "-c", "exit 0"]), Ok(0));
        assert_eq!(run(&["sh", "-c", "exit 7"]), Ok(7));
        assert_eq!(run(&["sh", "-c", "kill -TERM $$"]), Ok(143));
        assert_eq!(run(&["sh", "-c", "kill -KILL $$"]), Ok(137));
    }

    #[test]
    fn what_is_not_found_is_127() {
        for word in ["no-such-command-5f3a", "/no/such/file", "/etc/passwd/x", ""] {
            let error = run(&[word]).unwrap_err();
            assert_eq!(error.exit_code(), 127, "{error}");
        }
        let error = run(&["no-such\n5f3a"]).unwrap_err().to_string();
        assert_eq!(
            error,
            r"command `no-such\n5f3a` is not found along PATH; correct the name or give its path"
        );
    }

    #[test]
    fn what_is_there_and_cannot_be_started_is_126() {
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("plain");
        std::fs::write(&plain, "text").unwrap();
        for (path, expected) in [(folder.path(), "it is a directory"), (plain.as_path(), "permission denied")]
        {
            let words = [path.to_str().unwrap()];
            let error = run(&words).unwrap_err();
            assert_eq!(error.exit_code(), 126, "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        }
        let error = refusal(OsStr::new("x"), None, &io::Error::from_raw_os_error(8));
        assert_eq!(error.exit_code(), 126);
        assert!(error.to_string().contains("neither a program for this machine nor a script"), "{error}");
    }

    #[test]
    fn a_missing_interpreter_is_told_from_a_missing_program() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("script"), "#!/no/such/interpreter\n").unwrap();
        let told = whereabouts(OsStr::new("script"), Some(folder.path().as_os_str()));
        assert!(told.starts_with("is there, but the interpreter"), "{told}");
        assert!(whereabouts(OsStr::new("other"), Some(folder.path().as_os_str())).contains("along PATH"));
        assert!(whereabouts(OsStr::new("/no/such"), None).starts_with("is not there"));
    }

    #[test]
    fn a_program_is_sought_along_the_childs_path() {
        let empty = tempfile::tempdir().unwrap();
        let error = spawn(&command(&["sh"]), environment(empty.path())).map(drop).unwrap_err();
        assert_eq!(error.exit_code(), 127, "this process's own PATH has it, the child's has not");
    }

    #[test]
    fn nothing_to_run_and_too_much_to_pass_are_refused_beforehand() {
        assert_eq!(replace(&[], environment("/bin")), ExecError::NoCommand);
        assert_eq!(ExecError::NoCommand.exit_code(), 2);
        let long = "x".repeat(4 << 20);
        let error = replace(&command(&["true", &long]), environment("/bin"));
        assert_eq!(error.exit_code(), 125);
        assert_eq!(error.reason(), Reason::LimitExceeded);
        assert!(error.to_string().starts_with("argument 1 of the command is 4194305 bytes long"), "{error}");
    }
}
