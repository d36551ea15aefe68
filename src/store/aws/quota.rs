//! AWS's quotas on the rate of calls, kept on this side: for each quota of an account in a region a bucket of tokens,
//! which all environments share that ask in the name of that account.
//!
//! ```text
//! call ─▶ bucket ── a token, and nobody in line: go
//!            └───── in line, first come first served ── its token within 5 s: go
//!                                                    └── later: refused, and AWS is not asked
//! ```
//!
//! | calls | quota, a second |
//! |---|---|
//! | `GetSecretValue`, `DescribeSecret` | 10,000 together |
//! | `BatchGetSecretValue`, `ListSecrets` | 100 each |
//! | `PutSecretValue`, `UpdateSecretVersionStage` | 50 together |
//! | `CreateSecret`, `DeleteSecret`, `RestoreSecret`, `ListSecretVersionIds` | 50 each |
//!
//! (AWS Secrets Manager user guide, "AWS Secrets Manager quotas".) Of each, half is given out every second, and three
//! tenths may be given out at once after a pause: in no second more than eight tenths, so that something is left to
//! others in the account.
//!
//! AWS counts the calls of whoever makes them: a role's account is in its ARN, and what the process has by itself counts
//! as one more account. Where that is a role's account too, the two together may ask for more than is there; AWS then
//! throttles, and the SDK tries again. A second attempt of the SDK takes no token: it comes after a pause, and is paid
//! from the SDK's own budget of retries.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};

use crate::clock::SharedClock;
use crate::environment::AwsSettings;
use crate::store::Upstream;

/// How long a call may wait for its token. Shorter than any caller waits for an answer, so that it is told why.
const LONGEST: Duration = Duration::from_secs(5);
/// The same, of a call for many secrets: long enough for the fifty that a thousand secrets take.
const LONGEST_FOR_A_BATCH: Duration = Duration::from_millis(600);
/// Tenths of a quota: given out each second, and at once.
const EACH_SECOND: u32 = 5;
const AT_ONCE: u32 = 3;

/// A call, by AWS's name of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    GetSecretValue,
    BatchGetSecretValue,
    DescribeSecret,
    ListSecrets,
    ListSecretVersionIds,
    CreateSecret,
    PutSecretValue,
    UpdateSecretVersionStage,
    DeleteSecret,
    RestoreSecret,
}

/// The quotas of the accounts in whose names a broker asks AWS. One for all stores of a broker.
#[derive(Debug)]
pub struct Accounts {
    clock: SharedClock,
    known: Mutex<HashMap<Place, Arc<Account>>>,
}

impl Accounts {
    /// No account yet; tokens come back by the monotonic reading of `clock`.
    #[must_use]
    pub fn new(clock: SharedClock) -> Self {
        Self { clock, known: Mutex::default() }
    }

    pub(super) fn at(&self, place: &Place) -> Arc<Account> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let account = known.entry(place.clone()).or_insert_with(|| Arc::new(Account::new(&self.clock)));
        Arc::clone(account)
    }
}

/// Where AWS counts together: an account in a region, behind an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Place {
    /// That of the role to assume; `None`: that of the process's own credentials.
    account: Option<String>,
    region: Option<String>,
    endpoint: Option<String>,
}

impl Place {
    /// Where an environment's calls count; `region` is the one that was found.
    pub(super) fn of(settings: &AwsSettings, region: Option<String>) -> Self {
        Self {
            account: settings.role_arn.as_deref().map(|role| account_of(role).to_owned()),
            region,
            endpoint: settings.endpoint.clone(),
        }
    }
}

/// The account in a role's ARN, `arn:PARTITION:iam::ACCOUNT:role/NAME`; of what is none, all of it.
fn account_of(role: &str) -> &str {
    role.split(':').nth(4).filter(|account| !account.is_empty()).unwrap_or(role)
}

/// The buckets of one account in one region.
#[derive(Debug)]
pub(super) struct Account {
    reads: Bucket,
    batches: Bucket,
    lists: Bucket,
    version_lists: Bucket,
    creations: Bucket,
    writes: Bucket,
    deletions: Bucket,
    restorations: Bucket,
}

impl Account {
    pub(super) fn new(clock: &SharedClock) -> Self {
        let bucket = |quota| Bucket::new(quota, clock);
        Self {
            reads: bucket(10_000),
            batches: bucket(100),
            lists: bucket(100),
            version_lists: bucket(50),
            creations: bucket(50),
            writes: bucket(50),
            deletions: bucket(50),
            restorations: bucket(50),
        }
    }

    /// Waits for a token; says for how long it did, which is zero as a rule. Whoever goes away meanwhile takes none.
    pub(super) async fn admit(&self, operation: Operation) -> Result<Duration, Late> {
        let longest = match operation {
            // What does not get through can be read one by one, which has a hundred times the quota.
            Operation::BatchGetSecretValue => LONGEST_FOR_A_BATCH,
            _ => LONGEST,
        };
        self.bucket(operation).take_within(longest).await
    }

