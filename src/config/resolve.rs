//! From what was written to what is meant: every value checked, every default filled in. No I/O.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::raw::{self, Raw};
use super::{ConfigError, Resolved, RootKeyChoice};
use crate::clock::parse_duration;
use crate::environment::{EnvironmentError, Registry};
use crate::policy::PolicySource;
use crate::secret::EnvironmentName;
use crate::server::limits::Rate;
use crate::server::{Limits, Listen};

impl Raw {
    /// Checks what was written and fills in what was not.
    ///
    /// # Errors
    /// [`ConfigError`], naming the table and the key.
    pub fn resolve(self) -> Result<Resolved, ConfigError> {
        let limits = limits(&self.listen)?;
        let admin = self.listen.admin.as_deref().map(|text| address("listen.admin", text)).transpose()?;
        let previous =
            self.root_key.previous.iter().cloned().map(|key| {
                root_key("root_key.previous", (key.file, key.systemd_credential, key.environment))
            });
        let previous_root_keys = previous.collect::<Result<_, _>>()?;
        let key = self.root_key;
        let root_key = root_key("root_key", (key.file, key.systemd_credential, key.environment))?;
        let policy = PolicySource::Directory(self.policy.directory);
        let registry = Registry::from_config(self.environments).map_err(of_environment)?;
        Ok(Resolved {
            listen: listen(self.listen)?,
            admin,
            limits,
            previous_root_keys,
            retention: retention(self.audit.retention.as_deref())?,
            instance: instance(self.audit.instance)?,
            peers: self.identity.peer_credentials,
            mtls: self.identity.mtls,
            cache_bytes: cache_bytes(self.cache.capacity_mib)?,
            ..Resolved::new(self.kv.directory, root_key, policy, registry)
        })
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

fn limits(listen: &raw::Listen) -> Result<Limits, ConfigError> {
    let mut limits = Limits::default();
    for (key, given, limit) in [
        ("listen.connections", listen.connections, &mut limits.connections),
        ("listen.connections_per_caller", listen.connections_per_caller, &mut limits.connections_per_caller),
        ("listen.watches_per_caller", listen.watches_per_caller, &mut limits.watches_per_caller),
    ] {
        match given {
            None => {}
            Some(connections @ 1..=65_536) => *limit = connections,
            Some(_) => return Err(ConfigError::new(key, "must be 1 to 65536")),
        }
    }
    if let Some(drain) = &listen.drain {
        limits.drain = duration("listen.drain", drain)?;
    }
    let rates = &listen.rates;
    limits.per_principal = rate("listen.rates.per_principal", rates.per_principal.as_deref())?;
    limits.per_address = rate("listen.rates.per_address", rates.per_address.as_deref())?;
    if let Some(strangers) = rate("listen.rates.strangers", rates.strangers.as_deref())? {
        limits.strangers = strangers;
    }
    Ok(limits)
}

fn rate(key: &str, text: Option<&str>) -> Result<Option<Rate>, ConfigError> {
    text.map(|text| Rate::parse(text).map_err(|problem| ConfigError::new(key, problem))).transpose()
}

fn duration(key: &str, text: &str) -> Result<Duration, ConfigError> {
    parse_duration(text).map_err(|error| ConfigError::new(key, error.to_string()))
}

fn address(key: &str, text: &str) -> Result<SocketAddr, ConfigError> {
    text.parse().map_err(|_| ConfigError::new(key, "must be ADDRESS:PORT, for example \"127.0.0.1:7340\""))
}

fn listen(raw: raw::Listen) -> Result<Vec<Listen>, ConfigError> {
    let mut listen = Vec::new();
    let mode = match raw.unix_mode.as_deref().map(|text| u32::from_str_radix(text, 8)) {
        None => 0o660,
        Some(Ok(mode)) if mode <= 0o777 => mode,
        Some(_) => {
            let problem = "must be octal permission bits, for example \"0660\"";
            return Err(ConfigError::new("listen.unix_mode", problem));
        }
    };
    if let Some(path) = raw.unix {
        listen.push(Listen::Unix { path, mode });
    }
    if let Some(text) = raw.tcp {
        let address = address("listen.tcp", &text)?;
        if !address.ip().is_loopback() {
            let problem = "is not a loopback address, and without TLS secrets would cross the network in the \
                           clear; use [listen.tls]";
            return Err(ConfigError::new("listen.tcp", problem));
        }
        listen.push(Listen::Tcp(address));
    }
    if let Some(tls) = raw.tls {
        let settings =
            tls.resolve().map_err(|(key, problem)| ConfigError::new(format!("listen.tls.{key}"), problem))?;
        listen.push(Listen::Tls(settings));
    }
    if listen.is_empty() {
        return Err(ConfigError::new("listen", "names no listener; set unix, tcp or tls"));
    }
    Ok(listen)
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
