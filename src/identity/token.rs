//! Tokens that the broker issues itself.
//!
//! ```text
//! clv_<id: 16 hex digits>_<secret: 43 characters of base64url, 256 random bits>
//!
//! kv  token/<id>  →  offset  bytes
//!                         0     32  MAC of the id and the JSON
//!                        32      …  JSON: SHA-256 of the secret, whom it stands for, created, expires, revoked
//!
//! kv  token-root  →       0     32  MAC of the rest
//!                        32      8  generation: grows by one with every change of a token   (big-endian)
//!                        40     32  SHA-256 of id ‖ MAC of every record, in the order of the ids
//! ```
//!
//! A token is shown once. A fast hash is right here: the secret has 256 bits, so there is nothing to guess (a slow
//! hash protects short passwords). Hashes are compared in constant time. Revocation takes effect with the next
//! request: the table in memory is what requests ask, and it changes before the revocation is answered.
//!
//! Whoever can write the database can't make a token, change one or bring one back: each record is authentic by
//! itself, and the root says which records there are. What the root can't say is that it is the newest one. Who puts
//! back all records together with their root, or removes them all, is found by whoever keeps the
//! [`generation`](Tokens::generation) elsewhere.
//!
//! INVARIANT: a transaction that changes a record changes the root, and compares both first. The new root is made
//! from the table in memory, never from what lies in the database, so no foreign record gets into it. That takes time
//! in proportion to all tokens, which are few (they stand for people and programs) and seldom change.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use jiff::Timestamp;
use ring::digest;
use ring::rand::{SecureRandom as _, SystemRandom};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq as _;
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use super::{Authenticator, IdentityError, Presented, Principal, PrincipalKind, Proof, is_word};
use crate::clock::SharedClock;
use crate::crypto::{MAC_BYTES, Mac, MacKey};
use crate::error::{Reason, Reasoned};
use crate::kv::{Compare, Entry, Kv, KvError, Revision, Transaction, Write};
use crate::secret::SecretValue;

const PREFIX: &[u8] = b"token/";
const ROOT: &[u8] = b"token-root";
const RECORD_LABEL: &[u8] = b"claviger token v1";
const ROOT_LABEL: &[u8] = b"claviger token root v1";
/// The method of proof of those who present a token.
const METHOD: &str = "token";
const SHORTEST: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(400 * 86_400);
const MAX_GROUPS: usize = 64;

/// What is known of a token; never its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// Its public id.
    pub id: String,
    /// SHA-256 of the secret, in hex.
    hash: String,
    /// A person or a program.
    pub kind: PrincipalKind,
    /// The principal's id.
    pub principal: String,
    /// The principal's groups.
    pub groups: BTreeSet<String>,
    /// The principal's claims.
    pub claims: BTreeMap<String, String>,
    /// When it was issued.
    pub created_at: Timestamp,
    /// When it ends by itself.
    pub expires_at: Timestamp,
    /// When it was revoked, if it was.
    pub revoked_at: Option<Timestamp>,
    /// Who issued it.
    pub created_by: String,
}

/// Whom a new token stands for, and for how long.
#[derive(Debug, Clone)]
pub struct TokenRequest {
    /// A person or a program.
    pub kind: PrincipalKind,
    /// The principal's id, 1–128 printable ASCII characters without spaces.
    pub principal: String,
    /// At most 64 groups of the same grammar.
    pub groups: BTreeSet<String>,
    /// At most 64 claims.
    pub claims: BTreeMap<String, String>,
    /// 1 minute to 400 days.
    pub expires_in: Duration,
    /// Who asks.
    pub created_by: String,
}

/// Why a token was not issued, listed or revoked.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The request is not one that can be granted.
    #[error("{field}: {problem}")]
    Invalid {
        /// What is wrong.
        field: &'static str,
        /// And the mend.
        problem: String,
    },
    /// No such token.
    #[error("no token `{0}`; `claviger token list` shows the ids")]
    NotFound(String),
    /// The tokens in the database are not those that the broker wrote there, or were written under another key.
    #[error("{what}: something other than this broker changed the tokens, or their key is another; {mend}")]
    Tampered {
        /// Which token, or what about all of them.
        what: String,
        /// What to do about it.
        mend: &'static str,
    },
    /// The layer below.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// A record that can't be read, or randomness that can't be had.
    #[error("{0}")]
    Internal(String),
}

