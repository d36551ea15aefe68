//! The way from the callers to the writer thread and back.
//!
//! Callers push; the writer takes all that waits at once and answers all of it at once, so that the cost of a lock, a
//! wake-up and a sync is shared by however many arrived meanwhile. The queue is bounded: what finds no room is refused
//! at once, and so nothing is served, rather than that memory runs out.
//!
//! A caller that is a task does not wake the writer itself: it asks for a [`Nudge`], a task behind all those that are
//! ready now, which wakes it for all of them. Else the writer would be awake for the first of them alone, and back with its
//! answer while the second is still on its way.
//!
//! ```text
//!   push ─┬▶ works ───take──▶ the writer ─▶ the disk
//!         └▶ waiters ─take─▶ in flight ───settle──▶ answered
//!                │               │
//!                └───────┬───────┘
//!                   the writer has been at it for 2 s ──▶ refused by the watch, as if the disk were full
//! ```
//!
//! Who waits stays in the queue while the writer has the work, so that a writer that hangs in the kernel keeps nobody
//! waiting. What it had in hand may still be written when it comes back: a record without an answer, which is the side
//! to err on.

use std::mem;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::{Handle, Id};
use tokio::sync::oneshot;

use super::checkpoint::SigningKey;
use super::encode::Batch;
use super::figures::{Counters, Figures};
use super::reserve::{Claim, Hold};
use super::{ANSWER_WITHIN, AuditError};
use crate::clock::SharedClock;
use crate::environment::Durability;

/// How many records wait for the writer at most.
const MAX_WAITING: usize = 65_536;
/// How many bytes their fields take at most.
const MAX_WAITING_BYTES: usize = 64 << 20;
/// How many bytes of fields the writer takes at once. A power loss in the middle leaves no more to be cut off.
const MOST_AT_ONCE: usize = 2 << 20;
/// How many waiters memory is kept for.
const USUAL_BATCH: usize = 4_096;
/// How often the watch looks whether the writer hangs.
const WATCH_EVERY: Duration = Duration::from_millis(250);

/// The sequence of what was written last for a caller, or why there is no record.
pub(super) type Answer = Result<u64, AuditError>;
/// How the writer ended.
type Ending = Result<(), AuditError>;

/// What one caller asks of the writer.
#[derive(Debug)]
pub(super) enum Work {
    /// Records that are written together and acknowledged together; with a claim, within a reservation.
    Records { records: Batch, durability: Durability, claim: Option<Claim> },
    /// The log is handed over to this key.
    Handover(Box<SigningKey>),
    /// Space is to be set aside.
    Reserve(Arc<Hold>),
}

impl Work {
    /// The fields of each record.
    pub(super) fn fields(&self) -> impl Iterator<Item = &[u8]> {
        match self {
            Self::Records { records, .. } => Some(records.iter()),
            Self::Handover(_) | Self::Reserve(_) => None,
        }
        .into_iter()
        .flatten()
    }

    pub(super) fn is_durable(&self) -> bool {
        !matches!(self, Self::Records { durability: Durability::Relaxed, .. } | Self::Reserve(_))
    }

    /// Whether it asks for space to be set aside, and for nothing else.
    pub(super) const fn is_reserve(&self) -> bool {
        matches!(self, Self::Reserve(_))
    }

    /// What was set aside for it.
    pub(super) fn claim(&self) -> Option<&Claim> {
        match self {
            Self::Records { claim, .. } => claim.as_ref(),
            Self::Handover(_) | Self::Reserve(_) => None,
        }
    }

    /// What was set aside for it, taken out of it.
    pub(super) fn take_claim(&mut self) -> Option<Claim> {
        match self {
            Self::Records { claim, .. } => claim.take(),
            Self::Handover(_) | Self::Reserve(_) => None,
        }
    }

    fn records(&self) -> usize {
        match self {
            Self::Records { records, .. } => records.len(),
            Self::Handover(_) | Self::Reserve(_) => 0,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Records { records, .. } => records.bytes(),
            Self::Handover(_) | Self::Reserve(_) => 0,
        }
    }
}

