//! The file as it is written.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use toml::de::{DeTable, DeValue};

use super::ConfigError;
use crate::environment;
use crate::identity::{mtls, peer_credentials};
use crate::secret::EnvironmentName;
use crate::server::tls;

/// The file as written. Each table is what its module calls its configuration, where it has one.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    pub(super) listen: Listen,
    pub(super) kv: Kv,
    pub(super) root_key: RootKey,
    pub(super) policy: Policy,
    #[serde(default)]
    pub(super) audit: Audit,
    #[serde(default)]
    pub(super) identity: Identity,
    #[serde(default)]
    pub(super) cache: Cache,
    #[serde(default)]
    pub(super) rotation: Rotation,
    pub(super) environments: BTreeMap<EnvironmentName, environment::Config>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Listen {
    pub(super) unix: Option<PathBuf>,
    pub(super) unix_mode: Option<String>,
    pub(super) tcp: Option<String>,
    pub(super) tls: Option<tls::Config>,
    pub(super) admin: Option<String>,
    pub(super) connections: Option<usize>,
    pub(super) connections_per_caller: Option<usize>,
    pub(super) watches_per_caller: Option<usize>,
    pub(super) workers: Option<usize>,
    #[serde(default)]
    pub(super) rates: Rates,
    pub(super) drain: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Rates {
    pub(super) per_principal: Option<String>,
    pub(super) per_address: Option<String>,
    pub(super) strangers: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Kv {
    pub(super) directory: PathBuf,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RootKey {
    pub(super) file: Option<PathBuf>,
    pub(super) systemd_credential: Option<String>,
    pub(super) environment: Option<String>,
    #[serde(default)]
    pub(super) previous: Vec<PreviousRootKey>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PreviousRootKey {
    pub(super) file: Option<PathBuf>,
    pub(super) systemd_credential: Option<String>,
    pub(super) environment: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Policy {
    pub(super) directory: PathBuf,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Audit {
    pub(super) instance: Option<String>,
    pub(super) retention: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Identity {
    #[serde(default)]
    pub(super) peer_credentials: peer_credentials::Config,
    #[serde(default)]
    pub(super) mtls: mtls::Config,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Cache {
    pub(super) capacity_mib: Option<u64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Rotation {
    pub(super) scheduler: Option<bool>,
    pub(super) concurrency: Option<usize>,
    pub(super) retry_from: Option<String>,
    pub(super) retry_to: Option<String>,
    pub(super) lease: Option<String>,
    pub(super) step: Option<String>,
}

impl Raw {
    /// Parses a file's text.
    ///
    /// # Errors
    /// With file, line, column and, for a key that is not known, the nearest one that is.
    pub fn parse(text: &str, file: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let place = match error.span() {
                Some(span) => format!("{file}:{}", line_and_column(text, span.start)),
                None => file.to_owned(),
            };
            ConfigError::new(place, suggesting(error.message()))
        })
    }
}

/// Where in the text a dotted path stands, as far as it goes: `line:column`. Nothing where not even its first part is
/// there.
pub(super) fn place_of(text: &str, path: &str) -> Option<String> {
    let document = DeTable::parse(text).ok()?;
    let mut table = Some(document.get_ref());
    let mut place = None;
    for part in path.split('.') {
        let Some((key, value)) = table.and_then(|table| table.get_key_value(part)) else { break };
        place = Some(key.span().start);
        table = match value.get_ref() {
            DeValue::Table(table) => Some(table),
            _ => None,
        };
    }
    place.map(|offset| line_and_column(text, offset))
}

fn line_and_column(text: &str, offset: usize) -> String {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    format!("{line}:{column}")
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
