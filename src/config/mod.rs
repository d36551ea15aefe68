//! The broker's configuration: TOML as written ([`Raw`]), then checked and complete ([`Resolved`]). Neither does
//! I/O; [`assembly`] opens what a [`Resolved`] names.

pub mod assembly;
mod housekeeping;
mod reload;
pub mod samples;
mod state;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::clock::parse_duration;
use crate::environment::{self, Registry};
use crate::error::{Reason, Reasoned};
use crate::identity::peer_credentials;
use crate::policy::PolicySource;
use crate::secret::EnvironmentName;
use crate::server::{Limits, Listen};

/// Where and what is wrong in a configuration, and the mend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct ConfigError {
    place: String,
    problem: String,
}

impl ConfigError {
    fn new(place: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { place: place.into(), problem: problem.into() }
    }
}

impl Reasoned for ConfigError {
    fn reason(&self) -> Reason {
        Reason::InvalidConfig
    }
}

/// The file as written.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    listen: RawListen,
    kv: RawKv,
    root_key: RawRootKey,
    policy: RawPolicy,
    #[serde(default)]
    audit: RawAudit,
    #[serde(default)]
    identity: RawIdentity,
    #[serde(default)]
    cache: RawCache,
    environments: BTreeMap<EnvironmentName, environment::Config>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawListen {
    unix: Option<PathBuf>,
    unix_mode: Option<String>,
    tcp: Option<String>,
    connections: Option<usize>,
    drain: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKv {
    directory: PathBuf,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRootKey {
    file: Option<PathBuf>,
    systemd_credential: Option<String>,
    environment: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPolicy {
    directory: PathBuf,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAudit {
    instance: Option<String>,
    retention: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawIdentity {
    #[serde(default)]
    peer_credentials: peer_credentials::Config,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCache {
    capacity_mib: Option<u64>,
}

/// Where the root key is. Which file, credential or variable it is read from is decided here; reading it is not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootKeyChoice {
    /// A file.
    File(PathBuf),
    /// A systemd credential (`LoadCredential=`, systemd.exec(5)).
    SystemdCredential(String),
    /// An environment variable, with a warning.
    Environment(String),
}

/// A configuration that is checked and complete.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// `DIR`: holds `claviger.db`, `keys/` and `audit/`.
    pub directory: PathBuf,
    /// Where to listen.
    pub listen: Vec<Listen>,
    /// Bounds on what callers may use.
    pub limits: Limits,
    /// Where the root key is.
    pub root_key: RootKeyChoice,
    /// Where the policies are.
    pub policy: PolicySource,
    /// The name of this broker's audit chain.
    pub instance: String,
    /// How long audit segments are kept.
    pub retention: Duration,
    /// Whom Unix-socket callers stand for.
    pub peers: peer_credentials::Config,
    /// How many bytes of values each environment's cache may hold.
    pub cache_bytes: u64,
    /// The declared environments.
    pub registry: Registry,
    /// Start although the database or the audit log was brought back from the past, cut or removed; on record. For one
    /// start, by a person who knows why.
    pub accept_loss: bool,
}

impl Resolved {
    /// Two years (see `AU-11` of NIST SP 800-53: what fits the organisation; this is the default).
    pub const RETENTION: Duration = Duration::from_secs(730 * 86_400);
    /// 64 MiB.
    pub const CACHE_BYTES: u64 = 64 * 1024 * 1024;
}

impl Raw {
    /// Parses a file's text.
    ///
    /// # Errors
    /// With file, line, column and, for a key that is not known, the nearest one that is.
    pub fn parse(text: &str, file: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let place = error.span().map_or_else(|| file.to_owned(), |span| placed(text, file, span.start));
            ConfigError::new(place, suggesting(error.message()))
        })
    }

    /// Checks what was written and fills in what was not.
    ///
    /// # Errors
    /// [`ConfigError`], naming the table and the key.
    pub fn resolve(self) -> Result<Resolved, ConfigError> {
        let limits = limits(&self.listen)?;
        let instance = self.audit.instance.unwrap_or_else(|| "broker".to_owned());
        // A folder's name on the disk, so it follows the strictest grammar at hand.
        EnvironmentName::parse(&instance).map_err(|_| {
            ConfigError::new("audit.instance", "must be 1 to 63 of a-z, 0-9 and inner hyphens")
        })?;
        let retention = match self.audit.retention {
            None => Resolved::RETENTION,
            Some(text) => parse_duration(&text)
                .map_err(|error| ConfigError::new("audit.retention", error.to_string()))?,
        };
        if retention < Duration::from_secs(86_400) {
            return Err(ConfigError::new("audit.retention", "must be a day or more"));
        }
        let cache_bytes = match self.cache.capacity_mib {
            None => Resolved::CACHE_BYTES,
            Some(mib @ 1..=65_536) => mib * 1024 * 1024,
            Some(_) => return Err(ConfigError::new("cache.capacity_mib", "must be 1 to 65536")),
        };
        Ok(Resolved {
            listen: listen(self.listen)?,
            limits,
            root_key: root_key(self.root_key)?,
            policy: PolicySource::Directory(self.policy.directory),
            directory: self.kv.directory,
            instance,
            retention,
            peers: self.identity.peer_credentials,
            cache_bytes,
            registry: Registry::from_config(self.environments)
                .map_err(|error| ConfigError::new("environments", error.to_string()))?,
            accept_loss: false,
        })
    }
}

fn limits(listen: &RawListen) -> Result<Limits, ConfigError> {
    let mut limits = Limits::default();
    if let Some(connections) = listen.connections {
        if !(1..=65_536).contains(&connections) {
            return Err(ConfigError::new("listen.connections", "must be 1 to 65536"));
        }
        limits.connections = connections;
    }
    if let Some(drain) = &listen.drain {
        limits.drain =
            parse_duration(drain).map_err(|error| ConfigError::new("listen.drain", error.to_string()))?;
    }
    Ok(limits)
}

fn listen(raw: RawListen) -> Result<Vec<Listen>, ConfigError> {
    let mut listen = Vec::new();
    let mode = match raw.unix_mode.as_deref() {
        None => 0o660,
        Some(text) => match u32::from_str_radix(text, 8) {
            Ok(mode) if mode <= 0o777 => mode,
            _ => {
                return Err(ConfigError::new(
                    "listen.unix_mode",
                    "must be octal permission bits, for example \"0660\"",
                ));
            }
        },
    };
    if let Some(path) = raw.unix {
        listen.push(Listen::Unix { path, mode });
    }
    if let Some(text) = raw.tcp {
        let address: SocketAddr = text.parse().map_err(|_| {
            ConfigError::new("listen.tcp", "must be ADDRESS:PORT, for example \"127.0.0.1:7340\"")
        })?;
        if !address.ip().is_loopback() {
            let problem =
                "is not a loopback address, and without TLS secrets would cross the network in the clear";
            return Err(ConfigError::new("listen.tcp", problem));
        }
        listen.push(Listen::Tcp(address));
    }
    if listen.is_empty() {
        return Err(ConfigError::new("listen", "names no listener; set unix, tcp or both"));
    }
    Ok(listen)
}

fn root_key(raw: RawRootKey) -> Result<RootKeyChoice, ConfigError> {
    match (raw.file, raw.systemd_credential, raw.environment) {
        (Some(file), None, None) => Ok(RootKeyChoice::File(file)),
        (None, Some(name), None) if !name.contains('/') && !name.is_empty() => {
            Ok(RootKeyChoice::SystemdCredential(name))
        }
        (None, Some(_), None) => {
            Err(ConfigError::new("root_key.systemd_credential", "is a credential's name, not a path"))
        }
        (None, None, Some(name)) => Ok(RootKeyChoice::Environment(name)),
        _ => Err(ConfigError::new("root_key", "set exactly one of file, systemd_credential and environment")),
    }
}

fn placed(text: &str, file: &str, offset: usize) -> String {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    format!("{file}:{line}:{column}")
}

/// The parser's message on one line, and for an unknown key the nearest of those that it expected.
fn suggesting(message: &str) -> String {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut quoted = line.split('`').skip(1).step_by(2);
    let unknown = match quoted.next() {
        Some(unknown) if line.starts_with("unknown field") => unknown,
        _ => return line,
    };
    let nearest = quoted.min_by_key(|known| strsim::damerau_levenshtein(known, unknown));
    match nearest {
        Some(nearest) => format!("unknown key `{unknown}`; did you mean `{nearest}`?"),
        None => format!("unknown key `{unknown}`; this table has none"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_a_good_one() {
        let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/broker.toml"));
        let resolved = Raw::parse(text, "deploy/broker.toml").unwrap().resolve().unwrap();
        assert_eq!(resolved.registry.iter().filter(|environment| environment.protected).count(), 1);
    }

    const GOOD: &str = r#"
[listen]
unix = "/run/claviger/claviger.sock"
tcp = "127.0.0.1:7340"
[kv]
directory = "/var/lib/claviger"
[root_key]
file = "/etc/claviger/root.key"
[policy]
directory = "/etc/claviger/policies"
[environments.production]
protected = true
"#;

    fn resolve(text: &str) -> Result<Resolved, ConfigError> {
        Raw::parse(text, "claviger.toml")?.resolve()
    }

    #[test]
    fn what_is_left_out_has_defaults() {
        let resolved = resolve(GOOD).unwrap();
        assert_eq!(resolved.listen.len(), 2);
        assert_eq!(resolved.retention, Resolved::RETENTION);
        assert_eq!(resolved.instance, "broker");
    }

    #[test]
    fn unknown_keys_are_refused_with_place_and_suggestion() {
        let error = resolve(&GOOD.replace("protected = true", "protectd = true")).unwrap_err().to_string();
        assert_eq!(error, "claviger.toml:12:1: unknown key `protectd`; did you mean `protected`?");
        let error = resolve(&format!("{GOOD}[polcy]\n")).unwrap_err().to_string();
        assert!(error.contains("`polcy`; did you mean `policy`?"), "{error}");
    }

    #[test]
    fn each_bad_value_names_its_key() {
        for (from, to, expected) in [
            ("127.0.0.1:7340", "0.0.0.0:7340", "listen.tcp"),
            ("127.0.0.1:7340", "127.0.0.1:70000", "listen.tcp"),
            ("127.0.0.1:7340", "abc", "listen.tcp"),
            ("file = \"/etc/claviger/root.key\"", "", "root_key"),
            ("file = \"/etc", "environment = \"X\"\nfile = \"/etc", "root_key"),
            ("protected = true", "ttl = \"5\"", "environments"),
            ("production", "Production", "claviger.toml:"),
            ("[listen]", "[listen]\nunix_mode = \"999\"", "listen.unix_mode"),
            ("[listen]", "[audit]\nretention = \"1h\"\n[listen]", "audit.retention"),
            ("[listen]", "[audit]\ninstance = \"../x\"\n[listen]", "audit.instance"),
            ("[listen]", "[cache]\ncapacity_mib = 0\n[listen]", "cache.capacity_mib"),
        ] {
            let error = resolve(&GOOD.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error} (wanted {expected})");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
