//! `claviger audit`: follow, search and verify the log.
//!
//! ```text
//! tail    one record per line, as the log has it
//! query   {"records":[…]}, newest first
//! verify  {"clean","unanchored","instances":[{"instance","first_sequence","last_sequence","last_hash","checkpoints",
//!          "unanchored","clean_shutdown","losses","repairs","torn_bytes"}],
//!          "findings":[{"file","line","sequence","kind","message"}],"more_findings"}
//! ```
//! For people, what is known of a record stands on one line.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::connect::connect;
use super::output::printable;
use super::policy::parse_subject;
use super::{CliError, Context, Exit};
use crate::audit::{self, Anchor, AuditError, FindingKind, Report, VerifyingKey};
use crate::client::ClientError;
use crate::clock::parse_duration;
use crate::error::Reason;
use crate::policy::Action;
use crate::proto::v1;

/// What can be done with the log.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Follow the log
    Tail(TailArgs),
    /// Search the log, newest first
    Query(QueryArgs),
    /// Verify the chains: the broker's, or those in a folder
    Verify(VerifyArgs),
}

/// What `audit tail` takes.
#[derive(clap::Args)]
pub(super) struct TailArgs {
    /// The whole log, also where CLAVIGER_ENV names an environment
    #[arg(long)]
    all: bool,
}

/// What `audit query` takes.
#[derive(clap::Args)]
pub(super) struct QueryArgs {
    /// The whole log, also where CLAVIGER_ENV names an environment
    #[arg(long)]
    all: bool,
    /// Whose calls: user:ID or workload:ID, or as recorded: User::"ana"
    #[arg(long, value_name = "PRINCIPAL", value_parser = parse_principal)]
    principal: Option<String>,
    /// Which action
    #[arg(long, value_parser = Action::parse)]
    action: Option<Action>,
    /// Which secret; a trailing * makes it a prefix
    #[arg(long, value_name = "NAME")]
    secret: Option<String>,
    /// How it ended
    #[arg(long, value_parser = ["ok", "unchanged", "denied", "unauthenticated", "not_found", "failed"])]
    outcome: Option<String>,
    /// Not before: a time like 2026-01-31T12:00:00Z, or how long ago like 1h
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Before: likewise
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Which request
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// At most so many records
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(i32).range(1..=10_000))]
    limit: i32,
}

/// What `audit verify` takes.
#[derive(clap::Args)]
pub(super) struct VerifyArgs {
    /// Verify the chains in this folder, without a broker
    #[arg(long = "dir", value_name = "DIR")]
    folder: Option<PathBuf>,
    /// File with public keys that sign checkpoints, in hex, one on each line; may be repeated. One key of a succession
    /// is enough; the newest alone where a former one may be in wrong hands
    #[arg(long = "public-key", value_name = "FILE", requires = "folder")]
    public_keys: Vec<PathBuf>,
    /// Verify the chains without any key: whoever can write the files could have written them anew
    #[arg(long, requires = "folder", conflicts_with = "public_keys")]
    unsigned: bool,
    /// Record that is known from elsewhere; may be repeated
    #[arg(long = "anchor", value_name = "INSTANCE:SEQ:HASH", requires = "folder")]
    anchors: Vec<Anchor>,
}

/// Does one of them.
pub(super) async fn run(command: Command, context: &Context) -> Result<Exit, CliError> {
    match command {
        Command::Tail(args) => tail(args, context).await,
        Command::Query(args) => query(args, context).await,
        Command::Verify(args) => verify(args, context).await,
    }
}

async fn tail(args: TailArgs, context: &Context) -> Result<Exit, CliError> {
    let request = v1::TailRequest { environment: view(args.all, context)? };
    let mut client = connect(context).await?.audit_without_deadline();
    let mut lines = client.tail(request).await.map_err(ClientError::from)?.into_inner();
    while let Some(next) = lines.message().await.map_err(ClientError::from)? {
        if next.skipped > 0 {
            context.output.notice(&format!("{} records were left out: reading was too slow", next.skipped));
        }
        let shown = if context.output.is_json() { next.line } else { readable(&next.line) };
        context.output.text(&shown)?;
    }
    Err(CliError::new(Reason::Unavailable, "the broker ended the log's stream; it is shutting down"))
}

