//! Puts a broker together: opens what a [`Resolved`] names, in an order in which each part's promises already hold
//! when the next one needs them.
//!
//! ```text
//! DIR ─▶ kv ─▶ root key ─▶ audit log (not older than kv's past) ─▶ policies ─▶ stores, cached ─▶ tokens ─▶ broker
//! ```

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, watch};
use zeroize::Zeroizing;

use super::state::{self, AuditPlace, StateError};
use super::{Resolved, RootKeyChoice, housekeeping, reload};
use crate::audit::{self, Anchor, AuditError, Log, SigningKey, VerifyingKey};
use crate::broker::{Broker, BrokerError, Parts};
use crate::cache::{self, Cache};
use crate::clock::SharedClock;
use crate::crypto::{KeyError, RootKey, RootKeySource, create_key_file, read_key_file};
use crate::environment::StoreChoice;
use crate::error::{Reason, Reasoned};
use crate::identity::peer_credentials::PeerCredentials;
use crate::identity::token::{TokenError, Tokens};
use crate::identity::{Authenticator, Chain};
use crate::kv::embedded::Embedded;
use crate::kv::{Kv, KvError};
use crate::policy::{Policies, PolicyError, PolicySource};
use crate::secret::EnvironmentName;
use crate::server::{self, Bound, ServerError};
use crate::store::aws::Aws;
use crate::store::guarded::Guarded;
use crate::store::sealed::Sealed;
use crate::store::{Store, StoreError};

/// Reads one variable of the process environment; the process's own is read at the edge and nowhere else.
pub type ReadVariable<'a> = &'a (dyn Fn(&str) -> Option<Zeroizing<String>> + Sync);

