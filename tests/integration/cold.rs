//! Cold reads from AWS: how few calls they take, what each gets where a call goes wrong, and how they are counted. The
//! rules of gathering and of quotas are tested beside their code; here they meet moto.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use claviger::cache::{Cache, Settings};
use claviger::clock::SystemClock;
use claviger::error::{Reason, Reasoned as _};
use claviger::proto::v1;
use claviger::secret::{EnvironmentName, SecretId, SecretName, Selector};
use claviger::store::aws::{Bounds, MOST_IN_BATCH};
use claviger::store::coalesced::Coalesced;
use claviger::store::{Freshness, Store};
use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt as _};
use serde_json::json;
use tokio::sync::OnceCell;

use crate::support::moto::{FaultProxy, Mode, Moto, REGION, fresh_environment, once, quick};
use crate::support::program::{Program, Served, http_get};
use crate::support::secrets;

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);
const THOUSAND: usize = 1_000;

fn name(n: usize) -> String {
    format!("cold/{n:04}")
}

fn value(name: &str) -> String {
    format!("value of {name}")
}

/// An environment of a thousand secrets, which no test changes.
async fn thousand() -> EnvironmentName {
    static SEEDED: OnceCell<EnvironmentName> = OnceCell::const_new();
    let seed = || async {
        let environment = fresh_environment();
        create(&environment, (0..THOUSAND).map(name)).await;
        environment
    };
    SEEDED.get_or_init(seed).await.clone()
}

/// Creates secrets past the broker, as many at a time as moto answers well.
async fn create(environment: &EnvironmentName, names: impl IntoIterator<Item = String>) {
    let client = Moto::start().await.client();
    let created = names.into_iter().map(|name| {
        let in_aws = format!("{environment}/{name}");
        let call = client.create_secret().name(in_aws).secret_string(value(&name));
        async move { call.send().await.unwrap() }
    });
    let created = stream::iter(created).buffer_unordered(16).for_each(|_| async {});
    tokio::time::timeout(HUNG, created).await.expect("hung");
}

/// The store of an environment as the broker has it below its cache, with a proxy in front of AWS.
struct House {
    proxy: FaultProxy,
    environment: EnvironmentName,
    store: Arc<Coalesced>,
}

impl House {
    async fn new(environment: EnvironmentName, bounds: &Bounds) -> Self {
        let proxy = FaultProxy::start(Moto::start().await.endpoint()).await;
        let below = proxy.store(&environment, bounds).await;
        Self { proxy, environment, store: Arc::new(Coalesced::new(below, MOST_IN_BATCH)) }
    }

    async fn of_a_thousand() -> Self {
        Self::new(thousand().await, &quick()).await
    }

    fn cache(&self) -> Cache {
        let settings = Settings {
            ttl: Duration::from_secs(300),
            negative_ttl: Duration::from_secs(5),
            stale_for: Duration::from_secs(3_600),
            capacity_bytes: 16 * 1024 * 1024,
            answer_within: Settings::ANSWER_WITHIN,
            uncached: Vec::new(),
        };
        Cache::new(Arc::clone(&self.store) as Arc<dyn Store>, settings, SystemClock::shared())
    }

    /// Calls of `BatchGetSecretValue` and of `GetSecretValue` so far.
    fn calls(&self) -> (usize, usize) {
        (self.proxy.calls("BatchGetSecretValue"), self.proxy.calls("GetSecretValue"))
    }

    /// Reads all of `names` at the same time, each by itself.
    async fn read_at_once(&self, store: Arc<dyn Store>, names: &[String]) -> Vec<Result<String, Reason>> {
        let asked = names.iter().map(|name| {
            let id = SecretId::new(self.environment.clone(), SecretName::parse(name).unwrap());
            let store = Arc::clone(&store);
            tokio::spawn(async move { store.get(&id, &Selector::CURRENT, Freshness::Cached).await })
        });
        let asked: Vec<_> = asked.collect();
        let found = tokio::time::timeout(HUNG, join_all(asked)).await.expect("hung");
        let found = found.into_iter().map(Result::unwrap);
        let text = |value: &claviger::secret::SecretValue| value.expose_text().unwrap().to_owned();
        found.map(|found| found.map(|f| text(&f.value)).map_err(|error| error.reason())).collect()
    }

    /// Reads some of the thousand at the same time and past any cache, and checks each value.
    async fn read(&self, some: Range<usize>) {
        let names: Vec<String> = some.map(name).collect();
        let found = self.read_at_once(self.store.clone(), &names).await;
        let expected: Vec<_> = names.iter().map(|name| Ok(value(name))).collect();
        assert_eq!(found, expected);
    }
}

