//! `claviger cache`: what the broker remembers of its stores.
//!
//! ```text
//! purge  {"environment","name","entries"}      environment: null where it was all of them; name: null where all of it
//! stats  {"caches":[{"environment","hits","misses","stale","negative_hits","refreshes_ahead","upstream_calls",
//!                    "upstream_errors","entries","bytes","upstream_secrets","coalesced","quota_waits",
//!                    "quota_refusals","most_asked":[{"name","calls"}],"others_asked"}]}
//! ```
//!
//! As text, `stats` is a line for each environment, and below it one for each of the secrets that its store was asked for
//! most often: `most_asked`, at most 20, and all others together.

use serde::Serialize;

use super::connect::connect;
use super::output::table;
use super::{CliError, Context, Exit};
use crate::client::ClientError;
use crate::proto::v1;
use crate::secret::{EnvironmentName, SecretName};

/// What can be done with the caches.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Forget what is cached, so that the next read asks the store
    Purge(PurgeArgs),
    /// Show how each environment's cache does
    Stats,
}

/// What `cache purge` takes.
#[derive(clap::Args)]
pub(super) struct PurgeArgs {
    /// Secret; without one, all of the environment
    name: Option<SecretName>,
    /// All of every environment
    #[arg(long, conflicts_with = "name")]
    all: bool,
}

/// Does one of them.
pub(super) async fn run(command: Command, context: &Context) -> Result<Exit, CliError> {
    match command {
        Command::Purge(args) => purge(args, context).await?,
        Command::Stats => stats(context).await?,
    }
    Ok(Exit::DONE)
}

async fn purge(args: PurgeArgs, context: &Context) -> Result<(), CliError> {
    let environment = scope(&args, context)?;
    let text = |name: Option<&str>| name.unwrap_or_default().to_owned();
    let (environment, name) =
        (environment.as_ref().map(EnvironmentName::as_str), args.name.as_ref().map(SecretName::as_str));
    let request =
        v1::PurgeCacheRequest { environment: text(environment), name: text(name), reason: context.reason() };
    let answer = connect(context).await?.caches().purge_cache(request).await.map_err(ClientError::from)?;
    let shape = Purged { environment, name, entries: answer.into_inner().entries };
    context.output.answer(&shape, || shape.text())
}

/// The environment that is meant; `None`: every one. What many would feel is said, not guessed.
fn scope(args: &PurgeArgs, context: &Context) -> Result<Option<EnvironmentName>, CliError> {
    match (args.all, context.chosen_environment()?) {
        // A variable of the shell is no contradiction: what is typed is what is meant.
        (true, _) if context.global.env.is_none() => Ok(None),
        (true, _) => Err(CliError::usage("--all is every environment and -e is one; give one of them")),
        (false, Some(environment)) => Ok(Some(environment)),
        (false, None) if args.name.is_some() => context.environment().map(Some),
        (false, None) => Err(CliError::usage(
            "which environment? give -e ENV or set CLAVIGER_ENV, or say --all for every one",
        )),
    }
}

async fn stats(context: &Context) -> Result<(), CliError> {
    let request = v1::GetCacheStatisticsRequest { reason: context.reason() };
    let mut client = connect(context).await?.caches();
    let answer = client.get_cache_statistics(request).await.map_err(ClientError::from)?;
    let shape = Stats { caches: answer.into_inner().caches.into_iter().map(Statistics::from).collect() };
    context.output.answer(&shape, || text(&shape.caches))
}

#[derive(Serialize)]
struct Purged<'a> {
    environment: Option<&'a str>,
    name: Option<&'a str>,
    entries: u64,
}

impl Purged<'_> {
    fn text(&self) -> String {
        let place = self.environment.unwrap_or("every environment");
        match (self.name, self.entries) {
            (Some(name), 0) => format!("{name} in {place}: was not cached"),
            (Some(name), _) => format!("{name} in {place}: forgotten"),
            (None, 1) => format!("{place}: 1 secret forgotten"),
            (None, entries) => format!("{place}: {entries} secrets forgotten"),
        }
    }
}

#[derive(Serialize)]
struct Stats {
    caches: Vec<Statistics>,
}

#[derive(Serialize)]
struct Statistics {
    environment: String,
    hits: u64,
    misses: u64,
    stale: u64,
    negative_hits: u64,
    refreshes_ahead: u64,
    upstream_calls: u64,
    upstream_errors: u64,
    entries: u64,
    bytes: u64,
    upstream_secrets: u64,
    coalesced: u64,
    quota_waits: u64,
    quota_refusals: u64,
    most_asked: Vec<Asked>,
    others_asked: u64,
}

#[derive(Serialize)]
struct Asked {
    name: String,
    calls: u64,
}

impl From<v1::CacheStatistics> for Statistics {
    fn from(found: v1::CacheStatistics) -> Self {
        Self {
            environment: found.environment,
            hits: found.hits,
            misses: found.misses,
            stale: found.stale,
            negative_hits: found.negative_hits,
            refreshes_ahead: found.refreshes_ahead,
            upstream_calls: found.upstream_calls,
            upstream_errors: found.upstream_errors,
            entries: found.entries,
            bytes: found.bytes,
            upstream_secrets: found.upstream_secrets,
            coalesced: found.coalesced,
            quota_waits: found.quota_waits,
            quota_refusals: found.quota_refusals,
            most_asked: found.most_asked.into_iter().map(Asked::from).collect(),
            others_asked: found.others_asked,
        }
    }
}

