//! `claviger watch`: what becomes current, as it does, one line for each thing that is told.
//!
//! ```text
//! {"event":"started"|"changed"|"gone"|"problem"|"progress","revision","secrets","environment","name","version_id",
//!  "labels","created_at","skipped","stale","content_type","value","value_base64","reason","message"}
//! ```
//! Members that an event does not have are null; those of the value are there with `--values` alone, and only as JSON:
//! lines for people end up in scroll-back buffers.
//!
//! It ends with an error when the broker ends the watch; `--after` with the last revision goes on where it stopped.
//! `--timeout` is for its start alone: until the first thing is told, which is at once.

use data_encoding::BASE64;
use jiff::Timestamp;
use serde::Serialize;
use tonic::Streaming;
use zeroize::Zeroizing;

use super::connect::connect;
use super::output::{self, Output, printable};
use super::{CliError, Context, Exit};
use crate::client::{self, ClientError};
use crate::error::Reason;
use crate::proto::v1::{self, watch_secrets_response};
use crate::secret::{MAX_VALUE_BYTES, SecretName, SecretValue};

const LASTS: &str = "A watch lasts until you or the broker end it; --timeout bounds its start alone.";

/// What `watch` takes.
#[derive(clap::Args)]
#[command(after_help = LASTS)]
pub(super) struct Args {
    /// Secrets to watch; without any, all that you may read
    #[arg(value_name = "NAME", conflicts_with = "prefix")]
    names: Vec<SecretName>,
    /// Secrets whose names start with this
    #[arg(long, value_name = "PREFIX")]
    prefix: Option<String>,
    /// What you are called in `claviger consumers`
    #[arg(long, value_name = "NAME", default_value = "claviger-watch")]
    consumer: String,
    /// Only what changed after this revision
    #[arg(long, value_name = "REVISION", default_value_t = 0)]
    after: u64,
    /// Values too; needs --output json
    #[arg(long)]
    values: bool,
}

/// Watches until the broker ends it.
pub(super) async fn run(args: Args, context: &Context) -> Result<Exit, CliError> {
    if args.values && !context.output.is_json() {
        return Err(CliError::usage("--values shows values as JSON alone; add --output json"));
    }
    let request = v1::WatchSecretsRequest {
        environment: context.environment()?.to_string(),
        names: args.names.iter().map(ToString::to_string).collect(),
        prefix: args.prefix.unwrap_or_default(),
        consumer: args.consumer,
        after_revision: args.after,
        with_values: args.values,
        reason: context.reason(),
    };
    let (mut next, mut told) = start(request, context).await?;
    while let Some(message) = next {
        show(message, args.values, context.output)?;
        next = told.message().await.map_err(ClientError::from)?;
    }
    Err(CliError::new(
        Reason::Unavailable,
        "the broker ended the watch; go on with --after and the last revision",
    ))
}

/// The first thing that is told, within `--timeout`, and all that follows, whenever it does.
async fn start(
    request: v1::WatchSecretsRequest,
    context: &Context,
) -> Result<(Option<v1::WatchSecretsResponse>, Streaming<v1::WatchSecretsResponse>), CliError> {
    let longest = context.global.timeout;
    let started = async {
        let mut client = connect(context).await?.secrets_without_deadline();
        let mut told = client.watch_secrets(request).await.map_err(ClientError::from)?.into_inner();
        let first = told.message().await.map_err(ClientError::from)?;
        Ok::<_, CliError>((first, told))
    };
    tokio::time::timeout(longest, started).await.unwrap_or_else(|_| {
        let message = format!("the watch did not start within {longest:?}; raise --timeout");
        Err(CliError::new(Reason::DeadlineExceeded, message))
    })
}

fn show(told: v1::WatchSecretsResponse, with_values: bool, output: Output) -> Result<(), CliError> {
    let mut line = Line { revision: told.revision, ..Line::default() };
    let event = told.event.ok_or_else(|| ClientError::malformed("says that nothing happened"))?;
    let value = line.tell(event)?;
    if !output.is_json() {
        return output.text(&line.text());
    }
    if !with_values {
        return output.json(&line);
    }
    let binary = value.as_ref().filter(|value| value.expose_text().is_none());
    let base64 = binary.map(|value| Zeroizing::new(BASE64.encode(value.expose())));
    let base64 = base64.as_ref().map(|text| text.as_str());
    let shape = WithValue::new(&line, value.as_ref(), base64);
    // A value that is escaped throughout is six times as long.
    output.secret_json(&shape, 6 * MAX_VALUE_BYTES + 4_096)
}

