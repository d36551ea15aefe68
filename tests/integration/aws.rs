//! The AWS store where AWS is slow, refuses, or loses answers, and where its API is sharper than it looks. What every
//! store has to do is in `store_conformance`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_secretsmanager::types::RotationRulesType;
use claviger::cache::{Cache, Settings};
use claviger::clock::{ManualClock, SystemClock};
use claviger::environment::AwsSettings;
use claviger::error::{Reason, Reasoned};
use claviger::secret::{
    ContentType, EnvironmentName, Label, LabelMove, SecretId, SecretName, SecretValue, Selector, VersionId,
};
use claviger::store::aws::{Aws, Bounds};
use claviger::store::{Freshness, ListRequest, Put, RecoveryWindow, Store, StoreError};
use serde_json::json;

use crate::support::moto::{
    FaultProxy, Mode, Moto, REGION, credentials, fresh_environment, once, quick, store_at,
};

/// A store behind a proxy, in an environment of its own.
struct Bench {
    moto: &'static Moto,
    proxy: FaultProxy,
    environment: EnvironmentName,
    store: Arc<Aws>,
}

impl Bench {
    async fn new() -> Self {
        Self::with(&quick()).await
    }

    async fn with(bounds: &Bounds) -> Self {
        let moto = Moto::start().await;
        let proxy = FaultProxy::start(moto.endpoint()).await;
        let environment = fresh_environment();
        let store = proxy.store(&environment, bounds).await;
        Self { moto, proxy, environment, store }
    }

    fn id(&self, name: &str) -> SecretId {
        SecretId::new(self.environment.clone(), SecretName::parse(name).unwrap())
    }

    fn name_in_aws(&self, name: &str) -> String {
        format!("{}/{name}", self.environment)
    }

    /// Writes a value as AWSCURRENT.
    async fn put(&self, name: &str, value: &str) -> VersionId {
        self.store.put(&self.id(name), put(value)).await.unwrap().version.id
    }

    async fn get(&self, name: &str) -> Result<String, StoreError> {
        let found = self.store.get(&self.id(name), &Selector::CURRENT, Freshness::Cached).await?;
        Ok(found.value.expose_text().unwrap().to_owned())
    }

    async fn versions(&self, name: &str) -> Vec<(VersionId, Vec<Label>)> {
        let described = self.store.describe(&self.id(name)).await.unwrap();
        described.versions.into_iter().map(|version| (version.id, version.labels)).collect()
    }

    async fn make_current(&self, name: &str, from: &VersionId, to: &VersionId) -> Result<bool, StoreError> {
        let change = LabelMove { label: Label::Current, from: Some(from.clone()), to: Some(to.clone()) };
        let written = self.store.move_label(&self.id(name), &change).await?;
        assert_eq!(written.version.id, *to);
        assert_eq!(written.superseded.as_ref(), written.changed.then_some(from));
        Ok(written.changed)
    }

    /// An answer of AWS that is this error.
    fn refusal(code: &str, message: &str) -> Mode {
        Mode::Answer(400, json!({"__type": code, "Message": message}).to_string())
    }
}

fn text(value: &str) -> SecretValue {
    SecretValue::text(value.to_owned()).unwrap()
}

fn put(value: &str) -> Put {
    Put { value: text(value), token: VersionId::generate(), labels: vec![], expected: None }
}

fn reason<T>(result: Result<T, StoreError>) -> Reason {
    result.map(drop).unwrap_err().reason()
}

#[tokio::test]
async fn what_may_pass_is_tried_again() {
    let bench = Bench::new().await;
    bench.put("database", "hunter2").await;
    for fault in [Mode::Throttle, Mode::Unavailable] {
        bench.proxy.forget();
        bench.proxy.next("GetSecretValue", 2, fault);
        assert_eq!(bench.get("database").await.unwrap(), "hunter2");
        assert_eq!(bench.proxy.calls("GetSecretValue"), 3);
    }
}

