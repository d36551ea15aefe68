//! The registry of declared environments: which store each has, how long answers may be cached, how it is protected.
//!
//! An environment that is not declared does not exist. None is ever a default.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;

use crate::clock::parse_duration;
use crate::error::{Reason, Reasoned};
use crate::secret::{EnvironmentName, SecretName};

/// When an audit record must be on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// Synced (`fdatasync`) before the reply.
    #[default]
    Durable,
    /// Written before the reply, synced within 100 ms. Refused where the environment is protected.
    Relaxed,
}

/// Where an environment's secrets live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreChoice {
    /// Envelope-encrypted in the key-value layer.
    Sealed,
    /// AWS Secrets Manager.
    Aws(AwsSettings),
}

/// How an environment reaches AWS Secrets Manager.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AwsSettings {
    /// The region; without it, what the AWS configuration of the process says.
    pub region: Option<String>,
    /// Another endpoint; `https://`, or `http://` on a loopback address.
    pub endpoint: Option<String>,
    /// A role to assume.
    pub role_arn: Option<String>,
    /// Another endpoint of STS, which gives the role's credentials, under the same rule as `endpoint`; without it, that
    /// of the region. Only with `role_arn`.
    pub sts_endpoint: Option<String>,
    /// How a name is formed there: must hold `{name}`, and `{environment}` unless the account is the environment's
    /// alone. Default `{environment}/{name}`.
    pub name_template: Option<String>,
}

/// One `[environments.NAME]` table, as written.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `sealed` (default) or `aws`; must be written where there is a table `aws`.
    pub store: Option<String>,
    /// Settings of the `aws` store.
    pub aws: Option<AwsSettings>,
    /// How long an answer is cached: 0s to 24h, default 5m.
    pub ttl: Option<String>,
    /// How long an absence is cached: 0s to 5m, default 5s.
    pub negative_ttl: Option<String>,
    /// How long past its time to live a cached answer may stand in for an unreachable store: 0s to 7d, default 1h.
    pub stale_for: Option<String>,
    /// Whether dangerous actions of persons need approvals, and relaxed auditing is refused.
    pub protected: Option<bool>,
    /// The environment that this one inherits from.
    pub parent: Option<EnvironmentName>,
    /// `durable` (default) or `relaxed`.
    pub audit: Option<Durability>,
    /// Secrets that are never cached: names, or beginnings of names that end with `*`. At most 256.
    pub uncached: Option<Vec<String>>,
    /// Where callers over a network may be: CIDR ranges or addresses, 1 to 256; left out: anywhere. Callers over a Unix
    /// socket are on this machine and pass.
    pub source_addresses: Option<Vec<String>>,
}

/// Which secrets are meant: one name, or all names that begin alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamePattern {
    /// This one.
    Name(SecretName),
    /// Those that begin with this.
    Prefix(String),
}

impl NamePattern {
    /// Parses a name, or the beginning of names with a `*` behind it.
    ///
    /// # Errors
    /// What is wrong with it and the mend.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(prefix) = text.strip_suffix('*') {
            let fits = |c: char| c.is_ascii_alphanumeric() || "/_+=.@-".contains(c);
            return match prefix.len() <= 512 && prefix.chars().all(fits) {
                true => Ok(Self::Prefix(prefix.to_owned())),
                false => Err(format!("`{}`: has characters that no name has", text.escape_default())),
            };
        }
        SecretName::parse(text).map(Self::Name).map_err(|error| error.to_string())
    }

    /// Whether `name` is one of those meant.
    #[must_use]
    pub fn fits(&self, name: &SecretName) -> bool {
        match self {
            Self::Name(only) => only == name,
            Self::Prefix(prefix) => name.as_str().starts_with(prefix),
        }
    }
}

