//! The tokens in the database and, as requests see them, in memory.
//!
//! INVARIANT: a transaction that changes or removes a record changes the root, and compares all of them first. The new
//! root is made from the table in memory, never from what lies in the database, so no foreign record gets into it. That
//! takes time in proportion to all tokens, which are few (they stand for people and programs) and seldom change.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use jiff::Timestamp;
use ring::digest;
use tokio::sync::Mutex;

use super::last_use::{self, LastUse, LastUsed};
use super::record::{self, Digest, Known};
use super::{TokenError, TokenRecord, every, tampered};
use crate::crypto::{MAC_BYTES, Mac, MacKey};
use crate::kv::{Compare, Kv, Revision, Transaction, Write};

pub(super) const ROOT: &[u8] = b"token-root";
const ROOT_LABEL: &[u8] = b"claviger token root v1";
/// How many notes of last uses one transaction writes.
const MOST_NOTES: usize = 64;
/// How many tokens one transaction removes, with two keys each: together with the root, etcd takes 128 operations.
const MOST_REMOVED: usize = 32;

pub(super) struct Table {
    kv: Arc<dyn Kv>,
    key: Arc<MacKey>,
    /// Held from before a change is made up until it is in memory.
    writer: Mutex<()>,
    pub(super) state: ArcSwap<State>,
}

impl Table {
    pub(super) async fn open(kv: Arc<dyn Kv>, key: Arc<MacKey>) -> Result<Self, TokenError> {
        let state = ArcSwap::from_pointee(State::read(kv.as_ref(), &key).await?);
        Ok(Self { kv, key, writer: Mutex::new(()), state })
    }

    pub(super) async fn add(&self, record: TokenRecord) -> Result<(), TokenError> {
        let _writing = self.writer.lock().await;
        self.store(record, LastUse::kept_before(None).into(), 0).await
    }

    pub(super) async fn revoke(&self, id: &str, now: Timestamp) -> Result<TokenRecord, TokenError> {
        let _writing = self.writer.lock().await;
        let known = self.state.load().tokens.get(id).cloned();
        let known = known.ok_or_else(|| TokenError::NotFound(id.escape_default().take(32).collect()))?;
        let mut record = known.record.clone();
        if record.revoked_at.is_none() {
            record.revoked_at = Some(now);
            self.store(record.clone(), Arc::clone(&known.last_use), known.revision).await?;
        }
        Ok(record)
    }

    /// The tokens that ended so long ago that their records may go; at most as many as go at once.
    pub(super) fn gone(&self, now: Timestamp) -> Vec<TokenRecord> {
        let state = self.state.load();
        let gone = state.tokens.values().map(|known| &known.record).filter(|record| record.is_gone(now));
        gone.take(MOST_REMOVED).cloned().collect()
    }

    /// Removes those of `ids` that ended long ago, with the notes of their uses, and says which.
    pub(super) async fn remove(&self, ids: &[String], now: Timestamp) -> Result<Vec<String>, TokenError> {
        let _writing = self.writer.lock().await;
        let state = self.state.load_full();
        let mut tokens = state.tokens.clone();
        let mut change = Transaction::default();
        let mut removed = Vec::new();
        for id in ids.iter().take(MOST_REMOVED) {
            let Some(known) = tokens.get(id).filter(|known| known.record.is_gone(now)) else { continue };
            change.compare.push(Compare::ModRevision(record::key(id), known.revision));
            change.write.extend([Write::delete(record::key(id)), Write::delete(last_use::key(id))]);
            tokens.remove(id);
            removed.push(id.clone());
        }
        if removed.is_empty() {
            return Ok(removed);
        }
        let digest = digest_of(&macs(&tokens));
        let revision = self.commit(&state, &digest, change, "a token can't be removed").await?;
        self.show(&state, tokens, revision);
        Ok(removed)
    }

    /// Keeps some of the last uses that the database does not know; whether there may be more.
    pub(super) async fn keep_some_uses(&self) -> Result<bool, TokenError> {
        // No token is removed meanwhile: its note would stay behind.
        let _writing = self.writer.lock().await;
        let state = self.state.load_full();
        let unkept = state.tokens.values().filter_map(|known| Some((known, known.last_use.unkept()?)));
        let unkept: Vec<_> = unkept.take(MOST_NOTES).collect();
        if unkept.is_empty() {
            return Ok(false);
        }
        let note =
            |(known, used): &(&Arc<Known>, Arc<LastUsed>)| last_use::write(&self.key, &known.record.id, used);
        let write = unkept.iter().map(note).collect::<Result<_, _>>()?;
        self.kv.commit(Transaction { compare: Vec::new(), write }).await?;
        for (known, used) in &unkept {
            known.last_use.keep(used);
        }
        Ok(unkept.len() == MOST_NOTES)
    }

    /// Writes a record, that of `previous` until now, with the root that fits it, and only then makes it what
    /// requests see. The caller holds the writers' lock.
    async fn store(
        &self,
        record: TokenRecord,
        last_use: Arc<LastUse>,
        previous: Revision,
    ) -> Result<(), TokenError> {
        let state = self.state.load_full();
        let (mut known, bytes) = Known::write(&self.key, record, last_use)?;
        let id = known.record.id.clone();
        let place = record::key(&id);
        let change = Transaction {
            compare: vec![Compare::ModRevision(place.clone(), previous)],
            write: vec![Write::put(place, bytes)],
        };
        let digest = state.digest_with(&id, &known.mac);
        let revision = self.commit(&state, &digest, change, &format!("token {id} can't be written")).await?;
        known.revision = revision;
        let mut tokens = state.tokens.clone();
        tokens.insert(id, Arc::new(known));
        self.show(&state, tokens, revision);
        Ok(())
    }

    /// Commits a change of records with the root of what they will be, whose digest is given, where all of it is as
    /// this broker left it. The caller holds the writers' lock.
    async fn commit(
        &self,
        state: &State,
        digest: &Digest,
        mut change: Transaction,
        failed: &str,
    ) -> Result<Revision, TokenError> {
        let root = encode_root(&self.key, state.generation + 1, digest);
        change.compare.push(Compare::ModRevision(ROOT.to_vec(), state.revision));
        change.write.push(Write::put(ROOT, root));
        let outcome = self.kv.commit(change).await?;
        outcome.succeeded.then_some(outcome.revision).ok_or_else(|| TokenError::Tampered {
            what: failed.to_owned(),
            mend: "restart the broker, which checks them all",
        })
    }

    /// Makes `tokens`, which are in the database since `revision`, what requests see.
    fn show(&self, before: &State, tokens: BTreeMap<String, Arc<Known>>, revision: Revision) {
        self.state.store(Arc::new(State { generation: before.generation + 1, revision, tokens }));
    }
}

/// All tokens at one generation. The default is that of a database that never had one.
#[derive(Default)]
pub(super) struct State {
    pub(super) generation: u64,
    /// That of the root; 0 where there is none.
    revision: Revision,
    /// By their ids.
    pub(super) tokens: BTreeMap<String, Arc<Known>>,
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
    let mut uses = last_use::read(kv, key).await?;
    let mut tokens = BTreeMap::new();
    for entry in every(kv, record::PREFIX).await? {
        let mut known = Known::read(key, &entry)?;
        known.last_use = LastUse::kept_before(uses.remove(&known.record.id)).into();
        tokens.insert(known.record.id.clone(), Arc::new(known));
    }
    Ok(tokens)
}

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
