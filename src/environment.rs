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
    /// `sealed` (default) or `aws`.
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
    /// Where callers over a network may be: CIDR ranges or addresses, at most 256; left out: anywhere. Callers over a
    /// Unix socket are on this machine and pass.
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

/// A CIDR range; an address alone is the range that holds nothing else.
///
/// # Errors
/// What is wrong with it and the mend.
pub fn parse_range(text: &str) -> Result<IpNet, String> {
    let shown = || text.escape_default().take(64).collect::<String>();
    let range = text.parse::<IpNet>().or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from));
    let range = range.map_err(|_| format!("`{}` is no address and no range such as 10.0.0.0/8", shown()))?;
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
    /// None declared; a parent that is not declared or inherits in a circle; a protected environment with relaxed
    /// auditing.
    pub fn new(environments: impl IntoIterator<Item = Environment>) -> Result<Self, EnvironmentError> {
        let environments: BTreeMap<_, _> = environments
            .into_iter()
            .map(|environment| (environment.name.clone(), Arc::new(environment)))
            .collect();
        if environments.is_empty() {
            return Err(EnvironmentError::Empty);
        }
        for environment in environments.values() {
            let refuse =
                |problem| EnvironmentError::Invalid { environment: environment.name.clone(), problem };
            if environment.protected && environment.durability == Durability::Relaxed {
                return Err(refuse(
                    "audit = \"relaxed\" is refused where protected = true; remove one of them".to_owned(),
                ));
            }
            let mut seen = vec![&environment.name];
            let mut next = environment.parent.as_ref();
            while let Some(parent) = next {
                if seen.contains(&parent) {
                    return Err(refuse(format!("parent `{parent}` inherits from it in a circle")));
                }
                seen.push(parent);
                let found = environments
                    .get(parent)
                    .ok_or_else(|| refuse(format!("parent `{parent}` is not declared")))?;
                next = found.parent.as_ref();
            }
        }
        Ok(Self { environments })
    }

    /// Resolves configuration tables.
    ///
    /// # Errors
    /// As [`new`](Self::new), and a setting that is out of its bounds.
    pub fn from_config(tables: BTreeMap<EnvironmentName, Config>) -> Result<Self, EnvironmentError> {
        let environments: Result<Vec<_>, _> =
            tables.into_iter().map(|(name, table)| resolve(name, table)).collect();
        Self::new(environments?)
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

fn resolve(name: EnvironmentName, table: Config) -> Result<Environment, EnvironmentError> {
    const MINUTE: u64 = 60;
    const DAY: u64 = 86_400;
    let defaults = Environment::sealed(name.clone());
    let refuse = |problem: String| EnvironmentError::Invalid { environment: name.clone(), problem };
    let bounded = |key: &str, text: Option<String>, default: Duration, most: u64| match text {
        None => Ok(default),
        Some(text) => {
            let duration = parse_duration(&text).map_err(|error| refuse(format!("{key}: {error}")))?;
            if duration > Duration::from_secs(most) {
                return Err(refuse(format!("{key} = \"{text}\" is more than the {most} seconds permitted")));
            }
            Ok(duration)
        }
    };
    let store = match (table.store.as_deref(), table.aws) {
        (None | Some("sealed"), None) => StoreChoice::Sealed,
        (None | Some("aws"), Some(aws)) => StoreChoice::Aws(checked(aws).map_err(refuse)?),
        (Some("aws"), None) => StoreChoice::Aws(AwsSettings::default()),
        (Some("sealed"), Some(_)) => {
            return Err(refuse(
                "store = \"sealed\" and a table `aws` contradict each other; remove one".to_owned(),
            ));
        }
        (Some(other), _) => {
            let other: String = other.escape_default().take(32).collect();
            return Err(refuse(format!("store = \"{other}\" is neither `sealed` nor `aws`")));
        }
    };
    Ok(Environment {
        ttl: bounded("ttl", table.ttl, defaults.ttl, DAY)?,
        negative_ttl: bounded("negative_ttl", table.negative_ttl, defaults.negative_ttl, 5 * MINUTE)?,
        stale_for: bounded("stale_for", table.stale_for, defaults.stale_for, 7 * DAY)?,
        protected: table.protected.unwrap_or(false),
        parent: table.parent,
        durability: table.audit.unwrap_or_default(),
        uncached: each("uncached", table.uncached, NamePattern::parse).map_err(&refuse)?,
        source_addresses: each("source_addresses", table.source_addresses, parse_range).map_err(&refuse)?,
        store,
        ..defaults
    })
}

/// Parses each text of a list that has a bound.
fn each<T>(
    key: &str,
    texts: Option<Vec<String>>,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    const MOST: usize = 256;
    let texts = texts.unwrap_or_default();
    if texts.len() > MOST {
        return Err(format!("{key}: {} given; at most {MOST} are permitted", texts.len()));
    }
    texts.iter().map(|text| parse(text).map_err(|problem| format!("{key}: {problem}"))).collect()
}

/// Refuses endpoints over plain HTTP that leave the machine, and a template that would map two secrets to one name.
fn checked(aws: AwsSettings) -> Result<AwsSettings, String> {
    for (key, endpoint) in [("aws.endpoint", &aws.endpoint), ("aws.sts_endpoint", &aws.sts_endpoint)] {
        endpoint.as_deref().map_or(Ok(()), |endpoint| check_endpoint(key, endpoint))?;
    }
    if aws.sts_endpoint.is_some() && aws.role_arn.is_none() {
        return Err("aws.sts_endpoint is asked for a role alone; set aws.role_arn, or remove it".to_owned());
    }
    if let Some(template) = &aws.name_template
        && template.matches("{name}").count() != 1
    {
        return Err("aws.name_template must hold `{name}` exactly once".to_owned());
    }
    Ok(aws)
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

    fn from_toml(text: &str) -> Result<Registry, EnvironmentError> {
        Registry::from_config(toml::from_str(text).unwrap())
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
            let table = |url: &str| from_toml(&format!("[a.aws]\n{role}\n{key} = \"{url}\""));
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
        let alone = from_toml("[a.aws]\nsts_endpoint = \"https://sts.example.com\"").unwrap_err().to_string();
        assert!(alone.contains("set aws.role_arn"), "{alone}");
    }

    #[test]
    fn what_is_not_declared_is_not_there() {
        let registry = Registry::new([Environment::sealed(name("development"))]).unwrap();
        assert_eq!(registry.get(&name("production")).unwrap_err().reason(), Reason::EnvironmentNotFound);
    }
}