/// A CIDR range; an address alone is the range that holds nothing else. One of IPv4 addresses is written as IPv4:
/// callers are known by their IPv4 address however the connection has it, so `::ffff:10.0.0.0/104` would fit nobody.
///
/// # Errors
/// What is wrong with it and the mend.
pub fn parse_range(text: &str) -> Result<IpNet, String> {
    let shown = || text.escape_default().take(64).collect::<String>();
    let range = text.parse::<IpNet>().or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from));
    let range = range.map_err(|_| format!("`{}` is no address and no range such as 10.0.0.0/8", shown()))?;
    if matches!(range, IpNet::V6(range) if range.addr().to_ipv4_mapped().is_some()) {
        return Err(format!("`{}` stands for IPv4 addresses; write them as IPv4", shown()));
    }
    if range.addr() != range.network() {
        return Err(format!("`{}` has bits behind its prefix; write {}", shown(), range.trunc()));
    }
    Ok(range)
}

/// A declared environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    /// Its name.
    pub name: EnvironmentName,
    /// Where its secrets live.
    pub store: StoreChoice,
    /// How long an answer is cached.
    pub ttl: Duration,
    /// How long an absence is cached.
    pub negative_ttl: Duration,
    /// How long past its time to live an answer may stand in for an unreachable store.
    pub stale_for: Duration,
    /// Whether it is protected.
    pub protected: bool,
    /// The environment that it inherits from.
    pub parent: Option<EnvironmentName>,
    /// When its audit records must be on the disk.
    pub durability: Durability,
    /// Secrets that are never cached.
    pub uncached: Vec<NamePattern>,
    /// Where callers over a network may be; empty: anywhere.
    pub source_addresses: Vec<IpNet>,
}

impl Environment {
    /// An environment with the defaults and the sealed store; `production` in name or not, it is not protected until
    /// told.
    #[must_use]
    pub fn sealed(name: EnvironmentName) -> Self {
        Self {
            name,
            store: StoreChoice::Sealed,
            ttl: Duration::from_secs(300),
            negative_ttl: Duration::from_secs(5),
            stale_for: Duration::from_secs(3_600),
            protected: false,
            parent: None,
            durability: Durability::Durable,
            uncached: Vec::new(),
            source_addresses: Vec::new(),
        }
    }

    /// Whether a caller may be there, whoever it is.
    #[must_use]
    pub fn admits(&self, source: Option<std::net::IpAddr>) -> bool {
        let Some(source) = source else { return true };
        self.source_addresses.is_empty() || self.source_addresses.iter().any(|range| range.contains(&source))
    }
}

/// Why an environment can't be declared or found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EnvironmentError {
    /// Not declared.
    #[error("environment `{0}` is not declared; declare it in the broker's configuration")]
    NotDeclared(EnvironmentName),
    /// A setting is wrong.
    #[error("environments.{environment}: {problem}")]
    Invalid {
        /// Where.
        environment: EnvironmentName,
        /// What is wrong, and the mend.
        problem: String,
    },
    /// No environment at all.
    #[error("no environment is declared; add an [environments.NAME] table")]
    Empty,
}

impl Reasoned for EnvironmentError {
    fn reason(&self) -> Reason {
        match self {
            Self::NotDeclared(_) => Reason::EnvironmentNotFound,
            Self::Invalid { .. } | Self::Empty => Reason::InvalidConfig,
        }
    }
}

/// The declared environments.
#[derive(Clone)]
pub struct Registry {
    environments: BTreeMap<EnvironmentName, Arc<Environment>>,
}

impl Registry {
    /// Checks the environments against each other and keeps them.
    ///
    /// # Errors
    /// The first of: none declared; a parent that is not declared or inherits in a circle; a protected environment with
    /// relaxed auditing.
    pub fn new(environments: impl IntoIterator<Item = Environment>) -> Result<Self, EnvironmentError> {
        let registry = Self::unchecked(environments);
        match registry.problems().into_iter().next() {
            Some(problem) => Err(problem),
            None => Ok(registry),
        }
    }

