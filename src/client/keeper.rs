//! What keeps values fresh: one task for each environment, which holds one watch for all names that are wanted.
//!
//! ```text
//! Cached ──┐                      ┌──────────── Keeper (aborts the task when the last handle is gone) ──────────┐
//! Cached ──┼─ watch::Receiver ◀── Shelf: a slot for each name ◀── Follower (the task) ◀── WatchSecrets ── broker │
//! Client ──┘                      └─────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! - A name that is added begins the watch anew, from the start: only so its current version is told.
//! - A watch that ended is begun again after the last revision that was told; what is on the shelf grows old meanwhile.
//! - A no (denied, deleted, a credential that is no longer one) takes the value off the shelf at once.
//! - What makes no sense takes nothing off it: the last good value grows old.
//!
//! INVARIANT: the task owns nothing that owns the keeper, so that dropping the last handle ends it and wipes the values.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tonic::{Code, Streaming};

use super::calls::Client;
use super::connection::Secrets;
use super::error::ClientError;
use super::retry::{Backoff, pause};
use super::session::Session;
use super::wire;
use crate::clock::SharedClock;
use crate::error::Reason;
use crate::proto::v1;
use crate::secret::{EnvironmentName, SecretName, SecretValue, VersionId};

use v1::watch_secrets_response::Event;

/// How many names one watch may have.
const MOST_NAMES: usize = 500;
/// A broker says something every 15 s; one that misses three of them is gone.
const SILENCE: Duration = Duration::from_secs(45);
/// How long a secret that can't be told stays so, before it is asked for again.
const RECHECK: Duration = Duration::from_secs(60);

/// The keepers of a client.
#[derive(Debug, Default)]
pub(super) struct Keepers(Mutex<BTreeMap<EnvironmentName, Arc<Keeper>>>);

impl Keepers {
    /// The keeper for an environment; the first to ask starts it.
    pub(super) fn of(
        &self,
        environment: &EnvironmentName,
        client: &Client,
    ) -> Result<Arc<Keeper>, ClientError> {
        let consumer = client.consumer()?;
        let mut keepers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let start = || Arc::new(Keeper::start(environment.clone(), client, consumer.to_owned()));
        Ok(Arc::clone(keepers.entry(environment.clone()).or_insert_with(start)))
    }
}

/// Keeps what was asked for, as long as somebody holds it.
#[derive(Debug)]
pub(super) struct Keeper {
    pub(super) shelf: Arc<Shelf>,
    task: JoinHandle<()>,
}

impl Keeper {
    fn start(environment: EnvironmentName, client: &Client, consumer: String) -> Self {
        let session = Arc::clone(client.session());
        let shelf = Arc::new(Shelf::new(environment, Arc::clone(&session.clock)));
        let follower = Follower {
            session,
            shelf: Arc::clone(&shelf),
            consumer,
            reason: client.reason().to_owned(),
            generation: 0,
            after: 0,
            renewing: false,
        };
        Self { shelf, task: tokio::spawn(follower.run()) }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What is known of one name.
#[derive(Debug, Clone)]
pub(super) enum Slot {
    /// Nothing yet.
    Waiting,
    /// Its current version.
    Held(Held),
    /// That there is none for this program.
    Refused(ClientError),
}

/// A version, as it was told.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) version_id: VersionId,
    pub(super) value: SecretValue,
    /// Since when nobody can say whether it is still the one, on the monotonic clock: the broker can't ask the store.
    pub(super) doubted: Option<Duration>,
}

/// The values of one environment.
#[derive(Debug)]
pub(super) struct Shelf {
    environment: EnvironmentName,
    slots: Mutex<Slots>,
    added: Notify,
    /// When the broker was last heard, in milliseconds of the monotonic clock.
    heard: AtomicU64,
    /// Why there is no watch now; none where there is one.
    trouble: ArcSwapOption<ClientError>,
    clock: SharedClock,
}

#[derive(Debug, Default)]
struct Slots {
    by_name: BTreeMap<SecretName, watch::Sender<Slot>>,
    /// Grows with each name that is added.
    generation: u64,
}

impl Slots {
    /// Forgets, and so wipes, what nobody holds any more.
    fn prune(&mut self) {
        self.by_name.retain(|_, slot| slot.receiver_count() > 0);
    }
}

/// How far a kept value can be trusted.
#[derive(Debug)]
pub(super) struct Standing {
    /// How long ago the broker last said that it is the current one.
    pub(super) age: Duration,
    /// The broker can't say so now.
    pub(super) stale: bool,
}

impl Shelf {
    fn new(environment: EnvironmentName, clock: SharedClock) -> Self {
        Self {
            environment,
            slots: Mutex::default(),
            added: Notify::new(),
            heard: AtomicU64::new(0),
            trouble: ArcSwapOption::empty(),
            clock,
        }
    }

