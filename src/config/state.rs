//! What the broker knows of itself, kept in the key-value store under a key of its own, so that nobody who can write the
//! file can make it up.
//!
//! ```text
//! state/key                the state key, wrapped by a root key (76 bytes, crypto/envelope.rs)
//! state/audit/<instance>   MAC (32 bytes) ‖ `instance:sequence:hash` of the last checkpoint of the audit log
//! ```
//!
//! The log vouches for the store (a checkpoint holds the number of changes that the store has seen), and the store for
//! the log: whoever cuts or removes one alone is found out by the other.

use std::sync::Arc;

use crate::audit::Anchor;
use crate::crypto::{CryptoError, KeyRing, MAC_BYTES, Mac, MacKey, RootKeyId};
use crate::error::{Reason, Reasoned};
use crate::kv::{Compare, Entry, Kv, KvError, Transaction, Write};

const KEY: &[u8] = b"state/key";
const CONTEXT: &[u8] = b"claviger state key v1";
const LABEL: &[u8] = b"claviger audit anchor v1";

/// Why the state can't be read or kept.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StateError {
    /// The layer below.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// The state key can't be opened.
    #[error("the broker's state key: {0}")]
    Key(#[from] CryptoError),
    /// The place of the audit log is not what this broker wrote.
    #[error(
        "what the key-value store says of the audit log was changed or removed; restore the database, or start once with --accept-loss"
    )]
    Tampered,
}

impl Reasoned for StateError {
    fn reason(&self) -> Reason {
        match self {
            Self::Kv(error) => error.reason(),
            Self::Key(error) => error.reason(),
            Self::Tampered => Reason::Tampered,
        }
    }
}

/// The state key: the one that is there, or a new one under the newest root key.
pub(super) async fn key(kv: &dyn Kv, keys: &KeyRing) -> Result<Arc<MacKey>, StateError> {
    if let Some(entry) = kv.get(KEY).await? {
        return Ok(Arc::new(keys.open_mac_key(&[CONTEXT], &entry.value)?));
    }
    let (key, wrapped) = MacKey::create(&keys.newest(), &[CONTEXT])?;
    let write = vec![Write::put(KEY, wrapped)];
    let outcome = kv.commit(Transaction { compare: vec![Compare::absent(KEY)], write }).await?;
    // The store belongs to this process alone; a lost race is a store that does not.
    if outcome.succeeded { Ok(Arc::new(key)) } else { Err(StateError::Tampered) }
}

/// The root key that the state key is under.
pub(super) async fn wrapped_by(kv: &dyn Kv) -> Result<RootKeyId, StateError> {
    RootKeyId::of_wrapped(&stored(kv).await?.value).ok_or(StateError::Key(CryptoError::Malformed))
}

/// Wraps the state key by the newest root key; whether it was not so already. No MAC that it made changes.
pub(super) async fn rewrap(kv: &dyn Kv, keys: &KeyRing) -> Result<bool, StateError> {
    let entry = stored(kv).await?;
    let Some(wrapped) = keys.rewrap_mac_key(&[CONTEXT], &entry.value)? else { return Ok(false) };
    let compare = vec![Compare::unchanged(KEY, Some(&entry))];
    let outcome = kv.commit(Transaction { compare, write: vec![Write::put(KEY, wrapped)] }).await?;
    Ok(outcome.succeeded)
}

/// The wrapped state key, which is there from the first start on.
async fn stored(kv: &dyn Kv) -> Result<Entry, StateError> {
    kv.get(KEY).await?.ok_or(StateError::Key(CryptoError::Malformed))
}

/// What is known of the audit log's place, where anything is; makes nothing.
pub(super) async fn known_place(
    kv: &Arc<dyn Kv>,
    keys: &KeyRing,
    instance: &str,
) -> Result<Option<Anchor>, StateError> {
    if kv.get(KEY).await?.is_none() {
        return Ok(None);
    }
    let key = self::key(kv.as_ref(), keys).await?;
    AuditPlace::new(Arc::clone(kv), key, instance).read().await
}

/// Where the audit log of one instance was last signed.
pub(super) struct AuditPlace {
    kv: Arc<dyn Kv>,
    key: Arc<MacKey>,
    instance: String,
    kept: Option<Anchor>,
}

impl AuditPlace {
    pub(super) fn new(kv: Arc<dyn Kv>, key: Arc<MacKey>, instance: &str) -> Self {
        Self { kv, key, instance: instance.to_owned(), kept: None }
    }

    /// The place that was kept; `None` where none was yet.
    pub(super) async fn read(&self) -> Result<Option<Anchor>, StateError> {
        let Some(entry) = self.kv.get(&self.name()).await? else { return Ok(None) };
        let (mac, text) = entry.value.split_first_chunk::<MAC_BYTES>().ok_or(StateError::Tampered)?;
        let mac: &Mac = mac;
        if !self.key.verify(&[LABEL, self.instance.as_bytes(), text], mac) {
            return Err(StateError::Tampered);
        }
        let text = std::str::from_utf8(text).map_err(|_| StateError::Tampered)?;
        text.parse().map(Some).map_err(|_| StateError::Tampered)
    }

    /// Keeps another place, where it is another one.
    pub(super) async fn keep(&mut self, place: Option<Anchor>) -> Result<(), StateError> {
        let Some(place) = place.filter(|place| self.kept.as_ref() != Some(place)) else { return Ok(()) };
        let text = place.to_string();
        let mac = self.key.sign(&[LABEL, self.instance.as_bytes(), text.as_bytes()]);
        let value = [mac.as_slice(), text.as_bytes()].concat();
        let write = vec![Write::put(self.name(), value)];
        self.kv.commit(Transaction { compare: Vec::new(), write }).await?;
        self.kept = Some(place);
        Ok(())
    }

    fn name(&self) -> Vec<u8> {
        format!("state/audit/{}", self.instance).into_bytes()
    }
}