    /// Resolves configuration tables.
    ///
    /// # Errors
    /// All that is wrong: as [`new`](Self::new), and each setting that is out of its bounds.
    pub fn from_config(tables: BTreeMap<EnvironmentName, Config>) -> Result<Self, Vec<EnvironmentError>> {
        let mut problems = Vec::new();
        // One that is wrong is declared all the same, so that nothing is held against those that inherit from it.
        let environments: Vec<_> =
            tables.into_iter().map(|(name, table)| resolve(name, table, &mut problems)).collect();
        let registry = Self::unchecked(environments);
        problems.extend(registry.problems());
        if problems.is_empty() { Ok(registry) } else { Err(problems) }
    }

    fn unchecked(environments: impl IntoIterator<Item = Environment>) -> Self {
        let named = |environment: Environment| (environment.name.clone(), Arc::new(environment));
        Self { environments: environments.into_iter().map(named).collect() }
    }

    /// What the environments are wrong about, taken together.
    fn problems(&self) -> Vec<EnvironmentError> {
        if self.environments.is_empty() {
            return vec![EnvironmentError::Empty];
        }
        let of_one = |environment: &Arc<Environment>| {
            let name = environment.name.clone();
            let problems = [not_audited(environment), self.not_inherited(environment)].into_iter().flatten();
            problems.map(move |problem| EnvironmentError::Invalid { environment: name.clone(), problem })
        };
        self.environments.values().flat_map(of_one).collect()
    }

    /// Why an environment can't inherit from its parent. What is wrong further up is said of those there.
    fn not_inherited(&self, environment: &Environment) -> Option<String> {
        let parent = environment.parent.as_ref()?;
        if !self.environments.contains_key(parent) {
            return Some(format!("parent `{parent}` is not declared"));
        }
        let mut next = parent;
        // As many steps as there are environments lead around any circle.
        for _ in 0..self.environments.len() {
            if *next == environment.name {
                return Some(format!("parent `{parent}` inherits from it in a circle"));
            }
            next = self.environments.get(next)?.parent.as_ref()?;
        }
        None
    }

    /// The environment of this name.
    ///
    /// # Errors
    /// [`EnvironmentError::NotDeclared`].
    pub fn get(&self, name: &EnvironmentName) -> Result<&Arc<Environment>, EnvironmentError> {
        self.environments.get(name).ok_or_else(|| EnvironmentError::NotDeclared(name.clone()))
    }

    /// All of them, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Environment>> {
        self.environments.values()
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.environments.keys()).finish()
    }
}

fn not_audited(environment: &Environment) -> Option<String> {
    let relaxed = environment.protected && environment.durability == Durability::Relaxed;
    relaxed.then(|| "audit = \"relaxed\" is refused where protected = true; remove one of them".to_owned())
}

/// What is wrong with one table.
struct Problems<'a> {
    environment: EnvironmentName,
    found: &'a mut Vec<EnvironmentError>,
}

impl Problems<'_> {
    fn say(&mut self, problem: String) {
        self.found.push(EnvironmentError::Invalid { environment: self.environment.clone(), problem });
    }

    fn keep<T>(&mut self, checked: Result<T, String>) -> Option<T> {
        checked.map_err(|problem| self.say(problem)).ok()
    }
}

