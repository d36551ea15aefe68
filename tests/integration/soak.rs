//! A day in miniature: everything that callers do, all at once, for as long as `CLAVIGER_SOAK` says (seconds; 600 by
//! default). Memory stays bounded, file descriptors and tasks stay as many as they were.
//!
//! `bash tests/run --soak` runs it; the ordinary run does not, because it takes as long as it is told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use claviger::proto::v1;
use claviger::proto::v1::rotation_service_client::RotationServiceClient;
use rustix::process::Signal;
use tokio_stream::StreamExt as _;

use crate::support::program::{Program, Served};
use crate::support::{channel, secrets};

const NAMES: usize = 50;

/// What grows where something leaks.
#[derive(Debug, Clone, Copy)]
struct Sample {
    resident: u64,
    descriptors: u64,
    tasks: u64,
}

impl Sample {
    async fn of(program: &Program, admin: &str) -> Self {
        let proc = format!("/proc/{}", program.id().as_raw_nonzero());
        let status = std::fs::read_to_string(format!("{proc}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        let resident = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        let descriptors = std::fs::read_dir(format!("{proc}/fd")).unwrap().count() as u64;
        let metrics = crate::support::program::http_get(admin, "/metrics").await.1;
        let tasks = metrics.lines().find_map(|line| line.strip_prefix("claviger_tasks ")).unwrap();
        Self { resident, descriptors, tasks: tasks.parse::<f64>().unwrap() as u64 }
    }
}

fn get(name: usize) -> v1::GetSecretRequest {
    let (environment, name) = ("development".to_owned(), format!("soak/{name}"));
    v1::GetSecretRequest { environment, name, ..Default::default() }
}

fn put(name: usize, value: u64) -> v1::PutSecretRequest {
    v1::PutSecretRequest {
        environment: "development".to_owned(),
        name: format!("soak/{name}"),
        payload: Some(v1::SecretPayload { data: format!("value-{value}").into(), content_type: 1 }),
        client_request_token: claviger::secret::VersionId::generate().to_string(),
        ..Default::default()
    }
}

/// A secret of its own each time, with a rotation that is set, made and removed.
async fn rotated(program: &Program, turn: u64) {
    let (environment, name) = ("development".to_owned(), format!("rotated/{turn}"));
    let first = v1::PutSecretRequest { name: name.clone(), ..put(0, turn) };
    secrets(&program.socket).await.put_secret(first).await.unwrap();
    let mut rotations = RotationServiceClient::new(channel(&program.socket).await);
    let definition = "rotator = \"random\"\nschedule = \"every 30d\"\n".to_owned();
    let set = v1::SetRotationRequest {
        environment: environment.clone(),
        name: name.clone(),
        definition,
        ..Default::default()
    };
    rotations.set_rotation(set).await.unwrap();
    let rotate = v1::RotateRequest {
        environment: environment.clone(),
        name: name.clone(),
        wait: true,
        ..Default::default()
    };
    let mut told = rotations.rotate(rotate).await.unwrap().into_inner();
    let mut result = String::new();
    while let Some(answer) = told.next().await {
        result = answer.unwrap().step.unwrap().result;
    }
    assert_eq!(result, "rotated", "{name}");
    let remove = v1::RemoveRotationRequest { environment, name, ..Default::default() };
    rotations.remove_rotation(remove).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes as long as it is told to; `bash tests/run --soak`"]
async fn nothing_grows_under_everything_that_callers_do() {
    let seconds: u64 = std::env::var("CLAVIGER_SOAK").map_or(600, |text| text.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let Served { mut program, admin, policies, .. } = Served::start(folder.path());
    let mut client = secrets(&program.socket).await;
    for name in 0..NAMES {
        client.put_secret(put(name, 0)).await.unwrap();
    }
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicU64::new(0));
    let mut work = Vec::new();
    for reader in 0..4 {
        let (socket, stop, done) = (program.socket.clone(), Arc::clone(&stop), Arc::clone(&done));
        work.push(tokio::spawn(async move {
            // A connection of its own now and then, as callers come and go.
            while !stop.load(Ordering::Relaxed) {
                let mut client = secrets(&socket).await;
                for turn in 0..200 {
                    client.get_secret(get((reader + turn) % NAMES)).await.unwrap();
                    let missing = v1::GetSecretRequest { name: format!("no/{turn}"), ..get(0) };
                    client.get_secret(missing).await.unwrap_err();
                    done.fetch_add(2, Ordering::Relaxed);
                }
            }
        }));
    }
    {
        let (socket, stop, done) = (program.socket.clone(), Arc::clone(&stop), Arc::clone(&done));
        work.push(tokio::spawn(async move {
            let mut client = secrets(&socket).await;
            let mut value = 0;
            let mut pace = tokio::time::interval(Duration::from_millis(10));
            while !stop.load(Ordering::Relaxed) {
                pace.tick().await;
                value += 1;
                client.put_secret(put(value as usize % NAMES, value)).await.unwrap();
                done.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }
    for watcher in 0..4 {
        let (socket, stop, done) = (program.socket.clone(), Arc::clone(&stop), Arc::clone(&done));
        work.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let mut client = secrets(&socket).await;
                let request = v1::WatchSecretsRequest {
                    environment: "development".to_owned(),
                    prefix: "soak/".to_owned(),
                    consumer: format!("soak-{watcher}"),
                    with_values: true,
                    ..Default::default()
                };
                let mut told = client.watch_secrets(request).await.unwrap().into_inner();
                for _ in 0..200 {
                    told.next().await.unwrap().unwrap();
                    done.fetch_add(1, Ordering::Relaxed);
                }
            }
        }));
    }
    let mut samples = Vec::new();
    let mut tick = tokio::time::interval(Duration::from_secs(5));
    for turn in 0..seconds.div_ceil(5).max(6) {
        tick.tick().await;
        // What operators do.
        let created =
            program.ok(["token", "create", "--workload", "soak", "--expires", "1h", "--output", "json"]);
        let created: serde_json::Value = serde_json::from_str(&created).unwrap();
        program.ok(["token", "revoke", created["token"]["id"].as_str().unwrap()]);
        program.ok(["cache", "purge", "-e", "development"]);
        rotated(&program, turn).await;
        std::fs::write(policies.join("soak.cedar"), format!("// turn {turn}\n")).unwrap();
        samples.push(Sample::of(&program, &admin).await);
    }
    stop.store(true, Ordering::Relaxed);
    for task in work {
        task.abort();
        if let Err(error) = task.await {
            assert!(error.is_cancelled(), "{error}");
        }
    }
    assert!(program.signal(Signal::TERM).success());

    let third = samples.len() / 3;
    let most = |part: &[Sample], of: fn(&Sample) -> u64| part.iter().map(of).max().unwrap();
    let (first, last) = (&samples[third..2 * third], &samples[2 * third..]);
    println!(
        "{} answers in {seconds} s; second third {first:?}; last third {last:?}",
        done.load(Ordering::Relaxed)
    );
    type Bound = (&'static str, fn(&Sample) -> u64, u64);
    let bounds: [Bound; 3] = [
        ("resident KiB", |sample| sample.resident, 16 * 1024),
        ("file descriptors", |sample| sample.descriptors, 8),
        ("tasks", |sample| sample.tasks, 32),
    ];
    for (what, of, slack) in bounds {
        let (before, after) = (most(first, of), most(last, of));
        assert!(
            after <= before + before / 10 + slack,
            "{what}: {before} in the second third, {after} in the last"
        );
    }
}