/// A caller who waits.
#[derive(Debug)]
pub(super) struct Waiter {
    reply: oneshot::Sender<Answer>,
    /// The caller's runtime, where it has one.
    runtime: Option<Handle>,
    since: Duration,
    records: usize,
}

/// A wake-up that is still to be sent: from a task of its own on this runtime, behind all that are ready.
#[must_use = "the writer sleeps until it is sent"]
#[derive(Debug)]
pub(super) struct Nudge(Handle);

impl Nudge {
    /// Has `nudge` done in its turn.
    pub(super) fn send(self, nudge: impl FnOnce() + Send + 'static) {
        self.0.spawn(async move { nudge() });
    }
}

/// Answers every waiter, in order.
///
/// Waking a task from a foreign thread costs a lock and often a system call. A runtime with several waiters is
/// therefore sent one task that answers them all from within, where waking is cheap.
fn answer(answers: impl Iterator<Item = (Waiter, Answer)>) {
    type Waiters = Vec<(oneshot::Sender<Answer>, Answer)>;
    // A caller that no longer waits is no error.
    let send = |(reply, answer): (oneshot::Sender<Answer>, Answer)| drop(reply.send(answer));
    let mut runtimes: Vec<(Handle, Waiters)> = Vec::new();
    for (waiter, answer) in answers {
        let answered = (waiter.reply, answer);
        let Some(runtime) = waiter.runtime else {
            send(answered);
            continue;
        };
        match runtimes.iter_mut().find(|(known, _)| known.id() == runtime.id()) {
            Some((_, waiters)) => waiters.push(answered),
            None => runtimes.push((runtime, vec![answered])),
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
    clock: SharedClock,
    state: Mutex<State>,
    arrived: Condvar,
    ended: Condvar,
    /// How many bytes are set aside for reservations, as far as not written. Only the writer adds to it.
    pub(super) owed: AtomicU64,
    pub(super) counters: Counters,
}

/// INVARIANT: `works` and `waiters` are of the same callers, in the same order; `in_flight` are those of what the writer
/// took last, all of them or none.
#[derive(Debug)]
struct State {
    phase: Phase,
    works: Vec<Work>,
    waiters: Vec<Waiter>,
    records: usize,
    bytes: usize,
    in_flight: Vec<Waiter>,
    records_in_flight: usize,
    closers: Vec<oneshot::Sender<Ending>>,
    /// Whether the writer sleeps and has not been woken yet.
    is_idle: bool,
    /// Whether what waits is to be written now, and not when its [`Nudge`] comes.
    is_due: bool,
    /// The runtime that has a nudge under way.
    nudged_by: Option<Id>,
    /// Whether the writer is to wake up though there is no work.
    is_poked: bool,
    /// Since when the writer has been busy, as far as its last sign of life tells.
    busy_since: Option<Duration>,
    /// How many looks of the watch have found the writer busy since then.
    looks: u32,
    /// Whether it counts as hanging. Only the watch says so.
    hangs: bool,
}

impl State {
    fn is_quiet(&self) -> bool {
        (self.works.is_empty() || !self.is_due) && !self.is_poked && self.phase == Phase::Open
    }

    const fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Closed | Phase::Failed)
    }

    /// A sign of life: the writer is busy from now on, or not at all.
    fn lives(&mut self, busy_since: Option<Duration>) {
        (self.busy_since, self.looks, self.hangs) = (busy_since, 0, false);
    }

    /// Whether the writer hangs: busy for too long, and at more than one look. A process that was stopped, or a clock
    /// that was set, has moved on a long way in no time at all.
    fn look(&mut self, now: Duration) -> bool {
        if let Some(since) = self.busy_since {
            self.looks = self.looks.saturating_add(1);
            self.hangs = self.looks > 1 && now.saturating_sub(since) >= ANSWER_WITHIN;
        }
        self.hangs
    }

    /// Gives the writer what waits, or as much of it as it takes at once.
    fn hand_over(&mut self, batch: &mut Vec<Work>) {
        let Self { works, waiters, in_flight, records, bytes, records_in_flight, .. } = self;
        if *bytes <= MOST_AT_ONCE {
            mem::swap(works, batch);
            mem::swap(waiters, in_flight);
            (*records_in_flight, *records, *bytes) = (*records, 0, 0);
            return;
        }
        let mut taken = 0;
        let fits = |work: &&Work| {
            taken += work.bytes();
            taken <= MOST_AT_ONCE
        };
        // One at least, however large it is.
        let count = works.iter().take_while(fits).count().max(1);
        batch.extend(works.drain(..count));
        in_flight.extend(waiters.drain(..count));
        *records_in_flight = batch.iter().map(Work::records).sum();
        *records = records.saturating_sub(*records_in_flight);
        *bytes = bytes.saturating_sub(batch.iter().map(Work::bytes).sum());
        self.is_due = true;
    }

    /// Everyone who waits, and what the writer did not take yet, which is forgotten.
    fn let_go(&mut self) -> LetGo {
        (self.records, self.bytes, self.records_in_flight) = (0, 0, 0);
        (self.is_due, self.nudged_by) = (false, None);
        let mut waiters = mem::take(&mut self.in_flight);
        waiters.append(&mut self.waiters);
        LetGo { waiters, closers: mem::take(&mut self.closers), works: mem::take(&mut self.works) }
    }
}