async fn query(args: QueryArgs, context: &Context) -> Result<Exit, CliError> {
    narrowed(args.all, context)?.iter().for_each(|notice| context.output.notice(notice));
    let now = context.clock.now();
    let time = |name, text: Option<String>| text.map(|text| parse_time(name, &text, now)).transpose();
    let request = v1::QueryRequest {
        principal: args.principal.unwrap_or_default(),
        action: args.action.map(|action| action.to_string()).unwrap_or_default(),
        environment: view(args.all, context)?,
        secret: args.secret.unwrap_or_default(),
        outcome: args.outcome.unwrap_or_default(),
        since: time("--since", args.since)?,
        until: time("--until", args.until)?,
        request_id: args.request_id.unwrap_or_default(),
        limit: args.limit,
    };
    let answer = connect(context).await?.audit().query(request).await.map_err(ClientError::from)?;
    let lines = answer.into_inner().lines;
    if context.output.is_json() {
        context.output.json(&Records::parse(&lines)?)?;
    } else {
        context.output.text(&lines.iter().map(|line| readable(line)).collect::<Vec<_>>().join("\n"))?;
    }
    perhaps_more(&lines, args.limit).iter().for_each(|notice| context.output.notice(notice));
    Ok(Exit::DONE)
}

/// Said where a variable, not an option, decides what is searched.
fn narrowed(all: bool, context: &Context) -> Result<Option<String>, CliError> {
    if all || context.global.env.is_some() {
        return Ok(None);
    }
    Ok(context.chosen_environment()?.map(|name| {
        format!("only records of environment {name}, as CLAVIGER_ENV says; --all searches everything")
    }))
}

/// Said where as many records came as were asked for.
fn perhaps_more(lines: &[String], limit: i32) -> Option<String> {
    if usize::try_from(limit) != Ok(lines.len()) {
        return None;
    }
    let oldest = lines.last().and_then(|line| serde_json::from_str::<Record>(line).ok());
    let time = oldest.map(|record| record.time).filter(|time| !time.is_empty());
    let until = time.map_or_else(String::new, |time| format!(", or go on with --until {time}"));
    Some(format!(
        "{limit} records came, which is the limit; there may be more: raise it with --limit N{until}"
    ))
}

/// A principal as records have it, from `user:ID`, from `workload:ID` or from that itself.
fn parse_principal(text: &str) -> Result<String, String> {
    if let Ok((kind, id)) = parse_subject(text) {
        return Ok(format!("{}::\"{}\"", kind.entity_type(), id.escape_default()));
    }
    let id = text.strip_prefix("User::\"").or_else(|| text.strip_prefix("Workload::\""));
    match id.and_then(|rest| rest.strip_suffix('"')) {
        Some(id) if !id.is_empty() => Ok(text.to_owned()),
        _ => Err("is neither user:ID, workload:ID nor as recorded, like User::\"ana\"".to_owned()),
    }
}

/// The part of the log that is meant: an environment's, or (empty) all of it.
fn view(all: bool, context: &Context) -> Result<String, CliError> {
    match (all, &context.global.env) {
        (true, Some(given)) => {
            Err(CliError::usage(format!("--all and -e {given} contradict each other; leave one out")))
        }
        (true, None) => Ok(String::new()),
        (false, _) => Ok(context.chosen_environment()?.map(|name| name.to_string()).unwrap_or_default()),
    }
}

/// A time, or how long ago it was.
fn parse_time(name: &str, text: &str, now: Timestamp) -> Result<prost_types::Timestamp, CliError> {
    let time = match (text.parse::<Timestamp>(), parse_duration(text)) {
        (Ok(time), _) => time,
        (_, Ok(ago)) => now.checked_sub(ago).unwrap_or(Timestamp::MIN),
        _ => {
            let shown: String = text.chars().take(32).flat_map(char::escape_default).collect();
            return Err(CliError::usage(format!(
                "{name} `{shown}` is neither a time with its offset, like 2026-01-31T12:00:00Z, nor how long ago, like 1h"
            )));
        }
    };
    Ok(prost_types::Timestamp { seconds: time.as_second(), nanos: time.subsec_nanosecond() })
}

/// Records as the log has them, byte for byte.
#[derive(Serialize)]
struct Records<'a> {
    records: Vec<&'a RawValue>,
}

impl<'a> Records<'a> {
    fn parse(lines: &'a [String]) -> Result<Self, CliError> {
        let records: Result<Vec<_>, _> = lines.iter().map(|line| serde_json::from_str(line)).collect();
        Ok(Self { records: records.map_err(|_| ClientError::malformed("holds a record that is not JSON"))? })
    }
}

