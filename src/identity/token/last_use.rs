//! When and from where a token was last used, to about a minute: a note in memory, kept in the database now and then.
//!
//! ```text
//! kv  token-use/<id>  →  offset  bytes
//!                             0     32  MAC of the id and the JSON
//!                            32      …  JSON: at, from
//! ```
//!
//! A note is for people to read and decides nothing. So it is not part of the tokens' root: one that is missing is a
//! token that was never used, an older one that is put back is believed, and one that is not authentic is not.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use arc_swap::ArcSwapOption;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{TokenError, every};
use crate::crypto::{MAC_BYTES, MacKey};
use crate::identity::SourceAddress;
use crate::kv::{Entry, Kv, Write};

const PREFIX: &[u8] = b"token-use/";
const LABEL: &[u8] = b"claviger token use v1";
/// The minute of what has not happened.
const NEVER: i64 = i64::MIN;

/// A use of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastUsed {
    /// When: the first use within its minute.
    pub at: Timestamp,
    /// From where: an address, or `unix`.
    pub from: String,
}

impl LastUsed {
    fn minute(&self) -> i64 {
        minute(self.at)
    }
}

fn minute(time: Timestamp) -> i64 {
    time.as_second().div_euclid(60)
}

/// The last use of one token. Every request with it notes its own: one load and a comparison, unless the minute is
/// another.
pub(super) struct LastUse {
    minute: AtomicI64,
    latest: ArcSwapOption<LastUsed>,
    /// The minute of the note in the database.
    kept: AtomicI64,
}

impl LastUse {
    /// What the database knows.
    pub(super) fn kept_before(used: Option<LastUsed>) -> Self {
        let minute = used.as_ref().map_or(NEVER, LastUsed::minute);
        Self {
            minute: AtomicI64::new(minute),
            latest: ArcSwapOption::from_pointee(used),
            kept: AtomicI64::new(minute),
        }
    }

    /// Notes a use. Of several in the same minute, one is enough.
    pub(super) fn note(&self, now: Timestamp, source: &SourceAddress) {
        let (now_minute, noted) = (minute(now), self.minute.load(Ordering::Relaxed));
        if now_minute == noted {
            return;
        }
        let exchanged = self.minute.compare_exchange(noted, now_minute, Ordering::Relaxed, Ordering::Relaxed);
        if exchanged.is_ok() {
            self.latest.store(Some(Arc::new(LastUsed { at: now, from: place(source) })));
        }
    }

    /// The last use, if there was one.
    pub(super) fn latest(&self) -> Option<LastUsed> {
        self.latest.load().as_deref().cloned()
    }

    /// The last use, where the database does not know it.
    pub(super) fn unkept(&self) -> Option<Arc<LastUsed>> {
        self.latest.load_full().filter(|used| used.minute() != self.kept.load(Ordering::Relaxed))
    }

    /// The database knows `used` from now on.
    pub(super) fn keep(&self, used: &LastUsed) {
        self.kept.store(used.minute(), Ordering::Relaxed);
    }
}

/// Where a call came from, without what differs from call to call.
fn place(source: &SourceAddress) -> String {
    match (source, source.ip()) {
        (_, Some(address)) => address.to_string(),
        (SourceAddress::Unix { .. }, None) => "unix".to_owned(),
        (_, None) => "internal".to_owned(),
    }
}

/// Where the note of a token stands.
pub(super) fn key(id: &str) -> Vec<u8> {
    [PREFIX, id.as_bytes()].concat()
}

/// What puts it there.
pub(super) fn write(mac_key: &MacKey, id: &str, used: &LastUsed) -> Result<Write, TokenError> {
    let json = serde_json::to_vec(used).map_err(|error| TokenError::Internal(error.to_string()))?;
    let mac = mac_key.sign(&[LABEL, id.as_bytes(), &json]);
    Ok(Write::put(key(id), [mac.as_slice(), &json].concat()))
}

/// The notes of all tokens, by their ids.
pub(super) async fn read(kv: &dyn Kv, mac_key: &MacKey) -> Result<HashMap<String, LastUsed>, TokenError> {
    let mut notes = HashMap::new();
    for entry in every(kv, PREFIX).await? {
        match authentic(mac_key, &entry) {
            Some((id, used)) => drop(notes.insert(id, used)),
            None => tracing::warn!(
                key = %String::from_utf8_lossy(&entry.key).escape_default(),
                "a token's last use fails authentication and is not believed"
            ),
        }
    }
    Ok(notes)
}

fn authentic(mac_key: &MacKey, entry: &Entry) -> Option<(String, LastUsed)> {
    let id = entry.key.strip_prefix(PREFIX)?;
    let (mac, json) = entry.value.split_first_chunk::<MAC_BYTES>()?;
    if !mac_key.verify(&[LABEL, id, json], mac) {
        return None;
    }
    Some((String::from_utf8(id.to_vec()).ok()?, serde_json::from_slice(json).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn tcp(address: &str) -> SourceAddress {
        SourceAddress::Tcp(address.parse().unwrap())
    }

    #[test]
    fn one_use_in_a_minute_is_noted_without_port_or_process() {
        let last = LastUse::kept_before(None);
        assert_eq!(last.latest(), None);
        last.note(at(0), &tcp("192.0.2.1:1000"));
        last.note(at(59), &tcp("192.0.2.2:1000"));
        assert_eq!(last.latest(), Some(LastUsed { at: at(0), from: "192.0.2.1".to_owned() }));
        last.note(at(60), &SourceAddress::Unix { pid: Some(7) });
        assert_eq!(last.latest(), Some(LastUsed { at: at(60), from: "unix".to_owned() }));
        last.note(at(-1), &tcp("[::ffff:192.0.2.3]:1"));
        assert_eq!(last.latest(), Some(LastUsed { at: at(-1), from: "192.0.2.3".to_owned() }));
    }

    #[test]
    fn what_is_kept_is_not_kept_again() {
        let last = LastUse::kept_before(None);
        assert!(last.unkept().is_none());
        last.note(at(0), &tcp("192.0.2.1:1000"));
        let used = last.unkept().unwrap();
        last.note(at(60), &tcp("192.0.2.1:1000"));
        last.keep(&used);
        assert_eq!(last.unkept().unwrap().at, at(60), "what came while it was written is still to be kept");
        last.keep(&last.unkept().unwrap());
        assert!(last.unkept().is_none());
        let again = LastUse::kept_before(last.latest());
        assert!(again.unkept().is_none());
        assert_eq!(again.latest(), last.latest());
    }
}
