//! A [`Store`] around a [`Store`] that is far away and counts calls: what is asked of it at about the same time is asked
//! in one call.
//!
//! ```text
//! get(AWSCURRENT) ─▶ join the open group ── full ──────────────────────────────▶ one call, in a task of its own
//!                    (the first opens it)   └─ a look every 2 ms finds nobody new,  │  of one secret: get
//!                                              or it is the fifth ─────────────────▶│  of more: batch_get
//! whatever else ──────────────────────────────────────────────────────────────────▶ the store below
//! ```
//!
//! A question waits 2 ms where nobody else asks, and at most 10 ms where they come one by one: little against the tens
//! of milliseconds that a round trip to AWS takes, and only where nothing is cached. Who asks for many secrets fills
//! groups at once, and waits with the rest of them at most.
//!
//! Only AWSCURRENT is gathered, because AWS answers for nothing else in batches. A group of one is no batch: AWS's quota
//! of single calls is a hundred times that of batches.
//!
//! INVARIANT: a question is answered by a call that began after it was asked. So a [`Freshness::Refresh`] may go along
//! with anyone, and whoever asks after a write does not get what was there before.
//!
//! INVARIANT: who goes away takes nothing from who stays. The call is no caller's, and is made whoever is left.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::watch;

use super::{
    Description, Fetched, Freshness, ListPage, ListRequest, Put, RecoveryWindow, Store, StoreError, Upstream,
    Written,
};
use crate::secret::{EnvironmentName, LabelMove, SecretId, Selector, VersionId};

/// How often it is looked whether a group still grows: those who start together, start within this.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// So many looks are the longest that a group stays open.
const MOST_LOOKS: usize = 5;

type Answer = Result<Fetched, StoreError>;
/// Where those wait who asked for a secret; holds the answer once there is one.
type Landing = watch::Receiver<Option<Answer>>;

/// Gathers questions for the store below.
pub struct Coalesced {
    inner: Arc<Inner>,
}

struct Inner {
    below: Arc<dyn Store>,
    most: usize,
    open: Mutex<Open>,
    coalesced: AtomicU64,
}

/// The group that can be joined; empty where nobody has opened one.
#[derive(Default)]
struct Open {
    group: Group,
    /// Which group this is, so that who looks after one that has left does not take the next for it.
    number: u64,
    /// The last one that someone looks after.
    watched: Option<u64>,
}

/// Secrets to be asked for in one call, each once, and who is to be told.
#[derive(Default)]
struct Group {
    items: Vec<(SecretId, Selector)>,
    tell: Vec<watch::Sender<Option<Answer>>>,
    freshness: Freshness,
}

impl Coalesced {
    /// Around `below`, which takes batches of at most `most` secrets; at least 1. Its methods need a Tokio runtime, of
    /// which they spawn tasks.
    #[must_use]
    pub fn new(below: Arc<dyn Store>, most: usize) -> Self {
        let (open, coalesced) = (Mutex::default(), AtomicU64::new(0));
        Self { inner: Arc::new(Inner { below, most: most.max(1), open, coalesced }) }
    }
}

impl fmt::Debug for Coalesced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Coalesced").field("most", &self.inner.most).finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for Coalesced {
    async fn get(
        &self,
        id: &SecretId,
        selector: &Selector,
        freshness: Freshness,
    ) -> Result<Fetched, StoreError> {
        if *selector != Selector::CURRENT {
            return self.inner.below.get(id, selector, freshness).await;
        }
        match self.inner.join(&[id], freshness).pop() {
            Some(landing) => landed(id, landing).await,
            None => Err(unanswered(id)),
        }
    }

    async fn batch_get(
        &self,
        items: &[(SecretId, Selector)],
        freshness: Freshness,
    ) -> Vec<Result<Fetched, StoreError>> {
        let is_current = |item: &&(SecretId, Selector)| item.1 == Selector::CURRENT;
        let ids: Vec<&SecretId> = items.iter().filter(is_current).map(|(id, _)| id).collect();
        let landings = self.inner.join(&ids, freshness);
        let others: Vec<_> = items.iter().filter(|item| !is_current(item)).cloned().collect();
        // Those who joined are on their way meanwhile.
        let others = match others.is_empty() {
            true => Vec::new(),
            false => self.inner.below.batch_get(&others, freshness).await,
        };
        let (mut landings, mut others) = (landings.into_iter(), others.into_iter());
        let mut answers = Vec::with_capacity(items.len());
        for item in items {
            let id = &item.0;
            answers.push(match is_current(&item) {
                true => match landings.next() {
                    Some(landing) => landed(id, landing).await,
                    None => Err(unanswered(id)),
                },
                false => others.next().unwrap_or_else(|| Err(unanswered(id))),
            });
        }
        answers
    }

    async fn put(&self, id: &SecretId, put: Put) -> Result<Written, StoreError> {
        self.inner.below.put(id, put).await
    }

    async fn describe(&self, id: &SecretId) -> Result<Description, StoreError> {
        self.inner.below.describe(id).await
    }

    async fn list(
        &self,
        environment: &EnvironmentName,
        request: &ListRequest,
    ) -> Result<ListPage, StoreError> {
        self.inner.below.list(environment, request).await
    }

    async fn move_label(&self, id: &SecretId, change: &LabelMove) -> Result<Written, StoreError> {
        self.inner.below.move_label(id, change).await
    }

    async fn promote(&self, id: &SecretId, from: &VersionId, to: &VersionId) -> Result<Written, StoreError> {
        self.inner.below.promote(id, from, to).await
    }

    async fn delete(&self, id: &SecretId, window: RecoveryWindow) -> Result<Timestamp, StoreError> {
        self.inner.below.delete(id, window).await
    }

    async fn restore(&self, id: &SecretId) -> Result<(), StoreError> {
        self.inner.below.restore(id).await
    }

    async fn ping(&self, environment: &EnvironmentName) -> Result<(), StoreError> {
        self.inner.below.ping(environment).await
    }

    fn upstream(&self) -> Upstream {
        let below = self.inner.below.upstream();
        Upstream { coalesced: below.coalesced + self.inner.coalesced.load(Relaxed), ..below }
    }
}

