//! What every store does, written against the trait [`Store`], and run over each implementation and over the cache
//! around it:
//!
//! ```text
//! every_check!(sealed, SealedStore);
//! ```
//!
//! What a store can't do by its nature is a capability of its [`Fixture`], and said there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use claviger::cache::{self, Cache};
use claviger::clock::{ManualClock, SharedClock, SystemClock};
use claviger::crypto::{KeyRing, RootKey};
use claviger::error::{Reason, Reasoned};
use claviger::kv::embedded::Embedded;
use claviger::secret::{
    ContentType, EnvironmentName, Label, LabelError, LabelMove, MAX_LABELS_PER_VERSION, MAX_VALUE_BYTES,
    SecretId, SecretName, SecretValue, Selector, VersionId,
};
use claviger::store::sealed::Sealed;
use claviger::store::{
    Fetched, Freshness, ListRequest, Order, Put, RecoveryWindow, Source, Store, StoreError, Written,
};
use futures_util::future::join_all;
use tempfile::TempDir;

use crate::support::moto::{Moto, fresh_environment};

/// A store with an environment in which nothing is yet.
trait Fixture: Sized {
    /// Whether the store numbers its changes, and lists in the order of names. AWS does neither.
    const ORDERS: bool;

    /// Whether a put compares its expectation and writes in one step. AWS compares for label moves and for the creation
    /// of a secret only.
    const COMPARES_ON_PUT: bool;

    /// Whether a promotion is one step. In AWS it is a look and two moves of a label, and the look does not tell a
    /// version without a label from none.
    const PROMOTES_AT_ONCE: bool;

    async fn new() -> Self;

    fn store(&self) -> Arc<dyn Store>;

    fn environment(&self) -> &EnvironmentName;

    fn clock(&self) -> SharedClock;

    /// Lets the store believe that `by` has passed; false where its clock is out of reach, as AWS's is.
    fn advance(&self, by: Duration) -> bool;

    fn id(&self, name: &str) -> SecretId {
        SecretId::new(self.environment().clone(), SecretName::parse(name).unwrap())
    }
}

macro_rules! every_check {
    ($module:ident, $fixture:ty) => {
        every_check! { $module, $fixture:
            a_put_creates_the_secret_and_is_current,
            what_is_not_there_is_named,
            a_version_belongs_to_its_secret,
            values_are_exact,
            a_put_makes_the_last_one_previous,
            a_retry_changes_nothing,
            a_token_means_one_value,
            an_expectation_that_fails_writes_nothing,
            a_secret_is_created_once,
            one_of_the_racing_puts_wins,
            a_pending_version_is_claimed_and_promoted,
            a_pending_claim_is_not_stolen,
            a_promotion_spends_its_claim,
            a_promotion_comes_late_and_finds_its_claim_spent,
            a_promotion_that_fails_changes_nothing,
            a_promotion_needs_a_secret_and_a_version,
            promotions_of_one_version_are_one,
            one_of_the_racing_moves_wins,
            labels_of_the_users_own_move,
            label_rules_hold,
            a_version_carries_so_many_labels,
            a_rollback_is_a_move,
            a_label_needs_a_version,
            a_description_tells_versions_labels_and_dates,
            a_list_comes_in_pages,
            a_list_has_a_prefix,
            names_are_exact,
            a_deleted_secret_is_refused_and_comes_back_whole,
            a_deleted_secret_is_gone_after_its_window,
            a_batch_answers_each_item,
            order_grows_with_every_change,
            a_refresh_asks_the_store,
        }
    };
    ($module:ident, $fixture:ty: $($check:ident),+ $(,)?) => {
        mod $module {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $check() {
                    super::$check(&<$fixture>::new().await).await;
                }
            )+
        }
    };
}

every_check!(sealed, SealedStore);
every_check!(cached_sealed, Cached<SealedStore>);
every_check!(aws, AwsStore);
every_check!(cached_aws, Cached<AwsStore>);

async fn a_put_creates_the_secret_and_is_current(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    store.ping(fixture.environment()).await.unwrap();
    let written = store.put(&id, put(1, "one")).await.unwrap();
    assert_eq!(
        (&written.version.id, written.version.labels.as_slice()),
        (&version(1), &[Label::Current][..])
    );
    assert_eq!((&written.superseded, written.changed), (&None, true));
    for selector in [Selector::CURRENT, Selector::Version(version(1))] {
        let found = get(&store, &id, &selector).await.unwrap();
        assert!(found.value.same_as(&text("one")), "{selector}");
        assert_eq!(found.version.id, version(1));
        assert_eq!(found.version.labels, [Label::Current]);
        assert!(!found.stale);
    }
}

async fn what_is_not_there_is_named(fixture: &impl Fixture) {
    let (store, absent, id) = (fixture.store(), fixture.id("absent"), fixture.id("database"));
    let change = to(Label::Pending, None, Some(1));
    let refused = [
        get(&store, &absent, &Selector::CURRENT).await.unwrap_err(),
        get(&store, &absent, &Selector::Version(version(1))).await.unwrap_err(),
        store.describe(&absent).await.unwrap_err(),
        store.move_label(&absent, &change).await.unwrap_err(),
        store.delete(&absent, RecoveryWindow::DEFAULT).await.unwrap_err(),
        store.restore(&absent).await.unwrap_err(),
    ];
    for error in refused {
        assert!(matches!(&error, StoreError::SecretNotFound(named) if *named == absent), "{error}");
    }

    store.put(&id, put(1, "one")).await.unwrap();
    for selector in [
        Selector::Label(Label::Previous),
        Selector::Label(Label::Pending),
        Selector::Label(label("stable")),
        Selector::Version(version(2)),
    ] {
        let error = get(&store, &id, &selector).await.unwrap_err();
        let StoreError::VersionNotFound { id: of, selector: named } = &error else { panic!("{error}") };
        assert_eq!((of, named), (&id, &selector));
    }
}

