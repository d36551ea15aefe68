//! The next segment, prepared beside the log while the one before it fills up.
//!
//! ```text
//!                     0       1/8                          5/8              full
//!   this segment      ├────────┼────────────────────────────┼────────────────┤
//!                              │ zeros, two bytes for each  │ ready          └─▶ renamed, and gone on with
//!   next.prepared              │ that the log grows by      │
//!                              ├0 0 0 0┼0 0 0 0┼0 0 0 0┼0 0 0 0┤
//!                                pieces, each synced before the next
//! ```
//!
//! A broker that writes little prepares nothing, and zeros are written only as fast as the log grows: between two pieces
//! the disk is the log's. The work is done by a thread of its own, which has files and no names: whatever becomes of it
//! while the disk does not answer, it can do nothing to the folder. The same thread trims the segment that is full.
//!
//! Where there is little room, where the file system writes elsewhere what is overwritten, and after any error, the log
//! goes on with files that grow, until the next segment at least.

use std::fs::File;
use std::io;
use std::mem;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::folder::free_permille;
use super::{Folder, Segment, give_way};

/// How many zeros are written at once.
const PIECE: usize = 64 << 10;
const PIECE_BYTES: u64 = PIECE as u64;
/// The size of the smallest segments that are worth it, in bytes.
const SMALLEST: u64 = 16 << 10;
/// How many segments must find room on the disk.
const ROOM: u64 = 4;
/// How much of the disk must be free, in thousandths.
const LEAST_FREE: u32 = 100;
/// How long a thread that is to end is waited for; it is at one piece.
const PATIENCE: Duration = Duration::from_secs(1);

/// See the module. Held by the writer.
#[derive(Debug)]
pub(in crate::audit) struct Preparer {
    /// The size of a segment.
    bytes: u64,
    stage: Stage,
    worker: Option<Worker>,
}

#[derive(Debug)]
enum Stage {
    /// Nothing is needed yet.
    Idle,
    /// The file is filled, up to where it is allowed; or it is full, or has failed, which only the desk knows.
    Filling { file: File, allowed: u64 },
    /// Nothing is prepared before the next segment.
    GivenUp,
}

#[derive(Debug)]
struct Worker {
    desk: Arc<Desk>,
    thread: JoinHandle<()>,
}

impl Preparer {
    /// For segments of `bytes`. Removes what an earlier run left.
    pub(in crate::audit) fn new(folder: &Folder, bytes: u64) -> Self {
        folder.discard_next();
        Self { bytes, stage: Stage::Idle, worker: None }
    }

    /// Prepares as much as a segment needs that `taken` bytes were written to in this run. Does not wait for the disk.
    pub(in crate::audit) fn follow(&mut self, folder: &Folder, taken: u64) {
        let beginning = self.bytes / 8;
        if taken <= beginning || self.bytes < SMALLEST {
            return;
        }
        match &mut self.stage {
            Stage::Idle => self.begin(folder),
            Stage::Filling { allowed, .. } => {
                let due = PIECE_BYTES.saturating_add((taken - beginning).saturating_mul(2)).min(self.bytes);
                let is_worth_a_word = due == self.bytes || due >= allowed.saturating_add(PIECE_BYTES);
                if due > *allowed && is_worth_a_word {
                    *allowed = due;
                    self.allow(due);
                }
            }
            Stage::GivenUp => {}
        }
    }

    /// The file for the next segment, where it is ready: as many zeros as a segment has bytes, on the disk. The segment
    /// that this is asked for is another one than before.
    pub(in crate::audit) fn take(&mut self, folder: &Folder) -> Option<File> {
        let Stage::Filling { file, .. } = mem::replace(&mut self.stage, Stage::Idle) else { return None };
        match self.progress() {
            Progress::Ready => {
                self.change(|state| state.order = None);
                Some(file)
            }
            Progress::UnderWay => {
                // It comes too late for this one, and is all the more needed.
                self.stage = Stage::Filling { file, allowed: self.bytes };
                self.allow(self.bytes);
                None
            }
            Progress::Failed => {
                self.change(|state| state.order = None);
                folder.discard_next();
                None
            }
        }
    }