/// What people look for in a record. The log's own notices (checkpoints, starts) have a kind alone.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Record {
    time: String,
    kind: String,
    outcome: String,
    principal: String,
    action: String,
    operation: String,
    environment: String,
    secret: String,
    field: String,
    version_id: String,
    stale: bool,
    policies: Vec<String>,
    error: String,
    request_id: String,
    reason: String,
    detail: String,
}

/// A record on one line for people; a line that is no record as it is.
fn readable(line: &str) -> String {
    let Ok(record) = serde_json::from_str::<Record>(line) else { return printable(line) };
    let known = |label: &str, text: &str| match text {
        "" => String::new(),
        text => format!("{label}{text}"),
    };
    let ending = if record.outcome.is_empty() { &record.kind } else { &record.outcome };
    let doing = if record.operation.is_empty() { &record.action } else { &record.operation };
    let about =
        [known("", &record.environment), known(":", &record.secret), known("#", &record.field)].concat();
    let parts = [
        record.time.clone(),
        ending.clone(),
        record.principal.clone(),
        doing.clone(),
        about,
        known("version ", &record.version_id),
        known("", if record.stale { "stale" } else { "" }),
        known("error ", &record.error),
        known("by ", &record.policies.join(",")),
        if record.reason.is_empty() { String::new() } else { format!("reason {:?}", record.reason) },
        known("request ", &record.request_id),
        if record.detail.is_empty() { String::new() } else { format!("({})", record.detail) },
    ];
    let parts: Vec<String> =
        parts.iter().filter(|part| !part.is_empty()).map(|part| printable(part)).collect();
    parts.join(" ")
}

async fn verify(args: VerifyArgs, context: &Context) -> Result<Exit, CliError> {
    let (verified, place) = match &args.folder {
        Some(folder) => (verify_folder(folder, &args, context)?, folder.display().to_string()),
        None => {
            let request = v1::VerifyRequest {};
            let answer = connect(context).await?.audit().verify(request).await.map_err(ClientError::from)?;
            (Verified::from(answer.into_inner()), "of the broker".to_owned())
        }
    };
    if verified.is_void() {
        // Nothing that could be whole: a log that was removed must not pass for a good one.
        return Err(CliError::new(Reason::AuditBroken, format!("the audit log {place} has no records")));
    }
    context.output.answer(&verified, || verified.text())?;
    Ok(if verified.clean { Exit::DONE } else { Exit::FAULTS })
}

fn verify_folder(folder: &Path, args: &VerifyArgs, context: &Context) -> Result<Verified, CliError> {
    if args.public_keys.is_empty() && !args.unsigned {
        return Err(CliError::usage(
            "checkpoints can't be checked without the key that signs them; give --public-key FILE, or --unsigned to \
             verify the chains alone",
        ));
    }
    let keys: Result<Vec<_>, _> = args.public_keys.iter().map(|path| read_keys(path)).collect();
    let verified = audit::verify(folder, &keys?.concat(), &args.anchors);
    let mut report = verified.map_err(|error| not_verified(folder, error))?;
    if args.unsigned {
        report.findings.retain(|finding| finding.kind != FindingKind::UnknownKey);
        context
            .output
            .notice("no checkpoint was checked: whoever can write the files could have written them anew");
    }
    Ok(Verified::from(report))
}

/// Where there is no log at all, that is what is wrong with it; another try won't help.
fn not_verified(folder: &Path, error: AuditError) -> CliError {
    match error {
        AuditError::Unreadable { path, cause } if Path::new(&path) == folder => {
            CliError::new(Reason::AuditBroken, format!("no audit log in {path}: {cause}"))
        }
        error => error.into(),
    }
}

/// Public keys: each on its line as 64 hexadecimal digits, or one as its 32 bytes.
fn read_keys(path: &Path) -> Result<Vec<VerifyingKey>, CliError> {
    const MOST: u64 = 64 << 10;
    let refuse =
        |problem: String| CliError::new(Reason::InvalidKey, format!("{}: {problem}", path.display()));
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MOST).read_to_end(&mut bytes))
        .map_err(|error| refuse(format!("the public key can't be read: {error}")))?;
    let keys = match std::str::from_utf8(&bytes) {
        Ok(text) if bytes.len() != 32 => VerifyingKey::parse_list(text),
        _ => VerifyingKey::from_bytes(&bytes).map(|key| vec![key]),
    };
    keys.map_err(|_| {
        refuse(
            "is no Ed25519 public key; it holds 64 hexadecimal digits on each line, or 32 bytes".to_owned(),
        )
    })
}