    /// What will be known of a name, from now on.
    pub(super) fn subscribe(&self, name: &SecretName) -> Result<watch::Receiver<Slot>, ClientError> {
        let mut slots = self.slots();
        slots.prune();
        if let Some(slot) = slots.by_name.get(name) {
            return Ok(slot.subscribe());
        }
        if slots.by_name.len() >= MOST_NAMES {
            let message =
                format!("one client keeps at most {MOST_NAMES} secrets of an environment; drop some first");
            return Err(ClientError::new(Reason::LimitExceeded, Code::ResourceExhausted, message));
        }
        let (slot, receiver) = watch::channel(Slot::Waiting);
        slots.by_name.insert(name.clone(), slot);
        slots.generation += 1;
        drop(slots);
        self.added.notify_one();
        Ok(receiver)
    }

    /// How far what is held can be trusted now.
    pub(super) fn standing(&self, held: &Held) -> Standing {
        let now = self.clock.monotonic();
        let heard = Duration::from_millis(self.heard.load(Ordering::Relaxed));
        let known = held.doubted.map_or(heard, |doubted| doubted.min(heard));
        let age = now.saturating_sub(known);
        let stale = held.doubted.is_some() || self.trouble().is_some() || age > SILENCE;
        Standing { age, stale }
    }

    /// Why there is no watch now.
    pub(super) fn trouble(&self) -> Option<Arc<ClientError>> {
        self.trouble.load_full()
    }

    /// The names that somebody wants, and when that was so.
    fn wanted(&self) -> (Vec<String>, u64) {
        let mut slots = self.slots();
        slots.prune();
        (slots.by_name.keys().map(ToString::to_string).collect(), slots.generation)
    }

    /// Which names are wanted, by the number of the last one added; none where nobody wants any.
    fn generation(&self) -> Option<u64> {
        let mut slots = self.slots();
        slots.prune();
        (!slots.by_name.is_empty()).then_some(slots.generation)
    }

    /// The broker said something: the watch is in place, and what it did not mention has not changed.
    fn hear(&self) {
        let now = u64::try_from(self.clock.monotonic().as_millis()).unwrap_or(u64::MAX);
        self.heard.store(now, Ordering::Relaxed);
        self.trouble.store(None);
    }

    /// The watch ended. A no is about every secret of it.
    fn lose(&self, error: &ClientError) {
        if error.is_refusal() {
            for slot in self.slots().by_name.values() {
                slot.send_replace(Slot::Refused(error.clone()));
            }
        }
        self.trouble.store(Some(Arc::new(error.clone())));
    }

    /// A version became current. Told again, it wakes nobody.
    fn hold(&self, name: &str, held: Held) {
        self.change(name, |slot| {
            let same = matches!(slot, Slot::Held(before) if before.version_id == held.version_id);
            *slot = Slot::Held(held);
            !same
        });
    }

    fn refuse(&self, name: &str, error: ClientError) {
        self.change(name, |slot| {
            *slot = Slot::Refused(error);
            true
        });
    }

    /// One secret can't be told. Unless that is a no, what is held may still be the one.
    fn doubt(&self, name: &str, error: ClientError) {
        let now = self.clock.monotonic();
        self.change(name, |slot| match slot {
            Slot::Held(held) if !error.is_refusal() => {
                held.doubted.get_or_insert(now);
                false
            }
            _ => {
                *slot = Slot::Refused(error);
                true
            }
        });
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Slot) -> bool) {
        if let Some(slot) = self.slots().by_name.get(name) {
            slot.send_if_modified(change);
        }
    }

