//! `claviger put`: a value from stdin, a file or a prompt; never from the command line.
//!
//! ```text
//! {"environment","name","version_id","labels","created_at","changed"}
//! ```

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal as _, Read};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Serialize;
use zeroize::Zeroizing;

use super::connect::connect;
use super::output;
use super::{CliError, Context, Exit, without_newline};
use crate::client::{self, ClientError};
use crate::error::Reason;
use crate::proto::v1;
use crate::secret::{EnvironmentName, Label, MAX_VALUE_BYTES, SecretName, SecretValue, VersionId};

/// What `put` takes.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Secret; created where it does not exist
    name: SecretName,
    /// Read the value from this file; `-` is stdin
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Leave out one newline at the end of the value
    #[arg(long)]
    trim: bool,
    /// Store the value as bytes; else it is text where it is UTF-8
    #[arg(long)]
    binary: bool,
    /// The value is meant to be empty
    #[arg(long)]
    allow_empty: bool,
    /// Version id to write under: with the same one, a retry changes nothing
    #[arg(long, value_name = "ID", value_parser = parse_request_token)]
    request_token: Option<VersionId>,
    /// Staging label for the version, instead of AWSCURRENT; may be repeated
    #[arg(long = "label", value_name = "LABEL")]
    labels: Vec<Label>,
    /// Only if this version is current
    #[arg(long, value_name = "ID", conflicts_with = "create")]
    expect: Option<VersionId>,
    /// Only if the secret does not exist
    #[arg(long)]
    create: bool,
    /// Caught to be refused: what stands on a command line, every process of the machine can read.
    #[arg(hide = true, value_name = "VALUE")]
    stray: Vec<OsString>,
}

/// Writes a version.
pub(super) async fn run(args: Args, context: &Context) -> Result<Exit, CliError> {
    if !args.stray.is_empty() {
        return Err(CliError::usage(
            "a value on the command line can be read by every process of this machine, and stays in the shell's \
             history; give it on stdin, with --file or at the prompt, and take this one for leaked",
        ));
    }
    let environment = context.environment()?;
    let value = value(&args, context)?;
    let token = args.request_token.unwrap_or_else(VersionId::generate);
    let request = v1::PutSecretRequest {
        environment: environment.to_string(),
        name: args.name.to_string(),
        payload: Some(client::payload(&value)),
        client_request_token: token.to_string(),
        labels: args.labels.iter().map(ToString::to_string).collect(),
        expected_version_id: args.expect.as_ref().map(ToString::to_string).unwrap_or_default(),
        must_not_exist: args.create,
        allow_empty: args.allow_empty,
        reason: context.reason(),
        approval_id: String::new(),
    };
    let written = connect(context).await?.secrets().put_secret(request).await.map_err(ClientError::from);
    let failed = |error: ClientError| match args.create && error.reason == Reason::Conflict {
        true => exists_already(error, &args.name, &environment),
        false => retriable(error, &token),
    };
    let written = written.map_err(failed)?.into_inner();
    let version = written.version.ok_or_else(|| ClientError::malformed("holds no version"))?;
    let shape = Shape {
        environment: environment.as_str(),
        name: args.name.as_str(),
        version_id: &version.version_id,
        labels: &version.labels,
        created_at: output::time(version.created_at),
        changed: written.changed,
    };
    context.output.answer(&shape, || shape.text())?;
    Ok(Exit::DONE)
}

#[derive(Serialize)]
struct Shape<'a> {
    environment: &'a str,
    name: &'a str,
    version_id: &'a str,
    labels: &'a [String],
    created_at: Option<Timestamp>,
    changed: bool,
}

impl Shape<'_> {
    fn text(&self) -> String {
        let Self { environment, name, version_id, .. } = self;
        let labels = self.labels.join(", ");
        let done = if self.changed { "written" } else { "was written before, nothing changed" };
        format!("{name} in {environment}: version {version_id} ({labels}) {done}")
    }
}

/// With `--create`, that something is there is the whole conflict.
fn exists_already(error: ClientError, name: &SecretName, environment: &EnvironmentName) -> CliError {
    let mut error = CliError::from(error);
    error.message = format!(
        "secret `{name}` in environment `{environment}` exists already; leave out --create to write a new version"
    );
    error
}