#[derive(Serialize)]
struct Verified {
    clean: bool,
    unanchored: u64,
    instances: Vec<Instance>,
    findings: Vec<Finding>,
    more_findings: u64,
}

#[derive(Serialize)]
struct Instance {
    instance: String,
    first_sequence: Option<u64>,
    last_sequence: Option<u64>,
    last_hash: Option<String>,
    checkpoints: u64,
    unanchored: u64,
    clean_shutdown: bool,
    losses: u64,
    repairs: u64,
    torn_bytes: u64,
}

#[derive(Serialize)]
struct Finding {
    file: String,
    line: u64,
    sequence: Option<u64>,
    kind: String,
    message: String,
}

impl From<Report> for Verified {
    fn from(report: Report) -> Self {
        let (clean, unanchored) = (report.is_clean(), report.unanchored());
        let instances = report.instances.into_iter().map(|found| Instance {
            instance: found.instance,
            first_sequence: found.first,
            last_sequence: found.last,
            last_hash: found.last_hash.map(|hash| hash.to_string()),
            checkpoints: found.checkpoints,
            unanchored: found.unanchored,
            clean_shutdown: found.clean_shutdown,
            losses: found.losses,
            repairs: found.repairs,
            torn_bytes: found.torn_bytes,
        });
        let findings = report.findings.into_iter().map(|finding| Finding {
            file: finding.file,
            line: finding.line,
            sequence: finding.sequence,
            kind: finding.kind.as_str().to_owned(),
            message: finding.message,
        });
        Self {
            clean,
            unanchored,
            instances: instances.filter(Instance::is_chain).collect(),
            findings: findings.collect(),
            more_findings: report.more_findings,
        }
    }
}

impl From<v1::VerifyResponse> for Verified {
    fn from(answer: v1::VerifyResponse) -> Self {
        let known = |sequence: u64| (sequence > 0).then_some(sequence);
        let instances = answer.chains.into_iter().map(|chain| Instance {
            instance: chain.instance,
            first_sequence: known(chain.first_sequence),
            last_sequence: known(chain.last_sequence),
            last_hash: (!chain.last_hash.is_empty()).then_some(chain.last_hash),
            checkpoints: chain.checkpoints,
            unanchored: chain.unanchored,
            clean_shutdown: chain.clean_shutdown,
            losses: chain.losses,
            repairs: chain.repairs,
            torn_bytes: chain.torn_bytes,
        });
        let findings = answer.findings.into_iter().map(|finding| Finding {
            file: finding.file,
            line: finding.line,
            sequence: known(finding.sequence),
            kind: finding.kind,
            message: finding.message,
        });
        let (instances, findings): (Vec<_>, Vec<_>) =
            (instances.filter(Instance::is_chain).collect(), findings.collect());
        let unanchored = instances.iter().map(|instance| instance.unanchored).sum();
        let more_findings = answer.more_findings;
        let clean = findings.is_empty() && more_findings == 0;
        Self { clean, unanchored, instances, findings, more_findings }
    }
}

impl Verified {
    /// Whether there is no record at all, and nothing that says why.
    fn is_void(&self) -> bool {
        self.clean && self.instances.iter().all(|instance| instance.last_sequence.is_none())
    }

    /// The findings, each on its line; then each chain with the anchor to keep elsewhere; then the sum.
    fn text(&self) -> String {
        let mut lines: Vec<String> = self.findings.iter().map(Finding::text).collect();
        if self.more_findings > 0 {
            lines.push(format!("{} more findings", self.more_findings));
        }
        lines.extend(self.instances.iter().map(Instance::text));
        let verdict = if self.clean { "the log is whole" } else { "the log has faults; keep it as evidence" };
        let losses: u64 = self.instances.iter().map(|instance| instance.losses).sum();
        let lost = match losses {
            0 => String::new(),
            _ => format!(
                "; LOSSES: {losses} `lost` records tell of what was deleted, replaced or brought back"
            ),
        };
        lines.push(format!("{verdict}{lost}{}", self.anchored()));
        lines.join("\n")
    }

