//! What the figures stand beside: the disk's own commit, and the key-value layer's.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use claviger::clock::SystemClock;
use claviger::kv::embedded::Embedded;
use claviger::kv::{Kv, Transaction, Write};
use tokio::task::JoinSet;

use crate::{Beside, per_second};

/// How long each is measured.
const WINDOW: Duration = Duration::from_secs(3);
/// About as much as the record of a rotation.
const VALUE: usize = 500;

/// Appends of 200 bytes with an `fdatasync` each, one after the other, in a second.
pub(crate) fn syncs(folder: &Path) -> Beside {
    let mut file = File::create(folder.join("syncs")).unwrap();
    let (begun, mut count) = (Instant::now(), 0);
    while begun.elapsed() < WINDOW {
        file.write_all(&[b'x'; 200]).unwrap();
        file.sync_data().unwrap();
        count += 1;
    }
    Beside { what: "fdatasync", figure: per_second(count, begun) }
}

/// Transactions of one write in a second, so many at once.
pub(crate) async fn commits(folder: &Path, at_once: usize) -> Beside {
    let path = folder.join("commits.db");
    let kv: Arc<dyn Kv> = Arc::new(Embedded::open(&path, SystemClock::shared()).await.unwrap());
    let (begun, count) = (Instant::now(), Arc::new(AtomicUsize::new(0)));
    let mut workers = JoinSet::new();
    for worker in 0..at_once {
        let (kv, count) = (Arc::clone(&kv), Arc::clone(&count));
        workers.spawn(async move {
            for n in 0_usize.. {
                if begun.elapsed() >= WINDOW {
                    return;
                }
                let key = format!("commits/{worker}/{}", n % 1_000);
                let write = vec![Write::put(key, vec![b'x'; VALUE])];
                assert!(kv.commit(Transaction { compare: Vec::new(), write }).await.unwrap().succeeded);
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    while let Some(ended) = workers.join_next().await {
        ended.unwrap();
    }
    Beside { what: "bare commits", figure: per_second(count.load(Ordering::Relaxed), begun) }
}
