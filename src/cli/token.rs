//! `claviger token`: the broker's own tokens.
//!
//! ```text
//! create  {"token":{…},"secret"}
//! list    {"tokens":[{"id","kind":"user"|"workload","principal","groups","claims","created_at","expires_at",
//!                     "revoked_at","created_by","environments","source_addresses","last_used_at","last_used_from"}]}
//! revoke  {"id"}
//! ```
//! The secret is in the answer to `create` and nowhere else.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use zeroize::Zeroizing;

use super::connect::connect;
use super::output::{self, Output, moment, table};
use super::{CliError, Context, Exit};
use crate::client::ClientError;
use crate::clock::{SharedClock, parse_duration};
use crate::identity::token::SourceRange;
use crate::proto::v1;
use crate::secret::EnvironmentName;

/// What can be done with tokens.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Issue a token and print it, this once
    Create(CreateArgs),
    /// List the tokens, without their secrets
    List,
    /// End a token now
    Revoke(RevokeArgs),
}

/// What `token create` takes.
#[derive(clap::Args)]
pub(super) struct CreateArgs {
    #[command(flatten)]
    subject: SubjectArgs,
    /// How long it lasts: 1m to 400d
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    expires: Duration,
    /// Environment that it is good for; may be repeated; without one, for all and the broker itself
    #[arg(long = "only-in", value_name = "ENV")]
    environments: Vec<EnvironmentName>,
    /// Where it may be used from: an address, a CIDR range or `unix`; may be repeated; without one, anywhere
    #[arg(long = "from", value_name = "RANGE", value_parser = SourceRange::parse)]
    source_addresses: Vec<SourceRange>,
}

/// Whom a token, or a question, is about.
#[derive(clap::Args)]
pub(super) struct SubjectArgs {
    #[command(flatten)]
    stands_for: StandsForArgs,
    /// Group of theirs; may be repeated
    #[arg(long = "group", value_name = "GROUP")]
    groups: Vec<String>,
    /// Claim of theirs; may be repeated
    #[arg(long = "claim", value_name = "KEY=VALUE", value_parser = parse_claim)]
    claims: Vec<(String, String)>,
}

/// A person or a program: exactly one.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct StandsForArgs {
    /// Person that it stands for
    #[arg(long, value_name = "ID")]
    user: Option<String>,
    /// Program that it stands for
    #[arg(long, value_name = "ID")]
    workload: Option<String>,
}

/// What `token revoke` takes.
#[derive(clap::Args)]
pub(super) struct RevokeArgs {
    /// Public id of the token, as `token list` shows it, or the token itself
    id: String,
}

/// Does one of them.
pub(super) async fn run(command: Command, context: &Context) -> Result<Exit, CliError> {
    match command {
        Command::Create(args) => create(args, context).await?,
        Command::List => list(context).await?,
        Command::Revoke(args) => revoke(args, context).await?,
    }
    Ok(Exit::DONE)
}

async fn create(args: CreateArgs, context: &Context) -> Result<(), CliError> {
    let expires_in = prost_types::Duration::try_from(args.expires)
        .map_err(|_| CliError::usage("--expires is too long; at most 400d"))?;
    let request = v1::CreateTokenRequest {
        subject: Some(args.subject.into_subject()?),
        expires_in: Some(expires_in),
        reason: context.reason(),
        environments: args.environments.iter().map(ToString::to_string).collect(),
        source_addresses: args.source_addresses.iter().map(ToString::to_string).collect(),
    };
    let answer = connect(context).await?.tokens().create_token(request).await.map_err(ClientError::from)?;
    let answer = answer.into_inner();
    let secret = Zeroizing::new(answer.secret);
    let token = answer.token.ok_or_else(|| ClientError::malformed("holds no token"))?;
    created(&Token::from(token), &secret, context.output)
}

