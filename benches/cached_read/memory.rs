//! What a cached secret takes beside its value: how much a process grows that caches many.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use claviger::cache::{Cache, Settings};
use claviger::clock::SystemClock;
use claviger::config::Resolved;
use claviger::secret::{
    EnvironmentName, Label, LabelMove, SecretId, SecretValue, Selector, Version, VersionId,
};
use claviger::store::{
    Description, Fetched, Freshness, ListPage, ListRequest, Order, Put, RecoveryWindow, Source, Store,
    StoreError, Written,
};
use jiff::Timestamp;

use crate::process::{Side, pin, resident_kib};
use crate::report::Report;
use crate::{VALUE, server};

/// How many secrets are cached.
const SECRETS: u64 = 10_000;
/// How many are cached before, so that code and allocator are in memory already.
const BEFORE: u64 = 200;

/// Measures in a process of its own, whose allocator has done nothing else.
pub(crate) fn measure(report: &mut Report) {
    let child = Command::new(std::env::current_exe().unwrap())
        .arg("--memory")
        .stderr(Stdio::inherit())
        .output()
        .expect("this program, once more");
    assert!(child.status.success(), "the process that caches secrets ended with {}", child.status);
    let grown: u64 = String::from_utf8_lossy(&child.stdout).trim().parse().expect("how much it grew");
    let beyond = (grown as f64 / SECRETS as f64) - VALUE as f64;
    report.figure("bytes_per_secret", beyond);
    let name = "memory per cached secret beyond its value";
    report.row([name, "–", &format!("{beyond:.0} B"), "–", "≤ 1024 B"]);
}

/// Caches the secrets, and says by how many bytes the process grew.
pub(crate) fn fill() {
    pin(Side::Server);
    // In a task, as requests are: on the thread that the cache's own tasks run on.
    server::runtime().block_on(async { tokio::spawn(cache_many()).await.unwrap() });
}

async fn cache_many() {
    let settings = Settings {
        ttl: Duration::from_secs(300),
        negative_ttl: Duration::from_secs(5),
        stale_for: Duration::from_secs(3_600),
        capacity_bytes: Resolved::CACHE_BYTES,
        answer_within: Settings::ANSWER_WITHIN,
        uncached: Vec::new(),
    };
    let cache = Cache::new(Arc::new(Endless), settings, SystemClock::shared());
    read(&cache, 0..BEFORE).await;
    let before = resident_kib(std::process::id());
    read(&cache, BEFORE..BEFORE + SECRETS).await;
    let after = resident_kib(std::process::id());
    println!("{}", after.saturating_sub(before) * 1024);
}

async fn read(cache: &Cache, numbers: std::ops::Range<u64>) {
    let end = numbers.end;
    for number in numbers {
        let id = SecretId::parse("production", &format!("payments/service-{number:05}/database")).unwrap();
        let fetched = cache.get(&id, &Selector::CURRENT, Freshness::Cached).await.unwrap();
        assert_eq!((fetched.value.len(), fetched.source), (VALUE, Source::Store));
    }
    assert_eq!(cache.stats().entries, end, "the cache holds them all");
}

/// A store of one environment that has every secret one asks for, and remembers none.
struct Endless;

#[async_trait]
impl Store for Endless {
    async fn get(&self, id: &SecretId, _: &Selector, _: Freshness) -> Result<Fetched, StoreError> {
        let (labels, created_at) = (vec![Label::Current], Timestamp::UNIX_EPOCH);
        Ok(Fetched {
            version: Version { id: VersionId::generate(), labels, created_at },
            value: SecretValue::text(format!("{:x<width$}", id.name.as_str(), width = VALUE))?,
            order: Order::Revision(1),
            source: Source::Store,
            age: Duration::ZERO,
            stale: false,
        })
    }

    async fn batch_get(
        &self,
        items: &[(SecretId, Selector)],
        freshness: Freshness,
    ) -> Vec<Result<Fetched, StoreError>> {
        let mut answers = Vec::with_capacity(items.len());
        for (id, selector) in items {
            answers.push(self.get(id, selector, freshness).await);
        }
        answers
    }

    async fn put(&self, _: &SecretId, _: Put) -> Result<Written, StoreError> {
        Err(only_read())
    }

    async fn describe(&self, _: &SecretId) -> Result<Description, StoreError> {
        Err(only_read())
    }

    async fn list(&self, _: &EnvironmentName, _: &ListRequest) -> Result<ListPage, StoreError> {
        Err(only_read())
    }

    async fn move_label(&self, _: &SecretId, _: &LabelMove) -> Result<Written, StoreError> {
        Err(only_read())
    }

    async fn delete(&self, _: &SecretId, _: RecoveryWindow) -> Result<Timestamp, StoreError> {
        Err(only_read())
    }

    async fn restore(&self, _: &SecretId) -> Result<(), StoreError> {
        Err(only_read())
    }

    async fn ping(&self, _: &EnvironmentName) -> Result<(), StoreError> {
        Ok(())
    }
}

fn only_read() -> StoreError {
    StoreError::Invalid("this store is only read".to_owned())
}