/// What nobody waits for any more. Not to be dropped under the lock: a reservation that goes with it
/// [pokes](Queue::poke) the writer.
struct LetGo {
    waiters: Vec<Waiter>,
    closers: Vec<oneshot::Sender<Ending>>,
    works: Vec<Work>,
}

impl Queue {
    pub(super) fn new(path: String, clock: SharedClock) -> Self {
        let state = State {
            phase: Phase::Open,
            works: Vec::new(),
            waiters: Vec::new(),
            records: 0,
            bytes: 0,
            in_flight: Vec::new(),
            records_in_flight: 0,
            closers: Vec::new(),
            is_idle: false,
            is_due: false,
            nudged_by: None,
            is_poked: false,
            busy_since: None,
            looks: 0,
            hangs: false,
        };
        Self {
            path,
            clock,
            state: Mutex::new(state),
            arrived: Condvar::new(),
            ended: Condvar::new(),
            owed: AtomicU64::new(0),
            counters: Counters::default(),
        }
    }

    /// Hands work to the writer, and gives the end at which the caller waits. Where the caller goes away, the work is
    /// done all the same. The nudge, where there is one, is the caller's to send.
    pub(super) fn push(&self, work: Work) -> Result<(oneshot::Receiver<Answer>, Option<Nudge>), AuditError> {
        let (reply, answer) = oneshot::channel();
        let (records, bytes) = (work.records(), work.bytes());
        let (runtime, since) = (Handle::try_current().ok(), self.clock.monotonic());
        let mut state = self.lock();
        let (all_records, all_bytes) = (state.records + records, state.bytes + bytes);
        if let Err(error) = self.admit(&state, all_records, all_bytes) {
            drop(state);
            self.count_refused(records);
            return Err(error);
        }
        (state.records, state.bytes) = (all_records, all_bytes);
        state.works.push(work);
        let nudge = match &runtime {
            Some(runtime) if state.is_due || state.nudged_by == Some(runtime.id()) => None,
            Some(runtime) => {
                state.nudged_by = Some(runtime.id());
                Some(Nudge(runtime.clone()))
            }
            None => {
                state.is_due = true;
                None
            }
        };
        let wakes = runtime.is_none();
        state.waiters.push(Waiter { reply, runtime, since, records });
        if wakes {
            self.wake(state);
        }
        Ok((answer, nudge))
    }

