//! Tokens that the broker issues itself.
//!
//! ```text
//! clv_<id: 16 hex digits>_<secret: 43 characters of base64url, 256 random bits>
//!
//! kv  token/<id>  →  JSON: SHA-256 of the secret, whom it stands for, created, expires, revoked
//! ```
//!
//! A token is shown once. A fast hash is right here: the secret has 256 bits, so there is nothing to guess (a slow
//! hash protects short passwords). Hashes are compared in constant time. Revocation takes effect with the next request: the table
//! in memory is what requests ask, and it changes before the revocation is answered.

use std::collections::{BTreeMap, BTreeSet, HashMap};
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
use zeroize::Zeroizing;

use super::{Authenticator, IdentityError, Presented, Principal, PrincipalKind, Proof};
use crate::clock::SharedClock;
use crate::error::{Reason, Reasoned};
use crate::kv::{Compare, Entry, Kv, KvError, Transaction, Write};
use crate::secret::SecretValue;

const PREFIX: &[u8] = b"token/";
const SHORTEST: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(400 * 86_400);
const MAX_ID: usize = 128;
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
            Self::Kv(error) => error.reason(),
            Self::Internal(_) => Reason::Internal,
        }
    }
}

/// The tokens of this broker.
pub struct Tokens {
    kv: Arc<dyn Kv>,
    clock: SharedClock,
    known: ArcSwap<HashMap<String, Arc<Known>>>,
}

struct Known {
    record: TokenRecord,
    hash: [u8; digest::SHA256_OUTPUT_LEN],
    principal: Arc<Principal>,
}

impl Tokens {
    /// Reads the tokens from `kv`.
    ///
    /// # Errors
    /// Where they can't be read.
    pub async fn open(kv: Arc<dyn Kv>, clock: SharedClock) -> Result<Self, TokenError> {
        let mut known = HashMap::new();
        let mut after = Vec::new();
        loop {
            let page = kv.range(PREFIX, &after, 1_000).await?;
            for entry in &page.entries {
                let token = Known::read(entry)?;
                known.insert(token.record.id.clone(), Arc::new(token));
            }
            match page.entries.last() {
                Some(last) if page.more => after.clone_from(&last.key),
                _ => break,
            }
        }
        Ok(Self { kv, clock, known: ArcSwap::from_pointee(known) })
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
        self.store(&record, None).await?;
        let encoded = Zeroizing::new(BASE64URL_NOPAD.encode(secret.as_slice()));
        let text = format!("clv_{id}_{}", encoded.as_str());
        let secret = SecretValue::text(text).map_err(|error| TokenError::Internal(error.to_string()))?;
        Ok((record, secret))
    }

    /// Every token, in the order of their ids.
    #[must_use]
    pub fn list(&self) -> Vec<TokenRecord> {
        let mut records: Vec<_> = self.known.load().values().map(|known| known.record.clone()).collect();
        records.sort_by(|a, b| a.id.cmp(&b.id));
        records
    }

    /// Ends a token now. One that was revoked before stays as it was.
    ///
    /// # Errors
    /// [`TokenError::NotFound`].
    pub async fn revoke(&self, id: &str) -> Result<TokenRecord, TokenError> {
        let entry = match id.chars().all(|c| c.is_ascii_hexdigit()) {
            true => self.kv.get(&key(id)).await?,
            false => None,
        };
        let shown = || id.escape_default().take(32).collect::<String>();
        let entry = entry.ok_or_else(|| TokenError::NotFound(shown()))?;
        let mut record = Known::read(&entry)?.record;
        if record.revoked_at.is_none() {
            record.revoked_at = Some(self.clock.now());
            self.store(&record, Some(&entry)).await?;
        }
        Ok(record)
    }

    /// Writes a record, and only then makes it what requests see.
    async fn store(&self, record: &TokenRecord, previous: Option<&Entry>) -> Result<(), TokenError> {
        let json = serde_json::to_vec(record).map_err(|error| TokenError::Internal(error.to_string()))?;
        let key = key(&record.id);
        let compare = vec![Compare::unchanged(key.clone(), previous)];
        let outcome = self.kv.commit(Transaction { compare, write: vec![Write::put(key, json)] }).await?;
        if !outcome.succeeded {
            return Err(TokenError::Internal(format!("token {} changed meanwhile; try again", record.id)));
        }
        let known = Arc::new(Known::new(record.clone())?);
        self.known.rcu(|tokens| {
            let mut tokens = HashMap::clone(tokens);
            tokens.insert(record.id.clone(), Arc::clone(&known));
            tokens
        });
        Ok(())
    }

    /// The principal that `token` stands for now. An unknown id and a wrong secret are told apart by nobody.
    fn recognise(&self, token: &str) -> Result<Arc<Principal>, IdentityError> {
        let refuse = |problem| IdentityError::Invalid { method: "token", problem };
        let (id, secret) = split(token).ok_or_else(|| refuse("it is not of the form clv_ID_SECRET"))?;
        let given = digest::digest(&digest::SHA256, secret.as_slice());
        let tokens = self.known.load();
        let known = tokens.get(id).filter(|known| bool::from(known.hash.ct_eq(given.as_ref())));
        let known = known.ok_or_else(|| refuse("this broker did not issue it"))?;
        if known.record.revoked_at.is_some() {
            return Err(refuse("it was revoked; ask for a new one"));
        }
        if known.record.expires_at <= self.clock.now() {
            return Err(refuse("it has expired; ask for a new one"));
        }
        Ok(Arc::clone(&known.principal))
    }
}

#[async_trait]
impl Authenticator for Tokens {
    async fn authenticate(&self, presented: &Presented) -> Result<Option<Arc<Principal>>, IdentityError> {
        let Some(bearer) = &presented.bearer else { return Ok(None) };
        self.recognise(bearer.expose_text().unwrap_or_default()).map(Some)
    }
}

impl Known {
    fn read(entry: &Entry) -> Result<Self, TokenError> {
        let record = serde_json::from_slice(&entry.value).map_err(|error| {
            let key = String::from_utf8_lossy(&entry.key);
            TokenError::Internal(format!("token record {} can't be read: {error}", key.escape_default()))
        })?;
        Self::new(record)
    }

    fn new(record: TokenRecord) -> Result<Self, TokenError> {
        let hash = HEXLOWER
            .decode(record.hash.as_bytes())
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| TokenError::Internal(format!("token {}: its hash is malformed", record.id)))?;
        let proof = Proof { method: "token", detail: record.id.clone() };
        let (groups, claims) = (record.groups.clone(), record.claims.clone());
        let principal =
            Arc::new(Principal::new(record.kind, record.principal.clone(), groups, claims, proof));
        Ok(Self { record, hash, principal })
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("known", &self.known.load().len()).finish_non_exhaustive()
    }
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
    let word = |text: &str| (1..=MAX_ID).contains(&text.len()) && text.chars().all(|c| c.is_ascii_graphic());
    if !word(&request.principal) {
        return refuse("subject.id", "must be 1 to 128 printable ASCII characters without spaces");
    }
    if request.groups.len() > MAX_GROUPS || !request.groups.iter().all(|group| word(group)) {
        return refuse(
            "subject.groups",
            "must be at most 64 of 1 to 128 printable ASCII characters without spaces",
        );
    }
    if request.claims.len() > MAX_GROUPS
        || !request.claims.iter().all(|(name, value)| word(name) && word(value))
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
