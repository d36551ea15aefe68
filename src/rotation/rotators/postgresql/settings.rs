//! The definition's table `[postgresql-alternating]`.
//!
//! ```toml
//! [postgresql-alternating]
//! hosts             = ["db1.internal:5432", "db2.internal:5432"]  # the one that is not a standby is the primary
//! database          = "shop"
//! users             = ["shop_a", "shop_b"]         # the two login roles that take turns
//! owner             = "shop_owner"                 # NOLOGIN; owns everything; both act as it
//! admin             = "database-admin"             # the secret, of the same environment, of who may change the two
//! tls               = "verify-full"                # or "disable", towards loopback addresses alone
//! ca_file           = "/etc/claviger/db-ca.pem"    # else the authorities that the system trusts
//! endpoints         = ["db2.internal:5432"]        # standbys and poolers that must accept a new password, too
//! propagation       = "15s"                        # how long they may take
//! url_field         = "url"                        # the member that holds a URI with both, where there is one
//! system_identifier = "7710540260365168190"        # of the cluster; else what the first rotation found
//! ```
//!
//! Where the secret says other hosts or users than these, they are not used: who can write the secret must not be able
//! to have the admin's password sent elsewhere.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::clock::parse_duration;
use crate::rotation::rotators::object::{field, only, shown, text, texts};
use crate::rotation::rotators::password::Rules;
use crate::secret::{FieldName, SecretName};

const KEYS: [&str; 12] = [
    "hosts",
    "database",
    "users",
    "owner",
    "admin",
    "tls",
    "ca_file",
    "endpoints",
    "propagation",
    "password",
    "url_field",
    "system_identifier",
];
const DEFAULT_PORT: u16 = 5432;
const MOST_PLACES: usize = 16;
/// NAMEDATALEN - 1: the server cuts what is longer, and then means another role.
const LONGEST_NAME: usize = 63;
const PROPAGATION: (Duration, Duration, Duration) =
    (Duration::from_secs(1), Duration::from_secs(15), Duration::from_secs(600));

/// What a definition says, checked.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) hosts: Vec<Place>,
    pub(super) database: String,
    pub(super) users: [String; 2],
    pub(super) owner: String,
    pub(super) admin: SecretName,
    pub(super) encryption: Encryption,
    pub(super) endpoints: Vec<Place>,
    pub(super) propagation: Duration,
    pub(super) password: Rules,
    pub(super) url_field: Option<FieldName>,
    pub(super) system_identifier: Option<String>,
}

/// How a connection is protected. There is nothing in between, and no falling back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Encryption {
    /// TLS, with a certificate for the host's name from one of these authorities (`None`: the system's).
    VerifyFull { ca_file: Option<PathBuf> },
    /// None. Only towards this machine.
    Disabled,
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) host: String,
    pub(super) port: u16,
}

impl Settings {
    /// Checks a table.
    pub(super) fn parse(table: &Map<String, Value>) -> Result<Self, String> {
        only(table, &KEYS)?;
        let settings = Self {
            hosts: places(table, "hosts")?.ok_or("`hosts` is missing; list the servers as \"host:port\"")?,
            database: name(table, "database")?.ok_or("`database` is missing; name the one to log in to")?,
            users: users(table)?,
            owner: role(table, "owner")?
                .ok_or("`owner` is missing; name the NOLOGIN role that owns the tables")?,
            admin: admin(table)?,
            encryption: encryption(table)?,
            endpoints: places(table, "endpoints")?.unwrap_or_default(),
            propagation: propagation(table)?,
            password: password(table)?,
            url_field: url_field(table)?,
            system_identifier: system_identifier(table)?,
        };
        settings.fits()
    }

    /// What the settings have to be to each other.
    fn fits(self) -> Result<Self, String> {
        if self.users.contains(&self.owner) {
            return Err("`owner` is one of `users`; let both be members of a third role".to_owned());
        }
        if self.hosts.is_empty() {
            return Err("`hosts` is empty; list the servers as \"host:port\"".to_owned());
        }
        let outside = |place: &&Place| self.encryption == Encryption::Disabled && !place.is_loopback();
        let found = self.hosts.iter().chain(&self.endpoints).find(outside).cloned();
        match found {
            Some(place) => Err(format!(
                "`tls` is \"disable\", but {place} is no loopback address; have the server use TLS, and set \"verify-full\""
            )),
            None => Ok(self),
        }
    }

    /// What names the target: its hosts, in whatever order they were listed.
    pub(super) fn target(&self) -> String {
        let mut hosts: Vec<_> = self.hosts.iter().map(Place::to_string).collect();
        hosts.sort_unstable();
        format!("postgresql {}", hosts.join(","))
    }

    /// The other one of the two users; `None` where `user` is neither.
    pub(super) fn other(&self, user: &str) -> Option<&str> {
        let [first, second] = &self.users;
        if user == first {
            Some(second)
        } else if user == second {
            Some(first)
        } else {
            None
        }
    }
}

