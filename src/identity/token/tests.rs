//! The tokens as a whole.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::join_all;

use super::record::key;
use super::table::ROOT;
use super::*;
use crate::clock::{Clock as _, ManualClock};
use crate::crypto::{MAC_BYTES, RootKey};
use crate::identity::PrincipalKind;
use crate::kv::embedded::Embedded;
use crate::kv::{Transaction, Write};
use crate::secret::EnvironmentName;

struct Machine {
    kv: Arc<Embedded>,
    key: Arc<MacKey>,
    clock: Arc<ManualClock>,
    _folder: tempfile::TempDir,
}

impl Machine {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = ManualClock::new("2026-03-01T12:00:00Z".parse().unwrap());
        let kv = Embedded::open(&folder.path().join("kv.db"), clock.clone()).await.unwrap();
        let key = MacKey::create(&RootKey::generate().unwrap(), &[b"test"]).unwrap().0;
        Self { kv: Arc::new(kv), key: Arc::new(key), clock, _folder: folder }
    }

    async fn start(&self) -> Result<Tokens, TokenError> {
        Tokens::open(self.kv.clone(), self.key.clone(), self.clock.clone()).await
    }

    /// The message with which a start is refused.
    async fn refused(&self) -> String {
        let error = self.start().await.unwrap_err();
        assert_eq!(error.reason(), Reason::Tampered, "{error}");
        error.to_string()
    }

    async fn stored(&self, key: &[u8]) -> Vec<u8> {
        self.kv.get(key).await.unwrap().unwrap().value
    }

    async fn overwrite(&self, key: &[u8], value: Option<&[u8]>) {
        let write = match value {
            Some(value) => Write::put(key, value),
            None => Write::delete(key),
        };
        self.kv.commit(Transaction { compare: Vec::new(), write: vec![write] }).await.unwrap();
    }
}

fn request(minutes: u64) -> TokenRequest {
    TokenRequest {
        kind: PrincipalKind::Workload,
        principal: "orders".to_owned(),
        groups: ["services".to_owned()].into(),
        claims: BTreeMap::new(),
        expires_in: Duration::from_secs(60 * minutes),
        environments: [].into(),
        source_addresses: Vec::new(),
        created_by: "test".to_owned(),
    }
}

async fn create(tokens: &Tokens) -> TokenRecord {
    tokens.create(request(10)).await.unwrap().0
}

async fn recognised(tokens: &Tokens, secret: &SecretValue) -> Arc<Principal> {
    used(tokens, secret, SourceAddress::Internal).await.unwrap()
}

/// Whom a token stands for that is used from `source`.
async fn used(
    tokens: &Tokens,
    secret: &SecretValue,
    source: SourceAddress,
) -> Result<Arc<Principal>, IdentityError> {
    let presented = Presented { bearer: Some(secret.clone()), source, ..Presented::default() };
    tokens.authenticate(&presented).await.map(Option::unwrap)
}

fn tcp(address: &str) -> SourceAddress {
    SourceAddress::Tcp(address.parse().unwrap())
}

const UNIX: SourceAddress = SourceAddress::Unix { pid: Some(1) };
const DAY: Duration = Duration::from_secs(86_400);

/// When and from where each token was last used.
fn uses(tokens: &Tokens) -> Vec<Option<(i64, String)>> {
    let use_of = |shown: Shown| shown.last_used.map(|used| (used.at.as_second(), used.from));
    tokens.list().into_iter().map(use_of).collect()
}

#[tokio::test]
async fn the_generation_grows_with_every_change_and_is_read_back() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    assert_eq!(tokens.generation(), 0);
    let one = create(&tokens).await;
    create(&tokens).await;
    assert_eq!(tokens.generation(), 2);
    let revoked = tokens.revoke(&one.id).await.unwrap();
    assert_eq!(tokens.generation(), 3);
    machine.clock.advance(Duration::from_secs(1));
    assert_eq!(tokens.revoke(&one.id).await.unwrap(), revoked);
    assert_eq!(tokens.generation(), 3, "nothing was changed");

    let again = machine.start().await.unwrap();
    assert_eq!((again.generation(), again.list()), (3, tokens.list()));
    create(&again).await;
    assert_eq!(machine.start().await.unwrap().generation(), 4);
}

