//! Syncs that nobody waits for, beside the writer.
//!
//! ```text
//!   writer   ├─ write ─┼─ write ─┼─ write ─┼─ write ─┼─ write ─┤      answered as they are written
//!                 │ 100 ms have passed               ▲
//!   beside        └──────── fdatasync ───────────────┘ so far it is on the disk
//! ```
//!
//! What a relaxed environment reads is answered when its record is written, and the disk has it within a tenth of a second.
//! A writer that stopped for that would keep everyone waiting who reads meanwhile: one read in a hundred, at the least.
//!
//! INVARIANT: it only ever says what is on the disk already. After one that failed, nothing is believed before the writer
//! has synced itself: its own opening of the file is told of the same error, and what was lost is written again. One that
//! takes too long is made once more by the writer itself, who is watched.

use std::fs::File;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::super::segment::give_way;

/// How long the writer relies on it.
const PATIENCE: Duration = Duration::from_millis(150);

/// What is on the disk: of the segment that begins with `first`, so many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) first: u64,
    pub(super) bytes: u64,
}

/// See the module. Held by the writer.
#[derive(Default)]
pub(super) struct Beside {
    orders: Option<Sender<(Arc<File>, Mark)>>,
    done: Arc<Mutex<Option<io::Result<Mark>>>>,
    /// Since when one is under way.
    since: Option<Duration>,
}

impl Beside {
    /// Begins to sync `file`, which holds what `mark` says; it is another opening of it than the writer's. False where
    /// that can't be.
    pub(super) fn begin(&mut self, file: Arc<File>, mark: Mark, now: Duration) -> bool {
        if self.orders.is_none() {
            self.orders = self.start();
        }
        let begun = self.orders.as_ref().is_some_and(|orders| orders.send((file, mark)).is_ok());
        if begun {
            self.since = Some(now);
        }
        begun
    }

    /// Whether one is under way, and need not be made again.
    pub(super) fn is_under_way(&self, now: Duration) -> bool {
        self.since.is_some_and(|since| now.saturating_sub(since) < PATIENCE)
    }

    /// When the writer has waited for long enough; `None` where none is under way.
    pub(super) fn due(&self) -> Option<Duration> {
        self.since.map(|since| since + PATIENCE)
    }

    /// How the last one ended, once.
    pub(super) fn ended(&mut self) -> Option<io::Result<Mark>> {
        self.since?;
        let ended = self.done.lock().unwrap_or_else(PoisonError::into_inner).take();
        if ended.is_some() {
            self.since = None;
        }
        ended
    }

    /// The thread, which ends when nobody can order anything any more; a disk that does not answer is not waited for.
    fn start(&self) -> Option<Sender<(Arc<File>, Mark)>> {
        let (orders, received): (_, Receiver<(Arc<File>, Mark)>) = channel();
        let done = Arc::clone(&self.done);
        let work = move || {
            give_way(10);
            for (file, mark) in received {
                let synced = file.sync_data().map(|()| mark);
                drop(file);
                *done.lock().unwrap_or_else(PoisonError::into_inner) = Some(synced);
            }
        };
        let thread = thread::Builder::new().name("claviger-sync".to_owned()).spawn(work);
        thread.is_ok().then_some(orders)
    }
}