impl Reasoned for TokenError {
    fn reason(&self) -> Reason {
        match self {
            Self::Invalid { .. } => Reason::InvalidArgument,
            Self::NotFound(_) => Reason::TokenNotFound,
            Self::Tampered { .. } => Reason::Tampered,
            Self::Kv(error) => error.reason(),
            Self::Internal(_) => Reason::Internal,
        }
    }
}

/// The tokens of this broker.
pub struct Tokens {
    table: Arc<Table>,
    clock: SharedClock,
}

impl Tokens {
    /// Reads the tokens from `kv` and checks that they are what was written there under `key`. Nobody else may write
    /// them meanwhile.
    ///
    /// # Errors
    /// [`TokenError::Tampered`] where a record or the root is not authentic, or they don't fit each other;
    /// [`TokenError::Kv`] and [`TokenError::Internal`] where they can't be read.
    pub async fn open(kv: Arc<dyn Kv>, key: Arc<MacKey>, clock: SharedClock) -> Result<Self, TokenError> {
        let state = ArcSwap::from_pointee(State::read(kv.as_ref(), &key).await?);
        Ok(Self { table: Arc::new(Table { kv, key, writer: Mutex::new(()), state }), clock })
    }

    /// How many changes the tokens have seen; 0 before the first token. It never falls: where it is less than it was
    /// seen to be, the tokens were brought back from the past.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.table.state.load().generation
    }

    /// Whether the proof of `principal` still holds, for work that outlasts a request: false where it was a token
    /// that is unknown, revoked or expired by now. Other proofs are not judged here: true.
    #[must_use]
    pub fn is_live(&self, principal: &Principal) -> bool {
        let proof = principal.proof();
        let state = self.table.state.load();
        let live = |known: &Arc<Known>| known.ended(self.clock.now()).is_none();
        proof.method != METHOD || state.tokens.get(&proof.detail).is_some_and(live)
    }

    /// Issues a token. The secret half is in the returned value and nowhere else.
    ///
    /// # Errors
    /// [`TokenError::Invalid`], naming the member of the request.
    pub async fn create(&self, request: TokenRequest) -> Result<(TokenRecord, SecretValue), TokenError> {
        check(&request)?;
        let id = HEXLOWER.encode(&*random::<8>()?);
        let secret = random::<32>()?;
        let now = self.clock.now();
        let record = TokenRecord {
            id: id.clone(),
            hash: HEXLOWER.encode(digest::digest(&digest::SHA256, secret.as_slice()).as_ref()),
            kind: request.kind,
            principal: request.principal,
            groups: request.groups,
            claims: request.claims,
            created_at: now,
            expires_at: now.saturating_add(request.expires_in).unwrap_or(Timestamp::MAX),
            revoked_at: None,
            created_by: request.created_by,
        };
        let (table, stored) = (Arc::clone(&self.table), record.clone());
        to_the_end(async move { table.add(stored).await }).await?;
        let encoded = Zeroizing::new(BASE64URL_NOPAD.encode(secret.as_slice()));
        let text = format!("clv_{id}_{}", encoded.as_str());
        let secret = SecretValue::text(text).map_err(|error| TokenError::Internal(error.to_string()))?;
        Ok((record, secret))
    }

    /// Every token, in the order of their ids.
    #[must_use]
    pub fn list(&self) -> Vec<TokenRecord> {
        self.table.state.load().tokens.values().map(|known| known.record.clone()).collect()
    }

    /// Ends a token now. One that was revoked before stays as it was.
    ///
    /// # Errors
    /// [`TokenError::NotFound`]; [`TokenError::Tampered`] where the database is not as this broker left it.
    pub async fn revoke(&self, id: &str) -> Result<TokenRecord, TokenError> {
        let (table, id, now) = (Arc::clone(&self.table), id.to_owned(), self.clock.now());
        to_the_end(async move { table.revoke(&id, now).await }).await
    }

    /// The principal that `token` stands for now. An unknown id and a wrong secret are told apart by nobody.
    fn recognise(&self, token: &str) -> Result<Arc<Principal>, IdentityError> {
        let refuse = |problem| IdentityError::Invalid { method: METHOD, problem };
        let (id, secret) = split(token).ok_or_else(|| refuse("it is not of the form clv_ID_SECRET"))?;
        let given = digest::digest(&digest::SHA256, secret.as_slice());
        let state = self.table.state.load();
        let known = state.tokens.get(id).filter(|known| bool::from(known.hash.ct_eq(given.as_ref())));
        let known = known.ok_or_else(|| refuse("this broker did not issue it"))?;
        match known.ended(self.clock.now()) {
            Some(problem) => Err(refuse(problem)),
            None => Ok(Arc::clone(&known.principal)),
        }
    }
}