#[tokio::test]
async fn what_does_not_pass_is_said_and_by_its_kind() {
    let bench = Bench::new().await;
    bench.put("database", "hunter2").await;
    for (fault, expected, attempts) in [
        (Mode::Throttle, Reason::StoreThrottled, 3),
        (Mode::Unavailable, Reason::StoreUnavailable, 3),
        (Mode::Deny, Reason::StoreDenied, 1),
        (Bench::refusal("UnrecognizedClientException", "no such key"), Reason::StoreDenied, 1),
        (Bench::refusal("DecryptionFailure", "the key is disabled"), Reason::StoreDenied, 1),
        (Bench::refusal("LimitExceededException", "too much"), Reason::LimitExceeded, 3),
        (Bench::refusal("InvalidParameterException", "what?"), Reason::InvalidArgument, 1),
        (Mode::Answer(200, "{\"Name\": 5".to_owned()), Reason::StoreUnavailable, 1),
    ] {
        bench.proxy.forget();
        bench.proxy.set(fault.clone());
        assert_eq!(reason(bench.get("database").await), expected, "{fault:?}");
        assert_eq!(bench.proxy.calls("GetSecretValue"), attempts, "{fault:?}");
        assert_eq!(reason(bench.store.ping(&bench.environment).await), expected, "{fault:?}");
        let listed = bench.store.list(&bench.environment, &ListRequest::default()).await;
        assert_eq!(reason(listed), expected, "{fault:?}");
        let item = (bench.id("database"), Selector::CURRENT);
        let batch = bench.store.batch_get(&[item], Freshness::Cached).await.remove(0);
        assert_eq!(reason(batch), expected, "{fault:?}");
    }
}

/// AWS throttles with status 400, like what is wrong for good.
#[tokio::test]
async fn b3_throttling_is_no_reason_to_withhold_what_is_cached() {
    let bench = Bench::with(&once()).await;
    bench.put("database", "hunter2").await;
    let (ttl, stale_for) = (Duration::from_secs(60), Duration::from_secs(600));
    let settings = Settings {
        ttl,
        negative_ttl: Duration::from_secs(5),
        stale_for,
        capacity_bytes: 1 << 20,
        answer_within: Settings::ANSWER_WITHIN,
        uncached: Vec::new(),
    };
    let clock = ManualClock::new(jiff::Timestamp::UNIX_EPOCH);
    let cache = Cache::new(Arc::clone(&bench.store) as Arc<dyn Store>, settings, Arc::clone(&clock) as _);
    let id = bench.id("database");
    let get = async || cache.get(&id, &Selector::CURRENT, Freshness::Cached).await;
    assert!(!get().await.unwrap().stale);
    clock.advance(2 * ttl);
    bench.proxy.forget();
    bench.proxy.set(Mode::Throttle);
    for _ in 0..20 {
        let found = get().await.unwrap();
        assert_eq!((found.value.expose_text(), found.stale, found.age), (Some("hunter2"), true, 2 * ttl));
    }
    assert_eq!(bench.proxy.calls("GetSecretValue"), 1, "it is left alone for a while");
    clock.advance(stale_for);
    assert_eq!(reason(get().await), Reason::StoreThrottled, "past the bound");
    bench.proxy.set(Mode::Pass);
    assert!(!get().await.unwrap().stale);
}

#[tokio::test]
async fn silence_ends_with_the_operations_time() {
    let bounds = Bounds {
        connect: Duration::from_millis(200),
        attempt: Duration::from_millis(100),
        operation: Duration::from_millis(250),
        ..quick()
    };
    let bench = Bench::with(&bounds).await;
    bench.proxy.set(Mode::Hang);
    let error = bench.get("database").await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert!(bench.store.ping(&bench.environment).await.unwrap_err().is_transient());
}

#[tokio::test]
async fn nobody_there_is_an_outage() {
    let environment = fresh_environment();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let store = store_at(&endpoint, &environment, &quick(), SystemClock::shared()).await;
    let error = store.ping(&environment).await.unwrap_err();
    assert_eq!(error.reason(), Reason::StoreUnavailable, "{error}");
}

