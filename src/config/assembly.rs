//! Puts a broker together: opens what a [`Resolved`] names, in an order in which each part's promises already hold
//! when the next one needs them.
//!
//! ```text
//! DIR ─▶ kv ─▶ root key ─▶ audit log (not older than kv's past) ─▶ policies ─▶ stores, cached ─▶ tokens ─▶ broker
//!                                                                                             ─▶ rotations ◀┘
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;
use zeroize::Zeroizing;

use super::audit_keys::{self, AuditKeyFiles};
use super::state::{self, AuditPlace, StateError};
use super::{Resolved, figures, folder, health, housekeeping, reload, root_keys};
use crate::audit::{self, Anchor, AuditError, Log};
use crate::broker::caches::Caches;
use crate::broker::consumers::Consumers;
use crate::broker::keys::Keys;
use crate::broker::watch::{Bounds, Feed};
use crate::broker::{Broker, BrokerError, Parts};
use crate::cache::{self, Cache};
use crate::clock::SharedClock;
use crate::crypto::{KeyError, KeyRing};
use crate::environment::{Environment, StoreChoice};
use crate::error::{Reason, Reasoned};
use crate::identity::mtls::Mtls;
use crate::identity::peer_credentials::PeerCredentials;
use crate::identity::token::{TokenError, Tokens};
use crate::identity::{Authenticator, Chain};
use crate::kv::embedded::Embedded;
use crate::kv::{Kv, KvError};
use crate::policy::{Policies, PolicyError, PolicySource};
use crate::rotation::engine::Engine;
use crate::rotation::ledger::Ledger;
use crate::rotation::scheduler::Scheduler;
use crate::rotation::service::Rotations;
use crate::secret::EnvironmentName;
use crate::server::admin::BoundAdmin;
use crate::server::health::Health;
use crate::server::limits::RateLimits;
use crate::server::tls::Tls;
use crate::server::{self, Bound, House, Places, ServerError, Workers};
use crate::store::aws::{Accounts, Aws, MOST_IN_BATCH};
use crate::store::coalesced::Coalesced;
use crate::store::guarded::Guarded;
use crate::store::sealed::Sealed;
use crate::store::{Store, StoreError};
use crate::telemetry::metrics::Metrics;

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
    /// A part of the end took too long; the process goes without it.
    #[error("{doing} takes too long, and the broker ends without it; the next start checks what is there")]
    Stuck {
        /// Which part.
        doing: String,
    },
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
            Self::Stuck { .. } => Reason::Unavailable,
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
    /// Its rotations.
    pub rotations: Arc<Rotations>,
    /// What is worth a look, a line each.
    pub warnings: Vec<String>,
    identity: Arc<Chain>,
    kv: Embedded,
    ring: Arc<KeyRing>,
    place: Arc<Mutex<AuditPlace>>,
    sealed: Arc<Sealed>,
    policy: PolicySource,
    metrics: Arc<Metrics>,
    clock: SharedClock,
    admin: Option<BoundAdmin>,
    scheduler: Option<Scheduler>,
    /// Says true when no rotation may begin any more, and those in progress stop at their next phase.
    stopping: watch::Sender<bool>,
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
        folder::make_private(directory)?;
        folder::make_private(&keys)?;
        let database = directory.join("claviger.db");
        let kv = open_kv(&database, &clock).await?;
        let fresh = kv.last_revision() == 0;
        let mut warnings = Vec::new();
        let shared: Arc<dyn Kv> = Arc::new(kv.clone());
        let previous = &resolved.previous_root_keys;
        let loaded = root_keys::load(&resolved.root_key, previous, fresh, variable, &mut warnings)?;
        let ring = Arc::clone(&loaded.ring);
        let state_key = state::key(shared.as_ref(), &ring).await.map_err(|error| loaded.explain(error))?;
        let sealed =
            Arc::new(Sealed::open(Arc::clone(&shared), Arc::clone(&ring), Arc::clone(&clock)).await?);
        let rotation = loaded.rotation(Arc::clone(&shared), Arc::clone(&sealed));
        warnings.extend(rotation.reminder().await?);
        let tokens =
            Arc::new(Tokens::open(Arc::clone(&shared), Arc::clone(&state_key), Arc::clone(&clock)).await?);
        let generation: Generation = {
            let (sealed, tokens) = (Arc::clone(&sealed), Arc::clone(&tokens));
            Arc::new(move || sealed.generation() + tokens.generation())
        };
        let mut place = AuditPlace::new(Arc::clone(&shared), Arc::clone(&state_key), &resolved.instance);
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
        warnings.extend(folder::open_to_others(&resolved.policy));
        warnings.extend(resolved.registry.iter().filter_map(|environment| not_inherited(environment)));
        let (stores, caches) = stores(resolved, &sealed, &clock).await?;
        let peers = PeerCredentials::new(resolved.peers.clone()).map_err(StartError::Config)?;
        let mtls = Mtls::new(resolved.mtls.clone()).map_err(StartError::Config)?;
        let chain: Vec<Arc<dyn Authenticator>> =
            vec![Arc::clone(&tokens) as _, Arc::new(mtls), Arc::new(peers)];
        let metrics = Arc::new(Metrics::new(server::grpc::methods()));
        let broker = Arc::new(Broker::new(Parts {
            registry: resolved.registry.clone(),
            policies: Arc::new(policies),
            stores,
            log,
            tokens,
            feed: Feed::new(Arc::clone(&shared), &resolved.registry, Arc::clone(&clock))
                .with_bounds(Bounds::of_watches(resolved.limits.watches_per_caller)),
            consumers: Consumers::new(Arc::clone(&shared), Arc::clone(&state_key), Arc::clone(&clock)),
            caches,
            keys: Keys::new(Arc::new(rotation), audit_keys),
            metrics: Arc::clone(&metrics),
            clock: Arc::clone(&clock),
        }));
        broker.record_policy_loaded("start").await?;
        let settings = resolved.rotation;
        let ledger = Ledger::new(shared, state_key, Arc::clone(&clock), &resolved.instance, settings.lease);
        if let Err(error) = ledger.reclaim().await {
            // Their leases end by themselves.
            warnings.push(format!("runs that were cut off wait for their leases to end: {error}"));
        }
        let (stopping, told) = watch::channel(false);
        let engine =
            Arc::new(Engine::new(Arc::clone(&broker), Arc::new(ledger), Arc::clone(&clock), settings, told));
        let rotations = Arc::new(Rotations::new(Arc::clone(&broker), engine));
        let scheduler = resolved.scheduler.then(|| Scheduler::new(&rotations));
        Ok(Self {
            broker,
            rotations,
            warnings,
            identity: Arc::new(Chain::new(chain)),
            kv,
            ring,
            place: Arc::new(Mutex::new(place)),
            sealed,
            policy: resolved.policy.clone(),
            metrics,
            clock,
            admin: None,
            scheduler,
            stopping,
        })
    }

    /// The same, with the HTTP door for probes and metrics.
    #[must_use]
    pub fn with_admin(self, admin: BoundAdmin) -> Self {
        Self { admin: Some(admin), ..self }
    }

    /// Serves until `shutdown` says true; then drains, signs the audit log off and closes the store.
    ///
    /// # Errors
    /// [`StartError`]; also where the end was not orderly.
    pub async fn serve(
        mut self,
        doors: Vec<Bound>,
        limits: server::Limits,
        shutdown: watch::Receiver<bool>,
    ) -> Result<(), StartError> {
        let _reloading = reload::on_change(Arc::clone(&self.broker), &self.policy, shutdown.clone())?;
        let tls: Vec<Arc<Tls>> = doors.iter().filter_map(|door| door.tls().cloned()).collect();
        let house = self.house(limits, &doors, shutdown.clone());
        // Until the very end: what calls began and did not wait for runs there.
        let workers = Workers::start(limits.workers).map_err(ServerError::Workers)?;
        // Nothing of this holds the end up: dropped, it ends.
        let mut beside = JoinSet::new();
        beside.spawn(Arc::clone(&house.health).keep());
        beside.spawn(self.housekeeping().keep(shutdown.clone()));
        for environment in
            self.broker.registry().iter().filter(|one| matches!(one.store, StoreChoice::Sealed))
        {
            beside.spawn(checked(Arc::clone(&self.sealed), environment.name.clone()));
        }
        if let Some(scheduler) = self.scheduler.take() {
            beside.spawn(scheduler.keep(shutdown.clone()));
        }
        let stopping = self.stopping.clone();
        let told = server::told(shutdown.clone());
        beside.spawn(async move {
            told.await;
            stopping.send_replace(true);
        });
        if let Some(admin) = self.admin.take() {
            let scrape = figures::scrape(&house, tls, Arc::clone(&self.ring));
            beside.spawn(admin.serve(Arc::clone(&house.health), scrape));
        }
        let served = server::serve(house, &workers, doors, shutdown).await;
        self.stopping.send_replace(true);
        let drained = within("bringing rotations to a phase's end", self.rotations.drained()).await;
        beside.shutdown().await;
        let stopped = self.stop().await;
        drop(workers);
        served?;
        drained?;
        stopped
    }

    fn house(&self, limits: server::Limits, doors: &[Bound], shutdown: watch::Receiver<bool>) -> House {
        let (broker, clock) = (&self.broker, &self.clock);
        let kv: Arc<dyn Kv> = Arc::new(self.kv.clone());
        let checks = health::checks((broker, &self.rotations), &kv, &self.ring, doors, clock);
        let server::Limits { per_principal, per_address, strangers, .. } = limits;
        House {
            broker: Arc::clone(broker),
            rotations: Arc::clone(&self.rotations),
            identity: Arc::clone(&self.identity),
            rates: Arc::new(RateLimits::new(per_principal, per_address, strangers, Arc::clone(clock))),
            places: Places::new(&limits),
            health: Health::new(checks, Arc::clone(clock), shutdown),
            metrics: Arc::clone(&self.metrics),
            clock: Arc::clone(clock),
            limits,
        }
    }

    fn housekeeping(&self) -> housekeeping::House {
        housekeeping::House {
            kv: self.kv.clone(),
            sealed: Arc::clone(&self.sealed),
            place: Arc::clone(&self.place),
            broker: Arc::clone(&self.broker),
        }
    }

    /// Signs the audit log off and closes the store.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn stop(&self) -> Result<(), StartError> {
        // First, and whatever else hangs: what was answered is vouched for.
        let signed_off = within("signing the audit log off", self.broker.log().close()).await;
        let closed = within("closing the store", self.close_store()).await;
        signed_off??;
        closed?
    }

    async fn close_store(&self) -> Result<(), StartError> {
        if let Err(error) = self.broker.keep_token_use().await {
            tracing::warn!(%error, "the last use of tokens could not be kept");
        }
        self.place.lock().await.keep(self.broker.log().last_checkpoint()).await?;
        Ok(self.kv.close().await?)
    }
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("broker", &self.broker).finish_non_exhaustive()
    }
}

