//! The stores behind their grants: the only holder of stores in the broker.
//!
//! INVARIANT: no method that touches a secret works without a [`Grant`], and each works on exactly what its grant
//! names, and only for the action that it was given for. So a path that forgets to ask policy does not compile.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use futures_util::future::join_all;
use jiff::Timestamp;

use super::{
    Description, Fetched, Freshness, ListPage, ListRequest, Put, RecoveryWindow, Store, StoreError, Written,
};
use crate::policy::{Action, Grant, Resource};
use crate::secret::{
    EnvironmentName, Label, LabelError, LabelMove, SecretId, SecretValue, Selector, VersionId,
};

/// The (cached) store of each environment.
pub struct Guarded {
    stores: BTreeMap<EnvironmentName, Arc<dyn Store>>,
}

/// The secrets of one environment out of a batch, and where in the batch each stands.
#[derive(Default)]
struct Group {
    places: Vec<usize>,
    items: Vec<(SecretId, Selector)>,
}

impl Guarded {
    /// Takes the stores over.
    #[must_use]
    pub const fn new(stores: BTreeMap<EnvironmentName, Arc<dyn Store>>) -> Self {
        Self { stores }
    }

    /// The version that `selector` points at.
    ///
    /// # Errors
    /// [`StoreError`]; the grant must be for [`Action::Read`].
    pub async fn get(
        &self,
        grant: &Grant,
        selector: &Selector,
        freshness: Freshness,
    ) -> Result<Fetched, StoreError> {
        let (store, id) = self.secret(grant, Action::Read)?;
        store.get(id, selector, freshness).await
    }

    /// As [`get`](Self::get) for each item, in order, with one call for each environment; one item's failure is its
    /// own.
    pub async fn batch_get(
        &self,
        items: &[(&Grant, Selector)],
        freshness: Freshness,
    ) -> Vec<Result<Fetched, StoreError>> {
        let mut groups: BTreeMap<&EnvironmentName, (&Arc<dyn Store>, Group)> = BTreeMap::new();
        let mut answers = BTreeMap::new();
        for (place, (grant, selector)) in items.iter().enumerate() {
            match self.secret(grant, Action::Read) {
                Ok((store, id)) => {
                    let (_, group) =
                        groups.entry(&id.environment).or_insert_with(|| (store, Group::default()));
                    group.places.push(place);
                    group.items.push((id.clone(), selector.clone()));
                }
                Err(error) => {
                    answers.insert(place, Err(error));
                }
            }
        }
        let asked = groups.into_values().map(|(store, Group { places, items })| async move {
            places.into_iter().zip(store.batch_get(&items, freshness).await)
        });
        answers.extend(join_all(asked).await.into_iter().flatten());
        let unanswered = || Err(defect("a store gave fewer answers than it was asked for"));
        (0..items.len()).map(|place| answers.remove(&place).unwrap_or_else(unanswered)).collect()
    }

    /// Writes a version; creates the secret where it does not exist.
    ///
    /// # Errors
    /// [`StoreError`]; the grant must be for [`Action::Write`].
    pub async fn put(&self, grant: &Grant, put: Put) -> Result<Written, StoreError> {
        let (store, id) = self.secret(grant, Action::Write)?;
        store.put(id, put).await
    }

    /// Moves a label other than AWSCURRENT by compare-and-swap.
    ///
    /// # Errors
    /// [`StoreError`]; the grant must be for [`Action::Write`]. [`LabelError::Forbidden`] for AWSCURRENT: to move it
    /// back is a rollback, which is an action of its own.
    pub async fn move_label(&self, grant: &Grant, change: &LabelMove) -> Result<Written, StoreError> {
        let (store, id) = self.secret(grant, Action::Write)?;
        if change.label == Label::Current {
            let problem = "moves with a put or a rollback; ask for one of them";
            return Err(LabelError::Forbidden { label: Label::Current, problem }.into());
        }
        store.move_label(id, change).await
    }

