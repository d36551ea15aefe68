//! `claviger delete` and `claviger restore`.
//!
//! ```text
//! delete   {"environment","name","deletion_at"}
//! restore  {"environment","name"}
//! ```

use jiff::Timestamp;
use serde::Serialize;

use super::connect::connect;
use super::output::{self, moment};
use super::{CliError, Context, Exit};
use crate::client::ClientError;
use crate::proto::v1;
use crate::secret::SecretName;

/// What `delete` takes.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Secret
    name: SecretName,
    /// How many days it can be restored
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(i32).range(7..=30))]
    days: i32,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

/// What `restore` takes.
#[derive(clap::Args)]
pub(super) struct RestoreArgs {
    /// Secret
    name: SecretName,
}

/// Deletes a secret, once a person or `--yes` has confirmed it.
pub(super) async fn run(args: Args, context: &Context) -> Result<Exit, CliError> {
    let environment = context.environment()?;
    let (name, days) = (&args.name, args.days);
    let question = format!("delete {name} in {environment}? it can be restored for {days} days");
    if !args.yes && !context.output.confirm(&question)? {
        return Err(CliError::usage(format!("not confirmed; {name} in {environment} was not deleted")));
    }
    let request = v1::DeleteSecretRequest {
        environment: environment.to_string(),
        name: name.to_string(),
        recovery_window_days: days,
        reason: context.reason(),
        approval_id: String::new(),
    };
    let answer = connect(context).await?.secrets().delete_secret(request).await.map_err(ClientError::from)?;
    let deletion_at = output::time(answer.into_inner().deletion_at);
    let shape = Deleted { environment: environment.as_str(), name: name.as_str(), deletion_at };
    let until = moment(deletion_at);
    context
        .output
        .answer(&shape, || format!("{name} in {environment}: deleted; it can be restored until {until}"))?;
    Ok(Exit::DONE)
}

/// Brings a deleted secret back.
pub(super) async fn run_restore(args: RestoreArgs, context: &Context) -> Result<Exit, CliError> {
    let environment = context.environment()?;
    let name = &args.name;
    let request = v1::RestoreSecretRequest {
        environment: environment.to_string(),
        name: name.to_string(),
        reason: context.reason(),
        approval_id: String::new(),
    };
    connect(context).await?.secrets().restore_secret(request).await.map_err(ClientError::from)?;
    let shape = Restored { environment: environment.as_str(), name: name.as_str() };
    context.output.answer(&shape, || format!("{name} in {environment}: restored"))?;
    Ok(Exit::DONE)
}

#[derive(Serialize)]
struct Deleted<'a> {
    environment: &'a str,
    name: &'a str,
    deletion_at: Option<Timestamp>,
}

#[derive(Serialize)]
struct Restored<'a> {
    environment: &'a str,
    name: &'a str,
}

#[cfg(test)]
mod tests {
    use super::super::tests::refusal;

    #[test]
    fn the_recovery_window_is_seven_to_thirty_days() {
        for days in ["6", "31", "-1", "x"] {
            let error = refusal(&["delete", "db", &format!("--days={days}")]);
            assert_eq!(error.exit_code(), 2, "{days}");
            assert!(error.render().to_string().contains("--days"), "{days}");
        }
    }
}