    const fn bucket(&self, operation: Operation) -> &Bucket {
        match operation {
            Operation::GetSecretValue | Operation::DescribeSecret => &self.reads,
            Operation::BatchGetSecretValue => &self.batches,
            Operation::ListSecrets => &self.lists,
            Operation::ListSecretVersionIds => &self.version_lists,
            Operation::CreateSecret => &self.creations,
            Operation::PutSecretValue | Operation::UpdateSecretVersionStage => &self.writes,
            Operation::DeleteSecret => &self.deletions,
            Operation::RestoreSecret => &self.restorations,
        }
    }
}

/// A call that would have had to wait for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Late {
    /// When those who are in line now are through.
    pub(super) retry_after: Duration,
}

struct Bucket {
    limiter: RateLimiter<NotKeyed, InMemoryState, HouseClock, NoOpMiddleware<Duration>>,
    /// How long it takes until there is one more token.
    each: Duration,
    in_line: AtomicU32,
    /// Held by the first in line. It is handed on in the order of asking, also past those who went away.
    turn: tokio::sync::Mutex<()>,
}

impl Bucket {
    fn new(quota: u32, clock: &SharedClock) -> Self {
        let tenths = |tenths: u32| NonZeroU32::new(quota * tenths / 10).unwrap_or(NonZeroU32::MIN);
        let quota = Quota::per_second(tenths(EACH_SECOND)).allow_burst(tenths(AT_ONCE));
        Self {
            limiter: RateLimiter::direct_with_clock(quota, HouseClock(Arc::clone(clock))),
            each: quota.replenish_interval(),
            in_line: AtomicU32::new(0),
            turn: tokio::sync::Mutex::new(()),
        }
    }

    #[cfg(test)]
    async fn take(&self) -> Result<Duration, Late> {
        self.take_within(LONGEST).await
    }

    async fn take_within(&self, longest: Duration) -> Result<Duration, Late> {
        let place = InLine::enter(&self.in_line);
        if place.ahead == 0 && self.limiter.check().is_ok() {
            return Ok(Duration::ZERO);
        }
        let until_through = self.each.saturating_mul(place.ahead.saturating_add(1));
        let late = Late { retry_after: until_through };
        if until_through > longest {
            return Err(late);
        }
        let began = self.now();
        tokio::time::timeout(longest, self.in_turn()).await.map_err(|_| late)?;
        Ok(self.now().saturating_sub(began))
    }

    async fn in_turn(&self) {
        let _turn = self.turn.lock().await;
        loop {
            let wait = match self.limiter.check() {
                Ok(()) => return,
                Err(refused) => refused.wait_time_from(self.now()),
            };
            // Nothing ever answers here: it is the time that is waited for.
            let _ = tokio::time::timeout(wait, std::future::pending::<()>()).await;
        }
    }

    fn now(&self) -> Duration {
        self.limiter.clock().0.monotonic()
    }
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bucket")
            .field("each", &self.each)
            .field("in_line", &self.in_line)
            .finish_non_exhaustive()
    }
}

/// A place in line, left when it is dropped.
struct InLine<'a> {
    line: &'a AtomicU32,
    ahead: u32,
}

impl<'a> InLine<'a> {
    fn enter(line: &'a AtomicU32) -> Self {
        Self { line, ahead: line.fetch_add(1, Relaxed) }
    }
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        self.line.fetch_sub(1, Relaxed);
    }
}

/// The house's clock as the algorithm reads it.
struct HouseClock(SharedClock);

impl governor::clock::Clock for HouseClock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.0.monotonic()
    }
}

/// What one store has asked of AWS.
#[derive(Debug, Default)]
pub(super) struct Tally {
    value_calls: AtomicU64,
    waits: AtomicU64,
    waited_nanoseconds: AtomicU64,
    refusals: AtomicU64,
}

impl Tally {
    /// Counts a call that is made now, after it waited for so long.
    pub(super) fn admitted(&self, operation: Operation, waited: Duration) {
        if matches!(operation, Operation::GetSecretValue | Operation::BatchGetSecretValue) {
            self.value_calls.fetch_add(1, Relaxed);
        }
        if !waited.is_zero() {
            self.waits.fetch_add(1, Relaxed);
            let nanoseconds = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
            self.waited_nanoseconds.fetch_add(nanoseconds, Relaxed);
        }
    }

    /// Counts a call that was not made.
    pub(super) fn refused(&self) {
        self.refusals.fetch_add(1, Relaxed);
    }