#[tokio::test]
async fn a_put_whose_answer_was_lost_is_done_once() {
    let bench = Bench::with(&once()).await;
    for (name, operation) in [("new", "CreateSecret"), ("old", "PutSecretValue")] {
        if operation == "PutSecretValue" {
            bench.put(name, "first").await;
        }
        let before =
            bench.store.describe(&bench.id(name)).await.map_or(0, |described| described.versions.len());
        let put = put("hunter2");
        bench.proxy.next(operation, 1, Mode::CutAfterRequest);
        assert_eq!(reason(bench.store.put(&bench.id(name), put.clone()).await), Reason::StoreUnavailable);
        let again = bench.store.put(&bench.id(name), put.clone()).await.unwrap();
        assert_eq!((again.version.id, again.changed), (put.token, false));
        assert_eq!(again.version.labels, [Label::Current]);
        assert_eq!(bench.versions(name).await.len(), before + 1);
    }
}

#[tokio::test]
async fn the_clients_own_retry_does_not_write_twice() {
    let bench = Bench::new().await;
    for operation in ["CreateSecret", "PutSecretValue"] {
        bench.proxy.next(operation, 1, Mode::CutAfterRequest);
        bench.put("database", operation).await;
    }
    assert_eq!(bench.proxy.calls("PutSecretValue"), 2);
    assert_eq!(bench.versions("database").await.len(), 2);
    assert_eq!(bench.get("database").await.unwrap(), "PutSecretValue");
}

#[tokio::test]
async fn a_move_whose_answer_was_lost_is_done() {
    let bench = Bench::with(&once()).await;
    let (one, two) = (bench.put("database", "one").await, bench.put("database", "two").await);
    bench.proxy.next("UpdateSecretVersionStage", 1, Mode::CutAfterRequest);
    assert_eq!(reason(bench.make_current("database", &two, &one).await), Reason::StoreUnavailable);
    assert!(!bench.make_current("database", &two, &one).await.unwrap(), "the retry found it done");
    assert_eq!(bench.get("database").await.unwrap(), "one");

    // Where the client itself tries again, AWS refuses the second attempt, and the labels say that the first counted.
    let patient = bench.proxy.store(&bench.environment, &quick()).await;
    let bench = Bench { store: patient, ..bench };
    bench.proxy.next("UpdateSecretVersionStage", 1, Mode::CutAfterRequest);
    assert!(bench.make_current("database", &one, &two).await.unwrap());
    assert_eq!(bench.get("database").await.unwrap(), "two");
}

#[tokio::test]
async fn a_deletion_whose_answer_was_lost_is_done() {
    let bench = Bench::new().await;
    bench.put("database", "hunter2").await;
    bench.proxy.next("DeleteSecret", 1, Mode::CutAfterRequest);
    let until = bench.store.delete(&bench.id("database"), RecoveryWindow::DEFAULT).await.unwrap();
    assert_eq!(bench.store.describe(&bench.id("database")).await.unwrap().deletion_at, Some(until));
    assert_eq!(reason(bench.get("database").await), Reason::SecretDeleted);
    assert_eq!(reason(bench.store.put(&bench.id("database"), put("x")).await), Reason::SecretDeleted);
    bench.store.restore(&bench.id("database")).await.unwrap();
    assert_eq!(bench.get("database").await.unwrap(), "hunter2");
}

#[tokio::test]
async fn a_move_from_a_stale_picture_is_refused_with_where_the_label_is() {
    let bench = Bench::new().await;
    let (one, two) = (bench.put("database", "one").await, bench.put("database", "two").await);
    let three = bench.put("database", "three").await;
    let error = bench.make_current("database", &two, &one).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Conflict);
    assert!(error.to_string().contains(three.as_str()), "{error}");
    let nowhere = VersionId::generate();
    assert_eq!(reason(bench.make_current("database", &three, &nowhere).await), Reason::VersionNotFound);
}