    /// Trims a segment that is full, where it needs that, without keeping the log waiting.
    pub(in crate::audit) fn retire(&mut self, mut full: Segment) {
        if !full.is_prepared() {
            if full.is_roomy() {
                // Where it fails, a little of the disk stays taken until the segment is removed.
                let _ = full.trim();
            }
            return;
        }
        let waiting = match self.worker() {
            Ok(worker) => worker.desk.retire(full),
            Err(_) => vec![full],
        };
        waiting.into_iter().for_each(finish);
    }

    /// Gives back what was prepared: the log needs the room itself.
    pub(in crate::audit) fn release(&mut self, folder: &Folder) {
        if !matches!(self.stage, Stage::Filling { .. }) {
            return;
        }
        self.stage = Stage::GivenUp;
        self.change(|state| state.order = None);
        folder.discard_next();
        tracing::info!("audit log: the segment prepared ahead was given up for its room on the disk");
    }

    /// Ends. Nothing is left in the folder, unless the disk does not answer; then the next start removes it.
    pub(in crate::audit) fn stop(&mut self, folder: &Folder) {
        self.stage = Stage::GivenUp;
        if self.end() {
            folder.discard_next();
        }
    }

    fn begin(&mut self, folder: &Folder) {
        match self.try_begin(folder) {
            Ok((file, allowed)) => self.stage = Stage::Filling { file, allowed },
            Err(error) => {
                give_up(&error);
                folder.discard_next();
                self.stage = Stage::GivenUp;
            }
        }
    }

    fn try_begin(&mut self, folder: &Folder) -> io::Result<(File, u64)> {
        let file = folder.create_next()?;
        check(&file, 0, self.bytes)?;
        let (bytes, allowed) = (self.bytes, PIECE_BYTES.min(self.bytes));
        let order =
            Order { file: Arc::new(file.try_clone()?), bytes, allowed, written: 0, has_failed: false };
        self.worker()?.desk.change(|state| state.order = Some(order));
        Ok((file, allowed))
    }

    /// The thread, started where there is none.
    fn worker(&mut self) -> io::Result<&Worker> {
        if self.worker.as_ref().is_some_and(|worker| worker.desk.lock().has_ended) {
            self.worker = None;
        }
        let worker = match self.worker.take() {
            Some(worker) => worker,
            None => Worker::start()?,
        };
        Ok(self.worker.insert(worker))
    }

    fn allow(&self, allowed: u64) {
        self.change(|state| {
            if let Some(order) = &mut state.order {
                order.allowed = allowed;
            }
        });
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        if let Some(worker) = &self.worker {
            worker.desk.change(change);
        }
    }

    fn progress(&self) -> Progress {
        self.worker.as_ref().map_or(Progress::Failed, |worker| worker.desk.lock().progress())
    }

    /// Has the thread end, and says whether it did. One that the disk keeps is left to itself.
    fn end(&mut self) -> bool {
        let Some(Worker { desk, thread }) = self.worker.take() else { return true };
        let (waiting, has_ended) = desk.stop();
        if has_ended {
            drop(thread.join());
            waiting.into_iter().for_each(finish);
        }
        has_ended
    }
}

impl Drop for Preparer {
    fn drop(&mut self) {
        self.end();
    }
}

impl Worker {
    fn start() -> io::Result<Self> {
        let desk = Arc::new(Desk::default());
        let at = Arc::clone(&desk);
        let thread = thread::Builder::new().name("claviger-prepare".to_owned()).spawn(move || {
            give_way(19);
            at.run();
        })?;
        Ok(Self { desk, thread })
    }
}

/// Where the writer leaves work for the thread.
#[derive(Debug, Default)]
struct Desk {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    order: Option<Order>,
    /// Segments to be trimmed.
    full: Vec<Segment>,
    is_stopped: bool,
    has_ended: bool,
}

/// A file to be filled with zeros.
#[derive(Debug)]
struct Order {
    file: Arc<File>,
    bytes: u64,
    allowed: u64,
    /// So many are on the disk.
    written: u64,
    has_failed: bool,
}

impl Order {
    const fn is_due(&self) -> bool {
        !self.has_failed && self.written < self.allowed
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    UnderWay,
    Ready,
    Failed,
}

enum Task {
    Fill { file: Arc<File>, from: u64, bytes: u64 },
    Finish(Segment),
}

impl State {
    fn progress(&self) -> Progress {
        match &self.order {
            Some(order) if order.has_failed => Progress::Failed,
            Some(order) if order.written >= order.bytes => Progress::Ready,
            Some(_) if !self.has_ended => Progress::UnderWay,
            _ => Progress::Failed,
        }
    }