#[async_trait]
impl Authenticator for Tokens {
    async fn authenticate(&self, presented: &Presented) -> Result<Option<Arc<Principal>>, IdentityError> {
        let Some(bearer) = &presented.bearer else { return Ok(None) };
        self.recognise(bearer.expose_text().unwrap_or_default()).map(Some)
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("known", &self.table.state.load().tokens.len()).finish_non_exhaustive()
    }
}

/// The tokens in the database and, as requests see them, in memory.
struct Table {
    kv: Arc<dyn Kv>,
    key: Arc<MacKey>,
    /// Held from before a change is made up until it is in memory.
    writer: Mutex<()>,
    state: ArcSwap<State>,
}

impl Table {
    async fn add(&self, record: TokenRecord) -> Result<(), TokenError> {
        let _writing = self.writer.lock().await;
        self.store(record, 0).await
    }

    async fn revoke(&self, id: &str, now: Timestamp) -> Result<TokenRecord, TokenError> {
        let _writing = self.writer.lock().await;
        let known = self.state.load().tokens.get(id).cloned();
        let known = known.ok_or_else(|| TokenError::NotFound(id.escape_default().take(32).collect()))?;
        let mut record = known.record.clone();
        if record.revoked_at.is_none() {
            record.revoked_at = Some(now);
            self.store(record.clone(), known.revision).await?;
        }
        Ok(record)
    }

    /// Writes a record, that of `previous` until now, with the root that fits it, and only then makes it what
    /// requests see. The caller holds the writers' lock.
    async fn store(&self, record: TokenRecord, previous: Revision) -> Result<(), TokenError> {
        let state = self.state.load_full();
        let json = serde_json::to_vec(&record).map_err(|error| TokenError::Internal(error.to_string()))?;
        let mac = self.key.sign(&[RECORD_LABEL, record.id.as_bytes(), &json]);
        let mut known = Known::new(record, mac)?;
        let generation = state.generation + 1;
        let root = encode_root(&self.key, generation, &state.digest_with(&known.record.id, &mac));
        let place = key(&known.record.id);
        let compare = vec![
            Compare::ModRevision(place.clone(), previous),
            Compare::ModRevision(ROOT.to_vec(), state.revision),
        ];
        let write = vec![Write::put(place, [mac.as_slice(), &json].concat()), Write::put(ROOT, root)];
        let outcome = self.kv.commit(Transaction { compare, write }).await?;
        if !outcome.succeeded {
            return Err(TokenError::Tampered {
                what: format!("token {} can't be written", known.record.id),
                mend: "restart the broker, which checks them all",
            });
        }
        known.revision = outcome.revision;
        let mut tokens = state.tokens.clone();
        tokens.insert(known.record.id.clone(), Arc::new(known));
        self.state.store(Arc::new(State { generation, revision: outcome.revision, tokens }));
        Ok(())
    }
}

/// All tokens at one generation. The default is that of a database that never had one.
#[derive(Default)]
struct State {
    generation: u64,
    /// That of the root; 0 where there is none.
    revision: Revision,
    /// By their ids.
    tokens: BTreeMap<String, Arc<Known>>,
}