impl Place {
    /// `host`, `host:port` or `[address]:port`.
    fn parse(text: &str) -> Result<Self, String> {
        let refuse = |problem: &str| Err(format!("{} {problem}", shown(text)));
        let (host, port) = match text.strip_prefix('[').map(|rest| rest.split_once(']')) {
            Some(Some((host, rest))) => (host, rest.strip_prefix(':').or(rest.is_empty().then_some(""))),
            Some(None) => return refuse("has no `]`; write an IPv6 address as \"[::1]:5432\""),
            None => match text.split_once(':') {
                Some((_, port)) if port.contains(':') => {
                    return refuse("has several colons; write an IPv6 address as \"[::1]:5432\"");
                }
                Some((host, port)) => (host, Some(port)),
                None => (text, Some("")),
            },
        };
        let port = match port {
            Some("") if !text.ends_with(':') => Some(DEFAULT_PORT),
            Some(port) => port.parse::<u16>().ok().filter(|port| *port != 0),
            None => None,
        };
        let Some(port) = port else { return refuse("has no port from 1 to 65535 behind its host") };
        if rustls::pki_types::ServerName::try_from(host).is_err() {
            return refuse("has neither a DNS name nor an address for a host");
        }
        Ok(Self { host: host.to_owned(), port })
    }

    fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

fn places(table: &Map<String, Value>, key: &str) -> Result<Option<Vec<Place>>, String> {
    let Some(items) = texts(table, key)? else { return Ok(None) };
    if items.len() > MOST_PLACES {
        return Err(format!("`{key}` lists {} places; at most {MOST_PLACES} are looked at", items.len()));
    }
    let places: Result<Vec<_>, _> = items.into_iter().map(Place::parse).collect();
    places.map(Some).map_err(|problem| format!("`{key}`: {problem}"))
}

/// A name of something in the server, which cuts what is too long and knows no NUL.
fn checked(key: &str, name: &str) -> Result<String, String> {
    let shown = shown(name);
    if name.is_empty() {
        return Err(format!("`{key}` is empty"));
    }
    if name.len() > LONGEST_NAME {
        return Err(format!(
            "`{key}`: {shown} is {} bytes long; PostgreSQL cuts names after {LONGEST_NAME}",
            name.len()
        ));
    }
    match name.chars().any(char::is_control) {
        true => Err(format!("`{key}`: {shown} has a control character in it")),
        false => Ok(name.to_owned()),
    }
}

fn name(table: &Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    text(table, key)?.map(|name| checked(key, name)).transpose()
}

/// A name that a role can have.
fn checked_role(key: &str, name: &str) -> Result<String, String> {
    let name = checked(key, name)?;
    match name == "none" || name == "public" || name.starts_with("pg_") {
        true => Err(format!("`{key}`: `{name}` is a name that PostgreSQL keeps to itself")),
        false => Ok(name),
    }
}

fn role(table: &Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    text(table, key)?.map(|name| checked_role(key, name)).transpose()
}

fn users(table: &Map<String, Value>) -> Result<[String; 2], String> {
    const WANTED: &str = "`users` must name the two login roles that take turns";
    let users = texts(table, "users")?.ok_or(WANTED)?;
    let users: Result<Vec<_>, _> = users.into_iter().map(|name| checked_role("users", name)).collect();
    users?.try_into().map_err(|_| WANTED.to_owned())
}

fn admin(table: &Map<String, Value>) -> Result<SecretName, String> {
    let name = text(table, "admin")?
        .ok_or("`admin` is missing; name the secret that holds the admin's username and password")?;
    SecretName::parse(name).map_err(|error| format!("`admin`: {error}"))
}

fn encryption(table: &Map<String, Value>) -> Result<Encryption, String> {
    let ca_file = text(table, "ca_file")?.map(PathBuf::from);
    if ca_file.as_ref().is_some_and(|path| !path.is_absolute()) {
        return Err(
            "`ca_file` must be an absolute path: the broker reads it wherever it was started".to_owned()
        );
    }
    match (text(table, "tls")?.unwrap_or("verify-full"), ca_file) {
        ("verify-full", ca_file) => Ok(Encryption::VerifyFull { ca_file }),
        ("disable", None) => Ok(Encryption::Disabled),
        ("disable", Some(_)) => Err("`ca_file` is of no use where `tls` is \"disable\"".to_owned()),
        _ => Err("`tls` must be \"verify-full\", or \"disable\" towards loopback addresses".to_owned()),
    }
}

fn propagation(table: &Map<String, Value>) -> Result<Duration, String> {
    let (least, usual, most) = PROPAGATION;
    let Some(text) = text(table, "propagation")? else { return Ok(usual) };
    let duration = parse_duration(text).map_err(|error| format!("`propagation`: {error}"))?;
    match (least..=most).contains(&duration) {
        true => Ok(duration),
        false => Err("`propagation` must be from 1s to 10m".to_owned()),
    }
}

fn password(table: &Map<String, Value>) -> Result<Rules, String> {
    match table.get("password") {
        None => Ok(Rules::default()),
        Some(Value::Object(rules)) => {
            Rules::from_settings(rules).map_err(|error| format!("`password`: {error}"))
        }
        Some(_) => Err("`password` must be a table of rules for new passwords, never a password".to_owned()),
    }
}

fn url_field(table: &Map<String, Value>) -> Result<Option<FieldName>, String> {
    let Some(name) = field(table, "url_field")? else { return Ok(None) };
    match ["username", "password"].contains(&name.as_str()) {
        true => Err(format!("`url_field` can't be `{name}`, which is a member of its own")),
        false => Ok(Some(name)),
    }
}

fn system_identifier(table: &Map<String, Value>) -> Result<Option<String>, String> {
    let Some(text) = text(table, "system_identifier")? else { return Ok(None) };
    match text.parse::<u64>() {
        Ok(number) => Ok(Some(number.to_string())),
        Err(_) => Err("`system_identifier` must be the number, as a string, that \
                       `SELECT system_identifier FROM pg_control_system()` gives"
            .to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn table(change: &Value) -> Map<String, Value> {
        let mut table = json!({
            "hosts": ["db1.internal:5432", "db2.internal"],
            "database": "shop",
            "users": ["shop_a", "shop_b"],
            "owner": "shop_owner",
            "admin": "database-admin",
        });
        for (key, value) in change.as_object().unwrap() {
            table[key] = value.clone();
        }
        table.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        table.as_object().unwrap().clone()
    }

    fn refused(change: &Value) -> String {
        Settings::parse(&table(change)).unwrap_err()
    }

    #[test]
    fn what_is_left_out_is_strict() {
        let settings = Settings::parse(&table(&json!({}))).unwrap();
        assert_eq!(settings.encryption, Encryption::VerifyFull { ca_file: None });
        assert_eq!(settings.propagation, Duration::from_secs(15));
        assert_eq!(settings.target(), "postgresql db1.internal:5432,db2.internal:5432");
        assert_eq!(settings.other("shop_a"), Some("shop_b"));
        assert_eq!(settings.other("shop_b"), Some("shop_a"));
        assert_eq!(settings.other("shop"), None);
    }

    #[test]
    fn each_mistake_names_its_key() {
        for (change, key) in [
            (json!({"hots": []}), "`hots`"),
            (json!({"hosts": null}), "`hosts`"),
            (json!({"hosts": []}), "`hosts`"),
            (json!({"hosts": "db:1"}), "`hosts`"),
            (json!({"hosts": ["db:0"]}), "`hosts`"),
            (json!({"hosts": ["db:"]}), "`hosts`"),
            (json!({"hosts": ["::1"]}), "`hosts`"),
            (json!({"hosts": ["[::1"]}), "`hosts`"),
            (json!({"hosts": ["[::1]5432"]}), "`hosts`"),
            (json!({"hosts": ["a b:5432"]}), "`hosts`"),
            (json!({"hosts": (1..=17).map(|n| format!("db{n}")).collect::<Vec<_>>()}), "`hosts`"),
            (json!({"hosts": ["db", 5432]}), "`hosts`"),
            (json!({"database": ""}), "`database`"),
            (json!({"database": "a\u{0}b"}), "`database`"),
            (json!({"users": ["a"]}), "`users`"),
            (json!({"users": ["a", "a"]}), "`users`"),
            (json!({"users": ["a", "b", "c"]}), "`users`"),
            (json!({"users": ["a", "x".repeat(64)]}), "63"),
            (json!({"users": ["a", "pg_monitor"]}), "`users`"),
            (json!({"owner": "shop_a"}), "`owner`"),
            (json!({"owner": "none"}), "`owner`"),
            (json!({"admin": "a b"}), "`admin`"),
            (json!({"tls": "prefer"}), "`tls`"),
            (json!({"tls": "disable"}), "`tls`"),
            (json!({"ca_file": "ca.pem"}), "`ca_file`"),
            (json!({"propagation": "15"}), "`propagation`"),
            (json!({"propagation": "1h"}), "`propagation`"),
            (json!({"password": "hunter2"}), "`password`"),
            (json!({"url_field": "password"}), "`url_field`"),
            (json!({"system_identifier": "x"}), "`system_identifier`"),
        ] {
            let message = refused(&change);
            assert!(message.contains(key), "{change}: {message}");
            assert!(!message.contains("hunter2"), "{message}");
        }
    }

    #[test]
    fn without_tls_only_this_machine_is_spoken_to() {
        let local = json!({"tls": "disable", "hosts": ["127.0.0.1:1", "[::1]:2", "localhost", "127.9.9.9"]});
        let settings = Settings::parse(&table(&local)).unwrap();
        assert_eq!(settings.encryption, Encryption::Disabled);
        let hosts: Vec<_> = settings.hosts.iter().map(Place::to_string).collect();
        assert_eq!(hosts, ["127.0.0.1:1", "[::1]:2", "localhost:5432", "127.9.9.9:5432"]);
        let standby = json!({"tls": "disable", "hosts": ["127.0.0.1"], "endpoints": ["10.0.0.1"]});
        assert!(refused(&standby).contains("10.0.0.1:5432"));
        let name = json!({"tls": "disable", "hosts": ["localhost.example.org"]});
        assert!(refused(&name).contains("localhost.example.org"));
    }
}