    /// Whether a secret could not be told that may be told another time, without a change that would say so.
    fn is_incomplete(&self) -> bool {
        self.slots().by_name.values().any(|slot| match &*slot.borrow() {
            Slot::Waiting => false,
            Slot::Held(held) => held.doubted.is_some(),
            Slot::Refused(error) => error.code != Code::NotFound,
        })
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task: watches, and puts what it is told on the shelf.
struct Follower {
    session: Arc<Session>,
    shelf: Arc<Shelf>,
    consumer: String,
    reason: String,
    /// The names that the last watch was for.
    generation: u64,
    /// The last revision that was told.
    after: u64,
    /// The watch is begun anew because its credential ended.
    renewing: bool,
}

impl Follower {
    async fn run(mut self) {
        let mut backoff = Backoff::of_watches();
        loop {
            let (names, generation) = self.shelf.wanted();
            if names.is_empty() {
                self.shelf.added.notified().await;
                continue;
            }
            let Err(error) = self.follow(names, generation, &mut backoff).await else { continue };
            // Where the credential of a watch ended, there may be another: to begin anew asks for it.
            if error.reason == Reason::Unauthenticated && !self.renewing {
                self.renewing = true;
                continue;
            }
            tracing::debug!("the watch of environment {} ended: {error}", self.shelf.environment);
            self.shelf.lose(&error);
            if error.is_refusal() {
                self.after = 0;
            }
            tokio::select! {
                () = pause(backoff.length()) => {}
                () = self.shelf.added.notified() => {}
            }
        }
    }

    /// Watches until that ends (an error), or must begin anew.
    async fn follow(
        &mut self,
        names: Vec<String>,
        generation: u64,
        backoff: &mut Backoff,
    ) -> Result<(), ClientError> {
        let mut stream = self.begin(names, generation).await?;
        let begun = self.shelf.clock.monotonic();
        loop {
            let told = tokio::select! {
                () = self.shelf.added.notified() => None,
                told = next(&mut stream) => Some(told?),
            };
            if let Some(told) = told {
                backoff.reset();
                self.renewing = false;
                self.take(told);
            }
            if self.shelf.generation() != Some(generation) {
                return Ok(());
            }
            let since = self.shelf.clock.monotonic().saturating_sub(begun);
            if since > RECHECK && self.shelf.is_incomplete() {
                self.after = 0;
                return Ok(());
            }
        }
    }

    async fn begin(
        &mut self,
        names: Vec<String>,
        generation: u64,
    ) -> Result<Streaming<v1::WatchSecretsResponse>, ClientError> {
        if generation != self.generation {
            (self.generation, self.after) = (generation, 0);
        }
        let request = v1::WatchSecretsRequest {
            environment: self.shelf.environment.to_string(),
            names,
            prefix: String::new(),
            consumer: self.consumer.clone(),
            after_revision: self.after,
            with_values: true,
            reason: self.reason.clone(),
        };
        let send = |mut secrets: Secrets| {
            let request = request.clone();
            async move { secrets.watch_secrets(request).await }
        };
        self.session.follow(send).await
    }

    fn take(&mut self, told: v1::WatchSecretsResponse) {
        self.shelf.hear();
        match told.event {
            Some(Event::Changed(v1::SecretChanged { secret: Some(secret), .. })) => {
                let name = secret.name.clone();
                match held(secret, self.shelf.clock.monotonic()) {
                    Ok(held) => self.shelf.hold(&name, held),
                    Err(error) => {
                        tracing::error!("secret {}:{name}: {error}", self.shelf.environment);
                        self.shelf.doubt(&name, error);
                    }
                }
            }
            Some(Event::Gone(gone)) => {
                let error = gone_from(&self.shelf.environment, &gone.name);
                self.shelf.refuse(&gone.name, error);
            }
            Some(Event::Problem(v1::WatchProblem { name, problem: Some(problem), .. })) => {
                self.shelf.doubt(&name, problem.into());
            }
            // Another kind of event comes from a newer broker.
            Some(Event::Changed(_) | Event::Problem(_) | Event::Started(_) | Event::Progress(_)) | None => {}
        }
        if told.revision > 0 {
            self.after = told.revision;
        }
    }
}

/// What the broker says next; silence counts as its end.
async fn next(
    stream: &mut Streaming<v1::WatchSecretsResponse>,
) -> Result<v1::WatchSecretsResponse, ClientError> {
    let ended = |how: &str| ClientError::unavailable(format!("the broker {how}"));
    let told = tokio::time::timeout(SILENCE, stream.message()).await;
    told.map_err(|_| ended(&format!("said nothing for {SILENCE:?}")))??
        .ok_or_else(|| ended("ended the watch"))
}

/// What was told at `now`. Where it was stale by then, it is in doubt for as long as the store has not been asked.
fn held(secret: v1::Secret, now: Duration) -> Result<Held, ClientError> {
    let answer = wire::answer(secret)?;
    let value = answer.value.ok_or_else(|| ClientError::malformed("holds no value"))?;
    let doubted = answer.stale.then(|| now.saturating_sub(answer.age));
    Ok(Held { version_id: answer.version.id, value, doubted })
}

fn gone_from(environment: &EnvironmentName, name: &str) -> ClientError {
    let message = format!(
        "secret {environment}:{name} is gone: it was deleted, or lost its current version; restore it, or put a new \
         value"
    );
    ClientError::new(Reason::SecretNotFound, Code::NotFound, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    fn shelf() -> (Arc<ManualClock>, Shelf) {
        let clock = ManualClock::new(jiff::Timestamp::UNIX_EPOCH);
        let shelf = Shelf::new("production".parse().unwrap(), Arc::<ManualClock>::clone(&clock));
        shelf.hear();
        (clock, shelf)
    }

    fn name(text: &str) -> SecretName {
        SecretName::parse(text).unwrap()
    }

    fn version(digit: &str) -> Held {
        Held {
            version_id: VersionId::parse(&digit.repeat(32)).unwrap(),
            value: SecretValue::text("canary".to_owned()).unwrap(),
            doubted: None,
        }
    }

    fn error(reason: Reason, code: Code) -> ClientError {
        ClientError::new(reason, code, "as the test has it")
    }

    fn seen(slot: &mut watch::Receiver<Slot>) -> Held {
        match &*slot.borrow_and_update() {
            Slot::Held(held) => held.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_version_wakes_once_and_only_whom_it_concerns() {
        let (_clock, shelf) = shelf();
        let mut a = shelf.subscribe(&name("a")).unwrap();
        let mut b = shelf.subscribe(&name("b")).unwrap();
        shelf.hold("a", version("1"));
        assert!(a.has_changed().unwrap() && !b.has_changed().unwrap());
        assert_eq!(seen(&mut a).version_id.as_str(), "1".repeat(32));
        shelf.hold("a", version("1"));
        assert!(!a.has_changed().unwrap(), "told again after a reconnection");
        shelf.hold("a", version("2"));
        assert!(a.has_changed().unwrap());
        shelf.hold("nobody-asked", version("1"));
        assert!(matches!(&*b.borrow_and_update(), Slot::Waiting));
    }

    #[test]
    fn a_no_takes_the_value_away_and_an_outage_does_not() {
        let (clock, shelf) = shelf();
        let mut a = shelf.subscribe(&name("a")).unwrap();
        shelf.hold("a", version("1"));
        shelf.doubt("a", error(Reason::StoreUnavailable, Code::Unavailable));
        clock.advance(Duration::from_secs(5));
        shelf.hear();
        let standing = shelf.standing(&seen(&mut a));
        assert_eq!((standing.age, standing.stale), (Duration::from_secs(5), true));
        assert!(shelf.is_incomplete(), "it is asked for again");
        shelf.hold("a", version("1"));
        assert!(!shelf.standing(&seen(&mut a)).stale);
        shelf.doubt("a", error(Reason::Denied, Code::PermissionDenied));
        assert!(matches!(&*a.borrow(), Slot::Refused(error) if error.reason == Reason::Denied));
        shelf.hold("a", version("1"));
        shelf.refuse("a", gone_from(&shelf.environment, "a"));
        assert!(
            matches!(&*a.borrow(), Slot::Refused(error) if error.message.contains("production:a is gone"))
        );
        assert!(!shelf.is_incomplete(), "the watch tells when it comes back");
    }

    #[test]
    fn what_was_stale_when_it_was_told_is_as_old_as_the_store_has_it() {
        let (_clock, shelf) = shelf();
        let secret = v1::Secret {
            environment: "production".to_owned(),
            name: "a".to_owned(),
            version_id: "1".repeat(32),
            created_at: Some(prost_types::Timestamp::default()),
            payload: Some(wire::payload(&SecretValue::text("canary".to_owned()).unwrap())),
            age: Some(prost_types::Duration { seconds: 600, nanos: 0 }),
            stale: true,
            ..v1::Secret::default()
        };
        let held = held(secret, shelf.clock.monotonic()).unwrap();
        let standing = shelf.standing(&held);
        assert_eq!((standing.age, standing.stale), (Duration::from_secs(600), true));
        let nothing = v1::Secret { unchanged: true, ..v1::Secret::default() };
        assert!(super::held(nothing, Duration::ZERO).is_err());
    }

    #[test]
    fn what_is_held_grows_old_when_the_watch_ends_or_says_nothing() {
        let (clock, shelf) = shelf();
        let mut a = shelf.subscribe(&name("a")).unwrap();
        shelf.hold("a", version("1"));
        let held = seen(&mut a);
        assert!(!shelf.standing(&held).stale);
        shelf.lose(&error(Reason::Unavailable, Code::Unavailable));
        assert!(shelf.standing(&held).stale, "at once");
        assert!(matches!(&*a.borrow(), Slot::Held(_)), "and is still there");
        shelf.hear();
        assert!(!shelf.standing(&held).stale);
        clock.advance(SILENCE + Duration::from_secs(1));
        let standing = shelf.standing(&held);
        assert!(standing.stale && standing.age > SILENCE);
        shelf.lose(&error(Reason::Unauthenticated, Code::Unauthenticated));
        assert!(matches!(&*a.borrow(), Slot::Refused(_)), "a credential that ended is a no");
    }

    #[test]
    fn what_nobody_holds_is_forgotten() {
        let (_clock, shelf) = shelf();
        let a = shelf.subscribe(&name("a")).unwrap();
        let b = shelf.subscribe(&name("b")).unwrap();
        let (names, generation) = shelf.wanted();
        assert_eq!(names, ["a", "b"]);
        drop(a);
        assert_eq!(shelf.wanted(), (vec!["b".to_owned()], generation));
        shelf.refuse("b", error(Reason::Denied, Code::PermissionDenied));
        drop(b);
        let again = shelf.subscribe(&name("b")).unwrap();
        assert!(matches!(&*again.borrow(), Slot::Waiting), "asked anew");
        assert!(shelf.generation() > Some(generation));
    }

    #[test]
    fn a_watch_has_so_many_names() {
        let (_clock, shelf) = shelf();
        let held: Vec<_> =
            (0..MOST_NAMES).map(|number| shelf.subscribe(&name(&format!("s{number}"))).unwrap()).collect();
        let error = shelf.subscribe(&name("one-more")).unwrap_err();
        assert_eq!(error.reason, Reason::LimitExceeded);
        assert!(shelf.subscribe(&name("s0")).is_ok());
        drop(held);
        assert!(shelf.subscribe(&name("one-more")).is_ok());
    }

    #[test]
    fn no_value_is_shown() {
        let (_clock, shelf) = shelf();
        let _a = shelf.subscribe(&name("a")).unwrap();
        shelf.hold("a", version("1"));
        assert!(!format!("{shelf:?}").contains("canary"));
    }
}
