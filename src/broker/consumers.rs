//! Which version each user of a secret runs on, by its own account.
//!
//! ```text
//! kv  consumer/<environment>/<secret>\0<consumer>  →  offset  bytes
//!                                                          0     32  MAC of the key and the JSON
//!                                                         32      …  JSON: {"principal","version_id","since","reported_at"}
//! ```
//!
//! A report is a claim: that the secret has the version, or ever had, is not looked up, because a consumer that runs on
//! one that is gone is the very thing to know. What is checked is who reports: a consumer's name belongs to the principal
//! that used it first, until nobody reported it for [`KEPT`]. A principal has few names of one secret, so that none can
//! fill the list with names that it made up.
//!
//! INVARIANT: whoever watches a secret is told of before those who only reported; no report hides a watcher.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::{Broker, BrokerError, Call, record};
use crate::clock::SharedClock;
use crate::crypto::{MAC_BYTES, MacKey};
use crate::error::{Reason, Reasoned};
use crate::identity::is_word;
use crate::kv::{Compare, Entry, Kv, KvError, Transaction, Write};
use crate::policy::{Action, Grant, Resource};
use crate::secret::{Label, SecretId, Selector, VersionId};
use crate::store::{Freshness, StoreError};

/// How many consumers of one secret are kept.
pub const MAX_CONSUMERS: usize = 1_000;
/// Under how many names one principal may report for one secret.
pub const NAMES_PER_PRINCIPAL: usize = 16;
/// How long a consumer is kept that does not report any more.
pub const KEPT: Duration = Duration::from_secs(30 * 86_400);

const LABEL: &[u8] = b"claviger consumer v1";
const PREFIX: &[u8] = b"consumer/";
/// How often a lost race is run again.
const ATTEMPTS: usize = 8;

/// What a user of secrets calls itself: 1 to 128 printable ASCII characters without spaces.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConsumerName(Arc<str>);

impl ConsumerName {
    /// Parses a consumer's name.
    ///
    /// # Errors
    /// [`Reason::InvalidArgument`].
    pub fn parse(text: &str) -> Result<Self, BrokerError> {
        if is_word(text) {
            return Ok(Self(text.into()));
        }
        let shown: String = text.chars().take(32).flat_map(char::escape_default).collect();
        let message = format!(
            "consumer: `{shown}` is no name; give 1 to 128 printable ASCII characters without spaces, for example the \
             name of the service"
        );
        Err(BrokerError::rejected(Reason::InvalidArgument, message))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ConsumerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a consumer says of itself.
#[derive(Debug, Clone)]
pub struct VersionInUse {
    /// The secret.
    pub id: SecretId,
    /// Who reports.
    pub consumer: ConsumerName,
    /// The version that it runs on.
    pub version_id: VersionId,
}

/// One user of a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Consumer {
    /// What it calls itself.
    pub name: ConsumerName,
    /// Who reported, or watches.
    pub principal: String,
    /// What it runs on, where it ever said.
    pub reported: Option<Reported>,
    /// Whether that is current.
    pub current: bool,
    /// Whether it watches the secret now.
    pub watching: bool,
}

/// What a consumer said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reported {
    principal: String,
    /// The version that it runs on.
    pub version_id: VersionId,
    /// Since when, by its first report of that version.
    pub since: Timestamp,
    /// When it last said so.
    pub reported_at: Timestamp,
}

impl Reported {
    fn is_over(&self, now: Timestamp) -> bool {
        now.duration_since(self.reported_at) > SignedDuration::try_from(KEPT).unwrap_or(SignedDuration::MAX)
    }
}

