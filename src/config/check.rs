//! Looks at everything that a configuration names, and changes nothing: what a start would trip over is found before
//! the start, all of it at once.
//!
//! The embedded store is only opened with `online`, and only where no broker has it open. The doors are opened, all
//! together, and closed again.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;

use super::assembly::ReadVariable;
use super::{ConfigError, Resolved, audit_keys, folder, root_keys, state};
use crate::audit;
use crate::clock::SharedClock;
use crate::crypto::KeyRing;
use crate::environment::{AwsSettings, Environment, StoreChoice};
use crate::identity::mtls::Mtls;
use crate::identity::peer_credentials::PeerCredentials;
use crate::kv::embedded::{self, Embedded};
use crate::kv::{Kv, KvError};
use crate::policy::Policies;
use crate::server::Listen;
use crate::server::tls::Tls;
use crate::store::Store as _;
use crate::store::aws::Aws;
use crate::store::sealed::Sealed;

/// How long a store may take to answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// How many bytes the path of a Unix socket may have: `sun_path` has 108, one of them for the end (unix(7)).
const LONGEST_SOCKET: usize = 107;

/// What is said of a database that somebody has.
const TAKEN: &str = "is open in a broker that runs; not looked into, and no other can start on it";

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// As it should be.
    Fine,
    /// Worth a look; a broker would start.
    Warning,
    /// A broker would not start, or not serve what it names.
    Problem,
}

/// What was found of one thing that the configuration names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// The table and key of the configuration.
    pub place: String,
    /// What was found, and the mend where one is needed.
    pub said: String,
}

impl From<ConfigError> for Finding {
    fn from(error: ConfigError) -> Self {
        Self { level: Level::Problem, place: error.place, said: error.problem }
    }
}

/// Looks at the text of a configuration, and where nothing is wrong with that, at everything that it names.
pub async fn check_text(
    text: &str,
    file: &str,
    variable: ReadVariable<'_>,
    online: bool,
    clock: &SharedClock,
) -> Vec<Finding> {
    match Resolved::all_from_text(text, file) {
        Ok(resolved) => check(&resolved, variable, online, clock).await,
        Err(errors) => errors.into_iter().map(Finding::from).collect(),
    }
}

/// Looks at everything; with `online` also asks the stores.
pub async fn check(
    resolved: &Resolved,
    variable: ReadVariable<'_>,
    online: bool,
    clock: &SharedClock,
) -> Vec<Finding> {
    let mut findings = Findings(Vec::new());
    let path = resolved.directory.join("claviger.db");
    let fresh = !is_there(&path);
    directory(&resolved.directory, &mut findings);
    let free = database(&path, fresh, &mut findings);
    let ring =
        root_key(resolved, fresh, variable, &mut Vec::new()).map(|(ring, said)| match fresh || online {
            true => (ring, said),
            false => (ring, format!("{said}; whether it fits the database is checked with --online")),
        });
    let ring = findings.keep("root_key", ring);
    if !fresh {
        findings.note("audit", audit_key(resolved));
    }
    findings.note("policy.directory", policies(resolved, clock));
    findings.note("identity.peer_credentials", peers(resolved));
    findings.note("identity.mtls", mtls(resolved));
    doors(resolved, clock, &mut findings).await;
    for environment in resolved.registry.iter() {
        parent(environment, &mut findings);
    }
    if online {
        let ring = ring.flatten().filter(|_| free && !fresh);
        stores(resolved, ring, clock, &mut findings).await;
    }
    findings.0
}

struct Findings(Vec<Finding>);

impl Findings {
    fn say(&mut self, level: Level, place: &str, said: impl Into<String>) {
        self.0.push(Finding { level, place: place.to_owned(), said: said.into() });
    }

    fn note(&mut self, place: &str, looked_at: Result<String, String>) {
        match looked_at {
            Ok(said) => self.say(Level::Fine, place, said),
            Err(said) => self.say(Level::Problem, place, said),
        }
    }