async fn a_version_belongs_to_its_secret(fixture: &impl Fixture) {
    let (store, one, two) = (fixture.store(), fixture.id("one"), fixture.id("two"));
    store.put(&one, put(1, "one")).await.unwrap();
    store.put(&two, put(2, "two")).await.unwrap();
    let error = get(&store, &one, &Selector::Version(version(2))).await.unwrap_err();
    assert_eq!(error.reason(), Reason::VersionNotFound);
    store.put(&one, put(2, "another value")).await.unwrap();
    assert!(
        get(&store, &two, &Selector::CURRENT).await.unwrap().value.same_as(&text("two")),
        "a token is one secret's"
    );
}

async fn values_are_exact(fixture: &impl Fixture) {
    let store = fixture.store();
    let every_byte: Vec<u8> = (0..=u8::MAX).cycle().take(MAX_VALUE_BYTES).collect();
    let values = [
        text("a"),
        text(" leading and trailing \n"),
        text("-----BEGIN X-----\r\nAAAA\r\n-----END X-----\r\n"),
        text("nul\0inside"),
        text("\u{feff}byte order mark, é, e\u{301}, 🔑, \u{2028}, </script>"),
        text(r#"{"port":5432,"big":12345678901234567890,"huge":1e400,"money":1.10,"esc":"a\"\\\u00e9"}"#),
        text(&"x".repeat(MAX_VALUE_BYTES)),
        binary(vec![0]),
        binary(b"text, called binary".to_vec()),
        binary(vec![0xff, 0xfe, 0x00, 0x0d, 0x0a]),
        binary(every_byte),
    ];
    for (n, value) in values.into_iter().enumerate() {
        let id = fixture.id(&format!("value-{n}"));
        store.put(&id, Put { value: value.clone(), ..put(1, "") }).await.unwrap();
        let found = get(&store, &id, &Selector::CURRENT).await.unwrap().value;
        assert_eq!(found.content_type(), value.content_type(), "value {n}");
        assert!(found.same_as(&value), "value {n} comes back as {} bytes of {}", found.len(), value.len());
    }
}

async fn a_put_makes_the_last_one_previous(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    store.put(&id, put(1, "one")).await.unwrap();
    assert_eq!(store.put(&id, put(2, "two")).await.unwrap().superseded, Some(version(1)));
    assert_eq!(store.put(&id, put(3, "three")).await.unwrap().superseded, Some(version(2)));
    for (selector, expected, labels) in [
        (Selector::CURRENT, "three", vec![Label::Current]),
        (Selector::Label(Label::Previous), "two", vec![Label::Previous]),
        (Selector::Version(version(2)), "two", vec![Label::Previous]),
        (Selector::Version(version(1)), "one", vec![]),
    ] {
        let found = get(&store, &id, &selector).await.unwrap();
        assert!(found.value.same_as(&text(expected)), "{selector}");
        assert_eq!(found.version.labels, labels, "{selector}");
    }
}

async fn a_retry_changes_nothing(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    let creation = || Put { expected: Some(None), ..put(1, "one") };
    let update = || Put { expected: Some(Some(version(1))), ..put(2, "two") };
    store.put(&id, creation()).await.unwrap();
    let again = store.put(&id, creation()).await.unwrap();
    assert_eq!((again.changed, &again.version.id, &again.superseded), (false, &version(1), &None));

    store.put(&id, update()).await.unwrap();
    for (retry, labels) in [(update(), [Label::Current]), (creation(), [Label::Previous])] {
        let token = retry.token.clone();
        let again = store.put(&id, retry).await.unwrap();
        assert_eq!((again.changed, &again.version.id), (false, &token), "whatever has happened since");
        assert_eq!(again.version.labels, labels);
    }
    assert_eq!(current(&store, &id).await, version(2));
    assert_eq!(store.describe(&id).await.unwrap().versions.len(), 2);
}

async fn a_token_means_one_value(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    store.put(&id, put(1, "one")).await.unwrap();
    store.put(&id, Put { labels: vec![Label::Pending], ..put(2, "two") }).await.unwrap();
    let others = [
        put(1, "other"),
        put(1, "one "),
        Put { value: binary(b"one".to_vec()), ..put(1, "") },
        put(2, "other"),
        Put { labels: vec![Label::Pending], ..put(2, "other") },
    ];
    for other in others {
        let token = other.token.clone();
        let error = store.put(&id, other).await.unwrap_err();
        assert!(matches!(&error, StoreError::TokenReused { token: named } if *named == token), "{error}");
    }
    for (n, expected) in [(1, "one"), (2, "two")] {
        let found = get(&store, &id, &Selector::Version(version(n))).await.unwrap();
        assert!(found.value.same_as(&text(expected)));
    }
}

async fn an_expectation_that_fails_writes_nothing(fixture: &impl Fixture) {
    let (store, id, absent) = (fixture.store(), fixture.id("database"), fixture.id("absent"));
    let expecting =
        |expected: Option<u32>, token| Put { expected: Some(expected.map(version)), ..put(token, "new") };
    store.put(&id, expecting(None, 1)).await.unwrap();
    store.put(&id, expecting(Some(1), 2)).await.unwrap();
    for (id, wrong) in
        [(&id, expecting(Some(1), 3)), (&id, expecting(None, 3)), (&absent, expecting(Some(1), 3))]
    {
        let error = store.put(id, wrong).await.unwrap_err();
        assert!(matches!(&error, StoreError::Conflict { id: named, .. } if named == id), "{error}");
    }
    assert_eq!(current(&store, &id).await, version(2));
    assert_eq!(
        get(&store, &id, &Selector::Version(version(3))).await.unwrap_err().reason(),
        Reason::VersionNotFound
    );
    assert_eq!(store.describe(&absent).await.unwrap_err().reason(), Reason::SecretNotFound);
}

async fn a_secret_is_created_once(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    let puts = (1..=8).map(|n| {
        let (store, id) = (Arc::clone(&store), id.clone());
        let creation = Put { expected: Some(None), ..put(n, &format!("value {n}")) };
        tokio::spawn(async move { store.put(&id, creation).await })
    });
    let winner = the_only_one_to_win(join_all(puts).await.into_iter().map(Result::unwrap));
    assert_eq!(current(&store, &id).await, winner.version.id);
    assert_eq!(store.describe(&id).await.unwrap().versions.len(), 1);
}

/// Not where the store compares first and writes then.
async fn one_of_the_racing_puts_wins<F: Fixture>(fixture: &F) {
    if !F::COMPARES_ON_PUT {
        return;
    }
    let (store, id) = (fixture.store(), fixture.id("database"));
    store.put(&id, put(1, "one")).await.unwrap();
    let puts = (2..=9).map(|n| {
        let (store, id) = (Arc::clone(&store), id.clone());
        let update = Put { expected: Some(Some(version(1))), ..put(n, &format!("value {n}")) };
        tokio::spawn(async move { store.put(&id, update).await })
    });
    let winner = the_only_one_to_win(join_all(puts).await.into_iter().map(Result::unwrap));
    assert_eq!(winner.superseded, Some(version(1)));
    assert_eq!(current(&store, &id).await, winner.version.id);
    assert_eq!(store.describe(&id).await.unwrap().versions.len(), 2);
}

async fn a_pending_version_is_claimed_and_promoted(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    store.put(&id, put(1, "one")).await.unwrap();
    let pending = store.put(&id, Put { labels: vec![Label::Pending], ..put(2, "two") }).await.unwrap();
    assert_eq!((pending.version.labels.as_slice(), &pending.superseded), (&[Label::Pending][..], &None));
    assert_eq!(current(&store, &id).await, version(1), "a pending version is not in use");
    assert!(get(&store, &id, &Selector::Label(Label::Pending)).await.unwrap().value.same_as(&text("two")));

    let promotion = to(Label::Current, Some(1), Some(2));
    let promoted = store.move_label(&id, &promotion).await.unwrap();
    assert_eq!(
        (&promoted.version.id, &promoted.superseded, promoted.changed),
        (&version(2), &Some(version(1)), true)
    );
    let both = BTreeSet::from([Label::Current, Label::Pending]);
    assert_eq!(BTreeSet::from_iter(promoted.version.labels), both);
    assert!(get(&store, &id, &Selector::CURRENT).await.unwrap().value.same_as(&text("two")));
    assert!(get(&store, &id, &Selector::Label(Label::Previous)).await.unwrap().value.same_as(&text("one")));

    let again = store.move_label(&id, &promotion).await.unwrap();
    assert!(!again.changed, "a retry finds its work done");
    store.move_label(&id, &to(Label::Pending, Some(2), None)).await.unwrap();
    let expected = BTreeMap::from([(Label::Current, version(2)), (Label::Previous, version(1))]);
    assert_eq!(labels(&store, &id).await, expected);
}

async fn a_pending_claim_is_not_stolen(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    let claim = |n| Put { labels: vec![Label::Pending], ..put(n, &format!("value {n}")) };
    store.put(&id, put(1, "one")).await.unwrap();
    store.put(&id, claim(2)).await.unwrap();
    let error = store.put(&id, claim(3)).await.unwrap_err();
    let StoreError::Label(LabelError::PendingHeld { holder }) = &error else { panic!("{error}") };
    assert_eq!((holder, error.reason()), (&version(2), Reason::Conflict));
    assert!(!store.put(&id, claim(2)).await.unwrap().changed, "its own claim is a retry");

    // A promotion by someone whose picture is old.
    store.put(&id, put(4, "four")).await.unwrap();
    let error = store.move_label(&id, &to(Label::Current, Some(1), Some(2))).await.unwrap_err();
    assert!(matches!(&error, StoreError::Label(LabelError::Moved { label: Label::Current, .. })), "{error}");
    assert_eq!(error.reason(), Reason::Conflict);
    assert_eq!(current(&store, &id).await, version(4));
    assert_eq!(labels(&store, &id).await.get(&Label::Pending), Some(&version(2)));

    store.move_label(&id, &to(Label::Pending, Some(2), None)).await.unwrap();
    store.put(&id, claim(5)).await.unwrap();
    store.move_label(&id, &to(Label::Current, Some(4), Some(5))).await.unwrap();
    store.put(&id, claim(6)).await.expect("a claim that became current is over");
    assert_eq!(labels(&store, &id).await.get(&Label::Pending), Some(&version(6)));
}

/// Reads before and after, so that what a cache has kept is asked for, too.
async fn a_promotion_spends_its_claim(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    one_current_and_one_pending(&store, &id).await;
    store.move_label(&id, &to(label("stable"), None, Some(1))).await.unwrap();
    for (selector, expected) in [(Selector::CURRENT, 1), (Selector::Label(Label::Pending), 2)] {
        assert_eq!(get(&store, &id, &selector).await.unwrap().version.id, version(expected));
    }

    let promoted = store.promote(&id, &version(1), &version(2)).await.unwrap();
    assert_eq!(
        (&promoted.version.id, &promoted.superseded, promoted.changed),
        (&version(2), &Some(version(1)), true)
    );
    for freshness in [Freshness::Cached, Freshness::Refresh] {
        let found = store.get(&id, &Selector::CURRENT, freshness).await.unwrap();
        assert!(found.value.same_as(&text("two")), "{freshness:?}");
        let former = store.get(&id, &Selector::Label(Label::Previous), freshness).await.unwrap();
        assert!(former.value.same_as(&text("one")), "{freshness:?}");
    }
    let after = BTreeMap::from([
        (Label::Current, version(2)),
        (Label::Previous, version(1)),
        (label("stable"), version(1)),
    ]);
    assert_eq!(labels(&store, &id).await, after);
    let spent = store.get(&id, &Selector::Label(Label::Pending), Freshness::Refresh).await.unwrap_err();
    assert_eq!(spent.reason(), Reason::VersionNotFound);

    let again = store.promote(&id, &version(1), &version(2)).await.unwrap();
    assert_eq!((&again.version.id, again.changed), (&version(2), false), "a retry finds its work done");
    assert_eq!(labels(&store, &id).await, after);
    store
        .put(&id, Put { labels: vec![Label::Pending], ..put(3, "three") })
        .await
        .expect("the next claim is free");
}

/// A promotion that was on its way while a person rolled back: the labels stand as it expects, but for its claim.
async fn a_promotion_comes_late_and_finds_its_claim_spent(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    one_current_and_one_pending(&store, &id).await;
    store.promote(&id, &version(1), &version(2)).await.unwrap();
    store.move_label(&id, &to(Label::Current, Some(2), Some(1))).await.unwrap();
    let rolled_back = labels(&store, &id).await;

    let error = store.promote(&id, &version(1), &version(2)).await.unwrap_err();
    assert!(matches!(&error, StoreError::Label(LabelError::Moved { label: Label::Pending, .. })), "{error}");
    assert_eq!(error.reason(), Reason::Conflict);
    assert_eq!(labels(&store, &id).await, rolled_back);
    assert_eq!(current(&store, &id).await, version(1), "what the person chose stays");
}

async fn a_promotion_that_fails_changes_nothing(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    store.put(&id, put(1, "one")).await.unwrap();
    store.put(&id, Put { labels: vec![label("canary")], ..put(2, "two") }).await.unwrap();
    let refused = async |from: u32, to: u32, label: Label| {
        let before = labels(&store, &id).await;
        let error = store.promote(&id, &version(from), &version(to)).await.unwrap_err();
        let StoreError::Label(LabelError::Moved { label: named, .. }) = &error else { panic!("{error}") };
        assert_eq!((named, error.reason()), (&label, Reason::Conflict), "{error}");
        assert_eq!(labels(&store, &id).await, before);
    };
    // Nobody claimed; another one did; who claimed is late.
    refused(1, 2, Label::Pending).await;
    store.put(&id, Put { labels: vec![Label::Pending], ..put(3, "three") }).await.unwrap();
    refused(1, 2, Label::Pending).await;
    store.put(&id, put(4, "four")).await.unwrap();
    refused(1, 3, Label::Current).await;
    assert_eq!(current(&store, &id).await, version(4));
    store.promote(&id, &version(4), &version(3)).await.unwrap();
    assert_eq!(current(&store, &id).await, version(3));
}

async fn a_promotion_needs_a_secret_and_a_version<F: Fixture>(fixture: &F) {
    let (store, id, absent) = (fixture.store(), fixture.id("database"), fixture.id("absent"));
    let error = store.promote(&absent, &version(1), &version(2)).await.unwrap_err();
    assert!(matches!(&error, StoreError::SecretNotFound(named) if *named == absent), "{error}");

    one_current_and_one_pending(&store, &id).await;
    let before = labels(&store, &id).await;
    let unknown = store.promote(&id, &version(1), &version(3)).await.unwrap_err();
    let expected = if F::PROMOTES_AT_ONCE { Reason::VersionNotFound } else { Reason::Conflict };
    assert_eq!(unknown.reason(), expected, "{unknown}");

    store.delete(&id, RecoveryWindow::DEFAULT).await.unwrap();
    let error = store.promote(&id, &version(1), &version(2)).await.unwrap_err();
    assert!(matches!(&error, StoreError::SecretDeleted(named) if *named == id), "{error}");
    store.restore(&id).await.unwrap();
    assert_eq!(labels(&store, &id).await, before);
}

async fn promotions_of_one_version_are_one(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    one_current_and_one_pending(&store, &id).await;
    let promotions = (0..6).map(|_| {
        let (store, id) = (Arc::clone(&store), id.clone());
        tokio::spawn(async move { store.promote(&id, &version(1), &version(2)).await })
    });
    let outcomes: Vec<_> = join_all(promotions).await.into_iter().map(Result::unwrap).collect();
    for outcome in &outcomes {
        assert_eq!(outcome.as_ref().unwrap().version.id, version(2), "what is done already is a retry");
    }
    assert!(outcomes.iter().flatten().any(|written| written.changed));
    let expected = BTreeMap::from([(Label::Current, version(2)), (Label::Previous, version(1))]);
    assert_eq!(labels(&store, &id).await, expected);
}

async fn one_of_the_racing_moves_wins(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    store.put(&id, put(1, "one")).await.unwrap();
    for n in 2..=6 {
        store
            .put(&id, Put { labels: vec![label(&format!("l{n}"))], ..put(n, &format!("value {n}")) })
            .await
            .unwrap();
    }
    let moves = (2..=6).map(|n| {
        let (store, id) = (Arc::clone(&store), id.clone());
        tokio::spawn(async move { store.move_label(&id, &to(Label::Current, Some(1), Some(n))).await })
    });
    let winner = the_only_one_to_win(join_all(moves).await.into_iter().map(Result::unwrap));
    assert_eq!(current(&store, &id).await, winner.version.id);
    assert_eq!(labels(&store, &id).await.get(&Label::Previous), Some(&version(1)));
}

async fn labels_of_the_users_own_move(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    let stable = label("stable");
    store.put(&id, Put { labels: vec![Label::Current, stable.clone()], ..put(1, "one") }).await.unwrap();
    store.put(&id, put(2, "two")).await.unwrap();
    store.put(&id, Put { labels: vec![label("canary")], ..put(3, "three") }).await.unwrap();
    assert_eq!(current(&store, &id).await, version(2), "a label of the user's own is not AWSCURRENT");
    let found = get(&store, &id, &Selector::Label(stable.clone())).await.unwrap();
    assert_eq!((&found.version.id, found.value.same_as(&text("one"))), (&version(1), true));

    let moved = store.move_label(&id, &to(stable.clone(), Some(1), Some(2))).await.unwrap();
    assert_eq!((&moved.version.id, &moved.superseded, moved.changed), (&version(2), &None, true));
    assert!(!store.move_label(&id, &to(stable.clone(), Some(1), Some(2))).await.unwrap().changed);
    assert!(get(&store, &id, &Selector::Label(stable.clone())).await.unwrap().value.same_as(&text("two")));
    for stale in [to(stable.clone(), Some(1), Some(3)), to(stable.clone(), None, Some(3))] {
        let error = store.move_label(&id, &stale).await.unwrap_err();
        assert!(
            matches!(&error, StoreError::Label(LabelError::Moved { label, .. }) if *label == stable),
            "{error}"
        );
    }

    store.move_label(&id, &to(label("added"), None, Some(1))).await.unwrap();
    let removed = store.move_label(&id, &to(stable.clone(), Some(2), None)).await.unwrap();
    assert_eq!((&removed.version.id, removed.changed), (&version(2), true), "the version that lost it");
    assert!(!store.move_label(&id, &to(stable.clone(), Some(2), None)).await.unwrap().changed);
    let expected = BTreeMap::from([
        (Label::Current, version(2)),
        (Label::Previous, version(1)),
        (label("added"), version(1)),
        (label("canary"), version(3)),
    ]);
    assert_eq!(labels(&store, &id).await, expected);
    let error = get(&store, &id, &Selector::Label(stable)).await.unwrap_err();
    assert_eq!(error.reason(), Reason::VersionNotFound);
}

async fn label_rules_hold(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    let first = store.put(&id, Put { labels: vec![Label::Pending], ..put(1, "one") }).await.unwrap_err();
    assert_eq!(first.reason(), Reason::InvalidLabel, "a secret's first version is current");
    assert_eq!(store.describe(&id).await.unwrap_err().reason(), Reason::SecretNotFound);

    store.put(&id, put(1, "one")).await.unwrap();
    store.put(&id, put(2, "two")).await.unwrap();
    let before = labels(&store, &id).await;
    for forbidden in [
        to(Label::Current, Some(2), None),
        to(Label::Previous, Some(1), Some(2)),
        to(Label::Previous, Some(1), None),
    ] {
        let error = store.move_label(&id, &forbidden).await.unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidLabel, "{forbidden:?}: {error}");
    }
    let error = store.put(&id, Put { labels: vec![Label::Previous], ..put(3, "three") }).await.unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidLabel);
    assert_eq!(labels(&store, &id).await, before);
}