    /// Makes `to` current, or what AWSPREVIOUS is on where it is `None`; only if `expected` is current, or with `None`
    /// what is current now.
    ///
    /// # Errors
    /// [`StoreError`]; the grant must be for [`Action::Rollback`]. [`StoreError::VersionNotFound`] where nothing is
    /// previous.
    pub async fn rollback(
        &self,
        grant: &Grant,
        to: Option<VersionId>,
        expected: Option<VersionId>,
    ) -> Result<Written, StoreError> {
        let (store, id) = self.secret(grant, Action::Rollback)?;
        let (to, from) = match (to, expected) {
            (Some(to), Some(expected)) => (to, Some(expected)),
            (to, expected) => {
                let description = store.describe(id).await?;
                let previous = || {
                    let selector = Selector::Label(Label::Previous);
                    let missing = || StoreError::VersionNotFound { id: id.clone(), selector };
                    holder(&description, &Label::Previous).ok_or_else(missing)
                };
                let to = to.map_or_else(previous, Ok)?;
                (to, expected.or_else(|| holder(&description, &Label::Current)))
            }
        };
        store.move_label(id, &LabelMove { label: Label::Current, from, to: Some(to) }).await
    }

    /// Writes the version that a rotation is about to bring into use: under AWSPENDING, and only if `expected` is
    /// current, so that nothing else changes.
    ///
    /// # Errors
    /// [`StoreError`]; the grant must be for [`Action::Rotate`].
    pub async fn put_pending(
        &self,
        grant: &Grant,
        token: VersionId,
        value: SecretValue,
        expected: VersionId,
    ) -> Result<Written, StoreError> {
        let (store, id) = self.secret(grant, Action::Rotate)?;
        let labels = vec![Label::Pending];
        store.put(id, Put { value, token, labels, expected: Some(Some(expected)) }).await
    }

    /// Brings a pending version into use.
    ///
    /// # Errors
    /// [`StoreError`]; the grant must be for [`Action::Rotate`].
    pub async fn promote(
        &self,
        grant: &Grant,
        from: &VersionId,
        to: &VersionId,
    ) -> Result<Written, StoreError> {
        let (store, id) = self.secret(grant, Action::Rotate)?;
        store.promote(id, from, to).await
    }

    /// Moves AWSPENDING, or marks a version with a label of its own, as a rotation does.
    ///
    /// # Errors
    /// [`StoreError`]; the grant must be for [`Action::Rotate`].
    pub async fn move_in_rotation(&self, grant: &Grant, change: &LabelMove) -> Result<Written, StoreError> {
        let (store, id) = self.secret(grant, Action::Rotate)?;
        store.move_label(id, change).await
    }

    /// What is known of a secret without any value.
    ///
    /// # Errors
    /// [`StoreError`]; the grant must be for [`Action::Describe`].
    pub async fn describe(&self, grant: &Grant) -> Result<Description, StoreError> {
        let (store, id) = self.secret(grant, Action::Describe)?;
        store.describe(id).await
    }

    /// A page of the secrets of the environment that the grant names.
    ///
    /// # Errors
    /// [`StoreError`]; the grant must be for [`Action::List`].
    pub async fn list(&self, grant: &Grant, request: &ListRequest) -> Result<ListPage, StoreError> {
        let Resource::Environment(environment) = granted(grant, Action::List)? else {
            return Err(misused(grant, "a list of an environment"));
        };
        self.store(environment)?.list(environment, request).await
    }

    /// Deletes a secret; it can be restored until the returned time.
    ///
    /// # Errors
    /// [`StoreError`]; the grant must be for [`Action::Delete`].
    pub async fn delete(&self, grant: &Grant, window: RecoveryWindow) -> Result<Timestamp, StoreError> {
        let (store, id) = self.secret(grant, Action::Delete)?;
        store.delete(id, window).await
    }

    /// Brings a deleted secret back.
    ///
    /// # Errors
    /// [`StoreError`]; the grant must be for [`Action::Delete`]: who may delete may undo it.
    pub async fn restore(&self, grant: &Grant) -> Result<(), StoreError> {
        let (store, id) = self.secret(grant, Action::Delete)?;
        store.restore(id).await
    }

