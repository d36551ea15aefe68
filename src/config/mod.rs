//! The broker's configuration: TOML as written ([`Raw`]), then checked and complete ([`Resolved`]). Neither does
//! I/O; [`assembly`] opens what a [`Resolved`] names, and [`check`] looks at all of it without changing anything.

pub mod assembly;
mod audit_keys;
pub mod check;
mod figures;
mod folder;
mod health;
mod housekeeping;
mod raw;
mod reload;
mod resolve;
mod root_keys;
pub mod samples;
mod state;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::environment::Registry;
use crate::error::{Reason, Reasoned};
use crate::identity::{mtls, peer_credentials};
use crate::policy::PolicySource;
use crate::rotation::engine;
use crate::server::{Limits, Listen};

pub use raw::Raw;

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

/// Where a root key is. Which file, credential or variable it is read from is decided here; reading it is not.
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
    /// Where the HTTP door for probes and metrics listens, if anywhere.
    pub admin: Option<SocketAddr>,
    /// Bounds on what callers may use.
    pub limits: Limits,
    /// Where the root key in force is.
    pub root_key: RootKeyChoice,
    /// Where those are that were in force before, as long as something is still wrapped by them.
    pub previous_root_keys: Vec<RootKeyChoice>,
    /// Where the policies are.
    pub policy: PolicySource,
    /// The name of this broker's audit chain.
    pub instance: String,
    /// How long audit segments are kept.
    pub retention: Duration,
    /// Whom Unix-socket callers stand for.
    pub peers: peer_credentials::Config,
    /// Whom client certificates stand for.
    pub mtls: mtls::Config,
    /// How many bytes of values each environment's cache may hold.
    pub cache_bytes: u64,
    /// How rotations are carried out.
    pub rotation: engine::Settings,
    /// Whether this broker begins rotations by itself when they are due.
    pub scheduler: bool,
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

    /// A broker of these parts, with the defaults of a configuration that says no more; it listens nowhere yet.
    #[must_use]
    pub fn new(
        directory: PathBuf,
        root_key: RootKeyChoice,
        policy: PolicySource,
        registry: Registry,
    ) -> Self {
        Self {
            directory,
            listen: Vec::new(),
            admin: None,
            limits: Limits::default(),
            root_key,
            previous_root_keys: Vec::new(),
            policy,
            instance: "broker".to_owned(),
            retention: Self::RETENTION,
            peers: peer_credentials::Config::default(),
            mtls: mtls::Config::default(),
            cache_bytes: Self::CACHE_BYTES,
            rotation: engine::Settings::default(),
            scheduler: true,
            registry,
            accept_loss: false,
        }
    }

    /// Parses, checks and completes a file's text.
    ///
    /// # Errors
    /// The first [`ConfigError`], with file, line and column.
    pub fn from_text(text: &str, file: &str) -> Result<Self, ConfigError> {
        let first = |errors: Vec<ConfigError>| errors.into_iter().next();
        Self::all_from_text(text, file)
            .map_err(|errors| first(errors).unwrap_or_else(|| ConfigError::new(file, "is not valid")))
    }

    /// As [`from_text`](Self::from_text), for who wants to know all that is wrong.
    ///
    /// # Errors
    /// One [`ConfigError`] for each mistake, at least one. Of a text that is no TOML, or has keys that are not known,
    /// only the first is found.
    pub fn all_from_text(text: &str, file: &str) -> Result<Self, Vec<ConfigError>> {
        let raw = Raw::parse(text, file).map_err(|error| vec![error])?;
        let placed = |error: ConfigError| match raw::place_of(text, &error.place) {
            Some(place) => ConfigError::new(format!("{file}:{place}: {}", error.place), error.problem),
            None => ConfigError::new(format!("{file}: {}", error.place), error.problem),
        };
        raw.resolve().map_err(|errors| errors.into_iter().map(placed).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_are_good_ones() {
        for file in ["one-machine", "aws", "sidecar"] {
            let path = format!("{}/deploy/{file}.toml", env!("CARGO_MANIFEST_DIR"));
            let text = std::fs::read_to_string(path).unwrap();
            let resolved = Resolved::from_text(&text, file).unwrap();
            assert!(resolved.registry.iter().count() > 0);
        }
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
        Resolved::from_text(text, "claviger.toml")
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
            ("127.0.0.1:7340", "0.0.0.0:7340", "4:1: listen.tcp"),
            ("127.0.0.1:7340", "127.0.0.1:70000", "4:1: listen.tcp"),
            ("127.0.0.1:7340", "abc", "4:1: listen.tcp"),
            ("file = \"/etc/claviger/root.key\"", "", "7:2: root_key"),
            ("file = \"/etc", "environment = \"X\"\nfile = \"/etc", "7:2: root_key"),
            ("protected = true", "ttl = \"5\"", "12:1: environments.production.ttl"),
            (
                "protected = true",
                "store = \"aws\"\naws.endpoint = \"x\"",
                "13:5: environments.production.aws.endpoint",
            ),
            ("protected = true", "aws.region = \"x\"", "12:1: environments.production.aws: "),
            ("protected = true", "source_addresses = []", "12:1: environments.production.source_addresses: "),
            ("protected = true", "uncached = [\"a b*\"]", "12:1: environments.production.uncached"),
            (
                "protected = true",
                "source_addresses = [\"10.0.0.1/8\"]",
                "12:1: environments.production.source_ad",
            ),
            ("production", "Production", "11:"),
            ("[listen]", "[listen]\nunix_mode = \"999\"", "3:1: listen.unix_mode"),
            ("[listen]", "[listen]\nadmin = \"x\"", "3:1: listen.admin"),
            ("[listen]", "[listen]\nconnections_per_caller = 0", "3:1: listen.connections_per_caller"),
            ("[listen]", "[listen]\nrates.per_principal = \"many\"", "3:7: listen.rates.per_principal"),
            ("[listen]", "[audit]\nretention = \"1h\"\n[listen]", "3:1: audit.retention"),
            ("[listen]", "[audit]\ninstance = \"../x\"\n[listen]", "3:1: audit.instance"),
            ("[listen]", "[cache]\ncapacity_mib = 0\n[listen]", "3:1: cache.capacity_mib"),
        ] {
            let expected = format!("claviger.toml:{expected}");
            let error = resolve(&GOOD.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.starts_with(&expected), "{error} (wanted {expected})");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn one_mistake_does_not_hide_another() {
        let text = r#"
[listen]
tcp = "0.0.0.0:7340"
unix_mode = "999"
admin = "x"
connections = 0
drain = "soon"
rates.per_address = "many"
rates.strangers = "few"
tls = { address = "x", certificate = "/c", key = "/k" }
[kv]
directory = "/var/lib/claviger"
[root_key]
[[root_key.previous]]
file = "/f"
[[root_key.previous]]
[policy]
directory = "/etc/claviger/policies"
[audit]
instance = "../x"
retention = "1h"
[cache]
capacity_mib = 0
[environments.development]
aws.region = "eu-central-1"
[environments.production]
ttl = "5"
source_addresses = []
"#;
        let errors = Resolved::all_from_text(text, "f").unwrap_err();
        let said: Vec<_> = errors.iter().map(ToString::to_string).collect();
        for expected in [
            "f:3:1: listen.tcp: ",
            "f:4:1: listen.unix_mode: ",
            "f:5:1: listen.admin: ",
            "f:6:1: listen.connections: ",
            "f:7:1: listen.drain: ",
            "f:8:7: listen.rates.per_address: ",
            "f:9:7: listen.rates.strangers: ",
            "f:10:9: listen.tls.address: ",
            "f:13:2: root_key: ",
            "f:14:12: root_key.previous: ",
            "f:20:1: audit.instance: ",
            "f:21:1: audit.retention: ",
            "f:23:1: cache.capacity_mib: ",
            "f:25:1: environments.development.aws: ",
            "f:27:1: environments.production.ttl: ",
            "f:28:1: environments.production.source_addresses: ",
        ] {
            assert!(said.iter().any(|said| said.starts_with(expected)), "{expected} in {said:#?}");
        }
        assert_eq!(said.len(), 16, "{said:#?}");
        assert_eq!(Resolved::from_text(text, "f").unwrap_err(), errors[0]);
        assert!(Resolved::all_from_text(GOOD, "f").is_ok());
    }
}
