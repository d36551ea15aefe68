//! From what was written to what is meant: every value checked, every default filled in. No I/O. One mistake does not
//! hide another: the default stands in for a value that is wrong, and the rest is looked at.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use super::raw::{self, Raw};
use super::{ConfigError, Resolved, RootKeyChoice};
use crate::clock::parse_duration;
use crate::environment::{EnvironmentError, Registry};
use crate::policy::PolicySource;
use crate::rotation::engine;
use crate::secret::EnvironmentName;
use crate::server::limits::Rate;
use crate::server::{Limits, Listen};

impl Raw {
    /// Checks what was written and fills in what was not.
    ///
    /// # Errors
    /// All that is wrong, at least one, each naming the table and the key.
    pub fn resolve(self) -> Result<Resolved, Vec<ConfigError>> {
        let mut problems = Problems::default();
        let limits = limits(&self.listen, &mut problems);
        let admin = self.listen.admin.as_deref();
        let admin = admin.and_then(|text| problems.keep(address("listen.admin", text)));
        let listen = listen(self.listen, &mut problems);
        let (root_key, previous_root_keys) = root_keys(self.root_key, &mut problems);
        let retention = problems.keep(retention(self.audit.retention.as_deref())).unwrap_or_default();
        let instance = problems.keep(instance(self.audit.instance)).unwrap_or_default();
        let cache_bytes = problems.keep(cache_bytes(self.cache.capacity_mib)).unwrap_or_default();
        let scheduler = self.rotation.scheduler.unwrap_or(true);
        let rotation = rotation(&self.rotation, &mut problems);
        let registry = Registry::from_config(self.environments).map_err(|errors| {
            problems.0.extend(errors.into_iter().map(of_environment));
        });
        let policy = PolicySource::Directory(self.policy.directory);
        match (root_key, registry) {
            (Some(root_key), Ok(registry)) if problems.0.is_empty() => Ok(Resolved {
                listen,
                admin,
                limits,
                previous_root_keys,
                retention,
                instance,
                peers: self.identity.peer_credentials,
                mtls: self.identity.mtls,
                cache_bytes,
                rotation,
                scheduler,
                ..Resolved::new(self.kv.directory, root_key, policy, registry)
            }),
            _ => Err(problems.0),
        }
    }
}

/// What is wrong so far.
#[derive(Default)]
struct Problems(Vec<ConfigError>);

impl Problems {
    fn say(&mut self, problem: ConfigError) {
        self.0.push(problem);
    }

    fn keep<T>(&mut self, checked: Result<T, ConfigError>) -> Option<T> {
        checked.map_err(|problem| self.say(problem)).ok()
    }
}

/// A folder's name on the disk, so it follows the strictest grammar at hand.
fn instance(name: Option<String>) -> Result<String, ConfigError> {
    let instance = name.unwrap_or_else(|| "broker".to_owned());
    match EnvironmentName::parse(&instance) {
        Ok(_) => Ok(instance),
        Err(_) => Err(ConfigError::new("audit.instance", "must be 1 to 63 of a-z, 0-9 and inner hyphens")),
    }
}

fn retention(text: Option<&str>) -> Result<Duration, ConfigError> {
    let retention = match text {
        None => return Ok(Resolved::RETENTION),
        Some(text) => duration("audit.retention", text)?,
    };
    match retention < Duration::from_secs(86_400) {
        true => Err(ConfigError::new("audit.retention", "must be a day or more")),
        false => Ok(retention),
    }
}

fn cache_bytes(mib: Option<u64>) -> Result<u64, ConfigError> {
    match mib {
        None => Ok(Resolved::CACHE_BYTES),
        Some(mib @ 1..=65_536) => Ok(mib * 1024 * 1024),
        Some(_) => Err(ConfigError::new("cache.capacity_mib", "must be 1 to 65536")),
    }
}

fn rotation(raw: &raw::Rotation, problems: &mut Problems) -> engine::Settings {
    let mut settings = engine::Settings::default();
    match raw.concurrency {
        None => {}
        Some(concurrency @ 1..=64) => settings.concurrency = concurrency,
        Some(_) => problems.say(ConfigError::new("rotation.concurrency", "must be 1 to 64")),
    }
    for (key, text, from, to, setting) in [
        ("rotation.retry_from", &raw.retry_from, 100, 3_600_000, &mut settings.retry_from),
        ("rotation.retry_to", &raw.retry_to, 1_000, 86_400_000, &mut settings.retry_to),
        ("rotation.lease", &raw.lease, 2_000, 3_600_000, &mut settings.lease),
        ("rotation.step", &raw.step, 500, 600_000, &mut settings.step),
    ] {
        let Some(text) = text else { continue };
        let bounds = Duration::from_millis(from)..=Duration::from_millis(to);
        match problems.keep(duration(key, text)) {
            Some(given) if bounds.contains(&given) => *setting = given,
            Some(_) => {
                let problem = format!("must be {:?} to {:?}", bounds.start(), bounds.end());
                problems.say(ConfigError::new(key, problem));
            }
            None => {}
        }
    }
    if settings.retry_from > settings.retry_to {
        let problem = "is longer than rotation.retry_to; the first wait can't be longer than the longest";
        problems.say(ConfigError::new("rotation.retry_from", problem));
    }
    // A lease that ends while a step may still be under way invites a second owner, whom only the fence tells apart.
    if settings.step > settings.lease / 2 {
        match raw.step {
            None => settings.step = settings.lease / 2,
            Some(_) => {
                problems.say(ConfigError::new("rotation.step", "must be at most half of rotation.lease"));
            }
        }
    }
    settings
}