    /// Whether the store of an environment answers. Tells nothing of any secret, and so needs no grant.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn ping(&self, environment: &EnvironmentName) -> Result<(), StoreError> {
        self.store(environment)?.ping(environment).await
    }

    fn secret<'a>(
        &self,
        grant: &'a Grant,
        wanted: Action,
    ) -> Result<(&Arc<dyn Store>, &'a SecretId), StoreError> {
        match granted(grant, wanted)? {
            Resource::Secret(id) => Ok((self.store(&id.environment)?, id)),
            Resource::Environment(_) | Resource::Broker => Err(misused(grant, "one secret")),
        }
    }

    fn store(&self, environment: &EnvironmentName) -> Result<&Arc<dyn Store>, StoreError> {
        let missing = || StoreError::Invalid(format!("environment `{environment}` has no store; declare it"));
        self.stores.get(environment).ok_or_else(missing)
    }
}

impl fmt::Debug for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.stores.keys()).finish()
    }
}

fn granted(grant: &Grant, wanted: Action) -> Result<&Resource, StoreError> {
    if grant.action() == wanted { Ok(grant.resource()) } else { Err(misused(grant, wanted.as_str())) }
}

fn misused(grant: &Grant, used: &str) -> StoreError {
    defect(&format!("grant to {} {} used for {used}", grant.action(), grant.resource()))
}

fn defect(problem: &str) -> StoreError {
    StoreError::Invalid(format!("a defect: {problem}"))
}

