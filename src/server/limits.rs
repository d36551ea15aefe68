//! How often one may ask: a rate for each principal, for each address, and for callers whom nobody knows.
//!
//! ```text
//! known caller ─▶ principal's bucket ─▶ address's bucket ─▶ service
//! stranger     ─▶ address's bucket   ─▶ everyone's bucket ─▶ record, UNAUTHENTICATED
//!                   │
//!                   └─ empty: RATE_LIMITED, on record once in ten seconds for each bucket
//! ```
//!
//! A bucket follows the generic cell rate algorithm: it holds `burst` calls and gets one back every `per / count`. A
//! rate that is not set costs one branch; one that is set costs a look-up and an atomic exchange, and no lock that all
//! callers share.
//!
//! Strangers are always limited: each failed authentication is a durable record, and a flood of them would fill the
//! disk. Whoever changes addresses with every call meets the bucket that all strangers share, which is ten times as
//! large. Callers over Unix sockets have no address: known ones are under their principal's rate alone, and strangers
//! among them share one bucket. The broker's own calls are not limited.
//!
//! INVARIANT: memory is bounded, however many principals and addresses come. Of each kind, the 16,384 that were seen
//! last have a bucket; one that comes back after it was forgotten starts with a full one.

use std::fmt;
use std::hash::{BuildHasher as _, Hash, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use moka::policy::EvictionPolicy;
use moka::sync::Cache;

use crate::clock::SharedClock;
use crate::error::{Reason, Reasoned};
use crate::identity::{Principal, SourceAddress};

/// How many buckets of one kind are kept: some MiB where all of them are.
const MOST_KEYS: u64 = 16_384;
/// How much of an IPv6 address says who it is: a host, or a site, has all addresses of a /64 (RFC 4291, section 2.5.4).
const NETWORK_BITS: u32 = 64;
/// How much larger the bucket is that all strangers share.
const ALL_STRANGERS: u32 = 10;
/// What is turned away at one bucket is on record once in so long.
const RECORD_EVERY: Duration = Duration::from_secs(10);

/// So many calls in so long, and so many at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    count: u32,
    per: Per,
    burst: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Per {
    Second,
    Minute,
    Hour,
}

impl Per {
    const fn time(self) -> Duration {
        Duration::from_secs(match self {
            Self::Second => 1,
            Self::Minute => 60,
            Self::Hour => 3_600,
        })
    }
}

impl Rate {
    /// What a stranger may where nothing else is configured: 2 calls a second, 100 at once. Each leaves a record of about
    /// half a kilobyte, so one address can write less than 100 MB of them a day.
    pub const STRANGERS: Self = Self { count: 2, per: Per::Second, burst: 100 };

    /// Parses `100/s`, `600/m`, `5000/h`, or one of these with a burst behind it: `100/s burst 500`. Both numbers are
    /// 1 to 1,000,000. The burst left out is what one second brings, at least 10.
    ///
    /// # Errors
    /// One line: what is wrong with it and the mend.
    pub fn parse(text: &str) -> Result<Self, String> {
        let refuse = |problem: &str| {
            let shown: String = text.chars().take(32).flat_map(char::escape_default).collect();
            format!("`{shown}` {problem}; write for example `100/s`, `600/m` or `5000/h burst 200`")
        };
        let mut words = text.split_ascii_whitespace();
        let (rate, burst) = match (words.next(), words.next(), words.next(), words.next()) {
            (Some(rate), None, None, None) => (rate, None),
            (Some(rate), Some("burst"), Some(burst), None) => (rate, Some(burst)),
            _ => return Err(refuse("is not a rate")),
        };
        let (count, per) = rate.split_once('/').ok_or_else(|| refuse("does not say in how long"))?;
        let per = match per {
            "s" => Per::Second,
            "m" => Per::Minute,
            "h" => Per::Hour,
            _ => return Err(refuse("is neither per `s`, `m` nor `h`")),
        };
        let number = |text| number(text).ok_or_else(|| refuse("has a number that is not 1 to 1000000"));
        let rate = Self { count: number(count)?, per, burst: 0 };
        let burst = burst.map_or_else(|| Ok(rate.usual_burst()), number)?;
        Ok(Self { burst, ..rate })
    }

    fn usual_burst(self) -> u32 {
        let seconds = u32::try_from(self.per.time().as_secs()).unwrap_or(u32::MAX);
        self.count.checked_div(seconds).unwrap_or(self.count).max(10)
    }

    const fn times(self, factor: u32) -> Self {
        let Self { count, per, burst } = self;
        Self { count: count.saturating_mul(factor), per, burst: burst.saturating_mul(factor) }
    }

    fn quota(self) -> Quota {
        let burst = NonZeroU32::new(self.burst).unwrap_or(NonZeroU32::MIN);
        let each = self.per.time().checked_div(self.count).unwrap_or(self.per.time());
        // No rate is above ten million a second, so a call never takes less than 100 ns.
        Quota::with_period(each).unwrap_or(Quota::per_second(burst)).allow_burst(burst)
    }
}

/// 1 to 1,000,000, in digits alone.
fn number(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|number| digits && (1..=1_000_000).contains(number))
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per = match self.per {
            Per::Second => 's',
            Per::Minute => 'm',
            Per::Hour => 'h',
        };
        write!(f, "{}/{per} burst {}", self.count, self.burst)
    }
}

