//! Where connections are served: threads with a runtime each, that share nothing but the house.
//!
//! ```text
//! listeners ─▶ accept, a place ─▶ Workers::give ─┬▶ worker 0   one thread, one runtime: handshake, HTTP/2, calls
//!   (the main runtime)                           ├▶ worker 1
//!                                                └▶ …          to the one with the fewest connections
//! ```
//!
//! A runtime of one thread answers all calls that came together with one write, takes no lock to hand a task on, and
//! wakes nobody: on the same core it serves up to twice as many calls as one that can move its tasks. What it can't do is
//! to share one connection's work, so connections are dealt out as they come. They are handed on after they are accepted,
//! and not accepted by each worker from a socket of its own (`SO_REUSEPORT`): the kernel deals those out by hash, which
//! leaves one of two workers idle as soon as connections are few, and lets any other process of the same user listen on
//! the same port.

use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;

/// How long a worker is waited for at the end.
const LEAVES_WITHIN: Duration = Duration::from_secs(2);

/// What a worker is to see to the end: a connection.
type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

enum Order {
    Serve(Work, Busy),
    /// Let go of all that is served.
    Cut,
}

/// Threads that serve connections. They, and what was spawned by the calls that they served, end when this is dropped.
pub struct Workers {
    workers: Vec<Worker>,
    ended: Arc<Notify>,
}

struct Worker {
    orders: Option<mpsc::UnboundedSender<Order>>,
    serves: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
    /// Says when the thread has ended.
    ended: Mutex<Receiver<()>>,
}

impl Workers {
    /// So many of them; `None`: one for each processor that this process may use.
    ///
    /// # Errors
    /// Where the system gives no thread or no runtime.
    pub fn start(count: Option<NonZeroUsize>) -> io::Result<Self> {
        let count = count.map_or_else(thread::available_parallelism, Ok)?;
        let mut workers = Self { workers: Vec::with_capacity(count.get()), ended: Arc::default() };
        for number in 0..count.get() {
            workers.workers.push(Worker::start(number)?);
        }
        Ok(workers)
    }

    /// How many there are.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.workers.len()
    }

    /// Has `work` done by the one that has the least of it.
    pub(super) fn give(&self, work: impl Future<Output = ()> + Send + 'static) {
        let mut order: Option<Work> = Some(Box::pin(work));
        let mut workers: Vec<&Worker> = self.workers.iter().collect();
        workers.sort_by_key(|worker| worker.serves.load(Ordering::Relaxed));
        for Worker { orders, serves, .. } in workers {
            let (Some(orders), Some(work)) = (orders, order.take()) else { return };
            let Err(refused) = orders.send(Order::Serve(work, Busy::new(serves, &self.ended))) else {
                return;
            };
            // It is no more, which is a defect; the others serve on.
            tracing::error!("a thread that serves connections has ended; restart the broker");
            if let Order::Serve(work, _) = refused.0 {
                order = Some(work);
            }
        }
    }

    /// Waits until all work is done.
    pub(super) async fn idle(&self) {
        loop {
            let ended = self.ended.notified();
            if self.workers.iter().all(|worker| worker.serves.load(Ordering::Acquire) == 0) {
                return;
            }
            ended.await;
        }
    }

    /// Lets go of the work that is not done.
    pub(super) fn cut(&self) {
        for orders in self.workers.iter().filter_map(|worker| worker.orders.as_ref()) {
            drop(orders.send(Order::Cut));
        }
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").field("count", &self.count()).finish()
    }
}

impl Worker {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (orders, mut received) = mpsc::unbounded_channel();
        let serve = async move {
            let mut served = JoinSet::new();
            loop {
                tokio::select! {
                    order = received.recv() => match order {
                        Some(Order::Serve(work, busy)) => {
                            served.spawn(async move {
                                let _busy = busy;
                                work.await;
                            });
                        }
                        Some(Order::Cut) => served.abort_all(),
                        None => return,
                    },
                    Some(_) = served.join_next(), if !served.is_empty() => {}
                }
            }
        };
        let (ends, ended) = std::sync::mpsc::channel();
        let thread = thread::Builder::new().name(format!("claviger-serve-{number}")).spawn(move || {
            runtime.block_on(serve);
            // What was begun on other threads is not waited for.
            runtime.shutdown_background();
            drop(ends);
        })?;
        Ok(Self {
            orders: Some(orders),
            serves: Arc::default(),
            thread: Some(thread),
            ended: Mutex::new(ended),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.orders.take());
        // Not by a thread that a worker's own task is dropped on, nor for longer than anything else at the end: one that
        // the kernel holds must not hold the process.
        let own = thread::current().id();
        let Some(thread) = self.thread.take().filter(|thread| thread.thread().id() != own) else { return };
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        if ended.recv_timeout(LEAVES_WITHIN) == Err(RecvTimeoutError::Disconnected) {
            drop(thread.join());
        }
    }
}

/// Work that is not done yet.
struct Busy {
    serves: Arc<AtomicUsize>,
    ended: Arc<Notify>,
}

impl Busy {
    fn new(serves: &Arc<AtomicUsize>, ended: &Arc<Notify>) -> Self {
        serves.fetch_add(1, Ordering::Relaxed);
        Self { serves: Arc::clone(serves), ended: Arc::clone(ended) }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.serves.fetch_sub(1, Ordering::Release);
        self.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    fn workers(count: usize) -> Workers {
        Workers::start(NonZeroUsize::new(count)).unwrap()
    }

    #[tokio::test]
    async fn work_goes_to_the_one_that_has_least() {
        let workers = workers(2);
        let (threads, mut ends) = (Arc::new(Mutex::new(Vec::new())), Vec::new());
        for _ in 0..4 {
            let (begun, began) = oneshot::channel();
            let (end, ended) = oneshot::channel::<()>();
            let threads = Arc::clone(&threads);
            workers.give(async move {
                threads.lock().unwrap().push(thread::current().id());
                begun.send(()).unwrap();
                drop(ended.await);
            });
            began.await.unwrap();
            ends.push(end);
        }
        let of = |id| threads.lock().unwrap().iter().filter(|thread| **thread == id).count();
        let first = threads.lock().unwrap()[0];
        assert_eq!(of(first), 2, "each has half");
        assert_ne!(first, thread::current().id());
        drop(ends);
        workers.idle().await;
    }

    #[tokio::test]
    async fn what_is_cut_is_let_go_and_the_worker_goes_on() {
        let workers = workers(1);
        workers.give(std::future::pending());
        workers.cut();
        workers.idle().await;
        let (done, is_done) = oneshot::channel();
        workers.give(async move { done.send(()).unwrap() });
        is_done.await.unwrap();
    }

    #[tokio::test]
    async fn a_defect_ends_its_own_work_alone() {
        let workers = workers(1);
        workers.give(async { panic!("a defect") });
        workers.idle().await;
        let (done, is_done) = oneshot::channel();
        workers.give(async move { done.send(()).unwrap() });
        is_done.await.unwrap();
    }

    #[test]
    fn they_end_with_their_work_when_they_are_dropped() {
        let (end, mut ended) = oneshot::channel::<()>();
        let workers = workers(2);
        workers.give(async move {
            std::future::pending::<()>().await;
            drop(end);
        });
        drop(workers);
        assert!(matches!(ended.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
    }
}