/// What people see of an event, and programs but for the value.
#[derive(Default, Serialize)]
struct Line {
    event: &'static str,
    revision: u64,
    secrets: Option<i32>,
    environment: Option<String>,
    name: Option<String>,
    version_id: Option<String>,
    labels: Option<Vec<String>>,
    created_at: Option<Timestamp>,
    skipped: Option<u64>,
    stale: Option<bool>,
    reason: Option<String>,
    message: Option<String>,
}

#[derive(Serialize)]
struct WithValue<'a> {
    #[serde(flatten)]
    line: &'a Line,
    content_type: Option<&'static str>,
    value: Option<&'a str>,
    value_base64: Option<&'a str>,
}

impl<'a> WithValue<'a> {
    fn new(line: &'a Line, value: Option<&'a SecretValue>, value_base64: Option<&'a str>) -> Self {
        Self {
            line,
            content_type: value.map(|value| value.content_type().as_str()),
            value: value.and_then(SecretValue::expose_text),
            value_base64,
        }
    }
}

impl Line {
    /// Fills in what an event says; gives its value back, where it has one.
    fn tell(&mut self, event: watch_secrets_response::Event) -> Result<Option<SecretValue>, ClientError> {
        use watch_secrets_response::Event;
        match event {
            Event::Started(started) => {
                self.event = "started";
                self.secrets = Some(started.secrets);
            }
            Event::Changed(changed) => {
                self.event = "changed";
                self.skipped = Some(changed.skipped);
                let secret = changed.secret.ok_or_else(|| ClientError::malformed("holds no secret"))?;
                return self.tell_secret(secret);
            }
            Event::Gone(gone) => {
                self.event = "gone";
                (self.environment, self.name) = (Some(gone.environment), Some(gone.name));
            }
            Event::Problem(told) => {
                self.event = "problem";
                (self.environment, self.name) = (Some(told.environment), Some(told.name));
                let problem = told.problem.unwrap_or_default();
                (self.reason, self.message) = (Some(problem.reason), Some(problem.message));
            }
            Event::Progress(_) => self.event = "progress",
        }
        Ok(None)
    }

    fn tell_secret(&mut self, secret: v1::Secret) -> Result<Option<SecretValue>, ClientError> {
        self.environment = Some(secret.environment);
        self.name = Some(secret.name);
        self.version_id = Some(secret.version_id);
        self.labels = Some(secret.labels);
        self.created_at = output::time(secret.created_at);
        self.stale = Some(secret.stale);
        secret.payload.map(client::received).transpose()
    }

