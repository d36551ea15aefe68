//! Many secrets that are due at once, on a whole broker with its embedded store: how many are rotated in a second, what
//! that puts on record, and how the process grows.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use claviger::broker::Call;
use claviger::clock::{Clock, SystemClock};
use claviger::config::assembly::Running;
use claviger::config::{Resolved, RootKeyChoice};
use claviger::environment::{Environment, Registry};
use claviger::identity::Principal;
use claviger::policy::PolicySource;
use claviger::rotation::engine::{Over, Told};
use claviger::rotation::machine::Ending;
use claviger::rotation::record::Rotation;
use claviger::rotation::service::Due;
use claviger::secret::{SecretId, SecretValue, VersionId};
use claviger::store::Put;
use futures_util::StreamExt as _;
use tokio::sync::mpsc;

use crate::{Options, Row, beside, definition, per_second};

const ENVIRONMENT: &str = "production";
const INSTANCE: &str = "benchmark";
/// How many secrets are written at once beforehand.
const AT_ONCE: usize = 64;

pub(crate) async fn measure(options: &Options, folder: &Path) -> Vec<Row> {
    let running = start(options, folder).await;
    eprintln!("writing {} secrets and setting their rotations …", options.secrets);
    prepare(&running, options.secrets).await;
    let (syncs, commits) = (beside::syncs(folder), beside::commits(folder, options.at_once).await);

    let (records, before) = (records(folder), memory("VmRSS"));
    forget_peak();
    eprintln!("rotating them …");
    let begun = Instant::now();
    let rotated = rotate(&running).await;
    let rate = per_second(rotated, begun);
    let (after, peak) = (memory("VmRSS"), memory("VmHWM"));
    assert_eq!(rotated, options.secrets, "every secret is rotated");
    let appended = self::records(folder) - records;
    running.stop().await.unwrap();

    let each = appended as f64 / rotated as f64;
    let at_first = crate::Beside { what: "before", figure: before };
    let name = format!("{} due at once, {} worked on at a time", options.secrets, options.at_once);
    vec![
        Row::new(format!("{name}: rotations"), rate, "/s", Some(&commits)),
        Row::new(format!("{name}: rotations"), rate, "/s", Some(&syncs)),
        Row::new(format!("{name}: durable audit records for each"), each, "", None),
        Row::new(format!("{name}: durable audit records"), each * rate, "/s", Some(&syncs)),
        Row::new(format!("{name}: memory after"), after, "MB", Some(&at_first)),
        Row::new(format!("{name}: memory at its peak"), peak, "MB", Some(&at_first)),
    ]
}

async fn start(options: &Options, folder: &Path) -> Running {
    let registry = Registry::new([Environment::sealed(ENVIRONMENT.parse().unwrap())]).unwrap();
    let root_key = RootKeyChoice::File(folder.join("root.key"));
    let mut resolved = Resolved {
        instance: INSTANCE.to_owned(),
        scheduler: false,
        ..Resolved::new(folder.join("data"), root_key, PolicySource::shipped(), registry)
    };
    resolved.rotation.concurrency = options.at_once;
    Running::start(&resolved, &|_| None, SystemClock::shared()).await.unwrap()
}

/// Writes the secrets, and sets a rotation for each that has just become due.
async fn prepare(running: &Running, secrets: usize) {
    let definition = definition("every 30d");
    let due = SystemClock.now().checked_sub(Duration::from_secs(1)).unwrap();
    let caller = caller("administrators");
    futures_util::stream::iter(0..secrets)
        .for_each_concurrent(AT_ONCE, |number| {
            let (definition, caller) = (definition.clone(), caller.clone());
            async move {
                let id = SecretId::parse(ENVIRONMENT, &format!("payments/service-{number:05}/key")).unwrap();
                let put = Put {
                    value: SecretValue::text(format!("{number:x<40}")).unwrap(),
                    token: VersionId::generate(),
                    labels: Vec::new(),
                    expected: None,
                };
                running.broker.put(&caller, id.clone(), put, false).await.unwrap();
                let ledger = running.rotations.engine().ledger();
                let set = ledger.update(&id, |_| Ok((Some(Rotation::new(definition.clone(), due)), ())));
                set.await.unwrap();
            }
        })
        .await;
}

/// Rotates all that is due, as a cron job asks for it; how many were.
async fn rotate(running: &Running) -> usize {
    let (tell, mut told) = mpsc::channel(1_024);
    let rotating = running.rotations.rotate_due(caller("cron"), None, false, tell);
    let counting = async {
        let mut rotated = 0;
        while let Some(due) = told.recv().await {
            match due {
                Due::Step(_, Told::Over(Over::Ended { ending: Ending::Rotated, .. })) => rotated += 1,
                Due::Step(id, Told::Over(over)) => panic!("{id}: {over:?}"),
                _ => {}
            }
        }
        rotated
    };
    let (done, rotated) = tokio::join!(rotating, counting);
    done.unwrap();
    rotated
}

fn caller(group: &'static str) -> Call {
    Call::internal(Principal::internal("benchmark", [group]), "benchmark")
}

/// How many records the audit log holds, without its own checkpoints.
fn records(folder: &Path) -> usize {
    let segments = fs::read_dir(folder.join("data/audit").join(INSTANCE)).unwrap();
    let paths = segments.map(|entry| entry.unwrap().path());
    let texts = paths.filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    let is_record = |line: &&str| !line.contains("\"kind\":\"checkpoint\"");
    texts.map(|path| fs::read_to_string(path).unwrap().lines().filter(is_record).count()).sum()
}

/// A figure of this process's memory in megabytes.
fn memory(name: &str) -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1_024.0
}

/// Has the kernel count the peak from now on.
fn forget_peak() {
    if let Err(error) = fs::write("/proc/self/clear_refs", "5") {
        eprintln!("the peak counts from the start of the process: {error}");
    }
}
