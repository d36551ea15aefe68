//! The root key gives way to another one while everyone reads and writes, and whatever happens meanwhile.

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use claviger::broker::Read;
use claviger::broker::keys::{RootKeyProgress, RootKeyRotated};
use claviger::config::RootKeyChoice;
use claviger::config::assembly::Running;
use claviger::crypto::{CryptoError, KeyRing, RootKey, Slot};
use claviger::error::{Reason, Reasoned};
use claviger::proto::v1::key_service_client::KeyServiceClient;
use claviger::proto::v1::{self, batch_get_secrets_result};
use claviger::secret::{ContentType, EnvironmentName, SecretName, SecretValue, Selector, VersionId};
use claviger::store::Freshness;
use futures_util::StreamExt as _;
use rustix::process::Signal;
use tokio::sync::watch;

use crate::support::assembled::{
    BrokerResult, administrator, clock, id, person, put, records, resolved, start,
};
use crate::support::program::{Program, Served, claviger};
use crate::support::{channel, secrets};

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);

async fn rotate(running: &Running, rewrap_only: bool) -> BrokerResult<RootKeyRotated> {
    let (told, _progress) = watch::channel(RootKeyProgress::default());
    let (_not_yet, stop) = watch::channel(false);
    running.broker.rotate_root_key(&administrator(), rewrap_only, told, stop).await
}

/// A value as the store has it now, past the cache.
async fn stored(running: &Running, name: &str, selector: Selector) -> BrokerResult<String> {
    let read = Read { id: id("development", name), field: None, selector, if_version_id: None };
    let disclosed = running.broker.get(&person("ana", &["team"]), read, Freshness::Refresh).await?;
    Ok(disclosed.value.unwrap().expose_text().unwrap().to_owned())
}

fn name(number: usize) -> String {
    format!("team/secret-{number}")
}

const SECRETS: usize = 520;

/// Secrets of up to three versions.
async fn stock(running: &Running) {
    for round in 0..3 {
        let numbers = (0..SECRETS).filter(|number| round == 0 || number % 10 == 0);
        let puts = numbers.map(|number| async move {
            put(running, id("development", &name(number)), &format!("{number} in round {round}"))
                .await
                .unwrap();
        });
        futures_util::stream::iter(puts).buffer_unordered(32).collect::<Vec<()>>().await;
    }
}

