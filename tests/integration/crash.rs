//! SIGKILL at any instant: no value is out without its record, and the next start goes on from there.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use claviger::proto::v1;
use rustix::process::Signal;
use tokio::sync::Notify;

use crate::support::program::Program;
use crate::support::secrets;

fn get(environment: &str, name: &str) -> v1::GetSecretRequest {
    v1::GetSecretRequest { environment: environment.to_owned(), name: name.to_owned(), ..Default::default() }
}

/// The request ids of every read on record.
fn on_record(folder: &Path) -> BTreeSet<String> {
    let chain = folder.join("data/audit/dev");
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(chain).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            for line in std::fs::read_to_string(path).unwrap().lines() {
                if let Ok(record) = serde_json::from_str::<serde_json::Value>(line)
                    && record["action"] == "read"
                {
                    found.insert(record["request_id"].as_str().unwrap_or_default().to_owned());
                }
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn b31_sigkill_under_load_loses_no_record_of_a_value_that_left() {
    let folder = tempfile::tempdir().unwrap();
    let mut received = BTreeSet::new();
    for round in 0..5 {
        let mut program = Program::dev(folder.path());
        let replies = Arc::new(Mutex::new(BTreeSet::new()));
        let enough = Arc::new(Notify::new());
        let wanted = 50 + round * 150;
        let mut readers = Vec::new();
        for _ in 0..8 {
            let mut client = secrets(&program.socket).await;
            let (replies, enough) = (Arc::clone(&replies), Arc::clone(&enough));
            readers.push(tokio::spawn(async move {
                while let Ok(reply) = client.get_secret(get("development", "database")).await {
                    let id = reply.metadata().get("x-request-id").unwrap().to_str().unwrap().to_owned();
                    assert!(reply.into_inner().secret.unwrap().payload.is_some());
                    let mut replies = replies.lock().unwrap();
                    replies.insert(id);
                    if replies.len() >= wanted {
                        enough.notify_one();
                    }
                }
            }));
        }
        enough.notified().await;
        program.signal(Signal::KILL);
        for reader in readers {
            reader.await.unwrap();
        }
        received.append(&mut replies.lock().unwrap());
    }
    let recorded = on_record(folder.path());
    let lost: Vec<_> = received.difference(&recorded).collect();
    assert!(lost.is_empty(), "{} values of {} left without a record", lost.len(), received.len());

    // The log that five kills left behind is whole, and the store still opens.
    let mut program = Program::dev(folder.path());
    program.ok(["get", "-e", "development", "database#port"]);
    assert!(program.signal(Signal::TERM).success());
    let audit = folder.path().join("data/audit");
    let key = folder.path().join("data/keys/audit.pub");
    let verify = crate::support::program::claviger([
        "audit".as_ref(),
        "verify".as_ref(),
        "--dir".as_ref(),
        audit.as_os_str(),
        "--public-key".as_ref(),
        key.as_os_str(),
    ])
    .output()
    .unwrap();
    assert!(
        verify.status.success(),
        "{}{}",
        String::from_utf8_lossy(&verify.stdout),
        String::from_utf8_lossy(&verify.stderr)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn b31_sigkill_during_writes_keeps_every_acknowledged_version() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::dev(folder.path());
    let mut client = secrets(&program.socket).await;
    let acknowledged = Arc::new(Mutex::new(Vec::new()));
    let enough = Arc::new(Notify::new());
    let writer = tokio::spawn({
        let (acknowledged, enough) = (Arc::clone(&acknowledged), Arc::clone(&enough));
        async move {
            for n in 0.. {
                let token = format!("{n:032}");
                let request = v1::PutSecretRequest {
                    environment: "development".to_owned(),
                    name: "counter".to_owned(),
                    payload: Some(v1::SecretPayload { data: token.clone().into(), content_type: 1 }),
                    client_request_token: token.clone(),
                    ..Default::default()
                };
                if client.put_secret(request).await.is_err() {
                    return;
                }
                acknowledged.lock().unwrap().push(token);
                if n == 30 {
                    enough.notify_one();
                }
            }
        }
    });
    enough.notified().await;
    program.signal(Signal::KILL);
    writer.await.unwrap();

    let program = Program::dev(folder.path());
    let mut client = secrets(&program.socket).await;
    let acknowledged = acknowledged.lock().unwrap().clone();
    for token in &acknowledged {
        let selector = v1::selector::Selector::VersionId(token.clone());
        let request = v1::GetSecretRequest {
            selector: Some(v1::Selector { selector: Some(selector) }),
            ..get("development", "counter")
        };
        let secret = client.get_secret(request).await.unwrap().into_inner().secret.unwrap();
        assert_eq!(secret.payload.unwrap().data, token.as_bytes());
    }
    let current =
        client.get_secret(get("development", "counter")).await.unwrap().into_inner().secret.unwrap();
    let current: u64 = current.version_id.parse().unwrap();
    assert!(
        current + 1 >= acknowledged.len() as u64,
        "the last acknowledged version or one that was under way"
    );
}

#[test]
fn b30_sigterm_ends_in_good_order() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::dev(folder.path());
    let socket = program.socket.clone();
    assert!(program.signal(Signal::TERM).success());
    assert!(!socket.exists(), "the socket file goes with the broker");
    let chain = folder.path().join("data/audit/dev");
    let last = std::fs::read_dir(chain)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
        .max()
        .unwrap();
    let text = std::fs::read_to_string(last).unwrap();
    let kinds: Vec<_> = text
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["kind"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(kinds[kinds.len() - 2..], ["shutdown", "checkpoint"]);
}