    /// What waits is to be written now.
    pub(super) fn nudge(&self) {
        let mut state = self.lock();
        state.nudged_by = None;
        if !state.works.is_empty() {
            state.is_due = true;
            self.wake(state);
        }
    }

    fn admit(&self, state: &State, records: usize, bytes: usize) -> Result<(), AuditError> {
        match state.phase {
            Phase::Open if state.hangs => Err(self.hangs()),
            Phase::Open if records > MAX_WAITING || bytes > MAX_WAITING_BYTES => {
                let waiting = state.records;
                Err(self
                    .unavailable(format!("{waiting} records wait for the disk, there is no room for more")))
            }
            Phase::Open => Ok(()),
            Phase::Failed => Err(self.stopped()),
            Phase::Closing | Phase::Abandoned | Phase::Closed => Err(AuditError::Closed),
        }
    }

    /// Takes all that waits into `batch`, which is empty; sleeps while there is nothing, no longer than `patience`.
    /// What was taken must be settled.
    pub(super) fn take(&self, batch: &mut Vec<Work>, patience: Option<Duration>) -> Phase {
        let mut state = self.lock();
        state.lives(None);
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
        (state.is_poked, state.is_due) = (false, false);
        state.lives(Some(self.clock.monotonic()));
        state.hand_over(batch);
        // What is left is written before anything ends.
        if state.works.is_empty() { state.phase } else { Phase::Open }
    }

    /// Answers everyone whose work was taken last; whoever was let go meanwhile has an answer. `spare` is empty memory
    /// for waiters, before and after.
    pub(super) fn settle(&self, spare: &mut Vec<Waiter>, result: Result<Vec<u64>, AuditError>) {
        let now = self.land(spare);
        match result {
            Ok(sequences) => {
                self.count_written(spare, now);
                answer(spare.drain(..).zip(sequences.into_iter().map(Ok)));
            }
            Err(error) => self.refuse(std::mem::take(spare), &error),
        }
        spare.shrink_to(USUAL_BATCH);
    }

    /// As [`settle`](Self::settle), where each has an answer of its own.
    pub(super) fn settle_each(&self, spare: &mut Vec<Waiter>, answers: Vec<Answer>) {
        let now = self.land(spare);
        for (waiter, answer) in spare.iter().zip(&answers) {
            match answer {
                Ok(_) => self.count_written(std::slice::from_ref(waiter), now),
                Err(_) => self.count_refused(waiter.records),
            }
        }
        answer(spare.drain(..).zip(answers));
        spare.shrink_to(USUAL_BATCH);
    }

    /// Puts those into `spare` whose work was taken last, and gives the time.
    fn land(&self, spare: &mut Vec<Waiter>) -> Duration {
        let now = self.clock.monotonic();
        let mut state = self.lock();
        state.lives(Some(now));
        state.records_in_flight = 0;
        mem::swap(&mut state.in_flight, spare);
        now
    }

    /// Lets go of everyone who waits for a writer that hangs, again and again until it ends.
    pub(super) fn watch(&self) {
        let mut hung = false;
        loop {
            let running = |state: &mut State| !state.is_over();
            let waited = self.ended.wait_timeout_while(self.lock(), WATCH_EVERY, running);
            let state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if state.is_over() {
                return;
            }
            let hangs = self.look(state);
            match (mem::replace(&mut hung, hangs), hangs) {
                (false, true) => tracing::error!(
                    path = self.path,
                    "audit log: its disk does not answer; nothing is served until it does"
                ),
                (true, false) => tracing::info!(path = self.path, "audit log: its disk answers again"),
                _ => {}
            }
        }
    }

    /// One look of the watch.
    fn look(&self, mut state: MutexGuard<'_, State>) -> bool {
        let hangs = state.look(self.clock.monotonic());
        let let_go = hangs.then(|| state.let_go());
        if state.is_idle && !state.works.is_empty() {
            // Its nudge is late, or went with its runtime.
            state.is_due = true;
            self.wake(state);
        } else {
            drop(state);
        }
        if let Some(LetGo { waiters, closers, works }) = let_go {
            // What was set aside for them is there again before they can ask for more.
            drop(works);
            self.refuse(waiters, &self.hangs());
            closers.into_iter().for_each(|closer| drop(closer.send(Err(self.hangs()))));
        }
        hangs
    }