fn limits(listen: &raw::Listen, problems: &mut Problems) -> Limits {
    let mut limits = Limits::default();
    for (key, given, limit) in [
        ("listen.connections", listen.connections, &mut limits.connections),
        ("listen.connections_per_caller", listen.connections_per_caller, &mut limits.connections_per_caller),
        ("listen.watches_per_caller", listen.watches_per_caller, &mut limits.watches_per_caller),
    ] {
        match given {
            None => {}
            Some(connections @ 1..=65_536) => *limit = connections,
            Some(_) => problems.say(ConfigError::new(key, "must be 1 to 65536")),
        }
    }
    limits.workers = match listen.workers {
        Some(workers @ 1..=256) => NonZeroUsize::new(workers),
        Some(_) => {
            problems.say(ConfigError::new(
                "listen.workers",
                "must be 1 to 256; leave it out for one a processor",
            ));
            None
        }
        None => None,
    };
    let drain = listen.drain.as_deref().and_then(|text| problems.keep(drain(text)));
    if let Some(drain) = drain {
        limits.drain = drain;
    }
    let rates = &listen.rates;
    let mut rate =
        |key, text: &Option<String>| text.as_deref().and_then(|text| problems.keep(rate(key, text)));
    limits.per_principal = rate("listen.rates.per_principal", &rates.per_principal);
    limits.per_address = rate("listen.rates.per_address", &rates.per_address);
    if let Some(strangers) = rate("listen.rates.strangers", &rates.strangers) {
        limits.strangers = strangers;
    }
    limits
}

fn rate(key: &str, text: &str) -> Result<Rate, ConfigError> {
    Rate::parse(text).map_err(|problem| ConfigError::new(key, problem))
}

fn duration(key: &str, text: &str) -> Result<Duration, ConfigError> {
    parse_duration(text).map_err(|error| ConfigError::new(key, error.to_string()))
}

/// Bounded, so that a broker that was told to end does so before its supervisor loses patience.
fn drain(text: &str) -> Result<Duration, ConfigError> {
    match duration("listen.drain", text)? {
        longer if longer > Duration::from_secs(600) => {
            Err(ConfigError::new("listen.drain", "must be at most 10m"))
        }
        drain => Ok(drain),
    }
}

fn address(key: &str, text: &str) -> Result<SocketAddr, ConfigError> {
    text.parse().map_err(|_| ConfigError::new(key, "must be ADDRESS:PORT, for example \"127.0.0.1:7340\""))
}

fn listen(raw: raw::Listen, problems: &mut Problems) -> Vec<Listen> {
    if raw.unix.is_none() && raw.tcp.is_none() && raw.tls.is_none() {
        problems.say(ConfigError::new("listen", "names no listener; set unix, tcp or tls"));
    }
    let mode = problems.keep(mode(raw.unix_mode.as_deref())).unwrap_or_default();
    let unix = raw.unix.map(|path| Listen::Unix { path, mode });
    let tcp = raw.tcp.and_then(|text| problems.keep(loopback("listen.tcp", &text))).map(Listen::Tcp);
    let tls = raw.tls.and_then(|tls| {
        let settings = tls.resolve();
        problems
            .keep(settings.map_err(|(key, problem)| ConfigError::new(format!("listen.tls.{key}"), problem)))
    });
    [unix, tcp, tls.map(Listen::Tls)].into_iter().flatten().collect()
}

fn mode(text: Option<&str>) -> Result<u32, ConfigError> {
    match text.map(|text| u32::from_str_radix(text, 8)) {
        None => Ok(0o660),
        Some(Ok(mode)) if mode <= 0o777 => Ok(mode),
        Some(_) => {
            let problem = "must be octal permission bits, for example \"0660\"";
            Err(ConfigError::new("listen.unix_mode", problem))
        }
    }
}

fn loopback(key: &str, text: &str) -> Result<SocketAddr, ConfigError> {
    let address = address(key, text)?;
    if address.ip().is_loopback() {
        return Ok(address);
    }
    let problem = "is not a loopback address, and without TLS secrets would cross the network in the clear; use \
                   [listen.tls]";
    Err(ConfigError::new(key, problem))
}

/// The key in force, and those before it.
fn root_keys(raw: raw::RootKey, problems: &mut Problems) -> (Option<RootKeyChoice>, Vec<RootKeyChoice>) {
    let newest = root_key("root_key", (raw.file, raw.systemd_credential, raw.environment));
    let newest = problems.keep(newest);
    let previous = raw.previous.into_iter().filter_map(|key| {
        let choice = (key.file, key.systemd_credential, key.environment);
        problems.keep(root_key("root_key.previous", choice))
    });
    (newest, previous.collect())
}

fn root_key(
    table: &str,
    choice: (Option<PathBuf>, Option<String>, Option<String>),
) -> Result<RootKeyChoice, ConfigError> {
    match choice {
        (Some(file), None, None) => Ok(RootKeyChoice::File(file)),
        (None, Some(name), None) if !name.contains('/') && !name.is_empty() => {
            Ok(RootKeyChoice::SystemdCredential(name))
        }
        (None, Some(_), None) => {
            Err(ConfigError::new(format!("{table}.systemd_credential"), "is a credential's name, not a path"))
        }
        (None, None, Some(name)) => Ok(RootKeyChoice::Environment(name)),
        _ => Err(ConfigError::new(table, "set exactly one of file, systemd_credential and environment")),
    }
}

/// The table and, where the problem begins with it, the key.
fn of_environment(error: EnvironmentError) -> ConfigError {
    match error {
        EnvironmentError::Invalid { environment, problem } => {
            let key: String =
                problem.chars().take_while(|c| c.is_ascii_lowercase() || matches!(c, '_' | '.')).collect();
            let place = format!("environments.{environment}.{key}");
            ConfigError::new(place.trim_end_matches('.'), problem)
        }
        other => ConfigError::new("environments", other.to_string()),
    }
}