impl From<v1::AskedSecret> for Asked {
    fn from(found: v1::AskedSecret) -> Self {
        Self { name: found.name, calls: found.calls }
    }
}

fn text(caches: &[Statistics]) -> String {
    let figures = figures(caches);
    match most_asked(caches) {
        Some(most_asked) => [figures, most_asked].join("\n"),
        None => figures,
    }
}

fn figures(caches: &[Statistics]) -> String {
    let row = |cache: &Statistics| {
        let figures = [
            cache.hits,
            cache.misses,
            cache.stale,
            cache.negative_hits,
            cache.refreshes_ahead,
            cache.upstream_calls,
            cache.upstream_secrets,
            cache.quota_waits,
            cache.upstream_errors,
            cache.entries,
            cache.bytes,
        ];
        let [hits, misses, stale, absent, ahead, calls, asked, waits, errors, secrets, bytes] =
            figures.map(|figure| figure.to_string());
        let environment = cache.environment.clone();
        [environment, hits, misses, stale, absent, ahead, calls, asked, waits, errors, secrets, bytes]
    };
    let header = [
        "ENVIRONMENT",
        "HITS",
        "MISSES",
        "STALE",
        "ABSENT",
        "AHEAD",
        "CALLS",
        "ASKED",
        "WAITED",
        "ERRORS",
        "SECRETS",
        "BYTES",
    ];
    table(header, caches.iter().map(row))
}

/// `None` where no store was asked for anything yet. No secret's name is in brackets.
fn most_asked(caches: &[Statistics]) -> Option<String> {
    let rows: Vec<[String; 3]> = caches
        .iter()
        .flat_map(|cache| {
            let named = cache.most_asked.iter().map(|asked| (asked.name.as_str(), asked.calls));
            let others = (cache.others_asked > 0).then_some(("(others)", cache.others_asked));
            let row = move |(name, calls): (&str, u64)| {
                [cache.environment.clone(), name.to_owned(), calls.to_string()]
            };
            named.chain(others).map(row)
        })
        .collect();
    (!rows.is_empty()).then(|| table(["ENVIRONMENT", "SECRET", "ASKED FOR"], rows))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{context, refusal};
    use super::*;

    fn scoped(
        name: Option<&str>,
        all: bool,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Result<Option<String>, String> {
        let args = PurgeArgs { name: name.map(|name| name.parse().unwrap()), all };
        let scope = scope(&args, &context(arguments, variables));
        scope.map(|scope| scope.map(|name| name.to_string())).map_err(|error| error.message)
    }

    #[test]
    fn every_environment_is_meant_only_where_it_is_said() {
        let staging = || Ok(Some("staging".to_owned()));
        assert_eq!(scoped(None, false, &["-e", "staging"], &[]), staging());
        assert_eq!(scoped(Some("db"), false, &[], &[("CLAVIGER_ENV", "staging")]), staging());
        assert_eq!(scoped(None, true, &[], &[("CLAVIGER_ENV", "staging")]), Ok(None));
        for (name, all, arguments, part) in [
            (None, false, &[][..], "--all"),
            (Some("db"), false, &[], "CLAVIGER_ENV"),
            (None, true, &["-e", "staging"], "give one of them"),
        ] {
            let error = scoped(name, all, arguments, &[]).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(refusal(&["cache", "purge", "db", "--all"]).exit_code(), 2);
    }

    #[test]
    fn what_was_forgotten_is_said_in_words() {
        let said = |environment, name, entries| Purged { environment, name, entries }.text();
        assert_eq!(said(Some("staging"), Some("db"), 1), "db in staging: forgotten");
        assert_eq!(said(Some("staging"), Some("db"), 0), "db in staging: was not cached");
        assert_eq!(said(Some("staging"), None, 1), "staging: 1 secret forgotten");
        assert_eq!(said(None, None, 12), "every environment: 12 secrets forgotten");
    }

    fn figures_of_staging() -> v1::CacheStatistics {
        v1::CacheStatistics {
            environment: "staging".to_owned(),
            hits: 1,
            misses: 2,
            stale: 3,
            negative_hits: 4,
            refreshes_ahead: 5,
            upstream_calls: 6,
            upstream_errors: 7,
            entries: 8,
            bytes: 9,
            upstream_secrets: 10,
            coalesced: 11,
            quota_waits: 12,
            quota_refusals: 13,
            ..v1::CacheStatistics::default()
        }
    }

    #[test]
    fn each_cache_has_its_line() {
        let shown = text(&[figures_of_staging().into()]);
        let lines: Vec<Vec<_>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines.len(), 2, "nothing was asked for: {shown}");
        assert_eq!(lines[1], ["staging", "1", "2", "3", "4", "5", "6", "10", "12", "7", "8", "9"], "{shown}");
        assert_eq!(lines[0].len(), lines[1].len());
    }

    #[test]
    fn the_secrets_that_were_asked_for_most_have_lines_below() {
        let asked = |name: &str, calls| v1::AskedSecret { name: name.to_owned(), calls };
        let most_asked = vec![asked("db", 7), asked("payments/key", 3)];
        let staging = v1::CacheStatistics { most_asked, others_asked: 2, ..figures_of_staging() };
        let shown = text(&[Statistics::from(staging)]);
        let below: Vec<Vec<_>> =
            shown.lines().skip(3).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(
            below,
            [
                ["ENVIRONMENT", "SECRET", "ASKED", "FOR"].as_slice(),
                &["staging", "db", "7"],
                &["staging", "payments/key", "3"],
                &["staging", "(others)", "2"],
            ],
            "{shown}"
        );
    }
}