/// The secret alone on stdout, so that it can be piped into a file; what else there is to say on stderr.
fn created(token: &Token, secret: &Zeroizing<String>, output: Output) -> Result<(), CliError> {
    if output.is_json() {
        let shape = Created { token, secret: secret.as_str() };
        return output.secret_json(&shape, 64 * 1024);
    }
    let (id, principal, expires) = (&token.id, &token.principal, moment(token.expires_at));
    output.notice(&format!(
        "token {id} for {} {principal}, until {expires}; it is shown this once",
        token.kind
    ));
    output.bytes(secret.as_bytes())?;
    output.bytes(b"\n")
}

async fn list(context: &Context) -> Result<(), CliError> {
    let mut client = connect(context).await?.tokens();
    let mut request = v1::ListTokensRequest::default();
    let mut tokens = Vec::new();
    loop {
        let page = client.list_tokens(request.clone()).await.map_err(ClientError::from)?.into_inner();
        tokens.extend(page.tokens.into_iter().map(Token::from));
        if page.next_page_token.is_empty() {
            break;
        }
        if page.next_page_token == request.page_token {
            return Err(ClientError::malformed("gives the same page for ever").into());
        }
        request.page_token = page.next_page_token;
    }
    let shape = List { tokens };
    context.output.answer(&shape, || text(&shape.tokens, &context.clock))
}

async fn revoke(args: RevokeArgs, context: &Context) -> Result<(), CliError> {
    let id = public_id(&args.id)?;
    let request = v1::RevokeTokenRequest { id: id.to_owned(), reason: context.reason() };
    connect(context).await?.tokens().revoke_token(request).await.map_err(ClientError::from)?;
    context.output.answer(&Revoked { id }, || format!("token {id}: revoked"))
}

/// The public id, which may stand in its whole token: `clv_<id>_<secret>`. The secret goes nowhere.
///
/// # Errors
/// A usage error for anything else, of which too little is repeated to be of use.
fn public_id(given: &str) -> Result<&str, CliError> {
    const DIGITS: usize = 16;
    let id = match given.strip_prefix("clv_") {
        Some(rest) => rest.split('_').next().unwrap_or_default(),
        None => given,
    };
    if id.len() == DIGITS && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return Ok(id);
    }
    let head = output::printable(&given.chars().take(8).collect::<String>());
    let dots = if given.chars().nth(8).is_some() { "…" } else { "" };
    Err(CliError::usage(format!(
        "`{head}{dots}` is no token's id; one has {DIGITS} digits of 0-9 and a-f, and `claviger token list` shows them"
    )))
}

impl SubjectArgs {
    /// The subject on the wire; a claim that stands twice is refused.
    fn into_subject(self) -> Result<v1::Subject, CliError> {
        let (kind, id) = match (self.stands_for.user, self.stands_for.workload) {
            (Some(id), _) => (v1::PrincipalKind::User, id),
            (None, id) => (v1::PrincipalKind::Workload, id.unwrap_or_default()),
        };
        Ok(v1::Subject {
            kind: kind.into(),
            id,
            groups: self.groups,
            claims: claims(self.claims)?.into_iter().collect(),
        })
    }
}

/// Claims by name.
pub(super) fn claims(given: Vec<(String, String)>) -> Result<BTreeMap<String, String>, CliError> {
    let mut claims = BTreeMap::new();
    for (name, value) in given {
        if claims.contains_key(&name) {
            return Err(CliError::usage(format!("claim `{name}` stands twice; give it once")));
        }
        claims.insert(name, value);
    }
    Ok(claims)
}

/// `KEY=VALUE`, neither empty.
pub(super) fn parse_claim(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !value.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("is not KEY=VALUE".to_owned()),
    }
}

#[derive(Serialize)]
struct Created<'a> {
    token: &'a Token,
    secret: &'a str,
}

#[derive(Serialize)]
struct List {
    tokens: Vec<Token>,
}

#[derive(Serialize)]
struct Revoked<'a> {
    id: &'a str,
}

