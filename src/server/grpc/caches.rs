//! `CacheService`.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::secrets::{Said, answer};
use super::{Changes, convert};
use crate::broker::Broker;
use crate::broker::caches::Told;
use crate::proto::v1::{self, cache_service_server::CacheService};
use crate::secret::EnvironmentName;

/// The service.
pub(super) struct CacheAdministration {
    broker: Arc<Broker>,
    changes: Changes,
}

impl CacheAdministration {
    pub(super) const fn new(broker: Arc<Broker>, changes: Changes) -> Self {
        Self { broker, changes }
    }
}

#[tonic::async_trait]
impl CacheService for CacheAdministration {
    async fn purge_cache(
        &self,
        request: Request<v1::PurgeCacheRequest>,
    ) -> Result<Response<v1::PurgeCacheResponse>, Status> {
        answer(
            &self.broker,
            request,
            "purge_cache",
            |q| Said { reason: &q.reason, environment: &q.environment, name: &q.name },
            |call, q| {
                let what = convert::resource(&q.environment, &q.name)?;
                let broker = Arc::clone(&self.broker);
                Ok(self.changes.run(async move {
                    let entries = broker.purge_cache(&call, &what).await?;
                    Ok(v1::PurgeCacheResponse { entries })
                }))
            },
        )
        .await
    }

    async fn get_cache_statistics(
        &self,
        request: Request<v1::GetCacheStatisticsRequest>,
    ) -> Result<Response<v1::GetCacheStatisticsResponse>, Status> {
        answer(
            &self.broker,
            request,
            "cache_statistics",
            |q| Said { reason: &q.reason, ..Said::default() },
            |call, _| {
                Ok(async move {
                    let caches = self.broker.cache_statistics(&call).await?;
                    let caches = caches.into_iter().map(described).collect();
                    Ok(v1::GetCacheStatisticsResponse { caches })
                })
            },
        )
        .await
    }
}

fn described((environment, told): (EnvironmentName, Told)) -> v1::CacheStatistics {
    let Told { stats, most_asked } = told;
    let asked = most_asked.secrets.into_iter();
    v1::CacheStatistics {
        environment: environment.to_string(),
        hits: stats.hits,
        misses: stats.misses,
        stale: stats.stale,
        negative_hits: stats.negative_hits,
        refreshes_ahead: stats.refreshes_ahead,
        upstream_calls: stats.upstream_calls,
        upstream_errors: stats.upstream_errors,
        entries: stats.entries,
        bytes: stats.bytes,
        upstream_secrets: stats.upstream_secrets,
        coalesced: stats.coalesced,
        quota_waits: stats.quota_waits,
        quota_refusals: stats.quota_refusals,
        most_asked: asked.map(|(id, calls)| v1::AskedSecret { name: id.name.to_string(), calls }).collect(),
        others_asked: most_asked.others,
    }
}