    fn keep<T>(&mut self, place: &str, looked_at: Result<(T, String), String>) -> Option<T> {
        let (kept, noted) = match looked_at {
            Ok((kept, said)) => (Some(kept), Ok(said)),
            Err(said) => (None, Err(said)),
        };
        self.note(place, noted);
        kept
    }
}

/// Whether anything is there, a link to nowhere included.
fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

fn directory(path: &Path, findings: &mut Findings) {
    let found = match is_there(path) {
        true => folder::check_private(path).map(|()| format!("{} is private", path.display())),
        false => {
            folder::can_make_in(path).map(|()| format!("{} does not exist and will be made", path.display()))
        }
    };
    findings.note("kv.directory", found.map_err(|error| error.to_string()));
    let keys = path.join("keys");
    if is_there(&keys)
        && let Err(error) = folder::check_private(&keys)
    {
        findings.say(Level::Problem, "kv.directory", error.to_string());
    }
}

/// Whether a broker could open the database, and none has it open.
fn database(path: &Path, fresh: bool, findings: &mut Findings) -> bool {
    let shown = path.display();
    let (level, said) = match embedded::is_taken(path) {
        Ok(false) if fresh => (Level::Fine, format!("{shown} does not exist and will be made")),
        Ok(false) => (Level::Fine, format!("{shown} is private, and no broker has it open")),
        Ok(true) => (Level::Warning, format!("{shown} {TAKEN}")),
        Err(error) => (Level::Problem, error.to_string()),
    };
    findings.say(level, "kv", said);
    level == Level::Fine
}

/// The ring, where there is a key already; what would be made at the first start is not made here.
fn root_key(
    resolved: &Resolved,
    fresh: bool,
    variable: ReadVariable<'_>,
    warnings: &mut Vec<String>,
) -> Result<(Option<Arc<KeyRing>>, String), String> {
    if fresh
        && let super::RootKeyChoice::File(path) = &resolved.root_key
        && !path.exists()
    {
        let said = format!("{} does not exist and will be made at the first start", path.display());
        return folder::can_make_in(path).map(|()| (None, said)).map_err(|error| error.to_string());
    }
    let loaded = root_keys::load(&resolved.root_key, &resolved.previous_root_keys, fresh, variable, warnings)
        .map_err(|error| error.to_string())?;
    let ring = loaded.ring;
    let said = format!("key {} can be used", ring.newest().id());
    Ok((Some(ring), said))
}

fn audit_key(resolved: &Resolved) -> Result<String, String> {
    let path = resolved.directory.join("keys/audit.key");
    let key = audit_keys::read(&path).map_err(|error| error.to_string())?;
    Ok(format!("signed with {}", key.verifying_key().to_hex()))
}

fn policies(resolved: &Resolved, clock: &SharedClock) -> Result<String, String> {
    let policies = Policies::load(resolved.policy.clone(), resolved.registry.clone(), Arc::clone(clock));
    let policies = policies.map_err(|error| error.to_string())?;
    let mut warnings = policies.warnings();
    warnings.extend(folder::open_to_others(&resolved.policy));
    match warnings.is_empty() {
        true => Ok(format!("{} policies are valid", policies.len())),
        false => Ok(format!("{} policies are valid; {}", policies.len(), warnings.join("; "))),
    }
}

fn peers(resolved: &Resolved) -> Result<String, String> {
    let named = resolved.peers.callers.len();
    PeerCredentials::new(resolved.peers.clone()).map(|_| format!("{named} callers are named"))
}

fn mtls(resolved: &Resolved) -> Result<String, String> {
    let named = resolved.mtls.callers.len();
    Mtls::new(resolved.mtls.clone()).map(|_| format!("{named} callers are named"))
}