async fn a_version_carries_so_many_labels(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    store.put(&id, put(1, "one")).await.unwrap();
    for n in 1..MAX_LABELS_PER_VERSION {
        store.move_label(&id, &to(label(&format!("l{n}")), None, Some(1))).await.unwrap();
    }
    let error = store.move_label(&id, &to(label("more"), None, Some(1))).await.unwrap_err();
    assert_eq!(error.reason(), Reason::LimitExceeded);
    assert_eq!(labels(&store, &id).await.len(), MAX_LABELS_PER_VERSION);
}

async fn a_rollback_is_a_move(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    store.put(&id, put(1, "one")).await.unwrap();
    store.put(&id, put(2, "two")).await.unwrap();
    assert_eq!(current(&store, &id).await, version(2));
    for (from, back) in [(2, 1), (1, 2), (2, 1)] {
        let moved = store.move_label(&id, &to(Label::Current, Some(from), Some(back))).await.unwrap();
        assert_eq!((&moved.version.id, &moved.superseded), (&version(back), &Some(version(from))));
        assert_eq!(current(&store, &id).await, version(back), "an older version is the newer answer");
        let previous = get(&store, &id, &Selector::Label(Label::Previous)).await.unwrap();
        assert_eq!(previous.version.id, version(from));
    }
    assert!(get(&store, &id, &Selector::CURRENT).await.unwrap().value.same_as(&text("one")));
}