impl State {
    async fn read(kv: &dyn Kv, key: &MacKey) -> Result<Self, TokenError> {
        let tokens = read_tokens(kv, key).await?;
        let Some(entry) = kv.get(ROOT).await? else {
            return match tokens.is_empty() {
                true => Ok(Self::default()),
                false => Err(tampered("the root of the tokens is missing")),
            };
        };
        let (generation, digest) = decode_root(key, &entry.value)
            .ok_or_else(|| tampered("the root of the tokens fails authentication"))?;
        if digest != digest_of(&macs(&tokens)) {
            return Err(tampered(format!(
                "the {} stored tokens are not those of their root (one is missing, added or from the past)",
                tokens.len()
            )));
        }
        Ok(Self { generation, revision: entry.mod_revision, tokens })
    }

    /// The digest of the tokens when the record of `id` is the one with this MAC.
    fn digest_with(&self, id: &str, mac: &Mac) -> Digest {
        let mut macs = macs(&self.tokens);
        macs.insert(id, mac);
        digest_of(&macs)
    }
}

async fn read_tokens(kv: &dyn Kv, key: &MacKey) -> Result<BTreeMap<String, Arc<Known>>, TokenError> {
    let mut tokens = BTreeMap::new();
    let mut after = Vec::new();
    loop {
        let page = kv.range(PREFIX, &after, 1_000).await?;
        for entry in &page.entries {
            let known = Known::read(key, entry)?;
            tokens.insert(known.record.id.clone(), Arc::new(known));
        }
        match page.entries.last() {
            Some(last) if page.more => after.clone_from(&last.key),
            _ => return Ok(tokens),
        }
    }
}

struct Known {
    record: TokenRecord,
    hash: Digest,
    principal: Arc<Principal>,
    mac: Mac,
    /// The one that last changed it; 0 before it is written.
    revision: Revision,
}

impl Known {
    /// The token of an entry. Its id is that of the key, which the MAC covers.
    fn read(key: &MacKey, entry: &Entry) -> Result<Self, TokenError> {
        let shown = || String::from_utf8_lossy(&entry.key).escape_default().take(64).collect::<String>();
        let (mac, json) = authenticate(key, entry)
            .ok_or_else(|| tampered(format!("token record `{}` fails authentication", shown())))?;
        let record = serde_json::from_slice(json).map_err(|error| {
            TokenError::Internal(format!("token record `{}` can't be read: {error}", shown()))
        })?;
        Ok(Self { revision: entry.mod_revision, ..Self::new(record, mac)? })
    }

    fn new(record: TokenRecord, mac: Mac) -> Result<Self, TokenError> {
        let hash = HEXLOWER
            .decode(record.hash.as_bytes())
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| TokenError::Internal(format!("token {}: its hash is malformed", record.id)))?;
        let proof = Proof { method: METHOD, detail: record.id.clone() };
        let (groups, claims) = (record.groups.clone(), record.claims.clone());
        let principal =
            Arc::new(Principal::new(record.kind, record.principal.clone(), groups, claims, proof));
        Ok(Self { record, hash, principal, mac, revision: 0 })
    }

    /// Why it is good for nothing at `now`, and the mend; `None` while it is good.
    fn ended(&self, now: Timestamp) -> Option<&'static str> {
        if self.record.revoked_at.is_some() {
            return Some("it was revoked; ask for a new one");
        }
        (self.record.expires_at <= now).then_some("it has expired; ask for a new one")
    }
}

/// The MAC and the JSON of a record; `None` where it is not authentic at its key.
fn authenticate<'a>(key: &MacKey, entry: &'a Entry) -> Option<(Mac, &'a [u8])> {
    let id = entry.key.strip_prefix(PREFIX)?;
    let (mac, json) = entry.value.split_first_chunk::<MAC_BYTES>()?;
    key.verify(&[RECORD_LABEL, id, json], mac).then_some((*mac, json))
}

type Digest = [u8; digest::SHA256_OUTPUT_LEN];

fn macs(tokens: &BTreeMap<String, Arc<Known>>) -> BTreeMap<&str, &Mac> {
    tokens.iter().map(|(id, known)| (id.as_str(), &known.mac)).collect()
}

/// Ids need no length before them: those of authentic records are equally long, and so are MACs.
fn digest_of(macs: &BTreeMap<&str, &Mac>) -> Digest {
    let mut context = digest::Context::new(&digest::SHA256);
    for (id, mac) in macs {
        context.update(id.as_bytes());
        context.update(mac.as_slice());
    }
    let mut bytes = [0; digest::SHA256_OUTPUT_LEN];
    bytes.copy_from_slice(context.finish().as_ref());
    bytes
}