#[tokio::test]
async fn a_token_that_the_broker_did_not_write_is_refused() {
    let machine = Machine::new().await;
    let own = create(&machine.start().await.unwrap()).await;
    let elsewhere = Machine::new().await;
    let foreign = create(&elsewhere.start().await.unwrap()).await;
    let place = key(&foreign.id);
    let json = serde_json::to_vec(&foreign).unwrap();
    let copies = [elsewhere.stored(&place).await, machine.stored(&key(&own.id)).await, json, Vec::new()];
    for (number, bytes) in copies.iter().enumerate() {
        machine.overwrite(&place, Some(bytes)).await;
        let message = machine.refused().await;
        assert!(message.contains(&format!("token/{}", foreign.id)), "{number}: {message}");
    }
    machine.overwrite(&place, None).await;
    assert_eq!(machine.start().await.unwrap().list(), [Shown { record: own, last_used: None }]);
}

#[tokio::test]
async fn another_key_opens_nothing() {
    let mut machine = Machine::new().await;
    create(&machine.start().await.unwrap()).await;
    machine.key = Machine::new().await.key;
    machine.refused().await;
}

#[tokio::test]
async fn a_changed_record_is_refused() {
    let machine = Machine::new().await;
    let place = key(&create(&machine.start().await.unwrap()).await.id);
    let stored = machine.stored(&place).await;
    for position in [0, MAC_BYTES - 1, MAC_BYTES, stored.len() - 1] {
        let mut changed = stored.clone();
        changed[position] ^= 1;
        machine.overwrite(&place, Some(&changed)).await;
        assert!(machine.refused().await.contains("fails authentication"), "byte {position}");
    }
    machine.overwrite(&place, Some(&stored)).await;
    machine.start().await.unwrap();
}

#[tokio::test]
async fn a_revoked_token_does_not_come_back_with_its_old_record() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let token = create(&tokens).await;
    let past = machine.stored(&key(&token.id)).await;
    tokens.revoke(&token.id).await.unwrap();
    machine.overwrite(&key(&token.id), Some(&past)).await;
    assert!(machine.refused().await.contains("not those of their root"));
}

#[tokio::test]
async fn a_removed_token_is_missed() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let [one, two] = [create(&tokens).await, create(&tokens).await];
    machine.overwrite(&key(&one.id), None).await;
    assert!(machine.refused().await.contains("the 1 stored tokens are not"));
    machine.overwrite(&key(&two.id), None).await;
    machine.refused().await;
}

#[tokio::test]
async fn two_tokens_do_not_change_places() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let [one, two] = [key(&create(&tokens).await.id), key(&create(&tokens).await.id)];
    let (first, second) = (machine.stored(&one).await, machine.stored(&two).await);
    machine.overwrite(&one, Some(&second)).await;
    machine.overwrite(&two, Some(&first)).await;
    assert!(machine.refused().await.contains("fails authentication"));
}

#[tokio::test]
async fn the_root_is_neither_removed_nor_changed_nor_an_older_one() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let token = create(&tokens).await;
    let past = machine.stored(ROOT).await;
    tokens.revoke(&token.id).await.unwrap();
    let present = machine.stored(ROOT).await;
    assert_eq!(present.len(), 72);

    machine.overwrite(ROOT, None).await;
    assert!(machine.refused().await.contains("root of the tokens is missing"));
    machine.overwrite(ROOT, Some(&past)).await;
    assert!(machine.refused().await.contains("not those of their root"));
    for position in [0, 39, 40, 71] {
        let mut changed = present.clone();
        changed[position] ^= 1;
        machine.overwrite(ROOT, Some(&changed)).await;
        assert!(machine.refused().await.contains("root of the tokens fails authentication"));
    }
    machine.overwrite(ROOT, Some(&present[..71])).await;
    machine.refused().await;
    machine.overwrite(ROOT, Some(&present)).await;
    assert_eq!(machine.start().await.unwrap().generation(), 2);
}