fn holder(description: &Description, label: &Label) -> Option<VersionId> {
    description
        .versions
        .iter()
        .find(|version| version.labels.contains(label))
        .map(|version| version.id.clone())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use async_trait::async_trait;

    use super::super::{Order, Source};
    use super::*;
    use crate::clock::SystemClock;
    use crate::environment::{Environment, Registry};
    use crate::error::{Reason, Reasoned as _};
    use crate::identity::{Principal, PrincipalKind, Proof};
    use crate::policy::{Context, Policies, PolicySource};
    use crate::secret::{SecretValue, Version};

    /// Writes down what it is asked, and answers with versions 1 (previous) and 2 (current).
    #[derive(Default)]
    struct Recorder {
        asked: Mutex<Vec<String>>,
    }

    impl Recorder {
        fn note(&self, what: String) {
            self.asked.lock().unwrap().push(what);
        }
    }

    fn number(n: u8) -> VersionId {
        VersionId::parse(&format!("{n:032}")).unwrap()
    }

    fn version(n: u8, label: Label) -> Version {
        Version { id: number(n), labels: vec![label], created_at: Timestamp::UNIX_EPOCH }
    }

    fn written(n: u8) -> Written {
        let version = version(n, Label::Current);
        Written { version, superseded: None, order: Order::Revision(1), changed: true }
    }

    #[async_trait]
    impl Store for Recorder {
        async fn get(&self, id: &SecretId, _: &Selector, _: Freshness) -> Result<Fetched, StoreError> {
            self.note(format!("get {id}"));
            Ok(Fetched {
                version: version(2, Label::Current),
                value: SecretValue::text(id.to_string()).unwrap(),
                order: Order::Revision(1),
                source: Source::Store,
                age: Duration::ZERO,
                stale: false,
            })
        }

        async fn batch_get(
            &self,
            items: &[(SecretId, Selector)],
            freshness: Freshness,
        ) -> Vec<Result<Fetched, StoreError>> {
            self.note(format!("batch of {}", items.len()));
            let mut answers = Vec::new();
            for (id, selector) in items {
                answers.push(self.get(id, selector, freshness).await);
            }
            answers
        }

        async fn put(&self, id: &SecretId, _: Put) -> Result<Written, StoreError> {
            self.note(format!("put {id}"));
            Ok(written(3))
        }

        async fn describe(&self, id: &SecretId) -> Result<Description, StoreError> {
            self.note(format!("describe {id}"));
            Ok(Description {
                name: id.name.clone(),
                versions: vec![version(2, Label::Current), version(1, Label::Previous)],
                created_at: Timestamp::UNIX_EPOCH,
                changed_at: Timestamp::UNIX_EPOCH,
                deletion_at: None,
                order: Order::Revision(1),
            })
        }

        async fn list(&self, environment: &EnvironmentName, _: &ListRequest) -> Result<ListPage, StoreError> {
            self.note(format!("list {environment}"));
            Ok(ListPage::default())
        }

        async fn move_label(&self, _: &SecretId, change: &LabelMove) -> Result<Written, StoreError> {
            self.note(format!("move {:?}: {:?} to {:?}", change.label, change.from, change.to));
            Ok(written(1))
        }

        async fn delete(&self, id: &SecretId, _: RecoveryWindow) -> Result<Timestamp, StoreError> {
            self.note(format!("delete {id}"));
            Ok(Timestamp::UNIX_EPOCH)
        }

        async fn restore(&self, id: &SecretId) -> Result<(), StoreError> {
            self.note(format!("restore {id}"));
            Ok(())
        }

        async fn ping(&self, environment: &EnvironmentName) -> Result<(), StoreError> {
            self.note(format!("ping {environment}"));
            Ok(())
        }
    }

    struct House {
        policies: Policies,
        guarded: Guarded,
        development: Arc<Recorder>,
        staging: Arc<Recorder>,
    }

    fn environment(name: &str) -> EnvironmentName {
        EnvironmentName::parse(name).unwrap()
    }

    impl House {
        fn new() -> Self {
            let names = ["development", "staging", "unstored"].map(environment);
            let registry = Registry::new(names.map(Environment::sealed)).unwrap();
            let policies = Policies::load(PolicySource::shipped(), registry, SystemClock::shared()).unwrap();
            let (development, staging) = (Arc::new(Recorder::default()), Arc::new(Recorder::default()));
            let mut stores: BTreeMap<EnvironmentName, Arc<dyn Store>> = BTreeMap::new();
            stores.insert(environment("development"), Arc::clone(&development) as _);
            stores.insert(environment("staging"), Arc::clone(&staging) as _);
            Self { policies, guarded: Guarded::new(stores), development, staging }
        }

        fn grant(&self, action: Action, resource: Resource) -> Grant {
            let groups = ["administrators".to_owned()].into();
            let proof = Proof { method: "token", detail: String::new() };
            // A person: no workload may approve.
            let principal =
                Arc::new(Principal::new(PrincipalKind::User, "tests", groups, BTreeMap::new(), proof));
            self.policies.authorize(&principal, action, &resource, &Context::default()).unwrap()
        }

        fn secret(&self, action: Action, environment: &str, name: &str) -> Grant {
            self.grant(action, Resource::Secret(SecretId::parse(environment, name).unwrap()))
        }

        fn asked(&self) -> Vec<String> {
            std::mem::take(&mut *self.development.asked.lock().unwrap())
        }
    }

    fn a_put() -> Put {
        let value = SecretValue::text("v".to_owned()).unwrap();
        Put { value, token: number(3), labels: Vec::new(), expected: None }
    }

    fn of_a_defect<T>(result: Result<T, StoreError>) {
        let message = result.err().unwrap().to_string();
        assert!(message.starts_with("a defect: grant to "), "{message}");
    }

    #[tokio::test]
    async fn a_grant_is_good_for_its_own_secret_and_action() {
        let house = House::new();
        let read = house.secret(Action::Read, "development", "a");
        let fetched = house.guarded.get(&read, &Selector::CURRENT, Freshness::Cached).await.unwrap();
        assert_eq!(fetched.value.expose_text(), Some("development:a"));
        assert_eq!(house.asked(), ["get development:a"]);
        house.guarded.put(&house.secret(Action::Write, "development", "b"), a_put()).await.unwrap();
        assert_eq!(house.asked(), ["put development:b"]);
    }

    #[tokio::test]
    async fn a_grant_for_something_else_reaches_no_store() {
        let house = House::new();
        let guarded = &house.guarded;
        let change = LabelMove { label: Label::Pending, from: None, to: None };
        for action in Action::ALL.iter().copied() {
            let grant = house.secret(action, "development", "a");
            if action != Action::Read {
                of_a_defect(guarded.get(&grant, &Selector::CURRENT, Freshness::Cached).await);
                let batch = guarded.batch_get(&[(&grant, Selector::CURRENT)], Freshness::Cached).await;
                batch.into_iter().for_each(of_a_defect);
            }
            if action != Action::Write {
                of_a_defect(guarded.put(&grant, a_put()).await);
                of_a_defect(guarded.move_label(&grant, &change).await);
            }
            if action != Action::Rotate {
                let Put { value, token, .. } = a_put();
                of_a_defect(guarded.put_pending(&grant, token, value, number(1)).await);
                of_a_defect(guarded.promote(&grant, &number(1), &number(2)).await);
                of_a_defect(guarded.move_in_rotation(&grant, &change).await);
            }
            if action != Action::Rollback {
                of_a_defect(guarded.rollback(&grant, None, None).await);
            }
            if action != Action::Describe {
                of_a_defect(guarded.describe(&grant).await);
            }
            if action != Action::Delete {
                of_a_defect(guarded.delete(&grant, RecoveryWindow::DEFAULT).await);
                of_a_defect(guarded.restore(&grant).await);
            }
            of_a_defect(guarded.list(&grant, &ListRequest::default()).await);
        }
        let whole = house.grant(Action::Read, Resource::Environment(environment("development")));
        of_a_defect(guarded.get(&whole, &Selector::CURRENT, Freshness::Cached).await);
        assert!(house.asked().is_empty(), "nothing reaches the store");
    }

    #[tokio::test]
    async fn a_batch_asks_each_environment_once_and_keeps_its_order() {
        let house = House::new();
        let grants = [
            house.secret(Action::Read, "staging", "a"),
            house.secret(Action::Read, "development", "b"),
            house.secret(Action::Write, "development", "c"),
            house.secret(Action::Read, "staging", "d"),
            house.secret(Action::Read, "unstored", "e"),
        ];
        let items: Vec<_> = grants.iter().map(|grant| (grant, Selector::CURRENT)).collect();
        let answers = house.guarded.batch_get(&items, Freshness::Cached).await;
        let text = |answer: &Result<Fetched, StoreError>| match answer {
            Ok(fetched) => fetched.value.expose_text().unwrap().to_owned(),
            Err(error) => error.reason().code().to_owned(),
        };
        let told: Vec<String> = answers.iter().map(text).collect();
        let expected = ["staging:a", "development:b", "INVALID_ARGUMENT", "staging:d", "INVALID_ARGUMENT"];
        assert_eq!(told, expected);
        assert_eq!(house.asked(), ["batch of 1", "get development:b"]);
        assert_eq!(*house.staging.asked.lock().unwrap(), ["batch of 2", "get staging:a", "get staging:d"]);
    }

    #[tokio::test]
    async fn a_rollback_moves_current_to_what_was_asked_or_to_previous() {
        let house = House::new();
        let grant = house.secret(Action::Rollback, "development", "a");
        house.guarded.rollback(&grant, None, None).await.unwrap();
        let moved = format!("move AWSCURRENT: Some({:?}) to Some({:?})", number(2), number(1));
        assert_eq!(house.asked(), ["describe development:a", moved.as_str()]);
        house.guarded.rollback(&grant, Some(number(1)), Some(number(2))).await.unwrap();
        assert_eq!(house.asked(), [moved.as_str()]);
    }

    #[tokio::test]
    async fn current_is_not_moved_by_who_may_only_write() {
        let house = House::new();
        let change = LabelMove { label: Label::Current, from: Some(number(2)), to: Some(number(1)) };
        let grant = house.secret(Action::Write, "development", "a");
        let error = house.guarded.move_label(&grant, &change).await.unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidLabel);
        assert!(house.asked().is_empty());
    }

    #[tokio::test]
    async fn a_health_check_needs_no_grant_but_a_store() {
        let house = House::new();
        house.guarded.ping(&environment("development")).await.unwrap();
        assert_eq!(house.asked(), ["ping development"]);
        let error = house.guarded.ping(&environment("unstored")).await.unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidArgument);
    }
}