/// Why a report was not taken, or consumers can't be told.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ConsumersError {
    /// Another principal goes by that name.
    #[error("consumer `{name}` of {id} is {principal}; report under a name of your own")]
    Taken {
        /// The name.
        name: ConsumerName,
        /// Of which secret.
        id: SecretId,
        /// Whose it is.
        principal: String,
    },
    /// There are as many as are kept.
    #[error("secret {0} has {MAX_CONSUMERS} consumers, which is all that are kept; report under fewer names")]
    Full(SecretId),
    /// The principal has as many names as it may.
    #[error(
        "{principal} reports under {NAMES_PER_PRINCIPAL} names for {id}, which is all that one caller may; report under \
         fewer names, or wait until old ones are forgotten, {days} days after their last report",
        days = KEPT.as_secs() / 86_400
    )]
    Crowded {
        /// Who reports.
        principal: String,
        /// Of which secret.
        id: SecretId,
    },
    /// A record is not what this broker wrote.
    #[error(
        "what is kept of the consumers of {0} was changed by something other than this broker; restore the database"
    )]
    Tampered(String),
    /// Others were first each time.
    #[error("others changed consumer `{0}` {ATTEMPTS} times in a row; try again")]
    Contended(ConsumerName),
    /// The layer below.
    #[error(transparent)]
    Kv(#[from] KvError),
}

impl Reasoned for ConsumersError {
    fn reason(&self) -> Reason {
        match self {
            Self::Taken { .. } => Reason::Conflict,
            Self::Full(_) | Self::Crowded { .. } => Reason::LimitExceeded,
            Self::Tampered(_) => Reason::Tampered,
            Self::Contended(_) => Reason::StoreUnavailable,
            Self::Kv(error) => error.reason(),
        }
    }
}

impl From<ConsumersError> for BrokerError {
    fn from(error: ConsumersError) -> Self {
        Self::rejected(error.reason(), error.to_string())
    }
}

/// What the users of secrets said of themselves.
pub struct Consumers {
    kv: Arc<dyn Kv>,
    key: Arc<MacKey>,
    clock: SharedClock,
    /// One new name at a time, so that no two of them count what is there and find the same room.
    adding: tokio::sync::Mutex<()>,
}

impl Consumers {
    /// Those that are kept in `kv` under `key`.
    #[must_use]
    pub const fn new(kv: Arc<dyn Kv>, key: Arc<MacKey>, clock: SharedClock) -> Self {
        Self { kv, key, clock, adding: tokio::sync::Mutex::const_new(()) }
    }

    /// Keeps what `principal` says of a consumer.
    ///
    /// # Errors
    /// [`ConsumersError`].
    pub async fn report(&self, principal: &str, said: &VersionInUse) -> Result<(), ConsumersError> {
        let key = key(&said.id, &said.consumer);
        for _ in 0..ATTEMPTS {
            let now = self.clock.now();
            let entry = self.kv.get(&key).await?;
            let kept = entry.as_ref().map(|entry| self.read(entry)).transpose()?;
            let kept = kept.filter(|kept| !kept.is_over(now));
            if let Some(kept) = &kept
                && kept.principal != principal
            {
                let (name, id, principal) = (said.consumer.clone(), said.id.clone(), kept.principal.clone());
                return Err(ConsumersError::Taken { name, id, principal });
            }
            let _adding = match kept {
                Some(_) => None,
                None => {
                    let adding = self.adding.lock().await;
                    self.make_room(principal, &said.id, now).await?;
                    Some(adding)
                }
            };
            let same = kept.filter(|kept| kept.version_id == said.version_id);
            let reported = Reported {
                principal: principal.to_owned(),
                version_id: said.version_id.clone(),
                since: same.map_or(now, |kept| kept.since),
                reported_at: now,
            };
            let compare = vec![Compare::unchanged(key.clone(), entry.as_ref())];
            let write = vec![Write::put(key.clone(), self.written(&key, &reported)?)];
            if self.kv.commit(Transaction { compare, write }).await?.succeeded {
                return Ok(());
            }
        }
        Err(ConsumersError::Contended(said.consumer.clone()))
    }

    /// What the consumers of a secret said, by their names. Those who did not report for [`KEPT`] are left out.
    ///
    /// # Errors
    /// [`ConsumersError`].
    pub async fn of(&self, id: &SecretId) -> Result<Vec<(ConsumerName, String, Reported)>, ConsumersError> {
        let prefix = prefix(id);
        let now = self.clock.now();
        let mut found = Vec::new();
        for entry in self.kv.range(&prefix, &[], MAX_CONSUMERS).await?.entries {
            let name =
                entry.key.strip_prefix(prefix.as_slice()).and_then(|name| std::str::from_utf8(name).ok());
            let name = name.and_then(|name| ConsumerName::parse(name).ok());
            let name = name.ok_or_else(|| ConsumersError::Tampered(id.to_string()))?;
            let reported = self.read(&entry)?;
            if !reported.is_over(now) {
                found.push((name, reported.principal.clone(), reported));
            }
        }
        Ok(found)
    }

