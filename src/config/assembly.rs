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

use tokio::sync::watch;
use zeroize::Zeroizing;

use super::{Resolved, RootKeyChoice, housekeeping, reload};
use crate::audit::{self, AuditError, Log, SigningKey, VerifyingKey};
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
        "{path} is at revision {found}, but the audit log has seen revision {anchored}: it was brought back from the past; restore the newer file, or move the audit folder away to accept the loss"
    )]
    RolledBack {
        /// The database.
        path: String,
        /// Its revision.
        found: u64,
        /// The revision on record.
        anchored: u64,
    },
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
        let kv = Embedded::open(&database, Arc::clone(&clock)).await?;
        let fresh = kv.last_revision() == 0;
        let mut warnings = Vec::new();
        let (log, audit_keys) = open_log(resolved, &keys, &kv, &clock)?;
        if log.anchored_kv_revision() > kv.last_revision() {
            return Err(StartError::RolledBack {
                path: database.display().to_string(),
                found: kv.last_revision(),
                anchored: log.anchored_kv_revision(),
            });
        }
        let policies =
            Policies::load(resolved.policy.clone(), resolved.registry.clone(), Arc::clone(&clock))?;
        warnings.extend(policies.warnings());
        let shared: Arc<dyn Kv> = Arc::new(kv.clone());
        let root = root_key(&resolved.root_key, fresh, variable, &mut warnings)?;
        let sealed = Arc::new(Sealed::open(Arc::clone(&shared), Arc::new(root), Arc::clone(&clock)).await?);
        let stores = stores(resolved, &sealed, &clock).await?;
        let tokens = Arc::new(Tokens::open(Arc::clone(&shared), Arc::clone(&clock)).await?);
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
        let registry = self.broker.registry().clone();
        let kept = tokio::spawn(housekeeping::run(
            self.kv.clone(),
            Arc::clone(&self.sealed),
            registry,
            shutdown.clone(),
        ));
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
    let found = std::fs::metadata(path).map_err(|error| refuse(error.to_string()))?;
    if !found.is_dir() {
        return Err(refuse("is not a folder".to_owned()));
    }
    if found.mode() & 0o022 != 0 {
        return Err(refuse(format!(
            "mode {:04o} lets others write; run `chmod go-w` on it",
            found.mode() & 0o7777
        )));
    }
    Ok(())
}

/// The log, and the keys that its checkpoints are verified with. The signing key is made with the first log and
/// never again: a log without its key is refused, not signed by a new one.
fn open_log(
    resolved: &Resolved,
    keys: &Path,
    kv: &Embedded,
    clock: &SharedClock,
) -> Result<(Log, Vec<VerifyingKey>), StartError> {
    let folder = resolved.directory.join("audit");
    let path = keys.join("audit.key");
    if !path.exists() && !folder.join(&resolved.instance).exists() {
        create_key_file(&path, &SigningKey::generate_pkcs8()?)?;
    }
    let key = SigningKey::from_pkcs8(&read_key_file(&path, 1_024)?)?;
    let public = key.verifying_key();
    publish(&keys.join("audit.pub"), &public)?;
    let revision = kv.clone();
    let mut settings = audit::Settings::new(folder, resolved.instance.clone());
    settings.retention = resolved.retention;
    settings.kv_revision = Arc::new(move || revision.last_revision());
    Ok((Log::open(settings, key, Arc::clone(clock))?, vec![public]))
}

/// The public half, for whoever verifies the log elsewhere.
fn publish(path: &Path, key: &VerifyingKey) -> Result<(), StartError> {
    let text = format!("{}\n", key.to_hex());
    if std::fs::read_to_string(path).is_ok_and(|found| found == text) {
        return Ok(());
    }
    std::fs::write(path, text)
        .map_err(|error| StartError::Folder { path: path.display().to_string(), problem: error.to_string() })
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