#[tokio::test]
async fn of_many_claims_one_wins() {
    let bench = Bench::new().await;
    bench.put("database", "one").await;
    let mut candidates = Vec::new();
    for n in 0..6 {
        let label = Label::parse(&format!("candidate-{n}")).unwrap();
        let put = Put { labels: vec![label], ..put("pending") };
        candidates.push(bench.store.put(&bench.id("database"), put).await.unwrap().version.id);
    }
    let claims = candidates.iter().map(|candidate| {
        let (store, id) = (Arc::clone(&bench.store), bench.id("database"));
        let change = LabelMove { label: Label::Pending, from: None, to: Some(candidate.clone()) };
        tokio::spawn(async move { store.move_label(&id, &change).await.map(|written| written.version.id) })
    });
    let mut winners = Vec::new();
    for claim in claims.collect::<Vec<_>>() {
        match claim.await.unwrap() {
            Ok(winner) => winners.push(winner),
            Err(error) => assert_eq!(error.reason(), Reason::Conflict, "{error}"),
        }
    }
    assert_eq!(winners.len(), 1);
    let pending = Selector::Label(Label::Pending);
    let found = bench.store.get(&bench.id("database"), &pending, Freshness::Refresh).await.unwrap();
    assert_eq!(found.version.id, winners[0]);
}

#[tokio::test]
async fn of_many_creators_one_wins() {
    let bench = Bench::new().await;
    let creators: Vec<_> = (0..6)
        .map(|_| {
            let (store, id) = (Arc::clone(&bench.store), bench.id("database"));
            tokio::spawn(async move { store.put(&id, Put { expected: Some(None), ..put("hunter2") }).await })
        })
        .collect();
    let mut won = 0;
    for creator in creators {
        match creator.await.unwrap() {
            Ok(written) => won += usize::from(written.changed),
            Err(error) => assert_eq!(error.reason(), Reason::Conflict, "{error}"),
        }
    }
    assert_eq!(won, 1);
    assert_eq!(bench.versions("database").await.len(), 1);
}

#[tokio::test]
async fn aws_would_let_a_claim_be_stolen_and_this_does_not() {
    let bench = Bench::new().await;
    bench.put("database", "one").await;
    let pending = Put { labels: vec![Label::Pending], ..put("two") };
    bench.store.put(&bench.id("database"), pending.clone()).await.unwrap();
    let thief = Put { labels: vec![Label::Pending], ..put("three") };
    assert_eq!(reason(bench.store.put(&bench.id("database"), thief).await), Reason::Conflict);
    let again = bench.store.put(&bench.id("database"), pending.clone()).await.unwrap();
    assert!(!again.changed, "the holder's own retry is not theft");
    let other = Put { value: text("other"), ..pending };
    assert_eq!(reason(bench.store.put(&bench.id("database"), other).await), Reason::TokenReused);
}

#[tokio::test]
async fn a_secret_can_start_with_labels_of_the_users_own() {
    let bench = Bench::new().await;
    let stable = Label::parse("stable").unwrap();
    let first = Put { labels: vec![Label::Current, stable.clone()], ..put("hunter2") };
    // Between the two calls that this takes, the process may die; whoever tries again gets through.
    bench.proxy.next("PutSecretValue", 3, Mode::Unavailable);
    assert_eq!(reason(bench.store.put(&bench.id("database"), first.clone()).await), Reason::StoreUnavailable);
    assert_eq!(reason(bench.get("database").await), Reason::VersionNotFound);
    let written = bench.store.put(&bench.id("database"), first).await.unwrap();
    assert_eq!(written.version.labels, [Label::Current, stable]);
    assert_eq!(bench.get("database").await.unwrap(), "hunter2");
}

#[tokio::test]
async fn forty_five_secrets_are_three_calls() {
    let bench = Bench::new().await;
    let names: Vec<String> = (0..45).map(|n| format!("secret-{n}")).collect();
    for name in &names {
        bench.put(name, &format!("value of {name}")).await;
    }
    bench.proxy.forget();
    let items: Vec<_> = names.iter().rev().map(|name| (bench.id(name), Selector::CURRENT)).collect();
    let found = bench.store.batch_get(&items, Freshness::Cached).await;
    for (found, name) in found.into_iter().zip(names.iter().rev()) {
        assert_eq!(found.unwrap().value.expose_text(), Some(format!("value of {name}").as_str()));
    }
    assert_eq!((bench.proxy.calls("BatchGetSecretValue"), bench.proxy.calls("GetSecretValue")), (3, 0));
}

