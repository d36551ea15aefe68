//! What the broker remembers of its stores: figures, and how it is made to forget.

use std::collections::BTreeMap;

use super::{Broker, BrokerError, Call, record};
use crate::cache::{Cache, MostAsked, Stats};
use crate::environment::Durability;
use crate::policy::{Action, Resource};
use crate::secret::EnvironmentName;
use crate::store::{Store as _, StoreError};

/// How many secrets of each environment are named in what is told of its cache.
const NAMED: usize = 20;

/// What is told of one cache.
#[derive(Debug, Clone)]
pub struct Told {
    /// Its figures.
    pub stats: Stats,
    /// The secrets that its store was asked for most often, at most 20.
    pub most_asked: MostAsked,
}

/// The cache of each declared environment: the very one that its reads go through.
#[derive(Debug, Clone, Default)]
pub struct Caches(BTreeMap<EnvironmentName, Cache>);

impl Caches {
    /// These caches.
    #[must_use]
    pub const fn new(caches: BTreeMap<EnvironmentName, Cache>) -> Self {
        Self(caches)
    }

    /// What each has done and holds, in the order of the environments' names.
    #[must_use]
    pub fn statistics(&self) -> Vec<(EnvironmentName, Stats)> {
        self.0.iter().map(|(environment, cache)| (environment.clone(), cache.stats())).collect()
    }

    fn told(&self) -> Vec<(EnvironmentName, Told)> {
        let told = |cache: &Cache| Told { stats: cache.stats(), most_asked: cache.most_asked(NAMED) };
        self.0.iter().map(|(environment, cache)| (environment.clone(), told(cache))).collect()
    }

    /// Whether the store below answers at all.
    ///
    /// # Errors
    /// Why not; [`StoreError::NotOpened`] where the environment is not declared.
    pub async fn ping(&self, environment: &EnvironmentName) -> Result<(), StoreError> {
        let unknown = || StoreError::NotOpened(format!("environment `{environment}` is not declared"));
        self.0.get(environment).ok_or_else(unknown)?.ping(environment).await
    }

    /// Does the housekeeping that is due in each; meant for every second or so.
    pub fn tidy(&self) {
        self.0.values().for_each(Cache::tidy);
    }

    /// Forgets `what`; of an environment that has no cache there is nothing.
    fn purge(&self, what: &Resource) -> u64 {
        let of = |environment: &EnvironmentName| self.0.get(environment);
        match what {
            Resource::Broker => self.0.values().map(|cache| cache.purge(None)).sum(),
            Resource::Environment(environment) => of(environment).map_or(0, |cache| cache.purge(None)),
            Resource::Secret(id) => of(&id.environment).map_or(0, |cache| cache.purge(Some(id))),
        }
    }
}

impl Broker {
    /// The caches.
    #[must_use]
    pub const fn caches(&self) -> &Caches {
        &self.parts.caches
    }

    /// Forgets one secret, all of an environment, or everything (`what` is the broker), so that the next read asks the
    /// store. How many secrets were in memory.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Administer`] on the broker.
    pub async fn purge_cache(&self, call: &Call, what: &Resource) -> Result<u64, BrokerError> {
        const OPERATION: &str = "purge_cache";
        let grant = self.authorize(call, OPERATION, Action::Administer, &Resource::Broker).await?;
        let environment = what.environment().map_or("", EnvironmentName::as_str);
        let name = match what {
            Resource::Secret(id) => id.name.as_str(),
            Resource::Environment(_) | Resource::Broker => "",
        };
        let record = record::of_grant(call, OPERATION, &grant).about(environment, name);
        self.append(record.clone().intent(), Durability::Durable).await?;
        let declared = what.environment().map_or(Ok(()), |name| self.parts.registry.get(name).map(|_| ()));
        let purged = declared.map(|()| self.parts.caches.purge(what)).map_err(BrokerError::from);
        self.released(&grant, record, purged, |entries, record| {
            record.done().with_detail(format!("{entries} secrets were in memory"))
        })
        .await
    }

    /// How each environment's cache does, in the order of the environments' names.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Administer`] on the broker.
    pub async fn cache_statistics(&self, call: &Call) -> Result<Vec<(EnvironmentName, Told)>, BrokerError> {
        const OPERATION: &str = "cache_statistics";
        let grant = self.authorize(call, OPERATION, Action::Administer, &Resource::Broker).await?;
        self.finished(call, OPERATION, &grant, Ok(self.parts.caches.told())).await
    }
}
