//! The way from the callers to the writer thread and back.
//!
//! Callers push; the writer takes all that waits at once and answers all of it at once, so that the cost of a lock, a
//! wake-up and a sync is shared by however many arrived meanwhile. The queue is bounded: what finds no room is refused
//! at once, and so nothing is served, rather than that memory runs out.

use std::iter;
use std::mem;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::AuditError;
use super::chain::Fields;
use crate::environment::Durability;

/// How many records wait for the writer at most.
const MAX_WAITING: usize = 65_536;
/// How many bytes their fields take at most.
const MAX_WAITING_BYTES: usize = 64 << 20;

/// The sequence of a group's last record, or why there is no record.
type Answer = Result<u64, AuditError>;

/// Records that one caller waits for: written together, acknowledged together.
#[derive(Debug)]
pub(super) struct Submission {
    first: Fields,
    more: Vec<Fields>,
    durability: Durability,
    reply: oneshot::Sender<Answer>,
    /// The caller's runtime, where it has one.
    runtime: Option<Handle>,
}

impl Submission {
    /// A group and the end at which its caller waits. Where the caller goes away, the group is written all the same.
    pub(super) fn new(
        first: Fields,
        more: Vec<Fields>,
        durability: Durability,
    ) -> (Self, oneshot::Receiver<Answer>) {
        let (reply, answer) = oneshot::channel();
        (Self { first, more, durability, reply, runtime: Handle::try_current().ok() }, answer)
    }

    pub(super) fn fields(&self) -> impl Iterator<Item = &Fields> {
        iter::once(&self.first).chain(&self.more)
    }

    pub(super) fn is_durable(&self) -> bool {
        self.durability == Durability::Durable
    }

    fn records(&self) -> usize {
        1 + self.more.len()
    }

    fn bytes(&self) -> usize {
        self.fields().map(Fields::len).sum()
    }
}

/// Answers every group of a batch, in order.
///
/// Waking a task from a foreign thread costs a lock and often a system call. A runtime with several waiters is
/// therefore sent one task that answers them all from within, where waking is cheap.
pub(super) fn answer(answers: impl Iterator<Item = (Submission, Answer)>) {
    type Waiters = Vec<(oneshot::Sender<Answer>, Answer)>;
    // A caller that no longer waits is no error.
    let send = |(reply, answer): (oneshot::Sender<Answer>, Answer)| drop(reply.send(answer));
    let mut runtimes: Vec<(Handle, Waiters)> = Vec::new();
    for (submission, answer) in answers {
        let waiter = (submission.reply, answer);
        let Some(runtime) = submission.runtime else {
            send(waiter);
            continue;
        };
        match runtimes.iter_mut().find(|(known, _)| known.id() == runtime.id()) {
            Some((_, waiters)) => waiters.push(waiter),
            None => runtimes.push((runtime, vec![waiter])),
        }
    }
    for (runtime, waiters) in runtimes {
        if waiters.len() == 1 {
            waiters.into_iter().for_each(send);
        } else {
            runtime.spawn(async move { waiters.into_iter().for_each(send) });
        }
    }
}

/// Where in its life a log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Records are taken.
    Open,
    /// `close` was called; what waits is still written.
    Closing,
    /// Every handle was dropped; what waits is still written.
    Abandoned,
    /// The writer ended in good order.
    Closed,
    /// The writer ended otherwise, which is a defect.
    Failed,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Queue {
    /// What errors name.
    path: String,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    waiting: Vec<Submission>,
    records: usize,
    bytes: usize,
    closers: Vec<oneshot::Sender<Result<(), AuditError>>>,
    /// Whether the writer sleeps and has not been woken yet.
    is_idle: bool,
}

impl State {
    fn is_quiet(&self) -> bool {
        self.waiting.is_empty() && self.phase == Phase::Open
    }
}

impl Queue {
    pub(super) fn new(path: String) -> Self {
        let state = State {
            phase: Phase::Open,
            waiting: Vec::new(),
            records: 0,
            bytes: 0,
            closers: Vec::new(),
            is_idle: false,
        };
        Self { path, state: Mutex::new(state), arrived: Condvar::new() }
    }

    /// Hands a group to the writer.
    pub(super) fn push(&self, submission: Submission) -> Result<(), AuditError> {
        let mut state = self.lock();
        match state.phase {
            Phase::Open => {}
            Phase::Failed => return Err(self.stopped()),
            Phase::Closing | Phase::Abandoned | Phase::Closed => return Err(AuditError::Closed),
        }
        let records = state.records + submission.records();
        let bytes = state.bytes + submission.bytes();
        if records > MAX_WAITING || bytes > MAX_WAITING_BYTES {
            let cause = format!("{} records wait for the disk, there is no room for more", state.records);
            return Err(AuditError::Unavailable { path: self.path.clone(), cause });
        }
        (state.records, state.bytes) = (records, bytes);
        state.waiting.push(submission);
        self.wake(state);
        Ok(())
    }