#[derive(Serialize)]
struct Token {
    id: String,
    kind: &'static str,
    principal: String,
    groups: BTreeSet<String>,
    claims: BTreeMap<String, String>,
    created_at: Option<Timestamp>,
    expires_at: Option<Timestamp>,
    revoked_at: Option<Timestamp>,
    created_by: String,
    /// None: all.
    environments: Vec<String>,
    /// None: anywhere.
    source_addresses: Vec<String>,
    last_used_at: Option<Timestamp>,
    last_used_from: Option<String>,
}

impl From<v1::Token> for Token {
    fn from(token: v1::Token) -> Self {
        let subject = token.subject.unwrap_or_default();
        Self {
            id: token.id,
            kind: match subject.kind() {
                v1::PrincipalKind::User => "user",
                v1::PrincipalKind::Workload => "workload",
                v1::PrincipalKind::Unspecified => "unknown",
            },
            principal: subject.id,
            groups: subject.groups.into_iter().collect(),
            claims: subject.claims.into_iter().collect(),
            created_at: output::time(token.created_at),
            expires_at: output::time(token.expires_at),
            revoked_at: output::time(token.revoked_at),
            created_by: token.created_by,
            environments: token.environments,
            source_addresses: token.source_addresses,
            last_used_at: output::time(token.last_used_at),
            last_used_from: Some(token.last_used_from).filter(|place| !place.is_empty()),
        }
    }
}

impl Token {
    fn state(&self, now: Timestamp) -> &'static str {
        match (self.revoked_at, self.expires_at) {
            (Some(_), _) => "revoked",
            (None, Some(expires_at)) if expires_at <= now => "expired",
            (None, _) => "valid",
        }
    }
}

fn text(tokens: &[Token], clock: &SharedClock) -> String {
    const HEADER: [&str; 9] =
        ["ID", "STANDS FOR", "GROUPS", "STATE", "EXPIRES", "ENVIRONMENTS", "FROM", "LAST USED", "ISSUED BY"];
    let now = clock.now();
    match tokens {
        [] => String::new(),
        tokens => table(HEADER, tokens.iter().map(|token| row(token, now))),
    }
}

