//! Unix-socket callers, whom the kernel vouches for (`SO_PEERCRED`, unix(7)).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use serde::Deserialize;

use super::{Authenticator, IdentityError, Presented, Principal, PrincipalKind, Proof, is_word};

/// `[identity.peer_credentials]`: whom a uid stands for.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// One `[[identity.peer_credentials.callers]]` table for each uid.
    #[serde(default)]
    pub callers: Vec<Caller>,
}

/// Whom one uid stands for.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Caller {
    /// The numeric user id.
    pub uid: u32,
    /// `user` or `workload`.
    pub kind: PrincipalKind,
    /// The principal's id, as policies name it.
    pub id: String,
    /// The principal's groups.
    #[serde(default)]
    pub groups: BTreeSet<String>,
}

/// Recognises Unix-socket peers by their uid.
#[derive(Debug)]
pub struct PeerCredentials {
    callers: HashMap<u32, Arc<Principal>>,
}

impl PeerCredentials {
    /// Refuses two tables for one uid: the second would silently win.
    ///
    /// # Errors
    /// A line that names the uid.
    pub fn new(config: Config) -> Result<Self, String> {
        let mut callers = HashMap::new();
        for caller in config.callers {
            let uid = caller.uid;
            if !is_word(&caller.id) || !caller.groups.iter().all(|group| is_word(group)) {
                return Err(format!(
                    "identity.peer_credentials.callers: uid {uid}: id and groups must be 1 to 128 printable ASCII \
                     characters without spaces"
                ));
            }
            let principal =
                Principal::new(caller.kind, caller.id, caller.groups, BTreeMap::new(), proof(uid));
            if callers.insert(uid, Arc::new(principal)).is_some() {
                return Err(format!(
                    "identity.peer_credentials.callers: uid {uid} stands twice; keep one table"
                ));
            }
        }
        Ok(Self { callers })
    }
}

#[async_trait]
impl Authenticator for PeerCredentials {
    /// A uid that no table names is still someone: `User::"uid:1234"`, in no group, so that policy denies it and the
    /// audit log says who it was.
    async fn authenticate(&self, presented: &Presented) -> Result<Option<Arc<Principal>>, IdentityError> {
        let Some(peer) = presented.peer else { return Ok(None) };
        let known = self.callers.get(&peer.uid).cloned();
        Ok(Some(known.unwrap_or_else(|| Arc::new(stranger(peer.uid)))))
    }

    fn concerns(&self, presented: &Presented) -> bool {
        presented.peer.is_some()
    }
}

fn stranger(uid: u32) -> Principal {
    Principal::new(PrincipalKind::User, format!("uid:{uid}"), BTreeSet::new(), BTreeMap::new(), proof(uid))
}

fn proof(uid: u32) -> Proof {
    Proof { method: "peer_credentials", detail: format!("uid={uid}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Peer;

    fn presented(uid: u32) -> Presented {
        Presented { peer: Some(Peer { uid, gid: 0, pid: None }), ..Presented::default() }
    }

    #[tokio::test]
    async fn uids_stand_for_whom_the_tables_say() {
        let caller = Caller {
            uid: 1000,
            kind: PrincipalKind::User,
            id: "ana".to_owned(),
            groups: BTreeSet::from(["team".to_owned()]),
        };
        let peers = PeerCredentials::new(Config { callers: vec![caller.clone()] }).unwrap();
        let ana = peers.authenticate(&presented(1000)).await.unwrap().unwrap();
        assert_eq!((ana.id(), ana.groups().len()), ("ana", 1));
        let stranger = peers.authenticate(&presented(7)).await.unwrap().unwrap();
        assert_eq!((stranger.id(), stranger.groups().len()), ("uid:7", 0));
        assert!(peers.authenticate(&Presented::default()).await.unwrap().is_none());
        assert!(PeerCredentials::new(Config { callers: vec![caller.clone(), caller.clone()] }).is_err());
        for bad in ["", " ops ", "a\nb", "é"] {
            let unnamed = Caller { id: bad.to_owned(), ..caller.clone() };
            let astray = Caller { groups: [bad.to_owned()].into(), ..caller.clone() };
            assert!(PeerCredentials::new(Config { callers: vec![unnamed] }).is_err(), "{bad:?}");
            assert!(PeerCredentials::new(Config { callers: vec![astray] }).is_err(), "{bad:?}");
        }
    }
}