/// Compares an environment's records with their root before the first caller has to wait for that.
async fn checked(sealed: Arc<Sealed>, environment: EnvironmentName) {
    if let Err(error) = sealed.check(&environment).await {
        tracing::error!(%environment, %error, "what is stored is not what was written");
    }
}

/// A part that does not come to its end must not keep the process.
async fn within<T>(doing: &str, ends: impl Future<Output = T>) -> Result<T, StartError> {
    const LONGEST: Duration = Duration::from_secs(4);
    let late = |_| StartError::Stuck { doing: doing.to_owned() };
    tokio::time::timeout(LONGEST, ends).await.map_err(late)
}

fn not_inherited(environment: &Environment) -> Option<String> {
    environment.parent.is_some().then(|| {
        format!("environments.{}.parent: is kept, but nothing is inherited in this version", environment.name)
    })
}

fn open_log(
    resolved: &Resolved,
    keys: &Path,
    expected: Option<Anchor>,
    generation: &Generation,
    clock: &SharedClock,
) -> Result<(Log, Arc<AuditKeyFiles>), StartError> {
    let mut settings = audit::Settings::new(resolved.directory.join("audit"), resolved.instance.clone());
    settings.retention = resolved.retention;
    settings.generation = Arc::clone(generation);
    settings.expected = expected;
    settings.accept_loss = resolved.accept_loss;
    audit_keys::open_log(keys, settings, Arc::clone(clock))
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

/// One cached store for each environment; the sealed ones share the store below.
async fn stores(
    resolved: &Resolved,
    sealed: &Arc<Sealed>,
    clock: &SharedClock,
) -> Result<(Guarded, Caches), StartError> {
    let mut stores: BTreeMap<EnvironmentName, Arc<dyn Store>> = BTreeMap::new();
    let mut caches = BTreeMap::new();
    let accounts = Accounts::new(Arc::clone(clock));
    for environment in resolved.registry.iter() {
        let below: Arc<dyn Store> = match &environment.store {
            StoreChoice::Sealed => Arc::clone(sealed) as _,
            StoreChoice::Aws(settings) => {
                let aws = Aws::connect(environment.name.clone(), settings, Arc::clone(clock)).await?;
                Arc::new(Coalesced::new(Arc::new(aws.sharing(&accounts)), MOST_IN_BATCH))
            }
        };
        let settings = cache::Settings::of(environment, resolved.cache_bytes);
        let cache = Cache::new(below, settings, Arc::clone(clock));
        stores.insert(environment.name.clone(), Arc::new(cache.clone()));
        caches.insert(environment.name.clone(), cache);
    }
    Ok((Guarded::new(stores), Caches::new(caches)))
}
