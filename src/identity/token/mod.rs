//! Tokens that the broker issues itself.
//!
//! ```text
//! clv_<id: 16 hex digits>_<secret: 43 characters of base64url, 256 random bits>
//!
//! kv  token/<id>  →  offset  bytes
//!                         0     32  MAC of the id and the JSON
//!                        32      …  JSON: SHA-256 of the secret, whom it stands for, created, expires, revoked,
//!                                         and where there are any: its environments and source addresses
//!
//! kv  token-root  →       0     32  MAC of the rest
//!                        32      8  generation: grows by one with every change of the tokens    (big-endian)
//!                        40     32  SHA-256 of id ‖ MAC of every record, in the order of the ids
//!
//! kv  token-use/<id>                when and from where it was last used (see `last_use`)
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `record` | what is known of one token, and its limits |
//! | `range` | where a token may be used from |
//! | `table` | all of them, in the database and in memory |
//! | `last_use` | when and from where each was last used |
//!
//! A token is shown once. A fast hash is right here: the secret has 256 bits, so there is nothing to guess (a slow
//! hash protects short passwords). Hashes are compared in constant time. Revocation takes effect with the next
//! request: the table in memory is what requests ask, and it changes before the revocation is answered.
//!
//! A token may be good for some environments alone, which [`Principal::only_in`] says to whoever decides, and for some
//! source addresses alone, which is seen to here. The latter is asked last: nobody without the secret learns of it.
//!
//! Whoever can write the database can't make a token, change one or bring one back: each record is authentic by
//! itself, and the root says which records there are. What the root can't say is that it is the newest one. Who puts
//! back all records together with their root, or removes them all, is found by whoever keeps the
//! [`generation`](Tokens::generation) elsewhere.

mod last_use;
mod range;
mod record;
mod table;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use ring::digest;
use ring::rand::{SecureRandom as _, SystemRandom};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use self::record::Known;
use self::table::Table;
use super::{Authenticator, IdentityError, Presented, Principal, SourceAddress};
use crate::clock::SharedClock;
use crate::crypto::MacKey;
use crate::error::{Reason, Reasoned};
use crate::kv::{Entry, Kv, KvError};
use crate::secret::SecretValue;

pub use last_use::LastUsed;
pub use range::SourceRange;
pub use record::{TokenRecord, TokenRequest};

/// The method of proof of those who present a token.
const METHOD: &str = "token";