#[tokio::test]
async fn b9_one_items_failure_is_its_own() {
    let bench = Bench::new().await;
    let one = bench.put("rotated", "one").await;
    bench.put("rotated", "two").await;
    bench.put("plain", "three").await;
    bench.put("deleted", "four").await;
    bench.store.delete(&bench.id("deleted"), RecoveryWindow::DEFAULT).await.unwrap();
    let client = bench.moto.client();
    client.create_secret().name(bench.name_in_aws("empty")).send().await.unwrap();
    bench.proxy.forget();

    let foreign = (SecretId::parse("other", "plain").unwrap(), Selector::CURRENT);
    let items = [
        (bench.id("plain"), Selector::CURRENT),
        (bench.id("absent"), Selector::CURRENT),
        (bench.id("rotated"), Selector::Label(Label::Previous)),
        (bench.id("deleted"), Selector::CURRENT),
        (bench.id("plain"), Selector::CURRENT),
        (bench.id("rotated"), Selector::Version(one)),
        (bench.id("rotated"), Selector::Label(Label::Pending)),
        (bench.id("rotated"), Selector::CURRENT),
        (bench.id("empty"), Selector::CURRENT),
        foreign,
    ];
    let found = bench.store.batch_get(&items, Freshness::Cached).await;
    let found: Vec<Result<String, Reason>> = found
        .into_iter()
        .map(|found| found.map(|f| f.value.expose_text().unwrap().to_owned()).map_err(|e| e.reason()))
        .collect();
    let ok = |value: &str| Ok(value.to_owned());
    assert_eq!(
        found,
        [
            ok("three"),
            Err(Reason::SecretNotFound),
            ok("one"),
            Err(Reason::SecretDeleted),
            ok("three"),
            ok("one"),
            Err(Reason::VersionNotFound),
            ok("two"),
            Err(Reason::VersionNotFound),
            Err(Reason::InvalidArgument),
        ]
    );
    assert_eq!((bench.proxy.calls("BatchGetSecretValue"), bench.proxy.calls("GetSecretValue")), (1, 3));
}

#[tokio::test]
async fn without_the_permission_for_batches_secrets_are_fetched_one_by_one() {
    let bench = Bench::new().await;
    let mut items = Vec::new();
    for name in ["a", "b", "c"] {
        bench.put(name, name).await;
        items.push((bench.id(name), Selector::CURRENT));
    }
    bench.proxy.forget();
    bench.proxy.set_for("BatchGetSecretValue", Mode::Deny);
    let found = bench.store.batch_get(&items, Freshness::Cached).await;
    let found: Vec<_> =
        found.into_iter().map(|f| f.unwrap().value.expose_text().unwrap().to_owned()).collect();
    assert_eq!(found, ["a", "b", "c"]);
    assert_eq!((bench.proxy.calls("BatchGetSecretValue"), bench.proxy.calls("GetSecretValue")), (1, 3));
}

#[tokio::test]
async fn an_empty_page_is_not_the_last_one() {
    let bench = Bench::new().await;
    bench.put("database", "hunter2").await;
    bench.proxy.forget();
    let empty = json!({"SecretValues": [], "Errors": [], "NextToken": "0"}).to_string();
    bench.proxy.next("BatchGetSecretValue", 1, Mode::Answer(200, empty));
    let items = [(bench.id("database"), Selector::CURRENT)];
    let found = bench.store.batch_get(&items, Freshness::Cached).await.remove(0).unwrap();
    assert_eq!(found.value.expose_text(), Some("hunter2"));
    assert_eq!((bench.proxy.calls("BatchGetSecretValue"), bench.proxy.calls("GetSecretValue")), (2, 0));
}

