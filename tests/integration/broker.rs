//! The broker as a whole, in this process: who gets what, and what is on record of it.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use claviger::broker::{BatchRequest, Read};
use claviger::config::assembly::StartError;
use claviger::error::{Reason, Reasoned};
use claviger::policy::PolicySource;
use claviger::secret::{FieldName, SecretValue, Selector, VersionId};
use claviger::store::{Freshness, ListRequest, Put, RecoveryWindow, Source};

use crate::support::assembled::{
    administrator, clock, get, id, person, program, put, records, resolved, start,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_read_is_decided_cached_and_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    let written = put(&running, id("development", "database"), r#"{"password":"p"}"#).await.unwrap();
    let ana = person("ana", &["team"]);
    let first = get(&running, &ana, id("development", "database")).await.unwrap();
    let second = get(&running, &ana, id("development", "database")).await.unwrap();
    assert_eq!((first.source, second.source), (Source::Store, Source::Cache));
    let read = Read {
        id: id("development", "database"),
        field: Some(FieldName::parse("password").unwrap()),
        selector: Selector::CURRENT,
        if_version_id: None,
    };
    let field = running.broker.get(&ana, read.clone(), Freshness::Cached).await.unwrap();
    assert_eq!(field.value.unwrap().expose_text(), Some("p"));
    let have_it = Read { if_version_id: Some(written.version.id.clone()), ..read };
    assert!(running.broker.get(&ana, have_it, Freshness::Cached).await.unwrap().value.is_none());
    running.stop().await.unwrap();

    let records = records(folder.path());
    let reads: Vec<_> = records.iter().filter(|record| record["action"] == "read").collect();
    assert_eq!(reads.len(), 4);
    assert_eq!(reads[0]["principal"], r#"User::"ana""#);
    assert_eq!(reads[0]["proof"], "token:test");
    assert_eq!(reads[0]["version_id"], written.version.id.as_str());
    assert_eq!(reads[0]["labels"][0], "AWSCURRENT");
    assert_eq!(reads[0]["decision"], "allow");
    assert!(!reads[0]["policies"].as_array().unwrap().is_empty());
    assert_eq!((&reads[0]["source"], &reads[1]["source"]), (&"store".into(), &"cache".into()));
    assert_eq!((&reads[2]["field"], &reads[2]["outcome"]), (&"password".into(), &"ok".into()));
    assert_eq!(reads[3]["outcome"], "unchanged");
    let writes: Vec<_> = records.iter().filter(|record| record["operation"] == "put").collect();
    assert_eq!((&writes[0]["kind"], &writes[1]["kind"]), (&"intent".into(), &"access".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_forbidden_and_what_is_absent_look_alike() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    put(&running, id("production", "database"), "p").await.unwrap();
    let stranger = person("eve", &[]);
    let there = get(&running, &stranger, id("production", "database")).await.unwrap_err();
    let absent = get(&running, &stranger, id("production", "nothing")).await.unwrap_err();
    let nowhere = get(&running, &stranger, id("no-such-place", "database")).await.unwrap_err();
    for error in [&there, &absent, &nowhere] {
        assert_eq!(error.reason(), Reason::Denied);
    }
    assert_eq!(there.to_string().replace("database", "nothing"), absent.to_string());
    // Whoever may read is told the truth.
    let operator = person("ops", &["operators"]);
    let absent = get(&running, &operator, id("production", "nothing")).await.unwrap_err();
    assert_eq!(absent.reason(), Reason::SecretNotFound);
    let undeclared = get(&running, &administrator(), id("no-such-place", "database")).await.unwrap_err();
    assert_eq!(undeclared.reason(), Reason::EnvironmentNotFound);
    running.stop().await.unwrap();
    let denied = records(folder.path()).into_iter().filter(|record| record["outcome"] == "denied").count();
    assert_eq!(denied, 3, "each refusal is on record");
}

#[tokio::test(flavor = "multi_thread")]
async fn dangerous_actions_of_persons_in_production_need_approvals() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    put(&running, id("production", "database"), "1").await.unwrap();
    put(&running, id("production", "database"), "2").await.unwrap();
    let broker = &running.broker;
    let secret = || id("production", "database");
    let error = broker.delete(&administrator(), secret(), RecoveryWindow::DEFAULT).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ApprovalRequired);
    let lead = person("lea", &["leads"]);
    let error = broker.rollback(&lead, secret(), None, None).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ApprovalRequired);
    let engine = program("rotation", &["rotation-engine"]);
    broker.rollback(&engine, secret(), None, None).await.unwrap();
    let now = get(&running, &person("ops", &["operators"]), secret()).await.unwrap();
    assert_eq!(now.value.unwrap().expose_text(), Some("1"));
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decision_also_stands_before_a_cache_hit() {
    let folder = tempfile::tempdir().unwrap();
    let policies = folder.path().join("policies");
    std::fs::create_dir(&policies).unwrap();
    let shipped = claviger::policy::SHIPPED;
    for (file, text) in shipped {
        std::fs::write(policies.join(file), text).unwrap();
    }
    let mut resolved = resolved(folder.path());
    resolved.policy = PolicySource::Directory(policies.clone());
    let running = start(&resolved, clock()).await.unwrap();
    put(&running, id("development", "database"), "p").await.unwrap();
    let ana = person("ana", &["team"]);
    get(&running, &ana, id("development", "database")).await.unwrap();
    assert_eq!(get(&running, &ana, id("development", "database")).await.unwrap().source, Source::Cache);

    std::fs::write(
        policies.join("zz-forbid.cedar"),
        r#"@id("forbid-ana") forbid (principal == User::"ana", action, resource);"#,
    )
    .unwrap();
    running.broker.reload_policy(&administrator()).await.unwrap();
    let error = get(&running, &ana, id("development", "database")).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Denied, "the value is cached, the decision is not");

    std::fs::write(policies.join("zz-forbid.cedar"), "@id(\"broken\") forbid (principal ==").unwrap();
    let error = running.broker.reload_policy(&administrator()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidPolicy);
    let error = get(&running, &ana, id("development", "database")).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Denied, "the last good set stays in force");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_answers_each_item_in_order_with_a_record_each() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    put(&running, id("development", "a"), "1").await.unwrap();
    put(&running, id("development", "b"), "2").await.unwrap();
    put(&running, id("production", "c"), "3").await.unwrap();
    let ana = person("ana", &["team"]);
    let read = |environment: &str, name: &str| {
        Ok(Read { id: id(environment, name), field: None, selector: Selector::CURRENT, if_version_id: None })
    };
    let items = vec![
        read("development", "b"),
        read("production", "c"),
        read("development", "missing"),
        read("development", "a"),
        read("development", "b"),
    ];
    let answers = running.broker.batch(&ana, BatchRequest::Items(items), Freshness::Cached).await.unwrap();
    let texts: Vec<_> = answers
        .iter()
        .map(|answer| match answer {
            Ok(disclosed) => disclosed.value.as_ref().unwrap().expose_text().unwrap().to_owned(),
            Err(error) => error.reason().code().to_owned(),
        })
        .collect();
    assert_eq!(texts, ["2", "DENIED", "SECRET_NOT_FOUND", "1", "2"]);

    let all = BatchRequest::All("development".parse().unwrap());
    let all = running.broker.batch(&ana, all, Freshness::Cached).await.unwrap();
    assert_eq!(all.len(), 2);
    for bad in [0, 501] {
        let items = (0..bad).map(|_| read("development", "a")).collect();
        let error =
            running.broker.batch(&ana, BatchRequest::Items(items), Freshness::Cached).await.unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidArgument);
    }
    running.stop().await.unwrap();
    let records = records(folder.path());
    let of_batch: Vec<_> =
        records.iter().filter(|r| r["operation"] == "batch_get" && r["action"] == "read").collect();
    assert_eq!(of_batch.len(), 5 + 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn b16_a_full_disk_refuses_to_serve_and_recovers_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let resolved = resolved(folder.path());
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().mode(0o700).create(folder.path().join("data")).unwrap();
    let disk = Tmpfs::mount(&folder.path().join("data/audit"));
    let running = start(&resolved, clock()).await.unwrap();
    put(&running, id("development", "database"), "p").await.unwrap();
    let ana = person("ana", &["team"]);
    get(&running, &ana, id("development", "database")).await.unwrap();

    let ballast = disk.fill();
    let mut served = 0;
    let refused = loop {
        match get(&running, &ana, id("development", "database")).await {
            Ok(_) => served += 1,
            Err(error) => break error,
        }
        assert!(served < 10_000, "a full disk must stop the broker");
    };
    assert_eq!(refused.reason(), Reason::AuditUnavailable);
    assert!(running.broker.log().health().is_err());
    let error = put(&running, id("development", "other"), "p").await.unwrap_err();
    assert_eq!(error.reason(), Reason::AuditUnavailable, "no change without its intent on record");

    std::fs::remove_file(ballast).unwrap();
    get(&running, &ana, id("development", "database")).await.unwrap();
    assert!(running.broker.log().health().is_ok());
    let absent = get(&running, &ana, id("development", "other")).await.unwrap_err();
    assert_eq!(absent.reason(), Reason::SecretNotFound, "the refused change was not made");
    running.stop().await.unwrap();
    let report = claviger::audit::verify(&folder.path().join("data/audit"), &keys(&folder), &[]).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    let values_left =
        records(folder.path()).iter().filter(|r| r["action"] == "read" && r["outcome"] == "ok").count();
    assert_eq!(values_left, 1 + served + 1, "one record for each value that left, and no other");
}