/// Nothing in the database says that it is the newest: this is what the generation is kept elsewhere for.
#[tokio::test]
async fn all_tokens_from_the_past_show_by_their_generation() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let token = create(&tokens).await;
    let past = [machine.stored(&key(&token.id)).await, machine.stored(ROOT).await];
    tokens.revoke(&token.id).await.unwrap();
    machine.overwrite(&key(&token.id), Some(&past[0])).await;
    machine.overwrite(ROOT, Some(&past[1])).await;
    assert!(machine.start().await.unwrap().generation() < tokens.generation());
}

#[tokio::test]
async fn a_change_under_a_running_broker_is_neither_served_nor_taken_over() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let (token, secret) = tokens.create(request(10)).await.unwrap();
    let past = machine.stored(&key(&token.id)).await;
    let foreign = Machine::new().await;
    let foreign = foreign.stored(&key(&create(&foreign.start().await.unwrap()).await.id)).await;
    machine.overwrite(&key("0123456789abcdef"), Some(&foreign)).await;
    create(&tokens).await;
    machine.refused().await;
    machine.overwrite(&key("0123456789abcdef"), None).await;
    machine.start().await.unwrap();

    machine.overwrite(&key(&token.id), Some(&past)).await;
    assert_eq!(tokens.revoke(&token.id).await.unwrap_err().reason(), Reason::Tampered);
    recognised(&tokens, &secret).await;
    machine.overwrite(ROOT, None).await;
    assert_eq!(tokens.create(request(10)).await.unwrap_err().reason(), Reason::Tampered);
    assert_eq!((tokens.generation(), tokens.list().len()), (2, 2));
}

#[tokio::test]
async fn changes_at_once_all_count() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let records = join_all((0..6).map(|_| create(&tokens))).await;
    let revoked = join_all([0, 0, 1, 1].map(|number: usize| tokens.revoke(&records[number].id))).await;
    assert!(revoked.iter().all(Result::is_ok));
    assert_eq!((tokens.generation(), tokens.list().len()), (8, 6));
    let again = machine.start().await.unwrap();
    assert_eq!((again.generation(), again.list()), (8, tokens.list()));
}

#[tokio::test]
async fn a_revocation_goes_through_when_its_caller_has_gone() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let token = create(&tokens).await;
    assert!(tokens.revoke(&token.id).now_or_never().is_none(), "it waits for the disk");
    // The next change stands behind it in the queue of writers.
    create(&tokens).await;
    let revoked =
        |tokens: &Tokens| tokens.list().iter().filter(|one| one.record.revoked_at.is_some()).count();
    assert_eq!((tokens.generation(), revoked(&tokens)), (3, 1));
    assert_eq!(revoked(&machine.start().await.unwrap()), 1);
}

#[tokio::test]
async fn a_proof_lives_as_long_as_its_token() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let (revoked, secret) = tokens.create(request(10)).await.unwrap();
    let one = recognised(&tokens, &secret).await;
    let (_, secret) = tokens.create(request(20)).await.unwrap();
    let two = recognised(&tokens, &secret).await;
    assert!(tokens.is_live(&one) && tokens.is_live(&two));
    tokens.revoke(&revoked.id).await.unwrap();
    assert!(!tokens.is_live(&one) && tokens.is_live(&two));
    machine.clock.advance(Duration::from_secs(20 * 60 - 1));
    assert!(tokens.is_live(&two));
    machine.clock.advance(Duration::from_secs(1));
    assert!(!tokens.is_live(&two));

    let elsewhere = Machine::new().await.start().await.unwrap();
    assert!(!elsewhere.is_live(&two), "not a token of that broker");
    assert!(tokens.is_live(&Principal::internal("rotation", [])));
}

