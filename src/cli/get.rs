//! `claviger get`: the bare value on stdout and nothing else.
//!
//! ```text
//! {"environment","name","field","version_id","labels","created_at","content_type":"text"|"binary",
//!  "value","value_base64","age_seconds","source":"store"|"cache","stale","rotating"}
//! ```
//! A text is in `value`, bytes are in `value_base64`; the other one is null.

use data_encoding::BASE64;
use jiff::Timestamp;
use serde::Serialize;
use zeroize::Zeroizing;

use super::connect::connect;
use super::output::{self, Output};
use super::{CliError, Context, Exit};
use crate::client::{self, ClientError};
use crate::error::Reason;
use crate::proto::v1;
use crate::secret::{ContentType, EnvironmentName, Label, Reference, SecretValue, VersionId};

/// What `get` takes.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Secret, or one field of a secret that is a JSON object
    #[arg(value_name = "NAME[#FIELD]")]
    reference: Reference,
    /// Version that carries this staging label, instead of AWSCURRENT
    #[arg(long, value_name = "LABEL", conflicts_with = "version_id")]
    label: Option<Label>,
    /// Version with this id
    #[arg(long, value_name = "ID")]
    version_id: Option<VersionId>,
    /// Ask the store, not the broker's cache
    #[arg(long)]
    refresh: bool,
    /// Write the exact bytes, also binary ones to a terminal
    #[arg(long)]
    raw: bool,
}

/// Reads a value and writes it.
pub(super) async fn run(args: Args, context: &Context) -> Result<Exit, CliError> {
    let request = v1::GetSecretRequest {
        environment: environment_of(&args.reference, context)?.to_string(),
        name: args.reference.name.to_string(),
        field: args.reference.field.as_ref().map(ToString::to_string).unwrap_or_default(),
        selector: selector(args.label, args.version_id),
        refresh: args.refresh,
        reason: context.reason(),
        ..v1::GetSecretRequest::default()
    };
    let answer = connect(context).await?.secrets().get_secret(request).await.map_err(ClientError::from)?;
    let mut secret = answer.into_inner().secret.ok_or_else(|| ClientError::malformed("holds no secret"))?;
    let payload = secret.payload.take().ok_or_else(|| ClientError::malformed("holds no value"))?;
    let value = client::received(payload)?;
    warn(&secret, context.output);
    match context.output.is_json() {
        true => write_json(&secret, &value, context.output)?,
        false => write_text(&value, args.raw, context.output)?,
    }
    Ok(Exit::DONE)
}

/// A reference may name its environment itself, but not another one than the command line does.
fn environment_of(reference: &Reference, context: &Context) -> Result<EnvironmentName, CliError> {
    match (&reference.environment, &context.global.env) {
        (Some(named), Some(given)) if named != given => Err(CliError::usage(format!(
            "`{reference}` names environment {named}, and -e names {given}; leave one of them out"
        ))),
        (Some(named), _) => Ok(named.clone()),
        (None, _) => context.environment(),
    }
}

fn selector(label: Option<Label>, version_id: Option<VersionId>) -> Option<v1::Selector> {
    use v1::selector::Selector;
    let selector = match (version_id, label) {
        (Some(id), _) => Selector::VersionId(id.to_string()),
        (None, Some(label)) => Selector::Label(label.to_string()),
        (None, None) => return None,
    };
    Some(v1::Selector { selector: Some(selector) })
}

/// A value past its time, or one that is being rotated in, is worth a word.
fn warn(secret: &v1::Secret, output: Output) {
    if secret.stale {
        let age = secret.age.as_ref().map_or(0, |age| age.seconds);
        output.notice(&format!("the store can't be reached; the value is {age} seconds old"));
    }
    if secret.rotating {
        output.notice("the value is being rotated in; it was found to work");
    }
}

/// A pipe gets the exact bytes; a terminal gets a line.
fn write_text(value: &SecretValue, raw: bool, output: Output) -> Result<(), CliError> {
    if !output.is_terminal() || raw {
        return output.bytes(value.expose());
    }
    if value.content_type() == ContentType::Binary {
        let message = "the value is binary and stdout is a terminal; redirect it, or say --raw";
        return Err(CliError::new(Reason::InvalidArgument, message));
    }
    output.bytes(value.expose())?;
    if value.expose().ends_with(b"\n") { Ok(()) } else { output.bytes(b"\n") }
}

#[derive(Serialize)]
struct Shape<'a> {
    environment: &'a str,
    name: &'a str,
    field: Option<&'a str>,
    version_id: &'a str,
    labels: &'a [String],
    created_at: Option<Timestamp>,
    content_type: &'static str,
    value: Option<&'a str>,
    value_base64: Option<&'a str>,
    age_seconds: Option<i64>,
    source: Option<&'static str>,
    stale: bool,
    rotating: bool,
}

fn write_json(secret: &v1::Secret, value: &SecretValue, output: Output) -> Result<(), CliError> {
    let base64 = match value.content_type() {
        ContentType::Binary => Some(Zeroizing::new(BASE64.encode(value.expose()))),
        ContentType::Text => None,
    };
    let shape = Shape {
        environment: &secret.environment,
        name: &secret.name,
        field: (!secret.field.is_empty()).then_some(secret.field.as_str()),
        version_id: &secret.version_id,
        labels: &secret.labels,
        created_at: output::time(secret.created_at),
        content_type: value.content_type().as_str(),
        value: value.expose_text(),
        value_base64: base64.as_ref().map(|text| text.as_str()),
        age_seconds: secret.age.as_ref().map(|age| age.seconds),
        source: match secret.source() {
            v1::Source::Store => Some("store"),
            v1::Source::Cache => Some("cache"),
            v1::Source::Unspecified => None,
        },
        stale: secret.stale,
        rotating: secret.rotating,
    };
    // A byte of a text takes six characters at most (`\u001b`); what surrounds the value has bounds of its own.
    output.secret_json(&shape, value.len() * 6 + 16 * 1024)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{context, refusal};
    use super::*;

    #[test]
    fn a_reference_may_name_its_environment_but_not_another() {
        let named = Reference::parse("staging:db#password").unwrap();
        let bare = Reference::parse("db").unwrap();
        let from = |reference: &Reference, arguments: &[&str]| {
            environment_of(reference, &context(arguments, &[("CLAVIGER_ENV", "development")]))
        };
        assert_eq!(
            from(&named, &[]).unwrap().as_str(),
            "staging",
            "a reference is more precise than a variable"
        );
        assert_eq!(from(&named, &["-e", "staging"]).unwrap().as_str(), "staging");
        assert_eq!(from(&bare, &[]).unwrap().as_str(), "development");
        let error = from(&named, &["-e", "production"]).unwrap_err();
        assert_eq!(error.exit(), Exit::USAGE);
        assert!(
            error.message.contains("staging") && error.message.contains("production"),
            "{}",
            error.message
        );
    }

    #[test]
    fn one_way_to_point_at_a_version() {
        let error = refusal(&["get", "db", "--label", "stable", "--version-id", &"a".repeat(32)]);
        assert_eq!(error.kind(), clap::error::ErrorKind::ArgumentConflict);
        assert_eq!(selector(None, None), None);
        let label = selector(Some(Label::parse("stable").unwrap()), None).unwrap();
        assert_eq!(label.selector, Some(v1::selector::Selector::Label("stable".to_owned())));
    }
}