/// Whose rate it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// One principal's, wherever it calls from.
    Principal,
    /// One address's, whoever calls from it.
    Address,
    /// That of callers whom nobody knows.
    Stranger,
}

impl Scope {
    /// `principal`, `address` or `stranger`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Principal => "principal",
            Self::Address => "address",
            Self::Stranger => "stranger",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A call that came too soon.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rate limit: this {scope} may make {rate}; try again in {} ms", whole_milliseconds(.retry_after))]
pub struct Limited {
    /// Whose rate it was.
    pub scope: Scope,
    /// The rate.
    pub rate: Rate,
    /// When another call has a chance.
    pub retry_after: Duration,
    /// Where it is time to put it on record: how many calls were turned away at this bucket since the last record, this
    /// one included. At most once in ten seconds for each bucket.
    pub unrecorded: Option<u64>,
}

impl Reasoned for Limited {
    fn reason(&self) -> Reason {
        Reason::RateLimited
    }
}

/// Rounded up, so that whoever waits that long does not come too soon.
fn whole_milliseconds(time: &Duration) -> u128 {
    time.as_nanos().div_ceil(1_000_000).max(1)
}

/// The rates in force.
pub struct RateLimits {
    per_principal: Option<Buckets<u64>>,
    per_address: Option<Buckets<IpAddr>>,
    /// `None` is all Unix sockets together.
    strangers: Buckets<Option<IpAddr>>,
    all_strangers: (Rate, Bucket),
    seed: RandomState,
    turned_away: Figures,
}

#[derive(Default)]
struct Figures {
    principal: AtomicU64,
    address: AtomicU64,
    stranger: AtomicU64,
}

impl RateLimits {
    /// Rates by the monotonic reading of `clock`; `None` is no limit.
    #[must_use]
    pub fn new(
        per_principal: Option<Rate>,
        per_address: Option<Rate>,
        strangers: Rate,
        clock: SharedClock,
    ) -> Self {
        let clock = HouseClock(clock);
        let all = strangers.times(ALL_STRANGERS);
        Self {
            per_principal: per_principal.map(|rate| Buckets::new(Scope::Principal, rate, &clock)),
            per_address: per_address.map(|rate| Buckets::new(Scope::Address, rate, &clock)),
            strangers: Buckets::new(Scope::Stranger, strangers, &clock),
            all_strangers: (all, Bucket::new(all, &clock)),
            seed: RandomState::new(),
            turned_away: Figures::default(),
        }
    }