async fn doors(resolved: &Resolved, clock: &SharedClock, findings: &mut Findings) {
    let mut doors = Doors(Vec::new());
    for listen in &resolved.listen {
        match listen {
            Listen::Unix { path, .. } => findings.note("listen.unix", socket(path)),
            Listen::Tcp(address) => doors.open("listen.tcp", *address, findings).await,
            Listen::Tls(settings) => {
                let tls = Tls::load(settings.clone(), Arc::clone(clock));
                let tls = tls.map_err(|error| error.to_string()).map(|tls| expiries(&tls));
                findings.note("listen.tls", tls);
                doors.open("listen.tls.address", settings.address, findings).await;
            }
        }
    }
    if let Some(admin) = resolved.admin {
        doors.open("listen.admin", admin, findings).await;
    }
}

/// What was opened so far, and is held open, so that a door which would stand in the way of another is found.
struct Doors(Vec<Door>);

struct Door {
    place: &'static str,
    address: SocketAddr,
    _held: Option<TcpListener>,
}

impl Doors {
    /// Whether an address can be listened on. One that is taken by none of these may well be taken by the broker that
    /// runs.
    async fn open(&mut self, place: &'static str, address: SocketAddr, findings: &mut Findings) {
        let opened = TcpListener::bind(address).await;
        let (level, said) = match (&opened, self.in_the_way_of(address)) {
            (Ok(_), _) => (Level::Fine, format!("{address} is free")),
            (Err(error), Some(other)) if error.kind() == ErrorKind::AddrInUse => {
                let Door { place, address: taken, .. } = other;
                let said = format!("{address} is taken by {place} ({taken}); give one of them another port");
                (Level::Problem, said)
            }
            (Err(error), None) if error.kind() == ErrorKind::AddrInUse => {
                (Level::Warning, format!("{address} is in use; by the broker that runs?"))
            }
            (Err(error), _) => (Level::Problem, format!("{address} can't be listened on: {error}")),
        };
        findings.say(level, place, said);
        self.0.push(Door { place, address, _held: opened.ok() });
    }

    fn in_the_way_of(&self, address: SocketAddr) -> Option<&Door> {
        self.0.iter().find(|door| overlap(door.address, address))
    }
}

/// Whether only one of them can be listened on: `0.0.0.0` is every IPv4 address, `[::]` is every address. Port 0 is
/// whichever is free.
fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let holds = |wide: SocketAddr, narrow: SocketAddr| {
        wide.ip() == narrow.ip() || wide.ip().is_unspecified() && (wide.is_ipv6() || narrow.is_ipv4())
    };
    one.port() == other.port() && one.port() != 0 && (holds(one, other) || holds(other, one))
}

fn expiries(tls: &Tls) -> String {
    let expiries = tls.expiries();
    let said: Vec<String> =
        expiries.iter().map(|(what, until)| format!("{what} is good until {until}")).collect();
    said.join(", ")
}

fn socket(path: &Path) -> Result<String, String> {
    let shown = path.display();
    if !path.is_absolute() {
        return Err(format!("{shown} is not absolute; write the whole path"));
    }
    let length = path.as_os_str().len();
    if length > LONGEST_SOCKET {
        return Err(format!(
            "{shown} is {length} bytes long, and a socket's path has {LONGEST_SOCKET} at most; choose a shorter one"
        ));
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            Err(format!("{shown} exists and is not a socket; choose another path"))
        }
        Ok(_) => Ok(format!("{shown} is a socket; one that nobody answers at is replaced")),
        Err(_) => folder::can_make_in(path)
            .map(|()| format!("{shown} will be made"))
            .map_err(|error| error.to_string()),
    }
}

fn parent(environment: &Environment, findings: &mut Findings) {
    if environment.parent.is_some() {
        let place = format!("environments.{}.parent", environment.name);
        findings.say(Level::Warning, &place, "is kept, but nothing is inherited in this version");
    }
}

/// Asks the stores: the database where there is a ring for it, whichever environments there are, because what the
/// broker keeps of itself is in it too.
async fn stores(
    resolved: &Resolved,
    ring: Option<Arc<KeyRing>>,
    clock: &SharedClock,
    findings: &mut Findings,
) {
    if let Some(ring) = ring {
        match sealed(resolved, ring, clock).await {
            Ok(Some(said)) => findings.say(Level::Fine, "kv", said),
            Ok(None) => findings.say(Level::Warning, "kv", TAKEN),
            Err(said) => findings.say(Level::Problem, "kv", said),
        }
    }
    for environment in resolved.registry.iter() {
        if let StoreChoice::Aws(settings) = &environment.store {
            let place = format!("environments.{}", environment.name);
            findings.note(&place, aws(environment, settings, clock).await);
        }
    }
}