fn encode_root(key: &MacKey, generation: u64, digest: &Digest) -> Vec<u8> {
    let generation = generation.to_be_bytes();
    let mac = key.sign(&[ROOT_LABEL, &generation, digest]);
    [mac.as_slice(), &generation, digest].concat()
}

/// The generation and the digest of a root; `None` where it is not authentic.
fn decode_root(key: &MacKey, stored: &[u8]) -> Option<(u64, Digest)> {
    let (mac, body) = stored.split_first_chunk::<MAC_BYTES>()?;
    let (generation, rest) = body.split_first_chunk::<8>()?;
    let digest: &Digest = rest.try_into().ok()?;
    let authentic = key.verify(&[ROOT_LABEL, generation, digest], mac);
    authentic.then(|| (u64::from_be_bytes(*generation), *digest))
}

fn tampered(what: impl Into<String>) -> TokenError {
    TokenError::Tampered { what: what.into(), mend: "restore the database from a backup" }
}

/// Runs a change to its end, also when the caller goes away before: what is in the database must get into memory.
async fn to_the_end<T, F>(change: F) -> Result<T, TokenError>
where
    T: Send + 'static,
    F: Future<Output = Result<T, TokenError>> + Send + 'static,
{
    tokio::spawn(change)
        .await
        .unwrap_or_else(|error| Err(TokenError::Internal(format!("finishing a change of tokens: {error}"))))
}

fn key(id: &str) -> Vec<u8> {
    [PREFIX, id.as_bytes()].concat()
}

fn random<const N: usize>() -> Result<Zeroizing<[u8; N]>, TokenError> {
    let mut bytes = Zeroizing::new([0; N]);
    SystemRandom::new()
        .fill(bytes.as_mut_slice())
        .map_err(|_| TokenError::Internal("the system gives no random bytes".to_owned()))?;
    Ok(bytes)
}

/// The id and the decoded secret of `clv_ID_SECRET`.
fn split(token: &str) -> Option<(&str, Zeroizing<Vec<u8>>)> {
    let (id, secret) = token.strip_prefix("clv_")?.split_once('_')?;
    let secret = Zeroizing::new(BASE64URL_NOPAD.decode(secret.as_bytes()).ok()?);
    (secret.len() == 32).then_some((id, secret))
}

fn check(request: &TokenRequest) -> Result<(), TokenError> {
    let refuse = |field, problem: &str| Err(TokenError::Invalid { field, problem: problem.to_owned() });
    if !is_word(&request.principal) {
        return refuse("subject.id", "must be 1 to 128 printable ASCII characters without spaces");
    }
    if request.groups.len() > MAX_GROUPS || !request.groups.iter().all(|group| is_word(group)) {
        return refuse(
            "subject.groups",
            "must be at most 64 of 1 to 128 printable ASCII characters without spaces",
        );
    }
    if request.claims.len() > MAX_GROUPS
        || !request.claims.iter().all(|(name, value)| is_word(name) && is_word(value))
    {
        return refuse(
            "subject.claims",
            "must be at most 64, names and values printable ASCII without spaces",
        );
    }
    if request.expires_in < SHORTEST || request.expires_in > LONGEST {
        return refuse("expires_in", "must be 1 minute to 400 days, for example `12h` or `30d`");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use futures_util::future::join_all;

    use super::*;
    use crate::clock::ManualClock;
    use crate::crypto::RootKey;
    use crate::kv::embedded::Embedded;

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
            created_by: "test".to_owned(),
        }
    }

    async fn create(tokens: &Tokens) -> TokenRecord {
        tokens.create(request(10)).await.unwrap().0
    }

    async fn recognised(tokens: &Tokens, secret: &SecretValue) -> Arc<Principal> {
        let presented = Presented { peer: None, bearer: Some(secret.clone()) };
        tokens.authenticate(&presented).await.unwrap().unwrap()
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
        assert_eq!(machine.start().await.unwrap().list(), [own]);
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
        let revoked = |tokens: &Tokens| tokens.list().iter().filter(|one| one.revoked_at.is_some()).count();
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
}