    fn task(&mut self) -> Option<Task> {
        if let Some(segment) = self.full.pop() {
            return Some(Task::Finish(segment));
        }
        let order = self.order.as_ref().filter(|order| order.is_due())?;
        Some(Task::Fill { file: Arc::clone(&order.file), from: order.written, bytes: order.bytes })
    }
}

impl Desk {
    /// The thread.
    fn run(&self) {
        let _ended = Ended(self);
        let zeros = vec![0; PIECE];
        while let Some(task) = self.next() {
            match task {
                Task::Finish(segment) => finish(segment),
                Task::Fill { file, from, bytes } => {
                    let filled = fill(&file, &zeros, from, bytes);
                    if let Err(error) = &filled {
                        give_up(error);
                        // The name stays; what it takes of the disk does not.
                        let _ = file.set_len(0);
                    }
                    self.filled(&file, filled.ok());
                }
            }
        }
    }

    /// What is to be done next; waits for it. `None` where nothing is any more.
    fn next(&self) -> Option<Task> {
        let mut state = self.lock();
        while !state.is_stopped {
            if let Some(task) = state.task() {
                return Some(task);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    fn filled(&self, file: &Arc<File>, written: Option<u64>) {
        self.change(|state| {
            // It may have been given up, and another one begun, meanwhile.
            if let Some(order) = state.order.as_mut().filter(|order| Arc::ptr_eq(&order.file, file)) {
                order.has_failed = written.is_none();
                order.written = written.unwrap_or(order.written);
            }
        });
    }

    /// Leaves a segment to be trimmed, and gives those that have waited for that since the last time.
    fn retire(&self, full: Segment) -> Vec<Segment> {
        let mut waiting = vec![full];
        self.change(|state| mem::swap(&mut state.full, &mut waiting));
        waiting
    }

    /// Ends the thread, and says whether it has ended; gives what it did not come to.
    fn stop(&self) -> (Vec<Segment>, bool) {
        let mut waiting = Vec::new();
        self.change(|state| {
            state.is_stopped = true;
            state.order = None;
            mem::swap(&mut state.full, &mut waiting);
        });
        let runs = |state: &mut State| !state.has_ended;
        let waited = self.changed.wait_timeout_while(self.lock(), PATIENCE, runs);
        let has_ended = waited.unwrap_or_else(PoisonError::into_inner).0.has_ended;
        (waiting, has_ended)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No line under the lock can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that the thread has ended, however it did.
struct Ended<'a>(&'a Desk);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.change(|state| state.has_ended = true);
    }
}

/// Writes the piece that begins at `from`, and says where the zeros on the disk end then.
fn fill(file: &File, zeros: &[u8], from: u64, bytes: u64) -> io::Result<u64> {
    check(file, from, bytes)?;
    let length = bytes.saturating_sub(from).min(PIECE_BYTES);
    let piece = usize::try_from(length).ok().and_then(|length| zeros.get(..length)).unwrap_or(zeros);
    file.write_all_at(piece, from)?;
    file.sync_data()?;
    Ok(from + length)
}

/// Whether a file that holds `written` zeros may become one of `bytes`.
fn check(file: &File, written: u64, bytes: u64) -> io::Result<()> {
    // The kernel ends a process that writes beyond this bound.
    if getrlimit(Resource::Fsize).current.is_some_and(|longest| bytes > longest) {
        return Err(Errno::FBIG.into());
    }
    if writes_elsewhere(file)? {
        let problem = "its file system does not overwrite in place";
        return Err(io::Error::new(io::ErrorKind::Unsupported, problem));
    }
    let disk = rustix::fs::fstatvfs(file)?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize).saturating_add(written);
    let is_low = free_permille(&disk).is_some_and(|free| free < LEAST_FREE);
    if is_low || free < bytes.saturating_mul(ROOM) {
        return Err(io::Error::new(io::ErrorKind::StorageFull, "its disk has too little room to spare"));
    }
    Ok(())
}

/// Whether zeros on the disk are neither quick to overwrite nor room for the lines that do: where each write goes to
/// another place.
fn writes_elsewhere(file: &File) -> io::Result<bool> {
    const BTRFS: u64 = 0x9123_683e;
    const BCACHEFS: u64 = 0xca45_1a4e;
    const ZFS: u64 = 0x2fc1_2fc1;
    const F2FS: u64 = 0xf2f5_2010;
    const NILFS: u64 = 0x3434;
    let kind = u64::try_from(rustix::fs::fstatfs(file)?.f_type).unwrap_or_default();
    Ok([BTRFS, BCACHEFS, ZFS, F2FS, NILFS].contains(&kind))
}

fn finish(mut segment: Segment) {
    if let Err(error) = segment.finish() {
        let path = segment.path().display();
        tracing::info!(segment = %path, %error, "audit log: a full segment keeps the zeros at its end");
    }
}

fn give_up(error: &io::Error) {
    tracing::info!(%error, "audit log: the next segment is not prepared ahead; the log goes on without");
}

#[cfg(test)]
mod tests {
    use super::super::tests::{content, folder, prepared};
    use super::super::{content_end, file_name};
    use super::*;
    use std::fs;
    use std::path::PathBuf;