#[tokio::test]
async fn a_token_is_good_from_its_addresses_alone() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let ranges = ["10.0.0.0/8", "unix"].map(|text| SourceRange::parse(text).unwrap());
    let limited = TokenRequest { source_addresses: ranges.to_vec(), ..request(10) };
    let (record, secret) = tokens.create(limited).await.unwrap();
    for tokens in [&tokens, &machine.start().await.unwrap()] {
        for good in [tcp("10.1.2.3:4"), tcp("[::ffff:10.1.2.3]:4"), UNIX] {
            used(tokens, &secret, good).await.unwrap();
        }
        for bad in [tcp("11.0.0.1:4"), tcp("[2001:db8::1]:4"), SourceAddress::Internal] {
            let error = used(tokens, &secret, bad).await.unwrap_err();
            assert_eq!(error.reason(), Reason::Unauthenticated);
            assert!(error.to_string().contains("not good for this address"), "{error}");
        }
    }
    // Only who has the secret learns that it is the address.
    let forged = SecretValue::text(format!("clv_{}_{}", record.id, "A".repeat(43))).unwrap();
    let error = used(&tokens, &forged, tcp("11.0.0.1:4")).await.unwrap_err();
    assert!(error.to_string().contains("did not issue it"), "{error}");
}

#[tokio::test]
async fn a_token_reaches_its_environments_alone() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let name = |text: &str| EnvironmentName::parse(text).unwrap();
    let limited = TokenRequest { environments: [name("staging")].into(), ..request(10) };
    let (_, secret) = tokens.create(limited).await.unwrap();
    let (_, unlimited) = tokens.create(request(10)).await.unwrap();
    for tokens in [&tokens, &machine.start().await.unwrap()] {
        let principal = recognised(tokens, &secret).await;
        let reached = [Some(name("staging")), Some(name("production")), None]
            .map(|environment| principal.reaches(environment.as_ref()));
        assert_eq!(reached, [true, false, false]);
        let principal = recognised(tokens, &unlimited).await;
        assert!(principal.reaches(None) && principal.reaches(Some(&name("production"))));
    }
}

#[tokio::test]
async fn limits_have_bounds() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let environments =
        |number| (0..number).map(|n| EnvironmentName::parse(&format!("e{n}")).unwrap()).collect();
    let ranges = |number| vec![SourceRange::Unix; number];
    let most = TokenRequest { environments: environments(64), source_addresses: ranges(64), ..request(10) };
    tokens.create(most.clone()).await.unwrap();
    for (field, request) in [
        ("environments", TokenRequest { environments: environments(65), ..most.clone() }),
        ("source_addresses", TokenRequest { source_addresses: ranges(65), ..most.clone() }),
    ] {
        let error = tokens.create(request).await.unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidArgument);
        assert!(error.to_string().starts_with(field), "{error}");
    }
}

#[tokio::test]
async fn a_record_from_before_there_were_limits_is_read_as_it_is() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let (record, secret) = tokens.create(request(10)).await.unwrap();
    let stored = machine.stored(&key(&record.id)).await;
    let json = String::from_utf8(stored[MAC_BYTES..].to_vec()).unwrap();
    let order = [
        "id",
        "hash",
        "kind",
        "principal",
        "groups",
        "claims",
        "created_at",
        "expires_at",
        "revoked_at",
        "created_by",
    ];
    let members: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&json).unwrap();
    assert_eq!(members.len(), order.len(), "a token without limits is stored as ever: {json}");
    let places: Vec<_> = order.iter().map(|member| json.find(&format!("\"{member}\":")).unwrap()).collect();
    assert!(places.is_sorted(), "{json}");
    let again = machine.start().await.unwrap();
    let principal = used(&again, &secret, tcp("192.0.2.1:1")).await.unwrap();
    assert!(principal.reaches(None));
}