    /// Whether a known caller may call now. The principal's own rate comes first, so that what is over it takes nothing
    /// from others behind the same address.
    ///
    /// # Errors
    /// [`Limited`].
    pub fn admit(&self, principal: &Principal, source: &SourceAddress) -> Result<(), Limited> {
        if matches!(source, SourceAddress::Internal) {
            return Ok(());
        }
        if let Some(principals) = &self.per_principal {
            self.counted(principals.admit(self.key(principal)))?;
        }
        if let Some(addresses) = &self.per_address
            && let Some(network) = network(source)
        {
            self.counted(addresses.admit(network))?;
        }
        Ok(())
    }

    /// Whether there is room for one more failed authentication, and its record.
    ///
    /// # Errors
    /// [`Limited`].
    pub fn admit_stranger(&self, source: &SourceAddress) -> Result<(), Limited> {
        if matches!(source, SourceAddress::Internal) {
            return Ok(());
        }
        let (rate, everyone) = &self.all_strangers;
        let admitted =
            self.strangers.admit(network(source)).and_then(|()| everyone.admit(Scope::Stranger, *rate));
        self.counted(admitted)
    }

    /// How many calls were turned away since the start: by the rate of a principal, of an address, of strangers.
    #[must_use]
    pub fn figures(&self) -> (u64, u64, u64) {
        let Figures { principal, address, stranger } = &self.turned_away;
        (principal.load(Ordering::Relaxed), address.load(Ordering::Relaxed), stranger.load(Ordering::Relaxed))
    }

    /// Kind and id, not groups and claims: more credentials for one principal are no more calls. A keyed hash stands
    /// for them, which takes no allocation, and which nobody outside can aim at another's.
    fn key(&self, principal: &Principal) -> u64 {
        self.seed.hash_one((principal.kind(), principal.id()))
    }

    fn counted(&self, admitted: Result<(), Limited>) -> Result<(), Limited> {
        if let Err(limited) = &admitted {
            let figure = match limited.scope {
                Scope::Principal => &self.turned_away.principal,
                Scope::Address => &self.turned_away.address,
                Scope::Stranger => &self.turned_away.stranger,
            };
            figure.fetch_add(1, Ordering::Relaxed);
        }
        admitted
    }
}

impl fmt::Debug for RateLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimits")
            .field("per_principal", &self.per_principal.as_ref().map(|buckets| buckets.rate))
            .field("per_address", &self.per_address.as_ref().map(|buckets| buckets.rate))
            .field("strangers", &self.strangers.rate)
            .finish_non_exhaustive()
    }
}

/// Whom an address stands for.
fn network(source: &SourceAddress) -> Option<IpAddr> {
    source.ip().map(|address| match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => {
            let host_bits = u128::MAX >> NETWORK_BITS;
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !host_bits))
        }
    })
}

/// A bucket for each key.
struct Buckets<K> {
    scope: Scope,
    rate: Rate,
    clock: HouseClock,
    /// Whoever was not seen for the longest time is forgotten first: a flood of new keys can't keep itself out.
    buckets: Cache<K, Arc<Bucket>>,
}

impl<K: Hash + Eq + Send + Sync + 'static> Buckets<K> {
    fn new(scope: Scope, rate: Rate, clock: &HouseClock) -> Self {
        let buckets = Cache::builder().max_capacity(MOST_KEYS).eviction_policy(EvictionPolicy::lru()).build();
        Self { scope, rate, clock: clock.clone(), buckets }
    }

    fn admit(&self, key: K) -> Result<(), Limited> {
        let bucket = match self.buckets.get(&key) {
            Some(bucket) => bucket,
            None => self.buckets.get_with(key, || Arc::new(Bucket::new(self.rate, &self.clock))),
        };
        bucket.admit(self.scope, self.rate)
    }
}

struct Bucket {
    limiter: RateLimiter<NotKeyed, InMemoryState, HouseClock, NoOpMiddleware<Duration>>,
    /// Turned away since the last record.
    unrecorded: AtomicU64,
    /// The monotonic reading, in milliseconds, before which there is no other record.
    next_record: AtomicU64,
}

impl Bucket {
    fn new(rate: Rate, clock: &HouseClock) -> Self {
        Self {
            limiter: RateLimiter::direct_with_clock(rate.quota(), clock.clone()),
            unrecorded: AtomicU64::new(0),
            next_record: AtomicU64::new(0),
        }
    }