    /// Takes all that waits into `batch`, which is empty; sleeps while there is nothing, no longer than `patience`.
    pub(super) fn take(&self, batch: &mut Vec<Submission>, patience: Option<Duration>) -> Phase {
        let mut state = self.lock();
        if state.is_quiet() {
            state.is_idle = true;
            let quiet = |state: &mut State| state.is_quiet();
            state = match patience {
                None => self.arrived.wait_while(state, quiet).unwrap_or_else(PoisonError::into_inner),
                Some(patience) => {
                    let woken = self.arrived.wait_timeout_while(state, patience, quiet);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
            state.is_idle = false;
        }
        mem::swap(&mut state.waiting, batch);
        (state.records, state.bytes) = (0, 0);
        state.phase
    }

    /// Asks the writer to end. `None` where it has ended in good order.
    pub(super) fn close(&self) -> Option<oneshot::Receiver<Result<(), AuditError>>> {
        let mut state = self.lock();
        if state.phase == Phase::Closed {
            return None;
        }
        let (closer, closed) = oneshot::channel();
        if state.phase != Phase::Failed {
            state.phase = Phase::Closing;
            state.closers.push(closer);
        }
        self.wake(state);
        Some(closed)
    }

    /// Tells the writer that no one can ask it for anything any more.
    pub(super) fn abandon(&self) {
        let mut state = self.lock();
        if state.phase == Phase::Open {
            state.phase = Phase::Abandoned;
        }
        self.wake(state);
    }

    /// Says how the writer ended, to everyone who waits for that.
    pub(super) fn finish(&self, result: &Result<(), AuditError>) {
        let mut state = self.lock();
        state.phase = Phase::Closed;
        for closer in state.closers.drain(..) {
            drop(closer.send(result.clone()));
        }
    }

    /// Lets go of everyone who waits for a writer that is no more.
    pub(super) fn fail(&self) {
        let mut state = self.lock();
        if state.phase != Phase::Closed {
            state.phase = Phase::Failed;
            state.waiting.clear();
            state.closers.clear();
        }
    }

    /// What a caller is told whose answer will never come.
    pub(super) fn stopped(&self) -> AuditError {
        let cause = "its writer stopped, restart the broker".to_owned();
        AuditError::Unavailable { path: self.path.clone(), cause }
    }

    pub(super) fn has_failed(&self) -> bool {
        self.lock().phase == Phase::Failed
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No line under the lock can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, mut state: MutexGuard<'_, State>) {
        let was_idle = mem::take(&mut state.is_idle);
        drop(state);
        if was_idle {
            self.arrived.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::Record;
    use crate::error::{Reason, Reasoned};

    fn group(reason: &str, more: usize) -> (Submission, oneshot::Receiver<Answer>) {
        let fields = Fields::of_record(Record { detail: reason.to_owned(), ..Record::default() }).unwrap();
        Submission::new(fields.clone(), vec![fields; more], Durability::Relaxed)
    }

    fn taken(queue: &Queue) -> usize {
        let mut batch = Vec::new();
        queue.take(&mut batch, Some(Duration::ZERO));
        batch.len()
    }

    #[test]
    fn what_finds_no_room_is_refused_and_room_comes_back() {
        let queue = Queue::new("log".to_owned());
        queue.push(group("", MAX_WAITING - 1).0).unwrap();
        assert_eq!(queue.push(group("", 0).0).unwrap_err().reason(), Reason::AuditUnavailable);
        assert_eq!(taken(&queue), 1);
        queue.push(group("", 0).0).unwrap();
        assert_eq!(taken(&queue), 1);
    }

    #[test]
    fn bytes_are_bounded_too() {
        let queue = Queue::new("log".to_owned());
        let long = "\u{1}".repeat(1_024);
        queue.push(group(&long, 10_000).0).unwrap();
        let error = queue.push(group(&long, 2_000).0).unwrap_err();
        assert_eq!(error.reason(), Reason::AuditUnavailable);
    }

    #[test]
    fn a_closed_queue_refuses_and_a_failed_one_says_so() {
        let queue = Queue::new("log".to_owned());
        let mut closed = queue.close().unwrap();
        assert!(matches!(queue.push(group("", 0).0), Err(AuditError::Closed)));
        queue.finish(&Ok(()));
        assert!(closed.try_recv().unwrap().is_ok());
        assert!(queue.close().is_none());
        queue.fail();
        assert!(!queue.has_failed(), "an end in good order stays one");

        let queue = Queue::new("log".to_owned());
        let (waiting, mut answer) = group("", 0);
        queue.push(waiting).unwrap();
        queue.fail();
        assert!(answer.try_recv().is_err(), "the waiter is let go");
        assert_eq!(queue.push(group("", 0).0).unwrap_err().reason(), Reason::AuditUnavailable);
        assert!(queue.close().unwrap().try_recv().is_err());
    }

    #[test]
    fn waiters_of_several_runtimes_and_of_none_are_answered() {
        let runtime = || tokio::runtime::Builder::new_current_thread().build().unwrap();
        let runtimes = [runtime(), runtime()];
        let mut batch = Vec::new();
        let mut waiters = Vec::new();
        for runtime in &runtimes {
            let _context = runtime.enter();
            for _ in 0..3 {
                let (submission, waiter) = group("", 0);
                batch.push(submission);
                waiters.push((Some(runtime), waiter));
            }
        }
        let (submission, waiter) = group("", 0);
        batch.push(submission);
        waiters.push((None, waiter));
        answer(batch.into_iter().zip((1..).map(Ok)));
        for (due, (runtime, mut waiter)) in (1..).zip(waiters) {
            let answer = match runtime {
                Some(runtime) => runtime.block_on(waiter).unwrap(),
                None => waiter.try_recv().unwrap(),
            };
            assert_eq!(answer.unwrap(), due);
        }
    }
}