/// All run on one thread, so that all have asked before the first look at who is still coming.
#[tokio::test]
async fn a_thousand_cold_reads_at_once_are_fifty_calls() {
    let house = House::of_a_thousand().await;
    let cache = house.cache();
    let names: Vec<String> = (0..THOUSAND).map(name).collect();
    let expected: Vec<_> = names.iter().map(|name| Ok(value(name))).collect();
    for _ in 0..2 {
        assert_eq!(house.read_at_once(Arc::new(cache.clone()), &names).await, expected);
        assert_eq!(house.calls(), (50, 0));
    }
    let stats = cache.stats();
    assert_eq!((stats.misses, stats.hits), (1_000, 1_000));
    assert_eq!((stats.upstream_calls, stats.upstream_secrets, stats.coalesced), (50, 1_000, 950));
    assert_eq!((stats.upstream_errors, stats.quota_refusals), (0, 0));
    let most = cache.most_asked(20);
    assert_eq!((most.secrets.len(), most.others), (20, 980));
    assert!(most.secrets.iter().all(|(_, calls)| *calls == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_batches_of_five_hundred_are_fifty_calls_and_each_secret_is_counted() {
    let environment = thousand().await;
    let proxy = FaultProxy::start(Moto::start().await.endpoint()).await;
    let folder = tempfile::tempdir().unwrap();
    let program = served(folder.path(), &environment, &proxy);
    let client = secrets(&program.socket).await;
    let batches = [0..500, 500..1_000].map(|some| {
        let query = |n| v1::SecretQuery {
            environment: environment.to_string(),
            name: name(n),
            ..v1::SecretQuery::default()
        };
        let items = some.map(query).collect();
        let request = v1::BatchGetSecretsRequest { items, ..v1::BatchGetSecretsRequest::default() };
        let mut client = client.clone();
        async move { client.batch_get_secrets(request).await.unwrap().into_inner().results }
    });
    let results = tokio::time::timeout(HUNG, join_all(batches)).await.expect("hung").concat();
    for (n, result) in results.into_iter().enumerate() {
        let Some(v1::batch_get_secrets_result::Result::Secret(secret)) = result.result else {
            panic!("{} was not read", name(n));
        };
        assert_eq!(secret.name, name(n));
        assert_eq!(&secret.payload.unwrap().data[..], value(&name(n)).as_bytes());
    }
    assert_eq!((proxy.calls("BatchGetSecretValue"), proxy.calls("GetSecretValue")), (50, 0));

    for _ in 0..2 {
        let refreshed = program.ok(["get", &name(7), "-e", environment.as_str(), "--refresh"]);
        assert_eq!(refreshed.trim_end(), value(&name(7)));
    }
    let stats = program.ok(["cache", "stats", "--output", "json"]);
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    let of = |cache: &&serde_json::Value| cache["environment"] == environment.as_str();
    let cache = stats["caches"].as_array().unwrap().iter().find(of).unwrap();
    for (figure, expected) in [
        ("upstream_calls", 52),
        ("upstream_secrets", 1_002),
        ("coalesced", 950),
        ("quota_refusals", 0),
        ("others_asked", 980),
    ] {
        assert_eq!(cache[figure], expected, "{figure}: {cache}");
    }
    let most = cache["most_asked"].as_array().unwrap();
    assert_eq!((most.len(), &most[0]), (20, &json!({"name": name(7), "calls": 3})));
    let text = program.ok(["cache", "stats"]);
    assert!(text.contains(&name(7)) && text.contains("(others)"), "{text}");

    let log = program.log();
    let (_, admin) = log.lines().find_map(|line| line.split_once("probes and metrics on ")).unwrap();
    let (_, metrics) = http_get(admin.trim(), "/metrics").await;
    for (family, expected) in [("calls", 52), ("secrets", 1_002), ("coalesced", 950)] {
        let line = format!("claviger_upstream_{family}_total{{environment=\"{environment}\"}} {expected}\n");
        assert!(metrics.contains(&line), "{line}{metrics}");
    }
    assert!(!metrics.contains("cold/"), "no secret's name: {metrics}");
}

/// A broker whose callers may read `environment`, which is in AWS behind `proxy`.
fn served(folder: &std::path::Path, environment: &EnvironmentName, proxy: &FaultProxy) -> Program {
    let tables = format!(
        "[environments.{environment}]\nstore = \"aws\"\n[environments.{environment}.aws]\nregion = \"{REGION}\"\n\
         endpoint = \"{}\"\n",
        proxy.endpoint(),
    );
    let credentials = [
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ];
    let (config, _) = Served::configure(folder, "", &tables);
    let program = Program::serve(&config, &folder.join("broker.sock"), &credentials);
    program.wait_for_log("probes and metrics on ");
    program
}

#[tokio::test]
async fn the_same_secret_asked_by_a_hundred_is_one_call_of_one() {
    let house = House::of_a_thousand().await;
    let names = vec![name(0); 100];
    let found = house.read_at_once(house.store.clone(), &names).await;
    assert!(found.iter().all(|found| *found == Ok(value(&name(0)))), "{found:?}");
    assert_eq!(house.calls(), (0, 1));
    // Refreshes do not share what the cache fetches for others, and yet may share a call that begins after them.
    let cache = house.cache();
    let id = SecretId::new(house.environment.clone(), SecretName::parse(&name(0)).unwrap());
    let refreshed = (0..100).map(|_| cache.get(&id, &Selector::CURRENT, Freshness::Refresh));
    for found in tokio::time::timeout(HUNG, join_all(refreshed)).await.expect("hung") {
        assert_eq!(found.unwrap().value.expose_text(), Some(value(&name(0)).as_str()));
    }
    assert_eq!(house.calls(), (0, 2));
}

#[tokio::test]
async fn without_the_permission_for_batches_reads_go_on_one_by_one() {
    // Once without a subscriber, for the reason that `aws.rs` gives where it counts warnings.
    for counted in [false, true] {
        let house = House::of_a_thousand().await;
        house.proxy.set_for("BatchGetSecretValue", Mode::Deny);
        let log = tempfile::NamedTempFile::new().unwrap();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(Arc::new(log.reopen().unwrap())).finish();
        let guard = counted.then(|| tracing::subscriber::set_default(subscriber));
        house.read(0..40).await;
        assert_eq!(house.calls(), (2, 40));
        house.proxy.forget();
        house.read(40..80).await;
        assert_eq!(house.calls(), (0, 40), "that they are forbidden is remembered");
        drop(guard);
        let log = std::fs::read_to_string(log.path()).unwrap();
        let warnings = log.lines().filter(|line| line.contains("secretsmanager:BatchGetSecretValue"));
        assert_eq!(warnings.count(), usize::from(counted), "{log}");
    }
}

#[tokio::test]
async fn where_nothing_is_permitted_each_is_denied_and_batches_are_not_blamed() {
    let house = House::of_a_thousand().await;
    let names: Vec<String> = (0..3).map(name).collect();
    house.proxy.set(Mode::Deny);
    let found = house.read_at_once(house.store.clone(), &names).await;
    assert_eq!(found, vec![Err(Reason::StoreDenied); 3]);
    house.proxy.set(Mode::Pass);
    house.proxy.forget();
    house.read(0..3).await;
    assert_eq!(house.calls(), (1, 0));
}

#[tokio::test]
async fn ones_error_in_a_call_is_its_own() {
    let environment = fresh_environment();
    create(&environment, ["a", "b", "gone"].map(str::to_owned)).await;
    let delete = Moto::start().await.client().delete_secret().secret_id(format!("{environment}/gone"));
    delete.recovery_window_in_days(7).send().await.unwrap();
    let house = House::new(environment, &quick()).await;
    let names = ["a", "absent", "gone", "b"].map(str::to_owned);
    let found = house.read_at_once(house.store.clone(), &names).await;
    let expected = [Ok(value("a")), Err(Reason::SecretNotFound), Err(Reason::SecretDeleted), Ok(value("b"))];
    assert_eq!(found, expected);
    assert_eq!(house.calls(), (1, 0));
}

#[tokio::test]
async fn a_call_that_fails_fails_for_each_and_for_nobody_else() {
    let house = House::new(thousand().await, &once()).await;
    let names: Vec<String> = (0..3).map(name).collect();
    for (fault, expected) in
        [(Mode::Throttle, Reason::StoreThrottled), (Mode::Unavailable, Reason::StoreUnavailable)]
    {
        house.proxy.forget();
        house.proxy.next("BatchGetSecretValue", 1, fault);
        let found = house.read_at_once(house.store.clone(), &names).await;
        assert_eq!(found, vec![Err(expected); 3]);
        assert_eq!(house.calls(), (1, 0));
        house.read(0..3).await;
        assert_eq!(house.calls(), (2, 0));
    }
}

#[tokio::test]
async fn what_the_pages_of_an_answer_leave_out_is_fetched_one_by_one() {
    let house = House::of_a_thousand().await;
    // AWS may answer in pages, and the first may be empty. The next starts in the middle, so that half is in none.
    let first = json!({"SecretValues": [], "Errors": [], "NextToken": "10"}).to_string();
    house.proxy.next("BatchGetSecretValue", 1, Mode::Answer(200, first));
    house.read(0..MOST_IN_BATCH).await;
    assert_eq!(house.calls(), (2, 10));
    assert_eq!(house.store.upstream().value_calls, Some(12));
}