    pub(super) fn upstream(&self) -> Upstream {
        Upstream {
            value_calls: Some(self.value_calls.load(Relaxed)),
            coalesced: 0,
            quota_waits: self.waits.load(Relaxed),
            quota_waited: Duration::from_nanos(self.waited_nanoseconds.load(Relaxed)),
            quota_refusals: self.refusals.load(Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt as _;
    use jiff::Timestamp;

    use super::*;
    use crate::clock::ManualClock;

    /// How long anything may take before a test is called hung. Never what a test waits for.
    const HUNG: Duration = Duration::from_secs(60);
    /// Of a quota of 100 a second.
    const AT_ONCE_OF_100: usize = 30;
    const EACH_OF_100: Duration = Duration::from_millis(20);

    fn clock() -> Arc<ManualClock> {
        ManualClock::new(Timestamp::UNIX_EPOCH)
    }

    /// A bucket of a quota of 100 a second, with nothing left in it.
    fn emptied(clock: &Arc<ManualClock>) -> Bucket {
        let shared: SharedClock = clock.clone();
        let bucket = Bucket::new(100, &shared);
        for _ in 0..AT_ONCE_OF_100 {
            assert_eq!(bucket.take().now_or_never(), Some(Ok(Duration::ZERO)));
        }
        bucket
    }

    async fn in_time<T>(future: impl Future<Output = T>) -> T {
        tokio::time::timeout(HUNG, future).await.expect("hung")
    }

    #[tokio::test]
    async fn so_many_pass_at_once_and_the_next_waits_for_its_token() {
        let clock = clock();
        let bucket = emptied(&clock);
        let mut next = pin!(bucket.take());
        assert_eq!(next.as_mut().now_or_never(), None);
        clock.advance(EACH_OF_100);
        assert_eq!(in_time(next).await, Ok(EACH_OF_100));
        assert_eq!(bucket.take().now_or_never(), None, "that was the only one");
    }

    #[tokio::test]
    async fn in_no_second_more_than_eight_tenths_pass() {
        let clock = clock();
        let bucket = emptied(&clock);
        let mut passed = AT_ONCE_OF_100;
        for _ in 0..1_000 {
            clock.advance(Duration::from_millis(1));
            while bucket.take().now_or_never().is_some() {
                passed += 1;
            }
        }
        assert_eq!(passed, 80);
    }

    #[tokio::test]
    async fn nobody_overtakes_who_is_in_line() {
        let clock = clock();
        let bucket = emptied(&clock);
        let mut first = pin!(bucket.take());
        let mut second = pin!(bucket.take());
        assert_eq!(first.as_mut().now_or_never(), None);
        assert_eq!(second.as_mut().now_or_never(), None);
        clock.advance(EACH_OF_100);
        assert_eq!(second.as_mut().now_or_never(), None, "the token is the first one's");
        assert_eq!(bucket.take().now_or_never(), None);
        assert_eq!(in_time(first).await, Ok(EACH_OF_100));
        clock.advance(EACH_OF_100);
        assert_eq!(in_time(second).await, Ok(2 * EACH_OF_100));
    }

    #[tokio::test]
    async fn who_goes_away_takes_no_token() {
        let clock = clock();
        let bucket = emptied(&clock);
        for _ in 0..3 {
            assert_eq!(bucket.take().now_or_never(), None);
        }
        clock.advance(EACH_OF_100);
        assert_eq!(bucket.take().now_or_never(), Some(Ok(Duration::ZERO)));
    }

    #[tokio::test]
    async fn who_would_wait_for_too_long_is_told_when_to_come_back() {
        let clock = clock();
        let bucket = emptied(&clock);
        let mut line: Vec<_> = (0..250).map(|_| Box::pin(bucket.take())).collect();
        assert!(line.iter_mut().all(|waits| waits.as_mut().now_or_never().is_none()));
        let late = Late { retry_after: LONGEST + EACH_OF_100 };
        assert_eq!(bucket.take().now_or_never(), Some(Err(late)));
        line.pop();
        assert_eq!(bucket.take().now_or_never(), None, "there is room again");
    }

    #[test]
    fn environments_share_what_their_account_has_in_a_region() {
        let accounts = Accounts::new(clock());
        let role = |account: &str, name: &str| AwsSettings {
            role_arn: Some(format!("arn:aws:iam::{account}:role/{name}")),
            ..AwsSettings::default()
        };
        let at =
            |settings: &AwsSettings, region: &str| accounts.at(&Place::of(settings, Some(region.to_owned())));
        let one = at(&role("111111111111", "staging"), "eu-central-1");
        assert!(Arc::ptr_eq(&one, &at(&role("111111111111", "production"), "eu-central-1")));
        for other in [
            at(&role("222222222222", "staging"), "eu-central-1"),
            at(&role("111111111111", "staging"), "eu-west-1"),
            at(&AwsSettings::default(), "eu-central-1"),
        ] {
            assert!(!Arc::ptr_eq(&one, &other));
        }
        assert_eq!(account_of("no-arn"), "no-arn");
    }

    #[tokio::test]
    async fn reads_and_writes_have_buckets_of_their_own() {
        let clock: SharedClock = clock();
        let account = Account::new(&clock);
        let takes = |operation| account.admit(operation).now_or_never();
        for _ in 0..15 {
            assert_eq!(takes(Operation::PutSecretValue), Some(Ok(Duration::ZERO)));
        }
        assert_eq!(takes(Operation::UpdateSecretVersionStage), None, "the same quota");
        assert_eq!(takes(Operation::GetSecretValue), Some(Ok(Duration::ZERO)));
        assert_eq!(takes(Operation::CreateSecret), Some(Ok(Duration::ZERO)));
    }
}