async fn a_label_needs_a_version(fixture: &impl Fixture) {
    let (store, id, other) = (fixture.store(), fixture.id("database"), fixture.id("other"));
    store.put(&id, put(1, "one")).await.unwrap();
    store.put(&other, put(2, "two")).await.unwrap();
    for change in [to(Label::Current, Some(1), Some(2)), to(label("stable"), None, Some(2))] {
        let error = store.move_label(&id, &change).await.unwrap_err();
        let StoreError::VersionNotFound { selector, .. } = &error else { panic!("{error}") };
        assert_eq!(*selector, Selector::Version(version(2)));
    }
    assert_eq!(labels(&store, &id).await, BTreeMap::from([(Label::Current, version(1))]));
}

async fn a_description_tells_versions_labels_and_dates(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    store.put(&id, put(1, "one")).await.unwrap();
    let created = store.describe(&id).await.unwrap();
    assert_eq!((&created.name, created.versions.len(), created.deletion_at), (&id.name, 1, None));
    for n in 2..=3 {
        fixture.advance(Duration::from_secs(60));
        store.put(&id, put(n, &format!("value {n}"))).await.unwrap();
    }
    fixture.advance(Duration::from_secs(60));
    store.move_label(&id, &to(label("stable"), None, Some(1))).await.unwrap();
    let described = store.describe(&id).await.unwrap();
    let versions: Vec<_> =
        described.versions.iter().map(|known| (known.id.clone(), known.labels.clone())).collect();
    let expected = [
        (version(3), vec![Label::Current]),
        (version(2), vec![Label::Previous]),
        (version(1), vec![label("stable")]),
    ];
    assert_eq!(versions, expected, "newest first");
    assert!(described.versions.is_sorted_by(|newer, older| newer.created_at >= older.created_at));
    assert_eq!(described.created_at, created.created_at);
    assert!(described.changed_at >= created.changed_at);
    if fixture.advance(Duration::ZERO) {
        let age = described.changed_at.duration_since(described.created_at);
        assert_eq!(age.as_secs(), 180, "the last move of a label is a change");
    }
}