    /// What the last checkpoints reach. Nothing is said to be anchored in a log that has faults.
    fn anchored(&self) -> String {
        match (self.unanchored, self.clean) {
            (0, true) => "; everything is anchored: no record follows the last checkpoints".to_owned(),
            (0, false) => String::new(),
            (unanchored, _) => {
                format!("; UNANCHORED: {unanchored} records follow the last checkpoints")
            }
        }
    }
}

impl Finding {
    fn text(&self) -> String {
        printable(&format!("{}:{}: {}: {}", self.file, self.line, self.kind, self.message))
    }
}

impl Instance {
    /// Whether there is anything of it: a folder without a segment is no chain.
    fn is_chain(&self) -> bool {
        self.last_sequence.is_some() || self.torn_bytes > 0
    }

    fn text(&self) -> String {
        let number =
            |sequence: Option<u64>| sequence.map_or_else(|| "-".to_owned(), |sequence| sequence.to_string());
        let (first, last) = (number(self.first_sequence), number(self.last_sequence));
        let hash = self.last_hash.as_deref().unwrap_or("-");
        printable(&format!(
            "{}: records {first} to {last}, {} checkpoints, {} unanchored{}; anchor {}:{last}:{hash}",
            self.instance,
            self.checkpoints,
            self.unanchored,
            self.incidents(),
            self.instance
        ))
    }