    const BYTES: u64 = 64 << 10;

    fn next(folder: &Folder) -> PathBuf {
        folder.path().join("next.prepared")
    }

    /// Waits until the thread has nothing left to do.
    fn settled(preparer: &Preparer) -> Progress {
        let desk = &preparer.worker.as_ref().unwrap().desk;
        let busy = |state: &mut State| state.order.as_ref().is_some_and(Order::is_due);
        let hung = Duration::from_secs(60);
        let (state, waited) = desk.changed.wait_timeout_while(desk.lock(), hung, busy).unwrap();
        assert!(!waited.timed_out());
        state.progress()
    }

    #[test]
    fn nothing_is_prepared_before_an_eighth_is_taken() {
        let (_directory, folder) = folder();
        let mut preparer = Preparer::new(&folder, BYTES);
        preparer.follow(&folder, BYTES / 8);
        assert!(preparer.worker.is_none() && !next(&folder).exists());
        assert!(preparer.take(&folder).is_none());
        preparer.follow(&folder, BYTES / 8 + 1);
        assert_eq!(settled(&preparer), Progress::Ready);
        assert_eq!(fs::read(next(&folder)).unwrap(), vec![0; 64 << 10]);
        let file = preparer.take(&folder).unwrap();
        let segment = folder.adopt(file, BYTES, 9).unwrap();
        assert!(segment.is_prepared());
        assert!(preparer.take(&folder).is_none(), "each is for one segment");
        preparer.follow(&folder, BYTES);
        assert_eq!(settled(&preparer), Progress::Ready);
        preparer.stop(&folder);
        assert!(!next(&folder).exists(), "what is not needed is not left");
    }

    #[test]
    fn small_segments_are_not_worth_it() {
        let (_directory, folder) = folder();
        let mut preparer = Preparer::new(&folder, SMALLEST - 1);
        preparer.follow(&folder, SMALLEST);
        assert!(preparer.worker.is_none() && !next(&folder).exists());
    }

    #[test]
    fn zeros_are_written_as_fast_as_the_log_grows() {
        let (_directory, folder) = folder();
        let bytes = 8 * PIECE_BYTES + 5;
        let mut preparer = Preparer::new(&folder, bytes);
        let length = || fs::metadata(next(&folder)).unwrap().len();
        let beginning = bytes / 8;
        preparer.follow(&folder, beginning + 1);
        assert_eq!((settled(&preparer), length()), (Progress::UnderWay, PIECE_BYTES));
        preparer.follow(&folder, beginning + PIECE_BYTES / 4);
        assert_eq!((settled(&preparer), length()), (Progress::UnderWay, PIECE_BYTES));
        preparer.follow(&folder, beginning + PIECE_BYTES);
        assert_eq!((settled(&preparer), length()), (Progress::UnderWay, 3 * PIECE_BYTES));
        assert!(preparer.take(&folder).is_none(), "it is not ready");
        assert_eq!((settled(&preparer), length()), (Progress::Ready, bytes));
        preparer.follow(&folder, beginning + 1);
        assert!(preparer.take(&folder).is_some(), "the next segment has it");
    }