    /// Forgets who did not report for [`KEPT`]; how many that were. To be called now and then.
    ///
    /// # Errors
    /// [`ConsumersError`]; a record that was changed is left where it is, and found by who asks for it.
    pub async fn sweep(&self) -> Result<usize, ConsumersError> {
        const PAGE: usize = 500;
        let (mut after, mut forgotten) = (Vec::new(), 0);
        loop {
            let page = self.kv.range(PREFIX, &after, PAGE).await?;
            forgotten += self.forget_old(&page.entries, self.clock.now()).await?;
            match page.entries.last() {
                Some(last) if page.more => after.clone_from(&last.key),
                _ => return Ok(forgotten),
            }
        }
    }

    /// A name that is new needs room: among its principal's own, and among all, where those who are over make it.
    async fn make_room(&self, principal: &str, id: &SecretId, now: Timestamp) -> Result<(), ConsumersError> {
        let there = self.kv.range(&prefix(id), &[], MAX_CONSUMERS).await?.entries;
        let is_own = |reported: &Reported| reported.principal == principal && !reported.is_over(now);
        let own = there.iter().filter(|entry| self.read(entry).is_ok_and(|reported| is_own(&reported)));
        if own.count() >= NAMES_PER_PRINCIPAL {
            return Err(ConsumersError::Crowded { principal: principal.to_owned(), id: id.clone() });
        }
        if there.len() < MAX_CONSUMERS || self.forget_old(&there, now).await? > 0 {
            return Ok(());
        }
        Err(ConsumersError::Full(id.clone()))
    }

    /// All of them or, where one changed meanwhile, none: then it is for the next time.
    async fn forget_old(&self, entries: &[Entry], now: Timestamp) -> Result<usize, ConsumersError> {
        let is_old = |entry: &&Entry| self.read(entry).is_ok_and(|reported| reported.is_over(now));
        let old: Vec<_> = entries.iter().filter(is_old).collect();
        let compare = old.iter().map(|entry| Compare::unchanged(entry.key.clone(), Some(*entry))).collect();
        let write = old.iter().map(|entry| Write::delete(entry.key.clone())).collect();
        let outcome = self.kv.commit(Transaction { compare, write }).await?;
        Ok(if outcome.succeeded { old.len() } else { 0 })
    }

    fn written(&self, key: &[u8], reported: &Reported) -> Result<Vec<u8>, ConsumersError> {
        let json = serde_json::to_vec(reported).map_err(|_| ConsumersError::Tampered(shown(key)))?;
        Ok([self.key.sign(&[LABEL, key, &json]).as_slice(), &json].concat())
    }

    fn read(&self, entry: &Entry) -> Result<Reported, ConsumersError> {
        let tampered = || ConsumersError::Tampered(shown(&entry.key));
        let (mac, json) = entry.value.split_first_chunk::<MAC_BYTES>().ok_or_else(tampered)?;
        if !self.key.verify(&[LABEL, &entry.key, json], mac) {
            return Err(tampered());
        }
        serde_json::from_slice(json).map_err(|_| tampered())
    }
}

impl fmt::Debug for Consumers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumers").finish_non_exhaustive()
    }
}

impl Broker {
    /// Keeps which version a consumer says that it runs on; whether that is current.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Read`] on the secret, which has to exist. [`Reason::Conflict`] where another
    /// principal goes by the consumer's name; [`Reason::LimitExceeded`] where the principal has [`NAMES_PER_PRINCIPAL`]
    /// others, or the secret [`MAX_CONSUMERS`].
    pub async fn report_version_in_use(&self, call: &Call, said: VersionInUse) -> Result<bool, BrokerError> {
        const OPERATION: &str = "report_version";
        let resource = Resource::Secret(said.id.clone());
        let grant = self.authorize(call, OPERATION, Action::Read, &resource).await?;
        self.intend(call, OPERATION, &grant).await?;
        let reported = self.keep_report(call, &grant, &said).await;
        let detail = format!("{} runs on version {}", said.consumer, said.version_id);
        let record = record::of_grant(call, OPERATION, &grant).with_detail(detail);
        self.released(&grant, record, reported, |_, record| record.done()).await
    }