    fn admit(&self, scope: Scope, rate: Rate) -> Result<(), Limited> {
        let Err(refused) = self.limiter.check() else { return Ok(()) };
        let now = self.limiter.clock().0.monotonic();
        let retry_after = refused.wait_time_from(now);
        Err(Limited { scope, rate, retry_after, unrecorded: self.to_record(now) })
    }

    /// Of those who are turned away at the same time, one makes the record.
    fn to_record(&self, now: Duration) -> Option<u64> {
        self.unrecorded.fetch_add(1, Ordering::Relaxed);
        let next = self.next_record.load(Ordering::Relaxed);
        if milliseconds(now) < next {
            return None;
        }
        let after = milliseconds(now + RECORD_EVERY);
        self.next_record
            .compare_exchange(next, after, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
            .then(|| self.unrecorded.swap(0, Ordering::Relaxed))
            .filter(|number| *number > 0)
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The house's clock as the algorithm reads it.
#[derive(Clone)]
struct HouseClock(SharedClock);

impl governor::clock::Clock for HouseClock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.0.monotonic()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use jiff::Timestamp;

    use super::*;
    use crate::clock::ManualClock;
    use crate::identity::{PrincipalKind, Proof};

    fn rate(text: &str) -> Rate {
        Rate::parse(text).unwrap()
    }

    fn principal(kind: PrincipalKind, id: &str, group: &str) -> Principal {
        let proof = Proof { method: "token", detail: String::new() };
        Principal::new(kind, id, BTreeSet::from([group.to_owned()]), BTreeMap::new(), proof)
    }

    fn person(id: &str) -> Principal {
        principal(PrincipalKind::User, id, "team")
    }

    fn from(address: &str) -> SourceAddress {
        SourceAddress::Tcp(address.parse().unwrap())
    }

    const UNIX: SourceAddress = SourceAddress::Unix { pid: Some(1) };

    fn limits(
        per_principal: Option<&str>,
        per_address: Option<&str>,
        strangers: &str,
    ) -> (Arc<ManualClock>, RateLimits) {
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        let limits =
            RateLimits::new(per_principal.map(rate), per_address.map(rate), rate(strangers), clock.clone());
        (clock, limits)
    }

    /// How many calls in a row are admitted, of at most a thousand.
    fn admitted(mut call: impl FnMut() -> Result<(), Limited>) -> usize {
        (0..1_000).take_while(|_| call().is_ok()).count()
    }

    #[test]
    fn rates_are_numbers_per_time_with_a_burst() {
        for (text, shown) in [
            ("100/s", "100/s burst 100"),
            ("5/s", "5/s burst 10"),
            ("600/m", "600/m burst 10"),
            ("6000/m", "6000/m burst 100"),
            ("5000/h", "5000/h burst 10"),
            ("100/s burst 500", "100/s burst 500"),
            ("1000000/s burst 1000000", "1000000/s burst 1000000"),
            ("1/h burst 1", "1/h burst 1"),
        ] {
            assert_eq!(rate(text).to_string(), shown);
            assert_eq!(rate(shown), rate(text));
        }
        for bad in [
            "",
            "100",
            "100/",
            "/s",
            "100/d",
            "0/s",
            "+1/s",
            "-1/s",
            "1.5/s",
            "1000001/s",
            "99999999999/s",
            "100/s burst",
            "100/s burst 0",
            "100/s burst +5",
            "100/s at 5",
            "100/s burst 5 6",
            "100 /s",
            "1/s\n\u{1b}[2J",
        ] {
            let error = Rate::parse(bad).unwrap_err();
            assert!(error.contains("write for example `100/s`"), "{bad:?}: {error}");
            assert!(!error.contains(['\n', '\u{1b}']), "{error:?}");
        }
    }

    #[test]
    fn the_largest_rates_do_not_overflow() {
        for text in ["1/h burst 1000000", "1000000/s burst 1000000", "1000000/h burst 1"] {
            let (clock, limits) = limits(Some(text), None, text);
            limits.admit(&person("ana"), &UNIX).unwrap();
            limits.admit_stranger(&UNIX).unwrap();
            clock.advance(Duration::from_secs(400 * 86_400));
            limits.admit(&person("ana"), &UNIX).unwrap();
            limits.admit_stranger(&UNIX).unwrap();
        }
    }

    #[test]
    fn a_principal_has_its_burst_and_then_its_rate() {
        let (clock, limits) = limits(Some("10/s burst 20"), None, "1/s");
        let ana = person("ana");
        assert_eq!(admitted(|| limits.admit(&ana, &UNIX)), 20);
        let limited = limits.admit(&ana, &from("192.0.2.1:9")).unwrap_err();
        assert_eq!((limited.scope, limited.retry_after), (Scope::Principal, Duration::from_millis(100)));
        assert_eq!(limited.reason(), Reason::RateLimited);
        assert_eq!(
            limited.to_string(),
            "rate limit: this principal may make 10/s burst 20; try again in 100 ms"
        );
        clock.advance(limited.retry_after);
        assert_eq!(admitted(|| limits.admit(&ana, &UNIX)), 1);
        clock.advance(Duration::from_secs(3_600));
        assert_eq!(admitted(|| limits.admit(&ana, &UNIX)), 20);
        assert_eq!(limits.figures(), (4, 0, 0));
    }

    #[test]
    fn one_principal_takes_nothing_from_another_and_gets_no_more_by_more_credentials() {
        let (_clock, limits) = limits(Some("1/s burst 5"), None, "1/s");
        assert_eq!(admitted(|| limits.admit(&person("ana"), &UNIX)), 5);
        let other_group = principal(PrincipalKind::User, "ana", "leads");
        assert_eq!(admitted(|| limits.admit(&other_group, &UNIX)), 0);
        let program = principal(PrincipalKind::Workload, "ana", "team");
        assert_eq!(admitted(|| limits.admit(&program, &UNIX)), 5);
        assert_eq!(admitted(|| limits.admit(&person("eve"), &UNIX)), 5);
    }

    #[test]
    fn an_address_is_limited_whoever_calls_from_it() {
        let (_clock, limits) = limits(None, Some("1/s burst 4"), "1/s");
        let mut callers = ["ana", "eve"].into_iter().cycle();
        let mut call = |address: &str| {
            let source = from(address);
            admitted(|| limits.admit(&person(callers.next().unwrap()), &source))
        };
        assert_eq!(call("192.0.2.1:1000"), 4);
        assert_eq!(call("192.0.2.1:2000"), 0, "another port is no other address");
        assert_eq!(call("[::ffff:192.0.2.1]:1000"), 0, "nor is another way to write it");
        assert_eq!(call("192.0.2.2:1000"), 4);
        assert_eq!(call("[2001:db8::1]:1"), 4);
        assert_eq!(call("[2001:db8::ffff:2]:1"), 0, "a host has a whole /64");
        assert_eq!(call("[2001:db8:0:1::1]:1"), 4);
        assert_eq!(admitted(|| limits.admit(&person("ana"), &UNIX)), 1_000);
        assert_eq!(admitted(|| limits.admit(&person("ana"), &SourceAddress::Internal)), 1_000);
    }

    #[test]
    fn what_is_over_the_principals_rate_takes_nothing_from_its_address() {
        let (_clock, limits) = limits(Some("1/s burst 2"), Some("1/s burst 5"), "1/s");
        let here = from("192.0.2.1:1");
        assert_eq!(admitted(|| limits.admit(&person("ana"), &here)), 2);
        assert_eq!(limits.admit(&person("ana"), &here).unwrap_err().scope, Scope::Principal);
        assert_eq!(admitted(|| limits.admit(&person("eve"), &here)), 2);
        assert_eq!(admitted(|| limits.admit(&person("bob"), &here)), 1);
        assert_eq!(limits.admit(&person("zoe"), &here).unwrap_err().scope, Scope::Address);
        assert_eq!(limits.figures(), (3, 2, 0));
    }

    #[test]
    fn strangers_share_what_all_of_them_may() {
        let (_clock, limits) = limits(None, None, "1/s burst 3");
        let all: usize = (0..100_u8)
            .map(|n| {
                let source = from(&format!("192.0.2.{n}:1"));
                admitted(|| limits.admit_stranger(&source))
            })
            .sum();
        assert_eq!(all, 30, "ten times what one of them may");
        assert_eq!(limits.figures(), (0, 0, 100));
        assert_eq!(admitted(|| limits.admit(&person("ana"), &from("192.0.2.1:1"))), 1_000);
        assert_eq!(admitted(|| limits.admit_stranger(&SourceAddress::Internal)), 1_000);
    }

    #[test]
    fn strangers_over_unix_sockets_share_a_bucket() {
        let (_clock, limits) = limits(None, None, "1/s burst 3");
        let by_pid = |pid| SourceAddress::Unix { pid: Some(pid) };
        assert_eq!(admitted(|| limits.admit_stranger(&by_pid(1))), 3);
        assert_eq!(admitted(|| limits.admit_stranger(&by_pid(2))), 0);
        assert_eq!(admitted(|| limits.admit_stranger(&from("192.0.2.1:1"))), 3);
    }

    #[test]
    fn a_flood_is_recorded_at_once_and_then_now_and_then() {
        let (clock, limits) = limits(None, None, "1/h burst 10");
        let here = from("192.0.2.1:1");
        assert_eq!(admitted(|| limits.admit_stranger(&here)), 10);
        clock.advance(RECORD_EVERY);
        let told: Vec<_> =
            (0..500).filter_map(|_| limits.admit_stranger(&here).unwrap_err().unrecorded).collect();
        assert_eq!(told, [1]);
        clock.advance(RECORD_EVERY);
        assert_eq!(limits.admit_stranger(&here).unwrap_err().unrecorded, Some(500));
    }

    #[test]
    fn what_was_turned_away_between_two_records_is_in_the_second() {
        let (clock, limits) = limits(None, None, "1/h burst 1");
        let turned_away = |address: &str| limits.admit_stranger(&from(address)).unwrap_err().unrecorded;
        limits.admit_stranger(&from("192.0.2.1:1")).unwrap();
        limits.admit_stranger(&from("192.0.2.2:1")).unwrap();
        assert_eq!(turned_away("192.0.2.1:1"), Some(1));
        assert_eq!(turned_away("192.0.2.2:1"), Some(1), "each has its own");
        for _ in 0..41 {
            assert_eq!(turned_away("192.0.2.1:1"), None);
        }
        clock.advance(RECORD_EVERY - Duration::from_millis(1));
        assert_eq!(turned_away("192.0.2.1:1"), None);
        clock.advance(Duration::from_millis(1));
        assert_eq!(turned_away("192.0.2.1:1"), Some(43));
        assert_eq!(turned_away("192.0.2.1:1"), None);
    }

    #[test]
    fn memory_is_bounded_however_many_come() {
        let (_clock, limits) = limits(None, Some("1/s"), "1/s");
        let addresses = limits.per_address.as_ref().unwrap();
        for n in 0..3 * u32::try_from(MOST_KEYS).unwrap() {
            let _ = addresses.admit(IpAddr::V4(n.into()));
        }
        addresses.buckets.run_pending_tasks();
        assert!(addresses.buckets.entry_count() <= MOST_KEYS, "{}", addresses.buckets.entry_count());
    }

    #[test]
    fn many_at_once_get_no_more_than_the_burst() {
        let (_clock, limits) = limits(Some("1/h burst 100"), None, "1/s");
        let ana = person("ana");
        let passed: usize = std::thread::scope(|scope| {
            let callers: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..200).filter(|_| limits.admit(&ana, &UNIX).is_ok()).count()))
                .collect();
            callers.into_iter().map(|caller| caller.join().unwrap()).sum()
        });
        assert_eq!(passed, 100);
    }
}