    /// What befell the chain, and how it ended; empty for the usual.
    fn incidents(&self) -> String {
        let counted = |count: u64, what: &str| match count {
            0 => String::new(),
            _ => format!(", {count} {what}"),
        };
        [
            counted(self.losses, "losses"),
            counted(self.repairs, "repairs"),
            counted(self.torn_bytes, "torn bytes"),
            if self.clean_shutdown { ", shut down in good order" } else { "" }.to_owned(),
        ]
        .concat()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{context, refusal};
    use super::*;

    #[test]
    fn the_whole_log_or_an_environment_of_it() {
        let variables = [("CLAVIGER_ENV", "staging")];
        assert_eq!(view(false, &context(&[], &variables)).unwrap(), "staging");
        assert_eq!(view(true, &context(&[], &variables)).unwrap(), "");
        assert_eq!(view(false, &context(&[], &[])).unwrap(), "");
        assert_eq!(view(true, &context(&["-e", "staging"], &[])).unwrap_err().exit(), Exit::USAGE);
    }

    #[test]
    fn a_variable_that_narrows_is_named() {
        let variables = [("CLAVIGER_ENV", "staging")];
        let said = |all, arguments: &[&str], variables: &[(&str, &str)]| {
            narrowed(all, &context(arguments, variables)).unwrap()
        };
        let notice = said(false, &[], &variables).unwrap();
        assert!(notice.contains("staging") && notice.contains("--all"), "{notice}");
        assert_eq!(said(true, &[], &variables), None);
        assert_eq!(said(false, &["-e", "staging"], &variables), None);
        assert_eq!(said(false, &[], &[]), None);
    }

    #[test]
    fn as_many_as_asked_for_may_not_be_all() {
        let lines = [r#"{"time":"t2"}"#.to_owned(), r#"{"time":"t1"}"#.to_owned()];
        let notice = perhaps_more(&lines, 2).unwrap();
        assert!(notice.contains("--limit N") && notice.ends_with("--until t1"), "{notice}");
        assert_eq!(perhaps_more(&lines, 3), None);
        assert_eq!(perhaps_more(&[], 1), None);
        assert!(perhaps_more(&["not JSON".to_owned()], 1).unwrap().ends_with("--limit N"));
    }

    #[test]
    fn a_principal_is_asked_for_as_it_is_recorded() {
        for (given, recorded) in [
            ("user:ana", "User::\"ana\""),
            ("workload:spiffe://x/y", "Workload::\"spiffe://x/y\""),
            ("user:a\"b", "User::\"a\\\"b\""),
            ("User::\"ana\"", "User::\"ana\""),
            ("Workload::\"ci\"", "Workload::\"ci\""),
        ] {
            assert_eq!(parse_principal(given).unwrap(), recorded);
        }
        for bad in [
            "",
            "ana",
            "user:",
            "User::ana",
            "User::\"\"",
            "User::\"",
            "User::\"ana",
            "Group::\"x\"",
            "USER:ana",
        ] {
            assert!(parse_principal(bad).is_err(), "{bad}");
        }
        assert_eq!(refusal(&["audit", "query", "--principal", "ana"]).exit_code(), 2);
    }

    #[tokio::test]
    async fn a_log_that_is_not_there_is_a_fault() {
        let folder = tempfile::tempdir().unwrap();
        let verify_at = |path: &Path, unsigned| {
            let args = VerifyArgs {
                folder: Some(path.to_owned()),
                public_keys: Vec::new(),
                unsigned,
                anchors: Vec::new(),
            };
            async move { verify(args, &context(&[], &[])).await.unwrap_err() }
        };
        let error = verify_at(folder.path(), false).await;
        assert_eq!(error.exit(), Exit::USAGE);
        assert!(error.message.contains("--public-key FILE"), "{}", error.message);
        let missing = folder.path().join("none");
        for path in [folder.path(), missing.as_path()] {
            let error = verify_at(path, true).await;
            assert_eq!(error.exit(), Exit::FAULTS);
            assert!(error.message.starts_with("no audit log in "), "{}", error.message);
        }
        std::fs::create_dir(folder.path().join("broker-1")).unwrap();
        let error = verify_at(folder.path(), true).await;
        assert_eq!((error.exit(), error.reason), (Exit::FAULTS, Some(Reason::AuditBroken)));
        assert!(error.message.ends_with("has no records"), "{}", error.message);
    }

    #[test]
    fn a_folder_without_a_segment_is_no_chain() {
        let chain = |instance: &str, last_sequence| v1::Chain {
            instance: instance.to_owned(),
            first_sequence: last_sequence,
            last_sequence,
            ..v1::Chain::default()
        };
        let chains = vec![chain("empty", 0), chain("full", 3)];
        let verified = Verified::from(v1::VerifyResponse { chains, ..Default::default() });
        assert_eq!(verified.instances.iter().map(|i| i.instance.as_str()).collect::<Vec<_>>(), ["full"]);
        assert!(!verified.is_void());
        let void = v1::VerifyResponse { chains: vec![chain("empty", 0)], ..Default::default() };
        assert!(Verified::from(void).is_void());
        assert!(Verified::from(v1::VerifyResponse::default()).is_void());
        let cut = v1::VerifyResponse { more_findings: 1, ..Default::default() };
        assert!(!Verified::from(cut).is_void(), "the findings say more");
    }

    #[test]
    fn a_time_is_absolute_or_ago() {
        let now = Timestamp::from_second(10_000).unwrap();
        let second = |text: &str| parse_time("--since", text, now).map(|time| time.seconds);
        assert_eq!(second("1h").unwrap(), 6_400);
        assert_eq!(second("1970-01-01T01:00:00+01:00").unwrap(), 0);
        for bad in ["", "yesterday", "1970-01-01", "1970-01-01T00:00:00", "5", "-1h"] {
            let error = second(bad).unwrap_err();
            assert!(error.message.starts_with("--since"), "{bad}: {}", error.message);
        }
    }

    #[test]
    fn a_record_is_readable_on_one_line() {
        let line = r#"{"hash":"x","seq":7,"time":"2026-01-31T12:00:00Z","kind":"access","principal":"User::\"ana\"",
            "action":"read","operation":"get","environment":"production","secret":"db","field":"password",
            "version_id":"v1","outcome":"ok","policies":["a","b"],"reason":"a\nb","request_id":"r-1","new":1}"#;
        assert_eq!(
            readable(line),
            "2026-01-31T12:00:00Z ok User::\"ana\" get production:db#password version v1 by a,b reason \"a\\nb\" \
             request r-1"
        );
        assert_eq!(readable(r#"{"time":"t","kind":"checkpoint","head":"x"}"#), "t checkpoint");
        assert_eq!(readable("not\u{1b} JSON"), "not\\u{1b} JSON");
    }

    #[test]
    fn records_as_json_are_what_the_log_has() {
        let lines = [r#"{"hash":"x","seq":1.0}"#.to_owned()];
        let shown = serde_json::to_string(&Records::parse(&lines).unwrap()).unwrap();
        assert_eq!(shown, r#"{"records":[{"hash":"x","seq":1.0}]}"#);
        assert!(Records::parse(&["{".to_owned()]).is_err());
    }

    #[test]
    fn keys_are_hex_on_a_line_each_or_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pub");
        let read = |content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            read_keys(&path)
        };
        let (one, other) = ("0a".repeat(32), "0b".repeat(32));
        assert_eq!(read(format!("{one}\n").as_bytes()).unwrap(), read(&[10; 32]).unwrap());
        let both = read(format!("{one}\n{other}\n").as_bytes()).unwrap();
        assert_eq!(both, [read(&[10; 32]).unwrap(), read(&[11; 32]).unwrap()].concat());
        let second_bad = format!("{one}\nxyz\n");
        for bad in [&b""[..], b"\n", b"xyz", &[10; 31], &[0xff; 64], second_bad.as_bytes()] {
            let error = read(bad).unwrap_err();
            assert_eq!(error.reason, Some(Reason::InvalidKey));
            assert!(error.message.contains("key.pub"), "{}", error.message);
        }
    }

    #[test]
    fn findings_come_first_and_the_unanchored_are_counted() {
        let answer = v1::VerifyResponse {
            chains: vec![v1::Chain {
                instance: "broker-1".to_owned(),
                first_sequence: 1,
                last_sequence: 120,
                last_hash: "ab".to_owned(),
                checkpoints: 1,
                unanchored: 20,
                ..v1::Chain::default()
            }],
            findings: vec![v1::Finding {
                file: "broker-1/0.jsonl".to_owned(),
                line: 7,
                sequence: 7,
                kind: "hash_mismatch".to_owned(),
                message: "the record was changed".to_owned(),
            }],
            more_findings: 0,
        };
        let verified = Verified::from(answer);
        assert!(!verified.clean);
        assert_eq!(
            verified.text(),
            "broker-1/0.jsonl:7: hash_mismatch: the record was changed\n\
             broker-1: records 1 to 120, 1 checkpoints, 20 unanchored; anchor broker-1:120:ab\n\
             the log has faults; keep it as evidence; UNANCHORED: 20 records follow the last checkpoints"
        );
    }

    #[test]
    fn what_befell_a_log_is_said_though_it_is_whole() {
        let chain = v1::Chain {
            instance: "broker-1".to_owned(),
            first_sequence: 1,
            last_sequence: 9,
            last_hash: "ab".to_owned(),
            checkpoints: 2,
            clean_shutdown: true,
            losses: 1,
            repairs: 2,
            torn_bytes: 40,
            ..v1::Chain::default()
        };
        let found = audit::InstanceReport {
            instance: "broker-1".to_owned(),
            first: Some(1),
            last: Some(9),
            checkpoints: 2,
            clean_shutdown: true,
            losses: 1,
            repairs: 2,
            torn_bytes: 40,
            ..audit::InstanceReport::default()
        };
        let online = Verified::from(v1::VerifyResponse { chains: vec![chain], ..Default::default() });
        let offline = Verified::from(Report { instances: vec![found], ..Report::default() });
        for (verified, hash) in [(online, "ab"), (offline, "-")] {
            assert!(verified.clean);
            assert_eq!(
                verified.text(),
                format!(
                    "broker-1: records 1 to 9, 2 checkpoints, 0 unanchored, 1 losses, 2 repairs, 40 torn bytes, \
                     shut down in good order; anchor broker-1:9:{hash}\n\
                     the log is whole; LOSSES: 1 `lost` records tell of what was deleted, replaced or brought back; \
                     everything is anchored: no record follows the last checkpoints"
                )
            );
            let json = serde_json::to_value(&verified).unwrap();
            let instance = &json["instances"][0];
            assert_eq!(instance["losses"], 1);
            assert_eq!(instance["repairs"], 2);
            assert_eq!(instance["torn_bytes"], 40);
        }
    }

    #[test]
    fn findings_left_out_are_counted() {
        let online = Verified::from(v1::VerifyResponse { more_findings: 7, ..Default::default() });
        assert!(!online.clean);
        assert_eq!(online.text(), "7 more findings\nthe log has faults; keep it as evidence");
        assert_eq!(serde_json::to_value(&online).unwrap()["more_findings"], 7);
    }

    #[test]
    fn keys_and_anchors_are_for_a_folder() {
        for arguments in [
            &["audit", "verify", "--public-key", "x"][..],
            &["audit", "verify", "--anchor", "a:1:00"],
            &["audit", "verify", "--unsigned"],
            &["audit", "verify", "--dir", "x", "--unsigned", "--public-key", "k"],
            &["audit", "query", "--outcome", "fine"],
            &["audit", "query", "--limit", "0"],
            &["audit", "query", "--action", "raed"],
        ] {
            assert_eq!(refusal(arguments).exit_code(), 2, "{arguments:?}");
        }
    }
}
