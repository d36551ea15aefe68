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
use crate::error::Reasoned;

/// How long a probe may take.
const LIMIT: Duration = Duration::from_secs(2);
/// How far past its beat and its limit a check may be before it counts as failed: a machine that was busy.
const PATIENCE: Duration = Duration::from_secs(10);
/// How much of a probe's words is kept, in characters.
const LONGEST: usize = 256;

/// Asks a part whether it works.
pub type Probe = Box<dyn Fn() -> BoxFuture<'static, Result<(), Problem>> + Send + Sync>;

/// What is wrong with a part, on one line each: for whoever reaches the admin door, and for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    shown: String,
    logged: String,
}

impl Problem {
    /// An error of a layer below. Its stable code is shown; its text may name a path, an account or a role, and goes
    /// to the log alone.
    #[must_use]
    pub fn of(error: &impl Reasoned) -> Self {
        Self { shown: error.reason().code().to_owned(), logged: one_line(&error.to_string()) }
    }
}

/// A line that anybody may read: it names no secret, no caller, no account and no path.
impl From<String> for Problem {
    fn from(text: String) -> Self {
        let line = one_line(&text);
        Self { shown: line.clone(), logged: line }
    }
}

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
    pub fn needed<F, E>(name: impl Into<String>, probe: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<Problem> + Send + 'static,
    {
        let probe: Probe = Box::new(move || -> BoxFuture<'static, Result<(), Problem>> {
            let asked = probe();
            Box::pin(async move { asked.await.map_err(|problem| -> Problem { problem.into() }) })
        });
        Self { name: name.into(), needed_for_ready: true, every: Self::OFTEN, probe }
    }

    /// A check that is only shown, made so often.
    pub fn shown<F, E>(
        name: impl Into<String>,
        every: Duration,
        probe: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<Problem> + Send + 'static,
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
    /// What is wrong, on one line that anybody may read.
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
            Ok(result) => result,
            Err(_) => Err(Problem::from(format!("gave no answer within {:?}", self.limit))),
        };
        let shown = result.as_ref().copied().map_err(|problem| problem.shown.clone());
        let found = Seen { made: self.clock.monotonic(), checked_at: self.clock.now(), result: shown };
        let before = locked(seen).replace(found);
        say(&check.name, before.is_some_and(|before| before.result.is_err()), &result);
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
fn say(check: &str, failed_before: bool, result: &Result<(), Problem>) {
    match (result, failed_before) {
        (Err(problem), false) => tracing::error!(check, problem = %problem.logged, "a health check fails"),
        (Ok(()), true) => tracing::info!(check, "a health check passes again"),
        _ => {}
    }
}

/// Cut, and without what a terminal would not print as it stands: control characters, other line ends, and marks that
/// turn or hide text.
fn one_line(problem: &str) -> String {
    let clean = |c: char| match c {
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' => ' ',
        c if c.is_control() => ' ',
        c => c,
    };
    problem.chars().map(clean).take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::error::Reason;
    use std::io;
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
            Box::new(move || -> BoxFuture<'static, Result<(), Problem>> {
                part.asked.fetch_add(1, Ordering::SeqCst);
                let works = part.works.load(Ordering::SeqCst);
                Box::pin(async move { if works { Ok(()) } else { Err("out\nof order".to_owned().into()) } })
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
        let hangs = Check::needed("kv", std::future::pending::<Result<(), String>>);
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

    /// What a disk that can't be written says.
    #[derive(Debug, thiserror::Error)]
    #[error("/var/lib/claviger/audit: no space\u{1b}[2J\nis left")]
    struct DiskFull;

    impl Reasoned for DiskFull {
        fn reason(&self) -> Reason {
            Reason::AuditUnavailable
        }
    }

    #[test]
    fn what_an_error_says_is_for_the_log_alone() {
        let problem = Problem::of(&DiskFull);
        assert_eq!(problem.shown, "AUDIT_UNAVAILABLE");
        assert_eq!(problem.logged, "/var/lib/claviger/audit: no space [2J is left");
    }

    #[test]
    fn a_detail_is_one_short_line() {
        assert_eq!(one_line("a\r\nb\u{0}c\u{85}d\u{2028}e\u{202e}f\u{feff}g"), "a  b c d e f g");
        assert_eq!(one_line(&"\u{e9}".repeat(1_000)), "\u{e9}".repeat(LONGEST));
    }

    #[derive(Clone, Default)]
    struct Said(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Said {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn each_crossing_is_said_once() {
        let fails = Arc::new(AtomicBool::new(false));
        let probe = Arc::clone(&fails);
        let check = Check::needed("audit", move || {
            let fails = probe.load(Ordering::SeqCst);
            async move { if fails { Err(Problem::of(&DiskFull)) } else { Ok(()) } }
        });
        let (_stop, stopped) = watch::channel(false);
        let health = Health::new(vec![check], ManualClock::new(Timestamp::UNIX_EPOCH), stopped);
        // Once before anybody listens, so that the places in the code that speak are known to whoever does.
        for fail in [true, false] {
            fails.store(fail, Ordering::SeqCst);
            health.check_now().await;
        }
        let said = Said::default();
        let writer = said.clone();
        let lines = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        let listening = tracing::subscriber::set_default(lines);
        for fail in [false, true, true, true, false, false, true] {
            fails.store(fail, Ordering::SeqCst);
            health.check_now().await;
        }
        drop(listening);
        assert_eq!(health.findings()[0].result, Err("AUDIT_UNAVAILABLE".to_owned()));
        let said = String::from_utf8(said.0.lock().unwrap().clone()).unwrap();
        let fails =
            "ERROR claviger::server::health: a health check fails check=\"audit\" problem=/var/lib/claviger";
        let passes = "INFO claviger::server::health: a health check passes again check=\"audit\"";
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines.len(), 3, "{said}");
        for (line, expected) in lines.iter().zip([fails, passes, fails]) {
            assert!(line.contains(expected), "{said}");
        }
    }
}
