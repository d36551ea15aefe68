//! `claviger describe` and `claviger versions`: a secret without its value.
//!
//! ```text
//! describe  {"environment","name","created_at","changed_at","deletion_at","versions":[…]}
//! versions  {"environment","name","versions":[{"version_id","labels","created_at"}]}
//! ```
//! Versions stand newest first.

use jiff::Timestamp;
use serde::Serialize;

use super::connect::connect;
use super::output::{self, moment, table};
use super::{CliError, Context, Exit};
use crate::client::ClientError;
use crate::proto::v1;
use crate::secret::SecretName;

/// What `describe` takes.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Secret
    name: SecretName,
}

/// What `versions` takes.
#[derive(clap::Args)]
pub(super) struct VersionsArgs {
    /// Secret
    name: SecretName,
}

/// Shows what is known of a secret.
pub(super) async fn run(args: Args, context: &Context) -> Result<Exit, CliError> {
    let shape = described(&args.name, context).await?;
    context.output.answer(&shape, || shape.text())?;
    Ok(Exit::DONE)
}

/// Lists its versions alone.
pub(super) async fn run_versions(args: VersionsArgs, context: &Context) -> Result<Exit, CliError> {
    let Shape { environment, name, versions, .. } = described(&args.name, context).await?;
    let shape = VersionsShape { environment, name, versions };
    context.output.answer(&shape, || versions_table(&shape.versions))?;
    Ok(Exit::DONE)
}

async fn described(name: &SecretName, context: &Context) -> Result<Shape, CliError> {
    let request = v1::DescribeSecretRequest {
        environment: context.environment()?.to_string(),
        name: name.to_string(),
        reason: context.reason(),
    };
    let answer =
        connect(context).await?.secrets().describe_secret(request).await.map_err(ClientError::from)?;
    let found = answer.into_inner();
    Ok(Shape {
        environment: found.environment,
        name: found.name,
        created_at: output::time(found.created_at),
        changed_at: output::time(found.changed_at),
        deletion_at: output::time(found.deletion_at),
        versions: found.versions.into_iter().map(Version::from).collect(),
    })
}

#[derive(Serialize)]
struct Shape {
    environment: String,
    name: String,
    created_at: Option<Timestamp>,
    changed_at: Option<Timestamp>,
    deletion_at: Option<Timestamp>,
    versions: Vec<Version>,
}

#[derive(Serialize)]
struct VersionsShape {
    environment: String,
    name: String,
    versions: Vec<Version>,
}

#[derive(Serialize)]
struct Version {
    version_id: String,
    labels: Vec<String>,
    created_at: Option<Timestamp>,
}

impl From<v1::Version> for Version {
    fn from(version: v1::Version) -> Self {
        let created_at = output::time(version.created_at);
        Self { version_id: version.version_id, labels: version.labels, created_at }
    }
}

impl Shape {
    fn text(&self) -> String {
        let mut text = format!(
            "name         {}\nenvironment  {}\ncreated      {}\nchanged      {}\n",
            output::printable(&self.name),
            output::printable(&self.environment),
            moment(self.created_at),
            moment(self.changed_at)
        );
        if self.deletion_at.is_some() {
            text.push_str(&format!("deleted      can be restored until {}\n", moment(self.deletion_at)));
        }
        text + "\n" + &versions_table(&self.versions)
    }
}

fn versions_table(versions: &[Version]) -> String {
    table(
        ["VERSION", "CREATED", "LABELS"],
        versions.iter().map(|v| [v.version_id.clone(), moment(v.created_at), v.labels.join(", ")]),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_says_when_a_deleted_secret_is_gone() {
        let at = |second| Some(Timestamp::from_second(second).unwrap());
        let version = |id: &str, labels: &[&str]| Version {
            version_id: id.to_owned(),
            labels: labels.iter().map(|label| (*label).to_owned()).collect(),
            created_at: at(0),
        };
        let shape = Shape {
            environment: "staging".to_owned(),
            name: "db".to_owned(),
            created_at: at(0),
            changed_at: at(60),
            deletion_at: at(86_400),
            versions: vec![version("v2", &["AWSCURRENT", "stable"]), version("v1", &[])],
        };
        assert_eq!(
            shape.text(),
            "name         db\nenvironment  staging\ncreated      1970-01-01T00:00:00Z\n\
             changed      1970-01-01T00:01:00Z\ndeleted      can be restored until 1970-01-02T00:00:00Z\n\n\
             VERSION  CREATED               LABELS\nv2       1970-01-01T00:00:00Z  AWSCURRENT, stable\n\
             v1       1970-01-01T00:00:00Z\n"
        );
    }
}