#[tokio::test(flavor = "multi_thread")]
async fn b40_a_database_from_the_past_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let resolved = resolved(folder.path());
    let running = start(&resolved, clock()).await.unwrap();
    put(&running, id("development", "database"), "old").await.unwrap();
    running.stop().await.unwrap();
    let database = folder.path().join("data/claviger.db");
    let old = std::fs::read(&database).unwrap();
    let running = start(&resolved, clock()).await.unwrap();
    put(&running, id("development", "database"), "new").await.unwrap();
    running.stop().await.unwrap();
    std::fs::write(&database, old).unwrap();
    let error = start(&resolved, clock()).await.unwrap_err();
    assert!(matches!(error, StartError::RolledBack { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn b40_a_number_in_the_database_does_not_make_an_old_one_new() {
    let folder = tempfile::tempdir().unwrap();
    let resolved = resolved(folder.path());
    let running = start(&resolved, clock()).await.unwrap();
    put(&running, id("development", "database"), "old").await.unwrap();
    running.stop().await.unwrap();
    let database = folder.path().join("data/claviger.db");
    let old = std::fs::read(&database).unwrap();
    let running = start(&resolved, clock()).await.unwrap();
    put(&running, id("development", "database"), "new").await.unwrap();
    running.stop().await.unwrap();
    std::fs::write(&database, old).unwrap();
    // An intruder writes as many changes as it takes, but none of them is a change of a secret.
    let kv = claviger::kv::embedded::Embedded::open(&database, clock()).await.unwrap();
    for n in 0..100_u8 {
        let write = vec![claviger::kv::Write::put("filler", [n])];
        let transaction = claviger::kv::Transaction { compare: Vec::new(), write };
        claviger::kv::Kv::commit(&kv, transaction).await.unwrap();
    }
    kv.close().await.unwrap();
    let error = start(&resolved, clock()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Tampered, "{error}");
    let mut accepted = resolved.clone();
    accepted.accept_loss = true;
    let running = start(&accepted, clock()).await.unwrap();
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_withheld_from_everything_is_on_record_too() {
    let folder = tempfile::tempdir().unwrap();
    let policies = folder.path().join("policies");
    std::fs::create_dir(&policies).unwrap();
    for (file, text) in claviger::policy::SHIPPED {
        std::fs::write(policies.join(file), text).unwrap();
    }
    let forbid = r#"@id("not-that") forbid (principal, action == Action::"read", resource == Secret::"development:b");"#;
    std::fs::write(policies.join("zz.cedar"), forbid).unwrap();
    let mut resolved = resolved(folder.path());
    resolved.policy = PolicySource::Directory(policies);
    let running = start(&resolved, clock()).await.unwrap();
    put(&running, id("development", "a"), "1").await.unwrap();
    put(&running, id("development", "b"), "2").await.unwrap();
    let all = BatchRequest::All("development".parse().unwrap());
    let all = running.broker.batch(&person("ana", &["team"]), all, Freshness::Cached).await.unwrap();
    assert_eq!(all.len(), 1);
    running.stop().await.unwrap();
    let denied: Vec<_> = records(folder.path()).into_iter().filter(|r| r["outcome"] == "denied").collect();
    assert_eq!((denied.len(), &denied[0]["secret"]), (1, &"b".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relaxed_environment_is_recorded_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    let mut resolved = resolved(folder.path());
    let mut relaxed = claviger::environment::Environment::sealed("development".parse().unwrap());
    relaxed.durability = claviger::environment::Durability::Relaxed;
    resolved.registry = claviger::environment::Registry::new([relaxed]).unwrap();
    let running = start(&resolved, clock()).await.unwrap();
    put(&running, id("development", "a"), "1").await.unwrap();
    for _ in 0..20 {
        get(&running, &person("ana", &["team"]), id("development", "a")).await.unwrap();
    }
    let seen = records(folder.path()).iter().filter(|record| record["action"] == "read").count();
    assert_eq!(seen, 20, "each record was written before its reply");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_never_given_a_new_key_and_never_shared() {
    let folder = tempfile::tempdir().unwrap();
    let resolved = resolved(folder.path());
    let running = start(&resolved, clock()).await.unwrap();
    put(&running, id("development", "database"), "p").await.unwrap();
    let error = start(&resolved, clock()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Locked);
    running.stop().await.unwrap();
    drop(running);

    let key = folder.path().join("root.key");
    let kept = std::fs::read(&key).unwrap();
    std::fs::remove_file(&key).unwrap();
    let error = start(&resolved, clock()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidKey, "{error}");
    assert!(!key.exists(), "no key is made for a store that has data");

    claviger::crypto::RootKey::generate().unwrap().create_file(&key).unwrap();
    let error = start(&resolved, clock()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::WrongKey, "{error}");

    std::fs::write(&key, kept).unwrap();
    let running = start(&resolved, clock()).await.unwrap();
    get(&running, &person("ana", &["team"]), id("development", "database")).await.unwrap();
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_end_when_they_are_told_and_when_they_expire() {
    use claviger::crypto::{MacKey, RootKey};
    use claviger::identity::token::{TokenRequest, Tokens};
    use claviger::identity::{Authenticator as _, Presented, PrincipalKind};
    use claviger::kv::embedded::Embedded;

    let folder = tempfile::tempdir().unwrap();
    let clock = clock();
    let kv = Arc::new(Embedded::open(&folder.path().join("kv.db"), clock.clone()).await.unwrap());
    let key = Arc::new(MacKey::create(&RootKey::generate().unwrap(), &[b"test"]).unwrap().0);
    let tokens = Tokens::open(kv.clone(), key.clone(), clock.clone()).await.unwrap();
    let request = |minutes: u64| TokenRequest {
        kind: PrincipalKind::Workload,
        principal: "orders".to_owned(),
        groups: ["services".to_owned()].into(),
        claims: Default::default(),
        expires_in: Duration::from_secs(60 * minutes),
        environments: Default::default(),
        source_addresses: Vec::new(),
        created_by: "test".to_owned(),
    };
    let (record, secret) = tokens.create(request(10)).await.unwrap();
    let (_, other) = tokens.create(request(60)).await.unwrap();
    let presented = |bearer: &SecretValue| Presented { bearer: Some(bearer.clone()), ..Presented::default() };
    let known = tokens.authenticate(&presented(&secret)).await.unwrap().unwrap();
    assert_eq!((known.id(), known.proof().detail.as_str()), ("orders", record.id.as_str()));

    // The secret is nowhere in the store, as text or as bytes.
    let text = secret.expose_text().unwrap().splitn(3, '_').nth(2).unwrap().to_owned();
    let entry =
        claviger::kv::Kv::get(&*kv, format!("token/{}", record.id).as_bytes()).await.unwrap().unwrap();
    let stored = String::from_utf8_lossy(&entry.value);
    assert!(stored.contains("orders") && !stored.contains(&text));

    // A token that was read again from the store is the same token.
    let again = Tokens::open(kv.clone(), key, clock.clone()).await.unwrap();
    assert!(again.authenticate(&presented(&secret)).await.unwrap().is_some());

    let forged = format!("clv_{}_{}", record.id, "A".repeat(43));
    let other_id = other.expose_text().unwrap().replacen(
        other.expose_text().unwrap().split('_').nth(1).unwrap(),
        &record.id,
        1,
    );
    for bad in [forged.as_str(), other_id.as_str(), "clv_", "", "Bearer x", "clv_zz_zz"] {
        let bad = SecretValue::text(bad.to_owned()).unwrap();
        let error = tokens.authenticate(&presented(&bad)).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Unauthenticated);
    }
    clock.advance(Duration::from_secs(600));
    assert!(tokens.authenticate(&presented(&secret)).await.unwrap_err().to_string().contains("expired"));
    assert!(tokens.authenticate(&presented(&other)).await.unwrap().is_some());
    let other_id = other.expose_text().unwrap().split('_').nth(1).unwrap().to_owned();
    tokens.revoke(&other_id).await.unwrap();
    assert!(tokens.authenticate(&presented(&other)).await.unwrap_err().to_string().contains("revoked"));
    assert_eq!(tokens.revoke("../x").await.unwrap_err().reason(), Reason::TokenNotFound);
    assert_eq!(tokens.create(request(0)).await.unwrap_err().reason(), Reason::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_writes_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    let secret = || id("development", "database");
    let put = |value: &str, token: &VersionId| Put {
        value: SecretValue::text(value.to_owned()).unwrap(),
        token: token.clone(),
        labels: Vec::new(),
        expected: None,
    };
    let token = VersionId::generate();
    let broker = &running.broker;
    let error = broker.put(&administrator(), secret(), put("", &token), false).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ValueEmpty);
    let list = ListRequest { limit: 100, ..ListRequest::default() };
    let page = broker.list(&administrator(), "development".parse().unwrap(), &list).await.unwrap();
    assert!(page.secrets.is_empty());
    broker.put(&administrator(), secret(), put("a", &token), false).await.unwrap();
    let retry = broker.put(&administrator(), secret(), put("a", &token), false).await.unwrap();
    assert!(!retry.changed);
    let error = broker.put(&administrator(), secret(), put("b", &token), false).await.unwrap_err();
    assert_eq!(error.reason(), Reason::TokenReused);
    running.stop().await.unwrap();
}

fn keys(folder: &tempfile::TempDir) -> Vec<claviger::audit::VerifyingKey> {
    let text = std::fs::read_to_string(folder.path().join("data/keys/audit.pub")).unwrap();
    vec![claviger::audit::VerifyingKey::parse(text.trim()).unwrap()]
}

/// A small disk of its own; unmounted when it goes.
struct Tmpfs(std::path::PathBuf);

impl Tmpfs {
    fn mount(path: &std::path::Path) -> Self {
        std::fs::create_dir_all(path).unwrap();
        let options = ["-t", "tmpfs", "-o", "size=128k,mode=0700", "tmpfs"];
        let status = Command::new("mount").args(options).arg(path).status().unwrap();
        assert!(status.success(), "mounting a tmpfs takes root");
        Self(path.to_owned())
    }

    /// Takes every free byte but the last page.
    fn fill(&self) -> std::path::PathBuf {
        use std::io::Write as _;
        let ballast = self.0.join("ballast");
        let mut file = std::fs::File::create(&ballast).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        ballast
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