impl Inner {
    /// Puts each of `ids` into the open group, or into the next where that is full. Where to wait, in their order.
    fn join(self: &Arc<Self>, ids: &[&SecretId], freshness: Freshness) -> Vec<Landing> {
        let mut open = self.open();
        let mut landings = Vec::with_capacity(ids.len());
        for id in ids {
            if !open.group.items.is_empty() {
                self.coalesced.fetch_add(1, Relaxed);
            }
            landings.push(open.group.join(id, freshness));
            if open.group.items.len() >= self.most {
                self.launch(open.leave());
            }
        }
        if !open.group.items.is_empty() && open.watched != Some(open.number) {
            open.watched = Some(open.number);
            tokio::spawn(Arc::clone(self).look_after(open.number, open.group.tell.len()));
        }
        landings
    }

    /// Lets a group go that is not full, once nobody comes any more.
    async fn look_after(self: Arc<Self>, number: u64, mut seen: usize) {
        for _ in 0..MOST_LOOKS {
            // Nothing ever answers here: it is the time that is waited for.
            let _ = tokio::time::timeout(LOOK_EVERY, std::future::pending::<()>()).await;
            let open = self.open();
            let size = open.group.items.len();
            if open.number != number || size == seen {
                break;
            }
            seen = size;
        }
        let mut open = self.open();
        if open.number == number {
            self.launch(open.leave());
        }
    }

    /// Asks for a group, and tells everyone who waits. A panic of the store drops who would tell, which ends the wait.
    fn launch(self: &Arc<Self>, group: Group) {
        let Group { items, tell, freshness } = group;
        let below = Arc::clone(&self.below);
        tokio::spawn(async move {
            let answers = match items.as_slice() {
                [(id, selector)] => vec![below.get(id, selector, freshness).await],
                many => below.batch_get(many, freshness).await,
            };
            for (tell, answer) in tell.into_iter().zip(answers) {
                tell.send_replace(Some(answer));
            }
        });
    }

    /// A panic under the lock leaves a group that can be joined, and leaves when it is full or looked after.
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    /// Closes the group; whoever comes opens the next.
    fn leave(&mut self) -> Group {
        self.number += 1;
        std::mem::take(&mut self.group)
    }
}

impl Group {
    fn join(&mut self, id: &SecretId, freshness: Freshness) -> Landing {
        if freshness == Freshness::Refresh {
            self.freshness = Freshness::Refresh;
        }
        let known = self.items.iter().zip(&self.tell).find(|((known, _), _)| known == id);
        if let Some((_, tell)) = known {
            return tell.subscribe();
        }
        let (tell, landing) = watch::channel(None);
        self.items.push((id.clone(), Selector::CURRENT));
        self.tell.push(tell);
        landing
    }
}

async fn landed(id: &SecretId, mut landing: Landing) -> Answer {
    let told = landing.wait_for(Option::is_some).await.ok().and_then(|answer| answer.clone());
    told.unwrap_or_else(|| Err(unanswered(id)))
}