/// What a table says; where that is wrong, the default stands in, and `found` tells.
fn resolve(name: EnvironmentName, table: Config, found: &mut Vec<EnvironmentError>) -> Environment {
    const MINUTE: u64 = 60;
    const DAY: u64 = 86_400;
    let defaults = Environment::sealed(name.clone());
    let mut problems = Problems { environment: name, found };
    let mut bounded = |key: &str, text: Option<String>, default: Duration, most: u64| {
        text.and_then(|text| problems.keep(duration(key, &text, most))).unwrap_or(default)
    };
    Environment {
        ttl: bounded("ttl", table.ttl, defaults.ttl, DAY),
        negative_ttl: bounded("negative_ttl", table.negative_ttl, defaults.negative_ttl, 5 * MINUTE),
        stale_for: bounded("stale_for", table.stale_for, defaults.stale_for, 7 * DAY),
        protected: table.protected.unwrap_or(false),
        parent: table.parent,
        durability: table.audit.unwrap_or_default(),
        store: store(table.store.as_deref(), table.aws, &mut problems),
        uncached: each("uncached", &table.uncached.unwrap_or_default(), NamePattern::parse, &mut problems),
        source_addresses: source_addresses(table.source_addresses.as_deref(), &mut problems),
        ..defaults
    }
}

fn duration(key: &str, text: &str, most: u64) -> Result<Duration, String> {
    let duration = parse_duration(text).map_err(|error| format!("{key}: {error}"))?;
    match duration > Duration::from_secs(most) {
        true => Err(format!("{key} = \"{text}\" is more than the {most} seconds permitted")),
        false => Ok(duration),
    }
}

/// INVARIANT: a table `aws` alone chooses no store: secrets move nowhere because of a key that was forgotten.
fn store(named: Option<&str>, aws: Option<AwsSettings>, problems: &mut Problems<'_>) -> StoreChoice {
    for problem in aws.iter().flat_map(wrong_with) {
        problems.say(problem);
    }
    match (named, aws) {
        (None | Some("sealed"), None) => return StoreChoice::Sealed,
        (Some("aws"), aws) => return StoreChoice::Aws(aws.unwrap_or_default()),
        (None, Some(_)) => problems.say(
            "aws without store = \"aws\": the store would be `sealed`; write store = \"aws\" beside it, or remove \
             the table"
                .to_owned(),
        ),
        (Some("sealed"), Some(_)) => problems
            .say("store = \"sealed\" and a table `aws` contradict each other; remove one".to_owned()),
        (Some(other), _) => {
            let other: String = other.escape_default().take(32).collect();
            problems.say(format!("store = \"{other}\" is neither `sealed` nor `aws`"));
        }
    }
    StoreChoice::Sealed
}

/// INVARIANT: a list that was written is never one that admits everybody.
fn source_addresses(texts: Option<&[String]>, problems: &mut Problems<'_>) -> Vec<IpNet> {
    if texts.is_some_and(<[String]>::is_empty) {
        problems.say(
            "source_addresses = [] names nobody; name ranges, or leave the key out to admit everyone"
                .to_owned(),
        );
    }
    each("source_addresses", texts.unwrap_or_default(), parse_range, problems)
}

/// Parses each text of a list that has a bound.
fn each<T>(
    key: &str,
    texts: &[String],
    parse: impl Fn(&str) -> Result<T, String>,
    problems: &mut Problems<'_>,
) -> Vec<T> {
    const MOST: usize = 256;
    if texts.len() > MOST {
        problems.say(format!("{key}: {} given; at most {MOST} are permitted", texts.len()));
        return Vec::new();
    }
    let parsed = texts.iter().map(|text| parse(text).map_err(|problem| format!("{key}: {problem}")));
    parsed.filter_map(|parsed| problems.keep(parsed)).collect()
}

/// Refuses endpoints over plain HTTP that leave the machine, and a template that would map two secrets to one name.
fn wrong_with(aws: &AwsSettings) -> Vec<String> {
    let endpoints = [("aws.endpoint", &aws.endpoint), ("aws.sts_endpoint", &aws.sts_endpoint)];
    let mut problems: Vec<String> = endpoints
        .into_iter()
        .filter_map(|(key, endpoint)| check_endpoint(key, endpoint.as_deref()?).err())
        .collect();
    if aws.sts_endpoint.is_some() && aws.role_arn.is_none() {
        problems
            .push("aws.sts_endpoint is asked for a role alone; set aws.role_arn, or remove it".to_owned());
    }
    let template = aws.name_template.as_deref();
    if template.is_some_and(|template| template.matches("{name}").count() != 1) {
        problems.push("aws.name_template must hold `{name}` exactly once".to_owned());
    }
    problems
}

