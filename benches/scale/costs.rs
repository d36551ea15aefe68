//! What a broker's answers cost at one size.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use claviger::broker::{BatchRequest, Call, MAX_BATCH, Read};
use claviger::config::assembly::Running;
use claviger::identity::{Principal, PrincipalKind, Proof, SourceAddress};
use claviger::secret::{EnvironmentName, Selector};
use claviger::store::{Freshness, ListRequest, Source};
use tokio::task::JoinSet;

use crate::Figure;
use crate::place::{ENVIRONMENT, Place, READERS, id};
use crate::process::{megabytes, resident_kib};

/// How many read at once.
const AT_ONCE: usize = 64;
/// How often each page and each description is asked for.
const QUESTIONS: usize = 501;
/// How many names a page has.
const PAGE: usize = 100;
/// From how many secrets on the growth of the process says something about one of them.
const WEIGHED: usize = 1_000;

pub(crate) fn measure(place: &Place, size: usize, rows: &[&str], window: Duration) -> Vec<Figure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let costs = Costs::start(place, size, window).await;
        let mut figures = vec![costs.first_use().await];
        if rows.contains(&"reads") || rows.contains(&"memory") {
            let weights = costs.cache_all().await;
            figures.extend(weights.into_iter().filter(|_| rows.contains(&"memory") && size >= WEIGHED));
        }
        if rows.contains(&"reads") {
            figures.extend(costs.reads("from the cache", Freshness::Cached, Source::Cache).await);
            figures.extend(costs.reads("from the store", Freshness::Refresh, Source::Store).await);
        }
        if rows.contains(&"pages") {
            figures.extend(costs.pages().await);
        }
        costs.running.stop().await.unwrap_or_else(|error| panic!("{error}"));
        figures
    })
}

/// A broker, and who asks it.
struct Costs {
    running: Running,
    call: Call,
    environment: EnvironmentName,
    size: usize,
    window: Duration,
    /// How many reads there were. They go on from one row to the next, so that none finds what the one before it left.
    reads: Arc<AtomicUsize>,
}

impl Costs {
    async fn start(place: &Place, size: usize, window: Duration) -> Self {
        let principal = Principal::new(
            PrincipalKind::User,
            "reader",
            BTreeSet::from([READERS.to_owned()]),
            BTreeMap::new(),
            Proof { method: "token", detail: String::new() },
        );
        let call = Call {
            principal: Arc::new(principal),
            source_address: SourceAddress::Internal,
            request_id: "11111111-1111-4111-8111-111111111111".into(),
            reason: None,
        };
        let environment = ENVIRONMENT.parse().unwrap();
        Self { running: place.start().await, call, environment, size, window, reads: Arc::default() }
    }

    /// The first use of an environment after a start has all of its records compared with what they add up to.
    async fn first_use(&self) -> Figure {
        let begun = Instant::now();
        self.describe(0).await;
        let took = begun.elapsed().as_secs_f64() * 1e3;
        Figure::new("the first use of an environment after a start", took, "ms")
    }

    /// Has the broker cache every secret; how that makes it grow.
    async fn cache_all(&self) -> [Figure; 2] {
        let before = resident_kib(std::process::id());
        for first in (0..self.size).step_by(MAX_BATCH) {
            let items = (first..self.size.min(first + MAX_BATCH)).map(|number| Ok(read(number))).collect();
            let batch = self.running.broker.batch(&self.call, BatchRequest::Items(items), Freshness::Cached);
            for answer in batch.await.unwrap_or_else(|error| panic!("{error}")) {
                answer.unwrap_or_else(|error| panic!("{error}"));
            }
        }
        let cached = self.running.broker.caches().statistics();
        let cached: u64 = cached.iter().map(|(_, statistics)| statistics.entries).sum();
        assert_eq!(usize::try_from(cached), Ok(self.size), "all of them are cached");
        let after = resident_kib(std::process::id());
        let each = after.saturating_sub(before) as f64 * 1024.0 / self.size as f64;
        [
            Figure::new("memory for each cached secret, value and all else that is kept of it", each, "B"),
            Figure::new("memory of the broker with all of them cached", megabytes(after), "MB"),
        ]
    }