    async fn keep_report(
        &self,
        call: &Call,
        grant: &Grant,
        said: &VersionInUse,
    ) -> Result<bool, BrokerError> {
        let current = match self.parts.stores.get(grant, &Selector::CURRENT, Freshness::Cached).await {
            Ok(fetched) => fetched.version.id == said.version_id,
            Err(StoreError::VersionNotFound { .. }) => false,
            Err(error) => return Err(error.into()),
        };
        self.parts.consumers.report(&call.principal.to_string(), said).await?;
        Ok(current)
    }

    /// Who uses a secret: first who watches it now, then who only reported, each by their names; at most
    /// [`MAX_CONSUMERS`], so that reports never hide a watcher.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Describe`].
    pub async fn consumers(&self, call: &Call, id: SecretId) -> Result<Vec<Consumer>, BrokerError> {
        let grant =
            self.authorize(call, "list_consumers", Action::Describe, &Resource::Secret(id.clone())).await?;
        let found = self.find_consumers(&grant, &id).await;
        let record = record::of_grant(call, "list_consumers", &grant);
        self.released(&grant, record, found, |found, record| {
            record.done().with_detail(format!("{} consumers", found.len()))
        })
        .await
    }

    /// Forgets the consumers that did not report for [`KEPT`]; how many that were.
    ///
    /// # Errors
    /// [`ConsumersError`]; tried again by whoever calls this now and then.
    pub async fn forget_old_consumers(&self) -> Result<usize, ConsumersError> {
        self.parts.consumers.sweep().await
    }

    async fn find_consumers(&self, grant: &Grant, id: &SecretId) -> Result<Vec<Consumer>, BrokerError> {
        let described = self.parts.stores.describe(grant).await?;
        let mut versions = described.versions.into_iter();
        let current = versions.find(|version| version.labels.contains(&Label::Current));
        let current = current.map(|version| version.id);
        let reports = self.parts.consumers.of(id).await?;
        let watchers = self.parts.feed.watchers(id, MAX_CONSUMERS);
        Ok(listed(reports, watchers, current.as_ref()))
    }
}

/// Those who watch, by their names, and then those who only reported: what is cut off are reports.
fn listed(
    reports: Vec<(ConsumerName, String, Reported)>,
    watchers: BTreeSet<(ConsumerName, Arc<str>)>,
    current: Option<&VersionId>,
) -> Vec<Consumer> {
    let mut reports: BTreeMap<_, _> =
        reports.into_iter().map(|(name, principal, reported)| ((name, principal), reported)).collect();
    let consumer = |(name, principal), reported: Option<Reported>, watching| Consumer {
        current: reported.as_ref().is_some_and(|reported| current == Some(&reported.version_id)),
        name,
        principal,
        reported,
        watching,
    };
    let mut found = Vec::new();
    for (name, principal) in watchers {
        let who = (name, principal.to_string());
        let reported = reports.remove(&who);
        found.push(consumer(who, reported, true));
    }
    found.extend(reports.into_iter().map(|(who, reported)| consumer(who, Some(reported), false)));
    found.truncate(MAX_CONSUMERS);
    found
}

/// What the keys of a secret's consumers start with. No name has a NUL.
fn prefix(id: &SecretId) -> Vec<u8> {
    format!("consumer/{}/{}\0", id.environment, id.name).into_bytes()
}

fn key(id: &SecretId, consumer: &ConsumerName) -> Vec<u8> {
    [prefix(id).as_slice(), consumer.as_str().as_bytes()].concat()
}