async fn a_list_comes_in_pages(fixture: &impl Fixture) {
    let store = fixture.store();
    assert!(list(fixture, &ListRequest { limit: 10, ..ListRequest::default() }).await.is_empty());
    let mut expected: Vec<String> = (0..24).map(|n| format!("app-{}/part-{n:02}", n % 3)).collect();
    for name in &expected {
        store.put(&fixture.id(name), put(1, name)).await.unwrap();
    }
    store.put(&fixture.id("deleted"), put(1, "gone")).await.unwrap();
    store.delete(&fixture.id("deleted"), RecoveryWindow::DEFAULT).await.unwrap();
    expected.sort();
    for limit in [1, 10, 12, 100] {
        let shown = list(fixture, &ListRequest { limit, ..ListRequest::default() }).await;
        assert_eq!(shown, expected, "by {limit}, without the deleted one");
    }
    let all =
        list(fixture, &ListRequest { limit: 10, include_deleted: true, ..ListRequest::default() }).await;
    expected.push("deleted".to_owned());
    assert_eq!(all, expected);
}

async fn a_list_has_a_prefix(fixture: &impl Fixture) {
    let store = fixture.store();
    for name in ["a", "a/b", "a/b/c", "a/bc", "ab", "b/a", "A/b"] {
        store.put(&fixture.id(name), put(1, name)).await.unwrap();
    }
    let expected: [(&str, &[&str]); 6] = [
        ("a", &["a", "a/b", "a/b/c", "a/bc", "ab"]),
        ("a/", &["a/b", "a/b/c", "a/bc"]),
        ("a/b", &["a/b", "a/b/c", "a/bc"]),
        ("a/b/", &["a/b/c"]),
        ("A", &["A/b"]),
        ("nothing", &[]),
    ];
    for (prefix, names) in expected {
        let request = ListRequest { prefix: prefix.to_owned(), limit: 2, ..ListRequest::default() };
        assert_eq!(list(fixture, &request).await, names, "under {prefix}");
    }
}

