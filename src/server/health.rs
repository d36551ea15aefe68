//! Whether the broker can do its work: named checks, made in the background, and what they add up to.
//!
//! ```text
//! Health::keep ─▶ probe, each on its own beat ─▶ last result ─▶ /readyz, /health
//!                                                     └─▶ readiness ─▶ gRPC health
//! ```
//!
//! INVARIANT: who asks never causes a probe. A flood of questions costs reads of memory, and no store is asked more
//! often than its beat says.
//!
//! INVARIANT: a check that was not made in time counts as failed. Silence is never good news.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::{BoxFuture, join_all};
use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::clock::SharedClock;

/// How long a probe may take.
const LIMIT: Duration = Duration::from_secs(2);
/// How far past its beat and its limit a check may be before it counts as failed: a machine that was busy.
const PATIENCE: Duration = Duration::from_secs(10);
/// How much of a probe's words is kept, in characters.
const LONGEST: usize = 256;

/// Asks a part whether it works. What it says is shown to whoever reaches the admin door: a line that names no secret,
/// no caller and no value.
pub type Probe = Box<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// One thing that must work.
pub struct Check {
    /// What it is called: `kv`, `audit`, `store:production`. Names no secret.
    pub name: String,
    /// Whether the broker takes no calls while it fails.
    pub needed_for_ready: bool,
    /// How often it is made.
    pub every: Duration,
    /// How.
    pub probe: Probe,
}

impl Check {
    /// Every second: what costs nothing to ask.
    pub const OFTEN: Duration = Duration::from_secs(1);
    /// Every 30 seconds: what costs money to ask.
    pub const SELDOM: Duration = Duration::from_secs(30);

    /// A check that the broker is not ready without, made [often](Self::OFTEN).
    pub fn needed<F>(name: impl Into<String>, probe: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        let probe: Probe = Box::new(move || -> BoxFuture<'static, Result<(), String>> { Box::pin(probe()) });
        Self { name: name.into(), needed_for_ready: true, every: Self::OFTEN, probe }
    }

    /// A check that is only shown, made so often.
    pub fn shown<F>(
        name: impl Into<String>,
        every: Duration,
        probe: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        Self { needed_for_ready: false, every, ..Self::needed(name, probe) }
    }
}

impl std::fmt::Debug for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Check").field("name", &self.name).field("every", &self.every).finish_non_exhaustive()
    }
}

/// What a check last found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The check.
    pub name: String,
    /// Whether the broker takes no calls while it fails.
    pub needed_for_ready: bool,
    /// When it was made; `None`: not yet.
    pub checked_at: Option<Timestamp>,
    /// What it found.
    ///
    /// # Errors
    /// What is wrong, on one line.
    pub result: Result<(), String>,
}

/// The checks, and what they found.
#[derive(Debug)]
pub struct Health {
    checks: Vec<(Check, Mutex<Option<Seen>>)>,
    clock: SharedClock,
    ready: watch::Sender<bool>,
    shutdown: watch::Receiver<bool>,
    limit: Duration,
}

#[derive(Debug, Clone)]
struct Seen {
    made: Duration,
    checked_at: Timestamp,
    result: Result<(), String>,
}

impl Health {
    /// Checks that were not made yet: the broker is not ready before [`keep`](Self::keep) has made those it needs. Once
    /// `shutdown` says true it never is again.
    #[must_use]
    pub fn new(checks: Vec<Check>, clock: SharedClock, shutdown: watch::Receiver<bool>) -> Arc<Self> {
        Arc::new(Self::with_limit(checks, clock, shutdown, LIMIT))
    }

    fn with_limit(
        checks: Vec<Check>,
        clock: SharedClock,
        shutdown: watch::Receiver<bool>,
        limit: Duration,
    ) -> Self {
        let checks = checks.into_iter().map(|check| (check, Mutex::new(None))).collect();
        Self { checks, clock, ready: watch::Sender::new(false), shutdown, limit }
    }

    /// Makes each check on its beat, all at once at first, until this future is dropped.
    pub async fn keep(self: Arc<Self>) {
        join_all(self.checks.iter().map(|check| self.keep_one(check))).await;
    }

    /// Makes every check once, all at the same time.
    pub async fn check_now(&self) {
        join_all(self.checks.iter().map(|check| self.make(check))).await;
    }

    /// Whether the broker was told to stop.
    #[must_use]
    pub fn draining(&self) -> bool {
        *self.shutdown.borrow()
    }

    /// Whether the broker takes calls: not told to stop, and nothing that it needs fails.
    #[must_use]
    pub fn ready(&self) -> bool {
        !self.draining()
            && self.findings().iter().all(|found| !found.needed_for_ready || found.result.is_ok())
    }

    /// Changes when a check changes what [`ready`](Self::ready) says; not when the broker is told to stop.
    pub(crate) fn readiness(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// Says true once the broker is told to stop.
    pub(crate) fn shutdown(&self) -> watch::Receiver<bool> {
        self.shutdown.clone()
    }

    /// What each check last found, in the order in which they were given.
    #[must_use]
    pub fn findings(&self) -> Vec<Finding> {
        let now = self.clock.monotonic();
        self.checks.iter().map(|(check, seen)| finding(check, locked(seen).as_ref(), now)).collect()
    }

    async fn keep_one(&self, check: &(Check, Mutex<Option<Seen>>)) {
        let mut beat = interval(check.0.every.max(Duration::from_millis(1)));
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            beat.tick().await;
            self.make(check).await;
        }
    }

