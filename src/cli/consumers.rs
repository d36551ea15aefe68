//! `claviger consumers`: who uses a secret, and which version each runs on.
//!
//! ```text
//! {"environment","name","consumers":[{"name","principal","version_id","current","since","reported_at","watching"}]}
//! ```
//! A consumer that watches and never said which version it runs on has `null` for version and times.

use jiff::Timestamp;
use serde::Serialize;

use super::connect::connect;
use super::output::{self, moment, table};
use super::{CliError, Context, Exit};
use crate::client::ClientError;
use crate::proto::v1;
use crate::secret::SecretName;

/// What `consumers` takes.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Secret
    #[arg(value_name = "NAME")]
    name: SecretName,
}

/// Lists who reported and who watches.
pub(super) async fn run(args: Args, context: &Context) -> Result<Exit, CliError> {
    let environment = context.environment()?;
    let request = v1::ListConsumersRequest {
        environment: environment.to_string(),
        name: args.name.to_string(),
        reason: context.reason(),
    };
    let answer =
        connect(context).await?.secrets().list_consumers(request).await.map_err(ClientError::from)?;
    let consumers: Vec<_> = answer.into_inner().consumers.into_iter().map(Consumer::from).collect();
    let shape = Shape { environment: environment.as_str(), name: args.name.as_str(), consumers };
    context.output.answer(&shape, || text(&shape.consumers))?;
    Ok(Exit::DONE)
}

#[derive(Serialize)]
struct Shape<'a> {
    environment: &'a str,
    name: &'a str,
    consumers: Vec<Consumer>,
}

#[derive(Serialize)]
struct Consumer {
    name: String,
    principal: String,
    version_id: Option<String>,
    current: bool,
    since: Option<Timestamp>,
    reported_at: Option<Timestamp>,
    watching: bool,
}

impl From<v1::Consumer> for Consumer {
    fn from(consumer: v1::Consumer) -> Self {
        Self {
            name: consumer.name,
            principal: consumer.principal,
            version_id: (!consumer.version_id.is_empty()).then_some(consumer.version_id),
            current: consumer.current,
            since: output::time(consumer.since),
            reported_at: output::time(consumer.reported_at),
            watching: consumer.watching,
        }
    }
}

fn text(consumers: &[Consumer]) -> String {
    let said = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let row = |consumer: &Consumer| {
        let (version, current) = match &consumer.version_id {
            Some(version) => (version.clone(), said(consumer.current)),
            None => ("-".to_owned(), "-".to_owned()),
        };
        let (since, reported) = (moment(consumer.since), moment(consumer.reported_at));
        let (name, principal) = (consumer.name.clone(), consumer.principal.clone());
        [name, principal, version, current, since, reported, said(consumer.watching)]
    };
    let header = ["NAME", "PRINCIPAL", "VERSION", "CURRENT", "SINCE", "REPORTED", "WATCHING"];
    if consumers.is_empty() { String::new() } else { table(header, consumers.iter().map(row)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_never_reported_has_no_version() {
        let at = |second| Some(prost_types::Timestamp { seconds: second, nanos: 0 });
        let reported = v1::Consumer {
            name: "orders-1".to_owned(),
            principal: "Workload::\"orders\"".to_owned(),
            version_id: "v".repeat(32),
            since: at(1_123_456_789),
            reported_at: at(1_123_999_999),
            current: true,
            watching: false,
        };
        let watching = v1::Consumer {
            name: "web".to_owned(),
            principal: "User::\"ana\"".to_owned(),
            watching: true,
            ..Default::default()
        };
        let shown = text(&[reported, watching].map(Consumer::from));
        let lines: Vec<Vec<_>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0].len(), 7);
        assert_eq!(
            lines[1][2..],
            ["v".repeat(32).as_str(), "yes", "2005-08-07T23:19:49Z", "2005-08-14T06:13:19Z", "no"]
        );
        assert_eq!(lines[2], ["web", "User::\"ana\"", "-", "-", "-", "-", "yes"]);
        assert_eq!(text(&[]), "");
    }
}