    fn refuse(&self, waiters: Vec<Waiter>, error: &AuditError) {
        self.count_refused(waiters.iter().map(|waiter| waiter.records).sum());
        answer(waiters.into_iter().map(|waiter| (waiter, Err(error.clone()))));
    }

    fn count_written(&self, waiters: &[Waiter], now: Duration) {
        for waiter in waiters.iter().filter(|waiter| waiter.records > 0) {
            self.counters.latency.observe(now.saturating_sub(waiter.since));
        }
        let records = waiters.iter().map(|waiter| waiter.records).sum();
        self.counters.records.fetch_add(wide(records), Relaxed);
    }

    fn count_refused(&self, records: usize) {
        self.counters.failed.fetch_add(wide(records), Relaxed);
    }

    /// What the log did, and how it is.
    pub(super) fn figures(&self) -> Figures {
        let state = self.lock();
        let backlog = state.records + state.records_in_flight;
        drop(state);
        self.counters.figures(wide(backlog))
    }

    /// Asks the writer to end. `None` where it has ended in good order.
    pub(super) fn close(&self) -> Option<oneshot::Receiver<Ending>> {
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

    /// Wakes the writer, to look after what is due by itself.
    pub(super) fn poke(&self) {
        let mut state = self.lock();
        state.is_poked = true;
        self.wake(state);
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
    pub(super) fn finish(&self, result: &Ending) {
        let mut state = self.lock();
        state.phase = Phase::Closed;
        let LetGo { waiters, closers, works } = state.let_go();
        drop(state);
        // Nothing is left by a writer that ended in good order; whoever came after all must not wait for ever.
        drop(works);
        self.refuse(waiters, &AuditError::Closed);
        closers.into_iter().for_each(|closer| drop(closer.send(result.clone())));
        self.ended.notify_all();
    }

    /// Lets go of everyone who waits for a writer that is no more.
    pub(super) fn fail(&self) {
        let mut state = self.lock();
        let let_go = (state.phase != Phase::Closed).then(|| {
            state.phase = Phase::Failed;
            state.let_go()
        });
        drop(state);
        drop(let_go);
        self.ended.notify_all();
    }

    /// What a caller is told whose answer will never come.
    pub(super) fn stopped(&self) -> AuditError {
        self.unavailable("its writer stopped, restart the broker".to_owned())
    }

    /// Why the writer can't be relied on; `None` where it can.
    pub(super) fn trouble(&self) -> Option<AuditError> {
        let state = self.lock();
        let (has_failed, hangs) = (state.phase == Phase::Failed, state.hangs);
        drop(state);
        if has_failed {
            return Some(self.stopped());
        }
        hangs.then(|| self.hangs())
    }

    fn hangs(&self) -> AuditError {
        self.unavailable(format!("the disk has not answered for {} s", ANSWER_WITHIN.as_secs()))
    }

    fn unavailable(&self, cause: String) -> AuditError {
        AuditError::Unavailable { path: self.path.clone(), cause }
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

/// A number of records in memory as one that is counted.
fn wide(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::View;
    use crate::clock::{ManualClock, SystemClock};
    use crate::error::{Reason, Reasoned};
    use jiff::Timestamp;
    use std::sync::Arc;

    fn group(detail: &str, more: usize) -> Work {
        let mut records = Batch::default();
        (0..=more).for_each(|_| records.push(&View { detail, ..View::default() }));
        Work::Records { records, durability: Durability::Relaxed, claim: None }
    }

    impl Queue {
        fn pushed(&self, work: Work) -> Result<oneshot::Receiver<Answer>, AuditError> {
            self.push(work).map(|(answer, _)| answer)
        }
    }

    fn queue() -> Queue {
        Queue::new("log".to_owned(), SystemClock::shared())
    }

    fn taken(queue: &Queue) -> usize {
        let mut batch = Vec::new();
        queue.take(&mut batch, Some(Duration::ZERO));
        queue.settle(&mut Vec::new(), Ok((1..).take(batch.len()).collect()));
        batch.len()
    }

    #[test]
    fn what_finds_no_room_is_refused_and_room_comes_back() {
        let queue = queue();
        let first = queue.pushed(group("", MAX_WAITING - 1)).unwrap();
        assert_eq!(queue.pushed(group("", 0)).unwrap_err().reason(), Reason::AuditUnavailable);
        assert_eq!((queue.figures().backlog, queue.figures().failed), (wide(MAX_WAITING), 1));
        assert_eq!(taken(&queue), 1);
        assert_eq!(first.blocking_recv().unwrap().unwrap(), 1);
        let _second = queue.pushed(group("", 0)).unwrap();
        assert_eq!(taken(&queue), 1);
        let figures = queue.figures();
        assert_eq!((figures.backlog, figures.records), (0, wide(MAX_WAITING) + 1));
        assert_eq!((figures.failed, figures.latency.count), (1, 2));
    }

    #[test]
    fn bytes_are_bounded_too() {
        let queue = queue();
        let long = "\u{1}".repeat(1_024);
        let _waiting = queue.pushed(group(&long, 10_000)).unwrap();
        let error = queue.pushed(group(&long, 2_000)).unwrap_err();
        assert_eq!(error.reason(), Reason::AuditUnavailable);
    }

    #[test]
    fn the_writer_takes_no_more_than_it_can_write_at_once() {
        let queue = queue();
        let long = "x".repeat(1_000);
        let answers: Vec<_> = (0..4).map(|_| queue.pushed(group(&long, 999)).unwrap()).collect();
        let mut batches = Vec::new();
        while queue.figures().backlog > 0 {
            batches.push(taken(&queue));
        }
        assert_eq!(batches, [2, 2]);
        assert!(answers.into_iter().all(|answer| answer.blocking_recv().unwrap().is_ok()));
        let huge = queue.pushed(group(&long, 9_999)).unwrap();
        assert_eq!(taken(&queue), 1, "what is one is not taken apart");
        assert!(huge.blocking_recv().unwrap().is_ok());
    }

    #[test]
    fn a_queue_is_closed_when_all_that_waits_is_written() {
        let queue = queue();
        let long = "x".repeat(1_000);
        let answers: Vec<_> = (0..3).map(|_| queue.pushed(group(&long, 1_500)).unwrap()).collect();
        let mut closed = queue.close().unwrap();
        let (mut batch, mut phases) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            phases.push(queue.take(&mut batch, None));
            queue.settle(&mut Vec::new(), Ok((1..).take(batch.len()).collect()));
            batch.clear();
        }
        assert_eq!(phases, [Phase::Open, Phase::Open, Phase::Closing]);
        queue.finish(&Ok(()));
        assert!(closed.try_recv().unwrap().is_ok());
        assert!(answers.into_iter().all(|answer| answer.blocking_recv().unwrap().is_ok()));
    }

    #[test]
    fn whoever_waits_at_the_end_is_not_left_waiting() {
        let queue = queue();
        let answer = queue.pushed(group("", 0)).unwrap();
        queue.finish(&Ok(()));
        assert!(matches!(answer.blocking_recv().unwrap(), Err(AuditError::Closed)));
    }

    #[test]
    fn a_closed_queue_refuses_and_a_failed_one_says_so() {
        let queue = queue();
        let mut closed = queue.close().unwrap();
        assert!(matches!(queue.pushed(group("", 0)), Err(AuditError::Closed)));
        queue.finish(&Ok(()));
        assert!(closed.try_recv().unwrap().is_ok());
        assert!(queue.close().is_none());
        queue.fail();
        assert!(queue.trouble().is_none(), "an end in good order stays one");

        let queue = self::queue();
        let mut answer = queue.pushed(group("", 0)).unwrap();
        queue.fail();
        assert!(answer.try_recv().is_err(), "the waiter is let go");
        assert_eq!(queue.pushed(group("", 0)).unwrap_err().reason(), Reason::AuditUnavailable);
        assert_eq!(queue.trouble().unwrap().reason(), Reason::AuditUnavailable);
        assert!(queue.close().unwrap().try_recv().is_err());
        queue.watch();
    }

    #[test]
    fn waiters_of_several_runtimes_and_of_none_are_answered() {
        let runtime = || tokio::runtime::Builder::new_current_thread().build().unwrap();
        let runtimes = [runtime(), runtime()];
        let queue = queue();
        let mut waiters = Vec::new();
        for runtime in &runtimes {
            let _context = runtime.enter();
            for _ in 0..3 {
                waiters.push((Some(runtime), queue.pushed(group("", 0)).unwrap()));
            }
        }
        waiters.push((None, queue.pushed(group("", 0)).unwrap()));
        assert_eq!(taken(&queue), 7);
        for (due, (runtime, mut waiter)) in (1..).zip(waiters) {
            let answer = match runtime {
                Some(runtime) => runtime.block_on(waiter).unwrap(),
                None => waiter.try_recv().unwrap(),
            };
            assert_eq!(answer.unwrap(), due);
        }
    }

    #[test]
    fn b17_whoever_waits_for_a_writer_that_hangs_is_let_go() {
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        let queue = Arc::new(Queue::new("log".to_owned(), clock.clone()));
        let watch = std::thread::spawn({
            let queue = Arc::clone(&queue);
            move || queue.watch()
        });
        let in_hand = queue.pushed(group("in hand", 1)).unwrap();
        let mut batch = Vec::new();
        queue.take(&mut batch, None);
        let waiting = queue.pushed(group("waiting", 0)).unwrap();
        let closed = queue.close().unwrap();
        assert!(queue.trouble().is_none());
        assert_eq!(queue.figures().backlog, 3);

        clock.advance(ANSWER_WITHIN);
        for answer in [in_hand, waiting] {
            let error = answer.blocking_recv().unwrap().unwrap_err();
            assert_eq!(error.reason(), Reason::AuditUnavailable, "{error}");
            assert!(error.to_string().contains("has not answered for 2 s"), "{error}");
        }
        assert_eq!(closed.blocking_recv().unwrap().unwrap_err().reason(), Reason::AuditUnavailable);
        assert_eq!(queue.trouble().unwrap().reason(), Reason::AuditUnavailable);
        assert_eq!((queue.figures().backlog, queue.figures().failed), (0, 3));

        // The writer comes back, and its answer is nobody's any more.
        queue.settle(&mut Vec::new(), Ok(vec![1]));
        assert!(queue.trouble().is_none());
        assert_eq!(queue.figures().records, 0);
        batch.clear();
        assert_eq!(queue.take(&mut batch, Some(Duration::ZERO)), Phase::Closing);
        assert!(batch.is_empty(), "what was only waiting is forgotten");
        queue.finish(&Ok(()));
        watch.join().unwrap();
    }

    #[test]
    fn b17_while_the_writer_hangs_nothing_is_taken() {
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        let queue = Queue::new("log".to_owned(), clock.clone());
        queue.take(&mut Vec::new(), Some(Duration::ZERO));
        clock.advance(ANSWER_WITHIN - Duration::from_millis(1));
        let waiting = queue.pushed(group("", 0));
        assert!(waiting.is_ok(), "a slow disk is not one that hangs");
        clock.advance(Duration::from_millis(1));
        assert!(!queue.look(queue.lock()), "one look may come just after a clock was set");
        assert!(queue.pushed(group("", 0)).is_ok());
        assert!(queue.look(queue.lock()));
        assert_eq!(queue.pushed(group("", 0)).unwrap_err().reason(), Reason::AuditUnavailable);
        let mut batch = Vec::new();
        queue.take(&mut batch, Some(Duration::ZERO));
        assert!(batch.is_empty(), "what waited was let go");
        assert!(queue.pushed(group("", 0)).is_ok());
    }

    #[test]
    fn each_can_have_an_answer_of_its_own() {
        let queue = queue();
        let waiters = [0, 2, 0].map(|more| queue.pushed(group("", more)).unwrap());
        let mut batch = Vec::new();
        queue.take(&mut batch, Some(Duration::ZERO));
        let refused = queue.unavailable("full".to_owned());
        queue.settle_each(&mut Vec::new(), vec![Ok(7), Err(refused), Ok(8)]);
        let answers = waiters.map(|waiter| waiter.blocking_recv().unwrap());
        assert!(matches!(answers, [Ok(7), Err(AuditError::Unavailable { .. }), Ok(8)]), "{answers:?}");
        let figures = queue.figures();
        assert_eq!((figures.records, figures.failed, figures.latency.count, figures.backlog), (2, 3, 2, 0));
    }

    #[test]
    fn tasks_that_are_ready_wake_the_writer_once_and_behind_the_last() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let queue = Arc::new(queue());
        let push = |queue: Arc<Queue>| async move {
            let (answer, nudge) = queue.push(group("", 0)).unwrap();
            let is_first = nudge.is_some();
            if let Some(nudge) = nudge {
                let queue = Arc::clone(&queue);
                nudge.send(move || queue.nudge());
            }
            // What another task that was ready at the same time finds.
            (is_first, queue.lock().is_due, answer)
        };
        let pushed = runtime.block_on(async {
            let tasks: Vec<_> = (0..5).map(|_| tokio::spawn(push(Arc::clone(&queue)))).collect();
            let mut pushed = Vec::new();
            for task in tasks {
                pushed.push(task.await.unwrap());
            }
            tokio::task::yield_now().await;
            pushed
        });
        assert_eq!(pushed.iter().filter(|(is_first, ..)| *is_first).count(), 1);
        assert!(
            pushed.iter().all(|(_, is_due, _)| !is_due),
            "nobody wakes the writer before the last has pushed"
        );
        assert!(queue.lock().is_due && queue.lock().nudged_by.is_none());
        assert_eq!(taken(&queue), 5);
    }

    #[test]
    fn what_nobody_nudges_for_is_found_by_the_watch() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let queue = Arc::new(queue());
        let writer = std::thread::spawn({
            let queue = Arc::clone(&queue);
            move || {
                let mut batch = Vec::new();
                queue.take(&mut batch, None);
                batch.len()
            }
        });
        let answer = {
            let _context = runtime.enter();
            queue.pushed(group("", 0)).unwrap()
        };
        drop(runtime);
        while !writer.is_finished() {
            queue.look(queue.lock());
            std::thread::yield_now();
        }
        assert_eq!(writer.join().unwrap(), 1);
        drop(answer);
    }

    #[test]
    fn a_writer_that_is_poked_wakes_up_once() {
        let queue = queue();
        queue.poke();
        assert_eq!(queue.take(&mut Vec::new(), None), Phase::Open, "without work");
        assert_eq!(queue.take(&mut Vec::new(), Some(Duration::ZERO)), Phase::Open);
        assert!(!queue.lock().is_poked);
    }

    #[test]
    fn a_writer_without_work_does_not_hang() {
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        let queue = Arc::new(Queue::new("log".to_owned(), clock.clone()));
        let writer = std::thread::spawn({
            let queue = Arc::clone(&queue);
            move || {
                let mut batch = Vec::new();
                queue.take(&mut batch, None);
                batch.len()
            }
        });
        clock.advance(10 * ANSWER_WITHIN);
        let _waiting = queue.pushed(group("", 0)).unwrap();
        assert_eq!(writer.join().unwrap(), 1);
    }
}