    async fn make(&self, (check, seen): &(Check, Mutex<Option<Seen>>)) {
        let result = match timeout(self.limit, (check.probe)()).await {
            Ok(result) => result.map_err(|problem| one_line(&problem)),
            Err(_) => Err(format!("gave no answer within {:?}", self.limit)),
        };
        let found = Seen { made: self.clock.monotonic(), checked_at: self.clock.now(), result };
        let before = locked(seen).replace(found.clone());
        say(&check.name, before.as_ref(), &found);
        let ready = self.ready();
        self.ready.send_if_modified(|told| std::mem::replace(told, ready) != ready);
    }
}

fn locked(seen: &Mutex<Option<Seen>>) -> std::sync::MutexGuard<'_, Option<Seen>> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn finding(check: &Check, seen: Option<&Seen>, now: Duration) -> Finding {
    let overdue = check.every + LIMIT + PATIENCE;
    let result = match seen {
        None => Err("was not checked yet".to_owned()),
        Some(seen) if now.saturating_sub(seen.made) > overdue => {
            Err("was not checked in time; the broker is overloaded or was suspended".to_owned())
        }
        Some(seen) => seen.result.clone(),
    };
    Finding {
        name: check.name.clone(),
        needed_for_ready: check.needed_for_ready,
        checked_at: seen.map(|seen| seen.checked_at),
        result,
    }
}

/// Tells the log when a check begins to fail, and when it no longer does.
fn say(check: &str, before: Option<&Seen>, found: &Seen) {
    let failed_before = before.is_some_and(|before| before.result.is_err());
    match (&found.result, failed_before) {
        (Err(problem), false) => tracing::error!(check, %problem, "a health check fails"),
        (Ok(()), true) => tracing::info!(check, "a health check passes again"),
        _ => {}
    }
}

fn one_line(problem: &str) -> String {
    problem.chars().map(|c| if c.is_control() { ' ' } else { c }).take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    struct Part {
        works: AtomicBool,
        asked: AtomicUsize,
    }

    impl Part {
        fn new() -> Arc<Self> {
            Arc::new(Self { works: AtomicBool::new(true), asked: AtomicUsize::new(0) })
        }

        fn probe(self: &Arc<Self>) -> Probe {
            let part = Arc::clone(self);
            Box::new(move || -> BoxFuture<'static, Result<(), String>> {
                part.asked.fetch_add(1, Ordering::SeqCst);
                let works = part.works.load(Ordering::SeqCst);
                Box::pin(async move { if works { Ok(()) } else { Err("out\nof order".to_owned()) } })
            })
        }
    }

    struct Fixture {
        health: Arc<Health>,
        clock: Arc<ManualClock>,
        stop: watch::Sender<bool>,
        needed: Arc<Part>,
        shown: Arc<Part>,
    }

    fn fixture() -> Fixture {
        let (needed, shown) = (Part::new(), Part::new());
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        let (stop, stopped) = watch::channel(false);
        let checks = vec![
            Check::needed("kv", needed.probe()),
            Check::shown("store:production", Check::SELDOM, shown.probe()),
        ];
        Fixture { health: Health::new(checks, clock.clone(), stopped), clock, stop, needed, shown }
    }

    #[tokio::test]
    async fn nothing_is_ready_before_it_was_checked() {
        let fixture = fixture();
        assert!(!fixture.health.ready());
        assert_eq!(fixture.health.findings()[0].checked_at, None);
        fixture.health.check_now().await;
        assert!(fixture.health.ready());
        assert_eq!(fixture.health.findings()[0].checked_at, Some(Timestamp::UNIX_EPOCH));
    }

    #[tokio::test]
    async fn only_what_is_needed_takes_readiness_away() {
        let fixture = fixture();
        fixture.shown.works.store(false, Ordering::SeqCst);
        fixture.health.check_now().await;
        assert!(fixture.health.ready());
        assert_eq!(fixture.health.findings()[1].result, Err("out of order".to_owned()));
        fixture.needed.works.store(false, Ordering::SeqCst);
        fixture.health.check_now().await;
        assert!(!fixture.health.ready());
        fixture.needed.works.store(true, Ordering::SeqCst);
        fixture.health.check_now().await;
        assert!(fixture.health.ready(), "it mends by itself");
    }

    #[tokio::test]
    async fn a_change_is_told_once() {
        let fixture = fixture();
        let mut readiness = fixture.health.readiness();
        fixture.health.check_now().await;
        assert!(readiness.has_changed().unwrap() && *readiness.borrow_and_update());
        fixture.health.check_now().await;
        assert!(!readiness.has_changed().unwrap());
    }

    #[tokio::test]
    async fn asking_costs_no_probe() {
        let fixture = fixture();
        fixture.health.check_now().await;
        for _ in 0..1_000 {
            assert!(fixture.health.ready());
        }
        assert_eq!(fixture.needed.asked.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_check_that_is_not_made_counts_as_failed() {
        let fixture = fixture();
        fixture.health.check_now().await;
        fixture.clock.advance(Duration::from_secs(12));
        assert!(fixture.health.ready());
        fixture.clock.advance(Duration::from_secs(12));
        assert!(!fixture.health.ready());
        assert!(fixture.health.findings()[1].result.is_ok(), "each by its own beat");
    }

    #[tokio::test]
    async fn a_probe_that_hangs_fails() {
        let (_stop, stopped) = watch::channel(false);
        let hangs = Check::needed("kv", std::future::pending);
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        let health = Health::with_limit(vec![hangs], clock, stopped, Duration::from_millis(1));
        health.check_now().await;
        assert_eq!(health.findings()[0].result, Err("gave no answer within 1ms".to_owned()));
    }

    #[tokio::test]
    async fn a_broker_that_stops_is_not_ready() {
        let fixture = fixture();
        fixture.health.check_now().await;
        fixture.stop.send(true).unwrap();
        assert!(fixture.health.draining() && !fixture.health.ready());
    }
}