/// How many changes the stores have seen, by numbers that nobody else can make up.
type Generation = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Why a broker can't start. Nothing is served, and what was there is unchanged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A folder can't be used.
    #[error("{path}: {problem}")]
    Folder {
        /// The folder.
        path: String,
        /// What is wrong and the mend.
        problem: String,
    },
    /// The key-value store.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// The root key or the audit signing key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The root key is nowhere to be read from.
    #[error("{0}")]
    NoKey(String),
    /// The audit log.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The key-value store is older than what the audit log vouches for.
    #[error(
        "{path} has seen {found} changes, but the audit log vouches for {anchored}: it was brought back from the past; \
         restore the newer file, or start once with --accept-loss"
    )]
    RolledBack {
        /// The database.
        path: String,
        /// How many changes it has seen.
        found: u64,
        /// How many are on record.
        anchored: u64,
    },
    /// What the broker keeps of itself.
    #[error(transparent)]
    State(#[from] StateError),
    /// The policy set.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The tokens.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A table of the configuration.
    #[error("{0}")]
    Config(String),
    /// A door.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// What is done at the start did not go through.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

impl Reasoned for StartError {
    fn reason(&self) -> Reason {
        match self {
            Self::Folder { .. } | Self::Config(_) => Reason::InvalidConfig,
            Self::Kv(error) => error.reason(),
            Self::Key(error) => error.reason(),
            Self::NoKey(_) => Reason::InvalidKey,
            Self::Audit(error) => error.reason(),
            Self::RolledBack { .. } => Reason::Tampered,
            Self::State(error) => error.reason(),
            Self::Policy(error) => error.reason(),
            Self::Store(error) => error.reason(),
            Self::Token(error) => error.reason(),
            Self::Server(error) => error.reason(),
            Self::Broker(error) => error.reason(),
        }
    }
}

/// A broker with everything that it stands on, and its doors not yet open.
pub struct Running {
    /// The broker.
    pub broker: Arc<Broker>,
    /// What is worth a look, a line each.
    pub warnings: Vec<String>,
    identity: Arc<Chain>,
    kv: Embedded,
    place: Arc<Mutex<AuditPlace>>,
    sealed: Arc<Sealed>,
    policy: PolicySource,
}

impl Running {
    /// Opens everything that `resolved` names.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(
        resolved: &Resolved,
        variable: ReadVariable<'_>,
        clock: SharedClock,
    ) -> Result<Self, StartError> {
        let directory = &resolved.directory;
        let keys = directory.join("keys");
        private_folder(directory)?;
        private_folder(&keys)?;
        let database = directory.join("claviger.db");
        let kv = open_kv(&database, &clock).await?;
        let fresh = kv.last_revision() == 0;
        let mut warnings = Vec::new();
        let shared: Arc<dyn Kv> = Arc::new(kv.clone());
        let root = Arc::new(root_key(&resolved.root_key, fresh, variable, &mut warnings)?);
        let state_key = state::key(shared.as_ref(), &root).await?;
        let sealed = Arc::new(Sealed::open(Arc::clone(&shared), root, Arc::clone(&clock)).await?);
        let tokens =
            Arc::new(Tokens::open(Arc::clone(&shared), Arc::clone(&state_key), Arc::clone(&clock)).await?);
        let generation: Generation = {
            let (sealed, tokens) = (Arc::clone(&sealed), Arc::clone(&tokens));
            Arc::new(move || sealed.generation() + tokens.generation())
        };
        let mut place = AuditPlace::new(Arc::clone(&shared), state_key, &resolved.instance);
        let expected = match place.read().await {
            // The place is kept before the first change is made: a store with changes and no place lost it.
            Ok(None) if generation() > 0 && !resolved.accept_loss => return Err(StateError::Tampered.into()),
            Err(StateError::Tampered) if resolved.accept_loss => None,
            read => read?,
        };
        let (log, audit_keys) = open_log(resolved, &keys, expected, &generation, &clock)?;
        let (found, anchored) = (generation(), log.anchored_generation());
        if anchored > found && !resolved.accept_loss {
            return Err(StartError::RolledBack { path: database.display().to_string(), found, anchored });
        }
        place.keep(log.last_checkpoint()).await?;
        let policies =
            Policies::load(resolved.policy.clone(), resolved.registry.clone(), Arc::clone(&clock))?;
        warnings.extend(policies.warnings());
        warnings.extend(resolved.registry.iter().filter(|environment| environment.parent.is_some()).map(
            |environment| {
                format!(
                    "environments.{}.parent: is kept, but nothing is inherited in this version",
                    environment.name
                )
            },
        ));
        let stores = stores(resolved, &sealed, &clock).await?;
        let peers = PeerCredentials::new(resolved.peers.clone()).map_err(StartError::Config)?;
        let chain: Vec<Arc<dyn Authenticator>> = vec![Arc::clone(&tokens) as _, Arc::new(peers)];
        let broker = Arc::new(Broker::new(Parts {
            registry: resolved.registry.clone(),
            policies: Arc::new(policies),
            stores,
            log,
            audit_keys,
            tokens,
            clock,
        }));
        broker.record_policy_loaded("start").await?;
        Ok(Self {
            broker,
            warnings,
            identity: Arc::new(Chain::new(chain)),
            kv,
            place: Arc::new(Mutex::new(place)),
            sealed,
            policy: resolved.policy.clone(),
        })
    }

    /// Serves until `shutdown` says true; then drains, signs the audit log off and closes the store.
    ///
    /// # Errors
    /// [`StartError`]; also where the end was not orderly.
    pub async fn serve(
        self,
        doors: Vec<Bound>,
        limits: server::Limits,
        shutdown: watch::Receiver<bool>,
    ) -> Result<(), StartError> {
        let _reloading = reload::on_change(Arc::clone(&self.broker), &self.policy, shutdown.clone())?;
        let house = housekeeping::House {
            kv: self.kv.clone(),
            sealed: Arc::clone(&self.sealed),
            place: Arc::clone(&self.place),
            broker: Arc::clone(&self.broker),
        };
        let kept = tokio::spawn(house.keep(shutdown.clone()));
        let served =
            server::serve(Arc::clone(&self.broker), Arc::clone(&self.identity), doors, limits, shutdown)
                .await;
        kept.abort();
        let stopped = self.stop().await;
        served?;
        stopped
    }

    /// Signs the audit log off and closes the store.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn stop(&self) -> Result<(), StartError> {
        let signed_off = self.broker.log().close().await;
        self.place.lock().await.keep(self.broker.log().last_checkpoint()).await?;
        self.kv.close().await?;
        Ok(signed_off?)
    }
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("broker", &self.broker).finish_non_exhaustive()
    }
}

/// A folder for this user alone: made where it is missing, refused where others may write into it.
fn private_folder(path: &Path) -> Result<(), StartError> {
    let refuse = |problem: String| StartError::Folder { path: path.display().to_string(), problem };
    match DirBuilder::new().mode(0o700).recursive(false).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(refuse(error.to_string())),
        _ => {}
    }
    let found = std::fs::symlink_metadata(path).map_err(|error| refuse(error.to_string()))?;
    if !found.is_dir() {
        return Err(refuse("is not a folder, or a link to one; name the folder itself".to_owned()));
    }
    let ours = rustix::process::geteuid().as_raw();
    if found.uid() != ours {
        return Err(refuse(format!(
            "belongs to uid {}, and this process is uid {ours}; run `chown` on it",
            found.uid()
        )));
    }
    if found.mode() & 0o077 != 0 {
        let mode = found.mode() & 0o7777;
        return Err(refuse(format!("mode {mode:04o} lets others in; run `chmod 0700` on it")));
    }
    Ok(())
}

