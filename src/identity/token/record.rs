//! What is known of one token.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use ring::digest;
use serde::{Deserialize, Serialize};

use super::last_use::LastUse;
use super::range::SourceRange;
use super::{METHOD, TokenError, tampered};
use crate::crypto::{MAC_BYTES, Mac, MacKey};
use crate::identity::{Principal, PrincipalKind, Proof, SourceAddress, is_word};
use crate::kv::{Entry, Revision};
use crate::secret::EnvironmentName;

pub(super) const PREFIX: &[u8] = b"token/";
const LABEL: &[u8] = b"claviger token v1";
const SHORTEST: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(400 * 86_400);
/// How many groups, claims, environments or ranges one token may have.
const MOST: usize = 64;
/// How long a record stays after its token has ended, for whoever asks what it was.
const KEPT: Duration = Duration::from_secs(30 * 86_400);

/// SHA-256.
pub(super) type Digest = [u8; digest::SHA256_OUTPUT_LEN];

/// What is known of a token; never its secret.
///
/// A member that this program does not know may be a limit, so a record that has one is not read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
    /// The environments that it is good for; none: all, and the broker's own business.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub environments: BTreeSet<EnvironmentName>,
    /// Where it may be used from; none: anywhere.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_addresses: Vec<SourceRange>,
}

/// Whom a new token stands for, for how long, and within which limits.
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
    /// At most 64 environments that it is good for; none: all, and the broker's own business.
    pub environments: BTreeSet<EnvironmentName>,
    /// At most 64 places that it may be used from; none: anywhere.
    pub source_addresses: Vec<SourceRange>,
    /// Who asks.
    pub created_by: String,
}

impl TokenRequest {
    /// # Errors
    /// [`TokenError::Invalid`], naming the member.
    pub(super) fn check(&self) -> Result<(), TokenError> {
        let refuse = |field, problem: &str| Err(TokenError::Invalid { field, problem: problem.to_owned() });
        if !is_word(&self.principal) {
            return refuse("subject.id", "must be 1 to 128 printable ASCII characters without spaces");
        }
        if self.groups.len() > MOST || !self.groups.iter().all(|group| is_word(group)) {
            return refuse(
                "subject.groups",
                "must be at most 64 of 1 to 128 printable ASCII characters without spaces",
            );
        }
        let words = |(name, value): (&String, &String)| is_word(name) && is_word(value);
        if self.claims.len() > MOST || !self.claims.iter().all(words) {
            return refuse(
                "subject.claims",
                "must be at most 64, names and values printable ASCII without spaces",
            );
        }
        if self.expires_in < SHORTEST || self.expires_in > LONGEST {
            return refuse("expires_in", "must be 1 minute to 400 days, for example `12h` or `30d`");
        }
        if self.environments.len() > MOST {
            return refuse("environments", "must be at most 64; leave them out for all");
        }
        if self.source_addresses.len() > MOST {
            return refuse("source_addresses", "must be at most 64; leave them out for anywhere");
        }
        Ok(())
    }
}

impl TokenRecord {
    /// A token that is issued `now`, whose secret has this hash.
    pub(super) fn issued(id: String, hash: &[u8], now: Timestamp, request: TokenRequest) -> Self {
        Self {
            id,
            hash: HEXLOWER.encode(hash),
            kind: request.kind,
            principal: request.principal,
            groups: request.groups,
            claims: request.claims,
            created_at: now,
            expires_at: now.saturating_add(request.expires_in).unwrap_or(Timestamp::MAX),
            revoked_at: None,
            created_by: request.created_by,
            environments: request.environments,
            source_addresses: request.source_addresses,
        }
    }

    /// Why it is good for nothing at `now`, and the mend; `None` while it is good.
    pub(super) fn ended(&self, now: Timestamp) -> Option<&'static str> {
        if self.revoked_at.is_some() {
            return Some("it was revoked; ask for a new one");
        }
        (self.expires_at <= now).then_some("it has expired; ask for a new one")
    }

    /// Whether it ended so long ago that its record may go.
    pub(super) fn is_gone(&self, now: Timestamp) -> bool {
        let ended = self.revoked_at.map_or(self.expires_at, |revoked_at| revoked_at.min(self.expires_at));
        ended.saturating_add(KEPT).is_ok_and(|gone| gone <= now)
    }

    pub(super) fn is_good_from(&self, source: &SourceAddress) -> bool {
        self.source_addresses.is_empty() || self.source_addresses.iter().any(|range| range.holds(source))
    }

    fn principal(&self) -> Principal {
        let proof = Proof { method: METHOD, detail: self.id.clone() };
        let (groups, claims) = (self.groups.clone(), self.claims.clone());
        let principal = Principal::new(self.kind, self.principal.clone(), groups, claims, proof);
        match self.environments.is_empty() {
            true => principal,
            false => principal.only_in(self.environments.clone()),
        }
    }
}

/// A token as requests meet it.
pub(super) struct Known {
    pub(super) record: TokenRecord,
    pub(super) hash: Digest,
    pub(super) principal: Arc<Principal>,
    pub(super) last_use: Arc<LastUse>,
    pub(super) mac: Mac,
    /// The one that last changed it; 0 before it is written.
    pub(super) revision: Revision,
}

impl Known {
    /// The token of an entry, never used as far as this says. Its id is that of the key, which the MAC covers.
    pub(super) fn read(mac_key: &MacKey, entry: &Entry) -> Result<Self, TokenError> {
        let shown = || String::from_utf8_lossy(&entry.key).escape_default().take(64).collect::<String>();
        let (mac, json) = authentic(mac_key, entry)
            .ok_or_else(|| tampered(format!("token record `{}` fails authentication", shown())))?;
        let record = serde_json::from_slice(json).map_err(|error| {
            TokenError::Internal(format!("token record `{}` can't be read: {error}", shown()))
        })?;
        Ok(Self {
            revision: entry.mod_revision,
            ..Self::new(record, mac, LastUse::kept_before(None).into())?
        })
    }

    /// A token that is yet to be written, and what to write.
    pub(super) fn write(
        mac_key: &MacKey,
        record: TokenRecord,
        last_use: Arc<LastUse>,
    ) -> Result<(Self, Vec<u8>), TokenError> {
        let json = serde_json::to_vec(&record).map_err(|error| TokenError::Internal(error.to_string()))?;
        let mac = mac_key.sign(&[LABEL, record.id.as_bytes(), &json]);
        Ok((Self::new(record, mac, last_use)?, [mac.as_slice(), &json].concat()))
    }

    fn new(record: TokenRecord, mac: Mac, last_use: Arc<LastUse>) -> Result<Self, TokenError> {
        let hash = HEXLOWER
            .decode(record.hash.as_bytes())
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| TokenError::Internal(format!("token {}: its hash is malformed", record.id)))?;
        let principal = Arc::new(record.principal());
        Ok(Self { record, hash, principal, last_use, mac, revision: 0 })
    }
}

/// Where the record of a token stands.
pub(super) fn key(id: &str) -> Vec<u8> {
    [PREFIX, id.as_bytes()].concat()
}

/// The MAC and the JSON of a record; `None` where it is not authentic at its key.
fn authentic<'a>(mac_key: &MacKey, entry: &'a Entry) -> Option<(Mac, &'a [u8])> {
    let id = entry.key.strip_prefix(PREFIX)?;
    let (mac, json) = entry.value.split_first_chunk::<MAC_BYTES>()?;
    mac_key.verify(&[LABEL, id, json], mac).then_some((*mac, json))
}