#[tokio::test]
async fn a_name_that_looks_like_the_end_of_an_arn_is_a_name() {
    let bench = Bench::new().await;
    for name in ["database", "database-AbCdEf"] {
        bench.put(name, name).await;
    }
    for name in ["database", "database-AbCdEf"] {
        assert_eq!(bench.get(name).await.unwrap(), name);
        bench.store.delete(&bench.id(name), RecoveryWindow::DEFAULT).await.unwrap();
    }
}

#[tokio::test]
async fn a_name_that_looks_like_the_end_of_an_arn_is_warned_of_once() {
    let bench = Bench::new().await;
    // Whether a place in the code is of interest is decided when it is first passed, by the thread that does, and again
    // when a subscriber comes. So it is passed once before there is one.
    bench.put("first-AbCdEf", "x").await;
    let log = tempfile::NamedTempFile::new().unwrap();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(Arc::new(log.reopen().unwrap()));
    let guard = tracing::subscriber::set_default(subscriber.finish());
    for name in ["database", "database-abc123", "database-abc123"] {
        bench.put(name, "hunter2").await;
    }
    drop(guard);

    let log = std::fs::read_to_string(log.path()).unwrap();
    let warnings: Vec<&str> = log.lines().filter(|line| line.contains("partial ARN")).collect();
    assert_eq!(warnings.len(), 1, "{log}");
    assert!(warnings[0].contains("WARN") && warnings[0].contains("secret=database-abc123"), "{log}");
    assert!(warnings[0].contains(&format!("environment={}", bench.environment)), "{log}");
    assert!(!log.contains("hunter2"), "{log}");
}

/// A store that assumes a role of another account, with its two ways out.
struct Assumed {
    sts: FaultProxy,
    secrets: FaultProxy,
    store: Aws,
    id: SecretId,
}

impl Assumed {
    async fn new() -> Self {
        let moto = Moto::start().await;
        let (sts, secrets) =
            (FaultProxy::start(moto.endpoint()).await, FaultProxy::start(moto.endpoint()).await);
        let settings = AwsSettings {
            region: Some(REGION.to_owned()),
            endpoint: Some(secrets.endpoint().to_owned()),
            role_arn: Some("arn:aws:iam::210987654321:role/claviger".to_owned()),
            sts_endpoint: Some(sts.endpoint().to_owned()),
            ..AwsSettings::default()
        };
        let environment = fresh_environment();
        let id = SecretId::new(environment.clone(), SecretName::parse("database").unwrap());
        let store =
            Aws::with_credentials(environment, &settings, credentials(), &quick(), SystemClock::shared())
                .await;
        Self { sts, secrets, store: store.unwrap(), id }
    }

    async fn get(&self) -> Result<String, StoreError> {
        let found = self.store.get(&self.id, &Selector::CURRENT, Freshness::Cached).await?;
        Ok(found.value.expose_text().unwrap().to_owned())
    }
}

#[tokio::test]
async fn a_role_is_assumed_once_and_everything_is_done_as_it() {
    let assumed = Assumed::new().await;
    assert_eq!(assumed.sts.calls(""), 0, "nothing is asked before there is something to do");
    assumed.store.put(&assumed.id, put("hunter2")).await.unwrap();
    assert_eq!(assumed.get().await.unwrap(), "hunter2");
    assert_eq!((assumed.sts.calls(""), assumed.sts.calls("CreateSecret")), (1, 0));
    assert_eq!((assumed.secrets.calls(""), assumed.secrets.calls("CreateSecret")), (0, 1));

    // moto has an account for each in a role's ARN: the credentials that assumed it see nothing of its secrets.
    let own = Moto::start().await.store(&assumed.id.environment, SystemClock::shared()).await;
    let found = own.get(&assumed.id, &Selector::CURRENT, Freshness::Cached).await;
    assert_eq!(reason(found), Reason::SecretNotFound);
}