fn check_endpoint(key: &str, endpoint: &str) -> Result<(), String> {
    let uri: http::Uri = endpoint.parse().map_err(|_| format!("{key} is not a URL"))?;
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let loopback =
        host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    match uri.scheme_str() {
        Some("https") => Ok(()),
        Some("http") if loopback => Ok(()),
        Some("http") => {
            Err(format!("{key} over http:// to `{host}` would send secrets in the clear; use https://"))
        }
        _ => Err(format!("{key} must start with https:// (or http:// on loopback)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> EnvironmentName {
        EnvironmentName::parse(text).unwrap()
    }

    fn all_from_toml(text: &str) -> Result<Registry, Vec<EnvironmentError>> {
        Registry::from_config(toml::from_str(text).unwrap())
    }

    fn from_toml(text: &str) -> Result<Registry, EnvironmentError> {
        all_from_toml(text).map_err(|problems| problems.into_iter().next().unwrap())
    }

    #[test]
    fn defaults_and_bounds() {
        let registry = from_toml("[production]\nprotected = true\nttl = \"1m\"").unwrap();
        let production = registry.get(&name("production")).unwrap();
        assert_eq!(production.ttl, Duration::from_secs(60));
        assert_eq!(production.stale_for, Duration::from_secs(3_600));
        for bad in [
            "[a]\nttl = \"25h\"",
            "[a]\nttl = \"5\"",
            "[a]\nstale_for = \"8d\"",
            "[a]\nstore = \"etcd\"",
            "[a]\nparent = \"b\"",
            "[a]\nparent = \"b\"\n[b]\nparent = \"a\"",
            "[a]\nparent = \"a\"",
            "[a]\nprotected = true\naudit = \"relaxed\"",
            "[a]\nstore = \"aws\"\naws.endpoint = \"http://10.0.0.1\"",
            "[a]\nstore = \"aws\"\naws.name_template = \"fixed\"",
            "",
        ] {
            assert_eq!(from_toml(bad).unwrap_err().reason(), Reason::InvalidConfig, "{bad}");
        }
        assert!(from_toml("[a]\nstore = \"aws\"\naws.endpoint = \"http://127.0.0.1:5000\"").is_ok());
    }

    #[test]
    fn both_endpoints_are_under_one_rule() {
        let role = "role_arn = \"arn:aws:iam::123456789012:role/claviger\"";
        for key in ["endpoint", "sts_endpoint"] {
            let table =
                |url: &str| from_toml(&format!("[a]\nstore = \"aws\"\n[a.aws]\n{role}\n{key} = \"{url}\""));
            for fine in
                ["https://vpce-1.example.com", "http://127.0.0.1:5000", "http://[::1]:1", "http://localhost"]
            {
                assert!(table(fine).is_ok(), "{key} {fine}");
            }
            for (bad, said) in [
                ("http://10.0.0.1", "in the clear"),
                ("http://127.0.0.1@10.0.0.1", "in the clear"),
                ("http://localhost.example.com", "in the clear"),
                ("ftp://127.0.0.1", "must start with https://"),
                ("127.0.0.1:5000", "must start with https://"),
                ("", "is not a URL"),
            ] {
                let error = table(bad).unwrap_err();
                assert_eq!(error.reason(), Reason::InvalidConfig);
                let error = error.to_string();
                assert!(error.contains(&format!("aws.{key} ")) && error.contains(said), "{error}");
            }
        }
        let alone = "[a]\nstore = \"aws\"\naws.sts_endpoint = \"https://sts.example.com\"";
        let alone = from_toml(alone).unwrap_err().to_string();
        assert!(alone.contains("set aws.role_arn"), "{alone}");
    }

    #[test]
    fn a_table_aws_alone_moves_no_secrets() {
        for table in ["region = \"eu-central-1\"", ""] {
            let said = from_toml(&format!("[a.aws]\n{table}")).unwrap_err().to_string();
            assert!(said.contains("write store = \"aws\" beside it"), "{said}");
        }
        let both = from_toml("[a]\nstore = \"aws\"\naws.region = \"eu-central-1\"").unwrap();
        assert!(matches!(both.get(&name("a")).unwrap().store, StoreChoice::Aws(_)));
        assert!(from_toml("[a]\nstore = \"sealed\"\naws.region = \"eu-central-1\"").is_err());
    }

    #[test]
    fn an_emptied_list_opens_nothing() {
        let said = from_toml("[a]\nsource_addresses = []").unwrap_err().to_string();
        assert!(said.contains("leave the key out to admit everyone"), "{said}");
        let away = Some("203.0.113.1".parse().unwrap());
        let left_out = from_toml("[a]").unwrap();
        assert!(left_out.get(&name("a")).unwrap().admits(away));
        let named = from_toml("[a]\nuncached = []\nsource_addresses = [\"10.0.0.0/8\"]").unwrap();
        assert!(!named.get(&name("a")).unwrap().admits(away));
    }

    #[test]
    fn a_range_that_would_fit_nobody_is_refused() {
        for mapped in ["::ffff:10.0.0.0/104", "::ffff:10.0.0.1/104", "::ffff:10.0.0.1", "::ffff:0:0/96"] {
            let said = parse_range(mapped).unwrap_err();
            assert!(said.contains("write them as IPv4"), "{mapped}: {said}");
            let table = from_toml(&format!("[a]\nsource_addresses = [\"{mapped}\"]"));
            assert!(table.unwrap_err().to_string().contains("source_addresses: "), "{mapped}");
        }
        for fine in ["::/0", "fd00::/8", "2001:db8::1", "10.0.0.0/8", "0.0.0.0/0"] {
            assert!(parse_range(fine).is_ok(), "{fine}");
        }
    }

    #[test]
    fn all_that_is_wrong_is_said_and_each_where_it_is() {
        let text = r#"
            [a]
            ttl = "5"
            negative_ttl = "1h"
            store = "etcd"
            uncached = ["a b*", "fine", "c d*"]
            [b]
            parent = "c"
            source_addresses = []
            [c]
            parent = "d"
            protected = true
            audit = "relaxed"
            [e]
            parent = "f"
            [f]
            parent = "g"
            [g]
            parent = "f"
            [h]
            parent = "a"
            [h.aws]
            endpoint = "http://10.0.0.1"
            sts_endpoint = "x"
            name_template = "fixed"
        "#;
        let problems = all_from_toml(text).unwrap_err();
        let said: Vec<String> = problems.iter().map(ToString::to_string).collect();
        let beginnings = [
            "a: ttl: ",
            "a: negative_ttl = ",
            "a: store = ",
            "a: uncached: `a b*`",
            "a: uncached: `c d*`",
            "b: source_addresses = []",
            "h: aws.endpoint ",
            "h: aws.sts_endpoint must",
            "h: aws.sts_endpoint is asked",
            "h: aws.name_template ",
            "h: aws without store",
            "c: audit = ",
            "c: parent `d` is not declared",
            "f: parent `g` inherits",
            "g: parent `f` inherits",
        ];
        for (said, beginning) in said.iter().zip(beginnings) {
            assert!(said.starts_with(&format!("environments.{beginning}")), "{said} (wanted {beginning})");
        }
        assert_eq!(said.len(), beginnings.len(), "{said:#?}");
    }

    #[test]
    fn what_is_not_declared_is_not_there() {
        let registry = Registry::new([Environment::sealed(name("development"))]).unwrap();
        assert_eq!(registry.get(&name("production")).unwrap_err().reason(), Reason::EnvironmentNotFound);
    }
}