fn unanswered(id: &SecretId) -> StoreError {
    StoreError::Unavailable {
        environment: id.environment.clone(),
        cause: format!("the call for secret `{}` ended without an answer; try again", id.name),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;
    use tokio::sync::Semaphore;
    use tokio::task::JoinHandle;

    use super::*;
    use crate::error::{Reason, Reasoned as _};
    use crate::secret::{Label, SecretValue, Version};
    use crate::store::{Order, Source};

    /// How long anything may take before a test is called hung. Never what a test waits for.
    const HUNG: Duration = Duration::from_secs(60);

    /// A store that takes note of each call, and answers it with the number of the calls before it once it may.
    struct Scripted {
        calls: Mutex<Vec<(Vec<String>, Freshness)>>,
        may_answer: Semaphore,
    }

    impl Scripted {
        async fn answer(&self, items: &[(SecretId, Selector)], freshness: Freshness) -> Vec<Answer> {
            let names = items.iter().map(|(id, _)| id.name.to_string()).collect();
            let number = {
                let mut calls = self.calls.lock().unwrap();
                calls.push((names, freshness));
                calls.len()
            };
            self.may_answer.acquire().await.unwrap().forget();
            items.iter().map(|(id, _)| answer(id, number)).collect()
        }

        /// The names of each call so far.
        fn asked(&self) -> Vec<Vec<String>> {
            self.calls.lock().unwrap().iter().map(|(names, _)| names.clone()).collect()
        }
    }

    fn answer(id: &SecretId, number: usize) -> Answer {
        match id.name.as_str() {
            "absent" => Err(StoreError::SecretNotFound(id.clone())),
            "poisoned" => panic!("on purpose"),
            _ => Ok(Fetched {
                version: Version {
                    id: VersionId::parse(&format!("{number:032}")).unwrap(),
                    labels: vec![Label::Current],
                    created_at: Timestamp::UNIX_EPOCH,
                },
                value: SecretValue::text(id.name.to_string()).unwrap(),
                order: Order::Unknown,
                source: Source::Store,
                age: Duration::ZERO,
                stale: false,
            }),
        }
    }

    #[async_trait]
    impl Store for Scripted {
        async fn get(&self, id: &SecretId, selector: &Selector, freshness: Freshness) -> Answer {
            self.answer(&[(id.clone(), selector.clone())], freshness).await.remove(0)
        }

        async fn batch_get(&self, items: &[(SecretId, Selector)], freshness: Freshness) -> Vec<Answer> {
            self.answer(items, freshness).await
        }

        async fn put(&self, _: &SecretId, put: Put) -> Result<Written, StoreError> {
            Err(StoreError::TokenReused { token: put.token })
        }

        async fn describe(&self, id: &SecretId) -> Result<Description, StoreError> {
            Err(StoreError::SecretNotFound(id.clone()))
        }

        async fn list(&self, _: &EnvironmentName, _: &ListRequest) -> Result<ListPage, StoreError> {
            Ok(ListPage::default())
        }

        async fn move_label(&self, id: &SecretId, _: &LabelMove) -> Result<Written, StoreError> {
            Err(StoreError::SecretNotFound(id.clone()))
        }

        async fn delete(&self, id: &SecretId, _: RecoveryWindow) -> Result<Timestamp, StoreError> {
            Err(StoreError::SecretNotFound(id.clone()))
        }

        async fn restore(&self, id: &SecretId) -> Result<(), StoreError> {
            Err(StoreError::SecretNotFound(id.clone()))
        }

        async fn ping(&self, _: &EnvironmentName) -> Result<(), StoreError> {
            Ok(())
        }
    }

    struct House {
        below: Arc<Scripted>,
        store: Arc<Coalesced>,
    }

    impl House {
        /// A store that answers `calls` calls, around one that takes batches of four.
        fn answering(calls: usize) -> Self {
            let below = Arc::new(Scripted { calls: Mutex::default(), may_answer: Semaphore::new(calls) });
            let store = Arc::new(Coalesced::new(below.clone(), 4));
            Self { below, store }
        }

        fn get(&self, name: &str, freshness: Freshness) -> JoinHandle<Answer> {
            let (store, id) = (Arc::clone(&self.store), id(name));
            tokio::spawn(async move { store.get(&id, &Selector::CURRENT, freshness).await })
        }

        /// Waits until the store below was called so often.
        async fn called(&self, times: usize) {
            let called = async {
                while self.below.asked().len() < times {
                    tokio::task::yield_now().await;
                }
            };
            in_time(called).await;
        }
    }

    fn id(name: &str) -> SecretId {
        SecretId::parse("production", name).unwrap()
    }

    async fn in_time<T>(future: impl Future<Output = T>) -> T {
        tokio::time::timeout(HUNG, future).await.expect("hung")
    }

    /// The value, and the number of the call that told it.
    async fn told(asked: JoinHandle<Answer>) -> Result<(String, String), Reason> {
        let answer = in_time(asked).await.unwrap();
        answer
            .map(|found| {
                let number = found.version.id.as_str().trim_start_matches('0').to_owned();
                (found.value.expose_text().unwrap().to_owned(), number)
            })
            .map_err(|error| error.reason())
    }

    fn by_call(name: &str, number: usize) -> Result<(String, String), Reason> {
        Ok((name.to_owned(), number.to_string()))
    }

    #[tokio::test]
    async fn who_asks_at_the_same_time_is_answered_by_as_few_calls_as_there_can_be() {
        let house = House::answering(3);
        let names: Vec<String> = (0..12).map(|n| format!("secret-{n}")).collect();
        let asked: Vec<_> = names.iter().map(|name| house.get(name, Freshness::Cached)).collect();
        for (found, name) in join_all(asked.into_iter().map(told)).await.into_iter().zip(&names) {
            assert_eq!(found.unwrap().0, *name);
        }
        assert_eq!(house.below.asked(), names.chunks(4).map(<[_]>::to_vec).collect::<Vec<_>>());
        assert_eq!(house.store.upstream().coalesced, 9);
    }

    #[tokio::test]
    async fn who_is_alone_is_asked_for_alone() {
        let house = House::answering(1);
        assert_eq!(told(house.get("a", Freshness::Cached)).await, by_call("a", 1));
        assert_eq!(house.below.asked(), [["a"]]);
        assert_eq!(house.store.upstream().coalesced, 0);
    }

    #[tokio::test]
    async fn the_same_secret_is_asked_for_once() {
        let house = House::answering(1);
        let asked: Vec<_> = (0..100).map(|_| house.get("a", Freshness::Cached)).collect();
        for found in join_all(asked.into_iter().map(told)).await {
            assert_eq!(found, by_call("a", 1));
        }
        assert_eq!(house.below.asked(), [["a"]]);
        assert_eq!(house.store.upstream().coalesced, 99);
    }

    #[tokio::test]
    async fn a_batch_fills_groups_and_what_is_left_gathers() {
        let house = House::answering(3);
        let others = [house.get("x", Freshness::Cached), house.get("y", Freshness::Cached)];
        let previous = Selector::Label(Label::Previous);
        let items: Vec<_> = ["a", "b", "c", "a", "d"].map(|name| (id(name), Selector::CURRENT)).into();
        let mixed = [items.clone(), vec![(id("old"), previous)]].concat();
        let store = Arc::clone(&house.store);
        let batch = tokio::spawn(async move { store.batch_get(&mixed, Freshness::Cached).await });
        let found = in_time(batch).await.unwrap();
        let values: Vec<_> =
            found.into_iter().map(|found| found.unwrap().value.expose_text().unwrap().to_owned()).collect();
        assert_eq!(values, ["a", "b", "c", "a", "d", "old"]);
        for other in others {
            told(other).await.unwrap();
        }
        let mut asked = house.below.asked();
        asked.sort();
        assert_eq!(asked, [vec!["c", "a", "d"], vec!["old"], vec!["x", "y", "a", "b"]]);
    }

    #[tokio::test]
    async fn nobody_is_answered_by_a_call_that_was_under_way() {
        let house = House::answering(0);
        let early = house.get("a", Freshness::Cached);
        house.called(1).await;
        let late = [house.get("a", Freshness::Refresh), house.get("a", Freshness::Cached)];
        house.called(2).await;
        house.below.may_answer.add_permits(2);
        assert_eq!(told(early).await, by_call("a", 1));
        for late in late {
            assert_eq!(told(late).await, by_call("a", 2));
        }
        let freshness: Vec<_> =
            house.below.calls.lock().unwrap().iter().map(|(_, freshness)| *freshness).collect();
        assert_eq!(freshness, [Freshness::Cached, Freshness::Refresh]);
    }

    #[tokio::test]
    async fn ones_error_is_its_own() {
        let house = House::answering(1);
        let asked = ["a", "absent", "b"].map(|name| house.get(name, Freshness::Cached));
        let found = join_all(asked.map(told)).await;
        assert_eq!(found, [by_call("a", 1), Err(Reason::SecretNotFound), by_call("b", 1)]);
    }

    #[tokio::test]
    async fn who_goes_away_takes_nothing_from_who_stays() {
        let house = House::answering(0);
        let [gone, stays] = ["a", "b"].map(|name| house.get(name, Freshness::Cached));
        house.called(1).await;
        gone.abort();
        assert!(gone.await.unwrap_err().is_cancelled());
        house.below.may_answer.add_permits(1);
        assert_eq!(told(stays).await, by_call("b", 1));
        assert_eq!(house.below.asked(), [["a", "b"]]);
    }

    #[tokio::test]
    async fn a_store_that_panics_ends_the_wait_and_nothing_else() {
        let house = House::answering(2);
        let asked = ["a", "poisoned"].map(|name| house.get(name, Freshness::Cached));
        for found in join_all(asked.map(told)).await {
            assert_eq!(found, Err(Reason::StoreUnavailable));
        }
        assert_eq!(told(house.get("a", Freshness::Cached)).await, by_call("a", 2));
    }
}