/// Whether the database opens, and is sealed under a key that is there. `None` where a broker has it.
async fn sealed(
    resolved: &Resolved,
    ring: Arc<KeyRing>,
    clock: &SharedClock,
) -> Result<Option<String>, String> {
    let kv = match Embedded::open(&resolved.directory.join("claviger.db"), Arc::clone(clock)).await {
        Err(KvError::Locked { .. }) => return Ok(None),
        opened => opened.map_err(|error| error.to_string())?,
    };
    let looked_at = database_and_log(resolved, Arc::new(kv.clone()), ring, clock).await;
    kv.close().await.map_err(|error| error.to_string())?;
    looked_at.map(Some)
}

/// Whether the database is under the key, and the audit log is what the database knows of it.
async fn database_and_log(
    resolved: &Resolved,
    kv: Arc<dyn Kv>,
    ring: Arc<KeyRing>,
    clock: &SharedClock,
) -> Result<String, String> {
    let opened = Sealed::open(Arc::clone(&kv), Arc::clone(&ring), Arc::clone(clock)).await;
    let changes = opened.map_err(|error| error.to_string())?.generation();
    let place =
        state::known_place(&kv, &ring, &resolved.instance).await.map_err(|error| error.to_string())?;
    let (log, keys) =
        (resolved.directory.join("audit"), audit_keys::public(&resolved.directory.join("keys")));
    let keys = keys.map_err(|error| error.to_string())?;
    let anchors: Vec<_> = place.into_iter().collect();
    let verified = tokio::task::spawn_blocking(move || audit::verify(&log, &keys, &anchors)).await;
    let report = verified.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
    match report.findings.first() {
        None => {
            Ok(format!("opens with the root key, has seen {changes} changes, and the audit log is whole"))
        }
        Some(finding) => Err(format!(
            "the audit log is not whole: {finding}; restore it, or start once with --accept-loss, on record"
        )),
    }
}

async fn aws(
    environment: &Environment,
    settings: &AwsSettings,
    clock: &SharedClock,
) -> Result<String, String> {
    let asked = async {
        let store = Aws::connect(environment.name.clone(), settings, Arc::clone(clock)).await;
        store
            .map_err(|error| error.to_string())?
            .ping(&environment.name)
            .await
            .map_err(|error| error.to_string())
    };
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(answered) => answered.map(|()| "AWS Secrets Manager answers".to_owned()),
        Err(_) => Err(format!("AWS Secrets Manager gave no answer within {} seconds", PATIENCE.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlapping(one: &str, other: &str) -> bool {
        let (one, other) = (one.parse().unwrap(), other.parse().unwrap());
        assert_eq!(overlap(one, other), overlap(other, one), "{one} {other}");
        overlap(one, other)
    }

    #[test]
    fn which_doors_stand_in_the_way_of_each_other() {
        for (one, other) in [
            ("127.0.0.1:7340", "127.0.0.1:7340"),
            ("0.0.0.0:7340", "127.0.0.1:7340"),
            ("[::]:7340", "127.0.0.1:7340"),
            ("[::]:7340", "[::1]:7340"),
            ("[::]:7340", "0.0.0.0:7340"),
        ] {
            assert!(overlapping(one, other), "{one} {other}");
        }
        for (one, other) in [
            ("127.0.0.1:7340", "127.0.0.1:7341"),
            ("127.0.0.1:7340", "127.0.0.2:7340"),
            ("0.0.0.0:7340", "[::1]:7340"),
            ("127.0.0.1:7340", "[::1]:7340"),
            ("0.0.0.0:0", "0.0.0.0:0"),
        ] {
            assert!(!overlapping(one, other), "{one} {other}");
        }
    }
}