/// A `*` stands for all environments, and for anywhere: neither is called so.
fn row(token: &Token, now: Timestamp) -> [String; 9] {
    let all_or = |some: &[String]| if some.is_empty() { "*".to_owned() } else { some.join(",") };
    let last_used = match &token.last_used_from {
        Some(place) => format!("{} {place}", moment(token.last_used_at)),
        None => "never".to_owned(),
    };
    [
        token.id.clone(),
        format!("{} {}", token.kind, token.principal),
        token.groups.iter().map(String::as_str).collect::<Vec<_>>().join(","),
        token.state(now).to_owned(),
        moment(token.expires_at),
        all_or(&token.environments),
        all_or(&token.source_addresses),
        last_used,
        token.created_by.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::tests::refusal;
    use super::*;
    use crate::clock::ManualClock;

    fn token(id: &str, expires: i64, revoked: Option<i64>) -> Token {
        let at = |second| Timestamp::from_second(second).unwrap();
        Token {
            id: id.to_owned(),
            kind: "user",
            principal: "ana".to_owned(),
            groups: BTreeSet::from(["leads".to_owned(), "team".to_owned()]),
            claims: BTreeMap::new(),
            created_at: Some(at(0)),
            expires_at: Some(at(expires)),
            revoked_at: revoked.map(at),
            created_by: "User::\"root\"".to_owned(),
            environments: Vec::new(),
            source_addresses: Vec::new(),
            last_used_at: None,
            last_used_from: None,
        }
    }

    #[test]
    fn a_token_is_valid_expired_or_revoked() {
        let clock: SharedClock = ManualClock::new(Timestamp::from_second(100).unwrap());
        let shown = text(&[token("a", 200, None), token("b", 100, None), token("c", 200, Some(50))], &clock);
        let states: Vec<_> =
            shown.lines().skip(1).filter_map(|line| line.split_whitespace().nth(4)).collect();
        assert_eq!(states, ["valid", "expired", "revoked"], "{shown}");
        assert_eq!(text(&[], &clock), "");
    }

    #[test]
    fn limits_and_the_last_use_are_shown() {
        let clock: SharedClock = ManualClock::new(Timestamp::from_second(100).unwrap());
        let limited = Token {
            environments: vec!["staging".to_owned(), "development".to_owned()],
            source_addresses: vec!["10.0.0.0/8".to_owned(), "unix".to_owned()],
            last_used_at: Some(Timestamp::from_second(90).unwrap()),
            last_used_from: Some("10.1.2.3".to_owned()),
            ..token("a", 200, None)
        };
        let shown = text(&[limited, token("b", 200, None)], &clock);
        let lines: Vec<_> = shown.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
        let used = ["1970-01-01T00:01:30Z", "10.1.2.3"];
        assert_eq!(lines[1][6..10], [&["staging,development", "10.0.0.0/8,unix"][..], &used].concat());
        assert_eq!(lines[2][6..9], ["*", "*", "never"]);
    }

    #[test]
    fn limits_are_checked_before_anyone_is_asked() {
        let create = ["token", "create", "--user", "a", "--expires", "1h"];
        for (option, bad) in [
            ("--only-in", "Staging"),
            ("--only-in", ""),
            ("--from", "10.0.0.1/8"),
            ("--from", "example.com"),
            ("--from", ""),
        ] {
            let arguments = [&create[..], &[option, bad]].concat();
            assert_eq!(refusal(&arguments).exit_code(), 2, "{arguments:?}");
        }
    }

    #[test]
    fn a_token_stands_for_exactly_one() {
        for arguments in [
            &["token", "create", "--expires", "1h"][..],
            &["token", "create", "--user", "a", "--workload", "b", "--expires", "1h"],
            &["token", "create", "--user", "a"],
            &["token", "create", "--user", "a", "--expires", "5"],
            &["token", "create", "--user", "a", "--expires", "1h", "--claim", "x"],
        ] {
            assert_eq!(refusal(arguments).exit_code(), 2, "{arguments:?}");
        }
        let nobody = refusal(&["token", "create", "--expires", "1d"]).render().to_string();
        assert!(nobody.contains("--user <ID>|--workload <ID>"), "{nobody}");
    }

    #[test]
    fn a_token_is_known_by_its_id_alone() {
        let id = "0123456789abcdef";
        assert_eq!(public_id(id).unwrap(), id);
        let secret = format!("s3cret_{}", "x".repeat(36));
        assert_eq!(public_id(&format!("clv_{id}_{secret}")).unwrap(), id);
        assert_eq!(public_id(&format!("clv_{id}")).unwrap(), id);
        for bad in [
            "",
            "clv_",
            "0123",
            "0123456789ABCDEF",
            "0123456789abcdefs3cret",
            "clv__0123456789s3cret",
            "\u{1b}s3",
        ] {
            let error = public_id(bad).unwrap_err();
            assert_eq!(error.exit(), Exit::USAGE, "{bad}");
            assert!(
                !error.message.contains("s3cret") && !error.message.contains('\u{1b}'),
                "{}",
                error.message
            );
        }
        assert!(public_id("0123456789s3cret").unwrap_err().message.starts_with("`01234567…` is no"));
    }

    #[test]
    fn claims_are_pairs_and_stand_once() {
        assert_eq!(parse_claim("repo=a=b").unwrap(), ("repo".to_owned(), "a=b".to_owned()));
        for bad in ["", "a", "=b", "a="] {
            assert!(parse_claim(bad).is_err(), "{bad:?}");
        }
        let pair = |value: &str| ("repo".to_owned(), value.to_owned());
        assert!(claims(vec![pair("a"), pair("b")]).unwrap_err().message.contains("`repo`"));
        assert_eq!(claims(vec![pair("a")]).unwrap().len(), 1);
    }
}