    /// Reads in an order that has nothing to do with that of the names.
    async fn reads(&self, from: &str, freshness: Freshness, source: Source) -> [Figure; 2] {
        self.read_for(self.window / 4, freshness, source).await;
        let (first, begun, cpu) = (self.reads.load(Relaxed), Instant::now(), own_cpu());
        self.read_for(self.window, freshness, source).await;
        let (took, cpu) = (begun.elapsed(), own_cpu() - cpu);
        let count = (self.reads.load(Relaxed) - first) as f64;
        let each = |time: Duration| time.as_secs_f64() * 1e6 / count;
        [
            Figure::new(&format!("a read {from}, {AT_ONCE} at once"), each(took), "µs"),
            Figure::new(&format!("a read {from}, processor time"), each(cpu), "µs"),
        ]
    }

    async fn read_for(&self, window: Duration, freshness: Freshness, source: Source) {
        let begun = Instant::now();
        let mut tasks = JoinSet::new();
        for _ in 0..AT_ONCE {
            let (broker, call) = (Arc::clone(&self.running.broker), self.call.clone());
            let (reads, size) = (Arc::clone(&self.reads), self.size);
            tasks.spawn(async move {
                while begun.elapsed() < window {
                    // Each of them once before any again: 7,919 is prime, and divides no size.
                    let number = reads.fetch_add(1, Relaxed) * 7_919 % size;
                    let answer = broker.get(&call, read(number), freshness).await;
                    let disclosed = answer.unwrap_or_else(|error| panic!("{error}"));
                    assert_eq!(disclosed.source, source);
                }
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap();
        }
    }

    /// One after the other: the first names and the last, the first secret and the last.
    async fn pages(&self) -> [Figure; 4] {
        let before_the_last = self.size.checked_sub(PAGE + 1);
        let list = |which: &str| format!("a page of {PAGE} names, the {which}");
        [
            Figure::new(&list("first"), self.page(None).await, "µs"),
            Figure::new(&list("last"), self.page(before_the_last).await, "µs"),
            Figure::new("a description, the first", self.description(0).await, "µs"),
            Figure::new("a description, the last", self.description(self.size - 1).await, "µs"),
        ]
    }

    /// The median of how long the page takes that follows this secret; `None`: the first page.
    async fn page(&self, after: Option<usize>) -> f64 {
        let page_token = after.map(|number| id(number).name.to_string());
        let request = ListRequest { page_token, limit: PAGE, ..ListRequest::default() };
        let mut times = Vec::with_capacity(QUESTIONS);
        for _ in 0..QUESTIONS {
            let begun = Instant::now();
            let page = self.running.broker.list(&self.call, self.environment.clone(), &request).await;
            times.push(begun.elapsed());
            let page = page.unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(page.secrets.len(), self.size.min(PAGE));
            assert!(after.is_none() || page.next_page_token.is_none(), "the last page has none behind it");
        }
        median(times)
    }

    async fn description(&self, number: usize) -> f64 {
        let mut times = Vec::with_capacity(QUESTIONS);
        for _ in 0..QUESTIONS {
            let begun = Instant::now();
            self.describe(number).await;
            times.push(begun.elapsed());
        }
        median(times)
    }

    async fn describe(&self, number: usize) {
        let described = self.running.broker.describe(&self.call, id(number)).await;
        let description = described.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(description.versions.len(), 1);
    }
}

fn read(number: usize) -> Read {
    Read { id: id(number), field: None, selector: Selector::CURRENT, if_version_id: None }
}

/// The processor time that this process has taken, all of its threads.
fn own_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap())
}

/// In microseconds.
fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}