#[tokio::test]
async fn without_the_role_nothing_is_asked_of_the_store() {
    let assumed = Assumed::new().await;
    let denied = "<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>not yours</Message>\
                  </Error><RequestId>1</RequestId></ErrorResponse>";
    for (fault, expected) in [
        (Mode::Answer(403, denied.to_owned()), Reason::StoreDenied),
        (Mode::Unavailable, Reason::StoreUnavailable),
    ] {
        assumed.sts.set(fault.clone());
        assert_eq!(reason(assumed.get().await), expected, "{fault:?}");
    }
    assert_eq!(assumed.secrets.calls("GetSecretValue"), 0);
    assumed.sts.set(Mode::Pass);
    assumed.store.put(&assumed.id, put("hunter2")).await.unwrap();
    assert_eq!(assumed.get().await.unwrap(), "hunter2");
}

#[tokio::test]
async fn what_aws_says_of_another_secret_is_not_taken_for_the_one_asked_for() {
    let bench = Bench::new().await;
    let other = json!({
        "ARN": "arn:aws:secretsmanager:eu-central-1:123456789012:secret:other-AbCdEf",
        "Name": "other",
        "VersionId": VersionId::generate().as_str(),
        "VersionStages": ["AWSCURRENT"],
        "SecretString": "canary-5f3a",
        "CreatedDate": 1.5,
        "DeletionDate": 1.5,
    });
    bench.proxy.set(Mode::Answer(200, other.to_string()));
    let id = bench.id("other-AbCdEf");
    assert_eq!(reason(bench.get("other-AbCdEf").await), Reason::SecretNotFound);
    assert_eq!(reason(bench.store.describe(&id).await), Reason::SecretNotFound);
    assert_eq!(reason(bench.store.delete(&id, RecoveryWindow::DEFAULT).await), Reason::SecretNotFound);
    assert_eq!(bench.proxy.calls("DeleteSecret"), 0);
    let change = LabelMove { label: Label::Pending, from: None, to: Some(VersionId::generate()) };
    assert_eq!(reason(bench.store.move_label(&id, &change).await), Reason::SecretNotFound);
    assert_eq!(bench.proxy.calls("UpdateSecretVersionStage"), 0);
}

#[tokio::test]
async fn where_aws_leaves_open_what_is_missing_it_is_found_out() {
    let bench = Bench::new().await;
    bench.put("database", "hunter2").await;
    for (name, expected) in [("database", Reason::VersionNotFound), ("absent", Reason::SecretNotFound)] {
        bench.proxy.next("GetSecretValue", 1, Bench::refusal("ResourceNotFoundException", "nothing there"));
        assert_eq!(reason(bench.get(name).await), expected);
    }
}

#[tokio::test]
async fn bytes_and_text_come_back_as_they_were_written() {
    let bench = Bench::new().await;
    let id = bench.id("blob");
    let every_byte: Vec<u8> = (0..=255).collect();
    let largest = vec![b'x'; 65_536];
    for (bytes, content_type) in [
        (every_byte, ContentType::Binary),
        (b"text, but kept as bytes".to_vec(), ContentType::Binary),
        (largest.clone(), ContentType::Binary),
        (largest, ContentType::Text),
        ("{\"k\": \"é\\u00e9 \u{1f511} \\\" \r\n\t\u{0}\"}".as_bytes().to_vec(), ContentType::Text),
    ] {
        let value = SecretValue::new(bytes, content_type).unwrap();
        let put = Put { value: value.clone(), ..put("") };
        bench.store.put(&id, put).await.unwrap();
        let found = bench.store.get(&id, &Selector::CURRENT, Freshness::Refresh).await.unwrap();
        assert!(found.value.same_as(&value));
        let items = [(id.clone(), Selector::CURRENT)];
        let found = bench.store.batch_get(&items, Freshness::Refresh).await.remove(0).unwrap();
        assert!(found.value.same_as(&value));
    }
}