/// Of these AWS's partial ARNs make `db` out of `db-abc123`, or the other way round.
async fn names_are_exact(fixture: &impl Fixture) {
    let store = fixture.store();
    store.put(&fixture.id("db"), put(1, "db")).await.unwrap();
    for name in ["db-abc123", "db-AbC12x", "d", "DB"] {
        let near = fixture.id(name);
        let error = get(&store, &near, &Selector::CURRENT).await.unwrap_err();
        assert!(matches!(&error, StoreError::SecretNotFound(named) if *named == near), "{error}");
        assert_eq!(store.describe(&near).await.unwrap_err().reason(), Reason::SecretNotFound);
    }
    let long = "x".repeat(400);
    let names = ["db-abc123", "DB", "db/abc123", "a/b/c", "A+b=c.d@e-f_g", "...", long.as_str()];
    for name in names {
        store.put(&fixture.id(name), put(1, name)).await.unwrap();
    }
    for name in names.into_iter().chain(["db"]) {
        assert!(
            get(&store, &fixture.id(name), &Selector::CURRENT).await.unwrap().value.same_as(&text(name)),
            "{name}"
        );
    }
}

async fn a_deleted_secret_is_refused_and_comes_back_whole(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    store.put(&id, put(1, "one")).await.unwrap();
    store.put(&id, put(2, "two")).await.unwrap();
    store.move_label(&id, &to(label("stable"), None, Some(1))).await.unwrap();
    get(&store, &id, &Selector::CURRENT).await.unwrap();
    let (before, labels_before) = (store.describe(&id).await.unwrap(), labels(&store, &id).await);

    let until = store.delete(&id, RecoveryWindow::days(7).unwrap()).await.unwrap();
    let refused = [
        get(&store, &id, &Selector::CURRENT).await.unwrap_err(),
        get(&store, &id, &Selector::Version(version(1))).await.unwrap_err(),
        store.put(&id, put(3, "three")).await.unwrap_err(),
        store.move_label(&id, &to(Label::Current, Some(2), Some(1))).await.unwrap_err(),
        store.delete(&id, RecoveryWindow::DEFAULT).await.unwrap_err(),
    ];
    for error in refused {
        assert!(matches!(&error, StoreError::SecretDeleted(named) if *named == id), "{error}");
    }
    let described = store.describe(&id).await.unwrap();
    assert!(described.deletion_at.is_some_and(|at| at > before.changed_at));
    if fixture.advance(Duration::ZERO) {
        assert_eq!(described.deletion_at, Some(until));
    }

    store.restore(&id).await.unwrap();
    assert!(get(&store, &id, &Selector::CURRENT).await.unwrap().value.same_as(&text("two")));
    assert!(get(&store, &id, &Selector::Label(label("stable"))).await.unwrap().value.same_as(&text("one")));
    assert_eq!(labels(&store, &id).await, labels_before);
    let after = store.describe(&id).await.unwrap();
    assert_eq!((after.deletion_at, &after.versions), (None, &before.versions));
    store.restore(&id).await.expect("what is not deleted stays as it is");
    store.put(&id, put(3, "three")).await.unwrap();
    assert_eq!(current(&store, &id).await, version(3));
}