/// A token with what is known of its use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// The token.
    pub record: TokenRecord,
    /// Its last use, to about a minute; `None` where there was none yet.
    pub last_used: Option<LastUsed>,
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
        Ok(Self { table: Arc::new(Table::open(kv, key).await?), clock })
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
        let live = |known: &Arc<Known>| known.record.ended(self.clock.now()).is_none();
        proof.method != METHOD || state.tokens.get(&proof.detail).is_some_and(live)
    }

    /// Issues a token. The secret half is in the returned value and nowhere else.
    ///
    /// # Errors
    /// [`TokenError::Invalid`], naming the member of the request.
    pub async fn create(&self, request: TokenRequest) -> Result<(TokenRecord, SecretValue), TokenError> {
        request.check()?;
        let id = HEXLOWER.encode(&*random::<8>()?);
        let secret = random::<32>()?;
        let hash = digest::digest(&digest::SHA256, secret.as_slice());
        let record = TokenRecord::issued(id.clone(), hash.as_ref(), self.clock.now(), request);
        let (table, stored) = (Arc::clone(&self.table), record.clone());
        to_the_end(async move { table.add(stored).await }).await?;
        let encoded = Zeroizing::new(BASE64URL_NOPAD.encode(secret.as_slice()));
        let text = format!("clv_{id}_{}", encoded.as_str());
        let secret = SecretValue::text(text).map_err(|error| TokenError::Internal(error.to_string()))?;
        Ok((record, secret))
    }

    /// Every token, in the order of their ids.
    #[must_use]
    pub fn list(&self) -> Vec<Shown> {
        let shown =
            |known: &Arc<Known>| Shown { record: known.record.clone(), last_used: known.last_use.latest() };
        self.table.state.load().tokens.values().map(shown).collect()
    }

    /// Ends a token now. One that was revoked before stays as it was.
    ///
    /// # Errors
    /// [`TokenError::NotFound`]; [`TokenError::Tampered`] where the database is not as this broker left it.
    pub async fn revoke(&self, id: &str) -> Result<TokenRecord, TokenError> {
        let (table, id, now) = (Arc::clone(&self.table), id.to_owned(), self.clock.now());
        to_the_end(async move { table.revoke(&id, now).await }).await
    }

    /// Tokens that expired or were revoked more than 30 days ago, so that their records may go; at most 32 at a time.
    #[must_use]
    pub fn gone(&self) -> Vec<TokenRecord> {
        self.table.gone(self.clock.now())
    }

    /// Removes what is known of the first 32 of `ids`, where they are such as [`gone`](Self::gone) gives, in one
    /// transaction, and says which were removed. The others stay as they are.
    ///
    /// # Errors
    /// [`TokenError::Tampered`] where the database is not as this broker left it; [`TokenError::Kv`]. Then all stay.
    pub async fn prune(&self, ids: Vec<String>) -> Result<Vec<String>, TokenError> {
        let (table, now) = (Arc::clone(&self.table), self.clock.now());
        to_the_end(async move { table.remove(&ids, now).await }).await
    }

    /// Keeps when and from where tokens were last used, as far as the database does not know it, 64 tokens at a time.
    /// What was not kept before the broker ends is forgotten.
    ///
    /// # Errors
    /// [`TokenError::Kv`]: the next time, all that is missing is tried again.
    pub async fn keep_last_use(&self) -> Result<(), TokenError> {
        while self.table.keep_some_uses().await? {}
        Ok(())
    }

    /// The principal that `token`, used from `source`, stands for now. An unknown id and a wrong secret are told apart
    /// by nobody.
    fn recognise(&self, token: &str, source: &SourceAddress) -> Result<Arc<Principal>, IdentityError> {
        let refuse = |problem| IdentityError::Invalid { method: METHOD, problem };
        let (id, secret) = split(token).ok_or_else(|| refuse("it is not of the form clv_ID_SECRET"))?;
        let given = digest::digest(&digest::SHA256, secret.as_slice());
        let state = self.table.state.load();
        let known = state.tokens.get(id).filter(|known| bool::from(known.hash.ct_eq(given.as_ref())));
        let known = known.ok_or_else(|| refuse("this broker did not issue it"))?;
        let now = self.clock.now();
        if let Some(problem) = known.record.ended(now) {
            return Err(refuse(problem));
        }
        if !known.record.is_good_from(source) {
            return Err(refuse("it is not good for this address; ask for one that is"));
        }
        known.last_use.note(now, source);
        Ok(Arc::clone(&known.principal))
    }
}

#[async_trait]
impl Authenticator for Tokens {
    async fn authenticate(&self, presented: &Presented) -> Result<Option<Arc<Principal>>, IdentityError> {
        let Some(bearer) = &presented.bearer else { return Ok(None) };
        self.recognise(bearer.expose_text().unwrap_or_default(), &presented.source).map(Some)
    }

    fn concerns(&self, presented: &Presented) -> bool {
        presented.bearer.is_some()
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("known", &self.table.state.load().tokens.len()).finish_non_exhaustive()
    }
}

/// Everything in the database below `prefix`.
async fn every(kv: &dyn Kv, prefix: &[u8]) -> Result<Vec<Entry>, KvError> {
    let mut entries = Vec::new();
    let mut after = Vec::new();
    loop {
        let page = kv.range(prefix, &after, 1_000).await?;
        let last = page.entries.last().map(|entry| entry.key.clone());
        entries.extend(page.entries);
        match last {
            Some(last) if page.more => after = last,
            _ => return Ok(entries),
        }
    }
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