    #[test]
    fn what_fails_is_given_up_until_the_next_segment() {
        let (_directory, folder) = folder();
        let mut preparer = Preparer::new(&folder, BYTES);
        fs::create_dir(next(&folder)).unwrap();
        preparer.follow(&folder, BYTES);
        assert!(matches!(preparer.stage, Stage::GivenUp));
        fs::remove_dir(next(&folder)).unwrap();
        preparer.follow(&folder, BYTES);
        assert!(!next(&folder).exists());
        assert!(preparer.take(&folder).is_none());
        preparer.follow(&folder, BYTES);
        assert_eq!(settled(&preparer), Progress::Ready);

        // A handle that can't write stands in for a disk that can't.
        let mut preparer = Preparer::new(&folder, 3 * PIECE_BYTES);
        preparer.follow(&folder, 3 * PIECE_BYTES / 8 + 1);
        assert_eq!(settled(&preparer), Progress::UnderWay);
        let unwritable = Arc::new(File::open(next(&folder)).unwrap());
        preparer.change(|state| state.order.as_mut().unwrap().file = unwritable);
        preparer.follow(&folder, 3 * PIECE_BYTES);
        assert_eq!(settled(&preparer), Progress::Failed);
        assert!(preparer.take(&folder).is_none());
        assert!(!next(&folder).exists());
    }

    #[test]
    fn a_disk_without_room_to_spare_is_left_alone() {
        let (_directory, folder) = folder();
        let mut preparer = Preparer::new(&folder, 1 << 60);
        preparer.follow(&folder, 1 << 60);
        assert!(matches!(preparer.stage, Stage::GivenUp));
        assert!(!next(&folder).exists());
        let file = File::create(folder.path().join("file")).unwrap();
        assert_eq!(check(&file, 0, 1 << 60).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn what_was_prepared_is_given_back_where_the_log_needs_the_room() {
        let (_directory, folder) = folder();
        let mut preparer = Preparer::new(&folder, BYTES);
        preparer.release(&folder);
        preparer.follow(&folder, BYTES);
        assert_eq!(settled(&preparer), Progress::Ready);
        preparer.release(&folder);
        assert!(!next(&folder).exists());
        preparer.follow(&folder, BYTES);
        assert!(!next(&folder).exists());
        assert!(preparer.take(&folder).is_none());
    }

    #[test]
    fn full_segments_are_trimmed() {
        let (_directory, folder) = folder();
        let mut preparer = Preparer::new(&folder, BYTES);
        for first in [1, 3, 5] {
            let mut full = prepared(&folder, first, BYTES);
            full.append(b"one\n", true).unwrap();
            preparer.retire(full);
        }
        preparer.stop(&folder);
        for first in [1, 3, 5] {
            assert_eq!(fs::read(folder.path().join(file_name(first))).unwrap(), b"one\n");
        }
        let mut late = prepared(&folder, 7, BYTES);
        late.append(b"one\n", true).unwrap();
        preparer.retire(late);
        drop(preparer);
        let late = File::open(folder.path().join(file_name(7))).unwrap();
        assert_eq!(late.metadata().unwrap().len(), 4, "also behind the end");
        assert_eq!(content_end(&late, 0).unwrap(), 4);
        let mut ordinary = folder.create(9).unwrap();
        ordinary.append(b"one\n", true).unwrap();
        let mut preparer = Preparer::new(&folder, BYTES);
        preparer.retire(ordinary);
        assert!(preparer.worker.is_none(), "this one needs nothing");
    }

    #[test]
    fn a_thread_that_ended_is_replaced() {
        let (_directory, folder) = folder();
        let mut preparer = Preparer::new(&folder, BYTES);
        preparer.follow(&folder, BYTES);
        assert_eq!(settled(&preparer), Progress::Ready);
        preparer.worker.as_ref().unwrap().desk.stop();
        assert!(preparer.take(&folder).is_none(), "nobody vouches for it any more");
        preparer.follow(&folder, BYTES);
        assert_eq!(settled(&preparer), Progress::Ready);
        let mut segment = folder.adopt(preparer.take(&folder).unwrap(), BYTES, 1).unwrap();
        segment.append(b"one\n", true).unwrap();
        segment.finish().unwrap();
        assert_eq!(content(&segment), b"one\n");
    }
}