/// Not where nobody can wait for a week.
async fn a_deleted_secret_is_gone_after_its_window(fixture: &impl Fixture) {
    const DAY: Duration = Duration::from_secs(86_400);
    let (store, id) = (fixture.store(), fixture.id("database"));
    if !fixture.advance(Duration::ZERO) {
        return;
    }
    store.put(&id, put(1, "one")).await.unwrap();
    store.put(&id, put(2, "two")).await.unwrap();
    store.delete(&id, RecoveryWindow::days(7).unwrap()).await.unwrap();
    fixture.advance(DAY * 7 - Duration::from_secs(1));
    assert_eq!(get(&store, &id, &Selector::CURRENT).await.unwrap_err().reason(), Reason::SecretDeleted);
    fixture.advance(DAY);
    let gone = [
        get(&store, &id, &Selector::CURRENT).await.unwrap_err(),
        get(&store, &id, &Selector::Version(version(1))).await.unwrap_err(),
        store.describe(&id).await.unwrap_err(),
        store.restore(&id).await.unwrap_err(),
    ];
    for error in gone {
        assert_eq!(error.reason(), Reason::SecretNotFound, "{error}");
    }
    let everything = ListRequest { limit: 10, include_deleted: true, ..ListRequest::default() };
    assert!(list(fixture, &everything).await.is_empty());

    store.put(&id, Put { expected: Some(None), ..put(1, "anew") }).await.unwrap();
    assert!(get(&store, &id, &Selector::CURRENT).await.unwrap().value.same_as(&text("anew")));
    assert_eq!(
        get(&store, &id, &Selector::Version(version(2))).await.unwrap_err().reason(),
        Reason::VersionNotFound
    );
    assert_eq!(store.describe(&id).await.unwrap().versions.len(), 1);
}

/// 45 items, which is more than AWS takes in two calls: every third is missing, every seventh deleted, and they ask by
/// label, by version and twice.
async fn a_batch_answers_each_item(fixture: &impl Fixture) {
    let store = fixture.store();
    let ids: Vec<SecretId> = (0..45).map(|n| fixture.id(&format!("item-{n:02}"))).collect();
    let missing = |n: usize| n % 3 == 2;
    let deleted = |n: usize| n.is_multiple_of(7);
    for (n, id) in ids.iter().enumerate().filter(|(n, _)| !missing(*n)) {
        store.put(id, put(1, &format!("old {n}"))).await.unwrap();
        store.put(id, put(2, &format!("value {n}"))).await.unwrap();
        if deleted(n) {
            store.delete(id, RecoveryWindow::DEFAULT).await.unwrap();
        }
    }
    let by = |n: usize| match n % 5 {
        3 => (Selector::Version(version(1)), "old"),
        4 => (Selector::Label(Label::Previous), "old"),
        _ => (Selector::CURRENT, "value"),
    };
    let asked: Vec<usize> = (0..43).chain([1, 1]).collect();
    let items: Vec<_> = asked.iter().map(|n| (ids[*n].clone(), by(*n).0)).collect();
    for freshness in [Freshness::Refresh, Freshness::Cached] {
        let answers = store.batch_get(&items, freshness).await;
        assert_eq!(answers.len(), 45);
        for (n, answer) in asked.iter().copied().zip(answers) {
            let expected = format!("{} {n}", by(n).1);
            match answer {
                Ok(found) => {
                    assert!(!missing(n) && !deleted(n), "item {n}");
                    assert!(found.value.same_as(&text(&expected)), "item {n}");
                }
                Err(StoreError::SecretNotFound(id)) => assert!(missing(n) && id == ids[n], "item {n}"),
                Err(StoreError::SecretDeleted(id)) => {
                    assert!(!missing(n) && deleted(n) && id == ids[n], "item {n}")
                }
                Err(error) => panic!("item {n}: {error}"),
            }
        }
    }
    assert!(store.batch_get(&[], Freshness::Cached).await.is_empty());
    let unknown = [(ids[1].clone(), Selector::Label(label("stable")))];
    let answer = store.batch_get(&unknown, Freshness::Cached).await.remove(0);
    assert_eq!(answer.unwrap_err().reason(), Reason::VersionNotFound);
}

async fn order_grows_with_every_change<F: Fixture>(fixture: &F) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    let created = store.put(&id, put(1, "one")).await.unwrap().order;
    if !F::ORDERS {
        assert_eq!(created, Order::Unknown);
        assert_eq!(get(&store, &id, &Selector::CURRENT).await.unwrap().order, Order::Unknown);
        return;
    }
    let mut orders = vec![created];
    orders.push(store.put(&id, put(2, "two")).await.unwrap().order);
    orders.push(store.move_label(&id, &to(Label::Current, Some(2), Some(1))).await.unwrap().order);
    orders.push(store.move_label(&id, &to(label("stable"), None, Some(1))).await.unwrap().order);
    store.delete(&id, RecoveryWindow::DEFAULT).await.unwrap();
    orders.push(store.describe(&id).await.unwrap().order);
    store.restore(&id).await.unwrap();
    orders.push(get(&store, &id, &Selector::CURRENT).await.unwrap().order);
    orders.push(store.put(&id, put(3, "three")).await.unwrap().order);
    assert!(orders.is_sorted_by(|older, newer| older.is_older_than(*newer)), "{orders:?}");

    let last = orders.last().copied().unwrap();
    store.put(&fixture.id("other"), put(1, "one")).await.unwrap();
    let retry = store.put(&id, put(3, "three")).await.unwrap();
    assert_eq!((retry.changed, retry.order), (false, last), "what did not change stands where it stood");
    assert_eq!(get(&store, &id, &Selector::Version(version(2))).await.unwrap().order, last);
    assert_eq!(store.describe(&id).await.unwrap().order, last);
}

async fn a_refresh_asks_the_store(fixture: &impl Fixture) {
    let (store, id) = (fixture.store(), fixture.id("database"));
    store.put(&id, put(1, "one")).await.unwrap();
    for _ in 0..2 {
        let found = store.get(&id, &Selector::CURRENT, Freshness::Refresh).await.unwrap();
        assert_eq!((found.source, found.stale), (Source::Store, false));
        get(&store, &id, &Selector::CURRENT).await.unwrap();
    }
}

fn version(n: u32) -> VersionId {
    VersionId::parse(&format!("{n:032}")).unwrap()
}

fn label(text: &str) -> Label {
    Label::parse(text).unwrap()
}

fn text(text: &str) -> SecretValue {
    SecretValue::text(text.to_owned()).unwrap()
}

fn binary(bytes: Vec<u8>) -> SecretValue {
    SecretValue::new(bytes, ContentType::Binary).unwrap()
}

