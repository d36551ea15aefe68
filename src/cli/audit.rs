//! `claviger audit`: follow, search and verify the log.
//!
//! ```text
//! tail    one record per line, as the log has it
//! query   {"records":[…]}, newest first
//! verify  {"clean","unanchored","instances":[{"instance","first_sequence","last_sequence","last_hash","checkpoints",
//!          "unanchored","clean_shutdown","losses","repairs","torn_bytes"}],"findings":[{"file","line","sequence","kind","message"}],"more_findings"}
//! ```
//! For people, what is known of a record stands on one line.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::connect::connect;
use super::output::printable;
use super::{CliError, Context, Exit};
use crate::audit::{self, Anchor, Report, VerifyingKey};
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
    /// Whose calls, as recorded: User::"ana"
    #[arg(long, value_name = "PRINCIPAL")]
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
    /// File with a public key that signs checkpoints, in hex; may be repeated
    #[arg(long = "public-key", value_name = "FILE", requires = "folder")]
    public_keys: Vec<PathBuf>,
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
    Ok(Exit::DONE)
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
    let verified = match &args.folder {
        Some(folder) => {
            let keys: Result<Vec<_>, _> = args.public_keys.iter().map(|path| read_key(path)).collect();
            Verified::from(audit::verify(folder, &keys?, &args.anchors)?)
        }
        None => {
            let request = v1::VerifyRequest {};
            let answer = connect(context).await?.audit().verify(request).await.map_err(ClientError::from)?;
            Verified::from(answer.into_inner())
        }
    };
    context.output.answer(&verified, || verified.text())?;
    Ok(if verified.clean { Exit::DONE } else { Exit::FAULTS })
}

/// A public key: 64 hexadecimal digits, or the 32 bytes.
fn read_key(path: &Path) -> Result<VerifyingKey, CliError> {
    const MOST: u64 = 1_024;
    let refuse =
        |problem: String| CliError::new(Reason::InvalidKey, format!("{}: {problem}", path.display()));
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MOST).read_to_end(&mut bytes))
        .map_err(|error| refuse(format!("the public key can't be read: {error}")))?;
    let key = match std::str::from_utf8(&bytes) {
        Ok(text) if bytes.len() != 32 => VerifyingKey::parse(text),
        _ => VerifyingKey::from_bytes(&bytes),
    };
    key.map_err(|_| {
        refuse("is no Ed25519 public key; it holds 64 hexadecimal digits, or 32 bytes".to_owned())
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
            instances: instances.collect(),
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
        let (instances, findings): (Vec<_>, Vec<_>) = (instances.collect(), findings.collect());
        let unanchored = instances.iter().map(|instance| instance.unanchored).sum();
        let more_findings = answer.more_findings;
        let clean = findings.is_empty() && more_findings == 0;
        Self { clean, unanchored, instances, findings, more_findings }
    }
}

impl Verified {
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
        let unanchored = self.unanchored;
        lines.push(format!("{verdict}{lost}; UNANCHORED: {unanchored} records follow the last checkpoints"));
        lines.join("\n")
    }
}

impl Finding {
    fn text(&self) -> String {
        printable(&format!("{}:{}: {}: {}", self.file, self.line, self.kind, self.message))
    }
}

impl Instance {
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
    fn a_key_is_hex_or_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pub");
        let read = |content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            read_key(&path)
        };
        let hex = format!("{}\n", "0a".repeat(32));
        assert_eq!(read(hex.as_bytes()).unwrap(), read(&[10; 32]).unwrap());
        for bad in [&b""[..], b"xyz", &[10; 31], &[0xff; 64]] {
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
                     UNANCHORED: 0 records follow the last checkpoints"
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
        assert!(online.text().starts_with("7 more findings\n"), "{}", online.text());
        assert_eq!(serde_json::to_value(&online).unwrap()["more_findings"], 7);
    }

    #[test]
    fn keys_and_anchors_are_for_a_folder() {
        for arguments in [
            &["audit", "verify", "--public-key", "x"][..],
            &["audit", "verify", "--anchor", "a:1:00"],
            &["audit", "query", "--outcome", "fine"],
            &["audit", "query", "--limit", "0"],
            &["audit", "query", "--action", "raed"],
        ] {
            assert_eq!(refusal(arguments).exit_code(), 2, "{arguments:?}");
        }
    }
}