/// A limit that this program does not know must not be taken for none.
#[tokio::test]
async fn a_record_with_an_unknown_member_is_refused() {
    let machine = Machine::new().await;
    let record = create(&machine.start().await.unwrap()).await;
    let mut json = serde_json::to_value(&record).unwrap();
    json["only_on_sundays"] = true.into();
    let json = serde_json::to_vec(&json).unwrap();
    let mac = machine.key.sign(&[b"claviger token v1", record.id.as_bytes(), &json]);
    machine.overwrite(&key(&record.id), Some(&[mac.as_slice(), &json].concat())).await;
    let error = machine.start().await.unwrap_err();
    assert!(error.to_string().contains("only_on_sundays"), "{error}");
}

#[tokio::test]
async fn the_last_use_is_shown_and_kept() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let (record, secret) = tokens.create(request(10)).await.unwrap();
    assert_eq!(uses(&tokens), [None]);
    let first = machine.clock.now().as_second();
    used(&tokens, &secret, tcp("192.0.2.1:1")).await.unwrap();
    used(&tokens, &secret, tcp("192.0.2.2:1")).await.unwrap();
    assert_eq!(uses(&tokens), [Some((first, "192.0.2.1".to_owned()))], "one use in a minute is noted");
    assert_eq!(uses(&machine.start().await.unwrap()), [None], "not kept yet");
    tokens.keep_last_use().await.unwrap();
    assert_eq!(uses(&machine.start().await.unwrap()), uses(&tokens));
    let before = machine.kv.last_revision();
    tokens.keep_last_use().await.unwrap();
    assert_eq!(machine.kv.last_revision(), before, "what is kept is not written again");

    machine.clock.advance(Duration::from_secs(60));
    let again = machine.start().await.unwrap();
    used(&again, &secret, UNIX).await.unwrap();
    again.keep_last_use().await.unwrap();
    let present = [Some((first + 60, "unix".to_owned()))];
    assert_eq!(uses(&machine.start().await.unwrap()), present);
    // A revocation keeps it; and a use is no change of a token.
    again.revoke(&record.id).await.unwrap();
    assert_eq!((uses(&again), again.generation()), (present.to_vec(), 2));
    used(&again, &secret, UNIX).await.unwrap_err();
    assert_eq!(uses(&machine.start().await.unwrap()), present);
}

#[tokio::test]
async fn a_refused_use_is_no_use() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let limited = TokenRequest { source_addresses: vec![SourceRange::Unix], ..request(10) };
    let (record, secret) = tokens.create(limited).await.unwrap();
    used(&tokens, &secret, tcp("192.0.2.1:1")).await.unwrap_err();
    let forged = SecretValue::text(format!("clv_{}_{}", record.id, "A".repeat(43))).unwrap();
    used(&tokens, &forged, UNIX).await.unwrap_err();
    assert_eq!(uses(&tokens), [None]);
}

#[tokio::test]
async fn a_note_of_a_use_that_the_broker_did_not_write_is_not_believed() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let mut places = Vec::new();
    for _ in 0..2 {
        let (record, secret) = tokens.create(request(10)).await.unwrap();
        used(&tokens, &secret, UNIX).await.unwrap();
        places.push(last_use::key(&record.id));
        machine.clock.advance(Duration::from_secs(60));
    }
    tokens.keep_last_use().await.unwrap();
    let (one, two) = (machine.stored(&places[0]).await, machine.stored(&places[1]).await);
    let mut changed = one.clone();
    *changed.last_mut().unwrap() ^= 1;
    for forged in [&two[..], &changed[..], &one[MAC_BYTES..], &[], &one[..7]] {
        machine.overwrite(&places[0], Some(forged)).await;
        let again = machine.start().await.unwrap();
        let believed = uses(&again).into_iter().flatten().count();
        assert_eq!((believed, again.list().len()), (1, 2), "{forged:?}");
    }
    machine.overwrite(&last_use::key("0123456789abcdef"), Some(&one)).await;
    machine.overwrite(&places[0], Some(&one)).await;
    assert_eq!(uses(&machine.start().await.unwrap()), uses(&tokens));
}

