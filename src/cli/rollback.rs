//! `claviger rollback`: an earlier version becomes current again.
//!
//! ```text
//! {"environment","name","version_id","labels","created_at","superseded_version_id"}
//! ```

use jiff::Timestamp;
use serde::Serialize;

use super::connect::connect;
use super::output;
use super::{CliError, Context, Exit};
use crate::client::ClientError;
use crate::error::Reason;
use crate::proto::v1;
use crate::secret::{SecretName, VersionId};

/// What `rollback` takes.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Secret
    name: SecretName,
    /// Version to make current; else the one that was current before
    #[arg(long, value_name = "ID")]
    to: Option<VersionId>,
    /// Only if this version is current
    #[arg(long, value_name = "ID")]
    expect: Option<VersionId>,
}

/// Rolls back.
pub(super) async fn run(args: Args, context: &Context) -> Result<Exit, CliError> {
    let environment = context.environment()?;
    let to_previous = args.to.is_none();
    let request = v1::RollbackSecretRequest {
        environment: environment.to_string(),
        name: args.name.to_string(),
        to_version_id: args.to.map(|id| id.to_string()).unwrap_or_default(),
        expected_version_id: args.expect.map(|id| id.to_string()).unwrap_or_default(),
        reason: context.reason(),
        approval_id: String::new(),
    };
    let answer = connect(context).await?.secrets().rollback_secret(request).await.map_err(ClientError::from);
    let answer = answer.map_err(|error| failed(error, to_previous, &args.name))?.into_inner();
    let version = answer.version.ok_or_else(|| ClientError::malformed("holds no version"))?;
    let superseded = answer.superseded_version_id;
    let shape = Shape {
        environment: environment.as_str(),
        name: args.name.as_str(),
        version_id: &version.version_id,
        labels: &version.labels,
        created_at: output::time(version.created_at),
        superseded_version_id: (!superseded.is_empty()).then_some(superseded.as_str()),
    };
    context.output.answer(&shape, || shape.text())?;
    Ok(Exit::DONE)
}

/// Where there is nothing to go back to by itself, the caller learns how to choose.
fn failed(error: ClientError, to_previous: bool, name: &SecretName) -> CliError {
    let nothing_earlier = to_previous && error.reason == Reason::VersionNotFound;
    let mut error = CliError::from(error);
    if nothing_earlier {
        error
            .message
            .push_str(&format!("; no earlier version, choose one with --to (claviger versions {name})"));
    }
    error
}

#[derive(Serialize)]
struct Shape<'a> {
    environment: &'a str,
    name: &'a str,
    version_id: &'a str,
    labels: &'a [String],
    created_at: Option<Timestamp>,
    superseded_version_id: Option<&'a str>,
}

impl Shape<'_> {
    fn text(&self) -> String {
        let Self { environment, name, version_id, .. } = self;
        match self.superseded_version_id {
            Some(superseded) => {
                format!("{name} in {environment}: version {version_id} is current, it was {superseded}")
            }
            None => format!("{name} in {environment}: version {version_id} is current"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_there_is_nothing_earlier_the_mend_is_said() {
        let name = SecretName::parse("db").unwrap();
        let shown = |reason, to_previous| {
            let error = ClientError { reason, ..ClientError::malformed("x") };
            failed(error, to_previous, &name).message
        };
        assert!(
            shown(Reason::VersionNotFound, true).ends_with("choose one with --to (claviger versions db)")
        );
        assert!(!shown(Reason::VersionNotFound, false).contains("--to"), "one was chosen");
        assert!(!shown(Reason::Denied, true).contains("--to"));
    }
}