/// The log, and the keys that its checkpoints are verified with. The signing key is made with the first log and
/// never again: a log without its key is refused, not signed by a new one.
fn open_log(
    resolved: &Resolved,
    keys: &Path,
    expected: Option<Anchor>,
    generation: &Generation,
    clock: &SharedClock,
) -> Result<(Log, Vec<VerifyingKey>), StartError> {
    let folder = resolved.directory.join("audit");
    let path = keys.join("audit.key");
    if !path.exists() && expected.is_none() && !folder.join(&resolved.instance).exists() {
        create_key_file(&path, &SigningKey::generate_pkcs8()?)?;
    }
    let key = SigningKey::from_pkcs8(&read_key_file(&path, 1_024)?)?;
    let public = key.verifying_key();
    publish(&keys.join("audit.pub"), &public)?;
    let mut settings = audit::Settings::new(folder, resolved.instance.clone());
    settings.retention = resolved.retention;
    settings.generation = Arc::clone(generation);
    settings.expected = expected;
    settings.accept_loss = resolved.accept_loss;
    Ok((Log::open(settings, key, Arc::clone(clock))?, vec![public]))
}

/// The public half, for whoever verifies the log elsewhere. One that is there is never overwritten: it is what old
/// checkpoints are verified with.
fn publish(path: &Path, key: &VerifyingKey) -> Result<(), StartError> {
    let refuse = |problem: String| StartError::Folder { path: path.display().to_string(), problem };
    match std::fs::read_to_string(path) {
        Ok(found) if found.trim() == key.to_hex() => Ok(()),
        Ok(_) => Err(refuse(
            "is not the public half of audit.key beside it; put the right audit.key back".to_owned(),
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::write(path, format!("{}\n", key.to_hex())).map_err(|error| refuse(error.to_string()))
        }
        Err(error) => Err(refuse(error.to_string())),
    }
}

/// Opens the database. A process that was just killed lets go of it a moment after it is gone, so one that is in use is
/// tried again for a while.
async fn open_kv(path: &Path, clock: &SharedClock) -> Result<Embedded, KvError> {
    const EVERY: Duration = Duration::from_millis(100);
    let mut tries = tokio::time::interval(EVERY);
    for _ in 0..20 {
        tries.tick().await;
        match Embedded::open(path, Arc::clone(clock)).await {
            Err(KvError::Locked { .. }) => {}
            opened => return opened,
        }
    }
    Embedded::open(path, Arc::clone(clock)).await
}

fn root_key(
    choice: &RootKeyChoice,
    fresh: bool,
    variable: ReadVariable<'_>,
    warnings: &mut Vec<String>,
) -> Result<RootKey, StartError> {
    let source = match choice {
        RootKeyChoice::File(path) => {
            // Made only for a store that holds nothing yet: a new key for old data would lock everyone out.
            if fresh && !path.exists() {
                RootKey::generate()?.create_file(path)?;
                warnings.push(format!(
                    "made a new root key in {}; keep a copy elsewhere, without it every sealed value is lost",
                    path.display()
                ));
            }
            RootKeySource::File(path.clone())
        }
        RootKeyChoice::SystemdCredential(name) => {
            let missing = || {
                StartError::NoKey("CREDENTIALS_DIRECTORY is not set; start under systemd with LoadCredential=, or set root_key.file".to_owned())
            };
            let directory = PathBuf::from(variable("CREDENTIALS_DIRECTORY").ok_or_else(missing)?.as_str());
            RootKeySource::SystemdCredential { directory, name: name.clone() }
        }
        RootKeyChoice::Environment(name) => {
            let missing = || {
                StartError::NoKey(format!(
                    "environment variable `{}` is not set; set it to 64 hex digits",
                    name.escape_default()
                ))
            };
            RootKeySource::EnvironmentValue { name: name.clone(), value: variable(name).ok_or_else(missing)? }
        }
    };
    let (key, warning) = RootKey::load(&source)?;
    warnings.extend(warning);
    warnings.extend(key.shortfalls().iter().cloned());
    Ok(key)
}

/// One cached store for each environment; the sealed ones share the store below.
async fn stores(
    resolved: &Resolved,
    sealed: &Arc<Sealed>,
    clock: &SharedClock,
) -> Result<Guarded, StartError> {
    let mut stores: BTreeMap<EnvironmentName, Arc<dyn Store>> = BTreeMap::new();
    for environment in resolved.registry.iter() {
        let below: Arc<dyn Store> = match &environment.store {
            StoreChoice::Sealed => Arc::clone(sealed) as _,
            StoreChoice::Aws(settings) => {
                Arc::new(Aws::connect(environment.name.clone(), settings, Arc::clone(clock)).await?)
            }
        };
        let settings = cache::Settings {
            ttl: environment.ttl,
            negative_ttl: environment.negative_ttl,
            stale_for: environment.stale_for,
            capacity_bytes: resolved.cache_bytes,
        };
        stores.insert(environment.name.clone(), Arc::new(Cache::new(below, settings, Arc::clone(clock))));
    }
    Ok(Guarded::new(stores))
}
