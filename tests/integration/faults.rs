//! Faults of the broker itself that no other file has: rows B23, B30 to B33, B35 and B38 of the matrix in
//! `tests/README.md`.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use claviger::proto::v1;
use rustix::process::{Resource, Rlimit, Signal};
use tokio::sync::Notify;
use tonic::Code;

use crate::support::program::{Program, Served, claviger, with_input};
use crate::support::{channel, secrets};

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);

fn get(name: &str) -> v1::GetSecretRequest {
    let (environment, name) = ("development".to_owned(), name.to_owned());
    v1::GetSecretRequest { environment, name, ..Default::default() }
}

/// The request ids of every read on record below `chain`.
fn on_record(chain: &std::path::Path) -> BTreeSet<String> {
    let segments = std::fs::read_dir(chain).unwrap().map(|entry| entry.unwrap().path());
    let mut found = BTreeSet::new();
    for path in segments.filter(|path| path.extension().is_some_and(|extension| extension == "jsonl")) {
        for line in std::fs::read_to_string(path).unwrap().lines() {
            let record: serde_json::Value = serde_json::from_str(line).unwrap();
            if record["operation"] == "get" {
                found.insert(record["request_id"].as_str().unwrap().to_owned());
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn b23_a_set_that_locks_everyone_out_is_taken_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let Served { program, policies, .. } = Served::start(folder.path());
    assert!(program.put("development", "x", b"v").status.success());
    for file in std::fs::read_dir(&policies).unwrap().map(|entry| entry.unwrap().path()) {
        let name = file.file_name().unwrap().to_str().unwrap();
        if name.ends_with(".cedar") && name != "development.cedar" {
            std::fs::remove_file(&file).unwrap();
        }
    }
    program.wait_for_log("no policy lets anyone administer the broker");
    program.fails(3, ["token", "list"]);
    assert_eq!(program.ok(["get", "-e", "development", "x"]), "v", "what is still permitted goes on");
    let offline = claviger(["policy".as_ref(), "check".as_ref(), policies.as_os_str()]).output().unwrap();
    let said = String::from_utf8_lossy(&offline.stdout) + String::from_utf8_lossy(&offline.stderr);
    assert!(said.contains("no policy lets anyone administer the broker"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn b30_sigterm_under_load_loses_no_reply_that_had_a_record() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::dev(folder.path());
    let (replies, refused) = (Arc::new(Mutex::new(BTreeSet::new())), Arc::new(Mutex::new(0_u32)));
    let enough = Arc::new(Notify::new());
    let mut readers = Vec::new();
    for _ in 0..8 {
        let channel = channel(&program.socket).await;
        for _ in 0..8 {
            let mut client = v1::secret_service_client::SecretServiceClient::new(channel.clone());
            let (replies, refused, enough) =
                (Arc::clone(&replies), Arc::clone(&refused), Arc::clone(&enough));
            readers.push(tokio::spawn(async move {
                loop {
                    match client.get_secret(get("database")).await {
                        Ok(reply) => {
                            let id =
                                reply.metadata().get("x-request-id").unwrap().to_str().unwrap().to_owned();
                            let mut replies = replies.lock().unwrap();
                            replies.insert(id);
                            if replies.len() == 2_000 {
                                enough.notify_one();
                            }
                        }
                        Err(status) => {
                            assert!(
                                matches!(
                                    status.code(),
                                    Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal
                                ),
                                "{status:?}"
                            );
                            *refused.lock().unwrap() += 1;
                            return;
                        }
                    }
                }
            }));
        }
    }
    tokio::time::timeout(HUNG, enough.notified()).await.expect("replies come");
    assert!(program.signal(Signal::TERM).success(), "an orderly end");
    for reader in readers {
        tokio::time::timeout(HUNG, reader).await.expect("every call ends").unwrap();
    }
    assert_eq!(*refused.lock().unwrap(), 64, "each caller hears of the end once");
    let received = replies.lock().unwrap().clone();
    let recorded = on_record(&folder.path().join("data/audit/dev"));
    let unrecorded: Vec<_> = received.difference(&recorded).collect();
    assert!(unrecorded.is_empty(), "{} values left without a record", unrecorded.len());
    let unsent: Vec<_> = recorded.difference(&received).collect();
    assert!(unsent.is_empty(), "{} replies that had a record did not arrive: {unsent:?}", unsent.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn b31_a_second_sigterm_and_then_sigkill_corrupt_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..3 {
        let mut program = Program::dev(folder.path());
        let put = program.put("development", "kept", format!("value-{round}").as_bytes());
        assert!(put.status.success());
        // A call that never ends holds the drain up.
        let mut stuck = tokio::net::UnixStream::connect(&program.socket).await.unwrap();
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x10";
        tokio::io::AsyncWriteExt::write_all(&mut stuck, preface).await.unwrap();
        rustix::process::kill_process(program.id(), Signal::TERM).unwrap();
        let _ = rustix::process::kill_process(program.id(), Signal::TERM);
        if round % 2 == 0 {
            program.signal(Signal::KILL);
        } else {
            drop(stuck);
            program.signal(Signal::TERM);
        }
        let again = Program::dev(folder.path());
        assert_eq!(again.ok(["get", "-e", "development", "kept"]), format!("value-{round}"));
        let verified = again.ok(["audit", "verify"]);
        assert!(!verified.contains("finding:"), "{verified}");
    }
}

/// Starts a broker that the kernel keeps from having more than `most` of something.
fn limited(folder: &std::path::Path, resource: Resource, most: u64) -> Program {
    let program = Program::dev(folder);
    let limit = Rlimit { current: Some(most), maximum: Some(most) };
    rustix::process::prlimit(Some(program.id()), resource, limit).unwrap();
    program
}

#[tokio::test(flavor = "multi_thread")]
async fn b33_without_file_descriptors_the_broker_lives_on_and_serves_again() {
    let folder = tempfile::tempdir().unwrap();
    let open = |program: &Program| {
        std::fs::read_dir(format!("/proc/{}/fd", program.id().as_raw_nonzero())).unwrap().count() as u64
    };
    let program = Program::dev(folder.path());
    // Whoever is answered knows that all the threads that serve are there, with what they hold open.
    secrets(&program.socket).await.get_secret(get("database")).await.unwrap();
    let most = open(&program) + 8;
    drop(program);
    let program = limited(folder.path(), Resource::Nofile, most);
    let mut known = secrets(&program.socket).await;
    known.get_secret(get("database")).await.unwrap();
    let mut crowd = Vec::new();
    for _ in 0..64 {
        crowd.push(tokio::net::UnixStream::connect(&program.socket).await.unwrap());
    }
    program.wait_for_log("accept failed");
    known.get_secret(get("database")).await.expect("whom it has taken in, it serves");
    drop(crowd);
    let answered = tokio::time::timeout(HUNG, async {
        secrets(&program.socket).await.get_secret(get("database")).await
    });
    answered.await.expect("it takes connections again").expect("and serves them");
}

#[tokio::test(flavor = "multi_thread")]
async fn b32_more_than_memory_holds_is_refused_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let resident = || {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", program.id().as_raw_nonzero())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let mut client = secrets(&program.socket).await;
    client.get_secret(get("database")).await.unwrap();
    let before = resident();
    // 64 MiB of cache for each environment, and 192 MiB of values: what does not fit is not kept.
    for n in 0..3_072 {
        let request = v1::PutSecretRequest {
            environment: "development".to_owned(),
            name: format!("large/{n}"),
            payload: Some(v1::SecretPayload { data: vec![b'x'; 65_536].into(), content_type: 1 }),
            client_request_token: claviger::secret::VersionId::generate().to_string(),
            ..Default::default()
        };
        client.put_secret(request).await.unwrap();
        client.get_secret(get(&format!("large/{n}"))).await.unwrap();
    }
    let grown = resident() - before;
    assert!(grown < 160 * 1024, "{grown} KiB more than before");
    let mut large = Vec::new();
    for _ in 0..64 {
        let mut client = secrets(&program.socket).await;
        large.push(tokio::spawn(async move {
            let field = "x".repeat(8 * 1024 * 1024);
            client.get_secret(v1::GetSecretRequest { field, ..get("database") }).await.unwrap_err().code()
        }));
    }
    for refused in large {
        assert_eq!(refused.await.unwrap(), Code::ResourceExhausted);
    }
    client.get_secret(get("database")).await.expect("and serves on");
}

#[test]
fn b35_exec_without_a_broker_starts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let witness = folder.path().join("started");
    let mut program = Program::dev(folder.path());
    let touch = ["exec", "-e", "development", "--", "touch", witness.to_str().unwrap()];
    assert!(program.signal(Signal::TERM).success());
    let output = with_input(program.command(touch), b"");
    assert_eq!(output.status.code(), Some(125), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!witness.exists(), "the command did not run");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(stderr.contains("[UNAVAILABLE]"), "{stderr}");
}