#[tokio::test]
async fn more_uses_than_one_transaction_takes_are_all_kept() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    for _ in 0..65 {
        let (_, secret) = tokens.create(request(10)).await.unwrap();
        used(&tokens, &secret, UNIX).await.unwrap();
    }
    let before = machine.kv.last_revision();
    tokens.keep_last_use().await.unwrap();
    assert_eq!(machine.kv.last_revision(), before + 2);
    assert!(uses(&machine.start().await.unwrap()).iter().all(Option::is_some));
}

#[tokio::test]
async fn what_ended_long_ago_is_removed_with_all_that_is_known_of_it() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let (expired, secret) = tokens.create(request(60 * 24)).await.unwrap();
    used(&tokens, &secret, UNIX).await.unwrap();
    tokens.keep_last_use().await.unwrap();
    let (revoked, _) = tokens.create(request(60 * 24 * 300)).await.unwrap();
    tokens.revoke(&revoked.id).await.unwrap();
    let (live, secret) = tokens.create(request(60 * 24 * 300)).await.unwrap();
    let ids = |records: Vec<TokenRecord>| records.into_iter().map(|record| record.id).collect::<Vec<_>>();
    let all = || [&expired.id, &revoked.id, &live.id].map(Clone::clone).to_vec();

    machine.clock.advance(30 * DAY - Duration::from_secs(1));
    assert_eq!(ids(tokens.gone()), [""; 0]);
    assert_eq!(tokens.prune(all()).await.unwrap(), [""; 0]);
    machine.clock.advance(Duration::from_secs(1));
    assert_eq!(ids(tokens.gone()), [revoked.id.as_str()]);
    machine.clock.advance(DAY);
    assert_eq!(tokens.gone().len(), 2);
    let generation = tokens.generation();
    assert_eq!(tokens.prune(all()).await.unwrap(), [expired.id.clone(), revoked.id.clone()]);
    assert_eq!((tokens.generation(), tokens.gone()), (generation + 1, Vec::new()));
    assert_eq!(tokens.revoke(&expired.id).await.unwrap_err().reason(), Reason::TokenNotFound);
    assert!(machine.kv.get(&last_use::key(&expired.id)).await.unwrap().is_none());

    let again = machine.start().await.unwrap();
    assert_eq!((again.generation(), again.list()), (tokens.generation(), tokens.list()));
    assert_eq!(ids(again.list().into_iter().map(|shown| shown.record).collect()), [live.id.as_str()]);
    recognised(&again, &secret).await;
    assert_eq!(again.prune(all()).await.unwrap(), [""; 0]);
}

#[tokio::test]
async fn a_removed_record_does_not_come_back() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let token = create(&tokens).await;
    let past = machine.stored(&key(&token.id)).await;
    machine.clock.advance(31 * DAY);
    assert_eq!(tokens.prune(vec![token.id.clone()]).await.unwrap(), [token.id.as_str()]);
    assert!(machine.start().await.unwrap().list().is_empty());
    machine.overwrite(&key(&token.id), Some(&past)).await;
    assert!(machine.refused().await.contains("not those of their root"));
}

#[tokio::test]
async fn nothing_is_removed_where_something_else_changed_the_tokens() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    let token = create(&tokens).await;
    machine.clock.advance(31 * DAY);
    let stored = machine.stored(&key(&token.id)).await;
    machine.overwrite(&key(&token.id), Some(&stored)).await;
    let error = tokens.prune(vec![token.id.clone()]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Tampered);
    assert_eq!((tokens.list().len(), tokens.generation()), (1, 1));
    machine.start().await.unwrap();
}

#[tokio::test]
async fn many_are_removed_some_at_a_time() {
    let machine = Machine::new().await;
    let tokens = machine.start().await.unwrap();
    join_all((0..33).map(|_| create(&tokens))).await;
    machine.clock.advance(31 * DAY);
    let mut removed = Vec::new();
    loop {
        let gone: Vec<_> = tokens.gone().into_iter().map(|record| record.id).collect();
        if gone.is_empty() {
            break;
        }
        removed.push(tokens.prune(gone).await.unwrap().len());
    }
    assert_eq!(removed, [32, 1]);
    assert!(machine.start().await.unwrap().list().is_empty());
}