/// A version to become current, without expectations.
fn put(token: u32, value: &str) -> Put {
    Put { value: text(value), token: version(token), labels: Vec::new(), expected: None }
}

/// Version 1 is current, and version 2 claims to be next.
async fn one_current_and_one_pending(store: &Arc<dyn Store>, id: &SecretId) {
    store.put(id, put(1, "one")).await.unwrap();
    store.put(id, Put { labels: vec![Label::Pending], ..put(2, "two") }).await.unwrap();
}

fn to(label: Label, from: Option<u32>, to: Option<u32>) -> LabelMove {
    LabelMove { label, from: from.map(version), to: to.map(version) }
}

async fn get(store: &Arc<dyn Store>, id: &SecretId, selector: &Selector) -> Result<Fetched, StoreError> {
    store.get(id, selector, Freshness::Cached).await
}

async fn current(store: &Arc<dyn Store>, id: &SecretId) -> VersionId {
    get(store, id, &Selector::CURRENT).await.unwrap().version.id
}

/// Which version carries each label. A label on two versions is a failure.
async fn labels(store: &Arc<dyn Store>, id: &SecretId) -> BTreeMap<Label, VersionId> {
    let mut found = BTreeMap::new();
    for version in store.describe(id).await.unwrap().versions {
        for label in version.labels {
            let other = found.insert(label.clone(), version.id.clone());
            assert_eq!(other, None, "{label} is on two versions");
        }
    }
    found
}

/// All pages of a list, sorted; each page checked against the request.
async fn list<F: Fixture>(fixture: &F, request: &ListRequest) -> Vec<String> {
    let (store, mut request, mut names) = (fixture.store(), request.clone(), Vec::new());
    loop {
        let page = store.list(fixture.environment(), &request).await.unwrap();
        assert!(page.secrets.len() <= request.limit);
        for listed in page.secrets {
            assert_eq!(listed.deletion_at.is_some(), listed.name.as_str() == "deleted");
            names.push(listed.name.to_string());
        }
        request.page_token = page.next_page_token;
        if request.page_token.is_none() {
            break;
        }
    }
    if F::ORDERS {
        assert!(names.is_sorted(), "{names:?}");
    }
    names.sort();
    names
}

/// Of many who expected the same, the one whose change was made; the others were told of a conflict.
fn the_only_one_to_win(outcomes: impl Iterator<Item = Result<Written, StoreError>>) -> Written {
    let (won, lost): (Vec<_>, Vec<_>) = outcomes.partition(Result::is_ok);
    for error in lost.into_iter().filter_map(Result::err) {
        assert_eq!(error.reason(), Reason::Conflict, "{error}");
    }
    let mut won: Vec<_> = won.into_iter().filter_map(Result::ok).collect();
    assert_eq!(won.len(), 1);
    won.remove(0)
}

struct SealedStore {
    store: Arc<dyn Store>,
    clock: Arc<ManualClock>,
    environment: EnvironmentName,
    _folder: TempDir,
}

impl Fixture for SealedStore {
    const ORDERS: bool = true;
    const COMPARES_ON_PUT: bool = true;
    const PROMOTES_AT_ONCE: bool = true;

    async fn new() -> Self {
        let (folder, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::new("2026-01-01T00:00:00Z".parse().unwrap()));
        let kv = Embedded::open(&folder.path().join("kv.db"), clock.clone()).await.unwrap();
        let ring = Arc::new(KeyRing::of(RootKey::generate().unwrap()));
        let store = Sealed::open(Arc::new(kv), ring, clock.clone()).await.unwrap();
        let environment = EnvironmentName::parse("production").unwrap();
        Self { store: Arc::new(store), clock, environment, _folder: folder }
    }

    fn store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store)
    }

    fn environment(&self) -> &EnvironmentName {
        &self.environment
    }

    fn clock(&self) -> SharedClock {
        self.clock.clone()
    }

    fn advance(&self, by: Duration) -> bool {
        self.clock.advance(by);
        true
    }
}

/// AWS Secrets Manager, as moto plays it. All tests share one server; each has an environment of its own.
struct AwsStore {
    store: Arc<dyn Store>,
    environment: EnvironmentName,
}

impl Fixture for AwsStore {
    const ORDERS: bool = false;
    const COMPARES_ON_PUT: bool = false;
    const PROMOTES_AT_ONCE: bool = false;

    async fn new() -> Self {
        let environment = fresh_environment();
        let store = Moto::start().await.store(&environment, SystemClock::shared()).await;
        Self { store, environment }
    }

    fn store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store)
    }

    fn environment(&self) -> &EnvironmentName {
        &self.environment
    }

    fn clock(&self) -> SharedClock {
        SystemClock::shared()
    }

    fn advance(&self, _: Duration) -> bool {
        false
    }
}

/// The cache around another store, as the broker wraps it.
struct Cached<F> {
    below: F,
    cache: Cache,
}

impl<F: Fixture> Fixture for Cached<F> {
    const ORDERS: bool = F::ORDERS;
    const COMPARES_ON_PUT: bool = F::COMPARES_ON_PUT;
    const PROMOTES_AT_ONCE: bool = F::PROMOTES_AT_ONCE;

    async fn new() -> Self {
        let settings = cache::Settings {
            ttl: Duration::from_secs(300),
            negative_ttl: Duration::from_secs(5),
            stale_for: Duration::from_secs(3_600),
            capacity_bytes: 16 * 1024 * 1024,
            answer_within: claviger::cache::Settings::ANSWER_WITHIN,
            uncached: Vec::new(),
        };
        let below = F::new().await;
        let cache = Cache::new(below.store(), settings, below.clock());
        Self { below, cache }
    }

    fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.cache.clone())
    }

    fn environment(&self) -> &EnvironmentName {
        self.below.environment()
    }

    fn clock(&self) -> SharedClock {
        self.below.clock()
    }

    fn advance(&self, by: Duration) -> bool {
        self.below.advance(by)
    }
}