/// Where nobody knows whether the version was written, the caller learns how to ask again without harm.
fn retriable(error: ClientError, token: &VersionId) -> CliError {
    let unknown = matches!(
        error.reason,
        Reason::Unavailable | Reason::DeadlineExceeded | Reason::AuditUnavailable | Reason::StoreUnavailable
    );
    let mut error = CliError::from(error);
    if unknown {
        error.message.push_str(&format!("; to try again without harm, add --request-token {token}"));
    }
    error
}

/// The credential and the id that a version is written under are both called tokens; one must not become the other.
fn parse_request_token(text: &str) -> Result<VersionId, String> {
    if text.starts_with("clv_") {
        return Err(
            "looks like a credential, which would be stored as the version's id; give that with --token-file"
                .to_owned(),
        );
    }
    VersionId::parse(text).map_err(|error| error.to_string())
}

/// The value, from where the caller has it.
fn value(args: &Args, context: &Context) -> Result<SecretValue, CliError> {
    let from_stdin = args.file.as_deref().is_none_or(|path| path == Path::new("-"));
    let bytes = match &args.file {
        Some(path) if !from_stdin => {
            File::open(path).and_then(read_bounded).map_err(|error| CliError::file(path, error))?
        }
        None if io::stdin().is_terminal() => {
            let mut value = context.output.ask_value(args.name.as_str())?;
            Zeroizing::new(std::mem::take(&mut *value).into_bytes())
        }
        _ => read_bounded(io::stdin().lock())
            .map_err(|error| CliError::usage(format!("the value can't be read from stdin: {error}")))?,
    };
    let (value, notices) = checked(&bytes, from_stdin, args)?;
    notices.iter().for_each(|notice| context.output.notice(notice));
    Ok(value)
}