#[tokio::test]
async fn what_aws_can_not_keep_is_refused_before_it_is_asked() {
    let bench = Bench::new().await;
    assert_eq!(reason(bench.store.put(&bench.id("database"), put("")).await), Reason::InvalidArgument);
    let long = bench.id(&"x".repeat(512));
    assert_eq!(reason(bench.store.put(&long, put("x")).await), Reason::InvalidArgument);
    assert_eq!((bench.proxy.calls("CreateSecret"), bench.proxy.calls("DescribeSecret")), (0, 0));
}

#[tokio::test]
async fn what_aws_rotates_is_not_written() {
    let bench = Bench::new().await;
    let (one, two) = (bench.put("database", "one").await, bench.put("database", "two").await);
    let rules = RotationRulesType::builder().automatically_after_days(30).build();
    let name = bench.name_in_aws("database");
    bench.moto.client().rotate_secret().secret_id(name).rotation_rules(rules).send().await.unwrap();
    bench.proxy.forget();

    let error = bench.store.put(&bench.id("database"), put("three")).await.unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidArgument);
    assert!(error.to_string().contains("CancelRotateSecret"), "{error}");
    assert_eq!(reason(bench.make_current("database", &two, &one).await), Reason::InvalidArgument);
    let calls = (bench.proxy.calls("PutSecretValue"), bench.proxy.calls("UpdateSecretVersionStage"));
    assert_eq!(calls, (0, 0));
}

#[tokio::test]
async fn no_error_repeats_the_value() {
    let bench = Bench::new().await;
    for operation in ["CreateSecret", "PutSecretValue"] {
        let refusal = Bench::refusal("ValidationException", "Value 'canary-5f3a' at 'secretString' is odd");
        bench.proxy.next(operation, 1, refusal);
        let error = bench.store.put(&bench.id("database"), put("canary-5f3a")).await.unwrap_err();
        assert!(!format!("{error} {error:?}").contains("canary"), "{error}");
        bench.put("database", "x").await;
    }
}

#[tokio::test]
async fn a_list_is_of_one_environment_sorted_and_in_pages() {
    let bench = Bench::new().await;
    for name in ["team/c", "team/a", "Team/b", "other", "team/b"] {
        bench.put(name, "x").await;
    }
    bench.store.delete(&bench.id("team/b"), RecoveryWindow::DEFAULT).await.unwrap();
    let neighbour = EnvironmentName::parse(&format!("{}0", bench.environment)).unwrap();
    let foreign = SecretId::new(neighbour.clone(), SecretName::parse("team/d").unwrap());
    let theirs = bench.moto.store(&neighbour, SystemClock::shared()).await;
    theirs.put(&foreign, put("x")).await.unwrap();

    assert_eq!(listed(&bench, "", false).await, ["Team/b", "other", "team/a", "team/c"]);
    assert_eq!(listed(&bench, "team/", false).await, ["team/a", "team/c"]);
    assert_eq!(listed(&bench, "team/", true).await, ["team/a", "team/b", "team/c"]);
    for nothing in ["nothing", "!team", "tea m", "é"] {
        assert!(listed(&bench, nothing, true).await.is_empty(), "{nothing:?}");
    }
    let request = ListRequest { page_token: Some("none".to_owned()), ..ListRequest::default() };
    assert_eq!(reason(bench.store.list(&bench.environment, &request).await), Reason::InvalidArgument);
}

/// The names of all pages, one name a page.
async fn listed(bench: &Bench, prefix: &str, include_deleted: bool) -> Vec<String> {
    let mut request = ListRequest { prefix: prefix.to_owned(), limit: 1, include_deleted, page_token: None };
    let mut names = Vec::new();
    loop {
        let page = bench.store.list(&bench.environment, &request).await.unwrap();
        assert!(page.secrets.len() <= 1);
        for secret in page.secrets {
            assert_eq!(secret.deletion_at.is_some(), include_deleted && secret.name.as_str() == "team/b");
            names.push(secret.name.to_string());
        }
        request.page_token = page.next_page_token;
        if request.page_token.is_none() {
            let distinct: BTreeSet<&String> = names.iter().collect();
            assert_eq!(distinct.len(), names.len());
            return names;
        }
    }
}
