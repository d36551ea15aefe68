//! `claviger list`: names, never values.
//!
//! ```text
//! {"environment","secrets":[{"name","changed_at","deletion_at"}],"more"}
//! ```
//! `more`: `--limit` left some out.

use jiff::Timestamp;
use serde::Serialize;

use super::connect::connect;
use super::output::{self, moment, table};
use super::{CliError, Context, Exit};
use crate::client::{ClientError, Secrets};
use crate::proto::v1;

/// The most that a page holds (see `ListSecretsRequest`).
const PAGE: u32 = 100;

/// What `list` takes.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Only names that start with this
    #[arg(long, value_name = "PREFIX")]
    prefix: Option<String>,
    /// Also those that are deleted and can still be restored
    #[arg(long)]
    deleted: bool,
    /// At most so many names
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
}

/// Lists names, page by page.
pub(super) async fn run(args: Args, context: &Context) -> Result<Exit, CliError> {
    let environment = context.environment()?;
    let request = v1::ListSecretsRequest {
        environment: environment.to_string(),
        prefix: args.prefix.unwrap_or_default(),
        include_deleted: args.deleted,
        reason: context.reason(),
        ..v1::ListSecretsRequest::default()
    };
    let mut secrets = connect(context).await?.secrets();
    let (listed, more) = follow(&mut secrets, request, args.limit.unwrap_or(u32::MAX)).await?;
    let shape = Shape {
        environment: environment.as_str(),
        secrets: listed
            .into_iter()
            .map(|secret| Listed {
                name: secret.name,
                changed_at: output::time(secret.changed_at),
                deletion_at: output::time(secret.deletion_at),
            })
            .collect(),
        more,
    };
    context.output.answer(&shape, || text(&shape.secrets, args.deleted))?;
    if more && !context.output.is_json() {
        context.output.notice("there are more; raise --limit");
    }
    Ok(Exit::DONE)
}

/// Every page until there is no more, or until there are `limit` names.
async fn follow(
    secrets: &mut Secrets,
    mut request: v1::ListSecretsRequest,
    limit: u32,
) -> Result<(Vec<v1::ListedSecret>, bool), CliError> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let mut listed = Vec::new();
    loop {
        let missing = u32::try_from(limit.saturating_sub(listed.len())).unwrap_or(PAGE);
        request.page_size = i32::try_from(missing.min(PAGE)).unwrap_or(0);
        let page = secrets.list_secrets(request.clone()).await.map_err(ClientError::from)?.into_inner();
        listed.extend(page.secrets);
        let more = !page.next_page_token.is_empty();
        if !more || listed.len() >= limit {
            let cut = listed.len() > limit;
            listed.truncate(limit);
            return Ok((listed, more || cut));
        }
        if page.next_page_token == request.page_token {
            return Err(ClientError::malformed("gives the same page for ever").into());
        }
        request.page_token = page.next_page_token;
    }
}

#[derive(Serialize)]
struct Shape<'a> {
    environment: &'a str,
    secrets: Vec<Listed>,
    more: bool,
}

#[derive(Serialize)]
struct Listed {
    name: String,
    changed_at: Option<Timestamp>,
    deletion_at: Option<Timestamp>,
}

fn text(secrets: &[Listed], with_deleted: bool) -> String {
    let changed = |secret: &Listed| moment(secret.changed_at);
    match (secrets.is_empty(), with_deleted) {
        (true, _) => String::new(),
        (false, false) => {
            table(["NAME", "CHANGED"], secrets.iter().map(|secret| [secret.name.clone(), changed(secret)]))
        }
        (false, true) => table(
            ["NAME", "CHANGED", "GONE AT"],
            secrets.iter().map(|secret| [secret.name.clone(), changed(secret), moment(secret.deletion_at)]),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_a_table_and_nothing_is_nothing() {
        let listed = |name: &str, gone: Option<i64>| Listed {
            name: name.to_owned(),
            changed_at: Some(Timestamp::from_second(1_123_456_789).unwrap()),
            deletion_at: gone.map(|second| Timestamp::from_second(second).unwrap()),
        };
        let secrets = [listed("api-keys", None), listed("db", Some(1_123_999_999))];
        assert_eq!(
            text(&secrets, false),
            "NAME      CHANGED\napi-keys  2005-08-07T23:19:49Z\ndb        2005-08-07T23:19:49Z\n"
        );
        assert!(text(&secrets, true).ends_with("db        2005-08-07T23:19:49Z  2005-08-14T06:13:19Z\n"));
        assert_eq!(text(&[], true), "");
    }
}