/// One byte more than is permitted, so that too much is noticed and not cut.
fn read_bounded(from: impl Read) -> io::Result<Zeroizing<Vec<u8>>> {
    // Room for the whole: a buffer that grew would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::<u8>::with_capacity(MAX_VALUE_BYTES + 64));
    from.take(MAX_VALUE_BYTES as u64 + 2).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The value as it will be stored, and what is worth a word.
fn checked(
    bytes: &[u8],
    from_stdin: bool,
    args: &Args,
) -> Result<(SecretValue, Vec<&'static str>), CliError> {
    let stored = if args.trim { without_newline(bytes) } else { bytes };
    if stored.is_empty() && !args.allow_empty {
        return Err(CliError::new(
            Reason::ValueEmpty,
            "the value is empty; say --allow-empty where that is meant",
        ));
    }
    let value = match args.binary {
        true => SecretValue::binary(stored.to_vec())?,
        false => SecretValue::sniff(stored.to_vec())?,
    };
    let mut notices = Vec::new();
    if from_stdin && ends_one_line(stored) {
        notices.push("the value ends with a newline, which is stored too; say --trim to leave it out");
    }
    if is_placeholder(&value, &args.name) {
        notices.push("the value looks like a placeholder; put a real one");
    }
    Ok((value, notices))
}

/// Whether the only newline is the one at the end, as `echo` writes it. A file of several lines means its last one.
fn ends_one_line(bytes: &[u8]) -> bool {
    bytes.iter().position(|byte| *byte == b'\n').is_some_and(|first| first + 1 == bytes.len())
}

fn is_placeholder(value: &SecretValue, name: &SecretName) -> bool {
    let text = value.expose_text().unwrap_or_default().trim();
    text == name.as_str() || text.eq_ignore_ascii_case("changeme")
}

#[cfg(test)]
mod tests {
    use super::super::tests::{context, refusal};
    use super::*;
    use crate::secret::ContentType;

    fn args() -> Args {
        Args {
            name: SecretName::parse("db").unwrap(),
            file: None,
            trim: false,
            binary: false,
            allow_empty: false,
            request_token: None,
            labels: Vec::new(),
            expect: None,
            create: false,
            stray: Vec::new(),
        }
    }

    fn stored(bytes: &[u8], args: &Args) -> (Vec<u8>, Vec<&'static str>) {
        let (value, notices) = checked(bytes, true, args).unwrap();
        (value.expose().to_vec(), notices)
    }

    #[test]
    fn what_is_given_is_what_is_stored() {
        for bytes in [&b"s3cret"[..], b"a\r\nb\r\n", "\u{feff}x".as_bytes(), b"a\0b", b"line 1\nline 2\n"] {
            assert_eq!(stored(bytes, &args()), (bytes.to_vec(), Vec::new()));
        }
    }

    #[test]
    fn a_newline_that_echo_left_is_pointed_out_or_trimmed() {
        let (kept, notices) = stored(b"s3cret\n", &args());
        assert_eq!(kept, b"s3cret\n");
        assert!(notices[0].contains("--trim"), "{notices:?}");
        let trim = Args { trim: true, ..args() };
        assert_eq!(stored(b"s3cret\r\n", &trim), (b"s3cret".to_vec(), Vec::new()));
        let (_, from_file) = checked(b"s3cret\n", false, &args()).unwrap();
        assert!(from_file.is_empty());
    }

    #[test]
    fn empty_and_too_large_are_told_apart() {
        let reason = |bytes: &[u8], args: &Args| checked(bytes, true, args).err().unwrap().reason.unwrap();
        assert_eq!(reason(b"", &args()), Reason::ValueEmpty);
        assert_eq!(reason(b"\n", &Args { trim: true, ..args() }), Reason::ValueEmpty);
        assert_eq!(reason(&vec![b'x'; MAX_VALUE_BYTES + 1], &args()), Reason::ValueTooLarge);
        assert!(checked(b"", true, &Args { allow_empty: true, ..args() }).is_ok());
        assert_eq!(stored(&vec![b'x'; MAX_VALUE_BYTES], &args()).0.len(), MAX_VALUE_BYTES);
    }

    #[test]
    fn bytes_are_text_where_they_can_be_and_nobody_said_otherwise() {
        let kind = |bytes: &[u8], args: &Args| checked(bytes, true, args).unwrap().0.content_type();
        assert_eq!(kind(b"a", &args()), ContentType::Text);
        assert_eq!(kind(b"a\xff", &args()), ContentType::Binary);
        assert_eq!(kind(b"a", &Args { binary: true, ..args() }), ContentType::Binary);
    }

    #[test]
    fn a_placeholder_is_pointed_out() {
        for bytes in [&b"db"[..], b"changeme", b"ChangeMe"] {
            assert_eq!(stored(bytes, &args()).1.len(), 1, "{bytes:?}");
        }
    }

    #[test]
    fn too_much_is_noticed_and_not_cut() {
        let read = read_bounded(io::repeat(b'x')).unwrap();
        assert!(read.len() > MAX_VALUE_BYTES);
        assert_eq!(read_bounded(&b"x"[..]).unwrap().as_slice(), b"x");
    }

    #[tokio::test]
    async fn a_value_on_the_command_line_is_refused_unseen() {
        let args = Args { stray: vec!["s3cret".into()], ..args() };
        let error = run(args, &context(&["-e", "development"], &[])).await.unwrap_err();
        assert_eq!(error.exit(), Exit::USAGE);
        assert!(!error.message.contains("s3cret") && error.message.contains("stdin"), "{}", error.message);
    }

    #[test]
    fn a_credential_does_not_become_a_version_id() {
        let credential = format!("clv_{}_{}", "0".repeat(16), "x".repeat(43));
        let error = refusal(&["put", "db", "--request-token", &credential]);
        assert!(error.render().to_string().contains("--token-file"));
        assert!(parse_request_token(&"a".repeat(32)).is_ok());
        assert!(parse_request_token("short").is_err());
        let error = refusal(&["put", "db", "--token", &credential]);
        assert_eq!(error.kind(), clap::error::ErrorKind::UnknownArgument, "one word for one thing");
    }

    #[test]
    fn what_can_not_be_created_can_be_written() {
        let (name, environment) =
            (SecretName::parse("db").unwrap(), EnvironmentName::parse("development").unwrap());
        let conflict = ClientError {
            reason: Reason::Conflict,
            request_id: Some("r-1".to_owned()),
            ..ClientError::malformed("x")
        };
        let error = exists_already(conflict, &name, &environment);
        assert_eq!((error.reason, error.request_id.as_deref()), (Some(Reason::Conflict), Some("r-1")));
        assert!(error.message.contains("exists already; leave out --create"), "{}", error.message);
    }

    #[test]
    fn an_unknown_outcome_says_how_to_retry() {
        let token = VersionId::generate();
        let error = |reason| ClientError { reason, ..ClientError::malformed("x") };
        assert!(retriable(error(Reason::Unavailable), &token).message.contains(token.as_str()));
        assert!(!retriable(error(Reason::Denied), &token).message.contains(token.as_str()));
    }
}