fn shown(key: &[u8]) -> String {
    String::from_utf8_lossy(key).escape_default().take(128).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::crypto::RootKey;
    use crate::kv::embedded::Embedded;

    struct Bench {
        _folder: tempfile::TempDir,
        kv: Embedded,
        clock: Arc<ManualClock>,
        consumers: Consumers,
    }

    async fn bench() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let clock = ManualClock::new("2026-01-01T00:00:00Z".parse().unwrap());
        let shared: SharedClock = Arc::clone(&clock) as _;
        let kv = Embedded::open(&folder.path().join("claviger.db"), Arc::clone(&shared)).await.unwrap();
        let root = RootKey::from_bytes(&[1; 32]).unwrap();
        let key = Arc::new(MacKey::create(&root, &[b"test"]).unwrap().0);
        let consumers = Consumers::new(Arc::new(kv.clone()), key, shared);
        Bench { _folder: folder, kv, clock, consumers }
    }

    fn said(name: &str, version: u8) -> VersionInUse {
        VersionInUse {
            id: SecretId::parse("production", "database").unwrap(),
            consumer: ConsumerName::parse(name).unwrap(),
            version_id: VersionId::parse(&format!("{version:032}")).unwrap(),
        }
    }

    #[tokio::test]
    async fn since_stays_while_the_version_does() {
        let Bench { clock, consumers, _folder, .. } = bench().await;
        let start = crate::clock::Clock::now(clock.as_ref());
        consumers.report("Workload::\"a\"", &said("a", 1)).await.unwrap();
        clock.advance(Duration::from_secs(60));
        consumers.report("Workload::\"a\"", &said("a", 1)).await.unwrap();
        let id = said("a", 1).id;
        let of = || consumers.of(&id);
        let (_, _, reported) = of().await.unwrap().remove(0);
        assert_eq!(reported.since, start);
        assert_eq!(reported.reported_at.as_second() - start.as_second(), 60);
        consumers.report("Workload::\"a\"", &said("a", 2)).await.unwrap();
        let (_, _, reported) = of().await.unwrap().remove(0);
        assert_eq!((reported.since, reported.version_id), (reported.reported_at, said("a", 2).version_id));
    }

    #[tokio::test]
    async fn a_name_belongs_to_its_principal_until_it_is_forgotten() {
        let Bench { clock, consumers, _folder, .. } = bench().await;
        consumers.report("Workload::\"a\"", &said("a", 1)).await.unwrap();
        let error = consumers.report("Workload::\"b\"", &said("a", 1)).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Conflict);
        assert!(error.to_string().contains("Workload::\"a\""), "{error}");
        clock.advance(KEPT + Duration::from_secs(1));
        assert!(consumers.of(&said("a", 1).id).await.unwrap().is_empty());
        consumers.report("Workload::\"b\"", &said("a", 1)).await.unwrap();
        clock.advance(KEPT + Duration::from_secs(1));
        assert_eq!(consumers.sweep().await.unwrap(), 1);
        assert_eq!(consumers.sweep().await.unwrap(), 0);
    }

    #[tokio::test]
    async fn only_so_many_are_kept_and_the_old_make_room() {
        let Bench { kv, clock, consumers, _folder } = bench().await;
        let now = crate::clock::Clock::now(clock.as_ref());
        let one = |n: usize| {
            let said = said(&format!("a-{n}"), 1);
            let key = key(&said.id, &said.consumer);
            let principal = format!("Workload::\"p-{}\"", n / NAMES_PER_PRINCIPAL);
            let reported = Reported { principal, version_id: said.version_id, since: now, reported_at: now };
            Write::put(key.clone(), consumers.written(&key, &reported).unwrap())
        };
        let write = (0..MAX_CONSUMERS).map(one).collect();
        kv.commit(Transaction { compare: Vec::new(), write }).await.unwrap();
        let error = consumers.report("Workload::\"a\"", &said("one-more", 1)).await.unwrap_err();
        assert_eq!(error.reason(), Reason::LimitExceeded);
        assert!(matches!(error, ConsumersError::Full(_)), "{error}");
        consumers.report("Workload::\"p-0\"", &said("a-0", 2)).await.unwrap();
        clock.advance(KEPT + Duration::from_secs(1));
        consumers.report("Workload::\"a\"", &said("one-more", 1)).await.unwrap();
    }

    #[tokio::test]
    async fn a_principal_has_few_names_of_a_secret_however_many_come_at_once() {
        let Bench { clock, consumers, _folder, .. } = bench().await;
        let (a, b) = ("Workload::\"a\"", "Workload::\"b\"");
        let all: Vec<_> = (0..3 * NAMES_PER_PRINCIPAL).map(|n| said(&format!("a-{n}"), 1)).collect();
        let taken = futures_util::future::join_all(all.iter().map(|said| consumers.report(a, said))).await;
        let (kept, refused): (Vec<_>, Vec<_>) = taken.into_iter().partition(Result::is_ok);
        assert_eq!((kept.len(), refused.len()), (NAMES_PER_PRINCIPAL, 2 * NAMES_PER_PRINCIPAL));
        let error = refused.into_iter().next().unwrap().unwrap_err();
        assert_eq!(error.reason(), Reason::LimitExceeded);
        let message = error.to_string();
        for part in [a, "16 names", "report under fewer names", "30 days"] {
            assert!(message.contains(part), "{message}");
        }
        let id = said("a", 1).id;
        let names = consumers.of(&id).await.unwrap();
        assert_eq!(names.len(), NAMES_PER_PRINCIPAL);
        let again = VersionInUse { consumer: names[0].0.clone(), ..said("a", 2) };
        consumers.report(a, &again).await.unwrap();
        consumers.report(b, &said("b", 1)).await.unwrap();
        let elsewhere = SecretId::parse("production", "other").unwrap();
        consumers.report(a, &VersionInUse { id: elsewhere, ..said("new", 1) }).await.unwrap();
        clock.advance(KEPT + Duration::from_secs(1));
        consumers.report(a, &said("new", 1)).await.unwrap();
    }

    #[test]
    fn no_report_hides_a_watcher() {
        let id = said("a", 1).version_id;
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let name = |text: &str| ConsumerName::parse(text).unwrap();
        let reported = |principal: &str| Reported {
            principal: principal.to_owned(),
            version_id: id.clone(),
            since: now,
            reported_at: now,
        };
        let reports = (0..MAX_CONSUMERS).map(|n| (name(&format!("a-{n:04}")), "p".to_owned(), reported("p")));
        let watchers = BTreeSet::from([(name("z"), "p".into()), (name("a-0007"), "p".into())]);
        let found = listed(reports.collect(), watchers, Some(&id));
        assert_eq!(found.len(), MAX_CONSUMERS);
        let shown = |consumer: &Consumer| (consumer.name.to_string(), consumer.watching, consumer.current);
        assert_eq!(shown(&found[0]), ("a-0007".to_owned(), true, true));
        assert_eq!(shown(&found[1]), ("z".to_owned(), true, false), "it never said what it runs on");
        assert_eq!(shown(&found[2]), ("a-0000".to_owned(), false, true));
        assert!(found.iter().skip(2).all(|consumer| !consumer.watching));
        let other = listed(vec![(name("a"), "p".to_owned(), reported("p"))], BTreeSet::new(), None);
        assert!(!other[0].current);
    }

    #[tokio::test]
    async fn a_record_that_was_changed_or_moved_is_refused() {
        let Bench { kv, consumers, _folder, .. } = bench().await;
        consumers.report("Workload::\"a\"", &said("a", 1)).await.unwrap();
        let (from, to) = (said("a", 1), said("b", 1));
        let entry = kv.get(&key(&from.id, &from.consumer)).await.unwrap().unwrap();
        let mut changed = entry.value.clone();
        *changed.last_mut().unwrap() ^= 1;
        for (place, value) in [(&from, changed), (&to, entry.value.clone())] {
            let write = vec![
                Write::put(key(&from.id, &from.consumer), entry.value.clone()),
                Write::put(key(&place.id, &place.consumer), value),
            ];
            kv.commit(Transaction { compare: Vec::new(), write }).await.unwrap();
            let error = consumers.of(&from.id).await.unwrap_err();
            assert_eq!(error.reason(), Reason::Tampered);
            assert_eq!(
                consumers.report("Workload::\"a\"", place).await.unwrap_err().reason(),
                Reason::Tampered
            );
        }
    }

    #[test]
    fn names_are_words() {
        for good in ["orders", "orders/pod-7@host", &"x".repeat(128)] {
            assert_eq!(ConsumerName::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", " ", "a b", "a\0b", "é", &"x".repeat(129)] {
            assert_eq!(ConsumerName::parse(bad).unwrap_err().reason(), Reason::InvalidArgument, "{bad:?}");
        }
    }
}