async fn all_are_there(running: &Running) {
    for number in 0..SECRETS {
        let last = if number % 10 == 0 { 2 } else { 0 };
        let current = stored(running, &name(number), Selector::CURRENT).await.unwrap();
        assert_eq!(current, format!("{number} in round {last}"));
        if last > 0 {
            let previous = Selector::Label(claviger::secret::Label::Previous);
            let previous = stored(running, &name(number), previous).await.unwrap();
            assert_eq!(previous, format!("{number} in round {}", last - 1));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_and_writers_go_on_while_the_root_key_is_rotated() {
    let folder = tempfile::tempdir().unwrap();
    let running = Arc::new(start(&resolved(folder.path()), clock()).await.unwrap());
    stock(&running).await;
    let before = running.broker.key_status(&administrator()).await.unwrap().root_keys;
    let [old] = &before[..] else { panic!("one root key: {before:?}") };
    // 624 values, the store's own key and the broker's.
    assert_eq!((old.wrapped, old.in_force), (SECRETS as u64 + 2 * 52 + 2, true));

    let ended = Arc::new(AtomicBool::new(false));
    let (reads, written) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let reader = tokio::spawn({
        let (running, ended, reads) = (Arc::clone(&running), Arc::clone(&ended), Arc::clone(&reads));
        async move {
            for number in (0..SECRETS).cycle() {
                let current = stored(&running, &name(number), Selector::CURRENT).await.unwrap();
                assert!(current.starts_with(&format!("{number} in round ")), "{current}");
                reads.fetch_add(1, Ordering::Relaxed);
                if ended.load(Ordering::Relaxed) {
                    return;
                }
            }
        }
    });
    let writer = tokio::spawn({
        let (running, ended, written) = (Arc::clone(&running), Arc::clone(&ended), Arc::clone(&written));
        async move {
            for number in 0.. {
                put(&running, id("development", &format!("late/{number}")), &format!("late {number}"))
                    .await
                    .unwrap();
                let again = format!("late {number}, again");
                put(&running, id("development", &format!("late/{number}")), &again).await.unwrap();
                assert_eq!(
                    stored(&running, &format!("late/{number}"), Selector::CURRENT).await.unwrap(),
                    again
                );
                written.fetch_add(1, Ordering::Relaxed);
                if ended.load(Ordering::Relaxed) {
                    return;
                }
            }
        }
    });
    let both_work = async {
        while reads.load(Ordering::Relaxed) == 0 || written.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(HUNG, both_work).await.expect("hung");
    let rotated = tokio::time::timeout(HUNG, rotate(&running, false)).await.expect("hung").unwrap();
    ended.store(true, Ordering::Relaxed);
    reader.await.unwrap();
    writer.await.unwrap();
    assert!(rotated.counts.rewrapped >= old.wrapped, "{rotated:?}");

    let after = running.broker.key_status(&administrator()).await.unwrap().root_keys;
    let written = written.load(Ordering::Relaxed);
    assert_eq!(after[0].id, rotated.id);
    assert_eq!((after[0].in_force, after[0].wrapped), (true, old.wrapped + 2 * written as u64));
    assert_eq!((after[1].id.as_str(), after[1].in_force, after[1].wrapped), (old.id.as_str(), false, 0));
    all_are_there(&running).await;
    running.stop().await.unwrap();
    drop(running);

    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    all_are_there(&running).await;
    for number in 0..written {
        let late = stored(&running, &format!("late/{number}"), Selector::CURRENT).await.unwrap();
        assert_eq!(late, format!("late {number}, again"));
    }
    running.stop().await.unwrap();
    drop(running);

    // The key that was retired opens the store no longer, and the error says what does.
    let mut with_retired = resolved(folder.path());
    with_retired.root_key = RootKeyChoice::File(PathBuf::from(rotated.retired.unwrap()));
    let error = start(&with_retired, clock()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::WrongKey);
    let text = error.to_string();
    assert!(text.contains(&rotated.id) && text.contains("root_key.previous"), "{text}");

    let records = records(folder.path());
    let rotations: Vec<_> =
        records.iter().filter(|record| record["operation"] == "rotate_root_key").collect();
    assert_eq!((&rotations[0]["kind"], &rotations[1]["kind"]), (&"intent".into(), &"access".into()));
    let detail = rotations[1]["detail"].as_str().unwrap();
    assert!(detail.contains(&rotated.id) && detail.contains("keys wrapped anew"), "{detail}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_administers_the_broker_sees_or_rotates_its_keys() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    let ana = person("ana", &["team"]);
    let (told, _progress) = watch::channel(RootKeyProgress::default());
    let (_not_yet, stop) = watch::channel(false);
    let errors = [
        running.broker.key_status(&ana).await.err().unwrap(),
        running.broker.rotate_root_key(&ana, false, told, stop).await.err().unwrap(),
        running.broker.rotate_audit_key(&ana).await.err().unwrap(),
    ];
    assert!(errors.iter().all(|error| error.reason() == Reason::Denied), "{errors:?}");
    assert!(!folder.path().join("root.key.next").exists());
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_that_is_told_to_stop_is_gone_on_with_after_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    stock(&running).await;
    let (told, mut progress) = watch::channel(RootKeyProgress::default());
    let (tell, stop) = watch::channel(false);
    let broker = Arc::clone(&running.broker);
    let call = administrator();
    let rotation = tokio::spawn(async move { broker.rotate_root_key(&call, false, told, stop).await });
    progress.changed().await.unwrap();
    tell.send_replace(true);
    let ended = tokio::time::timeout(HUNG, rotation).await.expect("hung").unwrap();
    // It may have been through before it heard.
    if let Err(error) = &ended {
        assert_eq!(error.reason(), Reason::Unavailable, "{error}");
    }
    running.stop().await.unwrap();
    drop(running);
    let next = folder.path().join("root.key.next").exists();

    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    let unfinished = running.warnings.iter().any(|warning| warning.contains("claviger key rotate"));
    assert_eq!(unfinished, next, "{:?}", running.warnings);
    all_are_there(&running).await;
    let rotated = rotate(&running, !next).await.unwrap();
    let keys = running.broker.key_status(&administrator()).await.unwrap().root_keys;
    assert_eq!((keys[0].id.as_str(), keys[0].wrapped), (rotated.id.as_str(), SECRETS as u64 + 2 * 52 + 2));
    assert!(!folder.path().join("root.key.next").exists());
    all_are_there(&running).await;
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_given_takes_over_from_the_previous_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut configuration = resolved(folder.path());
    let running = start(&configuration, clock()).await.unwrap();
    put(&running, id("development", "database"), "value").await.unwrap();
    running.stop().await.unwrap();
    drop(running);

    let first = configuration.root_key.clone();
    let made = |file: &str| {
        let path = folder.path().join(file);
        RootKey::generate().unwrap().create_file(&path).unwrap();
        RootKeyChoice::File(path)
    };
    configuration.root_key = made("second.key");
    for (previous, reason) in [
        (vec![], Reason::WrongKey),
        (vec![made("unrelated.key")], Reason::WrongKey),
        (vec![first.clone(), RootKeyChoice::File(folder.path().join("none.key"))], Reason::InvalidKey),
    ] {
        configuration.previous_root_keys = previous;
        let error = start(&configuration, clock()).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
    }

    configuration.previous_root_keys = vec![first];
    let running = start(&configuration, clock()).await.unwrap();
    assert!(running.warnings.iter().any(|warning| warning.contains("is not in force yet")));
    assert_eq!(stored(&running, "database", Selector::CURRENT).await.unwrap(), "value");
    let rotated = rotate(&running, false).await.unwrap();
    assert_eq!(rotated.retired, None, "the keys are not the broker's to move");
    running.stop().await.unwrap();
    drop(running);

    configuration.previous_root_keys = Vec::new();
    let running = start(&configuration, clock()).await.unwrap();
    assert_eq!(stored(&running, "database", Selector::CURRENT).await.unwrap(), "value");
    let keys = running.broker.key_status(&administrator()).await.unwrap().root_keys;
    assert_eq!(
        keys.iter().map(|key| (key.id.as_str(), key.wrapped)).collect::<Vec<_>>(),
        [(&*rotated.id, 3)]
    );
    running.stop().await.unwrap();
}

/// A configuration whose root key is in a variable, as the one on one machine has it in a credential: not in a file that
/// the broker may write.
fn with_key_in_a_variable(folder: &Path, previous: &str) -> PathBuf {
    let (config, _) = Served::configure(folder, "", "");
    let text = std::fs::read_to_string(&config).unwrap();
    let file = format!("file = \"{}/root.key\"", folder.display());
    assert!(text.contains(&file));
    std::fs::write(&config, text.replace(&file, &format!("environment = \"ROOT_KEY\"\n{previous}"))).unwrap();
    config
}

#[test]
fn a_key_that_is_not_the_broker_s_to_make_is_rotated_to_one_that_is_given_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("broker.sock");
    let (first, second) = ("0123456789abcdef".repeat(4), "fedcba9876543210".repeat(4));
    let config = with_key_in_a_variable(folder.path(), "");
    let mut program = Program::serve(&config, &socket, &[("ROOT_KEY", &*first)]);
    assert!(program.put("development", "database", b"value").status.success());
    let before = status(&program);
    let refused = program.fails(6, ["key", "rotate"]);
    for part in
        ["[CONFLICT]", "nothing was changed", "variable ROOT_KEY", "under root_key.previous", "restart"]
    {
        assert!(refused.contains(part), "{part} in {refused}");
    }
    assert!(!refused.contains("can go"), "none is configured: {refused}");
    let said = program.ok(["key", "rotate", "--rewrap-only"]);
    assert!(said.contains("0 of 3 keys wrapped anew; everything was under it already"), "{said}");
    assert_eq!(status(&program), before);
    assert!(program.signal(Signal::TERM).success());

    let previous = "[[root_key.previous]]\nenvironment = \"FORMER_KEY\"";
    let config = with_key_in_a_variable(folder.path(), previous);
    let variables = [("ROOT_KEY", &*second), ("FORMER_KEY", &*first)];
    let mut program = Program::serve(&config, &socket, &variables);
    let said = program.ok(["key", "rotate"]);
    assert!(said.contains("3 of 3 keys wrapped anew") && said.contains("root_key.previous can go"), "{said}");
    let refused = program.fails(6, ["key", "rotate"]);
    assert!(refused.contains("root_key.previous names now can go"), "{refused}");
    assert!(program.signal(Signal::TERM).success());

    let config = with_key_in_a_variable(folder.path(), "");
    let mut program = Program::serve(&config, &socket, &[("ROOT_KEY", &*second)]);
    assert_eq!(program.ok(["get", "-e", "development", "database"]), "value");
    assert!(program.signal(Signal::TERM).success());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_brokers_may_share_a_key_file_and_the_second_is_told_where_its_key_went() {
    let folder = tempfile::tempdir().unwrap();
    let one = resolved(folder.path());
    let mut other = one.clone();
    other.directory = folder.path().join("other");
    let first = start(&one, clock()).await.unwrap();
    let second = start(&other, clock()).await.unwrap();
    put(&second, id("development", "database"), "value").await.unwrap();
    let retired = rotate(&first, false).await.unwrap().retired.unwrap();
    second.stop().await.unwrap();
    drop(second);

    let error = start(&other, clock()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::WrongKey, "{error}");
    let text = error.to_string();
    assert!(text.contains(&format!("{retired} is that key")), "{text}");
    assert!(text.contains("root_key.previous"), "{text}");
    other.previous_root_keys = vec![RootKeyChoice::File(PathBuf::from(retired))];
    let second = start(&other, clock()).await.unwrap();
    assert_eq!(stored(&second, "database", Selector::CURRENT).await.unwrap(), "value");
    assert_eq!(rotate(&second, false).await.unwrap().retired, None);
    second.stop().await.unwrap();
    drop(second);

    other.previous_root_keys = Vec::new();
    let second = start(&other, clock()).await.unwrap();
    assert_eq!(stored(&second, "database", Selector::CURRENT).await.unwrap(), "value");
    second.stop().await.unwrap();
    first.stop().await.unwrap();
}

/// What the killed broker below holds: the names and their current values.
type Expected = BTreeMap<String, String>;

async fn fill(program: &Program) -> Expected {
    let client = secrets(&program.socket).await;
    let expected: Expected =
        (0..300).map(|number| (format!("k-{number}"), format!("value {number}"))).collect();
    let puts = expected.iter().map(|(name, value)| {
        let mut client = client.clone();
        async move {
            let request = v1::PutSecretRequest {
                environment: "development".to_owned(),
                name: name.clone(),
                payload: Some(v1::SecretPayload { data: value.clone().into(), content_type: 1 }),
                client_request_token: VersionId::generate().to_string(),
                ..Default::default()
            };
            client.put_secret(request).await.unwrap();
        }
    });
    futures_util::stream::iter(puts).buffer_unordered(16).collect::<Vec<()>>().await;
    expected
}

async fn assert_all_read(program: &Program, expected: &Expected) {
    let request = v1::BatchGetSecretsRequest {
        all_in_environment: "development".to_owned(),
        refresh: true,
        ..Default::default()
    };
    let mut client = secrets(&program.socket).await;
    let results = client.batch_get_secrets(request).await.unwrap().into_inner().results;
    let read: Expected = results
        .into_iter()
        .map(|result| match result.result.unwrap() {
            batch_get_secrets_result::Result::Secret(secret) => {
                let value = secret.payload.unwrap().data;
                (secret.name, String::from_utf8(value.to_vec()).unwrap())
            }
            batch_get_secrets_result::Result::Problem(problem) => panic!("{problem:?}"),
        })
        .filter(|(name, _)| name.starts_with("k-"))
        .collect();
    assert!(read == *expected, "{} of {} values are as they were", read.len(), expected.len());
}

/// Asks for a rotation and looks at its first steps; whether it ended within them. Nobody looks at the rest.
async fn begin_rotation(program: &Program, steps: usize) -> bool {
    let mut keys = KeyServiceClient::new(channel(&program.socket).await);
    let request = v1::RotateRootKeyRequest::default();
    let mut stream = keys.rotate_root_key(request).await.unwrap().into_inner();
    for _ in 0..steps {
        if stream.message().await.unwrap().expect("an end is said").finished {
            return true;
        }
    }
    false
}

fn key_files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder.join("data/keys")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("root.key")).collect();
    names.sort();
    names
}

fn status(program: &Program) -> serde_json::Value {
    serde_json::from_str(&program.ok(["key", "status", "--output", "json"])).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_survives_sigkill_at_any_point() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::dev(folder.path());
    let expected = fill(&program).await;
    // How many steps of the rotation are seen, and how many reads are made, until the kill.
    let points =
        [(0, 0), (0, 1), (1, 0), (1, 2), (2, 0), (0, 5), (2, 3), (3, 0), (0, 12), (4, 1), (5, 0), (99, 0)];
    let mut retired = 0;
    for (steps, reads) in points {
        let mut client = secrets(&program.socket).await;
        let finished = begin_rotation(&program, steps).await;
        for read in 0..reads {
            let request = v1::GetSecretRequest {
                environment: "development".to_owned(),
                name: format!("k-{read}"),
                refresh: true,
                ..Default::default()
            };
            client.get_secret(request).await.unwrap();
        }
        program.signal(Signal::KILL);

        let files = key_files(folder.path());
        assert!(files.contains(&"root.key".to_owned()), "{files:?}");
        let known = |name: &String| {
            matches!(name.as_str(), "root.key" | "root.key.next" | "root.key.unfinished")
                || name.starts_with("root.key.retired-")
        };
        assert!(files.iter().all(known), "{files:?}");
        let now_retired = files.iter().filter(|name| name.contains("retired")).count();
        assert!(now_retired >= retired + usize::from(finished), "no key is ever lost: {files:?}");
        retired = now_retired;
        program = Program::dev(folder.path());
        let warned = program.log().contains("run `claviger key rotate`");
        assert_eq!(warned, files.contains(&"root.key.next".to_owned()), "{}", program.log());
        assert_all_read(&program, &expected).await;
    }

    // Asked again, it is completed.
    let ended = program.ok(["key", "rotate", "--output", "json"]);
    let ended: serde_json::Value = serde_json::from_str(&ended).unwrap();
    let files = key_files(folder.path());
    let plain = |name: &String| name == "root.key" || name.starts_with("root.key.retired-");
    assert!(files.iter().all(plain), "{files:?}");
    assert!(Path::new(ended["retired"].as_str().unwrap()).exists());
    let shown = status(&program);
    let in_use: Vec<_> =
        shown["root_keys"].as_array().unwrap().iter().filter(|key| key["wrapped"] != 0).collect();
    let [key] = &in_use[..] else { panic!("one key wraps all: {shown}") };
    assert_eq!((&key["id"], &key["in_force"]), (&ended["root_key_id"], &true.into()));
    let file = folder.path().join("data/keys/root.key");
    assert_eq!(key["origin"], format!("file {}", file.display()));

    program.signal(Signal::KILL);
    let mut program = Program::dev(folder.path());
    assert!(!program.log().contains("run `claviger key rotate`"), "{}", program.log());
    assert_all_read(&program, &expected).await;
    let only = status(&program);
    assert_eq!(only["root_keys"].as_array().unwrap().len(), 1, "{only}");
    assert!(program.signal(Signal::TERM).success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_goes_on_when_nobody_looks_any_more() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let expected = fill(&program).await;
    assert!(!begin_rotation(&program, 0).await);
    let through = async {
        loop {
            let mut keys = KeyServiceClient::new(channel(&program.socket).await);
            let request = v1::GetKeyStatusRequest::default();
            let shown = keys.get_key_status(request).await.unwrap().into_inner().root_keys;
            let files = key_files(folder.path());
            if shown.len() == 2 && shown[1].wrapped == 0 && files.iter().any(|name| name.contains("retired"))
            {
                return;
            }
        }
    };
    tokio::time::timeout(HUNG, through).await.expect("the rotation is not through");
    assert_all_read(&program, &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_rotated_and_shown_from_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::dev(folder.path());
    let before = status(&program);
    let wrapped = before["root_keys"][0]["wrapped"].as_u64().unwrap();
    assert_eq!(wrapped, 14, "12 samples, the store's own key and the broker's");
    let said = program.ok(["key", "rotate", "--reason", "a drill"]);
    assert!(said.starts_with("root key ") && said.contains("14 of 14 keys wrapped anew"), "{said}");
    let said = program.ok(["key", "rotate", "--rewrap-only"]);
    assert!(said.contains("0 of 14 keys wrapped anew; everything was under it already"), "{said}");
    assert!(!said.contains("root_key.previous"), "none is configured: {said}");
    let text = program.ok(["key", "status"]);
    for part in ["ROOT KEY", "in force", "root.key.retired-", "AUDIT KEY"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let secret = std::fs::read_to_string(folder.path().join("data/keys/root.key")).unwrap();
    assert!(!text.contains(secret.trim()));

    let rotated = program.ok(["key", "rotate", "--audit", "--output", "json"]);
    let rotated: serde_json::Value = serde_json::from_str(&rotated).unwrap();
    let shown = status(&program);
    assert_eq!(shown["audit_keys"][0], rotated["audit_key"]);
    assert_eq!(shown["audit_keys"].as_array().unwrap().len(), 2, "{shown}");
    assert_eq!(
        shown["audit_keys"][1],
        serde_json::json!({
            "id": before["audit_keys"][0]["id"],
            "public_key": before["audit_keys"][0]["public_key"],
            "in_force": false,
        })
    );
    assert!(program.signal(Signal::TERM).success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_made_where_none_is_and_starts_a_broker() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("root.key");
    let init = |path: &Path| {
        claviger(["key".as_ref(), "init".as_ref(), "--file".as_ref(), path.as_os_str()]).output().unwrap()
    };
    let made = init(&path);
    let (said, advice) = (String::from_utf8(made.stdout).unwrap(), String::from_utf8(made.stderr).unwrap());
    assert!(made.status.success(), "{advice}");
    assert!(said.contains(path.to_str().unwrap()) && advice.contains("keep a copy"), "{said}{advice}");
    let hex = std::fs::read_to_string(&path).unwrap();
    assert!(!said.contains(hex.trim()) && !advice.contains(hex.trim()));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);

    let link = folder.path().join("link");
    symlink(folder.path().join("nowhere"), &link).unwrap();
    for taken in [&path, &link] {
        let refused = init(taken);
        let stderr = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("never overwritten") && stderr.contains("[INVALID_KEY]"), "{stderr}");
    }
    assert_eq!(init(&folder.path().join("no/root.key")).status.code(), Some(1));
    assert_eq!(claviger(["key", "init"]).output().unwrap().status.code(), Some(2));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), hex);

    let running = start(&resolved(folder.path()), clock()).await.unwrap();
    let keys = running.broker.key_status(&administrator()).await.unwrap().root_keys;
    assert!(said.contains(&keys[0].id), "{said}");
    running.stop().await.unwrap();
}

#[test]
fn b39_a_ciphertext_of_0_to_40_bytes_is_a_typed_error() {
    let environment = EnvironmentName::parse("production").unwrap();
    let name = SecretName::parse("database").unwrap();
    let version_id = VersionId::generate();
    let slot = Slot {
        store_id: uuid::Uuid::from_u128(7),
        environment: &environment,
        name: &name,
        version_id: &version_id,
        content_type: ContentType::Text,
    };
    let earlier = RootKey::generate().unwrap();
    let sealed = earlier.seal(&slot, &SecretValue::text("value".to_owned()).unwrap()).unwrap();
    let ring = KeyRing::of(RootKey::generate().unwrap()).with(earlier);
    for length in 0..=40 {
        let cut = &sealed[..length];
        assert_eq!(ring.open(&slot, cut).unwrap_err(), CryptoError::Malformed, "{length} bytes");
        assert_eq!(ring.rewrap(&slot, cut).unwrap_err(), CryptoError::Malformed, "{length} bytes");
    }
    assert_eq!(ring.open(&slot, &sealed).unwrap().expose_text(), Some("value"));
}
