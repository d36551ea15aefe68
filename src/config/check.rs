//! Looks at everything that a configuration names, and changes nothing: what a start would trip over is found before
//! the start, all of it at once.
//!
//! The embedded store is only opened with `online`, and only where no broker has it open.

use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::assembly::{ReadVariable, StartError};
use super::{Resolved, folder, root_keys};
use crate::audit::SigningKey;
use crate::clock::SharedClock;
use crate::crypto::{KeyRing, read_key_file};
use crate::environment::{AwsSettings, Environment, StoreChoice};
use crate::identity::mtls::Mtls;
use crate::identity::peer_credentials::PeerCredentials;
use crate::kv::embedded::Embedded;
use crate::kv::{Kv, KvError};
use crate::policy::Policies;
use crate::server::Listen;
use crate::server::tls::Tls;
use crate::store::Store as _;
use crate::store::aws::Aws;
use crate::store::sealed::Sealed;

/// How long a store may take to answer.
const PATIENCE: Duration = Duration::from_secs(15);

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

/// Looks at everything; with `online` also asks the stores.
pub async fn check(
    resolved: &Resolved,
    variable: ReadVariable<'_>,
    online: bool,
    clock: &SharedClock,
) -> Vec<Finding> {
    let mut findings = Findings(Vec::new());
    let fresh = !resolved.directory.join("claviger.db").exists();
    directory(resolved, &mut findings);
    let ring = findings.keep("root_key", root_key(resolved, fresh, variable, &mut Vec::new()));
    if !fresh {
        findings.note("audit", audit_key(resolved));
    }
    findings.note("policy.directory", policies(resolved, clock));
    findings.note("identity.peer_credentials", peers(resolved));
    findings.note("identity.mtls", mtls(resolved));
    for listen in &resolved.listen {
        listener(listen, clock, &mut findings).await;
    }
    if let Some(admin) = resolved.admin {
        findings.address("listen.admin", admin).await;
    }
    for environment in resolved.registry.iter() {
        parent(environment, &mut findings);
    }
    if online {
        stores(resolved, ring.flatten(), fresh, clock, &mut findings).await;
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

    /// Whether an address can be listened on. One that is taken may well be taken by the broker that runs.
    async fn address(&mut self, place: &str, address: std::net::SocketAddr) {
        match tokio::net::TcpListener::bind(address).await {
            Ok(_) => self.say(Level::Fine, place, format!("{address} is free")),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                self.say(Level::Warning, place, format!("{address} is in use; by the broker that runs?"));
            }
            Err(error) => self.say(Level::Problem, place, format!("{address} can't be listened on: {error}")),
        }
    }
}

fn directory(resolved: &Resolved, findings: &mut Findings) {
    let path = &resolved.directory;
    let found = match path.exists() {
        true => folder::check_private(path).map(|()| format!("{} is private", path.display())),
        false if path.parent().is_some_and(Path::is_dir) => {
            Ok(format!("{} does not exist and will be made", path.display()))
        }
        false => {
            let problem = "does not exist, nor does the folder above it; make that first".to_owned();
            Err(StartError::Folder { path: path.display().to_string(), problem })
        }
    };
    findings.note("kv.directory", found.map_err(|error| error.to_string()));
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
        return Ok((None, said));
    }
    let loaded = root_keys::load(&resolved.root_key, &resolved.previous_root_keys, false, variable, warnings)
        .map_err(|error| error.to_string())?;
    let ring = loaded.ring;
    let said = format!("key {} can be used", ring.newest().id());
    Ok((Some(ring), said))
}

fn audit_key(resolved: &Resolved) -> Result<String, String> {
    let path = resolved.directory.join("keys/audit.key");
    let key = read_key_file(&path, 1_024).map_err(|error| error.to_string())?;
    let key = SigningKey::from_pkcs8(&key).map_err(|error| error.to_string())?;
    Ok(format!("signed with {}", key.verifying_key().to_hex()))
}

fn policies(resolved: &Resolved, clock: &SharedClock) -> Result<String, String> {
    let policies = Policies::load(resolved.policy.clone(), resolved.registry.clone(), Arc::clone(clock));
    let policies = policies.map_err(|error| error.to_string())?;
    let warnings = policies.warnings();
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

async fn listener(listen: &Listen, clock: &SharedClock, findings: &mut Findings) {
    match listen {
        Listen::Unix { path, .. } => findings.note("listen.unix", socket(path)),
        Listen::Tcp(address) => findings.address("listen.tcp", *address).await,
        Listen::Tls(settings) => {
            let tls = Tls::load(settings.clone(), Arc::clone(clock));
            let tls = tls.map_err(|error| error.to_string()).map(|tls| expiries(&tls));
            findings.note("listen.tls", tls);
            findings.address("listen.tls.address", settings.address).await;
        }
    }
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
    match (std::fs::symlink_metadata(path), path.parent().is_some_and(Path::is_dir)) {
        (Ok(found), _) if !found.file_type().is_socket() => {
            Err(format!("{shown} exists and is not a socket; choose another path"))
        }
        (Ok(_), _) => Ok(format!("{shown} is a socket; one that nobody answers at is replaced")),
        (Err(_), true) => Ok(format!("{shown} will be made")),
        (Err(_), false) => Err(format!("the folder of {shown} does not exist; make it first")),
    }
}

fn parent(environment: &Environment, findings: &mut Findings) {
    if environment.parent.is_some() {
        let place = format!("environments.{}.parent", environment.name);
        findings.say(Level::Warning, &place, "is kept, but nothing is inherited in this version");
    }
}

async fn stores(
    resolved: &Resolved,
    ring: Option<Arc<KeyRing>>,
    fresh: bool,
    clock: &SharedClock,
    findings: &mut Findings,
) {
    if resolved.registry.iter().any(|environment| environment.store == StoreChoice::Sealed) {
        let place = "kv";
        match (ring, fresh) {
            (_, true) => findings.say(Level::Fine, place, "holds nothing yet"),
            (None, false) => {}
            (Some(ring), false) => match sealed(resolved, ring, clock).await {
                Ok(Some(said)) => findings.say(Level::Fine, place, said),
                Ok(None) => {
                    findings.say(Level::Warning, place, "is open in a broker that runs; not looked at")
                }
                Err(said) => findings.say(Level::Problem, place, said),
            },
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
    let shared: Arc<dyn Kv> = Arc::new(kv.clone());
    let opened = Sealed::open(shared, ring, Arc::clone(clock)).await.map_err(|error| error.to_string());
    let closed = kv.close().await.map_err(|error| error.to_string());
    let changes = opened?.generation();
    closed?;
    Ok(Some(format!("opens with the root key, and has seen {changes} changes")))
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