    fn text(&self) -> String {
        let shown = |text: &Option<String>| text.as_deref().map(printable).unwrap_or_default();
        let about = match self.event {
            "started" => format!("{} secrets", self.secrets.unwrap_or_default()),
            "changed" => {
                let labels = self.labels.iter().flatten().map(|label| printable(label)).collect::<Vec<_>>();
                let skipped = match self.skipped.unwrap_or_default() {
                    0 => String::new(),
                    skipped => format!(", {skipped} before it left out"),
                };
                format!(
                    "{} version {} {}{skipped}",
                    shown(&self.name),
                    shown(&self.version_id),
                    labels.join(",")
                )
            }
            "gone" => shown(&self.name),
            "problem" => format!("{}: {} [{}]", shown(&self.name), shown(&self.message), shown(&self.reason)),
            _ => String::new(),
        };
        let parts = [self.revision.to_string(), self.event.to_owned(), about];
        parts.iter().filter(|part| !part.is_empty()).map(String::as_str).collect::<Vec<_>>().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{context, refusal};
    use super::*;
    use watch_secrets_response::Event;

    fn changed(payload: Option<v1::SecretPayload>, skipped: u64) -> Event {
        let secret = v1::Secret {
            environment: "production".to_owned(),
            name: "database".to_owned(),
            version_id: "v".repeat(32),
            labels: vec!["AWSCURRENT".to_owned()],
            payload,
            ..Default::default()
        };
        Event::Changed(v1::SecretChanged { secret: Some(secret), skipped })
    }

    fn line(event: Event) -> (Line, Option<SecretValue>) {
        let mut line = Line { revision: 41, ..Line::default() };
        let value = line.tell(event).unwrap();
        (line, value)
    }

    #[test]
    fn each_event_is_a_line_without_a_value() {
        let payload = v1::SecretPayload { data: "s3cret".into(), content_type: v1::ContentType::Text.into() };
        let (told, value) = line(changed(Some(payload), 3));
        assert_eq!(value.unwrap().expose_text(), Some("s3cret"));
        let version = "v".repeat(32);
        assert_eq!(
            told.text(),
            format!("41 changed database version {version} AWSCURRENT, 3 before it left out")
        );
        assert_eq!(
            line(changed(None, 0)).0.text(),
            format!("41 changed database version {version} AWSCURRENT")
        );
        let gone = v1::SecretGone { environment: "production".to_owned(), name: "database".to_owned() };
        assert_eq!(line(Event::Gone(gone)).0.text(), "41 gone database");
        let problem =
            v1::Problem { code: 7, reason: "DENIED".to_owned(), message: "you may\nnot".to_owned() };
        let problem = v1::WatchProblem { name: "x".to_owned(), problem: Some(problem), ..Default::default() };
        assert_eq!(line(Event::Problem(problem)).0.text(), "41 problem x: you may\\nnot [DENIED]");
        assert_eq!(line(Event::Started(v1::WatchStarted { secrets: 2 })).0.text(), "41 started 2 secrets");
        assert_eq!(line(Event::Progress(v1::WatchProgress {})).0.text(), "41 progress");
    }

    #[test]
    fn json_has_every_member_and_those_of_the_value_where_values_are_asked_for() {
        let without = serde_json::to_value(line(Event::Progress(v1::WatchProgress {})).0).unwrap();
        assert_eq!((&without["event"], &without["revision"]), (&"progress".into(), &41.into()));
        assert!(without["name"].is_null() && without.get("value").is_none());
        let payload = v1::SecretPayload { data: "s3cret".into(), content_type: v1::ContentType::Text.into() };
        let (told, value) = line(changed(Some(payload), 0));
        let with = serde_json::to_value(WithValue::new(&told, value.as_ref(), None)).unwrap();
        assert_eq!((&with["name"], &with["value"]), (&"database".into(), &"s3cret".into()));
        assert_eq!(with["content_type"], "text");
        let members = |json: &serde_json::Value| {
            json.as_object().unwrap().keys().cloned().collect::<std::collections::BTreeSet<_>>()
        };
        for event in [Event::Started(v1::WatchStarted { secrets: 2 }), Event::Progress(v1::WatchProgress {})]
        {
            let (told, value) = line(event);
            let empty = serde_json::to_value(WithValue::new(&told, value.as_ref(), None)).unwrap();
            assert_eq!(members(&empty), members(&with), "{empty}");
            for member in ["content_type", "value", "value_base64"] {
                assert!(empty[member].is_null(), "{member}: {empty}");
            }
        }
    }

    #[tokio::test]
    async fn a_watch_that_does_not_start_in_time_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("silent.sock");
        // The kernel takes the connection; nobody ever answers on it.
        let _silent = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let address = format!("unix://{}", path.display());
        let args =
            Args { names: Vec::new(), prefix: None, consumer: "me".to_owned(), after: 0, values: false };
        let context = context(&["-e", "production", "-a", &address, "--timeout", "50ms"], &[]);
        let ended = tokio::time::timeout(std::time::Duration::from_secs(60), run(args, &context)).await;
        let error = ended.expect("hung").unwrap_err();
        assert_eq!(error.reason, Some(Reason::DeadlineExceeded), "{}", error.message);
        assert!(error.message.contains("did not start within 50ms"), "{}", error.message);
    }

    #[tokio::test]
    async fn values_are_for_programs() {
        let args =
            Args { names: Vec::new(), prefix: None, consumer: "me".to_owned(), after: 0, values: true };
        let error = run(args, &context(&["-e", "production"], &[])).await.unwrap_err();
        assert_eq!((error.reason, error.exit()), (Some(Reason::InvalidArgument), Exit::USAGE));
        for arguments in
            [&["watch", "a", "--prefix", "b"][..], &["watch", "a//b"], &["watch", "--after", "x"]]
        {
            assert_eq!(refusal(arguments).exit_code(), 2, "{arguments:?}");
        }
    }
}
